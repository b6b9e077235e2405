"""The modules alive that DistributedDataParallel and FSDP1 have wrapped others in.

Neither leaves a mark on parameters by which it could be found. But torch calls a hook whenever a
module becomes part of another one, so wrappers are noted as they are made. What wrapped a model
before this package was imported is not known.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

_NAMES = {"module", "_fsdp_wrapped_module"}
"""What DistributedDataParallel and FullyShardedDataParallel call the module inside."""

_WRAPPERS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _note(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if name in _NAMES:
        _WRAPPERS.add(parent)


register_module_module_registration_hook(_note)


def wrappers(kind: type[nn.Module]) -> Iterator[Any]:
    """Those of a class that are alive."""
    return (module for module in list(_WRAPPERS) if isinstance(module, kind))
