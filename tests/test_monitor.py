"""The record of per-layer learning rates."""

from __future__ import annotations

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_adalip import AdamLip, Lipschitz
from hf_adalip.cli import main
from hf_adalip.monitor import LayerRateHistory, layerwise, summary
from hf_adalip.optim import LayerRate
from hf_adalip.plots import read_run


def rates(**scales: float) -> dict[str, LayerRate]:
    return {name: LayerRate(s, 0.1 * s, 1.0, 0) for name, s in scales.items()}


def test_summary_is_over_the_layers():
    found = summary(rates(a=0.5, b=1.0, c=4.0))
    assert found == pytest.approx(
        {
            "lipschitz_scale/min": 0.5,
            "lipschitz_scale/median": 1.0,
            "lipschitz_scale/max": 4.0,
            "layer_lr/min": 0.05,
            "layer_lr/median": 0.1,
            "layer_lr/max": 0.4,
        }
    )
    assert summary({}) == {}


def test_summary_shows_steps_left_out():
    assert summary({"a": LayerRate(1.0, 0.1, 1.0, 3)})["nonfinite_steps"] == 3


def test_a_layer_that_joins_late_has_gaps_before():
    history = LayerRateHistory()
    history.record(1, rates(a=0.5))
    history.record(2, rates(a=0.6, b=2.0))
    history.record(3, rates(b=3.0))
    assert history.steps == [1, 2, 3]
    assert history.scale == {"a": [0.5, 0.6, None], "b": [None, 2.0, 3.0]}


def test_a_saved_history_comes_back(tmp_path):
    history = LayerRateHistory()
    for step in range(1, 6):
        history.record(step, rates(a=step / 10, b=0.5))
    history.save(tmp_path / "h.json")
    again = LayerRateHistory.load(tmp_path / "h.json")
    assert (again.steps, again.scale, again.lr) == (history.steps, history.scale, history.lr)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"steps": []}', '{"steps": 3, "scale": 3, "lr": 3}'),
        *('{"steps": [1], "scale": {"a": []}, "lr": {}}',),
        *('{"steps": [1], "scale": {"a": ["x"]}, "lr": {}}',),
    ],
)
def test_a_broken_history_is_named(tmp_path, text):
    path = tmp_path / "h.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"h\.json is not a history of learning rates"):
        LayerRateHistory.load(path)


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    history = LayerRateHistory()
    history.record(1, rates(a=0.5))
    history.record(2, rates(a=math.pi, b=2.0))
    history.plot(tmp_path / "p.png", title="a run")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def long_history(layers):
    history = LayerRateHistory()
    for step in (1, 2, 5, 9):
        history.record(step, rates(**{f"layer{i}": 0.5 + i / 20 for i in range(layers)}))
    return history


def test_many_layers_are_a_heat_map_with_a_colour_bar():
    pytest.importorskip("matplotlib")
    from hf_adalip.plots import draw_rates

    scale, lr, *bars = draw_rates(long_history(41)).axes
    assert len(bars) == 2
    assert [axes.get_title() for axes in (scale, lr)] == [
        "Lipschitz scale S",
        "learning rate A = lr × S",
    ]
    (mesh,) = scale.collections
    assert mesh.norm.vmin * mesh.norm.vmax == pytest.approx(1.0)  # so that the middle is S = 1
    labels = [label.get_text() for label in scale.get_yticklabels()]
    assert labels == [f"layer{i}" for i in range(41)]
    bottom, top = scale.get_ylim()
    assert bottom > top  # the first layer is at the top
    few = draw_rates(long_history(5))
    assert len(few.axes) == 2
    assert [text.get_text() for text in few.axes[1].get_legend().get_texts()] == [
        f"layer{i}" for i in range(5)
    ]


def test_runs_are_drawn_from_their_folders(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        long_history(12).save(tmp_path / name / "layer_learning_rates.json")
    epochs = [{"step": s, "train_loss": 2.0 / s, "eval_loss": 3.0 / s} for s in (5, 9)]
    (tmp_path / "a" / "all_results.json").write_text(json.dumps({"epochs": epochs}))
    log = [{"step": 5, "loss": 1.0}, {"step": 9, "eval_loss": 0.5}]
    (tmp_path / "b" / "checkpoint-9").mkdir()
    state = tmp_path / "b" / "checkpoint-9" / "trainer_state.json"
    state.write_text(json.dumps({"log_history": log}))
    assert read_run(tmp_path / "a").losses == {
        "train": [(5, 0.4), (9, 2 / 9)],
        "eval": [(5, 0.6), (9, 1 / 3)],
    }
    assert read_run(tmp_path / "b").losses == {"train": [(5, 1.0)], "eval": [(9, 0.5)]}

    def plot(*arguments):
        monkeypatch.setattr(sys, "argv", ["hf-adalip", "plot", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code

    for runs in (["a"], ["a", "b"]):
        picture = tmp_path / "p.png"
        assert plot(*(tmp_path / run for run in runs), "--output", picture) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    for folder, message in (("empty", "has no run: neither"), ("missing", "there is no folder")):
        assert plot(tmp_path / folder) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("hf-adalip plot: error: ")
        assert message in line
    state.write_text("{")
    assert plot(tmp_path / "b") == 1
    assert "trainer_state.json cannot be read as the record of a run" in capsys.readouterr().err


def test_the_optimizer_is_found_inside_what_wraps_it():
    accelerate = pytest.importorskip("accelerate")
    params = [nn.Parameter(torch.ones(2))]
    optimizer = AdamLip(params)
    prepared = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert layerwise(prepared) is optimizer
    assert layerwise(optimizer) is optimizer
    wrapper = Lipschitz(torch.optim.SGD(params, lr=0.1))
    assert layerwise(wrapper) is wrapper
    deepspeed = SimpleNamespace(optimizer=wrapper)  # its optimizers are none of torch
    assert layerwise(deepspeed) is wrapper
    assert layerwise(torch.optim.SGD(params, lr=0.1)) is None
    assert layerwise(None) is None
