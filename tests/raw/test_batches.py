"""Batches: one file each, whose payloads are known one by one, whatever becomes of them."""

import asyncio
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from power_cut import REPO, files_in, payloads_below
from stores import opened
from test_rejections import opened_files

from backends.raw import (
    COUNT_AT,
    MARK_AT,
    MOST_IN_BATCH,
    NEXT,
    NODE_BITS,
    Form,
    KeyReused,
    PayloadUnreadable,
    RawIds,
    RawIdUnknown,
    Rejection,
    State,
    StorageUnavailable,
    first_of,
    form_of,
    name_of,
    next_raw_id,
    payloads_in_name,
    place_of,
    raw_id_of,
    texts_of,
    uuid_at,
)
from backends.raw.batches import payloads_in, stretch_of
from backends.raw.folders import Folders
from backends.raw.journal import Entry, Log, Record, digest_of
from backends.raw.keys import Keys, KeyUse
from backends.raw.landing import RawStore

NOON = datetime(2019, 5, 1, 12, tzinfo=UTC)
LONG_AGO = datetime(2024, 3, 1, 12, tzinfo=UTC)
DAY = "2024-03-01"
BOM = b"\xef\xbb\xbf"


class Kind(NamedTuple):
    """A way to write several documents into one body."""

    form: Form
    join: Callable[[Sequence[bytes]], bytes]


KINDS = {
    "lines": Kind("ndjson", lambda bodies: b"\r\n \n".join(bodies) + b"\r\n"),
    "array": Kind("json", lambda bodies: b" [ %s]\n" % b" ,\r\n".join(bodies)),
    "sequence": Kind("json", lambda bodies: b"\n%s" % b"  ".join(bodies)),
}
GOOD = [b'{"n": %d, "x": "\xc3\xa9, ]}\\""}' % number for number in range(8)]
BAD = b'{"bad": [NaN, -inf]}'


def bodies(*bad: int, count: int = 6) -> list[bytes]:
    """Return payloads, of which some are bad."""
    return [BAD[:-1] + b', "%d": 0}' % n if n in bad else GOOD[n] for n in range(count)]


def odd_bodies() -> list[bytes]:
    """Return payloads that are no strict JSON and yet land."""
    return [b'{"a": nan}', b'{"\\ud800": "\xe2\x80\xa8"}', b"{}", b'{"a": [[-Infinity], {}]}']


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def store(folder: Path) -> AsyncIterator[RawStore]:
    async with opened(folder) as store:
        yield store


@pytest.fixture
def folders(folder: Path) -> Folders:
    return folders_in(folder)


