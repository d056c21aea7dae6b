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
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal, TypeVar
from uuid import UUID

import msgspec

from backends import json_of
from backends.raw import (
    PAYLOAD_NAME,
    PIECE_BYTES,
    STATES,
    NoAccess,
    OpenPayload,
    PayloadUnreadable,
    Portion,
    RawIdUnknown,
    Rejection,
    Settled,
    State,
    StorageUnavailable,
    arrival_of,
    day_of,
    raw_id_of,
)
from backends.raw.disk import (
    DAMAGED,
    DISK_FULL,
    FILE,
    FOLDER,
    UNREADABLE,
    access_errors,
    access_trouble,
    denied,
    existing,
    read_file,
    set_aside,
    storage_error,
    sync_file,
    syncs_file_systems,
    tell_once,
    write_all,
    writing_trouble,
)
from backends.raw.packs import INDEX, PACK, PACK_NAME, Pack
from backends.raw.rejections import RejectionIndex
from backends.raw.tally import Tally

log = logging.getLogger("dropzone")
T = TypeVar("T")

REASON = ".reason.json"  # behind a raw_id: the name of a file of `Rejection`
DAY_NAME = re.compile(r"\d{4}-\d\d-\d\d")
# One file is broken, and no other user could read it either.
BROKEN_FILE = UNREADABLE | {errno.EISDIR, errno.ELOOP, errno.ENOENT}
# No file can be moved: this user may not, or the disk is full or read-only.
NO_WAY = {errno.EACCES, errno.EPERM, errno.EROFS, *DISK_FULL}
WINDOW = 200_000  # payloads that are listed at a time, so that any number fits into memory
PORTION = 1000  # payloads
OUT_OF_REACH_SHOWN = 20
NO_LOCK = "is a folder, and has to be a file: remove it"
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


