"""Nodes: the number and the mark in each raw_id, and whose the payloads are that are not here."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import getrandbits
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import land_each, lines, opened

from backends.raw import (
    MOST_IN_BATCH,
    SAME_MOMENT,
    RawIdElsewhere,
    RawIds,
    RawIdUnknown,
    came_alone,
    mark_of,
    next_raw_id,
    node_in,
    place_of,
    uuid_at,
)
from backends.raw.landing import RawStore
from backends.raw.nodes import FILE, KnownNodes, Numbers, read_numbers

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
BEGINNING = uuid_at(NOW)
EARLIER, LATER = NOW - timedelta(days=1), NOW + timedelta(days=1)
BODY = b'{"time_stamp": "2026-05-01T12:00:00Z", "data": [1]}'
MARK = 0xABC
Ids = Sequence[UUID]

numbers = st.integers(0, 0xFFFF)
counts = st.integers(0, 3) | st.integers(0, MOST_IN_BATCH)


def given_out(at: datetime, node: int, mark: int, count: int = 0) -> Ids:
    """Return the raw_ids of a payload, or the first and last ones of a batch, of this version."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: int(at.timestamp() * 1e9))
        first = next_raw_id(UUID(int=0), count, node, mark)
    return [first, RawIds(first, count)[-1]] if count else [first]


def of_0_1_0(at: datetime, random: int) -> UUID:
    """Return a raw_id as version 0.1.0 has given them out, with 74 random bits."""
    return UUID(int=uuid_at(at).int | random >> 62 << 64 | random & SAME_MOMENT)


def known(node: int | None, *had: int, was_empty: bool = True) -> KnownNodes:
    """Return what is known to the node of a folder that began its notes at `NOW`."""
    return KnownNodes(Numbers(MARK, BEGINNING, was_empty, had or (node or 0,)), node)


