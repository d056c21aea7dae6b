"""What the service answers on each route, what bad input gets, and what is stored after it."""

import asyncio
import csv
import gzip
import hashlib
import io
import json
import logging
import re
import socket
import struct
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote
from uuid import UUID

import pytest
from aiohttp import ClientSession, web
from aiohttp.http_exceptions import HttpProcessingError
from test_processing import Folder
from test_transform import SPELLED
from yarl import URL

from backends import Backend, BackendUnavailable, Measurement
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.raw import Form, next_raw_id
from dropzone import (
    AuthConfig,
    Config,
    KeyConfig,
    ProcessConfig,
    RawConfig,
    Secret,
    ServerConfig,
    create_app,
)

EXAMPLE = Path(__file__).parents[2] / "data" / "payload.json"
SOME_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
MIB = 1024 * 1024


class Answer(NamedTuple):
    """An answer, read to its end."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


WHEN = '"time_stamp": "2019-05-01T10:00:00Z"'


class Service:
    """A running service, its address and its data folder."""

    def __init__(self, url: str, session: ClientSession, folder: Path) -> None:
        self.url = url
        self.session = session
        self.folder = folder

    async def __call__(self, method: str, path: str, **options: Any) -> Answer:
        """Send a request; a path is sent as it is written."""
        url = URL(self.url + path, encoded=True)
        async with self.session.request(method, url, **options) as response:
            return Answer(response.status, response.headers, await response.read())

    async def land(self, payload: object) -> str:
        body = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        landed = await self("POST", "/ingest", data=body)
        assert landed.status == 202, landed.body
        return landed.json["raw_id"]

    async def process(self) -> Any:
        done = await self("POST", "/process")
        assert done.status == 200, done.body
        return done.json

    async def row_of(self, payload: object) -> Any:
        """Land and process a payload; return the row it made."""
        raw_id = await self.land(payload)
        await self.process()
        return (await self("GET", f"/raw/{raw_id}")).json["measurement"]

    async def send(self, request: bytes) -> bytes:
        """Send bytes as they are; return the answer."""
        reader, writer = await asyncio.open_connection(*self.url.removeprefix("http://").split(":"))
        try:
            writer.write(request)
            async with asyncio.timeout(20):
                head = await reader.readuntil(b"\r\n\r\n")
                [size] = re.findall(rb"(?i)content-length: (\d+)", head)
                return head + await reader.readexactly(int(size))
        finally:
            writer.close()

    def stored(self) -> dict[str, bytes]:
        """Return every file but the lock and the journal; their content where it is payloads."""
        inside = (p for p in self.folder.rglob("*") if "journal" not in p.parts)
        files = sorted(p for p in inside if p.is_file() and p.suffix != ".lock")
        states = {"raw", "processed", "rejected", "discarded"}
        names = [(file, str(file.relative_to(self.folder))) for file in files]
        return {
            name: file.read_bytes() if name.split("/")[0] in states else b"" for file, name in names
        }


Serve = Callable[..., Awaitable[Service]]


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Start services, as `python dropzone.py` does, or as an embedding server would."""
    stops: list[Callable[[], Awaitable[None]]] = []

    async def start(
        backend: Backend | None = None,
        *,
        key: str = "",
        keys: tuple[KeyConfig, ...] = (),
        limit: int = MIB,
        batch: int = 1000,
        own: bool = True,
        name: str = "data",
    ) -> Service:
        folder = tmp_path / name
        config = Config(
            server=ServerConfig(max_body_bytes=limit),
            raw=RawConfig(dir=folder / "raw"),
            process=ProcessConfig(batch=batch),
            auth=AuthConfig(api_key=Secret(key), keys=keys),
        )
        app = create_app(config, backend=backend or MemoryBackend())
        options = {"auto_decompress": False} if own else {}
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, **options)
        await runner.setup()
        stops.append(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        session = ClientSession()
        stops.append(session.close)
        [(host, port)] = runner.addresses
        return Service(f"http://{host}:{port}", session, folder)

    yield start
    for stop in reversed(stops):
        await stop()


@pytest.fixture
async def service(serve: Serve) -> Service:
    """Return a service with rows in memory and no key."""
    return await serve()


@pytest.fixture(params=["own server", "embedding server"])
async def any_server(request: pytest.FixtureRequest, serve: Serve) -> Service:
    """Return a service with a small limit; the embedding server undoes Content-Encoding itself."""
    return await serve(limit=100_000, own=request.param == "own server")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Hold every test to this: nothing but broken HTTP ends in aiohttp's own error handling."""
    yield
    errors = [r.exc_info[1] for r in caplog.records if r.name == "aiohttp.server" and r.exc_info]
    assert [error for error in errors if not isinstance(error, HttpProcessingError)] == []


class Outage(MemoryBackend):
    """A backend that is down while `down`."""

    def __init__(self, *, down: bool = True) -> None:
        super().__init__()
        self.down = down

    def _fail(self) -> None:
        if self.down:
            raise BackendUnavailable("the database does not answer")

    async def open(self) -> None:
        self._fail()

    async def ping(self) -> None:
        self._fail()

    async def upsert(self, measurements: Any) -> None:
        self._fail()
        await super().upsert(measurements)

    async def get(self, timestamp_utc: datetime) -> Measurement:
        self._fail()
        return await super().get(timestamp_utc)

    async def find(self, **options: Any) -> list[Measurement]:
        self._fail()
        return await super().find(**options)


class ReadOnly(MemoryBackend):
    """A backend that answers, and whose rows cannot be written while `read_only`."""

    def __init__(self) -> None:
        super().__init__()
        self.read_only = True

    async def upsert(self, measurements: Any) -> None:
        if self.read_only:
            raise BackendUnavailable("it accepts no writes")
        await super().upsert(measurements)


class Hanging(MemoryBackend):
    """A backend whose network swallows everything."""

    async def ping(self) -> None:
        await asyncio.sleep(3600)


class Defective(MemoryBackend):
    """A backend with a bug."""

    async def find(self, **_: Any) -> list[Measurement]:
        raise RuntimeError("the password is hunter2")


def reading(time_stamp: object = "2019-05-01T10:00:00Z", data: object = (0, 2)) -> dict[str, Any]:
    return {"time_stamp": time_stamp, "data": data}


def check_problem(answer: Answer, status: int, code: str) -> Any:
    """Hold a refusal to RFC 9457 and to Dropzone's own members; return the document."""
    assert (answer.status, answer.headers["Content-Type"]) == (
        status,
        "application/problem+json",
    ), answer.body
    document = answer.json
    assert document["code"] == code, document
    assert document["status"] == status
    assert document["type"] == "about:blank"
    assert document["title"]
    assert document["detail"]
    assert document["request_id"] == answer.headers["X-Request-ID"]
    assert b"Traceback" not in answer.body
    assert b".py" not in answer.body
    return document


async def refusal(service: Service, status: int, code: str, *request: str, **options: Any) -> Any:
    """Send what is to be refused; hold that it is, and that nothing stored changed."""
    before = service.stored()
    document = check_problem(await service(*request, **options), status, code)
    assert service.stored() == before
    return document


def http(*headers: bytes, body: bytes = b"", line: bytes = b"POST /ingest") -> bytes:
    lines = [line + b" HTTP/1.1", b"Host: localhost", b"Connection: close", *headers, b"", body]
    return b"\r\n".join(lines)


# ── Routes: landing ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", None, "application/json", "x"]
)
async def test_ingest_lands_the_bytes(service: Service, kind: str | None) -> None:
    """Whatever the Content-Type: 202, the raw_id, its address, and a file equal to the body."""
    body = EXAMPLE.read_bytes()
    options: dict[str, Any] = {"headers": {"Content-Type": kind}} if kind else {}
    answer = await service(
        "POST", "/ingest", data=body, skip_auto_headers=["Content-Type"], **options
    )
    assert answer.status == 202
    assert answer.headers["Content-Type"] == "application/json"
    raw_id = answer.json["raw_id"]
    assert answer.json == {"status": "accepted", "raw_id": raw_id}
    assert UUID(raw_id).version == 7
    assert answer.headers["Location"] == f"/raw/{raw_id}"
    assert service.stored()[f"raw/{raw_id}.json"] == body


