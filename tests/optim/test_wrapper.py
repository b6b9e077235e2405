"""Lipschitz: the same S on top of any torch.optim.Optimizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from hf_adalip import AdaLip, AdamLipU, Lipschitz
from hf_adalip.optim.estimator import FORGOTTEN, NO_PREDECESSOR
from hf_adalip.optim.forms.kernels import cpu
from tests.optim.cases import (
    CLASSES,
    UPDATE,
    Named,
    assert_same,
    named_params,
    random_grads,
    set_grads,
    six,
    snapshot,
    train,
    wrap,
)
from tests.reference import Reference

Base = Callable[[Any], torch.optim.Optimizer]


def timm_optimizer(name: str) -> Base:
    def make(params: Any) -> torch.optim.Optimizer:
        timm_optim = pytest.importorskip("timm.optim")
        return getattr(timm_optim, name)(params, lr=0.01, weight_decay=0.1)

    return make


BASES: dict[str, Base] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AMSGrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "Lamb": timm_optimizer("Lamb"),
    "Lion": timm_optimizer("Lion"),
}
bases = pytest.mark.parametrize("base", BASES)
needs_compiler = pytest.mark.skipif(bool(cpu.missing()), reason=f"needs {cpu.missing()}")


# Against our own optimizers


@pytest.mark.usefixtures("float64")
@six
@pytest.mark.parametrize(
    ("foreach", "options"),
    [(True, {}), (False, {"scale_bounds": None}), (False, {"c": "theoretical"})],
    ids=["foreach", "unbounded", "theoretical"],
)
def test_equals_the_optimizer_of_its_own(name: str, foreach: bool, options: dict[str, Any]) -> None:
    a, b = named_params(), named_params()
    own = CLASSES[name](a.items(), lr=0.01, layers="module", foreach=foreach, **options)
    over = wrap(name, b.items(), lr=0.01, layers="module", foreach=foreach, **options)
    train(own, a, range(30))
    train(over, b, range(30))
    for n in a:
        torch.testing.assert_close(b[n], a[n], rtol=1e-9, atol=1e-11)
    rates = own.layer_learning_rates()
    assert rates.keys() == over.layer_learning_rates().keys()
    for layer, rate in over.layer_learning_rates().items():
        assert rate == pytest.approx(rates[layer], rel=1e-8)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", UPDATE)
def test_equals_the_proposed_form(name: str) -> None:
    a, b = named_params(), named_params()
    own = CLASSES[name](a.items(), lr=0.01, previous="proposed")
    over = wrap(name, b.items(), lr=0.01, previous="proposed")
    train(own, a, range(30))
    train(over, b, range(30))
    for n in a:
        torch.testing.assert_close(b[n], a[n], rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", ["adalip", "adamlip"])
def test_equals_with_silent_tensors(name: str) -> None:
    """None and zero gradients, and a learning rate that starts at 0."""
    a, b = named_params(), named_params()
    own = CLASSES[name](a.items(), lr=0.01, layers="module")
    over = wrap(name, b.items(), lr=0.01, layers="module")
    silent = [("b.weight",), (), ("a.bias",), ("a.weight", "b.weight"), ()]
    for seed, names in enumerate(silent):
        for optimizer, params in ((own, a), (over, b)):
            optimizer.param_groups[0]["lr"] = 0.01 * seed
            grads: dict[str, Any] = random_grads(params, seed)
            grads |= dict.fromkeys(names)
            if seed == 1:
                grads["a.weight"].zero_()
            set_grads(params, grads)
            optimizer.step()
        for n in a:
            torch.testing.assert_close(b[n], a[n], rtol=1e-11, atol=1e-12)
        for layer, rate in over.layer_learning_rates().items():
            assert rate == pytest.approx(own.layer_learning_rates()[layer], rel=1e-11)


# Over any base


@pytest.mark.usefixtures("float64")
@bases
@pytest.mark.parametrize("layers", ["tensor", "module"])
def test_scales_the_step_of_the_base(base: str, layers: str) -> None:
    """S is the reference's, and the parameter moves by S times what the base alone would do."""
    params, twin = named_params(), named_params()
    optimizer = Lipschitz(BASES[base](list(params.items())), layers=layers)
    alone = BASES[base](list(twin.items()))

    def layer_of(name: str) -> str:
        return name.rpartition(".")[0] if layers == "module" else name

    reference = Reference(layer_of=layer_of)
    w = {n: np.zeros(p.shape) for n, p in params.items()}
    for t in range(10):
        grads = random_grads(params, t)
        set_grads(params, grads)
        set_grads(twin, grads)
        before = {n: p.detach().clone() for n, p in params.items()}
        for n in params:  # decay and trust ratios depend on where the parameters are
            twin[n].data.copy_(before[n])
        optimizer.step()
        alone.step()
        reference.step(w, {n: g.numpy() for n, g in grads.items()}, 1.0)
        rates = optimizer.layer_learning_rates()
        assert rates.keys() == reference.S.keys()
        for n in params:
            rate = rates[layer_of(n)]
            assert rate.scale == pytest.approx(reference.S[layer_of(n)], rel=1e-12)
            assert rate.norm == pytest.approx(reference.norm[layer_of(n)], rel=1e-12)
            factor = 1.0 if t == 0 else rate.scale
            expected = before[n] + factor * (twin[n].detach() - before[n])
            torch.testing.assert_close(params[n].detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("float64")
@bases
@pytest.mark.parametrize("previous", ["applied", "proposed"])
def test_update_signal_is_the_step_of_the_base(base: str, previous: str) -> None:
    """Eq. 8 on the parameters' own movement (Appendix C)."""
    params, twin = named_params(), named_params()
    optimizer = Lipschitz(
        BASES[base](list(params.items())), signal="update", previous=previous, scale_bounds=None
    )
    alone = BASES[base](list(twin.items()))
    S = dict.fromkeys(params, 1.0)
    u: Named = {n: torch.zeros_like(p) for n, p in params.items()}
    for t in range(8):
        grads = random_grads(params, t)
        set_grads(params, grads)
        set_grads(twin, grads)
        before = {n: p.detach().clone() for n, p in params.items()}
        for n in params:
            twin[n].data.copy_(before[n])
        optimizer.step()
        alone.step()
        rates = optimizer.layer_learning_rates()
        for n in params:
            u_hat = twin[n].detach() - before[n]
            ratio = u[n].norm() / ((u_hat - u[n]).norm() + 1e-8)
            S[n] = 0.8 * S[n] + 0.2 * ratio.item()
            factor = 1.0 if t == 0 else S[n]
            u[n] = u_hat * factor if previous == "applied" else u_hat
            assert rates[n].scale == pytest.approx(S[n], rel=1e-7)
            assert rates[n].norm == pytest.approx(u[n].norm().item(), rel=1e-7)
            moved = params[n].detach() - before[n]
            torch.testing.assert_close(moved, u_hat * factor, rtol=1e-6, atol=1e-11)


@bases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_low_precision(base: str, dtype: torch.dtype) -> None:
    params = named_params(dtype=dtype)
    optimizer = Lipschitz(BASES[base](list(params.items())))
    train(optimizer, params, range(4))
    for p in params.values():
        assert p.isfinite().all()
        assert optimizer.state[p]["lipschitz_scale"].dtype == torch.float32
        assert optimizer.state[p]["prev_grad"].dtype == dtype


def test_complex_parameters() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(4, dtype=torch.complex64, generator=generator).requires_grad_()
    x = torch.view_as_real(z.detach().clone()).requires_grad_()
    over_z, over_x = (Lipschitz(torch.optim.SGD([p], lr=0.1)) for p in (z, x))
    for _ in range(4):
        z.grad = torch.randn(4, dtype=torch.complex64, generator=generator)
        x.grad = torch.view_as_real(z.grad).clone()
        over_z.step()
        over_x.step()
    torch.testing.assert_close(torch.view_as_real(z.detach()), x.detach())
    assert over_z.layer_learning_rates() == over_x.layer_learning_rates()


# One optimizer to the outside


def test_shares_groups_with_the_base_and_saves_the_state_of_both() -> None:
    """The base's state is its own: many initialise it when it is empty."""
    params = named_params()
    base = torch.optim.Adam(params.items(), lr=0.1)
    optimizer = Lipschitz(base)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.defaults is base.defaults
    train(optimizer, params, [0])
    assert base.state[params["a.bias"]].keys() == {"step", "exp_avg", "exp_avg_sq"}
    saved = optimizer.state_dict()["state"][1]
    assert {"exp_avg", "lipschitz_scale", "prev_grad"} <= saved.keys()
    assert "Adam" in repr(optimizer)
    assert "gamma=0.8" in repr(optimizer)


class HeavyBall(torch.optim.Optimizer):
    """An optimizer that happens to call its state what Lipschitz calls its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                old = state.get("prev_grad", torch.zeros_like(p))
                state["prev_grad"] = p.grad + 0.5 * old
                p -= group["lr"] * state["prev_grad"]


def assert_goes_on_alike(
    optimizer: Lipschitz, params: dict[str, Tensor], restored: Lipschitz, others: dict[str, Tensor]
) -> None:
    """Trains, restores the state into the other one, and trains both."""
    train(optimizer, params, range(3))
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for n in params:
        others[n].data.copy_(params[n])
    train(optimizer, params, range(3, 5))
    train(restored, others, range(3, 5))
    assert_same(snapshot(restored, others), snapshot(optimizer, params))


def test_a_base_whose_state_has_our_names() -> None:
    """Both are saved, and neither is taken for the other."""
    params, others = named_params(), named_params()
    optimizer, restored = Lipschitz(HeavyBall(params.items())), Lipschitz(HeavyBall(others.items()))
    assert_goes_on_alike(optimizer, params, restored, others)


def test_state_of_several_groups_finds_its_parameters() -> None:
    params, others = named_params(), named_params()

    def build(named: dict[str, Tensor]) -> Lipschitz:
        groups = [{"params": [pair], "lr": 0.1 / (i + 1)} for i, pair in enumerate(named.items())]
        return Lipschitz(torch.optim.Adam(groups), layers="module")

    optimizer, restored = build(params), build(others)
    assert_goes_on_alike(optimizer, params, restored, others)


def test_schedulers_act_on_the_base() -> None:
    params = named_params()
    base = torch.optim.Adam(params.items(), lr=1.0)
    optimizer = Lipschitz(base)
    schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for t in range(4):
        train(optimizer, params, [t])
        assert base.param_groups[0]["lr"] == pytest.approx(1 / (1 + t))
        for rate in optimizer.layer_learning_rates().values():
            assert rate.lr == pytest.approx((1.0 if t == 0 else rate.scale) / (1 + t))
        schedule.step()


def test_one_cycle_lr_cycles_the_betas_of_the_base() -> None:
    params = named_params()
    optimizer = Lipschitz(torch.optim.Adam(params.items()))
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
    seen = set()
    for t in range(4):
        train(optimizer, params, [t])
        schedule.step()
        seen.add(optimizer.optimizer.param_groups[0]["betas"][0])
    assert len(seen) == 4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("foreach", [False, True])
def test_recomputed_updates_follow_a_schedule_of_the_betas(foreach: bool) -> None:
    """AdamLipU computes u_{t-1} again; the wrapper has it measured."""
    params, others = named_params(), named_params()
    ours = AdamLipU(params.items(), foreach=foreach)
    wrapped = Lipschitz(torch.optim.Adam(others.items()), signal="update")
    schedules = [OneCycleLR(o, max_lr=0.1, total_steps=12) for o in (ours, wrapped)]
    for t in range(10):
        train(ours, params, [t])
        train(wrapped, others, [t])
        for schedule in schedules:
            schedule.step()
    expected = wrapped.layer_learning_rates()
    for name, rate in ours.layer_learning_rates().items():
        assert rate.scale == pytest.approx(expected[name].scale, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_of_low_precision_parameters_are_refused(dtype: torch.dtype) -> None:
    """The base rounds its update into p before it can be measured: S would silently be wrong."""
    params = named_params(dtype=dtype)
    optimizer = Lipschitz(torch.optim.SGD(params.items(), lr=0.1), signal="update")
    with pytest.raises(ValueError, match="needs float32 parameters"):
        train(optimizer, params, [0])
    assert not optimizer.state


def test_state_of_the_base_as_a_whole_comes_back() -> None:
    params = named_params()
    base = torch.optim.SGD(params.items(), lr=0.1)
    base.state["calls"] = 3
    optimizer = Lipschitz(base)
    train(optimizer, params, [0])
    state = optimizer.state_dict()
    base.state["calls"] = 0
    optimizer.load_state_dict(state)
    assert base.state["calls"] == 3


def test_lr_tensor() -> None:
    results = []
    for make in (float, torch.tensor):
        params = named_params()
        optimizer = Lipschitz(torch.optim.SGD(params.values(), lr=make(0.125)))
        train(optimizer, params, range(3))
        results.append({n: p.detach() for n, p in params.items()})
        assert isinstance(optimizer.layer_learning_rates()["param_groups.0.0"].lr, float)
    assert_same(*results)


def test_closure_is_called_once() -> None:
    """And not handed to the base, which would call it again."""
    params = named_params()
    optimizer = Lipschitz(torch.optim.SGD(params.values(), lr=0.1))
    calls = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params.values())
        loss.backward()
        return loss

    expected = sum((p**2).sum() for p in params.values()).item()
    assert optimizer.step(closure).item() == expected
    assert calls == [True]


def test_step_hooks_of_both_are_called_once() -> None:
    params = named_params()
    base = torch.optim.SGD(params.values(), lr=0.1)
    optimizer = Lipschitz(base)
    calls = []
    base.register_step_pre_hook(lambda *_: calls.append("base pre"))
    base.register_step_post_hook(lambda *_: calls.append("base post"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(optimizer, params, [0])
    assert calls == ["pre", "base pre", "base post", "post"]


def test_zero_grad() -> None:
    params = named_params()
    optimizer = Lipschitz(torch.optim.SGD(params.values(), lr=0.1))
    set_grads(params, random_grads(params, 0))
    optimizer.zero_grad()
    assert all(p.grad is None for p in params.values())


def test_a_group_added_later() -> None:
    params = named_params()
    first, *rest = params.items()
    base = torch.optim.Adam([first], lr=0.1)
    optimizer = Lipschitz(base, layers="module")
    train(optimizer, params, range(2))
    optimizer.add_param_group({"params": rest, "lr": 0.01})
    assert len(base.param_groups) == 2
    train(optimizer, params, range(2, 4))
    assert list(optimizer.layer_learning_rates()) == ["a", "b"]
    states = [optimizer.state[params[n]]["lipschitz_scale"] for n in ("a.weight", "a.bias")]
    assert states[0] == states[1]


def test_frozen_parameters_and_no_gradients() -> None:
    params = named_params()
    params["a.bias"].requires_grad_(False)
    optimizer = Lipschitz(torch.optim.AdamW(params.items(), lr=0.1))
    optimizer.step()
    assert not optimizer.state
    live = {n: p for n, p in params.items() if p.requires_grad}
    train(optimizer, live, range(2))
    assert list(optimizer.layer_learning_rates()) == ["a.weight", "b.weight"]


def test_sparse_gradients_are_refused() -> None:
    params = named_params()
    optimizer = Lipschitz(torch.optim.SGD(params.values(), lr=0.1))
    train(optimizer, params, [0])
    before = snapshot(optimizer, params)
    params["b.weight"].grad = params["b.weight"].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


# Gradients that are not finite

bads = pytest.mark.parametrize("bad", [math.inf, math.nan], ids=str)


def spoiled(params: Named, seed: int, bad: float) -> Named:
    grads = random_grads(params, seed)
    grads["a.bias"][0] = bad
    return grads


@bases
@bads
@pytest.mark.parametrize("signal", ["gradient", "update"])
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
def test_skip_leaves_the_layer_alone(base: str, bad: float, signal: str, steps: int) -> None:
    """Parameters, the base's moments, S; and the gradients are there again after the step."""
    params = named_params()
    optimizer = Lipschitz(BASES[base](list(params.items())), layers="module", signal=signal)
    train(optimizer, params, range(steps))
    hit = ("a.weight", "a.bias")
    before = {n: (params[n].detach().clone(), state_of(optimizer, params[n])) for n in hit}
    other = params["b.weight"].detach().clone()
    set_grads(params, spoiled(params, steps, bad))
    held = {n: p.grad for n, p in params.items()}
    optimizer.step()
    assert all(p.grad is held[n] for n, p in params.items())
    for n in hit:
        value, state = before[n]
        assert torch.equal(params[n], value)
        now = state_of(optimizer, params[n])
        for key in state.keys() - {"nonfinite_steps", "prev_norm"}:
            assert_same(now[key], state[key], f"{n} {key}")
        assert now["prev_norm"].item() == (FORGOTTEN if steps else NO_PREDECESSOR)
    assert not torch.equal(params["b.weight"], other)
    counts = {n: r.nonfinite_steps for n, r in optimizer.layer_learning_rates().items()}
    assert counts == {"a": 1, "b": 0}

    # And the step after it is as good as any, the very first one included.
    train(optimizer, params, range(steps + 1, steps + 3))
    for p in params.values():
        assert p.isfinite().all()
        for value in state_of(optimizer, p).values():
            assert not isinstance(value, Tensor) or value.isfinite().all()


def state_of(optimizer: Lipschitz, p: Tensor) -> dict[str, Any]:
    """The base's and the wrapper's, copied."""
    both = {**optimizer.optimizer.state.get(p, {}), **optimizer.state.get(p, {})}
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in both.items()}


