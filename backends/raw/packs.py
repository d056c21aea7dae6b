"""Packs: a finished day of processed payloads in one file, which never changes.

A pack is NDJSON in gzip members (RFC 1952), ordered by raw_id: zcat and jq read it. Its index leads
to the one member that a payload is in; one that is lost or damaged is made again from its pack.

A pack may lie in the archive, too, or there alone: then `<pack>.archived` beside its index names
the objects that it is in, and each read falls back to them.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import gzip
import hashlib
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

import msgspec
from msgspec import Struct

from backends.raw import (
    PIECE_BYTES,
    ArchiveAway,
    OpenPayload,
    PackDamaged,
    PayloadStoreError,
    StorageUnavailable,
    uuid_at,
)
from backends.raw.archive import Archive, Archived, ObjectMissing
from backends.raw.disk import sync_file
from backends.raw.unpacking import open_packed

log = logging.getLogger("dropzone")

PACK_NAME = re.compile(r"\d{4}-\d\d-\d\d(\.\d+)?\.ndjson\.gz")
PACK = ".ndjson.gz"
INDEX = ".index"
NOTE = ".archived"
MEMBER_BEGINS = gzip.compress(b"", 6, mtime=0)[:8]
ADOPT = "delete it and its .archived, and `adopt` makes both again from the archive"
CHUNK = 1024 * 1024
MEMBER_BYTES = 256 * 1024  # of payloads in one gzip member, which is what a look-up has to read
LARGE_MEMBER = 4 * MEMBER_BYTES  # bytes of text, beyond which one is read piece by piece
AT_ONCE = 8  # members that are fetched from the archive by one request where all are wanted


class PackLine(Struct, frozen=True, omit_defaults=True):
    """A line of a pack: a payload as text, or in base64 where it is no UTF-8."""

    raw_id: UUID
    sha256: str
    payload: str | None = None
    base64: bytes | None = None

    @classmethod
    def of(cls, raw_id: UUID, body: bytes) -> PackLine:
        digest = hashlib.sha256(body).hexdigest()
        try:
            return cls(raw_id, digest, body.decode())
        except UnicodeDecodeError:
            return cls(raw_id, digest, base64=body)

    def body(self) -> bytes:
        """Return the exact bytes that arrived; raises ValueError if they are not these."""
        body = self.base64 or b"" if self.payload is None else self.payload.encode()
        if hashlib.sha256(body).hexdigest() != self.sha256:
            raise ValueError(f"{self.raw_id} in a pack is not what its sha256 says")
        return body


class PackIndex(Struct, frozen=True):
    """What lies beside a pack: its SHA-256, and for each gzip member its first raw_id and place."""

    payloads: int
    bytes: int
    sha256: str
    members: list[tuple[UUID, int]]
    checksum: int | None = None  # CRC-32 of the above; older versions have none

    def with_checksum(self) -> PackIndex:
        return msgspec.structs.replace(self, checksum=self._checksum())

    def is_whole(self) -> bool:
        return self.checksum in (None, self._checksum())

    def _checksum(self) -> int:
        above = (self.payloads, self.bytes, self.sha256, self.members)
        return zlib.crc32(msgspec.json.encode(above))


class ArchiveNote(Struct, frozen=True):
    """Where a pack lies in the archive: the names of its objects, and where each begins in it."""

    objects: list[tuple[str, int]]
    bytes: int  # of the whole pack
    checksum: int  # CRC-32 of the above

    @classmethod
    def of(cls, objects: list[tuple[str, int]], size: int) -> ArchiveNote:
        return cls(objects, size, zlib.crc32(msgspec.json.encode((objects, size))))

    def is_whole(self) -> bool:
        return self == self.of(self.objects, self.bytes)


@dataclass(frozen=True)
class Pack:
    """A pack, by its path and the moment at which it was written."""

    path: Path
    written: int  # nanoseconds since 1970: a name may be used again
    is_lost: bool = False  # only its index is there
    archive: Archive | None = None
    is_far: bool = False  # it was in the archive alone

    @property
    def day(self) -> str:
        return self.path.name[:10]

    @functools.lru_cache(maxsize=32)  # noqa: B019 (a pack is but its name)
    def index(self) -> PackIndex:
        try:
            return self.read_index()
        except (OSError, ValueError) as error:
            if not self.path.exists():
                if self.note_path.exists():
                    wrong = f"the index of {self.path} is damaged or lost, {ADOPT}: {error}"
                    raise PackDamaged(wrong) from error
                # it has just expired
                raise FileNotFoundError(errno.ENOENT, "no such pack", str(self.path)) from error
            return self._mend_index(error)

    def read_index(self) -> PackIndex:
        """Return the index as it lies there; raises OSError, or ValueError if it is damaged."""
        index = msgspec.json.decode(Path(f"{self.path}{INDEX}").read_bytes(), type=PackIndex)
        if not index.is_whole():
            raise ValueError("its checksum is another one")
        return index

    def _mend_index(self, reason: Exception) -> PackIndex:
        """Make the index again, and write it if the whole pack can be read."""
        index, is_whole = index_of(self.path)
        if not index.members:
            wrong = f"{self.path} and its index are damaged, restore both from a copy: {reason}"
            raise PackDamaged(wrong) from reason
        with contextlib.suppress(OSError):  # a disk that is read-only, say: it is made each time
            if is_whole:
                self.write_index(index)
        log.error("the index of %s was damaged or lost, and made again: %s", self.path, reason)
        return index

    def write_index(self, index: PackIndex) -> None:
        part = self.path.with_suffix(f".{os.getpid()}.part")
        part.write_bytes(msgspec.json.encode(index.with_checksum()))
        sync_file(part)
        os.rename(part, f"{self.path}{INDEX}")

    def trouble(self) -> str | None:
        """Say what is wrong with a pack, as far as that shows without reading it all."""
        if self.is_lost:
            return str(self._lost())
        try:
            index = self.read_index()
            size = self.archived().objects[-1][2] if self.is_far else self.path.stat().st_size
        except PayloadStoreError as error:
            return str(error)
        except (OSError, ValueError) as error:
            return (
                f"the index of {self.path} is damaged or lost, the next look-up mends it: {error}"
            )
        if size == index.bytes:
            return None
        return f"{self.path} has {size} bytes, and had {index.bytes}: restore it from a copy"

    def last(self) -> UUID:
        """Return the greatest raw_id, or the end of its day where it cannot be read."""
        with contextlib.suppress(StorageUnavailable, OSError):
            if not self.is_far:  # or else a start would wait for the archive
                return max(self.member(len(self.index().members) - 1))
        with contextlib.suppress(ValueError, OverflowError):  # a day that there never was
            return uuid_at(datetime.fromisoformat(f"{self.day}T00:00:00Z") + timedelta(days=1))
        return UUID(int=0)

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def member(self, number: int) -> dict[UUID, bytes]:
        if self.is_lost:
            raise self._lost()
        start, end = self._place_of(number)
        with self._damage_at(start):
            packed = b"".join(self._pieces(start, end))
            return _read_member(packed, self.index().members[number][0])

    def _lost(self) -> PackDamaged:
        return PackDamaged(
            f"{self.path} is lost: restore it from a copy; if there is none, delete its index "
            f"({self.path.name}{INDEX}), and its payloads count as never there"
        )

    def read(self, raw_id: UUID) -> bytes | None:
        found = self.open_payload(raw_id)
        return b"".join(found.pieces) if found else None

    def has(self, raw_id: UUID) -> bool:
        """Say whether a payload is in this pack, as far as it can be read."""
        with contextlib.suppress(StorageUnavailable, FileNotFoundError):
            return self.open_payload(raw_id) is not None
        return False

    def open_payload(self, raw_id: UUID) -> OpenPayload | None:
        members = self.index().members
        number = bisect.bisect(members, raw_id, key=lambda member: member[0]) - 1
        if number < 0:
            return None
        if self.is_lost:
            raise self._lost()
        if self._text_bytes(number) <= LARGE_MEMBER:
            body = self.member(number).get(raw_id)
            return None if body is None else OpenPayload(len(body), iter([body]))
        start, end = self._place_of(number)
        with self._damage_at(start):
            return open_packed(functools.partial(self._pieces, start, end), raw_id)

    def _place_of(self, number: int) -> tuple[int, int]:
        index = self.index()
        starts = [start for _, start in index.members[number : number + 2]] + [index.bytes]
        return starts[0], starts[1]

    def _pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes between two places; raises FileNotFoundError if it has just expired."""
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            yield from self._far_pieces(start, end)
            return
        with file:
            file.seek(start)
            while start < end and (piece := file.read(min(PIECE_BYTES, end - start))):
                yield piece
                start += len(piece)

    def _far_pieces(self, start: int, end: int) -> Iterator[bytes]:
        try:
            yield from _far_pieces(self.archived(), self.path.name, start, end)
        except PackDamaged:
            self.archived()  # it may have expired meanwhile
            raise

    @property
    def note_path(self) -> Path:
        """The file that tells where it lies in the archive."""
        return Path(f"{self.path}{NOTE}")

    def archived(self) -> Archived:
        """Return it as it lies in the archive; raises FileNotFoundError where it does not."""
        try:
            note = msgspec.json.decode(self.note_path.read_bytes(), type=ArchiveNote)
        except msgspec.DecodeError:
            note = ArchiveNote([], 0, -1)
        if not (note.objects and note.is_whole()):
            raise PackDamaged(f"{self.note_path} is damaged; with the index beside it, {ADOPT}")
        if self.archive is None:
            raise ArchiveAway(f"{self.path.name} is in the archive alone: set raw.archive")
        begins = [begin for _, begin in note.objects]
        ends = [*begins[1:], note.bytes]
        keys = (key for key, _ in note.objects)
        return Archived(self.archive, tuple(zip(keys, begins, ends, strict=True)))

    @contextlib.contextmanager
    def _damage_at(self, start: int) -> Iterator[None]:
        with _damage_at(functools.partial(self._named, start)):
            yield

    def _named(self, start: int) -> str:
        """Return where a byte lies, on this disk or in the archive."""
        if self.path.exists() or not self.archive:
            return f"{self.path} is damaged at byte {start}"
        return self.archived().damage_at(start)

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _text_bytes(self, number: int) -> int:
        """Return the size of a member's text, which stands at its end (RFC 1952, ISIZE)."""
        start, end = self._place_of(number)
        with self._damage_at(start):
            return int.from_bytes(b"".join(self._pieces(end - 4, end)), "little")

    @classmethod
    def write(cls, path: Path, payloads: Callable[[], Iterator[tuple[UUID, bytes]]]) -> int:
        """Write payloads to a new pack; return how many.

        It is there when it is synced and was compared with the payloads, which are asked for twice.
        They come in order of arrival.
        """
        part, members, lines = path.with_suffix(".part"), list[tuple[UUID, int]](), list[PackLine]()
        size = count = 0
        with open(part, "wb") as file:
            for raw_id, body in payloads():
                if size >= MEMBER_BYTES:
                    members.append(_write_member(file, lines))
                    lines, size = [], 0
                lines.append(PackLine.of(raw_id, body))
                size += len(body)
                count += 1
            members.append(_write_member(file, lines))
            file.flush()
            os.fsync(file.fileno())
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        index = PackIndex(count, part.stat().st_size, digest, members)
        _check_pack(part, index, payloads())
        index_file = Path(f"{path}{INDEX}")
        index_file.write_bytes(msgspec.json.encode(index.with_checksum()))
        sync_file(index_file)
        os.rename(part, path)
        sync_file(path.parent)
        return count

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.note_path.unlink(missing_ok=True)
        Path(f"{self.path}{INDEX}").unlink(missing_ok=True)

    def portions(self, left: frozenset[UUID] = frozenset()) -> Iterator[PackPortion | FarPortion]:
        """Yield the members of this pack, without what has `left` it.

        Where they have a long way, some of them travel together.
        """
        if self.is_lost:
            raise self._lost()
        step = AT_ONCE if self.is_far else 1
        firsts = [first for first, _ in self.index().members]
        by_portion = dict[int, set[UUID]]()
        for raw_id in left:
            number = bisect.bisect(firsts, raw_id) - 1
            by_portion.setdefault(number - number % step, set()).add(raw_id)
        archived = self.archived() if self.is_far else None
        for number in range(0, len(firsts), step):
            gone = frozenset(by_portion.get(number, ()))
            if archived:
                numbers = range(number, min(number + step, len(firsts)))
                members = tuple((firsts[each], *self._place_of(each)) for each in numbers)
                yield FarPortion(archived, self.path.name, members, gone)
            else:
                yield PackPortion(self, number, gone)


