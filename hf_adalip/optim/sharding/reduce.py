"""Sums over the ranks that share a parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ReduceGroups = tuple[Any, ...]
"""The process groups to sum over, one after the other, to get from a shard to the whole."""


def sum_over_shards(values: Tensor, reduce_groups: Sequence[ReduceGroups]) -> Tensor:
    """Sums rows over the ranks that share each parameter.

    One all-reduce for each process group that anything is sharded over, whatever the number of
    parameters. All ranks make the same calls in the same order, with vectors of the same length.

    Args:
        values: of the local shards (squared norms, sketches), shape [parameters, columns].
        reduce_groups: of each parameter; of all that are sharded, also those without a gradient
            here.

    Returns:
        the sums, the same on all ranks bit for bit.
    """
    rows: dict[dist.ProcessGroup, list[int]] = {}
    for i, groups in enumerate(reduce_groups):
        for group in groups:
            rows.setdefault(group, []).append(i)
    values = values.clone()
    for group, indices in rows.items():
        everything = indices == list(range(len(reduce_groups)))
        part = (values if everything else values[indices]).to(device_of(group, values.device))
        dist.all_reduce(part, group=group)
        if everything:
            values = part.to(values.device)
        else:
            values[indices] = part.to(values.device)
    return values


def device_of(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """A device that the group's backends can reduce on: not the CPU, to which an engine has
    offloaded its states, when there is only NCCL."""
    devices = [entry.partition(":")[0] for entry in dist.get_backend_config(group).split(",")]
    return device if device.type in devices else torch.device(devices[0])
