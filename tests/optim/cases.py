"""What the tests of the optimizers share: the six names, and small models of named tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hf_adalip import AdaLip, AdaLipU, AdamLip, AdamLipU, Lipschitz, RMSLip, RMSLipU
from hf_adalip.optim.estimator import FORGOTTEN
from hf_adalip.optim.history import HISTORIES

CLASSES = {
    "adalip": AdaLip,
    "rmslip": RMSLip,
    "adamlip": AdamLip,
    "adalipu": AdaLipU,
    "rmslipu": RMSLipU,
    "adamlipu": AdamLipU,
}
GRADIENT = ["adalip", "rmslip", "adamlip"]
UPDATE = ["adalipu", "rmslipu", "adamlipu"]
BASES = {"adalip": "sgd", "rmslip": "rmsprop", "adamlip": "adam"}

six = pytest.mark.parametrize("name", CLASSES)
forms = pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])

SHAPES = {"a.weight": (3, 4), "a.bias": (3,), "b.weight": (2, 3)}

Named = dict[str, Tensor]


def reference_options(name: str) -> dict[str, str]:
    """The reference's `base` and `signal` of an optimizer."""
    signal = "update" if name.endswith("u") else "gradient"
    return {"base": BASES[name.removesuffix("u")], "signal": signal}


def momentum_only(name: str) -> bool:
    return name.startswith("adalip")


def named_params(
    shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype | None = None, seed: int = 0
) -> Named:
    """Parameters of standard normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = {
        n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
    }
    dtype = dtype or torch.get_default_dtype()
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def random_grads(params: Named, seed: int) -> Named:
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in params.items()
    }


def set_grads(params: Named, grads: dict[str, Any]) -> None:
    """Gives each parameter its gradient: a tensor, an array, or None (also if missing)."""
    for name, p in params.items():
        grad = grads.get(name)
        if isinstance(grad, np.ndarray | float):
            grad = torch.as_tensor(grad, dtype=p.dtype)
        p.grad = None if grad is None else grad.detach().clone()


def train(optimizer: torch.optim.Optimizer, params: Named, seeds: Iterable[int]) -> None:
    """One step with random gradients for each seed."""
    for seed in seeds:
        set_grads(params, random_grads(params, seed))
        optimizer.step()


def snapshot(optimizer: torch.optim.Optimizer, params: Named) -> dict[str, Any]:
    """Everything that a step may change, copied."""
    return copy.deepcopy(
        {"params": {n: p.detach() for n, p in params.items()}, "state": optimizer.state_dict()}
    )


def forget(state: dict[str, Tensor]) -> None:
    """Makes of a parameter's state what a step that was left out leaves of it."""
    state["prev_norm"].fill_(FORGOTTEN)
    for key, value in state.items():
        if key.startswith(HISTORIES):
            value.zero_()


def assert_same(actual: Any, expected: Any, where: str = "") -> None:
    """Exact equality of nested containers of tensors, dtypes included; NaN equals NaN."""
    assert type(actual) is type(expected), f"{where}: {type(actual)} is not {type(expected)}"
    if isinstance(expected, Tensor):
        torch.testing.assert_close(
            actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{where}: {m}"
        )
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), (
            f"{where}: {actual.keys()} is not {expected.keys()}"
        )
        for key in expected:
            assert_same(actual[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), where
        for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where}: {actual!r} is not {expected!r}"


def wrap(
    name: str, params: Any, *, lr: float, foreach: bool | None = None, **base: Any
) -> Lipschitz:
    """Lipschitz over torch's optimizer that the optimizer `name` extends."""
    kind = {"adalip": torch.optim.SGD, "rmslip": torch.optim.RMSprop, "adamlip": torch.optim.Adam}
    lipschitz = {
        key: base.pop(key)
        for key in ("gamma", "c", "layers", "previous", "scale_bounds", "nonfinite")
        if key in base
    }
    signal = "update" if name.endswith("u") else "gradient"
    inner = kind[name.removesuffix("u")](params, lr=lr, foreach=foreach, **base)
    return Lipschitz(inner, signal=signal, **lipschitz)


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """The step without torch's wrappers."""
    function = type(optimizer).step
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__

    def step() -> None:
        with torch.no_grad():
            function(optimizer)

    return step
