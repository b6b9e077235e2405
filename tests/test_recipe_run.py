"""What a run is to its user, whichever loop trains: how it is stopped, and its exit status."""

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("accelerate")

from hf_adalip.errors import (
    DataError,
    DivergedError,
    Interrupted,
    PublishError,
    SaveError,
    UsageError,
)
from hf_adalip.recipe.folder import OwnFiles
from hf_adalip.recipe.run import any_asked_to_stop, exit_status
from tests.distributed.ranks import run


@pytest.mark.slow
def test_what_is_asked_of_one_process_all_do_at_the_same_step() -> None:
    run(2, "stopping", timeout=100)


def test_a_single_process_asks_nobody() -> None:
    alone = SimpleNamespace(num_processes=1)
    assert not any_asked_to_stop(SimpleNamespace(stop_asked=False), alone, 7)
    assert any_asked_to_stop(SimpleNamespace(stop_asked=True), alone, 7)


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (None, 0, ""),
        (UsageError("--seed must be"), 2, "mnist: error: --seed must be\n"),
        (DataError("no images"), 2, "mnist: error: no images\n"),
        (SaveError("x: no space left"), 1, "mnist: error: x: no space left; checkpoints and"),
        (DivergedError("the loss is nan"), 1, "mnist: the loss is nan\n"),
        (PublishError("the Hub cannot be reached"), 1, "the Hub cannot be reached\n"),
        (Interrupted("stopped at step 1"), 130, "mnist: stopped at step 1\n"),
        (KeyboardInterrupt(), 130, "mnist: stopped, nothing saved\n"),
    ],
)
def test_exit_status(
    error: BaseException | None, status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(argv: list[str]) -> None:
        assert argv == ["--cpu"]
        if error is not None:
            raise error

    assert exit_status("mnist", main, ["--cpu"]) == status
    found = capsys.readouterr().err
    assert found == said if not said or said.endswith("\n") else found.startswith(said)


def test_the_users_files_are_not_the_runs(tmp_path: Path) -> None:
    own = OwnFiles(r"config\.json", "step_[0-9]+")
    for name in ("step_1", "step_2", "step_3x", "train.py"):
        (tmp_path / name).mkdir()
    for name in ("all_results.json", "config.json", "config.yaml", "step_4"):
        (tmp_path / name).touch()
    assert own(tmp_path / "none") == []
    assert [path.name for path in own(tmp_path)] == [
        *("all_results.json", "config.json", "step_1", "step_2")
    ]
    own.clear(tmp_path, overwrite=False, unfinished=lambda path: path.name == "step_2")
    assert [path.name for path in own(tmp_path)] == ["all_results.json", "config.json", "step_1"]
    own.clear(tmp_path, overwrite=True, unfinished=lambda path: False)
    assert own(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 4
