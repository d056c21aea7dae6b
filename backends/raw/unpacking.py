"""Payloads of large members of packs, piece by piece, so that neither is ever whole in memory."""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from uuid import UUID

import msgspec

from backends.raw import PIECE_BYTES, OpenPayload

HEAD = re.compile(rb'\{"raw_id":"[0-9a-f-]{36}","sha256":"([0-9a-f]{64})","(payload|base64)":"')
LONGEST_HEAD = 256  # bytes
# Characters of a JSON string, each of them whole: what is cut off at the end of a piece is not.
WHOLE = re.compile(
    rb'(?:[^"\\\x80-\xff]++|[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|'
    rb"[\xf0-\xf4][\x80-\xbf]{3}|\\u[0-9a-fA-F]{4}|\\[^u])*+"
)
LONGEST_CHARACTER = 6  # bytes


Member = Callable[[], Iterator[bytes]]  # gives the pieces of a member, from its beginning


def open_packed(member: Member, raw_id: UUID) -> OpenPayload | None:
    """Return a payload of a member, None if it has none.

    It is gone through first, so that what is handed out is known to be what arrived. Raises
    ValueError, EOFError or zlib.error where the member is damaged.
    """
    sha256, pieces = _payload_in(member, raw_id)
    if not sha256:
        return None
    size, digest = 0, hashlib.sha256()
    for piece in pieces:
        size += len(piece)
        digest.update(piece)
    if digest.hexdigest() != sha256:
        raise ValueError(f"{raw_id} in a pack is not what its sha256 says")
    _, pieces = _payload_in(member, raw_id)
    return OpenPayload(size, pieces)


def _payload_in(member: Member, raw_id: UUID) -> tuple[str, Iterator[bytes]]:
    """Return the SHA-256 of a payload, and the payload; the former is empty if it is not there."""
    line = _line_of(_text_of(member()), raw_id)
    begun, head = b"", None
    while head is None:
        more = next(line, b"")
        begun += more
        head = HEAD.match(begun)
        if head is None and (not more or len(begun) > LONGEST_HEAD):
            if begun:
                raise ValueError(f"the line of {raw_id} does not begin as it should")
            return "", iter(())
    decoded = _unescaped if head[2] == b"payload" else _from_base64
    return head[1].decode(), _string(chain([begun[head.end() :]], line), decoded)


def _text_of(member: Iterator[bytes]) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(wbits=31)
    with contextlib.closing(member) as pieces:  # type: ignore[type-var]
        while not unpacker.eof:
            packed = next(pieces, b"")
            if not packed:
                raise EOFError("the member ends too early")
            while text := unpacker.decompress(packed, PIECE_BYTES):
                yield text
                packed = unpacker.unconsumed_tail


def _line_of(texts: Iterable[bytes], raw_id: UUID) -> Iterator[bytes]:
    """Yield the line of one payload."""
    beginning = b'{"raw_id":"%s"' % str(raw_id).encode()
    line, is_it = b"", None  # a line is known by its beginning
    for text in texts:
        for number, part in enumerate(text.split(b"\n")):
            if number:
                if is_it:
                    return
                line, is_it = b"", None
            if is_it is not None:
                line = part
            else:
                line += part
                if len(line) >= len(beginning):
                    is_it = line.startswith(beginning)
            if is_it:
                yield line


def _string(
    texts: Iterable[bytes], decoded: Callable[[bytes], tuple[bytes, int]]
) -> Iterator[bytes]:
    """Decode a JSON string up to its end; `decoded` says how much of a text it has understood."""
    rest = b""
    for text in texts:
        rest += text
        piece, end = decoded(rest)
        yield piece
        rest = rest[end:]
        if rest.startswith(b'"'):
            return
        if len(rest) > LONGEST_CHARACTER:
            raise ValueError("a string is damaged")
    raise EOFError("a string ends too early")


def _unescaped(text: bytes) -> tuple[bytes, int]:
    whole = WHOLE.match(text)
    end = whole.end() if whole else 0
    return msgspec.json.decode(b'"%s"' % text[:end], type=str).encode(), end


def _from_base64(text: bytes) -> tuple[bytes, int]:
    quote = text.find(b'"')
    end = len(text) // 4 * 4 if quote < 0 else quote
    try:
        return base64.b64decode(text[:end], validate=True), end
    except binascii.Error as error:
        raise ValueError(str(error)) from error
