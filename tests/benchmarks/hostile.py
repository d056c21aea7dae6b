"""Hostile requests by the hundred thousand, on raw connections, while one client behaves well.

    python tests/benchmarks/hostile.py [--requests 20000] [--seed 1] [--dir FOLDER]

Broken HTTP and odd requests of every route, with odd JSON, encodings, queries, headers and keys;
pipelined, cut off, trickled, and with answers that nobody reads. It is wrong if there is a 500; if
what is whole as HTTP gets neither a problem document nor the right answer; if an ordinary payload
or /health is refused meanwhile; if the service ends, logs a traceback, or grows; and if a payload
that was acknowledged does not lie in the data folder in the end. Prints what was answered, how long
the good client has waited, and how much memory the service has held; exits with 1 where something
is wrong. The same seed makes the same requests.
"""

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote
from uuid import UUID

import jwt
import msgspec
import psutil
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO), str(REPO / "tests")]

from stores import payloads_below  # noqa: E402

from dropzone import ROUTES, Route  # noqa: E402

ROUNDS = 4  # of which the first warms the service up
PROCESSES = 2  # of clients
CONNECTIONS = 24  # of each
LIMIT = 512 * 1024  # bytes of a body
BODY_SECONDS = 2
PATIENCE = 60  # seconds for an answer
GROWTH = 96 * 1024 * 1024  # bytes that the service may have grown by since the first round
SHOWN = 20  # things that are wrong
CONFIG = """
[server]
port = 0
max_body_bytes = {limit}
body_seconds = {body_seconds}
cors_origins = ["https://page.example"]
[process]
every = 1.0
[auth.jwt]
issuer = "https://issuer.example"
audience = "dropzone"
jwks = "issuer.pem"
"""
KEYS = {
    "all": ["ingest", "process", "read"],
    "lands": ["ingest"],
    "reads": ["read"],
    "good": ["ingest"],
}
KEY = '[[auth.keys]]\nname = "{}"\nhash = "sha256:{}"\nscopes = {}\n'
STATUSES = {200, 202, 204, 400, 401, 403, 404, 405, 408, 413, 415, 417, 422, 501, 503}


def comes_alone(body: bytes) -> bool:
    """Say whether a body is certainly one payload: one document, and no array of objects."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return not isinstance(document, list) or not all(isinstance(each, dict) for each in document)


class Request(NamedTuple):
    """A request as it is sent, and what may be answered."""

    text: bytes
    statuses: set[int] = STATUSES
    lands: list[bytes] | None = None  # what is stored if it is acknowledged; None: nobody knows
    payload: int | None = None  # the checksum of the payload that is asked for
    is_head: bool = False
    is_broken: bool = False  # as HTTP: it may have any answer or none, and is the last


class Answer(NamedTuple):
    """An answer, whole."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


# ── Odd things ────────────────────────────────────────────────────────────────────────────────────

