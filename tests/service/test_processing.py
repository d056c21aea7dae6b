"""Processing: pending payloads become rows, each once and for all, whatever happens in between."""

import asyncio
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from postgres_server import PostgresServer
from power_cut import children_of
from stores import land_each
from test_cli import OK, PATIENCE, Program, closed_port

import dropzone
from backends import Backend, BackendError, BackendUnavailable, Measurement
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.raw import COUNT_AT, Form, RawIds, day_of, first_of, form_of, payloads_in_name
from backends.raw.landing import RawStore
from backends.sqlite import SqliteBackend
from dropzone import Processor, ProcessorBusy

NOON = datetime(2019, 5, 1, 12, tzinfo=UTC)
FIRST_ARRIVAL = datetime(2024, 2, 29, 23, 59, 59, 998_000, tzinfo=UTC)
LOOP = "the event loop's thread"
STATES = ("raw", "processed", "rejected")


def arrival(number: int) -> UUID:
    """Return the raw_id of the payload that arrives `number` milliseconds after FIRST_ARRIVAL."""
    milliseconds = int(FIRST_ARRIVAL.timestamp() * 1000) + number
    return UUID(int=milliseconds << 80 | 7 << 76 | 2 << 62)


def batch_at(number: int, count: int) -> UUID:
    """Return the first raw_id of a batch of so many payloads that arrives at that moment."""
    return UUID(int=arrival(number).int | count << COUNT_AT)


def body(second: int = 0, *values: object) -> bytes:
    """Return a payload for `second` seconds after NOON."""
    at = (NOON + timedelta(seconds=second)).isoformat()
    return json.dumps({"time_stamp": at, "data": values or [1]}).encode()


class Folder:
    """A data folder, its files put in and looked at as an operator does it."""

    def __init__(self, place: Path, node: int | None = None) -> None:
        self.place = place
        self.store = RawStore(place / "raw", node=node)

    async def opened(self) -> "Folder":
        await self.store.open()
        return self

    def put(self, raw_id: UUID, content: bytes) -> Path:
        """Make a payload pending."""
        file = self.place / "raw" / f"{raw_id}.json"
        file.write_bytes(content)
        return file

    def fill(self, count: int, content: Callable[[int], bytes] = body) -> list[UUID]:
        """Make `count` payloads pending; return their raw_ids in order of arrival."""
        raw_ids = [arrival(number) for number in range(count)]
        for number, raw_id in enumerate(raw_ids):
            self.put(raw_id, content(number))
        return raw_ids

    def put_batch(
        self, number: int, contents: Sequence[bytes], form: Form = "ndjson"
    ) -> list[UUID]:
        """Make a batch pending that arrives so many milliseconds later; return its raw_ids."""
        first = batch_at(number, len(contents))
        end = b"\n" if form == "ndjson" else b","
        text = end.join(contents)
        file = self.place / "raw" / f"{first}.{len(contents)}.{form}"
        file.write_bytes(text if form == "ndjson" else b"[%s]" % text)
        return list(RawIds(first, len(contents)))

    def files(self, state: str) -> list[str]:
        """Return the names of the payloads' files in a folder, below it too."""
        found = (file.name for file in (self.place / state).rglob("*"))
        return sorted(filter(payloads_in_name, found))

    def names(self, state: str) -> list[UUID]:
        """Return the raw_ids of the payloads in a folder, below it too, in order of arrival.

        A payload of a batch that has a file of its own is where that is; and of a pending batch so
        many are processed as its note says.
        """
        done, own, found = self.store.done(), set[UUID](), set[UUID]()
        for folder in STATES:
            names = self.files(folder)
            own |= {first_of(name) for name in names if not form_of(name)}
            found |= {first_of(name) for name in names if not form_of(name) and folder == state}
        for folder in STATES:
            for name in filter(form_of, self.files(folder)):
                for at, raw_id in enumerate(RawIds(first_of(name), payloads_in_name(name))):
                    where = "processed" if at < done.get(name, 0) else folder
                    if where == state and raw_id not in own:
                        found.add(raw_id)
        return sorted(found)

    def states(self) -> Counter[str]:
        """Return how many payloads lie in each folder that holds some."""
        states = {state: len(self.names(state)) for state in STATES}
        return +Counter(states)


def processor_of(store: RawStore, backend: Backend, batch: int) -> Processor:
    return Processor(store.portable(), backend, batch=batch)


@pytest.fixture
async def folder(tmp_path: Path) -> Folder:
    return await Folder(tmp_path / "data").opened()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """The command line on the same data folder."""
    made = Program(tmp_path)
    yield made
    made.close()


async def rows_of(backend: Backend) -> dict[datetime, tuple[float, UUID]]:
    rows = await backend.find(limit=1_000_000)
    return {row.timestamp_utc: (row.mean, row.raw_id) for row in rows}


# Backends that really misbehave.


class Recording(MemoryBackend):
    """Notes the raw_ids of every upsert."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[list[UUID]] = []

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        self.batches.append([row.raw_id for row in measurements])
        await super().upsert(measurements)


class Failing(Recording):
    """Raises `error` in the upserts whose numbers are in `at`, before or after storing the rows."""

    def __init__(self, error: Exception, at: set[int], *, stored: bool = False) -> None:
        super().__init__()
        self.error, self.at, self.stored = error, at, stored

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        fails = len(self.batches) in self.at
        if self.stored or not fails:
            await super().upsert(measurements)
        else:
            self.batches.append([])
        if fails:
            raise self.error


class Picky(MemoryBackend):
    """Refuses, as a constraint in a database would, every row whose mean is negative."""

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        if any(row.mean < 0 for row in measurements):
            raise BackendError("a mean below zero violates my constraint")
        await super().upsert(measurements)


class Slow(Recording):
    """Waits in each upsert until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.go = asyncio.Event(), asyncio.Event()

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        self.entered.set()
        await self.go.wait()
        await super().upsert(measurements)


