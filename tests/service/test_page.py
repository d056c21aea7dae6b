"""The page at / in a real browser, and the routes that it lives on.

Screenshots go to the folder that PAGE_SCREENSHOTS names, or else to pytest's temporary one.
"""

import asyncio
import gzip
import hashlib
import json
import math
import os
import re
import sys
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import machine
import msgspec
import pytest
import pytest_asyncio
from aiohttp import ClientSession, web
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Browser, Page, async_playwright, expect
from stores import lines, payloads_below

from backends import Measurement
from backends.raw import next_raw_id, uuid_at
from backends.raw.landing import RawStore
from backends.raw.tally import MINUTES, NUMBERS, SLOT
from backends.sqlite import SqliteBackend
from dropzone import (
    AuthConfig,
    Config,
    KeyConfig,
    RawConfig,
    Secret,
    SeriesAt,
    SqliteConfig,
    StorageConfig,
    TransformConfig,
    create_app,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOW = datetime.now(UTC)
KEY = "correct horse"
expect.set_options(timeout=20_000)


class Service:
    """A Dropzone on a port of its own, which can be stopped and started again."""

    def __init__(self, folder: Path, key: str = "", prefix: str = "", series: str = "") -> None:
        storage = StorageConfig(sqlite=SqliteConfig(folder / "rows.sqlite"))
        raw = RawConfig(dir=folder / "raw")
        rules = TransformConfig(series=SeriesAt(series))
        self.config = Config(
            raw=raw, storage=storage, auth=AuthConfig(Secret(key)), transform=rules
        )
        self.folder, self.key, self.prefix, self.port = folder, key, prefix, 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}/"

    async def start(self) -> None:
        app = create_app(self.config)
        if self.prefix:
            outer = web.Application()
            outer.add_subapp(self.prefix + "/", app)
            app = outer
        self.runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", self.port)
        await site.start()
        self.port = self.runner.addresses[0][1]

    async def stop(self) -> None:
        await self.runner.cleanup()

    async def __call__(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        headers |= {"x-api-key": self.key} if self.key else {}
        async with (
            ClientSession() as session,
            session.request(method, self.url + path, data=data, headers=headers) as response,
        ):
            assert response.status < 300, await response.text()
            return await response.json()

    async def land(self, *payloads: object) -> list[str]:
        body = b"\n".join(json.dumps(payload).encode() for payload in payloads)
        landed = await self("POST", "ingest", body, **{"Content-Type": "application/x-ndjson"})
        return landed["raw_ids"]


def payload(seconds_ago: float, *data: object) -> dict[str, object]:
    return {"time_stamp": (NOW - timedelta(seconds=seconds_ago)).isoformat(), "data": data}


BAD = [{"time_stamp": NOW.isoformat(), "data": [1, "x"]}] * 3 + [{"data": [1]}] * 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest_asyncio.fixture(loop_scope="module")
async def service(folder: Path) -> AsyncIterator[Service]:
    service = Service(folder)
    await service.start()
    yield service
    await service.stop()


@pytest_asyncio.fixture(loop_scope="module")
async def metered(folder: Path) -> AsyncIterator[Service]:
    """A service whose payloads name their series."""
    service = Service(folder, series="/device/id")
    await service.start()
    yield service
    await service.stop()


def of(device: str, seconds_ago: float, *data: object) -> dict[str, object]:
    return payload(seconds_ago, *data) | {"device": {"id": device}}


@pytest_asyncio.fixture(loop_scope="module")
async def guarded(tmp_path: Path) -> AsyncIterator[Service]:
    """A service that asks for a key."""
    service = Service(tmp_path, key=KEY)
    await service.start()
    yield service
    await service.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    path = machine.browser()
    root = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium has no sandbox for root
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=root)
        yield browser
        await browser.close()


