"""What the log says of requests and of changes of state, in both forms, and what it never says."""

import asyncio
import fcntl
import json
import logging
import os
import pwd
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import test_cli
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from test_cli import AUDIT, LINE, OK, PATIENCE, SECRET, Program, Server, closed_port

import dropzone
from backends.memory import MemoryBackend
from backends.raw import day_of
from dropzone import (
    Config,
    JsonLines,
    LineQueue,
    ProcessConfig,
    RawConfig,
    StandardError,
    TextLines,
    create_app,
    log_facts,
)

program = test_cli.program
FIELDS = ("request_id", "caller", "address", "method", "route", "status", "bytes", "duration")
ALL = {"DROPZONE_LOG_REQUESTS": "true"}
NDJSON = {"Content-Type": "application/x-ndjson"}
ME = f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
BREAKS = re.compile("[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")


def lines_of(log: str, logger: str = "") -> list[dict[str, Any]]:
    """Return the objects of a JSON log; each line has to be one."""
    lines = list(map(json.loads, log.splitlines()))
    assert all({"time", "level", "logger"} <= line.keys() for line in lines)
    return [line for line in lines if logger in ("", line["logger"])]


def log_of(server: Server) -> str:
    """Stop a server and return all that it has logged."""
    assert server.stop() == OK
    return server.log


def audit_of(program: Program, *arguments: object, **variables: object) -> list[dict[str, Any]]:
    """Run a command; return its audit lines."""
    process = program.start(*arguments, DROPZONE_LOG_FORMAT="json", **variables)
    _, err = process.communicate(timeout=PATIENCE)
    lines = [line for line in err.decode().splitlines() if line.startswith("{")]
    return lines_of("\n".join(lines), "dropzone.audit")


# ── Requests ──────────────────────────────────────────────────────────────────────────────────────


def test_a_line_for_each_request(program: Program):
    """A request is one line, an object: who, what, the answer, how much, how long, the raw_id."""
    server = Server(program, DROPZONE_LOG_FORMAT="json", DROPZONE_API_KEY=SECRET, **ALL)
    landed = server.json("POST", "/ingest", LINE, x_api_key=SECRET, X_Request_ID="mine")
    batch = server.json("POST", "/ingest", LINE + b"\n1\n2", x_api_key=SECRET, **NDJSON)
    server.request("GET", f"/raw/{landed['raw_id']}", x_api_key=SECRET)
    server.request("GET", "/measurements")
    server.request("GET", "/no/such?path=1")
    one, three, receipt, refused, unknown = lines_of(log_of(server), "dropzone.access")

    assert list(one) == ["time", "level", "logger", *FIELDS, "raw_id"]
    assert one["request_id"] == "mine"
    assert one["raw_id"] == landed["raw_id"]
    answered = ["key:api_key", "127.0.0.1", "POST", "/ingest", 202, len(LINE)]
    assert [one[name] for name in FIELDS[1:7]] == answered
    assert 0 < one["duration"] < PATIENCE
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", one["time"])
    assert (three["raw_id"], three["payloads"]) == (batch["raw_ids"][0], 3)
    assert (receipt["route"], receipt["status"], "raw_id" in receipt) == (
        "/raw/{raw_id}",
        200,
        False,
    )
    assert (refused["caller"], refused["status"]) == ("", 401)
    assert (unknown["route"], unknown["status"]) == ("", 404)


def test_a_line_for_each_refusal(program: Program):
    """Unless told otherwise, only a refused request has a line: with its code and its address."""
    server = Server(program, DROPZONE_LOG_FORMAT="json", DROPZONE_API_KEY=SECRET)
    server.request("POST", "/ingest", LINE, x_api_key=SECRET)
    server.request("POST", "/process", x_api_key=SECRET)
    server.request("POST", "/ingest", b"{", x_api_key=SECRET)
    server.request("POST", "/ingest", LINE, x_api_key="wrong")
    server.request("GET", "/status")
    lines = lines_of(log_of(server), "dropzone.access")

    assert [(line["code"], line["address"], line["route"]) for line in lines] == [
        ("payload_not_json", "127.0.0.1", "/ingest"),
        ("key_refused", "127.0.0.1", "/ingest"),
        ("key_refused", "127.0.0.1", "/status"),
    ]


