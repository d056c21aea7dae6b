"""How fast payloads are taken in: Dropzone beside handlers that promise less, in one run.

    python tests/benchmarks/ingest.py [--seconds 4] [--rounds 3] [--dir FOLDER]

Each figure is the median of the rounds. The disk under FOLDER is the one that is measured, and one
sync of it beforehand, as that is what a payload that comes alone has to wait for.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import aiofiles
import aiohttp
import uvloop
from aiohttp import web
from uuid_utils.compat import uuid7

REPO = Path(__file__).resolve().parents[2]
BARE, AIOFILES, DROPZONE = "bare aiohttp", "aiohttp + aiofiles", "Dropzone"
ALL_ON = f"{DROPZONE}, with a key and a line of JSON for each request"
BATCH = 100
NDJSON, ARRAY = f"{DROPZONE}, NDJSON of {BATCH}", f"{DROPZONE}, arrays of {BATCH}"
KEY = "a-key-of-the-benchmark"
CONNECTIONS = (1, 16, 64, 256)
MANY = 64  # connections, at which Dropzone is compared with itself
BATCH_CONNECTIONS = 8
SYNCS = 200
PATIENCE = 30  # seconds for a server to start or to stop
# wrk prints for people; this is for us. Latencies are in microseconds.
LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "%s"
wrk.headers["x-api-key"] = "%s"
wrk.body = io.open("%s", "rb"):read("*a")
function done(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Target:
    """What is driven, and how."""

    name: str
    url: str
    script: Path
    payloads: int = 1  # in a request
    durable: bool = False


@dataclass(frozen=True)
class Sample:
    """What one run of wrk measured: requests/s, and milliseconds."""

    rate: float
    p50: float
    p99: float


# ── What Dropzone is compared with ────────────────────────────────────────────────────────────────


async def serve(kind: str, folder: Path) -> None:
    """Serve a handler that keeps nothing, or one that keeps no promise, until it is killed."""

    async def bare(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(status=202)

    async def plain_file(request: web.Request) -> web.Response:
        body = await request.read()
        async with aiofiles.open(folder / f"{uuid7()}.json", "wb") as file:
            await file.write(body)
        return web.Response(status=202)

    app = web.Application()
    app.router.add_post("/ingest", bare if kind == BARE else plain_file)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0]
    print(f"listening on http://{host}:{port}", flush=True)
    await asyncio.Event().wait()


def environment(**settings: str) -> dict[str, str]:
    """Return our environment with these settings of Dropzone's and no others."""
    ours = {name: text for name, text in os.environ.items() if not name.startswith("DROPZONE_")}
    return ours | settings


@contextmanager
def started(folder: Path, *command: str, **settings: str) -> Iterator[str]:
    """Run a server on a free port; give the address that its log names, and stop it afterwards."""
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            (sys.executable, *command),
            cwd=folder,
            env=environment(**settings),
            stdout=out,
            stderr=out,
        )
    try:
        yield address_in(log, process)
    finally:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def address_in(log: Path, process: subprocess.Popen[bytes]) -> str:
    for _ in range(PATIENCE * 20):
        if found := re.search(r"listening on (http://\S+:\d+)", log.read_text()):
            return found[1]
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
        break
    raise SystemExit(f"a server did not start:\n{log.read_text()}")


# ── Driving ───────────────────────────────────────────────────────────────────────────────────────


def require_wrk() -> None:
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is needed: apt install wrk, or brew install wrk")


def lua_script(folder: Path, name: str, media_type: str, body: bytes) -> Path:
    (folder / f"{name}.body").write_bytes(body)
    script = folder / f"{name}.lua"
    script.write_text(LUA % (media_type, KEY, folder / f"{name}.body"))
    return script


