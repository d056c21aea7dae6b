"""What is known of batches and packs besides their files: what has left one, and what is done.

A batch is one file, which stays as it arrived and moves as one. A payload of it that is rejected
gets a file of its own, and from then on that file alone says what its state is. That it has left
its batch is noted in `<name of the batch>.left`: a checksum, and the places of all that have left.
Both are on disk before they get their names, the note last, and before the batch moves on.

The same holds for a payload that is discarded, whose batch may be in any state, and for a pack,
which never changes: `<name of the pack>.left` has the raw_ids of the payloads that have left it,
for as long as there is that pack, also where one was put back since and lies elsewhere.

Where processing was to stop in the middle of a pending batch, an empty file tells how many of its
payloads are done: `<name of the batch>.<number>.done`. So names alone tell what is pending.
"""

from __future__ import annotations

import contextlib
import functools
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from uuid import UUID

import msgspec

LEFT, DONE = ".left", ".done"
OF_PACK = f".gz{LEFT}"


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

    def left_pack(self, name: str) -> frozenset[UUID] | None:
        """Return the payloads that have left a pack; None if that is damaged."""
        path = self.folder / f"{name}{LEFT}"
        try:
            found = path.stat()
            return _left_pack(path, found.st_ino, found.st_mtime_ns, found.st_size)
        except FileNotFoundError:
            return frozenset()
        except (OSError, msgspec.DecodeError):
            return None

    def prepare_left(self, name: str, left: Iterable[int] | Iterable[UUID]) -> tuple[Path, Path]:
        """Write down the places of all the payloads that have left a batch, or their raw_ids.

        The latter is for a pack. Return the file, and what it is to be renamed to, so that they
        have left.
        """
        self.folder.mkdir(exist_ok=True)
        known: Sequence[int | UUID] = sorted(left)
        part = self.folder.with_name(f"{name}.part")  # where what a kill has left is looked for
        part.write_bytes(msgspec.json.encode((_checksum(known), known)))
        return part, self.folder / f"{name}{LEFT}"

    def with_left(self) -> list[str]:
        """Return the names of the batches that payloads have left."""
        notes = (name for name in self.names() if not name.endswith(OF_PACK))
        return [name.removesuffix(LEFT) for name in notes if name.endswith(LEFT)]

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
        """Forget which payloads have left a batch or a pack, whose file is no more."""
        (self.folder / f"{name}{LEFT}").unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Return the names of all notes."""
        with contextlib.suppress(FileNotFoundError):
            return [name for name in os.listdir(self.folder) if name.endswith((LEFT, DONE))]
        return []


@functools.lru_cache(maxsize=32)
def _left_pack(path: Path, *_: int) -> frozenset[UUID] | None:
    """Read a note, which is another one where its inode, its time or its size is another one."""
    checksum, raw_ids = msgspec.json.decode(path.read_bytes(), type=tuple[int, list[UUID]])
    return frozenset(raw_ids) if checksum == _checksum(raw_ids) else None


def _checksum(left: Sequence[int | UUID]) -> int:
    return zlib.crc32(msgspec.json.encode(left))
