"""Adam, with bias correction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .rule import CppRule, Group, Moments, Numbers, Rule, TensorLists


class Adam(Rule):
    """m_t = β1·m_{t-1} + (1-β1)·g_t,  v_t = β2·v_{t-1} + (1-β2)·g_t²,  and m̂_t/(√v̂_t + ε)."""

    name = "Adam"
    cpp = CppRule(
        moment_count="2",
        moments="Moments{beta1 * old.first + take1 * grad, "
        "beta2 * old.second + take2 * grad * grad}",
        direction="m.first * inverse1 / root(m.second * inverse2)",
    )

    def uses(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        beta1, beta2 = group["betas"]
        return {
            "exp_avg": torch.add(beta1 * old["exp_avg"], grad, alpha=1 - beta1),
            "exp_avg_sq": torch.addcmul(beta2 * old["exp_avg_sq"], grad, grad, value=1 - beta2),
        }

    def bias_corrections(self, steps: Tensor, group: Group) -> tuple[Tensor, ...]:
        # 1 - β^t, without the cancellation of 1 - β**t in float32 (1e-5 at β = 0.999, t = 1).
        return tuple(
            -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)
            for beta in group["betas"]
        )

    def direction(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        correction1, correction2 = corrections
        mean: Tensor = moments["exp_avg"] / correction1
        return mean / root(moments["exp_avg_sq"] / correction2, group)

    def foreach_moments_(self, grads: list[Tensor], old: TensorLists, group: Group) -> TensorLists:
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(old["exp_avg"], beta1)
        torch._foreach_add_(old["exp_avg"], grads, alpha=1 - beta1)
        foreach_square_average_(old["exp_avg_sq"], grads, beta2)
        return old

    def foreach_directions(
        self, moments: TensorLists, corrections: Sequence[Numbers], group: Group
    ) -> list[Tensor]:
        correction1, correction2 = corrections
        directions = list(torch._foreach_div(moments["exp_avg"], correction1))
        squares = list(torch._foreach_div(moments["exp_avg_sq"], correction2))
        torch._foreach_div_(directions, foreach_root_(squares, group))
        return directions

    def inverse_bias_correction(self, step: Tensor, group: Group) -> Tensor:
        return 1 / self.bias_corrections(step, group)[0]


def root(square: Tensor, group: Group) -> Tensor:
    """√v + ε as the paper's algorithms print it, or √(v + ε) with `eps_in_sqrt`."""
    eps: float = group["eps"]
    return (square + eps).sqrt() if group["eps_in_sqrt"] else square.sqrt() + eps


def foreach_root_(squares: list[Tensor], group: Group) -> list[Tensor]:
    """`root`, in place."""
    eps: float = group["eps"]
    if group["eps_in_sqrt"]:
        torch._foreach_add_(squares, eps)
        torch._foreach_sqrt_(squares)
    else:
        torch._foreach_sqrt_(squares)
        torch._foreach_add_(squares, eps)
    return squares


def foreach_square_average_(average: list[Tensor], grads: list[Tensor], decay: float) -> None:
    """β·v + (1-β)·g², in place."""
    torch._foreach_mul_(average, decay)
    torch._foreach_addcmul_(average, grads, grads, value=1 - decay)
