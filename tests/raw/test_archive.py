"""The archive: packs in an object store, a real one and a folder, which may be away or damaged."""

import gzip
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from uuid import UUID

import obstore
import psutil
import pytest
import test_processing
from object_store import ObjectStore
from test_cli import (
    DROPZONE,
    OK,
    PATIENCE,
    TRY_AGAIN,
    Program,
    Server,
    assert_explained,
    closed_port,
)
from test_docs import REPO, blocks, section
from test_packs import ODD, all_of, compact, days_ago, found, journaled, processed_in
from test_processing import arrival, body

from backends.raw import ArchiveAway, PackDamaged, PayloadStoreError, StorageUnavailable
from backends.raw import archive as rooms
from backends.raw.archive import Archive, _client
from backends.raw.archiving import PART_BYTES
from backends.raw.folders import Folders
from backends.raw.landing import RawStore
from dropzone import ConfigError, load_config

program = test_processing.program  # a fixture
LEAP_DAY, DAY = "2024-02-29", "2024-03-01"  # of the first two arrivals, and of the others
GZIPPED = ".ndjson.gz"
PREFIXES = count()
CONFIGURATION = 78
ARCHIVE = REPO / "docs" / "archive.md"


class Place:
    """An archive as a test looks at it, by what any other client of the store can do."""

    def __init__(self, url: str, variables: dict[str, str]) -> None:
        self.url = url
        self.variables = variables
        self.settings = {"DROPZONE_RAW_ARCHIVE": url, **variables}

    def archive(self, node: int = 0) -> Archive:
        return Archive(self.url, node)

    def objects(self) -> dict[str, bytes]:
        """Return all objects by their names."""
        client = _client(self.url, 10)
        names = sorted(each["path"] for page in obstore.list(client) for each in page)
        return {name: bytes(obstore.get(client, name).bytes()) for name in names}

    def packs(self) -> list[str]:
        return [name for name in self.objects() if name.endswith(GZIPPED)]

    def put(self, name: str, text: bytes) -> None:
        obstore.put(_client(self.url, 10), name, text)

    def delete(self, name: str) -> None:
        obstore.delete(_client(self.url, 10), name)