def folders_in(folder: Path) -> Folders:
    for name in ("raw", "processed", "rejected", "journal"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return Folders(folder / "raw")


def first_at(moment: datetime, payloads: int, number: int = 0) -> UUID:
    """Return the first raw_id of a batch that arrived at a moment."""
    return UUID(int=uuid_at(moment).int | number << MARK_AT | payloads << COUNT_AT)


def put(
    folders: Folders, kind: Kind, of: Sequence[bytes], moment: datetime = LONG_AGO, number: int = 0
) -> tuple[str, RawIds]:
    """Make a batch pending; return the name of its file, and its raw_ids."""
    first = first_at(moment, len(of), number)
    name = name_of(first, len(of), kind.form)
    (folders.raw / name).write_bytes(kind.join(of))
    return name, RawIds(first, len(of))


def rejection_of(raw_id: UUID) -> Rejection:
    return Rejection(raw_id, "data_missing", "no data", NOON)


def process(folders: Folders) -> None:
    """Settle all that is pending, as the service does it; what has "bad" in it is rejected."""
    names, rejected = list[str](), list[Rejection]()
    for name in folders.pending()[0]:
        found = folders.read_pending(name)
        bad = [rejection_of(raw_id) for raw_id, body in found if b"bad" in body]
        rejected += bad
        if form_of(name) or not bad:
            names.append(name)
    folders.settle(names, rejected)


def states_of(folders: Folders, raw_ids: Sequence[UUID], of: Sequence[bytes]) -> list[State]:
    """Return the states of payloads, which are to be what was sent, read in both ways."""
    states = []
    for raw_id, body in zip(raw_ids, of, strict=True):
        state, found = folders.read(raw_id)
        assert found == body
        in_pieces = folders.open_payload(raw_id)
        assert (in_pieces.size, b"".join(in_pieces.pieces)) == (len(body), body)
        in_pieces.close()
        states.append(state)
    return states


def expected(*bad: int, count: int = 6) -> list[str]:
    return ["rejected" if number in bad else "processed" for number in range(count)]


def proved(folders: Folders) -> dict[UUID, bytes]:
    """Return all that the portions of what is processed yield, each of it once."""
    found = [
        payload
        for source in folders.portions()
        for portion in source.portions
        for payload in portion.payloads()
    ]
    assert len(dict(found)) == len(found)
    return {raw_id: body for raw_id, body in found if isinstance(body, bytes)}


def assert_once(folder: Path) -> None:
    assert all(len(found) == 1 for found in payloads_below(folder).values()), files_in(folder)


# ── raw_ids and names ─────────────────────────────────────────────────────────────────────────────


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, MOST_IN_BATCH), st.integers(-(10**9), 10**9)), min_size=1),
    st.integers(0, (1 << NODE_BITS) - 1),
)
@example([(MOST_IN_BATCH, 0), (0, 0), (1, 0), (MOST_IN_BATCH, -(10**9))], 0xFFFF)
def test_raw_ids_of_batches(arrivals: list[tuple[int, int]], node: int):
    """raw_ids increase over payloads and batches, however the clock is set; 0 is one alone."""
    last, greatest, now = UUID(int=0), UUID(int=0), [10**18]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: now[0])
        for payloads, step in arrivals:
            now[0] += step
            first = next_raw_id(last, payloads, node)
            assert first > greatest
            assert first.version == 7
            assert first.variant == UUID(int=uuid_at(NOON).int).variant
            assert first.int & 0xFFFF == node
            last = greatest = first
            if not payloads:
                assert place_of(first) is None
                continue
            raw_ids = RawIds(first, payloads)
            for at in {0, payloads // 2, payloads - 1}:
                assert raw_ids[at].int == first.int + at * NEXT
                assert place_of(raw_ids[at]) == (first, payloads, at)
            greatest = raw_ids[-1]
            assert greatest.version == 7


@pytest.mark.parametrize("payloads", [1, 2, 257, 70_000, MOST_IN_BATCH])
def test_all_raw_ids_of_a_batch(payloads: int):
    """A batch's raw_ids are those of its places, as values, as text, in slices and one by one."""
    raw_ids = RawIds(next_raw_id(UUID(int=0), payloads), payloads)
    each = list(raw_ids)
    assert len(raw_ids) == len(each) == payloads
    assert raw_ids.texts() == texts_of(raw_ids) == texts_of(each) == list(map(str, each))
    assert raw_ids[1:9] == each[1:9]
    assert raw_ids[-1] == each[-1]
    assert all(one < other for one, other in pairwise(each))
    assert [place_of(raw_id) for raw_id in each[:300]] == [
        (raw_ids.first, payloads, at) for at in range(len(each[:300]))
    ]


async def test_more_than_a_raw_id_can_tell(store: RawStore, folder: Path):
    """A batch that is too large for its raw_ids is refused, and leaves nothing."""
    with pytest.raises(StorageUnavailable):
        await store.land(b"1\n" * (MOST_IN_BATCH + 1), None, "", "ndjson", MOST_IN_BATCH + 1)
    assert os.listdir(folder / "raw") == []
    assert len(await store.land(b"1\n" * MOST_IN_BATCH, None, "", "ndjson", MOST_IN_BATCH)) == (
        MOST_IN_BATCH
    )


async def test_raw_ids_go_on_after_a_batch(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """After a restart, too, with the clock set back and the counter lost, they are greater."""
    given_out = list[UUID]()
    for _ in range(3):
        async with opened(folder) as store:
            for payloads in (3, 1, 100):
                given_out += await store.land(b"1\n" * payloads, None, "", "ndjson", payloads)
            given_out += await store.land(b"1")
        (folder / "journal" / "last_raw_id").unlink()
        monkeypatch.setattr(time, "time_ns", lambda: 10**18)
    assert all(one < other for one, other in pairwise(given_out))


@given(st.integers(1, MOST_IN_BATCH), st.sampled_from(["ndjson", "json"]))
def test_names_of_batches(payloads: int, form: Form):
    """A name tells the first raw_id, how many payloads there are, and the form."""
    first = first_at(NOON, payloads)
    name = name_of(first, payloads, form)
    assert name == f"{first}.{payloads}.{form}"
    assert (first_of(name), form_of(name)) == (first, form)
    assert payloads_in_name(name) == (payloads if payloads < 10**6 else 0)
    assert raw_id_of(name) is None
    place = place_of(first)
    assert place is not None
    assert place.name(form) == name


TWO = first_at(NOON, 2)


@pytest.mark.parametrize(
    "name",
    [
        f"{TWO}.3.ndjson",
        f"{TWO}.1.json",
        f"{TWO}.02.ndjson",
        f"{TWO}.2.NDJSON",
        f"{TWO}.2.ndjson.part",
        f"{TWO}.2.",
        f"{TWO}.2",
        f"{TWO}.0.json",
        f"{TWO}.\u0662.ndjson",
        f"{TWO}.2.ndjson\n",
        f"{RawIds(TWO, 2)[1]}.2.ndjson",
        f"{uuid_at(NOON)}.2.ndjson",
        f"{str(TWO).upper()}.2.ndjson",
    ],
)
def test_names_that_are_none(name: str, folders: Folders):
    """A file whose name is not what its raw_id says is a stray, and no payload."""
    (folders.raw / name).write_bytes(b"{}\n{}")
    assert payloads_in_name(name) == 0
    assert folders.strays() == [name]
    assert folders.pending() == ([], 0)
    assert folders.count_pending() == 0


# ── Bytes ─────────────────────────────────────────────────────────────────────────────────────────

SCALARS = [
    *(b"1", b"-0.5e3", b"null", b"true", b"NaN", b"-nan", b"Infinity", b"-inf", b"INF", b'""'),
    *(b'"nan, ]}"', b'"\\"[{"', b'"\\\\"', b'"\\ud83d\\ude00"', b'"\\ud800"', b'"\\\\ud800"'),
    *('"é\u2028😀"'.encode(), b'"a\\nb"', '"\u0661\x7f"'.encode()),
]
KEYS = [b'"a"', b'"na\\"n"', b'""', b'"\\udfff"']
SPACES = [b"", b" ", b"\t", b" \r "]


def _containers(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return _joined(inner).map(lambda text: b"[%s]" % text) | _objects(inner)


def _joined(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.tuples(st.lists(inner, max_size=4), st.sampled_from(SPACES)).map(
        lambda both: (both[1] + b"," + both[1]).join(both[0])
    )


def _objects(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    member = st.tuples(st.sampled_from(KEYS), inner).map(b": ".join)
    return _joined(member).map(lambda text: b"{%s}" % text)


DOCUMENTS = st.recursive(st.sampled_from(SCALARS), _containers, max_leaves=8)
ROOMY = [b"", b" ", b"\n", b"\r\n", b" \r\n\t "]
BREAKS = [b"\n", b"\r\n", b"\n\n", b"\r\r\n \t\n", b"\n\r\n"]


def assert_divided(body: bytes, form: Form, payloads: list[bytes]) -> None:
    assert payloads_in(body, form) == payloads
    places = [stretch_of(body, form, at) for at in range(len(payloads))]
    assert [body[begin:end] for begin, end in places] == payloads
    with pytest.raises(ValueError, match=f"no payload {len(payloads)}"):
        stretch_of(body, form, len(payloads))


LINES = DOCUMENTS | st.sampled_from([b"not json", b"\xff\xfe", b'{"torn": ', b"\x0b", b"\0"])


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(SPACES[:3]), LINES, st.sampled_from(BREAKS)), min_size=1),
    st.sampled_from([b"", *BREAKS]),
    st.booleans(),
)
def test_lines(found: list[tuple[bytes, bytes, bytes]], before: bytes, has_end: bool):
    """The payloads of lines are the lines that are not blank, without their ends, JSON or not."""
    lines = [space + line for space, line, _ in found]
    lines[0] = BOM + lines[0]
    body = before + b"".join(line + end for line, (_, _, end) in zip(lines, found, strict=True))
    if not has_end:
        body = body.removesuffix(found[-1][2])
    assert_divided(body, "ndjson", lines)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(DOCUMENTS, min_size=1, max_size=6),
    st.lists(st.sampled_from(ROOMY), min_size=4, max_size=4),
    st.booleans(),
)
def test_arrays(documents: list[bytes], spaces: list[bytes], has_mark: bool):
    """The payloads of an array are the exact bytes of its elements, whatever they are."""
    around, before, one, other = spaces
    inside = (one + b"," + other).join(documents)
    body = BOM * has_mark + around + b"[" + before + inside + one + b"]" + around
    assert_divided(body, "json", documents)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(_containers(DOCUMENTS), min_size=2, max_size=6),
    st.sampled_from(ROOMY),
    st.sampled_from(ROOMY),
    st.booleans(),
)
def test_sequences(documents: list[bytes], gap: bytes, around: bytes, has_mark: bool):
    """The payloads of documents one after another are their exact bytes, whatever is between."""
    body = BOM * has_mark + around + gap.join(documents) + around
    assert_divided(body, "json", documents)


