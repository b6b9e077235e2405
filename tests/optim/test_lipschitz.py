"""What S does: closed forms, the paper's lemmas and theorem, and the design's conventions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from hf_adalip import AdaLip, AdaLipU
from hf_adalip.optim import LipOptimizer
from tests.optim.cases import CLASSES, UPDATE, forms, six

pytestmark = pytest.mark.usefixtures("float64")

LR = 0.1


def follow(
    grads: Iterable[Tensor | None],
    kind: Callable[..., LipOptimizer] = AdaLip,
    inverse_sqrt: bool = False,
    lr: float = LR,
    **options: Any,
) -> tuple[list[float], list[float]]:
    """S_t and A_t at every step of one layer with the given gradients."""
    grads = list(grads)
    p = next(torch.zeros_like(g) for g in grads if g is not None).requires_grad_()
    optimizer = kind([p], lr=lr, **options)
    # LambdaLR counts from 0, the paper from 1.
    schedule = LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1) if inverse_sqrt else 1.0)
    scales, rates = [], []
    for grad in grads:
        p.grad = grad
        optimizer.step()
        schedule.step()
        for rate in optimizer.layer_learning_rates().values():
            scales.append(rate.scale)
            rates.append(rate.lr)
    return scales, rates


def vectors(count: int, size: int = 5, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, size, generator=generator))


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


sequences = st.builds(vectors, st.integers(2, 12), st.integers(1, 6), st.integers(0, 2**16))
gammas = st.floats(0.05, 0.95)


# The closed form, and what similar gradients give


@given(sequences, gammas, st.floats(1e-8, 1.0))
def test_closed_form(grads: list[Tensor], gamma: float, c: float) -> None:
    """Eq. 8 as a sum, in which the first ratio is 0 because g_0 is."""
    scales, _ = follow(grads, gamma=gamma, c=c, scale_bounds=None)
    x = [torch.zeros_like(grads[0]), *grads]
    ratios = [(x[i - 1].norm() / ((x[i] - x[i - 1]).norm() + c)).item() for i in range(1, len(x))]
    for t in range(1, len(x)):
        total = sum(gamma ** (t - i) * ratios[i - 1] for i in range(1, t + 1))
        assert scales[t - 1] == pytest.approx(gamma**t + (1 - gamma) * total, rel=1e-9)


def test_constant_gradient_goes_to_norm_over_c() -> None:
    g = torch.tensor([3.0, 4.0])
    scales, _ = follow([g] * 200, c=0.1, scale_bounds=None)
    limit = 5.0 / 0.1
    # S_t - limit shrinks by γ each step, from S_1 = γ.
    assert scales[9] == pytest.approx(limit + (0.8 - limit) * 0.8**9, rel=1e-12)
    assert scales[-1] == pytest.approx(limit, rel=1e-12)


def test_opposite_gradients_halve_the_learning_rate() -> None:
    g = torch.tensor([3.0, 4.0])
    scales, rates = follow([g, -g] * 50)
    assert scales[-1] == pytest.approx(0.5, rel=1e-8)
    assert rates[-1] == pytest.approx(0.5 * LR, rel=1e-8)


@pytest.mark.parametrize("degrees", [10, 60, 90, 135, 180])
def test_gradients_at_an_angle(degrees: float) -> None:
    """Equal norms: the ratio is 1/√(2(1-cos))."""
    turn = math.radians(degrees)
    grads = [torch.tensor([math.cos(i * turn), math.sin(i * turn)]) for i in range(120)]
    scales, _ = follow(grads)
    assert scales[-1] == pytest.approx(1 / math.sqrt(2 * (1 - math.cos(turn))), rel=1e-6)


def test_independent_gradients_of_equal_norm() -> None:
    """Noise in many dimensions is orthogonal, nearly: 1/√2."""
    grads = [unit(g) for g in vectors(200, size=4000)]
    scales, _ = follow(grads)
    assert np.mean(scales[50:]) == pytest.approx(1 / math.sqrt(2), abs=0.01)


@pytest.mark.parametrize(("size", "low", "high"), [(1, 0.02, 0.06), (3, 0.0, 1e-3)])
def test_noise_in_few_dimensions(size: int, low: float, high: float) -> None:
    """Why S has bounds: in one dimension pure noise exceeds 10 in 4 % of steps, in three hardly."""
    layers, steps = 200, 40
    generator = torch.Generator().manual_seed(0)
    params = [torch.zeros(size, requires_grad=True) for _ in range(layers)]
    optimizer = AdaLip(params, scale_bounds=None, foreach=True)
    wild = 0
    for t in range(steps + 10):
        for p in params:
            p.grad = torch.randn(size, generator=generator)
        optimizer.step()
        scales = [rate.scale for rate in optimizer.layer_learning_rates().values()]
        wild += sum(scale > 10 for scale in scales) if t >= 10 else 0
    assert low <= wild / (layers * steps) <= high


@given(sequences, st.sampled_from([1e-6, 1e-3, 1e3, 1e6]))
def test_the_scale_of_the_loss_does_not_matter(grads: list[Tensor], by: float) -> None:
    options = {"c": 1e-30, "scale_bounds": None}
    scales, _ = follow(grads, **options)
    rescaled, _ = follow([g * by for g in grads], **options)
    assert rescaled == pytest.approx(scales, rel=1e-6)


@given(sequences, st.sampled_from([1e-6, 1e-3, 1e3]))
@settings(max_examples=25)
def test_nor_does_the_learning_rate_for_update_signals(grads: list[Tensor], by: float) -> None:
    options = {"kind": AdaLipU, "c": 1e-30, "scale_bounds": None}
    scales, _ = follow(grads, **options)
    rescaled, _ = follow(grads, lr=LR * by, **options)
    # S may pass close to its singularity, where rounding shows.
    assert rescaled == pytest.approx(scales, rel=1e-4)


# Lemma 2


@given(sequences, gammas, st.floats(1e-3, 1.0))
def test_bounds_of_lemma_2(grads: list[Tensor], gamma: float, c: float) -> None:
    """As printed, from the second step on: at the first the sum has no non-zero term.

    The lower bound's last line drops 1 - γ^t ≥ 1 - γ, which the zeroth gradient delays by a step.
    """
    norms = [g.norm().item() for g in grads]
    low = min(norms) * (1 - gamma) / (2 * max(norms) + c)
    high = 1 + max(norms) / c
    scales, _ = follow(grads, gamma=gamma, c=c, scale_bounds=None)
    assert all(s <= high * (1 + 1e-12) for s in scales)
    assert all(s >= low * (1 - 1e-12) for s in scales[1:])
    assert scales[0] == pytest.approx(gamma)


# Lemma 5 and Theorem 1


def assert_never_increases(rates: Sequence[float]) -> None:
    for before, after in pairwise(rates):
        assert after <= before * (1 + 1e-12)


@given(sequences, gammas, st.sampled_from([None, (0.1, 10.0)]))
def test_lemma_5(grads: list[Tensor], gamma: float, bounds: tuple[float, float] | None) -> None:
    """c="theoretical" with α_0/√t: A_t never increases; bounds of S, once inside, keep it so."""
    _, rates = follow(grads, inverse_sqrt=True, gamma=gamma, c="theoretical", scale_bounds=bounds)
    assert_never_increases(rates)


@six
@forms
def test_lemma_5_holds_for_every_optimizer(name: str, foreach: bool) -> None:
    """S and α_t are the same whatever the direction of the step is.

    Aligned gradients, which would let S grow. The lemma is about Eq. 8 and so holds for the
    update signal too.
    """
    grads = [torch.ones(5) + 0.1 * g for g in vectors(40)]
    kind = CLASSES[name]
    options = {"c": "theoretical", "scale_bounds": None, "foreach": foreach}
    _, rates = follow(grads, kind, inverse_sqrt=True, **options)
    assert_never_increases(rates)


@pytest.mark.parametrize("kind", ["zero first", "zeros between"])
def test_lemma_5_with_zero_gradients(kind: str) -> None:
    g = [torch.ones(5) + 0.1 * x for x in vectors(20)]
    zero = torch.zeros(5)
    grads = [zero] * 5 + g if kind == "zero first" else [*g[:4], zero, zero, *g[4:9], zero, *g[9:]]
    _, rates = follow(grads, inverse_sqrt=True, c="theoretical", scale_bounds=None)
    assert_never_increases(rates)


@pytest.mark.parametrize("kind", ["first gradient late", "a step skipped"])
def test_lemma_5_when_steps_pass_without_the_layer(kind: str) -> None:
    """α_t goes on falling while a layer has no gradient (frozen, unused) or skips a bad one.

    Eq. A.3's t is the scheduler's: were it the number of the layer's own steps, √(t/(t-1))
    would be larger than α_{t-1}/α_t, c_t too small, and A_t would grow.
    """
    grads: list[Tensor | None] = [torch.ones(5) + 0.1 * g for g in vectors(40)]
    if kind == "first gradient late":
        grads = [None] * 20 + grads
    else:
        grads[5] = torch.full((5,), math.nan)
    _, rates = follow(grads, inverse_sqrt=True, c="theoretical", scale_bounds=None)
    assert_never_increases(rates)


def test_theoretical_c_never_decreases_and_starts_at_1e_8() -> None:
    p = torch.zeros(5, requires_grad=True)
    optimizer = AdaLip([p], lr=LR, c="theoretical", scale_bounds=None)
    seen = []
    for g in vectors(30):
        p.grad = torch.ones(5) + g
        optimizer.step()
        seen.append(optimizer.state[p]["lipschitz_c"].item())
    assert seen[0] == 1e-8
    assert seen == sorted(seen)
    assert seen[-1] > 1e-3


def test_the_default_c_lets_the_learning_rate_increase() -> None:
    """The control of the tests of Lemma 5: it is c_t that holds A_t down."""
    grads = [torch.ones(5) + 0.1 * g for g in vectors(40)]
    _, rates = follow(grads, inverse_sqrt=True, scale_bounds=None)
    with pytest.raises(AssertionError):
        assert_never_increases(rates)


@pytest.mark.parametrize(("gamma", "seed"), [(0.8, 0), (0.8, 1), (0.3, 2)])
def test_theorem_1(gamma: float, seed: int) -> None:
    """The regret of projected AdaLip on random convex losses is below the printed bound.

    f_t(w) = |⟨a_t, w⟩ - b_t|, whose gradients ±a_t have norms in [1, 2]. With its 1/c_1 the
    printed bound is far away; the proof's line before it puts S's worst case, which has A_t
    itself, is checked too, and is within reach.
    """
    rng = np.random.default_rng(seed)
    dim, T, r, lr = 4, 400, 1.0, 0.5
    a = rng.standard_normal((T, dim))
    a *= (rng.uniform(1.0, 2.0, T) / np.linalg.norm(a, axis=1))[:, None]
    truth = rng.standard_normal(dim)
    truth *= 0.7 * r / np.linalg.norm(truth)
    b = a @ truth + 0.1 * rng.standard_normal(T)
    A, B = torch.tensor(a), torch.tensor(b)

    w = torch.zeros(dim, requires_grad=True)
    optimizer = AdaLip([w], lr=lr, gamma=gamma, c="theoretical", scale_bounds=None)
    schedule = LambdaLR(optimizer, lambda t: 1 / math.sqrt(t + 1))
    visited, rates = [], []
    for t in range(T):
        visited.append(w.detach().clone())
        optimizer.zero_grad()
        (A[t] @ w - B[t]).abs().backward()
        optimizer.step()
        rates.append(optimizer.state[w]["layer_lr"].item())
        schedule.step()
        with torch.no_grad():  # the projection Π_D onto the ball
            w *= min(1.0, r / w.norm().item())

    def losses(points: Tensor) -> Tensor:
        return ((A * points).sum(dim=1) - B).abs()

    path = torch.stack(visited)
    # w* as near as there is; any point of the ball is a comparator that the proof allows.
    rivals = (torch.tensor(truth), path.mean(dim=0), path[T // 2 :].mean(dim=0))
    regret = losses(path).sum().item() - min(losses(x).sum().item() for x in rivals)
    G, M = np.linalg.norm(a, axis=1).max(), np.linalg.norm(a, axis=1).min()
    c_T, c_1 = optimizer.state[w]["lipschitz_c"].item(), 1e-8
    printed = 2 * r**2 * (2 * G + c_T) / (lr * M * (1 - gamma) * math.sqrt(T))
    printed += G**2 * lr / math.sqrt(T) * (1 + G / c_1)
    assert regret / T <= printed
    assert regret <= 2 * r**2 / rates[-1] + G**2 / 2 * sum(rates)
    assert_never_increases(rates)


# First step, no signal


@six
@forms
def test_first_step_takes_the_learning_rate(name: str, foreach: bool) -> None:
    """A_1 = α_1, while S_1 = γ·S_0."""
    scales, rates = follow(vectors(3), CLASSES[name], foreach=foreach)
    assert rates[0] == LR
    assert scales[0] == pytest.approx(0.8, abs=0)
    assert rates[1] == pytest.approx(LR * scales[1])


@pytest.mark.parametrize("silence", ["zeros", "none"])
@pytest.mark.parametrize("name", ["adalip", "rmslip", "adamlip", "adalipu", "rmslipu"])
def test_silence_before_the_first_gradient_changes_nothing(name: str, silence: str) -> None:
    grads = vectors(4)
    expected = follow(grads, CLASSES[name])
    quiet = [torch.zeros(5) if silence == "zeros" else None] * 3
    scales, rates = follow([*quiet, *grads], CLASSES[name])
    assert (scales[-4:], rates[-4:]) == expected
    assert scales[:-4] == [1.0] * (3 if silence == "zeros" else 0)


def test_silence_keeps_the_scale() -> None:
    """g_t = 0 after a gradient is a signal (the change is the whole gradient); a second is not."""
    grads = vectors(3)
    zero = torch.zeros(5)
    scales, _ = follow([*grads, zero, zero, zero])
    assert scales[3] == pytest.approx(0.8 * scales[2] + 0.2)
    assert scales[4] == scales[5] == scales[3]


def test_after_silence_the_recurrence_holds_literally() -> None:
    """Only a layer's first gradient has no predecessor; later, zero is one: the ratio is 0."""
    g = vectors(3)
    zero = torch.zeros(5)
    scales, rates = follow([g[0], g[1], zero, zero, g[2]])
    assert scales[4] == pytest.approx(0.8 * scales[3])
    assert rates[4] == pytest.approx(LR * scales[4])