class Watched:
    """What a page has asked for, and what its console says that no test expects."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.origins: set[str] = set()
        self.complaints: list[str] = []
        self.expected = "^$"

    def watch(self, page: Page) -> None:
        page.on("request", lambda request: self._ask(request.url))
        page.on("console", self._hear)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def _ask(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in {"data", "blob"}:
            self.origins.add(f"{parts.scheme}://{parts.netloc}")
            self.paths.append(parts.path)

    def _hear(self, message: Any) -> None:
        if message.type in {"error", "warning"} and not re.search(self.expected, message.text):
            self.complaints.append(message.text)


Visit = Callable[..., Awaitable[Page]]


@pytest_asyncio.fixture(loop_scope="module")
async def watched() -> Watched:
    return Watched()


@pytest_asyncio.fixture(loop_scope="module")
async def visit(browser: Browser, watched: Watched) -> AsyncIterator[Visit]:
    """Open pages in contexts of their own; whatever a test does, none complains or goes outside."""
    contexts, own = [], set[str]()

    async def visit(url: str, **options: Any) -> Page:
        options.setdefault("viewport", {"width": 1200, "height": 900})
        contexts.append(await browser.new_context(**options))
        page = await contexts[-1].new_page()
        watched.watch(page)
        own.add("http://" + urlsplit(url).netloc)
        await page.goto(url)
        return page

    yield visit
    for context in contexts:
        await context.close()
    assert watched.complaints == []
    assert watched.origins <= own


@pytest.fixture(scope="session")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wanted = os.environ.get("PAGE_SCREENSHOTS")
    return Path(wanted) if wanted else tmp_path_factory.mktemp("screenshots")


def slot(*numbers: int) -> bytes:
    """Return a slot of the tally."""
    packed = NUMBERS.pack(*numbers)
    return SLOT.pack(packed, zlib.crc32(packed))


async def busy(service: Service, *, bad: int = 0) -> None:
    """Make a service that has run for long: a day of rows, an hour of arrivals."""
    rows = SqliteBackend(service.config.storage.sqlite.path)
    first, day = uuid_at(NOW - timedelta(days=2)), []
    for n in range(4320):
        at, raw_id = NOW - timedelta(seconds=20 * (4320 - n)), UUID(int=first.int + (n << 80))
        mean = 21 + 3 * math.sin(n / 690) + 0.6 * math.sin(n / 95) + 0.12 * math.sin(n * n)
        if not 1500 < n < 1680:
            day.append(Measurement(at, mean, 0.4 + 0.3 * abs(math.sin(n / 350)), raw_id))
    await rows.upsert(day)
    await rows.close()
    if bad:
        good = [payload(n, 20.1, 21.7, 20.4) for n in range(5)]
        await service.land(*good, *BAD[:bad])
        await service("POST", "process")
    minute = int(time.time()) // 60
    file = os.open(service.folder / "journal" / "tally", os.O_RDWR)
    os.pwrite(file, slot(128_419, time.time_ns() // 1_000_000 - 2000), 0)
    for n in range(MINUTES):
        landed = slot(minute - n, round(96 + 24 * math.sin(n / 7) + n * n % 13) if n else 64)
        os.pwrite(file, landed, SLOT.size * (1 + (minute - n) % MINUTES))
    os.close(file)


async def plot(page: Page) -> Any:
    """Return where the chart is, once it has drawn a line."""
    await expect(page.locator("#chart .line").first).to_be_attached()
    await page.locator("#chart").scroll_into_view_if_needed()
    return await page.locator("#chart").bounding_box()


# ── Now ───────────────────────────────────────────────────────────────────────────────────────────


async def test_empty(service: Service, visit: Visit, shots: Path) -> None:
    """Before anything has landed the page says so, and what to do."""
    page = await visit(service.url)
    await expect(page.locator("#say")).to_have_text("Nothing has landed yet")
    await expect(page.locator("#nothing")).to_contain_text("No measurements yet")
    await expect(page.locator("#quarantined")).to_contain_text("Empty")
    await page.screenshot(path=shots / "page-empty.png", full_page=True)
    await assert_accessible(page)


async def test_an_arrival_shows_within_two_seconds(service: Service, visit: Visit) -> None:
    """What lands is on the page two seconds later, without a reload."""
    page = await visit(service.url)
    await expect(page.locator("#landed")).to_have_text("0")
    for n in range(1, 6):  # one of five, as a loaded machine may be late
        await service.land(payload(n, 1, 2, 3))
        try:
            await expect(page.locator("#landed")).to_have_text(str(n), timeout=2000)
            break
        except AssertionError:
            await expect(page.locator("#landed")).to_have_text(str(n))
    else:
        pytest.fail("no arrival was shown within two seconds")
    await expect(page.locator("#pending")).to_have_text(str(n))
    await expect(page.locator("#say")).to_have_text("All is well")


async def test_live(service: Service, visit: Visit, shots: Path) -> None:
    """Rows appear in the chart by themselves when their payloads have been processed.

    They are more than leave the range of the last day at its beginning meanwhile.
    """
    await busy(service)
    page = await visit(service.url)
    await expect(page.locator("#say")).to_have_text("All is well")
    await expect(page.locator("#processed")).to_have_text("128,419")
    await plot(page)
    await page.evaluate("scrollTo(0, 0)")
    await page.screenshot(path=shots / "page-light.png")
    before = await page.locator("#readout").text_content()
    await service.land(*(payload(-60 - number, 30) for number in range(20)))
    await service("POST", "process")
    await expect(page.locator("#processed")).to_have_text("128,439")
    await expect(page.locator("#readout")).not_to_have_text(before or "", timeout=120_000)


async def test_silence(service: Service, visit: Visit) -> None:
    """When payloads stop coming, the page says for how long, and what was usual."""
    await busy(service)
    file = service.folder / "journal" / "tally"
    slots = bytearray(file.read_bytes())
    slots[: SLOT.size] = slot(9, time.time_ns() // 1_000_000 - 600_000)
    for at in range(SLOT.size, len(slots), SLOT.size):
        minute, landed = NUMBERS.unpack_from(slots, at)
        slots[at : at + SLOT.size] = slot(minute, landed * (minute < time.time() // 60 - 9))
    file.write_bytes(slots)
    page = await visit(service.url)
    await expect(page.locator("#say")).to_have_text("Nothing has landed for 10 min")
    await expect(page.locator("#why")).to_contain_text("payloads in the last hour")


async def test_away_and_back(service: Service, visit: Visit, watched: Watched) -> None:
    """While the server is away the page says since when, and goes on when it is back."""
    watched.expected = "ERR_CONNECTION_REFUSED|ERR_EMPTY_RESPONSE|ERR_CONNECTION_RESET"
    await service.land(payload(1, 1))
    page = await visit(service.url)
    await expect(page.locator("#say")).to_have_text("All is well")
    await service.stop()
    await expect(page.locator("#say")).to_have_text("The server does not answer")
    await expect(page.locator("#why")).to_contain_text("Its last answer came at")
    await expect(page.locator("#landed")).to_have_text("1")
    await service.start()
    await expect(page.locator("#say")).to_have_text("All is well")


async def test_old_rejections(service: Service, visit: Visit) -> None:
    """A payload that was rejected a week ago is counted, but does not make the headline."""
    [raw_id] = await service.land(BAD[0])
    await service("POST", "process")
    page = await visit(service.url)
    await expect(page.locator("#say")).to_contain_text("1 payload was rejected")
    await expect(page.locator("#rejected-note")).to_have_text("1 in the last day")
    await service.stop()
    reason = service.folder / "rejected" / f"{raw_id}.reason.json"
    old = json.loads(reason.read_bytes())
    old["rejected_at"] = (NOW - timedelta(days=7)).isoformat()
    reason.write_text(json.dumps(old))
    await service.start()
    await service.land(payload(1, 1))
    page = await visit(service.url)
    await expect(page.locator("#rejected-note")).to_contain_text("all older")
    await expect(page.locator("#say")).to_have_text("All is well")


async def test_a_backfill_leaves_the_rest_readable(service: Service, visit: Visit) -> None:
    """A minute with a thousand times the usual arrivals flattens no other bar."""
    await busy(service)
    minute = int(time.time()) // 60
    file = os.open(service.folder / "journal" / "tally", os.O_RDWR)
    os.pwrite(file, slot(minute - 30, 100_000), SLOT.size * (1 + (minute - 30) % MINUTES))
    os.close(file)
    page = await visit(service.url)
    await expect(page.locator("#minute")).to_have_text("peak 100,000 a minute")
    await expect(page.locator("#bars .cut")).to_have_count(1)
    heights = "els => els.map(e => Number(e.getAttribute('height'))).sort((a, b) => a - b)"
    assert (await page.locator("#bars rect:not(.cut)").evaluate_all(heights))[30] > 20


async def test_overwriting_devices(service: Service, visit: Visit) -> None:
    """Where many payloads meet the row of another, the page says what it means and what to set."""
    await service.land(*(payload(60 * n, n) for n in range(10)))
    await service("POST", "process")
    page = await visit(service.url)
    await expect(page.locator("#processed")).to_have_text("10")
    await expect(page.locator("#overwritten")).to_be_hidden()
    await service.land(*(payload(60 * n, n + 5) for n in range(10)))
    await service("POST", "process")
    await expect(page.locator("#overwritten")).to_contain_text("10 payloads met the row of another")
    await expect(page.locator("#overwritten")).to_contain_text("[transform] series")


@pytest.mark.parametrize("width", [1366, 390], ids=["laptop", "phone"])
async def test_what_is_seen_first(service: Service, visit: Visit, width: int) -> None:
    """A laptop shows the whole chart at once; a phone keeps nothing free, and asks for no drop."""
    await busy(service)
    page = await visit(service.url, viewport={"width": width, "height": 768})
    await expect(page.locator("#say")).to_have_text("All is well")
    box = await page.locator("#chart").bounding_box()
    await plot(page)
    if width == 1366:
        assert box
        assert box["y"] + box["height"] < 768
        return
    await expect(page.get_by_text("Drop JSON")).to_be_hidden()
    readout = page.locator("#readout")
    empty = "e => e.getBoundingClientRect().bottom - e.lastChild.getBoundingClientRect().bottom"
    assert await readout.evaluate(empty) < 10


async def test_processing_that_cannot_work(service: Service, visit: Visit) -> None:
    """The page says that payloads cannot be processed, and names the folder that is the reason."""
    await service.land(payload(1, 1))
    page = await visit(service.url)
    await expect(page.locator("#say")).to_have_text("All is well")
    away = (service.folder / "processed").rename(service.folder / "away")
    await expect(page.locator("#say")).to_have_text("Payloads cannot be processed")
    await expect(page.locator("#why")).to_contain_text(str(service.folder / "processed"))
    away.rename(service.folder / "processed")
    await expect(page.locator("#say")).to_have_text("All is well")


async def test_hidden(service: Service, visit: Visit, watched: Watched) -> None:
    """A tab that nobody sees asks for nothing; seen again, it asks at once."""
    page = await visit(service.url)
    await expect(page.locator("#landed")).to_have_text("0")
    await page.evaluate(
        "Object.defineProperty(document, 'hidden', {get: () => window.unseen ?? true});"
        "document.dispatchEvent(new Event('visibilitychange'))"
    )
    await page.wait_for_load_state("networkidle")
    await service.land(payload(1, 1))
    asked = len(watched.paths)
    await page.wait_for_timeout(2500)
    assert watched.paths[asked:] == []
    await page.evaluate("unseen = false; document.dispatchEvent(new Event('visibilitychange'))")
    await expect(page.locator("#landed")).to_have_text("1")


# ── Measurements ──────────────────────────────────────────────────────────────────────────────────


async def test_zoom(service: Service, visit: Visit) -> None:
    """Dragging zooms, the address can be shared, and going back zooms out."""
    await busy(service)
    page = await visit(service.url)
    box = await plot(page)
    await page.mouse.move(box["x"] + 700, box["y"] + 100)
    await page.mouse.down()
    await page.mouse.move(box["x"] + 800, box["y"] + 120, steps=3)
    await page.mouse.up()
    await page.wait_for_url("**/#since=*")
    await expect(page.locator("#chart")).to_have_attribute("aria-busy", "false")
    shown = await page.locator("#readout .at dd").text_content()
    other = await visit(page.url)
    await plot(other)
    await page.keyboard.press("Tab")
    await page.mouse.move(5, 5)
    await expect(other.locator("#readout")).to_contain_text("Measurements")
    await expect(page.locator("#ranges [aria-pressed=true]")).to_have_count(0)
    await page.locator("#chart").dblclick()
    await page.wait_for_url(service.url)
    await page.wait_for_timeout(500)  # in which a single click would have zoomed
    assert page.url == service.url
    await expect(page.locator("#ranges [aria-pressed=true]")).to_have_text("All")
    await page.get_by_role("button", name="Hour").click()
    await page.wait_for_url("**/#range=hour")
    assert shown


async def test_hover(service: Service, visit: Visit) -> None:
    """Pointing at the line shows the exact values and the time, in UTC and locally."""
    [raw_id] = await service.land({"time_stamp": "2019-05-01T10:00:00.5Z", "data": [0.1, 0.2, 0.4]})
    await service("POST", "process")
    row = (await service("GET", f"raw/{raw_id}"))["measurement"]
    page = await visit(service.url, timezone_id="America/New_York", locale="en-GB")
    await expect(page.locator("#chart .dot")).to_have_count(1)
    await page.locator("#chart").hover()
    readout = page.locator("#readout")
    await expect(readout).to_contain_text("2019-05-01 10:00:00.500000 UTC")
    await expect(readout).to_contain_text(repr(row["mean"]))
    await expect(readout).to_contain_text(repr(row["std_dev"]))
    await expect(readout.locator(".at dd")).to_have_attribute(
        "title", re.compile("06:00:00.*local")
    )


async def test_lineage(service: Service, visit: Visit) -> None:
    """A click on a point opens its receipt with the exact bytes; so does the address."""
    body = '{"data": [1.50,2.50],\n "time_stamp": "2019-05-01T10:00:00Z", "é": 1}'
    landed = await service("POST", "ingest", body.encode())
    await service("POST", "process")
    page = await visit(service.url)
    await expect(page.locator("#chart .dot")).to_have_count(1)
    await page.locator("#chart").click()
    receipt = page.locator("#receipt")
    await expect(receipt.locator("pre")).to_have_text(body, use_inner_text=True)
    await expect(receipt).to_contain_text(landed["raw_id"])
    other = await visit(page.url)
    await expect(other.locator("#receipt")).to_contain_text(landed["raw_id"])
    await page.keyboard.press("Escape")
    await expect(receipt).not_to_be_visible()
    assert "raw=" not in page.url


async def test_keyboard(service: Service, visit: Visit) -> None:
    """The chart can be read, zoomed and opened with the keyboard, and says what is chosen."""
    await service.land(*(payload(60 * n, n, n + 1) for n in range(20)))
    await service("POST", "process")
    page = await visit(service.url)
    await expect(page.locator("#chart .dot")).to_have_count(20)
    chart = page.get_by_role("slider")
    await chart.focus()
    await page.keyboard.press("End")
    await page.keyboard.press("ArrowLeft")
    await expect(chart).to_have_attribute("aria-valuetext", re.compile(r"mean 1\.5, .* 0\.5"))
    await page.keyboard.press("+")
    await page.wait_for_url("**/#since=*")
    await page.keyboard.press("Escape")
    await page.wait_for_url(service.url)
    await expect(chart).to_have_attribute("aria-valuemax", "19")
    await page.keyboard.press("Home")
    await page.keyboard.press("Enter")
    await expect(page.locator("#receipt pre")).to_contain_text('"data": [19, 20]')


async def test_touch(service: Service, visit: Visit) -> None:
    """On a phone a tap chooses a point, and a button beside its values opens the receipt."""
    await service.land({"time_stamp": "2019-05-01T10:00:00Z", "data": [7]})
    await service("POST", "process")
    phone = {"viewport": PHONE, "has_touch": True, "is_mobile": True}
    page = await visit(service.url, **phone)
    await expect(page.locator("#chart .dot")).to_have_count(1)
    await page.locator("#chart").tap()
    await expect(page.locator("#readout")).to_contain_text("2019-05-01 10:00:00 UTC")
    await page.get_by_role("button", name="Receipt").tap()
    await expect(page.locator("#receipt pre")).to_contain_text("[7]")


async def test_a_range_without_rows(service: Service, visit: Visit) -> None:
    """Where a range is empty the page says so, and leads to where there is something."""
    await service.land(payload(1, 1))
    await service("POST", "process")
    page = await visit(service.url + "#since=2001-01-01T00:00:00Z&until=2001-01-02T00:00:00Z")
    await expect(page.locator("#nothing")).to_contain_text("No measurements in this range")
    await assert_accessible(page)
    await page.get_by_role("button", name="Show all").click()
    await expect(page.locator("#chart .dot")).to_have_count(1)


async def test_a_point_of_many_rows(service: Service, visit: Visit, watched: Watched) -> None:
    """Where a point stands for many rows a click opens a receipt all the same; a button zooms."""
    watched.expected = "404"  # these rows have no payloads
    await busy(service)
    page = await visit(service.url, viewport=PHONE, has_touch=True)
    box = await plot(page)
    await page.mouse.click(box["x"] + 200, box["y"] + 100)
    receipt = page.locator("#receipt")
    await expect(receipt).to_be_visible()
    assert "raw=" in page.url
    assert "since=" not in page.url
    await page.keyboard.press("Escape")
    await page.touchscreen.tap(box["x"] + 200, box["y"] + 100)
    await page.get_by_role("button", name="Zoom in").tap()
    await page.wait_for_url("**/#since=*")


async def test_gaps(service: Service, visit: Visit) -> None:
    """The line is broken where a single sample of a regular device is missing."""
    missing = (12, 13, 30)
    await service.land(*(payload(60 * n, n) for n in range(40) if n not in missing))
    await service("POST", "process")
    page = await visit(service.url)
    await expect(page.locator("#chart .dot")).to_have_count(37)
    await expect(page.locator("#chart .line")).to_have_count(3)


async def test_a_typed_range(service: Service, visit: Visit) -> None:
    """A range is typed in UTC, a day alone is whole, and what is no moment is said to be none."""
    moments = ("2024-02-28T23:59:59Z", "2024-02-29T12:00:00Z", "2024-03-01T00:00:00Z")
    await service.land(*({"time_stamp": at, "data": [1]} for at in moments))
    await service("POST", "process")
    page = await visit(service.url)
    await expect(page.locator("#chart .dot")).to_have_count(3)
    start, end = page.get_by_label("From (UTC)"), page.get_by_label("To (UTC)")
    await start.fill("2024-02-30 25:00")
    await end.fill("2024-02-29")
    await end.press("Enter")
    await expect(start).to_have_attribute("aria-invalid", "true")
    await expect(page.locator("#mistyped")).to_contain_text("2026-01-31 08:00")
    await start.fill("2024-02-29")
    await end.press("Enter")
    await expect(page.locator("#chart .dot")).to_have_count(1)
    await expect(page.locator("#mistyped")).to_be_hidden()
    assert "since=2024-02-29T00" in page.url
    assert "until=2024-03-01T00" in page.url
    await expect(end).to_have_value("2024-03-01 00:00")


async def test_csv(guarded: Service, visit: Visit, watched: Watched) -> None:
    """The rows of what is shown are saved as CSV, with the key that the page has."""
    watched.expected = "401"
    await guarded.land(*(payload(3600 * n, n) for n in range(4)))
    await guarded("POST", "process")
    page = await visit(guarded.url + "#range=hour")
    await page.locator("#key").fill(KEY)
    await page.locator("#key").press("Enter")
    await expect(page.locator("#chart .dot")).to_have_count(1)
    async with page.expect_download() as saving:
        await page.get_by_role("button", name="CSV").click()
    saved = await saving.value
    assert saved.suggested_filename == "measurements.csv"
    header, row = Path(await saved.path()).read_text().splitlines()
    assert header.startswith("timestamp_utc,mean")
    assert ",0.0," in row


# ── Series ────────────────────────────────────────────────────────────────────────────────────────


async def test_series(metered: Service, visit: Visit, shots: Path) -> None:
    """One series is chosen by typing a part of its name, and stands in the address."""
    await metered.land(*(of(f"meter-{n % 30}", n, n) for n in range(60)))
    await metered("POST", "process")
    page = await visit(metered.url)
    await expect(page.locator("#how-many")).to_contain_text("30 series, none silent")
    field = page.get_by_role("combobox", name="Series")
    await field.fill("ETER-2")
    options = page.get_by_role("option")
    await expect(options).to_have_count(11)
    await expect(options.last).to_contain_text("and 1 more")
    await assert_accessible(page)
    await page.screenshot(path=shots / "page-series.png", full_page=True)
    await field.press("ArrowDown")
    await field.press("ArrowDown")
    chosen = await page.locator("#names [aria-selected=true]").text_content()
    await field.press("Enter")
    await page.wait_for_url(f"**/#series={chosen}")
    await expect(page.locator("#chart .dot")).to_have_count(2)
    other = await visit(page.url)
    await expect(other.locator("#chart .dot")).to_have_count(2)
    await expect(other.get_by_role("combobox", name="Series")).to_have_value(chosen or "")
    await page.get_by_role("button", name="All series").click()
    await page.wait_for_url(metered.url)
    await expect(page.locator("#chart .dot")).to_have_count(60)


async def test_a_silent_device(metered: Service, visit: Visit) -> None:
    """The series that changed last are drawn side by side, and the silent are a click away."""
    late = (of(f"late-{n}", 7200 + n, 1) for n in range(3))
    await metered.land(*(of(f"meter-{n}", n, n) for n in range(20)), *late)
    await metered("POST", "process")
    page = await visit(metered.url)
    await expect(page.locator("#how-many")).to_contain_text("23 series, 3 silent for an hour")
    small = page.locator("#multiples li")
    await expect(small).to_have_count(12)
    await expect(small.first).to_contain_text("meter-0")
    await expect(small.first.locator("polyline")).to_be_attached()
    await page.get_by_role("button", name="Silent longest").click()
    await expect(small.first).to_contain_text("late-2")
    await expect(small.first).to_contain_text("silent for 2 h")
    await small.first.get_by_role("button").click()
    await page.wait_for_url("**/#series=late-2")
    await expect(page.locator("#chart .dot")).to_have_count(1)


async def test_ten_thousand_series(metered: Service, visit: Visit) -> None:
    """With 10,000 series the page shows ten names at a time, and no more than a dozen charts."""
    rows, raw_id = [], uuid_at(NOW - timedelta(days=1))
    for n in range(10_000):
        raw_id = next_raw_id(raw_id)
        rows.append(Measurement(NOW - timedelta(seconds=n), n, 1, raw_id, f"meter-{n:05}"))
    backend = SqliteBackend(metered.config.storage.sqlite.path, series=True)
    await backend.upsert(rows)
    await backend.close()
    page = await visit(metered.url)
    await expect(page.locator("#how-many")).to_contain_text("10,000 series")
    field = page.get_by_role("combobox", name="Series")
    await field.focus()
    await expect(page.get_by_role("option")).to_have_count(11)
    await field.fill("09876")
    await expect(page.get_by_role("option")).to_have_text(["meter-09876"])
    await expect(page.locator("#multiples li")).to_have_count(12)


# ── Quarantine ────────────────────────────────────────────────────────────────────────────────────


async def test_quarantine(service: Service, visit: Visit, shots: Path) -> None:
    """The rejected stand in groups with their reasons; one, a group or all are retried."""
    await busy(service, bad=5)
    page = await visit(service.url)
    await expect(page.locator("#say")).to_have_text(
        "Data is arriving, but 5 payloads were rejected"
    )
    group = page.locator("details", has_text="value_not_numeric")
    await group.locator("summary").click()
    line = group.locator("li")
    await expect(line).to_have_count(1)
    await expect(line).to_contain_text('data[1] is "x", no number 3 times')
    await page.evaluate("scrollTo(0, 0)")
    await page.screenshot(path=shots / "page-quarantine.png", full_page=True)
    await line.get_by_role("button", name="Retry").click()
    await expect(page.locator("#said")).to_contain_text("3 payloads are pending again")
    await expect(page.locator("#pending")).to_have_text("3")
    await page.get_by_role("button", name="Process now").first.click()
    await expect(page.locator("#said")).to_contain_text("0 processed, 3 rejected")
    await expect(group).to_contain_text("Retried 1 time")
    await group.get_by_role("button", name="Retry these 3").click()
    await expect(page.locator("details")).to_have_count(1)
    await page.get_by_role("button", name="Retry all").click()
    await expect(page.locator("#quarantined")).to_contain_text("Empty")
    await expect(page.locator("#rejected")).to_have_text("0")


async def test_discarding(service: Service, visit: Visit) -> None:
    """What will never be right is discarded when it was asked twice, and the rest stays."""
    await service.land(*BAD)
    await service("POST", "process")
    page = await visit(service.url)
    group = page.locator("details", has_text="value_not_numeric")
    await group.locator("summary").click()
    button = group.get_by_role("button", name="Discard these 3")
    await button.click()
    await group.get_by_role("button", name="Discard 3 payloads: sure?").click()
    await expect(page.locator("#said")).to_contain_text("3 payloads are discarded")
    await expect(page.locator("details")).to_have_count(1)
    await expect(page.locator("#rejected")).to_have_text("2")


async def test_quarantine_by_device(metered: Service, visit: Visit) -> None:
    """Reasons stand by device, and what was corrected and sent again since says so."""
    await metered.land(*(of(device, n, "x") for device in ("b", "a") for n in range(2)))
    await metered("POST", "process")
    [corrected] = await metered.land(of("a", 1, 1))
    await metered("POST", "process")
    page = await visit(metered.url)
    await page.locator("summary").click()
    lines = page.locator("details li")
    await expect(lines).to_have_count(3)
    await expect(lines.last).to_contain_text("b: ")
    await expect(lines.last).to_contain_text("2 times")
    again = lines.filter(has_text="corrected and sent again since")
    await expect(again).to_have_count(1)
    await expect(again).to_contain_text("a: ")
    await assert_accessible(page)
    await again.get_by_role("link", name="by this").click()
    await expect(page.locator("#receipt")).to_contain_text(corrected)


# ── Try it ────────────────────────────────────────────────────────────────────────────────────────


async def drop(page: Page, name: str, text: str) -> None:
    """Drop a file onto the page."""
    data = await page.evaluate_handle(
        "([name, text]) => { const data = new DataTransfer();"
        " data.items.add(new File([text], name)); return data; }",
        [name, text],
    )
    for event in ("dragenter", "dragover", "drop"):
        await page.dispatch_event("main", event, {"dataTransfer": data})


async def test_a_dropped_file_lands(service: Service, visit: Visit) -> None:
    """A file dropped anywhere lands unchanged, and its raw_id leads to the receipt."""
    page = await visit(service.url)
    await drop(page, "one.json", '{"a": 1.0}')
    await expect(page.locator("#files li")).to_contain_text("1 payload landed")
    await page.locator("#files a").click()
    await expect(page.locator("#receipt pre")).to_have_text('{"a": 1.0}')
    [stored] = (service.folder / "raw").glob("*.json")
    assert stored.read_text() == '{"a": 1.0}'


async def test_a_large_ndjson_file_lands_in_parts(service: Service, visit: Visit) -> None:
    """More lines than one request may have land all the same, and an error names the line."""
    page = await visit(service.url)
    await drop(page, "many.ndjson", "\n".join(f'{{"n": {n}}}' for n in range(10_500)))
    await expect(page.locator("#files li")).to_contain_text("10,500 payloads landed")
    landed = payloads_below(service.folder / "raw")
    assert list(landed.values()) == [b'{"n": %d}' % n for n in range(10_500)]
    await expect(page.locator("#pending")).to_have_text("10,500")


async def test_an_array_lands_as_what_it_holds(service: Service, visit: Visit) -> None:
    """A file of an array of objects lands as so many payloads, each with its receipt."""
    page = await visit(service.url)
    await drop(page, "array.json", '[{"a": 1}, {"a": 2.0}]')
    await expect(page.locator("#files li")).to_contain_text("2 payloads landed")
    await expect(page.locator("#pending")).to_have_text("2")
    await page.locator("#files a").nth(1).click()
    await expect(page.locator("#receipt pre")).to_have_text('{"a": 2.0}')


async def test_lines_that_are_not_json(service: Service, visit: Visit) -> None:
    """Lines that are not JSON land with the rest, and are named as the file's own lines."""
    page = await visit(service.url)
    await drop(page, "bad.ndjson", "\n1\noops\n" + "1\n" * 5000 + "<b>\n" * 9)
    row = page.locator("#files > li")
    await expect(row).to_contain_text("5,011 payloads landed")
    await expect(row).to_contain_text("10 lines landed without being JSON")
    for text in ("line 3 is not JSON", "line 5004 is not JSON", "line 5008 ", "and 4 more"):
        await expect(row).to_contain_text(text)
    await page.get_by_role("link", name="line 5004").click()
    await expect(page.locator("#receipt pre")).to_have_text("<b>")


