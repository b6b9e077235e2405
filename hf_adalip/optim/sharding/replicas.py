"""The ranks that train the same parameters, each on data of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .dtensor import is_dtensor
from .reduce import device_of
from .wrappers import wrappers


def replica_groups(params: Sequence[Tensor]) -> list[dist.ProcessGroup]:
    """The process groups of the DistributedDataParallel modules and of the DTensors' meshes.

    In the same order on all ranks, if they have the parameters in the same order.
    """
    if not dist.is_available() or not dist.is_initialized():
        return []
    ours = {id(param) for param in params}
    ddp = [
        module.process_group
        for module in wrappers(DistributedDataParallel)
        if any(id(param) in ours for param in module.parameters())
    ]
    found = sorted(ddp, key=lambda group: group.group_name)
    for param in params:
        if is_dtensor(param):
            mesh = param.device_mesh
            found += [mesh.get_group(dim) for dim in range(mesh.ndim)]
    return list(dict.fromkeys(found))


def mean_over(groups: Sequence[dist.ProcessGroup], values: Tensor) -> Tensor:
    """The mean over the ranks of all groups, the same on all of them bit for bit."""
    for group in groups:
        part = values.to(device_of(group, values.device), copy=True)
        dist.all_reduce(part, group=group)
        values = (part / dist.get_world_size(group)).to(values.device)
    return values