@bads
@pytest.mark.parametrize("signal", ["gradient", "update"])
def test_after_a_skip_training_goes_on_as_without_it(bad: float, signal: str) -> None:
    """But for the predecessor of the next signal, which is forgotten."""
    results = []
    for step in (bad, None):
        params = named_params()
        base = torch.optim.Adam(params.items(), lr=0.1)
        optimizer = Lipschitz(base, signal=signal)
        train(optimizer, params, range(2))
        grads: dict[str, Any] = spoiled(params, 2, bad)
        if step is None:
            grads["a.bias"] = None
        set_grads(params, grads)
        optimizer.step()
        if step is None:
            optimizer.state[params["a.bias"]]["prev_norm"].fill_(FORGOTTEN)
        train(optimizer, params, range(3, 5))
        results.append(snapshot(optimizer, params))
    for result in results:
        for state in result["state"]["state"].values():
            del state["nonfinite_steps"]
    assert_same(*results)


@pytest.mark.parametrize("signal", ["gradient", "update"])
def test_a_bad_tensor_and_one_without_gradient(signal: str) -> None:
    """The silent tensor's history becomes zero in a good step; a skipped one keeps it."""
    params = named_params()
    optimizer = Lipschitz(torch.optim.Adam(params.items()), layers="module", signal=signal)
    train(optimizer, params, range(2))
    key = "prev_grad" if signal == "gradient" else "prev_update"
    history = optimizer.state[params["a.bias"]][key]
    before = history.clone()
    for grad, expected in ((math.nan, before), (1.0, torch.zeros(3))):
        params["a.weight"].grad = torch.full((3, 4), grad)
        params["a.bias"].grad = None
        optimizer.step()
        assert_same(optimizer.state[params["a.bias"]][key], expected)


