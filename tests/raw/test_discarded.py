"""Discarding: payloads in any state go, whole and for good, and can be put back."""

import shutil
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from stores import lines, opened
from test_batches import KINDS, first_at, proved, put, rejection_of

from backends.raw import PackDamaged, PayloadUnreadable, RawIdUnknown, Rejection, name_of
from backends.raw.folders import Folders

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
THEN = datetime(2024, 3, 1, 12, tzinfo=UTC)  # a day that is finished
DAY = "2024-03-01"
BODIES = [b'{"n": %d}' % number for number in range(5)]
NDJSON = KINDS["lines"]


def folders_in(folder: Path, keep_days: int = 0) -> Folders:
    for name in ("raw", "processed", "rejected", "discarded", "journal"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Folders(folder / "raw", keep_days=keep_days)


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return folders_in(tmp_path)


def pending(folders: Folders) -> list[UUID]:
    """Return the raw_ids of five payloads: two that came alone, and a batch of three."""
    alone = [first_at(THEN, 0, number) for number in range(2)]
    for raw_id, body in zip(alone, BODIES, strict=False):
        folders.path(raw_id, "pending").write_bytes(body)
    _, batch = put(folders, NDJSON, BODIES[2:], THEN, number=7)
    return [*alone, *batch]


def processed(folders: Folders) -> list[UUID]:
    raw_ids = pending(folders)
    folders.settle(folders.pending()[0], [])
    return raw_ids


def rejected(folders: Folders) -> list[UUID]:
    raw_ids = pending(folders)
    batches = [name for name in folders.pending()[0] if name.endswith("ndjson")]
    folders.settle(batches, [rejection_of(raw_id) for raw_id in raw_ids])
    return raw_ids


def packed(folders: Folders) -> list[UUID]:
    raw_ids = processed(folders)
    assert folders.compact(DAY) == 5
    return raw_ids


def left_by_a_crash(folders: Folders) -> list[UUID]:
    """The pack is written, and the files that are in it are still there."""
    raw_ids = processed(folders)
    day, copy = folders.processed / DAY, folders.raw.parent / "copy"
    shutil.copytree(day, copy)
    folders.compact(DAY)
    copy.rename(day)
    return raw_ids


STATES = {
    "pending": pending,
    "processed": processed,
    "rejected": rejected,
    "packed": packed,
    "packed, and still files": left_by_a_crash,
}


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> str:
    return request.param


def counts(folders: Folders) -> Counter[str]:
    """Return how many payloads the folders count in each state."""
    found = {"pending": folders.count_pending(), "processed": folders.count_processed()}
    found |= {"rejected": folders.take_stock().total(), "discarded": folders.count_discarded()}
    return +Counter(found)


def states_of(folders: Folders, raw_ids: list[UUID]) -> list[str]:
    """Return the states of the five payloads, which are to be what they were."""
    found = [folders.read(raw_id) for raw_id in raw_ids]
    assert [body for _, body in found] == BODIES
    return [where for where, _ in found]


@pytest.mark.parametrize("at", range(5))
def test_discard_one(folders: Folders, state: str, at: int):
    """A payload in any state is discarded, and no other; looks-up, counts and proofs know it."""
    raw_ids = STATES[state](folders)
    [was, *_] = {where for where, _ in map(folders.read, raw_ids)}
    for expected in ([raw_ids[at]], []):
        assert folders.discard([raw_ids[at]], NOON) == expected
        assert folders.path(raw_ids[at], "discarded").read_bytes() == BODIES[at]
        assert states_of(folders, raw_ids) == [
            "discarded" if number == at else was for number in range(5)
        ]
        assert folders.discarded_at(raw_ids[at]).discarded_at == NOON
        if state != "packed, and still files":
            assert counts(folders) == {"discarded": 1, was: 4}
            assert (raw_ids[at] in proved(folders), len(proved(folders))) == (
                False,
                4 if was == "processed" else 0,
            )


def test_discard_all(folders: Folders, state: str):
    """All payloads can go together, a batch that is pending, too, of which nothing remains."""
    raw_ids = STATES[state](folders)
    assert sorted(folders.discard(raw_ids, NOON)) == raw_ids
    assert states_of(folders, raw_ids) == ["discarded"] * 5
    assert counts(folders)["pending"] == 0
    assert folders.pending() == ([], 0)
    assert folders.rejected_names() == []
    assert list((folders.rejected).iterdir()) == []
    for day in folders.finished_days():
        folders.compact(day)
    assert counts(folders) == {"discarded": 5}
    assert proved(folders) == {}


def test_undiscard(folders: Folders, state: str):
    """What is put back is pending again, is processed once, and is packed with the others."""
    raw_ids = STATES[state](folders)
    folders.discard(raw_ids, NOON)
    assert [folders.undiscard(raw_id) for raw_id in raw_ids[1:4]] == [True] * 3
    assert states_of(folders, raw_ids) == ["discarded", *["pending"] * 3, "discarded"]
    assert counts(folders)["pending"] == 3
    with pytest.raises(RawIdUnknown):
        folders.discarded_at(raw_ids[1])
    assert not folders.undiscard(raw_ids[1])
    folders.settle(folders.pending()[0], [])
    assert states_of(folders, raw_ids) == ["discarded", *["processed"] * 3, "discarded"]
    folders.compact(DAY)
    assert counts(folders) == {"processed": 3, "discarded": 2}
    assert sorted(proved(folders)) == raw_ids[1:4]
    folders.discard(raw_ids[1:2], NOON)
    assert counts(folders) == {"processed": 2, "discarded": 3}
    assert sorted(proved(folders)) == raw_ids[2:4]


def test_a_pack_leaves_out_what_is_discarded(folders: Folders):
    """A day is packed without what was discarded before, byte for byte."""
    raw_ids = processed(folders)
    folders.discard([raw_ids[0], raw_ids[3]], NOON)
    assert folders.compact(DAY) == 3
    [pack] = folders.packs()
    assert pack.index().payloads == 3
    assert not any(pack.has(raw_ids[at]) for at in (0, 3))
    assert states_of(folders, raw_ids)[0] == "discarded"


def test_the_reason_goes_along(folders: Folders):
    """A rejected payload takes its reason along, there and back, and its retries still count."""
    raw_ids = rejected(folders)
    folders.retry(raw_ids[2])
    folders.settle([], [rejection_of(raw_ids[2])])
    known = folders.rejection(raw_ids[2])
    assert known.retries == 1
    folders.discard(raw_ids[2:3], NOON)
    assert not folders.reason(raw_ids[2]).exists()
    assert folders.last_rejection(raw_ids[2]) == known
    with pytest.raises(RawIdUnknown):
        folders.rejection(raw_ids[2])
    assert [each.raw_id for each in folders.find_rejections()[0]] == [
        raw_id for raw_id in raw_ids if raw_id != raw_ids[2]
    ]
    folders.undiscard(raw_ids[2])
    assert folders.last_rejection(raw_ids[2]) == known


def test_unknown(folders: Folders):
    """What is not there is not discarded, and cannot be put back."""
    raw_ids = pending(folders)
    unknown = first_at(THEN, 0, 99)
    assert folders.discard([unknown, raw_ids[0]], NOON) == raw_ids[:1]
    assert not folders.undiscard(unknown)
    assert not folders.undiscard(raw_ids[1])


def test_a_damaged_batch_goes_as_one(folders: Folders):
    """A batch that was rejected as it is damaged is discarded and put back as one."""
    name, raw_ids = put(folders, NDJSON, BODIES, THEN)
    (folders.raw / name).write_bytes(b"torn")
    reason = Rejection(raw_ids[0], "payload_unreadable", "damaged", NOON)
    folders.settle([name], [reason])
    assert folders.discard([raw_ids[0]], NOON) == [raw_ids[0]]
    assert (folders.discarded / DAY / name).read_bytes() == b"torn"
    assert counts(folders) == {"discarded": 5}
    assert folders.discard([raw_ids[0]], NOON) == []
    assert folders.undiscard(raw_ids[0])
    assert folders.pending() == ([name], 5)
    assert folders.last_rejection(raw_ids[0]) == reason


def test_damage_is_told(folders: Folders):
    """What cannot be read from its batch or pack stays where it is, and whoever asks hears why."""
    raw_ids = processed(folders)
    name = name_of(raw_ids[2], 3, "ndjson")
    (folders.processed / DAY / name).write_bytes(b"torn")
    with pytest.raises(PayloadUnreadable):
        folders.discard([raw_ids[0], raw_ids[3]], NOON)
    assert folders.count_discarded() == 0
    (folders.processed / DAY / name).write_bytes(b"\n".join(BODIES[2:]))
    folders.compact(DAY)
    [pack] = folders.packs()
    content = bytearray(pack.path.read_bytes())
    content[40:60] = bytes(20)
    pack.path.write_bytes(content)
    fresh = Folders(folders.raw)  # which has read none of it
    pack.path.touch()
    with pytest.raises(PackDamaged):
        fresh.discard([raw_ids[3]], NOON)
    assert folders.count_discarded() == 0


def test_a_note_that_is_damaged_is_found_again(folders: Folders):
    """Where the note of a pack is damaged, what is discarded or came back is no more in it."""
    raw_ids = packed(folders)
    folders.discard(raw_ids[1:4], NOON)
    folders.undiscard(raw_ids[2])
    [note] = (folders.journal / "batches").glob("*.gz.left")
    note.write_bytes(note.read_bytes()[:-3])
    assert counts(folders) == {"processed": 2, "pending": 1, "discarded": 2}
    assert sorted(proved(folders)) == [raw_ids[0], raw_ids[4]]
    folders.discard(raw_ids[:1], NOON)
    assert counts(folders) == {"processed": 1, "pending": 1, "discarded": 3}


def test_lost_pack_of_the_same_name(folders: Folders):
    """A note that is left of a pack which is no more hides nothing in the next one."""
    raw_ids = packed(folders)
    folders.discard(raw_ids[:1], NOON)
    [pack] = folders.packs()
    pack.remove()
    folders.undiscard(raw_ids[0])
    folders.settle(folders.pending()[0], [])
    assert folders.compact(DAY) == 1
    assert folders.read(raw_ids[0]) == ("processed", BODIES[0])
    assert counts(folders) == {"processed": 1}


def test_expire(tmp_path: Path):
    """`keep_days` deletes discarded payloads of the days before, too, and their notes."""
    folders = folders_in(tmp_path, keep_days=10)
    raw_ids = packed(folders)
    recent = first_at(datetime.now(UTC) - timedelta(days=9), 0)
    folders.path(recent, "pending").write_bytes(b"{}")
    folders.discard([*raw_ids[:3], recent], NOON)
    assert folders.expire() == [f"{DAY}.ndjson.gz", f"discarded/{DAY}"]
    for raw_id in raw_ids:
        with pytest.raises(RawIdUnknown):
            folders.read(raw_id)
    assert folders.read(recent) == ("discarded", b"{}")
    assert list((folders.journal / "batches").iterdir()) == []
    assert counts(folders) == {"discarded": 1}
    assert Folders(folders.raw).expire() == []


async def test_recovery_leaves_them_alone(tmp_path: Path):
    """After a power cut the journal does not bring back what was discarded meanwhile."""
    async with opened(tmp_path / "data") as store:
        [alone] = await store.land(BODIES[0])
        batch = list(await store.land(**lines(*BODIES[1:])))
        store.discard([alone, batch[1]], NOON)
        shutil.copytree(tmp_path / "data", tmp_path / "copy")
    for _ in range(2):
        async with opened(tmp_path / "copy") as again:
            assert states_of(again, [alone, *batch]) == [
                *("discarded", "pending", "discarded", "pending", "pending")
            ]
            assert counts(again) == {"pending": 3, "discarded": 2}


async def test_keys(tmp_path: Path):
    """An Idempotency-Key of a discarded payload gets the answer that it got before."""
    async with opened(tmp_path) as store:
        first = await store.land(BODIES[0], "key")
        batch = list(await store.land(**lines(*BODIES[1:]), key="batch"))
        store.discard([*first, *batch], NOON)
        assert await store.land(BODIES[0], "key") == first
        assert list(await store.land(**lines(*BODIES[1:]), key="batch")) == batch
        assert counts(store) == {"discarded": 5}


async def test_raw_ids_go_on(tmp_path: Path):
    """Where the counter is lost, raw_ids go on behind those of discarded payloads."""
    async with opened(tmp_path) as store:
        late = first_at(datetime.now(UTC) + timedelta(days=1), 0)
        store.path(late, "pending").write_bytes(b"{}")
        store.discard([late], NOON)
    (tmp_path / "journal" / "last_raw_id").unlink()
    async with opened(tmp_path) as again:
        [fresh] = await again.land(b"{}")
        assert fresh > late


async def test_backup(tmp_path: Path):
    """A backup has what is discarded, when and why, what has left packs, and unfinished work."""
    async with opened(tmp_path / "data") as store:
        raw_ids = packed(store)
        store.discard(raw_ids[1:4], NOON)
        (store.journal / "discarding.json").write_bytes(b"{}")
        with store.new_backup(tmp_path / "copy") as part:
            kinds = Counter(copied.kind for copied in store.back_up(part))
    assert kinds["discarded"] == 3
    assert (tmp_path / "copy" / "journal" / "discarding.json").read_bytes() == b"{}"
    async with opened(tmp_path / "copy") as again:
        states = ["processed", *["discarded"] * 3, "processed"]
        assert states_of(again, raw_ids) == states
        assert again.discarded_at(raw_ids[1]).discarded_at == NOON
        assert counts(again) == {"processed": 2, "discarded": 3}
        assert sorted(proved(again)) == [raw_ids[0], raw_ids[4]]


def test_changed(folders: Folders):
    """A look at the number of discarded payloads tells when it may be another one."""
    raw_ids = pending(folders)
    before = folders.changed("discarded")
    folders.discard(raw_ids[:1], NOON)
    between = folders.changed("discarded")
    folders.undiscard(raw_ids[0])
    assert len({before, between, folders.changed("discarded")}) == 3


def test_what_came_back_is_rejected(folders: Folders):
    """A payload that left its pending batch, and was put back, is rejected beside that batch."""
    raw_ids = pending(folders)
    folders.discard(raw_ids[2:3], NOON)
    folders.undiscard(raw_ids[2])
    names, count = folders.pending()
    assert (len(names), count) == (4, 5)
    names.remove(f"{raw_ids[2]}.json")
    settled = folders.settle(names, [rejection_of(raw_ids[2])])
    assert [each.raw_id for each in settled.rejected] == [raw_ids[2]]
    assert counts(folders) == {"processed": 4, "rejected": 1}
