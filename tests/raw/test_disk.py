"""The system calls below durability, also where the system has fewer of them, as macOS."""

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from stores import land_each, opened, pending_in

from backends.raw import disk

FULL_SYNC = 51  # F_FULLFSYNC of macOS


class Mac:
    """Takes away what Linux alone has, and notes what is synced in its place."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: list[str] = []
        self.handed_over: list[str] = []  # to the drive, which may keep it in its cache
        self.fails = False
        monkeypatch.delattr(os, "fdatasync", raising=False)
        monkeypatch.setattr(disk, "_syncfs", lambda: None)
        monkeypatch.setattr(fcntl, "F_FULLFSYNC", FULL_SYNC, raising=False)
        self._fsync, self._fcntl, self._sync = os.fsync, fcntl.fcntl, os.sync
        monkeypatch.setattr(os, "fsync", self.fsync)
        monkeypatch.setattr(os, "sync", lambda: self.synced.append("everything"))
        monkeypatch.setattr(fcntl, "fcntl", self.fcntl)

    def fsync(self, descriptor: int) -> None:
        self.handed_over.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        self._fsync(descriptor)

    def fcntl(self, descriptor: int, command: int, argument: int = 0) -> object:
        if command != FULL_SYNC:
            return self._fcntl(descriptor, command, argument)
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._fsync(descriptor)
        self.synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        return 0


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mac]:
    return Mac(monkeypatch)


@pytest.mark.linux
async def test_macos_lands(mac: Mac, tmp_path: Path):
    """Without fdatasync and syncfs the drive has a record, and each file, before the 202."""
    async with opened(tmp_path) as store:
        mac.handed_over.clear()
        raw_ids = await land_each(store, [b"1", b"2"])
        [log] = (tmp_path / "journal").glob("*.log")
        assert str(log) in mac.synced
        assert [name.endswith(".part") for name in mac.handed_over].count(True) == len(raw_ids)
        assert pending_in(store) == raw_ids
    assert not list((tmp_path / "journal").glob("*.log"))


@pytest.mark.linux
async def test_macos_empties_a_log_behind_a_sync(mac: Mac, tmp_path: Path):
    """Without syncfs a log is emptied behind a sync of all and one of the drive, or not at all."""
    async with opened(tmp_path) as store:
        await store.land(b"1")
        mac.synced.clear()
    assert mac.synced[:2] == ["everything", str(tmp_path / "journal")]


@pytest.mark.linux
async def test_macos_refuses_what_the_drive_refuses(mac: Mac, tmp_path: Path):
    """Where the drive does not take a record, nothing is acknowledged, and nothing stays."""
    landed: list[UUID] = []
    async with opened(tmp_path) as store:
        landed += await store.land(b"1")
        mac.fails = True
        with pytest.raises(disk.StorageUnavailable):
            await store.land(b"2")
        mac.fails = False
        landed += await store.land(b"3")
        assert pending_in(store) == landed
    async with opened(tmp_path) as store:
        assert pending_in(store) == landed


@pytest.mark.linux
def test_a_system_without_full_syncs(mac: Mac, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where there is not even F_FULLFSYNC, fsync does."""
    monkeypatch.delattr(fcntl, "F_FULLFSYNC")
    file = tmp_path / "file"
    with file.open("wb") as opened_file:
        disk.sync_data(opened_file.fileno())
    assert mac.synced == []


def test_what_is_no_bad_block_is_an_error(tmp_path: Path):
    """Only blocks that a disk cannot read are taken for zeros; any other error is raised."""
    (tmp_path / "file").write_bytes(b"0123456789")
    file, folder = os.open(tmp_path / "file", os.O_RDONLY), os.open(tmp_path, os.O_RDONLY)
    try:
        assert disk.read_around(file, 3, 4) == b"3456"
        assert disk.read_around(file, 8, 4) == b"89"
        with pytest.raises(IsADirectoryError):
            disk.read_around(folder, 0, 4)
    finally:
        os.close(file)
        os.close(folder)


def test_a_sync_that_fails_is_an_error(tmp_path: Path):
    """Where the system does not sync a file system, whoever asked hears it, and why."""
    descriptor = os.open(tmp_path, os.O_RDONLY)
    disk.sync_file_system(descriptor)
    os.close(descriptor)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        disk.sync_file_system(descriptor)


@pytest.mark.linux
def test_new_folders_are_synced(mac: Mac, tmp_path: Path):
    """Of folders that are made all names are on the disk, from the first one that was there."""
    disk.make_folder(tmp_path / "a" / "b")
    assert mac.handed_over == [str(tmp_path), str(tmp_path / "a")]
    disk.make_folder(tmp_path / "a" / "b")
    assert len(mac.handed_over) == 2


def test_nobody_waits_for_work_that_hangs():
    """Hands are let go while one hangs at the disk; then they take no more work."""
    hands, goes_on = disk.Hands(1, "hand"), threading.Event()
    hanging = hands.submit(goes_on.wait)
    letting_go = threading.Thread(target=hands.shutdown, kwargs={"wait": False}, daemon=True)
    letting_go.start()
    letting_go.join(10)
    assert not letting_go.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        hands.submit(goes_on.wait)
    goes_on.set()
    assert hanging.result(10) is True
    hands.shutdown()
