"""The contract of `backends.Backend`, kept by every backend, and what each adds to it."""

import asyncio
import json
import os
import resource
import signal
import socket
import sqlite3
import subprocess
import sys
import traceback
from bisect import bisect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta, timezone
from itertools import chain, count, groupby, pairwise, permutations
from math import inf, nextafter
from pathlib import Path
from statistics import fmean
from typing import TypeAlias, TypeVar
from uuid import UUID

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import astuple, force_setattr
from postgres_server import PostgresServer

import backends
from backends import (
    Backend,
    BackendError,
    BackendUnavailable,
    Bucket,
    Measurement,
    MeasurementNotFound,
    create_backend,
    json_of,
    paired,
    same,
    timestamp_text,
    winners,
)
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.sqlite import SqliteBackend

NOON = datetime(2019, 5, 1, 12, tzinfo=UTC)
FIRST = datetime.min.replace(tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)
SECOND = timedelta(seconds=1)
DAY = timedelta(days=1)
days = count()

B = TypeVar("B", bound=Backend)
Connect = Callable[[], Backend]
Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
# The fixtures serve all examples of a property; each example keeps to a day of its own.
property_of_a_backend = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def row(
    at: datetime | int = 0, raw_id: int = 1, mean: float = 0.5, std: float = 0.25, series: str = ""
) -> Measurement:
    """Make a measurement; a number is the seconds after NOON."""
    timestamp = at if isinstance(at, datetime) else NOON + at * SECOND
    return Measurement(timestamp, mean, std, UUID(int=raw_id), series)


async def everything(backend: Backend) -> list[Measurement]:
    return await backend.find(limit=1_000_000)


@asynccontextmanager
async def closing(backend: B) -> AsyncIterator[B]:
    """Close the backend at the end, whatever happens."""
    try:
        yield backend
    finally:
        await backend.close()


# ── What a measurement is ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "timestamp",
    [
        NOON.replace(tzinfo=None),
        NOON.astimezone(timezone(timedelta(hours=2))),
        NOON.astimezone(timezone(timedelta(microseconds=-1))),
    ],
)
def test_measurement_refuses_a_time_that_is_not_utc(timestamp: datetime) -> None:
    """A naive timestamp, or one with another offset, never becomes a measurement."""
    with pytest.raises(ValueError, match="UTC"):
        row(timestamp)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_measurement_refuses_what_is_not_finite(number: float) -> None:
    """NaN and the infinities never become a measurement."""
    with pytest.raises(ValueError, match=r"mean .* finite"):
        row(mean=number)
    with pytest.raises(ValueError, match=r"std_dev .* finite"):
        row(std=number)


def test_measurement_refuses_a_negative_standard_deviation() -> None:
    """A standard deviation below zero never becomes a measurement."""
    with pytest.raises(ValueError, match="0 or greater"):
        row(std=-5e-324)


@given(moment=st.datetimes(timezones=st.just(UTC)), whole=st.booleans())
def test_a_timestamp_has_one_width(moment: datetime, whole: bool) -> None:
    """The text of a moment is that of `isoformat` with microseconds, and JSON has the same."""
    moment = moment.replace(microsecond=0) if whole else moment
    text = timestamp_text(moment)
    assert text == moment.isoformat(timespec="microseconds").replace("+00:00", "Z")
    member = {"a": [{"b": moment}], "c": moment}
    assert json.loads(json_of(member)) == {"a": [{"b": text}], "c": text}
    assert json.loads(json_of(moment)) == text


# ── Upsert and get ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "timestamp",
    [FIRST, FIRST + timedelta(microseconds=1), NOON.replace(microsecond=123457), LAST],
    ids=str,
)
@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (0.1 + 0.2, 1 / 3),
        (5e-324, 5e-324),
        (-2.2e-308, 2.2e-308),
        (1e308, 1e308),
        (-1.7976931348623157e308, 1.7976931348623157e308),
        (-0.0, 0.0),
        (2.0**53 + 2, 7.0),
    ],
)
async def test_a_row_reads_back_exactly(
    backend: Backend, timestamp: datetime, mean: float, std: float
) -> None:
    """Time, numbers and raw_id come back as they were written, to the last bit."""
    written = row(timestamp, raw_id=(1 << 128) - 1, mean=mean, std=std)
    await backend.upsert([written])
    read = await backend.get(timestamp)
    assert read == written
    assert read.timestamp_utc.utcoffset() == timedelta(0)
    assert [type(value) for value in (read.mean, read.std_dev, read.raw_id)] == [float, float, UUID]
    assert await everything(backend) == [written]


async def test_an_empty_batch_changes_nothing(backend: Backend) -> None:
    """An empty batch is fine and leaves the table as it is."""
    await backend.upsert([])
    assert await backend.count() == 0


async def test_get_of_an_unknown_time(backend: Backend) -> None:
    """A time without a row raises MeasurementNotFound, which is a LookupError, and names it."""
    await backend.upsert([row(0)])
    with pytest.raises(MeasurementNotFound, match="12:00:01") as caught:
        await backend.get(NOON + SECOND)
    assert isinstance(caught.value, LookupError)
    assert isinstance(caught.value, BackendError)


@pytest.mark.parametrize("ids", list(permutations([1, 2, 1 << 127])))
@pytest.mark.parametrize("together", [True, False])
async def test_the_greatest_raw_id_stands(
    backend: Backend, ids: tuple[int, ...], together: bool
) -> None:
    """In any order, in one batch or several, the row with the greatest raw_id stands."""
    rows = [row(raw_id=raw_id, mean=float(place)) for place, raw_id in enumerate(ids)]
    for batch in [rows] if together else [[one] for one in rows]:
        await backend.upsert(batch)
    assert await everything(backend) == [max(rows, key=lambda one: one.raw_id)]


async def test_the_same_raw_id_overwrites(backend: Backend) -> None:
    """A row that was computed wrongly can be repaired by its own payload."""
    await backend.upsert([row(mean=1.0, std=1.0)])
    await backend.upsert([row(mean=2.0, std=2.0)])
    assert await everything(backend) == [row(mean=2.0, std=2.0)]


async def test_the_same_raw_id_twice_in_a_batch(backend: Backend) -> None:
    """Of several rows with one timestamp and one raw_id in a batch, the last stands."""
    await backend.upsert([row(mean=1.0), row(mean=2.0)])
    assert await everything(backend) == [row(mean=2.0)]


async def test_count_is_the_number_of_timestamps(backend: Backend) -> None:
    """Rows are counted, not upserts."""
    await backend.upsert([row(0), row(1), row(1, raw_id=2)])
    await backend.upsert([row(1, raw_id=3), row(2)])
    assert await backend.count() == 3