def test_a_line_for_each_slow_request(program: Program):
    """An answer that took a second or more has a line, accepted or not."""
    server = Server(program, DROPZONE_LOG_FORMAT="json")
    lock = program.home / "data" / "process.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        freed = threading.Timer(1.5, fcntl.flock, (file, fcntl.LOCK_UN))
        freed.start()
        assert server.json("POST", "/process")["checked"] == 0
    server.json("POST", "/process")
    [slow] = lines_of(log_of(server), "dropzone.access")

    assert (slow["route"], slow["status"]) == ("/process", 200)
    assert slow["duration"] >= 1


def test_polls_make_no_lines(program: Program):
    """Whoever watches the service is not in the log, even where each request is to be."""
    server = Server(program, **ALL)
    for path in ("/health", "/ready", "/status", "/metrics"):
        assert server.request("GET", path)[0] == 200

    assert "dropzone.access" not in log_of(server)


def test_the_same_as_text(program: Program):
    """Unless told otherwise a line is text with the same facts as name=value."""
    server = Server(program, **ALL)
    landed = server.json("POST", "/ingest", LINE, X_Request_ID="mine")
    [line] = [line for line in log_of(server).splitlines() if "dropzone.access" in line]

    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO dropzone\.access: request_id=mine caller= "
        r"address=127\.0\.0\.1 method=POST route=/ingest status=202 "
        rf"bytes={len(LINE)} duration=[\d.e-]+ raw_id={landed['raw_id']}",
        line,
    )


def test_no_line_is_lost(program: Program):
    """A server that is stopped has written the line of every request that it has answered."""
    server = Server(program, DROPZONE_LOG_FORMAT="json", **ALL)
    ids = [server.json("POST", "/ingest", LINE)["raw_id"] for _ in range(21)]

    assert [line["raw_id"] for line in lines_of(log_of(server), "dropzone.access")] == ids


def test_a_line_comes_soon(program: Program):
    """A line does not wait for other requests."""
    server = Server(program)
    server.request("GET", "/nowhere")
    assert server.process.stderr is not None
    stuck = threading.Timer(PATIENCE, server.process.kill)
    stuck.start()
    line = next(line for line in server.process.stderr if b"dropzone.access" in line)
    stuck.cancel()

    assert b"status=404" in line


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_secret(program: Program, form: str):
    """Even the most talkative log holds no key, no payload, no query and no path of a client's."""
    settings = {"DROPZONE_LOG_LEVEL": "debug", "DROPZONE_LOG_FORMAT": form, **ALL}
    server = Server(program, DROPZONE_API_KEY=SECRET, **settings)
    key = {"x_api_key": SECRET}
    server.request("POST", "/ingest", b'{"time_stamp": "marked", "data": ["marked"]}', **key)
    server.request("POST", "/ingest", b"{marked", **key)
    server.request("POST", "/ingest", b"1", Authorization=f"Bearer {SECRET}")
    server.request("POST", "/ingest", b"1", x_api_key="marked")
    server.request("POST", "/ingest", b"1", Idempotency_Key="marked", X_Other="marked", **key)
    server.request("POST", "/process", **key)
    server.request("GET", "/marked?x=marked", **key)
    server.request("GET", "/rejected?code=marked", **key)
    server.request("GET", "/raw/marked?marked=1", **key)
    log = log_of(server)

    assert log.count("dropzone.access") == 9
    assert SECRET not in log
    assert "marked" not in log


# ── Audit ─────────────────────────────────────────────────────────────────────────────────────────


def test_audit_of_requests(program: Program):
    """Processing and putting back by request are audited: by which key, and what came of it."""
    server = Server(program, DROPZONE_LOG_FORMAT="json", DROPZONE_API_KEY=SECRET)
    key = {"x_api_key": SECRET}
    server.request("POST", "/ingest", LINE, **key)
    server.request("POST", "/ingest", b"[]", **key)
    server.request("POST", "/process", X_Request_ID="first", **key)
    server.request("POST", "/rejected/retry", X_Request_ID="second", **key)
    server.request("POST", "/process")
    process, retry = lines_of(log_of(server), "dropzone.audit")

    cause = {"action": "process", "caller": "key:api_key", "request_id": "first"}
    assert cause.items() | {"processed": 1, "failed": 1}.items() <= process.items()
    cause = {"action": "retry", "caller": "key:api_key", "request_id": "second"}
    assert cause.items() | {"retried": 1}.items() <= retry.items()