async def test_ingest_like_curl(service: Service) -> None:
    """What `curl -d @payload.json` sends lands, bytes outside ASCII and line ends included."""
    body = b'{"note": "\xc3\xa9%41+&=", \r\n "time_stamp": 1}\n'
    form = b"Content-Type: application/x-www-form-urlencoded"
    reply = await service.send(http(form, b"Content-Length: %d" % len(body), body=body))
    assert reply.startswith(b"HTTP/1.1 202 ")
    assert list(service.stored().values()) == [body]


async def test_ingest_slow_chunks(service: Service) -> None:
    """A body that trickles in chunk by chunk, without a Content-Length, lands whole."""

    async def trickle() -> AsyncIterator[bytes]:
        for byte in b'{"a": [1, 2]}':
            await asyncio.sleep(0.01)
            yield bytes([byte])

    raw_id = (await service("POST", "/ingest", data=trickle())).json["raw_id"]
    assert service.stored() == {f"raw/{raw_id}.json": b'{"a": [1, 2]}'}


async def test_ingest_keeps_apart(service: Service) -> None:
    """Equal payloads are payloads of their own, and many at once each get their own bytes back."""
    same = [await service.land({"same": True}) for _ in range(2)]
    assert same[0] < same[1]
    ids = await asyncio.gather(*(service.land({"n": n}) for n in range(50)))
    stored = service.stored()
    assert [json.loads(stored[f"raw/{i}.json"]) for i in ids] == [{"n": n} for n in range(50)]
    assert len({*same, *ids}) == 52


# ── Routes: processing and reading ────────────────────────────────────────────────────────────────


async def test_example(service: Service) -> None:
    """The example payload becomes one row, with its mean and its deviation."""
    await service.land(EXAMPLE.read_bytes())
    assert (await service.process())["processed"] == 1
    [row] = (await service("GET", "/measurements")).json["measurements"]
    assert row["timestamp_utc"] == "2019-05-01T10:00:00.000000Z"
    assert row["mean"] == pytest.approx(0.9985282517566032, rel=0, abs=1e-15)
    assert row["std_dev"] == pytest.approx(1.01280885259315, rel=1e-14)


async def test_process_counts(serve: Serve) -> None:
    """`/process` counts what it did, says what it rejected and why, and what is left."""
    service = await serve(batch=2)
    counts = ["processed", "failed", "checked", "remaining", "superseded"]
    assert await service.process() == dict.fromkeys(counts, 0) | {"rejected": []}
    for day in range(1, 4):
        await service.land(reading(f"2019-05-0{day}T10:00:00Z"))
    bad = await service.land(reading(data=[1, "x"]))
    first = await service("POST", "/process?limit=2")
    nothing = {"superseded": 0, "rejected": []}
    assert first.json == {"processed": 2, "failed": 0, "checked": 2, "remaining": 2, **nothing}
    rest = await service.process()
    [why] = rest.pop("rejected")
    assert rest == {"processed": 1, "failed": 1, "checked": 2, "remaining": 0, "superseded": 0}
    assert (why["raw_id"], why["code"]) == (bad, "value_not_numeric")
    assert 'data[1] is "x"' in why["detail"]
    assert datetime.fromisoformat(why["rejected_at"]).utcoffset() == timedelta(0)


async def test_process_more_than_a_batch(serve: Serve) -> None:
    """More payloads than a batch holds are all processed, with rejected ones among them."""
    service = await serve(batch=50)
    for n in range(130):
        value = "x" if n % 40 == 0 else n
        await service.land(reading(f"2019-05-01T10:{n // 60:02}:{n % 60:02}Z", [value]))
    done = await service.process()
    assert (done["processed"], done["failed"], done["remaining"]) == (126, 4, 0)
    assert len((await service("GET", "/measurements")).json["measurements"]) == 126


async def test_last_arrival_stands(service: Service) -> None:
    """Of two payloads for one timestamp the later one's row stands, and the receipts say so."""
    first = await service.land(reading("2019-05-01T10:00:00Z", [1]))
    second = await service.land(reading("2019-05-01T12:00:00+02:00", [5]))
    await service.process()
    [row] = (await service("GET", "/measurements")).json["measurements"]
    assert (row["mean"], row["raw_id"]) == (5.0, second)
    receipt = (await service("GET", f"/raw/{first}")).json
    assert (receipt["state"], receipt["superseded_by"]) == ("processed", second)
    assert receipt["measurement"] is None


@pytest.fixture
async def rows(service: Service) -> list[str]:
    """Make rows on the first ten days of May; return their timestamps."""
    days = [f"2019-05-{day:02}T10:00:00.000000Z" for day in range(1, 11)]
    for number, day in enumerate(reversed(days)):
        await service.land(reading(day, [number, number + 2]))
    await service.process()
    return days


async def listed(service: Service, query: str, **options: Any) -> list[str]:
    answer = await service("GET", f"/measurements{query}", **options)
    assert answer.status == 200, answer.body
    return [row["timestamp_utc"] for row in answer.json["measurements"]]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", slice(None)),
        ("?order=asc", slice(None)),
        ("?order=desc", slice(None, None, -1)),
        ("?since=2019-05-03T10:00:00Z", slice(2, None)),
        ("?until=2019-05-03T10:00:00Z", slice(0, 2)),
        ("?since=2019-05-03T12:00:00%2B02:00&until=2019-05-05T12:00:00%2B0200", slice(2, 4)),
        ("?since=2019-05-03T12:00:00+02:00", slice(2, None)),
        ("?since=2019-05-03T12:00:00+02", slice(2, None)),
        ("?since=2019-05-03T10:00:00.000001Z", slice(3, None)),
        ("?after=2019-05-03T10:00:00Z", slice(3, None)),
        ("?after=2019-05-03T10:00:00Z&order=desc", slice(1, None, -1)),
        ("?since=1556877600000", slice(2, None)),
        ("?since=1556877600001&until=1557050400000", slice(3, 4)),
        ("?after=1556877600000", slice(3, None)),
        ("?since=-62135596800000&until=253402300799999", slice(None)),
        ("?since=-1&until=0", slice(0, 0)),
        ("?limit=3", slice(0, 3)),
        ("?limit=10", slice(None)),
        ("?limit=1&order=desc", slice(9, 10)),
        ("?since=2019-05-05T10:00:00Z&until=2019-05-05T10:00:00Z", slice(0, 0)),
        ("?since=2019-05-09T10:00:00Z&until=2019-05-02T10:00:00Z", slice(0, 0)),
        ("?since=0001-01-01T00:00:00Z&until=9999-12-31T23:59:59.999999Z", slice(None)),
    ],
)
async def test_range(service: Service, rows: list[str], query: str, expected: slice) -> None:
    """`since` is inclusive, `until` and `after` exclusive, in any offset, in either order."""
    assert await listed(service, query) == rows[expected]


async def test_row_shape(service: Service) -> None:
    """A row has its UTC timestamp, mean, population deviation and raw_id."""
    raw_id = await service.land(reading("2019-05-01T06:00:00.1234569-04:00"))
    await service.process()
    row = {
        "timestamp_utc": "2019-05-01T10:00:00.123456Z",
        "mean": 1.0,
        "std_dev": 1.0,
        "raw_id": raw_id,
    }
    answer = await service("GET", "/measurements")
    assert answer.json == {"measurements": [row], "next": None}
    assert "Link" not in answer.headers
    assert answer.headers["Content-Type"] == "application/json"


async def walk(service: Service, path: str, **options: Any) -> list[Answer]:
    """Follow the Link headers to the end."""
    pages = [await service("GET", path, **options)]
    while link := pages[-1].headers.get("Link"):
        assert len(pages) < 50
        target = re.fullmatch(r'<(/[^>]+)>; rel="next"', link)
        assert target, link
        pages.append(await service("GET", target[1], **options))
    return pages


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 3, 5, 10])
async def test_walk(service: Service, rows: list[str], order: str, limit: int) -> None:
    """Following Link, or `next`, visits every row once, in order, and ends without a spare page."""
    expected = rows if order == "asc" else rows[::-1]
    pages = await walk(service, f"/measurements?limit={limit}&order={order}")
    found = [[row["timestamp_utc"] for row in page.json["measurements"]] for page in pages]
    assert found == [expected[start : start + limit] for start in range(0, 10, limit)]
    after = pages[0].json["next"]
    if after:
        query = f"?limit={limit}&order={order}&after={quote(after)}"
        assert await listed(service, query) == found[1]


