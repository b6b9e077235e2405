"""Loading a state_dict: checked whole before any of it is applied, and numbers kept as saved."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .estimator import FORGOTTEN, NO_PREDECESSOR, is_number
from .groups import restore_structure, structure_of
from .history import HISTORIES, SKETCH, real
from .names import by_name
from .sharding import shard_of
from .state import SCALARS, State, check_shape, complete_loaded

if TYPE_CHECKING:
    from .step import LayerwiseOptimizer

_FLAGS = ("foreach", "fused", "maximize", "capturable", "differentiable")
_COUNTS = ("step", "nonfinite_steps")
"""Numbers that no gradient makes NaN, whatever `nonfinite` is."""


@contextmanager
def loading(optimizer: LayerwiseOptimizer) -> Iterator[None]:
    """Within it, load_state_dict refuses before it changes anything, and keeps our numbers exactly
    as they were saved.

    torch casts floating-point state to the parameter's dtype, which would make S a bf16.
    What layer a parameter belongs to is not loaded: that is for the model to say.
    """
    loaded: dict[str, Any] = {}
    structure = [structure_of(group) for group in optimizer.param_groups]

    def see(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        # The last hook: it sees what the user's hooks made of it.
        check_form(state_dict)
        loaded.update(by_name(state_dict, optimizer.param_groups))
        optimizer._check_loaded(loaded)
        return loaded

    def restore(_: Optimizer) -> None:
        saved = itertools.chain.from_iterable(g["params"] for g in loaded["param_groups"])
        params = itertools.chain.from_iterable(g["params"] for g in optimizer.param_groups)
        for key, param in zip(saved, params, strict=True):
            restore_scalars(optimizer, param, loaded["state"].get(key, {}))
        for group, own in zip(optimizer.param_groups, structure, strict=True):
            restore_structure(group, own)
        complete_loaded(optimizer)

    handles = (
        optimizer.register_load_state_dict_pre_hook(see),
        optimizer.register_load_state_dict_post_hook(restore, prepend=True),
    )
    try:
        with unchanged_if_refused(optimizer):
            yield
    finally:
        for handle in handles:
            handle.remove()


def restore_scalars(optimizer: LayerwiseOptimizer, param: Tensor, saved: State) -> None:
    """Restores numbers and histories, which torch has cast to the parameter's dtype."""
    for name, value in saved.items():
        own = name in SCALARS or name.startswith(HISTORIES)
        if own and isinstance(value, Tensor):
            loaded = optimizer.state[param].get(name)
            if name in SCALARS or (loaded is not None and loaded.dtype != value.dtype):
                optimizer.state[param][name] = value.detach().to(param.device, copy=True)


def saved_group(
    optimizer: LayerwiseOptimizer, group: dict[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """A group as it will be once a saved one is loaded."""
    return {**optimizer.defaults, **saved, **structure_of(group), "params": group["params"]}


def check_loaded(optimizer: LayerwiseOptimizer, state_dict: dict[str, Any]) -> None:
    """Refuses a state that training cannot continue from."""
    numbers = []
    for own, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=False):
        check_step_of_c(saved)
        group = saved_group(optimizer, own, saved)
        propagates = optimizer._layer_options(group)[0].nonfinite == "propagate"
        moments, histories, _ = optimizer._state_keys(group)
        for param, key in zip(own["params"], saved["params"], strict=False):
            state = state_dict["state"].get(key, {})
            numbers.append((key, state, propagates))
            for name in moments:
                check_tensor(key, name, state.get(name))
                if isinstance(state.get(name), Tensor):
                    check_shape(name, state[name], param.shape)
            for name in histories:
                check_tensor(key, name + SKETCH, state.get(name + SKETCH))
                check_tensor(key, name, history := state.get(name))
                if history is not None:
                    check_shape(name, real(history), real(param).shape)
    check_numbers(numbers)


def refuse_unless_dict(state_dict: object) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            "state_dict must be a dict, as an optimizer's state_dict() gives it, got "
            f"{type(state_dict).__name__}"
        )


def check_form(state_dict: Any) -> None:
    """Refuses what does not consist of the state of parameters and of groups.

    Raises:
        TypeError: if it is no dict.
        ValueError: naming what is missing, or of another type.
    """
    refuse_unless_dict(state_dict)
    for key, kind, what in (
        ("state", Mapping, "a dict"),
        ("param_groups", (list, tuple), "a list"),
    ):
        if key not in state_dict:
            found = ", ".join(map(repr, list(state_dict)[:5])) or "nothing"
            raise ValueError(f"the state_dict has no {key!r}, but {found}: pass an optimizer's own")
        _refuse_unless(isinstance(state_dict[key], kind), key, what, state_dict[key])
    known = set()
    for i, group in enumerate(state_dict["param_groups"]):
        _refuse_unless(isinstance(group, Mapping), f"param_groups[{i}]", "a dict", group)
        params = group.get("params")
        _refuse_unless(
            isinstance(params, (list, tuple)), f"param_groups[{i}]['params']", "a list", params
        )
        names = group.get("param_names", [])
        are_names = isinstance(names, (list, tuple)) and all(isinstance(n, str) for n in names)
        _refuse_unless(are_names, f"param_groups[{i}]['param_names']", "a list of names", names)
        known.update(params)
    for key, state in state_dict["state"].items():
        if key in known:
            _refuse_unless(isinstance(state, Mapping), f"state[{key!r}]", "a dict", state)


def _refuse_unless(right: bool, where: str, what: str, found: object) -> None:
    if not right:
        raise ValueError(f"{where} of the state_dict must be {what}, got {_short(found)}")


