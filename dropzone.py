"""Dropzone: the landing zone between devices and a database.

The way of a payload, which is also the order of this file:

1. A device POSTs JSON to `/ingest`. `RawStore.land` takes it together with what else has arrived,
   appends the group to the journal and syncs that: from this point on the payloads are durable.
   Then it writes the exact bytes to `raw/<raw_id>.json`; only then does the device get its 202.
2. `Processor.process` reads pending payloads in order of arrival, `transform`s each into a
   `Measurement` (UTC timestamp, mean, population standard deviation) or finds out why that is
   impossible, upserts the measurements into the backend, and only then moves the payloads out of
   `raw/`: to `processed/<UTC day of arrival>/`, or to `rejected/` beside the reason.
3. A crash at any moment leaves a payload where it was. Doing a step again changes nothing, because
   the backend keeps, for each timestamp, the row with the greatest `raw_id`: the last arrival.

The state of a payload is the folder that its file lies in. Nothing else has to be asked.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import codecs
import contextlib
import csv
import ctypes
import errno
import fcntl
import functools
import gzip
import hashlib
import importlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import multiprocessing
import multiprocessing.process
import operator
import os
import pwd
import re
import resource
import secrets
import select
import shutil
import signal
import sqlite3
import ssl
import statistics
import struct
import sys
import tempfile
import threading
import time
import tomllib
import zlib
from collections import Counter, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from ipaddress import IPv6Address
from pathlib import Path
from random import getrandbits, uniform
from typing import Annotated, Any, BinaryIO, ClassVar, Generic, Literal, NoReturn, TypeVar, cast
from uuid import UUID

import aiofiles.os
import msgspec
import prometheus_client as prometheus
from aiohttp import ClientError, ClientSession, ClientTimeout, StreamReader, web
from aiohttp.hdrs import METH_ALL
from aiohttp.http_exceptions import HttpProcessingError
from dotenv import dotenv_values
from filelock import AsyncFileLock, FileLock, Timeout
from msgspec import Meta, Struct
from prometheus_client.exposition import choose_encoder
from throttled import BaseRateLimiter, MemoryStore, Throttled
from throttled.exceptions import DataError
from tqdm import tqdm
from uuid_utils.compat import uuid7

from backends import (
    Backend,
    BackendError,
    BackendUnavailable,
    Bucket,
    Measurement,
    MeasurementNotFound,
    create_backend,
    differences,
    same,
    timestamp_text,
)

try:
    from uvloop import new_event_loop
except ImportError:  # there is no wheel for this platform: asyncio's own loop does
    from asyncio import new_event_loop  # type: ignore[assignment]

__version__ = "0.1.0"
log = logging.getLogger("dropzone")
request_log = logging.getLogger("dropzone.access")
audit_log = logging.getLogger("dropzone.audit")
T = TypeVar("T")


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


class DropzoneError(Exception):
    """Root of what Dropzone raises: a sentence that says what to do, a stable `code`, a `status`.

    `status` is the HTTP status (RFC 9110) of the answer that reports it; `extra` holds members
    that the problem document (RFC 9457) carries besides. A class of its own is for what is caught.
    """

    code, status = "internal_error", 500

    def __init__(self, detail: str, code: str = "", status: int = 0, **extra: object) -> None:
        super().__init__(detail)
        self.detail, self.extra = detail, extra
        self.code, self.status = code or self.code, status or self.status


class ConfigError(DropzoneError):
    code = "config_invalid"


class PayloadNotJson(DropzoneError):
    code, status = "payload_not_json", 400


class RawIdUnknown(DropzoneError):
    code, status = "raw_id_unknown", 404


class KeyReused(DropzoneError):
    code, status = "idempotency_key_reused", 422


class StorageUnavailable(DropzoneError):
    code, status = "storage_unavailable", 503


class StorageFull(StorageUnavailable):
    code = "storage_full"


class ProcessorBusy(DropzoneError):
    code, status = "processor_busy", 503


class DataQualityError(DropzoneError):
    """A payload that cannot become a measurement; `code` is one of the table in the README."""

    status = 422

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail, code)

    def __reduce__(self) -> tuple[type[DataQualityError], tuple[str, str]]:
        return type(self), (self.code, self.detail)


# ── Configuration ─────────────────────────────────────────────────────────────────────────────────


class Secret:
    """A string that shows itself to nobody but the caller of `reveal`."""

    def __init__(self, text: str = "") -> None:
        self._text = text

    def reveal(self) -> str:
        return self._text

    def __bool__(self) -> bool:
        return bool(self._text)

    def __repr__(self) -> str:
        return "Secret(set)" if self else "Secret(unset)"


class Place(str):
    """An https address or the path of a file."""

    __slots__ = ()


class Rate(str):
    """So many requests in a time, `100/second` or `5000/minute`; empty for any number."""

    __slots__ = ()

    def __init__(self, text: str = "") -> None:
        try:
            self.limiter() if text else None
        except DataError:
            wrong = f"Expected such as `100/second` or `5000/minute`, got `{text}`"
            raise ValueError(wrong) from None

    def limiter(self) -> BaseRateLimiter:
        """Return what counts by it: a bucket that fills evenly (GCRA), for each key or address."""
        return Throttled(using="gcra", quota=str(self), store=MemoryStore(options=COUNTED)).limiter


COUNTED = {"MAX_SIZE": 100_000}  # keys or addresses; who was not seen for longest is forgotten


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A section of `config.toml`, where each setting is explained."""


