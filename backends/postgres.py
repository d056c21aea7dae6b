"""Rows in PostgreSQL, or a database that speaks its protocol: a pool, one statement a call."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from time import monotonic
from typing import TypeAlias, cast
from uuid import UUID

import asyncpg

from backends import (
    NO_PAYLOAD,
    Backend,
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
from backends.postgres_url import EXAMPLE, Address, read_url

log = logging.getLogger(__name__)

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
NAMES = {"timestamp_utc", "mean", "std_dev", "raw_id"}
# A table from before Dropzone has no raw_id. This one statement gives it one, and its rows that of
# no payload; rows that come without one are refused afterwards.
OLDER_COLUMNS = "SELECT timestamp_utc, mean, std_dev FROM measurements LIMIT 0"
TAKE_OVER = (
    f"ALTER TABLE measurements ADD COLUMN raw_id uuid NOT NULL DEFAULT '{NO_PAYLOAD}', "
    "ALTER COLUMN raw_id SET DEFAULT NULL"
)
# A default that makes raw_ids up lets rows win that no payload made.
DEFAULT = """
SELECT pg_get_expr(pg_attrdef.adbin, pg_attrdef.adrelid) FROM pg_attrdef
JOIN pg_attribute ON pg_attribute.attrelid = pg_attrdef.adrelid
    AND pg_attribute.attnum = pg_attrdef.adnum
WHERE pg_attrdef.adrelid = 'measurements'::regclass AND pg_attribute.attname = 'raw_id'
"""
FORGET_MADE_UP = (
    "ALTER TABLE measurements ALTER COLUMN raw_id SET DEFAULT NULL, ALTER COLUMN raw_id TYPE uuid "
    f"USING CASE substr(raw_id::text, 15, 1) WHEN '7' THEN raw_id ELSE '{NO_PAYLOAD}' END"
)
# Timestamps travel as text: asyncpg would write the first and the last possible one as infinities.
# A row without raw_id is older than Dropzone, and any payload's wins.
UPSERT = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id)
SELECT batch.timestamp_text::timestamptz, batch.mean, batch.std_dev, batch.raw_id
FROM unnest($1::text[], $2::double precision[], $3::double precision[], $4::uuid[])
    AS batch (timestamp_text, mean, std_dev, raw_id)
ORDER BY batch.timestamp_text::timestamptz
ON CONFLICT (timestamp_utc) DO UPDATE
SET mean = excluded.mean, std_dev = excluded.std_dev, raw_id = excluded.raw_id
WHERE (excluded.raw_id >= measurements.raw_id) IS NOT FALSE
"""
# Rows are locked in one order, that of upserts too, so that nobody waits in a circle.
DELETE = """
WITH named AS (
    SELECT measurements.timestamp_utc, batch.raw_id
    FROM unnest($1::text[], $2::uuid[]) AS batch (timestamp_text, raw_id)
    JOIN measurements ON measurements.timestamp_utc = batch.timestamp_text::timestamptz
        AND coalesce(measurements.raw_id, '00000000-0000-0000-0000-000000000000') = batch.raw_id
    ORDER BY measurements.timestamp_utc
    FOR UPDATE OF measurements
)
DELETE FROM measurements USING named
WHERE measurements.timestamp_utc = named.timestamp_utc
    AND coalesce(measurements.raw_id, '00000000-0000-0000-0000-000000000000') = named.raw_id
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
ALIVE = "SELECT 1"
PING = """
SELECT current_setting('transaction_read_only') AS read_only,
    to_regclass('measurements') IS NOT NULL AS table_is_there
