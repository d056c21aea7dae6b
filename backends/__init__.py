"""What a row is, what a backend promises, and how one is chosen by its name.

A backend keeps one row per timestamp or, with series, per series and timestamp. Dropzone calls it
from one event loop; several processes may use the same database at once.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from math import isclose, isfinite
from operator import attrgetter
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
    "Series",
    "contest",
    "create_backend",
    "edges",
    "following",
    "json_of",
    "page_texts",
    "paired",
    "require_fitting",
    "require_storable",
    "require_utc",
    "same",
    "timestamp_text",
    "unhurried",
    "window",
    "window_of_all",
    "winners",
]

T = TypeVar("T")

_SERIES, _TIMESTAMP = attrgetter("series"), attrgetter("timestamp_utc")
_PLACE, _TIME_AND_SERIES = (
    attrgetter("series", "timestamp_utc"),
    attrgetter("timestamp_utc", "series"),
)

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
    """No row has this timestamp, or none of this series has."""


class Measurement(msgspec.Struct, frozen=True, omit_defaults=True):
    """One row: the statistics of one payload.

    `timestamp_utc` is aware, at UTC, in years 1 to 9999, to the microsecond. `mean` and `std_dev`
    are finite and in the payload's own unit, `std_dev` not negative. `raw_id` names the payload.
    Raises ValueError for anything else. `series` names the row's series, "" where there is but one;
    then it is left out of what msgspec makes of a row.
    """

    timestamp_utc: datetime
    mean: float
    std_dev: float
    raw_id: UUID
    series: str = ""

    def __post_init__(self) -> None:
        require_utc(self.timestamp_utc)
        if not isfinite(self.mean):
            raise ValueError(f"mean is {self.mean}: give a finite number")
        if not (isfinite(self.std_dev) and self.std_dev >= 0):
            raise ValueError(f"std_dev is {self.std_dev}: give a finite number, 0 or greater")


class Series(msgspec.Struct, frozen=True):
    """A series that has at least one row, and the timestamp of its last."""

    series: str
    last: datetime


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

    A backend that is made with `series=True` keeps one row for each series and timestamp. Without,
    it keeps one for each timestamp, all of the series ""; it may then do without the method
    `series` and the arguments `series` and `after_series`, which it is not given. Series are
    ordered by the code points of their names, as Python orders texts.
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

    async def upsert(self, measurements: Sequence[Measurement]) -> int | None:
        """Write all of `measurements` or, when it raises, none; durable on return.

        For each series and timestamp the row with the greatest `raw_id` stands, whichever call
        comes first. The same `raw_id` again overwrites its row. A batch may be empty, in any order,
        and hold one timestamp many times; of several with one `raw_id`, the last stands.

        Returns how many of `measurements` met the row of another payload with other statistics, in
        the table or among `measurements`, one after another, whichever of the two stands now. A row
        that is older than Dropzone is no payload's. What another call is just writing may be
        missed. A backend of one's own that does not count returns None.

        Raises BackendError for a series that no database holds as text, see `require_storable`, and
        BackendUnavailable for one that has a name where the backend was made without `series`.
        """

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """Delete the rows that have the series, timestamp and raw_id of one of `measurements`.

        All of them or, when it raises, none; durable on return. A timestamp whose row names another
        raw_id by now keeps it, so that a later arrival is never deleted.
        """

    async def get(self, timestamp_utc: datetime, series: str = "") -> Measurement:
        """Return the row of this series and timestamp, or raise MeasurementNotFound."""

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
        """Return at most `limit` rows of `series`, None: of all, with `since <= timestamp < until`.

        They are ordered by timestamp, then series, the earliest first, or with `descending` the
        other way round in both. `after` is an exclusive cursor: only rows that follow this
        timestamp in that order or, with `after_series`, this pair. Pass those of the last row of
        one page to get the next. Raises ValueError for a negative `limit`, and for `after_series`
        without `after`.
        """

    async def count(self, *, series: str | None = None) -> int:
        """Return the number of rows of `series`, None: of all."""

    async def summarize(
        self,
        *,
        series: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        buckets: int = 100,
    ) -> list[Bucket]:
        """Return what `since <= timestamp_utc < until` holds, in `buckets` spans of equal length.

        They are in order of time, and those without a row are left out. Without a bound the spans
        begin at the first row of `series`, None: of all, or end at the last. Raises ValueError for
        less than one bucket.
        """

    async def series(self, *, after: str | None = None, limit: int = 100) -> list[Series]:
        """Return at most `limit` series that have rows, those behind `after`, ordered by name.

        It takes time for each of them, and not for their rows. Raises ValueError for a negative
        `limit`.
        """


def create_backend(name: str, **options: object) -> Backend:
    """Make the backend `name`: memory, sqlite, postgres, or `package.module:Class` of one's own.

    `options` are handed to its class; `series=True` asks for one that keeps series. Nothing is
    opened; a module is imported only when it is chosen. Raises ValueError with what to do where
    there is no such backend.
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
    needed = [name for name in _METHODS if name != "series" or options.get("series")]
    if missing := [method for method in needed if not callable(getattr(backend, method, None))]:
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