async def test_files_that_are_refused(service: Service, visit: Visit, watched: Watched) -> None:
    """What is no JSON is refused in words that name the file's own line."""
    watched.expected = "400"
    page = await visit(service.url)
    await drop(page, "bad.json", '{"a": ')
    await expect(page.locator("#files li").first).to_contain_text("refused")
    await expect(page.locator("#files li").first).to_contain_text("not JSON")
    await drop(page, "bad.ndjson", "1\n" * 5000 + "\n\noops")
    await expect(page.locator("#files li").first).to_contain_text("5,000 payloads landed, the rest")
    await expect(page.locator("#files li").first).to_contain_text("line 5003")


async def test_a_retried_upload_lands_once(
    service: Service, visit: Visit, watched: Watched
) -> None:
    """An upload whose answer was lost is tried again under its key, and lands once."""
    watched.expected = "ERR_FAILED|ERR_CONNECTION"
    page = await visit(service.url)
    lost = asyncio.Event()

    async def lose(route: Any) -> None:
        await route.fetch()  # it lands
        await route.abort()
        lost.set()

    await page.route("**/ingest", lose, times=1)
    await drop(page, "once.json", '{"once": true}')
    async with asyncio.timeout(20):
        await lost.wait()
    await page.get_by_role("button", name="Try again").click()
    await expect(page.locator("#files li")).to_contain_text("1 payload landed")
    assert len(list((service.folder / "raw").glob("*.json"))) == 1