def test_audit_of_commands(program: Program):
    """A command that changes something is audited, by the user that runs it; no other is."""
    for arguments, facts in (
        (("process",), {"action": "process", "processed": 1, "failed": 1}),
        (("retry", "--all"), {"action": "retry", "retried": 1}),
        (("rebuild",), {"action": "rebuild", "missing": 1}),
    ):
        if arguments == ("process",):
            program.run("ingest", "-", stdin=LINE + b"\n[]")
        if arguments == ("rebuild",):
            (program.home / "data" / "dropzone.sqlite").unlink()
            assert audit_of(program, "rebuild", "--dry-run") == []
            assert audit_of(program, "verify") == []
        [line] = audit_of(program, *arguments)
        assert {"caller": ME, **facts}.items() <= line.items()


def test_audit_of_compact(program: Program):
    """Each day that is packed and each pack that is deleted has its audit line."""
    old = "01890a5d-ac96-774b-bcce-b302099a8057"  # of the year 2023
    program.run("ingest", "-", stdin=LINE)
    [path] = (program.home / "data" / "raw").glob("*.json")
    day = program.home / "data" / "processed" / day_of(old)
    day.mkdir()
    path.rename(day / f"{old}.json")
    packed, expired = audit_of(program, "compact", DROPZONE_RAW_KEEP_DAYS=30)

    assert {
        "action": "compact",
        "caller": ME,
        "day": day.name,
        "packed": 1,
    }.items() <= packed.items()
    assert {"action": "expire", "caller": ME, "pack": f"{day.name}.ndjson.gz"}.items() <= (
        expired.items()
    )


def test_audit_of_a_failure(program: Program):
    """What fails is audited as well, since a part of it may be done."""
    program.run("ingest", "-", stdin=LINE)
    with closed_port() as port:
        url = f"postgresql://me:{SECRET}@127.0.0.1:{port}/db"
        [line] = audit_of(program, "process", DROPZONE_DATABASE_URL=url)

    assert (line["action"], line["error"]) == ("process", "BackendUnavailable")


def test_audit_as_text(program: Program):
    """Also a command that is told to be quiet writes its audit line, to standard error."""
    process = program.start("process", DROPZONE_LOG_LEVEL="error")
    _, err = process.communicate(timeout=PATIENCE)

    assert f"{AUDIT}action=process caller={ME} processed=0 failed=0\n" in err.decode()


