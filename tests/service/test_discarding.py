"""Discarding: what is known to be bad goes, its row too, and the arrival before it comes back."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import test_cli
import test_http
import test_quarantine
from filelock import FileLock
from power_cut import wait_for
from test_cli import CONFIGURATION, OK, USAGE, Program, Server
from test_http import SOME_ID, Serve, Service, check_problem, reading, refusal
from test_processing import Folder, arrival, body
from test_quarantine import CODES, QUERIES, filled_in, receipt

import dropzone
from backends.memory import MemoryBackend
from backends.sqlite import SqliteBackend

serve, quiet, program = test_http.serve, test_http.quiet, test_cli.program  # fixtures
service, rejections = test_quarantine.service, test_quarantine.rejections
REPO = Path(dropzone.__file__).parent
DAY = "2024-03-01"


def asked(program: Program, *arguments: object, code: int = OK) -> Any:
    """Run a command that writes one line of JSON; return what it says."""
    done = program.run(*arguments)
    assert (done.returncode, done.stderr) == (code, ""), done
    return json.loads(done.stdout)


def discard(program: Program, *raw_ids: UUID) -> int:
    return asked(program, "discard", *raw_ids)["discarded"]


async def table(program: Program) -> dict[UUID, float]:
    """Return the rows: their means, by the raw_ids that they name."""
    backend = SqliteBackend(program.home / "data" / "dropzone.sqlite")
    rows = await backend.find(limit=100_000)
    await backend.close()
    return {row.raw_id: row.mean for row in rows}


def assert_proved(program: Program) -> None:
    """See that all rows are right, and that a rebuild has nothing to do."""
    for command in ("verify", "rebuild"):
        done = program.run(command)
        assert (done.returncode, done.stdout.splitlines()[-1]) == (OK, "all rows are right"), done


@pytest.fixture
def folder(program: Program) -> Folder:
    for name in ("raw", "processed", "rejected", "discarded", "journal"):
        (program.home / "data" / name).mkdir(parents=True)
    return Folder(program.home / "data")


# ── By request ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("query", "expected"), QUERIES)
async def test_request(
    service: Service, rejections: list[dict[str, Any]], query: str, expected: list[int]
):
    """A request discards exactly what the same query lists, whole and with its reason."""
    answer = await service("POST", "/rejected/discard" + filled_in(query, rejections))
    assert (answer.status, answer.json) == (200, {"discarded": len(expected)})
    for number, reason in enumerate(rejections):
        found = await receipt(service, reason["raw_id"])
        assert found["rejection"] == reason
        assert found["state"] == ("discarded" if number in expected else "rejected")
        at = found["discarded_at"]
        assert (at is not None) == (number in expected)
        assert at is None or reason["rejected_at"] < at <= f"{datetime.now(UTC):%FT%T.%fZ}"
        payload = await service("GET", f"/raw/{reason['raw_id']}/payload")
        assert payload.json == test_quarantine.BAD[CODES[number]]
    assert (await service("GET", "/rejected")).json["total"] == len(CODES) - len(expected)
    assert (await service("GET", "/status")).json["discarded"] == len(expected)
    assert (await service("POST", "/rejected/retry")).json == {
        "retried": len(CODES) - len(expected)
    }
    shown = (await service("GET", "/metrics")).body.decode()
    assert f"dropzone_payloads_discarded_total {float(len(expected))}\n" in shown


async def test_request_for_what_is_not_rejected(service: Service):
    """By request only what is rejected is discarded."""
    processed = await service.land(reading())
    await service.process()
    pending = await service.land(reading())
    before = service.stored()
    for raw_id in (processed, pending, SOME_ID):
        answer = await service("POST", f"/rejected/discard?raw_id={raw_id}")
        assert answer.json == {"discarded": 0}
    assert (await service("POST", "/rejected/discard")).json == {"discarded": 0}
    assert service.stored() == before


async def test_request_by_series(service: Service, rejections: list[dict[str, Any]]):
    """To choose by series is refused while there is one alone, and nothing is done."""
    answer = await service("POST", "/rejected/discard?series=a")
    check_problem(answer, 400, "series_unset")
    assert "[transform] series" in answer.json["detail"]
    assert (await service("GET", "/rejected")).json["total"] == len(rejections)


async def test_key(serve: Serve):
    """Discarding is for keys that process."""
    service, key = await serve(key="sesam"), {"x-api-key": "sesam"}
    await refusal(service, 401, "key_refused", "POST", "/rejected/discard")
    answer = await service("POST", "/rejected/discard", headers=key)
    assert answer.json == {"discarded": 0}


async def test_a_refused_row_that_stands(serve: Serve):
    """A payload that was rejected though it had made a row takes that row along."""
    service = await serve(backend := MemoryBackend())
    raw_id = await service.land(b"[]")
    await service.process()
    (service.folder / "rejected" / f"{raw_id}.json").write_bytes(body(0))  # by other rules, say
    await backend.upsert([dropzone.transform(UUID(raw_id), body(0))])
    assert (await service("POST", "/rejected/discard")).json == {"discarded": 1}
    assert await backend.find() == []


async def test_backend_away(tmp_path: Path, serve: Serve):
    """While the backend is away nothing is discarded that may have a row."""
    service = await serve(SqliteBackend(tmp_path))  # which is a folder
    raw_id = await service.land(reading(data=["x"]))
    folder = service.folder
    (folder / "raw" / f"{raw_id}.json").rename(folder / "rejected" / f"{raw_id}.json")
    check_problem(await service("POST", "/rejected/discard"), 503, "backend_unavailable")
    assert (await receipt(service, raw_id))["state"] == "rejected"
    assert not (folder / "journal" / "discarding.json").exists()


async def test_busy(service: Service, monkeypatch: pytest.MonkeyPatch):
    """While a rebuild or a processor is at work, discarding is to be tried again."""
    monkeypatch.setattr(dropzone, "LOCK_PATIENCE", 0.1)
    for name in ("journal/upkeep.lock", "process.lock"):
        with FileLock(service.folder / name):
            answer = await service("POST", "/rejected/discard")
            check_problem(answer, 503, "processor_busy")
            assert "Retry-After" in answer.headers
    assert (await service("POST", "/rejected/discard")).status == 200


# ── By command ────────────────────────────────────────────────────────────────────────────────────


def put_rivals(folder: Folder) -> list[UUID]:
    """Make three payloads of one moment pending, the second in a batch, and one of another."""
    first, last, other = arrival(0), arrival(1_000), arrival(2_000)
    for raw_id, content in ((first, body(1, 1)), (last, body(1, 3)), (other, body(2, 9))):
        folder.put(raw_id, content)
    batch = folder.put_batch(500, [body(3, 8), body(1, 2)])
    return [first, batch[1], last, other, batch[0]]


@pytest.mark.parametrize("is_packed", [False, True])
async def test_the_earlier_arrival_comes_back(program: Program, folder: Folder, is_packed: bool):
    """Whichever of several payloads goes or comes back, the last arrival of the others stands."""
    first, second, last, other, fellow = put_rivals(folder)
    program.run("process")
    if is_packed:
        program.run("compact")
    always = {other: 9.0, fellow: 8.0}
    assert await table(program) == {**always, last: 3.0}
    assert discard(program, last) == 1
    assert await table(program) == {**always, second: 2.0}
    assert discard(program, second, first, other) == 3
    assert await table(program) == {fellow: 8.0}
    assert_proved(program)
    assert asked(program, "undiscard", first, last) == {"undiscarded": 2}
    assert await table(program) == {fellow: 8.0}
    program.run("process")
    assert await table(program) == {fellow: 8.0, last: 3.0}
    program.run("compact")
    assert_proved(program)
    assert discard(program, last) == 1
    assert await table(program) == {fellow: 8.0, first: 1.0}
    assert_proved(program)


async def test_what_lost_goes_alone(program: Program, folder: Folder):
    """The row of a later arrival stays where an earlier one is discarded."""
    first, second, *_ = put_rivals(folder)
    program.run("process")
    before = await table(program)
    assert discard(program, first, second) == 2
    assert await table(program) == before
    assert_proved(program)


async def test_pending_and_unknown(program: Program, folder: Folder):
    """What is pending never becomes a row; what is not there does not count."""
    program.run("process")
    first, second, last, *others = put_rivals(folder)
    assert discard(program, second, last, UUID(SOME_ID)) == 2
    done = asked(program, "process")
    assert (done["processed"], done["remaining"]) == (3, 0)
    assert set(await table(program)) == {first, *others}
    assert asked(program, "undiscard", first) == {"undiscarded": 0}


async def test_a_clock_that_was_not_set(program: Program, folder: Folder):
    """A row that the rules of today refuse goes, and no rebuild brings it back."""
    wrong, right = arrival(0), arrival(1)
    folder.put(wrong, b'{"time_stamp": "1970-01-01T00:00:07Z", "data": [1]}')
    folder.put(right, body(0, 5))
    program.run("process")
    rules = {"DROPZONE_TRANSFORM_NOT_BEFORE": "2020-01-01T00:00:00Z"}
    assert program.run("discard", wrong, **rules).returncode == OK
    assert await table(program) == {right: 5.0}
    assert_proved(program)


async def test_by_code_and_time(program: Program, folder: Folder):
    """The command discards what is rejected, by code and time, as the request does."""
    for number, content in enumerate([b"[]", b"{}", b"[]", b"[]"]):
        folder.put(arrival(number), content)
    program.run("process", "--limit", 3)
    now = f"{datetime.now(UTC):%FT%T.%fZ}"
    program.run("process")
    assert asked(program, "discard", "--code", "payload_not_object", "--until", now) == {
        "discarded": 2
    }
    assert asked(program, "discard", "--since", now) == {"discarded": 1}
    assert folder.names("rejected") == [arrival(1)]
    assert asked(program, "discard", "--all") == {"discarded": 1}
    done = program.run("discard", "--series", "a")
    assert (done.returncode, "[transform] series" in done.stderr) == (CONFIGURATION, True)


def of(device: str, second: int, value: object) -> bytes:
    return body(second, value)[:-1] + f', "device": "{device}"}}'.encode()


async def test_many_series(program: Program, folder: Folder):
    """The row of a payload's own series goes, and the arrival before it comes back there."""
    many = {"DROPZONE_TRANSFORM_SERIES": "device"}
    for number, (device, value) in enumerate([("a", 1), ("b", 2), ("a", 3), ("b", 4)]):
        folder.put(arrival(number), of(device, 0, value))
    for number, device in enumerate("aab"):
        folder.put(arrival(4 + number), of(device, 0, "bad"))
    program.run("process", **many)
    backend = SqliteBackend(program.home / "data" / "dropzone.sqlite", series=True)
    done = program.run("discard", arrival(2), **many)
    assert json.loads(done.stdout) == {"discarded": 1}
    rows = [(row.series, row.mean) for row in await backend.find()]
    await backend.close()
    assert rows == [("a", 1.0), ("b", 4.0)]
    done = program.run("discard", "--series", "a", **many)
    assert json.loads(done.stdout) == {"discarded": 2}
    assert folder.names("rejected") == [arrival(6)]
    for command in ("verify", "rebuild"):
        done = program.run(command, **many)
        assert done.stdout.splitlines()[-1] == "all rows are right"


