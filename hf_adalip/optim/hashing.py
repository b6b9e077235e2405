"""A hash of 32-bit integers, from which sketches and stochastic rounding draw their bits."""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B9
MASK = 0xFFFFFFFF


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers, in int64; every bit of it depends on every bit of x."""
    x = x & MASK  # a copy, which the rest works on in place
    x.bitwise_xor_(x >> 16).mul_(0x85EBCA6B).bitwise_and_(MASK)
    x.bitwise_xor_(x >> 13).mul_(0xC2B2AE35).bitwise_and_(MASK)
    return x.bitwise_xor_(x >> 16)
