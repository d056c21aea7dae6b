"""Payloads: the words for them, the errors, and the protocol by which the service reaches them.

A payload is the exact bytes that a device sent. Its name is its `raw_id`, and its state is the
folder that its file lies in. The rooms of this house, the upper ones knowing the lower ones only:

- `landing.py`: takes payloads in, many at a time, and acknowledges them when they are on disk;
- `journal.py`: the log that makes them durable, and why none that was acknowledged can be lost;
- `keys.py`: the Idempotency-Keys of a day;
- `folders.py`: where payloads lie, moves between states, the quarantine;
- `rejections.py`: an index of the quarantine;
- `packs.py`: finished days of processed payloads, each in one file;
- `unpacking.py`: large payloads of these, piece by piece;
- `tally.py`: how many landed and were processed, for all processes together;
- `backup.py`: a copy of all of it, made while payloads land;
- `disk.py`: the few system calls that all of it rests on, on Linux and macOS.
"""

from __future__ import annotations

import functools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Protocol
from uuid import UUID

from msgspec import Struct
from uuid_utils.compat import uuid7

from backends import require_utc

State = Literal["pending", "processed", "rejected"]
STATES: tuple[State, ...] = ("pending", "processed", "rejected")

PAYLOAD_NAME = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.json")
RAND_B = (1 << 62) - 1  # the random tail of a UUIDv7
PIECE_BYTES = 64 * 1024  # bytes of a payload that are read at a time


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


class PayloadStoreError(Exception):
    """Root of what a payload store raises: a sentence that says what to do, and a stable `code`."""

    code = "payload_store_error"


class RawIdUnknown(PayloadStoreError, LookupError):
    """No payload has this raw_id, or none in the state that was asked for."""

    code = "raw_id_unknown"


class KeyReused(PayloadStoreError):
    """An Idempotency-Key came with another body before."""

    code = "idempotency_key_reused"


class PayloadUnreadable(PayloadStoreError):
    """The file of one payload cannot be read, whatever is tried; the others can."""

    code = "payload_unreadable"


class StorageUnavailable(PayloadStoreError):
    """The disk, or what lies on it, is in the way: repeat the call later."""

    code = "storage_unavailable"


class PackDamaged(StorageUnavailable):
    """A pack, or its index, is not what was written: its payloads cannot be read."""


class NoAccess(StorageUnavailable):
    """This user has no right to a file or a folder: another user has worked there, say."""


class StorageFull(StorageUnavailable):
    """There is too little room on the disk."""

    code = "storage_full"


class FolderTaken(PayloadStoreError):
    """A backup cannot be put where it was to be put."""

    code = "folder_taken"


# ── raw_id ────────────────────────────────────────────────────────────────────────────────────────


def raw_id_of(name: str) -> UUID | None:
    """Return the raw_id that a file name stands for, or None for the name of another file."""
    match = PAYLOAD_NAME.fullmatch(name)
    return UUID(match[1]) if match else None


def arrival_of(raw_id: UUID) -> datetime | None:
    """Return when a payload arrived (UTC, milliseconds), None if its raw_id is no UUIDv7."""
    if raw_id.version != 7:
        return None
    try:
        return datetime.fromtimestamp((raw_id.int >> 80) / 1000, UTC)
    except ValueError:  # beyond the year 9999
        return None


