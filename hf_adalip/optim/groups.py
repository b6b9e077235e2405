"""Parameter groups: which layer each of their parameters belongs to."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from .names import plain_names

Layers = Literal["tensor", "module"] | Callable[[str], str]

STRUCTURE = ("param_names", "layer_names", "layer_sizes", "layer_group", "no_weight_decay")
"""Keys of a group that say what its parameters are. They are the model's, and are not loaded."""

ROOT = "(root)"
"""The layer of parameters that belong to the outermost module itself."""


def each_once(params: list[Any], layers: Layers) -> list[Any]:
    """The parameters of a group, given as tensors or as pairs of a name and a tensor, without
    those that are there a second time, of which it warns as torch does.

    Raises:
        ValueError: if there are such and a layer may have several parameters.
    """
    which = _duplicate(params)
    if which is None:
        return params
    if layers != "tensor":
        raise _refusal(which)
    warnings.warn(
        f"optimizer contains a parameter group with duplicate parameters ({which}): each is "
        "stepped once and has one S, where torch's own optimizers step it twice",
        stacklevel=3,
    )
    once: dict[object, Any] = {}
    for param in params:
        once.setdefault(_identity(param), param)
    return list(once.values())


def _identity(param: Any) -> tuple[bool, int]:
    named = isinstance(param, tuple)
    return named, id(param[1] if named else param)  # a mixture of both is for torch to refuse


def _duplicate(params: Sequence[Any]) -> str | None:
    """Which parameter is there a second time: its name or, without one, its position."""
    seen = set()
    for i, param in enumerate(params):
        if _identity(param) in seen:
            return repr(param[0]) if isinstance(param, tuple) else f"number {i}"
        seen.add(_identity(param))
    return None


def _refusal(which: str) -> ValueError:
    return ValueError(
        f"parameter {which} is in a parameter group more than once: its gradient would count twice "
        "in the norm of its layer, or S twice in its step; give each parameter once, as "
        "model.named_parameters() does"
    )


def checked_params(params: Any) -> Any:
    """What an optimizer is made of, or the params of a group; of an iterator, a list.

    Raises:
        TypeError: for a tuple that is no (name, tensor), which torch fails on later, or takes.
    """
    if isinstance(params, (Tensor, set)) or not isinstance(params, Iterable):
        return params  # which torch refuses
    params = [
        {**entry, "params": checked_params(entry["params"])}
        if isinstance(entry, dict) and "params" in entry
        else entry
        for entry in params
    ]
    for entry in params:
        if isinstance(entry, tuple) and not (len(entry) == 2 and isinstance(entry[0], str)):
            parts = ", ".join(type(x).__name__ if isinstance(x, Tensor) else repr(x) for x in entry)
            raise TypeError(
                "params must be tensors, or pairs of a name and a tensor as those of "
                f"model.named_parameters(), got ({parts})"
            )
    return params


def refuse_options(
    group: dict[str, Any], names: tuple[str, ...], wrapper: str, base: Optimizer
) -> None:
    """Refuses options in a parameter group of which a wrapper has one for all groups.

    Raises:
        ValueError: for one that is not the base's own, naming it. Nothing has been changed then.
    """
    for name in names:
        if name in group and name not in base.defaults:
            raise ValueError(
                f"a parameter group has {name}={group[name]!r}, of which {wrapper} has one for all "
                f"groups: give it to {wrapper} itself"
            )


def name_layers(groups: list[dict[str, Any]], layers: Layers) -> None:
    """Gives the last of the groups its "layer_names" and "layer_sizes": of each parameter, its
    layer, and its number of elements, by which a parameter that was replaced is known.

    Raises:
        ValueError: if `layers` is unknown, or needs names and there are none, or there are two
            parameters of one name, or one twice. Nothing has been changed then.
    """
    group = groups[-1]
    if which := _duplicate(group["params"]):
        raise _refusal(which)
    for param in group["params"]:
        if getattr(param, "_is_flat_param", False):
            raise ValueError(
                "a parameter is FSDP1's FlatParameter, in which the layers of a module are lost: "
                "set use_orig_params=True (fsdp_use_orig_params: true in accelerate's "
                "configuration), or use FSDP2"
            )
    group["layer_sizes"] = [_size(param) for param in group["params"]]
    for given in groups:
        _check_names(given)
    names = plain_names(group["param_names"]) if "param_names" in group else None
    known = itertools.chain.from_iterable(plain_names(g.get("param_names", ())) for g in groups)
    twice = {name for name, count in Counter(known).items() if count > 1}
    if layers == "tensor":
        positions = [f"param_groups.{len(groups) - 1}.{i}" for i in range(len(group["params"]))]
        named = zip(names or positions, positions, strict=True)
        group["layer_names"] = [f"{n} ({position})" if n in twice else n for n, position in named]
        return
    if layers != "module" and not callable(layers):
        raise ValueError(
            f'layers must be "tensor", "module" or a function from a name to a name, got {layers!r}'
        )
    if names is None:
        raise ValueError(
            f"layers={layers!r} needs the parameters' names: pass model.named_parameters() instead "
            'of model.parameters(), use create_optimizer(model, ...), or choose layers="tensor"'
        )
    if twice:
        raise ValueError(
            f"two parameters are named {min(twice)!r}, and layers={layers!r} would make one layer "
            "of them; give them different names"
        )
    keys = [layers(n) if callable(layers) else n.rpartition(".")[0] or ROOT for n in names]
    for name, key in zip(names, keys, strict=True):
        if not isinstance(key, str):
            raise ValueError(f"layers must return a string, got {key!r} for {name!r}")
    group["layer_names"] = keys


def _check_names(group: dict[str, Any]) -> None:
    names = group.get("param_names", ())
    if unnamed := [name for name in names if not isinstance(name, str)]:
        raise TypeError(f"the name of a parameter must be a string, got {unnamed[0]!r}")
    if names and len(names) != len(group["params"]):
        raise ValueError(
            f"param_names must have a name for each of {len(group['params'])} parameters, "
            f"got {len(names)}"
        )


def _size(param: Tensor) -> int | None:
    """None for a lazy module's parameter, which has no size yet."""
    return None if torch.nn.parameter.is_lazy(param) else param.numel()


def decays_of(group: dict[str, Any]) -> list[bool]:
    """Whether the group's weight decay is for each of its parameters."""
    spared = set(group.get("no_weight_decay", ()))
    if not spared:
        return [True] * len(group["params"])
    return [name not in spared for name in group.get("param_names", group["params"])]


def group_index(group: dict[str, Any]) -> int:
    """Which of an optimizer's groups it is. (Not id(group), which torch 2.10 cannot compile.)"""
    index: int = group["layer_group"]
    return index


def structure_of(group: dict[str, Any]) -> dict[str, Any]:
    """What a group's parameters are, which loading a state_dict leaves as it is."""
    return {key: group[key] for key in STRUCTURE if key in group}


def restore_structure(group: dict[str, Any], own: dict[str, Any]) -> None:
    """Gives a loaded group the structure that it had before, and none but that."""
    for key in STRUCTURE:
        if key != "param_names":  # which torch loads
            group.pop(key, None)
    group.update(own)
