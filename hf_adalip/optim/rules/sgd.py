"""SGD, with torch's momentum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rule import CppRule, Group, Moments, Numbers, Rule, TensorLists


class SGD(Rule):
    """SGD with torch's momentum (no dampening): a buffer b_t = μ·b_{t-1} + g_t, and Nesterov's."""

    name = "SGD"
    cpp = CppRule(
        moment_count="MOMENTUM ? 1 : 0",
        moments="Moments{MOMENTUM ? old.first * momentum + grad : 0, 0}",
        direction="NESTEROV ? grad + momentum * m.first : MOMENTUM ? m.first : grad",
    )

    def uses(self, group: Group) -> tuple[str, ...]:
        if not group["momentum"]:
            return ("grad",)
        return ("grad", "momentum_buffer") if group["nesterov"] else ("momentum_buffer",)

    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        if not group["momentum"]:
            return {"grad": grad}
        buffer = old["momentum_buffer"] * group["momentum"] + grad
        return {"grad": grad, "momentum_buffer": buffer}

    def direction(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        if not group["momentum"]:
            return moments["grad"]
        buffer = moments["momentum_buffer"]
        momentum: float = group["momentum"]
        return moments["grad"] + momentum * buffer if group["nesterov"] else buffer

    def foreach_moments_(self, grads: list[Tensor], old: TensorLists, group: Group) -> TensorLists:
        if not group["momentum"]:
            return {"grad": grads}
        buffers = old["momentum_buffer"]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, grads)
        return {"grad": grads, "momentum_buffer": buffers}

    def foreach_directions(
        self, moments: TensorLists, corrections: Sequence[Numbers], group: Group
    ) -> list[Tensor]:
        if not group["momentum"]:
            return [grad.clone() for grad in moments["grad"]]
        if not group["nesterov"]:
            return [buffer.clone() for buffer in moments["momentum_buffer"]]
        ahead = list(torch._foreach_mul(moments["momentum_buffer"], group["momentum"]))
        torch._foreach_add_(ahead, moments["grad"])
        return ahead
