"""Rows in PostgreSQL, or a database that speaks its protocol: a pool, one statement a call."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import TypeAlias
from urllib.parse import urlsplit
from uuid import UUID

import asyncpg

from backends import (
    BackendError,
    BackendUnavailable,
    Bucket,
    Measurement,
    MeasurementNotFound,
    edges,
    timestamp_text,
    window,
    winners,
)

CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS measurements (
    timestamp_utc timestamptz PRIMARY KEY,
    mean double precision NOT NULL,
    std_dev double precision NOT NULL,
    raw_id uuid NOT NULL
)
"""
COLUMNS = "SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements LIMIT 0"
EXPECTED_TYPES = ["timestamptz", "float8", "float8", "uuid"]
# Timestamps travel as text: asyncpg would write the first and the last possible one as infinities.
UPSERT = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id)
SELECT batch.timestamp_text::timestamptz, batch.mean, batch.std_dev, batch.raw_id
FROM unnest($1::text[], $2::double precision[], $3::double precision[], $4::uuid[])
    AS batch (timestamp_text, mean, std_dev, raw_id)
ORDER BY batch.timestamp_text::timestamptz
ON CONFLICT (timestamp_utc) DO UPDATE
SET mean = excluded.mean, std_dev = excluded.std_dev, raw_id = excluded.raw_id
WHERE excluded.raw_id >= measurements.raw_id
"""
# Rows are locked in one order, that of upserts too, so that nobody waits in a circle.
DELETE = """
WITH named AS (
    SELECT measurements.timestamp_utc, measurements.raw_id
    FROM unnest($1::text[], $2::uuid[]) AS batch (timestamp_text, raw_id)
    JOIN measurements ON measurements.timestamp_utc = batch.timestamp_text::timestamptz
        AND measurements.raw_id = batch.raw_id
    ORDER BY measurements.timestamp_utc
    FOR UPDATE OF measurements
)
DELETE FROM measurements USING named
WHERE measurements.timestamp_utc = named.timestamp_utc AND measurements.raw_id = named.raw_id
"""
GET = """
SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements
WHERE timestamp_utc = $1::text::timestamptz
"""
FIND_ASCENDING = """
SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements
WHERE timestamp_utc >= coalesce($1, '-infinity')::timestamptz
    AND timestamp_utc < coalesce($2, 'infinity')::timestamptz
ORDER BY timestamp_utc ASC LIMIT $3
"""
FIND_DESCENDING = """
SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements
WHERE timestamp_utc >= coalesce($1, '-infinity')::timestamptz
    AND timestamp_utc < coalesce($2, 'infinity')::timestamptz
ORDER BY timestamp_utc DESC LIMIT $3
"""
COUNT = "SELECT count(*) FROM measurements"
# A range of the index for each span takes a fifth of the time of grouping all rows. A sum that
# overflows would be an error, and avg squares its values on the way.
SUMMARIZE = """
SELECT of_span.first, of_span.last, of_span.count,
    of_span.min_mean, of_span.max_mean, of_span.mean, of_span.std_dev
