"""Rows in a dictionary, for tests and for embedding: gone when the process ends."""

from bisect import bisect_left
from collections.abc import Sequence
from datetime import datetime
from statistics import fmean

from backends import (
    Bucket,
    Measurement,
    MeasurementNotFound,
    edges,
    require_utc,
    timestamp_text,
    window,
    winners,
)

LARGEST = 1e290  # in a sum that must not overflow


class MemoryBackend:
    """A Backend that holds its rows as long as the object lives; `close` keeps them."""

    def __init__(self) -> None:
        self._rows: dict[datetime, Measurement] = {}
        self._timestamps: list[datetime] = []

    def __repr__(self) -> str:
        return f"MemoryBackend({len(self._rows)} rows)"

    async def open(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def close(self) -> None:
        """Do nothing: there is nothing to let go of."""

    async def ping(self) -> None:
        """Do nothing: memory answers."""

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.upsert; durable as long as the object lives."""
        standing = winners([*self._rival_rows(measurements), *measurements])
        self._rows.update((row.timestamp_utc, row) for row in standing)

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        """See Backend.delete."""
        for timestamp, raw_id in [(require_utc(m.timestamp_utc), m.raw_id) for m in measurements]:
            standing = self._rows.get(timestamp)
            if standing and standing.raw_id == raw_id:
                del self._rows[timestamp]
                self._timestamps = []

    async def get(self, timestamp_utc: datetime) -> Measurement:
        """See Backend.get."""
        try:
            return self._rows[require_utc(timestamp_utc)]
        except KeyError:
            text = timestamp_text(timestamp_utc)
            raise MeasurementNotFound(f"no measurement at {text}") from None

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
        low, high = window(since, until, after, limit, descending=descending)
        timestamps = self._ordered()
        first = 0 if low is None else bisect_left(timestamps, low)
        end = len(timestamps) if high is None else bisect_left(timestamps, high)
        if descending:
            page = timestamps[max(first, end - limit) : end][::-1]
        else:
            page = timestamps[first : min(end, first + limit)]
        return [self._rows[timestamp] for timestamp in page]

    async def count(self) -> int:
        """See Backend.count."""
        return len(self._rows)

    async def summarize(
        self, *, since: datetime | None = None, until: datetime | None = None, buckets: int = 100
    ) -> list[Bucket]:
        """See Backend.summarize."""
        spans = await edges(self, since, until, buckets)
        found = [await self.find(since=a, until=b, limit=len(self._rows)) for a, b in spans]
        return [_bucket(rows) for rows in found if rows]

    def _rival_rows(self, measurements: Sequence[Measurement]) -> list[Measurement]:
        timestamps = {row.timestamp_utc for row in measurements}
        return [self._rows[timestamp] for timestamp in timestamps if timestamp in self._rows]

    def _ordered(self) -> list[datetime]:
        # `delete` forgets this list: equal lengths mean that nothing was added since the last sort.
        if len(self._timestamps) != len(self._rows):
            self._timestamps = sorted(self._rows)
        return self._timestamps


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
