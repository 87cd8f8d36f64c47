"""The plain step and ours are the same mathematics: in float64 they agree to rounding."""

import pytest
import torch

from benchmarks.plain_step import PlainStep, plain_batch
from pipeline.spec import Batch
from settings import Settings
from tests.test_dira import images
from training.learner import Learner, build_learner
from training.step import train_step

CPU = torch.device("cpu")
NUM_IMAGES = 4


def learner_in_float64(mode: str) -> Learner:
    """A small learner; one BN group for the keys, as the plain step has."""
    settings = Settings(
        shards=("none",),
        mode=mode,
        arch="resnet18",
        crop_size=64,
        moco_k=12,
        key_bn_groups=1,
        batch_size=NUM_IMAGES,
        precision="fp32",
        device="cpu",
        moco_m=0.9,
        adv_weight=0.5,  # the published 0.001 would hide a mistake
    )
    return in_float64(settings)


def in_float64(settings: Settings) -> Learner:
    """Build a learner that computes in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        return build_learner(settings, CPU)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("mode", ["dir", "dira"])
def test_both_steps_give_the_same_losses_and_the_same_weights_in_float64(mode: str) -> None:
    ours = learner_in_float64(mode)
    settings = ours.settings
    plain = PlainStep(
        *(ours.model, settings.arch),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        disc_lr=settings.disc_lr,
    )
    before = {name: tensor.clone() for name, tensor in plain.networks()}
    for step in range(2):  # the second sees what the first left in momentum, moving average and queue
        batch = Batch(*(images(NUM_IMAGES, 10 * step + i) for i in range(3)))
        floats = Batch(*(view.double() / 255 for view in batch))
        our_terms = train_step(ours, floats)
        ours.step += 1
        assert our_terms.tolist() == pytest.approx(plain(plain_batch(batch, torch.float64)), rel=1e-9)
        state = ours.model.state_dict()
        theirs = dict(plain.networks())
        assert state.keys() - theirs.keys() == {"queue_ptr"}
        for name, tensor in theirs.items():
            assert tensor.dtype in {torch.float64, torch.int64}
            torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9, msg=f"{name} after step {step}")
    unmoved = [name for name, tensor in plain.networks() if torch.equal(tensor, before[name])]
    assert not unmoved
