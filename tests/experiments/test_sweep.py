"""`hf-adalip sweep`, with a script that trains nothing; kills and stops are of real processes."""

import json
import os
import runpy
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

pytest.importorskip("optuna", reason="extra [experiments]")

from hf_adalip.cli import main
from hf_adalip.errors import UsageError
from hf_adalip.experiments import storage, sweep
from hf_adalip.experiments.reading import Changes, load_study, shipped
from hf_adalip.experiments.study import Cell, Peer, Study
from hf_adalip.experiments.trial import Stopped, run, tidy, without_places

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("script.py")
TINY: dict[str, Any] = {
    "script": str(SCRIPT),
    "metric": "accuracy",
    "seeds": 2,
    "scale": {"epochs": "epochs"},
    "control": True,
    "pairs": [{"base": "adam", "form": "adamlip", "learning_rates": [0.1, 0.2]}],
    "discard": ["*.safetensors"],
}
ONE: dict[str, Any] = {
    **{key: TINY[key] for key in ("script", "metric")},
    "seeds": 1,
    "peers": [{"optimizer": "adam", "learning_rates": [0.1, 0.2, 0.3]}],
}
PEER: dict[str, Any] = ONE["peers"][0]
PAIR: dict[str, Any] = TINY["pairs"][0]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "LOOK_AGAIN", 0.1)


