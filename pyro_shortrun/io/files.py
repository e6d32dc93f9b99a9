"""Files that are never half written: beside their place first, then in it."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FORGOTTEN = 3600.0  # seconds after which a file that nobody goes on writing belongs to a process that is dead


def _machine() -> str:
    """This machine, as far as numbers of processes are known on it."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"  # containers count from one each
    return platform.node()


_HOST = hashlib.sha256(_machine().encode()).hexdigest()[:8]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, no other process's, which takes its place at the end; or goes, after an
    exception."""
    scratch = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str) -> None:
    """Files that :func:`replacing` had begun for ``name`` (a regular expression) when its process was killed."""
    ours = re.compile(rf"\.(?:{name})\..+\.part")
    for scratch in filter(lambda file: ours.fullmatch(file.name), folder.iterdir()):
        with suppress(FileNotFoundError):  # its process may be alive after all
            if _is_dead(scratch) or time.time() - scratch.stat().st_mtime > _FORGOTTEN:
                scratch.unlink()


def _is_dead(scratch: Path) -> bool:
    """Whether the process that had begun a file was one of this machine, and is no more."""
    host, _, process = scratch.name.split(".")[-2].partition("-")
    if host != _HOST or os.name != "posix":
        return False
    try:
        os.kill(int(process.partition("-")[0]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # somebody else's
        return False
    return False


def reserve(path: Path, size: int) -> None:
    """Make sure that there is room for a file, for libraries that cannot be told when there is none.

    :raises OSError: where there is not.
    """
    if not hasattr(os, "posix_fallocate"):
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        path.unlink(missing_ok=True)


class Checksums:
    """SHA-256 of files in a folder, a line each, added to by any number of processes at once.

    Of a folder without such a file, by an earlier version, files are taken as they are.

    :param path: the file with the lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(errors="replace").splitlines() if path.exists() else None
        self._known = None if lines is None else dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)

    def has(self, path: Path) -> bool:
        """Whether a file is there, and whole.

        :raises ValueError: where it is there and is not.
        """
        if not path.exists():
            return False
        if self._known is None:
            return True
        if path.name not in self._known:  # the process died before it had said so
            return False
        if self._known[path.name] != _sum_of(path):
            raise ValueError(
                f"{path} is damaged: its checksum is not that in {self._path.name}. Delete it, and it is drawn again."
            )
        return True

    def add(self, path: Path) -> None:
        """Take note of a file that is whole now."""
        with self._path.open("a") as file:  # one short write at the end: lines of several processes do not mix
            file.write(f"{_sum_of(path)}  {path.name}\n")


def _sum_of(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()