@st.composite
def arrivals(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Batches of (second, raw_id): unique raw_ids in any order, cut anywhere, some repeated."""
    ids = draw(st.lists(st.integers(0, (1 << 128) - 1), unique=True, max_size=12))
    payloads = draw(st.permutations([(draw(st.integers(0, 3)), raw_id) for raw_id in ids]))
    cuts = sorted(draw(st.lists(st.integers(0, len(payloads)), max_size=4)))
    bounds = zip([0, *cuts], [*cuts, len(payloads)], strict=True)
    batches = [payloads[start:end] for start, end in bounds]
    return batches + draw(st.lists(st.sampled_from(batches), max_size=2))


@property_of_a_backend
@given(arrivals())
async def test_upsert_commutes(backend: Backend, batches: list[list[tuple[int, int]]]) -> None:
    """Any order, partition and repetition of the same measurements ends in the same table."""
    start = NOON + next(days) * DAY
    for batch in batches:
        await backend.upsert([row(start + s * SECOND, raw_id) for s, raw_id in batch])
    expected: dict[int, int] = {}
    for second, raw_id in chain.from_iterable(batches):
        expected[second] = max(raw_id, expected.get(second, 0))
    found = await backend.find(since=start, until=start + DAY)
    assert found == [row(start + s * SECOND, expected[s]) for s in sorted(expected)]


def test_winners_are_ordered() -> None:
    """One row per timestamp, in the order of time, so that nobody locks rows in another order."""
    assert winners([row(2), row(1, 5), row(0), row(1, 4)]) == [row(0), row(1, 5), row(2)]


async def test_concurrent_upserts(connect: Connect) -> None:
    """Upserts of the same rows at the same time, in opposite orders, all succeed; the last stands.

    Locking rows in the order of the batch would end in a deadlock here.
    """
    backends = [connect(), connect()]
    batches = [[row(second, raw_id) for second in range(100)] for raw_id in range(1, 21)]
    await asyncio.gather(
        *(
            backends[number % 2].upsert(batch[:: (-1) ** number])
            for number, batch in enumerate(batches)
        )
    )
    assert await everything(backends[0]) == batches[-1]


# ── Find ──────────────────────────────────────────────────────────────────────────────────────────


def find_by_definition(
    rows: list[Measurement],
    since: datetime | None,
    until: datetime | None,
    after: datetime | None,
    limit: int,
    *,
    descending: bool,
) -> list[Measurement]:
    """Say the contract of `find` once more, as plainly as it can be said."""
    inside = [
        one
        for one in sorted(rows, key=lambda one: one.timestamp_utc, reverse=descending)
        if (since is None or since <= one.timestamp_utc)
        and (until is None or one.timestamp_utc < until)
        and (
            after is None
            or (one.timestamp_utc < after if descending else one.timestamp_utc > after)
        )
    ]
    return inside[:limit]


MICROSECOND = timedelta(microseconds=1)
STAMPS = [FIRST, FIRST + MICROSECOND, NOON - MICROSECOND, NOON, NOON + SECOND, LAST - SECOND, LAST]
bounds = st.none() | st.sampled_from([*STAMPS, NOON + MICROSECOND])


@property_of_a_backend
@given(bounds, bounds, bounds, st.integers(0, len(STAMPS) + 1), st.booleans())
async def test_find_does_what_it_says(
    backend: Backend,
    since: datetime | None,
    until: datetime | None,
    after: datetime | None,
    limit: int,
    descending: bool,
) -> None:
    """Every combination of range, cursor, limit and direction gives what the contract says."""
    rows = [row(timestamp) for timestamp in STAMPS]
    await backend.upsert(rows)
    found = await backend.find(
        since=since, until=until, after=after, limit=limit, descending=descending
    )
    assert found == find_by_definition(rows, since, until, after, limit, descending=descending)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
async def test_pages_cover_everything(backend: Backend, limit: int, descending: bool) -> None:
    """Following the cursor visits every row once, in order, and then ends, in both directions."""
    rows = [row(timestamp) for timestamp in STAMPS]
    await backend.upsert(rows)
    seen: list[Measurement] = []
    while page := await backend.find(
        after=seen[-1].timestamp_utc if seen else None, limit=limit, descending=descending
    ):
        assert len(page) <= limit
        seen += page
    assert seen == rows[:: -1 if descending else 1]


async def test_find_gives_a_hundred_rows_unless_told(backend: Backend) -> None:
    """Without a limit, a page is the first hundred rows."""
    rows = [row(second) for second in range(101)]
    await backend.upsert(rows[::-1])
    assert await backend.find() == rows[:100]


async def test_find_refuses_a_negative_limit(backend: Backend) -> None:
    """A negative limit is a mistake, not `everything`."""
    with pytest.raises(ValueError, match="limit"):
        await backend.find(limit=-1)


@pytest.mark.parametrize("odd", [NOON.replace(tzinfo=None), NOON.astimezone(timezone(SECOND))])
async def test_questions_about_a_time_that_is_not_utc(backend: Backend, odd: datetime) -> None:
    """No method guesses what a naive timestamp means."""
    for question in (
        backend.get(odd),
        backend.find(since=odd),
        backend.find(until=odd),
        backend.find(after=odd),
    ):
        with pytest.raises(ValueError, match="UTC"):
            await question


# ── Delete ────────────────────────────────────────────────────────────────────────────────────────


async def test_delete_takes_the_rows_that_are_named(backend: Backend) -> None:
    """Deleted rows, of the first and the last moment too, are gone for get, find and count."""
    rows = [row(timestamp) for timestamp in STAMPS]
    await backend.upsert(rows)
    assert await everything(backend) == rows
    await backend.delete(rows[::2])
    assert await everything(backend) == rows[1::2]
    assert await backend.find(descending=True) == rows[1::2][::-1]
    assert await backend.count() == len(rows[1::2])
    assert await backend.get(rows[1].timestamp_utc) == rows[1]
    for gone in rows[::2]:
        with pytest.raises(MeasurementNotFound):
            await backend.get(gone.timestamp_utc)
    await backend.delete(rows)
    assert (await backend.count(), await everything(backend)) == (0, [])


@pytest.mark.parametrize("named", [1, 2, 4, 1 << 127])
async def test_delete_leaves_a_row_that_names_another_raw_id(backend: Backend, named: int) -> None:
    """A row that names another raw_id than was meant, a smaller or a greater one, stays."""
    await backend.upsert([row(0, 3), row(1, named)])
    await backend.delete([row(0, named), row(1, named), row(2, named)])
    assert await everything(backend) == [row(0, 3)]


async def test_delete_does_not_ask_for_the_values(backend: Backend) -> None:
    """Timestamp and raw_id say which row is meant, whatever its numbers are by now."""
    await backend.upsert([row(mean=1.0, std=2.0)])
    await backend.delete([row(mean=3.0, std=4.0)])
    assert await backend.count() == 0


async def test_delete_of_nothing(backend: Backend) -> None:
    """An empty batch, a row that is not there, and one named twice are all fine."""
    await backend.delete([])
    await backend.delete([row(0), row(0), row(0, 2)])
    await backend.upsert([row(0), row(1)])
    await backend.delete([])
    assert await everything(backend) == [row(0), row(1)]
    await backend.delete([row(0, 2), row(0), row(0)])
    await backend.delete([row(0)])
    assert await everything(backend) == [row(1)]


async def test_deleted_for_an_earlier_arrival(backend: Backend) -> None:
    """Where a row was deleted, one with a smaller raw_id finds room again."""
    await backend.upsert([row(0, 9), row(1, 9)])
    await backend.delete([row(0, 9)])
    await backend.upsert([row(0, 1), row(1, 1)])
    assert await everything(backend) == [row(0, 1), row(1, 9)]


async def test_deletion_outlives_the_connection(connect: Connect) -> None:
    """What was deleted stays deleted for the next backend on the same database."""
    first = connect()
    await first.upsert([row(0), row(1)])
    await first.delete([row(0)])
    await first.close()
    assert await everything(connect()) == [row(1)]


@pytest.mark.parametrize("odd", [NOON.replace(tzinfo=None), NOON.astimezone(timezone(SECOND))])
async def test_delete_refuses_a_time_that_is_not_utc(backend: Backend, odd: datetime) -> None:
    """A row that was forced to another time than UTC is refused, and with it its whole batch."""
    await backend.upsert([row(0), row(1)])
    forced = row(1)
    force_setattr(forced, "timestamp_utc", odd)
    with pytest.raises(ValueError, match="UTC"):
        await backend.delete([row(0), forced])
    assert await everything(backend) == [row(0), row(1)]


edits = st.lists(
    st.tuples(st.booleans(), st.lists(st.tuples(st.integers(0, 2), st.integers(1, 4)), max_size=4)),
    max_size=8,
)


@property_of_a_backend
@given(edits)
async def test_any_sequence_of_upserts_and_deletes(
    backend: Backend, edits: list[tuple[bool, list[tuple[int, int]]]]
) -> None:
    """Whatever is upserted and deleted in turn, the table is what a dictionary would hold."""
    start, expected = NOON + next(days) * DAY, dict[int, int]()
    for deletes, batch in edits:
        rows = [row(start + second * SECOND, raw_id) for second, raw_id in batch]
        await (backend.delete(rows) if deletes else backend.upsert(rows))
        for second, raw_id in batch:
            standing = expected.get(second, 0)
            if deletes and standing == raw_id:
                del expected[second]
            elif not deletes:
                expected[second] = max(standing, raw_id)
    found = await backend.find(since=start, until=start + DAY)
    assert found == [row(start + s * SECOND, expected[s]) for s in sorted(expected)]


async def test_deletes_beside_upserts(connect: Connect) -> None:
    """Deletes at the same time as upserts all succeed, and never take a later arrival."""
    one, other = connect(), connect()
    batches = [[row(second, raw_id) for second in range(500)] for raw_id in range(1, 9)]
    await one.upsert(batches[0])
    for before, after in pairwise(batches):
        await asyncio.gather(
            one.delete(before[::-1]),
            other.upsert(before),
            one.delete(before),
            other.upsert(after),
            one.delete(before[::-1]),
            other.upsert(before),
        )
        assert await everything(one) == after


# ── Summaries ─────────────────────────────────────────────────────────────────────────────────────


def bucket_of(rows: Sequence[Measurement]) -> Bucket:
    means = [row.mean for row in rows]
    std_dev = fmean(row.std_dev for row in rows)
    ends = rows[0].timestamp_utc, rows[-1].timestamp_utc
    return Bucket(*ends, len(rows), min(means), max(means), fmean(means), std_dev)


def about(buckets: Sequence[Bucket]) -> list[tuple[object, ...]]:
    """Make what equals these buckets but for the rounding of their means."""
    return [
        (
            b.first,
            b.last,
            b.count,
            b.min_mean,
            b.max_mean,
            pytest.approx(b.mean),
            pytest.approx(b.std_dev),
        )
        for b in buckets
    ]


@pytest.mark.parametrize("buckets", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("since", [None, NOON - 5 * SECOND, NOON, NOON + 11 * SECOND])
@pytest.mark.parametrize("until", [None, NOON + 12 * SECOND, NOON + 40 * SECOND, LAST])
async def test_summarize_does_what_it_says(
    backend: Backend, since: datetime | None, until: datetime | None, buckets: int
) -> None:
    """Spans of equal length cover the range; each that has rows tells of exactly these."""
    rows = [row(at, at + 1, mean=at * 0.7 - 9, std=at / 3) for at in (0, 1, 2, 9, 11, 12, 20, 29)]
    await backend.upsert(rows)
    inside = [r for r in rows if (not since or r.timestamp_utc >= since)]
    inside = [r for r in inside if (not until or r.timestamp_utc < until)]
    low, high = since or inside[0].timestamp_utc, until or inside[-1].timestamp_utc
    microseconds = (high - low) // timedelta(microseconds=1)
    spans = [low + timedelta(microseconds=microseconds * n // buckets) for n in range(1, buckets)]
    expected = [
        list(found) for _, found in groupby(inside, lambda r: bisect(spans, r.timestamp_utc))
    ]
    summary = await backend.summarize(since=since, until=until, buckets=buckets)
    assert [astuple(bucket) for bucket in summary] == about(list(map(bucket_of, expected)))


async def test_summarize_nothing(backend: Backend) -> None:
    """Where there is no row, before, between or behind the rows, there is no bucket."""
    assert await backend.summarize(buckets=5) == []
    await backend.upsert([row(0), row(10)])
    for since, until in ((5, 5), (0, 0), (1, 10), (11, 99), (10, 0)):
        bounds = {"since": NOON + since * SECOND, "until": NOON + until * SECOND}
        assert await backend.summarize(**bounds, buckets=5) == []


@pytest.mark.parametrize("value", [0.1, -1.7e308, 5e-324, 1e-310, nextafter(inf, 0)])
@pytest.mark.parametrize("buckets", [1, 100])
async def test_summarize_one_row(backend: Backend, value: float, buckets: int) -> None:
    """A single row is a bucket with its exact mean and, but for huge ones, its exact deviation."""
    std_dev = min(abs(value), 1e290)
    await backend.upsert([row(3, mean=value, std=std_dev)])
    at = NOON + 3 * SECOND
    expected = Bucket(at, at, 1, value, value, value, std_dev)
    assert await backend.summarize(buckets=buckets) == [expected]


async def test_summarize_from_the_first_to_the_last_moment(backend: Backend) -> None:
    """The years 1 and 9999 are inside a range without bounds."""
    await backend.upsert([row(FIRST, 1), row(NOON, 2), row(LAST, 3)])
    summary = await backend.summarize(buckets=2000)
    assert [bucket.first for bucket in summary] == [FIRST, NOON, LAST]
    assert [bucket.count for bucket in await backend.summarize(buckets=1)] == [3]
    assert sum(b.count for b in await backend.summarize(until=LAST, buckets=10)) == 2


async def test_summarize_sums_that_overflow(backend: Backend) -> None:
    """Rows near the largest double are summarized by finite numbers within their bounds."""
    huge = nextafter(inf, 0)
    for means in ((huge, huge, huge), (huge, huge, -huge, -huge)):
        await backend.upsert([row(at, 1, mean, huge) for at, mean in enumerate(means)])
        [bucket] = await backend.summarize(since=NOON, until=NOON + DAY, buckets=1)
        assert (bucket.min_mean, bucket.max_mean) == (min(means), max(means))
        assert min(means) <= bucket.mean <= max(means)
        assert 1e289 <= bucket.std_dev < inf


async def test_summarize_refuses_what_makes_no_sense(backend: Backend) -> None:
    """Less than one bucket, or a bound that is not at UTC, is an error of the caller."""
    with pytest.raises(ValueError, match="buckets"):
        await backend.summarize(buckets=0)
    with pytest.raises(ValueError, match="UTC"):
        await backend.summarize(since=NOON.replace(tzinfo=None), buckets=1)


# ── Differences ───────────────────────────────────────────────────────────────────────────────────

Pair: TypeAlias = "tuple[Measurement | None, Measurement | None]"


async def compared(
    one: list[Measurement],
    other: list[Measurement],
    backend: Backend,
    since: datetime | None = None,
    until: datetime | None = None,
) -> list[Pair]:
    """Return the pairs of rows in memory and in a backend, empty before and after, that differ."""
    memory = MemoryBackend()
    await memory.upsert(one)
    await backend.upsert(other)
    found = [pair async for pair in paired(memory, backend, since, until)]
    mirrored = [pair async for pair in paired(backend, memory, since, until)]
    assert mirrored == [(rival, own) for own, rival in found]
    await backend.delete(other)
    return [(own, rival) for own, rival in found if not (own and rival and same(own, rival))]


@pytest.mark.parametrize("page", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([], []),
        (range(5), []),
        (range(5), range(5)),
        (range(5), range(2, 5)),
        (range(5), range(3)),
        (range(5), [2]),
        ([0, 2, 4], [1, 3, 5]),
        (range(3), range(3, 6)),
    ],
    ids=["empty", "one empty", "equal", "begins", "ends", "around", "in turn", "apart"],
)
async def test_differences_of_one_side(
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    page: int,
    one: Sequence[int],
    other: Sequence[int],
) -> None:
    """A row that only one side has is yielded, wherever it lies and however the pages fall."""
    monkeypatch.setattr(backends, "PAGE", page)
    expected = [
        (row(second) if second in one else None, row(second) if second in other else None)
        for second in sorted({*one} ^ {*other})
    ]
    assert await compared([*map(row, one)], [*map(row, other)], backend) == expected


async def test_differences_of_a_row(backend: Backend) -> None:
    """Another mean, deviation or raw_id is a difference; one side may differ in many rows."""
    rows = [row(second, 2, mean=1.0, std=2.0) for second in range(5)]
    others = [
        row(0, 2, mean=1.001, std=2.0),
        row(1, 2, mean=1.0, std=0.0),
        row(2, 1, mean=1.0, std=2.0),
        row(3, 3, mean=-1.0, std=2.0),
        rows[4],
    ]
    assert await compared(rows, others, backend) == list(zip(rows[:4], others[:4], strict=True))


async def test_differences_of_the_first_and_the_last_moment(backend: Backend) -> None:
    """Rows of the years 1 and 9999 are compared like any other."""
    rows = [row(timestamp) for timestamp in STAMPS]
    others = [row(timestamp, 2) for timestamp in (FIRST, LAST)]
    found = await compared(rows, [*others, *rows[1:-1]], backend)
    assert found == [(rows[0], others[0]), (rows[-1], others[1])]


def rounded(values: tuple[int, float] | None) -> tuple[int, float] | None:
    return values and (values[0], round(values[1], 9))


tables = st.dictionaries(
    st.sampled_from(STAMPS), st.tuples(st.integers(1, 2), st.sampled_from([1.0, 1 + 2**-52, 2.0]))
)


@property_of_a_backend
@given(tables, tables, st.integers(1, 4), bounds, bounds)
async def test_differences_do_what_they_say(
    backend: Backend,
    monkeypatch: pytest.MonkeyPatch,
    one: dict[datetime, tuple[int, float]],
    other: dict[datetime, tuple[int, float]],
    page: int,
    since: datetime | None,
    until: datetime | None,
) -> None:
    """Any two tables, pages and bounds give what a comparison of two dictionaries gives."""
    monkeypatch.setattr(backends, "PAGE", page)
    sides = [{at: row(at, *values) for at, values in side.items()} for side in (one, other)]
    expected = [
        (sides[0].get(at), sides[1].get(at))
        for at in sorted({*one, *other})
        if (since or FIRST) <= at
        and (until is None or at < until)
        and rounded(one.get(at)) != rounded(other.get(at))
    ]
    found = await compared([*sides[0].values()], [*sides[1].values()], backend, since, until)
    assert found == expected


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (1.0, 1 + 2**-49, True),
        (1.0, 1 + 2**-48, False),
        (-1e300, -1e300 * (1 + 2**-50), True),
        (1e300, -1e300, False),
        (1.0, nextafter(1.0, inf), True),
        (0.1 + 0.2, 0.3, True),
        (0.0, -0.0, True),
        (0.0, 2**-1071, True),
        (0.0, 2**-1070, False),
        (5e-324, -5e-324, True),
        (0.0, 1e-300, False),
        (1.7976931348623157e308, nextafter(1.7976931348623157e308, 0), True),
    ],
)
def test_same_but_for_rounding(one: float, other: float, equal: bool) -> None:
    """A few units in the last place are no difference, in mean and deviation; any more are."""
    assert same(row(mean=one), row(mean=other)) is equal
    assert same(row(mean=other), row(mean=one)) is equal
    assert same(row(std=abs(one)), row(std=abs(other))) is (equal or one == -other)


def test_same_is_of_one_payload() -> None:
    """Rows of two times or of two payloads are never the same, whatever their numbers are."""
    assert same(row(), row())
    assert not same(row(), row(1))
    assert not same(row(), row(NOON + MICROSECOND))
    assert not same(row(), row(raw_id=2))


# ── Open, close, ping ─────────────────────────────────────────────────────────────────────────────


async def test_rows_outlive_the_connection(connect: Connect) -> None:
    """Another backend on the same database, and the same one opened again, find the rows."""
    first = connect()
    await first.upsert([row()])
    await first.close()
    second = connect()
    await second.open()
    assert await everything(second) == [row()]
    await first.open()
    assert await everything(first) == [row()]


async def test_open_and_close_are_idempotent(connect: Connect) -> None:
    """Each may be called twice in a row, and close before open."""
    backend = connect()
    await backend.close()
    await backend.open()
    await backend.open()
    await backend.upsert([row()])
    await backend.close()
    await backend.close()
    await backend.open()
    assert await backend.count() == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda backend: backend.ping(),
        lambda backend: backend.upsert([row()]),
        lambda backend: backend.delete([row(1)]),
        lambda backend: backend.find(),
        lambda backend: backend.count(),
    ],
    ids=["ping", "upsert", "delete", "find", "count"],
)
async def test_every_call_opens(
    connect: Connect, call: Callable[[Backend], Awaitable[object]]
) -> None:
    """A call on a backend that is not open yet, or not any more, opens it."""
    backend = connect()
    await call(backend)
    await backend.close()
    await call(backend)


async def test_many_open_at_once(connect: Connect) -> None:
    """Backends that all find the table missing at the same moment all open, and share it."""
    backends = [connect() for _ in range(8)]
    await asyncio.gather(*(backend.open() for backend in backends))
    await asyncio.gather(*(one.upsert([row(n)]) for n, one in enumerate(backends)))
    assert await backends[0].count() == 8 == await backends[-1].count()


# ── SQLite ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sqlite_path(tmp_path: Path) -> Path:
    return tmp_path / "rows.sqlite"


@pytest.fixture
async def sqlite(sqlite_path: Path) -> AsyncIterator[SqliteBackend]:
    backend = SqliteBackend(sqlite_path, busy_timeout=0.5)
    await backend.open()
    yield backend
    await backend.close()


@contextmanager
def other_program(path: Path, *statements: str) -> Iterator[sqlite3.Connection]:
    """Use the file as another program would."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            connection.execute(statement)
        yield connection
    finally:
        connection.close()


async def test_sqlite_locked(sqlite: SqliteBackend, sqlite_path: Path) -> None:
    """While another program writes, an upsert is unavailable; afterwards it succeeds."""
    with other_program(sqlite_path, "BEGIN IMMEDIATE"):
        with pytest.raises(BackendUnavailable, match="locked"):
            await sqlite.upsert([row()])
        assert await sqlite.count() == 0
    await sqlite.upsert([row()])
    assert await sqlite.count() == 1


async def test_sqlite_leaves_the_event_loop_alone(sqlite: SqliteBackend, sqlite_path: Path) -> None:
    """An upsert that waits for a lock lets the loop run: here, to release that lock."""
    with other_program(sqlite_path, "BEGIN IMMEDIATE") as other:
        upsert = asyncio.create_task(sqlite.upsert([row()]))
        await asyncio.sleep(0.1)
        assert not upsert.done()
        other.execute("ROLLBACK")
        await upsert


async def test_sqlite_opens_when_the_lock_is_gone(sqlite_path: Path) -> None:
    """Opening a file that another program is just writing to waits for it, as any call does."""
    with other_program(sqlite_path, "BEGIN IMMEDIATE", "CREATE TABLE other (x)") as other:
        async with closing(SqliteBackend(sqlite_path)) as backend:
            opening = asyncio.create_task(backend.open())
            await asyncio.sleep(0.1)
            assert not opening.done()
            other.execute("COMMIT")
            await opening


@pytest.mark.usefixtures("sqlite")
async def test_sqlite_writes_ahead(sqlite_path: Path) -> None:
    """Readers and one writer do not wait for each other: the journal is a write-ahead log."""
    with other_program(sqlite_path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_sqlite_stores_a_text_that_sorts(sqlite: SqliteBackend, sqlite_path: Path) -> None:
    """Other programs read the time as ISO 8601 of one width, in which text order is time order."""
    await sqlite.upsert([row(FIRST), row()])
    with other_program(sqlite_path) as other:
        rows = other.execute("SELECT timestamp_utc, raw_id FROM measurements ORDER BY 1").fetchall()
    assert rows == [
        ("0001-01-01T00:00:00.000000Z", "00000000-0000-0000-0000-000000000001"),
        ("2019-05-01T12:00:00.000000Z", "00000000-0000-0000-0000-000000000001"),
    ]


async def test_sqlite_upsert_is_all_or_nothing(sqlite: SqliteBackend, sqlite_path: Path) -> None:
    """A row that the table refuses takes its whole batch with it, and nothing else."""
    trigger = "CREATE TRIGGER no BEFORE INSERT ON measurements WHEN NEW.mean > 9 BEGIN SELECT"
    await sqlite.upsert([row(0)])
    with other_program(sqlite_path, f"{trigger} RAISE(ABORT, 'too much'); END"):
        with pytest.raises(BackendError, match="too much") as caught:
            await sqlite.upsert([row(0, 2), row(1), row(2, mean=10.0)])
        assert not isinstance(caught.value, BackendUnavailable)
        assert await everything(sqlite) == [row(0)]
        await sqlite.upsert([row(1)])


async def test_sqlite_delete_is_all_or_nothing(sqlite: SqliteBackend, sqlite_path: Path) -> None:
    """A row that may not be deleted keeps its whole batch."""
    trigger = "CREATE TRIGGER no BEFORE DELETE ON measurements WHEN OLD.mean > 9 BEGIN SELECT"
    rows = [row(0), row(1, mean=10.0), row(2)]
    await sqlite.upsert(rows)
    with other_program(sqlite_path, f"{trigger} RAISE(ABORT, 'too dear'); END"):
        with pytest.raises(BackendError, match="too dear"):
            await sqlite.delete(rows)
        assert await everything(sqlite) == rows
        await sqlite.delete([rows[0]])
        assert await everything(sqlite) == rows[1:]


async def test_sqlite_on_a_full_disk(sqlite: SqliteBackend) -> None:
    """A batch that does not fit is unavailable and leaves nothing; the next one that does is fine.

    The limit on a file's size stands in for the disk's: writing beyond it fails in the same place.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(BackendUnavailable, match="disk"):
            await sqlite.upsert([row(second) for second in range(50_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert await sqlite.count() == 0
    await sqlite.upsert([row()])
    assert await sqlite.count() == 1


async def test_sqlite_cannot_open(tmp_path: Path) -> None:
    """A folder in place of the file, a file in place of the folder: unavailable, with the path."""
    (tmp_path / "file").write_text("text")
    for path in (tmp_path, tmp_path / "file" / "rows.sqlite", tmp_path / "file"):
        backend = SqliteBackend(path)
        with pytest.raises(BackendUnavailable, match=str(path)):
            await backend.open()
        with pytest.raises(BackendUnavailable, match=str(path)):
            await backend.upsert([row()])
        await backend.close()
    assert (tmp_path / "file").read_text() == "text"


@pytest.mark.parametrize(
    "columns",
    [
        "timestamp_utc TEXT PRIMARY KEY, mean REAL",
        "timestamp_utc TEXT NOT NULL, mean REAL NOT NULL, std_dev REAL NOT NULL, raw_id TEXT",
        "timestamp_utc INT NOT NULL PRIMARY KEY, mean REAL NOT NULL, std_dev REAL, raw_id TEXT",
    ],
)
async def test_sqlite_with_a_foreign_table(sqlite_path: Path, columns: str) -> None:
    """A table of another shape is left alone, and the message says what to do."""
    with other_program(sqlite_path, f"CREATE TABLE measurements ({columns})"):
        backend = SqliteBackend(sqlite_path)
        with pytest.raises(BackendUnavailable, match=r"another shape: rename .* std_dev REAL"):
            await backend.open()
        await backend.close()


MANY_ROWS = """
WITH RECURSIVE second (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM second WHERE n < 300000)
INSERT INTO measurements SELECT
    strftime('%Y-%m-%dT%H:%M:%S.000000Z', 1556700000 + n, 'unixepoch'), n, 1,
    '00000000-0000-0000-0000-000000000001'
FROM second
"""


async def test_sqlite_long_reads_hold_up_nothing(sqlite: SqliteBackend, sqlite_path: Path) -> None:
    """While a long range is summarized, a ping, pages and writes are answered."""
    with other_program(sqlite_path, MANY_ROWS):
        pass
    done = list[str]()

    async def note(name: str, call: Awaitable[object]) -> None:
        await call
        done.append(name)

    async with asyncio.TaskGroup() as calls:
        for _ in range(3):
            calls.create_task(note("summary", sqlite.summarize(buckets=2000)))
        await asyncio.sleep(0.05)
        calls.create_task(note("ping", sqlite.ping()))
        calls.create_task(note("page", sqlite.find(limit=10)))
        calls.create_task(note("upsert", sqlite.upsert([row()])))
    assert set(done[:3]) == {"ping", "page", "upsert"}


async def test_sqlite_with_a_row_that_is_no_measurement(
    sqlite: SqliteBackend, sqlite_path: Path
) -> None:
    """What another program wrote is named, and never taken for a measurement."""
    insert = "INSERT INTO measurements VALUES ('yesterday', 1, 1, 'me')"
    with other_program(sqlite_path, insert), pytest.raises(BackendError, match="yesterday"):
        await sqlite.find()


# ── PostgreSQL ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def postgres(postgres_url: str) -> AsyncIterator[PostgresBackend]:
    backend = PostgresBackend(postgres_url, connect_timeout=1.0, command_timeout=1.0)
    await backend.open()
    yield backend
    await backend.close()


@asynccontextmanager
async def other_client(url: str, *statements: str) -> AsyncIterator["Connection"]:
    """Use the database as another client would."""
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
        yield connection
    finally:
        await connection.close()


OTHERS = "datname = current_database() AND pid <> pg_backend_pid()"


async def until(connection: "Connection", condition: str) -> None:
    """Wait, ten seconds at most, for what the server does in its own time."""
    async with asyncio.timeout(10):
        while not await connection.fetchval(condition):
            await asyncio.sleep(0.01)


@asynccontextmanager
async def ordinary_user(url: str, limit: int = -1) -> AsyncIterator[str]:
    """Make a user with no rights, and give the address for it."""
    role = f"CREATE ROLE ordinary LOGIN PASSWORD 'of-ordinary' CONNECTION LIMIT {limit}"
    async with other_client(url, role) as owner:
        try:
            yield f"postgresql://ordinary:of-ordinary@{url.rpartition('@')[2]}"
        finally:
            await owner.execute("DROP OWNED BY ordinary; DROP ROLE ordinary")


CALLS: list[Callable[[Backend], Awaitable[object]]] = [
    lambda backend: backend.open(),
    lambda backend: backend.ping(),
    lambda backend: backend.upsert([row()]),
    lambda backend: backend.delete([row(1)]),
    lambda backend: backend.get(NOON),
    lambda backend: backend.find(),
    lambda backend: backend.count(),
]


@pytest.mark.own_server
async def test_postgres_away_and_back(
    postgres: PostgresBackend, postgres_server: PostgresServer
) -> None:
    """While the server is down every call is unavailable; when it is back, every call succeeds."""
    await postgres.upsert([row()])
    postgres_server.stop()
    try:
        for call in CALLS:
            with pytest.raises(BackendUnavailable, match=f"127.0.0.1:{postgres_server.port}"):
                await call(postgres)
    finally:
        postgres_server.start()
    for call in CALLS:
        await call(postgres)


@pytest.mark.own_server
async def test_postgres_restarted_between_two_calls(
    postgres: PostgresBackend, postgres_server: PostgresServer
) -> None:
    """A restart that nobody noticed costs no error, however many connections the pool held."""
    await asyncio.gather(*(postgres.ping() for _ in range(10)))
    postgres_server.stop()
    postgres_server.start()
    await asyncio.gather(*(postgres.upsert([row(second)]) for second in range(10)))
    assert await postgres.count() == 10


@asynccontextmanager
async def host_that_reboots(port: int) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """Give a port that leads to `port`, and a way to reboot.

    Connections from before a reboot stay silently open, and are reset once they are written to,
    as by a host that lost its power and knows them no more.
    """
    boots = [0]

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        boot = boots[0]
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)

        async def pump(source: asyncio.StreamReader, drain: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while (data := await source.read(65536)) and boot == boots[0]:
                    drain.write(data)
            writer.transport.abort()
            server_writer.transport.abort()

        await asyncio.gather(pump(reader, server_writer), pump(server_reader, writer))

    host = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with host:
        yield host.sockets[0].getsockname()[1], lambda: boots.append(boots.pop() + 1)


@pytest.mark.own_server
async def test_postgres_host_rebooted(postgres_url: str, postgres_server: PostgresServer) -> None:
    """Of many connections that all died unnoticed, none fails a call: they are replaced at once."""
    async with host_that_reboots(postgres_server.port) as (port, reboot):
        url = postgres_url.replace(str(postgres_server.port), str(port))
        async with closing(PostgresBackend(url, command_timeout=2.0)) as backend:
            await asyncio.gather(*(backend.ping() for _ in range(10)))
            reboot()
            await backend.upsert([row()])
            assert await backend.count() == 1


@pytest.mark.own_server
async def test_postgres_down_at_the_start(
    postgres_url: str, postgres_server: PostgresServer
) -> None:
    """A backend whose database comes up later than itself recovers without a new open."""
    async with closing(PostgresBackend(postgres_url)) as backend:
        postgres_server.stop()
        try:
            with pytest.raises(BackendUnavailable):
                await backend.open()
        finally:
            postgres_server.start()
        await backend.upsert([row()])


@pytest.mark.own_server
async def test_postgres_connections_cut(postgres: PostgresBackend, postgres_url: str) -> None:
    """Connections that an administrator ends are replaced without an error."""
    await asyncio.gather(*(postgres.ping() for _ in range(10)))
    async with other_client(postgres_url) as other:
        await other.execute(
            f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OTHERS}"
        )
    await asyncio.gather(*(postgres.upsert([row(second)]) for second in range(10)))


async def test_postgres_on_a_host_that_never_answers() -> None:
    """A host that accepts connections and then stays silent makes no call wait for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://user:secret@127.0.0.1:{silent.getsockname()[1]}/rows"
        async with closing(PostgresBackend(url, connect_timeout=0.2)) as backend:
            with pytest.raises(BackendUnavailable, match="no reply in time"):
                await backend.open()


@pytest.mark.own_server
@pytest.mark.parametrize("called", [True, False])
async def test_postgres_falls_silent(
    postgres: PostgresBackend, postgres_url: str, called: bool
) -> None:
    """A connection whose other end died without a word makes no call and no close wait for ever."""
    async with other_client(postgres_url) as other:
        query = f"SELECT pid FROM pg_stat_activity WHERE {OTHERS}"
        pids = [record["pid"] for record in await other.fetch(query)]
        assert pids
        try:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            async with asyncio.timeout(20):
                if called:  # another connection answers
                    await postgres.ping()
                await postgres.close()
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


async def test_postgres_locked(postgres: PostgresBackend, postgres_url: str) -> None:
    """A statement that waits for somebody's lock longer than it may is unavailable."""
    lock = "LOCK TABLE measurements IN ACCESS EXCLUSIVE MODE"
    async with other_client(postgres_url, "BEGIN", lock):
        with pytest.raises(BackendUnavailable):
            await postgres.upsert([row()])
    await postgres.upsert([row()])


async def test_postgres_pool_exhausted(postgres_url: str) -> None:
    """A call that gets no connection in time is unavailable."""
    lock = "LOCK TABLE measurements IN ACCESS EXCLUSIVE MODE"
    hurried = PostgresBackend(postgres_url, 1, connect_timeout=0.2, command_timeout=5.0)
    async with closing(hurried), other_client(postgres_url) as other:
        await hurried.open()
        await other.execute(f"BEGIN; {lock}")
        waiting = asyncio.create_task(hurried.count())
        await asyncio.sleep(0)
        with pytest.raises(BackendUnavailable, match="no reply in time"):
            await hurried.ping()
        await other.execute("COMMIT")
        assert await waiting == 0


@pytest.mark.own_server
async def test_postgres_serialization_failure(postgres: PostgresBackend, postgres_url: str) -> None:
    """A transaction that another one overtook is unavailable: trying again helps."""
    database = postgres_url.rpartition("/")[2]
    level = f"ALTER DATABASE {database} SET default_transaction_isolation = 'repeatable read'"
    overtake = "BEGIN; UPDATE measurements SET mean = 9"
    await postgres.upsert([row()])
    async with other_client(postgres_url, level, overtake) as other:
        await postgres.close()
        upsert = asyncio.create_task(postgres.upsert([row(raw_id=2)]))
        await until(other, "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted")
        await other.execute("COMMIT")
        with pytest.raises(BackendUnavailable, match="could not serialize"):
            await upsert
    await postgres.upsert([row(raw_id=2)])
    assert await everything(postgres) == [row(raw_id=2)]


async def test_postgres_upsert_is_all_or_nothing(
    postgres: PostgresBackend, postgres_url: str
) -> None:
    """A row that the table refuses takes its whole batch with it, and nothing else."""
    await postgres.upsert([row(0)])
    async with other_client(postgres_url, "ALTER TABLE measurements ADD CHECK (mean < 10)"):
        with pytest.raises(BackendError, match="refuses") as caught:
            await postgres.upsert([row(0, 2), row(1), row(2, mean=10.0)])
        assert not isinstance(caught.value, BackendUnavailable)
        assert await everything(postgres) == [row(0)]
        await postgres.upsert([row(1)])


KEEP_TENS = """
CREATE FUNCTION keep_tens() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN IF OLD.mean > 9 THEN RAISE 'too dear'; END IF; RETURN OLD; END $$;
CREATE TRIGGER keep_tens BEFORE DELETE ON measurements FOR EACH ROW EXECUTE FUNCTION keep_tens()
"""


async def test_postgres_delete_is_all_or_nothing(
    postgres: PostgresBackend, postgres_url: str
) -> None:
    """A row that may not be deleted keeps its whole batch."""
    rows = [row(0), row(1, mean=10.0), row(2)]
    await postgres.upsert(rows)
    async with other_client(postgres_url, KEEP_TENS):
        with pytest.raises(BackendError, match="too dear"):
            await postgres.delete(rows)
        assert await everything(postgres) == rows
        await postgres.delete([rows[0]])
        assert await everything(postgres) == rows[1:]


async def test_postgres_deletes_in_the_order_of_upserts(
    postgres: PostgresBackend, postgres_url: str
) -> None:
    """A delete that waits for a row holds none behind it, which would end in a deadlock."""
    update = "UPDATE measurements SET mean = 9 WHERE timestamp_utc = $1"
    await postgres.upsert([row(0), row(1)])
    async with other_client(postgres_url) as other:
        async with other.transaction():
            await other.execute(update, NOON)
            deletion = asyncio.create_task(postgres.delete([row(1), row(0)]))
            await until(other, "SELECT count(*) > 0 FROM pg_locks WHERE NOT granted")
            await other.execute(update, NOON + SECOND)
        await deletion
    assert await everything(postgres) == []


GOOD = (
    "timestamp_utc timestamptz PRIMARY KEY, mean float8 NOT NULL, std_dev float8 NOT NULL, "
    "raw_id uuid NOT NULL"
)


@pytest.mark.parametrize(
    "columns",
    [
        "id int",
        GOOD.replace("timestamptz", "timestamp"),
        GOOD.replace("timestamptz", "text"),
        GOOD.replace("mean float8", "mean real"),
        GOOD.replace("raw_id uuid", "raw_id text"),
        GOOD.replace("PRIMARY KEY", "NOT NULL"),
    ],
)
async def test_postgres_with_a_foreign_table(postgres_url: str, columns: str) -> None:
    """A table of another shape is found at once and left alone, and the message says what to do."""
    async with (
        other_client(postgres_url, f"CREATE TABLE measurements ({columns})"),
        closing(PostgresBackend(postgres_url)) as backend,
    ):
        with pytest.raises(BackendUnavailable, match=r"another shape .* rename .* raw_id uuid"):
            await backend.open()


async def test_postgres_with_columns_of_ones_own(postgres_url: str) -> None:
    """A table with further columns is fine: only the four are asked for."""
    table = f"CREATE TABLE measurements (device text DEFAULT 'a', {GOOD})"
    async with other_client(postgres_url, table), closing(PostgresBackend(postgres_url)) as backend:
        await backend.upsert([row()])
        assert await everything(backend) == [row()]


@pytest.mark.own_server
async def test_postgres_without_the_right_to_create(postgres_url: str) -> None:
    """A user who may only use a table that exists can; without it, the message has its SQL."""
    async with (
        ordinary_user(postgres_url) as url,
        closing(PostgresBackend(url)) as backend,
        other_client(postgres_url) as owner,
    ):
        with pytest.raises(BackendUnavailable, match=r"permission denied .* CREATE TABLE"):
            await backend.open()
        await owner.execute(f"CREATE TABLE measurements ({GOOD})")
        with pytest.raises(BackendUnavailable, match="grant SELECT, INSERT, UPDATE and DELETE"):
            await backend.open()
        await owner.execute("GRANT SELECT, INSERT, UPDATE ON measurements TO ordinary")
        await backend.upsert([row()])
        assert await backend.count() == 1
        await backend.close()


@pytest.mark.own_server
async def test_postgres_with_too_many_connections(postgres_url: str) -> None:
    """A server that has no connection left is unavailable."""
    async with (
        ordinary_user(postgres_url, limit=0) as url,
        closing(PostgresBackend(url)) as backend,
    ):
        with pytest.raises(BackendUnavailable, match="too many connections"):
            await backend.open()


@pytest.mark.own_server
async def test_postgres_on_a_standby(postgres: PostgresBackend, postgres_url: str) -> None:
    """A server that takes no writes is unavailable, and so are the upserts: nothing is refused."""
    database = postgres_url.rpartition("/")[2]
    setting = f"ALTER DATABASE {database} SET default_transaction_read_only = on"
    async with other_client(postgres_url, setting):
        await postgres.close()
        with pytest.raises(BackendUnavailable, match="primary"):
            await postgres.upsert([row()])


@pytest.mark.parametrize(
    "values", ["'-infinity', 1, 1", "'2019-05-01Z', 'NaN', 1", "'20000-01-01Z', 1, 1"]
)
async def test_postgres_with_a_row_that_is_no_measurement(
    postgres: PostgresBackend, postgres_url: str, values: str
) -> None:
    """What another client wrote is refused, never taken for a measurement, and harms nothing."""
    insert = f"INSERT INTO measurements SELECT {values}, gen_random_uuid()"
    async with other_client(postgres_url, insert):
        with pytest.raises(BackendError, match="no measurement"):
            await postgres.find()
        assert await postgres.count() == 1


async def test_postgres_pool_handed_in(postgres_url: str) -> None:
    """A pool that was handed in is used, and stays open when the backend closes."""
    async with asyncpg.create_pool(postgres_url, min_size=0, max_size=1) as pool:
        backend = PostgresBackend(pool=pool)
        await backend.upsert([row()])
        await backend.close()
        await backend.close()
        assert await pool.fetchval("SELECT count(*) FROM measurements") == 1
        assert await backend.count() == 1


async def test_postgres_close_ends_its_connections(postgres_url: str) -> None:
    """After close the server sees no connection of the backend any more."""
    backend = PostgresBackend(postgres_url)
    await asyncio.gather(*(backend.ping() for _ in range(5)))
    await backend.close()
    async with other_client(postgres_url) as other:
        await until(other, f"SELECT count(*) = 0 FROM pg_stat_activity WHERE {OTHERS}")


PASSWORD = "hunter2secret"


@pytest.mark.own_server
@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:{}@127.0.0.1:{port}/postgres",
        "postgresql://dropzone:{}@127.0.0.1:{port}/postgres",
        "postgresql://dropzone:{}@127.0.0.1:1/postgres",
        "postgresql://dropzone:{}@no.such.host.invalid/postgres",
        "postgresql://dropzone:{}@127.0.0.1:port/postgres",
        "postgresql://dropzone:{}@[::1/postgres",
        "postgresql://dropzone:{}@127.0.0.1\u2100/postgres",
        "postgresql://dropzone:{}/@127.0.0.1/postgres",
        "postgresql://dropzone:{}#@127.0.0.1/postgres",
        "postgresql://dropzone:x@{}/@127.0.0.1/postgres",
        "mysql://dropzone:{}@127.0.0.1/postgres",
        "postgresql://dropzone:{}@127.0.0.1:{port}/postgres?sslmode=never",
        "postgresql://dropzone:{}@127.0.0.1:{port}/postgres?nonsense=1",
        "{}",
    ],
)
async def test_postgres_never_shows_the_password(url: str, postgres_server: PostgresServer) -> None:
    """No message, cause or repr that can reach a log has the password of the database in it."""
    try:
        backend = PostgresBackend(url.format(PASSWORD, port=postgres_server.port))
    except ValueError as error:
        shown = repr(error) + traceback.format_exc()
    else:
        with pytest.raises(BackendUnavailable) as caught:
            await backend.open()
        shown = (
            repr(backend) + repr(caught.value) + "".join(traceback.format_exception(caught.value))
        )
    assert PASSWORD not in shown


