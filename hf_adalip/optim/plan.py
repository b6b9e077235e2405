"""The plan of a step: its layers, what is stepped together, and the vectors of their numbers.

It is made in collect.py, and used until something changes of what it was made from.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .batch import Bucket, Layer, LayerOptions, LocalParam, store
from .estimator import NO_PREDECESSOR
from .groups import group_index
from .sharding import ReduceGroups, sum_over_shards
from .signals import combine_norms, index_tensor, least_unsquarable
from .state import SCALARS, StateKeys

if TYPE_CHECKING:
    from .step import Form, LayerwiseOptimizer

_FLOAT32_LIMIT = least_unsquarable(torch.float32)


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
        self.raises = any(kind.estimator.nonfinite == "raise" for kind in kinds)
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

    @property
    def is_reusable(self) -> bool:
        """Whether the next step can use it too."""
        if torch.compiler.is_compiling() or self.hidden or torch.is_grad_enabled():
            return False
        return not any(p.parts for p in self.params)

    def note(self, optimizer: LayerwiseOptimizer) -> None:
        """Notes what the plan was made from."""
        self._same, self._equal = _facts(optimizer)
        self.note_state()

    def note_state(self) -> None:
        """Without keeping the state alive."""
        values = chain.from_iterable([param.tensor_state.values() for param in self.params])
        self._values = [weakref.ref(x) if isinstance(x, Tensor) else _constant(x) for x in values]

    def is_current(self, optimizer: LayerwiseOptimizer | None) -> bool:
        """Whether nothing has changed of what the plan was made from, in particular whether the
        parameters' state consists of the same tensors.

        Args:
            optimizer: the plan's; None to ask for the state alone.
        """
        # Runs at every step, with cold caches: hence map, whose loop is in C.
        if optimizer is not None:
            same, equal = _facts(optimizer)
            if len(same) != len(self._same) or not all(map(is_, same, self._same)):
                return False
            if equal != self._equal:
                return False
        now = list(chain.from_iterable([param.tensor_state.values() for param in self.params]))
        noted = [reference() for reference in self._values]
        if len(now) != len(noted) or not all(map(is_, now, noted)):
            return False
        # `x.data = ...`, with which state is moved to another device and back, keeps the tensor.
        return list(map(Tensor.data_ptr, self._packed)) == self._addresses

    # Numbers of parameters and layers

    def pack(self) -> None:
        """Makes each number of the parameters a view of one vector, so that all are read or
        written by one operation. For a plan that is used again; the order may no longer change.

        State that a CUDA graph may have captured must not move; FakeTensors have no memory.
        """
        if self._is_packed:
            return
        self._is_packed = True
        # A base optimizer without the option `capturable` may be captured all the same.
        capturable = any(p.group.get("capturable", p.tensor.is_cuda) for p in self.params)
        fake = any(type(p.tensor_state["lipschitz_scale"]) is not Tensor for p in self.params)
        if capturable or fake or len({p.tensor.device for p in self.params}) > 1:
            return
        for key in SCALARS:
            if self.params and all(key in p.tensor_state for p in self.params):
                vector = torch.stack([p.tensor_state[key] for p in self.params])
                self._vectors[key] = vector
                for param, number in zip(self.params, vector.unbind(), strict=True):
                    param.tensor_state[key] = number
                self._packed += [param.tensor_state[key] for param in self.params]
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
                optimizer.state[param.tensor].update(param.tensor_state)
                if param.part is None:
                    param.tensor_state = optimizer.state[param.tensor]

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
            norms = combine_norms(norms, owner, len(self.layers))
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