async def test_an_example(service: Service, visit: Visit) -> None:
    """Whoever has no file sends an example, and one step later sees it as a row in the chart."""
    await busy(service)
    page = await visit(service.url)
    await page.get_by_role("button", name="Send an example").click()
    await page.get_by_role("button", name="Make it a row").click()
    await page.wait_for_url("**/#since=*")
    await expect(page.locator("#files li")).to_contain_text("It is a row")
    mean = re.search(r"mean ([\d.]+)", await page.locator("#files li").text_content() or "")
    assert mean
    await expect(page.locator("#readout")).to_contain_text(mean[1])
    await expect(page.locator("#chart")).to_be_in_viewport()


async def test_an_example_of_a_series(metered: Service, visit: Visit) -> None:
    """The example names a series where payloads have to, and what the server processes is seen."""
    page = await visit(metered.url)
    await expect(page.locator("#pick")).to_be_visible()
    await page.get_by_role("button", name="Send an example").click()
    await expect(page.locator("#files li")).to_contain_text("It waits to be processed")
    await metered("POST", "process")
    await page.get_by_role("button", name="Show it in the chart").click()
    await page.wait_for_url("**series=example")
    await expect(page.locator("#chart .dot")).to_have_count(1)


async def test_a_trial_that_is_rejected(service: Service, visit: Visit) -> None:
    """A dropped file that makes no row says why beside it."""
    page = await visit(service.url)
    await drop(page, "bad.json", '{"data": [1]}')
    await page.get_by_role("button", name="Make it a row").click()
    await expect(page.locator("#files li")).to_contain_text("the payload has no time_stamp")


