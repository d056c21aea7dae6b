"""Many series in one table, how it comes to that shape, and what an upsert says that it met."""

import asyncio
import re
import sqlite3
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_backends import (
    DAY,
    FIRST,
    LAST,
    NOON,
    SECOND,
    STAMPS,
    bounds,
    closing,
    days,
    everything,
    other_client,
    property_of_a_backend,
    row,
)

import backends
from backends import (
    NO_PAYLOAD,
    Backend,
    BackendError,
    BackendUnavailable,
    Measurement,
    MeasurementNotFound,
    Series,
    create_backend,
    paired,
    same,
)
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.sqlite import SqliteBackend

# Ordered by code point: another order than that of UTF-16, of a dictionary or of upper case.
NAMES = ["", " ", "'; DROP", "007", "B", "a", "a b", "aa", "é", "\uffee", "😀", "😀x", "😀" * 200]
many = pytest.mark.parametrize("has_series", [True], ids=["many"])
one = pytest.mark.parametrize("has_series", [False], ids=["one"])


def placed(rows: Sequence[Measurement]) -> list[Measurement]:
    """Return rows in the order of `find`."""
    return sorted(rows, key=lambda r: (r.timestamp_utc, r.series))


# ── Rows of many series ───────────────────────────────────────────────────────────────────────────


@many
async def test_series_stand_beside_each_other(backend: Backend) -> None:
    """Each series has its own row for a timestamp, whatever characters its name has."""
    rows = [row(0, number, mean=number * 1.0, series=name) for number, name in enumerate(NAMES, 1)]
    assert await backend.upsert(rows) == 0
    assert await everything(backend) == rows
    assert await backend.count() == len(rows)
    for own in rows:
        assert await backend.get(NOON, own.series) == own
        assert await backend.find(series=own.series) == [own]
        assert await backend.count(series=own.series) == 1
    with pytest.raises(MeasurementNotFound, match="of b at"):
        await backend.get(NOON, "b")
    assert await backend.find(series="b") == []


@many
async def test_delete_is_of_a_series(backend: Backend) -> None:
    """A row goes only where its series is named, too."""
    rows = [row(0, 5, series=name) for name in NAMES]
    await backend.upsert(rows)
    await backend.delete([row(0, 5, series="b"), row(0, 4, series="a"), rows[2], rows[-1]])
    assert await everything(backend) == [*rows[:2], *rows[3:-1]]


def find_by_definition(
    rows: Sequence[Measurement],
    series: str | None,
    since: datetime | None,
    until: datetime | None,
    after: tuple[datetime, str | None] | None,
    limit: int,
    *,
    descending: bool,
) -> list[Measurement]:
    found = []
    for r in placed(rows)[::-1] if descending else placed(rows):
        inside = (since is None or since <= r.timestamp_utc) and (
            until is None or r.timestamp_utc < until
        )
        if after is not None:
            cursor = after if after[1] is not None else after[:1]
            place = (r.timestamp_utc, r.series)[: len(cursor)]
            inside &= place < cursor if descending else place > cursor  # type: ignore[operator]
        if inside and series in (None, r.series):
            found.append(r)
    return found[:limit]


cursors = st.none() | st.tuples(
    st.sampled_from(STAMPS), st.none() | st.sampled_from([*NAMES, "b", "z"])
)


@property_of_a_backend
@given(
    st.none() | st.sampled_from(["", "a", "b", "😀"]),
    bounds,
    bounds,
    cursors,
    st.integers(0, 40),
    st.booleans(),
)
async def test_find_among_series(
    backend: Backend,
    has_series: bool,
    series: str | None,
    since: datetime | None,
    until: datetime | None,
    after: tuple[datetime, str | None] | None,
    limit: int,
    descending: bool,
) -> None:
    """Every series, range, cursor, limit and direction gives what the contract says."""
    names = ["", "a", "aa", "😀"] if has_series else [""]
    rows = [row(stamp, series=name) for stamp in STAMPS for name in names]
    await backend.upsert(rows)
    found = await backend.find(
        series=series,
        since=since,
        until=until,
        after=after[0] if after else None,
        after_series=after[1] if after else None,
        limit=limit,
        descending=descending,
    )
    assert found == find_by_definition(
        rows, series, since, until, after, limit, descending=descending
    )


