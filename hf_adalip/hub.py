"""Publishing a run on the Hub: `hf-adalip publish OUTPUT_DIR --repo_id USER/NAME`.

What has to be in OUTPUT_DIR, and what every recipe leaves there:

- `*.safetensors`: the model, with what loads it (`config.json`, a tokenizer, ...) beside it.
- `train.py`: the script that ran (`script.running_script`); its inline script metadata depend on
  hf-adalip.
- `all_results.json`, with these keys:

      optimizer, optimizer_arguments   a name of the registry, and all that it was called with
      learning_rate, seed, dataset_name
      versions                         of python and distributions (`script.versions`): the pins
      command                          the command line; what says where to write is left out
      eval_accuracy, eval_loss, ...    the results
      task                             such as image-classification; config.json may say it too

  and, for the card, what there is of dataset_config_name, dataset_fingerprint, train_samples,
  eval_samples, lr_scheduler_type, weight_decay, epoch, step, device, model_name_or_path,
  on_hub (which of dataset_name and model_name_or_path are the Hub's), num_processes, ...
  With `finished: false` the run is not published.
- `layer_learning_rates.png`: if the optimizer has an S per layer.

All of OUTPUT_DIR is uploaded, and with it, made anew, `train.py` with its dependencies pinned, the
wheel of hf_adalip unless it came from a package index, `.eval_results/` if all of a dataset of the
Hub was used, and the card, `README.md`. Optimizer states, checkpoints, archives and what looks like
a secret are refused: nothing is uploaded as long as there are any.

Everything goes in one commit, at the end: large files before, each under its hash, so that a
repeated upload sends only what the Hub has not got yet.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import shlex
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from .checkpoints import MANIFEST, RESULTS
from .script import SCRIPT, ScriptError, build_wheel, is_on_index, pin, running_script
from .version import __version__

CARD, PICTURE = "README.md", "layer_learning_rates.png"

Files: TypeAlias = dict[str, "bytes | Path"]
"""What is in a repository: content by path."""

_NEEDED = (
    *("optimizer", "optimizer_arguments", "learning_rate", "seed", "dataset_name"),
    *("versions", "command"),
)

_CHECKPOINT = re.compile(r"(step|epoch)_\d+(\..*)?|checkpoint-\d+|global_step\d+|.*\.partial")
_STATE = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|sampler).*\..*"
    r"|.*(exp_avg|momentum_buffer|optim(izer)?_states?).*"
)
_PICKLE = re.compile(r".*\.(pt|pth|bin|pkl|pickle|ckpt|distcp|npz|joblib)")
_ARCHIVE = re.compile(r".*\.(tar|tgz|tbz2?|txz|gz|bz2|xz|zst|zip|7z|rar)", re.IGNORECASE)
_SECRET = re.compile(
    r"env|.*\.env(\..*)?"
    r"|.*\.(pem|key|p12|pfx|jks|keystore|ppk|kdbx)|id_(rsa|dsa|ecdsa|ed25519)([._].*)?"
    r"|[._]?(netrc|pypirc|pgpass)|kaggle\.json|(.*[._-])?service[._-]?account.*\.json"
    r"|(.*[._-])?(credentials?|secrets?|passwords?|[hs]?passwd|passphrase)([._-].*)?"
    r"|(.*[._-])?(api|access|auth|private|ssh)[._-]?(keys?|tokens?)(\..*)?"
    # one of them; of several, as in keys.txt and added_tokens.json, a vocabulary may be made
    r"|(.*[._-])?(key|token)(\.(txt|json|ya?ml|toml|ini|cfg))?|tokens(\.txt)?",
    re.IGNORECASE,
)
_MAY_BE_A_KEY = re.compile(r".*(key|token|secret|auth|wandb).*", re.IGNORECASE)
_KEY_ALONE = re.compile(rb"\s*[0-9A-Za-z_./+=-]{20,200}\s*")
# each begins with fixed letters, which makes re many times faster
_TOKENS = {
    "a Hugging Face token": rb"hf_[A-Za-z0-9]{30,}",
    "a token of a Hugging Face organization": rb"api_org_[A-Za-z0-9]{30,}",
    "a GitHub token": rb"gh[pousr]_[A-Za-z0-9]{36}",
    "a fine-grained GitHub token": rb"github_pat_[A-Za-z0-9_]{40}",
    "an AWS key": rb"A(KI|SI)A[0-9A-Z]{16}",
    "a Google key": rb"AIza[0-9A-Za-z_-]{35}",
    "a Slack token": rb"xox[abeprs]-[0-9A-Za-z-]{20,}",
    "a GitLab token": rb"glpat-[0-9A-Za-z_-]{20}",
    "a PyPI token": rb"pypi-AgE[0-9A-Za-z_-]{50}",
    "an API key": rb"sk-([0-9A-Za-z]{32}|(proj|ant|svcacct|admin)-[0-9A-Za-z_-]{20,})",
    "a password in a URL": rb"://[\w.%+~-]{1,64}:[\w.%+~!$&*=-]{3,200}@[\w-]",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}
_SECRET_VARIABLE = re.compile(r".*(TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)")


class PublishError(ValueError):
    """Why nothing was published, for the user."""


def prepare(folder: Path, repo_id: str, exclude: Sequence[str] = ()) -> Files:
    """Everything that `publish` would upload; touches no network and writes nothing.

    Args:
        folder: a run's OUTPUT_DIR.
        repo_id: USER/NAME.
        exclude: patterns of paths in the folder that are left out, such as "checkpoint-*".

    Raises:
        PublishError: if something is missing, or there is something that must not be published.
    """
    try:
        from huggingface_hub import hf_hub_url

        from . import card
    except ImportError as error:
        raise ImportError(
            f"publishing needs more ({error}): pip install 'hf-adalip[recipes]'"
        ) from error

    def url(path: str) -> str:
        return hf_hub_url(repo_id, path, revision="main")

    check_repo_id(repo_id)
    files, problems = _collect(folder, exclude)
    problems += _secrets(files)
    if problems:
        raise _refused(folder, problems)

    if not any(path.endswith(".safetensors") and "/" not in path for path in files):
        raise PublishError(f"{folder} has no model: no *.safetensors")
    if RESULTS not in files:
        raise PublishError(f"{folder} has no {RESULTS}")
    results = _read_json(folder, RESULTS)
    if missing := [key for key in _NEEDED if key not in results]:
        raise PublishError(f"{folder / RESULTS} does not say {', '.join(missing)}")
    if results.get("finished") is False:
        raise PublishError(f"the run in {folder} is not finished: --resume_from_checkpoint latest")
    if SCRIPT not in files:
        raise PublishError(
            f"{folder / SCRIPT} is missing: copy the script that ran there (a recipe does, if it "
            "has inline script metadata)"
        )
    config = _read_json(folder, "config.json") if "config.json" in files else {}
    task = card.find_task(results, config)
    if task is None:
        raise PublishError(
            f'{folder / RESULTS} does not say its task, as in "image-classification"'
        )

    made: Files = {}
    try:
        own_url = None
        if not is_on_index():
            name, wheel = build_wheel()
            made[name], own_url = wheel, f"{url(name)}#sha256={hashlib.sha256(wheel).hexdigest()}"
        if (ran := results["versions"].get("hf_adalip")) != __version__:
            raise ScriptError(f"the run had hf_adalip {ran}, but {__version__} is installed here")
        source = (folder / SCRIPT).read_text()
        made[SCRIPT] = pin(source, results["versions"], own_url).encode()
    except ValueError as error:
        raise PublishError(f"{folder / SCRIPT} cannot be published: {error}") from error
    library = "peft" if "adapter_config.json" in files else "hf_adalip"
    library = "transformers" if config.get("architectures") and library != "peft" else library
    library = "timm" if "architecture" in config and "pretrained_cfg" in config else library
    picture = PICTURE if PICTURE in files else None
    try:
        if scores := card.eval_results(results, url(SCRIPT)):
            made[f".eval_results/{results['dataset_name'].replace('/', '--')}.yaml"] = (
                scores.encode()
            )
        text = card.model_card(repo_id, results, task, library, picture, url(SCRIPT))
    except (TypeError, ValueError, AttributeError) as error:  # a value of another type or name
        raise PublishError(f"{folder / RESULTS} cannot be published: {error}") from error
    made[CARD] = text.encode()
    return {path: (files | made)[path] for path in sorted(files | made)}


def publish(
    folder: Path, repo_id: str, *, private: bool = False, exclude: Sequence[str] = ()
) -> str:
    """Uploads a run, with the token in the environment variable HF_TOKEN; returns the commit's URL.

    May be called again after an interruption, or to replace what was published before.

    Args:
        folder: a run's OUTPUT_DIR.
        repo_id: USER/NAME; made if it is not there.
        private: for those with access only.
        exclude: as in `prepare`.

    Raises:
        PublishError: as `prepare`; if there is no token; or if the Hub refuses or is not reached.
    """
    files = prepare(folder, repo_id, exclude)
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(token=token())
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise PublishError(
                f"{repo_id} is there already, and public: --private needs a private repository or "
                "a new name"
            )
        operations = [CommitOperationAdd(path, content) for path, content in files.items()]
        commit = api.create_commit(
            repo_id, operations, commit_message="Publish a run with hf-adalip"
        )
    except PublishError:
        raise
    except (HfHubHTTPError, ValueError) as error:  # ValueError: it does not take the card
        raise PublishError(f"the Hub refused: {error}") from error
    except Exception as error:  # of httpx, of xet, or what huggingface_hub made of them
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise PublishError(
            f"the upload to {api.endpoint} broke off ({reason}); the same command sends the rest"
        ) from error
    return commit.commit_url


def check_run(repo_id: str) -> None:
    """Raises PublishError when a run starts for what would be wrong at its end."""
    check_repo_id(repo_id)
    token()
    if running_script() is None:
        raise PublishError("the recipe needs inline script metadata (# /// script)")


def publish_run(folder: Path, repo_id: str, private: bool) -> None:
    """Publishes a recipe's finished run without its checkpoints, and prints where it is.

    Raises:
        PublishError: as `publish`, and with the command to try again with.
    """
    folders = [path.name for path in folder.iterdir() if path.is_dir()]
    checkpoints = [name for name in folders if _CHECKPOINT.fullmatch(name)]
    try:
        url = publish(folder, repo_id, private=private, exclude=checkpoints)
    except PublishError as error:
        raise PublishError(f"{error}\nTo try again: hf-adalip publish {folder} ...") from error
    print(f"published: {url}")


def check_repo_id(repo_id: str) -> None:
    """Raises PublishError unless it is USER/NAME, as the Hub takes it."""
    from huggingface_hub import hf_hub_url

    try:
        hf_hub_url(repo_id, CARD)
    except ValueError as error:
        raise PublishError(f"repo_id: {error}") from error
    if "/" not in repo_id:
        raise PublishError(f"repo_id must be USER/NAME, got {repo_id!r}")


def token() -> str:
    """The token in the environment; raises PublishError if there is none."""
    if found := os.environ.get("HF_TOKEN"):
        return found
    raise PublishError("publishing needs a token that may write, in the environment's HF_TOKEN")


def _collect(folder: Path, exclude: Sequence[str]) -> tuple[Files, list[tuple[str, str]]]:
    """The files of a folder, and (path, why) of what must not be published."""
    if not folder.is_dir():
        raise PublishError(f"there is no folder {folder}")
    files: Files = {}
    problems: list[tuple[str, str]] = []
    unused = set(exclude)

    def look(path: Path) -> None:
        name = path.relative_to(folder).as_posix()
        if matching := {pattern for pattern in exclude if fnmatchcase(name, pattern.rstrip("/"))}:
            unused.difference_update(matching)
        elif why := _unfit(path):
            problems.append((name, why))
        elif path.is_dir():
            for child in sorted(path.iterdir()):
                look(child)
        else:
            files[name] = path

    for child in sorted(folder.iterdir()):
        look(child)
    if unused:
        raise PublishError(f"--exclude {' '.join(sorted(unused))}: {folder} has no such path")
    return files, problems


def _unfit(path: Path) -> str | None:
    """Why a file or folder must not be published by its name or kind."""
    name = path.name
    if path.is_symlink() or not (path.is_dir() or path.is_file()):
        return "a link or no plain file"
    if _SECRET.fullmatch(name):
        return "a secret, by its name"
    if name.startswith("."):
        return "hidden, as settings and credentials are"
    if _CHECKPOINT.fullmatch(name) or (path / MANIFEST).exists():
        return "a checkpoint"
    if path.is_file() and _ARCHIVE.fullmatch(name):
        return "an archive, in which there may be anything"
    if path.is_file() and _STATE.fullmatch(name):
        return "the state of an optimizer or of another part of the training"
    # Trainer's training_args.bin is a pickle too, but without a state; its content is looked at
    if path.is_file() and _PICKLE.fullmatch(name) and name != "training_args.bin":
        return "a pickle, which may be an optimizer's state, and runs code when it is loaded"
    return None


def _secrets(files: Files) -> list[tuple[str, str]]:
    """(path, why) of the files with a token or key in them."""
    patterns = {what: re.compile(pattern) for what, pattern in _TOKENS.items()}
    for variable, value in os.environ.items():
        if _SECRET_VARIABLE.fullmatch(variable) and len(value) >= 12:
            patterns[f"the value of ${variable}"] = re.compile(re.escape(value.encode()))
    found = [
        (path, f"contains {what}")
        for path, content in files.items()
        for what, pattern in patterns.items()
        if _contains(content, pattern)
    ]
    alone = "has nothing but what may be a key"
    return found + [(path, alone) for path, content in files.items() if _is_key(content)]


def _is_key(content: bytes | Path) -> bool:
    if isinstance(content, bytes) or not _MAY_BE_A_KEY.fullmatch(content.name):
        return False
    return content.stat().st_size < 300 and bool(_KEY_ALONE.fullmatch(content.read_bytes()))


def _contains(content: bytes | Path, pattern: re.Pattern[bytes]) -> bool:
    if isinstance(content, bytes):
        return bool(pattern.search(content))
    size = content.stat().st_size
    if not size:  # which mmap does not take
        return False
    with content.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if content.suffix == ".safetensors":  # from its header on there are only numbers
            size = 8 + int.from_bytes(data[:8], "little")
        return bool(pattern.search(data, 0, min(size, len(data))))


def _refused(folder: Path, problems: list[tuple[str, str]]) -> PublishError:
    lines = [f"  {path}: {why}" for path, why in problems]
    options = shlex.join(x for path in dict(problems) for x in ("--exclude", path))
    return PublishError(
        "\n".join([f"nothing was uploaded, because {folder} has what must not be:", *lines])
        + f"\nremove them, or leave them out: {options}"
    )


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        found = json.loads((folder / name).read_text())
    except (OSError, ValueError) as error:
        raise PublishError(f"{folder / name} is missing or cannot be read") from error
    if not isinstance(found, dict):
        raise PublishError(f"{folder / name} must be an object of JSON")
    return found