def test_a_finite_gradient_whose_update_is_not() -> None:
    """The base has moved by then: its step is undone, and neither remembered nor reported."""
    p = torch.zeros(2, requires_grad=True)
    optimizer = Lipschitz(torch.optim.SGD([p], lr=0.1), signal="update")
    rates = []
    for lr, grad in ((0.1, [1.0, 2.0]), (1e30, [1e15, 0.0]), (0.1, [2.0, 1.0])):
        optimizer.param_groups[0]["lr"] = lr
        p.grad = torch.tensor(grad)
        optimizer.step()
        assert p.isfinite().all()
        rates += optimizer.layer_learning_rates().values()
    assert rates[1] == rates[0]._replace(norm=0.0, nonfinite_steps=1)
    assert rates[2].nonfinite_steps == 1
    assert all(value.isfinite().all() for value in optimizer.state[p].values())


def test_skip_restores_gradients_when_the_base_fails() -> None:
    params = named_params()
    base = torch.optim.SGD(params.values(), lr=0.1)
    optimizer = Lipschitz(base)
    set_grads(params, spoiled(params, 0, math.nan))
    held = {n: p.grad for n, p in params.items()}

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    base.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert all(p.grad is held[n] for n, p in params.items())


@bads
@pytest.mark.parametrize("steps", [0, 2], ids=["first step", "later"])
def test_raise_changes_nothing(bad: float, steps: int) -> None:
    params = named_params()
    optimizer = Lipschitz(torch.optim.Adam(params.items()), nonfinite="raise")
    train(optimizer, params, range(steps))
    before = snapshot(optimizer, params)
    set_grads(params, spoiled(params, steps, bad))
    with pytest.raises(RuntimeError, match=r"a\.bias"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


def test_propagate() -> None:
    params = named_params()
    optimizer = Lipschitz(torch.optim.Adam(params.items()), nonfinite="propagate")
    train(optimizer, params, [0])
    set_grads(params, spoiled(params, 1, math.nan))
    optimizer.step()
    assert not params["a.bias"].isfinite().all()
    assert params["a.weight"].isfinite().all()


# A base that does not leave things as they are


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("base", [*BASES, "SGD alone"])
def test_the_history_is_the_gradient(base: str, foreach: bool, fused: bool) -> None:
    """torch's foreach SGD with Nesterov momentum adds its buffer to p.grad itself."""
    make = BASES.get(base, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True))
    params = named_params()
    inner = make(params.values())
    for group in inner.param_groups:
        if "foreach" in group:
            group["foreach"] = foreach
    optimizer = Lipschitz(inner, fused=fused)
    for seed in range(3):
        grads = random_grads(params, seed)
        set_grads(params, grads)
        optimizer.step()
        for n, p in params.items():
            assert_same(optimizer.state[p]["prev_grad"], grads[n])


