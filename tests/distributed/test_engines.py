"""S is a function of the layer's whole gradient: the same on one process and on any engine."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict import get_state_dict

from hf_adalip import create_optimizer
from hf_adalip.optim.forms.kernels import cpu
from hf_adalip.recipe.checkpoints import check_distributed
from tests.distributed.engines import Net, batch
from tests.distributed.ranks import run
from tests.optim.cases import assert_same

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ALL = ("adalip", "rmslip", "adamlip", "adalipu", "rmslipu", "adamlipu", "lip-nadam")
EVERY = [f"{name}/{rest}" for name in ALL for rest in ("tensor/loop", "module/foreach")]
SOME = ["adamlip/module/foreach", "adalipu/tensor/loop"]
FUSED = [] if cpu.missing() else ["rmslipu/tensor/fused-sketch-float64", "rmslip/module/fused"]
HISTORIES = ["adamlip/module/sketch", "adamlip/module/history-bfloat16", *FUSED]
BOUNDS = {"float64": 1e-12, "bfloat16": 1e-4}
"""By the last word of a case."""

# {ranks: {engine: (all-reduces a step: one for each process group that anything is sharded over,
# cases)}}
ENGINES = {
    2: {
        "ddp": (0, SOME),
        "ddp-static": (0, SOME),
        "fsdp2": (1, [*EVERY, *HISTORIES, "adalipu/tensor/sketch"]),
        "fsdp2-compiled": (None, SOME[:1]),
        "fsdp2-no-reshard": (1, SOME),
        "fsdp2-offload": (1, SOME),
        "fsdp2-bf16": (1, SOME),
        "fsdp1": (1, [*SOME, "lip-nadam/module/loop", "adamlip/all/loop"]),
        "fsdp1-grad-op": (1, SOME),
        "fsdp1-no-shard": (0, SOME),
        "tp": (1, [*SOME, *HISTORIES[:3]]),
        "tp-sequence": (3, SOME),  # two of them sum up gradients that were left partial
        "fsdp2-bf16-reduce": (1, ["adamlip/module/loop"]),
    },
    4: {
        "fsdp2": (1, SOME),
        "hsdp": (1, SOME),
        "fsdp1": (1, SOME),
        "fsdp1-hybrid": (1, SOME),
        "fsdp2-tp": (2, [*SOME, *HISTORIES[:3]]),
    },
}


def launch(path, ranks, cases, module="engines"):
    """What tests.distributed.engines (or another) finds: {case: differences}."""
    run(ranks, module, str(path), *cases)
    found = json.loads(path.read_text())
    assert list(found) == cases
    return found


@pytest.mark.parametrize("ranks", ENGINES)
def test_training_is_that_of_one_process(tmp_path, ranks):
    """50 steps of two micro-batches each, clipped; layers frozen, unused, and used on some steps.

    "fsdp2-bf16" has parameters and gradients in bf16, reduced in float32; so has its one process.
    "fsdp2-bf16-reduce" has gradients rounded to bf16, which its one process has not.
    FSDP1 gives zeros for what a part of it (a unit) has not used; so does its one process.
    Sketches are summed up by one more all-reduce for each process group. In a bfloat16 history a
    difference of one rounding in float32 may decide how an element is rounded: 4e-3 of it. The
    changes of RMSLipU's updates are of normalised numbers, in which the rounding of a gradient
    that is nearly zero is not small: hence float64.
    """
    engines = ENGINES[ranks]
    cases = [f"{engine}/{case}" for engine, (_, some) in engines.items() for case in some]
    for case, result in launch(tmp_path / "found.json", ranks, cases).items():
        if case.startswith("fsdp2-bf16-reduce"):
            assert result["S"] < 1e-2, case  # bf16 keeps 8 bits of each gradient: 4e-3
        else:
            for what in ("S", "parameters", "losses", "norms"):
                assert result[what] < BOUNDS.get(case.rpartition("-")[2], 1e-6), (case, what)
        assert result["same_on_all_ranks"], case
        collectives = engines[case.split("/")[0]][0]
        if "sketch" in case:
            collectives *= 2
        assert result["collectives"] == collectives, case


def test_the_tensor_parallelism_of_transformers(tmp_path):
    """`tp_plan="auto"`: DTensors beside plain tensors.

    Learning rates are modest, because where a gradient is near zero its rounding decides the sign
    of a normalised step: torch's own Adam at 1e-2 ends 5e-5 from one process, its RMSprop at 1e-3
    2e-6.
    """
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    path = tmp_path / "found.json"
    run(2, "llama", str(tmp_path / "model"), str(path), *ALL)
    for name, result in json.loads(path.read_text()).items():
        assert result["sharded"] == 16
        for what in ("S", "weights", "losses", "norms"):
            assert result[what] < 1e-6, (name, what)
        assert result["same_on_all_ranks"], name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of checkpoints that two ranks saved."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    folder.mkdir()
    run(2, "resharding", "save", str(folder))
    return folder


def test_a_checkpoint_goes_on_over_any_number_of_ranks(saved):
    """torch.distributed.checkpoint and accelerate: saved on two ranks, strictly loaded."""
    uninterrupted = torch.load(f"{saved}.save.2.pt")
    for ranks in (1, 2, 4):
        run(ranks, "resharding", "load", str(saved))
        loaded = torch.load(f"{saved}.load.{ranks}.pt")
        assert loaded.keys() == uninterrupted.keys()
        for case, (parameters, scales) in uninterrupted.items():
            found, found_scales = loaded[case]
            if ranks == 2:
                assert found_scales == scales, case
            assert found_scales == pytest.approx(scales, rel=1e-6), case
            for p, q in zip(found, parameters, strict=True):
                tolerance = 0 if ranks == 2 else 1e-6
                torch.testing.assert_close(p, q, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_torn_distributed_checkpoint_leaves_the_run_as_it_was(saved, tmp_path, how):
    """It is told before anything is loaded, and it may be loaded into a copy. Into the live state,
    torch writes what it can read before it fails."""
    check_distributed(saved / "fsdp2 sharded adamlip")
    folder = shutil.copytree(saved / "fsdp2 sharded adamlip", tmp_path / "torn")
    shard = folder / "__1_0.distcp"
    content = shard.read_bytes()
    shard.unlink()
    if how == "truncated":
        shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=shard.name):
        check_distributed(folder)
    net = Net()
    optimizer = create_optimizer(net, "adamlip", lr=1e-2, c="theoretical")
    x, y = batch(0)
    torch.nn.functional.cross_entropy(net(x), y).backward()
    optimizer.step()
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))

    model, state = get_state_dict(net, optimizer)
    spare = copy.deepcopy({"model": model, "optimizer": state})
    with pytest.raises(CheckpointException, match=shard.name if how == "missing" else "read"):
        dcp.load(spare, checkpoint_id=folder, planner=DefaultLoadPlanner(allow_partial_load=True))
    assert_same((net.state_dict(), optimizer.state_dict()), before)
