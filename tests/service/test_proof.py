"""Proof: every row is checked against the payload that it names, and set right from it."""

import asyncio
import gzip
import itertools
import os
import signal
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess
from urllib.parse import urlsplit
from uuid import UUID, uuid4

import asyncpg
import msgspec
import psutil
import pytest
from msgspec.structs import replace
from test_cli import (
    AUDIT,
    CONFIGURATION,
    OK,
    PATIENCE,
    SECRET,
    TRY_AGAIN,
    USAGE,
    Program,
    assert_explained,
    closed_port,
)
from test_processing import NOON, Failing, Folder, arrival, body, processor_of

from backends import RESOLUTION, Backend, BackendUnavailable, Measurement, timestamp_text
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.raw.landing import RawStore
from backends.sqlite import SqliteBackend
from dropzone import UNPROVABLE, WRONG, Finding, Proof, ProofSummary

STATES = ("raw", "processed", "rejected")
AMISS = 1  # the exit code of `verify` where a row is not right
INTERRUPTED = 128 + signal.SIGINT
DAY = 86_400_000  # milliseconds
SECONDS = 20  # of which a `Book` has a row
DELETE = "DELETE FROM measurements WHERE timestamp_utc = "
INSERT = "INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id) VALUES "


def payload(second: int, value: float) -> bytes:
    """Return the payload of two values around `value + 1`."""
    return body(second, value, value + 2)


def made(second: int, value: float, raw_id: UUID) -> Measurement:
    """Return the row that `payload` makes."""
    return Measurement(NOON + timedelta(seconds=second), value + 1, 1.0, raw_id)


def earlier(second: int) -> Measurement:
    """Return the row that a `Book` does not keep, of the payload that arrived first."""
    return made(second, 10 * second, arrival(second))


def later(second: int) -> Measurement:
    """Return the row that a `Book` keeps."""
    return made(second, 10 * second + 5, arrival(100 + second))


Overwrite = Callable[[datetime, Measurement | None], Awaitable[None]]


@dataclass
class Book:
    """A data folder and a table, and the way in which somebody else changes that table."""

    folder: Folder
    backend: Backend
    overwrite: Overwrite
    variables: dict[str, str]  # with which the command line works on the same table

    async def process(self) -> None:
        await processor_of(self.folder.store, self.backend, 1000).process()

    async def fill(self) -> "Book":
        """Process two payloads for each second; the first two of all arrived the day before."""
        for second in range(SECONDS):
            self.folder.put(earlier(second).raw_id, payload(second, 10 * second))
            self.folder.put(later(second).raw_id, payload(second, 10 * second + 5))
        await self.process()
        assert await self.rows() == [later(second) for second in range(SECONDS)]
        return self

    async def rows(self) -> list[Measurement]:
        return await self.backend.find(limit=1_000_000)

    def proof(self) -> Proof:
        return Proof(self.folder.store.portable(), self.backend)

    async def findings(self) -> list[Finding]:
        return [finding async for finding in self.proof().findings()]

    async def rebuild(self, *, delete_orphans: bool = False) -> list[Finding]:
        found = self.proof().rebuild(delete_orphans=delete_orphans)
        return [finding async for finding in found]

    def file(self, raw_id: UUID) -> Path:
        """Return where a processed payload lies."""
        return self.folder.store.path(raw_id, "processed")

    def compact(self) -> None:
        """Pack all processed payloads."""
        for day in self.folder.store.finished_days():
            self.folder.store.compact(day)


def in_memory(folder: Folder) -> Book:
    backend = MemoryBackend()

    async def overwrite(at: datetime, row: Measurement | None) -> None:
        await backend.delete(await backend.find(since=at, until=at + RESOLUTION))
        await backend.upsert([row] if row else [])

    return Book(folder, backend, overwrite, {})


def in_sqlite(folder: Folder) -> Book:
    path = folder.place / "dropzone.sqlite"

    async def overwrite(at: datetime, row: Measurement | None) -> None:
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute(DELETE + "?", [timestamp_text(at)])
            if row:
                values = (timestamp_text(at), row.mean, row.std_dev, str(row.raw_id))
                other.execute(INSERT + "(?, ?, ?, ?)", values)

    return Book(folder, SqliteBackend(path), overwrite, {})


def in_postgres(folder: Folder, url: str) -> Book:
    async def overwrite(at: datetime, row: Measurement | None) -> None:
        other = await asyncpg.connect(url)
        await other.execute(DELETE + "$1", at)
        if row:
            await other.execute(INSERT + "($1, $2, $3, $4)", *msgspec.structs.astuple(row)[:4])
        await other.close()

    return Book(folder, PostgresBackend(url), overwrite, {"DROPZONE_DATABASE_URL": url})


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def bound(request: pytest.FixtureRequest) -> Callable[[Folder], Book]:
    """Make a book in one of the backends."""
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        return lambda folder: in_postgres(folder, url)
    return in_sqlite if request.param == "sqlite" else in_memory


@pytest.fixture
async def book(bound: Callable[[Folder], Book], tmp_path: Path) -> AsyncIterator[Book]:
    """A filled book in each backend."""
    folder = await Folder(tmp_path / "data").opened()
    filled = await bound(folder).fill()
    yield filled
    await filled.backend.close()


# For what is not the backend's affair, and for the command line.
memory = pytest.mark.parametrize("bound", ["memory"], indirect=True)
sqlite = pytest.mark.parametrize("bound", ["sqlite"], indirect=True)
postgres = pytest.mark.parametrize("bound", ["postgres"], indirect=True)
databases = pytest.mark.parametrize("bound", ["sqlite", "postgres"], indirect=True)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """The command line on the same data folder."""
    made_program = Program(tmp_path)
    yield made_program
    made_program.close()


# ── Nothing is found where nothing was done ───────────────────────────────────────────────────────


async def test_nothing_to_find(book: Book):
    """Processed, superseded, rejected, pending and packed payloads are all as they should be."""
    book.folder.put(arrival(200), b"no JSON")
    book.folder.put(arrival(201), payload(1, 0.1))
    await book.process()
    book.folder.put(arrival(202), payload(1, 9))
    book.folder.put(arrival(203), payload(88, 9))
    book.folder.put(arrival(204), b"bad too")
    assert book.folder.states() == {"raw": 3, "processed": 2 * SECONDS + 1, "rejected": 1}
    assert await book.findings() == []
    book.compact()
    assert book.folder.names("processed") == []
    assert await book.findings() == []