async def test_exact_bytes(kind: Kind, store: RawStore, folder: Path):
    """A batch is one file of the exact bytes that arrived, and each payload is its own bytes."""
    of = odd_bodies()
    body = BOM + kind.join(of)
    raw_ids = await store.land(body, None, "", kind.form, len(of))
    name = f"{raw_ids[0]}.{len(of)}.{kind.form}"
    assert os.listdir(folder / "raw") == [name]
    assert (folder / "raw" / name).read_bytes() == body
    first = BOM + of[0] if kind.form == "ndjson" and body.startswith(BOM + of[0]) else of[0]
    assert states_of(store, raw_ids, [first, *of[1:]]) == ["pending"] * len(of)
    assert store.pending() == ([name], len(of))
    assert store.read_pending(name) == list(zip(raw_ids, [first, *of[1:]], strict=True))
    assert [found for _, found in store.read_pending(name, 1, 3)] == of[1:3]


async def test_unknown_places(kind: Kind, store: RawStore):
    """A raw_id behind the last payload of a batch, or beside it, is unknown."""
    raw_ids = await store.land(kind.join(bodies()), None, "", kind.form, 6)
    last = raw_ids[-1].int
    for unknown in (last + NEXT, raw_ids[0].int - NEXT, last + 1, last + (1 << COUNT_AT)):
        with pytest.raises(RawIdUnknown):
            store.read(UUID(int=unknown))
        with pytest.raises(RawIdUnknown):
            store.rejection(UUID(int=unknown))
        assert not store.retry(UUID(int=unknown))


# ── Settling ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [(), (0,), (5,), (1, 2, 4), tuple(range(6))])
def test_settled(bad: tuple[int, ...], kind: Kind, folders: Folders, folder: Path):
    """A batch moves as one; what is rejected of it has a file of its own, beside its reason."""
    of = bodies(*bad)
    name, raw_ids = put(folders, kind, of)
    settled = folders.settle([name], [rejection_of(raw_ids[at]) for at in bad])
    assert (settled.processed, len(settled.rejected), settled.stuck) == (6 - len(bad), len(bad), {})
    assert states_of(folders, raw_ids, of) == expected(*bad)
    assert (folder / "processed" / DAY / name).read_bytes() == kind.join(of)
    assert {path.name for path in (folder / "rejected").iterdir()} == {
        f"{raw_ids[at]}{end}" for at in bad for end in (".json", ".reason.json")
    }
    assert [each.raw_id for each in folders.rejections()] == [raw_ids[at] for at in bad]
    assert folders.find_rejections()[1].total() == len(bad)
    assert folders.pending() == ([], 0)
    assert folders.count_processed() == 6 - len(bad)
    assert proved(folders) == {raw_ids[n]: of[n] for n in range(6) if n not in bad}
    assert_once(folder)
    before = {path: path.read_bytes() for path in folder.rglob("*.*json")}
    for names, rejected in (([name], bad), ([name], ()), ([], bad), ([], bad[:1])):
        again = folders.settle(names, [rejection_of(raw_ids[at]) for at in rejected])
        assert again.processed == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.*json")} == before


def test_two_processors(kind: Kind, folders: Folders):
    """What is settled is counted once, though batches are settled together and out of order."""
    made = [put(folders, kind, bodies(number), number=number) for number in range(3)]
    rejections = [rejection_of(raw_ids[number]) for number, (_, raw_ids) in enumerate(made)]
    settled = folders.settle([name for name, _ in made], rejections[::-1])
    assert (settled.processed, len(settled.rejected)) == (15, 3)
    for number, (_, raw_ids) in enumerate(made):
        assert states_of(folders, raw_ids, bodies(number)) == expected(number)


