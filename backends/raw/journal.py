"""The journal: why no acknowledged payload can be lost, and the log on which that rests.

A group of payloads is landed in this order (`landing.RawStore.write`):

 1. One record that holds the whole group is appended to a log and synced (`Log.append`).
 2. Each payload is written under another name and renamed to `raw/<raw_id>.json`
    (`Folders.publish`).
 3. The group is acknowledged: only now does a device hear its 202.

What follows from it, sentence by sentence:

 a. Power that fails before the end of 1 takes a group of which nobody was told. A record that is
    torn has another length or CRC-32, so that nobody takes it for a whole one (`Log.records`).
 b. After power has failed behind 1, whoever opens the store next does 2 again from the record, for
    each payload whose file is missing, torn or different (`Journal.recover`, `Folders.restore`).
 c. A log is emptied or deleted in one place only, `Journal.checkpoint`: after a sync of the whole
    file system that succeeded, and that began when nothing more was to be appended to that log
    and 2 was done for all of it. If that sync fails, all files of the log are written again, since
    the system forgets what it could not write, and the log stays.
 d. So at any moment an acknowledged payload lies in a synced record, in a synced file, or in both.
 e. A log that is emptied is used again: its old records have another epoch, a secret number, and
    are never taken for new ones.
 f. If an append or its sync fails, the group is refused, and nothing is appended to that log again:
    the next sync might report success for bytes that the system has dropped. `Log.size` stays what
    it was before, so that this store does not restore what it has refused.
 g. If 2 fails, the group is refused, its files are deleted and its record is cut off
    (`Journal.take_back`); a retry with the same Idempotency-Key lands under the same raw_ids.
 h. Each store appends to logs of its own and holds a lock on them while it lives. Whoever opens a
    store recovers the logs that nobody holds. raw_ids come from one counter that all share.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import logging
import os
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import getrandbits
from typing import Protocol
from uuid import UUID

import msgspec
from msgspec import Struct
from uuid_utils.compat import uuid7

from backends.raw import next_raw_id, uuid_at
from backends.raw.disk import locked, sync_data, sync_file, sync_file_system, write_all

log = logging.getLogger("dropzone")

LOG_BYTES = 128 * 1024 * 1024  # at which a log is ended and checkpointed
AHEAD = 256 * 1024  # bytes that a log is filled ahead of its records
FULL_LOGS = 2  # that may await their checkpoint before landing does, too: the journal is bounded
HEAD = struct.Struct("<QII")  # of a record: its epoch, the length and CRC-32 of what follows
ABANDONED = 3600  # seconds after which a half-written file is that of a process that was killed
KEY_LIFE = timedelta(hours=24)
OPEN_KEYS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",  # the log has what is not synced yet
    "CREATE TABLE IF NOT EXISTS keys (key TEXT PRIMARY KEY, digest BLOB, raw_ids BLOB, landed INT)",
)
FIND_KEY = "SELECT digest, raw_ids, landed FROM keys WHERE key = ? AND raw_ids >= ?"
NOTE_KEY = "INSERT OR REPLACE INTO keys (key, digest, raw_ids, landed) VALUES (?, ?, ?, ?)"
DROP_KEYS = "DELETE FROM keys WHERE raw_ids < ?"


class KeyUse(Struct, frozen=True, array_like=True):
    """An Idempotency-Key, the SHA-256 of what came with it, and the raw_ids that it was given."""

    key: str  # behind the name of its caller, if it has one, and a line break
    digest: bytes
    raw_ids: list[UUID]
    landed: bool = False


class Record(Struct, frozen=True, array_like=True):
    """A group in the journal: payloads under their raw_ids, and the keys that came with them."""

    payloads: list[tuple[UUID, bytes]]
    keys: list[KeyUse]


class Log:
    """One file of the journal: records, each with its length and checksum, written and synced.

    Blocks that a file has already are synced without waiting for the file system's own journal. So
    it is filled ahead of the records, and a log that is no longer needed is begun anew and
    overwritten: the epoch, a secret number, tells the new records from what is left of the old.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = False  # it is not to be used again
        self.size = self._filled = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._begin()

    @classmethod
    def create(cls, folder: Path) -> Log:
        """Return a new log that this store holds, so that no other recovers it meanwhile."""
        created = cls(folder / f"{uuid7()}.new")
        try:
            created.hold()
            created.path = created.path.rename(created.path.with_suffix(".log"))
            sync_file(folder)
        except OSError:
            created.remove()
            raise
        return created

    @classmethod
    def left_in(cls, folder: Path) -> Iterator[Log]:
        """Yield, held, the logs that no store holds; all of their whole records count."""
        for path in folder.glob("*.log"):
            left = cls(path)
            if left.hold():
                left.size = os.fstat(left._file).st_size
                yield left

    def hold(self) -> bool:
        """Lock the log until it is closed; close it and return False if another store holds it."""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.exists():  # or else it was deleted before the lock was free
                return True
        self.close()
        return False

    def append(self, record: Record) -> None:
        """Return when the record is on disk; after an OSError it may be there or not."""
        body = msgspec.msgpack.encode(record)
        head = HEAD.pack(self._epoch, len(body), zlib.crc32(body))
        end = self.size + len(head) + len(body)
        if end > self._filled:
            os.pwrite(self._file, bytes(AHEAD), end)
            self._filled = end + AHEAD
        write_all(self._file, head + body)
        sync_data(self._file)
        self.size = end

    def cut(self, size: int) -> None:
        """Take back what was appended since the log had this size."""
        os.lseek(self._file, size, os.SEEK_SET)
        os.pwrite(self._file, bytes(HEAD.size), size)
        sync_data(self._file)
        self.size = size

    def begin_anew(self) -> None:
        """Forget all records."""
        self.cut(0)
        self._begin()

    def _begin(self) -> None:
        self._epoch = getrandbits(64)
        self.size = 0

    def records(self) -> Iterator[Record]:
        """Yield the records up to the first that is torn: no group behind it was acknowledged.

        Nor was a record whose append failed, which may lie behind `size` whole.
        """
        epoch = None
        with open(self.path, "rb") as file:
            while file.tell() < self.size:
                head = file.read(HEAD.size)
                if len(head) < HEAD.size:
                    return
                own, length, checksum = HEAD.unpack(head)
                epoch = own if epoch is None else epoch
                body = file.read(length)
                if own != epoch or not 0 < length == len(body) or zlib.crc32(body) != checksum:
                    return
                yield msgspec.msgpack.decode(body, type=Record)

    def payloads(self) -> Iterator[tuple[UUID, bytes]]:
        """Yield the payloads of all records."""
        for record in self.records():
            yield from record.payloads

    def remove(self) -> None:
        """Delete the log."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the log, and let go of its lock."""
        os.close(self._file)


