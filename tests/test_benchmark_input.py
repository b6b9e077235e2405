"""scripts/benchmark_input.py: both pipelines do the same work, and the record says what was run."""

from __future__ import annotations

import importlib
import json
import random
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "scripts"))
benchmark_input = importlib.import_module("benchmark_input")


def smooth() -> np.ndarray:
    """Two ramps and a hill."""
    y, x = np.mgrid[0:32, 0:32]
    hill = 255 * np.exp(-((x - 13) ** 2 + (y - 18) ** 2) / 60)
    return np.stack([x * 8, y * 8, hill], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("draws", [[1, 1, 0, 0], [0, 0.25, 0.75, 0.9], [0.7, 0, 0.5, 0.1]])
def test_pil_does_the_same_to_an_image(draws: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = iter(draws[:3])
    monkeypatch.setattr(random, "random", lambda: draws[3])
    monkeypatch.setattr(random, "uniform", lambda low, high: low + (high - low) * next(drawn))
    picture = Image.fromarray(smooth())
    theirs = benchmark_input.to_tensor(benchmark_input.changed(picture))
    images = benchmark_input.to_tensor(picture)[None]
    (ours,), _ = benchmark_input.AUGMENT(images, torch.zeros(1), torch.tensor([draws]))
    inside = (slice(None), slice(9, -9), slice(9, -9))  # PIL has black where ours has the border
    assert torch.allclose(ours[inside], theirs[inside], atol=0.02)


def test_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(benchmark_input, "BATCH", 4)
    features = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(num_classes=3)}
    table = {"img": [Image.fromarray(smooth())] * 8, "fine_label": [0, 1, 2, 0] * 2}
    made = datasets.Dataset.from_dict(table, features=datasets.Features(features))
    for split in ("train", "test"):
        made.to_parquet(tmp_path / "data" / f"{split}.parquet")
    threads = torch.get_num_threads()
    folder = ["--dataset_name", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    benchmark_input.main([*folder, "--images", "128", "--rounds", "2", "--seed", "5"])
    torch.set_num_threads(threads)
    found = json.loads((tmp_path / "out" / "input.json").read_text())
    assert (found["rounds"], found["seed"], found["threads"]) == (2, 5, 1)
    assert list(found["rows"]) == ["ours", "PIL", "ours, plain", "PIL, plain"]
    assert found["rows"]["PIL"]["times_pil"]["median"] == 1
    assert found["rows"]["ours"]["images_per_second"]["median"] > 0
    assert found["versions"]["pillow"]
    assert "| ours, plain |" in (tmp_path / "out" / "input.md").read_text()
