"""Where compiled kernels are kept, and what is loaded from there."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shlex
import signal
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_adalip import AdamLip, Lipschitz
from hf_adalip.optim.forms.kernels import KernelError, build, cpu

pytestmark = pytest.mark.skipif(bool(cpu.missing()), reason=f"needs {cpu.missing()}")

SOURCE = 'extern "C" int answer() { return 42; }'
PLANTED = 'extern "C" int answer() { return 666; }'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and no kernels of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = (cpu._library, build.warn_once)
    for function in cached:
        function.cache_clear()
    yield tmp_path / "cache" / "hf_adalip" / "kernels"
    for function in cached:
        function.cache_clear()


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes CXX a script that says in a file what it compiles, and hangs where there is "hang"."""
    real = shlex.join(build._compiler() or ())
    script = tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\ncd {tmp_path}\ncase "$*" in *-shared*) echo "$*" >> calls;\n'
        f'  [ ! -e hang ] || sleep 600;; esac\ncd - > /dev/null\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return tmp_path / "calls"


def answer(library: ctypes.CDLL) -> int:
    result: int = library.answer()
    return result


def run(function: Callable[..., Any], *args: Any) -> None:
    """In a process of its own: what this one has loaded must not be overwritten."""
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def keep(*sources: str) -> None:
    for source in sources:
        build.load(source)


def step() -> None:
    param = torch.ones(50, requires_grad=True)
    param.grad = torch.ones_like(param)
    AdamLip([param], fused=True).step()
    assert (param < 1).all()


def libraries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


@pytest.mark.slow
def test_an_optimizer_keeps_its_kernels_in_the_users_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And steps after they were torn: a file of 5,000 bytes ended in SIGBUS, an empty one was a
    fall-back for ever."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    run(step)
    assert not list((tmp_path / "tmp").rglob("*.so"))
    (kept,) = libraries(cache)
    assert stat.S_IMODE(cache.stat().st_mode) == stat.S_IMODE(cache.parent.stat().st_mode) == 0o700
    whole = kept.read_bytes()
    for size in (0, 5000):
        kept.write_bytes(whole[:size])
        run(step)
        assert libraries(cache) == [kept]
        assert kept.read_bytes() == whole


def damaged(how: str, path: Path, tmp_path: Path) -> None:
    content = path.read_bytes()
    if how == "flipped":
        path.write_bytes(content[:3000] + bytes([content[3000] ^ 1]) + content[3001:])
    elif how == "longer":
        path.write_bytes(content + b"\0")
    elif how == "writable":
        path.chmod(0o777)
    else:
        path.rename(tmp_path / path.name)
        if how == "link":
            path.symlink_to(tmp_path / path.name)
        else:
            os.mkfifo(path)


@pytest.mark.parametrize("how", ["flipped", "longer", "writable", "link", "fifo"])
def test_a_file_that_is_not_what_was_kept_is_made_again(
    how: str, cache: Path, tmp_path: Path, compiler: Path
) -> None:
    run(keep, SOURCE)
    (kept,) = libraries(cache)
    whole = kept.read_bytes()
    damaged(how, kept, tmp_path)
    assert answer(build.load(SOURCE)) == 42
    assert libraries(cache) == [kept]
    assert kept.is_file()
    assert not kept.is_symlink()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    assert kept.read_bytes() == whole
    assert len(compiler.read_text().splitlines()) == 2


def test_a_library_with_another_content_is_not_loaded(cache: Path) -> None:
    """Under the name of one that is asked for."""
    run(keep, SOURCE, PLANTED)
    one, two = libraries(cache)
    contents = one.read_bytes(), two.read_bytes()
    two.write_bytes(contents[0])
    one.write_bytes(contents[1])
    assert answer(build.load(SOURCE)) == 42
    assert answer(build.load(PLANTED)) == 666


