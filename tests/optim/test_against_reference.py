"""Every optimizer, form and option against the float64 transcription of the paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from tests.optim.cases import (
    CLASSES,
    SHAPES,
    UPDATE,
    forms,
    momentum_only,
    named_params,
    reference_options,
    set_grads,
    six,
)
from tests.reference import Reference

pytestmark = pytest.mark.usefixtures("float64")

LR = 0.05
Step = dict[str, np.ndarray | None]


def randoms(count: int, seed: int = 0, scale: float = 1.0) -> list[Step]:
    rng = np.random.default_rng(seed)
    return [
        {name: scale * rng.standard_normal(shape) for name, shape in SHAPES.items()}
        for _ in range(count)
    ]


ZERO: Step = {name: np.zeros(shape) for name, shape in SHAPES.items()}


def flipped(step: Step) -> Step:
    return {name: -grad for name, grad in step.items()}


def without(step: Step, *names: str) -> Step:
    return {name: None if name in names else grad for name, grad in step.items()}


def sequences() -> dict[str, list[Step]]:
    r = randoms(8)
    g, h = randoms(2, seed=1)
    return {
        "random": r,
        # What torch.distributed.checkpoint does to create the state.
        "zero first": [ZERO, ZERO, *r[:4]],
        "zero between": [*r[:3], ZERO, *r[3:5], ZERO, ZERO, *r[5:]],
        "never anything": [ZERO] * 3,
        # All of the above in one, for the many options.
        "eventful": [
            ZERO,
            r[0],
            without(r[1], "a.bias"),
            g,
            g,
            without(r[2], *SHAPES),
            ZERO,
            ZERO,
            without(r[3], "b.weight"),
            flipped(r[3]),
        ],
        "identical": [g, g, h, h, h, *r[:2]],
        "tiny": randoms(6, seed=2, scale=1e-12),
        "opposite": [g, flipped(g), g, flipped(g), h, flipped(h)],
        # Whole layers, then tensors of a layer that others of it have.
        "none": [
            without(r[0], "b.weight"),
            r[1],
            without(r[2], *SHAPES),
            without(r[3], "a.bias"),
            without(r[4], "a.weight", "b.weight"),
            *r[5:7],
        ],
        "first gradient late": [
            without(r[0], "a.weight", "a.bias"),
            without(r[1], "a.bias"),
            *r[2:5],
        ],
        # One tensor of a layer is silent: its S is no longer the layer's.
        "partly zero": [r[0], {**r[1], "a.bias": ZERO["a.bias"]}, *r[2:4]],
    }


SEQUENCES = sequences()

OPTIONS: dict[str, dict[str, Any]] = {
    "unbounded": {"scale_bounds": None},
    "narrow": {"scale_bounds": (0.9, 1.05)},
    "theoretical": {"c": "theoretical", "scale_bounds": None},
    "c=0.1, gamma=0.3": {"c": 0.1, "gamma": 0.3},
    "decoupled": {"weight_decay": 0.1},
    "L2": {"weight_decay": 0.1, "decoupled_weight_decay": False, "scale_bounds": None},
    "maximize": {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
}
OWN_OPTIONS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9, "scale_bounds": None},
    "nesterov": {"momentum": 0.9, "nesterov": True, "scale_bounds": None},
    "nesterov, L2": {
        "momentum": 0.7,
        "nesterov": True,
        "weight_decay": 0.1,
        "decoupled_weight_decay": False,
    },
    "eps in sqrt": {"eps_in_sqrt": True, "eps": 1e-3},
    "alpha": {"alpha": 0.9, "eps": 1e-2},
    "betas": {"betas": (0.8, 0.95), "eps": 1e-2},
    "no first moment": {"betas": (0.0, 0.9)},
    "proposed": {"previous": "proposed", "scale_bounds": None},
    "proposed, theoretical": {
        "previous": "proposed",
        "c": "theoretical",
        "scale_bounds": None,
    },
}


def takes(name: str, option: str) -> bool:
    """Whether the optimizer `name` has the options of OWN_OPTIONS[option]."""
    keys = OWN_OPTIONS[option].keys()
    return (
        ("momentum" not in keys or momentum_only(name))
        and (not keys & {"eps", "eps_in_sqrt"} or not momentum_only(name))
        and ("alpha" not in keys or name.startswith("rmslip"))
        and ("betas" not in keys or name.startswith("adamlip"))
        and ("previous" not in keys or name in UPDATE)
    )


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


LAYERS: dict[str, tuple[Any, Callable[[str], str]]] = {
    "tensor": ("tensor", lambda name: name),
    "module": ("module", module_of),
    "callable": (lambda name: "all" if name != "a.bias" else "bias",) * 2,
}


class Pair:
    """An optimizer and its reference on the same named tensors."""

    def __init__(self, name: str, layers: str = "tensor", lr: float = LR, **options: Any) -> None:
        chosen, layer_of = LAYERS[layers]
        self.params = named_params()
        own = {k: v for k, v in options.items() if k not in ("foreach", "groups")}
        if groups := options.pop("groups", None):
            self.group_of = {n: i for i, (names, _) in enumerate(groups) for n in names}
            given = [
                {"params": [(n, self.params[n]) for n in names], **values}
                for names, values in groups
            ]
            decays = {n: values.get("weight_decay", 0.0) for names, values in groups for n in names}
            own["weight_decay"] = decays
        else:
            self.group_of = dict.fromkeys(self.params, 0)
            given = list(self.params.items())
        self.optimizer = CLASSES[name](given, lr=lr, layers=chosen, **options)
        self.reference = Reference(**reference_options(name), layer_of=layer_of, **own)
        self.w = {n: p.detach().numpy().copy() for n, p in self.params.items()}

    def step(self, grads: Step, lr: float | list[float] = LR, rtol: float = 1e-11) -> None:
        lrs = [lr] * len(self.optimizer.param_groups) if isinstance(lr, float) else lr
        for group, value in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = value
        set_grads(self.params, grads)
        self.optimizer.step()
        lr_of = {n: lrs[i] for n, i in self.group_of.items()}
        self.w = self.reference.step(self.w, grads, lr_of)
        self.compare(rtol)

    def compare(self, rtol: float) -> None:
        rates = self.optimizer.layer_learning_rates()
        assert rates.keys() == self.reference.S.keys()
        actual, expected = {}, {}
        for layer, rate in rates.items():
            actual |= {f"S of {layer}": rate.scale, f"norm of {layer}": rate.norm}
            expected |= {f"S of {layer}": self.reference.S[layer]}
            expected |= {f"norm of {layer}": self.reference.norm[layer]}
            assert rate.nonfinite_steps == 0
            for n, a in self.reference.A[layer].items():
                actual[f"A of {n}"] = self.optimizer.state[self.params[n]]["layer_lr"].item()
                expected[f"A of {n}"] = a
        close(actual, expected, rtol, 0.0)
        close({n: p.detach().numpy() for n, p in self.params.items()}, self.w, rtol, 1e-13)


def close(actual: Mapping[str, Any], expected: Mapping[str, Any], rtol: float, atol: float) -> None:
    """Relative to each number; all at once, and again by name for the message."""
    x, y = (np.concatenate([np.ravel(a[name]) for name in expected]) for a in (actual, expected))
    if not (np.abs(x - y) <= atol + rtol * np.abs(y)).all():
        for name in expected:
            np.testing.assert_allclose(actual[name], expected[name], rtol, atol, err_msg=name)


def well_posed(name: str, sequence: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with a c that rounding does not drown.

    û_t and u_{t-1} of equal gradients differ by nothing, which Adam computes as rounding of
    1e-17 on either side: with c = 1e-8, nine digits of the ratio would be left.
    """
    equal = sequence in ("identical", "eventful") and name == "adamlipu" and "c" not in options
    return {**options, "c": 1e-2} if equal else options


