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
import math
import os
import pwd
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from datetime import UTC, datetime
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, ParamSpec, TypeVar

from backends.raw import NoAccess, StorageFull, StorageUnavailable

log = logging.getLogger("dropzone")
P = ParamSpec("P")
T = TypeVar("T")

DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
FILE, FOLDER = os.R_OK | os.W_OK, os.R_OK | os.W_OK | os.X_OK  # the rights that are needed
NO_ROOM = "the disk is full; try again later"
BYTES_PER_FILE = 16 * 1024  # of the reserve; for so many bytes mke2fs makes an inode
BESIDE = 256  # bytes that a payload takes besides: its name in a folder, its head in the journal
UNREADABLE = {errno.EIO, errno.EBADMSG, getattr(errno, "EUCLEAN", errno.EIO)}  # a bad block, say
BLOCK = 4096  # bytes that a disk cannot read are skipped in such steps
DAMAGED = ".damaged-"  # in the names of files that were set aside
LOCK_POLL = 0.002  # seconds


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


def sync_files_around(folder: Path) -> None:
    """Write all of the file system of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        sync_file_system(descriptor)
    finally:
        os.close(descriptor)


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


def read_around(descriptor: int, offset: int, size: int) -> bytes:
    """Read a part of a file, as far as it is there; blocks that cannot be read are zeros."""
    parts, end = list[bytes](), offset + size
    while offset < end:
        try:
            part = os.pread(descriptor, end - offset, offset)
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            part = bytes(min(BLOCK - offset % BLOCK, end - offset))
        if not part:
            break
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def set_aside(path: Path, folder: Path) -> Path:
    """Move what is damaged into a folder, for somebody to look at it; return where it lies."""
    now = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z"
    return path.rename(folder / f"{path.name}{DAMAGED}{now}")


@functools.lru_cache(maxsize=1000)
def tell_once(sentence: str) -> None:
    """Log an error, once for as long as the program runs."""
    log.error("%s", sentence)


@contextlib.contextmanager
def locked(file: int, patience: float | None = None) -> Iterator[None]:
    """Hold an open file locked against every other process and descriptor.

    Whoever holds it may have been stopped: raises TimeoutError after `patience` seconds, if given.
    """
    if patience is None:
        fcntl.flock(file, fcntl.LOCK_EX)
    else:
        _lock_within(file, patience)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _lock_within(file: int, patience: float) -> None:
    end = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                wrong = f"locked for {patience:.0f} s by a process that does not go on"
                raise TimeoutError(errno.ETIMEDOUT, wrong) from None
        time.sleep(LOCK_POLL)


class Hands(Executor):
    """Threads for work on a disk that may hang: the end of the program does not wait for them."""

    def __init__(self, count: int, name: str) -> None:
        self._calls = SimpleQueue[Callable[[], None] | None]()
        self._are_gone = False
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[P, T], /, *args: P.args, **options: P.kwargs) -> Future[T]:
        """See Executor.submit."""
        if self._are_gone:
            raise RuntimeError("this store is closed")
        done: Future[T] = Future()

        def work() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                result = call(*args, **options)
            except BaseException as error:  # noqa: BLE001 (whoever waits for it hears of it)
                done.set_exception(error)
            else:
                done.set_result(result)

        self._calls.put(work)
        return done

    def _work(self) -> None:
        while call := self._calls.get():
            call()
            del call  # and with it what it was called with

    def shutdown(self, wait: bool = True, **_: Any) -> None:  # noqa: FBT001, FBT002 (Executor's)
        """See Executor.shutdown."""
        if not self._are_gone:
            self._are_gone = True
            for _thread in self._threads:
                self._calls.put(None)
        if wait:
            for thread in self._threads:
                thread.join()


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise `StorageUnavailable` where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise storage_error(error) from error


@contextlib.contextmanager
def access_errors() -> Iterator[None]:
    """Raise `NoAccess` where this user has no right."""
    try:
        yield
    except PermissionError as error:
        raise NoAccess(denied(error)) from None


def storage_error(error: Exception) -> StorageUnavailable:
    """Say what went wrong with the disk in words that an operator can act on."""
    if isinstance(error, PermissionError) and error.filename:
        wrong = denied(error)
        log.error("the data folder failed: %s", wrong)
        return NoAccess(wrong)
    log.error("the data folder failed", exc_info=error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return StorageFull(NO_ROOM)
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    return StorageUnavailable(f"the payload could not be stored ({reason}); try again later")


class Need(NamedTuple):
    """What a file needs: its bytes, and how many files there may be in the end."""

    bytes: int
    files: int


class Room:
    """What may still be written to the disk of a folder: bytes and files, without the reserve.

    The reserve is so many bytes, or a twentieth of the disk if that is less; and of the files that
    the disk can have as many as that is worth, or a twentieth.
    """

    def __init__(self, folder: Path, reserve: int) -> None:
        disk = os.statvfs(existing(folder))
        self.free = disk.f_bavail * disk.f_frsize
        self.reserve = min(reserve, disk.f_blocks * disk.f_frsize // 20)
        self._block = disk.f_frsize
        self._bytes = self.free - self.reserve
        self._files: float = disk.f_favail - min(reserve // BYTES_PER_FILE, disk.f_files // 20)
        if not disk.f_files:  # it makes them as they are needed, as Btrfs does
            self._files = math.inf

    def is_used_up(self) -> bool:
        """Say whether not even the smallest payload finds room."""
        return self._bytes < self._block + 1 + BESIDE or self._files < 1

    def take(self, needs: Sequence[Need]) -> bool:
        """Set room aside for files; return False where there is too little.

        Each takes whole blocks, and its bytes once more in the journal.
        """
        size = sum(need.bytes for need in needs)
        files = sum(need.files for need in needs)
        blocks = sum(-(-need.bytes // self._block) for need in needs)
        needed = blocks * self._block + size + len(needs) * BESIDE
        if needed > self._bytes or files > self._files:
            return False
        self._bytes -= needed
        self._files -= files
        return True


def existing(path: Path) -> Path:
    """Return a path, or the nearest of its parents that is there."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))


