"""The rules of rules.py on lists of tensors: the same steps in fewer, larger launches.

Everything that does not depend on the layer is one `_foreach` call for a whole batch. What does
(A_t, and leaving a non-finite layer alone) has a scalar on the device for each tensor.
Low-precision tensors are widened first and rounded once, as in the loop form.

A batch is worked through in pieces, which bounds the temporaries, and on a CPU keeps them in its
cache: each of the many operations of a step would otherwise go through memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from . import rules
from .norms import layer_norms, norms, wide_dtype
from .rules import Batch, Group, bias_correction, numbers, readable, wide, widened

Tensors = list[Tensor]
Moments = dict[str, Tensors]

_PIECE, _CACHED_PIECE = 2**22, 2**19
"""Elements that are worked on together, and the same on a CPU."""


class Piece(NamedTuple):
    """A part of a batch: some of its tensors, or a part of one."""

    batch: Batch
    tensors: slice  # of the batch's


class Form(Protocol):
    """The foreach sibling of a rule: its two functions on lists. `moments_` writes the new moments
    into the old ones, `directions` makes new tensors."""

    def moments_(self, grads: Tensors, old: Moments, group: Group) -> Moments: ...

    def directions(self, moments: Moments, steps: Tensor, group: Group) -> Tensors: ...


class SGD:
    def moments_(self, grads: Tensors, old: Moments, group: Group) -> Moments:
        if not group["momentum"]:
            return {"grad": grads}
        buffers = old["momentum_buffer"]
        torch._foreach_mul_(buffers, group["momentum"])
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
    def moments_(self, grads: Tensors, old: Moments, group: Group) -> Moments:
        return {"grad": grads, "square_avg": _average_(old["square_avg"], grads, group["alpha"])}

    def directions(self, moments: Moments, steps: Tensor, group: Group) -> Tensors:
        roots = _root_([square.clone() for square in moments["square_avg"]], group)
        return list(torch._foreach_div(moments["grad"], roots))


class Adam:
    def moments_(self, grads: Tensors, old: Moments, group: Group) -> Moments:
        beta1, beta2 = group["betas"]
        mean = old["exp_avg"]
        torch._foreach_mul_(mean, beta1)
        torch._foreach_add_(mean, grads, alpha=1 - beta1)
        return {"exp_avg": mean, "exp_avg_sq": _average_(old["exp_avg_sq"], grads, beta2)}

    def directions(self, moments: Moments, steps: Tensor, group: Group) -> Tensors:
        beta1, beta2 = group["betas"]
        steps = steps.to(moments["exp_avg"][0].dtype)
        directions = _divide(moments["exp_avg"], bias_correction(beta1, steps), group)
        squares = _divide(moments["exp_avg_sq"], bias_correction(beta2, steps), group)
        torch._foreach_div_(directions, _root_(squares, group))
        return directions


FORMS: dict[type[rules.Rule], Form] = {
    rules.SGD: SGD(),
    rules.RMSprop: RMSprop(),
    rules.Adam: Adam(),
}


def _average_(average: Tensors, grads: Tensors, decay: float) -> Tensors:
    """The running average of the squares."""
    torch._foreach_mul_(average, decay)
    torch._foreach_addcmul_(average, grads, grads, value=1 - decay)
    return average


def _root_(squares: Tensors, group: Group) -> Tensors:
    eps: float = group["eps"]
    if group["eps_in_sqrt"]:
        torch._foreach_add_(squares, eps)
        torch._foreach_sqrt_(squares)
    else:
        torch._foreach_sqrt_(squares)
        torch._foreach_add_(squares, eps)
    return squares


def _divide(tensors: Tensors, by: Tensor, group: Group) -> Tensors:
    return list(torch._foreach_div(tensors, numbers(by.to(tensors[0].dtype), group)))


def _times_(tensors: Tensors, by: Tensor, group: Group) -> Tensors:
    torch._foreach_mul_(tensors, numbers(by.to(tensors[0].dtype), group))
    return tensors


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
    old = {name: _wide(_kept(batch, name)) for name in batch.names}

    def proposal() -> Tensors:
        new = form.moments_(grads, {name: _apart(xs) for name, xs in old.items()}, group)
        directions = form.directions(new, batch.steps, group)
        torch._foreach_mul_(directions, -batch.lr)
        return directions

    def retraced() -> Tensors:
        steps = (batch.steps - 1).clamp(min=1)
        prev_lr = torch.stack([state["prev_lr"] for state in batch.states])
        prev_lr = prev_lr / batch.rule.gain(steps, group)
        directions = _times_(form.directions(old, steps, group), -prev_lr, group)
        for direction, fresh in zip(directions, numbers(prev_lr == 0, group), strict=True):
            if isinstance(fresh, Tensor):
                direction.masked_fill_(fresh, 0.0)
            elif fresh:
                direction.zero_()
        return directions

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
    everyone = readable(go, batch.group) and bool(go.all())
    for piece, here in _pieces(batch):
        _advance(piece, rates[here], remembered[here], None if everyone else go[here])


def _advance(batch: Batch, rates: Tensor, remembered: Tensor, go: Tensor | None) -> None:
    """go: None where it is known that all go, who are then stepped in place."""
    form, group = FORMS[type(batch.rule)], batch.group

    def own(tensors: Tensors) -> Tensors:
        return _wide(tensors) if go is None else _apart(tensors)

    grads = _gradients(batch)
    kept = {name: _kept(batch, name) for name in batch.names}
    old = {name: own(kept[name]) for name in batch.rule.kept(group)}
    new = form.moments_(grads, old, group)
    directions = form.directions(new, batch.steps, group)
    for name in old:
        _commit(kept[name], new[name], go)
    if batch.history:
        history = batch.signal.remember(
            grads, lambda: _times_(_apart(directions), -remembered, group)
        )
        for name, xs in history.items():
            _commit(kept[name], xs, go, otherwise=0.0)
    updates = _times_(directions, -rates, group)
    values = own(batch.params)
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        torch._foreach_mul_(values, 1 - batch.lr * group["weight_decay"])
    torch._foreach_add_(values, updates)
    _commit(batch.params, values, go)


def _kept(batch: Batch, name: str) -> Tensors:
    return [state[name] for state in batch.states]


def _wide(tensors: Tensors) -> Tensors:
    """The tensors themselves, or float32 copies where they are of low precision."""
    if all(wide_dtype(dtype) == dtype for dtype in {x.dtype for x in tensors}):
        return tensors
    return [wide(x) for x in tensors]


def _apart(tensors: Tensors) -> Tensors:
    """As `_wide`, but for writing: none is one of the tensors themselves."""
    found = _wide(tensors)
    return [x.clone() if x is y else x for x, y in zip(found, tensors, strict=True)]


def _gradients(batch: Batch) -> Tensors:
    group = batch.group
    grads = batch.grads
    if {wide_dtype(batch.params[0].dtype)} != {g.dtype for g in grads}:
        grads = [widened(g, p.dtype) for p, g in zip(batch.params, grads, strict=True)]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        grads = list(torch._foreach_add(grads, _wide(batch.params), alpha=group["weight_decay"]))
    return grads


def _commit(
    targets: Tensors, values: Tensors, go: Tensor | None, otherwise: float | None = None
) -> None:
    """Makes each target its value where `go`, else `otherwise`: None for what it is."""
    if go is None:
        if values is not targets:
            torch._foreach_copy_(targets, values)
        return
    others = _wide(targets) if otherwise is None else [values[0].new_full((), otherwise)] * len(go)
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
