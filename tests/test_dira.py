import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from model import distributed
from model.dira import MODES, DiRA, Keys, LossWeights
from model.discriminator import discriminator_loss
from model.moco import shuffle_permutation
from model.optim import make_sgd
from tests.test_distributed import RANKS, run_on_ranks

SIZE_PX = 64
MOMENTUM = 0.9


def build(mode: str, *, seed: int = 0, **changes: Any) -> DiRA:
    """A small model; the changes are arguments of `DiRA`."""
    torch.manual_seed(seed)
    settings = {"arch": "resnet18", "moco_dim": 16, "moco_k": 20, "moco_m": MOMENTUM, "moco_t": 0.2}
    settings |= {"key_bn_groups": 2, "weights": LossWeights()}
    return DiRA(mode=mode, **settings | changes)


def images(num: int, seed: int) -> Tensor:
    """Distinct smooth images: what is grey here and what is bright there differs between them."""
    coarse = torch.rand(num, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(coarse, size=SIZE_PX, mode="bilinear") * 255).to(torch.uint8)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def is_bn_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def test_networks_start_equal_and_only_the_modes_own_parts_are_there() -> None:
    for mode in MODES:
        model = build(mode)
        for name, tensor in model.key.state_dict().items():
            assert torch.equal(tensor, model.query.state_dict()[name])
        assert not any(parameter.requires_grad for parameter in model.key.parameters())
        assert model.key.decoder is None
        assert (model.query.decoder is None) == (mode == "di")
        assert (model.discriminator is None) == (mode != "dira")
        assert model.queue.shape == (20, 16)
        torch.testing.assert_close(model.queue.norm(dim=1), torch.ones(20))
        assert model.queue_ptr.tolist() == [0]


@pytest.mark.parametrize("mode", MODES)
def test_total_is_the_weighted_sum_of_the_modes_own_terms(mode: str) -> None:
    model = build(mode, weights=LossWeights(contrastive=2.0, mse=3.0, adversarial=0.5)).eval()
    keys = model.encode_keys(images(3, 1))
    embedding, reconstruction = model.query(images(3, 2))
    losses = model.losses(embedding, reconstruction, keys, images(3, 3))
    similarity = embedding.detach().double() @ torch.cat((keys.local, model.queue)).double().T / 0.2
    rows = [torch.cat((similarity[i, i : i + 1], similarity[i, 3:])) for i in range(3)]
    expected = 2 * np.mean([row.logsumexp(0).item() - row[0].item() for row in rows])
    assert 2 * losses.contrastive.item() == pytest.approx(expected, rel=1e-5)
    if mode == "di":
        assert losses.mse is None
    else:
        mse = ((reconstruction.detach().double() - images(3, 3).double() / 255) ** 2).mean().item()
        assert losses.mse.item() == pytest.approx(mse, rel=1e-5)
        expected += 3 * mse
    if mode == "dira":
        adversarial = ((model.discriminator(reconstruction) - 1) ** 2).mean().item()
        assert losses.adversarial.item() == pytest.approx(adversarial, rel=1e-5)
        expected += 0.5 * adversarial
    else:
        assert losses.adversarial is None
    assert losses.total.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_the_generators_step_reaches_every_query_parameter_and_nothing_else(mode: str) -> None:
    model = build(mode)
    keys = model.encode_keys(images(4, 1), shuffle_permutation(4, 0))
    model.losses(*model.query(images(4, 2)), keys, images(4, 3)).total.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if not name.startswith("query.")}
    assert not keys.all.requires_grad


def test_a_pass_changes_nothing_but_bn_statistics_and_in_eval_mode_nothing() -> None:
    model = build("dira")
    for training in (True, False):
        model.train(training)
        before = snapshot(model)
        keys = model.encode_keys(images(4, 1), shuffle_permutation(4, 0))
        outputs = model.query(images(4, 2))
        names = changed(before, model)
        assert all(is_bn_statistic(name) for name in names)
        assert {name.split(".")[0] for name in names} == ({"query", "key"} if training else set())
        before = snapshot(model)
        model.losses(*outputs, keys, images(4, 3))
        assert not changed(before, model)
        assert all(parameter.requires_grad for parameter in model.discriminator.parameters())


