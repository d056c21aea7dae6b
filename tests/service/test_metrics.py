"""What GET /metrics shows, and that it is right with several processes, restarts and outages."""

import ast
import asyncio
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import test_cli
import test_http
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as plain_text
from test_cli import LINE, OK, Program, Server
from test_http import Defective, Outage, Serve, Service, reading
from test_processing import Folder

import dropzone
from backends.raw import PayloadUnreadable, StorageUnavailable, next_raw_id, uuid_at
from dropzone import ERRORS_BELOW, DropzoneError, Metrics, PayloadNotJson, age_of, look_at_pending

serve, service, program = test_http.serve, test_http.service, test_cli.program

Samples = dict[str, dict[tuple[str, ...], float]]
PLAIN = "text/plain; version=0.0.4; charset=utf-8"
ACCEPT = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}


def samples_in(text: str) -> Samples:
    """Return the value of each sample under its name and the values of its labels."""
    found: Samples = {}
    for family in plain_text(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


async def scraped(service: Service) -> Samples:
    answer = await service("GET", "/metrics")
    assert (answer.status, answer.headers["Content-Type"]) == (200, PLAIN), answer.body
    return samples_in(answer.body.decode())


def value(samples: Samples, name: str, *labels: str) -> float:
    return samples.get(f"dropzone_{name}", {}).get(labels, 0)


def counted(samples: Samples, name: str) -> dict[tuple[str, ...], float]:
    """Return the samples of a counter that have counted something."""
    return {labels: count for labels, count in samples[f"dropzone_{name}"].items() if count}


# ── What is counted ───────────────────────────────────────────────────────────────────────────────


async def test_landing_is_counted(service: Service):
    """Payloads, their bytes, groups and latencies are counted; a retry with its key is not."""
    bodies = [b"1", b"[2]", b'{"a": 3}']
    for body in bodies:
        await service.land(body)
    for _ in range(2):
        lines = {"data": b"4\n5\n", "headers": {"Idempotency-Key": "k"}}
        lines["headers"]["Content-Type"] = "application/x-ndjson"
        assert (await service("POST", "/ingest", **lines)).status == 202
    seen = await scraped(service)
    assert value(seen, "payloads_landed_total") == 5
    assert value(seen, "landed_bytes_total") == sum(map(len, bodies)) + 4
    assert value(seen, "land_duration_seconds_count") == 4  # groups
    assert value(seen, "group_payloads_sum") == 5
    groups = value(seen, "group_payloads_count")
    assert 1 <= groups == value(seen, "journal_sync_duration_seconds_count") <= 4
    assert 0 < value(seen, "journal_sync_duration_seconds_sum") < 60
    assert value(seen, "requests_total", "POST", "/ingest", "202") == 5


async def test_batches_are_counted_as_what_they_hold(service: Service):
    """Of a batch each payload is counted: landed, pending, processed, rejected by its code."""
    good, bad = [json.dumps(reading(f"2019-05-01T10:00:0{n}Z")) for n in range(3)], "oops"
    body = "\n".join([*good, bad])
    kind = {"Content-Type": "application/x-ndjson"}
    assert (await service("POST", "/ingest", data=body.encode(), headers=kind)).status == 202
    array = f"[{good[0]}, {{}}]"
    assert (await service("POST", "/ingest", data=array.encode())).status == 202
    seen = await scraped(service)
    assert value(seen, "payloads_landed_total") == value(seen, "group_payloads_sum") == 6
    assert value(seen, "landed_bytes_total") == len(body) + len(array)
    assert value(seen, "payloads_pending") == 6
    status = (await service("GET", "/status")).json
    assert (status["pending"], sum(status["landed"])) == (6, 6)
    assert (await service("POST", "/process?limit=5")).json["remaining"] == 1
    seen = await scraped(service)
    assert value(seen, "payloads_processed_total") == 4
    assert value(seen, "payloads_rejected_total", "payload_not_json") == 1
    await service.process()
    seen = await scraped(service)
    assert value(seen, "payloads_processed_total") == 4
    assert value(seen, "payloads_rejected_total", "time_stamp_missing") == 1
    assert (await service("GET", "/status")).json["processed"] == 4


async def test_large_groups_are_counted(service: Service):
    """What the writer process lands is counted with the rest, its syncs too."""
    body = json.dumps(reading(data=[0.5] * 5000)).encode()
    landed = 0
    async with asyncio.timeout(60):
        while not list(service.folder.glob("journal/*.log"))[1:]:  # the writer has its own
            await asyncio.gather(*(service.land(body) for _ in range(32)))
            landed += 32
    seen = await scraped(service)
    assert value(seen, "payloads_landed_total") == value(seen, "group_payloads_sum") == landed
    assert value(seen, "landed_bytes_total") == landed * len(body)
    groups = value(seen, "group_payloads_count")
    assert groups == value(seen, "journal_sync_duration_seconds_count")


async def test_processing_is_counted(service: Service):
    """Rows and rejections are counted, these by code; what is pending is shown, and since when."""
    for body in (reading(), reading("2020-01-01T00:00:00Z"), [], {}, {}):
        await service.land(body)
    before = await scraped(service)
    assert value(before, "payloads_pending") == 5
    assert 0 < value(before, "oldest_pending_age_seconds") < 60
    await service.process()
    seen = await scraped(service)
    assert value(seen, "payloads_processed_total") == 2
    assert value(seen, "payloads_rejected_total", "payload_not_object") == 1
    assert value(seen, "payloads_rejected_total", "time_stamp_missing") == 2
    assert value(seen, "backend_duration_seconds_count", "upsert") == 1
    async with asyncio.timeout(60):  # as soon as it may look again
        while value(await scraped(service), "payloads_pending"):
            await asyncio.sleep(0.01)
    assert value(await scraped(service), "oldest_pending_age_seconds") == 0


async def test_requests_are_counted_by_template(service: Service):
    """However many addresses and methods a client makes up, there are few labels."""
    raw_id = await service.land(b"1")
    for path in (f"/raw/{raw_id}", f"/raw/{UUID(int=1)}", "/raw/x", "/x", "/y/z", "/ingest/"):
        await service("GET", path)
    await service("HEAD", "/health")
    await service("BREW", "/ingest")
    await service("DELETE", "/ingest")
    seen = counted(await scraped(service), "requests_total")
    assert seen == {
        ("POST", "/ingest", "202"): 1,
        ("GET", "/raw/{raw_id}", "200"): 1,
        ("GET", "/raw/{raw_id}", "404"): 2,
        ("GET", "none", "404"): 3,
        ("HEAD", "/health", "200"): 1,
        ("DELETE", "none", "405"): 1,
    } | {key: count for key, count in seen.items() if key[0] == "other"}
    durations = (await scraped(service))["dropzone_request_duration_seconds_count"]
    assert durations["GET", "/raw/{raw_id}"] == 3


async def test_refusals_are_counted_by_reason(serve: Serve):
    """Each problem document counts under its code; those of the backend by operation, too."""
    service = await serve(Outage(), limit=20_000)
    await service("POST", "/ingest", data=b"{")
    await service("POST", "/ingest", data=b"1" * 20_001)
    await service("GET", "/measurements?limit=0")
    await service("GET", "/measurements")
    seen = await scraped(service)
    assert counted(seen, "refusals_total") == {
        ("payload_not_json",): 1,
        ("payload_too_large",): 1,
        ("query_invalid",): 1,
        ("backend_unavailable",): 1,
    }
    assert value(seen, "backend_errors_total", "find") == 1
    assert value(seen, "backend_duration_seconds_count", "find") == 1


async def test_defects_of_a_backend_are_counted_and_missing_rows_are_not(serve: Serve):
    """An error that nobody foresaw counts as one of the backend; a 404 is an answer."""
    service = await serve(Defective())
    await service("GET", "/measurements")
    await service("GET", "/measurements/2019-05-01T10:00:00Z")
    seen = await scraped(service)
    assert counted(seen, "backend_errors_total") == {("find",): 1}
    assert value(seen, "refusals_total", "internal_error") == 1
    assert value(seen, "backend_duration_seconds_count", "get") == 1


async def test_bytes_in_flight(service: Service):
    """A body that has arrived in part is in flight until its connection ends."""
    _, writer = await asyncio.open_connection(*service.url.removeprefix("http://").split(":"))
    writer.write(b"POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n" + b"1" * 4000)
    for expected in (4000, 0):
        async with asyncio.timeout(60):
            while value(await scraped(service), "in_flight_bytes") != expected:
                await asyncio.sleep(0.01)
        writer.close()


async def test_free_space(service: Service):
    """The free bytes of the data folder are those that `df` shows."""
    disk = os.statvfs(service.folder)
    free = value(await scraped(service), "data_free_bytes")
    assert free == pytest.approx(disk.f_bavail * disk.f_frsize, abs=2**32)


async def test_open_metrics(service: Service):
    """Who asks for OpenMetrics, as Prometheus does, gets it, whole; both forms have base units."""
    await service.land(reading())
    await service.process()
    answer = await service("GET", "/metrics", headers=ACCEPT)
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    names = {family.name for family in open_metrics(answer.body.decode())}
    assert names
    plain = (await service("GET", "/metrics")).body.decode()
    assert names == {family.name for family in plain_text(plain)}
    assert all(name.startswith(("dropzone_", "process_")) for name in names)
    assert not any(name.endswith(("_ms", "_milliseconds", "_kb", "_created")) for name in names)


async def test_every_code_starts_at_zero(service: Service):
    """Before anything was rejected or refused, each code that can come is there with 0.

    Prometheus sees no increase in a counter that appears with its first value.
    """
    seen = await scraped(service)
    assert seen["dropzone_payloads_rejected_total"] == dict.fromkeys(rejection_codes(), 0)
    assert seen["dropzone_refusals_total"] == dict.fromkeys(refusal_codes(), 0)
    assert value(seen, "requests_total", "POST", "/ingest", "503") == 0
    for labels in (("POST", "/ingest", "503"), ("GET", "/measurements", "401")):
        assert seen["dropzone_requests_total"][labels] == 0
    assert {"upsert", "find", "ping"} <= {name for (name,) in seen["dropzone_backend_errors_total"]}


def rejection_codes() -> set[tuple[str, ...]]:
    """Return the codes with which the program rejects payloads, read from its text."""
    codes = {PayloadNotJson.code, PayloadUnreadable.code}
    for call in calls_in(dropzone.__file__):
        place = {"DataQualityError": 0, "Rejection": 1}.get(name_of(call))
        if place is not None and isinstance(call.args[place], ast.Constant):
            codes.add(call.args[place].value)
    codes |= {"time_stamp_out_of_range"}  # which is chosen beforehand
    return {(code,) for code in codes}


def refusal_codes() -> set[tuple[str, ...]]:
    """Return the codes with which the program refuses requests, read from its text."""
    raised = {DropzoneError, PayloadNotJson, dropzone.ProcessorBusy}
    codes = {kind.code for kind in raised} | {code for code, _ in ERRORS_BELOW.values()}
    for call in calls_in(dropzone.__file__):
        if name_of(call) == "DropzoneError":
            codes |= {each.value for each in call.args[1:2] if isinstance(each, ast.Constant)}
    codes |= {"not_found", "method_not_allowed", "expectation_failed"}  # of aiohttp
    return {(code,) for code in codes}


def calls_in(file: str) -> Iterator[ast.Call]:
    tree = ast.parse(Path(file).read_text())
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def name_of(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def test_zeros_outlive_a_restart(program: Program):
    """A code that was never seen is there after a restart, and one that was goes on."""
    for rejected in (0, 1):
        server = Server(program)
        seen = counts(server)["dropzone_payloads_rejected_total"]
        assert seen["data_missing",] == rejected
        assert seen["data_empty",] == 0
        server.request("POST", "/ingest", b'{"time_stamp": "2019-05-01T10:00:00Z"}')
        server.request("POST", "/process")
        assert server.stop() == OK


async def test_what_runs(service: Service):
    """The version is a label; on Linux the process that answers shows what it takes."""
    seen = await scraped(service)
    assert value(seen, "build_info", dropzone.__version__) == 1
    if sys.platform == "linux":
        assert seen["process_resident_memory_bytes"][()] > 1e6
        assert seen["process_open_fds"][()] > 3
        assert 0 < time.time() - seen["process_start_time_seconds"][()] < 86_400


async def test_last_landed(service: Service):
    """When the last payload landed is shown, 0 before the first."""
    assert value(await scraped(service), "last_landed_timestamp_seconds") == 0
    await service.land(b"1")
    last = value(await scraped(service), "last_landed_timestamp_seconds")
    assert last == pytest.approx(time.time(), abs=60)


async def test_backend_up(serve: Serve):
    """Whether the backend answers is shown, also where nobody has asked it for anything."""
    backend = Outage()
    service = await serve(backend)
    assert value(await scraped(service), "backend_up") == 0
    backend.down = False
    assert value(await scraped(service), "backend_up") == 1


async def test_reserve(service: Service):
    """The bytes below which payloads are refused are shown beside those that are free."""
    status = json.loads((await service("GET", "/status")).body)
    assert value(await scraped(service), "data_reserve_bytes") == status["reserve_bytes"]


async def test_scope(serve: Serve):
    """Where a key is set, metrics need it."""
    service = await serve(key="secret")
    assert (await service("GET", "/metrics")).status == 401
    headers = {"Authorization": "Bearer secret"}
    assert (await service("GET", "/metrics", headers=headers)).status == 200


# ── Several processes ─────────────────────────────────────────────────────────────────────────────


async def test_two_applications_count_apart(serve: Serve):
    """Two data folders in one process are two sets of counts; the same folder is one."""
    one, other = await serve(name="one"), await serve(name="other")
    again = await serve(name="one")
    await one.land(b"1")
    await scraped(one)
    assert value(await scraped(other), "payloads_landed_total") == 0
    assert value(await scraped(again), "payloads_landed_total") == 1


def counts(server: Server) -> Samples:
    status, _, text = server.request("GET", "/metrics")
    assert status == 200, text
    return samples_in(text.decode())


def test_every_command_is_counted(program: Program):
    """`ingest` and `process` count as the server does, beside it and before it was started."""
    path = program.home / "day.ndjson"
    path.write_bytes(LINE + b"\n[]\n")
    assert program.run("ingest", path).returncode == OK
    server = Server(program)
    assert value(counts(server), "payloads_landed_total") == 2
    assert program.run("process").returncode == OK
    seen = counts(server)
    assert value(seen, "payloads_processed_total") == 1
    assert value(seen, "payloads_rejected_total", "payload_not_object") == 1
    assert value(seen, "backend_duration_seconds_count", "upsert") == 1
    server.stop()


def test_counts_outlive_a_restart(program: Program):
    """A counter goes on where it was, also where nothing was scraped before the stop."""
    for landed in (1, 2, 3):
        server = Server(program)
        server.request("POST", "/ingest", LINE)
        if landed != 2:
            assert value(counts(server), "payloads_landed_total") == landed
        assert server.stop() == OK


def shared_total(folder: Path, name: str) -> float:
    """Return a counter as it stands in the file that all processes share, 0 before it does."""
    with (
        suppress(sqlite3.OperationalError),
        closing(sqlite3.connect(folder / "journal" / "metrics.sqlite")) as file,
    ):
        for sample, total in file.execute("SELECT sample, value FROM samples"):
            if json.loads(sample)[1] == f"dropzone_{name}":
                return float(total)
    return 0


def test_counts_outlive_a_kill(program: Program):
    """What is counted is shared soon, though nobody scrapes: not even a kill takes it."""
    server = Server(program)
    for landed in (1, 2):
        assert server.request("POST", "/ingest", LINE)[0] == 202
        deadline = time.monotonic() + 60
        while shared_total(program.home / "data", "payloads_landed_total") < landed:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    server.process.kill()
    server.process.wait()
    assert value(counts(Server(program)), "payloads_landed_total") == 2


REFUSED = '["dropzone_refusals","dropzone_refusals_total",{"code":"overloaded"}]'


async def test_sharing_from_many_threads(tmp_path: Path):
    """However many share at once, as scrapes and the timer do, each count is added once."""
    metrics = Metrics()
    async with metrics.shared(tmp_path):
        with ThreadPoolExecutor(8) as threads:
            for _ in range(40):
                metrics.refusals.labels("overloaded").inc()
                shares = [threads.submit(metrics.share) for _ in range(8)]
                for share in shares:
                    await asyncio.wrap_future(share)
        assert metrics.share()[REFUSED] == 40
    with closing(sqlite3.connect(tmp_path / "metrics.sqlite")) as file:
        found = file.execute("SELECT value FROM samples WHERE sample = ?", (REFUSED,)).fetchall()
    assert found == [(40,)]


async def test_counts_when_the_file_is_broken(serve: Serve, tmp_path: Path, caplog: Any):
    """Where counts cannot be shared, landing and a process's own counts go on; the log tells."""
    (tmp_path / "data/journal").mkdir(parents=True)
    (tmp_path / "data/journal/metrics.sqlite").write_bytes(b"this is no database" * 1000)
    service = await serve()
    await service.land(b"1")
    for _ in range(2):
        assert value(await scraped(service), "payloads_landed_total") == 1
    assert caplog.text.count("counts are not shared") == 1


# ── The backlog ───────────────────────────────────────────────────────────────────────────────────


async def test_backlog_knows_count_and_age(tmp_path: Path):
    """The count of pending payloads, and the age of the one that arrived first."""
    folder = Folder(tmp_path)
    await folder.store.open()
    backlog = look_at_pending(folder.store)
    assert await backlog.look() == ([], 0)
    hour_ago = uuid_at(datetime.now(UTC) - timedelta(hours=1))
    for raw_id in (next_raw_id(UUID(int=0)), hour_ago):
        (folder.store.raw / f"{raw_id}.json").write_bytes(b"1")
    (folder.store.raw / "stray").touch()
    async with asyncio.timeout(60):
        while (await backlog.look())[1] != 2:
            await asyncio.sleep(0.01)
    oldest, _ = await backlog.look()
    assert age_of(oldest) == pytest.approx(3600, abs=60)
    await folder.store.close()


async def test_backlog_does_not_count_at_every_look(tmp_path: Path):
    """However often somebody looks, counting takes a twentieth of the time at most."""
    folder = Folder(tmp_path)
    await folder.store.open()
    for number in range(20_000):
        (folder.store.raw / f"{UUID(int=number)}.json").touch()
    backlog = look_at_pending(folder.store)
    begun = time.monotonic()
    oldest, count = await backlog.look()
    assert (age_of(oldest), count) == (None, 20_000)
    once = time.monotonic() - begun
    for _ in range(20_000):
        await backlog.look()
    assert time.monotonic() - begun < 1000 * once  # and not 20,000 times as long
    await folder.store.close()


async def test_backlog_without_a_folder(tmp_path: Path):
    """A data folder that has gone is an error that can be answered, every time."""
    backlog = look_at_pending(Folder(tmp_path / "nowhere").store)
    for _ in range(3):
        with pytest.raises(StorageUnavailable):
            await backlog.look()
        await asyncio.sleep(0)