def write(study: dict[str, Any], name: str = "tiny") -> str:
    Path(f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return f"{name}.yaml"


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["hf-adalip", "sweep", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(str(ended.value.code))


def rows(folder: str = "studies/tiny") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def start(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hf_adalip.cli", "sweep", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def begun() -> list[tuple[str, int]]:
    """The cells of the runs that were started, and their processes."""
    path = Path("begun")
    lines = path.read_text().splitlines() if path.exists() else []
    return [(name, int(pid)) for name, pid in map(str.split, lines)]


def wait_for(what: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


# --- studies --------------------------------------------------------------------------------------


def test_the_protocol_of_the_paper_is_2320_runs() -> None:
    counts = {name: len(load_study(f"paper_{name}").cells()) for name in ("mnist", "cifar10")}
    assert counts == {"mnist": 900, "cifar10": 1100}
    assert len(load_study("paper_cifar100").cells()) == 320


def test_all_shipped_studies_can_be_read_with_all_their_extras() -> None:
    assert {"compare", "char_lm", "finetune_text", "timm_transfer"} < set(shipped())
    for name in shipped():
        extras = ["control", *yaml.safe_load(shipped()[name].read_text()).get("extras", {})]
        study = load_study(name, extras=extras)
        keys = [cell.key for cell in study.cells()]
        assert len(set(keys)) == len(keys) > 0
        assert study.description


def test_two_pairs_share_the_runs_of_their_base() -> None:
    study = load_study("paper_mnist", {"seeds": 1}, extras=["update_forms"])
    assert Counter(cell.role for cell in study.cells()) == {"base": 18, "form": 36}
    assert {cell.pair for cell in study.cells() if cell.optimizer == "sgd"} == {"sgd/adalip"}


def test_what_a_sweep_ran_is_a_study_too(tmp_path: Path) -> None:
    scale, extras = {"images": 1000, "seeds": 2}, ["control", "update_forms"]
    study = load_study("paper_mnist", scale, extras, rest=["--cpu"])
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study.as_run()))
    again = load_study(str(path))
    assert again.as_run() == study.as_run()
    assert again.cells() == study.cells()
    assert load_study(str(path), extras=extras) == again  # as its own folder asks for, to go on
    assert load_study(str(path), rest=["--dataset_name=x"]).rest == ("--cpu", "--dataset_name=x")
    with pytest.raises(UsageError, match="was run at the scale 1000images-2seeds already"):
        load_study(str(path), {"seeds": 1})
    alone = load_study(write({**ONE, "optimizer_option": None}))
    path.write_text(yaml.safe_dump(alone.as_run()))
    again = load_study(str(path))
    assert (again.full_name, again.optimizer_option) == ("tiny", None)
    assert again == alone


def test_a_sweep_does_not_go_on_from_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, write(ONE)) == 0
    assert call(monkeypatch, "studies/tiny/study.yaml") == 2
    assert "repeat the command that began it" in capsys.readouterr().err
    assert call(monkeypatch, "studies/tiny/study.yaml", "--output_dir", "again") == 0


def test_runs_that_would_share_a_folder_are_refused() -> None:
    peers = (Peer("a-b", (0.1,), ("c",)), Peer("a", (0.1,), ("b-c",)))
    study = Study("s", "s.py", "loss", (0,), peers=peers)
    with pytest.raises(UsageError, match="a-b with the schedule c and of a with b-c would"):
        study.cells()


def test_a_scale_is_in_the_name_and_in_the_arguments() -> None:
    scale = {"seeds": 3, "epochs": 5, "images": 10000}
    study = load_study("paper_mnist", scale)
    assert study.full_name == "paper_mnist-10000images-5epochs-3seeds"
    options = study.options(study.cells()[0], 0.1, "there")
    assert {"--max_train_samples=10000", "--num_train_epochs=5"} <= set(options)
    assert len(study.cells()) == 36 * 3
    assert load_study("paper_mnist").full_name == "paper_mnist"


def test_what_is_behind_the_dashes_comes_last_but_for_the_folder() -> None:
    study = load_study("compare", rest=["--cpu", "--dataset_name", "digits"])
    options = study.options(study.cells()[0], 0.1, "there")
    assert options[-4:] == ["--cpu", "--dataset_name", "digits", "--output_dir=there"]


def test_other_optimizers_learning_rates_schedules_and_seeds() -> None:
    changes = Changes(None, ["rmslip", "mine/yours", "prodigy", "lion"], [0.5], ["constant"], [7])
    study = load_study("compare", changes=changes)
    assert study.full_name == "compare-rmslip-mine-yours-prodigy-lion"
    assert [pair.name for pair in study.pairs] == ["rmsprop/rmslip", "mine/yours"]
    rates = {peer.optimizer: peer.learning_rates for peer in study.peers}
    assert rates == {"prodigy": (1.0,), "lion": (0.5,)}  # Prodigy's own is the study's
    assert {pair.learning_rates for pair in study.pairs} == {(0.5,)}
    assert {(cell.seed, cell.schedule) for cell in study.cells()} == {(7, "constant")}
    assert {cell.role for cell in study.cells()} == {"base", "form", "control", "peer"}


def test_an_optimizer_that_an_extra_has_is_as_it_is_there() -> None:
    changes = Changes(optimizers=["prodigy", "adamlipu", "adalip"])
    study = load_study("paper_mnist", changes=changes)
    assert study.peers == (Peer("prodigy", (1.0,)),)
    assert [pair.name for pair in study.pairs] == ["adam/adamlipu", "sgd/adalip"]
    assert study.pairs[1] == load_study("paper_mnist").pairs[0]
    (pair,) = load_study("paper_cifar10", changes=Changes(optimizers=["adalip"])).pairs
    assert pair.schedules == ("constant",)


def test_what_a_script_of_ones_own_writes_is_kept() -> None:
    assert load_study("compare").discard
    assert load_study("compare", changes=Changes(script="mine.py")).discard == ()


def test_tuning_draws_the_same_learning_rates_for_all() -> None:
    name = write(
        {**ONE, "tune": {"low": 1e-4, "high": 1.0, "trials": 8}, "peers": []}
        | {"peers": [{"optimizer": "adam"}, {"optimizer": "sgd"}]}
    )
    study, again = load_study(name), load_study(name)
    rates = study.peers[0].learning_rates
    assert rates == study.peers[1].learning_rates == again.peers[0].learning_rates
    assert len(rates) == 8
    decades = Counter(int(f"{rate:e}".partition("e")[2]) for rate in rates)
    assert decades == {-4: 2, -3: 2, -2: 2, -1: 2}  # evenly spread


@pytest.mark.parametrize("name", ["char_lm", "compare", "finetune_text", "timm_transfer"])
def test_a_constant_learning_rate_is_one_for_every_script(name: str) -> None:
    """Trainer's own is a linear decay, and that of the recipe for timm a cosine."""
    study = load_study(name)
    asked = {cell.schedule: study.options(cell, 0.1, "there") for cell in study.cells()}
    assert set(asked) == {"constant", "linear"}
    for schedule, options in asked.items():
        assert f"--lr_scheduler_type={schedule}" in options


def test_a_record_is_of_the_runs_that_it_names() -> None:
    wanted = {"optimizer": "adam", "learning_rate": "2e-1", "seed": 0}  # YAML's 2e-1 is a string
    study = load_study(write({**ONE, "record": [{**wanted, "arguments": {"record": "norms"}}]}))
    asked = [c for c in study.cells() if "--record=norms" in study.options(c, 0.1, "there")]
    assert asked == [Cell("peer", "adam", None, "constant", 0.2, 0)]


def test_what_is_named_twice_is_said_once() -> None:
    name = write({**ONE, "scale": {"seeds": "images"}, "extras": {"control": {"peers": []}}})
    with pytest.raises(UsageError, match=r"there are seeds$"):
        load_study(name, {"images": 1})
    with pytest.raises(UsageError, match=r"there are control$"):
        load_study(name, extras=["more"])
    assert load_study(name, {"seeds": 2}, ["control"]).full_name == "tiny-2seeds"


@pytest.mark.parametrize("option", [None, "opt"])
def test_a_script_may_have_another_option_for_the_optimizer(option: str | None) -> None:
    name = write({**ONE, "optimizer_option": option, "arguments": {"optim": "x"}})
    assert "--optim=x" in load_study(name).options(load_study(name).cells()[0], 0.1, "there")


def test_a_link_among_what_is_discarded_leaves_what_it_is_to() -> None:
    Path("run").mkdir()
    Path("kept").mkdir()
    Path("run/link").symlink_to(Path("kept").absolute())
    tidy(Path("run"), ["*"])
    assert not list(Path("run").iterdir())
    assert Path("kept").is_dir()


# --- what it writes -------------------------------------------------------------------------------


def test_a_sweep(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    name = write(TINY)
    assert call(monkeypatch, name, "--workers", "2", "--scale", "epochs=7") == 0
    found = rows("studies/tiny-7epochs")
    assert Counter(row["role"] for row in found) == {"base": 4, "form": 4, "control": 4}
    assert {row["state"] for row in found} == {"complete"}
    assert {row["scale"] for row in found} == {"7epochs"}
    assert {row["study"] for row in found} == {"tiny"}
    assert {row["pair"] for row in found} == {"adam/adamlip"}
    # the medians of S are 2 for seed 0, and 2 for seed 1: of 2, 2 and 3
    scales = {(row["role"], row["median_scale"]) for row in found}
    assert scales == {("base", None), ("form", 2.0), ("control", 2.0)}
    controls = {
        r["learning_rate"]: r["results"]["learning_rate"] for r in found if r["role"] == "control"
    }
    assert controls == {0.1: 0.2, 0.2: 0.4}
    assert {r["optimizer"] for r in found if r["role"] == "control"} == {"adam"}
    share = str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert {row["results"]["threads"] for row in found} == {share}
    assert all("--epochs=7" in row["command"] for row in found)
    run = Path("studies/tiny-7epochs/runs/adam-constant-0.1-0")
    assert {path.name for path in run.iterdir()} == {"all_results.json", "log.txt"}
    study = yaml.safe_load(Path("studies/tiny-7epochs/study.yaml").read_text())
    assert study["name"] == "tiny"
    assert study["scale"] == "7epochs"
    assert study["seeds"] == [0, 1]
    assert study["pairs"][0]["learning_rates"] == [0.1, 0.2]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + 12 + 1
    assert "[ 1/12] adam" in said[1]
    assert "left; best 0.9 by" in said[1]


def test_the_time_that_is_left_follows_the_latest_runs() -> None:
    found = SimpleNamespace(running=lambda: 1)  # beside the one that has just ended
    progress = sweep.Progress(load_study("paper_mnist"), found, 1, print)  # type: ignore[arg-type]
    rows = {str(i): {"seconds": 90.0 if i < 30 else 10.0} for i in range(50)}
    assert progress._left(rows, 60) == 10.0 * 10 / 2
    assert progress._left({}, 60) == 0.0


def test_the_control_is_not_begun_before_its_form_is_finished(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = write({**TINY, "arguments": {"begun": "begun", "sleep": 0.2}})
    assert call(monkeypatch, name, "--workers", "3") == 0
    order = [cell for cell, _ in begun()]
    for rate in ("0.1", "0.2"):
        control = min(
            order.index(f"control-adam-adamlip-constant-{rate}-{seed}") for seed in (0, 1)
        )
        assert control > max(order.index(f"adamlip-constant-{rate}-{seed}") for seed in (0, 1))


def test_nothing_of_this_machine_is_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Path.cwd().parent / "secret" / "mnist"
    assert call(monkeypatch, write(ONE), "--", f"--mode={data}") == 0
    for name in ("results.jsonl", "study.yaml"):
        text = Path("studies/tiny", name).read_text()
        assert "secret" not in text
        assert str(Path.cwd()) not in text
    assert rows()[0]["results"]["data"] == "mnist"
    assert rows()[0]["command"].startswith("python ")


def test_a_path_is_replaced_where_it_begins() -> None:
    here = Path.cwd()
    text = f"File {sys.executable}, {here}/a/b.py, {here}, {here}s, /data, x/data, /data/y, /dat"
    words = ["--dataset_name=/data", "--x=1"]
    expected = f"File python, a/b.py, ., {here}s, data, x/data, data/y, /dat"
    assert without_places(text, words) == expected


def test_a_diverged_run_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, write({**ONE, "arguments": {"mode": "diverged"}})) == 0
    assert {row["state"] for row in rows()} == {"complete"}
    assert rows()[0]["error"] == "exit status 1"
    assert rows()[0]["results"]["accuracy"] is None


# --- going on -------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    name = write({**ONE, "arguments": {"begun": "begun"}})
    assert call(monkeypatch, name) == 0
    assert call(monkeypatch, name) == 0
    assert len(begun()) == 3
    assert call(monkeypatch, name, "--seeds", "0", "1") == 0  # more of the same
    assert Counter(row["seed"] for row in rows()) == {0: 3, 1: 3}
    assert len(begun()) == 6


def test_a_control_follows_the_median_of_s_when_seeds_are_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The script's S is 2 for seed 0, and 2.5 for seed 1."""
    name = write({**TINY, "arguments": {"begun": "begun", "spread": 0.5}})
    for seeds, scale in ((["0"], 2.0), (["0", "1"], 2.25), (["0", "1"], 2.25)):
        assert call(monkeypatch, name, "--seeds", *seeds) == 0
        controls = [row for row in rows() if row["role"] == "control"]
        assert {row["median_scale"] for row in controls} == {scale}
        assert len(controls) == 2 * len(seeds)
        for row in controls:
            rate = scale * row["learning_rate"]
            assert row["results"]["learning_rate"] == pytest.approx(rate)
    assert len(begun()) == 12 + 2  # the two controls of seed 0 twice, and nothing else


def test_an_extra_that_was_begun_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"pairs": [{"base": "adam", "form": "nadamlip", "learning_rates": [0.1]}]}
    name = write({**ONE, "extras": {"more": extra}})
    assert call(monkeypatch, name, "--with", "more,control") == 0
    assert call(monkeypatch, name) == 0
    study = yaml.safe_load(Path("studies/tiny/study.yaml").read_text())
    assert set(study["extras"]) == {"more", "control"}
    assert study["pairs"][0]["form"] == "nadamlip"
    assert len(rows()) == 3 + 1 + 1  # adam at 0.1 is a peer already


def test_failures_are_recorded_and_retried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path("script.py")
    script.write_text(SCRIPT.read_text())
    name = write({**ONE, "script": "script.py", "arguments": {"die_at": 0.2, "begun": "begun"}})
    assert call(monkeypatch, name) == 1
    failed = [row for row in rows() if row["state"] == "failed"]
    assert [row["learning_rate"] for row in failed] == [0.2]
    assert failed[0]["error"] == "exit status 1\nValueError: it died"
    assert failed[0]["results"] is None
    assert "2 runs complete, 1 failed, the first of them adam lr 0.2" in capsys.readouterr().out
    assert call(monkeypatch, name) == 1
    assert len(begun()) == 3  # a failure is not run again by itself
    script.write_text(SCRIPT.read_text().replace('sys.exit("ValueError: it died")', "pass"))
    assert call(monkeypatch, name, "--retry_failed") == 0
    assert len(begun()) == 4
    assert Counter((row["learning_rate"], row["state"]) for row in rows()) == dict.fromkeys(
        [(0.1, "complete"), (0.2, "complete"), (0.3, "complete")], 1
    )


def test_a_control_without_an_s_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = {"base": "adam", "form": "other", "learning_rates": [0.1]}
    assert call(monkeypatch, write({**TINY, "pairs": [pair]})) == 1
    failed = [row for row in rows() if row["state"] == "failed"]
    assert {row["role"] for row in failed} == {"control"}
    assert "no run of adam/other" in failed[0]["error"]


def test_results_are_made_again_from_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    name = write(ONE)
    assert call(monkeypatch, name) == 0
    before = rows()
    path = Path("studies/tiny/results.jsonl")
    path.write_text(path.read_text()[:-40])  # as if killed in the middle of a line
    assert call(monkeypatch, name) == 0
    assert rows() == before
    path.unlink()
    assert call(monkeypatch, name) == 0
    assert rows() == before


def test_a_journal_with_half_a_line_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    name = write({**ONE, "arguments": {"begun": "begun"}})
    assert call(monkeypatch, name) == 0
    with Path("studies/tiny/journal.log").open("a") as file:
        file.write('{"op_code": 5, "work')
    assert call(monkeypatch, name, "--seeds", "0", "1") == 0
    assert len(rows()) == len(begun()) == 6


@pytest.mark.slow
def test_a_storage_by_url(monkeypatch: pytest.MonkeyPatch) -> None:
    name = write({**ONE, "arguments": {"begun": "begun"}})
    url = "sqlite:///trials.db"
    assert call(monkeypatch, name, "--storage", url) == 0
    assert not Path("studies/tiny/journal.log").exists()
    assert call(monkeypatch, name, "--storage", url, "--output_dir", "there") == 0
    assert len(begun()) == 3
    assert rows("there") == rows()


# --- several workers, and their ends --------------------------------------------------------------


@pytest.mark.parametrize("where", ["journal.log", "sqlite:///trials.db"])
def test_a_cell_that_two_workers_enqueue_is_given_to_one(where: str) -> None:
    study = load_study(write(ONE))
    cells = study.cells()[:1]
    one, other = storage.Storage(study, where), storage.Storage(study, where)
    params = {"learning_rate": cells[0].learning_rate, "seed": 0}
    for _ in range(2):  # as both do that look at the same moment
        one.optuna.enqueue_trial(params, {storage.CELL: cells[0].key})
    assert other.claim(cells) is not None
    assert one.claim(cells) is None


def test_a_trial_whose_worker_gives_no_sign_is_free_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study = load_study(write(ONE))
    elsewhere = {"machine": "elsewhere", "pid": 1}
    with monkeypatch.context() as patched:
        patched.setattr(storage, "_this_process", lambda: elsewhere)
        theirs = storage.Storage(study, "journal.log")
        claimed = theirs.claim(study.cells())
    assert claimed is not None
    trial, cell = claimed
    mine = storage.Storage(study, "journal.log")
    monkeypatch.setattr(storage, "GRACE", 0.2)
    assert mine.free_dead() == 0
    time.sleep(0.3)
    theirs.alive(trial, 1)
    assert mine.free_dead() == 0
    time.sleep(0.3)
    assert mine.free_dead() == 1
    again = mine.claim(study.cells())
    assert again is not None
    assert again[1] == cell
    # it was not dead: it is to end, and what it found comes too late
    assert not theirs.alive(trial, 2)
    assert not theirs.finish(trial, {"state": "complete"}, 1.0)
    assert mine.finish(again[0], {"state": "complete"}, 2.0)


def test_a_run_that_is_not_wanted_any_more_is_ended() -> None:
    command = [sys.executable, str(SCRIPT), "--sleep=30", "--begun=begun", "--output_dir=there"]
    with pytest.raises(Stopped):
        run(command, Path("there"), 1, threading.Event(), wanted=lambda: not begun())
    wait_for(lambda: not Path(f"/proc/{begun()[0][1]}").exists(), 20)


def test_what_a_run_has_started_is_ended_with_it() -> None:
    script = (
        "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); "
        "open('child', 'w').write(str(child.pid)); child.wait()"
    )
    child, command = Path("child"), [sys.executable, "-c", script]
    with pytest.raises(Stopped):
        run(command, Path("there"), 1, threading.Event(), lambda: not child.exists())
    wait_for(lambda: not Path(f"/proc/{child.read_text()}").exists(), 20)


@pytest.mark.slow
def test_two_sweeps_run_each_cell_once() -> None:
    name = write({**TINY, "seeds": 4, "arguments": {"begun": "begun", "sleep": 0.05}})
    sweeps = [start(name, "--workers", "2") for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in sweeps]
    assert [process.returncode for process in sweeps] == [0, 0], said
    assert Counter(cell for cell, _ in begun()).most_common(1)[0][1] == 1
    assert len(rows()) == len(begun()) == 24


@pytest.mark.slow
def test_after_kill_9_the_runs_in_progress_are_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    name = write({**ONE, "seeds": 2, "arguments": {"begun": "begun", "sleep": 2.0}})
    process = start(name, "--workers", "2")
    wait_for(lambda: len(begun()) >= 4)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lost = begun()[2:]
    finished = {row["command"] for row in rows()}
    assert len(finished) == 2
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for _, pid in lost), 20)
    assert call(monkeypatch, name, "--workers", "2") == 0
    starts = Counter(cell for cell, _ in begun())
    assert {cell for cell, count in starts.items() if count == 2} == {cell for cell, _ in lost}
    assert sum(starts.values()) == 6 + len(lost)
    assert len(rows()) == 6


