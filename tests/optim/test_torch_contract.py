"""What users of torch.optim expect of any optimizer."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau

from hf_adalip import AdaLip, AdamLip, AdamLipU, Lipschitz
from hf_adalip.optim import step as step_module
from tests.optim.cases import (
    CLASSES,
    assert_same,
    forms,
    momentum_only,
    named_params,
    random_grads,
    set_grads,
    six,
    snapshot,
    train,
)

# Signatures


@six
def test_arguments_follow_torch(name: str) -> None:
    """torch.optim's names, in its order, then the paper's; the rest by keyword."""
    parameters = inspect.signature(CLASSES[name]).parameters
    by_position = [p for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = {
        "ada": ["momentum", "weight_decay", "nesterov"],
        "rms": ["alpha", "eps", "weight_decay"],
        "adam": ["betas", "eps", "weight_decay"],
    }[name.partition("lip")[0]]
    assert [p.name for p in by_position] == ["params", "lr", *own, "gamma", "c", "layers"]
    defaults = {p.name: p.default for p in by_position[1:]}
    paper = {"gamma": 0.8, "c": 1e-8, "layers": "tensor", "weight_decay": 0.0}
    assert defaults.items() >= paper.items()
    with pytest.raises(TypeError):
        CLASSES[name]([torch.zeros(1, requires_grad=True)], typo=1)


@six
def test_positional_arguments(name: str) -> None:
    params = named_params()
    values = (0.9, 0.1, True) if momentum_only(name) else (0.9, 1e-3, 0.1)
    if name.startswith("adam"):
        values = ((0.5, 0.6), *values[1:])
    (group,) = CLASSES[name](params.values(), 0.3, *values, 0.7, 1e-4, "tensor").param_groups
    keys = list(inspect.signature(CLASSES[name]).parameters)[1:7]
    assert [group[key] for key in keys] == [0.3, *values, 0.7, 1e-4]


@six
def test_is_an_optimizer_with_readable_repr(name: str) -> None:
    optimizer = CLASSES[name](named_params().values(), lr=0.25)
    assert isinstance(optimizer, torch.optim.Optimizer)
    text = repr(optimizer)
    assert text.startswith(CLASSES[name].__name__)
    assert "lr: 0.25" in text
    assert "gamma: 0.8" in text


# Closures, hooks, zero_grad


@six
@forms
def test_closure(name: str, foreach: bool) -> None:
    """Called once, with gradients enabled and before they are looked at; its loss returned."""
    params = named_params()
    optimizer = CLASSES[name](params.values(), lr=0.1, foreach=foreach)
    target, calls = named_params(), []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params.values())
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == sum((p**2).sum() for p in target.values()).item()
    assert calls == [True]
    expected = CLASSES[name](target.values(), lr=0.1, foreach=foreach)
    set_grads(target, {n: 2 * p for n, p in target.items()})
    assert expected.step() is None
    for n in params:
        assert torch.equal(params[n], target[n])


@six
def test_step_hooks_are_called_once(name: str) -> None:
    params = named_params()
    optimizer = CLASSES[name](params.values(), lr=0.1)
    seen: list[tuple[str, bool]] = []
    before = {n: p.detach().clone() for n, p in params.items()}

    def moved() -> bool:
        return any(not torch.equal(params[n], before[n]) for n in params)

    optimizer.register_step_pre_hook(lambda *_: seen.append(("pre", moved())))
    handle = optimizer.register_step_post_hook(lambda *_: seen.append(("post", moved())))
    train(optimizer, params, [0])
    assert seen == [("pre", False), ("post", True)]
    handle.remove()
    train(optimizer, params, [1])
    assert [kind for kind, _ in seen] == ["pre", "post", "pre"]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    params = named_params()
    optimizer = AdaLip(params.values())
    set_grads(params, random_grads(params, 0))
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in params.values():
        assert p.grad is None if set_to_none else not p.grad.any()


@six
@forms
def test_a_step_leaves_the_gradients_alone(name: str, foreach: bool) -> None:
    params = named_params()
    options: dict[str, Any] = {"weight_decay": 0.1, "decoupled_weight_decay": False}
    optimizer = CLASSES[name](params.values(), foreach=foreach, maximize=True, **options)
    for seed in range(3):
        grads = random_grads(params, seed)
        set_grads(params, grads)
        held = {n: p.grad for n, p in params.items()}
        optimizer.step()
        for n, p in params.items():
            assert p.grad is held[n]
            assert torch.equal(p.grad, grads[n])


@six
@forms
def test_history_is_not_the_gradient_itself(name: str, foreach: bool) -> None:
    """zero_grad(set_to_none=False) writes into the gradient that was given."""
    results = []
    for overwrite in (False, True):
        params = named_params()
        optimizer = CLASSES[name](params.values(), foreach=foreach)
        for seed in range(3):
            train(optimizer, params, [seed])
            if overwrite:
                optimizer.zero_grad(set_to_none=False)
        results.append(snapshot(optimizer, params))
    assert_same(*results)


# Learning rates


@six
@forms
def test_lr_tensor_equals_lr_float(name: str, foreach: bool) -> None:
    results = []
    for make in (float, torch.tensor, lambda lr: torch.tensor([lr])):
        params = named_params()
        optimizer = CLASSES[name](
            params.values(), lr=make(0.125), foreach=foreach, weight_decay=0.1
        )
        for seed, lr in enumerate((0.125, 0.25, 0.0625)):
            (group,) = optimizer.param_groups
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)  # in place, as schedulers do
            else:
                group["lr"] = lr
            train(optimizer, params, [seed])
        results.append(
            ({n: p.detach() for n, p in params.items()}, optimizer.layer_learning_rates())
        )
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@six
def test_lr_tensor_stays_the_users(name: str) -> None:
    """Not replaced or written to by a step, and shared by the groups."""
    lr = torch.tensor(0.1)
    params = named_params()
    groups = [{"params": [p]} for p in params.values()]
    optimizer = CLASSES[name](groups, lr=lr)
    train(optimizer, params, range(2))
    assert all(group["lr"] is lr for group in optimizer.param_groups)
    assert lr.item() == pytest.approx(0.1)


@six
@forms
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
def test_schedulers_own_the_learning_rate(name: str, foreach: bool, tensor: bool) -> None:
    params = named_params()
    lr = torch.tensor(1.0) if tensor else 1.0
    optimizer = CLASSES[name](params.values(), lr=lr, foreach=foreach)
    schedule = LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for t in range(4):
        train(optimizer, params, [t])
        for rate in optimizer.layer_learning_rates().values():
            scale = 1.0 if t == 0 else rate.scale
            assert rate.lr == pytest.approx(scale / (1 + t))
        schedule.step()


@six
def test_one_cycle_lr(name: str) -> None:
    """It cycles the momentum, or β_1, as well; RMSprop's alpha is neither."""
    params = named_params()
    kind = CLASSES[name]
    if name.startswith("rms"):
        with pytest.raises(ValueError, match="momentum"):
            OneCycleLR(kind(params.values()), max_lr=0.1, total_steps=9)
        options = {"cycle_momentum": False}
    else:
        options = {}
    own = {"momentum": 0.9} if momentum_only(name) else {}
    optimizer = kind(params.values(), **own)
    schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=9, **options)
    momenta = set()
    for t in range(8):
        train(optimizer, params, [t])
        schedule.step()
        (group,) = optimizer.param_groups
        momenta.add(group["momentum"] if "momentum" in group else group.get("betas", (None,))[0])
    assert len(momenta) == (1 if name.startswith("rms") else 8)
    assert all(p.isfinite().all() for p in params.values())