@memory
async def test_nothing_to_find_in_nothing(book: Book, tmp_path: Path):
    """An empty folder and an empty table agree, and a proof leaves nothing behind."""
    empty = in_memory(await Folder(tmp_path / "empty").opened())
    assert await empty.findings() == []
    await book.findings()
    assert not (book.folder.place / "journal" / "derived").exists()


@memory
async def test_foreign_files(book: Book):
    """Files and folders that are none of Dropzone's are left alone, and stop no proof."""
    for state in ("raw", "processed", "rejected"):
        for name in ("notes.txt", "1.json", ".DS_Store", "copy.ndjson.gz"):
            (book.folder.place / state / name).write_text("mine")
        (book.folder.place / state / "folder").mkdir()
        (book.folder.place / state / "folder" / "other.json").write_bytes(payload(0, 0))
    (book.file(arrival(0)).parent / "notes.txt").write_text("mine")
    assert await book.rebuild() == []


async def test_crash_between_upsert_and_move(book: Book):
    """A row whose payload is pending still, since its processor was killed, is right."""
    pending = [made(second, 3, arrival(200 + second)) for second in (1, 88)]
    for row, second in zip(pending, (1, 88), strict=True):
        book.folder.put(row.raw_id, payload(second, 3))
    await book.backend.upsert(pending)
    rows = await book.rows()
    assert await book.rebuild() == []
    assert await book.rows() == rows


@memory
async def test_extreme_values(book: Book):
    """Values at the ends of a double are derived to the very row that stands."""
    for number, value in enumerate([-0.0, 5e-324, 1e308, 0.1, 1 / 3]):
        book.folder.put(arrival(200 + number), body(50 + number, value))
        book.folder.put(arrival(300 + number), body(60 + number, value, value / 3))
    await book.process()
    assert await book.findings() == []


@pytest.mark.parametrize("limit", [None, 3, 8])
async def test_batches(book: Book, limit: int | None):
    """Rows of batches are proved by their own payloads: pending, cut, rejected, again, packed."""
    contents = [b"bad" if second == 2 else payload(second, 50 + second) for second in range(6)]
    lines = book.folder.put_batch(300, contents)
    array = book.folder.put_batch(400, [payload(second, 70) for second in (4, 5, 90)], "json")
    assert await book.findings() == []
    await processor_of(book.folder.store, book.backend, 1000).process(limit)
    assert await book.findings() == []
    right = made(1, 51, lines[1])
    wrong = replace(right, mean=0.5)
    await book.overwrite(at(1), wrong)
    await book.overwrite(at(0), None)
    found = [Finding("missing", None, made(0, 50, lines[0])), Finding("differing", wrong, right)]
    assert await book.findings() == found
    assert await book.rebuild() == found
    await book.process()
    assert await book.findings() == []
    (book.folder.place / "rejected" / f"{lines[2]}.json").write_bytes(payload(2, 52))  # by hand
    assert book.folder.store.retry(lines[2])
    assert await book.findings() == []
    await book.process()
    rows = [made(second, 50 + second, lines[second]) for second in range(4)]
    rows += [made(4, 70, array[0]), made(5, 70, array[1])]
    assert (await book.rows())[:6] == rows
    assert (await book.rows())[-1] == made(90, 70, array[2])
    for is_packed in (False, True):
        if is_packed:
            book.compact()
            assert book.folder.files("processed") == []
        assert await book.findings() == []
        await book.overwrite(at(2), replace(rows[2], std_dev=9.0))
        await book.overwrite(at(90), None)
        kinds = [(each.kind, each.right) for each in await book.rebuild()]
        assert kinds == [("differing", rows[2]), ("missing", made(90, 70, array[2]))]
    assert book.folder.store.count_processed() == 2 * SECONDS + 9


@memory
async def test_expired(book: Book):
    """A row whose payload `keep_days` has deleted stays, unless a later one makes another."""
    book.compact()
    store = RawStore(book.folder.place / "raw", keep_days=1)
    await store.open()
    assert len(store.expire()) == 2
    book.folder.store = store
    assert await book.findings() == []
    [raw_id] = await store.land(payload(1, 7))
    await book.process()
    await book.overwrite(at(1), later(1))
    newest = made(1, 7, raw_id)
    assert await book.rebuild() == [Finding("superseded", later(1), newest)]
    assert (await book.rows())[:3] == [later(0), newest, later(2)]
    await store.close()


# ── What was tampered with is found, named and set right ──────────────────────────────────────────

Tampering = Callable[[Book, int], Awaitable[list[Finding]]]  # of a second; what is to be found


def at(second: int) -> datetime:
    return NOON + timedelta(seconds=second)


def replaced(kind: str, **fields: object) -> Tampering:
    """Change the row that stands."""

    async def tamper(book: Book, second: int) -> list[Finding]:
        row = replace(later(second), **fields)
        await book.overwrite(at(second), row)
        return [Finding(kind, row, later(second))]

    return tamper


async def raw_id_of_the_earlier(book: Book, second: int) -> list[Finding]:
    row = replace(later(second), raw_id=arrival(second))
    await book.overwrite(at(second), row)
    return [Finding("differing", row, later(second))]


async def deleted_row(book: Book, second: int) -> list[Finding]:
    await book.overwrite(at(second), None)
    return [Finding("missing", None, later(second))]


async def invented_row(book: Book, second: int) -> list[Finding]:
    row = made(SECONDS + second, 9, uuid4())
    await book.overwrite(row.timestamp_utc, row)
    return [Finding("orphaned", row, None)]


async def copied_row(book: Book, second: int) -> list[Finding]:
    row = replace(later(second), timestamp_utc=at(SECONDS + second))
    await book.overwrite(row.timestamp_utc, row)
    return [Finding("differing", row, None)]


async def row_of_the_earlier(book: Book, second: int) -> list[Finding]:
    await book.overwrite(at(second), earlier(second))
    return [Finding("superseded", earlier(second), later(second))]


