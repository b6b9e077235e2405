"""How x_{t-1} is kept: exactly, in another dtype, or as a sketch."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..sharding import whole_shape
from ..signals import opmath_dtype
from .countsketch import DEFAULT_SKETCH_SIZE, sketch

__all__ = [
    "DEFAULT_SKETCH_SIZE",
    "DTYPES",
    "HISTORIES",
    "SKETCH",
    "Exact",
    "History",
    "Sketch",
    "history_of",
    "real",
    "sketch",
]

HISTORIES = ("prev_grad", "prev_update")
"""Beginnings of the state keys in which x_{t-1} is kept."""

SKETCH = "_sketch"
"""End of such a key where only a sketch is kept."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
"""Those that a history may have, by name."""


class History(Protocol):
    """A way of keeping x_{t-1}."""

    @property
    def size(self) -> int:
        """How many numbers a sketch has; 0 where all of x_{t-1} is kept."""

    def key(self, name: str) -> str:
        """The state key for a history of this name."""

    def shape(self, param: Tensor) -> tuple[int, ...]:
        """Of what is kept for a parameter."""

    def empty(self, param: Tensor) -> Tensor:
        """What is kept before a first step."""

    def converted(self, history: Tensor, param: Tensor) -> Tensor | None:
        """A history of this key that was kept otherwise, in this form; None if it cannot be."""


class Exact(NamedTuple):
    """Keeps x_{t-1} as a tensor of the parameter's shape.

    In a dtype, a complex one as the real and imaginary parts: there is no complex bfloat16.
    """

    dtype: torch.dtype | None = None  # None for the parameter's own
    size: int = 0

    def key(self, name: str) -> str:
        return name

    def shape(self, param: Tensor) -> tuple[int, ...]:
        return tuple((param if self.dtype is None else real(param)).shape)

    def empty(self, param: Tensor) -> Tensor:
        like = param if self.dtype is None else real(param)
        zeros = torch.zeros_like(like, dtype=self.dtype, memory_format=torch.preserve_format)
        return zeros.detach()

    def converted(self, history: Tensor, param: Tensor) -> Tensor | None:
        if self.dtype is not None:
            parts: Tensor = real(history)
            return parts.to(self.dtype)
        if param.is_complex() and not history.is_complex():
            history = torch.view_as_complex(history.to(param.dtype.to_real()))
        return history.to(param.dtype)


class Sketch(NamedTuple):
    """Keeps `size` numbers of x_{t-1}."""

    size: int

    def key(self, name: str) -> str:
        return name + SKETCH

    def shape(self, param: Tensor) -> tuple[int, ...]:
        return (self.size,)

    def empty(self, param: Tensor) -> Tensor:
        return torch.zeros(self.size, dtype=self._dtype(param), device=param.device)

    def converted(self, history: Tensor, param: Tensor) -> Tensor | None:
        return history.to(self._dtype(param)) if history.shape == (self.size,) else None

    def nbytes(self, param: Tensor) -> int:
        return self.size * self._dtype(param).itemsize

    def _dtype(self, param: Tensor) -> torch.dtype:
        return opmath_dtype(param.dtype.to_real() if param.is_complex() else param.dtype)


def history_of(group: dict[str, Any], param: Tensor) -> History:
    """How a group keeps the history of one of its parameters.

    With "sketch", a parameter that takes no more memory than a sketch is kept exactly.

    Raises:
        ValueError: for a value that is none; options may be changed by hand.
    """
    how = str(group.get("history", "exact")).removeprefix("torch.")
    if how == "sketch":
        sketched = Sketch(group["sketch_size"])
        if whole_shape(param).numel() * param.element_size() > sketched.nbytes(param):
            return sketched
    if how in ("exact", "sketch"):
        return Exact()
    if how not in DTYPES:
        raise ValueError(
            'history must be "exact", "sketch" or a floating-point dtype '
            f"({', '.join(DTYPES)}), got {how!r}"
        )
    return Exact(DTYPES[how])


def real(x: Any) -> Any:
    """A complex tensor as its real and imaginary parts: one layer of twice as many numbers."""
    return torch.view_as_real(x) if isinstance(x, Tensor) and x.is_complex() else x