def winners(measurements: Sequence[Measurement]) -> list[Measurement]:
    """Return the row that stands for each series and timestamp, ordered by both.

    One order for everybody keeps concurrent upserts from waiting for each other in a circle, and
    PostgreSQL refuses a statement that would touch one row twice.
    """
    return contest(measurements)[0]


def contest(
    measurements: Sequence[Measurement], table: Sequence[Measurement] = ()
) -> tuple[list[Measurement], int]:
    """Return the `winners` of both, and how many of `measurements` `Backend.upsert` has to count.

    `table` has the rows that stood before for their series and timestamps.
    """
    place_of = _PLACE if any(map(_SERIES, measurements)) else _TIMESTAMP
    places = [*map(place_of, measurements)]
    standing = dict(zip(places, measurements, strict=True))
    superseded = 0
    if table or len(standing) < len(places):  # which is rare
        standing = {place_of(row): row for row in table}
        for place, measurement in zip(places, measurements, strict=True):
            rival = standing.get(place)
            superseded += rival is not None and _are_rivals(measurement, rival)
            if rival is None or measurement.raw_id >= rival.raw_id:
                standing[place] = measurement
    return [standing[place] for place in sorted(standing)], superseded


def _are_rivals(one: Measurement, other: Measurement) -> bool:
    return (one.mean, one.std_dev) != (other.mean, other.std_dev) and (
        other.raw_id not in (one.raw_id, NO_PAYLOAD)
    )


def require_fitting(measurements: Sequence[Measurement], *, series: bool) -> None:
    """Raise what `Backend.upsert` does where a backend, with or without series, takes no such rows.

    It is the same for all of one's own that are like these.
    """
    if series:
        require_storable(map(_SERIES, measurements))
    elif any(map(_SERIES, measurements)):
        name = next(filter(None, map(_SERIES, measurements)))
        raise BackendUnavailable(
            f"rows of series such as {name!r} need a backend that is made with series=True"
        )


def require_storable(series: Iterable[str]) -> None:
    """Raise BackendError for what a database does not hold as text: NUL, half a surrogate pair."""
    together = "".join(series)
    try:
        together.encode()
    except UnicodeEncodeError as error:
        raise BackendError(f"the name of a series is no text: {error}") from error
    if "\0" in together:
        raise BackendError("the name of a series has the character NUL, which is no text")


async def paired(
    one: Backend,
    other: Backend,
    since: datetime | None = None,
    until: datetime | None = None,
    *,
    series: str | None = None,
) -> AsyncIterator[tuple[Measurement | None, Measurement | None]]:
    """Yield the rows of each timestamp and series in two backends, None where one has none.

    Both are read side by side, a page at a time, in order of timestamp, then series, or the rows
    of one series alone.
    """
    rows, others = (_all_rows(backend, since, until, series) for backend in (one, other))
    row, rival = await anext(rows, None), await anext(others, None)
    while row or rival:
        if rival is None or (row and _TIME_AND_SERIES(row) < _TIME_AND_SERIES(rival)):
            yield row, None
            row = await anext(rows, None)
        elif row is None or _TIME_AND_SERIES(rival) < _TIME_AND_SERIES(row):
            yield None, rival
            rival = await anext(others, None)
        else:
            yield row, rival
            row, rival = await anext(rows, None), await anext(others, None)


async def _all_rows(
    backend: Backend, since: datetime | None, until: datetime | None, series: str | None
) -> AsyncIterator[Measurement]:
    find = partial(_find_of(backend, series), since=since, until=until, limit=PAGE)
    knows_series = callable(getattr(backend, "series", None))
    page = await find()
    while page:
        for row in page:
            yield row
        after, after_series = _TIME_AND_SERIES(page[-1])
        if knows_series:
            page = await find(after=after, after_series=after_series)
        else:
            page = await find(after=after)