@pytest.mark.parametrize("signal", ["gradient", "update"])
def test_a_base_that_fails_costs_a_step_of_s(signal: Any) -> None:
    """x_t may be in the place of x_{t-1}: taken for it, S would be that of a gradient that does
    not change."""

    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure: Any = None) -> Any:
            if self.fails:
                raise OSError("out of luck")
            return super().step(closure)

    params = named_params()
    base = Failing(list(params.values()), lr=0.1)
    optimizer = Lipschitz(base, signal=signal, scale_bounds=None)
    train(optimizer, params, range(3))
    before, state = [p.detach().clone() for p in params.values()], copy.deepcopy(optimizer.state)
    base.fails = True
    with pytest.raises(OSError, match="out of luck"):
        train(optimizer, params, [3])
    base.fails = False
    assert_same([p.detach() for p in params.values()], before)
    scales = {n: s["lipschitz_scale"] for n, s in zip(params, state.values(), strict=True)}
    for n, p in params.items():
        assert_same(optimizer.state[p]["lipschitz_scale"], scales[n])
    optimizer.step()
    kept = [bool(optimizer.state[p]["lipschitz_scale"] == scales[n]) for n, p in params.items()]
    assert kept == [signal == "gradient"] * len(kept)


def test_a_base_that_fails_costs_silent_tensors_of_the_layer_the_same() -> None:
    params = named_params()
    base = torch.optim.SGD(list(params.items()), lr=0.1)
    optimizer = Lipschitz(base, layers="module")
    train(optimizer, params, range(3))
    scale = optimizer.state[params["a.bias"]]["lipschitz_scale"].clone()
    grads = random_grads(params, 3)
    fail = base.register_step_pre_hook(lambda *_: 1 / 0)
    set_grads(params, {"a.weight": grads["a.weight"]})
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    fail.remove()
    set_grads(params, {"a.bias": grads["a.bias"]})
    optimizer.step()
    assert_same(optimizer.state[params["a.bias"]]["lipschitz_scale"], scale)


