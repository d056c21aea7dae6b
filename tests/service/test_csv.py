"""`GET /measurements` as CSV: the whole range, however long, and never a part for the whole."""

import asyncio
import csv
import io
import logging
import re
import socket
import struct
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from aiohttp import ClientError, ClientSession, web
from test_cli import OK, PATIENCE, Program, Server

import dropzone
from backends import Backend, BackendUnavailable, Measurement, timestamp_text
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.sqlite import SqliteBackend
from dropzone import CSV_ROWS, Config, RawConfig, create_app

NOON = datetime(2019, 5, 1, 12, tzinfo=UTC)
MANY = 2 * CSV_ROWS + 345
HEAD = ["timestamp_utc", "mean", "std_dev", "raw_id"]


def at(second: int) -> datetime:
    return NOON + timedelta(seconds=second)


async def fill(backend: Backend, count: int) -> None:
    """Make a row for each second."""
    rows = [Measurement(at(n), n / 7, 0.5, UUID(int=n)) for n in range(count)]
    await backend.upsert(rows)


class FailsLater(MemoryBackend):
    """A backend that fails when the third portion of rows is asked for."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error or BackendUnavailable("the database has gone")
        self.portions = 0

    async def find(self, **options: Any) -> list[Measurement]:
        self.portions += 1
        if self.portions == 3:
            raise self.error
        return await super().find(**options)


async def served(backend: Backend, folder: Path) -> AsyncIterator[str]:
    config = Config(raw=RawConfig(dir=folder / "raw"))
    runner = web.AppRunner(create_app(config, backend=backend), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    [(host, port)] = runner.addresses
    yield f"http://{host}:{port}"
    await runner.cleanup()


@pytest.fixture
async def backend() -> MemoryBackend:
    """Return a backend with more rows than are read at a time."""
    backend = MemoryBackend()
    await fill(backend, MANY)
    return backend


@pytest.fixture
async def url(backend: MemoryBackend, tmp_path: Path) -> AsyncIterator[str]:
    async for url in served(backend, tmp_path):
        yield url


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.close()


async def table_of(session: ClientSession, address: str, **headers: str) -> list[list[str]]:
    async with session.get(address, headers=headers) as answer:
        assert answer.status == 200
        assert answer.content_type == "text/csv"
        assert "Link" not in answer.headers
        text = await answer.text()
    head, *table = csv.reader(io.StringIO(text, newline=""))
    assert head == HEAD
    return table


@pytest.mark.parametrize(
    ("query", "seconds"),
    [
        ("", range(MANY)),
        ("&order=desc", range(MANY - 1, -1, -1)),
        (f"&since={timestamp_text(at(10))}&until={timestamp_text(at(9000))}", range(10, 9000)),
        (f"&after={timestamp_text(at(5000))}", range(5001, MANY)),
        (f"&after={timestamp_text(at(7000))}&order=desc", range(6999, -1, -1)),
        (f"&until={timestamp_text(at(CSV_ROWS))}", range(CSV_ROWS)),
        ("&since=2030-01-01T00:00Z", range(0)),
    ],
)
async def test_whole_range(url: str, session: ClientSession, query: str, seconds: range) -> None:
    """Without a limit all rows of the range come, each once, in the order that was asked for."""
    table = await table_of(session, f"{url}/measurements?format=csv{query}")
    assert [row[0] for row in table] == [timestamp_text(at(second)) for second in seconds]
    assert table == await table_of(session, f"{url}/measurements?{query[1:]}", Accept="text/csv")


async def test_every_row_as_it_is(url: str, session: ClientSession) -> None:
    """Each line has the timestamp, the exact doubles and the raw_id of its row."""
    table = await table_of(session, f"{url}/measurements?format=csv")
    assert [(float(mean), float(dev), UUID(raw_id)) for _, mean, dev, raw_id in table] == [
        (n / 7, 0.5, UUID(int=n)) for n in range(MANY)
    ]


async def test_head(url: str, session: ClientSession) -> None:
    """HEAD has the headers of GET but that of the chunks, and no body."""
    address = f"{url}/measurements?format=csv"
    async with session.get(address) as got, session.head(address) as head:
        assert await head.read() == b""
        for name in ("Content-Type", "Vary", "Cache-Control", "X-Content-Type-Options"):
            assert head.headers[name] == got.headers[name]
        assert got.headers["Transfer-Encoding"] == "chunked"
        assert "Content-Length" not in got.headers
        assert head.headers["X-Request-ID"]


async def test_constant_memory(tmp_path: Path, session: ClientSession) -> None:
    """Four times the rows take the same memory."""
    sqlite = SqliteBackend(tmp_path / "rows.sqlite")
    peaks = []
    async for url in served(sqlite, tmp_path):
        for count in (15_000, 60_000):
            await fill(sqlite, count)
            tracemalloc.start()
            async with session.get(f"{url}/measurements?format=csv") as answer:
                lines = 0
                async for chunk in answer.content.iter_any():
                    lines += chunk.count(b"\n")
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert lines == 1 + count
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize("error", [BackendUnavailable("it has gone"), RuntimeError("a defect")])
async def test_failing_in_the_middle(
    tmp_path: Path, session: ClientSession, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """A client notices that its CSV is not whole; the log says whose, how far it came, and why."""
    backend = FailsLater(error)
    await fill(backend, MANY)
    async for url in served(backend, tmp_path):
        with pytest.raises(ClientError):
            await table_of(session, f"{url}/measurements?format=csv", **{"X-Request-ID": "mine"})
        assert len(await table_of(session, f"{url}/measurements?format=csv")) == MANY
    [record] = [r for r in caplog.records if "cut off" in r.getMessage()]
    assert record.levelno == logging.WARNING
    expected = f"request mine: its CSV was cut off behind {2 * CSV_ROWS} rows: {error}"
    assert record.getMessage() == expected
    assert bool(record.exc_info) == isinstance(error, RuntimeError)
    assert [r for r in caplog.records if r.name == "aiohttp.server"] == []


async def test_failing_at_once(tmp_path: Path, session: ClientSession) -> None:
    """Where the first rows cannot be read there is a problem document, and no CSV."""
    backend = FailsLater()
    backend.portions = 2
    async for url in served(backend, tmp_path):
        async with session.get(f"{url}/measurements?format=csv") as answer:
            assert (answer.status, answer.headers["Retry-After"]) == (503, "5")
            assert (await answer.json(content_type=None))["code"] == "backend_unavailable"


OWN_BACKEND = """
from test_csv import FailsLater, fill, MANY

