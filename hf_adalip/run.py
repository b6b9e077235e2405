"""Runs an unmodified Trainer script that can then say `--optim adamlip`.

python -m hf_adalip.run run_glue.py --optim adamlip --optim_args gamma=0.9 ...
accelerate launch -m hf_adalip.run run_glue.py --optim adamlip ...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from .integrations.trainer import register

USAGE = "usage: python -m hf_adalip.run SCRIPT [the script's arguments]"


def run_script(script: str, arguments: list[str]) -> None:
    """Runs the script as `__main__`."""
    path = Path(script)
    if not path.is_file():
        sys.exit(f"hf_adalip: no script at {path}")
    sys.argv = [script, *arguments]
    sys.path[0] = str(path.resolve().parent)
    runpy.run_path(script, run_name="__main__")


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(f"{USAGE}\n\n{__doc__}")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    try:
        register()
    except ImportError as error:
        sys.exit(f"hf_adalip: {error}")
    run_script(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