def test_reduce_on_plateau() -> None:
    params = named_params()
    optimizer = AdamLip(params.values(), lr=0.5)
    schedule = ReduceLROnPlateau(optimizer, patience=0, factor=0.1)
    for _ in range(2):
        train(optimizer, params, [0])
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


# maximize


@six
@forms
def test_maximize_descends_the_opposite(name: str, foreach: bool) -> None:
    up, down = named_params(), named_params()
    ascend = CLASSES[name](up.values(), lr=0.1, maximize=True, foreach=foreach)
    descend = CLASSES[name](down.values(), lr=0.1, foreach=foreach)
    for seed in range(4):
        grads = random_grads(up, seed)
        set_grads(up, grads)
        set_grads(down, {n: -g for n, g in grads.items()})
        ascend.step()
        descend.step()
    assert_same(snapshot(ascend, up)["params"], snapshot(descend, down)["params"])
    assert ascend.layer_learning_rates() == descend.layer_learning_rates()


# Groups


@six
@forms
def test_groups_have_their_own_options(name: str, foreach: bool) -> None:
    """As if each group were an optimizer of its own."""
    options: list[dict[str, Any]] = [
        {"lr": 0.1, "gamma": 0.5, "c": 1e-2, "scale_bounds": None},
        {"lr": 0.01, "weight_decay": 0.1, "c": "theoretical"},
        {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True},
    ]
    together, apart = named_params(), named_params()
    pairs = list(zip(together.values(), options, strict=True))
    optimizer = CLASSES[name]([{"params": [pairs[0][0]], **pairs[0][1]}], foreach=foreach)
    for p, own in pairs[1:]:
        optimizer.add_param_group({"params": p, **own})
    others = [
        CLASSES[name]([p], foreach=foreach, **own)
        for p, own in zip(apart.values(), options, strict=True)
    ]
    for seed in range(4):
        train(optimizer, together, [seed])
        set_grads(apart, random_grads(apart, seed))
        for other in others:
            other.step()
    for n in together:
        torch.testing.assert_close(together[n], apart[n], rtol=1e-6, atol=1e-7)
    rates = [r for other in others for r in other.layer_learning_rates().values()]
    for actual, expected in zip(optimizer.layer_learning_rates().values(), rates, strict=True):
        assert actual == pytest.approx(expected, rel=1e-5)


