"""The file of the Idempotency-Keys: for how long it keeps them, and what damage costs."""

import resource
import sqlite3
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest

import backends.raw.keys
from backends.raw import uuid_at
from backends.raw.keys import Keys, KeyUse


def use_of(number: int, **age: float) -> KeyUse:
    """Return the use of a key that landed now, or some time ago."""
    raw_id = UUID(int=uuid_at(datetime.now(UTC) - timedelta(**age)).int + number)
    return KeyUse(f"key {number:03}", b"%32d" % number, [raw_id], landed=True)


USES = [use_of(number) for number in range(40)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.sqlite"


@pytest.fixture
def keys(file: Path) -> Iterator[Keys]:
    """Return open keys that have USES, all of them in the file itself, and not in SQLite's log."""
    made = Keys(file)
    made.open(is_expected=False)
    made.note_landed(USES)
    made.close()
    made.open(is_expected=True)
    yield made
    made.close()


def known(keys: Keys) -> list[KeyUse | None]:
    return [keys.find(use.key) for use in USES]


def set_aside_of(file: Path) -> set[str]:
    """Return what was set aside: the ends of the names."""
    names = {each.name for each in file.parent.iterdir()}
    return {name[-4:] for name in names - {f"{file.name}{end}" for end in ("", "-wal", "-shm")}}


def lose_from_index(file: Path, use: KeyUse) -> None:
    """Damage the index alone: it has another key in the place of this one."""
    data = file.read_bytes()
    place = data.rindex(use.key.encode())  # it lies behind the table
    file.write_bytes(data[:place] + b"kez" + data[place + 3 :])


def test_keys_are_known_for_a_day(keys: Keys, file: Path):
    """A key is known for 24 hours and no longer, and then leaves nothing behind."""
    late, early = use_of(1, hours=23, minutes=59), use_of(2, hours=24, minutes=1)
    keys.note_landed([late, early])
    assert (keys.find(late.key), keys.find(early.key)) == (late, None)
    keys.drop_old()
    reader = sqlite3.connect(file)
    kept = {key for (key,) in reader.execute("SELECT key FROM keys")}
    reader.close()
    assert kept == {use.key for use in USES} - {early.key}


def test_an_index_that_has_lost_a_key(keys: Keys, file: Path):
    """Damage that lets a key seem unknown is noticed at the start, and costs no key."""
    keys.close()
    lose_from_index(file, USES[3])
    keys.open(is_expected=True)
    assert known(keys) == USES
    assert set_aside_of(file) != set()


def test_damage_that_is_met_later(keys: Keys, file: Path, monkeypatch: pytest.MonkeyPatch):
    """So is damage of a file too large to be looked through, when something is to be done there."""
    monkeypatch.setattr(backends.raw.keys, "LOOKED_THROUGH", 0)
    keys.note_landed([use_of(3, days=2)])
    keys.close()
    lose_from_index(file, USES[3])
    keys.open(is_expected=True)
    assert set_aside_of(file) == set()
    keys.drop_old()
    assert set_aside_of(file) != set()
    assert known(keys) == [*USES[:3], None, *USES[4:]]


def test_what_is_set_aside_is_whole(keys: Keys, file: Path):
    """What SQLite's log has of a damaged file goes with it, and never into the new one."""
    other = Keys(file)
    other.open(is_expected=True)
    writer = sqlite3.connect(file)
    with writer:
        writer.execute("UPDATE keys SET digest = 'wrong' WHERE key = ?", (USES[5].key,))
    assert keys.find(USES[5].key) is None
    other.follow()
    expected = [*USES[:5], None, *USES[6:]]
    assert known(keys) == known(other) == expected
    aside = set_aside_of(file)
    assert {"-wal", "-shm"} < aside
    assert len(aside) == 3
    writer.close()
    other.close()


def test_a_disk_that_refuses_is_no_damage(keys: Keys, file: Path):
    """A key that cannot be noted since the disk is full is an error, and the file stays."""
    inode, limits = file.stat().st_ino, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(sqlite3.Error):
            keys.note_landed(USES[:1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.stat().st_ino == inode
    assert set_aside_of(file) == set()
    keys.note_landed([late := use_of(50)])
    assert [*known(keys), keys.find(late.key)] == [*USES, late]
