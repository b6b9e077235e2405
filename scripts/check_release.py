"""Is what `uv build` made fit to be released?

    uv build && python scripts/check_release.py dist

Needs torch and the extra `release` in the environment it is run in. It checks that

- `twine check --strict` is content with the wheel and the sdist;
- both have every file of the package (py.typed, studies, C++), the licence and whole metadata;
- the wheel, and a wheel made from the sdist, install into an empty environment of this Python, are
  imported from there with torch alone beside them, and take two steps;
- the wheel installs on the oldest and the newest Python of this machine that it is for, and all of
  it compiles there. There, nothing is run: torch would have to be downloaded for each.

The exit status is 1 with a line for each thing that is wrong, else 0.
"""

from __future__ import annotations

import argparse
import email.message
import email.parser
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OLDEST = (3, 10)

WHOLE = ("Summary", "Keywords", "License-Expression", "License-File", "Requires-Python")
"""Fields of the metadata that have to be there, beside those that every wheel has."""

STEP = """
import hf_adalip, torch
from importlib import metadata, resources
from pathlib import Path

assert Path(hf_adalip.__file__).is_relative_to(sys.prefix), hf_adalip.__file__
assert metadata.version("hf-adalip") == hf_adalip.__version__
assert (resources.files("hf_adalip") / "experiments/studies/compare.yaml").is_file()
model = torch.nn.Linear(4, 2)
optimizer = hf_adalip.AdamLip(model.named_parameters(), lr=1e-3, layers="module")
before = model.weight.detach().clone()
for _ in range(2):
    optimizer.zero_grad()
    model(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
assert not torch.equal(before, model.weight)
assert optimizer.layer_learning_rates()
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: two steps of AdamLip")
"""

COMPILED = """
import compileall
from importlib import metadata
from pathlib import Path

package = Path(str(metadata.distribution("hf-adalip").locate_file("hf_adalip")))
assert package.is_relative_to(sys.prefix)
assert compileall.compile_dir(package, quiet=1, force=True)
print(f"Python {sys.version.split()[0]}: installed and compiled")
"""


def in_wheel(wheel: Path) -> tuple[set[str], email.message.Message]:
    """Names of the package's files and the metadata."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (path,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        return names, email.parser.Parser().parsestr(archive.read(path).decode())


def wrong_contents(wheel: Path, sdist: Path) -> list[str]:
    names, metadata = in_wheel(wheel)
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "hf_adalip").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    found = [f"the wheel lacks {name}" for name in sorted(package - names)]
    found += [
        f"the sdist lacks {name}"
        for name in sorted((package | {"LICENSE", "README.md", "pyproject.toml"}) - in_sdist)
    ]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        found.append("the wheel lacks the licence")
    found += [f"the metadata lack {field}" for field in WHOLE if not metadata[field]]
    if not metadata.get_all("Project-URL"):
        found.append("the metadata lack Project-URL")
    if "Typing :: Typed" not in metadata.get_all("Classifier", []):
        found.append("the metadata lack the classifier Typing :: Typed")
    return found


def run(*command: str | Path, cwd: Path) -> str | None:
    """What went wrong in a command, or None; its output is printed."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command,
        cwd=cwd,
        env=clean,
        check=False,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    print(done.stdout, end="", flush=True)
    return None if done.returncode == 0 else f"failed: {' '.join(map(str, command))[:200]}"


def tried(
    python: Path | str, archive: Path, code: str, beside: Path | None, folder: Path
) -> list[str]:
    """Installs an archive into an empty environment of a Python and runs code there.

    What is in the folder `beside` can be imported, too, after what is installed.
    """
    uv = (sys.executable, "-m", "uv", "--quiet")
    environment = folder / "environment"
    bin_ = environment / ("Scripts" if os.name == "nt" else "bin")
    install = (*uv, "pip", "install", "--python", environment, "--no-deps", archive)
    first = run(*uv, "venv", "--clear", "--python", python, environment, cwd=folder)
    if wrong := first or run(*install, cwd=folder):
        return [wrong]
    path = f"sys.path.append({str(beside)!r})" if beside else ""
    if wrong := run(bin_ / "python", "-I", "-c", f"import sys\n{path}\n{code}", cwd=folder):
        return [f"{archive.name}: {wrong}"]
    return []


def pythons() -> dict[tuple[int, int], Path]:
    """The Pythons of this machine that the package is for, by version: on PATH, and pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    names = [f"python3.{minor}" for minor in range(OLDEST[1], 30)]
    candidates = [*filter(None, map(shutil.which, names)), *pyenv.glob("versions/*/bin/python3")]
    found = {sys.version_info[:2]: Path(sys.executable)}
    for python in candidates:
        ask = [python, "-c", "import sys; print(*sys.version_info[:2])"]
        answer = subprocess.run(ask, check=False, capture_output=True, text=True)
        if answer.returncode == 0:  # pyenv has names for versions that are not active
            major, minor = map(int, answer.stdout.split())
            if (major, minor) >= OLDEST:
                found.setdefault((major, minor), Path(python))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dist", type=Path, help="folder with one wheel and one sdist")
    dist = parser.parse_args().dist.resolve()
    wheels, sdists = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    if len(wheels) != 1 or len(sdists) != 1:
        parser.error(f"{dist} must have one wheel and one sdist, has {[*wheels, *sdists]}")
    (wheel,), (sdist,) = wheels, sdists
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        parser.error("torch is not installed here: pip install torch")
    beside = Path(torch.origin).parents[1]
    try:
        wrong = wrong_contents(wheel, sdist)
    except (zipfile.BadZipFile, tarfile.TarError, KeyError) as error:
        parser.error(f"an archive in {dist} is damaged: {error}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        twine = run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=folder)
        wrong += [twine] if twine else []
        for archive in (wheel, sdist):
            wrong += tried(sys.executable, archive, STEP, beside, folder)
        others = pythons()
        for version in sorted({min(others), max(others)}):
            wrong += tried(others[version], wheel, COMPILED, None, folder)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