# For the command line, as `module:Class`: each writes to the default SQLite file.
OWN_BACKENDS = """
import asyncio, os, signal, threading
from pathlib import Path
from backends.sqlite import SqliteBackend

DATA = Path("data")

class Sqlite(SqliteBackend):
    def __init__(self):
        super().__init__(DATA / "dropzone.sqlite")

class DiesAfterUpsert(Sqlite):
    async def upsert(self, measurements):
        await super().upsert(measurements)
        os.kill(os.getpid(), signal.SIGKILL)

class DiesWhileMoving(Sqlite):
    async def upsert(self, measurements):
        await super().upsert(measurements)
        threading.Thread(target=self.die_at_the_first_move).start()

    def die_at_the_first_move(self):
        while not any((DATA / "processed").rglob("*.*")):
            pass
        os.kill(os.getpid(), signal.SIGKILL)

class Waits(Sqlite):
    async def upsert(self, measurements):
        Path("waiting").touch()
        while not Path("go").exists():
            await asyncio.sleep(0.01)
        await super().upsert(measurements)
"""


@pytest.fixture
def own(program: Program) -> dict[str, str]:
    """Make OWN_BACKENDS importable by the command line."""
    (program.home / "own_backends.py").write_text(OWN_BACKENDS)
    return {"PYTHONPATH": str(program.home)}


# ── How much, and in what order ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("batch", [100, 1000, 2500, 5000])
async def test_every_pending_payload(folder: Folder, batch: int):
    """2,500 pending payloads are all processed by one call, whatever the batch."""
    raw_ids = folder.fill(2500)
    backend = MemoryBackend()
    result = await processor_of(folder.store, backend, batch).process()
    assert (result.processed, result.failed, result.checked, result.remaining) == (2500, 0, 2500, 0)
    assert await backend.count() == 2500
    assert folder.names("processed") == raw_ids
    assert folder.states() == {"processed": 2500}


async def test_nothing_pending(folder: Folder):
    """An empty folder is no error, and the backend is not asked."""
    backend = Failing(BackendUnavailable("down"), {0})
    result = await processor_of(folder.store, backend, 10).process()
    assert (result.processed, result.failed, result.checked, result.remaining) == (0, 0, 0, 0)
    assert result.rejected == []


async def test_batches_in_order_of_arrival(folder: Folder):
    """The backend gets the earliest arrival first, `batch` rows at a time; progress is told."""
    numbers = list(range(10))
    random.Random(1).shuffle(numbers)  # noqa: S311
    for number in numbers:
        folder.put(arrival(number), body(-number))
    backend, told = Recording(), list[tuple[int, int]]()
    await processor_of(folder.store, backend, 4).process(None, lambda *seen: told.append(seen))
    in_order = [arrival(number) for number in range(10)]
    assert backend.batches == [in_order[:4], in_order[4:8], in_order[8:]]
    assert told == [(4, 10), (8, 10), (10, 10)]


async def test_limit(folder: Folder):
    """A limit takes the earliest arrivals, good and bad ones; the rest is counted and stays."""
    raw_ids = folder.fill(10, lambda number: b"bad" if number == 1 else body(number))
    processor = processor_of(folder.store, MemoryBackend(), 2)
    result = await processor.process(3)
    assert (result.processed, result.failed, result.checked, result.remaining) == (2, 1, 3, 7)
    assert folder.names("raw") == raw_ids[3:]
    result = await processor.process(100)
    assert (result.processed, result.failed, result.checked, result.remaining) == (7, 0, 7, 0)


async def test_folder_of_the_day_of_arrival(folder: Folder):
    """A processed payload lies, unchanged, in the folder of the UTC day of its arrival."""
    folder.fill(4)
    await processor_of(folder.store, MemoryBackend(), 10).process()
    days = [folder.place / "processed" / day for day in ("2024-02-29", "2024-03-01")]
    assert [len(list(day.iterdir())) for day in days] == [2, 2]
    assert (days[1] / f"{arrival(2)}.json").read_bytes() == body(2)


async def test_row_names_its_payload(folder: Folder):
    """A row has the statistics of the payload that its raw_id names."""
    folder.put(arrival(0), body(5, 0, 2))
    backend = MemoryBackend()
    await processor_of(folder.store, backend, 10).process()
    expected = Measurement(NOON + timedelta(seconds=5), 1.0, 1.0, arrival(0))
    assert await backend.find() == [expected]


async def test_landed_meanwhile(folder: Folder):
    """Payloads that land while others are processed are pending afterwards, none is lost."""
    folder.fill(500)
    backend = MemoryBackend()
    processor = processor_of(folder.store, backend, 20)
    running = asyncio.create_task(processor.process())
    landed = []
    while not running.done():
        landed += await land_each(folder.store, [body(100_000 + len(landed))])
    result = await running
    early = result.processed - 500  # landed before the pending ones were listed
    assert (result.failed, 0 <= early < len(landed)) == (0, True)
    assert folder.names("raw") == landed[early:]
    assert (await processor.process()).processed == len(landed) - early
    assert await backend.count() == 500 + len(landed)
    await folder.store.close()


async def test_taken_away_meanwhile(folder: Folder):
    """A payload that somebody removes while another batch is at work is not counted, nor missed."""

    class Removing(MemoryBackend):
        async def upsert(self, measurements: Sequence[Measurement]) -> None:
            (folder.place / "raw" / f"{arrival(3)}.json").unlink(missing_ok=True)
            await super().upsert(measurements)

    folder.fill(5)
    result = await processor_of(folder.store, Removing(), 2).process()
    assert (result.processed, result.failed, result.remaining) == (4, 0, 0)


# ── What cannot become a row ──────────────────────────────────────────────────────────────────────


async def test_rejected_does_not_hold_up_the_next_call(folder: Folder):
    """Bad payloads are taken once: the next call, however small its limit, sees later arrivals."""
    raw_ids = folder.fill(6, lambda number: b"[]" if number < 5 else body())
    processor = processor_of(folder.store, MemoryBackend(), 10)
    results = [await processor.process(1) for _ in raw_ids]
    assert [result.failed for result in results] == [1, 1, 1, 1, 1, 0]
    assert results[-1].processed == 1
    assert folder.names("rejected") == raw_ids[:5]


async def test_rejected_is_kept_with_its_reason(folder: Folder):
    """A rejected payload keeps its bytes; its reason has code, place and time."""
    folder.put(arrival(0), content := body(0, 1, "x"))
    before = datetime.now(UTC)
    result = await processor_of(folder.store, MemoryBackend(), 10).process()
    [rejection] = result.rejected
    assert (rejection.raw_id, rejection.code) == (arrival(0), "value_not_numeric")
    assert "data[1]" in rejection.detail
    assert before <= rejection.rejected_at <= datetime.now(UTC)
    assert folder.store.rejection(arrival(0)) == rejection
    assert (folder.place / "rejected" / f"{arrival(0)}.json").read_bytes() == content


