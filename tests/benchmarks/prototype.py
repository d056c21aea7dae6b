"""Pending payloads become rows in the most straightforward way: what Dropzone is compared with.

One thread, and no promise: no recovery, no lock, no quarantine, and a payload that is not as it
should be ends it. A program of its own, so that it pays for no import that it does not need. It is
told by Dropzone's variables where the payloads lie and where the rows go.
"""

import asyncio
import itertools
import math
import os
import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, closing
from datetime import UTC, datetime
from pathlib import Path

import msgspec

Row = tuple[datetime, float, float, str]
Upsert = Callable[[Sequence[Row]], Awaitable[object]]
BATCH = 1000
SQLITE_TABLE = """
CREATE TABLE IF NOT EXISTS measurements (
    timestamp_utc TEXT NOT NULL PRIMARY KEY,
    mean REAL NOT NULL,
    std_dev REAL NOT NULL,
    raw_id TEXT NOT NULL
) WITHOUT ROWID
"""
SQLITE_UPSERT = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id)
VALUES (?, ?, ?, ?)
ON CONFLICT (timestamp_utc) DO UPDATE
SET mean = excluded.mean, std_dev = excluded.std_dev, raw_id = excluded.raw_id
WHERE excluded.raw_id >= measurements.raw_id
"""
POSTGRES_TABLE = """
CREATE TABLE IF NOT EXISTS measurements (
    timestamp_utc timestamptz PRIMARY KEY,
    mean double precision NOT NULL,
    std_dev double precision NOT NULL,
    raw_id uuid NOT NULL
)
"""
POSTGRES_UPSERT = """
INSERT INTO measurements (timestamp_utc, mean, std_dev, raw_id)
SELECT unnest($1::timestamptz[]), unnest($2::double precision[]), unnest($3::double precision[]),
    unnest($4::uuid[])
ON CONFLICT (timestamp_utc) DO UPDATE
SET mean = excluded.mean, std_dev = excluded.std_dev, raw_id = excluded.raw_id
WHERE excluded.raw_id >= measurements.raw_id
"""


class Payload(msgspec.Struct):
    time_stamp: str
    data: list[float]


PAYLOAD = msgspec.json.Decoder(Payload)


def open_sqlite(stack: AsyncExitStack, path: str) -> Upsert:
    connection = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(SQLITE_TABLE)

    async def upsert(rows: Sequence[Row]) -> None:
        texts = [(moment.isoformat(), *rest) for moment, *rest in rows]
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(SQLITE_UPSERT, texts)

    return upsert


async def open_postgres(stack: AsyncExitStack, url: str) -> Upsert:
    import asyncpg  # noqa: PLC0415 (a driver that is not chosen is not paid for)

    connection = await asyncpg.connect(url)
    stack.push_async_callback(connection.close)
    await connection.execute(POSTGRES_TABLE)
    return lambda rows: connection.execute(POSTGRES_UPSERT, *zip(*rows, strict=True))


def row_of(file: Path) -> Row:
    payload = PAYLOAD.decode(file.read_bytes())
    moment = datetime.fromisoformat(payload.time_stamp).astimezone(UTC)
    count = len(payload.data)
    mean = math.fsum(payload.data) / count
    std_dev = math.dist(payload.data, itertools.repeat(mean, count)) / math.sqrt(count)
    return moment, mean, std_dev, file.stem


def move(files: Iterable[Path], processed: Path) -> None:
    for file in files:
        arrival = int(file.name[:8] + file.name[9:13], 16) / 1000  # of a UUIDv7
        day = processed / datetime.fromtimestamp(arrival, UTC).date().isoformat()
        day.mkdir(parents=True, exist_ok=True)
        os.rename(file, day / file.name)


async def main() -> None:
    raw = Path(os.environ["DROPZONE_RAW_DIR"])
    async with AsyncExitStack() as stack:
        if os.environ["DROPZONE_BACKEND"] == "postgres":
            upsert = await open_postgres(stack, os.environ["DROPZONE_DATABASE_URL"])
        else:
            upsert = open_sqlite(stack, os.environ["DROPZONE_STORAGE_SQLITE_PATH"])
        names = sorted(os.listdir(raw))
        for start in range(0, len(names), BATCH):
            files = [raw / name for name in names[start : start + BATCH]]
            await upsert([row_of(file) for file in files])
            move(files, raw.parent / "processed")


if __name__ == "__main__":
    asyncio.run(main())