def _below(folder: Path | str, mode: int) -> Iterator[tuple[Path | str, int]]:
    """Yield all that lies below a folder, and the rights that are needed: `mode` for a file."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield entry.path, FOLDER
                yield from _below(entry.path, mode)
            else:
                yield entry.path, mode


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
            with contextlib.suppress(FileNotFoundError), access_errors():
                return state, self.path(raw_id, state).read_bytes()
        packed = self._packed(raw_id)
        if packed is None:
            raise RawIdUnknown(f"no payload has the raw_id {raw_id}")
        return "processed", packed

    def open_payload(self, raw_id: UUID) -> OpenPayload:
        """See Payloads.open_payload."""
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            with contextlib.suppress(FileNotFoundError), access_errors():
                file = open(self.path(raw_id, state), "rb", 0)
                size = os.fstat(file.fileno()).st_size
                return OpenPayload(
                    size, iter(functools.partial(file.read, PIECE_BYTES), b""), file.close
                )
        packed = self._look_in_packs(raw_id, Pack.open_payload)
        if packed is None:
            raise RawIdUnknown(f"no payload has the raw_id {raw_id}")
        return packed

    def read_pending(self, raw_id: UUID) -> bytes:
        """See Payloads.read_pending."""
        path = f"{self.raw}/{raw_id}.json"
        try:
            return read_file(path)
        except PermissionError as error:
            raise NoAccess(denied(error)) from None
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
        is_expected = False
        with contextlib.suppress(FileNotFoundError):  # nothing has been opened here before
            is_expected = (self.journal / "last_raw_id").stat().st_size > 0
        return Tally(self.journal / "tally", self._found, is_expected=is_expected)

    def _found(self) -> tuple[int, int]:
        """Return how many payloads are processed, and when the last of all arrived."""
        total, arrival = 0, None
        with contextlib.suppress(OSError, StorageUnavailable):  # a damaged pack, say
            total = self.count_processed()
        with contextlib.suppress(OSError):
            arrival = arrival_of(self.greatest_raw_id())
        return total, int(arrival.timestamp() * 1000) if arrival else 0

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
        """Write a payload of the journal again where it is missing, torn, different or unreadable.

        With `force`, also where it looks right: what the system shows may never reach the disk.
        """
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            path = self.path(raw_id, state)
            try:
                path.lstat()
                holds = path.read_bytes() == body
            except (FileNotFoundError, NotADirectoryError):
                continue
            except OSError as error:  # a bad block, or a folder of that name
                self._replace(path, body, error)
                return
            if force or not holds:
                self.publish(path, body)
            return
        if not self._is_packed_or_expired(raw_id):
            self.publish(self.path(raw_id, "pending"), body)

    def _replace(self, path: Path, body: bytes, error: OSError) -> None:
        kept: Path | str = "lost"
        with contextlib.suppress(OSError):
            kept = set_aside(path, self.journal)
        self.publish(path, body)
        wrong = (
            "%s could not be read (%s): it was written again from the journal. What was there is %s"
        )
        log.error(wrong, path, error.strerror, kept)

    def has(self, raw_id: UUID) -> bool:
        """Say whether a payload lies in any folder or pack."""
        return any(os.path.lexists(self.path(raw_id, state)) for state in STATES) or (
            self._is_packed_or_expired(raw_id)
        )

    def greatest_raw_id(self) -> UUID:
        """Return the greatest raw_id that is known, as far as it is that of a known moment.

        Of a pack that cannot be read it is the end of its day.
        """
        names = os.listdir(self.raw) + os.listdir(self.rejected)
        days = sorted(filter(DAY_NAME.fullmatch, os.listdir(self.processed)), reverse=True)
        for day in days:
            of_day = os.listdir(self.processed / day)
            if of_day:
                names += of_day
                break
        raw_ids = list(filter(None, map(raw_id_of, names)))
        packs = self.packs()
        raw_ids += [pack.last() for pack in packs if pack.day == packs[-1].day]
        return max(filter(arrival_of, raw_ids), default=UUID(int=0))

    # Settling

    def settle(self, processed: Iterable[str], rejected: Iterable[Rejection]) -> Settled:
        """See Payloads.settle."""
        settled, moved = Settled([], {}), 0
        for rejection in rejected:
            try:
                with access_errors():
                    counted = self._with_retries(rejection)
                    self._record(counted)  # before the payload, so that none is without its reason
                    self._move(rejection.raw_id, self.rejected)
                settled.rejected.append(counted)
            except NoAccess as error:
                settled.stuck[rejection.raw_id] = str(error)
        if settled.rejected:
            with contextlib.suppress(StorageUnavailable):  # then `take_stock` finds them
                self._index.note(settled.rejected)
        for day, raw_ids in itertools.groupby(processed, day_of):
            moved += self._move_all(raw_ids, self.processed / day, settled.stuck)
        with contextlib.suppress(OSError), contextlib.closing(self.open_tally()) as tally:
            tally.add(processed=moved)
        return settled

    def _move_all(self, raw_ids: Iterable[str], folder: Path, stuck: dict[UUID, str]) -> int:
        moved = 0
        for raw_id in raw_ids:
            try:
                with access_errors():
                    if not moved:
                        folder.mkdir(parents=True, exist_ok=True)
                    moved += self._move(raw_id, folder)
            except NoAccess as error:
                stuck[UUID(str(raw_id))] = str(error)
        return moved

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
        except OSError as error:  # one odd file never stops the rest
            if error.errno in NO_WAY:
                raise
            log.error("%s stays pending, it cannot be moved: %s", source, error)  # noqa: TRY400
        return False

    # Finished days are packed, and deleted after `keep_days`.

    def packs(self, day: str = "") -> list[Pack]:
        """Return the packs of a day, or all; a day has a second one if payloads came late.

        One that was lost is among them, as far as its index is there to tell.
        """
        with os.scandir(self.processed) as entries:
            found = {e.name: e for e in entries if e.name.startswith(day) and PACK in e.name}
        packs = []
        for name, entry in found.items():
            with contextlib.suppress(FileNotFoundError):  # it has just expired
                if PACK_NAME.fullmatch(name):
                    packs.append(Pack(Path(entry.path), entry.stat().st_mtime_ns))
                elif name.endswith(INDEX) and name.removesuffix(INDEX) not in found:
                    lost = Pack(Path(entry.path.removesuffix(INDEX)), 0, is_lost=True)
                    packs += [lost] if self._is_lost(lost) else []
        return sorted(packs, key=lambda pack: pack.path)

    def _is_lost(self, pack: Pack) -> bool:
        """Say whether an index that lies alone is one of a pack that was lost.

        It may also be left of a pack that has expired, or that was never finished; in that case
        the files of its payloads are still there.
        """
        if not PACK_NAME.fullmatch(pack.path.name) or pack.day < self.first_kept_day():
            return False
        try:
            [first, _], *_ = pack.index().members
        except (OSError, StorageUnavailable):  # it was never finished either
            return False
        return not (self.processed / pack.day / f"{first}.json").exists() and not pack.path.exists()

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
        packed = sum(pack.index().payloads for pack in self.packs() if not pack.is_lost)
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
        expired = [pack for pack in packs if pack.day < first]
        if expired:
            day = max(self.first_kept_day(), first)
            self.publish(self._expired, f"{day} {zlib.crc32(day.encode()):08x}".encode())
            sync_file(self._expired)
        for pack in expired:
            pack.remove()
        return [pack.path.name for pack in expired]

    def first_kept_day(self) -> str:
        """See Payloads.first_kept_day.

        It is written down: a day that is old enough for it may have landed before a long power
        cut, and still be processed. Where that is damaged, nothing counts as expired.
        """
        try:
            text = self._expired.read_bytes().decode("ascii", "replace")
        except FileNotFoundError:
            return ""
        except OSError as error:
            text = str(error.strerror)
        day, _, checksum = text.partition(" ")  # of which older versions have none
        is_whole = not checksum or checksum == f"{zlib.crc32(day.encode()):08x}"
        if DAY_NAME.fullmatch(day) and is_whole and day <= f"{datetime.now(UTC):%Y-%m-%d}":
            return day
        tell_once(f"{self._expired} is damaged: what has expired is not known any more, delete it")
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
        try:
            known = self.last_rejection(raw_id)
        except NoAccess as error:
            known, wrong = None, str(error)
        return known or Rejection(raw_id, "reason_missing", wrong, moved)

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
        with contextlib.suppress(OSError, ValueError), access_errors():  # also what is no UTF-8
            return msgspec.json.decode(self._reason(raw_id).read_bytes(), type=Rejection)
        return None

    def retry(self, raw_id: UUID) -> bool:
        """See Payloads.retry."""
        source = self.path(raw_id, "rejected")
        try:
            known, now = self.last_rejection(raw_id), datetime.now(UTC)
            reason = known or self.rejection(raw_id)
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
        return self.rejected / f"{raw_id}{REASON}"

    # What is wrong around

    def processing_trouble(self, oldest: Sequence[str] = ()) -> str | None:
        """See Payloads.processing_trouble."""
        for folder in (self.raw, self.processed, self.rejected, self.journal):
            if not os.path.isdir(folder):
                return f"{folder} is not there, or no folder"
            if not os.access(folder, FOLDER):
                return access_trouble(folder, FOLDER)
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        days = {today, *map(day_of, oldest)}
        lock = self.process_lock
        if os.path.isdir(lock):
            return f"{lock} {NO_LOCK}"
        places = [(lock, FILE) if os.path.exists(lock) else (lock.parent, os.W_OK | os.X_OK)]
        places += [(self.processed / day, FOLDER) for day in days]
        places += [(self.path(UUID(raw_id), "pending"), os.R_OK) for raw_id in oldest]
        return next(filter(None, itertools.starmap(access_trouble, places)), None)

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
        if os.path.isdir(self.process_lock):
            troubles.append(f"{self.process_lock} {NO_LOCK}")
        if os.path.isdir(self.raw) and os.access(self.raw, os.R_OK):
            troubles += [
                f"{self.raw / name} is not named <uuid>.json: move it away"
                for name in self.strays()
            ]
        troubles += self.out_of_reach()
        kept = self.journal.glob(f"*{DAMAGED}*")
        troubles += [f"{path} was damaged, and kept: look at it, then delete it" for path in kept]
        if self.processed.is_dir() and os.access(self.processed, os.R_OK | os.X_OK):
            troubles += filter(None, (pack.trouble() for pack in self.packs()))
        behind = self._clock_trouble()
        return {"data folder": list(dict.fromkeys(troubles)), "clock": [behind] if behind else []}

    def out_of_reach(self) -> list[str]:
        """Name what lies here and this user has no right to; the first of it where it is much."""
        places = itertools.chain(
            [(self.process_lock, FILE)],
            *(_below(folder, os.R_OK) for folder in (self.raw, self.rejected, self.processed)),
            _below(self.journal, FILE),
        )
        found = list(filter(None, itertools.starmap(access_trouble, places)))
        rest = len(found) - OUT_OF_REACH_SHOWN
        return found[:OUT_OF_REACH_SHOWN] + ([f"and {rest} more of that kind"] if rest > 0 else [])

    def _clock_trouble(self) -> str | None:
        """Compare the clock with the last raw_id given out, and with the age of this program."""
        past = [datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)]
        with contextlib.suppress(OSError, ValueError):  # nothing has landed
            last = UUID(bytes=(self.journal / "last_raw_id").read_bytes()[:16])
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
