"""How fast pending payloads become rows: Dropzone beside a straightforward program, in one run.

    python tests/benchmarks/process.py [--sizes 20000,100000] [--rounds 3] [--dir FOLDER]
        [--backends sqlite,postgres] [--batches N] [--large N] [--ingest]

Each figure is the median of the rounds: the wall time of the whole command, and what is left of it
without the time that the command takes on an empty folder. The payloads have just been written, so
they are read from the page cache; the disk under FOLDER gets the renames and SQLite's rows.
`--batches` has a backlog of N payloads besides that came in batches of 100, which the prototype
cannot read. `--large` adds a backlog of N payloads of 1,000,000 values. `--ingest` processes the
largest of the other backlogs once more while devices send, again and again for 8 seconds.
Linux only: memory is read from /proc.
"""

import argparse
import asyncio
import itertools
import json
import math
import os
import re
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from select import select
from typing import NamedTuple

import asyncpg
import ingest
from uuid_utils.compat import uuid7

sys.path.append(str(ingest.REPO / "tests"))
from postgres_server import PostgresServer

PROTOTYPE, DROPZONE = "prototype", "Dropzone"
SERVICE = str(ingest.REPO / "dropzone.py")
COMMANDS = {
    PROTOTYPE: (str(Path(__file__).with_name("prototype.py")),),
    DROPZONE: (SERVICE, "process"),
}
ALONE, BESIDE = "landing alone", "landing beside processing"
SMALL, LARGE = 100, 1_000_000  # values in a payload
BLOCK = 4096  # bytes of the disk, of which a file takes whole ones
FIRST = datetime(2020, 1, 1, tzinfo=timezone(timedelta(hours=-4)))
CONNECTIONS, LOAD_SECONDS = 64, 8
POLL = 0.1  # seconds between two looks
COUNT = "SELECT count(*) FROM measurements"

Urls = dict[str, str | None]  # of each backend; SQLite has none
Row = tuple[float, ...]  # what one run measured


class Backlog(NamedTuple):
    payloads: int
    values: int = SMALL  # in each
    batch: int = 1  # payloads that came in one request

    @property
    def name(self) -> str:
        values = f" x {self.values:,} values" * (self.values == LARGE)
        return f"{self.payloads:,}{values}" + f" in batches of {self.batch}" * (self.batch > 1)


EMPTY = Backlog(0)


class Case(NamedTuple):
    backlog: Backlog
    backend: str
    what: str


# ── What is processed, and where ──────────────────────────────────────────────────────────────────


class Place(NamedTuple):
    """A data folder of its own, and a table without rows: in SQLite, or in PostgreSQL at `url`."""

    home: Path
    url: str | None

    @classmethod
    def fresh(cls, folder: Path, url: str | None, backlog: Backlog) -> "Place":
        place = cls(Path(tempfile.mkdtemp(dir=folder)), url)
        place.raw.mkdir()
        if url:
            asyncio.run(_fetch(url, "DROP TABLE IF EXISTS measurements"))
        if backlog.batch > 1:
            place.land(backlog)
        else:
            for number in range(backlog.payloads):
                with open(place.raw / f"{uuid7()}.json", "wb") as file:
                    file.writelines(payload(number, backlog.values))
        os.sync()  # nobody pays for what another has left to be written
        return place

    def land(self, backlog: Backlog) -> None:
        """Send batches to a service, which alone knows how they lie on disk."""
        settings = {**self.settings, "DROPZONE_SERVER_PORT": "0"}
        with ingest.started(self.home, SERVICE, **settings) as url:
            for start in range(0, backlog.payloads, backlog.batch):
                numbers = range(start, min(start + backlog.batch, backlog.payloads))
                lines = [b"".join(payload(number, backlog.values)) for number in numbers]
                ingest.landed_by(url, "application/x-ndjson", b"\n".join(lines))

    @property
    def raw(self) -> Path:
        return self.home / "raw"

    @property
    def settings(self) -> dict[str, str]:
        rows = {"DROPZONE_BACKEND": "sqlite", "DROPZONE_STORAGE_SQLITE_PATH": f"{self.home}/rows"}
        if self.url:
            rows = {"DROPZONE_BACKEND": "postgres", "DROPZONE_DATABASE_URL": self.url}
        return {"DROPZONE_RAW_DIR": str(self.raw), **rows}

    def processed(self) -> int:
        return sum(len(files) for _, _, files in os.walk(self.home / "processed"))

    def check(self, rows: int, payloads: int) -> None:
        """Raise SystemExit unless all has been processed: `rows` from at least `payloads`."""
        if self.url:
            found = asyncio.run(_fetch(self.url, COUNT))
        else:
            with closing(sqlite3.connect(self.home / "rows")) as connection:
                [found] = connection.execute(COUNT).fetchone()
        left, moved = os.listdir(self.raw), self.processed()
        if left or found != rows or moved < payloads:
            raise SystemExit(
                f"{found} rows instead of {rows}, {moved} payloads processed instead of "
                f"{payloads}, {len(left)} still pending: {', '.join(left[:3])}"
            )