ID = "01890a5d-ac96-774b-bcce-b302099a8057"
NOON = "2019-05-01T12:00:00Z"
ODD_TEXTS = [
    *("", "0", "-1", "1", "7", "1e9", "NaN", "null", "true", "[]", "{}", "9" * 40, "0x10", "1_000"),
    *(NOON, "2019-05-01", "20190501", "1556712000000", "-9999999999999", "0001-01-01T00:00:00Z"),
    *("9999-12-31T23:59:59.999999-23:59", "2019-121T10:00:00Z", "2019-02-30T00:00:00Z", "now"),
    *(ID, ID.upper(), "csv", "json", "asc", "desc", "\0", "\x7f", "é", "\u202e", "😀", "%", "%00"),
    *("..", "../../etc/passwd", "..%2f..%2f", "a" * 300, "' OR 1=1 --", "\ud800", "\r\nX: y"),
    *("value_not_numeric", "payload_not_json", "٣", "+", " ", "&", "=", ";", "a=b", "$" * 8),
]
ODD_JSON = [
    *(b"", b" ", b"\n", b"\0", b"null", b"0", b'""', b"[]", b"{}", b"-0", b"1e999", b"-1e999"),
    *(b"NaN", b"[NaN]", b"-Infinity", b"[1, Infinity]", b"nan", b"[01]", b"[1,]", b"{,}", b'{"a"}'),
    *(b'"\\ud800"', b'{"\\udfff": 1}', b'"\xff"', b'"\xed\xa0\x80"', b"\xef\xbb\xbf{}"),
    *(b"\xfe\xff", "{}".encode("utf-16"), "[1]".encode("utf-32"), b"'a'", b"// x\n1"),
    *(b"1 2", b"{}{}", b"\x1f\x8b"),
    *(b"9" * 5000, b"[" + b"9" * 400 + b"]", b"0." + b"3" * 3000, b"1" + b"0" * 400, b"5e-324"),
    *(b'"' + b"\\u0000" * 500 + b'"', b'{"a":1,"a":2}', b'{"":{"":{"":[]}}}', b"tru", b'"\t"'),
    *(b"[" * depth + b"]" * depth for depth in (100, 900, 1100, 20_000)),
    *(b"[" * 100_000, b'{"a":' * 50_000, b"[{" * 3000, b'[[[["', b"]" * 100),
    b'{"time_stamp":"2019-05-01T12:00:00Z","data":[' + b",".join([b"1e308"] * 9000) + b"]}",
    b'{"time_stamp":"2019-05-01T12:00:00Z","data":[1,"x"]}',
    b'{"time_stamp":"2019-05-01T12:00:00Z","data":[1,null,{}]}',
    b'{"time_stamp":"2019-05-01T12:00:00Z","data":[]}',
    b'{"time_stamp":"2019-05-01T12:00:00","data":[1]}',
    b'{"time_stamp":[],"data":1}',
    b'{"time_stamp":1e400,"data":[1e400]}',
    b'{"time_stamp":"\\ud800","data":["\\ud800"]}',
    b"[" + b'{"a":1},' * 8000 + b"NaN]",
    b"[" + b"NaN," * 20_000 + b"1]",
    b"{" + b",".join(b'"%d":%d' % (n, n) for n in range(4000)) + b"}",
]
ODD_HEADERS = [
    *(b"X-Request-ID: mine", b"X-Request-ID: \xff\xfe", b"X-Request-ID: " + b"a" * 500),
    *(b"Accept: text/csv", b"Accept: */*;q=nan", b"Accept: " + b"a/b," * 500, b"Accept: \xff"),
    *(b"Origin: https://page.example", b"Origin: null", b"Origin: \xff", b"Range: bytes=9-,-1"),
    *(b"If-None-Match: *", b'If-None-Match: "a", W/', b"If-Modified-Since: yesterday"),
    *(b"Cookie: a=b; $Version=1; =;;", b"X-Forwarded-For: ::1", b"Forwarded: for=_", b"TE: x"),
    *(b"Accept-Encoding: br, gzip;q=0", b"Accept-Language: \xe9", b"User-Agent: "),
    *(b"X: " + b"y" * 4000, b"Date: x", b"From:"),
    *(b"Access-Control-Request-Method: GET", b"Access-Control-Request-Method: \xff", b"Via: 9"),
    *(b"Content-Type: \xff;;=", b"Content-Type: application/json; charset=utf-7", b"Content-Type:"),
    *(b"Content-Type: multipart/form-data", b"Content-Type: application/x-ndjson;x", b"Expect: x"),
    *(b"Idempotency-Key: ", b"Idempotency-Key: \xe4", b"Idempotency-Key: " + b"k" * 300),
    *(b"Content-Encoding: br", b"Content-Encoding: gzip, gzip", b"Content-Encoding: \xff"),
]
BROKEN_HEADERS = [
    *(b"Content-Length: 1, 1", b"Content-Length: -1", b"Content-Length: +1"),
    *(b"Content-Length: 99999999999999999999999", b"Content-Length: \xd9\xa1", b"Content-Length:"),
    *(b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: xchunked", b"Transfer-Encoding:"),
    *(b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: \x0bchunked", b"no colon"),
    *(b"X: a\0b", b"X: a\nY: b", b"X: a\rY: b", b"X : y", b": y", b" folded", b"X" * 9000 + b": y"),
    *(b"X: " + b"y" * 9000, b"Host: y", b"Content-Type: a\r\nContent-Type: b", b"\xff: y"),
    *(b"Upgrade: h2c\r\nConnection: Upgrade", b"(: )"),
]
TAIL = b" HTTP/1.1\r\nHost: x\r\n\r\n"
NOISE = [
    *(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), bytes(range(256))),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET /health HTTP/9.9\r\nHost: x\r\n\r\n"),
    *(b"GET\r\n\r\n", b"\r\n" * 50, b"\0", b"{}\r\n\r\n", b"-" * 20_000, b"GET / FTP/1\r\n\r\n"),
    *(b"FOO /" + TAIL, b"get /" + TAIL, b"GET /he alth" + TAIL, b"GET  /health" + TAIL),
    *(b"GET http://" + TAIL, b"GET //[" + TAIL, b"CONNECT x:443" + TAIL, b"GET \xff" + TAIL),
    *(b"GET /health HTTP/1.1\r\n\r\n", b"GET ?" + TAIL, b"$\r\n\r\n"),
]
ODD_CHUNKS = [
    *(b"+1\r\n1\r\n", b"-1\r\n", b"F" * 17 + b"\r\n", b"1\r\n12", b"\r\n"),
    *(b"1 \r\n1\r\n", b"g\r\n"),
]
METHODS = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "PROPFIND"]
BIG = ["/openapi.json", "/docs", "/docs/swagger-ui-bundle.js", "/measurements?format=csv", "/"]