async def test_walk_keeps_the_query(service: Service, rows: list[str]) -> None:
    """The next page keeps the bounds, with an offset in them, and the format."""
    query = "since=2019-05-02T12:00:00%2B02:00&until=2019-05-09T10:00:00Z&limit=2&format=csv"
    pages = await walk(service, f"/measurements?{query}")
    tables = [list(csv.reader(io.StringIO(page.body.decode())))[1:] for page in pages]
    assert [row[0] for table in tables for row in table] == rows[1:8]


@pytest.mark.parametrize(
    ("query", "accept", "kind"),
    [
        ("", None, "application/json"),
        ("", "*/*", "application/json"),
        ("", "text/html, */*", "application/json"),
        ("", "text/csv", "text/csv"),
        ("", "text/csv;charset=utf-8", "text/csv"),
        ("", "text/csv;q=0.5, application/json", "application/json"),
        ("?format=csv", "application/json", "text/csv"),
        ("?format=json", "text/csv", "application/json"),
    ],
)
async def test_format(service: Service, query: str, accept: str | None, kind: str) -> None:
    """CSV comes by `Accept` or by `format`, which goes first; JSON otherwise."""
    headers = {"Accept": accept} if accept else {}
    answer = await service("GET", f"/measurements{query}", headers=headers)
    assert answer.status == 200
    assert answer.headers["Content-Type"].split(";")[0] == kind
    assert "Accept" in answer.headers["Vary"]


async def test_csv(service: Service) -> None:
    """CSV has a header, CRLF, the same text as JSON, and doubles that read back exactly."""
    assert (await service("GET", "/measurements?format=csv")).body == (
        b"timestamp_utc,mean,std_dev,raw_id\r\n"
    )
    for second, value in enumerate([0.1, 1e-310, -1.7976931348623157e308]):
        await service.land(reading(f"2019-05-01T10:00:0{second}.5Z", [value]))
    await service.process()
    text = (await service("GET", "/measurements?format=csv")).body.decode()
    assert text.count("\r\n") == 4
    table = list(csv.DictReader(io.StringIO(text)))
    in_json = (await service("GET", "/measurements")).json["measurements"]
    assert [row | {n: float(row[n]) for n in ("mean", "std_dev")} for row in table] == in_json


WIDTH = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:[^\s\"<>,\\\\]*")


async def test_one_width(service: Service) -> None:
    """Whatever its fraction, a timestamp has the same width wherever it leaves the service."""
    ids = [await service.land(reading(f"2019-05-01T10:00:0{s}Z")) for s in ("0", "1.5", "2")]
    ids.append(await service.land({"data": []}))
    rejected = (await service.process())["rejected"]
    ids.append(await service.land({}))
    paths = ["/measurements?limit=1", "/measurements?format=csv&limit=2", "/measurements/summary"]
    paths += [
        "/measurements/2019-05-01T10:00:00Z",
        "/rejected",
        "/status",
        "/measurements/2019-05-01T09Z",
    ]
    paths += [f"/raw/{raw_id}" for raw_id in ids]
    answers = [await service("GET", path) for path in paths]
    texts = [json.dumps(rejected), *(answer.body.decode() for answer in answers)]
    texts += [unquote(answer.headers.get("Link", "")) for answer in answers]
    texts += [path.read_text() for path in service.folder.rglob("*.reason.json")]
    found = [moment for text in texts for moment in MOMENT.findall(text)]
    assert len(found) > 20
    assert [moment for moment in found if not WIDTH.fullmatch(moment)] == []


async def test_csv_of_fractions(service: Service) -> None:
    """A column of moments with and without a fraction is read by one strict form."""
    for second in ("0", "1.5", "2.000001"):
        await service.land(reading(f"2019-05-01T10:00:0{second}Z"))
    await service.process()
    text = (await service("GET", "/measurements?format=csv")).body.decode()
    moments = [row["timestamp_utc"] for row in csv.DictReader(io.StringIO(text))]
    read = [datetime.strptime(moment, "%Y-%m-%dT%H:%M:%S.%f%z") for moment in moments]
    assert {len(moment) for moment in moments} == {27}
    assert [moment.microsecond for moment in read] == [0, 500_000, 1]


async def test_reasons_of_older_versions(service: Service) -> None:
    """A reason whose time was written without a fraction is read, and leaves in the one width."""
    raw_id = await service.land({})
    await service.process()
    file = service.folder / "rejected" / f"{raw_id}.reason.json"
    reason = json.loads(file.read_bytes()) | {"rejected_at": "2024-02-03T04:05:06Z"}
    file.write_text(json.dumps(reason))
    [listed] = (await service("GET", "/rejected")).json["rejected"]
    assert listed == reason | {"rejected_at": "2024-02-03T04:05:06.000000Z"}


@pytest.mark.parametrize(
    "text",
    [
        "2019-05-01T10:00:00Z",
        "2019-05-01T10:00:00.000000Z",
        "2019-05-01T10:00:00+00:00",
        "2019-05-01T12:00:00+02:00",
        "2019-05-01T12:00:00%2B02:00",
        "2019-05-01T12:00:00%2002:00",
        "2019-05-01T12:00:00%200200",
        "2019-05-01T06:00:00-04:00",
        "2019-05-01T06:00:00-04",
        "2019-05-01t10:00:00z",
        "2019-05-01%2010:00:00Z",
        "20190501T100000Z",
        "2019-05-01T10%3A00%3A00Z",
        "2019-121T10:00:00Z",
        "1556704800000",
    ],
)
async def test_measurement(service: Service, text: str) -> None:
    """A row is found by its moment, in whatever offset or ISO form it is asked for."""
    row = await service.row_of(reading())
    answer = await service("GET", f"/measurements/{text}")
    assert (answer.status, answer.json) == (200, row)


