"""The way of packs into the archive, and back to the new disk of a node that lost its old one.

 a. A pack is read and compared with its SHA-256 first: one that was damaged here is not put there.
 b. It is cut, between members, into parts that one request can carry. A part that is there already,
    of a run that was stopped, is recognised by its bytes; the others are created under free names.
 c. Each is read back, all of it, and compared; so is its index, which is made from the pack.
 d. Only then is a note written beside the pack, `<pack>.archived`, and synced.
 e. The copy on this disk goes, where that is asked for, behind c and d of the same run: a part that
    was damaged or deleted in the archive meanwhile is put there again before, under another name.

Stopped anywhere, it can be begun again.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import UUID

import msgspec

from backends.raw import Archiving, PackDamaged, PayloadStoreError, StorageUnavailable
from backends.raw.archive import INDEX, OBJECT, Archive, ObjectMissing
from backends.raw.disk import sync_file
from backends.raw.packs import PACK, ArchiveNote, Pack, PackIndex, index_of

log = logging.getLogger("dropzone")

PART_BYTES = 32 * 1024 * 1024  # of a pack in one object, and so in memory, and one member more


def free_path(folder: Path, day: str) -> Path:
    """Return where the next pack of a day is to lie."""
    names = (f"{day}.{n}{PACK}" if n > 1 else f"{day}{PACK}" for n in itertools.count(1))
    packs = (Pack(folder / name, 0) for name in names)
    return next(p.path for p in packs if not (p.path.exists() or p.note_path.exists()))


# ── There ─────────────────────────────────────────────────────────────────────────────────────────


def put_away(pack: Pack, archive: Archive, *, keep: bool) -> Archiving:
    """Put a pack into the archive as far as it is not there; without `keep`, delete it here.

    Raises `ArchiveAway`, `PackDamaged` and OSError; FileNotFoundError where it has just expired.
    """
    index = _sound_index(pack)
    shelf = Shelf(pack, archive)
    with open(pack.path, "rb") as file:
        for part in _parts_of(index):
            body = file.read(part.bytes)
            key = shelf.put(body)
            _put_index(archive, f"{key}{INDEX}", _index_of_part(index, part, body))
    note = ArchiveNote.of(shelf.objects, index.bytes)
    _publish(pack.note_path, msgspec.json.encode(note))
    if not keep:
        pack.path.unlink()
        sync_file(pack.path.parent)
    places = [archive.place(key) for key, _ in shelf.objects]
    return Archiving(places, shelf.made, shelf.damage, keep)


def _sound_index(pack: Pack) -> PackIndex:
    """Return the index of a pack that is known to be what was written."""
    pack.index()  # which is made again where it is lost
    try:
        index = pack.read_index()
        with open(pack.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except ValueError as error:
        raise _unsound(pack) from error
    if digest != index.sha256:
        raise _unsound(pack)
    return index


def _unsound(pack: Pack) -> PackDamaged:
    return PackDamaged(f"{pack.path} is damaged, and not archived: restore it from a copy")


def _parts_of(index: PackIndex) -> Iterator[PackIndex]:
    """Cut a pack between members; each part has the members and bytes that are its."""
    starts = [start for _, start in index.members] + [index.bytes]
    begin, members = 0, list[tuple[UUID, int]]()
    for (first, start), end in zip(index.members, starts[1:], strict=True):
        members.append((first, start - begin))
        if end - begin >= PART_BYTES or end == index.bytes:
            yield PackIndex(0, end - begin, "", members)
            begin, members = end, []


def _index_of_part(whole: PackIndex, part: PackIndex, body: bytes) -> PackIndex:
    if part.bytes == whole.bytes:
        return whole
    ends = [*(start for _, start in part.members[1:]), part.bytes]
    pieces = (body[start:end] for (_, start), end in zip(part.members, ends, strict=True))
    count = sum(gzip.decompress(piece).count(b"\n") for piece in pieces)
    return PackIndex(count, part.bytes, hashlib.sha256(body).hexdigest(), part.members)


class Shelf:
    """The objects of this node and of a pack's day, among which its parts are looked for."""

    def __init__(self, pack: Pack, archive: Archive) -> None:
        self._archive = archive
        self._day = pack.day
        self._sizes = {k: size for k, size in archive.names(pack.day) if not k.endswith(INDEX)}
        self._noted = list[str]()
        with contextlib.suppress(OSError, PayloadStoreError):  # not noted, or it is noted anew
            self._noted = [key for key, _, _ in pack.archived().objects]
        self._at = 0
        self.objects = list[tuple[str, int]]()  # the parts' names, and where they begin
        self.made = 0
        self.damage = list[str]()

    def put(self, body: bytes) -> str:
        """Return the name of the object that is the next part, and was compared with it."""
        noted = self._noted[len(self.objects) :][:1]
        key = self.find(body, noted)
        if noted and key != noted[0]:
            self.damage.append(self._wrong_with(noted[0]))
        key = key or self._create(body)
        self.objects.append((key, self._at))
        self._at += len(body)
        return key

    def find(self, body: bytes, first: Sequence[str] = ()) -> str:
        """Return the name of an object that holds these bytes, or an empty one."""
        used = {key for key, _ in self.objects}
        alike = [key for key, size in self._sizes.items() if size == len(body)]
        found = (key for key in [*first, *alike] if key not in used and self._holds(key, body))
        return next(found, "")

    def _wrong_with(self, key: str) -> str:
        wrong = "is not what was put there" if key in self._sizes else "is missing"
        return f"{self._archive.place(key)} {wrong}"

    def _holds(self, key: str, body: bytes) -> bool:
        try:
            return self._archive.holds(key, body)
        except ObjectMissing:
            return False

    def _create(self, body: bytes) -> str:
        names = (self._archive.name(self._day, number) for number in itertools.count(1))
        for key in names:
            if key in self._sizes:
                continue
            is_new = self._archive.create(key, body)
            self._sizes[key] = len(body)
            if self._holds(key, body):  # or else another run has taken the name
                self.made += is_new
                return key
            if is_new:
                wrong = "is not what was put there; the pack on this disk stays"
                raise StorageUnavailable(f"{self._archive.place(key)} {wrong}")
        raise AssertionError  # there is no end of names