# ── Keys ──────────────────────────────────────────────────────────────────────────────────────────


async def test_key(guarded: Service, visit: Visit, watched: Watched) -> None:
    """The key is asked for once, again when it was wrong, and kept for the tab alone."""
    watched.expected = "401"
    await guarded.land(payload(1, 1))
    page = await visit(guarded.url)
    field = page.locator("#key")
    await field.fill("wrong")
    await field.press("Enter")
    await expect(page.locator("#ask-why")).to_contain_text("refused")
    await field.fill(KEY)
    await field.press("Enter")
    await expect(page.locator("#landed")).to_have_text("1")
    await page.reload()
    await expect(page.locator("#landed")).to_have_text("1")
    await expect(page.locator("#ask")).not_to_be_visible()
    assert KEY not in await page.evaluate("JSON.stringify(localStorage) + document.cookie")
    other = await visit(guarded.url)
    await expect(other.locator("#ask")).to_be_visible()
    await other.get_by_role("button", name="Cancel").click()
    await expect(other.locator("#say")).to_have_text("A key is needed")
    await other.get_by_role("button", name="Enter key").click()
    await other.locator("#key").fill(KEY)
    await other.get_by_role("button", name="Use key").click()
    await expect(other.locator("#landed")).to_have_text("1")
    await expect(other.locator("#nothing")).to_contain_text("No measurements yet")


