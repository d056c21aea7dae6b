"""The whole way of a payload, through a running `python dropzone.py` and nothing else."""

import asyncio
import csv
import hashlib
import io
import itertools
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import aiohttp
import asyncpg
import pytest
from test_cli import OK, Program, Server

from dropzone import DataQualityError, transform

EXAMPLE = Path(__file__).parents[2] / "data" / "payload.json"
FORM = "application/x-www-form-urlencoded"
NOON = "2019-05-01T10:00:00.000000Z"
MEAN, STD_DEV = 0.9985282517566032, 1.01280885259315
WORKERS = 32
ROWS = "SELECT timestamp_utc, mean, std_dev, raw_id FROM measurements ORDER BY timestamp_utc"


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.close()


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the variables that choose a backend: none for the default."""
    if request.param == "sqlite":
        return {}
    return {"DROPZONE_DATABASE_URL": request.getfixturevalue("postgres_url")}


def payload(time_stamp: str, *data: object) -> bytes:
    return json.dumps({"time_stamp": time_stamp, "data": data}).encode()


async def rows_in(program: Program, database: dict[str, str]) -> list[tuple[object, ...]]:
    """Return the table as any other program sees it."""
    if not database:
        connection = sqlite3.connect(program.home / "data" / "dropzone.sqlite")
        try:
            return [(t, m, s, UUID(raw_id)) for t, m, s, raw_id in connection.execute(ROWS)]
        finally:
            connection.close()
    connection = await asyncpg.connect(database["DROPZONE_DATABASE_URL"])
    try:
        return [tuple(record) for record in await connection.fetch(ROWS)]
    finally:
        await connection.close()


# ── The example ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("option", ["--data-binary", "-d"])
async def test_example(program: Program, database: dict[str, str], option: str):
    """The example payload, posted as curl posts it, is processed and read back as its statistics.

    `curl -d @file` takes the line ends out of the file and sends a form's content type.
    """
    body = EXAMPLE.read_bytes()
    body = body.replace(b"\n", b"") if option == "-d" else body
    server = Server(program, **database)
    status, headers, text = server.request("POST", "/ingest", body, Content_Type=FORM)
    accepted = json.loads(text)
    assert (status, accepted["status"]) == (202, "accepted")
    raw_id = UUID(accepted["raw_id"])
    assert headers["Location"] == f"/raw/{raw_id}"
    assert (program.home / "data" / "raw" / f"{raw_id}.json").read_bytes() == body

    assert server.json("POST", "/process") == {
        "processed": 1,
        "failed": 0,
        "checked": 1,
        "remaining": 0,
        "superseded": 0,
        "rejected": [],
    }
    [row] = server.json("GET", "/measurements")["measurements"]
    assert (row["timestamp_utc"], row["raw_id"]) == (NOON, str(raw_id))
    assert row["mean"] == pytest.approx(MEAN, rel=0, abs=1e-15)
    assert row["std_dev"] == pytest.approx(STD_DEV, rel=0, abs=1e-14)
    assert server.json("GET", f"/measurements/{NOON}") == row

    receipt = server.json("GET", headers["Location"])
    assert (receipt["state"], receipt["measurement"]) == ("processed", row)
    assert receipt["bytes"] == len(body)
    assert receipt["sha256"] == hashlib.sha256(body).hexdigest()
    assert server.request("GET", f"/raw/{raw_id}/payload")[2] == body

    [(timestamp, mean, std_dev, stored_id)] = await rows_in(program, database)
    moment = datetime(2019, 5, 1, 10, tzinfo=UTC)
    assert timestamp in {moment, "2019-05-01T10:00:00.000000Z"}
    assert (mean, std_dev, stored_id) == (row["mean"], row["std_dev"], raw_id)
    assert server.stop() == OK


async def test_as_csv(program: Program, database: dict[str, str]):
    """The same row comes as CSV, its numbers exact."""
    server = Server(program, **database)
    server.json("POST", "/ingest", EXAMPLE.read_bytes())
    server.json("POST", "/process")
    [row] = server.json("GET", "/measurements")["measurements"]
    _, headers, text = server.request("GET", "/measurements", Accept="text/csv")
    assert headers["Content-Type"].startswith("text/csv")
    [line] = csv.DictReader(io.StringIO(text.decode(), newline=""))
    assert (float(line.pop("mean")), float(line.pop("std_dev"))) == (row["mean"], row["std_dev"])
    assert line == {"timestamp_utc": NOON, "raw_id": row["raw_id"]}


async def test_rows_survive_a_restart(program: Program, database: dict[str, str]):
    """Rows, receipts and the quarantine are the same after a restart, whichever way it ended."""
    server = Server(program, **database)
    good = server.json("POST", "/ingest", EXAMPLE.read_bytes())["raw_id"]
    bad = server.json("POST", "/ingest", b"[]")["raw_id"]
    server.json("POST", "/process")
    pages = ["/measurements", "/rejected", f"/raw/{good}", f"/raw/{bad}"]
    before = [server.json("GET", page) for page in pages]
    for how in (signal.SIGTERM, signal.SIGKILL):
        server.stop(how)
        server = Server(program, **database)
        assert [server.json("GET", page) for page in pages] == before


async def test_landed_and_processed_from_the_command_line(
    program: Program, database: dict[str, str]
):
    """What the command line lands and processes, beside a running server, the server shows."""
    server = Server(program, **database)
    landed = program.run("ingest", EXAMPLE, **database).stdout.strip()
    assert server.json("GET", f"/raw/{landed}")["state"] == "pending"
    assert json.loads(program.run("process", **database).stdout)["processed"] == 1
    assert server.json("GET", f"/measurements/{NOON}")["raw_id"] == landed
    posted = server.json("POST", "/ingest", EXAMPLE.read_bytes())["raw_id"]
    assert posted > landed
    assert server.json("POST", "/process")["processed"] == 1
    assert server.json("GET", f"/raw/{landed}")["superseded_by"] == posted


# ── What the service before it promised ───────────────────────────────────────────────────────────


async def test_counts_and_quality(program: Program):
    """A good payload, one without an offset and one with a word in it: 1 processed, 2 failed."""
    server = Server(program)
    bodies = [
        payload("2019-05-01T06:00:00-04:00", 0, 2),
        payload("2019-05-01T06:00:00", 0, 2),
        payload("2019-05-01T06:00:00-04:00", 1, "x"),
    ]
    raw_ids = [server.json("POST", "/ingest", body)["raw_id"] for body in bodies]
    result = server.json("POST", "/process")
    counts = [result[name] for name in ("processed", "failed", "checked", "remaining")]
    assert counts == [1, 2, 3, 0]
    assert [(r["raw_id"], r["code"]) for r in result["rejected"]] == [
        (raw_ids[1], "time_stamp_without_offset"),
        (raw_ids[2], "value_not_numeric"),
    ]
    [row] = server.json("GET", "/measurements")["measurements"]
    assert (row["timestamp_utc"], row["mean"], row["std_dev"]) == (NOON, 1.0, 1.0)
    assert server.json("POST", "/process")["checked"] == 0


def test_transform_of_the_service_before():
    """`[0, 2]` has the mean 1.0 and the deviation 1.0; bad input is a data-quality error."""
    row = transform(UUID(int=1), payload("2019-05-01T06:00:00-04:00", 0, 2))
    assert (row.timestamp_utc, row.mean, row.std_dev) == (
        datetime(2019, 5, 1, 10, tzinfo=UTC),
        1.0,
        1.0,
    )
    for bad in (payload("2019-05-01T06:00:00", 0, 2), payload("2019-05-01T06:00:00Z", 1, "x")):
        with pytest.raises(DataQualityError):
            transform(UUID(int=1), bad)


async def test_second_payload_replaces_the_first(program: Program, database: dict[str, str]):
    """Of two payloads for one moment, in whatever offset, the later arrival's row stands."""
    server = Server(program, **database)
    first = server.json("POST", "/ingest", payload(NOON, 1))["raw_id"]
    second = server.json("POST", "/ingest", payload("2019-05-01T15:30:00+05:30", 2))["raw_id"]
    server.json("POST", "/process")
    third = server.json("POST", "/ingest", payload("2019-05-01T06:00:00-04:00", 3))["raw_id"]
    server.json("POST", "/process")
    [row] = await rows_in(program, database)
    assert row[1:] == (3.0, 0.0, UUID(third))
    for superseded in (first, second):
        assert server.json("GET", f"/raw/{superseded}")["superseded_by"] == third


