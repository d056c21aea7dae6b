"""Landing through the door: keys, batches, the writer process, admission, shutdown."""

import asyncio
import gzip
import io
import json
import os
import shutil
import signal
import sqlite3
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import aiohttp
import psutil
import pytest
from aiohttp import ClientSession, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request
from stores import payloads_below, pending_in
from test_cli import OK, Program, Server

import dropzone
from backends.memory import MemoryBackend
from backends.raw import uuid_at
from backends.raw.journal import digest_of
from backends.raw.keys import NOTE_KEY
from backends.raw.landing import RawStore
from dropzone import AuthConfig, Config, KeyConfig, RawConfig, Secret, ServerConfig, create_app

NDJSON = {"Content-Type": "application/x-ndjson"}
LARGE = json.dumps({"time_stamp": "2019-05-01T10:00:00Z", "data": [1.5] * 2000}).encode()
PATIENCE = 20  # seconds until what hangs is taken for hanging
TOTAL_LIMIT = 100_000  # bytes of a body


class Answer(NamedTuple):
    """An answer, read to its end."""

    status: int
    headers: Any
    json: Any


class Service:
    """A running application, its address and its data folder."""

    def __init__(self, folder: Path, runner: web.AppRunner, session: ClientSession) -> None:
        [(self.host, self.port)] = runner.addresses
        self.url = f"http://{self.host}:{self.port}"
        self.folder = folder
        self.app = runner.app
        self.session = session

    async def post(self, body: Any, key: str | None = None, **headers: str) -> Answer:
        """Send a body to /ingest."""
        given = {name.replace("_", "-"): text for name, text in headers.items()}
        if key is not None:
            given["Idempotency-Key"] = key
        return await self.ask("POST", "/ingest", data=body, headers=given)

    async def batch(self, body: bytes, key: str | None = None, **headers: str) -> Answer:
        """Send NDJSON to /ingest."""
        return await self.post(body, key, **(NDJSON | headers))

    async def ask(self, method: str, path: str, **options: Any) -> Answer:
        async with self.session.request(method, self.url + path, **options) as response:
            return Answer(response.status, response.headers, json.loads(await response.read()))

    def landed(self) -> dict[str, bytes]:
        """Return the pending payloads by their raw_ids, in order of arrival."""
        return {str(n): body for n, body in payloads_below(self.folder / "raw").items()}

    def files(self) -> dict[str, bytes]:
        """Return the pending files by their names."""
        return {file.name: file.read_bytes() for file in (self.folder / "raw").iterdir()}


Serve = Callable[..., Awaitable[Service]]


def key_named(name: str) -> KeyConfig:
    """Return an API key that is its own name."""
    return KeyConfig(name, Secret(f"sha256:{dropzone.hash_of(name).hex()}"), ("ingest",))


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Serve]:
    """Serve as `python dropzone.py` does; to serve again on the same folder ends the one before."""
    async with AsyncExitStack() as session_stack, AsyncExitStack() as stack:
        session = await session_stack.enter_async_context(ClientSession())

        async def start(keys: Sequence[str] = (), **limits: Any) -> Service:
            await stack.aclose()
            raw = RawConfig(dir=tmp_path / "raw")
            server = ServerConfig(**{"max_body_bytes": TOTAL_LIMIT} | limits)
            auth = AuthConfig(keys=tuple(map(key_named, keys)))
            app = create_app(Config(server=server, raw=raw, auth=auth), backend=MemoryBackend())
            runner = web.AppRunner(
                app, access_log=None, auto_decompress=False, shutdown_timeout=dropzone.GRACE
            )
            stack.push_async_callback(runner.cleanup)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            return Service(tmp_path, runner, session)

        yield start


@pytest.fixture
async def service(serve: Serve) -> Service:
    """Return a service with the usual limits."""
    return await serve()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.close()


async def until(condition: Callable[[], Any]) -> Any:
    """Return what a condition gives as soon as it is true."""
    async with asyncio.timeout(PATIENCE):
        while not (found := condition()):
            await asyncio.sleep(0.01)
    return found


