"""Which parameters and layers a step has: collected once, and used until something changes."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .estimator import NO_PREDECESSOR, Estimator
from .groups import decays_of, group_index
from .history import SKETCH, history_of
from .rules import Group, Rule
from .sharding import (
    ReduceGroups,
    Shard,
    is_model_parallel,
    refuse_if_fsdp1_took_all,
    shard_of,
    sum_over_shards,
)
from .signals import Signal, index_tensor, layer_norms, least_unsquarable
from .state import LAYER_SCALARS, SCALARS, State, StateKeys, complete, forget_predecessor

if TYPE_CHECKING:
    from .step import Form, LayerwiseOptimizer

_FLOAT32_LIMIT = least_unsquarable(torch.float32)

LayerOptions = tuple[Estimator, str | None]  # with -U's `previous`


@dataclass(eq=False)
class LocalParam:
    """A parameter as this rank has it: whole, a shard, or a part of an engine's flat tensor."""

    layer: str
    tensor: Tensor  # of the parameter group, which has the state
    group: dict[str, Any]
    stored: State  # of `tensor`; not yet in the optimizer's state when it is new
    param: Tensor  # `tensor`, or a view of the part of it that is this parameter's
    decays: bool  # whether the group's weight decay applies to it
    shard: Shard
    reduce_groups: ReduceGroups
    sketch: int = 0  # how many numbers are kept of x_{t-1}; 0 where it is kept as a tensor
    part: int | None = None  # which of a flat tensor's it is
    parts: tuple[int, ...] = ()  # shape of a number in `stored`: how many a flat tensor has
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
        """This parameter's own, as views where `tensor` has many; once `stored` is complete."""
        if self.part is None:
            return self.stored
        if self.views is None:
            tensors = {n: x for n, x in self.stored.items() if isinstance(x, Tensor)}
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

    def previous_sketches(self) -> Tensor:
        """Of x_{t-1}, shape [params, sketch]."""
        if self.sketches is not None:
            return self.sketches
        return torch.stack([p.state[p.sketch_key] for p in self.params])

    def keep_sketches(self, sketches: Tensor, active: Tensor) -> None:
        """Stores those of x_t, and zero where the parameters take no step."""
        history = self.previous_sketches()
        history.copy_(torch.where(active[:, None], sketches, 0.0))
        if self.sketches is None:
            store([p.state[p.sketch_key] for p in self.params], history)

    def pack(self) -> list[Tensor]:
        """Makes the sketches the rows of one matrix, which it returns."""
        if not self.sketch:
            return []
        self.sketches = self.previous_sketches()
        rows = list(self.sketches)
        for param, row in zip(self.params, rows, strict=True):
            param.stored[param.sketch_key] = row
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
    stoppable: bool = True  # whether the step may still be refused after `measure`
    prepared: Any = None  # what a form computes once for both `measure` and `advance`
    memo: dict[Any, Any] = field(default_factory=dict)
    """What a form may keep from step to step, as long as params and states are the same objects
    and the parameters lie in memory as they did."""


