"""Dropzone inside another aiohttp application: its own rules hold, and the other's do too."""

import asyncio
import gzip
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from backends.memory import MemoryBackend
from dropzone import (
    AuthConfig,
    Config,
    RawConfig,
    Secret,
    ServerConfig,
    SqliteConfig,
    StorageConfig,
    create_app,
)

PROBLEM = "application/problem+json"
READING = {"time_stamp": "2019-05-01T10:00:00Z", "data": [0, 2]}
OUTER_SIZES = pytest.mark.parametrize("outer_size", [10, 10**9])


def config_in(folder: Path, *, limit: int = 100_000, key: str = "") -> Config:
    """Return a configuration that keeps everything in one folder."""
    return Config(
        server=ServerConfig(max_body_bytes=limit),
        raw=RawConfig(dir=folder / "raw"),
        storage=StorageConfig(sqlite=SqliteConfig(path=folder / "rows.sqlite")),
        auth=AuthConfig(api_key=Secret(key)),
    )


class Watched(MemoryBackend):
    """A backend that remembers what its owner did with it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    async def open(self) -> None:
        self.calls.append("open")

    async def close(self) -> None:
        self.calls.append("close")


def outer_app(*inner: tuple[str, web.Application], **options: Any) -> web.Application:
    """Return an application with a life of its own and others mounted in it."""
    outer = web.Application(**options)

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="outer")

    outer.router.add_get("/", page)
    for prefix, app in inner:
        outer.add_subapp(prefix, app)
    return outer


async def started(app: web.Application) -> TestServer:
    server = TestServer(app)
    await server.start_server()
    return server


async def test_links_carry_the_prefix(aiohttp_client: Any, tmp_path: Path) -> None:
    """Location, Link and the OpenAPI servers carry the prefix, and lead where they say."""
    app = create_app(config_in(tmp_path), backend=MemoryBackend())
    client = await aiohttp_client(outer_app(("/dropzone/", app)))
    for day in (1, 2):
        reading = READING | {"time_stamp": f"2019-05-0{day}T10:00:00Z"}
        landed = await client.post("/dropzone/ingest", json=reading)
        assert landed.status == 202
        assert landed.headers["Location"] == f"/dropzone/raw/{(await landed.json())['raw_id']}"
        assert (await client.get(landed.headers["Location"])).status == 200
    assert (await client.post("/dropzone/process")).status == 200
    first = await client.get("/dropzone/measurements?limit=1")
    [link] = re.findall(r'<(/dropzone/measurements\?[^>]+)>; rel="next"', first.headers["Link"])
    second = await (await client.get(link)).json()
    assert [row["timestamp_utc"] for row in second["measurements"]] == [
        "2019-05-02T10:00:00.000000Z"
    ]
    document = await (await client.get("/dropzone/openapi.json")).json()
    assert document["servers"] == [{"url": "/dropzone"}]
    assert "/ingest" in document["paths"]


async def test_prefix_in_a_prefix(aiohttp_client: Any, tmp_path: Path) -> None:
    """Mounted two deep, links carry both prefixes."""
    app = create_app(config_in(tmp_path), backend=MemoryBackend())
    client = await aiohttp_client(outer_app(("/a/", outer_app(("/b", app)))))
    landed = await client.post("/a/b/ingest", json=READING)
    assert landed.headers["Location"].startswith("/a/b/raw/")
    assert (await client.get(landed.headers["Location"])).status == 200
    document = await (await client.get("/a/b/openapi.json")).json()
    assert document["servers"] == [{"url": "/a/b"}]


async def test_docs_page(aiohttp_client: Any, tmp_path: Path) -> None:
    """All that the page loads lies under the prefix, seen from the page's own address."""
    app = create_app(config_in(tmp_path), backend=MemoryBackend())
    client = await aiohttp_client(outer_app(("/dropzone/", app)))
    page = await client.get("/dropzone/docs")
    html = await page.text()
    loaded = re.findall(r'(?:src|href|url)(?:=|: )"([^"]+)"', html)
    addresses = [page.url.join(type(page.url)(a)) for a in loaded if not a.startswith("data:")]
    assert len(addresses) == 3
    for address in addresses:
        assert address.path.startswith("/dropzone/")
        assert (await client.get(address.path)).status == 200