async def test_a_key_that_may_only_read(tmp_path: Path, visit: Visit, watched: Watched) -> None:
    """Nothing is offered that the key may not do."""
    watched.expected = "401"
    service = Service(tmp_path, key=KEY)
    reader = KeyConfig("reader", Secret("sha256:" + hashlib.sha256(b"read").hexdigest()), ("read",))
    service.config = msgspec.structs.replace(
        service.config, auth=AuthConfig(Secret(KEY), keys=(reader,))
    )
    await service.start()
    try:
        await service.land(*BAD)
        await service("POST", "process")
        page = await visit(service.url)
        await page.locator("#key").fill("read")
        await page.locator("#key").press("Enter")
        await expect(page.locator("#may-not-send")).to_be_visible()
        await page.locator("summary").first.click()
        await expect(page.locator("details li").first).to_be_visible()
        for name in ("Send an example", "Choose files", "Retry", "Discard"):
            await expect(page.get_by_role("button", name=name)).to_have_count(0)
    finally:
        await service.stop()


async def test_refused(service: Service, visit: Visit, watched: Watched) -> None:
    """A key without a right is told which; whoever is too quick waits as long as is asked."""
    watched.expected = "403|429"
    body = {
        "title": "Forbidden",
        "status": 403,
        "detail": "It lacks the scope process.",
        "code": "scope_missing",
    }
    await service.land(*BAD)
    await service("POST", "process")
    page = await visit(service.url)
    await page.route("**/rejected/retry", lambda route: route.fulfill(status=403, json=body))
    await page.get_by_role("button", name="Retry all").click()
    await expect(page.locator("#said")).to_contain_text("It lacks the scope process.")
    too_many = {"status": 429, "headers": {"Retry-After": "1"}, "body": "{}"}
    await page.route("**/ingest", lambda route: route.fulfill(**too_many), times=1)
    await drop(page, "one.json", "1")
    await expect(page.locator("#files li")).to_contain_text("1 payload landed")


