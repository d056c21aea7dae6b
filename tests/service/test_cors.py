"""Pages of other origins: those in `[server] cors_origins` may read, and nobody may do more."""

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import machine
import pytest
from aiohttp import ClientSession, web
from playwright.async_api import async_playwright

from backends.memory import MemoryBackend
from dropzone import (
    AuthConfig,
    Config,
    ConfigError,
    RawConfig,
    Secret,
    ServerConfig,
    create_app,
    load_config,
)

KEY = "a key that may do all"
PAGE = "https://grafana.example"
ASK = {"Access-Control-Request-Method": "GET", "Access-Control-Request-Headers": "x-api-key"}


def app_for(folder: Path, *origins: str) -> web.Application:
    config = Config(
        server=ServerConfig(cors_origins=origins),
        raw=RawConfig(dir=folder / "raw"),
        auth=AuthConfig(api_key=Secret(KEY)),
    )
    return create_app(config, backend=MemoryBackend())


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[str]:
    """Serve an application, and say where."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        [(host, port)] = runner.addresses
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


@pytest.fixture
async def session() -> AsyncIterator[ClientSession]:
    async with ClientSession() as session:
        yield session


def grants(headers: Mapping[str, str]) -> dict[str, str]:
    return {name: headers[name] for name in headers if name.startswith("Access-Control")}


@pytest.mark.parametrize("prefix", ["", "/zone"])
@pytest.mark.parametrize(
    ("origins", "granted"), [((PAGE, "http://b.example"), PAGE), (("*",), "*")]
)
async def test_reading(
    origins: tuple[str, ...], granted: str, prefix: str, tmp_path: Path, session: ClientSession
) -> None:
    """A page of a configured origin may read answers and refusals alike, with the key it has."""
    app = app_for(tmp_path, *origins)
    outer = web.Application()
    if prefix:
        outer.add_subapp(prefix, app)
    own = {"Origin": PAGE, "x-api-key": KEY}
    async with served(outer if prefix else app) as url:
        table = url + prefix + "/measurements"
        asked = await session.options(table, headers=ASK | {"Origin": PAGE})
        read = await session.get(table, headers=own)
        as_csv = await session.get(f"{table}?format=csv", headers=own)
        refused = await session.get(table, headers={"Origin": PAGE})

    assert [each.status for each in (asked, read, as_csv, refused)] == [204, 200, 200, 401]
    for each in (asked, read, as_csv, refused):
        assert each.headers["Access-Control-Allow-Origin"] == granted
        assert "Origin" in each.headers["Vary"]
        assert each.headers["X-Request-ID"]
        assert "Link" in each.headers["Access-Control-Expose-Headers"]
    assert asked.headers["Access-Control-Allow-Methods"] == "GET, HEAD"
    assert "X-API-Key" in asked.headers["Access-Control-Allow-Headers"]
    assert "Access-Control-Allow-Credentials" not in read.headers


async def test_nothing_but_reading(tmp_path: Path, session: ClientSession) -> None:
    """No page of another origin is let to POST, nor one of any origin that is not configured."""
    async with served(app_for(tmp_path, PAGE)) as url:
        to_write = {"Access-Control-Request-Method": "POST", "Origin": PAGE}
        for path in ("/ingest", "/process", "/measurements"):
            asked = await session.options(url + path, headers=to_write)
            assert asked.status == 405
            assert grants(asked.headers) == {}
        asked = await session.options(f"{url}/ingest", headers=ASK | {"Origin": PAGE})
        assert (asked.status, grants(asked.headers)) == (405, {})
        landed = await session.post(
            f"{url}/ingest", data=b"{}", headers={"Origin": PAGE, "x-api-key": KEY}
        )
        assert grants(landed.headers) == {}

        for other in ("https://evil.example", f"{PAGE}.evil.example", "null", PAGE.upper()):
            asked = await session.options(f"{url}/status", headers=ASK | {"Origin": other})
            read = await session.get(f"{url}/status", headers={"Origin": other, "x-api-key": KEY})
            assert (asked.status, read.status) == (405, 200)
            assert grants(asked.headers) == grants(read.headers) == {}
            assert read.headers["Vary"] == "Origin"  # or a cache would hand one's answer to another


async def test_off_by_default(tmp_path: Path, session: ClientSession) -> None:
    """Unless a page is configured, answers are as they would be without CORS."""
    async with served(app_for(tmp_path)) as url:
        asked = await session.options(f"{url}/status", headers=ASK | {"Origin": PAGE})
        read = await session.get(f"{url}/status", headers={"Origin": PAGE, "x-api-key": KEY})
        assert (asked.status, grants(asked.headers)) == (405, {})
        assert (read.status, grants(read.headers), read.headers.get("Vary")) == (200, {}, None)


@pytest.mark.parametrize(
    "origin", ["grafana.example", "https://grafana.example/", "https://a b", "ftp://a", "**", ""]
)
def test_what_is_no_origin(origin: str, tmp_path: Path) -> None:
    """An origin is a scheme and a host, or an asterisk; any other is refused at the start."""
    file = tmp_path / "config.toml"
    file.write_text(f'[server]\ncors_origins = ["{origin}"]')
    with pytest.raises(ConfigError, match="cors_origins"):
        load_config(file, environ={})


SCRIPT = """
    async ([table, ingest, key]) => {
        const headers = {"x-api-key": key};
        const read = await fetch(table, {headers});
        const refused = await fetch(table);
        const post = {method: "POST", body: "{}", headers};
        const written = await fetch(ingest, post).catch(() => null);
        return [read.status, (await read.json()).measurements, refused.status, written === null];
    }
"""


async def empty_page(_: web.Request) -> web.Response:
    return web.Response(text="<!doctype html>", content_type="text/html")


async def test_in_a_browser(tmp_path: Path) -> None:
    """A page on another port reads rows and refusals by fetch, and may not POST."""
    page = web.Application()
    page.router.add_get("/", empty_page)
    root = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium has no sandbox for root
    async with AsyncExitStack() as stack:
        origin = await stack.enter_async_context(served(page))
        url = await stack.enter_async_context(served(app_for(tmp_path, origin)))
        playwright = await stack.enter_async_context(async_playwright())
        browser = await playwright.chromium.launch(executable_path=machine.browser(), args=root)
        stack.push_async_callback(browser.close)
        tab = await browser.new_page()
        await tab.goto(origin)
        seen = await tab.evaluate(SCRIPT, [f"{url}/measurements", f"{url}/ingest", KEY])
    assert seen == [200, [], 401, True]
