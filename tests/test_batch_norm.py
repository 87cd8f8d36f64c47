import copy

import pytest
import torch
from torch import Tensor, nn

from model.batch_norm import GroupedBatchNorm2d, group_batch_norm

CHANNELS = 5


def trained_layer() -> nn.BatchNorm2d:
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    return layer.requires_grad_(requires_grad=False)


def draw(num_images: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    images = 3 + 2 * torch.randn(num_images, CHANNELS, 4, 6, generator=torch.Generator().manual_seed(num_images))
    return images.to(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("num_images", "num_groups", "sizes"), [(8, 4, [2, 2, 2, 2]), (7, 3, [3, 2, 2]), (5, 4, [3, 2]), (3, 4, [3])]
)
def test_each_group_is_normalised_by_its_own_statistics(
    num_images: int, num_groups: int, sizes: list[int], layout: torch.memory_format
) -> None:
    plain, images = trained_layer(), draw(num_images, layout)
    grouped = GroupedBatchNorm2d(plain, num_groups)
    normalised = grouped(images)
    expected = torch.cat([plain(part) for part in images.split(sizes)])
    torch.testing.assert_close(normalised, expected)
    assert normalised.is_contiguous(memory_format=layout)
    torch.testing.assert_close(grouped.state_dict(), plain.state_dict())
    assert grouped.num_batches_tracked == len(sizes)


def test_bf16_images_give_bf16_and_fp32_statistics() -> None:
    plain, images = trained_layer(), draw(6).bfloat16()
    grouped = GroupedBatchNorm2d(plain, 2)
    torch.testing.assert_close(grouped(images), torch.cat([plain(part) for part in images.split(3)]))
    assert grouped.running_mean.dtype == torch.float32
    torch.testing.assert_close(grouped.running_mean, plain.running_mean)


def test_in_eval_mode_it_is_the_plain_layer() -> None:
    plain, images = trained_layer().eval(), draw(8)
    assert torch.equal(GroupedBatchNorm2d(plain, 4).eval()(images), plain(images))


def test_compiled_it_does_the_same() -> None:
    grouped, images = GroupedBatchNorm2d(trained_layer(), 2), draw(6, torch.channels_last)
    compiled = copy.deepcopy(grouped)
    compiled.compile(fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), grouped(images))
    torch.testing.assert_close(compiled.state_dict(), grouped.state_dict())


def test_every_layer_of_a_network_is_replaced_and_its_state_stays() -> None:
    network = nn.Sequential(trained_layer(), nn.Sequential(nn.ReLU(), trained_layer()))
    state = copy.deepcopy(network.state_dict())
    group_batch_norm(network, 2)
    assert [type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)] == [GroupedBatchNorm2d] * 2
    torch.testing.assert_close(network.state_dict(), state)
    assert not any(parameter.requires_grad for parameter in network.parameters())