async def _fetch(url: str, sql: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def payload(second: int, values: int) -> tuple[bytes, bytes, bytes]:
    """Return, in parts, the example with so many values (its own, repeated) and another time."""
    before, behind = _around_time_stamp(values)
    return before, (FIRST + timedelta(seconds=second)).isoformat().encode(), behind


@cache
def _around_time_stamp(values: int) -> list[bytes]:
    example = json.loads((ingest.REPO / "data" / "payload.json").read_bytes())
    data = example["data"] * (values // len(example["data"]))
    return json.dumps({**example, "time_stamp": "@", "data": data}).encode().split(b"@")


def payload_bytes(values: int) -> int:
    return sum(map(len, payload(0, values)))


# ── Processing ────────────────────────────────────────────────────────────────────────────────────


def processing(case: Case, place: Place) -> Row:
    row = process(case.what, place)
    if case.backlog != EMPTY:
        files = case.backlog.payloads // case.backlog.batch  # at least
        place.check(case.backlog.payloads, files)
    return row


def process(what: str, place: Place) -> Row:
    """Run a command on a data folder; return the seconds and the bytes of memory that it took."""
    command, env = (sys.executable, *COMMANDS[what]), ingest.environment(**place.settings)
    log, peak, begun = place.home / "process.log", 0, time.perf_counter()
    with log.open("wb") as out:
        child = subprocess.Popen(command, cwd=place.home, env=env, stdout=out, stderr=out)
    ended = os.pidfd_open(child.pid)
    while not select([ended], [], [], POLL)[0]:
        peak = max(peak, memory_of(child.pid))
    seconds = time.perf_counter() - begun
    os.close(ended)
    if child.wait():
        raise SystemExit(f"{what} ends with {child.returncode}:\n{log.read_text()[-2000:]}")
    return seconds, peak


def memory_of(root: int) -> int:
    """Return the proportional set size of a process and its descendants, in bytes.

    It divides each page among the processes that have it, so that in the sum a page of shared
    memory, or one that a forked worker has not written to, counts once.
    """
    parents, total = {}, 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):  # it has ended
            stat = Path("/proc", name, "stat").read_text()
            parents[int(name)] = int(stat.rpartition(")")[2].split()[1])
    tree = [root]
    for pid in tree:
        tree += [child for child, parent in parents.items() if parent == pid]
        with suppress(OSError):
            rollup = Path("/proc", str(pid), "smaps_rollup").read_text()
            total += sum(map(int, re.findall(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)))
    return total * 1024


# ── Processing while devices send ─────────────────────────────────────────────────────────────────


def landing(case: Case, place: Place) -> Row:
    """Return requests/s, p99 ms, and the payloads/s processed meanwhile."""
    body = b"".join(payload(-1, SMALL))  # of a time of its own: one row, however often it is sent
    script = ingest.lua_script(place.home, "single", "application/json", body)
    settings = {**place.settings, "DROPZONE_SERVER_PORT": "0"}
    with ingest.started(place.home, SERVICE, **settings) as url, ThreadPoolExecutor(1) as pool:
        load = pool.submit(drive, ingest.Target(DROPZONE, url, script), case, place)
        while case.what == BESIDE and not load.done():
            process(DROPZONE, place)
        row = load.result()
    process(DROPZONE, place)
    place.check(case.backlog.payloads + 1, case.backlog.payloads + int(row[0] * LOAD_SECONDS))
    return row


def drive(target: ingest.Target, case: Case, place: Place) -> Row:
    latest = time.monotonic() + ingest.PATIENCE
    while case.what == BESIDE and not place.processed() and time.monotonic() < latest:
        time.sleep(POLL)  # the command starts
    before, begun = place.processed(), time.perf_counter()
    sample = ingest.drive(target, CONNECTIONS, LOAD_SECONDS)
    rate = (place.processed() - before) / (time.perf_counter() - begun)
    return sample.rate, sample.p99, rate


# ── Reporting ─────────────────────────────────────────────────────────────────────────────────────


def measure(
    folder: Path, urls: Urls, rounds: int, cases: list[Case], one: Callable[[Case, Place], Row]
) -> dict[Case, Row]:
    """Run everything in turn, `rounds` times, and return the medians."""
    rows = defaultdict[Case, list[Row]](list)
    for number, case in itertools.product(range(1, rounds + 1), cases):
        tell(f"round {number}: {case.backlog.name}, {case.backend}, {case.what}")
        rows[case].append(one(case, Place.fresh(folder, urls[case.backend], case.backlog)))
    tell("")
    return {case: tuple(map(statistics.median, zip(*rows[case], strict=True))) for case in cases}


def tell(text: str) -> None:
    print(f"\r{text}\033[K", end="", file=sys.stderr, flush=True)


def print_table(head: str, rows: dict[Case, str]) -> None:
    if rows:
        print(f"\n| backlog | backend | what | {head} |")
        print(f"|--:|:--|:--|{'--:|' * len(head.split('|'))}")
    for case, cells in rows.items():
        print(f"| {case.backlog.name} | {case.backend} | {case.what} | {cells} |")


def speed(found: dict[Case, Row], case: Case) -> str:
    """Return the cells of a row: of the whole command, and without its start."""
    start, (_, peak) = found[case._replace(backlog=EMPTY)][0], found[case]
    whole, rest = rates(found, case)
    of_whole = of_rest = ""
    prototype = case._replace(what=PROTOTYPE)
    if prototype in found:
        of_whole, of_rest = map(ingest.of, rates(found, prototype), (whole, rest))
    return f"{whole:,.0f} | {of_whole} | {start:.2f} | {rest:,.0f} | {of_rest} | {peak / 1e6:,.0f}"


def landing_cells(found: dict[Case, Row], case: Case) -> str:
    (rate, p99, processed), (alone, *_) = found[case], found[case._replace(what=ALONE)]
    return f"{rate:,.0f} | {rate / alone:.2f} | {p99:.1f} | {processed:,.0f}"


def rates(found: dict[Case, Row], case: Case) -> tuple[float, float]:
    """Return payloads/s, or MB/s of large ones: of the whole command, and without its start."""
    seconds, start = found[case][0], found[case._replace(backlog=EMPTY)][0]
    large = case.backlog.values == LARGE
    amount = case.backlog.payloads * (payload_bytes(LARGE) / 1e6 if large else 1)
    return amount / seconds, amount / (seconds - start) if seconds > start else math.nan


def run(args: argparse.Namespace, folder: Path, urls: Urls) -> None:
    small = [Backlog(int(size)) for size in args.sizes.split(",")]
    batches = [Backlog(args.batches, batch=ingest.BATCH)] if args.batches else []
    large = [Backlog(args.large, LARGE)] if args.large else []
    cases = [Case(*case) for case in itertools.product([EMPTY, *small, *large], urls, COMMANDS)]
    cases += [Case(*case) for case in itertools.product(batches, urls, [DROPZONE])]
    needed = sum(c.backlog.payloads * (payload_bytes(c.backlog.values) + BLOCK) for c in cases)
    if needed * args.rounds > shutil.disk_usage(folder).free:
        wrong = f"{needed * args.rounds / 1e9:.1f} GB are needed in {folder}"
        raise SystemExit(f"{wrong}: choose another --dir, fewer --rounds or smaller --sizes")
    processed = measure(folder, urls, args.rounds, cases, processing)
    cases = [Case(max(small), *case) for case in itertools.product(urls, (ALONE, BESIDE))]
    landed = measure(folder, urls, args.rounds, cases * args.ingest, landing)
    for backlogs, unit in ((small + batches, "payloads"), (large, "MB")):
        head = "{0}/s | of prototype | start s | {0}/s after it | of prototype | peak MB"
        rows = {case: speed(processed, case) for case in processed if case.backlog in backlogs}
        print_table(head.format(unit), rows)
    head = "requests/s | of alone | p99 ms | payloads/s processed"
    print_table(head, {case: landing_cells(landed, case) for case in landed})
    size, machine = payload_bytes(SMALL), ingest.machine(folder)
    print(f"\nMedians of {args.rounds}, {size:,} bytes a payload, on {machine}", end="")
    print("; PostgreSQL without fsync" if "postgres" in urls else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--sizes", default="20000,100000", help="of backlogs (20000,100000)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (3)")
    parser.add_argument("--dir", type=Path, help="make the temporary folder in this one")
    parser.add_argument("--backends", default="sqlite,postgres", help="(sqlite,postgres)")
    parser.add_argument("--batches", type=int, default=100_000, help="payloads in batches (100000)")
    parser.add_argument("--large", type=int, default=0, help="payloads of 1,000,000 values (0)")
    parser.add_argument("--ingest", action="store_true", help="process while devices send, too")
    args = parser.parse_args()
    if args.ingest:
        ingest.require_wrk()
    urls: Urls = dict.fromkeys(args.backends.split(","))
    if unknown := urls.keys() - {"sqlite", "postgres"}:
        raise SystemExit(f"no such backend: {', '.join(unknown)}")
    # Each run has a folder of its own, and all go at the very end: after many files were deleted,
    # ext4 is slow for minutes in creating new ones.
    temporary = tempfile.TemporaryDirectory(prefix="dropzone-benchmark-", dir=args.dir)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(temporary)).resolve()
        if "postgres" in urls:
            urls["postgres"] = stack.enter_context(closing(PostgresServer())).url()
        run(args, folder, urls)


if __name__ == "__main__":
    main()
