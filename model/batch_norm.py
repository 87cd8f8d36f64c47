"""Batch normalisation of the keys, on one rank: in groups, as if each were on a rank of its own."""

import torch
from torch import Tensor, nn


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """Takes its statistics, in training mode, from each of several groups of the batch by itself. Without gradient.

    What comes before and after sees the whole batch: convolutions of large batches are faster than of parts.

    Args:
        like: The layer whose weights and statistics it goes on with.
        num_groups: As even as possible, one after the other; fewer where a group would hold a single image.
    """

    def __init__(self, like: nn.BatchNorm2d, num_groups: int) -> None:
        super().__init__(like.num_features, like.eps, like.momentum)
        self.load_state_dict(like.state_dict())
        self.requires_grad_(requires_grad=like.weight.requires_grad)
        self.num_groups = num_groups

    def forward(self, images: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; the running statistics move once for each group."""
        num_groups = max(1, min(self.num_groups, len(images) // 2))
        if not self.training or num_groups == 1:
            return super().forward(images)
        if torch.compiler.is_compiling():  # the compiler fuses the copy away, and can't take the way below
            return torch.cat(
                [super(GroupedBatchNorm2d, self).forward(part) for part in images.tensor_split(num_groups)]
            )
        self.num_batches_tracked.add_(num_groups)
        normalised = torch.empty_like(images)  # written in place: concatenating parts would copy them once more
        mean, inverse_std = torch.empty_like(self.running_mean), torch.empty_like(self.running_var)
        for part, out in zip(images.tensor_split(num_groups), normalised.tensor_split(num_groups), strict=True):
            running = self.running_mean, self.running_var
            torch.native_batch_norm(
                part, self.weight, self.bias, *running, True, self.momentum, self.eps, out=(out, mean, inverse_std)
            )
        return normalised


def group_batch_norm(network: nn.Module, num_groups: int) -> None:
    """Put `GroupedBatchNorm2d` in the place of every batch normalisation of the network."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, GroupedBatchNorm2d(child, num_groups))