def test_put_back(kind: Kind, folders: Folders, folder: Path):
    """A payload that is put back is pending alone, and ends in its place, packed or not."""
    of = bodies(1, 4)
    _, raw_ids = put(folders, kind, of)
    process(folders)
    assert folders.retry(raw_ids[1])
    assert folders.read(raw_ids[1]) == ("pending", of[1])
    assert folders.pending() == ([f"{raw_ids[1]}.json"], 1)
    process(folders)
    assert folders.rejection(raw_ids[1]).retries == 1
    assert folders.retry(raw_ids[1])
    folders.settle([f"{raw_ids[1]}.json"], [])
    assert states_of(folders, raw_ids, of) == expected(4)
    assert folders.count_processed() == 5
    assert len(proved(folders)) == 5
    assert_once(folder)


def test_put_back_while_the_batch_is_pending(kind: Kind, folders: Folders, folder: Path):
    """A payload that was rejected and put back while others wait is processed once."""
    of = bodies(1)
    name, raw_ids = put(folders, kind, of)
    folders.settle([], [rejection_of(raw_ids[1])], {name: 3})
    assert folders.count_processed() == len(proved(folders)) == 2
    assert folders.retry(raw_ids[1])
    assert folders.count_pending() == folders.pending()[1] == 4
    assert folders.pending()[0] == [name, f"{raw_ids[1]}.json"]
    folders.settle([f"{raw_ids[1]}.json"], [])
    folders.settle([name], [rejection_of(raw_ids[5])])
    assert states_of(folders, raw_ids, of) == expected(5)
    assert folders.count_processed() == len(proved(folders)) == 5
    assert_once(folder)


async def test_tally_of_batches(kind: Kind, store: RawStore):
    """What is counted as landed and processed is what the folders have, after every step."""
    raw_ids = await store.land(kind.join(bodies()), None, "", kind.form, 6)
    await store.land(b"{}")
    [name, other] = store.pending()[0]
    steps: list[tuple[list[str], list[int], dict[str, int]]] = [
        ([], [0], {name: 2}),
        ([], [3], {name: 4}),
        ([other], [], {}),
        ([name], [5], {}),
        ([name, other], [5], {}),
    ]
    for processed, rejected, done in steps:
        store.settle(processed, [rejection_of(raw_ids[at]) for at in rejected], done)
        assert store.activity().processed == store.count_processed() == len(proved(store))
    assert store.count_processed() == 4
    assert sum(store.activity().landed) == 7


def test_done(kind: Kind, folders: Folders, folder: Path):
    """Where a limit cuts through a batch, each payload is in its state, and the notes go."""
    of = bodies(2)
    name, raw_ids = put(folders, kind, of)
    for end, states in ((1, expected()[:1]), (4, expected(2)[:4])):
        rejected = [rejection_of(raw_ids[2])] if end > 2 else []
        folders.settle([], rejected, {name: end})
        folders.settle([], [], {name: end})
        assert states_of(folders, raw_ids, of) == states + ["pending"] * (6 - end)
        assert folders.done() == {name: end}
        assert folders.count_pending() == folders.pending()[1] == 6 - end
        assert folders.count_processed() == states.count("processed")
        assert folders.pending(after=name) == ([], 0)
        assert_once(folder)
    assert [found for _, found in folders.read_pending(name, 4)] == of[4:]
    folders.settle([name], [])
    assert states_of(folders, raw_ids, of) == expected(2)
    assert folders.done() == {}
    assert folders.notes.names() == [f"{name}.left"]


def test_notes_of_done_that_a_kill_has_left(kind: Kind, folders: Folders):
    """A note of how much of a batch is done says nothing when the batch has moved on, and goes."""
    name, raw_ids = put(folders, kind, bodies())
    folders.settle([], [], {name: 3})
    (folders.processed / DAY).mkdir()
    os.rename(folders.raw / name, folders.processed / DAY / name)
    assert folders.done() == {}
    assert folders.count_processed() == 6
    assert states_of(folders, raw_ids, bodies()) == expected()
    folders.settle([], [])
    assert folders.notes.names() == []


def test_counting_opens_no_file(kind: Kind, folders: Folders):
    """How many payloads are pending is told by names alone."""
    for number in range(5):
        name, _ = put(folders, kind, bodies(), number=number)
    folders.settle([], [], {name: 3})
    with opened_files() as opened_names:
        assert folders.count_pending() == 27
        assert folders.pending()[1] == 27
    assert opened_names == []


async def test_read_while_it_is_settled(kind: Kind, folders: Folders):
    """A payload of a batch can be read at any moment of its way."""
    of = bodies(1, 3)
    made = [put(folders, kind, of, number=number)[1] for number in range(40)]
    settling = asyncio.create_task(asyncio.to_thread(process, folders))
    while not settling.done():
        for raw_ids in made:
            await asyncio.to_thread(states_of, folders, raw_ids, of)
    await settling
    assert all(states_of(folders, raw_ids, of) == expected(1, 3) for raw_ids in made)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["process", "process", "put back", "process alone", "pack"]),
        st.integers(1, 6),
        st.sets(st.integers(0, 5), max_size=3),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(list(KINDS.values())), STEPS)
