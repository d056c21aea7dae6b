"""The journal: why no acknowledged payload can be lost, and how that is brought about.

A group of payloads is landed in this order (`landing.RawStore.write`):

 1. One record that holds the whole group is appended to a log and synced (`Log.append`).
 2. Each payload, or each batch, is written under another name and renamed to `raw/<raw_id>.json`,
    or `raw/<first raw_id>.<count>.ndjson` (`Folders.publish`).
 3. The group is acknowledged: only now does a device hear its 202.

What follows from it, sentence by sentence:

 a. Power that fails before the end of 1 takes a group of which nobody was told. A record that is
    torn has another length or CRC-32, so that nobody takes it for a whole one (`Contents.records`).
 b. After power has failed behind 1, whoever opens the store next does 2 again from the record, for
    each payload whose file is missing, torn, different or unreadable (`Journal.recover`,
    `Folders.restore`). Where a file cannot be written, the log stays for the next start.
 c. A log is emptied or deleted in one place only, `Journal.checkpoint`: after a sync of the whole
    file system that succeeded, and that began when nothing more was to be appended to that log
    and 2 was done for all of it. If that sync fails, all files of the log are written again, since
    the system forgets what it could not write, and the log stays.
 d. So at any moment an acknowledged payload lies in a synced record, in a synced file, or in both.
 e. A log that is emptied is used again: its old records have another epoch, a secret number, and
    are never taken for new ones. Each log begins with a record of no payloads, which is synced
    before anything else is appended, so that the epoch is known also where the first group is torn.
 f. If an append or its sync fails, the group is refused, and nothing is appended to that log again:
    the next sync might report success for bytes that the system has dropped. `Log.size` stays what
    it was before, so that this store does not restore what it has refused.
 g. If 2 fails, or the keys of the group cannot be marked as landed, all of them at once, the group
    is refused, its files are deleted and its record is overwritten by zeros (`Journal.take_back`);
    a retry with the same Idempotency-Key lands under the same raw_ids.
 h. A disk may give back other bytes than were synced. As a record is appended only when the one
    before it is synced, what is not whole before a whole record of the same epoch was damaged
    later; the whole records behind it count (`Contents.records`).
 i. Behind the last whole record there may be one that was never synced. It is passed over in
    silence where its last bytes are missing, which are the epoch again, and the file is as long as
    it was made before. Anything else is taken for damage (`Contents._look_at_end`).
 j. Damage is logged, and a damaged log is set aside, not deleted (`Log.finish`).
 k. A group whose process is stopped, or whose disk hangs, is refused after a while, and may become
    durable all the same when that goes on (`landing.RawStore`); nobody was told that it had.
 l. Each store appends to logs of its own and holds a lock on them while it lives. Whoever opens a
    store recovers the logs that nobody holds. raw_ids come from one counter that all share.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import itertools
import logging
import os
import re
import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import wait
from pathlib import Path
from random import getrandbits
from typing import NamedTuple, Protocol
from uuid import UUID

import msgspec
from msgspec import Struct
from uuid_utils.compat import uuid7

from backends.raw import Form, begins_batch, next_raw_id
from backends.raw.batches import payloads_in
from backends.raw.disk import (
    UNREADABLE,
    Hands,
    locked,
    read_around,
    set_aside,
    sync_data,
    sync_file,
    sync_file_system,
    write_all,
)
from backends.raw.keys import Keys, KeyUse
from backends.raw.nodes import Numbers, note_number

log = logging.getLogger("dropzone")

LOG_BYTES = 128 * 1024 * 1024  # at which a log is ended and checkpointed
AHEAD = 256 * 1024  # bytes that a log is filled ahead of its records
MARGIN = 128 * 1024  # bytes that a file has behind its last synced record, at least
FULL_LOGS = 2  # that may await their checkpoint before landing does, too: the journal is bounded
HEAD = struct.Struct("<QII")  # of a record: its epoch, the length and CRC-32 of what follows
EPOCH = struct.Struct("<Q")  # at the end of a record once more
MARKED = b"\x94"  # what such a record begins with, in MessagePack; older versions have none
CHUNK = 1024 * 1024  # bytes of a log that are looked through at a time
BODY_BEGINS = re.compile(  # of a record in MessagePack: of no files, or of the first raw_id
    rb"(?=[\x92\x94](?:\x90\x90|(?:[\x91-\x9f]|\xdc..|\xdd....)[\x92\x93]\xd9\x24))", re.DOTALL
)
RAW_ID = re.compile(rb"\xd9\x24([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
LONGEST = 64  # bytes that the two match, at most
ALIKE = 6  # bytes of an epoch, of 8, by which it is known though some of its bits are wrong
SHOWN = 10  # raw_ids in a line of the log
ABANDONED = 3600  # seconds after which a half-written file is that of a process that was killed
START_PATIENCE = 10.0  # seconds for another process to let go of its locks
BROKEN_PLACE = UNREADABLE | {errno.EISDIR, errno.ENOTEMPTY, errno.ENOTDIR, errno.ELOOP}
COUNTER = struct.Struct("<16sI")  # the last raw_id, and its CRC-32
OLD_COUNTER = 16  # bytes: older versions have no checksum


class Entry(Struct, frozen=True, array_like=True):
    """A file in the journal: its (first) raw_id, its bytes, and its form; see `backends.raw`."""

    raw_id: UUID
    body: bytes
    form: Form = ""  # which older versions do not write


class Record(Struct, frozen=True, array_like=True):
    """A group in the journal: files, and the keys that came with them.

    A log begins with one that has none, and that says whether the file was new.
    """

    entries: list[Entry]
    keys: list[KeyUse]
    is_first: bool = False  # in this file, so that nothing but zeros lay behind it


class Found(NamedTuple):
    """A whole record, and the byte behind it; older versions have not marked its end."""

    record: Record
    end: int
    is_marked: bool


class Contents:
    """What can be read of a log: the whole records of its epoch, also those behind damage.

    When all were read, `gaps` has the stretches that were written and cannot be read any more, each
    from one byte to another, and `behind` how many records lie behind the first of them.
    """

    def __init__(self, file: int, size: int, *, is_left: bool) -> None:
        self._file = file
        self._size = size
        self._is_left = is_left  # by a process that has ended: nobody knows where the last one ends
        self.gaps: list[tuple[int, int]] = []
        self.behind = 0

    def records(self) -> Iterator[Record]:
        """Yield the whole records that have files, in their order."""
        epoch = self._epoch()
        if epoch is None:
            return
        at = before = 0
        is_marked = is_new = False
        while at < self._size:
            found = self._record_at(at, epoch)
            if found:
                before, at = at, found.end
                is_marked |= found.is_marked
                is_new |= found.record.is_first
                if found.record.entries:
                    self.behind += bool(self.gaps)
                    yield found.record
                continue
            following = self._next(at, epoch)
            if following is None:
                break
            self.gaps.append((at, following))
            at = following
        if not self._is_left and at < self._size:
            self.gaps.append((at, self._size))
        if self._is_left and is_marked:
            self._look_at_end(before, at, epoch, is_new=is_new)

    def raw_ids_in_gaps(self) -> list[UUID]:
        """Return the raw_ids that can be made out where records cannot be read."""
        found = dict[bytes, None]()
        for begin, end in self.gaps:
            for _, chunk in self._chunks(begin, end):
                found |= dict.fromkeys(RAW_ID.findall(chunk))
        return [UUID(text.decode()) for text in found]

    def _epoch(self) -> int | None:
        """Return the epoch of the first whole record; None, and a gap, where there is none."""
        [first] = EPOCH.unpack(self._read(0, EPOCH.size).ljust(EPOCH.size, b"\0"))
        if self._record_at(0, first):
            return int(first)
        for at, chunk in self._chunks(0, self._size):
            for match in BODY_BEGINS.finditer(chunk):
                place = at + match.start() - HEAD.size
                if place <= 0:
                    continue
                [epoch] = EPOCH.unpack(self._read(place, EPOCH.size))
                found = self._record_at(place, epoch)
                if found and not found.is_marked and not any(self._read(0, HEAD.size)):
                    return None  # an older version was about to use this log again
                if found:
                    return int(epoch)
        self.gaps.append((0, self._size))
        return None

    def _record_at(self, at: int, epoch: int) -> Found | None:
        head = self._read(at, HEAD.size)
        if len(head) < HEAD.size:
            return None
        own, length, checksum = HEAD.unpack(head)
        if own != epoch or not 0 < length <= self._size - at - HEAD.size:
            return None
        body = self._read(at + HEAD.size, length)
        is_marked = body.endswith(EPOCH.pack(epoch))
        if zlib.crc32(body) != checksum or (body.startswith(MARKED) and not is_marked):
            return None
        with contextlib.suppress(msgspec.DecodeError):
            record = msgspec.msgpack.decode(body, type=Record)
            return Found(record, at + HEAD.size + length, is_marked)
        return None

    def _next(self, at: int, epoch: int) -> int | None:
        """Return where the next whole record begins behind a byte that none begins at."""
        place = self._find(epoch, at + 1)
        while place is not None and not self._record_at(place, epoch):
            place = self._find(epoch, place + 1)
        return place

    def _look_at_end(self, before: int, at: int, epoch: int, *, is_new: bool) -> None:
        """Note what is damaged behind the last whole record, which lies between these two bytes.

        A file is longer than its synced records by `MARGIN`: the last one where another was begun,
        or else the one before, as nobody knows whether the last one was synced. In a new file there
        are zeros where nothing was written; one that is used again has old records there.
        """
        mark, written = EPOCH.pack(epoch), self._read(at, HEAD.size).ljust(HEAD.size, b"\0")
        least = before + MARGIN
        end = at + HEAD.size
        if written.startswith(mark):  # a record was begun
            end += HEAD.unpack(written)[1]
            least = max(end, at + MARGIN)
            written = self._read(end - len(mark), len(mark))
        alike = sum(one == other for one, other in zip(written, mark, strict=False))
        is_ours = alike >= ALIKE or not mark.startswith(written.rstrip(b"\0"))
        again = self._find(epoch, at + 1)
        if again is not None:
            self.gaps.append((at, again + len(mark)))
        elif self._size < least:
            self.gaps.append((at, self._size))
        elif alike >= ALIKE or (is_new and is_ours):
            self.gaps.append((at, end))

    def _find(self, epoch: int, begin: int) -> int | None:
        for at, chunk in self._chunks(begin, self._size):
            place = chunk.find(EPOCH.pack(epoch))
            if place >= 0:
                return at + place
        return None

    def _chunks(self, begin: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield a stretch in parts, each with its place; they overlap."""
        for at in range(begin, end, CHUNK):
            yield at, self._read(at, min(CHUNK + LONGEST, end - at))

    def _read(self, at: int, size: int) -> bytes:
        return read_around(self._file, at, min(size, self._size - at))


