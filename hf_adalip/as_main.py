"""Runs somebody's script or module as `__main__`, as Python does."""

from __future__ import annotations

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path


def run_script(script: str, arguments: list[str]) -> None:
    """Runs the script as `__main__`."""
    path = Path(script)
    if not path.is_file():
        sys.exit(f"hf_adalip: no script at {path}")
    sys.argv = [script, *arguments]
    sys.path[0] = str(path.resolve().parent)
    runpy.run_path(script, run_name="__main__")


def run_module(module: str, arguments: list[str]) -> None:
    """Runs the module as `__main__`, as `python -m` does."""
    sys.path[0] = str(Path.cwd())
    try:
        found = find_spec(module)
    except (ImportError, ValueError):  # of what it is in
        found = None
    if found is None:
        sys.exit(f"hf_adalip: no module named {module}")
    sys.argv = [module, *arguments]  # the path, once it runs
    runpy.run_module(module, run_name="__main__", alter_sys=True)