@pytest.mark.slow
def test_what_is_kept_is_compiled_once_and_by_all_that_it_depends_on(
    compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        assert answer(build.load(SOURCE)) == 42
    assert len(compiler.read_text().splitlines()) == 1
    build.load(SOURCE + "\n")
    build.load(SOURCE, "-fno-builtin")
    monkeypatch.setattr(build, "_macros", lambda compiler: "#define __AVX512F__ 1")
    build.load(SOURCE)
    build.load(SOURCE)
    assert len(compiler.read_text().splitlines()) == 4


def unsafe(how: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.load(SOURCE)
    if how == "mode":
        folder.chmod(0o777)
    elif how == "group":
        folder.chmod(0o770)
    elif how == "owner":
        monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    else:
        folder.rename(folder.with_name("elsewhere"))
        folder.symlink_to(folder.with_name("elsewhere"))


@pytest.mark.parametrize("how", ["mode", "group", "owner", "link"])
def test_a_folder_that_others_can_write_is_refused(
    how: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsafe(how, cache, monkeypatch)
    with pytest.raises(
        KernelError, match=rf"{cache} .*: remove it, or set XDG_CACHE_HOME"
    ) as error:
        build.load(SOURCE)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    os.chown(cache, 65534, -1)
    with pytest.raises(KernelError, match="of user 65534"):
        build.load(SOURCE)
    assert not list(cache.iterdir())


def test_fused_is_refused_with_such_a_folder_and_the_default_says_that_it_goes_without(
    cache: Path,
) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)

    def optimizers(param: torch.Tensor, **form: Any) -> list[Any]:
        base = torch.optim.Adam([param], foreach=True)
        return [AdamLip([param], **form), Lipschitz(base, **form)]

    param = torch.ones(2**20, requires_grad=True)
    param.grad = torch.ones_like(param)
    for optimizer in optimizers(param, fused=True):
        with pytest.raises(KernelError, match="mode 0777"):
            optimizer.step()
    assert (param == 1).all()
    steps = [optimizer.step for optimizer in optimizers(param)] * 2
    with pytest.warns(UserWarning, match="mode 0777") as warned:
        assert [step() for step in steps] == [None] * 4
    assert len(warned) == 1
    assert "\n" not in str(warned[0].message)
    assert (param < 1).all()
    assert not list(cache.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("file", ["cache", "cache/hf_adalip", "cache/hf_adalip/kernels"])
def test_without_a_folder_each_process_compiles_its_own(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with pytest.warns(UserWarning, match="cannot be kept .*XDG_CACHE_HOME") as warned:
        assert [answer(build.load(source)) for source in (SOURCE, PLANTED)] == [42, 666]
    assert len(warned) == 1
    assert not list((tmp_path / "tmp").iterdir())


def test_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/ignored")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    with pytest.warns(UserWarning, match="HOME is not set"):
        assert answer(build.load(SOURCE)) == 42


@pytest.mark.slow
def test_a_cache_that_can_only_be_read(
    cache: Path, compiler: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it holds is loaded; what it does not is compiled for this process."""
    build.load(SOURCE)
    before = sorted(cache.iterdir())
    really = os.open

    def read_only(path: Any, flags: int, *args: Any, **options: Any) -> int:
        if flags & os.O_CREAT and str(path).endswith(".lock") and not private:
            raise OSError(30, "Read-only file system")
        return really(path, flags, *args, **options)

    private: list[str] = []
    make = build.tempfile.TemporaryDirectory
    monkeypatch.setattr(
        build.tempfile,
        "TemporaryDirectory",
        lambda **options: private.append("made") or make(**options),
    )
    monkeypatch.setattr(os, "open", read_only)
    assert answer(build.load(SOURCE)) == 42
    with pytest.warns(UserWarning, match="Read-only file system"):
        assert answer(build.load(PLANTED)) == 666
    assert sorted(cache.iterdir()) == before
    assert len(compiler.read_text().splitlines()) == 2


def test_what_the_compiler_said(cache: Path) -> None:
    with pytest.raises(KernelError, match=r"ended with status 1: .*error.*nonsense") as error:
        build.load("void f() {}\nnonsense;")
    assert len(str(error.value).splitlines()) > 1
    assert not libraries(cache)


def test_a_compiler_that_does_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_text("#!/nonexistent/interpreter\n")
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert build.missing() is None
    with pytest.raises(KernelError, match=f"{script} cannot be run: No such file"):
        build.load(SOURCE)
    for absent in ("/nonexistent/g++ -O2", "g++ 'unclosed"):
        monkeypatch.setenv("CXX", absent)
        assert absent in (build.missing() or "").replace('"', "'")


def test_a_compiler_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{shlex.join(build._compiler() or ())} -DVALUE=7")
    assert answer(build.load('extern "C" int answer() { return VALUE; }')) == 7


def load_at_once(barrier: Any, results: Any) -> None:
    barrier.wait(60)
    results.put(answer(build.load(SOURCE)))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 32])
def test_processes_that_compile_at_once_compile_once(
    processes: int, compiler: Path, cache: Path
) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(processes), context.Queue()
    started = [
        context.Process(target=load_at_once, args=(barrier, results)) for _ in range(processes)
    ]
    for process in started:
        process.start()
    assert [results.get(timeout=120) for _ in started] == [42] * processes
    for process in started:
        process.join(60)
    assert len(compiler.read_text().splitlines()) == 1
    assert len(libraries(cache)) == 1


def hang() -> None:
    os.setsid()
    build.load(SOURCE)


@pytest.mark.slow
def test_a_process_that_was_killed_while_it_compiled(
    compiler: Path, cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "hang").touch()
    process = multiprocessing.get_context("fork").Process(target=hang)
    process.start()
    while not compiler.exists():
        assert process.is_alive()
        time.sleep(0.01)
    (key,) = {path.name.split(".")[0] for path in cache.iterdir()}
    (cache / f"{key}.left.new").write_bytes(b"half")
    (tmp_path / "hang").unlink()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    try:
        assert answer(build.load(SOURCE)) == 42
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its compiler
        process.join(60)
    (kept,) = libraries(cache)
    assert kept.suffix == ".so"
