"""Payloads: the words for them, the errors, and the protocol by which the service reaches them.

A payload is the exact bytes that a device sent. Its name is its `raw_id`, and its state is the
folder that its file lies in. Payloads that came in one body are a batch, and lie in one file. The
rooms of this house, the upper ones knowing the lower ones only:

- `landing.py`: takes payloads in, many at a time, and acknowledges them when they are on disk;
- `journal.py`: the log that makes them durable, and why none that was acknowledged can be lost;
- `keys.py`: the Idempotency-Keys of a day;
- `folders.py`: where payloads lie, moves between states, the quarantine;
- `batches.py`: the payloads that are in the bytes of a batch;
- `notes.py`: which payloads of a batch, or of a pack, have left it;
- `rejections.py`: an index of the quarantine;
- `discarded.py`: payloads that a person has discarded, and the way back;
- `packs.py`: finished days of processed payloads, each in one file;
- `archive.py`: packs in an object store;
- `archiving.py`: their way there, and back to a new disk;
- `unpacking.py`: large payloads of these, piece by piece;
- `raw_ids.py`: what the bits of a raw_id say, and how new ones are made;
- `nodes.py`: whose payloads are that are not here, where several Dropzones share a database;
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
from typing import Literal, NamedTuple, Protocol
from uuid import UUID

from msgspec import Struct

from backends import require_utc
from backends.raw.raw_ids import COUNT_AT as COUNT_AT
from backends.raw.raw_ids import MARK_AT as MARK_AT
from backends.raw.raw_ids import MARK_BITS as MARK_BITS
from backends.raw.raw_ids import MOST_IN_BATCH as MOST_IN_BATCH
from backends.raw.raw_ids import NEXT as NEXT
from backends.raw.raw_ids import NODE_BITS as NODE_BITS
from backends.raw.raw_ids import SAME_MOMENT as SAME_MOMENT
from backends.raw.raw_ids import Place as Place
from backends.raw.raw_ids import RawIds as RawIds
from backends.raw.raw_ids import begins_batch as begins_batch
from backends.raw.raw_ids import came_alone as came_alone
from backends.raw.raw_ids import mark_of as mark_of
from backends.raw.raw_ids import next_raw_id as next_raw_id
from backends.raw.raw_ids import node_in as node_in
from backends.raw.raw_ids import place_of as place_of
from backends.raw.raw_ids import texts_of as texts_of

State = Literal["pending", "processed", "rejected", "discarded"]
STATES: tuple[State, ...] = ("pending", "processed", "rejected", "discarded")

Form = Literal["", "ndjson", "json"]  # of a file: of one payload, or of a batch; see `batches.py`

PAYLOAD_NAME = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.json")
BATCH_NAME = re.compile(
    r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.([1-9]\d{0,5})\.(ndjson|json)", re.ASCII
)
DISCARDING = "discarding.json"  # in the workspace: what whoever discards notes before
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


class RawIdElsewhere(RawIdUnknown):
    """The payload of this raw_id is not here; its raw_id names another `node`."""

    code = "raw_id_elsewhere"

    def __init__(self, detail: str, node: int) -> None:
        super().__init__(detail, node)
        self.node = node

    def __str__(self) -> str:
        return str(self.args[0])


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


class ArchiveAway(StorageUnavailable):
    """The archive does not answer, or not as it should: what is there can be had later."""


class StorageFull(StorageUnavailable):
    """There is too little room on the disk."""

    code = "storage_full"


class FolderTaken(PayloadStoreError):
    """A backup cannot be put where it was to be put."""

    code = "folder_taken"


# ── Names of files ────────────────────────────────────────────────────────────────────────────────


def raw_id_of(name: str) -> UUID | None:
    """Return the raw_id that the name of a payload's file stands for, None for another file."""
    match = PAYLOAD_NAME.fullmatch(name)
    return UUID(match[1]) if match else None


def payloads_in_name(name: str) -> int:
    """Return how many payloads are in the file of this name, 0 for that of another file."""
    if len(name) == 41:
        return 1 if PAYLOAD_NAME.fullmatch(name) else 0
    match = BATCH_NAME.fullmatch(name)
    if match is None:
        return 0
    count = int(match[2])
    place = place_of(UUID(match[1]))
    return count if place and place.payloads == count and place.at == 0 else 0


def first_of(name: str) -> UUID:
    """Return the raw_id of a file's first payload."""
    return UUID(name[:36])


def form_of(name: str) -> Form:
    """Return the form of the file of this name."""
    if len(name) == 41:
        return ""
    return "ndjson" if name.endswith(".ndjson") else "json"


