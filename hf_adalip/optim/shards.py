"""Sharded parameters: where the rest of a parameter is, of which this rank has a part.

S needs the norm of a layer's whole gradient. Everything else works on the local shards.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor

Over = tuple[Any, ...]
"""The process groups to sum over, one after the other, to get from a shard to the whole."""


def is_dtensor(x: Any) -> TypeGuard[DTensor]:
    """Whether x is a DTensor, without importing (for two seconds) what nobody has imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Any:
    """This rank's part of a tensor, as a view; anything but a DTensor is itself."""
    return x.to_local() if is_dtensor(x) else x


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """This rank's part of a gradient, laid out as its parameter is.

    Tensor parallelism may leave it otherwise: replicated, or as partial sums.
    """
    if is_dtensor(param) and is_dtensor(grad):
        if grad.placements != param.placements:
            grad = grad.redistribute(param.device_mesh, param.placements)
        return grad.to_local()
    return grad


def is_fsdp1(param: Tensor) -> bool:
    """Whether FSDP1 (FullyShardedDataParallel) has made the parameter a part of a flat one."""
    return getattr(param, "_fsdp_flattened", False)


def is_model_parallel(param: Tensor) -> bool:
    """Whether a plain tensor is marked as part of a larger one, as Megatron and DeepSpeed do."""
    marks = ("tensor_model_parallel", "model_parallel")
    return not is_dtensor(param) and any(getattr(param, mark, False) is True for mark in marks)


def sharded_over(param: Tensor) -> Over:
    """The process groups over which a parameter is sharded; none where every rank has it whole."""
    if is_dtensor(param):
        dims = enumerate(param.placements)
        return tuple(param.device_mesh.get_group(d) for d, p in dims if not p.is_replicate())
    return _fsdp1(param).over if is_fsdp1(param) else ()


def whole_shape(param: Tensor) -> torch.Size:
    """The shape of the parameter of the model, also where the tensor here is a flat shard of it."""
    if hasattr(param, "ds_shape"):  # DeepSpeed's ZeRO-3
        return torch.Size(param.ds_shape)
    return _fsdp1(param).shape if is_fsdp1(param) else param.shape


class Place(NamedTuple):
    """Where in the whole parameter a rank's part of it lies."""

    shape: tuple[int, ...]  # of the whole
    offset: tuple[int, ...]


def place_in_whole(param: Tensor) -> Place:
    """The place of a plain tensor or a DTensor; of a complex one, with its two parts as a last
    dimension."""
    shape, offset = tuple(param.shape), (0,) * param.dim()
    if is_dtensor(param):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        mesh, placements = param.device_mesh, param.placements
        local_shape, offset = compute_local_shape_and_global_offset(param.shape, mesh, placements)
        if 0 in local_shape:
            offset = (0,) * param.dim()
    if param.is_complex():
        return Place((*shape, 2), (*offset, 0))
    return Place(shape, tuple(offset))


def start_in_whole(param: Tensor) -> int | None:
    """The row-major index in the whole parameter at which a rank's part begins, if it is a run of
    consecutive elements there, laid out in that order here."""
    shape, offset = place_in_whole(param)
    part = local(param)
    rows = tuple(part.shape[1:]) == shape[1:]
    if not rows or not part.is_contiguous():
        return None
    return offset[0] * math.prod(shape[1:]) if shape else 0


class Slice(NamedTuple):
    """What FSDP1 knows of a parameter."""

    over: Over
    shape: torch.Size
    extended: bool  # tensor parallelism below FSDP1


_FSDP1: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _fsdp1(param: Tensor) -> Slice:
    """FSDP1 leaves no trace of it on a parameter, only in its handles.

    They are found among the objects that are alive, once (in 0.1 s).
    """
    if param not in _FSDP1:
        for handle in _fsdp1_handles():
            over = (handle.process_group,) if handle.uses_sharded_strategy else ()
            flat, extended = handle.flat_param, handle._fsdp_extension is not None
            for held, shape in zip(flat._params or (), flat._shapes, strict=False):
                _FSDP1[held] = Slice(over, shape, extended)
    if param not in _FSDP1:
        raise RuntimeError(
            "a parameter was sharded by a FullyShardedDataParallel module (FSDP1) that is not to "
            "be found (deleted, or hidden by gc.freeze()), so that how it is sharded cannot be "
            "known; use FSDP2 (fsdp_version: 2 in accelerate's configuration, or fully_shard), or "
            "keep the module"
        )
    found: Slice = _FSDP1[param]
    if found.extended:
        raise NotImplementedError(
            "FSDP1 on top of tensor parallelism hides which process groups share a layer; use "
            "FSDP2 (fully_shard), which keeps it in the DTensor"
        )
    return found


def _fsdp1_handles() -> list[Any]:
    module = sys.modules.get("torch.distributed.fsdp._flat_param")
    if module is None:
        return []
    return [x for x in gc.get_objects() if type(x) is module.FlatParamHandle]


def refuse_if_fsdp1_took_all() -> None:
    """For an optimizer none of whose parameters has ever had a gradient."""
    if any(not handle._use_orig_params for handle in _fsdp1_handles()):
        raise RuntimeError(
            "none of the optimizer's parameters has a gradient, and there is a model that FSDP1 "
            "has given flat parameters in their place: set use_orig_params=True "
            "(fsdp_use_orig_params: true in accelerate's configuration), or use FSDP2"
        )


def sum_over_shards(squares: Tensor, over: Sequence[Over]) -> Tensor:
    """Sums squared norms over the ranks that share each parameter.

    One all-reduce for each process group that anything is sharded over, whatever the number of
    parameters. All ranks make the same calls in the same order, with vectors of the same length.

    Args:
        squares: of the local shards, shape [parameters, columns].
        over: of each parameter; all that are sharded, also those without a gradient here.

    Returns:
        the sums, the same on all ranks bit for bit.
    """
    rows: dict[dist.ProcessGroup, list[int]] = {}
    for i, groups in enumerate(over):
        for group in groups:
            rows.setdefault(group, []).append(i)
    squares = squares.clone()
    for group, indices in rows.items():
        everything = indices == list(range(len(over)))
        part = (squares if everything else squares[indices]).to(_device_of(group, squares.device))
        dist.all_reduce(part, group=group)
        if everything:
            squares = part.to(squares.device)
        else:
            squares[indices] = part.to(squares.device)
    return squares


def _device_of(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """A device that the group's backends can reduce on: not the CPU, to which an engine has
    offloaded its states, when there is only NCCL."""
    devices = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return device if device.type in devices else torch.device(devices[0])
