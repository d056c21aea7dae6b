"""One client does its worst with what its key allows, and nobody else notices."""

import asyncio
import gzip
import io
import json
import logging
import os
import signal
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
import test_cli
import test_http
import trustme
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from test_cli import OK, Program, Server
from test_http import SOME_ID, Serve, Service, check_problem, reading

import dropzone
from backends import Backend, Bucket, Measurement, json_of
from backends.memory import MemoryBackend
from backends.raw import next_raw_id
from backends.raw.folders import Folders
from backends.sqlite import SqliteBackend
from dropzone import (
    Config,
    KeyConfig,
    MeasurementPage,
    Processor,
    RawConfig,
    Secret,
    create_app,
    json_of_page,
    openapi_json,
)

serve, quiet, program = test_http.serve, test_http.quiet, test_cli.program  # fixtures
MIB = 1024 * 1024
MANY = 60  # requests
NOON = datetime(2019, 5, 1, 12, tzinfo=UTC)
LARGE = json.dumps([1.25] * 100_000).encode()  # more than is landed without a thread


class Held(MemoryBackend):
    """Answers what takes long when it is let go, and counts how often it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.go = asyncio.Event()
        self.asked: list[str] = []

    async def find(self, **options: Any) -> list[Measurement]:
        self.asked.append("find")
        await self.go.wait()
        return await super().find(**options)

    async def summarize(self, **_: Any) -> list[Bucket]:
        self.asked.append("summarize")
        await self.go.wait()
        return []

    async def ping(self) -> None:
        self.asked.append("ping")


def rows_of(count: int) -> list[Measurement]:
    return [Measurement(NOON + timedelta(seconds=n), n / 7, 0.5, UUID(int=n)) for n in range(count)]


async def fill(backend: Backend, count: int) -> None:
    """Write rows, and close the backend."""
    await backend.upsert(rows_of(count))
    await backend.close()


def connected(service: Service, small: bool = False) -> socket.socket:
    """Connect as a client that does not wait for anything; a small one takes little unread."""
    host, port = service.url.removeprefix("http://").split(":")
    client = socket.socket()
    if small:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((host, int(port)))
    return client


@contextmanager
def asking(
    service: Service,
    path: str,
    count: int = MANY,
    method: str = "GET",
    *,
    small: bool = False,
    key: str = "",
) -> Iterator[list[socket.socket]]:
    """Ask so many times at once, and read no answer."""
    clients = [connected(service, small) for _ in range(count)]
    for client in clients:
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nx-api-key: {key}\r\nConnection: close"
        client.sendall(f"{head}\r\n\r\n".encode())
    try:
        yield clients
    finally:
        for client in clients:
            client.close()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def check_that_all_goes_on(service: Service) -> None:
    """Hold that payloads of each kind land, are processed, and that the service says it is well."""
    async with asyncio.timeout(30):
        for path in ("/health", "/ready", "/status"):
            assert (await service("GET", path)).status == 200
        await service.land(reading())
        await service.land(LARGE)
        packed = {"Content-Encoding": "gzip"}
        for body in (b"[1]", LARGE):
            landed = await service("POST", "/ingest", data=gzip.compress(body), headers=packed)
            assert landed.status == 202
        await service.process()


# ── Connections: a crowd is let in at once ────────────────────────────────────────────────────────

SOMAXCONN = Path("/proc/sys/net/core/somaxconn")  # what the system allows; macOS allows 128
CROWD = min(300, int(SOMAXCONN.read_text())) if SOMAXCONN.exists() else 100


def test_a_crowd_of_connections(program: Program):
    """Hundreds may connect at once while the service is busy; then all of them are answered."""
    server, clients = Server(program), list[socket.socket]()
    host, port = server.url.removeprefix("http://").split(":")
    server.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(CROWD):
            clients.append(socket.create_connection((host, int(port)), timeout=10))
            clients[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    finally:
        server.process.send_signal(signal.SIGCONT)
    for client in clients:
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        client.close()
    assert server.stop() == OK


# ── Threads: whoever waits holds up nobody else ───────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "call", "at_once"),
    [
        ("/measurements", "find", 4),
        ("/measurements?format=csv", "find", 4),
        ("/measurements/summary", "summarize", 1),
    ],
)
async def test_a_backend_that_takes_its_time(serve: Serve, path: str, call: str, at_once: int):
    """However many wait for rows, the rest goes on; who has gone meanwhile costs nothing."""
    backend = Held()
    service = await serve(backend)
    with asking(service, path):
        await until(lambda: backend.asked.count(call) == at_once)
        await check_that_all_goes_on(service)
        looks = call == "find"  # for other nodes, by those who process
        assert backend.asked.count(call) <= at_once + looks
    await asyncio.sleep(0.2)  # until it is noticed that they have gone
    backend.go.set()
    async with asyncio.timeout(30):
        assert (await service("GET", path)).status == 200
    assert backend.asked.count(call) <= at_once + 2 + looks < MANY


def key_of(name: str) -> KeyConfig:
    """Return a key that may read, and is its own name."""
    return KeyConfig(name, Secret(f"sha256:{dropzone.hash_of(name).hex()}"), ("read",))


READER, OWN = key_of("reader"), {"x-api-key": "own"}


async def test_all_readers_together(serve: Serve):
    """Of all callers together no more than eight are read for at a time."""
    backend, names = Held(), ("a", "b", "c")
    service = await serve(backend, keys=tuple(map(key_of, names)))
    with ExitStack() as readers:
        for name in names:
            readers.enter_context(asking(service, "/measurements", 10, key=name))
        await until(lambda: backend.asked.count("find") >= 8)
        await asyncio.sleep(0.3)
        assert backend.asked.count("find") == 8
    backend.go.set()


@pytest.mark.parametrize(
    ("path", "call", "others"),
    [
        ("/measurements", "find", "/measurements?limit=7"),
        ("/measurements?format=csv", "find", "/measurements?limit=7&format=csv"),
        ("/measurements/summary?buckets=9", "summarize", "/measurements/summary?buckets=7"),
    ],
)
async def test_one_reader_leaves_turns_to_another(serve: Serve, path: str, call: str, others: str):
    """However many answers one key waits for, those of another key come meanwhile."""

    class Slow(Held):
        async def find(self, **options: Any) -> list[Measurement]:
            return [] if options["limit"] == 8 else await super().find(**options)

        async def summarize(self, **options: Any) -> list[Bucket]:
            return [] if options["buckets"] == 7 else await super().summarize(**options)

    backend = Slow()
    service = await serve(backend, key="own", keys=(READER,))
    with asking(service, path, key="reader"):
        await until(lambda: call in backend.asked)
        await asyncio.sleep(0.2)  # until all are there
        async with asyncio.timeout(30):
            assert (await service("GET", others, headers=OWN)).status == 200
    backend.go.set()


async def test_one_reader_leaves_receipts_to_another(serve: Serve):
    """However many receipts one key waits for, those that another key asks for come meanwhile."""
    service = await serve(key="own", keys=(READER,))
    slow, quick = [
        (await service("POST", "/ingest", data=b"[1]", headers=OWN)).json["raw_id"] for _ in "12"
    ]
    file = service.folder / "raw" / f"{slow}.json"
    with never_read(file), asking(service, f"/raw/{slow}", key="reader"):
        await asyncio.sleep(0.3)
        async with asyncio.timeout(30):
            assert (await service("GET", f"/raw/{quick}", headers=OWN)).status == 200


async def test_long_summaries_leave_pages_alone(serve: Serve):
    """While summaries take long, pages of rows are answered."""

    class Summing(Held):
        find = MemoryBackend.find

    backend = Summing()
    service = await serve(backend)
    with asking(service, "/measurements/summary"):
        await until(lambda: backend.asked.count("summarize") == 1)
        async with asyncio.timeout(30):
            assert (await service("GET", "/measurements")).status == 200
    backend.go.set()


@contextmanager
def never_read(path: Path) -> Iterator[None]:
    """Put a pipe where a file is: whoever opens it waits until it is written to."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    try:
        yield
    finally:
        opened = os.open(path, os.O_RDWR)  # lets all go on that wait
        path.unlink()
        os.close(opened)


