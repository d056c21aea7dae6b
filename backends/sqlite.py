"""Rows in one SQLite file: durable, nothing to install, open to several processes at once."""

import asyncio
import errno
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from os import PathLike
from pathlib import Path
from threading import Lock
from time import monotonic, sleep
from typing import TypeVar, cast
from uuid import UUID

from backends import (
    Backend,
    BackendError,
    BackendUnavailable,
    Bucket,
    Measurement,
    MeasurementNotFound,
    edges,
    timestamp_text,
    unhurried,
    window,
    winners,
)

T = TypeVar("T")
Row = tuple[str, float, float, str]

# Not STRICT: SQLite before 3.37 could not open the file.
CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS measurements (
    timestamp_utc TEXT NOT NULL PRIMARY KEY,
    mean REAL NOT NULL,
    std_dev REAL NOT NULL,
    raw_id TEXT NOT NULL
) WITHOUT ROWID
"""
COLUMNS = 'SELECT name, type, "notnull", pk FROM pragma_table_info(?) ORDER BY cid'
EXPECTED_COLUMNS = [
    ("timestamp_utc", "TEXT", 1, 1),
    ("mean", "REAL", 1, 0),
    ("std_dev", "REAL", 1, 0),
    ("raw_id", "TEXT", 1, 0),
]
UPSERT = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id)
VALUES (?, ?, ?, ?)
ON CONFLICT (timestamp_utc) DO UPDATE
SET mean = excluded.mean, std_dev = excluded.std_dev, raw_id = excluded.raw_id
WHERE excluded.raw_id >= measurements.raw_id
"""
DELETE = "DELETE FROM measurements WHERE timestamp_utc = ? AND raw_id = ?"
GET = "SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements WHERE timestamp_utc = ?"
# A year's first digit lies between the empty text and '~'.
FIND_ASCENDING = """
SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements
WHERE timestamp_utc >= coalesce(?, '') AND timestamp_utc < coalesce(?, '~')
ORDER BY timestamp_utc ASC LIMIT ?
"""
FIND_DESCENDING = """
SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements
WHERE timestamp_utc >= coalesce(?, '') AND timestamp_utc < coalesce(?, '~')
ORDER BY timestamp_utc DESC LIMIT ?
"""
COUNT = "SELECT count(*) FROM measurements"
# Of one span. Its ends are found by the index: to compare every text would take as long again.
SUMMARIZE = """
SELECT
    (SELECT timestamp_utc FROM measurements WHERE timestamp_utc >= ?1 AND timestamp_utc < ?2
        ORDER BY timestamp_utc ASC LIMIT 1),
    (SELECT timestamp_utc FROM measurements WHERE timestamp_utc >= ?1 AND timestamp_utc < ?2
        ORDER BY timestamp_utc DESC LIMIT 1),
    count(*), min(mean), max(mean), avg(mean), avg(std_dev)
FROM measurements WHERE timestamp_utc >= ?1 AND timestamp_utc < ?2
"""
PING = "SELECT 1"

# What the data are the reason for; everything else is trouble with the file.
REFUSALS = (sqlite3.IntegrityError, sqlite3.DataError, OverflowError)


