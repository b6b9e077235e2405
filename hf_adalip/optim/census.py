"""Who takes part in a step: the parameters of each layer, and the numbers kept for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .groups import number_of
from .lipschitz import Estimator
from .norms import index_tensor
from .shards import Over

State = dict[str, Any]
Options = tuple[Estimator, str | None]  # with -U's `previous`

LAYER_SCALARS = ("lipschitz_scale", "prev_norm", "nonfinite_steps", "lipschitz_c")
"""Numbers of a layer. Each of its parameters keeps a copy, so that state stays per parameter,
as every checkpoint format wants it."""

SCALARS = (*LAYER_SCALARS, "step", "layer_lr", "prev_lr")
"""All state that is one number, on the parameter's device, and never of its dtype."""


@dataclass
class Member:
    """A parameter of a layer at one step, or what of it lies in a flat tensor."""

    layer: str
    tensor: Tensor  # of the parameter group, which has the state
    group: dict[str, Any]
    stored: State  # of `tensor`; not yet in the optimizer's state when it is new
    param: Tensor  # `tensor`, or a view of the part of it that is this parameter's
    decays: bool  # whether the group's weight decay is for it
    over: Over
    part: int | None = None  # which of a flat tensor's it is
    parts: tuple[int, ...] = ()  # shape of a number in `stored`: how many a flat tensor has
    here: slice | None = None  # where in a flat tensor it is
    place: int | None = None  # among all that are sharded, on every rank the same
    seen: bool = True  # False where only other ranks know whether there is a gradient
    views: State | None = None
    sketch: int = 0  # how many numbers are kept of x_{t-1}; 0 where it is kept as a tensor
    sketch_place: int | None = None  # as `place`, among the sketched

    @property
    def grad(self) -> Tensor | None:
        """Asked for anew, so that a member does not keep a gradient alive between two steps."""
        grad = self.tensor.grad
        if grad is None:
            # FSDP1 gives a rank no gradient of a parameter of which it has nothing.
            return None if self.seen or self.tensor.numel() else self.tensor.detach()
        return grad if self.here is None else grad[self.here]

    @property
    def state(self) -> State:
        """This parameter's own, as views where `tensor` has many; once `stored` is complete."""
        if self.part is None:
            return self.stored
        if self.views is None:
            tensors = {n: x for n, x in self.stored.items() if isinstance(x, Tensor)}
            self.views = {
                n: x[self.part if n in SCALARS else self.here] for n, x in tensors.items()
            }
        return self.views


@dataclass
class Layer:
    """The parameters that share one S."""

    name: str
    members: list[Member] = field(default_factory=list)  # with a gradient
    absent: list[Member] = field(default_factory=list)  # with a history, but no gradient now
    options: Options = field(init=False)  # of `_join`

    @property
    def all(self) -> list[Member]:
        return self.members + self.absent


