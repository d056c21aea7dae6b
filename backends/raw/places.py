"""The places of a data folder, and what is wrong around them.

data/raw/<raw_id>.json                  pending
data/raw/<raw_id>.<count>.ndjson        pending, a batch, by its first raw_id; or .json
data/processed/<day>/…                  processed, by the UTC day of arrival; names stay the same
data/processed/<day>.ndjson.gz          a finished day, packed
data/rejected/<raw_id>.json             rejected, beside <raw_id>.reason.json
data/discarded/<day>/<raw_id>.json      discarded, by the same day, beside <raw_id>.reason.json
data/journal/                           what makes payloads durable, and notes about them
"""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from backends.raw import State, arrival_of, day_of, payloads_in_name
from backends.raw.disk import (
    DAMAGED,
    FILE,
    FOLDER,
    access_trouble,
    existing,
    syncs_file_systems,
    write_all,
    writing_trouble,
)

OUT_OF_REACH_SHOWN = 20
NO_LOCK = "is a folder, and has to be a file: remove it"
CLOCK_PATIENCE = timedelta(minutes=5)


class Places:
    """The folders of a data folder, by paths alone.

    `folder` is that of pending payloads; the others lie beside it unless given, on the same file
    system.
    """

    def __init__(self, folder: Path, processed: Path | None, rejected: Path | None) -> None:
        self.raw = folder
        self.processed = processed or folder.parent / "processed"
        self.rejected = rejected or folder.parent / "rejected"
        self.discarded = folder.parent / "discarded"
        self.journal = folder.parent / "journal"

    @property
    def workspace(self) -> Path:
        """See Payloads.workspace."""
        return self.journal

    @property
    def process_lock(self) -> Path:
        """See Payloads.process_lock."""
        return self.raw.parent / "process.lock"

    def folder(self, state: State, raw_id: UUID | str) -> Path:
        """Return where the file of a payload or of a batch lies in a state."""
        if state == "pending":
            return self.raw
        if state == "rejected":
            return self.rejected
        return (self.discarded if state == "discarded" else self.processed) / day_of(raw_id)

    def path(self, raw_id: UUID, state: State) -> Path:
        """Return where a payload that has a file of its own lies in a state."""
        return self.folder(state, raw_id) / f"{raw_id}.json"

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

    def strays(self) -> list[str]:
        """See PayloadStore.strays."""
        return sorted(name for name in os.listdir(self.raw) if not payloads_in_name(name))

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
        places += [(self.raw / name, os.R_OK) for name in oldest]
        return next(filter(None, itertools.starmap(access_trouble, places)), None)

    def folder_troubles(self) -> list[str]:
        """Say what is wrong with the folders; one that this made would have the wrong owner."""
        folders = (self.raw, self.processed, self.rejected, self.discarded, self.journal)
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
        return troubles

    def out_of_reach(self) -> list[str]:
        """Name what lies here and this user has no right to; the first of it where it is much."""
        places = itertools.chain(
            [(self.process_lock, FILE)],
            *(
                _below(folder, os.R_OK)
                for folder in (self.raw, self.rejected, self.processed, self.discarded)
            ),
            _below(self.journal, FILE),
        )
        found = list(filter(None, itertools.starmap(access_trouble, places)))
        rest = len(found) - OUT_OF_REACH_SHOWN
        return found[:OUT_OF_REACH_SHOWN] + ([f"and {rest} more of that kind"] if rest > 0 else [])

    def clock_trouble(self) -> str | None:
        """Compare the clock with the last raw_id given out, and with the age of this program."""
        past = [datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)]
        with contextlib.suppress(OSError, ValueError):  # nothing has landed
            last = UUID(bytes=(self.journal / "last_raw_id").read_bytes()[:16])
            past.append(arrival_of(last) or past[0])
        behind = max(past) - datetime.now(UTC)
        if behind < CLOCK_PATIENCE:
            return None
        return f"it is {behind} behind what has happened already: set it, and keep it by NTP"


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