"""

# Seconds in which a server has to answer ALIVE, and after which a connection is not trusted
# without: a firewall drops connections without a word.
PATIENCE = 2.0
TRUSTED = 1.0
# Sessions are not given up a second time within so many seconds for what may be their fault.
RENEWAL = 1.0
AT_A_TIME = 500  # rows that are made of records before others have their turn
# What the connection, and not the statement, was the reason for. Every statement here may be
# repeated, so it does not matter whether the server had carried it out.
DEAD_CONNECTION = (
    ConnectionError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.IdleSessionTimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)
CREATED_BY_ANOTHER = (
    asyncpg.DuplicateTableError,
    asyncpg.DuplicateObjectError,
    asyncpg.UniqueViolationError,
)
# SQLSTATE classes (PostgreSQL manual, appendix A) and states that a setting of the session may be
# the reason for: read-only, its statements, its search_path, its role. A new session may have
# another by now.
SESSION_CLASSES = {"25", "26", "3F", "42"}
# Those that never say anything about rows: the connection, the session, its statements, its user,
# its database, other transactions, a shortage, an operator, the server's disk.
OTHER_CLASSES = {"08", "25", "26", "28", "3D", "40", "53", "57", "58"}
OTHER_STATES = {"55006", "55P03", "XX001", "XX002"}  # in use, locked, damaged
LASTING_CLASSES = {"40", "53"}  # a new session would meet with the same, or make it worse
ADVICE = {
    "08": "try again",
    "25": "it accepts no writes: connect to the primary server, or, where "
    "default_transaction_read_only is on for its database or user, turn it off",
    "26": "a pooler such as PgBouncer passes statements from one connection to another: make the "
    "pool with statement_cache_size=0",
    "28": "check the user and the password of the url, and that pg_hba.conf lets them in",
    "3D": "check the database of the url",
    "40": "another transaction was in the way, try again",
    "53": "it is short of connections, memory or disk, make room and try again",
    "55": "something it needs is locked, try again",
    "57": "it is starting, stopping, or cancelled the statement: try again",
    "58": "check its disk",
}
SHAPE_STATES = {"42703", "42804", "42883", "42P10"}
NO_TABLE = "42P01"
NO_VALUE = "23502"
PARAMETER_STATES = {"08P01", "22023", "42501", "42704", "55P02"}
CREATE_TABLE_LINE = " ".join(CREATE_TABLE.split())

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Records: TypeAlias = "list[asyncpg.Record]"


class PostgresBackend:
    """A Backend in the database at `url`, reached through at most `pool` connections.

    `url` is read as libpq does. Behind a pooler such as PgBouncer no statement outlives its
    transaction. `pool` can also be an asyncpg pool, then without `url`; it is never closed here,
    and behind a pooler it has to be made with `statement_cache_size=0`.

    With BackendUnavailable ends waiting for a connection after `connect_timeout` seconds, `get`
    and `find` after `read_timeout`, any other call after `command_timeout`; where the connection
    turns out to be dead, all are replaced, and it begins once more. Raises ValueError for a `url`
    that is not one.
    """

    def __init__(
        self,
        url: str | None = None,
        pool: "int | Pool" = 10,
        *,
        connect_timeout: float = 10.0,
        read_timeout: float = 5.0,
        command_timeout: float = 30.0,
    ) -> None:
        given = None if isinstance(pool, int) else pool
        if (url is None) == (given is None):
            raise ValueError(f"postgres needs either a url such as {EXAMPLE} or an asyncpg pool")
        if isinstance(pool, int) and pool < 1:
            raise ValueError(f"pool is {pool}: give 1 connection or more")
        self._address = None if url is None else read_url(url)
        self._place = self._address.place if self._address else "the given pool"
        self._size = pool if isinstance(pool, int) else 0
        self._pool = self._given_pool = given
        self._table_is_there = False
        wanted = self._address and self._address.connect_timeout
        self._connect_timeout = wanted or connect_timeout
        self._command_timeout = command_timeout
        self._read_timeout = min(read_timeout, command_timeout)
        self._patience = min(PATIENCE, command_timeout)
        self._heard: dict[int, float] = {}  # when a connection answered last, by its number
        self._renewed = float("-inf")

    @property
    def place(self) -> str:
        """Where the rows lie, to be shown: the host, its port and the database."""
        return self._place

    def __repr__(self) -> str:
        return f"PostgresBackend({self._place!r})"

    async def open(self) -> None:
        """See Backend.open."""
        await self.ping()

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
        """See Backend.ping; also raises where nothing can be written, or the table is gone."""
        trouble = await self._trouble()
        if trouble:  # it may belong to the session
            await self._renew()
            trouble = await self._trouble()
        if trouble:
            raise BackendUnavailable(f"PostgreSQL at {self._place}: {trouble}")

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.upsert."""
        rows = winners(measurements)
        await self._write(
            UPSERT,
            [timestamp_text(row.timestamp_utc) for row in rows],
            [row.mean for row in rows],
            [row.std_dev for row in rows],
            [row.raw_id for row in rows],
        )

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.delete."""
        timestamps = [timestamp_text(row.timestamp_utc) for row in measurements]
        await self._write(DELETE, timestamps, [row.raw_id for row in measurements])

    async def get(self, timestamp_utc: datetime) -> Measurement:
        """See Backend.get."""
        rows = await self._read(GET, timestamp_text(timestamp_utc))
        if not rows:
            raise MeasurementNotFound(f"no measurement at {timestamp_text(timestamp_utc)}")
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
        rows = await self._read(FIND_DESCENDING if descending else FIND_ASCENDING, *texts, limit)
        found = [self._measurement(row) for row in rows[:AT_A_TIME]]
        for start in range(AT_A_TIME, len(rows), AT_A_TIME):
            await asyncio.sleep(0)  # so that a large page does not hold up the event loop
            found += map(self._measurement, rows[start : start + AT_A_TIME])
        return found

    async def count(self) -> int:
        """See Backend.count."""
        return int((await self._read(COUNT, within=self._command_timeout))[0][0])

    async def summarize(
        self, *, since: datetime | None = None, until: datetime | None = None, buckets: int = 100
    ) -> list[Bucket]:
        """See Backend.summarize."""
        spans = await edges(cast("Backend", self), since, until, buckets)
        starts = [timestamp_text(a) for a, _ in spans]
        ends = [timestamp_text(b) if b else "infinity" for _, b in spans]
        rows = await self._read(SUMMARIZE, starts, ends, within=self._command_timeout)
        return [Bucket(*row) for row in rows]

    # ── Asking, again where the connection was the reason ─────────────────────────────────────────

    async def _read(self, sql: str, *arguments: object, within: float | None = None) -> Records:
        async with self._errors():
            return await self._fetch(sql, arguments, within or self._read_timeout)

    async def _write(self, sql: str, *columns: Sequence[object]) -> None:
        async with self._errors():
            try:
                await self._fetch(sql, columns, self._command_timeout)
            except asyncpg.PostgresError as refusal:
                if await self._are_rows_why(refusal, sql, columns):
                    raise BackendError(
                        f"PostgreSQL at {self._place} refuses these data: {_words(refusal)}"
                    ) from refusal
                raise

    async def _are_rows_why(
        self, refusal: asyncpg.PostgresError, sql: str, columns: Sequence[Sequence[object]]
    ) -> bool:
        """Say whether the database refuses these rows, and not the statement whatever they are."""
        state = refusal.sqlstate or ""
        if state[:2] in OTHER_CLASSES or state in OTHER_STATES or not columns[0]:
            return False
        if state == NO_VALUE and refusal.column_name and refusal.column_name not in NAMES:
            return False
        try:
            await self._fetch(sql, [[] for _ in columns], self._command_timeout)
        except asyncpg.PostgresError:
            return False
        return True

    async def _trouble(self) -> str | None:
        [(read_only, table_is_there)] = await self._read(PING, within=self._patience)
        if read_only == "on":
            return ADVICE["25"]
        return None if table_is_there else self._gone_message()

    async def _fetch(self, sql: str, arguments: Sequence[object], within: float) -> Records:
        """Fetch, and once more in a new session where the old one may be the reason."""
        try:
            return await self._fetch_once(sql, arguments, within)
        except DEAD_CONNECTION:
            pass
        except asyncpg.PostgresError as error:
            is_new = monotonic() - self._renewed < RENEWAL
            if is_new or (error.sqlstate or "")[:2] not in SESSION_CLASSES:
                raise
        await self._renew()
        return await self._fetch_once(sql, arguments, within)

    async def _fetch_once(self, sql: str, arguments: Sequence[object], within: float) -> Records:
        if self._pool is None:
            self._pool = await self._create_pool()
        async with self._pool.acquire(timeout=self._connect_timeout) as connection:
            number = connection.get_server_pid()
            if monotonic() - self._heard.get(number, 0.0) > TRUSTED:
                await self._require_answer(connection)
            if not self._table_is_there:
                await self._ensure_table(connection)
                self._table_is_there = True
            try:
                records = await connection.fetch(sql, *arguments, timeout=within)
            except TimeoutError:
                await self._require_answer(connection)
                raise
            self._heard[number] = monotonic()
            return records

    async def _require_answer(self, connection: Connection) -> None:
        """Raise ConnectionError where nobody is at the other end any more."""
        try:
            await connection.execute(ALIVE, timeout=self._patience)
        except TimeoutError:
            connection.terminate()
            raise ConnectionAbortedError("no reply in time") from None

    async def _renew(self) -> None:
        """Have all connections replaced: what went wrong with one holds for its neighbours."""
        self._heard.clear()
        self._renewed = monotonic()
        if self._pool is not None:
            await self._pool.expire_connections()

    async def _create_pool(self) -> Pool:
        address = cast("Address", self._address)  # where no pool was given, a url was
        if address.left_aside:
            names = ", ".join(address.left_aside)
            log.warning("left aside in the database url, asyncpg does not know it: %s", names)
        # With min_size=0 nothing is connected yet, so two calls at once cannot both wait here.
        # Behind a pooler, a statement that is kept would meet with another connection's. The
        # pool's own timeout is for cancelling a statement, which a dead connection never confirms.
        return await asyncpg.create_pool(
            address.dsn,
            min_size=0,
            max_size=self._size,
            reset=_leave_as_is,
            ssl=address.tls(),
            statement_cache_size=0,
            command_timeout=self._patience,
        )

    # ── The table ─────────────────────────────────────────────────────────────────────────────────

    async def _ensure_table(self, connection: Connection) -> None:
        """Create the table where it is missing, and prove that it can be written to."""
        try:
            types = await self._column_types(connection, COLUMNS)
        except asyncpg.UndefinedTableError:
            # Another process that creates it at the same moment makes IF NOT EXISTS fail.
            with suppress(*CREATED_BY_ANOTHER):
                await connection.execute(CREATE_TABLE, timeout=self._command_timeout)
            types = await self._column_types(connection, COLUMNS)
        except asyncpg.UndefinedColumnError as error:
            if await self._column_types(connection, OLDER_COLUMNS) != EXPECTED_TYPES[:3]:
                raise
            raise BackendUnavailable(self._older_message()) from error
        if types != EXPECTED_TYPES:
            raise BackendUnavailable(self._shape_message(f"its columns are {', '.join(types)}"))
        default = await connection.fetchval(DEFAULT, timeout=self._command_timeout)
        if default and str(NO_PAYLOAD) not in default:
            raise BackendUnavailable(self._made_up_message(default))
        await connection.fetch(UPSERT, [], [], [], [], timeout=self._command_timeout)

    async def _column_types(self, connection: Connection, sql: str) -> list[str]:
        statement = await connection.prepare(sql, name="", timeout=self._command_timeout)
        # Until it is carried out, it keeps a lock on the table that nobody could alter then.
        await statement.fetch(timeout=self._command_timeout)
        return [attribute.type.name for attribute in statement.get_attributes()]

    def _shape_message(self, reason: str) -> str:
        return (
            f"PostgreSQL at {self._place} has a table measurements of another shape ({reason}): "
            f"rename it, or choose another database or schema. Expected: {CREATE_TABLE_LINE}"
        )

    def _older_message(self) -> str:
        return (
            f"PostgreSQL at {self._place} has a table measurements from before Dropzone, without "
            f"raw_id: to take it over, its rows as older than any payload, run: {TAKE_OVER}"
        )

    def _made_up_message(self, default: str) -> str:
        return (
            f"PostgreSQL at {self._place}: raw_id of measurements has the default {default}, and "
            "rows with made-up raw_ids win against payloads: to have them count as older than any "
            f"payload, run: {FORGET_MADE_UP}"
        )

    def _gone_message(self) -> str:
        return (
            "the table measurements is gone: restore it, or restart Dropzone, which makes it anew "
            "and empty"
        )

    # ── What goes wrong ───────────────────────────────────────────────────────────────────────────

    @asynccontextmanager
    async def _errors(self) -> AsyncIterator[None]:
        try:
            yield
        except asyncpg.PostgresError as error:
            if (error.sqlstate or "")[:2] not in LASTING_CLASSES:
                await self._renew()
            raise BackendUnavailable(self._trouble_with(error)) from error
        except OverflowError as error:
            raise BackendError(
                f"PostgreSQL at {self._place} has a row outside years 1 to 9999, which is no "
                f"measurement: delete it ({error})"
            ) from error
        except (OSError, asyncpg.InterfaceError, asyncpg.InternalClientError) as error:
            raise BackendUnavailable(self._trouble_on_the_way(error)) from error
        except ValueError:
            # Without its cause: that might quote a variable such as PGPASSWORD.
            raise BackendUnavailable(
                f"how to reach PostgreSQL at {self._place} is not understood: check the variables "
                f"PGHOST, PGPORT and so on, and write the url like {EXAMPLE}"
            ) from None

    def _trouble_with(self, error: asyncpg.PostgresError) -> str:
        state, words = error.sqlstate or "", _words(error)
        settings = self._address.settings if self._address else ()
        named = ", ".join(sorted(name for name in settings if name in words))
        if named and state in PARAMETER_STATES:
            advice = f"the database url has {named}: correct it, or take it out"
        elif state in SHAPE_STATES:
            return self._shape_message(words)
        elif state == NO_TABLE:
            advice = self._gone_message()
        elif state == NO_VALUE:
            advice = f"give column {error.column_name} a default, or let it be null"
        elif isinstance(error, asyncpg.InsufficientPrivilegeError):
            advice = (
                "grant SELECT, INSERT, UPDATE and DELETE on measurements to its user; "
                f"where the table is missing, create it: {CREATE_TABLE_LINE}"
            )
        else:
            advice = ADVICE.get(state[:2], "see its log")
        return f"PostgreSQL at {self._place}: {words}: {advice}"

    def _trouble_on_the_way(self, error: Exception) -> str:
        reason = str(error) or "no reply in time"
        file_trouble = self._address and self._address.file_trouble()
        if file_trouble:
            advice = "check the path, and that this user may read it"
            reason = file_trouble
        elif isinstance(error, ssl.SSLCertVerificationError):
            advice = "check sslrootcert, and that the certificate names the host of the url"
        elif isinstance(error, ssl.SSLError):
            advice = "check the files of sslrootcert, sslcert, sslkey and sslcrl"
        elif "rejected SSL upgrade" in reason:
            advice = "turn ssl on there, or allow sslmode=prefer in the url"
        elif isinstance(error, asyncpg.TargetServerAttributeNotMatched):
            advice = "check target_session_attrs and the hosts of the url"
        elif isinstance(error, asyncpg.ClientConfigurationError):
            advice = "name the file with sslrootcert=…, or take sslrootcert=system"
        else:
            advice = "Check that it runs, and host and port, and try again"
            return f"PostgreSQL at {self._place} does not answer: {reason}. {advice}"
        return f"PostgreSQL at {self._place} cannot be reached: {reason}: {advice}"

    def _measurement(self, record: asyncpg.Record) -> Measurement:
        timestamp, mean, std_dev, raw_id = record
        number = NO_PAYLOAD.int if raw_id is None else raw_id.int
        try:
            return Measurement(timestamp, mean, std_dev, UUID(int=number))
        except (AttributeError, TypeError, ValueError) as error:
            raise BackendError(
                f"PostgreSQL at {self._place} has a row {record!r} that is no measurement: "
                f"delete it ({error})"
            ) from error


def _words(error: asyncpg.PostgresError) -> str:
    """Return what the server said, or asyncpg in its place, in one line."""
    parts = [error.message or str(error), error.detail and f"DETAIL: {error.detail}", error.hint]
    return " ".join(" ".join(filter(None, parts)).split())


async def _leave_as_is(connection: object) -> None:
    """Do nothing when a connection returns: no statement here changes its state.

    asyncpg would spend a round trip on a reset that some compatible databases do not know.
    """