@pytest.mark.slow
def test_ctrl_c_ends_the_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    name = write({**ONE, "arguments": {"begun": "begun", "sleep": 30.0}})
    process = start(name)
    wait_for(lambda: len(begun()) == 1)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped; the same command goes on" in said
    assert "Traceback" not in said
    wait_for(lambda: not Path(f"/proc/{begun()[0][1]}").exists(), 20)
    assert rows() == []


# --- what is refused ------------------------------------------------------------------------------

RECORD = {"optimizer": "adam", "learning_rate": 0.2, "seed": 0, "arguments": {}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": None}, "study tiny: metric is missing"),
        ({"scirpt": "x"}, "the file has an unknown key 'scirpt'; did you mean script?"),
        ({"pairs": [{"base": "a", "form": "b"}]}, "b has no learning_rates; give a list of them"),
        ({"peers": [{"optimizer": "a", "learning_rates": []}]}, "a has no learning_rates"),
        ({"learning_rates": [-1], "peers": [{"optimizer": "a"}]}, "a must be positive numbers"),
        ({"pairs": [], "peers": []}, "neither pairs nor peers"),
        ({"seeds": [-1]}, "seeds must be a number of them, or a list"),
        ({"peers": [{"optimizer": "a", "learning_rates": [1], "schedules": ["x"]}]}, "no schedule"),
        ({"direction": "up"}, "direction must be maximize or minimize"),
        ({"tune": {"low": 1, "high": 0.1, "trials": 3}}, "tune must have low, high"),
        ({"pairs": "adam"}, "pairs must be a list"),
        ({"record": [{"seed": 0}]}, "each of record must have arguments, learning_rate"),
        ({"record": [{**RECORD, "learning_rate": 0.4}]}, "record: there is no run of adam at"),
        ({"record": [{**RECORD, "optimizer": "adm"}]}, "record: there is no run of adm at"),
        ({"record": [{**RECORD, "optimizer": ["adam"]}]}, "record: optimizer must be a name"),
        ({"record": [{**RECORD, "learning_rate": "x"}]}, "record: .* learning_rate a positive"),
        ({"record": [{**RECORD, "seed": -1}]}, "record: .* seed at least 0"),
        ({"discard": "*.png"}, "discard must be a list of patterns"),
        ({"discard": 5}, "discard must be a list of patterns"),
        ({"discard": [""]}, "discard must be a list of patterns"),
        ({"discard": ["."]}, "discard must be a list of patterns"),
        ({"discard": ["a/../../*"]}, "discard must be a list of patterns"),
        ({"discard": ["/tmp/*"]}, "discard must be a list of patterns"),
        ({"discard": ["a**"]}, "discard must be a list of patterns"),
        ({"pairs": [{**PAIR, "form": "adam"}]}, "base and form of a pair must differ, got 'adam'"),
        ({"pairs": [PAIR, {**PAIR, "base": "b", "form": "adam"}]}, "adam is the base of a pair"),
        (
            {"peers": [{**PEER, "optimizer": "../x"}]},
            "optimizer of a peer must be a name without /",
        ),
        ({"peers": [{**PEER, "optimizer": "a\\b"}]}, "optimizer of a peer must be a name without"),
        ({"pairs": [{**PAIR, "form": "a/b"}]}, "form of a pair must be a name without /"),
        ({"schedules": {"../x": {}}}, "each of schedules must be a name without /"),
        ({"schedules": {1: {}}}, "each of schedules must be a name without /"),
        ({"scale": {"a/b": "epochs"}}, "each of scale must be a name without /"),
        ({"control": "false"}, "control must be true or false, without quotes, got 'false'"),
        ({"seeds": 1.5}, "seeds must be a number of them, or a list from 0 on, got 1.5"),
        ({"seeds": True}, "seeds must be .* got True"),
        ({"seeds": [True]}, r"seeds must be .* got \[True\]"),
        ({"seeds": -1}, "seeds must be .* got -1"),
        ({"seeds": 0}, "seeds must be .* got 0"),
        ({"seeds": [2**32]}, "seeds must be .* got"),
        (
            {"peers": [{**PEER, "learning_rates": [True]}]},
            r"must be positive numbers, got \[True\]",
        ),
        ({"peers": [{**PEER, "learning_rates": [float("nan")]}]}, "must be positive numbers"),
        ({"peers": [{**PEER, "learning_rates": [-1]}]}, "must be positive numbers"),
        ({"peers": [{**PEER, "learning_rates": [10**400]}]}, "must be positive numbers"),
        ({"tune": {"low": 0.1, "high": 1, "trials": True}}, "tune must have low, high"),
        ({"schedules": {"linear": None}}, "schedule linear must have lines of `key: value`"),
        ({"schedules": 3}, "schedules must have lines of `key: value`, got 3"),
        ({"peers": [{**PEER, "schedules": "constant"}]}, "schedules of adam must be a list"),
        ({"script": "t.py 'x"}, "script must be a file or a module"),
        ({"script": " "}, "script must be a file or a module"),
        ({"script": ["t.py"]}, "script must be a file or a module"),
        ({"metric": ["accuracy"]}, "metric must be a name, got"),
        ({"optimizer_option": ["a"]}, r"optimizer_option must be a name, got \['a'\]"),
        ({"optimizer_option": "seed"}, "optimizer_option must be an option of its own"),
        ({"scale": {"a": [1]}}, r"scale: a must name an argument, got \[1\]"),
        ({"extras": {"e": {"zz": 3}}}, "extra e has an unknown key 'zz'; there are pairs, peers"),
        ({"extras": [1]}, r"extras must be a list of words, got \[1\]"),
        ({"rest": "--cpu"}, "rest must be a list of words, got '--cpu'"),
        ({"scale": "a/b"}, "scale must be a name without /"),
        ({"name": "a/b"}, "name must be a name without /"),
        ({"extras": {"e": 3}}, "extra e must have lines of `key: value`, got 3"),
        ({"arguments": {"learning_rate": 1}}, "arguments must not set learning_rate"),
        ({"arguments": {"seed": 1}}, "arguments must not set seed"),
        ({"arguments": {"output_dir": "x"}}, "arguments must not set output_dir"),
        ({"arguments": {"optim": "x"}}, "arguments must not set optim"),
        ({"schedules": {"linear": {"seed": 1}}}, "schedule linear must not set seed"),
    ],
)
def test_a_study_that_is_none_is_an_error_in_a_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        load_study(write({**ONE, **change}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["papermnist"], "unknown study 'papermnist'; did you mean paper_mnist?"),
        (["none.yaml"], "cannot read the study none.yaml"),
        (["tiny.yaml", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["tiny.yaml", "--scale", "epochs"], "--scale must be KEY=N,KEY=N, got 'epochs'"),
        (
            ["tiny.yaml", "--scale", "images=3"],
            "--scale: tiny has no 'images'; there are epochs, s",
        ),
        (["tiny.yaml", "--with", "more"], "there is no extra 'more'; there are control"),
        (
            ["tiny.yaml", "--learning_rate", "1"],
            "--learning_rate: the optimizers of tiny have lear",
        ),
        (
            ["compare", "--learning_rate", "-1"],
            "learning_rates of adamlip must be positive numbers",
        ),
        (["compare", "--schedules", "cosine"], "adamlip: no schedule 'cosine' in schedules"),
        (["tiny.yaml", "--seeds", "7", "--scale", "seeds=3"], "give one of the two"),
        (["tiny.yaml", "--", "--seed", "5"], "--seed after -- would replace that of every run"),
        (["tiny.yaml", "--", "--learning-rate=1"], "--learning-rate=1 after -- would replace th"),
        (["tiny.yaml", "--scale", "epochs=1", "--", "--epochs", "5"], "that of --scale epochs"),
        (
            ["compare", "--", "--lr_scheduler_type", "cosine"],
            "--lr_scheduler_type after -- would replace that of the schedule",
        ),
        (["tiny.yaml", "--script", "no.py"], "there is no script no.py"),
        (["paper_mnist"], "there is no recipe recipes/mnist.py: recipes are not in the installed"),
        (["tiny.yaml", "--storage", "oracle9://x"], "--storage cannot be used: "),
        (["tiny.yaml", "--storage", "sqlite:////no/folder/db"], "--storage cannot be used: "),
    ],
)
def test_a_bad_argument_is_an_error_in_a_line(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(TINY)
    assert call(monkeypatch, *words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not Path("studies/tiny/runs").exists()


def test_a_damaged_journal_is_an_error_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("studies/tiny").mkdir(parents=True)
    Path("studies/tiny/journal.log").write_text("this is\nno journal\nof any kind\n")
    assert call(monkeypatch, write(TINY)) == 2
    said = capsys.readouterr().err
    assert "studies/tiny/journal.log is damaged, and cannot be read" in said
    assert said.count("\n") == 1


def test_a_locked_database_is_an_error_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, url = write(ONE), "sqlite:///trials.db?timeout=0.1"
    assert call(monkeypatch, name, "--storage", url) == 0
    capsys.readouterr()
    with closing(sqlite3.connect("trials.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert call(monkeypatch, name, "--storage", url, "--seeds", "1") == 2
    said = capsys.readouterr().err
    assert "--storage cannot be used" in said
    assert "database is locked" in said
    assert said.count("\n") == 1


def test_a_study_is_gone_on_with_as_it_was_begun(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, write({**ONE, "arguments": {"mode": "/here/data"}})) == 0
    assert call(monkeypatch, write({**ONE, "arguments": {"mode": "/there/data"}})) == 0
    assert call(monkeypatch, write({**ONE, "arguments": {"mode": "/here/others"}})) == 2
    assert "was begun with mode 'data', and is now to have 'others'" in capsys.readouterr().err
    more = {"arguments": {"mode": "/here/data"}, "schedules": {"slow": {"epochs": 2}}}
    assert call(monkeypatch, write({**ONE, **more})) == 0
    assert call(monkeypatch, write({**ONE, **more, "schedules": {"slow": {"epochs": 3}}})) == 2
    assert "was begun with schedule slow {'epochs': 2}, and is" in capsys.readouterr().err
    assert call(monkeypatch, write({**ONE, **more, "schedules": {}})) == 0
    assert call(monkeypatch, write({**ONE, **more, "direction": "minimize"})) == 2
    assert "was begun with direction 'maximize'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arguments": {"mode": "silent"}},
            "the script wrote no all_results.json into --output_dir",
        ),
        ({"metric": "f1"}, "all_results.json has no f1; its numbers are accuracy, learning_rate"),
    ],
)
def test_a_script_that_does_not_write_what_is_needed(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, write({**ONE, **change})) == 1
    assert {row["state"] for row in rows()} == {"failed"}
    assert rows()[0]["error"] == message


