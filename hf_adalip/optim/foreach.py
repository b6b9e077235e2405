"""The rules of rules.py on lists of tensors: the same steps in fewer, larger launches.

Everything that does not depend on the layer is one `_foreach` call for a whole batch. What does
(A_t, and leaving a non-finite layer alone) has a scalar on the device for each tensor.
Low-precision tensors are widened first and rounded once, as in the loop form.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import rules
from .norms import norms, wide_dtype
from .rules import Batch, Group, bias_correction

Tensors = list[Tensor]
Moments = dict[str, Tensors]


def _moments(batch: Batch, grads: Tensors, old: Moments) -> Moments:
    rule, group = batch.rule, batch.group
    if isinstance(rule, rules.SGD):
        new = {"grad": grads}
        if group["momentum"]:
            buffers = torch._foreach_mul(old["momentum_buffer"], group["momentum"])
            torch._foreach_add_(buffers, grads)
            new["momentum_buffer"] = list(buffers)
        return new
    if isinstance(rule, rules.RMSprop):
        return {"grad": grads, "square_avg": _square(old["square_avg"], grads, group["alpha"])}
    if isinstance(rule, rules.Adam):
        beta1, beta2 = group["betas"]
        mean = torch._foreach_mul(old["exp_avg"], beta1)
        torch._foreach_add_(mean, grads, alpha=1 - beta1)
        return {
            "exp_avg": list(mean),
            "exp_avg_sq": _square(old["exp_avg_sq"], grads, beta2),
        }
    raise NotImplementedError(f"{type(rule).__name__} has no foreach form; pass foreach=False")


def _directions(batch: Batch, moments: Moments, steps: Tensor) -> Tensors:
    """d_t of each tensor, in new tensors."""
    rule, group = batch.rule, batch.group
    if isinstance(rule, rules.SGD):
        if not group["momentum"]:
            return [grad.clone() for grad in moments["grad"]]
        if not group["nesterov"]:
            return [buffer.clone() for buffer in moments["momentum_buffer"]]
        ahead = torch._foreach_mul(moments["momentum_buffer"], group["momentum"])
        torch._foreach_add_(ahead, moments["grad"])
        return list(ahead)
    if isinstance(rule, rules.RMSprop):
        roots = _root_(torch._foreach_mul(moments["square_avg"], 1.0), group)
        return list(torch._foreach_div(moments["grad"], roots))
    if isinstance(rule, rules.Adam):
        beta1, beta2 = group["betas"]
        squares = torch._foreach_div(
            moments["exp_avg_sq"], _scalars(bias_correction(beta2, steps), batch)
        )
        directions = torch._foreach_div(
            moments["exp_avg"], _scalars(bias_correction(beta1, steps), batch)
        )
        torch._foreach_div_(directions, _root_(squares, group))
        return list(directions)
    raise NotImplementedError(f"{type(rule).__name__} has no foreach form; pass foreach=False")


def _square(old: Tensors, grads: Tensors, decay: float) -> Tensors:
    new = torch._foreach_mul(old, decay)
    torch._foreach_addcmul_(new, grads, grads, value=1 - decay)
    return list(new)


def _root_(squares: Sequence[Tensor], group: Group) -> Sequence[Tensor]:
    if group["eps_in_sqrt"]:
        torch._foreach_add_(squares, group["eps"])
        torch._foreach_sqrt_(squares)
    else:
        torch._foreach_sqrt_(squares)
        torch._foreach_add_(squares, group["eps"])
    return squares


def measure(batch: Batch) -> Tensor:
    """As `rules.measure`."""
    grads = _gradients(batch)
    old = _old(batch)

    def proposal() -> Tensors:
        directions = _directions(batch, _moments(batch, grads, old), batch.steps)
        torch._foreach_mul_(directions, -batch.lr)
        return directions

    def retraced() -> Tensors:
        prev_lr = torch.stack([state["prev_lr"] for state in batch.states])
        directions = _directions(batch, old, (batch.steps - 1).clamp(min=1))
        torch._foreach_mul_(directions, _scalars(-prev_lr, batch))
        fresh = (prev_lr == 0).unbind()
        return [d.masked_fill_(zero, 0.0) for d, zero in zip(directions, fresh, strict=True)]

    now = batch.signal.now(grads, proposal)
    changes = torch._foreach_sub(now, batch.signal.before(old, retraced))
    return torch.stack([norms(grads), norms(now), norms(changes)], dim=1)


def advance(batch: Batch, rates: Tensor, remembered: Tensor, finite: Tensor | None) -> None:
    """As `rules.advance`."""
    group, signal = batch.group, batch.signal
    grads = _gradients(batch)
    new = _moments(batch, grads, _old(batch))
    directions = _directions(batch, new, batch.steps)
    new |= signal.remember(
        grads, lambda: list(torch._foreach_mul(directions, _scalars(-remembered, batch)))
    )
    for name in batch.names:
        _commit([state[name] for state in batch.states], new[name], finite)
    torch._foreach_mul_(directions, _scalars(-rates, batch))
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        values = torch._foreach_mul(_wide(batch.params), 1 - batch.lr * group["weight_decay"])
        torch._foreach_add_(directions, values)
    else:
        torch._foreach_add_(directions, _wide(batch.params))
    _commit(batch.params, directions, finite)


def _wide(tensors: Tensors) -> Tensors:
    return [rules.wide(x) for x in tensors]


def _old(batch: Batch) -> Moments:
    return {name: _wide([state[name] for state in batch.states]) for name in batch.names}


def _gradients(batch: Batch) -> Tensors:
    group = batch.group
    grads = [g.to(wide_dtype(p.dtype)) for p, g in zip(batch.params, batch.grads, strict=True)]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        grads = list(torch._foreach_add(grads, _wide(batch.params), alpha=group["weight_decay"]))
    return grads


def _scalars(values: Tensor, batch: Batch) -> Tensors:
    """One 0-dim tensor for each tensor of the batch, in the dtype of its arithmetic."""
    return list(values.to(wide_dtype(batch.params[0].dtype)).unbind())


def _commit(targets: Tensors, values: Tensors, finite: Tensor | None) -> None:
    if finite is not None:
        values = [
            torch.where(go, value, rules.wide(target))
            for go, value, target in zip(finite.unbind(), values, targets, strict=True)
        ]
    torch._foreach_copy_(targets, values)