class Log:
    """One file of the journal: records, each with its length and checksum, written and synced.

    Blocks that a file has already are synced without waiting for the file system's own journal. So
    it is filled ahead of the records, and a log that is no longer needed is begun anew and
    overwritten: the epoch, a secret number, tells the new records from what is left of the old.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = False  # it is not to be used again
        self.is_needed = False  # for payloads that could not be written again
        self.size = self._filled = self._epoch = 0
        self._is_left = False
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self.contents = Contents(self._file, 0, is_left=False)

    @classmethod
    def create(cls, folder: Path) -> Log:
        """Return a new log that this store holds, so that no other recovers it meanwhile."""
        created = cls(folder / f"{uuid7()}.new")
        try:
            created.hold()
            created.begin_anew()
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
            try:
                left = cls(path)
            except OSError as error:
                if error.errno not in BROKEN_PLACE:
                    raise
                wrong = "%s cannot be opened (%s), what it holds is not there: mend the file system"
                log.error(wrong, path, error)  # noqa: TRY400
                continue
            if left.hold():
                left.size = os.fstat(left._file).st_size
                left._is_left = True
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
        end_mark = EPOCH.pack(self._epoch)
        body = msgspec.msgpack.encode((record.entries, record.keys, record.is_first, end_mark))
        head = HEAD.pack(self._epoch, len(body), zlib.crc32(body))
        end = self.size + len(head) + len(body)
        if end + MARGIN > self._filled:
            self._fill(max(end, self._filled), end + AHEAD)
        write_all(self._file, head + body)
        sync_data(self._file)
        self.size = end

    def _fill(self, begin: int, end: int) -> None:
        if os.pwrite(self._file, bytes(end - begin), begin) < end - begin:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._filled = end

    def cut(self, size: int) -> None:
        """Take back what was appended since the log had this size."""
        written, self.size = self.size - size, size
        os.lseek(self._file, size, os.SEEK_SET)
        os.pwrite(self._file, bytes(written), size)
        sync_data(self._file)

    def begin_anew(self) -> None:
        """Forget all records: append from the beginning again, under another epoch."""
        self._epoch = getrandbits(64) | 1 << 31  # which, read as a length, is beyond any log
        self.size = 0
        os.lseek(self._file, 0, os.SEEK_SET)
        self.append(Record([], [], is_first=not self._filled))

    def records(self) -> Iterator[Record]:
        """Yield the whole records; `contents` has what cannot be read.

        A record whose append failed, which may lie behind `size` whole, is none of them.
        """
        self.contents = Contents(self._file, self.size, is_left=self._is_left)
        return self.contents.records()

    def finish(self) -> None:
        """Let go of a log whose payloads are on disk as files; one that is damaged is set aside."""
        if self.contents.gaps and not self.is_needed:
            kept = set_aside(self.path, self.path.parent)
            log.error("the damaged log is kept as %s, until somebody has looked at it", kept)
        if self.is_needed:
            self.close()
        else:
            self.remove()

    def remove(self) -> None:
        """Delete the log."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the log, and let go of its lock."""
        os.close(self._file)


