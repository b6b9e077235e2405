"""DTensors: FSDP2 (fully_shard), HSDP, and torch's and transformers' tensor parallelism."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .reduce import ReduceGroups
from .shard import Shard

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def is_dtensor(x: Any) -> TypeGuard[DTensor]:
    """Whether x is a DTensor, without importing (for two seconds) what nobody has imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def is_model_parallel(param: Tensor) -> bool:
    """Whether a plain tensor is marked as part of a larger one, as Megatron and DeepSpeed do."""
    marks = ("tensor_model_parallel", "model_parallel")
    return not is_dtensor(param) and any(getattr(param, mark, False) is True for mark in marks)


class DTensorShard(Shard):
    """A DTensor, which says itself how it is sharded."""

    param: Any

    @property
    def reduce_groups(self) -> ReduceGroups:  # type: ignore[override]
        dims = enumerate(self.param.placements)
        return tuple(self.param.device_mesh.get_group(d) for d, p in dims if not p.is_replicate())

    def local(self, x: Any) -> Tensor:
        part: Tensor = x.to_local() if is_dtensor(x) else x
        return part

    def local_grad(self, grad: Any) -> Tensor:
        # Tensor parallelism may leave it laid out otherwise: replicated, or as partial sums.
        if is_dtensor(grad) and grad.placements != self.param.placements:
            grad = grad.redistribute(self.param.device_mesh, self.param.placements)
        return self.local(grad)

    def _offset(self) -> tuple[int, ...]:
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        local_shape, offset = compute_local_shape_and_global_offset(
            self.param.shape, self.param.device_mesh, self.param.placements
        )
        return (0,) * self.param.dim() if 0 in local_shape else tuple(offset)