class Place:
    """A path, and the file that the first connection has found there: all others want the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.opening = Lock()
        self._file: tuple[int, int] | None = None  # device and inode

    def require_same_file(self) -> None:
        """Raise BackendUnavailable where another file lies there by now, or none."""
        if self._file is not None and self._file_there() != self._file:
            # What is written now would go to a file that nobody finds after a restart.
            raise BackendUnavailable(
                f"{self.path} was moved, deleted or replaced while it was open: put it back, or "
                "restart Dropzone on the file that is to count (rebuild makes its rows again)"
            )

    def keep(self) -> None:
        """Let the file that lies there be the one."""
        self._file = self._file_there()

    def forget(self) -> None:
        """Let it be whichever file lies there next time."""
        self._file = None

    def _file_there(self) -> tuple[int, int] | None:
        with suppress(FileNotFoundError):
            there = self.path.stat()
            return there.st_dev, there.st_ino
        return None


class Lane:
    """A thread, and the connection that it alone touches, which is why there are no locks."""

    def __init__(self, place: Place, busy_timeout: float, name: str) -> None:
        self._place, self._path = place, place.path
        self._busy_timeout = busy_timeout
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"sqlite {name}")
        self._connection: sqlite3.Connection | None = None

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do some work in the thread, with the connection, which is opened where it is not."""
        return await self._in_thread(lambda: work(self._opened()))

    async def close(self) -> None:
        """Close the connection, behind the work that was asked for before."""
        await self._in_thread(self._close)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        with self._errors():
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except REFUSALS as error:
            raise BackendError(f"{self._path} refuses these data: {error}") from error
        except (sqlite3.Error, OSError) as error:
            raise BackendUnavailable(
                f"{self._path}: {error}. Check that it is a SQLite database, its rights and the "
                "disk, that no other program keeps it locked, and try again"
            ) from error

    def _opened(self) -> sqlite3.Connection:
        if self._connection is not None:
            self._place.require_same_file()
            return self._connection
        with self._place.opening:
            self._place.require_same_file()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(
                self._path, timeout=self._busy_timeout, isolation_level=None
            )
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            self._place.keep()
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        self._write_ahead(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(CREATE_TABLE)
        if connection.execute(COLUMNS, ("measurements",)).fetchall() != EXPECTED_COLUMNS:
            raise BackendUnavailable(
                f"{self._path} has a table measurements of another shape: rename that table, "
                f"or choose another file. Expected: {' '.join(CREATE_TABLE.split())}"
            )

    def _write_ahead(self, connection: sqlite3.Connection) -> None:
        # SQLite does not apply its busy timeout to this change, which needs the file for itself.
        deadline = monotonic() + self._busy_timeout
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic() > deadline:
                    raise
                sleep(0.01)
            else:
                return

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class SqliteBackend:
    """A Backend in the file `path`, whose folder is created.

    `busy_timeout` is how many seconds a call waits for another process's write to end before it
    raises BackendUnavailable. The sign of a zero is not kept: -0.0 reads back as 0.0.

    Reads wait neither for writes nor, where they look for single rows or pages, for those that go
    through a whole range; a ping waits for nothing.
    """

    def __init__(self, path: str | PathLike[str], *, busy_timeout: float = 5.0) -> None:
        self._path = Path(path)
        self._place = Place(self._path)
        self._writes, self._reads, self._sums, self._pings = self._lanes = [
            Lane(self._place, busy_timeout, name) for name in ("writes", "reads", "sums", "pings")
        ]

    def __repr__(self) -> str:
        return f"SqliteBackend({str(self._path)!r})"

    async def open(self) -> None:
        """See Backend.open."""
        await self._writes.run(lambda connection: connection.execute(PING))

    async def close(self) -> None:
        """See Backend.close."""
        for lane in self._lanes:
            await lane.close()
        self._place.forget()

    async def ping(self) -> None:
        """See Backend.ping."""
        await self._pings.run(self._ping)

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.upsert."""

        def write(connection: sqlite3.Connection) -> None:
            _write(connection, UPSERT, [_row(measurement) for measurement in winners(measurements)])

        await self._writes.run(write)

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.delete."""
        rows = [(timestamp_text(row.timestamp_utc), str(row.raw_id)) for row in measurements]
        await self._writes.run(lambda connection: _write(connection, DELETE, rows))

    async def get(self, timestamp_utc: datetime) -> Measurement:
        """See Backend.get."""
        rows = await self._rows(GET, timestamp_text(timestamp_utc))
        if not rows:
            raise MeasurementNotFound(f"no measurement at {timestamp_text(timestamp_utc)}")
        return rows[0]

    async def find(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        after: datetime | None = None,
        limit: int = 100,
        descending: bool = False,
    ) -> list[Measurement]:
        """See Backend.find."""
        bounds = window(since, until, after, limit, descending=descending)
        texts = [None if bound is None else timestamp_text(bound) for bound in bounds]
        return await self._rows(FIND_DESCENDING if descending else FIND_ASCENDING, *texts, limit)

    async def count(self) -> int:
        """See Backend.count."""
        return await self._sums.run(lambda connection: int(connection.execute(COUNT).fetchone()[0]))

    async def summarize(
        self, *, since: datetime | None = None, until: datetime | None = None, buckets: int = 100
    ) -> list[Bucket]:
        """See Backend.summarize."""
        spans = [
            (timestamp_text(a), timestamp_text(b) if b else "~")
            for a, b in await edges(cast("Backend", self), since, until, buckets)
        ]

        def sums(connection: sqlite3.Connection) -> list[Bucket]:
            rows = (connection.execute(SUMMARIZE, span).fetchone() for span in spans)
            return [self._bucket(*row) for row in rows if row[0]]

        return await self._sums.run(sums)

    async def back_up(self, file: Path) -> int:
        """Copy all rows, as they are at one moment, to a new file; return how many there are.

        Others may write meanwhile. The copy is not synced.
        """

        def copy_all(connection: sqlite3.Connection) -> int:
            with closing(sqlite3.connect(file)) as copy:
                connection.backup(copy)
                return int(copy.execute(COUNT).fetchone()[0])

        return await self._sums.run(copy_all)

    def _ping(self, connection: sqlite3.Connection) -> None:
        connection.execute(PING)
        if not os.access(self._path, os.R_OK | os.W_OK):  # another user's file can still be read
            raise PermissionError(errno.EACCES, "this user may not write to it")

    async def _rows(self, sql: str, *parameters: object) -> list[Measurement]:
        def read(connection: sqlite3.Connection) -> list[Measurement]:
            found = connection.execute(sql, parameters).fetchall()
            return [self._measurement(row) for some in unhurried(found) for row in some]

        return await self._reads.run(read)

    def _measurement(self, row: Row) -> Measurement:
        timestamp, mean, std_dev, raw_id = row
        try:
            return Measurement(datetime.fromisoformat(timestamp), mean, std_dev, UUID(raw_id))
        except (TypeError, ValueError) as error:
            raise BackendError(
                f"{self._path} has a row {row!r} that is no measurement: delete it ({error})"
            ) from error

    def _bucket(self, first: str, last: str, count: int, *values: float | None) -> Bucket:
        # A sum that overflows is an infinity, or null where it went both ways.
        low, high, mean, std_dev = (0.0 if value is None else value for value in values)
        try:
            start, end = datetime.fromisoformat(first), datetime.fromisoformat(last)
            return Bucket(start, end, count, low, high, mean, std_dev)
        except (TypeError, ValueError) as error:
            raise BackendError(
                f"{self._path} has a row that is no measurement from {first} to {last}: "
                f"delete it ({error})"
            ) from error


def _write(connection: sqlite3.Connection, sql: str, rows: Sequence[tuple[object, ...]]) -> None:
    with connection:
        # Asking for the write lock first means waiting for it here, never failing halfway.
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(sql, rows)


def _row(measurement: Measurement) -> Row:
    timestamp = timestamp_text(measurement.timestamp_utc)
    return timestamp, measurement.mean, measurement.std_dev, str(measurement.raw_id)