class Restorer(Protocol):
    """Whatever can write payloads of the journal again: the folders."""

    def restore(self, raw_id: UUID, body: bytes, *, force: bool = False) -> None:
        """Write a payload again where it is missing, torn or different; with `force` anyway."""

    def greatest_raw_id(self) -> UUID:
        """Return the greatest raw_id that there is a file of."""


class Journal:
    """The logs of one store, the counter of raw_ids, and the Idempotency-Keys.

    Its methods are called by one thread at a time; checkpoints run in a thread of their own.
    """

    def __init__(self, folder: Path, payloads: Restorer) -> None:
        self._folder = folder
        self._payloads = payloads
        self._log: Log | None = None
        self._full: list[Log] = []  # appended to no more, still to be checkpointed
        self._spare: list[Log] = []  # to be begun anew

    def open(self) -> None:
        """Open what is there, and recover what a crash has left; raises OSError."""
        self._checkpointer = ThreadPoolExecutor(1, "checkpoint")
        self._checkpointing = self._checkpointer.submit(self.checkpoint, [])
        self._folder_fd = os.open(self._folder, os.O_RDONLY)  # held, it hears of every error
        self._counter = os.open(self._folder / "last_raw_id", os.O_RDWR | os.O_CREAT, 0o644)
        self._keys = sqlite3.connect(self._folder / "keys.sqlite", isolation_level=None)
        self.recover()

    def close(self) -> None:
        """Empty the logs where the disk allows it; what it does not, the next start recovers."""
        self.end_log()
        self._checkpointer.shutdown()  # waits for its end
        with contextlib.suppress(OSError):
            self.checkpoint(list(self._full))
        for kept in self._full:
            kept.close()
        for spare in self._spare:
            spare.remove()
        os.close(self._counter)
        os.close(self._folder_fd)
        self._keys.close()

    # Appending

    def append(self, record: Record) -> int:
        """Make a record durable; return the size of the log before it, for `take_back`.

        Raises OSError; then the record may be on disk or not.
        """
        if self._log is None:
            self._log = self._spare.pop() if self._spare else Log.create(self._folder)
        size = self._log.size
        try:
            self._log.append(record)
        except OSError:  # the next sync would not tell: an error is reported once, the data dropped
            self.end_log(broken=True)
            raise
        return size

    def confirm(self, record: Record) -> None:
        """Hear that all payloads of a record are files now, and mark its keys as landed."""
        for use in record.keys:
            self._note(use, landed=True)

    def end_log_when_full(self) -> None:
        """Append no more to a log that has grown large."""
        if self._log and self._log.size >= LOG_BYTES:
            self.end_log()

    def end_log(self, *, broken: bool = False) -> None:
        """Append no more to the log; its checkpoint makes room."""
        if self._log:
            self._log.broken = broken
            self._full.append(self._log)
            self._log = None

    def take_back(self, record: Record, size: int) -> None:
        """Forget a record of which not all payloads could be written."""
        for use in record.keys:
            with contextlib.suppress(sqlite3.Error):
                self._note(use, landed=False)
        if self._log is None:
            return
        self._log.size = size
        try:
            self._log.cut(size)
        except OSError:
            self.end_log(broken=True)

    # Checkpoints

    def is_behind(self) -> bool:
        """Say whether more logs await their checkpoint than may."""
        return len(self._full) > FULL_LOGS

    def begin_checkpoint(self) -> None:
        """Begin to empty the logs that are full; wait for it where they have become too many."""
        if self._full and self._checkpointing.done():
            logs = list(self._full)
            self._checkpointing = self._checkpointer.submit(self.checkpoint, logs, reuse=True)
        if self.is_behind():
            wait([self._checkpointing])

    def checkpoint(self, logs: Sequence[Log], *, reuse: bool = False) -> None:
        """Empty logs when all that they hold is on disk as files; the notes of their keys, too.

        A log is emptied only behind the sync of the whole file system; see the head of this file.
        """
        if not logs:
            return
        try:
            sync_file_system(self._folder_fd)
        except OSError as error:  # what could not be written is forgotten: write it again
            log.error("the journal cannot be emptied: %s", error)  # noqa: TRY400
            for raw_id, body in itertools.chain.from_iterable(each.payloads() for each in logs):
                self._payloads.restore(raw_id, body, force=True)
            raise
        for done in logs:
            if reuse and not done.broken:
                done.begin_anew()
                self._spare.append(done)
            else:
                done.remove()
            with contextlib.suppress(ValueError):  # of another store
                self._full.remove(done)

    # Recovery

    def recover(self) -> None:
        """Write again what is missing, torn or different, from the logs that nobody holds."""
        with locked(self._counter):
            for statement in OPEN_KEYS:
                self._keys.execute(statement)
            counted = os.pread(self._counter, 16, 0)
            whole = len(counted) == 16
            last = UUID(bytes=counted) if whole else self._payloads.greatest_raw_id()
            logs = list(Log.left_in(self._folder))
            for record in itertools.chain.from_iterable(each.records() for each in logs):
                for raw_id, body in record.payloads:
                    self._payloads.restore(raw_id, body)
                    last = max(last, raw_id)
                self.confirm(record)
            self._keys.execute(DROP_KEYS, (_oldest_key(),))
            os.pwrite(self._counter, last.bytes, 0)
            self.checkpoint(logs)
            self._remove_abandoned((*self._folder.glob("*.part*"), *self._folder.glob("*.new")))

    def _remove_abandoned(self, files: Iterable[Path]) -> None:
        for left in files:
            with contextlib.suppress(FileNotFoundError):  # another store has just renamed it
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()

    # raw_ids and keys

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[], UUID]]:
        """Give out raw_ids that are greater than those of every process before."""
        with locked(self._counter):
            last = UUID(bytes=os.pread(self._counter, 16, 0))

            def next_id() -> UUID:
                nonlocal last
                last = next_raw_id(last)
                return last

            try:
                yield next_id
            finally:
                os.pwrite(self._counter, last.bytes, 0)

    def keys_locked(self) -> contextlib.AbstractContextManager[None]:
        """Let one store at a time land keys, so that what one takes back is no other's."""
        return locked(self._folder_fd)

    def use_of(
        self, key: str, caller: str, digest: bytes, next_ids: Callable[[], list[UUID]]
    ) -> KeyUse:
        """Return the use that a caller's key has had, or note this one before it has landed.

        So every process sees it; and if it does not land, the next try lands under its raw_ids.
        A key without a caller is from when the API was open, or from an older version. Nobody
        knows whose it was, so it holds for a retry with the same body, and refuses no other body.
        """
        own = f"{caller}\n{key}" if caller else key
        use = self._use(own)
        if use is None and caller:
            use = self._use(key)
            use = use if use and use.digest == digest else None
        if use is None:
            use = KeyUse(own, digest, next_ids())
            self._note(use, landed=False)
        return use

    def _use(self, key: str) -> KeyUse | None:
        found = self._keys.execute(FIND_KEY, (key, _oldest_key())).fetchone()
        if found is None:
            return None
        digest, raw_ids, landed = found
        ids = [UUID(bytes=raw_ids[i : i + 16]) for i in range(0, len(raw_ids), 16)]
        return KeyUse(key, digest, ids, bool(landed))

    def _note(self, use: KeyUse, *, landed: bool) -> None:
        raw_ids = b"".join(raw_id.bytes for raw_id in use.raw_ids)
        self._keys.execute(NOTE_KEY, (use.key, use.digest, raw_ids, landed))


def digest_of(bodies: Sequence[bytes]) -> bytes:
    """Return the SHA-256 by which a repeated Idempotency-Key is compared."""
    return hashlib.sha256(b"\n".join(bodies)).digest()


def _oldest_key() -> bytes:
    """Return the least raw_id that a key which still counts can have been given."""
    return uuid_at(datetime.now(UTC) - KEY_LIFE).bytes