async def test_receipt_of_each_state(service: Service) -> None:
    """A receipt says where a payload is, when it came, what it is, and what became of it."""
    body = json.dumps(reading()).encode()
    start = datetime.now(UTC)
    raw_id = await service.land(body)
    pending = (await service("GET", f"/raw/{raw_id}")).json
    received = datetime.fromisoformat(pending.pop("received_at"))
    assert start - timedelta(milliseconds=1) <= received <= datetime.now(UTC)
    facts = {"raw_id": raw_id, "bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
    nothing = dict.fromkeys(["measurement", "superseded_by", "rejection", "discarded_at"])
    assert pending == facts | nothing | {"state": "pending"}

    bad = await service.land(reading("2019-05-01T10:00:00"))
    done = await service.process()
    processed = (await service("GET", f"/raw/{raw_id}")).json
    assert datetime.fromisoformat(processed.pop("received_at")) == received
    row = (await service("GET", "/measurements/2019-05-01T10:00:00Z")).json
    assert processed == facts | nothing | {"state": "processed", "measurement": row}

    rejected = (await service("GET", f"/raw/{bad}")).json
    assert rejected["state"] == "rejected"
    assert rejected["rejection"] == done["rejected"][0]
    assert rejected["rejection"]["code"] == "time_stamp_without_offset"
    assert rejected["measurement"] is rejected["superseded_by"] is None


async def test_payload_in_each_state(service: Service) -> None:
    """The exact bytes come back, pending, processed and rejected; an upper-case raw_id will do."""
    bodies = [b'\xef\xbb\xbf {"time_stamp":"2019-05-01T10:00Z","data":[1e0]}\r\n', b" [NaN]\t"]
    ids = [await service.land(body) for body in bodies]
    for _ in range(2):
        for raw_id, body in zip(ids, bodies, strict=True):
            answer = await service("GET", f"/raw/{raw_id.upper()}/payload")
            assert (answer.status, answer.body) == (200, body)
            assert answer.headers["Content-Type"] == "application/json"
        await service.process()
    states = [(await service("GET", f"/raw/{raw_id}")).json["state"] for raw_id in ids]
    assert states == ["processed", "rejected"]


async def test_rejected_list(service: Service) -> None:
    """The quarantine is listed in order of arrival, page by page, each payload once."""
    assert (await service("GET", "/rejected")).json == {
        "rejected": [],
        "total": 0,
        "codes": {},
        "next": None,
    }
    ids = [await service.land([n]) for n in range(5)]
    reasons = (await service.process())["rejected"]
    whole = (await service("GET", "/rejected")).json
    codes = {"payload_not_object": 5}
    assert whole == {"rejected": reasons, "total": 5, "codes": codes, "next": None}
    assert [reason["raw_id"] for reason in reasons] == ids
    found, query = [], "?limit=2"
    for _ in range(3):
        page = (await service("GET", f"/rejected{query}")).json
        assert page["total"] == 5
        found.append([reason["raw_id"] for reason in page["rejected"]])
        query = f"?limit=2&after={page['next']}"
    assert found == [ids[:2], ids[2:4], ids[4:]]
    assert page["next"] is None


# ── Routes: operation ─────────────────────────────────────────────────────────────────────────────


async def test_health(service: Service) -> None:
    """`/health` says that the process lives."""
    answer = await service("GET", "/health")
    assert (answer.status, answer.json) == (200, {"status": "ok"})


async def test_ready(service: Service) -> None:
    """`/ready` is 200 with every check ok."""
    answer = await service("GET", "/ready")
    assert (answer.status, answer.json["status"]) == (200, "ok")
    assert set(answer.json["checks"].values()) == {"ok"}


async def test_ready_without_backend(serve: Serve) -> None:
    """A backend that is down is shown by `/ready`, and does not make it unready."""
    service = await serve(Outage())
    answer = await service("GET", "/ready")
    assert (answer.status, answer.json["status"]) == (200, "ok")
    assert answer.json["checks"]["backend"] == "the database does not answer"


async def test_ready_with_hanging_backend(serve: Serve) -> None:
    """A backend that never answers does not keep `/ready` from answering."""
    service = await serve(Hanging())
    answer = await asyncio.wait_for(service("GET", "/ready"), 8)
    assert (answer.status, answer.json["status"]) == (200, "ok")
    assert answer.json["checks"]["backend"] != "ok"


async def test_ready_without_raw_folder(service: Service) -> None:
    """Without a raw folder `/ready` is 503 and names it, and with it back 200."""
    raw, away = service.folder / "raw", service.folder / "away"
    raw.rename(away)
    answer = await service("GET", "/ready")
    assert (answer.status, answer.json["status"]) == (503, "unavailable")
    assert str(raw) in " ".join(answer.json["checks"].values())
    assert int(answer.headers["Retry-After"]) > 0
    away.rename(raw)
    assert (await service("GET", "/ready")).status == 200


async def test_docs(service: Service) -> None:
    """The page and all it loads come from the service itself."""
    page = await service("GET", "/docs")
    assert (page.status, page.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    html = page.body.decode()
    assert "://" not in html
    assert not re.search(r"""(src|href|url)\s*[=:(]\s*["']?//""", html)
    loaded = re.findall(r'(?:src|href)="([^"]+)"', html) + re.findall(r'url: "([^"]+)"', html)
    assert len(loaded) >= 4
    for address in loaded:
        if not address.startswith("data:"):
            asset = await service("GET", f"/{address}")
            assert (asset.status, len(asset.body) > 1000) == (200, True), address
    script = await service("GET", "/docs/swagger-ui-bundle.js")
    assert "javascript" in script.headers["Content-Type"]
    for path in ("/docs/swagger-ui.js", "/docs/..%2fdropzone.py", "/docs/index.html"):
        check_problem(await service("GET", path), 404, "not_found")


async def test_head(service: Service) -> None:
    """HEAD gives what GET gives, without the body."""
    raw_id = await service.land(reading())
    await service.process()
    paths = ["/health", "/ready", "/measurements", "/measurements?format=csv&limit=1"]
    paths += ["/measurements/2019-05-01T10:00:00Z", f"/raw/{raw_id}", f"/raw/{raw_id}/payload"]
    paths += ["/rejected", "/openapi.json", "/docs", f"/raw/{SOME_ID}", "/measurements?limit=0"]
    for path in paths:
        got, head = await service("GET", path), await service("HEAD", path)
        assert (head.status, head.body) == (got.status, b""), path
        for name in ("Content-Type", "Content-Length"):
            assert head.headers[name] == got.headers[name] or "request_id" in got.body.decode()


# ── Payloads of a batch ───────────────────────────────────────────────────────────────────────────


async def look_at(service: Service, raw_id: UUID | str, body: bytes, state: str) -> Any:
    """Be sure that a payload of a batch is known by its own raw_id; return its receipt."""
    answer = await service("GET", f"/raw/{raw_id}/payload")
    assert (answer.status, answer.body) == (200, body)
    assert answer.headers["Content-Length"] == str(len(body))
    receipt = (await service("GET", f"/raw/{raw_id}")).json
    assert receipt["raw_id"] == str(raw_id)
    assert (receipt["state"], receipt["bytes"]) == (state, len(body))
    assert receipt["sha256"] == hashlib.sha256(body).hexdigest()
    return receipt


@pytest.mark.parametrize("form", ["ndjson", "json"])
async def test_payloads_of_a_batch(service: Service, form: Form) -> None:
    """Receipt and payload of a batch's payload are its own: pending, cut, processed and packed."""
    large = f'{{{WHEN}, "data": [7],  "x": "{"é" * 200_000}"}}'.encode()
    good = [f'{{ {WHEN.replace("10:", f"1{n}:")}, "data": [{n}] }}'.encode() for n in range(3)]
    contents = [good[0], large, b'{"bad":  1}', good[1], good[2]]
    raw_ids = Folder(service.folder).put_batch(0, contents, form)
    for raw_id, body in zip(raw_ids, contents, strict=True):
        receipt = await look_at(service, raw_id, body, "pending")
        assert receipt["received_at"].startswith("2024-02-29T23:59:59.998")
    assert (await service("POST", "/process?limit=3")).json["remaining"] == 2
    states = ["processed", "processed", "rejected", "pending", "pending"]
    for raw_id, body, state in zip(raw_ids, contents, states, strict=True):
        receipt = await look_at(service, raw_id, body, state)
        code = receipt["rejection"] and receipt["rejection"]["code"]
        assert code == ("time_stamp_missing" if state == "rejected" else None)
    await service.process()
    for is_packed in (False, True):
        if is_packed:
            assert Folder(service.folder).store.compact("2024-02-29") == 4
        rows = []
        for at, (raw_id, body) in enumerate(zip(raw_ids, contents, strict=True)):
            state = "rejected" if at == 2 else "processed"
            receipt = await look_at(service, raw_id, body, state)
            rows.append(receipt["measurement"] and receipt["measurement"]["mean"])
            assert receipt["superseded_by"] == (str(raw_ids[1]) if at == 0 else None)
        assert rows == [None, 7, None, 1, 2]


async def test_raw_ids_beside_a_batch(service: Service) -> None:
    """What is no raw_id of a batch's payload leads to nothing, though it nearly is one."""
    kind = {"Content-Type": "application/x-ndjson"}
    answer = await service("POST", "/ingest", data=b"1\n2", headers=kind)
    first, last = map(UUID, answer.json["raw_ids"])
    before, behind = UUID(int=first.int - 2**16), UUID(int=last.int + 2**16)
    others = (before, behind, UUID(int=first.int + 2**33))
    for path in ("", "/payload"):
        for other in others:
            check_problem(await service("GET", f"/raw/{other}{path}"), 404, "raw_id_unknown")


# ── Bad input: what is no JSON ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "position"),
    [
        (b"", 0),
        (b" \n", 2),
        (b"time_stamp=2019", 0),
        (b'{"a": 1,}', 8),
        (b'{"a": 1} x', 9),
        (b'{"a": 1}{"a": 2', None),
        (b'{"a": 1},{"a": 2}\n', 8),
        (b'{"time_stamp": "2019-05-01T10:00:00Z", "data": [1, 2', None),
        ('{"é": tru}'.encode(), 7),
        (b"{'a': 1}", 1),
        (b'{"a": "\x01"}', 7),
        (b'{"a": 01}', 7),
        (b'{"a": - NaN}', 6),
        (b'{"a": nanny}', 9),
        (b"{nan: 1}", 1),
        (b'{"a": "\xff"}', 7),
        (b'{"a": "\xed\xa0\x80"}', 7),
        (b"\x00", 0),
        ('{"a": 1}'.encode("utf-16"), 0),
        (b"\xef\xbb\xbf", None),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", None),
    ],
)
async def test_not_json(service: Service, body: bytes, position: int | None) -> None:
    """What is no JSON gets 400 with the byte position, and nothing is stored."""
    document = await refusal(service, 400, "payload_not_json", "POST", "/ingest", data=body)
    found = document["position"]
    assert 0 <= found <= len(body)
    assert position is None or abs(found - position) <= 1, document
    assert f"byte {found}" in document["detail"]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf", b"[NaN,", b"[1e999,", b'{"a":'])
@pytest.mark.parametrize("end", [True, False])
async def test_nesting(service: Service, start: bytes, end: bool) -> None:
    """100,000 nested brackets get 400, closed or not, and whatever stands before them."""
    closing = b"]" * 100_000 + {b"[": b"]", b"{": b"}"}.get(start[:1], b"")
    body = start + b"[" * 100_000 + (closing if end else b"")
    await refusal(service, 400, "payload_not_json", "POST", "/ingest", data=body)


# ── Odd documents: what lands, and what becomes of it ─────────────────────────────────────────────


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ("null", "payload_not_object"),
        ("true", "payload_not_object"),
        ("1e999", "payload_not_object"),
        ("[]", "payload_not_object"),
        ('"\\ud800"', "payload_not_object"),
        ("NaN", "payload_not_object"),
        ("[" * 500 + "]" * 500, "payload_not_object"),
        ("{}", "time_stamp_missing"),
        ('{"data": [1]}', "time_stamp_missing"),
        (f"{{{WHEN}}}", "data_missing"),
        (f'{{{WHEN}, "data": []}}', "data_empty"),
        (f'{{{WHEN}, "data": 1}}', "data_not_array"),
        (f'{{{WHEN}, "data": {{"0": 1}}}}', "data_not_array"),
        (f'{{{WHEN}, "data": "\\udfff"}}', "data_not_array"),
        (f'{{{WHEN}, "data": ["1"]}}', "value_not_numeric"),
        (f'{{{WHEN}, "data": [true]}}', "value_not_numeric"),
        (f'{{{WHEN}, "data": [null]}}', "value_not_numeric"),
        (f'{{{WHEN}, "data": [1, [2]]}}', "value_not_numeric"),
        (f'{{{WHEN}, "data": ["\\ud800"]}}', "value_not_numeric"),
        (f'{{{WHEN}, "data": [NaN]}}', "value_not_finite"),
        (f'{{{WHEN}, "data": [-Infinity]}}', "value_not_finite"),
        (f'{{{WHEN}, "data": [1e999]}}', "value_not_finite"),
        (f'{{{WHEN}, "data": [{10**400}]}}', "value_not_finite"),
        (f'{{{WHEN}, "data": [-{"9" * 5000}]}}', "value_not_finite"),
        ('{"time_stamp": null, "data": [1]}', "time_stamp_invalid"),
        ('{"time_stamp": 1556704800, "data": [1]}', "time_stamp_invalid"),
        ('{"time_stamp": "\\ud800", "data": [1]}', "time_stamp_invalid"),
        ('{"time_stamp": "2019-05-01", "data": [1]}', "time_stamp_without_offset"),
        ('{"time_stamp": "2019-05-01T24:00:01Z", "data": [1]}', "time_stamp_invalid"),
        ('{"time_stamp": "2019-05-01T10:00:60Z", "data": [1]}', "time_stamp_invalid"),
        ('{"time_stamp": "0001-01-01T00:00:00+14:00", "data": [1]}', "time_stamp_out_of_range"),
        ('{"time_stamp": "9999-12-31T23:59:59-00:01", "data": [1]}', "time_stamp_out_of_range"),
        ('{"time_stamp": "9999-12-31T24:00:00Z", "data": [1]}', "time_stamp_out_of_range"),
    ],
)
async def test_odd_document_is_rejected(service: Service, body: str, code: str) -> None:
    """An odd document lands, is kept with its reason, and holds up nothing that follows it."""
    raw_id = await service.land(body.encode())
    good = await service.land(reading())
    done = await service.process()
    assert (done["processed"], done["failed"], done["remaining"]) == (1, 1, 0)
    assert (done["rejected"][0]["raw_id"], done["rejected"][0]["code"]) == (raw_id, code)
    assert (await service("GET", f"/raw/{raw_id}")).json["rejection"]["code"] == code
    assert (await service("GET", f"/raw/{raw_id}/payload")).body == body.encode()
    assert (await service("GET", f"/raw/{good}")).json["state"] == "processed"


@pytest.mark.parametrize("size", [0, 100_000], ids=["small", "large"])
async def test_numbers_that_are_not_finite(service: Service, size: int) -> None:
    """NaN and infinities land as C and MicroPython print them, and are rejected with a reason."""
    landed = {}
    for number in SPELLED:
        noise = json.dumps({"nan": f"-inf {number}" + "x" * size})
        body = f'{{{WHEN}, "x": {noise}, "data": [1, {number}, 2]}}'.encode()
        landed[await service.land(body)] = body
    good = await service.land(f'{{{WHEN}, "nan": -nan, "data": [1, 2]}}'.encode())
    done = await service.process()
    assert (done["processed"], done["failed"]) == (1, len(SPELLED))
    assert [each["raw_id"] for each in done["rejected"]] == list(landed)
    assert {each["code"] for each in done["rejected"]} == {"value_not_finite"}
    assert all("data[1]" in each["detail"] for each in done["rejected"])
    for raw_id, body in landed.items():
        assert (await service("GET", f"/raw/{raw_id}/payload")).body == body
    assert (await service("GET", f"/raw/{good}")).json["state"] == "processed"


@pytest.mark.parametrize(
    ("body", "timestamp", "mean"),
    [
        (b'\xef\xbb\xbf{"time_stamp": "2019-05-01T10:00Z", "data": [1]}', "2019-05-01T10:00", 1),
        (b'{"time_stamp": "x", "time_stamp": "2019-05-01T10:00Z", "data": [1]}', None, 1),
        (b'{"data": ["x"], "time_stamp": "2019-05-01T10:00Z", "data": [3]}', None, 3),
        (b'{"time_stamp": "2019-05-01T10:00Z", "data": [1], "x": [NaN, 1e999]}', None, 1),
        (b'{"time_stamp": "2019-05-01T10:00Z", "data": [1], "\\ud800": "\\udfff"}', None, 1),
        (b'{"time_stamp": "2019-05-01T24:00Z", "data": [2]}', "2019-05-02T00:00:00", 2),
        (b'{"time_stamp": "2016-12-31T23:59:60Z", "data": [2]}', "2017-01-01T00:00:00", 2),
        (b'{"time_stamp": "0001-01-01T00:00-14:00", "data": [2]}', "0001-01-01T14:00:00", 2),
        (b'{"time_stamp": "9999-12-31T23:59:59.9999999Z", "data": [2]}', None, 2),
        (b'{"time_stamp": "2019-W18-3T10:00:00Z", "data": [1]}', "2019-05-01T10:00:00", 1),
        (b'{"time_stamp": "2019-05-01T10:00Z", "data": [1e308, 1e308]}', None, 1e308),
        (b'{"time_stamp": "2019-05-01T10:00Z", "data": [-0.0, 1e-999]}', None, 0),
    ],
)
async def test_odd_document_is_taken(
    service: Service, body: bytes, timestamp: str | None, mean: float
) -> None:
    """A byte order mark, double names (the last counts), 24:00, a leap second make good rows."""
    row = await service.row_of(body)
    assert row is not None
    assert row["mean"] == mean
    assert row["timestamp_utc"].startswith(timestamp or "")
    read_back = await service("GET", f"/measurements/{row['timestamp_utc']}")
    assert read_back.json == row


# ── Bad input: size and encoding ──────────────────────────────────────────────────────────────────


def sized(size: int) -> bytes:
    return b'"' + b"a" * (size - 2) + b'"'


async def in_chunks(body: bytes, size: int = 10_000) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]
        await asyncio.sleep(0)


