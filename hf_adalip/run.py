"""Runs an unmodified Trainer script that can then say `--optim adamlip`.

python -m hf_adalip.run run_glue.py --optim adamlip --optim_args gamma=0.9 ...
python -m hf_adalip.run -m my_package.train --optim adamlip ...
accelerate launch -m hf_adalip.run run_glue.py --optim adamlip ...

Its Trainers log S and the layers' learning rates, and write model cards, as with `attach`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .as_main import run_module, run_script
from .integrations.trainer import attach_if_ours, register

USAGE = "usage: python -m hf_adalip.run SCRIPT|-m MODULE [the script's arguments]"


@contextmanager
def _attached() -> Iterator[None]:
    """Within it, `attach` is called for every Trainer that trains with one of our optimizers."""
    from transformers import Trainer

    train: Callable[..., Any] = Trainer.train

    def with_rates(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        attach_if_ours(trainer)
        return train(trainer, *args, **kwargs)

    Trainer.train = with_rates
    try:
        yield
    finally:
        Trainer.train = train


def main() -> None:
    """The command `python -m hf_adalip.run`."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    try:
        register()
    except ImportError as error:
        sys.exit(f"hf_adalip: {error}")
    with _attached():
        if sys.argv[1] != "-m":
            run_script(sys.argv[1], sys.argv[2:])
        elif len(sys.argv) > 2:
            run_module(sys.argv[2], sys.argv[3:])
        else:
            sys.exit(f"hf_adalip: -m needs the name of a module\n{USAGE}")


if __name__ == "__main__":
    main()
