"""The record of per-layer learning rates."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_adalip import AdamLip, Lipschitz
from hf_adalip.monitor import LayerRateHistory, layerwise, summary
from hf_adalip.optim import LayerRate


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
