"""Large payloads of packs: handed out piece by piece, whatever is in them, and never wrongly."""

import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packs import ODD, after, compact, processed_in

from backends.raw import PIECE_BYTES, PackDamaged, RawIdUnknown, packs
from backends.raw.folders import Folders
from backends.raw.packs import Pack

MIB = 1024 * 1024
LARGE = {
    "numbers": b'{"data":[' + b",".join(b"%d" % n for n in range(400_000)) + b"]}",
    "escapes": json.dumps([f'"\\{n}\n\t/\b\u001f' for n in range(150_000)]).encode(),
    "characters": json.dumps(
        [f"ä€𝄞{'x' * (n % 5)}" for n in range(150_000)], ensure_ascii=False
    ).encode(),
    "backslashes": b"\\" * 2 * MIB,
    "no text": os.urandom(2 * MIB),
    "like a line": b'"}\n{"raw_id":"' * 200_000,
}


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return packed_in(tmp_path)


def packed_in(place: Path) -> Folders:
    for name in ("raw", "processed", "rejected", "journal"):
        (place / name).mkdir(exist_ok=True)
    return Folders(place / "raw")


def packed(folders: Folders, bodies: Sequence[bytes]) -> dict[UUID, bytes]:
    """Pack payloads of one day; return them."""
    payloads = processed_in(folders.raw.parent, bodies)
    assert compact(folders) == len(bodies)
    return payloads


def pieces_of(folders: Folders, raw_id: UUID) -> list[bytes]:
    """Read a payload to its end."""
    found = folders.open_payload(raw_id)
    pieces = list(found.pieces)
    found.close()
    assert sum(map(len, pieces)) == found.size
    return pieces


@pytest.mark.parametrize("name", LARGE)
def test_large_payloads(folders: Folders, name: str):
    """A large payload comes in small pieces, which together are the bytes that arrived."""
    payloads = packed(folders, [b"1", LARGE[name], b"2"])
    for raw_id, body in payloads.items():
        pieces = pieces_of(folders, raw_id)
        assert b"".join(pieces) == body
        assert max(map(len, pieces)) <= PIECE_BYTES
        assert folders.read(raw_id) == ("processed", body)
        with pytest.raises(RawIdUnknown):
            folders.open_payload(after(raw_id))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(ODD) | st.binary(max_size=40) | st.text(max_size=40).map(str.encode),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 50),
)
def test_any_payload_in_pieces_of_any_size(bodies: list[bytes], piece: int):
    """Whatever a payload is, and wherever its text is cut, it comes as it arrived."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        folders = packed_in(Path(folder))
        payloads = packed(folders, bodies)
        patch.setattr(packs, "LARGE_MEMBER", -1)
        patch.setattr("backends.raw.unpacking.PIECE_BYTES", piece)
        for raw_id, body in payloads.items():
            assert b"".join(pieces_of(folders, raw_id)) == body


def test_files_come_in_pieces(folders: Folders):
    """Pending, processed and rejected payloads, which are files, are read in pieces, too."""
    raw_id = UUID("0190a3b4-5c6d-7e8f-9012-3456789abcde")
    for state in ("pending", "processed", "rejected"):
        path = folders.path(raw_id, state)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(LARGE["numbers"])
        pieces = pieces_of(folders, raw_id)
        assert b"".join(pieces) == LARGE["numbers"]
        assert max(map(len, pieces)) <= PIECE_BYTES
        path.unlink()
    with pytest.raises(RawIdUnknown):
        folders.open_payload(raw_id)


def test_memory_is_bounded(folders: Folders):
    """Reading a payload of 16 MiB from a pack takes a fraction of that."""
    body = json.dumps(["a text with \"quotes\" and 'others'"] * 500_000).encode()
    assert len(body) > 15 * MIB
    [raw_id] = packed(folders, [body])
    tracemalloc.start()
    try:
        for _ in folders.open_payload(raw_id).pieces:
            pass
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * MIB


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7])
def test_damage(folders: Folders, where: float):
    """A pack that is damaged is named, with the place, before a byte of a payload is handed out."""
    [raw_id] = packed(folders, [LARGE["numbers"]])
    [pack] = folders.packs()
    damaged = bytearray(pack.path.read_bytes())
    place = int(where * len(damaged))
    damaged[place : place + 8] = bytes(8)
    pack.path.write_bytes(damaged)
    Pack.member.cache_clear()
    with pytest.raises(PackDamaged, match="is damaged at byte 0, restore it from a copy"):
        folders.open_payload(raw_id)