class ServerConfig(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    max_body_bytes: Annotated[int, Meta(ge=1)] = 32 * 1024 * 1024
    body_seconds: Annotated[float, Meta(gt=0)] = 30.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None


class RawConfig(Section, frozen=True):
    dir: Path = Path("data/raw")
    processed_dir: Path | None = None
    rejected_dir: Path | None = None
    min_free_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024
    keep_days: Annotated[int, Meta(ge=0)] = 0


class ProcessConfig(Section, frozen=True):
    batch: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    every: Annotated[float, Meta(ge=0)] = 0.0


class SqliteConfig(Section, frozen=True):
    path: Path = Path("data/dropzone.sqlite")


class PostgresConfig(Section, frozen=True):
    url: Secret = Secret()
    pool: Annotated[int, Meta(ge=1, le=1000)] = 10


class StorageConfig(Section, frozen=True):
    backend: str = "sqlite"
    sqlite: SqliteConfig = SqliteConfig()
    postgres: PostgresConfig = PostgresConfig()


Scope = Literal["ingest", "process", "read"]
KEY_NAME = r"^[A-Za-z0-9._-]{1,64}\Z"


class KeyConfig(Section, frozen=True):
    name: Annotated[str, Meta(pattern=KEY_NAME)]
    hash: Secret
    scopes: Annotated[tuple[Scope, ...], Meta(min_length=1)]


class JwtConfig(Section, frozen=True):
    issuer: str = ""
    audience: str = ""
    jwks: Place = Place()
    scope_claim: str = "scope"


class AuthConfig(Section, frozen=True):
    api_key: Secret = Secret()
    keys: tuple[KeyConfig, ...] = ()
    jwt: JwtConfig = JwtConfig()


class LimitsConfig(Section, frozen=True):
    per_key: Rate = Rate()
    per_address: Rate = Rate()


class LogConfig(Section, frozen=True):
    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class Config(Section, frozen=True, dict=True):
    """Every setting, checked, with its paths made absolute.

    One that was loaded knows the `files` that it depends on, there or not, the one with the keys
    first, and how to `reload` itself. One that a program made by itself has neither.
    """

    files: ClassVar[Sequence[Path]] = ()
    reload: ClassVar[functools.partial[Config]]

    server: ServerConfig = ServerConfig()
    raw: RawConfig = RawConfig()
    process: ProcessConfig = ProcessConfig()
    storage: StorageConfig = StorageConfig()
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()


Setting = tuple[str, ...]  # ("storage", "sqlite", "path")
Table = dict[str, Any]
Given = tuple[object, Path, Setting, object]  # by whom, where paths begin, what, and its value


def _settings_of(section: Section, prefix: Setting = ()) -> Iterator[Setting]:
    for name in section.__struct_fields__:
        value = getattr(section, name)
        inside = _settings_of(value, (*prefix, name)) if isinstance(value, Section) else None
        yield from inside or [(*prefix, name)]


VARIABLES: dict[str, Setting] = {
    **{"DROPZONE_" + "_".join(setting).upper(): setting for setting in _settings_of(Config())},
    "DROPZONE_API_KEY": ("auth", "api_key"),
    "DROPZONE_BACKEND": ("storage", "backend"),
    "DROPZONE_DATABASE_URL": ("storage", "postgres", "url"),
}


def load_config(
    path: str | Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[Setting, object] | None = None,
) -> Config:
    """Return the configuration: `overrides` > environment > `.env` > file > defaults.

    The file is `path`, or what `DROPZONE_CONFIG` names, or `config.toml` in the working directory,
    or the one beside this program; `.env` is looked for in the same two folders. A relative path
    counts from the folder of the file that it stands in, in a variable from the working directory.
    An empty variable is as good as none. Raises `ConfigError`, with a line for each wrong setting.
    """
    file, given = _sources(path, environ)
    given += [("the command line", Path.cwd(), *pair) for pair in (overrides or {}).items()]
    config, wrong = Config(), list[str]()
    for source in given:
        try:
            config = _with(config, *source)
        except ConfigError as error:
            wrong.append(error.detail)
    if wrong:
        raise ConfigError("\n".join(wrong))
    again = functools.partial(load_config, file, environ=environ, overrides=overrides)
    places = ((file,) if file else _places("config.toml")) + _places(".env")
    config.__dict__.update(files=places, reload=again)
    if config.storage.backend == "postgres" and not config.storage.postgres.url:
        raise ConfigError("the postgres backend needs an address: set DROPZONE_DATABASE_URL")
    return config


def _sources(
    path: str | Path | None, environ: Mapping[str, str]
) -> tuple[Path | None, list[Given]]:
    """Return the file, and what it, `.env` and the environment set, the best of them last."""
    here = Path.cwd()
    dotenv = _read(_in_reach(".env"), lambda text: dotenv_values(stream=io.StringIO(text)))
    variables = [
        (name, text, home)
        for found, home in (dotenv, (environ, here))
        for name, text in found.items()
        if name.startswith("DROPZONE_") and text
    ]
    files = [home / text for name, text, home in variables if name == "DROPZONE_CONFIG"]
    files += [here / path] if path else []
    file = files[-1] if files else _in_reach("config.toml")
    table, home = _read(file, tomllib.loads)
    given: list[Given] = [(file, home, (), {}), *((file, home, *leaf) for leaf in _leaves(table))]
    if any(name == "DROPZONE_DATABASE_URL" for name, _, _ in variables):
        variables.insert(0, ("DROPZONE_BACKEND", "postgres", here))  # unless another follows
    for name, text, home in variables:
        if name != "DROPZONE_CONFIG":
            given.append((name, home, VARIABLES.get(name, (name,)), text))
    return file, given


def _places(name: str) -> tuple[Path, ...]:
    return Path.cwd() / name, Path(__file__).resolve().parent / name


def _leaves(table: Table, prefix: Setting = ()) -> Iterator[tuple[Setting, object]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _in_reach(name: str) -> Path | None:
    return next((file for file in _places(name) if file.is_file()), None)


def _read(file: Path | None, parse: Callable[[str], Table]) -> tuple[Table, Path]:
    """Return what a file sets, and the folder that its relative paths count from."""
    try:
        return (parse(file.read_text("utf-8")), file.parent) if file else ({}, Path.cwd())
    except (OSError, ValueError) as error:  # also what is no UTF-8
        raise ConfigError(f"{file} cannot be read: {error}") from None


def _with(config: Config, source: object, home: Path, setting: Setting, value: object) -> Config:
    """Return the configuration with what a source sets; a relative path in it begins at `home`."""

    def from_text(kind: type, text: object) -> object:
        if not isinstance(text, str):
            raise ValueError("Expected `str`")  # noqa: TRY004 (msgspec adds the place)
        try:
            is_path = kind is Path or (kind is Place and text and "://" not in text)
            return kind(home / Path(text).expanduser() if is_path else text)
        except RuntimeError as error:  # the home folder of nobody
            raise ValueError(str(error)) from None

    try:
        if setting == ("auth", "keys") and isinstance(value, str):  # a variable
            value = msgspec.json.decode(value)
        for key in reversed(setting):
            value = {key: value}
        table = _merged(_plain(config), value)
        return msgspec.convert(table, Config, strict=False, dec_hook=from_text)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{source}: {error}") from None


def _plain(config: Config) -> Table:
    table: Table = msgspec.to_builtins(
        config, enc_hook=lambda value: value.reveal() if isinstance(value, Secret) else str(value)
    )
    return table


def _merged(old: object, new: object) -> object:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


# ── Logs ──────────────────────────────────────────────────────────────────────────────────────────

LINES = 8  # of requests that are written at once: not more than a pipe takes whole
LINES_PATIENCE = 0.1  # seconds
LINES_WAITING = 10_000


class Facts(dict[str, Any]):
    """The message of a log record: fields of a JSON line, `name=value` in text."""

    def __str__(self) -> str:
        text = " ".join([f"{name}={value}" for name, value in self.items()])
        if text.isprintable() and text.count(" ") == len(self) - 1:
            return text
        return " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in self.items())


class TextLines(logging.Formatter):
    """Lines for people; what follows on a line break is indented, so that no text forges a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6]
        text = f"{at}Z {record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        if text.isprintable():
            return text
        lines = (
            "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
            for line in text.split("\n")
        )
        return "\n    ".join(lines)


class JsonLines(logging.Formatter):
    """A JSON object on each line, an exception in one field of it."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line = {"time": at, "level": record.levelname, "logger": record.name}
        line |= record.msg if isinstance(record.msg, Facts) else {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:  # a file name or a header that was no UTF-8
            return json.dumps(line, default=str)


class RequestLine(Struct, frozen=True):
    """What the log says of a request; in JSON these are the members of its line."""

    time: datetime
    level: str
    logger: str
    request_id: str
    caller: str
    method: str
    route: str
    status: int
    bytes: int
    duration: float
    raw_id: UUID | msgspec.UnsetType = msgspec.UNSET
    payloads: int | msgspec.UnsetType = msgspec.UNSET

    def facts(self) -> Facts:
        found = zip(self.__struct_fields__[3:], msgspec.structs.astuple(self)[3:], strict=True)
        return Facts((name, value) for name, value in found if value is not msgspec.UNSET)

    def text(self) -> str:
        at = self.time.isoformat(timespec="milliseconds")[:-6]
        text = REQUEST_TEXT.format(at, *msgspec.structs.astuple(self)[1:10])
        plain = self.caller.isprintable() and " " not in self.caller  # so that it forges no other
        if not plain or self.payloads is not msgspec.UNSET:
            return f"{text.partition(': ')[0]}: {self.facts()}\n"
        if self.raw_id is msgspec.UNSET:
            return f"{text}\n"
        return f"{text} raw_id={msgspec.to_builtins(self.raw_id)}\n"  # sooner than str()


REQUEST_TEXT = (
    "{}Z {} {}: request_id={} caller={} method={} route={} status={} bytes={} duration={}"
)


class LineHandler(logging.Handler):
    """Writes to standard error, and never waits for whoever reads it.

    Lines of requests are written a few at a time and a tenth of a second late at most, as each
    write has its price. While the reader stalls they wait, `LINES_WAITING` of them; what is beyond
    is lost, and counted.
    """

    def __init__(self, form: Literal["text", "json"], descriptor: int = 2) -> None:
        super().__init__()
        self.setFormatter(JsonLines() if form == "json" else TextLines())
        self._as_json = form == "json"
        self._descriptor = descriptor
        self._requests: list[RequestLine] = []
        self._timed = False  # whether the event loop will write them
        self._waiting = deque[bytes]()  # each no longer than what a pipe takes whole
        self._lost = 0

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{self.format(record)}\n"
        except Exception:  # noqa: BLE001 (the log stops nobody)
            return self.handleError(record)
        self._take_requests()
        self._take(text.encode(errors="backslashreplace"), 1)
        return self._write()

    def note(self, line: RequestLine) -> None:
        """Log a request; called by the event loop."""
        self._requests.append(line)
        if len(self._requests) >= LINES:
            self.flush(0)
        elif not self._timed:
            self._timed = True
            asyncio.get_running_loop().call_later(LINES_PATIENCE, self._in_time)

    def _in_time(self) -> None:
        self._timed = False
        self.flush(0)

    def flush(self, patience: float = 1.0) -> None:
        """Write what waits; at exit `logging` calls it."""
        with self.lock or contextlib.nullcontext():
            self._take_requests()
            self._write(patience)

    def _take_requests(self) -> None:
        lines, self._requests = self._requests, []
        if lines and self._as_json:
            self._take(msgspec.json.Encoder().encode_lines(lines), len(lines))
        elif lines:
            text = "".join(map(RequestLine.text, lines))
            self._take(text.encode(errors="backslashreplace"), len(lines))

    def _take(self, text: bytes, lines: int) -> None:
        if len(self._waiting) * LINES >= LINES_WAITING:
            self._lost += lines
        else:
            starts = range(0, len(text), select.PIPE_BUF)
            self._waiting.extend(text[n : n + select.PIPE_BUF] for n in starts)

    def _write(self, patience: float = 0) -> None:
        with contextlib.suppress(OSError):  # nobody reads it any more
            while self._waiting and select.select((), (self._descriptor,), (), patience)[1]:
                written = os.write(self._descriptor, text := self._waiting.popleft())
                if written < len(text):
                    self._waiting.appendleft(text[written:])
                elif lost := self._lost:
                    self._lost = 0
                    log.warning("%d lines were lost, as nobody read standard error", lost)


def log_to_stderr(config: LogConfig, level: str = "") -> None:
    """Set up logging, unless somebody has; what is audited comes whatever the level."""
    if logging.getLogger().handlers:
        return
    handlers = [LineHandler(config.format)]
    logging.basicConfig(level=(level or config.level).upper(), handlers=handlers)
    audit_log.setLevel(logging.INFO)


def audit(action: str, caller: str, **facts: object) -> None:
    """Log a change of state that a person or a key has caused."""
    audit_log.info(Facts(action=action, caller=caller, **facts))


@contextlib.contextmanager
def audited(action: str, caller: str, **facts: object) -> Iterator[dict[str, object]]:
    """Log an action at its end, with the facts that were added; if it fails a part may be done."""
    try:
        yield facts
    except BaseException as error:
        facts["error"] = type(error).__name__
        raise
    finally:
        audit(action, caller, **facts)


def operator_name() -> str:
    """Return whoever runs a command, in the words of an audit line."""
    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:  # a container may run as a user without a name
        return f"cli:{os.getuid()}"


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────

REFUSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
LARGE_JSON = 64 * 1024  # bytes that are checked at once, however odd they are


def parse_json(body: bytes) -> object:
    """Return the value of a JSON document (RFC 8259), or raise `PayloadNotJson` with the position.

    Let in besides, since devices send them: a byte order mark, the literals NaN, Infinity and
    -Infinity, and numbers beyond a double, which become infinities. Of equal names the last counts.
    """
    try:
        return msgspec.json.decode(body)  # several times as fast as `json`, but stricter
    except REFUSED:
        return _parse_leniently(body)


def check_json(body: bytes, *, patient: bool = True) -> None:
    """Raise `PayloadNotJson` where `parse_json` would, in a tenth of the time, without the values.

    Those of a large document can take a gigabyte, and hold up all else for seconds: unless
    `patient`, raise one of `REFUSED` where it has to be parsed to tell.
    """
    try:
        msgspec.json.decode(body, type=msgspec.Raw)
        body.isascii() or body.decode()  # what is raw is not decoded
    except REFUSED:
        if not patient and len(body) > LARGE_JSON:
            raise
        _parse_leniently(body)


def _parse_leniently(body: bytes) -> object:
    mark = len(codecs.BOM_UTF8) if body.startswith(codecs.BOM_UTF8) else 0
    try:
        return json.loads(body[mark:].decode(), parse_int=_parse_int)
    except RecursionError:
        raise PayloadNotJson("nested too deeply: send a flatter document") from None
    except UnicodeDecodeError as error:
        position = mark + error.start
        line = 1 + body.count(b"\n", 0, position)
        place = f"line {line} (byte {position})"
        raise PayloadNotJson(f"not UTF-8: {error.reason} at {place}", position=position) from None
    except json.JSONDecodeError as error:
        problem = error.msg if error.doc.strip() else "the body is empty"
        position = mark + len(error.doc[: error.pos].encode())
        place = f"line {error.lineno}, column {error.colno} (byte {position})"
        raise PayloadNotJson(f"not JSON: {problem} at {place}", position=position) from None


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits) < 400 else float(digits)  # int() refuses 4,301 digits


# ── Metrics: what is counted, in all processes of a data folder ───────────────────────────────────

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SIZES = tuple(2.0**power for power in range(0, 15, 2))
SHARE_EVERY = 1.0  # seconds
GONE = 10.0  # seconds after which a process that shares nothing has ended
OPEN_METRICS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",  # what a power cut takes are counts
    "CREATE TABLE IF NOT EXISTS samples (sample TEXT PRIMARY KEY, value REAL)",
    "CREATE TABLE IF NOT EXISTS in_flight (process TEXT PRIMARY KEY, bytes INT, at REAL)",
)
ADD_SAMPLE = """INSERT INTO samples (sample, value) VALUES (?, ?)
ON CONFLICT (sample) DO UPDATE SET value = value + excluded.value"""
ALL_SAMPLES = "SELECT sample, value FROM samples ORDER BY rowid"
NOTE_IN_FLIGHT = "INSERT OR REPLACE INTO in_flight (process, bytes, at) VALUES (?, ?, ?)"
DROP_GONE = "DELETE FROM in_flight WHERE at < ? OR bytes = 0"
ALL_IN_FLIGHT = "SELECT coalesce(sum(bytes), 0) FROM in_flight"


class Metrics:
    """Counters, histograms and gauges for Prometheus, of all processes of a data folder together.

    A process counts in memory and adds what is new to a file beside the journal, each second and
    before it shows the totals. So any worker answers for all, `process --watch` and the command
    line are seen, and counts outlive a restart; a `kill -9` takes those of a second.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "metrics.sqlite"
        self._connection: sqlite3.Connection | None = None
        self._turn = threading.Lock()
        self._shared: dict[str, float] = {}  # what of our own samples is in the file
        self._totals: dict[str, float] = {}  # what was in the file
        self._noted = 0  # bytes in flight, in the file
        self._failed = False
        self._answered: dict[object, tuple[prometheus.Counter, prometheus.Histogram]] = {}
        self.own_in_flight: Callable[[], int] = int
        # registries of our own, as two applications may share a process
        self._counts, self._gauges = prometheus.CollectorRegistry(), prometheus.CollectorRegistry()
        count = functools.partial(prometheus.Counter, registry=self._counts)
        histogram = functools.partial(prometheus.Histogram, registry=self._counts)
        seconds = functools.partial(histogram, buckets=SECONDS)
        gauge = functools.partial(prometheus.Gauge, registry=self._gauges)
        route = ["method", "route"]
        self._requests = count("dropzone_requests", "Requests answered", [*route, "status"])
        self._request = seconds("dropzone_request_duration_seconds", "Time until the answer", route)
        self.refusals = count("dropzone_refusals", "Answers that are problem documents", ["code"])
        self._payloads = count("dropzone_payloads_landed", "Payloads made durable")
        self._bytes = count("dropzone_landed_bytes", "Bytes of payloads made durable")
        self._land = seconds("dropzone_land_duration_seconds", "Time until a group landed")
        self._sync = seconds("dropzone_journal_sync_duration_seconds", "Time to append and sync")
        self._group = histogram(
            "dropzone_group_payloads", "Payloads that share a sync", buckets=SIZES
        )
        self.processed = count("dropzone_payloads_processed", "Payloads that became rows")
        self.rejected = count("dropzone_payloads_rejected", "Payloads rejected", ["code"])
        of = ["operation"]
        self.backend = seconds("dropzone_backend_duration_seconds", "Time that calls took", of)
        self.backend_errors = count("dropzone_backend_errors", "Calls that failed", of)
        self._in_flight = gauge("dropzone_in_flight_bytes", "Bodies that are not answered yet")
        self.pending = gauge("dropzone_payloads_pending", "Payloads that wait to be processed")
        self.oldest = gauge(
            "dropzone_oldest_pending_age_seconds", "Time since the oldest of them arrived"
        )
        self.free = gauge("dropzone_data_free_bytes", "Free on the file system of the data folder")

    def answered(self, request: web.Request, status: int, seconds: float) -> None:
        """Count a request."""
        resource = request.match_info.route.resource
        place = (request.method, resource, status)
        found = self._answered.get(place)
        if found is None:  # looking up labels takes longer than counting
            labels = template_of(request)
            found = self._requests.labels(*labels, str(status)), self._request.labels(*labels)
            if resource:
                self._answered[place] = found
        found[0].inc()
        found[1].observe(seconds)

    def landed(self, written: Written, seconds: float) -> None:
        """Count a group."""
        if written.payloads:
            self._payloads.inc(written.payloads)
            self._bytes.inc(written.bytes)
            self._group.observe(written.payloads)
            self._land.observe(seconds)
            self._sync.observe(written.sync_seconds)

    def collect(self) -> Iterator[prometheus.Metric]:
        """Yield what all processes have counted, as a Prometheus registry does. Blocks on disk."""
        totals = self.share()
        families = {each.name: each for each in self._counts.collect()}
        for each in families.values():
            each.samples = []
        for sample, value in totals.items():
            family, name, labels = msgspec.json.decode(sample)
            if family in families:  # or else it is another version's
                families[family].add_sample(name, labels, value)
        yield from families.values()
        yield from self._gauges.collect()

    def share(self, *, quietly: bool = False) -> dict[str, float]:
        """Add what is new to the file, and return the totals; `quietly`, touch it only for that."""
        with self._turn:
            own = self._own_samples()
            fresh = {sample: value - self._shared.get(sample, 0) for sample, value in own.items()}
            in_flight = self.own_in_flight()
            if quietly and not (in_flight or self._noted or any(fresh.values())):
                return self._totals
            try:
                self._exchange(fresh, in_flight)
                self._shared, self._noted, self._failed = own, in_flight, False
            except sqlite3.Error as error:  # a full disk, say: go on with what is known
                if not self._failed:  # or else it would be said each second
                    wrong = "%s: counts are not shared: %s; if it is damaged, stop and delete it"
                    log.warning(wrong, self._file, error)
                self._failed = True
                return self._totals | {s: self._totals.get(s, 0) + fresh[s] for s in fresh}
            return self._totals

    def _own_samples(self) -> dict[str, float]:
        return {
            msgspec.json.encode((family.name, sample.name, sample.labels)).decode(): sample.value
            for family in self._counts.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }

    def _exchange(self, fresh: Mapping[str, float], in_flight: int) -> None:
        if self._connection is None:
            self._process = str(uuid7())
            self._connection = sqlite3.connect(self._file, check_same_thread=False)
        if not self._totals:
            for statement in OPEN_METRICS:
                self._connection.execute(statement)
        with self._connection as file:  # one transaction
            new = (each for each in fresh.items() if each[1] or each[0] not in self._shared)
            file.executemany(ADD_SAMPLE, new)
            file.execute(NOTE_IN_FLIGHT, (self._process, in_flight, time.time()))
            file.execute(DROP_GONE, (time.time() - GONE,))
            self._totals = dict(file.execute(ALL_SAMPLES))
            self._in_flight.set(file.execute(ALL_IN_FLIGHT).fetchone()[0])

    async def share_forever(self) -> None:
        while True:
            await asyncio.sleep(SHARE_EVERY)
            await asyncio.to_thread(self.share, quietly=True)

    def close(self) -> None:
        self.own_in_flight = int
        self.share(quietly=True)
        if self._connection:
            self._connection.close()
            self._connection, self._totals = None, {}


# ── Raw store: where payloads lie ─────────────────────────────────────────────────────────────────


class Rejection(Struct, frozen=True):
    """Why a payload was rejected: the content of `rejected/<raw_id>.reason.json`.

    It stays there when the payload is put back to pending, which `retries` counts.
    """

    raw_id: UUID
    code: str
    detail: str
    rejected_at: datetime
    retries: int = 0
    retried_at: datetime | None = None


State = Literal["pending", "processed", "rejected"]
STATES: tuple[State, ...] = ("pending", "processed", "rejected")

PAYLOAD_NAME = re.compile(r"([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})\.json")
DAY_NAME = re.compile(r"\d{4}-\d\d-\d\d")
PACK_NAME = re.compile(r"\d{4}-\d\d-\d\d(\.\d+)?\.ndjson\.gz")
BROKEN_FILE = {errno.EACCES, errno.EPERM, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENOENT}
WINDOW = 200_000  # payloads that are listed at a time, so that any number fits into memory
PORTION = 1000
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
RAND_B = (1 << 62) - 1  # the random tail of a UUIDv7

BATCHES = 2  # groups under way at once where many payloads come together; else it is one
LARGE_GROUP = 16  # requests
GROUP_BYTES = 1024 * 1024  # that are landed together; a single request may be larger
WRITER_BYTES = 8 * 1024  # of a group that is worth the way to another process
MANY_FILES = 64  # in a group that two threads write
LOG_BYTES = 128 * 1024 * 1024  # at which a log is ended and checkpointed
AHEAD = 256 * 1024  # bytes that a log is filled ahead of its records
FULL_LOGS = 2  # that may await their checkpoint before landing does, too: the journal is bounded
HEAD = struct.Struct("<QII")  # of a record: its epoch, the length and CRC-32 of what follows
KEY_LIFE = timedelta(hours=24)
OPEN_KEYS = (
    "PRAGMA journal_mode = WAL",
    "PRAGMA synchronous = NORMAL",  # the journal has what is not synced yet
    "CREATE TABLE IF NOT EXISTS keys (key TEXT PRIMARY KEY, digest BLOB, raw_ids BLOB, landed INT)",
)
FIND_KEY = "SELECT digest, raw_ids, landed FROM keys WHERE key = ? AND raw_ids >= ?"
NOTE_KEY = "INSERT OR REPLACE INTO keys (key, digest, raw_ids, landed) VALUES (?, ?, ?, ?)"
DROP_KEYS = "DELETE FROM keys WHERE raw_ids < ?"


def raw_id_of(name: str) -> UUID | None:
    """Return the raw_id that a file name stands for, or None for the name of another file."""
    match = PAYLOAD_NAME.fullmatch(name)
    return UUID(match[1]) if match else None


def arrival_of(raw_id: UUID) -> datetime | None:
    """Return when a payload arrived (UTC, milliseconds), None if its raw_id is no UUIDv7."""
    try:
        return (
            datetime.fromtimestamp((raw_id.int >> 80) / 1000, UTC) if raw_id.version == 7 else None
        )
    except ValueError:  # beyond the year 9999
        return None


def uuid_at(moment: datetime) -> UUID:
    """Return the least UUIDv7 of a moment."""
    return UUID(int=int(moment.timestamp() * 1000) << 80 | 7 << 76 | 2 << 62)


def day_of(raw_id: UUID | str) -> str:
    """Return the UTC day of a payload's arrival, "unknown" if its raw_id does not tell."""
    text = str(raw_id)
    return _day(int(text[:8] + text[9:13], 16) // 86_400_000) if text[14] == "7" else "unknown"


@functools.lru_cache
def _day(number: int) -> str:
    try:
        return f"{datetime.fromtimestamp(number * 86_400, UTC):%Y-%m-%d}"
    except ValueError:  # beyond the year 9999
        return "unknown"


def earliest(folder: Path, limit: int = sys.maxsize, after: UUID | None = None) -> list[UUID]:
    """Return the `limit` least raw_ids of the payloads in a folder behind `after`, in order."""
    return list(map(UUID, earliest_names(folder, limit, str(after or ""))[0]))


def earliest_names(folder: Path, limit: int, after: str = "") -> tuple[list[str], int]:
    """Return the same as text, which is quicker to hand about, and how many there are in all.

    It holds no more than twice as many names at a time, however many files there are.
    """
    names, count = list[str](), 0
    low, high = f"{after}~" if after else "", "~"
    with os.scandir(folder) as entries:
        for entry in entries:
            if low < (name := entry.name) and PAYLOAD_NAME.fullmatch(name):
                count += 1
                if name < high:
                    names.append(name)
                if len(names) > 2 * limit:
                    names.sort()
                    high = names[limit]
                    del names[limit:]
    names.sort()
    return [name[:36] for name in names[:limit]], count


def next_raw_id(last: UUID) -> UUID:
    """Return a new UUIDv7 that is greater than `last`, whatever the clock says."""
    fresh = uuid7()
    if fresh > last:
        return fresh
    step = 1 + (fresh.int & (1 << 48) - 1)
    if (last.int & RAND_B) + step <= RAND_B:
        return UUID(int=last.int + step)
    return UUID(int=((last.int >> 80) + 1) << 80 | 7 << 76 | 2 << 62)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _read_file(path: str) -> bytes:
    """Read a file in as few system calls as a small one needs."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        data = os.read(descriptor, 65_536)
        if len(data) == 65_536:
            with open(descriptor, "rb", 0, closefd=False) as file:
                data += file.readall()
        return data
    finally:
        os.close(descriptor)


MINUTES = 60  # that the tally goes back
SLOT = struct.Struct("<QQ")
TALLY_BYTES = SLOT.size * (1 + MINUTES)


class Tally:
    """Numbers that all processes of a data folder share, in a file of a kilobyte.

    The first slot has how many payloads have become processed, and when the last landed (in ms
    since 1970); the others a minute each and how many landed in it. It is not synced: after a
    power cut it may lag. What is exact is in the folders.
    """

    def __init__(self, path: Path, processed_so_far: Callable[[], int] = int) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        with _locked(self._file):
            if os.fstat(self._file).st_size < TALLY_BYTES:
                total = 0
                with contextlib.suppress(OSError, StorageUnavailable):  # a damaged pack, say
                    total = processed_so_far()
                first = SLOT.pack(total, 0)
                os.pwrite(self._file, first.ljust(TALLY_BYTES, b"\0"), 0)

    def add(self, *, landed: int = 0, processed: int = 0) -> None:
        now = time.time_ns() // 1_000_000
        with _locked(self._file):
            total, last = self._slot(0)
            self._set(0, total + processed, now if landed else last)
            if landed:
                minute = now // 60_000
                known, count = self._slot(1 + minute % MINUTES)
                self._set(1 + minute % MINUTES, minute, landed + (count if known == minute else 0))

    def read(self) -> tuple[int, int, list[int]]:
        """Return both of the first slot, and how many landed in each minute, this one last."""
        (total, last), *slots = SLOT.iter_unpack(os.pread(self._file, TALLY_BYTES, 0))
        this, counts = int(time.time()) // 60, dict(slots)
        return total, last, [counts.get(this - n, 0) for n in reversed(range(MINUTES))]

    def _slot(self, number: int) -> tuple[Any, ...]:
        return SLOT.unpack(os.pread(self._file, SLOT.size, SLOT.size * number))

    def _set(self, number: int, *values: int) -> None:
        os.pwrite(self._file, SLOT.pack(*values), SLOT.size * number)

    def close(self) -> None:
        os.close(self._file)


class Folders:
    """Where payloads lie: the folder of a file is the payload's state.

    It holds nothing but paths, so that it can travel to other processes. Every method blocks on the
    disk and belongs in a thread (`asyncio.to_thread`) or a process.
    """

    def __init__(self, config: RawConfig) -> None:
        siblings = config.dir.parent
        self.raw = config.dir
        self.processed = config.processed_dir or siblings / "processed"
        self.rejected = config.rejected_dir or siblings / "rejected"
        self.journal = siblings / "journal"
        self.lock_file = siblings / "process.lock"
        self.keep_days = config.keep_days
        self._expired = self.journal / "expired"

    def path(self, raw_id: UUID, state: State) -> Path:
        folder = {"pending": self.raw, "rejected": self.rejected}.get(state)
        return (folder or self.processed / day_of(raw_id)) / f"{raw_id}.json"

    def read(self, raw_id: UUID) -> tuple[State, bytes]:
        """Return the state of a payload and its bytes; raises `RawIdUnknown`."""
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            with contextlib.suppress(FileNotFoundError):
                return state, self.path(raw_id, state).read_bytes()
        if (body := self._packed(raw_id)) is not None:
            return "processed", body
        raise RawIdUnknown(f"no payload has the raw_id {raw_id}")

    def find(self, raw_id: UUID) -> bytes | None:
        """Return the bytes of a payload, None if it is not there."""
        try:
            return self.read(raw_id)[1]
        except RawIdUnknown:
            return None

    def read_pending(self, raw_id: UUID | str) -> bytes | None:
        """Return a pending payload, None if it is no longer pending.

        Raises `DataQualityError` for a file that cannot be read, so that it does not stop the rest.
        """
        path = f"{self.raw}/{raw_id}.json"
        try:
            return _read_file(path)
        except OSError as error:
            if not os.path.lexists(path):
                return None
            if error.errno not in BROKEN_FILE:
                raise _storage_error(error) from error
            raise DataQualityError(
                "payload_unreadable", f"the file cannot be read: {error.strerror}"
            ) from error

    def pending(self, limit: int = sys.maxsize, after: UUID | None = None) -> list[UUID]:
        """Return the `limit` earliest pending payloads behind `after`, in order of arrival."""
        return earliest(self.raw, limit, after)

    def count_pending(self) -> int:
        with os.scandir(self.raw) as entries:
            return sum(PAYLOAD_NAME.fullmatch(entry.name) is not None for entry in entries)

    def open_tally(self) -> Tally:
        return Tally(self.journal / "tally", self.count_processed)

    def strays(self) -> list[str]:
        """Return the names in the raw folder that are not those of payloads."""
        return sorted(name for name in os.listdir(self.raw) if raw_id_of(name) is None)

    def publish(self, path: Path | str, body: bytes) -> None:
        """Make a file appear whole: written under another name, then renamed to `path`."""
        part = f"{self.journal}/{os.getpid()}-{threading.get_ident()}.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            _write_all(descriptor, body)
        finally:
            os.close(descriptor)
        os.rename(part, path)

    # Moves are renames, so that a payload is in exactly one folder at any moment.

    def settle(
        self, processed: Iterable[UUID | str], rejected: Iterable[Rejection]
    ) -> list[Rejection]:
        """Move payloads out of pending; return the rejections, their retries counted.

        Doing it again, or a part of it again, changes nothing.
        """
        counted, moved = list(map(self._with_retries, rejected)), 0
        for rejection in counted:
            self._record(rejection)  # before the payload, so that none is without its reason
            self._move(rejection.raw_id, self.rejected)
        for day, raw_ids in itertools.groupby(processed, day_of):
            folder = self.processed / day
            folder.mkdir(parents=True, exist_ok=True)
            for raw_id in raw_ids:
                moved += self._move(raw_id, folder)
        with contextlib.suppress(OSError), contextlib.closing(self.open_tally()) as tally:
            tally.add(processed=moved)
        return counted

    def _with_retries(self, rejection: Rejection) -> Rejection:
        if before := self.record(rejection.raw_id):
            so_far = {"retries": before.retries, "retried_at": before.retried_at}
            return msgspec.structs.replace(rejection, **so_far)
        return rejection

    def _move(self, raw_id: UUID | str, folder: Path) -> bool:
        name = f"{raw_id}.json"
        source = f"{self.raw}/{name}"
        try:
            os.rename(source, f"{folder}/{name}")
            return True
        except FileNotFoundError:
            pass  # somebody else has moved it
        except OSError as error:  # one bad file never stops the rest
            log.error("%s stays pending, it cannot be moved: %s", source, error)  # noqa: TRY400
        return False

    # Long life: finished days are packed, and after `keep_days` deleted.

    def packs(self, day: str = "") -> list[Pack]:
        """Return the packs of a day, or all; a day has a second one if payloads came late."""
        with os.scandir(self.processed) as entries:
            found = [e for e in entries if PACK_NAME.fullmatch(e.name) and e.name.startswith(day)]
        packs = []
        for entry in found:
            with contextlib.suppress(FileNotFoundError):  # it has just expired
                packs.append(Pack(Path(entry.path), entry.stat().st_mtime_ns))
        return sorted(packs, key=lambda pack: pack.path)

    def sources(self) -> Iterator[tuple[str, Iterator[Portion]]]:
        """Yield the packs and folders of all that is processed: a name, and portions to read.

        The name is another one when payloads were added.
        """
        for pack in self.packs():
            members = ((pack, n) for n in range(len(pack.index().members)))
            yield f"{pack.path.name} {pack.written}", members
        for entry in sorted(os.scandir(self.processed), key=lambda entry: entry.name):
            if entry.is_dir():
                yield f"{entry.name} {entry.stat().st_mtime_ns}", _portions(Path(entry.path))

    def count_processed(self) -> int:
        packed = sum(pack.index().payloads for pack in self.packs())
        folders = (entry.path for entry in os.scandir(self.processed) if entry.is_dir())
        return packed + sum(len(os.listdir(folder)) for folder in folders)

    def finished_days(self) -> list[str]:
        """Return the days before today (UTC) that are not packed yet, or not wholly."""
        days = filter(DAY_NAME.fullmatch, os.listdir(self.processed))
        return sorted(day for day in days if day < f"{datetime.now(UTC):%Y-%m-%d}")

    def compact(self, day: str) -> int:
        """Pack a day's payloads, then delete their files; return how many there were."""
        folder = self.processed / day
        raw_ids = [raw_id for raw_id in earliest(folder) if day_of(raw_id) == day]
        packs = self.packs(day)
        fresh = [
            raw_id
            for raw_id in raw_ids  # the others are left of a run that was stopped
            if not packs or self._packed(raw_id) != (folder / f"{raw_id}.json").read_bytes()
        ]
        if fresh:
            names = (f"{day}.{n}{PACK}" if n > 1 else f"{day}{PACK}" for n in itertools.count(1))
            paths = (self.processed / name for name in names)
            Pack.write(next(path for path in paths if not path.exists()), folder, fresh)
        for raw_id in raw_ids:
            (folder / f"{raw_id}.json").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else lies there
            folder.rmdir()
        return len(fresh)

    def expire(self) -> list[str]:
        """Delete the packs whose day is more than `keep_days` days ago; return their names."""
        first = f"{datetime.now(UTC) - timedelta(days=self.keep_days):%Y-%m-%d}"
        packs = self.packs() if self.keep_days else []
        expired = [pack for pack in packs if pack.path.name[:10] < first]
        if expired:
            self.publish(self._expired, max(self._first_kept(), first).encode())
            _sync_file(self._expired)
        for pack in expired:
            pack.remove()
        return [pack.path.name for pack in expired]

    def is_expired(self, day: str) -> bool:
        """Say whether the packs of a day were deleted; not whether it is old enough for that.

        What has landed before a long power cut is old, too, and still to be processed.
        """
        return day < self._first_kept()

    def _first_kept(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self._expired.read_text()
        return ""

    def is_packed_or_expired(self, raw_id: UUID) -> bool:
        with contextlib.suppress(StorageUnavailable):  # what is damaged is as good as not there
            return self.is_expired(day_of(raw_id)) or self._packed(raw_id) is not None
        return False

    def _packed(self, raw_id: UUID) -> bytes | None:
        damage = None
        for pack in self.packs(day_of(raw_id)):
            try:
                if (body := pack.read(raw_id)) is not None:
                    return body
            except FileNotFoundError:
                pass  # it has just expired
            except StorageUnavailable as error:
                damage = error
        if damage:
            raise damage
        return None

    # The quarantine

    def rejection(self, raw_id: UUID) -> Rejection:
        """Return why a payload was rejected; raises `RawIdUnknown` if it was not."""
        try:
            moved = datetime.fromtimestamp(self.path(raw_id, "rejected").lstat().st_ctime, UTC)
        except FileNotFoundError:
            raise RawIdUnknown(f"{raw_id} is not rejected") from None
        wrong = "the reason is not there or cannot be read"
        return self.record(raw_id) or Rejection(raw_id, "reason_missing", wrong, moved)

    def rejections(self, one: UUID | None = None) -> Iterator[Rejection]:
        """Yield why each rejected payload (or just one) is, in order of arrival."""
        for raw_id in [one] if one else earliest(self.rejected):
            with contextlib.suppress(RawIdUnknown):  # it was put back meanwhile
                yield self.rejection(raw_id)

    def retry(self, raw_id: UUID) -> bool:
        """Put a rejected payload back to pending; return False if it is not rejected.

        It keeps its raw_id, so that it still loses against later arrivals. Raises
        `StorageUnavailable`.
        """
        source = self.path(raw_id, "rejected")
        try:
            reason, now = self.rejection(raw_id), datetime.now(UTC)
            again = {"retries": reason.retries + 1, "retried_at": now}
            self._record(msgspec.structs.replace(reason, **again))
            os.rename(source, self.path(raw_id, "pending"))
            return True
        except RawIdUnknown:
            return False
        except OSError as error:
            if source.exists():
                raise _storage_error(error) from error
            return False  # somebody else has put it back

    def record(self, raw_id: UUID) -> Rejection | None:
        """Return the last rejection of a payload, whatever has become of it since."""
        with contextlib.suppress(OSError, ValueError):  # also what is no UTF-8
            return msgspec.json.decode(self._reason(raw_id).read_bytes(), type=Rejection)
        return None

    def _record(self, rejection: Rejection) -> None:
        self.publish(self._reason(rejection.raw_id), msgspec.json.encode(rejection))

    def _reason(self, raw_id: UUID) -> Path:
        return self.rejected / f"{raw_id}.reason.json"


# ── Raw store: packs of finished days ─────────────────────────────────────────────────────────────

PACK = ".ndjson.gz"
MEMBER_BYTES = 256 * 1024  # of payloads in one gzip member, which is what a look-up has to read


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
    """A finished day of processed payloads in one file that never changes.

    It is NDJSON in gzip members (RFC 1952), ordered by raw_id: zcat and jq read it. Its index
    leads to the one member that a payload is in.
    """

    path: Path
    written: int  # when, in ns: a name may be used again

    @functools.lru_cache(maxsize=32)  # noqa: B019 (a pack is but its name)
    def index(self) -> PackIndex:
        try:
            return msgspec.json.decode(Path(f"{self.path}.index").read_bytes(), type=PackIndex)
        except (FileNotFoundError, ValueError) as error:
            if not self.path.exists():
                raise  # it has just expired
            wrong = f"{self.path} has lost its index, restore it from a copy: {error}"
            raise StorageUnavailable(wrong) from error

    @functools.lru_cache(maxsize=8)  # noqa: B019
    def member(self, number: int) -> dict[UUID, bytes]:
        return _read_member(self.path, self.index(), number)

    def read(self, raw_id: UUID) -> bytes | None:
        number = bisect.bisect(self.index().members, raw_id, key=lambda member: member[0]) - 1
        return self.member(number).get(raw_id) if number >= 0 else None

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
        _sync_file(index_file)
        os.rename(part, path)
        _sync_file(path.parent)
        return cls(path, path.stat().st_mtime_ns)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        Path(f"{self.path}.index").unlink(missing_ok=True)


def _read_member(path: Path, index: PackIndex, number: int) -> dict[UUID, bytes]:
    starts = [start for _, start in index.members] + [index.bytes]
    with open(path, "rb") as file:
        file.seek(starts[number])
        packed = file.read(starts[number + 1] - starts[number])
    try:
        text = gzip.decompress(packed)
        lines = (msgspec.json.decode(line, type=PackLine) for line in text.splitlines())
        return {line.raw_id: line.body() for line in lines}
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError) as error:
        wrong = f"{path} is damaged at byte {starts[number]}, restore it from a copy: {error}"
        raise StorageUnavailable(wrong) from error


def _check_pack(path: Path, index: PackIndex, folder: Path, raw_ids: Iterable[UUID]) -> None:
    """Raise `StorageUnavailable` unless a pack gives back each payload, byte for byte."""
    wanted = iter(raw_ids)
    for number in range(len(index.members)):
        for raw_id, body in _read_member(path, index, number).items():
            if next(wanted, None) != raw_id or (folder / f"{raw_id}.json").read_bytes() != body:
                raise StorageUnavailable(f"{path} is not what was written; {folder} was kept")
    if next(wanted, None) is not None:
        raise StorageUnavailable(f"{path} is not whole; {folder} was kept")


# ── Raw store: landing ────────────────────────────────────────────────────────────────────────────


Portion = list[UUID] | tuple[Pack, int]  # of a folder; or a member of a pack


def _portions(folder: Path) -> Iterator[Portion]:
    last = None
    while raw_ids := earliest(folder, WINDOW, last):
        last = raw_ids[-1]
        yield from (raw_ids[n : n + PORTION] for n in range(0, len(raw_ids), PORTION))


class KeyUse(Struct, frozen=True, array_like=True):
    """An Idempotency-Key, the SHA-256 of what came with it, and the raw_ids that it was given."""

    key: str
    digest: bytes
    raw_ids: list[UUID]
    landed: bool = False


class Record(Struct, frozen=True, array_like=True):
    """A group in the journal: payloads under their raw_ids, and the keys that came with them."""

    payloads: list[tuple[UUID, bytes]]
    keys: list[KeyUse]


class Log:
    """One file of the journal: records, each with its length and checksum, written and synced.

    Blocks that a file has already are synced without waiting for the file system's own journal. So
    it is filled ahead of the records, and a log that is no longer needed is begun anew and
    overwritten: the epoch, a secret number, tells the new records from what is left of the old.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = False  # it is not to be used again
        self.size = self._filled = 0
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._begin()

    @classmethod
    def create(cls, folder: Path) -> Log:
        """Return a new log that this store holds, so that no other recovers it meanwhile."""
        log = cls(folder / f"{uuid7()}.new")
        try:
            log.hold()
            log.path = log.path.rename(log.path.with_suffix(".log"))
            _sync_file(folder)
        except OSError:
            log.remove()
            raise
        return log

    def hold(self) -> bool:
        """Lock the log until it is closed; close it and return False if another store holds it."""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self.path.exists():  # or else it was deleted before the lock was free
                return True
        self.close()
        return False

    def append(self, record: Record) -> None:
        """Return when the record is on disk; after an OSError it may be there or not."""
        body = msgspec.msgpack.encode(record)
        head = HEAD.pack(self._epoch, len(body), zlib.crc32(body))
        end = self.size + len(head) + len(body)
        if end > self._filled:
            os.pwrite(self._file, bytes(AHEAD), end)
            self._filled = end + AHEAD
        _write_all(self._file, head + body)
        os.fdatasync(self._file)
        self.size = end

    def cut(self, size: int) -> None:
        """Take back what was appended since the log had this size."""
        os.lseek(self._file, size, os.SEEK_SET)
        os.pwrite(self._file, bytes(HEAD.size), size)
        os.fdatasync(self._file)
        self.size = size

    def begin_anew(self) -> None:
        """Forget all records."""
        self.cut(0)
        self._begin()

    def _begin(self) -> None:
        self._epoch = getrandbits(64)
        self.size = 0

    def records(self) -> Iterator[Record]:
        """Yield the records up to the first that is torn: no group behind it was acknowledged."""
        epoch = None
        with open(self.path, "rb") as file:
            while len(head := file.read(HEAD.size)) == HEAD.size:
                own, length, checksum = HEAD.unpack(head)
                epoch = own if epoch is None else epoch
                body = file.read(length)
                if own != epoch or not 0 < length == len(body) or zlib.crc32(body) != checksum:
                    return
                yield msgspec.msgpack.decode(body, type=Record)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        os.close(self._file)


class Batch(Struct, frozen=True, array_like=True):
    """What one request brought."""

    bodies: list[bytes]
    key: str | None


class Answer(Struct, frozen=True, array_like=True):
    """The raw_ids for a batch; or the error that refuses it, by its code, and its detail."""

    raw_ids: list[UUID]
    code: str = ""
    detail: str = ""

    def result(self) -> list[UUID]:
        """Return the raw_ids, or raise the error."""
        if self.code:
            raise {kind.code: kind for kind in REFUSALS}[self.code](self.detail)
        return self.raw_ids


REFUSALS = (KeyReused, StorageFull, StorageUnavailable)


class Written(Struct, frozen=True, array_like=True):
    """The answers to a group, and what was made durable for them."""

    answers: list[Answer]
    payloads: int = 0
    bytes: int = 0
    sync_seconds: float = 0.0


class Writer:
    """A second store on the same folder, in a process of its own, that lands large groups.

    A file takes four system calls, and a thread must win the interpreter lock back from the event
    loop after each; a process need not. It is started by the first group that is worth it.
    """

    def __init__(self, config: RawConfig) -> None:
        home = str(Path(__file__).resolve().parent)
        settings = msgspec.to_builtins(config, enc_hook=str)
        self._code = (
            f"import sys; sys.path.insert(0, {home!r}); import dropzone; "
            f"dropzone.write_forever({settings!r})"
        )
        self._process: asyncio.subprocess.Process | None = None
        self._starting: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()

    async def write(self, group: Sequence[Batch]) -> Written | None:
        """Return the answers to a group, None where the process is not there (yet)."""
        if self._process is None:
            self._starting = self._starting or asyncio.create_task(self._start())
            return None
        try:
            return await self._exchange(self._process, msgspec.msgpack.encode(group))
        except (OSError, asyncio.IncompleteReadError):
            self._process = None
            wrong = "the writer process has ended; try again later"
            return Written([Answer([], StorageUnavailable.code, wrong)] * len(group))

    async def _start(self) -> None:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", self._code, stdin=pipe, stdout=pipe, start_new_session=True
            )
            if process.stdout and await process.stdout.read(1):  # it is ready
                self._process = process
        except OSError as error:
            log.error("the writer process does not start: %s", error)  # noqa: TRY400
        finally:
            self._starting = None

    async def _exchange(self, process: asyncio.subprocess.Process, message: bytes) -> Written:
        if not (process.stdin and process.stdout):
            raise BrokenPipeError
        process.stdin.writelines((len(message).to_bytes(4), message))
        async with self._turn:  # answers come in the order of the groups
            size = int.from_bytes(await process.stdout.readexactly(4))
            return WRITTEN.decode(await process.stdout.readexactly(size))

    async def close(self) -> None:
        if self._starting:
            await asyncio.wait([self._starting])
        if self._process and self._process.stdin:
            self._process.stdin.close()
            await self._process.wait()


GROUP = msgspec.msgpack.Decoder(list[Batch])
WRITTEN = msgspec.msgpack.Decoder(Written)


def write_forever(settings: Table) -> None:
    """Land the groups that come by standard input, until it ends: the process of `Writer`."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what stops a service is sent to all of it
    store = RawStore(msgspec.convert(settings, RawConfig, dec_hook=lambda kind, text: kind(text)))
    store.open_here()
    with contextlib.suppress(BrokenPipeError, msgspec.DecodeError):  # the server was killed
        _write_all(1, b"!")
        while size := sys.stdin.buffer.read(4):
            group = GROUP.decode(sys.stdin.buffer.read(int.from_bytes(size)))
            written = msgspec.msgpack.encode(store.write(group))
            _write_all(1, len(written).to_bytes(4) + written)
    store.close_here()


class RawStore(Folders):
    """The folders and the way into them: lands payloads, durably.

    Methods without `async` block on the disk and belong in a thread (`asyncio.to_thread`).
    """

    def __init__(self, config: RawConfig) -> None:
        super().__init__(config)
        self.config = config
        self._min_free = config.min_free_bytes
        self._log: Log | None = None
        self._full: list[Log] = []  # appended to no more, still to be checkpointed
        self._spare: list[Log] = []  # to be begun anew
        self._gathered: deque[tuple[Batch, asyncio.Future[Answer]]] = deque()
        self._landing: set[asyncio.Task[None]] = set()
        self._writer = Writer(config)
        self.metrics = Metrics(self.journal)

    async def open(self) -> None:
        """Create the folders that are missing, and recover what a crash has left in the journal.

        Raises `StorageUnavailable`.
        """
        self._thread = ThreadPoolExecutor(1, "landing")
        try:
            await self._in_thread(self.open_here)
        except OSError as error:
            raise StorageUnavailable(
                f"{error.filename}: {error.strerror}; let the user that runs Dropzone write there"
            ) from error
        self._sharing = asyncio.create_task(self.metrics.share_forever())

    def open_here(self) -> None:
        self._checkpointer = ThreadPoolExecutor(1, "checkpoint")
        self._file_writers = ThreadPoolExecutor(2, "files")
        self._checkpointing = self._checkpointer.submit(self._checkpoint, [])
        for folder in (self.raw, self.processed, self.rejected, self.journal):
            _make_folder(folder)
            if folder.stat().st_dev != self.raw.stat().st_dev:
                raise StorageUnavailable(f"{folder} must lie on the file system of {self.raw}")
        self._journal_fd = os.open(self.journal, os.O_RDONLY)  # held, it hears of every error
        self._counter = os.open(self.journal / "last_raw_id", os.O_RDWR | os.O_CREAT, 0o644)
        self.tally = self.open_tally()
        self._keys = sqlite3.connect(self.journal / "keys.sqlite", isolation_level=None)
        self._recover()

    async def close(self) -> None:
        """Wait until everything that was handed to `land` is on disk, then empty the journal."""
        while self._landing:
            await asyncio.wait(self._landing)
        await self._writer.close()
        self._sharing.cancel()
        await self._in_thread(self.metrics.close)
        await self._in_thread(self.close_here)
        self._thread.shutdown()

    def close_here(self) -> None:
        self._end_log()
        self._checkpointer.shutdown()  # waits for its end
        self._file_writers.shutdown()
        with contextlib.suppress(OSError):  # what it could not do, the next start does
            self._checkpoint(list(self._full))
        for kept in self._full:
            kept.close()
        for spare in self._spare:
            spare.remove()
        self.tally.close()
        os.close(self._counter)
        os.close(self._journal_fd)
        self._keys.close()

    async def _in_thread(self, call: Callable[..., T], *arguments: object) -> T:
        """Run a function in the thread of landing, which no other work can hold up."""
        result: T = await aiofiles.os.wrap(call)(*arguments, executor=self._thread)
        return result

    # Landing. Why no acknowledged payload can be lost: a group of payloads is landed in this order,
    #
    #   1. one record that holds the whole group is appended to the journal and synced;
    #   2. each payload is written under another name and renamed to `raw/<raw_id>.json`;
    #   3. the group is acknowledged.
    #
    # A power cut before the end of 1 takes a group that nobody was told of; the checksum gives the
    # torn record away. After a power cut behind 1, `_recover` does 2 again from the record. A log
    # is deleted, or begun anew, only by `_checkpoint`: after a sync of the whole file system that
    # began when no more was to be appended and 2 was done for all of it. So at any moment an
    # acknowledged payload lies in a synced record, or in a synced file, or in both. Of a log that
    # was begun anew, the old records have another epoch, and are never read again.
    #
    # Each store appends to logs of its own and holds a lock on them while it lives. Whoever opens
    # a store recovers the logs that nobody holds. raw_ids come from a counter that all share.

    async def land(self, bodies: Sequence[bytes], key: str | None = None) -> list[UUID]:
        """Store payloads durably, unchanged, all or none; return their new raw_ids, in order.

        If the Idempotency-Key `key` was used in the last 24 hours, return the raw_ids of that time
        and store nothing, or raise `KeyReused` if the bodies differ. Raises `StorageUnavailable`
        where the disk refuses: then none of them is acknowledged.
        """
        landed: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._gathered.append((Batch(list(bodies), key), landed))
        if len(self._landing) < (BATCHES if len(bodies) > 1 else 1):
            self._landing.add(asyncio.create_task(self._land_gathered()))
        return (await landed).result()

    async def _land_gathered(self) -> None:
        """Land whatever has gathered while the groups before were landed, until nothing has.

        A large group is half of all that wait, so that one half is received while the other is
        written; left alone, the groups would become ever more unequal, and each side wait.
        """
        group = list[Batch]()
        try:
            while self._gathered:
                half = max(LARGE_GROUP, (len(self._gathered) + len(group) + 1) // 2)
                group, waiting, size = [], [], 0
                while self._gathered and size < GROUP_BYTES and len(group) < half:
                    batch, landed = self._gathered.popleft()
                    group.append(batch)
                    waiting.append(landed)
                    size += sum(map(len, batch.bodies))
                begun = time.monotonic()
                written = await self._writer.write(group) if size >= WRITER_BYTES else None
                if written is None:
                    written = await self._in_thread(self.write, group)
                for landed, answer in zip(waiting, written.answers, strict=True):
                    if not landed.done():  # or else whoever waited has gone
                        landed.set_result(answer)
                self.metrics.landed(written, time.monotonic() - begun)
        finally:  # at once: whoever has just been answered and lands again begins another one
            self._landing.difference_update({asyncio.current_task()})

    def write(self, group: Sequence[Batch]) -> Written:
        """Land a group; see above."""
        try:
            self._check_room(sum(len(body) for batch in group for body in batch.bodies))
            keyed = any(batch.key for batch in group)
            # one store at a time lands keys, so that what one takes back is no other's
            with _locked(self._journal_fd) if keyed else contextlib.nullcontext():
                answers, record = self._assign(group)
                written = self._commit(record, answers) if record.payloads else Written(answers)
                with contextlib.suppress(OSError):  # it is on disk, whether counted or not
                    self.tally.add(landed=written.payloads)
        except Exception as error:  # noqa: BLE001 (whatever it was, no one may hear a 202)
            refusal = _storage_error(error)
            if isinstance(refusal, StorageFull):
                self._end_log()  # its checkpoint makes room
            written = Written([Answer([], refusal.code, refusal.detail)] * len(group))
        if self._full and self._checkpointing.done():
            logs = list(self._full)
            self._checkpointing = self._checkpointer.submit(self._checkpoint, logs, reuse=True)
        if len(self._full) > FULL_LOGS:
            wait([self._checkpointing])
        return written

    def _check_room(self, size: int) -> None:
        """Refuse before anything is written, so that what is acknowledged can be processed too."""
        if len(self._full) > FULL_LOGS:
            raise OSError(errno.EIO, "the checkpoint of the journal fails")
        free, reserve = self.room()
        if free < reserve + 2 * size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def room(self, at: Path | None = None) -> tuple[int, int]:
        """Return how many bytes are free, and how many have to stay so."""
        disk = os.statvfs(at or self.raw)
        reserve = min(self._min_free, disk.f_blocks * disk.f_frsize // 20)
        return disk.f_bavail * disk.f_frsize, reserve

    def _assign(self, group: Sequence[Batch]) -> tuple[list[Answer], Record]:
        """Return the answers to a group, and the record of what is to be stored for them."""
        answers: list[Answer] = []
        record = Record([], [])
        with self._counting() as next_id:
            for batch in group:
                use = self._use_of(batch.key, batch.bodies, next_id) if batch.key else None
                if use and use.digest != _digest(batch.bodies):
                    wrong = "this Idempotency-Key came with another body before"
                    answers.append(Answer([], KeyReused.code, wrong))
                    continue
                raw_ids = use.raw_ids if use else [next_id() for _ in batch.bodies]
                answers.append(Answer(raw_ids))
                if use and use.landed:
                    continue
                record.payloads.extend(zip(raw_ids, batch.bodies, strict=True))
                if use:
                    record.keys.append(use)
        return answers, record

    @contextlib.contextmanager
    def _counting(self) -> Iterator[Callable[[], UUID]]:
        """Give out raw_ids that are greater than those of every process before."""
        with _locked(self._counter):
            last = UUID(bytes=os.pread(self._counter, 16, 0))

            def next_id() -> UUID:
                nonlocal last
                last = next_raw_id(last)
                return last

            try:
                yield next_id
            finally:
                os.pwrite(self._counter, last.bytes, 0)

    def _use_of(self, key: str, bodies: Sequence[bytes], next_id: Callable[[], UUID]) -> KeyUse:
        """Return the use that a key has had, or note this one before it has landed.

        So every process sees it; and if it does not land, the next try lands under its raw_ids.
        """
        horizon = uuid_at(datetime.now(UTC) - KEY_LIFE).bytes
        if found := self._keys.execute(FIND_KEY, (key, horizon)).fetchone():
            digest, raw_ids, landed = found
            ids = [UUID(bytes=raw_ids[i : i + 16]) for i in range(0, len(raw_ids), 16)]
            return KeyUse(key, digest, ids, bool(landed))
        use = KeyUse(key, _digest(bodies), [next_id() for _ in bodies])
        self._note(use, landed=False)
        return use

    def _note(self, use: KeyUse, *, landed: bool) -> None:
        raw_ids = b"".join(raw_id.bytes for raw_id in use.raw_ids)
        self._keys.execute(NOTE_KEY, (use.key, use.digest, raw_ids, landed))

    def _commit(self, record: Record, answers: list[Answer]) -> Written:
        if self._log is None:
            self._log = self._spare.pop() if self._spare else Log.create(self.journal)
        size, begun = self._log.size, time.monotonic()
        try:
            self._log.append(record)
            sync_seconds = time.monotonic() - begun
        except OSError:  # the next sync would not tell: an error is reported once, the data dropped
            self._end_log(broken=True)
            raise
        try:
            self._write_files(record.payloads)
            for use in record.keys:
                self._note(use, landed=True)
        except Exception:
            self._take_back(record, size)
            raise
        if self._log.size >= LOG_BYTES:
            self._end_log()
        bodies = dict(record.payloads).values()  # one key may have come several times
        return Written(answers, len(bodies), sum(map(len, bodies)), sync_seconds)

    def _write_files(self, payloads: Sequence[tuple[UUID, bytes]]) -> None:
        if len(payloads) < MANY_FILES:
            for raw_id, body in payloads:
                self.publish(f"{self.raw}/{raw_id}.json", body)
            return
        parts = (payloads[n : n + MANY_FILES - 1] for n in range(0, len(payloads), MANY_FILES - 1))
        parts_done = [self._file_writers.submit(self._write_files, part) for part in parts]
        wait(parts_done)
        for done in parts_done:
            done.result()

    def _take_back(self, record: Record, size: int) -> None:
        """Undo a group of which not all could be written."""
        for raw_id, _ in record.payloads:
            with contextlib.suppress(OSError):
                os.unlink(f"{self.raw}/{raw_id}.json")
        for use in record.keys:
            with contextlib.suppress(sqlite3.Error):
                self._note(use, landed=False)
        try:
            if self._log:
                self._log.cut(size)
        except OSError:
            self._end_log(broken=True)

    def _end_log(self, *, broken: bool = False) -> None:
        if self._log:
            self._log.broken = broken
            self._full.append(self._log)
            self._log = None

    def _checkpoint(self, logs: Sequence[Log], *, reuse: bool = False) -> None:
        """Empty logs when all that they hold is on disk as files; the notes of their keys, too."""
        if not logs:
            return
        try:
            _sync_file_system(self._journal_fd)
        except OSError as error:  # what could not be written is forgotten: write it again
            log.error("the journal cannot be emptied: %s", error)  # noqa: TRY400
            for raw_id, body in itertools.chain.from_iterable(map(_payloads_in, logs)):
                self._restore(raw_id, body, force=True)
            raise
        for done in logs:
            if reuse and not done.broken:
                done.begin_anew()
                self._spare.append(done)
            else:
                done.remove()
            with contextlib.suppress(ValueError):  # of another store
                self._full.remove(done)

    def _recover(self) -> None:
        """Write again what is missing, torn or different, from the logs that nobody holds."""
        with _locked(self._counter):
            for statement in OPEN_KEYS:
                self._keys.execute(statement)
            counted = os.pread(self._counter, 16, 0)
            last = UUID(bytes=counted) if len(counted) == 16 else self._greatest_raw_id()
            logs = [log for log in map(Log, self.journal.glob("*.log")) if log.hold()]
            for raw_id, body in itertools.chain.from_iterable(map(_payloads_in, logs)):
                self._restore(raw_id, body)
                last = max(last, raw_id)
            for use in (use for log in logs for record in log.records() for use in record.keys):
                self._note(use, landed=True)
            self._keys.execute(DROP_KEYS, (uuid_at(datetime.now(UTC) - KEY_LIFE).bytes,))
            os.pwrite(self._counter, last.bytes, 0)
            self._checkpoint(logs)
            for left in (*self.journal.glob("*.part*"), *self.journal.glob("*.new")):
                with contextlib.suppress(FileNotFoundError):  # another store has just renamed it
                    if time.time() - left.stat().st_mtime > 3600:  # of a process that was killed
                        left.unlink()

    def _restore(self, raw_id: UUID, body: bytes, *, force: bool = False) -> None:
        for state in (*STATES, STATES[0]):  # it may move meanwhile
            path = self.path(raw_id, state)
            with contextlib.suppress(FileNotFoundError):
                if path.read_bytes() != body or force:
                    self.publish(path, body)
                return
        if not self.is_packed_or_expired(raw_id):
            self.publish(self.path(raw_id, "pending"), body)

    def _greatest_raw_id(self) -> UUID:
        names = os.listdir(self.raw) + os.listdir(self.rejected)
        days = sorted(filter(DAY_NAME.fullmatch, os.listdir(self.processed)), reverse=True)
        names += next(filter(None, (os.listdir(self.processed / day) for day in days)), [])
        return max(filter(arrival_of, filter(None, map(raw_id_of, names))), default=UUID(int=0))

    def trouble(self) -> str | None:
        """Try to write and sync; return what stands in the way of landing, or None."""
        for folder in (self.raw, self.journal):
            if not os.access(folder, os.W_OK | os.X_OK):
                return f"{folder} is not there or not writable"
        try:
            self._check_room(0)
            self.publish(self.journal / "probe", b"")
            _sync_file(self.journal)
        except OSError as error:
            return f"{self.journal}: {error.strerror}"
        return None


def _digest(bodies: Sequence[bytes]) -> bytes:
    return hashlib.sha256(b"\n".join(bodies)).digest()


def _payloads_in(log: Log) -> Iterator[tuple[UUID, bytes]]:
    for record in log.records():
        yield from record.payloads


@contextlib.contextmanager
def _locked(file: int) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _sync_file_system(descriptor: int) -> None:
    """Write all of a file system to the disk at once: much faster than file by file."""
    syncfs = getattr(ctypes.CDLL(None, use_errno=True), "syncfs", None)
    if syncfs is None:  # not Linux
        os.sync()
    elif syncfs(descriptor):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _sync_file(path: Path) -> None:
    """Write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    """Create a folder and its parents so that they survive a power cut too."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_file(folder.parent)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Raise `StorageUnavailable` where the disk refuses."""
    try:
        yield
    except OSError as error:
        raise _storage_error(error) from error


def _storage_error(error: Exception) -> StorageUnavailable:
    """Say what went wrong with the disk in words that an operator can act on."""
    log.error("the data folder failed", exc_info=error)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return StorageFull("the disk is full; try again later")
    reason = error.strerror if isinstance(error, OSError) else type(error).__name__
    return StorageUnavailable(f"the payload could not be stored ({reason}); try again later")


# ── Transform: a payload becomes a measurement (pure functions) ───────────────────────────────────

TIME_STAMP = re.compile(
    r"(?P<day>\d{4}-?(?:\d\d-?\d\d|W\d\d-?\d))"  # a calendar or week date
    r"(?:[T ](?P<hour>\d\d)"
    r"(?:(?P<colon>:?)(?P<minute>\d\d)(?:(?P=colon)(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?"
    r"(?P<offset>Z|[+-](?P<hours>[01]\d|2[0-3])(?::?(?P<minutes>[0-5]\d))?)?)?",
    re.ASCII | re.IGNORECASE,
)
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:Z|[+-]\d\d:[0-5]\d)", re.ASCII)
SHOWN = 60  # characters of a bad value that an error shows


class GoodPayload(Struct):
    """What a payload looks like in which nothing is wrong."""

    time_stamp: str
    data: list[float]


GOOD_PAYLOAD = msgspec.json.Decoder(GoodPayload)


def transform(raw_id: UUID, body: bytes) -> Measurement:
    """Return the measurement that a payload stands for, or raise `DataQualityError`.

    The payload is a JSON object with `time_stamp` (see `parse_time_stamp`) and `data`, an array of
    at least one finite number. Other members are left alone.
    """
    try:  # the way of nearly all, several times as fast as finding out what is wrong
        good = GOOD_PAYLOAD.decode(body)
        body.isascii() or body.decode()  # members that nobody asked for are not decoded
        if good.data:  # and finite: the decoder takes no others
            mean, std_dev = mean_and_std_dev(good.data)
            return Measurement(parse_time_stamp(good.time_stamp), mean, std_dev, raw_id)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        pass
    return _transform_carefully(raw_id, body)


def _transform_carefully(raw_id: UUID, body: bytes) -> Measurement:
    try:
        document = parse_json(body)
    except PayloadNotJson as error:
        raise DataQualityError(error.code, error.detail) from None
    if not isinstance(document, dict):
        raise DataQualityError(
            "payload_not_object", f"the payload is {_shown(document)}, no object"
        )
    if "time_stamp" not in document:
        raise DataQualityError("time_stamp_missing", "the payload has no time_stamp")
    timestamp_utc = parse_time_stamp(document["time_stamp"])
    if "data" not in document:
        raise DataQualityError("data_missing", "the payload has no data")
    mean, std_dev = mean_and_std_dev(_finite_values(document["data"]))
    return Measurement(timestamp_utc, mean, std_dev, raw_id)


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def parse_time_stamp(value: object) -> datetime:
    """Return the moment in UTC that a time stamp names (RFC 3339; ISO 8601 calendar or week date).

    Digits finer than a microsecond are cut off. 24:00 is the midnight that ends its day, and a leap
    second (23:59:60 UTC) counts as the second after it, as in POSIX time and in PostgreSQL.
    """
    if quick := _quick_time_stamp(value):
        return quick
    match = TIME_STAMP.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        hint = "not an ISO 8601 date and time such as 2019-05-01T06:00:00-04:00"
        raise DataQualityError("time_stamp_invalid", f"time_stamp is {_shown(value)}: {hint}")
    if not match["offset"]:
        hint = "add Z or an offset such as -04:00"
        raise DataQualityError(
            "time_stamp_without_offset", f"time_stamp is {_shown(value)}: {hint}"
        )
    try:
        day = datetime.fromisoformat(match["day"].upper()).replace(tzinfo=UTC)
        moment = day + (_time_of_day(match) - _offset(match))
        if match["second"] == "60" and (moment.hour, moment.minute) != (0, 0):
            raise ValueError("a leap second is 23:59:60 in UTC")
    except (OverflowError, ValueError) as error:
        code, hint = "time_stamp_invalid", str(error)
        if isinstance(error, OverflowError) or match["day"].startswith("0000"):
            code, hint = "time_stamp_out_of_range", "outside the years 1 to 9999 in UTC"
        raise DataQualityError(code, f"time_stamp is {_shown(value)}: {hint}") from None
    return moment


def _quick_time_stamp(value: object) -> datetime | None:
    """Read the form that nearly all devices send, and leave every other to the careful way."""
    if isinstance(value, str) and RFC3339.fullmatch(value):
        with contextlib.suppress(ValueError, OverflowError):
            moment = datetime.fromisoformat(value)
            return moment.astimezone(UTC) if moment.tzinfo else None
    return None


def _time_of_day(match: re.Match[str]) -> timedelta:
    hour, minute, second = (int(match[name] or 0) for name in ("hour", "minute", "second"))
    fraction = match["fraction"] or ""
    day_ends = hour == 24 and not (minute or second or fraction.strip("0"))
    if not (hour < 24 or day_ends) or minute > 59 or second > 60:
        raise ValueError("there is no such time of day")
    microsecond = int(fraction[:6].ljust(6, "0"))
    return timedelta(hours=hour, minutes=minute, seconds=second, microseconds=microsecond)


def _offset(match: re.Match[str]) -> timedelta:
    offset = timedelta(hours=int(match["hours"] or 0), minutes=int(match["minutes"] or 0))
    return -offset if match["offset"].startswith("-") else offset


def _finite_values(data: object) -> list[float]:
    if not isinstance(data, list):
        raise DataQualityError("data_not_array", f"data is {_shown(data)}, no array of numbers")
    if not data:
        raise DataQualityError("data_empty", "data is empty: a mean needs at least one number")
    try:
        if set(map(type, data)) <= {float, int}:
            values = list(map(float, data))
            if all(map(math.isfinite, values)):
                return values
    except OverflowError:  # an integer beyond a double
        pass
    raise _bad_value(data)


def _bad_value(data: list[Any]) -> DataQualityError:
    """Name the first value that is no number; if all are numbers, the first that is not finite."""
    for index, value in enumerate(data):
        if type(value) not in (float, int):
            wrong = f"data[{index}] is {_shown(value)}, no number"
            return DataQualityError("value_not_numeric", wrong)
    index = next(i for i, value in enumerate(data) if not abs(value) <= sys.float_info.max)
    wrong = f"data[{index}] is {_shown(data[index])}, no finite double"
    return DataQualityError("value_not_finite", wrong)


def mean_and_std_dev(values: Sequence[float]) -> tuple[float, float]:
    """Return the arithmetic mean and the population standard deviation of finite values.

    Two passes with exact sums: the mean is within 1 ulp, the deviation within a few. The rounding
    error of the mean is the mean of the deviations from it, and is taken out of them again (the
    corrected two-pass algorithm: Chan, Golub, LeVeque, 1983); `math.dist` scales, so that squares
    neither overflow nor vanish. Where sums leave the range of a double, exact fractions take over.
    """
    count = len(values)
    try:
        mean = math.fsum(values) / count
        deviations = list(map(operator.sub, values, itertools.repeat(mean)))
        residual = math.fsum(deviations) / count
        std_dev = math.dist(deviations, itertools.repeat(residual, count)) / math.sqrt(count)
        if math.isfinite(std_dev):
            return mean, std_dev
    except OverflowError:  # of fsum, near 1e308
        pass
    return statistics.mean(values), statistics.pstdev(values)


# ── Processing: pending payloads become rows ──────────────────────────────────────────────────────

LOCK_PATIENCE = 10.0  # seconds that a second processor waits for the first
LONGEST_PAUSE = 60.0  # seconds between two tries while the backend is away
REJECTIONS_SHOWN = 1000
LOOK_PATIENCE = 0.5  # seconds after which what was found before does
LOOK_PAUSE = 200  # times as long as a look took, before the next
WORKERS = min(4, os.cpu_count() or 1)
NICE = 10  # by which processing leaves the processor to landing
SHORT = 0.5  # seconds of work that are not worth the start of processes
PORTION_BYTES = 64 * 1024 * 1024  # that are read for one upsert, however few payloads that is


class Judged(Struct, frozen=True, array_like=True):
    """What became of the first `checked` payloads of a batch."""

    rows: list[Measurement]
    rejected: list[Rejection]
    checked: int


JUDGED = msgspec.msgpack.Decoder(Judged)


def judge(read: Callable[[UUID], bytes | None], raw_ids: Sequence[UUID | str]) -> bytes:
    """Transform payloads, one in memory at a time; return `Judged` as MessagePack."""
    rows, rejected, size, checked = list[Measurement](), list[Rejection](), 0, 0
    for raw_id in (UUID(str(raw_id)) for raw_id in raw_ids):
        checked += 1
        try:
            if (body := read(raw_id)) is not None:
                size += len(body)
                rows.append(transform(raw_id, body))
        except DataQualityError as error:
            rejected.append(Rejection(raw_id, error.code, error.detail, datetime.now(UTC)))
        if size >= PORTION_BYTES:
            break
    return msgspec.msgpack.encode(Judged(rows, rejected, checked))


class Workers:
    """Processes for work that would hold up this one. The first call starts them."""

    def __init__(self, count: int = WORKERS) -> None:
        self._count = count
        self._pool: ProcessPoolExecutor | None = None

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        """Call a function of this module in one of them; raises what it raises."""
        spawn = multiprocessing.get_context("spawn")
        self._pool = self._pool or ProcessPoolExecutor(self._count, spawn, _begin_worker)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
        except BrokenProcessPool:
            self._pool = None
            raise StorageUnavailable("a process of this service has ended; try again") from None

    def begin(self) -> asyncio.Future[Any]:
        """Start the processes, and return what is done when they are ready."""
        begun = asyncio.gather(*(self.run(os.getpid) for _ in range(self._count)))
        begun.add_done_callback(lambda done: done.cancelled() or done.exception())  # else logged
        return begun

    async def spread(self, items: Iterator[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Do some work for each item, one more at a time than there are processes.

        After an error no other item is begun; it is raised when those under way are done with.
        """
        turn, stopped = asyncio.Lock(), False

        async def lane() -> None:
            nonlocal stopped
            try:
                while not stopped:
                    async with turn:
                        item = await asyncio.to_thread(next, items, None)
                    if item is None:
                        break
                    await work(item)
            except BaseException:
                stopped = True
                raise

        lanes = (lane() for _ in range(self._count + 1))
        for error in await asyncio.gather(*lanes, return_exceptions=True):
            if error:
                raise error

    async def close(self) -> None:
        pool, self._pool = self._pool, None
        if pool:
            await asyncio.to_thread(pool.shutdown, cancel_futures=True)


def _begin_worker() -> None:
    """Let landing go first, and end with the process that started this one, however it ends."""
    os.nice(NICE)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is for the other, who closes this one
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


class ProcessResult(Struct):
    """What one run did: `checked` = `processed` + `failed` payloads; `remaining` are pending.

    `rejected` holds the first 1,000 that failed; `GET /rejected` lists all.
    """

    processed: int = 0
    failed: int = 0
    checked: int = 0
    remaining: int = 0
    rejected: list[Rejection] = []


class Processor:
    """Turns pending payloads into rows of the backend, one processor at a time per data folder.

    Payloads are read, computed and moved in a thread; where that takes longer, by processes, once
    they have started, several batches at a time. The order of the upserts does not matter: the
    greatest raw_id stands.
    """

    def __init__(self, config: Config, backend: Backend, metrics: Metrics | None = None) -> None:
        self._folders = Folders(config.raw)
        self._backend = backend
        self._batch = config.process.batch
        self._workers = Workers()
        self._metrics = metrics or Metrics(self._folders.journal)

    async def process(
        self, limit: int | None = None, progress: Callable[[int, int], object] = max
    ) -> ProcessResult:
        """Process what is pending now, the earliest arrival first, `limit` payloads at most.

        `progress` is called after each batch with how many payloads are done, and of how many.

        Raises `BackendUnavailable`: what is not in the backend by then is still pending, and
        `ProcessorBusy` when another processor keeps the data folder for longer than 10 s.
        """
        result = ProcessResult()

        async def in_processes(batch: list[str]) -> None:
            await self._process_batch(self._workers.run, batch, result)
            progress(result.checked, todo)

        async with self._alone():
            window, pending = await asyncio.to_thread(self._window, limit)
            todo = pending if limit is None else min(limit, pending)
            batches, short = self._batches(window, todo), time.monotonic() + SHORT
            ready: asyncio.Future[Any] | None = None
            while time.monotonic() < short or (ready and not ready.done()):
                if (batch := await asyncio.to_thread(next, batches, None)) is None:
                    break
                await self._process_batch(asyncio.to_thread, batch, result)
                progress(result.checked, todo)
                if ready is None and time.monotonic() >= short:
                    ready = self._workers.begin()
            if ready and not ready.cancel():  # it is done, if only with an error
                ready.result()
            await self._workers.spread(batches, in_processes)
            result.remaining = await asyncio.to_thread(self._folders.count_pending)
        if result.checked:
            counts = (result.processed, result.failed, result.remaining)
            log.info("processed %d, rejected %d, %d pending", *counts)
        return result

    async def process_forever(self, every: float) -> NoReturn:
        """Process again and again, `every` seconds; while something is away, ever more rarely."""
        pause = every
        while True:
            try:
                await self.process()
                pause = every
            except ProcessorBusy:
                pause = every  # whoever is at work does it
            except Exception as error:  # nobody else would begin it again
                pause = min(max(2 * pause, 1.0), LONGEST_PAUSE)
                defect = None if isinstance(error, BackendError | DropzoneError) else error
                again = "processing stopped, next try within %.0f s: %s"
                log.warning(again, pause, error, exc_info=defect)
            await asyncio.sleep(pause * uniform(0.5, 1))  # noqa: S311 (not all of them at once)

    async def close(self) -> None:
        await self._workers.close()

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        try:
            async with AsyncFileLock(self._folders.lock_file, timeout=LOCK_PATIENCE):
                yield
        except Timeout:
            raise ProcessorBusy(
                "another processor is at work on this data folder; try again"
            ) from None
        except OSError as error:  # of the data folder
            raise _storage_error(error) from error

    def _window(self, limit: int | None, after: str = "") -> tuple[list[str], int]:
        most = WINDOW if limit is None else min(WINDOW, limit)
        return earliest_names(self._folders.raw, most, after)

    def _batches(self, window: list[str], todo: int) -> Iterator[list[str]]:
        while window:
            yield from (window[n : n + self._batch] for n in range(0, len(window), self._batch))
            todo -= len(window)
            window, _ = self._window(todo, window[-1]) if todo > 0 else ([], 0)

    async def _process_batch(
        self, run: Callable[..., Awaitable[Any]], batch: Sequence[str], result: ProcessResult
    ) -> None:
        """Read, transform, upsert and move; large payloads in several portions."""
        while batch:
            judged = JUDGED.decode(await run(judge, self._folders.read_pending, batch))
            rejected = judged.rejected
            rejected += await self._upsert(judged.rows) if judged.rows else []
            refused = {rejection.raw_id for rejection in rejected}
            stored = [str(row.raw_id) for row in judged.rows if row.raw_id not in refused]
            rejected = await run(self._folders.settle, stored, rejected)
            self._metrics.processed.inc(len(stored))
            for rejection in rejected:
                self._metrics.rejected.labels(rejection.code).inc()
            result.processed += len(stored)
            result.failed += len(rejected)
            result.checked = result.processed + result.failed
            result.rejected += rejected[: REJECTIONS_SHOWN - len(result.rejected)]
            batch = batch[judged.checked :]

    async def _upsert(self, rows: Sequence[Measurement]) -> list[Rejection]:
        """Upsert rows; return those that the backend itself refuses, found by halving."""
        try:
            await self._backend.upsert(rows)
        except BackendUnavailable:
            raise
        except BackendError as error:
            if len(rows) > 1:
                half = len(rows) // 2
                return await self._upsert(rows[:half]) + await self._upsert(rows[half:])
            [row] = rows
            return [Rejection(row.raw_id, "backend_refused", str(error), datetime.now(UTC))]
        return []


class Measured:
    """A backend whose calls are timed and whose errors are counted."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._backend, name)
        if not inspect.iscoroutinefunction(call):
            return call

        @functools.wraps(call)
        async def measured(*arguments: Any, **named: Any) -> Any:
            with self._metrics.backend.labels(name).time():
                try:
                    return await call(*arguments, **named)
                except MeasurementNotFound:
                    raise
                except Exception:
                    self._metrics.backend_errors.labels(name).inc()
                    raise

        return measured


def measured(backend: Backend, metrics: Metrics) -> Backend:
    return cast("Backend", Measured(backend, metrics))


class Lately(Generic[T]):
    """What was found in a folder lately.

    It is looked for again when something came into the folder or left it, but not for more than
    a 200th of the time: of 100,000 files the answer may be half a minute old, of 1,000 it is new.
    Whoever asks waits for half a second at most, and gets what was found before, if anything was.
    """

    def __init__(self, folder: Path, find: Callable[[], T], nothing: T) -> None:
        self._folder, self._find, self._found = folder, find, nothing
        self._changed, self._due = 0, 0.0
        self._looking: asyncio.Future[None] | None = None

    async def look(self) -> T:
        """Return what was found; raises `StorageUnavailable`."""
        with disk_errors():
            changed = (await aiofiles.os.stat(self._folder)).st_mtime_ns
            if self._looking is None and changed != self._changed and time.monotonic() >= self._due:
                self._looking = asyncio.ensure_future(asyncio.to_thread(self._look, changed))
            if looking := self._looking:
                patience = LOOK_PATIENCE if self._due else None
                done, _ = await asyncio.wait([looking], timeout=patience)
                if done and looking is self._looking:
                    self._looking = None
                if done:
                    looking.result()
        return self._found

    def _look(self, changed: int) -> None:
        begun = time.monotonic()
        self._found = self._find()
        ended = time.monotonic()
        self._due = ended + LOOK_PAUSE * (ended - begun)
        settled = time.time_ns() - changed > 1_000_000_000  # or else more may bear the same time
        self._changed = changed if settled else 0


class Backlog:
    """How many payloads are pending, and for how many seconds the oldest has been; see `Lately`."""

    def __init__(self, folders: Folders) -> None:
        nothing: tuple[list[str], int] = ([], 0)
        self._lately = Lately(folders.raw, lambda: earliest_names(folders.raw, 1), nothing)

    async def look(self) -> tuple[int, float | None]:
        """Return both, None where nothing is pending; raises `StorageUnavailable`."""
        names, count = await self._lately.look()
        arrival = arrival_of(UUID(names[0])) if names else None
        return count, max(0.0, time.time() - arrival.timestamp()) if arrival else None


class Codes(Lately[dict[str, int]]):
    """How many payloads are rejected, by code."""

    def __init__(self, folders: Folders) -> None:
        count = lambda: Counter(rejection.code for rejection in folders.rejections())  # noqa: E731
        super().__init__(folders.rejected, count, {})


# ── Proof: the rows against the payloads that they name ───────────────────────────────────────────


class Finding(Struct, frozen=True):
    """A row that is not what the payloads say, and what it should be (None: nothing).

    `missing`: payloads make a row, and there is none. `differing`: the row is not what the payload
    that it names makes. `superseded`: a later payload should have won. `orphaned`: the payload that
    the row names is not there.
    """

    kind: Literal["missing", "differing", "superseded", "orphaned"]
    row: Measurement | None
    right: Measurement | None


def derive(folders: Folders, portion: Portion) -> bytes:
    """Make the rows of a portion of payloads; see `judge`."""
    if isinstance(portion, tuple):
        pack, number = portion
        bodies = pack.member(number)
        return judge(bodies.get, list(bodies))
    return judge(folders.find, portion)


class Proof:
    """Derives the table again from all that is processed, and compares it with the backend's.

    What is derived is kept beside the journal until the comparison is done, so that a run that is
    stopped goes on, within a day, with the folders and packs that it had not finished, and with
    those to which payloads were added since.
    """

    def __init__(self, config: Config, backend: Backend) -> None:
        self._folders = Folders(config.raw)
        self._backend = backend
        self._workers = Workers()
        self._scratch = self._folders.journal / "derived"

    async def findings(
        self,
        since: datetime | None = None,
        until: datetime | None = None,
        progress: Callable[[int], object] = abs,
    ) -> AsyncIterator[Finding]:
        """Yield what is wrong with the rows of `since <= timestamp_utc < until`, by timestamp.

        Landing and processing may go on meanwhile. `progress` hears how many payloads more were
        read. Raises `BackendError`, `StorageUnavailable`.
        """
        derived = create_backend("sqlite", path=self._scratch / "rows.sqlite")
        try:
            await self._derive(derived, progress)
            async for right, row in differences(derived, self._backend, since, until):
                if finding := await asyncio.to_thread(self._finding, right, row):
                    yield finding
        finally:
            await derived.close()
            await self._workers.close()
        shutil.rmtree(self._scratch)

    async def rebuild(
        self,
        since: datetime | None = None,
        until: datetime | None = None,
        progress: Callable[[int], object] = abs,
    ) -> AsyncIterator[Finding]:
        """Do the same, and set the rows right, a thousand at a time.

        Where rows had to be deleted it looks again: a payload that was processed just before may
        have lost against such a row.
        """
        found, deleted = list[Finding](), True
        while deleted:
            deleted = False
            async for finding in self.findings(since, until, progress):
                yield finding
                found.append(finding)
                if len(found) == PORTION:
                    deleted |= await self._set_right(found)
                    found = []
            deleted |= await self._set_right(found)
            found = []

    async def _set_right(self, findings: Sequence[Finding]) -> bool:
        """Upsert the right rows; delete first those that would win against them, if any."""
        pairs = [(finding.row, finding.right) for finding in findings]
        wrong = [row for row, right in pairs if row and not (right and right.raw_id >= row.raw_id)]
        await self._backend.delete(wrong)
        await self._backend.upsert([right for _, right in pairs if right])
        return bool(wrong)

    async def _derive(self, derived: Backend, progress: Callable[[int], object]) -> None:
        done = self._scratch / "done"

        async def derive_portion(portion: Portion) -> None:
            left: Portion | None = portion
            while left:
                judged = JUDGED.decode(await self._workers.run(derive, self._folders, left))
                await derived.upsert(judged.rows)
                progress(judged.checked)
                left = left[judged.checked :] if isinstance(left, list) else None

        if not done.exists() or time.time() - done.stat().st_mtime > 86_400:
            await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)
        await derived.open()
        finished = set(done.read_text().splitlines()) if done.exists() else set()
        if finished:
            log.warning("going on with a run that was stopped; to begin anew, delete %s", done)
        for name, portions in self._folders.sources():
            if name not in finished:
                await self._workers.spread(portions, derive_portion)
                with done.open("a") as file:
                    file.write(f"{name}\n")

    def _finding(self, right: Measurement | None, row: Measurement | None) -> Finding | None:
        if row is None:
            return Finding("missing", None, right)
        body = self._folders.find(row.raw_id)
        try:
            own = None if body is None else transform(row.raw_id, body)
        except DataQualityError:
            own = None
        expired = body is None and self._folders.is_expired(day_of(row.raw_id))
        makes = own if own and own.timestamp_utc == row.timestamp_utc else None
        if expired:
            makes = row  # there is nothing to prove it with, or wrong
        best = max(filter(None, (makes, right)), key=lambda each: each.raw_id, default=None)
        if body is None and not expired:
            return Finding("orphaned", row, best)
        if makes is None or not same(makes, row):
            return Finding("differing", row, best)
        return Finding("superseded", row, best) if best is not makes else None


# ── HTTP: what travels ────────────────────────────────────────────────────────────────────────────


class Health(Struct, frozen=True):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Readiness(Struct, frozen=True):
    """Whether payloads can be landed; each check is `ok` or says what is wrong."""

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]


class Accepted(Struct, frozen=True):
    """The payload is on disk under this raw_id."""

    raw_id: UUID
    status: Literal["accepted"] = "accepted"


class AcceptedBatch(Struct, frozen=True):
    """The lines of an NDJSON body are on disk, each as a payload of its own, in this order."""

    raw_ids: list[UUID]
    status: Literal["accepted"] = "accepted"


class Status(Struct, frozen=True):
    """What there is to see at a glance; see `Lately` for how old a count may be.

    `landed` has how many payloads landed in each of the last 60 minutes, this one last; `processed`
    how many there were ever; `rejected` those of now, by code. Below `reserve_bytes` of
    `free_bytes` payloads are refused. `backend` is `ok` or says what is wrong.
    """

    now: datetime
    landed: list[int]
    last_landed: datetime | None
    pending: int
    oldest_pending_seconds: float | None
    processed: int
    rejected: dict[str, int]
    free_bytes: int
    reserve_bytes: int
    backend: str


class Summary(Struct, frozen=True):
    """What each span of a range of time holds, in order; those without a row are left out."""

    buckets: list[Bucket]


class MeasurementPage(Struct, frozen=True):
    """Measurements in order; `next` is the `after` of the page behind this one, if there is one."""

    measurements: list[Measurement]
    next: datetime | None


class RejectionPage(Struct, frozen=True):
    """Rejected payloads in order of arrival; `next` is the `after` of the page behind this one.

    `codes` counts all that were rejected in the time asked for, `total` those of the code, too.
    """

    rejected: list[Rejection]
    total: int
    codes: dict[str, int]
    next: UUID | None


class Retried(Struct, frozen=True):
    """How many rejected payloads were put back to pending."""

    retried: int


class Receipt(Struct, frozen=True):
    """Where a payload is and what became of it.

    `received_at` is read from the raw_id. A processed payload has its `measurement`, or the
    `superseded_by` of a later payload for the same timestamp. `rejection` is the last one, also of
    a payload that was put back since.
    """

    raw_id: UUID
    state: State
    received_at: datetime | None
    bytes: int
    sha256: str
    measurement: Measurement | None = None
    superseded_by: UUID | None = None
    rejection: Rejection | None = None


class Problem(Struct, frozen=True):
    """An RFC 9457 problem document; `code` is stable, `detail` is for people."""

    title: str
    status: int
    detail: str
    code: str
    request_id: str
    type: str = "about:blank"


class ProcessQuery(Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, description="Process this many payloads at most.")] | None = (
        None
    )


PageSize = Annotated[int, Meta(ge=1, le=10_000, description="Return this many at most.")]


class MeasurementsQuery(Struct, frozen=True):
    since: Annotated[datetime, Meta(tz=True, description="From this moment on.")] | None = None
    until: Annotated[datetime, Meta(tz=True, description="Before this moment.")] | None = None
    after: Annotated[datetime, Meta(tz=True, description="The `next` of a page.")] | None = None
    limit: PageSize = 1000
    order: Annotated[Literal["asc", "desc"], Meta(description="By timestamp.")] = "asc"
    format: Annotated[Literal["json", "csv"], Meta(description="Goes before Accept.")] | None = None


class SummaryQuery(Struct, frozen=True):
    since: Annotated[datetime, Meta(tz=True, description="From this moment on.")] | None = None
    until: Annotated[datetime, Meta(tz=True, description="Before this moment.")] | None = None
    buckets: Annotated[int, Meta(ge=1, le=2000, description="Spans of equal length.")] = 500


class RetryQuery(Struct, frozen=True):
    code: Annotated[str, Meta(description="Rejected with this code.")] | None = None
    since: Annotated[datetime, Meta(tz=True, description="Rejected from then on.")] | None = None
    until: Annotated[datetime, Meta(tz=True, description="Rejected before then.")] | None = None
    raw_id: Annotated[UUID, Meta(description="This payload.")] | None = None

    def fits(self, rejection: Rejection) -> bool:
        return self.in_time(rejection) and self.code in (None, rejection.code)

    def in_time(self, rejection: Rejection) -> bool:
        at = rejection.rejected_at
        late = self.since is None or at >= self.since
        return late and (self.until is None or at < self.until)


class RejectedQuery(RetryQuery, frozen=True):
    after: Annotated[UUID, Meta(description="The `next` of a page.")] | None = None
    limit: PageSize = 1000


# ── HTTP: routes ──────────────────────────────────────────────────────────────────────────────────

Handler = Callable[..., Any]  # takes the request, and its query where there is one

CONFIG = web.AppKey("CONFIG", Config)
RAW = web.AppKey("RAW", RawStore)
BACKEND = web.AppKey("BACKEND", Backend)
PROCESSOR = web.AppKey("PROCESSOR", Processor)
BACKLOG = web.AppKey("BACKLOG", Backlog)
CODES = web.AppKey("CODES", Codes)
METRICS = web.AppKey("METRICS", Metrics)
CHECKER = web.AppKey("CHECKER", Workers)
PREFIX = web.AppKey("PREFIX", str)  # under which an outer application has mounted this one
REQUEST_ID = web.RequestKey("REQUEST_ID", str)
CALLER = web.RequestKey("CALLER", str)  # the name of the key or token; not set where none is needed
LANDED = web.RequestKey("LANDED", list[UUID])
LIMITERS = web.AppKey("LIMITERS", dict[str, BaseRateLimiter])
RATE_HEADERS = web.RequestKey("RATE_HEADERS", dict[str, str])
PING_PATIENCE = 3.0  # seconds


ROUTES: list[Route] = []
NDJSON = ("application/x-ndjson", "application/ndjson", "application/jsonl")
BATCH = 10_000  # lines of one NDJSON body


@dataclass
class Route:
    """Makes the handler that it decorates a route: registers, guards and describes it.

    The one place for all three, so that none can drift from the others.
    """

    method: Literal["GET", "POST"]
    path: str
    scope: Scope | None  # None: no key is needed
    answers: dict[int, tuple[type | str, ...]]  # the types (as JSON) or media types of each status
    problems: tuple[int, ...] = ()  # besides those of every route with a scope or a query
    query: type[Struct] | None = None  # the checked query is the handler's second argument
    handler: Handler = field(init=False)

    def __call__(self, handler: Handler) -> Handler:
        self.handler = handler
        ROUTES.append(self)
        return handler

    async def handle(self, request: web.Request) -> Any:
        """Answer a request, behind the guard and the check of the query."""
        if self.scope:
            admit(request, "address", network_of(request.remote or ""))  # also who guesses keys
            await authorize(request, self.scope)
            admit(request, "key", request.get(CALLER, ""))
        if self.query:
            return await self.handler(request, query_in(request, self.query))
        return await self.handler(request)


@Route("GET", "/health", None, {200: (Health,)})
async def health(_: web.Request) -> web.Response:
    """Say that the process lives."""
    return answer(Health())


@Route("GET", "/ready", None, {200: (Readiness,), 503: (Readiness,)})
async def ready(request: web.Request) -> web.Response:
    """Say whether payloads can be landed; the backend is shown, but landing does not need it."""
    raw = await asyncio.to_thread(request.app[RAW].trouble)
    checks = {"raw": raw or "ok", "backend": await trouble_of(request.app[BACKEND]) or "ok"}
    return answer(Readiness("unavailable" if raw else "ok", checks), 503 if raw else 200)


@Route("GET", "/status", "read", {200: (Status,)}, (503,))
async def status(request: web.Request) -> web.Response:
    """Say what landed lately, what waits, and what is wrong: cheap enough to ask every second."""
    app, raw = request.app, request.app[RAW]
    with disk_errors():
        processed, last, landed = await asyncio.to_thread(raw.tally.read)
        free, reserve = await asyncio.to_thread(raw.room)
    pending, oldest = await app[BACKLOG].look()
    codes = await app[CODES].look()
    arrival, now = datetime.fromtimestamp(last / 1000, UTC) if last else None, datetime.now(UTC)
    backend = await trouble_of(app[BACKEND]) or "ok"
    figures = (landed, arrival, pending, oldest, processed, codes, free, reserve)
    return answer(Status(now, *figures, backend))


async def trouble_of(backend: Backend) -> str | None:
    """Return why a backend does not answer, None if it does."""
    try:
        async with asyncio.timeout(PING_PATIENCE):
            await backend.open()
            await backend.ping()
    except TimeoutError:
        return f"no answer within {PING_PATIENCE} s"
    except BackendError as error:
        return str(error)
    return None


@Route(
    "POST", "/ingest", "ingest", {202: (Accepted, AcceptedBatch)}, (400, 408, 413, 415, 422, 503)
)
async def ingest(request: web.Request) -> web.Response:
    """Land any JSON document, stored as it is; of NDJSON each line, all or none."""
    app = request.app
    with app[ADMISSION].admitted(app[CONFIG].server.max_body_bytes) as take:
        body = await read_body(request, take)
        key = idempotency_key(request)
        if request.content_type in NDJSON:
            lines = await payloads_of(app, lines_of, body)
            request[LANDED] = await app[RAW].land(lines, key)
            return answer(AcceptedBatch(request[LANDED]), 202)
        document = await payloads_of(app, document_of, body)
        request[LANDED] = [raw_id] = await app[RAW].land(document, key)
    return answer(Accepted(raw_id), 202, {"Location": f"{app[PREFIX]}/raw/{raw_id}"})


async def payloads_of(
    app: web.Application, split: Callable[..., list[bytes]], body: bytes
) -> list[bytes]:
    """Split a body; one that has to be parsed to be judged, and is large, in another process."""
    try:
        if len(body) <= LARGE_JSON:
            return split(body)
        return await asyncio.to_thread(split, body, patient=False)
    except REFUSED:
        return await app[CHECKER].run(split, body)


def document_of(body: bytes, *, patient: bool = True) -> list[bytes]:
    """Return the one document that a body is."""
    check_json(body, patient=patient)
    return [body]


def lines_of(body: bytes, *, patient: bool = True) -> list[bytes]:
    """Return the documents of NDJSON, one of each line that has one."""
    found = documents(io.BytesIO(body), len(body), patient=patient)
    lines = list(itertools.islice(found, BATCH + 1))
    if not lines:
        raise PayloadNotJson("no line has a document")
    if len(lines) > BATCH:
        raise too_large(BATCH, "lines")
    return lines


def documents(lines: Iterable[bytes], limit: int, *, patient: bool = True) -> Iterator[bytes]:
    """Yield the JSON document of each line that has one; an error names the line."""
    for number, line in enumerate(lines, 1):
        document = line.rstrip(b"\r\n")
        if len(document) > limit:
            raise too_large(limit)
        try:
            if document.strip():
                check_json(document, patient=patient)
                yield document
        except PayloadNotJson as error:
            raise PayloadNotJson(f"line {number}: {error}", line=number) from None


def idempotency_key(request: web.Request) -> str | None:
    """Return the Idempotency-Key (IETF draft idempotency-key-header-07), if there is one."""
    key = request.headers.get("Idempotency-Key")
    if key is not None and not (0 < len(key) <= 255 and key.isascii() and key.isprintable()):
        wrong = "the Idempotency-Key must have 1 to 255 printable ASCII characters"
        raise DropzoneError(wrong, "header_invalid", 400)
    return key


@Route("POST", "/process", "process", {200: (ProcessResult,)}, (503,), ProcessQuery)
async def process(request: web.Request, query: ProcessQuery) -> web.Response:
    """Turn the pending payloads into measurements."""
    with audited("process", **cause_of(request)) as facts:
        result = await request.app[PROCESSOR].process(query.limit)
        facts.update(processed=result.processed, failed=result.failed)
    return answer(result)


@Route(
    "GET", "/measurements", "read", {200: (MeasurementPage, "text/csv")}, (503,), MeasurementsQuery
)
async def measurements(request: web.Request, query: MeasurementsQuery) -> web.Response:
    """List measurements by timestamp, as JSON or CSV (RFC 4180); `Link` leads to the next page."""
    rows = await request.app[BACKEND].find(
        since=query.since,
        until=query.until,
        after=query.after,
        limit=query.limit + 1,
        descending=query.order == "desc",
    )
    rows, more = rows[: query.limit], len(rows) > query.limit
    page = MeasurementPage(rows, rows[-1].timestamp_utc if more else None)
    headers = {"Vary": "Accept"}
    if more:
        following = request.rel_url.update_query(after=msgspec.to_builtins(page)["next"])
        headers["Link"] = f'<{following}>; rel="next"'
    accept = request.headers.get("Accept", "")
    wants_csv = "text/csv" in accept and "application/json" not in accept
    if query.format == "csv" or (query.format is None and wants_csv):
        return web.Response(text=as_csv(rows), content_type="text/csv", headers=headers)
    return answer(page, headers=headers)


def as_csv(rows: Sequence[Measurement]) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(Measurement.__struct_fields__)
    writer.writerows(msgspec.to_builtins(row).values() for row in rows)
    return text.getvalue()


@Route("GET", "/measurements/summary", "read", {200: (Summary,)}, (503,), SummaryQuery)
async def summary(request: web.Request, query: SummaryQuery) -> web.Response:
    """Summarize the measurements of a range of time in spans of equal length, for a chart."""
    begun = time.perf_counter()
    found = await request.app[BACKEND].summarize(
        since=query.since, until=query.until, buckets=query.buckets
    )
    took = 1000 * (time.perf_counter() - begun)  # by which the page spares the backend
    return answer(Summary(found), headers={"Server-Timing": f"backend;dur={took:.1f}"})


@Route("GET", "/measurements/{timestamp}", "read", {200: (Measurement,)}, (400, 404, 503))
async def measurement(request: web.Request) -> web.Response:
    """Return the measurement at one timestamp."""
    timestamp = moment_in("timestamp", request.match_info["timestamp"])
    return answer(await request.app[BACKEND].get(timestamp))


@Route("GET", "/raw/{raw_id}", "read", {200: (Receipt,)}, (404, 503))
async def receipt(request: web.Request) -> web.Response:
    """Return where a payload is and what became of it."""
    raw, raw_id = request.app[RAW], raw_id_in(request)
    state, body = await asyncio.to_thread(raw.read, raw_id)
    row = None
    if state == "processed":
        row = await row_in_place_of(request.app[BACKEND], raw_id, body)
    known = raw.rejection if state == "rejected" else raw.record
    rejection = await asyncio.to_thread(known, raw_id)
    own = row if row and row.raw_id == raw_id else None
    superseded_by = row.raw_id if row and not own else None
    arrival, digest = arrival_of(raw_id), hashlib.sha256(body).hexdigest()
    return answer(Receipt(raw_id, state, arrival, len(body), digest, own, superseded_by, rejection))


async def row_in_place_of(backend: Backend, raw_id: UUID, body: bytes) -> Measurement | None:
    """Return the row that stands at the timestamp of a payload, None if there is none."""
    with contextlib.suppress(DataQualityError, MeasurementNotFound):
        made = await asyncio.to_thread(transform, raw_id, body)
        return await backend.get(made.timestamp_utc)
    return None


@Route("GET", "/raw/{raw_id}/payload", "read", {200: ("application/json",)}, (404,))
async def payload(request: web.Request) -> web.Response:
    """Return the exact bytes that arrived."""
    _, body = await asyncio.to_thread(request.app[RAW].read, raw_id_in(request))
    return web.Response(body=body, content_type="application/json")


@Route("GET", "/rejected", "read", {200: (RejectionPage,)}, (), RejectedQuery)
async def rejected(request: web.Request, query: RejectedQuery) -> web.Response:
    """List the rejected payloads with their reasons, in order of arrival, and count their codes."""
    return answer(await asyncio.to_thread(quarantine, request.app[RAW], query))


def quarantine(folders: Folders, query: RejectedQuery) -> RejectionPage:
    codes, page = Counter[str](), list[Rejection]()
    for rejection in folders.rejections(query.raw_id):
        codes[rejection.code] += query.in_time(rejection)
        behind = query.after is None or rejection.raw_id > query.after
        if behind and len(page) <= query.limit and query.fits(rejection):
            page.append(rejection)
    total = codes.total() if query.code is None else codes[query.code]
    shown = page[: query.limit]
    return RejectionPage(shown, total, +codes, shown[-1].raw_id if len(page) > len(shown) else None)


@Route("POST", "/rejected/retry", "process", {200: (Retried,)}, (503,), RetryQuery)
async def retry(request: web.Request, query: RetryQuery) -> web.Response:
    """Put rejected payloads back to pending: all, or those that the query names."""
    with audited("retry", **cause_of(request)) as facts:
        facts["retried"] = retried = await asyncio.to_thread(put_back, request.app[RAW], query)
    return answer(Retried(retried))


def put_back(folders: Folders, query: RetryQuery) -> int:
    found = filter(query.fits, folders.rejections(query.raw_id))
    return sum(folders.retry(rejection.raw_id) for rejection in found)


@Route("GET", "/metrics", "read", {200: ("text/plain", "application/openmetrics-text")}, (503,))
async def metrics(request: web.Request) -> web.Response:
    """Show what is counted and measured, in the form of Prometheus."""
    app, shown = request.app, request.app[METRICS]
    count, age = await app[BACKLOG].look()
    shown.pending.set(count)
    shown.oldest.set(age or 0)
    with disk_errors():
        shown.free.set((await asyncio.to_thread(app[RAW].room))[0])
    encode, media = choose_encoder(request.headers.get("Accept", ""))
    text = await asyncio.to_thread(encode, cast("prometheus.CollectorRegistry", shown))
    return web.Response(body=text, headers={"Content-Type": media, "Vary": "Accept"})


@Route("GET", "/openapi.json", None, {200: ("application/json",)})
async def openapi(request: web.Request) -> web.Response:
    """Describe this API (OpenAPI 3.1)."""
    return answer(openapi_document(request.app[PREFIX]))


@Route("GET", "/", None, {200: ("text/html",)})
async def page(_: web.Request) -> web.Response:
    """Show what is landing: a page for people."""
    text, policy = await asyncio.to_thread(read_page)
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-cache"}
    return web.Response(text=text, content_type="text/html", headers=headers)


@Route("GET", "", None, {})  # of a mounted application, without the slash
async def page_of_prefix(request: web.Request) -> web.Response:
    return web.Response(status=308, headers={"Location": f"{request.app[PREFIX]}/"})


@functools.cache
def read_page() -> tuple[str, str]:
    """Return the page, and the Content-Security-Policy (level 3) that lets in nothing else."""
    text = Path(__file__).with_name("dropzone.html").read_text("utf-8")
    [style, script] = re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", text, re.DOTALL)
    policy = (
        f"default-src 'none'; style-src '{source_hash(style)}'; "
        f"script-src '{source_hash(script)}'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def source_hash(source: str) -> str:
    """Return what a Content-Security-Policy names an inline script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}"


@Route("GET", "/docs", None, {200: ("text/html",)})
async def docs(_: web.Request) -> web.Response:
    """Show the description of this API as a page."""
    return web.Response(text=DOCS_PAGE, content_type="text/html", headers=PAGE_HEADERS)


@Route("GET", r"/docs/{asset:swagger-ui\.css|swagger-ui-bundle\.js}", None, {})
async def docs_asset(request: web.Request) -> web.StreamResponse:
    """Return a file of the page, which comes with the package swagger-ui-py."""
    spec = importlib.util.find_spec("swagger_ui")
    folder = Path(spec.origin or "").parent if spec else Path()
    cached = {"Cache-Control": "no-cache"}  # kept, and asked for again by its ETag
    return web.FileResponse(folder / "static" / request.match_info["asset"], headers=cached)


DOCS_SCRIPT = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#page", validatorUrl: null})'
DOCS_PAGE = f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>Dropzone API</title>
<link rel="icon" href="data:,"><link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="page"></div><script src="docs/swagger-ui-bundle.js"></script>
<script>{DOCS_SCRIPT}</script></body>
</html>
"""

# Of every answer. Whatever somebody has landed is data, and never runs as a page of this service.
SAFE_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
    "Server": "dropzone",
    "X-Content-Type-Options": "nosniff",
}
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; img-src 'self' data:; "
    f"script-src 'self' '{source_hash(DOCS_SCRIPT)}'; style-src 'self' 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
}


# ── HTTP: who may do what ─────────────────────────────────────────────────────────────────────────

SCOPES: tuple[Scope, ...] = ("ingest", "process", "read")
JWKS_ADDRESS = re.compile(r"https://|http://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?/")
KEY_HASH = re.compile(r"sha256:([0-9a-f]{64})")
ALGORITHMS = (  # asymmetric ones alone: with HS256, whoever knows the public key could sign
    *("RS256", "RS384", "RS512", "PS256", "PS384", "PS512"),
    *("ES256", "ES384", "ES512", "EdDSA"),
)
LEEWAY = 30  # seconds by which the clocks of issuer and Dropzone may differ
FETCH_PATIENCE = 5.0  # seconds
FETCH_PAUSE = 10.0  # seconds between fetches at least, however many unknown keys are named
TOKENS_KEPT = 10_000
KEYS_LIFE = 600.0  # seconds after which a withdrawn key is missed
Caller = tuple[str, Collection[str]]  # its name and its scopes


def hash_of(key: str) -> bytes:
    """Return the SHA-256 of an API key.

    A slow password hash would protect nothing: nobody guesses 160 random bits. Nor does the time
    that it takes to look a digest up tell anything about a key.
    """
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class Guard:
    """Knows who may do what: by the keys of a configuration, and by the tokens of its issuer."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.callers = callers_of(config.auth)
        self.tokens = Tokens(config.auth.jwt) if config.auth.jwt != JwtConfig() else None

    @property
    def is_open(self) -> bool:
        return not (self.callers or self.tokens)

    def reload(self) -> None:
        """Read the keys again; whatever is wrong with them raises, and changes nothing."""
        config = self._config.reload()
        fresh = Guard(config)
        if fresh.is_open and not self.is_open:  # an editor may just have emptied the file
            raise ConfigError("no key is left: restart if the API is meant to be open to everyone")
        old, new = _plain(self._config), _plain(config)
        for section in old.keys() - {"auth"}:
            if old[section] != new[section]:
                log.warning("[%s] was changed: it takes effect at the next start", section)
        if self.tokens and self._config.auth.jwt == config.auth.jwt:
            fresh.tokens = self.tokens.outdated()
        self._config, self.callers, self.tokens = config, fresh.callers, fresh.tokens
        log.info("the API keys were read again, there are %d", len(self.callers))


GUARD = web.AppKey("GUARD", Guard)


def callers_of(auth: AuthConfig) -> dict[bytes, Caller]:
    """Return who has which key, by its digest; raises `ConfigError`."""
    callers = dict[bytes, Caller]()
    if key := auth.api_key.reveal():
        callers[hash_of(key)] = ("api_key", SCOPES)
    names = {"api_key"}
    for each in auth.keys:
        match = KEY_HASH.fullmatch(each.hash.reveal())
        digest = bytes.fromhex(match[1]) if match else b""
        if each.name in names:
            raise ConfigError(f"auth.keys: the name {each.name} is taken, give each key its own")
        if not match:
            raise ConfigError(f"auth.keys: the hash of {each.name} is not sha256:<64 hex digits>")
        if digest in callers:
            raise ConfigError(f"auth.keys: {each.name} is the same key as {callers[digest][0]}")
        names.add(each.name)
        callers[digest] = (each.name, each.scopes)
    return callers


class Tokens:
    """Judges JWT access tokens (RFC 7519, RFC 9068) by their issuer's keys, fetched and kept."""

    def __init__(self, config: JwtConfig) -> None:
        missing = [name for name in ("issuer", "audience", "jwks") if not getattr(config, name)]
        if missing:
            raise ConfigError(f"auth.jwt: set {' and '.join(missing)}, too")
        if "://" in config.jwks and not JWKS_ADDRESS.match(config.jwks):
            raise ConfigError("auth.jwt.jwks: give an https address, or the path of a file")
        self._config = config
        self._jwt = importlib.import_module("jwt")
        self._keys = dict[str | None, tuple[Any, Sequence[str]]]()
        self._judged = dict[str, tuple[float, Caller]]()  # until when: a signature takes 0.2 ms
        self._fetched = -math.inf
        self._trouble = ""
        self._lock = asyncio.Lock()

    def outdated(self) -> Tokens:
        """Fetch the keys before the next token is judged."""
        self._fetched = -math.inf
        return self

    async def judge(self, token: str) -> Caller:
        """Return whom a token names, and its scopes; raises `DropzoneError` with 401 or 503."""
        jwt, config = self._jwt, self._config
        until, caller = self._judged.get(token, (0.0, ("", ())))
        if time.time() < until and time.monotonic() - self._fetched < KEYS_LIFE:
            return caller
        try:
            key, algorithms = await self._key(jwt.get_unverified_header(token).get("kid"))
            claims = jwt.decode(
                token,
                key,
                algorithms=algorithms,
                audience=config.audience,
                issuer=config.issuer,
                leeway=LEEWAY,
                options={"require": ["exp"], "enforce_minimum_key_length": True},
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            wrong = f"the token is refused: {error}"
            raise DropzoneError(wrong, "token_invalid", 401) from None
        names = (claims.get(name) for name in ("sub", "azp", "client_id"))
        name = next((name for name in names if name and isinstance(name, str)), "token")
        scopes = claims.get(config.scope_claim)
        scopes = scopes.split() if isinstance(scopes, str) else scopes
        caller = (_shown_name(name), scopes if isinstance(scopes, list) else ())
        if len(self._judged) == TOKENS_KEPT:
            self._judged.clear()
        self._judged[token] = (int(claims["exp"]) + LEEWAY, caller)
        return caller

    async def _key(self, kid: str | None) -> tuple[Any, Sequence[str]]:
        """Return a public key and its algorithms."""
        if self._is_due(kid):
            async with self._lock:
                if self._is_due(kid):  # else another request has fetched them meanwhile
                    await self.fetch()
        if (key := self._find(kid)) is not None:
            return key
        if self._trouble:
            wrong = "the keys to judge the token with cannot be fetched now: try again"
            raise DropzoneError(wrong, "issuer_unavailable", 503)
        raise ValueError("the issuer has no key of this kid")

    def _is_due(self, kid: str | None) -> bool:
        age = time.monotonic() - self._fetched
        return age > KEYS_LIFE or (age > FETCH_PAUSE and self._find(kid) is None)

    def _find(self, kid: str | None) -> tuple[Any, Sequence[str]] | None:
        only = next(iter(self._keys)) if len(self._keys) == 1 and kid is None else kid
        return self._keys.get(only) or self._keys.get(None)

    async def fetch(self) -> None:
        """Fetch the keys of the issuer; where that fails, those known before stay."""
        place = self._config.jwks
        try:
            self._keys = self._parsed(await _content(place))
            self._judged.clear()
            self._trouble = ""
        except (ClientError, TimeoutError, OSError, ValueError, self._jwt.PyJWTError) as error:
            self._trouble = str(error) or f"no answer within {FETCH_PATIENCE} s"
            log.warning("auth.jwt.jwks: %s gives no keys: %s", place, self._trouble)
        self._fetched = time.monotonic()

    def _parsed(self, text: bytes) -> dict[str | None, tuple[Any, Sequence[str]]]:
        if text.lstrip().startswith(b"-----BEGIN"):
            serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
            return {None: (serialization.load_pem_public_key(text), ALGORITHMS)}
        keys = dict[str | None, tuple[Any, Sequence[str]]]()
        for each in msgspec.json.decode(text, type=JwkSet).keys:
            with contextlib.suppress(self._jwt.PyJWTError):  # a kind that is not known here
                key = self._jwt.PyJWK(each)
                if each.get("use", "sig") == "sig" and key.algorithm_name in ALGORITHMS:
                    algorithms = [key.algorithm_name] if "alg" in each else ALGORITHMS
                    keys[key.key_id] = key.key, algorithms
        if not keys:
            raise ValueError("there is no public key to check signatures with")
        return keys


class JwkSet(Struct):
    keys: list[Table]


async def _content(place: Place) -> bytes:
    if "://" not in place:
        return await asyncio.to_thread(Path(place).read_bytes)
    async with (
        ClientSession(timeout=ClientTimeout(total=FETCH_PATIENCE)) as session,
        session.get(place, allow_redirects=False) as response,
    ):
        if response.status != 200:
            raise ValueError(f"the answer has status {response.status}")
        return await response.read()


def _shown_name(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:128])


# ── HTTP: admission and the edge ──────────────────────────────────────────────────────────────────

IN_FLIGHT = 256 * 1024 * 1024  # bytes of bodies that have arrived and are not answered yet


class Admission:
    """The requests and the bytes of bodies in flight, and whether any more are let in."""

    def __init__(self) -> None:
        self.bytes = 0
        self._requests: set[asyncio.Future[None]] = set()  # each is done when it is answered
        self._draining = False

    @contextlib.contextmanager
    def admitted(self, limit: int) -> Iterator[Callable[[int], None]]:
        """Give out what counts the bytes of one request, `limit` at most, until it is answered."""
        if self._draining:
            raise DropzoneError("the service is about to stop", "draining", 503)
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            if taken + size > limit:
                raise too_large(limit)
            if self.bytes and self.bytes + size > IN_FLIGHT:
                raise DropzoneError("too much is in flight", "overloaded", 503)
            self.bytes += size
            taken += size

        self._requests.add(answered := asyncio.get_running_loop().create_future())
        try:
            yield take
        finally:
            self._requests.remove(answered)
            answered.set_result(None)
            self.bytes -= taken

    async def drain(self, patience: float) -> None:
        """Let nothing in any more; wait `patience` seconds at most for what is in flight."""
        self._draining = True
        if self._requests:
            await asyncio.wait(self._requests, timeout=patience)


ADMISSION = web.AppKey("ADMISSION", Admission)

STATUS_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    415: {"Accept-Encoding": "gzip, deflate"},
    503: {"Retry-After": "5"},
}
CHALLENGES = {  # RFC 6750
    "token_invalid": 'Bearer error="invalid_token"',
    "scope_missing": 'Bearer error="insufficient_scope"',
}
REQUEST_ID_FORM = re.compile(r"[\w.:+/=@-]{1,128}", re.ASCII)


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    body, media = msgspec.json.encode(value), "application/json"
    if status in STATUS_HEADERS:
        headers = STATUS_HEADERS[status] | (headers or {})
    return web.Response(body=body, status=status, headers=headers, content_type=media)


