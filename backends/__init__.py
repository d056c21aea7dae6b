"""What a row is, what a backend promises, and how one is chosen by its name.

A backend keeps one row per timestamp. Dropzone calls it from one event loop; several processes
may use the same database at once.
"""

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from importlib import import_module
from math import isclose, isfinite
from sys import float_info
from time import sleep
from typing import Any, Protocol, TypeVar, cast
from uuid import UUID

import msgspec

__all__ = [
    "NO_PAYLOAD",
    "Backend",
    "BackendError",
    "BackendUnavailable",
    "Bucket",
    "Measurement",
    "MeasurementNotFound",
    "create_backend",
    "edges",
    "json_of",
    "paired",
    "require_utc",
    "same",
    "timestamp_text",
    "unhurried",
    "window",
    "winners",
]

T = TypeVar("T")

BUILT_IN = {
    "memory": f"{__name__}.memory:MemoryBackend",
    "sqlite": f"{__name__}.sqlite:SqliteBackend",
    "postgres": f"{__name__}.postgres:PostgresBackend",
}
RESOLUTION = timedelta(microseconds=1)
PAGE = 10_000  # rows that are read at a time to compare two backends
AT_A_TIME = 500  # rows for which a thread works before it gives way
GIVING_WAY = 0.0005  # seconds
ROUNDING = 2**-49  # eight units in the last place
SMALLEST = 2**-1071  # eight times the smallest double
LATEST = datetime.max.replace(tzinfo=UTC)
NO_PAYLOAD = UUID(int=0)  # the raw_id of a row that is older than Dropzone


class BackendError(Exception):
    """The backend refused these very data; the same call would be refused again."""


class BackendUnavailable(BackendError):
    """The data are not the reason: repeat the call later, or once the message's advice is done."""


class MeasurementNotFound(BackendError, LookupError):
    """No row has this timestamp."""


class Measurement(msgspec.Struct, frozen=True):
    """One row: the statistics of one payload.

    `timestamp_utc` is aware, at UTC, in years 1 to 9999, to the microsecond. `mean` and `std_dev`
    are finite and in the payload's own unit, `std_dev` not negative. `raw_id` names the payload.
    Raises ValueError for anything else.
    """

    timestamp_utc: datetime
    mean: float
    std_dev: float
    raw_id: UUID

    def __post_init__(self) -> None:
        require_utc(self.timestamp_utc)
        if not isfinite(self.mean):
            raise ValueError(f"mean is {self.mean}: give a finite number")
        if not (isfinite(self.std_dev) and self.std_dev >= 0):
            raise ValueError(f"std_dev is {self.std_dev}: give a finite number, 0 or greater")


class Bucket(msgspec.Struct, frozen=True):
    """What a span of time holds, at least one row: the timestamps of the first and the last.

    `mean` lies between `min_mean` and `max_mean`; it and `std_dev` are the means over the rows, to
    rounding. Means and deviations beyond 1e290 may count as less in them.
    """

    first: datetime
    last: datetime
    count: int
    min_mean: float
    max_mean: float
    mean: float
    std_dev: float

    def __post_init__(self) -> None:
        mean = min(max(self.mean, self.min_mean), self.max_mean)
        msgspec.structs.force_setattr(self, "mean", mean)
        msgspec.structs.force_setattr(self, "std_dev", min(self.std_dev, float_info.max))


