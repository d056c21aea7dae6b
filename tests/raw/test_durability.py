"""What was acknowledged stays: through power cuts, kills, full and failing disks, set clocks."""

import asyncio
import errno
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar
from uuid import UUID

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from power_cut import (
    CHANCE,
    REPO,
    Ledger,
    Service,
    assert_served,
    assert_whole,
    copy_as_it_lies,
    device_of,
    disk,
    files_in,
    keep_posting,
    load,
    may_mount,
    mounted,
    not_whole,
    program,
)
from stores import all_pending_in, land_each, lines, names_of, opened, pending_in

from backends import raw
from backends.raw import StorageFull, StorageUnavailable, first_of, journal
from backends.raw.disk import Need, Room
from backends.raw.folders import Folders
from backends.raw.journal import HEAD, Entry, Journal, Log, Record
from backends.raw.landing import GROUP_BYTES, Arrival, RawStore, Written

Note = Callable[[str, object], None]
Told = Callable[..., list[str]]

SLOW_CONNECTIONS = 6000
BODY = b'{"time_stamp": "2019-05-01T12:00:00Z", "data": [0, 2]}'


def logs_in(folder: Path) -> set[str]:
    return {path.name for path in (folder / "journal").glob("*.log")}


# ── Power cuts ────────────────────────────────────────────────────────────────────────────────────

CUTS = [
    ("ext4", None, False),
    ("ext4", 1 << 18, False),
    ("ext4", 1 << 18, True),
    ("xfs", 1 << 18, False),
    ("xfs", None, True),
]


async def cut_power(kind: str, folder: Path, source: Path, ledger: Ledger, *, process: bool) -> int:
    """Return how many acknowledged payloads were not whole before the recovery."""
    copy = folder / "copy.img"
    with disk(kind, folder) as (image, where):
        service = Service(where / "data", folder / "home", source)
        try:

            def cut() -> None:
                service.freeze()
                copy_as_it_lies(image, device_of(where), copy)
                service.kill()

            await load(service, ledger, cut, process=process, bad=0.03)
        finally:
            service.kill()
    with mounted(copy, folder / "after", "-o", "loop") as where:
        lost = not_whole(where / "data", ledger)
        service = Service(where / "data", folder / "home", source)
        try:
            assert_whole(where / "data", ledger)
            await assert_served(service, ledger)
            assert service.stop() == os.EX_OK
        finally:
            service.kill()
        assert_whole(where / "data", ledger)
    return lost


async def test_power_cut(tmp_path: Path, record_property: Note):
    """Whatever was acknowledged is there, whole and once, after the power failed under load.

    The cuts are real ones, of disks that lose what was not synced: much of what had been
    acknowledged is missing from the raw folder before the service starts again.
    """
    if not may_mount(tmp_path):
        record_property("note", "NO REAL POWER CUT: mounting is not allowed here. Run it as root.")
        await power_cut_by_hand(tmp_path)
        return
    lost = 0
    for number, (kind, log_bytes, process) in enumerate(CUTS):
        folder, ledger = tmp_path / str(number), Ledger()
        folder.mkdir()
        source = program(folder / "program", LOG_BYTES=log_bytes)
        missing = await cut_power(kind, folder, source, ledger, process=process)
        lost += missing
        print(f"{kind}: {len(ledger.acknowledged)} acknowledged, {missing} not whole, 0 lost")
        for left in folder.glob("*.img"):
            left.unlink()
    assert lost > 0, "the cuts were none: everything had reached the disk"