async def test_at_the_limit(any_server: Service) -> None:
    """A body of exactly the limit lands: with a length, in chunks, and compressed."""
    body, gzipped = sized(100_000), {"Content-Encoding": "gzip"}
    plain = await any_server("POST", "/ingest", data=body)
    chunked = await any_server("POST", "/ingest", data=in_chunks(body))
    packed = await any_server("POST", "/ingest", data=gzip.compress(body), headers=gzipped)
    assert [plain.status, chunked.status, packed.status] == [202, 202, 202]
    assert list(any_server.stored().values()) == [body] * 3


async def test_too_large(any_server: Service) -> None:
    """One byte over the limit is 413: by Content-Length, in chunks, or after decompression."""
    body, post = sized(100_001), ("POST", "/ingest")
    document = await refusal(any_server, 413, "payload_too_large", *post, data=body)
    assert "100000" in document["detail"]
    await refusal(any_server, 413, "payload_too_large", *post, data=in_chunks(body))
    for encoding, pack in (("gzip", gzip.compress), ("deflate", zlib.compress)):
        headers = {"Content-Encoding": encoding}
        packed = pack(body)
        assert len(packed) < 10_000
        await refusal(any_server, 413, "payload_too_large", *post, data=packed, headers=headers)
        options = {"data": in_chunks(packed, 7), "headers": headers}
        await refusal(any_server, 413, "payload_too_large", *post, **options)