def name_of(first: UUID | str, count: int, form: Form) -> str:
    """Return the name of the file of a batch, or of a payload where `form` is empty."""
    return f"{first}.{count}.{form}" if form else f"{first}.json"


# ── Moments ───────────────────────────────────────────────────────────────────────────────────────


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


class Discard(Struct, frozen=True):
    """That a payload was discarded, and when: `discarded/<day>/<raw_id>.reason.json`.

    `rejection` is its last one, if it ever was rejected. `discarded_at` is at UTC; raises
    ValueError for any other.
    """

    raw_id: UUID
    discarded_at: datetime
    rejection: Rejection | None = None

    def __post_init__(self) -> None:
        require_utc(self.discarded_at)


@dataclass
class OpenPayload:
    """The bytes of a payload, to be read piece by piece; each piece may block on the disk."""

    size: int
    pieces: Iterator[bytes]
    close: Callable[[], object] = tuple  # to be called in the end, however far one has read


class Settled(Struct, frozen=True):
    """What `settle` did.

    So many payloads are processed now, and `rejected` has the rejections, their retries counted.
    `stuck` says, by their names, why other files stay pending: this user may not move them.
    """

    processed: int
    rejected: list[Rejection]
    stuck: dict[str, str]


class Activity(Struct, frozen=True):
    """What all processes of a store have done together, to be seen at a glance.

    `processed` is how many payloads have ever become processed, `last_landed` when the last one
    arrived (milliseconds since 1970, 0 for never), `landed` how many arrived in each of the last 60
    minutes, this one last. After a power cut these may lag; what is exact is in the folders.
    """

    processed: int
    last_landed: int
    landed: list[int]


class Archiving(Struct, frozen=True):
    """What became of a pack: its objects in the archive, and how many of these are new.

    `damage` names objects that were not, or no longer, what was put there, and were put there again
    under other names. `is_local` says whether the pack still lies on this disk, too.
    """

    objects: list[str]
    made: int
    damage: list[str]
    is_local: bool


Kind = Literal["packs", "archived", "processed", "rejected", "discarded", "pending", "besides"]


class Copied(Struct, frozen=True):
    """A file that a backup has copied: a pack, a payload by its state, or what lies besides.

    `archived` is a pack that is in the archive alone, of which the backup has the index.

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

    def asked_archive(self, operation: str, seconds: float, is_wrong: bool) -> None:  # noqa: FBT001
        """Hear of a request to the archive, `list`, `get`, `put` or `delete`; from any thread."""


class Portion(Protocol):
    """Some of the processed payloads, to be read one after another; it can be pickled."""

    def payloads(self) -> Iterator[tuple[UUID, bytes | PayloadStoreError]]:
        """Yield these payloads in order of arrival, or why one cannot be read.

        One that has left is passed over. Raises `PackDamaged` and OSError.
        """


class Nodes(Protocol):
    """Tells whose a payload is that is not here, as far as its raw_id can; see `nodes.py`."""

    @property
    def number(self) -> int:
        """The number of this node, from 0 to 65,535."""

    def elsewhere(self, raw_id: UUID) -> int | None:
        """Return the number of the other node whose payload this is, None if it names none."""

    def is_others(self, raw_id: UUID) -> bool:
        """Say whether it is another node's, also where nobody knows the number of that."""

    def is_doubtful(self, raw_id: UUID) -> bool:
        """Say whether it names this node, and another folder than this one has given it out."""


