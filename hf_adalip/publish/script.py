"""A recipe as one file that runs anywhere: its inline script metadata, pinned, and our own wheel.

The metadata are a comment at the head of a script (PEP 723) that `uv run` and `hf jobs uv run`
read: `# /// script`, TOML, `# ///`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import sys
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import ScriptError as ScriptError
from ..version import __version__

SCRIPT = "train.py"
"""The name of a recipe in the folder of a run and in its repository."""

DISTRIBUTION = "hf-adalip"

_PACKAGE = Path(__file__).parents[1]

_HEADER = re.compile(r"^# /// script\s*?\n((?:#(?: .*)?\n)*?)# ///\s*?$", re.MULTILINE)
_OF_THE_INSTALLER = {"RECORD", "WHEEL", "INSTALLER", "REQUESTED", "direct_url.json"}


def versions(*distributions: str) -> dict[str, str]:
    """The versions of Python, hf_adalip and, of these distributions, those that are installed.

    For a run's results: publishing pins them, so a recipe names all that its header asks for.
    """
    found = {"python": ".".join(map(str, sys.version_info[:3])), "hf_adalip": __version__}
    for name in distributions:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def running_script() -> str | None:
    """The source of the script that is running, to be kept as `train.py` beside its results.

    None if it has no inline script metadata, without which it cannot be published: a notebook,
    a test runner. Read it when the run starts, because it may be edited before the run ends.
    """
    path = getattr(sys.modules["__main__"], "__file__", None)
    source = Path(path).read_bytes().decode(errors="replace") if path else ""
    return source if _HEADER.search(source) else None


def pin(script: str, run: Mapping[str, str], own_url: str | None) -> str:
    """The script with every dependency of its header at the version of the run.

    Args:
        script: the source, which must depend on hf-adalip.
        run: what `versions` found; those that the header or hf-adalip asks for are pinned.
        own_url: where the wheel of hf-adalip will be; None if the package index has it.

    Raises:
        ScriptError: if there is no header, or it cannot be pinned.
    """
    import tomlkit
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version
    from tomlkit.exceptions import ParseError

    found = _HEADER.search(script)
    if found is None:
        raise ScriptError("it has no inline script metadata (# /// script), which uv run needs")
    try:
        table: Any = tomlkit.parse(re.sub("^# ?", "", found[1], flags=re.MULTILINE))
        asked = [Requirement(text) for text in table.get("dependencies", [])]
    except (ParseError, InvalidRequirement) as error:
        raise ScriptError(f"its inline script metadata cannot be read: {error}") from error
    by_name: dict[str, Requirement] = {canonicalize_name(item.name): item for item in asked}
    if DISTRIBUTION not in by_name:
        raise ScriptError(f"its inline script metadata do not depend on {DISTRIBUTION}")
    # without +cu130 and the like, which the package index does not have
    pins: dict[str, str] = {
        canonicalize_name(name): Version(text).public for name, text in run.items()
    }
    pins.pop("python", None)
    if unknown := sorted(by_name.keys() - pins.keys()):
        raise ScriptError(f"it needs {', '.join(unknown)}, whose version the run has not recorded")

    extras_asked = ("", *by_name[DISTRIBUTION].extras)
    needed = set(by_name)
    for item in map(Requirement, _distribution().requires or []):
        if item.marker is None or any(item.marker.evaluate({"extra": x}) for x in extras_asked):
            needed.add(canonicalize_name(item.name))
    pinned = []
    for name in [DISTRIBUTION, *sorted(needed & pins.keys() - {DISTRIBUTION})]:
        item = by_name.get(name, Requirement(name))
        extras = f"[{','.join(sorted(item.extras))}]" if item.extras else ""
        marker = f" ; {item.marker}" if item.marker else ""
        own = name == DISTRIBUTION and own_url
        pinned.append(f"{name}{extras}{f' @ {own_url}' if own else f'=={pins[name]}'}{marker}")
    dependencies = tomlkit.array()
    dependencies.extend(pinned)
    table["dependencies"] = dependencies.multiline(True)

    uv = table.get("tool", {}).get("uv", {})
    sources = uv.get("sources", {})
    if sources.pop(DISTRIBUTION, None) and not sources:  # a path here
        del uv["sources"]
    if local := [name for name, source in sources.items() if "path" in source]:
        raise ScriptError(f"[tool.uv.sources] has a path on this machine for {', '.join(local)}")
    commented = "".join(f"# {line}".rstrip() + "\n" for line in table.as_string().splitlines())
    return f"{script[: found.start(1)]}{commented}{script[found.end(1) :]}"


def is_on_index() -> bool:
    """Whether this hf_adalip is the one that pip or uv took from a package index.

    Otherwise it was installed from a folder, a file or a repository, which installers write down
    (`direct_url.json`), or it is another one than the one installed.
    """
    found = _distribution()
    here = _PACKAGE.resolve()
    return (
        Path(str(found.locate_file(here.name))).resolve() == here
        and found.read_text("direct_url.json") is None
    )


def build_wheel() -> tuple[str, bytes]:
    """The name and the bytes of a wheel of this hf_adalip; always the same for the same files.

    Made from the files that are imported and the metadata of their installation, because there
    need be no source tree, and no build tools.

    Raises:
        ScriptError: if hf_adalip is not installed, or in another version.
    """
    installed, package = _distribution(), _PACKAGE
    info = f"hf_adalip-{__version__}.dist-info"
    files = {
        f"{package.name}/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and path.suffix in (".py", ".cpp", ".typed")
    }
    for entry in sorted(installed.files or [], key=str):
        folder, _, name = entry.as_posix().partition("/")
        if folder == info and name not in _OF_THE_INSTALLER:
            files[f"{info}/{name}"] = entry.read_binary()
    tags = "Wheel-Version: 1.0\nGenerator: hf_adalip\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/WHEEL"] = tags.encode()
    record = [f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items()]
    files[f"{info}/RECORD"] = "".join([*record, f"{info}/RECORD,,\n"]).encode()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in files.items():
            item = zipfile.ZipInfo(name)  # of 1980, so that the time of packing does not matter
            item.external_attr, item.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
            wheel.writestr(item, data)
    return f"hf_adalip-{__version__}-py3-none-any.whl", buffer.getvalue()


def _distribution() -> metadata.Distribution:
    try:
        found = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError as error:
        raise ScriptError(f"{DISTRIBUTION} is not installed here: pip install -e .") from error
    if found.version != __version__:
        raise ScriptError(
            f"{DISTRIBUTION} {found.version} is installed, but {__version__} is what is imported"
        )
    return found


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
