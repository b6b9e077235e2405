"""The rules of rules.py on lists of tensors: the same steps in fewer, larger launches.

Everything that does not depend on the layer is one `_foreach` call for a whole batch. What does
(A_t, and leaving a non-finite layer alone) has a scalar on the device for each tensor.
Low-precision tensors are widened first and rounded once, as in the loop form.

A batch is worked through in pieces, which bounds the temporaries, and on a CPU keeps them in its
cache: each of the many operations of a step would otherwise go through memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import rules
from .norms import layer_norms, norms
from .rules import Batch, Group, bias_correction, wide, widened

Tensors = list[Tensor]
Moments = dict[str, Tensors]

_PIECE, _CACHED_PIECE = 2**22, 2**19
"""Elements that are worked on together, and the same on a CPU."""


class Piece(NamedTuple):
    """A part of a batch: some of its tensors, or a part of one."""

    batch: Batch
    tensors: slice  # of the batch's


class Form(Protocol):
    """The foreach sibling of a rule: its two functions on lists, results in new tensors."""

    def moments(self, grads: Tensors, old: Moments, group: Group) -> Moments: ...

    def directions(self, moments: Moments, steps: Tensor, group: Group) -> Tensors: ...


class SGD:
    def moments(self, grads: Tensors, old: Moments, group: Group) -> Moments:
        if not group["momentum"]:
            return {"grad": grads}
        buffers = list(torch._foreach_mul(old["momentum_buffer"], group["momentum"]))
        torch._foreach_add_(buffers, grads)
        return {"grad": grads, "momentum_buffer": buffers}

    def directions(self, moments: Moments, steps: Tensor, group: Group) -> Tensors:
        if not group["momentum"]:
            return [grad.clone() for grad in moments["grad"]]
        if not group["nesterov"]:
            return [buffer.clone() for buffer in moments["momentum_buffer"]]
        ahead = list(torch._foreach_mul(moments["momentum_buffer"], group["momentum"]))
        torch._foreach_add_(ahead, moments["grad"])
        return ahead


class RMSprop:
    def moments(self, grads: Tensors, old: Moments, group: Group) -> Moments:
        return {"grad": grads, "square_avg": _average(old["square_avg"], grads, group["alpha"])}

    def directions(self, moments: Moments, steps: Tensor, group: Group) -> Tensors:
        roots = _root_([square.clone() for square in moments["square_avg"]], group)
        return list(torch._foreach_div(moments["grad"], roots))


class Adam:
    def moments(self, grads: Tensors, old: Moments, group: Group) -> Moments:
        beta1, beta2 = group["betas"]
        mean = list(torch._foreach_mul(old["exp_avg"], beta1))
        torch._foreach_add_(mean, grads, alpha=1 - beta1)
        return {"exp_avg": mean, "exp_avg_sq": _average(old["exp_avg_sq"], grads, beta2)}

    def directions(self, moments: Moments, steps: Tensor, group: Group) -> Tensors:
        beta1, beta2 = group["betas"]
        steps = steps.to(moments["exp_avg"][0].dtype)
        directions = _divide(moments["exp_avg"], bias_correction(beta1, steps))
        squares = _divide(moments["exp_avg_sq"], bias_correction(beta2, steps))
        torch._foreach_div_(directions, _root_(squares, group))
        return directions


FORMS: dict[type[rules.Rule], Form] = {
    rules.SGD: SGD(),
    rules.RMSprop: RMSprop(),
    rules.Adam: Adam(),
}


def _average(old: Tensors, grads: Tensors, decay: float) -> Tensors:
    """The running average of the squares."""
    new = list(torch._foreach_mul(old, decay))
    torch._foreach_addcmul_(new, grads, grads, value=1 - decay)
    return new


def _root_(squares: Tensors, group: Group) -> Tensors:
    eps: float = group["eps"]
    if group["eps_in_sqrt"]:
        torch._foreach_add_(squares, eps)
        torch._foreach_sqrt_(squares)
    else:
        torch._foreach_sqrt_(squares)
        torch._foreach_add_(squares, eps)
    return squares


def _divide(tensors: Tensors, by: Tensor) -> Tensors:
    return list(torch._foreach_div(tensors, _scalars(by, tensors)))


def _times_(tensors: Tensors, by: Tensor) -> Tensors:
    torch._foreach_mul_(tensors, _scalars(by, tensors))
    return tensors


def _scalars(values: Tensor, like: Tensors) -> Tensors:
    """One 0-dim tensor for each tensor of the batch, in the dtype of its arithmetic."""
    return list(values.to(like[0].dtype).unbind())


def measure(batch: Batch) -> Tensor:
    """As `rules.measure`."""
    pieces = _pieces(batch)
    rows = torch.cat([_measure(piece) for piece, _ in pieces])
    count = len(batch.params)
    if len(rows) == count:
        return rows
    owners = tuple(i for _, tensors in pieces for i in range(count)[tensors])
    return layer_norms(rows, owners, count)  # of the parts of a tensor, as of those of a layer


def _measure(batch: Batch) -> Tensor:
    form, group = FORMS[type(batch.rule)], batch.group
    grads = _gradients(batch)
    old = _old(batch)

    def proposal() -> Tensors:
        directions = form.directions(form.moments(grads, old, group), batch.steps, group)
        torch._foreach_mul_(directions, -batch.lr)
        return directions

    def retraced() -> Tensors:
        steps = (batch.steps - 1).clamp(min=1)
        prev_lr = torch.stack([state["prev_lr"] for state in batch.states])
        prev_lr = prev_lr / batch.rule.gain(steps, group)
        directions = _times_(form.directions(old, steps, group), -prev_lr)
        fresh = (prev_lr == 0).unbind()
        return [d.masked_fill_(zero, 0.0) for d, zero in zip(directions, fresh, strict=True)]

    now = batch.signal.now(grads, proposal)
    if batch.sketch:
        sizes = norms(grads).unbind(), norms(now).unbind()
        params = [member.param for member in batch.members]
        rows = zip(now, *sizes, params, strict=True)
        return torch.stack([rules.sketched(*row, batch.sketch) for row in rows])
    changes = list(torch._foreach_sub(now, batch.signal.before(old, retraced)))
    size = norms(grads)
    own = norms(now) if batch.signal.measures_updates else size
    return torch.stack([size, own, norms(changes)], dim=1)


def advance(batch: Batch, rates: Tensor, remembered: Tensor, go: Tensor) -> None:
    """As `rules.advance`."""
    for piece, here in _pieces(batch):
        _advance(piece, rates[here], remembered[here], go[here])


def _advance(batch: Batch, rates: Tensor, remembered: Tensor, go: Tensor) -> None:
    form, group = FORMS[type(batch.rule)], batch.group
    grads = _gradients(batch)
    new = form.moments(grads, _old(batch), group)
    directions = form.directions(new, batch.steps, group)
    for name in batch.rule.kept(group):
        kept = [state[name] for state in batch.states]
        _commit(kept, new[name], map(wide, kept), go)
    if batch.history:
        history = batch.signal.remember(
            grads, lambda: _times_([d.clone() for d in directions], -remembered)
        )
        for name, xs in history.items():
            zeros = [xs[0].new_zeros(())] * len(xs)
            _commit([state[name] for state in batch.states], xs, zeros, go)
    updates = _times_(directions, -rates)
    values = [wide(p) for p in batch.params]
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        values = list(torch._foreach_mul(values, 1 - batch.lr * group["weight_decay"]))
    torch._foreach_add_(updates, values)
    _commit(batch.params, updates, map(wide, batch.params), go)


def _old(batch: Batch) -> Moments:
    return {name: [wide(state[name]) for state in batch.states] for name in batch.names}


def _gradients(batch: Batch) -> Tensors:
    group = batch.group
    grads = [widened(g, p.dtype) for p, g in zip(batch.params, batch.grads, strict=True)]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        params = [wide(p) for p in batch.params]
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    return grads


def _commit(targets: Tensors, values: Tensors, others: Iterable[Tensor], go: Tensor) -> None:
    """Makes each target its value where `go`, else its other."""
    choices = zip(go.unbind(), values, others, strict=True)
    if targets[0].dtype == values[0].dtype:
        for choice, target in zip(choices, targets, strict=True):
            torch.where(*choice, out=target)
    else:
        torch._foreach_copy_(targets, [torch.where(*choice) for choice in choices])


# Pieces


def _pieces(batch: Batch) -> list[Piece]:
    """What is worked on together, in the order of the batch; made once a step."""
    if batch.prepared is None:
        batch.prepared = _cut(batch)
    pieces: list[Piece] = batch.prepared
    return pieces


def _cut(batch: Batch) -> list[Piece]:
    limit = _CACHED_PIECE if batch.params[0].device.type == "cpu" else _PIECE
    pieces: list[Piece] = []
    taken: list[int] = []
    size = 0
    for i, param in enumerate(batch.params):
        count = param.numel()
        if taken and size + count > limit:
            pieces.append(_some(batch, taken))
            taken, size = [], 0
        if count > limit and _can_be_cut(batch, i):
            pieces += [_part(batch, i, at, limit) for at in range(0, count, limit)]
            continue
        taken.append(i)
        size += count
    return [*pieces, _some(batch, taken)] if taken else pieces


def _can_be_cut(batch: Batch, i: int) -> bool:
    """Whether one index says which elements of a tensor and its state belong together."""
    kept = [batch.states[i][name] for name in batch.names]
    return not batch.sketch and all(
        x.is_contiguous() for x in (batch.params[i], batch.grads[i], *kept)
    )


def _some(batch: Batch, taken: list[int]) -> Piece:
    here = slice(taken[0], taken[-1] + 1)
    part = replace(
        batch,
        members=batch.members[here],
        params=batch.params[here],
        grads=batch.grads[here],
        states=batch.states[here],
        steps=batch.steps[here],
    )
    return Piece(part, here)


def _part(batch: Batch, i: int, at: int, count: int) -> Piece:
    def part(x: Tensor) -> Tensor:
        return x.view(-1)[at : at + count]

    whole, state = _some(batch, [i]), batch.states[i]
    whole.batch.params, whole.batch.grads = [part(batch.params[i])], [part(batch.grads[i])]
    whole.batch.states = [state | {name: part(state[name]) for name in batch.names}]
    return whole