class Census:
    """Who takes part in a step, here and on other ranks, and the numbers kept for them.

    Attributes:
        layers: those of one kind, which have the same options, side by side.
        over: of everything that is sharded, also what has no gradient here.
        sketched: the part of `over` whose history is a sketch.
        width: the largest size of a sketch; 0 where there is none.
        hidden: whether it takes a collective to know which layers have a gradient.
        members: of all layers, in the order in which a step works through them.
        owner: the index of each member's layer.
        groups: the parameter groups of all members.
        group_of: the index of each member's group.
        sketching: the indices of the members that keep a sketch.
        raises: whether a non-finite gradient can stop the step.
    """

    def __init__(
        self, layers: list[Layer], over: list[Over], sketched: list[Over], width: int, hidden: bool
    ) -> None:
        self.layers = layers
        self.over = over
        self.sketched = sketched
        self.width = width
        self.hidden = hidden
        self.kinds: list[tuple[Options, slice]] = []
        for i, layer in enumerate(layers):
            if not self.kinds or self.kinds[-1][0] != layer.options:
                self.kinds.append((layer.options, slice(i, i + 1)))
            else:
                self.kinds[-1] = (layer.options, slice(self.kinds[-1][1].start, i + 1))
        self.raises = any(estimator.nonfinite == "raise" for (estimator, _), _ in self.kinds)
        groups = {number_of(m.group): m.group for layer in layers for m in layer.all}
        self.groups = list(groups.values())
        self.runs: list[Any] = []  # an optimizer's, of members that are stepped together
        self.kept = False  # whether the optimizer has the members' state
        self._vectors: dict[str, Tensor] = {}
        self._is_packed = False
        self._packed: list[Tensor] = []  # the members' views of those and of packed sketches
        self._places: list[int] = []  # where these were
        self._noted: list[Callable[[], Any]] = []  # weak references to the members' state
        self.arrange([(i, m) for i, layer in enumerate(layers) for m in layer.all])
        self.arranged = False  # by who steps them

    def arrange(self, members: Sequence[tuple[int, Member]]) -> None:
        """Sets the order of the members, given with the index of their layer."""
        self.arranged = True
        self.members = [member for _, member in members]
        self.owner = tuple(i for i, _ in members)
        places = {number_of(group): i for i, group in enumerate(self.groups)}
        self.group_of = tuple(places[number_of(member.group)] for member in self.members)
        self.sketching = tuple(i for i, member in enumerate(self.members) if member.sketch)
        self._spread = None if _is_range(self.owner, len(self.layers)) else self.owner
        firsts = {layer: place for place, layer in reversed(list(enumerate(self.owner)))}
        lead = tuple(firsts[i] for i in range(len(self.layers)))
        self._lead = lead
        self._leaders = None if _is_range(lead, len(self.members)) else lead

    def pack(self) -> None:
        """Makes each number of the members a view of one vector, so that all are read or written
        by one operation. For a census that is used again; their order may no longer change.

        State that a CUDA graph may have captured stays where it is; FakeTensors are nowhere.
        """
        if self._is_packed:
            return
        self._is_packed = True
        # Who does not say (a base that is not ours or Adam's) may be captured all the same.
        capturable = any(m.group.get("capturable", m.tensor.is_cuda) for m in self.members)
        fake = any(type(m.stored["lipschitz_scale"]) is not Tensor for m in self.members)
        if capturable or fake or len({m.tensor.device for m in self.members}) > 1:
            return
        for key in SCALARS:
            if self.members and all(key in m.stored for m in self.members):
                vector = torch.stack([m.stored[key] for m in self.members])
                self._vectors[key] = vector
                for member, number in zip(self.members, vector.unbind(), strict=True):
                    member.stored[key] = number
                self._packed += [member.stored[key] for member in self.members]
        for run in self.runs:
            self._packed += run.pack()
        self._places = list(map(Tensor.data_ptr, self._packed))
        self.note()

    def note(self) -> None:
        """Takes the members' state as it is now for `intact`, without keeping it alive."""
        self._noted = list(map(_weak, self._values()))

    def _values(self) -> list[Any]:
        """The members' state, flat."""
        return list(chain.from_iterable([member.stored.values() for member in self.members]))

    @property
    def intact(self) -> bool:
        """Whether the members' state consists of the same tensors as when it was noted."""
        same = same_objects(self._values(), [reference() for reference in self._noted])
        # `x.data = ...`, with which state is moved to another device and back, keeps the tensor.
        return same and list(map(Tensor.data_ptr, self._packed)) == self._places

    def read(self, key: str, here: slice, home: torch.device) -> Tensor:
        """A number of some of the members."""
        if key in self._vectors:
            return self._vectors[key][here]
        return _gathered(self.members[here], key, home)

    def write(self, key: str, values: Tensor, here: slice) -> None:
        """Stores a number of some of the members."""
        if key in self._vectors:
            self._vectors[key][here].copy_(values)
        else:
            store([member.state[key] for member in self.members[here]], values)

    def spread(self, values: Tensor) -> Tensor:
        """Values of layers as values of members."""
        return pick(values, self._spread)

    def read_layers(self, key: str, here: slice, home: torch.device) -> Tensor:
        """A number of some of the layers; all members of a layer have the same."""
        if key in self._vectors:
            return pick(self._vectors[key], self._leaders)[here]
        return _gathered([self.members[i] for i in self._lead[here]], key, home)

    def write_layers(self, key: str, values: Tensor, here: slice) -> None:
        """Stores a number of some of the layers in all of their members."""
        if key in self._vectors and len(values) == len(self.layers):
            self._vectors[key].copy_(self.spread(values))
            return
        owned = zip(self.owner, self.members, strict=True)
        mine = [(i - here.start, m) for i, m in owned if here.start <= i < here.stop]
        store([m.state[key] for _, m in mine], pick(values, tuple(i for i, _ in mine)))


def _weak(x: Any) -> Callable[[], Any]:
    return weakref.ref(x) if isinstance(x, Tensor) else lambda: x


def same_objects(some: Sequence[object], others: Sequence[object]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))


def _gathered(members: Sequence[Member], key: str, home: torch.device) -> Tensor:
    values = [member.state[key] for member in members]
    return torch.stack([x if x.device == home else x.to(home) for x in values])


def pick(values: Tensor, indices: tuple[int, ...] | None) -> Tensor:
    """values[indices]; None for all of them in their order."""
    return values if indices is None else values[index_tensor(indices, values.device)]


def _is_range(indices: tuple[int, ...], count: int) -> bool:
    return indices == tuple(range(count))


def real(x: Any) -> Any:
    """A complex tensor as its real and imaginary parts: one layer of twice as many numbers."""
    return torch.view_as_real(x) if isinstance(x, Tensor) and x.is_complex() else x


def filled(shape: tuple[int, ...], value: float, param: Tensor) -> Tensor:
    """A number of the state, or one for each part of a flat tensor: float32 whatever the
    parameter's dtype (float64 if that is torch's default dtype, as in torch.optim), on the
    parameter's device."""
    return torch.full(shape, value, dtype=_get_scalar_dtype(), device=param.device)


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