class StepPlan:
    """The parameters and layers of a step, here and on other ranks, and the numbers of their state.

    Attributes:
        layers: sorted so that those with the same options are adjacent.
        params: of all layers, in the order of the buckets.
        owner: the index of each parameter's layer.
        buckets: the parameters that are stepped together.
        sharded: the process groups of everything that is sharded, also of what has no gradient
            here.
        sharded_sketches: the same of those whose history is a sketch.
        sketch_size: the largest size of a sketch; 0 where there is none.
        hidden: whether it takes a collective to know which layers have a gradient.
        kinds: the slices of layers that have the same options.
        groups: the parameter groups of all parameters.
        raises: whether a non-finite gradient can stop the step.
    """

    def __init__(
        self,
        layers: list[Layer],
        device: torch.device,
        sketch_size: int,
        sharded: Sequence[ReduceGroups] = (),
        sharded_sketches: Sequence[ReduceGroups] = (),
        hidden: bool = False,
    ) -> None:
        kinds = dict.fromkeys(layer.options for layer in layers)
        self.layers = [layer for kind in kinds for layer in layers if layer.options == kind]
        self.device = device
        self.sharded = sharded
        self.sharded_sketches = sharded_sketches
        self.sketch_size = sketch_size
        self.hidden = hidden
        self.kinds: list[tuple[LayerOptions, slice]] = []
        start = 0
        for kind in kinds:
            end = start + sum(layer.options == kind for layer in layers)
            self.kinds.append((kind, slice(start, end)))
            start = end
        self.raises = any(estimator.nonfinite == "raise" for estimator, _ in kinds)
        groups = {group_index(p.group): p.group for layer in self.layers for p in layer.all}
        self.groups = list(groups.values())
        self.buckets: list[Bucket] = []
        self._limits: Tensor | None = None  # of the norms of layers
        self.is_in_state = False  # whether the optimizer has the parameters' state
        self._vectors: dict[str, Tensor] = {}
        self._is_packed = False
        self._packed: list[Tensor] = []  # the parameters' views of those and of packed sketches
        self._addresses: list[int] = []  # where these were
        self._values: list[Callable[[], Any]] = []  # weak references to the parameters' state
        self._same: list[object] = []  # what it was made from, and is to be the same objects
        self._equal: list[object] = []

    def arrange(
        self,
        buckets: Sequence[tuple[Form | None, list[tuple[int, LocalParam]]]],
        keys_of: Callable[[dict[str, Any]], StateKeys],
    ) -> None:
        """Sets the buckets, given with the index of each parameter's layer."""
        entries = [entry for _, inside in buckets for entry in inside]
        self.params = [param for _, param in entries]
        self.owner = tuple(i for i, _ in entries)
        self.buckets, start, row = [], 0, 0
        for form, inside in buckets:
            params = [param for _, param in inside]
            size, end = params[0].sketch, start + len(params)
            rows = slice(row, row := row + (len(params) if size else 0))
            bucket = Bucket(form, params, slice(start, end), size, rows)
            keys = keys_of(params[0].group)
            bucket.moment_keys, bucket.history_keys = keys.moments, () if size else keys.histories
            bucket.recomputes = "prev_lr" in keys.scalars
            self.buckets.append(bucket)
            start = end
        positions = {group_index(group): i for i, group in enumerate(self.groups)}
        self.group_of = tuple(positions[group_index(param.group)] for param in self.params)
        self.sketched = tuple(i for i, param in enumerate(self.params) if param.sketch)
        self._spread = None if _is_range(self.owner, len(self.layers)) else self.owner
        firsts = {layer: i for i, layer in reversed(list(enumerate(self.owner)))}
        self._first = tuple(firsts[i] for i in range(len(self.layers)))
        self._leaders = None if _is_range(self._first, len(self.params)) else self._first

    # Whether it still holds

    def note(self, optimizer: LayerwiseOptimizer) -> None:
        """Notes what the plan was made from."""
        self._same, self._equal = _facts(optimizer)
        self.note_state()

    def note_state(self) -> None:
        """Without keeping the state alive."""
        values = chain.from_iterable([param.stored.values() for param in self.params])
        self._values = [weakref.ref(x) if isinstance(x, Tensor) else _constant(x) for x in values]

    def is_current(self, optimizer: LayerwiseOptimizer | None) -> bool:
        """Whether nothing has changed of what the plan was made from, in particular whether the
        parameters' state consists of the same tensors.

        Args:
            optimizer: the plan's; None to ask for the state alone.
        """
        # Asked at every step, when little of the parameters is in a cache: hence the loops of C.
        if optimizer is not None:
            same, equal = _facts(optimizer)
            if len(same) != len(self._same) or not all(map(is_, same, self._same)):
                return False
            if equal != self._equal:
                return False
        now = list(chain.from_iterable([param.stored.values() for param in self.params]))
        noted = [reference() for reference in self._values]
        if len(now) != len(noted) or not all(map(is_, now, noted)):
            return False
        # `x.data = ...`, with which state is moved to another device and back, keeps the tensor.
        return list(map(Tensor.data_ptr, self._packed)) == self._addresses

    # Numbers of parameters and layers

    def pack(self) -> None:
        """Makes each number of the parameters a view of one vector, so that all are read or
        written by one operation. For a plan that is used again; the order may no longer change.

        State that a CUDA graph may have captured stays where it is; FakeTensors are nowhere.
        """
        if self._is_packed:
            return
        self._is_packed = True
        # A base optimizer without the option `capturable` may be captured all the same.
        capturable = any(p.group.get("capturable", p.tensor.is_cuda) for p in self.params)
        fake = any(type(p.stored["lipschitz_scale"]) is not Tensor for p in self.params)
        if capturable or fake or len({p.tensor.device for p in self.params}) > 1:
            return
        for key in SCALARS:
            if self.params and all(key in p.stored for p in self.params):
                vector = torch.stack([p.stored[key] for p in self.params])
                self._vectors[key] = vector
                for param, number in zip(self.params, vector.unbind(), strict=True):
                    param.stored[key] = number
                self._packed += [param.stored[key] for param in self.params]
        for bucket in self.buckets:
            self._packed += bucket.pack()
        self._addresses = list(map(Tensor.data_ptr, self._packed))
        self.note_state()

    def read(self, key: str, where: slice, device: torch.device, of_layers: bool = False) -> Tensor:
        """A number of some of the parameters, or of the layers: all parameters of a layer have the
        same."""
        if key not in self._vectors:
            params = [self.params[i] for i in self._first[where]] if of_layers else None
            return _gathered(params or self.params[where], key, device)
        vector = self._vectors[key]
        if of_layers and self._leaders is not None:
            vector = vector[index_tensor(self._leaders, vector.device)]
        return vector[where]

    def write(self, key: str, values: Tensor, where: slice) -> None:
        """Stores a number of some of the parameters."""
        if key in self._vectors:
            self._vectors[key][where].copy_(values)
        else:
            store([param.state[key] for param in self.params[where]], values)

    def write_layers(self, key: str, values: Tensor, where: slice) -> None:
        """Stores a number of some of the layers in all of their parameters."""
        owned = zip(self.owner, self.params, strict=True)
        mine = [(i - where.start, p) for i, p in owned if where.start <= i < where.stop]
        index = index_tensor(tuple(i for i, _ in mine), values.device)
        store([p.state[key] for _, p in mine], values[index])

    def spread(self, values: Tensor) -> Tensor:
        """Values of layers as values of parameters."""
        if self._spread is None:
            return values
        return values[index_tensor(self._spread, values.device)]

    def put_in_state(self, optimizer: LayerwiseOptimizer) -> None:
        """Gives the optimizer the state of new parameters, once the step can no longer fail."""
        self.is_in_state = True
        for param in chain.from_iterable(layer.all for layer in self.layers):
            if "lipschitz_scale" not in optimizer.state[param.tensor]:
                optimizer.state[param.tensor].update(param.stored)
                if param.part is None:
                    param.stored = optimizer.state[param.tensor]

    # Norms of layers

    def layer_norms(
        self, norms: Tensor, sketch_changes: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Norms of whole layers from those of this rank's parts of their parameters.

        Args:
            norms: of the parameters, shape [params, columns], the gradient's first.
            sketch_changes: ‖x_t - x_{t-1}‖ of the parameters that have a sketch, which is of the
                whole.

        Returns:
            shape [layers, columns], infinite where the square overflows the dtype that the layer
            is computed in; and which layers are active, shape [layers], or None for all: some
            rank has a gradient, and this is not the step with zero gradients and
            lr = 0 with which torch.distributed.checkpoint makes the state before training.
        """
        params, owner = self.params, self.owner
        if self.hidden:
            # A parameter may have a gradient on one rank and none on the other; they are summed
            # up in the same order on both.
            order = sorted(range(len(params)), key=lambda i: (params[i].shard_index or 0, i))
            owner = tuple(owner[i] for i in order)
            params = [params[i] for i in order]
            norms = norms[index_tensor(tuple(order), norms.device)]
            here = tuple(int(p.has_grad and p.grad is not None) for p in params)
            norms = torch.cat([norms, index_tensor(here, norms.device)[:, None]], dim=1)
        if self.sharded:
            indices = [p.shard_index for p in params]
            squares = _summed(norms.square(), indices, self.sharded)
            rows = index_tensor(
                tuple(i for i, p in enumerate(indices) if p is not None), norms.device
            )
            norms = norms.index_copy(0, rows, squares.sqrt())
        if sketch_changes is not None:
            rows = index_tensor(self.sketched, norms.device)
            norms[:, 2].index_copy_(0, rows, sketch_changes.to(norms))  # which has the widest dtype
        if not self.layers:
            return norms, norms.new_zeros(0, dtype=torch.bool)
        if self._spread is not None:  # else each layer is one parameter
            norms = layer_norms(norms, owner, len(self.layers))
        # One rule for every form and engine, some of which add squares up: a norm is infinite
        # where its square is, as that of a gradient would be in a second moment.
        limit = _FLOAT32_LIMIT if norms.dtype == torch.float32 else self._unsquarable(norms)
        norms = norms.masked_fill(norms >= limit, math.inf)
        active = None
        if not all(not isinstance(group["lr"], Tensor) and group["lr"] for group in self.groups):
            active = self._active(norms)
        if not self.hidden:
            return norms, active
        on_some_rank = norms[:, -1] > 0
        return norms[:, :-1], on_some_rank if active is None else active & on_some_rank

    def _unsquarable(self, norms: Tensor) -> Tensor:
        """The least norm of each layer that is taken for infinite: its square overflows, or it
        overflows the dtype of the state's numbers.

        `norms` is float64 as soon as one tensor is; layers of other dtypes keep their own limit.
        """
        if self._limits is None:
            largest = torch.finfo(_get_scalar_dtype()).max
            least = [
                min(largest, *(least_unsquarable(p.param.dtype) for p in layer.all))
                for layer in self.layers
            ]
            self._limits = norms.new_tensor(least)[:, None]
        return self._limits

    def _active(self, norms: Tensor) -> Tensor:
        device = norms.device
        before = self.read("prev_norm", slice(0, len(self.layers)), device, of_layers=True)
        rated = has_rate(self.groups, device)[index_tensor(self.group_of, device)]
        count = norms.new_zeros(len(self.layers))
        count = count.index_add(0, index_tensor(self.owner, device), rated.to(norms))
        return (norms[:, 0] != 0) | (before != NO_PREDECESSOR) | (count > 0)

    def whole_sketches(self, sketches: Tensor) -> Tensor:
        """Sketches of whole parameters from those of this rank's parts, shape [sketched, size]."""
        if not self.sharded_sketches:
            return sketches
        indices = [self.params[i].sketch_index for i in self.sketched]
        rows = tuple(i for i, index in enumerate(indices) if index is not None)
        whole = _summed(sketches, indices, self.sharded_sketches)
        return sketches.index_copy(0, index_tensor(rows, sketches.device), whole)


def _summed(values: Tensor, indices: list[int | None], groups: Sequence[ReduceGroups]) -> Tensor:
    """Rows summed over the ranks that share them.

    Args:
        values: shape [rows, columns].
        indices: which of the sharded parameters each row belongs to; None for one that is whole.
        groups: of all sharded parameters.
    """
    rows = tuple(i for i, index in enumerate(indices) if index is not None)
    there = index_tensor(tuple(p for p in indices if p is not None), values.device)
    table = values.new_zeros(len(groups), values.shape[1])
    table[there] = values[index_tensor(rows, values.device)]
    return sum_over_shards(table, groups)[there]


# Collecting


def can_keep(plan: StepPlan) -> bool:
    """Whether the plan can be used for the next step too."""
    if torch.compiler.is_compiling() or plan.hidden or torch.is_grad_enabled():
        return False
    return not any(p.parts for p in plan.params)


def make_plan(optimizer: LayerwiseOptimizer) -> StepPlan:
    """Collects the layers that have a gradient now.

    State for new parameters is made here; `put_in_state` gives it to the optimizer once the step
    can no longer fail. A new parameter takes the S of those that are in its layer already.
    """
    layers: dict[str, Layer] = {}
    sharded: list[ReduceGroups] = []
    sharded_sketches: list[ReduceGroups] = []
    sketch_size = 0
    hidden = None
    absent = []
    for param in chain.from_iterable(
        local_params(optimizer, group, group["params"]) for group in optimizer.param_groups
    ):
        sketch_size = max(sketch_size, param.sketch)
        if param.reduce_groups:
            param.shard_index = len(sharded)
            sharded.append(param.reduce_groups)
            if param.sketch:
                param.sketch_index = len(sharded_sketches)
                sharded_sketches.append(param.reduce_groups)
            if param.shard.hides_gradients and param.tensor.requires_grad:
                hidden = param.shard
                param.has_grad = param.tensor.grad is not None
        if param.grad is not None:
            optimizer._check(param)
            layers.setdefault(param.layer, Layer(param.layer)).params.append(param)
        elif param.stored or not param.has_grad:
            absent.append(param)
    if hidden and hidden.sketch_problem and sketch_size:
        raise _unsketchable(hidden.sketch_problem)
    for param in absent:
        if param.layer in layers or not param.has_grad:
            layers.setdefault(param.layer, Layer(param.layer)).absent.append(param)
    if any(p.parts for layer in layers.values() for p in layer.params):
        optimizer._flat_tensors.refuse_split_layers(layers.values())
    if not layers and not optimizer.state:
        refuse_if_fsdp1_took_all()
    sharding = sharded, sharded_sketches, bool(hidden)
    plan = plan_layers(optimizer, list(layers.values()), sketch_size, *sharding)
    if can_keep(plan):
        plan.pack()
    return plan


def plan_layers(
    optimizer: LayerwiseOptimizer, layers: list[Layer], sketch_size: int, *sharding: Any
) -> StepPlan:
    """The plan for some layers, with complete state, in the optimizer's buckets."""
    options = {
        group_index(group): optimizer._layer_options(group) for group in optimizer.param_groups
    }
    for layer in layers:
        _join(optimizer, layer, options)
    plan = StepPlan(layers, home_device(optimizer), sketch_size, *sharding)
    plan.arrange(optimizer._buckets(plan), optimizer._state_keys)
    return plan


def local_params(
    optimizer: LayerwiseOptimizer, group: dict[str, Any], tensors: Sequence[Tensor]
) -> Iterator[LocalParam]:
    """The parameters that the tensors of a group are, or have as parts (flat tensors).

    Raises:
        RuntimeError: for a group that was not added by `add_param_group` of the optimizer,
            and flat tensors of which nothing is known.
    """
    if "layer_names" not in group:
        raise RuntimeError(
            f"a parameter group of {type(optimizer).__name__} names no layers: it was added behind "
            "its back, to `param_groups` or the base; use add_param_group of this optimizer"
        )
    flat_tensors = optimizer._flat_tensors
    if not flat_tensors.is_flat(group):
        named = zip(group["layer_names"], decays_of(group), tensors, strict=True)
        for layer, decays, param in named:
            yield local_param(optimizer, layer, param, group, decays)
        return
    flat_tensors.refuse_unknown(group, tensors)
    if group.get("history") == "sketch":
        raise _unsketchable(flat_tensors.sketch_problem)
    for flat in tensors:
        stored, parts = _stored(optimizer, flat), flat_tensors.parts(flat, group)
        if not stored and optimizer.state.get(flat):
            flat_tensors.refuse_without_scale()
        for i, (layer, decays, start, size, reduce_groups) in enumerate(parts):
            span = slice(start, start + size)
            param = flat.detach()[span]
            yield LocalParam(
                *(layer, flat, group, stored, param, decays, Shard(param), reduce_groups),
                part=i,
                parts=(len(parts),),
                span=span,
            )


def local_param(
    optimizer: LayerwiseOptimizer, layer: str, param: Tensor, group: dict[str, Any], decays: bool
) -> LocalParam:
    """A parameter that is no part of a flat tensor."""
    shard, stored = shard_of(param), _stored(optimizer, param)
    sketch = history_of(group, param).size if optimizer._state_keys(group).histories else 0
    return LocalParam(
        layer, param, group, stored, param, decays, shard, shard.reduce_groups, sketch
    )


def _stored(optimizer: LayerwiseOptimizer, tensor: Tensor) -> State:
    state = optimizer.state.get(tensor, {})
    return state if "lipschitz_scale" in state else {}


def _join(optimizer: LayerwiseOptimizer, layer: Layer, options: dict[int, LayerOptions]) -> None:
    layer.options, *others = dict.fromkeys(options[group_index(p.group)] for p in layer.all)
    if others:
        raise ValueError(
            f"layer {layer.name!r} has parameters in groups with different gamma, c, "
            "scale_bounds, nonfinite or previous; a layer has one S, so give those groups "
            "the same values"
        )
    known = next((p for p in layer.all if p.stored), None)
    lost = False
    for param in layer.all:
        new = not param.stored
        without = complete(optimizer, param.stored, param.tensor, param.group, param.parts)
        lost |= without and not new
        if new and known is not None:
            for key in LAYER_SCALARS:
                if key in param.state:
                    param.state[key].copy_(known.state[key])
    if lost:
        forget_predecessor([p.state for p in layer.all])


def refuse_unsuitable(optimizer: LayerwiseOptimizer, param: LocalParam) -> None:
    """Raises for a gradient or parameter that no optimizer with an S per layer can step."""
    if param.grad is not None and param.grad.is_sparse:
        raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
    if is_model_parallel(param.tensor):
        raise NotImplementedError(
            f"layer {param.layer!r} is split by a tensor parallelism that says nothing of its "
            "process group (Megatron's, DeepSpeed's AutoTP), so that its norm cannot be had: "
            "use one that makes DTensors (torch's parallelize_module, transformers' tp_plan)"
        )


def _unsketchable(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'history="sketch" needs to know which elements of a parameter {what} hold; use '
        'history="exact" or a dtype there, or FSDP2, whose shards can be sketched'
    )


# What a plan is made from

_of_param = attrgetter("device", "dtype", "shape")
_of_grad = attrgetter("dtype", "layout")
_grad = attrgetter("grad")


def _facts(optimizer: LayerwiseOptimizer) -> tuple[list[object], list[object]]:
    """Objects that are to be the same, and values that are to be equal."""
    groups = optimizer.param_groups
    same = [*groups, *optimizer.state, *optimizer.state.values()]
    equal: list[object] = []
    for group in groups:
        params = group["params"]
        grads = list(map(_grad, params))
        present = [grad for grad in grads if grad is not None]
        missing = len(present) != len(grads) and [grad is None for grad in grads]
        same += params
        equal += (
            [group.get(name) for name in optimizer._plan_options],
            bool(group.get("momentum")),
            list(group.get("layer_names", ())),
            list(group.get("no_weight_decay", ())),
            missing,
            list(map(_of_grad, present)),
            list(map(type, present)),
            list(map(_of_param, params)),
            list(map(Tensor.stride, params)),
        )
    return same, equal


def home_device(optimizer: LayerwiseOptimizer) -> torch.device:
    """The device of vectors with an element per layer: the first parameter's."""
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return next((p.device for p in params), torch.device("cpu"))


def has_rate(groups: Sequence[dict[str, Any]], device: torch.device) -> Tensor:
    """Which groups have lr != 0, on the device."""
    rates = [group["lr"] for group in groups]
    if not any(isinstance(lr, Tensor) for lr in rates):
        return index_tensor(tuple(int(lr != 0) for lr in rates), device) > 0
    return torch.stack([as_scalar(lr, device) for lr in rates]) != 0


# Small tools


def _constant(x: Any) -> Callable[[], Any]:
    return lambda: x


def _gathered(params: Sequence[LocalParam], key: str, device: torch.device) -> Tensor:
    values = [param.state[key] for param in params]
    return torch.stack([x if x.device == device else x.to(device) for x in values])


def _is_range(indices: tuple[int, ...], count: int) -> bool:
    return indices == tuple(range(count))


def as_scalar(number: Tensor | float, device: torch.device) -> Tensor:
    """An option that may be a tensor of one element, on the device, without waiting for it."""
    if isinstance(number, Tensor):
        return number.to(device, non_blocking=True).squeeze()
    return torch.tensor(number, device=device)


def store(targets: Sequence[Tensor], values: Tensor) -> None:
    """Copies the elements of a vector, or the rows of a matrix, into as many tensors."""
    if torch.is_grad_enabled():  # differentiable=True
        for target, value in zip(targets, values.unbind(), strict=True):
            target.copy_(value)
    else:
        torch._foreach_copy_(list(targets), list(values.unbind()))
