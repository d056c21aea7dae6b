"""Idempotency-Keys: what each of the last 24 hours was given, in a file that all processes share.

The file is SQLite's, `journal/keys.sqlite`. Keys stand nowhere else once the journal was emptied,
so that what is lost with the file is forgotten: a retry with such a key lands its payload once
more. The service does not stop for that. A file that is damaged is set aside, and one takes its
place that has the keys that could still be read; a checksum tells whether a key is what was noted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from msgspec import Struct

from backends.raw import uuid_at
from backends.raw.disk import set_aside

log = logging.getLogger("dropzone")

KEY_LIFE = timedelta(hours=24)
LOOKED_THROUGH = 16 * 1024 * 1024  # bytes of a file that is looked through whenever it is opened
DAMAGE = {sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB} | {
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
    sqlite3.SQLITE_IOERR_CORRUPTFS,
}
OPEN_KEYS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",  # the log has what is not synced yet
    """CREATE TABLE IF NOT EXISTS keys
    (key TEXT PRIMARY KEY, digest BLOB, raw_ids BLOB, landed INT, checksum INT)""",
)
COLUMNS = "SELECT name FROM pragma_table_info('keys')"
ADD_CHECKSUM = "ALTER TABLE keys ADD COLUMN checksum INT"  # NULL for keys of older versions
FIND_KEY = "SELECT key, digest, raw_ids, landed, checksum FROM keys WHERE key = ? AND raw_ids >= ?"
ALL_KEYS = "SELECT key, digest, raw_ids, landed, checksum FROM keys NOT INDEXED WHERE raw_ids >= ?"
NOTE_KEY = """INSERT OR REPLACE INTO keys (key, digest, raw_ids, landed, checksum)
VALUES (?, ?, ?, ?, ?)"""
DROP_KEYS = "DELETE FROM keys WHERE raw_ids < ?"
LOOK_THROUGH = "PRAGMA integrity_check(1)"
FORGOTTEN = "are forgotten: a retry with one of them lands its payload once more"


class KeyUse(Struct, frozen=True, array_like=True):
    """An Idempotency-Key, the SHA-256 of what came with it, and the raw_ids that it was given."""

    key: str  # behind the name of its caller, if it has one, and a line break
    digest: bytes
    raw_ids: list[UUID]
    landed: bool = False


class KeysDamaged(sqlite3.DatabaseError):
    """The file is not what was written."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


