"""Adam, with bias correction."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rule import CppRule, Group, Moments, Rule, TensorLists, foreach_divide


class Adam(Rule):
    """m_t = β1·m_{t-1} + (1-β1)·g_t,  v_t = β2·v_{t-1} + (1-β2)·g_t²,  and m̂_t/(√v̂_t + ε)."""

    name = "Adam"
    cpp = CppRule(
        moments="2",
        follow="Moments{beta1 * old.first + take1 * grad, "
        "beta2 * old.second + take2 * grad * grad}",
        direction="m.first * scale1 / root(m.second * scale2)",
    )

    def uses(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        beta1, beta2 = group["betas"]
        return {
            "exp_avg": beta1 * old["exp_avg"] + (1 - beta1) * grad,
            "exp_avg_sq": beta2 * old["exp_avg_sq"] + (1 - beta2) * grad * grad,
        }

    def direction(self, moments: Moments, step: Tensor, group: Group) -> Tensor:
        beta1, beta2 = group["betas"]
        step = step.to(moments["exp_avg"].dtype)
        mean = moments["exp_avg"] / bias_correction(beta1, step)
        return mean / root(moments["exp_avg_sq"] / bias_correction(beta2, step), group)

    def foreach_moments(self, grads: list[Tensor], old: TensorLists, group: Group) -> TensorLists:
        beta1, beta2 = group["betas"]
        means = list(torch._foreach_mul(old["exp_avg"], beta1))
        torch._foreach_add_(means, grads, alpha=1 - beta1)
        squares = foreach_square_average(old["exp_avg_sq"], grads, beta2)
        return {"exp_avg": means, "exp_avg_sq": squares}

    def foreach_directions(self, moments: TensorLists, steps: Tensor, group: Group) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        steps = steps.to(moments["exp_avg"][0].dtype)
        directions = foreach_divide(moments["exp_avg"], bias_correction(beta1, steps))
        squares = foreach_divide(moments["exp_avg_sq"], bias_correction(beta2, steps))
        torch._foreach_div_(directions, foreach_root_(squares, group))
        return directions

    def inverse_bias_correction(self, step: Tensor, group: Group) -> Tensor:
        return 1 / bias_correction(group["betas"][0], step)


def root(square: Tensor, group: Group) -> Tensor:
    """√v + ε as the paper's algorithms print it, or √(v + ε) with `eps_in_sqrt`."""
    eps: float = group["eps"]
    return (square + eps).sqrt() if group["eps_in_sqrt"] else square.sqrt() + eps


def bias_correction(beta: float, step: Tensor) -> Tensor:
    """1 - β^t without the cancellation that 1 - β**t has in float32 (1e-5 at β = 0.999, t = 1)."""
    if beta == 0.0:
        return torch.ones_like(step)
    return -torch.expm1(step * math.log(beta))


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


def foreach_square_average(old: list[Tensor], grads: list[Tensor], decay: float) -> list[Tensor]:
    """β·v + (1-β)·g²."""
    new = list(torch._foreach_mul(old, decay))
    torch._foreach_addcmul_(new, grads, grads, value=1 - decay)
    return new
