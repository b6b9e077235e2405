"""What is measured: the signal x_t of Eq. 7, and norms.

Norms are Euclidean, and accumulated in float32 (float64 for float64).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

if TYPE_CHECKING:
    from .rules import Group, Rule

X = Any
"""A tensor in the loop form, a list of tensors in the foreach form."""


class Signal(ABC):
    """One choice of x_t, written once for every form of the step.

    Updates are passed as functions, so that what is not needed is not computed.
    """

    of_updates: ClassVar[bool] = False

    @abstractmethod
    def history_keys(self, rule: Rule, group: Group) -> tuple[str, ...]:
        """State keys of the tensors, of the parameter's shape, in which x_t is kept."""

    @abstractmethod
    def current(self, grad: X, proposed: Callable[[], X]) -> X:
        """x_t, from g_t or from û_t = `proposed()`."""

    @abstractmethod
    def previous(self, old: dict[str, X], recomputed: Callable[[], X]) -> X:
        """x_{t-1}, from the state of step t-1 or from u_{t-1} = `recomputed()`."""

    @abstractmethod
    def new_history(self, grad: X, update: Callable[[], X]) -> dict[str, X]:
        """The history after step t, from g_t or from the update that the next is compared with."""

    def is_recomputed(self, rule: Rule, group: Group) -> bool:
        """Whether x_{t-1} is computed again from the moments, with the scalar `prev_lr`."""
        return False


class Gradients(Signal):
    """x_t = g_t (Eqs. 6-8)."""

    def history_keys(self, rule: Rule, group: Group) -> tuple[str, ...]:
        return ("prev_grad",)

    def current(self, grad: X, proposed: Callable[[], X]) -> X:
        return grad

    def previous(self, old: dict[str, X], recomputed: Callable[[], X]) -> X:
        return old["prev_grad"]

    def new_history(self, grad: X, update: Callable[[], X]) -> dict[str, X]:
        return {"prev_grad": grad}


class Updates(Signal):
    """x_t = û_t, the update that the base optimizer proposes with α_t (Appendix C).

    It is compared with the update that was applied, S included (`previous="applied"`,
    Algorithm 5), or the one that was proposed ("proposed", Eqs. C4-C5). Where the rule can
    compute the direction of step t-1 again from its moments, the scalar `prev_lr` is kept
    instead of the update.
    """

    of_updates = True

    def history_keys(self, rule: Rule, group: Group) -> tuple[str, ...]:
        return () if rule.can_recompute(group) else ("prev_update",)

    def is_recomputed(self, rule: Rule, group: Group) -> bool:
        return rule.can_recompute(group)

    def current(self, grad: X, proposed: Callable[[], X]) -> X:
        return proposed()

    def previous(self, old: dict[str, X], recomputed: Callable[[], X]) -> X:
        return old["prev_update"] if "prev_update" in old else recomputed()

    def new_history(self, grad: X, update: Callable[[], X]) -> dict[str, X]:
        return {"prev_update": update()}


# Numbers on the host


def elements(x: Tensor, group: Group) -> list[Any]:
    """The elements of a vector: Python's numbers where the host may look at them, else 0-dim
    tensors, each of which costs an operator as much as a small tensor does.

    The host may look where no device is waited for, and neither a graph, nor autograd, nor a mode
    that traces the step would miss what depends on the numbers.
    """
    plain = x.device.type == "cpu" and type(x) is Tensor
    watched = group.get("capturable") or group["differentiable"]
    if not plain or watched or torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return list(x.unbind())
    return x.tolist()


# Norms

_ROW = 4096

_vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm


OPMATH = {torch.float16: torch.float32, torch.bfloat16: torch.float32}
"""The dtypes of low precision, and the one that their arithmetic is done in."""


def opmath_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that arithmetic on tensors of `dtype` is done in: at least float32."""
    return OPMATH.get(dtype, dtype)


def least_unsquarable(dtype: torch.dtype) -> float:
    """The least number whose square overflows the dtype that arithmetic on `dtype` is done in:
    1.8e19 but for float64."""
    return 2.0 ** math.ceil(math.log2(torch.finfo(opmath_dtype(dtype)).max) / 2)


def norm(x: Tensor) -> Tensor:
    """‖x‖ of one real tensor as a 0-dim tensor in its opmath dtype."""
    dtype = OPMATH.get(x.dtype, x.dtype)
    if x.device.type == "cpu" and x.numel() > _ROW:
        # The CPU kernel adds a whole tensor up in a few float32 lanes: relative errors of
        # 1e-5 at 1 M elements and 6e-3 at 64 M were seen. Rows of 4096 keep it at 1e-7,
        # and are faster.
        flat = x.reshape(-1)
        rows = flat.numel() // _ROW
        body = flat[: rows * _ROW].view(rows, _ROW)
        parts = _vector_norm(body, dim=1, dtype=dtype)
        tail = _vector_norm(flat[rows * _ROW :], dtype=dtype)
        return _vector_norm(torch.cat([parts, tail.reshape(1)]))
    return _vector_norm(x, dtype=dtype)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """‖x‖ of each tensor, as a vector; few kernel launches where `_foreach_norm` has them."""
    dtype, cpu = opmath_dtype(tensors[0].dtype), tensors[0].device.type == "cpu"
    together = [x for x in tensors if not cpu or x.numel() <= _ROW]
    found = iter(torch._foreach_norm(together, 2, dtype=dtype) if together else ())
    return torch.stack([norm(x) if cpu and x.numel() > _ROW else next(found) for x in tensors])


def combine_norms(tensor_norms: Tensor, layer_of: tuple[int, ...], layers: int) -> Tensor:
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
    parts = padded[index]
    if parts.requires_grad:
        return _vector_norm(parts, dim=1)  # its gradient at 0 is 0, that of sqrt is not
    # Rounds the squares before it adds them, so that two tensors may come in any order;
    # vector_norm over a dimension does not, in torch 2.6.
    return parts.square().sum(dim=1).sqrt()


def _padded_index(layer_of: tuple[int, ...], layers: int, device: torch.device) -> Tensor:
    """[layers, most tensors in a layer] indices of tensors, padded with the number of tensors."""

    def rows() -> list[list[int]]:
        tensors: list[list[int]] = [[] for _ in range(layers)]
        for tensor, layer in enumerate(layer_of):
            tensors[layer].append(tensor)
        width = max(len(x) for x in tensors)
        return [x + [len(layer_of)] * (width - len(x)) for x in tensors]

    return _cached((layer_of, layers), device, rows)


def index_tensor(indices: tuple[int, ...], device: torch.device) -> Tensor:
    """An index vector on the device, copied there once rather than at every step."""
    return _cached(indices, device, lambda: indices)


_TENSORS: dict[tuple[object, torch.device, bool], Tensor] = {}


def _cached(key: object, device: torch.device, values: Callable[[], Any]) -> Tensor:
    """torch.tensor(values()), made once; of more than 256, the oldest is dropped."""
    # A mode such as FakeTensorMode has tensors of its own, and takes no others.
    key = (key, device, is_in_torch_dispatch_mode())
    found = _TENSORS.get(key)
    if found is not None:
        return found
    made = torch.tensor(values(), dtype=torch.int64, device=device)
    if type(made) is Tensor:  # not what a tracing mode makes, which would outlive it
        if len(_TENSORS) >= 256:
            oldest, *_ = tuple(_TENSORS)  # atomic: several threads may train models at once
            _TENSORS.pop(oldest, None)
        _TENSORS[key] = made
    return made
