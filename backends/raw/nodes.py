"""Nodes: whose a payload is that is not in this folder, as far as its raw_id tells.

Any number of Dropzones, each with a folder and a number of its own, may write to one database. A
raw_id has the number of its node, and the mark of the folder that gave it out: 12 bits, drawn when
that folder began its notes, `journal/node`. A payload that is here is this node's, whatever
its raw_id says. One that is not here has

- this folder's mark, and a number that it has had: it was this node's, and is lost or has expired;
- this node's number, and another mark: a second Dropzone has the same number;
- else the number of the node that it lies on.

Versions that knew no nodes have given out raw_ids that have other bits there. Those that knew
batches have 0 for the number; 0.1.0 has random bits everywhere behind the milliseconds. The bits
that say how many payloads came in its batch are all 0 in one of 131,072 such raw_ids, and only that
one looks as if it came alone; but every second one looks as if it came in a batch. So a raw_id
names a node if its payload came alone. If it came in a batch, it does so only behind the beginning
of this folder's notes; before that, only where this folder was empty then and has a number: then
it is none of this folder's in any case. Every other one counts as this node's, as it did before
there were nodes, so that nothing hides a payload that is lost.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from random import getrandbits
from uuid import UUID

import msgspec
from msgspec import Struct

from backends.raw import MARK_BITS, SAME_MOMENT, came_alone, mark_of, node_in, place_of, uuid_at
from backends.raw.disk import sync_file

log = logging.getLogger("dropzone")

FILE = "node"  # in the journal
CLOCKS_APART = 600_000  # milliseconds, at most
LATEST = UUID(int=(1 << 128) - 1)


class Numbers(Struct, frozen=True):
    """What a folder notes: its mark, and which numbers it has had, in their order.

    It has given out raw_ids with this mark behind `since`; `was_empty` says that it has given out
    none before. Of a folder without a note (nothing has been landed there) nothing is said.
    """

    mark: int = 0
    since: UUID = LATEST
    was_empty: bool = False
    numbers: tuple[int, ...] = ()


class KnownNodes(Struct, frozen=True):
    """Tells by the notes of a folder whose raw_ids are; implements `backends.raw.Nodes`.

    `node` is the number that is configured, None where none is.
    """

    notes: Numbers
    node: int | None = None

    @property
    def number(self) -> int:
        """The number of this node, also for a command that is not told what the service is told."""
        if self.node is not None:
            return self.node
        return next((number for number in reversed(self.notes.numbers) if number), 0)

    @property
    def is_numbered(self) -> bool:
        return self.node is not None or any(self.notes.numbers)

    def elsewhere(self, raw_id: UUID) -> int | None:
        """See Nodes.elsewhere."""
        notes, number = self.notes, node_in(raw_id)
        if not self._names_node(raw_id) or number == self.number:
            return None
        if raw_id > notes.since:
            is_own = mark_of(raw_id) == notes.mark and number in notes.numbers
        else:  # those of before, which had no number
            is_own = number == 0 and not notes.was_empty
        return None if is_own else number

    def is_others(self, raw_id: UUID) -> bool:
        """See Nodes.is_others."""
        if self.elsewhere(raw_id) is not None:
            return True
        is_before = raw_id.version == 7 and raw_id <= self.notes.since
        is_none_of_this = is_before and self.notes.was_empty and self.is_numbered
        return is_none_of_this and not self._names_node(raw_id)

    def is_doubtful(self, raw_id: UUID) -> bool:
        """See Nodes.is_doubtful."""
        notes = self.notes
        is_same = self._names_node(raw_id) and node_in(raw_id) == self.number
        return is_same and raw_id > notes.since and mark_of(raw_id) != notes.mark

    def _names_node(self, raw_id: UUID) -> bool:
        """Say whether the last bits of a raw_id are the number of a node; see the head of this."""
        if raw_id.version != 7:
            return False
        if came_alone(raw_id):
            return True
        if self.notes.was_empty and self.is_numbered:
            beginning = 0
        elif self.notes.was_empty:  # and the clocks of the others may be behind
            beginning = self.notes.since.int - (CLOCKS_APART << 80)
        else:
            beginning = self.notes.since.int
        return place_of(raw_id) is not None and raw_id.int > beginning


def read_numbers(journal: Path) -> Numbers | None:
    """Return what a folder has noted; None where that is nothing, or damaged."""
    with contextlib.suppress(OSError, ValueError):
        return msgspec.json.decode((journal / FILE).read_bytes(), type=Numbers)
    return None


def note_number(
    journal: Path, number: int, last: UUID, publish: Callable[[Path, bytes], None]
) -> Numbers:
    """Return the notes of a folder that is to give out raw_ids of a number, behind `last`.

    They are on disk then. The caller keeps out others. Where there are none, or where they are
    damaged, the folder gets another mark: what it has given out before counts as its own.
    """
    known = read_numbers(journal)
    if known is None:
        if (journal / FILE).exists():
            log.warning("%s is damaged: the folder gets another mark", journal / FILE)
        behind_its_batch = UUID(int=last.int | SAME_MOMENT)
        since = behind_its_batch if last.int else uuid_at(datetime.now(UTC))
        known = Numbers(getrandbits(MARK_BITS), since, was_empty=not last.int)
    if number not in known.numbers:
        known = msgspec.structs.replace(known, numbers=(*known.numbers, number))
        publish(journal / FILE, msgspec.json.encode(known))
        sync_file(journal / FILE)
        sync_file(journal)
    return known
