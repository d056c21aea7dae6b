"""Rows in PostgreSQL, or a database that speaks its protocol: a pool, one statement a call."""

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from functools import partial
from time import monotonic
from typing import TypeAlias, cast
from uuid import UUID

import asyncpg

from backends import (
    NO_PAYLOAD,
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
    timestamp_text,
)
from backends.postgres_statements import (
    ALIVE,
    CHANGE_TO_MANY,
    CHANGE_TO_ONE,
    COLUMNS_OF_ONE,
    COUNT,
    COUNT_OF_SERIES,
    DEFAULT,
    DISTRIBUTED_MANY,
    DISTRIBUTED_ONE,
    FIND_OF_ALL,
    FIND_OF_SERIES,
    FIND_ONE,
    FORGET_MADE_UP,
    KEY_OF_MANY,
    KEY_OF_ONE,
    LOCK,
    MANY,
    OLDER_COLUMNS,
    ONE,
    PING,
    PRIMARY_KEY,
    RAW_ID_COLUMN,
    SERIES_COLUMN,
    TAKE_OVER,
    TYPES_OF_MANY,
    TYPES_OF_ONE,
    descending_of,
    in_one_line,
    of_series,
)
from backends.postgres_url import EXAMPLE, Address, read_url

log = logging.getLogger(__name__)

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
NAMES = {"timestamp_utc", "mean", "std_dev", "raw_id", "series"}

Pool: TypeAlias = "asyncpg.Pool[asyncpg.Record]"
Connection: TypeAlias = "asyncpg.pool.PoolConnectionProxy[asyncpg.Record]"
Records: TypeAlias = "list[asyncpg.Record]"
Columns: TypeAlias = Sequence[Sequence[object]]
Ask: TypeAlias = Callable[[Connection, float], Awaitable[Records]]
Write: TypeAlias = Callable[[Columns, Connection, float], Awaitable[Records]]


class _NotAllNew(Exception):
    """An upsert met rows: it is taken back, to look at them first."""