# ── What is in a raw_id ───────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(numbers, st.integers(0, 0xFFF), counts)
def test_number_and_mark(node: int, mark: int, count: int):
    """Every raw_id names its node by its last four hex digits, also each of a batch."""
    raw_ids = given_out(NOW, node, mark, count)
    assert {str(raw_id)[-4:] for raw_id in raw_ids} == {f"{node:04x}"}
    assert {(node_in(raw_id), mark_of(raw_id)) for raw_id in raw_ids} == {(node, mark)}


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 999_999))
def test_order_below_a_millisecond(nanoseconds: int):
    """Of two nodes with one clock, the payload that came 244 ns earlier has the lesser raw_id."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: 10**18 + nanoseconds)
        one = next_raw_id(UUID(int=0), 0, 0xFFFF, 0xFFF)
        patch.setattr(time, "time_ns", lambda: 10**18 + nanoseconds + 245)
        other = next_raw_id(UUID(int=0), 0, 0, 0)
    assert one < other
    fraction = one.int >> 64 & 0xFFF  # of the millisecond, RFC 9562, method 3
    assert fraction == nanoseconds * 4096 // 1_000_000


async def test_each_way_to_land(tmp_path: Path):
    """Payloads alone, in groups, and in batches, which another process lands, name the node."""
    store = RawStore(tmp_path / "raw", node=0x1A2B)
    await store.open()
    raw_ids = await land_each(store, [BODY] * 50)
    raw_ids += await store.land(**lines(BODY, BODY))
    large = b"%s %s" % (BODY, b" " * 2_000_000)  # lands by the writer process
    raw_ids += await store.land(large)
    raw_ids += await store.land(BODY, "a key")
    await store.close()
    assert {str(raw_id)[-4:] for raw_id in raw_ids} == {"1a2b"}
    notes = read_numbers(store.journal)
    assert notes is not None
    assert notes.numbers == (0x1A2B,)
    assert {mark_of(raw_id) for raw_id in raw_ids} == {notes.mark}
    assert min(raw_ids) > notes.since


async def test_no_number(tmp_path: Path):
    """A node without a number is node 0."""
    async with opened(tmp_path) as store:
        assert (await store.land(BODY))[0].int & 0xFFFF == 0
        assert (store.nodes().number, store.node) == (0, None)


# ── What a folder notes ───────────────────────────────────────────────────────────────────────────


async def reopened(tmp_path: Path, node: int | None) -> tuple[RawStore, UUID]:
    """Open a folder as a node, land a payload and close it; return its raw_id."""
    store = RawStore(tmp_path / "raw", node=node)
    await store.open()
    [raw_id] = await store.land(BODY)
    await store.close()
    return store, raw_id


async def test_a_number_that_changes(tmp_path: Path):
    """A node keeps what it has landed under another number, and raw_ids go on increasing."""
    of_each = [await reopened(tmp_path, node) for node in (None, 7, 3, 7)]
    raw_ids = [raw_id for _, raw_id in of_each]
    assert raw_ids == sorted(raw_ids)
    assert [node_in(raw_id) for raw_id in raw_ids] == [0, 7, 3, 7]
    [store, _] = of_each[-1]
    notes = read_numbers(store.journal)
    assert notes is not None
    assert notes.numbers == (0, 7, 3)
    assert {mark_of(raw_id) for raw_id in raw_ids} == {notes.mark}
    for raw_id in raw_ids:
        assert store.read(raw_id) == ("pending", BODY)
        store.path(raw_id, "pending").unlink()
        with pytest.raises(RawIdUnknown) as lost:  # and not that it is another node's
            store.read(raw_id)
        assert lost.type is RawIdUnknown
        assert not store.nodes().is_others(raw_id)
    nodes = KnownNodes(notes, None)  # of a command that is not told the number
    assert (nodes.number, nodes.is_others(raw_ids[1])) == (3, False)


@pytest.mark.parametrize("damage", ["lost", "{", ""])
async def test_notes_that_are_lost(tmp_path: Path, damage: str):
    """Where its notes are lost, a folder begins others, and what it has landed stays its own."""
    store, before = await reopened(tmp_path, 7)
    file = store.journal / FILE
    file.unlink()
    if damage != "lost":
        file.write_text(damage)
    store, behind = await reopened(tmp_path, 7)
    notes = read_numbers(store.journal)
    assert notes is not None
    assert before < notes.since < behind
    assert not notes.was_empty
    for raw_id in (before, behind):
        assert not store.nodes().is_others(raw_id)
        assert not store.nodes().is_doubtful(raw_id)


async def test_notes_are_in_a_backup(tmp_path: Path):
    """A folder that was restored goes on with its mark: nothing in it is taken for another's."""
    store, before = await reopened(tmp_path / "data", 7)
    await store.open()
    with store.new_backup(tmp_path / "restored") as part:
        assert not [copied.trouble for copied in store.back_up(part) if copied.trouble]
    [lost] = await store.land(BODY)  # behind the backup
    await store.close()
    restored, behind = await reopened(tmp_path / "restored", 7)
    for raw_id in (before, lost, behind):
        assert not restored.nodes().is_others(raw_id)
        assert not restored.nodes().is_doubtful(raw_id)


# ── Whose a payload is ────────────────────────────────────────────────────────────────────────────


@settings(deadline=None)
@given(node=numbers, other=numbers, mark=st.integers(0, 0xFFF), count=counts)
def test_of_other_nodes(node: int, other: int, mark: int, count: int):
    """A payload that is not here and has another number is another node's, alone or in a batch."""
    for at, its_mark in ((EARLIER, mark), (LATER, mark), (LATER, MARK)):
        for raw_id in given_out(at, other, its_mark, count):
            expected = None if other == node else other
            assert known(node).elsewhere(raw_id) == expected
            assert known(node).is_others(raw_id) == (expected is not None)


@settings(deadline=None)
@given(node=numbers, mark=st.integers(0, 0xFFF), count=counts)
def test_of_a_twin(node: int, mark: int, count: int):
    """With this node's number and another mark it is in doubt, if it is later than this folder."""
    for nodes in (known(node), known(None, 0, node), known(node, was_empty=False)):
        for raw_id in given_out(LATER, node, mark, count):
            assert nodes.is_doubtful(raw_id) == (mark != MARK)
            assert not nodes.is_others(raw_id)
        for raw_id in given_out(EARLIER, node, mark, count):
            assert not nodes.is_doubtful(raw_id)