@many
@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 5, 13, 14, 100])
async def test_pages_end_within_a_timestamp(backend: Backend, limit: int, descending: bool) -> None:
    """Following the pair visits each row once, wherever in a timestamp a page ends."""
    rows = [row(stamp, series=name) for stamp in (FIRST, NOON, LAST) for name in NAMES]
    await backend.upsert(rows)
    seen: list[Measurement] = []
    while page := await backend.find(
        after=seen[-1].timestamp_utc if seen else None,
        after_series=seen[-1].series if seen else None,
        limit=limit,
        descending=descending,
    ):
        seen += page
    assert seen == (rows[::-1] if descending else rows)


async def test_half_a_cursor(backend: Backend) -> None:
    """A series to go on behind says nothing without its timestamp."""
    with pytest.raises(ValueError, match="give after, too"):
        await backend.find(after_series="a")


@many
@pytest.mark.parametrize("series", [None, "a", "b", "none"])
async def test_summarize_a_series(backend: Backend, series: str | None) -> None:
    """The buckets of one series tell of its rows alone, without it of all."""
    rows = [row(at, 1, at * 1.0, 0.5, "ab"[at % 2]) for at in range(20)]
    await backend.upsert(rows)
    mine = [r for r in rows if series in (None, r.series)]
    for buckets in (1, 3, 50):
        summary = await backend.summarize(series=series, buckets=buckets)
        assert sum(bucket.count for bucket in summary) == len(mine)
        assert [b.first for b in summary][:1] == [r.timestamp_utc for r in mine[:1]]
        assert [b.last for b in summary][-1:] == [r.timestamp_utc for r in mine[-1:]]
        assert sum(b.mean * b.count for b in summary) == pytest.approx(sum(r.mean for r in mine))


@many
async def test_series_are_listed(backend: Backend) -> None:
    """Series come by name, each with its last timestamp; a page goes on behind a name."""
    assert await backend.series() == []
    await backend.upsert([row(at, series=name) for name in NAMES[::-1] for at in (0, 7, 3)])
    listed = [Series(name, NOON + 7 * SECOND) for name in NAMES]
    assert await backend.series() == listed
    for position, name in enumerate(NAMES, 1):
        assert await backend.series(after=name, limit=2) == listed[position : position + 2]
    assert await backend.series(after="C", limit=1) == [listed[NAMES.index("a")]]
    assert await backend.series(limit=0) == []
    await backend.delete([row(at, series="") for at in (0, 3, 7)])
    assert await backend.series(limit=1) == listed[1:2]
    with pytest.raises(ValueError, match="limit"):
        await backend.series(limit=-1)


@one
async def test_one_series_alone(backend: Backend) -> None:
    """Without series all rows are of the series "", and there is no other to read or to write."""
    assert await backend.series() == []
    await backend.upsert([row(0), row(5)])
    assert await backend.series() == [Series("", NOON + 5 * SECOND)]
    assert await backend.series(after="") == await backend.series(limit=0) == []
    assert await backend.find(series="") == await backend.find() == [row(0), row(5)]
    assert (await backend.count(series=""), await backend.count(series="a")) == (2, 0)
    assert await backend.find(series="a") == await backend.summarize(series="a") == []
    with pytest.raises(MeasurementNotFound):
        await backend.get(NOON, "a")
    for call in (backend.upsert, backend.delete):
        with pytest.raises(BackendUnavailable, match=r"'a' need .* series=True"):
            await call([row(0, 9), row(0, 9, series="a")])
    assert await everything(backend) == [row(0), row(5)]


@many
@pytest.mark.parametrize("name", ["a\0", "\0", "\ud800", "\udfff\ud800"])
async def test_names_that_are_no_text(backend: Backend, name: str) -> None:
    """NUL and half a surrogate pair are refused, with their whole batch, never a crash."""
    for call in (backend.upsert, backend.delete):
        with pytest.raises(BackendError, match="the name of a series") as caught:
            await call([row(0, series="a"), row(1, series=name)])
        assert not isinstance(caught.value, BackendUnavailable)
    assert await backend.count() == 0


@many
async def test_concurrent_upserts_of_series(connect: Callable[[], Backend]) -> None:
    """Upserts of the same rows of many series in opposite orders succeed, and the last stands."""
    pair = [connect(), connect()]
    batches = [
        [row(second, raw_id, series=name) for name in NAMES for second in range(20)]
        for raw_id in range(1, 13)
    ]
    await asyncio.gather(
        *(pair[number % 2].upsert(batch[:: (-1) ** number]) for number, batch in enumerate(batches))
    )
    assert await everything(pair[0]) == placed(batches[-1])


places = st.tuples(st.integers(0, 2), st.sampled_from(["", "a", "😀"]))


