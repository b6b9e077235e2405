"""scripts/gpu_evidence.py at toy scale, without a GPU."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("yaml")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import gpu_evidence


def run(folder: Path, only: str, *options: str) -> int:
    return gpu_evidence.main(
        ["--device", "cpu", "--toy", "--output", str(folder), "--only", only, *options]
    )


def test_stages_are_run_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fp16", "cuda_graph", "no_sync", "release"):
        assert run(tmp_path, name) == 0
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["stage"] == name
        assert found["toy"]
        assert found.get("passed", "for a GPU" in str(found.get("skipped")))
    assert capsys.readouterr().out.count("done") == 4
    assert run(tmp_path, "release") == 0
    assert capsys.readouterr().out == ""


def test_the_papers_runs_are_rows_that_a_report_reads(tmp_path: Path) -> None:
    assert run(tmp_path, "paper_mnist-adam*") == 0
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["optimizer"] for row in rows] == ["adam"] * 4 + ["adamlip"] * 4
    assert [row["learning_rate"] for row in rows[:4]] == [0.0005, 0.001, 0.005, 0.01]
    for row in rows:
        assert row["state"] == "complete"
        assert (row["median_scale"] is None) == (row["optimizer"] == "adam")
        assert len(row["results"]["epochs"]) == 1
    assert not list(folder.glob("*.pt"))
    assert json.loads((tmp_path / "paper_mnist-adam.json").read_text())["runs"] == 4


def test_what_has_no_time_left_goes_on_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, "paper_mnist-sgd", "--minutes", "-1") == 0
    assert "1 stage(s) left" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.json"))
    assert run(tmp_path, "paper_mnist-sgd") == 0
    assert (tmp_path / "paper_mnist-sgd.json").exists()


def test_a_stage_that_fails_keeps_no_other_from_being_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cuda_graph(*_: object) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_evidence, "cuda_graph", cuda_graph)
    assert run(tmp_path, "[cr]*") == 1
    found = json.loads((tmp_path / "cuda_graph.json").read_text())
    assert (found["passed"], found["error"]) == (False, "RuntimeError: no kernel image")
    assert json.loads((tmp_path / "release.json").read_text())["passed"]


def test_what_was_small_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    (tmp_path / "release.json").write_text('{"toy": false}')
    assert run(tmp_path, "release") == 0
    assert json.loads((tmp_path / "release.json").read_text())["toy"]


def test_a_program_that_is_cut_off_is_left_for_the_next_call(tmp_path: Path) -> None:
    args = SimpleNamespace(minutes=0.05)
    slow = ["-c", "import time; time.sleep(20)"]
    assert gpu_evidence.program(args, slow, time.monotonic() + 0.5) is None
    found = gpu_evidence.program(args, slow, time.monotonic() + 3.0)
    assert found == {"status": None, "error": "not done after 3 s"}


def test_a_whole_run_needs_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        gpu_evidence.main(["--device", "cpu", "--output", str(tmp_path)])
    assert "--device cpu needs --toy" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(tmp_path, "papr*")
    assert "--only papr* is none of the stages" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_evidence.main(["--device", "cuda", "--data", str(tmp_path), "--only", "paper_*"])
    assert "--data has no folder" in capsys.readouterr().err
