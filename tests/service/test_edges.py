"""What hostile requests get: the answers that docs/security.md tells, from a service that stays."""

import asyncio
import base64
import csv
import gzip
import hashlib
import io
import json
import re
import threading
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID

import aiohttp
import psutil
import pytest
from test_cli import LINE, OK, PATIENCE, Program, Server

MIB = 1024 * 1024
LIMIT = 4 * MIB  # of a body
GROWTH = 64 * MIB  # that all of these requests together may leave behind
SOME_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
SERVED = {"DROPZONE_BACKEND": "memory", "DROPZONE_SERVER_MAX_BODY_BYTES": LIMIT}
ONE_CHUNK = b"1\r\n1\r\n0\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"


def get(path: bytes = b"/health", *headers: bytes, method: bytes = b"GET") -> bytes:
    """Return a request after which the connection is closed."""
    head = [method + b" " + path + b" HTTP/1.1", b"Host: x", *headers, b"Connection: close"]
    return b"\r\n".join([*head, b"", b""])


def post(*headers: bytes, body: bytes = b"1", path: bytes = b"/ingest") -> bytes:
    return get(path, *headers, method=b"POST") + body


def sent(body: bytes, *headers: bytes) -> bytes:
    """Return a request whose framing is right."""
    return post(b"Content-Length: %d" % len(body), *headers, body=body)


