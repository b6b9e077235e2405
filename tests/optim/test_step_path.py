"""How much of the package one has to read to know what a step does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import hf_adalip
from hf_adalip import AdamLip

PACKAGE = str(Path(hf_adalip.__file__).parent)
TOLD_IN = {"step.py", "plan.py", "estimator.py", "signals.py", "adam.py"}


def test_a_steady_step_of_the_loop_form() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    optimizer = AdamLip(net.named_parameters(), foreach=False, fused=False)
    seen: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            seen.add((code.co_filename, code.co_name))

    for step in range(4):
        net(torch.randn(8, 4)).square().mean().backward()
        if step == 3:
            sys.setprofile(note)
        try:
            optimizer.step()
        finally:
            sys.setprofile(None)
        optimizer.zero_grad()
    # <listcomp> and its kin are functions of older Pythons only.
    functions = {(file, name) for file, name in seen if not name.startswith("<")}
    assert len(functions) <= 30
    assert {Path(file).name for file, _ in functions} == TOLD_IN
