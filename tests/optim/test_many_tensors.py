"""What a step does for each tensor, counted in calls of operators rather than in time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Adam, Optimizer
from torch.profiler import ProfilerActivity, profile

from hf_adalip import AdamLip, Lipschitz

FORMS: dict[str, dict[str, Any]] = {"loop": {"foreach": False}, "foreach": {"foreach": True}}


def operators(make: Callable[[Any], Optimizer], count: int) -> int:
    """How many operators a steady step calls for so many tensors, those within others included."""
    params = [torch.ones(2, 2, requires_grad=True) for _ in range(count)]
    optimizer = make(params)
    for _ in range(4):
        for i, param in enumerate(params):
            param.grad = torch.full_like(param, 1.0 + i)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            optimizer.step()
    return sum(event.name.startswith("aten::") for event in seen.events())


def of_each(make: Callable[[Any], Optimizer]) -> float:
    """Operators for each tensor; all that is not linear in their number would show."""
    few, more, many = (operators(make, count) for count in (10, 20, 40))
    assert many - more == 2 * (more - few)
    return (many - few) / 30


@pytest.mark.parametrize("form", FORMS)
def test_at_most_three_times_the_operators_of_torch(form: str) -> None:
    theirs = of_each(lambda params: Adam(params, **FORMS[form]))
    assert of_each(lambda params: AdamLip(params, **FORMS[form])) <= 3 * theirs
    wrapped = of_each(lambda params: Lipschitz(Adam(params, **FORMS[form]), fused=False))
    assert wrapped <= 3 * theirs
