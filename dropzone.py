"""Dropzone: the landing zone between devices and a database.

The way of a payload, which is also the order of this file:

1. A device POSTs JSON to `/ingest`. The payload store (`backends/raw`) lands it together with what
   else has arrived: it appends the group to the journal and syncs that: from this point on the
   payloads are durable. Then it writes the exact bytes to `raw/<raw_id>.json`, those of a batch to
   one file for all its payloads; only then does the device get its 202.
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
import atexit
import base64
import codecs
import contextlib
import csv
import functools
import gc
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
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.process
import operator
import os
import pickle
import pwd
import re
import resource
import secrets
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import statistics
import struct
import sys
import tempfile
import threading
import time
import tomllib
import traceback
import warnings
import zlib
from array import array
from bisect import bisect_left
from calendar import isleap
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
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from ipaddress import IPv6Address
from pathlib import Path
from random import getrandbits, uniform
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    BinaryIO,
    ClassVar,
    Generic,
    Literal,
    NamedTuple,
    NoReturn,
    Self,
    TypeVar,
    cast,
    get_args,
)
from urllib.parse import quote, urlsplit
from uuid import UUID
from weakref import WeakValueDictionary

import msgspec
import prometheus_client as prometheus
from aiohttp import ClientError, ClientSession, HttpVersion11, StreamReader, web
from aiohttp.hdrs import METH_ALL
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.web_urldispatcher import AbstractRoute, MatchInfoError
from filelock import AsyncFileLock, FileLock, Timeout
from msgspec import Meta, Struct
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from tqdm import tqdm
from uuid_utils.compat import uuid7

from backends import (
    LATEST,
    NO_PAYLOAD,
    RESOLUTION,
    Backend,
    BackendError,
    BackendUnavailable,
    Bucket,
    Measurement,
    MeasurementNotFound,
    Series,
    create_backend,
    json_of,
    paired,
    same,
    timestamp_text,
    unhurried,
    winners,
)
from backends.raw import (
    DISCARDING,
    NODE_BITS,
    PIECE_BYTES,
    Activity,
    ArchiveAway,
    Archiving,
    Copied,
    FolderTaken,
    Form,
    KeyReused,
    NoAccess,
    Nodes,
    Observer,
    OpenPayload,
    PackDamaged,
    Payloads,
    PayloadStore,
    PayloadStoreError,
    PayloadUnreadable,
    Portion,
    RawIdElsewhere,
    RawIdUnknown,
    Rejection,
    Source,
    State,
    StorageFull,
    StorageUnavailable,
    arrival_of,
    day_of,
    first_of,
    payloads_in_name,
    raw_id_of,
    texts_of,
)
from backends.raw.archive import Archive, needs_obstore, url_trouble
from backends.raw.batches import (
    BLANK,
    LINE,
    NOT_FINITE,
    OBJECTS,
    RECORD_SEPARATOR,
    REFUSED,
    SURROGATE,
    elements_in,
    sequence_in,
    strict_text,
)
from backends.raw.batches import RAW as RAW_JSON
from backends.raw.disk import (
    FILE,
    FOLDER,
    Hands,
    access_trouble,
    denied,
    disk_errors,
    locked,
    make_folder,
    owner_of,
    set_aside,
    storage_error,
    sync_file,
    user_name,
    write_all,
    writing_trouble,
    wrong_owner,
)
from backends.raw.landing import RawStore

if TYPE_CHECKING:  # what few runs need is imported where the configuration is read for them
    from throttled import BaseRateLimiter

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
    that the problem document (RFC 9457) carries besides. An error has a class of its own where some
    code catches it.
    """

    code, status = "internal_error", 500

    def __init__(self, detail: str, code: str = "", status: int = 0, **extra: object) -> None:
        super().__init__(detail)
        self.detail, self.extra = detail, extra
        self.code, self.status = code or self.code, status or self.status

    def __reduce__(self) -> tuple[Callable[..., DropzoneError], tuple[()]]:
        make = functools.partial(type(self), self.detail, self.code, self.status, **self.extra)
        return make, ()


class ConfigError(DropzoneError):
    code = "config_invalid"


class WrongUser(ConfigError):
    """This user must not work here. `user` is the one who may, where there is one."""

    def __init__(self, detail: str, user: str = "") -> None:
        super().__init__(detail)
        self.user = user


class PayloadNotJson(DropzoneError):
    code, status = "payload_not_json", 400


class ProcessorBusy(DropzoneError):
    code, status = "processor_busy", 503


class DataQualityError(DropzoneError):
    """A payload that cannot become a measurement; `code` is one of `REJECTION_CODES`."""

    status = 422

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail, code)

    def __reduce__(self) -> tuple[Callable[..., DataQualityError], tuple[()]]:
        return functools.partial(type(self), self.code, self.detail), ()


REJECTION_CODES = (  # why a payload is rejected
    *("payload_not_json", "payload_not_object", "payload_unreadable"),
    *("time_stamp_missing", "time_stamp_invalid"),
    *("time_stamp_without_offset", "time_stamp_out_of_range", "time_stamp_implausible"),
    *("data_missing", "data_not_array", "data_empty"),
    *("value_not_numeric", "value_not_finite", "series_missing", "series_invalid"),
    "backend_refused",
)


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
        if not text:
            return
        from throttled.exceptions import DataError  # noqa: PLC0415 (see TYPE_CHECKING)

        try:
            self.limiter()
        except DataError:
            wrong = f"Expected such as `100/second` or `5000/minute`, got `{text}`"
            raise ValueError(wrong) from None

    def limiter(self) -> BaseRateLimiter:
        """Return what counts by it: a bucket that fills evenly (GCRA), for each key or address."""
        from throttled import MemoryStore, Throttled  # noqa: PLC0415 (see TYPE_CHECKING)

        return Throttled(using="gcra", quota=str(self), store=MemoryStore(options=COUNTED)).limiter


class SeriesAt(str):
    """Where a payload names its series: a member, or a JSON Pointer (RFC 6901); empty for nowhere.

    `names` are the members, or the indexes of arrays, that lead there.
    """

    __slots__ = ("names",)

    def __init__(self, text: str = "") -> None:
        self.names = _names_in(text)


def _names_in(text: str) -> tuple[str, ...]:
    """Return the reference tokens of a JSON Pointer, or a name; raises ValueError."""
    shown = json.dumps(text, ensure_ascii=False)
    wrong = f"Expected the name of a member or a JSON Pointer such as /device/id, got {shown}"
    is_plain = text.isprintable() and text == text.strip() and not {*text} & {'"', "\\"}
    if not is_plain or text.startswith(("#", "$")) or text == "/":
        raise ValueError(wrong)
    names: tuple[str, ...] = (text,) if text else ()
    if text.startswith("/"):
        if re.search(r"~(?![01])", text):
            raise ValueError(f"{wrong}: in a pointer, ~0 stands for ~ and ~1 for /")
        names = tuple(n.replace("~1", "/").replace("~0", "~") for n in text[1:].split("/"))
    if names and names[0] in ("time_stamp", "data"):
        raise ValueError(f"{wrong}: {names[0]} differs from payload to payload")
    return names


COUNTED = {"MAX_SIZE": 100_000}  # keys or addresses; beyond that the least recent is forgotten


class Section(Struct, frozen=True, forbid_unknown_fields=True):
    """A section of `config.toml`, where each setting is explained."""


ORIGIN = r"^(\*|https?://[^/,\s]+)\Z"


class ServerConfig(Section, frozen=True):
    host: str = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535)] = 8080
    max_body_bytes: Annotated[int, Meta(ge=1)] = 32 * 1024 * 1024
    body_seconds: Annotated[float, Meta(gt=0)] = 30.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_client_ca: Path | None = None
    cors_origins: tuple[Annotated[str, Meta(pattern=ORIGIN)], ...] = ()


class RawConfig(Section, frozen=True):
    dir: Path = Path("data/raw")
    processed_dir: Path | None = None
    rejected_dir: Path | None = None
    min_free_bytes: Annotated[int, Meta(ge=0)] = 256 * 1024 * 1024
    keep_days: Annotated[int, Meta(ge=0)] = 0
    compact: bool = False
    archive: str = ""
    keep_local_days: Annotated[int, Meta(ge=0)] = 0


class NodeConfig(Section, frozen=True):
    id: Annotated[int, Meta(ge=0, le=(1 << NODE_BITS) - 1)] | None = None  # 0 unless set


class ProcessConfig(Section, frozen=True):
    batch: Annotated[int, Meta(ge=1, le=100_000)] = 1000
    every: Annotated[float, Meta(ge=0)] = 0.0


class TransformConfig(Section, frozen=True):
    """The rules by which a payload becomes a measurement."""

    series: SeriesAt = SeriesAt()
    nulls: Literal["reject", "skip"] = "reject"
    not_before: Annotated[datetime, Meta(tz=True)] | None = None
    not_after_arrival: Annotated[float, Meta(ge=0)] | None = None  # seconds


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
    requests: bool = False


class Config(Section, frozen=True, dict=True):
    """Every setting, checked, with its paths made absolute.

    A configuration that was loaded knows the file that is its `source`, the `dotenv` that goes
    before it, the `keys_file` that holds further keys, all `files` that it depends on, whether they
    exist or not, and how to `reload` itself. One that a program has made by itself has none of
    these.
    """

    source: ClassVar[Path | None] = None
    dotenv: ClassVar[Path | None] = None
    keys_file: ClassVar[Path | None] = None
    files: ClassVar[Sequence[Path]] = ()
    reload: ClassVar[functools.partial[Config]]

    server: ServerConfig = ServerConfig()
    raw: RawConfig = RawConfig()
    node: NodeConfig = NodeConfig()
    process: ProcessConfig = ProcessConfig()
    transform: TransformConfig = TransformConfig()
    storage: StorageConfig = StorageConfig()
    auth: AuthConfig = AuthConfig()
    limits: LimitsConfig = LimitsConfig()
    log: LogConfig = LogConfig()


Setting = tuple[str, ...]  # ("storage", "sqlite", "path")
Table = dict[str, Any]


@dataclass(frozen=True)
class Given:
    """A setting, the place that gives it, and the folder from which its relative path counts."""

    place: object  # as an error names it
    home: Path
    setting: Setting
    value: object


def _settings_of(section: Section, prefix: Setting = ()) -> Iterator[Setting]:
    for name in section.__struct_fields__:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _settings_of(value, (*prefix, name))
        else:
            yield (*prefix, name)


VARIABLES: dict[str, Setting] = {
    **{"DROPZONE_" + "_".join(setting).upper(): setting for setting in _settings_of(Config())},
    "DROPZONE_API_KEY": ("auth", "api_key"),
    "DROPZONE_BACKEND": ("storage", "backend"),
    "DROPZONE_DATABASE_URL": ("storage", "postgres", "url"),
}
# Kubernetes sets these in every container beside a service that is named dropzone.
KUBERNETES_VARIABLE = re.compile(r"DROPZONE_(PORT|PORT_\d.*|SERVICE_HOST|SERVICE_PORT(_.*)?)")

# Some tools leave a variable as it stands: as a key it would be one that everybody knows.
NOT_FILLED_IN = re.compile(r"\$\{\w+[^}]*\}")


def load_config(
    path: str | Path | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[Setting, object] | None = None,
) -> Config:
    """Return the configuration: `overrides` > environment > `.env` > file > defaults.

    The file is `path`, or the one that `DROPZONE_CONFIG` names, or `config.toml` in the working
    directory (unless it has none of Dropzone's sections, as that of another program), or the one
    beside this program. `.env` is looked for in the same two folders. A relative path counts from
    the folder of the file that it stands in, in a variable from the working directory. A variable
    that is empty is ignored. Raises `ConfigError`, with a line for each wrong setting.
    """
    here = Path.cwd()
    dotenv = next(filter(_sets_ours, filter(os.path.isfile, _places(".env"))), None)
    variables = _variables(_read_dotenv(dotenv), dotenv.parent) if dotenv else []
    variables += _variables(environ, here)
    file = here / path if path else _config_file(variables)
    given = _in_file(file) if file else []
    given += _backend_for_url(variables)
    given += [each for each in variables if each.setting != CONFIG_FILE]
    for setting, value in (overrides or {}).items():
        given.append(Given("the command line", here, setting, value))
    defaults = Given("the defaults", file.parent if file else here, (), {})
    config = _with_all(Config(), [defaults, *given])
    _see_that_they_agree(config)
    if not any(each.setting == AUTH_KEYS and isinstance(each.value, str) for each in given):
        config.__dict__["keys_file"] = keys_file_of(config)
    config.__dict__["source"], config.__dict__["dotenv"] = file, dotenv
    files = ((file,) if file else _places("config.toml")) + _places(".env")
    config.__dict__["files"] = (*files, keys_file_of(config))
    config.__dict__["reload"] = functools.partial(
        load_config, file, environ=environ, overrides=overrides
    )
    return config


def _see_that_they_agree(config: Config) -> None:
    """Raise `ConfigError` where one setting needs another, or is no address."""
    if config.storage.backend == "postgres" and not config.storage.postgres.url:
        raise ConfigError("the postgres backend needs an address: set DROPZONE_DATABASE_URL")
    if config.raw.archive and url_trouble(config.raw.archive):
        raise ConfigError(f"raw.archive: {url_trouble(config.raw.archive)}")


CONFIG_FILE: Setting = ("DROPZONE_CONFIG",)
AUTH_KEYS: Setting = ("auth", "keys")


def keys_file_of(config: Config) -> Path:
    """Return the file of the keys that `key new` makes.

    It lies beside the payloads: the service's own user may write there, also in a container, and
    git tracks nothing of it.
    """
    return config.raw.dir.parent / "keys.toml"


def kept_keys(file: Path) -> tuple[KeyConfig, ...]:
    """Return the keys that such a file holds, none where there is no file."""
    if not os.path.exists(file):
        return ()
    trouble = access_trouble(file, os.R_OK)
    if trouble:
        raise ConfigError(trouble)
    given = _in_file(file)
    for each in given:
        if each.setting != AUTH_KEYS:
            wrong = f"{file} holds keys alone: move {'.'.join(each.setting)} to config.toml"
            raise ConfigError(wrong)
    return _with_all(Config(), given).auth.keys


def _places(name: str) -> tuple[Path, ...]:
    return Path.cwd() / name, Path(__file__).resolve().parent / name


def _config_file(variables: Sequence[Given]) -> Path | None:
    """Return the file that a variable names, or the first of ours in reach."""
    for each in reversed(variables):
        if each.setting == CONFIG_FILE:
            return each.home / str(each.value)
    places = _places("config.toml")
    return next(filter(_is_ours, filter(os.path.isfile, places)), None)


def _is_ours(file: Path) -> bool:
    """Say whether a file that was merely found has a section of Dropzone's, or none at all."""
    sections = _read_toml(file).keys()
    return not sections or bool(sections & {*Config.__struct_fields__})


def _sets_ours(file: Path) -> bool:
    """Say whether an .env has a variable of Dropzone's, or none at all."""
    names = _read_dotenv(file).keys()
    return not names or any(name.startswith("DROPZONE_") for name in names)


def _read_toml(file: Path) -> Table:
    with _reading(file):
        return tomllib.loads(file.read_text("utf-8"))


def _read_dotenv(file: Path) -> Mapping[str, str | None]:
    with _reading(file):
        from dotenv import dotenv_values  # noqa: PLC0415 (see TYPE_CHECKING)

        return dotenv_values(stream=io.StringIO(file.read_text("utf-8")))


def hand_on(config: Config) -> None:
    """Have the libraries of an archive see what `.env` says of credentials, as this program does.

    The environment goes before it.
    """
    if config.raw.archive and config.dotenv:
        for name, value in _read_dotenv(config.dotenv).items():
            if name.startswith(OF_STORES) and value and not os.environ.get(name):
                os.environ[name] = value


OF_STORES = ("AWS_", "AZURE_", "GOOGLE_")


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except PermissionError:
        me = user_name(os.geteuid())
        raise WrongUser(f"the settings in {file} are not for {me} to read", "root") from None
    except (OSError, ValueError) as error:  # also where it is no UTF-8
        raise ConfigError(f"{file} cannot be read: {error}") from None


def _in_file(file: Path) -> list[Given]:
    leaves = _leaves(_read_toml(file))
    return [Given(file, file.parent, setting, value) for setting, value in leaves]


def _leaves(table: Table, prefix: Setting = ()) -> Iterator[tuple[Setting, object]]:
    for key, value in table.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _variables(variables: Mapping[str, str | None], home: Path) -> list[Given]:
    for name, text in variables.items():
        if name.startswith("DROPZONE_") and text and NOT_FILLED_IN.fullmatch(text):
            raise ConfigError(f"{name} is {text}: the program that sets it has not filled it in")
    return [
        Given(name, home, VARIABLES.get(name, (name,)), text)
        for name, text in variables.items()
        if name.startswith("DROPZONE_") and text and not KUBERNETES_VARIABLE.fullmatch(name)
    ]


def _backend_for_url(variables: Sequence[Given]) -> list[Given]:
    """Choose PostgreSQL where DROPZONE_DATABASE_URL is set; another variable may still differ."""
    return [
        Given(each.place, each.home, ("storage", "backend"), "postgres")
        for each in variables
        if each.place == "DROPZONE_DATABASE_URL"
    ]


def _with_all(config: Config, given: Iterable[Given]) -> Config:
    wrong = []
    for each in given:
        try:
            config = _with(config, each)
        except ConfigError as error:
            wrong.append(error.detail)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return config


def _with(config: Config, given: Given) -> Config:
    """Return the configuration with one setting more."""

    def from_text(kind: type, text: object) -> object:
        if not isinstance(text, str):
            raise ValueError("Expected `str`")  # noqa: TRY004 (msgspec adds the place)
        if kind is Path or (kind is Place and text and "://" not in text):
            try:
                return kind(given.home / Path(text).expanduser())
            except RuntimeError as error:  # the home folder of a user that there is not
                raise ValueError(str(error)) from None
        return kind(text)

    try:
        value = given.value
        if isinstance(value, str):  # as all variables are
            if given.setting == AUTH_KEYS:
                value = msgspec.json.decode(value)
            elif given.setting == ("server", "cors_origins"):
                value = [origin.strip() for origin in value.split(",") if origin.strip()]
        for key in reversed(given.setting):
            value = {key: value}
        table = _merged(_plain(config), value)
        return msgspec.convert(table, Config, strict=False, dec_hook=from_text)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{given.place}: {error}") from None


def _plain(config: Config) -> Table:
    def as_text(value: object) -> str:
        return value.reveal() if isinstance(value, Secret) else str(value)

    table: Table = msgspec.to_builtins(config, enc_hook=as_text)
    return table


def _merged(old: object, new: object) -> object:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: _merged(old.get(key), value) for key, value in new.items()}


# ── Logs ──────────────────────────────────────────────────────────────────────────────────────────

LINES_WAITING = 10_000  # while nobody reads standard error; what is beyond is lost, and counted
LINES_TOGETHER = 0.01  # seconds for which a line waits for others
LINES_AT_ONCE = 500  # that are written together
LAST_LINES = 1.0  # seconds in which the last lines have to be written when the program ends
Facts = Mapping[str, object]