@pytest.fixture(params=["s3", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty archive: below a prefix of the S3 server, or in a folder."""
    if request.param == "file":
        (tmp_path / "archive").mkdir()
        return Place(f"file://{tmp_path}/archive", {})
    return in_s3(request, monkeypatch)


@pytest.fixture
def s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty archive below a prefix of the S3 server."""
    return in_s3(request, monkeypatch)


def in_s3(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Place:
    store: ObjectStore = request.getfixturevalue("object_store")
    for name, text in store.variables.items():
        monkeypatch.setenv(name, text)
    return Place(f"{store.url}/dropzone/{next(PREFIXES)}", store.variables)


def folders_at(
    data: Path, archive: Archive | None, keep_local_days: int = 0, keep_days: int = 0
) -> Folders:
    for name in ("raw", "rejected", "processed", "journal"):
        (data / name).mkdir(parents=True, exist_ok=True)
    return Folders(
        data / "raw", archive=archive, keep_local_days=keep_local_days, keep_days=keep_days
    )


def put_away(folders: Folders) -> list[str]:
    """Put everything into the archive; return the urls of its objects."""
    done = [folders.archive_pack(name) for name in folders.to_archive()]
    return [place for each in done for place in each.objects]


def local_packs(folders: Folders) -> list[str]:
    return sorted(path.name for path in folders.processed.glob(f"*{GZIPPED}"))


def in_portions(folders: Folders) -> dict[UUID, object]:
    portions = [portion for each in folders.portions() for portion in each.portions]
    return {raw_id: each for portion in portions for raw_id, each in portion.payloads()}


def processed_by(program: Program, bodies: Sequence[bytes]) -> dict[UUID, bytes]:
    """Lay payloads of DAY into the data folder of a program where they lie when processed."""
    folders_at(program.home / "data", None)
    return processed_in(program.home / "data", bodies, 2)


def many(total: int) -> list[bytes]:
    return [json.dumps({"n": n, "noise": os.urandom(1500).hex()}).encode() for n in range(total)]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut packs into small parts, so that tests need no large ones."""
    monkeypatch.setattr("backends.raw.archiving.PART_BYTES", 300_000)


# ── What is in the archive ────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("small_parts")
def test_every_payload_comes_back(tmp_path: Path, place: Place):
    """Of packs that are in the archive alone, every look gives the exact bytes that arrived."""
    large = [b" " * 3_000_000, os.urandom(1_500_000), json.dumps(["ä" * 900_000]).encode()]
    payloads = processed_in(tmp_path, [*ODD, *many(600), *large, b"{}"])
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    assert compact(folders) == len(payloads)
    assert len(put_away(folders)) > 4
    assert local_packs(folders) == []
    assert all_of(folders, payloads) == payloads
    assert in_portions(folders) == payloads
    assert folders.count_processed() == len(payloads)
    assert found(folders, UUID(int=arrival(3).int + 1)) is None
    assert folders.problems() == {"data folder": [], "clock": [], "archive": []}
    assert folders.to_archive() == []


@pytest.mark.usefixtures("small_parts")
def test_form_of_the_archive(tmp_path: Path, place: Place):
    """Objects are named by day, node and number; each is a pack that zcat reads, with its index."""
    payloads = processed_in(tmp_path, many(700))
    folders = folders_at(tmp_path, place.archive(0xBEEF))
    compact(folders)
    put_away(folders)
    objects = place.objects()
    parts = len([name for name in objects if name.startswith(DAY)]) // 2
    assert parts > 1
    names = [f"{LEAP_DAY}/beef.1", *(f"{DAY}/beef.{n + 1}" for n in range(parts))]
    assert set(objects) == {f"{n}{GZIPPED}{end}" for n in names for end in ("", ".index")}
    seen = {}
    for name in names:
        pack, index = (objects[f"{name}{GZIPPED}{end}"] for end in ("", ".index"))
        lines = [json.loads(line) for line in gzip.decompress(pack).splitlines()]
        known = json.loads(index)
        assert (known["bytes"], known["payloads"]) == (len(pack), len(lines))
        for first, start in known["members"]:
            line = gzip.decompress(pack[start:]).splitlines()[0]
            assert json.loads(line)["raw_id"] == first
        seen |= {UUID(line["raw_id"]): line["payload"].encode() for line in lines}
    assert seen == payloads


class Heard:
    """An observer of requests."""

    def __init__(self) -> None:
        self.requests = Counter[str]()
        self.wrong = Counter[str]()

    def landed(self, *_: object) -> None:
        """Hear of nothing else."""

    def asked_archive(self, operation: str, seconds: float, is_wrong: bool) -> None:
        assert seconds >= 0
        self.requests[operation] += 1
        self.wrong[operation] += is_wrong


def test_a_look_up_is_two_requests(tmp_path: Path, s3: Place):
    """A payload is fetched by two small requests, and its neighbours by none."""
    payloads = processed_in(tmp_path, many(700), 2)
    first = folders_at(tmp_path, s3.archive(), keep_local_days=1)
    compact(first)
    put_away(first)
    heard = Heard()
    folders = folders_at(tmp_path, Archive(s3.url, observer=heard), keep_local_days=1)
    raw_id = arrival(350)
    assert folders.read(raw_id)[1] == payloads[raw_id]
    assert heard.requests == {"get": 2}
    assert folders.read(arrival(351))[1] == payloads[arrival(351)]
    assert heard.requests == {"get": 2}


def test_all_are_fetched_by_few_requests(tmp_path: Path, s3: Place):
    """Whoever wants all payloads fetches several members of a pack by one request."""
    payloads = processed_in(tmp_path, many(700), 2)
    heard = Heard()
    folders = folders_at(tmp_path, Archive(s3.url, observer=heard), keep_local_days=1)
    compact(folders)
    put_away(folders)
    heard.requests.clear()
    assert in_portions(folders) == payloads
    members = len(folders.packs()[0].index().members)
    assert heard.requests["get"] < members / 2


# ── Nothing is overwritten ────────────────────────────────────────────────────────────────────────


def test_a_name_that_is_taken(tmp_path: Path, place: Place):
    """What somebody else has put under a name stays, and the pack gets the next one."""
    payloads = processed_in(tmp_path, [body()], 2)
    other = f"{DAY}/0000.1{GZIPPED}"
    place.put(other, b"another one")
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    compact(folders)
    assert put_away(folders) == [f"{place.url}/{DAY}/0000.2{GZIPPED}"]
    assert place.objects()[other] == b"another one"
    assert all_of(folders, payloads) == payloads


def test_two_nodes_at_once(tmp_path: Path, place: Place):
    """Nodes, and disks that take themselves for the same node, never overwrite each other."""
    disks = {}
    for number, node in enumerate((0, 1, 1, 1)):
        data = tmp_path / str(number)
        payloads = processed_in(data, many(20), 2)
        folders = folders_at(data, place.archive(node), keep_local_days=1)
        compact(folders)
        disks[number] = (folders, payloads)
    with ThreadPoolExecutor(len(disks)) as threads:
        list(threads.map(lambda disk: put_away(disk[0]), disks.values()))
    assert len(place.packs()) == len(disks)
    for folders, payloads in disks.values():
        assert all_of(folders, payloads) == payloads


def test_two_runs_at_once(tmp_path: Path, place: Place):
    """Two runs over the same pack end with one object and the same note."""
    payloads = processed_in(tmp_path, many(20), 2)
    folders = folders_at(tmp_path, place.archive())
    compact(folders)
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: put_away(folders), range(4)))
    assert {url for urls in done for url in urls} == {f"{place.url}/{DAY}/0000.1{GZIPPED}"}
    assert place.packs() == [f"{DAY}/0000.1{GZIPPED}"]
    assert all_of(folders, payloads) == payloads


# ── A run that was stopped ────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("small_parts")
def test_goes_on_where_it_was_stopped(tmp_path: Path, place: Place):
    """Parts that are there already are recognised by their bytes, and none is put there twice."""
    processed_in(tmp_path, many(700), 2)
    folders = folders_at(tmp_path, place.archive())
    compact(folders)
    urls, before = put_away(folders), place.objects()
    [pack] = folders.packs()
    pack.note_path.unlink()  # a crash before it
    place.delete(urls[-1].removeprefix(f"{place.url}/"))  # and before the last part
    place.delete(f"{urls[0].removeprefix(f'{place.url}/')}.index")
    [name] = folders.to_archive()
    done = folders.archive_pack(name)
    assert (done.objects, done.made, done.damage) == (urls, 1, [])
    assert place.objects() == before


@pytest.mark.parametrize("seconds", [0.0, 0.05, 0.1, 0.2, 0.4])
def test_killed_while_it_uploads(program: Program, tmp_path: Path, place: Place, seconds: float):
    """A `compact` that is killed loses nothing, and the next one ends as if it had not been."""
    payloads = processed_in(tmp_path / "data", many(400), 2)
    settings = {**place.settings, "DROPZONE_RAW_KEEP_LOCAL_DAYS": 1}
    folders = folders_at(tmp_path / "data", place.archive(), keep_local_days=1)
    compact(folders)
    process = program.start("compact", **settings)
    until = time.monotonic() + PATIENCE
    lock = folders.journal / "archive.lock"
    while not lock.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.wait()
    assert all_of(folders, payloads) == payloads
    assert program.run("compact", **settings).returncode == OK
    assert local_packs(folders) == []
    assert len(place.packs()) == 1
    assert all_of(folders, payloads) == payloads


# ── What is damaged ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["changed", "shorter", "longer", "deleted"])
def test_damage_before_the_local_copy_goes(tmp_path: Path, place: Place, how: str):
    """An object that is no longer what was put there is named, and the pack is put there again."""
    payloads = processed_in(tmp_path, many(50), 2)
    folders = folders_at(tmp_path, place.archive())
    compact(folders)
    [url] = put_away(folders)
    name, text = f"{DAY}/0000.1{GZIPPED}", place.objects()[f"{DAY}/0000.1{GZIPPED}"]
    if how == "deleted":
        place.delete(name)
    else:
        damaged = {"changed": text[:-9] + b"x" + text[-8:], "shorter": text[:-1]}
        place.put(name, damaged.get(how, text + b"x"))
    folders.keep_local_days = 1
    [pack] = folders.to_archive()
    done = folders.archive_pack(pack)
    wrong = "is missing" if how == "deleted" else "is not what was put there"
    assert done.damage == [f"{url} {wrong}"]
    assert done.objects == [url if how == "deleted" else f"{place.url}/{DAY}/0000.2{GZIPPED}"]
    assert local_packs(folders) == []
    assert all_of(folders, payloads) == payloads


def test_a_pack_that_is_damaged_here(tmp_path: Path, place: Place):
    """A pack that is no longer what was written is not archived, and stays."""
    processed_in(tmp_path, many(50), 2)
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    compact(folders)
    [pack] = folders.packs()
    text = pack.path.read_bytes()
    pack.path.write_bytes(text[:100] + b"x" + text[101:])
    with pytest.raises(PackDamaged, match="damaged, and not archived: restore it"):
        put_away(folders)
    assert local_packs(folders) == [pack.path.name]
    assert place.objects() == {}


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("is_deleted", [True, False])
def test_damage_in_the_archive_is_named(tmp_path: Path, place: Place, is_deleted: bool):
    """A missing or damaged object is named with what still exists, and the others are served."""
    payloads = processed_in(tmp_path, many(700), 2)
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    compact(folders)
    urls = put_away(folders)
    name = urls[1].removeprefix(f"{place.url}/")
    lost = [
        json.loads(line)["raw_id"] for line in gzip.decompress(place.objects()[name]).splitlines()
    ]
    if is_deleted:
        place.delete(name)
    else:
        place.put(name, place.objects()[name][:50])
    last = UUID(lost[-1])
    with pytest.raises(PackDamaged) as caught:
        folders.read(last)
    assert urls[1] in str(caught.value)
    assert ("is missing" in str(caught.value)) == is_deleted
    if is_deleted:
        assert all(url in str(caught.value) for url in urls)
    [trouble] = folders.problems()["archive"]
    what = "is missing" if is_deleted else "has 50 bytes, had"
    assert trouble.startswith(f"{urls[1]} {what}")
    whole = f"{len(urls) - 1} of its {len(urls)} objects are whole"
    assert trouble.endswith(f"restore it from a copy; {whole}")
    still = {raw_id: each for raw_id, each in payloads.items() if str(raw_id) not in lost}
    assert all_of(folders, still) == still


def test_one_damaged_member(tmp_path: Path, place: Place):
    """Of members that are fetched together, one that is damaged costs the others nothing."""
    payloads = processed_in(tmp_path, many(700), 2)
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    compact(folders)
    put_away(folders)
    [pack] = folders.packs()
    (_, start), (after, _) = pack.index().members[1:3]
    name = f"{DAY}/0000.1{GZIPPED}"
    text = bytearray(place.objects()[name])
    text[start + 1000] ^= 1
    place.put(name, bytes(text))
    seen = in_portions(folders)
    [error] = [each for each in seen.values() if isinstance(each, PayloadStoreError)]
    assert f"{place.url}/{name} is damaged at byte {start}" in str(error)
    first = pack.index().members[1][0]
    others = {r: each for r, each in payloads.items() if not first <= r < after}
    assert {r: each for r, each in seen.items() if each is not error} == others


def test_a_damaged_note(tmp_path: Path, place: Place):
    """Where the note of a pack is damaged, it is told, and `adopt` makes it again."""
    payloads = processed_in(tmp_path, many(5), 2)
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    compact(folders)
    put_away(folders)
    [pack] = folders.packs()
    pack.note_path.write_bytes(pack.note_path.read_bytes().replace(b"0000.1", b"0000.3"))
    [trouble] = folders.problems()["data folder"]
    assert trouble.startswith(f"{pack.note_path} is damaged")
    with pytest.raises(PackDamaged, match="adopt"):
        folders.read(next(iter(payloads)))
    for path in (pack.note_path, Path(f"{pack.path}.index")):
        path.unlink()
    assert list(folders.adopt()) == [pack.path.name]
    assert all_of(folders, payloads) == payloads


# ── The store is away ─────────────────────────────────────────────────────────────────────────────


@contextmanager
def hanging_port() -> Iterator[int]:
    """Take connections on a loopback port, and never answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(params=["closed", "hangs", "no folder"])
def away(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    """An archive that is away."""
    if request.param == "no folder":
        yield Place(f"file://{tmp_path}/not_mounted", {})
        return
    with closed_port() if request.param == "closed" else hanging_port() as port:
        variables = {
            "AWS_ACCESS_KEY_ID": "an-id",
            "AWS_SECRET_ACCESS_KEY": "a-secret",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        }
        for name, text in variables.items():
            monkeypatch.setenv(name, text)
        yield Place("s3://packs/away", variables)


def test_away(tmp_path: Path, away: Place, monkeypatch: pytest.MonkeyPatch):
    """While the store is away nothing is deleted, and what is asked of it fails within seconds."""
    monkeypatch.setattr(rooms, "READ_SECONDS", 1)
    payloads = processed_in(tmp_path, many(5), 2)
    folders = folders_at(tmp_path, away.archive(), keep_local_days=1, keep_days=1)
    compact(folders)
    [pack] = folders.to_archive()
    with pytest.raises(ArchiveAway, match="is away: "):
        folders.archive_pack(pack)
    with pytest.raises(ArchiveAway, match="is away: "):
        folders.expire()
    assert local_packs(folders) == [pack]
    assert all_of(folders, payloads) == payloads
    [trouble] = folders.problems()["archive"]
    assert trouble.startswith(f"the archive {away.url} is away: ")


async def test_a_start_asks_it_for_nothing(tmp_path: Path, place: Place):
    """Opening a store asks the archive for nothing, also where the journal was lost or left."""
    payloads = processed_in(tmp_path, [body(n) for n in range(5)], 2)
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    compact(folders)
    put_away(folders)
    journaled(tmp_path, payloads)
    heard = Heard()
    store = RawStore(tmp_path / "raw", archive=Archive(place.url, observer=heard))
    await store.open()
    assert store.activity().processed == len(payloads)
    [raw_id] = await store.land(body())
    assert raw_id > max(payloads)
    assert heard.requests == {}
    await store.close()


def test_a_start_does_not_wait_for_it(
    program: Program, tmp_path: Path, s3: Place, object_store: ObjectStore
):
    """A store whose packs are in an archive that hangs opens at once, lands and processes.

    What the journal has of these packs is brought back, and is recognised when it is packed.
    """
    payloads = processed_in(tmp_path, [body(n) for n in range(5)], 2)
    folders = folders_at(tmp_path, s3.archive(), keep_local_days=1)
    compact(folders)
    put_away(folders)
    journaled(tmp_path, payloads)
    object_store.pause()
    try:
        server = Server(program, DROPZONE_RAW_DIR=tmp_path / "raw", **s3.settings)
        assert server.json("POST", "/ingest", body())["status"] == "accepted"
        assert server.json("POST", "/process")["processed"] == 1 + len(payloads)
        assert server.stop() == OK
    finally:
        object_store.resume()
    assert program.run("compact", DROPZONE_RAW_DIR=tmp_path / "raw", **s3.settings).stdout == (
        f"{DAY}: 0 payloads packed\n"
    )
    assert folders.count_processed() == len(payloads) + 1


def test_one_try_is_enough(program: Program, s3: Place):
    """A `compact` that has found the store away asks it for no other pack."""
    processed_by(program, [body()])
    processed_in(program.home / "data", [body()])  # of the day before
    with closed_port() as port:
        wrong = s3.settings | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        done = program.run("compact", **wrong)
    assert done.returncode == TRY_AGAIN
    [told] = [line for line in done.stderr.splitlines() if "not archived" in line]
    assert told.startswith(f"{LEAP_DAY}{GZIPPED}: not archived, it stays: ")


def test_it_comes_back(program: Program, tmp_path: Path, s3: Place, object_store: ObjectStore):
    """After the store was away, the next `compact` does what is left, and says when it cannot."""
    payloads = processed_in(tmp_path / "data", many(5), 2)
    settings = {**s3.settings, "DROPZONE_RAW_KEEP_LOCAL_DAYS": 1}
    server = Server(program, "--port", 0, **settings)
    assert server.json("GET", "/status")["archive"] == "ok"
    with closed_port() as port:
        wrong = {**settings, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}"}
        done = program.run("compact", **wrong)
        assert done.returncode == TRY_AGAIN
        assert_explained(done.stderr)
        reason = f"the archive {s3.url} is away: connection refused"
        assert done.stderr == f"{DAY}{GZIPPED}: not archived, it stays: {reason}\n"
        assert server.json("GET", "/status")["archive"].endswith(f": {reason}")
        assert server.json("GET", "/ready")["checks"]["archive"].endswith(f": {reason}")
        assert "dropzone_packs_to_archive 1.0" in server.request("GET", "/metrics")[2].decode()
    folders = folders_at(tmp_path / "data", s3.archive())
    assert local_packs(folders) == [f"{DAY}{GZIPPED}"]
    done = program.run("compact", **settings)
    assert (done.returncode, done.stderr) == (OK, "")
    url = f"{s3.url}/{DAY}/0000.1{GZIPPED}"
    assert done.stdout == f"{DAY}{GZIPPED}: in the archive as {url}, and deleted on this disk\n"
    assert server.json("GET", "/status")["archive"] == "ok"
    metrics = server.request("GET", "/metrics")[2].decode()
    assert "dropzone_packs_to_archive 0.0" in metrics
    assert 'dropzone_archive_errors_total{operation="list"} 1.0' in metrics
    for raw_id, text in payloads.items():
        assert server.request("GET", f"/raw/{raw_id}/payload")[2] == text
        assert server.json("GET", f"/raw/{raw_id}")["state"] == "processed"
    assert server.stop() == OK
    server = Server(program, "--port", 0, **settings)  # which has none of them in memory
    object_store.pause()
    try:  # what is here is served while the archive hangs
        begun = time.monotonic()
        with ThreadPoolExecutor(4) as threads:
            far = [threads.submit(server.request, "GET", f"/raw/{r}/payload") for r in payloads]
            raw_id = server.json("POST", "/ingest", b"{}")["raw_id"]
            assert server.json("GET", f"/raw/{raw_id}")["state"] == "pending"
            assert server.request("GET", f"/raw/{raw_id}/payload")[2] == b"{}"
            assert server.json("POST", "/process")["checked"] == 1
            assert time.monotonic() - begun < rooms.READ_SECONDS
            answers = [each.result() for each in far]
        assert {status for status, _, _ in answers} == {503}
        assert all(b"is away" in text for _, _, text in answers)
    finally:
        object_store.resume()
    assert server.stop() == OK


# ── What is deleted, and what is not ──────────────────────────────────────────────────────────────


def test_keep_local_days(tmp_path: Path, place: Place):
    """`keep_local_days` deletes older packs on this disk alone, once they are in the archive."""
    days = dict(map(days_ago, range(1, 6)))
    for raw_id in days.values():
        file = Folders(tmp_path / "raw").path(raw_id, "processed")
        file.parent.mkdir(parents=True)
        file.write_bytes(body())
    folders = folders_at(tmp_path, place.archive(), keep_local_days=2)
    compact(folders)
    put_away(folders)
    assert len(place.packs()) == 5
    assert local_packs(folders) == sorted(f"{day}{GZIPPED}" for day in list(days)[:2])
    payloads = dict.fromkeys(days.values(), body())
    assert all_of(folders, payloads) == payloads


@pytest.mark.parametrize("how", ["noted", "in the archive alone", "before its note"])
def test_keep_days(tmp_path: Path, place: Place, how: str):
    """`keep_days` deletes from the archive, too, also what no note tells of, and nothing else."""
    (_, old), (kept_day, kept) = days_ago(5), days_ago(2)
    for raw_id in (old, kept):
        file = Folders(tmp_path / "raw").path(raw_id, "processed")
        file.parent.mkdir(parents=True)
        file.write_bytes(body())
    folders = folders_at(tmp_path, place.archive(), keep_days=3)
    folders.keep_local_days = int(how == "in the archive alone")
    compact(folders)
    put_away(folders)
    if how == "before its note":
        folders.packs()[0].note_path.unlink()
    assert folders.expire() == [f"{days_ago(5)[0]}{GZIPPED}"]
    assert found(folders, old) is None
    name = f"{kept_day}/0000.1{GZIPPED}"
    assert set(place.objects()) == {name, f"{name}.index"}
    assert found(folders, kept) == body()


def test_late_payloads(tmp_path: Path, place: Place):
    """What comes late for a day that is in the archive alone becomes a second pack, each once."""
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    payloads = processed_in(tmp_path, [body(n) for n in range(3)], 2)
    compact(folders)
    put_away(folders)
    processed_in(tmp_path, [body(2)], 4)  # again, as a start without the archive brings it back
    payloads |= processed_in(tmp_path, [body(3)], 5)
    assert compact(folders) == 1
    put_away(folders)
    assert place.packs() == [f"{DAY}/0000.{n}{GZIPPED}" for n in (1, 2)]
    assert all_of(folders, payloads) == payloads
    assert folders.count_processed() == len(payloads)


# ── Proof, restore and backup ─────────────────────────────────────────────────────────────────────


def landed(program: Program, total: int = 40) -> dict[UUID, bytes]:
    """Lay payloads where they lie when they were processed, and make their rows."""
    payloads = processed_by(program, [body(n, n) for n in range(total)])
    assert program.run("rebuild").returncode == OK
    return payloads


def test_proof_reads_the_archive(program: Program, place: Place):
    """`verify` and `rebuild` work on packs that are in the archive alone."""
    payloads = landed(program)
    settings = {**place.settings, "DROPZONE_RAW_KEEP_LOCAL_DAYS": 1}
    assert program.run("compact", **settings).returncode == OK
    assert local_packs(folders_at(program.home / "data", None)) == []
    done = program.run("verify", **settings)
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout.endswith("all rows are right\n")
    (program.home / "data" / "dropzone.sqlite").unlink()
    assert program.run("rebuild", **settings).returncode == OK
    done = program.run("verify", **settings)
    assert f"{len(payloads)} right, 0 wrong" in done.stdout


def test_proof_says_nothing_while_it_is_away(program: Program, s3: Place):
    """While the archive is away `verify` ends with "try again", and calls no row unreadable."""
    landed(program)
    settings = {**s3.settings, "DROPZONE_RAW_KEEP_LOCAL_DAYS": 1}
    assert program.run("compact", **settings).returncode == OK
    with closed_port() as port:
        settings["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
        done = program.run("verify", **settings)
    assert done.returncode == TRY_AGAIN
    assert done.stderr == f"dropzone: the archive {s3.url} is away: connection refused\n"
    assert done.stdout == ""


def shell(program: Program, commands: str, **variables: object) -> str:
    """Run commands of the documentation as they stand there; return what they print."""
    commands = commands.replace("/rescued", str(program.home / "rescued"))
    commands = commands.replace("python dropzone.py", f"{sys.executable} {DROPZONE}")
    clean = {name: text for name, text in os.environ.items() if not name.startswith("DROPZONE_")}
    done = subprocess.run(
        ["sh", "-eu", "-c", commands],
        cwd=program.home,
        env=clean | {name: str(text) for name, text in variables.items()},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == OK, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("is_left", [True, False])
@pytest.mark.parametrize("has_rows", [True, False])
def test_restoring_a_lost_node(program: Program, s3: Place, is_left: bool, has_rows: bool):
    """After the loss of a disk the documented commands bring back all that is not lost."""
    settings = {
        **s3.settings,
        "DROPZONE_RAW_KEEP_LOCAL_DAYS": 1,
        "DROPZONE_STORAGE_SQLITE_PATH": program.home / "rows.sqlite",
    }
    archived = processed_by(program, [body(n) for n in range(30)])
    server = Server(program, "--port", 0, **settings)
    [processed, rejected] = (
        server.json("POST", "/ingest", text)["raw_id"] for text in (body(100), b"{}")
    )
    server.json("POST", "/process")
    pending = server.json("POST", "/ingest", body(101))["raw_id"]
    assert server.stop(signal.SIGKILL) == -signal.SIGKILL
    assert program.run("compact", **settings).returncode == OK
    assert program.run("rebuild", **settings).returncode == OK
    left = program.home / "rescued"
    left.mkdir()
    if is_left:
        for name in ("raw", "rejected", "journal"):
            shutil.copytree(program.home / "data" / name, left / name)
        shutil.copytree(
            program.home / "data" / "processed",
            left / "processed",
            ignore=lambda _, names: [name for name in names if GZIPPED in name],
        )
    shutil.rmtree(program.home / "data")
    if not has_rows:
        (program.home / "rows.sqlite").unlink()

    back, prove, make = blocks(section(ARCHIVE, "After the loss of a disk"), "sh")
    assert "1 packs" in shell(program, back, **settings)
    if has_rows and not is_left:
        done = program.run("verify", **settings)
        assert "1 orphaned" in done.stdout
        assert f"{len(archived)} right, 0 wrong" in done.stdout
    else:
        assert "all rows are right" in shell(program, prove if has_rows else make, **settings)
    server = Server(program, "--port", 0, **settings)
    for raw_id, text in archived.items():
        assert server.request("GET", f"/raw/{raw_id}/payload")[2] == text
    states = {processed: "processed", rejected: "rejected", pending: "processed"}
    for raw_id, state in states.items():
        if is_left:
            assert server.json("GET", f"/raw/{raw_id}")["state"] == state
        else:
            assert server.request("GET", f"/raw/{raw_id}")[0] == 404
    rows = len(archived) + 2 * is_left + (has_rows and not is_left)
    assert len(server.json("GET", "/measurements?limit=100")["measurements"]) == rows
    assert server.stop() == OK


def test_adopt_again(tmp_path: Path, place: Place):
    """`adopt` takes over this node's packs alone, each once, whatever the disk has kept."""
    other = folders_at(tmp_path / "other", place.archive(7))
    processed_in(tmp_path / "other", many(3), 2)
    compact(other)
    put_away(other)
    folders = folders_at(tmp_path / "own", place.archive(), keep_local_days=1)
    payloads = processed_in(tmp_path / "own", many(9))
    compact(folders)
    put_away(folders)
    indexes = sorted(folders.processed.glob("*.index"))
    for note in folders.processed.glob("*.archived"):
        note.unlink()
    indexes[0].unlink()  # of the second day it is left, and of the first nothing
    place.put(f"{LEAP_DAY}/0000.1{GZIPPED}.index", b"damaged")
    names = [f"{LEAP_DAY}{GZIPPED}", f"{DAY}{GZIPPED}"]
    assert list(folders.adopt()) == names
    assert list(folders.adopt()) == []
    assert all_of(folders, payloads) == payloads
    assert folders.count_processed() == len(payloads)


def test_adopt_leaves_what_lies_here(tmp_path: Path, place: Place):
    """A pack that lies here and was being archived when the disk was lost is not doubled."""
    folders = folders_at(tmp_path, place.archive())
    payloads = processed_in(tmp_path, many(9), 2)
    compact(folders)
    put_away(folders)
    [pack] = folders.packs()
    pack.note_path.unlink()
    assert list(folders.adopt()) == []
    put_away(folders)
    assert list(folders.adopt()) == []
    assert len(place.packs()) == 1
    assert all_of(folders, payloads) == payloads


def test_backup_with_an_archive(program: Program, place: Place):
    """A backup says which packs are in the archive alone, and what is restored from it has them."""
    payloads = landed(program)
    settings = {**place.settings, "DROPZONE_RAW_KEEP_LOCAL_DAYS": 1}
    assert program.run("compact", **settings).returncode == OK
    done = program.run("backup", program.home / "copy", **settings)
    assert done.returncode == OK
    assert "not in it, as they are in the archive alone: 1 packs" in done.stdout
    shutil.rmtree(program.home / "data")
    shutil.copytree(program.home / "copy", program.home / "data")
    folders = folders_at(program.home / "data", place.archive())
    assert all_of(folders, payloads) == payloads
    done = program.run("verify", **settings)
    assert done.stdout.endswith("all rows are right\n")


def test_without_the_setting(tmp_path: Path, place: Place):
    """Where `raw.archive` is no longer set, what is there alone says so, and is not lost."""
    payloads = processed_in(tmp_path, many(3), 2)
    folders = folders_at(tmp_path, place.archive(), keep_local_days=1)
    compact(folders)
    put_away(folders)
    bare = folders_at(tmp_path, None)
    with pytest.raises(StorageUnavailable, match=r"is in the archive alone: set raw\.archive"):
        bare.read(next(iter(payloads)))
    assert bare.count_processed() == len(payloads)
    [trouble] = bare.problems()["data folder"]
    assert "set raw.archive" in trouble


# ── By itself, and its settings ───────────────────────────────────────────────────────────────────


def test_archives_by_itself(program: Program, place: Place):
    """With `raw.compact` the server packs and archives soon after its start, and audits that."""
    payloads = processed_by(program, [body()])
    settings = {**place.settings, "DROPZONE_RAW_KEEP_LOCAL_DAYS": 1}
    server = Server(program, "--port", 0, DROPZONE_RAW_COMPACT="true", **settings)
    folders = folders_at(program.home / "data", place.archive())
    until = time.monotonic() + PATIENCE
    while not list(folders.processed.glob("*.archived")) or local_packs(folders):
        assert time.monotonic() < until
        time.sleep(0.05)
    [raw_id] = payloads
    assert server.json("GET", f"/raw/{raw_id}")["state"] == "processed"
    assert server.stop() == OK
    [line] = [line for line in server.log.splitlines() if "action=archive" in line]
    assert "caller=timer" in line
    assert f"pack={DAY}{GZIPPED}" in line


def test_stops_while_the_archive_hangs(program: Program, s3: Place, object_store: ObjectStore):
    """A server whose upload hangs is stopped as quickly as any other."""
    processed_by(program, [body()])
    object_store.pause()
    try:
        server = Server(program, "--port", 0, DROPZONE_RAW_COMPACT="true", **s3.settings)
        until = time.monotonic() + PATIENCE
        while not (program.home / "data" / "journal" / "archive.lock").exists():
            assert time.monotonic() < until
            time.sleep(0.02)
        begun = time.monotonic()
        assert server.stop() == OK
        assert time.monotonic() - begun < rooms.READ_SECONDS
    finally:
        object_store.resume()


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("s3://id:hidden@packs/x", "credentials and options stand in variables"),
        ("s3://packs/x?secret=hidden", "credentials and options stand in variables"),
        ("s3:///x", "has to name a bucket"),
        ("ftp://hidden/x", "has to begin with one of s3://"),
        ("packs", "has to begin with one of s3://"),
        ("file://archive/hidden", "file:///mnt/archive"),
    ],
)
def test_wrong_urls(url: str, text: str):
    """A url that cannot work is refused with what to write instead, and shows no secret."""
    with pytest.raises(ConfigError, match=r"^raw\.archive: ") as caught:
        load_config(environ={"DROPZONE_RAW_ARCHIVE": url})
    assert text in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_keep_local_days_needs_an_archive(program: Program):
    """`keep_local_days` without an archive deletes nothing, and `check` says so."""
    payloads = processed_by(program, [body()])
    assert program.run("compact", DROPZONE_RAW_KEEP_LOCAL_DAYS=1).returncode == OK
    folders = folders_at(program.home / "data", None)
    assert all_of(folders, payloads) == payloads
    text = "note   raw.keep_local_days deletes nothing, as no raw.archive is set"
    assert text in program.run("check", DROPZONE_RAW_KEEP_LOCAL_DAYS=1).stdout


def test_credentials_are_never_told(program: Program, s3: Place):
    """Neither the id nor the secret of wrong credentials is in an answer, a log or a repr."""
    processed_by(program, [body()])
    wrong = {"AWS_ACCESS_KEY_ID": "id-to-hide", "AWS_SECRET_ACCESS_KEY": "secret-to-hide"}
    (program.home / ".env").write_text(
        "".join(
            f"{name}={text}\n" for name, text in (wrong | {"DROPZONE_LOG_LEVEL": "debug"}).items()
        )
    )
    settings = {name: text for name, text in s3.settings.items() if name not in wrong}
    settings |= dict.fromkeys(wrong, "")
    process = program.start("compact", **settings)
    out, err = (text.decode() for text in process.communicate(timeout=PATIENCE))
    assert process.returncode == TRY_AGAIN
    assert "does not let these credentials do that" in err
    done = program.run("check", **settings)
    assert done.returncode == CONFIGURATION
    assert f"wrong  archive {s3.url}: " in done.stdout
    said = out + err + done.stdout + done.stderr + repr(s3.archive())
    assert "to-hide" not in said
    assert s3.variables["AWS_SECRET_ACCESS_KEY"] not in said


def test_credentials_in_the_env_file(program: Program, s3: Place):
    """Variables of the store in `.env`, which all commands read, count where none is set."""
    processed_by(program, [body()])
    names = {"DROPZONE_RAW_ARCHIVE": s3.url, **s3.variables}
    (program.home / ".env").write_text("".join(f"{n}={text}\n" for n, text in names.items()))
    done = program.run("compact", **dict.fromkeys(s3.variables, ""))
    assert done.returncode == OK, done.stderr
    assert len(s3.packs()) == 1


WITHOUT = """
import sys
{before}
import dropzone
code = dropzone.main(sys.argv[1:])
print(sorted(name for name in sys.modules if name.startswith("obstore")), file=sys.stderr)
sys.exit(code)
"""


def without(program: Program, before: str, *arguments: str, **variables: str):
    code = WITHOUT.format(before=before)
    path = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=program.home,
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_without_the_extra(program: Program):
    """Where the library is not installed, the setting is answered with what to install."""
    (program.home / "archive").mkdir()
    url = f"file://{program.home}/archive"
    done = without(program, "sys.modules['obstore'] = None", "check", DROPZONE_RAW_ARCHIVE=url)
    assert done.returncode == CONFIGURATION
    assert "raw.archive needs the package obstore: pip install 'dropzone[archive]'" in done.stderr


def test_not_imported_without_an_archive(program: Program):
    """Without an archive the library is not imported, and no lock for one is made."""
    processed_by(program, [body()])
    done = without(program, "", "compact")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (OK, "[]")
    assert not (program.home / "data" / "journal" / "archive.lock").exists()
    names = {f"{DAY}{GZIPPED}{end}" for end in ("", ".index")}
    assert set(os.listdir(program.home / "data" / "processed")) == names


def test_the_parts_of_a_pack():
    """What one request carries is small enough for every store, and for memory."""
    assert PART_BYTES + 64 * 1024 * 1024 <= rooms.MOST_IN_UPLOAD


def test_the_server_ends_with_the_tests():
    """The S3 server of the tests stops when the test process is killed."""
    code = (
        "import object_store; s = object_store.ObjectStore(); print(s.process, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as tests:
        assert tests.stdout is not None
        server = psutil.Process(int(tests.stdout.readline()))
        tests.send_signal(signal.SIGKILL)
        with suppress(psutil.NoSuchProcess):
            server.wait(PATIENCE)
