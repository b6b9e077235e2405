"""docs/notebooks/: they run, offline and as they are, and are small enough for the repository."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.slow
def test_it_runs(notebook: Path, tmp_path: Path) -> None:
    for needed in ("ipykernel", "nbclient", "sklearn", "transformers", "datasets", "scipy"):
        pytest.importorskip(needed)
    copy = Path(shutil.copy(notebook, tmp_path))
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "run_notebooks.py", copy],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=600,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    cells = [cell for cell in json.loads(copy.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell["outputs"])


def test_it_is_valid_and_tidy(notebook: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(notebook, as_version=4))
    assert notebook.stat().st_size < 80_000, "see scripts/run_notebooks.py"
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert cell.get("execution_count") is None
        outputs = cell.get("outputs", [])
        assert not [out for out in outputs if out["output_type"] == "error"]
        assert not [out for out in outputs if out.get("name") == "stderr"]


def test_its_links_exist(notebook: Path) -> None:
    text = "".join(
        "".join(cell["source"])
        for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "markdown"
    )
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    paths = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    assert paths
    assert not [path for path in paths if not (notebook.parent / path).is_file()]
