"""Damage: what a disk gives back wrong costs no more than itself, and is told."""

import gzip
import json
import logging
import os
import sqlite3
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from power_cut import REPO, files_in
from stores import land_each, names_of, opened, pending_in
from test_durability import FUTURE, assert_increasing, landed_and_killed, logs_in, records_in
from test_packs import compact, journaled, processed_in
from test_raw_store import uuid7_at

from backends.raw import PackDamaged, RawIdUnknown, StorageUnavailable, packs
from backends.raw.folders import Folders
from backends.raw.journal import HEAD, Entry, Log, Record
from backends.raw.keys import Keys, KeyUse
from backends.raw.landing import RawStore
from backends.raw.packs import Pack

SIX = [b"%d" % number for number in range(6)]
BODY = b'{"time_stamp": "2019-05-01T12:00:00Z", "data": [0, 2]}'
DAY = "2024-03-01"


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    Pack.index.cache_clear()
    Pack.member.cache_clear()


def flipped(data: bytes, place: int, bit: int = 4) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged as a warning or worse, and forget it."""
    said = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    caplog.clear()
    return said


def set_aside_in(folder: Path) -> list[Path]:
    return sorted((folder / "journal").glob("*.damaged-*"))


def bodies_in(store: RawStore) -> list[bytes]:
    return [store.read(raw_id)[1] for raw_id in pending_in(store)]


# ── Logs ──────────────────────────────────────────────────────────────────────────────────────────


def killed_with_six(folder: Path) -> tuple[Path, list[UUID]]:
    """Land six payloads one by one, and lose their files: the log alone has them."""
    raw_ids = landed_and_killed(folder, len(SIX))
    for file in (folder / "raw").iterdir():
        file.unlink()
    [log] = (folder / "journal").glob("*.log")
    return log, raw_ids


async def assert_damage_told(
    folder: Path, caplog: pytest.LogCaptureFixture, log: Path, left: list[bytes]
) -> list[str]:
    """Open the store: it has what is `left`, tells, and keeps the log; it is calm the next time."""
    damaged = log.read_bytes()
    caplog.clear()
    async with opened(folder) as store:
        assert bodies_in(store) == left
        said = told(caplog)
        assert any(str(log) in line and "damaged at byte" in line for line in said), said
        [kept] = set_aside_in(folder)
        assert kept.read_bytes() == damaged
        assert any(str(kept) in line for line in store.problems()["data folder"])
        await store.land(BODY)
    async with opened(folder) as store:
        assert bodies_in(store) == [*left, BODY]
    assert told(caplog) == []
    assert set_aside_in(folder) == [kept]
    assert logs_in(folder) == set()
    return said


PLACES = {  # in a record; what is negative counts from its end
    "epoch": 3,
    "length": 8,
    "high length": 11,
    "checksum": 13,
    "raw_id": HEAD.size + 20,
    "payload": -13,
    "end": -2,
}


def place_in(begin: int, end: int, name: str) -> int:
    place = PLACES[name]
    return (begin if place >= 0 else end) + place


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [0, 1, 3, 5])
async def test_a_flipped_bit(
    number: int, place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A flipped bit in one of six records costs that one, wherever it is, and is told."""
    log, raw_ids = killed_with_six(tmp_path)
    data = log.read_bytes()
    begin, end = records_in(data)[1 + number]
    log.write_bytes(flipped(data, place_in(begin, end, place)))
    left = SIX[:number] + SIX[number + 1 :]
    said = await assert_damage_told(tmp_path, caplog, log, left)
    assert f"damaged at byte {begin}:" in said[0]
    if number < 5:
        assert f"{end - begin} bytes cannot be read. {5 - number} whole records behind" in said[0]
    if place != "raw_id":
        assert f"1 are not there: {raw_ids[number]}" in said[0]


