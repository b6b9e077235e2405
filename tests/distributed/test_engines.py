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
EVERY = [f"{name}/{rest}" for name in ALL for rest in ("tensor/loop", "module/foreach")]
SOME = ["adamlip/module/foreach", "adalipu/tensor/loop"]

# {ranks: {engine: (all-reduces a step: one for each process group that anything is sharded over,
# cases)}}; a launch takes ten seconds, a case one or two.
ENGINES = {
    2: {
        "ddp": (0, SOME),
        "ddp-static": (0, SOME),
        "fsdp2": (1, EVERY),
        "fsdp2-no-reshard": (1, SOME),
        "fsdp2-offload": (1, SOME),
        "fsdp2-bf16": (1, SOME),
        "fsdp1": (1, [*SOME, "lip-nadam/module/loop"]),
        "fsdp1-grad-op": (1, SOME),
        "fsdp1-no-shard": (0, SOME),
        "tp": (1, SOME),
    },
    4: {
        "fsdp2": (1, SOME),
        "hsdp": (1, SOME),
        "fsdp1": (1, SOME),
        "fsdp1-hybrid": (1, SOME),
        "fsdp2-tp": (2, SOME),
    },
}


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


def launch(path, ranks, cases, module="engines"):
    """What tests.distributed.engines (or another) finds: {case: differences}."""
    torchrun(ranks, module, str(path), *cases)
    found = json.loads(path.read_text())
    assert list(found) == cases
    return found


@pytest.mark.parametrize("ranks", ENGINES)
def test_training_is_that_of_one_process(tmp_path, ranks):
    """50 steps of two micro-batches each, clipped; layers frozen, unused, and used on some steps.

    "fsdp2-bf16" has parameters and gradients in bf16, reduced in float32; so has its one process.
    FSDP1 gives zeros for what a part of it (a unit) has not used; so does its one process.
    """
    engines = ENGINES[ranks]
    cases = [f"{engine}/{case}" for engine, (_, some) in engines.items() for case in some]
    for case, result in launch(tmp_path / "found.json", ranks, cases).items():
        for what in ("S", "parameters", "losses", "norms"):
            assert result[what] < 1e-6, (case, what)
        assert result["same_on_all_ranks"], case
        assert result["collectives"] == engines[case.split("/")[0]][0], case


def test_gradients_reduced_in_bf16_cost_bf16s_precision(tmp_path):
    found = launch(tmp_path / "found.json", 2, ["fsdp2-bf16-reduce/adamlip/module/loop"])
    for case, result in found.items():
        assert result["S"] < 1e-2, case  # bf16 keeps 8 bits of each gradient: 4e-3
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
