"""Payloads that a person has discarded: kept for a while, and no part of anything any more.

A discarded payload lies in the folder of the day of its arrival, beside a file that says when it
was discarded and why it was rejected, if it ever was; `keep_days` counts for it as for others. One
that came alone moves by a rename. One in a batch or in a pack, neither of which changes, gets a
file of its own, as a rejected payload of a batch does: from then on that file says what its state
is, and a note that it has left what it came in (`notes.py`).

This order stands a kill and a power cut at any moment:

 1. What it has to be known by later, and the bytes that get a file of their own, are written under
    other names, and synced. Until now nothing has happened.
 2. The files get their names. From now on each look-up finds the payload discarded. What is read as
    a whole, to rebuild the table for instance, may still meet it in its batch or pack.
 3. The notes get theirs, and nothing meets it any more. All of this is synced.

Whoever does this notes first which payloads it is about (`dropzone.py`, "Discarding"), and does it
again where a crash came between: each step leaves alone what is done already.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import msgspec

from backends import json_of
from backends.raw import (
    Discard,
    RawIdUnknown,
    Rejection,
    day_of,
    first_of,
    form_of,
    payloads_in_name,
    place_of,
)
from backends.raw.days import FORMS, REASON, Days
from backends.raw.disk import access_errors, disk_errors, read_file, sync_files_around


@dataclass
class Leaving:
    """What is prepared for payloads to be discarded.

    `files` move as they are; `parts` are the bytes of payloads that get files; `batches` and
    `packs` say all that has left them. `read` is what is in the batch that was read last.
    """

    files: dict[UUID, Path] = field(default_factory=dict)
    parts: dict[UUID, Path] = field(default_factory=dict)
    batches: dict[Path, set[int]] = field(default_factory=dict)
    packs: dict[str, set[UUID]] = field(default_factory=dict)
    read: tuple[Path, dict[UUID, bytes]] = (Path(), {})


class Discarded(Days):
    """The discarded payloads of a data folder, the way to them, and the way back."""

    def discard(self, raw_ids: Iterable[UUID], now: datetime) -> list[UUID]:
        """See Payloads.discard; the head of this file has the order."""
        leaving = Leaving()
        with disk_errors():
            for raw_id in sorted(set(raw_ids)):
                self._prepare(raw_id, leaving)
            for raw_id in (*leaving.files, *leaving.parts):
                record = Discard(raw_id, now, self.last_rejection(raw_id))
                self._record_of(raw_id).parent.mkdir(parents=True, exist_ok=True)
                self.publish(self._record_of(raw_id), json_of(record))
            notes = list(self._prepared_notes(leaving))
            sync_files_around(self.discarded)
            moved = [raw_id for raw_id, file in leaving.files.items() if self._move_in(file)]
            for raw_id, part in leaving.parts.items():
                os.rename(part, self.path(raw_id, "discarded"))
            for part, note in notes:
                os.rename(part, note)
            for path in leaving.batches:
                self._settle_emptied(path)
            for raw_id in (*moved, *leaving.parts):
                self.reason(raw_id).unlink(missing_ok=True)
            sync_files_around(self.discarded)
            os.utime(self.discarded)  # so that `changed` tells
        return [*moved, *leaving.parts]

    def _prepared_notes(self, leaving: Leaving) -> Iterator[tuple[Path, Path]]:
        for path, places in leaving.batches.items():
            yield self.notes.prepare_left(path.name, places)
        for name, raw_ids in leaving.packs.items():
            yield self.notes.prepare_left(name, raw_ids)

    def _prepare(self, raw_id: UUID, leaving: Leaving) -> None:
        """Prepare what is to be done for a payload to leave all that it lies in."""
        own = self._own_file(raw_id)
        batch = None if own and form_of(own.name) else self._batch_with(raw_id, leaving)
        packs = [pack for pack in self.packs(day_of(raw_id)) if pack.has(raw_id)]
        if own and own.parent.parent != self.discarded:
            leaving.files[first_of(own.name)] = own
        if own is None:
            body = self._in_batch(raw_id, batch, leaving) if batch else self.packed(raw_id)
            if body is None:
                return  # there is no such payload
            leaving.parts[raw_id] = self.journal / f"{raw_id}.part"
            leaving.parts[raw_id].write_bytes(body)
        place = place_of(raw_id)
        if batch and place:
            leaving.batches.setdefault(batch, self.left(batch.name)).add(place.at)
        for pack in packs:
            left = self.left_pack(pack)
            if raw_id not in left:
                leaving.packs.setdefault(pack.path.name, set(left)).add(raw_id)

    def _own_file(self, raw_id: UUID) -> Path | None:
        """Return the file of a payload that is alone in it, or of a damaged batch that goes as one.

        The latter has been rejected or discarded as one.
        """
        paths = [self.path(raw_id, "pending"), self.path(raw_id, "processed")]
        paths += [self.file_in("rejected", raw_id), self.file_in("discarded", raw_id)]
        return next(filter(os.path.lexists, paths), None)

    def _batch_with(self, raw_id: UUID, leaving: Leaving) -> Path | None:
        """Return the file of the batch that a payload is in and has not left."""
        place = place_of(raw_id)
        if place is None:
            return None
        folders = (self.raw, self.folder("processed", place.first))
        paths = [folder / place.name(form) for folder in folders for form in FORMS]
        path = next(filter(os.path.lexists, paths), None)
        if path is None or place.at in leaving.batches.get(path, self.left(path.name)):
            return None
        return path

    def _in_batch(self, raw_id: UUID, path: Path, leaving: Leaving) -> bytes | None:
        if leaving.read[0] != path:
            payloads = self.payloads_in(path.name, read_file(str(path)))
            leaving.read = path, dict(filter(None, payloads))
        return leaving.read[1].get(raw_id)

    def _move_in(self, file: Path) -> bool:
        """Move a file to the discarded ones; return False if it has gone."""
        target = self.folder("discarded", first_of(file.name)) / file.name
        for source in (file, self.raw / file.name):  # where a retry has put it meanwhile
            with contextlib.suppress(FileNotFoundError):
                os.rename(source, target)
                return True
        return False

    def _settle_emptied(self, path: Path) -> None:
        """Move a pending batch on that all of its payloads have left: nothing is pending in it."""
        if path.parent == self.raw and len(self.left(path.name)) == payloads_in_name(path.name):
            target = self.folder("processed", first_of(path.name))
            target.mkdir(parents=True, exist_ok=True)
            os.rename(path, target / path.name)
            self.notes.forget_done(path.name)

    def undiscard(self, raw_id: UUID) -> bool:
        """See Payloads.undiscard."""
        with disk_errors():
            try:
                source, known = self.file_in("discarded", raw_id), self.discarded_at(raw_id)
                if known.rejection:  # which counts its retries, and so stays
                    self.record(known.rejection)
                os.rename(source, self.raw / source.name)
            except (RawIdUnknown, FileNotFoundError):
                return False
            self._record_of(known.raw_id).unlink(missing_ok=True)
            sync_files_around(self.discarded)
            os.utime(self.discarded)
        return True

    def discarded_at(self, raw_id: UUID) -> Discard:
        """See Payloads.discarded_at."""
        path = self.file_in("discarded", raw_id)
        try:
            moved = datetime.fromtimestamp(path.lstat().st_ctime, UTC)
        except FileNotFoundError:
            raise RawIdUnknown(f"{raw_id} is not discarded") from None
        first = first_of(path.name)
        return self._read_record(first) or Discard(first, moved)

    def last_rejection(self, raw_id: UUID) -> Rejection | None:
        """See Payloads.last_rejection."""
        with contextlib.suppress(OSError, ValueError), access_errors():  # also what is no UTF-8
            return msgspec.json.decode(self.reason(raw_id).read_bytes(), type=Rejection)
        record = self._read_record(raw_id)
        return record.rejection if record else None

    def record(self, rejection: Rejection) -> None:
        """Write down why a payload is rejected."""
        self.publish(self.reason(rejection.raw_id), json_of(rejection))

    def count_discarded(self) -> int:
        """See Payloads.count_discarded."""
        return sum(map(payloads_in_name, itertools.chain.from_iterable(self._names_by_day())))

    def last_discarded_names(self) -> list[str]:
        """Return the names in the last day of discarded payloads."""
        return next(filter(None, self._names_by_day()), [])

    def _names_by_day(self) -> Iterator[list[str]]:
        """Yield the names of the files of each day, the last one first."""
        with contextlib.suppress(FileNotFoundError):  # an older version was here last
            for day in sorted(os.listdir(self.discarded), reverse=True):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # it has expired
                    yield os.listdir(self.discarded / day)

    def _record_of(self, raw_id: UUID) -> Path:
        return self.folder("discarded", raw_id) / f"{raw_id}{REASON}"

    def _read_record(self, raw_id: UUID) -> Discard | None:
        with contextlib.suppress(OSError, ValueError), access_errors():
            return msgspec.json.decode(self._record_of(raw_id).read_bytes(), type=Discard)
        return None