@pytest.mark.parametrize("arguments", [(), (SOME_ID, "--all"), (SOME_ID, "--code", "x")])
def test_say_which(program: Program, arguments: Sequence[str]):
    """The command asks which payloads are meant."""
    done = program.run("discard", *arguments)
    assert (done.returncode, "say which payloads" in done.stderr) == (USAGE, True)


def test_audit(program: Program, folder: Folder):
    """Who discards and puts back is in the log, and how many payloads."""
    [raw_id] = folder.fill(1)
    for command, fact in (("discard", "discarded"), ("undiscard", "undiscarded")):
        process = program.start(command, raw_id)
        _, err = process.communicate(timeout=test_cli.PATIENCE)
        assert f"action={command} caller=cli:" in err.decode()
        assert f"{fact}=1" in err.decode()


async def test_many(program: Program, folder: Folder):
    """Where much is processed, worker processes look for the earlier arrivals."""
    first = folder.put_batch(0, [body(number, 1) for number in range(6000)])
    last = folder.put_batch(9, [body(number, 2) for number in range(6000)])
    program.run("process")
    assert discard(program, last[7], last[5999]) == 2
    rows = await table(program)
    assert (len(rows), rows[first[7]], rows[first[5999]]) == (6000, 1.0, 1.0)
    assert_proved(program)


