"""Ways to run: in the background, under `--watch`, through outages, and in worker processes."""

import asyncio
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import struct
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import aiohttp
import asyncpg
import power_cut
import pytest
import test_processing
from hypothesis import given, settings
from hypothesis import strategies as st
from postgres_server import PostgresServer
from power_cut import GONE, Service, children_of, state_of, wait_for
from stores import land_each
from test_cli import LINE, OK, PATIENCE, Program, Server
from test_http import Outage
from test_processing import (
    Failing,
    Folder,
    Recording,
    Slow,
    arrival,
    batch_at,
    body,
    processor_of,
    rows_of,
)

import dropzone
from backends import Backend
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.postgres_statements import CREATE_ONE
from backends.raw.days import earliest_names

folder, program, own = test_processing.folder, test_processing.program, test_processing.own
OFTEN = {"DROPZONE_PROCESS_EVERY": 0.05}
AGAIN = "next try within "


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def processing(folder: Folder, backend: Backend, batch: int = 10) -> AsyncIterator[None]:
    """Process in the background, as the server and `--watch` do."""
    processor = processor_of(folder.store, backend, batch)
    task = asyncio.create_task(processor.process_forever(0.01))
    try:
        yield
        assert not task.done()
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await processor.close()
        await backend.close()


def watching(program: Program, **variables: object):
    """Start `process --watch`; return when it would notice a signal."""
    process = program.start("process", "--watch", **variables)

    def catches_sigterm() -> int:
        status = Path(f"/proc/{process.pid}/status").read_text()
        [caught] = re.findall(r"SigCgt:\s*(\w+)", status)
        return int(caught, 16) >> (signal.SIGTERM - 1) & 1

    wait_for(catches_sigterm)
    return process


def stopped(process, how: signal.Signals = signal.SIGTERM) -> str:
    """End a program with a signal; return its log."""
    process.send_signal(how)
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, out) == (OK, b""), err
    return err.decode()


def wait_until_told(program: Program) -> None:
    """Wait until whoever was at work on the folder has let go of it, and has said what it did."""
    assert json.loads(program.run("process").stdout)["checked"] == 0


def processed_as_told(log: str) -> int:
    return sum(map(int, re.findall(r"processed (\d+), rejected", log)))


# ── In the server ─────────────────────────────────────────────────────────────────────────────────


def test_server_that_processes_by_itself(program: Program):
    """With `process.every` rows appear without a POST /process, again and again."""
    server = Server(program, **OFTEN)
    for second in range(3):
        raw_id = server.json("POST", "/ingest", body(second))["raw_id"]
        wait_for(lambda path=f"/raw/{raw_id}": server.json("GET", path)["measurement"])
    server.json("POST", "/ingest", b"[]")
    wait_for(lambda: server.json("GET", "/rejected")["total"] == 1)
    assert server.stop() == OK
    assert "Traceback" not in server.log


def test_server_does_not_process_by_itself(program: Program):
    """By default nothing is processed before somebody asks for it."""
    server = Server(program)
    raw_id = server.json("POST", "/ingest", LINE)["raw_id"]
    for _ in range(200):
        assert server.json("GET", f"/raw/{raw_id}")["state"] == "pending"
    assert server.json("POST", "/process")["processed"] == 1
    assert server.stop() == OK


