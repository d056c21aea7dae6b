"""How fast payloads are taken in: Dropzone beside handlers that promise less, in one run.

    python tests/benchmarks/ingest.py [--seconds 4] [--rounds 3] [--dir FOLDER]

Each figure is the median of the rounds. The disk under FOLDER is the one that is measured.
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
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import aiofiles
import aiohttp
import uvloop
from aiohttp import web
from uuid_utils.compat import uuid7

REPO = Path(__file__).resolve().parents[2]
BARE, AIOFILES, DROPZONE = "bare aiohttp", "aiohttp + aiofiles", "Dropzone"
BATCH = 100
NDJSON = f"{DROPZONE}, NDJSON of {BATCH}"
CONNECTIONS = (1, 16, 64, 256)
BATCH_CONNECTIONS = 16
PATIENCE = 30  # seconds for a server to start or to stop
# wrk prints for people; this is for us. Latencies are in microseconds.
LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "%s"
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
    script.write_text(LUA % (media_type, folder / f"{name}.body"))
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


def measure(folder: Path, seconds: int, rounds: int) -> None:
    """Drive everything in turn, `rounds` times, and print the table."""
    body = json.dumps(json.loads((REPO / "data" / "payload.json").read_bytes())).encode()
    single = lua_script(folder, "single", "application/json", body)
    batch = lua_script(folder, "batch", "application/x-ndjson", b"\n".join([body] * BATCH))
    config = folder / "dropzone.toml"
    config.write_text('[server]\nport = 0\n[storage]\nbackend = "memory"\n')
    own = str(Path(__file__).resolve())
    with ExitStack() as stack:

        def start(name: str, *command: str) -> str:
            home = folder / name
            home.mkdir()
            return stack.enter_context(started(home, *command))

        dropzone = start("dropzone", str(REPO / "dropzone.py"), "--config", str(config))
        singles = [
            Target(BARE, start("bare", own, "--serve", BARE), single),
            Target(AIOFILES, start("aiofiles", own, "--serve", AIOFILES), single),
            Target(DROPZONE, dropzone, single, durable=True),
        ]
        runs = [(connections, target) for connections in CONNECTIONS for target in singles]
        runs.append((BATCH_CONNECTIONS, Target(NDJSON, dropzone, batch, BATCH, durable=True)))
        samples = defaultdict[tuple[int, Target], list[Sample]](list)
        for number in range(1, rounds + 1):
            for connections, target in runs:
                print(
                    f"\rround {number}: {target.name}, {connections}\033[K", end="", file=sys.stderr
                )
                os.sync()  # nobody pays for what another has left to be written
                samples[connections, target].append(drive(target, connections, seconds))
        print("\r\033[K", end="", file=sys.stderr)
    print_table({run: median(found) for run, found in samples.items()})
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
            f"| {sample.rate / bare[connections]:.2f} | {'yes' if target.durable else 'no'} |"
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
