"""S inside DeepSpeed's flat tensors: the same as on one process, or an error."""

from __future__ import annotations

import pytest

from tests.distributed.test_engines import launch

pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "hf-adalip[deepspeed]"')

pytestmark = pytest.mark.slow

EXACT = [
    *(f"zero{stage}/adamlip/module/foreach/0.01" for stage in (0, 1, 2, 3)),
    *(f"{engine}/adalipu/tensor/loop/0.01" for engine in ("zero1", "zero2", "zero3")),
    *(f"{engine}/lip-nadam/tensor/foreach/0.01" for engine in ("zero1", "zero3")),
    "zero2-offload/rmslip/tensor/foreach/0.01",
    "zero3-offload/rmslipu/module/loop/0",
    "zero3-subgroups/adamlip/tensor/foreach/0",
]
BF16 = ["zero1-bf16/adamlip/module/foreach/0", "zero3-bf16/adamlip/module/foreach/0"]
REFUSED = {
    "zero1/lip-nadam/module/foreach/0.01": 'layers="tensor"',
    "zero3-subgroups/adamlip/module/foreach/0": "sub_group_size",
    "zero2-round-robin/adamlip/tensor/foreach/0": "round_robin_gradients",
}


SECANT = [
    f"{engine}/secant/{loop}"
    for engine in ("zero0", "zero1", "zero2", "zero3")
    for loop in ("closure", "plain", "attached", "Trainer")
    if (engine, loop) != ("zero0", "closure")  # which keeps whole parameters with their gradients
]


def test_secant_is_refused_before_anything_is_trained(tmp_path):
    found = launch(tmp_path / "found.json", 2, SECANT, "zero")
    for case, said in found.items():
        assert "DeepSpeed" in said["error"], case
        assert "use DDP" in said["error"] or "closure" in said["error"], case
        assert not said["trained"], case


def test_training_is_that_of_one_process_or_refused(tmp_path):
    found = launch(tmp_path / "found.json", 2, [*EXACT, *BF16, *REFUSED], "zero")
    for case in EXACT:
        for what in ("S", "parameters", "losses", "norms"):
            assert found[case][what] < 1e-6, (case, what)
        assert found[case]["same_on_all_ranks"], case
    for case in BF16:  # which keeps 8 bits of each number of the forward and backward pass
        assert found[case]["S"] < 1e-2, case
        assert found[case]["same_on_all_ranks"], case
    for case, setting in REFUSED.items():
        assert setting in found[case]["error"], case
