"""The options of a parameter group, validated once, before any is used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .estimator import Estimator, is_number
from .history import DTYPES

_FLAGS = (
    *("nesterov", "eps_in_sqrt", "decoupled_weight_decay"),
    *("maximize", "capturable", "differentiable", "stochastic_rounding"),
)


def validate(group: dict[str, Any]) -> None:  # noqa: C901 - one check after the other
    """Refuses the value of an option of a group (or of the defaults) before it is used."""
    Estimator(group["gamma"], group["c"], group["scale_bounds"], group["nonfinite"])
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must have one element when it is a tensor, got {lr.numel()}")
        lr = lr.item()
    if not _in(lr, 0.0, math.inf):
        raise ValueError(f"lr must be a finite number >= 0, got {lr!r}")
    for name in ("weight_decay", "eps"):
        if name in group and not _in(group[name], 0.0, math.inf):
            raise ValueError(f"{name} must be a finite number >= 0, got {group[name]!r}")
    for name in ("momentum", "alpha"):
        if name in group and not _in(group[name], 0.0, 1.0):
            raise ValueError(f"{name} must be a number in [0, 1), got {group[name]!r}")
    if "betas" in group:
        betas = group["betas"]
        if (
            not isinstance(betas, (tuple, list))
            or len(betas) != 2
            or not all(_in(b, 0.0, 1.0) for b in betas)
        ):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
    if group.get("nesterov") and not group["momentum"]:
        raise ValueError(f"nesterov=True needs a momentum > 0, got momentum={group['momentum']!r}")
    if group.get("previous", "applied") not in ("applied", "proposed"):
        raise ValueError(f'previous must be "applied" or "proposed", got {group["previous"]!r}')
    if group["history"] not in ("exact", "sketch", *DTYPES):
        raise ValueError(
            'history must be "exact", "sketch" or a floating-point dtype '
            f"({', '.join(DTYPES)}), got {group['history']!r}"
        )
    size = group["sketch_size"]
    if isinstance(size, bool) or not isinstance(size, int) or size < 32 or size & (size - 1):
        raise ValueError(f"sketch_size must be a power of two >= 32, got {size!r}")
    for name in _FLAGS:
        if name in group and not isinstance(group[name], bool):
            raise ValueError(f"{name} must be True or False, got {group[name]!r}")
    if group["foreach"] not in (None, True, False):
        raise ValueError(f"foreach must be None, True or False, got {group['foreach']!r}")
    if group["fused"] not in (None, True, False):
        raise ValueError(f"fused must be None, True or False, got {group['fused']!r}")
    for one, other in (
        ("foreach", "differentiable"),
        ("stochastic_rounding", "differentiable"),
        ("fused", "differentiable"),
        ("foreach", "fused"),
    ):
        if group.get(one) and group[other]:
            raise ValueError(f"{one}=True and {other}=True exclude each other")
    if group["capturable"] and group["nonfinite"] == "raise":
        raise ValueError(
            'nonfinite="raise" looks at the gradients on the host, which capturable=True excludes; '
            'choose "skip" or "propagate"'
        )


def as_plain(value: Any) -> Any:
    """NumPy's numbers as Python's and other sequences (OmegaConf's ListConfig) as tuples, which
    torch.load(weights_only=True) reads, and dtypes as text, which every checkpoint format keeps."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Sequence) and not isinstance(value, str):
        kind = list if isinstance(value, list) else tuple
        return kind(as_plain(item) for item in value)
    return float(value) if is_number(value) and type(value) not in (int, float) else value


def _in(value: object, low: float, high: float) -> bool:
    return is_number(value) and low <= float(cast("float", value)) < high
