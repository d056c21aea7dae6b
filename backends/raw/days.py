"""Days of processed payloads: files in a folder first, then a pack, and in the end nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar
from uuid import UUID

from backends.raw import (
    PAYLOAD_NAME,
    STATES,
    ArchiveAway,
    Archiving,
    Form,
    NoAccess,
    PayloadStoreError,
    PayloadUnreadable,
    Portion,
    RawIds,
    Source,
    State,
    StorageUnavailable,
    day_of,
    first_of,
    form_of,
    payloads_in_name,
    place_of,
)
from backends.raw.archive import Archive
from backends.raw.archiving import adopt, delete_from, free_path, put_away, troubles_in
from backends.raw.batches import REFUSED, payloads_in
from backends.raw.disk import denied, read_file, sync_file, tell_once
from backends.raw.notes import LEFT, BatchNotes
from backends.raw.packs import INDEX, NOTE, PACK, PACK_NAME, Pack
from backends.raw.places import Places

T = TypeVar("T")

REASON = ".reason.json"  # behind a raw_id: the name of a file of `Rejection`
DAY_NAME = re.compile(r"\d{4}-\d\d-\d\d")
WINDOW = 200_000  # files that are listed at a time, so that any number fits into memory
PORTION = 1000  # payloads
FORMS: tuple[Form, ...] = ("ndjson", "json")  # of batches


def earliest_names(
    folder: Path, limit: int = sys.maxsize, after: str = ""
) -> tuple[list[str], int]:
    """Return the names of the `limit` earliest files behind `after`, and the number of payloads.

    That is of all behind `after`. It holds no more than twice as many names at a time, however many
    files there are.
    """
    names, count, high = list[str](), 0, "~"
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            payloads = payloads_in_name(name) if name > after else 0
            if payloads:
                count += payloads
                if name < high:
                    names.append(name)
                if len(names) > 2 * limit:
                    names.sort()
                    high = names[limit]
                    del names[limit:]
    names.sort()
    return names[:limit], count


class Days(Places):
    """The days of a data folder; they are deleted after `keep_days` days, or never if it is 0.

    With an `archive`, their packs are put there, too, and deleted on this disk alone after
    `keep_local_days` days, or never if that is 0.
    """

    def __init__(
        self,
        folder: Path,
        processed: Path | None,
        rejected: Path | None,
        keep_days: int,
        archive: Archive | None = None,
        keep_local_days: int = 0,
    ) -> None:
        super().__init__(folder, processed, rejected)
        self.keep_days = keep_days
        self.archive = archive
        self.keep_local_days = keep_local_days
        self.notes = BatchNotes(self.journal / "batches")
        self._expired = self.journal / "expired"

    # Batches

    def left(self, name: str) -> set[int]:
        """Return the places of payloads that have left a batch.

        Where the note is damaged, they are those that have files of their own, and those that have
        been rejected once and lie in a pack.
        """
        left = self.notes.left(name)
        if left is None:
            self._tell_damaged_note(name)
            raw_ids = RawIds(first_of(name), payloads_in_name(name))
            left = {
                at
                for at, raw_id in enumerate(raw_ids)
                if self.has_own_file(raw_id)
                or (os.path.lexists(self.reason(raw_id)) and self.is_packed_or_expired(raw_id))
            }
        return left

    def left_pack(self, pack: Pack) -> frozenset[UUID]:
        """Return the payloads that have left a pack.

        Where the note is damaged, they are those of its day that have files of their own.
        """
        left = self.notes.left_pack(pack.path.name)
        if left is None:
            self._tell_damaged_note(pack.path.name)
            days = (self.processed / pack.day, self.discarded / pack.day)
            folders = filter(os.path.isdir, (self.raw, self.rejected, *days))
            names = itertools.chain.from_iterable(map(os.listdir, folders))
            own = {first_of(name) for name in names if PAYLOAD_NAME.fullmatch(name)}
            left = frozenset(
                raw_id for raw_id in own if day_of(raw_id) == pack.day and pack.has(raw_id)
            )
        return left

    def _tell_damaged_note(self, name: str) -> None:
        tell_once(f"{self.notes.folder}/{name}{LEFT} is damaged: what it said is found again")

    def payloads_in(self, name: str, body: bytes) -> list[tuple[UUID, bytes] | None]:
        """Return the payloads of a file; None in the place of one that has left it."""
        form, count = form_of(name), payloads_in_name(name)
        if not form:
            return [(first_of(name), body)]
        try:
            bodies = payloads_in(body, form)
        except (*REFUSED, ValueError) as error:
            raise PayloadUnreadable(f"the batch {name} is damaged: {error}") from error
        if len(bodies) != count:
            wrong = f"the batch {name} is damaged: there are {len(bodies)} payloads in it"
            raise PayloadUnreadable(wrong)
        found: list[tuple[UUID, bytes] | None] = list(
            zip(RawIds(first_of(name), count), bodies, strict=True)
        )
        left = self.left(name)
        return [None if at in left else each for at, each in enumerate(found)] if left else found

    def reason(self, raw_id: UUID) -> Path:
        return self.rejected / f"{raw_id}{REASON}"

    def count_between(self, name: str, begin: int, end: int = sys.maxsize) -> int:
        """Return how many payloads of a file are between two places and have not left it."""
        if not form_of(name):
            return 1
        places = range(begin, min(end, payloads_in_name(name)))
        return len(places) - sum(at in places for at in self.left(name))

    def count_done(self, after: str = "") -> int:
        return sum(count for name, count in self.done().items() if name > after)

    def count_left(self, after: str = "") -> int:
        """Return how many payloads have left pending batches and are not among those done."""
        left = (name for name in self.notes.with_left() if name > after)
        pending = [name for name in left if os.path.lexists(f"{self.raw}/{name}")]
        done = self.done() if pending else {}
        return sum(at >= done.get(name, 0) for name in pending for at in self.left(name))

    def done(self) -> dict[str, int]:
        """See Payloads.done."""
        done = self.notes.done()
        return {name: done[name] for name in done if os.path.lexists(f"{self.raw}/{name}")}

    # Packs

    def packs(self, day: str = "") -> list[Pack]:
        """Return the packs of a day, or all; a day has a second one if payloads came late.

        One that is in the archive alone is among them, and one that was lost, as far as its index
        is there to tell.
        """
        with os.scandir(self.processed) as entries:
            names = {e.name for e in entries if e.name.startswith(day) and PACK in e.name}
        ends = {name.partition(PACK)[0] + PACK for name in names}
        found = (self._pack(name) for name in ends if PACK_NAME.fullmatch(name))
        return sorted(filter(None, found), key=lambda pack: pack.path)

    def _pack(self, name: str) -> Pack | None:
        path = self.processed / name
        for end in ("", NOTE):  # in this order: the note is there before the pack goes
            with contextlib.suppress(FileNotFoundError):
                written = os.stat(f"{path}{end}").st_mtime_ns
                return Pack(path, written, archive=self.archive, is_far=bool(end))
        lost = Pack(path, 0, is_lost=True, archive=self.archive)
        return lost if os.path.exists(f"{path}{INDEX}") and self._is_lost(lost) else None

    def _is_lost(self, pack: Pack) -> bool:
        """Say whether an index that lies alone is one of a pack that was lost.

        It may also be left of a pack that has expired, or that was never finished; in that case
        the files of its payloads are still there.
        """
        if pack.day < self.first_kept_day():
            return False
        try:
            [first, _], *_ = pack.index().members
        except (OSError, StorageUnavailable):  # it was never finished either
            return False
        return not self._has_processed(first) and not pack.path.exists()

    def _has_processed(self, raw_id: UUID) -> bool:
        place = place_of(raw_id)
        names = [f"{raw_id}.json", *(place.name(form) for form in FORMS if place)]
        return any((self.folder("processed", raw_id) / name).exists() for name in names)

    def portions(self) -> Iterator[Source]:
        """See Payloads.portions."""
        for pack in self.packs():
            name = f"{pack.path.name} {pack.written}"
            yield Source(name, pack.portions(self.left_pack(pack)), pack.is_far)
        for entry in sorted(os.scandir(self.processed), key=lambda entry: entry.name):
            if entry.is_dir():
                name = f"{entry.name} {entry.stat().st_mtime_ns}"
                yield Source(name, self._portions_in(Path(entry.path)))
        for name, count in self.done().items():
            portion = FolderPortion(self, self.raw, [name], count)
            yield Source(f"{name} {count}", iter([portion]))

    def _portions_in(self, folder: Path) -> Iterator[Portion]:
        names, _ = earliest_names(folder, WINDOW)
        while names:
            of_portion, count = list[str](), 0
            for name in names:
                of_portion.append(name)
                count += payloads_in_name(name)
                if count >= PORTION:
                    yield FolderPortion(self, folder, of_portion)
                    of_portion, count = [], 0
            if of_portion:
                yield FolderPortion(self, folder, of_portion)
            names, _ = earliest_names(folder, WINDOW, names[-1])

    def count_processed(self) -> int:
        """See Payloads.count_processed."""
        packs = [pack for pack in self.packs() if not pack.is_lost]
        packed = sum(pack.index().payloads - len(self.left_pack(pack)) for pack in packs)
        folders = [Path(entry.path) for entry in os.scandir(self.processed) if entry.is_dir()]
        count = sum(payloads_in_name(name) for folder in folders for name in os.listdir(folder))
        left = [name for name in self.notes.with_left() if self.is_processed(name)]
        done = sum(self.count_between(name, 0, end) for name, end in self.done().items())
        return packed + count + done - sum(len(self.left(name)) for name in left)

    def is_processed(self, name: str) -> bool:
        """Say whether a file lies among the processed ones."""
        return os.path.lexists(self.processed / day_of(name) / name)

    def finished_days(self) -> list[str]:
        """See Payloads.finished_days."""
        days = filter(DAY_NAME.fullmatch, os.listdir(self.processed))
        return sorted(day for day in days if day < f"{datetime.now(UTC):%Y-%m-%d}")

    def compact(self, day: str) -> int:
        """See Payloads.compact."""
        folder = self.processed / day
        names = [name for name in earliest_names(folder)[0] if day_of(name) == day]
        packs, count = self.packs(day), 0

        def fresh() -> Iterator[tuple[UUID, bytes]]:
            for raw_id, body in self._payloads_of(folder, names):
                if not packs or self.packed(raw_id) != body:
                    yield raw_id, body  # the others are left of a run that was stopped

        if any(True for _ in fresh()):
            path = free_path(self.processed, day)
            self.notes.forget_left(path.name)  # it is of a pack of that name which is no more
            count = Pack.write(path, fresh)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for name in self.notes.with_left():
            if day_of(name) == day and not self._is_there(name):
                self.notes.forget_left(name)
        with contextlib.suppress(OSError):  # something else lies there
            folder.rmdir()
        return count

    def _payloads_of(self, folder: Path, names: Sequence[str]) -> Iterator[tuple[UUID, bytes]]:
        """Yield the payloads of files, in order of arrival, each of them once.

        One that has left its batch, and was processed later, stands between the others of it; also
        where the note that it has left was lost.
        """
        own_files, seen = {name for name in names if not form_of(name)}, set[str]()
        for name in names:
            if name in seen:
                continue
            body = (folder / name).read_bytes()
            if name in own_files:
                yield first_of(name), body
                continue
            raw_ids = RawIds(first_of(name), payloads_in_name(name))
            for raw_id, found in zip(raw_ids, self._readable_in(name, body), strict=True):
                own = f"{raw_id}.json"
                if own in own_files:
                    seen.add(own)
                    yield raw_id, (folder / own).read_bytes()
                elif found:
                    yield found

    def _is_there(self, name: str) -> bool:
        folders = (self.folder(state, first_of(name)) for state in STATES)
        return any(os.path.lexists(folder / name) for folder in folders)

    def _readable_in(self, name: str, body: bytes) -> list[tuple[UUID, bytes] | None]:
        try:
            return self.payloads_in(name, body)
        except PayloadUnreadable as error:
            raise StorageUnavailable(f"{error}: restore it from a copy") from error

    def expire(self) -> list[str]:
        """See Payloads.expire."""
        first = f"{datetime.now(UTC) - timedelta(days=self.keep_days):%Y-%m-%d}"
        packs = self.packs() if self.keep_days else []
        expired = [pack for pack in packs if pack.day < first]
        discarded = self._discarded_before(first) if self.keep_days else []
        if expired or discarded:
            day = max(self.first_kept_day(), first)
            self.publish(self._expired, f"{day} {zlib.crc32(day.encode()):08x}".encode())
            sync_file(self._expired)
        done = list[str]()
        for pack in expired:
            try:
                if self.archive:
                    delete_from(self.archive, pack)
            except ArchiveAway:
                if not done:
                    raise
                break  # the next run goes on here
            pack.remove()
            self.notes.forget_left(pack.path.name)
            done.append(pack.path.name)
        for folder in discarded:
            shutil.rmtree(folder)
        return done + [f"{self.discarded.name}/{folder.name}" for folder in discarded]

    def _discarded_before(self, day: str) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):  # nothing was ever discarded
            days = sorted(filter(DAY_NAME.fullmatch, os.listdir(self.discarded)))
            return [self.discarded / each for each in days if each < day]
        return []

    # The archive

    @property
    def has_archive(self) -> bool:
        """See Payloads.has_archive."""
        return self.archive is not None

    def is_archived(self, raw_id: UUID) -> bool:
        """See Payloads.is_archived."""
        if self.archive is None or self.has_own_file(raw_id):
            return False
        return any(pack.is_far for pack in self.packs(day_of(raw_id)))

    def to_archive(self) -> list[str]:
        """See Payloads.to_archive."""
        if self.archive is None:
            return []
        packs = [pack for pack in self.packs() if not (pack.is_lost or pack.is_far)]
        return [p.path.name for p in packs if not p.note_path.exists() or self._is_to_go(p)]

    def _is_to_go(self, pack: Pack) -> bool:
        first = f"{datetime.now(UTC) - timedelta(days=self.keep_local_days):%Y-%m-%d}"
        return bool(self.keep_local_days) and pack.day < first

    def archive_pack(self, name: str) -> Archiving:
        """See Payloads.archive_pack."""
        pack = self._pack(name)
        if self.archive is None or pack is None or pack.is_far or pack.is_lost:
            return Archiving([], 0, [], is_local=False)  # it has just gone
        return put_away(pack, self.archive, keep=not self._is_to_go(pack))

    def adopt(self) -> Iterator[str]:
        """See Payloads.adopt."""
        if self.archive:
            yield from adopt(self.archive, self.processed, self.packs())

    def archive_troubles(self) -> list[str]:
        """Name what is wrong in the archive, as far as that shows without reading it all."""
        return troubles_in(self.archive, self.packs()) if self.archive else []

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

    def file_in(self, state: State, raw_id: UUID) -> Path:
        """Return where a payload lies if it is in a state: as its own file, or in that of a batch.

        The latter is there for a batch that is damaged, and so went as one.
        """
        own, place = self.path(raw_id, state), place_of(raw_id)
        if place is None or os.path.lexists(own):
            return own
        folder = self.folder(state, place.first)
        return next(filter(os.path.lexists, (folder / place.name(form) for form in FORMS)), own)

    def is_elsewhere(self, raw_id: UUID) -> bool:
        """Say whether a payload has a file of its own, or is packed, or has expired.

        The archive is not asked, as a start does not wait for it: what is there alone counts as
        not there, and what is then brought back from the journal is recognised when it is packed.
        """
        return self.has_own_file(raw_id) or self.is_packed_or_expired(raw_id)

    def has_own_file(self, raw_id: UUID) -> bool:
        return any(os.path.lexists(self.path(raw_id, state)) for state in STATES)

    def is_packed_or_expired(self, raw_id: UUID) -> bool:
        with contextlib.suppress(StorageUnavailable):  # what is damaged is as good as not there
            near = [pack for pack in self.packs(day_of(raw_id)) if not pack.is_far]
            is_packed = self.look_in_packs(raw_id, Pack.read, near) is not None
            return is_packed or day_of(raw_id) < self.first_kept_day()
        return False

    def packed(self, raw_id: UUID) -> bytes | None:
        return self.look_in_packs(raw_id, Pack.read)

    def look_in_packs(
        self,
        raw_id: UUID,
        look: Callable[[Pack, UUID], T | None],
        packs: Sequence[Pack] | None = None,
    ) -> T | None:
        damage = None
        for pack in self.packs(day_of(raw_id)) if packs is None else packs:
            try:
                found = None if raw_id in self.left_pack(pack) else look(pack, raw_id)
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


@dataclass(frozen=True)
class FolderPortion:
    """Processed payloads that are files of one folder, in each the first `end`: a `Portion`."""

    days: Days
    folder: Path
    names: list[str]
    end: int = sys.maxsize

    def payloads(self) -> Iterator[tuple[UUID, bytes | PayloadStoreError]]:
        """See Portion.payloads."""
        for name in self.names:
            try:
                body = read_file(f"{self.folder}/{name}")
                yield from filter(None, self.days.payloads_in(name, body)[: self.end])
            except FileNotFoundError:
                yield from self._packed(RawIds(first_of(name), payloads_in_name(name)))
            except OSError as error:
                yield first_of(name), _unreadable(error)
            except PayloadStoreError as error:
                yield first_of(name), error

    def _packed(self, raw_ids: Sequence[UUID]) -> Iterator[tuple[UUID, bytes | PayloadStoreError]]:
        """Yield payloads that were packed meanwhile."""
        for raw_id in raw_ids[: self.end]:
            body = self.days.packed(raw_id)
            if body is not None:
                yield raw_id, body


def _unreadable(error: OSError) -> PayloadStoreError:
    if isinstance(error, PermissionError):
        return NoAccess(denied(error))
    return PayloadUnreadable(f"{error.filename} cannot be read: {error.strerror}")