@web.middleware
async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request its id, and every error its problem document."""
    given = request.headers.get("X-Request-ID", "")
    request_id = given if REQUEST_ID_FORM.fullmatch(given) else f"{getrandbits(96):024x}"
    request[REQUEST_ID] = request_id
    begun = time.perf_counter()
    try:
        response: web.StreamResponse = await handler(request)
    except Exception as error:  # noqa: BLE001 (nothing leaves without a problem document)
        response = problem(request, error)
    response.headers["X-Request-ID"] = request_id
    if RATE_HEADERS in request:
        response.headers.update(request[RATE_HEADERS])
    for name, value in SAFE_HEADERS.items():
        response.headers.setdefault(name, value)
    seconds = time.perf_counter() - begun
    request.app[METRICS].answered(request, response.status, seconds)
    if request_log.isEnabledFor(logging.INFO):
        log_request(request, response.status, seconds)
    return response


def template_of(request: web.Request) -> tuple[str, str]:
    """Return method and route as metrics name them: few, whatever a client makes up."""
    resource = request.match_info.route.resource
    if resource is None:
        return request.method if request.method in METH_ALL else "other", "none"
    return request.method, resource.canonical.removeprefix(request.app[PREFIX])


def log_request(request: web.Request, status: int, seconds: float) -> None:
    """Log a request; of a route the template is told, as paths may hold secrets."""
    resource, raw_ids = request.match_info.route.resource, request.get(LANDED, ())
    line = RequestLine(
        datetime.now(UTC),
        "INFO",
        request_log.name,
        request[REQUEST_ID],
        request.get(CALLER, ""),
        request.method,
        resource.canonical if resource else "",
        status,
        request.content.total_bytes,
        round(seconds, 6),
        raw_ids[0] if raw_ids else msgspec.UNSET,
        len(raw_ids) if len(raw_ids) > 1 else msgspec.UNSET,
    )
    for handler in logging.getLogger().handlers:
        if isinstance(handler, LineHandler):  # a record would cost ten times as much
            return handler.note(line)
    return request_log.info(line.facts())


def cause_of(request: web.Request) -> dict[str, str]:
    """Return who has caused what an audit line tells."""
    return {"caller": request.get(CALLER, ""), "request_id": request[REQUEST_ID]}


def problem(request: web.Request, error: Exception) -> web.Response:
    """Render an error as a problem document (RFC 9457)."""
    known, request_id = as_dropzone_error(error), request[REQUEST_ID]
    request.app[METRICS].refusals.labels(known.code).inc()
    if known.status == 500:
        log.error("request %s failed", request_id, exc_info=error)
    title = HTTPStatus(known.status).phrase
    document = Problem(title, known.status, known.detail, known.code, request_id)
    response = answer(msgspec.structs.asdict(document) | known.extra, known.status)
    response.content_type = "application/problem+json"
    if isinstance(error, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = error.headers["Allow"]
    if known.code in CHALLENGES:
        response.headers["WWW-Authenticate"] = CHALLENGES[known.code]
    return response


def as_dropzone_error(error: Exception) -> DropzoneError:
    match error:
        case DropzoneError():
            return error
        case BackendUnavailable():
            return DropzoneError(str(error), "backend_unavailable", 503)
        case MeasurementNotFound():
            return DropzoneError(str(error), "measurement_not_found", 404)
        case BackendError():
            return DropzoneError(str(error), "backend_error", 500)
        case web.HTTPException():
            code = HTTPStatus(error.status).name.lower()
            return DropzoneError(error.reason, code, error.status)
    return DropzoneError("an error inside Dropzone; its log names it by this request_id")


async def authorize(request: web.Request, scope: Scope) -> None:
    """Note who calls; raise unless their key or token has the scope, or the API is open."""
    guard = request.app[GUARD]
    if guard.is_open:
        return
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    bearer = token.strip() if scheme.lower() == "bearer" else ""
    key = request.headers.get("x-api-key")
    caller = guard.callers.get(hash_of(key or bearer))
    if caller is None and guard.tokens and not key and bearer.count(".") == 2:
        caller = await guard.tokens.judge(bearer)
    if caller is None:
        given = key or bearer
        wrong = "the API key is wrong" if given else "send an API key in the header x-api-key"
        raise DropzoneError(wrong, "key_refused", 401)
    request[CALLER], scopes = caller
    if scope not in scopes:
        wrong = f"{request[CALLER]} may not do this: it needs the scope {scope}"
        raise DropzoneError(wrong, "scope_missing", 403, scope=scope)


def admit(request: web.Request, by: str, who: str) -> None:
    """Count a request of a key or an address, and raise where it is beyond the limit.

    The headers that tell are of draft-ietf-httpapi-ratelimit-headers-10.
    """
    limiter = request.app[LIMITERS].get(by)
    if limiter is None or not who:
        return
    result, quota = limiter.limit(who), limiter.quota
    state = result.state
    more = state.reset_after - (state.limit - state.remaining - 1) * quota.emission_interval
    wait = math.ceil(round(state.retry_after or more, 3)) or 1
    headers = {
        "RateLimit-Policy": f'"{by}";q={quota.get_limit()};w={quota.get_period_sec()}',
        "RateLimit": f'"{by}";r={state.remaining};t={wait}',
    }
    before = request.get(RATE_HEADERS, {})
    request[RATE_HEADERS] = {k: f"{before[k]}, {v}" if before else v for k, v in headers.items()}
    if result.limited:
        request[RATE_HEADERS]["Retry-After"] = str(wait)
        wrong = f"too many requests of this {by}: try again in {wait} s"
        raise DropzoneError(wrong, "rate_limited", 429)


@functools.lru_cache
def network_of(address: str) -> str:
    """Return an IPv4 address as it is, of an IPv6 address the /64 that one subscriber has."""
    if "." not in address:  # also of an IPv4 address that is mapped to IPv6
        with contextlib.suppress(ValueError):
            return IPv6Address(address.partition("%")[0]).exploded[:19]
    return address


def query_in(request: web.Request, kind: type[Struct]) -> Struct:
    """Return the query as its type; raises what names the parameter."""
    values: dict[str, object] = {}
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for name, text in request.query.items():
        if name not in fields:
            raise query_invalid(name, f"unknown; known: {', '.join(fields)}")
        if name in values:
            raise query_invalid(name, "given twice")
        if text == "null":  # which would count as not given
            raise query_invalid(name, "null: leave it out")
        values[name] = moment_in(name, text) if "datetime" in str(fields[name]) else text
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        wrong, _, place = str(error).partition(" - at `$.")
        raise query_invalid(place.rstrip("`"), f"wrong: {wrong}") from None


def query_invalid(name: str, wrong: str) -> DropzoneError:
    return DropzoneError(f"the parameter {name} is {wrong}", "query_invalid", 400, parameter=name)


def moment_in(name: str, text: str) -> datetime:
    """Return the moment (UTC) that a parameter names; the + of its offset may come as a space."""
    try:
        return parse_time_stamp(re.sub(r" (\d\d(?::?\d\d)?)$", r"+\1", text))
    except DataQualityError as error:
        wrong = error.detail.removeprefix("time_stamp is ")
        raise query_invalid(name, f"wrong: {wrong}") from None


def raw_id_in(request: web.Request) -> UUID:
    text = request.match_info["raw_id"]
    if raw_id := raw_id_of(f"{text.lower()}.json"):
        return raw_id
    raise RawIdUnknown(f"{_shown(text)} is no raw_id: it is a UUID")


async def read_body(request: web.Request, take: Callable[[int], None]) -> bytes:
    """Return the body with its Content-Encoding undone, `max_body_bytes` at most, within time.

    A server that embeds this application has undone the encoding already, unless told otherwise.
    """
    limits, content = request.app[CONFIG].server, request.content
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
        wrong = f"Content-Encoding is {_shown(encoding)}: send gzip or deflate"
        raise DropzoneError(wrong, "encoding_unsupported", 415)
    if (request.content_length or 0) > limits.max_body_bytes:
        raise too_large(limits.max_body_bytes)
    try:
        if content.is_eof():  # all of it is here, as of most: spare the timer
            body = content.read_nowait()
            take(len(body))
        else:
            async with asyncio.timeout(limits.body_seconds):
                body = b"".join([chunk async for chunk in _counted(content, take)])
    except (web.RequestPayloadError, ConnectionError) as error:
        raise DropzoneError(f"the body did not arrive whole: {error}", "body_broken", 400) from None
    except TimeoutError:
        wrong = f"the body did not arrive within {limits.body_seconds:g} s"
        raise DropzoneError(wrong, "body_too_slow", 408) from None
    if encoding == "identity" or not body or content.total_compressed_bytes is not None:
        return body
    whole = await asyncio.to_thread(inflate, body, limits.max_body_bytes)
    take(max(0, len(whole) - len(body)))
    return whole


async def _counted(content: StreamReader, take: Callable[[int], None]) -> AsyncIterator[bytes]:
    async for chunk in content.iter_any():
        take(len(chunk))
        yield chunk


def too_large(limit: int, unit: str = "bytes") -> DropzoneError:
    wrong = f"the payload has more than {limit} {unit}: send less at a time"
    return DropzoneError(wrong, "payload_too_large", 413)


def inflate(data: bytes | bytearray, limit: int) -> bytes:
    """Undo gzip (RFC 1952, any number of members) or deflate (zlib, RFC 1950)."""
    try:
        if data[:2] == b"\x1f\x8b":
            whole = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
        else:
            inflater = zlib.decompressobj()
            whole = inflater.decompress(data, limit + 1)
            if len(whole) <= limit and (not inflater.eof or inflater.unused_data):
                raise EOFError("the data do not end where they should")
    except (OSError, EOFError, zlib.error) as error:
        raise DropzoneError(f"the compressed body is broken: {error}", "body_broken", 400) from None
    if len(whole) > limit:
        raise too_large(limit)
    return whole


# ── HTTP: the description of the routes ───────────────────────────────────────────────────────────

OPENAPI_INFO = {
    "title": "Dropzone",
    "version": __version__,
    "description": "The landing zone between devices and a database: POST JSON to /ingest, POST "
    "/process, GET /measurements. No key is needed where none is configured. An answer with status "
    "429 or 503 asks to be tried again, after the seconds in Retry-After.",
}
SECURITY_SCHEMES = {
    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}
PATH_FORMATS = {"raw_id": "uuid", "timestamp": "date-time"}


def openapi_document(prefix: str) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of `ROUTES`, made of the types that the code itself uses."""
    documented = [route for route in ROUTES if route.answers]
    kinds = [kind for route in documented for kinds in route.answers.values() for kind in kinds]
    types = {Problem, *(kind for kind in kinds if isinstance(kind, type))}
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for schema in schemas.values():
        schema["required"] = list(schema["properties"])  # what has a default is sent as well
    paths: dict[str, dict[str, Any]] = {}
    for route in documented:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": OPENAPI_INFO,
        "servers": [{"url": prefix or "/"}],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": SECURITY_SCHEMES},
    }


