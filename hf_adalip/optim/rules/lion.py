"""Lion: the sign of an average of momentum and gradient (Chen et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .rule import CppRule, Group, Moments, Numbers, Rule, TensorLists


class Lion(Rule):
    """u_t = β1·m_{t-1} + (1-β1)·g_t,  m_t = β2·m_{t-1} + (1-β2)·g_t,  and sign(u_t)."""

    name = "Lion"
    cpp = CppRule(
        moment_count="1",
        moments="Moments{beta2 * old.first + take2 * grad, beta1 * old.first + take1 * grad}",
        direction="Opmath(m.second > 0) - Opmath(m.second < 0)",
    )

    def uses(self, group: Group) -> tuple[str, ...]:
        return ("update",)

    def state_keys(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg",)

    def can_recompute(self, group: Group) -> bool:
        return False  # m_t no longer has m_{t-1}, which u_t was made of

    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        beta1, beta2 = group["betas"]
        return {
            "update": torch.add(beta1 * old["exp_avg"], grad, alpha=1 - beta1),
            "exp_avg": torch.add(beta2 * old["exp_avg"], grad, alpha=1 - beta2),
        }

    def direction(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        return moments["update"].sgn()

    def foreach_moments_(self, grads: list[Tensor], old: TensorLists, group: Group) -> TensorLists:
        beta1, beta2 = group["betas"]
        updates = list(torch._foreach_mul(old["exp_avg"], beta1))
        torch._foreach_add_(updates, grads, alpha=1 - beta1)
        torch._foreach_mul_(old["exp_avg"], beta2)
        torch._foreach_add_(old["exp_avg"], grads, alpha=1 - beta2)
        return {"update": updates, "exp_avg": old["exp_avg"]}

    def foreach_directions(
        self, moments: TensorLists, corrections: Sequence[Numbers], group: Group
    ) -> list[Tensor]:
        return [update.sgn() for update in moments["update"]]