class PostgresBackend:
    """A Backend in the database at `url`, reached through at most `pool` connections.

    `url` is read as libpq does. Behind a pooler such as PgBouncer no statement outlives its
    transaction. `pool` can also be an asyncpg pool, then without `url`; it is never closed here,
    and behind a pooler it has to be made with `statement_cache_size=0`.

    With BackendUnavailable ends waiting for a connection after `connect_timeout` seconds, `get`
    and `find` after `read_timeout`, any other call after `command_timeout`; where the connection
    turns out to be dead, all are replaced, and it begins once more. Raises ValueError for a `url`
    that is not one.

    With `series` it keeps one row for each series and timestamp; a table of the other shape is not
    touched. Where the table turns out to be distributed, as by Citus, its statements are others.
    """

    def __init__(
        self,
        url: str | None = None,
        pool: "int | Pool" = 10,
        *,
        connect_timeout: float = 10.0,
        read_timeout: float = 5.0,
        command_timeout: float = 30.0,
        series: bool = False,
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
        self._has_series = series
        self._statements = MANY if series else ONE
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

    async def upsert(self, measurements: Sequence[Measurement]) -> int:
        """See Backend.upsert."""
        require_fitting(measurements, series=self._has_series)
        rows, superseded = contest(measurements)
        columns: list[list[object]] = [
            [timestamp_text(row.timestamp_utc) for row in rows],
            [row.mean for row in rows],
            [row.std_dev for row in rows],
            [row.raw_id for row in rows],
        ]
        if self._has_series:
            columns.append([row.series for row in rows])
        standing = await self._write(self._upsert_in, *columns)
        if not standing:
            return superseded
        table = list[Measurement]()
        for record in standing:
            with suppress(BackendError):  # whatever another program wrote there
                table.append(self._measurement(record))
        return contest(measurements, table)[1]

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.delete."""
        require_fitting(measurements, series=self._has_series)
        columns: list[list[object]] = [
            [timestamp_text(row.timestamp_utc) for row in measurements],
            [row.raw_id for row in measurements],
        ]
        if self._has_series:
            columns.append([row.series for row in measurements])
        await self._write(self._delete_in, *columns)

    async def get(self, timestamp_utc: datetime, series: str = "") -> Measurement:
        """See Backend.get."""
        timestamp = timestamp_text(timestamp_utc)
        rows = await self._read(self._statements.get, timestamp, *self._named(series))
        if not rows or (series and not self._has_series):
            of = f" of {series}" if series else ""
            raise MeasurementNotFound(f"no measurement{of} at {timestamp}")
        return self._measurement(rows[0])

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
        rows = await self._read(descending_of(sql) if descending else sql, *bounds, limit, *names)
        found = [self._measurement(row) for row in rows[:AT_A_TIME]]
        for start in range(AT_A_TIME, len(rows), AT_A_TIME):
            await asyncio.sleep(0)  # so that a large page does not hold up the event loop
            found += map(self._measurement, rows[start : start + AT_A_TIME])
        return found

    async def count(self, *, series: str | None = None) -> int:
        """See Backend.count."""
        if series and not self._has_series:
            return 0
        names = self._named(series)
        sql = COUNT_OF_SERIES if names else COUNT
        return int((await self._read(sql, *names, within=self._command_timeout))[0][0])

    async def summarize(
        self,
        *,
        series: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        buckets: int = 100,
    ) -> list[Bucket]:
        """See Backend.summarize."""
        spans = await edges(self, since, until, buckets, series)
        if not spans:
            return []
        names = self._named(series)
        starts = [timestamp_text(a) for a, _ in spans]
        ends = [timestamp_text(b) if b else "infinity" for _, b in spans]
        summarize = self._statements.summarize
        sql = of_series(summarize) if names else summarize
        rows = await self._read(sql, starts, ends, *names, within=self._command_timeout)
        return [Bucket(*row) for row in rows]

    async def series(self, *, after: str | None = None, limit: int = 100) -> list[Series]:
        """See Backend.series."""
        if limit < 0:
            raise ValueError(f"limit is {limit}: give 0 or more")
        if not self._has_series:
            last = await self.find(limit=min(limit, 1), descending=True)
            return [Series("", row.timestamp_utc) for row in last if after is None]
        first = "" if after is None else following(after)
        require_storable([first])
        found = await self._read(
            self._statements.series, first, limit, within=self._command_timeout
        )
        return [Series(name, last) for name, last in found]

    def _named(self, series: str | None) -> list[str]:
        """Return the argument that names a series, where the statement has one."""
        names = [series] if self._has_series and series is not None else []
        require_storable(names)
        return names

    # ── Asking, again where the connection was the reason ─────────────────────────────────────────

    async def _read(self, sql: str, *arguments: object, within: float | None = None) -> Records:
        def read(connection: Connection, limit: float) -> Awaitable[Records]:
            return connection.fetch(sql, *arguments, timeout=limit)

        async with self._errors():
            return await self._ask(read, within or self._read_timeout)

    async def _write(self, write: Write, *columns: Sequence[object]) -> Records:
        async with self._errors():
            try:
                return await self._ask(partial(write, columns), self._command_timeout)
            except asyncpg.PostgresError as refusal:
                if await self._are_rows_why(refusal, write, columns):
                    raise BackendError(
                        f"PostgreSQL at {self._place} refuses these data: {_words(refusal)}"
                    ) from refusal
                raise

    async def _upsert_in(self, columns: Columns, connection: Connection, within: float) -> Records:
        """Upsert, and return the rows that stood there and are other payloads', if any."""
        sql = self._statements
        if not sql.is_distributed:
            return await connection.fetch(sql.upsert, *columns, timeout=within)
        with suppress(_NotAllNew):
            async with _transaction(connection, within):
                done = await connection.fetch(sql.upsert, *columns, timeout=within)
                if not all(is_new for (is_new,) in done) or len(done) < len(columns[0]):
                    raise _NotAllNew
            return []
        standing = await connection.fetch(sql.look, *columns, timeout=within)
        await connection.fetch(sql.upsert, *columns, timeout=within)
        return standing

    async def _delete_in(self, columns: Columns, connection: Connection, within: float) -> Records:
        sql = self._statements
        if not sql.is_distributed:
            return await connection.fetch(sql.delete, *columns, timeout=within)
        async with _transaction(connection, within):
            await connection.execute(LOCK, timeout=within)
            return await connection.fetch(sql.delete, *columns, timeout=within)

    async def _are_rows_why(
        self, refusal: asyncpg.PostgresError, write: Write, columns: Columns
    ) -> bool:
        """Say whether the database refuses these rows, and not the statement whatever they are."""
        state = refusal.sqlstate or ""
        if state[:2] in OTHER_CLASSES or state in OTHER_STATES or not columns[0]:
            return False
        if state == NO_VALUE and refusal.column_name and refusal.column_name not in NAMES:
            return False
        try:
            await self._ask(partial(write, [[] for _ in columns]), self._command_timeout)
        except asyncpg.PostgresError:
            return False
        return True

    async def _trouble(self) -> str | None:
        [(read_only, table_is_there)] = await self._read(PING, within=self._patience)
        if read_only == "on":
            return ADVICE["25"]
        return None if table_is_there else self._gone_message()

    async def _ask(self, ask: Ask, within: float) -> Records:
        """Ask, and once more in a new session where the old one may be the reason."""
        try:
            return await self._ask_once(ask, within)
        except DEAD_CONNECTION:
            pass
        except asyncpg.FeatureNotSupportedError:
            self._table_is_there = False  # it may have been distributed meanwhile
        except asyncpg.PostgresError as error:
            is_new = monotonic() - self._renewed < RENEWAL
            if is_new or (error.sqlstate or "")[:2] not in SESSION_CLASSES:
                raise
        await self._renew()
        return await self._ask_once(ask, within)

    async def _ask_once(self, ask: Ask, within: float) -> Records:
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
                records = await ask(connection, within)
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
            types = await self._column_types(connection, self._statements.columns)
        except asyncpg.UndefinedTableError:
            # Another process that creates it at the same moment makes IF NOT EXISTS fail.
            with suppress(*CREATED_BY_ANOTHER):
                create = ";".join(self._statements.create)
                await connection.execute(create, timeout=self._command_timeout)
            types = await self._column_types(connection, self._statements.columns)
        except asyncpg.UndefinedColumnError as error:
            raise BackendUnavailable(await self._fault(connection, _words(error))) from error
        if types != self._statements.types:
            columns = f"its columns are {', '.join(types)}"
            raise BackendUnavailable(await self._fault(connection, columns))
        default = await connection.fetchval(DEFAULT, timeout=self._command_timeout)
        if default and str(NO_PAYLOAD) not in default:
            raise BackendUnavailable(self._made_up_message(default))
        await self._choose_statements(connection)
        nothing: Columns = [[] for _ in self._statements.types]
        try:
            await self._upsert_in(nothing, connection, self._command_timeout)
        except asyncpg.InvalidColumnReferenceError as error:  # there is no such key
            raise BackendUnavailable(await self._fault(connection, _words(error))) from error

    async def _choose_statements(self, connection: Connection) -> None:
        """Take those of a distributed table where the server refuses one of the others."""
        plain, distributed = (
            (MANY, DISTRIBUTED_MANY) if self._has_series else (ONE, DISTRIBUTED_ONE)
        )
        try:
            await connection.fetch(plain.summarize, [], [], timeout=self._command_timeout)
        except asyncpg.FeatureNotSupportedError:
            self._statements = distributed
        else:
            self._statements = plain

    async def _column_types(self, connection: Connection, sql: str) -> list[str]:
        statement = await connection.prepare(sql, name="", timeout=self._command_timeout)
        # Until it is carried out, it keeps a lock on the table that nobody could alter then.
        await statement.fetch(timeout=self._command_timeout)
        return [attribute.type.name for attribute in statement.get_attributes()]

    async def _fault(self, connection: Connection, words: str) -> str:
        """Say how the table comes to the shape that is wanted, with what is there."""
        key = await connection.fetchrow(PRIMARY_KEY, timeout=self._command_timeout)
        name, columns = key or ("", "")
        steps = list[str]()
        if not await self._has(connection, COLUMNS_OF_ONE, TYPES_OF_ONE):
            is_older = await self._has(connection, OLDER_COLUMNS, TYPES_OF_ONE[:3])
            if not is_older or await self._has(connection, RAW_ID_COLUMN, None):
                return self._shape_message(words)
            steps.append(TAKE_OVER)
        if columns == KEY_OF_ONE and self._has_series:
            if await self._has(connection, SERIES_COLUMN, None):
                return self._shape_message(words)
            steps.append(CHANGE_TO_MANY.format(key=name))
        elif columns == KEY_OF_MANY and not self._has_series:
            steps.append(CHANGE_TO_ONE)
        elif columns == KEY_OF_MANY and not await self._has(
            connection, SERIES_COLUMN, TYPES_OF_MANY[-1:]
        ):
            return self._shape_message(words)
        if not steps or (self._has_series and columns not in (KEY_OF_ONE, KEY_OF_MANY)):
            return self._shape_message(words)
        if steps == [TAKE_OVER]:
            return self._older_message()
        return self._other_shape_message(steps)

    async def _has(self, connection: Connection, sql: str, types: list[str] | None) -> bool:
        """Say whether the table has these columns, of these types or, None, of any."""
        try:
            found = await self._column_types(connection, sql)
        except asyncpg.UndefinedColumnError:
            return False
        return types in (None, found)

    def _other_shape_message(self, steps: list[str]) -> str:
        if self._has_series:
            words = "of a single series. To keep it, leave series unset; to let it have many, run"
        else:
            words = (
                "with many series. To keep it, set series; to have one of them alone, in which the "
                "latest arrival for a timestamp stands, run"
            )
        return (
            f"PostgreSQL at {self._place} has a table measurements {words}: {in_one_line(*steps)}; "
            "and then rebuild"
        )

    def _shape_message(self, reason: str) -> str:
        return (
            f"PostgreSQL at {self._place} has a table measurements of another shape ({reason}): "
            "rename it, or choose another database or schema. Expected: "
            f"{self._statements.create_line}"
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
                f"where the table is missing, create it: {self._statements.create_line}"
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
        timestamp, mean, std_dev, raw_id, *series = record
        number = NO_PAYLOAD.int if raw_id is None else raw_id.int
        try:
            return Measurement(timestamp, mean, std_dev, UUID(int=number), *series)
        except (AttributeError, TypeError, ValueError) as error:
            raise BackendError(
                f"PostgreSQL at {self._place} has a row {record!r} that is no measurement: "
                f"delete it ({error})"
            ) from error


def _words(error: asyncpg.PostgresError) -> str:
    """Return what the server said, or asyncpg in its place, in one line."""
    parts = [error.message or str(error), error.detail and f"DETAIL: {error.detail}", error.hint]
    return " ".join(" ".join(filter(None, parts)).split())


@asynccontextmanager
async def _transaction(connection: Connection, within: float) -> AsyncIterator[None]:
    """Commit what is done inside, or take it back; asyncpg's own has no time limit for either."""
    await connection.execute("BEGIN", timeout=within)
    try:
        yield
        await connection.execute("COMMIT", timeout=within)
    except BaseException:
        try:
            await connection.execute("ROLLBACK", timeout=PATIENCE)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            connection.terminate()
        raise


async def _leave_as_is(connection: object) -> None:
    """Do nothing when a connection returns: no statement here changes its state.

    asyncpg would spend a round trip on a reset that some compatible databases do not know.
    """
