"""Compiled C++, kept on disk: $XDG_CACHE_HOME/hf_adalip/kernels (~/.cache/hf_adalip/kernels).

What is loaded runs with the rights of the process. Hence the folder must belong to the user and be
writable by nobody else, it is opened once, and a library is found, checked and loaded relative to
that open folder: whoever may rename the folders above cannot put another in its place between.

A library is named KEY.SHA256.so: what it was made from, and what is in it. A file whose content
does not have its name's checksum is never loaded: it is made again. Where the folder cannot be
made or written, a library is made in a temporary folder, for this process alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex

import torch

from . import KernelError

_MACOS = platform.system() == "Darwin"

# No contraction: a fused multiply-add would round otherwise than torch's own operators do. And
# roots need no errno, without which they become vectors.
_FLAGS = (
    *("-std=c++2a", "-O3", "-DNDEBUG", "-ffp-contract=off", "-fno-math-errno"),  # 2a: GCC 9's 20
    *("-fno-omit-frame-pointer", "-fPIC", "-shared"),
)

_REMEDY = "remove it, or set XDG_CACHE_HOME to a folder of your own"


def missing() -> str | None:
    """What a machine lacks to compile, or None; nothing is compiled to find out."""
    if sys.platform == "win32":
        return "a compiler that takes GCC's options (not on Windows)"
    if _compiler() is None:
        named = f"; CXX is {os.environ['CXX']!r} and not found" if os.environ.get("CXX") else ""
        return f"a C++ compiler with OpenMP (name one in the environment as CXX){named}"
    return None


def load(source: str, *flags: str) -> ctypes.CDLL:
    """The library of a C++ source: as it was kept, or else compiled, once for all processes.

    Args:
        source: complete, but for the headers of C++ and OpenMP.
        flags: of the compiler, after those that all sources get.

    Raises:
        KernelError: where the folder is not safe, or the compiler or the loading fails.
    """
    compiler = (*(_compiler() or ()), *_target())
    command = [*compiler, *_FLAGS, *_openmp(), *flags, "-x", "c++", "-"]
    key = hashlib.sha256(repr((source, command, _macros(compiler))).encode()).hexdigest()[:32]
    try:
        with _opened(_folder()) as folder:
            return folder.kept(key) or folder.make(key, source, command)
    except OSError as error:
        warn_once(
            f"compiled kernels cannot be kept ({error}), and each process compiles its own: "
            "set XDG_CACHE_HOME to a folder that can be written"
        )
    # Its file is not needed once it is loaded.
    with tempfile.TemporaryDirectory(prefix="hf_adalip-") as private, _opened(Path(private)) as own:
        return own.make(key, source, command)


@cache
def warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


class _Folder:
    """An open folder of the user's own, that nobody else can write."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor
        # Linux names an open folder whatever becomes of its path.
        opened = f"/proc/self/fd/{descriptor}"
        self._place = opened if os.path.isdir(opened) else str(path)

    def kept(self, key: str) -> ctypes.CDLL | None:
        """A whole library of this key, loaded."""
        for name in self._of(key):
            if name.endswith(".so") and self._is_whole(name):
                with suppress(OSError):  # made on a machine with other libraries: make it again
                    return ctypes.CDLL(f"{self._place}/{name}")
        return None

    def make(self, key: str, source: str, command: Sequence[str]) -> ctypes.CDLL:
        """Compiles, unless another process just has.

        Raises:
            OSError: where nothing can be written here.
            KernelError: where it does not compile, or cannot be loaded.
        """
        with self._locked(key) as alone:
            if made := self.kept(key):
                return made
            for name in self._of(key) if alone else ():  # torn, or of a process that was killed
                if not name.endswith(".lock"):
                    os.unlink(name, dir_fd=self._descriptor)
            new = f"{key}.{token_hex(8)}.new"
            try:
                _run([*command, "-o", new], source, self._place)
                name = self._publish(key, new)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(new, dir_fd=self._descriptor)
            try:
                return ctypes.CDLL(f"{self._place}/{name}")
            except OSError as error:
                raise KernelError(
                    f"{self._path / name} was compiled and cannot be loaded: {error}"
                ) from error

    def _of(self, key: str) -> list[str]:
        return sorted(n for n in os.listdir(self._descriptor) if n.startswith(f"{key}."))

    def _is_whole(self, name: str) -> bool:
        try:
            with self._file(name, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
                status = os.fstat(descriptor)
                with open(descriptor, "rb", closefd=False) as file:
                    return (
                        stat.S_ISREG(status.st_mode)
                        and _is_own(status)
                        and hashlib.sha256(file.read()).hexdigest() == name.split(".")[1]
                    )
        except OSError:
            return False

    def _publish(self, key: str, new: str) -> str:
        with self._file(new, os.O_RDONLY) as descriptor:
            os.fchmod(descriptor, 0o700)
            with open(descriptor, "rb", closefd=False) as file:
                name = f"{key}.{hashlib.sha256(file.read()).hexdigest()}.so"
            os.fsync(descriptor)
        os.replace(new, name, src_dir_fd=self._descriptor, dst_dir_fd=self._descriptor)
        return name

    @contextmanager
    def _locked(self, key: str) -> Iterator[bool]:
        """For one process at a time; yields False where the file system has no locks.

        The lock of a process that dies is free again, as the compiler does not inherit it.
        """
        import fcntl  # not on Windows

        with self._file(f"{key}.lock", os.O_RDWR | os.O_CREAT) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:
                yield False  # two may compile then, and each puts a whole file in its place
                return
            try:
                yield True
            finally:
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # for a fork, which has it too

    @contextmanager
    def _file(self, name: str, flags: int) -> Iterator[int]:
        descriptor = os.open(name, flags | os.O_NOFOLLOW, 0o600, dir_fd=self._descriptor)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[_Folder]:
    """Makes a folder where there is none, and opens it.

    Raises:
        OSError: where it cannot be made or opened.
        KernelError: where others can write it.
    """
    path.parent.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.is_symlink():
        raise KernelError(f"{path} is a symbolic link, which is not followed: {_REMEDY}")
    path.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if not _is_own(status):
            raise KernelError(
                f"{path} (mode {stat.S_IMODE(status.st_mode):04o}, of user {status.st_uid}) can "
                f"be written by others than user {os.geteuid()}, and what is in it would be run: "
                f"{_REMEDY}"
            )
        yield _Folder(path, descriptor)
    finally:
        os.close(descriptor)


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has it that a relative path is ignored.
    home = base if os.path.isabs(base) else os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(home):
        raise FileNotFoundError("there is no home folder: HOME is not set")
    return Path(home, "hf_adalip", "kernels")


def _compiler() -> tuple[str, ...] | None:
    """Its command: CXX, which may have options, or the first there is of the usual names."""
    usual = ("clang++", "g++", "c++") if _MACOS else ("g++", "c++", "clang++")
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError:  # quotes that do not close
        return None
    for name, *options in [named] if named else [[name] for name in usual]:
        if path := shutil.which(name):
            return os.path.abspath(path), *options
    return None


@cache
def _macros(compiler: tuple[str, ...]) -> str:
    """What it says of itself, of the C and C++ libraries, and of this processor."""
    return _run([*compiler, "-dM", "-E", "-x", "c++", "-"], "#include <cstdlib>\n")


def _run(command: Sequence[str], source: str, folder: str | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            input=source,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as error:
        raise KernelError(f"{command[0]} cannot be run: {error.strerror}") from error
    if done.returncode:
        last = done.stderr.splitlines()[-20:]
        first = next((line for line in last if "error" in line), "")
        raise KernelError(
            "\n".join([f"{command[0]} ended with status {done.returncode}: {first}", *last])
        )
    return done.stdout


def _target() -> tuple[str, ...]:
    machine = os.uname().machine
    if _MACOS or machine.startswith("riscv"):
        return ()  # whose compilers do not know "native"
    return ("-mcpu=native",) if machine.startswith("ppc") else ("-march=native",)


def _openmp() -> tuple[str, ...]:
    if not _MACOS:
        return ("-fopenmp",)
    # Apple's compiler comes without OpenMP. torch's own first: two in one process abort it.
    named = map(os.environ.get, ("OMP_PREFIX", "CONDA_PREFIX"))
    usual = "/opt/homebrew/opt/libomp", "/usr/local/opt/libomp"
    for place in (str(Path(torch.__file__).parent), *named, *usual):
        if place and os.path.exists(f"{place}/include/omp.h"):
            library = f"{place}/lib"
            found = (f"-I{place}/include", f"-L{library}", f"-Wl,-rpath,{library}")
            return "-Xclang", "-fopenmp", "-lomp", *found
    return "-Xclang", "-fopenmp", "-lomp"
