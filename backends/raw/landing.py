"""Landing: payloads that arrive together become durable together, and only then are acknowledged.

`RawStore.land` gathers what arrives while the group before is written (group commit). Each group is
one record of the journal, one sync, and then a file for each payload or batch; `journal.py` says
why none that was acknowledged can be lost.

A disk may hang, and a process may be stopped. A group that takes longer than `LAND_PATIENCE`, and
all that waits behind it, is refused, and so is what comes, until that group is done. It may have
landed all the same. What waited behind it has not.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import itertools
import json
import logging
import os
import signal
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import UUID

import aiofiles.os
import msgspec
from msgspec import Struct

from backends.raw import (
    Activity,
    Copied,
    Form,
    KeyReused,
    NoAccess,
    Observer,
    PayloadStoreError,
    RawIds,
    StorageFull,
    StorageUnavailable,
    begins_batch,
    came_alone,
    name_of,
    place_of,
)
from backends.raw.archive import Archive
from backends.raw.backup import Backup, new_folder
from backends.raw.disk import (
    DISK_FULL,
    NO_ROOM,
    Hands,
    Need,
    Room,
    denied,
    make_folder,
    storage_error,
    sync_file,
    write_all,
    wrong_owner,
)
from backends.raw.folders import Folders
from backends.raw.journal import Entry, Journal, Record, digest_of
from backends.raw.keys import KeyUse

log = logging.getLogger("dropzone")
T = TypeVar("T")

GROUPS = 2  # under way at once where batches come; else it is one
LARGE_GROUP = 16  # requests
LARGE = 1024 * 1024  # bytes; a larger body is landed alone, and the others pass it
LARGE_AT_ONCE = 2  # under way
GROUP_BYTES = 1024 * 1024  # that are landed together
WRITER_BYTES = 8 * 1024  # of a group that is worth the way to another process
BY_THREAD = 64 * 1024  # bytes of a body, on average, which are not
MIN_FREE_BYTES = 256 * 1024 * 1024
LAND_PATIENCE = 10.0  # seconds for a group, and more for what it holds, before it stands still
LEAST_FILES = 500  # in a second, and
LEAST_BYTES = 2 * 1024 * 1024  # in a second: what is slower stands still
PROBE_PATIENCE = 3.0  # seconds
CLOSE_PATIENCE = 10.0  # seconds for what is under way, before the writer process is killed
KILL_PATIENCE = 3.0  # seconds for what waited for it


class Arrival(Struct, frozen=True, array_like=True):
    """What one request brought: a payload, or a batch of a `form` and of so many payloads."""

    body: bytes
    key: str | None
    caller: str
    form: Form
    payloads: int

    def is_large(self) -> bool:
        """Say whether it is landed alone."""
        return len(self.body) > LARGE

    def needs(self) -> Need:
        """Return the room that it needs; each payload of a batch may be rejected, with a reason."""
        return Need(len(self.body), 1 + 2 * self.payloads if self.form else 1)


class Answer(Struct, frozen=True, array_like=True):
    """The (first) raw_id for a body; or the error that refuses it, by its code, and its detail.

    Older versions have landed each line as a file of its own, and an array as one payload: under
    the same Idempotency-Key those raw_ids are the answer.
    """

    raw_ids: list[UUID]
    code: str = ""
    detail: str = ""

    def result(self, arrival: Arrival) -> Sequence[UUID]:
        """Return the raw_ids of all payloads, or raise the error."""
        if self.code:
            raise REFUSALS[self.code](self.detail)
        if arrival.form and begins_batch(self.raw_ids[0], arrival.payloads):
            return RawIds(self.raw_ids[0], arrival.payloads)
        return self.raw_ids


REFUSALS: dict[str, type[PayloadStoreError]] = {
    kind.code: kind for kind in (KeyReused, StorageFull, StorageUnavailable)
}


class Written(Struct, frozen=True, array_like=True):
    """The answers to a group, and what was made durable for them."""

    answers: list[Answer]
    payloads: int = 0
    bytes: int = 0
    sync_seconds: float = 0.0


Answers = Sequence[asyncio.Future[Answer]]
STOPPED = Answer([], StorageUnavailable.code, "landing was stopped; try again later")


def _answer(waiting: Answers, answers: Sequence[Answer]) -> None:
    for landed, answer in zip(waiting, answers, strict=True):
        if not landed.done():  # or else the caller has gone, or was refused
            landed.set_result(answer)


class Writer:
    """A second store on the same folder, in a process of its own, that lands large groups.

    A file takes four system calls, and a thread must win the interpreter lock back from the event
    loop after each; a process need not. It is started by the first group that is worth it.
    """

    def __init__(self, settings: dict[str, object]) -> None:
        home = str(Path(__file__).resolve().parents[2])
        self._code = (
            f"import sys; sys.path.insert(0, {home!r}); import backends.raw.landing as landing; "
            f"landing.write_forever({json.dumps(settings)!r})"
        )
        self._process: asyncio.subprocess.Process | None = None  # when it is ready
        self._started: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def write(
        self, group: Sequence[Arrival], others: Sequence[Need], *, patient: bool
    ) -> Written | None:
        """Return the answers to a group, None where the process is not there (yet).

        Who is `patient` waits until it has started.
        """
        process = self._process
        if process is None or process.stdin is None or process.stdin.is_closing():
            self._starting = self._starting or asyncio.create_task(self._start())
            if patient:
                await asyncio.wait([self._starting])
            process = self._process if patient else None
        if process is None:
            return None
        try:
            return await self._exchange(process, msgspec.msgpack.encode((group, others)))
        except (
            OSError,
            RuntimeError,  # uvloop: it is closed
            asyncio.IncompleteReadError,
            msgspec.DecodeError,
        ):
            if self._process is process:  # or else another has been started
                self._process = None
            wrong = "the writer process has ended; try again later"
            return Written([Answer([], StorageUnavailable.code, wrong)] * len(group))

    async def _start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", self._code, stdin=pipe, stdout=pipe, start_new_session=True
            )
            self._started = process
            if process.stdout and await process.stdout.read(1):  # it is ready
                self._process = process
        except OSError as error:
            log.error("the writer process does not start: %s", error)  # noqa: TRY400
        finally:
            self._starting = None

    async def _exchange(self, process: asyncio.subprocess.Process, message: bytes) -> Written:
        if not (process.stdin and process.stdout):
            raise BrokenPipeError
        process.stdin.writelines((len(message).to_bytes(4), message))
        async with self._turn:  # answers come in the order of the groups
            size = int.from_bytes(await process.stdout.readexactly(4))
            return WRITTEN.decode(await process.stdout.readexactly(size))

    async def close(self) -> None:
        """Let the process end, and wait for it."""
        if self._starting:
            await asyncio.wait([self._starting])
        if self._process and self._process.stdin:
            self._process.stdin.close()
            await self._process.wait()

    def kill(self) -> None:
        """Kill the process, which does not end by itself; the next start recovers its log."""
        if self._started and self._started.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._started.kill()


GROUP = msgspec.msgpack.Decoder(tuple[list[Arrival], list[Need]])
WRITTEN = msgspec.msgpack.Decoder(Written)


def write_forever(settings: str) -> None:
    """Land the groups that come by standard input, until it ends: the process of `Writer`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what stops a service is sent to all of it
    store = RawStore(**json.loads(settings))
    store.open_here()
    with contextlib.suppress(BrokenPipeError, msgspec.DecodeError):  # the server was killed
        write_all(1, b"!")
        while size := sys.stdin.buffer.read(4):
            group, others = GROUP.decode(sys.stdin.buffer.read(int.from_bytes(size)))
            written = msgspec.msgpack.encode(store.write(group, others))
            write_all(1, len(written).to_bytes(4) + written)
    store.close_here()