class TextLines(logging.Formatter):
    """Lines for people; the text behind a line break is indented, so that it forges no line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6]
        text = f"{at}Z {record.levelname} {record.name}: {record.getMessage()}"
        if record.exc_info:
            text += f"\n{self.formatException(record.exc_info)}"
        if text.isprintable():
            return text
        return "\n    ".join(map(_printable, text.split("\n")))


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class JsonLines(logging.Formatter):
    """A JSON object on each line: the facts of a record, or its message; and its exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": timestamp_text(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname,
            "logger": record.name,
        }
        line |= getattr(record, "facts", None) or {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:  # a file name or a header that was no UTF-8
            return json.dumps(line, default=str)


class StandardError(logging.Handler):
    """Writes each record to standard error at once, without a buffer that could stay locked."""

    def __init__(self, form: Literal["text", "json"], descriptor: int = 2) -> None:
        super().__init__()
        self.setFormatter(JsonLines() if form == "json" else TextLines())
        self._descriptor = descriptor

    def createLock(self) -> None:  # noqa: N802 (logging's own name)
        """Have no lock: one thread writes, and the end of the program must not wait for it."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        self.write([self.format(record)])

    def write(self, lines: Iterable[str]) -> None:
        """Write some lines together."""
        text = "".join([f"{line}\n" for line in lines])
        with contextlib.suppress(OSError):  # nobody reads it any more
            write_all(self._descriptor, text.encode(errors="backslashreplace"))


class LineQueue(logging.Handler):
    """Hands lines to a thread that writes them, so that nobody waits for a reader that stalls.

    Lines that come together are written together, and it does nothing else: a thread that is at
    work for each of them takes the interpreter from the event loop as often.
    """

    def __init__(self, out: StandardError) -> None:
        super().__init__()
        self._out = out
        self._lost = 0
        self.begin()

    def begin(self) -> None:
        """Start the thread; a process that was forked has to do it again."""
        self._waiting = deque[str]()
        self._is_writing = False
        self._wake = threading.Event()
        threading.Thread(target=self._write_forever, daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record over."""
        if len(self._waiting) >= LINES_WAITING:
            self._lost += 1
            return
        if self._lost:
            self._waiting.append(self._report())
            self._lost = 0
        try:
            self._waiting.append(self._out.format(record))
        except Exception:  # noqa: BLE001 (as any handler of logging does)
            self.handleError(record)
        if not self._wake.is_set():
            self._wake.set()

    def _report(self) -> str:
        lost = f"{self._lost} lines were lost, as nobody read standard error"
        report = logging.LogRecord(log.name, logging.WARNING, "", 0, lost, None, None)
        return self._out.format(report)

    def _write_forever(self) -> NoReturn:
        while True:
            self._wake.wait()
            time.sleep(LINES_TOGETHER)
            self._wake.clear()
            while self._waiting:
                self._is_writing = True
                count = min(len(self._waiting), LINES_AT_ONCE)
                self._out.write([self._waiting.popleft() for _ in range(count)])
                self._is_writing = False

    def finish(self) -> None:
        """Write the lines that wait, as far as somebody reads them: the end of the program."""
        if self._lost:
            self._waiting.append(self._report())
            self._wake.set()
        deadline = time.monotonic() + LAST_LINES
        while (self._waiting or self._is_writing) and time.monotonic() < deadline:
            time.sleep(0.005)


def log_to_stderr(config: LogConfig, level: str = "", *, queued: bool = True) -> None:
    """Set up logging, unless somebody has; audit lines come whatever the level.

    Unless `queued`, each line is written before the program goes on, as a command wants it that
    writes to standard error itself.
    """
    if logging.getLogger().handlers:
        return
    handler: logging.Handler = StandardError(config.format)
    if queued:
        handler = queue = LineQueue(StandardError(config.format))
        atexit.register(queue.finish)
        os.register_at_fork(after_in_child=queue.begin)
    logging.basicConfig(level=(level or config.level).upper(), handlers=[handler])
    # No line has these, and each record would look them up.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    audit_log.setLevel(logging.INFO)


def log_facts(logger: logging.Logger, level: int, facts: Facts) -> None:
    """Log facts: the members of a JSON line, `name=value` in text.

    Nobody has to look for the place in the program that they come from: it is always this one.
    """
    if logger.isEnabledFor(level):
        text, extra = FactsText(facts), {"facts": facts}
        logger.handle(
            logger.makeRecord(logger.name, level, __file__, 0, text, (), None, extra=extra)
        )


class FactsText:
    """Facts as text, which is made only when it is asked for: a log in JSON has no use for it."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts

    def __str__(self) -> str:
        return " ".join(f"{name}={_value_text(value)}" for name, value in self._facts.items())


def _value_text(value: object) -> str:
    """Return a value as text in which nothing can pass for another fact."""
    text = str(value)
    if text.isprintable() and " " not in text and '"' not in text:
        return text
    return json.dumps(text)


def audit(action: str, caller: str, **facts: object) -> None:
    """Log a change of state that a person or a key has caused."""
    log_facts(audit_log, logging.INFO, {"action": action, "caller": caller, **facts})


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


@functools.cache
def operator_name() -> str:
    """Return the user who runs a command, as audit lines name callers.

    The first call counts: root may take the identity of another user.
    """
    return f"cli:{user_name(os.getuid())}"


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────

LARGE_JSON = 64 * 1024  # bytes; a smaller document is parsed at once, however odd it is
ODD_AT_ONCE = 4 * 1024  # bytes of a body that is not strictly JSON, and is looked into at once
BATCH = 100_000  # payloads of one body
LINES = 4 * BATCH  # of one body, blank ones included
NOT_JSON_SHOWN = 1000  # lines


def parse_json(body: bytes) -> object:
    """Return the value of a JSON document (RFC 8259), or raise `PayloadNotJson` with the position.

    Also accepted, since devices send them: a byte order mark, NaN and infinities as JavaScript, C
    and MicroPython spell them, whatever the case and sign, and numbers beyond a double, which
    become infinities. Of equal names the last counts.
    """
    try:
        return msgspec.json.decode(body)  # several times as fast as `json`, but stricter
    except REFUSED:
        return _parse_leniently(body)


def check_json(body: bytes) -> None:
    """Raise `PayloadNotJson` where `parse_json` would; without values, in a tenth of the time."""
    try:
        RAW_JSON.decode(body)
        check_utf8(body)
    except REFUSED:
        if len(body) <= LARGE_JSON:
            _parse_leniently(body)
        else:
            strict_json(body)


def strict_json(body: bytes) -> bytes:
    """Return a document that `parse_json` accepts as one that is strictly JSON, or raise likewise.

    No values are made, which can take a gigabyte for a large document; see `strict_text`.
    """
    try:
        RAW_JSON.decode(body)
        check_utf8(body)
    except REFUSED:
        pass
    else:
        return body
    strict = strict_text(body)
    try:
        RAW_JSON.decode(strict)
        check_utf8(body)
    except RecursionError:
        raise PayloadNotJson("nested too deeply: send a flatter document") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(body, error.start, error.reason) from None
    except msgspec.DecodeError as error:
        [problem, position] = _problem_at(str(error), len(body))
        line_start = body.rfind(b"\n", 0, position) + 1
        line = 1 + body.count(b"\n", 0, position)
        place = f"line {line}, column {1 + position - line_start} (byte {position})"
        raise PayloadNotJson(f"not JSON: {problem} at {place}", position=position) from None
    return strict


def _problem_at(words: str, end: int) -> tuple[str, int]:
    """Return what msgspec says is wrong, and at which byte; a document cut short ends there."""
    found = re.fullmatch(r"JSON is malformed: (.*) \(byte (\d+)\)", words)
    return (found[1], int(found[2])) if found else ("it ends too early", end)


def check_utf8(body: bytes) -> None:
    """Raise `UnicodeDecodeError` where it is due; msgspec does not look into what it skips."""
    if not body.isascii():
        body.decode()


def _parse_leniently(body: bytes) -> object:
    mark = len(codecs.BOM_UTF8) if body.startswith(codecs.BOM_UTF8) else 0
    spelled = [found[1] for found in NOT_FINITE.finditer(body) if found[1]]
    if spelled:  # in the words of `json`, and as long, so that positions stay
        body = NOT_FINITE.sub(_as_json_spells, body)
    texts = iter(spelled)
    try:
        return json.loads(
            body[mark:].decode(), parse_int=_parse_int, parse_constant=lambda _: float(next(texts))
        )
    except RecursionError:
        raise PayloadNotJson("nested too deeply: send a flatter document") from None
    except UnicodeDecodeError as error:
        raise _not_utf8(body, mark + error.start, error.reason) from None
    except json.JSONDecodeError as error:
        problem = error.msg if error.doc.strip() else "the body is empty"
        position = mark + len(error.doc[: error.pos].encode())
        place = f"line {error.lineno}, column {error.colno} (byte {position})"
        raise PayloadNotJson(f"not JSON: {problem} at {place}", position=position) from None


def _as_json_spells(found: re.Match[bytes]) -> bytes:
    return b"NaN".rjust(len(found[1])) if found[1] else found[0]


def _not_utf8(body: bytes, position: int, reason: str) -> PayloadNotJson:
    line = 1 + body.count(b"\n", 0, position)
    place = f"line {line} (byte {position})"
    return PayloadNotJson(f"not UTF-8: {reason} at {place}", position=position)


class NotJson(NamedTuple):
    """A line of a batch that is no JSON: its number, its place among the payloads, and why."""

    line: int
    at: int
    detail: str


class Contents(NamedTuple):
    """What a body is: one payload, or a batch of a form (`backends.raw.batches`)."""

    form: Form = ""
    payloads: int = 1
    not_json: tuple[NotJson, ...] = ()  # the first of them


def contents_of(body: bytes, *, is_ndjson: bool, patient: bool = True) -> Contents:
    """Find out what a body is, however large; raises `PayloadNotJson` if nothing in it is JSON.

    One document is a payload, or a batch if it is an array of objects. Several documents are a
    batch, and so is whatever comes as NDJSON or begins with a whole document on its first line.
    What is not strictly JSON can take seconds: unless `patient`, raises one of `REFUSED` for it.
    """
    if is_ndjson:
        return _lines_of(body, patient=patient)
    try:
        return _document(body, body)
    except REFUSED:
        if not patient:
            raise
    try:
        return _document(strict_text(body), body)
    except REFUSED:
        return _documents_of(body)


ALONE = Contents()


def _document(strict: bytes, body: bytes) -> Contents:
    check_utf8(body)
    if not OBJECTS.match(strict):  # or else there may be millions of elements
        RAW_JSON.decode(strict)
        return ALONE
    count = 0
    for begin, _ in elements_in(strict):
        count += 1
        if strict[begin] != ord("{"):
            return ALONE
        if count > BATCH:
            break
    return _batch("json", count) if count else ALONE


def _documents_of(body: bytes) -> Contents:
    """Find out what a body is that is not one document."""
    with contextlib.suppress(*REFUSED):
        check_utf8(body)
        stretches = list(itertools.islice(sequence_in(strict_text(body)), BATCH + 1))
        if len(stretches) > 1 or RECORD_SEPARATOR in body:
            return _batch("ndjson" if _are_lines(body, stretches) else "json", len(stretches))
    first = LINE.search(body)
    if first and first[0].lstrip()[:1] in (b"{", b"["):
        with contextlib.suppress(PayloadNotJson):
            check_json(first[0])
            return _lines_of(body)
    check_json(body)
    return ALONE


def _are_lines(body: bytes, stretches: Sequence[tuple[int, int]]) -> bool:
    """Say whether there is a document on each line of a body."""
    gaps = itertools.pairwise(stretches)
    return (
        RECORD_SEPARATOR not in body
        and all(b"\n" in body[end:begin] for (_, end), (begin, _) in gaps)
        and not any(b"\n" in body[begin:end] for begin, end in stretches)
    )


def _lines_of(body: bytes, *, patient: bool = True) -> Contents:
    count, not_json = lines_in(body, patient=patient)
    if len(not_json) == count:
        raise _no_line_is_json(not_json)
    return _batch("ndjson", count, not_json)


def lines_in(body: bytes, *, patient: bool = True, before: int = 0) -> tuple[int, list[NotJson]]:
    """Return how many payloads are in lines, of which `before` come before, and the bad ones."""
    if not body or body.isspace():
        return 0, []
    if body.count(b"\n") > LINES:
        raise too_large(LINES, "lines")
    count, not_json = 0, list[NotJson]()
    is_utf8 = body.isascii() or not patient
    if not patient:
        check_utf8(body)
    for number, line in enumerate(body.split(b"\n"), before + 1):
        if not line.strip(BLANK):
            continue
        try:
            RAW_JSON.decode(line)
            if not is_utf8:
                check_utf8(line)
        except REFUSED:
            if not patient:
                raise
            with _noting(not_json, number, count):
                check_json(line)
        count += 1
    return count, not_json


def _no_line_is_json(bad: Sequence[NotJson]) -> PayloadNotJson:
    if not bad:
        return PayloadNotJson("no line has a document")
    number, _, detail = bad[0]
    return PayloadNotJson(f"line {number}: {detail}", line=number)


@contextlib.contextmanager
def _noting(not_json: list[NotJson], line: int, at: int) -> Iterator[None]:
    try:
        yield
    except PayloadNotJson as error:
        not_json.append(NotJson(line, at, str(error)))


def _batch(form: Form, payloads: int, not_json: Sequence[NotJson] = ()) -> Contents:
    if payloads > BATCH:
        raise too_large(BATCH, "payloads")
    return Contents(form, payloads, tuple(not_json[:NOT_JSON_SHOWN]))


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
ONE_SAMPLE = "SELECT value FROM samples WHERE sample = ?"
NOTE_IN_FLIGHT = "INSERT OR REPLACE INTO in_flight (process, bytes, at) VALUES (?, ?, ?)"
DROP_GONE = "DELETE FROM in_flight WHERE at < ? OR bytes = 0"
ALL_IN_FLIGHT = "SELECT coalesce(sum(bytes), 0) FROM in_flight"


class Durations:
    """How long answers of one kind took: a histogram."""

    def __init__(self) -> None:
        self.sum = 0.0
        self.counts = [0] * (len(SECONDS) + 1)  # up to each bound and above the one before; beyond

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum += seconds


class Answers(Collector):
    """How many requests were answered, by method, route and status, and how long that took.

    The event loop alone counts here, for each request. So no lock is needed, as each number of
    prometheus_client has one, and takes several times as long.
    """

    def __init__(self) -> None:
        self._labelled = dict[tuple[str, str, str], Durations]()
        self._known = dict[tuple[AbstractRoute, int], Durations]()  # the same, found faster

    def add(self, request: web.Request, status: int, seconds: float) -> None:
        """Count a request."""
        route = request.match_info.route
        durations = self._known.get((route, status))
        if durations is None:
            durations = self.of(*template_of(request), status)
            if route.resource:  # or else each request has its own
                self._known[route, status] = durations
        durations.add(seconds)

    def of(self, method: str, template: str, status: int) -> Durations:
        """Return what counts the answers with a status; it is shown from then on."""
        return self._labelled.setdefault((method, template, str(status)), Durations())

    def collect(self) -> Iterator[prometheus.Metric]:
        """Yield what was counted, as a Prometheus registry does."""
        route = ["method", "route"]
        requests = CounterMetricFamily(
            "dropzone_requests", "Requests answered", labels=[*route, "status"]
        )
        took = HistogramMetricFamily(
            "dropzone_request_duration_seconds", "Time until the answer", labels=route
        )
        of_route = dict[tuple[str, str], Durations]()
        for (method, template, status), durations in list(self._labelled.items()):
            count = sum(durations.counts)
            requests.add_metric([method, template, status], count)
            if count:
                total = of_route.setdefault((method, template), Durations())
                total.sum += durations.sum
                total.counts = list(map(operator.add, total.counts, durations.counts))
        bounds = [*map(str, SECONDS), "+Inf"]
        for labels, total in of_route.items():
            up_to = itertools.accumulate(total.counts)
            took.add_metric(labels, list(zip(bounds, up_to, strict=True)), total.sum)
        yield from (requests, took)


class Metrics:
    """Counters, histograms and gauges for Prometheus, of all processes of a data folder together.

    A process counts in memory and adds what is new to a file beside the journal, each second and
    before it shows the totals. So any worker answers for all, `process --watch` and the command
    line are seen, and counts outlive a restart; a `kill -9` takes those of a second.
    """

    def __init__(self) -> None:
        self._file = Path()
        self._connection: sqlite3.Connection | None = None
        self._turn = threading.Lock()
        self._shared: dict[str, float] = {}  # what of our own samples is in the file
        self._totals: dict[str, float] = {}  # what was in the file
        self._noted = 0  # bytes in flight, in the file
        self._failed = False
        self.own_in_flight: Callable[[], int] = int
        # registries of our own, as two applications may share a process
        self._counts, self._gauges = prometheus.CollectorRegistry(), prometheus.CollectorRegistry()
        count = functools.partial(prometheus.Counter, registry=self._counts)
        histogram = functools.partial(prometheus.Histogram, registry=self._counts)
        seconds = functools.partial(histogram, buckets=SECONDS)
        self.answers = Answers()
        self._counts.register(self.answers)
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
        self.discarded = count("dropzone_payloads_discarded", "Payloads that people discarded")
        self.superseded = count(
            "dropzone_superseded", "Payloads that met the row of another payload"
        )
        self._superseded_before = 0.0  # in the file, when this process began
        of = ["operation"]
        self.backend = seconds("dropzone_backend_duration_seconds", "Time that calls took", of)
        self.backend_errors = count("dropzone_backend_errors", "Calls that failed", of)
        self._archive = seconds("dropzone_archive_duration_seconds", "Time that requests took", of)
        self._archive_errors = count("dropzone_archive_errors", "Requests that failed", of)
        self._begin_at_zero()
        self._add_gauges()

    def _add_gauges(self) -> None:
        gauge = functools.partial(prometheus.Gauge, registry=self._gauges)
        self._in_flight = gauge("dropzone_in_flight_bytes", "Bodies that are not answered yet")
        self.pending = gauge("dropzone_payloads_pending", "Payloads that wait to be processed")
        self.oldest = gauge(
            "dropzone_oldest_pending_age_seconds", "Time since the oldest of them arrived"
        )
        self.last_landed = gauge(
            "dropzone_last_landed_timestamp_seconds", "When the last payload landed, 0 for never"
        )
        self.free = gauge("dropzone_data_free_bytes", "Free on the file system of the data folder")
        self.reserve = gauge("dropzone_data_reserve_bytes", "Below this payloads are refused")
        self.backend_up = gauge("dropzone_backend_up", "1 if the backend answers, 0 if not")
        self.series = gauge("dropzone_series", "Series that have rows")
        self.silent = gauge("dropzone_series_silent", "Those whose last row is an hour old")
        self.to_archive = gauge("dropzone_packs_to_archive", "Packs that the archive lacks")
        gauge("dropzone_build_info", "What runs here", ["version"]).labels(__version__).set(1)
        prometheus.ProcessCollector(registry=self._gauges)  # of the process that answers

    def _begin_at_zero(self) -> None:
        """Show a counter before there is something to count.

        Prometheus sees no increase in one that appears with its first value.
        """
        for code in REJECTION_CODES:
            self.rejected.labels(code)
        for code in REFUSAL_CODES:
            self.refusals.labels(code)
        for route in ROUTES:
            for status in route.statuses():
                self.answers.of(route.method, route.path, status)
        for name, call in vars(Backend).items():
            if inspect.iscoroutinefunction(call):
                self.backend_errors.labels(name)
        for operation in ("list", "get", "put", "delete"):
            self._archive_errors.labels(operation)

    def landed(self, payloads: int, size: int, seconds: float, sync_seconds: float) -> None:
        """Count a group: see `backends.raw.Observer`."""
        self._payloads.inc(payloads)
        self._bytes.inc(size)
        self._group.observe(payloads)
        self._land.observe(seconds)
        self._sync.observe(sync_seconds)

    def asked_archive(self, operation: str, seconds: float, is_wrong: bool) -> None:  # noqa: FBT001
        """Count a request to the archive: see `backends.raw.Observer`."""
        self._archive.labels(operation).observe(seconds)
        if is_wrong:
            self._archive_errors.labels(operation).inc()

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
            own = samples_of(self._counts.collect())
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

    def superseded_since_start(self) -> int:
        """Return what all processes have counted since this one began. Blocks on disk."""
        with self._turn:
            [(sample, own)] = samples_of(self.superseded.collect()).items()
            found = self._superseded_before
            with contextlib.suppress(sqlite3.Error):
                if self._connection and self._totals:
                    [found] = self._connection.execute(ONE_SAMPLE, [sample]).fetchone()
            return int(found - self._superseded_before + own - self._shared.get(sample, 0))

    def _exchange(self, fresh: Mapping[str, float], in_flight: int) -> None:
        if self._connection is None:
            self._process = str(uuid7())
            self._connection = sqlite3.connect(self._file, check_same_thread=False)
        is_first = not self._totals
        if is_first:
            for statement in OPEN_METRICS:
                self._connection.execute(statement)
        with self._connection as file:  # one transaction
            new = (each for each in fresh.items() if each[1] or each[0] not in self._shared)
            file.executemany(ADD_SAMPLE, new)
            file.execute(NOTE_IN_FLIGHT, (self._process, in_flight, time.time()))
            file.execute(DROP_GONE, (time.time() - GONE,))
            self._totals = dict(file.execute(ALL_SAMPLES))
            if is_first:
                [sample] = samples_of(self.superseded.collect())
                self._superseded_before = self._totals[sample] - fresh[sample]
            self._in_flight.set(file.execute(ALL_IN_FLIGHT).fetchone()[0])

    @contextlib.asynccontextmanager
    async def shared(self, folder: Path) -> AsyncIterator[None]:
        """Share what is counted with the other processes of a folder, until the very end."""
        self._file = folder / "metrics.sqlite"
        sharing = asyncio.create_task(self._share_forever())
        try:
            yield
        finally:
            sharing.cancel()
            await asyncio.to_thread(self._close)

    async def _share_forever(self) -> None:
        while True:
            await asyncio.sleep(SHARE_EVERY)
            await asyncio.to_thread(self.share, quietly=True)

    def _close(self) -> None:
        self.own_in_flight = int
        self.share(quietly=True)
        if self._connection:
            self._connection.close()
            self._connection, self._totals = None, {}


def samples_of(families: Iterable[prometheus.Metric]) -> dict[str, float]:
    """Return what was counted, by the names under which the processes share it."""
    return {
        msgspec.json.encode((family.name, sample.name, sample.labels)).decode(): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


# ── Transform: a payload becomes a measurement (pure functions) ───────────────────────────────────

TIME_STAMP = re.compile(
    r"(?P<day>\d{4}-?(?:\d\d-?\d\d|W\d\d-?\d|(?P<ordinal>\d{3})))"  # calendar, week, ordinal
    r"(?:[T ](?P<hour>\d\d)"
    r"(?:(?P<colon>:?)(?P<minute>\d\d)(?:(?P=colon)(?P<second>\d\d)(?:[.,](?P<fraction>\d+))?)?)?"
    r"(?P<offset>Z|[+-](?P<hours>[01]\d|2[0-3])(?::?(?P<minutes>[0-5]\d))?)?)?",
    re.ASCII | re.IGNORECASE,
)
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:Z|[+-]\d\d:[0-5]\d)", re.ASCII)
SHOWN = 60  # characters of a bad value that an error shows
GOOD_STAMP = "2019-05-01T06:00:00-04:00"
SEND_GOOD = f"send ISO 8601 with an offset, such as {GOOD_STAMP}"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LONGEST_FORM = 80  # characters; a longer text has none of these forms
# Forms of a time stamp that are not read: a name, a pattern to know it by, and what to put in the
# place of the pattern where it is certain what is meant. They are looked for in this order.
UNREAD_FORMS = (
    ("white space around it", r"^\s+|\s+$", ""),
    ("the name of a zone in brackets (RFC 9557)", r" ?\[[^\[\]]*\]$", ""),
    ("the name of a zone behind its offset", r"([+-]\d\d:?\d\d) \(?[a-z].*$", r"\1"),
    ("UTC or GMT in the place of Z", r"(?<=\d) ?(?:UTC|GMT)$", "Z"),
    ("UTC or GMT before the offset", r"(?<=\d) ?(?:UTC|GMT)(?=[+-]\d)", ""),
    ("a space before the offset", r"(?<=\d) +(?=Z$|[+-]\d)", ""),
    ("no hyphens in the date", r"^(\d{4})([/._])(\d\d?)\2(\d\d?)(?!\d)", r"\1-\3-\4"),
    ("one digit in the place of two", r"(?<=[-:T+])(?<!W\d\d-)\d(?=[-:TZ ]|$)", r"0\g<0>"),
    ("one digit in the place of two", r"(?<= )\d(?=:)", r"0\g<0>"),
    ("no T before the time of day", r"^(\d{4}(?:-\d\d){2})(?![T ]\d)[^\d+-]{0,3}(?=\d\d:)", r"\1T"),
    ("no T before the time of day", r"^(\d{4}(?:-\d\d){2})-(?=\d\d:\d\d:)", r"\1T"),
    ("no T before the time of day", r"^(\d{8})(?=\d{4}(?:\d\d)?(?:\D|$))", r"\1T"),
    ("a colon before the fraction", r"(?<=\d:\d\d:\d\d):(?=\d)", "."),
    ("hours of a.m. and p.m.", r"\d ?[ap]\.?m\b", None),
    ("the name of a month", r"\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)", None),
    ("a date whose year is not first", r"^\d\d?(?:[/.]\d\d?[/.]\d\d|-\d\d?-\d{4})", None),
    ("a year of two digits", r"^\d\d-\d\d-\d\d[T ]", None),
    ("a year that has not four digits alone", r"^(?:[+-]\d{4,}|\d{5,})-\d\d-\d\d", None),
    ("a time of day without a date", r"^T?\d\d:\d\d", None),
    ("a date without a time of day", r"^\d{4}-\d\d-\d\dT?(?:Z|[+-]\d\d:?\d\d)$", None),
    ("a week or a month without its day", r"^\d{4}-W?\d\d(?:[T ]|Z?$)", None),
    ("a fraction of an hour or a minute", r"[T ]\d\d(?::?\d\d)?[.,]\d", None),
    ("a colon missing in the time of day", r"T\d\d(?::\d{4}|\d\d:)", None),
    ("an offset with seconds", r"T.*[+-]\d\d:\d\d:\d\d$", None),
    ("an offset that there is not", r"T.*[+-](?:2[4-9]|[3-9]\d|\d\d:?[6-9]\d)", None),
    ("the name of a zone, no offset", r"\d ?[a-z]{3,}(?:[/_][a-z_]+)*$", None),
)
# A number, but not the digits of a calendar date with its time of day.
NUMBER = re.compile(r"(?!(?:19|20)\d\d[01]\d[0-3]\d(?:\d\d){2,3}$)-?\d+(?:\.\d*)?", re.ASCII)
IN_A_SECOND = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}


class GoodPayload(Struct):
    """What a payload looks like in which nothing is wrong."""

    time_stamp: str
    data: list[float]


GOOD_PAYLOAD = msgspec.json.Decoder(GoodPayload)
RULES = TransformConfig()
EXPONENTS = 64  # letters e in a text of numbers, from which on msgspec may be the slower way


def transform(raw_id: UUID, body: bytes, rules: TransformConfig = RULES) -> Measurement:
    """Return the measurement that a payload stands for, or raise `DataQualityError`.

    The payload is a JSON object with `time_stamp` (see `parse_time_stamp`) and `data`, an array of
    at least one finite number. Other members are left alone. The `rules` may let nulls in `data` be
    gaps, refuse time stamps that no working clock can have had, and say which member names the
    series.
    """
    made = _transformed(raw_id, body, rules)
    if rules.not_before is not None or rules.not_after_arrival is not None:
        _check_clock(made, rules)
    if rules.series:
        return msgspec.structs.replace(made, series=series_in(body, rules.series))
    return made


def _check_clock(made: Measurement, rules: TransformConfig) -> None:
    """Raise where the rules say that a device's clock was wrong."""
    moment, arrival = made.timestamp_utc, arrival_of(made.raw_id)
    if rules.not_before is not None and moment < rules.not_before:
        wrong = f"is before [transform] not_before, {timestamp_text(rules.not_before)}"
    elif arrival is None or rules.not_after_arrival is None:
        return
    elif (moment - arrival).total_seconds() > rules.not_after_arrival:
        limit = f"more than the {rules.not_after_arrival:g} s of [transform] not_after_arrival"
        wrong = f"is {moment - arrival} later than its arrival, {limit}"
    else:
        return
    clock = "set the clock of the device"
    raise DataQualityError(
        "time_stamp_implausible", f"time_stamp {timestamp_text(moment)} {wrong}: {clock}"
    )


def _transformed(raw_id: UUID, body: bytes, rules: TransformConfig) -> Measurement:
    if len(body) > LARGE_JSON:
        return _transform_large(raw_id, body, rules)
    try:  # the way of nearly all, several times as fast as finding out what is wrong
        if not has_many_exponents(body):
            good = GOOD_PAYLOAD.decode(body)
            check_utf8(body)
            if good.data:  # all finite, as the decoder takes no other numbers
                mean, std_dev = mean_and_std_dev(good.data)
                return Measurement(parse_time_stamp(good.time_stamp), mean, std_dev, raw_id)
    except REFUSED:
        pass
    return _transform_carefully(raw_id, body, rules)


def _transform_carefully(raw_id: UUID, body: bytes, rules: TransformConfig) -> Measurement:
    try:
        document = parse_json(body)
    except PayloadNotJson as error:
        raise DataQualityError(error.code, error.detail) from None
    if not isinstance(document, dict):
        raise _no_object(_shown(document))
    if "time_stamp" not in document:
        raise DataQualityError("time_stamp_missing", "the payload has no time_stamp")
    timestamp_utc = parse_time_stamp(document["time_stamp"])
    if "data" not in document:
        raise DataQualityError("data_missing", "the payload has no data")
    mean, std_dev = mean_and_std_dev(_finite_values(document["data"], rules))
    return Measurement(timestamp_utc, mean, std_dev, raw_id)


def _no_object(shown: str) -> DataQualityError:
    return DataQualityError("payload_not_object", f"the payload is {shown}, no object")


def has_many_exponents(text: bytes) -> bool:
    """Say whether a text may have so many numbers with exponents that msgspec is slow.

    As few texts have any, looking for the next is quicker than counting all.
    """
    count = 0
    for letter in (b"e", b"E"):
        at = text.find(letter)
        while at >= 0 and count < EXPONENTS:
            count += 1
            at = text.find(letter, at + 1)
    return count >= EXPONENTS


class LargePayload(Struct):
    """The members of a large payload that count, as text; empty where they are missing."""

    time_stamp: msgspec.Raw = msgspec.Raw()
    data: msgspec.Raw = msgspec.Raw()


LARGE_PAYLOAD = msgspec.json.Decoder(LargePayload)


def _transform_large(raw_id: UUID, body: bytes, rules: TransformConfig) -> Measurement:
    """Do as `_transform_carefully`, but without the values of the document, which may take 1 GB."""
    try:
        payload = LARGE_PAYLOAD.decode(strict_json(body))
    except PayloadNotJson as error:
        raise DataQualityError(error.code, error.detail) from None
    except msgspec.ValidationError:
        raise _no_object(_shown_text(body)) from None
    time_stamp, data = memoryview(payload.time_stamp), memoryview(payload.data)
    if not time_stamp:
        raise DataQualityError("time_stamp_missing", "the payload has no time_stamp")
    timestamp_utc = _large_time_stamp(time_stamp)
    if not data:
        raise DataQualityError("data_missing", "the payload has no data")
    mean, std_dev = mean_and_std_dev(_many_finite_values(data, rules))
    return Measurement(timestamp_utc, mean, std_dev, raw_id)


LONGEST_SERIES = 200  # characters
SERIES_BYTES = 4096  # of JSON, which that many characters never are, however they are escaped
SEND_SERIES = f"send a text of 1 to {LONGEST_SERIES} printable characters, or a whole number"
ELEMENTS = msgspec.json.Decoder(list[msgspec.Raw])


def series_in(body: bytes, at: SeriesAt) -> str:
    """Return the series that a payload names there, "" where `at` is empty.

    A whole number counts as its decimal text. Raises `DataQualityError` and `PayloadNotJson`.
    """
    if not at:
        return ""
    try:
        text = _text_at(body, at)
    except REFUSED:  # it is not strictly JSON
        if len(body) <= LARGE_JSON:
            return _series_of(_value_at(parse_json(body), at), at)
        # A name with surrogates, which `strict_json` would alter, becomes one that is refused.
        text = _text_at(strict_json(SURROGATE.sub(rb"\\b\\b\\b", body)), at)
    if len(text) > SERIES_BYTES:
        raise _no_series(_shown_text(text), at)
    return _series_of(parse_json(text), at)


def _series_of(value: object, at: SeriesAt) -> str:
    text = str(value) if type(value) is int else value
    if isinstance(text, str) and 0 < len(text) <= LONGEST_SERIES and text.isprintable():
        return text
    raise _no_series(_shown(value), at)


def _no_series(shown: str, at: SeriesAt) -> DataQualityError:
    wrong = f"{at} is {shown}, which names no series ([transform] series): {SEND_SERIES}"
    return DataQualityError("series_invalid", wrong)


def _series_missing(at: SeriesAt) -> DataQualityError:
    wrong = f"the payload has no {at}, which has to name its series ([transform] series)"
    return DataQualityError("series_missing", f"{wrong}: {SEND_SERIES}")


@functools.cache
def _decoder_of(name: str) -> Callable[[bytes], Any]:
    """Return what reads the text of one member of an object, and skips the others."""
    value = ("value", msgspec.Raw, msgspec.Raw())
    return msgspec.json.Decoder(msgspec.defstruct("Member", [value], rename={"value": name})).decode


def _text_at(body: bytes, at: SeriesAt) -> bytes:
    """Return the JSON of what is at a place in a document; raises one of `REFUSED`."""
    text = body
    for name in at.names:
        try:
            text = bytes(_decoder_of(name)(text).value)
        except msgspec.ValidationError:  # no object
            text = bytes(_members_of(text).get(name, b""))
        if not text:
            raise _series_missing(at)
    return text


def _members_of(array: bytes) -> dict[str, msgspec.Raw]:
    with contextlib.suppress(msgspec.ValidationError):
        return {str(index): each for index, each in enumerate(ELEMENTS.decode(array))}
    return {}


def _value_at(document: object, at: SeriesAt) -> object:
    """Return what is at a place in a document."""
    value = document
    for name in at.names:
        if isinstance(value, list):
            value = {str(index): each for index, each in enumerate(value)}
        if not isinstance(value, dict) or name not in value:
            raise _series_missing(at)
        value = value[name]
    return value


def time_stamp_in(body: bytes) -> datetime:
    """Return the moment (UTC) that the time stamp of a payload names, and look at nothing else.

    Raises `DataQualityError` and `PayloadNotJson`.
    """
    if len(body) <= LARGE_JSON:
        document = parse_json(body)
        return parse_time_stamp(document.get("time_stamp") if isinstance(document, dict) else None)
    with contextlib.suppress(msgspec.ValidationError):  # no object
        text = memoryview(LARGE_PAYLOAD.decode(strict_json(body)).time_stamp)
        if text:
            return _large_time_stamp(text)
    return parse_time_stamp(None)


def _large_time_stamp(text: memoryview) -> datetime:
    if len(text) <= LARGE_JSON:
        return parse_time_stamp(parse_json(bytes(text)))
    wrong = f"time_stamp is {_shown_text(text)}: {len(text)} bytes; {SEND_GOOD}"
    raise DataQualityError("time_stamp_invalid", wrong)


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False).encode(errors="backslashreplace").decode()
    except RecursionError:
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _shown_text(text: bytes | memoryview) -> str:
    """Show the begin of a long text in JSON."""
    return bytes(text[: 4 * SHOWN]).decode(errors="replace")[:SHOWN] + "…"


def parse_time_stamp(value: object) -> datetime:
    """Return the moment in UTC that a time stamp names (RFC 3339; ISO 8601, see its page in docs/).

    A date of ISO 8601 is one of the calendar, of a week or an ordinal one. Digits finer than a
    microsecond are cut off. 24:00 is the midnight that ends its day, and a leap second (23:59:60
    UTC) counts as the second after it, as in POSIX time and in PostgreSQL.
    """
    if quick := _quick_time_stamp(value):
        return quick
    match = TIME_STAMP.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        hint = _advice_on(value)
        raise DataQualityError("time_stamp_invalid", f"time_stamp is {_shown(value)}: {hint}")
    if not match["offset"]:
        hint = "add Z or an offset such as -04:00"
        if not match["hour"]:
            hint = f"a date alone; send a time of day and an offset, too, such as {GOOD_STAMP}"
        raise DataQualityError(
            "time_stamp_without_offset", f"time_stamp is {_shown(value)}: {hint}"
        )
    try:
        moment = _date_of(match) + (_time_of_day(match) - _offset(match))
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


def _date_of(match: re.Match[str]) -> datetime:
    """Return the midnight (UTC) with which the date of a time stamp begins."""
    text, ordinal = match["day"].upper(), match["ordinal"]
    if ordinal:
        year = int(text[:4])
        if not 1 <= int(ordinal) <= 365 + isleap(year):
            raise ValueError(f"there is no day {ordinal} in that year")
        return datetime(year, 1, 1, tzinfo=UTC) + timedelta(days=int(ordinal) - 1)
    if text.count("-") == 1:
        raise ValueError(f"one hyphen in the date; {SEND_GOOD}")
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def _advice_on(value: object) -> str:
    """Say which form a time stamp has that is not read, and what to send instead."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return f"no text; {SEND_GOOD}"
    text = value if isinstance(value, str) else repr(value)
    if len(text) > LONGEST_FORM or not text.isascii():
        return f"not an ISO 8601 date and time in ASCII; {SEND_GOOD}"
    if NUMBER.fullmatch(text):
        return _advice_on_number(float(text))
    names, text = _unread_forms_of(text)
    if not names:
        return f"not an ISO 8601 date and time; {SEND_GOOD}"
    if TIME_STAMP.fullmatch(text):
        with contextlib.suppress(DataQualityError):
            parse_time_stamp(text)
            return f"{', '.join(names)}; send {text}"
    return f"{', '.join(names)}; {SEND_GOOD}"


def _unread_forms_of(text: str) -> tuple[list[str], str]:
    """Return the names of the forms that a text has, and the text as it should be."""
    names = dict[str, None]()  # each once, in order
    for name, pattern, instead in UNREAD_FORMS:
        changed, count = re.subn(pattern, instead or "", text, flags=re.ASCII | re.IGNORECASE)
        if count:
            names[name] = None
            text = text if instead is None else changed
    return list(names), text


def _advice_on_number(number: float) -> str:
    """Say which moment of the years 1973 to 2286 a number may stand for."""
    for unit, count in IN_A_SECOND.items():
        seconds = number / count
        if 1e8 <= seconds < 1e10:
            moment = timestamp_text(EPOCH + timedelta(seconds=seconds))
            return f"a number; if it counts {unit} since 1970, send {moment}"
    return f"a number; {SEND_GOOD}"


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


NO_VALUES = "a mean needs at least one number"
GAPS = '[transform] nulls = "skip" takes nulls for gaps'


def _finite_values(data: object, rules: TransformConfig) -> list[float]:
    if not isinstance(data, list):
        raise DataQualityError("data_not_array", f"data is {_shown(data)}, no array of numbers")
    values = _without_gaps(data, rules)
    if not values:
        only_nulls = "has only nulls" if data else "is empty"
        raise DataQualityError("data_empty", f"data {only_nulls}: {NO_VALUES}")
    try:
        if set(map(type, values)) <= {float, int}:
            values = list(map(float, values))
            if all(map(math.isfinite, values)):
                return values
    except OverflowError:  # an integer beyond a double
        pass
    raise _bad_value(data, rules)


def _without_gaps(data: list[Any], rules: TransformConfig) -> list[Any]:
    if rules.nulls == "skip" and None in data:
        return [value for value in data if value is not None]
    return data


def _bad_value(data: list[Any], rules: TransformConfig) -> DataQualityError:
    """Name the first value that is no number; if all are numbers, the first that is not finite."""
    numbers = (float, int, type(None)) if rules.nulls == "skip" else (float, int)
    for index, value in enumerate(data):
        if type(value) not in numbers:
            return _no_number(index, _shown(value))
    index = next(
        i for i, v in enumerate(data) if v is not None and not abs(v) <= sys.float_info.max
    )
    wrong = f"data[{index}] is {_shown(data[index])}, no finite double"
    return DataQualityError("value_not_finite", wrong)


def _no_number(index: int, shown: str) -> DataQualityError:
    advice = f" ({GAPS})" if shown == "null" else ""
    return DataQualityError("value_not_numeric", f"data[{index}] is {shown}, no number{advice}")


PIECE = 16 * 1024  # bytes of a large array that are read at a time
COMMA = re.compile(rb",")
ELEMENT = re.compile(rb"\s*(?:(-?\d[^\s,\]]*)|(\"\x7f+\")|(null))\s*(?:,|\Z)")
NUMBERS = msgspec.json.Decoder(list[float])


def _many_finite_values(text: memoryview, rules: TransformConfig) -> array[float]:
    """Do as `_finite_values` with the text of a large array."""
    if text[0] != ord("["):
        raise DataQualityError(
            "data_not_array", f"data is {_shown_text(text)}, no array of numbers"
        )
    if not bytes(text[1:-1]).strip():
        raise DataQualityError("data_empty", f"data is empty: {NO_VALUES}")
    values = array("d")
    try:
        for piece in _pieces_of(text):
            values.extend(_numbers_in(piece, rules))
    except (*REFUSED, ValueError, DataQualityError):
        raise _bad_value_in(text, rules) from None
    if not values:
        raise DataQualityError("data_empty", f"data has only nulls: {NO_VALUES}")
    return values


def _pieces_of(text: memoryview) -> Iterator[bytes]:
    """Cut an array at commas; where it has numbers alone, the pieces are arrays as well."""
    start, end = 1, len(text) - 1
    while start < end:
        comma = COMMA.search(text, start + PIECE, end)
        stop = comma.start() if comma else end
        yield b"".join((b"[", text[start:stop], b"]"))
        start = stop + 1


def _numbers_in(piece: bytes, rules: TransformConfig) -> list[float]:
    """Return the numbers of an array; raises where it has anything but finite ones, and gaps.

    msgspec is the fastest, but takes microseconds for some numbers with exponents.
    """
    if not has_many_exponents(piece):
        with contextlib.suppress(*REFUSED):
            return NUMBERS.decode(piece)
    values = json.loads(piece)
    if rules.nulls == "skip" and not any(value is not None for value in values):
        return []
    return _finite_values(values, rules)


def _bad_value_in(text: memoryview, rules: TransformConfig) -> DataQualityError:
    """Do as `_bad_value` with the text of a large array."""
    index, not_finite = 0, None
    for piece in _pieces_of(text):
        with contextlib.suppress(*REFUSED, ValueError, DataQualityError):
            _numbers_in(piece, rules)
            index += piece.count(b",") + 1
            continue
        inner = memoryview(piece)[1:-1]
        position = 0
        while position < len(inner):
            element = ELEMENT.match(inner, position)
            if element is None or (element[3] and rules.nulls == "reject"):
                return _no_number(index, "null" if element else _shown_text(inner[position:]))
            is_finite = element[3] or (element[1] and math.isfinite(float(element[1])))
            if not_finite is None and not is_finite:
                shown = "NaN or an infinity" if element[2] else _shown_text(element[1])
                not_finite = f"data[{index}] is {shown}, no finite double"
            index, position = index + 1, element.end()
    return DataQualityError("value_not_finite", not_finite or "data is no array of numbers")


AT_ONCE = 65_536  # values whose deviations are in memory at a time
MUCH_GREATER = 2.0**30  # times the unit in the last place of a mean
DOWN = 2.0**-32  # a scale at which no sum of a payload leaves the range of a double


def mean_and_std_dev(values: Sequence[float]) -> tuple[float, float]:
    """Return the arithmetic mean and the population standard deviation of finite values.

    Two passes with exact sums: the mean is within 1 ulp, the deviation within a few. Where sums
    leave the range of a double, exact fractions and a smaller scale take over.
    """
    try:
        mean = math.fsum(values) / len(values)
        std_dev = _deviation(values, mean)
        if math.isfinite(std_dev):
            return mean, std_dev
    except OverflowError:  # of fsum, near 1e308
        pass
    mean = statistics.mean(values)
    scaled = array("d", map(operator.mul, values, itertools.repeat(DOWN)))
    return mean, min(_deviation(scaled, mean * DOWN) / DOWN, sys.float_info.max)


def _deviation(values: Sequence[float], mean: float) -> float:
    """Return the root of the mean square of the deviations from a mean that was rounded.

    The rounding error of the mean is the mean of the deviations from it, and is taken out of them
    again (the corrected two-pass algorithm: Chan, Golub, LeVeque, 1983), unless the deviation is so
    much greater that it makes no difference; `math.dist` scales, so that squares neither overflow
    nor vanish.
    """
    count = len(values)
    if count <= AT_ONCE:
        deviation = math.dist(values, itertools.repeat(mean, count)) / math.sqrt(count)
        if deviation > MUCH_GREATER * math.ulp(mean):
            return deviation
        deviations = list(map(operator.sub, values, itertools.repeat(mean)))
        residual = math.fsum(deviations) / count
        return math.dist(deviations, itertools.repeat(residual, count)) / math.sqrt(count)
    residual = math.fsum(map(operator.sub, values, itertools.repeat(mean))) / count
    distances = list[float]()
    for start in range(0, count, AT_ONCE):
        portion = values[start : start + AT_ONCE]
        deviations = list(map(operator.sub, portion, itertools.repeat(mean)))
        distances.append(math.dist(deviations, itertools.repeat(residual, len(portion))))
    return math.hypot(*distances) / math.sqrt(count)


# ── Processing: pending payloads become rows ──────────────────────────────────────────────────────

LOCK_PATIENCE = 10.0  # seconds that a second processor waits for the first
LONGEST_PAUSE = 60.0  # seconds between two tries while the backend is away
STUCK_PAUSE = 10.0  # seconds, while the data folder has payloads that cannot be read or moved
REJECTIONS_SHOWN = 1000
LOOK_PATIENCE = 0.5  # seconds after which a caller gets what was found before
LOOK_PAUSE = 200  # the next look begins after so many times the duration of the last
WORKERS = min(4, os.cpu_count() or 1)
NICE = 10  # by which processing leaves the processor to landing
MUCH = 5000  # payloads, which a command does not process by itself alone
TRIES = 3  # of a call whose process was killed
SHORT = 2.0  # seconds of work that are not worth the start of processes
WINDOW = 200_000  # payloads that are listed at a time, so that any number fits into memory
PORTION_BYTES = 64 * 1024 * 1024  # that are read for one upsert, however few payloads that is
MANY_SUPERSEDED = 10  # payloads, from which on it is said what keeps devices apart
SHARE_SUPERSEDED = 0.01  # of those that were processed; below it they are corrections
KEEP_DEVICES_APART = (
    "%d of %d payloads met the row of another payload at the same timestamp, where only the later "
    "one stays: if they come from several devices, set [transform] series and run rebuild"
)


class Judged(NamedTuple):
    """What became of payloads."""

    rows: list[Measurement]
    rejected: list[Rejection]
    unread: list[str]  # why this user may not read the others

    @property
    def checked(self) -> int:
        return len(self.rows) + len(self.rejected)


ROWS_OF = msgspec.msgpack.Decoder(list[Measurement])
REJECTIONS_OF = msgspec.msgpack.Decoder(list[Rejection])
LARGE_FILES = 16  # times the size of a large payload is a large file
LEAST = 128  # bytes that a payload counts for, as its work is never less
AT_A_TIME = 1000  # rows that are decoded and upserted, and rejections, however many a batch has


class Work(NamedTuple):
    """Pending files that are processed together; of a batch that is alone, a part.

    That part are its payloads in `begin <= place < end`.
    """

    names: list[str]
    begin: int = 0
    end: int = sys.maxsize

    def payloads(self) -> int:
        """Return how many payloads are to be processed."""
        return sum(min(self.end, payloads_in_name(name)) - self.begin for name in self.names)


def tell_nobody(*_: int) -> None:
    """Hear of progress that nobody asked for."""


def judge(
    payloads: Iterable[tuple[UUID, bytes | PayloadStoreError]], rules: TransformConfig
) -> Judged:
    """Transform payloads, or note why they cannot be read."""
    judged = Judged([], [], [])
    for raw_id, body in payloads:
        try:
            if isinstance(body, PayloadStoreError):
                raise body
            judged.rows.append(transform(raw_id, body, rules))
        except (NoAccess, PackDamaged) as error:
            judged.unread.append(str(error))
        except (DataQualityError, PayloadUnreadable) as error:
            rejection = Rejection(raw_id, error.code, str(error), datetime.now(UTC))
            judged.rejected.append(rejection)
    return judged


class JudgedFiles(NamedTuple):
    """What became of the first `files` of some pending files.

    `rows` are `Measurement`s and `rejected` are `Rejection`s in MessagePack, `AT_A_TIME` each, so
    that none takes long to decode. `unread` says which files this user may not read, and why.
    """

    files: int
    rows: list[bytes]
    rejected: list[bytes]
    unread: dict[str, str]


def judge_files(
    payloads: Payloads,
    work: Work,
    rules: TransformConfig,
    most_bytes: int = sys.maxsize,
    largest: int = sys.maxsize,
) -> JudgedFiles:
    """Transform what is in pending files, one file in memory at a time.

    It stops behind the file with which it has read `most_bytes`, and before one with a payload that
    has more than `largest` bytes, or one that has many times as much in all.
    """
    judged, unread = Judged([], [], []), dict[str, str]()
    files = size = 0
    for name in work.names:
        try:
            found = payloads.read_pending(name, work.begin, work.end)
            sizes = [max(len(body), LEAST) for _, body in found]
            if sum(sizes) > LARGE_FILES * largest or max(sizes, default=0) > largest:
                break
            size += sum(sizes)
            made = judge(found, rules)
            judged.rows.extend(made.rows)
            judged.rejected.extend(made.rejected)
        except RawIdUnknown:
            pass  # it has left meanwhile
        except NoAccess as error:
            unread[name] = str(error)
        except PayloadUnreadable as error:  # a batch goes under the name of its first payload
            judged.rejected.extend(judge([(first_of(name), error)], rules).rejected)
        files += 1
        if size >= most_bytes:
            break
    return JudgedFiles(files, _portions(judged.rows), _portions(judged.rejected), unread)


def _portions(many: Sequence[object]) -> list[bytes]:
    starts = range(0, len(many), AT_A_TIME)
    return [msgspec.msgpack.encode(many[start : start + AT_A_TIME]) for start in starts]


class Outcome(Struct, frozen=True, array_like=True):
    """What was settled: how many are processed, how many rejected for each code, and the first.

    `stuck` says why files stay pending, as this user may not move them.
    """

    processed: int
    codes: dict[str, int]
    rejected: list[Rejection]
    stuck: list[str]


OUTCOME = msgspec.msgpack.Decoder(Outcome)


def settle_files(
    payloads: Payloads, work: Work, judged: JudgedFiles, *, again: bool = False
) -> bytes:
    """Move files that were judged, and whose rows are stored; return `Outcome` as MessagePack.

    It may have been cut short before: `again` counts what was moved then, too.
    """
    portions = itertools.chain.from_iterable(map(REJECTIONS_OF.decode, judged.rejected))
    rejected = sorted(portions, key=lambda rejection: rejection.raw_id)
    others = {f"{rejection.raw_id}.json" for rejection in rejected} | judged.unread.keys()
    names = [name for name in work.names[: judged.files] if name not in others]
    done = {name: work.end for name in names if work.end < payloads_in_name(name)}
    whole = [name for name in names if name not in done]
    settled = payloads.settle(whole, rejected, done, again=again)
    codes = Counter(rejection.code for rejection in settled.rejected)
    shown, stuck = settled.rejected[:REJECTIONS_SHOWN], list(settled.stuck.values())
    return msgspec.msgpack.encode(Outcome(settled.processed, codes, shown, stuck))


Run = Callable[..., Awaitable[Any]]  # a call of a function with its arguments, somewhere else


class Worker:
    """A process that makes one call after another; `context` is how it is started."""

    def __init__(self, context: multiprocessing.context.BaseContext) -> None:
        # The pipe is its own: it breaks when the process ends, and no other process is in the way.
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=[theirs], daemon=True)  # type: ignore[attr-defined]
        self._process.start()
        theirs.close()

    def call(
        self, call: Callable[..., object], arguments: Sequence[object]
    ) -> tuple[object, Exception | None]:
        """Wait for a call; return its value and what it has raised, or raise `ProcessEnded`."""
        try:
            self._pipe.send((call, arguments))
            outcome: tuple[object, Exception | None] = self._pipe.recv()
        except (EOFError, OSError):
            raise ProcessEnded from None
        return outcome

    def kill(self) -> None:
        """End it in the middle of a call."""
        self._process.kill()

    def end(self) -> None:
        """Let it end, and wait for that."""
        with contextlib.suppress(OSError):  # it has ended
            self._pipe.send(None)  # a copy that was made later keeps this pipe open
        self._pipe.close()
        self._process.join()


class ProcessEnded(Exception):
    """A process has ended in the middle of a call."""


class Workers:
    """Processes for work that would hold up this one. The first calls start them.

    A thread waits for each that is at work. The process of one that is killed, by the system for
    want of memory perhaps, is replaced, and its call is made again: it has to be one that may be
    made twice.
    """

    def __init__(self, count: int = WORKERS) -> None:
        self.count = count
        self._threads: ThreadPoolExecutor | None = None
        self._idle = deque[Worker]()
        self._busy = set[Worker]()
        self._are_killed = False

    @property
    def are_there(self) -> bool:
        return bool(self._threads or self._idle)

    def fork(self) -> None:
        """Start the processes as copies of this one, which takes milliseconds.

        This one must have neither another thread nor an event loop yet.
        """
        gc.freeze()  # a collection would write to what they share
        copies = multiprocessing.get_context("fork")
        self._idle.extend(Worker(copies) for _ in range(self.count))

    async def run(
        self, call: Callable[..., T], *arguments: object, again: Callable[..., T] | None = None
    ) -> T:
        """Call a function of this module in one of them; raises what it raises.

        `again` is called instead once the process of a call was killed.
        """
        self._threads = self._threads or ThreadPoolExecutor(self.count, "worker")
        loop = asyncio.get_running_loop()
        calls = itertools.chain([call], itertools.repeat(again or call, TRIES - 1))
        return await loop.run_in_executor(self._threads, self._call, calls, arguments)

    def _call(self, calls: Iterator[Callable[..., T]], arguments: Sequence[object]) -> T:
        for call in calls:
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = Worker(multiprocessing.get_context("spawn"))
            self._busy.add(worker)
            if self._are_killed:
                worker.kill()
            try:
                value, error = worker.call(call, arguments)
            except ProcessEnded:
                worker.end()
                if self._are_killed:
                    break
            except BaseException:  # what does not pass through a pipe costs no process
                self._idle.append(worker)
                raise
            else:
                self._idle.append(worker)
                if error:
                    raise error
                return cast("T", value)
            finally:
                self._busy.discard(worker)
            if not os.access(sys.executable, os.X_OK):
                wrong = f"{user_name(os.geteuid())} may not run {sys.executable}"
                raise StorageUnavailable(f"{wrong}: install it where every user may")
        raise StorageUnavailable(
            f"a process of this service has ended {TRIES} times at the same work: see the system's "
            "log whether it is killed for want of memory, and try again"
        )

    def begin(self) -> asyncio.Future[Any]:
        """Start the processes; the future is done when they are ready, or cannot start."""
        begun = asyncio.gather(*(self.run(os.getpid) for _ in range(self.count)))
        begun.add_done_callback(_take_note)
        return begun

    async def spread(
        self, items: Iterator[T], work: Callable[[Run, T], Awaitable[None]], far: Iterable[T] = ()
    ) -> None:
        """Do some work for each item, two more at a time than there are processes.

        `work` is handed `run`, and the item; a cluster has another one for items that are `far`.
        After an error no other item is begun; it is raised when those under way are done with.
        """
        await in_lanes(work, (itertools.chain(far, items), self.run, self.count + 2))

    def kill(self) -> None:
        """End those that are at work, in the middle of calls that are not made again."""
        self._are_killed = True
        for worker in set(self._busy):
            worker.kill()

    async def close(self) -> None:
        """End them when they have made the calls that they are at."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        threads, self._threads = self._threads, None
        if threads:
            threads.shutdown(cancel_futures=True)
        while self._idle:
            self._idle.pop().end()


