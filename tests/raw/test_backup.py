"""Backups: what a store is opened on afterwards has everything, whatever went on meanwhile."""

import errno
import itertools
import os
import shutil
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from power_cut import copy_as_it_lies, device_of, disk, may_mount, mounted
from stores import land_each, names_of, opened, pending_in
from uuid_utils.compat import uuid7

from backends.raw import Copied, FolderTaken, Rejection, StorageUnavailable, day_of, uuid_at
from backends.raw.backup import new_folder
from backends.raw.landing import RawStore

LONG_AGO = uuid_at(datetime(2023, 7, 1, 12, tzinfo=UTC))
MEMORY = Path("/dev/shm")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def store(folder: Path) -> AsyncIterator[RawStore]:
    async with opened(folder) as store:
        yield store


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    assert MEMORY.stat().st_dev != tmp_path.stat().st_dev, "run with --basetemp on a disk"
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        yield Path(name)


def rejection_of(raw_id: UUID) -> Rejection:
    return Rejection(raw_id, "value_not_numeric", "data[0]", datetime(2026, 1, 1, tzinfo=UTC))


async def landed(store: RawStore, *bodies: bytes) -> list[UUID]:
    return [(await store.land(body))[0] for body in bodies]


async def in_every_state(store: RawStore) -> dict[UUID, bytes]:
    """Land payloads, one for each state, and one that was put back; return all."""
    bodies = [b"pending", b"processed", b"rejected", b"put back", b"packed", b"late"]
    raw_ids = await landed(store, *bodies[:4])
    store.settle(names_of(raw_ids[1]), map(rejection_of, raw_ids[2:4]))
    assert store.retry(raw_ids[3])
    for raw_id, body in ((LONG_AGO, b"packed"), (UUID(int=LONG_AGO.int + 1), b"late")):
        day = store.processed / day_of(raw_id)
        day.mkdir()
        (day / f"{raw_id}.json").write_bytes(body)
        raw_ids.append(raw_id)
        if body == b"packed":
            assert store.compact(day.name) == 1
    return dict(zip(raw_ids, bodies, strict=True))


def back_up(store: RawStore, target: Path) -> list[Copied]:
    with store.new_backup(target) as part:
        return list(store.back_up(part))


def counted(copied: Iterable[Copied]) -> dict[str, int]:
    kinds = sorted(each.kind for each in copied if each.kind != "besides")
    return {kind: len(list(files)) for kind, files in itertools.groupby(kinds)}


