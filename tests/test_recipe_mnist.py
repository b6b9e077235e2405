"""recipes/mnist.py as a user runs it, on the digits of scikit-learn.

Real processes where that is the point (kill -9, two ranks, launchers); the rest in this one,
because a process takes several seconds to import evaluate.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from torch import nn

from hf_adalip.recipe.checkpoints import MANIFEST, write_manifest
from hf_adalip.recipe.image import training
from hf_adalip.recipe.image.data import load_image_dataset
from hf_adalip.recipe.image.training import main
from tests.distributed.ranks import kill_when, start
from tests.distributed.ranks import run as run_on_ranks

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "mnist.py"
spec = importlib.util.spec_from_file_location("recipe_mnist", SCRIPT)
assert spec is not None
assert spec.loader is not None
mnist = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mnist)

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
ENV |= {"TORCH_LOGS": "-torch.utils._pytree"}  # which logs that torchao calls what is deprecated
BASE = ["--dataset_name=digits", "--cpu"]
SHORT = [*BASE, "--max_train_samples=300", "--num_train_epochs=1"]
RUN = [*BASE, "--max_train_samples=500", "--num_train_epochs=6", "--checkpointing_steps=1"]
TIMES = ("seconds", "command")


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def recipe(*options: str, of: training.Recipe = mnist.RECIPE) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(of, options)


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return found


def numbers(folder: Path) -> dict[str, Any]:
    """Everything in the results but times, and the rates and weights."""
    found = {key: value for key, value in results(folder).items() if key not in TIMES}
    for entry in found["epochs"]:
        entry.pop("seconds")
    found["rates"] = json.loads((folder / "layer_learning_rates.json").read_text())
    found["weights"] = (folder / "model.safetensors").read_bytes()
    return found


# Training sees more than chance (0.1) after 3 epochs; seen on seeds 0-2: 0.59-0.64 for SGD's,
# 0.91-0.96 for RMSProp's, 0.86-0.92 for Adam's.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("optim", "least"),
    [
        ("adalip", 0.45),
        ("adalipu", 0.45),
        ("sgd", 0.45),
        ("rmslip", 0.85),
        ("rmslipu", 0.85),
        ("rmsprop", 0.85),
        ("adamlip", 0.78),
        ("adamlipu", 0.78),
        ("adam", 0.78),
        ("lip-nadam", 0.78),
        ("secant-adamw", 0.78),
    ],
)
def test_every_optimizer_learns(optim: str, least: float, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    options = (*BASE, "--num_train_epochs=3", f"--optim={optim}", f"--output_dir={folder}")
    assert recipe(*options) == 0
    found = results(folder)
    assert found["train_accuracy"] > least
    assert found["eval_accuracy"] > 0.25
    assert found["finished"]
    assert (found["epoch"], found["step"], len(found["epochs"])) == (3.0, 36, 3)
    assert (folder / "layer_learning_rates.png").exists() == ("lip" in optim)


def test_results_say_how_they_came_about(tmp_path: Path) -> None:
    assert recipe(*SHORT, "--optim=rmslip", "--seed=3", f"--output_dir={tmp_path / 'out'}") == 0
    found = results(tmp_path / "out")
    assert (found["optimizer"], found["learning_rate"], found["seed"]) == ("rmslip", 7e-4, 3)
    assert found["optimizer_arguments"]["alpha"] == 0.999
    assert found["optimizer_arguments"]["scale_bounds"] is None
    assert found["optimizer_arguments"]["layers"] == "tensor"
    assert (found["train_samples"], found["eval_samples"]) == (300, 360)
    assert len(found["dataset_fingerprint"]) == 16
    assert found["versions"]["torch"] == torch.__version__
    assert "--seed=3" in found["command"]
    rates = json.loads((tmp_path / "out" / "layer_learning_rates.json").read_text())
    assert list(rates["lr"]) == ["conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"]
    assert rates["steps"] == [1, 2, 3]


def test_secant_needs_no_learning_rate_and_resumes(tmp_path: Path) -> None:
    """Bit for bit; the given lr is what a schedule multiplies."""
    options = (*SHORT, "--optim=secant-sgd", "--per_device_train_batch_size=32")
    options += ("--gradient_accumulation_steps=2", "--checkpointing_steps=1")
    assert recipe(*options, f"--output_dir={tmp_path / 'out'}") == 0
    for name, more in (
        ("lr", ["--learning_rate=1e-6"]),
        ("resumed", [f"--resume_from_checkpoint={tmp_path / 'out' / 'step_2'}"]),
        ("between", [f"--resume_from_checkpoint={tmp_path / 'out' / 'step_1'}"]),
    ):
        assert recipe(*options, *more, f"--output_dir={tmp_path / name}") == 0
        found = [results(tmp_path / folder) for folder in ("out", name)]
        assert found[0]["secant_rate"] == found[1]["secant_rate"] > 0
        assert found[0]["eval_loss"] == found[1]["eval_loss"]
        tables = [(tmp_path / folder / "secant.json").read_text() for folder in ("out", name)]
        assert tables[0] == tables[1]
    assert len(json.loads(tables[0])["step"]) > 1
    assert (tmp_path / "out" / "secant.png").stat().st_size > 1000


def test_steps_left_out_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate so large that gradients overflow: the run must not look like a success."""
    options = (*BASE, "--num_train_epochs=2", "--learning_rate=1e6")
    assert recipe(*options, f"--output_dir={tmp_path / 'out'}") == 0
    assert results(tmp_path / "out")["nonfinite_steps"] > 0
    assert "the gradient of a layer was inf or NaN" in capsys.readouterr().out


