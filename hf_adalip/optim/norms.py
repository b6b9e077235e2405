"""Euclidean norms of tensors and of whole layers, accumulated in float32 (float64 for float64)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_CHUNK = 4096

_vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on tensors of `dtype` is done in: at least float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def norm(x: Tensor) -> Tensor:
    """‖x‖ of one real tensor as a 0-dim tensor in its wide dtype."""
    dtype = wide_dtype(x.dtype)
    if x.device.type == "cpu" and x.numel() > _CHUNK:
        # The CPU kernel adds a whole tensor up in a few float32 lanes: relative errors of
        # 1e-5 at 1 M elements and 6e-3 at 64 M were seen. Rows of 4096 keep it at 1e-7,
        # and are faster.
        flat = x.reshape(-1)
        rows = flat.numel() // _CHUNK
        body = flat[: rows * _CHUNK].view(rows, _CHUNK)
        parts = _vector_norm(body, dim=1, dtype=dtype)
        tail = _vector_norm(flat[rows * _CHUNK :], dtype=dtype)
        return _vector_norm(torch.cat([parts, tail.reshape(1)]))
    return _vector_norm(x, dtype=dtype)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """‖x‖ of each tensor, as a vector; few kernel launches where `_foreach_norm` has them."""
    dtype, cpu = wide_dtype(tensors[0].dtype), tensors[0].device.type == "cpu"
    together = [x for x in tensors if not cpu or x.numel() <= _CHUNK]
    found = iter(torch._foreach_norm(together, 2, dtype=dtype) if together else ())
    return torch.stack([norm(x) if cpu and x.numel() > _CHUNK else next(found) for x in tensors])


def mixed_norms(tensors: Sequence[Tensor], home: torch.device) -> Tensor:
    """‖x‖ of each tensor, of any devices and dtypes, as a vector on `home`."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, x in enumerate(tensors):
        alike.setdefault((x.device, x.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for indices in alike.values():
        values = norms([tensors[i] for i in indices]).to(home)
        found.update(zip(indices, values.unbind(), strict=True))
    if not tensors:
        return torch.zeros(0, device=home)
    return torch.stack([found[i] for i in range(len(tensors))])


def layer_norms(tensor_norms: Tensor, layer_of: tuple[int, ...], layers: int) -> Tensor:
    """Norms of layers from the norms of their tensors: the root of the sum of squares.

    Args:
        tensor_norms: shape [tensors, columns].
        layer_of: the layer index of each tensor; every layer has at least one.
        layers: how many layers there are.

    Returns:
        shape [layers, columns].
    """
    if layer_of == tuple(range(layers)):
        return tensor_norms
    index = _padded_index(layer_of, layers, tensor_norms.device)
    padded = torch.cat([tensor_norms, tensor_norms.new_zeros(1, tensor_norms.shape[1])])
    # A gather and a sum over a fixed order: index_add_ would add in any order on a GPU, and
    # two ranks could round differently.
    return _vector_norm(padded[index], dim=1)


def _padded_index(layer_of: tuple[int, ...], layers: int, device: torch.device) -> Tensor:
    """[layers, most tensors in a layer] indices of tensors, padded with the number of tensors."""

    def rows() -> list[list[int]]:
        members: list[list[int]] = [[] for _ in range(layers)]
        for tensor, layer in enumerate(layer_of):
            members[layer].append(tensor)
        width = max(len(m) for m in members)
        return [m + [len(layer_of)] * (width - len(m)) for m in members]

    return _kept((layer_of, layers), device, rows)


def index_tensor(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """An index vector on the device, copied there once rather than at every step."""
    return _kept(indices, device, lambda: indices)


_TENSORS: dict[tuple[object, torch.device, bool], Tensor] = {}


def _kept(key: object, device: torch.device, values: Callable[[], Any]) -> Tensor:
    """torch.tensor(values()), made once; the oldest of 256 goes when another one comes."""
    # Apart for modes that may stand in for all tensors (FakeTensorMode), and take no other.
    place = (key, device, is_in_torch_dispatch_mode())
    found = _TENSORS.get(place)
    if found is not None:
        return found
    made = torch.tensor(values(), dtype=torch.int64, device=device)
    if type(made) is Tensor:  # not what a tracing mode makes, which would outlive it
        if len(_TENSORS) >= 256:
            oldest, *_ = tuple(_TENSORS)  # in one go: models may be trained in threads side by side
            _TENSORS.pop(oldest, None)
        _TENSORS[place] = made
    return made
