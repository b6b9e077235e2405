"""Unbiased stochastic rounding of bfloat16 parameters.

An update smaller than half the spacing of bfloat16 (2⁻⁹ to 2⁻⁸ of the parameter's value) is lost
when the parameter is rounded to the nearest. Here a value is rounded up with the probability that
makes the mean of the result the value itself: 16 random bits are added to its float32 pattern, of
which then the upper 16 are kept.

The bits are a hash of what identifies the write. So no state of a generator is kept, runs can be
repeated, resumed runs go on identically, and every form, sharding and order of parameters has the
same bits:

    word(i) = mix(mix(i mod 2³² + seed) xor (key + G·(i div 2³²))),    key = mix(seed + G·t)

of which the lower 16 are taken. All wraps at 32 bits; G = 0x9e3779b9, i is the row-major index of
the element in its whole parameter, t the parameter's step, and the seed a hash of its name (its
position where it has none).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .hashing import GOLDEN, MASK, mix
from .names import plain_names
from .sharding import FlatTensors, Place
from .signals import elements, index_tensor

if TYPE_CHECKING:
    from .batch import LocalParam
    from .rules import Group


class Draws(NamedTuple):
    """Which words the elements of a tensor are rounded with."""

    seed: int
    place: Place  # in the whole parameter
    start: int | None  # index of the first element, where the tensor is a run of elements

    def part(self, at: int) -> Draws:
        """Of a part of a run, from its element `at` on."""
        assert self.start is not None
        return self._replace(start=self.start + at)


def seeds_of(group: dict[str, Any]) -> list[int | None]:
    """The seed of each of a group's parameters; None where it is rounded to the nearest."""
    if not group.get("stochastic_rounding"):
        return [None] * len(group["params"])
    names = group["layer_names"]  # which say the position of unnamed parameters
    if "param_names" in group:
        names = plain_names(group["param_names"])
    return [_seed(name) for name in names]


@lru_cache(maxsize=2**16)
def _seed(name: str) -> int:
    """FNV-1a, which torch.compile can follow."""
    seed = 0x811C9DC5
    for character in name:
        seed = (seed ^ ord(character)) * 0x01000193 & MASK
    return seed


def draws_of(params: Sequence[LocalParam]) -> list[Draws]:
    """One for each parameter if they are rounded stochastically, else an empty list."""
    return [Draws(p.seed, p.shard.place, p.shard.start) for p in params if p.seed is not None]


def refuse_unless_roundable(groups: Sequence[dict[str, Any]], params: Sequence[LocalParam]) -> None:
    """For groups with stochastic_rounding=True, and the parameters of a step.

    Raises:
        ValueError: if none of the groups' parameters is bfloat16.
        NotImplementedError: for a part of a parameter that does not say which elements it has.
    """
    dtypes = [p.dtype for g in groups if g.get("stochastic_rounding") for p in g["params"]]
    if dtypes and torch.bfloat16 not in dtypes:
        raise ValueError(
            "stochastic_rounding=True is for bfloat16 parameters, and the groups with it have only "
            f"{str(dtypes[0]).removeprefix('torch.')} (as it does where a trainer keeps a master "
            "copy in float32, which loses no small step): leave it out, or train the model in "
            "bfloat16"
        )
    for param in params:
        wanted = param.group.get("stochastic_rounding") and param.param.dtype == torch.bfloat16
        flat = param.part is not None
        problem = FlatTensors.sketch_problem if flat else param.shard.sketch_problem
        if wanted and problem:
            raise NotImplementedError(
                "stochastic_rounding=True needs to know which elements of a parameter "
                f"{problem} hold; use FSDP2, whose shards say so"
            )


def drawn(draws: Sequence[Draws], steps: Tensor, group: Group) -> list[tuple[Draws, Any]]:
    """With each tensor's key at its step t."""
    seeds = index_tensor(tuple(x.seed for x in draws), steps.device)
    return list(zip(draws, elements(_keys(seeds, steps), group), strict=True))


def _keys(seeds: Tensor | int, steps: Tensor) -> Tensor:
    return mix(steps.to(torch.int64) * GOLDEN + seeds)


def rounded(value: Tensor, draws: Draws, key: Tensor | int) -> Tensor:
    """A float32 tensor with each element rounded to a bfloat16, in float32; what is not finite
    stays as it is."""
    return _rounded(value, _indices(value, draws), draws.seed, key)


def all_rounded(values: list[Tensor], draws: list[Draws], steps: Tensor) -> list[Tensor]:
    """`rounded` of many tensors, in few operations."""
    if len(values) == 1:
        return [rounded(values[0], draws[0], _keys(draws[0].seed, steps[0]))]
    device, sizes = steps.device, tuple(x.numel() for x in values)
    repeats = index_tensor(sizes, device)

    def spread(numbers: Tensor) -> Tensor:
        return numbers.repeat_interleave(repeats, output_size=sum(sizes))

    seeds = index_tensor(tuple(x.seed for x in draws), device)
    flat = _rounded(
        torch.cat([x.reshape(-1) for x in values]),
        torch.cat([_indices(x, of).reshape(-1) for x, of in zip(values, draws, strict=True)]),
        spread(seeds),
        spread(_keys(seeds, steps)),
    )
    return [x.view(y.shape) for x, y in zip(torch.split(flat, list(sizes)), values, strict=True)]


def _rounded(value: Tensor, index: Tensor, seed: Tensor | int, key: Tensor | int) -> Tensor:
    upper = (index >> 32).mul_(GOLDEN).add_(key)
    words = mix(mix(index + seed).bitwise_xor_(upper)).bitwise_and_(0xFFFF)
    bits = (value.view(torch.int32) + words.to(torch.int32)).bitwise_and_(-0x10000)
    return torch.where(value.isfinite(), bits.view(torch.float32), value)


def _indices(x: Tensor, draws: Draws) -> Tensor:
    """The index of each element of x in its whole parameter, int64."""
    if draws.start is not None:
        end = draws.start + x.numel()
        return torch.arange(draws.start, end, device=x.device).view(x.shape)
    (shape, offset), stride = draws.place, 1
    index = torch.zeros((), dtype=torch.int64, device=x.device)
    for dim in reversed(range(x.dim())):
        along = torch.arange(offset[dim], offset[dim] + x.shape[dim], device=x.device)
        index = index + (along * stride).view(-1, *[1] * (x.dim() - 1 - dim))
        stride *= shape[dim]
    return index