@pytest.mark.own_server
@pytest.mark.parametrize(
    "url", ["postgresql://dropzone:{}@127.0.0.1:{port}/nowhere", "postgresql://x:{}@127.0.0.1:1/a"]
)
async def test_postgres_says_what_to_check(url: str, postgres_server: PostgresServer) -> None:
    """An unknown database or a closed port is unavailable, and named without the password."""
    address = url.format(postgres_server.password, port=postgres_server.port)
    async with closing(PostgresBackend(address)) as backend:
        with pytest.raises(BackendUnavailable, match=address.rpartition("@")[2]) as caught:
            await backend.open()
    assert "heck" in str(caught.value)
    assert postgres_server.password not in str(caught.value)


# ── Choosing a backend ────────────────────────────────────────────────────────────────────────────


class OwnBackend(MemoryBackend):
    """A backend of one's own, which takes an option."""

    def __init__(self, greeting: str = "") -> None:
        super().__init__()
        self.greeting = greeting


class Incomplete:
    """No backend: it lacks most methods."""

    async def open(self) -> None: ...


async def test_create_backend_knows_its_own(tmp_path: Path) -> None:
    """The built-in names give their classes, without opening anything."""
    path = tmp_path / "folder" / "rows.sqlite"
    url = "postgresql://user:secret@host:5433/rows"
    assert isinstance(create_backend("memory"), MemoryBackend)
    assert isinstance(create_backend("sqlite", path=path), SqliteBackend)
    assert repr(create_backend("postgres", url=url, pool=3)) == "PostgresBackend('host:5433/rows')"
    assert not path.parent.exists()