@pytest.mark.parametrize("place", ["epoch", "length", "checksum", "end"])
async def test_a_flipped_bit_in_the_beginning(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A flipped bit in the record that a log begins with, which has the epoch, costs nothing."""
    log, _ = killed_with_six(tmp_path)
    data = log.read_bytes()
    log.write_bytes(flipped(data, place_in(*records_in(data)[0], place)))
    await assert_damage_told(tmp_path, caplog, log, SIX)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Whatever stretch of a log is overwritten, every record that is still whole is read."""
    folder = tmp_path_factory.mktemp("log")
    bodies = data.draw(st.lists(st.binary(max_size=300), min_size=1, max_size=8))
    log = Log.create(folder)
    for again in range(data.draw(st.integers(0, 2))):
        log.append(Record([Entry(UUID(int=again), b"old" * 400)], []))
        log.begin_anew()
    ends = [log.size]
    for number, body in enumerate(bodies):
        log.append(Record([Entry(UUID(int=number), body)], []))
        ends.append(log.size)
    log.close()
    text = log.path.read_bytes()
    begin = data.draw(st.integers(0, ends[-1] - 1))
    garbage = data.draw(st.binary(min_size=1, max_size=400))[: ends[-1] - begin]
    log.path.write_bytes(text[:begin] + garbage + text[begin + len(garbage) :])
    now = log.path.read_bytes()
    whole = [
        n for n, (start, end) in enumerate(pairwise(ends)) if now[start:end] == text[start:end]
    ]
    [left] = Log.left_in(folder)
    read = [record.entries[0].raw_id.int for record in left.records()]
    assert read == whole
    assert left.contents.gaps or now == text or whole == list(range(len(bodies) - 1))
    left.remove()


WHOLE_LOGS: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda _: b"",
    "zeros": lambda data: bytes(len(data)),
    "garbage": lambda data: os.urandom(len(data)),
    "text": lambda _: b"nothing of ours\n",
}