def writers() -> list[psutil.Process]:
    """Return the processes of this one that land large groups."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "write_forever" in " ".join(child.cmdline()):
                found.append(child)
    return found


async def with_writer(service: Service) -> psutil.Process:
    """Send large payloads until the writer process is there and takes them; return it."""
    raw = service.app[dropzone.RAW]

    def ready() -> bool:
        return raw._writer._process is not None  # noqa: SLF001

    assert (await service.post(LARGE)).status == 202
    await until(ready)
    [process] = writers()
    return process


# ── Idempotency-Key ───────────────────────────────────────────────────────────────────────────────


async def test_key_repeated(service: Service):
    """The same key and body get the same answer again, and land once."""
    first = await service.post(b"[1]", "a")
    second = await service.post(b"[1]", "a")
    assert first.status == second.status == 202
    assert first.json == second.json
    assert first.headers["Location"] == second.headers["Location"]
    assert service.landed() == {first.json["raw_id"]: b"[1]"}


async def test_other_key(service: Service):
    """Equal bodies under different keys, or none, are payloads of their own."""
    answers = [await service.post(b"[1]", key) for key in ("a", "A", None, None)]
    assert sorted(a.json["raw_id"] for a in answers) == list(service.landed())
    assert len(service.landed()) == 4


async def test_key_after_a_restart(serve: Serve):
    """A key is known after a restart."""
    first = await (await serve()).post(b"[1]", "a")
    again = await serve()
    assert (await again.post(b"[1]", "a")).json == first.json
    assert (await again.post(b"[2]", "a")).status == 422
    assert list(again.landed()) == [first.json["raw_id"]]


async def test_key_of_a_processed_payload(service: Service):
    """A retry does not bring back what was processed or rejected meanwhile."""
    first = await service.post(LARGE, "good")
    second = await service.post(b"[]", "bad")
    done = await service.ask("POST", "/process")
    assert (done.json["processed"], done.json["failed"]) == (1, 1)
    assert (await service.post(LARGE, "good")).json == first.json
    assert (await service.post(b"[]", "bad")).json == second.json
    assert service.landed() == {}


@pytest.mark.parametrize("body", [b"[1]", LARGE], ids=["small", "large"])
async def test_concurrent_requests_with_one_key(service: Service, body: bytes):
    """Of concurrent requests with one key, one lands, and all get its raw_id."""
    if body is LARGE:
        await with_writer(service)
    before = set(service.landed())
    answers = await asyncio.gather(*(service.post(body, "a") for _ in range(40)))
    assert {a.status for a in answers} == {202}
    [raw_id] = {a.json["raw_id"] for a in answers}
    assert set(service.landed()) - before == {raw_id}


async def test_concurrent_bodies_with_one_key(service: Service):
    """Of concurrent requests with one key and different bodies, one lands, the others get a 422."""
    answers = await asyncio.gather(*(service.post(b"[%d]" % i, "a") for i in range(20)))
    assert Counter(a.status for a in answers) == {202: 1, 422: 19}
    assert len(service.landed()) == 1


async def test_key_with_another_body(service: Service):
    """A key that comes with another body is 422 idempotency_key_reused, and nothing lands."""
    await service.post(b"[1]", "a")
    refused = await service.post(b"[2]", "a")
    assert (refused.status, refused.json["code"]) == (422, "idempotency_key_reused")
    assert list(service.landed().values()) == [b"[1]"]


async def test_refused_key_leaves_the_rest_alone(service: Service):
    """A 422 refuses its own request only, whatever it was landed together with."""
    await service.post(b"[0]", "a")
    posts = (service.post(b"[%d]" % i, "a" if i % 2 else None) for i in range(20))
    answers = await asyncio.gather(*posts)
    assert [a.status for a in answers] == [202, 422] * 10
    landed = service.landed()
    assert all(landed[a.json["raw_id"]] == b"[%d]" % i for i, a in enumerate(answers) if i % 2 == 0)
    assert len(landed) == 11


@pytest.mark.parametrize("size", [1, 2000], ids=["small", "large"])
async def test_key_belongs_to_its_caller(serve: Serve, size: int):
    """Two callers may use the same word as their key; each gets what is its own."""
    service = await serve(["one", "two"])
    if size > 1:
        service.session.headers["x-api-key"] = "one"
        await with_writer(service)
    bodies = {name: json.dumps([name] * size).encode() for name in ("one", "two")}
    first = {name: await service.post(bodies[name], "a", x_api_key=name) for name in bodies}
    assert [answer.status for answer in first.values()] == [202, 202]
    again = {name: await service.post(bodies[name], "a", x_api_key=name) for name in bodies}
    assert [each.json for each in again.values()] == [each.json for each in first.values()]
    assert (await service.post(bodies["two"], "a", x_api_key="one")).status == 422
    landed = service.landed()
    assert all(landed[first[name].json["raw_id"]] == bodies[name] for name in bodies)


async def test_key_of_nobody(serve: Serve):
    """A key from before there were callers holds for a retry, and refuses no other payload."""
    noted = uuid_at(datetime.now(UTC) - timedelta(hours=1))
    service = await serve(["one", "two"])
    with sqlite3.connect(service.folder / "journal" / "keys.sqlite") as keys:
        keys.execute(NOTE_KEY, ("a", digest_of(b"[1]", ""), noted.bytes, True, None))
    keys.close()
    for name in ("one", "two"):
        assert (await service.post(b"[1]", "a", x_api_key=name)).json["raw_id"] == str(noted)
    fresh = await service.post(b"[2]", "a", x_api_key="two")
    assert fresh.status == 202
    assert (await service.post(b"[2]", "a", x_api_key="two")).json == fresh.json
    assert (await service.post(b"[3]", "a", x_api_key="two")).status == 422
    assert list(service.landed().values()) == [b"[2]"]


@pytest.mark.parametrize(
    "lines", [[b"1", b"2", b"x"], [LARGE, b"x", LARGE]], ids=["small", "large"]
)
async def test_key_of_a_batch(serve: Serve, lines: list[bytes]):
    """A batch with a key lands once, gets the same answer again, and no other lines."""
    service = await serve()
    if LARGE in lines:
        await with_writer(service)
    before = set(service.files())
    body = b"\n".join(lines)
    first = await service.batch(body, "a")
    assert len(first.json["not_json"]) == 1
    assert (await service.batch(body, "a")).json == first.json
    assert (await service.batch(body[:-1], "a")).status == 422
    again = await serve()
    assert (await again.batch(body, "a")).json == first.json
    [name] = set(again.files()) - before
    assert name == f"{first.json['raw_ids'][0]}.3.ndjson"


async def test_key_of_an_array(serve: Serve):
    """An array of objects with a key lands once, and gets the same raw_ids again."""
    service = await serve()
    first = await service.post(b"[{}, {}]", "a")
    again = await serve()
    assert (await again.post(b"[{}, {}]", "a")).json == first.json
    assert (await again.post(b"[{},{}]", "a")).status == 422
    assert list(again.files()) == [f"{first.json['raw_ids'][0]}.2.json"]


async def test_key_with_another_form(service: Service):
    """A key that comes with the same bytes as something else is 422, and nothing lands."""
    array = b"[\n1\n]"  # as NDJSON it is three lines, of which one is JSON
    first = await service.post(array, "a")
    assert (await service.batch(array, "a")).status == 422
    await service.batch(b"[{},{}]", "b")
    assert (await service.post(b"[{},{}]", "b")).status == 422
    await service.batch(array, "c")
    assert (await service.post(array, "c")).status == 422
    assert len(service.files()) == 3
    assert (await service.post(array, "a")).json == first.json


@pytest.mark.parametrize("body", [b"[1]", LARGE], ids=["small", "large"])
async def test_retry_after_a_crash_before_the_commit(serve: Serve, body: bytes):
    """A key that was noted by a process that died before its commit lands under that raw_id."""
    service = await serve()
    raw_id = UUID((await service.post(body)).json["raw_id"])
    noted = UUID(int=raw_id.int + 1)
    digest = digest_of(body, "")
    keys = sqlite3.connect(service.folder / "journal" / "keys.sqlite")
    with keys:
        keys.execute(NOTE_KEY, ("a", digest, noted.bytes, False, None))
    keys.close()
    again = await serve()
    if body is LARGE:
        await with_writer(again)
    for _ in range(2):
        assert (await again.post(body, "a")).json["raw_id"] == str(noted)
    assert again.landed()[str(noted)] == body


async def test_key_beyond_its_life(service: Service):
    """A key is forgotten when the payload it named arrived more than 24 hours ago."""
    old = UUID(int=(int(time.time() - 25 * 3600) * 1000) << 80 | 7 << 76 | 2 << 62)
    keys = sqlite3.connect(service.folder / "journal" / "keys.sqlite")
    with keys:
        keys.execute(NOTE_KEY, ("a", b"of another body", old.bytes, True, None))
    keys.close()
    answer = await service.post(b"[1]", "a")
    assert answer.status == 202
    assert list(service.landed()) == [answer.json["raw_id"]]


@pytest.mark.parametrize("key", ["", "x" * 256, "a\tb", "ä"])
async def test_bad_key(service: Service, key: str):
    """A key that is empty, too long or not printable ASCII is 400, and nothing lands."""
    refused = await service.post(b"[1]", key)
    assert (refused.status, refused.json["code"]) == (400, "header_invalid")
    assert service.landed() == {}


@pytest.mark.parametrize("key", ["x" * 255, "a b", '"8e03978e-40d5"', "~!"])
async def test_good_key(service: Service, key: str):
    """Any other key is taken as it is."""
    assert (await service.post(b"[1]", key)).status == 202
    assert (await service.post(b"[2]", key)).status == 422


async def test_key_through_the_writer_process(service: Service):
    """Keys hold across the two processes: what one has landed, the other knows."""
    small = await service.post(b"[1]", "small")
    early = await service.post(LARGE, "early")
    await with_writer(service)
    late = await service.post(LARGE, "late")
    assert (await service.post(LARGE, "early")).json == early.json
    assert (await service.post(LARGE, "late")).json == late.json
    for key, body in (("late", b"[1]"), ("small", LARGE)):
        refused = await service.post(body, key)
        assert (refused.status, refused.json["code"]) == (422, "idempotency_key_reused")
    assert (await service.post(b"[1]", "small")).json == small.json
    assert len(service.landed()) == 4


# ── NDJSON ────────────────────────────────────────────────────────────────────────────────────────


MEDIA_TYPES = [
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    "Application/X-NDJSON; charset=utf-8",
]
OBJECTS = [b'{"n": %d}' % number for number in range(100)]


def assert_landed(service: Service, answer: Answer, body: bytes, payloads: list[bytes], form: str):
    """Be sure that a batch is one file of the bytes that arrived, and what its raw_ids lead to."""
    assert (answer.status, answer.json["status"]) == (202, "accepted")
    raw_ids = [UUID(each) for each in answer.json["raw_ids"]]
    first, count = raw_ids[0], len(payloads)
    assert raw_ids == [UUID(int=first.int + k * 2**16) for k in range(count)]
    assert service.files() == {f"{first}.{count}.{form}": body}
    assert service.landed() == dict(zip(answer.json["raw_ids"], payloads, strict=True))


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
async def test_batch(service: Service, media_type: str):
    """NDJSON lands as one file of the bytes that arrived, each line a payload, in their order."""
    body = b"\n".join(OBJECTS)
    answer = await service.batch(body, Content_Type=media_type)
    assert_landed(service, answer, body, OBJECTS, "ndjson")
    assert "not_json" not in answer.json


ANY_TYPE = ["application/json", "text/plain", "application/octet-stream"]


@pytest.mark.parametrize("media_type", ANY_TYPE)
@pytest.mark.parametrize("between", [b",", b" ,\r\n\t"])
async def test_array_of_objects(service: Service, media_type: str, between: bytes):
    """An array of objects lands as one file of the bytes that arrived, each object a payload."""
    body = b" [\n" + between.join(OBJECTS) + b"\n]\r\n"
    answer = await service.post(body, Content_Type=media_type)
    assert_landed(service, answer, body, OBJECTS, "json")


@pytest.mark.parametrize("media_type", ANY_TYPE)
@pytest.mark.parametrize(
    ("between", "form"), [(b"", "json"), (b" ", "json"), (b"\n", "ndjson"), (b"\r\n\n", "ndjson")]
)
async def test_sequence(service: Service, media_type: str, between: bytes, form: str):
    """Several documents one after another are a batch, whatever the media type says."""
    for documents in (OBJECTS, [b"1", b'"2"', b"[3]", b"null"]):
        for path in (service.folder / "raw").iterdir():
            path.unlink()
        body = between.join(documents) if between or documents is OBJECTS else b'1"2"[3]null'
        answer = await service.post(body, Content_Type=media_type)
        assert_landed(service, answer, body, documents, form)


async def test_lines_and_documents_mixed(service: Service):
    """Several documents on a line, or one over several lines, are a batch of documents."""
    body = b'{"a": 1} {"a": 2}\n{"a":\n3}\n'
    answer = await service.post(body)
    assert_landed(service, answer, body, [b'{"a": 1}', b'{"a": 2}', b'{"a":\n3}'], "json")


@pytest.mark.parametrize("body", [b'[{"a": 1}]', b" [ {} ] "])
async def test_array_of_one_object(service: Service, body: bytes):
    """An array of one object is a batch of one payload."""
    answer = await service.post(body)
    assert_landed(service, answer, body, [body.strip(b" []")], "json")


@pytest.mark.parametrize("media_type", ANY_TYPE)
@pytest.mark.parametrize(
    "body",
    [b"[]", b"[1]", b"[{}, 1]", b"[1, {}]", b"[[{}]]", b'{"a": [{}, {}]}', b"{\n}\n", b'"[{}]"'],
)
async def test_one_document(service: Service, media_type: str, body: bytes):
    """Any other document is one payload, which gets one raw_id and the place of its receipt."""
    answer = await service.post(body, Content_Type=media_type)
    assert answer.status == 202
    assert answer.json == {"raw_id": answer.json["raw_id"], "status": "accepted"}
    assert answer.headers["Location"] == f"/raw/{answer.json['raw_id']}"
    assert service.files() == {f"{answer.json['raw_id']}.json": body}


async def test_line_ends(service: Service):
    """CRLF ends a line as LF does, empty lines count as nothing, other bytes stay as they are."""
    body = b'\r\n 1 \r\n\n{"a":\t2}\n   \n"\xc3\xa4"'
    answer = await service.batch(body)
    assert_landed(service, answer, body, [b" 1 ", b'{"a":\t2}', b'"\xc3\xa4"'], "ndjson")


@pytest.mark.parametrize("count", [3, 5000], ids=["small", "large"])
@pytest.mark.parametrize("form", ["ndjson", "json"])
async def test_compressed_batch(service: Service, count: int, form: str):
    """A gzipped batch lands as what it was before."""
    documents = [b'{"n": %d}' % number for number in range(count)]
    body = b"\n".join(documents) if form == "ndjson" else b"[%s]" % b",".join(documents)
    headers = NDJSON if form == "ndjson" else {}
    answer = await service.post(gzip.compress(body), Content_Encoding="gzip", **headers)
    assert_landed(service, answer, body, documents, form)


@pytest.mark.parametrize("line", [1, 2, 3, 9000])
@pytest.mark.parametrize("is_odd", [False, True], ids=["strict", "odd"])
async def test_broken_line(service: Service, line: int, is_odd: bool):
    """A line that is not JSON is named, empty ones counted, and lands as its neighbours do."""
    lines = [b"[NaN]" if is_odd else b"1"] * 9000
    lines[0] = b"" if line > 1 else b"1"
    lines[line - 1] = b'{"a": }'
    body = b"\n".join(lines)
    answer = await service.batch(body)
    assert_landed(service, answer, body, list(filter(None, lines)), "ndjson")
    place = line - 1 - (line > 1)
    [bad] = answer.json["not_json"]
    assert (bad["line"], bad["raw_id"]) == (line, answer.json["raw_ids"][place])
    assert bad["detail"].startswith("not JSON: ")
    assert "column 7" in bad["detail"]


@pytest.mark.parametrize("bad", [b'{"time_st', b"\xff", b'{"a": "\xe4"}', b"nothing", b"\x00\x00"])
async def test_torn_line(service: Service, bad: bytes):
    """The end of a file that lost power in the middle of a line lands with the lines before it."""
    body = b"1\n2\n" + bad
    answer = await service.batch(body)
    assert_landed(service, answer, body, [b"1", b"2", bad], "ndjson")
    assert [each["line"] for each in answer.json["not_json"]] == [3]


async def test_lines_under_another_media_type(service: Service):
    """Where not all is JSON, it is lines only if the first is a whole object or array."""
    body = b'\n{"a": 1}\n{"a": '
    answer = await service.post(body)
    assert_landed(service, answer, body, [b'{"a": 1}', b'{"a": '], "ndjson")
    assert [each["line"] for each in answer.json["not_json"]] == [3]
    for text in (b"1\n[2", b'{"a":\n1}\n{"a":', b'{"a": 1} {"a"', b"[1] x\n[2]"):
        refused = await service.post(text)
        assert (refused.status, refused.json["code"]) == (400, "payload_not_json"), text


async def test_many_broken_lines(service: Service):
    """Of bad lines the first 1,000 are named."""
    body = b"1\n" + b"x\n" * 1500
    answer = await service.batch(body)
    assert len(answer.json["raw_ids"]) == 1501
    named = [(each["line"], each["raw_id"]) for each in answer.json["not_json"]]
    assert named == list(enumerate(answer.json["raw_ids"], 1))[1:1001]


@pytest.mark.parametrize("count", [1, 2, 9000])
async def test_no_line_is_json(service: Service, count: int):
    """Where no line is JSON, the first is named, empty ones counted, and nothing lands."""
    refused = await service.batch(b"\n" + b'{"a": }\n' * count)
    assert (refused.status, refused.json["code"]) == (400, "payload_not_json")
    assert refused.json["line"] == 2
    assert "line 2:" in refused.json["detail"]
    assert service.files() == {}


@pytest.mark.parametrize("kind", ["ndjson", "array", "sequence"])
async def test_too_many_payloads(serve: Serve, kind: str):
    """One payload more than a batch may have is 413, and nothing lands; the most is taken."""
    service = await serve(max_body_bytes=1_000_000)
    headers = NDJSON if kind == "ndjson" else {}

    def body(count: int) -> bytes:
        if kind == "array":
            return b"[" + b"{}," * (count - 1) + b"{}]"
        return (b"1\n" if kind == "ndjson" else b"{}") * count

    refused = await service.post(body(dropzone.BATCH + 1), **headers)
    assert (refused.status, refused.json["code"]) == (413, "payload_too_large")
    assert "100000 payloads" in refused.json["detail"].replace(",", "")
    assert service.files() == {}
    answer = await service.post(body(dropzone.BATCH), **headers)
    assert len(answer.json["raw_ids"]) == dropzone.BATCH == 100_000
    assert list(service.landed()) == answer.json["raw_ids"]


@pytest.mark.parametrize("form", ["ndjson", "json"])
async def test_batch_beyond_the_limit_of_a_body(service: Service, form: str):
    """A batch with a byte more than a body may have is 413, as any body is; the most is taken."""
    line = b'{"a": "%s"}'
    end, headers = (b"\n", NDJSON) if form == "ndjson" else (b"", {})
    begin = b"" if form == "ndjson" else b"["
    rest = TOTAL_LIMIT - len(begin + line % b"" + end)
    for more, status in ((1, 413), (0, 202)):
        body = begin + line % (b"x" * (rest + more - (form == "json"))) + end
        body += b"" if form == "ndjson" else b"]"
        assert len(body) == TOTAL_LIMIT + more
        answer = await service.post(body, **headers)
        assert answer.status == status
        packed = gzip.compress(body)
        assert (await service.post(packed, Content_Encoding="gzip", **headers)).status == status
    assert len(service.files()) == 2


@pytest.mark.parametrize("body", [b"", b"\n", b" \r\n\r\n\t"])
async def test_empty_batch(service: Service, body: bytes):
    """A batch without a line is 400."""
    refused = await service.batch(body)
    assert (refused.status, refused.json["code"]) == (400, "payload_not_json")


async def test_batch_all_or_none(service: Service, tmp_path: Path):
    """Where the disk refuses a batch, none of its lines is there, not after a crash either."""
    raw, away, crashed = (tmp_path / name for name in ("raw", "away", "crashed"))
    raw_id = (await service.post(b"[1]")).json["raw_id"]
    raw.rename(away)
    raw.touch()  # the journal can be written, the files cannot
    refused = await service.batch(b"1\n" * 100)
    assert (refused.status, refused.json["code"]) == (503, "storage_unavailable")
    assert refused.headers["Retry-After"].isdigit()
    raw.unlink()
    away.rename(raw)
    assert list(service.landed()) == [raw_id]
    shutil.copytree(tmp_path, crashed)
    store = RawStore(crashed / "raw")
    await store.open()
    assert pending_in(store) == [UUID(raw_id)]
    await store.close()


async def test_clock_set_back(service: Service):
    """With the clock behind the last raw_id, the next ones still ascend, in both processes."""
    ahead = uuid_at(datetime.now(UTC) + timedelta(days=1))
    (service.folder / "journal" / "last_raw_id").write_bytes(ahead.bytes)
    answers = [await service.post(b"[1]") for _ in range(20)]
    await with_writer(service)
    answers += [await service.post(body) for body in (LARGE, b"[1]") * 10]
    raw_ids = [a.json["raw_id"] for a in answers]
    assert raw_ids == sorted(raw_ids)
    assert raw_ids[0] > str(ahead)


# ── The writer process ────────────────────────────────────────────────────────────────────────────


async def test_small_groups_need_no_writer(service: Service):
    """A service with little to do runs no second process."""
    for _ in range(20):
        await service.post(b"[1]")
    assert writers() == []


async def test_large_groups_start_a_writer(service: Service):
    """Large groups start one process, and what it lands is as it was sent."""
    process = await with_writer(service)
    bodies = [b"[%d, %s]" % (number, LARGE) for number in range(100)]
    answers = await asyncio.gather(*map(service.post, bodies))
    landed = service.landed()
    assert [landed[a.json["raw_id"]] for a in answers] == bodies
    assert [p.pid for p in writers()] == [process.pid]


async def test_small_payloads_in_a_large_group(service: Service):
    """Payloads that are large only together land too, in order of their answers' raw_ids."""
    await with_writer(service)
    bodies = [b"[%d, %s]" % (number, b"1" * 1000) for number in range(200)]
    answers = await asyncio.gather(*map(service.post, bodies))
    landed = service.landed()
    assert [landed[a.json["raw_id"]] for a in answers] == bodies