def test_whatever_happens(kind: Kind, steps: list[tuple[str, int, set[int]]]):
    """After any steps each payload of a batch is in its state, once, and every count agrees."""
    with TemporaryDirectory() as place:
        folders, of = folders_in(Path(place)), bodies()
        name, raw_ids = put(folders, kind, of)
        done, states = 0, dict.fromkeys(range(6), "pending")
        for step, number, some in steps:
            alone = [at for at in range(done) if states[at] == "pending"]
            if step == "process" and done < 6:
                end = min(6, done + number)
                bad = [at for at in range(done, end) if at in some]
                rejected = [rejection_of(raw_ids[at]) for at in bad]
                folders.settle([name] if end == 6 else [], rejected, {name: end} if end < 6 else {})
                states |= dict.fromkeys(range(done, end), "processed")
                states |= dict.fromkeys(bad, "rejected")
                done = end
            elif step == "put back" and states[number - 1] == "rejected":
                assert folders.retry(raw_ids[number - 1])
                states[number - 1] = "pending"
            elif step == "process alone":
                folders.settle([f"{raw_ids[at]}.json" for at in alone], [])
                states |= dict.fromkeys(alone, "processed")
            elif step == "pack":
                for day in folders.finished_days():
                    folders.compact(day)
            processed = [at for at, state in states.items() if state == "processed"]
            assert states_of(folders, raw_ids, of) == list(states.values())
            assert folders.count_pending() == list(states.values()).count("pending")
            assert folders.count_processed() == len(processed)
            assert proved(folders) == {raw_ids[at]: of[at] for at in processed}
            assert len(list(folders.rejections())) == list(states.values()).count("rejected")
            assert_once(Path(place))


def test_it_leaves_its_batch_while_it_is_looked_for(
    kind: Kind, folders: Folders, monkeypatch: pytest.MonkeyPatch
):
    """A payload that is rejected while it is looked for is found in the file of its own."""
    name, raw_ids = put(folders, kind, bodies(1))
    own, looked, real = folders.path(raw_ids[1], "pending"), list[object](), open

    def open_and_reject(path: object, *others: object) -> object:
        looked.append(path)
        if looked.count(own) == 2:  # where the search for it alone ends
            monkeypatch.undo()
            folders.settle([name], [rejection_of(raw_ids[1])])
        return real(path, *others)

    monkeypatch.setattr("builtins.open", open_and_reject)
    assert folders.read(raw_ids[1]) == ("rejected", bodies(1)[1])
    assert looked.count(own) == 2


# ── Interrupted ───────────────────────────────────────────────────────────────────────────────────

# For each number: a copy of a data folder, in which a child process settles, and is killed when it
# is about to do something to files for the number-th time.
KILL = """
import json, os, shutil, sys
from pathlib import Path
from backends.raw.folders import Folders
from test_batches import rejection_of
from uuid import UUID

source, target, what = sys.argv[1:]
names, rejected, done, days = json.loads(what)
CALLS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "sync"}
left = 0

def interrupt(event, arguments):
    global left
    if event in CALLS and target in str(arguments[0]):
        left -= 1
        if left == -1:
            os.kill(os.getpid(), 9)

def work(place):
    folders = Folders(place / "raw")
    sys.addaudithook(interrupt)
    folders.settle(names, [rejection_of(UUID(raw_id)) for raw_id in rejected], done)
    for day in days:
        folders.compact(day)

code, number = 1, 0
while code:
    place = Path(target) / str(number)
    shutil.copytree(source, place)
    child = os.fork()
    if not child:
        left = number
        try:
            work(place)
        finally:
            os._exit(left < 0)
    code, number = os.waitpid(child, 0)[1], number + 1
"""


def killed_everywhere(
    folder: Path,
    names: Sequence[str] = (),
    rejected: Sequence[UUID] = (),
    done: dict[str, int] | None = None,
    days: Sequence[str] = (),
) -> list[Path]:
    """Settle and pack copies of a data folder, each killed at another step; return them."""
    places = folder.with_name("places")
    places.mkdir()
    what = json.dumps([list(names), list(map(str, rejected)), done or {}, list(days)])
    path = f"{REPO}:{REPO}/tests:{REPO}/tests/raw"
    command = [sys.executable, "-c", KILL, folder, places, what]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    return sorted(places.iterdir(), key=lambda place: int(place.name))


@pytest.mark.linux
def test_killed_while_settling(kind: Kind, folders: Folders, folder: Path):
    """Wherever settling is killed, nothing is lost, and nothing is twice when it is done again."""
    of = bodies(1, 4)
    name, raw_ids = put(folders, kind, of)
    other, others = put(folders, kind, bodies(), number=1)
    places = killed_everywhere(folder, [name, other], [raw_ids[1], raw_ids[4]])
    assert len(places) > 15
    for place in places:
        left = Folders(place / "raw")
        for at, state in enumerate(states_of(left, raw_ids, of)):
            assert state in ("pending", "rejected" if at in (1, 4) else "processed")
        states_of(left, others, bodies())
        process(left)
        assert states_of(left, raw_ids, of) == expected(1, 4), place
        assert states_of(left, others, bodies()) == expected()
        assert left.count_processed() == len(proved(left)) == 10
        assert len(list(left.rejections())) == left.take_stock().total() == 2
        assert left.count_pending() == 0
        assert_once(place)


@pytest.mark.linux
def test_killed_while_a_part_is_settled(kind: Kind, folders: Folders, folder: Path):
    """So it is where a limit has cut through a batch, of which a part was done before."""
    of = bodies(1, 3)
    name, raw_ids = put(folders, kind, of)
    folders.settle([], [rejection_of(raw_ids[1])], {name: 2})
    places = killed_everywhere(folder, [], [raw_ids[3]], {name: 5})
    assert len(places) > 8
    for place in places:
        left = Folders(place / "raw")
        states_of(left, raw_ids, of)
        left.settle([], [rejection_of(raw_ids[3])], {name: 5})
        assert states_of(left, raw_ids, of) == [*expected(1, 3)[:5], "pending"], place
        assert left.count_pending() == 1
        assert left.count_processed() == len(proved(left)) == 3
        process(left)
        assert states_of(left, raw_ids, of) == expected(1, 3)
        assert_once(place)