async def row_of_a_pending_payload(book: Book, second: int) -> list[Finding]:
    right = made(second, 3, arrival(200 + second))
    book.folder.put(right.raw_id, payload(second, 3))
    row = replace(right, mean=5.0)
    await book.overwrite(at(second), row)
    return [Finding("differing", row, right)]


async def edited_values(book: Book, second: int) -> list[Finding]:
    row = later(second)
    book.file(row.raw_id).write_bytes(payload(second, 77))
    return [Finding("differing", row, made(second, 77, row.raw_id))]


async def edited_time_stamp(book: Book, second: int) -> list[Finding]:
    row = later(second)
    book.file(row.raw_id).write_bytes(payload(SECONDS + second, 4))
    moved = made(SECONDS + second, 4, row.raw_id)
    return [Finding("differing", row, earlier(second)), Finding("missing", None, moved)]


async def edited_to_no_json(book: Book, second: int) -> list[Finding]:
    file = book.file(later(second).raw_id)
    file.write_bytes(file.read_bytes()[:-1])
    return [Finding("unreadable", later(second), earlier(second))]


async def emptied_payloads(book: Book, second: int) -> list[Finding]:
    for row in (earlier(second), later(second)):
        book.file(row.raw_id).write_bytes(b"")
    return [Finding("unreadable", later(second), None)]


async def payload_that_cannot_be_read(book: Book, second: int) -> list[Finding]:
    file = book.file(later(second).raw_id)
    file.unlink()
    file.mkdir()
    return [Finding("unreadable", later(second), earlier(second))]


async def row_of_a_rejected_payload(book: Book, second: int) -> list[Finding]:
    raw_id = arrival(300 + second)
    (book.folder.place / "rejected" / f"{raw_id}.json").write_bytes(b"no JSON")
    row = replace(later(second), raw_id=raw_id)
    await book.overwrite(at(second), row)
    return [Finding("differing", row, later(second))]


async def deleted_payload(book: Book, second: int) -> list[Finding]:
    book.file(later(second).raw_id).unlink()
    return [Finding("orphaned", later(second), earlier(second))]


async def deleted_payloads(book: Book, second: int) -> list[Finding]:
    for row in (earlier(second), later(second)):
        book.file(row.raw_id).unlink()
    return [Finding("orphaned", later(second), None)]


OF_ROWS = [
    replaced("differing", mean=-17.0),
    replaced("differing", mean=1e308),
    replaced("differing", std_dev=1 + 1e-12),
    replaced("orphaned", raw_id=arrival(999)),  # unknown, and greater than the right one
    replaced("superseded", raw_id=arrival(99)),  # unknown, and smaller
    replaced("superseded", raw_id=UUID(int=0)),  # older than Dropzone
    replaced("differing", raw_id=arrival(0)),  # of another second
    replaced("differing", raw_id=arrival(100 + 19)),
    raw_id_of_the_earlier,
    deleted_row,
    invented_row,
    copied_row,
    row_of_the_earlier,
]
OF_PAYLOADS = [
    edited_values,
    edited_time_stamp,
    edited_to_no_json,
    emptied_payloads,
    payload_that_cannot_be_read,
    row_of_a_rejected_payload,
    deleted_payload,
    deleted_payloads,
]


async def tamper_with_all(book: Book, tamperings: Sequence[Tampering]) -> list[Finding]:
    """Do each to a second of its own, from second 1 on; return what is to be found, in order."""
    findings = [await tamper(book, second) for second, tamper in enumerate(tamperings, 1)]
    return sorted(itertools.chain.from_iterable(findings), key=at_of)


def at_of(finding: Finding) -> datetime:
    [moment] = {row.timestamp_utc for row in (finding.row, finding.right) if row}
    return moment


def of_kinds(findings: Sequence[Finding], *kinds: str) -> list[Finding]:
    return [finding for finding in findings if finding.kind in kinds]


def provable(findings: Sequence[Finding]) -> list[Finding]:
    return of_kinds(findings, *WRONG)


def mended(rows: Sequence[Measurement], findings: Sequence[Finding]) -> list[Measurement]:
    """Return the rows after a rebuild that set these findings right."""
    rights = {at_of(finding): finding.right for finding in findings}
    table: dict[datetime, Measurement | None] = {row.timestamp_utc: row for row in rows} | rights
    return [row for _, row in sorted(table.items()) if row]


async def prove_and_rebuild(book: Book, tamperings: Sequence[Tampering]) -> None:
    """Tamper, and hold what is found and what is set right against what it should be."""
    expected = await tamper_with_all(book, tamperings)
    rows = await book.rows()
    assert await book.findings() == expected
    assert await book.rows() == rows
    assert await book.rebuild() == expected
    assert await book.rows() == mended(rows, provable(expected))
    standing = of_kinds(expected, *UNPROVABLE)
    assert await book.findings() == standing
    assert await book.rebuild(delete_orphans=True) == standing
    deleted = of_kinds(expected, *WRONG, "orphaned")
    assert await book.rows() == mended(rows, deleted)
    assert await book.findings() == of_kinds(expected, "unreadable")


async def test_rows(book: Book):
    """A row that somebody changed is named for what is wrong with it, and a rebuild mends it."""
    await prove_and_rebuild(book, [*OF_ROWS, row_of_a_pending_payload])


@memory
async def test_payloads(book: Book):
    """A row whose payload somebody changed is found; a rebuild makes what the payloads say now.

    Where they say nothing, since they are gone or damaged, the row stands.
    """
    await prove_and_rebuild(book, OF_PAYLOADS)


@memory
async def test_rows_of_packed_payloads(book: Book):
    """Payloads in packs prove their rows as those in files do."""
    book.compact()
    await prove_and_rebuild(book, OF_ROWS)


@memory
async def test_bounds(book: Book):
    """Only rows of `since <= timestamp_utc < until` are looked at and mended."""
    expected = await tamper_with_all(book, [deleted_row] * 5)
    proof = book.proof().findings(since=at(2), until=at(4))
    assert [finding async for finding in proof] == expected[1:3]
    rebuild = book.proof().rebuild(since=at(3))
    assert [finding async for finding in rebuild] == expected[2:]
    assert await book.findings() == expected[:2]


