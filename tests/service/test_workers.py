"""Several workers under gunicorn: they share the load, the promises, the keys and the counts."""

import asyncio
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import aiohttp
import pytest
from power_cut import (
    CHANCE,
    GONE,
    PATIENCE,
    REPO,
    Ledger,
    assert_whole,
    bodies_in,
    children_of,
    files_in,
    state_of,
    wait_for,
)
from test_metrics import samples_in, value

CLIENTS = 16
KILLS = 6
WORKERS = 2
GUNICORN = (
    *("-m", "gunicorn", "dropzone:create_app()", "--worker-class"),
    *("aiohttp.GunicornUVLoopWebWorker", "-w", str(WORKERS), "--bind", "127.0.0.1:0"),
    "--no-control-socket",  # it would lie in the home folder of whoever tests
)


class Gunicorn:
    """`gunicorn "dropzone:create_app()"` as the docs start it, on a data folder of its own."""

    def __init__(self, home: Path) -> None:
        self.data = home / "data"
        self.log = home / "log.txt"
        self.killed = 0
        (home / "config.toml").touch()
        environment = {n: text for n, text in os.environ.items() if "DROPZONE" not in n} | {
            "DROPZONE_RAW_DIR": str(self.data / "raw"),
            "DROPZONE_STORAGE_SQLITE_PATH": str(home / "rows.sqlite"),
            "DROPZONE_RAW_MIN_FREE_BYTES": "1000000",
            "DROPZONE_SERVER_MAX_BODY_BYTES": "2000000",
            "PYTHONPATH": str(REPO),
        }
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                (sys.executable, *GUNICORN), cwd=home, env=environment, stderr=file, stdout=file
            )
        try:
            wait_for(self.serves)
        except BaseException:
            self.close()
            raise
        self.url = f"http://127.0.0.1:{self._port()}"

    def _port(self) -> str:
        found = re.search(r"Listening at: http://127\.0\.0\.1:(\d+)", self.log.read_text())
        return found[1] if found else ""

    def serves(self) -> bool:
        """Say whether all workers are there and have opened the store."""
        assert self.process.poll() is None, self.log.read_text()
        begun = self.log.read_text().count("no API key is set")
        return bool(self._port()) and begun >= WORKERS + self.killed

    def workers(self) -> list[int]:
        return [pid for pid in children_of(self.process.pid) if state_of(pid) not in GONE]

    async def kill_a_worker(self) -> None:
        """Kill a worker as the kernel would, and wait until another has taken its place.

        One that gunicorn is just starting misses its SIGTERM, and would hold up a stop.
        """
        os.kill(CHANCE.choice(self.workers()), signal.SIGKILL)
        self.killed += 1
        async with asyncio.timeout(PATIENCE):
            while not self.serves():
                await asyncio.sleep(0.01)

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(PATIENCE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.stop()


@pytest.fixture
def gunicorn(tmp_path: Path) -> Iterator[Gunicorn]:
    started = Gunicorn(tmp_path)
    yield started
    started.close()


def session_of(gunicorn: Gunicorn) -> aiohttp.ClientSession:
    """Return a session that makes a connection for each request, so that all workers get some."""
    return aiohttp.ClientSession(
        gunicorn.url, connector=aiohttp.TCPConnector(limit=0, force_close=True)
    )


async def keep_landing(session: aiohttp.ClientSession, ledger: Ledger, stop: asyncio.Event) -> None:
    """Land one payload or several, and try again with the same key until they are acknowledged."""
    while not stop.is_set():
        bodies = [ledger.new_body() for _ in range(CHANCE.choice((1, 1, 1, 20)))]
        key = f"{CHANCE.getrandbits(64):x}"
        while True:
            try:
                if await ledger.post(session, bodies, key):
                    break
            except aiohttp.ClientError:  # its worker was killed
                await asyncio.sleep(0.01)


async def test_killed_workers_lose_nothing(gunicorn: Gunicorn):
    """A worker killed about each second, under load: all that was acknowledged is there once."""
    ledger, stop = Ledger(), asyncio.Event()
    async with session_of(gunicorn) as session, asyncio.timeout(4 * PATIENCE):
        clients = [asyncio.create_task(keep_landing(session, ledger, stop)) for _ in range(CLIENTS)]
        for _ in range(KILLS):
            await asyncio.sleep(1)
            await gunicorn.kill_a_worker()
        stop.set()
        await asyncio.gather(*clients)
        for key, (bodies, form, raw_ids) in list(ledger.keys.items())[::50]:
            assert await ledger.post(session, bodies, key, form) == raw_ids
    assert gunicorn.stop() == 0
    assert len(ledger.acknowledged) > KILLS * CLIENTS
    assert_whole(gunicorn.data, ledger)
    landed = [(raw_id, path) for raw_id, paths in files_in(gunicorn.data).items() for path in paths]
    bodies = {path: bodies_in(path) for _, path in landed}
    different = {bodies[path][raw_id] for raw_id, path in landed}
    assert len(landed) == len(different) == len(ledger.acknowledged)
    wait_for(lambda: not list(gunicorn.data.glob("journal/*.log")))  # recovered, and emptied
    # gunicorn's own log may trip over the signals of its workers
    assert 'dropzone.py", line' not in gunicorn.log.read_text()


async def test_workers_share_keys_counts_and_processing(gunicorn: Gunicorn):
    """Any worker knows the key, processes the payload and answers for what the others counted."""
    body = b'{"time_stamp": "2019-05-01T10:00:00Z", "data": [0, 2]}'
    async with session_of(gunicorn) as session:

        async def land(number: int) -> str:
            headers = {"Idempotency-Key": f"key {number % 4}"}
            async with session.post("/ingest", data=body, headers=headers) as answer:
                assert answer.status == 202, await answer.text()
                return (await answer.json())["raw_id"]

        raw_ids = await asyncio.gather(*map(land, range(80)))
        assert sorted(Counter(raw_ids).values()) == [20] * 4
        async with session.post("/process") as answer:
            assert (await answer.json())["processed"] == 4
        async with session.get("/measurements") as answer:
            [row] = (await answer.json())["measurements"]
        assert row["raw_id"] == max(raw_ids)
        async with asyncio.timeout(PATIENCE):  # each worker shares its counts within a second
            seen = {}
            while value(seen, "requests_total", "POST", "/ingest", "202") != 80:
                async with session.get("/metrics") as answer:
                    seen = samples_in(await answer.text())
    assert value(seen, "payloads_landed_total") == 4
    assert 0 < value(seen, "land_duration_seconds_count") <= 80  # groups
    assert value(seen, "payloads_processed_total") == 4


async def test_bodies_that_gunicorn_inflates_are_limited(gunicorn: Gunicorn):
    """A gzip bomb is refused with 413 and the worker lives; a good gzip body lands as it was."""
    before = gunicorn.workers()
    document = json.dumps({"data": [1] * 1000}).encode()
    headers = {"Content-Encoding": "gzip"}
    async with session_of(gunicorn) as session:
        bomb = gzip.compress(b" " * 50_000_000 + b"1")
        async with session.post("/ingest", data=bomb, headers=headers) as answer:
            assert (answer.status, (await answer.json())["code"]) == (413, "payload_too_large")
        async with session.post("/ingest", data=gzip.compress(document), headers=headers) as answer:
            raw_id = (await answer.json())["raw_id"]
    assert [path.read_bytes() for path in files_in(gunicorn.data)[UUID(raw_id)]] == [document]
    assert gunicorn.workers() == before


async def test_a_stop_finishes_what_has_begun(gunicorn: Gunicorn):
    """SIGTERM lets a request that is under way finish with its 202; then the exit code is 0."""
    _, port = gunicorn.url.rsplit(":", 1)
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port))
    writer.write(b"POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n12")
    await writer.drain()
    async with session_of(gunicorn) as session, asyncio.timeout(PATIENCE):
        seen = {}
        while value(seen, "in_flight_bytes") != 2:
            async with session.get("/metrics") as answer:
                seen = samples_in(await answer.text())
    gunicorn.process.terminate()
    wait_for(lambda: "Handling signal: term" in gunicorn.log.read_text())
    writer.write(b"3")
    async with asyncio.timeout(PATIENCE):
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 202"), answer
    assert await asyncio.to_thread(gunicorn.process.wait, PATIENCE) == 0
    assert [path.read_bytes() for [path] in files_in(gunicorn.data).values()] == [b"123"]


async def test_wrong_settings_stop_gunicorn(tmp_path: Path):
    """A wrong setting ends gunicorn at once, and names itself."""
    environment = os.environ | {"DROPZONE_RAW_DIRR": "x", "PYTHONPATH": str(REPO)}
    done = await asyncio.to_thread(
        subprocess.run,
        (sys.executable, *GUNICORN),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode != 0
    assert b"DROPZONE_RAW_DIRR" in done.stderr