# Bounds


@pytest.mark.parametrize("bounds", [(0.1, 10.0), (0.9, 1.1), (0.5, 0.5)])
@six
def test_bounds_apply_to_the_stored_scale(name: str, bounds: tuple[float, float]) -> None:
    g, h = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0])
    grads = [g, g, g, h, -h, 1e-6 * g, g, 1e6 * h]
    scales, rates = follow(grads, CLASSES[name], scale_bounds=bounds)
    low, high = bounds
    assert all(low <= s <= high for s in scales)
    assert rates[1:] == pytest.approx([LR * s for s in scales[1:]])


def test_a_spike_is_forgotten_at_once() -> None:
    g, h = torch.tensor([3.0, 4.0]), torch.tensor([-4.0, 3.0])
    scales, _ = follow([g, g, h, -h])
    assert scales[1] == 10.0  # unbounded: 1e8
    assert scales[2] == pytest.approx(0.8 * 10.0 + 0.2 / math.sqrt(2))
    unbounded, _ = follow([g, g, h, -h], scale_bounds=None)
    assert unbounded[1] == pytest.approx(0.64 + 0.2 * 5.0 / 1e-8)


# The update signal


def test_update_signal_is_singular_at_one() -> None:
    """Constant gradient: u_{t-1} = S·û, so the ratio is S/|1-S| (Algorithm 5)."""
    g = torch.tensor([3.0, 4.0])
    c = 1e-12
    scales, _ = follow([g] * 20, AdaLipU, c=c, scale_bounds=None)
    u_hat = LR * 5.0
    S_applied = 1.0  # on the first step
    S = 0.8
    for scale in scales[1:]:
        ratio = u_hat * S_applied / (u_hat * abs(1 - S_applied) + c)
        S = 0.8 * S + 0.2 * ratio
        assert scale == pytest.approx(S, rel=1e-6)
        S_applied = S
    assert scales[1] > 1e9


