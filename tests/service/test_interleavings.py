"""Any interleaving of landing, processing, kills, retries, rebuilds and packing ends in one table.

So does discarding and what brings payloads back, and another node that lands, processes and
rebuilds on the same table. That table is what a plain computation makes of all payloads that are
not discarded, one after another.
"""

import asyncio
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import UUID

import asyncpg
import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from stores import land_each, lines
from test_cli import OK, PATIENCE, Program
from test_processing import NOON, Folder, arrival, batch_at, body, processor_of

from backends import BackendError, BackendUnavailable, Measurement
from backends.memory import MemoryBackend
from backends.postgres import PostgresBackend
from backends.raw import Form, Rejection, place_of
from backends.sqlite import SqliteBackend
from dropzone import RULES, Processor, Proof, SeriesAt, TransformConfig

T = TypeVar("T")
DAY = 86_400_000  # milliseconds
SECONDS = 2  # that many timestamps are fought for
RUN_SECONDS = 7.0


def payload(second: int, value: int | None) -> bytes:
    """Return a payload; with None, one that is rejected."""
    if value is None:
        return b"bad"
    return body(second, value - 1, value + 1)[:-1] + b', "device": "%s"}' % device(value).encode()


def device(value: int) -> str:
    """Return which of two devices sends a value."""
    return "odd" if value % 2 else "even"


FORMS: tuple[Form, ...] = ("ndjson", "json")


def batch_of(bodies: Sequence[bytes], form: Form) -> dict[str, Any]:
    """Return the arguments of `land` for a batch, of lines where not all is JSON."""
    if form == "ndjson" or b"bad" in bodies:
        return lines(*bodies)
    return {"body": b"[%s]" % b",".join(bodies), "form": form, "payloads": len(bodies)}


Content = tuple[int, int | None]  # second and value
Payloads = dict[UUID, Content]


def computed(payloads: Payloads, rules: TransformConfig = RULES) -> list[Measurement]:
    """Return the table that the payloads make one after another, in order of arrival."""
    table = {}
    for raw_id, (second, value) in sorted(payloads.items()):
        if value is not None:
            at, series = NOON + timedelta(seconds=second), device(value) if rules.series else ""
            table[at, series] = Measurement(at, float(value), 1.0, raw_id, series)
    return [row for _, row in sorted(table.items())]


# ── Step by step, on backends that fail on purpose ────────────────────────────────────────────────


class Killed(BaseException):
    """Ends what is done, as a kill does."""


class Kill:
    """Strikes before so many changes of files, or before or behind changes of rows, are done."""

    steps = 0

    @classmethod
    def step(cls, event: str = "rows", *_: object) -> None:
        if cls.steps and event in ("rows", "os.rename", "os.remove", "os.mkdir"):
            cls.steps -= 1
            if cls.steps == 0:
                raise Killed


sys.addaudithook(Kill.step)


class Fragile:
    """Refuses means below zero while `picky`; the next upsert raises once `dies` is set."""

    picky = False
    dies: Literal["", "before", "behind"] = ""
    stored: Sequence[Measurement] = ()

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        Kill.step()
        if self.picky and any(row.mean < 0 for row in measurements):
            raise BackendError("a mean below zero violates my constraint")
        if self.dies != "before":
            await super().upsert(measurements)
            self.stored = measurements
        Kill.step()
        if self.dies:
            raise BackendUnavailable(f"killed {self.dies} the upsert")

    async def delete(self, measurements: Sequence[Measurement]) -> None:
        Kill.step()
        await super().delete(measurements)
        Kill.step()


class InMemory(Fragile, MemoryBackend):
    """Takes the folder that it has no need of."""

    def __init__(self, _: Path, *, series: bool) -> None:
        super().__init__(series=series)


class InSqlite(Fragile, SqliteBackend):
    """Keeps its file in a folder."""

    def __init__(self, folder: Path, *, series: bool) -> None:
        super().__init__(folder / "rows.sqlite", series=series)


contents = st.tuples(st.integers(0, SECONDS - 1), st.sampled_from([1, 2, 3, -1, None]))
arrivals = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20), contents), max_size=6)
limits = st.none() | st.integers(1, 3)
some = st.integers(0, 3)


