"""The sketch of a gradient: its specification, that parts add up, how far its norm is off, and
what that makes of S in real training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from hf_adalip import AdaLip, AdamLip
from hf_adalip.optim import Estimator, LipOptimizer
from hf_adalip.optim.estimator import NO_PREDECESSOR, LayerState
from hf_adalip.optim.history import DEFAULT_SKETCH_SIZE, countsketch, sketch

EXACT = {"rtol": 1e-13, "atol": 1e-13}
Part = tuple[tuple[slice, ...], tuple[int, ...]]


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture(params=[32, 2**17], ids=["many slabs", "one slab"])
def _slabs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(countsketch, "_SLAB", request.param)


in_slabs = pytest.mark.usefixtures("_slabs")


# The specification


def mix(x: int) -> int:
    x %= 2**32
    x ^= x >> 16
    x = x * 0x85EBCA6B % 2**32
    x ^= x >> 13
    x = x * 0xC2B2AE35 % 2**32
    return x ^ x >> 16


def specified(x: Tensor, size: int, seed: int = 0, start: int = 0) -> Tensor:
    """The sketch of consecutive elements, one after the other."""
    golden = 0x9E3779B9
    result = [0.0] * size
    for i, value in enumerate(x.reshape(-1).tolist(), start):
        negative = mix(i // 32 + golden * (2 * seed + 1)) >> i % 32 & 1
        turn = mix(i // size + golden * (2 * seed + 2))
        result[(i % size + turn) % size] += -value if negative else value
    return torch.tensor(result, dtype=torch.float64)


@in_slabs
@pytest.mark.parametrize("size", [32, 64, 1024])
@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_is_as_specified(size: int, seed: int) -> None:
    x = randn(7, 311)
    torch.testing.assert_close(sketch(x, size, seed=seed), specified(x, size, seed), **EXACT)


@pytest.mark.parametrize("start", [2**31 - 40, 2**32 - 40, 2**37 - 40, 2**40 + 5])
def test_large_indices(start: int) -> None:
    """Where the hash of an index wraps around, and where 32 bits do not hold an index."""
    x = randn(100)
    whole = sketch(x, 64, shape=(2**41,), offset=(start,))
    torch.testing.assert_close(whole, specified(x, 64, start=start), **EXACT)


def test_the_hash_is_of_32_bits() -> None:
    """Known values of the 32-bit finalizer, so that both transcriptions are not wrong alike."""
    assert [mix(x) for x in (0, 1, 2**32 - 1)] == [0, 0x514E28B7, 0x81F16F39]
    values = [0, 1, 12345, 2**31, 2**32 - 1, 2**32, 2**40 + 7]
    assert countsketch.mix(torch.tensor(values)).tolist() == [mix(x) for x in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_low_precision_is_in_float32(dtype: torch.dtype) -> None:
    x = randn(3000, dtype=dtype)
    result = sketch(x, 128)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), specified(x, 128), rtol=1e-5, atol=1e-5)


@in_slabs
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.clone(memory_format=torch.channels_last),
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        lambda x: x.new_zeros(4, 3, 5, 14)[..., ::2].copy_(x),
    ],
    ids=["channels_last", "transposed", "strided"],
)
def test_memory_format_is_not_seen(layout: object) -> None:
    x = randn(4, 3, 5, 7)
    other = layout(x)  # type: ignore[operator]
    assert not other.is_contiguous()
    torch.testing.assert_close(sketch(other, 32), sketch(x, 32), **EXACT)
    torch.testing.assert_close(sketch(x[:1].expand(4, -1, -1, -1), 32), sketch(x[[0] * 4], 32))


def test_empty_and_scalar() -> None:
    for shape in [(0,), (3, 0), (0, 3)]:
        assert torch.equal(sketch(torch.zeros(shape), 64), torch.zeros(64))
    empty = sketch(torch.zeros(0, 3), 64, shape=(5, 3), offset=(5, 0))
    assert torch.equal(empty, torch.zeros(64))
    for x in (torch.tensor(2.5), torch.tensor([2.5])):
        torch.testing.assert_close(sketch(x, 64).double(), specified(x, 64), **EXACT)


def test_nonfinite_is_seen() -> None:
    for value in (math.nan, math.inf, -math.inf):
        x = torch.ones(1000)
        x[777] = value
        assert not sketch(x, 64).norm().isfinite()


@pytest.mark.parametrize("size", [0, -32, 16, 48, 1000])
def test_size_is_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match=f"got {size}"):
        sketch(torch.ones(3), size)


@pytest.mark.parametrize(
    ("shape", "offset"),
    [((3, 4), (0, 1)), ((3, 4), (-1, 0)), ((12,), (0,)), ((3, 4), (0,)), ((2, 4), (0, 0))],
)
def test_part_is_inside_of_the_whole(shape: tuple[int, ...], offset: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"is no part of one of shape"):
        sketch(torch.ones(3, 4), 64, shape=shape, offset=offset)


def test_threads_change_nothing() -> None:
    """Ranks must agree bit for bit, however many threads each has."""
    x = randn(700, 1000, dtype=torch.float32)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [sketch(x, size) for size in (64, 4096)]
    torch.set_num_threads(before)
    for result, first in zip(results[2:], results[:2] * 2, strict=True):
        assert torch.equal(result, first)


def test_is_differentiable() -> None:
    x = randn(20, 20).requires_grad_()
    (grad,) = torch.autograd.grad(sketch(x, 32).square().sum(), x)
    direction = randn(20, 20, seed=1)
    expected = 2 * (sketch(x, 32) * sketch(direction, 32)).sum()
    torch.testing.assert_close((grad * direction).sum(), expected)


# Parts


def grid(cuts: list[list[int]]) -> Iterator[Part]:
    """The parts of a tensor that is cut in each dimension, and where each begins."""
    for edges in itertools.product(*(itertools.pairwise(c) for c in cuts)):
        yield tuple(slice(a, b) for a, b in edges), tuple(a for a, _ in edges)


@st.composite
def partitions(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]]]:
    """A shape and where it is cut in each dimension; cuts in one place make empty parts."""
    shape = draw(st.lists(st.integers(1, 11), max_size=4))
    cuts = [sorted(draw(st.lists(st.integers(0, n), max_size=2))) for n in shape]
    return tuple(shape), [[0, *inner, n] for inner, n in zip(cuts, shape, strict=True)]


@given(partitions(), st.sampled_from([32, 64]), st.sampled_from([32, 256, 2**17]))
def test_parts_add_up(
    partition: tuple[tuple[int, ...], list[list[int]]], size: int, slab: int
) -> None:
    shape, cuts = partition
    x = randn(*shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(countsketch, "_SLAB", slab)
        parts = [sketch(x[at], size, shape=shape, offset=offset) for at, offset in grid(cuts)]
    torch.testing.assert_close(sum(parts), specified(x, size), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shards_add_up_in_float32(ranks: int) -> None:
    """As FSDP2 (rows), tensor parallelism (columns) and both of them cut a weight."""
    x = randn(300, 1111, dtype=torch.float32)
    whole = sketch(x, 1024)

    def cut(n: int) -> list[int]:
        return [min(i * math.ceil(n / ranks), n) for i in range(ranks + 1)]

    for cuts in ([cut(300), [0, 1111]], [[0, 300], cut(1111)], [cut(300), cut(1111)]):
        parts = [sketch(x[at], 1024, shape=(300, 1111), offset=offset) for at, offset in grid(cuts)]
        change = sum(parts) - whole
        assert change.norm() < 1e-6 * whole.norm()


# How far the norm is off

K, SEEDS = 64, 400


def one_at(*indices: int, size: int = 10_000) -> Tensor:
    x = torch.zeros(size, dtype=torch.float64)
    x[list(indices)] = 1.0
    return x


def column(rows: int, width: int, constant: bool = True) -> Tensor:
    x = torch.zeros(rows, width, dtype=torch.float64)
    x[:, width // 3] = 1.0 if constant else randn(rows)
    return x


def row() -> Tensor:
    x = torch.zeros(50, 300, dtype=torch.float64)
    x[17] = randn(300)
    return x


GRADIENTS = {
    "gaussian": lambda: randn(100, 100),
    "constant": lambda: torch.ones(10_000, dtype=torch.float64),
    "alternating": lambda: torch.ones(10_000, dtype=torch.float64).index_fill(
        0, torch.arange(0, 10_000, 2), -1.0
    ),
    "heavy-tailed": lambda: randn(10_000).pow(9),
    "one element": lambda: one_at(1234),
    "two neighbours": lambda: one_at(1234, 1235),
    "two at the same place of two blocks": lambda: one_at(10, 10 + 3 * K),
    "two anywhere": lambda: one_at(17, 4321),
    "one row": row,
    **{
        f"a column of stride {width}": lambda width=width: column(200, width)
        for width in (K // 2, K - 1, K, K + 1, 2 * K, 3 * K, 16 * K)
    },
    "a random column of stride k": lambda: column(200, K, constant=False),
}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_square_of_the_norm_is_unbiased_and_bounded_in_spread(gradient: str) -> None:
    """Over seeds: a mean of 1 and a standard deviation of at most √(2/k) of ‖Πx‖²/‖x‖²."""
    x = GRADIENTS[gradient]()
    x = x / x.norm()
    squares = torch.stack([sketch(x, K, seed=seed).square().sum() for seed in range(SEEDS)])
    bound = math.sqrt(2 / K)
    # Five standard errors of a mean, and four of a standard deviation (of normal numbers).
    assert (squares.mean() - 1).abs() < max(5 * bound / math.sqrt(SEEDS), 1e-12)
    assert squares.std() < bound * (1 + 4 / math.sqrt(2 * SEEDS))


def test_spread_of_the_norm() -> None:
    """About √(1/2k), for a vector of many elements of the same order."""
    x = randn(100, 100)
    for size in (64, 256):
        norms = torch.stack([sketch(x, size, seed=seed).norm() for seed in range(SEEDS)])
        spread = (norms / x.norm()).std().item()
        assert spread == pytest.approx(math.sqrt(1 / (2 * size)), rel=0.2)


def test_pairs_meet_with_probability_one_in_k() -> None:
    """Elements of one block never meet, of two blocks with probability 1/k; of those that meet,
    half have equal signs."""
    blocks = 2000
    places = torch.stack(
        [sketch(one_at(3, size=K), K, shape=(blocks * K,), offset=(j * K,)) for j in range(blocks)]
    )
    products = (places @ places.T).triu(1)
    pairs = blocks * (blocks - 1) / 2
    meetings = products.abs().sum().item()
    assert meetings == pytest.approx(pairs / K, rel=0.05)
    assert products.sum().abs().item() < 5 * math.sqrt(meetings)
    inside = torch.stack([sketch(one_at(i, size=K), K) for i in range(K)])
    assert torch.equal(inside.abs().sum(0), torch.ones(K, dtype=torch.float64))


def test_is_linear() -> None:
    """What makes the sketch of a change the change of the sketch."""
    x, y = randn(30, 70), randn(30, 70, seed=1)
    difference = sketch(3 * x - y, 128, seed=5)
    torch.testing.assert_close(difference, 3 * sketch(x, 128, seed=5) - sketch(y, 128, seed=5))


# S


def follow(estimator: Estimator, norms: Tensor, changes: Tensor) -> Tensor:
    """S of every layer after every step, [steps, layers], from what was measured."""
    state = LayerState(torch.ones_like(norms[0]), torch.full_like(norms[0], NO_PREDECESSOR))
    scales = []
    for norm, change in zip(norms, changes, strict=True):
        state, *_ = estimator.update(state, norm, change)
        scales.append(state.scale)
    return torch.stack(scales)


def changes(gradients: list[Tensor]) -> Tensor:
    """‖x_t - x_{t-1}‖ of successive x, x_0 = 0."""
    before = [torch.zeros_like(gradients[0]), *gradients]
    return torch.stack([(b - a).norm() for a, b in zip(before, gradients, strict=False)])


@pytest.mark.slow
@pytest.mark.parametrize("bounds", [(0.1, 10.0), None])
@pytest.mark.parametrize("batch", [32, 1797])
@pytest.mark.parametrize(("kind", "lr"), [(AdamLip, 1e-3), (AdaLip, 0.05)])
def test_scale_in_training(
    kind: type[LipOptimizer], lr: float, batch: int, bounds: tuple[float, float] | None
) -> None:
    """With the default size, S is within 5 % of exact at every step of every layer.

    Small batches, and all of the data at once, when gradients hardly change.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(np.asarray(images, dtype=np.float32) / 16)
    y = torch.from_numpy(np.asarray(labels))
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
    model.append(nn.Linear(64, 10))
    optimizer = kind(model.parameters(), lr=lr, scale_bounds=bounds)
    seen: list[list[Tensor]] = [[] for _ in model.parameters()]
    first = last = 0.0
    for step in range(100):
        at = torch.randperm(len(x))[:batch]
        loss = nn.functional.cross_entropy(model(x[at]), y[at])
        first, last = (loss.item() if step == 0 else first), loss.item()
        optimizer.zero_grad()
        loss.backward()
        for of_one, p in zip(seen, model.parameters(), strict=True):
            assert p.grad is not None
            of_one.append(p.grad.clone())
        optimizer.step()
    assert last < 0.95 * first  # that it was training

    large = [gradients for gradients in seen if gradients[0].numel() > DEFAULT_SKETCH_SIZE]
    assert len(large) == 2
    norms = torch.stack([torch.stack([g.norm() for g in layer]) for layer in large], dim=1)
    exact = torch.stack([changes(layer) for layer in large], dim=1)
    short = torch.stack(
        [changes([sketch(g, DEFAULT_SKETCH_SIZE) for g in layer]) for layer in large], dim=1
    )
    estimator = Estimator(scale_bounds=bounds)
    expected, actual = (follow(estimator, norms, x) for x in (exact, short))
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.0)