def test_proposed_updates_are_not_singular_at_one() -> None:
    """As gradients in a constant direction are: the ratio depends on c and not on S."""
    grads = [torch.tensor([3.0, 4.0]) * (1.1 if t % 2 else 1.0) for t in range(60)]
    scales, _ = follow(grads, AdaLipU, c=1e-12, scale_bounds=None, previous="proposed")
    by_gradient, _ = follow(grads, AdaLip, c=1e-12, scale_bounds=None)
    assert scales == pytest.approx(by_gradient, rel=1e-9)
    applied, _ = follow(grads, AdaLipU, c=1e-12, scale_bounds=None)
    # Where S passes near 1 ± 0.1 the applied form gives other numbers altogether.
    assert applied != pytest.approx(by_gradient, rel=0.5)


@pytest.mark.parametrize("name", UPDATE)
def test_previous_is_what_was_applied(name: str) -> None:
    """The norm kept for the next step is ‖u_t‖ = A_t/α_t·‖û_t‖, or ‖û_t‖."""
    grads = vectors(4)
    moved = {}
    for previous in ("applied", "proposed"):
        p = torch.zeros(5, requires_grad=True)
        optimizer = CLASSES[name]([p], lr=LR, previous=previous)
        for g in grads:
            before = p.detach().clone()
            p.grad = g
            optimizer.step()
            (rate,) = optimizer.layer_learning_rates().values()
            moved = (p.detach() - before).norm().item()
            share = 1.0 if previous == "applied" else rate.lr / LR
            assert rate.norm == pytest.approx(moved / share)


def test_updates_of_sgd_with_constant_learning_rate_follow_gradients() -> None:
    """û_t = -α·g_t: with previous="proposed", Eqs. C4-C5 are Eqs. 6-9 but for c."""
    grads = vectors(20)
    expected, _ = follow(grads, AdaLip, c=1e-30)
    scales, _ = follow(grads, AdaLipU, c=1e-30, previous="proposed")
    assert scales == pytest.approx(expected, rel=1e-9)
