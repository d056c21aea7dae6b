"""The description at /openapi.json is true: of the routes, of what they take, of what they say."""

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from jsonschema import Draft202012Validator, FormatChecker
from openapi_spec_validator import OpenAPIV31SpecValidator

from backends import BackendUnavailable, Measurement
from backends.memory import MemoryBackend
from dropzone import (
    ROUTES,
    SERIES_PARAMETERS,
    AuthConfig,
    Config,
    JwtConfig,
    KeyConfig,
    LimitsConfig,
    Place,
    Problem,
    Rate,
    RawConfig,
    Secret,
    SeriesAt,
    ServerConfig,
    TransformConfig,
    create_app,
)

READING = {"time_stamp": "2019-05-01T10:00:00Z", "data": [0, 2]}
LATER = READING | {"time_stamp": "2019-05-02T10:00:00.5Z"}
KEY = {"x-api-key": "sesam"}
TOKEN = {"Authorization": "Bearer eyJhbGciOiJFUzI1NiIsImtpZCI6IngifQ.e30.eA"}  # with a kid
NOT_DESCRIBED = {("GET", "/docs/{asset}")}  # the files of the page
FORMATS = FormatChecker()
Client = TestClient[web.Request, web.Application]
Answers = list[tuple[str, str, int, str, bytes]]  # method, path, status, media type, body


@FORMATS.checks("uuid", raises=ValueError)
def is_uuid(text: object) -> bool:
    """Check the canonical form."""
    return not isinstance(text, str) or str(UUID(text)) == text


@FORMATS.checks("date-time", raises=ValueError)
def is_moment(text: object) -> bool:
    """Check RFC 3339, with an offset."""
    if not isinstance(text, str):
        return True
    return "T" in text and datetime.fromisoformat(text).utcoffset() is not None


class Outage(MemoryBackend):
    """A backend that goes down when it is told to."""

    down = False

    async def upsert(self, measurements: Any) -> None:
        """Write, or be down."""
        self._fail()
        await super().upsert(measurements)

    async def get(self, timestamp_utc: datetime) -> Measurement:
        """Read, or be down."""
        self._fail()
        return await super().get(timestamp_utc)

    async def find(self, **options: Any) -> list[Measurement]:
        """Read, or be down."""
        self._fail()
        return await super().find(**options)

    def _fail(self) -> None:
        if self.down:
            raise BackendUnavailable("the database does not answer")


def key_with(scope: Any) -> KeyConfig:
    """Return a key that opens what its name says."""
    digest = hashlib.sha256(scope.encode()).hexdigest()
    return KeyConfig(scope, Secret(f"sha256:{digest}"), (scope,))


def config_in(folder: Path, key: str = "") -> Config:
    """Return a configuration with limits that a test can pass.

    With a key there are also keys with a scope each, and an issuer whose keys are not to be had.
    """
    auth = AuthConfig()
    if key:
        issuer = JwtConfig("https://issuer.example", "dropzone", Place(folder / "nowhere"))
        auth = AuthConfig(Secret(key), (key_with("read"), key_with("ingest")), issuer)
    return Config(
        server=ServerConfig(max_body_bytes=20_000, body_seconds=1),
        raw=RawConfig(dir=folder / "raw"),
        auth=auth,
    )


@pytest.fixture
def backend() -> Outage:
    """Return a backend that is up."""
    return Outage()


@pytest.fixture
async def client(aiohttp_client: Any, tmp_path: Path, backend: Outage) -> Client:
    """Serve with a key, and with a limit that only a test reaches that wants to."""
    limits = LimitsConfig(per_address=Rate("500/week"))
    config = msgspec.structs.replace(config_in(tmp_path, "sesam"), limits=limits)
    return await aiohttp_client(create_app(config, backend=backend))


@pytest.fixture
async def many(aiohttp_client: Any, tmp_path: Path) -> Client:
    """Serve three series with a row each, two of them at one moment."""
    rules = TransformConfig(series=SeriesAt("device"))
    config = msgspec.structs.replace(config_in(tmp_path / "many", "sesam"), transform=rules)
    found = await aiohttp_client(create_app(config, backend=MemoryBackend(series=True)))
    for device, reading in (("a", READING), ("b", READING), ("c", LATER)):
        await found.post("/ingest", json=reading | {"device": device}, headers=KEY)
    await found.post("/process", headers=KEY)
    return found


