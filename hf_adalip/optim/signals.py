"""What is measured: the signal x_t from whose successive values S is estimated.

A signal is written once for every implementation: an `X` is a tensor in the loop form and a
list of tensors in the foreach form. What it does not need is not computed: updates come as
functions to call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .rules import Group, Rule

X = Any
Lazy = Callable[[], X]


class Signal(ABC):
    """One choice of x_t."""

    measures_updates: ClassVar[bool] = False

    @abstractmethod
    def history(self, rule: Rule, group: Group) -> tuple[str, ...]:
        """State keys, of the parameter's shape, in which x_t is remembered."""

    @abstractmethod
    def now(self, grad: X, proposal: Lazy) -> X:
        """x_t, from g_t or from û_t = `proposal()`."""

    @abstractmethod
    def before(self, old: dict[str, X], retraced: Lazy) -> X:
        """x_{t-1}, from the history or from u_{t-1} = `retraced()`."""

    @abstractmethod
    def remember(self, grad: X, update: Lazy) -> dict[str, X]:
        """The history after step t, from g_t or from the update to remember."""

    def retraces(self, rule: Rule, group: Group) -> bool:
        """Whether x_{t-1} is computed again, which needs the scalar `prev_lr` in the state."""
        return False

    def remembered(self, x: Tensor, factor: Tensor, previous: str | None) -> Tensor:
        """What is remembered of x_t: of x_t itself, its norm or its sketch, from A_t/α_t."""
        return x


class Gradients(Signal):
    """x_t = g_t (Eqs. 6-8)."""

    def history(self, rule: Rule, group: Group) -> tuple[str, ...]:
        return ("prev_grad",)

    def now(self, grad: X, proposal: Lazy) -> X:
        return grad

    def before(self, old: dict[str, X], retraced: Lazy) -> X:
        return old["prev_grad"]

    def remember(self, grad: X, update: Lazy) -> dict[str, X]:
        return {"prev_grad": grad}


class Updates(Signal):
    """x_t = û_t, the update that the base optimizer proposes with α_t (Appendix C).

    Its predecessor is the update that was applied, S included (`previous="applied"`,
    Algorithm 5), or the one that was proposed ("proposed", Eqs. C4-C5). Where the rule can
    retrace d_{t-1} from its own moments, the scalar `prev_lr` is kept instead of the update.
    """

    measures_updates = True

    def history(self, rule: Rule, group: Group) -> tuple[str, ...]:
        return () if rule.retraceable(group) else ("prev_update",)

    def retraces(self, rule: Rule, group: Group) -> bool:
        return rule.retraceable(group)

    def now(self, grad: X, proposal: Lazy) -> X:
        return proposal()

    def before(self, old: dict[str, X], retraced: Lazy) -> X:
        return old["prev_update"] if "prev_update" in old else retraced()

    def remember(self, grad: X, update: Lazy) -> dict[str, X]:
        return {"prev_update": update()}

    def remembered(self, x: Tensor, factor: Tensor, previous: str | None) -> Tensor:
        return x * factor if previous == "applied" else x


def remembered_rates(rates: Tensor, lr: Tensor | float, previous: str) -> Tensor:
    """What d_t is scaled by in the update to remember: A_t if applied, α_t if proposed."""
    return rates if previous == "applied" else torch.zeros_like(rates) + lr