@pytest.mark.parametrize("what", ["", "/payload"])
async def test_a_disk_that_takes_its_time(serve: Serve, what: str):
    """However many wait for a payload to be read, the rest goes on."""
    service = await serve()
    raw_id = await service.land([1])
    await service.process()
    rejected = service.folder / "rejected" / f"{raw_id}.json"
    with never_read(rejected), asking(service, f"/raw/{raw_id}{what}"):
        await asyncio.sleep(0.3)
        await check_that_all_goes_on(service)
        async with asyncio.timeout(30):
            assert (await service("GET", "/measurements/summary")).status == 200


async def test_retries_that_take_their_time(serve: Serve, caplog: pytest.LogCaptureFixture):
    """However many ask for a retry of all, one is at work, the others may go, the rest goes on."""
    caplog.set_level(logging.INFO, "dropzone.audit")
    service = await serve()
    raw_id = await service.land([1])
    await service.process()
    reason, path = service.folder / "rejected" / f"{raw_id}.reason.json", "/rejected/retry"
    with never_read(reason):
        with asking(service, path, method="POST"):
            await asyncio.sleep(0.3)
            await check_that_all_goes_on(service)
            async with asyncio.timeout(30):
                assert (await service("GET", "/measurements")).status == 200
        await asyncio.sleep(0.2)  # until it is noticed that they have gone
    async with asyncio.timeout(30):
        assert (await service("POST", path)).status == 200
    assert [r.getMessage().split()[0] for r in caplog.records].count("action=retry") == 2