# ── Habits ────────────────────────────────────────────────────────────────────────────────────────

DESKTOP = {"width": 1200, "height": 900}
PHONE = {"width": 390, "height": 844}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
async def test_accessibility(
    service: Service, visit: Visit, shots: Path, scheme: str, viewport: Any
) -> None:
    """axe-core finds no serious fault, with everything open, nor does anything overflow."""
    await busy(service, bad=5)
    page = await visit(service.url, color_scheme=scheme, viewport=viewport)
    await plot(page)
    await page.locator("summary").first.click()
    await drop(page, "one.json", "{}")
    await expect(page.locator("#files li")).to_contain_text("1 payload landed")
    await page.locator("#chart").focus()
    await page.keyboard.press("ArrowLeft")
    await assert_accessible(page)
    await page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    name = {"dark": "page-dark.png", "light": "page-open.png"}[scheme]
    name = f"page-phone-{scheme}.png" if viewport is PHONE else name
    await page.screenshot(path=shots / name, full_page=viewport is PHONE)
    await page.locator("#files a").click()
    await expect(page.locator("#receipt pre")).to_have_text("{}")
    await assert_accessible(page)
    assert await page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]


async def assert_accessible(page: Page) -> None:
    found = (await Axe().run(page)).response["violations"]
    faults = [f for f in found if f["impact"] in {"serious", "critical"}]
    assert not faults, [
        (f["id"], f["nodes"][0]["html"], f["nodes"][0]["failureSummary"]) for f in faults
    ]


