"""Processes, alone or the ranks of a group, forked from one that has imported what they need.

torch with its compiler, Trainer and timm take ten seconds to import, which torchrun and each of its
processes would do for every launch. What is read when a module is imported is the same in all of
them, as is the seed of hashes: tests that depend on it, and those of launchers, use torchrun and
accelerate themselves (test_check_sharding, test_recipe_mnist, test_recipe_configs).
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from multiprocessing import connection
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.getenv("PYTHONPATH")])]),
}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "tests.distributed.engines",
        "tests.distributed.resharding",
        "hf_adalip.recipe.image.training",
        "hf_adalip.recipe.trainer",
        "timm",
        "transformers.trainer",
    ]
)


def fork(target, *arguments):
    """A process that calls a function of a module, started."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():  # of the server, if this is what starts it
            patch.setenv(key, value)
        process = SERVER.Process(target=target, args=arguments)
        process.start()
    return process


def start(program, *arguments, env=None, log=os.devnull):
    """A process that runs a script, or `main` of tests.distributed.PROGRAM.

    Args:
        program: a file that ends with .py, or a module.
        arguments: its arguments.
        env: variables that are set besides; too late for what is read at an import.
        log: the file that it writes to.
    """
    return fork(_main, program, arguments, os.environ | ENVIRONMENT | (env or {}), log)


def kill_when(seen, process, timeout=200):
    """kill -9 as soon as `seen()`; fails if that is not in time, or the process ends before."""
    deadline, found = time.monotonic() + timeout, False
    try:
        while not found and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.0005)
            found = seen()
    finally:
        process.kill()
        process.join()
    assert found, f"not seen in {timeout} s, or before the process ended ({process.exitcode})"
    assert process.exitcode == -signal.SIGKILL


def run(ranks, program, *arguments, env=None, timeout=600):
    """Runs on each rank what `start` does on one; fails if one fails."""
    # As torchrun keeps it: a port that nobody else can take before rank 0 does.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with TemporaryDirectory() as folder:
        processes, logs = [], [Path(folder, f"rank{rank}") for rank in range(ranks)]
        try:
            for rank, log in enumerate(logs):
                log.touch()
                variables = {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(store.port),
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(ranks),
                    "LOCAL_WORLD_SIZE": str(ranks),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": "0",
                }
                processes.append(start(program, *arguments, env=(env or {}) | variables, log=log))
            in_time = _wait(processes, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        said = [
            f"rank {rank} ended with {process.exitcode}: {log.read_text()[-4000:]}"
            for rank, (process, log) in enumerate(zip(processes, logs, strict=True))
            if process.exitcode
        ]
    assert in_time, "\n".join([f"not finished after {timeout} s", *said])
    assert not said, "\n".join(said)


def _wait(processes, timeout):
    """Until all have ended or one has failed; False if time is up before."""
    deadline = time.monotonic() + timeout
    while running := [process for process in processes if process.exitcode is None]:
        if any(process.exitcode for process in processes):
            return True
        if (left := deadline - time.monotonic()) <= 0:
            return False
        connection.wait([process.sentinel for process in running], left)
    return True


def leave_out_deepspeeds_ops():
    """So that DeepSpeed compiles nothing on a CPU: reductions in shared memory, which only its
    inference uses, take minutes."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__ = {}


def _main(program, arguments, variables, log):
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        importlib.import_module(f"tests.distributed.{program}").main()
