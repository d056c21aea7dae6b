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
from typing import TypeVar
from uuid import UUID

from backends import (
    BackendError,
    BackendUnavailable,
    Bucket,
    Measurement,
    MeasurementNotFound,
    Series,
    contest,
    edges,
    following,
    page_texts,
    require_fitting,
    require_storable,
    require_utc,
    timestamp_text,
    unhurried,
)
from backends.sqlite_statements import (
    COLUMNS,
    COUNT,
    COUNT_OF_SERIES,
    FIND_OF_ALL,
    FIND_OF_SERIES,
    FIND_ONE,
    MANY,
    ONE,
    SERIES,
    SUMMARIZE,
    SUMMARIZE_SERIES,
    Statements,
    descending_of,
)

T = TypeVar("T")
Row = tuple[str, float, float, str] | tuple[str, float, float, str, str]

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

    def __init__(
        self, place: Place, statements: Statements, busy_timeout: float, name: str
    ) -> None:
        self._place, self._path = place, place.path
        self._statements = statements
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
        for setting in ("PRAGMA synchronous = FULL", *self._statements.settings):
            connection.execute(setting)
        self._ensure_table(connection)

    def _ensure_table(self, connection: sqlite3.Connection) -> None:
        create_table, *create_index = self._statements.create
        connection.execute(create_table)
        columns = connection.execute(COLUMNS, ("measurements",)).fetchall()
        if columns != self._statements.columns:
            raise BackendUnavailable(
                f"{self._path} has a table measurements {self._fault(columns)}"
            )
        for statement in create_index:
            connection.execute(statement)

    def _fault(self, columns: list[tuple[str, str, int, int]]) -> str:
        if columns == ONE.columns:
            return (
                f"of a single series. To keep it, leave series unset; to let it have many, run: "
                f"{MANY.change}; and then rebuild"
            )
        if columns == MANY.columns:
            return (
                "with many series. To keep it, set series; to have one of them alone, in which the "
                f"latest arrival for a timestamp stands, run: {ONE.change}; and then rebuild"
            )
        return (
            "of another shape: rename that table, or choose another file. "
            f"Expected: {self._statements.create_line}"
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
    raises BackendUnavailable. With `series` it keeps one row for each series and timestamp; a table
    of the other shape is not touched. The sign of a zero is not kept: -0.0 reads back as 0.0.

    Reads wait neither for writes nor, where they look for single rows or pages, for those that go
    through a whole range; a ping waits for nothing.
    """

    def __init__(
        self, path: str | PathLike[str], *, busy_timeout: float = 5.0, series: bool = False
    ) -> None:
        self._path = Path(path)
        self._place = Place(self._path)
        self._has_series = series
        self._statements = MANY if series else ONE
        self._row = _row_of_many if series else _row_of_one
        self._writes, self._reads, self._sums, self._pings = self._lanes = [
            Lane(self._place, self._statements, busy_timeout, name)
            for name in ("writes", "reads", "sums", "pings")
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

    async def upsert(self, measurements: Sequence[Measurement]) -> int:
        """See Backend.upsert."""
        require_fitting(measurements, series=self._has_series)

        def write(connection: sqlite3.Connection) -> int:
            winners, superseded = contest(measurements)
            rows = [self._row(winner) for winner in winners]
            with _transaction(connection):
                inserted = connection.executemany(self._statements.insert, rows).rowcount
                if inserted == len(rows):
                    return superseded
                table = [*self._others(connection, rows)]
                connection.executemany(self._statements.upsert, rows)
            return contest(measurements, table)[1]

        return await self._writes.run(write)

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.delete."""
        require_fitting(measurements, series=self._has_series)
        rows = [self._row(measurement) for measurement in measurements]

        def write(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                connection.executemany(self._statements.delete, rows)

        await self._writes.run(write)

    async def get(self, timestamp_utc: datetime, series: str = "") -> Measurement:
        """See Backend.get."""
        timestamp = timestamp_text(timestamp_utc)
        if self._has_series:
            require_storable([series])
        place = (timestamp, series) if self._has_series else (timestamp,)
        rows = await self._rows(self._statements.get, *place)
        if not rows or rows[0].series != series:
            of = f" of {series}" if series else ""
            raise MeasurementNotFound(f"no measurement{of} at {timestamp}")
        return rows[0]

    async def find(
        self,
        *,
        series: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        after: datetime | None = None,
        after_series: str | None = None,
        limit: int = 100,
        descending: bool = False,
    ) -> list[Measurement]:
        """See Backend.find."""
        bounds, names = page_texts(
            since,
            until,
            after,
            limit,
            descending=descending,
            after_series=after_series,
            series=series,
            has_series=self._has_series,
        )
        if series and not self._has_series:
            return []
        sql = (FIND_ONE, FIND_OF_SERIES, FIND_OF_ALL)[len(names)]
        return await self._rows(descending_of(sql) if descending else sql, *bounds, limit, *names)

    async def count(self, *, series: str | None = None) -> int:
        """See Backend.count."""
        if series and not self._has_series:
            return 0
        if series is None or not self._has_series:
            return await self._sums.run(lambda connection: _number(connection, COUNT))
        require_storable([series])
        return await self._sums.run(lambda connection: _number(connection, COUNT_OF_SERIES, series))

    async def summarize(
        self,
        *,
        series: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        buckets: int = 100,
    ) -> list[Bucket]:
        """See Backend.summarize."""
        of_series = [series] if self._has_series and series is not None else []
        spans = [
            (timestamp_text(a), timestamp_text(b) if b else "~", *of_series)
            for a, b in await edges(self, since, until, buckets, series)
        ]
        summarize = SUMMARIZE_SERIES if of_series else SUMMARIZE

        def sums(connection: sqlite3.Connection) -> list[Bucket]:
            rows = (connection.execute(summarize, span).fetchone() for span in spans)
            return [self._bucket(*row) for row in rows if row[0]]

        return await self._sums.run(sums)

    async def series(self, *, after: str | None = None, limit: int = 100) -> list[Series]:
        """See Backend.series."""
        if not self._has_series:
            last = await self.find(limit=min(limit, 1), descending=True)
            return [Series("", row.timestamp_utc) for row in last if after is None]
        if limit < 0:
            raise ValueError(f"limit is {limit}: give 0 or more")
        first = "" if after is None else following(after)
        require_storable([first])

        def read(connection: sqlite3.Connection) -> list[Series]:
            found = connection.execute(SERIES, (first, limit)).fetchall()
            return [Series(name, self._time(last)) for name, last in found]

        return await self._sums.run(read)

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

    def _others(self, connection: sqlite3.Connection, rows: Sequence[Row]) -> Iterator[Measurement]:
        """Yield the rows of the table in the places of these, where they are not the same."""
        for row in rows:
            timestamp, _, _, _, *series = row
            standing = connection.execute(self._statements.get, (timestamp, *series)).fetchone()
            if standing not in (None, row):
                with suppress(BackendError):  # whatever another program wrote there
                    yield self._measurement(standing)

    def _measurement(self, row: Row) -> Measurement:
        timestamp, mean, std_dev, raw_id, *series = row
        try:
            time = datetime.fromisoformat(timestamp)
            return Measurement(time, mean, std_dev, UUID(raw_id), *series)
        except (TypeError, ValueError) as error:
            raise BackendError(
                f"{self._path} has a row {row!r} that is no measurement: delete it ({error})"
            ) from error

    def _time(self, text: str) -> datetime:
        try:
            return require_utc(datetime.fromisoformat(text))
        except (TypeError, ValueError) as error:
            raise BackendError(
                f"{self._path} has a row at {text!r}, which is no timestamp: delete it ({error})"
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


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    with connection:
        # Asking for the write lock first means waiting for it here, never failing halfway.
        connection.execute("BEGIN IMMEDIATE")
        yield


def _number(connection: sqlite3.Connection, sql: str, *parameters: str) -> int:
    return int(connection.execute(sql, parameters).fetchone()[0])


def _row_of_one(measurement: Measurement) -> Row:
    timestamp = timestamp_text(measurement.timestamp_utc)
    return timestamp, measurement.mean, measurement.std_dev, str(measurement.raw_id)


def _row_of_many(measurement: Measurement) -> Row:
    return *_row_of_one(measurement), measurement.series
