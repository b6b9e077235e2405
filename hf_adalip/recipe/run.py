"""What a run is to its user, whichever loop trains: how it is stopped, what it writes, and what it
says at its end."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from ..diagnose.checks import Finding
from ..errors import DataError, DivergedError, Interrupted, PublishError, SaveError, UsageError
from ..files import RESULTS, saving, whole
from ..monitor import PROBES, RATES, LayerRateHistory, layerwise, save_probes, secant
from ..publish import hub
from ..publish.script import SCRIPT, versions
from .folder import RunOptions

VERSIONS = (
    *("accelerate", "datasets", "evaluate", "huggingface_hub", "matplotlib", "numpy", "pillow"),
    *("pyyaml", "scikit-learn", "scipy", "tensorboard", "timm", "tqdm", "transformers"),
)
"""What the results say the versions of, besides torch, Python and this package."""

INTERRUPTED = 130  # exit status, as the shell's


class Stoppable(Protocol):
    """What ends after the step in which it is asked to."""

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


def any_asked_to_stop(run: Stoppable, accelerator: Any, step: int | None = None) -> bool:
    """Whether any process was asked: what is asked of one must be done by all at the same step.

    Args:
        run: of this process.
        accelerator: that the run trains with.
        step: the step that was done; several processes ask one another every 20 only. None to ask
            in any case.
    """
    if accelerator.num_processes == 1:  # the trigger is a tensor, and reading it waits for a GPU
        return run.stop_asked
    if step is not None and step % 20:
        return False
    if run.stop_asked:
        accelerator.set_trigger()
    return bool(accelerator.check_trigger())


GO_ON = "to go on, run the same command with --resume_from_checkpoint latest"


def interrupted(step: int, steps: int, saved: Path, on: str = GO_ON) -> Interrupted:
    """What is raised when a run that was asked to stop has been saved.

    Args:
        step: the last that was done.
        steps: how many there would have been.
        saved: the checkpoint.
        on: how to go on.
    """
    return Interrupted(f"stopped at step {step} of {steps} and saved {saved}; {on}")


def check_publishing(args: RunOptions) -> None:
    """Raises UsageError when a run starts for what would be wrong when it is published."""
    if args.push_to_hub:
        try:
            hub.check_run(str(args.hub_model_id))
        except hub.PublishError as error:
            raise UsageError(f"--push_to_hub: {error}") from error


def check_same_run(path: Path, saved: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises UsageError, naming them, if a checkpoint's settings are others than the run's."""
    changed = [
        f"{name} was {saved.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if saved.get(name) != value
    ]
    if changed:
        raise UsageError(f"{path} is of a different run: {'; '.join(changed)}")


def load_rates(checkpoint: Path) -> LayerRateHistory:
    """The layers' learning rates up to a checkpoint; raises UsageError if they are damaged."""
    try:
        return LayerRateHistory.load(checkpoint / f"{RATES}.json")
    except ValueError as error:
        raise UsageError(f"{error}: it is damaged; resume from another checkpoint") from error


def write_run(
    folder: Path,
    results: Mapping[str, Any],
    rates: LayerRateHistory,
    script: str | None,
    optimizer: Any,
) -> None:
    """Writes what every run leaves besides its model: results, script, the layers' learning rates,
    and the measurements of a `Secant`.

    Args:
        folder: a temporary one, of `replacing`.
        results: of the run.
        rates: of the layers; none, if the optimizer has no S.
        script: the source of what ran, if it can be published.
        optimizer: that trained.
    """
    if (measured := secant(optimizer)) is not None:
        title = f"{results['recipe']}, {results['optimizer']}, {results['step']} steps"
        with saving(folder / f"{PROBES}.png"):
            save_probes(measured, folder, title)
    if rates.steps:
        rates.save(folder / f"{RATES}.json")
        lr = f"lr {results['learning_rate']:g}"
        with saving(folder / f"{RATES}.png"):
            title = f"{results['recipe']}, {results['optimizer']}, {lr}"
            rates.plot(folder / f"{RATES}.png", title)
    if script:
        whole(folder / SCRIPT, lambda path: path.write_bytes(script.encode()))
    write_results(folder, results)


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Writes a run's results, whole or not at all."""
    text = json.dumps(_finite(dict(results)), indent=2, allow_nan=False)
    whole(folder / RESULTS, lambda path: path.write_text(text + "\n"))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; a diverged run has null there."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def device_name(device: torch.device) -> str:
    """The name of a GPU; of anything else its type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def facts(device: torch.device, *libraries: str) -> dict[str, Any]:
    """What results say of the place: the device, and the versions of these libraries too."""
    found = versions(*VERSIONS, *libraries) | {"torch": torch.__version__}
    return {"device": device_name(device), "versions": found}


def nonfinite_steps(optimizer: Any) -> int:
    """How many steps some layer was left out of, its gradient being inf or NaN; to be asked of all
    processes."""
    ours = layerwise(optimizer)
    rates = ours.layer_learning_rates() if ours else {}
    return max((rate.nonfinite_steps for rate in rates.values()), default=0)


def said_of_nonfinite(skipped: int, steps: int) -> list[str]:
    """The lines at the end of a run's table if there were such steps."""
    if not skipped:
        return []
    return [
        "",
        f"warning: in {skipped} of {steps} steps the gradient of a layer was inf or NaN, and the "
        "layer was not trained; is the learning rate too large?",
    ]


def conclude(
    recipe: str,
    folder: Path,
    table: str,
    ended: Finding | None,
    finite: bool,
    repo_id: str | None,
    private: bool,
) -> None:
    """Says what a finished run came to, and publishes it; on the main process.

    Args:
        recipe: its name.
        folder: of the run.
        table: the run in a few lines.
        ended: what is to be said of the losses that it ended with.
        finite: whether they are; if not, it is not published.
        repo_id: where to publish, or None.
        private: for those with access only.

    Raises:
        DivergedError: if the losses are not finite.
        PublishError: if it was not published as asked.
    """
    print(f"\n{table}\n\nresults in {folder}")
    if not finite:
        raise DivergedError(str(ended))
    if ended is not None:
        print(f"{recipe}: {ended}", file=sys.stderr)
    if repo_id is not None:
        hub.publish_run(folder, repo_id, private)


NOT_SAVED = (
    "checkpoints and results of before are as they were: make room, and run the same command with "
    "--resume_from_checkpoint latest"
)
"""What is said after a SaveError."""


def exit_status(recipe: str, main: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> int:
    """Runs a recipe's `main(argv)`.

    Returns:
        0 when the run is finished, 1 if its loss is not finite (then it is not published), it was
        not published as asked or there was no room for what it writes, 2 for bad options or data
        (one line on stderr says what), 130 when the user stopped it.
    """
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        main(argv)
    except (UsageError, DataError) as error:
        if first:
            print(f"{recipe}: error: {error}", file=sys.stderr)
        return 2
    except SaveError as error:  # of any process
        print(f"{recipe}: error: {error}; {NOT_SAVED}", file=sys.stderr)
        return 1
    except DivergedError as error:
        if first:
            print(f"{recipe}: {error}", file=sys.stderr)
        return 1
    except PublishError as error:  # of the main process, which alone publishes
        print(error, file=sys.stderr)
        return 1
    except (Interrupted, KeyboardInterrupt) as stop:
        if first:
            print(f"{recipe}: {str(stop) or 'stopped, nothing saved'}", file=sys.stderr)
        return INTERRUPTED
    return 0