async def test_a_retry_of_few_leaves_the_others_alone(serve: Serve):
    """Whoever has a code retried waits for the payloads that have it, however many others are."""
    service = await serve()
    raw_id = await service.land([1])
    await service.land({"data": [1]})
    await service.process()
    with never_read(service.folder / "rejected" / f"{raw_id}.reason.json"):
        async with asyncio.timeout(30):
            done = await service("POST", "/rejected/retry?code=time_stamp_missing")
    assert done.json == {"retried": 1}


async def test_readiness_is_looked_at_once_for_all(serve: Serve):
    """Those who ask for readiness at the same moment share one ping."""

    class Pinged(Held):
        async def ping(self) -> None:
            await super().ping()
            await self.go.wait()

    backend = Pinged()
    backend.go.set()  # it is pinged at the start
    service = await serve(backend)
    backend.go.clear()
    backend.asked.clear()
    answers = [asyncio.create_task(service("GET", "/ready")) for _ in range(20)]
    await until(lambda: backend.asked)
    await asyncio.sleep(0.3)
    backend.go.set()
    for answer in await asyncio.gather(*answers):
        assert (answer.status, answer.json["checks"]["backend"]) == (200, "ok")
    assert backend.asked == ["ping"]


async def test_processing_in_order(tmp_path: Path):
    """Those who ask for processing have their turn in the order in which they asked."""
    for name in ("raw", "processed", "rejected", "journal"):
        (tmp_path / name).mkdir()
    folders, raw_id = Folders(tmp_path / "raw"), UUID(SOME_ID)
    for n in range(12):
        raw_id = next_raw_id(raw_id)
        at = f"2019-05-01T10:00:{n:02}Z"
        folders.path(raw_id, "pending").write_bytes(json.dumps(reading(at)).encode())
    processor, done = Processor(folders, MemoryBackend(), batch=1), list[int]()

    async def process(number: int) -> None:
        await processor.process(1)
        done.append(number)

    async with asyncio.timeout(30), asyncio.TaskGroup() as calls:
        for number in range(12):
            calls.create_task(process(number))
    assert done == list(range(12))
    await processor.close()


def test_the_description_is_made_once():
    """The document of the API is made once for each place that it is served at."""
    assert openapi_json("/a", has_series=False) is openapi_json("/a", has_series=False)
    for path in ("/a", "/b"):
        description = json.loads(openapi_json(path, has_series=False))
        assert description["servers"] == [{"url": path}]


@pytest.mark.parametrize("count", [0, 1, 499, 500, 501, 1234])
@pytest.mark.parametrize("following", [None, NOON])
def test_pages_made_in_portions(count: int, following: datetime | None):
    """A page that is made a few hundred rows at a time is the one that is made at once."""
    page = MeasurementPage(rows_of(count), following)
    assert json_of_page(page) == json_of(page)


# ── Memory: an answer waits for its client without being held ─────────────────────────────────────