def odd_tokens(private: bytes) -> Iterator[str]:
    """Yield tokens that nobody has signed, and some that were signed and say odd things."""
    yield from ("a.b.c", "..", "a" * 3000 + "..", "eyJhbGciOiJub25lIn0.e30.", "a.b.c.d")
    yield "\xff.\xff.\xff"
    yield "eyJhbGciOiJub25lIn0." + "e30" * 1000 + ".x"
    until = int(time.time()) + 86_400
    usual = {"iss": "https://issuer.example", "aud": "dropzone", "exp": until, "sub": "device"}
    for changes in (
        {},
        {"scope": "ingest read"},
        {"scope": ["read", 1, None, {}]},
        {"scope": {"a": 1}},
        {"scope": 7},
        {"sub": None, "azp": ["x"]},
        {"sub": {"a": []}},
        {"sub": "\u202e\n\0é" * 100, "scope": "read"},
        {"exp": 1e300},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": "never"},
        {"exp": until + 0.5, "scope": "read"},
        {"exp": 10**30, "scope": "read"},
        {"exp": None},
        {"nbf": float("inf")},
        {"iat": float("inf")},
        {"nbf": "x"},
        {"aud": [["dropzone"]]},
        {"aud": {"dropzone": 1}},
        {"iss": ["https://issuer.example"]},
    ):
        with contextlib.suppress(TypeError, ValueError):  # what the library does not sign
            claims = {name: value for name, value in (usual | changes).items() if value is not None}
            yield jwt.encode(claims, private, "EdDSA")