FROM unnest($1::text[], $2::text[]) AS span (low, high)
CROSS JOIN LATERAL (
    SELECT min(timestamp_utc) AS first, max(timestamp_utc) AS last, count(*) AS count,
        min(mean) AS min_mean, max(mean) AS max_mean,
        sum(least(greatest(mean, -1e290), 1e290)) / count(*) AS mean,
        sum(least(std_dev, 1e290)) / count(*) AS std_dev
    FROM measurements
    WHERE timestamp_utc >= span.low::timestamptz AND timestamp_utc < span.high::timestamptz
) AS of_span
WHERE of_span.count > 0
ORDER BY of_span.first ASC
"""
PING = "SELECT 1"

EXAMPLE = "postgresql://user:password@host:5432/database"
# What the connection, and not the statement, was the reason for. Every statement here may be
# repeated, so it does not matter whether the server had carried it out.
DEAD_CONNECTION = (
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
CREATED_BY_ANOTHER = (
    asyncpg.DuplicateTableError,
    asyncpg.DuplicateObjectError,
    asyncpg.UniqueViolationError,
)
# SQLSTATE classes (PostgreSQL manual, appendix A) that the data are the reason for: data exception,
# integrity constraint, check option of a view, an exception raised by somebody's trigger.
REFUSED_CLASSES = {"22", "23", "44", "P0"}
ADVICE = {
    "08": "try again",
    "25": "it accepts no writes: connect to the primary server",
    "28": "check the user and the password of the url",
    "3D": "check the database of the url",
    "40": "another transaction was in the way, try again",
    "53": "it is short of connections, memory or disk, make room and try again",
    "55": "something it needs is locked, try again",
    "57": "it is starting, stopping, or cancelled the statement: try again",
}
SHAPE_STATES = {"42703", "42804", "42883", "42P10"}
CREATE_TABLE_LINE = " ".join(CREATE_TABLE.split())

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Records: TypeAlias = "list[asyncpg.Record]"


class PostgresBackend:
    """A Backend in the database at `url`, reached through at most `pool` connections.

    `pool` can also be an asyncpg pool, then without `url`; it is never closed here. Waiting for a
    connection ends after `connect_timeout` seconds, a statement after `command_timeout` seconds,
    with BackendUnavailable. Raises ValueError for a `url` that is not one.
    """

    def __init__(
        self,
        url: str | None = None,
        pool: "int | Pool" = 10,
        *,
        connect_timeout: float = 10.0,
        command_timeout: float = 30.0,
    ) -> None:
        given = None if isinstance(pool, int) else pool
        if (url is None) == (given is None):
            raise ValueError(f"postgres needs either a url such as {EXAMPLE} or an asyncpg pool")
        if isinstance(pool, int) and pool < 1:
            raise ValueError(f"pool is {pool}: give 1 connection or more")
        self._url = url
        self._place = "the given pool" if url is None else _place(url)
        self._size = pool if isinstance(pool, int) else 0
        self._pool = self._given_pool = given
        self._table_is_there = False
        self._connect_timeout = connect_timeout
        self._command_timeout = command_timeout

    def __repr__(self) -> str:
        return f"PostgresBackend({self._place!r})"

    async def open(self) -> None:
        """See Backend.open."""
        await self._fetch(PING)

    async def close(self) -> None:
        """See Backend.close; waits for running calls, `command_timeout` seconds at most."""
        pool, self._pool = self._pool, self._given_pool
        self._table_is_there = False
        if pool is None or pool is self._given_pool:
            return
        # A pool that cannot take its leave in time, or from anybody, has cut its connections.
        with suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            async with asyncio.timeout(self._command_timeout):
                await pool.close()

    async def ping(self) -> None:
        """See Backend.ping."""
        await self._fetch(PING)

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.upsert."""
        rows = winners(measurements)
        await self._fetch(
            UPSERT,
            [timestamp_text(row.timestamp_utc) for row in rows],
            [row.mean for row in rows],
            [row.std_dev for row in rows],
            [row.raw_id for row in rows],
        )

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.delete."""
        timestamps = [timestamp_text(row.timestamp_utc) for row in measurements]
        await self._fetch(DELETE, timestamps, [row.raw_id for row in measurements])

    async def get(self, timestamp_utc: datetime) -> Measurement:
        """See Backend.get."""
        rows = await self._fetch(GET, timestamp_text(timestamp_utc))
        if not rows:
            raise MeasurementNotFound(f"no measurement at {timestamp_utc.isoformat()}")
        return self._measurement(rows[0])

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
        rows = await self._fetch(FIND_DESCENDING if descending else FIND_ASCENDING, *texts, limit)
        return [self._measurement(row) for row in rows]

    async def count(self) -> int:
        """See Backend.count."""
        return int((await self._fetch(COUNT))[0][0])

    async def summarize(
        self, *, since: datetime | None = None, until: datetime | None = None, buckets: int = 100
    ) -> list[Bucket]:
        """See Backend.summarize."""
        spans = await edges(self, since, until, buckets)
        starts = [timestamp_text(a) for a, _ in spans]
        ends = [timestamp_text(b) if b else "infinity" for _, b in spans]
        return [Bucket(*row) for row in await self._fetch(SUMMARIZE, starts, ends)]

    async def _fetch(self, sql: str, *arguments: object) -> Records:
        with self._errors():
            try:
                return await self._fetch_once(sql, *arguments)
            except DEAD_CONNECTION:
                # Its neighbours in the pool went down with the same server.
                if self._pool is not None:
                    await self._pool.expire_connections()
                return await self._fetch_once(sql, *arguments)

    async def _fetch_once(self, sql: str, *arguments: object) -> Records:
        if self._pool is None:
            self._pool = await self._create_pool()
        async with self._pool.acquire(timeout=self._connect_timeout) as connection:
            if not self._table_is_there:
                await self._ensure_table(connection)
                self._table_is_there = True
            return await connection.fetch(sql, *arguments, timeout=self._command_timeout)

    async def _create_pool(self) -> Pool:
        # With min_size=0 nothing is connected yet, so two calls at once cannot both wait here.
        return await asyncpg.create_pool(
            self._url, min_size=0, max_size=self._size, reset=_leave_as_is
        )

    async def _ensure_table(self, connection: Connection) -> None:
        """Create the table where it is missing, and prove that it can be written to."""
        try:
            types = await self._column_types(connection)
        except asyncpg.UndefinedTableError:
            # Another process that creates it at the same moment makes IF NOT EXISTS fail.
            with suppress(*CREATED_BY_ANOTHER):
                await connection.execute(CREATE_TABLE, timeout=self._command_timeout)
            types = await self._column_types(connection)
        if types != EXPECTED_TYPES:
            raise BackendUnavailable(self._shape_message(f"its columns are {', '.join(types)}"))
        await connection.fetch(UPSERT, [], [], [], [], timeout=self._command_timeout)

    async def _column_types(self, connection: Connection) -> list[str]:
        statement = await connection.prepare(COLUMNS, timeout=self._command_timeout)
        return [attribute.type.name for attribute in statement.get_attributes()]

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except asyncpg.PostgresError as error:
            raise self._translated(error) from error
        except OverflowError as error:
            raise BackendError(
                f"PostgreSQL at {self._place} has a row outside years 1 to 9999, which is no "
                f"measurement: delete it ({error})"
            ) from error
        except ValueError:
            # Without its cause: that would quote the url, and the password in it.
            raise BackendUnavailable(
                f"the url of {self._place} is not understood: write it like {EXAMPLE}"
            ) from None
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            raise BackendUnavailable(
                f"PostgreSQL at {self._place} does not answer: {str(error) or 'no reply in time'}. "
                "Check that it runs, and host and port, and try again"
            ) from error

    def _translated(self, error: asyncpg.PostgresError) -> BackendError:
        state = error.sqlstate or ""
        reason = " ".join(str(error).split())
        # Before the table was seen, nothing was said about any data: a setting in the url is wrong.
        if self._table_is_there and state[:2] in REFUSED_CLASSES:
            return BackendError(f"PostgreSQL at {self._place} refuses these data: {reason}")
        if state in SHAPE_STATES:
            return BackendUnavailable(self._shape_message(reason))
        if isinstance(error, asyncpg.InsufficientPrivilegeError):
            advice = (
                "grant SELECT, INSERT, UPDATE and DELETE on measurements to its user; "
                f"where the table is missing, create it: {CREATE_TABLE_LINE}"
            )
        else:
            advice = ADVICE.get(state[:2], "see its log")
        return BackendUnavailable(f"PostgreSQL at {self._place}: {reason}: {advice}")

    def _shape_message(self, reason: str) -> str:
        return (
            f"PostgreSQL at {self._place} has a table measurements of another shape ({reason}): "
            f"rename it, or choose another database or schema. Expected: {CREATE_TABLE_LINE}"
        )

    def _measurement(self, record: asyncpg.Record) -> Measurement:
        timestamp, mean, std_dev, raw_id = record
        try:
            return Measurement(timestamp, mean, std_dev, UUID(int=raw_id.int))
        except (AttributeError, TypeError, ValueError) as error:
            raise BackendError(
                f"PostgreSQL at {self._place} has a row {record!r} that is no measurement: "
                f"delete it ({error})"
            ) from error


def _place(url: str) -> str:
    """Return host, port and database of `url`, which may be shown."""
    parts = None
    with suppress(ValueError):
        parts = urlsplit(url)
    known = parts is not None and parts.scheme in {"postgresql", "postgres"}
    # A raw '/', '?' or '#' in the password ends the host too early, and would show the password.
    if parts is None or not known or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError(
            f"the database url is not like {EXAMPLE}: "
            "special characters in the password are written as %2F for /, %40 for @ and so on"
        )
    return parts.netloc.rpartition("@")[2] + parts.path


async def _leave_as_is(connection: object) -> None:
    """Do nothing when a connection returns: no statement here changes its state.

    asyncpg would spend a round trip on a reset that some compatible databases do not know.
    """
