"""Where payloads lie: the folder of a file is the payload's state; `places.py` has the folders.

Moves are renames on one file system, so that a file is in exactly one folder at any moment. A batch
is one file, and moves as one. A payload of it that was rejected has a file of its own from then on,
and the state of that file; `notes.py` has that it has left its batch. So a payload is looked for by
its own name first, then in the file of its batch, to which its raw_id leads, then in the packs.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Literal, TypeVar
from uuid import UUID

import msgspec

from backends.raw import (
    PIECE_BYTES,
    STATES,
    Form,
    NoAccess,
    OpenPayload,
    PayloadUnreadable,
    Place,
    RawIdElsewhere,
    RawIds,
    RawIdUnknown,
    Rejection,
    Settled,
    State,
    StorageUnavailable,
    arrival_of,
    day_of,
    first_of,
    form_of,
    payloads_in_name,
    place_of,
)
from backends.raw.archive import Archive
from backends.raw.batches import REFUSED, stretch_of
from backends.raw.days import DAY_NAME, FORMS, earliest_names
from backends.raw.discarded import Discarded
from backends.raw.disk import (
    DISK_FULL,
    UNREADABLE,
    access_errors,
    denied,
    read_file,
    set_aside,
    storage_error,
    sync_files_around,
)
from backends.raw.nodes import KnownNodes, Numbers, read_numbers
from backends.raw.packs import Pack
from backends.raw.rejections import RejectionIndex
from backends.raw.tally import Tally

log = logging.getLogger("dropzone")
T = TypeVar("T")

# One file is broken, and no other user could read it either.
BROKEN_FILE = UNREADABLE | {errno.EISDIR, errno.ELOOP, errno.ENOENT}
# No file can be moved: this user may not, or the disk is full or read-only.
NO_WAY = {errno.EACCES, errno.EPERM, errno.EROFS, *DISK_FULL}
LARGE_BATCH = 1024 * 1024  # bytes; of larger ones few are looked into at a time
LARGE_AT_ONCE = threading.BoundedSemaphore(2)


# ── The folders ───────────────────────────────────────────────────────────────────────────────────


class Folders(Discarded):
    """The folders of a data folder: implements `backends.raw.Payloads`.

    It holds nothing but paths and plain values, so that it can travel to other processes. Packs and
    discarded payloads are deleted `keep_days` days after their day, never where that is 0; packs in
    an `archive` also there, and `keep_local_days` days after their day on this disk alone. `node`
    is the number of the node, None where it has none.
    """

    def __init__(
        self,
        folder: Path,
        *,
        processed: Path | None = None,
        rejected: Path | None = None,
        keep_days: int = 0,
        archive: Archive | None = None,
        keep_local_days: int = 0,
        node: int | None = None,
    ) -> None:
        super().__init__(folder, processed, rejected, keep_days, archive, keep_local_days)
        self.node = node
        self._index = RejectionIndex(self.journal / "rejected.sqlite")

    def nodes(self) -> KnownNodes:
        """See Payloads.nodes."""
        return KnownNodes(read_numbers(self.journal) or Numbers(), self.node)

    # Looking for one payload

    def read(self, raw_id: UUID) -> tuple[State, bytes]:
        """See Payloads.read."""
        state, found = self._find(raw_id)
        with contextlib.closing(found):
            return state, b"".join(found.pieces)

    def open_payload(self, raw_id: UUID) -> OpenPayload:
        """See Payloads.open_payload."""
        return self._find(raw_id)[1]

    def _find(self, raw_id: UUID) -> tuple[State, OpenPayload]:
        found, place = self._find_alone(raw_id), place_of(raw_id)
        if found is None and place:
            found = self._find_in_batch(place) or self._find_alone(raw_id)  # it has just left it
        if found:
            return found
        packed = self.look_in_packs(raw_id, Pack.open_payload)
        if packed is None:
            node = self.nodes().elsewhere(raw_id)
            if node is None:
                raise RawIdUnknown(f"no payload has the raw_id {raw_id}")
            raise RawIdElsewhere(f"{raw_id} is a payload of node {node}: ask there", node)
        return "processed", packed

    def _find_alone(self, raw_id: UUID) -> tuple[State, OpenPayload] | None:
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            with contextlib.suppress(FileNotFoundError), access_errors():
                return state, _opened(self.path(raw_id, state))
        return None

    def _find_in_batch(self, place: Place) -> tuple[State, OpenPayload] | None:
        for state, form in itertools.product((*STATES, STATES[0]), FORMS):
            with contextlib.suppress(FileNotFoundError), access_errors():
                return self._open_in_batch(place, form, state)
        return None

    def _open_in_batch(self, place: Place, form: Form, state: State) -> tuple[State, OpenPayload]:
        """Open a payload in the file of its batch; raises FileNotFoundError if it is not there."""
        name = place.name(form)
        path = self.folder(state, place.first) / name
        path.lstat()
        if place.at in self.left(name):
            raise FileNotFoundError(path)
        found = _opened(path, form, place.at)
        if state == "pending" and place.at < self.done().get(name, 0):
            state = "processed"
        return state, found

    # What is pending

    def read_pending(
        self, name: str, begin: int = 0, end: int = sys.maxsize
    ) -> list[tuple[UUID, bytes]]:
        """See Payloads.read_pending."""
        path = f"{self.raw}/{name}"
        try:
            body = read_file(path)
        except PermissionError as error:
            raise NoAccess(denied(error)) from None
        except OSError as error:
            if not os.path.lexists(path):
                raise RawIdUnknown(f"{name} is no longer pending") from None
            if error.errno not in BROKEN_FILE:
                raise storage_error(error) from error
            raise PayloadUnreadable(f"the file cannot be read: {error.strerror}") from error
        return list(filter(None, self.payloads_in(name, body)[begin:end]))

    def pending(self, limit: int = sys.maxsize, after: str = "") -> tuple[list[str], int]:
        """See Payloads.pending."""
        names, count = earliest_names(self.raw, limit, after)
        return names, count - self._count_gone(after)

    def count_pending(self, *, places: bool = False) -> int:
        """See Payloads.count_pending."""
        with os.scandir(self.raw) as entries:
            count = sum(payloads_in_name(entry.name) for entry in entries)
        return count - self.count_done() if places else count - self._count_gone()

    def _count_gone(self, after: str = "") -> int:
        """Return how many payloads in pending files are not pending."""
        return self.count_done(after) + self.count_left(after)

    def changed(self, state: Literal["pending", "rejected", "discarded"]) -> int:
        """See Payloads.changed: it is when the folder was last changed, in nanoseconds."""
        folders = {"pending": self.raw, "rejected": self.rejected, "discarded": self.discarded}
        return folders[state].stat().st_mtime_ns

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

    def restore(self, raw_id: UUID, body: bytes, form: Form, *, force: bool = False) -> None:
        """Write a file of the journal again where it is missing, torn, different or unreadable.

        With `force`, also where it looks right: what the system shows may never reach the disk.
        """
        place = place_of(raw_id) if form else None
        name = place.name(form) if place else f"{raw_id}.json"
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            path = self.folder(state, raw_id) / name
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
        raw_ids = RawIds(raw_id, place.payloads if place else 1)
        if not all(map(self.is_elsewhere if form else self.is_packed_or_expired, raw_ids)):
            self.publish(self.raw / name, body)

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
        """Say whether a payload lies in any folder or pack; for a batch, whether the first does."""
        place = place_of(raw_id)
        names = [place.name(form) for form in FORMS] if place else []
        folders = [self.folder(state, raw_id) for state in STATES]
        return self.is_elsewhere(raw_id) or any(
            os.path.lexists(folder / name) for folder in folders for name in names
        )

    def greatest_raw_id(self) -> UUID:
        """Return the greatest raw_id that is known, as far as it is that of a known moment.

        Of a batch it is the first one, and of a pack that cannot be read the end of its day.
        """
        names = os.listdir(self.raw) + os.listdir(self.rejected)
        days = sorted(filter(DAY_NAME.fullmatch, os.listdir(self.processed)), reverse=True)
        for day in days:
            of_day = os.listdir(self.processed / day)
            if of_day:
                names += of_day
                break
        names += self.last_discarded_names()
        names.sort(reverse=True)  # names sort as their raw_ids do, and there may be many
        known = (first_of(name) for name in names if payloads_in_name(name))
        packs = self.packs()
        raw_ids = [next(filter(arrival_of, known), UUID(int=0))]
        raw_ids += [pack.last() for pack in packs if pack.day == packs[-1].day]
        return max(filter(arrival_of, raw_ids), default=UUID(int=0))

    # Settling

    def settle(
        self,
        processed: Iterable[str],
        rejected: Iterable[Rejection],
        done: Mapping[str, int] = {},
        *,
        again: bool = False,
    ) -> Settled:
        """See Payloads.settle."""
        processed, stuck = list(processed), dict[str, str]()
        batches = {
            first_of(name): name
            for name in (*processed, *done)
            if form_of(name) and os.path.lexists(self.raw / name)
        }
        apart = self._reject(rejected, batches, stuck)
        if apart:
            with contextlib.suppress(StorageUnavailable):  # then `take_stock` finds them
                self._index.note(apart)
        moved = self._move_all((name for name in processed if name not in stuck), stuck)
        if again:
            moved += filter(self.is_processed, {*processed} - {*moved})
        before, count = self.notes.done(), 0
        for name in moved:
            count += self.count_between(name, before.get(name, 0))
        for name in filter(self.is_processed, before):
            self.notes.forget_done(name)
        for name, number in done.items():
            if name not in stuck and os.path.lexists(self.raw / name):  # or else it was damaged
                count += self.count_between(name, before.get(name, 0), number)
                self.notes.note_done(name, number)
        with contextlib.suppress(OSError), contextlib.closing(self.open_tally()) as tally:
            tally.add(processed=count)
        return Settled(count, apart, stuck)

    def _reject(
        self, rejected: Iterable[Rejection], batches: Mapping[UUID, str], stuck: dict[str, str]
    ) -> list[Rejection]:
        """Move payloads to the rejected ones; return why, their retries counted.

        `batches` are the names of those that are settled and pending, by their first raw_ids.
        """
        apart, renames = list[Rejection](), list[tuple[Path, Path]]()
        by_file = dict[str, list[Rejection]]()
        for rejection in rejected:
            place = place_of(rejection.raw_id)
            name = batches.get(place.first, "") if place else ""
            by_file.setdefault(name or f"{rejection.raw_id}.json", []).append(rejection)
        for name, of_file in by_file.items():
            with _noting(stuck, name):
                counted = [self._with_retries(rejection) for rejection in of_file]
                for rejection in counted:
                    self.record(rejection)  # before the payload: none is without its reason
                renames += self._set_apart(name, [rejection.raw_id for rejection in counted])
                apart += counted
        if renames:
            sync_files_around(self.rejected)  # or a power cut could take what has left its batch
        for part, path in renames:
            os.rename(part, path)
        return apart

    def _set_apart(self, name: str, raw_ids: Sequence[UUID]) -> list[tuple[Path, Path]]:
        """Move a file to the rejected ones, or write payloads of a batch to files of their own.

        Return what is to be renamed to what when it is on disk: these files, and a note that the
        payloads have left the batch. A batch that is damaged goes as one.
        """
        if not form_of(name):
            self._move(name, self.rejected)
            return []
        try:
            payloads = dict(self.read_pending(name))
        except PayloadUnreadable:
            self._move(name, self.rejected)
            return []
        renames, left = list[tuple[Path, Path]](), self.left(name)
        for raw_id in raw_ids:
            place = place_of(raw_id)
            if place and raw_id in payloads:
                left.add(place.at)
                if not self.has_own_file(raw_id):  # or else of a run that a crash has cut short
                    part = self.journal / f"{raw_id}.part"
                    part.write_bytes(payloads[raw_id])
                    renames.append((part, self.path(raw_id, "rejected")))
            self._move(f"{raw_id}.json", self.rejected)  # it has left the batch, and was put back
        return [*renames, self.notes.prepare_left(name, left)]

    def _move_all(self, names: Iterable[str], stuck: dict[str, str]) -> list[str]:
        """Move files to the processed ones; return the names of those that this has moved."""
        moved, made = list[str](), set[str]()
        for name in names:
            day = day_of(name)
            try:
                with access_errors():
                    if day not in made:
                        (self.processed / day).mkdir(parents=True, exist_ok=True)
                        made.add(day)
                    if self._move(name, self.processed / day):
                        moved.append(name)
            except NoAccess as error:
                stuck[name] = str(error)
        return moved

    def _with_retries(self, rejection: Rejection) -> Rejection:
        before = self.last_rejection(rejection.raw_id)
        if before is None:
            return rejection
        return msgspec.structs.replace(
            rejection, retries=before.retries, retried_at=before.retried_at
        )

    def _move(self, name: str, folder: Path) -> bool:
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

    # The quarantine

    def rejection(self, raw_id: UUID) -> Rejection:
        """See Payloads.rejection."""
        path = self.file_in("rejected", raw_id)
        try:
            moved = datetime.fromtimestamp(path.lstat().st_ctime, UTC)
        except FileNotFoundError:
            raise RawIdUnknown(f"{raw_id} is not rejected") from None
        wrong = "the reason is not there or cannot be read"
        first = first_of(path.name)
        try:
            known = self.last_rejection(first)
        except NoAccess as error:
            known, wrong = None, str(error)
        return known or Rejection(first, "reason_missing", wrong, moved)

    def rejections(self, one: UUID | None = None) -> Iterator[Rejection]:
        """See Payloads.rejections."""
        for raw_id in [one] if one else map(UUID, self.rejected_names()):
            with contextlib.suppress(RawIdUnknown):  # it was put back meanwhile
                yield self.rejection(raw_id)

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
        names, _ = earliest_names(self.rejected, limit, f"{after}~" if after else "")
        return [name[:36] for name in names]

    def retry(self, raw_id: UUID) -> bool:
        """See Payloads.retry."""
        source = self.file_in("rejected", raw_id)
        first = first_of(source.name)
        try:
            known, now = self.last_rejection(first), datetime.now(UTC)
            reason = known or self.rejection(first)
            self.record(msgspec.structs.replace(reason, retries=reason.retries + 1, retried_at=now))
            os.rename(source, self.raw / source.name)
            with contextlib.suppress(StorageUnavailable):  # then `take_stock` finds it
                self._index.forget([str(first)])
            return True
        except RawIdUnknown:
            return False
        except OSError as error:
            if source.exists():
                raise storage_error(error) from error
            return False  # another caller has put it back

    # What is discarded

    def discard(self, raw_ids: Iterable[UUID], now: datetime) -> list[UUID]:
        """See Payloads.discard."""
        moved = super().discard(raw_ids, now)
        with contextlib.suppress(StorageUnavailable):  # then `take_stock` finds them
            self._index.forget(map(str, moved))
        return moved

    # What is wrong around

    def problems(self) -> dict[str, list[str]]:
        """See PayloadStore.problems."""
        troubles = self.folder_troubles()
        if self.processed.is_dir() and os.access(self.processed, os.R_OK | os.X_OK):
            troubles += filter(None, (pack.trouble() for pack in self.packs()))
        behind = self.clock_trouble()
        found = {"data folder": list(dict.fromkeys(troubles)), "clock": [behind] if behind else []}
        if self.archive:
            is_there = self.processed.is_dir()
            wrong = self.archive_troubles() if is_there else [self.archive.trouble()]
            found["archive"] = list(filter(None, wrong))
        return found


def _opened(path: Path, form: Form = "", index: int = 0) -> OpenPayload:
    """Open the file of a payload, or one payload in that of a batch."""
    file = open(path, "rb", 0)
    try:
        begin, end = 0, os.fstat(file.fileno()).st_size
        if form:
            with LARGE_AT_ONCE if end > LARGE_BATCH else contextlib.nullcontext():
                begin, end = stretch_of(file.read(), form, index)
            file.seek(begin)
        return OpenPayload(end - begin, _pieces(file, end - begin), file.close)
    except (*REFUSED, ValueError) as error:
        file.close()
        raise PayloadUnreadable(f"{path} is damaged: {error}") from error
    except BaseException:
        file.close()
        raise


def _pieces(file: FileIO, rest: int) -> Iterator[bytes]:
    while rest and (piece := file.read(min(rest, PIECE_BYTES))):
        yield piece
        rest -= len(piece)


@contextlib.contextmanager
def _noting(stuck: dict[str, str], name: str) -> Iterator[None]:
    """Note why a file stays pending where this user has no right to move it."""
    try:
        with access_errors():
            yield
    except NoAccess as error:
        stuck[name] = str(error)