def _operation(route: Route) -> dict[str, Any]:
    guarded = (401, 403, 429, 503) if route.scope else ()
    statuses = {*route.problems, *guarded, *([400] if route.query else ())}
    answers = route.answers | dict.fromkeys(sorted(statuses), (Problem,))
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.handler.__doc__,
        "parameters": _parameters(route),
        "responses": {str(status): _response(status, kinds) for status, kinds in answers.items()},
    }
    if route.scope:
        operation["security"] = [{name: [route.scope]} for name in SECURITY_SCHEMES] + [{}]
    if route.handler is ingest:
        operation["requestBody"] = {
            "description": "Any JSON document, whatever its Content-Type says.",
            "required": True,
            "content": {"application/json": {"schema": {}}},
        }
    return operation


def _response(status: int, kinds: tuple[type | str, ...]) -> dict[str, Any]:
    content: dict[str, Any] = {k: {"schema": {}} for k in kinds if isinstance(k, str)}
    if names := [kind.__name__ for kind in kinds if isinstance(kind, type)]:
        media = "application/problem+json" if Problem in kinds else "application/json"
        either = [{"$ref": f"#/components/schemas/{name}"} for name in names]
        content[media] = {"schema": either[0] if len(either) == 1 else {"anyOf": either}}
    return {"description": HTTPStatus(status).phrase, "content": content}


