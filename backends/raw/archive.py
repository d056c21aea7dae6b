"""The archive: packs in an object store, which outlive the disk of this machine.

The store is S3 or speaks its language, Google Cloud Storage, Azure, or a folder (of a network file
system, say). A pack lies there as one object or several, each a pack of its own, beside its index:

    <day>/<node>.<n>.ndjson.gz      the pack, or its n-th part; <node> has 4 hex digits
    <day>/<node>.<n>.ndjson.gz.index

An object is created where its name is free (If-None-Match, RFC 9110), in one request, and is never
changed: so neither another node nor another run overwrites one, and there is no half of one. What
a store asks for, credentials above all, stands in the variables that its other tools read, too
(AWS_…, GOOGLE_…, AZURE_…); nothing of it is in an error, a log or a repr.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import unquote, urlsplit

from backends.raw import ArchiveAway, Observer, StorageUnavailable
from backends.raw.disk import sync_file

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

log = logging.getLogger("dropzone")

SCHEMES = ("s3", "gs", "az", "file")
OBJECT = re.compile(r"(\d{4}-\d\d-\d\d)/([0-9a-f]{4})\.([1-9]\d*)\.ndjson\.gz")
INDEX = ".index"
PIECE = 4 * 1024 * 1024  # bytes that are read by one request
CONNECT_SECONDS, READ_SECONDS, RETRY_SECONDS = 3, 10, 5  # of a request; no retry begins later
SLOWEST_UPLOAD = 64 * 1024  # bytes a second
MOST_IN_UPLOAD = 128 * 1024 * 1024  # bytes, by which the patience for one is reckoned
REST = 10.0  # seconds that a store which has not answered is left alone by those who wait
YES = ("1", "true", "yes", "on")

STATUS = re.compile(r"status code: (\d{3}[A-Za-z ]*)")
CODE = re.compile(r"<Code>(\w+)</Code>")
SYSTEM = re.compile(r'message: "([^"]+)"')
TOO_FAR = ("InvalidRange", "416 Range", "StartTooLarge")  # an object ends before what was asked
REASONS = {  # what stands in the error of the library, and what is said of it
    "NoSuchBucket": "there is no such bucket",
    "BadScheme": "it is reached by https alone; for http, set AWS_ALLOW_HTTP=true",
    "169.254.169.254": "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "or GOOGLE_SERVICE_ACCOUNT, or AZURE_STORAGE_ACCOUNT_KEY",
    "MissingAccount": "AZURE_STORAGE_ACCOUNT_NAME has to name the account",
    "dns error": "the name of its host is not known",
    "ertificate": "its certificate is not trusted: AWS_CA_BUNDLE names a file with its authority",
    "Connection refused": "connection refused",
    "onnection reset": "connection reset",
    "TimedOut": "no answer in time",
    "timed out": "no answer in time",
}


class ObjectMissing(Exception):
    """There is no such object."""


@dataclass
class _Rest:
    until: float = 0.0  # of the monotonic clock
    reason: str = ""


@dataclass(frozen=True)
class Archive:
    """An object store, by its url, as the node of a number writes to it. It can be pickled.

    Every method blocks, for seconds where the store does not answer, and raises `ArchiveAway` where
    that is in the way; `ObjectMissing` where there is no object of a name. `observer` hears of each
    request; it does not travel to other processes.
    """

    url: str
    node: int = 0
    observer: Observer | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        trouble = url_trouble(self.url)
        if trouble:
            raise ValueError(trouble)

    def __reduce__(self) -> tuple[type[Archive], tuple[str, int]]:
        return Archive, (self.url, self.node)

    @functools.cached_property
    def _rest(self) -> _Rest:
        return _Rest()

    @functools.cached_property
    def _reader(self) -> ObjectStore:
        return _client(self.url, READ_SECONDS)

    @functools.cached_property
    def _writer(self) -> ObjectStore:
        return _client(self.url, READ_SECONDS + MOST_IN_UPLOAD // SLOWEST_UPLOAD)

    @property
    def _folder(self) -> Path | None:
        """The folder that a file:// url names."""
        parts = urlsplit(self.url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    def place(self, key: str) -> str:
        """Return the url of an object."""
        return f"{self.url.rstrip('/')}/{key}"

    def name(self, day: str, number: int) -> str:
        """Return the name of this node's n-th object of a day."""
        return f"{day}/{self.node:04x}.{number}.ndjson.gz"

    def is_own(self, key: str) -> bool:
        """Say whether an object is one of this node's packs."""
        match = OBJECT.fullmatch(key)
        return match is not None and int(match[2], 16) == self.node

    def names(self, day: str = "") -> Iterator[tuple[str, int]]:
        """Yield the names of this node's objects, and their sizes in bytes; of a day, or all."""
        import obstore  # noqa: PLC0415 (an extra)

        with self._asked():
            pages = iter(obstore.list(self._reader, day or None, chunk_size=1000))
        while True:
            with self._asked("list"):
                page = next(pages, None)
            if page is None:
                return
            for each in page:
                if self.is_own(each["path"].removesuffix(INDEX)):
                    yield each["path"], each["size"]

    def read(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes of an object from `start` to `end`, as far as they are there."""
        import obstore  # noqa: PLC0415
        from obstore import exceptions  # noqa: PLC0415

        with self._asked("get", key):
            try:
                return bytes(obstore.get_range(self._reader, key, start=start, end=end))
            except exceptions.GenericError as error:
                if any(sign in str(error) for sign in TOO_FAR):
                    return b""
                raise

    def pieces(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """Yield the same piece by piece."""
        for at in range(start, end, PIECE):
            yield self.read(key, at, min(at + PIECE, end))

    def read_whole(self, key: str) -> bytes:
        """Return a small object."""
        import obstore  # noqa: PLC0415

        with self._asked("get", key):
            return bytes(obstore.get(self._reader, key).bytes())

    def holds(self, key: str, body: bytes) -> bool:
        """Read an object back, all of it, and say whether it is these bytes and nothing else."""
        end = 0
        for piece in self.pieces(key, 0, len(body) + 1):
            if body[end : end + len(piece)] != piece:
                return False
            end += len(piece)
        return end == len(body)

    def create(self, key: str, body: bytes) -> bool:
        """Make an object; return False where its name is taken, whatever is there."""
        import obstore  # noqa: PLC0415
        from obstore import exceptions  # noqa: PLC0415

        with self._asked("put", key):
            try:
                obstore.put(self._writer, key, body, mode="create", use_multipart=False)
            except exceptions.AlreadyExistsError:
                return False
        self._sync(key)
        return True

    def replace(self, key: str, body: bytes) -> None:
        """Put an index there, whatever was in its place: it can be made from its pack again."""
        import obstore  # noqa: PLC0415

        with self._asked("put", key):
            obstore.put(self._writer, key, body, use_multipart=False)
        self._sync(key)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects, as far as they are there."""
        import obstore  # noqa: PLC0415

        for key in keys:
            with contextlib.suppress(ObjectMissing), self._asked("delete", key):
                obstore.delete(self._reader, key)

    def trouble(self) -> str | None:
        """Ask the store for something, and return what is wrong with it, or None."""
        try:
            next(self.names(), None)
        except StorageUnavailable as error:
            return str(error)
        return None

    def _sync(self, key: str) -> None:
        """Have a folder write an object to its disk; any other store has done so."""
        if self._folder:
            path = self._folder / key
            try:
                sync_file(path)
                for folder in (path.parent, path.parent.parent):
                    sync_file(folder)
            except OSError as error:
                self._fail(str(error.strerror))

    @contextlib.contextmanager
    def _asked(self, operation: str = "", key: str = "") -> Iterator[None]:
        """Raise what goes wrong with a request as one of this house's errors, and tell of it."""
        if time.monotonic() < self._rest.until:
            self._fail(self._rest.reason)
        begun, is_wrong = time.perf_counter(), True
        try:
            yield
            is_wrong = False
        except FileNotFoundError as error:
            text = str(error)
            if "NoSuchBucket" in text:
                self._fail(REASONS["NoSuchBucket"])
            if self._folder and not self._folder.is_dir():
                self._fail("there is no such folder: mount its disk, or make it")
            is_wrong = False
            raise ObjectMissing(key) from None
        except StorageUnavailable:
            raise
        except Exception as error:  # noqa: BLE001 (its text may hold what is secret)
            reason = _reason(error)
            if reason in REASONS.values():
                self._rest.until, self._rest.reason = time.monotonic() + REST, reason
            self._fail(reason)
        finally:
            if self.observer and operation:
                self.observer.asked_archive(operation, time.perf_counter() - begun, is_wrong)

    def _fail(self, reason: str) -> NoReturn:
        raise ArchiveAway(f"the archive {self.url} is away: {reason}") from None


def url_trouble(url: str) -> str | None:
    """Say what is wrong with the url of an archive, without showing a secret that stands in it."""
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES:
        forms = ", ".join(f"{scheme}://" for scheme in SCHEMES)
        return f"it has to begin with one of {forms} and name a bucket or, with file://, a folder"
    if "@" in parts.netloc or parts.query or parts.fragment:
        return "credentials and options stand in variables (AWS_ACCESS_KEY_ID …), not in the url"
    if parts.scheme == "file":
        is_absolute = not parts.netloc and len(parts.path) > 1
        return None if is_absolute else "a folder is named by its whole path: file:///mnt/archive"
    return None if parts.netloc else f"{parts.scheme}:// has to name a bucket"


def needs_obstore() -> str | None:
    """Say what to install where the library is not there that an archive needs."""
    if importlib.util.find_spec("obstore"):
        return None
    return "raw.archive needs the package obstore: pip install 'dropzone[archive]'"


def _client(url: str, seconds: float) -> ObjectStore:
    """Return a client of a store, by the variables that are set."""
    from obstore.store import from_url  # noqa: PLC0415 (an extra)

    if url.startswith("file:"):
        return from_url(url)
    options: ClientConfig = {
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
        "timeout": timedelta(seconds=seconds),
        "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in YES,
    }
    authority = os.environ.get("AWS_CA_BUNDLE")
    if authority:
        options["root_certificate"] = Path(authority).read_bytes()
    second = timedelta(seconds=1)
    retries: RetryConfig = {
        "max_retries": 3,
        "retry_timeout": RETRY_SECONDS * second,
        "backoff": {"init_backoff": second / 5, "max_backoff": 2 * second, "base": 2},
    }
    return from_url(url, config=None, client_options=options, retry_config=retries)


def _reason(error: Exception) -> str:
    """Say why a request has failed, in words that can hold nothing secret."""
    text = str(error)
    for sign, reason in REASONS.items():
        if sign in text:
            return reason
    status, code, system = STATUS.search(text), CODE.search(text), SYSTEM.search(text)
    if status and status[1].startswith(("401", "403")):
        return f"it does not let these credentials do that ({code[1] if code else status[1]})"
    if status:
        return f"it answers {code[1] if code else status[1].strip()}"
    if system:
        return system[1]
    if "UnableToCanonicalize" in text:
        return "there is no such folder: mount its disk, or make it"
    return f"it cannot be asked ({type(error).__name__})"


# ── A pack in the archive ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Archived:
    """The bytes of a pack as they lie in the archive: `(name, begin, end)` of objects in a row."""

    archive: Archive
    objects: tuple[tuple[str, int, int], ...]

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes of the pack from `start` to `end`, by as few requests as there can be."""
        for key, begin, behind in self.objects:
            if start < behind and end > begin:
                yield from self.archive.pieces(
                    key, max(start, begin) - begin, min(end, behind) - begin
                )

    def damage_at(self, start: int) -> str:
        """Say where a damaged byte of the pack lies."""
        key, begin, _ = next(each for each in reversed(self.objects) if each[1] <= start)
        return f"{self.archive.place(key)} is damaged at byte {start - begin}"

    def places(self) -> list[str]:
        """Return the urls of the objects."""
        return [self.archive.place(key) for key, _, _ in self.objects]

    def keys(self) -> list[str]:
        """Return the names of the objects and of their indexes."""
        return [name for key, _, _ in self.objects for name in (f"{key}{INDEX}", key)]