async def test_no_audit_of_the_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The server that processes by itself is no person and no key."""
    caplog.set_level(logging.INFO)
    config = Config(raw=RawConfig(dir=tmp_path / "raw"), process=ProcessConfig(every=0.01))
    app = create_app(config, backend=MemoryBackend())
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await app[dropzone.RAW].land(LINE)
        async with asyncio.timeout(PATIENCE):
            while "processed 1" not in caplog.text:
                await asyncio.sleep(0.01)
    finally:
        await runner.cleanup()

    assert "dropzone.audit" not in {record.name for record in caplog.records}


# ── Forms ─────────────────────────────────────────────────────────────────────────────────────────


def record_of(message: object, error: BaseException | None = None) -> logging.LogRecord:
    info = (type(error), error, error.__traceback__) if error else None
    return logging.LogRecord("dropzone", logging.INFO, "", 0, message, (), info)


def logged(facts: Mapping[str, object]) -> logging.LogRecord:
    """Return the record that facts are logged with."""
    records: list[logging.LogRecord] = []

    def keep(record: logging.LogRecord) -> bool:
        records.append(record)
        return False

    logger = logging.getLogger("dropzone.forms")
    logger.setLevel(logging.INFO)
    logger.addFilter(keep)
    log_facts(logger, logging.INFO, facts)
    logger.removeFilter(keep)
    [record] = records
    return record


@given(st.text())
def test_no_text_forges_a_line(text: str):
    """Whatever a message holds, the text of it is one line, others indented, and no control."""
    first, *others = TextLines().format(record_of(text)).split("\n")

    assert " INFO dropzone: " in first
    assert all(line.startswith("    ") for line in others)
    assert all(line.isprintable() for line in (first, *others))


@given(st.dictionaries(st.sampled_from("abc"), st.text() | st.integers() | st.none(), min_size=1))
def test_no_value_forges_a_fact(facts: dict[str, Any]):
    """Whatever a value holds, the names in the text are those of the facts, in order."""
    text = TextLines().format(logged(facts))
    found = re.findall(r'(\w+)=("(?:[^"\\]|\\.)*"|\S*)(?: |$)', text.partition(": ")[2])

    assert not BREAKS.search(text)
    assert [name for name, _ in found] == list(facts)


@given(st.text(st.characters()))
def test_json_is_one_line(text: str):
    """Whatever a message holds, even what is no UTF-8, it is one JSON object on one line."""
    line = JsonLines().format(record_of(text))

    assert "\n" not in line
    assert json.loads(line)["message"] == text
    assert json.loads(JsonLines().format(logged({"x": text})))["x"] == text


def test_exceptions():
    """An exception is a field of the object, and indented text under its line."""
    try:
        raise ValueError("wrong\n2026-01-01 00:00:00.000 INFO forged")
    except ValueError as error:
        record = record_of("failed", error)
    document = json.loads(JsonLines().format(record))
    first, *others = TextLines().format(record).split("\n")

    assert document["message"] == "failed"
    assert document["exception"].startswith("Traceback")
    assert first.endswith("INFO dropzone: failed")
    assert others[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in others)


# ── Embedding ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("given_config", "handlers"), [("dropzone.Config()", 0), ("", 1)])
def test_logging_belongs_to_whoever_configures(given_config: str, handlers: int, tmp_path: Path):
    """An application that hands a configuration in keeps its own logging; gunicorn has none."""
    code = (
        "import logging, dropzone\n"
        f"dropzone.create_app({given_config})\n"
        f"assert len(logging.getLogger().handlers) == {handlers}\n"
        "logging.getLogger().handlers[:] = own = [logging.NullHandler()]\n"
        "dropzone.create_app()\n"
        "assert logging.getLogger().handlers == own\n"
    )
    home = str(Path(dropzone.__file__).parent)
    environ = {"PYTHONPATH": home, "PATH": os.environ["PATH"]}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environ)


async def test_records_for_others(
    aiohttp_client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """An embedding application gets ordinary records: their facts as a mapping, or as text."""
    caplog.set_level(logging.INFO)
    outer = web.Application()
    inner = create_app(Config(raw=RawConfig(dir=tmp_path / "raw")), backend=MemoryBackend())
    outer.add_subapp("/zone/", inner)
    client = await aiohttp_client(outer)
    await client.post("/zone/ingest", data=b"{}")
    await client.post("/zone/ingest", data=b"{")
    await client.close()
    [record] = [record for record in caplog.records if record.name == "dropzone.access"]

    assert record.facts["route"] == "/zone/ingest"
    assert " status=400 bytes=1 " in record.getMessage()


# ── Readers of standard error ─────────────────────────────────────────────────────────────────────


def test_a_reader_that_stalls():
    """Nobody waits for a reader of standard error; the lines that are lost for it are counted."""
    readable, writable = os.pipe()
    lines = LineQueue(StandardError("text", writable))
    for number in range(30_000):
        lines.handle(record_of(f"line {number}"))
    found = lost = 0
    with open(readable) as reader:
        lines.handle(record_of("the last"))  # it may be lost, too
        threading.Timer(0.5, lines.finish).start()
        for text in reader:
            match = re.search(r"(\d+) lines were lost", text)
            lost += int(match[1]) if match else 0
            found += not match
            if found + lost == 30_001:
                break
    os.close(writable)

    assert 0 < found < 12_000
    assert lost > 18_000


def test_a_reader_that_has_gone(program: Program):
    """A service whose standard error was closed goes on, and stops when it is told to."""
    server = Server(program)
    assert server.process.stderr is not None
    server.process.stderr.close()
    for _ in range(100):
        assert server.request("POST", "/ingest", b"{")[0] == 400
    assert server.json("POST", "/ingest", LINE)["status"] == "accepted"
    server.process.terminate()
    assert server.process.wait(PATIENCE) == OK


def test_a_stalled_reader_does_not_keep_the_program(program: Program):
    """A service whose standard error nobody reads stops all the same, within seconds."""
    server = Server(program)
    for _ in range(2000):  # more lines than fit into a pipe
        server.request("POST", "/ingest", b"{")
    server.process.terminate()
    assert server.process.wait(PATIENCE) == OK
    assert server.process.stderr is not None
    assert b"payload_not_json" in server.process.stderr.read()


def test_a_process_that_was_forked(tmp_path: Path):
    """Workers that are forked from a program that has set up the log have their lines, too."""
    code = (
        "import logging, os, dropzone\n"
        "dropzone.create_app()\n"
        "child = os.fork()\n"
        "logging.getLogger('dropzone').warning('of the %s', 'parent' if child else 'child')\n"
        "if child: os.waitpid(child, 0)\n"
    )
    home = str(Path(dropzone.__file__).parent)
    environ = {"PYTHONPATH": home, "PATH": os.environ["PATH"]}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, check=True, cwd=tmp_path, env=environ, capture_output=True, text=True
    )

    assert "of the parent" in done.stderr
    assert "of the child" in done.stderr