@six
@forms
@pytest.mark.parametrize("sequence", SEQUENCES)
def test_defaults(name: str, foreach: bool, sequence: str) -> None:
    pair = Pair(name, "module", foreach=foreach, **well_posed(name, sequence, {}))
    for grads in SEQUENCES[sequence]:
        pair.step(grads)


@six
@forms
@pytest.mark.parametrize("option", OPTIONS)
def test_options_common_to_all(name: str, foreach: bool, option: str) -> None:
    options = well_posed(name, "eventful", OPTIONS[option])
    pair = Pair(name, "module", foreach=foreach, **options)
    for grads in SEQUENCES["eventful"]:
        pair.step(grads)


@forms
@pytest.mark.parametrize(
    ("name", "option"), [(n, o) for n in CLASSES for o in OWN_OPTIONS if takes(n, o)]
)
def test_own_options(name: str, foreach: bool, option: str) -> None:
    options = well_posed(name, "eventful", OWN_OPTIONS[option])
    pair = Pair(name, "module", foreach=foreach, **options)
    for grads in SEQUENCES["eventful"]:
        pair.step(grads)


@six
@forms
@pytest.mark.parametrize("layers", ["tensor", "callable"])
def test_layers(name: str, foreach: bool, layers: str) -> None:
    options = well_posed(name, "eventful", {"weight_decay": 0.01})
    pair = Pair(name, layers, foreach=foreach, **options)
    for grads in SEQUENCES["eventful"]:
        pair.step(grads)


