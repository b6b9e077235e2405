"""What a run of Trainer leaves in its folder."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import UsageError
from ...files import MANIFEST
from ..folder import OwnFiles

OWN_FILES = OwnFiles(
    files=r"config\.json|training_args\.bin|tokenizer(_config)?\.json|special_tokens_map\.json"
    r"|added_tokens\.json|chat_template\.jinja|vocab\.(txt|json)|merges\.txt"
    r"|generation_config\.json|adapter_config\.json|adapter_model\.safetensors"
    r"|model(-[0-9]+-of-[0-9]+)?\.safetensors|model\.safetensors\.index\.json",
    checkpoints="checkpoint-[0-9]+",
)


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


def clear(folder: Path, checkpoint: str | None, overwrite: bool) -> None:
    """Removes what --overwrite_output_dir replaces, or, from the folder of the run that is resumed,
    the checkpoints whose saving was cut off, which Trainer would count among those to keep."""
    here = checkpoint is not None and Path(checkpoint).parent == folder
    OWN_FILES.clear(
        folder,
        overwrite,
        unfinished=lambda path: here and path.is_dir() and not (path / MANIFEST).exists(),
    )