def _parameters(route: Route) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in re.findall(r"{(\w+)}", route.path):
        schema = {"type": "string", "format": PATH_FORMATS[name]}
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    if route.query:
        _, schemas = msgspec.json.schema_components([route.query])
        for name, schema in schemas[route.query.__name__]["properties"].items():
            given = schema.get("anyOf", [schema])[0]  # the other is null: a query leaves it out
            found.append({"name": name, "in": "query", "schema": given})
    return found


# ── Application ───────────────────────────────────────────────────────────────────────────────────


def create_app(config: Config | None = None, *, backend: Backend | None = None) -> web.Application:
    """Return the application, ready to be served or to be mounted in another with `add_subapp`.

    `config` is `load_config()` unless given. A `backend` that is handed in takes the place of the
    configured one; either is opened and closed with the application. Nothing is touched before,
    but without a `config` also logging is set up as configured, unless it is already.
    """
    if config is None:
        config = load_config()
        log_to_stderr(config.log)
    app = web.Application(middlewares=[edge])
    app[CONFIG] = config
    app[RAW] = RawStore(config.raw)
    app[METRICS] = app[RAW].metrics
    app[BACKEND] = measured(backend_of(config) if backend is None else backend, app[METRICS])
    app[ADMISSION] = Admission()
    app[GUARD] = guard = Guard(config)
    app[RELOADER] = Reloader()
    if config.files:
        app[RELOADER].watch([*config.files, config.auth.jwt.jwks], guard.reload)
    app[METRICS].own_in_flight = lambda: app[ADMISSION].bytes
    app[PROCESSOR] = Processor(config, app[BACKEND], app[METRICS])
    app[CHECKER] = Workers(1)  # one large document at a time
    app[BACKLOG] = Backlog(app[RAW])
    app[CODES] = Codes(app[RAW])
    rates = {"key": config.limits.per_key, "address": config.limits.per_address}
    app[LIMITERS] = {by: rate.limiter() for by, rate in rates.items() if rate}
    for route in ROUTES:
        add = app.router.add_get if route.method == "GET" else app.router.add_post
        add(route.path, route.handle, name=route.handler.__name__)
    app.cleanup_ctx.append(lifecycle)
    app.on_shutdown.append(lambda app: app[ADMISSION].drain(0))
    return app


