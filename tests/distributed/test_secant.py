"""Secant under DDP, FSDP2 and accelerate: the same rate on all ranks, bit for bit."""

from __future__ import annotations

import json
import math

import pytest

from tests.distributed.ranks import run

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What tests.distributed.secant finds on each of two ranks."""
    folder = tmp_path_factory.mktemp("secant")
    run(2, "secant", str(folder / "found.json"), str(folder))
    return json.loads((folder / "found.json").read_text())


def numbers(values):
    return [float.fromhex(value) for value in values]


def test_all_ranks_find_the_same(ranks):
    one, other = ranks
    assert one.keys() == other.keys()
    for case, found in one.items():
        if isinstance(found, dict):
            assert found["rates"] == other[case]["rates"], case
            assert found.get("due") == other[case].get("due"), case
            assert all(math.isfinite(x) and x > 0 for x in numbers(found["rates"])), case


@pytest.mark.parametrize("base", ["adamw", "sgd"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_it_is_that_of_one_process(ranks, engine, base):
    """The first measurements; what roundings do then grows from step to step."""
    found, alone = (ranks[0][f"{which}, {base}"] for which in (engine, "alone"))
    assert found["steps"] == alone["steps"]
    assert numbers(found["rates"]) == pytest.approx(numbers(alone["rates"]), rel=1e-3)
    assert numbers(found["r"])[:3] == pytest.approx(numbers(alone["r"])[:3], abs=1e-3)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_accumulating_is_as_on_one_process(ranks, engine):
    """Under DDP the micro-batch that is measured is not reduced, and the slopes are averaged. What
    differs is how much a measurement weighs, which goes by the norms of each rank's gradients."""
    found, alone = (ranks[0][f"{which}, accumulated"] for which in (engine, "alone"))
    rates = [numbers(x["rates"]) for x in (found, alone)]
    assert rates[0][0] == pytest.approx(rates[1][0], rel=1e-3)
    assert numbers(found["r"])[0] == pytest.approx(numbers(alone["r"])[0], abs=1e-3)
    assert rates[0] == pytest.approx(rates[1], rel=1e-3 if engine == "fsdp2" else 0.1)


def test_bf16_autocast(ranks):
    for engine in ("ddp", "ddp-static", "fsdp2"):
        found = ranks[0][f"{engine}, bf16"]
        assert len(found["r"]) > 3, engine
        assert all(map(math.isfinite, numbers(found["r"]) + found["weights"])), engine


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_one_ranks_overflow_is_everyones(ranks, engine):
    """At the parameters before the step it says nothing; after it, the rate is lowered."""
    plain = numbers(ranks[0][f"{engine}, adamw"]["rates"])
    before = numbers(ranks[0][f"{engine}, spoiled before"]["rates"])
    assert before[:3] == [*plain[:2], plain[1]] != plain[:3]
    after = numbers(ranks[0][f"{engine}, spoiled after"]["rates"])
    assert after[2] == pytest.approx(plain[1] / 1.5)
    for found in ranks:
        assert "no rate can be found from the first batch" in found[f"{engine}, bad start"]


@pytest.mark.parametrize("way", ["sharded", "full", "accelerate", "accelerate full"])
def test_resumes_bit_for_bit(ranks, way):
    due = []
    for found in ranks:
        for step in (9, 10):
            case = f"fsdp2 {way} {step}"
            assert found[f"{case}, resumed"] == found[case]
            due.append(found[case]["due"][step])
    assert set(due) == {True, False}


def test_a_flattened_state_loses_the_measurement_that_is_due(ranks):
    """torch reads of a flattened state what the base optimizer has; the next one is made."""
    for found in ranks:
        assert found["fsdp2 flattened 9, resumed"] == found["fsdp2 flattened 9"]
        whole, resumed = (found[f"fsdp2 flattened 10{which}"] for which in ("", ", resumed"))
        assert resumed["rates"][:10] == whole["rates"][:10]
        assert set(whole["steps"]) - set(resumed["steps"]) == {10}


@pytest.mark.parametrize("loop", ["accelerate", "Trainer", "Trainer with FSDP2"])
def test_other_loops(ranks, loop):
    wrapped = "FSDPClassifier" if "FSDP2" in loop else "DistributedDataParallel"
    for micro in (1, 2):
        one, other = (found[f"{loop}, {micro}"] for found in ranks)
        assert one["wrapped"] == wrapped
        assert one["weights"] == other["weights"]
        assert len(set(one["rates"])) > 3


def test_trainer_under_fsdp2_is_as_under_ddp(ranks):
    """Also while accumulating, where FSDP2 keeps back gradients, but not those measured."""
    for micro, tolerance in ((1, 1e-3), (2, 0.1)):  # as without Trainer
        rates = [ranks[0][f"Trainer{which}, {micro}"]["rates"] for which in (" with FSDP2", "")]
        assert numbers(rates[0]) == pytest.approx(numbers(rates[1]), rel=tolerance)


def test_what_is_refused(ranks):
    for found in ranks:
        assert "use FSDP2" in found["fsdp1"]
        assert "kept back while accumulating" in found["fsdp2, kept back"]
