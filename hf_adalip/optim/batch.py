"""The data structures of a step: parameters as this rank has them, layers, buckets and batches.

    LocalParam   one parameter, whole or the part of it that this rank has
    Layer        the parameters that share one S
    Bucket       the parameters that are stepped together, by one call of a form
    Batch        the tensors of a bucket at one step

A parameter is absent if it has no gradient now, but others of its layer have one, here or on other
ranks. In the layer's norms its gradient then counts as zero. It is not stepped: only its history
becomes zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .estimator import Estimator
from .history import SKETCH
from .rounding import Draws, draws_of
from .rules import Group, Rule
from .sharding import ReduceGroups, Shard
from .signals import Signal
from .state import SCALARS, State

if TYPE_CHECKING:
    from .step import Form


class LayerOptions(NamedTuple):
    """How S of a layer is estimated."""

    estimator: Estimator
    previous: str | None  # of the -U forms, which update the next one is compared with


@dataclass(eq=False)
class LocalParam:
    """A parameter as this rank has it: whole, a shard, or a part of an engine's flat tensor."""

    layer: str
    tensor: Tensor  # of the parameter group, which has the state
    group: dict[str, Any]
    tensor_state: State  # of `tensor`; not yet in the optimizer's state when it is new
    param: Tensor  # `tensor`, or a view of the part of it that is this parameter's
    decays: bool  # whether the group's weight decay applies to it
    shard: Shard
    reduce_groups: ReduceGroups
    sketch: int = 0  # how many numbers are kept of x_{t-1}; 0 where it is kept as a tensor
    seed: int | None = None  # for stochastic rounding; None where it is to the nearest
    part: int | None = None  # which of a flat tensor's it is
    parts: tuple[int, ...] = ()  # shape of a number in `tensor_state`: how many a flat tensor has
    span: slice | None = None  # where in a flat tensor it is
    shard_index: int | None = None  # among all that are sharded, on every rank the same
    sketch_index: int | None = None  # among those whose sketches are sharded
    has_grad: bool = True  # False where only other ranks know whether there is a gradient
    views: State | None = None

    @property
    def grad(self) -> Tensor | None:
        """Read from the tensor each time, so that no gradient is kept alive between two steps."""
        grad = self.tensor.grad
        if grad is None:
            # FSDP1 gives a rank no gradient of a parameter of which it has nothing.
            return None if self.has_grad or self.tensor.numel() else self.tensor.detach()
        return grad if self.span is None else grad[self.span]

    @property
    def state(self) -> State:
        """This parameter's own, as views where `tensor` has many; once its state is complete."""
        if self.part is None:
            return self.tensor_state
        if self.views is None:
            tensors = {n: x for n, x in self.tensor_state.items() if isinstance(x, Tensor)}
            self.views = {
                n: x[self.part if n in SCALARS else self.span] for n, x in tensors.items()
            }
        return self.views

    @property
    def is_plain(self) -> bool:
        """Whether its tensors can be worked on as they are."""
        plain = type(self.shard) is Shard and self.part is None
        return plain and self.has_grad and not self.param.is_complex()

    @property
    def sketch_key(self) -> str:
        return next(key for key in self.state if key.endswith(SKETCH))


@dataclass(eq=False)
class Layer:
    """The parameters that share one S."""

    name: str
    params: list[LocalParam] = field(default_factory=list)  # with a gradient
    absent: list[LocalParam] = field(default_factory=list)  # with a history, but no gradient now
    options: LayerOptions = field(init=False)

    @property
    def all(self) -> list[LocalParam]:
        return self.params + self.absent


@dataclass(eq=False)
class Bucket:
    """Parameters of one group, device and dtype, which are stepped together."""

    form: Form | None  # None for those without a gradient in a layer that has one
    params: list[LocalParam]
    where: slice  # of the plan's parameters
    sketch: int = 0  # how many numbers they keep of x_{t-1}; 0 for tensors
    sketch_rows: slice | None = None  # of the plan's parameters that have a sketch
    sketches: Tensor | None = None  # theirs of x_{t-1}, once packed
    moment_keys: tuple[str, ...] = ()  # state keys of the parameter's shape
    history_keys: tuple[str, ...] = ()  # the same, of x_{t-1}
    recomputes: bool = False  # whether x_{t-1} is computed again from the moments
    memo: dict[Any, Any] = field(default_factory=dict)  # of `form`, see Batch

    def __post_init__(self) -> None:
        self.is_plain = all(p.is_plain for p in self.params)
        self.draws = draws_of(self.params)

    def previous_sketches(self) -> Tensor:
        """Of x_{t-1}, shape [params, sketch]."""
        if self.sketches is not None:
            return self.sketches
        return torch.stack([p.state[p.sketch_key] for p in self.params])

    def keep_sketches(self, sketches: Tensor, stepped: Tensor) -> None:
        """Stores those of x_t, and zero where the parameters take no step."""
        history = self.previous_sketches()
        history.copy_(torch.where(stepped[:, None], sketches, 0.0))
        if self.sketches is None:
            store([p.state[p.sketch_key] for p in self.params], history)

    def pack(self) -> list[Tensor]:
        """Makes the sketches the rows of one matrix, which it returns."""
        if not self.sketch:
            return []
        self.sketches = self.previous_sketches()
        rows = list(self.sketches)
        for param, row in zip(self.params, rows, strict=True):
            param.tensor_state[param.sketch_key] = row
        return rows


@dataclass
class Batch:
    """The tensors of a bucket at one step.

    They are views of the parameters' own: the local part of a sharded parameter, the real and
    imaginary parts of a complex one.
    """

    rule: Rule
    signal: Signal
    group: Group
    local_params: list[LocalParam]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    steps: Tensor  # [tensors], t of each; of absent parameters, that of their last step
    lr: Tensor | float  # α_t
    moment_keys: tuple[str, ...]  # state keys of the parameter's shape
    history_keys: tuple[str, ...]  # the same, of x_{t-1}
    sketch: int = 0  # the size of the sketches of x that are kept; 0 where x itself is
    draws: list[Draws] = field(default_factory=list)  # of parameters rounded stochastically
    stoppable: bool = True  # whether the step may still be refused after `measure`
    prepared: Any = None  # what a form computes once for both `measure` and `advance`
    memo: dict[Any, Any] = field(default_factory=dict)
    """What a form may keep from step to step, as long as params and states are the same objects
    and the parameters lie in memory as they did."""


def store(targets: Sequence[Tensor], values: Tensor) -> None:
    """Copies the elements of a vector, or the rows of a matrix, into as many tensors."""
    if torch.is_grad_enabled():  # differentiable=True
        for target, value in zip(targets, values.unbind(), strict=True):
            target.copy_(value)
    else:
        torch._foreach_copy_(list(targets), list(values.unbind()))