# Errors


def test_needs_an_optimizer() -> None:
    params = list(named_params().values())
    for wrong in (torch.optim.SGD, params, None, "sgd"):
        with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer"):
            Lipschitz(wrong)


def test_an_update_that_is_not_finite_leaves_the_parameters() -> None:
    """The base has taken its step by then."""
    p = torch.ones(3, requires_grad=True)
    optimizer = Lipschitz(torch.optim.SGD([p], lr=1e30), signal="update", nonfinite="raise")
    p.grad = torch.full((3,), 1e15)
    with pytest.raises(RuntimeError, match="the parameters are as before, the base's state is not"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


def test_refuses_lbfgs() -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        Lipschitz(torch.optim.LBFGS(named_params().values()))


class Averaging(torch.optim.SGD):
    """As schedule-free optimizers are made."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


@pytest.mark.parametrize("kind", [torch.optim.ASGD, Averaging])
def test_refuses_what_keeps_iterates_of_its_own(kind: Any) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} keeps iterates of its own"):
        Lipschitz(kind(named_params().values(), lr=0.1))


class OwnRate(torch.optim.SGD):
    """As transformers' Adafactor is by default."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.param_groups[0]["lr"] = None


def test_refuses_what_has_no_learning_rate_to_scale() -> None:
    with pytest.raises(ValueError, match="OwnRate has a group with lr=None"):
        Lipschitz(OwnRate(named_params().values()))


def test_a_group_added_to_the_base_alone_is_refused() -> None:
    params, more = named_params(), named_params()
    optimizer = Lipschitz(torch.optim.SGD(list(params.values()), lr=0.1))
    train(optimizer, params, [0])
    optimizer.optimizer.add_param_group({"params": list(more.values())})
    before = snapshot(optimizer, params)
    set_grads(params, random_grads(params, 1))
    with pytest.raises(RuntimeError, match="add_param_group of this optimizer"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


def test_refuses_a_second_scale() -> None:
    params = named_params()
    for inner in (AdaLip(params.values()), Lipschitz(torch.optim.SGD(params.values()))):
        with pytest.raises(ValueError, match=type(inner).__name__):
            Lipschitz(inner)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signal": "angle"}, "signal.*'angle'"),
        ({"previous": "applied"}, "previous='applied'.*signal"),
        ({"previous": "proposed", "signal": "gradient"}, "previous='proposed'.*signal"),
        ({"previous": "next", "signal": "update"}, "previous.*'next'"),
        ({"gamma": 1.0}, "gamma.*1.0"),
        ({"gamma": math.nan}, "gamma.*nan"),
        ({"c": 0}, "c must.*0"),
        ({"c": "theory"}, "c must.*'theory'"),
        ({"scale_bounds": (2, 1)}, r"scale_bounds.*\(2, 1\)"),
        ({"nonfinite": "ignore"}, "nonfinite.*'ignore'"),
        ({"layers": "row"}, "layers.*'row'"),
        ({"layers": "module"}, "layers='module'.*named_parameters"),
        ({"layers": lambda name: name}, "named_parameters"),
    ],
)
def test_bad_values(options: dict[str, Any], message: str) -> None:
    """Named, with the value; the base stays as it was."""
    base = torch.optim.SGD(named_params().values())
    groups = [dict(group) for group in base.param_groups]
    with pytest.raises(ValueError, match=message):
        Lipschitz(base, **options)
    assert base.param_groups == groups