def test_key_weights_follow_the_querys_as_a_moving_average_and_statistics_do_not() -> None:
    model = build("dira")
    with torch.no_grad():
        for parameter in model.query.parameters():
            parameter.add_(torch.randn_like(parameter))
        for buffer in model.query.buffers():
            buffer.add_(1)
    before = snapshot(model)
    model.update_key_encoder()
    for name, tensor in model.key.state_dict().items():
        old, current = before[f"key.{name}"], before[f"query.{name}"]
        if is_bn_statistic(name):
            assert torch.equal(tensor, old)
        else:
            expected = MOMENTUM * old.double() + (1 - MOMENTUM) * current.double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)
    assert all(name.startswith("key.") for name in changed(before, model))


def test_enqueued_keys_replace_the_oldest() -> None:
    model = build("di")
    before = model.queue.clone()
    first, second = torch.rand(12, 16), torch.rand(12, 16)
    model.enqueue(first)
    assert torch.equal(model.queue, torch.cat((first, before[12:])))
    model.enqueue(second)
    assert torch.equal(model.queue, torch.cat((second[8:], first[4:], second[:8])))
    assert model.queue_ptr.tolist() == [4]


def encode_and_watch(model: DiRA, key_images: Tensor, seed: int) -> tuple[Keys, list[Tensor]]:
    """The keys, and the batches of images that the key network was called with."""
    seen: list[Tensor] = []
    hook = model.key.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    keys = model.encode_keys(key_images, shuffle_permutation(distributed.world_size() * len(key_images), seed))
    hook.remove()
    return keys, seen