async def test_too_large_before_it_is_sent(any_server: Service) -> None:
    """A Content-Length beyond the limit is refused at once, the body need not come."""
    reply = await any_server.send(http(b"Content-Length: 10000000000"))
    assert reply.startswith(b"HTTP/1.1 413 ")
    assert b"payload_too_large" in reply
    assert any_server.stored() == {}


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_bomb(any_server: Service, encoding: str) -> None:
    """A body that unpacks to 64 MiB is 413, and takes only memory of the limit's size."""
    packer = zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    bomb = b"".join([packer.compress(bytes(MIB)) for _ in range(64)]) + packer.flush()
    tracemalloc.start()
    try:
        headers = {"Content-Encoding": encoding}
        options = {"data": bomb, "headers": headers}
        await refusal(any_server, 413, "payload_too_large", "POST", "/ingest", **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB


async def test_bomb_of_members(serve: Serve) -> None:
    """Hundreds of thousands of empty gzip members do not keep the service from other requests."""
    service = await serve(limit=8 * MIB)
    member = gzip.compress(b"", mtime=0)
    options: dict[str, Any] = {"headers": {"Content-Encoding": "gzip"}}
    bomb = asyncio.create_task(
        service("POST", "/ingest", data=io.BytesIO(member * 200_000), **options)
    )
    async with asyncio.timeout(10):
        for _ in range(20):
            assert (await service("GET", "/health")).status == 200
        check_problem(await bomb, 400, "payload_not_json")


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        pytest.param("gzip", gzip.compress(b'{"a": 1}'), id="gzip"),
        pytest.param("GZIP", gzip.compress(b'{"a": 1}'), id="upper case"),
        pytest.param("x-gzip", gzip.compress(b'{"a": 1}'), id="x-gzip"),
        pytest.param("gzip", gzip.compress(b'{"a"') + gzip.compress(b": 1}"), id="two members"),
        pytest.param("deflate", zlib.compress(b'{"a": 1}'), id="deflate"),
        pytest.param("identity", b'{"a": 1}', id="identity"),
    ],
)
@pytest.mark.parametrize("chunk", [None, 1, 5])
async def test_encodings(
    any_server: Service, encoding: str, packed: bytes, chunk: int | None
) -> None:
    """gzip, of several members too, and deflate are undone before landing, however it arrives."""
    data = in_chunks(packed, chunk) if chunk else packed
    headers = {"Content-Encoding": encoding}
    answer = await any_server("POST", "/ingest", data=data, headers=headers)
    assert answer.status == 202, answer.body
    assert list(any_server.stored().values()) == [b'{"a": 1}']


UNKNOWN = ["br", "zstd", "compress", "gzip, gzip", "aes128gcm", "\xe9"]


@pytest.mark.parametrize("encoding", UNKNOWN)
async def test_unknown_encoding(service: Service, encoding: str) -> None:
    """Another encoding is 415, which names it and says what is taken."""
    headers = {"Content-Encoding": encoding}
    answer = await service("POST", "/ingest", data=b'{"a": 1}', headers=headers)
    check_problem(answer, 415, "encoding_unsupported")
    assert "gzip" in answer.headers["Accept-Encoding"]
    assert service.stored() == {}


@pytest.mark.parametrize("encoding", UNKNOWN)
async def test_unknown_encoding_embedded(serve: Serve, encoding: str) -> None:
    """Where aiohttp undoes encodings it may be the one that refuses, and nothing is stored."""
    service = await serve(own=False)
    headers = {"Content-Encoding": encoding}
    answer = await service("POST", "/ingest", data=b'{"a": 1}', headers=headers)
    assert answer.status in (400, 415)
    assert service.stored() == {}


WHOLE = json.dumps(list(range(5000))).encode()
PACKED = gzip.compress(WHOLE)
BROKEN = {
    "plain": b'{"a": 1}',
    "1 byte": PACKED[:1],
    "header": PACKED[:5],
    "no end": PACKED[:-1],
    "no size": PACKED[:-4],
    "half": PACKED[: len(PACKED) // 2],
    "checksum": PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:],
    "hole": PACKED[:100] + bytes(100) + PACKED[200:],
    "rubbish": PACKED + b"rubbish",
}
broken = pytest.mark.parametrize("packed", BROKEN.values(), ids=BROKEN.keys())


@broken
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_broken_encoding(service: Service, packed: bytes, encoding: str) -> None:
    """A compressed body that is broken or ends too early is 400 and stores nothing."""
    options = {"data": packed, "headers": {"Content-Encoding": encoding}}
    await refusal(service, 400, "body_broken", "POST", "/ingest", **options)
    assert service.stored() == {}


@broken
@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
async def test_broken_encoding_embedded(serve: Serve, packed: bytes, encoding: str) -> None:
    """Where aiohttp undoes the encoding a broken body is 400 too, or whole but for its trailer."""
    service = await serve(own=False)
    headers = {"Content-Encoding": encoding}
    answer = await service("POST", "/ingest", data=packed, headers=headers)
    if answer.status != 202:
        code = answer.json.get("code", "")
        assert code in ("body_broken", "payload_not_json"), answer.body
        check_problem(answer, 400, code)
    assert list(service.stored().values()) == [WHOLE] * (answer.status == 202)


async def test_nothing_encoded(any_server: Service) -> None:
    """An encoding of no body at all is 400: there is no document in it."""
    headers = {"Content-Encoding": "gzip", "Content-Length": "0"}
    await refusal(any_server, 400, "payload_not_json", "POST", "/ingest", headers=headers)


async def test_broken_encoding_keeps_the_service(any_server: Service) -> None:
    """After a broken body the same client goes on with a good one."""
    for packed in (PACKED[:-4], PACKED[:100], b"x"):
        headers = {"Content-Encoding": "gzip"}
        await any_server("POST", "/ingest", data=packed, headers=headers)
        assert (await any_server("POST", "/ingest", data=b"1")).status == 202


# ── Bad input: keys ───────────────────────────────────────────────────────────────────────────────

GUARDED = [
    ("POST", "/ingest"),
    ("POST", "/process"),
    ("GET", "/measurements"),
    ("GET", "/measurements/2019-05-01T10:00:00Z"),
    ("GET", f"/raw/{SOME_ID}"),
    ("GET", f"/raw/{SOME_ID}/payload"),
    ("GET", "/rejected"),
]


@pytest.mark.parametrize("route", GUARDED, ids=" ".join)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "wrong"},
        {"x-api-key": "sesam "[:-2]},
        {"x-api-key": "SESAM"},
        {"x-api-key": "sesam2"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic sesam"},
        {"Authorization": "sesam"},
    ],
    ids=str,
)
async def test_key_refused(serve: Serve, route: tuple[str, str], headers: dict[str, str]) -> None:
    """Without the key, or with a wrong one, every guarded route is 401 before anything else."""
    service = await serve(key="sesam")
    body = b'{"a": 1}' if route[0] == "POST" else None
    answer = await service(*route, headers=headers, data=body)
    check_problem(answer, 401, "key_refused")
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert b"sesam" not in answer.body.lower()
    assert service.stored() == {}


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": "sesam"},
        {"X-API-Key": "sesam"},
        {"Authorization": "Bearer sesam"},
        {"Authorization": "bearer sesam"},
    ],
    ids=str,
)
async def test_key_accepted(serve: Serve, headers: dict[str, str]) -> None:
    """The key opens every guarded route, by either header."""
    service = await serve(key="sesam")
    for route in GUARDED:
        body = b'{"a": 1}' if route[1] == "/ingest" else None
        answer = await service(*route, headers=headers, data=body)
        assert answer.status in (200, 202, 404), route


async def test_open_routes(serve: Serve) -> None:
    """Health, readiness and the description need no key."""
    service = await serve(key="sesam")
    for path in ("/health", "/ready", "/openapi.json", "/docs", "/docs/swagger-ui.css"):
        assert (await service("GET", path)).status == 200


