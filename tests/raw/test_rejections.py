"""The index of the quarantine: exact for what Dropzone does, and set right for what others do."""

import os
import pickle
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.raw import Rejection, StorageUnavailable, next_raw_id
from backends.raw.folders import Folders

NOON = datetime(2019, 5, 1, 12, tzinfo=UTC)
CODES = ("data_empty", "value_not_numeric", "time_stamp_missing")
OPENED: list[str] | None = None


def note_opened(event: str, arguments: tuple[object, ...]) -> None:
    if event == "open" and OPENED is not None:
        OPENED.append(str(arguments[0]))


sys.addaudithook(note_opened)


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """Give out the list of the files that are opened meanwhile."""
    global OPENED  # noqa: PLW0603 (an audit hook cannot be taken away again)
    OPENED = []
    try:
        yield OPENED
    finally:
        OPENED = None


def folders_in(data: Path) -> Folders:
    for name in ("raw", "processed", "rejected", "journal"):
        (data / name).mkdir(parents=True, exist_ok=True)
    return Folders(data / "raw")


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return folders_in(tmp_path)


def raw_ids(count: int) -> list[UUID]:
    made = [UUID(int=0)]
    for _ in range(count):
        made.append(next_raw_id(made[-1]))
    return made[1:]


def rejection_of(raw_id: UUID, number: int = 0) -> Rejection:
    at = NOON + timedelta(seconds=number)
    return Rejection(raw_id, CODES[number % len(CODES)], "it is bad", at)


def reject(folders: Folders, *rejections: Rejection) -> None:
    for each in rejections:
        folders.path(each.raw_id, "pending").write_bytes(b"[]")
    folders.settle([], rejections)


def truth(folders: Folders) -> Counter[str]:
    return Counter(each.code for each in folders.rejections())


def is_reason(name: str) -> bool:
    """Say whether a file is the reason of a payload that is rejected now."""
    return "/rejected/" in name and name.endswith(".reason.json")


def test_a_page_reads_its_own_reasons_alone(folders: Folders):
    """A page of one reads the reason of that one, however many payloads are rejected."""
    rejections = [rejection_of(each, n) for n, each in enumerate(raw_ids(300))]
    reject(folders, *rejections)
    for after in (None, rejections[150].raw_id):
        with opened_files() as opened:
            [found], codes = folders.find_rejections(limit=1, after=after)
        assert found == rejections[151 if after else 0]
        assert codes == dict.fromkeys(CODES, 100)
        assert len([name for name in opened if is_reason(name)]) == 1


def test_stock_is_taken_without_reading_what_is_known(folders: Folders):
    """Taking stock reads the reasons that nobody has noted, and no others."""
    rejections = [rejection_of(each, n) for n, each in enumerate(raw_ids(20))]
    reject(folders, *rejections[:15])
    for each in rejections[15:]:
        folders.path(each.raw_id, "rejected").write_bytes(b"[]")
    for expected in (5, 0):
        with opened_files() as opened:
            codes = folders.take_stock()
        assert codes == truth(folders)
        assert len([name for name in opened if is_reason(name)]) == expected


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["reject", "retry", "bring", "take", "lose the reason"]),
            st.integers(0, 7),
            st.integers(0, 5),
            st.booleans(),
        ),
        max_size=25,
    )
)
def test_whatever_happens(steps: list[tuple[str, int, int, bool]]):
    """Counts and pages are those of the folder after any steps of two programs and a person.

    At once after those of the programs, and when stock was taken after those of the person.
    """
    payloads = raw_ids(8)
    with TemporaryDirectory() as folder:
        stores = [folders_in(Path(folder)), Folders(Path(folder) / "raw")]
        by_hand = False
        for action, which, number, first in steps:
            store, raw_id = stores[first], payloads[which]
            rejected = store.path(raw_id, "rejected")
            if action == "reject" and not rejected.exists():
                reject(store, rejection_of(raw_id, number))
            elif action == "retry":
                store.retry(raw_id)
            elif action == "bring":
                by_hand |= not rejected.exists()
                rejected.write_bytes(b"[]")
            elif action == "take":
                by_hand |= rejected.exists()
                rejected.unlink(missing_ok=True)
            elif rejected.exists():
                store.rejected.joinpath(f"{raw_id}.reason.json").unlink(missing_ok=True)
            if by_hand:
                stores[not first].take_stock()
                by_hand = False
            for each in stores:
                found, codes = each.find_rejections()
                assert found == list(each.rejections())
                assert codes == truth(each)


