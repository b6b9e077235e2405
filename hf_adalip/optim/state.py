"""The state of a parameter: its keys, made before its first step, completed after loading.

Each parameter keeps a copy of the numbers of its layer, so that state stays per parameter, as every
checkpoint format wants it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from .estimator import FORGOTTEN, NO_PREDECESSOR
from .history import HISTORIES, SKETCH, Exact, history_of

if TYPE_CHECKING:
    from .step import LayerwiseOptimizer

State = dict[str, Any]

LAYER_SCALARS = ("lipschitz_scale", "prev_norm", "nonfinite_steps", "lipschitz_c")
"""Numbers of a layer."""

SCALARS = (*LAYER_SCALARS, "step", "layer_lr", "prev_lr")
"""All state that is one number, on the parameter's device, and never of its dtype."""


class StateKeys(NamedTuple):
    """What is kept for a parameter."""

    moments: tuple[str, ...]  # tensors of its shape and dtype
    histories: tuple[str, ...]  # of x_{t-1}, in whichever way it is kept
    scalars: tuple[str, ...]


def complete(
    optimizer: LayerwiseOptimizer,
    state: State,
    param: Tensor,
    group: dict[str, Any],
    parts: tuple[int, ...],
) -> bool:
    """Adds to a tensor's state what it lacks, as it is before a first step.

    It lacks everything at first, and later what an older checkpoint did not have or an option
    that was changed calls for. Of a flat tensor, a number of the state is a vector with an
    element for each of its parts.

    Returns:
        whether it lacked x_{t-1}, which is to be forgotten of the whole layer then.
    """
    moments, histories, scalars = optimizer._state_keys(group)
    estimator, _ = optimizer._layer_options(group)
    history = history_of(group, param)
    new = not state
    for name in moments:
        if state.get(name) is None:
            state[name] = Exact().empty(param)
        check_shape(name, state[name], Exact().shape(param))
    keys = [history.key(name) for name in histories]
    previous = [n for n in scalars if n.startswith("prev_")]
    for name in [n for n in state if n.startswith((*HISTORIES, "prev_lr"))]:
        if name not in (*keys, *previous):
            del state[name]  # of other options; if they come back, it is x_{t-1} no longer
    for key in keys:
        if state.get(key) is not None:
            state[key] = history.converted(state[key], param)
    lost = any(state.get(n) is None for n in (*previous, *keys))
    for key in keys:
        if state.get(key) is None:
            state[key] = history.empty(param)
        check_shape(key, state[key], history.shape(param))
    initial = dict.fromkeys((*scalars, "nonfinite_steps", "layer_lr"), 0.0) | estimator.initial
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


def complete_loaded(optimizer: LayerwiseOptimizer) -> None:
    """`complete` for all parameters that have state."""
    states: dict[str, list[State]] = {}
    lost = set()
    for group in optimizer.param_groups:
        flat = optimizer._flat_tensors.is_flat(group)
        for i, tensor in enumerate(group["params"]):
            if state := optimizer.state.get(tensor):
                parts = (len(optimizer._flat_tensors.parts(tensor, group)),) if flat else ()
                without = complete(optimizer, state, tensor, group, parts)
                if not flat:  # which holds its layers whole
                    layer = group["layer_names"][i]
                    states.setdefault(layer, []).append(state)
                    lost |= {layer} if without else set()
    for layer in lost:
        forget_predecessor(states[layer])


def forget_predecessor(states: Sequence[State]) -> None:
    """For a layer of whose x_{t-1} a part is lost: S keeps its value at the next step."""
    for state in states:
        norm = state["prev_norm"]
        norm.masked_fill_(norm != NO_PREDECESSOR, FORGOTTEN)


def filled(shape: tuple[int, ...], value: float, param: Tensor) -> Tensor:
    """A number of the state, or one for each part of a flat tensor: float32 whatever the
    parameter's dtype (float64 if that is torch's default dtype, as in torch.optim), on the
    parameter's device."""
    return torch.full(shape, value, dtype=_get_scalar_dtype(), device=param.device)


def unpacked(state: Any) -> Any:
    """A parameter's state with each number and sketch copied out of the vector or matrix that
    `StepPlan.pack` has made them views of, which pickle would write whole. An entry that belongs
    to no parameter, and is no dict, is returned as it is."""
    if not isinstance(state, dict):
        return state

    def is_packed(key: str, x: Any) -> bool:
        small = key in SCALARS or key.endswith(SKETCH)
        return small and isinstance(x, Tensor) and x.untyped_storage().nbytes() > x.nbytes

    return {key: x.clone() if is_packed(key, x) else x for key, x in state.items()}


def check_shape(name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        raise ValueError(
            f"state {name!r} has shape {tuple(value.shape)} where {tuple(shape)} is needed: it "
            "belongs to another parameter; leave the state of such a parameter out, and it starts "
            "anew"
        )
