"""A hash of 32-bit integers, from which sketches and stochastic rounding draw their bits."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B9
MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers, in int64; every bit of it depends on every bit of x."""
    x = x & MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & MASK
    return x ^ (x >> 16)