@pytest.mark.linux
def test_killed_while_packing(kind: Kind, folders: Folders, folder: Path):
    """Wherever packing is killed, nothing is lost, and the next run ends it; no note is left."""
    of = bodies(1, 4)
    _, raw_ids = put(folders, kind, of)
    process(folders)
    assert folders.retry(raw_ids[4])
    folders.settle([f"{raw_ids[4]}.json"], [])
    for place in killed_everywhere(folder, days=[DAY]):
        left = Folders(place / "raw")
        assert states_of(left, raw_ids, of) == expected(1), place
        for day in left.finished_days():
            left.compact(day)
        assert states_of(left, raw_ids, of) == expected(1), place
        assert proved(left) == {raw_ids[n]: of[n] for n in range(6) if n != 1}
        assert left.count_processed() == 5
        assert left.notes.names() == []


def test_synced_before_the_batch_lets_go(
    kind: Kind, folders: Folders, monkeypatch: pytest.MonkeyPatch
):
    """What leaves a batch is on disk, and so is the note, before either has its name.

    Then come the names of the payloads, that of the note, and the batch moves on.
    """
    name, raw_ids = put(folders, kind, bodies(1, 4))
    done, rename = list[str](), os.rename
    monkeypatch.setattr("backends.raw.disk.sync_file_system", lambda _: done.append("sync"))

    def note(source: object, target: object) -> None:
        rename(str(source), str(target))
        done.append(Path(str(target)).name)

    monkeypatch.setattr(os, "rename", note)
    folders.settle([name], [rejection_of(raw_ids[1]), rejection_of(raw_ids[4])])
    reasons = [f"{raw_ids[at]}.reason.json" for at in (1, 4)]
    apart = [f"{raw_ids[at]}.json" for at in (1, 4)]
    assert done == [*reasons, "sync", *apart, f"{name}.left", name]


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────

DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(b"\xff" * path.stat().st_size),
    "a payload too many": lambda path: path.write_bytes(path.read_bytes() + b"\n{}"),
    "a folder": lambda path: (path.rename(path.with_suffix(".kept")), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_batch(how: str, kind: Kind, folders: Folders):
    """A damaged batch is rejected as one file for one reason, and can be put back when mended."""
    name, raw_ids = put(folders, kind, bodies())
    whole = (folders.raw / name).read_bytes()
    DAMAGES[how](folders.raw / name)
    with pytest.raises(PayloadUnreadable) as caught:
        folders.read_pending(name)
    assert caught.value.code == "payload_unreadable"
    reason = Rejection(raw_ids[0], "payload_unreadable", str(caught.value), NOON)
    settled = folders.settle([name], [reason])
    assert (settled.processed, len(settled.rejected)) == (0, 1)
    assert folders.count_pending() == 0
    assert sorted(os.listdir(folders.rejected)) == sorted([name, f"{raw_ids[0]}.reason.json"])
    assert [each.raw_id for each in folders.rejections()] == [raw_ids[0]]
    assert folders.find_rejections()[0] == folders.find_rejections(code=reason.code)[0] == [reason]
    assert folders.rejection(raw_ids[3]) == reason
    assert folders.retry(raw_ids[3])
    assert folders.find_rejections(limit=0) == ([], {})
    assert folders.last_rejection(raw_ids[0]).retries == 1
    assert folders.pending() == ([name], 6)
    if how == "a folder":
        (folders.raw / name).rmdir()
    (folders.raw / name).write_bytes(whole)
    process(folders)
    assert states_of(folders, raw_ids, bodies()) == expected()


def test_a_batch_that_the_disk_does_not_give_back(
    kind: Kind, folders: Folders, monkeypatch: pytest.MonkeyPatch
):
    """A batch on a bad block is moved out of the way like a damaged one."""
    name, raw_ids = put(folders, kind, bodies())
    real = os.open

    def refuse(path: str, *others: int) -> int:
        if str(path).endswith(name):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *others)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(PayloadUnreadable):
            folders.read_pending(name)
        folders.settle([name], [rejection_of(raw_ids[0])])
        assert folders.pending() == ([], 0)
    assert states_of(folders, raw_ids, bodies()) == ["rejected"] * 6


NOTES: dict[str, Callable[[Path], object]] = {
    "emptied": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(b"\xff\0"),
    "another": lambda path: path.write_bytes(path.read_bytes().replace(b"4", b"5")),
}


@pytest.mark.parametrize("how", NOTES)
def test_a_damaged_note(how: str, kind: Kind, folders: Folders, caplog: pytest.LogCaptureFixture):
    """What a damaged note has said is found again, and told: nothing is lost or counted twice."""
    of = bodies(1, 4)
    name, raw_ids = put(folders, kind, of)
    process(folders)
    folders.settle([], [rejection_of(raw_ids[2])])  # too late: it only leaves a reason
    note = folders.notes.folder / f"{name}.left"
    NOTES[how](note)
    assert states_of(folders, raw_ids, of) == expected(1, 4)
    assert folders.count_processed() == len(proved(folders)) == 4
    assert str(note) in caplog.text
    assert folders.compact(DAY) == 4
    assert states_of(folders, raw_ids, of) == expected(1, 4)