@many
@property_of_a_backend
@given(st.lists(st.tuples(places, st.integers(1, 99)), max_size=15), st.integers(1, 15))
async def test_upsert_commutes_in_each_series(
    backend: Backend, arrivals: list[tuple[tuple[int, str], int]], size: int
) -> None:
    """However arrivals are cut and ordered, each series and timestamp keeps its latest."""
    start = NOON + next(days) * DAY
    expected: dict[tuple[int, str], int] = {}
    for place, raw_id in arrivals:
        expected[place] = max(raw_id, expected.get(place, 0))
    for begin in range(0, len(arrivals), size):
        batch = arrivals[begin : begin + size]
        await backend.upsert([row(start + s * SECOND, n, series=name) for (s, name), n in batch])
    found = await backend.find(since=start, until=start + DAY)
    rows = [row(start + s * SECOND, n, series=name) for (s, name), n in expected.items()]
    assert found == placed(rows)


@many
@pytest.mark.parametrize("page", [1, 2, 3, 100])
@pytest.mark.parametrize("series", [None, "a"])
async def test_differences_among_series(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, page: int, series: str | None
) -> None:
    """Rows of two backends are paired by series and timestamp, or those of one series alone."""
    monkeypatch.setattr(backends, "PAGE", page)
    memory = MemoryBackend(series=True)
    left = [row(at, series=name) for at in (0, 1) for name in ("", "a", "😀")]
    right = [row(at, series=name) for at in (0, 1) for name in ("a", "b")]
    await memory.upsert(left)
    await backend.upsert(right)
    pairs = [pair async for pair in paired(memory, backend, series=series)]
    expected = [
        (r if r in left else None, r if r in right else None)
        for r in placed(list({(x.timestamp_utc, x.series): x for x in left + right}.values()))
        if series in (None, r.series)
    ]
    assert pairs == expected
    assert not same(row(), row(series="a"))


# ── What an upsert met ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("before", "batch", "superseded"),
    [
        ([], [], 0),
        ([], [row(0, 1), row(1, 2)], 0),
        ([row(0, 5)], [row(0, 5)], 0),
        ([row(0, 5)], [row(0, 5, mean=9.0)], 0),
        ([row(0, 5)], [row(0, 6), row(0, 4)], 0),
        ([row(0, 5)], [row(0, 6, mean=9.0)], 1),
        ([row(0, 5)], [row(0, 6, std=9.0)], 1),
        ([row(0, 5)], [row(0, 4, mean=9.0)], 1),
        ([row(0, 5)], [row(1, 6, mean=9.0)], 0),
        ([row(0, NO_PAYLOAD.int)], [row(0, 6, mean=9.0)], 0),
        ([], [row(0, 5), row(0, 6, mean=9.0)], 1),
        ([], [row(0, 6, mean=9.0), row(0, 5)], 1),
        ([], [row(0, 5), row(0, 6)], 0),
        ([], [row(0, 5), row(0, 6, mean=9.0), row(0, 7)], 2),
        ([row(0, 8, mean=7.0)], [row(0, 5), row(0, 6), row(1, 9, mean=9.0)], 2),
        ([row(n, 1) for n in range(9)], [row(n, 2, mean=n % 2 / 2) for n in range(20)], 5),
    ],
)
async def test_superseded(
    backend: Backend, before: list[Measurement], batch: list[Measurement], superseded: int
) -> None:
    """Payloads that meet another payload's row with other statistics are counted, nothing else."""
    await backend.upsert(before)
    assert await backend.upsert(batch) == superseded
    assert await everything(backend) == backends.winners([*before, *batch])


@many
async def test_superseded_within_a_series(backend: Backend) -> None:
    """Rows of two series at one timestamp do not meet, those of one do."""
    assert await backend.upsert([row(0, 1, 1.0, series="a"), row(0, 2, 2.0, series="b")]) == 0
    assert await backend.upsert([row(0, 3, 2.0, series="a"), row(0, 4, 2.0, series="b")]) == 1


@property_of_a_backend
@given(
    st.permutations(range(1, 13)),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1.0, 2.0])), min_size=12, max_size=12),
    st.integers(1, 12),
)
async def test_superseded_one_after_another(
    backend: Backend, ids: list[int], values: list[tuple[int, float]], size: int
) -> None:
    """However payloads are cut into batches, as many are counted as one after another would be."""
    start = NOON + next(days) * DAY
    rows = [
        row(start + at * SECOND, number, mean)
        for number, (at, mean) in zip(ids, values, strict=True)
    ]
    standing: dict[datetime, Measurement] = {}
    expected = 0
    for own in rows:
        rival = standing.get(own.timestamp_utc)
        expected += rival is not None and rival.mean != own.mean
        if rival is None or own.raw_id > rival.raw_id:
            standing[own.timestamp_utc] = own
    batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
    assert sum([await backend.upsert(batch) or 0 for batch in batches]) == expected


