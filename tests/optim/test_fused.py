"""The fused form against the loop, pass by pass, from the same tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from hf_adalip.optim import LipOptimizer, fused, rules
from hf_adalip.optim.kernels import cpu
from hf_adalip.optim.rules import Batch
from tests.optim.cases import CLASSES, Named, momentum_only, named_params, random_grads, set_grads

needs_compiler = pytest.mark.skipif(bool(cpu.missing()), reason=f"no {cpu.missing()}")
pytestmark = needs_compiler

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

CUTS = (0, 1, 31, 32, 33, 1023, 1024, 1025, 16383, 16384, 16385, 20_000)
"""Around what a vector, a block and a chunk of step.cpp hold."""


MOMENTUM = {"momentum": 0.9, "weight_decay": 0.1}
COUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": False, "maximize": True}
NESTEROV = MOMENTUM | COUPLED | {"nesterov": True}
EPS = COUPLED | {"eps_in_sqrt": True, "eps": 1e-3}


def options_of(name: str) -> list[dict[str, Any]]:
    """The last has most of them."""
    own = [MOMENTUM, COUPLED, NESTEROV] if momentum_only(name) else [{"weight_decay": 0.1}, EPS]
    return [{}, *own]


def combinations() -> Iterator[Any]:
    for name in CLASSES:
        options = options_of(name)
        for dtype in DTYPES:
            for i in range(len(options)) if dtype == torch.float32 else (len(options) - 1,):
                yield pytest.param(name, options[i], dtype, id=f"{name}-{i}-{dtype}")


every = pytest.mark.parametrize(("name", "options", "dtype"), list(combinations()))


def close(actual: Tensor, expected: Tensor, ulps: float = 16, scale: Tensor | None = None) -> None:
    """Within `ulps` roundings of the wide dtype, and one of a low precision in which it is kept.

    An element may be a difference that cancels, so its error is measured against the largest.
    """
    assert actual.dtype == expected.dtype
    wide = torch.finfo(torch.float64 if expected.dtype == torch.float64 else torch.float32).eps
    low = torch.finfo(expected.dtype).eps
    largest = expected.abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0
    rtol = low if low > wide else ulps * wide
    torch.testing.assert_close(
        actual, expected, rtol=rtol, atol=ulps * wide * largest, equal_nan=True
    )


@contextmanager
def compared() -> Iterator[None]:
    """Lets each pass of the loop form be done by the fused form too, on clones, and compares."""
    loop_measure, loop_advance = rules.measure, rules.advance

    def measure(batch: Batch) -> Tensor:
        before = frozen(batch)
        expected = loop_measure(batch)
        close(fused.measure(batch), expected)
        assert same(before, frozen(batch))
        return expected

    def advance(batch: Batch, rates: Tensor, remembered: Tensor, go: Tensor) -> None:
        copy = clone(batch)
        loop_advance(batch, rates, remembered, go)
        fused.advance(copy, rates, remembered, go)
        for i in range(len(batch.params)):
            close(copy.params[i], batch.params[i].detach())
            for name in batch.names:
                close(copy.states[i][name], batch.states[i][name])

    with mock.patch.multiple(rules, measure=measure, advance=advance):
        yield


def clone(batch: Batch) -> Batch:
    return replace(
        batch,
        params=[p.detach().clone() for p in batch.params],
        states=[{k: v.clone() for k, v in state.items()} for state in batch.states],
    )


def frozen(batch: Batch) -> list[Tensor]:
    """All that a step may change, copied."""
    copy = clone(batch)
    return [*copy.params, *(x for state in copy.states for x in state.values())]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Bit for bit; NaN is NaN."""
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in zip(a, b, strict=True))


def build(name: str, params: Named, **options: Any) -> LipOptimizer:
    return CLASSES[name](list(params.items()), **{"lr": 0.05, "foreach": False} | options)


def run(name: str, params: Named, steps: int = 3, **options: Any) -> None:
    optimizer = build(name, params, **options)
    with compared():
        for seed in range(steps):
            set_grads(params, random_grads(params, seed))
            optimizer.step()


def sized(sizes: Any, dtype: torch.dtype = torch.float32) -> Named:
    return named_params({f"m.{i}": (size,) for i, size in enumerate(sizes)}, dtype)


# Equal to the loop


@every
def test_equals_loop(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    run(name, sized((1, 33, 5000), dtype), **options)