class Backend(Protocol):
    """Where measurements are kept.

    Every method but `close` opens the backend first where that has not succeeded yet, so that a
    service which started while its database was down recovers by itself. Every method may raise
    BackendUnavailable (try again later: whatever is wrong with the database or the way to it) or
    BackendError (these data are refused); a driver's own exceptions are their cause and never get
    out. No message, repr or cause shows a password. Timestamps are aware and at UTC; any other
    raises ValueError.
    """

    async def open(self) -> None:
        """Connect, and create the table where it is missing.

        Idempotent, also while another process opens the same database. Raises BackendUnavailable
        where it cannot be reached, or has a table `measurements` of another shape.
        """

    async def close(self) -> None:
        """Let go of all connections, but never of a pool that was handed in. Idempotent."""

    async def ping(self) -> None:
        """Make one round trip to the database, or raise."""

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        """Write all of `measurements` or, when it raises, none; durable on return.

        For each timestamp the row with the greatest `raw_id` stands, whichever call comes first.
        The same `raw_id` again overwrites its row. A batch may be empty, in any order, and hold
        one timestamp many times; of several with one `raw_id`, the last stands.
        """

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """Delete the rows that name the timestamp and the raw_id of one of `measurements`.

        All of them or, when it raises, none; durable on return. A timestamp whose row names another
        raw_id by now keeps it, so that a later arrival is never deleted.
        """

    async def get(self, timestamp_utc: datetime) -> Measurement:
        """Return the row of this timestamp, or raise MeasurementNotFound."""

    async def find(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        after: datetime | None = None,
        limit: int = 100,
        descending: bool = False,
    ) -> list[Measurement]:
        """Return at most `limit` rows with `since <= timestamp_utc < until`.

        They are ordered by timestamp, the earliest first, or with `descending` the latest.
        `after` is an exclusive cursor: only rows that follow it in that order. Pass the last
        timestamp of one page to get the next. Raises ValueError for a negative `limit`.
        """

    async def count(self) -> int:
        """Return the number of rows."""

    async def summarize(
        self, *, since: datetime | None = None, until: datetime | None = None, buckets: int = 100
    ) -> list[Bucket]:
        """Return what `since <= timestamp_utc < until` holds, in `buckets` spans of equal length.

        They are in order of time, and those without a row are left out. Without a bound the spans
        begin at the first row, or end at the last. Raises ValueError for less than one bucket.
        """


def create_backend(name: str, **options: object) -> Backend:
    """Make the backend `name`: memory, sqlite, postgres, or `package.module:Class` of one's own.

    `options` are handed to its class. Nothing is opened; a module is imported only when it is
    chosen. Raises ValueError with what to do where there is no such backend.
    """
    module, _, attribute = BUILT_IN.get(name, name).partition(":")
    if not (module and attribute):
        known = ", ".join(BUILT_IN)
        raise ValueError(f"no backend is called {name!r}: choose {known} or package.module:Class")
    try:
        factory = getattr(import_module(module), attribute)
    except Exception as error:  # a module can fail in any way
        raise ValueError(
            f"backend {name!r} cannot be imported: {error}. Install its package, "
            f"and check that {module} is importable and has {attribute}"
        ) from error
    try:
        backend = factory(**options)
    except TypeError as error:
        raise ValueError(f"backend {name!r} does not accept its options: {error}") from error
    if missing := [method for method in _METHODS if not callable(getattr(backend, method, None))]:
        raise ValueError(f"backend {name!r} lacks {', '.join(missing)}: see {Backend.__module__}")
    return cast("Backend", backend)


def require_utc(timestamp: datetime) -> datetime:
    """Return `timestamp`; raise ValueError unless it is aware and at UTC."""
    if timestamp.utcoffset() != timedelta(0):
        raise ValueError(f"{timestamp.isoformat()} is not at UTC: use astimezone(timezone.utc)")
    return timestamp


def timestamp_text(timestamp: datetime) -> str:
    """Return the ISO 8601 form of one width, whose alphabetical order is the order of time.

    Raises ValueError unless `timestamp` is at UTC.
    """
    text: str = msgspec.to_builtins(require_utc(timestamp))  # three times as fast as `isoformat`
    return text if timestamp.microsecond else f"{text[:19]}.000000Z"


def json_of(value: object) -> bytes:
    """Return the JSON of what leaves Dropzone, its timestamps in the form of `timestamp_text`.

    msgspec leaves out a fraction of zero, and readers such as pandas take a column of two widths
    for text. Raises ValueError for a timestamp that is not at UTC.
    """
    plain = [msgspec.to_builtins(value, builtin_types=(datetime, UUID))]
    _write_timestamps(plain, enumerate(plain))
    return msgspec.json.encode(plain[0])


def _write_timestamps(inside: Any, members: Iterable[tuple[Any, object]]) -> None:
    """Put texts in the places of timestamps; rows are many, so that no copy is made of them."""
    for place, member in members:
        kind = type(member)
        if kind is datetime:
            inside[place] = timestamp_text(cast("datetime", member))
        elif kind is dict:
            _write_timestamps(member, cast("dict[str, object]", member).items())
        elif kind is list:
            _write_timestamps(member, enumerate(cast("list[object]", member)))