def _find_of(backend: Backend, series: str | None) -> Callable[..., Awaitable[list[Measurement]]]:
    """Return `find` of a series; a backend of one's own may not have that argument."""
    return backend.find if series is None else partial(backend.find, series=series)


def same(one: Measurement, other: Measurement) -> bool:
    """Say whether two rows are the same but for the rounding of another machine's arithmetic."""
    return (
        (_TIME_AND_SERIES(one), one.raw_id) == (_TIME_AND_SERIES(other), other.raw_id)
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
    after_series: str | None = None,
    series: str = "",
) -> tuple[datetime | None, datetime | None]:
    """Return the arguments of `find` for one series as one half-open range, None: without bound.

    Folding the cursor into the range lets an index start at the page, however deep it lies.
    """
    for timestamp in filter(None, (since, until, after)):
        require_utc(timestamp)
    if limit < 0:
        raise ValueError(f"limit is {limit}: give 0 or more")
    _require_whole(after, after_series)
    if after is None:
        return since, until
    follows = after_series is not None and _follows(series, after_series, descending=descending)
    if follows == descending and after == LATEST:
        return (since, until) if descending else (LATEST, LATEST)
    edge = after + RESOLUTION if follows == descending else after
    if descending:
        return since, edge if until is None else min(until, edge)
    return edge if since is None else max(since, edge), until


def _follows(series: str, other: str, *, descending: bool) -> bool:
    return series < other if descending else series > other


def window_of_all(
    since: datetime | None,
    until: datetime | None,
    after: datetime | None,
    limit: int,
    *,
    descending: bool,
    after_series: str | None = None,
) -> tuple[tuple[datetime | None, str], tuple[datetime | None, str]]:
    """Do the same for the rows of all series, between two pairs of timestamp and series."""
    _require_whole(after, after_series)
    low, high = window(since, until, after, limit, descending=descending)
    if after is None or after_series is None:
        return (low, ""), (high, "")
    if descending:
        return (low, ""), (after, after_series) if until is None or after < until else (until, "")
    low = after if since is None else max(since, after)
    return (low, following(after_series) if low == after else ""), (until, "")


def _require_whole(after: datetime | None, after_series: str | None) -> None:
    if after is None and after_series is not None:
        raise ValueError("after_series is one half of the cursor: give after, too")


def page_texts(
    since: datetime | None,
    until: datetime | None,
    after: datetime | None,
    limit: int,
    *,
    descending: bool,
    after_series: str | None,
    series: str | None,
    has_series: bool,
) -> tuple[list[str | None], list[str]]:
    """Return the arguments of `find` as the texts that a database compares.

    First the two bounds, then, in a table with series, the name of the one that is asked for, or
    the series at the bounds where all are.
    """
    if has_series and series is None:
        (low, low_series), (high, high_series) = window_of_all(
            since, until, after, limit, descending=descending, after_series=after_series
        )
        names = [low_series, high_series]
    else:
        low, high = window(
            since,
            until,
            after,
            limit,
            descending=descending,
            after_series=after_series,
            series=series or "",
        )
        names = [series or ""] if has_series else []
    require_storable(names)
    return [None if bound is None else timestamp_text(bound) for bound in (low, high)], names


def following(series: str) -> str:
    """Return the text that is next to `series` in the order of those without NUL."""
    return f"{series}\x01"


async def edges(
    backend: Backend,
    since: datetime | None,
    until: datetime | None,
    buckets: int,
    series: str | None = None,
) -> list[tuple[datetime, datetime | None]]:
    """Return the half-open spans of `summarize`, none where there is no row; None: without end."""
    if buckets < 1:
        raise ValueError(f"buckets is {buckets}: give 1 or more")
    find = partial(_find_of(backend, series), since=since, until=until, limit=1)
    first = await find()
    last = await find(descending=True)
    if not (first and last):
        return []
    low = since or first[0].timestamp_utc
    steps = ((until or last[0].timestamp_utc) - low) // RESOLUTION
    starts = [low + steps * n // buckets * RESOLUTION for n in range(buckets)]
    return list(zip(starts, [*starts[1:], until], strict=True))


_METHODS = [name for name in vars(Backend) if not name.startswith("_")]
