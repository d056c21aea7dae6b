"""Packs: finished days of processed payloads in one file each, which any tool reads."""

import asyncio
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import psutil
import pytest
import test_processing
from hypothesis import example, given, settings
from hypothesis import strategies as st
from power_cut import CHANCE, state_of, wait_for
from stores import land_each, names_of
from test_cli import OK, TRY_AGAIN, Program, Server, assert_explained
from test_processing import Folder, arrival, body

import dropzone
from backends.raw import RawIdUnknown, Rejection, StorageUnavailable, packs, uuid_at
from backends.raw.folders import Folders
from backends.raw.journal import Entry, Log, Record
from backends.raw.packs import Pack

folder, program = test_processing.folder, test_processing.program  # fixtures
LEAP_DAY, DAY = "2024-02-29", "2024-03-01"  # of the first two arrivals, and of the others
ODD = [
    b"",
    b"\xef\xbb\xbf{}",
    b"[NaN, Infinity, -Infinity]",
    b'{"a": 1}\r\n\r\n',
    b"\n\r\n\r\x0b\x0c\x1c\x85",
    b"\xe2\x80\xa8\xc2\x85",
    b"\xff\xfe\x00",
    b"\xed\xa0\x80",
    b'\\u0000 \x00 \\ud800 "',
    b"null",
]


def processed_in(place: Path, bodies: Sequence[bytes], first: int = 0) -> dict[UUID, bytes]:
    """Lay processed payloads into the folders of the days of their arrival."""
    payloads = {arrival(first + number): each for number, each in enumerate(bodies)}
    for raw_id, each in payloads.items():
        file = Folders(place / "raw").path(raw_id, "processed")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(each)
    return payloads


def after(raw_id: UUID) -> UUID:
    """Return a raw_id of the same moment that nobody was given."""
    return UUID(int=raw_id.int + 1)


def compact(folders: Folders) -> int:
    """Pack every finished day; return how many payloads there were."""
    return sum(map(folders.compact, folders.finished_days()))


def found(folders: Folders, raw_id: UUID) -> bytes | None:
    """Return a payload, None where it is not there."""
    with suppress(RawIdUnknown):
        return folders.read(raw_id)[1]
    return None


def all_of(folders: Folders, payloads: dict[UUID, bytes]) -> dict[UUID, bytes]:
    """Return what the folders give for payloads that are processed."""
    found = {raw_id: folders.read(raw_id) for raw_id in payloads}
    assert {state for state, _ in found.values()} <= {"processed"}
    return {raw_id: each for raw_id, (_, each) in found.items()}


def lines_of(pack: Path) -> list[dict[str, str]]:
    with gzip.open(pack) as lines:
        return [json.loads(line) for line in lines]


def copies(place: Path) -> Counter[UUID]:
    """Return how often each payload lies in a folder or in a pack, however one looks at it."""
    files = (place / "processed").glob("*/*.json")
    packs = (place / "processed").glob("*.ndjson.gz")
    packed = (UUID(line["raw_id"]) for pack in packs for line in lines_of(pack))
    return Counter([UUID(file.stem) for file in files]) + Counter(packed)


def once(payloads: Iterable[UUID]) -> Counter[UUID]:
    return Counter(list(payloads))


# ── What a pack is ────────────────────────────────────────────────────────────────────────────────


def test_compact(folder: Folder, program: Program):
    """`compact` makes a finished day one file that gzip and any JSON reader understand."""
    raw_ids = folder.fill(7, lambda number: b"bad" if number == 6 else body(number))
    program.run("process")
    done = program.run("compact")
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout == f"{LEAP_DAY}: 2 payloads packed\n{DAY}: 4 payloads packed\n"
    pack = folder.place / "processed" / f"{DAY}.ndjson.gz"
    subprocess.run(["gzip", "--test", pack], check=True)
    text = subprocess.run(["gzip", "-dc", pack], check=True, capture_output=True).stdout
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == [
        {
            "raw_id": str(raw_ids[number]),
            "sha256": hashlib.sha256(body(number)).hexdigest(),
            "payload": body(number).decode(),
        }
        for number in range(2, 6)
    ]
    index = json.loads(Path(f"{pack}.index").read_bytes())
    assert index["sha256"] == hashlib.sha256(pack.read_bytes()).hexdigest()
    assert (index["payloads"], index["bytes"]) == (4, pack.stat().st_size)
    names = {f"{day}.ndjson.gz{end}" for day in (LEAP_DAY, DAY) for end in ("", ".index")}
    assert set(os.listdir(folder.place / "processed")) == names
    assert folder.states() == {"rejected": 1}