def test_a_layer_function_that_fails_leaves_the_base_alone() -> None:
    first, *rest = named_params().items()
    base = torch.optim.SGD([{"params": [first]}, {"params": rest}])
    with pytest.raises(ValueError, match=r"7.*a\.bias"):
        Lipschitz(base, layers=lambda name: 7 if name == "a.bias" else name)
    assert all("layer_names" not in group for group in base.param_groups)


def test_a_group_that_cannot_be_added() -> None:
    params = named_params()
    first, *rest = params.items()
    optimizer = Lipschitz(torch.optim.SGD([first], lr=0.1), layers=lambda n: 7 if "b" in n else n)
    with pytest.raises(ValueError, match="must return a string"):
        optimizer.add_param_group({"params": rest})
    assert len(optimizer.param_groups) == 1
    train(optimizer, params, range(2))


def test_sharded_parameters_are_not_scaled_silently() -> None:
    """A replaced parameter list (flat buffers) no longer has layers to tell apart."""
    params = named_params()
    optimizer = Lipschitz(torch.optim.SGD(params.items(), lr=0.1))
    flat = torch.zeros(21, requires_grad=True)
    flat.grad = torch.ones(21)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="layer"):
        optimizer.step()
    assert not flat.any()


# The fused form


def odd_parameters(dtype: torch.dtype) -> Named:
    """Of several dtypes and memory orders, one of which the fused form leaves to the other."""
    shapes = {"a": (70, 31), "b": (5, 4, 3, 3), "c": (1,), "d": (0, 3), "e": (9, 8), "f": (6,)}
    params = named_params(shapes, dtype)
    params["b"] = params["b"].detach().to(memory_format=torch.channels_last).requires_grad_()
    gapped = torch.zeros(9, 16, dtype=dtype)[:, ::2]
    params["e"] = gapped.copy_(params["e"].detach()).requires_grad_()
    params["f"] = params["f"].detach().double().requires_grad_()
    return params


