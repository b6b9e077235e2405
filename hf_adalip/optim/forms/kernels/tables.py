"""Small tables that kernels read on the device, copied there only when their content is new.

A copy is from pinned memory and waits for nothing. A CUDA graph that is being captured reads the
tables that the steps before it made; where a content is new to it (gradients that the capture
itself allocated), the copy becomes a part of the graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

_LIMIT = 1024
"""How many tables are kept, the last used; with gradient release, each bucket needs some."""


@dataclass(eq=False)
class _Table:
    host: Tensor  # pinned where the device can use that; alive as long as a copy may read it
    device: Tensor
    stream: int | None  # on which it was copied; None where only graphs copy it


_LOCK = threading.Lock()  # the backward hooks of two devices run in two threads
_TABLES: dict[Hashable, _Table] = {}  # the last used is last
_CAPTURED: set[_Table] = set()
"""Tables that CUDA graphs read, which may be replayed at any time: never dropped."""


def on_device(content: Hashable, device: torch.device, make: Callable[[], Tensor]) -> Tensor:
    """`make()` on the device, made once.

    Args:
        content: equal exactly where `make` gives the same.
        device: to which the table is copied.
        make: returns the table on the CPU.

    Raises:
        RuntimeError: in a capture before which there was no step with as many tensors.
    """
    key = (content, device)
    with _LOCK:
        if _capturing(device):
            return _in_capture(key, _TABLES.get(key), make)
        found = _TABLES.pop(key, None)
        stream = _stream(device)
        # A table that was copied on another stream may not be there yet.
        if found is None or found.stream != stream:
            if len(_TABLES) >= _LIMIT:
                _TABLES.pop(next(iter(_TABLES)))
            host = _pinned(make(), device)
            found = _Table(host, host.to(device, non_blocking=True), stream)
        _TABLES[key] = found
        return found.device


def _in_capture(
    key: tuple[Hashable, torch.device], found: _Table | None, make: Callable[[], Tensor]
) -> Tensor:
    if found is None:
        host = make()
        found = _idle(host, key[1])
        found.host.copy_(host)
        found.stream = None
        _TABLES[key] = found
    if found.stream is None:
        found.device.copy_(found.host, non_blocking=True)
    _CAPTURED.add(found)
    return found.device


def _idle(like: Tensor, device: torch.device) -> _Table:
    """A table that no graph reads, taken out of use: a capture cannot allocate pinned memory."""
    for key, table in _TABLES.items():
        same = table.host.shape == like.shape and table.host.dtype == like.dtype
        if same and table.device.device == device and table not in _CAPTURED:
            return _TABLES.pop(key)
    raise RuntimeError(
        "a CUDA graph is being captured before its tensors have been stepped once: take a step "
        "or more before the capture, as torch's documentation of CUDA graphs has it"
    )


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory() if device.type == "cuda" else host


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
