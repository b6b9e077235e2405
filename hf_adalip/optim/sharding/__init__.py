"""Sharded parameters, of which this rank has a part, and the ranks that have the rest.

S needs the norm of a layer's whole gradient. Everything else works on the local parts. `shard_of`
gives the engine's answer for one parameter (`Shard` is the protocol, and a parameter that is
whole); engines that replace the parameters of an optimizer by flat tensors are `FlatTensors`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .deepspeed import FlatTensors, is_in_flat_tensor, zero3_shape
from .dtensor import DTensorShard, is_dtensor, is_model_parallel
from .fsdp1 import FSDP1Shard, is_fsdp1, refuse_if_fsdp1_took_all
from .reduce import ReduceGroups, sum_over_shards
from .replicas import mean_over, replica_groups
from .shard import Place, Shard
from .wrappers import wrappers

__all__ = [
    "FlatTensors",
    "Place",
    "ReduceGroups",
    "Shard",
    "is_dtensor",
    "is_fsdp1",
    "is_in_deepspeed",
    "is_model_parallel",
    "is_sharded",
    "mean_over",
    "refuse_if_fsdp1_took_all",
    "replica_groups",
    "shard_of",
    "sum_over_shards",
    "whole_shape",
    "wrappers",
]


def shard_of(param: Tensor) -> Shard:
    """How the parameter's engine shards it."""
    if is_dtensor(param):
        return DTensorShard(param)
    return FSDP1Shard(param) if is_fsdp1(param) else Shard(param)


def whole_shape(param: Tensor) -> torch.Size:
    """The shape of the parameter of the model, also where the tensor here is a part of it."""
    shape = zero3_shape(param)
    return shard_of(param).shape if shape is None else shape


def is_sharded(param: Tensor) -> bool:
    """Whether any engine has taken the parameter apart."""
    marks = (is_dtensor, is_fsdp1, is_model_parallel, is_in_deepspeed)
    return any(mark(param) for mark in marks)


def is_in_deepspeed(param: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO has taken the parameter of the model."""
    return hasattr(param, "ds_id") or is_in_flat_tensor(param)