def drive(target: Target, connections: int, seconds: int) -> Sample:
    command = ("wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(target.script))
    done = subprocess.run(
        (*command, f"{target.url}/ingest"), capture_output=True, text=True, check=True
    )
    found = re.search(r"^RESULT (\d+) (\d+) (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    if found is None:
        raise SystemExit(f"wrk said nothing that can be read:\n{done.stdout}{done.stderr}")
    requests, duration, p50, p99, errors = map(int, found.groups())
    if errors or not requests:
        raise SystemExit(f"{target.name}: {errors} errors, {requests} answers:\n{done.stdout}")
    return Sample(requests / duration * 1e6, p50 / 1000, p99 / 1000)


def landed_by(url: str, media_type: str, body: bytes) -> int:
    """Land a body; return how many payloads it was."""
    with closing(HTTPConnection(url.removeprefix("http://"), timeout=PATIENCE)) as connection:
        connection.request("POST", "/ingest", body, {"Content-Type": media_type})
        return len(json.loads(connection.getresponse().read()).get("raw_ids", [None]))


def sync_milliseconds(folder: Path, size: int) -> float:
    """Return how long it takes to append so many bytes to a file and to sync it."""
    took = []
    with open(folder / "sync", "wb", buffering=0) as file:
        for _ in range(SYNCS):
            begun = time.perf_counter()
            file.write(bytes(size))
            os.fdatasync(file.fileno())
            took.append(1000 * (time.perf_counter() - begun))
    return statistics.median(took)


def runs_in(folder: Path, body: bytes, stack: ExitStack) -> Iterator[tuple[int, Target]]:
    """Start all servers; yield what is driven by how many connections."""
    config = folder / "dropzone.toml"
    config.write_text('[server]\nport = 0\n[storage]\nbackend = "memory"\n')
    own, service = str(Path(__file__).resolve()), (str(REPO / "dropzone.py"), "--config", config)

    def start(name: str, *command: str | Path, **settings: str) -> str:
        home = folder / name
        home.mkdir()
        return stack.enter_context(started(home, *map(str, command), **settings))

    dropzone = start("dropzone", *service)
    lines = {"DROPZONE_LOG_REQUESTS": "true", "DROPZONE_LOG_FORMAT": "json"}
    all_on = start("all-on", *service, DROPZONE_API_KEY=KEY, **lines)
    single = lua_script(folder, "single", "application/json", body)
    singles = [
        Target(BARE, start("bare", own, "--serve", BARE), single),
        Target(AIOFILES, start("aiofiles", own, "--serve", AIOFILES), single),
        Target(DROPZONE, dropzone, single, durable=True),
    ]
    for connections in CONNECTIONS:
        yield from ((connections, target) for target in singles)
        if connections == MANY:
            yield connections, Target(ALL_ON, all_on, single, durable=True)
    ndjson, array = b"\n".join([body] * BATCH), b"[%s]" % b",".join([body] * BATCH)
    for name, media_type, batch in (
        (NDJSON, "application/x-ndjson", ndjson),
        (ARRAY, "application/json", array),
    ):
        payloads = landed_by(dropzone, media_type, batch)
        script = lua_script(folder, name, media_type, batch)
        yield BATCH_CONNECTIONS, Target(name, dropzone, script, payloads, durable=True)


def measure(folder: Path, seconds: int, rounds: int) -> None:
    """Drive everything in turn, `rounds` times, and print the table."""
    body = json.dumps(json.loads((REPO / "data" / "payload.json").read_bytes())).encode()
    sync = sync_milliseconds(folder, len(body))
    with ExitStack() as stack:
        runs = list(runs_in(folder, body, stack))
        samples = defaultdict[tuple[int, Target], list[Sample]](list)
        for number in range(1, rounds + 1):
            for connections, target in runs:
                print(
                    f"\rround {number}: {target.name}, {connections}\033[K", end="", file=sys.stderr
                )
                os.sync()  # nobody pays for what another has left to be written
                samples[connections, target].append(drive(target, connections, seconds))
        print("\r\033[K", end="", file=sys.stderr)
    medians = {run: median(found) for run, found in samples.items()}
    print_table(medians)
    print_ratios({(connections, target.name): s for (connections, target), s in medians.items()})
    print(f"One sync of {len(body)} bytes takes {sync:.2f} ms.")
    print(f"\nMedians of {rounds} x {seconds} s, {len(body)} bytes a payload, on {machine(folder)}")


def median(samples: list[Sample]) -> Sample:
    columns = zip(*((s.rate, s.p50, s.p99) for s in samples), strict=True)
    return Sample(*map(statistics.median, columns))


def print_table(found: dict[tuple[int, Target], Sample]) -> None:
    bare = {run[0]: sample.rate for run, sample in found.items() if run[1].name == BARE}
    print("| connections | what | requests/s | payloads/s | p50 ms | p99 ms | of bare | durable |")
    print("|--:|:--|--:|--:|--:|--:|--:|:--|")
    for (connections, target), sample in found.items():
        print(
            f"| {connections} | {target.name} | {sample.rate:,.0f} "
            f"| {sample.rate * target.payloads:,.0f} | {sample.p50:.2f} | {sample.p99:.2f} "
            f"| {of(bare.get(connections), sample.rate)} | {'yes' if target.durable else 'no'} |"
        )


def of(whole: float | None, part: float) -> str:
    return f"{part / whole:.2f}" if whole else ""


def print_ratios(found: dict[tuple[int, str], Sample]) -> None:
    """Say what single payloads cost beside a handler that stores nothing, and what logs cost."""
    bare, plain, all_on = (found[MANY, name] for name in (BARE, DROPZONE, ALL_ON))
    print(
        f"\nWith {MANY} connections Dropzone answers {of(bare.rate, plain.rate)} of the requests "
        f"of {BARE}, p99 {plain.p99:.1f} ms where that has {bare.p99:.1f} ms; with a key and a "
        f"line of JSON for each request it answers {of(plain.rate, all_on.rate)} of those without. "
        f"With 1 connection p50 is {found[1, DROPZONE].p50:.2f} ms."
    )


def machine(folder: Path) -> str:
    """Name what was measured on, in a line."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*: (.+)", cpuinfo.read_text())):
        model = found[1]
    command = ("df", "--output=fstype", str(folder))
    df = subprocess.run(command, capture_output=True, text=True, check=False)
    kind = (df.stdout.split() or ["an unknown file system"])[-1]
    return (
        f"{os.cpu_count()} cores ({model}), {kind}, "
        f"Python {platform.python_version()}, aiohttp {aiohttp.__version__}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--seconds", type=int, default=4, help="that each run takes (4)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (3)")
    parser.add_argument("--dir", type=Path, help="make the temporary folder in this one")
    parser.add_argument("--serve", choices=[BARE, AIOFILES], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        uvloop.run(serve(args.serve, Path.cwd()))
        return
    require_wrk()
    folder = Path(tempfile.mkdtemp(prefix="dropzone-benchmark-", dir=args.dir)).resolve()
    try:
        measure(folder, args.seconds, args.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
