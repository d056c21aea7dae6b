"""raw_ids: what their bits say, and how new ones are made.

A UUIDv7 (RFC 9562). Behind its milliseconds are 12 bits of their fraction (method 3), then:

    12 bits   the mark of the folder that gave it out; see `nodes.py`
    17 bits   how many payloads came in its batch; 0 for a payload that came alone
    17 bits   its place in the batch, from 0; random for a payload that came alone
    16 bits   the number of the node

So a raw_id leads to the file of its batch, whose name has the first raw_id and the count. Those
of older versions have random bits there, and lead to no file.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from random import getrandbits
from typing import NamedTuple, overload
from uuid import UUID

NODE_BITS, PLACE_BITS, COUNT_BITS, MARK_BITS = 16, 17, 17, 12
COUNT_AT, MARK_AT = NODE_BITS + PLACE_BITS, NODE_BITS + PLACE_BITS + COUNT_BITS
MOST_IN_BATCH = (1 << COUNT_BITS) - 1  # payloads
VARIANT = 2 << 62  # of every UUID of RFC 9562
SAME_MOMENT = (1 << 62) - 1  # the bits of a raw_id that say nothing about when it was given out
NEXT = 1 << NODE_BITS  # from a raw_id to that of the next payload of a batch


class Place(NamedTuple):
    """Where a payload is in a batch: the first raw_id of so many payloads, and its place from 0."""

    first: UUID
    payloads: int
    at: int

    def name(self, form: str) -> str:
        """Return the name of the file of the batch."""
        return f"{self.first}.{self.payloads}.{form}"


def place_of(raw_id: UUID) -> Place | None:
    """Return where a payload is in its batch, as far as its raw_id tells; None if it came alone."""
    payloads = raw_id.int >> COUNT_AT & MOST_IN_BATCH
    at = raw_id.int >> NODE_BITS & MOST_IN_BATCH
    if at >= payloads:
        return None
    return Place(UUID(int=raw_id.int - at * NEXT), payloads, at)


def begins_batch(raw_id: UUID, payloads: int) -> bool:
    """Say whether a raw_id is the first one of a batch of so many payloads."""
    return place_of(raw_id) == (raw_id, payloads, 0)


def came_alone(raw_id: UUID) -> bool:
    """Say whether a raw_id is one that this version gives to a payload that comes alone."""
    return not raw_id.int >> COUNT_AT & MOST_IN_BATCH


class RawIds(Sequence[UUID]):
    """The raw_ids of a batch: `first` + k·2¹⁶ for k = 0, 1, … below the number of payloads."""

    def __init__(self, first: UUID, payloads: int) -> None:
        self.first = first
        self._of = range(first.int, first.int + payloads * NEXT, NEXT)

    def __len__(self) -> int:
        return len(self._of)

    def __iter__(self) -> Iterator[UUID]:
        return (UUID(int=value) for value in self._of)

    @overload
    def __getitem__(self, index: int) -> UUID: ...
    @overload
    def __getitem__(self, index: slice) -> list[UUID]: ...
    def __getitem__(self, index: int | slice) -> UUID | list[UUID]:
        if isinstance(index, slice):
            return [UUID(int=value) for value in self._of[index]]
        return UUID(int=self._of[index])

    def texts(self) -> list[str]:
        """Return them as text, which is much quicker than one by one."""
        head, last = str(self.first)[:24], (1 << 48) - 1  # of which no payload changes a bit
        return [f"{head}{value & last:012x}" for value in self._of]


def texts_of(raw_ids: Sequence[UUID]) -> list[str]:
    """Return raw_ids as text."""
    return raw_ids.texts() if isinstance(raw_ids, RawIds) else list(map(str, raw_ids))


def node_in(raw_id: UUID) -> int:
    """Return the number of the node that a raw_id of this version names."""
    return raw_id.int & (1 << NODE_BITS) - 1


def mark_of(raw_id: UUID) -> int:
    """Return the mark of the folder that has given out a raw_id of this version."""
    return raw_id.int >> MARK_AT & (1 << MARK_BITS) - 1


def next_raw_id(last: UUID, count: int = 0, node: int = 0, mark: int | None = None) -> UUID:
    """Return a new raw_id that is greater than `last`, and than all of the batch of that.

    It is so whatever the clock says. With a `count` it is the first one of a batch of so many
    payloads; raises ValueError if those are more than a raw_id can tell. `node` is the number of
    the node, and `mark` that of the folder, random unless given.
    """
    if count > MOST_IN_BATCH:
        raise ValueError(f"a batch has {MOST_IN_BATCH} payloads at most, not {count}")
    milliseconds, rest = divmod(time.time_ns(), 1_000_000)
    moment = max(milliseconds << 12 | (rest << 12) // 1_000_000, _moment_of(last) + 1)
    random = getrandbits(MARK_BITS + PLACE_BITS)
    place = 0 if count else random & MOST_IN_BATCH
    return UUID(
        int=moment >> 12 << 80
        | (7 << 12 | moment & 0xFFF) << 64
        | VARIANT
        | (random >> PLACE_BITS if mark is None else mark) << MARK_AT
        | (count << PLACE_BITS | place) << NODE_BITS
        | node
    )


def _moment_of(raw_id: UUID) -> int:
    """Return the bits by which raw_ids of one store differ and are ordered: 2¹² a millisecond."""
    return raw_id.int >> 80 << 12 | raw_id.int >> 64 & 0xFFF