def test_compact_again(folder: Folder, program: Program):
    """A second `compact` finds nothing to do, says so and changes nothing."""
    processed_in(folder.place, [body()] * 3)
    program.run("compact")
    before = {file: file.stat() for file in (folder.place / "processed").iterdir()}
    done = program.run("compact")
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout.startswith("nothing to do: ")
    assert {file: file.stat() for file in (folder.place / "processed").iterdir()} == before


@settings(max_examples=80, deadline=None)
@given(st.lists(st.binary(max_size=300) | st.text(max_size=99).map(str.encode)), st.integers(1, 99))
@example(ODD, 1)
@example(ODD, 1 << 18)
@example([os.urandom(3_000_000), b"[" + b"0," * 1_500_000 + b"0]", b"", os.urandom(3_000_000)], 9)
def test_exact_bytes(bodies: list[bytes], member_bytes: int):
    """Whatever the bytes and their order, a pack gives back each payload as it arrived."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "MEMBER_BYTES", member_bytes)
        (Path(name) / "processed").mkdir()
        payloads = processed_in(Path(name), bodies)
        folders = Folders(Path(name) / "raw")
        assert compact(folders) == len(bodies)
        assert not list(Path(name).glob("processed/*/"))
        assert all_of(folders, payloads) == payloads
        assert copies(Path(name)) == once(payloads)
        for unknown in (arrival(-1), arrival(len(bodies)), after(arrival(0))):
            with pytest.raises(RawIdUnknown):
                folders.read(unknown)


def test_bytes_that_are_no_text(folder: Folder):
    """A payload that is no UTF-8 stands in base64 in its line, next to its raw_id and sha256."""
    [raw_id] = processed_in(folder.place, [b"\xff\x00"])
    compact(folder.store)
    [line] = lines_of(folder.place / "processed" / f"{LEAP_DAY}.ndjson.gz")
    digest = hashlib.sha256(b"\xff\x00").hexdigest()
    assert line == {"raw_id": str(raw_id), "sha256": digest, "base64": "/wA="}


def test_served_from_a_pack(folder: Folder, program: Program):
    """A running server gives the same receipts and payloads before and after its days are packed.

    A raw_id that nobody was given is 404, also on a day that is packed.
    """
    raw_ids = folder.fill(6, lambda number: body(number // 2, number))
    server = Server(program)
    server.json("POST", "/process")
    paths = [f"/raw/{raw_id}{tail}" for raw_id in raw_ids for tail in ("", "/payload")]
    before = [server.json("GET", path) for path in paths]
    assert {receipt["state"] for receipt in before[::2]} == {"processed"}
    assert program.run("compact").returncode == OK
    assert folder.states() == {}
    assert [server.json("GET", path) for path in paths] == before
    assert server.request("GET", f"{paths[1]}")[2] == body(0, 0)
    for unknown in (arrival(6), UUID(int=raw_ids[0].int + 2**16)):
        for tail in ("", "/payload"):
            status, _, answer = server.request("GET", f"/raw/{unknown}{tail}")
            assert (status, json.loads(answer)["code"]) == (404, "raw_id_unknown")
    assert server.stop() == OK


async def test_today_is_not_packed(folder: Folder):
    """A day that is not over (UTC) is left alone, and so is one that has not begun."""
    raw_ids = await land_each(folder.store, [body(0), body(1)])
    tomorrow = uuid_at(datetime.now(UTC) + timedelta(days=1))
    folder.put(tomorrow, body(2))
    folder.store.settle(names_of(*raw_ids, tomorrow), [])
    assert folder.store.finished_days() == []
    assert folder.names("processed") == [*raw_ids, tomorrow]
    await folder.store.close()


def test_late_payloads(folder: Folder):
    """What arrives in the folder of a packed day goes to a further pack; the first one stays."""
    payloads = processed_in(folder.place, [body(number) for number in range(5)])
    compact(folder.store)
    first = (folder.place / "processed" / f"{DAY}.ndjson.gz").read_bytes()
    for number in (2, 3):
        payloads |= processed_in(folder.place, [body(9, number)] * 2, 100 * number)
        assert folder.store.compact(DAY) == 2
        pack = folder.place / "processed" / f"{DAY}.{number}.ndjson.gz"
        assert len(lines_of(pack)) == 2
    assert (folder.place / "processed" / f"{DAY}.ndjson.gz").read_bytes() == first
    assert all_of(folder.store, payloads) == payloads
    assert folder.store.count_processed() == len(payloads)
    assert len(folder.store.packs(DAY)) == 3


def test_foreign_files_stay(folder: Folder):
    """What is no payload of the day stays in its folder, and the payloads are packed."""
    payloads = processed_in(folder.place, [body(number) for number in range(4)])
    foreign = [
        "notes.txt",
        f"{arrival(3)}.reason.json",
        f"{str(arrival(3)).upper()}.json",
        f"{arrival(0)}.json",  # of the day before
        "11111111-1111-4111-8111-111111111111.json",
    ]
    for name in foreign:
        (folder.place / "processed" / DAY / name).write_bytes(b"mine")
    (folder.place / "processed" / DAY / "kept" / "here").mkdir(parents=True)
    for _ in range(2):
        compact(folder.store)
        assert sorted(os.listdir(folder.place / "processed" / DAY)) == sorted([*foreign, "kept"])
        assert len(folder.store.packs()) == 2
        assert all_of(folder.store, payloads) == payloads


def test_two_compacts_at_once(folder: Folder, program: Program):
    """A second `compact` is told that one is at work, exit code 75; the first goes on."""
    payloads = processed_in(folder.place, [body()] * 2000)
    first = program.start("compact")
    wait_for(lambda: list((folder.place / "processed").glob("*.part")) or first.poll())
    first.send_signal(signal.SIGSTOP)
    wait_for(lambda: state_of(first.pid) == psutil.STATUS_STOPPED)
    second = program.run("compact")
    assert (second.returncode, second.stdout) == (TRY_AGAIN, "")
    assert "upkeep.lock is held by another run" in second.stderr
    assert_explained(second.stderr)
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate()
    assert first.returncode == OK, err
    assert copies(folder.place) == once(payloads)


async def test_read_while_it_is_packed(folder: Folder):
    """A payload can be read at any moment while its day is packed."""
    payloads = processed_in(folder.place, [body(number) for number in range(300)])
    packing = asyncio.create_task(asyncio.to_thread(compact, folder.store))
    while not packing.done():
        assert await asyncio.to_thread(all_of, folder.store, payloads) == payloads
    assert packing.result() == 300


# ── One member is enough ──────────────────────────────────────────────────────────────────────────


@pytest.mark.linux
def test_a_look_up_reads_one_member(folder: Folder):
    """Looking up a payload, or one that is not there, reads one member of a pack of many."""
    payloads = processed_in(folder.place, [os.urandom(60_000) for _ in range(102)])
    compact(folder.store)
    [pack] = folder.store.packs(DAY)
    assert pack.path.stat().st_size > 16 * packs.MEMBER_BYTES
    for raw_id in (arrival(50), after(arrival(70))):
        before = bytes_read()
        assert found(folder.store, raw_id) == payloads.get(raw_id)
        assert bytes_read() - before < 2 * packs.MEMBER_BYTES


def bytes_read() -> int:
    """Return how many bytes this process has read from files so far."""
    [count] = [line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line]
    return int(count.split()[1])


def test_damaged_members(folder: Folder, program: Program, monkeypatch: pytest.MonkeyPatch):
    """Damage costs the payloads of its own member alone; for those the answer names the pack."""
    monkeypatch.setattr(packs, "MEMBER_BYTES", 1)
    payloads = processed_in(folder.place, [body(number) for number in range(2, 12)], 2)
    compact(folder.store)
    [pack] = folder.store.packs()
    [*starts, end] = [start for _, start in pack.index().members] + [pack.index().bytes]
    text = bytearray(pack.path.read_bytes())
    for number, start in enumerate(starts):
        if number != 7:
            text[start : start + 40] = os.urandom(40)
    pack.path.write_bytes(text)
    os.truncate(pack.path, end - 5)
    server = Server(program)
    for number, (raw_id, each) in enumerate(payloads.items()):
        status, _, answer = server.request("GET", f"/raw/{raw_id}/payload")
        if number == 7:
            assert (status, answer) == (200, each)
        else:
            assert (status, json.loads(answer)["code"]) == (503, "storage_unavailable")
            assert pack.path.name in json.loads(answer)["detail"]
    assert server.stop() == OK


def test_a_lost_index_keeps_nobody_from_landing(folder: Folder, program: Program):
    """A server starts and lands where a pack has lost its index and nothing was counted yet."""
    processed_in(folder.place, [body(2)], 2)
    compact(folder.store)
    [pack] = folder.store.packs()
    Path(f"{pack.path}.index").unlink()
    (folder.store.journal / "tally").unlink(missing_ok=True)
    server = Server(program)
    assert server.json("POST", "/ingest", body(3))["status"] == "accepted"
    assert server.stop() == OK


# ── Interrupted ───────────────────────────────────────────────────────────────────────────────────

# For each number: a copy of a data folder, in which a child process compacts, and what it does to
# files for the number-th time kills it or is refused; or the disk takes no more bytes than that.
INTERRUPT = """
import os, resource, shutil, signal, sys
from pathlib import Path
from backends.raw.folders import Folders