@pytest.mark.parametrize(
    ("key", "given", "status"),
    [
        ("ключ", "ключ".encode(), 202),
        ("ключ", "ключь".encode(), 401),
        ("ключ", b"????", 401),
        ("se?am", b"se\xffam", 401),
        ("se\N{REPLACEMENT CHARACTER}am", b"se\xffam", 401),
        ("sesam", b"\xff\xfe", 401),
        ("sesam", b"sesam\xff", 401),
    ],
)
@pytest.mark.parametrize("header", [b"x-api-key: ", b"Authorization: Bearer "])
async def test_key_of_any_bytes(
    serve: Serve, key: str, given: bytes, status: int, header: bytes
) -> None:
    """A key beyond ASCII is its UTF-8 bytes; bytes that are not it are 401, never an error."""
    service = await serve(key=key)
    reply = await service.send(http(header + given, b"Content-Length: 1", body=b"1"))
    assert reply.startswith(b"HTTP/1.1 %d " % status), reply


# ── Bad input: addresses and queries ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tail", ["", "/payload"])
@pytest.mark.parametrize(
    "raw_id",
    [
        SOME_ID,
        "x",
        "0",
        "%20",
        SOME_ID[:-1],
        SOME_ID + "0",
        SOME_ID + ".json",
        SOME_ID + ".reason",
        SOME_ID + "%00",
        SOME_ID + "%0a",
        "%00",
        "%ff",
        "%F0%9F%92%A9",
        "..%2f..%2fconfig.toml",
        "..%2f..%2f..%2f..%2fetc%2fpasswd",
        "%2e%2e",
        "..%5c..%5cconfig.toml",
        "%2fetc%2fpasswd",
        "a" * 4000,
        "%D9%A0" * 32,
    ],
)
async def test_raw_id_unknown(service: Service, raw_id: str, tail: str) -> None:
    """An unknown raw_id, or what is none, tricks with paths included, is 404."""
    await service.land(reading())
    before = service.stored()
    reply = await service.send(http(line=f"GET /raw/{raw_id}{tail}".encode()))
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404 "), head
    assert b"application/problem+json" in head
    assert json.loads(body)["code"] in ("raw_id_unknown", "not_found")
    assert service.stored() == before


async def test_path_tricks_unencoded(service: Service) -> None:
    """Dots in a path lead nowhere."""
    for path in (b"/raw/../../config.toml", b"/docs/../dropzone.py", b"/raw/./x", b"//raw//x"):
        reply = await service.send(http(line=b"GET " + path))
        assert reply.startswith(b"HTTP/1.1 404 "), reply


async def test_timestamp_unknown(service: Service) -> None:
    """A timestamp without a row is 404."""
    await service.row_of(reading())
    for text in ("2019-05-01T10:00:00.000001Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z"):
        await refusal(service, 404, "measurement_not_found", "GET", f"/measurements/{text}")


@pytest.mark.parametrize(
    "text",
    [
        "x",
        "2019-05-01",
        "2019-05-01T10:00:00",
        "2019-02-30T10:00:00Z",
        "1556704800.5",
        "20190501",
        "253402300800000",
        "-62135596800001",
        "%00",
        "%ff",
        "0001-01-01T00:00:00+14:00",
        "10000-01-01T00:00:00Z",
        "2019-05-01T10:00:00%2B99:00",
    ],
)
async def test_timestamp_malformed(service: Service, text: str) -> None:
    """What is no moment is 400, which names the parameter."""
    path = f"/measurements/{text}"
    document = await refusal(service, 400, "query_invalid", "GET", path)
    assert document["parameter"] == "timestamp"
    assert "timestamp" in document["detail"]


@pytest.mark.parametrize(
    ("method", "path", "parameter"),
    [
        ("GET", "/measurements?limit=0", "limit"),
        ("GET", "/measurements?limit=-1", "limit"),
        ("GET", "/measurements?limit=10001", "limit"),
        ("GET", "/measurements?limit=ten", "limit"),
        ("GET", "/measurements?limit=1.5", "limit"),
        ("GET", "/measurements?limit=", "limit"),
        ("GET", "/measurements?limit=" + "9" * 5000, "limit"),
        ("GET", "/measurements?limit=%D9%A1", "limit"),
        ("GET", "/measurements?limit=true", "limit"),
        ("GET", "/measurements?order=up", "order"),
        ("GET", "/measurements?order=ASC", "order"),
        ("GET", "/measurements?format=xml", "format"),
        ("GET", "/measurements?format=null", "format"),
        ("GET", "/measurements?since=yesterday", "since"),
        ("GET", "/measurements?since=2019-05-01T10:00:00", "since"),
        ("GET", "/measurements?since=null", "since"),
        ("GET", "/measurements?since=", "since"),
        ("GET", "/measurements?until=2019-05-01", "until"),
        ("GET", "/measurements?until=0001-01-01T00:00:00%2B14:00", "until"),
        ("GET", "/measurements?after=2019-13-01T10:00:00Z", "after"),
        ("GET", "/measurements?after=%ff%00", "after"),
        ("GET", "/measurements?offset=3", "offset"),
        ("GET", "/measurements?Limit=3", "Limit"),
        ("GET", "/measurements?limit=3&limit=3", "limit"),
        ("GET", "/measurements?since=2019-05-01T10:00Z&since=x", "since"),
        ("GET", "/rejected?limit=0", "limit"),
        ("GET", "/rejected?after=x", "after"),
        ("GET", "/rejected?after=null", "after"),
        ("GET", "/rejected?page=2", "page"),
        ("POST", "/process?limit=0", "limit"),
        ("POST", "/process?limit=-5", "limit"),
        ("POST", "/process?limit=all", "limit"),
        ("POST", "/process?limit=null", "limit"),
        ("POST", "/process?limit=1&limit=1", "limit"),
        ("POST", "/process?batch=1", "batch"),
    ],
)
async def test_query_invalid(service: Service, method: str, path: str, parameter: str) -> None:
    """A bad, unknown or repeated parameter is 400, names it, and nothing is processed."""
    await service.land(reading())
    document = await refusal(service, 400, "query_invalid", method, path)
    assert document["parameter"] == parameter
    assert parameter in document["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/ingest", {"POST"}),
        ("PUT", "/ingest", {"POST"}),
        ("GET", "/process", {"POST"}),
        ("HEAD", "/process", {"POST"}),
        ("POST", "/measurements", {"GET", "HEAD"}),
        ("DELETE", "/measurements/2019-05-01T10:00:00Z", {"GET", "HEAD"}),
        ("DELETE", f"/raw/{SOME_ID}", {"GET", "HEAD"}),
        ("PATCH", f"/raw/{SOME_ID}/payload", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("OPTIONS", "/rejected", {"GET", "HEAD"}),
        ("PROPFIND", "/docs", {"GET", "HEAD"}),
    ],
)
async def test_wrong_method(service: Service, method: str, path: str, allowed: set[str]) -> None:
    """A wrong method is 405 with the right ones in Allow."""
    await service.land(reading())
    before = service.stored()
    answer = await service(method, path)
    if method != "HEAD":
        check_problem(answer, 405, "method_not_allowed")
    assert answer.status == 405
    assert set(re.split(r",\s*", answer.headers["Allow"])) == allowed
    assert service.stored() == before


@pytest.mark.parametrize("path", ["/nope", "/ingest/", "/raw", "/raw/", "/%00", "/docs/", "/*"])
async def test_unknown_path(service: Service, path: str) -> None:
    """An unknown path is 404."""
    for method in ("GET", "POST"):
        await refusal(service, 404, "not_found", method, path)


# ── Request ids ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("path", ["/health", "/nope", "/measurements?limit=0"])
async def test_request_id_taken(service: Service, path: str) -> None:
    """A sane X-Request-ID is taken, on success and on error."""
    for given in ("abc", "a" * 128, SOME_ID, "req_1.2:3/4+5=6@7"):
        answer = await service("GET", path, headers={"X-Request-ID": given})
        assert answer.headers["X-Request-ID"] == given
        assert answer.status == 200 or answer.json["request_id"] == given


