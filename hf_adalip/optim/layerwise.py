"""What every optimizer with an S per layer shares: which parameters make a layer, its state,
its serialisation, and the step of S."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _get_scalar_dtype
from torch.utils.weak import WeakIdKeyDictionary

from .census import (
    LAYER_SCALARS,
    SCALARS,
    Census,
    Layer,
    Member,
    Options,
    State,
    as_scalar,
    filled,
    same_objects,
)
from .flat import Original, Part, flat_tensors, is_held, parts_of, unknown
from .groups import (
    Layers,
    decays_of,
    name_layers,
    number_of,
    restore_structure,
    structure_of,
)
from .history import HISTORIES, SKETCH, Exact, history_of
from .lipschitz import FORGOTTEN, NO_PREDECESSOR, Estimator, LayerState
from .names import by_name
from .norms import index_tensor, layer_norms
from .shards import (
    Over,
    is_fsdp1,
    is_model_parallel,
    refuse_if_fsdp1_took_all,
    sharded_over,
    sum_over_shards,
)
from .signals import Signal


class LayerRate(NamedTuple):
    """A layer's learning rate at its last step."""

    scale: float  # S_t
    lr: float  # A_t as applied: α_t·S_t, or α_t on the layer's first step
    norm: float  # ‖g_t‖, 0 if it was left out; in -U, of the update that the next is compared with
    nonfinite_steps: int  # steps that were left out because the gradient was not finite


class Keys(NamedTuple):
    """What is kept for a parameter."""

    moments: tuple[str, ...]  # tensors of its shape and dtype
    histories: tuple[str, ...]  # what is remembered of x_{t-1}, in whichever way
    numbers: tuple[str, ...]


class Kept:
    """A census, and what it was made from: it holds until any of that changes."""

    def __init__(self, optimizer: LayerwiseOptimizer, census: Census) -> None:
        self.census = census
        self.census.note()
        self._state = list(optimizer.state), list(optimizer.state.values())
        self._groups = [
            (
                group,
                optimizer._manner(group),
                _structure(group),
                list(group["params"]),
                _kinds(group["params"]),
            )
            for group in optimizer.param_groups
        ]

    def holds(self, optimizer: LayerwiseOptimizer) -> bool:
        # Asked at every step, when little of the parameters is in a cache: hence the loops of C.
        if len(optimizer.param_groups) != len(self._groups):
            return False
        for group, (known, manner, structure, params, kinds) in zip(
            optimizer.param_groups, self._groups, strict=True
        ):
            now = group["params"]
            if group is not known or optimizer._manner(group) != manner:
                return False
            if _structure(group) != structure or not same_objects(now, params):
                return False
            if _kinds(now) != kinds:
                return False
        params, states = self._state
        if not same_objects(list(optimizer.state), params):
            return False
        if not same_objects(list(optimizer.state.values()), states) or not self.census.intact:
            return False
        self.census.pack()
        return True


def _structure(group: dict[str, Any]) -> list[list[str]]:
    return [list(group["layer_names"]), list(group.get("no_weight_decay", ()))]


_of_param = attrgetter("device", "dtype", "shape")
_of_grad = attrgetter("dtype", "layout")
_grad = attrgetter("grad")


def _kinds(params: Sequence[Tensor]) -> list[object]:
    """What of parameters and their gradients decides how they are stepped."""
    grads = list(map(_grad, params))
    present = [grad for grad in grads if grad is not None]
    missing = len(present) != len(grads) and [grad is None for grad in grads]
    return [
        list(map(_of_grad, present)),
        list(map(type, present)),
        missing,
        list(map(_of_param, params)),
        list(map(Tensor.stride, params)),
    ]


