"""What a run of Trainer leaves in its folder."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ...errors import UsageError
from ...files import MANIFEST, RESULTS
from ...monitor import RATES
from ...publish.script import SCRIPT

_OWN = re.compile(
    rf"{re.escape(RESULTS)}|{RATES}\.(json|png)|{re.escape(SCRIPT)}|checkpoint-[0-9]+"
    r"|config\.json|training_args\.bin|tokenizer(_config)?\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja|vocab\.(txt|json)|merges\.txt"
    r"|generation_config\.json|adapter_config\.json|adapter_model\.safetensors"
    r"|model(-[0-9]+-of-[0-9]+)?\.safetensors|model\.safetensors\.index\.json"
)


def own_files(folder: Path) -> list[Path]:
    """What a run leaves in its folder; what else is there is the user's."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if _OWN.fullmatch(path.name))


def check_rotation(folder: Path, limit: int) -> None:
    """Trainer takes all that begins as a checkpoint for one, and deletes those of the lowest
    numbers.

    Raises:
        UsageError: if it would count a folder that is not its own.
    """
    names = [path.name for path in folder.glob("checkpoint-*") if path.is_dir()]
    if others := sorted(name for name in names if re.match("checkpoint-[0-9]+[^0-9]", name)):
        raise UsageError(
            f"--save_total_limit {limit}: Trainer would count {others[0]} in {folder} among its "
            "checkpoints, and might delete it; move it, or choose another --output_dir"
        )


def clean(folder: Path, checkpoint: str | None, overwrite: bool) -> None:
    """Removes what --overwrite_output_dir replaces, or the checkpoints whose saving was cut off,
    which Trainer would count among those to keep."""
    # the script may be what is running; it is replaced at the end
    stale = [path for path in own_files(folder) if overwrite and path.name != SCRIPT]
    if checkpoint and Path(checkpoint).parent == folder:
        checkpoints = [path for path in own_files(folder) if path.name.startswith("checkpoint-")]
        stale = [path for path in checkpoints if not (path / MANIFEST).exists()]
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