class Interleavings(RuleBasedStateMachine):
    """One data folder, processors that come and go, and the payloads that were put in.

    Beside it there is another node on the same table, with a folder and payloads of its own.
    """

    kind: type[InMemory | InSqlite] = InMemory
    rebuilds = 0  # that an example may do: each starts processes
    going_by = RULES

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.home = Path(tempfile.mkdtemp())
        self.folder = self.run(Folder(self.home / "data").opened())
        self.other = self.run(Folder(self.home / "other", node=7).opened())
        self.backend = self.kind(self.home, series=bool(self.going_by.series))
        self.payloads: Payloads = {}
        self.theirs: Payloads = {}
        self.discarded = set[UUID]()
        self.unnoted = False  # that a payload has left its batch, until it is rejected once more
        self.left = self.rebuilds
        self.tampered = False

    def run(self, work: Coroutine[None, None, T]) -> T:
        return self.runner.run(work)

    def processor(self, batch: int = 4) -> Processor:
        return processor_of(self.folder.store, self.backend, batch, self.going_by)

    def arrive(self, arrivals: list[tuple[int, int, Content]]) -> None:
        """Make payloads of some days in the past, in any order of arrival, pending."""
        for day, number, content in arrivals:
            raw_id = arrival(day * DAY + number)
            if raw_id not in self.payloads:
                self.folder.put(raw_id, payload(*content))
                self.payloads[raw_id] = content

    @rule(arrivals=st.lists(contents, min_size=1, max_size=3))
    def land(self, arrivals: list[Content]) -> None:
        raw_ids = self.run(
            land_each(self.folder.store, (payload(*content) for content in arrivals))
        )
        self.payloads |= dict(zip(raw_ids, arrivals, strict=True))

    @rule(arrivals=st.lists(contents, min_size=1, max_size=5), form=st.sampled_from(FORMS))
    def land_batch(self, arrivals: list[Content], form: Form) -> None:
        bodies = [payload(*content) for content in arrivals]
        raw_ids = self.run(self.folder.store.land(**batch_of(bodies, form)))
        self.payloads |= dict(zip(raw_ids, arrivals, strict=True))

    @rule(arrivals=st.lists(contents, max_size=4), limit=limits)
    def other_node(self, arrivals: list[Content], limit: int | None) -> None:
        """The other node lands payloads, the first alone and the rest in a batch, and processes."""

        async def work() -> None:
            bodies = [payload(*content) for content in arrivals]
            raw_ids = await land_each(self.other.store, bodies[:1])
            if bodies[1:]:
                raw_ids += await self.other.store.land(**lines(*bodies[1:]))
            self.theirs |= dict(zip(raw_ids, arrivals, strict=True))
            await processor_of(self.other.store, self.backend, 3, self.going_by).process(limit)

        self.run(work())

    @rule(
        day=st.integers(0, 3),
        number=st.integers(0, 20),
        arrivals=st.lists(contents, min_size=1, max_size=5),
    )
    def batch_from_the_past(self, day: int, number: int, arrivals: list[Content]) -> None:
        """A batch of a day in the past is put in."""
        bodies = [payload(*content) for content in arrivals]
        first = batch_at(day * DAY + number, len(bodies))
        if first not in self.payloads:
            raw_ids = self.folder.put_batch(day * DAY + number, bodies)
            self.payloads |= dict(zip(raw_ids, arrivals, strict=True))

    @rule(
        arrivals=arrivals, limits=st.lists(limits, min_size=1, max_size=2), batch=st.integers(1, 4)
    )
    def process(
        self, arrivals: list[tuple[int, int, Content]], limits: list[int | None], batch: int
    ) -> None:
        """One processor or two at once, each of as many payloads as its limit says."""
        self.arrive(arrivals)
        self.tampered |= self.backend.picky and self.unfinished

        async def work() -> None:
            processors = [self.processor(batch) for _ in limits]
            await asyncio.gather(
                *(one.process(limit) for one, limit in zip(processors, limits, strict=True))
            )

        self.run(work())

    @rule(arrivals=arrivals, when=st.sampled_from(["before", "behind"]), moved=some)
    def die_at_the_upsert(
        self,
        arrivals: list[tuple[int, int, Content]],
        when: Literal["before", "behind"],
        moved: int,
    ) -> None:
        """A processor is killed before it stores a batch; or behind that, when some is moved."""
        self.arrive(arrivals)
        self.backend.dies, self.backend.stored = when, ()
        with suppress(BackendUnavailable):
            self.run(self.processor(4).process())
        self.folder.store.settle(self.wholly_stored()[:moved], [])
        self.backend.dies = ""

    def wholly_stored(self) -> list[str]:
        """Return the pending files all payloads of which were in the last upsert."""
        stored = {row.raw_id for row in self.backend.stored}
        names, _ = self.folder.store.pending()
        return [
            name
            for name in names
            if stored >= {raw_id for raw_id, _ in self.folder.store.read_pending(name)}
        ]

    @precondition(lambda self: self.folder.names("raw"))
    @rule(count=st.integers(1, 2))
    def die_behind_the_reason(self, count: int) -> None:
        """A processor is killed when it has written why it rejects, before it moves the payload."""
        for raw_id in self.pending_bad_ones()[:count]:
            self.give_reason(raw_id)

    @precondition(lambda self: self.folder.names("raw"))
    @rule(count=st.integers(1, 2))
    def die_behind_the_file(self, count: int) -> None:
        """A processor is killed when payloads of batches have files, before it notes that."""
        for raw_id in [one for one in self.pending_bad_ones() if place_of(one)][:count]:
            if not (self.folder.place / "raw" / f"{raw_id}.json").exists():
                self.give_reason(raw_id)
                self.unnoted = True
                file = self.folder.place / "rejected" / f"{raw_id}.json"
                file.write_bytes(payload(*self.payloads[raw_id]))

    def pending_bad_ones(self) -> list[UUID]:
        pending = self.folder.names("raw")
        return [one for one in pending if self.payloads[one][1] is None]

    def give_reason(self, raw_id: UUID) -> None:
        reason = Rejection(raw_id, "payload_not_json", "not JSON", datetime.now(UTC))
        file = self.folder.place / "rejected" / f"{raw_id}.reason.json"
        file.write_bytes(msgspec.json.encode(reason))

    @rule()
    def change_the_constraint(self) -> None:
        self.backend.picky = not self.backend.picky

    @precondition(lambda self: self.folder.names("rejected"))
    @rule(count=st.integers(1, 4))
    def retry(self, count: int) -> None:
        for rejection in list(self.folder.store.rejections())[:count]:
            assert self.folder.store.retry(rejection.raw_id)

    @precondition(lambda self: self.payloads)
    @rule(numbers=st.lists(st.integers(0, 30), min_size=1, max_size=4), steps=st.integers(0, 40))
    def discard(self, numbers: list[int], steps: int) -> None:
        """Payloads are discarded whatever their state; the discard may be killed at some step."""
        chosen = self.chosen(self.payloads, numbers)
        Kill.steps = steps
        with suppress(Killed):
            self.run(self.processor().discards.discard(iter([chosen[:2], chosen[2:]])))
        Kill.steps = 0
        self.tampered |= self.backend.picky  # what it refuses does not come back
        if self.unfinished:  # then all that the note names goes
            raw_ids = msgspec.json.decode(self.note.read_bytes())["raw_ids"]
            self.discarded |= set(map(UUID, raw_ids))
        self.discarded |= {one for one in chosen if self.folder.store.read(one)[0] == "discarded"}

    @precondition(lambda self: self.discarded)
    @rule(numbers=st.lists(st.integers(0, 30), min_size=1, max_size=3))
    def undiscard(self, numbers: list[int]) -> None:
        chosen = self.chosen(self.discarded, numbers)
        count = self.run(self.processor().discards.undiscard(chosen))
        assert count == len(chosen)
        self.discarded -= set(chosen)

    def chosen(self, raw_ids: Iterable[UUID], numbers: list[int]) -> list[UUID]:
        known = sorted(raw_ids)
        return list(dict.fromkeys(known[number % len(known)] for number in numbers))

    @property
    def note(self) -> Path:
        return self.folder.place / "journal" / "discarding.json"

    @property
    def unfinished(self) -> bool:
        return self.note.exists()

    @precondition(lambda self: self.folder.store.finished_days())
    @rule()
    def compact(self) -> None:
        for day in self.folder.store.finished_days():
            self.folder.store.compact(day)

    @precondition(lambda self: self.folder.store.finished_days())
    @rule()
    def die_behind_the_pack(self) -> None:
        """The packer is killed when a pack is written, before the files are deleted."""
        for day in self.folder.store.finished_days():
            folder, copy = self.folder.place / "processed" / day, self.home / "copy"
            notes, kept = self.folder.place / "journal" / "batches", self.home / "notes"
            shutil.copytree(folder, copy)
            notes.mkdir(exist_ok=True)
            shutil.copytree(notes, kept)
            self.folder.store.compact(day)
            copy.rename(folder)
            shutil.copytree(kept, notes, dirs_exist_ok=True)
            shutil.rmtree(kept)

    @rule()
    def reopen(self) -> None:
        self.run(self.folder.store.close())
        self.folder = self.run(Folder(self.folder.place).opened())

    @precondition(lambda self: self.rebuilds and self.folder.names("processed"))
    @rule(number=some, change=st.sampled_from(["delete", "mean", "raw_id"]))
    def tamper(self, number: int, change: str) -> None:
        """Somebody deletes a row, or changes it."""
        rows = self.run(self.backend.find())
        if rows:
            row = rows[number % len(rows)]
            self.run(self.backend.delete([row]))
            if change != "delete":
                raw_id = row.raw_id if change == "mean" else UUID(int=1 << 127)
                other = msgspec.structs.replace(row, mean=99.0, raw_id=raw_id)
                self.run(self.backend.upsert([other]))
            self.tampered = True

    @precondition(lambda self: self.left and not self.unfinished)
    @precondition(lambda self: self.folder.store.count_processed())
    @rule(most=st.none() | st.integers(0, 2), delete_orphans=st.booleans(), by_other=st.booleans())
    def rebuild(self, most: int | None, *, delete_orphans: bool, by_other: bool) -> None:
        """A rebuild by either node runs to its end, or is killed after some findings."""
        folder = self.other if by_other else self.folder
        if not folder.store.count_processed():
            return
        self.left -= 1

        async def work() -> None:
            found = 0
            if not by_other:
                await self.processor().discards.finish()  # as the command does
            proof = Proof(folder.store.portable(), self.backend, self.going_by)
            rebuild = proof.rebuild(delete_orphans=delete_orphans)
            async for _ in rebuild:
                if found == most:
                    await rebuild.aclose()
                    return
                found += 1
            if not self.theirs:  # whose rows the other node would have to mend
                self.tampered = proof.counts["orphaned"] > 0  # some make rows of nothing

        try:
            self.run(work())
        except BackendError:
            assert self.backend.picky
            self.tampered = True

    @invariant()
    def nothing_is_lost(self) -> None:
        """At any moment, every payload is there, byte for byte."""
        for folder, payloads in ((self.folder, self.payloads), (self.other, self.theirs)):
            for raw_id, content in payloads.items():
                assert folder.store.read(raw_id)[1] == payload(*content)

    def teardown(self) -> None:
        """Let everything come to its end, and hold the table against the plain computation."""
        try:
            self.backend.picky = False
            self.retry(len(self.payloads))
            self.process([], [None, None], 3)
            for rejection in list(self.other.store.rejections()):
                self.other.store.retry(rejection.raw_id)
            self.other_node([], None)
            left = {one: self.payloads[one] for one in self.payloads.keys() - self.discarded}
            proving = [
                bool(at) for at, of in enumerate((left, self.theirs)) if computed(of, self.going_by)
            ]
            if self.tampered or self.discarded:  # where another node's row has to come back
                for by_other in proving:
                    self.rebuild(None, delete_orphans=True, by_other=by_other)
            if proving or not self.tampered:
                assert self.run(self.backend.find()) == computed(left | self.theirs, self.going_by)
            bad = {raw_id for raw_id, (_, value) in left.items() if value is None}
            assert self.folder.names("raw") == []
            assert set(self.folder.names("rejected")) == bad
            assert set(self.folder.names("discarded")) == self.discarded
            for day in self.folder.store.finished_days():
                self.folder.store.compact(day)  # so that nothing lies in two places
            self.nothing_is_lost()
            if not self.unnoted:
                assert self.folder.store.count_processed() == len(left) - len(bad)
        finally:
            self.run(self.folder.store.close())
            self.run(self.other.store.close())
            self.run(self.backend.close())
            self.runner.close()
            shutil.rmtree(self.home)