@OUTER_SIZES
async def test_own_limit(aiohttp_client: Any, tmp_path: Path, outer_size: int) -> None:
    """Our limit holds, whatever `client_max_size` the outer application has."""
    app = create_app(config_in(tmp_path), backend=MemoryBackend())
    client = await aiohttp_client(outer_app(("/dropzone/", app), client_max_size=outer_size))

    async def land(body: bytes, **headers: str) -> int:
        answer = await client.post("/dropzone/ingest", data=body, headers=headers)
        return answer.status

    fits, too_much = json.dumps("x" * 99_998).encode(), json.dumps("x" * 99_999).encode()
    assert await land(fits) == 202
    assert await land(too_much) == 413
    assert await land(gzip.compress(fits), **{"Content-Encoding": "gzip"}) == 202
    assert await land(gzip.compress(too_much), **{"Content-Encoding": "gzip"}) == 413
    assert len(list((tmp_path / "raw").iterdir())) == 2


async def test_errors_under_the_prefix(aiohttp_client: Any, tmp_path: Path) -> None:
    """404, 405, 400 and 401 under the prefix are ours; outside it they are the outer's own."""
    app = create_app(config_in(tmp_path, key="sesam"), backend=MemoryBackend())
    client = await aiohttp_client(outer_app(("/dropzone/", app)))
    key = {"x-api-key": "sesam"}
    for method, path, status in [
        ("GET", "/dropzone/nope", 404),
        ("DELETE", "/dropzone/", 405),
        ("GET", "/dropzone/ingest", 405),
        ("DELETE", "/dropzone/measurements", 405),
        ("GET", "/dropzone/measurements?limit=0", 400),
        ("GET", "/dropzone/raw/x", 404),
    ]:
        answer = await client.request(method, path, headers=key | {"X-Request-ID": "r1"})
        assert (answer.status, answer.content_type) == (status, PROBLEM), path
        assert (await answer.json())["request_id"] == answer.headers["X-Request-ID"] == "r1"
        assert ("Allow" in answer.headers) == (status == 405)
    refused = await client.post("/dropzone/process")
    assert (refused.status, refused.content_type) == (401, PROBLEM)
    for method, path, status in [("GET", "/nope", 404), ("POST", "/", 405)]:
        answer = await client.request(method, path)
        assert (answer.status, answer.content_type) == (status, "text/plain")
        assert "X-Request-ID" not in answer.headers
    assert await (await client.get("/")).text() == "outer"


async def test_outer_middlewares(aiohttp_client: Any, tmp_path: Path) -> None:
    """The outer's middlewares see our requests and answers, errors too, and may add to them."""
    seen: list[tuple[str, int]] = []

    @web.middleware
    async def outer_middleware(request: web.Request, handler: Any) -> web.StreamResponse:
        response = await handler(request)
        seen.append((request.path, response.status))
        response.headers["X-Outer"] = "1"
        return response

    app = create_app(config_in(tmp_path), backend=MemoryBackend())
    outer = outer_app(("/dropzone/", app), middlewares=[outer_middleware])
    client = await aiohttp_client(outer)
    for path in ("/dropzone/health", "/dropzone/raw/x", "/dropzone/nope"):
        assert (await client.get(path)).headers["X-Outer"] == "1"
    assert seen == [("/dropzone/health", 200), ("/dropzone/raw/x", 404), ("/dropzone/nope", 404)]


async def test_outer_lifecycle(tmp_path: Path) -> None:
    """We open after the outer's set-up began and close before its clean-up ended; both run once."""
    events: list[str] = []

    async def outer_life(_: web.Application) -> AsyncIterator[None]:
        events.append("outer up")
        yield
        events.append("outer down")

    backend = Watched()
    backend.calls = events
    outer = outer_app(("/dropzone/", create_app(config_in(tmp_path), backend=backend)))
    outer.cleanup_ctx.append(outer_life)
    assert events == []
    runner = web.AppRunner(outer)
    await runner.setup()
    assert sorted(events) == ["open", "outer up"]
    await runner.cleanup()
    assert sorted(events[2:]) == ["close", "outer down"]


async def test_backend_handed_in(aiohttp_client: Any, tmp_path: Path) -> None:
    """A backend that is handed in is the one that gets the rows; the configured one is not made."""
    backend = Watched()
    app = create_app(config_in(tmp_path), backend=backend)
    client = await aiohttp_client(outer_app(("/dropzone/", app)))
    landed = await (await client.post("/dropzone/ingest", json=READING)).json()
    await client.post("/dropzone/process")
    assert await backend.count() == 1
    [row] = await backend.find()
    assert row.raw_id == UUID(landed["raw_id"])
    assert not (tmp_path / "rows.sqlite").exists()


