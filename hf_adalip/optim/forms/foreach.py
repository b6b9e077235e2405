"""The step on lists of tensors: the same steps in fewer, larger launches.

Everything that does not depend on the layer is one `_foreach` call for a whole batch. What does
(A_t, and leaving a non-finite layer alone) has a scalar on the device for each tensor.
Low-precision tensors are converted to their opmath dtype and rounded once, as in the loop form.

A batch is processed in pieces, which bounds the temporaries, and on a CPU keeps them in its cache
during the many operations of a step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..rounding import all_rounded
from ..rules import Group, Numbers
from ..signals import combine_norms, elements, norms, opmath_dtype
from ..step import sketched, to_opmath

Tensors = list[Tensor]

_PIECE, _CACHED_PIECE = 2**22, 2**19
"""Elements that are processed together, on a GPU and on a CPU."""


class Piece(NamedTuple):
    """A part of a batch: some of its tensors, or a part of one."""

    batch: Batch
    tensors: slice  # of the batch's


def measure(batch: Batch) -> Tensor:
    """As `step.measure`."""
    pieces = _pieces(batch)
    rows = torch.cat([_measure(piece) for piece, _ in pieces])
    count = len(batch.params)
    if len(rows) == count:
        return rows
    owners = tuple(i for _, tensors in pieces for i in range(count)[tensors])
    return combine_norms(rows, owners, count)  # of the parts of a tensor, as of those of a layer


def _measure(batch: Batch) -> Tensor:
    rule, group = batch.rule, batch.group
    grads = _gradients(batch)
    old = {name: _opmath(_state(batch, name)) for name in (*batch.moment_keys, *batch.history_keys)}

    def proposed() -> Tensors:
        new = rule.foreach_moments_(
            grads, {name: _opmath_copies(xs) for name, xs in old.items()}, group
        )
        directions = rule.foreach_directions(new, _corrections(batch, batch.steps), group)
        torch._foreach_mul_(directions, -batch.lr)
        return directions

    def recomputed() -> Tensors:
        steps = (batch.steps - 1).clamp(min=1)
        prev_lr = torch.stack([state["prev_lr"] for state in batch.states])
        prev_lr = prev_lr / rule.inverse_bias_correction(steps, group)
        directions = _times_(
            rule.foreach_directions(old, _corrections(batch, steps), group), -prev_lr, group
        )
        for direction, fresh in zip(directions, elements(prev_lr == 0, group), strict=True):
            if isinstance(fresh, Tensor):
                direction.masked_fill_(fresh, 0.0)
            elif fresh:
                direction.zero_()
        return directions

    now = batch.signal.current(grads, proposed)
    if batch.sketch:
        sizes = norms(grads).unbind(), norms(now).unbind()
        shards = [param.shard for param in batch.local_params]
        rows = zip(now, *sizes, shards, strict=True)
        return torch.stack([sketched(*row, batch.sketch) for row in rows])
    changes = list(torch._foreach_sub(now, batch.signal.previous(old, recomputed)))
    size = norms(grads)
    own = norms(now) if batch.signal.of_updates else size
    return torch.stack([size, own, norms(changes)], dim=1)


def advance(batch: Batch, rates: Tensor, history_rates: Tensor, stepped: Tensor) -> None:
    """As `step.advance`."""
    all_stepped = all(x is True for x in elements(stepped, batch.group))
    for piece, here in _pieces(batch):
        _advance(piece, rates[here], history_rates[here], None if all_stepped else stepped[here])


def _advance(batch: Batch, rates: Tensor, history_rates: Tensor, stepped: Tensor | None) -> None:
    """stepped: None where all are known to be, and are then stepped in place."""
    rule, group = batch.rule, batch.group

    def own(tensors: Tensors) -> Tensors:
        return _opmath(tensors) if stepped is None else _opmath_copies(tensors)

    grads = _gradients(batch)
    state = {n: _state(batch, n) for n in (*batch.moment_keys, *batch.history_keys)}
    old = {name: own(state[name]) for name in batch.moment_keys}
    new = rule.foreach_moments_(grads, old, group)
    directions = rule.foreach_directions(new, _corrections(batch, batch.steps), group)
    for name in old:
        _store(state[name], new[name], stepped)
    if batch.history_keys:
        history = batch.signal.new_history(
            grads, lambda: _times_(_opmath_copies(directions), -history_rates, group)
        )
        for name, xs in history.items():
            _store(state[name], xs, stepped, otherwise=0.0)
    updates = _times_(directions, -rates, group)
    values = own(batch.params)
    if group["weight_decay"] and group["decoupled_weight_decay"]:
        torch._foreach_mul_(values, 1 - batch.lr * group["weight_decay"])
    torch._foreach_add_(values, updates)
    if batch.draws:
        values = all_rounded(values, batch.draws, batch.steps)
    _store(batch.params, values, stepped)


def _corrections(batch: Batch, steps: Tensor) -> list[Numbers]:
    """Each of the rule's bias corrections, of all tensors."""
    steps = steps.to(opmath_dtype(batch.params[0].dtype))
    return [elements(x, batch.group) for x in batch.rule.bias_corrections(steps, batch.group)]


