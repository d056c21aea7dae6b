"""`backup`, and the way back: as the documentation shows it, and beside all that may be at work."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from uuid import UUID

import pytest
from filelock import FileLock
from postgres_server import _binaries
from power_cut import Ledger, Service, assert_served, assert_whole, load, wait_for
from power_cut import program as changed_program
from test_cli import (
    CONFIGURATION,
    DROPZONE,
    LINE,
    OK,
    PATIENCE,
    TRY_AGAIN,
    USAGE,
    Program,
    Server,
    assert_explained,
)
from test_docs import OPERATING, blocks, section

from backends import timestamp_text
from dropzone import datetime, timedelta

DEFECT, CANNOT_CREATE, NOT_READ, INTERRUPTED = 70, 73, 74, 130
MEMORY = Path("/dev/shm")
OLD = "01890a5d-ac96-774b-bcce-b302099a8057.json"  # of 2023-06-30
BACK_UP, RESTORE, PROVE, _ = blocks(section(OPERATING, "Backup and restore"), "sh")
SHOWN = "/backup/monday"  # in the documentation
PLACES = ["beside", pytest.param("elsewhere", marks=pytest.mark.linux)]


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    home = tmp_path / "home"
    home.mkdir()
    made = Program(home)
    yield made
    made.close()


@pytest.fixture
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where backups are put: on the disk of the data folder, or on another one."""
    if getattr(request, "param", "beside") == "beside":
        yield tmp_path
        return
    assert MEMORY.stat().st_dev != tmp_path.stat().st_dev, "run with --basetemp on a disk"
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


class Moments(Ledger):
    """Payloads of many moments, one in ten of which is no measurement."""

    def new_body(self, *, is_bad: bool = False) -> bytes:
        number = len(self.sent)
        at = timestamp_text(datetime.fromisoformat("2019-05-01T12:00Z") + timedelta(seconds=number))
        data = [0, number] if number % 10 and not is_bad else []
        body = json.dumps({"time_stamp": at, "data": data}).encode()
        self.sent.add(body)
        return body