class Restorer(Protocol):
    """Whatever can write payloads of the journal again: the folders."""

    def restore(self, raw_id: UUID, body: bytes, form: Form, *, force: bool = False) -> None:
        """Write a file again where it is missing, torn or different; with `force` anyway."""

    def has(self, raw_id: UUID) -> bool:
        """Say whether a payload lies in any folder or pack."""

    def greatest_raw_id(self) -> UUID:
        """Return the greatest raw_id that is known to have been given out."""

    def publish(self, path: Path | str, body: bytes) -> None:
        """Make a file appear whole."""


class Journal:
    """The logs of one store, the counter of raw_ids, and the Idempotency-Keys.

    Its methods are called by one thread at a time; checkpoints run in a thread of their own.
    """

    def __init__(self, folder: Path, payloads: Restorer, node: int = 0) -> None:
        self._folder = folder
        self._node = node  # which every raw_id names
        self._numbers = Numbers()
        self._payloads = payloads
        self._log: Log | None = None
        self._full: list[Log] = []  # appended to no more, still to be checkpointed
        self._spare: list[Log] = []  # to be begun anew
        self._keys = Keys(folder / "keys.sqlite")
        self._last = UUID(int=0)  # raw_id that this store has given out

    def open(self) -> None:
        """Open what is there, and recover what a crash has left; raises OSError."""
        self._checkpointer = Hands(1, "checkpoint")
        self._checkpointing = self._checkpointer.submit(self.checkpoint, [])
        self._folder_fd = os.open(self._folder, os.O_RDONLY)  # held, it hears of every error
        self._counter = os.open(self._folder / "last_raw_id", os.O_RDWR | os.O_CREAT, 0o644)
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
        """Hear that all payloads of a record are files now, and mark its keys as landed.

        Where that fails, none of them is: `take_back` has nothing to undo.
        """
        if record.keys:
            self._keys.note_landed(record.keys)

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

    def take_back(self, size: int) -> None:
        """Forget the record that was appended when the log had this size.

        Not all of its payloads could be written, or its keys could not be marked as landed.
        """
        if self._log is None:
            return
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
            for each in logs:
                for entry in itertools.chain.from_iterable(
                    record.entries for record in each.records()
                ):
                    self._payloads.restore(entry.raw_id, entry.body, entry.form, force=True)
                self._tell_damage(each)
            raise
        for done in logs:
            if reuse and not (done.broken or done.contents.gaps):
                done.begin_anew()
                self._spare.append(done)
            else:
                done.finish()
            with contextlib.suppress(ValueError):  # of another store
                self._full.remove(done)

    # Recovery

    def recover(self) -> None:
        """Write again what is missing, torn or different, from the logs that nobody holds."""
        with locked(self._folder_fd, START_PATIENCE), locked(self._counter, START_PATIENCE):
            last = self._last_raw_id()
            self._keys.open(is_expected=last.int > 0)
            logs = list(Log.left_in(self._folder))
            for left in logs:
                for record in left.records():
                    self._recover(record, left)
                    last = max(last, *(entry.raw_id for entry in record.entries))
                self._tell_damage(left)
            self._keys.drop_old()
            self._numbers = note_number(self._folder, self._node, last, self._payloads.publish)
            self._set_last(last)
            self.checkpoint(logs)
            self._remove_abandoned((*self._folder.glob("*.part*"), *self._folder.glob("*.new")))

    def _recover(self, record: Record, left: Log) -> None:
        for entry in record.entries:
            try:
                self._payloads.restore(entry.raw_id, entry.body, entry.form)
            except OSError as error:
                if error.errno not in BROKEN_PLACE:
                    raise
                left.is_needed = True
                wrong = (
                    "payload %s cannot be written again (%s): mend the file system. It stays in "
                    "%s, from which the next start tries again"
                )
                log.error(wrong, entry.raw_id, error, left.path)  # noqa: TRY400
        self.confirm(record)

    def _tell_damage(self, left: Log) -> None:
        contents = left.contents
        if not contents.gaps:
            return
        [(at, _), *_] = contents.gaps
        size = sum(end - begin for begin, end in contents.gaps)
        lost = [raw_id for raw_id in contents.raw_ids_in_gaps() if not self._payloads.has(raw_id)]
        wrong = (
            "%s (%d bytes) is damaged at byte %d: %d bytes cannot be read. %d whole records behind "
            "them were recovered. Of the payloads that can be made out in them, %d are not there%s"
        )
        names = ", ".join(map(str, lost[:SHOWN])) + (" and others" if len(lost) > SHOWN else "")
        shown = f": {names}" if lost else ""
        log.error(wrong, left.path, left.size, at, size, contents.behind, len(lost), shown)

    def _remove_abandoned(self, files: Iterable[Path]) -> None:
        for left in files:
            with contextlib.suppress(FileNotFoundError):  # another store has just renamed it
                if time.time() - left.stat().st_mtime > ABANDONED:
                    left.unlink()

    # raw_ids and keys

    @contextlib.contextmanager
    def counting(self) -> Iterator[Callable[[int], UUID]]:
        """Give out raw_ids that are greater than those of every process before.

        Each is that of a payload, or the first one of a batch of so many payloads.
        """
        with locked(self._counter):
            last = self._last_raw_id()

            def next_id(payloads: int) -> UUID:
                nonlocal last
                # It is behind all of a batch.
                last = next_raw_id(last, payloads, self._node, self._numbers.mark)
                return last

            try:
                yield next_id
            finally:
                self._set_last(last)

    def _last_raw_id(self) -> UUID:
        """Return the last raw_id that was given out; where that is lost, the greatest one known."""
        counted = b""
        with contextlib.suppress(OSError):  # a bad block
            counted = os.pread(self._counter, COUNTER.size, 0)
        if len(counted) == COUNTER.size:
            raw_id, checksum = COUNTER.unpack(counted)
            if zlib.crc32(raw_id) == checksum:
                return UUID(bytes=raw_id)
        known = max(self._last, self._payloads.greatest_raw_id())
        if len(counted) == OLD_COUNTER:
            last = UUID(bytes=counted)
            if last >= known and (last.version == 7 or not last.int):
                return last
        if counted or known.int:
            wrong = "%s/last_raw_id is damaged or was lost: raw_ids go on behind the greatest, %s"
            log.warning(wrong, self._folder, known)
        os.ftruncate(self._counter, 0)  # a block that cannot be read is not to be written to
        return known

    def _set_last(self, last: UUID) -> None:
        self._last = last
        os.pwrite(self._counter, COUNTER.pack(last.bytes, zlib.crc32(last.bytes)), 0)

    @contextlib.contextmanager
    def keys_locked(self) -> Iterator[None]:
        """Let one store at a time land keys, so that what one takes back is no other's."""
        with locked(self._folder_fd):
            self._keys.follow()
            yield

    def use_of(
        self, key: str, caller: str, digest: bytes, payloads: int, next_id: Callable[[], UUID]
    ) -> KeyUse:
        """Return the use that a caller's key has had, or note this one before it has landed.

        So every process sees it; and if it does not land, the next try lands under its raw_ids.
        A key without a caller is from when the API was open, or from an older version. Nobody
        knows whose it was, so it holds for a retry with the same body, and refuses no other body.
        """
        own = f"{caller}\n{key}" if caller else key
        use = self._keys.find(own)
        if use is None and caller:
            use = self._keys.find(key)
            use = use if use and use.digest == digest else None
        if use and not use.landed and payloads and not begins_batch(use.raw_ids[0], payloads):
            use = None  # an older version has given it raw_ids of files for each of its lines
        if use is None:
            use = KeyUse(own, digest, [next_id()])
            self._keys.note(use)
        return use


def digest_of(body: bytes, form: Form) -> bytes:
    """Return the SHA-256 by which a repeated Idempotency-Key is compared.

    That of NDJSON is the one of its lines, as it was when each of them was a file.
    """
    if form == "ndjson":
        body = b"\n".join(payloads_in(body, form))
    return hashlib.sha256(body).digest()
