import copy

import numpy as np
import pytest
import torch

from model import distributed, moco


def unit_vectors(num: int, dim: int, seed: int) -> torch.Tensor:
    vectors = np.random.default_rng(seed).normal(size=(num, dim))
    return torch.tensor(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), dtype=torch.float32)


def info_nce_float64(query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, temperature: float) -> float:
    """Equation 1 of the MoCo paper, query by query."""
    q, k, negatives = (tensor.double().numpy() for tensor in (query, key, queue))
    losses = []
    for i in range(len(q)):
        positive = np.exp(q[i] @ k[i] / temperature)
        losses.append(-np.log(positive / (positive + np.exp(negatives @ q[i] / temperature).sum())))
    return float(np.mean(losses))


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_is_its_closed_form(temperature: float) -> None:
    query, key, queue = unit_vectors(5, 8, 0), unit_vectors(5, 8, 1), unit_vectors(33, 8, 2)
    loss = moco.info_nce(query, key, queue, temperature)
    assert loss.item() == pytest.approx(info_nce_float64(query, key, queue, temperature), rel=1e-6)


def test_info_nce_of_indistinguishable_keys_is_the_log_of_their_number() -> None:
    one = unit_vectors(1, 8, 0)
    assert moco.info_nce(one, one, one.repeat(99, 1), 0.2).item() == pytest.approx(np.log(100), rel=1e-6)


def test_info_nce_stays_in_fp32_under_autocast() -> None:
    query, key, queue = unit_vectors(5, 8, 0), unit_vectors(5, 8, 1), unit_vectors(33, 8, 2)
    with torch.autocast("cpu", torch.bfloat16):
        loss = moco.info_nce(query, key, queue, 0.2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(info_nce_float64(query, key, queue, 0.2), rel=1e-6)


def test_a_random_queue_holds_directions_uniform_on_the_sphere() -> None:
    torch.manual_seed(0)
    queue = moco.random_queue(20_000, 4).double()
    torch.testing.assert_close(queue.square().sum(1), torch.ones(20_000, dtype=torch.float64), rtol=1e-6, atol=0)
    # A coordinate has mean 0 and variance 1/4; six standard errors of 20,000 draws.
    assert queue.mean(0).abs().max() < 6 * 0.5 / 20_000**0.5
    torch.testing.assert_close(queue.T @ queue / 20_000, torch.eye(4, dtype=torch.float64) / 4, rtol=0, atol=0.01)


def write_one_by_one(queue: np.ndarray, pointer: int, keys: np.ndarray) -> int:
    """A ring buffer as simple as can be."""
    for key in keys:
        queue[pointer] = key
        pointer = (pointer + 1) % len(queue)
    return pointer


@pytest.mark.parametrize(
    ("num_places", "batches"),
    [
        pytest.param(8, [4, 4, 4], id="K is a multiple of the batch"),
        pytest.param(7, [3, 3, 3, 3, 3], id="K is no multiple of the batch"),
        pytest.param(5, [5, 2, 5], id="the batch is K"),
        pytest.param(5, [3, 12, 2, 6], id="the batch is larger than K"),
        pytest.param(1, [1, 3], id="K is 1"),
    ],
)
def test_queue_wraps_around_like_a_ring_buffer(num_places: int, batches: list[int]) -> None:
    queue, pointer = torch.zeros(num_places, 2), torch.zeros(1, dtype=torch.int64)
    expected, place = np.zeros((num_places, 2), dtype=np.float32), 0
    for seed, size in enumerate(batches):
        keys = unit_vectors(size, 2, seed)
        moco.enqueue(queue, pointer, keys)
        place = write_one_by_one(expected, place, keys.numpy())
        np.testing.assert_array_equal(queue.numpy(), expected)
        assert pointer.tolist() == [place]


def test_enqueue_reads_nothing_back_to_the_host() -> None:
    with torch.device("meta"):  # tensors without values: reading one raises an error
        moco.enqueue(torch.empty(7, 2), torch.empty(1, dtype=torch.int64), torch.empty(3, 2))


def test_moving_average_is_its_closed_form_after_many_steps() -> None:
    start, goal = torch.rand(3, 4), torch.rand(3, 4)
    average = [start.clone(), goal.clone()]
    for _ in range(50):
        moco.update_moving_average(average, [goal, goal], 0.9)
    expected = goal.double() + 0.9**50 * (start.double() - goal.double())
    torch.testing.assert_close(average[0].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(average[1], goal)


def test_moving_average_leaves_the_current_weights_and_their_gradients_alone() -> None:
    current = [torch.nn.Parameter(torch.rand(3))]
    before = copy.deepcopy(current)
    moco.update_moving_average([torch.rand(3)], current, 0.9)
    assert torch.equal(current[0], before[0])
    assert current[0].grad is None


def test_the_same_seed_gives_the_same_permutation_whatever_the_global_generator_does() -> None:
    torch.manual_seed(1)
    first = moco.shuffle_permutation(50, 7)
    torch.manual_seed(2)
    assert torch.equal(first, moco.shuffle_permutation(50, 7))
    assert not torch.equal(first, moco.shuffle_permutation(50, 8))
    assert sorted(first.tolist()) == list(range(50))


def test_permutations_of_consecutive_seeds_are_uniform() -> None:
    num_seeds, num_images = 3000, 5
    counts = np.zeros((num_images, num_images))
    for seed in range(num_seeds):
        counts[np.arange(num_images), moco.shuffle_permutation(num_images, seed).numpy()] += 1
    expected = num_seeds / num_images
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 45  # 16 degrees of freedom: exceeded by chance once in 7,000 times


def test_unshuffle_undoes_a_shuffle() -> None:
    features = torch.rand(9, 3)
    for seed in range(10):
        permutation = moco.shuffle_permutation(9, seed)
        shuffled = distributed.exchange(features, permutation)
        np.testing.assert_array_equal(shuffled.numpy(), features.numpy()[permutation.numpy()])
        assert torch.equal(moco.unshuffle(shuffled, permutation), features)
