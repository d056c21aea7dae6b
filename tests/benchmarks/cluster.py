"""How fast archived payloads are proved: two workers of Dask beside the processes of one machine.

    python tests/benchmarks/cluster.py [--payloads 1000000] [--rounds 3] [--dir FOLDER] [--s3]

Each figure is the wall time of a whole `verify`, the start of the program included, in turns, all
on the same two cores; the ratio is that of the medians. The archive is a folder, or with `--s3` a
server of SeaweedFS, which needs a share of these cores, too.
Linux only: processes are kept on two cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from uuid import UUID

from ingest import REPO

sys.path.append(str(REPO))
sys.path.append(str(REPO / "tests"))
from dask_cluster import DaskCluster
from object_store import ObjectStore

from backends.raw.archive import Archive
from backends.raw.folders import Folders
from backends.raw.packs import Pack

DAY = datetime(2026, 1, 1, tzinfo=UTC)
PER_DAY = 250_000  # payloads, each of a millisecond of its own
VALUES = 10  # in a payload
CORES = 2


def payloads_of(day: datetime, count: int) -> Iterator[tuple[UUID, bytes]]:
    begin = int(day.timestamp() * 1000)
    for number in range(count):
        raw_id = UUID(int=(begin + number) << 80 | 7 << 76 | 2 << 62)
        at = (day + timedelta(milliseconds=number)).isoformat()
        data = [20 + (number * value % 97) / 7 for value in range(1, 1 + VALUES)]
        yield raw_id, json.dumps({"time_stamp": at, "data": data}).encode()


def archive(home: Path, url: str, count: int) -> None:
    """Make a data folder whose payloads are in the archive alone."""
    for name in ("raw", "rejected", "processed", "journal"):
        (home / "data" / name).mkdir(parents=True)
    for begin in range(0, count, PER_DAY):
        day = DAY + timedelta(days=begin // PER_DAY)
        path = home / "data" / "processed" / f"{day:%Y-%m-%d}.ndjson.gz"
        Pack.write(path, partial(payloads_of, day, min(PER_DAY, count - begin)))
    folders = Folders(home / "data" / "raw", archive=Archive(url), keep_local_days=1)
    for name in folders.to_archive():
        folders.archive_pack(name)
    assert not list((home / "data" / "processed").glob("*.gz"))


def seconds_of(home: Path, variables: dict[str, str], *command: str) -> float:
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, REPO / "dropzone.py", *command],
        cwd=home,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} has ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description="verify: two workers of Dask, or processes here")
    parser.add_argument("--payloads", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=Path)
    parser.add_argument("--s3", action="store_true")
    args = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=args.dir)))
        (home / "archive").mkdir()
        for name in ("config.toml", ".env"):  # else those beside the program would be read
            (home / name).touch()
        url, variables = f"file://{home}/archive", dict[str, str]()
        if args.s3:
            store = stack.enter_context(closing(ObjectStore()))
            url, variables = f"{store.url}/benchmark", store.variables
        os.environ.update(variables)
        archive(home, url, args.payloads)
        variables = {**variables, "DROPZONE_RAW_ARCHIVE": url}
        cluster = stack.enter_context(closing(DaskCluster()))
        for _ in range(CORES):
            cluster.add(variables)
        seconds_of(home, variables, "rebuild")
        ways = {"processes": [], "cluster": ["--cluster", cluster.address]}
        found = {way: list[float]() for way in ways}
        for _ in range(args.rounds):
            for way, options in ways.items():
                found[way].append(seconds_of(home, variables, "verify", *options))
    rates = {way: args.payloads / statistics.median(each) for way, each in found.items()}
    for way, rate in rates.items():
        times = ", ".join(f"{each:.1f}" for each in found[way])
        print(f"{way:>10}  {rate:>10,.0f} payloads/s  ({times} s)")
    print(f"{'ratio':>10}  {rates['cluster'] / rates['processes']:>10.2f}")


if __name__ == "__main__":
    main()
