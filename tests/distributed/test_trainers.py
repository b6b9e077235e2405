"""Trainer and accelerate under DeepSpeed and DDP: as on one process, resumed bit for bit."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import run
from tests.optim.cases import assert_same

pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "hf-adalip[deepspeed]"')
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What tests.distributed.trainers finds on two ranks, and then on one."""
    folder = tmp_path_factory.mktemp("trainers")
    found = []
    for ranks, mode in ((2, "save"), (1, "load")):
        run(ranks, "trainers", mode, str(folder))
        found.append(torch.load(folder / f"{mode}.pt", weights_only=False))
    return found


def assert_close(found, expected, case):
    """To 1e-6; each layer's parameters as a whole, as everywhere in these tests."""
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6), case
    for layer, rate in expected["S"].items():
        assert found["S"][layer].scale == pytest.approx(rate.scale, rel=1e-6), (case, layer)
    for layer, weights in expected["parameters"].items():
        error = (found["parameters"][layer] - weights).norm() / weights.norm()
        assert error < 1e-6, (case, layer)


def trainings(two):
    return [case for case in two if isinstance(case, tuple) and case[-1] != "resumed"]


def test_trainer_trains_as_on_one_process(results):
    """Under DDP and ZeRO-1, 2 and 3, by trainer_kwargs and by --optim."""
    two, one = results
    cases = [case for case in trainings(two) if case[1] in one]
    assert len(cases) == 5
    for case in cases:
        assert_close(two[case], one[case[1]], case)


def test_resuming_is_bit_exact(results):
    """By Trainer and by accelerate."""
    two, _ = results
    for case in trainings(two):
        assert_same(two[(*case, "resumed")], two[case], str(case))


def test_ddps_checkpoint_goes_on_on_one_rank(results):
    two, one = results
    assert_close(one["ddp"], two["ddp", "adamlip"], "ddp")


def test_deepspeeds_checkpoint_goes_on_under_its_like_only(results):
    """ZeRO-1 and 2 save alike; anything else DeepSpeed refuses."""
    two, one = results
    assert_close(two["zero1 on zero2"], two["zero1", "adamlip"], "zero1 on zero2")
    assert "AssertionError" in two["zero1 on zero3"]
    assert "AssertionError" in two["zero3 on zero1"]
    assert "no S, which DeepSpeed's universal checkpoints leave out" in two["universal"]
    assert "world size of 2 but the current world size is 1" in one["zero1"]
    assert "The size of tensor a" in one["zero3"]  # of a frozen layer, which is read first


def test_a_checkpoint_without_s_is_told(results):
    """Trainer resumes without a word where the optimizer's state is not what it looks for."""
    two, _ = results
    told = [text for text in two["zero1 on ddp"] if "no S" in text]
    assert len(told) == 1
    assert "step 4" in told[0]
    assert not any("no S" in text for text in two["ddp on ddp"])


def test_an_optimizer_that_deepspeed_drops_is_refused_at_once(results):
    two, _ = results
    told = two["optimizers="]
    assert "drops the AdamLip of optimizers=(AdamLip(...), None)" in told
    assert '**trainer_kwargs("adamlip", lr=...)' in told