def test_the_queues_similarity_is_the_mean_cosine_of_its_keys() -> None:
    model = build("di")
    cosines = model.queue.double() @ model.queue.double().T
    assert model.queue_similarity().item() == pytest.approx(cosines.mean().item(), rel=1e-5)
    assert model.queue_similarity() < 0.2
    model.queue.copy_(model.queue[:1].clone())
    assert model.queue_similarity().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("num_images", "num_groups", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (10, 4, [3, 3, 2, 2]), (5, 4, [3, 2]), (3, 4, [3]), (2, 4, [2]), (1, 4, [1]), (6, 1, [6])],
)
def test_on_one_rank_keys_are_normalised_in_shuffled_groups(num_images: int, num_groups: int, sizes: list[int]) -> None:
    model = build("di", key_bn_groups=num_groups)
    reference = copy.deepcopy(model.key)
    batch = images(num_images, 1)
    keys, seen = encode_and_watch(model, batch, seed=3)
    order = shuffle_permutation(num_images, 3).numpy()
    np.testing.assert_array_equal(torch.cat(seen).numpy(), batch.numpy()[order])
    # Each key depends on its group, so recomputing it in that group, image by image, tells that none went elsewhere.
    stops = np.cumsum(sizes)
    for start, stop in zip(stops - sizes, stops, strict=True):
        members = order[start:stop]
        expected, _ = reference(batch[members])
        torch.testing.assert_close(keys.local[members], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(keys.all, keys.local)


def test_a_keys_group_changes_with_the_seed_and_shows_in_its_embedding() -> None:
    model, batch = build("di"), images(8, 1)
    one, again, other = (model.encode_keys(batch, shuffle_permutation(8, seed)).local for seed in (0, 0, 1))
    torch.testing.assert_close(one, again)
    together, _ = model.key(batch)
    for embedded in (other, together):
        assert ((one - embedded).abs().amax(dim=1) > 1e-3).all()


def test_in_eval_mode_keys_depend_on_no_batch_and_no_seed() -> None:
    model, batch = build("di").eval(), images(5, 1)
    keys, seen = encode_and_watch(model, batch, seed=3)
    assert len(seen) == 1
    assert torch.equal(seen[0], batch)
    assert keys.all is keys.local
    for i in range(5):
        torch.testing.assert_close(keys.local[i : i + 1], model.key(batch[i : i + 1])[0], rtol=1e-4, atol=1e-5)


def _share(batch: Tensor) -> Tensor:
    return batch.chunk(distributed.world_size())[distributed.rank()]


def _train(_: Path) -> dict[str, Any]:
    """Keys with BN in training mode; then, with BN frozen and in float64, two whole steps of a batch of 6 images."""
    views = [_share(images(6, seed)) for seed in (1, 2, 3)]
    result: dict[str, Any] = {}
    result["keys"], result["seen"] = encode_and_watch(build("di"), views[0], seed=3)
    views = [view.double() / 255 for view in views]
    for mode in ("di", "dira"):
        torch.set_default_dtype(torch.float64)
        model = build(mode)
        torch.set_default_dtype(torch.float32)
        model.query.eval()
        model.key.eval()
        query = distributed.wrap_ddp(model.query)
        optimizer = make_sgd(
            query.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4, fused="auto", device=torch.device("cpu")
        )
        if mode == "dira":
            discriminator = distributed.wrap_ddp(model.discriminator)
            its_optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1)
        for step in range(2):
            keys = model.encode_keys(views[0], shuffle_permutation(6, step))
            embedding, reconstruction = query(views[1])
            losses = model.losses(embedding, reconstruction, keys, views[2])
            optimizer.zero_grad()
            losses.total.backward()
            result[mode, "gradients", step] = {name: p.grad.clone() for name, p in model.query.named_parameters()}
            optimizer.step()
            if mode == "dira":
                its_optimizer.zero_grad()
                discriminator_loss(discriminator, views[2], reconstruction).backward()
                its_optimizer.step()
            model.update_key_encoder()
            model.enqueue(keys.all)
            result[mode, "loss", step] = distributed.all_reduce_mean(losses.total.detach())
        result[mode, "state"] = snapshot(model)
    return result


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(_train, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _train(tmp_path_factory.mktemp("alone"))


def test_on_two_ranks_each_normalises_its_share_of_the_permuted_images(two_ranks: list[dict[str, Any]]) -> None:
    batch, order = images(6, 1), shuffle_permutation(6, 3).numpy()
    reference = build("di").key
    for rank, result in enumerate(two_ranks):
        (seen,) = result["seen"]
        members = order[3 * rank : 3 * rank + 3]
        np.testing.assert_array_equal(seen.numpy(), batch.numpy()[members])
        expected, _ = reference(batch[members])
        for everyones in (two_ranks[0]["keys"].all, two_ranks[1]["keys"].all):
            torch.testing.assert_close(everyones[members], expected, rtol=1e-4, atol=1e-5)


def test_on_two_ranks_local_keys_are_the_ranks_rows_of_the_global_batch(two_ranks: list[dict[str, Any]]) -> None:
    assert torch.equal(two_ranks[0]["keys"].all, two_ranks[1]["keys"].all)
    assert torch.equal(torch.cat([result["keys"].local for result in two_ranks]), two_ranks[0]["keys"].all)


@pytest.mark.parametrize("mode", ["di", "dira"])
def test_two_ranks_with_bn_frozen_train_as_one_with_the_whole_batch(
    two_ranks: list[dict[str, Any]], one_rank: dict[str, Any], mode: str
) -> None:
    assert len(two_ranks) == RANKS
    for result in two_ranks:
        for step in range(2):
            torch.testing.assert_close(result[mode, "loss", step], one_rank[mode, "loss", step], rtol=1e-9, atol=0)
            for name, gradient in one_rank[mode, "gradients", step].items():
                distance = (result[mode, "gradients", step][name] - gradient).abs().max()
                assert distance < 1e-9 * gradient.abs().max(), f"{name} in step {step}"
        for name, tensor in one_rank[mode, "state"].items():
            torch.testing.assert_close(result[mode, "state"][name], tensor, rtol=1e-8, atol=1e-10, msg=name)