def shell(home: Path, commands: str, target: Path) -> str:
    """Run commands of the documentation as they stand there, for another place; return the rest."""
    commands = commands.replace(SHOWN, str(target))
    commands = commands.replace("python dropzone.py", f"{sys.executable} {DROPZONE}")
    clean = {name: text for name, text in os.environ.items() if not name.startswith("DROPZONE_")}
    done = subprocess.run(
        ["sh", "-euc", commands],
        cwd=home,
        env=clean,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == OK, done.stdout + done.stderr
    return done.stdout


def bytes_in(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def rows_in(file: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(file)) as rows:
        return rows.execute("SELECT timestamp_utc, raw_id FROM measurements ORDER BY 1").fetchall()


# ── The documentation, literally ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", PLACES, indirect=True)
async def test_backup_and_restore_under_load(program: Program, place: Path):
    """What was acknowledged before a backup under load comes back, byte for byte, and is proved.

    Payloads land, are processed by request and by itself, and are put back to pending meanwhile.
    """
    home, data, ledger, known = program.home, program.home / "data", Moments(), Ledger()
    variables = {
        "DROPZONE_BACKEND": "sqlite",
        "DROPZONE_STORAGE_SQLITE_PATH": str(data / "dropzone.sqlite"),
        "DROPZONE_PROCESS_EVERY": "0.05",
    }
    service = Service(data, home, **variables)
    try:

        def back_up() -> None:
            program.run("compact")
            retrying = program.start("retry", "--all")
            known.acknowledged.update(dict(ledger.acknowledged))
            known.keys.update(dict(ledger.keys))
            shell(home, BACK_UP, place / "backup")
            retrying.wait(PATIENCE)

        await load(service, ledger, back_up, process=True)
        assert service.stop() == OK
        last = max(ledger.acknowledged)
        shutil.rmtree(data)

        shell(home, RESTORE, place / "backup")
        known.sent = ledger.sent
        assert known.acknowledged
        assert program.payloads("processed")
        assert_whole(data, known)

        service = Service(data, home, **variables)
        await assert_served(service, known)
        assert service.stop() == OK
    finally:
        service.kill()
    program.run("process")
    proof = program.run("verify")
    assert proof.returncode == OK, proof.stdout
    assert "all rows are right" in proof.stdout
    assert UUID(program.run("ingest", "-", stdin=LINE).stdout.strip()) > last


@pytest.mark.parametrize("place", PLACES, indirect=True)
def test_proved_where_it_lies(program: Program, place: Path):
    """A backup can be proved without being restored, and its payloads stay as they are."""
    program.run("ingest", "-", stdin=LINE + b"\n17\n")
    program.run("process")
    program.run("ingest", "-", stdin=LINE)
    shell(program.home, BACK_UP, place / "backup")
    before = bytes_in(place / "backup")
    assert "1 right, 0 wrong, 0 that cannot be checked" in shell(
        program.home, PROVE, place / "backup"
    )
    assert {name: bytes_in(place / "backup")[name] for name in before if ".json" in name} == {
        name: body for name, body in before.items() if ".json" in name
    }
    shutil.rmtree(program.home / "data")
    shell(program.home, RESTORE, place / "backup")
    assert len(program.payloads()) == 1


def test_postgres(program: Program, place: Path, postgres_url: str):
    """Behind a dump and a backup, `rebuild` adds the rows that were made between the two."""
    own = {"DROPZONE_DATABASE_URL": postgres_url}
    program.run("ingest", "-", stdin=LINE)
    assert program.run("process", **own).returncode == OK
    dump, pg_dump, psql = place / "dump.sql", _binaries() / "pg_dump", _binaries() / "psql"
    subprocess.run([pg_dump, "--clean", "--file", dump, postgres_url], check=True)
    program.run("ingest", "-", stdin=LINE.replace(b"2019", b"2020"))
    assert program.run("process", **own).returncode == OK
    done = program.run("backup", place / "backup", **own)
    assert done.returncode == OK, done.stderr
    assert "rows of postgres 127.0.0.1:" in done.stdout
    assert "not copied" in done.stdout
    assert not (place / "backup" / "dropzone.sqlite").exists()

    shutil.rmtree(program.home / "data")
    restoring = [psql, "--quiet", "--set=ON_ERROR_STOP=1", "--file", dump, postgres_url]
    subprocess.run(restoring, check=True, stdout=subprocess.DEVNULL)
    shutil.copytree(place / "backup", program.home / "data")
    assert "1 right, 1 wrong" in program.run("verify", **own).stdout
    assert program.run("rebuild", **own).returncode == OK
    assert "all rows are right" in program.run("verify", **own).stdout


# ── What is in it ─────────────────────────────────────────────────────────────────────────────────


def test_settings_and_keys(program: Program, place: Path):
    """Settings and keys are in the backup, readable by its owner alone."""
    (program.home / "mine.toml").write_text('[auth]\napi_key = "hunter2"\n')
    (program.home / ".env").write_text("DROPZONE_PROCESS_BATCH=10\n")
    for name in ("mine.toml", ".env"):
        (program.home / name).chmod(0o644)
    program.run("ingest", "-", stdin=LINE)
    program.run("key", "new", "gateway", "--scope", "ingest")
    done = program.run("--config", "mine.toml", "backup", place / "backup")
    assert done.returncode == OK, done.stderr
    for copy, file in (
        ("settings/mine.toml", program.home / "mine.toml"),
        ("settings/.env", program.home / ".env"),
        ("keys.toml", program.home / "data" / "keys.toml"),
    ):
        assert (place / "backup" / copy).read_bytes() == file.read_bytes()
        assert (place / "backup" / copy).stat().st_mode & 0o777 == 0o600
    assert (place / "backup").stat().st_mode & 0o777 == 0o700
    assert "hunter2" not in done.stdout + done.stderr


def test_rows_elsewhere(program: Program, place: Path):
    """Rows, processed and rejected payloads are in the backup, wherever settings put them."""
    folders = {
        "DROPZONE_STORAGE_SQLITE_PATH": program.home / "rows" / "mine.sqlite",
        "DROPZONE_RAW_PROCESSED_DIR": program.home / "done",
        "DROPZONE_RAW_REJECTED_DIR": program.home / "bad",
    }
    program.run("ingest", "-", stdin=LINE + b"\n17\n", **folders)
    program.run("process", **folders)
    done = program.run("backup", place / "backup", **folders)
    assert (done.returncode, done.stderr) == (OK, "")
    said = done.stdout.splitlines()
    assert said[0] == (
        f"{place}/backup: 0 packs, 1 processed, 1 rejected, 0 discarded and 0 pending "
        f"payloads; rows of sqlite {program.home}/rows/mine.sqlite: 1"
    )
    assert "on another disk" in said[1]
    assert rows_in(place / "backup" / "dropzone.sqlite") == rows_in(
        program.home / "rows" / "mine.sqlite"
    )
    names = [file.name for file in (place / "backup").iterdir()]
    assert {"raw", "processed", "rejected", "journal", "dropzone.sqlite"} < set(names)
    assert not [name for name in names if name.startswith("dropzone.sqlite-")]


def test_rows_that_cannot_be_read(program: Program, place: Path):
    """A table that is damaged is told, exit code 74; the payloads, which make it, are kept."""
    program.run("ingest", "-", stdin=LINE)
    program.run("process")
    (program.home / "data" / "dropzone.sqlite").write_bytes(b"no database" * 1000)
    done = program.run("backup", place / "backup")
    assert done.returncode == NOT_READ
    assert "not in the backup: " in done.stderr
    assert "dropzone.sqlite: not copied" in done.stdout
    assert not (place / "backup" / "dropzone.sqlite").exists()
    assert len(list((place / "backup" / "processed").rglob("*.json"))) == 1


def test_a_payload_that_cannot_be_read(program: Program, place: Path):
    """It is told by its name, once, exit code 74, and everything else is in the backup."""
    program.run("ingest", "-", stdin=LINE)
    day = program.home / "data" / "processed" / "2023-06-30"
    broken = day / OLD
    broken.mkdir(parents=True)
    done = program.run("backup", place / "backup")
    assert done.returncode == NOT_READ
    assert done.stderr == f"dropzone: not in the backup: {broken} cannot be read: Is a directory\n"
    assert "1 pending" in done.stdout


# ── Where it cannot be ────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_is_taken(program: Program, place: Path):
    """What is there already stays as it is: exit code 73."""
    program.run("ingest", "-", stdin=LINE)
    for name in ("backup/journal", "file"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"mine")
    before = bytes_in(place)
    for name in ("backup", "file", "nowhere/backup", "home/data/raw", "home/data/raw/backup"):
        done = program.run("backup", place / name)
        assert (done.returncode, done.stdout) == (CANNOT_CREATE, "")
        assert str(place / name) in done.stderr
        assert_explained(done.stderr)
    assert {name: bytes_in(place)[name] for name in before} == before
    assert not [*place.rglob("*.part")]


def test_no_payloads(program: Program, place: Path):
    """Where there is no data folder there is nothing to copy, and none is made: exit code 78."""
    done = program.run("backup", place / "backup")
    assert (done.returncode, done.stdout) == (CONFIGURATION, "")
    assert str(program.home / "data") in done.stderr
    assert [file.name for file in place.iterdir()] == ["home"]
    assert not (program.home / "data").exists()


def test_no_name(program: Program):
    """Without a folder the command line is wrong: exit code 2."""
    assert program.run("backup").returncode == USAGE


# ── What is kept out ──────────────────────────────────────────────────────────────────────────────


@contextmanager
def stalled(program: Program, place: Path, where: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Let a backup to another file system wait in the middle of a folder, at a pipe."""
    pipe = program.home / "data" / where / OLD
    pipe.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(pipe)
    process = program.start("backup", place / "backup")
    writer = -1
    while writer < 0:
        with suppress(OSError):  # until somebody reads
            writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
        assert process.poll() is None
        time.sleep(0.02)
    try:
        yield process
    finally:
        pipe.unlink()
        os.close(writer)


@pytest.mark.linux
@pytest.mark.parametrize("place", ["elsewhere"], indirect=True)
def test_processing_waits_and_landing_goes_on(program: Program, place: Path):
    """While pending payloads are copied they land, and are not processed; afterwards they are."""
    source = changed_program(program.home / "program", LOCK_PATIENCE=0.5)
    program.command = (sys.executable, source)
    server = Server(program)
    server.json("POST", "/ingest", LINE)
    with stalled(program, place, "raw") as process:
        server.json("POST", "/ingest", LINE)
        status, headers, body = server.request("POST", "/process")
        assert (status, json.loads(body)["code"]) == (503, "processor_busy")
        assert "Retry-After" in headers
        for command in ("verify", "compact"):
            assert program.run(command).returncode == TRY_AGAIN
        assert not (place / "backup").exists()
    assert process.wait(PATIENCE) == OK
    assert server.json("POST", "/process")["processed"] == 2
    assert server.stop() == OK


@pytest.mark.linux
@pytest.mark.parametrize("place", ["elsewhere"], indirect=True)
def test_processing_goes_on_while_the_bulk_is_copied(program: Program, place: Path):
    """While processed payloads are copied, processing goes on, and its result is in the backup."""
    server = Server(program)
    server.json("POST", "/ingest", LINE)
    with stalled(program, place, "processed/2023-06-30") as process:
        assert server.json("POST", "/process")["processed"] == 1
        server.json("POST", "/ingest", LINE)
    assert process.wait(PATIENCE) == OK
    assert server.stop() == OK
    [raw_id] = rows_in(place / "backup" / "dropzone.sqlite")
    assert len([*(place / "backup" / "processed").rglob(f"{raw_id[1]}.json")]) == 1
    assert len([*(place / "backup" / "raw").iterdir()]) == 1


@pytest.mark.parametrize("lock", ["process.lock", "journal/upkeep.lock"])
def test_waits_for_others(program: Program, place: Path, lock: str):
    """A backup waits for the run that is at work, says so, and then is made."""
    source = changed_program(program.home / "program", LOCK_PATIENCE=0.2)
    program.command = (sys.executable, source)
    program.run("ingest", "-", stdin=LINE)
    with FileLock(program.home / "data" / lock):
        process = program.start("backup", place / "backup")
        assert process.stderr is not None
        line = process.stderr.readline().decode()
        assert line == f"dropzone: waiting for the run that holds {program.home}/data/{lock}\n"
        assert not (place / "backup").exists()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == OK
    assert (place / "backup" / "raw").is_dir()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_half_a_backup(program: Program, place: Path, how: signal.Signals):
    """What was stopped halfway is never taken for a backup; Ctrl-C leaves nothing of it."""
    program.run("ingest", "-", stdin=LINE)
    with FileLock(program.home / "data" / "process.lock"):
        process = program.start("backup", place / "backup")
        wait_for(lambda: [*place.glob("backup.*.part/processed")], PATIENCE)
        time.sleep(0.2)
        process.send_signal(how)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (INTERRUPTED if how == signal.SIGINT else -how)
    assert b"Traceback" not in err
    assert not (place / "backup").exists()
    assert bool([*place.glob("*.part")]) == (how == signal.SIGKILL)
    assert program.run("backup", place / "backup").returncode == OK


def test_audit(program: Program, place: Path):
    """Who made a backup, and where to, is in the audit log."""
    program.run("ingest", "-", stdin=LINE)
    process = program.start("backup", place / "backup")
    _, err = process.communicate(timeout=PATIENCE)
    assert "action=backup caller=cli:" in err.decode()
    assert f"folder={place}/backup pending=1" in err.decode()


# ── A defect ──────────────────────────────────────────────────────────────────────────────────────


def test_a_defect(program: Program):
    """A defect has an exit code of its own, so that nobody takes it for rows that are wrong."""
    (program.home / "broken.py").write_text(
        "from backends.memory import MemoryBackend\n\n\n"
        "class Broken(MemoryBackend):\n"
        "    async def find(self, **_):\n"
        "        raise ZeroDivisionError\n"
    )
    program.run("ingest", "-", stdin=LINE)
    own = {"DROPZONE_BACKEND": "broken:Broken", "PYTHONPATH": program.home}
    done = program.run("verify", **own)
    assert (done.returncode, done.stdout) == (DEFECT, "")
    assert "a defect of Dropzone has ended the command" in done.stderr
    assert "ZeroDivisionError" in done.stderr
