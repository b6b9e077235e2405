"""Secant: any optimizer at a learning rate that it finds itself."""

from __future__ import annotations

import copy
import itertools
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim.lr_scheduler import LambdaLR

from hf_adalip import AdamLip, Secant, release_gradients
from hf_adalip.optim.secant import Law, Probe, Rate
from hf_adalip.optim.secant.law import next_probe
from tests.distributed.ranks import fork, kill_when
from tests.optim.cases import assert_same

Base = Callable[[Any, float], torch.optim.Optimizer]

BASES: dict[str, Base] = {
    "SGD": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr),
    "AMSGrad": lambda p, lr: torch.optim.Adam(p, lr=lr, amsgrad=True),
    "RMSprop": lambda p, lr: torch.optim.RMSprop(p, lr=lr),
    "Adafactor": lambda p, lr: torch.optim.Adafactor(p, lr=lr),
}
bases = pytest.mark.parametrize("base", BASES)


class Net(nn.Module):
    """What a measurement could disturb: BatchNorm's statistics and dropout's masks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3)
        )
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 1).long()


def closure_of(optimizer: torch.optim.Optimizer, model: nn.Module, step: int) -> Any:
    x, y = batch(step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return closure


def made(base: str = "AdamW", lr: float = 1e-3, **options: Any) -> tuple[Net, Secant]:
    torch.manual_seed(0)
    model = Net()
    return model, Secant(BASES[base](model.parameters(), lr), model=model, **options)


def train(model: Net, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    return [float(optimizer.step(closure_of(optimizer, model, t))) for t in steps]


def everything(model: Net, optimizer: Secant) -> dict[str, Any]:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return copy.deepcopy(state | {"rng": torch.get_rng_state()})


# What is measured


def quadratic(
    curvature: float, lr: float = 1.0, scale: float = 1.0, stretch: float = 1.0, **options: Any
) -> tuple[Tensor, Secant, Any]:
    """scale·L/2·‖p/stretch‖², the same in every direction, under gradient descent."""
    p = (torch.tensor([3.0, -2.0, 1.0], dtype=torch.float64) * stretch).requires_grad_()
    optimizer = Secant(torch.optim.SGD([p], lr=lr), **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = scale * 0.5 * curvature * (p / stretch).square().sum()
        loss.backward()
        return loss

    return p, optimizer, closure


@pytest.mark.parametrize("curvature", [1e-3, 1.0, 1e4])
def test_the_probe_sees_the_curvature(curvature: float) -> None:
    _, optimizer, closure = quadratic(curvature)
    for _ in range(30):
        optimizer.step(closure)
    for probe in optimizer.probes:
        assert probe.e0 / probe.curvature == pytest.approx(1 / curvature, rel=1e-6)
        assert probe.r == pytest.approx(1 - probe.rate * curvature, abs=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 0.8, 1.5])
def test_the_rate_rises_to_sigma_over_l(sigma: float) -> None:
    _, optimizer, closure = quadratic(7.0, every=1, law=Law(sigma=sigma))
    for _ in range(60):
        optimizer.step(closure)
    assert optimizer.rate == pytest.approx(sigma / 7.0, rel=1e-3)


def test_the_rate_sinks_to_the_limit() -> None:
    """A loss that has become steeper."""
    _, optimizer, closure = quadratic(7.0, every=1)
    for _ in range(8):
        optimizer.step(closure)
    optimizer._now = optimizer._now._replace(rate=1.0)
    for _ in range(40):
        optimizer.step(closure)
    assert optimizer.rate == pytest.approx(2.0 / 7.0, rel=1e-2)


def test_the_start_is_a_part_of_the_first_bound() -> None:
    _, optimizer, closure = quadratic(7.0, law=Law(margin=0.25))
    optimizer.step(closure)
    assert optimizer.rate == pytest.approx(0.25 / 7.0, rel=0.3)


def test_the_start_is_for_a_momentum_that_has_built_up() -> None:
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = Secant(torch.optim.SGD([p], lr=1.0, momentum=0.9), law=Law(margin=0.25))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 3.5 * p.square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    assert optimizer.rate == pytest.approx(0.25 / 7.0 * (1 - 0.9), rel=0.4)


@pytest.mark.parametrize(("scale", "stretch"), [(2.0**20, 1.0), (2.0**-20, 1.0), (1.0, 2.0**10)])
def test_scale_invariance(scale: float, stretch: float) -> None:
    """The rate has the unit of parameters² over loss, and what is found is the same point."""
    p, optimizer, closure = quadratic(3.0)
    q, other, closure_scaled = quadratic(3.0, scale=scale, stretch=stretch)
    for _ in range(40):
        optimizer.step(closure)
        other.step(closure_scaled)
        torch.testing.assert_close(q / stretch, p, rtol=1e-9, atol=1e-12)
        assert other.rate == pytest.approx(optimizer.rate * stretch**2 / scale, rel=1e-9)
    assert [x.r for x in other.probes] == pytest.approx([x.r for x in optimizer.probes], rel=1e-6)


@pytest.mark.slow
def test_unbiased_under_noise() -> None:
    """The slope and the curvature are measured on batches that the step was not made from.

    At p = 1 in four dimensions, where it as good as stays, g = (2 + s)·p + n with independent
    standard normal s and n.
    """
    torch.manual_seed(0)
    p = torch.ones(4, dtype=torch.float64, requires_grad=True)
    law = Law(margin=1e-6, climb=0, fall=1)
    optimizer = Secant(torch.optim.SGD([p], lr=1.0), every=1, law=law)
    for t in range(3000):
        slack, noise = torch.randn(2, 4, dtype=torch.float64) * (t > 0)

        def closure(slack: Tensor = slack, noise: Tensor = noise) -> Tensor:
            optimizer.zero_grad()
            loss = ((2 + slack) * p.square() / 2 + noise * p).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
    probes = optimizer.probes[1:]
    assert sum(x.e0 for x in probes) / len(probes) == pytest.approx(4 * 4, rel=0.05)
    expected = 2 * 4 * (4 + 1 + 1)
    assert sum(x.curvature for x in probes) / len(probes) == pytest.approx(expected, rel=0.05)


# What is put back


@bases
def test_a_measurement_leaves_no_trace(base: str) -> None:
    """Held at the rate of the start, training is that of the base at this rate, bit for bit."""
    model, optimizer = made(base, every=2, law=Law(climb=0, fall=1))
    losses = train(model, optimizer, range(12))
    assert model.calls > 12 + 6
    torch.manual_seed(0)
    alone = Net()
    plain = BASES[base](alone.parameters(), optimizer.rate)
    assert losses == train(alone, plain, range(12))
    assert_same(model.state_dict(), alone.state_dict())
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert_same(optimizer.state[p], plain.state[q])
    rng = torch.get_rng_state()
    train(*made(base, every=2, law=Law(climb=0, fall=1)), range(12))
    assert_same(torch.get_rng_state(), rng)


def test_without_a_model_buffers_take_part() -> None:
    model, _ = made()
    optimizer = Secant(BASES["AdamW"](model.parameters(), 1.0))
    train(model, optimizer, range(1))
    assert int(model.layers[1].num_batches_tracked) == model.calls


@pytest.mark.parametrize(("steps", "failing"), [(0, 1), (0, 2), (0, 4), (3, 1), (3, 2)])
def test_a_closure_that_fails_leaves_everything(steps: int, failing: int) -> None:
    model, optimizer = made(every=1)
    train(model, optimizer, range(steps))
    before = everything(model, optimizer)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise KeyError("no data")
        return closure_of(optimizer, model, 3)()

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert_same(everything(model, optimizer), before)
    train(model, optimizer, range(3, 5))


def test_one_copy_of_the_parameters_before_a_measurement_and_none_else() -> None:
    model, optimizer = made(every=20)
    for t in range(130):
        train(model, optimizer, range(t, t + 1))
        assert len(optimizer._previous) in (0, len(list(model.parameters())))
        if t > 90:
            assert bool(optimizer._previous) == (optimizer._step == optimizer._measured)


# Gradients and step apart


def gradients_of(model: nn.Module, step: int, share: float = 1.0) -> Any:
    """A closure that zeroes nothing."""
    x, y = batch(step)

    def closure() -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y) * share
        loss.backward()
        return loss.detach()

    return closure


def test_gradients_and_then_a_step_are_a_step_with_a_closure() -> None:
    model, optimizer = made(every=5)
    expected = train(model, optimizer, range(15))
    other, apart = made(every=5)
    losses, due = [], []
    for t in range(15):
        due.append(apart.due)
        losses.append(float(apart.compute_gradients(gradients_of(other, t))))
        assert not apart.due
        apart.step()
        apart.zero_grad()
    assert losses == expected
    assert_same(other.state_dict(), model.state_dict())
    assert apart.probes == optimizer.probes
    assert due[0]
    assert sum(due) == 1 + len(apart.probes) < 15


@bases
def test_accumulated_micro_batches_are_one_batch(base: str) -> None:
    """Of equal ones, so that the one that is measured with is like the whole."""
    torch.manual_seed(0)
    rates = []
    for parts in (1, 4):
        p = nn.Parameter(torch.linspace(1, 2, 8, dtype=torch.float64))
        optimizer = Secant(BASES[base]([p], 1.0), every=3)

        def closure(p: Tensor = p, parts: int = parts) -> Tensor:
            loss = p.square().sum() / parts
            loss.backward()
            return loss.detach()

        for _ in range(8):
            for _ in range(parts):
                optimizer.compute_gradients(closure, accumulated=parts)
            optimizer.step()
            optimizer.zero_grad()
        rates.append((optimizer.rate, *(x.r for x in optimizer.probes)))
    assert rates[0] == pytest.approx(rates[1], rel=1e-6)


def test_autocast_may_be_around_the_step() -> None:
    """Which keeps the weights that it has cast until it ends."""
    rates, (x, y) = [], batch(0)
    for around in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
        optimizer = Secant(torch.optim.AdamW(model.parameters()), model=model)

        def closure(model: nn.Module = model, optimizer: Secant = optimizer) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

        with torch.autocast("cpu", torch.bfloat16, enabled=around):
            optimizer.step(closure)
        rates.append(optimizer.rate)
    assert rates[1] == pytest.approx(rates[0])


def test_a_loss_that_never_bends_has_no_rate() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Secant(torch.optim.SGD([p], lr=1.0))

    def closure() -> Tensor:
        optimizer.zero_grad()
        p.sum().backward()
        return p.detach().sum()

    with pytest.raises(RuntimeError, match="no rate can be found from the first batch"):
        optimizer.step(closure)
    assert torch.equal(p, torch.ones(3))


def test_complex_parameters_are_pairs_of_numbers() -> None:
    rates = []
    for dtype in (torch.complex64, torch.float32):
        p = nn.Parameter(torch.view_as_complex(START) if dtype.is_complex else START.clone())
        optimizer = Secant(torch.optim.SGD([p], lr=1.0))

        def closure(p: Tensor = p, optimizer: Secant = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = p.abs().square().sum()
            loss.backward()
            return loss.detach()

        for _ in range(5):
            optimizer.step(closure)
        rates.append(optimizer.rate)
    assert rates[0] == pytest.approx(rates[1])


START = torch.tensor([[3.0, -2.0], [1.0, 0.5]])


def test_buffers_may_be_expanded() -> None:
    model, _ = made()
    model.register_buffer("positions", torch.arange(3.0).expand(2, -1))
    optimizer = Secant(torch.optim.AdamW(model.parameters()), model=model)
    train(model, optimizer, range(3))
    assert optimizer.probes


def test_what_is_measured_is_not_clipped() -> None:
    p, optimizer, _ = quadratic(2.0, every=1)
    clips = []
    for _ in range(8):
        optimizer.compute_gradients(lambda: p.square().sum().backward() or 1.0)
        clips.append(0.25 / float(nn.utils.clip_grad_norm_([p], 0.25)))
        optimizer.step()
        optimizer.zero_grad()
    assert max(clips) < 1
    for clip, probe in zip(clips, optimizer.probes, strict=False):
        assert probe.r == pytest.approx(1 - probe.rate * clip * 2.0, abs=1e-5)


# The given learning rate


@bases
@pytest.mark.parametrize("lr", [1e-6, 0.3])
def test_the_given_lr_does_not_matter(base: str, lr: float) -> None:
    one, optimizer = made(base, lr=1.0)
    expected = train(one, optimizer, range(30))
    two, other = made(base, lr=lr)
    assert train(two, other, range(30)) == expected
    assert_same(one.state_dict(), two.state_dict())
    assert optimizer.rate == other.rate
    assert other.param_groups[0]["lr"] == lr
    assert other.param_groups[0]["effective_lr"] == other.rate


def test_a_tensor_lr_does_not_matter_and_stays_the_same_object() -> None:
    one, optimizer = made(lr=1.0)
    expected = train(one, optimizer, range(20))
    torch.manual_seed(0)
    two = Net()
    lr = torch.tensor(1e-4)
    other = Secant(torch.optim.AdamW(two.parameters(), lr=lr, foreach=False), model=two)
    assert train(two, other, range(20)) == pytest.approx(expected, rel=1e-2)
    assert other.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(1e-4)
    torch.testing.assert_close(other.param_groups[0]["effective_lr"], torch.tensor(other.rate))


def test_groups_may_share_a_tensor_lr() -> None:
    """As torch makes them of one that is given for all."""
    rates = []
    for lr in (0.5, torch.tensor(0.5)):
        torch.manual_seed(0)
        model = Net()
        first, *rest = model.parameters()
        groups = [{"params": [first], "weight_decay": 0.0}, {"params": rest}]
        base = torch.optim.AdamW(groups, lr=lr, foreach=False)  # type: ignore[arg-type]
        optimizer = Secant(base, model=model)
        train(model, optimizer, range(6))
        rates.append([float(group["effective_lr"]) for group in optimizer.param_groups])
    assert rates[0] == pytest.approx(rates[1], rel=1e-3)
    assert rates[0][0] == rates[0][1]


def test_the_schedule_of_most_of_the_step_counts() -> None:
    """Not that of a first group whose learning rate is scaled down, as layer decay does."""
    found = []
    for factor in (1.0, 0.01, 0.0):
        torch.manual_seed(0)
        model = Net()
        *rest, bias = model.parameters()
        base = torch.optim.AdamW([{"params": [bias]}, {"params": rest}], lr=1.0)
        optimizer = Secant(base, model=model)
        scheduler = LambdaLR(optimizer, [lambda _, f=factor: f, lambda _: 1.0])
        for t in range(30):
            train(model, optimizer, range(t, t + 1))
            scheduler.step()
        assert not optimizer._now.warmup
        assert optimizer.param_groups[0]["effective_lr"] == factor * optimizer.rate
        found.append(optimizer.rate)
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.3)


def test_a_schedule_multiplies() -> None:
    model, optimizer = made(lr=0.5, law=Law(climb=0, fall=1))
    scheduler = LambdaLR(optimizer, lambda t: 1 / (t + 1))
    for t in range(5):
        train(model, optimizer, range(t, t + 1))
        assert optimizer.param_groups[0]["effective_lr"] == pytest.approx(optimizer.rate / (t + 1))
        scheduler.step()


def test_a_schedule_that_starts_at_nothing() -> None:
    model, optimizer = made()
    scheduler = LambdaLR(optimizer, lambda t: t / 10)
    for t in range(12):
        train(model, optimizer, range(t, t + 1))
        scheduler.step()
    assert optimizer.probes
    assert optimizer.rate > 0


def test_groups_keep_their_proportions() -> None:
    torch.manual_seed(0)
    model = Net()
    first, *rest = model.parameters()
    base = torch.optim.AdamW([{"params": [first]}, {"params": rest, "lr": 0.02}], lr=0.01)
    optimizer = Secant(base, model=model)
    train(model, optimizer, range(5))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.005})
    train(model, optimizer, range(5, 8))
    rates = [group["effective_lr"] / optimizer.rate for group in optimizer.param_groups]
    assert rates == pytest.approx([1, 2, 0.5])


# Saving


@bases
@pytest.mark.parametrize("steps", [1, 2, 9, 10, 13, 15, 16])
def test_resumes_bit_for_bit(base: str, steps: int) -> None:
    """Just before a measurement, just after one, and between two."""
    model, optimizer = made(base, every=5)
    train(model, optimizer, range(steps))
    saved = pickle.loads(pickle.dumps(everything(model, optimizer)))
    expected = train(model, optimizer, range(steps, steps + 12))
    after = everything(model, optimizer)
    other, resumed = made(base, lr=0.7, every=5)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    assert_same(resumed.state_dict(), saved["optimizer"])
    assert train(other, resumed, range(steps, steps + 12)) == expected
    assert_same(everything(other, resumed), after)


def run_saving(path: str, end: int) -> None:
    """Goes on from what is at the path, if anything is; saved after each step."""
    model, optimizer = made(every=5)
    start = 0
    if os.path.exists(path):
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
    for t in range(start, end):
        train(model, optimizer, range(t, t + 1))
        torch.save({"step": t + 1} | everything(model, optimizer), f"{path}.partial")
        os.replace(f"{path}.partial", path)


@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(tmp_path: Path) -> None:
    """Four times, at whatever moment: a step in five is measured."""
    run_saving(str(tmp_path / "whole"), 400)
    path = tmp_path / "killed"
    for _ in range(4):
        started = torch.load(path)["step"] if path.exists() else 0
        kill_when(
            lambda start=started: path.exists() and torch.load(path)["step"] > start + 10,
            fork(run_saving, str(path), 400),
        )
    run_saving(str(path), 400)
    assert_same(torch.load(path), torch.load(tmp_path / "whole"))


def test_measurements_are_saved_and_thinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_adalip.optim.secant.optimizer.RECORDED", 10)
    model, optimizer = made(every=1)
    for t in range(40):
        train(model, optimizer, range(t, t + 1))
        assert len(optimizer.probes) <= 10
        assert not t or optimizer.probes[-1].step == t
    steps = [probe.step for probe in optimizer.probes]
    assert steps == sorted(steps)
    assert steps[0] == 1
    assert len(steps) > 5
    _, other = made(every=1)
    other.load_state_dict(optimizer.state_dict())
    assert other.probes == optimizer.probes
    state = {k: v for k, v in made()[1].state_dict().items() if k in ("state", "param_groups")}
    other.load_state_dict(state)  # as torch.distributed.checkpoint has it
    assert other.probes == []


def test_copies_go_on_alike() -> None:
    model, optimizer = made(every=5)
    train(model, optimizer, range(10))
    twin = copy.deepcopy({"model": model, "optimizer": optimizer})
    rng = torch.get_rng_state()
    expected = train(model, optimizer, range(10, 20))
    torch.set_rng_state(rng)
    assert train(twin["model"], twin["optimizer"], range(10, 20)) == expected


def test_a_state_can_be_replaced() -> None:
    _, optimizer = made()
    optimizer.state = fresh = {}
    assert optimizer.optimizer.state is fresh


@pytest.mark.parametrize("change", ["none", "groups", "shape", "kind", "probes", "reference"])
def test_a_state_that_is_none_is_refused(change: str) -> None:
    model, optimizer = made()
    train(model, optimizer, range(1))
    before, saved = everything(model, optimizer), copy.deepcopy(optimizer.state_dict())
    match change:
        case "none":
            saved = None
        case "groups":
            saved["param_groups"] = []
        case "shape":
            saved["state"][0]["secant_previous"] = torch.zeros(7)
        case "kind":
            saved["state"][0]["secant_previous"] = "x"
        case "probes":
            saved["secant_probes"] = [1, 2]
        case "reference":
            del saved["param_groups"][0]["reference_lr"]
    with pytest.raises((TypeError, ValueError)):
        optimizer.load_state_dict(saved)
    assert_same(everything(model, optimizer), before)


def test_a_state_in_another_order_is_told_by_names() -> None:
    one, two = Net(), Net()
    optimizer = Secant(torch.optim.AdamW(one.named_parameters(), lr=1.0), model=one)
    train(one, optimizer, range(1))
    named = list(two.named_parameters())[::-1]
    other = Secant(torch.optim.AdamW(named, lr=1.0), model=two)
    other.load_state_dict(optimizer.state_dict())
    for (name, p), (_, q) in zip(one.named_parameters(), named[::-1], strict=True):
        assert torch.equal(optimizer._previous[p], other._previous[q]), name
        assert torch.equal(optimizer.state[p]["exp_avg"], other.state[q]["exp_avg"]), name


def test_a_state_of_the_base_alone_is_refused() -> None:
    model, optimizer = made()
    train(model, optimizer, range(2))
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match="not of Secant"):
        optimizer.load_state_dict(BASES["AdamW"](model.parameters(), 1.0).state_dict())
    assert_same(everything(model, optimizer), before)


# The law


def probe(e0: float, e1: float, step: int = 40, rate: float = 0.1, scale: float = 1.0) -> Probe:
    return Probe(step, rate, e0, e1, scale)


# One probe's worth: of a rate of 0.1 with slope 1 and curvature 15, between the two bounds.
NOW = Rate(0.1, 1.0, 1.0, 15.0, 1.0, 15.0, 225.0, step=21, peak=1.0)


def test_a_step_that_is_not_built_up_counts_as_one_of_full_size() -> None:
    """Whose curvature along it is four times as large for the same slope."""
    after = Law().follow(NOW, probe(1.0, 0.9), 1.0, built=0.25)
    expected = Law().follow(NOW, probe(1.0, 0.6), 1.0)
    assert after == pytest.approx(expected)
    assert after.rate < Law().follow(NOW, probe(1.0, 0.9), 1.0).rate


@pytest.mark.parametrize("nesterov", [False, True])
def test_how_far_momentum_has_built_up(nesterov: bool) -> None:
    """Along a gradient that does not change."""
    p = torch.ones(3, dtype=torch.float64, requires_grad=True)
    base = torch.optim.SGD([p], lr=1.0, momentum=0.9, nesterov=nesterov)
    optimizer = Secant(base, law=Law(margin=1e-9, climb=0, fall=1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        p.square().sum().backward()
        return p.detach().square().sum()

    for _ in range(12):
        before = p.detach().clone()
        optimizer.step(closure)
        step = (before - p.detach()) / optimizer.rate
        full = torch.full_like(step, 2.0 / (1 - 0.9))
        torch.testing.assert_close(
            step / full, torch.full_like(step, optimizer._built), rtol=1e-5, atol=0
        )
    model, other = made("AdamW")  # which corrects its bias
    train(model, other, range(1))
    assert other._built == 1.0


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="of newer torch")
def test_momentum_that_is_an_average_is_of_full_size_at_once() -> None:
    weight = nn.Parameter(torch.eye(4))
    optimizer = Secant(torch.optim.Muon([weight], lr=0.1, momentum=0.95))
    optimizer._step = 1
    assert optimizer._built == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_probes_that_are_not_finite_poison_nothing(bad: float) -> None:
    law = Law()
    assert law.follow(NOW, probe(bad, 1.0), 1.0) == NOW
    assert law.follow(NOW, probe(bad, bad, scale=bad), 1.0) == NOW
    after = law.follow(NOW, probe(1.0, bad, scale=math.nan), 1.0)
    assert 0 < after.rate < NOW.rate
    assert (after.slope, after.curvature) == (NOW.slope, NOW.curvature)


def test_a_step_that_overflows_lowers_the_rate_and_training_goes_on() -> None:
    model, optimizer = made(every=1)
    train(model, optimizer, range(4))
    rate = optimizer.rate
    real = closure_of(optimizer, model, 4)
    calls = 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        loss = real()
        if calls == 2:
            model.layers[0].weight.grad.fill_(math.inf)
        return loss

    params = copy.deepcopy(model.state_dict())
    optimizer.step(closure)
    assert optimizer.rate == pytest.approx(rate / Law().fall)
    model.load_state_dict(params)
    assert all(map(math.isfinite, optimizer._now))


def test_it_climbs_no_faster_than_time() -> None:
    law = Law(climb=1.0)
    now = law.start(1.0)
    for t in range(1, 50):
        before, now = now, law.follow(now, probe(1.0, 1.0 - 1e-6, step=t), 1.0)
        assert before.rate < now.rate <= law.margin * (t + 1)
    assert now.rate > law.margin * 15


def test_negative_curvature_holds_the_rate() -> None:
    """It does not say how far the loss goes down."""
    now = Law().start(1.0)
    for t in range(1, 5):
        now = Law().follow(now, probe(1.0, 2.0, step=t), 1.0)
        assert now.rate == Law().margin
    for t in range(5, 20):
        now = Law().follow(now, probe(1.0, 0.9, step=t, rate=now.rate), 1.0)
    assert now.rate > Law().margin


def test_steps_that_climb_lower_the_rate() -> None:
    """At most by `fall`, and the less the less the probes agree."""
    law = Law(average=0.5)
    sure = unsure = NOW
    for _ in range(10):
        last, sure = sure, law.follow(sure, probe(1.0, -9.0), 1.0)
        assert last.rate / law.fall <= sure.rate < last.rate
    for e0 in (12.0, -10.0) * 5:
        unsure = law.follow(unsure, probe(e0, e0 - 3.0), 1.0)
    assert sure.rate < unsure.rate


def test_between_the_bounds_the_rate_is_held() -> None:
    law, now = Law(sigma=1.0, limit=2.0), NOW
    for _ in range(20):
        now = law.follow(now, probe(1.0, -0.5), 1.0)
    assert now.rate == NOW.rate


def test_a_warmup_has_values_of_its_own() -> None:
    law = Law(margin=0.1, warmup_margin=0.3, sigma=0.5, warmup_sigma=1.5)
    plain, warm = law.start(2.0), law.start(2.0, schedule=0.1)
    assert (plain.rate, warm.rate) == pytest.approx((0.2, 0.6))
    at = probe(1.0, 0.0)
    assert law.follow(NOW, at, 1.0).rate == NOW.rate
    assert law.follow(NOW._replace(warmup=True), at, 1.0).rate > NOW.rate


def test_the_rate_stays_where_the_schedule_has_fallen() -> None:
    law = Law(hold=0.5)
    assert law.follow(NOW, probe(1.0, -9.0), 0.6).rate < NOW.rate
    assert law.follow(NOW, probe(1.0, -9.0), 0.4).rate == NOW.rate


def test_gaps_grow_to_every() -> None:
    steps = [1]
    while steps[-1] < 200:
        steps.append(next_probe(steps[-1], 20))
    gaps = [b - a for a, b in itertools.pairwise(steps)]
    assert gaps == sorted(gaps)
    assert gaps[0] == 1
    assert gaps[-1] == 20


# What is refused


def test_a_measurement_needs_a_closure() -> None:
    model, optimizer = made(every=5)
    with pytest.raises(RuntimeError, match=r"step 1 measures .* call optimizer\.step\(closure\)"):
        optimizer.step()
    train(model, optimizer, range(16))
    needed = 0
    for t in range(16, 36):
        before = everything(model, optimizer)
        closure = closure_of(optimizer, model, t)
        try:
            optimizer.step()
        except RuntimeError:
            needed += 1
            assert_same(everything(model, optimizer), before)
            optimizer.step(closure)
    assert needed == 4


def test_a_grad_scaler_is_refused() -> None:
    model, optimizer = made()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = everything(model, optimizer)
    scaler.scale(nn.functional.cross_entropy(model.eval()(batch(0)[0]), batch(0)[1])).backward()
    with pytest.raises(RuntimeError, match=r"cannot be stepped by a GradScaler: .* train in bf16"):
        scaler.step(optimizer)
    assert_same(everything(model, optimizer), before)


def test_gradients_that_are_freed_within_backward_are_refused() -> None:
    model, optimizer = made()
    before = everything(model, optimizer)

    def stepped(param: Tensor) -> None:
        param.data.sub_(param.grad)
        param.grad = None

    hooks = [p.register_post_accumulate_grad_hook(stepped) for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"left no gradients: .* nothing may step or free them"):
        train(model, optimizer, range(1))
    assert_same(everything(model, optimizer), before)
    for hook in hooks:
        hook.remove()
    train(model, optimizer, range(1))
    with pytest.raises(TypeError, match="one of the six"):
        release_gradients(optimizer)


def test_a_step_that_only_makes_state_is_taken() -> None:
    """As torch.distributed.checkpoint does before it loads one."""
    model, optimizer = made(every=5)
    train(model, optimizer, range(14))
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    rng = torch.get_rng_state()
    expected = train(model, optimizer, range(14, 26))
    other, resumed = made(every=5)
    set_state_dict(other, resumed, model_state_dict=saved[0], optim_state_dict=saved[1])
    torch.set_rng_state(rng)
    assert train(other, resumed, range(14, 26)) == expected
    assert_same(other.state_dict(), model.state_dict())


def test_a_state_without_the_copy_of_the_parameters_is_measured_later() -> None:
    model, optimizer = made(every=5)
    while optimizer._step < 20 or not optimizer.due:
        train(model, optimizer, range(1))
    state = optimizer.state_dict()
    for own in state["state"].values():
        own.pop("secant_previous", None)
    other, resumed = made(every=5)
    resumed.load_state_dict(state)
    assert resumed.probes == optimizer.probes
    train(other, resumed, range(8))
    assert len(resumed.probes) == len(optimizer.probes) + 1


def test_a_closure_that_draws_another_batch() -> None:
    model, optimizer = made()
    batches = iter(range(100))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="same batch and the same random numbers"):
        optimizer.step(lambda: closure_of(optimizer, model, next(batches))())
    for name, param in model.named_parameters():
        assert_same(param.detach(), before[name])


def test_a_closure_that_draws_other_masks() -> None:
    model, optimizer = made()
    generator = torch.Generator().manual_seed(3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = batch(0)
        mask = torch.rand(x.shape, generator=generator) > 0.5
        loss = nn.functional.cross_entropy(model(x * mask), y)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="same random numbers"):
        optimizer.step(closure)


def test_a_closure_that_does_not_zero_gradients_or_returns_nothing() -> None:
    model, optimizer = made()
    x, y = batch(0)
    with pytest.raises(RuntimeError, match="gradient norm"):
        optimizer.step(lambda: [nn.functional.cross_entropy(model(x), y)][0].backward() or 1.0)
    with pytest.raises(RuntimeError, match="must return the loss"):
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), y).backward())


@pytest.mark.parametrize("every", [0, -1, 2.5, True, "20"])
def test_bad_every(every: Any) -> None:
    with pytest.raises(ValueError, match="every must be"):
        made(every=every)


@pytest.mark.parametrize("lr", [0.0, math.inf])
def test_an_lr_that_nothing_can_be_measured_against(lr: float) -> None:
    base = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    base.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match="any positive number"):
        Secant(base)
    assert "reference_lr" not in base.param_groups[0]


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.ASGD, torch.optim.Rprop, AdamLip])
def test_bases_that_are_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="choose another base"):
        Secant(kind([nn.Parameter(torch.ones(1))], lr=0.1))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        Secant([nn.Parameter(torch.ones(1))])


def test_a_base_that_averages_is_refused() -> None:
    schedulefree = pytest.importorskip("schedulefree")
    with pytest.raises(ValueError, match="keeps iterates of its own"):
        Secant(schedulefree.AdamWScheduleFree([nn.Parameter(torch.ones(1))]))


@pytest.mark.parametrize(
    "options",
    [
        *({"sigma": 2.5}, {"sigma": math.nan}, {"sigma": 0.0}, {"sigma": "1"}, {"gain": 0.0}),
        *({"average": -1}, {"climb": math.inf}, {"limit": 0.5}, {"margin": 0.0}),
    ],
)
def test_bad_laws(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Law(**options)