def writing_trouble(folder: Path) -> str | None:
    """Say why this user cannot write to a folder, or make it where it is missing."""
    there = existing(folder)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    if there == folder and folder.stat().st_uid != os.geteuid():
        return access_trouble(folder, os.W_OK | os.X_OK)
    return f"{there} is not a folder that this user can write to: let it, or choose another"


def access_trouble(path: Path | str, mode: int) -> str | None:
    """Say why this user has no access to a path (`mode` is that of `os.access`).

    None where it has, or where nothing is there. The usual reason is that another user, root for
    instance, has once worked in the folder.
    """
    if os.access(path, mode):
        return None
    try:
        owner = os.stat(path).st_uid
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{path}: {error.strerror}"
    me, way = user_name(os.geteuid()), "write to" if mode & os.W_OK else "read"
    if owner == os.geteuid():
        return f"{path}: {me} may not {way} it: look at its mode, and at how its disk is mounted"
    wrong = f"{path} belongs to {user_name(owner)}, and {me} may not {way} it"
    return f"{wrong}: as root, give it back (chown -R {me} {shlex.quote(str(path))})"


def denied(error: OSError) -> str:
    """Say who may not do what where the system has refused this user something."""
    paths = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name]
    places = [(existing(path.parent), os.W_OK | os.X_OK) for path in paths]
    if len(paths) == 1 and os.path.exists(paths[0]):  # it was to be opened, not made or moved
        places = [(paths[0], os.R_OK), (paths[0], os.R_OK | os.W_OK), *places]
    found = (access_trouble(place, mode) for place, mode in places)
    return next(filter(None, found), f"{error.filename}: {error.strerror}")


def owner_of(path: Path) -> tuple[int, Path]:
    """Return the user to whom a path belongs, or the nearest of its parents that can be seen.

    The second is what was seen: the path itself; a parent of it, where it is not there; the folder
    into which this user may not look, where it may be there.
    """
    for each in (path, *path.parents):
        with contextlib.suppress(OSError):
            return os.stat(each).st_uid, each
    return os.geteuid(), path


def wrong_owner(path: Path) -> str | None:
    """Say to whom a path belongs where that is another user; None where it is not there."""
    owner, seen = owner_of(path)
    me = user_name(os.geteuid())
    if owner == os.geteuid():
        return None
    if seen == path:
        return f"{path} belongs to {user_name(owner)}, and this program runs as {me}"
    if os.access(seen, os.X_OK):
        return None
    return f"{me} may not look into {seen}, in which {path} lies"


def user_name(uid: int) -> str:
    """Return the name of a user, or the number of one that has none, as in a container."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
