"""S is a function of the layer's whole gradient: the same on one process and on any engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
ALL = ("adalip", "rmslip", "adamlip", "adalipu", "rmslipu", "adamlipu", "lip-nadam")
SOME = ("adamlip", "adalipu")

# (engine, ranks, all-reduces a step: one for each process group that anything is sharded over)
ENGINES = [
    ("ddp", 2, 0, SOME),
    ("fsdp2", 2, 1, ALL),
    ("fsdp2", 4, 1, SOME),
    ("fsdp2-no-reshard", 2, 1, SOME),
    ("hsdp", 4, 1, SOME),
    ("tp", 2, 1, SOME),
    ("fsdp2-tp", 4, 2, SOME),
]


def torchrun(ranks, module, *arguments):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), "-m", f"tests.distributed.{module}", *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def launch(path, engine, ranks, names):
    torchrun(ranks, "engines", str(path), engine, *names)
    return json.loads(path.read_text())


@pytest.mark.parametrize(("engine", "ranks", "collectives", "names"), ENGINES)
def test_s_and_parameters_are_those_of_one_process(tmp_path, engine, ranks, collectives, names):
    found = launch(tmp_path / "found.json", engine, ranks, names)
    assert len(found) == 2 * len(names)
    for case, result in found.items():
        assert result["S"] < 1e-6, case
        assert result["parameters"] < 2e-6, case
        assert result["same_on_all_ranks"], case
        assert result["collectives"] == collectives, case


def test_gradients_reduced_in_bf16_cost_bf16s_precision(tmp_path):
    found = launch(tmp_path / "found.json", "fsdp2-bf16-reduce", 2, ["adamlip"])
    for case, result in found.items():
        assert result["S"] < 2e-2, case  # bf16 keeps 8 bits of each gradient
        assert result["same_on_all_ranks"], case


@pytest.mark.parametrize(("name", "worlds"), [("adamlip", (1, 2, 4)), ("lip-nadam", (1,))])
def test_a_checkpoint_goes_on_over_any_number_of_ranks(tmp_path, name, worlds):
    """torch.distributed.checkpoint, saved on two ranks; getting the state first moves nothing."""
    folder = tmp_path / "checkpoint"
    torchrun(2, "resharding", "save", str(folder), name)
    parameters, scales = torch.load(f"{folder}.save.2.pt")
    for ranks in worlds:
        torchrun(ranks, "resharding", "load", str(folder), name)
        found, found_scales = torch.load(f"{folder}.load.{ranks}.pt")
        exact = ranks == 2
        assert found_scales == (scales if exact else pytest.approx(scales, rel=1e-6))
        for p, q in zip(found, parameters, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0 if exact else 1e-6)