# ── Proof ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_row_that_names_a_discarded_payload(program: Program, folder: Folder):
    """Such a row, of an older copy of the database say, is told, and goes when told to."""
    _, second, last, other, fellow = put_rivals(folder)
    program.run("process")
    file = program.home / "data" / "dropzone.sqlite"
    shutil.copy(file, program.home / "older")
    discard(program, last, other)
    (program.home / "older").rename(file)
    for command in ("verify", "rebuild"):
        done = program.run(command)
        assert done.returncode == 1
        assert "2 discarded: cannot be checked, as their payload was discarded" in done.stdout
    assert last in await table(program)
    program.run("rebuild", "--delete-orphans")
    assert set(await table(program)) == {second, fellow}
    assert_proved(program)


async def test_a_stopped_proof_begins_anew(program: Program, folder: Folder):
    """What a rebuild had derived before it was stopped has no say in what was discarded since."""
    _, _, last, *_ = put_rivals(folder)
    program.run("process")
    kept = program.home / "data" / "journal" / "derived"
    kept.mkdir()
    (kept / "done").write_text(f"{DAY} 1\n")
    discard(program, last)
    assert not kept.exists()


# ── Kills ─────────────────────────────────────────────────────────────────────────────────────────

KILLED = """
import os, signal, sys
sys.path.insert(0, {repo!r})
left = {step}
def hook(event, arguments):
    global left
    if armed and event in ("os.rename", "os.remove", "sqlite3.connect"):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
import dropzone
armed = False
sys.addaudithook(hook)
move = dropzone.Discards.discard
async def discard(*arguments):
    global armed
    armed = True
    return await move(*arguments)
dropzone.Discards.discard = discard
sys.argv = ["dropzone.py", "discard", *{raw_ids!r}]
sys.exit(dropzone.main())
"""