async def in_lanes(
    work: Callable[[Run, T], Awaitable[None]], *streams: tuple[Iterator[T], Run, int]
) -> None:
    """Do some work for each item of some streams, so many of one at a time; see Workers.spread."""
    errors = list[BaseException]()

    async def lane(items: Iterator[T], run: Run, turn: asyncio.Lock) -> None:
        try:
            while not errors:
                async with turn:
                    item = await asyncio.to_thread(next, items, None)
                if item is None:
                    break
                await work(run, item)
        except BaseException as error:
            errors.append(error)
            raise

    lanes = list[Coroutine[Any, Any, None]]()
    for items, run, count in streams:
        turn = asyncio.Lock()
        lanes += [lane(items, run, turn) for _ in range(count)]
    await asyncio.gather(*lanes, return_exceptions=True)
    if errors:
        raise errors[0]


def _take_note(done: asyncio.Future[Any]) -> None:
    """Look at the error of a future, if there is one, so that asyncio does not log it."""
    if not done.cancelled():
        done.exception()


def _work(pipe: multiprocessing.connection.Connection) -> None:
    """Make calls until nobody asks for another; let landing go first.

    The process ends with the one that started it, however that ends.
    """
    os.nice(max(0, NICE - os.nice(0)))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process hears it, and closes this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # of which a copy has the handler of the other
    threading.Thread(target=_end_with, args=[multiprocessing.parent_process()], daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while asked := pipe.recv():
            pipe.send(_outcome_of(*asked))


def _outcome_of(
    call: Callable[..., object], arguments: Sequence[object]
) -> tuple[object, Exception | None]:
    """Make a call; return its value and what it has raised."""
    try:
        return call(*arguments), None
    except Exception as error:  # noqa: BLE001 (it is raised where the call was asked for)
        error.add_note(traceback.format_exc())
        return None, error


def _end_with(process: multiprocessing.process.BaseProcess) -> None:
    process.join()
    os._exit(1)


class ProcessResult(Struct):
    """What one run did: `checked` = `processed` + `failed` payloads; `remaining` are pending.

    `rejected` holds the first 1,000 that failed; `GET /rejected` lists all. `superseded` counts the
    payloads that met the row of another payload with other statistics at the same timestamp, or, in
    many series, in the same one: the later of the two stands.
    """

    processed: int = 0
    failed: int = 0
    checked: int = 0
    remaining: int = 0
    superseded: int = 0
    rejected: list[Rejection] = []


@dataclass
class Stuck:
    """How many payloads stay pending, as this user may not read or move them, and why the first."""

    count: int = 0
    why: str = ""

    def add(self, reasons: Sequence[str]) -> None:
        self.why = self.why or next(iter(reasons), "")
        self.count += len(reasons)


class Processor:
    """Turns pending payloads into rows of the backend, one processor at a time per data folder.

    Payloads are read, computed and moved in a thread; where that takes longer, by processes, once
    they have started, several batches at a time. The order of the upserts does not matter: the
    greatest raw_id stands.
    """

    def __init__(
        self,
        payloads: Payloads,
        backend: Backend,
        *,
        batch: int,
        rules: TransformConfig = RULES,
        metrics: Metrics | None = None,
        workers: Workers | None = None,
    ) -> None:
        self._payloads = payloads
        self._backend = backend
        self._rules = rules
        self._batch = batch
        self._metrics = metrics or Metrics()
        self._workers = workers or Workers()
        self._turn = asyncio.Lock()
        self._next_look = 0.0  # for a twin
        self.discards = Discards(payloads, backend, rules, self, self._workers, self._metrics)
        self._so_far = Counter[str]()  # until it was said that many are superseded

    async def process(
        self, limit: int | None = None, progress: Callable[[int, int], object] = tell_nobody
    ) -> ProcessResult:
        """Process the payloads that are pending now, the earliest arrival first, `limit` at most.

        `progress` is called after each batch with the number of payloads that are done and the
        number of all.

        Raises `BackendUnavailable`, and then what is not in the backend is still pending;
        `ProcessorBusy` when another processor holds the data folder for longer than 10 s;
        `NoAccess`, when all others are processed, where this user may not read or move a payload.
        """
        result, stuck = ProcessResult(), Stuck()
        await self.discards.finish_if_free()
        async with self.alone():
            count_places = functools.partial(self._payloads.count_pending, places=True)
            pending = await asyncio.to_thread(count_places)
            todo = pending if limit is None else min(limit, pending)

            async def work(run: Run, some: Work) -> None:
                await self._process_some(run, some, result, stuck)
                progress(result.checked, todo)

            batches = self._works(todo)
            if not self._workers.are_there:
                await self._process_in_thread(batches, work, todo)
            await self._workers.spread(batches, work)
            result.remaining = await asyncio.to_thread(self._payloads.count_pending)
        if result.checked:
            done = (result.processed, result.failed, result.remaining)
            log.info("processed %d, rejected %d, %d pending", *done)
        if result.processed:
            await self._look_for_twin()
        self._look_for_devices(result)
        if stuck.count:
            rest = f"{stuck.count} payloads stay pending, {result.checked} were processed"
            raise NoAccess(f"{stuck.why}. {rest}")
        return result

    async def _look_for_twin(self) -> None:
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + TWIN_PAUSE
            await note_twin(self._payloads, self._backend)

    async def _process_in_thread(
        self, batches: Iterator[Work], work: Callable[..., Awaitable[None]], todo: int
    ) -> None:
        """Work in a thread until no batch is left, or other processes are ready to go on.

        These take their time to start, and the processor from this one. It is worth that if there
        is much left to do, going by the processor time that the payloads before have taken: where
        others have the processor, more processes would not be faster.
        """
        begun, done = time.process_time(), 0
        starting: asyncio.Future[Any] | None = None
        while starting is None or not starting.done():
            seconds_each = (time.process_time() - begun) / done if done else 0.0
            if starting is None and (todo - done) * seconds_each >= SHORT:
                starting = self._workers.begin()
            batch = await asyncio.to_thread(next, batches, None)
            if batch is None:
                break
            await work(asyncio.to_thread, batch)
            done += batch.payloads()
        if starting and not starting.cancel():
            await starting  # raises where they cannot start

    def _look_for_devices(self, result: ProcessResult) -> None:
        """Say, once, what to set where it seems that devices overwrite the rows of each other."""
        if self._rules.series or self._so_far["said"]:
            return
        self._so_far.update(processed=result.processed, superseded=result.superseded)
        superseded, processed = self._so_far["superseded"], self._so_far["processed"]
        if superseded >= MANY_SUPERSEDED and superseded > SHARE_SUPERSEDED * processed:
            log.warning(KEEP_DEVICES_APART, superseded, processed)
            self._so_far["said"] = 1

    async def process_forever(self, every: float) -> NoReturn:
        """Process again and again, `every` seconds; while something is away, ever more rarely."""
        pause = every
        while True:
            try:
                await self.process()
                pause = every
            except ProcessorBusy:
                pause = every  # the other processor does the work
            except Exception as error:  # else nothing would ever be processed again
                pause = min(max(2 * pause, 1.0), LONGEST_PAUSE)
                if isinstance(error, NoAccess):  # to some payloads: the others must not wait long
                    pause = max(every, STUCK_PAUSE)
                expected = BackendError | DropzoneError | PayloadStoreError
                defect = None if isinstance(error, expected) else error
                again = "processing stopped, next try within %.0f s: %s"
                log.warning(again, pause, error, exc_info=defect)
            await asyncio.sleep(pause * uniform(0.5, 1))  # noqa: S311 (not all of them at once)

    async def close(self) -> None:
        await self._workers.close()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Keep other processors out.

        It waits for this process's turn first: who waits for the file asks for it every 50 ms.
        """
        busy = "another processor is at work on this data folder; try again"
        try:
            async with asyncio.timeout(LOCK_PATIENCE):
                await self._turn.acquire()
        except TimeoutError:
            raise ProcessorBusy(busy) from None
        try:
            async with AsyncFileLock(self._payloads.process_lock, timeout=LOCK_PATIENCE):
                yield
        except Timeout:
            raise ProcessorBusy(busy) from None
        except OSError as error:  # of the data folder
            trouble = await asyncio.to_thread(self._payloads.processing_trouble)
            raise (StorageUnavailable(trouble) if trouble else storage_error(error)) from error
        finally:
            self._turn.release()

    def _works(self, todo: int) -> Iterator[Work]:
        """Yield the earliest pending files, as many as have `todo` payloads, `batch` at a time."""
        done, after = self._payloads.done(), ""
        while todo > 0:
            window, _ = self._payloads.pending(min(WINDOW, todo + len(done)), after)
            if not window:
                return
            names, count = list[str](), 0
            for name in window:
                payloads = payloads_in_name(name)
                begin, after = done.get(name, 0), name
                is_part = begin > 0 or payloads > todo - count
                if names and (is_part or count + payloads > self._batch):
                    yield Work(names)
                    todo, names, count = todo - count, [], 0
                if todo <= 0:
                    return
                if begin > 0 or payloads > todo:
                    end = min(payloads, begin + todo)
                    yield Work([name], begin, end)
                    todo -= end - begin
                else:
                    names.append(name)
                    count += payloads
            if names:
                yield Work(names)
                todo -= count

    async def _process_some(
        self, run: Run, work: Work, result: ProcessResult, stuck: Stuck
    ) -> None:
        """Read, transform, upsert and move; large files in several portions.

        In this process none is transformed that is so large that it might hold up all else.
        """
        largest = sys.maxsize if run == self._workers.run else LARGE_JSON
        while work.names:
            judge_some = functools.partial(
                judge_files, self._payloads, work, self._rules, PORTION_BYTES
            )
            judged = await run(judge_some, largest)
            if not judged.files:
                judged = await self._workers.run(judge_some)
            for rows in judged.rows:
                refused = await self._upsert(ROWS_OF.decode(rows), result)
                judged.rejected.extend(_portions(refused))
            settle: Callable[..., Awaitable[bytes]] = run
            if run == self._workers.run or len(judged.rejected) > 1:
                again = functools.partial(settle_files, again=True)
                settle = functools.partial(self._workers.run, again=again)
            outcome = OUTCOME.decode(await settle(settle_files, self._payloads, work, judged))
            stuck.add([*judged.unread.values(), *outcome.stuck])
            self._metrics.processed.inc(outcome.processed)
            for code, count in outcome.codes.items():
                self._metrics.rejected.labels(code).inc(count)
            result.processed += outcome.processed
            result.failed += sum(outcome.codes.values())
            result.checked = result.processed + result.failed
            result.rejected += outcome.rejected[: REJECTIONS_SHOWN - len(result.rejected)]
            work = work._replace(names=work.names[judged.files :])

    async def _upsert(self, rows: Sequence[Measurement], result: ProcessResult) -> list[Rejection]:
        """Upsert rows; return those that the backend itself refuses, found by halving."""
        try:
            superseded = await self._backend.upsert(rows) or 0
        except BackendUnavailable as error:
            await asyncio.to_thread(note_failed_write, self._payloads.workspace, str(error))
            raise
        except BackendError as error:
            if len(rows) > 1:
                half = len(rows) // 2
                refused = await self._upsert(rows[:half], result)
                return refused + await self._upsert(rows[half:], result)
            [row] = rows
            return [Rejection(row.raw_id, "backend_refused", str(error), datetime.now(UTC))]
        result.superseded += superseded
        self._metrics.superseded.inc(superseded)
        await asyncio.to_thread(forget_failed_write, self._payloads.workspace)
        return []


class FailedWrite(Struct, frozen=True):
    """What could not be written, by whichever process: since when, when last, and why.

    The next success takes it away.
    """

    since: datetime
    last: datetime
    detail: str


FAILED_WRITE = "failed_write.json"  # of rows
FAILED_ARCHIVING = "failed_archiving.json"  # of packs


def failed_write(workspace: Path, name: str = FAILED_WRITE) -> FailedWrite | None:
    """Return the write that has failed, None where the last one succeeded."""
    with contextlib.suppress(OSError, ValueError):
        return msgspec.json.decode((workspace / name).read_bytes(), type=FailedWrite)
    return None


def note_failed_write(workspace: Path, detail: str, name: str = FAILED_WRITE) -> None:
    """Note a failure for every process that shows the state of the service."""
    now = datetime.now(UTC)
    before = failed_write(workspace, name)
    note = FailedWrite(before.since if before else now, now, detail)
    write_note(workspace, name, note)  # the error itself is raised all the same


def write_note(workspace: Path, name: str, note: Struct) -> None:
    """Let a file appear whole, unless the disk refuses."""
    part = workspace / f"{name}.{os.getpid()}.part"
    with contextlib.suppress(OSError):
        part.write_bytes(msgspec.json.encode(note))
        part.rename(workspace / name)


def forget_failed_write(workspace: Path, name: str = FAILED_WRITE) -> None:
    """Take the note away: it was written again."""
    with contextlib.suppress(OSError):
        (workspace / name).unlink(missing_ok=True)


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
    """What was found among the payloads of a state lately.

    It is looked for again when payloads have entered or left that state, but not for more than a
    200th of the time: of 100,000 payloads the answer may be half a minute old, of 1,000 it is new.
    A caller waits for half a second at most, and gets what was found before, if anything was.
    `glances` are the threads in which it is asked whether something has changed.
    """

    def __init__(
        self,
        changed: Callable[[], int],
        find: Callable[[], T],
        nothing: T,
        glances: Executor | None = None,
    ) -> None:
        self._changed = changed
        self._find = find
        self._found = nothing
        self._glances = glances
        self._seen, self._due = 0, 0.0
        self._looking: asyncio.Future[None] | None = None

    async def look(self, *, patient: bool = True) -> T:
        """Return what was found; raises `StorageUnavailable`.

        The first look is waited for, however long it takes, unless the caller is not `patient`.
        """
        with disk_errors():
            loop = asyncio.get_running_loop()
            changed = await loop.run_in_executor(self._glances, self._changed)
            if self._looking is None and changed != self._seen and time.monotonic() >= self._due:
                self._looking = asyncio.ensure_future(asyncio.to_thread(self._look, changed))
            looking = self._looking
            if looking:
                patience = None if patient and not self._due else LOOK_PATIENCE
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
        self._seen = changed if settled else 0


def look_at_pending(
    payloads: Payloads, glances: Executor | None = None
) -> Lately[tuple[list[str], int]]:
    """Look at the oldest pending payload, and at how many there are."""
    nothing: tuple[list[str], int] = ([], 0)
    changed = functools.partial(payloads.changed, "pending")
    return Lately(changed, functools.partial(payloads.pending, 1), nothing, glances)


def look_at_rejected(payloads: Payloads, glances: Executor | None = None) -> Lately[Counter[str]]:
    """Look at how many payloads are rejected, by code."""
    changed = functools.partial(payloads.changed, "rejected")
    return Lately(changed, payloads.take_stock, Counter(), glances)


def look_at_discarded(payloads: Payloads, glances: Executor | None = None) -> Lately[int]:
    """Look at how many payloads are discarded."""
    changed = functools.partial(payloads.changed, "discarded")
    return Lately(changed, payloads.count_discarded, 0, glances)


class Shared(Generic[T]):
    """A look at something, which all share who ask while it is under way."""

    def __init__(self, look: Callable[[], Awaitable[T]]) -> None:
        self._look = look
        self._looking: asyncio.Future[T] | None = None

    async def look(self) -> T:
        """Return what is seen, or raise what looking raises."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.ensure_future(self._look())
            self._looking.add_done_callback(_take_note)
        return await asyncio.shield(self._looking)


class SeriesCount(Struct, frozen=True):
    """How many series have rows, and of how many the last row is older than an hour."""

    count: int
    silent_for_an_hour: int


SERIES_LOOK = 5.0  # seconds at least between two looks at all series


class SeriesLately:
    """How many series there are, by a look of a few seconds ago.

    The next look begins after so many times the duration of the last that it costs next to nothing.
    A caller waits for half a second at most, and gets what was found before, None for nothing.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._found: SeriesCount | None = None
        self._due = 0.0
        self._looking = Shared(self._look)

    async def look(self) -> SeriesCount | None:
        if time.monotonic() >= self._due:
            with contextlib.suppress(TimeoutError, BackendError):
                async with asyncio.timeout(LOOK_PATIENCE):
                    await self._looking.look()
        return self._found

    async def _look(self) -> None:
        begun = time.monotonic()
        try:
            self._found = await count_series(self._backend)
        finally:
            ended = time.monotonic()
            self._due = ended + max(SERIES_LOOK, LOOK_PAUSE * (ended - begun))


async def count_series(backend: Backend) -> SeriesCount:
    """Count the series of a backend that keeps many."""
    count, silent, hour_ago = 0, 0, datetime.now(UTC) - timedelta(hours=1)
    page = await backend.series(limit=AT_A_TIME)
    while page:
        count += len(page)
        silent += sum(each.last < hour_ago for each in page)
        page = await backend.series(after=page[-1].series, limit=AT_A_TIME)
    return SeriesCount(count, silent)


def age_of(names: Sequence[str]) -> float | None:
    """Return how many seconds ago the first of these files arrived, None if that is unknown."""
    arrival = arrival_of(first_of(names[0])) if names else None
    return max(0.0, time.time() - arrival.timestamp()) if arrival else None


# ── A cluster: other machines derive what is in the archive ──────────────────────────────────────
#
# Workers of Dask read the archive by themselves, with the credentials of their own environment; all
# that travels is where payloads lie, and the rules. What lies on this disk stays with the processes
# of this machine, which are at work at the same time.

CLUSTER_FORM = "--cluster is the address of a scheduler of Dask: tcp://host:8786, or tls://"
SCHEDULER_PATIENCE = 10.0  # seconds for an answer
WORKER_PATIENCE = 15.0  # seconds without any worker, half as many for the first
LOOK_AT_CLUSTER = 2.0  # seconds between two looks
PORTIONS_AHEAD = 3  # for each thread of a worker, so that none waits for its next one


class ClusterAway(DropzoneError):
    """The scheduler or its workers do not answer: try again."""

    code, status = "cluster_away", 503


class Cluster:
    """The workers of a Dask cluster and the processes of this machine: see `Workers`."""

    def __init__(self, address: str) -> None:
        """Raises `ConfigError` where this is no address, or the package is not there."""
        parts = urlsplit(address)
        try:
            is_address = parts.scheme in ("tcp", "tls") and parts.hostname and parts.port
        except ValueError:  # the port is no number
            is_address = False
        if not is_address:
            raise ConfigError(f"{address}: {CLUSTER_FORM}")
        if not importlib.util.find_spec("distributed"):
            raise ConfigError(
                "--cluster needs the package distributed: pip install 'dropzone[cluster]'"
            )
        self._address = address
        self._own = Workers()

    async def spread(
        self, items: Iterator[T], work: Callable[[Run, T], Awaitable[None]], far: Iterable[T] = ()
    ) -> None:
        """See Workers.spread; raises `ClusterAway`, and `ConfigError` for another version."""
        client = await self._connected()
        watch = asyncio.ensure_future(self._watch(client))
        try:
            threads = await self._compared(client)
            run = functools.partial(self._run_far, client, watch)
            near = (items, self._own.run, self._own.count + 2)
            await in_lanes(work, near, (iter(far), run, PORTIONS_AHEAD * threads))
        finally:
            watch.cancel()
            with contextlib.suppress(Exception):  # it has hung, or is lost
                await asyncio.wait_for(client.close(), SCHEDULER_PATIENCE)

    async def close(self) -> None:
        await self._own.close()

    async def _connected(self) -> Any:
        import distributed  # noqa: PLC0415 (an extra)

        connect: Any = distributed.Client  # it has no types
        for name in ("distributed", "distributed.client"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors are told here
        options: dict[str, Any] = {"asynchronous": True, "set_as_default": False}
        try:
            async with asyncio.timeout(SCHEDULER_PATIENCE):
                return await connect(self._address, timeout=SCHEDULER_PATIENCE / 2, **options)
        except Exception as error:  # noqa: BLE001 (whatever answers there is no scheduler of ours)
            raise self._away(f"no scheduler answers ({reason_of(error)})") from None

    def _away(self, what: str) -> ClusterAway:
        return ClusterAway(f"the cluster {self._address}: {what}; what was derived is kept")

    async def _threads(self, client: Any) -> int:
        """Return how many threads the workers have."""
        try:
            async with asyncio.timeout(SCHEDULER_PATIENCE):
                return sum((await client.nthreads()).values())
        except Exception as error:  # noqa: BLE001 (of any layer below)
            raise self._away(f"the scheduler is lost ({reason_of(error)})") from None

    async def _watch(self, client: Any) -> NoReturn:
        """Raise `ClusterAway` once the scheduler does not answer, or has no workers."""
        seen = time.monotonic()
        while True:
            if await self._threads(client):
                seen = time.monotonic()
            elif time.monotonic() - seen > WORKER_PATIENCE:
                raise self._away(f"no worker for {WORKER_PATIENCE:.0f} s")
            await asyncio.sleep(LOOK_AT_CLUSTER)

    async def _compared(self, client: Any) -> int:
        """Wait for workers, compare their versions with those here; return their threads."""
        deadline = time.monotonic() + WORKER_PATIENCE / 2
        while not (threads := await self._threads(client)):
            if time.monotonic() > deadline:
                start = f"start some: dask worker {self._address} --nthreads 1"
                raise self._away(f"it has no workers; {start}")
            await asyncio.sleep(LOOK_AT_CLUSTER / 10)
        asked = client.run(versions, on_error="return")
        try:
            async with asyncio.timeout(WORKER_PATIENCE):
                answers: dict[str, object] = await asked
        except Exception as error:  # noqa: BLE001 (of any layer below)
            raise self._away(f"its workers do not answer ({reason_of(error)})") from None
        for worker, answer in answers.items():
            if isinstance(answer, OSError):
                continue  # it has just ended
            if isinstance(answer, Exception):
                raise unfit(worker, reason_of(answer))
            require_versions(worker, cast("dict[str, str]", answer))
        return threads

    async def _run_far(
        self, client: Any, watch: asyncio.Future[NoReturn], call: Callable[..., T], *args: object
    ) -> T:
        """Have a worker make a call; it is made again elsewhere where one ends in the middle."""
        from distributed import KilledWorker  # noqa: PLC0415
        from distributed.client import FutureCancelledError  # noqa: PLC0415

        task = client.submit(pickle.loads, pickle.dumps(FarCall(call, args)), pure=False)
        answer = asyncio.ensure_future(task.result())
        try:
            await asyncio.wait([answer, watch], return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
            return cast("T", answer.result())
        except FutureCancelledError:
            raise self._away("the scheduler is lost") from None
        except KilledWorker as error:
            wrong = f"{error.allowed_failures + 1} workers have ended at the same portion"
            raise self._away(f"{wrong}: see whether they have too little memory") from None
        except (DropzoneError, PayloadStoreError):
            raise
        except Exception as error:
            raise unfit("a worker", reason_of(error)) from error
        finally:
            answer.cancel()
            task.release()


def versions() -> dict[str, str]:
    """Return what has to be of one version where something is derived together."""
    distributed: Any = importlib.import_module("distributed")  # an extra
    python = ".".join(map(str, sys.version_info[:2]))
    libraries = {"msgspec": msgspec.__version__, "distributed": distributed.__version__}
    return {"Dropzone": __version__, "Python": python, **libraries}


def require_versions(worker: str, theirs: Mapping[str, str]) -> None:
    """Raise `ConfigError` where a worker has another version of something."""
    for name, ours in versions().items():
        if theirs.get(name) != ours:
            raise unfit(worker, f"it has {name} {theirs.get(name)}, and here is {ours}")


def unfit(worker: str, reason: str) -> ConfigError:
    return ConfigError(f"{worker} of the cluster cannot take part: {reason}")


def reason_of(error: BaseException) -> str:
    return str(error) or type(error).__name__


class FarCall:
    """A call that is made by unpickling this.

    So it passes through the scheduler, which needs no Dropzone, as bytes.
    """

    def __init__(self, call: Callable[..., object], arguments: Sequence[object]) -> None:
        self._call, self._arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return call_for, (versions(), self._call, self._arguments)


def call_for(client: Mapping[str, str], call: Callable[..., T], arguments: Sequence[object]) -> T:
    """Make a call in a worker, which may have come later than versions were compared."""
    from distributed import get_worker  # noqa: PLC0415 (an extra)

    worker = get_worker().address
    for name, ours in versions().items():
        if client[name] != ours:
            raise unfit(worker, f"it has {name} {ours}, and the client has {client[name]}")
    try:
        return call(*arguments)
    except ArchiveAway as error:
        raise ArchiveAway(f"{error} (for the worker {worker} of the cluster)") from None
    except ImportError as error:
        raise unfit(worker, reason_of(error)) from None


# ── Proof: the rows against the payloads that they name ───────────────────────────────────────────


GOES_ON = 86_400  # seconds for which a run that was stopped can be continued
DAMAGE_SHOWN = 100  # sentences
DERIVED_FOLDER = "derived"  # in the workspace: what a proof has derived so far


class Finding(Struct, frozen=True):
    """A row that is not right, or cannot be checked, and what it should be (None: nothing).

    `missing`: payloads make a row, and there is none. `differing`: the row is not what the payload
    that it names makes. `superseded`: a later payload should have won. `orphaned`: the payload that
    the row names is not there, so that nobody can say whether the row is right; `right` is what
    would stand without it. `discarded`: the same of a payload that was discarded. `unreadable`:
    that payload is damaged, or the pack that it lies in, or it makes no row any more, though it was
    processed.
    """

    kind: Literal["missing", "differing", "superseded", "orphaned", "discarded", "unreadable"]
    row: Measurement | None
    right: Measurement | None


PROVED_WRONG = ("missing", "differing", "superseded")
WITHOUT_PAYLOAD = ("orphaned", "discarded")
NOTHING_PROCESSED = (
    "holds no processed payload that makes a row, so that no row can be proved and none was "
    "changed: check DROPZONE_RAW_DIR, and that its disk is mounted"
)


class Derived(Struct, frozen=True, array_like=True):
    """What was made of a portion of `checked` payloads, and what of it cannot be read."""

    rows: list[Measurement]
    damage: list[str]
    checked: int


DERIVED = msgspec.msgpack.Decoder(Derived)


def derive(
    portion: Portion, rules: TransformConfig, slots: Collection[tuple[datetime, str]] | None = None
) -> bytes:
    """Make the rows of a portion of payloads; return `Derived` as MessagePack.

    With `slots`, it has the rows of these timestamps and series alone.
    """
    try:
        judged = judge(portion.payloads(), rules)
    except (PackDamaged, OSError) as error:
        return msgspec.msgpack.encode(Derived([], [sentence_of(error)], 0))
    damage = [f"{each.raw_id} was processed, but: {each.detail}" for each in judged.rejected]
    damage += judged.unread
    rows = judged.rows
    if slots is not None:
        rows = [row for row in rows if (row.timestamp_utc, row.series) in slots]
    return msgspec.msgpack.encode(Derived(rows, damage, judged.checked))


def sentence_of(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return denied(error)
    if isinstance(error, OSError):
        return f"{error.filename} cannot be read: {error.strerror}"
    return str(error)


async def rows_at(backend: Backend, timestamp: datetime, limit: int) -> list[Measurement]:
    """Return the rows of a timestamp, by series."""
    until = timestamp + RESOLUTION if timestamp < LATEST else None
    return await backend.find(since=timestamp, until=until, limit=limit)


def series_option(rules: TransformConfig) -> dict[str, bool]:
    """Return the options of a backend for many series where there are any, and else none."""
    return {"series": True} if rules.series else {}


class Underway:
    """A pack or a folder that is being derived; `done` is the file that names those which are."""

    def __init__(self, source: Source, done: Path) -> None:
        self._source, self._done = source, done
        self._open = 1  # portions that are not finished; one stands for those not begun
        self._lock = threading.Lock()
        self.is_damaged = False

    def begin_portions(self) -> Iterator[Portion]:
        for portion in self._source.portions:
            with self._lock:
                self._open += 1
            yield portion

    def finish_portion(self) -> None:
        """Note a portion that is derived; with the last one, and without damage, the whole."""
        with self._lock:
            self._open -= 1
            is_done = not (self._open or self.is_damaged)
        if is_done:
            with self._done.open("a") as file:
                file.write(f"{self._source.name}\n")


class Proof:
    """Derives the table again from all that is processed, and compares it with the backend's.

    What is derived is kept in the workspace until the comparison is done, so that a run that is
    stopped goes on, within a day, with the folders and packs that it had not finished, and with
    those to which payloads were added since.

    `counts` has how many rows are `right` by now, how many of each kind of finding, and how many
    cannot be checked because their payload lies on another node (`elsewhere`), because it has
    `expired`, or because they are `older` than Dropzone (their raw_id is the nil UUID). `set_right`
    has how many of each kind a rebuild has mended, and `damage` the first sentences on what cannot
    be read, or makes no row any more.
    """

    def __init__(
        self,
        payloads: Payloads,
        backend: Backend,
        rules: TransformConfig = RULES,
        workers: Workers | Cluster | None = None,
    ) -> None:
        self._payloads = payloads
        self._backend = backend
        self._rules = rules
        self._workers = workers or Workers()
        self._scratch = payloads.workspace / DERIVED_FOLDER
        self.counts = Counter[str]()
        self.set_right = Counter[str]()
        self.damage: list[str] = []
        self._damages = 0

    async def findings(
        self,
        since: datetime | None = None,
        until: datetime | None = None,
        progress: Callable[[int], object] = tell_nobody,
        *,
        series: str | None = None,
        refuse_empty: bool = False,
    ) -> AsyncIterator[Finding]:
        """Yield what is wrong with the rows of `since <= timestamp_utc < until`, by timestamp.

        With `series`, of those of this series alone. Landing and processing may go on meanwhile.
        `progress` hears how many payloads more were read. Raises `BackendError`,
        `StorageUnavailable`, and with `refuse_empty` `ConfigError` where no payload makes a row.
        """
        self.counts.clear()
        nodes = await asyncio.to_thread(self._payloads.nodes)
        has_series = series_option(self._rules)
        derived = create_backend("sqlite", path=self._scratch / "rows.sqlite", **has_series)
        try:
            await self._derive(derived, progress)
            if refuse_empty and not await derived.find(limit=1):
                nothing = f"{self._payloads.workspace.parent} {NOTHING_PROCESSED}"
                raise ConfigError(". ".join([nothing, *self.damage[:1]]))
            async for right, row in paired(derived, self._backend, since, until, series=series):
                if right and row and same(right, row):
                    self.counts["right"] += 1
                    continue
                verdict = await self._judge(nodes, derived, right, row)
                if isinstance(verdict, Finding):
                    self.counts[verdict.kind] += 1
                    yield verdict
                else:
                    self.counts[verdict] += 1
        finally:
            await derived.close()
            await self._workers.close()
        shutil.rmtree(self._scratch)

    async def _judge(
        self, nodes: Nodes, derived: Backend, right: Measurement | None, row: Measurement | None
    ) -> Finding | str:
        """Say what is to be said of a row that is not the one that was derived."""
        if row and lies_elsewhere(nodes, right, row):
            return "elsewhere"
        if row and not right and await self._is_of_another_series(derived, row):
            return Finding("differing", row, None)
        return await asyncio.to_thread(self._verdict, right, row)

    async def rebuild(
        self,
        since: datetime | None = None,
        until: datetime | None = None,
        progress: Callable[[int], object] = tell_nobody,
        *,
        series: str | None = None,
        delete_orphans: bool = False,
    ) -> AsyncIterator[Finding]:
        """Do the same, and set right what is proved to be wrong, a thousand rows at a time.

        A row whose payload is not there, or was discarded, stays, unless `delete_orphans`. Where
        rows had to be deleted it looks again: a payload that was processed just before may have
        lost against such a row. Raises `ConfigError` where no payload makes a row.
        """
        kinds = {*PROVED_WRONG, *WITHOUT_PAYLOAD} if delete_orphans else {*PROVED_WRONG}
        is_first = again = True
        while again:
            again, found = False, list[Finding]()
            findings = self.findings(since, until, progress, series=series, refuse_empty=True)
            async for finding in findings:
                if finding.kind in kinds or is_first:
                    yield finding
                if finding.kind in kinds:
                    found.append(finding)
                if len(found) == AT_A_TIME:
                    again |= await self._set_right(found)
                    found = []
            again |= await self._set_right(found)
            is_first = False

    async def _set_right(self, findings: Sequence[Finding]) -> bool:
        """Upsert the right rows; delete first those that would win against them, if any."""
        pairs = [(finding.row, finding.right) for finding in findings]
        wrong = [row for row, right in pairs if row and not (right and right.raw_id >= row.raw_id)]
        await self._backend.delete(wrong)
        await self._backend.upsert([right for _, right in pairs if right])
        for finding in findings:
            self.set_right[finding.kind] += 1
            self.counts[finding.kind] -= 1
            self.counts["right"] += finding.right is not None
        return bool(wrong)

    async def _derive(self, derived: Backend, progress: Callable[[int], object]) -> None:
        done = self._scratch / "done"
        trouble = access_trouble(self._scratch, FOLDER)  # another user's run may have been stopped
        if trouble:
            raise NoAccess(trouble)

        async def derive_portion(run: Run, item: tuple[Underway, Portion]) -> None:
            of, portion = item
            made = DERIVED.decode(await run(derive, portion, self._rules))
            await derived.upsert(made.rows)
            self._note_damage(of, *made.damage)
            progress(made.checked)
            of.finish_portion()

        rules, rules_before = self._scratch / "rules.json", b""
        with contextlib.suppress(FileNotFoundError):
            rules_before = rules.read_bytes()
        rules_now = msgspec.json.encode(self._rules, enc_hook=str)
        is_old = not done.exists() or time.time() - done.stat().st_mtime > GOES_ON
        if is_old or rules_before != rules_now:
            await asyncio.to_thread(shutil.rmtree, self._scratch, ignore_errors=True)
        self.damage, self._damages = [], 0
        await derived.open()
        rules.write_bytes(rules_now)
        finished = set(done.read_text().splitlines()) if done.exists() else set()
        if finished:
            log.warning("going on with a run that was stopped; to begin anew, delete %s", done)
        sources = await asyncio.to_thread(lambda: list(self._payloads.portions()))
        near, far = list[Underway](), list[Underway]()
        for source in sources:
            if source.name not in finished:
                (far if source.is_far else near).append(Underway(source, done))
        await self._workers.spread(self._readable(near), derive_portion, self._readable(far))
        if self._damages > len(self.damage):
            self.damage.append(f"and {self._damages - len(self.damage)} more")

    def _readable(self, sources: Sequence[Underway]) -> Iterator[tuple[Underway, Portion]]:
        """Yield portions, of each source up to where a lost index or the disk is in the way."""
        for source in sources:
            try:
                for portion in source.begin_portions():
                    yield source, portion
            except (PackDamaged, OSError) as error:
                self._note_damage(source, sentence_of(error))
            source.finish_portion()

    def _note_damage(self, source: Underway, *sentences: str) -> None:
        source.is_damaged |= bool(sentences)
        self._damages += len(sentences)
        self.damage += sentences[: DAMAGE_SHOWN - len(self.damage)]

    async def _is_of_another_series(self, derived: Backend, row: Measurement) -> bool:
        """Say whether the payload that a row names has made one of another series.

        So it is with all rows from before there were series, and what was derived says so without
        another look at each payload.
        """
        if not self._rules.series:
            return False
        made = await rows_at(derived, row.timestamp_utc, AT_A_TIME)
        return any(each.raw_id == row.raw_id and each.series != row.series for each in made)

    def _verdict(
        self, right: Measurement | None, row: Measurement | None
    ) -> Finding | Literal["right", "expired", "older"]:
        """Say what is to be said of a timestamp whose row is not the one that was derived."""
        if row is None:
            return Finding("missing", None, right)
        is_later = right is not None and right.raw_id > row.raw_id
        try:
            state, body = self._payloads.read(row.raw_id)
            if state == "discarded":
                return Finding("superseded" if is_later else "discarded", row, right)
            own = self._made_by_its_payload(row, state, body)
        except RawIdUnknown:
            return self._unproved(right, row, is_later=is_later)
        except ArchiveAway:  # which says nothing of the payload
            raise
        except (OSError, StorageUnavailable, PayloadUnreadable, DataQualityError):
            return Finding("superseded" if is_later else "unreadable", row, right)
        best = right if is_later or own is None else own
        if own is None or not same(own, row):
            return Finding("differing", row, best)
        return Finding("superseded", row, right) if is_later else "right"

    def _made_by_its_payload(
        self, row: Measurement, state: State, body: bytes
    ) -> Measurement | None:
        """Return what the payload that a row names makes in its place, None for nothing.

        Raises `DataQualityError` for a payload that makes no row and is not rejected: as it has
        made one, it is damaged, and says nothing against the row.
        """
        try:
            made = transform(row.raw_id, body, self._rules)
        except DataQualityError:
            if state == "rejected":
                return None
            raise
        is_of_row = (made.timestamp_utc, made.series) == (row.timestamp_utc, row.series)
        return made if is_of_row else None

    def _unproved(
        self, right: Measurement | None, row: Measurement, *, is_later: bool
    ) -> Finding | Literal["expired", "older"]:
        """Say what is to be said of a row whose payload is not there."""
        if is_later:
            return Finding("superseded", row, right)
        if row.raw_id == NO_PAYLOAD:
            return "older"
        if day_of(row.raw_id) < self._payloads.first_kept_day():
            return "expired"
        return Finding("orphaned", row, right)


def lies_elsewhere(nodes: Nodes, right: Measurement | None, row: Measurement) -> bool:
    """Say whether a row is for another node to prove, and none of this node's takes its place.

    `right` is the row that the payloads of this node make. No payload is looked for: in a table of
    many nodes most rows are of this kind. One that is here, whatever its raw_id says, has made
    `right` or a row that has lost against it.
    """
    return (right is None or right.raw_id < row.raw_id) and nodes.is_others(row.raw_id)


# ── Nodes: two with one number on one database ────────────────────────────────────────────────────

TWIN = "twin.json"
TWIN_SHOWN = timedelta(hours=1)  # after its last payload arrived
TWIN_PAUSE = 60.0  # seconds between two looks at the rows of a processor


class Twin(Struct, frozen=True):
    """A payload that another Dropzone on the same database has landed as this node's."""

    node: int
    raw_id: UUID

    def text(self) -> str:
        """Say what is wrong, and what to do."""
        return (
            f"another Dropzone writes to this database as node {self.node}, too, as the row of "
            f"{self.raw_id} shows, a payload that was not landed here: give each its own [node] id"
        )

    def is_recent(self) -> bool:
        arrival = arrival_of(self.raw_id)
        return arrival is not None and arrival > datetime.now(UTC) - TWIN_SHOWN


async def find_twin(payloads: Payloads, backend: Backend) -> Twin | None:
    """Look for the row of a twin among the thousand with the latest timestamps.

    A row with this node's number is another folder's if that has marked its raw_id, and the payload
    is not here. One that this folder has made is never taken for it, whatever became of its
    payload, and wherever the folder was restored. Raises `BackendError` and TimeoutError.
    """
    async with asyncio.timeout(PING_PATIENCE):
        rows = await backend.find(limit=AT_A_TIME, descending=True)
    return await asyncio.to_thread(_twin_among, payloads, rows)


def _twin_among(payloads: Payloads, rows: Iterable[Measurement]) -> Twin | None:
    nodes = payloads.nodes()
    for raw_id in sorted((row.raw_id for row in rows), reverse=True):
        twin = Twin(nodes.number, raw_id)
        if nodes.is_doubtful(raw_id) and twin.is_recent():
            try:
                payloads.read(raw_id)  # as an older version may have landed it here
            except RawIdUnknown:
                return twin
            except (OSError, PayloadStoreError):
                continue
    return None


def noted_twin(payloads: Payloads) -> Twin | None:
    """Return the twin that a processor has noted, for as long as it was seen lately."""
    with contextlib.suppress(OSError, ValueError):
        text = (payloads.workspace / TWIN).read_bytes()
        twin = msgspec.json.decode(text, type=Twin)
        if twin.is_recent() and twin.node == payloads.nodes().number:
            return twin
    return None


async def note_twin(payloads: Payloads, backend: Backend) -> None:
    """Look for a twin; log one, and note it for every process that shows how the service is."""
    with contextlib.suppress(BackendError, TimeoutError):
        twin = await find_twin(payloads, backend)
        if twin:
            log.error("%s", twin.text())
            await asyncio.to_thread(write_note, payloads.workspace, TWIN, twin)


# ── Discarding: what is known to be bad goes, and the arrival before it comes back ────────────────
#
# The payloads are moved by the store; their rows are mended here. Both together stand a kill at any
# moment, and so does whatever else happens between it and the next try:
#
#  a. Before a payload is moved, a note of it is on disk, with the row that names it, if there is
#     one. The note goes when all of its payloads are moved, durably, and all rows are mended. Until
#     then the next run of a processor, a rebuild, a start of the server or another discard does
#     what is left of it. A copy of the folder has the note, too.
#  b. What the note says is done once more from the beginning: moving leaves alone what is moved. A
#     payload may have been processed again before it was moved, so its row is looked for once more.
#  c. A row is mended in three steps: find the last arrival before it among all that is processed
#     now; delete the row, only if it still names the discarded payload; upsert the one found. After
#     a kill between these the note still names the row, and it is looked for what is to stand there
#     again: others may have been processed since, and the upsert lets the greatest raw_id stand.
#  d. Meanwhile no processor is at work, and no rebuild, verify, compact or backup. So no payload
#     becomes processed, or moves into a pack, behind the back of the look in c. What is pending
#     then is upserted later, when the row is gone. Payloads may land, and rejected ones may be put
#     back: neither changes a row.
#  e. What a proof that was stopped has derived is thrown away before: it may have the rows of what
#     is discarded. Undiscarding needs no note. The row comes when the payload is processed again,
#     and what is left of a discard is done before, or else it would discard the payload anew.


class Discarding(Struct, frozen=True):
    """A discard that is under way: the payloads that are moved, and all rows that name some."""

    at: datetime
    raw_ids: list[UUID]
    rows: list[Measurement]


class Discards:
    """Discards payloads, and sets the rows right that they have made."""

    def __init__(
        self,
        payloads: Payloads,
        backend: Backend,
        rules: TransformConfig,
        processor: Processor,
        workers: Workers,
        metrics: Metrics,
    ) -> None:
        self._payloads = payloads
        self._backend = backend
        self._rules = rules
        self._processor = processor
        self._workers = workers
        self._metrics = metrics
        self._note = payloads.workspace / DISCARDING
        self._looking = asyncio.Lock()

    async def discard(self, portions: Iterator[Sequence[UUID]]) -> int:
        """Discard payloads in any state, a portion at a time; return how many.

        What is not there, or discarded already, does not count. Raises `BackendError`, with nothing
        of that portion done; `ProcessorBusy`; `PayloadStoreError`.
        """
        count, rows = 0, list[Measurement]()
        async with self._alone(LOCK_PATIENCE):
            await self._finish()
            while (raw_ids := await asyncio.to_thread(next, portions, None)) is not None:
                rows += await self._rows_of(raw_ids)
                discarding = Discarding(datetime.now(UTC), list(raw_ids), rows)
                count += await asyncio.to_thread(self._move, discarding)
            await self._mend(rows)
        return count

    async def undiscard(self, raw_ids: Iterable[UUID]) -> int:
        """Put discarded payloads back to pending; return how many. Raises the same."""
        async with self._alone(LOCK_PATIENCE):
            await self._finish()
            undiscarded = [
                await asyncio.to_thread(self._payloads.undiscard, raw_id) for raw_id in raw_ids
            ]
        return sum(undiscarded)

    async def finish(self, patience: float = LOCK_PATIENCE) -> None:
        """Finish a discard that was cut short, if there is one; raises the same."""
        async with self._looking:  # who asks first goes on first
            is_there = await asyncio.to_thread(self._note.exists)
        if is_there:
            async with self._alone(patience):
                await self._finish()

    async def finish_if_free(self) -> None:
        """Do the same unless something is in the way, of which the log tells."""
        try:
            await self.finish(patience=0)
        except (BackendError, PayloadStoreError, ProcessorBusy) as error:
            log.warning("a discard was cut short, and waits to be finished: %s", error)

    async def finish_at_last(self) -> None:
        """Do the same again and again until it is finished."""
        while await asyncio.to_thread(self._note.exists):
            await self.finish_if_free()
            await asyncio.sleep(STUCK_PAUSE)

    @contextlib.asynccontextmanager
    async def _alone(self, patience: float) -> AsyncIterator[None]:
        lock = AsyncFileLock(upkeep_lock(self._payloads).lock_file, timeout=patience)
        try:
            await lock.acquire()
        except Timeout:
            busy = "verify, rebuild, compact or a backup is at work on this data folder; try again"
            raise ProcessorBusy(busy) from None
        except OSError as error:
            raise storage_error(error) from error
        try:
            async with self._processor.alone():
                yield
        finally:
            await lock.release()

    async def _finish(self) -> None:
        discarding = await asyncio.to_thread(self._noted)
        if discarding:
            found = await self._rows_of(discarding.raw_ids)
            rows = [*discarding.rows, *(row for row in found if row not in discarding.rows)]
            again = msgspec.structs.replace(discarding, rows=rows)
            await asyncio.to_thread(self._move, again)
            await self._mend(rows)
            log.warning("a discard that was cut short is finished: %d rows", len(rows))

    def _noted(self) -> Discarding | None:
        try:
            return msgspec.json.decode(self._note.read_bytes(), type=Discarding)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            kept = set_aside(self._note, self._payloads.workspace)
            wrong = "the note of a discard is damaged (%s) and kept as %s: discard once more"
            log.error(wrong, error, kept)  # noqa: TRY400
            return None

    def _move(self, discarding: Discarding) -> int:
        """Note what is to be done, and move the payloads; return how many that are."""
        with disk_errors():
            shutil.rmtree(self._payloads.workspace / DERIVED_FOLDER, ignore_errors=True)
            part = self._note.with_suffix(".part")
            part.write_bytes(json_of(discarding))
            sync_file(part)
            part.rename(self._note)
            sync_file(self._note.parent)
            moved = self._payloads.discard(discarding.raw_ids, discarding.at)
        self._metrics.discarded.inc(len(moved))
        return len(moved)

    async def _rows_of(self, raw_ids: Sequence[UUID]) -> list[Measurement]:
        """Return the rows that name one of these payloads."""
        rows = list[Measurement]()
        at = self._rules.series
        for raw_id, slot in await asyncio.to_thread(slots_of, self._payloads, raw_ids, at):
            with contextlib.suppress(MeasurementNotFound):
                row = await self._backend.get(*slot)
                if row.raw_id == raw_id:
                    rows.append(row)
        return rows

    async def _mend(self, rows: Sequence[Measurement]) -> None:
        """Delete rows, let the last arrivals before them come back, and forget the note."""
        if rows:
            before = await self._standing_at({(row.timestamp_utc, row.series) for row in rows})
            await self._backend.delete(rows)
            await self._bring_back(before)
        with disk_errors():
            await asyncio.to_thread(self._note.unlink, missing_ok=True)
            await asyncio.to_thread(sync_file, self._note.parent)

    async def _bring_back(self, rows: Sequence[Measurement]) -> None:
        """Upsert rows; tell which the backend refuses by now, found by halving."""
        try:
            await self._backend.upsert(rows)
        except BackendUnavailable:
            raise
        except BackendError as error:
            if len(rows) > 1:
                await self._bring_back(rows[: len(rows) // 2])
                await self._bring_back(rows[len(rows) // 2 :])
            else:
                log.error("the row of %s cannot come back: %s", rows[0].raw_id, error)  # noqa: TRY400

    async def _standing_at(self, slots: Collection[tuple[datetime, str]]) -> list[Measurement]:
        """Return the rows that all processed payloads make of these timestamps and series."""
        standing, few = list[Measurement](), await asyncio.to_thread(self._are_few)

        async def look(run: Run, portion: Portion) -> None:
            made = DERIVED.decode(await run(derive, portion, self._rules, slots))
            standing[:] = winners([*standing, *made.rows])
            for sentence in made.damage:
                log.error("a row may not come back: %s", sentence)

        portions = self._readable()
        if not few:
            await self._workers.spread(portions, look)
        else:
            while (portion := await asyncio.to_thread(next, portions, None)) is not None:
                await look(asyncio.to_thread, portion)
        return standing

    def _readable(self) -> Iterator[Portion]:
        """Yield all that is processed, as far as a lost pack or the disk is not in the way."""
        for source in self._payloads.portions():
            try:
                yield from source.portions
            except (PackDamaged, OSError) as error:
                log.error("a row may not come back: %s", sentence_of(error))  # noqa: TRY400

    def _are_few(self) -> bool:
        """Say whether so little is processed that other processes are not worth their start."""
        count = count_readable(self._payloads)
        return count is not None and count <= MUCH


def slots_of(
    payloads: Payloads, raw_ids: Iterable[UUID], at: SeriesAt
) -> list[tuple[UUID, tuple[datetime] | tuple[datetime, str]]]:
    """Return the timestamps, and the series where there are any, that payloads name.

    Of those that name none there is no row. Raises `PayloadStoreError` for one that is not rejected
    and cannot be read.
    """
    found = list[tuple[UUID, tuple[datetime] | tuple[datetime, str]]]()
    for raw_id in raw_ids:
        try:
            body = payloads.read(raw_id)[1]
            moment = time_stamp_in(body)
            found.append((raw_id, (moment, series_in(body, at)) if at else (moment,)))
        except (DataQualityError, PayloadNotJson, RawIdUnknown):
            continue
        except PayloadUnreadable:
            if not any(payloads.rejections(raw_id)):  # for which it is the reason
                raise
    return found


# ── Upkeep: finished days become packs ────────────────────────────────────────────────────────────

UPKEEP_FIRST = 5.0  # seconds after the start
UPKEEP_PAUSE = 3600.0  # seconds until it is looked again whether a new day has begun


def upkeep_lock(payloads: Payloads) -> FileLock:
    """Return what one run at a time holds that works on all of the processed payloads.

    A second one raises `Timeout` at once.
    """
    return FileLock(payloads.workspace / "upkeep.lock", timeout=0)


def archive_lock(payloads: Payloads) -> FileLock:
    """Return what one run at a time holds that changes the archive; verify and backup go on."""
    return FileLock(payloads.workspace / "archive.lock", timeout=0)


def expire(payloads: Payloads) -> list[str]:
    """Delete what is older than keep_days, in the archive, too; return the names of the packs."""
    with archive_lock(payloads) if payloads.has_archive else contextlib.nullcontext():
        return payloads.expire()


async def archive_packs(
    payloads: Payloads, caller: str
) -> AsyncIterator[tuple[str, Archiving | Exception]]:
    """Put packs into the archive, and yield what became of each.

    One that is damaged does not stop the others; where the archive is away, it ends, and the next
    run goes on there. That it is away is noted, for every process that shows the state.
    """
    if not payloads.has_archive:
        return
    hands, trouble = Hands(1, "archive"), ""  # the end of the program waits for no upload
    try:
        with archive_lock(payloads):
            for name in await asyncio.to_thread(payloads.to_archive):
                try:
                    with audited("archive", caller, pack=name) as facts:
                        work = hands.submit(payloads.archive_pack, name)
                        done = await asyncio.wrap_future(work)
                        facts.update(made=done.made, is_local=done.is_local)
                    if done.objects:
                        yield name, done
                except (OSError, StorageUnavailable) as error:
                    trouble = trouble or sentence_of(error)
                    yield name, error
                    if isinstance(error, ArchiveAway):
                        break
            if trouble:
                note_failed_write(payloads.workspace, trouble, FAILED_ARCHIVING)
            else:
                forget_failed_write(payloads.workspace, FAILED_ARCHIVING)
    finally:
        hands.shutdown(wait=False)


async def compact_daily(payloads: Payloads) -> NoReturn:
    """Pack finished days once a day (UTC): soon after the start, then within an hour of midnight.

    What goes wrong is logged, and tried again an hour later. The pauses differ, so that not all
    begin at once.
    """
    done = ""
    pause = UPKEEP_FIRST
    while True:
        await asyncio.sleep(pause * uniform(0.2, 1))  # noqa: S311 (no secret)
        pause = UPKEEP_PAUSE
        today = f"{datetime.now(UTC):%Y-%m-%d}"
        if today == done:
            continue
        try:
            await compact_by_itself(payloads)
            done = today
        except Timeout:
            log.info("compact waits for another run, next try within the hour")
        except Exception as error:  # else no day would ever be packed again
            defect = None if isinstance(error, PayloadStoreError | OSError) else error
            log.warning("compact failed, next try within the hour: %s", error, exc_info=defect)


async def compact_by_itself(payloads: Payloads) -> None:
    """Pack finished days, and delete what has expired, in a process that gives way to landing.

    Then put into the archive what it lacks. One bad day does not stop the rest; it is raised at the
    end.
    """
    workers, bad = Workers(1), list[Exception]()
    with upkeep_lock(payloads):
        try:
            for day in await asyncio.to_thread(payloads.finished_days):
                try:
                    with audited("compact", "timer", day=day) as facts:
                        facts["packed"] = await workers.run(payloads.compact, day)
                except (OSError, StorageUnavailable) as error:
                    bad.append(error)
            try:
                for pack in await asyncio.to_thread(expire, payloads):
                    audit("expire", "timer", pack=pack)
            except ArchiveAway as error:
                bad.append(error)
        except asyncio.CancelledError:  # a pack may take minutes, and stands a kill
            workers.kill()
            raise
        finally:
            await workers.close()
    async for name, done in archive_packs(payloads, "timer"):
        if isinstance(done, Exception):
            bad.append(done)
        else:
            log_damage(name, done)
    if bad:
        raise bad[0]


def log_damage(pack: str, done: Archiving) -> None:
    for damage in done.damage:
        log.error("%s: %s was put into the archive again, as %s", damage, pack, done.objects)


# ── HTTP: what travels ────────────────────────────────────────────────────────────────────────────


class Health(Struct, frozen=True):
    """The process lives."""

    status: Literal["ok"] = "ok"


class Readiness(Struct, frozen=True):
    """Whether payloads can be landed; each check is `ok` or says what is wrong.

    `raw` alone decides. While the `backend` does not answer, or `processing` has no right to a file
    or a folder, payloads go on landing and wait; so do packs while the `archive` is away.
    """

    status: Literal["ok", "unavailable"]
    checks: dict[str, str]


class Accepted(Struct, frozen=True):
    """The payload is on disk under this raw_id."""

    raw_id: UUID
    status: Literal["accepted"] = "accepted"


RawId = Annotated[str, Meta(extra_json_schema={"format": "uuid"})]


class BadLine(Struct, frozen=True):
    """A line that is no JSON: it has landed as the others have, and will be rejected."""

    line: int
    raw_id: RawId
    detail: str


class AcceptedBatch(Struct, frozen=True):
    """The payloads of a batch are on disk, in this order.

    `not_json` names the lines that are no JSON, the first 1,000 of them, if there are any.
    """

    raw_ids: list[RawId]
    status: Literal["accepted"] = "accepted"
    not_json: list[BadLine] | msgspec.UnsetType = msgspec.UNSET


class Status(Struct, frozen=True):
    """What there is to see at a glance; see `Lately` for how old a count may be.

    `landed` has how many payloads landed in each of the last 60 minutes, this one last; `processed`
    how many there were ever; `rejected` those of now, by code, and `discarded` those of now. Below
    `reserve_bytes` of `free_bytes` payloads are refused. `backend` is `ok` or says what is wrong;
    `failed_write` says so of rows that could not be written, until some can. `processing` is `ok`
    or names the file or folder that keeps payloads from being processed. `archive` is `ok` or says
    since when packs do not get there, and why; null without one. `superseded` counts, since this
    process began, the payloads that met the row of another payload. `series` is null where
    `[transform] series` is not set, and as long as the backend has not been asked; `series_from` is
    that setting, null where it is not set. `scopes` are what the key of this request may do. `node`
    is the number of this node, null where it has none; `node_trouble` says what is wrong with it,
    null where nothing is.
    """

    now: datetime
    landed: list[int]
    last_landed: datetime | None
    pending: int
    oldest_pending_seconds: float | None
    processed: int
    rejected: dict[str, int]
    discarded: int
    free_bytes: int
    reserve_bytes: int
    backend: str
    failed_write: FailedWrite | None
    processing: str
    archive: str | None
    superseded: int
    series: SeriesCount | None
    series_from: str | None
    scopes: list[Scope]
    node: int | None
    node_trouble: str | None


class Summary(Struct, frozen=True):
    """What each span of a range of time holds, in order; those without a row are left out."""

    buckets: list[Bucket]


class MeasurementPage(Struct, frozen=True):
    """Measurements in order; `next` is the `after` of the page behind this one, if there is one.

    It is the timestamp of the last row here; where there are series, that, a slash and its series.
    """

    measurements: list[Measurement]
    next: str | None


class SeriesPage(Struct, frozen=True):
    """Series by name, each with the timestamp of its last row.

    `next` is the `after` of the page behind this one, if there is one.
    """

    series: list[Series]
    next: str | None


class RejectedPayload(Rejection, frozen=True):
    """A payload and why it was rejected; where `described` was asked for, more of its content.

    That is the series that it names, if it names one, and the raw_id of the payload that came later
    for the same timestamp and became a row, if there is one: it was corrected and sent again.
    """

    series: str | msgspec.UnsetType | None = msgspec.UNSET
    superseded_by: UUID | msgspec.UnsetType | None = msgspec.UNSET


class RejectionPage(Struct, frozen=True):
    """Rejected payloads in order of arrival; `next` is the `after` of the page behind this one.

    `codes` counts all that were rejected in the time asked for, `total` those of the code, too.
    """

    rejected: list[RejectedPayload]
    total: int
    codes: dict[str, int]
    next: UUID | None


class Retried(Struct, frozen=True):
    """How many rejected payloads were put back to pending."""

    retried: int


class Discarded(Struct, frozen=True):
    """How many rejected payloads were discarded."""

    discarded: int


class Receipt(Struct, frozen=True):
    """Where a payload is and what became of it.

    `received_at` is read from the raw_id. A processed payload has its `measurement`, or the
    `superseded_by` of a later payload for the same timestamp. `rejection` is the last one, also of
    a payload that was put back since. A discarded payload has `discarded_at`.
    """

    raw_id: UUID
    state: State
    received_at: datetime | None
    bytes: int
    sha256: str
    measurement: Measurement | None = None
    superseded_by: UUID | None = None
    rejection: Rejection | None = None
    discarded_at: datetime | None = None


class Problem(Struct, frozen=True):
    """An RFC 9457 problem document; `code` is stable, `detail` is for people."""

    title: str
    status: int
    detail: str
    code: str
    request_id: str
    type: str = "about:blank"


class Elsewhere(Problem, frozen=True, kw_only=True):
    """The problem `raw_id_elsewhere`: the payload is not here, its raw_id names another `node`."""

    node: int


class ProcessQuery(Struct, frozen=True):
    limit: Annotated[int, Meta(ge=1, description="Process this many payloads at most.")] | None = (
        None
    )


PageSize = Annotated[int, Meta(ge=1, le=10_000, description="Return this many at most.")]


OneSeries = Annotated[str, Meta(max_length=LONGEST_SERIES, description="Of this series alone.")]
SERIES_PARAMETERS = {"series", "after_series"}  # which are there only where [transform] series is


class MeasurementQuery(Struct, frozen=True):
    series: OneSeries | None = None


class SeriesQuery(Struct, frozen=True):
    after: Annotated[str, Meta(description="The `next` of a page.")] | None = None
    limit: PageSize = 1000


class MeasurementsQuery(Struct, frozen=True):
    series: OneSeries | None = None
    since: Annotated[datetime, Meta(tz=True, description="From this moment on.")] | None = None
    until: Annotated[datetime, Meta(tz=True, description="Before this moment.")] | None = None
    after: Annotated[datetime, Meta(tz=True, description="The `next` of a page.")] | None = None
    after_series: (
        Annotated[str, Meta(description="The series of `after`, unless a `next` has both.")] | None
    ) = None
    limit: (
        Annotated[
            PageSize,
            Meta(description="Return this many at most. Unless given: 1,000 of JSON, all of CSV."),
        ]
        | None
    ) = None
    order: Annotated[Literal["asc", "desc"], Meta(description="By timestamp.")] = "asc"
    format: Annotated[Literal["json", "csv"], Meta(description="Goes before Accept.")] | None = None


class SummaryQuery(Struct, frozen=True):
    series: OneSeries | None = None
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


class DiscardQuery(RetryQuery, frozen=True):
    series: Annotated[str, Meta(description="Of this series.")] | None = None


class RejectedQuery(RetryQuery, frozen=True):
    described: Annotated[
        bool, Meta(description="With the series of each, and the payload that has corrected it.")
    ] = False
    after: Annotated[UUID, Meta(description="The `next` of a page.")] | None = None
    limit: PageSize = 1000

    def is_behind(self, rejection: Rejection) -> bool:
        return self.after is None or rejection.raw_id > self.after


# ── HTTP: sending, no faster than a client takes it ───────────────────────────────────────────────

STALLED = 30.0  # seconds after which a client that takes nothing of its answer is cut off
UNTAKEN = 64 * 1024 * 1024  # bytes of answers that are held until their clients take them
LOOK_AROUND = 1.0  # seconds between two looks at all clients


class Taking(Struct):
    """A client that has not taken all yet.

    `held` bytes are in memory for it, of an answer to `caller`, besides those that are `waiting` in
    its connection. It took something last at `since`. `is_full` says that nothing more can be
    handed over to it.
    """

    held: int = 0
    caller: str = ""
    waiting: int = 0
    since: float = 0.0
    is_full: bool = False

    def has_to_move(self) -> bool:
        """Say whether it is its turn, and not that of the service."""
        return self.is_full or self.waiting > 0


class Clients:
    """Those to whom something was sent just now, and what of it they have not taken yet.

    One that takes nothing for `STALLED` seconds is cut off. Where `UNTAKEN` bytes are held for all
    of them, or half of that for those of one caller, those are that have taken nothing for the
    longest time.
    """

    def __init__(self) -> None:
        self._taking: dict[asyncio.BaseTransport, Taking] = {}
        self._held = Counter[str]()  # by caller

    def note(
        self,
        client: asyncio.BaseTransport,
        held: int = 0,
        caller: str = "",
        *,
        is_full: bool = False,
    ) -> None:
        """Hear that something is sent, and how many bytes are in memory for what follows."""
        taking = self._taking.get(client)
        if taking is None:
            taking = self._taking[client] = Taking()
        if held != taking.held:
            self._release(taking)
            self._held[caller] += held
            taking.held, taking.caller = held, caller
        taking.since, taking.is_full = time.monotonic(), is_full

    def expect(self, client: asyncio.BaseTransport) -> None:
        """Hear that an answer is about to be sent, of which nothing stays in memory here."""
        if client not in self._taking:
            self.note(client)

    def require_room(self, caller: str, size: int) -> None:
        """Raise where so many bytes more cannot be held; one answer alone always can."""
        if not self._has_room(caller, size):
            self._cut_off_slowest(UNTAKEN // 2 - size, caller)
            self._cut_off_slowest(UNTAKEN - size)
        if not self._has_room(caller, size):
            raise DropzoneError("too many answers are under way", "overloaded", 503)

    def _has_room(self, caller: str, size: int) -> bool:
        own, total = self._held[caller], self._held.total()
        fits = not own or own + size <= UNTAKEN // 2
        return fits and (not total or total + size <= UNTAKEN)

    async def look_around(self) -> NoReturn:
        """Cut off, again and again, those that have to be."""
        while True:
            await asyncio.sleep(LOOK_AROUND)
            try:
                stalled = self._look()
            except Exception:  # else nobody would ever be cut off again
                log.exception("clients cannot be looked at")
            else:
                if stalled:
                    log.info("cut off %d clients that did not take their answers", stalled)

    def _look(self) -> int:
        now, cut = time.monotonic(), 0
        for client, taking in list(self._taking.items()):
            waiting = waiting_for(client)
            if waiting != taking.waiting:
                taking.waiting, taking.since = waiting, now
            if not (waiting or taking.held):
                del self._taking[client]
            elif taking.has_to_move() and now - taking.since > STALLED:
                self._cut_off(client)
                cut += 1
        return cut + self._cut_off_slowest(UNTAKEN)

    def _cut_off_slowest(self, limit: int, caller: str | None = None) -> int:
        """Cut off clients until no more than `limit` bytes are held and wait for the others.

        Not those that took something within the last second, nor those that are waiting themselves;
        of one caller alone, if it is given.
        """
        found = [
            (client, taking)
            for client, taking in self._taking.items()
            if caller in (None, taking.caller)
        ]
        untaken = sum(taking.held + taking.waiting for _, taking in found)
        if untaken <= limit:
            return 0
        before, cut = time.monotonic() - LOOK_AROUND, 0
        for client, taking in sorted(found, key=lambda each: each[1].since):
            if untaken <= limit or taking.since > before:
                break
            if taking.has_to_move():
                untaken -= taking.held + taking.waiting
                self._cut_off(client)
                cut += 1
        return cut

    def _cut_off(self, client: asyncio.BaseTransport) -> None:
        self._release(self._taking.pop(client))
        reset(client)

    def _release(self, taking: Taking) -> None:
        self._held[taking.caller] -= taking.held
        if not self._held[taking.caller]:
            del self._held[taking.caller]
        taking.held = 0


def waiting_for(client: asyncio.BaseTransport) -> int:
    """Return how many bytes wait in a connection until they are taken."""
    try:
        return cast("asyncio.WriteTransport", client).get_write_buffer_size()
    except AttributeError:  # asyncio's TLS has nothing left of a connection that is closed
        return 0


class Sent(web.StreamResponse):
    """An answer that is too large to be handed over whole, before its client takes any of it.

    `held` is how many bytes it takes in memory meanwhile.
    """

    clients: Clients  # is set by `edge`, and whose answer it is, too
    caller: str
    held = PIECE_BYTES

    def admit(self, clients: Clients, caller: str) -> None:
        """Raise where there is no room for it."""
        self.clients, self.caller = clients, caller
        clients.require_room(caller, self.held)

    async def hand_over(self, client: asyncio.BaseTransport | None, text: bytes) -> None:
        """Send in pieces; what is beyond the next one waits here, and not in the system."""
        rest = memoryview(text)
        while rest:
            if client is None:
                raise ConnectionResetError("the client has gone")
            self.clients.note(client, self.held, self.caller, is_full=True)
            await self.write(rest[:PIECE_BYTES])
            self.clients.note(client, self.held, self.caller)
            rest = rest[PIECE_BYTES:]

    def begin(self, client: asyncio.BaseTransport | None) -> None:
        """Have system and TLS take little at a time, which they would hold as well."""
        if client is None:
            return
        with contextlib.suppress(AttributeError, OSError):  # it is closed, or no TCP connection
            cast("asyncio.WriteTransport", client).set_write_buffer_limits(PIECE_BYTES)
            connection = client.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 2 * PIECE_BYTES)

    def end(self, client: asyncio.BaseTransport | None) -> None:
        """Hold nothing any more."""
        if client:
            self.clients.note(client)


class InPieces(Sent, web.Response):
    """An answer whose body is in memory; `shared` if it is so anyhow, for all who ask."""

    def __init__(self, *, body: bytes, shared: bool = False, **options: Any) -> None:
        super().__init__(body=body, **options)
        self.held = PIECE_BYTES if shared else len(body)
        self._client: asyncio.BaseTransport | None = None

    async def prepare(self, request: web.BaseRequest) -> Any:
        """Send the head."""
        self._client = request.transport if request.method != "HEAD" else None
        return await super().prepare(request)

    async def write_eof(self, data: bytes = b"") -> None:
        """Send the body, and end."""
        body, client = self.body, self._client
        # What aiohttp has compressed for an outer application is smaller, and is not in `body`.
        if client and isinstance(body, bytes) and not self.compression:
            self.body = None
            self.begin(client)
            try:
                await self.hand_over(client, body)
            finally:
                self.end(client)
        await super().write_eof(data)


Portions = AsyncIterator[tuple[bytes, int]]  # a part of an answer, and how many units it has


class WhileRead(Sent):
    """An answer that is sent while it is read.

    Between two portions nothing of the source is held, however slow the client is. What fails in
    the middle cuts the connection, so that nobody takes a part for the whole.
    """

    def __init__(
        self,
        portions: Portions,
        name: str,
        unit: str,
        *,
        close: Callable[[], object] = tuple,
        held: int = PIECE_BYTES,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers=headers)
        self._portions, self._name, self._unit = portions, name, unit
        self._close, self.held = close, held

    def admit(self, clients: Clients, caller: str) -> None:
        """Raise where there is no room for it; then it is closed."""
        try:
            super().admit(clients, caller)
        except DropzoneError:
            self._close()
            raise

    async def prepare(self, request: web.BaseRequest) -> Any:
        """Send the head, then all portions; aiohttp sends the end."""
        client = request.transport
        try:
            begun = await super().prepare(request)
            if request.method != "HEAD":
                self.begin(client)
                await self._send(request)
        finally:
            self._close()
            self.end(client)
        return begun

    async def _send(self, request: web.BaseRequest) -> None:
        sent = 0
        try:
            async for text, count in self._portions:
                await self.hand_over(request.transport, text)
                sent += count
        except BaseException as error:
            cut_off(request)
            if isinstance(error, ConnectionError) or not isinstance(error, Exception):
                raise  # the client has gone, or the service stops
            defect = None if isinstance(error, BackendError | PayloadStoreError) else error
            wrong = f"request %s: its {self._name} was cut off behind %d {self._unit}: %s"
            log.warning(wrong, request[NOTES].request_id, sent, error, exc_info=defect)
            raise ConnectionResetError("the answer was cut off") from error


def cut_off(request: web.BaseRequest) -> None:
    """Reset the connection of a request."""
    if request.transport:  # or else the client has gone
        reset(request.transport)


def reset(client: asyncio.BaseTransport) -> None:
    """Reset a connection (RST), so that no client takes its end for the end of the answer.

    To HTTP/1.0, which some proxies speak to what is behind them, the regular end is just that.
    """
    with contextlib.suppress(AttributeError, OSError):  # it is none, or has just been closed
        connection = client.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    cast("asyncio.WriteTransport", client).abort()


# ── HTTP: routes ──────────────────────────────────────────────────────────────────────────────────

Handler = Callable[..., Any]  # takes the request, and its query where there is one

CONFIG = web.AppKey("CONFIG", Config)
RAW = web.AppKey("RAW", PayloadStore)
BACKEND = web.AppKey("BACKEND", Backend)
PROCESSOR = web.AppKey("PROCESSOR", Processor)
PENDING = web.AppKey("PENDING", Lately[tuple[list[str], int]])
REJECTED = web.AppKey("REJECTED", Lately[Counter[str]])
DISCARDED = web.AppKey("DISCARDED", Lately[int])
SERIES = web.AppKey("SERIES", SeriesLately)
BACKEND_TROUBLE = web.AppKey("BACKEND_TROUBLE", Shared[str | None])
PROCESSING_TROUBLE = web.AppKey("PROCESSING_TROUBLE", Shared[str | None])
METRICS = web.AppKey("METRICS", Metrics)
CHECKER = web.AppKey("CHECKER", Workers)
PREFIX = web.AppKey("PREFIX", str)  # under which an outer application has mounted this one
LIMITERS = web.AppKey("LIMITERS", dict[str, "BaseRateLimiter"])
PING_PATIENCE = 3.0  # seconds


CLIENTS = web.AppKey("CLIENTS", Clients)
ARRIVALS = web.AppKey("ARRIVALS", ThreadPoolExecutor)  # threads for what lands and is large
GLANCES = web.AppKey("GLANCES", ThreadPoolExecutor)  # threads that look at the state


class Notes(Struct):
    """What becomes known of a request while it is answered."""

    request_id: str
    caller: str = ""  # `key:gateway-7`; empty where no key is needed
    scopes: Collection[str] = get_args(Scope)  # of the caller
    landed: Sequence[UUID] = ()
    refusal: str = ""  # the code of the problem document
    rate_headers: dict[str, str] = {}


NOTES = web.RequestKey("NOTES", Notes)  # is set by `edge`


class Turns:
    """Lets `at_once` requests at a time do their work, half of them of one caller; others wait.

    They share a few threads of their own, as each that is at work makes the event loop wait for the
    interpreter. So all of them together hold up nobody else, whatever each of them asks for, and
    those of one caller no other caller. A client that has gone when its turn comes is passed over.
    """

    def __init__(
        self, name: str, at_once: int, threads: int = 1, *, may_hang: bool = False
    ) -> None:
        self._free = asyncio.Semaphore(at_once)
        self._share = max(1, at_once // 2)
        self._shares = WeakValueDictionary[str, asyncio.Semaphore]()  # of callers who wait or work
        self.threads = Hands(threads, name) if may_hang else ThreadPoolExecutor(threads, name)

    @contextlib.asynccontextmanager
    async def turn(self, request: web.Request) -> AsyncIterator[None]:
        """Wait until it is the turn of a request."""
        own = self._shares.setdefault(caller_of(request), asyncio.Semaphore(self._share))
        async with own, self._free:
            if request.transport is None:
                raise asyncio.CancelledError  # nobody hears an answer
            yield

    async def run(self, call: Callable[..., T], *arguments: object) -> T:
        """Call something in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, call, *arguments)


READS = web.AppKey("READS", Turns)  # of rows and payloads
RECEIPTS = web.AppKey("RECEIPTS", Turns)  # each of which holds a payload, however large
FAR = web.AppKey("FAR", Turns)  # of payloads in the archive
SUMMARIES = web.AppKey("SUMMARIES", Turns)  # of all rows of a range, which may take seconds
RETRIES = web.AppKey("RETRIES", Turns)  # of whole quarantines
TURNS = web.RequestKey("TURNS", Turns)  # those in which a request is answered

ROUTES: list[Route] = []
NDJSON = {
    f"application/{name}"
    for name in ("x-ndjson", "ndjson", "x-jsonl", "jsonl", "x-jsonlines", "jsonlines")
}
UTF8 = ("utf-8", "utf8", "us-ascii", "ascii")
MANY = 1000  # lines, or raw_ids, that are not looked at in the event loop


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
    turns: web.AppKey[Turns] | None = None  # that it waits for; None: it is answered at once
    limited: bool = True  # whether the limits count it
    handler: Handler = field(init=False)

    def statuses(self) -> list[int]:
        """Return the statuses that its answers may have, in order."""
        guarded = (401, 403, 503) if self.scope else ()
        limited = (429,) if self.limited else ()
        wrong = (400,) if self.query else ()
        return sorted({*self.answers, *self.problems, *guarded, *limited, *wrong})

    def __call__(self, handler: Handler) -> Handler:
        self.handler = handler
        ROUTES.append(self)
        return handler

    def query_of(self, request: web.Request) -> Struct:
        """Return the checked query."""
        query = query_in(request, cast("type[Struct]", self.query))
        for name in SERIES_PARAMETERS:
            text = getattr(query, name, None)
            if text is not None:
                require_series(request.app)
                require_name(name, text)
        return query

    async def handle(self, request: web.Request) -> Any:
        """Answer a request, behind the guard and the check of the query."""
        app = request.app
        limiters = app[LIMITERS]
        if limiters and self.limited:
            admit_address(request)  # guessed keys count, too
        if self.scope and not app[GUARD].is_open:
            scopes = await authenticate(request)
            if limiters:
                admit(request, "key", request[NOTES].caller)
            authorize(request, self.scope, scopes)
        arguments = (self.query_of(request),) if self.query else ()
        if self.turns is None:
            return await self.handler(request, *arguments)
        turns = app[self.turns]
        if app[RAW].has_archive and "raw_id" in request.match_info:
            turns = await way_to(app, raw_id_in(request), turns)
        request[TURNS] = turns
        async with turns.turn(request):
            return await self.handler(request, *arguments)


def require_name(parameter: str, text: str) -> None:
    """Raise where a parameter has what no series can be named; "" are rows without a series."""
    if not text.isprintable():
        raise query_invalid(parameter, f"{_shown(text)}: no series has such a name")


def require_series(app: web.Application, status: int = 400) -> None:
    """Raise where all measurements are one series."""
    if not app[CONFIG].transform.series:
        wrong = "all measurements are one series, as [transform] series is not set: docs/series.md"
        raise DropzoneError(f"{wrong} says when to set it", "series_unset", status)


async def way_to(app: web.Application, raw_id: UUID, turns: Turns) -> Turns:
    """Return the turns in which to read a payload; those of the archive may take their time."""
    return app[FAR] if await turns.run(app[RAW].is_archived, raw_id) else turns


@Route("GET", "/health", None, {200: (Health,)}, limited=False)
async def health(_: web.Request) -> web.Response:
    """Say that the process lives."""
    return answer(Health())


@Route("GET", "/ready", None, {200: (Readiness,), 503: (Readiness,)}, limited=False)
async def ready(request: web.Request) -> web.Response:
    """Say whether payloads can be landed; what else is wrong is shown, and landing goes on."""
    app = request.app
    raw, processing, backend = await asyncio.gather(
        app[RAW].landing_trouble(), app[PROCESSING_TROUBLE].look(), app[BACKEND_TROUBLE].look()
    )
    checks = {"raw": raw or "ok", "processing": processing or "ok", "backend": backend or "ok"}
    archive = await archive_state(app)
    if archive:
        checks["archive"] = archive
    return answer(Readiness("unavailable" if raw else "ok", checks), 503 if raw else 200)


async def processing_trouble(app: web.Application) -> str | None:
    """Return what keeps payloads from being processed, None if nothing does."""
    oldest = list[str]()
    try:
        async with asyncio.timeout(PING_PATIENCE):  # the disk may hang
            with contextlib.suppress(StorageUnavailable):  # of which the checks say more
                oldest, _ = await app[PENDING].look(patient=False)
            return await in_glance(app, app[RAW].processing_trouble, oldest)
    except TimeoutError:
        return f"the disk does not answer within {PING_PATIENCE} s"


@Route("GET", "/status", "read", {200: (Status,)}, (503,))
async def status(request: web.Request) -> web.Response:
    """Say what landed lately, what waits, and what is wrong: cheap enough to ask every second."""
    app = request.app
    with disk_errors():
        activity, (free, reserve), failed = await glance(app)
    last = activity.last_landed
    oldest, pending = await app[PENDING].look()
    superseded = await in_glance(app, app[METRICS].superseded_since_start)
    processing, rejected = await in_glance(app, app[RAW].processing_trouble, oldest), Counter[str]()
    discarded = 0
    with contextlib.suppress(StorageUnavailable):  # of which `processing` tells
        rejected = await app[REJECTED].look()
        discarded = await app[DISCARDED].look()
    twin = await in_glance(app, noted_twin, app[RAW])
    return answer(
        Status(
            now=datetime.now(UTC),
            landed=activity.landed,
            last_landed=datetime.fromtimestamp(last / 1000, UTC) if last else None,
            pending=pending,
            oldest_pending_seconds=age_of(oldest),
            processed=activity.processed,
            rejected=rejected,
            discarded=discarded,
            free_bytes=free,
            reserve_bytes=reserve,
            backend=await app[BACKEND_TROUBLE].look() or "ok",
            failed_write=failed,
            processing=processing or "ok",
            archive=await archive_state(app),
            superseded=superseded,
            series=await app[SERIES].look() if app[CONFIG].transform.series else None,
            series_from=str(app[CONFIG].transform.series) or None,
            scopes=[scope for scope in get_args(Scope) if scope in request[NOTES].scopes],
            node=app[CONFIG].node.id,
            node_trouble=twin.text() if twin else None,
        )
    )


async def archive_state(app: web.Application) -> str | None:
    """Return `ok`, or what the last run said that put packs into the archive; None without one."""
    if not app[RAW].has_archive:
        return None
    failed = await in_glance(app, failed_write, app[RAW].workspace, FAILED_ARCHIVING)
    return f"since {timestamp_text(failed.since)}: {failed.detail}" if failed else "ok"


async def glance(app: web.Application) -> tuple[Activity, tuple[int, int], FailedWrite | None]:
    """Return what landed lately, the room that there is, and what could not be written."""
    raw = app[RAW]
    return await in_glance(app, lambda: (raw.activity(), raw.room(), failed_write(raw.workspace)))


async def in_glance(app: web.Application, look: Callable[..., T], *arguments: object) -> T:
    """Look at something in a thread that no other work can hold up."""
    return await asyncio.get_running_loop().run_in_executor(app[GLANCES], look, *arguments)


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
    "POST",
    "/ingest",
    "ingest",
    {202: (Accepted, AcceptedBatch)},
    (400, 408, 413, 415, 422, 501, 503),
)
async def ingest(request: web.Request) -> web.Response:
    """Land any JSON document, stored as it is; several of them, or an array of objects, as a batch.

    All of a batch lands or none. A line that is no JSON does not keep the others from landing.
    """
    app, notes, key = request.app, request[NOTES], idempotency_key(request)
    owner = notes.caller  # of the key; an address may be another one at the next try
    caller = owner or address_of(request)
    with app[ADMISSION].admit(caller, app[CONFIG].server.max_body_bytes) as arriving:
        body = await read_body(request, arriving.take)
        try:
            form, payloads, not_json = await contents_in(app, request, body, caller)
        except PayloadNotJson as error:
            error.detail += advice_on(body, media_type_of(request), request.charset)
            raise
        notes.landed = raw_ids = await app[RAW].land(body, key, owner, form, payloads)
    if form:
        render = functools.partial(accepted_batch, raw_ids, not_json)
        if payloads > MANY:
            return json_answer(await in_thread(app, render), 202)
        return json_answer(render(), 202)
    [raw_id] = raw_ids
    text = msgspec.to_builtins(raw_id)  # several times as fast as str()
    location = {"Location": f"{app[PREFIX]}/raw/{text}"}
    return json_answer(msgspec.json.encode(Accepted(raw_id)), 202, location)


def media_type_of(request: web.Request) -> str:
    """Return the media type of a body; `content_type` of aiohttp also reads its parameters."""
    return request.headers.get("Content-Type", "").partition(";")[0].strip().lower()


def advice_on(body: bytes, media_type: str, charset: str | None) -> str:
    """Say what a body is that is no JSON, as far as that is plain, and what to send."""
    begin = body[:64].lstrip(b"\xef\xbb\xbf \t\r\n")
    if b"\0" in begin or begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "; it looks like UTF-16: send UTF-8"
    if charset and charset.lower() not in UTF8 and not _is_utf8(body):
        return f"; it is said to be {_shown(charset)}: send UTF-8"
    if media_type == "multipart/form-data" or begin.startswith(b"--"):
        kind = "a form of several parts"
    elif media_type == "application/x-www-form-urlencoded" and b"=" in begin:
        kind = "a form"
    elif media_type.endswith("xml") or begin.startswith(b"<"):
        kind = "XML"
    elif media_type == "text/csv":
        kind = "CSV"
    else:
        return ""
    return f"; it is {kind}: the body itself has to be a JSON document, or one on each line"


def _is_utf8(body: bytes) -> bool:
    with contextlib.suppress(UnicodeDecodeError):
        check_utf8(body)
        return True
    return False


def accepted_batch(raw_ids: Sequence[UUID], not_json: Sequence[NotJson]) -> bytes:
    """Return the answer to a batch."""
    texts = texts_of(raw_ids)
    bad = [BadLine(line, texts[at], detail) for line, at, detail in not_json]
    return msgspec.json.encode(AcceptedBatch(texts, not_json=bad or msgspec.UNSET))


async def contents_in(
    app: web.Application, request: web.Request, body: bytes, caller: str
) -> Contents:
    """Find out what a body is; if it is large and odd in another process, where few wait."""
    is_ndjson = media_type_of(request) in NDJSON
    if len(body) <= ODD_AT_ONCE:
        return contents_of(body, is_ndjson=is_ndjson)
    look = functools.partial(contents_of, body, is_ndjson=is_ndjson)
    try:
        if len(body) <= LARGE_JSON and body.count(b"\n") <= MANY:
            return look(patient=False)
        return await in_thread(app, functools.partial(look, patient=False))
    except REFUSED:
        with app[ADMISSION].to_be_checked.taken(caller, len(body)):
            return await app[CHECKER].run(look)


async def in_thread(app: web.Application, call: Callable[[], T]) -> T:
    """Call something in a thread for what arrives and is large."""
    return await asyncio.get_running_loop().run_in_executor(app[ARRIVALS], call)


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
    "GET",
    "/measurements",
    "read",
    {200: (MeasurementPage, "text/csv")},
    (503,),
    MeasurementsQuery,
    turns=READS,
)
async def measurements(request: web.Request, query: MeasurementsQuery) -> web.StreamResponse:
    """List measurements by timestamp, and those of many series at one timestamp by series.

    JSON (`application/json`) comes in pages of `limit` rows, 1,000 unless given: a page that is not
    the last has a `next`, which is the `after` of the page behind it, and a header `Link` that
    leads there. CSV (`text/csv`, RFC 4180) has the whole range, however many rows that is, unless
    `limit` is given; then it comes in pages, too, by `Link`. A CSV that breaks off, without the end
    of its chunks, is not whole.
    """
    app, reads = request.app, request.app[READS]
    if query.after_series is not None and query.after is None:
        raise query_invalid("after_series", "of no use without after")
    as_csv = query.format == "csv" or (query.format is None and wants_csv(request))
    if as_csv and query.limit is None:
        rows = await find_rows(app, query, CSV_ROWS)
        headers = {"Vary": "Accept", "Content-Type": "text/csv; charset=utf-8"}
        portions = csv_portions(app, request, query, rows)
        return WhileRead(portions, "CSV", "rows", held=CSV_BYTES, headers=headers)
    limit = query.limit or PAGE_ROWS
    rows = await find_rows(app, query, limit + 1)
    rows, more = rows[:limit], len(rows) > limit
    headers, following = {"Vary": "Accept"}, None
    if more:
        following = cursor_text(app, rows[-1])
        headers |= link_to_next(request, following)
    if as_csv:
        body = await reads.run(csv_of, app, rows)
        return InPieces(body=body, content_type="text/csv", charset="utf-8", headers=headers)
    page = MeasurementPage(rows, following)
    return json_answer(await reads.run(json_of_page, page), headers=headers)


PAGE_ROWS = 1000  # of JSON, unless a limit is given
CSV_ROWS = 5000  # that are read and written at a time, so that any range fits into memory
CSV_BYTES = 100 * CSV_ROWS  # that these have
CSV_COLUMNS = "timestamp_utc,mean,std_dev,raw_id"


def wants_csv(request: web.Request) -> bool:
    accept = request.headers.get("Accept", "")
    return "text/csv" in accept and "application/json" not in accept


Cursor = tuple[datetime, str]  # the timestamp and the series of a row


def cursor_text(app: web.Application, row: Measurement) -> str:
    """Return the `after` of the page behind a row."""
    text = timestamp_text(row.timestamp_utc)
    return f"{text}/{row.series}" if app[CONFIG].transform.series else text


def link_to_next(request: web.Request, after: str) -> dict[str, str]:
    """Return the header that leads to the next page (RFC 8288)."""
    url = request.rel_url
    parameters = {name: text for name, text in url.query.items() if name != "after_series"}
    return {"Link": f'<{url.with_query(parameters | {"after": after})}>; rel="next"'}


async def find_rows(
    app: web.Application, query: MeasurementsQuery, limit: int, behind: Cursor | None = None
) -> list[Measurement]:
    """Return the next rows of a range, behind a row or where the query begins."""
    after, after_series = behind or (query.after, query.after_series)
    of_series: dict[str, Any] = {}
    if app[CONFIG].transform.series:
        of_series = {"series": query.series, "after_series": after_series}
    return await app[BACKEND].find(
        since=query.since,
        until=query.until,
        after=after,
        limit=limit,
        descending=query.order == "desc",
        **of_series,
    )


def json_of_page(page: MeasurementPage) -> bytes:
    """Do as `json_of`, in a thread that others need not wait for."""
    rows = [json_of(some)[1:-1] for some in unhurried(page.measurements)]
    return b'{"measurements":[%s],"next":%s}' % (b",".join(rows), json_of(page.next))


def csv_of(app: web.Application, rows: Sequence[Measurement], *, with_head: bool = True) -> bytes:
    """Return rows as CSV, the series before them where there are any."""
    has_series = bool(app[CONFIG].transform.series)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if with_head:
        text.write("series," * has_series + CSV_COLUMNS + "\r\n")
    for some in unhurried(rows):
        for row in some:
            own = [timestamp_text(row.timestamp_utc), row.mean, row.std_dev, row.raw_id]
            writer.writerow([row.series, *own] if has_series else own)
    return text.getvalue().encode()


async def csv_portions(
    app: web.Application, request: web.Request, query: MeasurementsQuery, rows: list[Measurement]
) -> Portions:
    """Yield the CSV of a whole range whose first `rows` are known, and how many rows each part has.

    Raises `BackendError`.
    """
    reads = app[READS]
    csv_of_more = functools.partial(csv_of, with_head=False)
    text = await reads.run(csv_of, app, rows)
    while text:
        last, count = (rows[-1].timestamp_utc, rows[-1].series) if rows else None, len(rows)
        rows.clear()  # a slow reader makes the text wait, not the rows as well
        yield text, count
        text = b""
        if last:
            async with reads.turn(request):
                rows = await find_rows(app, query, CSV_ROWS, last)
                text = await reads.run(csv_of_more, app, rows)


@Route(
    "GET", "/measurements/summary", "read", {200: (Summary,)}, (503,), SummaryQuery, turns=SUMMARIES
)
async def summary(request: web.Request, query: SummaryQuery) -> web.Response:
    """Summarize the measurements of a range of time in spans of equal length, for a chart."""
    begun = time.perf_counter()
    of_series: dict[str, Any] = {} if query.series is None else {"series": query.series}
    found = await request.app[BACKEND].summarize(
        since=query.since, until=query.until, buckets=query.buckets, **of_series
    )
    took = 1000 * (time.perf_counter() - begun)  # by which the page spares the backend
    body = await request.app[SUMMARIES].run(json_of, Summary(found))
    return json_answer(body, headers={"Server-Timing": f"backend;dur={took:.1f}"})


@Route(
    "GET",
    "/measurements/{timestamp}",
    "read",
    {200: (Measurement,)},
    (404, 503),
    MeasurementQuery,
    turns=READS,
)
async def measurement(request: web.Request, query: MeasurementQuery) -> web.Response:
    """Return the measurement at one timestamp.

    Where several series have one, the query has to say of which: 400 otherwise.
    """
    backend, series = request.app[BACKEND], query.series
    timestamp = moment_in("timestamp", request.match_info["timestamp"])
    if not request.app[CONFIG].transform.series:
        return answer(await backend.get(timestamp))
    if series is None:
        series = await only_series_at(backend, timestamp)
    return answer(await backend.get(timestamp, series))


async def only_series_at(backend: Backend, timestamp: datetime) -> str:
    """Return the series that has a row at a timestamp, "" for none; raises where several have."""
    rows = await rows_at(backend, timestamp, SERIES_NAMED + 1)
    if len(rows) > 1:
        names = [row.series for row in rows]
        several = "several series have one at this timestamp"
        error = query_invalid("series", f"missing: {several}, such as {_shown(names[0])}")
        error.extra["known"] = names[:SERIES_NAMED]
        raise error
    return rows[0].series if rows else ""


SERIES_NAMED = 100  # by an error


@Route("GET", "/series", "read", {200: (SeriesPage,)}, (404, 503), SeriesQuery, turns=READS)
async def series(request: web.Request, query: SeriesQuery) -> web.Response:
    """List the series that have rows by name, each with the timestamp of its last one.

    A page that is not the last has a `next`, which is the `after` of the page behind it, and a
    header `Link` that leads there. Where `[transform] series` is not set, it is 404.
    """
    require_series(request.app, 404)
    if query.after is not None:
        require_name("after", query.after)
    found = await request.app[BACKEND].series(after=query.after, limit=query.limit + 1)
    shown, following = found[: query.limit], None
    headers = {}
    if len(found) > len(shown):
        following = shown[-1].series
        headers = link_to_next(request, following)
    page = SeriesPage(shown, following)
    return json_answer(await request.app[READS].run(json_of, page), headers=headers)


@Route(
    "GET",
    "/raw/{raw_id}",
    "read",
    {200: (Receipt,), 404: (Problem, Elsewhere)},
    (503,),
    turns=RECEIPTS,
)
async def receipt(request: web.Request) -> web.Response:
    """Return where a payload is and what became of it.

    For a payload of another node it is 404 `raw_id_elsewhere`, with the number of that `node`.
    """
    app, raw_id = request.app, raw_id_in(request)
    raw, run = app[RAW], request[TURNS].run
    state, body = await run(raw.read, raw_id)
    size, digest = len(body), await run(hashlib.sha256, body)
    row = await row_in_place_of(app, body) if state == "processed" else None
    known = raw.rejection if state == "rejected" else raw.last_rejection
    discard = None
    try:
        rejection = await run(known, raw_id)
        if state == "discarded":
            discard = await run(raw.discarded_at, raw_id)
    except RawIdUnknown:  # it has just been put back
        again: web.Response = await receipt(request)
        return again
    own = row if row and row.raw_id == raw_id else None
    superseded_by = row.raw_id if row and not own else None
    return answer(
        Receipt(
            raw_id,
            state,
            arrival_of(raw_id),
            size,
            digest.hexdigest(),
            own,
            superseded_by,
            rejection,
            discard.discarded_at if discard else None,
        )
    )


async def row_in_place_of(app: web.Application, body: bytes) -> Measurement | None:
    """Return the row that stands in the place of a payload's, None if there is none."""
    with contextlib.suppress(DataQualityError, PayloadNotJson, MeasurementNotFound):
        run = app[RECEIPTS].run if len(body) <= LARGE_JSON else app[CHECKER].run
        at = app[CONFIG].transform.series
        of_series = (await run(series_in, body, at),) if at else ()
        return await app[BACKEND].get(await run(time_stamp_in, body), *of_series)
    return None


@Route(
    "GET",
    "/raw/{raw_id}/payload",
    "read",
    {200: ("application/json",), 404: (Problem, Elsewhere)},
    turns=READS,
)
async def payload(request: web.Request) -> web.StreamResponse:
    """Return the exact bytes that arrived; for a payload of another node see its receipt."""
    reads, raw = request[TURNS], request.app[RAW]
    found = await reads.run(raw.open_payload, raw_id_in(request))
    if found.size <= PIECE_BYTES:
        with contextlib.closing(found):
            body = await reads.run(b"".join, found.pieces)
        return web.Response(body=body, content_type="application/json")
    headers = {"Content-Type": "application/json", "Content-Length": str(found.size)}
    portions = payload_portions(reads, found)
    return WhileRead(portions, "payload", "bytes", close=found.close, headers=headers)


async def payload_portions(reads: Turns, found: OpenPayload) -> Portions:
    rest = found.size
    while rest > 0:
        piece = await reads.run(next, found.pieces, b"")
        if not piece:
            raise OSError("its file has become shorter")
        yield piece, len(piece)
        rest -= len(piece)


@Route("GET", "/rejected", "read", {200: (RejectionPage,)}, (), RejectedQuery)
async def rejected(request: web.Request, query: RejectedQuery) -> web.Response:
    """List the rejected payloads with their reasons, in order of arrival, and count their codes."""
    app, reads = request.app, request.app[READS]
    await app[REJECTED].look()  # what others have done in the folder
    async with reads.turn(request):
        found = await reads.run(quarantine, app[RAW], query)
        if query.described:
            rows = [await described(app, each) for each in found.rejected]
            found = msgspec.structs.replace(found, rejected=rows)
        return json_answer(await reads.run(json_of, found))


async def described(app: web.Application, rejection: RejectedPayload) -> RejectedPayload:
    """Return a rejected payload with its series and what has corrected it, as far as is known."""
    series, corrected_by = None, None
    at, run = app[CONFIG].transform.series, app[READS].run
    with contextlib.suppress(PayloadStoreError, OSError, BackendError):
        _, body = await run(app[RAW].read, rejection.raw_id)
        if at:
            with contextlib.suppress(DataQualityError, PayloadNotJson):
                series = await run(series_in, body, at)
        row = await row_in_place_of(app, body)
        if row and row.raw_id > rejection.raw_id:
            corrected_by = row.raw_id
    return msgspec.structs.replace(rejection, series=series, superseded_by=corrected_by)


def quarantine(payloads: Payloads, query: RejectedQuery) -> RejectionPage:
    if query.raw_id:
        of_one = list(payloads.rejections(query.raw_id))
        codes = Counter(each.code for each in of_one if query.in_time(each))
        page = [each for each in of_one if query.fits(each) and query.is_behind(each)]
    else:
        page, codes = payloads.find_rejections(
            code=query.code,
            since=query.since,
            until=query.until,
            after=query.after,
            limit=query.limit + 1,
        )
    total = codes.total() if query.code is None else codes[query.code]
    shown = [RejectedPayload(**msgspec.structs.asdict(each)) for each in page[: query.limit]]
    return RejectionPage(shown, total, codes, shown[-1].raw_id if len(page) > len(shown) else None)


@Route("POST", "/rejected/retry", "process", {200: (Retried,)}, (503,), RetryQuery, turns=RETRIES)
async def retry(request: web.Request, query: RetryQuery) -> web.Response:
    """Put rejected payloads back to pending: all, or those that the query names."""
    await request.app[REJECTED].look()  # what others have done in the folder
    with audited("retry", **cause_of(request)) as facts:
        facts["retried"] = retried = await request.app[RETRIES].run(
            put_back, request.app[RAW], query
        )
    return answer(Retried(retried))


def put_back(payloads: Payloads, query: RetryQuery) -> int:
    """Put the rejected payloads that a query names back to pending; return how many."""
    return sum(
        payloads.retry(raw_id) for portion in rejected_ids(payloads, query) for raw_id in portion
    )


def rejected_ids(
    payloads: Payloads, query: RetryQuery, at: SeriesAt = RULES.series
) -> Iterator[list[UUID]]:
    """Yield the raw_ids of the rejected payloads that a query names, `AT_A_TIME` at most.

    `at` is where a payload names its series.
    """
    if query.raw_id:
        found = filter(query.fits, payloads.rejections(query.raw_id))
        yield [each.raw_id for each in found if is_of_series(payloads, each.raw_id, query, at)]
        return
    after, is_more = None, True
    while is_more:
        page, _ = payloads.find_rejections(
            code=query.code, since=query.since, until=query.until, after=after, limit=AT_A_TIME
        )
        yield [each.raw_id for each in page if is_of_series(payloads, each.raw_id, query, at)]
        is_more, after = len(page) == AT_A_TIME, page[-1].raw_id if page else None


def is_of_series(payloads: Payloads, raw_id: UUID, query: RetryQuery, at: SeriesAt) -> bool:
    """Say whether a payload is of the series that a query names, if it names one."""
    if not isinstance(query, DiscardQuery) or query.series is None:
        return True
    with contextlib.suppress(DataQualityError, PayloadNotJson, PayloadUnreadable, RawIdUnknown):
        return series_in(payloads.read(raw_id)[1], at) == query.series
    return False


@Route(
    "POST", "/rejected/discard", "process", {200: (Discarded,)}, (503,), DiscardQuery, turns=RETRIES
)
async def discard(request: web.Request, query: DiscardQuery) -> web.Response:
    """Discard rejected payloads: all, or those that the query names."""
    app = request.app
    await app[REJECTED].look()  # what others have done in the folder
    with audited("discard", **cause_of(request)) as facts:
        chosen = rejected_ids(app[RAW], query, app[CONFIG].transform.series)
        facts["discarded"] = count = await app[PROCESSOR].discards.discard(chosen)
    return answer(Discarded(count))


@Route(
    "GET",
    "/metrics",
    "read",
    {200: ("text/plain", "application/openmetrics-text")},
    (503,),
    turns=READS,
)
async def metrics(request: web.Request) -> web.Response:
    """Show what is counted and measured, in the form of Prometheus."""
    app, shown = request.app, request.app[METRICS]
    oldest, count = await app[PENDING].look()
    shown.pending.set(count)
    shown.oldest.set(age_of(oldest) or 0)
    with disk_errors():
        activity, (free, reserve), _ = await glance(app)
    shown.last_landed.set(activity.last_landed / 1000)
    shown.free.set(free)
    shown.reserve.set(reserve)
    shown.backend_up.set(await app[BACKEND_TROUBLE].look() is None)
    counted = await app[SERIES].look() if app[CONFIG].transform.series else None
    if counted:
        shown.series.set(counted.count)
        shown.silent.set(counted.silent_for_an_hour)
    shown.to_archive.set(len(await app[READS].run(app[RAW].to_archive)))
    encode, media = choose_encoder(request.headers.get("Accept", ""))
    text = await app[READS].run(encode, cast("prometheus.CollectorRegistry", shown))
    return web.Response(body=text, headers={"Content-Type": media, "Vary": "Accept"})


@Route("GET", "/openapi.json", None, {200: ("application/json",)}, limited=False)
async def openapi(request: web.Request) -> web.Response:
    """Describe this API (OpenAPI 3.1)."""
    has_series = bool(request.app[CONFIG].transform.series)
    return json_answer(openapi_json(request.app[PREFIX], has_series=has_series))


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


@Route("GET", "/docs", None, {200: ("text/html",)}, limited=False)
async def docs(_: web.Request) -> web.Response:
    """Show the description of this API as a page."""
    return web.Response(text=DOCS_PAGE, content_type="text/html", headers=PAGE_HEADERS)


@Route("GET", r"/docs/{asset:swagger-ui\.css|swagger-ui-bundle\.js}", None, {}, limited=False)
async def docs_asset(request: web.Request) -> web.StreamResponse:
    """Return a file of the page, which comes with the package swagger-ui-py."""
    name = request.match_info["asset"]
    body, digest = await asyncio.to_thread(read_asset, name)
    headers = {"Cache-Control": "no-cache", "ETag": f'"{digest}"'}  # kept, and asked for again
    if digest in [etag.value for etag in request.if_none_match or ()]:
        return web.Response(status=304, headers=headers)
    media = "text/css" if name.endswith(".css") else "text/javascript"
    return InPieces(body=body, shared=True, content_type=media, headers=headers)


@functools.cache
def read_asset(name: str) -> tuple[bytes, str]:
    """Return a file of the page, and its SHA-256."""
    spec = importlib.util.find_spec("swagger_ui")
    body = Path(spec.origin or "" if spec else "").with_name("static").joinpath(name).read_bytes()
    return body, hashlib.sha256(body).hexdigest()


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
JSON_HEADERS = web.Response(headers=SAFE_HEADERS | {"Content-Type": "application/json"}).headers
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
FETCH_PATIENCE = 5.0  # seconds, to the last byte
FETCH_PAUSE = 10.0  # seconds between fetches at least, however many unknown keys are named
JWKS_BYTES = 1024 * 1024  # beyond that it is no set of keys
TOKENS_KEPT = 10_000
KEYS_LIFE = 600.0  # seconds after which a withdrawn key is missed
Caller = tuple[str, Collection[str]]  # its name and its scopes
NAME_CLAIMS = {"sub": "token", "azp": "client", "client_id": "client"}  # and the kind of name
NAME_LENGTH = 128
IssuerKey = tuple[Any, Sequence[str]]  # a public key and the algorithms that it may be used with


def hash_of(key: str) -> bytes:
    """Return the SHA-256 of an API key.

    A slow password hash would protect nothing: nobody guesses 160 random bits. Nor does the time
    that it takes to look a digest up tell anything about a key.
    """
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


BLANK_HASHES = {hash_of(blank) for blank in ("", "\n", "\r\n", " ")}  # as `sha256sum` makes them


class Guard:
    """Knows which caller may do what: by the configured keys, and by the tokens of an issuer.

    The name of a caller begins with its kind, so that no token can pass for a key, nor for a person
    at the command line.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self.callers = {
            digest: (f"key:{name}", scopes) for digest, (name, scopes) in callers_of(config).items()
        }
        self.tokens = Tokens(config.auth.jwt) if config.auth.jwt != JwtConfig() else None

    @property
    def is_open(self) -> bool:
        return not (self.callers or self.tokens)

    def reload(self) -> None:
        """Read the keys again; whatever is wrong with them raises, and changes nothing."""
        config = self._config.reload()
        if config.keys_file and self._config.keys_file:  # another raw.dir waits for the next start
            config.__dict__["keys_file"] = self._config.keys_file
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


def callers_of(config: Config) -> dict[bytes, Caller]:
    """Return the name and scopes of each key, by its digest; raises `ConfigError`."""
    callers = dict[bytes, Caller]()
    key = config.auth.api_key.reveal()
    if key.isspace():
        raise ConfigError("auth.api_key is blank: give a key, or leave it out")
    if key:
        callers[hash_of(key)] = ("api_key", SCOPES)
    names = {"api_key"}
    kept = kept_keys(config.keys_file) if config.keys_file else ()
    for each in (*config.auth.keys, *kept):
        match = KEY_HASH.fullmatch(each.hash.reveal())
        digest = bytes.fromhex(match[1]) if match else b""
        if each.name in names:
            raise ConfigError(f"auth.keys: the name {each.name} is taken, give each key its own")
        if not match:
            raise ConfigError(f"auth.keys: the hash of {each.name} is not sha256:<64 hex digits>")
        if digest in BLANK_HASHES:
            wrong = f"auth.keys: the hash of {each.name} is that of no key at all"
            raise ConfigError(f"{wrong}: `key new` makes a key and its hash")
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
        self._keys = dict[str | None, list[IssuerKey]]()  # by their kid
        self._judged = dict[str, tuple[float, Caller]]()  # until when: a signature takes 0.2 ms
        self._fetched = -math.inf
        self._trouble: str | None = None
        self._lock = asyncio.Lock()

    def outdated(self) -> Tokens:
        """Fetch the keys before the next token is judged."""
        self._fetched = -math.inf
        return self

    async def judge(self, token: str) -> Caller:
        """Return whom a token names, and its scopes; raises `DropzoneError` with 401 or 503."""
        until, caller = self._judged.get(token, (0.0, ("", ())))
        if time.time() < until and time.monotonic() - self._fetched < KEYS_LIFE:
            return caller
        try:
            kid = self._jwt.get_unverified_header(token).get("kid")
            claims = self._claims(token, await self._keys_for(kid))
        except (self._jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            wrong = f"the token is refused: {error}"
            raise DropzoneError(wrong, "token_invalid", 401) from None
        scopes = claims.get(self._config.scope_claim)
        scopes = scopes.split() if isinstance(scopes, str) else scopes
        caller = (name_of(claims), scopes if isinstance(scopes, list) else ())
        if len(self._judged) == TOKENS_KEPT:
            self._judged.clear()
        self._judged[token] = (int(claims["exp"]) + LEEWAY, caller)
        return caller

    def _claims(self, token: str, keys: Sequence[IssuerKey]) -> Mapping[str, Any]:
        """Return what a token says that one of the keys has signed; raises where none has."""
        wrong = Exception()
        for key, algorithms in keys:
            try:
                claims: Mapping[str, Any] = self._jwt.decode(
                    token,
                    key,
                    algorithms=algorithms,
                    audience=self._config.audience,
                    issuer=self._config.issuer,
                    leeway=LEEWAY,
                    options={"require": ["exp"], "enforce_minimum_key_length": True},
                )
                return claims
            except (self._jwt.PyJWTError, ValueError, TypeError) as error:
                wrong = error
        raise wrong

    async def _keys_for(self, kid: str | None) -> Sequence[IssuerKey]:
        """Return the keys that may have signed a token: one, unless the issuer gives more."""
        if self._is_due(kid):
            async with self._lock:
                if self._is_due(kid):  # else another request has fetched them meanwhile
                    await self.fetch()
        keys = self._find(kid) or self._keys.get(None)
        if keys:
            return keys
        if self._trouble:
            wrong = "the keys to judge the token with cannot be fetched now: try again"
            raise DropzoneError(wrong, "issuer_unavailable", 503)
        raise ValueError("the issuer has no key of this kid")

    def _is_due(self, kid: str | None) -> bool:
        age = time.monotonic() - self._fetched
        return age > KEYS_LIFE or (age > FETCH_PAUSE and not self._find(kid))

    def _find(self, kid: str | None) -> Sequence[IssuerKey]:
        if len(self._keys) == 1 and (kid is None or None in self._keys):  # there is no choice
            return next(iter(self._keys.values()))
        return self._keys.get(kid, ())

    async def fetch(self) -> None:
        """Fetch the keys of the issuer; where that fails, those known before stay."""
        trouble = await self.trouble()
        if trouble:
            log.warning("%s", trouble)

    async def trouble(self) -> str | None:
        """Do the same, and return why it failed, None if it did not."""
        place = self._config.jwks
        try:
            async with asyncio.timeout(FETCH_PATIENCE):
                text = await _content(place)
            self._keys = await asyncio.to_thread(self._parsed, text)
            self._judged.clear()
            self._trouble = None
        except Exception as error:  # noqa: BLE001 (whatever it is, the next fetch has to wait)
            late = f"it did not arrive within {FETCH_PATIENCE} s"
            reason = str(error) or (late if isinstance(error, TimeoutError) else repr(error))
            self._trouble = f"auth.jwt.jwks: {place} gives no keys: {reason}"
        finally:
            self._fetched = time.monotonic()
        return self._trouble

    def _parsed(self, text: bytes) -> dict[str | None, list[IssuerKey]]:
        """Return the keys by their kid; an entry of a JWKS that is none is left out."""
        if text.lstrip().startswith(b"-----BEGIN"):
            serialization = importlib.import_module("cryptography.hazmat.primitives.serialization")
            return {None: [(serialization.load_pem_public_key(text), ALGORITHMS)]}
        keys = dict[str | None, list[IssuerKey]]()
        for number, jwk in enumerate(msgspec.convert(parse_json(text), JwkSet).keys, 1):
            try:
                key = self._jwt.PyJWK(jwk)
                if jwk.get("use") in (None, "sig") and key.algorithm_name in ALGORITHMS:
                    algorithms = [key.algorithm_name] if jwk.get("alg") else ALGORITHMS
                    keys.setdefault(key.key_id, []).append((key.key, algorithms))
            except Exception as error:  # noqa: BLE001 (one odd entry says nothing of the others)
                log.debug("entry %d of the JWKS is left out: %s", number, type(error).__name__)
        if not keys:
            raise ValueError("there is no public key to check signatures with")
        return keys


class JwkSet(Struct):
    keys: list[Any]


async def _content(place: Place) -> bytes:
    """Return what lies at a place; raises where that is more than keys can be."""
    if "://" not in place:
        text = await asyncio.to_thread(_beginning, place)
    else:
        text = b""
        async with (
            ClientSession() as session,
            session.get(place, allow_redirects=False) as response,
        ):
            if response.status != 200:
                raise ValueError(f"the answer has status {response.status}")
            while len(text) <= JWKS_BYTES and not response.content.at_eof():
                text += await response.content.readany()
    if len(text) > JWKS_BYTES:
        raise ValueError(f"it has more than {JWKS_BYTES} bytes")
    return text


def _beginning(file: str) -> bytes:
    with open(file, "rb") as opened_file:
        return opened_file.read(JWKS_BYTES + 1)


def name_of(claims: Mapping[str, object]) -> str:
    """Return the name of whoever a token names: short, on one line, and nobody else's."""
    for claim, kind in NAME_CLAIMS.items():
        name = claims.get(claim)
        if name and isinstance(name, str):
            return f"{kind}:{_shown_name(name)}"
    return "token:"


def _shown_name(text: str) -> str:
    """Percent-encode what is not printable; of a long name the end becomes a digest of it."""
    shown = "".join(
        letter if letter.isprintable() and letter != "%" else quote(letter, errors="surrogatepass")
        for letter in text
    )
    if len(shown) <= NAME_LENGTH:
        return shown
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]
    return f"{shown[: NAME_LENGTH - 34]}%~{digest}"  # no short name has a %~


# ── HTTP: admission and the edge ──────────────────────────────────────────────────────────────────

INFLATED_AT_ONCE = 1024 * 1024  # bytes
SMALL_BODY = 64 * 1024  # bytes
SMALL_IN_FLIGHT = 64 * 1024 * 1024  # bytes of small bodies that are not answered yet
LARGE_IN_FLIGHT = 128 * 1024 * 1024  # the same of larger ones, which cannot crowd out the small
TO_BE_CHECKED = 64 * 1024 * 1024  # bytes of bodies that wait for the process that parses odd JSON


class Budget:
    """How many bytes may be held at a time: by all, and, half of that, by one caller."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._of = dict[str, int]()  # by caller

    def take(self, caller: str, size: int, before: int = 0) -> None:
        """Count `size` bytes on top of the `before` of the same body; a body alone always fits.

        Raises `DropzoneError` where they are too many.
        """
        own = self._of.get(caller, 0) + size
        too_many = self.bytes > before and self.bytes + size > self.limit
        if too_many or (own > before + size and own > self.limit // 2):
            raise DropzoneError("too much is in flight", "overloaded", 503)
        self.bytes += size
        self._of[caller] = own

    def give_back(self, caller: str, size: int) -> None:
        self.bytes -= size
        left = self._of.get(caller, 0) - size
        if left:
            self._of[caller] = left
        else:
            self._of.pop(caller, None)

    @contextlib.contextmanager
    def taken(self, caller: str, size: int) -> Iterator[None]:
        """Count bytes for as long as the context is open."""
        self.take(caller, size)
        try:
            yield
        finally:
            self.give_back(caller, size)


class Admission:
    """The requests and the bytes of bodies in flight, and whether any more are let in."""

    def __init__(self) -> None:
        self.small, self.large = Budget(SMALL_IN_FLIGHT), Budget(LARGE_IN_FLIGHT)
        self.to_be_checked = Budget(TO_BE_CHECKED)
        self._bodies: set[Body] = set()  # that are not answered yet
        self._draining: asyncio.Event | None = None  # is set when all are answered

    @property
    def bytes(self) -> int:
        return self.small.bytes + self.large.bytes

    def admit(self, caller: str, limit: int) -> Body:
        """Return the body of one request, as a context until it is answered."""
        if self._draining:
            raise DropzoneError("the service is about to stop", "draining", 503)
        body = Body(self, caller, limit)
        self._bodies.add(body)
        return body

    def dismiss(self, body: Body) -> None:
        """Hear that a request is answered."""
        self._bodies.remove(body)
        if self._draining and not self._bodies:
            self._draining.set()

    async def drain(self, patience: float) -> None:
        """Let nothing in any more; wait `patience` seconds at most for what is in flight."""
        self._draining = self._draining or asyncio.Event()
        if self._bodies:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), patience)


class Body:
    """The bytes of one body in flight, `limit` at most."""

    def __init__(self, admission: Admission, caller: str, limit: int) -> None:
        self._admission = admission
        self._share = admission.small
        self._caller = caller
        self._limit = limit
        self._taken = 0

    def __enter__(self) -> Self:
        return self

    def take(self, size: int) -> None:
        """Count bytes that have arrived; raises `DropzoneError` where they are too many."""
        before = self._taken
        if before + size > self._limit:
            raise too_large(self._limit)
        if self._share is self._admission.small and before + size > SMALL_BODY:
            self._admission.large.take(self._caller, before + size)
            self._share.give_back(self._caller, before)
            self._share = self._admission.large
        else:
            self._share.take(self._caller, size, before)
        self._taken += size

    def __exit__(self, *_: object) -> None:
        self._admission.dismiss(self)
        self._share.give_back(self._caller, self._taken)


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
SLOW = 1.0  # seconds after which an answer is logged
POLLED = ("/health", "/ready", "/status", "/metrics")
REQUEST_ID_FORM = re.compile(r"[\w.:+/=@-]{1,128}", re.ASCII)


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    return json_answer(json_of(value), status, headers)


def json_answer(
    body: bytes, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    ready = JSON_HEADERS.copy()  # several times as fast as to make them of a dict
    if status in STATUS_HEADERS:
        ready.update(STATUS_HEADERS[status])
    if headers:
        ready.update(headers)
    kind = InPieces if len(body) > PIECE_BYTES else web.Response
    return kind(body=body, status=status, headers=ready)


@web.middleware
async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request its id, and every error its problem document."""
    app, begun = request.app, time.perf_counter()
    request[NOTES] = notes = Notes(request_id_of(request))
    try:
        if request.match_info.http_exception:  # no route
            admit_address(request)
        response: web.StreamResponse = await handler(request)
        if isinstance(response, Sent):
            response.admit(app[CLIENTS], caller_of(request))
    except Exception as error:  # noqa: BLE001 (nothing leaves without a problem document)
        response = problem(request, error)
    client = request.transport
    if client is not None:
        app[CLIENTS].expect(client)
    complete_headers(response, notes)
    if not request.content.is_eof() and "Expect" in request.headers:
        response.force_close()  # whether the body still comes is not known
    seconds = time.perf_counter() - begun
    app[METRICS].answers.add(request, response.status, seconds)
    if notes.refusal or seconds >= SLOW or app[CONFIG].log.requests:
        log_request(request, response.status, seconds)
    return response


def request_id_of(request: web.Request) -> str:
    """Return the id that a client has given its request, or else a new one."""
    given = request.headers.get("X-Request-ID")
    if given is not None and REQUEST_ID_FORM.fullmatch(given):
        return given
    return f"{getrandbits(96):024x}"


def complete_headers(response: web.StreamResponse, notes: Notes) -> None:
    """Add the headers that every answer has, unless its route has set them itself."""
    headers = response.headers
    headers["X-Request-ID"] = notes.request_id
    if notes.rate_headers:
        headers.update(notes.rate_headers)
    if "Server" not in headers:  # or else it was made with all of them
        for name, value in SAFE_HEADERS.items():
            headers.setdefault(name, value)


class NoRoute(MatchInfoError):
    """What the router finds where no route is; an expectation is answered there, too."""

    @property
    def expect_handler(self) -> Callable[[web.Request], Awaitable[web.StreamResponse | None]]:
        return expected


class Router(web.UrlDispatcher):
    """The usual router, but `Expect` is answered behind `edge` whether a route is there or not."""

    def resolve(self, request: web.Request) -> Coroutine[Any, Any, web.UrlMappingMatchInfo]:
        """Return what finds the route of a request."""
        return self._resolve(request) if "Expect" in request.headers else super().resolve(request)

    async def _resolve(self, request: web.Request) -> web.UrlMappingMatchInfo:
        found = await super().resolve(request)
        return NoRoute(found.http_exception) if found.http_exception else found


async def expected(request: web.Request) -> web.StreamResponse | None:
    """Send no 100 Continue yet: `read_body` does, behind all that may refuse. 417 for the rest."""
    if request.version < HttpVersion11 or request.headers["Expect"].lower() == "100-continue":
        return None
    return await edge(request, refuse_expectation)


async def refuse_expectation(request: web.Request) -> NoReturn:
    if not request.match_info.http_exception:  # or else it has been counted
        admit_address(request)
    wrong = "Expect may only be 100-continue: leave it out"
    raise DropzoneError(wrong, "expectation_failed", 417)


READING = ("GET", "HEAD")
PREFLIGHT_HEADERS = {
    "Access-Control-Allow-Methods": "GET, HEAD",
    "Access-Control-Allow-Headers": "Authorization, X-API-Key, X-Request-ID",
    "Access-Control-Max-Age": "600",  # seconds
}
EXPOSED = "Link, RateLimit, RateLimit-Policy, Retry-After, Server-Timing, X-Request-ID"


@web.middleware
async def cors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let pages of the origins in `cors_origins` read, refusals included (Fetch standard, CORS)."""
    origins, origin = request.app[CONFIG].server.cors_origins, request.headers.get("Origin", "")
    allowed = "*" if "*" in origins else origin if origin in origins else None
    if allowed and asks_to_read(request):
        response: web.StreamResponse = await edge(request, preflight)
    else:
        response = await handler(request)
        if request.method not in READING:
            return response
    headers = response.headers
    headers["Vary"] = f"{headers['Vary']}, Origin" if "Vary" in headers else "Origin"
    if allowed:
        headers["Access-Control-Allow-Origin"] = allowed
        headers["Access-Control-Expose-Headers"] = EXPOSED
    return response


def asks_to_read(request: web.Request) -> bool:
    """Tell whether a browser asks if a page may GET something (a CORS preflight)."""
    if request.method != "OPTIONS":
        return False
    refusal = request.match_info.http_exception
    wanted = request.headers.get("Access-Control-Request-Method")
    return (
        wanted in READING
        and isinstance(refusal, web.HTTPMethodNotAllowed)
        and "GET" in refusal.allowed_methods
    )


async def preflight(_: web.Request) -> web.Response:
    return web.Response(status=204, headers=PREFLIGHT_HEADERS)


def template_of(request: web.Request) -> tuple[str, str]:
    """Return method and route as metrics name them: few, whatever a client makes up."""
    resource = request.match_info.route.resource
    if resource is None:
        return request.method if request.method in METH_ALL else "other", "none"
    return request.method, resource.canonical.removeprefix(request.app[PREFIX])


def log_request(request: web.Request, status: int, seconds: float) -> None:
    """Log a request; of a route the template is told, as paths may hold secrets."""
    notes = request[NOTES]
    resource = request.match_info.route.resource
    route = resource.canonical if resource else ""
    if not notes.refusal and route.removeprefix(request.app[PREFIX]) in POLLED:
        return
    facts: dict[str, object] = {
        "request_id": notes.request_id,
        "caller": notes.caller,
        "address": request.remote or "",
        "method": request.method,
        "route": route,
        "status": status,
        "bytes": request.content.total_bytes,
        "duration": round(seconds, 6),
    }
    if notes.refusal:
        facts["code"] = notes.refusal
    if notes.landed:
        facts["raw_id"] = notes.landed[0]
    if len(notes.landed) > 1:
        facts["payloads"] = len(notes.landed)
    log_facts(request_log, logging.WARNING if status >= 500 else logging.INFO, facts)


def cause_of(request: web.Request) -> dict[str, str]:
    """Return the caller and the request of a change, for its audit line."""
    return {"caller": request[NOTES].caller, "request_id": request[NOTES].request_id}


def problem(request: web.Request, error: Exception) -> web.Response:
    """Render an error as a problem document (RFC 9457)."""
    known, notes = as_dropzone_error(error), request[NOTES]
    route = request.path.rstrip("/")
    if isinstance(error, web.HTTPNotFound) and is_route(request, route):
        known.detail = f"there is nothing at {route}/: send to {route}"
    notes.refusal = known.code
    request.app[METRICS].refusals.labels(known.code).inc()
    if known.status == 500:
        log.error("request %s failed", notes.request_id, exc_info=error)
    title = HTTPStatus(known.status).phrase
    document = Problem(title, known.status, known.detail, known.code, notes.request_id)
    response = answer(msgspec.structs.asdict(document) | known.extra, known.status)
    response.content_type = "application/problem+json"
    if isinstance(error, web.HTTPMethodNotAllowed):
        response.headers["Allow"] = error.headers["Allow"]
    if known.code in CHALLENGES:
        response.headers["WWW-Authenticate"] = CHALLENGES[known.code]
    return response


def is_route(request: web.Request, path: str) -> bool:
    known = {f"{request.app[PREFIX]}{route.path}" for route in ROUTES}
    return path != request.path and path in known


REFUSAL_CODES = (  # of problem documents
    *("header_invalid", "query_invalid", "body_broken", "body_too_slow"),
    *("encoding_unsupported", "transfer_encoding_unsupported"),
    *("payload_not_json", "payload_too_large", "idempotency_key_reused"),
    *("key_refused", "token_invalid", "scope_missing", "rate_limited", "issuer_unavailable"),
    *("not_found", "method_not_allowed", "expectation_failed", "series_unset"),
    *("raw_id_unknown", "raw_id_elsewhere", "measurement_not_found"),
    *("draining", "overloaded", "processor_busy", "storage_full", "storage_unavailable"),
    *("backend_unavailable", "backend_error", "internal_error"),
)
ERRORS_BELOW: dict[type[Exception], tuple[str, int]] = {  # the first that fits counts
    BackendUnavailable: ("backend_unavailable", 503),
    MeasurementNotFound: ("measurement_not_found", 404),
    BackendError: ("backend_error", 500),
    RawIdElsewhere: (RawIdElsewhere.code, 404),
    RawIdUnknown: (RawIdUnknown.code, 404),
    KeyReused: (KeyReused.code, 422),
    StorageFull: (StorageFull.code, 503),
    StorageUnavailable: (StorageUnavailable.code, 503),
    PayloadUnreadable: (StorageUnavailable.code, 503),  # as it would be in a damaged pack
}


def as_dropzone_error(error: Exception) -> DropzoneError:
    """Return an error with its code and HTTP status, also one of a row backend or payload store."""
    if isinstance(error, DropzoneError):
        return error
    if isinstance(error, web.HTTPException):
        code = HTTPStatus(error.status).name.lower()
        return DropzoneError(error.reason, code, error.status)
    extra = {"node": error.node} if isinstance(error, RawIdElsewhere) else {}
    for kind, (code, status) in ERRORS_BELOW.items():
        if isinstance(error, kind):
            return DropzoneError(str(error), code, status, **extra)
    return DropzoneError("an error inside Dropzone; its log names it by this request_id")


async def authenticate(request: web.Request) -> Collection[str]:
    """Note the caller, and return its scopes; raise unless there is one."""
    guard = request.app[GUARD]
    key = request.headers.get("x-api-key")
    bearer = "" if key else bearer_in(request)
    given = key or bearer
    caller = guard.callers.get(hash_of(given)) if given.strip() else None
    if caller is None and guard.tokens and not key and bearer.count(".") == 2:
        caller = await guard.tokens.judge(bearer)
    if caller is None:
        wrong = "the API key is wrong" if given else "send an API key in the header x-api-key"
        raise DropzoneError(wrong, "key_refused", 401)
    notes = request[NOTES]
    notes.caller, notes.scopes = caller
    return notes.scopes


def bearer_in(request: web.Request) -> str:
    """Return the token of the header Authorization (RFC 6750), empty where there is none."""
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def authorize(request: web.Request, scope: Scope, scopes: Collection[str]) -> None:
    """Raise unless the scope is one of the caller's."""
    if scope not in scopes:
        wrong = f"{request[NOTES].caller} may not do this: it needs the scope {scope}"
        raise DropzoneError(wrong, "scope_missing", 403, scope=scope)


def caller_of(request: web.Request) -> str:
    """Return whose request it is: the name of a key or token, or where there is none an address."""
    return request[NOTES].caller or address_of(request)


def address_of(request: web.Request) -> str:
    return network_of(request.remote or "")


def admit_address(request: web.Request) -> None:
    """Count a request of an address, and raise where it is beyond the limit."""
    if "address" in request.app[LIMITERS]:
        admit(request, "address", address_of(request))


def admit(request: web.Request, by: str, who: str) -> None:
    """Count a request of a key or an address, and raise where it is beyond the limit.

    The headers that tell are of draft-ietf-httpapi-ratelimit-headers-10.
    """
    limiter = request.app[LIMITERS].get(by)
    if limiter is None or not who:
        return
    result = limiter.limit(who)
    quota, state = limiter.quota, result.state
    until_next = state.reset_after - (state.limit - state.remaining - 1) * quota.emission_interval
    seconds = math.ceil(round(state.retry_after or until_next, 3)) or 1
    headers = {
        "RateLimit-Policy": f'"{by}";q={quota.get_limit()};w={quota.get_period_sec()}',
        "RateLimit": f'"{by}";r={state.remaining};t={seconds}',
    }
    notes = request[NOTES]
    for name, value in notes.rate_headers.items():  # of the limit for addresses
        headers[name] = f"{value}, {headers[name]}"
    notes.rate_headers = headers
    if result.limited:
        headers["Retry-After"] = str(seconds)
        wrong = f"too many requests of this {by}: try again in {seconds} s"
        raise DropzoneError(wrong, "rate_limited", 429)


@functools.lru_cache
def network_of(address: str) -> str:
    """Return an IPv4 address as it is, and of an IPv6 address the /64, as one subscriber has it."""
    if "." not in address:  # also of an IPv4 address that is mapped to IPv6
        with contextlib.suppress(ValueError):
            return IPv6Address(address.partition("%")[0]).exploded[:19]
    return address


def query_in(request: web.Request, kind: type[Struct]) -> Struct:
    """Return the query as its type; raises what names the parameter."""
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values: dict[str, object] = {}
    for name, text in parameters_in(request, fields):
        if name not in fields:
            raise query_invalid(name, f"unknown; known: {', '.join(fields)}")
        if name in values:
            raise query_invalid(name, "given twice")
        if text == "null" and not may_be_name(name, kind):  # msgspec would take it for nothing
            raise query_invalid(name, "null: leave it out")
        values[name] = moment_in(name, text) if "datetime" in str(fields[name]) else text
    try:
        return msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        wrong, _, place = str(error).partition(" - at `$.")
        raise query_invalid(place.rstrip("`"), f"wrong: {wrong}") from None


def parameters_in(request: web.Request, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the parameters of a query; the `next` of a page of many series stands for two."""
    for name, text in request.query.items():
        is_pair = name == "after" and "after_series" in known and "/" in text
        if is_pair:
            after, _, series = text.partition("/")
            yield from (("after", after), ("after_series", series))
        else:
            yield name, text


def may_be_name(parameter: str, kind: type[Struct]) -> bool:
    """Say whether a parameter has the name of a series, which may be anything."""
    return parameter in SERIES_PARAMETERS or kind is SeriesQuery


def query_invalid(name: str, wrong: str) -> DropzoneError:
    return DropzoneError(f"the parameter {name} is {wrong}", "query_invalid", 400, parameter=name)


MILLISECONDS = re.compile(r"-?\d{1,15}", re.ASCII)
CALENDAR_DATE = re.compile(r"(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])", re.ASCII)


def moment_in(name: str, text: str) -> datetime:
    """Return the moment (UTC) that a parameter names: a time stamp, or milliseconds since 1970.

    The + of an offset may come as a space. Whoever writes 20190501 hardly means a number, which
    would be a morning of 1970.
    """
    try:
        if MILLISECONDS.fullmatch(text) and not CALENDAR_DATE.fullmatch(text):
            return EPOCH + timedelta(milliseconds=int(text))
        return parse_time_stamp(re.sub(r" (\d\d(?::?\d\d)?)$", r"+\1", text))
    except OverflowError:
        raise query_invalid(name, f"wrong: {text} is outside the years 1 to 9999") from None
    except DataQualityError as error:
        wrong = error.detail.removeprefix("time_stamp is ")
        raise query_invalid(name, f"wrong: {wrong}") from None


def raw_id_in(request: web.Request) -> UUID:
    text = request.match_info["raw_id"]
    raw_id = raw_id_of(f"{text.lower()}.json")
    if raw_id:
        return raw_id
    raise RawIdUnknown(f"{_shown(text)} is no raw_id: it is a UUID")


CHUNKED = "chunked"


async def read_body(request: web.Request, take: Callable[[int], None]) -> bytes:
    """Return the body with its Content-Encoding undone, `max_body_bytes` at most, within time.

    A server that embeds this application has undone the encoding already, unless told otherwise.
    """
    limits, content = request.app[CONFIG].server, request.content
    encoding = encoding_of(request)
    length = request.content_length
    if length is None and request.headers.get("Transfer-Encoding", CHUNKED).lower() != CHUNKED:
        wrong = "of all values of Transfer-Encoding only chunked is undone: use Content-Encoding"
        raise DropzoneError(wrong, "transfer_encoding_unsupported", 501)
    if length is not None and length > limits.max_body_bytes:
        raise too_large(limits.max_body_bytes)
    try:
        if content.is_eof():  # most bodies have arrived whole by now, and need no timer
            body = content.read_nowait()
            take(len(body))
        else:
            if request.transport is None:
                raise ConnectionResetError("the client has gone")
            if "Expect" in request.headers and request.version >= HttpVersion11:
                await invite(request)
            async with asyncio.timeout(limits.body_seconds):
                body = b"".join([chunk async for chunk in _counted(content, take)])
    except (web.RequestPayloadError, ConnectionError) as error:
        raise DropzoneError(f"the body did not arrive whole: {error}", "body_broken", 400) from None
    except TimeoutError:
        wrong = f"the body did not arrive within {limits.body_seconds:g} s"
        raise DropzoneError(wrong, "body_too_slow", 408) from None
    if not encoding or not body or content.total_compressed_bytes is not None:
        return body
    return await inflated(body, limits.max_body_bytes, take, request.app[ARRIVALS])


def encoding_of(request: web.Request) -> str:
    """Return the one Content-Encoding besides identity (RFC 9110, section 8.4), empty for none."""
    given = request.headers.get("Content-Encoding")
    if given is None:
        return ""
    codings = [coding.strip().lower() for coding in given.split(",")]
    codings = [coding for coding in codings if coding not in ("identity", "")]
    if len(codings) > 1 or not {*codings} <= {"gzip", "x-gzip", "deflate"}:
        wrong = f"Content-Encoding is {_shown(given)}: send gzip or deflate"
        raise DropzoneError(wrong, "encoding_unsupported", 415)
    return codings[0] if codings else ""


async def invite(request: web.Request) -> None:
    """Send 100 Continue (RFC 9110, section 10.1.1), unless there is no room for the body."""
    app, announced = request.app, request.content_length or 0
    share = app[ADMISSION].small if announced <= SMALL_BODY else app[ADMISSION].large
    with share.taken(caller_of(request), announced):
        pass  # there is room, for now
    free, reserve = await in_glance(app, app[RAW].room)
    if free < reserve + 2 * announced:
        raise StorageFull("the disk is full; try again later")
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer has not begun


async def _counted(content: StreamReader, take: Callable[[int], None]) -> AsyncIterator[bytes]:
    async for chunk in content.iter_any():
        take(len(chunk))
        yield chunk


def too_large(limit: int, unit: str = "bytes") -> DropzoneError:
    wrong = f"the payload has more than {limit} {unit}: send less at a time"
    return DropzoneError(wrong, "payload_too_large", 413)


async def inflated(
    body: bytes, limit: int, take: Callable[[int], None], threads: Executor
) -> bytes:
    """Undo gzip or deflate; what a large body becomes is counted while it grows."""
    loop, further = asyncio.get_running_loop(), functools.partial(next, inflating(body), b"")
    found, size, counted = list[bytes](), 0, len(body)
    try:
        piece = further()
        while piece:
            found.append(piece)
            size += len(piece)
            if size > limit:
                raise too_large(limit)
            if size > counted:
                take(size - counted)
                counted = size
            is_large = size >= SMALL_BODY
            piece = await loop.run_in_executor(threads, further) if is_large else further()
    except (OSError, EOFError, zlib.error) as error:
        raise DropzoneError(f"the compressed body is broken: {error}", "body_broken", 400) from None
    return b"".join(found)


def inflating(data: bytes) -> Iterator[bytes]:
    """Undo gzip (RFC 1952, any number of members) or deflate, piece by piece.

    Deflate is RFC 1951 in the wrapping of zlib (RFC 1950), or, as many send it, without. The first
    piece is small; a body that ends within it has no other.
    """
    size = SMALL_BODY
    if data[:2] == b"\x1f\x8b":
        file = gzip.GzipFile(fileobj=io.BytesIO(data))
        while piece := file.read(size):
            yield piece
            size = INFLATED_AT_ONCE
        return
    is_wrapped = data[0] & 0x0F == 8 and int.from_bytes(data[:2]) % 31 == 0
    inflater = zlib.decompressobj(zlib.MAX_WBITS if is_wrapped else -zlib.MAX_WBITS)
    while not inflater.eof:
        piece = inflater.decompress(data, size)
        data = inflater.unconsumed_tail
        if not piece and not data and not inflater.eof:
            break
        yield piece
        size = INFLATED_AT_ONCE
    if not inflater.eof or inflater.unused_data:
        raise EOFError("the data do not end where they should")


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
MOMENT_SCHEMA = {
    "type": ["string", "integer"],
    "format": "date-time",
    "minimum": -62135596800000,
    "maximum": 253402300799999,
    "examples": ["2019-05-01T10:00:00Z", 1556704800000],
}
MOMENT_FORMS = "A time stamp, or a whole number of milliseconds since 1970."
PATH_SCHEMAS = {
    "raw_id": {"type": "string", "format": "uuid"},
    "timestamp": MOMENT_SCHEMA | {"description": MOMENT_FORMS},
}


RARE = {  # members that are sent only if there is something
    (AcceptedBatch.__name__, "not_json"),
    (Measurement.__name__, "series"),
    (RejectedPayload.__name__, "series"),
    (RejectedPayload.__name__, "superseded_by"),
}
# The groups in which the routes are shown, by the beginning of their paths.
TAGS = {
    "/ingest": "Landing",
    "/process": "Processing",
    "/measurements": "Measurements",
    "/series": "Measurements",
    "/raw": "Payloads",
    "/rejected": "Quarantine",
}
OTHER_TAG = "Service"


def openapi_document(prefix: str, *, has_series: bool) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of `ROUTES`, made of the types that the code itself uses."""
    documented = [route for route in ROUTES if route.answers]
    kinds = [kind for route in documented for kinds in route.answers.values() for kind in kinds]
    types = {Problem, *(kind for kind in kinds if isinstance(kind, type))}
    _, schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    for name, schema in schemas.items():  # what has a default is sent as well
        schema["required"] = [each for each in schema["properties"] if (name, each) not in RARE]
    paths: dict[str, dict[str, Any]] = {}
    for route in documented:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(
            route, has_series=has_series
        )
    return {
        "openapi": "3.1.0",
        "info": OPENAPI_INFO,
        "servers": [{"url": prefix or "/"}],
        "tags": [{"name": name} for name in dict.fromkeys([*TAGS.values(), OTHER_TAG])],
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": SECURITY_SCHEMES},
    }


@functools.cache
def openapi_json(prefix: str, *, has_series: bool) -> bytes:
    """Return the same as JSON; it takes 10 ms to make."""
    return json_of(openapi_document(prefix, has_series=has_series))


def _operation(route: Route, *, has_series: bool) -> dict[str, Any]:
    answers = {status: route.answers.get(status, (Problem,)) for status in route.statuses()}
    summary, _, more = (inspect.getdoc(route.handler) or "").partition("\n\n")
    operation: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "tags": [TAGS.get("/" + route.path.split("/")[1], OTHER_TAG)],
        "summary": summary,
        "description": more,
        "parameters": _parameters(route, has_series=has_series),
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
    names = [kind.__name__ for kind in kinds if isinstance(kind, type)]
    if names:
        media = "application/problem+json" if Problem in kinds else "application/json"
        either = [{"$ref": f"#/components/schemas/{name}"} for name in names]
        content[media] = {"schema": either[0] if len(either) == 1 else {"anyOf": either}}
    return {"description": HTTPStatus(status).phrase, "content": content}


def _parameters(route: Route, *, has_series: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name in re.findall(r"{(\w+)}", route.path):
        schema = PATH_SCHEMAS[name]
        found.append({"name": name, "in": "path", "required": True, "schema": schema})
    if route.query:
        _, schemas = msgspec.json.schema_components([route.query])
        for name, schema in schemas[route.query.__name__]["properties"].items():
            if name in SERIES_PARAMETERS and not has_series:
                continue
            given = schema.get("anyOf", [schema])[0]  # the other is null, which no query sends
            if given.get("format") == "date-time":
                described = {"description": f"{given['description']} {MOMENT_FORMS}"}
                given = given | MOMENT_SCHEMA | described
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
        hand_on(config)
        log_to_stderr(config.log)
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        # A router of one's own is deprecated, and the only way to an Expect without a route.
        app = web.Application(router=Router())
    app.middlewares.extend([cors, edge] if config.server.cors_origins else [edge])
    app[CONFIG] = config
    app[METRICS] = metrics = Metrics()
    app[RAW] = store = store_of(config, metrics)
    app[BACKEND] = measured(backend_of(config) if backend is None else backend, metrics)
    app[ADMISSION] = Admission()
    app[CLIENTS] = Clients()
    app[GUARD] = guard = Guard(config)
    app[RELOADER] = Reloader()
    if config.files:
        app[RELOADER].watch([*config.files, config.auth.jwt.jwks], guard.reload)
    metrics.own_in_flight = lambda: app[ADMISSION].bytes
    payloads = store.portable()
    app[PROCESSOR] = Processor(
        payloads, app[BACKEND], batch=config.process.batch, rules=config.transform, metrics=metrics
    )
    app[CHECKER] = Workers(1)  # one large document at a time
    add_threads(app, payloads)
    rates = {"key": config.limits.per_key, "address": config.limits.per_address}
    app[LIMITERS] = {by: rate.limiter() for by, rate in rates.items() if rate}
    for route in ROUTES:
        add = app.router.add_get if route.method == "GET" else app.router.add_post
        add(route.path, route.handle, name=route.handler.__name__, expect_handler=expected)
    app.cleanup_ctx.append(lifecycle)
    app.on_shutdown.append(lambda app: app[ADMISSION].drain(0))
    return app


def add_threads(app: web.Application, payloads: Payloads) -> None:
    """Add threads for all that takes longer, each for its purpose, so that none waits for all."""
    app[ARRIVALS] = ThreadPoolExecutor(2, "arrivals")
    app[GLANCES] = glances = ThreadPoolExecutor(2, "glances")
    app[PENDING] = look_at_pending(payloads, glances)
    app[REJECTED] = look_at_rejected(payloads, glances)
    app[DISCARDED] = look_at_discarded(payloads, glances)
    app[SERIES] = SeriesLately(app[BACKEND])
    app[BACKEND_TROUBLE] = Shared(lambda: trouble_of(app[BACKEND]))
    app[PROCESSING_TROUBLE] = Shared(lambda: processing_trouble(app))
    app[READS], app[SUMMARIES] = Turns("reads", 8, threads=2), Turns("summaries", 2)
    app[RECEIPTS], app[RETRIES] = Turns("receipts", 2, threads=2), Turns("retries", 1)
    is_far = payloads.has_archive
    app[FAR] = Turns("archive", 8, threads=4, may_hang=True) if is_far else app[READS]


def store_of(config: Config, observer: Observer | None = None) -> PayloadStore:
    """Return the configured store of payloads."""
    raw = config.raw
    return RawStore(
        raw.dir,
        processed=raw.processed_dir,
        rejected=raw.rejected_dir,
        keep_days=raw.keep_days,
        archive=archive_of(config, observer),
        keep_local_days=raw.keep_local_days,
        min_free_bytes=raw.min_free_bytes,
        node=config.node.id,
        observer=observer,
    )


def archive_of(config: Config, observer: Observer | None) -> Archive | None:
    """Return the configured archive; raises `ConfigError` where its library is not installed."""
    if not config.raw.archive:
        return None
    missing = needs_obstore()
    if missing:
        raise ConfigError(missing)
    return Archive(config.raw.archive, config.node.id or 0, observer=observer)


def backend_of(config: Config) -> Backend:
    """Return the configured backend; raises `ConfigError`."""
    name, sqlite, postgres = msgspec.structs.astuple(config.storage)
    options: dict[str, dict[str, object]] = {
        "sqlite": {"path": sqlite.path},
        "postgres": {"url": postgres.url.reveal(), "pool": postgres.pool},
    }
    given = options.get(name, {}) | series_option(config.transform)
    try:
        return create_backend(name, **given)
    except ValueError as error:
        needs = ""
        if config.transform.series and ":" in name:
            needs = "; with [transform] series it is made with series=True, see docs/backends.md"
        raise ConfigError(f"storage.backend: {error}{needs}") from error


async def lifecycle(app: web.Application) -> AsyncIterator[None]:
    """Open what the application works with; close it when the last request is answered."""
    app[PREFIX] = str(app.router["health"].url_for()).removesuffix("/health")
    if app[GUARD].is_open:
        log.warning("no API key is set, the API is open to everyone: set DROPZONE_API_KEY")
    store = app[RAW]
    await store.open()
    async with app[METRICS].shared(store.workspace):
        for name in await asyncio.to_thread(store.strays):
            log.warning("%s is left alone: it is not named <uuid>.json", name)
        trouble = await trouble_of(app[BACKEND])
        if trouble:
            log.warning("the backend does not answer, landing goes on: %s", trouble)
        tokens = app[GUARD].tokens
        if tokens:
            await tokens.fetch()
        tasks = [
            asyncio.create_task(app[RELOADER].run()),
            asyncio.create_task(app[CLIENTS].look_around()),
        ]
        tasks.append(asyncio.create_task(app[PROCESSOR].discards.finish_at_last()))
        every = app[CONFIG].process.every
        if every:
            tasks.append(asyncio.create_task(app[PROCESSOR].process_forever(every)))
        if app[CONFIG].raw.compact:
            tasks.append(asyncio.create_task(compact_daily(store.portable())))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await app[PROCESSOR].close()
            await app[CHECKER].close()
            await store.close()
            await app[BACKEND].close()
            for threads in (app[ARRIVALS], app[GLANCES]):
                threads.shutdown(wait=False)
            for turns in (app[READS], app[RECEIPTS], app[SUMMARIES], app[RETRIES], app[FAR]):
                turns.threads.shutdown(wait=False)


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

FILE_PART = 8 * 1024 * 1024  # bytes of a large file that are landed as a batch
GRACE = 5.0  # seconds that requests have to finish when the service is told to stop
IDLE = 75.0  # seconds for which a connection may send no request, or only a part of its head
BACKLOG = 4096  # connections that wait to be accepted; others are tried again after a second


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
            context.num_tickets = 0  # a session that is resumed needs no certificate
            context.options |= ssl.OP_NO_TICKET
    except ssl.SSLError as error:
        wrong = (error.reason or "no PEM of that kind").lower().replace("_", " ")
        need = "give PEM files, the key unencrypted and that of the certificate"
        raise ConfigError(f"server.{setting} cannot be used ({wrong}): {need}") from None
    except OSError as error:
        raise ConfigError(f"server: {error.filename} cannot be read: {error.strerror}") from None
    return context


class NewestContext(ssl.SSLContext):
    """Hands each connection to the context that was loaded last.

    Its sessions are its own: none of a client of another authority is resumed, which would need no
    certificate. A context that is only handed over by SNI goes on to use the sessions of the first.
    """

    newest: ssl.SSLContext

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        return self.newest.wrap_bio(*arguments, **options)


def followed(config: ServerConfig, reloader: Reloader) -> ssl.SSLContext | None:
    """Return a context whose every handshake uses the certificates that were loaded last."""
    first = tls_context(config)
    if first is None:
        return None
    front = NewestContext(ssl.PROTOCOL_TLS_SERVER)
    front.newest = first

    def reload() -> None:
        front.newest = tls_context(config) or front.newest
        log.info("the certificates were loaded again")

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
        host, port = config.server.host, config.server.port
        site = web.TCPSite(runner, host, port, ssl_context=tls, backlog=BACKLOG)
        await site.start()
        gc.collect()
        gc.freeze()  # what is there now stays: it is not looked through for garbage any more
        stop = asyncio.Event()
        on_stop(stop.set)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, app[RELOADER].told.set)
        log.info("listening on %s", site.name)
        log.info("payloads lie in %s, backend is %s", config.raw.dir, config.storage.backend)
        log.info("settings are read from %s", settings_source(config))
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
    code = os.EX_OK
    async with opened_store(config) as (store, _metrics):
        for name in args.files:
            parts = functools.partial(parts_of, limit=config.server.max_body_bytes, name=name)
            with tempfile.TemporaryFile(dir=store.workspace) as copy:  # which nobody alters
                try:
                    with open(0 if name == "-" else name, "rb", closefd=name != "-") as file:
                        shutil.copyfileobj(file, copy)
                    total = sum(contents.payloads for _, contents in parts(copy))  # all is checked
                except (DropzoneError, OSError) as error:
                    code = os.EX_NOINPUT if isinstance(error, OSError) else os.EX_DATAERR
                    reason = str(error)
                    if isinstance(error, PermissionError):  # root works as another user here
                        me = user_name(os.geteuid())
                        reason = f"{me} may not read it, `ingest - < {shlex.quote(name)}` does"
                    print(f"{name}: {reason}; nothing of it was landed", file=sys.stderr)
                    continue
                with tqdm(total=total, desc=name, unit=" payloads", disable=None) as bar:
                    for body, contents in parts(copy):
                        if not await land_part(store, name, body, contents):
                            code = os.EX_DATAERR
                        bar.update(contents.payloads)
    return code


async def land_part(store: PayloadStore, name: str, body: bytes, contents: Contents) -> bool:
    """Land a body of a file and print its raw_ids; return whether all that is in it is JSON."""
    landed = await store.land(body, form=contents.form, payloads=contents.payloads)
    raw_ids = texts_of(landed)
    print(*raw_ids, sep="\n")
    for line, at, detail in contents.not_json:
        print(f"{name}: line {line} has landed as {raw_ids[at]}, but is {detail}", file=sys.stderr)
    return not contents.not_json


def parts_of(file: BinaryIO, limit: int, name: str) -> Iterator[tuple[bytes, Contents]]:
    """Yield a file as bodies that can be landed: all of it, or if that is too large its lines."""
    file.seek(0)
    whole = file.read(limit + 1)
    is_ndjson = name.endswith((".ndjson", ".jsonl"))
    if len(whole) <= limit:
        try:
            yield whole, contents_of(whole, is_ndjson=is_ndjson)
            return
        except DropzoneError as error:
            if error.status != HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
                raise
    good, bad = 0, list[NotJson]()
    for lines, before in lines_of(file, limit):
        count, not_json = lines_in(lines, before=before)
        good += count - len(not_json)
        bad = bad or not_json[:1]
        if count:
            yield lines, _batch("ndjson", count, not_json)
    if not good:
        raise _no_line_is_json(bad)


def lines_of(file: BinaryIO, limit: int) -> Iterator[tuple[bytes, int]]:
    """Yield the lines of a file, as many as make a batch, and how many there are before them."""
    file.seek(0)
    lines, size, before = list[bytes](), 0, 0
    for line in iter(lambda: file.readline(limit + 2), b""):
        if len(line.rstrip(b"\r\n")) > limit:
            raise too_large(limit)
        if lines and (size + len(line) > min(limit, FILE_PART) or len(lines) == BATCH):
            yield b"".join(lines), before
            before += len(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line)
    if lines:
        yield b"".join(lines), before


async def process_pending(config: Config, args: argparse.Namespace) -> int:
    """turn the pending payloads into measurements, with or without a server beside it"""
    os.nice(NICE)
    async with opened(config) as (store, backend, metrics):
        batch = config.process.batch
        processor = Processor(
            store.portable(),
            backend,
            batch=batch,
            rules=config.transform,
            metrics=metrics,
            workers=args.workers,
        )
        try:
            if args.watch:
                await watch(config, processor, store.portable())
            with tqdm(unit=" payloads", disable=None) as bar:

                def show(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                with audited("process", operator_name()) as facts:
                    result = await processor.process(args.limit, show)
                    facts.update(processed=result.processed, failed=result.failed)
        finally:
            await processor.close()
    print(msgspec.json.format(json_of(result)).decode())
    return os.EX_OK


async def watch(config: Config, processor: Processor, payloads: Payloads) -> None:
    """Process until stopped, and pack finished days where that is asked for."""
    async with asyncio.TaskGroup() as tasks:
        if config.raw.compact:
            tasks.create_task(compact_daily(payloads))
        await processor.process_forever(config.process.every or 1.0)


@contextlib.asynccontextmanager
async def opened_store(
    config: Config, *, must_exist: bool = False
) -> AsyncIterator[tuple[PayloadStore, Metrics]]:
    """Open the data folder, beside a server or without one.

    Where it `must_exist`, none is made: a command that looks for payloads in a folder of its own
    making would find that there are none.
    """
    if must_exist and not os.path.isdir(config.raw.dir):
        raise ConfigError(
            f"there are no payloads, as there is no folder {config.raw.dir}: check "
            "DROPZONE_RAW_DIR and --config, and that its disk is mounted"
        )
    metrics = Metrics()
    store = store_of(config, metrics)
    await store.open()
    async with metrics.shared(store.workspace):
        try:
            yield store, metrics
        finally:
            await store.close()


@contextlib.asynccontextmanager
async def opened(
    config: Config, given: Backend | None = None, *, must_exist: bool = False
) -> AsyncIterator[tuple[PayloadStore, Backend, Metrics]]:
    """Do the same, and make the backend unless it is given."""
    async with opened_store(config, must_exist=must_exist) as (store, metrics):
        backend = measured(given or backend_of(config), metrics)
        try:
            yield store, backend, metrics
        finally:
            await backend.close()


async def until_stopped(command: Coroutine[Any, Any, int]) -> int:
    """Run a command until it ends or the program is told to stop, even before it has begun."""
    task = asyncio.ensure_future(command)

    def stop() -> None:
        if not task.cancelling():  # a second signal must not interrupt its tidying up
            task.cancel()

    on_stop(stop)
    await asyncio.wait([task])
    return os.EX_OK if task.cancelled() else task.result()


def on_stop(call: Callable[[], object]) -> None:
    """Have SIGINT and SIGTERM call this alone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, call)


async def verify(config: Config, args: argparse.Namespace) -> int:
    """recompute the rows from their payloads, say how many are right; 1 where one is not"""

    def way(proof: Proof) -> ProofWay:
        return functools.partial(proof.findings, series=args.series)

    return await prove(config, args, way, backend_to_look_at(config), {})


async def rebuild(config: Config, args: argparse.Namespace) -> int:
    """set the rows right that verify finds wrong; with --dry-run only show them"""
    if args.dry_run:
        return await verify(config, args)
    if os.path.exists(store_of(config).portable().workspace / DISCARDING):
        async with opened_processor(config) as (_, processor):
            await processor.discards.finish()

    def way(proof: Proof) -> ProofWay:
        orphans = args.delete_orphans
        return functools.partial(proof.rebuild, series=args.series, delete_orphans=orphans)

    with audited("rebuild", operator_name()) as facts:
        return await prove(config, args, way, backend_of(config), facts)


def require_series_for(config: Config, args: argparse.Namespace) -> None:
    """Raise where a series is asked for, and all measurements are one."""
    if args.series is not None and not config.transform.series:
        raise ConfigError("--series is of no use: [transform] series is not set")


ProofWay = Callable[
    [datetime | None, datetime | None, Callable[[int], object]], AsyncIterator[Finding]
]


async def prove(
    config: Config,
    args: argparse.Namespace,
    way_of: Callable[[Proof], ProofWay],
    backend: Backend,
    facts: dict[str, object],
) -> int:
    """Go through all rows and print what is found; return 1 where something is left to be done."""
    require_series_for(config, args)
    async with opened(config, backend, must_exist=True) as (store, timed_backend, _):
        payloads = await asyncio.to_thread(count_readable, store)
        workers = None if args.cluster is None else Cluster(args.cluster)
        proof, is_first = Proof(store.portable(), timed_backend, config.transform, workers), True
        with upkeep_lock(store), tqdm(total=payloads, unit=" payloads", disable=None) as bar:
            try:
                async for finding in way_of(proof)(args.since, args.until, bar.update):
                    if is_first and not args.json:
                        head = FINDING.format(*FINDING_HEAD)
                        bar.write(f"{head}  series" if config.transform.series else head)
                    is_first = False
                    bar.write(as_line(finding, as_json=args.json))
            finally:
                facts.update(proof.set_right)
        first_kept = await asyncio.to_thread(store.first_kept_day)
    summary = ProofSummary(
        folder=str(config.raw.dir.parent),
        backend=place_of_rows(config, backend),
        node=config.node.id,
        right=proof.counts["right"],
        wrong={kind: proof.counts[kind] for kind in WRONG if proof.counts[kind]},
        unprovable={kind: proof.counts[kind] for kind in UNPROVABLE if proof.counts[kind]},
        set_right=dict(proof.set_right),
        is_all=args.since is None and args.until is None and args.series is None,
        payloads_kept_from=first_kept or None,
        damage=proof.damage,
    )
    print(msgspec.json.encode(summary).decode() if args.json else summary.text())
    return 1 if summary.is_amiss() else os.EX_OK


def count_readable(store: Payloads) -> int | None:
    """Return how many payloads are processed, None where damage keeps them from being counted."""
    try:
        return store.count_processed()
    except (OSError, StorageUnavailable):
        return None


def backend_to_look_at(config: Config) -> Backend:
    """Return the configured backend; for a SQLite file that is not there, which stays so, none."""
    if config.storage.backend == "sqlite" and not os.path.exists(config.storage.sqlite.path):
        return create_backend("memory", **series_option(config.transform))
    return backend_of(config)


def place_of_rows(config: Config, backend: Backend) -> str:
    """Return where the rows are, in words that show no password."""
    path = config.storage.sqlite.path
    if config.storage.backend == "sqlite":
        return f"sqlite {path}" + ("" if os.path.exists(path) else " (which is not there)")
    place = getattr(backend, "place", "")
    return f"{config.storage.backend} {place}".rstrip()


WRONG = {  # what each kind of wrong row is, and what to do about it
    "missing": "payloads make a row that is not there; rebuild adds it",
    "differing": "not what their payload makes; rebuild sets them right",
    "superseded": "a later payload should have won; rebuild sets them right",
}
UNPROVABLE = {  # the same for rows that stand, as no payload says anything about them
    "orphaned": "cannot be checked, as their payload is not in this folder: look for a pack that "
    "is lost, a disk that is not mounted, or another Dropzone on the same table with the same "
    "[node] id; "
    "rebuild --delete-orphans deletes them",
    "discarded": "cannot be checked, as their payload was discarded: process finishes a discard "
    "that was cut short; rows of an older copy are deleted by rebuild --delete-orphans",
    "unreadable": "cannot be checked, as their payload cannot be read, or makes no row any more: "
    "restore it from a copy",
    "elsewhere": "cannot be checked here, as their payload is on another node, whose verify does; "
    "they stay",
    "expired": "cannot be checked, as their payload was deleted after keep_days; they stay",
    "older": "cannot be checked, as they are older than Dropzone and name no payload; they stay",
}
HARMLESS = {"elsewhere", "expired", "older"}


class ProofSummary(Struct, frozen=True, tag_field="kind", tag="summary"):
    """What `verify` and `rebuild` say at the end; with --json the last line, of `kind` summary.

    The numbers are those of rows, by kind where there are several: how they are now, and how many
    were `set_right` for that. Without `is_all` only those between two moments, or of one series,
    were looked at.
    """

    folder: str
    backend: str
    node: int | None
    right: int
    wrong: dict[str, int]
    unprovable: dict[str, int]
    set_right: dict[str, int]
    is_all: bool
    payloads_kept_from: str | None
    damage: list[str]

    def is_amiss(self) -> bool:
        """Say whether somebody has to do something."""
        return bool(self.damage or self.wrong or self.unprovable.keys() - HARMLESS)

    def text(self) -> str:
        """Tell it to a person."""
        wrong, unprovable = sum(self.wrong.values()), sum(self.unprovable.values())
        lines = [f"wrong  {each}" for each in self.damage]
        lines.append(f"the rows in {self.backend}, by the payloads in {self.folder}:")
        lines += [f"{count:>11} {kind} before, set right" for kind, count in self.set_right.items()]
        lines.append(f"{self.right:>11} right, {wrong} wrong, {unprovable} that cannot be checked")
        for kind, count in (self.wrong | self.unprovable).items():
            lines.append(f"{count:>11} {kind}: {(WRONG | UNPROVABLE)[kind]}")
        if self.payloads_kept_from:
            lines.append(
                f"payloads of the days before {self.payloads_kept_from} were deleted after "
                "keep_days: rows of theirs that are missing cannot be noticed"
            )
        elif self.is_all and self.right and not (wrong or unprovable or self.damage):
            lines.append("all rows are right")
        elif self.is_all and self.unprovable.keys() == {"elsewhere"} and not (wrong or self.damage):
            lines.append("all rows of this node are right")
        return "\n".join(lines)


FINDING = "{:10}  {:27}  {:36}  {:>23}  {:>23}  {:36}  {:>23}  {:>23}"
FINDING_HEAD = (
    *("finding", "timestamp_utc", "row: raw_id", "mean", "std_dev"),
    *("by the payloads: raw_id", "mean", "std_dev"),
)


def as_line(finding: Finding, *, as_json: bool) -> str:
    if as_json:
        return json_of(finding).decode()
    row, right = finding.row, finding.right
    cells = [
        (str(each.raw_id), f"{each.mean!r}", f"{each.std_dev!r}") if each else ("-", "", "")
        for each in (row, right)
    ]
    [first, *_] = filter(None, (row, right))
    at = timestamp_text(first.timestamp_utc)
    line = FINDING.format(finding.kind, at, *cells[0], *cells[1])
    return f"{line}  {first.series}" if first.series else line.rstrip()


async def compact(config: Config, _: argparse.Namespace) -> int:
    """pack finished days, archive packs, delete what is older than keep_days"""
    code, caller = os.EX_OK, operator_name()
    async with opened_store(config, must_exist=True) as (store, _metrics):
        with upkeep_lock(store):
            days = store.finished_days()
            for day in tqdm(days, unit=" days", disable=None):
                try:
                    with audited("compact", caller, day=day) as facts:
                        count = await asyncio.to_thread(store.compact, day)
                        facts["packed"] = count
                    tqdm.write(f"{day}: {count} payloads packed")
                except (OSError, StorageUnavailable) as error:  # one bad day never stops the rest
                    code = os.EX_TEMPFAIL
                    tqdm.write(f"{day}: not packed, its payloads stay: {error}", sys.stderr)
            try:
                expired = await asyncio.to_thread(expire, store)
            except ArchiveAway as error:
                code, expired = os.EX_TEMPFAIL, []
                tqdm.write(f"not deleted after keep_days, the next run does: {error}", sys.stderr)
            for pack in expired:
                audit("expire", caller, pack=pack)
                print(f"{pack}: deleted, its day is more than {config.raw.keep_days} days ago")
        is_archived, is_done = await tell_archived(store, caller)
        if not (days or expired or is_archived):
            print("nothing to do: no day before today (UTC) has processed payloads to pack")
    return code if is_done else os.EX_TEMPFAIL


async def tell_archived(store: PayloadStore, caller: str) -> tuple[bool, bool]:
    """Put packs into the archive, and print that; return whether any was to be, and all are."""
    is_any, is_done = False, True
    async for name, done in archive_packs(store, caller):
        is_any = True
        if isinstance(done, Exception):
            is_done = False
            print(f"{name}: not archived, it stays: {sentence_of(done)}", file=sys.stderr)
            continue
        for damage in done.damage:
            print(f"{damage}: {name} was put there again", file=sys.stderr)
        rest = "" if done.is_local else ", and deleted on this disk"
        print(f"{name}: in the archive as {', '.join(done.objects)}{rest}")
    return is_any, is_done


async def adopt(config: Config, _: argparse.Namespace) -> int:
    """take over the packs of this node that are in the archive alone, after the loss of a disk"""
    if not config.raw.archive:
        raise ConfigError("adopt takes over what is in an archive: set raw.archive")
    count = 0
    async with opened_store(config) as (store, _metrics):
        with upkeep_lock(store), archive_lock(store):
            packs = store.adopt()
            while pack := await asyncio.to_thread(next, packs, ""):
                audit("adopt", operator_name(), pack=pack)
                print(f"{pack}: taken over")
                count += 1
    print(f"{count} packs of {config.raw.archive} were taken over")
    return os.EX_OK


async def backup(config: Config, args: argparse.Namespace) -> int:
    """copy payloads, rows of SQLite, keys and settings to a new folder, while others land"""
    folder: Path = args.folder
    done = BackupSummary(folder)
    try:
        async with opened_store(config, must_exist=True) as (store, _metrics):
            with audited("backup", operator_name(), folder=folder) as facts:
                with store.new_backup(folder) as part:
                    await back_up_all(config, store, part, done)
                facts.update(done.files)
    except FolderTaken as error:
        print(f"dropzone: {error}", file=sys.stderr)
        return os.EX_CANTCREAT
    for trouble in done.troubles:
        print(f"dropzone: not in the backup: {trouble}", file=sys.stderr)
    print(done.text())
    return os.EX_IOERR if done.troubles else os.EX_OK


@dataclass
class BackupSummary:
    """What a backup has copied, and the sentences on what it could not."""

    folder: Path
    files: Counter[str] = field(default_factory=Counter)
    troubles: dict[str, None] = field(default_factory=dict)  # in their order, each once
    rows: str = ""
    has_links: bool = False

    def note(self, copied: Copied) -> None:
        self.has_links |= copied.is_link
        if copied.trouble:
            self.troubles[copied.trouble] = None
        elif copied.kind != "besides":
            self.files[copied.kind] += 1

    def text(self) -> str:
        """Tell it to a person."""
        count = self.files
        text = (
            f"{self.folder}: {count['packs']} packs, {count['processed']} processed, "
            f"{count['rejected']} rejected, {count['discarded']} discarded and {count['pending']} "
            f"pending payloads; {self.rows}"
        )
        if count["archived"]:
            text += f"\nnot in it, as they are in the archive alone: {count['archived']} packs"
        if self.has_links:
            text += "\nits payloads are hard links: keep a copy of it on another disk, too"
        return text


async def back_up_all(config: Config, store: PayloadStore, part: Path, done: BackupSummary) -> None:
    """Copy everything; processing waits only when its bulk, what is processed, has been copied."""
    with tqdm(unit=" files", disable=None) as bar:

        async def copy(files: Iterator[Copied]) -> None:
            for number, copied in enumerate(files):
                done.note(copied)
                bar.update()
                if number % 1000 == 0:
                    await asyncio.sleep(0)  # here Ctrl-C takes effect

        async with held(Path(upkeep_lock(store).lock_file)):
            await copy(store.back_up(part, processed_alone=True))
            async with held(store.process_lock):
                await copy(store.back_up(part))
                await back_up_rows(config, part, done)
    back_up_settings(config, part)


async def back_up_rows(config: Config, part: Path, done: BackupSummary) -> None:
    """Copy the rows where their backend can do that; what it cannot, a rebuild makes again."""
    backend = backend_to_look_at(config)
    place, copy = place_of_rows(config, backend), getattr(backend, "back_up", None)
    rows: object = "not copied"
    try:
        if copy:
            rows = await copy(part / "dropzone.sqlite")
    except BackendError as error:
        done.troubles[str(error)] = None
        (part / "dropzone.sqlite").unlink(missing_ok=True)
    finally:
        await backend.close()
    done.rows = f"rows of {place}: {rows}"


BACKUP_PATIENCE = 3600.0  # seconds that a backup waits for another run


@contextlib.asynccontextmanager
async def held(lock_file: Path) -> AsyncIterator[None]:
    """Hold a lock; wait for another run that has it, and say so."""
    lock = AsyncFileLock(lock_file, poll_interval=0.005)  # others leave it free for moments only
    try:
        await lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout:
        print(f"dropzone: waiting for the run that holds {lock_file}", file=sys.stderr)
        await lock.acquire(timeout=BACKUP_PATIENCE)
    try:
        yield
    finally:
        await lock.release()


def back_up_settings(config: Config, part: Path) -> None:
    """Copy the files that settings and keys were read from, for their owner alone."""
    settings = part / "settings"
    settings.mkdir()
    keys = keys_file_of(config)
    for file, copy in ((config.source, settings), (config.dotenv, settings), (keys, part)):
        if file and os.path.exists(file):
            descriptor = os.open(copy / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as out:
                out.write(file.read_bytes())


async def retry_rejected(config: Config, args: argparse.Namespace) -> int:
    """put rejected payloads back to pending: those with a code or a raw_id, or all"""
    async with opened_store(config, must_exist=True) as (store, _metrics):
        queries = [RetryQuery(args.code, raw_id=raw_id) for raw_id in args.raw_ids or [None]]
        store.take_stock()  # what others have done in the folder
        with audited("retry", operator_name()) as facts:
            facts["retried"] = retried = sum(put_back(store, query) for query in queries)
        print(msgspec.json.encode(Retried(retried)).decode())
    return os.EX_OK


async def discard_payloads(config: Config, args: argparse.Namespace) -> int:
    """discard payloads in any state by raw_id, or rejected ones by code and time, and their rows"""
    require_series_for(config, args)
    query = DiscardQuery(args.code, args.since, args.until, series=args.series)
    async with opened_processor(config) as (store, processor):
        store.take_stock()  # what others have done in the folder
        chosen = rejected_ids(store, query, config.transform.series)
        if args.raw_ids:
            starts = range(0, len(args.raw_ids), AT_A_TIME)
            chosen = (args.raw_ids[start : start + AT_A_TIME] for start in starts)
        with audited("discard", operator_name()) as facts:
            facts["discarded"] = count = await processor.discards.discard(chosen)
        print(msgspec.json.encode(Discarded(count)).decode())
    return os.EX_OK


async def undiscard_payloads(config: Config, args: argparse.Namespace) -> int:
    """put discarded payloads back to pending, from where they are processed again"""
    async with opened_processor(config) as (_, processor):
        with audited("undiscard", operator_name()) as facts:
            facts["undiscarded"] = count = await processor.discards.undiscard(args.raw_ids)
        print(msgspec.json.encode({"undiscarded": count}).decode())
    return os.EX_OK


@contextlib.asynccontextmanager
async def opened_processor(config: Config) -> AsyncIterator[tuple[PayloadStore, Processor]]:
    """Open a data folder that is there, and make a processor for it."""
    async with opened(config, must_exist=True) as (store, backend, metrics):
        processor = Processor(
            store.portable(),
            backend,
            batch=config.process.batch,
            rules=config.transform,
            metrics=metrics,
        )
        try:
            yield store, processor
        finally:
            await processor.close()


async def new_key(config: Config, args: argparse.Namespace) -> int:
    """print a new API key, this once, and keep its hash beside the payloads"""
    key = f"dz_{secrets.token_hex(20)}"  # a scanner for secrets can find it
    made = KeyConfig(args.name, Secret(f"sha256:{hash_of(key).hex()}"), tuple(args.scope))
    file, was_open = keys_file_of(config), Guard(config).is_open
    try:
        with changing_keys(file):
            if args.name in {"api_key", *names_of(config)}:
                raise ConfigError(f"the name {args.name} is taken: `key list` shows all of them")
            if config.keys_file is None:
                raise ValueError("DROPZONE_AUTH_KEYS goes before it")
            write_keys(file, [*kept_keys(file), made])
    except (OSError, ValueError) as error:
        print(key)
        wrong = f"{file} was left as it is ({error}): add this to the keys yourself"
        print(f"dropzone: {wrong}\n{table_of(made)}", file=sys.stderr)
        return os.EX_CANTCREAT
    audit("key new", operator_name(), name=args.name)
    print(key)
    print(f"{args.name} was added to {file}, which servers read within seconds", file=sys.stderr)
    if was_open:
        print("it is the first: from now on every request needs a key", file=sys.stderr)
    return os.EX_OK


async def revoke_key(config: Config, args: argparse.Namespace) -> int:
    """take an API key back: servers refuse it within seconds"""
    file = keys_file_of(config)
    with disk_errors():
        known = args.name in {each.name for each in kept_keys(file)}
        if known:
            take_out(config, args.name)
            audit("key revoke", operator_name(), name=args.name)
            print(f"{args.name} was taken out of {file}: servers refuse it within seconds")
    if args.name in names_of(config):
        place = place_of_key(config, args.name)
        print(f"dropzone: {args.name} stands in {place}: remove it there", file=sys.stderr)
        return os.EX_CANTCREAT
    if not known:
        raise ConfigError(f"no key is named {args.name}: `key list` shows all of them")
    return os.EX_OK


def take_out(config: Config, name: str) -> None:
    """Take a key out of the file; raises `ConfigError` where that would open the API."""
    file = keys_file_of(config)
    with changing_keys(file):
        others = {*names_of(config)} - {name}
        if config.keys_file and not others and config.auth.jwt == JwtConfig():
            wrong = f"{name} is the last key, without which the API is open to everyone"
            raise ConfigError(f"{wrong}: make another one first")
        write_keys(file, [each for each in kept_keys(file) if each.name != name])


def names_of(config: Config) -> list[str]:
    """Return the names of the keys that hold."""
    return [name for name, _ in callers_of(config).values()]


def place_of_key(config: Config, name: str) -> str:
    """Say where a key stands that `key new` has not made."""
    if name == "api_key":
        return "DROPZONE_API_KEY, or as auth.api_key in the configuration file"
    if config.keys_file is None:
        return "DROPZONE_AUTH_KEYS"
    return f"{config.source}, as a table [[auth.keys]]"


KEYS_HEAD = "# Made by `key new` and `key revoke`; each other change is undone by their next run.\n"
KEY_TABLE = """
[[auth.keys]]
name = "{}"
hash = "{}"
scopes = {}
"""


def table_of(key: KeyConfig) -> str:
    scopes = json.dumps(list(dict.fromkeys(key.scopes)))
    return KEY_TABLE.format(key.name, key.hash.reveal(), scopes)


@contextlib.contextmanager
def changing_keys(file: Path) -> Iterator[None]:
    """Let nobody else change the file of the keys meanwhile."""
    make_folder(file.parent)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with locked(folder):
            yield
    finally:
        os.close(folder)


def write_keys(file: Path, keys: Iterable[KeyConfig]) -> None:
    """Replace the file of the keys at once; only this user, who is the service's, reads it."""
    beside = file.with_suffix(".part")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        write_all(descriptor, (KEYS_HEAD + "".join(map(table_of, keys))).encode())
        os.fsync(descriptor)
        os.rename(beside, file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    sync_file(file.parent)


async def list_keys(config: Config, _: argparse.Namespace) -> int:
    """list the API keys by name and scopes; `key new NAME --scope …` makes one"""
    for name, scopes in callers_of(config).values():
        print(name, *scopes)
    if Guard(config).is_open:
        print("there is no key, the API is open to everyone: `key new NAME --scope …` makes one")
    elif not callers_of(config):
        print(f"there is no key, only tokens of {config.auth.jwt.issuer} are let in")
    return os.EX_OK


async def check(config: Config, _: argparse.Namespace) -> int:
    """name what is wrong with the configuration and its surroundings; then the exit code is 78"""
    backend = backend_of(config)
    problems = await asyncio.to_thread(store_of(config).problems)
    troubles: dict[str, Sequence[str | None]] = {
        f"data folder {config.raw.dir}": problems["data folder"],
        f"backend {config.storage.backend}": [
            await storage_trouble(config, backend) or await twin_trouble(config, backend)
        ],
        "clock": problems["clock"],
        "file descriptors": [descriptor_trouble()],
        "keys": [await key_trouble(config)],
        "TLS": [config_trouble(tls_context, config.server)],
    }
    if "archive" in problems:
        troubles[f"archive {config.raw.archive}"] = problems["archive"]
    await backend.close()
    for name, found in troubles.items():
        lines = [f"wrong  {name}: {trouble}" for trouble in found if trouble]
        print("\n".join(lines) or f"ok     {name}")
    print(f"note   settings are read from {settings_source(config)}")
    if config.raw.keep_local_days and not config.raw.archive:
        print("note   raw.keep_local_days deletes nothing, as no raw.archive is set")
    number = store_of(config).nodes().number
    if config.node.id is not None:
        print(f"note   this is node {number}")
    elif number:
        print(f"note   [node] id is not set here, and this folder was that of node {number}")
    if not any(troubles["keys"]) and Guard(config).is_open:
        print("note   no API key is set, the API is open to everyone: set DROPZONE_API_KEY")
    return os.EX_CONFIG if any(any(found) for found in troubles.values()) else os.EX_OK


async def ask_ready(config: Config, _: argparse.Namespace) -> int:
    """ask the server that these settings describe whether it can land payloads: a health check"""
    server = config.server
    host = server.host or "localhost"  # 0.0.0.0 and :: lead to this machine, too
    try:
        async with asyncio.timeout(READY_PATIENCE):
            if server.tls_client_ca:
                text, is_ready = await shake_hands(host, server.port), True
            else:
                text, is_ready = await readiness(host, server)
    except (ClientError, OSError, TimeoutError) as error:  # also of TLS
        reason = str(error) or f"no answer within {READY_PATIENCE} s"
        print(f"dropzone: {host}, port {server.port} is not ready: {reason}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    print(text)
    return os.EX_OK if is_ready else os.EX_UNAVAILABLE


READY_PATIENCE = 2 * PING_PATIENCE  # seconds: the server asks its backend, too


async def readiness(host: str, server: ServerConfig) -> tuple[str, bool]:
    """Return what a server says of itself; its certificate may be for another name than `host`."""
    scheme = "https" if server.tls_cert else "http"
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{server.port}/ready"
    async with ClientSession() as session, session.get(url, ssl=False) as response:
        return await response.text(), response.status == 200


async def shake_hands(host: str, port: int) -> str:
    """Return where a server answers that lets in only clients with a certificate.

    In TLS 1.3 it has spoken before it asks for that.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    _, writer = await asyncio.open_connection(host, port, ssl=context)
    writer.transport.abort()
    return "it answers; more it tells only clients that have a certificate"


def settings_source(config: Config) -> str:
    """Return the files that settings were read from, in words."""
    files = [str(file) for file in (config.dotenv, config.source) if file]
    return " and ".join(files) or "no file: what no variable sets has its default"


def config_trouble(use: Callable[..., object], config: Section) -> str | None:
    try:
        use(config)
    except ConfigError as error:
        return str(error)
    return None


async def key_trouble(config: Config) -> str | None:
    """Return what is wrong with the API keys, or with those of the issuer, which are fetched."""
    try:
        tokens = Guard(config).tokens
    except ConfigError as error:
        return str(error)
    return await tokens.trouble() if tokens else None


async def storage_trouble(config: Config, backend: Backend) -> str | None:
    path = config.storage.sqlite.path
    if config.storage.backend != "sqlite":
        return await trouble_of(backend)
    if not os.path.exists(path):
        return writing_trouble(path.parent)
    places = [
        (path.parent, os.W_OK | os.X_OK),
        *((f"{path}{end}", FILE) for end in ("", "-wal", "-shm")),
    ]
    trouble = next(filter(None, itertools.starmap(access_trouble, places)), None)
    return trouble or await trouble_of(backend)


async def twin_trouble(config: Config, backend: Backend) -> str | None:
    """Say it where another Dropzone has the same number; nothing is made for that."""
    with contextlib.suppress(BackendError, TimeoutError):
        if config.storage.backend != "sqlite" or os.path.exists(config.storage.sqlite.path):
            twin = await find_twin(store_of(config).portable(), backend)
            return twin.text() if twin else None
    return None


def descriptor_trouble() -> str | None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most == resource.RLIM_INFINITY or most >= DESCRIPTORS:
        return None
    return f"{most} at most, each connection takes one: set LimitNOFILE= or ulimit -Hn to 65536"


DESCRIPTORS = 4096


Parsers = dict[str, argparse.ArgumentParser]


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--config", metavar="FILE", help="read this file instead of config.toml")
    common.add_argument("--host", help="listen on this address")
    common.add_argument("--port", type=int, help="listen on this port")
    title = "The landing zone between devices and a database."
    parser = argparse.ArgumentParser(parents=[common], description=title)
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(run=serve, files=[])
    commands = parser.add_subparsers(metavar="COMMAND")
    runs = {"serve": serve, "ingest": ingest_files, "process": process_pending, "check": check}
    runs |= {"verify": verify, "rebuild": rebuild, "retry": retry_rejected, "compact": compact}
    runs |= {"discard": discard_payloads, "undiscard": undiscard_payloads, "adopt": adopt}
    runs |= {"backup": backup, "key": list_keys, "ready": ask_ready}
    added = _added(commands, runs, common)
    _add_options(added)
    keys = added["key"].add_subparsers(metavar="ACTION")
    acts = {"list": list_keys, "new": new_key, "revoke": revoke_key}
    _add_key_options(_added(keys, acts, common))
    args = parser.parse_args(argv)
    if args.run is retry_rejected and bool(args.raw_ids or args.code) == args.all:
        added["retry"].error("say which payloads: RAW_ID or --code CODE, or else --all")
    if args.run is discard_payloads:
        ways = [args.raw_ids, args.code or args.since or args.until or args.series, args.all]
        if sum(map(bool, ways)) != 1:
            what = "RAW_ID, or else --code CODE, --since, --until, or else --all that is rejected"
            added["discard"].error(f"say which payloads: {what}")
    return args


def _added(commands: Any, runs: Mapping[str, Any], common: argparse.ArgumentParser) -> Parsers:
    added = {}
    for name, run in runs.items():
        added[name] = commands.add_parser(name, parents=[common], help=run.__doc__)
        added[name].set_defaults(run=run)
    return added


def _add_options(added: Parsers) -> None:
    added["ingest"].add_argument("files", nargs="+", metavar="FILE", help="- is standard input")
    how = added["process"].add_mutually_exclusive_group()
    how.add_argument("--watch", action="store_true", help="go on until stopped")
    how.add_argument("--limit", type=positive, help="process this many at most")
    for name in ("verify", "rebuild"):
        for bound, what in (("--since", "from"), ("--until", "before")):
            added[name].add_argument(bound, type=moment, help=f"rows {what} this moment alone")
        added[name].add_argument("--series", metavar="NAME", help="rows of this series alone")
        text = "a JSON object on each line, the summary last"
        added[name].add_argument("--json", action="store_true", help=text)
        text = "derive what is in the archive on this cluster of Dask, tcp://scheduler:8786"
        added[name].add_argument("--cluster", metavar="ADDRESS", help=text)
    added["rebuild"].add_argument("--dry-run", action="store_true", help="do as verify does")
    added["rebuild"].add_argument(
        "--delete-orphans", action="store_true", help="delete rows whose payload is not there"
    )
    added["compact"].description = COMPACT
    added["backup"].add_argument("folder", type=absolute, metavar="DIR", help="which is made")
    added["retry"].add_argument("raw_ids", nargs="*", type=UUID, metavar="RAW_ID")
    added["retry"].add_argument("--code", help="rejected with this code")
    added["retry"].add_argument("--all", action="store_true", help="whatever the reason")
    added["discard"].add_argument("raw_ids", nargs="*", type=UUID, metavar="RAW_ID")
    added["discard"].add_argument("--code", help="rejected with this code")
    for bound, what in (("--since", "from then on"), ("--until", "before then")):
        added["discard"].add_argument(bound, type=moment, help=f"rejected {what}")
    added["discard"].add_argument("--series", help="rejected, of this series")
    added["discard"].add_argument("--all", action="store_true", help="all that is rejected")
    added["undiscard"].add_argument("raw_ids", nargs="+", type=UUID, metavar="RAW_ID")


COMPACT = (
    "Pack each finished day of processed payloads into one file. Delete packs that are older than "
    "raw.keep_days, from the archive, too. Where raw.archive is set, put there what it lacks, read "
    "it back and compare it, then delete the copies here that are older than raw.keep_local_days. "
    "What fails keeps what it was about, and is tried again by the next run (exit code 75)."
)


def _add_key_options(added: Parsers) -> None:
    for name in ("new", "revoke"):
        added[name].add_argument("name", type=key_name, metavar="NAME")
    many: dict[str, Any] = {"action": "append", "required": True, "choices": SCOPES}
    added["new"].add_argument("--scope", help="what the key opens; may be repeated", **many)


def moment(text: str) -> datetime:
    """Return a moment (UTC)."""
    try:
        return parse_time_stamp(text)
    except DataQualityError as error:
        raise argparse.ArgumentTypeError(error.detail.removeprefix("time_stamp is ")) from None


def key_name(text: str) -> str:
    """Return the name of a key; argparse names this function in its error."""
    if not re.fullmatch(KEY_NAME, text):
        raise ValueError
    return text


def absolute(text: str) -> Path:
    """Return a path that means the same from every working directory."""
    return Path(text).absolute()


def positive(text: str) -> int:
    """Return a whole number of 1 or more; argparse names this function in its error."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def work_as_owner(config: Config) -> None:
    """See that the user to whom the payloads belong does what is done, and nobody else.

    Files that another user made there would be in the service's way later. Root takes the owner's
    identity, before anything is opened. Raises `WrongUser` where that cannot be.
    """
    folder = config.raw.dir
    owner, seen = owner_of(folder)
    is_root = os.geteuid() == 0
    if is_root and owner != 0:
        operator_name()  # it stays root, also in audit lines
        backend_of(config)  # its module may lie where the owner may not look
        try:
            become(owner, seen.stat().st_gid)
        except OSError as error:
            wrong = f"{seen} belongs to {user_name(owner)}, whose identity root cannot take"
            raise WrongUser(f"{wrong}: {error.strerror}") from None
    wrong_user = wrong_owner(folder)
    if wrong_user:
        why = "what another user makes there stops the service, so nothing was done"
        raise WrongUser(f"{wrong_user}; {why}", "" if is_root else user_name(owner))


def become(uid: int, gid: int) -> None:
    """Take the identity of a user, with all of its groups; `gid` counts where it has no name."""
    try:
        account = pwd.getpwuid(uid)
    except KeyError:
        name, home = "", "/"
        os.setgroups([gid])
    else:
        name, home, gid = account.pw_name, account.pw_dir, account.pw_gid
        os.initgroups(name, gid)
    os.setgid(gid)
    os.setuid(uid)
    os.environ["HOME"] = home  # libraries look for files in it, and root's is closed to this user
    for variable in ("USER", "LOGNAME"):
        os.environ.pop(variable, None)
        if name:
            os.environ[variable] = name


def line_for(user: str, arguments: Sequence[str]) -> str:
    """Return the line by which a user does what was asked of this program.

    The names of variables are in it, for sudo to hand them on, and none of their values.
    """
    variables = ",".join(sorted(name for name in os.environ if name.startswith("DROPZONE_")))
    sudo = ["sudo"] + ([f"--preserve-env={variables}"] if variables else [])
    if not user.isdecimal() and user != "root":  # root itself takes the identity of the owner
        sudo += ["-u", user]
    program = os.path.abspath(sys.argv[0])
    python = [] if os.access(program, os.X_OK) else [sys.executable]
    return shlex.join([*sudo, *python, program, *arguments])


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code (of sysexits.h; docs/operating.md has them all)."""
    args = arguments(argv)
    if __name__ == "__main__" and getattr(args, "cluster", None) is not None:
        # Workers of a cluster find by its name what is to be called; their __main__ is another one.
        return cast("int", importlib.import_module("dropzone").main(argv))
    try:
        return perform(args)
    except KeyboardInterrupt:  # the next run goes on where this one was interrupted
        return 128 + signal.SIGINT
    except BrokenPipeError:  # nobody reads standard output any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return os.EX_IOERR
    except (Timeout, PermissionError, BackendError, DropzoneError, PayloadStoreError) as error:
        text, code = told(error)
        if isinstance(error, WrongUser) and error.user:
            line = line_for(error.user, sys.argv[1:] if argv is None else argv)
            text = f"{text}. Use this line:\n{line}"
        sys.stderr.write(f"dropzone: {text}\n")  # at once: an audit line may come in between
        return code
    except Exception:  # Python's own exit code is that of rows which are not right
        log.exception("a defect of Dropzone has ended the command")
        return os.EX_SOFTWARE


def perform(args: argparse.Namespace) -> int:
    """Run the command that was asked for; return its exit code."""
    given: dict[Setting, object] = {
        ("server", n): getattr(args, n) for n in ("host", "port") if n in args
    }
    config = load_config(getattr(args, "config", None), overrides=given)
    hand_on(config)
    if args.run is not ask_ready:  # which opens nothing
        work_as_owner(config)
    if not os.access(os.curdir, os.X_OK):  # root's home, say: other processes could not start there
        args.files = [name if name == "-" else os.path.abspath(name) for name in args.files]
        os.chdir(os.sep)
    runs_on = args.run is serve or getattr(args, "watch", False)
    if args.run is process_pending:
        args.workers = workers_for(config, args.limit)
    # A command reports by itself.
    log_to_stderr(config.log, "" if runs_on else "warning", queued=runs_on)
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        command = args.run(config, args)
        code: int = runner.run(until_stopped(command) if runs_on else command)
    sys.stdout.flush()
    return code


def workers_for(config: Config, limit: int | None) -> Workers:
    """Return workers for what is pending; for much of it they are forked now, before any thread."""
    workers, pending = Workers(), 0
    with contextlib.suppress(OSError):  # of which the command itself tells
        pending = store_of(config).portable().count_pending()
    if sys.platform == "linux" and min(pending, limit or pending) >= MUCH:
        workers.fork()
    return workers


def told(error: Exception) -> tuple[str, int]:
    """Return an error in words, and the exit code for it."""
    if isinstance(error, Timeout):
        return f"{error.lock_file} is held by another run; try again", os.EX_TEMPFAIL
    if isinstance(error, PermissionError):
        return denied(error), os.EX_TEMPFAIL
    if isinstance(error, WrongUser):
        return str(error), os.EX_NOPERM
    return str(error), os.EX_CONFIG if isinstance(error, ConfigError) else os.EX_TEMPFAIL


if __name__ == "__main__":
    sys.exit(main())
