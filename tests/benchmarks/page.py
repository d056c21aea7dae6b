"""How fast the page is with a million rows, and what it costs while it stands open.

Prints, for SQLite and PostgreSQL, the milliseconds from the start of a visit until the chart is
drawn, and from the end of a drag until the zoomed chart is drawn; then the share of a core that the
server takes for an open page, with nothing pending and with 100,000 payloads pending. Last, with as
many rows of 10,000 series, the first paint, the filter of their names, and the chart of one.

    python tests/benchmarks/page.py [ROWS]
"""

import asyncio
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from uuid import UUID

HOME = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(HOME), str(HOME / "tests")]

import machine  # noqa: E402
from playwright.async_api import Page, async_playwright  # noqa: E402
from postgres_server import PostgresServer  # noqa: E402

from backends import Backend, Measurement  # noqa: E402
from backends.postgres import PostgresBackend  # noqa: E402
from backends.raw import next_raw_id, uuid_at  # noqa: E402
from backends.sqlite import SqliteBackend  # noqa: E402

PENDING = 100_000
SERIES = 10_000
WATCHED = 30.0  # seconds
PORT = 18_480
URL = f"http://127.0.0.1:{PORT}/"


async def fill(backend: Backend, rows: int) -> None:
    begin = datetime.now(UTC) - timedelta(seconds=2 * rows)
    raw_id = uuid_at(begin)
    for start in range(0, rows, 10_000):
        batch = []
        for n in range(start, min(start + 10_000, rows)):
            raw_id = next_raw_id(raw_id)
            mean = math.sin(n / 90_000) + 0.2 * math.sin(n * n)
            at = begin + timedelta(seconds=2 * n)
            batch.append(Measurement(at, mean, 0.3 + 0.2 * math.sin(n / 7000), raw_id))
        await backend.upsert(batch)
    await backend.close()


