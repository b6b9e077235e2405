"""FSDP1 (FullyShardedDataParallel): parameters that are slices of a flat parameter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .reduce import ReduceGroups
from .shard import Shard
from .wrappers import wrappers


def is_fsdp1(param: Tensor) -> bool:
    """Whether FSDP1 has made the parameter a part of a flat one."""
    return getattr(param, "_fsdp_flattened", False)


class FSDP1Shard(Shard):
    """A parameter under use_orig_params=True: a flat slice, of size 0 on most ranks."""

    hides_gradients = True
    sketch_problem = "FSDP1's slices"

    @property
    def reduce_groups(self) -> ReduceGroups:  # type: ignore[override]
        return _slice(self.param).reduce_groups

    @property
    def shape(self) -> torch.Size:
        return _slice(self.param).shape


class _Slice(NamedTuple):
    """What FSDP1 knows of a parameter."""

    reduce_groups: ReduceGroups
    shape: torch.Size
    extended: bool  # tensor parallelism below FSDP1


_SLICES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _slice(param: Tensor) -> _Slice:
    if param not in _SLICES:
        for handle in _handles():
            groups = (handle.process_group,) if handle.uses_sharded_strategy else ()
            flat, extended = handle.flat_param, handle._fsdp_extension is not None
            for held, shape in zip(flat._params or (), flat._shapes, strict=False):
                _SLICES[held] = _Slice(groups, shape, extended)
    if param not in _SLICES:
        raise RuntimeError(
            "a parameter was sharded by a FullyShardedDataParallel module (FSDP1) that is not to "
            "be found (deleted, or made before hf_adalip was imported), so that how it is sharded "
            "cannot be known; import hf_adalip first and keep the module, or use FSDP2 "
            "(fsdp_version: 2 in accelerate's configuration, or fully_shard)"
        )
    found: _Slice = _SLICES[param]
    if found.extended:
        raise NotImplementedError(
            "FSDP1 on top of tensor parallelism hides which process groups share a layer; use "
            "FSDP2 (fully_shard), which keeps it in the DTensor"
        )
    return found


def _handles() -> Iterator[Any]:
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is not None:
        for wrapper in wrappers(module.FullyShardedDataParallel):
            if wrapper._handle is not None:
                yield wrapper._handle


def refuse_if_fsdp1_took_all() -> None:
    """For an optimizer none of whose parameters has ever had a gradient."""
    if any(not handle._use_orig_params for handle in _handles()):
        raise RuntimeError(
            "none of the optimizer's parameters has a gradient, and there is a model that FSDP1 "
            "has given flat parameters in their place: set use_orig_params=True "
            "(fsdp_use_orig_params: true in accelerate's configuration), or use FSDP2"
        )