def unhurried(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield a few rows at a time, and let other threads have the interpreter in between.

    An event loop that waits for it would otherwise get it every five milliseconds at best.
    """
    for start in range(0, len(rows), AT_A_TIME):
        if start:
            sleep(GIVING_WAY)
        yield rows[start : start + AT_A_TIME]


def winners(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Return the row that stands for each timestamp, ordered by timestamp.

    One order for everybody keeps concurrent upserts from waiting for each other in a circle, and
    PostgreSQL refuses a statement that would touch one row twice.
    """
    standing: dict[datetime, Measurement] = {}
    for measurement in measurements:
        rival = standing.get(measurement.timestamp_utc)
        if rival is None or measurement.raw_id >= rival.raw_id:
            standing[measurement.timestamp_utc] = measurement
    return [standing[timestamp] for timestamp in sorted(standing)]


async def paired(
    one: Backend, other: Backend, since: datetime | None = None, until: datetime | None = None
) -> AsyncIterator[tuple[Measurement | None, Measurement | None]]:
    """Yield the rows of each timestamp in two backends, None where one of them has none.

    Both are read side by side, a page at a time, in order of timestamp.
    """
    rows, others = (_all_rows(backend, since, until) for backend in (one, other))
    row, rival = await anext(rows, None), await anext(others, None)
    while row or rival:
        if rival is None or (row and row.timestamp_utc < rival.timestamp_utc):
            yield row, None
            row = await anext(rows, None)
        elif row is None or rival.timestamp_utc < row.timestamp_utc:
            yield None, rival
            rival = await anext(others, None)
        else:
            yield row, rival
            row, rival = await anext(rows, None), await anext(others, None)


async def _all_rows(
    backend: Backend, since: datetime | None, until: datetime | None
) -> AsyncIterator[Measurement]:
    after = None
    while page := await backend.find(since=since, until=until, after=after, limit=PAGE):
        for row in page:
            yield row
        after = page[-1].timestamp_utc


def same(one: Measurement, other: Measurement) -> bool:
    """Say whether two rows are the same but for the rounding of another machine's arithmetic."""
    return (
        (one.timestamp_utc, one.raw_id) == (other.timestamp_utc, other.raw_id)
        and isclose(one.mean, other.mean, rel_tol=ROUNDING, abs_tol=SMALLEST)
        and isclose(one.std_dev, other.std_dev, rel_tol=ROUNDING, abs_tol=SMALLEST)
    )


def window(
    since: datetime | None,
    until: datetime | None,
    after: datetime | None,
    limit: int,
    *,
    descending: bool,
) -> tuple[datetime | None, datetime | None]:
    """Return the arguments of `find` as one half-open range, None meaning without bound.

    Folding the cursor into the range lets an index start at the page, however deep it lies.
    """
    for timestamp in filter(None, (since, until, after)):
        require_utc(timestamp)
    if limit < 0:
        raise ValueError(f"limit is {limit}: give 0 or more")
    if after is None:
        return since, until
    if descending:
        return since, after if until is None else min(until, after)
    if after == LATEST:
        return LATEST, LATEST
    following = after + RESOLUTION
    return following if since is None else max(since, following), until


async def edges(
    backend: Backend, since: datetime | None, until: datetime | None, buckets: int
) -> list[tuple[datetime, datetime | None]]:
    """Return the half-open spans of `summarize`, none where there is no row; None: without end."""
    if buckets < 1:
        raise ValueError(f"buckets is {buckets}: give 1 or more")
    first = await backend.find(since=since, until=until, limit=1)
    last = await backend.find(since=since, until=until, limit=1, descending=True)
    if not (first and last):
        return []
    low = since or first[0].timestamp_utc
    steps = ((until or last[0].timestamp_utc) - low) // RESOLUTION
    starts = [low + steps * n // buckets * RESOLUTION for n in range(buckets)]
    return list(zip(starts, [*starts[1:], until], strict=True))


_METHODS = [name for name in vars(Backend) if not name.startswith("_")]
