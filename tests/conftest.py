"""Fixtures for all tests."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

from .hub import loopback_hub

__all__ = ["loopback_hub"]

# One thread: the tensors are tiny, and test runners are shared.
torch.set_num_threads(1)

# The same examples in every run, so that a red run can be repeated.
settings.register_profile(
    "repeatable", max_examples=40, deadline=None, derandomize=True, database=None
)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def float64() -> Iterator[None]:
    """float64 tensors, and so float64 S: comparisons to 1e-12 instead of 1e-6."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