def killed(program: Program, step: int, *raw_ids: UUID) -> bool:
    """Discard, and be killed (-9) before a file is renamed or deleted so many times."""
    code = KILLED.format(repo=str(REPO), step=step, raw_ids=list(map(str, raw_ids)))
    done = subprocess.run([sys.executable, "-c", code], cwd=program.home, check=False)
    assert done.returncode in (0, -signal.SIGKILL)
    return done.returncode != 0


async def test_kill(program: Program, folder: Folder):
    """A kill at any step of a discard leaves nothing that the next command does not finish."""
    first, second, last, other, fellow = put_rivals(folder)
    folder.put(late := arrival(3_000), body(2, 10))
    program.run("process")
    program.run("compact")
    data, pristine = program.home / "data", program.home / "pristine"
    data.rename(pristine)
    step, is_killed, followers = 0, True, ["process", "rebuild", "serve", "discard"]
    while is_killed:
        step += 1
        shutil.rmtree(data, ignore_errors=True)
        shutil.copytree(pristine, data)
        is_killed = killed(program, step, second, last, late)
        has_begun = note_of(program).exists() or (data / "discarded" / DAY).exists()
        follow(program, followers[step % len(followers)])
        done = {first: 1.0, other: 9.0, fellow: 8.0}
        assert await table(program) == (
            done if has_begun else {last: 3.0, late: 10.0, fellow: 8.0}
        ), step
        if step % 4 == 0:
            assert_proved(program)
    assert step > 10


def note_of(program: Program) -> Path:
    return program.home / "data" / "journal" / "discarding.json"


def follow(program: Program, command: str) -> None:
    """Run what comes next."""
    if command == "discard":
        assert program.run("discard", SOME_ID).returncode == OK
    elif command == "serve":
        server = Server(program)
        wait_for(lambda: not note_of(program).exists())
        server.process.send_signal(signal.SIGTERM)
        server.process.communicate()
    else:
        assert program.run(command).returncode == OK


async def test_a_damaged_note(program: Program, folder: Folder):
    """A note that is damaged is kept aside and told, and stops nothing."""
    [raw_id] = folder.fill(1)
    note_of(program).write_bytes(b'{"at":')
    done = program.run("process")
    assert (done.returncode, "the note of a discard is damaged" in done.stderr) == (OK, True)
    assert raw_id in await table(program)
    assert list((folder.place / "journal").glob("discarding.json.damaged-*"))
