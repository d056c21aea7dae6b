"""Where payloads lie: the folder of a file is the payload's state.

    data/raw/<raw_id>.json                pending
    data/processed/<day>/<raw_id>.json    processed, by the UTC day of arrival
    data/processed/<day>.ndjson.gz        a finished day, packed
    data/rejected/<raw_id>.json           rejected, beside <raw_id>.reason.json

Moves are renames on one file system, so that a payload is in exactly one folder at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import UUID

import msgspec

from backends import json_of
from backends.raw import (
    PAYLOAD_NAME,
    PIECE,
    STATES,
    Activity,
    OpenPayload,
    PayloadUnreadable,
    Portion,
    RawIdUnknown,
    Rejection,
    State,
    StorageUnavailable,
    arrival_of,
    day_of,
    raw_id_of,
)
from backends.raw.disk import (
    existing,
    locked,
    read_file,
    storage_error,
    sync_file,
    syncs_file_systems,
    write_all,
    writing_trouble,
)
from backends.raw.packs import PACK, PACK_NAME, Pack
from backends.raw.rejections import RejectionIndex

log = logging.getLogger("dropzone")
T = TypeVar("T")

DAY_NAME = re.compile(r"\d{4}-\d\d-\d\d")
BROKEN_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENOENT}
WINDOW = 200_000  # payloads that are listed at a time, so that any number fits into memory
PORTION = 1000  # payloads
CLOCK_PATIENCE = timedelta(minutes=5)


# ── Listing ───────────────────────────────────────────────────────────────────────────────────────


def earliest(folder: Path, limit: int = sys.maxsize, after: UUID | None = None) -> list[UUID]:
    """Return the `limit` least raw_ids of the payloads in a folder behind `after`, in order."""
    names, _ = earliest_names(folder, limit, str(after or ""))
    return list(map(UUID, names))


def earliest_names(folder: Path, limit: int, after: str = "") -> tuple[list[str], int]:
    """Return the same as text, which is quicker to hand about, and how many there are in all.

    It holds no more than twice as many names at a time, however many files there are.
    """
    names, count = list[str](), 0
    low, high = f"{after}~" if after else "", "~"
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name > low and PAYLOAD_NAME.fullmatch(name):
                count += 1
                if name < high:
                    names.append(name)
                if len(names) > 2 * limit:
                    names.sort()
                    high = names[limit]
                    del names[limit:]
    names.sort()
    return [name[:36] for name in names[:limit]], count


def _holds(path: Path, body: bytes) -> bool:
    """Say whether a file has these bytes; raises FileNotFoundError where there is no file."""
    try:
        return path.read_bytes() == body
    except FileNotFoundError:
        raise
    except OSError as error:  # a bad block, say
        log.warning("%s cannot be read, it is written again from the journal: %s", path, error)
        return False


# ── The tally ─────────────────────────────────────────────────────────────────────────────────────

MINUTES = 60  # that the tally goes back
SLOT = struct.Struct("<QQ")
TALLY_BYTES = SLOT.size * (1 + MINUTES)


class Tally:
    """The numbers of `Activity`, which all processes of a data folder share in a small file.

    The first slot has how many payloads have become processed, and when the last one landed; each
    of the others has a minute and how many landed in it. The file is not synced.
    """

    def __init__(self, path: Path, processed_so_far: Callable[[], int]) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with locked(self._file):
            if os.fstat(self._file).st_size < TALLY_BYTES:
                total = 0
                with contextlib.suppress(OSError, StorageUnavailable):  # a damaged pack, say
                    total = processed_so_far()
                first = SLOT.pack(total, 0)
                os.pwrite(self._file, first.ljust(TALLY_BYTES, b"\0"), 0)

    def add(self, *, landed: int = 0, processed: int = 0) -> None:
        """Count payloads."""
        now = time.time_ns() // 1_000_000
        with locked(self._file):
            total, last = self._slot(0)
            self._set(0, total + processed, now if landed else last)
            if landed:
                minute = now // 60_000
                number = 1 + minute % MINUTES
                known, count = self._slot(number)
                self._set(number, minute, landed + (count if known == minute else 0))

    def read(self) -> Activity:
        """Return what was counted."""
        (total, last), *slots = SLOT.iter_unpack(os.pread(self._file, TALLY_BYTES, 0))
        this_minute, counts = int(time.time()) // 60, dict(slots)
        landed = [counts.get(this_minute - n, 0) for n in reversed(range(MINUTES))]
        return Activity(total, last, landed)

    def _slot(self, number: int) -> tuple[Any, ...]:
        return SLOT.unpack(os.pread(self._file, SLOT.size, SLOT.size * number))

    def _set(self, number: int, *values: int) -> None:
        os.pwrite(self._file, SLOT.pack(*values), SLOT.size * number)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


# ── The folders ───────────────────────────────────────────────────────────────────────────────────


class Folders:
    """The folders of a data folder: implements `backends.raw.Payloads`.

    It holds nothing but paths and plain values, so that it can travel to other processes. `folder`
    is that of pending payloads; the others lie beside it unless given, on the same file system.
    Packs are deleted `keep_days` days after their day, never where that is 0.
    """

    def __init__(
        self,
        folder: Path,
        *,
        processed: Path | None = None,
        rejected: Path | None = None,
        keep_days: int = 0,
    ) -> None:
        self.raw = folder
        self.processed = processed or folder.parent / "processed"
        self.rejected = rejected or folder.parent / "rejected"
        self.journal = folder.parent / "journal"
        self.keep_days = keep_days
        self._expired = self.journal / "expired"
        self._index = RejectionIndex(self.journal / "rejected.sqlite")

    @property
    def workspace(self) -> Path:
        """See Payloads.workspace."""
        return self.journal

    @property
    def process_lock(self) -> Path:
        """See Payloads.process_lock."""
        return self.raw.parent / "process.lock"

    def path(self, raw_id: UUID, state: State) -> Path:
        """Return where the file of a payload lies in a state."""
        if state == "pending":
            folder = self.raw
        elif state == "rejected":
            folder = self.rejected
        else:
            folder = self.processed / day_of(raw_id)
        return folder / f"{raw_id}.json"

    def read(self, raw_id: UUID) -> tuple[State, bytes]:
        """See Payloads.read."""
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            with contextlib.suppress(FileNotFoundError):
                return state, self.path(raw_id, state).read_bytes()
        packed = self._packed(raw_id)
        if packed is None:
            raise RawIdUnknown(f"no payload has the raw_id {raw_id}")
        return "processed", packed

    def open_payload(self, raw_id: UUID) -> OpenPayload:
        """See Payloads.open_payload."""
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            with contextlib.suppress(FileNotFoundError):
                file = open(self.path(raw_id, state), "rb", 0)
                size = os.fstat(file.fileno()).st_size
                return OpenPayload(size, iter(functools.partial(file.read, PIECE), b""), file.close)
        packed = self._look_in_packs(raw_id, Pack.open_payload)
        if packed is None:
            raise RawIdUnknown(f"no payload has the raw_id {raw_id}")
        return packed

    def read_pending(self, raw_id: UUID) -> bytes:
        """See Payloads.read_pending."""
        path = f"{self.raw}/{raw_id}.json"
        try:
            return read_file(path)
        except OSError as error:
            if not os.path.lexists(path):
                raise RawIdUnknown(f"{raw_id} is no longer pending") from None
            if error.errno not in BROKEN_FILE:
                raise storage_error(error) from error
            raise PayloadUnreadable(f"the file cannot be read: {error.strerror}") from error

    def pending(self, limit: int = sys.maxsize, after: str = "") -> tuple[list[str], int]:
        """See Payloads.pending."""
        return earliest_names(self.raw, limit, after)

    def count_pending(self) -> int:
        """See Payloads.count_pending."""
        with os.scandir(self.raw) as entries:
            return sum(PAYLOAD_NAME.fullmatch(entry.name) is not None for entry in entries)

    def changed(self, state: Literal["pending", "rejected"]) -> int:
        """See Payloads.changed: it is when the folder was last changed, in nanoseconds."""
        folder = self.raw if state == "pending" else self.rejected
        return folder.stat().st_mtime_ns

    def strays(self) -> list[str]:
        """See PayloadStore.strays."""
        return sorted(name for name in os.listdir(self.raw) if raw_id_of(name) is None)

    def open_tally(self) -> Tally:
        """Return the numbers that all processes share; close it."""
        return Tally(self.journal / "tally", self.count_processed)

    def publish(self, path: Path | str, body: bytes) -> None:
        """Make a file appear whole: written under another name, then renamed to `path`."""
        part = f"{self.journal}/{os.getpid()}-{threading.get_ident()}.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            write_all(descriptor, body)
            if not syncs_file_systems():
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(part, path)

    def restore(self, raw_id: UUID, body: bytes, *, force: bool = False) -> None:
        """Write a payload of the journal again where it is missing, torn or different.

        With `force`, also where it looks right: what the system shows may never reach the disk.
        """
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            path = self.path(raw_id, state)
            with contextlib.suppress(FileNotFoundError):
                if force or not _holds(path, body):
                    path.lstat()  # raises where it is not there
                    self.publish(path, body)
                return
        if not self._is_packed_or_expired(raw_id):
            self.publish(self.path(raw_id, "pending"), body)

    def greatest_raw_id(self) -> UUID:
        """Return the greatest raw_id of all files, as far as it is that of a known moment."""
        names = os.listdir(self.raw) + os.listdir(self.rejected)
        days = sorted(filter(DAY_NAME.fullmatch, os.listdir(self.processed)), reverse=True)
        for day in days:
            of_day = os.listdir(self.processed / day)
            if of_day:
                names += of_day
                break
        raw_ids = filter(None, map(raw_id_of, names))
        return max(filter(arrival_of, raw_ids), default=UUID(int=0))

    # Settling

    def settle(self, processed: Iterable[str], rejected: Iterable[Rejection]) -> list[Rejection]:
        """See Payloads.settle."""
        counted, moved = list(map(self._with_retries, rejected)), 0
        for rejection in counted:
            self._record(rejection)  # before the payload, so that none is without its reason
            self._move(rejection.raw_id, self.rejected)
        if counted:
            with contextlib.suppress(StorageUnavailable):  # then `take_stock` finds them
                self._index.note(counted)
        for day, raw_ids in itertools.groupby(processed, day_of):
            folder = self.processed / day
            folder.mkdir(parents=True, exist_ok=True)
            for raw_id in raw_ids:
                moved += self._move(raw_id, folder)
        with contextlib.suppress(OSError), contextlib.closing(self.open_tally()) as tally:
            tally.add(processed=moved)
        return counted

    def _with_retries(self, rejection: Rejection) -> Rejection:
        before = self.last_rejection(rejection.raw_id)
        if before is None:
            return rejection
        return msgspec.structs.replace(
            rejection, retries=before.retries, retried_at=before.retried_at
        )

    def _move(self, raw_id: UUID | str, folder: Path) -> bool:
        name = f"{raw_id}.json"
        source = f"{self.raw}/{name}"
        try:
            os.rename(source, f"{folder}/{name}")
            return True
        except FileNotFoundError:
            pass  # another processor has moved it
        except OSError as error:  # one bad file never stops the rest
            log.error("%s stays pending, it cannot be moved: %s", source, error)  # noqa: TRY400
        return False

    # Finished days are packed, and deleted after `keep_days`.

    def packs(self, day: str = "") -> list[Pack]:
        """Return the packs of a day, or all; a day has a second one if payloads came late."""
        with os.scandir(self.processed) as entries:
            found = [e for e in entries if PACK_NAME.fullmatch(e.name) and e.name.startswith(day)]
        packs = []
        for entry in found:
            with contextlib.suppress(FileNotFoundError):  # it has just expired
                packs.append(Pack(Path(entry.path), entry.stat().st_mtime_ns))
        return sorted(packs, key=lambda pack: pack.path)

    def portions(self) -> Iterator[tuple[str, Iterator[Portion]]]:
        """See Payloads.portions."""
        for pack in self.packs():
            yield f"{pack.path.name} {pack.written}", pack.portions()
        for entry in sorted(os.scandir(self.processed), key=lambda entry: entry.name):
            if entry.is_dir():
                name = f"{entry.name} {entry.stat().st_mtime_ns}"
                yield name, self._portions_in(Path(entry.path))

    def _portions_in(self, folder: Path) -> Iterator[Portion]:
        raw_ids = earliest(folder, WINDOW)
        while raw_ids:
            for start in range(0, len(raw_ids), PORTION):
                yield FolderPortion(self, raw_ids[start : start + PORTION])
            raw_ids = earliest(folder, WINDOW, raw_ids[-1])

    def count_processed(self) -> int:
        """See Payloads.count_processed."""
        packed = sum(pack.index().payloads for pack in self.packs())
        folders = (entry.path for entry in os.scandir(self.processed) if entry.is_dir())
        return packed + sum(len(os.listdir(folder)) for folder in folders)

    def finished_days(self) -> list[str]:
        """See Payloads.finished_days."""
        days = filter(DAY_NAME.fullmatch, os.listdir(self.processed))
        return sorted(day for day in days if day < f"{datetime.now(UTC):%Y-%m-%d}")

    def compact(self, day: str) -> int:
        """See Payloads.compact."""
        folder = self.processed / day
        raw_ids = [raw_id for raw_id in earliest(folder) if day_of(raw_id) == day]
        packs = self.packs(day)
        fresh = [
            raw_id
            for raw_id in raw_ids  # the others are left of a run that was stopped
            if not packs or self._packed(raw_id) != (folder / f"{raw_id}.json").read_bytes()
        ]
        if fresh:
            names = (f"{day}.{n}{PACK}" if n > 1 else f"{day}{PACK}" for n in itertools.count(1))
            paths = (self.processed / name for name in names)
            Pack.write(next(path for path in paths if not path.exists()), folder, fresh)
        for raw_id in raw_ids:
            (folder / f"{raw_id}.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else lies there
            folder.rmdir()
        return len(fresh)

    def expire(self) -> list[str]:
        """See Payloads.expire."""
        first = f"{datetime.now(UTC) - timedelta(days=self.keep_days):%Y-%m-%d}"
        packs = self.packs() if self.keep_days else []
        expired = [pack for pack in packs if pack.path.name[:10] < first]
        if expired:
            self.publish(self._expired, max(self.first_kept_day(), first).encode())
            sync_file(self._expired)
        for pack in expired:
            pack.remove()
        return [pack.path.name for pack in expired]

    def first_kept_day(self) -> str:
        """See Payloads.first_kept_day.

        It is written down: a day that is old enough for it may have landed before a long power
        cut, and still be processed.
        """
        with contextlib.suppress(FileNotFoundError):
            return self._expired.read_text()
        return ""

    def _is_packed_or_expired(self, raw_id: UUID) -> bool:
        with contextlib.suppress(StorageUnavailable):  # what is damaged is as good as not there
            return day_of(raw_id) < self.first_kept_day() or self._packed(raw_id) is not None
        return False

    def _packed(self, raw_id: UUID) -> bytes | None:
        return self._look_in_packs(raw_id, Pack.read)

    def _look_in_packs(self, raw_id: UUID, look: Callable[[Pack, UUID], T | None]) -> T | None:
        damage = None
        for pack in self.packs(day_of(raw_id)):
            try:
                found = look(pack, raw_id)
            except FileNotFoundError:
                continue  # it has just expired
            except StorageUnavailable as error:
                damage = error
                continue
            if found is not None:
                return found
        if damage:
            raise damage
        return None

    # The quarantine

    def rejection(self, raw_id: UUID) -> Rejection:
        """See Payloads.rejection."""
        try:
            moved = datetime.fromtimestamp(self.path(raw_id, "rejected").lstat().st_ctime, UTC)
        except FileNotFoundError:
            raise RawIdUnknown(f"{raw_id} is not rejected") from None
        wrong = "the reason is not there or cannot be read"
        return self.last_rejection(raw_id) or Rejection(raw_id, "reason_missing", wrong, moved)

    def rejections(self, one: UUID | None = None) -> Iterator[Rejection]:
        """See Payloads.rejections."""
        for raw_id in [str(one)] if one else self.rejected_names():
            with contextlib.suppress(RawIdUnknown):  # it was put back meanwhile
                yield self.rejection(UUID(raw_id))

    def find_rejections(
        self,
        *,
        code: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: UUID | None = None,
        limit: int = sys.maxsize,
    ) -> tuple[list[Rejection], Counter[str]]:
        """See Payloads.find_rejections."""
        return self._index.find(self, code, since, until, after, limit)

    def take_stock(self) -> Counter[str]:
        """See Payloads.take_stock."""
        return self._index.take_stock(self)

    def rejected_names(self, limit: int = sys.maxsize, after: str = "") -> list[str]:
        """Return the `limit` earliest rejected raw_ids behind `after`, in order of arrival."""
        return earliest_names(self.rejected, limit, after)[0]

    def last_rejection(self, raw_id: UUID) -> Rejection | None:
        """See Payloads.last_rejection."""
        with contextlib.suppress(OSError, ValueError):  # also what is no UTF-8
            return msgspec.json.decode(self._reason(raw_id).read_bytes(), type=Rejection)
        return None

    def retry(self, raw_id: UUID) -> bool:
        """See Payloads.retry."""
        source = self.path(raw_id, "rejected")
        try:
            reason, now = self.rejection(raw_id), datetime.now(UTC)
            self._record(
                msgspec.structs.replace(reason, retries=reason.retries + 1, retried_at=now)
            )
            os.rename(source, self.path(raw_id, "pending"))
            with contextlib.suppress(StorageUnavailable):  # then `take_stock` finds it
                self._index.forget([str(raw_id)])
            return True
        except RawIdUnknown:
            return False
        except OSError as error:
            if source.exists():
                raise storage_error(error) from error
            return False  # another caller has put it back

    def _record(self, rejection: Rejection) -> None:
        self.publish(self._reason(rejection.raw_id), json_of(rejection))

    def _reason(self, raw_id: UUID) -> Path:
        return self.rejected / f"{raw_id}.reason.json"

    # What is wrong around

    def problems(self) -> dict[str, list[str]]:
        """See PayloadStore.problems; a folder that it made would have the wrong owner."""
        folders = (self.raw, self.processed, self.rejected, self.journal)
        troubles = [trouble for trouble in map(writing_trouble, folders) if trouble]
        device = existing(self.raw).stat().st_dev
        troubles += [
            f"{folder} is not on the file system of {self.raw}: choose a folder that is"
            for folder in folders
            if existing(folder).stat().st_dev != device
        ]
        if self.raw.is_dir() and os.access(self.raw, os.R_OK):
            troubles += [
                f"{self.raw / name} is not named <uuid>.json: move it away"
                for name in self.strays()
            ]
        behind = self._clock_trouble()
        return {"data folder": list(dict.fromkeys(troubles)), "clock": [behind] if behind else []}

    def _clock_trouble(self) -> str | None:
        """Compare the clock with the last raw_id given out, and with the age of this program."""
        past = [datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)]
        with contextlib.suppress(OSError, ValueError):  # nothing has landed
            last = UUID(bytes=(self.journal / "last_raw_id").read_bytes())
            past.append(arrival_of(last) or past[0])
        behind = max(past) - datetime.now(UTC)
        if behind < CLOCK_PATIENCE:
            return None
        return f"it is {behind} behind what has happened already: set it, and keep it by NTP"


@dataclass(frozen=True)
class FolderPortion:
    """Some processed payloads of one day that are files: a `Portion`."""

    folders: Folders
    of: list[UUID]

    def raw_ids(self) -> Sequence[UUID]:
        """See Portion.raw_ids."""
        return self.of

    def reader(self) -> Callable[[UUID], bytes]:
        """See Portion.reader."""

        def read(raw_id: UUID) -> bytes:
            try:
                _, body = self.folders.read(raw_id)
            except OSError as error:
                wrong = f"{error.filename} cannot be read: {error.strerror}"
                raise PayloadUnreadable(wrong) from error
            return body

        return read