@memory
async def test_an_empty_table_is_made_again(book: Book):
    """A table that was lost is made again from the payloads alone."""
    rows = await book.rows()
    await book.backend.delete(rows)
    assert await book.rebuild() == [Finding("missing", None, row) for row in rows]
    assert await book.rows() == rows


# ── While landing and processing go on ────────────────────────────────────────────────────────────


@postgres
async def test_processed_during_a_rebuild(book: Book):
    """What is processed between a finding and its mending is a later arrival, and stands."""
    await tamper_with_all(book, [row_of_the_earlier, replaced("differing", mean=3.0), deleted_row])
    async for finding in book.proof().rebuild():
        second = (at_of(finding) - NOON).seconds
        book.folder.put(arrival(500 + second), payload(second, 50))
        await book.process()
    newest = [made(second, 50, arrival(500 + second)) for second in (1, 2, 3)]
    assert (await book.rows())[1:4] == newest
    assert await book.findings() == []


@memory
async def test_processed_beside_a_row_that_has_to_go(book: Book):
    """What has just lost against a wrong row of a later raw_id wins when that row is deleted."""
    [finding] = await tamper_with_all(
        book, [replaced("differing", raw_id=later(SECONDS - 1).raw_id)]
    )
    raw_id = UUID(int=later(1).raw_id.int + 1)
    async for found in book.proof().rebuild():
        if found == finding:
            book.folder.put(raw_id, payload(1, 50))
            await book.process()
    assert (await book.rows())[1] == made(1, 50, raw_id)
    assert await book.findings() == []


@postgres
async def test_processed_while_payloads_are_read(book: Book):
    """What is processed while a proof reads and compares is no finding, and is not disturbed."""
    [finding] = await tamper_with_all(book, [replaced("differing", mean=3.0)])
    numbers = itertools.count()

    async def go_on() -> None:
        for number in numbers:
            book.folder.put(arrival(600 + number), payload(2 + number % 5, number))
            await book.process()

    processing = asyncio.create_task(go_on())
    assert await book.findings() == [finding]
    assert await book.rebuild() == [finding]
    processing.cancel()
    with suppress(asyncio.CancelledError):
        await processing
    await book.process()
    assert next(numbers) > 5
    assert await book.findings() == []


# ── Stopped, and gone on with ─────────────────────────────────────────────────────────────────────

# For the command line, as `module:Class`: each is the default SQLite file, but for one thing.
OWN_BACKENDS = """
import asyncio, os, signal
from pathlib import Path
from backends import BackendUnavailable
from backends.sqlite import SqliteBackend

class Sqlite(SqliteBackend):
    def __init__(self):
        super().__init__(Path("data") / "dropzone.sqlite")

class Waits(Sqlite):
    async def find(self, **bounds):
        Path("waiting").touch()
        while not Path("go").exists():
            await asyncio.sleep(0.01)
        return await super().find(**bounds)

class Killed(Sqlite):
    async def find(self, **bounds):
        os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(60)

class Interrupted(Sqlite):
    async def find(self, **bounds):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
"""


@pytest.fixture
def own(program: Program) -> Callable[[str], dict[str, str]]:
    """Make OWN_BACKENDS importable by the command line."""
    (program.home / "own_backends.py").write_text(OWN_BACKENDS)
    path = str(program.home)
    return lambda name: {"PYTHONPATH": path, "DROPZONE_BACKEND": f"own_backends:{name}"}


@sqlite
async def test_one_at_a_time(book: Book, program: Program, own: Callable[[str], dict[str, str]]):
    """While a proof is at work, another one or `compact` says so and does nothing: exit code 75."""
    await tamper_with_all(book, [deleted_row])
    at_work = program.start("rebuild", **own("Waits"))
    async with asyncio.timeout(PATIENCE):
        while not (program.home / "waiting").exists():
            await asyncio.sleep(0.01)
    for command in ("verify", "compact"):
        done = await asyncio.to_thread(program.run, command)
        assert (done.returncode, done.stdout) == (TRY_AGAIN, "")
        assert_explained(done.stderr)
    assert len(book.folder.names("processed")) == 2 * SECONDS
    (program.home / "go").touch()
    _, err = await asyncio.to_thread(at_work.communicate)
    assert [AUDIT in line for line in err.decode().splitlines()] == [True]
    assert at_work.returncode == OK
    done = await asyncio.to_thread(program.run, "compact")
    assert (done.returncode, done.stderr) == (OK, "")
    assert book.folder.names("processed") == []


class Stop(Exception):
    """Ends a proof from within."""


def derived(book: Book) -> Path:
    """Return where a proof that was stopped keeps what it has derived."""
    return book.folder.place / "journal" / "derived"


def files(book: Book) -> dict[Path, bytes]:
    """Return what lies in the data folder, but for what a proof keeps, and the table."""
    found = (file for state in STATES for file in (book.folder.place / state).rglob("*"))
    return {file: file.read_bytes() for file in found if file.is_file()}


@sqlite
@pytest.mark.parametrize(("command", "how"), [("verify", "Killed"), ("rebuild", "Interrupted")])
async def test_stopped_before_the_comparison(
    book: Book, program: Program, own: Callable[[str], dict[str, str]], command: str, how: str
):
    """SIGKILL or Ctrl-C leaves all as it was; the next run reads nothing again, and ends alike."""
    expected = await tamper_with_all(book, OF_ROWS)
    rows, before = await book.rows(), files(book)
    done = await asyncio.to_thread(program.run, command, **own(how))
    code = -signal.SIGKILL if how == "Killed" else INTERRUPTED
    assert (done.returncode, done.stdout) == (code, "")
    assert how == "Killed" or done.stderr == ""
    assert (await book.rows(), files(book)) == (rows, before)
    read: list[int] = []
    proof = book.proof()
    assert [finding async for finding in proof.findings(progress=read.append)] == expected
    assert read == []
    assert not derived(book).exists()


@sqlite
async def test_stopped_and_processed_meanwhile(
    book: Book, program: Program, own: Callable[[str], dict[str, str]]
):
    """What is processed after a proof was stopped is read by the one that goes on."""
    await asyncio.to_thread(program.run, "verify", **own("Killed"))
    book.folder.put(arrival(700), payload(1, 7))
    await book.process()
    await book.overwrite(at(1), None)
    read: list[int] = []
    proof = book.proof()
    lost = Finding("missing", None, made(1, 7, arrival(700)))
    assert [finding async for finding in proof.rebuild(progress=read.append)] == [lost]
    assert sum(read) == 2 * SECONDS - 2 + 1  # but the folder of the two that arrived the day before