class Maker:
    """Makes requests up; the same ones for the same seed, apart from the raw_ids in them."""

    def __init__(self, seed: int, tokens: list[str]) -> None:
        self.chance = random.Random(seed)  # noqa: S311
        self.known = OrderedDict[str, int]()  # checksums of payloads by their raw_ids
        self._tokens = tokens
        self._paths = [route for route in ROUTES if route.path]
        self._kinds: list[Callable[[], Request]] = [
            *[self._ordinary] * 15,
            *[self._odd_document] * 20,
            *[self._batch] * 1,
            *[self._odd_question] * 40,
            *[self._known_payload] * 6,
            *[self._health] * 4,
            *[self._broken] * 10,
            *[self._noise] * 4,
        ]

    def make(self) -> Request:
        return self.chance.choice(self._kinds)()

    def note(self, raw_id: str, checksum: int) -> None:
        """Remember a payload, to ask for it later."""
        self.known[raw_id] = checksum
        if len(self.known) > 500:
            self.known.popitem(last=False)

    def question(self, target: str) -> Request:
        """Return a request that may well be answered."""
        return Request(self._head("GET", target, b"x-api-key: all") + b"\r\n")

    def slow_body(self) -> tuple[bytes, list[bytes]]:
        """Return a head, and the pieces of its body."""
        body = self._document()
        at = range(0, len(body), max(1, len(body) // 8))
        head = self._head("POST", "/ingest", b"x-api-key: lands", b"Content-Length: %d" % len(body))
        return head + b"\r\n", [body[i : i + at.step] for i in at]

    def _head(self, method: str, target: str, *headers: bytes) -> bytes:
        start = f"{method} {target} HTTP/1.1".encode()
        first = {each.partition(b":")[0].lower(): each for each in reversed(headers)}
        return b"\r\n".join([start, b"Host: x", *first.values(), b""])  # each name once

    def _document(self) -> bytes:
        moment = f"2019-05-01T12:{self.chance.randrange(60):02}:{self.chance.randrange(60):02}Z"
        data = [self.chance.randrange(1000) for _ in range(self.chance.choice((1, 5, 30)))]
        return json.dumps({"time_stamp": moment, "data": data}).encode()

    def _odd_body(self) -> bytes:
        if self.chance.random() < 0.5:
            return self.chance.choice(ODD_JSON)
        body = bytearray(self._document())
        for _ in range(self.chance.choice((1, 1, 2, 10))):
            at = self.chance.randrange(len(body))
            body[at : at + self.chance.choice((0, 1, 5))] = self.chance.randbytes(
                self.chance.choice((0, 1, 3))
            )
            body = body or bytearray(b" ")
        return bytes(body)

    def _key(self) -> bytes:
        if self.chance.random() < 0.8:
            return b"x-api-key: all"
        odd = self.chance.choice(ODD_TEXTS).encode(errors="replace")
        odd = re.sub(rb"[\0\r\n\x7f]", b"", odd)
        token = self.chance.choice(self._tokens).encode("latin-1")
        return self.chance.choice(
            [
                *(b"X-None: 1", b"x-api-key: lands", b"x-api-key: reads", b"x-api-key: wrong"),
                *(b"x-api-key: \xff", b"x-api-key: ", b"Authorization: Basic YTpi", b"X: " + odd),
                *(
                    b"Authorization: Bearer all",
                    b"authorization: bearer  reads",
                    b"x-api-key: " + odd,
                ),
                *[b"Authorization: Bearer " + token] * 6,
                *(
                    b"Authorization: " + odd,
                    b"Authorization: Bearer " + odd,
                    b"x-api-key: " + token,
                ),
            ]
        )

    def _odd_headers(self) -> list[bytes]:
        if self.chance.random() < 0.6:
            return []
        return self.chance.sample(ODD_HEADERS, self.chance.choice((1, 1, 2, 4)))

    def _framed(self, body: bytes) -> tuple[list[bytes], bytes]:
        """Return headers and a body with one framing or the other."""
        if self.chance.random() < 0.8:
            return [b"Content-Length: %d" % len(body)], body
        step = max(1, len(body) // self.chance.choice((1, 2, 7)))
        sizes = [b"%x", b"000%X", b"%x;a=b"]
        chunks = [
            self.chance.choice(sizes) % len(piece) + b"\r\n" + piece + b"\r\n"
            for piece in (body[at : at + step] for at in range(0, len(body), step))
        ]
        end = self.chance.choice([b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n"])
        return [b"Transfer-Encoding: chunked"], b"".join([*chunks, end])

    def _encoded(self, body: bytes) -> tuple[bytes, bytes, bool]:
        """Return a Content-Encoding, the body in it or nearly so, and whether it can be undone."""
        draw = self.chance.random()
        if draw < 0.6:
            return b"identity", body, True
        if draw < 0.7:
            return b"gzip", gzip.compress(body, 1), True
        if draw < 0.75:
            return b" x-GZIP ", gzip.compress(body[:9]) + gzip.compress(body[9:]), True
        if draw < 0.8:
            return b"deflate", zlib.compress(body, 1), True
        packed = self.chance.choice([gzip.compress, zlib.compress])(body)
        if draw < 0.801:
            packed = gzip.compress(bytes(self.chance.choice((LIMIT, 4 * LIMIT))))
        at = self.chance.randrange(len(packed))
        odd = [packed[:at], packed + b"x", packed[:at] + b"\xff" + packed[at + 1 :], body]
        odd += [gzip.compress(packed), zlib.compress(body)[2:-4], gzip.compress(b"") * 50]
        return self.chance.choice([b"gzip", b"deflate"]), self.chance.choice(odd), False

    def _ordinary(self) -> Request:
        body = self._document()
        head = self._head("POST", "/ingest", b"x-api-key: lands", b"Content-Length: %d" % len(body))
        return Request(head + b"\r\n" + body, {202, 503}, [body])

    def _odd_document(self) -> Request:
        body = self._odd_body() if self.chance.random() < 0.8 else self._document()
        encoding, packed, is_known = self._encoded(body)
        framing, sent = self._framed(packed)
        odd = self._odd_headers()
        is_known &= not any(each.startswith((b"Content-Enc", b"Content-Type: app")) for each in odd)
        headers = [self._key(), *framing, *odd, b"Content-Encoding: " + encoding]
        if self.chance.random() < 0.2:
            headers.append(b"Idempotency-Key: %d" % self.chance.randrange(200))
        if self.chance.random() < 0.02:
            headers.append(b"Expect: 100-continue")
        head = self._head("POST", "/ingest", *headers)
        return Request(
            head + b"\r\n" + sent, lands=[body] if is_known and comes_alone(body) else None
        )

    def _batch(self) -> Request:
        lines = [self._document() for _ in range(self.chance.randrange(1, 20))]
        if self.chance.random() < 0.3:
            lines.append(self._odd_body().replace(b"\n", b""))
        kept = [line for line in (line.rstrip(b"\r") for line in lines) if line.strip(b" \t")]
        framing, sent = self._framed(self.chance.choice([b"\n", b"\r\n", b"\n\n"]).join(lines))
        key = b"Idempotency-Key: %d" % self.chance.randrange(200)
        headers = [self._key(), b"Content-Type: application/x-ndjson", key, *framing]
        return Request(self._head("POST", "/ingest", *headers) + b"\r\n" + sent, lands=kept)

    def _target(self, route: Route) -> str:
        def value(_: re.Match[str]) -> str:
            if self.known and self.chance.random() < 0.5:
                return self.chance.choice(list(self.known))
            return quote(self.chance.choice(ODD_TEXTS), safe="", errors="surrogatepass")

        path = re.sub(r"\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}", value, route.path)
        if self.chance.random() < 0.05:
            path += self.chance.choice(["/", "//", "/..", "%2f", "%00", ";a", "/" + "a" * 2000])
        if route.query and self.chance.random() < 0.8:
            names = [field.name for field in msgspec.structs.fields(route.query)]
            names = [*names, self.chance.choice(["x", "limit", "%00", ""])]
            chosen = self.chance.choices(names, k=self.chance.choice((1, 1, 2, 5)))
            odd = (quote(self.chance.choice(ODD_TEXTS), errors="surrogatepass") for _ in chosen)
            path += "?" + "&".join(f"{name}={text}" for name, text in zip(chosen, odd, strict=True))
        return path

    def _odd_question(self) -> Request:
        route, method = self.chance.choice(self._paths), ""
        changes = route.method == "POST" and route.path != "/ingest"
        if changes and self.chance.random() < 0.97:  # what takes long in itself is rare
            route = self.chance.choice([route for route in self._paths if route.method == "GET"])
        method = route.method if self.chance.random() < 0.85 else self.chance.choice(METHODS)
        headers, body = [self._key(), *self._odd_headers()], b""
        if method == "POST" or self.chance.random() < 0.05:
            framing, body = self._framed(self._odd_body())
            headers += framing
        head = self._head(method, self._target(route), *headers)
        return Request(head + b"\r\n" + body, is_head=method == "HEAD")

    def _known_payload(self) -> Request:
        if not self.known:
            return self._health()
        raw_id = self.chance.choice(list(self.known))
        end = self.chance.choice(["", "/payload"])
        head = self._head("GET", f"/raw/{raw_id}{end}", b"x-api-key: reads")
        return Request(head + b"\r\n", {200, 503}, payload=self.known[raw_id] if end else None)

    def _health(self) -> Request:
        return Request(self._head("GET", "/health", *self._plain_headers()) + b"\r\n", {200})

    def _plain_headers(self) -> list[bytes]:
        return [each for each in self._odd_headers() if not each.startswith(b"Expect")]

    def _broken(self) -> Request:
        draw, whole = self.chance.random(), self._odd_document().text
        head, _, rest = whole.partition(b"\r\n")
        if draw < 0.4:
            text = head + b"\r\n" + self.chance.choice(BROKEN_HEADERS) + b"\r\n" + rest
        elif draw < 0.5:
            start = self._head("POST", "/ingest", b"x-api-key: all", b"Transfer-Encoding: chunked")
            text = start + b"\r\n" + self.chance.choice(ODD_CHUNKS) + b"0\r\n\r\n"
        else:
            changed = bytearray(whole[:2000])
            for _ in range(self.chance.choice((1, 2, 20))):
                at = self.chance.randrange(len(changed) + 1)
                changed[at : at + self.chance.choice((0, 1, 9))] = self.chance.randbytes(
                    self.chance.choice((0, 1, 4))
                )
            text = bytes(changed) + b"\r\n\r\n"
        return Request(text, is_broken=True)

    def _noise(self) -> Request:
        noise = self.chance.randbytes(self.chance.randrange(1, 300)) + b"\r\n\r\n"
        return Request(self.chance.choice([*NOISE, noise]), is_broken=True)


# ── Clients ───────────────────────────────────────────────────────────────────────────────────────


class Clients:
    """Connections of one process that send so many requests in all, each in its own manner."""

    def __init__(self, place: tuple[str, int], seed: int, count: int, folder: Path) -> None:
        self.place, self.left = place, count
        self.maker = Maker(seed, (folder / "tokens").read_text().split("\n"))
        self.answered = Counter[str]()
        self.wrong = list[str]()
        self._ledger = (folder / f"ledger-{seed}").open("a")

    async def run(self) -> None:
        await asyncio.gather(*(self._go_on() for _ in range(CONNECTIONS)))
        self._ledger.close()

    async def _go_on(self) -> None:
        manners = [self._ask] * 195 + [self._leave] * 3 + [self._trickle, self._hoard]
        while self.left > 0:
            reader, writer = await asyncio.open_connection(*self.place)
            with contextlib.suppress(ConnectionError):
                await self.maker.chance.choice(manners)(reader, writer)
            writer.transport.abort()

    def _burst(self) -> list[Request]:
        """Make a few requests, a broken one at most, which is the last."""
        burst = list[Request]()
        for _ in range(self.maker.chance.choice((1, 2, 4, 8))):
            burst.append(self.maker.make())
            if burst[-1].is_broken:
                break
        self.left -= len(burst)
        return burst

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(self.maker.chance.choice((1, 2, 10))):
            burst = self._burst()
            together, is_last = [burst], burst[-1].is_broken
            if is_last:
                if self.maker.chance.random() < 0.5:
                    together = [burst[:-1], burst[-1:]]
                else:  # what arrives together is refused together
                    burst[:] = [request._replace(is_broken=True) for request in burst]
            for requests in together:
                writer.write(b"".join(request.text for request in requests))
                for request in requests:
                    if not await self._is_answered(request, reader):
                        return
            if is_last:
                return

    async def _is_answered(self, request: Request, reader: asyncio.StreamReader) -> bool:
        """Judge the answer; return whether the connection goes on."""
        try:
            async with asyncio.timeout(0.1 if request.is_broken else PATIENCE):
                answer = await answer_from(reader, is_head=request.is_head)
        except (TimeoutError, ConnectionError, EOFError) as error:
            if request.is_broken:  # it waits for more, or has nothing to say
                self.answered["broken, no answer"] += 1
            else:
                self.wrong.append(f"{error!r} in the place of an answer to {request.text[:1500]!r}")
            return False
        self._judge(request, answer)
        is_last = answer.headers.get(b"connection", b"").lower() == b"close"
        return not is_last and b"x-request-id" in answer.headers

    async def _leave(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = b"".join(request.text for request in self._burst())
        writer.write(text[: self.maker.chance.randrange(len(text) + 1)])
        if self.maker.chance.random() < 0.5:
            await asyncio.sleep(0.02)
        self.answered["left early"] += 1

    async def _trickle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.left -= 1
        head, pieces = self.maker.slow_body()
        writer.write(head)
        pause = self.maker.chance.choice((0.05, 0.5))
        request = Request(head, {202, 408, 503}, [b"".join(pieces)])
        answered = asyncio.create_task(self._is_answered(request, reader))
        for piece in pieces:
            if answered.done():  # its time was up
                break
            writer.write(piece)
            await asyncio.sleep(pause)
        await answered

    async def _hoard(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        targets = self.maker.chance.choices(BIG, k=10)
        self.left -= len(targets)
        writer.transport.pause_reading()
        writer.write(b"".join(self.maker.question(target).text for target in targets))
        await asyncio.sleep(0.5)
        self.answered["never read"] += len(targets)

    def _judge(self, request: Request, answer: Answer) -> None:
        """Note what was answered, and what is wrong with it; keep what was acknowledged."""
        code = ""
        try:
            code = code_of(request, answer)
            if answer.status == 202:
                self._acknowledge(request, msgspec.json.decode(answer.body))
        except (ValueError, KeyError, AssertionError) as error:
            shown = f"{error!r}: {request.text[:1500]!r} was answered {answer.status}"
            self.wrong.append(f"{shown} {answer.headers} {answer.body[:500]!r}")
        self.answered[f"{answer.status} {code}".strip()] += 1

    def _acknowledge(self, request: Request, said: dict[str, object]) -> None:
        raw_ids = said["raw_ids"] if "raw_ids" in said else [said["raw_id"]]
        assert isinstance(raw_ids, list)
        lands = request.lands or [None] * len(raw_ids)
        for raw_id, body in zip(map(str, raw_ids), lands, strict=True):
            checksum = "" if body is None else zlib.crc32(body)
            self._ledger.write(f"{raw_id} {checksum}\n")
            if isinstance(checksum, int):
                self.maker.note(raw_id, checksum)


async def answer_from(reader: asyncio.StreamReader, *, is_head: bool = False) -> Answer:
    """Read a whole answer, behind those that only say to go on."""
    status = 100
    while status == 100:
        start, *lines = (await reader.readuntil(b"\r\n\r\n"))[:-4].split(b"\r\n")
        status = int(start.split(b" ", 2)[1])
    pairs = (line.partition(b":")[::2] for line in lines)
    headers = {name.lower(): value.strip() for name, value in pairs}
    body = b""
    if is_head or status in (204, 304):
        return Answer(status, headers, body)
    if headers.get(b"transfer-encoding") == b"chunked":
        while size := int(await reader.readuntil(b"\r\n"), 16):
            body += (await reader.readexactly(size + 2))[:-2]
        await reader.readexactly(2)
    elif b"content-length" in headers:
        body = await reader.readexactly(int(headers[b"content-length"]))
    else:
        body = await reader.read()
    return Answer(status, headers, body)


def code_of(request: Request, answer: Answer) -> str:
    """Return the code of a refusal; raise where an answer is not as it has to be."""
    status, headers, body = answer
    assert status != 500, "a 500"
    if request.is_broken and b"x-request-id" not in headers:  # of the parser, before any route
        assert status == 400, "broken, and not 400"
        return "broken"
    assert status in STATUSES, "a status that it never has"
    assert request.is_broken or status in request.statuses, f"not in {request.statuses}"
    assert b"x-request-id" in headers, "without its request id"
    media = headers.get(b"content-type", b"")
    if status >= 400:
        return code_in(request, answer, media)
    is_payload = b"/payload" in request.text.partition(b"\r\n")[0]
    if media.startswith(b"application/json") and not (is_payload or request.is_head):
        msgspec.json.decode(body)
    assert request.payload in (None, zlib.crc32(body)), "another payload"
    return ""


def code_in(request: Request, answer: Answer, media: bytes) -> str:
    """Return the code in a problem document."""
    needed = {401: b"www-authenticate", 405: b"allow", 503: b"retry-after"}
    assert needed.get(answer.status, b"date") in answer.headers, "a header is missing"
    if request.is_head:
        return ""
    if request.text.startswith(b"GET /ready") and media == b"application/json":
        return "not ready"
    assert media == b"application/problem+json", "no problem document"
    document = msgspec.json.decode(answer.body)
    assert document["status"] == answer.status, "another status in the document"
    assert document["request_id"].encode("latin-1", "replace"), "no request id"
    return str(document["code"])


def send(url: str, seed: int, count: int, folder: Path) -> None:
    """Send requests, and print what was answered: the process of a client."""
    host, _, port = url.removeprefix("http://").partition(":")
    clients = Clients((host, int(port)), seed, count, folder)
    uvloop.run(clients.run())
    print(json.dumps({"answered": clients.answered, "wrong": clients.wrong}))


# ── The service, and a client that behaves well ───────────────────────────────────────────────────


class Service:
    """A running Dropzone whose log is read, and of which only what is wrong is kept."""

    def __init__(self, home: Path) -> None:
        clean = {name: text for name, text in os.environ.items() if "DROPZONE" not in name}
        command = [sys.executable, str(REPO / "dropzone.py"), "--config", "config.toml"]
        self.process = subprocess.Popen(
            command, cwd=home, env=clean, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        self.url = ""
        self.errors = list[str]()
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"listening on (http://[^\s\"]+)", line):
                self.url = found[1]
                break
            self.errors.append(line)
        if not self.url:
            raise SystemExit(f"the service did not start:\n{''.join(self.errors)}")
        self.errors.clear()
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            told = re.match(r"\d{4}-\d\d-\d\dT\S+ (\w+) ", line)
            if told is None or told[1] in ("ERROR", "CRITICAL"):  # or the rest of a traceback
                self.errors.append(line.rstrip())

    def memory(self) -> int:
        """Return the bytes that the service holds."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def cpu(self) -> float:
        """Return the seconds that it has computed."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(sum(times))

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code


class GoodClient(threading.Thread):
    """Lands an ordinary payload and asks for /health, ten times a second."""

    def __init__(self, url: str, ledger: Path) -> None:
        super().__init__()
        self._place = url.removeprefix("http://")
        self._ledger = ledger
        self.is_over = threading.Event()
        self.seconds = dict[str, list[float]](health=[], landing=[])
        self.wrong = list[str]()

    def run(self) -> None:
        with self._ledger.open("w") as ledger:
            for number in range(10**9):
                if self.is_over.wait(0.1):
                    return
                body = b'{"time_stamp":"2019-05-01T11:00:00Z","data":[%d]}' % number
                try:
                    self._ask("health", "GET", "/health", None)
                    raw_id = json.loads(self._ask("landing", "POST", "/ingest", body))["raw_id"]
                    ledger.write(f"{raw_id} {zlib.crc32(body)}\n")
                except (OSError, http.client.HTTPException, AssertionError) as error:
                    self.wrong.append(f"of the good client: {error!r}")

    def _ask(self, what: str, method: str, path: str, body: bytes | None) -> bytes:
        connection, begun = (
            http.client.HTTPConnection(self._place, timeout=PATIENCE),
            time.monotonic(),
        )
        try:
            connection.request(method, path, body, {"x-api-key": "good"})
            answer = connection.getresponse()
            text = answer.read()
            assert answer.status == (202 if body else 200), f"{path} is {answer.status}: {text!r}"
            return text
        finally:
            connection.close()
            self.seconds[what].append(time.monotonic() - begun)


def configure(home: Path) -> None:
    """Write the settings, the keys and the tokens."""
    issuer = Ed25519PrivateKey.generate()
    public = issuer.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    private = issuer.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (home / "issuer.pem").write_bytes(public)
    (home / "tokens").write_text("\n".join(odd_tokens(private)))
    keys = (
        KEY.format(name, hashlib.sha256(name.encode()).hexdigest(), json.dumps(scopes))
        for name, scopes in KEYS.items()
    )
    settings = CONFIG.format(limit=LIMIT, body_seconds=BODY_SECONDS)
    (home / "config.toml").write_text(settings + "".join(keys))


def lost(home: Path) -> list[str]:
    """Return the acknowledged payloads that do not lie in the data folder as they were sent."""
    landed, missing = payloads_below(home / "data"), list[str]()
    for ledger in home.glob("ledger-*"):
        for line in ledger.read_text().splitlines():
            raw_id, _, checksum = line.partition(" ")
            body = landed.get(UUID(raw_id))
            if body is None or (checksum and zlib.crc32(body) != int(checksum)):
                missing.append(f"{raw_id} was acknowledged and is not there, or is another")
    return missing


def round_of(service: Service, home: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Have the processes send so many requests together; return what was answered."""
    command = [sys.executable, __file__, "--client", service.url, "--dir", str(home)]
    numbers = [seed * 1000 + number for number in range(PROCESSES)]
    clients = [
        subprocess.Popen(
            [*command, "--seed", str(number), "--requests", str(count // PROCESSES)],
            stdout=subprocess.PIPE,
        )
        for number in numbers
    ]
    answered, wrong = Counter[str](), list[str]()
    for client in clients:
        text, _ = client.communicate()
        if client.returncode:
            raise SystemExit("a client failed")
        said = json.loads(text)
        answered += Counter(said["answered"])
        wrong += said["wrong"]
    return answered, wrong


def attack(home: Path, count: int, seed: int) -> int:
    configure(home)
    service, begun = Service(home), time.monotonic()
    good = GoodClient(service.url, home / "ledger-good")
    good.start()
    answered, wrong, memory = Counter[str](), list[str](), list[int]()
    try:
        for number in range(ROUNDS):
            more, also_wrong = round_of(service, home, count // ROUNDS, seed + number)
            answered += more
            wrong += also_wrong
            memory.append(service.memory())
    finally:
        good.is_over.set()
        good.join()
        seconds, cpu = time.monotonic() - begun, service.cpu()
        code = service.stop()
    wrong += good.wrong + service.errors + lost(home)
    if code != os.EX_OK:
        wrong.append(f"the service exited with {code}")
    if memory[-1] - memory[0] > GROWTH:
        wrong.append(f"the service has grown: {memory}")
    for what, number in sorted(answered.items()):
        print(f"{number:9,} {what}")
    print(f"{count:,} requests in {seconds:.0f} s, of which the service computed {cpu:.0f} s")
    for what, waits in good.seconds.items():
        waits.sort()
        middle, late, last = (waits[int(len(waits) * part)] * 1000 for part in (0.5, 0.99, 0.9999))
        told = f"p50 {middle:.1f} ms, p99 {late:.1f}, max {last:.1f}"
        print(f"{what} meanwhile, {len(waits)} times: {told}")
    print("memory: " + ", ".join(f"{each / 1e6:.0f} MB" for each in memory))
    print(f"{len(wrong)} things are wrong")
    wrong.sort(key=lambda each: "500" not in each)
    print(*wrong[:SHOWN], sep="\n")
    return 1 if wrong else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--requests", type=int, default=20_000, help="about so many (20000)")
    parser.add_argument("--seed", type=int, default=1, help="by which they are made up (1)")
    parser.add_argument("--dir", type=Path, help="make the temporary folder in this one")
    parser.add_argument("--client", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.client:
        send(args.client, args.seed, args.requests, args.dir)
        return
    with tempfile.TemporaryDirectory(prefix="dropzone-hostile-", dir=args.dir) as folder:
        sys.exit(attack(Path(folder).resolve(), args.requests, args.seed))


if __name__ == "__main__":
    main()