def backend_of(config: Config) -> Backend:
    """Return the configured backend; raises `ConfigError`."""
    name, sqlite, postgres = msgspec.structs.astuple(config.storage)
    options: dict[str, dict[str, object]] = {
        "sqlite": {"path": sqlite.path},
        "postgres": {"url": postgres.url.reveal(), "pool": postgres.pool},
    }
    try:
        return create_backend(name, **options.get(name, {}))
    except ValueError as error:
        raise ConfigError(f"storage.backend: {error}") from error


async def lifecycle(app: web.Application) -> AsyncIterator[None]:
    """Open what the application works with; close it when the last request is answered."""
    app[PREFIX] = str(app.router["health"].url_for()).removesuffix("/health")
    if app[GUARD].is_open:
        log.warning("no API key is set, the API is open to everyone: set DROPZONE_API_KEY")
    await app[RAW].open()
    for name in await asyncio.to_thread(app[RAW].strays):
        log.warning("%s is left alone: it is not named <uuid>.json", app[RAW].raw / name)
    if trouble := await trouble_of(app[BACKEND]):
        log.warning("the backend does not answer, landing goes on: %s", trouble)
    loop = [app[PROCESSOR].process_forever(every)] if (every := app[CONFIG].process.every) else []
    if tokens := app[GUARD].tokens:
        await tokens.fetch()
    tasks = list(map(asyncio.create_task, [*loop, app[RELOADER].run()]))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await app[PROCESSOR].close()
        await app[CHECKER].close()
        await app[RAW].close()
        await app[BACKEND].close()


