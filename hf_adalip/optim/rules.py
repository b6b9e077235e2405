"""The base updates of Table 1 as a readable loop: the truth that faster forms are tested against.

A rule is two pure functions. `moments` says how what is remembered follows g_t; `direction`
is what the base optimizer multiplies with its learning rate and subtracts. Arithmetic is done
in at least float32 and rounded once, when it is stored in the parameter's dtype.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .history import sketch
from .norms import norm, wide_dtype
from .shards import place_in_whole

if TYPE_CHECKING:
    from .census import Member
    from .signals import Signal

Group = Mapping[str, Any]
Moments = dict[str, Tensor]
Number = Tensor | float
Numbers = tuple[Number, ...]


class Rule(ABC):
    """One base optimizer of Table 1."""

    @abstractmethod
    def uses(self, group: Group) -> tuple[str, ...]:
        """The moments that `direction` reads. All but "grad" are kept in the state."""

    @abstractmethod
    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        """The moments of step t from g_t and the moments of step t-1."""

    def corrections(self, steps: Tensor, group: Group) -> tuple[Tensor, ...]:
        """What d_t needs of t, of one tensor or of each of many: of the shape of `steps`."""
        return ()

    @abstractmethod
    def corrected(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        """d_t, such that the base optimizer's update is -α_t·d_t."""

    def direction(self, moments: Moments, step: Tensor, group: Group) -> Tensor:
        """d_t from t itself."""
        step = step.to(next(iter(moments.values())).dtype)
        return self.corrected(moments, self.corrections(step, group), group)

    def gain(self, step: Tensor, group: Group) -> Tensor:
        """A factor of d_t that depends on t and on options that a schedule may change.

        `prev_lr` keeps it with the rate, so that retracing d_{t-1} does not use step t's options.
        """
        return torch.ones_like(step)

    def kept(self, group: Group) -> tuple[str, ...]:
        """State keys, each a tensor of the parameter's shape that starts at zero."""
        return tuple(key for key in self.uses(group) if key != "grad")

    def retraceable(self, group: Group) -> bool:
        """Whether d_{t-1} can be had again from the kept moments, without the gradient."""
        return "grad" not in self.uses(group)