async def test_good_ones_among_bad_ones(folder: Folder):
    """One bad payload in a batch rejects that one alone."""
    folder.fill(9, lambda number: b"\xff" if number % 3 else body(number))
    backend = MemoryBackend()
    result = await processor_of(folder.store, backend, 9).process()
    assert (result.processed, result.failed, result.checked) == (3, 6, 9)
    assert sorted(raw_id for _, raw_id in (await rows_of(backend)).values()) == [
        arrival(number) for number in (0, 3, 6)
    ]


async def test_thousands_of_bad_ones(folder: Folder):
    """All of 1,500 bad payloads are counted and kept, though one answer does not list them all."""
    folder.fill(1500, lambda _: b"bad")
    result = await processor_of(folder.store, MemoryBackend(), 400).process()
    assert (result.processed, result.failed, result.checked, result.remaining) == (0, 1500, 1500, 0)
    assert 0 < len(result.rejected) <= 1500
    assert folder.states() == {"rejected": 1500}


def _directory(file: Path) -> None:
    (file / "inside").mkdir(parents=True)


def _link_in_a_circle(file: Path) -> None:
    file.symlink_to(file.name)


def _link_to_nothing(file: Path) -> None:
    file.symlink_to("nowhere")


@pytest.mark.parametrize("make", [_directory, _link_in_a_circle, _link_to_nothing])
async def test_unreadable(folder: Folder, make: Callable[[Path], None]):
    """What is named like a payload and cannot be read never hides a later arrival."""
    make(folder.place / "raw" / f"{arrival(0)}.json")
    folder.put(arrival(1), body())
    backend = MemoryBackend()
    processor = processor_of(folder.store, backend, 10)
    for _ in range(2):
        await processor.process(1)
    assert await backend.count() == 1
    assert not os.path.lexists(folder.place / "raw" / f"{arrival(0)}.json")
    assert folder.store.rejection(arrival(0)).code == "payload_unreadable"


async def test_unreadable_twice(folder: Folder):
    """A directory named like a payload that comes back is no obstacle either."""
    processor = processor_of(folder.store, MemoryBackend(), 10)
    for number in (1, 2):
        _directory(folder.place / "raw" / f"{arrival(0)}.json")
        folder.put(arrival(number), body())
        assert (await processor.process()).processed == 1


@pytest.mark.parametrize(
    "raw_id",
    [
        "00000000-0000-0000-0000-000000000000",
        "11111111-1111-4111-8111-111111111111",
        "ffffffff-ffff-7fff-bfff-ffffffffffff",
        "ffffffff-ffff-ffff-ffff-ffffffffffff",
    ],
)
async def test_any_uuid(folder: Folder, raw_id: str):
    """A payload that an operator puts in under any UUID is processed, and nothing waits for it."""
    folder.put(UUID(raw_id), body(0))
    folder.put(arrival(1), body(1))
    backend = MemoryBackend()
    result = await processor_of(folder.store, backend, 10).process()
    assert (result.processed, result.failed, result.remaining) == (2, 0, 0)
    assert {raw_id for _, raw_id in (await rows_of(backend)).values()} == {UUID(raw_id), arrival(1)}
    assert folder.store.read(UUID(raw_id)) == ("processed", body(0))


async def test_other_files_are_left_alone(folder: Folder):
    """A file that is not named <uuid>.json stays, and is not counted."""
    names = ["notes.txt", f"{arrival(0)}.json.tmp", f"{str(arrival(0)).upper()}.json", ".json"]
    for name in names:
        (folder.place / "raw" / name).write_bytes(body())
    result = await processor_of(folder.store, MemoryBackend(), 10).process()
    assert (result.checked, result.remaining) == (0, 0)
    assert sorted(os.listdir(folder.place / "raw")) == sorted(names)


# ── The last arrival wins ─────────────────────────────────────────────────────────────────────────

Plan = tuple[list[int], list[int], list[list[tuple[int, int | None]]]]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Draw payloads (second of each, in order of arrival), a processor for each, and a schedule.

    The schedule is a list of rounds; a round is what runs at once: a processor and its limit.
    """
    seconds = draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))
    homes = draw(st.lists(st.integers(0, 2), min_size=len(seconds), max_size=len(seconds)))
    call = st.tuples(st.integers(0, 2), st.one_of(st.none(), st.integers(1, 4)))
    schedule = draw(st.lists(st.lists(call, min_size=1, max_size=3), max_size=6))
    return seconds, homes, schedule


@settings(max_examples=60, deadline=None)
@given(plan=plans(), again=st.sets(st.integers(0, 11)), batch=st.integers(1, 5))
def test_last_arrival_stands(plan: Plan, again: set[int], batch: int):
    """Any processors, order, batches, concurrency and repetition: the latest arrival's row stands.

    Several nodes, each with a data folder of its own, write to one backend; some payloads are put
    back and processed once more.
    """
    asyncio.run(_play(plan, again, batch))


async def _play(plan: Plan, again: set[int], batch: int) -> None:
    seconds, homes, schedule = plan
    backend = MemoryBackend()
    with tempfile.TemporaryDirectory() as place:
        nodes = [await Folder(Path(place) / str(number)).opened() for number in range(3)]
        for number, (second, home) in enumerate(zip(seconds, homes, strict=True)):
            nodes[home].put(arrival(number), body(second, number))

        async def process(node: int, limit: int | None) -> None:
            await processor_of(nodes[node].store, backend, batch).process(limit)

        for at_once in schedule:
            await asyncio.gather(*(process(*call) for call in at_once))
        for number in sorted(again & set(range(len(seconds)))):
            nodes[0].put(arrival(number), body(seconds[number], number))
        await asyncio.gather(*(process(node, None) for node in (2, 0, 1)))
        expected = {
            NOON + timedelta(seconds=second): (float(number), arrival(number))
            for number, second in enumerate(seconds)
        }
        assert await rows_of(backend) == expected
        assert not any(node.names("raw") for node in nodes)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_last_arrival_stands_in_every_order(folder: Folder, order: tuple[int, ...]):
    """Three payloads for one timestamp, processed by three calls in any order, end in one row."""
    backend = MemoryBackend()
    for number in order:
        folder.put(arrival(number), body(0, number))
        await processor_of(folder.store, backend, 10).process()
    assert await rows_of(backend) == {NOON: (2.0, arrival(2))}


async def test_a_rejected_last_arrival(folder: Folder):
    """A later payload that is rejected takes nobody's place."""
    folder.put(arrival(0), body(0, 1))
    folder.put(arrival(1), body(0, "x"))
    backend = MemoryBackend()
    await processor_of(folder.store, backend, 10).process()
    assert await rows_of(backend) == {NOON: (1.0, arrival(0))}


