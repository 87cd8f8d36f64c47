"""The step as one CUDA graph: at small batches the GPU waits for kernels to be launched, and a graph is one launch."""

import torch
from torch import Tensor

from errors import UsageError
from model import distributed
from model.optim import learning_rate_in_tensor
from pipeline.spec import Batch
from training.learner import Learner
from training.step import draw_permutation, ignore, step_on_device

NUM_EAGER_STEPS = 3
"""Taken before the capture, as they would be without it: cuDNN chooses its kernels in them and buffers get made."""


class GraphedStep:
    """In the place of `train_step`: takes a few steps eagerly, captures the next one, and replays it from then on.

    Make it after a checkpoint was restored, which makes new tensors of what optimizers remember. The networks' tensors
    may be written to between steps, but not replaced. See https://docs.pytorch.org/docs/stable/notes/cuda.html
    (CUDA graphs, whole-network capture).
    """

    def __init__(self, learner: Learner) -> None:
        """Prepare the optimizers.

        Raises:
            UsageError: There is no GPU, or there are several ranks: how much they exchange changes with each step.
        """
        if learner.device.type != "cuda":
            raise UsageError(f"--cuda-graphs needs a GPU, and this run is on {learner.device.type}: leave it out")
        if distributed.world_size() > 1:
            raise UsageError("--cuda-graphs runs on one rank only: leave it out")
        for optimizer in filter(None, (learner.optimizer, learner.disc_optimizer)):
            learning_rate_in_tensor(optimizer, learner.device)
        self._num_taken = 0
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, learner: Learner, batch: Batch) -> Tensor:
        """Take one step; return the terms of the loss as `train_step` does."""
        permutation = draw_permutation(learner)
        if self._num_taken < NUM_EAGER_STEPS:
            self._num_taken += 1
            return self._take_eagerly(learner, batch, permutation)
        if self._graph is None:
            self._capture(learner, batch, permutation)
        for ours, theirs in zip((*self._batch, self._permutation), (*batch, permutation), strict=True):
            ours.copy_(theirs)
        self._graph.replay()
        return self._terms.clone()

    def _take_eagerly(self, learner: Learner, batch: Batch, permutation: Tensor) -> Tensor:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            terms = step_on_device(learner, batch, permutation, ignore)
        current.wait_stream(self._stream)
        for tensor in (*batch, permutation):
            tensor.record_stream(self._stream)
        return terms

    def _capture(self, learner: Learner, batch: Batch, permutation: Tensor) -> None:
        """Record a step without taking it; the graph reads its inputs from tensors of its own."""
        self._batch, self._permutation = Batch(*(images.clone() for images in batch)), permutation.clone()
        for optimizer in filter(None, (learner.optimizer, learner.disc_optimizer)):
            optimizer.zero_grad()  # so that the gradients are made anew, in the graph's own memory
        self._graph = torch.cuda.CUDAGraph()
        # Only this thread's calls are watched: DALI's threads go on allocating meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._terms = step_on_device(learner, self._batch, self._permutation, ignore)