async def test_background_survives_a_defect(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """An error that nobody foresaw is logged with its traceback, and processing goes on."""
    monkeypatch.setattr(dropzone, "LONGEST_PAUSE", 0.05)
    folder.fill(30)
    async with processing(folder, Failing(RuntimeError("a bug"), {0, 1, 3})):
        await until(lambda: folder.states() == {"processed": 30})
    records = [record for record in caplog.records if AGAIN in record.getMessage()]
    assert [str(record.exc_info[1]) for record in records] == ["a bug"] * 3


async def test_background_survives_a_failing_disk(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A data folder that is away for a while stops nothing for good."""
    monkeypatch.setattr(dropzone, "LONGEST_PAUSE", 0.05)
    folder.fill(3)
    raw = folder.place / "raw"
    away = raw.rename(folder.place / "away")
    async with processing(folder, MemoryBackend()):
        await until(lambda: caplog.text.count(AGAIN) >= 2)
        away.rename(raw)
        await until(lambda: folder.states() == {"processed": 3})


# ── process --watch ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.linux
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_watch(program: Program, how: signal.Signals):
    """`process --watch` needs no server, takes what lands later, and ends in order on a signal."""
    process = watching(program, **OFTEN)
    for count in (1, 2):
        assert program.run("ingest", "-", stdin=LINE).returncode == OK
        wait_for(lambda count=count: len(program.payloads("processed")) == count)
    wait_until_told(program)
    log = stopped(process, how)
    assert processed_as_told(log) == 2
    assert "Traceback" not in log
    assert program.payloads() == {}


@pytest.mark.linux
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_watch_stopped_at_work(
    folder: Folder, program: Program, own: dict[str, str], how: signal.Signals
):
    """A signal in the middle of an upsert leaves its payloads pending; the next run goes on."""
    raw_ids = folder.fill(3)
    waits = own | OFTEN | {"DROPZONE_BACKEND": "own_backends:Waits"}
    process = watching(program, **waits)
    wait_for((program.home / "waiting").exists)
    assert "Traceback" not in stopped(process, how)
    assert folder.names("raw") == raw_ids
    assert json.loads(program.run("process").stdout)["processed"] == 3


@pytest.mark.linux
def test_watch_beside_a_server(folder: Folder, program: Program):
    """A server that processes and two watching programs on one folder do everything once."""
    server = Server(program, **OFTEN)
    processes = [watching(program, **OFTEN) for _ in range(2)]
    lines, kind = b"\n".join(map(body, range(20))), "application/x-ndjson"
    raw_ids = [
        UUID(raw_id)
        for _ in range(25)
        for raw_id in server.json("POST", "/ingest", lines, Content_Type=kind)["raw_ids"]
    ]
    wait_for(lambda: not folder.names("raw"))
    wait_until_told(program)
    logs = list(map(stopped, processes))
    assert server.stop() == OK
    assert sum(map(processed_as_told, [server.log, *logs])) == len(raw_ids)
    assert folder.names("processed") == raw_ids


# ── While the backend is away ─────────────────────────────────────────────────────────────────────


async def test_growing_pauses(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """While the backend is away the tries become rarer, up to a limit; then it goes on by itself.

    Everything stays pending meanwhile, and once all is well the pauses are short again.
    """
    monkeypatch.setattr(dropzone, "LONGEST_PAUSE", 1.5)
    raw_ids = folder.fill(5)
    backend = Outage()
    with caplog.at_level(logging.WARNING):
        async with processing(folder, backend):
            await until(lambda: caplog.text.count(AGAIN) == 3)
            assert re.findall(rf"{AGAIN}(\d+) s", caplog.text) == ["1", "2", "2"]
            assert "the database does not answer" in caplog.text
            assert folder.names("raw") == raw_ids
            backend.down = False
            for number in range(5):
                await until(lambda: not folder.names("raw"))
                folder.put(arrival(10 + number), body())
    assert folder.states() == {"processed": 9, "raw": 1}
    assert caplog.text.count(AGAIN) == 3


@pytest.mark.linux
@pytest.mark.usefixtures("postgres_url")
async def test_postgres_restarted_again_and_again(
    folder: Folder, program: Program, postgres_server: PostgresServer
):
    """PostgreSQL restarts five times under `process --watch` while payloads land: none is lost."""
    url = {"DROPZONE_DATABASE_URL": postgres_server.url()}
    process = await asyncio.to_thread(watching, program, **url, **OFTEN)
    landed: list[UUID] = []

    async def ingest() -> None:
        while True:
            landed.extend(await land_each(folder.store, [body(len(landed), len(landed))]))
            await asyncio.sleep(0.005)

    ingesting = asyncio.create_task(ingest())
    for _ in range(5):
        before = len(folder.names("processed"))
        await until(lambda before=before: len(folder.names("processed")) > before)
        await asyncio.to_thread(postgres_server.stop)
        try:
            while AGAIN not in (
                line := (await asyncio.to_thread(process.stderr.readline)).decode()
            ):
                assert line, "the program has ended"
        finally:
            await asyncio.to_thread(postgres_server.start)
    ingesting.cancel()
    with suppress(asyncio.CancelledError):
        await ingesting
    await folder.store.close()
    await until(lambda: not folder.names("raw"))
    log = await asyncio.to_thread(stopped, process)
    assert set(landed) <= set(folder.names("processed"))
    assert folder.states().keys() == {"processed"}
    backend = PostgresBackend(postgres_server.url())
    rows = await rows_of(backend)
    await backend.close()
    assert {raw_id: mean for mean, raw_id in rows.values()}.items() >= {
        raw_id: float(number) for number, raw_id in enumerate(landed)
    }.items()
    assert "Traceback" not in log


# Troubles of a PostgreSQL in three steps: its address, then the trouble begins, then it is over.


async def _locked_table(url: str) -> AsyncIterator[str]:
    """Somebody locks the table, and the server cancels what takes longer than 100 ms."""
    connection = await asyncpg.connect(url)
    yield f"{url}?statement_timeout=100"
    async with connection.transaction():
        await connection.execute("LOCK TABLE measurements IN EXCLUSIVE MODE")
        yield url
    await connection.close()
    yield url


async def _no_connection_left(url: str) -> AsyncIterator[str]:
    """The server breaks the connections of a user, and has none left for it."""
    connection = await asyncpg.connect(url)
    await connection.execute(CREATE_ONE)
    await connection.execute("CREATE ROLE many LOGIN PASSWORD 'p'")
    await connection.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON measurements TO many")
    yield re.sub("//.*@", "//many:p@", url)
    await connection.execute("ALTER ROLE many CONNECTION LIMIT 0")
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'many'"
    )
    yield url
    await connection.execute("ALTER ROLE many CONNECTION LIMIT -1")
    yield url
    await connection.execute("DROP OWNED BY many")
    await connection.execute("DROP ROLE many")
    await connection.close()


async def _connections_that_are_reset(url: str) -> AsyncIterator[str]:
    """Something on the way resets every connection in the middle of what it says."""
    [port], resetting = re.findall(r":(\d+)/", url), False

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int) -> None:
        passed = 0
        with suppress(ConnectionError):
            while (data := await reader.read(512)) and not (resetting and passed > most):
                writer.write(data)
                passed += len(data)
        writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = writer.get_extra_info("socket")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        answers, server = await asyncio.open_connection("127.0.0.1", int(port))
        await asyncio.gather(pump(reader, server, 700), pump(answers, writer, 1 << 30))

    between = await asyncio.start_server(relay, "127.0.0.1", 0)
    yield url.replace(f":{port}/", f":{between.sockets[0].getsockname()[1]}/")
    resetting = True
    yield url
    resetting = False
    yield url
    between.close()


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (_locked_table, "statement timeout"),
        (_no_connection_left, "too many connections"),
        (_connections_that_are_reset, "connection was closed"),
    ],
)
async def test_postgres_in_trouble(
    folder: Folder,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: Callable[[str], AsyncIterator[str]],
    told: str,
):
    """Trouble that is not the data's fault rejects nothing; when it is over, all become rows."""
    monkeypatch.setattr(dropzone, "LONGEST_PAUSE", 0.1)
    steps = trouble(postgres_url)
    backend = PostgresBackend(await anext(steps))
    folder.fill(10)
    async with processing(folder, backend, 40):
        await until(lambda: folder.states() == {"processed": 10})
        await anext(steps)
        for number in range(10, 70):
            folder.put(arrival(number), body(number))
        await until(lambda: len(re.findall(f"{AGAIN}.*{told}", caplog.text)) >= 3)
        assert folder.states() == {"processed": 10, "raw": 60}
        await anext(steps)
        await until(lambda: folder.states() == {"processed": 70})
        assert await backend.count() == 70
    async for _ in steps:
        pass


# ── Worker processes ──────────────────────────────────────────────────────────────────────────────


def long_run(number: int) -> bytes:
    """Return the payload of a backlog with late arrivals and some that are bad."""
    return b"bad" if number % 50 == 7 else body(number % 400, number, -number / 7)


@pytest.fixture
def no_short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give all work to the worker processes."""
    monkeypatch.setattr(dropzone, "SHORT", 0)


async def test_workers_make_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The worker processes make the same rows, rejections and folders as the thread does."""
    outcomes = []
    for short in (1000, 0):
        monkeypatch.setattr(dropzone, "SHORT", short)
        folder, backend = await Folder(tmp_path / str(short)).opened(), MemoryBackend()
        folder.fill(1200, long_run)
        processor = processor_of(folder.store, backend, 50)
        result = await processor.process(1100)
        workers = multiprocessing.active_children()
        await processor.close()
        assert bool(workers) == (short == 0)
        assert not any(worker.is_alive() for worker in workers)
        reasons = {(reason.raw_id, reason.code, reason.detail) for reason in result.rejected}
        names = [folder.names(state) for state in ("raw", "processed", "rejected")]
        counts = (result.processed, result.failed, result.checked, result.remaining)
        outcomes.append((counts, reasons, names, await rows_of(backend)))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == (1078, 22, 1100, 100)


@pytest.mark.usefixtures("no_short_runs")
async def test_a_worker_that_is_killed(folder: Folder):
    """A worker that is killed costs its call a second try: nothing is lost, and the run ends."""
    raw_ids = folder.fill(600)
    backend = Slow()
    processor = processor_of(folder.store, backend, 10)
    running = asyncio.create_task(processor.process())
    await backend.entered.wait()
    await until(lambda: bool(multiprocessing.active_children()))
    multiprocessing.active_children()[0].kill()
    backend.go.set()
    result = await running
    await processor.close()
    assert (result.processed, result.remaining) == (600, 0)
    assert folder.names("processed") == raw_ids
    assert await backend.count() == 600


async def test_what_cannot_be_sent_costs_no_worker():
    """A call whose arguments cannot travel raises, and its process is there for the next one."""
    workers = dropzone.Workers(1)
    before = await workers.run(os.getpid)
    with pytest.raises(TypeError):
        await workers.run(print, threading.Lock())
    assert await workers.run(os.getpid) == before
    await workers.close()


def workers_of(service: Service) -> list[int]:
    """Return the processes below a service that are nicer than it is."""
    mine = os.getpriority(os.PRIO_PROCESS, service.process.pid)
    with suppress(ProcessLookupError):
        children = children_of(service.process.pid)
        return [pid for pid in children if os.getpriority(os.PRIO_PROCESS, pid) == mine + 10]
    return []


@pytest.mark.parametrize("at_work", [True, False])
async def test_workers_end_with_their_parent(tmp_path: Path, *, at_work: bool):
    """Workers are nice, and end with a service that is killed, at work or not; nothing is lost."""
    folder = await Folder(tmp_path / "data").opened()
    raw_ids = folder.fill(1500)
    source = power_cut.program(tmp_path / "program", SHORT=0)
    service = Service(folder.place, tmp_path, source, DROPZONE_PROCESS_BATCH="20")
    try:
        async with aiohttp.ClientSession(service.url) as session:
            call = asyncio.create_task(session.post("/process"))
            if not at_work:
                assert (await (await call).json())["processed"] == 1500
            await until(lambda: workers_of(service) and (call.done() or folder.names("processed")))
            children = children_of(service.process.pid)
            service.process.kill()
            with suppress(aiohttp.ClientError):
                await call
        await until(lambda: all(state_of(pid) in GONE for pid in children))
    finally:
        service.kill()
    assert folder.states().total() == 1500
    result = await processor_of(folder.store, MemoryBackend(), 1000).process()
    assert result.remaining == 0
    assert folder.names("processed") == raw_ids


# ── How much at a time ────────────────────────────────────────────────────────────────────────────

LARGE = body(0, *(number / 7 for number in range(150_000)))


async def test_large_payloads_in_portions(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    """Payloads of megabytes are read a few at a time, in order, and none is skipped."""
    monkeypatch.setattr(dropzone, "PORTION_BYTES", 2 * len(LARGE) - 1000)
    monkeypatch.setattr(dropzone, "SHORT", 1000)
    raw_ids = folder.fill(10, lambda number: b"bad" if number == 3 else LARGE)
    backend = Recording()
    result = await processor_of(folder.store, backend, 7).process()
    assert (result.processed, result.failed, result.remaining) == (9, 1, 0)
    ids = [raw_id for raw_id in raw_ids if raw_id != arrival(3)]
    assert backend.batches == [ids[0:2], ids[2:4], ids[4:6], ids[6:8], ids[8:]]


async def test_large_payloads_in_workers(tmp_path: Path):
    """Worker processes split batches of large payloads as well, and skip none."""
    folder = await Folder(tmp_path / "data").opened()
    raw_ids = folder.fill(14, lambda number: LARGE if number % 3 else body(number))
    source = power_cut.program(tmp_path / "program", SHORT=0, PORTION_BYTES=len(LARGE) // 2)
    service = Service(folder.place, tmp_path, source, DROPZONE_PROCESS_BATCH="6")
    try:
        async with aiohttp.ClientSession(service.url) as session:
            result = await (await session.post("/process")).json()
            rows = await (await session.get("/measurements")).json()
    finally:
        service.kill()
    assert (result["processed"], result["failed"], result["remaining"]) == (14, 0, 0)
    assert folder.names("processed") == raw_ids
    assert [row["raw_id"] for row in rows["measurements"]] == [
        str(arrival(number)) for number in (13, 3, 6, 9, 12)
    ]


@pytest.mark.parametrize("limit", [None, 45, 7, 8])
@pytest.mark.parametrize("short", [0, 1000])
async def test_more_than_a_window(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, limit: int | None, short: int
):
    """A backlog larger than what is listed at a time is processed whole, each payload once.

    What is worth no worker processes is processed in order of arrival.
    """
    monkeypatch.setattr(dropzone, "WINDOW", 7)
    monkeypatch.setattr(dropzone, "SHORT", short)
    raw_ids = folder.fill(50)
    backend = Recording()
    processor = processor_of(folder.store, backend, 5)
    result = await processor.process(limit)
    await processor.close()
    count = limit or 50
    assert (result.processed, result.remaining) == (count, 50 - count)
    assert folder.names("raw") == raw_ids[count:]
    in_order = [raw_id for batch in backend.batches for raw_id in batch]
    assert (in_order if short else sorted(in_order)) == raw_ids[:count]


alone = (st.uuids() | st.integers(0, 9).map(arrival)).map(lambda raw_id: (raw_id, 0))
batches = st.tuples(st.integers(0, 9), st.integers(1, 3)).map(lambda b: (batch_at(*b), b[1]))


@settings(max_examples=150, deadline=None)
@given(
    st.lists(alone | batches, max_size=30, unique=True),
    st.integers(1, 12) | st.just(1 << 60),
    st.integers(0, 30),
)
def test_earliest(files: list[tuple[UUID, int]], limit: int, behind: int):
    """Listing a folder gives the first so many files behind another one, as sorting all does.

    And the number of all payloads that are behind it.
    """
    with TemporaryDirectory() as name:
        payloads = dict[str, int]()
        for raw_id, count in files:
            names = [f"{raw_id}.{count}.ndjson" if count else f"{raw_id}.json"]
            (Path(name) / f"{raw_id}.reason.json").touch()
            (Path(name) / f"{raw_id}.4.ndjson").touch()  # which is not how many it has
            (Path(name) / names[0]).touch()
            payloads[names[0]] = count or 1
        ordered = sorted(payloads)
        after = ordered[behind] if behind < len(ordered) else ""
        expected = [each for each in ordered if each > after]
        count = sum(payloads[each] for each in expected)
        assert earliest_names(Path(name), limit, after) == (expected[:limit], count)


def test_listing_holds_few_names(tmp_path: Path):
    """Listing the first of thousands of payloads takes no more memory than listing a few."""
    for number in range(6000):
        (tmp_path / f"{arrival(number)}.json").touch()
    peaks = []
    for limit in (10, 6000):
        tracemalloc.start()
        names = [f"{arrival(number)}.json" for number in range(limit)]
        assert earliest_names(tmp_path, limit) == (names, 6000)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] < peaks[1] / 20


async def test_a_large_backlog_is_shared_from_the_start(folder: Folder, program: Program):
    """For much that is pending the command forks itself, and what it has forked ends with it."""
    count = 3 * dropzone.MUCH
    folder.fill(count, lambda number: body(number, number))
    process = program.start("process", DROPZONE_PROCESS_BATCH=10)
    own, forked = power_cut.command_of(process.pid), list[int]()
    while len(forked) < dropzone.WORKERS and process.poll() is None:
        children = children_of(process.pid)
        forked = [pid for pid in children if power_cut.command_of(pid) == own]
    process.kill()
    process.wait()
    assert len(forked) == dropzone.WORKERS
    wait_for(lambda: all(state_of(pid) in GONE for pid in forked))
    result = json.loads(program.run("process").stdout)
    assert (result["failed"], result["remaining"]) == (0, 0)
    assert folder.store.count_processed() == count