WARM_UP = [0.0, 0.0, 0.01, 0.05, 0.05, 0.02, 0.0, 0.01]


@pytest.mark.parametrize(
    ("name", "previous"),
    [(n, p) for n in CLASSES for p in (["applied", "proposed"] if n in UPDATE else [None])],
)
@forms
@pytest.mark.parametrize("option", ["unbounded", "theoretical", "decoupled", "L2"])
def test_a_learning_rate_that_changes(
    name: str, previous: str | None, foreach: bool, option: str
) -> None:
    """Warm-up from 0, decay, and 0 again. An update of zero is no signal of the -U forms."""
    options = OPTIONS[option] | ({"previous": previous} if previous else {})
    pair = Pair(name, "module", foreach=foreach, **options)
    for grads, lr in zip(SEQUENCES["random"], WARM_UP, strict=True):
        pair.step(grads, lr)


@forms
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("previous", ["applied", "proposed"])
def test_momentum_and_a_learning_rate_that_changes(
    foreach: bool, nesterov: bool, previous: str
) -> None:
    """AdaLip-U computes u_{t-1} again from the buffer, which it must do with the lr of t-1."""
    options = {"momentum": 0.9, "nesterov": nesterov, "previous": previous, "scale_bounds": None}
    pair = Pair("adalipu", "module", foreach=foreach, **options)
    for grads, lr in zip(SEQUENCES["random"], WARM_UP, strict=True):
        pair.step(grads, lr)


@six
@forms
@pytest.mark.parametrize("decoupled", [True, False])
def test_a_layer_across_groups(name: str, foreach: bool, decoupled: bool) -> None:
    """Weights with decay and biases without, the usual split, leave a module one layer."""
    groups = [
        (("a.weight", "b.weight"), {"weight_decay": 0.1}),
        (("a.bias",), {"weight_decay": 0.0}),
    ]
    options = {"decoupled_weight_decay": decoupled, "scale_bounds": None}
    options = well_posed(name, "eventful", options)
    pair = Pair(name, "module", foreach=foreach, groups=groups, **options)
    for i, grads in enumerate(SEQUENCES["eventful"]):
        pair.step(grads, [LR / (i + 1), 0.3 * LR])


@pytest.mark.parametrize("name", [n for n in CLASSES if n not in ("rmslipu", "adamlipu")])
@forms
def test_equal_gradients_and_the_default_c(name: str, foreach: bool) -> None:
    """ratio = ‖g‖/c: S jumps by seven orders of magnitude, and is still right to the digit."""
    pair = Pair(name, foreach=foreach, scale_bounds=None, lr=1e-3)
    g, h = randoms(2, seed=1)
    for grads in (g, g):
        pair.step(grads, 1e-3)
    assert pair.reference.S["a.weight"] > 1e3
    pair.step(h, 1e-3)


@six
@forms
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_gradients_of_any_magnitude(name: str, foreach: bool, scale: float) -> None:
    eps = {} if momentum_only(name) else {"eps": 1e-30}
    lr = LR / scale if momentum_only(name) else LR
    pair = Pair(name, foreach=foreach, c=1e-30, scale_bounds=None, **eps)
    for grads in randoms(6, scale=scale):
        pair.step(grads, lr)


@six
@pytest.mark.parametrize(("foreach", "layers"), [(False, "module"), (True, "tensor")])
def test_training_on_digits(name: str, foreach: bool, layers: str) -> None:
    """30 steps of an MLP: the gradients come from autograd, at this optimizer's parameters."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.data / 16.0)
    y = torch.tensor(digits.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    lr = 0.5 if momentum_only(name) else 1e-2
    optimizer = CLASSES[name](model.named_parameters(), lr, layers=layers, foreach=foreach)
    layer_of = LAYERS[layers][1]
    reference = Reference(**reference_options(name), layer_of=layer_of)
    w = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    losses = []
    for t in range(30):
        batch = slice(50 * t, 50 * (t + 1))
        loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        grads = {n: p.grad.numpy().copy() for n, p in model.named_parameters()}
        optimizer.step()
        w = reference.step(w, grads, lr)
        for n, p in model.named_parameters():
            np.testing.assert_allclose(p.detach().numpy(), w[n], 1e-9, 1e-11, err_msg=f"{n} {t}")
        for layer, rate in optimizer.layer_learning_rates().items():
            assert rate.scale == pytest.approx(reference.S[layer], rel=1e-9), (layer, t)
    assert np.mean(losses[-5:]) < 0.7 * losses[0], "the problem was meant to be a real one"
    assert math.isfinite(losses[-1])
