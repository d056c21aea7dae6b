"""Finished days are packed by themselves, once a day, where that is asked for."""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import test_cli
from test_cli import OK, PATIENCE, Program, Server
from test_logs import lines_of
from test_processing import Folder

import dropzone
from backends.raw import day_of
from dropzone import compact_daily, upkeep_lock

program = test_cli.program

LONG_AGO = "01890a5d-ac96-774b-bcce-b302099a8057"  # of the year 2023
LATER = "018a0a5d-ac96-774b-bcce-b302099a8057"  # some weeks later
COMPACT = {"DROPZONE_RAW_COMPACT": "true"}


def put(processed: Path, raw_id: str) -> Path:
    """Lay a payload where it lies when it was processed; return its file."""
    file = processed / day_of(raw_id) / f"{raw_id}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"[]")
    return file


def pack_of(processed: Path, raw_id: str) -> Path:
    return processed / f"{day_of(raw_id)}.ndjson.gz"


def read_until(process: "subprocess.Popen[bytes]", text: str) -> str:
    """Return what a program logs, up to the line that has a text."""
    assert process.stderr is not None
    log = ""
    while text not in log:
        line = process.stderr.readline().decode()
        assert line, log
        log += line
    return log


def audited(log: str) -> list[dict[str, Any]]:
    lines = [line for line in log.splitlines() if line.startswith("{")]
    return lines_of("\n".join(lines), "dropzone.audit")


# ── Programs ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", [("--port", "0"), ("process", "--watch")])
def test_packs_by_itself(program: Program, command: tuple[str, ...]):
    """Soon after its start a service packs the days that are finished; the audit says who did."""
    processed = program.home / "data" / "processed"
    put(processed, LONG_AGO)
    process = program.start(*command, DROPZONE_LOG_FORMAT="json", **COMPACT)
    log = read_until(process, '"compact"')
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == OK
    assert pack_of(processed, LONG_AGO).exists()
    assert not (processed / day_of(LONG_AGO)).exists()
    [line] = audited(log)
    assert (line["action"], line["caller"], line["day"]) == ("compact", "timer", day_of(LONG_AGO))
    assert line["packed"] == 1


def test_deletes_what_has_expired(program: Program):
    """What is older than keep_days goes by itself, too, with an audit line for each pack."""
    processed = program.home / "data" / "processed"
    put(processed, LONG_AGO)
    form = {"DROPZONE_LOG_FORMAT": "json"}
    server = Server(program, DROPZONE_RAW_KEEP_DAYS=30, **COMPACT, **form)
    expired = {"action": "expire", "caller": "timer", "pack": pack_of(processed, LONG_AGO).name}
    log = read_until(server.process, '"expire"')
    assert expired.items() <= audited(log)[-1].items()
    assert not pack_of(processed, LONG_AGO).exists()
    assert server.stop() == OK


def test_nothing_is_packed_unasked(program: Program):
    """Unless it is asked for, no service packs anything."""
    assert not dropzone.Config().raw.compact
    processed = program.home / "data" / "processed"
    file = put(processed, LONG_AGO)
    server = Server(program)
    time.sleep(2 * dropzone.UPKEEP_FIRST / 5)
    assert server.stop() == OK
    assert file.exists()


@pytest.mark.linux
@pytest.mark.parametrize("command", [("--port", "0"), ("process", "--watch")])
def test_a_stop_does_not_wait_for_a_pack(program: Program, command: tuple[str, ...]):
    """A service that is told to stop does so in order, however long a pack still takes."""
    processed = program.home / "data" / "processed"
    file = put(processed, LONG_AGO)
    file.unlink()
    os.mkfifo(file)  # reading it takes for ever
    process = program.start(*command, DROPZONE_LOG_FORMAT="json", **COMPACT)
    writer = -1
    while writer < 0:
        with suppress(OSError):  # until somebody reads
            writer = os.open(file, os.O_WRONLY | os.O_NONBLOCK)
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    os.close(writer)
    assert process.returncode == OK, err
    assert b"Traceback" not in err
    assert file.exists()
    [line] = audited(err.decode())
    assert line["error"] == "CancelledError"


# ── The clock ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Folder]:
    """A data folder whose upkeep looks many times a second."""
    monkeypatch.setattr(dropzone, "UPKEEP_FIRST", 0.05)
    monkeypatch.setattr(dropzone, "UPKEEP_PAUSE", 0.05)
    opened = await Folder(tmp_path).opened()
    yield opened
    await opened.store.close()


async def until(found: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not found():
            await asyncio.sleep(0.02)


async def stopped(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_once_a_day(folder: Folder):
    """What comes late for a day that was packed waits until tomorrow."""
    processed = folder.place / "processed"
    put(processed, LONG_AGO)
    task = asyncio.create_task(compact_daily(folder.store.portable()))
    await until(lambda: not (processed / day_of(LONG_AGO)).exists())
    late = put(processed, LATER)
    await asyncio.sleep(1)  # many looks
    assert late.exists()
    await stopped(task)


async def test_a_new_day(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    """When the next day has begun in UTC, it packs again."""
    processed = folder.place / "processed"
    put(processed, LONG_AGO)
    task = asyncio.create_task(compact_daily(folder.store.portable()))
    await until(lambda: not (processed / day_of(LONG_AGO)).exists())
    put(processed, LATER)

    class Tomorrow(dropzone.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + dropzone.timedelta(days=1)

    monkeypatch.setattr(dropzone, "datetime", Tomorrow)
    await until(lambda: not (processed / day_of(LATER)).exists())
    await stopped(task)


async def test_one_bad_day(folder: Folder, caplog: pytest.LogCaptureFixture):
    """A day that cannot be packed is logged and tried again; the days behind it are packed."""
    processed = folder.place / "processed"
    bad = processed / day_of(LONG_AGO) / f"{LONG_AGO}.json"
    bad.mkdir(parents=True)
    put(processed, LATER)
    task = asyncio.create_task(compact_daily(folder.store.portable()))
    await until(pack_of(processed, LATER).exists)
    await until(lambda: "compact failed, next try within the hour" in caplog.text)
    bad.rmdir()
    put(processed, LONG_AGO)
    await until(pack_of(processed, LONG_AGO).exists)
    await stopped(task)


async def test_one_at_a_time(folder: Folder, caplog: pytest.LogCaptureFixture):
    """While another run is at work on the packs, it waits, and has its turn later."""
    caplog.set_level("INFO")
    processed = folder.place / "processed"
    put(processed, LONG_AGO)
    with upkeep_lock(folder.store):
        task = asyncio.create_task(compact_daily(folder.store.portable()))
        await until(lambda: "compact waits for another run" in caplog.text)
        assert not pack_of(processed, LONG_AGO).exists()
    await until(pack_of(processed, LONG_AGO).exists)
    await stopped(task)