def test_a_lost_note(kind: Kind, folders: Folders):
    """Without its note a payload is what its own file says, and is packed once, in its place."""
    of = bodies(1, 4)
    name, raw_ids = put(folders, kind, of)
    process(folders)
    assert folders.retry(raw_ids[4])
    folders.settle([f"{raw_ids[4]}.json"], [])
    (folders.notes.folder / f"{name}.left").unlink()
    assert states_of(folders, raw_ids, of) == expected(1)
    assert folders.compact(DAY) == 6
    assert states_of(folders, raw_ids, of) == expected(1)
    assert folders.retry(raw_ids[1])
    process(folders)
    assert folders.retry(raw_ids[1])
    folders.settle([f"{raw_ids[1]}.json"], [])
    assert folders.compact(DAY) == 0
    assert states_of(folders, raw_ids, of) == expected()


# ── The journal ───────────────────────────────────────────────────────────────────────────────────

MANGLED: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "torn": lambda path: os.truncate(path, 20),
    "emptied": lambda path: os.truncate(path, 0),
    "different": lambda path: path.write_bytes(path.read_bytes().replace(b"n", b"m")),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def crashed(folder: Path) -> Path:
    """Return a copy of the data folder as a crash of the store would leave it."""
    copy = folder.with_name("crashed")
    shutil.copytree(folder, copy)
    return copy


@pytest.mark.parametrize("how", MANGLED)
@pytest.mark.parametrize("is_settled", [False, True])
async def test_recovered(how: str, is_settled: bool, kind: Kind, store: RawStore, folder: Path):
    """A batch is written again from the journal, where it lies, with all that was known of it.

    One that was processed and lies nowhere any more is pending again, but for what has left it.
    """
    of = bodies(1)
    raw_ids = await store.land(kind.join(of), None, "", kind.form, 6)
    await store.land(b"{}")
    if is_settled:
        process(store)
    copy = crashed(folder)
    [path] = {path for paths in files_in(copy).values() for path in paths if form_of(path.name)}
    MANGLED[how](path)
    states = expected(1) if is_settled else ["pending"] * 6
    pending = 0 if is_settled else 7
    if is_settled and how == "missing":
        path, pending = copy / "raw" / path.name, 5
        states = ["rejected" if at == 1 else "pending" for at in range(6)]
    for _ in range(2):
        async with opened(copy) as again:
            assert states_of(again, raw_ids, of) == states
            assert path.read_bytes() == kind.join(of)
            assert again.count_pending() == pending
        assert_once(copy)


def journaled(folder: Path, *entries: Entry) -> None:
    """Leave a log behind as a store does that is killed."""
    log = Log.create(folder / "journal")
    log.append(Record(list(entries), []))
    log.close()


@pytest.mark.parametrize("is_there", [True, False])
async def test_a_batch_in_a_damaged_record(
    is_there: bool, kind: Kind, store: RawStore, folder: Path, caplog: pytest.LogCaptureFixture
):
    """A batch of a damaged record is told to be lost, by its first raw_id, if it is not there."""
    body = kind.join(bodies())
    raw_ids = await store.land(body, None, "", kind.form, 6)
    [after] = await store.land(b"{}")
    copy = crashed(folder)
    [log] = (copy / "journal").glob("*.log")
    log.write_bytes(log.read_bytes().replace(body, body[:-9] + b"x" + body[-8:]))
    if not is_there:
        (copy / "raw" / name_of(raw_ids[0], 6, kind.form)).unlink()
    (copy / "raw" / f"{after}.json").unlink()
    async with opened(copy) as again:
        assert again.read(after) == ("pending", b"{}")
        assert again.count_pending() == (7 if is_there else 1)
    lost = "0 are not there" if is_there else f"1 are not there: {raw_ids[0]}"
    assert lost in caplog.text


@pytest.mark.parametrize("bad", [(), (1, 4), tuple(range(6))])
async def test_packed_batches_do_not_come_back(
    bad: tuple[int, ...], kind: Kind, folders: Folders, folder: Path
):
    """A batch whose payloads are all packed or rejected is not recovered; the others come back."""
    of = bodies(*bad)
    _, raw_ids = put(folders, kind, of)
    process(folders)
    assert folders.compact(DAY) == 6 - len(bad)
    gone = first_at(LONG_AGO, 6, 7)
    entries = Entry(raw_ids[0], kind.join(of), kind.form), Entry(gone, kind.join(of), kind.form)
    journaled(folder, *entries)
    async with opened(folder) as store:
        assert states_of(store, raw_ids, of) == expected(*bad)
        assert store.pending() == ([name_of(gone, 6, kind.form)], 6)
    assert_once(folder)


async def test_a_batch_of_a_damaged_pack_comes_back(kind: Kind, folders: Folders, folder: Path):
    """Where a pack is damaged, a batch of it is recovered, and packed once more."""
    of = bodies(1)
    _, raw_ids = put(folders, kind, of)
    process(folders)
    assert folders.compact(DAY) == 5
    [pack] = folders.packs()
    pack.path.write_bytes(b"garbage")
    journaled(folder, Entry(raw_ids[0], kind.join(of), kind.form))
    async with opened(folder) as store:
        process(store)
        assert states_of(store, raw_ids, of) == expected(1)


async def test_keys_of_batches(kind: Kind, folder: Path):
    """The same key and body get the same raw_ids, after a restart, too; another body is refused."""
    arguments = (kind.join(bodies()), "key", "me", kind.form, 6)
    async with opened(folder) as store:
        raw_ids = list(await store.land(*arguments))
        assert list(await store.land(*arguments)) == raw_ids
        with pytest.raises(KeyReused):
            await store.land(kind.join(bodies(1)), "key", "me", kind.form, 6)
    async with opened(folder) as store:
        assert list(await store.land(*arguments)) == raw_ids
        assert store.count_pending() == 6
        [other] = await store.land(b"{}", "key", "somebody else")
        assert store.read(other) == ("pending", b"{}")