async def test_more_than_a_hundred(program: Program, database: dict[str, str]):
    """250 payloads, the first 120 of them bad, are all dealt with by calls of 100."""
    server = Server(program, **database)
    stamps = [f"2019-05-01T10:{n // 60:02}:{n % 60:02}Z" for n in range(250)]
    async with aiohttp.ClientSession(server.url) as session:
        for number, stamp in enumerate(stamps):
            body = payload(stamp, "x" if number < 120 else number)
            async with session.post("/ingest", data=body) as response:
                assert response.status == 202
    results = [server.json("POST", "/process?limit=100") for _ in range(4)]
    assert [result["processed"] for result in results] == [0, 80, 50, 0]
    assert [result["failed"] for result in results] == [100, 20, 0, 0]
    assert [result["remaining"] for result in results] == [150, 50, 0, 0]
    assert len(await rows_in(program, database)) == 130
    assert server.json("GET", "/rejected")["total"] == 120


# ── kill -9 ───────────────────────────────────────────────────────────────────────────────────────


class Devices:
    """Devices that post at the same time, and remember what they were promised."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.sent: set[bytes] = set()
        self.promised: dict[str, bytes] = {}

    async def post(self, url: str, enough: int, then: Callable[[], object]) -> None:
        """Post until the server is gone; when it has promised `enough` payloads, call `then`."""
        self.enough, self.then = len(self.promised) + enough, then
        connector = aiohttp.TCPConnector(limit=WORKERS)
        async with aiohttp.ClientSession(url, connector=connector) as session:
            await asyncio.gather(*(self._post(session) for _ in range(WORKERS)))

    async def _post(self, session: aiohttp.ClientSession) -> None:
        with suppress(aiohttp.ClientError):
            while True:
                number = next(self.numbers)
                stamp = datetime.fromtimestamp(number, UTC).isoformat()
                filler = [0.5] * (20_000 if number % 50 == 0 else 10)  # some need many writes
                body = payload(stamp, number, *filler)
                self.sent.add(body)
                async with session.post("/ingest", data=body) as response:
                    if response.status == 202:
                        self.promised[(await response.json())["raw_id"]] = body
                        if len(self.promised) == self.enough:
                            self.then()


async def test_killed_under_load(program: Program):
    """Every payload with a 202 is there, byte for byte, after a `kill -9` at any moment."""
    devices = Devices()
    for enough in (100, 300, 600):
        server = Server(program)
        await devices.post(server.url, enough, server.process.kill)
    server = Server(program)
    for raw_id, body in devices.promised.items():
        status, _, found = server.request("GET", f"/raw/{raw_id}/payload")
        assert (status, found) == (200, body)
    landed = program.payloads()
    assert set(landed) >= set(map(UUID, devices.promised))
    assert set(landed.values()) <= devices.sent  # nothing torn, nothing made up
    assert server.json("POST", "/process")["failed"] == 0
    latest = server.json("POST", "/ingest", b"1")["raw_id"]
    assert latest > max(map(str, landed))


async def test_no_reader_sees_half_a_file(program: Program):
    """Whoever reads the raw folder while payloads land finds each file whole."""
    server, devices = Server(program), Devices()
    folder, seen = program.home / "data" / "raw", dict[str, bytes]()

    def read_what_is_new() -> None:
        while server.process.poll() is None:
            for name in set(os.listdir(folder)) - seen.keys():
                seen[name] = (folder / name).read_bytes()

    reading = asyncio.create_task(asyncio.to_thread(read_what_is_new))
    await devices.post(server.url, 400, server.process.terminate)
    await reading
    assert len(seen) > 100
    assert set(seen.values()) <= devices.sent
    assert server.exit_code() == OK


async def test_killed_while_it_processes(program: Program, database: dict[str, str]):
    """A `kill -9` amid landing and processing: afterwards every promised payload has its row."""
    devices = Devices()
    variables = {**database, "DROPZONE_PROCESS_BATCH": "20"}
    for rounds in (1, 4, 9):
        server = Server(program, **variables)
        enough = asyncio.Event()
        posting = asyncio.create_task(devices.post(server.url, 200, enough.set))
        await enough.wait()
        async with aiohttp.ClientSession(server.url) as session:
            for _ in range(rounds):
                async with session.post("/process?limit=50") as response:
                    assert response.status == 200
            cut_off = asyncio.create_task(session.post("/process"))
            await asyncio.sleep(0.05)
            server.process.kill()
            with suppress(aiohttp.ClientError):
                (await cut_off).release()
        await posting
    server = Server(program, **variables)
    assert server.json("POST", "/process")["remaining"] == 0
    assert not program.payloads("raw")
    assert not program.payloads("rejected")
    rows = {(raw_id, mean) for _, mean, _, raw_id in await rows_in(program, database)}
    expected = {transform(UUID(raw_id), body) for raw_id, body in devices.promised.items()}
    assert rows >= {(row.raw_id, row.mean) for row in expected}


async def test_stopped_under_load(program: Program):
    """SIGTERM under load: exit code 0, and every payload with a 202 is there."""
    server, devices = Server(program), Devices()
    await devices.post(server.url, 200, server.process.terminate)
    assert server.exit_code() == OK
    landed = program.payloads()
    for raw_id, body in devices.promised.items():
        assert landed[UUID(raw_id)] == body
    assert "Traceback" not in server.log