class Reloader:
    """Takes over what may change while the service runs: when its files do, or when it is told."""

    def __init__(self) -> None:
        self.told = asyncio.Event()
        self._files = list[Path]()
        self._actions = list[Callable[[], None]]()
        self._taken = self._states()

    def watch(self, files: Iterable[Path | str | None], reload: Callable[[], None]) -> None:
        """Call `reload` in a thread when a file has changed; it may raise."""
        self._files += [Path(file) for file in files if file]
        self._actions.append(reload)
        self._taken = self._states()

    async def run(self) -> None:
        """Look once a second, and wait for a file that is still being written."""
        seen = self._taken
        while self._actions:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.told.wait(), LOOK)
            before, seen = seen, await asyncio.to_thread(self._states)
            if self.told.is_set() or before == seen != self._taken:
                self.told.clear()
                self._taken = seen
                await asyncio.to_thread(self._reload)

    def _states(self) -> list[tuple[int, int, int] | None]:
        return list(map(_state_of, self._files))

    def _reload(self) -> None:
        for reload in self._actions:
            try:
                reload()
            except Exception as error:  # noqa: BLE001 (whatever it is, the service goes on)
                log.error("%s; what held before still holds", error)  # noqa: TRY400


def _state_of(file: Path) -> tuple[int, int, int] | None:
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