class Source(NamedTuple):
    """A pack or a folder of processed payloads: its name, and portions to read.

    Where it `is_far`, it is in the archive alone: its portions need nothing of this disk.
    """

    name: str
    portions: Iterator[Portion]
    is_far: bool = False


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

    def nodes(self) -> Nodes:
        """Return what is known now of the nodes that share a database with this one."""

    def read(self, raw_id: UUID) -> tuple[State, bytes]:
        """Return the state of a payload and its bytes; raises `RawIdUnknown`, and `NoAccess`.

        That is `RawIdElsewhere` where the payload lies on another node.
        """

    def open_payload(self, raw_id: UUID) -> OpenPayload:
        """Return the same bytes to be read piece by piece; raises the same."""

    def read_pending(
        self, name: str, begin: int = 0, end: int = sys.maxsize
    ) -> list[tuple[UUID, bytes]]:
        """Return the payloads of a pending file; of a batch those in `begin <= place < end`.

        What has left the batch is not among them. Raises `RawIdUnknown` where the file is no longer
        pending; `PayloadUnreadable`; `NoAccess` where it may well be whole, and another user can
        read it.
        """

    def pending(self, limit: int = sys.maxsize, after: str = "") -> tuple[list[str], int]:
        """Return the names of the `limit` earliest pending files behind `after`, by arrival.

        A file is a payload or a batch; its name tells what is in it (`payloads_in_name`,
        `first_of`). The number is how many payloads there are in all behind `after`.
        """

    def done(self) -> dict[str, int]:
        """Return how many payloads of a pending batch are done, for each of which some are."""

    def count_pending(self, *, places: bool = False) -> int:
        """Return how many payloads are pending.

        With `places`, those that have left their batch are among them: their places in it are still
        to be gone through.
        """

    def changed(self, state: Literal["pending", "rejected", "discarded"]) -> int:
        """Return a number that is another one when payloads have entered or left a state."""

    def settle(
        self,
        processed: Iterable[str],
        rejected: Iterable[Rejection],
        done: Mapping[str, int] = {},
        *,
        again: bool = False,
    ) -> Settled:
        """Move files out of pending, as far as this user may, and return what was done.

        `processed` are names; a batch among them moves as one, behind those of its payloads that
        are `rejected`, each of which gets a file of its own. Of the batches in `done` so many
        payloads are processed or rejected, and the rest stays pending. Doing it again, or a part of
        it again, changes nothing; with `again` what was moved then counts as if it were moved now.
        """

    def processing_trouble(self, oldest: Sequence[str] = ()) -> str | None:
        """Return what keeps payloads from being processed, as far as a glance tells, or None.

        It takes a dozen system calls. `oldest` are the names of the oldest pending files, as far as
        they are known: what cannot be read or moved stays behind, and so becomes the oldest.
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

    def discard(self, raw_ids: Iterable[UUID], now: datetime) -> list[UUID]:
        """Move payloads to the discarded ones, with their reasons; return those that this moved.

        They may be in any state, alone, in a batch or in a pack. A batch that was rejected as one,
        as it is damaged, goes as one. They are durable on return. Doing it again, or doing the rest
        of what a crash has cut short, changes nothing else. Meanwhile the caller keeps out
        processors and whatever works on all of the processed payloads. Raises `PayloadUnreadable`
        where a payload can be read neither from its batch nor from its pack.
        """

    def undiscard(self, raw_id: UUID) -> bool:
        """Put a discarded payload back to pending; return False if it is not discarded.

        The caller keeps out the same as for `discard`.
        """

    def discarded_at(self, raw_id: UUID) -> Discard:
        """Return when a payload was discarded; raises `RawIdUnknown` if it is not."""

    def count_discarded(self) -> int:
        """Return how many payloads are discarded; it opens no file."""

    def portions(self) -> Iterator[Source]:
        """Yield the packs and folders of all that is processed.

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
        """Delete the packs whose day is more than `keep_days` days ago; return their names.

        They are deleted from the archive, too, and first. Discarded payloads of these days go with
        them, and the names of their folders are returned, too. Raises `ArchiveAway`.
        """

    @property
    def has_archive(self) -> bool:
        """Whether packs are put into an archive."""

    def is_archived(self, raw_id: UUID) -> bool:
        """Say whether a payload may have to be fetched from the archive, which takes its time."""

    def to_archive(self) -> list[str]:
        """Return the packs that the archive lacks, or whose copy on this disk is to go."""

    def archive_pack(self, name: str) -> Archiving:
        """Put a pack into the archive, read it back, and delete it here where that is asked for.

        What is there already is recognised. Raises `ArchiveAway`, and `PackDamaged` where the pack
        is not what was written: nothing is deleted then.
        """

    def adopt(self) -> Iterator[str]:
        """Take over the packs of this node that are in the archive alone; yield their names.

        It is for the new disk of a node whose old one was lost. Raises `ArchiveAway`.
        """


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
        self,
        body: bytes,
        key: str | None = None,
        caller: str = "",
        form: Form = "",
        payloads: int = 1,
    ) -> Sequence[UUID]:
        """Store a body durably, unchanged; return the new raw_ids of its payloads, in order.

        It is a payload, or a batch of a `form` and of so many payloads, which land all or none.

        If the `caller` has used the Idempotency-Key `key` in the last 24 hours, return the raw_ids
        of that time and store nothing, or raise `KeyReused` if the bodies differ.

        Raises `StorageUnavailable` where the disk refuses: then nothing is acknowledged. Where it
        hangs, that is so after some seconds, and it may land all the same.
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

        Subjects are `data folder`, `clock` and, where there is one, `archive`; each has a sentence
        for each thing that is wrong.
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