@pytest.mark.skipif(bool(cpu.missing()), reason=f"no {cpu.missing()}")
@pytest.mark.parametrize("layers", ["tensor", lambda name: "all"], ids=["tensor", "one layer"])
@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float32, 2e-6), (torch.float64, 1e-9), (torch.bfloat16, 1e-2)],
    ids=str,
)
@pytest.mark.parametrize("base", ["SGD", "NAdam", "AdamW"])
def test_fused_is_the_same(base: str, dtype: torch.dtype, rtol: float, layers: Any) -> None:
    # p_old + S·(p - p_old) and p + (S - 1)·(p - p_old) differ in rounding: by an ulp of p a step.
    found = []
    for fused in (False, True):
        params = odd_parameters(dtype)
        optimizer = Lipschitz(BASES[base](params.items()), layers=layers, fused=fused)
        train(optimizer, params, range(4))
        set_grads(params, random_grads(params, 4) | {"a": None})
        optimizer.step()
        train(optimizer, params, range(5, 9))
        rates = optimizer.layer_learning_rates()
        found.append((params, {name: rate.scale for name, rate in rates.items()}))
    (params, scales), (fused_params, fused_scales) = found
    assert fused_scales == pytest.approx(scales, rel=1e-5)
    for name, param in params.items():
        torch.testing.assert_close(fused_params[name], param, rtol=rtol, atol=rtol)