async def test_backend_that_is_empty_counts_as_given(tmp_path: Path) -> None:
    """A backend whose truth value is false is used all the same."""

    class Sized(MemoryBackend):
        def __len__(self) -> int:
            return len(self._rows)

    backend = Sized()
    runner = web.AppRunner(create_app(config_in(tmp_path), backend=backend))
    await runner.setup()
    await runner.cleanup()
    assert not (tmp_path / "rows.sqlite").exists()


async def test_side_by_side(aiohttp_client: Any, tmp_path: Path) -> None:
    """Two instances in one application have their own payloads, rows, keys and links."""
    apps = {name: create_app(config_in(tmp_path / name, key=name)) for name in ("north", "south")}
    client: TestClient[Any, Any] = await aiohttp_client(
        outer_app(*((f"/{name}/", app) for name, app in apps.items()))
    )
    locations = {}
    for number, name in enumerate(apps):
        key = {"x-api-key": name}
        reading = READING | {"data": [number]}
        landed = await client.post(f"/{name}/ingest", json=reading, headers=key)
        locations[name] = landed.headers["Location"]
        assert locations[name].startswith(f"/{name}/raw/")
    for number, name in enumerate(apps):
        key = {"x-api-key": name}
        done = await (await client.post(f"/{name}/process", headers=key)).json()
        assert (done["processed"], done["remaining"]) == (1, 0)
        page = await (await client.get(f"/{name}/measurements", headers=key)).json()
        assert [row["mean"] for row in page["measurements"]] == [number]
        assert (await client.get(locations[name], headers=key)).status == 200
        assert (tmp_path / name / "rows.sqlite").exists()
    stranger = locations["north"].replace("north", "south")
    assert (await client.get(stranger, headers={"x-api-key": "south"})).status == 404
    assert (await client.get(stranger, headers={"x-api-key": "north"})).status == 401


async def test_cleanup_finishes_landing(tmp_path: Path) -> None:
    """Requests in flight when the outer stops are answered, and what was answered 202 is there."""
    app = create_app(config_in(tmp_path), backend=MemoryBackend())
    client = TestClient(await started(outer_app(("/dropzone/", app))))
    posts = [client.post("/dropzone/ingest", json=n) for n in range(20)]
    answers = [asyncio.ensure_future(post) for post in posts]
    await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
    landed = [answer for answer in await asyncio.gather(*answers) if answer.status == 202]
    ids = [(await answer.json())["raw_id"] for answer in landed]
    await client.close()
    names = {path.stem for path in (tmp_path / "raw").iterdir()}
    assert len(ids) == 20
    assert set(ids) <= names


UNTOUCHED = """
import sys
from filelock import AsyncFileLock  # tries out the temporary folder when imported
touched = []
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.chmod", "os.link",
           "sqlite3.connect", "socket.connect", "socket.bind", "subprocess.Popen", "signal.signal"}
def watch(event, args):
    if event in CHANGES or event == "open" and (args[2] or 0) & 0o1103:  # write, create, truncate
        touched.append((event, args))
sys.addaudithook(watch)
from pathlib import Path
import dropzone
after_import = list(touched)
folder = Path(sys.argv[1])
config = dropzone.Config(
    raw=dropzone.RawConfig(dir=folder / "raw"),
    storage=dropzone.StorageConfig(
        backend=sys.argv[2],
        sqlite=dropzone.SqliteConfig(path=folder / "rows.sqlite"),
        postgres=dropzone.PostgresConfig(url=dropzone.Secret("postgresql://u@127.0.0.1:9/d")),
    ),
)
dropzone.create_app(config)
import logging
print(after_import, touched, logging.getLogger().handlers)
"""


@pytest.mark.parametrize("backend", ["sqlite", "postgres", "memory"])
def test_no_effect_before_start(tmp_path: Path, backend: str) -> None:
    """Importing and `create_app` write nothing, connect to nothing and set up no logging."""
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-B", "-c", UNTOUCHED, str(tmp_path / "data"), backend],
        env={"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.stdout, run.stderr, run.returncode) == ("[] [] []\n", "", 0)
    assert list(tmp_path.iterdir()) == []


async def test_start_makes_the_folders(tmp_path: Path) -> None:
    """Starting makes the folders that are missing, and a second start finds them."""
    config = config_in(tmp_path / "a" / "b")
    for _ in range(2):
        runner = web.AppRunner(create_app(config))
        await runner.setup()
        assert config.raw.dir.is_dir()
        await runner.cleanup()
