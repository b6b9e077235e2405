"""How a parameter is sharded: the protocol that each engine implements in a class."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .reduce import ReduceGroups


class Place(NamedTuple):
    """Where in the whole parameter a rank's part begins."""

    shape: tuple[int, ...]  # of the whole
    offset: tuple[int, ...]


class Shard:
    """A parameter that this rank holds whole, and the protocol of all engines.

    Args:
        param: as the optimizer has it.
    """

    reduce_groups: ReduceGroups = ()
    hides_gradients: ClassVar[bool] = False
    """Whether a rank that holds no element of a parameter gets no gradient where others do."""
    sketch_problem: ClassVar[str | None] = None
    """Why its part cannot be sketched: nothing says which elements of the parameter it has."""

    def __init__(self, param: Tensor) -> None:
        self.param = param

    def local(self, x: Tensor) -> Tensor:
        """This rank's part of the parameter or of its state, as a view."""
        return x

    def local_grad(self, grad: Tensor) -> Tensor:
        """This rank's part of a gradient, laid out as the parameter is."""
        return grad

    @property
    def shape(self) -> torch.Size:
        """Of the model's parameter, also where the tensor here is a flat part of it."""
        return self.param.shape

    @property
    def place(self) -> Place:
        """Of a complex parameter, with its two parts as a last dimension."""
        shape, offset = tuple(self.param.shape), self._offset()
        if self.param.is_complex():
            return Place((*shape, 2), (*offset, 0))
        return Place(shape, offset)

    @property
    def start(self) -> int | None:
        """The row-major index in the whole parameter at which this part begins, if it is a run of
        consecutive elements there, laid out in that order here."""
        shape, offset = self.place
        part = self.local(self.param)
        rows = tuple(part.shape[1:]) == shape[1:]
        if not rows or not part.is_contiguous():
            return None
        return offset[0] * math.prod(shape[1:]) if shape else 0

    def _offset(self) -> tuple[int, ...]:
        return (0,) * self.param.dim()