def test_groups_have_their_own_layers() -> None:
    params = named_params()
    names = list(params)
    optimizer = AdaLip(
        [
            {"params": [(n, params[n]) for n in names[:2]], "layers": "module"},
            {"params": [(names[2], params[names[2]])]},
        ]
    )
    train(optimizer, params, [0])
    assert list(optimizer.layer_learning_rates()) == ["a", "b.weight"]


@six
@forms
def test_a_group_added_later_starts_anew(name: str, foreach: bool) -> None:
    """Its first step is its own, whatever step the others are at."""
    params = named_params()
    first, *rest = params.values()
    optimizer = CLASSES[name]([first], lr=0.1, foreach=foreach)
    train(optimizer, params, range(3))
    optimizer.add_param_group({"params": rest, "lr": 0.01})
    train(optimizer, params, [3])
    rates = list(optimizer.layer_learning_rates().values())
    assert [r.lr for r in rates[1:]] == pytest.approx([0.01, 0.01])
    assert optimizer.state[first]["step"].item() == 4
    assert optimizer.state[rest[0]]["step"].item() == 1


def test_a_tensor_that_joins_a_layer_takes_its_scale() -> None:
    """Unfreezing a bias, or adding its group later, does not reset the S of its module."""
    params = named_params({"m.weight": (3,), "m.bias": (3,)})
    optimizer = AdaLip([("m.weight", params["m.weight"])], lr=0.1, layers="module")
    train(optimizer, params, range(3))
    before = optimizer.layer_learning_rates()["m"].scale
    optimizer.add_param_group({"params": [("m.bias", params["m.bias"])]})
    train(optimizer, params, [3])
    assert list(optimizer.layer_learning_rates()) == ["m"]
    states = [optimizer.state[p] for p in params.values()]
    assert states[0]["lipschitz_scale"] == states[1]["lipschitz_scale"]
    assert states[0]["lipschitz_scale"].item() > 0.8 * before


# Parameters that do not take part


@six
@forms
def test_frozen_parameters_are_left_alone(name: str, foreach: bool) -> None:
    params = named_params()
    params["a.bias"].requires_grad_(False)
    frozen = params["a.bias"].clone()
    optimizer = CLASSES[name](params.items(), lr=0.1, weight_decay=0.1, foreach=foreach)
    live = {n: p for n, p in params.items() if p.requires_grad}
    train(optimizer, live, range(3))
    assert torch.equal(params["a.bias"], frozen)
    assert params["a.bias"] not in optimizer.state
    assert list(optimizer.layer_learning_rates()) == ["a.weight", "b.weight"]


@six
@forms
def test_no_gradient_at_all(name: str, foreach: bool) -> None:
    params = named_params()
    optimizer = CLASSES[name](params.values(), lr=0.1, weight_decay=0.1, foreach=foreach)
    before = snapshot(optimizer, params)
    optimizer.step()
    assert_same(snapshot(optimizer, params), before)
    assert optimizer.layer_learning_rates() == {}
    train(optimizer, params, range(2))
    after = snapshot(optimizer, params)
    set_grads(params, {})
    optimizer.step()
    assert_same(snapshot(optimizer, params), after)