async def test_killed_writer(service: Service):
    """When the writer is killed, what it had in hand gets a 503, and another is started."""
    process = await with_writer(service)
    answers: dict[str, bytes] = {}
    refused: list[Answer] = []
    stop = asyncio.Event()

    async def load(worker: int) -> None:
        number = 0
        while not stop.is_set():
            body = b"[%d, %d, %s]" % (worker, number, LARGE)
            answer = await service.post(body)
            if answer.status == 202:
                answers[answer.json["raw_id"]] = body
            else:
                assert answer.json["code"] == "storage_unavailable"
                assert answer.headers["Retry-After"].isdigit()
                refused.append(answer)
            number += 1

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        workers = [group.create_task(load(worker)) for worker in range(8)]
        await until(lambda: len(answers) > 100)
        process.kill()
        [another] = await until(lambda: [p for p in writers() if p.pid != process.pid])
        await until(lambda: service.app[dropzone.RAW]._writer._process is not None)  # noqa: SLF001
        seen = len(answers)
        await until(lambda: len(answers) > seen + 50)
        stop.set()
    assert len(refused) <= len(workers)
    assert another.is_running()
    landed = service.landed()
    assert {raw_id: landed.get(raw_id) for raw_id in answers} == answers


async def test_writer_ends_with_the_service(serve: Serve):
    """The writer ends when the service does."""
    process = await with_writer(await serve())
    await serve()
    assert not process.is_running()