@settings(deadline=None)
@given(node=st.none() | numbers, had=numbers, count=counts)
def test_of_this_folder(node: int | None, had: int, count: int):
    """With this folder's mark and a number that it has had, it is its own."""
    for raw_id in given_out(LATER, had, MARK, count):
        nodes = known(node, had, node or 0)
        assert not nodes.is_others(raw_id)
        assert not nodes.is_doubtful(raw_id)


@settings(max_examples=500, deadline=None)
@given(st.builds(of_0_1_0, st.just(EARLIER), st.integers(0, (1 << 74) - 1)), numbers)
def test_of_older_versions(raw_id: UUID, node: int):
    """What version 0.1.0 has landed here counts as this node's, whatever its random bits are."""
    if came_alone(raw_id):  # which is so once in 131,072 times
        return
    for nodes in (known(None, was_empty=False), known(node, was_empty=False), known(None)):
        assert not nodes.is_others(raw_id)
        assert not nodes.is_doubtful(raw_id)
    if node_in(raw_id) != node:  # it cannot be of a folder that was empty, one of several nodes
        assert known(node).is_others(raw_id)
        assert (known(node).elsewhere(raw_id) is None) == (place_of(raw_id) is None)


@settings(deadline=None)
@given(st.integers(1, 0xFFFF), counts)
def test_of_the_version_that_knew_batches(node: int, count: int):
    """Payloads that landed before this folder had a number, and so have 0 for it, are its own."""
    for raw_id in given_out(EARLIER, 0, getrandbits(12), count):
        assert not known(node, was_empty=False).is_others(raw_id)
        assert not known(None, was_empty=False).is_others(raw_id)
        assert known(node).is_others(raw_id)  # of a folder that was begun later


def test_of_a_node_whose_clock_is_behind():
    """Where two nodes begin at once, each knows the other's payloads, though no number is set."""
    for count in (0, 2):
        for raw_id in given_out(NOW - timedelta(seconds=5), 7, MARK, count):
            assert known(None).elsewhere(raw_id) == 7


def test_of_a_node_that_has_a_former_number():
    """A number that this node has given away is that of the node that has it now."""
    for count in (0, 2):
        for raw_id in given_out(LATER, 3, MARK + 1, count):
            assert known(9, 3, 9).elsewhere(raw_id) == 3
            assert known(9, 3, 9).is_others(raw_id)
            assert known(None, 3, 9).elsewhere(raw_id) == 3


@pytest.mark.parametrize("had", [(3,), (3, 0), (0, 3), (0, 3, 0)])
def test_a_command_that_is_not_told_the_number(had: tuple[int, ...]):
    """It judges by the number that the folder had last, so that it calls nothing orphaned."""
    nodes = known(None, *had)
    assert nodes.number == 3
    for raw_id in (*given_out(LATER, 0, MARK + 1), *given_out(LATER, 0, MARK + 1, 2)):
        assert nodes.elsewhere(raw_id) == 0


def test_of_nobody():
    """A raw_id that is no UUIDv7 names no node."""
    for raw_id in (uuid4(), UUID(int=0), UUID(int=1 << 127)):
        for nodes in (known(5), known(None), KnownNodes(Numbers(), 5)):
            assert not nodes.is_others(raw_id)
            assert not nodes.is_doubtful(raw_id)


async def test_it_is_said_where_a_payload_is(tmp_path: Path):
    """Whoever looks for another node's payload hears its number."""
    store, _ = await reopened(tmp_path, 1)
    [raw_id] = given_out(datetime.now(UTC), 2, 0)
    for look in (store.read, store.open_payload):
        with pytest.raises(RawIdElsewhere, match="node 2") as error:
            look(raw_id)
        assert error.value.node == 2
