"""Payload stores as tests open and look at them."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from backends.raw import Payloads, RawIds, first_of, form_of, payloads_in_name
from backends.raw.batches import payloads_in
from backends.raw.landing import RawStore


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[RawStore]:
    """Open a store the way a newly started program does."""
    store = RawStore(folder / "raw")
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def pending_in(payloads: Payloads) -> list[UUID]:
    """Return the raw_ids of all pending payloads that came alone, in order of arrival."""
    names, count = payloads.pending()
    assert len(names) == count
    return [first_of(name) for name in names]


def all_pending_in(payloads: Payloads) -> dict[UUID, bytes]:
    """Return all pending payloads, those of batches too, in order of arrival."""
    names, count = payloads.pending()
    found = [payload for name in names for payload in payloads.read_pending(name)]
    assert len(found) == count
    return dict(found)


def names_of(*raw_ids: UUID) -> list[str]:
    """Return the names of the files of payloads that came alone."""
    return [f"{raw_id}.json" for raw_id in raw_ids]


async def land_each(store: RawStore, bodies: Iterable[bytes]) -> list[UUID]:
    """Land payloads that come alone, all at once; return their raw_ids in the same order."""
    landed = await asyncio.gather(*map(store.land, bodies))
    return [raw_id for raw_ids in landed for raw_id in raw_ids]


def lines(*bodies: bytes) -> dict[str, Any]:
    """Return the arguments of `land` for a batch of lines."""
    return {"body": b"\n".join(bodies), "form": "ndjson", "payloads": len(bodies)}


def payloads_below(folder: Path) -> dict[UUID, bytes]:
    """Return what is in the files of a folder, below it too, in order of arrival.

    Of a batch that is all that arrived in it, whether it has left it since or not.
    """
    found = dict[UUID, bytes]()
    for file in sorted(folder.rglob("*"), key=lambda file: file.name):
        if count := payloads_in_name(file.name):
            bodies = payloads_in(file.read_bytes(), form_of(file.name))
            found.update(zip(RawIds(first_of(file.name), count), bodies, strict=True))
    return found