class LayerwiseOptimizer(Optimizer):
    """An optimizer whose parameters belong to layers that have an S each.

    A parameter group names the layer of each of its parameters in "layer_names".
    """

    _signal: Signal
    _layers: Layers

    @property
    def layers(self) -> str:
        """What shares one S: "tensor", "module", or the name of a function."""
        return self._layers if isinstance(self._layers, str) else _name_of(self._layers)

    @property
    def releases_gradients(self) -> bool:
        """Whether parameters are stepped within backward (`release_gradients`)."""
        return False

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_given" not in self.__dict__:  # a copy, with parameters of its own
            for group in self.param_groups:
                if not self._is_flat(group):
                    self._remember_originals(group)

    def _options(self, group: dict[str, Any]) -> Options:
        raise NotImplementedError

    def _name_last_group(self, layers: Layers) -> None:
        try:
            name_layers(self.param_groups, layers)
        except Exception:
            self.param_groups.pop()
            raise
        self._remember_originals(self.param_groups[-1])

    def _remember_originals(self, group: dict[str, Any]) -> None:
        """Keeps hold of a group's parameters, for an engine that will replace them.

        Of the list that they are in: DeepSpeed, whose flat tensors need them, puts another list
        in its place, and accelerate empties it, so as to have their memory. (A weak reference to
        each would keep torch from swapping it, as FSDP2 does when a module is converted.)
        """
        given = self.__dict__.setdefault("_given", [])
        group["layer_group"] = len(given)
        given.append((list(group["layer_names"]), decays_of(group), group["params"]))

    def _originals(self, group: dict[str, Any] | None = None) -> list[Original]:
        """The parameters of a group, or of all, as they were given."""
        given = self.__dict__.get("_given", [])
        if group is not None:
            index = group.get("layer_group", len(given))
            given = given[index : index + 1]
        return [
            Original(*of)
            for names, decays, params in given
            for of in zip(names, decays, params, strict=False)
        ]

    def _state_keys(self, group: dict[str, Any]) -> Keys:
        """What the parameters of the group keep."""
        raise NotImplementedError

    def _complete_loaded(self) -> None:
        states: dict[str, list[State]] = {}
        lost = set()
        for group in self.param_groups:
            flat = self._is_flat(group)
            for i, tensor in enumerate(group["params"]):
                if state := self.state.get(tensor):
                    parts = (len(self._parts(tensor, group)),) if flat else ()
                    without = self._complete(state, tensor, group, parts)
                    if not flat:  # which holds its layers whole
                        layer = group["layer_names"][i]
                        states.setdefault(layer, []).append(state)
                        lost |= {layer} if without else set()
        for layer in lost:
            forget_predecessor(states[layer])

    def _complete(
        self, state: State, param: Tensor, group: dict[str, Any], parts: tuple[int, ...]
    ) -> bool:
        """Adds to a tensor's state what it lacks, as it is before a first step.

        It lacks everything at first, and later what an older checkpoint did not have or an
        option that was changed calls for. Of a flat tensor, a number of the state is a vector
        with an element for each of its parts.

        Returns:
            whether it lacked x_{t-1}, which is to be forgotten of the whole layer then.
        """
        moments, histories, numbers = self._state_keys(group)
        estimator, _ = self._options(group)
        keeps = history_of(group, param)
        new = not state
        for name in moments:
            if state.get(name) is None:
                state[name] = Exact().empty(param)
            _check_shape(name, state[name], Exact().shape(param))
        keys = [keeps.key(name) for name in histories]
        previous = [n for n in numbers if n.startswith("prev_")]
        for name in [n for n in state if n.startswith((*HISTORIES, "prev_lr"))]:
            if name not in (*keys, *previous):
                del state[name]  # of other options; if they come back, it is x_{t-1} no longer
        for key in keys:
            if state.get(key) is not None:
                state[key] = keeps.adopted(state[key], param)
        lost = any(state.get(n) is None for n in (*previous, *keys))
        for key in keys:
            if state.get(key) is None:
                state[key] = keeps.empty(param)
            _check_shape(key, state[key], keeps.shape(param))
        initial = {"lipschitz_scale": 1.0, "prev_norm": NO_PREDECESSOR}
        if estimator.theoretical:
            initial["lipschitz_c"] = estimator.initial_c
        initial |= dict.fromkeys((*numbers, "nonfinite_steps", "layer_lr"), 0.0)
        for name, value in initial.items():
            if not isinstance(state.get(name), Tensor):  # old checkpoints have step as a number
                state[name] = filled(parts, float(state.get(name, value)), param)
            elif state[name].shape != parts:
                found = tuple(state[name].shape)
                raise ValueError(
                    f"state {name!r} has shape {found} and needs {parts}: it was saved by an "
                    "engine that shards otherwise; load it under the same one"
                )
        if lost and not new:
            forget_predecessor([state])
        return lost

    def _is_flat(self, group: dict[str, Any]) -> bool:
        """Whether an engine has put flat tensors in the place of the group's parameters."""
        params, sizes = group["params"], group.get("layer_sizes", ())
        if len(params) != len(sizes):
            return True
        if len(params) == 1:
            # A flat tensor of one parameter may be of its size.
            held = [x.param for x in self._originals(group) if is_held(x.param)]
            if held and held[0] is not params[0]:
                return True
        others = [
            p
            for p, size in zip(params, sizes, strict=True)
            if size not in (None, p.numel()) and p.requires_grad and not is_fsdp1(p)
        ]
        if not others:
            return False
        given = {id(x.param) for x in self._originals(group)}
        return any(id(p) not in given for p in others)  # else p.data = ... has given it a size

    def _parts(self, flat: Tensor, group: dict[str, Any]) -> list[Part]:
        known = self.__dict__.setdefault("_flat", WeakIdKeyDictionary())
        if flat not in known:
            known[flat] = parts_of(flat, self._originals(group))
        found: list[Part] = known[flat]
        return found

    def _members(self, group: dict[str, Any], tensors: Sequence[Tensor]) -> Iterator[Member]:
        """What the tensors of a group consist of: parameters, or parts of flat tensors.

        Raises:
            RuntimeError: for a group that was not added by `add_param_group` of this optimizer,
                and flat tensors of which nothing is known.
        """
        if "layer_names" not in group:
            raise RuntimeError(
                f"a parameter group of {type(self).__name__} names no layers: it was added behind "
                "its back, to `param_groups` or the base; use add_param_group of this optimizer"
            )
        if self._is_flat(group):
            yield from self._flat_members(group, tensors)
            return
        for name, decays, param in zip(
            group["layer_names"], decays_of(group), tensors, strict=True
        ):
            yield self._member(name, param, group, decays)

    def _member(self, layer: str, param: Tensor, group: dict[str, Any], decays: bool) -> Member:
        """A parameter that is no part of a flat tensor."""
        stored, over = self._stored(param), sharded_over(param)
        sketch = history_of(group, param).size if self._state_keys(group).histories else 0
        return Member(layer, param, group, stored, param, decays, over, sketch=sketch)

    def _flat_members(self, group: dict[str, Any], tensors: Sequence[Tensor]) -> Iterator[Member]:
        if not any(is_held(x.param) for x in self._originals(group)):
            given = sum(group.get("layer_sizes", ()))
            now = sum(p.numel() for p in tensors)
            raise unknown(
                f"{len(group['layer_names'])} with {given} elements, now {len(tensors)} with {now}"
            )
        if group.get("history") == "sketch":
            raise _unsketchable("DeepSpeed's flat tensors")
        for flat in tensors:
            stored, parts = self._stored(flat), self._parts(flat, group)
            if not stored and self.state.get(flat):
                raise RuntimeError(
                    "a flat tensor has state but no S, which DeepSpeed's universal checkpoints "
                    "leave out: resume from the checkpoint that was converted, under the same "
                    "stage and number of ranks"
                )
            for i, (layer, decays, start, size, over) in enumerate(parts):
                here = slice(start, start + size)
                param = flat.detach()[here]
                yield Member(
                    *(layer, flat, group, stored, param, decays, over),
                    *(i, (len(parts),), here),
                )

    def _state_apart(self) -> defaultdict[Tensor, State]:
        """The state as it is pickled, see `apart`."""
        return defaultdict(dict, {p: apart(kept) for p, kept in self.state.items()})

    def _stored(self, tensor: Tensor) -> State:
        state = self.state.get(tensor, {})
        return state if "lipschitz_scale" in state else {}

    def _survey(self) -> Census:
        """The census of this step: that of the last one, where nothing it says has changed."""
        if not torch.compiler.is_compiling():
            kept: Kept | None = self.__dict__.get("_kept")
            if kept is not None and kept.holds(self):
                return kept.census
            self.__dict__.pop("_kept", None)
        return self._collect()

    def _remember(self, census: Census) -> None:
        """Keeps the census of a step that was taken for the next one."""
        if "_kept" not in self.__dict__ and self._can_keep(census):
            self._kept = Kept(self, census)

    def _can_keep(self, census: Census) -> bool:
        """Whether a step may find everything where the step before it has left it."""
        if torch.compiler.is_compiling() or census.hidden or torch.is_grad_enabled():
            return False
        return not any(m.parts for m in census.members)

    def _manner(self, group: dict[str, Any]) -> object:
        """What of a group's options decides how its parameters are stepped together."""
        return self._options(group), self._state_keys(group)

    def _collect(self) -> Census:
        """The layers that have a gradient now, those with the same estimator side by side.

        A parameter without state gets one here; `_keep` puts it in its place once the step can
        no longer fail. It takes the S of the parameters that were in its layer before it.
        """
        layers: dict[str, Layer] = {}
        over: list[Over] = []
        sketched: list[Over] = []
        width = 0
        hidden = False
        absent = []
        for group in self.param_groups:
            for member in self._members(group, group["params"]):
                width = max(width, member.sketch)
                if member.over:
                    member.place = len(over)
                    over.append(member.over)
                    if member.sketch:
                        member.sketch_place = len(sketched)
                        sketched.append(member.over)
                if member.over and is_fsdp1(member.tensor) and member.tensor.requires_grad:
                    # It gives no gradient to a rank that has nothing of a parameter.
                    hidden = True
                    member.seen = member.tensor.grad is not None
                if member.grad is not None:
                    self._check(member)
                    layers.setdefault(member.layer, Layer(member.layer)).members.append(member)
                elif member.stored or not member.seen:
                    absent.append(member)
        if hidden and width:
            raise _unsketchable("FSDP1's slices")
        for member in absent:
            if member.layer in layers or not member.seen:
                layers.setdefault(member.layer, Layer(member.layer)).absent.append(member)
        self._check_whole(layers)
        if not layers and not self.state:
            refuse_if_fsdp1_took_all()
        options = {number_of(group): self._options(group) for group in self.param_groups}
        for layer in layers.values():
            self._join(layer, options)
        return Census(by_kind(list(layers.values())), over, sketched, width, hidden)

    def _join(self, layer: Layer, options: dict[int, Options]) -> None:
        layer.options, *others = dict.fromkeys(options[number_of(m.group)] for m in layer.all)
        if others:
            raise ValueError(
                f"layer {layer.name!r} has parameters in groups with different gamma, c, "
                "scale_bounds, nonfinite or previous; a layer has one S, so give those groups "
                "the same values"
            )
        known = next((m for m in layer.all if m.stored), None)
        lost = False
        for member in layer.all:
            new = not member.stored
            without = self._complete(member.stored, member.tensor, member.group, member.parts)
            lost |= without and not new
            if new and known is not None:
                for key in LAYER_SCALARS:
                    if key in member.state:
                        member.state[key].copy_(known.state[key])
        if lost:
            forget_predecessor([m.state for m in layer.all])

    def _keep(self, census: Census) -> None:
        if census.kept:
            return
        census.kept = True
        for layer in census.layers:
            for member in layer.all:
                if "lipschitz_scale" not in self.state[member.tensor]:
                    self.state[member.tensor].update(member.stored)
                    if member.part is None:
                        member.stored = self.state[member.tensor]

    def _check(self, member: Member) -> None:
        if member.grad is not None and member.grad.is_sparse:
            raise RuntimeError(f"{type(self).__name__} does not support sparse gradients")
        if is_model_parallel(member.tensor):
            raise NotImplementedError(
                f"layer {member.layer!r} is split by a tensor parallelism that says nothing of its "
                "process group (Megatron's, DeepSpeed's AutoTP), so that its norm cannot be had: "
                "use one that makes DTensors (torch's parallelize_module, transformers' tp_plan)"
            )

    def _check_whole(self, layers: dict[str, Layer]) -> None:
        """ZeRO steps one flat tensor after the other: a layer must not lie in two of them."""
        if not any(m.parts for layer in layers.values() for m in layer.members):
            return
        held = Counter(x.layer for x in self._originals() if is_held(x.param))
        for layer in layers.values():
            if len(layer.all) < held[layer.name]:
                raise RuntimeError(
                    f"DeepSpeed steps only {len(layer.all)} of the {held[layer.name]} parameters "
                    f"of layer {layer.name!r} at once, because they are in different parameter "
                    "groups (with and without weight decay) or sub-groups, so that the norm of "
                    'the layer cannot be had: choose layers="tensor", or one group (as '
                    "create_optimizer makes it for our six, or with weight_decay=0) and a larger "
                    "sub_group_size"
                )

    def _home(self) -> torch.device:
        """Where vectors over layers are: with the first parameter."""
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        return next((p.device for p in params), torch.device("cpu"))

    def _whole_norms(self, norms: Tensor, members: Sequence[Member], census: Census) -> Tensor:
        """Norms of whole parameters from those of this rank's shards.

        Every rank takes part in the same collectives, also when it has no gradient.

        Args:
            norms: shape [members, columns].
            members: of each row.
            census: who is sharded over what.
        """
        if not census.over:
            return norms
        rows = tuple(i for i, m in enumerate(members) if m.place is not None)
        places = tuple(m.place for m in members if m.place is not None)
        here, there = index_tensor(rows, norms.device), index_tensor(places, norms.device)
        table = norms.new_zeros(len(census.over), norms.shape[1])
        table[there] = norms[here].square()
        whole = norms.clone()
        whole[here] = sum_over_shards(table, census.over).sqrt()[there]
        return whole

    def _whole_sketches(self, sketches: Tensor, census: Census) -> Tensor:
        """Sketches of whole parameters from those of this rank's shards, shape [sketched, k]."""
        if not census.sketched:
            return sketches
        members = [census.members[i] for i in census.sketching]
        rows = tuple(i for i, m in enumerate(members) if m.sketch_place is not None)
        places = tuple(m.sketch_place for m in members if m.sketch_place is not None)
        here, there = index_tensor(rows, sketches.device), index_tensor(places, sketches.device)
        table = sketches.new_zeros(len(census.sketched), sketches.shape[1])
        table[there] = sketches[here]
        sketches[here] = sum_over_shards(table, census.sketched)[there]
        return sketches

    def _layer_norms(
        self, norms: Tensor, census: Census, changes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Norms of whole layers from those of this rank's shards of their parameters.

        Args:
            norms: of the census' members, shape [members, columns], the gradient's first.
            census: the layers, and who is sharded over what.
            changes: ‖x_t - x_{t-1}‖ of the members that have a sketch, which is of the whole.

        Returns:
            shape [layers, columns]; and which layers live, shape [layers]: some rank has a
            gradient, and this is not the step with zero gradients and lr = 0 with which
            torch.distributed.checkpoint makes the state before training.
        """
        members, owner = census.members, census.owner
        if census.hidden:
            # A member may have a gradient on one rank and none on the other; they are summed up
            # in the same order on both.
            order = sorted(range(len(members)), key=lambda i: (members[i].place or 0, i))
            owner = tuple(owner[i] for i in order)
            members = [members[i] for i in order]
            norms = norms[index_tensor(tuple(order), norms.device)]
            seen = tuple(int(m.seen and m.grad is not None) for m in members)
            norms = torch.cat([norms, index_tensor(seen, norms.device)[:, None]], dim=1)
        norms = self._whole_norms(norms, members, census)
        if changes is not None:
            here = index_tensor(census.sketching, norms.device)
            norms[:, 2].index_copy_(0, here, changes.to(norms))  # which has the widest dtype
        if not census.layers:
            return norms, norms.new_zeros(0, dtype=torch.bool)
        norms = layer_norms(norms, owner, len(census.layers))
        everyone = slice(0, len(census.layers))
        if all(not isinstance(group["lr"], Tensor) and group["lr"] for group in census.groups):
            live = norms.new_ones(len(census.layers), dtype=torch.bool)  # nearly always
        else:
            before = census.read_layers("prev_norm", everyone, norms.device)
            rated = _has_rate(census.groups, norms.device)[
                index_tensor(census.group_of, norms.device)
            ]
            owners = index_tensor(census.owner, norms.device)
            live = (norms[:, 0] != 0) | (before != NO_PREDECESSOR)
            live = live | (norms.new_zeros(len(live)).index_add(0, owners, rated.to(norms)) > 0)
        return (norms[:, :-1], live & (norms[:, -1] > 0)) if census.hidden else (norms, live)

    def _finite(self, census: Census, norms: Tensor) -> Tensor:
        """Which layers have finite norms; raises for those that are to raise.

        Args:
            census: as from `_collect`.
            norms: of gradients and signals, shape [layers, columns]; not of ‖x_t - x_{t-1}‖, in
                which a history may show that overflowed.

        Raises:
            RuntimeError: with nonfinite="raise", naming the layers. Nothing has been changed.
        """
        layers, finite = census.layers, (norms < math.inf).all(dim=1)  # none is negative
        if census.raises:
            bad = [
                layer.name
                for layer, ok in zip(layers, finite.tolist(), strict=True)
                if layer.options[0].nonfinite == "raise" and not ok
            ]
            if bad:
                raise RuntimeError(
                    f"the gradient norm is not finite in {len(bad)} of {len(layers)} layers "
                    f"({', '.join(bad[:5])}{', ...' if len(bad) > 5 else ''}); nothing was "
                    'changed. nonfinite="skip" leaves such layers alone for the step'
                )
        return finite

    def _follow(
        self, census: Census, norms: Tensor, finite: Tensor, live: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One step of S of every layer, stored in its parameters' state.

        Args:
            census: as from `_collect`.
            norms: ‖x_t‖ and ‖x_t - x_{t-1}‖, shape [layers, 2].
            finite: shape [layers]; where False and nonfinite="skip", the step is left out.
            live: shape [layers]; where False, nothing moves.

        Returns:
            A_t/α_t, and what may change in this step, both of shape [layers].
        """
        factors, goes = [], []
        for (estimator, previous), here in census.kinds:
            go = finite[here] & live[here] if estimator.nonfinite == "skip" else live[here]
            keys = _keys(estimator)
            old = LayerState(*(census.read_layers(key, here, norms.device) for key in keys))
            step = self._steps_taken(norms) + 1.0 if estimator.theoretical else None
            new, factor = estimator.update(old, norms[here, 0], norms[here, 1], step)
            norm = self._signal.remembered(new.prev_norm, factor, previous)
            is_none = new.prev_norm < 0
            new = new._replace(prev_norm=torch.where(is_none, new.prev_norm, norm))
            if estimator.nonfinite == "skip":
                old = estimator.leave_out(old, finite[here])
            for key, before, after in zip(keys, old, new, strict=False):
                assert before is not None
                assert after is not None
                census.write_layers(key, torch.where(go, after, before), here)
            count = census.read_layers("nonfinite_steps", here, norms.device)
            census.write_layers("nonfinite_steps", count + ~finite[here], here)
            factors.append(factor)
            goes.append(go)
        return torch.cat(factors), torch.cat(goes)

    def _steps_taken(self, like: Tensor) -> Tensor:
        """t-1 of Eq. A.3: how often the optimizer, and with it the scheduler, has stepped.

        Not how often a layer has: one that misses steps sees α decay all the same.
        """
        groups = [g for g in self.param_groups if g["params"]]
        counts = [g["lipschitz_step"] for g in groups if "lipschitz_step" in g]
        return torch.stack([like.new_zeros(()), *(x.to(like.device) for x in counts)]).max()

    def _count_step(self, live: Tensor) -> None:
        """Ends a step, also one in which no layer had a gradient."""
        for group in self.param_groups:
            if not self._options(group)[0].theoretical:
                continue
            # ZeRO-3 makes one call of step() for each flat tensor of a group.
            tensors = self._tensors(group)
            if tensors and any(p is tensors[-1] for p in group["params"]):
                if "lipschitz_step" not in group:
                    home = self._home()
                    group["lipschitz_step"] = torch.zeros(
                        (), dtype=_get_scalar_dtype(), device=home
                    )
                count = group["lipschitz_step"]
                taken = live.any().to(count.device) | _has_rate([group], count.device)[0]
                count += taken.to(count.dtype)

    def _tensors(self, group: dict[str, Any]) -> list[Tensor]:
        """The tensors that a group's state is kept for."""
        if group["params"] or not group.get("layer_sizes"):
            return list(group["params"])
        return flat_tensors(self._originals(group))

    def layer_learning_rates(self) -> dict[str, LayerRate]:
        """{layer: (S_t, A_t, ‖x_t‖, non-finite steps)} as of each layer's last step.

        ‖x_t‖ is the norm of the gradient or, in the -U forms, of the update; 0 where it was not
        finite and the step was left out.

        One device-to-host copy for each device that parameters are on; a step itself makes none.
        Layers are named by the names given with the parameters, else by group and position.
        One with parameters in several groups shows the A_t of its first. Layers that have not
        had a gradient yet are left out.
        """
        keys = ("lipschitz_scale", "layer_lr", "prev_norm", "nonfinite_steps")
        rates: dict[str, LayerRate | None] = {}
        rows: dict[torch.device, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for member in self._members(group, self._tensors(group)):
                if member.layer not in rates and member.stored:
                    rates[member.layer] = None  # keeps the order of the model
                    row = torch.stack([member.state[key].detach() for key in keys])
                    rows.setdefault(row.device, {})[member.layer] = row
        for table in rows.values():
            values = torch.stack(list(table.values())).tolist()
            for name, (scale, lr, norm, skipped) in zip(table, values, strict=True):
                rates[name] = LayerRate(scale, lr, max(norm, 0.0), int(skipped))
        return {name: rate for name, rate in rates.items() if rate is not None}

    def _restore_numbers(self, param: Tensor, saved: State) -> None:
        for name, value in saved.items():
            # A history, too, may be of another dtype than its parameter.
            own = name in SCALARS or name.startswith(HISTORIES)
            if own and isinstance(value, Tensor):
                loaded = self.state[param].get(name)
                if name in SCALARS or (loaded is not None and loaded.dtype != value.dtype):
                    self.state[param][name] = value.detach().to(param.device, copy=True)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        """Refuses the state of other parameters before any of it is loaded."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            moments, histories, _ = self._state_keys(group)
            for param, key in zip(group["params"], saved["params"], strict=False):
                state = state_dict["state"].get(key, {})
                for name in (*moments, *(histories if not param.is_complex() else ())):
                    if isinstance(state.get(name), Tensor):
                        _check_shape(name, state[name], param.shape)

    @contextmanager
    def _loading(self) -> Iterator[None]:
        """Within it, load_state_dict keeps our numbers exactly as they were saved.

        torch casts floating-point state to the parameter's dtype, which would make S a bf16.
        What layer a parameter belongs to is not loaded: that is for the model to say.
        """
        loaded: dict[str, Any] = {}
        structure = [structure_of(group) for group in self.param_groups]

        def see(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # The last hook: it sees what the user's hooks made of it.
            loaded.update(by_name(state_dict, self.param_groups))
            self._check_loaded(loaded)
            return loaded

        def restore(_: Optimizer) -> None:
            saved = itertools.chain.from_iterable(g["params"] for g in loaded["param_groups"])
            params = itertools.chain.from_iterable(g["params"] for g in self.param_groups)
            for key, param in zip(saved, params, strict=True):
                self._restore_numbers(param, loaded["state"].get(key, {}))
            for group, own in zip(self.param_groups, structure, strict=True):
                restore_structure(group, own)

        handles = (
            self.register_load_state_dict_pre_hook(see),
            self.register_load_state_dict_post_hook(restore, prepend=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _check_shape(name: str, kept: Tensor, shape: tuple[int, ...]) -> None:
    if kept.shape != shape:
        raise ValueError(
            f"state {name!r} has shape {tuple(kept.shape)} where {tuple(shape)} is needed: it "
            "belongs to another parameter; leave the state of such a parameter out, and it starts "
            "anew"
        )


def _name_of(function: Callable[[str], str]) -> str:
    return getattr(function, "__qualname__", repr(function))


def _has_rate(groups: Sequence[dict[str, Any]], device: torch.device) -> Tensor:
    """Which groups have lr != 0, on the device."""
    rates = [group["lr"] for group in groups]
    if not any(isinstance(lr, Tensor) for lr in rates):
        return index_tensor(tuple(int(lr != 0) for lr in rates), device) > 0
    return torch.stack([as_scalar(lr, device) for lr in rates]) != 0


def apart(state: State) -> State:
    """A parameter's state, of which each number and sketch has memory of its own: pickle writes
    the whole memory of a tensor, and `Census.pack` puts many into one."""

    def is_packed(key: str, x: Any) -> bool:
        small = key in SCALARS or key.endswith(SKETCH)
        return small and isinstance(x, Tensor) and x.untyped_storage().nbytes() > x.nbytes

    return {key: x.clone() if is_packed(key, x) else x for key, x in state.items()}


def by_kind(layers: Sequence[Layer]) -> list[Layer]:
    """Those with the same options side by side, else in their order."""
    kinds = dict.fromkeys(layer.options for layer in layers)
    return [layer for kind in kinds for layer in layers if layer.options == kind]


def forget_predecessor(states: Sequence[State]) -> None:
    """For a layer of whose x_{t-1} a part is lost: S keeps its value at the next step."""
    for state in states:
        norm = state["prev_norm"]
        norm.masked_fill_(norm != NO_PREDECESSOR, FORGOTTEN)


def _unsketchable(what: str) -> NotImplementedError:
    return NotImplementedError(
        f'history="sketch" needs to know which elements of a parameter {what} hold; use '
        'history="exact" or a dtype there, or FSDP2, whose shards can be sketched'
    )


@lru_cache(maxsize=8)
def _keys(estimator: Estimator) -> tuple[str, ...]:
    """The state keys of LayerState's fields."""
    return ("lipschitz_scale", "prev_norm", *(("lipschitz_c",) if estimator.theoretical else ()))
