"""The payloads that are in the bytes of a batch: where each begins and ends.

The bytes of a batch stay as they arrived. Their form, which the name of the file ends with, says
how they are divided:

- `ndjson`: lines; each that is not blank is a payload, without its line end, JSON or not;
- `json`: one array, each element of which is a payload, or else documents one after another.

What is divided here has landed, and so was checked (`dropzone.py`); what was damaged since raises
ValueError or one of `REFUSED`.
"""

from __future__ import annotations

import codecs
import itertools
import re
import threading
from collections.abc import Iterator

import msgspec

from backends.raw import Form

BLANK = b" \t\r"
RECORD_SEPARATOR = b"\x1e"  # before each document of a JSON text sequence (RFC 7464)
WHITE = b" \t\r\n" + RECORD_SEPARATOR
ELEMENTS = re.compile(rb"[ \t\r\n,]*+")  # what is between them
DOCUMENTS = re.compile(rb"[ \t\r\n\x1e]*+")
OBJECTS = re.compile(rb"[ \t\r\n]*+\[[ \t\r\n]*+\{")  # may be an array of objects
MOST_AT_ONCE = 200_000  # objects, at any depth, whose array is divided in one go
LINE = re.compile(rb"^[ \t\r]*+[^ \t\r\n][^\n]*", re.MULTILINE)
TRAILING = re.compile(r"JSON is malformed: trailing characters \(byte (\d+)\)")
NOT_FINITE = re.compile(  # and stands for a value, not for a name
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|([+-]?(?:nan|inf(?:inity)?))(?![ \t\r\n]*+:)',
    re.DOTALL | re.IGNORECASE,
)
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
NO_NUMBER = b"\x7f"  # fills the text that stands in the place of NaN and infinities
ODD_AT_ONCE = threading.Lock()  # a large one takes several times its size

RAW = msgspec.json.Decoder(msgspec.Raw)
ARRAY = msgspec.json.Decoder(list[msgspec.Raw])
REFUSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def payloads_in(body: bytes, form: Form) -> list[bytes]:
    """Return the payloads of a file in their order."""
    if not form:
        return [body]
    if form == "ndjson":
        return [line.rstrip(b"\r") for line in body.split(b"\n") if line.strip(BLANK)]
    return [body[begin:end] for begin, end in _documents(body)]


def stretch_of(body: bytes, form: Form, index: int) -> tuple[int, int]:
    """Return where one payload of a batch begins and ends; raises ValueError if there is none."""
    stretches = _lines(body) if form == "ndjson" else _documents(body)
    found = next(itertools.islice(stretches, index, None), None)
    if found is None:
        raise ValueError(f"the batch has no payload {index}")
    return found


def _lines(body: bytes) -> Iterator[tuple[int, int]]:
    for match in LINE.finditer(body):
        end = match.end()
        while body[end - 1] == 0x0D:
            end -= 1
        yield match.start(), end


def _documents(body: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the elements of an array begin and end, or else the documents of a sequence."""
    try:
        return elements_in(body)
    except REFUSED:
        pass
    with ODD_AT_ONCE:
        strict = strict_text(body)
        try:
            return elements_in(strict)
        except REFUSED:
            return sequence_in(strict)


def elements_in(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the elements of an array begin and end; raises one of `REFUSED` if it is none.

    It takes little memory, however many objects there are.
    """
    if text.count(b"{") > MOST_AT_ONCE and text.lstrip().startswith(b"["):
        RAW.decode(text)
        return _one_by_one(text, text.find(b"[") + 1, len(text.rstrip()) - 1, ELEMENTS)
    return _one_after_another(text, list(map(len, ARRAY.decode(text))))


def _one_after_another(text: bytes, sizes: list[int]) -> Iterator[tuple[int, int]]:
    end = text.find(b"[") + 1
    for size in sizes:
        begin = _behind(ELEMENTS, text, end)
        end = begin + size
        yield begin, end


def sequence_in(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield where the documents begin and end that stand one after another in a text.

    Raises `DecodeError` or RecursionError where it is no sequence of documents, strictly JSON.
    """
    return _one_by_one(text, 0, len(text), DOCUMENTS)


def _one_by_one(
    text: bytes, begin: int, end: int, between: re.Pattern[bytes]
) -> Iterator[tuple[int, int]]:
    view, at = memoryview(text)[:end], _behind(between, text, begin)
    while at < end:
        try:
            RAW.decode(view[at:])
            following = end
        except msgspec.DecodeError as error:
            trailing = TRAILING.fullmatch(str(error))
            if trailing is None:
                raise
            following = at + int(trailing[1]) - 1
        yield at, at + len(text[at:following].rstrip(WHITE))
        at = _behind(between, text, following)


def _behind(between: re.Pattern[bytes], text: bytes, at: int) -> int:
    match = between.match(text, at)
    return match.end() if match else at


def strict_text(body: bytes) -> bytes:
    """Return a text in which what Dropzone takes besides JSON is replaced by what is JSON.

    Every position remains: in the place of a byte order mark there are spaces, in that of NaN and
    infinities, however they are spelled, text of their length, and in that of surrogates, of which
    msgspec takes pairs alone, letters.
    """
    strict = bytearray(body)
    if strict.startswith(codecs.BOM_UTF8):
        strict[: len(codecs.BOM_UTF8)] = b" " * len(codecs.BOM_UTF8)
    for found in NOT_FINITE.finditer(body):
        if found[1]:
            strict[found.start() : found.end()] = b'"%s"' % (NO_NUMBER * (len(found[1]) - 2))
    for found in SURROGATE.finditer(strict):
        strict[found.start() : found.end()] = b"\\u0041"
    return bytes(strict)