PAYLOAD = json.dumps(["a payload that is sent in pieces"] * 250_000).encode()  # 8.5 MiB


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let clients be cut off after a second."""
    monkeypatch.setattr(dropzone, "STALLED", 1.0)
    monkeypatch.setattr(dropzone, "LOOK_AROUND", 0.1)


@pytest.fixture
async def rows(serve: Serve) -> Service:
    """Return a service with as many rows as a page can have."""
    backend = MemoryBackend()
    service = await serve(backend, limit=16 * MIB)
    await fill(backend, 12_000)
    return service


async def is_cut_off(client: socket.socket) -> bool:
    """Read to the end, and say whether the connection was reset there."""
    loop = asyncio.get_running_loop()
    client.setblocking(False)
    try:
        async with asyncio.timeout(30):
            while await loop.sock_recv(client, MIB):
                pass
    except ConnectionResetError:
        return True
    return False


async def large_paths(service: Service) -> list[str]:
    """Return the addresses of large answers of each kind."""
    landed = await service("POST", "/ingest", data=io.BytesIO(PAYLOAD))
    raw_id = landed.json["raw_id"]
    pages = ["?limit=10000", "?limit=10000&format=csv", "?format=csv"]
    return [f"/raw/{raw_id}/payload", *(f"/measurements{page}" for page in pages)]


@pytest.mark.usefixtures("impatient")
async def test_who_takes_nothing_is_cut_off(rows: Service):
    """A client that does not take its answer is cut off after a while, whatever it asked for."""
    for path in [*await large_paths(rows), "/docs/swagger-ui-bundle.js"]:
        with asking(rows, path, 1, small=True) as [client]:
            await asyncio.sleep(2)
            assert await is_cut_off(client), path


@pytest.mark.usefixtures("impatient")
async def test_who_takes_nothing_by_tls_is_cut_off(tmp_path: Path):
    """So is one whose connection is encrypted, after others have come and gone."""
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / f"{SOME_ID}.json").write_bytes(PAYLOAD)
    runner = web.AppRunner(
        create_app(Config(raw=RawConfig(dir=tmp_path / "raw")), backend=MemoryBackend())
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    [address] = runner.addresses
    answers = []
    for path in ("/health", f"/raw/{SOME_ID}/payload"):
        reader, writer = await asyncio.open_connection(*address, limit=1024, ssl=trusting)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        await asyncio.sleep(3)
        async with asyncio.timeout(30):
            answers += await asyncio.gather(reader.read(), return_exceptions=True)
        writer.transport.abort()
    await runner.cleanup()
    assert answers[0].endswith(b'{"status":"ok"}')
    assert isinstance(answers[1], ConnectionError)


@pytest.mark.usefixtures("impatient")
async def test_who_takes_little_by_little_gets_all(rows: Service):
    """A client that is slow, and takes something every now and then, gets its answer."""
    [path, *_] = await large_paths(rows)
    host, port = rows.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert b"Content-Length: %d\r\n" % len(PAYLOAD) in head
    body = b""
    async with asyncio.timeout(60):
        while len(body) < len(PAYLOAD):
            body += await reader.readexactly(min(len(PAYLOAD) // 12, len(PAYLOAD) - len(body)))
            await asyncio.sleep(0.3)
    assert body == PAYLOAD
    writer.close()


@pytest.mark.usefixtures("impatient")
async def test_who_waits_for_the_service_is_not_cut_off(serve: Serve):
    """A client whose CSV comes to a stop since the database is slow gets all of it later."""

    class Pausing(MemoryBackend):
        async def find(self, **options: Any) -> list[Measurement]:
            await asyncio.sleep(2 if options["after"] else 0)
            return await super().find(**options)

    backend = Pausing()
    service = await serve(backend)
    await fill(backend, 6000)
    answer = await service("GET", "/measurements?format=csv")
    assert (answer.status, answer.body.count(b"\n")) == (200, 6001)


async def test_room_for_answers(rows: Service, monkeypatch: pytest.MonkeyPatch):
    """Where too much waits to be taken, another large answer is refused until room can be made.

    Room is made by cutting off who takes nothing; small answers, and landing, need none.
    """
    monkeypatch.setattr(dropzone, "UNTAKEN", 5 * MIB)
    path = "/measurements?limit=10000"
    with asking(rows, path, 8, small=True) as clients:
        async with asyncio.timeout(30):
            while True:
                answer = await rows("GET", path)
                if answer.status == 503:
                    break
        check_problem(answer, 503, "overloaded")
        assert int(answer.headers["Retry-After"]) > 0
        await check_that_all_goes_on(rows)
        async with asyncio.timeout(30):
            while (await rows("GET", path)).status == 503:
                await asyncio.sleep(0.1)
        assert True in [await is_cut_off(client) for client in clients]


async def test_one_reader_leaves_room_for_another(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    """However much one key leaves on its way, another gets its answers, and nobody is cut off."""
    monkeypatch.setattr(dropzone, "UNTAKEN", 8 * MIB)
    monkeypatch.setattr(dropzone, "LOOK_AROUND", 60.0)  # seconds, in which nobody is slow
    backend, path = MemoryBackend(), "/measurements?limit=10000"
    service = await serve(backend, key="own", keys=(READER,))
    await fill(backend, 12_000)
    with asking(service, path, 12, small=True, key="reader"):
        async with asyncio.timeout(30):
            while (await service("GET", path, headers={"x-api-key": "reader"})).status == 200:
                pass
        for _ in range(3):
            assert (await service("GET", path, headers=OWN)).status == 200


async def test_room_is_given_back(rows: Service, monkeypatch: pytest.MonkeyPatch):
    """Whatever was taken leaves room to the next answers, on connections of their own, too."""
    paths = await large_paths(rows)
    monkeypatch.setattr(dropzone, "UNTAKEN", 2 * MIB)
    for path in [*paths, *paths[:2], *paths]:
        answer = await rows("GET", path, headers={"Connection": "close"})
        assert answer.status == 200, path


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 131_072, 1_000_000])
async def test_payloads_of_any_size(serve: Serve, size: int):
    """GET has the exact bytes and their length, HEAD the same head; the connection goes on."""
    service = await serve(limit=2 * MIB)
    body = b"1" * size
    path = f"/raw/{await service.land(body)}/payload"
    for _ in range(2):
        got, head = await service("GET", path), await service("HEAD", path)
        assert (got.status, got.body, head.status, head.body) == (200, body, 200, b"")
        for answer in (got, head):
            assert answer.headers["Content-Length"] == str(size)
            assert answer.headers["Content-Type"] == "application/json"
            assert answer.headers["Content-Security-Policy"].endswith("sandbox")


async def test_a_payload_that_becomes_shorter(rows: Service, caplog: pytest.LogCaptureFixture):
    """A client whose payload ends too early on the disk notices, and the log says so."""
    [path, *_] = await large_paths(rows)
    with asking(rows, path, 1, small=True) as [client]:
        await asyncio.sleep(0.3)
        os.truncate(next(rows.folder.glob("raw/*.json")), 6 * MIB)
        assert await is_cut_off(client)
    [line] = [r.getMessage() for r in caplog.records if "cut off" in r.getMessage()]
    assert line.endswith(
        f"its payload was cut off behind {6 * MIB} bytes: its file has become shorter"
    )


async def test_compressed_by_an_outer_application(tmp_path: Path):
    """An application around this one may compress large answers, too."""

    @web.middleware
    async def compress(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        response.enable_compression()
        return response

    backend = MemoryBackend()
    await fill(backend, 5000)
    outer = web.Application(middlewares=[compress])
    outer.add_subapp(
        "/in", create_app(Config(raw=RawConfig(dir=tmp_path / "raw")), backend=backend)
    )
    async with TestClient(TestServer(outer)) as client:
        landed = await client.post("/in/ingest", data=b"[1, 2]")
        raw_id, bodies = (await landed.json())["raw_id"], list[bytes]()
        for path in ("measurements?limit=5000", "measurements?format=csv", f"raw/{raw_id}/payload"):
            async with client.get(f"/in/{path}", headers={"Accept-Encoding": "gzip"}) as answer:
                assert answer.headers["Content-Encoding"] == "gzip"
                bodies.append(await answer.read())
    assert len(json.loads(bodies[0])["measurements"]) == 5000
    assert bodies[1].count(b"\n") == 5001
    assert bodies[2] == b"[1, 2]"


# What a client may leave unread, and how often. All of it would be gigabytes.
UNREAD = [
    ("/raw/{}/payload", 100),
    ("/measurements?limit=10000", 200),
    ("/measurements?format=csv", 200),
    ("/docs/swagger-ui-bundle.js", 300),
    ("/", 500),
    ("/openapi.json", 500),
]


def test_memory_of_what_nobody_reads(program: Program):
    """However much a client asks for without reading it, the service does not grow by it."""
    server = Server(program, DROPZONE_SERVER_MAX_BODY_BYTES=32 * MIB)
    asyncio.run(fill(SqliteBackend(program.home / "data" / "dropzone.sqlite"), 20_000))
    raw_id = server.json("POST", "/ingest", b"[%s]" % b",".join([PAYLOAD] * 3))["raw_id"]
    process = psutil.Process(server.process.pid)
    service = Service(server.url, None, program.home)
    before = process.memory_info().rss
    for path, count in UNREAD:
        with asking(service, path.format(raw_id), count, small=True):
            peak, end = 0, time.monotonic() + 3
            while time.monotonic() < end:
                peak = max(peak, process.memory_info().rss)
                assert server.request("GET", "/health")[0] == 200
            assert server.request("POST", "/ingest", b"[1]")[0] == 202
        assert peak - before < 150 * MIB, path
    assert server.stop() == OK