@pytest.mark.skipif(bool(cpu.missing()), reason=f"no {cpu.missing()}")
@pytest.mark.parametrize("nonfinite", ["skip", "raise", "propagate"])
def test_fused_treats_non_finite_gradients_alike(nonfinite: str) -> None:
    found = []
    for fused in (False, True):
        params = named_params()
        base = torch.optim.Adam(params.items(), lr=0.01)
        optimizer = Lipschitz(base, nonfinite=nonfinite, fused=fused)
        train(optimizer, params, range(3))
        grads = random_grads(params, 3)
        grads["a.bias"][1] = math.nan
        set_grads(params, grads)
        if nonfinite == "raise":
            before = snapshot(optimizer, params)
            with pytest.raises(RuntimeError, match=r"a\.bias"):
                optimizer.step()
            assert_same(snapshot(optimizer, params), before)
        else:
            optimizer.step()
        train(optimizer, params, range(4, 6))
        found.append(params)
    for name, param in found[0].items():
        torch.testing.assert_close(
            found[1][name], param, rtol=1e-5, atol=1e-6, equal_nan=nonfinite == "propagate"
        )


@needs_compiler
@pytest.mark.parametrize("bounds", [(0.1, 10.0), None])
def test_fused_leaves_what_the_base_leaves(bounds: Any) -> None:
    """Elements without a gradient, as rows of an embedding, whatever S is."""
    torch.manual_seed(0)
    weight = torch.randn(64, 64, requires_grad=True)
    before = weight.detach().clone()
    base = torch.optim.SGD([weight], lr=1e-9)
    optimizer = Lipschitz(base, scale_bounds=bounds, fused=True)
    for step in range(10):
        noise = 1.0 + 1e-6 * torch.randn(32, 64)  # S is large
        weight.grad = torch.cat([noise, torch.zeros(32, 64)])
        optimizer.step()
        assert torch.equal(weight[32:], before[32:]), step


def test_fused_is_for_gradients() -> None:
    base = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ValueError, match="fused=True needs signal"):
        Lipschitz(base, signal="update", fused=True)
    with pytest.raises(ValueError, match="fused must be None, True or False, got 'yes'"):
        Lipschitz(base, fused="yes")  # type: ignore[arg-type]