@six
@forms
def test_sparse_gradients_are_refused(name: str, foreach: bool) -> None:
    """Before anything has changed, for the dense parameters too."""
    params = named_params()
    optimizer = CLASSES[name](params.items(), lr=0.1, foreach=foreach)
    train(optimizer, params, [0])
    before = snapshot(optimizer, params)
    set_grads(params, random_grads(params, 1))
    params["b.weight"].grad = params["b.weight"].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert_same(snapshot(optimizer, params), before)


# capturable


@six
@forms
def test_capturable_changes_no_number_on_the_cpu(name: str, foreach: bool) -> None:
    results = []
    for capturable in (False, True):
        params = named_params()
        optimizer = CLASSES[name](params.values(), foreach=foreach, capturable=capturable)
        train(optimizer, params, range(3))
        results.append(snapshot(optimizer, params))
    for result in results:
        del result["state"]["param_groups"]
    assert_same(*results)


@six
def test_capturable_excludes_looking_at_the_host(name: str) -> None:
    with pytest.raises(ValueError, match=r"nonfinite.*capturable"):
        CLASSES[name](named_params().values(), capturable=True, nonfinite="raise")


# differentiable


def unrolled(name: str, start: Tensor, lr: Tensor, gradients: Tensor, **options: Any) -> Tensor:
    """A scalar of the parameter after a step for each row of `gradients`."""
    p = start.clone()
    optimizer = CLASSES[name]([p], lr=lr, differentiable=True, **options)
    for row in gradients:
        # Depends on the parameter, as it does in training; cloned, for the step is in place.
        p.grad = row * p.clone() + row
        optimizer.step()
    return (p**2).sum()


def leaf(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


ROWS = ((0.5, -1.0), (0.25, 1.5), (1.0, 0.75))


DIFFERENTIABLE: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True},
    "decoupled": {"weight_decay": 0.1},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False},
}
differentiable = pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name in CLASSES
        for option, values in DIFFERENTIABLE.items()
        if momentum_only(name) or "momentum" not in values
    ],
)


def smooth(name: str) -> dict[str, Any]:
    """Away from the kink of √v at 0."""
    return {} if momentum_only(name) else {"eps": 1e-3}