@pytest.mark.parametrize("how", WHOLE_LOGS)
async def test_a_log_that_is_lost(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A log of which nothing can be read is told and kept, and the service starts and lands."""
    log, _ = killed_with_six(tmp_path)
    log.write_bytes(WHOLE_LOGS[how](log.read_bytes()))
    await assert_damage_told(tmp_path, caplog, log, [])


@pytest.mark.parametrize("number", [0, 2, 5])
@pytest.mark.parametrize("offset", [0, 9, 60, -1])
async def test_a_log_that_is_cut_short(
    number: int, offset: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A log that ends too early, within a record or between two, is told and kept."""
    log, _ = killed_with_six(tmp_path)
    begin, end = records_in(log.read_bytes())[1 + number]
    os.truncate(log, begin + offset if offset >= 0 else end + offset)
    await assert_damage_told(tmp_path, caplog, log, SIX[:number])


async def test_a_large_log_that_is_cut_short(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """So it is where records are larger than what a log is filled ahead of them."""
    journal = tmp_path / "journal"
    journal.mkdir(parents=True)
    log = Log.create(journal)
    bodies = [b"%d" % number * 700_000 for number in range(5)]
    sizes = []
    for number, body in enumerate(bodies):
        sizes.append(log.size)
        log.append(Record([Entry(UUID(int=7 << 76 | number), body)], []))
    log.close()
    os.truncate(log.path, sizes[3] + 500_000)
    await assert_damage_told(tmp_path, caplog, log.path, bodies[:3])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_damage_in_a_log_that_is_held(number: int, tmp_path: Path):
    """A store that writes its payloads again notices damage in its own log, at its end, too."""
    log = Log.create(tmp_path)
    records = [Record([Entry(UUID(int=n), b"%d" % n)], []) for n in range(3)]
    for record in records:
        log.append(record)
    begin, end = records_in(log.path.read_bytes())[number]
    damage(log.path, lambda data: flipped(data, end - 20))
    assert list(log.records()) == [*records[: number - 1], *records[number:]]
    assert log.contents.gaps == [(begin, end)]
    assert log.contents.behind == 3 - number
    log.remove()


async def test_several_damages(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Of a log that is damaged in several places all that is whole comes back."""
    log, _ = killed_with_six(tmp_path)
    data = log.read_bytes()
    places = records_in(data)
    for number in (0, 1, 4):
        begin, end = places[1 + number]
        data = data[:begin] + os.urandom(end - begin) + data[end:]
    log.write_bytes(data)
    said = await assert_damage_told(tmp_path, caplog, log, [b"2", b"3", b"5"])
    assert "3 whole records behind" in said[0]


async def test_a_block_that_cannot_be_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A bad block of a log costs the records that lie in it."""
    raw_ids = landed_and_killed(tmp_path, 120)
    for file in (tmp_path / "raw").iterdir():
        file.unlink()
    [log] = (tmp_path / "journal").glob("*.log")
    places, pread = records_in(log.read_bytes())[1:], os.pread

    def failing(file: int, size: int, at: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{file}") != str(log) or at >= 8192 or at + size <= 4096:
            return pread(file, size, at)
        if at >= 4096:
            raise OSError(5, "Input/output error")
        return pread(file, 4096 - at, at)

    monkeypatch.setattr(os, "pread", failing)
    async with opened(tmp_path) as store:
        assert pending_in(store) == [
            raw_id
            for raw_id, (begin, end) in zip(raw_ids, places, strict=True)
            if end <= 4096 or begin >= 8192
        ]
    assert "damaged at byte" in told(caplog)[0]


async def test_many_payloads_in_a_damaged_record(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Only those payloads of a damaged record are told to be lost that lie nowhere else."""
    async with opened(tmp_path) as store:
        raw_ids = await land_each(store, (b"%d" % number for number in range(5)))
        [name] = logs_in(tmp_path)
        log = tmp_path / "journal" / name
        data = log.read_bytes()
    for raw_id in raw_ids[:2]:
        (tmp_path / "raw" / f"{raw_id}.json").unlink()
    log.write_bytes(flipped(data, records_in(data)[1][1] - 13))
    async with opened(tmp_path) as store:
        assert pending_in(store) == raw_ids[2:]
    assert f"2 are not there: {raw_ids[0]}, {raw_ids[1]}" in told(caplog)[0]


# What a power cut leaves at the end of a log is not damage.


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("size", [4, 16, 40, 4096, 20_000])
def test_a_record_that_a_power_cut_has_torn(used_before: bool, size: int, tmp_path: Path):
    """A group that was never acknowledged is passed over in silence, whatever lay there before."""
    log = Log.create(tmp_path)
    if used_before:
        for number in range(40):
            log.append(Record([Entry(UUID(int=number), b"old" * 300)], []))
        log.begin_anew()
    records = [Record([Entry(UUID(int=number), b"new" * 50)], []) for number in range(3)]
    for record in records:
        log.append(record)
    at, before = log.size, log.path.read_bytes()
    log.append(Record([Entry(UUID(int=9), b"torn" * 6000)], []))
    torn = log.path.read_bytes()[at : at + size]
    log.close()
    log.path.write_bytes(before[:at] + torn + before[at + size :])
    [left] = Log.left_in(tmp_path)
    assert list(left.records()) == records
    assert left.contents.gaps == []
    left.finish()
    assert os.listdir(tmp_path) == []


def test_a_new_log_whose_first_group_is_torn(tmp_path: Path):
    """A power cut in the first group of a log leaves nothing to tell, nor does one before it."""
    for torn in (b"", b"torn"):
        log = Log.create(tmp_path)
        at, before = log.size, log.path.read_bytes()
        log.append(Record([Entry(UUID(int=9), torn * 6000)], []))
        size = len(torn) * 1000
        text = log.path.read_bytes()[at : at + size]
        log.close()
        log.path.write_bytes(before[:at] + text + before[at + size :])
        [left] = Log.left_in(tmp_path)
        assert list(left.records()) == []
        left.finish()
        assert os.listdir(tmp_path) == []


async def test_a_killed_store_tells_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """After a kill there is nothing to tell, also of what was taken back."""
    landed_and_killed(tmp_path, 3)
    async with opened(tmp_path):
        pass
    assert told(caplog) == []
    log = Log.create(tmp_path / "journal")
    log.append(Record([Entry(UUID(int=1), b"1" * 1000)], []))
    size = log.size
    log.append(Record([Entry(UUID(int=2), b"2" * 1000)], []))
    log.cut(size)
    log.append(Record([Entry(UUID(int=3), b"3" * 100)], []))
    log.close()
    async with opened(tmp_path) as store:
        assert [raw_id.int for raw_id in pending_in(store)][:2] == [1, 3]
    assert told(caplog) == []
    assert set_aside_in(tmp_path) == []


def old_record(epoch: int, number: int) -> bytes:
    """Return a record as 0.1.0 wrote it."""
    body = msgspec.msgpack.encode(([(UUID(int=number), b"%d" % number)], []))
    return HEAD.pack(epoch, len(body), zlib.crc32(body)) + body


@pytest.mark.parametrize("damaged", [None, 0, 1, 2])
async def test_a_log_of_an_older_version(
    damaged: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A log that 0.1.0 left is read, also behind damage; its torn end tells nothing."""
    records = [old_record(17, number) for number in range(4)]
    if damaged is not None:
        records[damaged] = flipped(records[damaged], 30)
    (tmp_path / "journal").mkdir()
    log = tmp_path / "journal" / "old.log"
    log.write_bytes(b"".join(records) + old_record(17, 9)[:-5] + bytes(1000) + old_record(5, 8))
    async with opened(tmp_path) as store:
        assert [r.int for r in pending_in(store)] == [n for n in range(4) if n != damaged]
    assert bool(told(caplog)) == (damaged is not None)
    assert len(set_aside_in(tmp_path)) == (damaged is not None)


async def test_a_log_that_an_older_version_was_about_to_use_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Of such a log nothing is brought back, and nothing told."""
    (tmp_path / "journal").mkdir()
    log = tmp_path / "journal" / "old.log"
    log.write_bytes(bytes(16) + old_record(17, 0)[16:] + old_record(17, 1))
    async with opened(tmp_path) as store:
        assert pending_in(store) == []
    assert told(caplog) == []


# ── Files that cannot be read ─────────────────────────────────────────────────────────────────────

# A child process in which some files cannot be opened, or not even be renamed over, as on a disk
# with bad blocks; a file that took the place of a bad one is a good one.
BAD_DISK = """
import errno, json, os, sys

bad = json.loads(os.environ["BAD_FILES"])
number = getattr(errno, os.environ["BAD_ERROR"])
calls = {"open": (0,), "os.rename": (0, 1)} if "BAD_NAMES" in os.environ else {"open": (0,)}
left = {path: os.lstat(path).st_ino for path in bad}

def refuse(event, arguments):
    for place in calls.get(event, ()):
        path = arguments[place]
        if isinstance(path, (str, os.PathLike)) and os.fspath(path) in left:
            path = os.fspath(path)
            try:
                is_bad = os.lstat(path).st_ino == left[path]
            except FileNotFoundError:
                is_bad = False
            if is_bad:
                raise OSError(number, os.strerror(number), path)

sys.addaudithook(refuse)
"""
OPEN_AND_LIST = """
import asyncio, sys
from stores import opened, pending_in
from pathlib import Path

async def main():
    async with opened(Path(sys.argv[1])) as store:
        for raw_id in pending_in(store):
            try:
                print(store.read(raw_id)[1].decode())
            except OSError as error:
                print(error.strerror)
        await store.land(b"new")

asyncio.run(main())
"""


def listed(folder: Path, bad: Sequence[Path], **variables: str) -> tuple[list[str], str]:
    """Open the store on a bad disk; return the payloads that are pending, and what was logged."""
    variables |= {
        "BAD_FILES": json.dumps(list(map(str, bad))),
        "PYTHONPATH": f"{REPO}:{REPO}/tests",
    }
    done = subprocess.run(
        [sys.executable, "-c", BAD_DISK + OPEN_AND_LIST, folder],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1], done.stderr


@pytest.mark.parametrize("error", ["EIO", "EBADMSG", "EUCLEAN", "EACCES"])
def test_a_file_that_cannot_be_read(error: str, tmp_path: Path):
    """A file in raw/ that the disk does not give back is written again from the journal."""
    raw_ids = landed_and_killed(tmp_path, 4)
    bad = [tmp_path / "raw" / f"{raw_ids[number]}.json" for number in (0, 2)]
    payloads, said = listed(tmp_path, bad, BAD_ERROR=error)
    assert payloads == ["0", "1", "2", "3"]
    assert all(f"{path} could not be read" in said for path in bad)
    assert [path.name.split(".damaged")[0] for path in set_aside_in(tmp_path)] == [
        path.name for path in bad
    ]
    assert logs_in(tmp_path) == set()


@pytest.mark.parametrize("error", ["EIO", "EBADMSG"])
def test_a_file_that_cannot_be_replaced(error: str, tmp_path: Path):
    """Where its name is bad, too, the payload stays in the journal for a start after the repair."""
    raw_ids = landed_and_killed(tmp_path, 4)
    bad = [tmp_path / "raw" / f"{raw_ids[2]}.json"]
    for _ in range(2):
        payloads, said = listed(tmp_path, bad, BAD_ERROR=error, BAD_NAMES="yes")
        assert payloads[:2] == ["0", "1"]
        assert f"payload {raw_ids[2]} cannot be written again" in said
    bad[0].unlink()
    payloads, said = listed(tmp_path, [], BAD_ERROR=error)
    assert payloads == ["0", "1", "2", "3", "new", "new"]
    assert logs_in(tmp_path) == set()


@pytest.mark.parametrize("where", ["raw", "rejected", "processed"])
@pytest.mark.parametrize("kind", ["empty folder", "folder", "link to itself"])
async def test_something_else_in_the_place_of_a_file(
    where: str, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """A folder or an odd link where a payload should lie is set aside, and the payload is back."""
    raw_ids = landed_and_killed(tmp_path, 3, "settled")
    number = {"processed": 0, "rejected": 1, "raw": 2}[where]
    [path] = files_in(tmp_path)[raw_ids[number]]
    path.unlink()
    if kind == "link to itself":
        path.symlink_to(path)
    else:
        path.mkdir()
        if kind == "folder":
            (path / "something").touch()
    async with opened(tmp_path) as store:
        assert store.read(raw_ids[number])[1] == b"%d" % number
        assert path.is_file()
    assert f"{path} could not be read" in told(caplog)[0]
    assert len(set_aside_in(tmp_path)) == 1


async def test_a_day_that_is_no_folder(tmp_path: Path):
    """A file in the place of a day's folder hinders nobody from starting."""
    raw_ids = landed_and_killed(tmp_path, 3)
    (tmp_path / "processed" / f"{datetime.now(UTC):%Y-%m-%d}").touch()
    (tmp_path / "raw" / f"{raw_ids[1]}.json").unlink()
    async with opened(tmp_path) as store:
        assert pending_in(store) == raw_ids


# ── The last raw_id ───────────────────────────────────────────────────────────────────────────────


COUNTERS: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda _: None,
    "emptied": lambda _: b"",
    "torn": lambda data: data[:7],
    "garbage": lambda _: b"garbage",
    "as long": lambda data: b"\xff" * len(data),
    "longer": lambda _: b"\xff" * 5000,
    "zeros": lambda data: bytes(len(data)),
    "ones as 0.1.0 had it": lambda _: b"\xff" * 16,
    "earlier": lambda data: b"\0" + data[1:],
    "flipped": lambda data: flipped(data, 3),
    "flipped checksum": lambda data: flipped(data, 17),
}


def damage(file: Path, how: Callable[[bytes], bytes | None]) -> None:
    """Damage a file in its place, or delete it."""
    content = how(file.read_bytes())
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)


@pytest.mark.parametrize("how", COUNTERS)
@pytest.mark.parametrize("where", ["raw", "rejected", "processed", "pack", "pack without index"])
async def test_the_last_raw_id_is_lost(
    how: str, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """With the clock set back, too, raw_ids go on behind the greatest one, wherever it lies."""
    async with opened(tmp_path) as store:
        await store.land(BODY)
    place = tmp_path / (
        "processed/2399-12-31" if "pack" in where or where == "processed" else where
    )
    place.mkdir(exist_ok=True)
    last = uuid7_at("2399-12-31T23:59:59.999Z")
    (place / f"{last}.json").write_bytes(BODY)
    if "pack" in where:
        Pack.write(place.with_name("2399-12-31.ndjson.gz"), lambda: iter([(last, BODY)]))
        (place / f"{last}.json").unlink()
        place.rmdir()
    if where == "pack without index":
        (tmp_path / "processed" / "2399-12-31.ndjson.gz.index").unlink()
    damage(tmp_path / "journal" / "last_raw_id", COUNTERS[how])
    caplog.clear()
    async with opened(tmp_path) as store:
        assert any("last_raw_id is damaged or was lost" in line for line in told(caplog))
        raw_ids = await land_each(store, [BODY] * 3)
    assert_increasing([last, *raw_ids])
    async with opened(tmp_path) as store:
        raw_ids += await store.land(BODY)
    assert_increasing(raw_ids)
    assert told(caplog) == []


@pytest.mark.parametrize("how", ["index alone", "garbage"])
async def test_the_last_raw_id_and_the_last_pack_are_lost(how: str, tmp_path: Path):
    """Where the greatest raw_id lay in a pack that is lost, too, they go on behind its day."""
    processed, last = tmp_path / "processed", uuid7_at("2399-12-31T23:59:59.999Z")
    (processed / "2399-12-31").mkdir(parents=True)
    (processed / "2399-12-31" / f"{last}.json").write_bytes(BODY)
    path = processed / "2399-12-31.ndjson.gz"
    Pack.write(path, lambda: iter([(last, BODY)]))
    (processed / "2399-12-31" / f"{last}.json").unlink()
    if how == "garbage":
        path.write_bytes(b"garbage")
    else:
        path.unlink()
    async with opened(tmp_path) as store:
        [raw_id] = await store.land(BODY)
    assert raw_id > last


@pytest.mark.parametrize("how", [name for name in COUNTERS if name != "deleted"])
async def test_the_last_raw_id_is_damaged_under_way(how: str, tmp_path: Path):
    """So they do where the file is damaged while the store is open."""
    async with opened(tmp_path) as store:
        path = tmp_path / "journal" / "last_raw_id"
        path.write_bytes(FUTURE.bytes)  # as the clock was set back since
        raw_ids = await land_each(store, [BODY] * 2)
        damage(path, COUNTERS[how])
        raw_ids += await land_each(store, [BODY] * 2)
    assert_increasing([FUTURE, *raw_ids])


# ── Idempotency-Keys ──────────────────────────────────────────────────────────────────────────────


def keys_in(folder: Path) -> Path:
    return folder / "journal" / "keys.sqlite"


KEY_FILES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda _: None,
    "emptied": lambda _: b"",
    "garbage": lambda _: b"garbage " * 1000,
    "no header": lambda data: bytes(100) + data[100:],
    "cut short": lambda data: data[: len(data) // 2],
    "a page of zeros": lambda data: data[:4096] + bytes(4096) + data[8192:],
}


@pytest.mark.parametrize("how", KEY_FILES)
async def test_the_keys_are_lost(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """The service starts, tells that the keys from before are forgotten, and lands new ones."""
    async with opened(tmp_path) as store:
        before = await store.land(BODY, "a")
    damage(keys_in(tmp_path), KEY_FILES[how])
    caplog.clear()
    async with opened(tmp_path) as store:
        said = told(caplog)
        assert len(said) == 1
        assert str(keys_in(tmp_path)) in said[0]
        again = await store.land(BODY, "a")
        assert again != before
        assert await store.land(BODY, "a") == again
        assert len(set_aside_in(tmp_path)) == (how not in ("deleted", "emptied"))
    async with opened(tmp_path) as store:
        assert await store.land(BODY, "a") == again
    assert told(caplog) == []


@pytest.mark.parametrize("how", KEY_FILES)
async def test_the_keys_are_lost_under_way(how: str, tmp_path: Path):
    """So it does where that happens while stores are open: all of them go on with the same keys."""
    async with opened(tmp_path) as store, opened(tmp_path) as other:
        for number in range(200):
            await store.land(BODY, f"{number}")
        with sqlite3.connect(keys_in(tmp_path)) as keys:
            keys.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        keys.close()
        damage(keys_in(tmp_path), KEY_FILES[how])
        for number in range(200):
            again = await store.land(BODY, f"{number}")
            assert await other.land(BODY, f"{number}") == again
        new = await other.land(BODY, "new")
        assert await store.land(BODY, "new") == new
    async with opened(tmp_path) as store:
        assert await store.land(BODY, "new") == new


def test_a_flipped_bit_in_the_keys(tmp_path: Path):
    """Whichever bit of the file is flipped, a key gives the raw_ids that it was given, or none."""
    path = tmp_path / "keys.sqlite"
    now = UUID(int=int(datetime.now(UTC).timestamp() * 1000) << 80 | 7 << 76 | 2 << 62)
    uses = {f"key {n}": KeyUse(f"key {n}", b"%32d" % n, [UUID(int=now.int + n)]) for n in range(60)}
    keys = Keys(path)
    keys.open(is_expected=False)
    for use in uses.values():
        keys.note(use)
    keys.close()
    whole = path.read_bytes()
    for place in [*range(130), *range(130, len(whole), 211)]:
        for name in tmp_path.iterdir():
            name.unlink()
        path.write_bytes(flipped(whole, place))
        keys.open(is_expected=True)
        found = {key: keys.find(key) for key in uses}
        assert all(use in (None, uses[key]) for key, use in found.items()), place
        keys.note_landed([uses["key 1"]])
        use = keys.find("key 1")
        assert use is not None
        assert use.landed
        keys.close()


async def test_most_keys_are_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Of a file that is damaged in one place most keys are kept."""
    async with opened(tmp_path) as store:
        given = {f"{number}": await store.land(BODY, f"{number}") for number in range(300)}
    data = keys_in(tmp_path).read_bytes()
    page = data.index(given["200"][0].bytes) // 4096 * 4096
    keys_in(tmp_path).write_bytes(data[:page] + os.urandom(50) + data[page + 50 :])
    async with opened(tmp_path) as store:
        kept = sum([await store.land(BODY, key) == raw_ids for key, raw_ids in given.items()])
    assert 100 < kept < 300
    assert any("keys were taken over" in line for line in told(caplog))


async def test_keys_of_older_versions(tmp_path: Path):
    """The file of 0.1.0, which has no checksums, is taken over with its keys."""
    async with opened(tmp_path) as store:
        before = await store.land(BODY, "a")
    with sqlite3.connect(keys_in(tmp_path)) as keys:
        keys.execute("ALTER TABLE keys DROP COLUMN checksum")
    keys.close()
    async with opened(tmp_path) as store:
        assert await store.land(BODY, "a") == before
        await store.land(BODY, "b")


# ── The tally ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["deleted", "emptied", "garbage", "as long", "zeros", "flipped"])
@pytest.mark.parametrize("is_open", [False, True])
async def test_the_tally_is_lost(
    how: str, is_open: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """What is processed is counted again, and when the last payload landed is taken from it."""
    async with opened(tmp_path) as store:
        raw_ids = await land_each(store, [BODY] * 5)
        store.settle(names_of(*raw_ids[:3]), [])
        before = store.activity()
        if is_open and how != "deleted":
            damage(tmp_path / "journal" / "tally", COUNTERS[how])
            assert store.activity().processed == 3
    damage(tmp_path / "journal" / "tally", COUNTERS[how])
    caplog.clear()
    async with opened(tmp_path) as store:
        after = store.activity()
        assert (after.processed, len(after.landed)) == (3, 60)
        assert abs(after.last_landed - before.last_landed) < 60_000
        await store.land(BODY)
        assert store.activity().landed[-1] >= 1 or sum(store.activity().landed) >= 1
    assert any("tally is damaged or was lost" in line for line in told(caplog))


async def test_a_flipped_bit_in_a_minute_of_the_tally(tmp_path: Path):
    """A minute that is damaged counts as one in which nothing landed."""
    async with opened(tmp_path) as store:
        await land_each(store, [BODY] * 5)
        tally = tmp_path / "journal" / "tally"
        data = tally.read_bytes()
        [minute] = [n for n in range(1, 61) if any(data[20 * n : 20 * n + 16])]
        tally.write_bytes(flipped(data, 20 * minute + 8))
        assert sum(store.activity().landed) == 0
        await store.land(BODY)
        assert sum(store.activity().landed) == 1


# ── Packs ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    """A data folder with a pack of ten members, a payload in each."""
    made = Folders(tmp_path / "raw")
    for folder in (made.raw, made.rejected, made.journal, made.processed):
        folder.mkdir(exist_ok=True)
    return made


def packed(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> tuple[Pack, dict[UUID, bytes]]:
    monkeypatch.setattr(packs, "MEMBER_BYTES", 1)
    payloads = processed_in(folders.raw.parent, [b"[%d]" % number for number in range(2, 12)], 2)
    assert compact(folders) == 10
    [pack] = folders.packs()
    _forget()
    return pack, payloads


def _forget() -> None:
    Pack.index.cache_clear()
    Pack.member.cache_clear()


def answers(folders: Folders, payloads: dict[UUID, bytes]) -> list[object]:
    """Return for each payload whether it is read right, or the kind of error."""
    found = list[object]()
    for raw_id, body in payloads.items():
        try:
            found.append(folders.read(raw_id) == ("processed", body))
        except (PackDamaged, RawIdUnknown) as error:
            found.append(type(error))
    return found


INDEXES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda _: None,
    "emptied": lambda _: b"",
    "garbage": lambda data: b"\xff" * len(data),
    "of another": lambda data: data.replace(b'"payloads":10', b'"payloads":11'),
}


@pytest.mark.parametrize("how", INDEXES)
def test_an_index_is_lost(
    how: str, folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """An index that is lost or damaged is made again from its pack, the same as before."""
    pack, payloads = packed(folders, monkeypatch)
    index = Path(f"{pack.path}.index")
    before = index.read_bytes()
    damage(index, INDEXES[how])
    assert any(str(pack.path) in line for line in folders.problems()["data folder"])
    assert answers(folders, payloads) == [True] * 10
    assert any("made again" in line for line in told(caplog))
    assert index.read_bytes() == before
    assert not [line for line in folders.problems()["data folder"] if "pack" in line]
    _forget()
    assert folders.count_processed() == 10
    assert told(caplog) == []


def test_a_flipped_bit_in_an_index(folders: Folders, monkeypatch: pytest.MonkeyPatch):
    """Whichever bit of an index is flipped, every payload is found."""
    pack, payloads = packed(folders, monkeypatch)
    index = Path(f"{pack.path}.index")
    whole = index.read_bytes()
    for place in range(len(whole)):
        index.write_bytes(flipped(whole, place, place % 7))
        _forget()
        assert answers(folders, payloads) == [True] * 10, place


def test_a_flipped_bit_in_a_pack(folders: Folders, monkeypatch: pytest.MonkeyPatch):
    """Whichever bit of a pack is flipped, a payload is read right or said to be damaged.

    Damage costs the payloads of its own member alone, with and without an index.
    """
    pack, payloads = packed(folders, monkeypatch)
    whole, index = pack.path.read_bytes(), Path(f"{pack.path}.index")
    text = index.read_bytes()
    for place in range(0, len(whole), 3):
        for has_index in (True, False):
            index.write_bytes(text)
            if not has_index:
                index.unlink()
            pack.path.write_bytes(flipped(whole, place))
            _forget()
            found = answers(folders, payloads)
            assert set(found) <= {True, PackDamaged}, (place, has_index)
            assert found.count(True) >= 9, (place, has_index)


PACKS: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda _: None,
    "emptied": lambda _: b"",
    "garbage": lambda data: os.urandom(len(data)),
    "another": lambda _: gzip.compress(b""),
}


def read_all(folders: Folders) -> None:
    for source in folders.portions():
        for portion in source.portions:
            list(portion.payloads())


@pytest.mark.parametrize("how", PACKS)
@pytest.mark.parametrize("has_index", [True, False])
def test_a_pack_is_lost(
    how: str, has_index: bool, folders: Folders, monkeypatch: pytest.MonkeyPatch
):
    """Payloads of a pack that is gone or worthless are said to be so, and not to be unknown."""
    pack, payloads = packed(folders, monkeypatch)
    damage(pack.path, PACKS[how])
    if not has_index:
        Path(f"{pack.path}.index").unlink()
    if how == "deleted" and not has_index:  # nobody knows that there was one
        assert answers(folders, payloads) == [RawIdUnknown] * 10
        return
    assert answers(folders, payloads) == [PackDamaged] * 10
    shown = any(str(pack.path) in line for line in folders.problems()["data folder"])
    assert shown or (how, has_index) == ("garbage", True)  # nobody has read it yet
    with pytest.raises(PackDamaged, match=pack.path.name):
        read_all(folders)


def test_a_pack_that_is_lost_is_never_written_over(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
):
    """Late payloads of its day are not packed until it is back, so that its index stays."""
    pack, payloads = packed(folders, monkeypatch)
    kept = pack.path.rename(pack.path.with_name("elsewhere"))
    late = processed_in(folders.raw.parent, [b"late"], 50)
    with pytest.raises(StorageUnavailable, match="restore it"):
        compact(folders)
    kept.rename(pack.path)
    _forget()
    assert compact(folders) == 1
    assert answers(folders, payloads | late) == [True] * 11


async def test_an_index_without_a_pack_that_never_was(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
):
    """Packing that was killed before its pack was there leaves nothing to tell."""
    pack, payloads = packed(folders, monkeypatch)
    pack.path.unlink()
    processed_in(folders.raw.parent, [b"[%d]" % number for number in range(2, 12)], 2)
    assert answers(folders, payloads) == [True] * 10
    assert folders.packs() == []
    assert folders.problems()["data folder"] == []
    assert compact(folders) == 10


async def test_what_the_journal_has_of_a_lost_pack(
    tmp_path: Path, folders: Folders, monkeypatch: pytest.MonkeyPatch
):
    """Payloads of a lost pack that are still in the journal come back."""
    pack, payloads = packed(folders, monkeypatch)
    pack.path.unlink()
    journaled(tmp_path, dict(list(payloads.items())[:4]))
    async with opened(tmp_path) as store:
        assert pending_in(store) == list(payloads)[:4]


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\xff\xfe", b"9999-12-31", b"2026-01-02 00000000"]
)
async def test_what_has_expired_is_not_known(
    content: bytes, tmp_path: Path, folders: Folders, caplog: pytest.LogCaptureFixture
):
    """A damaged note of what has expired never keeps a payload from being recovered."""
    landed = processed_in(tmp_path, [BODY], 2)
    journaled(tmp_path, landed)
    for path in (tmp_path / "processed").rglob("*.json"):
        path.unlink()
    (folders.journal / "expired").write_bytes(content)
    async with opened(tmp_path) as store:
        assert pending_in(store) == list(landed)
        assert store.first_kept_day() == ""
    assert any("expired is damaged" in line for line in told(caplog))
