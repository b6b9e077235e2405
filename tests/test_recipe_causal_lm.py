"""recipes/causal_lm.py as a user runs it, on a small text, and what all recipes with Trainer share.

A real process where it has to die; the rest in this one, because a process takes several seconds
to import transformers.
"""

import importlib.util
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_adalip.recipe.checkpoints import MANIFEST, write_manifest
from hf_adalip.recipe.trainer import exit_status, training
from tests.distributed.ranks import start

from .hub import LoopbackHub

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "recipes" / "causal_lm.py"
spec = importlib.util.spec_from_file_location("recipe_causal_lm", SCRIPT)
assert spec is not None
assert spec.loader is not None
causal_lm = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = causal_lm  # where its dataclass is looked up
spec.loader.exec_module(causal_lm)

TIMES = ("seconds", "seconds_since_then", "command", "resumed_from")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1800 bytes to train on, 112 blocks of 16, and 200 held out."""
    path = tmp_path_factory.mktemp("text") / "input.txt"
    words = random.Random(0).choices(["the ", "lion ", "and ", "a ", "lamb "], k=600)
    path.write_text("".join(words)[:2000])
    return path


def options(text: Path, folder: Path, *more: str) -> list[str]:
    small = ["--hidden_size=16", "--num_hidden_layers=1", "--num_attention_heads=2"]
    small += [
        "--block_size=16",
        "--per_device_train_batch_size=8",
        "--use_cpu",
        "--disable_tqdm=true",
    ]
    return [f"--train_file={text}", f"--output_dir={folder}", *small, *more]


# two epochs of 7 steps; a checkpoint within each, and one at the end of the first
RUN = ["--num_train_epochs=2", "--gradient_accumulation_steps=2", "--bf16", "--logging_steps=3"]
RUN += ["--save_strategy=steps", "--save_steps=0.25", "--save_total_limit=9"]
SHORT = ["--max_steps=2", "--save_strategy=no", "--eval_strategy=no"]


def recipe(argv: list[str]) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return exit_status("causal_lm", causal_lm.main, argv)


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return found


def numbers(folder: Path) -> dict[str, Any]:
    """Everything in the results but times, and the rates and weights."""
    found = {key: value for key, value in results(folder).items() if key not in TIMES}
    for entry in found["epochs"]:
        for key in [key for key in entry if key.endswith(("_runtime", "_per_second"))]:
            entry.pop(key)
    found["rates"] = json.loads((folder / "layer_learning_rates.json").read_text())
    found["weights"] = (folder / "model.safetensors").read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert recipe(options(text, folder, *RUN)) == 0
    return folder


def test_results_say_how_they_came_about(whole: Path, text: Path) -> None:
    found = results(whole)
    assert found["finished"]
    assert (found["step"], found["epoch"]) == (14, 2.0)
    assert [entry["step"] for entry in found["epochs"]] == [7, 14]
    assert (found["optimizer"], found["learning_rate"], found["seed"]) == ("adamlip", 3e-4, 42)
    assert found["optimizer_arguments"]["lr"] == 3e-4
    assert (found["train_samples"], found["eval_samples"]) == (112, 12)
    assert (found["mixed_precision"], found["max_grad_norm"]) == ("bf16", 0.0)
    assert found["dataset_name"] == str(text)
    assert len(found["dataset_fingerprint"]) == 16
    assert found["versions"]["torch"] == torch.__version__
    rates = json.loads((whole / "layer_learning_rates.json").read_text())
    assert rates["steps"] == list(range(1, 15))
    assert "transformer.h.0.attn.c_attn" in rates["scale"]  # layers are modules
    assert all(0.1 <= x <= 10 for scales in rates["scale"].values() for x in scales)
    assert (whole / "layer_learning_rates.png").exists()


def loss_of(folder: Path, text: Path, bf16: bool = False) -> float:
    """Of the saved model, on the blocks that are held out."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    held_out = tokenizer(text.read_text()[-200:], add_special_tokens=False)["input_ids"]
    blocks = torch.tensor(held_out)[:192].view(-1, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        losses = [model(input_ids=part, labels=part).loss.item() for part in blocks.split(8)]
    return (8 * losses[0] + 4 * losses[1]) / 12


def test_the_model_is_one_of_transformers(whole: Path, text: Path) -> None:
    """Loaded again, it has the loss that was written down."""
    expected = loss_of(whole, text, bf16=True)
    assert results(whole)["eval_loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("optim", ["adamw_torch", "lip-nadam", "secant-adam"])
def test_optimizers_learn(optim: str, text: Path, tmp_path: Path) -> None:
    """Below log 15, the loss of one who knows no more than which letters there are."""
    more = ["--learning_rate=1e-2", "--num_train_epochs=2", "--save_strategy=no"]
    assert recipe(options(text, tmp_path / "out", *more, f"--optim={optim}")) == 0
    found = results(tmp_path / "out")
    assert found["eval_loss"] < math.log(15)
    assert found["optimizer"] == {"adamw_torch": "adamw"}.get(optim, optim)
    assert (tmp_path / "out" / "layer_learning_rates.png").exists() == ("lip" in optim)
    assert (tmp_path / "out" / "secant.json").exists() == ("secant" in optim)


def test_llama_and_overrides(text: Path, tmp_path: Path) -> None:
    more = ["--model_type=llama", "--config_overrides=num_key_value_heads=1", "--optim=adalip"]
    assert recipe(options(text, tmp_path / "out", *SHORT, *more)) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = {"model_type": "llama", "intermediate_size": 64, "num_key_value_heads": 1}
    assert {key: config[key] for key in expected} == expected


def test_an_encoder_that_can_be_a_decoder(text: Path, tmp_path: Path) -> None:
    more = ["--model_type=bert", "--config_overrides=is_decoder=True"]
    assert recipe(options(text, tmp_path / "out", *SHORT, *more)) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["is_decoder"]


# the last step of an epoch has an evaluation and a save to come: the run stops after them
@pytest.mark.parametrize("step", [6, 7])
def test_ctrl_c_saves_and_says_how_to_go_on(
    step: int,
    whole: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_step_end = training.RunCallback.on_step_end

    def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            signal.raise_signal(signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    folder = tmp_path / "out"
    run = options(text, folder, *RUN)
    with monkeypatch.context() as patched:
        patched.setattr(training.RunCallback, "on_step_end", press)
        assert recipe(run) == 130
    message = capsys.readouterr().err
    assert f"stopped at step {step} of 14" in message
    assert "--resume_from_checkpoint latest" in message
    partial = results(folder)
    assert (partial["finished"], partial["step"]) == (False, step)
    assert not (folder / "model.safetensors").exists()
    assert recipe([*run, "--resume_from_checkpoint=latest"]) == 0
    assert results(folder)["resumed_from"].endswith(f"checkpoint-{step}")
    assert numbers(folder) == numbers(whole)


def test_ctrl_c_saves_what_is_not_the_best_too(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is evaluated, and the first has the highest loss."""
    on_step_end = training.RunCallback.on_step_end

    def press(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        on_step_end(self, args, state, control, **kwargs)

    run = ["--optim=adamw_torch", "--learning_rate=1e-2", "--max_steps=5"]
    run += ["--eval_strategy=steps", "--eval_steps=1", "--save_strategy=best"]
    run += ["--metric_for_best_model=loss", "--greater_is_better=true"]
    run = options(text, tmp_path / "out", *run)
    with monkeypatch.context() as patched:
        patched.setattr(training.RunCallback, "on_step_end", press)
        assert recipe(run) == 130
    assert recipe([*run, "--resume_from_checkpoint=latest"]) == 0
    assert results(tmp_path / "out")["resumed_from"].endswith("checkpoint-3")


def test_checkpoints_of_the_model_alone_are_no_run_to_go_on_with(
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ["--save_only_model", "--lr_scheduler_type=constant"]
    run = options(text, tmp_path / "out", *RUN, *more)
    monkeypatch.setattr(training, "any_asked_to_stop", lambda *_: True)
    assert recipe(run) == 130
    message = capsys.readouterr().err
    assert "checkpoint-1; with --save_only_model, no run can go on from there" in message
    assert "latest" not in message
    assert recipe([*run, "--resume_from_checkpoint=latest"]) == 2
    assert "checkpoint-1 has the model alone (--save_only_model)" in capsys.readouterr().err


def test_the_weights_are_not_rounded_for_the_evaluation(text: Path, tmp_path: Path) -> None:
    run = [*SHORT, "--bf16_full_eval"]
    assert recipe(options(text, tmp_path / "a", *SHORT)) == 0
    assert recipe(options(text, tmp_path / "b", *run)) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


DYING = """
import importlib.util, os, signal, sys
from hf_adalip.recipe.trainer import training

spec = importlib.util.spec_from_file_location("recipe_causal_lm", sys.argv[1])
causal_lm = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = causal_lm
spec.loader.exec_module(causal_lm)
write_manifest = training.write_manifest

def dying(folder, step, settings):
    if step == 12:
        path = folder / "optimizer.pt"
        path.write_bytes(path.read_bytes()[:-20])
        os.kill(os.getpid(), signal.SIGKILL)
    write_manifest(folder, step, settings)

training.write_manifest = dying
causal_lm.main(sys.argv[2:])
"""


def test_killed_while_it_saves(whole: Path, text: Path, tmp_path: Path) -> None:
    """kill -9 leaves a torn checkpoint-12; latest is checkpoint-8, and the end is the same."""
    (tmp_path / "dying.py").write_text(DYING)
    folder = tmp_path / "out"
    run = options(text, folder, *RUN)
    process = start(str(tmp_path / "dying.py"), str(SCRIPT), *run, log=tmp_path / "log")
    process.join(200)
    status = process.exitcode
    process.kill()
    assert status == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    assert (folder / "checkpoint-12").exists()
    assert recipe([*run, "--resume_from_checkpoint=latest"]) == 0
    assert results(folder)["resumed_from"].endswith("checkpoint-8")
    assert numbers(folder) == numbers(whole)
    assert (folder / "checkpoint-12" / MANIFEST).exists()


@pytest.mark.parametrize("too_large", ["optimizer.pt", "model.safetensors"])
def test_a_limit_of_file_sizes_is_said_and_what_was_there_stays(
    whole: Path, text: Path, tmp_path: Path, too_large: str
) -> None:
    """`ulimit -f`, in a checkpoint and at the end: the same command goes on when it is gone."""
    folder = tmp_path / "out"
    shutil.copytree(whole / "checkpoint-8", folder / "checkpoint-8")
    (folder / "model.safetensors").write_bytes(b"of before")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    limit = (whole / "checkpoint-8" / too_large).stat().st_size // 1024 - 1
    run = [*options(text, folder, *RUN), "--resume_from_checkpoint=latest"]
    at_end = ["--save_strategy=no"] if too_large == "model.safetensors" else []
    command = ["bash", "-c", f'ulimit -f {limit}; exec "$@"', "-", sys.executable, str(SCRIPT)]
    done = subprocess.run(
        [*command, *run, *at_end],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error: " in line]
    where = folder if at_end else folder / "checkpoint-12"
    assert f"causal_lm: error: {where} could not be written: " in line
    assert "ulimit -f" in line
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert recipe(run) == 0
    assert numbers(folder) == numbers(whole)


def test_a_file_that_was_saved_damaged_is_named(
    whole: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checksum is right."""
    path = Path(shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4"))
    manifest = json.loads((path / MANIFEST).read_text())
    files = ["rng_state.pth", "optimizer.pt", "scheduler.pt", "layer_learning_rates.json"]
    for file in files:
        good = (path / file).read_bytes()
        (path / file).write_bytes(b"torn")
        write_manifest(path, manifest["step"], manifest["settings"])
        resumed = f"--resume_from_checkpoint={path}"
        assert recipe(options(text, tmp_path / "out", *RUN, resumed)) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert f"{path / file} is damaged" in line
        (path / file).write_bytes(good)
    assert not (tmp_path / "out").exists()


def test_killed_in_its_first_save_it_begins_again(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    (folder / "checkpoint-4").mkdir(parents=True)
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"torn")
    assert recipe(options(text, folder, *RUN, "--resume_from_checkpoint=latest")) == 0
    assert "checkpoint-4 is no whole checkpoint" in capsys.readouterr().err
    assert numbers(folder) == numbers(whole)
    assert (folder / "checkpoint-4" / MANIFEST).exists()


def test_a_damaged_checkpoint_is_passed_over(
    whole: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "checkpoint-4"
    damaged.mkdir()
    for path in (whole / "checkpoint-4").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "model.safetensors").write_bytes(b"")
    resumed = f"--resume_from_checkpoint={damaged}"
    assert recipe(options(text, tmp_path / "out", *RUN, resumed)) == 2
    assert f"{damaged / 'model.safetensors'} is damaged" in capsys.readouterr().err


def test_resuming_a_different_run(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [f"--resume_from_checkpoint={whole / 'checkpoint-4'}", "--learning_rate=0.5"]
    assert recipe(options(text, tmp_path / "out", *RUN, *other, "--block_size=8")) == 2
    message = capsys.readouterr().err
    assert "learning_rate was 0.0003, is 0.5" in message
    assert "block_size was 16, is 8" in message


def test_what_trainer_computes_with_must_be_the_same(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resumed = f"--resume_from_checkpoint={whole / 'checkpoint-12'}"
    other = ["--label_smoothing_factor=0.1", '--lr_scheduler_kwargs={"num_cycles": 0.25}']
    assert recipe(options(text, tmp_path / "out", *RUN, resumed, *other)) == 2
    message = capsys.readouterr().err
    assert "label_smoothing_factor was 0.0, is 0.1" in message
    assert "lr_scheduler_kwargs was None, is {'num_cycles': 0.25}" in message
    free = ["--logging_steps=1", "--eval_strategy=no", "--per_device_eval_batch_size=3"]
    free += ["--dataloader_num_workers=1", "--save_strategy=no", "--run_name=x"]
    assert recipe(options(text, tmp_path / "out", *RUN, resumed, *free)) == 0
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, tmp_path / "out")]
    assert weights[0] == weights[1]


def test_the_latest_checkpoint_of_an_empty_folder_is_the_beginning(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = options(text, tmp_path / "out", *SHORT)
    assert recipe([*run, "--resume_from_checkpoint=latest"]) == 0
    assert results(tmp_path / "out")["resumed_from"] is None
    assert recipe(run) == 2
    assert "has results already" in capsys.readouterr().err
    mine = [tmp_path / "out" / name for name in ("model_card.md", "adapter_notes.txt")]
    mine += [tmp_path / "out" / "checkpoint-notes" / "mine", tmp_path / "out" / "model-best" / "x"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert recipe([*run, "--seed=5", "--overwrite_output_dir"]) == 0
    assert results(tmp_path / "out")["seed"] == 5
    assert all(path.exists() for path in mine)


def test_without_a_folder_every_run_has_a_fresh_one(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also two that start in the same second; `latest` goes on in the newest."""
    monkeypatch.chdir(tmp_path)
    run = [option for option in options(text, tmp_path, *SHORT) if "output_dir" not in option]
    monkeypatch.setattr("hf_adalip.recipe.folder.time.strftime", lambda form: "20261129-213045")
    for seed in (0, 1):
        assert recipe([*run, f"--seed={seed}"]) == 0
    first = Path("outputs/causal_lm-adamlip-20261129-213045")
    second = Path("outputs/causal_lm-adamlip-20261129-213045-2")
    found = [json.loads((path / "all_results.json").read_text()) for path in (first, second)]
    assert [results["seed"] for results in found] == [0, 1]
    capsys.readouterr()
    assert recipe([*run, "--resume_from_checkpoint=latest"]) == 2  # it has saved no checkpoint
    assert f"nothing to resume in {second}" in capsys.readouterr().err
    assert recipe([*run, "--overwrite_output_dir"]) == 2
    assert "--overwrite_output_dir needs --output_dir" in capsys.readouterr().err
    assert sorted(Path("outputs").iterdir()) == [first, second]


def test_a_folder_that_trainer_would_take_for_a_checkpoint(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "out" / "checkpoint-10.bak"
    mine.mkdir(parents=True)
    run = options(text, tmp_path / "out", *SHORT, "--overwrite_output_dir")
    assert recipe([*run, "--save_strategy=epoch"]) == 2
    assert "checkpoint-10.bak" in capsys.readouterr().err
    assert recipe(run) == 0
    assert mine.exists()


@pytest.mark.parametrize("name", ["train.py", "tokenizer.json", "training_args.bin"])
def test_files_of_the_user_that_a_run_would_replace(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "out" / name
    mine.parent.mkdir()
    mine.write_text("mine")
    assert recipe(options(text, tmp_path / "out", *SHORT)) == 2
    assert f"has results already ({name}): choose another" in capsys.readouterr().err
    assert [path.read_text() for path in mine.parent.iterdir()] == ["mine"]


def test_a_tokenizer_that_the_run_would_replace(
    whole: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for folder in (out, out / "checkpoint-1"):
        AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
        given = (f"--tokenizer_name={folder}", "--overwrite_output_dir")
        assert recipe(options(text, out, *SHORT, *given)) == 2
        message = f"--tokenizer_name {folder} is in the --output_dir, whose files the run replaces"
        assert message in capsys.readouterr().err
        assert (folder / "tokenizer_config.json").exists()


@pytest.mark.parametrize("folder", ["/proc/none", "/dev/null/out", "x" * 300, "file", "link"])
def test_a_folder_that_cannot_be_made(
    folder: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    assert recipe(options(text, Path(folder), *SHORT)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"causal_lm: error: --output_dir {folder}")
    assert "choose another" in line


def test_gradients_are_clipped_on_demand_only(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms = []

    def clip(self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2) -> Any:
        norms.append(max_norm)
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm)

    monkeypatch.setattr(Accelerator, "clip_grad_norm_", clip)
    assert recipe(options(text, tmp_path / "a", *SHORT)) == 0
    assert norms == [math.inf, math.inf]  # Trainer asks for the norm so, to log it
    assert recipe(options(text, tmp_path / "b", *SHORT, "--max_grad_norm=0.5")) == 0
    assert norms[2:] == [0.5, 0.5]


def test_a_last_batch_that_is_dropped_is_not_the_only_one(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--dataloader_drop_last", "--per_device_train_batch_size=113"]
    assert recipe(options(text, tmp_path / "out", *more)) == 2
    message = "--dataloader_drop_last leaves nothing of 112 samples to train on: a batch has 113"
    assert message in capsys.readouterr().err


def test_a_config_file_is_under_the_command_line(text: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        f"train_file: {text}\nblock_size: 16\nhidden_size: 16\nnum_attention_heads: 2\n"
        "use_cpu: true\nlearning_rate: 3e-3\nmax_steps: 3\nseed: 9\neval_strategy: no\n"
        "save_strategy: 'no'\noptim: adalip\noptim_args: gamma=0.7,scale_bounds=none\n"
        "accelerator_config: {split_batches: false}\nreport_to: [none]\n"
    )
    argv = [f"--config={config}", "--seed=2", f"--output_dir={tmp_path / 'out'}"]
    assert recipe(argv) == 0
    found = results(tmp_path / "out")
    assert (found["seed"], found["step"], found["optimizer"]) == (2, 3, "adalip")
    assert found["optimizer_arguments"]["gamma"] == 0.7
    assert found["optimizer_arguments"]["scale_bounds"] is None
    assert found["learning_rate"] == 3e-3
    # what the file says is in the command, which can be repeated where the file is not
    assert "--config" not in found["command"]
    config.unlink()
    assert recipe([*shlex.split(found["command"])[1:], "--overwrite_output_dir"]) == 0
    assert results(tmp_path / "out")["eval_loss"] == found["eval_loss"]


def test_trackers_get_the_layers_rates(text: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["--report_to=tensorboard", "--logging_steps=1"]
    assert recipe(options(text, tmp_path / "out", *SHORT, *more)) == 0
    files = list((tmp_path / "out").rglob("events*"))
    tags = {tag for f in files for tag in EventAccumulator(str(f)).Reload().Tags()["scalars"]}
    assert {"train/lipschitz_scale/median", "train/layer_lr/max", "eval/loss"} <= tags


def test_a_run_that_diverges_says_so(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainer would leave such losses out of its logs, and show the mean of the others."""
    more = ["--optim=sgd", "--learning_rate=1e30", "--lr_scheduler_type=constant"]
    assert recipe(options(text, tmp_path / "out", *SHORT, *more)) == 1
    assert "causal_lm: the loss of the finished run is nan: " in capsys.readouterr().err
    found = results(tmp_path / "out")
    assert found["train_loss"] is None
    assert found["eval_loss"] is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--num_train_epochs=-1", "--num_train_epochs must be a positive number, got -1"),
        ("--max_steps=0", "--max_steps must be at least 1, or -1 for --num_train_epochs, got 0"),
        ("--num_train_epochs=two", "invalid float value: 'two'"),
        ("--per_device_train_batch_size=0", "--per_device_train_batch_size must be at least 1"),
        ("--learning_rate=nan", "--learning_rate must be a positive number, got nan"),
        ("--save_total_limit=1", "--save_total_limit must be at least 2, got 1"),
        ("--optim=adamw", "unknown optimizer 'adamw'; did you mean adamw_torch"),
        ("--optim_args=momentum=0.9", "adamlip has no argument 'momentum'"),
        ("--optim_args=name=adamlipu", "adamlip has no argument 'name'"),
        ("--optim_args=model_or_params=1", "adamlip has no argument 'model_or_params'"),
        ("--optim_args=gamma=2", "gamma must be a number between 0 and 1"),
        ("--optim_args=gamma", "optimizer arguments are key=value"),
        ("--optim_args=lr=1", "give lr as --learning_rate"),
        ("--optim=adamw_torch --optim_args=gamma=0.9", "adamw_torch takes none of these"),
        ("--fp16", "--fp16 needs a GPU"),
        ("--report_to=tensorbord", "tensorbord is not supported"),
        ("--lr_scheduler_type=cosin", "invalid choice: 'cosin'"),
        ("--resume_from_checkpoint=/no/such", "there is no folder /no/such"),
        ("--resume_from_checkpoint=latest --overwrite_output_dir", "exclude each other"),
        ("--config=/no/such.yaml", "cannot read --config /no/such.yaml"),
        ("--learning_rat=1", "unrecognized arguments: --learning_rat=1"),
        ("--learning_rat=1", "; did you mean --learning_rate?"),
        ("--train_file=/no/such.txt", "cannot read --train_file /no/such.txt"),
        ("--block_size=1", "--block_size must be at least 2, got 1"),
        ("--block_size=0", "--block_size must be at least 2, got 0"),
        ("--num_attention_heads=0", "--num_attention_heads must be at least 1, got 0"),
        ("--block_size=900", "has 1800 tokens to train on and 200 held out; a block has 900"),
        ("--validation_split_percentage=0", "--validation_split_percentage must be between 0"),
        ("--model_type=gtp2", "no such model"),
        ("--hidden_size=15", "no such model"),
        ("--config_overrides=depth=3", "no such model: key depth isn't in"),
        ("--config_overrides=depth=3", "(--config_overrides takes NAME=VALUE,NAME=VALUE with nam"),
        ("--config_overrides=vocab_size=10", "vocab_size=10: vocab_size must be at least 259"),
        ("--config_overrides=n_positions=4", "--model_type gpt2 cannot take a block of 16 tokens"),
        ("--model_type=llama --num_attention_heads=3", "not a multiple of the number of attention"),
        ("--model_type=bert", "--model_type bert sees the tokens that it is to predict; choose a"),
        ("--model_type=xlnet", "no such model: The model xlnet"),
        ("--config_overrides=depth", "'depth' has no value (--config_overrides takes"),
        ("--optim=lip-sgd --optim_args=momentum=abc", "--optim_args momentum=abc: it must be a n"),
        ("--optim_args=scale_bounds=3", "--optim_args scale_bounds=3 (LOW:HIGH, as in 0.1:10, or"),
        ("--tokenizer_name=/no/such", "--tokenizer_name: there is no folder /no/such"),
        ("--tokenizer_name=./no/such", "--tokenizer_name: there is no folder ./no/such"),
        ("--seed=4294967296", "--seed must be at most 4294967295, got 4294967296"),
        ("--data_seed=4294967296", "--data_seed must be at most 4294967295, got 4294967296"),
        (f"--tokenizer_name={'x' * 5000}", "--tokenizer_name: there is no folder xxx"),
        (
            f"--per_device_train_batch_size={10**20}",
            f"--per_device_train_batch_size must be at most 2147483647, got {10**20}",
        ),
        ("--do_train", "--do_train: leave it out"),
        ("--do_eval", "--do_eval: leave it out"),
        ("--do_predict", "--do_predict: leave it out"),
        ("--auto_find_batch_size", "--auto_find_batch_size: leave it out; the results say which"),
        (
            "--load_best_model_at_end --save_total_limit=2",
            "--save_total_limit must be at least 3 where the best checkpoint is kept too, got 2",
        ),
    ],
)
def test_bad_options_are_one_line_and_touch_nothing(
    more: str, message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recipe([*options(text, tmp_path / "out"), *more.split()]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("causal_lm: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lerning_rate: 1\n", "unknown option 'lerning_rate'; did you mean learning_rate?"),
        ("use_cpu: 3\n", "expected"),
        ("- 1\n", "must have lines of `option: value`"),
        ("a: b: c\n", "cannot read --config"),
    ],
)
def test_bad_config_files(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(content)
    assert recipe([f"--config={tmp_path / 'config.yaml'}", "--train_file=x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.fixture
def as_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(SCRIPT), raising=False)


def test_a_run_is_published_once_and_without_its_checkpoints(
    as_script: None,
    text: Path,
    tmp_path: Path,
    loopback_hub: LoopbackHub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, push = tmp_path / "out", ["--push_to_hub", "--hub_model_id=me/lm", "--hub_private_repo"]
    short = ["--max_steps=2", "--save_strategy=steps", "--save_steps=1", "--optim=adalip"]
    assert recipe(options(text, folder, *short, *push)) == 0
    assert f"published: {loopback_hub.url}/me/lm/commit/" in capsys.readouterr().out
    repo = loopback_hub.repos["me/lm"]
    assert (repo.private, repo.commits) == (True, 1)
    assert {"train.py", "README.md", "model.safetensors", "all_results.json"} <= set(repo.files)
    assert not any("checkpoint" in path for path in repo.files)
    assert b"adalip" in repo.files["README.md"]
    assert b"--hub_model_id" not in repo.files["README.md"]


def test_what_must_not_be_published_stays_where_it_is(
    as_script: None,
    text: Path,
    tmp_path: Path,
    loopback_hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the user's, it is left out; in what the run wrote, the run is there, and the command that
    publishes it is told of."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".env").write_text("PASSWORD=hunter2hunter2")
    push = ["--push_to_hub", "--hub_model_id=me/lm"]
    assert recipe(options(text, folder, *SHORT, *push)) == 0
    assert "left out, a secret, by its name: .env\n" in capsys.readouterr().out
    assert ".env" not in loopback_hub.repos["me/lm"].files
    loopback_hub.requests.clear()
    monkeypatch.setenv("MY_SECRET", "text-generation")
    assert recipe(options(text, folder, *SHORT, *push, "--overwrite_output_dir")) == 1
    message = capsys.readouterr().err
    assert "  all_results.json: contains the value of $MY_SECRET" in message
    assert f"To try again: hf-adalip publish {folder} ..." in message
    assert results(folder)["finished"]
    assert loopback_hub.requests == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--push_to_hub", "--push_to_hub needs --hub_model_id USER/NAME"),
        ("--hub_model_id=me/x", "--hub_model_id and --hub_private_repo need --push_to_hub"),
        ("--push_to_hub --hub_model_id=x", "--push_to_hub: repo_id must be USER/NAME, got 'x'"),
        ("--push_to_hub --hub_model_id=me/x", "the environment's HF_TOKEN"),
        ("--hub_strategy=checkpoint", "--hub_strategy checkpoint: a run is published once"),
        ("--hub_always_push", "--hub_always_push True: a run is published once"),
        ("--hub_revision=x", "--hub_revision x: a run is published once"),
    ],
)
def test_what_publishing_would_lack_is_said_at_the_beginning(
    as_script: None,
    more: str,
    message: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert recipe([*options(text, tmp_path / "out", *SHORT), *more.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_optimizer_that_no_card_describes_is_said_at_the_beginning(
    as_script: None,
    text: Path,
    tmp_path: Path,
    loopback_hub: LoopbackHub,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Trainer's Adafactor is another than torch's."""
    push = ["--push_to_hub", "--hub_model_id=me/lm", "--optim=adafactor"]
    assert recipe(options(text, tmp_path / "out", *SHORT, *push)) == 2
    message = "a model card can say what torch's optimizers and ours are, and adafactor is neither"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_scores_are_of_the_model_that_is_saved(text: Path, tmp_path: Path) -> None:
    """The best checkpoint is the first: every later step makes the model worse."""
    folder = tmp_path / "out"
    worse = ["--optim=sgd", "--learning_rate=1e2", "--lr_scheduler_type=constant"]
    every = ["--max_steps=3", "--eval_strategy=steps", "--save_strategy=steps"]
    every += ["--eval_steps=1", "--save_steps=1", "--load_best_model_at_end"]
    assert recipe(options(text, folder, *worse, *every)) == 0
    found = results(folder)
    losses = {entry["step"]: entry["eval_loss"] for entry in found["epochs"]}
    assert len(losses) == len(found["epochs"]) == 3
    assert found["best_step"] == min(losses, key=losses.__getitem__) < 3
    assert found["eval_loss"] == losses[found["best_step"]] < losses[3]
    kept = folder / f"checkpoint-{found['best_step']}" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == kept.read_bytes()


def test_the_weights_that_are_saved_are_the_averages_that_are_evaluated(
    text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("schedulefree")
    folder, free = tmp_path / "out", ["--optim=schedule_free_adamw", "--learning_rate=1e-2"]
    more = ["--lr_scheduler_type=constant", "--max_steps=6", "--eval_strategy=no"]
    assert recipe(options(text, folder, *free, *more, "--save_strategy=no")) == 0
    assert results(folder)["eval_loss"] == pytest.approx(loss_of(folder, text), rel=1e-5)


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        recipe(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "S would see it as their change. (default: 0.0)" in text
    assert "adalip, rmslip, adamlip" in text