@pytest.mark.parametrize("has_landed", [True, False])
async def test_keys_of_older_versions(has_landed: bool, kind: Kind, folder: Path):
    """What an older version has landed under a key is the answer; what it has not lands as a batch.

    It made a file for each line, and one for an array.
    """
    body, now = kind.join(bodies()), uuid_at(datetime.now(UTC) - timedelta(hours=1))
    count = 6 if kind.form == "ndjson" else 1
    old = [UUID(int=now.int + (1 << 33 | 5 << 16) + at) for at in range(count)]  # random bits
    folders_in(folder)
    keys = Keys(folder / "journal" / "keys.sqlite")
    keys.open(is_expected=False)
    use = KeyUse("key", digest_of(body, kind.form), old)
    keys.note(use)
    if has_landed:
        keys.note_landed([use])
    keys.close()
    async with opened(folder) as store:
        for _ in range(2):
            raw_ids = list(await store.land(body, "key", "", kind.form, 6))
            if has_landed:
                assert raw_ids == old
                assert store.count_pending() == 0
            else:
                assert states_of(store, raw_ids, bodies()) == ["pending"] * 6
                assert store.count_pending() == 6


def test_digests_of_older_versions():
    """A body has the digest that an older version has noted: that of its lines, or of all of it."""
    for name, kind in KINDS.items():
        body = kind.join(bodies())
        of_lines = b"\n".join(bodies()) if name == "lines" else body
        assert digest_of(body, kind.form) == hashlib.sha256(of_lines).digest()
    assert digest_of(b" {}\n", "") == hashlib.sha256(b" {}\n").digest()


# ── Packs ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_day_of_all_kinds(folders: Folders):
    """A day of payloads alone, batches, and what has left batches is packed in order of arrival."""
    sent = dict[UUID, bytes]()
    for number, kind in enumerate(KINDS.values()):
        of = bodies(1, 3, 4)
        sent |= zip(put(folders, kind, of, number=2 * number)[1], of, strict=True)
        alone = UUID(int=uuid_at(LONG_AGO).int | (2 * number + 1) << MARK_AT | 0x1FFFF << NODE_BITS)
        sent[alone] = b"[%d]" % number
        (folders.raw / f"{alone}.json").write_bytes(sent[alone])
    process(folders)
    rejected = [each.raw_id for each in folders.rejections()]
    for raw_id in rejected[::3] + rejected[1::3]:
        assert folders.retry(raw_id)
    back = [f"{raw_id}.json" for raw_id in rejected[::3] + rejected[1::3]]
    folders.settle(back, [])
    kept = rejected[2::3]
    assert folders.compact(DAY) == len(sent) - len(kept)
    assert {path.name for path in folders.processed.iterdir()} == {
        f"{DAY}.ndjson.gz{end}" for end in ("", ".index")
    }
    order = list(proved(folders))
    assert order == sorted(sent.keys() - set(kept))
    states = states_of(folders, list(sent), list(sent.values()))
    assert {r: s for r, s in zip(sent, states, strict=True) if s != "processed"} == dict.fromkeys(
        kept, "rejected"
    )
    assert folders.notes.names() == []
    for raw_id in kept:  # which arrives late in a day that is packed
        assert folders.retry(raw_id)
    folders.settle([f"{raw_id}.json" for raw_id in kept], [])
    assert folders.compact(DAY) == len(kept)
    assert set(states_of(folders, list(sent), list(sent.values()))) == {"processed"}
    assert folders.count_processed() == len(proved(folders)) == len(sent)


def test_a_damaged_batch_is_not_packed(kind: Kind, folders: Folders):
    """A batch that cannot be read keeps its day from being packed, and is named."""
    name, _ = put(folders, kind, bodies())
    process(folders)
    os.truncate(folders.processed / DAY / name, 15)
    with pytest.raises(StorageUnavailable, match=f"{name}.*restore it"):
        folders.compact(DAY)
    assert os.listdir(folders.processed / DAY) == [name]


# ── Backups ───────────────────────────────────────────────────────────────────────────────────────


async def test_backup(kind: Kind, store: RawStore, folder: Path):
    """A store that is opened on a backup has each payload of every batch in its state.

    A note is copied behind the payloads that it says have left their batch.
    """
    of, sent = bodies(1, 4), dict[UUID, bytes]()
    for _ in range(3):
        raw_ids = await store.land(kind.join(of), None, "", kind.form, 6)
        sent |= zip(raw_ids, of, strict=True)
    one, other, _ = store.pending()[0]
    raw_ids = RawIds(first_of(one), 6)
    store.settle([one], [rejection_of(raw_ids[1]), rejection_of(raw_ids[4])])
    assert store.retry(raw_ids[4])
    store.settle([], [rejection_of(RawIds(first_of(other), 6)[1])], {other: 3})
    target = folder.with_name("backup")
    with store.new_backup(target) as part:
        for _ in store.back_up(part):
            if (part / "journal" / "batches" / f"{one}.left").exists():
                assert (part / "rejected" / f"{raw_ids[1]}.json").exists()
                assert (part / "raw" / f"{raw_ids[4]}.json").exists()
    async with opened(target) as copy:
        states = states_of(store, list(sent), list(sent.values()))
        assert states_of(copy, list(sent), list(sent.values())) == states
        assert set(states) == {"pending", "processed", "rejected"}
        assert copy.done() == store.done() == {other: 3}
        assert copy.count_pending() == store.count_pending()
        assert copy.count_processed() == store.count_processed() == len(proved(copy))
        assert list(copy.rejections()) == list(store.rejections())
        process(copy)
        assert copy.count_pending() == 0
    assert_once(target)