async def test_create_backend_takes_ones_own_class() -> None:
    """`module:Class` is imported and gets the options."""
    backend = create_backend(f"{__name__}:OwnBackend", greeting="hello")
    assert type(backend).__name__ == "OwnBackend"
    assert vars(backend)["greeting"] == "hello"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("oracle", {}, "choose memory, sqlite, postgres"),
        ("", {}, "choose memory, sqlite, postgres"),
        (":Class", {}, "choose memory, sqlite, postgres"),
        ("module:", {}, "choose memory, sqlite, postgres"),
        ("no_such_module:Class", {}, "No module named 'no_such_module'"),
        (".relative:Class", {}, "cannot be imported"),
        ("backends.memory:NoSuchClass", {}, "has no attribute 'NoSuchClass'"),
        ("backends.memory:MemoryBackend", {"size": 1}, "does not accept its options.*size"),
        (
            f"{__name__}:Incomplete",
            {},
            "lacks close, ping, upsert, delete, get, find, count, summarize",
        ),
        (f"{__name__}:NOON", {}, "does not accept its options"),
        ("sqlite", {}, "path"),
        ("postgres", {}, "url such as postgresql://user:password@host"),
        ("postgres", {"url": "postgresql://h/d", "pool": 0}, "1 connection or more"),
    ],
)
def test_create_backend_says_what_is_wrong(
    name: str, options: dict[str, object], message: str
) -> None:
    """A name or options that cannot work raise ValueError with what to do."""
    with pytest.raises(ValueError, match=message):
        create_backend(name, **options)


def test_only_the_chosen_driver_is_imported() -> None:
    """Choosing memory imports neither sqlite3 nor asyncpg."""
    program = (
        "import sys, backends; backends.create_backend('memory'); "
        "print({'asyncpg', 'sqlite3', 'dropzone'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"