# ── From one shape to the other ───────────────────────────────────────────────────────────────────


def statements_in(error: BackendUnavailable) -> str:
    """Return the SQL that a message gives."""
    found = re.search("run: (.*); and then rebuild$", str(error))
    assert found, error
    return found[1]


ONE_SERIES = [row(second, second + 1, second * 0.5) for second in range(200)]
TWO_SERIES = [
    row(second, 1000 * place + second, second + place, series=name)
    for second in range(50)
    for place, name in enumerate(("b", "a"), 1)
]
LATEST = [
    Measurement(r.timestamp_utc, r.mean, r.std_dev, r.raw_id) for r in TWO_SERIES if r.series == "a"
]


@pytest.mark.parametrize(
    ("before", "rows", "after"),
    [(False, ONE_SERIES, ONE_SERIES), (True, TWO_SERIES, LATEST)],
    ids=["to many", "to one"],
)
async def test_sqlite_changes_its_shape(
    tmp_path: Path, before: bool, rows: list[Measurement], after: list[Measurement]
) -> None:
    """A filled table of the other shape is left alone, until the statements given change it."""
    path = tmp_path / "rows.sqlite"
    async with closing(SqliteBackend(path, series=before)) as backend:
        await backend.upsert(rows)
    async with closing(SqliteBackend(path, series=not before)) as backend:
        with pytest.raises(BackendUnavailable, match="To keep it") as caught:
            await backend.open()
        async with closing(SqliteBackend(path, series=before)) as as_before:
            assert await as_before.count() == len(rows)
        connection = sqlite3.connect(path)
        connection.executescript(statements_in(caught.value))
        connection.close()
        assert await everything(backend) == after
        await backend.upsert([row(0, 9999)])
        fresh = tmp_path / "fresh.sqlite"
        async with closing(SqliteBackend(fresh, series=not before)) as other:
            await other.open()
        schemas = [
            sorted(re.sub(r'["\s]', "", sql) for (sql,) in sqlite3.connect(file).execute(SCHEMA))
            for file in (path, fresh)
        ]
        assert schemas[0] == schemas[1]


SCHEMA = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL"


@pytest.mark.parametrize(
    ("before", "rows", "after"),
    [(False, ONE_SERIES, ONE_SERIES), (True, TWO_SERIES, LATEST)],
    ids=["to many", "to one"],
)
async def test_postgres_changes_its_shape(
    postgres_url: str, before: bool, rows: list[Measurement], after: list[Measurement]
) -> None:
    """A filled table of the other shape is left alone, until the statements given change it."""
    async with closing(PostgresBackend(postgres_url, series=before)) as backend:
        await backend.upsert(rows)
    async with closing(PostgresBackend(postgres_url, series=not before)) as backend:
        with pytest.raises(BackendUnavailable, match="To keep it") as caught:
            await backend.open()
        async with other_client(postgres_url) as other:
            assert await other.fetchval("SELECT count(*) FROM measurements") == len(rows)
            await other.execute(statements_in(caught.value))
            indexes = await other.fetchval(INDEXES)
            assert indexes == (1 if before else 2)
        assert await everything(backend) == after
        assert await backend.upsert([row(0, 9999, 7.0)]) == 1


INDEXES = "SELECT count(*) FROM pg_indexes WHERE tablename = 'measurements'"
OLDER = "timestamp_utc timestamptz, mean float8 NOT NULL, std_dev float8 NOT NULL"


