"""What is known of batches besides their files: what has left one, and how much of it is done.

A batch is one file, which stays as it arrived and moves as one. A payload of it that is rejected
gets a file of its own, and from then on that file alone says what its state is. That it has left
its batch is noted in `<name of the batch>.left`: a checksum, and the places of all that have left.
Both are on disk before they get their names, the note last, and before the batch moves on.

Where processing was to stop in the middle of a pending batch, an empty file tells how many of its
payloads are done: `<name of the batch>.<number>.done`. So names alone tell what is pending.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import msgspec

LEFT, DONE = ".left", ".done"


class BatchNotes:
    """The notes in a folder, which is made when it is needed. It can be pickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def left(self, name: str) -> set[int] | None:
        """Return the places of the payloads that have left a batch; None if that is damaged."""
        try:
            body = (self.folder / f"{name}{LEFT}").read_bytes()
            checksum, places = msgspec.json.decode(body, type=tuple[int, list[int]])
        except FileNotFoundError:
            return set()
        except (OSError, msgspec.DecodeError):
            return None
        return set(places) if checksum == _checksum(places) else None

    def prepare_left(self, name: str, places: Iterable[int]) -> tuple[Path, Path]:
        """Write down the places of all the payloads that have left a batch.

        Return the file, and what it is to be renamed to, so that they have left.
        """
        self.folder.mkdir(exist_ok=True)
        known = sorted(places)
        part = self.folder.with_name(f"{name}.part")  # where what a kill has left is looked for
        part.write_bytes(msgspec.json.encode((_checksum(known), known)))
        return part, self.folder / f"{name}{LEFT}"

    def with_left(self) -> list[str]:
        """Return the names of the batches that payloads have left."""
        return [name.removesuffix(LEFT) for name in self.names() if name.endswith(LEFT)]

    def done(self) -> dict[str, int]:
        """Return how many payloads of a pending batch are done, by the names of the batches."""
        found = dict[str, int]()
        for note in self.names():
            name, _, number = note.removesuffix(DONE).rpartition(".")
            if note.endswith(DONE) and number.isdigit():
                found[name] = max(int(number), found.get(name, 0))
        return found

    def note_done(self, name: str, count: int) -> None:
        """Note that the first `count` payloads of a pending batch are done."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / f"{name}.{count}{DONE}").touch()
        self.forget_done(name, but=count)

    def forget_done(self, name: str, but: int = 0) -> None:
        """Forget how many payloads of a batch are done, or what was known before `but` were."""
        kept = f"{name}.{but}{DONE}"
        for note in self.names():
            if note.startswith(f"{name}.") and note.endswith(DONE) and note != kept:
                (self.folder / note).unlink(missing_ok=True)

    def forget_left(self, name: str) -> None:
        """Forget which payloads have left a batch, whose file is no more."""
        (self.folder / f"{name}{LEFT}").unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names of all notes."""
        with contextlib.suppress(FileNotFoundError):
            return [name for name in os.listdir(self.folder) if name.endswith((LEFT, DONE))]
        return []


def _checksum(places: list[int]) -> int:
    return zlib.crc32(msgspec.json.encode(places))