@dataclass(frozen=True)
class PackPortion:
    """A member of a pack: a `Portion`."""

    pack: Pack
    number: int
    left: frozenset[UUID] = frozenset()  # of its payloads, which are passed over

    def payloads(self) -> Iterator[tuple[UUID, bytes | PayloadStoreError]]:
        """See Portion.payloads."""
        found = self.pack.member(self.number).items()
        return ((raw_id, body) for raw_id, body in found if raw_id not in self.left)


@dataclass(frozen=True)
class FarPortion:
    """Members of a pack that is in the archive alone: a `Portion`.

    It knows where they lie, and needs nothing of this disk: it can travel to another machine.
    """

    archived: Archived
    name: str  # of the pack
    members: tuple[tuple[UUID, int, int], ...]  # the first raw_id, and the place in the pack
    left: frozenset[UUID] = frozenset()  # of its payloads, which are passed over

    def payloads(self) -> Iterator[tuple[UUID, bytes | PayloadStoreError]]:
        """See Portion.payloads."""
        return ((raw_id, body) for raw_id, body in self._all() if raw_id not in self.left)

    def _all(self) -> Iterator[tuple[UUID, bytes | PayloadStoreError]]:
        for first, begin, packed in self._fetched():
            try:
                with _damage_at(functools.partial(self.archived.damage_at, begin)):
                    found = _read_member(packed, first)
            except PackDamaged as error:  # the members behind it are whole
                yield first, error
            else:
                yield from found.items()

    def _fetched(self) -> Iterator[tuple[UUID, int, bytes]]:
        """Yield the members: the first raw_id, the place and the bytes; by as few requests."""
        begin, end = self.members[0][1], self.members[-1][2]
        is_small = end - begin <= AT_ONCE * LARGE_MEMBER
        packed = self._read(begin, end) if is_small else b""
        for first, start, stop in self.members:
            one = packed[start - begin : stop - begin] if is_small else self._read(start, stop)
            yield first, start, one

    def _read(self, start: int, end: int) -> bytes:
        return b"".join(_far_pieces(self.archived, self.name, start, end))


