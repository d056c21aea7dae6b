"""Rows in a dictionary, for tests and for embedding: gone when the process ends."""

from bisect import bisect_left
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from statistics import fmean

from backends import (
    Bucket,
    Measurement,
    MeasurementNotFound,
    Series,
    contest,
    edges,
    require_fitting,
    require_utc,
    timestamp_text,
    window_of_all,
)

LARGEST = 1e290  # in a sum that must not overflow
Place = tuple[datetime, str]


class MemoryBackend:
    """A Backend that holds its rows as long as the object lives; `close` keeps them."""

    def __init__(self, *, series: bool = False) -> None:
        self._has_series = series
        self._rows: dict[Place, Measurement] = {}
        self._places: list[Place] = []

    def __repr__(self) -> str:
        return f"MemoryBackend({len(self._rows)} rows)"

    async def open(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def close(self) -> None:
        """Do nothing: there is nothing to let go of."""

    async def ping(self) -> None:
        """Do nothing: memory answers."""

    async def upsert(self, measurements: Sequence[Measurement]) -> int:
        """See Backend.upsert; durable as long as the object lives."""
        require_fitting(measurements, series=self._has_series)
        places = {_place(row) for row in measurements}
        rows = [self._rows[place] for place in places if place in self._rows]
        standing, superseded = contest(measurements, rows)
        self._rows.update((_place(row), row) for row in standing)
        return superseded

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.delete."""
        require_fitting(measurements, series=self._has_series)
        for timestamp in [row.timestamp_utc for row in measurements]:
            require_utc(timestamp)
        for measurement in measurements:
            standing = self._rows.get(_place(measurement))
            if standing and standing.raw_id == measurement.raw_id:
                del self._rows[_place(measurement)]
                self._places = []

    async def get(self, timestamp_utc: datetime, series: str = "") -> Measurement:
        """See Backend.get."""
        try:
            return self._rows[require_utc(timestamp_utc), series]
        except KeyError:
            of = f" of {series}" if series else ""
            text = timestamp_text(timestamp_utc)
            raise MeasurementNotFound(f"no measurement{of} at {text}") from None

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
        (low, low_series), (high, high_series) = window_of_all(
            since, until, after, limit, descending=descending, after_series=after_series
        )
        places = self._ordered()
        first = 0 if low is None else bisect_left(places, (low, low_series))
        end = len(places) if high is None else bisect_left(places, (high, high_series))
        numbers = range(first, end)[::-1] if descending else range(first, end)
        of_series = (n for n in numbers if series is None or places[n][1] == series)
        return [self._rows[places[number]] for number in islice(of_series, limit)]

    async def count(self, *, series: str | None = None) -> int:
        """See Backend.count."""
        return sum(series is None or place[1] == series for place in self._rows)

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
        every = len(self._rows)
        found = [await self.find(series=series, since=a, until=b, limit=every) for a, b in spans]
        return [_bucket(rows) for rows in found if rows]

    async def series(self, *, after: str | None = None, limit: int = 100) -> list[Series]:
        """See Backend.series."""
        if limit < 0:
            raise ValueError(f"limit is {limit}: give 0 or more")
        last = {series: timestamp for timestamp, series in self._ordered()}
        names = sorted(name for name in last if after is None or name > after)
        return [Series(name, last[name]) for name in names[:limit]]

    def _ordered(self) -> list[Place]:
        # `delete` forgets this list: equal lengths mean that nothing was added since the last sort.
        if len(self._places) != len(self._rows):
            self._places = sorted(self._rows)
        return self._places


def _place(row: Measurement) -> Place:
    return row.timestamp_utc, row.series


def _bucket(rows: Sequence[Measurement]) -> Bucket:
    means = [row.mean for row in rows]
    return Bucket(
        rows[0].timestamp_utc,
        rows[-1].timestamp_utc,
        len(rows),
        min(means),
        max(means),
        fmean(min(max(mean, -LARGEST), LARGEST) for mean in means),
        fmean(min(row.std_dev, LARGEST) for row in rows),
    )