@pytest.fixture
async def document(client: Client) -> dict[str, Any]:
    """Return the description as the service gives it."""
    answer = await client.get("/openapi.json")
    return await answer.json()


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Return the operation of each method and path."""
    return {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def checker(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """Return what validates a value against a schema of the document."""
    whole = {"components": document["components"], **schema}
    return Draft202012Validator(whole, format_checker=FORMATS)


async def test_valid(document: dict[str, Any]) -> None:
    """The document is valid OpenAPI 3.1, and so is every schema in it."""
    assert document["openapi"].startswith("3.1")
    assert [str(error) for error in OpenAPIV31SpecValidator(document).iter_errors()] == []
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


async def test_every_route(client: Client, document: dict[str, Any]) -> None:
    """Every registered route is described, and every described one is registered."""
    app: web.Application = client.app
    registered = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource and route.method != "HEAD"
    }
    assert registered - NOT_DESCRIBED == operations(document).keys()


async def test_operations(document: dict[str, Any]) -> None:
    """Every operation has an id of its own, says what it does, and names its path parameters."""
    found = operations(document)
    assert len({operation["operationId"] for operation in found.values()}) == len(found)
    for (_, path), operation in found.items():
        assert operation["summary"]
        named = [p["name"] for p in operation["parameters"] if p["in"] == "path"]
        assert named == re.findall(r"{(\w+)}", path)


async def test_query_parameters(document: dict[str, Any], many: Client) -> None:
    """The query parameters are the fields of the query types, each with its description.

    Those that name a series are described where there are series, and refused elsewhere.
    """
    of_many = await (await many.get("/openapi.json")).json()
    for shown, left_out in ((document, SERIES_PARAMETERS), (of_many, set[str]())):
        found = operations(shown)
        for route in ROUTES:
            if (route.method, route.path) in found:
                parameters = found[route.method, route.path]["parameters"]
                described = [p for p in parameters if p["in"] == "query"]
                fields = msgspec.structs.fields(route.query) if route.query else ()
                names = [f.encode_name for f in fields if f.encode_name not in left_out]
                assert [p["name"] for p in described] == names
                assert not any(p.get("required") for p in described)
    assert any(route.query for route in ROUTES)


async def test_of_many_series(many: Client) -> None:
    """The description where there are series is valid, too."""
    of_many = await (await many.get("/openapi.json")).json()
    assert [str(error) for error in OpenAPIV31SpecValidator(of_many).iter_errors()] == []


async def test_defaults_are_what_happens(many: Client, document: dict[str, Any]) -> None:
    """A request with every documented default written out gets what one without them gets."""
    for (method, path), operation in operations(document).items():
        if method == "GET" and "{" not in path:
            schemas = {p["name"]: p["schema"] for p in operation["parameters"]}
            defaults = {name: s["default"] for name, s in schemas.items() if s.get("default")}
            if defaults:
                plain = await many.get(path, headers=KEY)
                spelled = await many.get(path, headers=KEY, params=defaults)
                assert await plain.read() == await spelled.read()


async def test_no_null_in_a_query(document: dict[str, Any]) -> None:
    """No query parameter is described as nullable: a query has no null, one leaves it away."""
    for operation in operations(document).values():
        for parameter in operation["parameters"]:
            assert '"null"' not in json.dumps(parameter["schema"]), parameter["name"]


async def test_security(client: Client, document: dict[str, Any]) -> None:
    """What is described as guarded is 401 without a key, and nothing else is."""
    for (method, path), operation in operations(document).items():
        concrete = path.replace("{raw_id}", str(UUID(int=0))).replace("{timestamp}", "x")
        answer = await client.request(method, concrete)
        assert (
            (answer.status == 401) == ("security" in operation) == ("401" in operation["responses"])
        )
    schemes = document["components"]["securitySchemes"]
    assert schemes["api_key"] == {"type": "apiKey", "in": "header", "name": "x-api-key"}


async def test_retry_after_is_sent_with_503(
    client: Client, document: dict[str, Any], backend: Outage
) -> None:
    """Where a 503 is described, an outage gives it, and it says when to try again."""
    await client.post("/ingest", json=READING, headers=KEY)
    backend.down = True
    for method, path in [("POST", "/process"), ("GET", "/measurements")]:
        answer = await client.request(method, path, headers=KEY)
        assert answer.status == 503
        assert "503" in operations(document)[method, path]["responses"]
        assert answer.headers["Retry-After"].isdigit()


async def endless() -> AsyncIterator[bytes]:
    """Give a body that does not end."""
    yield b"{"
    await asyncio.Event().wait()


async def other_coding(client: Client) -> tuple[int, str, bytes]:
    """Send a body with a Transfer-Encoding that no client library lets through."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    head = b"POST /ingest HTTP/1.1\r\nHost: x\r\nx-api-key: sesam\r\nConnection: close\r\n"
    writer.write(head + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n")
    answer, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    media = re.search(r"Content-Type: (\S+)", answer.decode())
    assert media is not None
    return int(answer.split()[1]), media[1], body


async def ask_again(found: Answers, ask: Any, **options: Any) -> None:
    """Go to each place again, as before."""
    for method, path in dict.fromkeys((method, path) for method, path, *_ in found):
        await ask(method, path, raw_id="x", timestamp="x", **options)


async def use_up(client: Client) -> None:
    """Make more requests than are let in."""
    while (await client.get("/rejected")).status != 429:
        pass


async def discard_all(ask: Any, one: str, other: str, backend: Outage) -> None:
    """Discard a payload, and another one while the backend is away."""
    for tail in ("?limit=1", f"?raw_id={one}"):
        await ask("POST", "/rejected/discard", tail)
    await ask("GET", "/raw/{raw_id}", raw_id=one)
    backend.down = True
    await ask("POST", "/rejected/discard", f"?raw_id={other}")


async def all_answers(client: Client, backend: Outage, folder: Path) -> Answers:
    """Make the service give every kind of answer that it has."""
    found: Answers = []

    async def ask(
        method: str, template: str, tail: str = "", key: Any = KEY, **options: Any
    ) -> Any:
        names = {"raw_id": options.pop("raw_id", ""), "timestamp": options.pop("timestamp", "")}
        path = re.sub(r"{(\w+)}", lambda match: names[match[1]], template)
        headers = {**key, **options.pop("headers", {})}
        answer = await client.request(method, path + tail, headers=headers, **options)
        body = await answer.read()
        found.append((method, template, answer.status, answer.content_type, body))
        return json.loads(body) if "json" in answer.content_type else body

    async def read_all(ids: list[str]) -> None:
        for raw_id in [*ids, str(UUID(int=1)), "x"]:
            await ask("GET", "/raw/{raw_id}", raw_id=raw_id)
            await ask("GET", "/raw/{raw_id}/payload", raw_id=raw_id)
        for moment in ("2019-05-01T10:00:00Z", "2019-05-01T10:00:01Z", "noon"):
            await ask("GET", "/measurements/{timestamp}", timestamp=moment)
        for path in ("/measurements", "/measurements/summary", "/rejected", "/series"):
            for tail in ("", "?limit=1", "?limit=0", "?after=x", "?unknown=1"):
                await ask("GET", path, tail)
        await ask("GET", "/measurements", "?format=csv&order=desc")
        for path in ("/", "/health", "/ready", "/status", "/metrics", "/openapi.json", "/docs"):
            await ask("GET", path)

    bodies = [READING, READING, LATER, [], {"a": 1}, READING | {"data": []}]
    ids = [(await ask("POST", "/ingest", json=body))["raw_id"] for body in bodies]
    await ask("POST", "/ingest", data=b"{")
    await ask("POST", "/ingest", data=b"1" * 20_001)
    await ask("POST", "/ingest", data=b"1", headers={"Content-Encoding": "x-unknown"})
    found.append(("POST", "/ingest", *await other_coding(client)))
    await ask("POST", "/ingest", data=b"1", headers={"x-api-key": "wrong"})
    await ask("POST", "/ingest", data=b"1\nx", headers={"Content-Type": "application/x-ndjson"})
    await ask("POST", "/ingest", json=[{}, {}])
    for body in (b"1", b"2"):
        await ask("POST", "/ingest", data=body, headers={"Idempotency-Key": "one"})
    await ask("POST", "/ingest", data=endless())
    await read_all(ids)
    await ask("POST", "/process", "?limit=0")
    await ask("POST", "/process", "?limit=1")
    await ask("POST", "/process")
    await ask("POST", "/process")
    await read_all(ids)
    await ask("POST", "/rejected/retry", "?limit=1")
    await ask("POST", "/rejected/retry", f"?raw_id={ids[3]}")
    await discard_all(ask, ids[4], ids[5], backend)
    await ask("POST", "/ingest", json=READING)
    await ask("POST", "/process")
    await read_all(ids)
    (folder / "raw").rename(folder / "away")
    await ask("GET", "/ready")
    await ask("GET", "/metrics")
    await ask("GET", "/status")
    await ask("POST", "/ingest", json=READING)
    await ask("POST", "/rejected/retry")
    callers = ({}, {"x-api-key": "read"}, {"x-api-key": "ingest"}, TOKEN)
    for key in callers:
        await ask_again(found, ask, key=key)
    await use_up(client)
    await ask_again(found, ask)
    return found


READS_OF_MANY = (  # a path of the description, and what is asked
    ("/series", "/series"),
    ("/series", "/series?limit=1"),
    ("/series", "/series?after=%00"),
    ("/measurements", "/measurements?limit=1"),
    ("/measurements", "/measurements?series=b&format=csv"),
    ("/measurements", "/measurements?after_series=b"),
    ("/measurements/summary", "/measurements/summary?series=b"),
    ("/measurements/{timestamp}", "/measurements/2019-05-01T10:00:00Z"),
    ("/measurements/{timestamp}", "/measurements/2019-05-01T10:00:00Z?series=b"),
    ("/measurements/{timestamp}", "/measurements/2019-05-01T10:00:00Z?series=d"),
    ("/status", "/status"),
)


async def answers_of_many(many: Client) -> Answers:
    """Ask where there are series."""
    found: Answers = []
    for template, path in READS_OF_MANY:
        answer = await many.get(path, headers=KEY)
        body = await answer.read()
        found.append(("GET", template, answer.status, answer.content_type, body))
    return found


async def test_every_answer(
    client: Client, many: Client, document: dict[str, Any], backend: Outage, tmp_path: Path
) -> None:
    """Every answer that the service gives has a documented status, media type and shape."""
    found = await answers_of_many(many) + await all_answers(client, backend, tmp_path)
    for method, path, status, media, body in found:
        responses = operations(document)[method, path]["responses"]
        assert str(status) in responses, (method, path, status, body)
        content = responses[str(status)]["content"]
        assert media in content, (method, path, status, media)
        if "json" in media:
            errors = checker(document, content[media]["schema"]).iter_errors(json.loads(body))
            assert [e.message for e in errors] == [], (method, path, status, body)
    given = {(method, path, str(status)) for method, path, status, _, _ in found}
    described = {
        (*place, status)
        for place, operation in operations(document).items()
        for status in operation["responses"]
    }
    assert described - given == set(), "described, and never given in this walk"


async def test_answers_have_no_other_members(
    client: Client, many: Client, document: dict[str, Any], backend: Outage, tmp_path: Path
) -> None:
    """What answers hold is described: no member of theirs is missing from the schemas."""
    closed = json.loads(json.dumps(document))
    for name, schema in closed["components"]["schemas"].items():
        if schema.get("type") == "object" and name != Problem.__name__:
            schema.setdefault("additionalProperties", False)
    found = await answers_of_many(many) + await all_answers(client, backend, tmp_path)
    for method, path, status, media, body in found:
        schema = operations(closed)[method, path]["responses"][str(status)]["content"][media]
        if "json" in media:
            errors = checker(closed, schema["schema"]).iter_errors(json.loads(body))
            assert [e.message for e in errors] == [], (method, path, status)


async def test_answers_lack_no_member(document: dict[str, Any]) -> None:
    """What an answer always holds is described as required, so that clients can count on it."""
    for name, schema in document["components"]["schemas"].items():
        rare = {
            "AcceptedBatch": {"not_json"},
            "Measurement": {"series"},
            "RejectedPayload": {"series", "superseded_by"},
        }.get(name, set())
        assert set(schema.get("required", ())) == schema["properties"].keys() - rare, name


async def test_groups(document: dict[str, Any]) -> None:
    """Every route stands in one group, the way of a payload first, for whoever reads them all."""
    groups = [tag["name"] for tag in document["tags"]]
    assert groups[:2] == ["Landing", "Processing"]
    found = {
        path: operation["tags"]
        for path, operations in document["paths"].items()
        for operation in operations.values()
    }
    assert found["/ingest"] == ["Landing"]
    assert found["/rejected/retry"] == ["Quarantine"]
    assert found["/health"] == ["Service"]
    assert {name for [name] in found.values()} == {*groups}
