"""Backups: a copy of all payloads that is made while others land, and why none is missed.

Meanwhile the caller keeps out processors and whatever works on all of the processed payloads, such
as packing or discarding. What still moves are new payloads, which appear in `raw`, and rejected
ones that are put back there. So:

 a. The file of a payload is in `raw`, whole, before its 202. What is copied from there at last has
    each payload that was acknowledged before, so that the logs of the journal need no copy.
 b. `rejected` is copied before `raw`, so that a payload which is put back meanwhile is met here or
    there. One that was met twice is taken out of the copy of `rejected`.
 c. Payloads, packs and reasons are never changed in place; whoever writes one again replaces it by
    a rename. So a hard link to one is a copy of it. Other files are copied under their lock.
 d. Notes about batches and packs are changed by those alone who are kept out. They are copied
    behind the payloads that have left: a note without them would hide what is in the batch. So is
    the note of a discard that a crash has cut short, which goes on where the copy is opened.
 e. Idempotency-Keys are copied before `raw`: a key that is noted as landed has its payload in the
    copy. The counter of raw_ids is copied last, so that no payload in the copy is behind it.
 f. The copy gets its name when all of it is on disk (`new_folder`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from backends.raw import (
    DISCARDING,
    Copied,
    FolderTaken,
    Kind,
    PayloadUnreadable,
    StorageUnavailable,
    payloads_in_name,
)
from backends.raw.days import REASON
from backends.raw.disk import (
    locked,
    read_file,
    sync_file,
    sync_file_system,
    syncs_file_systems,
    user_name,
    write_all,
)
from backends.raw.folders import Folders
from backends.raw.nodes import FILE as NUMBERS
from backends.raw.packs import NOTE

# What a file system answers that is another one, that has no links, or not for this user.
NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP}
CHUNK = 1024 * 1024  # bytes


@contextlib.contextmanager
def new_folder(folder: Path, apart_from: Iterable[Path]) -> Iterator[Path]:
    """Yield a folder that gets the name `folder` when all in it is on disk, and never before.

    If anything is raised meanwhile, nothing is left of it. Only its owner can read it. Raises
    `FolderTaken` where it cannot be made, also in one of `apart_from`, and `StorageUnavailable`
    where the disk refuses.
    """
    for other in apart_from:
        if folder.resolve().is_relative_to(other.resolve()):
            raise FolderTaken(f"{folder} would be taken for payloads: name a folder elsewhere")
    try:
        if os.path.ismount(folder):
            raise FolderTaken(f"{folder} is where a disk is mounted: name a new folder below it")
        if folder.exists() and any(folder.iterdir()):
            raise FolderTaken(f"{folder} is not empty: name a folder that is not there yet")
        part = Path(tempfile.mkdtemp(".part", f"{folder.name}.", folder.parent))
    except OSError as error:
        me = user_name(os.geteuid())
        advice = f"name one in a folder that is there and that {me} can write to"
        raise FolderTaken(f"{folder} cannot be made ({error.strerror}): {advice}") from error
    descriptor = os.open(part, os.O_RDONLY)  # held, it hears of every error of the disk
    try:
        yield part
        sync_file_system(descriptor)
        part.rename(folder)
        sync_file(folder.parent)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        place = error.filename or folder
        raise StorageUnavailable(f"nothing was kept: {place}: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


class Backup:
    """The copying of all that a payload store keeps to the folder `target`."""

    def __init__(self, source: Folders, target: Path) -> None:
        self._source = source
        self._target = target

    def copy_processed(self) -> Iterator[Copied]:
        """Copy what is processed and not copied yet; processors may be at work."""
        target = _made(self._target / "processed")
        for pack in self._source.packs():
            copy = target / pack.path.name
            yield from _copied("besides", f"{pack.path}.index", f"{copy}.index")
            yield from _copied("packs", str(pack.path), str(copy))
            # Behind the pack, which is put into the archive and goes meanwhile, but not before.
            kind: Kind = "besides" if copy.exists() else "archived"
            yield from _copied(kind, str(pack.note_path), f"{copy}{NOTE}")
        for entry in os.scandir(self._source.processed):
            if entry.is_dir():
                yield from _payloads("processed", Path(entry.path), _made(target / entry.name))

    def copy(self) -> Iterator[Copied]:
        """Copy all that is not copied yet, in the order that the head of this file explains."""
        yield from self.copy_processed()
        raw, rejected = _made(self._target / "raw"), _made(self._target / "rejected")
        theirs, ours = self._source.journal, _made(self._target / "journal")
        for copied in _payloads("rejected", self._source.rejected, rejected):
            if copied.trouble:  # the others are counted when it is known which of them stay
                yield copied
        for day in filter(os.DirEntry.is_dir, os.scandir(self._source.discarded)):
            copy = _made(_made(self._target / "discarded") / day.name)
            yield from _payloads("discarded", Path(day.path), copy)
            yield from _reasons(day.path, copy)
        _copy_database(theirs / "keys.sqlite", ours / "keys.sqlite")
        yield from _payloads("pending", self._source.raw, raw)
        yield from self._settle_rejected(raw, rejected)
        yield from self._copy_notes(ours / self._source.notes.folder.name)
        for name in ("expired", DISCARDING, NUMBERS):
            yield from _copied("besides", f"{theirs}/{name}", f"{ours}/{name}")
        for name in ("tally", "last_raw_id"):
            _copy_locked(theirs / name, ours / name)

    def _settle_rejected(self, raw: Path, rejected: Path) -> Iterator[Copied]:
        """Take out of the copy what was put back meanwhile, and add the reasons."""
        for entry in os.scandir(rejected):
            if os.path.exists(raw / entry.name):
                os.unlink(entry)
            else:
                yield Copied("rejected")
        yield from _reasons(self._source.rejected, rejected)

    def _copy_notes(self, target: Path) -> Iterator[Copied]:
        notes = self._source.notes
        for name in notes.names():
            yield from _copied("besides", f"{notes.folder}/{name}", f"{_made(target)}/{name}")


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _payloads(kind: Kind, source: Path, target: Path) -> Iterator[Copied]:
    """Copy the payloads of a folder, but none behind the last one that is there now.

    Where payloads land faster than they are copied, there would be no end.
    """
    names = (entry.name for entry in os.scandir(source))
    last = max(filter(payloads_in_name, names), default="")
    with os.scandir(source) as entries:
        for entry in entries:
            if entry.name <= last and payloads_in_name(entry.name):
                yield from _copied(kind, entry.path, f"{target}/{entry.name}")


def _reasons(source: Path | str, target: Path) -> Iterator[Copied]:
    for entry in os.scandir(source):
        if entry.name.endswith(REASON):
            yield from _copied("besides", entry.path, f"{target}/{entry.name}")


def _copied(kind: Kind, source: str, target: str) -> Iterator[Copied]:
    """Link or copy a file, unless it is copied already or was moved away meanwhile."""
    try:
        yield Copied(kind, is_link=_link_or_copy(source, target))
    except (FileExistsError, FileNotFoundError):
        pass
    except PayloadUnreadable as error:
        yield Copied(kind, trouble=str(error))


def _link_or_copy(source: str, target: str) -> bool:
    """Return whether it could be a link."""
    try:
        os.link(source, target)
        return True
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
    _copy_file(source, target)
    return False


def _copy_file(source: str, target: str) -> None:
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for chunk in _chunks_of(source):
            write_all(descriptor, chunk)
        shutil.copystat(source, target)
        if not syncs_file_systems():
            os.fsync(descriptor)
    except BaseException:
        os.unlink(target)
        raise
    finally:
        os.close(descriptor)


def _chunks_of(source: str) -> Iterator[bytes]:
    """Yield the bytes of a file; raises `PayloadUnreadable`, or that it is not there any more."""
    try:
        with open(source, "rb", 0) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except FileNotFoundError:
        raise
    except OSError as error:
        raise PayloadUnreadable(f"{source} cannot be read: {error.strerror}") from error


def _copy_locked(source: Path, target: Path) -> None:
    """Copy a small file that is changed in place while it is locked."""
    descriptor = os.open(source, os.O_RDONLY)
    try:
        with locked(descriptor):
            target.write_bytes(read_file(str(source)))
    finally:
        os.close(descriptor)


def _copy_database(source: Path, target: Path) -> None:
    try:
        with closing(sqlite3.connect(source)) as database, closing(sqlite3.connect(target)) as copy:
            database.backup(copy)
    except sqlite3.Error as error:
        raise StorageUnavailable(f"{source} cannot be copied: {error}") from error
