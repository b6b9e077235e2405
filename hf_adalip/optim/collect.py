"""Which layers have a gradient now: the plan of a step, collected from the parameter groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .batch import Layer, LayerOptions, LocalParam
from .groups import decays_of, group_index
from .history import history_of
from .plan import StepPlan, home_device
from .rounding import seeds_of
from .sharding import (
    ReduceGroups,
    Shard,
    is_model_parallel,
    refuse_if_fsdp1_took_all,
    shard_of,
)
from .state import LAYER_SCALARS, State, complete, forget_predecessor

if TYPE_CHECKING:
    from .step import LayerwiseOptimizer


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
        elif param.tensor_state or not param.has_grad:
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
    if plan.is_reusable:
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
        each = group["layer_names"], tensors, decays_of(group), seeds_of(group)
        for layer, param, decays, seed in zip(*each, strict=True):
            yield local_param(optimizer, layer, param, group, decays, seed)
        return
    flat_tensors.refuse_unknown(group, tensors)
    if group.get("history") == "sketch":
        raise _unsketchable(flat_tensors.sketch_problem)
    for flat in tensors:
        tensor_state, parts = _tensor_state(optimizer, flat), flat_tensors.parts(flat, group)
        if not tensor_state and optimizer.state.get(flat):
            flat_tensors.refuse_without_scale()
        for i, (layer, decays, start, size, reduce_groups) in enumerate(parts):
            span = slice(start, start + size)
            param = flat.detach()[span]
            yield LocalParam(
                *(layer, flat, group, tensor_state, param, decays, Shard(param), reduce_groups),
                part=i,
                parts=(len(parts),),
                span=span,
            )


def local_param(
    optimizer: LayerwiseOptimizer,
    layer: str,
    param: Tensor,
    group: dict[str, Any],
    decays: bool,
    seed: int | None,
) -> LocalParam:
    """A parameter that is no part of a flat tensor."""
    shard, tensor_state = shard_of(param), _tensor_state(optimizer, param)
    sketch = history_of(group, param).size if optimizer._state_keys(group).histories else 0
    seed = seed if param.dtype == torch.bfloat16 else None
    return LocalParam(
        layer, param, group, tensor_state, param, decays, shard, shard.reduce_groups, sketch, seed
    )


def _tensor_state(optimizer: LayerwiseOptimizer, tensor: Tensor) -> State:
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
    known = next((p for p in layer.all if p.tensor_state), None)
    lost = False
    for param in layer.all:
        new = not param.tensor_state
        without = complete(optimizer, param.tensor_state, param.tensor, param.group, param.parts)
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
