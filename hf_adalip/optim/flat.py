"""Flat tensors: DeepSpeed's ZeRO puts its rank's shards of many parameters into one tensor.

It replaces the parameters of a group by such tensors. What of which parameter lies where in them
is written on the parameters themselves, which the model keeps; nothing of DeepSpeed is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor

from .shards import Over, is_model_parallel

_UNKNOWN = (
    "the parameters of a group were replaced ({}) by tensors in which layers cannot be told apart. "
    "By hand, use add_param_group or make a new optimizer; engines that work are FSDP2 "
    "(fsdp_version: 2 in accelerate's configuration), DDP, FSDP1 with use_orig_params=True, and "
    "DeepSpeed ZeRO with an optimizer that was made from the parameters of the model that "
    "DeepSpeed trains"
)


class Original(NamedTuple):
    """A parameter as it was given to the optimizer."""

    layer: str
    decays: bool  # whether the group's weight decay is for it
    param: Tensor


class Part(NamedTuple):
    """What of a parameter lies in a flat tensor of this rank; possibly nothing (size 0)."""

    layer: str
    decays: bool
    start: int
    size: int
    over: Over


def unknown(what: str) -> RuntimeError:
    return RuntimeError(_UNKNOWN.format(what))


def is_held(param: Tensor) -> bool:
    """Whether ZeRO has the parameter in a flat tensor (frozen ones it has not)."""
    zero3 = _zero3(param)
    if zero3 is not None:
        return zero3.get_param_id(param) in zero3.grad_position
    return hasattr(param, "_hp_mapping")


def flat_tensors(originals: Sequence[Original]) -> list[Tensor]:
    """ZeRO-3's flat tensors of a group, which has no parameters between two steps."""
    found: dict[int, Tensor] = {}
    for _, _, param in originals:
        zero3 = _zero3(param)
        if zero3 is not None and is_held(param):
            index = _position(zero3, param)[0]
            found[index] = zero3.fp32_partitioned_groups_flat[index]
    return list(found.values())


def parts_of(flat: Tensor, originals: Sequence[Original]) -> list[Part]:
    """The parts of a flat tensor: on every rank the same layers in the same order.

    Raises:
        RuntimeError: if it cannot be known, or what DeepSpeed says of it is wrong.
    """
    held = [original for original in originals if is_held(original.param)]
    parts = [part for x in held if (part := _part(flat, x)) is not None]
    if not parts:
        raise unknown(f"{len(originals)} parameters, now one of {flat.numel()} elements")
    return parts


def _part(flat: Tensor, original: Original) -> Part | None:
    if is_model_parallel(original.param):
        raise NotImplementedError(
            f"layer {original.layer!r} is split by a tensor parallelism besides ZeRO, so that its "
            "norm cannot be had; use FSDP2 with torch's or transformers' tensor parallelism"
        )
    zero3 = _zero3(original.param)
    return _part_zero3(flat, original, zero3) if zero3 else _part_zero12(flat, original)


def _part_zero12(flat: Tensor, original: Original) -> Part:
    """ZeRO-1 and 2 lay the parameters of a group end to end, and cut that into equal shards."""
    param: Any = original.param
    layer, decays, over = original.layer, original.decays, (param._dp_group,)
    if param._hp_mapping is None:
        return Part(layer, decays, 0, 0, over)
    here, whole = param._hp_mapping.hp_fragment_address, param._hp_mapping.lp_fragment_address
    # The model's parameters are views of what is cut. (Their values may be ahead of the flat
    # tensor's: while a checkpoint is loaded, they are.)
    shard = dist.get_rank(param._dp_group) * flat.numel()
    if param.storage_offset() + whole.start != shard + here.start:
        raise RuntimeError(
            f"DeepSpeed's map of a flat tensor is wrong for layer {layer!r}: another parameter is "
            "there, and S would be another layer's. round_robin_gradients does this: set it to "
            "false in DeepSpeed's configuration"
        )
    return Part(layer, decays, here.start, here.numel, over)


def _part_zero3(flat: Tensor, original: Original, zero3: Any) -> Part | None:
    """ZeRO-3 cuts every parameter into equal shards, the last ones padded with anything."""
    param: Any = original.param
    index, start, padded = _position(zero3, param)
    if zero3.fp32_partitioned_groups_flat[index] is not flat:
        return None
    rank = dist.get_rank(param.ds_process_group)
    size = min(max(param.ds_numel - rank * padded, 0), padded)
    return Part(original.layer, original.decays, start, size, (param.ds_process_group,))


def _zero3(param: Tensor) -> Any:
    return getattr(param, "_z3_optimizer", None)


def _position(zero3: Any, param: Tensor) -> tuple[int, int, int]:
    """Which flat tensor a parameter's shard is in, where, and its size with padding."""
    index, start, size = zero3.grad_position[zero3.get_param_id(param)]
    return index, start, size
