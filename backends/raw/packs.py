"""Packs: a finished day of processed payloads in one file, which never changes.

A pack is NDJSON in gzip members (RFC 1952), ordered by raw_id: zcat and jq read it. Its index leads
to the one member that a payload is in.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import msgspec
from msgspec import Struct

from backends.raw import OpenPayload, PackDamaged, RawIdUnknown, StorageUnavailable
from backends.raw.disk import sync_file
from backends.raw.unpacking import open_packed

PACK_NAME = re.compile(r"\d{4}-\d\d-\d\d(\.\d+)?\.ndjson\.gz")
PACK = ".ndjson.gz"
MEMBER_BYTES = 256 * 1024  # of payloads in one gzip member, which is what a look-up has to read
LARGE_MEMBER = 4 * MEMBER_BYTES  # bytes of text, beyond which one is read piece by piece


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


@dataclass(frozen=True)
class Pack:
    """A pack, by its path and the moment at which it was written."""

    path: Path
    written: int  # nanoseconds since 1970: a name may be used again

    @functools.lru_cache(maxsize=32)  # noqa: B019 (a pack is but its name)
    def index(self) -> PackIndex:
        try:
            return msgspec.json.decode(Path(f"{self.path}.index").read_bytes(), type=PackIndex)
        except (FileNotFoundError, ValueError) as error:
            if not self.path.exists():
                raise  # it has just expired
            wrong = f"{self.path} has lost its index, restore it from a copy: {error}"
            raise PackDamaged(wrong) from error

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def member(self, number: int) -> dict[UUID, bytes]:
        return _read_member(self.path, self.index(), number)

    def read(self, raw_id: UUID) -> bytes | None:
        found = self.open_payload(raw_id)
        return b"".join(found.pieces) if found else None

    def open_payload(self, raw_id: UUID) -> OpenPayload | None:
        members = self.index().members
        number = bisect.bisect(members, raw_id, key=lambda member: member[0]) - 1
        if number < 0:
            return None
        if self._text_bytes(number) <= LARGE_MEMBER:
            body = self.member(number).get(raw_id)
            return None if body is None else OpenPayload(len(body), iter([body]))
        start, end = self._place_of(number)
        with _damage_at(self.path, start):
            return open_packed(self.path, start, end, raw_id)

    def _place_of(self, number: int) -> tuple[int, int]:
        index = self.index()
        starts = [start for _, start in index.members[number : number + 2]] + [index.bytes]
        return starts[0], starts[1]

    @functools.lru_cache(maxsize=1024)  # noqa: B019
    def _text_bytes(self, number: int) -> int:
        """Return the size of a member's text, which stands at its end (RFC 1952, ISIZE)."""
        _, end = self._place_of(number)
        with open(self.path, "rb") as file:
            file.seek(end - 4)
            return int.from_bytes(file.read(4), "little")

    @classmethod
    def write(cls, path: Path, folder: Path, raw_ids: Sequence[UUID]) -> Pack:
        """Write payloads to a new pack; it is there when it is synced and has been read again."""
        part, members, lines, size = path.with_suffix(".part"), list[tuple[UUID, int]](), [], 0
        with open(part, "wb") as file:
            for number, raw_id in enumerate(raw_ids, 1):
                body = (folder / f"{raw_id}.json").read_bytes()
                lines.append(PackLine.of(raw_id, body))
                size += len(body)
                if size >= MEMBER_BYTES or number == len(raw_ids):
                    members.append((lines[0].raw_id, file.tell()))
                    text = b"".join(msgspec.json.encode(line) + b"\n" for line in lines)
                    file.write(gzip.compress(text, 6, mtime=0))
                    lines, size = [], 0
            file.flush()
            os.fsync(file.fileno())
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        index = PackIndex(len(raw_ids), part.stat().st_size, digest, members)
        _check_pack(part, index, folder, raw_ids)
        index_file = Path(f"{path}.index")
        index_file.write_bytes(msgspec.json.encode(index))
        sync_file(index_file)
        os.rename(part, path)
        sync_file(path.parent)
        return cls(path, path.stat().st_mtime_ns)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        Path(f"{self.path}.index").unlink(missing_ok=True)

    def portions(self) -> Iterator[PackPortion]:
        """Yield the members of this pack, each to be read by itself."""
        for number in range(len(self.index().members)):
            yield PackPortion(self, number)


@dataclass(frozen=True)
class PackPortion:
    """One member of a pack: a `Portion`."""

    pack: Pack
    number: int

    def raw_ids(self) -> Sequence[UUID]:
        """See Portion.raw_ids."""
        return list(self.pack.member(self.number))

    def reader(self) -> Callable[[UUID], bytes]:
        """See Portion.reader."""
        bodies = self.pack.member(self.number)

        def read(raw_id: UUID) -> bytes:
            if raw_id not in bodies:
                raise RawIdUnknown(f"{self.pack.path.name} has no payload {raw_id}")
            return bodies[raw_id]

        return read


def _read_member(path: Path, index: PackIndex, number: int) -> dict[UUID, bytes]:
    starts = [start for _, start in index.members] + [index.bytes]
    with open(path, "rb") as file:
        file.seek(starts[number])
        packed = file.read(starts[number + 1] - starts[number])
    with _damage_at(path, starts[number]):
        text = gzip.decompress(packed)
        lines = (msgspec.json.decode(line, type=PackLine) for line in text.splitlines())
        return {line.raw_id: line.body() for line in lines}


@contextlib.contextmanager
def _damage_at(path: Path, start: int) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        wrong = f"{path} is damaged at byte {start}, restore it from a copy: {error}"
        raise PackDamaged(wrong) from error


def _check_pack(path: Path, index: PackIndex, folder: Path, raw_ids: Iterable[UUID]) -> None:
    """Raise `StorageUnavailable` unless a pack gives back each payload, byte for byte."""
    wanted = iter(raw_ids)
    for number in range(len(index.members)):
        for raw_id, body in _read_member(path, index, number).items():
            if next(wanted, None) != raw_id or (folder / f"{raw_id}.json").read_bytes() != body:
                raise StorageUnavailable(f"{path} is not what was written; {folder} was kept")
    if next(wanted, None) is not None:
        raise StorageUnavailable(f"{path} is not whole; {folder} was kept")