@pytest.mark.parametrize(
    ("columns", "has_series"),
    [
        (f"{OLDER}, CONSTRAINT own_key PRIMARY KEY (timestamp_utc)", False),
        (f"{OLDER}, CONSTRAINT own_key PRIMARY KEY (timestamp_utc)", True),
        (f"{OLDER}, series text DEFAULT '', PRIMARY KEY (series, timestamp_utc)", True),
        (f"{OLDER}, series text DEFAULT '', PRIMARY KEY (series, timestamp_utc)", False),
    ],
)
async def test_postgres_takes_over_an_older_table(
    postgres_url: str, columns: str, has_series: bool
) -> None:
    """The statements given take over a table from before Dropzone; any payload wins in it."""
    older = f"CREATE TABLE measurements ({columns})"
    insert = (
        "INSERT INTO measurements (timestamp_utc, mean, std_dev) VALUES ('2019-05-01 12:00Z', 1, 1)"
    )
    async with (
        other_client(postgres_url, older, insert) as other,
        closing(PostgresBackend(postgres_url, series=has_series)) as backend,
    ):
        with pytest.raises(BackendUnavailable) as caught:
            await backend.open()
        found = re.search("run: (.*?)(; and then rebuild)?$", str(caught.value))
        assert found
        await other.execute(found[1])
        assert await everything(backend) == [row(0, NO_PAYLOAD.int, 1.0, 1.0)]
        assert await backend.upsert([row(0, 1)]) == 0
        assert await everything(backend) == [row(0, 1)]


@pytest.mark.parametrize(
    "columns",
    [
        (
            "series varchar, timestamp_utc timestamptz, mean float8, std_dev float8, raw_id uuid, "
            "PRIMARY KEY (series, timestamp_utc)"
        ),
        "series text, timestamp_utc timestamptz, mean float8, std_dev float8, raw_id uuid",
        (
            "series text, timestamp_utc timestamptz PRIMARY KEY, mean float8, std_dev float8, "
            "raw_id uuid"
        ),
    ],
)
async def test_postgres_with_a_foreign_table_of_series(postgres_url: str, columns: str) -> None:
    """A table whose series are of another type or not in the key is of another shape."""
    async with (
        other_client(postgres_url, f"CREATE TABLE measurements ({columns})"),
        closing(PostgresBackend(postgres_url, series=True)) as backend,
    ):
        with pytest.raises(BackendUnavailable, match=r'another shape .* series text COLLATE "C"'):
            await backend.open()


async def test_postgres_with_series_of_plain_text(postgres_url: str) -> None:
    """A table made without the collation is right all the same."""
    table = (
        "CREATE TABLE measurements (series text NOT NULL, timestamp_utc "
        "timestamptz NOT NULL, mean float8 NOT NULL, std_dev float8 NOT NULL, raw_id uuid NOT "
        "NULL, PRIMARY KEY (series, timestamp_utc))"
    )
    async with (
        other_client(postgres_url, table),
        closing(PostgresBackend(postgres_url, series=True)) as backend,
    ):
        rows = [row(0, series=name) for name in NAMES]
        await backend.upsert(rows)
        assert await everything(backend) == rows
        assert [s.series for s in await backend.series()] == NAMES
        assert await backend.find(after=NOON, after_series="B", limit=1) == [rows[5]]


# ── Choosing a backend ────────────────────────────────────────────────────────────────────────────


class WithoutSeries:
    """A backend of one's own from before there were series."""

    def __init__(self) -> None:
        self._rows = MemoryBackend()
        for name in ("open", "close", "ping", "upsert", "delete", "summarize"):
            setattr(self, name, getattr(self._rows, name))

    async def get(self, timestamp_utc: datetime) -> Measurement:
        return await self._rows.get(timestamp_utc)

    async def find(
        self,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        after: datetime | None = None,
        limit: int = 100,
        descending: bool = False,
    ) -> list[Measurement]:
        return await self._rows.find(
            since=since, until=until, after=after, limit=limit, descending=descending
        )

    async def count(self) -> int:
        return await self._rows.count()


class TakesSeries(WithoutSeries):
    """One that takes the option, and has no list of series."""

    def __init__(self, *, series: bool = False) -> None:
        super().__init__()
        self.has_series = series


async def test_a_backend_that_knows_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend of one's own goes on working without series, and is refused with them."""
    monkeypatch.setattr(backends, "PAGE", 2)
    backend = create_backend(f"{__name__}:WithoutSeries")
    rows = [row(second) for second in range(5)]
    await backend.upsert(rows)
    other = MemoryBackend()
    await other.upsert(rows)
    assert [pair async for pair in paired(backend, other)] == [(r, r) for r in rows]
    with pytest.raises(ValueError, match=r"does not accept its options.*series"):
        create_backend(f"{__name__}:WithoutSeries", series=True)
    with pytest.raises(ValueError, match="lacks series"):
        create_backend(f"{__name__}:TakesSeries", series=True)


def test_built_in_backends_take_series(tmp_path: Path) -> None:
    """The option is that of every backend."""
    create_backend("memory", series=True)
    create_backend("sqlite", path=tmp_path / "rows.sqlite", series=True)
    create_backend("postgres", url="postgresql://h/d", series=True)