class SGD(Rule):
    """SGD with torch's momentum (no dampening): a buffer b_t = μ·b_{t-1} + g_t."""

    def uses(self, group: Group) -> tuple[str, ...]:
        if not group["momentum"]:
            return ("grad",)
        return ("grad", "momentum_buffer") if group["nesterov"] else ("momentum_buffer",)

    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        if not group["momentum"]:
            return {"grad": grad}
        buffer = old["momentum_buffer"] * group["momentum"] + grad
        return {"grad": grad, "momentum_buffer": buffer}

    def corrected(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        if not group["momentum"]:
            return moments["grad"]
        buffer = moments["momentum_buffer"]
        momentum: float = group["momentum"]
        return moments["grad"] + momentum * buffer if group["nesterov"] else buffer


class RMSprop(Rule):
    """RMSProp without bias correction: v_t = α·v_{t-1} + (1-α)·g_t², g_t/(√v_t + ε)."""

    def uses(self, group: Group) -> tuple[str, ...]:
        return ("grad", "square_avg")

    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        alpha = group["alpha"]
        square = torch.addcmul(alpha * old["square_avg"], grad, grad, value=1 - alpha)
        return {"grad": grad, "square_avg": square}

    def corrected(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        return moments["grad"] / root(moments["square_avg"], group)


class Adam(Rule):
    """Adam with bias correction: m̂_t/(√v̂_t + ε)."""

    def uses(self, group: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def moments(self, grad: Tensor, old: Moments, group: Group) -> Moments:
        beta1, beta2 = group["betas"]
        return {
            "exp_avg": torch.add(beta1 * old["exp_avg"], grad, alpha=1 - beta1),
            "exp_avg_sq": torch.addcmul(beta2 * old["exp_avg_sq"], grad, grad, value=1 - beta2),
        }

    def corrections(self, steps: Tensor, group: Group) -> tuple[Tensor, ...]:
        return tuple(bias_correction(beta, steps) for beta in group["betas"])

    def corrected(self, moments: Moments, corrections: Numbers, group: Group) -> Tensor:
        correction1, correction2 = corrections
        mean = moments["exp_avg"] / correction1
        return mean / root(moments["exp_avg_sq"] / correction2, group)

    def gain(self, step: Tensor, group: Group) -> Tensor:
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


@dataclass
class Batch:
    """Tensors of one parameter group on one device, to be stepped together.

    The tensors are views of `members`: the local shard of a sharded parameter, the real and
    imaginary parts of a complex one.
    """

    rule: Rule
    signal: Signal
    group: Group
    members: list[Member]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    steps: Tensor  # [tensors], t of each
    lr: Tensor | float  # α_t
    sketch: int = 0  # the size of the sketches of x that are kept; 0 where x itself is
    stoppable: bool = True  # whether anything between measuring and stepping may stop the step
    prepared: Any = None  # what a form made of it for both `measure` and `advance`
    memo: dict[Any, Any] = field(default_factory=dict)
    """What a form may keep from step to step, as long as params and states are the same objects
    and the parameters lie in memory as they did."""

    @property
    def history(self) -> tuple[str, ...]:
        """State keys of the parameter's shape in which x_t is remembered."""
        return () if self.sketch else self.signal.history(self.rule, self.group)

    @property
    def names(self) -> tuple[str, ...]:
        """State keys of the parameter's shape: moments, then history."""
        return self.rule.kept(self.group) + self.history


def wide(x: Tensor) -> Tensor:
    """x itself, or its float32 copy when it is of low precision."""
    return widened(x, x.dtype)


def widened(x: Tensor, like: torch.dtype) -> Tensor:
    """x in the dtype that arithmetic on `like` is done in. (Tensor.to takes a microsecond to find
    that there is nothing to do, and there are hundreds of tensors.)"""
    dtype = wide_dtype(like)
    return x if x.dtype == dtype else x.to(dtype)


def readable(x: Tensor, group: Group) -> bool:
    """Whether the host may look at the numbers of x: no device is waited for, and neither a graph,
    nor autograd, nor a mode that traces the step would miss what depends on them."""
    if x.device.type != "cpu" or type(x) is not Tensor or group.get("capturable"):
        return False
    traced = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return not (group["differentiable"] or traced)


def numbers(x: Tensor, group: Group) -> list[Any]:
    """The elements of a vector: Python's numbers where they are `readable`, else 0-dim tensors,
    each of which costs an operator as much as a small tensor does."""
    return x.tolist() if readable(x, group) else list(x.unbind())


def _read(x: Tensor, group: Group) -> Tensor:
    """A parameter or state to compute with, apart from what the step will write into it."""
    return wide(x).clone() if group["differentiable"] else wide(x)


def gradient(param: Tensor, grad: Tensor, group: Group) -> Tensor:
    """g_t: the gradient to descend, with λp added when weight decay is coupled."""
    grad = widened(grad, param.dtype)
    if group["maximize"]:
        grad = -grad
    if group["weight_decay"] and not group["decoupled_weight_decay"]:
        grad = grad + group["weight_decay"] * _read(param, group)
    return grad


def measure(batch: Batch) -> Tensor:
    """‖g_t‖, ‖x_t‖ and ‖x_t - x_{t-1}‖ of each tensor, shape [tensors, 3]; changes nothing, but
    for the history of a batch that is not stoppable: a form may write it as it reads it.

    With a sketch, the sketch of x_t follows in further columns, shape [tensors, 3 + sketch], and
    the change, which can only be had of the whole parameter, is zero.
    """
    rule, signal, group = batch.rule, batch.signal, batch.group
    names, rows = batch.names, []
    corrections = _corrections(batch, batch.steps)
    last = _last(batch, batch.steps - 1)
    for i, (param, raw, state) in enumerate(
        zip(batch.params, batch.grads, batch.states, strict=True)
    ):
        grad = gradient(param, raw, group)
        old = {name: _read(state[name], group) for name in names}

        def proposal(i: int = i, grad: Tensor = grad, old: Moments = old) -> Tensor:
            return -batch.lr * rule.corrected(rule.moments(grad, old, group), corrections[i], group)

        now = signal.now(grad, proposal)
        if batch.sketch:
            whole = batch.members[i].param
            rows.append(sketched(now, norm(grad), norm(now), whole, batch.sketch))
            continue
        before = signal.before(old, partial(_retraced, batch, old, last[i]))
        size = norm(grad)
        own = norm(now) if signal.measures_updates else size
        rows += [size, own, norm(now - before)]
    return torch.stack(rows) if batch.sketch else torch.stack(rows).view(-1, 3)


def sketched(x: Tensor, grad_norm: Tensor, size: Tensor, param: Tensor, k: int) -> Tensor:
    """A row of `measure`, with the sketch of x."""
    place = place_in_whole(param)
    norms = torch.stack([grad_norm, size, torch.zeros_like(size)])
    return torch.cat([norms, sketch(x, k, shape=place.shape, offset=place.offset)])


def measure_absent(batch: Batch) -> Tensor:
    """`measure` for tensors without a gradient in a layer that has one: theirs is zero."""
    rows = []
    if batch.sketch:
        return batch.steps.new_zeros(len(batch.states), 3 + batch.sketch)
    last = _last(batch, batch.steps)
    for i, state in enumerate(batch.states):
        old = {name: _read(state[name], batch.group) for name in batch.names}
        before = norm(batch.signal.before(old, partial(_retraced, batch, old, last[i])))
        zero = torch.zeros_like(before)
        rows += [zero, zero, before]
    return torch.stack(rows).view(-1, 3)


def advance(batch: Batch, rates: Tensor, remembered: Tensor, go: Tensor) -> None:
    """Takes the step: moments, history and parameters.

    Args:
        batch: what to step.
        rates: A_t of each tensor, shape [tensors].
        remembered: what d_t is scaled by in the update to remember, shape [tensors].
        go: shape [tensors]; where False, a tensor and its state stay as they are, but for the
            history, which becomes zero: what it was is forgotten.
    """
    rule, signal, group = batch.rule, batch.signal, batch.group
    kept, history = rule.kept(group), batch.history
    corrections = _corrections(batch, batch.steps)
    rate_of, remembered_of, go_of = (numbers(x, group) for x in (rates, remembered, go))
    for i, (param, raw, state) in enumerate(
        zip(batch.params, batch.grads, batch.states, strict=True)
    ):
        grad = gradient(param, raw, group)
        old = {name: _read(state[name], group) for name in kept}
        new = rule.moments(grad, old, group)
        direction = rule.corrected(new, corrections[i], group)
        value = _read(param, group)
        if group["weight_decay"] and group["decoupled_weight_decay"]:
            value = value * (1 - batch.lr * group["weight_decay"])
        for name in kept:
            _commit(state[name], new[name], go_of[i])
        if history:
            update = partial(mul, direction, -remembered_of[i])
            for name, x in signal.remember(grad, update).items():
                _commit(state[name], x, go_of[i], otherwise=0.0)
        _commit(param, value - rate_of[i] * direction, go_of[i])


def forget(batch: Batch, go: Tensor) -> None:
    """`advance` for the tensors of `measure_absent`: their previous signal becomes zero."""
    for state, moves in zip(batch.states, numbers(go, batch.group), strict=True):
        for name in batch.history:
            _commit(state[name], torch.zeros_like(wide(state[name])), moves)


def _corrections(batch: Batch, steps: Tensor) -> list[Numbers]:
    """Of each tensor, those of its rule."""
    steps = steps.to(wide_dtype(batch.params[0].dtype))
    vectors = [numbers(x, batch.group) for x in batch.rule.corrections(steps, batch.group)]
    return list(zip(*vectors, strict=True)) if vectors else [()] * len(steps)


def _last(batch: Batch, steps: Tensor) -> list[Any]:
    """What u_{t-1} of each tensor is retraced with: the corrections and the rate of step t-1, of
    which `steps` has the number. None where it is not retraced."""
    rule, group = batch.rule, batch.group
    if not batch.signal.retraces(rule, group):
        return [None] * len(batch.states)
    steps = steps.clamp(min=1)
    rates = torch.stack([state["prev_lr"] for state in batch.states]) / rule.gain(steps, group)
    return list(zip(_corrections(batch, steps), rates.unbind(), strict=True))


def _retraced(batch: Batch, old: Moments, last: tuple[Numbers, Tensor]) -> Tensor:
    """u_{t-1} from the moments of step t-1; zero before the first step, where they give 0/0."""
    corrections, prev_lr = last
    direction = batch.rule.corrected(old, corrections, batch.group)
    return torch.where(prev_lr == 0, torch.zeros_like(direction), -prev_lr * direction)


def _commit(target: Tensor, value: Tensor, go: Tensor | bool, otherwise: Any = None) -> None:
    """Makes the target the value where `go`, else `otherwise`: None for what it is."""
    if isinstance(go, Tensor):
        other = wide(target) if otherwise is None else otherwise
        target.copy_(torch.where(go, value, other))
    elif go:
        target.copy_(value)
    elif otherwise is not None:
        target.fill_(otherwise)