def _times_(tensors: Tensors, by: Tensor, group: Group) -> Tensors:
    torch._foreach_mul_(tensors, elements(by.to(tensors[0].dtype), group))
    return tensors


def _state(batch: Batch, name: str) -> Tensors:
    return [state[name] for state in batch.states]


def _opmath(tensors: Tensors) -> Tensors:
    """The tensors themselves, or float32 copies where they are of low precision."""
    if all(opmath_dtype(dtype) == dtype for dtype in {x.dtype for x in tensors}):
        return tensors
    return [to_opmath(x) for x in tensors]


def _opmath_copies(tensors: Tensors) -> Tensors:
    """As `_opmath`, but for writing: none is one of the tensors themselves."""
    found = _opmath(tensors)
    return [x.clone() if x is y else x for x, y in zip(found, tensors, strict=True)]


def _gradients(batch: Batch) -> Tensors:
    group = batch.group
    grads = batch.grads
    if {opmath_dtype(batch.params[0].dtype)} != {g.dtype for g in grads}:
        grads = [to_opmath(g, like=p.dtype) for p, g in zip(batch.params, grads, strict=True)]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads))
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        grads = list(torch._foreach_add(grads, _opmath(batch.params), alpha=group["weight_decay"]))
    return grads


def _store(
    targets: Tensors, values: Tensors, stepped: Tensor | None, otherwise: float | None = None
) -> None:
    """Makes each target its value where `stepped`, else `otherwise`; None leaves it there."""
    if stepped is None:
        if values is not targets:
            torch._foreach_copy_(targets, values)
        return
    others = _opmath(targets)
    if otherwise is not None:
        others = [values[0].new_full((), otherwise)] * len(targets)
    choices = zip(stepped.unbind(), values, others, strict=True)
    if targets[0].dtype == values[0].dtype:
        for choice, target in zip(choices, targets, strict=True):
            torch.where(*choice, out=target)
    else:
        torch._foreach_copy_(targets, [torch.where(*choice) for choice in choices])


# Pieces


def _pieces(batch: Batch) -> list[Piece]:
    """The batch cut into pieces, in its order; made once a step."""
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
    state = [batch.states[i][n] for n in (*batch.moment_keys, *batch.history_keys)]
    has_indices = not batch.draws or batch.draws[i].start is not None
    return (
        has_indices
        and not batch.sketch
        and all(x.is_contiguous() for x in (batch.params[i], batch.grads[i], *state))
    )


def _some(batch: Batch, taken: list[int]) -> Piece:
    here = slice(taken[0], taken[-1] + 1)
    part = replace(
        batch,
        local_params=batch.local_params[here],
        params=batch.params[here],
        grads=batch.grads[here],
        states=batch.states[here],
        steps=batch.steps[here],
        draws=batch.draws[here],
    )
    return Piece(part, here)


def _part(batch: Batch, i: int, at: int, count: int) -> Piece:
    def part(x: Tensor) -> Tensor:
        return x.view(-1)[at : at + count]

    whole, state = _some(batch, [i]), batch.states[i]
    whole.batch.params, whole.batch.grads = [part(batch.params[i])], [part(batch.grads[i])]
    whole.batch.draws = [draws.part(at) for draws in whole.batch.draws]
    whole.batch.states = [
        state | {name: part(state[name]) for name in (*batch.moment_keys, *batch.history_keys)}
    ]
    return whole