def _far_pieces(archived: Archived, name: str, start: int, end: int) -> Iterator[bytes]:
    """Yield the bytes of a pack in the archive between two places."""
    try:
        yield from archived.pieces(start, end)
    except ObjectMissing as error:
        wrong = f"{archived.archive.place(str(error))} is missing, a part of {name}"
        others = [place for place in archived.places() if not place.endswith(str(error))]
        rest = f", of which {', '.join(others)} are still there" if others else ""
        raise PackDamaged(f"{wrong}{rest}: restore it from a copy") from None


def _write_member(file: BinaryIO, lines: Sequence[PackLine]) -> tuple[UUID, int]:
    """Append lines to a pack; return the first raw_id and where they begin."""
    begin = file.tell()
    text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
    file.write(gzip.compress(text, 6, mtime=0))
    return lines[0].raw_id, begin


@contextlib.contextmanager
def _damage_at(place: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise  # it has just expired
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise PackDamaged(f"{place()}, restore it from a copy: {error}") from error


def _read_member(packed: bytes, first: UUID) -> dict[UUID, bytes]:
    payloads = _payloads_in(gzip.decompress(packed))
    if first not in payloads:
        raise ValueError("it has other payloads than its index says")
    return payloads


def _payloads_in(text: bytes) -> dict[UUID, bytes]:
    lines = (msgspec.json.decode(line, type=PackLine) for line in text.splitlines())
    return {line.raw_id: line.body() for line in lines}


def index_of(path: Path) -> tuple[PackIndex, bool]:
    """Return the index of a pack, and whether all of it could be read.

    What is damaged stands in it as a member of its own, so that a look-up hears of the damage.
    """
    count, members, is_whole = 0, list[tuple[UUID, int]](), True
    last = UUID(int=0)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start, payloads in _members_in(file, size):
            first = min(payloads) if payloads else UUID(int=last.int + 1)
            members.append((first, start))
            last = max(payloads, default=first)
            count += len(payloads)
            is_whole &= bool(payloads)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return PackIndex(count, size, digest, members if count else []), is_whole


def _members_in(file: BinaryIO, size: int) -> Iterator[tuple[int, dict[UUID, bytes]]]:
    """Yield where each gzip member begins, and its payloads; none where it is damaged."""
    start, is_damaged = 0, False
    while start < size:
        payloads, end = _member_at(file, start)
        if payloads or not is_damaged:
            yield start, payloads
        is_damaged = not payloads
        start = end if payloads else _next_member(file, start + 1, size)


def _member_at(file: BinaryIO, start: int) -> tuple[dict[UUID, bytes], int]:
    """Return the payloads of the member that begins at a byte, and where it ends."""
    unzip, text = zlib.decompressobj(wbits=31), b""
    file.seek(start)
    with contextlib.suppress(OSError, zlib.error, ValueError):
        while not unzip.eof:
            chunk = file.read(MEMBER_BYTES)
            if not chunk:
                break
            text += unzip.decompress(chunk)
        if unzip.eof:
            return _payloads_in(text), file.tell() - len(unzip.unused_data)
    return {}, start


def _next_member(file: BinaryIO, begin: int, size: int) -> int:
    """Return where something begins that looks like a member, or the end."""
    for at in range(begin, size, CHUNK):
        file.seek(at)
        with contextlib.suppress(OSError):
            place = file.read(CHUNK + len(MEMBER_BEGINS)).find(MEMBER_BEGINS)
            if place >= 0:
                return at + place
    return size


def _check_pack(path: Path, index: PackIndex, payloads: Iterator[tuple[UUID, bytes]]) -> None:
    """Raise `StorageUnavailable` unless a pack gives back each payload, byte for byte."""
    kept = "what was to be packed was kept"
    starts = [start for _, start in index.members] + [index.bytes]
    with open(path, "rb") as file:
        for number, start in enumerate(starts[:-1]):
            packed = file.read(starts[number + 1] - start)
            with _damage_at(lambda: f"{path} is damaged"):
                payloads_there = _read_member(packed, index.members[number][0])
            for found in payloads_there.items():
                if next(payloads, None) != found:
                    raise StorageUnavailable(f"{path} is not what was written; {kept}")
    if next(payloads, None) is not None:
        raise StorageUnavailable(f"{path} is not whole; {kept}")
