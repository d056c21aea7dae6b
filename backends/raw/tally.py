"""How many payloads have landed and were processed: a small file that all processes count in."""

from __future__ import annotations

import logging
import os
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from backends.raw import Activity
from backends.raw.disk import UNREADABLE, locked

log = logging.getLogger("dropzone")

MINUTES = 60  # that the tally goes back
NUMBERS = struct.Struct("<QQ")
SLOT = struct.Struct("<16sI")  # two numbers, and their CRC-32
TALLY_BYTES = SLOT.size * (1 + MINUTES)
OLD_TALLY = NUMBERS.size * (1 + MINUTES)  # bytes: older versions have no checksums
TALLY_PATIENCE = 1.0  # seconds for another process to let go of it, or else nothing is counted


class Tally:
    """The numbers of `Activity`, which all processes of a data folder share in a small file.

    The first slot has how many payloads have become processed, and when the last one landed; each
    of the others has a minute and how many landed in it. The file is not synced. Where it is lost
    or damaged, it begins with what is `found`, the numbers of its first slot.
    """

    def __init__(
        self, path: Path, found: Callable[[], tuple[int, int]], *, is_expected: bool
    ) -> None:
        self._path = path
        self._found = found
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with locked(self._file, TALLY_PATIENCE):
            size = os.fstat(self._file).st_size
            if size == OLD_TALLY:
                for number, each in enumerate(NUMBERS.iter_unpack(self._bytes(size))):
                    self._set(number, *each)
            elif size or is_expected:
                self._first()
            else:
                self._begin()

    def add(self, *, landed: int = 0, processed: int = 0) -> None:
        """Count payloads."""
        now = time.time_ns() // 1_000_000
        minute = now // 60_000
        number = 1 + minute % MINUTES
        with locked(self._file, TALLY_PATIENCE):
            slots = self._bytes(TALLY_BYTES)
            total, last = _numbers(slots, 0) or self._first()
            self._set(0, total + processed, now if landed else last)
            if landed:
                known, count = _numbers(slots, number) or (0, 0)
                self._set(number, minute, landed + (count if known == minute else 0))

    def read(self) -> Activity:
        """Return what was counted."""
        slots = self._bytes(TALLY_BYTES)
        first, *minutes = (_numbers(slots, number) for number in range(1 + MINUTES))
        if first is None:  # or it is being written
            with locked(self._file, TALLY_PATIENCE):
                first = self._first()
        (total, last), counts = first, dict(filter(None, minutes))
        this_minute = int(time.time()) // 60
        landed = [counts.get(this_minute - n, 0) for n in reversed(range(MINUTES))]
        return Activity(total, last, landed)

    def _first(self) -> tuple[int, int]:
        first = _numbers(self._bytes(SLOT.size), 0)
        if first is None:
            wrong = "%s is damaged or was lost: what is processed is counted again"
            log.warning(wrong, self._path)
            first = self._begin()
        return first

    def _begin(self) -> tuple[int, int]:
        first = self._found()
        os.ftruncate(self._file, 0)  # what cannot be read is not to stand in the way
        os.ftruncate(self._file, TALLY_BYTES)
        self._set(0, *first)
        return first

    def _bytes(self, size: int) -> bytes:
        try:
            return os.pread(self._file, size, 0)
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            return b""

    def _set(self, number: int, *values: int) -> None:
        numbers = NUMBERS.pack(*values)
        os.pwrite(self._file, SLOT.pack(numbers, zlib.crc32(numbers)), SLOT.size * number)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


def _numbers(slots: bytes, number: int) -> tuple[int, int] | None:
    """Return the numbers of a slot, None where they are not what was written."""
    place = SLOT.size * number
    if len(slots) < place + SLOT.size:
        return None
    packed, checksum = SLOT.unpack_from(slots, place)
    one, other = NUMBERS.unpack(packed)
    return (one, other) if zlib.crc32(packed) == checksum else None