def uuid_at(moment: datetime) -> UUID:
    """Return the least UUIDv7 of a moment."""
    return UUID(int=int(moment.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62)


def day_of(raw_id: UUID | str) -> str:
    """Return the UTC day of a payload's arrival, "unknown" if its raw_id does not tell."""
    text = str(raw_id)
    if text[14] != "7":
        return "unknown"
    milliseconds = int(text[:8] + text[9:13], 16)
    return _name_of_day(milliseconds // 86_400_000)


@functools.lru_cache
def _name_of_day(days_since_1970: int) -> str:
    try:
        return f"{datetime.fromtimestamp(days_since_1970 * 86_400, UTC):%Y-%m-%d}"
    except ValueError:  # beyond the year 9999
        return "unknown"


def next_raw_id(last: UUID) -> UUID:
    """Return a new UUIDv7 (RFC 9562) that is greater than `last`, whatever the clock says."""
    fresh = uuid7()
    if fresh > last:
        return fresh
    step = 1 + (fresh.int & (1 << 48) - 1)
    if (last.int & RAND_B) + step <= RAND_B:
        return UUID(int=last.int + step)
    return UUID(int=((last.int >> 80) + 1) << 80 | 7 << 76 | 2 << 62)


# ── What is kept beside a payload ─────────────────────────────────────────────────────────────────


class Rejection(Struct, frozen=True):
    """Why a payload was rejected: the content of `rejected/<raw_id>.reason.json`.

    It stays there when the payload is put back to pending, which `retries` counts. Times are at
    UTC; raises ValueError for any other.
    """

    raw_id: UUID
    code: str
    detail: str
    rejected_at: datetime
    retries: int = 0
    retried_at: datetime | None = None

    def __post_init__(self) -> None:
        require_utc(self.rejected_at)
        require_utc(self.retried_at or self.rejected_at)


@dataclass
class OpenPayload:
    """The bytes of a payload, to be read piece by piece; each piece may block on the disk."""

    size: int
    pieces: Iterator[bytes]
    close: Callable[[], object] = tuple  # to be called in the end, however far one has read


class Settled(Struct, frozen=True):
    """What `settle` did.

    `rejected` has the rejections, their retries counted; `stuck` says why the others of the
    payloads stay pending, as this user may not move them.
    """

    rejected: list[Rejection]
    stuck: dict[UUID, str]


class Activity(Struct, frozen=True):
    """What all processes of a store have done together, to be seen at a glance.

    `processed` is how many payloads have ever become processed, `last_landed` when the last one
    arrived (milliseconds since 1970, 0 for never), `landed` how many arrived in each of the last 60
    minutes, this one last. After a power cut these may lag; what is exact is in the folders.
    """

    processed: int
    last_landed: int
    landed: list[int]


Kind = Literal["packs", "processed", "rejected", "pending", "besides"]


class Copied(Struct, frozen=True):
    """A file that a backup has copied: a pack, a payload by its state, or what lies besides.

    It may be a hard link. `trouble` says why it could not be read, and so is not in the backup.
    """

    kind: Kind
    is_link: bool = False
    trouble: str = ""


# ── The protocol ──────────────────────────────────────────────────────────────────────────────────


class Observer(Protocol):
    """Whoever wants to know what a store does, to count it."""

    def landed(self, payloads: int, size: int, seconds: float, sync_seconds: float) -> None:
        """Hear that a group of payloads, `size` bytes in all, became durable; called in the loop.

        `seconds` is the time from its beginning to its acknowledgement, `sync_seconds` the part of
        it in which the journal was appended to and synced.
        """


class Portion(Protocol):
    """Some of the processed payloads, to be read one after another; it can be pickled."""

    def raw_ids(self) -> Sequence[UUID]:
        """Return the raw_ids of these payloads, in order of arrival."""

    def reader(self) -> Callable[[UUID], bytes]:
        """Return a function that reads one of them.

        It raises `RawIdUnknown` for one that left, `PayloadUnreadable`, and `NoAccess`.
        """


class Payloads(Protocol):
    """Payloads in their states. It can be pickled, so that other processes can work on it, too.

    Every method blocks on the disk and belongs in a thread or a process of its own. Methods raise
    `StorageUnavailable` where the disk refuses.
    """

    @property
    def workspace(self) -> Path:
        """A folder that all processes of this store share, for files beside the payloads."""

    @property
    def process_lock(self) -> Path:
        """The file that a processor locks, so that one at a time is at work."""

    def read(self, raw_id: UUID) -> tuple[State, bytes]:
        """Return the state of a payload and its bytes; raises `RawIdUnknown`, and `NoAccess`."""

    def open_payload(self, raw_id: UUID) -> OpenPayload:
        """Return the same bytes to be read piece by piece; raises the same."""

    def read_pending(self, raw_id: UUID) -> bytes:
        """Return a pending payload.

        Raises `RawIdUnknown` where it is no longer pending; `PayloadUnreadable`; `NoAccess` where
        it may well be whole, and another user can read it.
        """

    def pending(self, limit: int = sys.maxsize, after: str = "") -> tuple[list[str], int]:
        """Return the `limit` earliest pending raw_ids behind `after`, in order of arrival.

        The number is how many there are in all behind `after`. raw_ids are text here, which is
        quicker to hand about.
        """

    def count_pending(self) -> int:
        """Return how many payloads are pending."""

    def changed(self, state: Literal["pending", "rejected"]) -> int:
        """Return a number that is another one when payloads have entered or left a state."""

    def settle(self, processed: Iterable[str], rejected: Iterable[Rejection]) -> Settled:
        """Move payloads out of pending, as far as this user may, and return what was done.

        Doing it again, or a part of it again, changes nothing.
        """

    def processing_trouble(self, oldest: Sequence[str] = ()) -> str | None:
        """Return what keeps payloads from being processed, as far as a glance tells, or None.

        It takes a dozen system calls. `oldest` are the oldest pending raw_ids, as far as they are
        known: what cannot be read or moved stays behind, and so becomes the oldest.
        """

    def rejection(self, raw_id: UUID) -> Rejection:
        """Return why a payload is rejected; raises `RawIdUnknown` if it is not."""

    def rejections(self, one: UUID | None = None) -> Iterator[Rejection]:
        """Yield why each rejected payload (or just one) is, in order of arrival."""

    def find_rejections(
        self,
        *,
        code: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: UUID | None = None,
        limit: int = sys.maxsize,
    ) -> tuple[list[Rejection], Counter[str]]:
        """Return the `limit` earliest arrivals behind `after` that are rejected with a code.

        Only those that were rejected in `since <= rejected_at < until`; the numbers are how many
        that are in all, by code. It reads the reasons of those that it returns alone. What others
        than this program have done in the folder is seen when stock was taken.
        """

    def take_stock(self) -> Counter[str]:
        """Go through the rejected payloads for what nobody has noted; count them by code."""

    def last_rejection(self, raw_id: UUID) -> Rejection | None:
        """Return the last rejection of a payload, whatever has become of it since.

        None where there is none, or where it cannot be understood; raises `NoAccess`.
        """

    def retry(self, raw_id: UUID) -> bool:
        """Put a rejected payload back to pending; return False if it is not rejected.

        It keeps its raw_id, so that it still loses against later arrivals.
        """

    def portions(self) -> Iterator[tuple[str, Iterator[Portion]]]:
        """Yield the packs and folders of all that is processed: a name, and portions to read.

        The name of one to which payloads were added is another name.
        """

    def count_processed(self) -> int:
        """Return how many payloads are processed, packed ones included."""

    def first_kept_day(self) -> str:
        """Return the day before which processed payloads were deleted, as `keep_days` asks for.

        It is empty where none ever were.
        """

    def finished_days(self) -> list[str]:
        """Return the days before today (UTC) that are not packed yet, or not wholly."""

    def compact(self, day: str) -> int:
        """Pack a day's payloads, then delete their files; return how many there were."""

    def expire(self) -> list[str]:
        """Delete the packs whose day is more than `keep_days` days ago; return their names."""


class PayloadStore(Payloads, Protocol):
    """A place where payloads land, durably. What is true of `Payloads` is true of its methods."""

    async def open(self) -> None:
        """Make what is missing, and recover what a crash has left.

        Raises `StorageUnavailable`.
        """

    async def close(self) -> None:
        """Wait until everything that was handed to `land` is on disk, then let go of it.

        It does not wait for ever where the disk hangs: the next `open` recovers what is left.
        """

    async def land(
        self, bodies: Sequence[bytes], key: str | None = None, caller: str = ""
    ) -> list[UUID]:
        """Store payloads durably, unchanged, all or none; return their new raw_ids, in order.

        If the `caller` has used the Idempotency-Key `key` in the last 24 hours, return the raw_ids
        of that time and store nothing, or raise `KeyReused` if the bodies differ.

        Raises `StorageUnavailable` where the disk refuses: then none of them is acknowledged. Where
        it hangs, that is so after some seconds, and they may land all the same.
        """

    def portable(self) -> Payloads:
        """Return the payloads of this store as a value that can travel to other processes."""

    def activity(self) -> Activity:
        """Return what has landed and was processed lately."""

    def room(self) -> tuple[int, int]:
        """Return how many bytes are free, and how many have to stay so."""

    async def landing_trouble(self) -> str | None:
        """Return what stands in the way of landing, or None; within seconds, if the disk hangs."""

    def strays(self) -> list[str]:
        """Return the names among the pending payloads that are not those of payloads."""

    def problems(self) -> Mapping[str, Sequence[str]]:
        """Return what is wrong around, by subject, without making or changing anything.

        Subjects are `data folder` and `clock`; each has a sentence for each thing that is wrong.
        """

    def new_backup(self, folder: Path) -> AbstractContextManager[Path]:
        """Make a folder for a backup under another name; at the end sync it, and give it its own.

        Where the block raises, nothing is left of it. Raises `FolderTaken`.
        """

    def back_up(self, folder: Path, *, processed_alone: bool = False) -> Iterator[Copied]:
        """Copy all payloads, and what the store keeps about them, to a folder, file by file.

        A store that is opened there has every payload that was acknowledged before, in its state,
        and gives out raw_ids behind them. Landing and retries may go on meanwhile; the caller keeps
        out processors and whatever works on all of the processed payloads. With `processed_alone`,
        which is a beginning, processors may go on, too. What is in the folder already stays.
        Raises OSError, too.
        """
