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
- `layer_learning_rates.png`: if the optimizer has an S per layer; `secant.png`, of `Secant`.

Of OUTPUT_DIR, what `WRITTEN` lists is uploaded: the files that a recipe, Trainer or timm writes of
a finished run. With it come, made anew, `train.py` with its dependencies pinned, the wheel of
hf_adalip unless it came from a package index, `.eval_results/` if all of a dataset of the Hub was
used, and the card, `README.md`. Everything else is left out, and named: checkpoints, and what is
the user's. `--include` asks for more of it, but for no optimizer states, checkpoints, archives or
what looks like a secret. Nothing is uploaded as long as there is a secret in a file or its name.

Everything goes in one commit, at the end: large files before, each under its hash, so that a
repeated upload sends only what the Hub has not got yet.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import mmap
import os
import re
import shlex
import zipfile
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ..errors import PublishError as PublishError
from ..errors import ScriptError
from ..files import MANIFEST, RESULTS
from ..version import __version__
from .script import SCRIPT, build_wheel, is_on_index, pin, running_script

CARD = "README.md"

PICTURES = {
    "layer_learning_rates.png": ("Learning rates of the layers", "A = lr × S of each layer"),
    "secant.png": ("Learning rate", "the rate that was found, and r of each measurement"),
}
"""What the card shows of a run that has them: the heading and the picture in words."""

Files: TypeAlias = dict[str, "bytes | Path"]
"""What is in a repository: content by path."""

WRITTEN = {
    r"model(-\d+-of-\d+)?\.safetensors|adapter_model\.safetensors": "safetensors",
    r"model\.safetensors\.index\.json|(generation_|adapter_)?config\.json": "json",
    r"tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json|vocab\.json": "json",
    r"(pre|video_pre)?processor_config\.json|chat_template\.json": "json",
    r"vocab\.txt|merges\.txt|(additional_chat_templates/)?[\w-]+\.jinja": "text",
    r"tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model": "any",
    rf"{re.escape(RESULTS)}": "any",  # what is wrong with it is said when it is read
    r"(train|eval|predict|test)_results\.json|trainer_state\.json": "json",
    r"(layer_learning_rates|secant)\.json": "json",
    r"(layer_learning_rates|secant)\.png": "png",
    r"training_args\.bin": "zip",  # a pickle, but Trainer's, and without a state
    rf"{re.escape(SCRIPT)}": "text",
    r"([^/]+/){0,3}events\.out\.tfevents\.[^/]+": "events",  # of TensorBoard
    r"([^/]+/){1,3}hparams\.yml": "text",  # beside those, by accelerate
}
"""What a run writes into its folder, by the pattern of a path, and the kind of file it must be."""

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
_BEGINS = {"png": b"\x89PNG\r\n\x1a\n", "zip": b"PK\x03\x04"}
_SECRET_VARIABLE = re.compile(r".*(TOKEN|API_KEY|ACCESS_KEY|SECRET|PASSWORD)")


class Left(NamedTuple):
    """Something in a run's folder that is not uploaded."""

    path: str
    why: str


