"""scripts/check_sharding.py: what it finds, what it calls it, and its exit status."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="check_sharding runs under accelerate: extra [trainer]")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"(\S+) +(module|tensor) +(\S+) +(\S+) +(equal|DIFFER) +(\S+) (ok|FAILED)$")


def check(*arguments, ranks=2, sabotage="", **environment):
    """Exit status, standard output, and the lines of the table, of the script on some ranks."""
    script = str(ROOT / "scripts" / "check_sharding.py")
    command = [sys.executable, script]
    if sabotage:
        code = f"import runpy; {sabotage}; runpy.run_path({script!r}, run_name='__main__')"
        command = [sys.executable, "-c", code]
    if ranks > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command[1:1] = launch
    done = subprocess.run(
        [*command, "--cpu", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = [match.groups() for line in done.stdout.splitlines() if (match := LINE.match(line))]
    return done.returncode, done.stdout + done.stderr[-2000:], found


def test_torchs_own_sharding_passes():
    optimizers = ("adamlip", "adalipu", "lip-nadam")
    status, output, found = check("--engine", "fsdp2", "--optim", *optimizers)
    assert status == 0, output
    assert output.startswith("FSDP2 ((Shard(dim=0),) on a mesh of 2), float32, 2 ranks, cpu; ")
    assert [name for name, *_ in found] == list(optimizers)
    for name, _, scale, parameters, ranks, collectives, verdict in found:
        assert float(scale) < 1e-6, name
        assert float(parameters) < 1e-6, name
        assert (ranks, collectives, verdict) == ("equal", "1", "ok"), name


def test_a_configuration_that_accelerate_ignores_is_told_and_fails():
    """And gradient accumulation is the configuration's, on either side."""
    status, output, found = check(
        "--layers",
        "tensor",
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        ACCELERATE_GRADIENT_ACCUMULATION_STEPS="2",
    )
    assert status == 1, output
    assert output.startswith("DDP, float32, 2 ranks")
    assert "WARNING: FSDP2 was asked for, but this is DDP" in output
    ((*_, scale, parameters, ranks, collectives, verdict),) = found
    assert float(scale) < 1e-6
    assert float(parameters) < 1e-6
    assert (ranks, collectives, verdict) == ("equal", "0", "ok")


def test_what_differs_and_what_raises_fail_in_a_line():
    """One process, whose reference follows with another gamma, and an optimizer that raises."""
    other = (
        "import hf_adalip; make = hf_adalip.create_optimizer; gammas = iter((0.8, 0.8, 0.9));"
        "hf_adalip.create_optimizer = lambda *a, **k: make(*a, **k, gamma=next(gammas, 0.8))"
    )
    status, output, found = check("--optim", "adamlip", "lip-lbfgs", ranks=1, sabotage=other)
    assert status == 1, output
    ((name, *_, ranks, _, verdict),) = found
    assert (name, ranks, verdict) == ("adamlip", "equal", "FAILED")
    assert re.search(r"^lip-lbfgs +module +FAILED: ValueError: unknown optimizer", output, re.M)