# --- a real recipe --------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_recipe_with_the_control(monkeypatch: pytest.MonkeyPatch) -> None:
    recipes = ["--recipes", str(ROOT / "recipes")]
    options = ["--optim", "adalip", "--learning_rate", "0.1", "--seeds", "0"]
    options += ["--scale", "images=300,epochs=1", "--schedules", "constant"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    words = ["compare", *options, *recipes, "--", "--dataset_name", "digits", "--cpu"]
    assert call(monkeypatch, *words) == 0
    found = {row["role"]: row for row in rows("studies/compare-adalip-300images-1epochs")}
    assert set(found) == {"base", "form", "control"}
    scale = found["form"]["median_scale"]
    assert found["control"]["results"]["learning_rate"] == pytest.approx(0.1 * scale)
    assert found["base"]["optimizer"] == "sgd"
    assert {row["results"]["dataset_fingerprint"] for row in found.values()} == {
        found["base"]["results"]["dataset_fingerprint"]
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["adalip", "rmslip", "adamlip", "adamlipu"])
def test_base_and_form_of_one_seed_begin_with_the_same_weights(form: str, tmp_path: Path) -> None:
    """In a step too small to change anything, both leave what they began with."""
    training = pytest.importorskip("hf_adalip.training")
    from safetensors.torch import load_file

    recipe = runpy.run_path(str(ROOT / "recipes" / "mnist.py"))["RECIPE"]
    base = {"adalip": "sgd", "rmslip": "rmsprop"}.get(form, "adam")
    data = ["--dataset_name=digits", "--cpu", "--max_train_samples=100", "--max_eval_samples=10"]
    weights = {}
    for name, seed in ((base, 0), (form, 0), (form, 1)):
        folder = tmp_path / f"{name}-{seed}"
        options = [f"--optim={name}", f"--seed={seed}", f"--output_dir={folder}"]
        training.train(recipe, [*options, *data, "--learning_rate=1e-30", "--max_train_steps=1"])
        weights[name, seed] = load_file(folder / "model.safetensors")
    first = weights[base, 0]
    assert all(bool((x == weights[form, 0][key]).all()) for key, x in first.items())
    assert any(bool((x != weights[form, 1][key]).any()) for key, x in first.items())