@memory
async def test_stopped_among_many_folders(book: Book):
    """A proof that was stopped while it read goes on with the folders that it had not finished."""
    for day in range(1, 5):
        book.folder.put(arrival(day * DAY + 10), payload(100 + day, day))
    await book.process()
    expected = await tamper_with_all(book, OF_ROWS)
    read: list[int] = []

    def stop(count: int) -> None:
        read.append(count)
        if len(read) == 3:  # of six folders
            raise Stop

    with pytest.raises(Stop):
        await anext(book.proof().findings(progress=stop))
    again: list[int] = []
    assert [finding async for finding in book.proof().findings(progress=again.append)] == expected
    assert 1 <= len(again) <= 4
    assert not Counter(again) - Counter([2, 2 * SECONDS - 2, 1, 1, 1, 1])


@memory
async def test_stopped_before_anything_was_finished(book: Book):
    """What was read of a folder that was not finished is forgotten: it may have changed since."""
    row = made(300, 3, arrival(-1))  # in the first folder
    book.folder.put(row.raw_id, payload(300, 3))
    await book.process()

    def stop(_: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        await anext(book.proof().findings(progress=stop))
    book.file(row.raw_id).unlink()
    assert await book.findings() == [Finding("orphaned", row, None)]


@memory
async def test_what_is_kept_grows_old(book: Book):
    """What a proof has derived is used for a day, and then no more."""

    def stop(count: int) -> None:
        if count > 2:
            raise Stop

    with pytest.raises(Stop):
        await anext(book.proof().findings(progress=stop))
    done = derived(book) / "done"
    yesterday = done.stat().st_mtime - 86_401
    os.utime(done, (yesterday, yesterday))
    read: list[int] = []
    assert [finding async for finding in book.proof().findings(progress=read.append)] == []
    assert sum(read) == 2 * SECONDS


@memory
async def test_the_backend_goes_away(book: Book):
    """A rebuild whose backend goes away in the middle is finished by the next one."""
    expected = await tamper_with_all(book, [deleted_row] * 4)
    failing = Failing(BackendUnavailable("down"), {1})
    await failing.upsert(await book.rows())
    half = Book(book.folder, failing, book.overwrite, {})
    with pytest.raises(BackendUnavailable):
        await half.rebuild()
    assert await half.rebuild() == expected
    assert await failing.find() == [later(second) for second in range(SECONDS)]


@sqlite
@pytest.mark.parametrize("kills", [1, 1000], ids=["once", "again and again"])
async def test_killed_workers(book: Book, program: Program, kills: int):
    """A killed worker process costs time; if all are killed, a sentence tells: exit code 75."""
    for number in range(3000):
        book.folder.put(arrival(2 * DAY + number), payload(number, number))
    await book.process()
    process = program.start("verify")
    verifier = psutil.Process(process.pid)
    async with asyncio.timeout(PATIENCE):
        while kills and process.poll() is None:
            for worker in workers_of(verifier)[:kills]:
                with suppress(psutil.NoSuchProcess):
                    worker.kill()
                    kills -= 1
            await asyncio.sleep(0.001)
    _, err = await asyncio.to_thread(process.communicate)
    if kills:
        assert process.returncode == TRY_AGAIN
        assert_explained(err.decode())
    else:
        assert process.returncode == OK, err.decode()
    assert await book.findings() == []


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return list(filter(is_worker, process.children()))
    return []


def is_worker(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return "spawn_main" in " ".join(process.cmdline())
    return False


# ── The command line ──────────────────────────────────────────────────────────────────────────────


async def run(
    book: Book, program: Program, *arguments: object, **more: object
) -> CompletedProcess[str]:
    """Run the command line on the book's table while the loop goes on."""
    return await asyncio.to_thread(program.run, *arguments, **(book.variables | more))


def summary_of(done: CompletedProcess[str]) -> ProofSummary:
    """Return the last line of `--json`."""
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=ProofSummary)


def in_json(text: str) -> list[Finding]:
    """Return the findings; behind them comes a summary."""
    *lines, summary = text.splitlines()
    assert msgspec.json.decode(summary, type=ProofSummary)
    return [msgspec.json.decode(line, type=Finding) for line in lines]


def assert_silent(done: CompletedProcess[str], code: int) -> None:
    assert (done.returncode, done.stderr) == (code, "")


@databases
async def test_verify_and_rebuild(book: Book, program: Program):
    """`verify` and `rebuild --dry-run` show the same and exit 1; `rebuild` mends what is proved.

    In a pipe nothing is on standard error.
    """
    expected = await tamper_with_all(book, OF_ROWS)
    rows, before = await book.rows(), files(book)
    verified = await run(book, program, "verify")
    assert_silent(verified, AMISS)
    dry = await run(book, program, "rebuild", "--dry-run")
    assert_silent(dry, AMISS)
    assert dry.stdout == verified.stdout
    assert (await book.rows(), files(book)) == (rows, before)
    rebuilt = await run(book, program, "rebuild")
    assert_silent(rebuilt, AMISS)  # the orphans stay
    assert findings_in(rebuilt.stdout) == findings_in(verified.stdout)
    assert await book.rows() == mended(rows, provable(expected))
    rebuilt = await run(book, program, "rebuild", "--delete-orphans")
    assert_silent(rebuilt, OK)
    assert await book.rows() == mended(rows, expected)
    again = await run(book, program, "verify")
    assert_silent(again, OK)
    numbers = f"{SECONDS:>11} right, 0 wrong, 0 that cannot be checked"
    assert again.stdout.splitlines()[1:] == [numbers, "all rows are right"]
    assert files(book) == before


def findings_in(text: str) -> list[str]:
    """Return the lines of a table of findings."""
    lines = text.splitlines()
    [end] = [number for number, line in enumerate(lines) if line.startswith("the rows in")]
    return lines[:end]


@sqlite
async def test_the_table_of_findings(book: Book, program: Program):
    """Each finding is a line: its kind, time, row and what it should be; then come the counts."""
    [finding] = await tamper_with_all(book, [invented_row])
    await deleted_row(book, 2)
    await row_of_the_earlier(book, 3)
    verified = (await run(book, program, "verify")).stdout
    head, *lines = findings_in(verified)
    assert head.split()[:2] == ["finding", "timestamp_utc"]
    cells: list[tuple[object, ...]] = [
        ("missing", timestamp_text(at(2)), "-", later(2).raw_id, 26.0, 1.0),
        (
            *("superseded", timestamp_text(at(3)), earlier(3).raw_id, 31.0, 1.0),
            *(later(3).raw_id, 36.0, 1.0),
        ),
        ("orphaned", timestamp_text(at_of(finding)), finding.row.raw_id, 10.0, 1.0, "-"),
    ]
    assert [line.split() for line in lines] == [[str(cell) for cell in line] for line in cells]
    assert {line.index(line.split()[1]) for line in lines} == {head.index("timestamp_utc")}
    place, *counts = verified.splitlines()[len(lines) + 1 :]
    assert str(book.folder.place) in place
    assert [line.partition(":")[0].split() for line in counts] == [
        f"{SECONDS - 2} right, 2 wrong, 1 that cannot be checked".split(),
        ["1", "missing"],
        ["1", "superseded"],
        ["1", "orphaned"],
    ]


@sqlite
async def test_bounds_of_the_command_line(book: Book, program: Program):
    """`--since` and `--until` bound the rows, by any time stamp with an offset."""
    expected = await tamper_with_all(book, [deleted_row] * 5)
    bounds = ("--since", "2019-05-01T14:00:02+02:00", "--until", "2019-05-01T12:00:04Z")
    verified = await run(book, program, "verify", "--json", *bounds)
    assert_silent(verified, AMISS)
    assert in_json(verified.stdout) == expected[1:3]
    rebuilt = await run(book, program, "rebuild", "--json", *bounds)
    assert_silent(rebuilt, OK)
    assert in_json(rebuilt.stdout) == expected[1:3]
    verified = await run(book, program, "verify", "--json", *bounds)
    assert_silent(verified, OK)
    assert in_json(verified.stdout) == []
    assert await book.findings() == [expected[0], *expected[3:]]


@pytest.mark.parametrize(
    "arguments", [["verify", "--since", "2019"], ["rebuild", "--until", "2019-05-01T12:00:00"]]
)
def test_bounds_that_are_no_moment(program: Program, arguments: list[str]):
    """A bound that is no time stamp, or has no offset, is refused: exit code 2."""
    done = program.run(*arguments)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert arguments[1] in done.stderr
    assert_explained(done.stderr)


@sqlite
@pytest.mark.usefixtures("book")
@pytest.mark.parametrize("command", ["verify", "rebuild"])
async def test_backend_away(program: Program, command: str):
    """A backend that is away is named without its password: exit code 75, and no finding."""
    with closed_port() as port:
        url = f"postgresql://me:{SECRET}@127.0.0.1:{port}/db"
        done = await asyncio.to_thread(program.run, command, DROPZONE_DATABASE_URL=url)
    assert (done.returncode, done.stdout) == (TRY_AGAIN, "")
    assert f"127.0.0.1:{port}" in done.stderr
    assert_explained(done.stderr)
    assert SECRET not in done.stderr


@postgres
async def test_untouched_rows_stay(book: Book, program: Program):
    """A rebuild writes the rows that were wrong and no other; a dry run writes none."""
    expected = await tamper_with_all(book, OF_ROWS)
    before = await versions(book)
    await run(book, program, "rebuild", "--dry-run")
    assert await versions(book) == before
    await run(book, program, "rebuild")
    touched = {at_of(finding) for finding in provable(expected)}
    unchanged = {moment for moment, version in await versions(book) if (moment, version) in before}
    orphans = {at_of(finding) for finding in expected if finding.kind == "orphaned"}
    assert unchanged == ({at(second) for second in range(SECONDS)} | orphans) - touched


async def versions(book: Book) -> set[tuple[datetime, str]]:
    """Return which transaction has written each row."""
    client = await asyncpg.connect(book.variables["DROPZONE_DATABASE_URL"])
    rows = await client.fetch("SELECT timestamp_utc, xmin::text FROM measurements")
    await client.close()
    return {(row["timestamp_utc"], row["xmin"]) for row in rows}


@sqlite
@pytest.mark.parametrize("damage", ["cut", "altered", "lost"])
async def test_a_damaged_pack(book: Book, program: Program, damage: str):
    """A pack that cannot be read is named, and its rows stay and cannot be checked: exit code 1."""
    book.compact()
    [_, pack] = [pack.path for pack in book.folder.store.packs()]
    whole, index = pack.read_bytes(), Path(f"{pack}.index").read_bytes()
    if damage == "cut":
        pack.write_bytes(whole[: len(whole) // 2])
    elif damage == "altered":
        text = gzip.decompress(whole).replace(b"[5, 7]", b"[5, 8]")
        pack.write_bytes(gzip.compress(text, 6, mtime=0))
    else:
        pack.unlink()
    newest = made(88, 3, arrival(2 * DAY))
    book.folder.put(newest.raw_id, payload(88, 3))
    await book.process()
    rows = await book.rows()
    await book.overwrite(newest.timestamp_utc, None)
    for command in ("verify", "rebuild"):
        done = await run(book, program, command, "--json")
        assert_silent(done, AMISS)
        found = [(finding.kind, finding.row) for finding in in_json(done.stdout)]
        assert found == [*(("unreadable", row) for row in rows[:-1]), ("missing", None)]
        assert any(pack.name in sentence for sentence in summary_of(done).damage)
    assert await book.rows() == rows
    done = await run(book, program, "verify")
    assert_silent(done, AMISS)
    assert pack.name in done.stdout
    assert "all rows are right" not in done.stdout
    pack.write_bytes(whole)
    Path(f"{pack}.index").write_bytes(index)
    done = await run(book, program, "verify")
    assert_silent(done, OK)
    assert "all rows are right" in done.stdout


@sqlite
async def test_whose_reader_has_gone(book: Book, program: Program):
    """A closed standard output (`verify | head`) ends a proof without a traceback."""
    await tamper_with_all(book, OF_ROWS)
    process = program.start("verify")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = await asyncio.to_thread(process.communicate)
    assert process.returncode not in {OK, AMISS}
    assert b"Traceback" not in err


# ── Absence of evidence ───────────────────────────────────────────────────────────────────────────


def elsewhere(book: Book, raw: Path) -> dict[str, object]:
    """Return the variables for the book's table and another data folder."""
    file = book.folder.place / "dropzone.sqlite"
    return {"DROPZONE_STORAGE_SQLITE_PATH": file, **book.variables, "DROPZONE_RAW_DIR": raw}


@databases
async def test_an_empty_folder_deletes_nothing(book: Book, program: Program, tmp_path: Path):
    """With a folder that holds nothing processed `rebuild` refuses, and `verify` finds no proof."""
    rows = await book.rows()
    raw = tmp_path / "empty" / "raw"
    raw.mkdir(parents=True)
    variables = elsewhere(book, raw)
    arguments: list[list[str]] = [[], ["--delete-orphans"], ["--since", "2019-05-01T00:00:00Z"]]
    for number, each in enumerate(arguments):
        done = await asyncio.to_thread(program.run, "rebuild", *each, **variables)
        assert (done.returncode, done.stdout) == (CONFIGURATION, "")
        assert str(raw.parent) in done.stderr
        assert "DROPZONE_RAW_DIR" in done.stderr
        foreign = raw.parent / "processed" / f"2026-01-0{number + 1}"
        foreign.mkdir()
        (foreign / "notes.txt").write_text("no payload")
        (foreign / f"{arrival(number)}.json").write_bytes(b"")
    done = await asyncio.to_thread(program.run, "verify", **variables)
    assert done.returncode == AMISS
    assert f"0 right, 0 wrong, {SECONDS} that cannot be checked" in done.stdout
    assert f"{SECONDS} orphaned: " in done.stdout
    assert "all rows are right" not in done.stdout
    assert await book.rows() == rows


@databases
@pytest.mark.parametrize("command", [["verify"], ["rebuild"], ["compact"], ["retry", "--all"]])
async def test_a_folder_that_is_not_there_is_not_made(
    book: Book, program: Program, command: list[str]
):
    """A command that looks for payloads makes no folder to find none in: exit code 78."""
    rows = await book.rows()
    nowhere = program.home / "nowhere"
    for _ in range(2):
        done = await run(book, program, *command, DROPZONE_RAW_DIR=nowhere / "raw")
        assert (done.returncode, done.stdout) == (CONFIGURATION, "")
        assert str(nowhere) in done.stderr
        assert_explained(done.stderr)
        assert not nowhere.exists()
    assert await book.rows() == rows


def test_nothing_at_all(program: Program):
    """Where there are neither rows nor payloads nothing is called right, and nothing is made."""
    for command in ("verify", "rebuild"):
        assert program.run(command).returncode == CONFIGURATION
    assert not (program.home / "data").exists()
    program.run("ingest", "-", stdin=payload(1, 1))
    done = program.run("verify")
    assert_silent(done, OK)
    assert "0 right, 0 wrong, 0 that cannot be checked" in done.stdout
    assert "all rows are right" not in done.stdout
    assert not (program.home / "data" / "dropzone.sqlite").exists()


@sqlite
async def test_a_sqlite_file_that_is_not_there(book: Book, program: Program):
    """All of its rows are missing; `verify` does not make it, and `rebuild` does."""
    rows = await book.rows()
    await book.backend.close()
    file = program.home / "data" / "dropzone.sqlite"
    for path in file.parent.glob("dropzone.sqlite*"):
        path.unlink()
    for command in (["verify"], ["rebuild", "--dry-run"]):
        done = await run(book, program, *command)
        assert_silent(done, AMISS)
        assert f"0 right, {SECONDS} wrong, 0 that cannot be checked" in done.stdout
        assert f"{file} (which is not there)" in done.stdout
        assert not file.exists()
    done = await run(book, program, "rebuild")
    assert_silent(done, OK)
    assert f"{SECONDS} missing before, set right" in done.stdout
    assert "all rows are right" in done.stdout
    made_again = SqliteBackend(file)
    assert await made_again.find() == rows
    await made_again.close()


@databases
async def test_a_lost_pack(book: Book, program: Program):
    """The rows of a pack that was lost stay, also where an earlier payload is still there."""
    book.compact()
    rows = await book.rows()
    [_, lost] = [pack.path for pack in book.folder.store.packs()]
    index = Path(f"{lost}.index")
    copy = lost.read_bytes(), index.read_bytes()
    lost.unlink()
    index.unlink()
    await book.overwrite(at(0), None)  # the first pack has an earlier payload for it
    done = await run(book, program, "rebuild", "--json")
    assert_silent(done, AMISS)
    summary = summary_of(done)
    assert (summary.right, summary.wrong, summary.set_right) == (1, {}, {"missing": 1})
    assert summary.unprovable == {"orphaned": SECONDS - 1}
    assert await book.rows() == [earlier(0), *rows[1:]]
    lost.write_bytes(copy[0])
    index.write_bytes(copy[1])
    done = await run(book, program, "rebuild", "--json")
    assert_silent(done, OK)
    assert summary_of(done).set_right == {"superseded": 1}
    assert await book.rows() == rows


@databases
async def test_two_folders_on_one_table(book: Book, program: Program, tmp_path: Path):
    """Of two Dropzones that write to one table, neither deletes or replaces the other's rows."""
    rows = await book.rows()
    variables = elsewhere(book, tmp_path / "other" / "raw")
    both_have = (1, 2)  # where the other's payloads are later
    lines = b"\n".join(payload(second, 7) for second in (*both_have, SECONDS, SECONDS + 1))
    await asyncio.to_thread(program.run, "ingest", "-", stdin=lines, **variables)
    await asyncio.to_thread(program.run, "process", **variables)
    both = await book.rows()
    assert len(both) == len(rows) + 2
    for folder, mine in ((book.variables, SECONDS - len(both_have)), (variables, 4)):
        done = await asyncio.to_thread(program.run, "rebuild", "--json", **folder)
        assert_silent(done, AMISS)
        summary = summary_of(done)
        assert (summary.right, summary.wrong, summary.set_right) == (mine, {}, {})
        assert summary.unprovable == {"orphaned": len(both) - mine}
        assert await book.rows() == both
    done = await asyncio.to_thread(program.run, "verify", **variables)
    assert "another Dropzone on the same table" in done.stdout


@databases
async def test_a_later_payload_of_ones_own(book: Book, program: Program):
    """The last arrival wins also against rows whose payloads are not there."""
    rows = await book.rows()
    for number, row in enumerate(rows):
        await book.overwrite(
            row.timestamp_utc, replace(row, mean=99.0, raw_id=arrival(50 + number))
        )
    done = await run(book, program, "rebuild", "--json")
    assert_silent(done, OK)
    assert summary_of(done).set_right == {"superseded": SECONDS}
    assert await book.rows() == rows


@databases
async def test_expired_payloads_are_told(book: Book, program: Program):
    """Rows whose payloads have expired are never called right, and fail no proof: exit code 0."""
    book.compact()
    await run(book, program, "ingest", "-", stdin=payload(SECONDS, 3))
    await run(book, program, "process")
    await run(book, program, "compact", DROPZONE_RAW_KEEP_DAYS=2)
    assert book.folder.store.packs() == []
    for second in range(3):
        await book.overwrite(at(second), replace(later(second), mean=99.0))
    for second in range(3, 6):
        await book.overwrite(at(second), None)
    changed = await book.rows()
    day = f"{datetime.now(UTC) - timedelta(days=2):%Y-%m-%d}"
    for command in ("verify", "rebuild"):
        done = await run(book, program, command)
        assert_silent(done, OK)
        assert f"1 right, 0 wrong, {SECONDS - 3} that cannot be checked" in done.stdout
        assert f"{SECONDS - 3} expired: cannot be checked" in done.stdout
        assert f"payloads of the days before {day} were deleted" in done.stdout
        assert "all rows are right" not in done.stdout
    assert await book.rows() == changed
    await book.backend.delete(changed[:-1])
    done = await run(book, program, "verify")
    assert_silent(done, OK)
    assert "1 right, 0 wrong, 0 that cannot be checked" in done.stdout
    assert f"payloads of the days before {day} were deleted" in done.stdout
    assert "all rows are right" not in done.stdout


@databases
async def test_rows_that_are_older_than_dropzone(book: Book, program: Program):
    """Rows with the nil UUID cannot be checked, and stay; where a payload makes one, it wins."""
    old = [replace(later(second), raw_id=UUID(int=0), mean=9.0) for second in (1, 80)]
    old[1] = replace(old[1], timestamp_utc=at(80))
    for row in old:
        await book.overwrite(row.timestamp_utc, row)
    done = await run(book, program, "verify")
    assert_silent(done, AMISS)
    assert "1 superseded: " in done.stdout
    assert "1 older: cannot be checked" in done.stdout
    assert (await run(book, program, "rebuild", "--delete-orphans")).returncode == OK
    assert await book.rows() == [*(later(second) for second in range(SECONDS)), old[1]]


@postgres
@pytest.mark.parametrize("column", ["uuid", f"uuid NOT NULL DEFAULT '{UUID(int=0)}'"])
async def test_a_table_of_before(book: Book, program: Program, column: str):
    """Rows of a table that had no raw_id stay, whether they have none or that of no payload."""
    rows = await book.rows()
    client = await asyncpg.connect(book.variables["DROPZONE_DATABASE_URL"])
    await client.execute("ALTER TABLE measurements DROP COLUMN raw_id")
    await client.execute(f"ALTER TABLE measurements ADD COLUMN raw_id {column}")
    await client.execute(
        "INSERT INTO measurements (timestamp_utc, mean, std_dev) "
        "SELECT timestamp_utc - interval '1 year', mean, std_dev FROM measurements"
    )
    await client.close()
    done = await run(book, program, "rebuild", "--delete-orphans", "--json")
    assert_silent(done, OK)
    summary = summary_of(done)
    assert summary.set_right == {"superseded": SECONDS}
    assert (summary.right, summary.unprovable) == (SECONDS, {"older": SECONDS})
    old, new = (await book.rows())[:SECONDS], (await book.rows())[SECONDS:]
    assert new == rows
    assert {row.raw_id for row in old} == {UUID(int=0)}
    done = await run(book, program, "verify")
    assert_silent(done, OK)
    assert f"{SECONDS} right, 0 wrong, {SECONDS} that cannot be checked" in done.stdout


@sqlite
async def test_a_payload_that_was_emptied(book: Book, program: Program):
    """A payload that is there and says nothing is named, and its row stays."""
    rows = await book.rows()
    book.file(later(1).raw_id).write_bytes(b"")
    book.file(earlier(2).raw_id).write_bytes(b"")  # which had lost anyway
    for flags in ([], ["--delete-orphans"]):
        done = await run(book, program, "rebuild", *flags)
        assert_silent(done, AMISS)
        for row in (later(1), earlier(2)):
            assert f"wrong  {row.raw_id} was processed, but: " in done.stdout
        assert "1 unreadable: cannot be checked" in done.stdout
    assert await book.rows() == rows


@databases
async def test_what_was_proved_is_named(book: Book, program: Program):
    """`verify` names the folder and the backend, as text and in JSON, without the password."""
    text = (await run(book, program, "verify")).stdout
    summary = summary_of(await run(book, program, "verify", "--json"))
    assert summary.folder == str(book.folder.place)
    assert (summary.right, summary.wrong, summary.unprovable) == (SECONDS, {}, {})
    assert f"the rows in {summary.backend}, by the payloads in {summary.folder}:" in text
    url = urlsplit(book.variables.get("DROPZONE_DATABASE_URL", ""))
    place = f"postgres {url.hostname}:{url.port}/" if url.port else "sqlite /"
    assert summary.backend.startswith(place)
    assert url.password is None or url.password not in text
    assert "all rows are right" in text
    part = await run(book, program, "verify", "--since", "2019-05-01T12:00:10Z")
    assert f"{SECONDS - 10} right, 0 wrong, 0 that cannot be checked" in part.stdout
    assert "all rows are right" not in part.stdout  # those before were not looked at
