"""The system calls that durability rests on, and what they promise on Linux and on macOS.

Linux: `fdatasync` returns when a file's bytes are on the disk, `syncfs` when everything that was
written to a file system is. macOS has neither. There `F_FULLFSYNC` (fcntl(2)) asks the drive to
write even what lies in its own cache, where a plain `fsync` may leave it. As nothing syncs a whole
file system and waits for it, each file is handed to the drive by `fsync` when it is written, and
before a log is emptied the drive is asked to empty its cache. macOS is for development: Apple
promises nothing for the order in which renames reach the disk.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from backends.raw import StorageFull, StorageUnavailable

log = logging.getLogger("dropzone")

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def sync_data(descriptor: int) -> None:
    """Return when the bytes of an open file are on the disk."""
    if hasattr(os, "fdatasync"):
        os.fdatasync(descriptor)
    else:
        _sync_fully(descriptor)


def sync_file_system(descriptor: int) -> None:
    """Write all of a file system to the disk at once: much faster than file by file."""
    syncfs = _syncfs()
    if syncfs is None:
        os.sync()
        _sync_fully(descriptor)
    elif syncfs(descriptor):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def syncs_file_systems() -> bool:
    """Say whether `sync_file_system` covers files that nobody has synced by themselves."""
    return _syncfs() is not None


@functools.cache
def _syncfs() -> ctypes._NamedFuncPointer | None:
    function: ctypes._NamedFuncPointer | None = getattr(
        ctypes.CDLL(None, use_errno=True), "syncfs", None
    )
    return function


def _sync_fully(descriptor: int) -> None:
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is None:
        os.fsync(descriptor)
    else:
        fcntl.fcntl(descriptor, full_sync)


def sync_file(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power cut too."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_file(folder.parent)


def write_all(descriptor: int, data: bytes) -> None:
    """Write all bytes, however few the system takes at a time."""
    while data:
        written = os.write(descriptor, data)
        data = data[written:]


def read_file(path: str) -> bytes:
    """Read a file in as few system calls as a small one needs."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.read(descriptor, 65_536)
        if len(data) == 65_536:
            with open(descriptor, "rb", 0, closefd=False) as file:
                data += file.readall()
        return data
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(file: int) -> Iterator[None]:
    """Hold an open file locked against every other process and descriptor."""
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise `StorageUnavailable` where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise storage_error(error) from error


def storage_error(error: Exception) -> StorageUnavailable:
    """Say what went wrong with the disk in words that an operator can act on."""
    log.error("the data folder failed", exc_info=error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return StorageFull("the disk is full; try again later")
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    return StorageUnavailable(f"the payload could not be stored ({reason}); try again later")


def existing(path: Path) -> Path:
    """Return a path, or the nearest of its parents that is there."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))


def writing_trouble(folder: Path) -> str | None:
    """Say why this user cannot write to a folder, or make it where it is missing."""
    there = existing(folder)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    return f"{there} is not a folder that this user can write to: let it, or choose another"
