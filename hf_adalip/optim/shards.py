"""Sharded parameters: DTensors, as FSDP2, HSDP and tensor parallelism make them.

S needs the norm of a layer's whole gradient. Everything else works on the local shards.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def is_dtensor(x: Any) -> TypeGuard[DTensor]:
    """Whether x is a DTensor, without importing (for two seconds) what nobody has imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Any) -> Any:
    """This rank's part of a tensor, as a view; anything but a DTensor is itself."""
    return x.to_local() if is_dtensor(x) else x


def local_grad(param: Tensor) -> Tensor:
    """This rank's part of a gradient, laid out as its parameter is.

    Tensor parallelism may leave it otherwise: replicated, or as partial sums.
    """
    grad = param.grad
    assert grad is not None
    if is_dtensor(param) and is_dtensor(grad):
        if grad.placements != param.placements:
            grad = grad.redistribute(param.device_mesh, param.placements)
        return grad.to_local()
    return grad


def is_sharded(param: Tensor) -> bool:
    """Whether other ranks have parts of the parameter that this one has not."""
    return is_dtensor(param) and any(not p.is_replicate() for p in param.placements)


def sum_over_shards(squares: Tensor, params: Sequence[Tensor]) -> Tensor:
    """Sums squared norms over the ranks that share each parameter.

    One all-reduce for each process group that anything is sharded over, whatever the number of
    parameters. All ranks make the same calls in the same order, with vectors of the same length.

    Args:
        squares: of the local shards, shape [parameters, columns].
        params: the parameters; all that are sharded, also those without a gradient here.

    Returns:
        the sums, the same on all ranks bit for bit.
    """
    over: dict[dist.ProcessGroup, list[int]] = {}
    for i, param in enumerate(params):
        if is_dtensor(param):
            for dim, placement in enumerate(param.placements):
                if not placement.is_replicate():
                    over.setdefault(param.device_mesh.get_group(dim), []).append(i)
    squares = squares.clone()
    for group, indices in over.items():
        everything = indices == list(range(len(params)))
        part = squares if everything else squares[indices]
        dist.all_reduce(part, group=group)
        if not everything:
            squares[indices] = part
    return squares
