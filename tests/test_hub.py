"""Publishing the run of a recipe on a Hub (tests/hub.py), and running what was published."""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from huggingface_hub._eval_results import parse_eval_result_entries
from huggingface_hub.cli.hf import app as hf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from safetensors.torch import save_file
from torch import tensor

import hf_adalip
from hf_adalip.cli import main
from hf_adalip.publish import PublishError, hub, prepare, publish, script
from hf_adalip.publish.card import repeat_arguments
from hf_adalip.recipe.image import training
from hf_adalip.version import __version__

from .hub import TOKEN, LoopbackHub

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "mnist.py"
ENV = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
OPTIONS = ["--dataset_name=digits", "--max_train_samples=300", "--max_train_steps=3", "--cpu"]
WHEEL = f"hf_adalip-{__version__}-py3-none-any.whl"
REPO = "me/digits-adamlip"
PUBLISH = [sys.executable, "-c", "from hf_adalip.cli import main; main()", "publish"]


@contextmanager
def recipes() -> Iterator[Callable[..., int]]:
    """A recipe's command line in this process, as if it were the script that runs."""
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules["__main__"], "__file__", str(RECIPE), raising=False)
        reset()
        yield lambda *options: training.main(module.RECIPE, options)
        reset()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a recipe."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with recipes() as recipe:
        assert recipe(*OPTIONS, "--seed=3", f"--output_dir={folder}") == 0
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(run, tmp_path / "out"))


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "all_results.json").read_text())
    return found


def change(folder: Path, **values: Any) -> None:
    found = {k: v for k, v in (results(folder) | values).items() if v is not ...}
    (folder / "all_results.json").write_text(json.dumps(found))


def cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["hf-adalip", "publish", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def large(hub: LoopbackHub) -> list[str]:
    """sha256 of what a repository has of large files, sorted."""
    files = hub.repos[REPO].files
    return sorted(
        hashlib.sha256(data).hexdigest()
        for path, data in files.items()
        if path.endswith((".safetensors", ".png", ".whl"))
    )


def test_a_run_is_published(run: Path, loopback_hub: LoopbackHub) -> None:
    assert publish(run, REPO) == f"{loopback_hub.url}/{REPO}/commit/{'0' * 40}"
    repo = loopback_hub.repos[REPO]
    assert (repo.private, repo.commits) == (False, 1)
    made = {"README.md", "train.py", WHEEL}
    kept = {path.name for path in run.iterdir()} - made
    assert {"model.safetensors", "all_results.json", "layer_learning_rates.png"} <= kept
    assert set(repo.files) == made | kept
    for name in kept:
        assert repo.files[name] == (run / name).read_bytes()
        assert Path(hf_hub_download(REPO, name)).read_bytes() == repo.files[name]
    assert set(HfApi().list_repo_files(REPO)) == set(repo.files)


def test_the_card_says_how_the_run_came_about(run: Path) -> None:
    text = prepare(run, REPO)["README.md"]
    assert isinstance(text, bytes)
    card, found = ModelCard(text.decode()), results(run)
    assert {x.metric_type: x.metric_value for x in card.data.eval_results} == {
        "accuracy": found["eval_accuracy"],
        "loss": found["eval_loss"],
    }
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets is None  # digits are not on the Hub
    rows = dict(
        line.strip("| ").split(" | ", 1)
        for line in card.text.splitlines()
        if line.startswith("| ") and " | " in line.strip("| ")
    )
    assert rows["optimizer"].startswith("AdamLip with lr=0.001")
    assert (rows["γ"], rows["c"], rows["layers"]) == ("0.8", "1e-08", "tensor")
    assert (rows["learning rate"], rows["seed"]) == ("0.001", "3")
    assert found["dataset_fingerprint"] in rows["data"]
    assert {name: rows[name] for name in found["versions"]} == found["versions"]
    assert "](layer_learning_rates.png)" in card.text
    assert f"/{REPO}/resolve/main/train.py {' '.join(OPTIONS)} --seed=3 --output_dir" in card.text
    assert str(run) not in card.text


def test_the_card_of_secant_has_the_rate_that_was_found(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    found = results(run) | {
        "optimizer": "secant-adamw",
        "optimizer_arguments": {"every": 50, "weight_decay": 0.1},
        "learning_rate": 1.0,
        "secant_rate": 0.00123456,
    }
    (folder / "all_results.json").write_text(json.dumps(found))
    (folder / "layer_learning_rates.png").rename(folder / "secant.png")
    files = prepare(folder, REPO)
    text = files["README.md"]
    assert isinstance(text, bytes)
    assert "secant.png" in files
    assert "](secant.png)" in text.decode()
    assert "](layer_learning_rates.png)" not in text.decode()
    assert "| learning rate | 0.00123 at the end, found |" in text.decode()
    assert "| optimizer | Secant(AdamW) with every=50, " in text.decode()


def stub(folder: Path, name: str, version: str) -> None:
    """An empty wheel, for a dependency that is to be resolved but is here already."""
    stem = f"{canonicalize_name(name).replace('-', '_')}-{version}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        info = f"{stem}.dist-info"
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.slow
def test_what_was_published_runs_and_is_the_same_run(
    run: Path, loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    """`uv run URL`: uv resolves the pins and installs hf_adalip from the repository's wheel.

    torch and the other dependencies are stubs for the resolver, in the versions that are
    installed here, and are then imported from here; hf_adalip itself is nowhere else.
    """
    find_uv_bin = pytest.importorskip("uv").find_uv_bin
    publish(run, REPO)
    stubs, modules = tmp_path / "stubs", tmp_path / "site-packages"  # dill looks for that name
    stubs.mkdir()
    modules.mkdir()
    needed = {Requirement(text).name for text in metadata.requires("hf-adalip") or []}
    for name in needed | results(run)["versions"].keys() - {"python", "hf_adalip"}:
        try:
            stub(stubs, name, metadata.version(name).partition("+")[0])
        except metadata.PackageNotFoundError:
            continue
    for path in reversed([path for path in sys.path if path.endswith("site-packages")]):
        for item in Path(path).iterdir():
            if "hf_adalip" not in item.name and not (modules / item.name).exists():
                (modules / item.name).symlink_to(item)
    out = tmp_path / "again"
    command = [
        *(find_uv_bin(), "run", "--no-config", "--no-index", "--find-links", str(stubs)),
        *("--python", sys.executable, f"{loopback_hub.url}/{REPO}/resolve/main/train.py"),
        *(*OPTIONS, "--seed=3", f"--output_dir={out}"),
    ]
    env = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "VIRTUAL_ENV")}
    env |= {
        "PYTHONPATH": str(modules),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, env=env, cwd=tmp_path, timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert ("GET", f"/{REPO}/resolve/main/{WHEEL}") in loopback_hub.requests
    assert (out / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    again = prepare(out, REPO)["train.py"]  # and may be published in its turn
    assert again == loopback_hub.repos[REPO].files["train.py"]


def test_a_dry_run_shows_everything_and_touches_no_network(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def connect(*_: Any) -> None:
        raise AssertionError("no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    before = {path: path.read_bytes() for path in run.iterdir()}
    assert cli(monkeypatch, run, "--repo_id", REPO, "--dry-run") == 0
    shown, files = capsys.readouterr().out, prepare(run, REPO)
    for path, content in files.items():
        size = len(content if isinstance(content, bytes) else content.read_bytes())
        assert f"{size:13,}  {path}\n" in shown
    card = files["README.md"]
    assert isinstance(card, bytes)
    assert card.decode() in shown
    assert {path: path.read_bytes() for path in run.iterdir()} == before


REFUSED = {
    "epoch_0/model.safetensors": ("epoch_0", b"", "a checkpoint"),
    "step_10.partial/x": ("step_10.partial", b"", "a checkpoint"),
    "checkpoint-500/model.safetensors": ("checkpoint-500", b"", "a checkpoint"),
    "mine/checkpoint.json": ("mine", b"{}", "a checkpoint"),
    "optimizer.pt": ("optimizer.pt", b"", "the state of an optimizer"),
    "a/optimizer_0.safetensors": ("a/optimizer_0.safetensors", b"", "the state of an optimizer"),
    "rng_state_0.pth": ("rng_state_0.pth", b"", "the state of an optimizer or of another part"),
    "states.bin": ("states.bin", b"", "a pickle"),
    ".env": (".env", b"", "a secret, by its name"),
    "deploy/key.PEM": ("deploy/key.PEM", b"", "a secret, by its name"),
    "id_rsa": ("id_rsa", b"", "a secret, by its name"),
    "credentials.json": ("credentials.json", b"", "a secret, by its name"),
    **{
        name: (name, b"x", "a secret, by its name")
        for name in (
            *("api_key.txt", "wandb_api_key.txt", "apikey", "hf_token", "access_token.json"),
            *("secret_key.txt", "service_account-7.json", "kaggle.json", "my.env", "env"),
            *("passwd", "refresh-token.txt", "aws_credentials", "client_secret_12.json"),
        )
    },
    "checkpoint-100.tar.gz": ("checkpoint-100.tar.gz", b"", "an archive"),
    "runs.ZIP": ("runs.ZIP", b"", "an archive"),
    "exp_avg.safetensors": ("exp_avg.safetensors", b"", "the state of an optimizer"),
    "a.txt": ("a.txt", b"glpat-ABCDEFGHIJKLMNOPQRST", "contains a GitLab token"),
    "b.txt": ("b.txt", b"sk-" + b"A1b2" * 12, "contains an API key"),
    "c.txt": ("c.txt", b"https://user:hunter2@host/x", "contains a password in a URL"),
    "keys_of_wandb": ("keys_of_wandb", b"a1" * 20 + b"\n", "has nothing but what may be a key"),
    ".git/config": (".git", b"", "hidden"),
    "notes.txt": ("notes.txt", b"x hf_" + b"a1B2" * 9, "contains a Hugging Face token"),
    "log/run.out": ("log/run.out", f"token={TOKEN}".encode(), "contains a Hugging Face token"),
    "wandb.yaml": ("wandb.yaml", b"key: 0123456789abcdef", "contains the value of $WANDB_API_KEY"),
    "training_args.bin": (
        "training_args.bin",
        b"\0\1" + b"-----BEGIN OPENSSH PRIVATE KEY-----",
        "contains a private key",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("path", REFUSED)
def test_what_must_not_be_published_is_refused(
    folder: Path,
    path: str,
    loopback_hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    named, content, why = REFUSED[path]
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    for dry in ([], ["--dry-run"]):
        asked = [] if named == "training_args.bin" else ["--include", named]
        assert cli(monkeypatch, folder, "--repo_id", REPO, *asked, *dry) == 1
        message = capsys.readouterr().err
        assert f"  {named}: {why}" in message
        assert TOKEN not in message
    assert f"--exclude {named}" in message
    assert loopback_hub.requests == []
    # unasked, it is left out and named, unless it is what a run writes
    options = ["--exclude", named] if named == "training_args.bin" else []
    assert cli(monkeypatch, folder, "--repo_id", REPO, *options) == 0
    assert not any(name.startswith(named) for name in loopback_hub.repos[REPO].files)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out, ")]
    assert any(named.partition("/")[0] in line for line in said)


def test_everything_that_is_wrong_is_said_at_once(folder: Path, tmp_path: Path) -> None:
    change(folder, command=f"train.py --hub_token {TOKEN}")
    (folder / "scheduler.pt").touch()
    (folder / "link.txt").symlink_to(tmp_path)
    save_file({"x": tensor([1.0])}, folder / "b.safetensors", {"by": f"{TOKEN}"})
    with pytest.raises(PublishError) as error:
        prepare(folder, REPO, include=["scheduler.pt", "link.txt", "b.safetensors"])
    token = "contains a Hugging Face token"
    for line in (f"all_results.json: {token}", f"b.safetensors: {token}"):
        assert f"  {line}\n" in str(error.value)
    for line in ("scheduler.pt: the state of", "link.txt: a link"):
        assert f"  {line}" in str(error.value)


def test_names_that_only_look_like_secrets(folder: Path) -> None:
    names = ["tokenizer.json", "special_tokens_map.json", "added_tokens.json", "keys.txt"]
    names += ["steps.txt", "training_args.bin", "logs/events.out.tfevents.1.host"]
    names += ["tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json", "merges.txt"]
    names += ["adapter_config.json", "generation_config.json", "chat_template.jinja", "monkey.txt"]
    names += ["preprocessor_config.json", "key_figures.csv", "environment.yml", "tokens.json"]
    (folder / "logs").mkdir()
    begins = {"training_args.bin": b"PK\3\4", "logs/events.out.tfevents.1.host": b"brain.Event:2"}
    for name in names:
        text = (
            'hf_adalip, hf_hub_download_of_things, risk-free https://host:80/@me {"://": 1, "a:b@c'
        )
        written = json.dumps(text) if name.endswith(".json") else text
        (folder / name).write_bytes(begins.get(name, b"") + written.encode())
    (folder / "tokenizer_fingerprint.txt").write_text("0123456789abcdef\n")
    others = ["keys.txt", "steps.txt", "monkey.txt", "key_figures.csv", "environment.yml"]
    others += ["tokens.json"]
    assert {*names} <= {*prepare(folder, REPO, include=[*others, "tokenizer_fingerprint.txt"])}
    # without being asked for: what Trainer and tokenizers write, and no more
    assert {*names} - {*others} <= {*prepare(folder, REPO)}
    assert not {*others} & {*prepare(folder, REPO)}


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(PublishError) as error:
        prepare(folder, REPO, **options)
    return str(error.value)


def test_what_no_run_writes_is_left_out_and_named(
    folder: Path,
    loopback_hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clean = prepare(folder, REPO)
    for path in ("step_2/optimizer.bin", "checkpoint-4/x", "wandb/run-1/log.txt", "diary.txt"):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"dear diary")
    (folder / "README.md").write_text("mine")
    (folder / "model.partial.safetensors").touch()
    assert prepare(folder, REPO) == clean
    assert cli(monkeypatch, folder, "--repo_id", REPO, "--dry-run") == 0
    shown = capsys.readouterr().out.splitlines()
    assert "left out, a checkpoint: checkpoint-4, step_2" in shown
    assert "left out, made anew: README.md" in shown
    no_run = "left out, not what a run writes (--include NAME adds it): "
    assert f"{no_run}diary.txt, model.partial.safetensors, wandb/" in shown
    assert cli(monkeypatch, folder, "--repo_id", REPO, "--include=diary.txt", "--include=w*") == 0
    assert f"{no_run}model.partial.safetensors" in capsys.readouterr().out.splitlines()
    added = {"diary.txt", "wandb/run-1/log.txt"}
    assert loopback_hub.repos[REPO].files.keys() == clean.keys() | added


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("model.safetensors", b"\x80\x02}q\x00.", "no whole file of safetensors"),
        ("model-00001-of-00002.safetensors", None, "no whole file of safetensors"),  # torn
        ("tokenizer.json", b"TOKEN=1", "no JSON"),
        ("merges.txt", b"a\0b", "no text in UTF-8"),
        ("layer_learning_rates.png", b"GIF89a", "no png file"),
        ("training_args.bin", b"\x80\x02}q\x00.", "no zip file"),
        ("runs/events.out.tfevents.1.host", b"#!/bin/sh", "no log of TensorBoard"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says(
    folder: Path, name: str, content: bytes | None, why: str
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / name).write_bytes(whole[:-1] if content is None else content)
    assert f"  {name}: {why}" in refusal(folder)


def test_what_a_run_writes_is_no_link(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert "  config.json: a link" in refusal(folder)


def base64_of(text: str, before: int) -> bytes:
    return base64.b64encode(b"user:"[:before] + text.encode() + b"!")


WRITINGS: dict[str, Callable[[str], bytes]] = {
    "UTF-16 LE": lambda text: text.encode("utf-16-le"),
    "UTF-16 BE": lambda text: text.encode("utf-16-be"),
    **{f"base64 {n}": lambda text, n=n: base64_of(text, n) for n in range(3)},  # type: ignore[misc]
    "base64 of URLs, in lines": lambda text: b"\n".join(
        [(found := base64.urlsafe_b64encode(b"ab" + text.encode()))[:9], found[9:]]
    ),
    "%": lambda text: "".join(f"%{ord(c):02X}" for c in text).encode(),
    "% of some": lambda text: text.replace("o", "%6f").encode(),
    "JSON": lambda text: "".join(f"\\u{ord(c):04X}" for c in text).encode(),
    "JSON of some": lambda text: text.replace("h", "\\u0068").encode(),
    "HTML": lambda text: "".join(f"&#{ord(c)};" for c in text).encode(),
    "hex": lambda text: text.encode().hex().encode(),
}


@pytest.mark.parametrize("secret", [TOKEN, "pass>?phrase/with+signs"])
@pytest.mark.parametrize("writing", WRITINGS)
def test_the_token_in_use_is_found_however_it_is_written(
    folder: Path, writing: str, secret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file that was asked for, and in the name of one."""
    variable = "HF_TOKEN" if secret == TOKEN else "MY_PASSWORD"
    monkeypatch.setenv(variable, secret)
    written = WRITINGS[writing](secret)
    (folder / "notes.txt").write_bytes(b"x=" + written + b";")
    message = refusal(folder, include=["notes.txt"])
    assert f"  notes.txt: contains the value of ${variable}\n" in message
    (folder / "notes.txt").write_bytes(b"x=" + written[: len(written) // 2])
    assert "notes.txt" in prepare(folder, REPO, include=["notes.txt"])


def test_secrets_in_names(
    folder: Path,
    loopback_hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = folder / TOKEN / "events.out.tfevents.1.host"
    log.parent.mkdir()
    log.write_bytes(b"brain.Event:2")
    (folder / f"{TOKEN}.txt").touch()
    assert cli(monkeypatch, folder, "--repo_id", REPO) == 1
    assert "  ***/events.out.tfevents.1.host: its name contains a Hu" in (
        said := capsys.readouterr().err
    )
    log.unlink()
    assert cli(monkeypatch, folder, "--repo_id", REPO, "--dry-run") == 0
    assert "***.txt" in (shown := capsys.readouterr().out)
    assert cli(monkeypatch, folder, "--repo_id", f"me/{TOKEN}") == 1
    assert "repo_id contains a Hugging Face token" in (refused := capsys.readouterr().err)
    assert TOKEN not in said + shown + refused
    assert loopback_hub.requests == []


@pytest.mark.parametrize("escaped", [False, True])
def test_secrets_in_the_metadata_of_safetensors(folder: Path, escaped: bool) -> None:
    """A GitHub token: of those that are not in use only the form is known."""
    token = "ghp_" + "a1B2" * 9
    save_file({"x": tensor([1.0])}, folder / "model.safetensors", {"by": token})
    if escaped:
        data = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = data[8 : 8 + length].replace(b"ghp_", b"g\\u0068p_")
        (folder / "model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + data[8 + length :]
        )
    assert "  model.safetensors: contains a GitHub token" in refusal(folder)


@pytest.mark.parametrize("made", ["README.md", "train.py", WHEEL])
def test_secrets_in_what_is_made_anew(
    folder: Path, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if made == WHEEL:
        monkeypatch.setenv("MY_SECRET", "lipschitz_scale")  # somewhere in the package
    elif made == "README.md":
        change(folder, dataset_name="o" * 6, device="per" + "o" * 9)
        monkeypatch.setenv("MY_SECRET", "| device | perooo")  # as the card has it, and nothing else
    else:  # as it is pinned, and nothing else
        monkeypatch.setenv("MY_SECRET", f"{WHEEL}#sha256=")
    message = refusal(folder)
    assert message.startswith("nothing was uploaded, because of what would be made of it: ")
    assert f"{made}: contains the value of $MY_SECRET" in message


@pytest.mark.parametrize("who", [f"me:{TOKEN}@", f"{TOKEN}@", "?token=hunter2"])
def test_an_address_of_the_hub_with_a_secret_in_it(
    folder: Path,
    loopback_hub: LoopbackHub,
    who: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    host = loopback_hub.url.removeprefix("http://")
    url = f"http://{who}{host}" if who.endswith("@") else f"http://{host}/{who}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    for dry in ([], ["--dry-run"]):
        assert cli(monkeypatch, folder, "--repo_id", REPO, *dry) == 1
        said = "".join(capsys.readouterr())
        assert "HF_ENDPOINT has a user, a password or an option in it" in said
        assert who.strip("@?") not in said
    assert loopback_hub.requests == []


def test_a_connection_that_breaks(
    run: Path, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)  # between huggingface_hub's retries
    loopback_hub.accept = 1
    with pytest.raises(PublishError, match=r"broke off .*; the same command sends the rest"):
        publish(run, REPO)
    assert (len(loopback_hub.puts), loopback_hub.repos[REPO].files) == (1, {})
    loopback_hub.accept = None
    publish(run, REPO)
    assert loopback_hub.repos[REPO].commits == 1
    assert sorted(loopback_hub.puts) == large(
        loopback_hub
    )  # each once: what was there was not sent


@pytest.mark.slow
def test_killed_in_the_middle_of_the_upload(run: Path, loopback_hub: LoopbackHub) -> None:
    loopback_hub.accept, loopback_hub.stall = 1, True
    command = [*PUBLISH, str(run), "--repo_id", REPO]
    process = subprocess.Popen(command, env=os.environ | ENV, stderr=subprocess.DEVNULL)
    assert loopback_hub.stalled.wait(300)
    deadline = time.monotonic() + 20
    while not loopback_hub.puts and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (len(loopback_hub.puts), loopback_hub.repos[REPO].files) == (1, {})
    loopback_hub.accept = None
    publish(run, REPO)
    assert len(loopback_hub.puts) == 3
    assert sorted(loopback_hub.puts) == large(loopback_hub)


def test_publishing_again(folder: Path, loopback_hub: LoopbackHub) -> None:
    publish(folder, REPO)
    publish(folder, REPO)
    assert loopback_hub.repos[REPO].commits == 1  # nothing has changed
    save_file({"weight": tensor([2.0])}, folder / "model.safetensors")
    publish(folder, REPO)
    assert (loopback_hub.repos[REPO].commits, len(loopback_hub.puts)) == (2, 4)


def test_the_token_is_written_nowhere(
    folder: Path, loopback_hub: LoopbackHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    publish(folder, REPO)
    for data in loopback_hub.repos[REPO].files.values():
        assert TOKEN.encode() not in data
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes()
    assert TOKEN not in "".join(capfd.readouterr())


def test_tokens(
    run: Path, loopback_hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    stored = tmp_path / "token"
    stored.write_text(TOKEN)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(stored))
    with pytest.raises(PublishError, match="HF_TOKEN"):
        publish(run, REPO)
    assert loopback_hub.requests == []
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(PublishError, match=r"the Hub refused: .*401"):
        publish(run, REPO)
    assert loopback_hub.repos == {}


def test_private(run: Path, loopback_hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli(monkeypatch, run, "--repo_id", REPO, "--private") == 0
    assert loopback_hub.repos[REPO].private
    publish(run, REPO)  # stays so
    HfApi(token=TOKEN).create_repo("me/public")
    with pytest.raises(PublishError, match="me/public is there already, and public"):
        publish(run, "me/public", private=True)
    assert loopback_hub.repos["me/public"].files == {}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "has no model: no *.safetensors"),
        (lambda f: (f / "all_results.json").unlink(), "has no all_results.json"),
        (lambda f: (f / "all_results.json").write_text("{"), "is missing or cannot be read"),
        (lambda f: change(f, seed=..., versions=...), "does not say seed, versions"),
        (lambda f: change(f, finished=False), "is not finished"),
        (lambda f: change(f, task=...), "does not say its task"),
        (lambda f: change(f, command="x.py --config=a.yaml"), "reads options from a file"),
        (lambda f: change(f, optimizer="adalap"), "adalap"),
        (lambda f: change(f, learning_rate="high"), "all_results.json cannot be published"),
        (lambda f: change(f, versions={"hf_adalip": "0"}), "the run had hf_adalip 0, but"),
        (lambda f: (f / "train.py").unlink(), "train.py is missing: copy the script"),
        (lambda f: (f / "train.py").write_text("pass\n"), "it has no inline script metadata"),
    ],
)
def test_what_is_missing_is_said(folder: Path, spoil: Any, message: str) -> None:
    spoil(folder)
    with pytest.raises(PublishError) as error:
        prepare(folder, REPO)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "me/x"), "there is no folder nowhere"),
        ((None, "x"), "repo_id must be USER/NAME, got 'x'"),
        ((None, "me/a b"), "repo_id: "),
        ((None, "me/x", ["*.pt"]), "--exclude *.pt: .* has no such path"),
        ((None, "me/x", [], ["*.pt"]), "--include *.pt: .* has no such path"),
    ],
)
def test_bad_arguments(run: Path, arguments: Any, message: str) -> None:
    where, *others = arguments
    with pytest.raises(PublishError, match=message.replace("*.pt", r"\*\.pt")):
        prepare(Path(where) if where else run, *others)


def test_a_run_of_trainer_on_data_of_the_hub(folder: Path) -> None:
    """What Trainer saves; the card's metadata and `.eval_results` name dataset, base and score."""
    change(
        folder,
        task=...,
        dataset_name="nyu-mll/glue",
        dataset_config_name="mrpc",
        model_name_or_path="google/bert",
        on_hub=["nyu-mll/glue", "google/bert"],
        max_train_samples=None,
        eval_f1=0.5,
        eval_runtime=1.5,
        eval_samples_per_second=3.0,
        eval_loss=None,  # it was not finite
        eval_accuracy=0.75,
    )
    config = {"architectures": ["BertForSequenceClassification"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(config))
    files = prepare(folder, REPO)
    (entry,) = parse_eval_result_entries(yaml.safe_load(files[".eval_results/nyu-mll--glue.yaml"]))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("nyu-mll/glue", "mrpc", 0.75)
    assert str(entry.notes).startswith("accuracy of adamlip, lr 0.001, seed 3")
    text = files["README.md"]
    assert isinstance(text, bytes)
    data = ModelCard(text.decode()).data
    assert (data.datasets, data.base_model) == (["nyu-mll/glue"], "google/bert")
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-classification")
    assert {x.metric_type: x.metric_value for x in data.eval_results} == {
        "accuracy": 0.75,
        "f1": 0.5,
    }


def card_of(folder: Path) -> ModelCard:
    text = prepare(folder, REPO)["README.md"]
    assert isinstance(text, bytes)
    return ModelCard(text.decode())


@pytest.mark.parametrize(
    ("config", "library"),
    [
        ({}, "hf_adalip"),
        ({"architecture": "resnet18", "pretrained_cfg": {}}, "timm"),
        ({"architectures": ["BertForSequenceClassification"]}, "transformers"),
    ],
)
def test_the_library_that_loads_the_model(folder: Path, config: Any, library: str) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    assert card_of(folder).data.library_name == library


def test_a_part_of_a_dataset_is_not_taken_for_all_of_it(folder: Path) -> None:
    change(folder, dataset_name="uoft-cs/cifar10", on_hub=["uoft-cs/cifar10"], max_eval_samples=9)
    assert not any(path.startswith(".eval_results") for path in prepare(folder, REPO))
    card = card_of(folder)
    assert card.data.eval_results is None
    assert card.data.datasets == ["uoft-cs/cifar10"]
    assert "On a part of the data: --max_train_samples 300, --max_eval_samples 9." in card.text
    assert "| images or texts to train on, to evaluate on | 300, 360 |" in card.text


def test_what_was_a_folder_when_it_was_trained_on_is_not_the_hubs(folder: Path) -> None:
    assert (results(folder)["on_hub"], results(folder)["eval_split"]) == ([], "test")
    change(folder, dataset_name="data/pets")  # wherever that is now
    card = card_of(folder)
    assert card.data.datasets is None
    assert {x.dataset_type for x in card.data.eval_results} == {"pets"}
    assert "Not on the Hub: `data/pets`." in card.text


def test_the_way_to_repeat_a_run_has_its_processes_and_precision(folder: Path) -> None:
    command = f"train.py {' '.join(OPTIONS)}"
    change(folder, command=command, mixed_precision="bf16", num_processes=1)
    assert "ACCELERATE_MIXED_PRECISION=bf16 uv run http" in card_of(folder).text
    for own in ("--bf16", "--mixed_precision=bf16", "--mixed_precision bf16"):
        change(folder, command=f"{command} {own}")
        assert "ACCELERATE_MIXED_PRECISION" not in card_of(folder).text
    change(folder, command=command, num_processes=4)
    text = card_of(folder).text
    assert "uv run http" not in text
    assert (
        'ACCELERATE_MIXED_PRECISION=bf16 "$(uv python find --script train.py)" -m '
        f"torch.distributed.run --nproc-per-node 4 {command} --output_dir digits-adamlip\n" in text
    )
    assert "It ran in 4 processes with" in text
    change(folder, engine="FSDP2")
    assert "It ran in 4 processes under FSDP2, which needs its conf" in card_of(folder).text


def test_pins() -> None:
    source = (
        "#!/usr/bin/env python\n# /// script\n# requires-python = '>=3.10'\n"
        "# dependencies = ['Hf_AdaLip[trainer,recipes]>=0.1', 'timm>=1 ; python_version > \"3\"']\n"
        "#\n# [tool.uv.sources]\n# hf-adalip = { path = '..' }\n"
        "# [tool.hf-jobs]\n# flavor = 'a10g-small'  # a GPU\n# ///\nprint('# /// script')\n"
    )
    run = {"python": "3.11.7", "torch": "2.15.0+cu132", "timm": "1.0.31", "hf_adalip": "0.1.0"}
    run |= {"deepspeed": "0.19.8", "accelerate": "1.15.0"}  # of an extra that is not asked for
    pinned = script.pin(source, run, None)
    assert pinned.splitlines()[-1] == "print('# /// script')"
    body = pinned[pinned.index("# dependencies = [") + len("# dependencies = ") :]
    found = ast.literal_eval(body[: body.index("\n# ]") + 4].replace("\n# ", "\n"))
    assert found == [
        "hf-adalip[recipes,trainer]==0.1.0",
        "accelerate==1.15.0",
        'timm==1.0.31 ; python_version > "3"',
        "torch==2.15.0",
    ]
    assert "# flavor = 'a10g-small'  # a GPU\n" in pinned
    assert "sources" not in pinned
    assert script.pin(pinned, run, None) == pinned
    by_url = script.pin(source, run, "https://h/x.whl#sha256=0")
    assert '"hf-adalip[recipes,trainer] @ https://h/x.whl#sha256=0"' in by_url


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("dependencies = [", "cannot be read"),
        ("dependencies = ['a b c']", "cannot be read"),
        ("dependencies = ['torch']", "do not depend on hf-adalip"),
        ("dependencies = ['hf-adalip', 'peft']", "needs peft, whose version the run has not"),
        (
            "dependencies = ['hf-adalip']\n# tool.uv.sources.torch = {path = 'x'}",
            "has a path on this machine for torch",
        ),
    ],
)
def test_headers_that_cannot_be_pinned(toml: str, message: str) -> None:
    with pytest.raises(script.ScriptError, match=message):
        script.pin(f"# /// script\n# {toml}\n# ///\n", {"torch": "2", "hf_adalip": "1"}, None)


def test_the_wheel_is_of_the_files_that_are_imported(tmp_path: Path) -> None:
    name, data = script.build_wheel()
    assert (name, data) == (WHEEL, script.build_wheel()[1])
    (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / name) as wheel:
        assert wheel.testzip() is None
        wheel.extractall(tmp_path / "installed")
    package = Path(hf_adalip.__file__).parent
    for path in package.rglob("*.py"):
        copy = tmp_path / "installed" / package.name / path.relative_to(package)
        assert copy.read_bytes() == path.read_bytes()
    (found,) = metadata.distributions(path=[str(tmp_path / "installed")])
    assert (found.name, found.version) == ("hf-adalip", __version__)
    assert "recipes" in found.metadata.get_all("Provides-Extra")
    for file in found.files or []:
        if file.hash:
            digest = hashlib.sha256(file.read_binary()).digest()
            assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == file.hash.value


class Installed:
    """A distribution as an installer leaves it."""

    version = __version__

    def __init__(self, folder: Path, direct_url: str | None) -> None:
        self.folder, self.direct_url = folder, direct_url

    def locate_file(self, path: str) -> Path:
        return self.folder / path

    def read_text(self, name: str) -> str | None:
        assert name == "direct_url.json"
        return self.direct_url


@pytest.mark.parametrize(
    ("folder", "direct_url", "expected"),
    [
        (ROOT, None, True),
        (ROOT, '{"url": "file:///x.whl"}', False),
        (Path("/another/site-packages"), None, False),
    ],
)
def test_a_wheel_is_needed_unless_it_came_from_an_index(
    run: Path, folder: Path, direct_url: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = Installed(folder, direct_url)
    monkeypatch.setattr(script.metadata, "distribution", lambda _: installed)
    assert script.is_on_index() is expected


def test_what_is_on_the_index_is_pinned_without_a_wheel(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "is_on_index", lambda: True)
    files = prepare(run, REPO)
    assert WHEEL not in files
    assert f'"hf-adalip[recipes]=={__version__}"'.encode() in files["train.py"]


def test_the_command_that_repeats_a_run() -> None:
    command = (
        "recipes/x.py --output_dir '/tmp/a b' --lr 1e-3 --push_to_hub --hub_model_id=me/x --cpu "
        "--resume_from_checkpoint latest --overwrite_output_dir True --seed -1 --optim_args=a=1"
    )
    with pytest.raises(ValueError, match="options from a file"):
        repeat_arguments("recipes/x.py --config x.yaml")
    assert repeat_arguments(command) == [
        "--lr",
        "1e-3",
        "--cpu",
        "--seed",
        "-1",
        "--optim_args=a=1",
    ]


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.stem)
def test_recipes_are_taken_by_hf_jobs(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["jobs", "uv", "run", "--dry-run", "--namespace=me", str(recipe), "--seed=1"]
    hf(command, standalone_mode=False)
    assert "Job not submitted" in (shown := capsys.readouterr().out)
    assert recipe.name in shown


@pytest.fixture
def recipe() -> Iterator[Callable[..., int]]:
    with recipes() as found:
        yield found


def test_a_recipe_pushes_its_run(
    recipe: Callable[..., int],
    loopback_hub: LoopbackHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Without its checkpoints; and when that fails, the run is there and publish is told of."""
    out = f"--output_dir={tmp_path / 'out'}"
    push = ("--push_to_hub", "--hub_model_id", REPO, "--hub_private_repo")
    assert recipe(*OPTIONS, out, *push, "--checkpointing_steps=2") == 0
    assert f"published: {loopback_hub.url}/{REPO}/commit/" in capsys.readouterr().out
    assert loopback_hub.repos[REPO].private
    assert (
        loopback_hub.repos[REPO].files.keys() == prepare(tmp_path / "out", REPO, ["step_2"]).keys()
    )
    assert not any("step_2" in path for path in loopback_hub.repos[REPO].files)
    assert cli(monkeypatch, tmp_path / "out", "--repo_id", REPO) == 0
    assert "left out, a checkpoint: step_2\n" in capsys.readouterr().out
    assert b"--hub_model_id" not in loopback_hub.repos[REPO].files["README.md"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id USER/NAME"),
        (["--hub_model_id=me/x"], "need --push_to_hub"),
        (
            ["--push_to_hub", "--hub_model_id=x"],
            "--push_to_hub: repo_id must be USER/NAME, got 'x'",
        ),
        (["--push_to_hub", "--hub_model_id=me/x"], "the environment's HF_TOKEN"),
    ],
)
def test_what_would_be_wrong_at_the_end_is_said_at_the_beginning(
    recipe: Callable[..., int],
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert recipe(*OPTIONS, f"--output_dir={tmp_path / 'out'}", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