@pytest.mark.parametrize("path", [b"/health", b"/nope"])
@pytest.mark.parametrize(
    "given",
    [b"", b" ", b"a" * 129, b"a b", b"a\tb", b"a\xffb", "é".encode(), b"a%0d%0ab", b"<b>", b'"'],
)
async def test_request_id_made(service: Service, path: bytes, given: bytes) -> None:
    """An X-Request-ID that is overlong or holds odd bytes is replaced by one of our own."""
    reply = await service.send(http(b"X-Request-ID: " + given, line=b"GET " + path))
    [made] = re.findall(rb"(?i)x-request-id: (.*)\r\n", reply)
    assert made != given
    assert re.fullmatch(rb"[\w-]{16,128}", made)


@pytest.mark.parametrize("between", [b"\r\n ", b"\n", b"\r", b"\r\n"])
async def test_request_id_cannot_split(service: Service, between: bytes) -> None:
    """A line end in X-Request-ID never becomes a header of the answer."""
    reply = await service.send(http(b"X-Request-ID: a" + between + b"Set-Cookie: b=c"))
    assert re.match(rb"HTTP/1.. 4", reply)
    assert b"set-cookie" not in reply.partition(b"\r\n\r\n")[0].lower()


async def test_request_ids_differ(service: Service) -> None:
    """Each request without an id gets one of its own."""
    ids = {(await service("GET", "/health")).headers["X-Request-ID"] for _ in range(20)}
    assert len(ids) == 20


# ── Trouble ───────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def broken_off(service: Service, request: bytes, *, reset: bool) -> AsyncIterator[None]:
    reader, writer = await asyncio.open_connection(*service.url.removeprefix("http://").split(":"))
    writer.write(request)
    await writer.drain()
    await asyncio.sleep(0.05)
    if reset:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.close()
    yield
    with suppress(ConnectionError):
        await reader.read()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "request_bytes",
    [
        http(b"Content-Length: 1000", body=b'{"a": 1}'),
        http(b"Content-Length: 1000"),
        http(b"Transfer-Encoding: chunked", body=b'8\r\n{"a": 1}\r\n'),
        http(b"Content-Length: 1000", b"Content-Encoding: gzip", body=gzip.compress(b"{}")),
    ],
    ids=["length", "nothing", "chunked", "gzip"],
)
async def test_disconnect(any_server: Service, request_bytes: bytes, reset: bool) -> None:
    """A client that goes away in the middle of a body leaves nothing, even if what came is JSON."""
    async with broken_off(any_server, request_bytes, reset=reset):
        await asyncio.sleep(0.1)
    assert any_server.stored() == {}
    assert (await any_server("POST", "/ingest", data=b"1")).status == 202


async def test_chunked_garbage(service: Service) -> None:
    """Chunks that are none get 400 and store nothing."""
    reply = await service.send(http(b"Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"))
    assert re.match(rb"HTTP/1.. 400 ", reply), reply
    assert b"Traceback" not in reply
    assert service.stored() == {}


async def test_outage(serve: Serve) -> None:
    """While the backend is down ingesting goes on, processing is 503; afterwards all is done."""
    backend = Outage()
    service = await serve(backend)
    ids = [await service.land(reading(f"2019-05-0{n}T10:00:00Z")) for n in (1, 2)]
    bad = await service.land(reading(data=[]))
    for method, path in [
        ("POST", "/process"),
        ("GET", "/measurements"),
        ("GET", "/measurements/2019-05-01T10:00:00Z"),
    ]:
        answer = await service(method, path)
        check_problem(answer, 503, "backend_unavailable")
        assert int(answer.headers["Retry-After"]) > 0
    for raw_id in ids:
        assert (await service("GET", f"/raw/{raw_id}")).json["state"] == "pending"
    later = await service.land(reading("2019-05-03T10:00:00Z"))

    backend.down = False
    done = await service.process()
    assert (done["processed"], done["remaining"]) == (3, 0)
    assert (await service("GET", f"/raw/{bad}")).json["state"] == "rejected"
    assert (await service("GET", f"/raw/{later}")).json["measurement"]["mean"] == 1.0

    backend.down = True
    answer = await service("GET", f"/raw/{ids[0]}")
    check_problem(answer, 503, "backend_unavailable")
    assert (await service("GET", f"/raw/{ids[0]}/payload")).status == 200
    assert (await service("GET", "/rejected")).json["total"] == 1


async def test_no_postgres(serve: Serve) -> None:
    """With no PostgreSQL at the address the service starts, lands, and hides the password."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        service = await serve(PostgresBackend(url=f"postgresql://u:hunter2@127.0.0.1:{port}/d"))
        raw_id = await service.land(reading())
        answer = await service("POST", "/process")
        ready = await service("GET", "/ready")
    check_problem(answer, 503, "backend_unavailable")
    assert ready.status == 200
    assert b"hunter2" not in answer.body + ready.body
    assert (await service("GET", f"/raw/{raw_id}")).json["state"] == "pending"


async def test_disk_trouble(service: Service) -> None:
    """Where nothing can be stored `/ingest` is 503 with Retry-After, and recovers by itself."""
    raw, away = service.folder / "raw", service.folder / "away"
    raw.rename(away)
    raw.write_text("in the way")
    before = service.stored()
    answer = await service("POST", "/ingest", data=b"{}")
    check_problem(answer, 503, "storage_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert str(service.folder) not in answer.body.decode()
    assert service.stored() == before
    raw.unlink()
    away.rename(raw)
    await service.land({})


async def test_failed_writes_are_shown(serve: Serve) -> None:
    """While rows cannot be written /status says so, since when and why; then no more."""
    backend = ReadOnly()
    service = await serve(backend)
    assert (await service("GET", "/status")).json["failed_write"] is None
    await service.land(reading("2019-05-01T10:00:00Z"))
    before = datetime.now(UTC)
    for _ in range(2):
        assert (await service("POST", "/process")).status == 503
    shown = (await service("GET", "/status")).json["failed_write"]
    assert shown["detail"] == "it accepts no writes"
    since, last = (datetime.fromisoformat(shown[name]) for name in ("since", "last"))
    assert before <= since < last <= datetime.now(UTC)
    backend.read_only = False
    assert (await service("POST", "/process")).json["processed"] == 1
    assert (await service("GET", "/status")).json["failed_write"] is None


async def test_defect(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """A bug is a 500 that tells the client nothing of the inside, and the log all, by its id."""
    service = await serve(Defective())
    document = check_problem(await service("GET", "/measurements"), 500, "internal_error")
    assert "hunter2" not in json.dumps(document)
    records = [r for r in caplog.records if document["request_id"] in r.getMessage()]
    [record] = [record for record in records if record.name == "dropzone"]
    assert record.levelno == logging.ERROR
    assert record.exc_info


async def test_one_processor(service: Service) -> None:
    """Processing twice at once does each payload once and lets both callers know."""
    for n in range(30):
        await service.land(reading(f"2019-05-01T10:00:{n:02}Z"))
    answers = await asyncio.gather(*(service("POST", "/process") for _ in range(4)))
    assert {answer.status for answer in answers} == {200}
    assert sum(answer.json["processed"] for answer in answers) == 30


async def test_strays_stay(service: Service) -> None:
    """A file in `raw/` that is not named `<uuid>.json` is left alone, and none can be fetched."""
    for name in ("note.txt", "x.json", f"{SOME_ID}.json.tmp", f"{SOME_ID.upper()}.json"):
        (service.folder / "raw" / name).write_text("{}")
    before = service.stored()
    assert (await service.process())["checked"] == 0
    assert service.stored() == before


async def test_restart(serve: Serve) -> None:
    """A service that starts on the folder of another finds its payloads and goes on after them."""
    first = await serve()
    ids = [await first.land(reading()), await first.land([])]
    await first.process()
    ids.append(await first.land({}))
    second = await serve()
    states = [(await second("GET", f"/raw/{raw_id}")).json["state"] for raw_id in ids]
    assert states == ["processed", "rejected", "pending"]
    assert await second.land({}) > ids[-1]


async def test_pending_from_a_fast_clock(serve: Serve, tmp_path: Path) -> None:
    """A payload that landed while the clock was ahead does not stand above what lands later."""
    raw = tmp_path / "data" / "raw"
    raw.mkdir(parents=True)
    ahead = UUID(int=next_raw_id(UUID(int=0)).int + (int(86_400e3) << 80))
    (raw / f"{ahead}.json").write_text(json.dumps(reading(data=[1])))
    service = await serve()
    later = await service.land(reading(data=[5]))
    assert later > str(ahead)
    await service.process()
    [row] = (await service("GET", "/measurements")).json["measurements"]
    assert (row["mean"], row["raw_id"]) == (5.0, later)
