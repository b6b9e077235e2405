"""What a run is to its user, whichever loop trains: how it is stopped, and what it writes down."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

import torch

RECORDS = 500
"""How often in a run the loss and the layers' learning rates are copied from the device."""

VERSIONS = (
    *("accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "numpy", "pillow"),
    *("pyyaml", "scikit-learn", "scipy", "tensorboard", "timm", "tqdm", "transformers"),
)
"""What the results say the versions of, besides torch, Python and this package."""

RATES = "layer_learning_rates"
INTERRUPTED = 130  # exit status, as the shell's


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """The user stopped the run, and it has been saved."""


class Stoppable(Protocol):
    stop_asked: bool


@contextmanager
def asked_to_stop(run: Stoppable) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM (of torchrun, of a queue) wait for the end of the step; a second
    one does not wait."""

    def ask(number: int, frame: FrameType | None) -> None:
        run.stop_asked = True
        for key, handler in before.items():
            signal.signal(key, handler)

    before = {key: signal.getsignal(key) for key in (signal.SIGINT, signal.SIGTERM)}
    for key in before:
        signal.signal(key, ask)
    try:
        yield
    finally:
        for key, handler in before.items():
            signal.signal(key, handler)


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; a diverged run has null there."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