async def power_cut_by_hand(tmp_path: Path) -> None:
    """The next best form: kill everything, then take from the files what the journal still has."""
    ledger, data = Ledger(), tmp_path / "data"
    service = Service(data, tmp_path / "home")
    try:
        await load(service, ledger, service.kill)
    finally:
        service.kill()
    journaled = b"".join(log.read_bytes() for log in (data / "journal").glob("*.log"))
    files = files_in(data)
    held = [files[raw_id] for raw_id, body in ledger.acknowledged.items() if body in journaled]
    for path in {path for [path] in CHANCE.sample(held, len(held) // 2)}:
        if CHANCE.random() < 0.5:
            path.unlink()
        else:
            os.truncate(path, CHANCE.randrange(path.stat().st_size))
    assert not_whole(data, ledger) > 0
    service = Service(data, tmp_path / "home")
    try:
        assert_whole(data, ledger)
        await assert_served(service, ledger)
    finally:
        service.kill()


# ── Slow clients ──────────────────────────────────────────────────────────────────────────────────


async def test_thousands_of_connections_that_send_nothing_much(tmp_path: Path):
    """Idle, half-headed and trickling connections stop nobody, and are closed when time is up."""
    source = program(tmp_path / "program", IDLE=6)
    beginnings = [
        b"",
        b"POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Le",
        b"POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{",
    ]
    limits = {"DROPZONE_SERVER_BODY_SECONDS": "6"}
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    service = Service(tmp_path / "data", tmp_path / "home", source, **limits)
    try:
        port = int(service.url.rpartition(":")[2])
        slow = []
        for number in range(SLOW_CONNECTIONS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(beginnings[number % len(beginnings)])
            slow.append((reader, writer))
        ledger = Ledger()
        async with aiohttp.ClientSession(service.url) as session:
            for _ in range(200):
                async with asyncio.timeout(1):
                    assert await ledger.post(session, [ledger.new_body()])
            endings = [await asyncio.wait_for(reader.read(), 30) for reader, _ in slow]
            assert await ledger.post(session, [ledger.new_body()])
        for _, writer in slow:
            writer.close()
        assert {ending[:12] for ending in endings} == {b"", b"HTTP/1.1 408"}
        assert endings.count(b"") == sum(b"{" not in beginning for beginning in beginnings) * (
            SLOW_CONNECTIONS // len(beginnings)
        )
        assert service.stop() == os.EX_OK
    finally:
        service.kill()
    assert_whole(tmp_path / "data", ledger)


# ── Killed programs ───────────────────────────────────────────────────────────────────────────────


async def test_kill_again_and_again(tmp_path: Path):
    """Of twenty runs that are killed under load nothing acknowledged is lost, and raw_ids go on."""
    data, ledger, greatest = tmp_path / "data", Ledger(), UUID(int=0)
    for number in range(20):
        service, run = Service(data, tmp_path / "home"), Ledger(sent=ledger.sent)
        try:
            await kill_under_load(service, run, number)
        finally:
            service.kill()
        assert min(run.acknowledged) > greatest
        greatest = max(run.acknowledged)
        ledger.acknowledged.update(run.acknowledged)
        ledger.keys.update(run.keys)
    service = Service(data, tmp_path / "home")
    try:
        assert_whole(data, ledger)
        await assert_served(service, ledger)
        assert service.stop() == os.EX_OK
    finally:
        service.kill()
    print(f"{len(ledger.acknowledged)} acknowledged in 20 runs, 0 lost")


async def test_told_to_stop_as_a_whole(tmp_path: Path):
    """SIGTERM for every process of the service at once, as systemd sends it, stops it in order."""
    data, ledger = tmp_path / "data", Ledger()
    service = Service(data, tmp_path / "home")
    try:
        async with aiohttp.ClientSession(service.url) as session:
            clients = [asyncio.create_task(keep_posting(session, ledger)) for _ in range(8)]
            await until(lambda: len(ledger.acknowledged) > 20 and service.writers())
            for writer in service.writers():
                os.kill(writer, signal.SIGTERM)
            more = len(ledger.acknowledged) + 200
            await until(lambda: len(ledger.acknowledged) > more)
            service.process.terminate()
            assert await asyncio.to_thread(service.process.wait, 20) == os.EX_OK
            ended = await asyncio.gather(*clients, return_exceptions=True)
        assert [error for error in ended if not isinstance(error, aiohttp.ClientError)] == []
    finally:
        service.kill()
    assert ledger.codes <= {"draining", "storage_unavailable"}  # of what another process looked at
    assert_whole(data, ledger)
    assert logs_in(data) == set()


async def kill_under_load(service: Service, ledger: Ledger, number: int) -> None:
    async with aiohttp.ClientSession(service.url) as session:
        clients = [asyncio.create_task(keep_posting(session, ledger)) for _ in range(8)]
        await until(lambda: len(ledger.acknowledged) > 20 and service.landing_writers())
        await asyncio.sleep(CHANCE.uniform(0, 0.2))
        if number % 3 == 2:  # the service goes on by itself
            [writer] = service.landing_writers()
            os.kill(writer, signal.SIGKILL)
            before = len(ledger.acknowledged)
            await until(lambda: len(ledger.acknowledged) > before + 50)
            await until(lambda: set(service.landing_writers()) - {writer})
            assert not any(client.done() for client in clients)
        service.kill(writers_first=number % 3 == 1)
        ended = await asyncio.gather(*clients, return_exceptions=True)
    assert [error for error in ended if not isinstance(error, aiohttp.ClientError)] == []


async def until(condition: Callable[[], object]) -> None:
    await asyncio.wait_for(_poll(condition), 20)


async def _poll(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


# ── Full disks ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("size", [1_000, 20_000])
async def test_disk_full(
    size: int, tmp_path: Path, record_property: Note, monkeypatch: pytest.MonkeyPatch
):
    """A full disk is refused with 503 and shown, reads go on, and landing when there is space."""
    if not may_mount(tmp_path):
        record_property("note", "NO REAL FULL DISK: mounting is not allowed here. Run it as root.")
        await refused_where_no_room_is_told(tmp_path, monkeypatch)
        return
    with mounted("none", tmp_path / "disk", "-t", "tmpfs", "-o", "size=24m") as where:
        spare = where / "spare"
        spare.write_bytes(bytes(20 << 20 if size == 1_000 else 8 << 20))
        service = Service(where / "data", tmp_path / "home")
        try:
            await fill_and_free(service, where / "data", spare, size)
        finally:
            service.kill()


async def refused_where_no_room_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next best form: the system says that the disk is full."""
    store, real = RawStore(folder / "raw"), os.statvfs(folder)
    await store.open()
    with monkeypatch.context() as told:
        full = os.statvfs_result((*real[:4], 0, *real[5:]))  # no block is free
        told.setattr(os, "statvfs", lambda _: full)
        with pytest.raises(StorageFull):
            await store.land(b"{}")
        assert store.trouble()
    [raw_id] = await store.land(b"{}")
    assert pending_in(store) == [raw_id]
    await store.close()


def alone(body: bytes) -> Arrival:
    return Arrival(body, None, "", "", 1)


BLOCK = 4096
DISK = (BLOCK, BLOCK, 1_000_000, 1_000_000)  # the sizes of its blocks, how many it has and has free
FULL = StorageFull.code
ONE = alone(b"1")
TEN = b"1" * (10 * BLOCK)  # needs ten blocks as a file, and ten in the journal
# A file, and two for each payload that may be rejected; needs three blocks, or less than another.
LINES = Arrival(b"\n".join([b"1" * 3] * 1000), None, "", "ndjson", 1000)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Return what lands a group on a disk of which the system tells how much is free.

    It returns, for each body, the code by which it was refused, or nothing.
    """

    def land(
        *arrivals: Arrival, blocks: int, files: int, others: Sequence[Need] = (), has: int = 10_000
    ) -> list[str]:
        free = os.statvfs_result((*DISK, blocks, has, files, files, 0, 255))
        store = RawStore(tmp_path / "raw", min_free_bytes=0)
        store.open_here()
        with monkeypatch.context() as patched:
            patched.setattr(os, "statvfs", lambda _: free)
            written = store.write(arrivals, others)
        store.close_here()
        landed = [raw_id for answer in written.answers for raw_id in answer.raw_ids]
        payloads = [a.payloads for a, w in zip(arrivals, written.answers, strict=True) if w.raw_ids]
        assert written.payloads == sum(payloads)
        assert {first_of(path.name) for path in store.raw.iterdir()} >= set(landed)
        return [answer.code for answer in written.answers]

    return land


@pytest.mark.parametrize(
    ("arrival", "blocks", "files", "code"),
    [
        (alone(TEN), 21, 100, ""),
        (alone(TEN), 20, 100, FULL),
        (alone(TEN), 15, 100, FULL),
        (alone(TEN + b"1"), 21, 100, FULL),
        (ONE, 2, 100, ""),
        (ONE, 1, 100, FULL),
        (LINES, 3, 3000, ""),
        (LINES, 2, 3000, FULL),
        (LINES, 3, 2001, ""),
        (LINES, 3, 2000, FULL),
        (ONE, 1100, 0, FULL),
    ],
)
def test_room_for_a_body(told: Told, arrival: Arrival, blocks: int, files: int, code: str):
    """A body needs its blocks as a file, its bytes in the journal, and an inode.

    Each payload of a batch may need two more: it may be rejected, for a reason.
    """
    assert told(arrival, blocks=blocks, files=files) == [code]


def test_files_that_a_disk_does_not_count(told: Told):
    """Where a file system makes inodes as they are needed, only bytes count."""
    assert told(LINES, blocks=3, files=0, has=0) == [""]


def test_room_for_the_others(told: Told):
    """A batch without room is refused alone; what is landed at the same time needs room, too."""
    others = [Need(1, 1)] * 1000
    assert told(LINES, ONE, LINES, ONE, blocks=5, files=9000) == ["", "", FULL, ""]
    assert told(LINES, ONE, blocks=1200, files=2001) == ["", FULL]
    assert told(LINES, ONE, blocks=1064, files=9000, others=others) == [FULL, ""]
    assert told(LINES, blocks=3000, files=3000, others=others) == [FULL]
    assert told(LINES, blocks=3000, files=3001, others=others) == [""]


class Attentive(RawStore):
    """A store that notes what else each group is told of."""

    others: ClassVar[list[list[Need]]] = []

    def write(self, group: Sequence[Arrival], others: Sequence[Need] = ()) -> Written:
        self.others.append(list(others))
        return super().write(group, others)


async def test_groups_know_of_each_other(tmp_path: Path):
    """A group that is landed beside another is told of its needs, and of none that are done."""
    store = Attentive(tmp_path / "raw")
    await store.open()
    batch = b"1\n" * (GROUP_BYTES // 2)
    await asyncio.gather(store.land(batch, None, "", "ndjson", 9), store.land(**lines(b"1")))
    await store.land(b"1")
    await store.close()
    assert store.others == [[], [Need(GROUP_BYTES, 19)], []]


def test_reserve_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files are kept in reserve as bytes are: a twentieth at most."""
    free = os.statvfs_result((*DISK, 900_000, 10_000, 501, 501, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    for reserve, most in ((2**40, 1), (2**20, 437)):
        taken = [Room(tmp_path, reserve).take([Need(1, count)]) for count in (most, most + 1)]
        assert taken == [True, False]


@pytest.mark.linux
async def test_disk_without_files(tmp_path: Path, record_property: Note):
    """Where the disk has no inodes for a batch, the batch is refused and the others land."""
    if not may_mount(tmp_path):
        record_property("note", "NO REAL DISK: mounting is not allowed here. Run it as root.")
        return
    with mounted("none", tmp_path / "disk", "-t", "tmpfs", "-o", "nr_inodes=500") as where:
        async with opened(where / "data") as store:
            batch = asyncio.create_task(store.land(LINES.body, None, "", "ndjson", 1000))
            ones = [asyncio.create_task(store.land(b"%d" % number)) for number in range(100)]
            with pytest.raises(StorageFull):
                await batch
            landed = [raw_id for each in ones for raw_id in await each]
            assert pending_in(store) == landed
            more = [store.land(b"1") for _ in range(400)]
            found = await asyncio.gather(*more, return_exceptions=True)
            assert {type(each) for each in found} == {list, StorageFull}
            assert store.trouble()
            assert "inodes" in store.problems()["data folder"][0]
            assert not list(store.raw.glob("*.part"))


async def fill_and_free(service: Service, data: Path, spare: Path, size: int) -> None:
    acknowledged: dict[str, bytes] = {}
    async with aiohttp.ClientSession(service.url) as session:

        async def post(size: int) -> tuple[int, str]:
            body = b"[%d%s]" % (len(acknowledged), b" " * size)
            async with session.post("/ingest", data=body) as answer:
                said = await answer.json()
                if answer.status == 202:
                    acknowledged[said["raw_id"]] = body
                return answer.status, said.get("code", "")

        async def ready() -> int:
            async with session.get("/ready") as answer:
                return answer.status

        for length in (size, 0):  # to the last page
            refused = 0
            while refused < 20:  # the first make it empty its journal
                status, code = await post(length)
                assert (status, code) in {(202, ""), (503, "storage_full")}
                refused = refused + 1 if status == 503 else 0
                await asyncio.sleep(0.02 * (status == 503))
        for raw_id in list(acknowledged)[-20:]:
            async with session.get(f"/raw/{raw_id}/payload") as answer:
                assert await answer.read() == acknowledged[raw_id]
        shown = await ready()
        spare.unlink()
        assert [await post(size) for _ in range(10)] == [(202, "")] * 10
        assert await ready() == 200
    assert service.stop() == os.EX_OK
    files = {str(raw_id): path.read_bytes() for raw_id, [path] in files_in(data).items()}
    assert files == acknowledged, "a refused payload is there, or an acknowledged one is not"
    assert shown == 503, "/ready did not say that the disk was full"


# ── Failing disks ─────────────────────────────────────────────────────────────────────────────────


class Calls:
    """The system calls of a module's functions, of which the next few fail on purpose."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.done: list[tuple[str, str, bytes]] = []  # the call, the file, what was written
        self._left: dict[str, list[int]] = {}  # errors, the last first; 0 for none
        for name in ("fdatasync", "fsync", "rename", "write", "lseek"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def fail(self, name: str, number: int, times: int = 1) -> None:
        self._left[name] = [number] * times

    def skip(self, name: str, times: int) -> None:
        """Let some calls succeed before those that fail."""
        self._left[name] += [0] * times

    def _wrapped(self, name: str, call: Callable[..., object]) -> Callable[..., object]:
        def wrapped(first: object, *others: object) -> object:
            file = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else str(first)
            if not ("/journal" in file or "/raw" in file):
                return call(first, *others)
            left = self._left.get(name)
            if left and (number := left.pop()):
                self.done.append((f"{name} failed", file, b""))
                raise OSError(number, os.strerror(number))
            result = call(first, *others)
            self.done.append((name, file, bytes(others[0]) if name == "write" else b""))
            return result

        return wrapped

    def synced(self, body: bytes) -> bool:
        """Say whether a finished sync of a log follows the write of a payload to it."""
        return any(
            name == "write"
            and file.endswith(".log")
            and body in data
            and ("fdatasync", file, b"") in self.done[at:]
            for at, (name, file, data) in enumerate(self.done)
        )

    def written_after_a_failed_sync(self) -> list[str]:
        failed = {}
        for at, (name, file, _) in enumerate(self.done):
            if name in {"fdatasync failed", "fsync failed"}:
                failed.setdefault(file, at)
        return [
            file
            for at, (name, file, _) in enumerate(self.done)
            if name == "write" and file.endswith(".log") and at > failed.get(file, at)
        ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


ERRORS = [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EMFILE]


@pytest.mark.linux
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["fdatasync", "fsync", "rename", "write"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
async def test_failing_calls(name: str, number: int, first: bool, tmp_path: Path, calls: Calls):
    """What the disk refuses is refused, nothing of it stays, and landing goes on afterwards."""
    kind = StorageFull if number == errno.ENOSPC else StorageUnavailable
    landed: dict[UUID, bytes] = {}
    async with opened(tmp_path) as store:
        if not first:
            landed[(await store.land(b"before"))[0]] = b"before"
        if name == "fsync" and not first:
            store._journal.end_log()  # noqa: SLF001 (a new log is what an fsync is for)
        tries = 1 if name == "fsync" and not first else 2  # then the old log is there again
        calls.fail(name, number, tries)
        for _ in range(tries):
            with pytest.raises(kind) as caught:
                await store.land(**lines(b"refused", b"refused, too"), key="a key")
            assert type(caught.value) is kind
        raw_ids = await store.land(**lines(b"refused", b"refused, too"), key="a key")
        landed.update(zip(raw_ids, [b"refused", b"refused, too"], strict=True))
        landed[(await store.land(b"after"))[0]] = b"after"
        assert store.trouble() is None
        assert all_pending_in(store) == landed

    assert calls.written_after_a_failed_sync() == []
    async with opened(tmp_path) as store:
        assert all_pending_in(store) == landed


@pytest.mark.linux
@pytest.mark.parametrize("name", ["fsync", "rename"])
async def test_trouble(name: str, tmp_path: Path, calls: Calls):
    """A disk that refuses is in the way of landing for as long as it does."""
    async with opened(tmp_path) as store:
        calls.fail(name, errno.EROFS)
        assert "Read-only" in str(store.trouble())
        assert store.trouble() is None


@pytest.mark.linux
@pytest.mark.parametrize("key", [None, "a key"])
async def test_all_or_none(key: str | None, tmp_path: Path, calls: Calls):
    """Of a group of which one file cannot be written nothing is left behind, nor brought back."""
    bodies = lines(b"1", b"2", b"3", b"4")
    async with opened(tmp_path) as store:
        [before] = await store.land(b"before")
        calls.fail("rename", errno.ENOSPC)
        calls.skip("rename", 2)
        beside = [store.land(b"beside"), store.land(b"it")]
        group = (*beside, store.land(**bodies, key=key), store.land(b"last"))
        refused = await asyncio.gather(*group, return_exceptions=True)
        assert {type(each) for each in refused} == {StorageFull}
        assert pending_in(store) == [before]
    async with opened(tmp_path) as store:
        assert pending_in(store) == [before]
        again = await store.land(**bodies, key=key)
        assert [store.read(raw_id)[1] for raw_id in again] == [b"1", b"2", b"3", b"4"]
        assert list(all_pending_in(store)) == [before, *again]


REFUSE = """CREATE TRIGGER refuse BEFORE INSERT ON keys
WHEN NEW.landed AND NEW.key = 'b'
OR NOT NEW.landed AND EXISTS (SELECT 1 FROM keys WHERE key = NEW.key AND landed)
BEGIN SELECT RAISE({}, 'disk full'); END"""


@pytest.mark.parametrize("how", ["ABORT", "ROLLBACK"])
async def test_a_key_that_cannot_be_noted(how: str, tmp_path: Path):
    """Where one key of a group cannot be noted none of them has landed, and each retry lands."""
    async with opened(tmp_path) as store:
        keys = sqlite3.connect(tmp_path / "journal" / "keys.sqlite")
        keys.execute(REFUSE.format(how))
        calls = (store.land(b"1", "a"), store.land(b"2", "b"))
        refused = await asyncio.gather(*calls, return_exceptions=True)
        assert {type(each) for each in refused} == {StorageUnavailable}
        assert pending_in(store) == []
        keys.execute("DROP TRIGGER refuse")
        keys.close()
        [one], [other] = await store.land(b"1", "a"), await store.land(b"2", "b")
        assert store.read(one) == ("pending", b"1")
        assert store.read(other) == ("pending", b"2")
    async with opened(tmp_path) as store:
        assert pending_in(store) == [one, other]


async def test_a_log_that_cannot_be_filled_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where a disk takes but a part of what a log is to be longer by, the group is refused."""
    real = os.pwrite

    def write_half(descriptor: int, data: bytes, offset: int) -> int:
        return real(descriptor, data[: max(100, len(data) // 2)], offset)

    async with opened(tmp_path) as store:
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", write_half)
            with pytest.raises(StorageFull):
                await store.land(BODY)
        [raw_id] = await store.land(BODY)
        assert pending_in(store) == [raw_id]


@pytest.mark.linux
async def test_no_raw_id_before_the_sync(tmp_path: Path, calls: Calls):
    """Whoever has a raw_id has it after a finished sync of a log that holds the payload."""
    landed, refused = {}, 0
    async with opened(tmp_path) as store:
        for number in range(100):
            calls.fail("fdatasync", errno.EIO, times=number % 3 == 0)
            body = b"payload %d of many" % number
            try:
                [raw_id] = await store.land(body)
            except StorageUnavailable:
                refused += 1
            else:
                assert calls.synced(body)
                landed[raw_id] = body
        assert refused == 34
        assert calls.written_after_a_failed_sync() == []
        assert {raw_id: store.read(raw_id)[1] for raw_id in pending_in(store)} == landed


@pytest.mark.linux
@pytest.mark.parametrize("name", ["fdatasync", "lseek"])
async def test_a_group_that_cannot_be_taken_back(name: str, tmp_path: Path, calls: Calls):
    """A log that could not be cut after a failure is not appended to again."""
    async with opened(tmp_path) as store:
        await store.land(b"before")
        [log] = logs_in(tmp_path)
        calls.fail("rename", errno.EIO)
        seek = os.lseek

        def seek_and_fail(descriptor: int, *place: int) -> int:
            if name == "lseek":
                raise OSError(errno.EIO, "no")
            calls.fail("fdatasync", errno.EIO)
            return seek(descriptor, *place)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "lseek", seek_and_fail)
            with pytest.raises(StorageUnavailable):
                await store.land(b"refused")
        seen = len(calls.done)
        [raw_id] = await store.land(b"after")
        assert store.read(raw_id) == ("pending", b"after")
        assert not [
            call for call in calls.done[seen:] if call[0] == "write" and call[1].endswith(log)
        ]


@pytest.mark.linux
async def test_failing_again_and_again(tmp_path: Path, calls: Calls):
    """A disk that fails for hours takes no descriptors and leaves no files behind."""
    async with opened(tmp_path) as store:
        calls.fail("fsync", errno.EIO, times=30)
        for number in range(30):
            with pytest.raises(StorageUnavailable):
                await store.land(BODY)
            if number == 9:
                before = len(os.listdir("/proc/self/fd")), len(os.listdir(tmp_path / "journal"))
        after = len(os.listdir("/proc/self/fd")), len(os.listdir(tmp_path / "journal"))
        await store.land(BODY)
    assert after <= before, f"descriptors, files: {before} after 10 failures, {after} after 30"


# ── Failing checkpoints ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def sync_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Make the sync of a whole file system fail while the event is set; end each log at once."""
    fails, sync = threading.Event(), journal.sync_file_system

    def failing(folder: Path) -> None:
        if fails.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(folder)

    monkeypatch.setattr(journal, "sync_file_system", failing)
    monkeypatch.setattr(journal, "LOG_BYTES", 1)
    return fails


async def test_failing_checkpoint(tmp_path: Path, sync_fails: threading.Event):
    """Without a sync no log is deleted; landing stops when too many wait, until it works again."""
    landed = {}
    async with opened(tmp_path) as store:
        sync_fails.set()
        with suppress(StorageUnavailable):
            for number in range(20):
                body = b"%d" % number
                landed[(await store.land(body))[0]] = body
        assert len(logs_in(tmp_path)) == len(landed) <= journal.FULL_LOGS + 2
        with pytest.raises(StorageUnavailable):
            await store.land(BODY)
        journaled = b"".join(log.read_bytes() for log in (tmp_path / "journal").glob("*.log"))
        assert all(
            raw_id.bytes in journaled or str(raw_id).encode() in journaled for raw_id in landed
        )

        sync_fails.clear()
        for _ in range(50):
            with suppress(StorageUnavailable):
                landed[(await store.land(BODY))[0]] = BODY
                break
            await asyncio.sleep(0.02)
        assert {raw_id: store.read(raw_id)[1] for raw_id in pending_in(store)} == landed
    assert logs_in(tmp_path) == set()


async def test_failing_checkpoint_of_what_is_settled(tmp_path: Path, sync_fails: threading.Event):
    """After a failed sync files that look right are written again, too, and where they lie now."""
    async with opened(tmp_path) as store:
        sync_fails.set()
        [good] = await store.land(b"1")
        await asyncio.sleep(0.1)
        store.settle(names_of(good), [])
        lost = tmp_path / "lost"
        os.link(store.path(good, "processed"), lost)  # so that no other file becomes this one
        with suppress(StorageUnavailable):
            for _ in range(5):
                await store.land(b"more")
        [path] = files_in(tmp_path)[good]
        assert path == store.path(good, "processed")
        assert not path.samefile(lost), "what the system shows may never reach the disk"
        sync_fails.clear()


# ── Clocks ────────────────────────────────────────────────────────────────────────────────────────

FUTURE = UUID("0c5a7b8a-bfff-7fff-8000-000000000000")  # of the year 2400
LAND = """
import asyncio, os, signal, sys
from datetime import UTC, datetime
from pathlib import Path
from backends.raw import Rejection, journal
from backends.raw.landing import RawStore

async def main(folder, count, end, log_bytes):
    journal.LOG_BYTES = int(log_bytes)
    store = RawStore(Path(folder) / "raw")
    await store.open()
    landed = []
    for number in range(int(count)):
        landed += await store.land(b"%d" % number)
        print(landed[-1], flush=True)
    if end == "settled":
        reason = Rejection(landed[1], "code", "detail", datetime.now(UTC))
        store.settle([f"{landed[0]}.json"], [reason])
    if end == "wait":
        sys.stdin.read()
    if end != "close":
        os.kill(os.getpid(), signal.SIGKILL)
    await store.close()

asyncio.run(main(*sys.argv[1:]))
"""


@contextmanager
def landing(
    folder: Path, count: int, end: str, log_bytes: int = journal.LOG_BYTES
) -> Iterator[subprocess.Popen[str]]:
    """Run a program that lands payloads: "0", "1" and so on, and prints their raw_ids."""
    command = [sys.executable, "-c", LAND, *map(str, (folder, count, end, log_bytes))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPO, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def landed_and_killed(folder: Path, count: int, end: str = "kill") -> list[UUID]:
    with landing(folder, count, end) as process:
        out, _ = process.communicate(timeout=30)
    assert process.returncode == (0 if end == "close" else -signal.SIGKILL)
    return list(map(UUID, out.split()))


def assert_increasing(raw_ids: list[UUID]) -> None:
    assert all(one < following for one, following in pairwise(raw_ids))


async def test_clock_set_back_between_runs(tmp_path: Path):
    """The counter alone, on an empty folder, keeps raw_ids increasing after the clock was set."""
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "last_raw_id").write_bytes(FUTURE.bytes)
    raw_ids = [FUTURE, *landed_and_killed(tmp_path, 3), *landed_and_killed(tmp_path, 3, "close")]
    async with opened(tmp_path) as store:
        raw_ids += await land_each(store, [BODY] * 100)
    assert_increasing(raw_ids)


@pytest.mark.parametrize("counter", [b"", b"torn", None])
async def test_a_counter_that_is_torn(counter: bytes | None, tmp_path: Path):
    """Without its counter the store goes on after the greatest raw_id in the folders and logs."""
    future = tmp_path / "raw" / f"{FUTURE}.json"
    future.parent.mkdir()
    future.write_bytes(BODY)
    before = landed_and_killed(tmp_path, 2)
    file = tmp_path / "journal" / "last_raw_id"
    for path in (tmp_path / "raw").iterdir():
        path.unlink()
    file.unlink()
    if counter is not None:
        file.write_bytes(counter)
    async with opened(tmp_path) as store:
        assert pending_in(store) == before
        assert_increasing([FUTURE, *before, *(await land_each(store, [BODY] * 2))])


async def test_clock_set_back_during_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A clock that is set back while the store is open does not show in its raw_ids."""
    async with opened(tmp_path) as store:
        raw_ids = await land_each(store, [BODY] * 3)
        monkeypatch.setattr(raw.raw_ids.time, "time_ns", lambda: 10**18)  # in the year 2001
        for _ in range(5):
            raw_ids += await land_each(store, [BODY] * 3)
    assert_increasing(raw_ids)


def test_raw_ids_are_given_out_in_turn(tmp_path: Path):
    """While one store gives out raw_ids another waits, and then goes on behind them."""
    for name in ("raw", "processed", "rejected", "journal"):
        (tmp_path / name).mkdir()
    journals = [Journal(tmp_path / "journal", Folders(tmp_path / "raw")) for _ in range(2)]
    one, other = journals
    given = list[UUID]()

    def take() -> None:
        with other.counting() as next_id:
            given.append(next_id(0))

    for each in journals:
        each.open()
    taking = threading.Thread(target=take)
    with one.counting() as next_id:
        taking.start()
        taking.join(0.3)
        assert given == []
        last = next_id(3)
    taking.join(30)
    assert given[0] > last
    for each in journals:
        each.close()


async def test_two_processes_with_a_clock_set_back(tmp_path: Path):
    """Two processes that land at once on one folder share no raw_id; those of each increase."""
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "last_raw_id").write_bytes(FUTURE.bytes)
    with landing(tmp_path, 300, "close") as one, landing(tmp_path, 300, "close") as other:
        outs = await asyncio.gather(
            *(asyncio.to_thread(process.communicate, timeout=30) for process in (one, other))
        )
    sequences = [list(map(UUID, out.split())) for out, _ in outs]
    for raw_ids in sequences:
        assert_increasing([FUTURE, *raw_ids])
    assert len({raw_id for raw_ids in sequences for raw_id in raw_ids}) == 600
    assert len(files_in(tmp_path)) == 600


OPEN = """
import sys
from pathlib import Path
from backends.raw.landing import RawStore

print("ready", flush=True)
for line in sys.stdin:
    store = RawStore(Path(line.strip()) / "raw")
    store.open_here()
    print("open", flush=True)
    store.close_here()
"""


def test_many_processes_open_an_empty_folder(tmp_path: Path):
    """Processes that are started at once, as the workers of a server, all open the store."""
    command, pipe = [sys.executable, "-c", OPEN], subprocess.PIPE
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(command, cwd=REPO, stdin=pipe, stdout=pipe, text=True, bufsize=1)
            )
            for _ in range(4)
        ]
        assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
        for number in range(60):
            for process in processes:
                process.stdin.write(f"{tmp_path / str(number)}\n")
            assert [process.stdout.readline() for process in processes] == ["open\n"] * 4


# ── Recovery ──────────────────────────────────────────────────────────────────────────────────────


def mangle(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "zeros": b"\0", "longer": b"012345"}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "zeros", "longer"])
async def test_recover(how: str, tmp_path: Path):
    """Missing, empty and different files are written again from the journal; twice is as once."""
    raw_ids = landed_and_killed(tmp_path, 5)
    for raw_id in raw_ids[1:4]:
        mangle(tmp_path / "raw" / f"{raw_id}.json", how)
    for _ in range(3):
        async with opened(tmp_path) as store:
            assert [store.read(raw_id)[1] for raw_id in raw_ids] == [b"0", b"1", b"2", b"3", b"4"]
            assert pending_in(store) == raw_ids
            assert logs_in(tmp_path) == set()


@pytest.mark.parametrize("how", [None, "empty", "zeros", "longer"])
async def test_recover_what_is_settled(how: str | None, tmp_path: Path):
    """Processed and rejected payloads are not brought back, but made whole where they lie now."""
    raw_ids = landed_and_killed(tmp_path, 3, "settled")
    before = files_in(tmp_path)
    for [path] in before.values():
        if how:
            mangle(path, how)
    async with opened(tmp_path) as store:
        states = [store.read(raw_id) for raw_id in raw_ids]
    assert states == [("processed", b"0"), ("rejected", b"1"), ("pending", b"2")]
    assert files_in(tmp_path) == before


def records_in(data: bytes) -> list[tuple[int, int]]:
    """Return where the records of a new log begin and end, that of no payloads among them."""
    found, at = list[tuple[int, int]](), 0
    first, _, _ = HEAD.unpack_from(data)
    while HEAD.unpack_from(data, at)[0] == first:
        _, length, _ = HEAD.unpack_from(data, at)
        found.append((at, at + HEAD.size + length))
        at += HEAD.size + length
    return found


@pytest.mark.parametrize("tail", ["head", "half", "garbage", "zeros", "checksum"])
async def test_recover_a_torn_record(tail: str, tmp_path: Path):
    """A torn record at the end of a log is ignored, and what stands before it is recovered."""
    raw_ids = landed_and_killed(tmp_path, 3)
    [log] = (tmp_path / "journal").glob("*.log")
    whole = log.read_bytes()
    begin, end = records_in(whole)[-1]
    record = whole[begin:end]
    torn = {
        "head": record[:5],
        "half": record[: len(record) // 2],
        "garbage": os.urandom(4096),
        "zeros": bytes(4096),
        "checksum": record[:-1] + bytes([record[-1] ^ 1]),
    }[tail]
    log.write_bytes(whole[:end] + torn + whole[end + len(torn) :])
    for path in (tmp_path / "raw").iterdir():
        path.unlink()
    async with opened(tmp_path) as store:
        assert [store.read(raw_id)[1] for raw_id in raw_ids] == [b"0", b"1", b"2"]
        assert pending_in(store) == raw_ids


async def test_recover_beside_a_running_process(tmp_path: Path):
    """The log of a process that lives is left alone, and recovered when it has died."""
    with landing(tmp_path, 3, "wait") as process:
        assert process.stdout is not None
        raw_ids = [UUID(process.stdout.readline().strip()) for _ in range(3)]
        held = logs_in(tmp_path)
        async with opened(tmp_path) as store:
            await store.land(BODY)
            assert len(logs_in(tmp_path) - held) == 1
        assert logs_in(tmp_path) == held
    for raw_id in raw_ids:
        (tmp_path / "raw" / f"{raw_id}.json").unlink()
    async with opened(tmp_path) as store:
        assert [store.read(raw_id)[1] for raw_id in raw_ids] == [b"0", b"1", b"2"]
    assert logs_in(tmp_path) == set()


@settings(deadline=None)
@given(
    rounds=st.lists(st.lists(st.binary(max_size=300), max_size=4), min_size=1, max_size=4),
    cut=st.booleans(),
)
def test_a_log_that_is_used_again(rounds: list[list[bytes]], *, cut: bool):
    """Of a log that is overwritten, the records of this time are read, and no older one."""
    with TemporaryDirectory() as folder:
        log = Log.create(Path(folder))
        for bodies in rounds:
            log.begin_anew()
            records = [Record([Entry(UUID(int=n), body)], []) for n, body in enumerate(bodies)]
            for record in records:
                log.append(record)
            if cut:
                size = log.size
                log.append(Record([Entry(UUID(int=9), b"taken back")], []))
                log.cut(size)
            assert list(log.records()) == records
        log.close()
        [left] = Log.left_in(Path(folder))
        assert list(left.records()) == records
        assert left.contents.gaps == []
        left.remove()


async def test_logs_are_used_again(tmp_path: Path):
    """A log goes round: what was in it before its checkpoint is not brought back by a recovery."""
    with landing(tmp_path, 42, "wait", 300) as process:
        assert process.stdout is not None
        raw_ids = [UUID(process.stdout.readline().strip()) for _ in range(42)]
        logs = logs_in(tmp_path)
    held = [raw_id for raw_id in raw_ids if _in_a_record(tmp_path, raw_id)]
    assert len(logs) <= 4
    assert held
    assert len(held) < len(raw_ids)
    for raw_id in raw_ids:
        (tmp_path / "raw" / f"{raw_id}.json").unlink()
    async with opened(tmp_path) as store:
        assert pending_in(store) == held


def _in_a_record(folder: Path, wanted: UUID) -> bool:
    logs = list(Log.left_in(folder / "journal"))
    found = {each.raw_id for log in logs for record in log.records() for each in record.entries}
    for log in logs:
        log.close()
    return wanted in found
