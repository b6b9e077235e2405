"""Datasets of the Hub or of a folder, and what an id on the Hub looks like."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from ..errors import DataError

try:
    import datasets
    import huggingface_hub.constants
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
except ImportError as error:
    raise ImportError(
        "hf_adalip.recipe.data needs datasets: pip install 'hf-adalip[recipes]'"
    ) from error

DIGITS = "digits"
"""The name of the dataset that ships with scikit-learn."""

_LONGEST_ID = 96  # the Hub's limit


_ALTERNATIVES = f"--dataset_name /path/to/a/copy or --dataset_name {DIGITS} (no download)"


def load_splits(name: str, config: str | None = None, instead: str = _ALTERNATIVES) -> Any:
    """The splits of a folder or of a dataset on the Hub.

    Args:
        name: a Hub id, or a folder in any layout that `datasets.load_dataset` takes.
        config: the configuration, of a dataset that has several ("sst2" of nyu-mll/glue).
        instead: what to give where it cannot be had, for the error.

    Raises:
        DataError: if it cannot be had.
    """
    folder = os.path.expanduser(name)
    place: AbstractContextManager[None] = nullcontext()
    if os.path.exists(folder):  # pathlib raises for a name that is too long
        name = folder
    elif len(name) > _LONGEST_ID or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise DataError(f"there is no folder {shortened(name)}")
    elif not _reached_hub(name, instead):
        place = _cache_only()
    try:
        with place:
            splits = datasets.load_dataset(name, config)
    except ConnectionError as error:
        raise DataError(
            f"{name} is neither a folder here nor in the cache, and the Hub cannot be reached; "
            f"give {instead}"
        ) from error
    except Exception as error:  # of many libraries, and all of them about the dataset
        cause = error
        while cause.__cause__ is not None:  # datasets wraps what happened in what it was doing
            cause = cause.__cause__  # type: ignore[assignment]
        reason = " ".join(str(cause).split()) or type(cause).__name__
        raise DataError(f"cannot load {name}: {reason}") from error
    return splits


def shortened(name: str) -> str:
    """A name as an error shows it."""
    return name if len(name) <= 200 else f"{name[:50]}… (of {len(name)} characters)"


def on_hub(*names: str | None) -> list[str]:
    """Those that are USER/NAME, the id of something on the Hub, and no folder here.

    For a run's results: where it is published from, there may be another folder or none.
    """
    ids = [name for name in names if name and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)]
    return [name for name in ids if not os.path.exists(name)]


def _reached_hub(name: str, instead: str) -> bool:
    """One short request instead of the half minute of retries that load_dataset makes offline.

    Raises:
        DataError: if the Hub has no such dataset.
    """
    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except RepositoryNotFoundError as error:
        raise DataError(
            f"there is neither a folder {name} nor such a dataset on the Hub (or it is private); "
            f"give {instead}"
        ) from error
    except HfHubHTTPError:
        pass  # the Hub answers; load_dataset knows more
    except Exception:  # httpx or requests, by the version of huggingface_hub
        return False
    return True


@contextmanager
def _cache_only() -> Iterator[None]:
    """Only here: what follows, publishing above all, may find the Hub again."""
    constants = huggingface_hub.constants
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