@pytest.mark.parametrize("code", [None, *CODES, "never_heard_of"])
@pytest.mark.parametrize(("since", "until"), [(0, 100), (None, None), (7, 30), (None, 8), (99, 3)])
def test_filters(folders: Folders, code: str | None, since: int | None, until: int | None):
    """Pages of any size hold the rejections of a code and a time; the counts are of the time."""
    rejections = [rejection_of(each, n) for n, each in enumerate(raw_ids(40))]
    reject(folders, *rejections)
    bounds = [None if n is None else NOON + timedelta(seconds=n) for n in (since, until)]
    of_time = rejections[since or 0 : 40 if until is None else until]
    expected = [each for each in of_time if code in (None, each.code)]
    for limit in (1, 7, 40, 1000):
        after, seen = None, list[Rejection]()
        while True:
            page, codes = folders.find_rejections(
                code=code, since=bounds[0], until=bounds[1], after=after, limit=limit
            )
            assert codes == Counter(each.code for each in of_time)
            if not page:
                break
            assert len(page) <= limit
            seen += page
            after = page[-1].raw_id
        assert seen == expected


def test_counts_without_looking(folders: Folders):
    """What is put back and rejected again is counted at once, though nobody has looked at it."""
    payloads = raw_ids(6)
    reject(folders, *map(rejection_of, payloads))
    for raw_id in payloads[:3]:
        assert folders.retry(raw_id)
    assert folders.find_rejections(limit=0) == ([], {"data_empty": 3})
    folders.settle([], [rejection_of(payloads[0], 1)])
    counts = {"data_empty": 3, "value_not_numeric": 1}
    assert folders.find_rejections(limit=0) == ([], counts)


def test_a_reason_that_was_lost(folders: Folders):
    """A payload whose reason is gone is listed and counted as such, without taking stock."""
    [raw_id] = raw_ids(1)
    reject(folders, rejection_of(raw_id))
    (folders.rejected / f"{raw_id}.reason.json").unlink()
    [found], codes = folders.find_rejections()
    assert (found.code, codes) == ("reason_missing", {"reason_missing": 1})
    assert folders.find_rejections(code="data_empty")[0] == []


def test_what_left_while_it_was_listed(folders: Folders):
    """A payload that somebody took away is neither listed nor counted once it was looked for."""
    one, other = map(rejection_of, raw_ids(2))
    reject(folders, one, other)
    folders.path(one.raw_id, "rejected").unlink()
    assert folders.find_rejections(limit=1) == ([other], {"data_empty": 1})


def test_stock_of_more_than_is_listed_at_a_time(folders: Folders, monkeypatch: pytest.MonkeyPatch):
    """Any number of payloads is gone through, a window at a time."""
    monkeypatch.setattr("backends.raw.rejections.WINDOW", 10)
    rejections = [rejection_of(each, n) for n, each in enumerate(raw_ids(95))]
    reject(folders, *rejections[::2])
    for each in rejections[::4]:
        folders.path(each.raw_id, "rejected").unlink()
    for each in rejections[1::2]:
        folders.path(each.raw_id, "rejected").write_bytes(b"[]")
    assert folders.take_stock() == truth(folders)
    assert folders.find_rejections()[0] == list(folders.rejections())


def test_travelling(folders: Folders):
    """Another process can note and find rejections with the folders that it was sent."""
    here, there = folders, pickle.loads(pickle.dumps(folders))  # noqa: S301 (our own)
    one, other = map(rejection_of, raw_ids(2))
    reject(here, one)
    reject(there, other)
    assert here.find_rejections() == there.find_rejections() == ([one, other], {"data_empty": 2})


def test_a_damaged_index(folders: Folders):
    """What is no index is named with what to do, stops no payload, and is made anew without."""
    file = folders.workspace / "rejected.sqlite"
    file.write_bytes(b"this is no database" * 100)
    [raw_id] = raw_ids(1)
    reject(folders, rejection_of(raw_id))
    assert folders.retry(raw_id)
    folders.settle([], [rejection_of(raw_id)])
    for look in (folders.find_rejections, folders.take_stock):
        with pytest.raises(StorageUnavailable, match=r"rejected\.sqlite.*delete it"):
            look()
    os.unlink(file)
    assert folders.take_stock() == {"data_empty": 1}