# ── Slow clients ──────────────────────────────────────────────────────────────────────────────────

HEAD = b"POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"


async def trickle(writer: asyncio.StreamWriter) -> None:
    """Send a byte of a body now and then."""
    with suppress(ConnectionError):
        for _ in range(100):
            writer.write(b"1")
            await writer.drain()
            await asyncio.sleep(0.05)


async def test_trickled_body(serve: Serve):
    """A body that trickles is 408 when its time is up, and nothing of it lands."""
    service = await serve(body_seconds=0.5)
    reader, writer = await asyncio.open_connection(service.host, service.port)
    writer.write(HEAD)
    task = asyncio.create_task(trickle(writer))
    async with asyncio.timeout(PATIENCE):
        answer = await reader.readuntil(b"}")
        assert (await service.post(b"[1]")).status == 202
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b'"body_too_slow"' in answer
    writer.close()
    await task
    assert list(service.landed().values()) == [b"[1]"]
    assert service.app[dropzone.ADMISSION].bytes == 0


async def test_many_slow_connections(serve: Serve):
    """Two hundred idle and two hundred trickling connections do not keep others from landing."""
    service = await serve(body_seconds=PATIENCE)
    async with AsyncExitStack() as stack:
        for number in range(400):
            _, writer = await asyncio.open_connection(service.host, service.port)
            stack.callback(writer.close)
            if number % 2:
                writer.write(HEAD)
                task = asyncio.create_task(trickle(writer))
                stack.callback(task.cancel)
        async with asyncio.timeout(PATIENCE / 2):
            answers = await asyncio.gather(*(service.post(b"[1]") for _ in range(100)))
    assert {a.status for a in answers} == {202}


