"""scripts/benchmark_*.py: what they refuse, record and leave out; on tiny models, without times."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("timm", reason="the benchmarks' models are timm's: extra [timm]")
pytest.importorskip("transformers", reason="and transformers': extra [trainer]")

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

pytestmark = pytest.mark.slow
peers, measuring, benchmark_step, benchmark_training = map(
    importlib.import_module,
    ("peers", "measuring", "benchmark_step", "benchmark_training"),
)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (benchmark_step, ["--only", "nadam*"], "--only nadam* is for none of SGD foreach, SGD"),
        (benchmark_step, ["--rounds", "1"], "must be at least 2, got 1"),
        (benchmark_step, ["--threads", "0"], "must be at least 1, got 0"),
        (benchmark_step, ["--device", "abacus"], "unknown device 'abacus'"),
        (benchmark_step, ["--device", "meta"], "cpu or cuda, got 'meta'"),
        (benchmark_step, ["--dtype", "int8"], "invalid choice: 'int8'"),
        (benchmark_training, ["--batch_size", "1"], "must be at least 2, got 1"),
        (benchmark_training, ["--model", "llama_0.5b"], "is for benchmark_step.py only"),
        (benchmark_step, ["--model", "resnet5000"], "no model 'resnet5000'; did you mean resnet50"),
        (benchmark_training, ["--model", "nope"], "timm has no model 'nope'; "),
    ],
)
def test_a_bad_argument_is_an_error_in_a_line(script, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        script.main(arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def run(script, options, folder, rows):
    options = [*options.split(), "--rounds", "2", "--device", "cpu", "--output", str(folder)]
    script.main([*options, "--only", *rows])


def ordered(spread):
    return spread["q1"] <= spread["median"] <= spread["q3"]


def test_a_benchmark_of_steps(tmp_path, capsys, monkeypatch):
    """References come along, and what cannot run is listed with the reason."""
    monkeypatch.setitem(sys.modules, "prodigyopt", None)  # as if it were not installed
    monkeypatch.setitem(peers.FORMS, "loop", {"nonsense": True})
    rows = ["adalip foreach", "AdamLip foreach", "rmslip loop", "timm lamb", "*prodigy"]
    run(benchmark_step, "--model test_vit --layers module", tmp_path, rows)
    found = json.loads((tmp_path / "step-test_vit.json").read_text())
    by_name = {row["name"]: row for row in found["rows"]}
    reference = {name: row["reference"] for name, row in by_name.items()}
    assert reference == {
        "SGD fused": "SGD fused",
        "Adam fused": "Adam fused",
        "timm Lamb": "Adam fused",
        "AdaLip foreach": "SGD fused",
        "AdamLip foreach": "Adam fused",
    }
    assert by_name["Adam fused"]["ratio"] == {"median": 1, "q1": 1, "q3": 1}
    for row in found["rows"]:
        assert len(row["rounds_ms"]) == 2
        assert ordered(row["ms"])
        assert ordered(row["ratio"])
        assert row["synchronizations"] is None  # a CPU has none
    state = {name: row["state_bytes_per_parameter"] for name, row in by_name.items()}
    words = {"SGD fused": 4, "Adam fused": 8, "AdaLip foreach": 8, "AdamLip foreach": 12}
    assert {name: round(state[name], 1) for name in words} == words
    largest = 4 * found["model"]["largest"]
    assert by_name["Adam fused"]["peak_extra_bytes"] < 0.01 * largest
    assert by_name["timm Lamb"]["peak_extra_bytes"] > largest
    assert found["not_run"].keys() == {"prodigyopt Prodigy", "RMSLip loop"}
    assert found["not_run"]["prodigyopt Prodigy"] == "not installed: pip install prodigyopt"
    assert found["not_run"]["RMSLip loop"].startswith("TypeError: rmslip has no argument 'nonsens")
    assert found["versions"]["torch"] == torch.__version__
    wanted = {
        "command",
        "date",
        "machine",
        "threads",
        "device",
        "dtype",
        "layers",
        "rounds",
        "seed",
    }
    assert wanted <= found.keys()
    text = (tmp_path / "step-test_vit.md").read_text()
    assert text.startswith("| step of")
    assert "- prodigyopt Prodigy: not installed" in text
    assert text in capsys.readouterr().out
    assert (tmp_path / "step-test_vit.png").stat().st_size > 0


def small_bert():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": 8, "intermediate_size": 8, "vocab_size": 50}
    return BertForSequenceClassification(
        BertConfig(num_attention_heads=2, num_hidden_layers=1, **sizes)
    )


@pytest.mark.parametrize("model", ["test_vit", "bert_base"])
def test_a_benchmark_of_training_steps(model, tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark_training.MODELS, "bert_base", small_bert)
    options = f"--model {model} --batch_size 2 --image_size 64 --sequence_length 5"
    run(benchmark_training, options, tmp_path, ["adamw foreach", "adalipu foreach"])
    found = json.loads((tmp_path / f"training-{model}.json").read_text())
    names = [row["name"] for row in found["rows"]]
    assert names == ["AdamW foreach", "AdamW fused", "AdaLipU foreach"]
    assert found["rows"][1]["overhead_percent"] == {"median": 0, "q1": 0, "q3": 0}
    for row in found["rows"]:
        assert ordered(row["overhead_percent"])
        assert row["step_ms"]["median"] < row["ms"]["median"]
    size = {"image_size": 64} if model == "test_vit" else {"sequence_length": 5}
    assert {"batch_size": 2, "layers": "module", **size}.items() <= found.items()
    assert found["not_run"] == {}


class Greedy(torch.optim.Optimizer):
    """1,000 float32, and 500 at two times, of which 100 stay."""

    def step(self, closure=None):
        first = torch.empty(1000)
        for _ in range(2):
            torch.empty(500)
        self.kept = torch.empty(100)
        return float(first.numel())


def test_peak_extra_is_what_a_step_holds_at_once():
    optimizer = Greedy([nn.Parameter(torch.zeros(3))], {})
    assert benchmark_step.peak_extra(optimizer.step, torch.device("cpu")) == 4 * 1500


def test_state_is_counted_by_the_memory_behind_it():
    """Views of one vector once, what Lipschitz has in its base as well, no parameters."""
    params = [nn.Parameter(torch.zeros(10)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones(10)
    optimizer = torch.optim.SGD(params)
    both = torch.zeros(7)
    for index, param in enumerate(params):
        optimizer.state[param] = {"own": torch.zeros(5), "view": both[index], "grad": param.grad}
    assert benchmark_step.state_bytes(optimizer) == 4 * (2 * 5 + 7)
    wrapped = peers.Lipschitz(torch.optim.Adam(params))
    wrapped.step()
    assert benchmark_step.state_bytes(wrapped) >= 4 * 3 * 20


def test_gradients_are_new_in_every_round():
    args = type("", (), {"device": torch.device("cpu"), "dtype": "float32", "seed": 0})
    tensors = benchmark_step.Tensors({"a": torch.Size((3, 4)), "b": torch.Size(())}, args)
    seen = []
    for _ in range(3):
        tensors.new_gradients()
        seen.append([param.grad for _, param in tensors.named])
    assert len({tuple(a.flatten().tolist()) for a, _ in seen}) == 3
    assert all(p.grad.shape == p.shape for _, p in tensors.named)


@given(
    words=st.lists(st.tuples(st.sampled_from(["one", "two"]), st.integers(1, 4)), max_size=12),
    budget=st.integers(2, 12),
)
def test_groups_fit_and_lose_nothing(words, budget):
    def row(name, reference, size):
        return peers.Row(name, reference, size, lambda named: None)

    references = {name: row(name, name, 2) for name in ("one", "two")}
    rows = [row(str(index), *pair) for index, pair in enumerate(words)]
    found, too_large = measuring.groups(rows, references, budget)
    for group in found:
        assert group[0] == references[group[0].name]
        assert {r.reference for r in group} == {group[0].name}
        assert sum(r.words for r in group) <= budget
    placed = [r for group in found for r in group[1:]] + too_large
    assert sorted(placed, key=lambda r: int(r.name)) == rows
    assert all(2 + r.words > budget for r in too_large)


def test_release_keeps_gradients_and_history_apart():
    release_memory = importlib.import_module("release_memory")
    of = {row: release_memory.training(row, 16, 256) for row in release_memory.ROWS}
    peaks = {row: release_memory.peak(trained)[-1] for row, trained in of.items()}
    one_layer = 4 / 16  # bytes per parameter
    saved = peaks["AdamLip"] - peaks["AdamLip, released, bucket_cap_mb=0"]
    assert 4 - 4 * one_layer < saved < 4 + one_layer