async def test_two_processes_on_two_folders(tmp_path: Path):
    """Two processes with a folder each and one database agree on the latest arrival."""
    programs, database = [], tmp_path / "shared.sqlite"
    try:
        for home in range(2):
            (tmp_path / str(home)).mkdir()
            programs.append(Program(tmp_path / str(home)))
            node = await Folder(tmp_path / str(home) / "data").opened()
            for number in range(home * 300, home * 300 + 300):  # both race for each second
                node.put(arrival(number), body(number % 300, number))
        shared = {"DROPZONE_STORAGE_SQLITE_PATH": database, "DROPZONE_PROCESS_BATCH": 7}
        running = [program.start("process", **shared) for program in programs]
        for process in running:
            out, err = process.communicate(timeout=PATIENCE)
            assert process.returncode == OK, err
            assert json.loads(out)["processed"] == 300
    finally:
        for program in programs:
            program.close()
    backend = SqliteBackend(database)
    rows = await rows_of(backend)
    await backend.close()
    assert rows == {
        NOON + timedelta(seconds=second): (300.0 + second, arrival(300 + second))
        for second in range(300)
    }


# ── Crashes ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("error", [BackendUnavailable("gone"), RuntimeError("a bug")])
@pytest.mark.parametrize("stored", [False, True])
async def test_failure_in_an_upsert(folder: Folder, error: Exception, *, stored: bool):
    """An upsert that raises, its rows stored or not, leaves all of them pending; again heals it."""
    folder.fill(10, lambda number: body(number // 2, number))
    backend = Failing(error, {1}, stored=stored)
    processor = processor_of(folder.store, backend, 4)
    with pytest.raises(type(error)):
        await processor.process()
    assert folder.names("raw") == [arrival(number) for number in range(4, 10)]
    result = await processor.process()
    assert (result.processed, result.failed, result.remaining) == (6, 0, 0)
    assert await rows_of(backend) == {
        NOON + timedelta(seconds=second): (second * 2.0 + 1, arrival(second * 2 + 1))
        for second in range(5)
    }


@pytest.mark.parametrize("how", ["DiesAfterUpsert", "DiesWhileMoving"])
async def test_killed_between_upsert_and_move(
    folder: Folder, program: Program, own: dict[str, str], how: str
):
    """SIGKILL behind the upsert, or among the moves, loses nothing: the next run ends the same."""
    raw_ids = folder.fill(1000, lambda number: body(number // 2, number) if number else b"bad")
    killed = program.run("process", **own, DROPZONE_BACKEND=f"own_backends:{how}")
    assert killed.returncode == -signal.SIGKILL
    states = folder.states()
    assert states.total() == 1000
    assert states["processed"] == 0 or how == "DiesWhileMoving"
    again = program.run("process")
    assert again.returncode == OK, again.stderr
    assert json.loads(again.stdout)["remaining"] == 0
    assert folder.names("processed") == raw_ids[1:]
    assert folder.names("rejected") == raw_ids[:1]
    assert folder.store.rejection(raw_ids[0]).code == "payload_not_json"
    backend = SqliteBackend(folder.place / "dropzone.sqlite")
    rows = await rows_of(backend)
    await backend.close()
    assert rows == {
        NOON + timedelta(seconds=second): (second * 2.0 + 1, arrival(second * 2 + 1))
        for second in range(500)
    }


@pytest.mark.parametrize("done", [0, 1, 3000], ids="before {}".format)
async def test_killed_workers(folder: Folder, program: Program, done: int):
    """The processes of a run are killed, in the middle of moves too: others do their work."""
    raw_ids = folder.fill(6000)
    process = program.start("process")
    moved = folder.place / "processed" / day_of(raw_ids[done]) / f"{raw_ids[done]}.json"
    async with asyncio.timeout(PATIENCE):
        while not (workers := children_of(process.pid)) or (done and not moved.exists()):
            await asyncio.sleep(0)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    out, err = await asyncio.to_thread(process.communicate, timeout=PATIENCE)
    assert process.returncode == OK, err.decode()
    assert json.loads(out)["processed"] == 6000
    assert folder.names("processed") == raw_ids


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────


def mixed(count: int, bad: Sequence[int] = ()) -> list[bytes]:
    """Return payloads for as many seconds, of which those at some places are not JSON."""
    return [b"bad" if at in bad else body(at, at) for at in range(count)]


def rows_for(raw_ids: Sequence[UUID], *but: int) -> dict[datetime, tuple[float, UUID]]:
    """Return the rows that `mixed` payloads with these raw_ids make."""
    return {
        NOON + timedelta(seconds=at): (float(at), raw_id)
        for at, raw_id in enumerate(raw_ids)
        if at not in but
    }


def wholly(result: dropzone.ProcessResult) -> tuple[int, int, int, int]:
    return result.processed, result.failed, result.checked, result.remaining


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def any_backend(
    request: pytest.FixtureRequest, tmp_path: Path, postgres_url: str
) -> AsyncIterator[Backend]:
    """Each backend that comes with the program."""
    backends: dict[str, Callable[[], Backend]] = {
        "memory": MemoryBackend,
        "sqlite": lambda: SqliteBackend(tmp_path / "rows.sqlite"),
        "postgres": lambda: PostgresBackend(postgres_url),
    }
    backend = backends[request.param]()
    yield backend
    await backend.close()


@pytest.mark.parametrize("form", ["ndjson", "json"])
async def test_batch(folder: Folder, any_backend: Backend, form: Form):
    """Each payload of a batch makes its row, under its own raw_id; the file moves as one."""
    raw_ids = folder.put_batch(0, mixed(1500), form)
    [name] = folder.files("raw")
    content = (folder.place / "raw" / name).read_bytes()
    result = await processor_of(folder.store, any_backend, 1000).process()
    assert wholly(result) == (1500, 0, 1500, 0)
    assert await rows_of(any_backend) == rows_for(raw_ids)
    day = folder.place / "processed" / "2024-02-29"
    assert [file.name for file in day.iterdir()] == [name]
    assert (day / name).read_bytes() == content
    assert folder.names("processed") == raw_ids


@pytest.mark.parametrize("bad", [{0}, {7}, {9}, {2, 3, 8}, set(range(10))])
async def test_bad_ones_in_a_batch(folder: Folder, bad: set[int]):
    """Each bad payload of a batch is rejected as a file of its own; the batch moves as one."""
    raw_ids = folder.put_batch(0, mixed(10, sorted(bad)))
    [name] = folder.files("raw")
    backend = MemoryBackend()
    result = await processor_of(folder.store, backend, 4).process()
    assert wholly(result) == (10 - len(bad), len(bad), 10, 0)
    assert [each.raw_id for each in result.rejected] == [raw_ids[at] for at in sorted(bad)]
    assert await rows_of(backend) == rows_for(raw_ids, *bad)
    assert folder.files("processed") == [name]
    assert folder.files("rejected") == [f"{raw_ids[at]}.json" for at in sorted(bad)]
    for at in bad:
        assert (folder.place / "rejected" / f"{raw_ids[at]}.json").read_bytes() == b"bad"
        assert folder.store.rejection(raw_ids[at]).code == "payload_not_json"
    assert folder.names("processed") == [each for at, each in enumerate(raw_ids) if at not in bad]


@pytest.mark.parametrize("limits", [[1] * 12, [3, 4, 5], [5, 5, 5], [11, 1], [2, None], [12], [99]])
@pytest.mark.parametrize("form", ["ndjson", "json"])
async def test_limit_through_a_batch(folder: Folder, form: Form, limits: list[int | None]):
    """A limit may cut through a batch: each payload is taken once, in order, and none is missed."""
    raw_ids = folder.put_batch(0, mixed(5), form)
    folder.put(arrival(1), body(5, 5))
    raw_ids += [arrival(1)]
    raw_ids += folder.put_batch(2, [body(second, second) for second in range(6, 12)], form)
    backend, taken = Recording(), 0
    for limit in limits:
        result = await processor_of(folder.store, backend, 4).process(limit)
        count = min(limit or 12, 12 - taken)
        taken += count
        assert wholly(result) == (count, 0, count, 12 - taken)
        assert folder.store.count_pending() == 12 - taken
        assert folder.store.count_processed() == taken
        assert folder.names("raw") == raw_ids[taken:]
        for at, raw_id in enumerate(raw_ids):
            expected = "processed" if at < taken else "pending"
            assert folder.store.read(raw_id) == (expected, body(at, at))
    assert list(itertools.chain.from_iterable(backend.batches)) == raw_ids
    assert await rows_of(backend) == rows_for(raw_ids)
    assert list((folder.place / "journal" / "batches").glob("*")) == []


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.lists(st.booleans(), min_size=1, max_size=6), min_size=1, max_size=5),
    limits=st.lists(st.integers(1, 9), max_size=8),
    batch=st.integers(1, 8),
    lands_late=st.booleans(),
)
def test_limits_over_batches(
    files: list[list[bool]], limits: list[int], batch: int, *, lands_late: bool
):
    """Any batches, bad payloads in them, and any limits: all are taken once, in order of arrival.

    `files` says for each payload of each batch whether it is good.
    """
    asyncio.run(_cut(files, limits, batch, lands_late=lands_late))


async def _cut(files: list[list[bool]], limits: list[int], batch: int, *, lands_late: bool) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, backend = await Folder(Path(place)).opened(), Recording()
        raw_ids, good = list[UUID](), list[bool]()

        def put(number: int) -> None:
            contents = [
                body(len(raw_ids) + at, at) if is_good else b"bad"
                for at, is_good in enumerate(files[number])
            ]
            if len(contents) == 1:
                folder.put(arrival(number), contents[0])
                raw_ids.append(arrival(number))
            else:
                raw_ids.extend(folder.put_batch(number, contents))
            good.extend(files[number])

        for number in range(len(files) - lands_late):
            put(number)
        taken, rejected = 0, list[UUID]()
        for limit in [*limits, None]:
            if limit is None and lands_late:
                put(len(files) - 1)
            result = await processor_of(folder.store, backend, batch).process(limit)
            end = min(len(raw_ids), taken + (limit or len(raw_ids)))
            assert wholly(result)[2:] == (end - taken, len(raw_ids) - end)
            assert result.failed == good[taken:end].count(False)
            rejected += [each.raw_id for each in result.rejected]
            assert folder.names("raw") == raw_ids[end:]
            taken = end
        bad = [raw_id for raw_id, is_good in zip(raw_ids, good, strict=True) if not is_good]
        upserted = list(itertools.chain.from_iterable(backend.batches))
        assert upserted == [raw_id for raw_id in raw_ids if raw_id not in bad]
        assert rejected == folder.names("rejected") == bad
        assert folder.store.count_processed() == good.count(True)
        await folder.store.close()


async def test_batches_in_order_of_what_they_are_for(folder: Folder):
    """A later payload of the same batch, or of another, stands, however they are cut."""
    late = folder.put_batch(9, [body(0, 7), body(0, 8), body(1, 9)])
    early = folder.put_batch(1, [body(0, 1), body(1, 2), body(1, 3), body(2, 4)])
    backend = MemoryBackend()
    for limit in (2, 1, 2, None):
        await processor_of(folder.store, backend, 10).process(limit)
    assert await rows_of(backend) == {
        NOON: (8.0, late[1]),
        NOON + timedelta(seconds=1): (9.0, late[2]),
        NOON + timedelta(seconds=2): (4.0, early[3]),
    }


async def test_retry_of_a_payload_of_a_batch(folder: Folder):
    """A payload of a batch that was put back is processed alone, and not with its batch again."""
    raw_ids = folder.put_batch(0, [body(at, -1 if at in {1, 4} else 1) for at in range(6)])
    backend = Picky()
    result = await processor_of(folder.store, backend, 10).process(3)
    assert wholly(result) == (2, 1, 3, 3)
    assert folder.store.retry(raw_ids[1])
    assert folder.store.count_pending() == 4
    result = await processor_of(folder.store, backend, 10).process()
    assert wholly(result) == (2, 2, 4, 0)
    assert {each.raw_id: each.retries for each in result.rejected} == {raw_ids[1]: 1, raw_ids[4]: 0}
    assert folder.names("rejected") == [raw_ids[1], raw_ids[4]]
    good = MemoryBackend()
    for at in (1, 4):
        assert folder.store.retry(raw_ids[at])
    result = await processor_of(folder.store, good, 10).process()
    assert wholly(result) == (2, 0, 2, 0)
    assert {raw_id for _, raw_id in (await rows_of(good)).values()} == {raw_ids[1], raw_ids[4]}
    assert folder.states() == {"processed": 6}
    assert folder.store.count_processed() == 6


def _cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-30])


