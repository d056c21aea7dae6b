"""The backends that keep the contract: each kind, with and without series."""

import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import asyncpg
import pytest

from backends import Backend
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.postgres_statements import DISTRIBUTED_MANY, DISTRIBUTED_ONE, MANY, ONE
from backends.sqlite import SqliteBackend

Connect = Callable[[], Backend]


class DistributedBackend(PostgresBackend):
    """One that takes the forms for a distributed table, which any PostgreSQL understands."""

    async def _choose_statements(self, _connection: object) -> None:
        self._statements = DISTRIBUTED_MANY if self._has_series else DISTRIBUTED_ONE


@pytest.fixture(params=["memory", "sqlite", "postgres", "distributed"])
def kind(request: pytest.FixtureRequest) -> str:
    """The kind of backend."""
    name: str = request.param
    return name


@pytest.fixture(params=[False, True], ids=["one", "many"])
def has_series(request: pytest.FixtureRequest) -> bool:
    """Whether the backend is made with `series=True`."""
    series: bool = request.param
    return series


@pytest.fixture
def maker(request: pytest.FixtureRequest, kind: str, has_series: bool, tmp_path: Path) -> Connect:
    """Make a backend, each time on the same rows; the tests close it by way of `connect`."""
    if kind in ("postgres", "distributed"):
        url = request.getfixturevalue("postgres_url")
        made = PostgresBackend if kind == "postgres" else DistributedBackend
        return lambda: made(url, series=has_series)
    if kind == "sqlite":
        path = tmp_path / "folder" / "rows.sqlite"
        return lambda: SqliteBackend(path, series=has_series)
    memory = MemoryBackend(series=has_series)
    return lambda: memory


@pytest.fixture
async def connect(maker: Connect, kind: str, has_series: bool) -> AsyncIterator[Connect]:
    """Make further backends on the same rows, closed at the end."""
    made: list[Backend] = []
    url = os.environ.get("DROPZONE_TEST_DATABASE_URL")
    if url and kind in ("postgres", "distributed"):
        await distribute(url, has_series=has_series)

    def make() -> Backend:
        made.append(maker())
        return made[-1]

    yield make
    for backend in made:
        await backend.close()


@pytest.fixture
async def backend(connect: Connect) -> Backend:
    """The backend under test, open and empty."""
    backend = connect()
    await backend.open()
    return backend


async def distribute(url: str, *, has_series: bool) -> None:
    """Spread the table over the workers where the database is one of Citus."""
    connection = await asyncpg.connect(url)
    try:
        if await connection.fetchval("SELECT true FROM pg_extension WHERE extname = 'citus'"):
            await connection.execute(";".join((MANY if has_series else ONE).create))
            column = "series" if has_series else "timestamp_utc"
            spread = "SELECT create_distributed_table('measurements', $1, shard_count := 4)"
            await connection.execute(spread, column)
    finally:
        await connection.close()
