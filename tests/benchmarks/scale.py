"""What many nodes would need, and what breaks first: on paper, from what one machine does.

    python tests/benchmarks/scale.py [--sample 100000] [--payloads 1000000000] [--dir FOLDER] …

Sizes and rates are measured first: a sample of payloads with random values passes through a folder
and a PostgreSQL of its own, once alone and once in batches of 100. Rates are of seconds that a core
was at work, so that others on the machine falsify little; disks are taken to keep up with them. The
rates of landing are those that `ingest.py` prints, the share of them that is left beside processing
is that of `process.py --ingest`. All else is multiplication. The price list is Amazon's for S3
Standard in us-east-1 as of June 2025; give yours.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import asyncpg
import ingest
import psutil

sys.path += [str(ingest.REPO), str(ingest.REPO / "tests")]
from postgres_server import PostgresServer

import backends.raw.raw_ids
from backends import Measurement
from backends.postgres import PostgresBackend
from backends.raw.raw_ids import next_raw_id

SERVICE = str(ingest.REPO / "dropzone.py")
FIRST = datetime(2020, 1, 1, tzinfo=UTC)
BATCH = 100
FORMS = {"alone": 1, f"in batches of {BATCH}": BATCH}
NODES = (1, 10, 100)
WORKERS = (2, 16, 128)
DAY, YEAR = 86_400, 365  # seconds, days
AT_ONCE = 1000  # rows in an upsert
GB, TB = 1e9, 1e12
SIZES = """
SELECT pg_total_relation_size('measurements'), pg_indexes_size('measurements') """


@dataclass(frozen=True)
class Measured:
    """What one machine does with payloads of one form; bytes, and payloads a second of a core."""

    payload: float
    unpacked: float  # on the disk, for each payload
    files: float
    packed: float
    index: float  # beside a pack
    row: float  # with its indexes
    row_index: float
    process: float
    compact: float
    verify: float


# ── One machine ───────────────────────────────────────────────────────────────────────────────────


@cache
def _example() -> dict[str, list[float]]:
    return json.loads((ingest.REPO / "data" / "payload.json").read_bytes())


def body(number: int) -> bytes:
    """Return a payload like the example, whose values differ and so cannot be packed away."""
    example = _example()
    chance = random.Random(number)  # noqa: S311 (no secret)
    data = [round(chance.gauss(0, 1), len(str(abs(value))) - 2) for value in example["data"]]
    stamp = (FIRST + timedelta(seconds=number)).isoformat()
    return json.dumps({**example, "time_stamp": stamp, "data": data}).encode()


def land(raw: Path, sample: int, batch: int) -> None:
    """Put payloads where they wait, as landing does, which has its own benchmark."""
    raw.mkdir()
    last = UUID(int=0)
    with days_ago(2):
        for start in range(0, sample, batch):
            last = next_raw_id(last, batch if batch > 1 else 0)
            name = f"{last}.{batch}.ndjson" if batch > 1 else f"{last}.json"
            (raw / name).write_bytes(b"\n".join(map(body, range(start, start + batch))))


@contextlib.contextmanager
def days_ago(days: int) -> Iterator[None]:
    """Let raw_ids be of a day that has finished, as only such a day is packed."""
    clock = time.time_ns
    earlier = SimpleNamespace(time_ns=lambda: clock() - days * DAY * 10**9)
    backends.raw.raw_ids.time = earlier
    try:
        yield
    finally:
        backends.raw.raw_ids.time = time


def seconds_of(command: str, settings: dict[str, str]) -> float:
    """Run a command; return how long it, and processes that it started, kept a core at work."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, SERVICE, command]
    done = subprocess.run(
        line, env=ingest.environment(**settings), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{command} ends with {done.returncode}:\n{done.stdout}{done.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def on_disk(folder: Path) -> tuple[int, int]:
    """Return the bytes of the disk and the files below a folder."""
    found = [os.lstat(file) for file in folder.rglob("*") if file.is_file()]
    return sum(stat.st_blocks * 512 for stat in found), len(found)


def measure(folder: Path, url: str, sample: int, batch: int) -> Measured:
    folder.mkdir()
    settings = {"DROPZONE_RAW_DIR": str(folder / "raw"), "DROPZONE_DATABASE_URL": url}
    asyncio.run(_fetch(url, "DROP TABLE IF EXISTS measurements"))
    land(folder / "raw", sample, batch)
    sizes = [file.stat().st_size for file in (folder / "raw").iterdir()]
    process = seconds_of("process", settings)
    start = seconds_of("process", settings)  # nothing is left
    unpacked, files = on_disk(folder / "processed")
    row, row_index = asyncio.run(_fetch(url, SIZES))
    compact = seconds_of("compact", settings)
    [pack], [index] = (list((folder / "processed").glob(f"*{end}")) for end in (".gz", ".index"))
    verify = seconds_of("verify", settings)
    rates = [sample / (seconds - start) for seconds in (process, compact, verify)]
    each = [sum(sizes), unpacked, files, pack.stat().st_size, index.stat().st_size, row, row_index]
    return Measured(*(part / sample for part in each), *rates)


async def _fetch(url: str, sql: str) -> Sequence[int]:
    connection = await asyncpg.connect(url)
    try:
        return tuple(await connection.fetchrow(sql) or ())
    finally:
        await connection.close()


async def upserts(url: str, rows: int) -> float:
    """Return how many rows a core of the database takes in a second, in calls of a thousand."""
    async with asyncpg.create_pool(url, min_size=1, max_size=1, statement_cache_size=0) as pool:
        backend = PostgresBackend(pool=pool)
        await backend.open()
        server = psutil.Process(await pool.fetchval("SELECT pg_backend_pid()"))
        before = server.cpu_times()
        for start in range(0, rows, AT_ONCE):
            moments = (FIRST + timedelta(days=3650, seconds=start + n) for n in range(AT_ONCE))
            await backend.upsert([Measurement(moment, 0.5, 0.1, uuid4()) for moment in moments])
        after = server.cpu_times()
    return rows / (after.user + after.system - before.user - before.system)


# ── Many ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Need:
    """What so many payloads a day need on so many nodes, of each where not said otherwise."""

    one: Measured
    args: argparse.Namespace
    nodes: int
    batch: int

    @property
    def share(self) -> float:
        """Payloads a day of one node."""
        return self.args.payloads / self.nodes

    @property
    def landed(self) -> float:
        """Of what a node can land beside processing, the part that arrives at the peak."""
        can = self.args.land_alone if self.batch == 1 else self.args.land_batches
        return self.share / DAY * self.args.peak / (can * self.args.beside)

    @property
    def files(self) -> float:
        """Unpacked at most: those of yesterday are packed while those of today arrive."""
        return 2 * self.share * self.one.files

    @property
    def unpacked(self) -> float:
        return 2 * self.share * self.one.unpacked

    @property
    def packed(self) -> float:
        """Bytes of the packs of a day, and of their indexes."""
        return self.share * (self.one.packed + self.one.index)

    @property
    def objects(self) -> int:
        """In the store, of a day of all nodes; each has an index beside it."""
        return 2 * self.nodes * math.ceil(self.share * self.one.packed / self.args.part)

    @property
    def reads(self) -> int:
        """Requests of a day of all nodes that read back what was put there."""
        return self.objects // 2 * (math.ceil(self.args.part / self.args.piece) + 1)

    @property
    def requests_price(self) -> float:
        return (self.objects * self.args.put + self.reads * self.args.get) / 1000

    @property
    def stored_price(self) -> float:
        """Of a month, when a year lies there."""
        return self.packed * self.nodes * YEAR / GB * self.args.month

    def limits(self, upserts: float) -> list[tuple[float, str]]:
        """Return what ends, and after how many days, the earliest first."""
        args, one = self.args, self.one
        rows = args.payloads / DAY * args.peak
        local = args.disk - self.unpacked
        kept = args.keep_local_days * self.packed
        found = [
            (0 if self.landed > 1 else math.inf, "landing at the peak"),
            (0 if self.share / DAY > one.process * args.cores else math.inf, "processing"),
            (1 if self.share / DAY > one.compact else math.inf, "packing a day within a day"),
            (args.disk / 16384 / (self.files / 2), "inodes of a node"),
            (0 if rows > upserts * args.database_cores else math.inf, "upserts at the peak"),
            (args.database_memory / (args.payloads * one.row_index), "rows' index in memory"),
            (args.database_disk / (args.payloads * one.row), "disk of one PostgreSQL"),
            (
                (args.disk / (self.unpacked / 2))
                if local < 0
                else (local / self.packed if kept > local else math.inf),
                "disk of a node",
            ),
        ]
        # Files that are packed in time never fill the table of inodes.
        return sorted(
            (days, what)
            for days, what in found
            if days < math.inf and not (what.startswith("inodes") and days >= 2)
        )


def amount(value: float) -> str:
    for size, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:,.3g}{name}"
    return f"{value:,.3g}"


def duration(seconds: float) -> str:
    for size, name in ((DAY, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {name}"
    return f"{seconds:.0f} s"


def when(days: float) -> str:
    return "at once" if days == 0 else f"after {duration(days * DAY)}"


def table(head: str, rows: Sequence[Sequence[object]]) -> None:
    columns = head.split(" | ")
    print(f"\n| {head} |\n|:--|{'--:|' * (len(columns) - 1)}")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def print_measured(ones: dict[str, Measured], upserts: float) -> None:
    facts: dict[str, Callable[[Measured], str]] = {
        "bytes of a payload": lambda one: f"{one.payload:,.0f}",
        "bytes of the disk until it is packed": lambda one: f"{one.unpacked:,.0f}",
        "files": lambda one: f"{one.files:g}",
        "bytes in a pack": lambda one: f"{one.packed:,.0f}",
        "bytes in the index of a pack": lambda one: f"{one.index:,.1f}",
        "bytes of a row, with its index": lambda one: f"{one.row:,.0f}",
        "processed each second by one core": lambda one: f"{one.process:,.0f}",
        "packed each second by one core": lambda one: f"{one.compact:,.0f}",
        "verified each second by one core": lambda one: f"{one.verify:,.0f}",
    }
    rows = [[name, *map(show, ones.values())] for name, show in facts.items()]
    table("of one payload, one machine | " + " | ".join(ones), rows)
    print(f"\nA core of PostgreSQL upserts {upserts:,.0f} rows each second.")


def print_needs(ones: dict[str, Measured], upserts: float, args: argparse.Namespace) -> None:
    needs = {
        (f"{nodes}, {form}"): Need(ones[form], args, nodes, batch)
        for form, batch in FORMS.items()
        for nodes in NODES
    }
    table(
        "nodes | payloads/s at the peak, each | of landing | files | disk until packed, B "
        "| packs of a day, B",
        [
            [
                name,
                f"{need.share / DAY * args.peak:,.0f}",
                f"{need.landed:.0%}",
                *map(amount, (need.files, need.unpacked, need.packed)),
            ]
            for name, need in needs.items()
        ],
    )
    table(
        "nodes | objects a day | requests a day | price of requests a day | stored in a year, B "
        "| price of a month then",
        [
            [
                name,
                f"{need.objects:,}",
                f"{need.objects + need.reads:,}",
                f"${need.requests_price:,.2f}",
                amount(need.packed * need.nodes * YEAR),
                f"${need.stored_price:,.0f}",
            ]
            for name, need in needs.items()
        ],
    )
    table(
        "nodes | breaks first | when | then | when",
        [
            [name, *first_two([(what, when(days)) for days, what in need.limits(upserts)])]
            for name, need in needs.items()
        ],
    )
    rows = [
        [form, *(amount(args.payloads * n) for n in (1, one.row, YEAR, YEAR * one.row))]
        for form, one in ones.items()
    ]
    table("rows | of a day | B | of a year | B", rows)
    heads = " | ".join(f"{days} on {w} cores" for days in ("a day", "a year") for w in WORKERS)
    rows = [
        [form]
        + [
            duration(args.payloads * days / (one.verify * workers))
            for days in (1, YEAR)
            for workers in WORKERS
        ]
        for form, one in ones.items()
    ]
    table(f"`verify` of | {heads}", rows)


def first_two(limits: list[tuple[str, str]]) -> list[str]:
    return [text for limit in [*limits, ("nothing", ""), ("nothing", "")][:2] for text in limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    add = parser.add_argument
    add("--sample", type=int, default=100_000, help="payloads that are measured (100000)")
    add("--payloads", type=float, default=1e9, help="a day, of all nodes (1e9)")
    add("--peak", type=float, default=2, help="how much more than the mean arrives at most (2)")
    add("--land-alone", type=float, default=12_371, help="payloads/s, by ingest.py (12371)")
    add("--land-batches", type=float, default=72_258, help="payloads/s, by ingest.py (72258)")
    add("--beside", type=float, default=0.71, help="left beside processing, by process.py (0.71)")
    add("--disk", type=float, default=4 * TB, help="bytes of a node (4e12)")
    add("--keep-local-days", type=float, default=7, help="packs stay on a node (7)")
    add("--cores", type=int, default=2, help="of a node, as where landing was measured (2)")
    add("--database-cores", type=int, default=8, help="of one PostgreSQL (8)")
    add("--database-disk", type=float, default=16 * TB, help="bytes of one PostgreSQL (16e12)")
    add("--database-memory", type=float, default=256 * GB, help="bytes of it (256e9)")
    add("--part", type=int, default=2**25, help="bytes of a pack in one object (33554432)")
    add("--piece", type=int, default=2**22, help="bytes that one request reads back (4194304)")
    add("--put", type=float, default=0.005, help="dollars for 1,000 PUT (0.005)")
    add("--get", type=float, default=0.0004, help="dollars for 1,000 GET (0.0004)")
    add("--month", type=float, default=0.023, help="dollars for a GB and month (0.023)")
    add("--dir", type=Path, help="make the temporary folder in this one")
    args = parser.parse_args()
    args.sample -= args.sample % AT_ONCE
    temporary = tempfile.TemporaryDirectory(prefix="dropzone-benchmark-", dir=args.dir)
    with temporary as name, closing(PostgresServer()) as server:
        folder = Path(name).resolve()
        ones = {
            form: measure(folder / str(batch), server.url(), args.sample, batch)
            for form, batch in FORMS.items()
        }
        rate = asyncio.run(upserts(server.url(), args.sample))
        print(f"{amount(args.payloads)} payloads a day, {args.peak:g} times the mean at the peak.")
        print(f"Measured with {args.sample:,} payloads on {ingest.machine(folder)}.")
    print_measured(ones, rate)
    print_needs(ones, rate, args)


if __name__ == "__main__":
    main()
