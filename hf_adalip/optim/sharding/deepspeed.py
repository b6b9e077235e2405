"""Flat tensors: DeepSpeed's ZeRO puts its rank's shards of many parameters into one tensor.

It replaces the parameters of a group by such tensors. DeepSpeed notes on the model's
parameters where in them each one is; nothing of DeepSpeed is imported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .dtensor import is_model_parallel
from .fsdp1 import is_fsdp1
from .reduce import ReduceGroups

if TYPE_CHECKING:
    from ..batch import Layer

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
    """The part of a parameter that is in a flat tensor of this rank; possibly empty (size 0)."""

    layer: str
    decays: bool
    start: int
    size: int
    reduce_groups: ReduceGroups


class FlatTensors:
    """The parameters that an optimizer was given, and the flat tensors that DeepSpeed has put in
    the place of some.

    Only ZeRO does that. Without it `is_flat` is False, and nothing else here is used.
    """

    sketch_problem = "DeepSpeed's flat tensors"

    def __init__(self) -> None:
        self._given: list[tuple[list[str], list[bool], list[Tensor]]] = []
        self._parts: Any = WeakIdKeyDictionary()

    def note(self, group: dict[str, Any], decays: list[bool]) -> None:
        """Keeps hold of a group's parameters, and numbers the group.

        Of the list that they are in: DeepSpeed, whose flat tensors need them, puts another list
        in its place, and accelerate empties it, so as to have their memory. (A weak reference to
        each would keep torch from swapping it, as FSDP2 does when a module is converted.)
        """
        group["layer_group"] = len(self._given)
        self._given.append((list(group["layer_names"]), decays, group["params"]))

    def originals(self, group: dict[str, Any] | None = None) -> list[Original]:
        """The parameters of a group, or of all, as they were given."""
        given = self._given
        if group is not None:
            index = group.get("layer_group", len(given))
            given = given[index : index + 1]
        return [
            Original(*of)
            for names, decays, params in given
            for of in zip(names, decays, params, strict=False)
        ]

    def is_flat(self, group: dict[str, Any]) -> bool:
        """Whether flat tensors are in the place of the group's parameters."""
        params, sizes = group["params"], group.get("layer_sizes", ())
        if len(params) != len(sizes):
            return True
        if len(params) == 1:
            # A flat tensor of one parameter may be of its size.
            held = [x.param for x in self.originals(group) if is_in_flat_tensor(x.param)]
            if held and held[0] is not params[0]:
                return True
        others = [
            p
            for p, size in zip(params, sizes, strict=True)
            if size not in (None, p.numel()) and p.requires_grad and not is_fsdp1(p)
        ]
        if not others:
            return False
        given = {id(x.param) for x in self.originals(group)}
        return any(id(p) not in given for p in others)  # else p.data = ... has given it a size

    def parts(self, flat: Tensor, group: dict[str, Any]) -> list[Part]:
        """The parts of a flat tensor: on every rank the same layers in the same order.

        Raises:
            RuntimeError: if it cannot be known, or what DeepSpeed says of it is wrong.
        """
        if flat not in self._parts:
            self._parts[flat] = _parts_of(flat, self.originals(group))
        found: list[Part] = self._parts[flat]
        return found

    def tensors(self, group: dict[str, Any]) -> list[Tensor]:
        """The tensors that a group's state is kept for. ZeRO-3 leaves a group without parameters
        between two steps."""
        if group["params"] or not group.get("layer_sizes"):
            return list(group["params"])
        found: dict[int, Tensor] = {}
        for _, _, param in self.originals(group):
            zero3 = _zero3(param)
            if zero3 is not None and is_in_flat_tensor(param):
                index = _position(zero3, param)[0]
                found[index] = zero3.fp32_partitioned_groups_flat[index]
        return list(found.values())

    def refuse_unknown(self, group: dict[str, Any], tensors: Sequence[Tensor]) -> None:
        """Raises RuntimeError for flat tensors that nothing is known of."""
        if not any(is_in_flat_tensor(x.param) for x in self.originals(group)):
            given = sum(group.get("layer_sizes", ()))
            now = sum(p.numel() for p in tensors)
            raise _unknown(
                f"{len(group['layer_names'])} with {given} elements, now {len(tensors)} with {now}"
            )

    def refuse_without_scale(self) -> None:
        """For a flat tensor with state that lacks S."""
        raise RuntimeError(
            "a flat tensor has state but no S, which DeepSpeed's universal checkpoints "
            "leave out: resume from the checkpoint that was converted, under the same "
            "stage and number of ranks"
        )

    def refuse_split_layers(self, layers: Iterable[Layer]) -> None:
        """ZeRO steps one flat tensor after the other: a layer must not lie in two of them."""
        held = Counter(x.layer for x in self.originals() if is_in_flat_tensor(x.param))
        for layer in layers:
            if len(layer.all) < held[layer.name]:
                raise RuntimeError(
                    f"DeepSpeed steps only {len(layer.all)} of the {held[layer.name]} parameters "
                    f"of layer {layer.name!r} at once, because they are in different parameter "
                    "groups (with and without weight decay) or sub-groups, so that the norm of "
                    'the layer cannot be had: choose layers="tensor", or one group (as '
                    "create_optimizer makes it for our six, or with weight_decay=0) and a larger "
                    "sub_group_size"
                )


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(_UNKNOWN.format(what))


def is_in_flat_tensor(param: Tensor) -> bool:
    """Whether ZeRO has the parameter in a flat tensor (frozen ones it has not)."""
    zero3 = _zero3(param)
    if zero3 is not None:
        return zero3.get_param_id(param) in zero3.grad_position
    return hasattr(param, "_hp_mapping")


def _parts_of(flat: Tensor, originals: Sequence[Original]) -> list[Part]:
    held = [original for original in originals if is_in_flat_tensor(original.param)]
    parts = [part for x in held if (part := _part(flat, x)) is not None]
    if not parts:
        raise _unknown(f"{len(originals)} parameters, now one of {flat.numel()} elements")
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
    layer, decays, groups = original.layer, original.decays, (param._dp_group,)
    if param._hp_mapping is None:
        return Part(layer, decays, 0, 0, groups)
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
    return Part(layer, decays, here.start, here.numel, groups)


def _part_zero3(flat: Tensor, original: Original, zero3: Any) -> Part | None:
    """ZeRO-3 cuts every parameter into equal shards, the last ones padded with anything."""
    param: Any = original.param
    index, start, padded = _position(zero3, param)
    if zero3.fp32_partitioned_groups_flat[index] is not flat:
        return None
    rank = dist.get_rank(param.ds_process_group)
    size = min(max(param.ds_numel - rank * padded, 0), padded)
    return Part(original.layer, original.decays, start, size, (param.ds_process_group,))


def zero3_shape(param: Any) -> torch.Size | None:
    """The shape of a parameter that ZeRO-3 has taken apart."""
    return torch.Size(param.ds_shape) if hasattr(param, "ds_shape") else None


def _zero3(param: Tensor) -> Any:
    return getattr(param, "_z3_optimizer", None)


def _position(zero3: Any, param: Tensor) -> tuple[int, int, int]:
    """Which flat tensor a parameter's shard is in, where, and its size with padding."""
    index, start, size = zero3.grad_position[zero3.get_param_id(param)]
    return index, start, size