RELOADER = web.AppKey("RELOADER", Reloader)
LOOK = 1.0  # seconds


# ── Command line ──────────────────────────────────────────────────────────────────────────────────

GRACE = 5.0  # seconds that requests have to finish when the service is told to stop
IDLE = 75.0  # seconds for which a connection may send no request, or only a part of its head


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """Load the certificates, None where none are configured; raises `ConfigError`."""
    cert, key, client_ca = config.tls_cert, config.tls_key, config.tls_client_ca
    if cert is None:
        if key or client_ca:
            raise ConfigError("server.tls_key and tls_client_ca are of no use without tls_cert")
        return None
    context, setting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "tls_cert with tls_key"
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        for file in filter(None, (cert, key, client_ca)):
            file.read_bytes()  # its error names the file, unlike those of OpenSSL
        context.load_cert_chain(cert, key, password="")  # so that no terminal is asked for one
        setting = "tls_client_ca"
        if client_ca:
            context.load_verify_locations(client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            context.num_tickets = 0  # whoever resumes a session is not asked for a certificate
            context.options |= ssl.OP_NO_TICKET
    except ssl.SSLError as error:
        wrong = (error.reason or "no PEM of that kind").lower().replace("_", " ")
        need = "give PEM files, the key unencrypted and that of the certificate"
        raise ConfigError(f"server.{setting} cannot be used ({wrong}): {need}") from None
    except OSError as error:
        raise ConfigError(f"server: {error.filename} cannot be read: {error.strerror}") from None
    return context


def followed(config: ServerConfig, reloader: Reloader) -> ssl.SSLContext | None:
    """Return a context whose every handshake uses the certificates that were loaded last."""
    if (front := tls_context(config)) is None:
        return None
    newest = front

    def hand_over(handshake: ssl.SSLSocket | ssl.SSLObject, _: str | None, __: object) -> None:
        handshake.context = newest

    def reload() -> None:
        nonlocal newest
        newest = tls_context(config) or newest
        log.info("the certificates were loaded again")

    front.sni_callback = hand_over  # which is called also where a client names no server
    reloader.watch((config.tls_cert, config.tls_key, config.tls_client_ca), reload)
    return front


async def serve(config: Config, _: argparse.Namespace) -> int:
    """serve the API (what happens without a command)"""
    app = create_app(config)
    tls = followed(config.server, app[RELOADER])
    runner = web.AppRunner(
        app,
        access_log=None,
        auto_decompress=False,
        keepalive_timeout=IDLE,
        lingering_time=2.0,
        shutdown_timeout=1.0,
    )
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each connection is an open file
    logging.getLogger("aiohttp.server").addFilter(tell_less)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.server.host, config.server.port, ssl_context=tls)
        await site.start()
        stop = asyncio.Event()
        on_stop(stop.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, app[RELOADER].told.set)
        log.info("listening on %s", site.name)
        log.info("payloads lie in %s, backend is %s", config.raw.dir, config.storage.backend)
        await stop.wait()
        log.info("stopping")
        await site.stop()
        await app[ADMISSION].drain(GRACE)  # before the runner's turn, which cuts bodies short
    except OSError as error:
        where = f"{config.server.host}:{config.server.port}"
        log.error("cannot listen on %s: %s", where, error.strerror)  # noqa: TRY400
        return os.EX_UNAVAILABLE
    finally:
        await runner.cleanup()
    return os.EX_OK


def tell_less(record: logging.LogRecord) -> bool:
    """Log one line of HTTP that does not parse: it is no defect, and might quote a key."""
    if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
        record.exc_info = None
        record.msg += ": no valid HTTP"
        record.levelno, record.levelname = logging.INFO, "INFO"
        return log.isEnabledFor(logging.INFO)
    return True


async def ingest_files(config: Config, args: argparse.Namespace) -> int:
    """land JSON or NDJSON files without a server, each whole or not at all"""
    raw, limit, code = RawStore(config.raw), config.server.max_body_bytes, os.EX_OK
    await raw.open()
    for name in args.files:
        with tempfile.TemporaryFile(dir=raw.journal) as copy:  # which nobody alters meanwhile
            try:
                with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
                    shutil.copyfileobj(file, copy)
                total = sum(map(len, groups_in(copy, limit)))  # all of it is checked
            except (DropzoneError, OSError) as error:
                code = os.EX_NOINPUT if isinstance(error, OSError) else os.EX_DATAERR
                print(f"{name}: {error}; nothing of it was landed", file=sys.stderr)
                continue
            with tqdm(total=total, desc=name, unit=" payloads", disable=None) as bar:
                for group in groups_in(copy, limit):
                    print(*await raw.land(group), sep="\n")
                    bar.update(len(group))
    await raw.close()
    return code


def groups_in(file: BinaryIO, limit: int) -> Iterator[list[bytes]]:
    """Yield the payloads of a file: one JSON document, or one on each line (NDJSON)."""
    file.seek(0)
    whole = file.read(limit + 1)
    try:
        if len(whole) <= limit:
            parse_json(whole)
            yield [whole]
            return
    except PayloadNotJson as error:
        if not error.detail.startswith("not JSON: Extra data"):  # behind the first document
            raise
    file.seek(0)
    group, size = list[bytes](), 0
    for document in documents(iter(lambda: file.readline(limit + 2), b""), limit):
        group.append(document)
        size += len(document)
        if size >= GROUP_BYTES or len(group) == 1000:
            yield group
            group, size = [], 0
    if group:
        yield group


async def process_pending(config: Config, args: argparse.Namespace) -> int:
    """turn the pending payloads into measurements, with or without a server beside it"""
    os.nice(NICE)
    async with opened(config) as (raw, backend):
        processor = Processor(config, backend, raw.metrics)
        try:
            if args.watch:
                await processor.process_forever(config.process.every or 1.0)
            with tqdm(unit=" payloads", disable=None) as bar:

                def show(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                with audited("process", operator_name()) as facts:
                    result = await processor.process(args.limit, show)
                    facts.update(processed=result.processed, failed=result.failed)
        finally:
            await processor.close()
    print(msgspec.json.format(msgspec.json.encode(result)).decode())
    return os.EX_OK


@contextlib.asynccontextmanager
async def opened(config: Config, alone: str = "") -> AsyncIterator[tuple[RawStore, Backend]]:
    """Open the data folder, beside a server or without one, and make the backend.

    Of commands with the same `alone`, a second one raises Timeout.
    """
    raw = RawStore(config.raw)
    backend = measured(backend_of(config), raw.metrics)
    await raw.open()
    lock = FileLock(raw.journal / f"{alone}.lock", timeout=0)
    try:
        with lock if alone else contextlib.nullcontext():
            yield raw, backend
    finally:
        await backend.close()
        await raw.close()


async def until_stopped(command: Coroutine[Any, Any, int]) -> int:
    """Run what goes on until the program is told to stop, which may be before it has begun."""
    task = asyncio.ensure_future(command)
    on_stop(lambda: task.cancelling() or task.cancel())  # once: what it then does is to be done
    await asyncio.wait([task])
    return os.EX_OK if task.cancelled() else task.result()


def on_stop(call: Callable[[], object]) -> None:
    """Have SIGINT and SIGTERM call this alone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, call)


async def verify(config: Config, args: argparse.Namespace) -> int:
    """recompute the rows from their payloads; the exit code is 1 where a row is not right"""
    return await prove(config, args, Proof.findings, {})


async def rebuild(config: Config, args: argparse.Namespace) -> int:
    """set the rows right that verify finds wrong; with --dry-run only show them"""
    if args.dry_run:
        return await prove(config, args, Proof.findings, {})
    with audited("rebuild", operator_name()) as facts:
        return await prove(config, args, Proof.rebuild, facts)


async def prove(
    config: Config, args: argparse.Namespace, way: ProofWay, facts: dict[str, object]
) -> int:
    counts = Counter[str]()
    async with opened(config, "upkeep") as (raw, backend):
        total = await asyncio.to_thread(raw.count_processed)
        with tqdm(total=total, unit=" payloads", disable=None) as bar:
            async for finding in way(Proof(config, backend), args.since, args.until, bar.update):
                counts[finding.kind] += 1
                facts.update(counts)
                if counts.total() == 1 and not args.json:
                    bar.write(FINDING.format(*FINDING_HEAD))
                bar.write(as_line(finding, as_json=args.json))
    if not args.json:
        print(
            ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "all rows are right"
        )
    return 1 if counts and args.run is verify else os.EX_OK


ProofWay = Callable[
    [Proof, datetime | None, datetime | None, Callable[[int], object]], AsyncIterator[Finding]
]
FINDING = "{:10}  {:27}  {:36}  {:>23}  {:>23}  {:36}  {:>23}  {:>23}"
FINDING_HEAD = (
    *("finding", "timestamp_utc", "row: raw_id", "mean", "std_dev"),
    *("should be: raw_id", "mean", "std_dev"),
)


def as_line(finding: Finding, *, as_json: bool) -> str:
    if as_json:
        return msgspec.json.encode(finding).decode()
    row, right = finding.row, finding.right
    cells = [
        (str(each.raw_id), f"{each.mean!r}", f"{each.std_dev!r}") if each else ("-", "", "")
        for each in (row, right)
    ]
    [at, *_] = (timestamp_text(each.timestamp_utc) for each in (row, right) if each)
    return FINDING.format(finding.kind, at, *cells[0], *cells[1]).rstrip()


async def compact(config: Config, _: argparse.Namespace) -> int:
    """pack the finished days of processed payloads, delete those that are older than keep_days"""
    code = os.EX_OK
    async with opened(config, "upkeep") as (raw, _backend):
        days = await asyncio.to_thread(raw.finished_days)
        for day in tqdm(days, unit=" days", disable=None):
            try:
                with audited("compact", operator_name(), day=day) as facts:
                    facts["packed"] = count = await asyncio.to_thread(raw.compact, day)
                tqdm.write(f"{day}: {count} payloads packed")
            except (OSError, StorageUnavailable) as error:  # one bad day never stops the rest
                code = os.EX_TEMPFAIL
                tqdm.write(f"{day}: not packed, its payloads stay: {error}", sys.stderr)
        for name in await asyncio.to_thread(raw.expire):
            audit("expire", operator_name(), pack=name)
            print(f"{name}: deleted, its day is more than {raw.keep_days} days ago")
    return code


async def retry_rejected(config: Config, args: argparse.Namespace) -> int:
    """put rejected payloads back to pending: all, or those with a code or a raw_id"""
    async with opened(config) as (raw, _):
        queries = [RetryQuery(args.code, raw_id=raw_id) for raw_id in args.raw_ids or [None]]
        with audited("retry", operator_name()) as facts:
            facts["retried"] = retried = sum(put_back(raw, query) for query in queries)
        print(msgspec.json.encode(Retried(retried)).decode())
    return os.EX_OK


async def new_key(config: Config, args: argparse.Namespace) -> int:
    """print a new API key, this once, and add its hash to the configuration file"""
    names = {"api_key", *(name for name, _ in callers_of(config.auth).values())}
    if args.name in names:
        raise ConfigError(f"the name {args.name} is taken: `key list` shows all of them")
    key, file = f"dz_{secrets.token_hex(20)}", config.files[0]  # a scanner for secrets can find it
    scopes = json.dumps(list(dict.fromkeys(args.scope)))
    table = KEY_TABLE.format(args.name, hash_of(key).hex(), scopes)
    try:
        append_key(file, table, 1 + len(config.auth.keys))
    except (OSError, ValueError) as error:
        wrong = f"{file} was left as it is ({error}): add this to the keys yourself"
        print(key)
        print(f"dropzone: {wrong}\n{table}", file=sys.stderr)
        return os.EX_CANTCREAT
    audit("key new", operator_name(), name=args.name)
    print(key)
    print(f"{args.name} was added to {file}, which servers read within seconds", file=sys.stderr)
    return os.EX_OK


KEY_TABLE = """
[[auth.keys]]
name = "{}"
hash = "sha256:{}"
scopes = {}
"""


def append_key(file: Path, table: str, count: int) -> None:
    """Append a key; raises `ValueError` where the file would then not hold that many, or breaks."""
    before = file.read_text("utf-8") if file.exists() else ""
    added = table if not before or before.endswith("\n") else f"\n{table}"
    if len(tomllib.loads(before + added)["auth"]["keys"]) != count:
        raise ValueError("DROPZONE_AUTH_KEYS goes before it")
    with file.open("a", encoding="utf-8") as out:
        out.write(added)


async def list_keys(config: Config, _: argparse.Namespace) -> int:
    """list the API keys by name and scopes; `key new NAME --scope …` makes one"""
    for name, scopes in callers_of(config.auth).values():
        print(name, *scopes)
    return os.EX_OK


async def check(config: Config, _: argparse.Namespace) -> int:
    """name what is wrong with the configuration and its surroundings; then the exit code is 78"""
    backend, raw = backend_of(config), RawStore(config.raw)
    troubles: dict[str, list[str | None]] = {
        f"data folder {config.raw.dir}": [*folder_troubles(raw)],
        f"backend {config.storage.backend}": [await storage_trouble(config, backend)],
        "clock": [clock_trouble(raw)],
        "file descriptors": [descriptor_trouble()],
        "keys": [config_trouble(Guard, config)],
        "TLS": [config_trouble(tls_context, config.server)],
    }
    await backend.close()
    for name, found in troubles.items():
        lines = [f"wrong  {name}: {trouble}" for trouble in found if trouble]
        print("\n".join(lines) or f"ok     {name}")
    if not troubles["keys"][0] and Guard(config).is_open:
        print("note   no API key is set, the API is open to everyone: set DROPZONE_API_KEY")
    return os.EX_CONFIG if any(any(found) for found in troubles.values()) else os.EX_OK


def config_trouble(use: Callable[..., object], config: Section) -> str | None:
    try:
        use(config)
    except ConfigError as error:
        return str(error)
    return None


def folder_troubles(raw: RawStore) -> list[str]:
    """Say what is wrong with the folders, without making them: their owner would be another."""
    device = existing(raw.raw).stat().st_dev
    folders = (raw.raw, raw.processed, raw.rejected, raw.journal)
    troubles = list(filter(None, map(writing_trouble, folders)))
    troubles += [
        f"{folder} is not on the file system of {raw.raw}: choose a folder that is"
        for folder in folders
        if existing(folder).stat().st_dev != device
    ]
    if raw.raw.is_dir() and os.access(raw.raw, os.R_OK):
        strays = raw.strays()
        troubles += [f"{raw.raw / name} is not named <uuid>.json: move it away" for name in strays]
    free, reserve = raw.room(existing(raw.raw))
    if free < reserve:
        troubles.append(f"the disk of {raw.raw} is nearly full: make room, payloads are refused")
    return list(dict.fromkeys(troubles))


def existing(path: Path) -> Path:
    """Return a path, or the nearest of its parents that is there."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))


def writing_trouble(folder: Path) -> str | None:
    there = existing(folder)
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        return None
    return f"{there} is not a folder that this user can write to: let it, or choose another"


async def storage_trouble(config: Config, backend: Backend) -> str | None:
    path = config.storage.sqlite.path
    if config.storage.backend == "sqlite" and not os.path.exists(path):
        return writing_trouble(path.parent)
    return await trouble_of(backend)


def clock_trouble(raw: RawStore) -> str | None:
    """Compare the clock with the last raw_id given out, and with the age of this program."""
    past = [datetime.fromtimestamp(Path(__file__).stat().st_mtime, UTC)]
    with contextlib.suppress(OSError, ValueError):  # nothing has landed
        past.append(arrival_of(UUID(bytes=(raw.journal / "last_raw_id").read_bytes())) or past[0])
    behind = max(past) - datetime.now(UTC)
    if behind < CLOCK_PATIENCE:
        return None
    return f"it is {behind} behind what has happened already: set it, and keep it by NTP"


def descriptor_trouble() -> str | None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most == resource.RLIM_INFINITY or most >= DESCRIPTORS:
        return None
    return f"{most} at most, each connection takes one: set LimitNOFILE= or ulimit -Hn to 65536"


CLOCK_PATIENCE = timedelta(minutes=5)
DESCRIPTORS = 4096


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="FILE", help="read this file instead of config.toml")
    common.add_argument("--host", help="listen on this address")
    common.add_argument("--port", type=int, help="listen on this port")
    title = "The landing zone between devices and a database."
    parser = argparse.ArgumentParser(parents=[common], description=title)
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(run=serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    runs = {"serve": serve, "ingest": ingest_files, "process": process_pending, "check": check}
    runs |= {"verify": verify, "rebuild": rebuild, "retry": retry_rejected, "compact": compact}
    runs |= {"key": list_keys}
    added = {}
    for name, run in runs.items():
        added[name] = commands.add_parser(name, parents=[common], help=run.__doc__)
        added[name].set_defaults(run=run)
    added["ingest"].add_argument("files", nargs="+", metavar="FILE", help="- is standard input")
    how = added["process"].add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="go on until stopped")
    how.add_argument("--limit", type=positive, help="process this many at most")
    for name in ("verify", "rebuild"):
        for bound, what in (("--since", "from"), ("--until", "before")):
            added[name].add_argument(bound, type=moment, help=f"rows {what} this moment alone")
        added[name].add_argument("--json", action="store_true", help="a JSON object on each line")
    added["rebuild"].add_argument("--dry-run", action="store_true", help="change nothing")
    added["retry"].add_argument("raw_ids", nargs="*", type=UUID, metavar="RAW_ID")
    added["retry"].add_argument("--code", help="rejected with this code")
    actions = added["key"].add_subparsers(metavar="ACTION")
    for name, run in (("list", list_keys), ("new", new_key)):
        added[name] = actions.add_parser(name, parents=[common], help=run.__doc__)
        added[name].set_defaults(run=run)
    added["new"].add_argument("name", type=key_name, metavar="NAME")
    many: dict[str, Any] = {"action": "append", "required": True, "choices": SCOPES}
    added["new"].add_argument("--scope", help="what the key opens; may be repeated", **many)
    return parser.parse_args(argv)


def moment(text: str) -> datetime:
    """Return a moment (UTC); argparse names this function in its error."""
    try:
        return parse_time_stamp(text)
    except DataQualityError as error:
        raise ValueError(error.detail) from None


def key_name(text: str) -> str:
    """Return the name of a key; argparse names this function in its error."""
    if not re.fullmatch(KEY_NAME, text):
        raise ValueError
    return text


def positive(text: str) -> int:
    """Return a whole number of 1 or more; argparse names this function in its error."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (of sysexits.h: 75 try again, 78 configuration)."""
    args = arguments(argv)
    given: dict[Setting, object] = {
        ("server", n): getattr(args, n) for n in ("host", "port") if n in args
    }
    try:
        config = load_config(getattr(args, "config", None), overrides=given)
        runs_on = args.run is serve or getattr(args, "watch", False)
        log_to_stderr(config.log, "" if runs_on else "warning")  # a command reports by itself
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            command = args.run(config, args)
            code: int = runner.run(until_stopped(command) if runs_on else command)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # what was done is done, and the next run goes on from there
        return 128 + signal.SIGINT
    except Timeout as error:
        print(f"dropzone: {error.lock_file} is held by another run; try again", file=sys.stderr)
        return os.EX_TEMPFAIL
    except BrokenPipeError:  # whoever read standard output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return os.EX_IOERR
    except (BackendError, DropzoneError) as error:
        print(f"dropzone: {error}", file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, ConfigError) else os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main())
