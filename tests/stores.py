"""Payload stores as tests open and look at them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID

from backends.raw import Payloads
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
    """Return the raw_ids of all pending payloads, in order of arrival."""
    raw_ids, count = payloads.pending()
    assert len(raw_ids) == count
    return [UUID(raw_id) for raw_id in raw_ids]