def test_a_captured_step_needs_its_lr_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other steps do not: torch.distributed.checkpoint takes one with a lr tensor on the CPU."""
    params = [torch.nn.Parameter(torch.zeros(3, device="meta"))]
    optimizer = AdamLip(params, lr=torch.tensor(0.1), capturable=True)
    step_module._check_capture(optimizer)
    monkeypatch.setattr("hf_adalip.optim.step._is_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"capturable=True needs lr .* got it on cpu"):
        optimizer.step()


@pytest.mark.usefixtures("float64")
@differentiable
def test_differentiable_in_start_and_gradients(name: str, option: str) -> None:
    """Through three steps and S itself, against finite differences."""
    options = smooth(name) | DIFFERENTIABLE[option]

    def f(start: Tensor, gradients: Tensor) -> Tensor:
        return unrolled(name, start, torch.tensor(0.1), gradients, **options)

    inputs = leaf(1.0, 2.0), torch.tensor(ROWS, requires_grad=True)
    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.usefixtures("float64")
@differentiable
def test_differentiable_in_the_learning_rate(name: str, option: str) -> None:
    """A lr that is learned, as torch.optim.AdamW lets one do."""
    options = smooth(name) | DIFFERENTIABLE[option]

    def f(lr: Tensor) -> Tensor:
        return unrolled(name, leaf(1.0, 2.0), lr, torch.tensor(ROWS), **options)

    lr = torch.tensor(0.1, requires_grad=True)
    assert torch.autograd.gradcheck(f, (lr,))
    (slope,) = torch.autograd.grad(f(lr), lr)
    assert slope.abs() > 1e-3


@pytest.mark.usefixtures("float64")
@six
def test_differentiable_reaches_through_the_scale(name: str) -> None:
    """S is a function of the gradients: not a constant of the graph."""
    start, lr = leaf(1.0, 2.0), torch.tensor(0.1)
    gradients = torch.tensor(ROWS, requires_grad=True)
    options = smooth(name)
    with_s = torch.autograd.grad(unrolled(name, start, lr, gradients, **options), gradients)[0]
    clamped = unrolled(name, start, lr, gradients, scale_bounds=(1, 1), **options)
    without = torch.autograd.grad(clamped, gradients)[0]
    assert with_s.isfinite().all()
    assert not torch.allclose(with_s, without, rtol=1e-2)


@pytest.mark.usefixtures("float64")
@six
@pytest.mark.parametrize("silent", [[0], [1], [0, 1], [0, 1, 2]])
def test_differentiable_with_zero_gradients(name: str, silent: list[int]) -> None:
    """The norm of zeros has no slope and 0/0 has none: neither must become NaN.

    eps_in_sqrt, because √v at v = 0 is not differentiable in Adam itself, torch's included.
    """
    options = smooth(name) and {"eps": 1e-3, "eps_in_sqrt": True}
    start, lr = leaf(1.0, 2.0), torch.tensor(0.1, requires_grad=True)
    gradients = torch.tensor(ROWS)
    gradients[silent] = 0.0
    gradients.requires_grad_()
    loss = unrolled(name, start, lr, gradients, **options)
    for slope in torch.autograd.grad(loss, (start, lr, gradients)):
        assert slope.isfinite().all()


@pytest.mark.usefixtures("float64")
@six
@pytest.mark.parametrize("layers", ["tensor", "module"])
def test_differentiable_takes_the_same_steps(name: str, layers: str) -> None:
    results = []
    for differentiable in (False, True):
        leaves = named_params()
        params = {n: p.clone() for n, p in leaves.items()} if differentiable else leaves
        optimizer = CLASSES[name](
            params.items(), lr=0.1, layers=layers, foreach=False, differentiable=differentiable
        )
        for seed in range(3):
            set_grads(params, random_grads(leaves, seed))
            optimizer.step()
        results.append({n: p.detach() for n, p in params.items()})
    assert_same(*results)


@pytest.mark.usefixtures("float64")
def test_differentiable_reports_plain_numbers() -> None:
    p = leaf(1.0, 2.0).clone()
    optimizer = AdamLipU([p], lr=torch.tensor(0.1, requires_grad=True), differentiable=True)
    p.grad = leaf(1.0, -1.0) * 2
    optimizer.step()
    (rate,) = optimizer.layer_learning_rates().values()
    assert rate.lr == pytest.approx(0.1)
    assert math.isfinite(rate.norm)


# Reports


@six
@forms
def test_layer_learning_rates_without_names(name: str, foreach: bool) -> None:
    params = named_params()
    first, *rest = params.values()
    optimizer = CLASSES[name]([{"params": [first]}, {"params": rest}], foreach=foreach)
    train(optimizer, params, [0])
    expected = ["param_groups.0.0", "param_groups.1.0", "param_groups.1.1"]
    assert list(optimizer.layer_learning_rates()) == expected


@six
@forms
def test_layer_learning_rates_are_plain_numbers(name: str, foreach: bool) -> None:
    params = named_params()
    optimizer = CLASSES[name](params.items(), lr=0.1, layers="module", foreach=foreach)
    train(optimizer, params, range(2))
    rates = optimizer.layer_learning_rates()
    assert list(rates) == ["a", "b"]
    for rate in rates.values():
        assert rate._fields == ("scale", "lr", "norm", "nonfinite_steps")
        assert [type(x) for x in rate] == [float, float, float, int]
        assert rate.lr == pytest.approx(0.1 * rate.scale)
    if not name.endswith("u"):
        grads = random_grads(params, 1)
        norm = math.hypot(grads["a.weight"].norm(), grads["a.bias"].norm())
        assert rates["a"].norm == pytest.approx(norm, rel=1e-6)


@pytest.mark.parametrize("wrapped", [False, True])
def test_parameters_can_be_swapped(wrapped: bool) -> None:
    """As modules are converted under FSDP2, and where torch is told to: what is a parameter may
    have no weak reference then."""
    results = []
    for swapped in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        optimizer = (
            Lipschitz(torch.optim.Adam(layer.named_parameters(), lr=0.1))
            if wrapped
            else AdamLip(layer.named_parameters(), lr=0.1)
        )
        for i in range(4):
            if swapped and i in (0, 2):
                new = torch.nn.Parameter(layer.weight.detach().clone())
                torch.utils.swap_tensors(layer.weight, new)
            optimizer.zero_grad()
            layer(torch.full((1, 3), 1.0 + i)).square().sum().backward()
            optimizer.step()
        results.append(snapshot(optimizer, dict(layer.named_parameters())))
    assert_same(*results)