class InterleavingsInSqlite(Interleavings):
    """The same, on a database that is a file."""

    kind = InSqlite


class WithRebuilds(Interleavings):
    """The same, with rebuilds, and rows that somebody has tampered with."""

    rebuilds = 2


class WithRebuildsInSqlite(WithRebuilds):
    """The same, on a database that is a file."""

    kind = InSqlite


class OfTwoDevices(Interleavings):
    """The same, where each device has its series."""

    going_by = TransformConfig(series=SeriesAt("device"))


class OfTwoDevicesInSqlite(OfTwoDevices):
    """The same, on a database that is a file."""

    kind = InSqlite


class OfTwoDevicesWithRebuilds(WithRebuildsInSqlite):
    """The same, with rebuilds."""

    going_by = OfTwoDevices.going_by


MANY = settings(max_examples=12, stateful_step_count=20, deadline=None)
FEW = settings(max_examples=5, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(
    "machine", [Interleavings, InterleavingsInSqlite, OfTwoDevices, OfTwoDevicesInSqlite]
)
def test_any_interleaving(machine: type[Interleavings]):
    """Landing, processing, kills, retries, packing, discarding: all end in the computed table."""
    run_state_machine_as_test(machine, settings=MANY)


@pytest.mark.parametrize("machine", [WithRebuilds, WithRebuildsInSqlite, OfTwoDevicesWithRebuilds])
def test_any_interleaving_with_rebuilds(machine: type[Interleavings]):
    """So they do with rows that were tampered with, and rebuilds that may be killed halfway."""
    run_state_machine_as_test(machine, settings=FEW)


# ── All at once, on PostgreSQL ────────────────────────────────────────────────────────────────────


class Chaos:
    """Two processor processes on one data folder and PostgreSQL, and what befalls them."""

    def __init__(self, program: Program, folder: Folder, url: str, seed: int) -> None:
        self.program, self.folder, self.url = program, folder, url
        self.chance = random.Random(seed)  # noqa: S311
        self.payloads: Payloads = {}
        self.discarded = set[UUID]()
        self.processors = [self.start() for _ in range(2)]

    def start(self):
        variables = {"DROPZONE_PROCESS_EVERY": "0.02", "DROPZONE_PROCESS_BATCH": "5"}
        return self.program.start("process", "--watch", **variables, DROPZONE_DATABASE_URL=self.url)

    async def arrive(self) -> None:
        """Up to 60 payloads land, alone and in a batch; as many come from the past in a folder."""
        arrivals = [self.draw() for _ in range(self.chance.randint(1, 60))]
        bodies = [payload(*one) for one in arrivals]
        alone = self.chance.randrange(len(bodies))
        raw_ids = await land_each(self.folder.store, bodies[:alone])
        batch = batch_of(bodies[alone:], self.chance.choice(FORMS))
        raw_ids += await self.folder.store.land(**batch)
        for one in [self.draw() for _ in arrivals]:
            raw_id = arrival(self.chance.randrange(4 * DAY))
            if raw_id not in self.payloads:
                self.payloads[raw_id] = one
                self.folder.put(raw_id, payload(*one))
        self.payloads |= dict(zip(raw_ids, arrivals, strict=True))

    def draw(self) -> Content:
        value = self.chance.randint(-5, 50)
        return self.chance.randrange(10), value or None

    async def kill(self) -> None:
        """A processor is killed while it works, and another one takes its place."""
        await self.arrive()
        pending = self.folder.store.count_pending()
        await self.until(lambda: self.folder.store.count_pending() < pending)
        number = self.chance.randrange(2)
        self.processors[number].kill()
        self.processors[number] = self.start()

    async def refuse(self) -> None:
        """The database refuses means below zero for as long as it takes to process some."""
        await self.execute("ALTER TABLE measurements ADD CHECK (mean >= 0) NOT VALID")
        await self.arrive()
        await self.until(lambda: self.folder.store.count_pending() < 10)
        await self.execute("ALTER TABLE measurements DROP CONSTRAINT measurements_mean_check")

    async def retry(self) -> None:
        for rejection in self.folder.store.rejections():
            self.folder.store.retry(rejection.raw_id)

    async def compact(self) -> None:
        for day in self.folder.store.finished_days():
            self.folder.store.compact(day)

    async def discard(self) -> None:
        """Some payloads are discarded, and others are put back."""
        chosen = self.chance.sample(sorted(self.payloads), 4)
        await self.command("discard", *chosen)
        self.discarded |= set(chosen)
        back = self.chance.sample(sorted(self.discarded), 2)
        await self.command("undiscard", *back)
        self.discarded -= set(back)

    async def command(self, *arguments: object) -> None:
        run, url = self.program.run, self.url
        done = await asyncio.to_thread(run, *arguments, DROPZONE_DATABASE_URL=url)
        assert done.returncode == OK, done

    async def lose_rows(self) -> None:
        """Some rows are lost, and a rebuild brings them back while the others go on."""
        await self.execute("DELETE FROM measurements WHERE mean > 25")
        done = await asyncio.to_thread(self.program.run, "rebuild", DROPZONE_DATABASE_URL=self.url)
        assert (done.returncode, done.stderr) == (OK, "")

    async def execute(self, statement: str) -> None:
        client = await asyncpg.connect(self.url)
        await client.execute(statement)
        await client.close()

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not holds():
                await asyncio.sleep(0.002)

    async def end(self) -> None:
        """Everything is retried and processed, and the processors stop when they are told to."""
        await self.retry()
        await self.until(lambda: self.folder.store.count_pending() == 0)
        for process in self.processors:
            process.send_signal(signal.SIGTERM)
            _, err = await asyncio.to_thread(process.communicate)
            assert process.returncode == OK, err


async def test_everything_at_once(tmp_path: Path, postgres_url: str):
    """Kills, refusals, retries, packing, discarding and rebuilds lose nothing at all."""
    seed = random.randrange(1_000_000)  # noqa: S311
    program = Program(tmp_path)
    backend = PostgresBackend(postgres_url)
    await backend.open()
    try:
        folder = await Folder(tmp_path / "data").opened()
        chaos = Chaos(program, folder, postgres_url, seed)
        steps = [*[chaos.arrive] * 2, *[chaos.kill] * 3, chaos.refuse, chaos.retry, chaos.compact]
        steps += [chaos.discard] * 2
        await chaos.arrive()
        await chaos.until(folder.store.count_processed)  # a rebuild refuses to work from nothing
        ends = time.monotonic() + RUN_SECONDS
        while time.monotonic() < ends:
            await chaos.chance.choice([*steps, chaos.lose_rows])()
        await chaos.lose_rows()
        await chaos.end()
        left = {one: chaos.payloads[one] for one in chaos.payloads.keys() - chaos.discarded}
        assert await backend.find() == computed(left), seed
        bad = {raw_id for raw_id, (_, value) in left.items() if value is None}
        assert set(folder.names("rejected")) == bad, seed
        assert set(folder.names("discarded")) == chaos.discarded, seed
        for raw_id, content in chaos.payloads.items():
            assert folder.store.read(raw_id)[1] == payload(*content), seed
        proof = Proof(folder.store.portable(), backend)
        assert [finding async for finding in proof.findings()] == [], seed
        await folder.store.close()
    finally:
        program.close()
        await backend.close()