def check_tensor(key: object, name: str, value: object) -> None:
    """Refuses a value that should be a tensor and is not; None is one that is missing."""
    if value is not None and not isinstance(value, Tensor):
        raise ValueError(
            f"state {name!r} of parameter {key!r} must be a tensor, got {_short(value)}; leave it "
            "out, and it starts anew"
        )


def check_numbers(states: Iterable[tuple[Any, Mapping[str, Any], bool]]) -> None:
    """Refuses numbers that no training produces; waits for each device once.

    Args:
        states: of each parameter what it is called, its saved state, and whether it may have been
            computed from a gradient that is not finite (nonfinite="propagate").

    Raises:
        ValueError: naming the number.
    """
    found: dict[Any, list[tuple[Any, str, bool, Tensor]]] = {}
    for key, state, propagates in states:
        for name in SCALARS:
            value = state.get(name)
            if value is None:
                continue
            if isinstance(value, Tensor) and not value.is_complex():
                x = shard_of(value).local(value).detach()
                if type(x) is Tensor and not x.is_meta:  # else there are no numbers to look at
                    found.setdefault(x.device, []).append((key, name, propagates, x))
            elif is_number(value):
                x = torch.tensor(float(value), dtype=torch.float64)
                found.setdefault("numbers", []).append((key, name, propagates, x))
            else:
                raise ValueError(
                    f"state {name!r} of parameter {key!r} must be a number, got {_short(value)}"
                )
    for entries in found.values():
        flat = torch.cat([x.reshape(-1).to(torch.float64) for *_, x in entries])
        values = iter(flat.tolist())
        for key, name, propagates, x in entries:
            for _ in range(x.numel()):  # one for each part of a flat tensor
                _check_number(key, name, next(values), propagates)


def _check_number(key: object, name: str, value: float, propagates: bool) -> None:
    if propagates and name not in _COUNTS and not math.isfinite(value):
        return
    if name == "prev_norm":
        right, what = value >= 0 or value in (NO_PREDECESSOR, FORGOTTEN), "a finite norm"
    elif name in ("lipschitz_scale", "lipschitz_c"):
        right, what = value > 0, "a finite number > 0"
    else:
        right, what = value >= 0, "a finite number >= 0"
    if not (right and value < math.inf):
        raise ValueError(
            f"state {name!r} of parameter {key!r} must be {what}, got {value}; leave the state of "
            "such a parameter out, and it starts anew"
        )


def check_step_of_c(group: Mapping[str, Any]) -> None:
    """The count of a group with c="theoretical"."""
    count = group.get("lipschitz_step")
    if count is None:
        return
    right = isinstance(count, Tensor) and count.numel() == 1
    if right and not count.is_meta:
        right = 0 <= count.item() < math.inf
    if not right:
        raise ValueError(
            "lipschitz_step of a saved group must be a tensor of one number >= 0, got "
            f"{_short(count)}"
        )


def is_torchs(base: Optimizer) -> bool:
    return type(base).__module__.startswith("torch.optim.")


def check_base_group(base: Optimizer, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuses options that a base optimizer cannot have: where it is torch's, what its constructor
    refuses; and in any, what is no number in the place of one."""
    for name, value in saved.items():
        if not is_number(own.get(name)) and not (name == "lr" and isinstance(own[name], Tensor)):
            continue
        number = value
        if isinstance(value, Tensor) and value.numel() == 1:
            number = value.item()
        if (
            not is_number(number)
            or math.isnan(number)
            or (name == "lr" and not 0 <= number < math.inf)
        ):
            what = "a finite number >= 0" if name == "lr" else "a number"
            raise ValueError(f"{name} of a saved group must be {what}, got {_short(value)}")
    if not is_torchs(base):
        return
    kind = type(base)
    group = {**own, **saved}
    accepted = inspect.signature(kind.__init__).parameters
    options = {n: x for n, x in group.items() if n in accepted and n not in ("params", *_FLAGS)}
    options = {n: x.item() if isinstance(x, Tensor) else x for n, x in options.items()}
    try:
        kind([torch.zeros(1, 1)], **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"a saved group has an option that {kind.__name__} refuses: {error}"
        ) from None


def check_base_state(base: Optimizer, key: object, param: Tensor, saved: Mapping[str, Any]) -> None:
    """Refuses a base's state of another parameter."""
    current = base.state.get(param) or {}
    torchs = is_torchs(base)
    for name, value in saved.items():
        now = current.get(name)
        if isinstance(now, Tensor):
            if not is_number(value):
                check_tensor(key, name, value)
            shape = now.shape
        elif torchs and isinstance(value, Tensor) and value.dim() and not name.endswith("_var"):
            shape = param.shape  # Adafactor's row_var and col_var have others
        elif torchs and not isinstance(value, Tensor) and not is_number(value):
            check_tensor(key, name, value)
            continue
        else:
            continue
        if isinstance(value, Tensor) and value.shape != shape:
            check_shape(name, value, tuple(shape))


@contextmanager
def unchanged_if_refused(*optimizers: Optimizer) -> Iterator[None]:
    """Puts back the state and the groups that optimizers had, where loading raises: torch's
    `load_state_dict` makes new ones."""
    before = [(x, x.state, x.param_groups, [dict(g) for g in x.param_groups]) for x in optimizers]
    try:
        yield
    except BaseException:
        for optimizer, state, groups, options in before:
            optimizer.state, optimizer.param_groups = state, groups
            for group, had in zip(groups, options, strict=True):
                group.clear()
                group.update(had)
        raise


def _short(value: object) -> str:
    text = repr(value)
    kind = type(value).__name__
    return text if len(text) <= 60 and "\n" not in text else f"a {kind} ({text[:40]!r}...)"