def prepare(  # noqa: C901 - one check after the other
    folder: Path, repo_id: str, exclude: Sequence[str] = (), include: Sequence[str] = ()
) -> Files:
    """Everything that `publish` would upload; touches no network and writes nothing.

    Args:
        folder: a run's OUTPUT_DIR.
        repo_id: USER/NAME.
        exclude: patterns of paths in the folder that are left out, such as "training_args.bin".
        include: patterns of paths that are not in `WRITTEN`, but not left out.

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
    files, _, problems = _collect(folder, exclude, include)
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
    pictures = {name: words for name, words in PICTURES.items() if name in files}
    try:
        if scores := card.eval_results(results, url(SCRIPT)):
            made[f".eval_results/{results['dataset_name'].replace('/', '--')}.yaml"] = (
                scores.encode()
            )
        text = card.model_card(repo_id, results, task, library, pictures, url(SCRIPT))
    except (TypeError, ValueError, AttributeError) as error:  # a value of another type or name
        raise PublishError(f"{folder / RESULTS} cannot be published: {error}") from error
    made[CARD] = text.encode()
    if problems := _secrets(made):
        lines = "; ".join(f"{path}: {why}" for path, why in problems)
        raise PublishError(f"nothing was uploaded, because of what would be made of it: {lines}")
    return {path: (files | made)[path] for path in sorted(files | made)}


def left_out(folder: Path, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> list[str]:
    """Lines that name what of the folder `publish` leaves out, and why; secrets are not shown."""
    by_reason: dict[str, list[str]] = {}
    for path, why in _collect(folder, exclude, include)[1]:
        by_reason.setdefault(why, []).append(_masked(path))
    return [f"left out, {why}: {', '.join(paths)}" for why, paths in by_reason.items()]


def publish(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
) -> str:
    """Uploads a run, with the token in the environment variable HF_TOKEN; returns the commit's URL.

    May be called again after an interruption, or to replace what was published before.

    Args:
        folder: a run's OUTPUT_DIR.
        repo_id: USER/NAME; made if it is not there.
        private: for those with access only.
        exclude: as in `prepare`.
        include: as in `prepare`.

    Raises:
        PublishError: as `prepare`; if there is no token; or if the Hub refuses or is not reached.
    """
    files = prepare(folder, repo_id, exclude, include)
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
    """Publishes a recipe's finished run, and prints what is left out and where it is.

    Raises:
        PublishError: as `publish`, and with the command to try again with.
    """
    try:
        url = publish(folder, repo_id, private=private)
    except PublishError as error:
        raise PublishError(f"{error}\nTo try again: hf-adalip publish {folder} ...") from error
    print("\n".join([*left_out(folder), f"published: {url}"]))


def check_repo_id(repo_id: str) -> None:
    """Raises PublishError unless it is USER/NAME, as the Hub takes it, and may be public; and if
    the address of the Hub, which README.md and train.py have, may not."""
    from huggingface_hub import constants, hf_hub_url

    if any(sign in constants.ENDPOINT for sign in "@?#"):
        raise PublishError(
            "the address in the environment's HF_ENDPOINT has a user, a password or an option in "
            "it, which would be published: give https://HOST alone, and the token as HF_TOKEN"
        )
    try:
        hf_hub_url(repo_id, CARD)
    except ValueError as error:
        raise PublishError(f"repo_id: {_masked(str(error))}") from error
    if "/" not in repo_id:
        raise PublishError(f"repo_id must be USER/NAME, got {_masked(repo_id)!r}")
    if found := _found_in([repo_id.encode()]):
        raise PublishError(f"repo_id {found}; choose another")


def token() -> str:
    """The token in the environment; raises PublishError if there is none."""
    if found := os.environ.get("HF_TOKEN"):
        return found
    raise PublishError("publishing needs a token that may write, in the environment's HF_TOKEN")


def _collect(  # noqa: C901 - one rule after the other
    folder: Path, exclude: Sequence[str], include: Sequence[str]
) -> tuple[Files, list[Left], list[Left]]:
    """The files of a folder that are uploaded, what is left out, and what must not be uploaded
    although it was asked for or is what a run writes."""
    if not folder.is_dir():
        raise PublishError(f"there is no folder {folder}")
    files: Files = {}
    left: list[Left] = []
    problems: list[Left] = []
    unused = {"--exclude": set(exclude), "--include": set(include)}

    def matches(name: str, option: str, patterns: Sequence[str]) -> bool:
        found = {pattern for pattern in patterns if fnmatchcase(name, pattern.rstrip("/"))}
        unused[option] -= found
        return bool(found)

    def look(path: Path, asked: bool) -> None:
        name = path.relative_to(folder).as_posix()
        if matches(name, "--exclude", exclude):
            left.append(Left(name, "as --exclude asks"))
            return
        asked = matches(name, "--include", include) or asked
        kind = next((WRITTEN[x] for x in WRITTEN if re.fullmatch(x, name)), None)
        if path.is_dir() and not path.is_symlink():
            within = {pattern for pattern in include if pattern.startswith(f"{name}/")}
            if (why := _unfit(path)) and (asked or within):
                unused["--include"] -= within
                problems.append(Left(name, why))
            elif why:
                left.append(Left(name, why))
            else:
                before = len(files), len(problems), len(left)
                for child in sorted(path.iterdir()):
                    look(child, asked)
                if before[:2] == (len(files), len(problems)):  # nothing of it: one line says so
                    del left[before[2] :]
                    left.append(Left(f"{name}/", _NOT_WRITTEN))
        elif kind and (why := _not_plain(path)):
            problems.append(Left(name, why))
        elif not kind and (why := _unfit(path)):
            (problems if asked else left).append(Left(name, why))
        elif kind or asked:
            files[name] = path
            if kind and (why := _not_of_kind(path, kind)):
                problems.append(Left(name, why))
        else:
            left.append(Left(name, "made anew" if name == CARD else _NOT_WRITTEN))

    for child in sorted(folder.iterdir()):
        look(child, False)
    for option, patterns in unused.items():
        if patterns:
            names = _masked(" ".join(sorted(patterns)))
            raise PublishError(f"{option} {names}: {folder} has no such path")
    return files, left, problems


_NOT_WRITTEN = "not what a run writes (--include NAME adds it)"


def _not_plain(path: Path) -> str | None:
    if path.is_symlink() or not (path.is_dir() or path.is_file()):
        return "a link or no plain file"
    return None


def _not_of_kind(path: Path, kind: str) -> str | None:
    """Why a file is not what its name says; one that is torn is not."""
    with path.open("rb") as file:
        if kind == "safetensors":
            header = _header(file.read(8), file)
            ends = [
                entry["data_offsets"][1]
                for name, entry in (header or {}).items()
                if name != "__metadata__"
            ]
            fits = ends and file.tell() + max(ends) == path.stat().st_size
            return None if fits else "no whole file of safetensors"
        if kind == "events":
            return None if b"brain.Event:" in file.read(64) else "no log of TensorBoard"
        if kind in _BEGINS:
            fits = file.read(8).startswith(_BEGINS[kind])
            return None if fits else f"no {kind} file, which its name is of"
        if kind in ("json", "text"):
            data = file.read()
            try:
                json.loads(data) if kind == "json" else data.decode()
            except ValueError:
                return "no JSON" if kind == "json" else "no text in UTF-8"
            return "no text in UTF-8" if b"\0" in data else None
    return None


def _header(length: bytes, file: Any) -> dict[str, Any] | None:
    """The header of a file of safetensors: metadata, and the place of each tensor."""
    try:
        found = json.loads(file.read(min(int.from_bytes(length, "little"), _LONGEST_HEADER)))
        for name, entry in found.items():
            if name != "__metadata__":
                int(entry["data_offsets"][1])
    except (ValueError, TypeError, LookupError, AttributeError):
        return None
    return dict(found)


_LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it


def _unfit(path: Path) -> str | None:
    """Why a file or folder must not be published by its name or kind."""
    name = path.name
    if why := _not_plain(path):
        return why
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
    if path.is_file() and _PICKLE.fullmatch(name):
        return "a pickle, which may be an optimizer's state, and runs code when it is loaded"
    return None


def _secrets(files: Files) -> list[Left]:
    """The files with a token or key in them or in their names."""
    problems = []
    for path, content in files.items():
        if found := _found_in([path.encode(errors="surrogateescape")]):
            problems.append(Left(path, f"its name {found}"))
        if found := _found_in(_readable(path, content)):
            problems.append(Left(path, found))
        if _is_key(content):
            problems.append(Left(path, "has nothing but what may be a key"))
    return problems


def _patterns() -> dict[str, re.Pattern[bytes]]:
    """What a secret looks like: tokens by their form, those of this environment in any writing."""
    found = {what: re.compile(pattern) for what, pattern in _TOKENS.items()}
    for variable, value in os.environ.items():
        if _SECRET_VARIABLE.fullmatch(variable) and len(value) >= 12:
            found[f"the value of ${variable}"] = re.compile(b"|".join(_writings(value)))
    return found


def _writings(secret: str) -> Iterator[bytes]:
    """Patterns of the ways in which a secret is written: as it is or with escapes of URLs, JSON,
    Python and HTML for any of its letters, in UTF-16, in base64 wherever it begins, in hex."""
    letters = []
    for letter in secret:
        raw, code = letter.encode(errors="surrogateescape"), ord(letter)
        forms = [re.escape(raw), b"(?i:%s)" % b"".join(b"%%%02x" % byte for byte in raw)]
        forms += [rb"(?i:\\+u%04x)" % code, rb"(?i:\\+x%02x)" % code]
        forms += [b"&#0*%d;" % code, b"(?i:&#x0*%x;)" % code]
        letters.append(b"(?:%s)" % b"|".join(forms))
    yield b"".join(letters)
    data = secret.encode(errors="surrogateescape")
    for order in ("utf-16-le", "utf-16-be"):
        yield re.escape(secret.encode(order, errors="surrogatepass"))
    for before in range(3):
        first, last = -(-8 * before // 6), 8 * (before + len(data)) // 6
        text = base64.b64encode(bytes(before) + data)[first:last]
        # lines are broken, and two alphabets are in use
        each = (re.escape(bytes([c])) for c in text)
        yield rb"(?:[\r\n]|\\n)*".join({b"\\+": b"[+-]", b"/": b"[/_]"}.get(c, c) for c in each)
    yield b"(?i:%s)" % data.hex().encode()


def _found_in(texts: Sequence[Any]) -> str | None:
    """What secret there is in bytes, in words."""
    for what, pattern in _patterns().items():
        if any(pattern.search(text) for text in texts):
            return f"contains {what}"
    return None


def _masked(text: str) -> str:
    """The text, with *** for what may be a secret: it is going to be shown."""
    data = text.encode(errors="surrogateescape")
    for pattern in _patterns().values():
        data = pattern.sub(b"***", data)
    return data.decode(errors="replace")


def _readable(path: str, content: bytes | Path) -> list[Any]:
    """What is to be read in a file, as bytes, without the numbers of tensors; of JSON also without
    its escapes, of a wheel without its compression."""
    if isinstance(content, Path) and path.endswith(".safetensors"):
        with content.open("rb") as file:  # from its header on there are only numbers
            header = file.read(8)
            header = file.read(min(int.from_bytes(header, "little"), _LONGEST_HEADER))
        return [header, *_unescaped(header)]
    if isinstance(content, bytes) and path.endswith(".whl"):
        with zipfile.ZipFile(io.BytesIO(content)) as wheel:
            return [wheel.read(name) for name in wheel.namelist()]
    if isinstance(content, bytes):
        return [content]
    if not content.stat().st_size:  # which mmap does not take
        return []
    with content.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return [data, *(_unescaped(data[:]) if path.endswith(".json") else ())]


def _unescaped(data: bytes) -> list[bytes]:
    try:
        text = json.dumps(json.loads(data), ensure_ascii=False)
    except ValueError:
        return []
    return [text.encode(errors="surrogatepass")]


def _is_key(content: bytes | Path) -> bool:
    if isinstance(content, bytes) or not _MAY_BE_A_KEY.fullmatch(content.name):
        return False
    return content.stat().st_size < 300 and bool(_KEY_ALONE.fullmatch(content.read_bytes()))


def _refused(folder: Path, problems: Sequence[Left]) -> PublishError:
    lines = [f"  {_masked(path)}: {why}" for path, why in problems]
    options = shlex.join(
        x
        for path in dict.fromkeys(problem.path for problem in problems)
        for x in ("--exclude", _masked(path))
    )
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