def _one_more(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"}", b"},{}", 1))


def _replaced_by_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [_cut_short, _one_more, _replaced_by_a_folder])
@pytest.mark.parametrize("limit", [None, 2])
async def test_damaged_batch(folder: Folder, damage: Callable[[Path], None], limit: int | None):
    """A batch that is damaged is rejected as one, under its first payload, and hides no other."""
    first, *_ = folder.put_batch(0, mixed(5), "json")
    folder.put(arrival(1), body(9))
    [name, _] = folder.files("raw")
    damage(folder.place / "raw" / name)
    backend = MemoryBackend()
    results = [await processor_of(folder.store, backend, 10).process(limit) for _ in range(2)]
    assert sum(result.processed for result in results) == 1
    assert sum(result.failed for result in results) == 1
    [rejection] = results[0].rejected
    assert (rejection.raw_id, rejection.code) == (first, "payload_unreadable")
    assert folder.files("rejected") == [name]
    assert folder.files("raw") == []
    assert await backend.count() == 1
    assert folder.store.find_rejections()[0] == [rejection]


@pytest.mark.parametrize("how", ["DiesAfterUpsert", "DiesWhileMoving"])
async def test_killed_with_batches(folder: Folder, program: Program, own: dict[str, str], how: str):
    """SIGKILL behind the upsert of batches, or among their moves: the next run ends the same."""
    raw_ids = [
        raw_id
        for number in range(100)
        for raw_id in folder.put_batch(
            number, [b"bad" if at == 3 else body(number * 5 + at // 2, at) for at in range(10)]
        )
    ]
    killed = program.run("process", **own, DROPZONE_BACKEND=f"own_backends:{how}")
    assert killed.returncode == -signal.SIGKILL
    assert sum(len(folder.files(state)) - len(folder.files("rejected")) for state in STATES[:2])
    again = program.run("process")
    assert again.returncode == OK, again.stderr
    assert json.loads(again.stdout)["remaining"] == 0
    bad = raw_ids[3::10]
    assert folder.names("rejected") == bad
    assert folder.names("processed") == [raw_id for raw_id in raw_ids if raw_id not in set(bad)]
    assert folder.store.count_processed() == 900
    backend = SqliteBackend(folder.place / "dropzone.sqlite")
    rows = await rows_of(backend)
    await backend.close()
    lasts = [0 if at == 3 else at for at in (1, 2, 5, 7, 9)]  # of each second, that is good
    assert rows == {
        NOON + timedelta(seconds=number * 5 + second): (float(at), raw_ids[number * 10 + at])
        for number in range(100)
        for second, at in enumerate(lasts)
    }


CHANGES = {"os.rename", "os.remove", "os.mkdir"}


async def _process_and_die(place: Path, step: int, limit: int | None) -> None:
    """Process what is pending, and be killed before the change to a file that has this number."""
    folder = Folder(place)
    changes = 0

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_CREAT
        if (event in CHANGES or writes) and f"{place}/" in str(arguments[0]):
            if changes == step:
                os.kill(os.getpid(), signal.SIGKILL)
            changes += 1

    backend = SqliteBackend(place / "rows.sqlite")
    await backend.open()
    sys.addaudithook(count)
    await processor_of(folder.store, backend, 10).process(limit)
    await backend.close()


@pytest.mark.parametrize("limit", [None, 4, 8])
async def test_killed_at_any_step(tmp_path: Path, limit: int | None):
    """SIGKILL before any change to any file, in a batch with bad payloads: the end is the same."""
    for step in itertools.count():
        place = tmp_path / str(step)
        folder = await Folder(place).opened()
        raw_ids = folder.put_batch(0, mixed(6, [1, 4]))
        raw_ids += folder.put_batch(1, [b"bad", body(7, 7)])
        raw_ids += [arrival(2)]
        folder.put(arrival(2), body(8, 8))
        process = multiprocessing.get_context("fork").Process(
            target=lambda: asyncio.run(_process_and_die(place, step, limit))  # noqa: B023
        )
        process.start()
        await asyncio.to_thread(process.join)
        assert process.exitcode in {0, -signal.SIGKILL}
        backend = SqliteBackend(place / "rows.sqlite")
        await processor_of(folder.store, backend, 10).process()
        assert await rows_of(backend) == rows_for(raw_ids, 1, 4, 6), step
        await backend.close()
        bad = [raw_ids[at] for at in (1, 4, 6)]
        assert folder.names("rejected") == bad, step
        assert folder.names("processed") == [each for each in raw_ids if each not in bad], step
        assert folder.store.count_processed() == 6, step
        assert folder.store.take_stock() == {"payload_not_json": 3}, step
        for raw_id in bad:
            assert folder.store.read(raw_id) == ("rejected", b"bad"), step
        await folder.store.close()
        if process.exitcode == 0:
            break
    assert step > 10


async def test_batch_of_the_most_payloads(folder: Folder, program: Program):
    """A batch of 100,000 payloads is processed, wherever a limit cuts it."""
    raw_ids = folder.put_batch(0, [body(at, at) for at in range(100_000)])
    counts = json.loads(program.run("process", "--limit", 33_333).stdout)
    assert (counts["processed"], counts["remaining"]) == (33_333, 66_667)
    counts = json.loads(program.run("process").stdout)
    assert (counts["processed"], counts["remaining"]) == (66_667, 0)
    backend = SqliteBackend(folder.place / "dropzone.sqlite")
    assert await rows_of(backend) == rows_for(raw_ids)
    await backend.close()


# ── The backend ───────────────────────────────────────────────────────────────────────────────────


async def test_backend_that_is_down(folder: Folder):
    """Where nothing listens, BackendUnavailable: all is pending, nothing is rejected or moved."""
    raw_ids = folder.fill(20, lambda number: b"bad" if number == 0 else body(number))
    with closed_port() as port:
        backend = PostgresBackend(f"postgresql://me@127.0.0.1:{port}/db")
        for _ in range(2):
            with pytest.raises(BackendUnavailable):
                await processor_of(folder.store, backend, 8).process()
        await backend.close()
    assert folder.names("raw") == raw_ids
    assert folder.states() == {"raw": 20}


async def test_backend_that_comes_back(
    folder: Folder, postgres_server: PostgresServer, postgres_url: str
):
    """A PostgreSQL that stops and starts again: processing stops, and then completes the table."""
    folder.fill(10)
    backend = PostgresBackend(postgres_url, connect_timeout=5)
    processor = processor_of(folder.store, backend, 4)
    try:
        assert (await processor.process(2)).processed == 2
        await asyncio.to_thread(postgres_server.stop)
        try:
            with pytest.raises(BackendUnavailable):
                await processor.process()
            assert folder.states() == {"raw": 8, "processed": 2}
        finally:
            await asyncio.to_thread(postgres_server.start)
        result = await processor.process()
        assert (result.processed, result.failed, result.remaining) == (8, 0, 0)
        assert await backend.count() == 10
    finally:
        await backend.close()


@pytest.mark.parametrize("refused", [{0}, {6}, {12}, {3, 4, 9}, set(range(13))])
async def test_backend_that_refuses_rows(folder: Folder, refused: set[int]):
    """A row that the backend itself refuses is rejected, with what it said; all others stand."""
    folder.fill(13, lambda number: body(number, -1 if number in refused else 1))
    backend = Picky()
    result = await processor_of(folder.store, backend, 13).process()
    assert (result.processed, result.failed) == (13 - len(refused), len(refused))
    assert [rejection.raw_id for rejection in result.rejected] == list(
        map(arrival, sorted(refused))
    )
    assert {rejection.code for rejection in result.rejected} == {"backend_refused"}
    assert all("my constraint" in rejection.detail for rejection in result.rejected)
    assert {raw_id for _, raw_id in (await rows_of(backend)).values()} == set(
        folder.names("processed")
    )
    assert folder.names("rejected") == list(map(arrival, sorted(refused)))


async def test_postgres_that_refuses_a_row(folder: Folder, postgres_url: str):
    """A constraint of the operator's own in PostgreSQL rejects the payload, and only that one."""
    backend = PostgresBackend(postgres_url)
    try:
        await backend.open()
        connection = await asyncpg.connect(postgres_url)
        await connection.execute("ALTER TABLE measurements ADD CHECK (mean < 100)")
        await connection.close()
        folder.fill(5, lambda number: body(number, 1000 if number == 2 else 1))
        result = await processor_of(folder.store, backend, 10).process()
        assert (result.processed, result.failed) == (4, 1)
        [rejection] = result.rejected
        assert (rejection.raw_id, rejection.code) == (arrival(2), "backend_refused")
        assert await backend.count() == 4
    finally:
        await backend.close()


async def test_backend_that_goes_down_while_it_refuses(folder: Folder):
    """Refusals found before the backend went down are not settled: everything is pending."""

    class Dying(Picky):
        async def upsert(self, measurements: Sequence[Measurement]) -> None:
            if len(measurements) == 1 and measurements[0].mean > 0:
                raise BackendUnavailable("gone")
            await super().upsert(measurements)

    folder.fill(4, lambda number: body(number, -1 if number == 0 else 1))
    with pytest.raises(BackendUnavailable):
        await processor_of(folder.store, Dying(), 10).process()
    assert folder.states() == {"raw": 4}


@pytest.mark.parametrize("refused", [{0}, {6}, {3, 4, 9}, set(range(13))])
async def test_backend_that_refuses_rows_of_a_batch(folder: Folder, refused: set[int]):
    """A row of a batch that the backend refuses is rejected alone, with its payload's bytes."""
    contents = [body(at, -1 if at in refused else 1) for at in range(13)]
    raw_ids = folder.put_batch(0, contents, "json")
    backend = Picky()
    result = await processor_of(folder.store, backend, 13).process()
    assert wholly(result) == (13 - len(refused), len(refused), 13, 0)
    assert folder.names("rejected") == [raw_ids[at] for at in sorted(refused)]
    for at in refused:
        assert folder.store.read(raw_ids[at]) == ("rejected", contents[at])
        assert folder.store.rejection(raw_ids[at]).code == "backend_refused"
    assert {raw_id for _, raw_id in (await rows_of(backend)).values()} == set(
        folder.names("processed")
    )


async def test_postgres_that_refuses_a_row_of_a_batch(folder: Folder, postgres_url: str):
    """A constraint in PostgreSQL rejects one payload of a batch, and when it is gone takes it."""
    backend = PostgresBackend(postgres_url)
    try:
        await backend.open()
        connection = await asyncpg.connect(postgres_url)
        await connection.execute("ALTER TABLE measurements ADD CONSTRAINT low CHECK (mean < 3)")
        raw_ids = folder.put_batch(0, mixed(4))
        result = await processor_of(folder.store, backend, 10).process()
        assert wholly(result) == (3, 1, 4, 0)
        assert [each.raw_id for each in result.rejected] == raw_ids[3:]
        await connection.execute("ALTER TABLE measurements DROP CONSTRAINT low")
        await connection.close()
        assert folder.store.retry(raw_ids[3])
        assert wholly(await processor_of(folder.store, backend, 10).process()) == (1, 0, 1, 0)
        assert await rows_of(backend) == rows_for(raw_ids)
    finally:
        await backend.close()


# ── One at a time ─────────────────────────────────────────────────────────────────────────────────


async def test_calls_at_once(folder: Folder):
    """Calls at the same time, on one processor or several, take every payload exactly once."""
    folder.fill(200)
    backend = Recording()
    stores = [folder.store, (await Folder(folder.place).opened()).store]
    processors = [processor_of(store, backend, 7) for store in stores]
    calls = [processor.process(limit) for processor in processors for limit in (30, None, 60)]
    results = await asyncio.gather(*calls)
    assert sum(result.processed for result in results) == 200
    assert sorted(itertools.chain.from_iterable(backend.batches)) == folder.names("processed")
    assert sum(result.remaining == 0 for result in results) >= 1


async def test_calls_at_once_on_batches(folder: Folder):
    """Calls at the same time, whose limits cut through batches, take every payload once."""
    raw_ids = [
        raw_id
        for number in range(10)
        for raw_id in folder.put_batch(number, [body(number * 20 + at) for at in range(20)])
    ]
    backend = Recording()
    stores = [folder.store, (await Folder(folder.place).opened()).store]
    processors = [processor_of(store, backend, 7) for store in stores]
    calls = [processor.process(limit) for processor in processors for limit in (33, None, 61)]
    results = await asyncio.gather(*calls)
    assert sum(result.processed for result in results) == 200
    assert sorted(itertools.chain.from_iterable(backend.batches)) == raw_ids
    assert folder.names("processed") == raw_ids


async def test_processes_at_once(folder: Folder, program: Program):
    """Processes at the same time take every payload exactly once."""
    folder.fill(2000)
    running = [program.start("process", DROPZONE_PROCESS_BATCH=50) for _ in range(3)]
    outcomes = [process.communicate(timeout=PATIENCE) for process in running]
    assert [process.returncode for process in running] == [OK] * 3, outcomes
    assert sum(json.loads(out)["processed"] for out, _ in outcomes) == 2000
    assert folder.states() == {"processed": 2000}


async def test_second_call_waits_for_the_first(folder: Folder):
    """A second call waits for the first, and then finds nothing left to do."""
    folder.fill(3)
    backend = Slow()
    first = asyncio.create_task(processor_of(folder.store, backend, 10).process())
    await backend.entered.wait()
    second = asyncio.create_task(processor_of(folder.store, backend, 10).process())
    done, _ = await asyncio.wait([second], timeout=0.2)
    assert not done
    backend.go.set()
    assert ((await first).processed, (await second).processed) == (3, 0)
    assert len(backend.batches) == 1


async def test_busy(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    """A call whose patience ends before the other processor does raises, and changes nothing."""
    monkeypatch.setattr(dropzone, "LOCK_PATIENCE", 0.1)
    folder.fill(3)
    backend = Slow()
    first = asyncio.create_task(processor_of(folder.store, backend, 10).process())
    await backend.entered.wait()
    with pytest.raises(ProcessorBusy) as raised:
        await processor_of(folder.store, MemoryBackend(), 10).process()
    assert (raised.value.status, raised.value.code) == (503, "processor_busy")
    assert folder.states() == {"raw": 3}
    backend.go.set()
    assert (await first).processed == 3


async def test_busy_with_another_process(
    folder: Folder, program: Program, own: dict[str, str], monkeypatch: pytest.MonkeyPatch
):
    """Another process at work keeps this one out; once it is killed, this one goes on."""
    monkeypatch.setattr(dropzone, "LOCK_PATIENCE", 0.1)
    folder.fill(3)
    other = program.start("process", **own, DROPZONE_BACKEND="own_backends:Waits")
    while not (program.home / "waiting").exists():
        assert other.poll() is None
        await asyncio.sleep(0.01)
    processor = processor_of(folder.store, MemoryBackend(), 10)
    with pytest.raises(ProcessorBusy):
        await processor.process()
    assert folder.states() == {"raw": 3}
    other.kill()
    other.wait()
    assert (await processor.process()).processed == 3


async def test_cancelled(folder: Folder):
    """A call that is cancelled in the middle leaves its payloads pending and the way free."""
    folder.fill(3)
    backend = Slow()
    call = asyncio.create_task(processor_of(folder.store, backend, 10).process())
    await backend.entered.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert folder.states() == {"raw": 3}
    backend.go.set()
    assert (await processor_of(folder.store, backend, 10).process()).processed == 3


async def test_cancelled_while_waiting(folder: Folder):
    """A call that is cancelled while it waits for another disturbs neither that nor later ones."""
    folder.fill(3)
    backend = Slow()
    first = asyncio.create_task(processor_of(folder.store, backend, 10).process())
    await backend.entered.wait()
    waiting = asyncio.create_task(processor_of(folder.store, backend, 10).process())
    await asyncio.wait([waiting], timeout=0.1)
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    backend.go.set()
    assert (await first).processed == 3
    folder.fill(3)
    assert (await processor_of(folder.store, backend, 10).process()).processed == 3


# ── The event loop ────────────────────────────────────────────────────────────────────────────────


async def _ticks_during(work: asyncio.Task[object]) -> int:
    ticks = 0
    while not work.done():
        await asyncio.sleep(0.001)
        ticks += 1
    return ticks


async def test_loop_turns_while_large_payloads_are_read(folder: Folder):
    """Payloads of 100,000 values leave the event loop free to answer others in between."""
    large = body(0, *(number / 7 for number in range(100_000)))
    folder.fill(20, lambda _: large)
    work = asyncio.create_task(processor_of(folder.store, MemoryBackend(), 100).process())
    ticks = await _ticks_during(work)
    assert work.result().processed == 20
    assert ticks >= 20  # a loop that waits for the batch turns a handful of times


@contextmanager
def file_calls(below: Path) -> Iterator[Counter[tuple[str, str]]]:
    """Count what is done to files below a folder (Python's audit events), and in which thread."""
    calls: Counter[tuple[str, str]] = Counter()
    home, watching = threading.get_ident(), True

    def note(event: str, arguments: tuple[object, ...]) -> None:
        if watching and (event == "open" or event.startswith("os.")) and arguments:
            path = arguments[0]
            if isinstance(path, str | Path) and str(path).startswith(str(below)):
                calls[event, LOOP if threading.get_ident() == home else "another"] += 1

    sys.addaudithook(note)  # for good, hence the switch
    try:
        yield calls
    finally:
        watching = False


async def test_no_file_is_touched_on_the_event_loop(folder: Folder):
    """Listing, reading and moving happen in other threads: a slow disk never stops the server."""
    folder.fill(50, lambda number: b"bad" if number % 2 else body(number))
    with file_calls(folder.place) as calls:
        await processor_of(folder.store, MemoryBackend(), 10).process()
    assert {event for event, _ in calls} >= {"open", "os.scandir", "os.rename"}
    assert not [event for event, thread in calls if thread == LOOP]


async def test_processes_that_are_ready_when_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Processes that become ready at the very moment at which the last payload is done do no harm.

    They are ready, and those who wait for all of them have not heard of it yet.
    """
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    processor = Processor(Folder(tmp_path).store, MemoryBackend(), batch=1)
    monkeypatch.setattr(dropzone, "SHORT", 0.05)
    monkeypatch.setattr(processor._workers, "begin", lambda: asyncio.gather(ready))  # noqa: SLF001

    def batches() -> Iterator[dropzone.Work]:
        yield dropzone.Work([f"{arrival(1)}.json"])
        loop.call_soon_threadsafe(time.sleep, 0.3)  # until this thread has come to its end
        loop.call_soon_threadsafe(loop.call_soon, ready.set_result, None)

    async def work(*_: object) -> None:
        await asyncio.sleep(0.1)

    await processor._process_in_thread(batches(), work, 10**9)  # noqa: SLF001
    await processor.close()