source, target, how = sys.argv[1:]
CALLS = {"open", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir", "fsync"}
left = 0

def interrupt(event, arguments):
    global left
    if event in CALLS and target in str(arguments[0]):
        left -= 1
        if left == -1 and how == "kill":
            os.kill(os.getpid(), 9)
        elif left == -1:
            raise OSError(5, "Input/output error")

def fsync(descriptor, sync=os.fsync):
    sys.audit("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
    sync(descriptor)

def compact(place):
    folders = Folders(place / "raw")
    if how == "fill":
        resource.setrlimit(resource.RLIMIT_FSIZE, (left * 7, left * 7))
    else:
        sys.addaudithook(interrupt)
        os.fsync = fsync
    for day in folders.finished_days():
        folders.compact(day)

code, number = 1, 0
while code:
    place = Path(target) / str(number)
    shutil.copytree(source, place)
    child = os.fork()
    if not child:
        left = number
        try:
            compact(place)
            os._exit(how != "fill" and left < 0)
        except OSError:
            os._exit(1)
    code, number = os.waitpid(child, 0)[1], number + 1
"""


@pytest.mark.linux
@pytest.mark.parametrize(("how", "least"), [("kill", 30), ("refuse", 30), ("fill", 30)])
def test_interrupted(how: str, least: int, tmp_path: Path):
    """Wherever packing is killed or refused by the disk, nothing is lost; the next run ends it.

    The folders hold a day that was packed before, files that a run left behind, and late ones.
    """
    source, folders = tmp_path / "source", Folders(tmp_path / "source" / "raw")
    (source / "processed").mkdir(parents=True)
    payloads = processed_in(source, [body(number) for number in range(4)])
    compact(folders)
    payloads |= processed_in(source, [body(number) for number in range(1, 6)], 1)
    (tmp_path / "places").mkdir()
    command = [sys.executable, "-c", INTERRUPT, source, tmp_path / "places", how]
    home = Path(dropzone.__file__).parent
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(home)})
    places = list((tmp_path / "places").iterdir())
    assert len(places) > least
    for place in places:
        folders = Folders(place / "raw")
        assert all_of(folders, payloads) == payloads, place
        compact(folders)
        assert all_of(folders, payloads) == payloads, place
        assert copies(place) == once(payloads), place
        assert {f"{p.path.name}{e}" for p in folders.packs() for e in ("", ".index")} == set(
            os.listdir(place / "processed")
        )


@pytest.mark.linux
def test_synced_before_anything_is_deleted(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    """Before the first payload is deleted, its pack, the index and their names are on disk."""
    processed_in(folder.place, [body(2), body(3)], 2)
    done: list[tuple[str, str]] = []

    def noted(name: str) -> Callable[..., None]:
        call = getattr(os, name)

        def note(file: object, *others: object) -> None:
            call(file, *others)
            path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else str(file)
            done.append((name, Path(path).name))

        return note

    for name in ("fsync", "rename", "unlink"):
        monkeypatch.setattr(os, name, noted(name))
    compact(folder.store)
    assert done == [
        ("fsync", f"{DAY}.ndjson.part"),
        ("fsync", f"{DAY}.ndjson.gz.index"),
        ("rename", f"{DAY}.ndjson.part"),
        ("fsync", "processed"),
        ("unlink", f"{arrival(2)}.json"),
        ("unlink", f"{arrival(3)}.json"),
    ]


def test_killed_at_random(folder: Folder, program: Program):
    """`compact` that is killed again and again loses nothing, and doubles nothing in the end."""
    payloads = processed_in(folder.place, [body(number) for number in range(2500)])
    for _ in range(5):
        running = program.start("compact")
        time.sleep(CHANCE.uniform(0.3, 1))  # a random moment
        running.kill()
        running.wait()
        assert copies(folder.place).keys() == payloads.keys()
    assert program.run("compact").returncode == OK
    assert copies(folder.place) == once(payloads)
    assert all_of(folder.store, payloads) == payloads


# What may be in a pack when it is read again after the sync.


def _flipped(text: bytes) -> bytes:
    middle = len(text) // 2
    return text[:middle] + bytes([text[middle] ^ 1]) + text[middle + 1 :]


def _without_its_end(text: bytes) -> bytes:
    return text[: len(text) * 2 // 3]


def _without_a_line(text: bytes) -> bytes:
    return gzip.compress(b"".join(gzip.decompress(text).splitlines(keepends=True)[:-1]))


def _of_another_order(text: bytes) -> bytes:
    return gzip.compress(b"".join(gzip.decompress(text).splitlines(keepends=True)[::-1]))


def _with_another_payload(text: bytes) -> bytes:
    [line, *others] = gzip.decompress(text).splitlines(keepends=True)
    other = json.loads(line) | {"payload": "{}", "sha256": hashlib.sha256(b"{}").hexdigest()}
    return gzip.compress(json.dumps(other).encode() + b"\n" + b"".join(others))


@pytest.mark.linux
@pytest.mark.parametrize(
    "damaged",
    [
        _flipped,
        _without_its_end,
        lambda _: b"",
        _without_a_line,
        _of_another_order,
        _with_another_payload,
    ],
)
def test_a_pack_that_is_not_what_was_written(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, damaged: Callable[[bytes], bytes]
):
    """If the disk gives back another pack than was written, the payloads stay as they are."""
    payloads, sync = (
        processed_in(folder.place, [body(number) for number in range(2, 8)], 2),
        os.fsync,
    )

    def damaging(descriptor: int) -> None:
        sync(descriptor)
        file = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if file.suffix == ".part":
            file.write_bytes(damaged(file.read_bytes()))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", damaging)
        with pytest.raises(StorageUnavailable, match=DAY):
            folder.store.compact(DAY)
    assert folder.names("processed") == list(payloads)
    assert folder.store.packs() == []
    assert all_of(folder.store, payloads) == payloads
    assert folder.store.compact(DAY) == 6
    assert all_of(folder.store, payloads) == payloads


def test_a_bad_day(folder: Folder, program: Program):
    """A day that cannot be packed is named, exit code 75; the other days are packed."""
    payloads = processed_in(folder.place, [body(number) for number in range(4)])
    bad = folder.place / "processed" / LEAP_DAY / f"{after(arrival(0))}.json"
    bad.mkdir()
    done = program.run("compact")
    assert (done.returncode, done.stdout) == (TRY_AGAIN, f"{DAY}: 2 payloads packed\n")
    assert str(bad) in done.stderr
    assert_explained(done.stderr)
    assert all_of(folder.store, payloads) == payloads
    bad.rmdir()
    assert program.run("compact").returncode == OK
    assert copies(folder.place) == once(payloads)


# ── Recovery ──────────────────────────────────────────────────────────────────────────────────────


def journaled(place: Path, payloads: dict[UUID, bytes]) -> None:
    """Leave a log behind as a store does that is killed."""
    log = Log.create(place / "journal")
    log.append(Record([Entry(*payload) for payload in payloads.items()], []))
    log.close()


async def test_packed_payloads_do_not_come_back(folder: Folder):
    """Recovery from the journal leaves packed payloads where they are, and brings the others."""
    payloads = processed_in(folder.place, [body(number) for number in range(6)])
    compact(folder.store)
    lost = {arrival(50): b"50"}
    journaled(folder.place, payloads | lost)
    again = await Folder(folder.place).opened()
    assert again.names("raw") == list(lost)
    assert again.names("processed") == []
    assert all_of(again.store, payloads) == payloads


async def test_recovery_of_what_is_damaged_in_a_pack(folder: Folder):
    """A payload whose pack is damaged is recovered from the journal, and packed once more."""
    payloads = processed_in(folder.place, [body(number) for number in range(2, 6)], 2)
    compact(folder.store)
    [pack] = folder.store.packs()
    pack.path.write_bytes(_flipped(pack.path.read_bytes()))
    journaled(folder.place, payloads)
    again = await Folder(folder.place).opened()
    assert again.names("raw") == list(payloads)
    again.store.settle(names_of(*payloads), [])
    assert all_of(again.store, payloads) == payloads


# ── keep_days ─────────────────────────────────────────────────────────────────────────────────────

KEEP = {"DROPZONE_RAW_KEEP_DAYS": 2}


def days_ago(days: int) -> tuple[str, UUID]:
    """Return the day that was so many days ago (UTC), and the raw_id of an arrival on it."""
    moment = datetime.now(UTC) - timedelta(days=days)
    return f"{moment:%Y-%m-%d}", uuid_at(moment)


def test_keep_days(folder: Folder, program: Program):
    """`keep_days` deletes the packs of days that are longer ago, and nothing that is not packed."""
    days = dict(map(days_ago, range(6)))
    late = days_ago(5)[1]
    for raw_id in days.values():
        folder.put(raw_id, body())
    folder.store.settle(names_of(*days.values()), [])
    pending, bad = after(late), after(after(late))
    folder.put(pending, body())
    folder.put(bad, b"bad")
    folder.store.settle([], [Rejection(bad, "payload_not_json", "", datetime.now(UTC))])
    assert program.run("compact").returncode == OK
    assert len(folder.store.packs()) == 5
    done = program.run("compact", **KEEP)
    assert (done.returncode, done.stderr) == (OK, "")
    *kept, three, four, five = days
    assert [line.split(": ")[0] for line in done.stdout.splitlines()] == [
        f"{day}.ndjson.gz" for day in (five, four, three)
    ]
    for day, raw_id in days.items():
        assert (found(folder.store, raw_id) is not None) == (day in kept)
    assert set(os.listdir(folder.place / "processed")) == {kept[0]} | {
        f"{day}.ndjson.gz{end}" for day in kept[1:] for end in ("", ".index")
    }
    assert folder.states() == {"raw": 1, "rejected": 1, "processed": 1}


async def test_expired_payloads_do_not_come_back(folder: Folder, program: Program):
    """Recovery does not bring back what `keep_days` has deleted, and serves a 404 for it."""
    day, raw_id = days_ago(4)
    folder.put(raw_id, body())
    folder.store.settle(names_of(raw_id), [])
    assert f"{day}.ndjson.gz: deleted" in program.run("compact", **KEEP).stdout
    journaled(folder.place, {raw_id: body()})
    server = Server(program, **KEEP)
    assert server.request("GET", f"/raw/{raw_id}")[0] == 404
    assert server.stop() == OK
    assert folder.states() == {}


@pytest.mark.parametrize("days", [4, 400])
async def test_old_payloads_that_were_never_processed_come_back(
    folder: Folder, program: Program, days: int
):
    """What had landed before a long power cut is recovered, however short `keep_days` is."""
    _, raw_id = days_ago(days)
    journaled(folder.place, {raw_id: body()})
    server = Server(program, **KEEP)
    assert server.json("GET", f"/raw/{raw_id}")["state"] == "pending"
    assert server.json("POST", "/process")["processed"] == 1
    assert server.stop() == OK


async def test_read_while_it_expires(tmp_path: Path):
    """Whoever looks for a payload while its pack is deleted finds it, or hears that it is gone."""
    folders = Folders(tmp_path / "raw", keep_days=1)
    folders.journal.mkdir()
    payloads = {}
    for day in range(60):
        payloads |= processed_in(tmp_path, [b"%d" % day], day * 86_400_000)
    assert compact(folders) == len(payloads)

    def read_all() -> int:
        bodies = {raw_id: found(folders, raw_id) for raw_id in payloads}
        assert all(each in (None, payloads[raw_id]) for raw_id, each in bodies.items())
        return sum(each is not None for each in bodies.values())

    assert read_all() == len(payloads)
    Pack.index.cache_clear()
    Pack.member.cache_clear()
    expiring = asyncio.create_task(asyncio.to_thread(folders.expire))
    while await asyncio.to_thread(read_all):
        pass
    assert len(await expiring) == 60
    with pytest.raises(RawIdUnknown):
        folders.read(arrival(0))
    assert os.listdir(tmp_path / "processed") == []
