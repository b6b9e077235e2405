"""README.md and docs/: their examples run, their links lead somewhere, and README stays short."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]

COMPLETE = "# complete example"
"""The first line of a Python block that runs as it is."""

RUN_ALL = """
import sys, traceback
from pathlib import Path
for path in sys.argv[1:]:
    try:
        exec(compile(Path(path).read_text(), path, "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        print("FAILED", path)
"""


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """The fenced Python blocks of a page, and the lines they begin at."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^( *)```python\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return [(text[: m.start()].count("\n") + 2, textwrap.dedent(m[2])) for m in found]


@pytest.mark.slow
def test_complete_examples_run(tmp_path: Path) -> None:
    """All in one process, which imports transformers and timm once."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pytest.importorskip("timm")
    files = []
    for page in PAGES:
        for line, code in python_blocks(page):
            if code.startswith(COMPLETE):
                file = tmp_path / f"{page.stem}_line_{line}.py"
                file.write_text(code, encoding="utf-8")
                files.append(str(file))
    assert files
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *files],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=600,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "FAILED" not in done.stdout, done.stdout[-1000:] + done.stderr[-4000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_blocks_compile(page: Path) -> None:
    for line, code in python_blocks(page):
        compile(code, f"{page}, line {line}", "exec")


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_relative_links_exist(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    paths = [link.partition("#")[0] for link in links if not re.match(r"[a-z]+:", link)]
    missing = [path for path in paths if path and not (page.parent / path).exists()]
    assert not missing


def test_readme_is_short_and_has_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 1500
    marked = text.partition("<!-- two-commands -->\n")[2].partition("<!-- /two-commands -->")[0]
    fence, *commands, end = marked.splitlines()
    assert (fence, end) == ("```bash", "```")
    assert len(commands) == 2
    assert "recipes/mnist.py" in commands[0]
    assert "pytest" in commands[1]
