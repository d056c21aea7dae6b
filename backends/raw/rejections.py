"""An index of the quarantine, so that nobody has to read every reason to find or to count some.

The folder remains the truth. Whoever moves payloads into or out of it notes that here, whichever
process it is; what a kill has kept from being noted, or somebody has done by hand, is found by
`Folders.take_stock`. So nothing is lost with this file, which is made anew where it is missing.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Protocol
from uuid import UUID

from backends import timestamp_text
from backends.raw import RawIdUnknown, Rejection, StorageUnavailable

OPEN_INDEX = (
    "PRAGMA synchronous = NORMAL",  # what a power cut takes is found again
    """CREATE TABLE IF NOT EXISTS rejected
    (raw_id TEXT PRIMARY KEY, code TEXT NOT NULL, at TEXT NOT NULL) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS codes ON rejected (code, at)",
)
NOTE = "INSERT OR REPLACE INTO rejected (raw_id, code, at) VALUES (?, ?, ?)"
FORGET = "DELETE FROM rejected WHERE raw_id = ?"
KNOWN = "SELECT raw_id FROM rejected WHERE raw_id > ? AND raw_id <= ?"
FIND = """
SELECT raw_id, code, at FROM rejected
WHERE raw_id > :after AND at >= :since AND at < :until AND (:code IS NULL OR code = :code)
ORDER BY raw_id LIMIT :limit
"""
COUNT = "SELECT code, count(*) FROM rejected WHERE at >= ? AND at < ? GROUP BY code"
LAST = "~"  # is behind every raw_id and every moment
WINDOW = 200_000  # payloads that are listed at a time, so that any number fits into memory
PORTION = 1000  # payloads


class Quarantine(Protocol):
    """Whatever can say what is rejected: the folders."""

    def rejected_names(self, limit: int, after: str = "") -> list[str]:
        """Return the `limit` earliest rejected raw_ids behind `after`, in order of arrival."""

    def rejection(self, raw_id: UUID) -> Rejection:
        """Return why a payload is rejected; raises `RawIdUnknown` if it is not."""


class Noted(NamedTuple):
    """What the index knows of a rejected payload: `at` is when it was rejected."""

    raw_id: str
    code: str
    at: str

    @classmethod
    def of(cls, rejection: Rejection) -> Noted:
        return cls(str(rejection.raw_id), rejection.code, timestamp_text(rejection.rejected_at))


class RejectionIndex:
    """The index in `file`; threads may share one. Its methods raise `StorageUnavailable`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._turn = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def __reduce__(self) -> tuple[type[RejectionIndex], tuple[Path]]:
        return RejectionIndex, (self._file,)  # another process opens it for itself

    def __del__(self) -> None:
        self._close()

    def note(self, rejections: Iterable[Rejection]) -> None:
        """Note payloads that are rejected now, or that have another reason by now."""
        with self._opened() as index:
            index.executemany(NOTE, map(Noted.of, rejections))

    def forget(self, raw_ids: Iterable[str]) -> None:
        """Note payloads that are rejected no longer."""
        with self._opened() as index:
            index.executemany(FORGET, ((raw_id,) for raw_id in raw_ids))

    def find(
        self,
        quarantine: Quarantine,
        code: str | None,
        since: datetime | None,
        until: datetime | None,
        after: UUID | None,
        limit: int,
    ) -> tuple[list[Rejection], Counter[str]]:
        """See Payloads.find_rejections."""
        first = timestamp_text(since) if since else ""
        end = timestamp_text(until) if until else LAST
        page, last, is_more = list[Rejection](), str(after or ""), True
        while is_more and len(page) < limit:
            most = min(limit - len(page), PORTION)
            wanted = {"code": code, "since": first, "until": end, "after": last, "limit": most}
            with self._opened() as index:
                noted = [Noted(*found) for found in index.execute(FIND, wanted)]
            for each in self._corrected(noted, quarantine):
                if code in (None, each.code) and first <= timestamp_text(each.rejected_at) < end:
                    page.append(each)
            is_more, last = len(noted) == most, noted[-1].raw_id if noted else last
        return page, self._count(first, end)

    def _corrected(self, noted: Iterable[Noted], quarantine: Quarantine) -> list[Rejection]:
        """Return why payloads are rejected, and correct the index where it says something else."""
        found, wrong, gone = list[Rejection](), list[Rejection](), list[str]()
        for each in noted:
            try:
                found.append(quarantine.rejection(UUID(each.raw_id)))
            except RawIdUnknown:
                gone.append(each.raw_id)
                continue
            if Noted.of(found[-1]) != each:
                wrong.append(found[-1])
        if gone or wrong:
            self.forget(gone)
            self.note(wrong)
        return found

    def take_stock(self, quarantine: Quarantine) -> Counter[str]:
        """See Payloads.take_stock."""
        after, is_more = "", True
        while is_more:
            there = quarantine.rejected_names(WINDOW, after)
            is_more = len(there) == WINDOW
            last = there[-1] if is_more else LAST
            with self._opened() as index:
                known = {raw_id for (raw_id,) in index.execute(KNOWN, (after, last))}
            odd = [*known.difference(there), *(raw_id for raw_id in there if raw_id not in known)]
            for start in range(0, len(odd), PORTION):
                self._look_again(odd[start : start + PORTION], quarantine)
            after = last
        return self._count()

    def _look_again(self, raw_ids: Iterable[str], quarantine: Quarantine) -> None:
        """Note what is true of payloads now: they may have moved since they were listed."""
        rejected, gone = list[Rejection](), list[str]()
        for raw_id in raw_ids:
            try:
                rejected.append(quarantine.rejection(UUID(raw_id)))
            except RawIdUnknown:
                gone.append(raw_id)
        self.forget(gone)
        self.note(rejected)

    def _count(self, first: str = "", end: str = LAST) -> Counter[str]:
        with self._opened() as index:
            return Counter(dict(index.execute(COUNT, (first, end)).fetchall()))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        """Give out the connection for one transaction."""
        with self._turn:
            try:
                if self._connection is None:
                    self._connection = self._open()
                with self._connection:
                    yield self._connection
            except sqlite3.Error as error:
                self._close()
                wrong = f"{self._file}: {error}; if it is damaged, delete it: it is made anew"
                raise StorageUnavailable(wrong) from error

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._file, check_same_thread=False)
        try:
            with contextlib.suppress(sqlite3.OperationalError):  # another process is just doing it
                connection.execute("PRAGMA journal_mode = WAL")
            for statement in OPEN_INDEX:
                connection.execute(statement)
        except BaseException:
            connection.close()
            raise
        return connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
