"""`Expect`: a body is invited when nothing else refuses it; any other expectation is refused."""

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

import dropzone
from backends.memory import MemoryBackend
from dropzone import (
    AuthConfig,
    Config,
    LimitsConfig,
    Rate,
    RawConfig,
    Secret,
    ServerConfig,
    create_app,
)

PATIENCE = 20  # seconds until what hangs is taken for hanging
INVITED = b"HTTP/1.1 100 Continue\r\n\r\n"
KEY = b"x-api-key: sesam"
EXPECT = b"Expect: 100-continue"
LENGTH = b"Content-Length: 2"


class Line:
    """A connection on which bytes are sent as they are."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, request: bytes, *headers: bytes, body: bytes = b"") -> None:
        version = b"" if b"HTTP/" in request else b" HTTP/1.1"
        head = [request + version, b"Host: x", *headers, b"", b""]
        self.writer.write(b"\r\n".join(head) + body)

    async def head(self) -> bytes:
        """Return the next head that the service sends, whatever its status."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.readuntil(b"\r\n\r\n")

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """Return the next answer, which has to be whole: no 100 before it, no text behind it."""
        status, *lines = (await self.head()).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in lines if line)
        async with asyncio.timeout(PATIENCE):
            text = await self.reader.readexactly(int(headers["content-length"]))
        return int(status.split()[1]), headers, json.loads(text)

    async def end(self) -> bytes:
        """Return all that comes until the service closes the connection."""
        async with asyncio.timeout(PATIENCE):
            return await self.reader.read()


Open = Callable[..., Awaitable[Line]]


@pytest.fixture
async def opening(tmp_path: Path) -> AsyncIterator[Open]:
    """Return what connects to a service that is served at first."""
    async with AsyncExitStack() as stack:
        served: dict[str, tuple[str, int]] = {}

        async def connect(per_address: str = "", mounted: str = "", **raw: Any) -> Line:
            if not served:
                config = Config(
                    server=ServerConfig(max_body_bytes=1000),
                    raw=RawConfig(dir=tmp_path / "raw", **raw),
                    auth=AuthConfig(api_key=Secret("sesam")),
                    limits=LimitsConfig(per_address=Rate(per_address)),
                )
                app = create_app(config, backend=MemoryBackend())
                if mounted:
                    outer = web.Application()
                    outer.add_subapp(mounted, app)
                    app = outer
                ends: dict[str, float] = {"lingering_time": 0.2, "shutdown_timeout": 0.1}
                runner = web.AppRunner(app, access_log=None, auto_decompress=False, **ends)
                await runner.setup()
                stack.push_async_callback(runner.cleanup)
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                [served["address"]] = runner.addresses
            reader, writer = await asyncio.open_connection(*served["address"])
            stack.callback(writer.close)
            return Line(reader, writer)

        yield connect


async def test_invited(opening: Open):
    """A body that nothing refuses is invited, lands, and the connection goes on."""
    line = await opening()
    for _ in range(2):
        line.send(b"POST /ingest", KEY, EXPECT, LENGTH)
        assert await line.head() == INVITED
        line.writer.write(b"[]")
        status, headers, _ = await line.answer()
        assert status == 202
        assert "connection" not in headers


async def test_invited_in_chunks(opening: Open):
    """A body without a length is invited, too."""
    line = await opening()
    line.send(b"POST /ingest", KEY, b"Expect: 100-Continue", b"Transfer-Encoding: chunked")
    assert await line.head() == INVITED
    line.writer.write(b"2\r\n[]\r\n0\r\n\r\n")
    assert (await line.answer())[0] == 202


@pytest.mark.parametrize(
    ("request_line", "headers", "status"),
    [
        (b"POST /ingest", (LENGTH,), 401),
        (b"POST /ingest", (b"x-api-key: wrong", LENGTH), 401),
        (b"POST /ingest", (KEY, b"Content-Length: 1001"), 413),
        (b"POST /ingest", (KEY, LENGTH, b"Content-Encoding: br"), 415),
        (b"POST /ingest", (KEY, LENGTH, b"Idempotency-Key: \xe4"), 400),
        (b"POST /nope", (KEY, LENGTH), 404),
        (b"PUT /ingest", (KEY, LENGTH), 405),
        (b"POST /process", (KEY, LENGTH), 200),
    ],
)
async def test_not_invited(
    opening: Open, request_line: bytes, headers: tuple[bytes, ...], status: int
):
    """A body that is refused or not needed is not invited; nor is it mistaken for a request."""
    line = await opening()
    line.send(request_line, EXPECT, *headers)
    answered, sent, _ = await line.answer()
    assert (answered, sent["connection"]) == (status, "close")
    line.send(b"POST /ingest", KEY, LENGTH, body=b"[]")
    assert await line.end() == b""


