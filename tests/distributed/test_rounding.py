"""Stochastic rounding draws the same bits however parameters are sharded."""

from __future__ import annotations

import pytest

from hf_adalip.optim.forms.kernels import cpu
from tests.distributed.ranks import run


@pytest.mark.slow
@pytest.mark.skipif(bool(cpu.missing()), reason=f"needs {cpu.missing()}")
def test_sharded_parameters_are_rounded_as_whole_ones() -> None:
    run(2, "rounding")