class Own(FailsLater):
    async def open(self):
        if not self._rows:
            await fill(self, MANY)
"""


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_failing_in_the_program(program: Program, version: str) -> None:
    """The program resets the connection, by which also an HTTP/1.0 client notices."""
    (program.home / "own.py").write_text(OWN_BACKEND)
    paths = [Path(dropzone.__file__).parent, Path(__file__).parent, Path(__file__).parents[1]]
    path = ":".join(map(str, [program.home, *paths]))
    server = Server(program, PYTHONPATH=path, DROPZONE_BACKEND="own:Own")
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE) as client:
        line = f"GET /measurements?format=csv HTTP/{version}\r\nHost: {host}\r\n\r\n"
        client.sendall(line.encode())
        assert client.recv(8) == f"HTTP/{version}".encode()
        with pytest.raises(ConnectionResetError):
            all(iter(lambda: client.recv(65536), b""))
    assert server.stop() == OK
    assert re.search(r"request \w+: its CSV was cut off behind 10000 rows", server.log)
    assert "Traceback" not in server.log


async def test_slow_readers_hold_no_connection(
    postgres_url: str, tmp_path: Path, session: ClientSession
) -> None:
    """While readers stall in the middle of their CSV, the one connection answers others."""
    postgres = PostgresBackend(postgres_url, pool=1)
    await fill(postgres, 100_000)
    async for url in served(postgres, tmp_path):
        host, port = url.removeprefix("http://").split(":")
        stalled = []
        for _ in range(3):
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            client.sendall(b"GET /measurements?format=csv HTTP/1.1\r\nHost: x\r\n\r\n")
            stalled.append(client)
        async with asyncio.timeout(PATIENCE):
            for _ in range(20):
                async with session.get(f"{url}/measurements?limit=1") as answer:
                    assert answer.status == 200
                await asyncio.sleep(0.05)
        for client in stalled:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
