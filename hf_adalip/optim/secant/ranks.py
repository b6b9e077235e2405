"""Where several ranks train: every one of them measures alike, and all find the same numbers.

A rank may have a part of a parameter (FSDP2) and a part of the data (DDP, FSDP2). Slopes of parts
of parameters are summed. Then they are averaged over the ranks: u is the same on all of them, so
that the mean of the <g_r, u> is <the mean of the g_r, u>, whether the g_r are each rank's own
(under DDP's `no_sync`) or DDP has averaged them already and they are equal. What one rank cannot
compute (inf, NaN) is inf or NaN for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..sharding import (
    is_fsdp1,
    is_in_deepspeed,
    mean_over,
    replica_groups,
    shard_of,
    sum_over_shards,
)
from .probe import slopes


def slope(params: Sequence[Tensor], steps: Sequence[Tensor], with_gradients: bool = True) -> Tensor:
    """<g, d>, ‖g‖² and ‖d‖² over all parameters, as a vector of three numbers.

    Args:
        params: whose gradients are taken.
        steps: what the step subtracted from each, d = a·u.
        with_gradients: False where there are none yet; the first two numbers are 0 then.
    """
    shards = [shard_of(param) for param in params]
    grads = [param.grad if with_gradients else None for param in params]
    if any(grad is not None and grad.is_sparse for grad in grads):
        raise RuntimeError("Secant takes no sparse gradients; use sparse=False")
    rows = slopes(
        [
            None if grad is None else shard.local_grad(grad)
            for shard, grad in zip(shards, grads, strict=True)
        ],
        [shard.local(step) for shard, step in zip(shards, steps, strict=True)],
    )
    sums = sum_over_shards(rows, [shard.reduce_groups for shard in shards]).sum(0)
    return mean_over(replica_groups(params), sums)


def average_gradients(params: Sequence[Tensor]) -> None:
    """Gives all ranks the mean of their gradients, which `no_sync` leaves each with its own."""
    for param in params:
        # those of shards have been reduced; under DDP a rank may lack one that another has
        if (groups := replica_groups([param])) and shard_of(param).local(param) is param:
            grad = torch.zeros_like(param) if param.grad is None else param.grad
            param.grad = mean_over(groups, grad)


def any_rank(params: Sequence[Tensor], here: bool) -> bool:
    """Whether it is so on any of the ranks."""
    flag = torch.tensor(float(here), device=params[0].device)
    return bool(mean_over(replica_groups(params), flag))


def refuse_engines(params: Iterable[Tensor]) -> None:
    """Raises RuntimeError for engines that keep steps or gradients to themselves."""
    for param in params:
        if is_in_deepspeed(param):
            raise RuntimeError(
                "Secant cannot train under DeepSpeed, whose engine keeps the gradients and takes "
                "the steps itself; use DDP, or FSDP2 (fsdp_version: 2) for a model that is too "
                "large for it"
            )
        if is_fsdp1(param):
            raise RuntimeError(
                "Secant cannot train under FSDP1, which hides gradients from ranks that hold "
                "nothing of a parameter; use FSDP2 (fsdp_version: 2 in accelerate's configuration)"
            )