def test_seeds_decide(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert recipe(*SHORT, f"--seed={seed}", f"--output_dir={tmp_path / name}") == 0
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
    assert numbers(tmp_path / "a") != numbers(tmp_path / "c")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped: 24 steps, a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert recipe(*RUN, f"--output_dir={folder}") == 0
    return folder


def resume(folder: Path, *options: str) -> int:
    return recipe(*RUN, f"--output_dir={folder}", "--resume_from_checkpoint=latest", *options)


def started(folder: Path) -> Any:
    return start(str(SCRIPT), *RUN, f"--output_dir={folder}")


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed(whole: Path, tmp_path: Path) -> None:
    folder, step = tmp_path / "out", random.SystemRandom().randint(2, 18)
    kill_when((folder / f"step_{step}").exists, started(folder))
    assert not (folder / "all_results.json").exists()
    assert resume(folder) == 0
    assert numbers(folder) == numbers(whole), f"killed after step {step}"


@pytest.mark.slow
def test_killed_while_saving_and_resumed(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    kill_when(
        lambda: (folder / "step_2").exists() and any(folder.glob("step_*.partial")),
        started(folder),
    )
    assert resume(folder) == 0
    assert numbers(folder) == numbers(whole)
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("names", [(".partial", ".replaced.partial"), (".replaced.partial",)])
def test_killed_between_the_renames_and_resumed(
    whole: Path, tmp_path: Path, names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checkpoint has its name, but one is whole: it is not made again, nor removed."""
    folder = tmp_path / "out"
    for name in names:
        shutil.copytree(whole / "step_8", folder / f"step_8{name}")
    (folder / "step_9.partial").mkdir()
    loaded = []
    load = training.Training.load
    monkeypatch.setattr(
        training.Training,
        "load",
        lambda run, path, *args: (loaded.append(path), load(run, path, *args)),
    )
    assert resume(folder) == 0
    assert loaded == [folder / "step_8"]
    assert numbers(folder) == numbers(whole)
    assert not list(folder.glob("*.partial"))


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 4, 10, 24])  # in an epoch, at the end of one, and of all
def test_resumed_from_any_step(whole: Path, tmp_path: Path, step: int) -> None:
    folder = tmp_path / "out"
    path = whole / f"step_{step}"
    assert recipe(*RUN, f"--output_dir={folder}", f"--resume_from_checkpoint={path}") == 0
    assert numbers(folder) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", MANIFEST]
)
def test_a_truncated_checkpoint_is_passed_over(
    whole: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    for step in (7, 8):
        shutil.copytree(whole / f"step_{step}", folder / f"step_{step}")
    damaged = folder / "step_8" / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    assert resume(folder) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert str(damaged) in warning
    assert "step_7" in warning
    assert numbers(folder) == numbers(whole)


@pytest.mark.slow
def test_only_a_truncated_checkpoint(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(whole / "step_8", folder / "step_8")
    (folder / "step_8" / "optimizer.bin").write_bytes(b"")
    assert resume(folder) == 2
    assert "nothing to resume" in (message := capsys.readouterr().err)
    assert "optimizer.bin is damaged" in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("random_states_0.pkl", b"\x80\x04N."),
        ("optimizer.bin", b"torn"),
        ("model.safetensors", b"torn"),
        ("layer_learning_rates.json", b'{"steps": [1], "scale": {}, "lr": 3}'),
    ],
)
def test_a_file_that_was_saved_damaged_is_named_and_not_ignored(
    whole: Path, tmp_path: Path, file: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checksum is right; accelerate goes on without random states that it cannot read."""
    path = Path(shutil.copytree(whole / "step_8", tmp_path / "step_8"))
    manifest = json.loads((path / MANIFEST).read_text())
    (path / file).write_bytes(content)
    write_manifest(path, manifest["step"], manifest["settings"])
    out = f"--output_dir={tmp_path / 'out'}"
    assert recipe(*RUN, out, f"--resume_from_checkpoint={path}") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert str(path / file) in line
    assert "damaged" in line
    assert not (tmp_path / "out").exists()


# What a run of three steps writes is, in KiB: weights 206, each with a header; an optimizer's state
# 628; the picture of the rates 79; and all else less than 16.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "named"),
    [
        (100, "model.safetensors"),
        (400, "step_3"),
    ],
)
def test_a_limit_of_file_sizes_is_said_and_what_was_there_stays(
    limit: int, named: str, tmp_path: Path
) -> None:
    """`ulimit -f`: the run before has finished, and what resumes it cannot save."""
    folder = tmp_path / "out"
    assert (
        recipe(*SHORT, "--max_train_steps=2", "--checkpointing_steps=2", f"--output_dir={folder}")
        == 0
    )
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    every = ["--checkpointing_steps=3"] if named == "step_3" else []
    options = [*SHORT, "--max_train_steps=3", *every, f"--output_dir={folder}"]
    command = [sys.executable, str(SCRIPT), *options, "--resume_from_checkpoint=latest"]
    done = subprocess.run(
        ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", *command],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert line.startswith(f"mnist: error: {folder / named} could not be written: ")
    assert "ulimit -f" in line
    assert "Traceback" not in done.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert recipe(*options, "--resume_from_checkpoint=latest") == 0


@pytest.mark.slow
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl"])
def test_a_file_that_is_missing_is_named_before_anything_is_loaded(
    whole: Path,
    tmp_path: Path,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*_: Any) -> None:
        raise AssertionError("nothing is to be loaded")

    monkeypatch.setattr(training.Training, "load", load)
    path = Path(shutil.copytree(whole / "step_8", tmp_path / "step_8"))
    (path / file).unlink()
    out = f"--output_dir={tmp_path / 'out'}"
    assert recipe(*RUN, out, f"--resume_from_checkpoint={path}") == 2
    assert f"{path / file} is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_the_latest_checkpoint_of_an_empty_folder_is_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """What restarts by itself has the same arguments each time; results are still safe."""
    out = f"--output_dir={tmp_path / 'out'}"
    assert recipe(*SHORT, out, "--resume_from_checkpoint=latest") == 0
    assert "starting from the beginning" in caplog.text
    assert results(tmp_path / "out")["step"] == 3
    assert recipe(*SHORT, out, "--resume_from_checkpoint=latest") == 2
    assert "nothing to resume in" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["model.safetensors", "train.py", "step_2"])
def test_the_latest_checkpoint_of_a_folder_of_the_users_replaces_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / name
    if name == "step_2":
        mine.mkdir()
        mine /= "mine"
    mine.write_text("mine")
    run = (*SHORT, f"--output_dir={tmp_path}", "--checkpointing_steps=2")
    assert recipe(*run, "--resume_from_checkpoint=latest") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"there is no checkpoint, and a run would replace {name}; choose another" in line
    assert mine.read_text() == "mine"


def test_killed_in_the_first_save_the_same_command_begins_again(tmp_path: Path) -> None:
    (tmp_path / "step_2.partial").mkdir()
    run = (*SHORT, f"--output_dir={tmp_path}", "--checkpointing_steps=2")
    assert recipe(*run, "--resume_from_checkpoint=latest") == 0
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_2"]


@pytest.mark.slow
def test_resuming_a_different_run(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "step_8", tmp_path / "out" / "step_8")
    assert resume(tmp_path / "out", "--learning_rate=0.5", "--seed=4") == 2
    message = capsys.readouterr().err
    assert "learning_rate was 0.001, is 0.5" in message
    assert "seed was 0, is 4" in message


@pytest.mark.slow
def test_resuming_from_after_the_end(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "step_8", tmp_path / "out" / "step_8")
    assert resume(tmp_path / "out", "--max_train_steps=7") == 2
    assert "step_8 is of step 8, and this run ends at step 7" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["step_8"]


@pytest.mark.slow
def test_a_schedule_accumulation_and_dropout_resume(tmp_path: Path) -> None:
    class Dropping(nn.Sequential):
        def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
            super().__init__(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, classes))

    dropping = replace(mnist.RECIPE, build_model=Dropping)
    options = [*BASE, "--max_train_samples=500", "--num_train_epochs=4", "--checkpointing_steps=3"]
    options += ["--gradient_accumulation_steps=3", "--lr_scheduler_type=linear"]
    options += [
        "--num_warmup_steps=2",
        "--mixed_precision=bf16",
        "--optim_args=gamma=0.9",
        "--layers=module",
    ]
    a, b = tmp_path / "a", tmp_path / "b"
    assert recipe(*options, f"--output_dir={a}", of=dropping) == 0
    resumed = f"--resume_from_checkpoint={a / 'step_3'}"
    assert recipe(*options, f"--output_dir={b}", resumed, of=dropping) == 0
    assert numbers(a) == numbers(b)
    assert results(a)["step"] == 8  # of 4 batches: 3, and the 1 that is left
    assert list(json.loads((a / "layer_learning_rates.json").read_text())["lr"]) == ["2"]


@pytest.mark.slow
def test_checkpoints_of_epochs_and_more_epochs(tmp_path: Path) -> None:
    options = (*BASE, "--max_train_samples=300", "--checkpointing_steps=epoch")
    out = f"--output_dir={tmp_path / 'out'}"
    assert recipe(*options, out, "--num_train_epochs=2") == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("epoch_*")) == [
        "epoch_0",
        "epoch_1",
    ]
    assert recipe(*options, out, "--num_train_epochs=3", "--resume_from_checkpoint=latest") == 0
    assert len(results(tmp_path / "out")["epochs"]) == 3


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    record, save = training.Training._record, training.Training.save
    saved: list[str] = []

    def noted(self: training.Training, name: str) -> Path:
        saved.append(name)
        return save(self, name)

    def press(self: training.Training, loss: torch.Tensor) -> None:
        record(self, loss)
        if self.progress.step == 6:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(training.Training, "_record", press)
        patched.setattr(training.Training, "save", noted)
        assert recipe(*RUN, f"--output_dir={tmp_path / 'out'}") == 130
    message = capsys.readouterr().err
    assert saved == [f"step_{step}" for step in range(1, 7)]  # none twice
    assert "stopped at step 6 of 24" in message
    assert "--resume_from_checkpoint latest" in message
    partial = results(tmp_path / "out")
    assert (partial["finished"], partial["step"]) == (False, 6)
    assert resume(tmp_path / "out") == 0
    assert numbers(tmp_path / "out") == numbers(whole)


def test_the_weights_of_a_compiled_run_have_the_models_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    assert recipe(*SHORT, f"--output_dir={tmp_path / 'out'}") == 0
    assert isinstance(mnist.MNISTNet.from_pretrained(tmp_path / "out"), mnist.MNISTNet)


def test_the_log_has_no_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert recipe(*SHORT, f"--output_dir={tmp_path / 'out'}") == 0
    assert any(message.startswith("epoch 1: ") for message in caplog.messages)
    assert "RANK" not in caplog.text


@pytest.mark.slow
def test_results_are_not_written_over_by_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"--output_dir={tmp_path / 'out'}"
    assert recipe(*SHORT, out, "--checkpointing_steps=2") == 0
    assert recipe(*SHORT, out) == 2
    message = capsys.readouterr().err
    assert "has results already" in message
    assert "--resume_from_checkpoint latest" in message
    assert recipe(*SHORT, out, "--seed=5", "--overwrite_output_dir") == 0
    assert results(tmp_path / "out")["seed"] == 5
    assert not list((tmp_path / "out").glob("step_*"))


@pytest.mark.slow
def test_without_a_folder_every_run_has_a_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also two that start in the same second; `latest` goes on in the newest."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hf_adalip.recipe.folder.time.strftime", lambda form: "20261129-213045")
    saving = (*SHORT, "--checkpointing_steps=2")
    for seed in (0, 1):
        assert recipe(*saving, f"--seed={seed}") == 0
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    first = Path("outputs/mnist-adamlip-20261129-213045")
    second = Path("outputs/mnist-adamlip-20261129-213045-2")
    assert [results(folder)["seed"] for folder in (first, second)] == [0, 1]

    capsys.readouterr()
    assert recipe(*SHORT, "--overwrite_output_dir") == 2
    assert "--overwrite_output_dir needs --output_dir" in capsys.readouterr().err
    assert recipe(*saving, "--seed=1", "--resume_from_checkpoint=latest") == 0
    assert f"results in {second}" in capsys.readouterr().out
    assert sorted(Path("outputs").iterdir()) == [first, second]
    assert recipe(*SHORT, "--optim=sgd", "--resume_from_checkpoint=latest") == 0
    (third,) = set(Path("outputs").iterdir()) - {first, second}
    assert third.name.startswith("mnist-sgd-20")
    assert results(third)["finished"]


@pytest.mark.slow
def test_two_ranks_without_a_folder_share_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their clocks say."""
    (tmp_path / "slow.py").write_text(SLOW_CLOCK)
    monkeypatch.chdir(tmp_path)
    run_on_ranks(2, "slow.py", str(SCRIPT), *TEN_STEPS, "--checkpointing_steps=7")
    (folder,) = Path("outputs").iterdir()
    assert (folder / "step_7" / MANIFEST).exists()
    assert results(folder)["num_processes"] == 2


SLOW_CLOCK = """
import os, runpy, sys, time

strftime, hours = time.strftime, int(os.environ["RANK"])
time.strftime = lambda form, *t: strftime(form, *t or (time.localtime(time.time() + 3600 * hours),))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_checkpoint_of_elsewhere_replaces_no_results(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert recipe(*SHORT, f"--output_dir={folder}", "--seed=5") == 0
    resumed = [f"--output_dir={folder}", f"--resume_from_checkpoint={whole / 'step_10'}"]
    assert recipe(*RUN, *resumed) == 2
    message = capsys.readouterr().err
    assert "has results already" in message
    assert "latest" not in message  # there is no checkpoint in it
    assert "--overwrite_output_dir" not in message  # which resuming excludes
    assert results(folder)["seed"] == 5


@pytest.mark.slow
def test_what_is_the_users_stays(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    for folder in (out / "epoch_plans", out / "step_by_step.d", elsewhere):
        folder.mkdir(parents=True)
        (folder / "mine").touch()
    for name in ("notes_1.partial", "step_by_step.md", "layer_learning_rates.md", "step_5.md"):
        (out / name).touch()
    mine = {path.name for path in out.iterdir()}
    options = (*SHORT, f"--output_dir={out}", "--checkpointing_steps=2")
    assert recipe(*options) == 0
    (out / "step_best").symlink_to(out / "step_2")
    (out / "step_7").symlink_to(elsewhere)
    (out / "step_3.partial").mkdir()
    assert recipe(*options, "--overwrite_output_dir", "--checkpointing_steps=1") == 0
    found = {path.name for path in out.iterdir()}
    assert mine | {"step_best", "step_1", "step_2", "step_3"} <= found
    assert not {"step_7", "step_3.partial"} & found
    for folder in (out / "epoch_plans", out / "step_by_step.d", elsewhere):
        assert (folder / "mine").exists()


@pytest.mark.parametrize("folder", ["/proc/none", "/dev/null/out", "x" * 300])
def test_a_folder_that_cannot_be_made(
    folder: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipe(*SHORT, "--dataset_name=/no/such/folder", f"--output_dir={folder}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mnist: error: --output_dir {folder}")
    assert "choose another" in line


def test_a_config_file_is_under_the_command_line(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "dataset_name: digits\ncpu: true\nlearning_rate: 1e-3\nmax_train_steps: 4\nseed: 9\n"
        "mixed_precision: no\noptim: adalip\noptim_args: gamma=0.7\nscale_bounds: 0.5:2\n"
    )
    out = f"--output_dir={tmp_path / 'out'}"
    assert recipe(f"--config={config}", "--seed=2", "--max_train_samples=300", out) == 0
    found = results(tmp_path / "out")
    assert (found["seed"], found["step"], found["optimizer"]) == (2, 4, "adalip")
    assert found["optimizer_arguments"]["scale_bounds"] == [0.5, 2]
    assert found["optimizer_arguments"]["gamma"] == 0.7
    assert found["learning_rate"] == 0.001
    # so that it can be repeated without the file
    assert "--config" not in found["command"]
    assert "--optim_args=gamma=0.7 --scale_bounds=0.5:2 --seed=2" in found["command"]


def test_norms_are_recorded_and_change_nothing(tmp_path: Path) -> None:
    options = [*BASE, "--optim=sgd", "--learning_rate=0.1", "--max_train_samples=130"]
    options += ["--per_device_train_batch_size=1", "--num_train_epochs=1"]
    assert recipe(*options, f"--output_dir={tmp_path / 'a'}") == 0
    assert recipe(*options, f"--output_dir={tmp_path / 'b'}", "--record=norms") == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in "ab"]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not (tmp_path / "a" / "records.json").exists()
    found = json.loads((tmp_path / "b" / "records.json").read_text())
    assert found["steps"] == list(range(1, 131, 3))
    for measure in ("norm", "mean_abs"):
        for name in (f"weight_{measure}", f"gradient_{measure}", f"update_{measure}"):
            assert set(found[name]) == set(weights[0])
            assert {len(norms) for norms in found[name].values()} == {len(found["steps"])}
        for name, norms in found[f"update_{measure}"].items():  # of SGD
            expected = [0.1 * norm for norm in found[f"gradient_{measure}"][name]]
            assert norms == pytest.approx(expected, rel=1e-3)


def test_a_schedule_free_optimizer_is_evaluated_and_saved_at_its_average(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    options = ["--optim=adamwschedulefree", "--learning_rate=0.01", "--num_train_epochs=3"]
    assert recipe(*BASE, *options, f"--output_dir={tmp_path}") == 0
    model = mnist.build_model((1, 8, 8), 10)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    test = load_image_dataset("digits").test
    batch = test.__getitems__(list(range(len(test))))
    with torch.no_grad():
        correct = model(batch["pixel_values"]).argmax(-1) == batch["labels"]
    accuracy = correct.float().mean().item()
    assert results(tmp_path)["eval_accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert accuracy > 0.5


def test_trackers_get_the_layers_rates(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert recipe(*SHORT, "--with_tracking", f"--output_dir={tmp_path / 'out'}") == 0
    (file,) = (tmp_path / "out" / "mnist").glob("events*")
    tags = EventAccumulator(str(file)).Reload().Tags()["scalars"]
    assert {"lipschitz_scale/median", "layer_lr/max", "eval_accuracy", "learning_rate"} <= {*tags}


def test_a_run_that_diverges_ends_with_valid_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--optim=sgd", "--learning_rate=1e30", f"--output_dir={tmp_path / 'out'}")
    assert recipe(*SHORT, *options) == 1
    assert "mnist: the loss of the last epoch is nan: the training has" in capsys.readouterr().err
    assert results(tmp_path / "out")["train_loss"] is None


def test_a_run_at_chance_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for lr, told in (("50", True), ("1e-3", False)):
        options = (f"--learning_rate={lr}", f"--output_dir={tmp_path / lr}")
        assert recipe(*BASE, "--num_train_epochs=1", *options) == 0
        assert ("and that of guessing 2.303" in capsys.readouterr().err) == told


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num_train_epochs=-1", "--num_train_epochs must be at least 1, got -1"),
        ("--num_train_epochs=two", "invalid int value: 'two'"),
        ("--per_device_train_batch_size=0", "--per_device_train_batch_size must be at least 1"),
        ("--max_train_samples=0", "--max_train_samples must be at least 1, got 0"),
        ("--learning_rate=-1", "--learning_rate must be a positive number, got -1"),
        ("--learning_rate=nan", "--learning_rate must be a positive number, got nan"),
        ("--weight_decay=-0.1", "--weight_decay must be a number from 0 on"),
        ("--optim=adamlp", "unknown optimizer 'adamlp'; did you mean adamlip"),
        ("--optim_args=momentum=0.9", "adamlip has no argument 'momentum'"),
        ("--optim_args=name=adamlipu", "adamlip has no argument 'name'"),
        ("--optim_args=model_or_params=1", "adamlip has no argument 'model_or_params'"),
        ("--optim=lip-sgd --optim_args=momentum=abc", "--optim_args momentum=abc: it must be a n"),
        ("--optim_args=gamma=2", "gamma must be a number between 0 and 1"),
        ("--optim_args=gamma", "optimizer arguments are key=value"),
        ("--optim_args=lr=1", "give lr as --learning_rate"),
        (
            "--optim=sgd --layers=module",
            "--layers cannot be used: sgd has no learning rate per layer",
        ),
        ("--optim=sgd --scale_bounds=1:2", "--scale_bounds cannot be used: sgd has no"),
        ("--scale_bounds=3", "--scale_bounds 3 (LOW:HIGH, as in 0.1:10, or none): "),
        ("--seed=4294967296", "--seed must be at most 4294967295, got 4294967296"),
        ("--learning_rat=1", "; did you mean --learning_rate?"),
        ("--scale_bounds=0.1:10,gamma=0.5", "--scale_bounds 0.1:10,gamma=0.5 (LOW:HIGH, as in"),
        ("--scale_bounds=", "--scale_bounds  (LOW:HIGH, as in 0.1:10, or none): "),
        ("--scale_bounds=2:1", "scale_bounds must be None or (low, high)"),
        ("--layers=block", "--layers must be one of tensor, module, got 'block'"),
        ("--lr_scheduler_type=cosin", "--lr_scheduler_type must be one of constant"),
        ("--num_warmup_steps=5", "--num_warmup_steps needs an --lr_scheduler_type"),
        (
            "--lr_scheduler_type=linear --max_train_steps=5 --num_warmup_steps=5",
            "--num_warmup_steps 5 is not less than the 5 steps of the run; give fewer",
        ),
        ("--image_column_name=img", "--image_column_name img: the digits have no columns"),
        ("--label_column_name=fine", "--label_column_name fine: the digits have no columns"),
        ("--checkpointing_steps=often", "must be a number of steps or epoch, got 'often'"),
        ("--mixed_precision=fp8", "--mixed_precision must be one of no, fp16, bf16"),
        ("--mixed_precision=fp16", "--mixed_precision fp16 needs a GPU"),
        ("--with_tracking --report_to=tensorbord", "unknown tracker 'tensorbord'"),
        ("--with_tracking --report_to=mlflow", "mlflow is not installed"),
        ("--report_to=tensorboard", "--report_to needs --with_tracking"),
        ("--resume_from_checkpoint=/no/such", "there is no folder /no/such"),
        ("--resume_from_checkpoint=latest --overwrite_output_dir", "exclude each other"),
        ("--record=norm", "--record must be one of norms, got 'norm'"),
        ("--resume_from_checkpoint=latest --record=norms", "--record and --resume_from_checkpoint"),
        ("--config=/no/such.yaml", "cannot read --config /no/such.yaml"),
        ("--learning-rate=1", "unrecognized arguments: --learning-rate=1"),
        ("--dataset_name=/no/such/folder", "there is no folder /no/such/folder"),
        (f"--dataset_name={'x' * 5000}", "there is no folder xxx"),
        ("--dataset_name=~no-such-user/data", "there is no folder ~no-such-user/data"),
        (
            f"--per_device_train_batch_size={10**20}",
            f"--per_device_train_batch_size must be at most 2147483647, got {10**20}",
        ),
        (f"--checkpointing_steps={10**20}", "must be a number of steps or epoch, got '100"),
    ],
)
def test_bad_options_are_one_line_and_touch_nothing(
    options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe(*BASE, f"--output_dir={tmp_path / 'out'}", *options.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mnist: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_fp16_of_accelerates_configuration_needs_a_gpu_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert recipe(*SHORT, f"--output_dir={tmp_path / 'out'}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "fp16, of accelerate's configuration, needs a GPU" in line
    assert not (tmp_path / "out").exists()
    assert recipe(*SHORT, f"--output_dir={tmp_path / 'out'}", "--mixed_precision=no") == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1\n", "unknown option 'lerning_rate'; did you mean learning_rate?"),
        ("cpu: 3\n", "cpu must be true or false, got 3"),
        ("seed: [1]\n", "seed must be one value, got [1]"),
        ("seed: x\n", "invalid int value: 'x'"),
        ("- 1\n", "must have lines of `option: value`"),
        ("a: b: c\n", "cannot read --config"),
    ],
)
def test_bad_config_files(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert recipe(f"--config={tmp_path / 'config.yaml'}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_help_has_the_default_learning_rates(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "0.1 on top of SGD, 0.0007 on top of RMSprop, 0.001 on top of Adam" in text


@pytest.mark.slow
def test_offline_without_the_dataset(tmp_path: Path) -> None:
    found = subprocess.run(
        [sys.executable, str(SCRIPT), "--cpu", f"--output_dir={tmp_path / 'out'}"],
        env=ENV | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert "--dataset_name digits" in line
    assert not (tmp_path / "out").exists()


TWO_RANKS = """
import importlib.util, json, os, sys
from hf_adalip.monitor import layerwise
from hf_adalip.recipe.image.training import train

spec = importlib.util.spec_from_file_location("recipe_mnist", sys.argv[1])
mnist = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mnist)
run = train(mnist.RECIPE, sys.argv[3:])
rates = layerwise(run.optimizer).layer_learning_rates()
with open(f"{sys.argv[2]}/rates{os.environ['RANK']}.json", "w") as file:
    json.dump(rates, file)
"""


def torchrun(*arguments: str, status: int = 0) -> str:
    """Two processes; returns what they said."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    # A store for each attempt: in torch 2.15's shared one, gloo looks for the dead of the last.
    env = ENV | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run(
        [*command, *arguments], env=env, check=False, timeout=200, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr[-4000:]
    return done.stderr


@pytest.mark.slow
def test_two_ranks_without_data_say_so_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = torchrun(
        str(SCRIPT), f"--dataset_name={tmp_path / 'none'}", f"--output_dir={out}", status=1
    )
    assert said.count("mnist: error: ") == 1
    assert "training.py" not in said  # in a traceback, beside torchrun's own
    assert not out.exists()


TEN_STEPS = [*BASE, "--max_train_samples=250", "--max_train_steps=10"]


def same_training(folder: Path, other: Path) -> None:
    """Step by step, but for the order in which numbers are added."""
    rates = [json.loads((run / "layer_learning_rates.json").read_text()) for run in (folder, other)]
    assert rates[0]["steps"] == rates[1]["steps"]
    for layer, scales in rates[1]["scale"].items():
        assert rates[0]["scale"][layer] == pytest.approx(scales, rel=1e-3)
    epochs, others = results(folder)["epochs"], results(other)["epochs"]
    assert len(epochs) == len(others)
    for epoch, another in zip(epochs, others, strict=True):
        assert epoch["train_accuracy"] == another["train_accuracy"]
        for loss in ("train_loss", "eval_loss"):
            assert epoch[loss] == pytest.approx(another[loss], rel=1e-4)
    weights = [load_file(run / "model.safetensors") for run in (folder, other)]
    for name, x in weights[1].items():
        assert (weights[0][name] - x).norm() < 1e-4 * x.norm(), name


@pytest.mark.slow
def test_batches_of_a_step_are_one_batch(tmp_path: Path) -> None:
    """Also at the end of an epoch, with fewer of them, the last of which is smaller."""
    options = (*BASE, "--max_train_samples=330", "--num_train_epochs=3", "--learning_rate=1e-4")
    several = ("--per_device_train_batch_size=64", "--gradient_accumulation_steps=4")
    a, b = tmp_path / "a", tmp_path / "b"
    assert recipe(*options, "--per_device_train_batch_size=256", f"--output_dir={a}") == 0
    assert recipe(*options, *several, "--checkpointing_steps=3", f"--output_dir={b}") == 0
    assert results(a)["step"] == 6
    same_training(b, a)
    resumed = f"--resume_from_checkpoint={b / 'step_3'}"
    assert recipe(*options, *several, resumed, f"--output_dir={tmp_path / 'c'}") == 0
    assert numbers(tmp_path / "c") == numbers(b)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps on two ranks, with the rates of each beside it."""
    path = tmp_path_factory.mktemp("two")
    (path / "two.py").write_text(TWO_RANKS)
    two = [str(path / "two.py"), str(SCRIPT), str(path), *TEN_STEPS, "--checkpointing_steps=7"]
    run_on_ranks(2, *two, "--per_device_train_batch_size=32", f"--output_dir={path / 'out'}")
    return path / "out"


@pytest.mark.slow
def test_two_ranks_have_one_s_and_resume(two_ranks: Path, tmp_path: Path) -> None:
    """Two ranks of 32 are one of 64, but for the order in which numbers are added."""
    ranks = [(two_ranks.parent / f"rates{rank}.json").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
    two = [str(SCRIPT), *TEN_STEPS, "--per_device_train_batch_size=32"]
    resumed = f"--resume_from_checkpoint={two_ranks / 'step_7'}"
    run_on_ranks(2, *two, f"--output_dir={tmp_path / 'b'}", resumed)
    assert numbers(tmp_path / "b") == numbers(two_ranks)

    one = tmp_path / "one"
    assert recipe(*TEN_STEPS, "--per_device_train_batch_size=64", f"--output_dir={one}") == 0
    same_training(two_ranks, one)
    assert results(two_ranks)["num_processes"] == 2


DYING = """
import importlib.util, os, signal, sys
from pathlib import Path

import torch
from hf_adalip.recipe.image import training

spec = importlib.util.spec_from_file_location("recipe_mnist", sys.argv[1])
mnist = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mnist)
start = (int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"]))
after_step, save = training.Training._after_step, torch.save

def die():
    Path(sys.argv[2], f"died{start[0]}").touch()
    os.kill(os.getpid(), signal.SIGKILL)

def dying_after_step(run, *args):
    if start == (0, 1) and run.progress.step == 5:
        die()
    after_step(run, *args)

def dying_save(what, file, *args, **kwargs):
    save(what, file, *args, **kwargs)
    if start == (1, 0) and "step_8" in str(file):
        Path(file).write_bytes(Path(file).read_bytes()[:-20])
        die()

training.Training._after_step, torch.save = dying_after_step, dying_save
sys.exit(training.main(mnist.RECIPE, sys.argv[3:]))
"""


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed(two_ranks: Path, tmp_path: Path) -> None:
    """kill -9 of one rank in a step, then of the other while it saves: the same end, unasked."""
    (tmp_path / "dying.py").write_text(DYING)
    folder = tmp_path / "out"
    torchrun(
        *("--max-restarts=2", str(tmp_path / "dying.py"), str(SCRIPT), str(tmp_path)),
        *(*TEN_STEPS, "--per_device_train_batch_size=32", f"--output_dir={folder}"),
        *("--checkpointing_steps=2", "--resume_from_checkpoint=latest"),
    )
    assert (tmp_path / "died0").exists()
    assert (tmp_path / "died1").exists()
    assert numbers(folder) == numbers(two_ranks)


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path) -> None:
    """It sets an environment variable that would win over --gradient_accumulation_steps."""
    command = ["-m", "accelerate.commands.launch", "--cpu", str(SCRIPT), *SHORT]
    options = ["--gradient_accumulation_steps=3", f"--output_dir={tmp_path / 'out'}"]
    subprocess.run(
        [sys.executable, *command, *options],
        env=ENV,
        check=True,
        timeout=100,
        capture_output=True,
    )
    assert results(tmp_path / "out")["step"] == 1
