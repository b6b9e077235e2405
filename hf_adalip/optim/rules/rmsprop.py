"""RMSProp, without bias correction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adam import foreach_root_, foreach_square_average_, root
from .rule import CppRule, Group, Moments, Numbers, Rule, TensorLists


class RMSprop(Rule):
    """v_t = α·v_{t-1} + (1-α)·g_t², and g_t/(√v_t + ε)."""

    name = "RMSprop"
    cpp = CppRule(  # beta1 is α
        moment_count="1",
        moments="Moments{beta1 * old.first + take1 * grad * grad, 0}",
        direction="grad / root(m.first)",
    )

    def uses(self, group: Group) -> tuple[str, ...]:
        return ("grad", "square_avg")

    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        alpha = group["alpha"]
        square = torch.addcmul(alpha * old["square_avg"], grad, grad, value=1 - alpha)
        return {"grad": grad, "square_avg": square}

    def direction(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        return moments["grad"] / root(moments["square_avg"], group)

    def foreach_moments_(self, grads: list[Tensor], old: TensorLists, group: Group) -> TensorLists:
        foreach_square_average_(old["square_avg"], grads, group["alpha"])
        return {"grad": grads, "square_avg": old["square_avg"]}

    def foreach_directions(
        self, moments: TensorLists, corrections: Sequence[Numbers], group: Group
    ) -> list[Tensor]:
        roots = foreach_root_([square.clone() for square in moments["square_avg"]], group)
        return list(torch._foreach_div(moments["grad"], roots))