def bytes_in(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


async def assert_same(store: RawStore, target: Path) -> None:
    """A store that is opened on the backup is as this one in all that can be asked."""
    before = bytes_in(target)
    async with opened(target) as copy:
        assert pending_in(copy) == pending_in(store)
        assert list(copy.rejections()) == list(store.rejections())
        assert copy.count_processed() == store.count_processed()
        assert copy.activity() == store.activity()
        assert copy.first_kept_day() == store.first_kept_day()
        for raw_id in pending_in(store):
            assert copy.last_rejection(raw_id) == store.last_rejection(raw_id)
    after = bytes_in(target)
    assert {name: after[name] for name in before if "journal" not in name} == {
        name: body for name, body in before.items() if "journal" not in name
    }


# ── What is in it ─────────────────────────────────────────────────────────────────────────────────


async def test_every_state(store: RawStore, tmp_path: Path):
    """Each payload is there in its state, byte for byte, with its reason, and packs are."""
    payloads = await in_every_state(store)
    store.publish(store.journal / "expired", b"2023-06-30")
    copied = back_up(store, tmp_path / "backup")
    assert counted(copied) == {"packs": 1, "pending": 2, "processed": 2, "rejected": 1}
    await assert_same(store, tmp_path / "backup")
    async with opened(tmp_path / "backup") as copy:
        for raw_id, body in payloads.items():
            assert copy.read(raw_id) == (store.read(raw_id)[0], body)


@pytest.mark.linux
async def test_on_another_file_system(store: RawStore, folder: Path, elsewhere: Path):
    """Elsewhere the files are copies, of the same bytes, rights and time; here they are links."""
    await in_every_state(store)
    (raw_id, *_) = pending_in(store)
    source = store.path(raw_id, "pending")
    source.chmod(0o640)
    os.utime(source, (1, 2))
    for target, links in ((folder.parent / "here", 2), (elsewhere / "there", 1)):
        copied = back_up(store, target)
        assert {each.is_link for each in copied if each.kind == "pending"} == {links == 2}
        copy = (target / "raw" / source.name).stat()
        assert (copy.st_nlink, copy.st_mode, copy.st_mtime) == (links, source.stat().st_mode, 2)
        await assert_same(store, target)
        source.chmod(0o600)


async def test_links_are_copies(store: RawStore, folder: Path):
    """Whatever becomes of the payloads later, those in the backup stay as they were."""
    payloads = await in_every_state(store)
    back_up(store, folder.parent / "backup")
    before = bytes_in(folder.parent / "backup")
    pending = pending_in(store)
    for raw_id in pending:
        store.restore(raw_id, b"written again", "", force=True)
    store.settle([], map(rejection_of, pending))
    for raw_id in payloads:
        store.retry(raw_id)
    for day in store.finished_days():
        assert store.compact(day) == 1
    assert bytes_in(folder.parent / "backup") == before
    shutil.rmtree(store.processed)
    assert bytes_in(folder.parent / "backup") == before


async def test_idempotency_keys(store: RawStore, folder: Path):
    """A key that was used before the backup gives its answer from it, one used later does not.

    Or else a device would hear 202 for a payload that is not there.
    """
    before = await store.land(b"1", "before")
    with store.new_backup(folder.parent / "backup") as part:
        files = store.back_up(part)
        assert next(files).kind == "pending"
        meanwhile = await store.land(b"2", "meanwhile")
        list(files)
    async with opened(folder.parent / "backup") as copy:
        assert await copy.land(b"1", "before") == before
        assert await copy.land(b"2", "meanwhile") != meanwhile
        assert [copy.read(raw_id)[1] for raw_id in pending_in(copy)][-1] == b"2"


async def test_raw_ids_never_go_back(folder: Path):
    """A store that was restored goes on behind all raw_ids, also with a clock that was set back."""
    ahead = uuid_at(datetime.now(UTC) + timedelta(days=1))
    (folder / "journal").mkdir(parents=True)
    (folder / "journal" / "last_raw_id").write_bytes(ahead.bytes)
    async with opened(folder) as store:
        with store.new_backup(folder.parent / "backup") as part:
            for _ in store.back_up(part):
                pass
        [last] = await store.land(b"2")
    async with opened(folder.parent / "backup") as copy:
        assert (await copy.land(b"3"))[0] > ahead
    assert last > ahead


async def test_counter_is_copied_last(store: RawStore, folder: Path):
    """No payload in the backup has a raw_id that the restored store could give out again."""
    ahead = uuid_at(datetime.now(UTC) + timedelta(days=1))
    await landed(store, b"1")
    with store.new_backup(folder.parent / "backup") as part:
        files = store.back_up(part)
        next(files)
        (store.journal / "last_raw_id").write_bytes(ahead.bytes)
        list(files)
    async with opened(folder.parent / "backup") as copy:
        assert (await copy.land(b"2"))[0] > ahead


async def test_strays_stay_where_they_are(store: RawStore, folder: Path):
    """What is no payload, or half a pack, is no part of the backup."""
    await in_every_state(store)
    strays = ("raw/notes.txt", "rejected/x.json", "processed/2023-07-01.ndjson.part")
    for name in (*strays, "journal/1.part"):
        (folder / name).write_bytes(b"mine")
    back_up(store, folder.parent / "backup")
    assert b"mine" not in bytes_in(folder.parent / "backup").values()


# ── Meanwhile ─────────────────────────────────────────────────────────────────────────────────────


async def test_retried_meanwhile(store: RawStore, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A payload that is put back at any moment of the backup is in it once, pending or rejected."""
    raw_ids = await landed(store, *(b"%d" % number for number in range(12)))
    store.settle([], map(rejection_of, raw_ids[2:]))
    before, behind = (
        {store.path(raw_id, "rejected") for raw_id in ids} for ids in (raw_ids[2:5], raw_ids[5:8])
    )
    link = os.link

    def link_and_retry(source: str, target: str) -> None:
        if Path(source) in before:
            assert store.retry(UUID(Path(source).stem))
        link(source, target)
        if Path(source) in behind:
            assert store.retry(UUID(Path(source).stem))

    monkeypatch.setattr(os, "link", link_and_retry)
    copied = back_up(store, folder.parent / "backup")
    assert counted(copied) == {"pending": 2 + 3 + 3, "rejected": 4}
    async with opened(folder.parent / "backup") as copy:
        assert pending_in(copy) == raw_ids[:8]
        assert [rejection.raw_id for rejection in copy.rejections()] == raw_ids[8:]
        assert all(copy.read(raw_id) == store.read(raw_id) for raw_id in raw_ids)
    names = [file.name for file in (folder.parent / "backup").rglob("*.json")]
    assert len(names) == len(set(names))


async def test_processed_between_the_two_rounds(store: RawStore, folder: Path):
    """What is processed behind the first round is found by the second; nothing is told twice."""
    raw_ids = await landed(store, b"1", b"2", b"3")
    store.settle(names_of(raw_ids[0]), [])
    with store.new_backup(folder.parent / "backup") as part:
        first = list(store.back_up(part, processed_alone=True))
        store.settle(names_of(raw_ids[1]), [])
        second = list(store.back_up(part))
    assert counted(first) == {"processed": 1}
    assert counted(second) == {"processed": 1, "pending": 1}
    await assert_same(store, folder.parent / "backup")


async def test_landing_meanwhile(store: RawStore, folder: Path):
    """Payloads may land faster than they are copied: a backup comes to its end all the same."""
    raw_ids = await land_each(store, (b"%d" % number for number in range(1000)))
    copied = list[Copied]()
    with store.new_backup(folder.parent / "backup") as part:
        for each in store.back_up(part):
            copied.append(each)
            for _ in range(2):
                store.publish(store.path(uuid7(), "pending"), b"late")
    assert counted(copied) == {"pending": 1000}
    async with opened(folder.parent / "backup") as copy:
        assert pending_in(copy) == raw_ids


async def test_refused_meanwhile(store: RawStore, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """A payload whose landing is taken back while the backup is at it is no reason to give up."""
    raw_ids = await landed(store, b"1", b"2", b"3")
    link = os.link

    def link_late(source: str, target: str) -> None:
        if str(raw_ids[1]) in source:
            os.unlink(source)
        link(source, target)

    monkeypatch.setattr(os, "link", link_late)
    assert counted(back_up(store, folder.parent / "backup")) == {"pending": 2}


async def test_what_only_the_journal_has(folder: Path):
    """Where no service has recovered since a power cut, the command does, and misses nothing."""
    async with opened(folder) as store:
        [raw_id] = await store.land(b"1")
        crashed = folder.parent / "crashed"
        shutil.copytree(folder, crashed)
    (crashed / "raw" / f"{raw_id}.json").write_bytes(b"")
    async with opened(crashed) as store:
        back_up(store, folder.parent / "backup")
    assert (folder.parent / "backup" / "raw" / f"{raw_id}.json").read_bytes() == b"1"


# ── Trouble ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("state", ["raw", "rejected", "processed/2023-07-01"])
async def test_a_file_that_cannot_be_read(store: RawStore, folder: Path, state: str):
    """It is told by its name, and everything else is in the backup."""
    payloads = await in_every_state(store)
    broken = folder / state / "01890a5d-ac96-774b-bcce-b302099a8057.json"
    broken.mkdir()
    troubles = [each for each in back_up(store, folder.parent / "backup") if each.trouble]
    assert {each.trouble for each in troubles} == {f"{broken} cannot be read: Is a directory"}
    async with opened(folder.parent / "backup") as copy:
        assert all(copy.read(raw_id)[1] == body for raw_id, body in payloads.items())
    assert not (folder.parent / "backup" / state / broken.name).exists()


async def test_a_full_disk(store: RawStore, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the disk is full nothing is kept, and the error says why."""
    await in_every_state(store)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(StorageUnavailable, match=r"nothing was kept: .*backup: No space left"):
        back_up(store, folder.parent / "backup")
    assert [file.name for file in folder.parent.iterdir()] == ["data"]


@pytest.mark.parametrize(
    "name", ["raw", "processed", "rejected/x", "processed/2023-07-01/x", "journal/x"]
)
async def test_not_among_the_payloads(store: RawStore, folder: Path, name: str):
    """A backup cannot lie where it would be taken for payloads."""
    (folder / name).parent.mkdir(exist_ok=True)
    before = sorted(folder.rglob("*"))
    with pytest.raises(FolderTaken, match="name a folder elsewhere"):
        back_up(store, folder / name)
    assert sorted(folder.rglob("*")) == before


def test_the_name_comes_last(tmp_path: Path):
    """A folder has its name when all in it is written, and is for its owner alone."""
    target = tmp_path / "backup"
    with new_folder(target, ()) as part:
        (part / "file").touch()
        assert not target.exists()
        assert part.name.endswith(".part")
    assert [file.name for file in target.iterdir()] == ["file"]
    assert target.stat().st_mode & 0o777 == 0o700
    assert [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_of_half(tmp_path: Path, error: type[BaseException]):
    """Whatever stops it, no half of a backup is left."""
    expected = StorageUnavailable if error is OSError else error
    with pytest.raises(expected), new_folder(tmp_path / "backup", ()) as part:  # noqa: PT012
        (part / "below").mkdir()
        raise error
    assert not [*tmp_path.iterdir()]


def test_no_folder_is_taken(tmp_path: Path):
    """A folder that holds something, a file and a mount are refused; an empty folder is used."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"mine")
    for name in ("full", "full/file", "nowhere/backup"):
        with pytest.raises(FolderTaken), new_folder(tmp_path / name, ()):
            pass
    with pytest.raises(FolderTaken, match="where a disk is mounted"), new_folder(Path("/"), ()):
        pass
    assert bytes_in(tmp_path) == {"full/file": b"mine"}
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty", ()) as part:
        (part / "file").touch()
    assert (tmp_path / "empty" / "file").exists()


async def test_keys_can_be_read_alone(store: RawStore, folder: Path):
    """The copy of the keys is one whole file, while the original is still being written to."""
    await store.land(b"1", "key")
    back_up(store, folder.parent / "backup")
    names = [file.name for file in (folder.parent / "backup" / "journal").iterdir()]
    assert sorted(names) == ["keys.sqlite", "last_raw_id", "node", "tally"]
    alone = folder.parent / "alone.sqlite"
    shutil.copy(folder.parent / "backup" / "journal" / "keys.sqlite", alone)
    with closing(sqlite3.connect(alone)) as keys:
        assert keys.execute("SELECT key, landed FROM keys").fetchall() == [("key", 1)]


@pytest.mark.linux
@pytest.mark.parametrize("is_elsewhere", [False, True])
async def test_power_cut(tmp_path: Path, is_elsewhere: bool, record_property):
    """Once it has its name, a backup outlives the loss of power, the payloads' own sync or not."""
    if not may_mount(tmp_path):
        record_property("note", "NO REAL POWER CUT: mounting is not allowed here. Run it as root.")
        return
    with disk("ext4", tmp_path) as (image, where):
        folder = (tmp_path if is_elsewhere else where) / "data"
        async with opened(folder) as store:
            raw_ids = await landed(store, *(b"%d" % number for number in range(200)))
            store.settle(names_of(*raw_ids[:50]), map(rejection_of, raw_ids[50:100]))
            back_up(store, where / "backup")
            copy_as_it_lies(image, device_of(where), tmp_path / "copy.img")
    with (
        mounted(tmp_path / "copy.img", tmp_path / "after", "-o", "loop") as where,
        tempfile.TemporaryDirectory() as restored,
    ):
        shutil.copytree(where / "backup", restored, dirs_exist_ok=True)
        async with opened(Path(restored)) as copy:
            for number, raw_id in enumerate(raw_ids):
                state = ("processed", "rejected", "pending", "pending")[number // 50]
                assert copy.read(raw_id) == (state, b"%d" % number)