class Keys:
    """The file of the keys; of several processes one at a time uses it, see `Journal.keys_locked`.

    Methods raise sqlite3.Error where the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: sqlite3.Connection  # from `open` on
        self._inode = 0

    def open(self, *, is_expected: bool) -> None:
        """Open the file, or make it; where it `is_expected` to be there, say that it is not."""
        if is_expected and not (self._path.exists() and self._path.stat().st_size):
            self._tell_lost()
        self._mended(self._connect)
        self._mended(self._look_through)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def follow(self) -> None:
        """Notice that another process has set the file aside, or that it was deleted."""
        try:
            if os.stat(self._path).st_ino == self._inode:
                return
        except FileNotFoundError:
            self._tell_lost()
        self.close()
        self._mended(self._connect)

    def find(self, key: str) -> KeyUse | None:
        """Return the use that a key has had in the last 24 hours."""
        rows = self._mended(self._rows, FIND_KEY, key, _oldest())
        if rows and not _is_whole(rows[0]):
            self._begin_anew("a key is not what was noted")
            return None
        for _, digest, raw_ids, landed, _ in rows:
            ids = [UUID(bytes=raw_ids[i : i + 16]) for i in range(0, len(raw_ids), 16)]
            return KeyUse(key, digest, ids, bool(landed))
        return None

    def note(self, use: KeyUse) -> None:
        """Note the use of a key that has not landed yet, in the place of an earlier one."""
        self._mended(self._rows, NOTE_KEY, *_row_of(use, landed=False))

    def note_landed(self, uses: Sequence[KeyUse]) -> None:
        """Note that these have landed: all of them, or none where that fails."""
        self._mended(self._note_landed, uses)

    def _note_landed(self, uses: Sequence[KeyUse]) -> None:
        with self._file:  # commits, or rolls back
            self._file.execute("BEGIN")
            for use in uses:
                self._rows(NOTE_KEY, *_row_of(use, landed=True))

    def drop_old(self) -> None:
        """Forget the keys of more than 24 hours ago."""
        self._mended(self._rows, DROP_KEYS, _oldest())

    def _connect(self) -> None:
        self._file = sqlite3.connect(self._path, isolation_level=None)
        for statement in OPEN_KEYS:
            self._file.execute(statement)
        if ("checksum",) not in self._rows(COLUMNS):
            self._file.execute(ADD_CHECKSUM)
        self._inode = os.stat(self._path).st_ino

    def _look_through(self) -> None:
        """Raise where the file is damaged; a large one is left alone, as looking takes long."""
        if self._path.stat().st_size <= LOOKED_THROUGH:
            [(result,), *_] = self._rows(LOOK_THROUGH)
            if result != "ok":
                raise KeysDamaged(result.splitlines()[-1])

    def _rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        return self._file.execute(statement, values).fetchall()

    def _mended(self, call: Any, *arguments: object) -> Any:
        """Call a function; where it meets damage, once more, on a new file."""
        try:
            return call(*arguments)
        except sqlite3.DatabaseError as error:
            if not self._is_damage(error):
                raise
            self._begin_anew(str(error))
            return call(*arguments)

    def _is_damage(self, error: sqlite3.DatabaseError) -> bool:
        code = getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_READONLY:  # what SQLite also says of a number in its header
            return os.access(self._path, os.W_OK)
        return code in DAMAGE or code & 0xFF in DAMAGE

    def _begin_anew(self, reason: str) -> None:
        """Set the file aside, and take over what can be read of it.

        Others that have it open see by `follow` that it has gone, and until then write to the old.
        """
        rows = self._readable()
        self.close()
        kept = set_aside(self._path, self._path.parent)
        for end in (
            "-wal",
            "-shm",
        ):  # they are named after it, and would be taken for the new one's
            with contextlib.suppress(FileNotFoundError):
                Path(f"{self._path}{end}").rename(f"{kept}{end}")
        self._connect()
        self._file.executemany(NOTE_KEY, rows)
        log.error(
            "%s is damaged (%s) and kept as %s. %d keys were taken over, others of the last 24 "
            "hours %s",
            *(self._path, reason, kept, len(rows), FORGOTTEN),
        )

    def _readable(self) -> list[tuple[Any, ...]]:
        rows = list[tuple[Any, ...]]()
        with contextlib.suppress(sqlite3.Error, UnicodeDecodeError):  # up to where it is damaged
            rows.extend(filter(_is_whole, self._file.execute(ALL_KEYS, (_oldest(),))))
        return rows

    def _tell_lost(self) -> None:
        wrong = "%s is missing or empty, a new one is begun: the keys of the last 24 hours %s"
        log.error(wrong, self._path, FORGOTTEN)


def _row_of(use: KeyUse, *, landed: bool) -> tuple[object, ...]:
    raw_ids = b"".join(raw_id.bytes for raw_id in use.raw_ids)
    return (use.key, use.digest, raw_ids, landed, checksum_of(use.key, use.digest, raw_ids, landed))


def checksum_of(key: str, digest: bytes, raw_ids: bytes, landed: int) -> int:
    """Return the CRC-32 of a key and what was noted of it."""
    return zlib.crc32(b"\0".join((key.encode(), digest, raw_ids, b"%d" % landed)))


def _is_whole(row: tuple[Any, ...]) -> bool:
    """Say whether a row is what was noted; older versions have noted no checksum."""
    *values, checksum = row
    try:
        return checksum is None or checksum == checksum_of(*values)
    except (TypeError, AttributeError, UnicodeError):  # a value has become one of another type
        return False


def _oldest() -> bytes:
    """Return the least raw_id that a key which still counts can have been given."""
    return uuid_at(datetime.now(UTC) - KEY_LIFE).bytes