# ── Admission ─────────────────────────────────────────────────────────────────────────────────────


class Slow:
    """A body of which one half is sent at once, the other when `rest` is set."""

    def __init__(self, size: int = 20_000) -> None:
        self.whole = b'"' + b"x" * (size - 2) + b'"'
        self.rest = asyncio.Event()

    async def __call__(self) -> AsyncIterator[bytes]:
        half = len(self.whole) // 2
        yield self.whole[:half]
        await self.rest.wait()
        yield self.whole[half:]


async def test_too_much_in_flight(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    """A body that is too much beside those in flight is 503 overloaded until they are done."""
    monkeypatch.setattr(dropzone, "SMALL_IN_FLIGHT", 25_000)
    service = await serve()
    slow = Slow()
    first = asyncio.create_task(service.post(slow()))
    await until(lambda: service.app[dropzone.ADMISSION].bytes == 10_000)
    refused = await service.post(b"1" * 20_000)
    assert (refused.status, refused.json["code"]) == (503, "overloaded")
    assert refused.headers["Retry-After"].isdigit()
    assert (await service.post(b"[1]")).status == 202
    slow.rest.set()
    assert (await first).status == 202
    assert (await service.post(b'"%s"' % (b"1" * 20_000))).status == 202
    assert service.app[dropzone.ADMISSION].bytes == 0


async def test_one_large_body(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    """A body that comes alone is let in, be it larger than what may be in flight."""
    monkeypatch.setattr(dropzone, "SMALL_IN_FLIGHT", 10)
    service = await serve()
    assert (await service.post(b'"0123456789"')).status == 202


async def test_broken_bodies_are_out_of_flight(service: Service):
    """Whatever refuses a body or ends its connection, its bytes no longer count as in flight."""
    for body in (b"{", b"1" * (TOTAL_LIMIT + 1), b""):
        assert (await service.post(body)).status in {400, 413}
    _, writer = await asyncio.open_connection(service.host, service.port)
    writer.write(HEAD + b"1" * 50)
    await until(lambda: service.app[dropzone.ADMISSION].bytes == 50)
    writer.close()
    await until(lambda: service.app[dropzone.ADMISSION].bytes == 0)
    assert service.landed() == {}


async def test_client_that_has_gone_before_its_turn(service: Service):
    """The body of a client that goes before its request is looked at is broken, and no defect."""
    loop = asyncio.get_running_loop()
    content = aiohttp.StreamReader(BaseProtocol(loop), 2**16, loop=loop)  # of no connection
    content.feed_data(b"[1")
    request = make_mocked_request(
        "POST", "/", {"Content-Length": "9"}, app=service.app, payload=content
    )
    request.protocol.transport = None
    with pytest.raises(dropzone.DropzoneError, match="did not arrive whole") as refused:
        await dropzone.read_body(request, lambda _: None)
    assert (refused.value.code, refused.value.status) == ("body_broken", 400)


async def test_draining(service: Service):
    """A service about to stop lets nothing in, and finishes what is in flight."""
    slow = Slow()
    first = asyncio.create_task(service.post(slow()))
    await until(lambda: service.app[dropzone.ADMISSION].bytes)
    await service.app.shutdown()
    refused = await service.post(b"[1]")
    assert (refused.status, refused.json["code"]) == (503, "draining")
    assert refused.headers["Retry-After"].isdigit()
    slow.rest.set()
    answer = await first
    assert answer.status == 202
    assert service.landed() == {answer.json["raw_id"]: slow.whole}
    async with asyncio.timeout(30):
        await service.app[dropzone.ADMISSION].drain(60)  # of which there is nothing left


async def test_free_space_is_a_twentieth_at_most(tmp_path: Path):
    """However much is to be kept free, a disk that is a twentieth free takes payloads."""
    disk = shutil.disk_usage(tmp_path)
    if disk.free < disk.total / 20 + 2**20:
        pytest.fail(f"the disk under {tmp_path} is too full for this: make room")
    store = RawStore(tmp_path / "raw", min_free_bytes=2**62)
    await store.open()
    [raw_id] = await store.land(b"1")
    await store.close()
    assert (tmp_path / "raw" / f"{raw_id}.json").read_bytes() == b"1"


# ── Stopping, and several services ────────────────────────────────────────────────────────────────


async def keep_sending(urls: list[str], accepted: dict[str, bytes], stop: asyncio.Event) -> None:
    """Send payloads, small and large, alone and in batches, until told to or refused."""

    async def send(session: ClientSession, worker: int) -> None:
        number = 0
        while not stop.is_set():
            lines = [b'[%d, %d, %d, "%s"]' % (worker, number, i, b"x" * 500) for i in range(5)]
            lines = lines if number % 3 == 0 else lines[:1]
            headers = NDJSON if len(lines) > 1 else {}
            url = urls[worker % len(urls)] + "/ingest"
            async with session.post(url, data=b"\n".join(lines), headers=headers) as response:
                answer = await response.json(content_type=None)
                if response.status != 202:
                    assert answer["code"] == "draining"
                    return
            raw_ids = answer["raw_ids"] if "raw_ids" in answer else [answer["raw_id"]]
            assert not set(raw_ids) & accepted.keys()
            accepted.update(zip(raw_ids, lines, strict=True))
            number += 1

    async def send_until_refused(session: ClientSession, worker: int) -> None:
        with suppress(aiohttp.ClientError):  # it has stopped
            await send(session, worker)

    async with ClientSession() as session, asyncio.TaskGroup() as group:
        for worker in range(16):
            group.create_task(send_until_refused(session, worker))


def lost(program: Program, accepted: dict[str, bytes]) -> dict[str, bytes]:
    landed = program.payloads()
    return {n: body for n, body in accepted.items() if landed.get(UUID(n)) != body}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
async def test_stopped_under_load(program: Program, how: signal.Signals):
    """Told to stop under load, it exits 0, leaves an empty journal and all it has acknowledged."""
    server = await asyncio.to_thread(Server, program, DROPZONE_BACKEND="memory")
    accepted: dict[str, bytes] = {}
    load = asyncio.create_task(keep_sending([server.url], accepted, asyncio.Event()))
    await until(lambda: len(accepted) > 500)
    assert await asyncio.to_thread(server.stop, how) == OK, server.log
    await asyncio.wait_for(load, PATIENCE)
    assert lost(program, accepted) == {}
    left = sorted(path.suffix for path in (program.home / "data" / "journal").iterdir())
    assert not {".log", ".new", ".part"} & set(left)


async def test_stopped_with_a_slow_body(program: Program):
    """A body that is on its way when the service is told to stop is landed before it ends."""
    server = await asyncio.to_thread(Server, program, DROPZONE_BACKEND="memory")
    slow = Slow()
    async with ClientSession() as session:
        post = asyncio.create_task(session.post(server.url + "/ingest", data=slow()))
        await asyncio.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(dropzone.GRACE / 2)  # far longer than aiohttp waits
        slow.rest.set()
        async with await post as response:
            raw_id = (await response.json())["raw_id"]
    assert await asyncio.to_thread(server.exit_code) == OK
    assert program.payloads() == {UUID(raw_id): slow.whole}


async def test_two_services_on_one_folder(program: Program):
    """Two services on one folder give out no raw_id twice, and lose nothing when one is killed."""
    servers = [
        await asyncio.to_thread(Server, program, DROPZONE_BACKEND="memory") for _ in range(2)
    ]
    accepted: dict[str, bytes] = {}
    stop = asyncio.Event()
    load = asyncio.create_task(keep_sending([s.url for s in servers], accepted, stop))
    await until(lambda: len(accepted) > 500)
    os.kill(servers[0].process.pid, signal.SIGKILL)
    seen = len(accepted)
    await until(lambda: len(accepted) > seen + 200)
    stop.set()
    await asyncio.wait_for(load, PATIENCE)
    assert lost(program, accepted) == {}
    assert await asyncio.to_thread(servers[1].stop) == OK
    assert await asyncio.to_thread(servers[0].exit_code) == -signal.SIGKILL


async def test_one_key_at_two_services(program: Program):
    """Concurrent requests with one key land once, though they go to two services."""
    servers = [
        await asyncio.to_thread(Server, program, DROPZONE_BACKEND="memory") for _ in range(2)
    ]
    async with ClientSession() as session:

        async def post(url: str) -> str:
            headers = {"Idempotency-Key": "a"}
            async with session.post(url + "/ingest", data=LARGE, headers=headers) as response:
                return (await response.json())["raw_id"]

        raw_ids = await asyncio.gather(*(post(servers[i % 2].url) for i in range(40)))
    assert list(program.payloads()) == [UUID(raw_id) for raw_id in set(raw_ids)]
    assert [await asyncio.to_thread(server.stop) for server in servers] == [OK, OK]


# ── What one client takes from the others ─────────────────────────────────────────────────────────


class Waiting:
    """Bodies of which the last byte is held back."""

    def __init__(self, service: Service, size: int, count: int) -> None:
        self.last = asyncio.Event()
        self.size = size
        self.answers = [asyncio.create_task(service.post(self._body())) for _ in range(count)]

    async def _body(self) -> AsyncIterator[bytes]:
        yield b'"%s"' % (b"1" * (self.size - 3))
        await self.last.wait()
        yield b" "

    async def statuses(self) -> list[int]:
        self.last.set()
        return sorted(answer.status for answer in await asyncio.gather(*self.answers))


async def test_large_bodies_do_not_crowd_out_small_ones(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
):
    """However many large bodies are in flight, small ones land; the large ones have a limit."""
    monkeypatch.setattr(dropzone, "SMALL_BODY", 1000)
    monkeypatch.setattr(dropzone, "LARGE_IN_FLIGHT", 50_000)
    service = await serve()
    large = Waiting(service, 10_000, 9)
    admission = service.app[dropzone.ADMISSION]
    await until(lambda: admission.large.bytes == 2 * 9_999)  # of one caller, half of all
    assert admission.bytes == 2 * 9_999
    for _ in range(20):
        assert (await service.post(b"[1]")).status == 202
    assert await large.statuses() == [202] * 2 + [503] * 7
    assert admission.bytes == 0
    assert await Waiting(service, 10_000, 1).statuses() == [202]


async def test_one_caller_leaves_room_for_another():
    """No caller takes more than half, but for a single body; then all is given back."""
    budget = dropzone.Budget(100)
    budget.take("a", 30)
    budget.take("a", 20)
    with pytest.raises(dropzone.DropzoneError, match="too much is in flight"):
        budget.take("a", 1)
    budget.take("b", 50)
    for caller in "bc":
        with pytest.raises(dropzone.DropzoneError, match="too much is in flight"):
            budget.take(caller, 1)
    budget.give_back("a", 50)
    budget.give_back("b", 50)
    budget.take("c", 80)
    budget.take("c", 100, 80)
    assert budget.bytes == 180


async def test_few_wait_to_be_checked(serve: Serve, monkeypatch: pytest.MonkeyPatch):
    """Of large bodies that are hardly JSON few wait for their turn; the others are told at once."""
    monkeypatch.setattr(dropzone, "TO_BE_CHECKED", 3_000_000)
    service = await serve(max_body_bytes=2_000_000)
    odd = b"[NaN" + b',{"a":1}' * 150_000 + b"]"
    answers = await asyncio.gather(*(service.post(io.BytesIO(odd)) for _ in range(8)))
    statuses = Counter(answer.status for answer in answers)
    assert statuses[202] >= 1
    assert statuses[503] >= 1
    assert statuses.total() == 8
    assert {each.json["code"] for each in answers if each.status == 503} == {"overloaded"}
    assert (await service.post(b"[1]")).status == 202


@pytest.mark.parametrize("kind", [gzip.compress, zlib.compress])
async def test_what_a_body_becomes_is_counted(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, kind: Callable[[bytes], bytes]
):
    """A compressed body counts with what it becomes while it grows, and is refused on the way."""
    monkeypatch.setattr(dropzone, "LARGE_IN_FLIGHT", 3_000_000)
    service = await serve(max_body_bytes=8_000_000)
    large = Waiting(service, 1_000_000, 1)
    await until(lambda: service.app[dropzone.ADMISSION].large.bytes)
    grown = kind(b"1" * 7_000_000)
    refused = await service.post(grown, Content_Encoding="gzip")
    assert (refused.status, refused.json["code"]) == (503, "overloaded")
    assert await large.statuses() == [202]
    for size in (10, 65_535, 65_536, 65_537, 3_000_000):
        whole = b'"%s"' % (b"1" * (size - 2))
        answer = await service.post(kind(whole), Content_Encoding="deflate")
        assert answer.status == 202, size
        assert service.landed()[answer.json["raw_id"]] == whole
        for broken in (kind(whole)[:-1], kind(whole)[:-5] + b"12345"):
            answer = await service.post(broken, Content_Encoding="gzip")
            assert (answer.status, answer.json["code"]) == (400, "body_broken"), size
    assert service.app[dropzone.ADMISSION].bytes == 0