async def test_mounted(tmp_path: Path, visit: Visit) -> None:
    """Under the prefix of an outer application everything works, also without the last slash."""
    service = Service(tmp_path, prefix="/devices/dropzone")
    await service.start()
    try:
        page = await visit(service.url.rstrip("/"))
        assert page.url == service.url
        await expect(page.locator("#say")).to_have_text("Nothing has landed yet")
        await page.get_by_role("button", name="Send an example").click()
        await expect(page.locator("#landed")).to_have_text("1")
    finally:
        await service.stop()


async def test_policy(service: Service) -> None:
    """Nothing may be loaded but what the file holds, and it is small."""
    async with ClientSession() as session, session.get(service.url) as response:
        body, headers = await response.read(), response.headers
    policy = headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    for part in ("default-src 'none'", "connect-src 'self'", "frame-ancestors 'none'"):
        assert part in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert len(body) < 100_000
    assert len(gzip.compress(body)) < 30_000


# ── The routes ────────────────────────────────────────────────────────────────────────────────────


async def until(service: Service, **figures: object) -> Any:
    """Return the status that has these figures; a count may be a moment old."""
    async with asyncio.timeout(20):
        while not (status := await service("GET", "status")).items() >= figures.items():
            await asyncio.sleep(0.01)
    return status


async def test_status_is_of_all_processes(service: Service) -> None:
    """What other processes land, process and put back is counted, too."""
    source = service.folder / "some.ndjson"
    source.write_text("\n".join(map(json.dumps, [payload(1, 1), *BAD])))
    env = os.environ | {
        "DROPZONE_RAW_DIR": str(service.config.raw.dir),
        "DROPZONE_STORAGE_SQLITE_PATH": str(service.config.storage.sqlite.path),
    }
    for command in (("ingest", str(source)), ("process",)):
        program = Path(__file__).parents[2] / "dropzone.py"
        done = await asyncio.create_subprocess_exec(
            sys.executable, program, *command, env=env, stdout=asyncio.subprocess.DEVNULL
        )
        assert await done.wait() == 0
        status = await until(service, pending=6 if command[0] == "ingest" else 0)
        assert sum(status["landed"]) == 6
    codes = {"value_not_numeric": 3, "time_stamp_missing": 2}
    status = await until(service, processed=1, rejected=codes)
    assert status["oldest_pending_seconds"] is None
    assert NOW <= datetime.fromisoformat(status["last_landed"]) <= datetime.now(UTC)
    assert status["free_bytes"] > 0
    assert status["backend"] == "ok"


async def test_status_outlives_the_process(service: Service) -> None:
    """A restart forgets no arrival; a lost tally counts anew what is processed."""
    await service.land(*(payload(n, n) for n in range(4)))
    await service("POST", "process")
    before = await service("GET", "status")
    await service.stop()
    await service.start()
    after = await service("GET", "status")
    for name in ("last_landed", "processed", "pending"):
        assert after[name] == before[name]
    assert sum(after["landed"]) == 4
    await service.stop()
    (service.folder / "journal" / "tally").unlink()
    await service.start()
    assert (await service("GET", "status"))["processed"] == 4


async def test_status_counts_what_landed(tmp_path: Path) -> None:
    """A payload that is refused, or came before under its key, is not counted."""
    store = RawStore(tmp_path / "raw")
    await store.open()
    for _ in range(3):
        await store.land(**lines(b"1", b"2"), key="once")
    assert store.activity().landed[-2:].count(2) == 1
    assert sum(store.activity().landed) == 2
    await store.close()


async def test_status_of_a_quarantine_that_changes(service: Service) -> None:
    """What was rejected and retried since the last look is counted anew."""
    for n in (1, 2):
        await service.land({"data": [n]})
        await service("POST", "process")
        await until(service, rejected={"time_stamp_missing": n}, pending=0)
    await service("POST", "rejected/retry")
    status = await until(service, rejected={}, pending=2)
    assert 0 <= status["oldest_pending_seconds"] < 600


async def test_summary(service: Service) -> None:
    """The buckets of a range come over HTTP; a range without rows has none."""
    await service.land(*(payload(n, n, n + 2) for n in range(100)))
    await service("POST", "process")
    [bucket] = (await service("GET", "measurements/summary?buckets=1"))["buckets"]
    assert bucket["count"] == 100
    assert (bucket["min_mean"], bucket["max_mean"]) == (1, 100)
    assert bucket["mean"] == pytest.approx(50.5)
    assert bucket["std_dev"] == 1
    empty = await service("GET", "measurements/summary?until=2000-01-01T00:00:00Z")
    assert empty == {"buckets": []}
    async with ClientSession() as session:
        for wrong in ("buckets=0", "buckets=2001", "since=noon", "bucket=1"):
            async with session.get(f"{service.url}measurements/summary?{wrong}") as response:
                assert response.status == 400