class RawStore(Folders):
    """The folders and the way into them: implements `backends.raw.PayloadStore`.

    `folder`, `processed`, `rejected`, `archive` and the days are those of `Folders`. Where fewer
    than `min_free_bytes` are free on the disk, or a twentieth of it if that is less, nothing is
    landed. All raw_ids name the `node`, 0 where it has no number. `observer` hears of each group
    that has landed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        processed: str | os.PathLike[str] | None = None,
        rejected: str | os.PathLike[str] | None = None,
        keep_days: int = 0,
        archive: Archive | None = None,
        keep_local_days: int = 0,
        min_free_bytes: int = MIN_FREE_BYTES,
        node: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(
            Path(folder),
            processed=Path(processed) if processed else None,
            rejected=Path(rejected) if rejected else None,
            keep_days=keep_days,
            archive=archive,
            keep_local_days=keep_local_days,
            node=node,
        )
        self._min_free = min_free_bytes
        self._observer = observer
        self._is_open = False
        self._gathered: deque[tuple[Arrival, asyncio.Future[Answer]]] = deque()
        self._landing: set[asyncio.Task[None]] = set()
        self._large = 0  # bodies under way
        self._turns_of_large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._writing: dict[int, Sequence[Arrival]] = {}  # the groups under way
        self._under_way: dict[int, tuple[float, float, Answers]] = {}  # begun, patience, for whom
        self._overdue: dict[int, float] = {}  # groups that stand still, and since when
        self._watch: asyncio.TimerHandle | None = None
        self._probing: asyncio.Future[str | None] | None = None
        self._closing: asyncio.Future[None] | None = None
        self._writer = Writer(self._settings_of_writer())
        self._journal = Journal(self.journal, self, node or 0)

    def _settings_of_writer(self) -> dict[str, object]:
        folders = {"folder": self.raw, "processed": self.processed, "rejected": self.rejected}
        places = {name: str(each) for name, each in folders.items()}
        return {**places, "min_free_bytes": self._min_free, "node": self.node}

    def portable(self) -> Folders:
        """See PayloadStore.portable."""
        return Folders(
            self.raw,
            processed=self.processed,
            rejected=self.rejected,
            keep_days=self.keep_days,
            archive=self.archive,
            keep_local_days=self.keep_local_days,
            node=self.node,
        )

    async def open(self) -> None:
        """See PayloadStore.open."""
        self._thread, self._prober = Hands(1, "landing"), Hands(1, "probe")
        self._closing = None
        try:
            await self._in_thread(self.open_here)
        except PermissionError as error:
            raise NoAccess(denied(error)) from error
        except OSError as error:
            place = error.filename or self.journal
            raise StorageUnavailable(f"{place}: {error.strerror}; {_advice(error)}") from error
        except sqlite3.Error as error:  # which names no file
            wrong = [*self.out_of_reach(), f"{self.journal}/keys.sqlite: {error}"]
            raise StorageUnavailable(wrong[0]) from error
        self._is_open = True

    def open_here(self) -> None:
        """Open the store in this thread, to be written to by `write`.

        Raises `NoAccess` where the folder is another user's: the files that this program made there
        would be of no use to that user's.
        """
        wrong = wrong_owner(self.raw)
        if wrong:
            raise NoAccess(f"{wrong}: one user has to run all that works there")
        for folder in (self.raw, self.processed, self.rejected, self.discarded, self.journal):
            make_folder(folder)
            if folder.stat().st_dev != self.raw.stat().st_dev:
                raise StorageUnavailable(f"{folder} must lie on the file system of {self.raw}")
        self._tally = self.open_tally()
        self._journal.open()

    async def close(self) -> None:
        """See PayloadStore.close; the journal is empty then, unless the disk hangs."""
        self._is_open = False
        for patience in (CLOSE_PATIENCE, KILL_PATIENCE):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    await self._close()
                return
            self._writer.kill()
        log.error(
            "landing still stands still; what is under way is left in %s for the next start",
            self.journal,
        )

    async def _close(self) -> None:
        while self._landing:
            await asyncio.wait(self._landing)
        await self._writer.close()
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._in_thread(self.close_here))
        await asyncio.shield(self._closing)
        self._thread.shutdown()
        self._prober.shutdown(wait=False)

    def close_here(self) -> None:
        """Close what `open_here` has opened."""
        self._journal.close()
        self._tally.close()

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """Run a function in the thread of landing, which no other work can hold up."""
        result: T = await aiofiles.os.wrap(call)(*arguments, executor=self._thread)
        return result

    async def land(
        self,
        body: bytes,
        key: str | None = None,
        caller: str = "",
        form: Form = "",
        payloads: int = 1,
    ) -> Sequence[UUID]:
        """See PayloadStore.land."""
        arrival = Arrival(body, key, caller, form, payloads)
        if not self._is_open:
            return STOPPED.result(arrival)
        if not arrival.is_large():
            return (await self._gather(arrival)).result(arrival)
        async with self._turns_of_large:
            self._large += 1
            try:
                return (await self._gather(arrival)).result(arrival)
            finally:
                self._large -= 1

    def _gather(self, arrival: Arrival) -> asyncio.Future[Answer]:
        """Let an arrival be landed with what else has gathered."""
        if self._overdue:
            raise StorageUnavailable(self._standstill())
        landed: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._gathered.append((arrival, landed))
        most = GROUPS if arrival.form else 1
        if self._large:  # or else the small ones would wait for it
            most = LARGE_AT_ONCE + 1
        if len(self._landing) < most:
            self._landing.add(asyncio.create_task(self._land_gathered()))
        return landed

    async def _land_gathered(self) -> None:
        """Land what has gathered while the groups before were landed, until nothing has.

        A large group is half of all that wait, so that one half is received while the other is
        written; left alone, the groups would become ever more unequal, and each side wait.
        """
        group = list[Arrival]()
        try:
            while self._gathered:
                half = max(LARGE_GROUP, (len(self._gathered) + len(group) + 1) // 2)
                group, waiting, size = [], [], 0
                while self._gathered and len(group) < half and size < GROUP_BYTES:
                    if group and (group[0].is_large() or self._gathered[0][0].is_large()):
                        break  # nobody else has to wait for it
                    arrival, landed = self._gathered.popleft()
                    group.append(arrival)
                    waiting.append(landed)
                    size += len(arrival.body)
                await self._land_group(group, waiting, size)
        finally:  # at once: a caller that has just been answered and lands again begins another
            self._landing.difference_update({asyncio.current_task()})
            if self._gathered and not self._landing:  # this task was cancelled
                self._refuse_gathered(STOPPED)

    async def _land_group(self, group: Sequence[Arrival], waiting: Answers, size: int) -> None:
        """Land a group of `size` bytes and answer those who wait for it, whatever happens."""
        self._under_way[id(waiting)] = (time.monotonic(), self._patience(group, size), waiting)
        if self._watch is None:
            self._watch = asyncio.get_running_loop().call_later(LAND_PATIENCE, self._look)
        refusal = STOPPED
        answers: list[Answer] = []
        try:
            answers = (await self._written(group, size)).answers
        except Exception as error:  # noqa: BLE001 (a defect, but nobody may wait for ever)
            wrong = storage_error(error)
            refusal = Answer([], wrong.code, str(wrong))
        finally:
            begun, _, _ = self._under_way.pop(id(waiting))
            is_answered = len(answers) == len(waiting)
            _answer(waiting, answers if is_answered else [refusal] * len(waiting))
            if id(waiting) in self._overdue:
                del self._overdue[id(waiting)]
                log.warning("landing goes on after %.0f s", time.monotonic() - begun)

    def _patience(self, group: Sequence[Arrival], size: int) -> float:
        """Return the seconds that a group may take, beside those that are under way."""
        others = list(itertools.chain.from_iterable(self._writing.values()))
        files = len(group) + len(others)
        total = size + sum(len(arrival.body) for arrival in others)
        return LAND_PATIENCE + files / LEAST_FILES + total / LEAST_BYTES

    def _look(self) -> None:
        """Refuse the groups that take too long, and all that waits behind them; look again later.

        One timer serves all groups, so that those that land in time need none.
        """
        now, self._watch = time.monotonic(), None
        for number, (begun, patience, waiting) in self._under_way.items():
            if number not in self._overdue and now - begun >= patience:
                self._overdue[number] = begun
                log.error("%s", self._standstill())
                refusal = Answer([], StorageUnavailable.code, self._standstill())
                _answer(waiting, [refusal] * len(waiting))
                self._refuse_gathered(refusal)
        left = [b + p - now for n, (b, p, _) in self._under_way.items() if n not in self._overdue]
        if left:
            self._watch = asyncio.get_running_loop().call_later(min(left), self._look)

    def _refuse_gathered(self, refusal: Answer) -> None:
        waiting = [landed for _, landed in self._gathered]
        self._gathered.clear()
        _answer(waiting, [refusal] * len(waiting))

    def _standstill(self) -> str:
        seconds = time.monotonic() - min(self._overdue.values())
        return (
            f"landing stands still for {seconds:.0f} s: the disk of {self.raw} or a process that "
            "lands payloads there does not go on; try again later"
        )

    async def _written(self, group: Sequence[Arrival], size: int) -> Written:
        """Land a group of `size` bytes by the writer process or by a thread, and tell of it."""
        begun = time.monotonic()
        others = [arrival.needs() for other in self._writing.values() for arrival in other]
        is_large = group[0].is_large()
        is_many = size >= WRITER_BYTES and (size < BY_THREAD * len(group) or bool(self._writing))
        by_writer = is_large or (is_many and not self._large)
        self._writing[id(group)] = group
        try:
            written = None
            if by_writer:
                written = await self._writer.write(group, others, patient=is_large)
            if written is None:
                written = await self._in_thread(self.write, group, others)
        finally:
            del self._writing[id(group)]
        if self._observer and written.payloads:
            seconds = time.monotonic() - begun
            self._observer.landed(written.payloads, written.bytes, seconds, written.sync_seconds)
        return written

    def write(self, group: Sequence[Arrival], others: Sequence[Need] = ()) -> Written:
        """Land a group, in the order that `journal.py` explains, and answer it.

        `others` is what is written meanwhile, which needs room, too. A body for which there is too
        little room is refused, and the others land.
        """
        journal = self._journal
        try:
            room = self._room_left()
            room.take(others)  # where they find too little, they are refused, and need none
            has_keys = any(arrival.key for arrival in group)
            with journal.keys_locked() if has_keys else contextlib.nullcontext():
                answers, record, payloads = self._assign(group, room)
                written = Written(answers)
                if record.entries:
                    written = self._commit(record, answers, payloads)
                with contextlib.suppress(OSError):  # it is on disk, whether counted or not
                    self._tally.add(landed=written.payloads)
        except Exception as error:  # noqa: BLE001 (whatever it was, no one may hear a 202)
            refusal = storage_error(error)
            if isinstance(refusal, StorageFull):
                journal.end_log()  # its checkpoint makes room
            written = Written([Answer([], refusal.code, str(refusal))] * len(group))
        journal.begin_checkpoint()
        return written

    def _assign(
        self, group: Sequence[Arrival], room: Room
    ) -> tuple[list[Answer], Record, dict[UUID, int]]:
        """Return the answers to a group, and the record of what is to be stored for them.

        Then, for each file of the record, how many payloads are in it.
        """
        answers, payloads = list[Answer](), dict[UUID, int]()
        record = Record([], [])
        with self._journal.counting() as next_id:
            for arrival in group:
                use = self._use_of(arrival, next_id) if arrival.key else None
                if use and not _is_of(arrival, use):
                    wrong = "this Idempotency-Key came with another body before"
                    answers.append(Answer([], KeyReused.code, wrong))
                    continue
                if not (use and use.landed) and not room.take([arrival.needs()]):
                    answers.append(Answer([], StorageFull.code, NO_ROOM))
                    continue
                raw_ids = use.raw_ids if use else [next_id(_batched(arrival))]
                answers.append(Answer(raw_ids))
                if use and use.landed:
                    continue
                record.entries.append(Entry(raw_ids[0], arrival.body, arrival.form))
                payloads[raw_ids[0]] = arrival.payloads
                if use:
                    record.keys.append(use)
        return answers, record, payloads

    def _use_of(self, arrival: Arrival, next_id: Callable[[int], UUID]) -> KeyUse:
        payloads = _batched(arrival)
        digest = digest_of(arrival.body, arrival.form)
        return self._journal.use_of(
            arrival.key or "",
            arrival.caller,
            digest,
            payloads,
            functools.partial(next_id, payloads),
        )

    def _commit(
        self, record: Record, answers: list[Answer], payloads: Mapping[UUID, int]
    ) -> Written:
        begun = time.monotonic()
        size = self._journal.append(record)
        sync_seconds = time.monotonic() - begun
        files = {
            f"{self.raw}/{name_of(entry.raw_id, payloads[entry.raw_id], entry.form)}": entry.body
            for entry in record.entries  # one key may have come several times
        }
        try:
            for path, body in files.items():
                self.publish(path, body)
            self._journal.confirm(record)
        except Exception:
            for path in files:
                with contextlib.suppress(OSError):
                    os.unlink(path)
            self._journal.take_back(size)
            raise
        self._journal.end_log_when_full()
        return Written(answers, sum(payloads.values()), sum(map(len, files.values())), sync_seconds)

    def _room_left(self) -> Room:
        """Refuse before anything is written, so that what is acknowledged can be processed too."""
        if self._journal.is_behind():
            raise OSError(errno.EIO, "the checkpoint of the journal fails")
        room = Room(self.raw, self._min_free)
        if room.is_used_up():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return room

    def room(self) -> tuple[int, int]:
        """See PayloadStore.room."""
        room = Room(self.raw, self._min_free)
        return room.free, room.reserve

    async def landing_trouble(self) -> str | None:
        """See PayloadStore.landing_trouble; a look that hangs is not begun a second time."""
        if self._overdue:
            return self._standstill()
        if self._probing is None or self._probing.done():
            loop = asyncio.get_running_loop()
            self._probing = loop.run_in_executor(self._prober, self.trouble)
        probing = self._probing  # of which others may make another one before this goes on
        done, _ = await asyncio.wait([probing], timeout=PROBE_PATIENCE)
        if not done:
            return f"the disk of {self.journal} does not answer within {PROBE_PATIENCE:.0f} s"
        return probing.result()

    def activity(self) -> Activity:
        """See PayloadStore.activity."""
        return self._tally.read()

    def trouble(self) -> str | None:
        """Try to write and sync; return what stands in the way of landing, or None."""
        for folder in (self.raw, self.journal):
            if not os.access(folder, os.W_OK | os.X_OK):
                return f"{folder} is not there or not writable"
        try:
            self._room_left()
            self.publish(self.journal / "probe", b"")
            sync_file(self.journal)
        except OSError as error:
            return f"{self.journal}: {error.strerror}"
        return None

    def problems(self) -> dict[str, list[str]]:
        """See PayloadStore.problems."""
        found = super().problems()
        if Room(self.raw, self._min_free).is_used_up():
            full = f"the disk of {self.raw} is nearly full, in bytes or in files (inodes)"
            wrong = f"{full}: make room, payloads are refused"
            found["data folder"].append(wrong)
        return found

    def new_backup(self, folder: Path) -> contextlib.AbstractContextManager[Path]:
        """See PayloadStore.new_backup."""
        folders = (self.raw, self.processed, self.rejected, self.discarded, self.journal)
        return new_folder(folder, folders)

    def back_up(self, folder: Path, *, processed_alone: bool = False) -> Iterator[Copied]:
        """See PayloadStore.back_up; `backup.py` says why no payload is missed."""
        backup = Backup(self, folder)
        return backup.copy_processed() if processed_alone else backup.copy()


def _is_of(arrival: Arrival, use: KeyUse) -> bool:
    """Say whether a key was used for the same body before, divided in the same way.

    Older versions have divided lines into as many payloads, and nothing else.
    """
    first = use.raw_ids[0]
    place, is_alone = place_of(first), len(use.raw_ids) == 1 and came_alone(first)
    payloads = 1 if is_alone else place.payloads if place and place.at == 0 else arrival.payloads
    if payloads != arrival.payloads:
        return False
    if arrival.form == "ndjson" and not place and len(use.raw_ids) != arrival.payloads:
        return False
    return use.digest == digest_of(arrival.body, arrival.form)


def _batched(arrival: Arrival) -> int:
    """Return how many payloads a batch has, 0 where it is none."""
    return arrival.payloads if arrival.form else 0


def _advice(error: OSError) -> str:
    """Say what to do about an error at the start."""
    if error.errno in DISK_FULL:
        return "make room on the disk"
    if error.errno == errno.ETIMEDOUT:
        return "end that process, or let it go on"
    return "look at the disk and its file system, then start again"