def _put_index(archive: Archive, key: str, index: PackIndex) -> None:
    body = msgspec.json.encode(index.with_checksum())
    if not archive.create(key, body) and _read_back(archive, key) != body:
        archive.replace(key, body)  # its pack was compared, so what stood there was wrong
    if _read_back(archive, key) != body:
        raise StorageUnavailable(f"{archive.place(key)} is not what was put there")


def _read_back(archive: Archive, key: str) -> bytes:
    try:
        return archive.read_whole(key)
    except ObjectMissing:
        return b""


def _publish(path: Path, body: bytes) -> None:
    """Make a file appear whole, and synced."""
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    part.write_bytes(body)
    sync_file(part)
    os.rename(part, path)
    sync_file(path.parent)


def delete_from(archive: Archive, pack: Pack) -> None:
    """Delete the objects of a pack, also those of a run that was stopped before its note."""
    try:
        keys = pack.archived().keys()
    except FileNotFoundError:
        keys = []
        with contextlib.suppress(PackDamaged, OSError), open(pack.path, "rb") as file:
            shelf = Shelf(pack, archive)
            found = (shelf.find(file.read(part.bytes)) for part in _parts_of(pack.index()))
            keys = [name for key in found if key for name in (f"{key}{INDEX}", key)]
    archive.delete(keys)


# ── And back ──────────────────────────────────────────────────────────────────────────────────────


def adopt(archive: Archive, folder: Path, packs: Sequence[Pack]) -> Iterator[str]:
    """Take over this node's packs that are in the archive and in no note here; yield their names.

    Each object becomes a pack of its own. What lies here without a note is left to be recognised
    by its bytes, as it is put into the archive.
    """
    known, own = set[str](), list[Pack]()
    for pack in packs:
        try:
            known.update(key for key, _, _ in pack.archived().objects)
        except FileNotFoundError:
            own.append(pack)
    found = (key for key, _ in archive.names() if not key.endswith(INDEX))
    for key in sorted(set(found) - known, key=_order):
        index = _index_in(archive, key, folder)
        day, firsts = key[:10], {first for first, _ in index.members}
        same = [p for p in own if p.day == day and firsts <= _firsts_of(p)]
        if any(not pack.is_lost for pack in same):
            continue
        lost = [pack.path for pack in same if firsts == _firsts_of(pack)]
        pack = Pack(lost[0] if lost else free_path(folder, day), 0)
        pack.write_index(index)
        _publish(pack.note_path, msgspec.json.encode(ArchiveNote.of([(key, 0)], index.bytes)))
        yield pack.path.name


def _order(key: str) -> tuple[str, int]:
    match = OBJECT.fullmatch(key)
    return (match[1], int(match[3])) if match else (key, 0)


def _firsts_of(pack: Pack) -> set[UUID]:
    with contextlib.suppress(OSError, PayloadStoreError):
        return {first for first, _ in pack.index().members}
    return set()


def _index_in(archive: Archive, key: str, folder: Path) -> PackIndex:
    """Return the index of an object, made from all of it where the index is lost or damaged."""
    with contextlib.suppress(ObjectMissing, msgspec.DecodeError):
        index = msgspec.json.decode(archive.read_whole(f"{key}{INDEX}"), type=PackIndex)
        if index.is_whole():
            return index
    log.error("%s is damaged or missing: it is made from its pack", archive.place(f"{key}{INDEX}"))
    part = folder / f"{os.getpid()}.adopted.part"
    size = next((size for name, size in archive.names(key[:10]) if name == key), 0)
    try:
        with part.open("wb") as file:
            file.writelines(archive.pieces(key, 0, size))
        return index_of(part)[0]
    finally:
        part.unlink(missing_ok=True)


# ── What is wrong there ───────────────────────────────────────────────────────────────────────────


def troubles_in(archive: Archive, packs: Sequence[Pack]) -> list[str]:
    """Name what packs have in the archive that is missing there, or has another size."""
    try:
        sizes = dict(archive.names())
    except StorageUnavailable as error:
        return [str(error)]
    troubles = list[str]()
    for pack in packs:
        with contextlib.suppress(OSError, StorageUnavailable):  # of which its own check tells
            objects = pack.archived().objects
            wrong = [each for each in objects if sizes.get(each[0]) != each[2] - each[1]]
            rest = f"{len(objects) - len(wrong)} of its {len(objects)} objects are whole"
            remedy = f"restore it from a copy; {rest}"
            if not pack.is_far:
                remedy = f"{pack.path} is here; delete {pack.note_path.name}, and compact"
            for key, begin, end in wrong:
                known = sizes.get(key)
                what = "is missing" if known is None else f"has {known} bytes, had {end - begin}"
                troubles.append(f"{archive.place(key)} {what}: {remedy}")
    return troubles