class Hostile:
    """A serving program to which bytes are sent as they are."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.pid = server.process.pid
        self.host, self.port = server.url.removeprefix("http://").split(":")
        self._reader = threading.Thread(target=self._read_log)  # or else its pipe fills up
        self._reader.start()

    def _read_log(self) -> None:
        assert self.server.process.stderr is not None
        for line in self.server.process.stderr:
            self.server.log += line.decode(errors="replace")

    def stop(self) -> str:
        """Stop the program as an operator does; return its log."""
        self.server.process.terminate()
        assert self.server.process.wait(PATIENCE) == OK
        self._reader.join()
        return self.server.log

    async def send(self, request: bytes) -> bytes:
        """Return all that is answered until the connection is closed."""
        reader, writer = await asyncio.open_connection(self.host, int(self.port))
        try:
            writer.write(request)
            async with asyncio.timeout(PATIENCE):
                return await self._all_of(reader)
        finally:
            writer.close()

    async def _all_of(self, reader: asyncio.StreamReader) -> bytes:
        answer = b""
        try:
            while chunk := await reader.read(65_536):
                answer += chunk
        except ConnectionError:  # it was closed while the rest of the request was under way
            pass
        return answer

    def memory(self) -> int:
        """Return the bytes of memory that the process holds."""
        return int(psutil.Process(self.pid).memory_info().rss)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    made = Program(tmp_path_factory.mktemp("edges"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def hostile(program: Program) -> Iterator[Hostile]:
    """One service for all: what one request does to it, the next would feel."""
    hostile = Hostile(Server(program, "--port", 0, **SERVED))
    yield hostile
    logged = hostile.stop()
    assert "Traceback" not in logged, logged[logged.index("Traceback") - 500 :][:3000]


@pytest.fixture
async def session(hostile: Hostile) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(hostile.server.url) as session:
        yield session


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.[01] (\d{3})", answer)]


def nested(opening: bytes, depth: int = 100_000) -> bytes:
    return opening * depth


def bomb(layers: int = 1, size: int = 64 * MIB) -> bytes:
    """Return a gzip file that is small and becomes large."""
    packed = gzip.compress(bytes(size), 9)
    for _ in range(layers - 1):
        packed = gzip.compress(packed)
    return packed


GZIP_CHUNK = b"%x\r\n%b\r\n0\r\n\r\n" % (len(gzip.compress(b"1")), gzip.compress(b"1"))
GZIP = b"Content-Encoding: gzip"
NDJSON = b"Content-Type: application/x-ndjson"
HOSTILE: dict[str, tuple[int, bytes]] = {
    # Framing: whatever two programs could read in two ways is refused
    "length and chunks": (400, post(b"Content-Length: 6", CHUNKED, body=b"0\r\n\r\nX")),
    "chunks and length": (400, post(CHUNKED, b"Content-Length: 6", body=b"0\r\n\r\nX")),
    "two lengths": (400, post(b"Content-Length: 1", b"Content-Length: 2", body=b"12")),
    "the same length twice": (400, post(b"Content-Length: 1", b"Content-Length: 1")),
    "a list of lengths": (400, post(b"Content-Length: 1, 1")),
    "a length with a sign": (400, post(b"Content-Length: +1")),
    "a negative length": (400, post(b"Content-Length: -1")),
    "a hexadecimal length": (400, post(b"Content-Length: 0x1")),
    "a length with _": (400, post(b"Content-Length: 1_0", body=b"1" * 10)),
    "a length beyond 64 bits": (400, post(b"Content-Length: 18446744073709551617")),
    "an Arabic length": (400, post(b"Content-Length: \xd9\xa1")),
    "no length in a length": (400, post(b"Content-Length: ")),
    "another coding": (400, post(b"Transfer-Encoding: xchunked", body=ONE_CHUNK)),
    "identity": (400, post(b"Transfer-Encoding: identity", body=b"")),
    "chunked, not last": (400, post(b"Transfer-Encoding: chunked, identity", body=ONE_CHUNK)),
    "chunked twice": (400, post(CHUNKED, CHUNKED, body=ONE_CHUNK)),
    "chunked, then another": (400, post(CHUNKED, b"Transfer-Encoding: x", body=ONE_CHUNK)),
    "chunked in quotes": (400, post(b'Transfer-Encoding: "chunked"', body=ONE_CHUNK)),
    "gzip, then chunked": (501, post(b"Transfer-Encoding: gzip, chunked", body=GZIP_CHUNK)),
    "announced as gzip": (501, post(b"Transfer-Encoding: gzip, chunked", body=ONE_CHUNK)),
    "deflate, then chunked": (501, post(b"Transfer-Encoding: deflate, chunked", body=ONE_CHUNK)),
    "an unknown coding": (501, post(b"Transfer-Encoding: x, chunked", body=ONE_CHUNK)),
    "identity, then chunked": (501, post(b"Transfer-Encoding: identity, chunked", body=ONE_CHUNK)),
    "two lines of codings": (
        400,
        post(b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked", body=ONE_CHUNK),
    ),
    "a vertical tab": (400, post(b"Transfer-Encoding: \x0bchunked", body=ONE_CHUNK)),
    "a space before the colon": (400, post(b"Transfer-Encoding : chunked", body=ONE_CHUNK)),
    "a folded header": (400, post(b"X-A: a", b" b", b"Content-Length: 1")),
    "a folded coding": (400, post(b"Transfer-Encoding:", b" chunked", body=ONE_CHUNK)),
    "bare line feeds": (400, post(b"Content-Length: 1").replace(b"\r\n", b"\n")),
    "a bare line feed": (400, post(b"X-A: a\nTransfer-Encoding: chunked", b"Content-Length: 1")),
    "a bare carriage return": (400, post(b"X-A: a\rX-B: b", b"Content-Length: 1")),
    "NUL in a header": (400, post(b"X-A: a\0b", b"Content-Length: 1")),
    "a header without a name": (400, post(b": x", b"Content-Length: 1")),
    "a header without a colon": (400, post(b"nonsense", b"Content-Length: 1")),
    "a chunk with a sign": (400, post(CHUNKED, body=b"+" + ONE_CHUNK)),
    "a negative chunk": (400, post(CHUNKED, body=b"-" + ONE_CHUNK)),
    "a chunk with 0x": (400, post(CHUNKED, body=b"0x" + ONE_CHUNK)),
    "a chunk beyond 64 bits": (400, post(CHUNKED, body=b"F" * 17 + b"\r\n1\r\n")),
    "a chunk that is longer": (400, post(CHUNKED, body=b"1\r\n1X0\r\n\r\n")),
    "chunks with line feeds": (400, post(CHUNKED, body=ONE_CHUNK.replace(b"\r\n", b"\n"))),
    "an extension with a line feed": (400, post(CHUNKED, body=b"1;a\n1\r\n0\r\n\r\n")),
    "a length in a trailer": (
        400,
        post(CHUNKED, body=ONE_CHUNK[:-2] + b"Content-Length: 5\r\n\r\n"),
    ),
    # Limits of the head
    "a long path": (400, get(b"/" + b"a" * 100_000)),
    "a long header": (400, get(b"/health", b"X-A: " + b"a" * 100_000)),
    "a long name": (400, get(b"/health", b"a" * 100_000 + b": x")),
    "many headers": (400, get(b"/health", *(b"X-%d: x" % n for n in range(10_000)))),
    "many trailers": (400, post(CHUNKED, body=ONE_CHUNK[:-2] + b"X: y\r\n" * 10_000 + b"\r\n")),
    "a long method": (400, get(method=b"A" * 100_000)),
    # Odd requests
    "no host": (400, b"GET /health HTTP/1.1\r\n\r\n"),
    "two hosts": (400, get(b"/health", b"Host: y")),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n"),
    "all bytes": (400, bytes(range(256)) * 4 + b"\r\n\r\n"),
    "HTTP/2 at once": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/9.9": (400, get().replace(b"HTTP/1.1", b"HTTP/9.9")),
    "NUL in a path": (400, get(b"/raw/\0")),
    "a space in a path": (400, get(b"/he alth")),
    "an unknown expectation": (417, sent(b"1", b"Expect: miracles")),
    "TRACE": (405, get(method=b"TRACE")),
    "CONNECT": (404, get(b"evil.example:443", method=b"CONNECT")),
    "OPTIONS": (405, get(b"/ingest", method=b"OPTIONS")),
    "OPTIONS *": (404, get(b"*", method=b"OPTIONS")),
    "PUT": (405, get(b"/ingest", b"Content-Length: 0", method=b"PUT")),
    "an upgrade": (200, get(b"/health", b"Connection: Upgrade", b"Upgrade: h2c") + get()),
    # Paths
    "dots": (404, get(b"/raw/../../../../etc/passwd")),
    "encoded dots": (404, get(b"/raw/%2e%2e%2f%2e%2e%2fetc%2fpasswd/payload")),
    "twice encoded dots": (404, get(b"/raw/%252e%252e%252fetc%252fpasswd/payload")),
    "backslashes": (404, get(b"/raw/..%5c..%5cconfig.toml/payload")),
    "an absolute path": (404, get(b"/raw/%2fetc%2fpasswd/payload")),
    "an encoded NUL": (404, get(b"/raw/" + SOME_ID.encode() + b"%00/payload")),
    "bytes that are no text": (404, get(b"/raw/%ff%fe")),
    "digits of another script": (404, get(b"/raw/" + b"%D9%A0" * 32)),
    "a long raw_id": (404, get(b"/raw/" + b"a" * 8000)),
    "dots to a file of the page": (404, get(b"/docs/%2e%2e%2fswagger-ui.css")),
    # Bodies
    "nothing": (400, sent(b"")),
    "no JSON": (400, sent(b"<?xml version='1.0'?>")),
    "deep arrays": (400, sent(nested(b"["))),
    "deep objects": (400, sent(nested(b'{"a":'))),
    "deep in a line": (400, sent(nested(b"["), NDJSON)),
    "more than the limit": (413, sent(b"1" * (LIMIT + 1))),
    "a length that is a lie": (413, post(b"Content-Length: %d" % 2**62)),
    "more in chunks than the limit": (
        413,
        post(CHUNKED, body=b"%x\r\n%b\r\n0\r\n\r\n" % (LIMIT + 1, b"1" * (LIMIT + 1))),
    ),
    "a bomb": (413, sent(bomb(), GZIP)),
    "a bomb in a bomb": (400, sent(bomb(2), GZIP)),
    "a bomb that is announced twice": (415, sent(bomb(2), b"Content-Encoding: gzip, gzip")),
    "a bomb of members": (413, sent(gzip.compress(bytes(MIB)) * 8, GZIP)),
    "a deflate bomb": (413, sent(zlib.compress(bytes(64 * MIB)), b"Content-Encoding: deflate")),
    "members without end": (400, sent(gzip.compress(b"") * 100_000, GZIP)),
    "millions of empty lines": (400, sent(b"\n" * LIMIT, NDJSON)),
    "too many lines": (413, sent(b"1\n" * 100_001, NDJSON)),
    "too many objects": (413, sent(b"[" + b",".join([b"{}"] * 100_001) + b"]")),
    "too many documents": (413, sent(b"{}" * 100_001)),
    "a key without end": (400, sent(b"1", b"Idempotency-Key: " + b"a" * 256)),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile(program: Program, hostile: Hostile, name: str) -> None:
    """A hostile request gets the one answer that is documented for it, and lands nothing."""
    status, request = HOSTILE[name]
    before = program.payloads()
    answer = await hostile.send(request)
    assert statuses(answer) == [status], answer[:300]
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"Traceback" not in body
    if b"application/problem+json" in head and body:
        assert json.loads(body)["status"] == status
    assert program.payloads() == before


async def test_hostile_requests_leave_nothing(program: Program, hostile: Hostile) -> None:
    """After all of them, many times over, the process lives, answers, and has not grown."""
    for _, request in HOSTILE.values():
        await hostile.send(request)
    landed, memory = program.payloads(), hostile.memory()
    for _ in range(3):
        for _, request in HOSTILE.values():
            await hostile.send(request)
    assert hostile.memory() - memory < GROWTH
    assert program.payloads() == landed
    assert hostile.server.process.poll() is None
    assert statuses(await hostile.send(sent(LINE))) == [202]


HARMLESS: dict[str, bytes] = {
    "an extension of a chunk": post(CHUNKED, body=b"1;a=b\r\n1\r\n0\r\n\r\n"),
    "zeros before the size": post(CHUNKED, body=b"0000" + ONE_CHUNK),
    "chunked in capitals": post(b"Transfer-Encoding: CHUNKED", body=ONE_CHUNK),
    "a Host to mislead": sent(b"1").replace(b"Host: x", b'Host: evil.example/"<>'),
    "no type": sent(b"1", b'Content-Type: \xff;;;="'),
    "a charset": sent(b'"+ADw-"', b"Content-Type: application/json; charset=utf-7"),
    "a long number": sent(b"1" * MIB),
    "a long string": sent(b'"' + b"a" * MIB + b'"'),
    "a huge exponent": sent(b"1e999999999"),
    "many keys": sent(b"{" + b",".join(b'"%d":0' % n for n in range(100_000)) + b"}"),
    "one key many times": sent(b"{" + b",".join([b'"a":0'] * 100_000) + b"}"),
    "many small values": sent(b"[1," + b",".join([b'{"a":[]}'] * 300_000) + b"]"),
    "many literals": sent(b"[" + b",".join([b"NaN"] * 300_000) + b"]"),
    "a large document that is hardly JSON": sent(b'["\\ud800", NaN, "' + b"x" * MIB + b'"]'),
}


@pytest.mark.parametrize("name", HARMLESS)
async def test_harmless(program: Program, hostile: Hostile, name: str) -> None:
    """What only looks hostile is landed, once, and its address is that of this service."""
    before = program.payloads()
    answer = await hostile.send(HARMLESS[name])
    assert statuses(answer) == [202], answer[:300]
    [location] = re.findall(rb"(?i)\r\nlocation: (\S+)\r\n", answer)
    [raw_id] = program.payloads().keys() - before.keys()
    assert location == b"/raw/%b" % str(raw_id).encode()


async def test_pipelined(hostile: Hostile) -> None:
    """What follows a body is a request of its own, with an answer of its own."""
    kept_open = sent(b"1") + get(b"/nope")
    answer = await hostile.send(kept_open.replace(b"Connection: close\r\n", b"") + get())
    assert statuses(answer) == [202, 404, 200]


async def test_one_large_document_holds_up_nobody(hostile: Hostile) -> None:
    """While a document is judged that has to be parsed to be judged, others are answered."""
    body = b"[" + b",".join([b'{"a":{"b":{}}}'] * 250_000) + b", x]"
    large = asyncio.create_task(hostile.send(sent(body)))
    answered = 0
    while not large.done():
        assert statuses(await hostile.send(get())) == [200]
        answered += 1
    document = json.loads((await large).partition(b"\r\n\r\n")[2])
    assert document["position"] == body.index(b"x")
    assert answered > 1


@pytest.mark.parametrize("number", [b"1e308", b"5e-324"])
async def test_one_large_payload_holds_up_nobody(hostile: Hostile, number: bytes) -> None:
    """While numbers that are slow to read become a row, and for its receipt, others go on."""
    values = b",".join([number] * 400_000)
    body = b'{"time_stamp": "2031-05-01T10:00:00Z", "data": [%b]}' % values
    [raw_id] = re.findall(rb'"raw_id":"([^"]+)"', await hostile.send(sent(body)))
    process = post(b"Content-Length: 0", body=b"", path=b"/process")
    for request in (process, get(b"/raw/" + raw_id)):
        slow, waits = asyncio.create_task(hostile.send(request)), [0.0]
        begun = time.perf_counter()
        while not slow.done():
            asked = time.perf_counter()
            assert statuses(await hostile.send(get(b"/health"))) == [200]
            waits.append(time.perf_counter() - asked)
        assert statuses(await slow) == [200]
        if request is process:
            assert max(waits) < (time.perf_counter() - begun) / 3
    assert b'"mean":' in await slow


async def test_forms_of_a_raw_id(hostile: Hostile) -> None:
    """A raw_id has the form of RFC 9562, in any case; no other spelling of the number is found."""
    landed = json.loads((await hostile.send(sent(LINE))).partition(b"\r\n\r\n")[2])["raw_id"]
    found = [landed, landed.upper()]
    unknown = [f"{{{landed}}}", f"urn:uuid:{landed}", landed.replace("-", ""), f"{landed}/", "%20"]
    for status, spellings in ((200, found), (404, unknown)):
        for spelled in spellings:
            answer = await hostile.send(get(b"/raw/" + spelled.encode()))
            assert statuses(answer) == [status], spelled


# ── Pages and what is downloaded ──────────────────────────────────────────────────────────────────

DATA = ["/health", "/ready", "/measurements", "/measurements?format=csv", "/rejected", "/nope"]


@pytest.mark.parametrize(
    "path", [*DATA, "/openapi.json", "/docs", "/docs/swagger-ui.css", "/raw/x"]
)
async def test_safe_headers(session: aiohttp.ClientSession, path: str) -> None:
    """No answer is guessed at, framed, referred from, or says by what it was made."""
    async with session.get(path) as answer:
        headers = answer.headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == ("no-cache" if "swagger" in path else "no-store")
    assert headers["Server"] == "dropzone"
    assert "Access-Control-Allow-Origin" not in headers


async def test_page(session: aiohttp.ClientSession) -> None:
    """The page at /docs runs its own scripts alone, from this service, and loads nothing else."""
    async with session.get("/docs") as answer:
        policy, page = answer.headers["Content-Security-Policy"], await answer.text()
    rules = dict(rule.split(None, 1) for rule in policy.split("; "))
    inline = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in inline
    ]
    assert rules["default-src"] == "'none'"
    assert rules["script-src"].split() == ["'self'", *hashes]
    assert rules["connect-src"] == "'self'"
    assert not re.search(r"\son\w+=|javascript:|https?://", page)


async def test_payload_is_data(session: aiohttp.ClientSession) -> None:
    """A payload that looks like a page is JSON to a browser, in a sandbox, and unchanged."""
    body = b'"<html><script>alert(1)</script>"'
    async with session.post("/ingest", data=body, headers={"Content-Type": "text/html"}) as answer:
        location = answer.headers["Location"]
    async with session.get(f"{location}/payload") as answer:
        assert await answer.read() == body
        assert answer.content_type == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "sandbox" in answer.headers["Content-Security-Policy"]


async def test_nothing_is_a_formula(session: aiohttp.ClientSession) -> None:
    """No text of a device gets into the CSV: its cells are moments, numbers and raw_ids."""
    formula = '=HYPERLINK("http://evil.example")'
    for second, data in enumerate(([-1.5], [1e300, -1e300], [5e-324], [0.1, 0.2])):
        payload = {"time_stamp": f"2031-05-01T10:00:0{second}Z", "data": data, formula: formula}
        await session.post("/ingest", json=payload)
    await session.post("/ingest", json={"time_stamp": formula, "data": [1]})
    await session.post("/ingest", json={"time_stamp": "2031-05-01T10:00:09Z", "data": [formula]})
    await session.post("/process")
    async with session.get("/measurements?format=csv&since=2031-05-01T10:00Z") as answer:
        text = await answer.text()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert len(rows) == 4
    for row in rows:
        assert re.fullmatch(r"2031-05-01T10:00:0\d\.000000Z", row["timestamp_utc"])
        assert all(repr(float(row[name])) == row[name] for name in ("mean", "std_dev"))
        assert str(UUID(row["raw_id"])) == row["raw_id"]
    assert rows[0]["mean"] == "-1.5"


async def test_log_quotes_no_broken_request(tmp_path: Path) -> None:
    """A request that is no HTTP is one line in the log, and no key that stands in it."""
    program = Program(tmp_path)
    try:
        hostile = Hostile(await asyncio.to_thread(Server, program, "--port", 0, **SERVED))
        for _ in range(3):
            answer = await hostile.send(get(b"/health", b"x-api-key : hunter2"))
            assert statuses(answer) == [400]
        logged = await asyncio.to_thread(hostile.stop)
    finally:
        program.close()
    assert logged.count("no valid HTTP") == 3
    assert "hunter2" not in logged
    assert "Traceback" not in logged
