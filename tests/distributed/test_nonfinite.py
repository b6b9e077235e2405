"""One rank's inf is everyone's: its layer is skipped, or the step refused, on all ranks alike."""

from __future__ import annotations

import json

import pytest

from tests.distributed.ranks import run

pytestmark = pytest.mark.slow


def test_one_ranks_inf_is_everyones(tmp_path):
    """All six and Lipschitz by both signals; "skip", "raise", "propagate", and a GradScaler.

    Whatever is said not to change or to go on as if nothing had been is so bit for bit.
    """
    path = tmp_path / "found.json"
    run(2, "nonfinite", str(path), "ddp", "fsdp2")
    found = json.loads(path.read_text())
    assert len(found) == 2 * (8 * 3 + 4 + 2)
    wrong = {
        case: [check for check, holds in checks.items() if not holds]
        for case, checks in found.items()
        if not all(checks.values())
    }
    assert not wrong