async def test_not_invited_beyond_the_limit(opening: Open):
    """Whoever is beyond the limit of requests is not invited."""
    line = await opening(per_address="1/hour")
    line.send(b"POST /ingest", KEY, LENGTH, body=b"[]")
    assert (await line.answer())[0] == 202
    line.send(b"POST /ingest", KEY, EXPECT, LENGTH)
    status, _, problem = await line.answer()
    assert (status, problem["code"]) == (429, "rate_limited")


@pytest.mark.parametrize(("share", "small"), [("SMALL_IN_FLIGHT", 600), ("LARGE_IN_FLIGHT", 100)])
async def test_not_invited_where_there_is_no_room(
    opening: Open, monkeypatch: pytest.MonkeyPatch, share: str, small: int
):
    """Where the disk, or what is in flight of its size, has no room for a body, none is invited."""
    monkeypatch.setattr(dropzone, share, 1000)
    monkeypatch.setattr(dropzone, "SMALL_BODY", small)
    line = await opening()
    line.send(b"POST /ingest", KEY, b"Content-Length: 600", body=b"[" * 500)
    other = await opening()
    other.send(b"POST /ingest", KEY, EXPECT, b"Content-Length: 600")
    status, _, problem = await other.answer()
    assert (status, problem["code"]) == (503, "overloaded")
    line.writer.close()
    real = os.statvfs("/")  # of which 1,000 bytes are left beyond the reserve, a twentieth
    tight = os.statvfs_result((1, 1, 10**9, 0, 10**9 // 20 + 1000, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: tight)
    line = await opening()
    line.send(b"POST /ingest", KEY, EXPECT, LENGTH)
    assert await line.head() == INVITED
    line = await opening()
    line.send(b"POST /ingest", KEY, EXPECT, b"Content-Length: 501")  # and as much for the journal
    status, _, problem = await line.answer()
    assert (status, problem["code"]) == (503, "storage_full")


async def test_a_body_that_is_there_needs_no_invitation(opening: Open):
    """A client that does not wait gets the one answer."""
    line = await opening()
    line.send(b"POST /ingest", KEY, EXPECT, LENGTH, body=b"[]")
    assert (await line.answer())[0] == 202


async def test_http_1_0(opening: Open):
    """A client of HTTP/1.0, which knows no 100, gets none, and is refused nothing."""
    for value in (b"100-continue", b"miracles"):
        line = await opening()
        line.send(b"POST /ingest HTTP/1.0", KEY, b"Expect: " + value, LENGTH)
        await asyncio.sleep(0.1)
        line.writer.write(b"[]")
        assert (await line.answer())[0] == 202


@pytest.mark.parametrize("mounted", ["", "/dropzone"])
@pytest.mark.parametrize(
    "request_line", [b"POST %b/ingest", b"GET %b/health", b"GET %b/nope", b"DELETE %b/health"]
)
async def test_other_expectations(opening: Open, mounted: str, request_line: bytes, caplog: Any):
    """Any other expectation is 417: with a request id and a line in the log, never echoed."""
    caplog.set_level("INFO")
    line = await opening(mounted=mounted)
    line.send(request_line % mounted.encode(), b"Expect: <i>miracles", b"X-Request-ID: mine", KEY)
    status, headers, problem = await line.answer()
    assert (status, problem["code"], problem["request_id"]) == (417, "expectation_failed", "mine")
    assert headers["content-type"] == "application/problem+json"
    assert headers["x-request-id"] == "mine"
    assert headers["x-content-type-options"] == "nosniff"
    assert "miracles" not in str(problem) + caplog.text
    [logged] = [record.getMessage() for record in caplog.records if "mine" in record.getMessage()]
    assert re.search(r"status=417 .*code=expectation_failed", logged)


async def test_paths_of_nobody(opening: Open):
    """So it is for a request that is for no path at all."""
    for request_line in (b"OPTIONS *", b"CONNECT elsewhere.example:443"):
        line = await opening()
        line.send(request_line, b"Expect: miracles")
        assert (await line.answer())[0] == 417


async def test_expectations_count(opening: Open):
    """What is expected in vain counts once for the limit of its address, on any path."""
    line = await opening(per_address="2/hour")
    for path in (b"/ingest", b"/nope"):
        line.send(b"GET " + path, b"Expect: miracles")
        assert (await line.answer())[0] == 417
    line.send(b"GET /nope", b"Expect: miracles")
    assert (await line.answer())[0] == 429
