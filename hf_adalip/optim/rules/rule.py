"""What each base optimizer defines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

Group = Mapping[str, Any]
Moments = dict[str, Tensor]
TensorLists = dict[str, list[Tensor]]
Numbers = Sequence[Any]
"""Python's, or 0-dim tensors."""


class CppRule(NamedTuple):
    """The formula for one element, as C++ that kernels/step.cpp is compiled with.

    `moment_count` is how many moments the state has, a constant expression. `moments` makes the
    Moments {first, second} of step t from `grad` and `old`; `direction` the number to subtract
    from `grad`, `m` and `inverse1`, `inverse2`, the reciprocals of the bias corrections. Both read
    `momentum`, `beta1`, `take1` (1 - β1), `beta2`, `take2`, and the flags MOMENTUM and NESTEROV;
    `root` is √v + ε.
    """

    moment_count: str
    moments: str
    direction: str


class Rule(ABC):
    """A base optimizer."""

    name: ClassVar[str]
    cpp: ClassVar[CppRule]

    @abstractmethod
    def uses(self, group: Group) -> tuple[str, ...]:
        """What `direction` reads of the moments."""

    @abstractmethod
    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        """The moments of step t from g_t and the moments of step t-1."""

    def bias_corrections(self, steps: Tensor, group: Group) -> tuple[Tensor, ...]:
        """The bias corrections of step t: vectors with an element per tensor, as `steps` has."""
        return ()

    @abstractmethod
    def direction(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        """d_t, such that the base optimizer's update is -α_t·d_t.

        Args:
            moments: of step t.
            corrections: the tensor's elements of `bias_corrections`.
            group: the options.
        """

    @abstractmethod
    def foreach_moments_(self, grads: list[Tensor], old: TensorLists, group: Group) -> TensorLists:
        """`moments` of many tensors at once, written into the old ones."""

    @abstractmethod
    def foreach_directions(
        self, moments: TensorLists, corrections: Sequence[Numbers], group: Group
    ) -> list[Tensor]:
        """`direction` of many tensors at once, in new tensors; each correction of all tensors."""

    def inverse_bias_correction(self, step: Tensor, group: Group) -> Tensor:
        """The factor of d_t that depends on t and on options that a schedule may change.

        `prev_lr` is stored multiplied by this factor, so that computing d_{t-1} again does not use
        the options of step t.
        """
        return torch.ones_like(step)

    def state_keys(self, group: Group) -> tuple[str, ...]:
        """State keys, each a tensor of the parameter's shape that starts at zero: what is used of
        the moments, but for the gradient itself."""
        return tuple(key for key in self.uses(group) if key != "grad")

    def can_recompute(self, group: Group) -> bool:
        """Whether d_{t-1} can be computed again from the moments in the state, without g_{t-1}."""
        return "grad" not in self.uses(group)