async def fill_series(backend: Backend, rows: int) -> None:
    begin = datetime.now(UTC) - timedelta(seconds=rows // SERIES * 60)
    raw_id = uuid_at(begin)
    for minute in range(rows // SERIES):
        batch = []
        for n in range(SERIES):
            raw_id = next_raw_id(raw_id)
            at, mean = begin + timedelta(seconds=60 * minute), n + math.sin(minute / 9)
            batch.append(Measurement(at, mean, 0.3, raw_id, f"meter-{n:05}"))
        await backend.upsert(batch)
    await backend.close()


@contextmanager
def serving(folder: Path, **settings: str) -> Iterator[int]:
    """Serve in a process of its own; give out its pid."""
    own = {"DROPZONE_RAW_DIR": str(folder / "raw"), "DROPZONE_SERVER_PORT": str(PORT)}
    program = [sys.executable, str(HOME / "dropzone.py")]
    with open(folder / "log", "a") as log:
        process = subprocess.Popen(program, env=os.environ | own | settings, stderr=log)
    try:
        while not answers():
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def answers() -> bool:
    try:
        with urlopen(URL + "health"):  # noqa: S310 (our own)
            return True
    except OSError:
        return False


def processor_time(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def first_paint(page: Page) -> float:
    await page.goto("about:blank")
    await page.goto(URL)
    return await drawn(page, 0)


async def zoom(page: Page, left: float, right: float) -> float:
    box: Any = await page.locator("#chart").bounding_box()
    await page.mouse.move(box["x"] + left, box["y"] + 100)
    await page.mouse.down()
    await page.mouse.move(box["x"] + right, box["y"] + 100)
    before = await page.evaluate("performance.now()")
    await page.mouse.up()
    return await drawn(page, before)


async def drawn(page: Page, before: float) -> float:
    """Return how many ms after `before` the chart is drawn."""
    last = "performance.getEntriesByName('chart-drawn').at(-1)?.startTime ?? 0"
    while (at := await page.evaluate(last)) <= before:
        await asyncio.sleep(0.02)
    return at - before


async def measure(name: str, page: Page, pid: int) -> None:
    paints = [await first_paint(page) for _ in range(5)]
    zooms = {"half": (300, 770), "tenth": (500, 600), "hundredth": (500, 510)}
    figures = []
    for part, (left, right) in zooms.items():
        times = []
        for _ in range(3):
            await first_paint(page)
            times.append(await zoom(page, left, right))
        figures.append(f"zoom to a {part} {statistics.median(times):.0f} ms")
    print(f"{name}: first paint {statistics.median(paints):.0f} ms, {', '.join(figures)}")
    print(f"{name}: an open page takes {await share(page, pid):.2f} % of a core")


async def measure_series(name: str, page: Page) -> None:
    first = "performance.getEntriesByName('first-contentful-paint')[0].startTime"
    paints, charts, filters, choices = [], [], [], []
    for n in range(5):
        charts.append(await first_paint(page))
        paints.append(await page.evaluate(first))
        last = page.locator("#multiples polyline").nth(11)
        await last.wait_for(state="attached")
        field = page.locator("#series")
        await field.fill(f"r-0{n}12")
        typed = "document.querySelector('#series').dispatchEvent(new Event('input'))"
        begun = "const begun = performance.now()"
        took = f"(() => {{ {begun}; {typed}; return performance.now() - begun; }})()"
        filters.append(await page.evaluate(took))
        before = await page.evaluate("performance.now()")
        await field.press("Enter")
        choices.append(await drawn(page, before))
    figures = {"first paint": paints, "chart": charts, "a key": filters, "one series": choices}
    print(f"{name}:", ", ".join(f"{k} {statistics.median(v):.1f} ms" for k, v in figures.items()))


async def go_on_landing(folder: Path, raw_id: UUID) -> None:
    """Put payloads into the folder, as another process would, so that it changes all the time."""
    while True:
        raw_id = next_raw_id(raw_id)
        (folder / "raw" / f"{raw_id}.json").write_bytes(b"{}")
        await asyncio.sleep(0.1)


async def share(page: Page, pid: int) -> float:
    await first_paint(page)
    await asyncio.sleep(2)
    begun, used = time.monotonic(), processor_time(pid)
    await asyncio.sleep(WATCHED)
    return 100 * (processor_time(pid) - used) / (time.monotonic() - begun)


async def main(rows: int) -> None:
    path = machine.browser()
    root = ["--no-sandbox"] if os.getuid() == 0 else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        async with async_playwright() as playwright:
            browser = await playwright.chromium.launch(executable_path=path, args=root)
            page = await browser.new_page(viewport={"width": 1200, "height": 900})
            file = folder / "rows.sqlite"
            await fill(SqliteBackend(file), rows)
            with serving(folder, DROPZONE_STORAGE_SQLITE_PATH=str(file)) as pid:
                await measure(f"sqlite, {rows:,} rows", page, pid)
                raw_id = uuid_at(datetime.now(UTC))
                for _ in range(PENDING):
                    raw_id = next_raw_id(raw_id)
                    (folder / "raw" / f"{raw_id}.json").write_bytes(b"{}")
                print(f"{PENDING:,} pending: {await share(page, pid):.2f} % of a core")
                coming = asyncio.create_task(go_on_landing(folder, raw_id))
                print(f"and more coming: {await share(page, pid):.2f} % of a core")
                coming.cancel()
            shutil.rmtree(folder / "raw")
            file = folder / "series.sqlite"
            await fill_series(SqliteBackend(file, series=True), rows)
            own = {"DROPZONE_STORAGE_SQLITE_PATH": str(file), "DROPZONE_TRANSFORM_SERIES": "device"}
            with serving(folder, **own):
                await measure_series(f"sqlite, {rows:,} rows of {SERIES:,} series", page)
            shutil.rmtree(folder / "raw")
            server = PostgresServer()
            try:
                await fill(PostgresBackend(server.url()), rows)
                with serving(folder, DROPZONE_DATABASE_URL=server.url()) as pid:
                    await measure(f"postgres, {rows:,} rows", page, pid)
            finally:
                server.close()
            await browser.close()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000))
