"""`RawStore`: payloads as files, durable before they are acknowledged, in one folder at a time."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID, uuid4

import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stores import land_each, lines, names_of, opened, pending_in

from backends.raw import (
    PayloadUnreadable,
    RawIdUnknown,
    Rejection,
    StorageUnavailable,
    arrival_of,
    next_raw_id,
    raw_id_of,
)
from backends.raw.landing import LARGE, RawStore

REPO = Path(__file__).parents[2]
NEVER = UUID("0190a3b4-5c6d-7e8f-9012-3456789abcde")  # a raw_id that nobody was given
NOON = "2019-05-01T12:00:00Z"
BODY = b'{"time_stamp": "2019-05-01T12:00:00Z", "data": [0, 2]}'
LAST_MS = (1 << 48) - 1


def uuid7_of(ms: int, rand_a: int = 0, rand_b: int = 0) -> UUID:
    return UUID(int=ms << 80 | 7 << 76 | rand_a << 64 | 2 << 62 | rand_b)


def uuid7_at(moment: str, rand_b: int = 0) -> UUID:
    return uuid7_of(round(datetime.fromisoformat(moment).timestamp() * 1000), rand_b=rand_b)


FUTURE = uuid7_at("2399-12-31T23:59:59.999Z")


def quarantined(store: RawStore) -> list[UUID]:
    return [rejection.raw_id for rejection in store.rejections()]


def rejection_of(raw_id: UUID, detail: str = 'data[1] is "x"') -> Rejection:
    return Rejection(raw_id, "value_not_numeric", detail, datetime(2019, 5, 1, 12, tzinfo=UTC))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
async def store(folder: Path) -> AsyncIterator[RawStore]:
    async with opened(folder) as store:
        yield store


def put(folder: Path, raw_id: UUID, where: str = "raw", body: bytes = BODY) -> UUID:
    """Lay a payload into a folder by hand, as an operator might."""
    (folder / where).mkdir(parents=True, exist_ok=True)
    (folder / where / f"{raw_id}.json").write_bytes(body)
    return raw_id


def files_below(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*.json")}


def assert_increasing(raw_ids: list[UUID]) -> None:
    assert all(one < following for one, following in pairwise(raw_ids))
    assert all(raw_id.version == 7 for raw_id in raw_ids)


# ── raw_id ────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=500, deadline=None)
@given(
    st.builds(
        uuid7_of, st.integers(0, LAST_MS - 1), st.integers(0, 0xFFF), st.integers(0, (1 << 62) - 1)
    )
)
@example(UUID(int=0))
@example(uuid7_of(LAST_MS - 1, 0xFFF, (1 << 62) - 1))
def test_next_raw_id_is_greater(last: UUID):
    """A new raw_id is a UUIDv7 greater than the last one, whatever the clock says."""
    raw_id = next_raw_id(last)

    assert raw_id > last
    assert raw_id.version == 7


def test_raw_ids_within_a_millisecond():
    """Thousands of raw_ids in a row increase, also with the clock far behind the last one."""
    for last in (UUID(int=0), FUTURE):
        raw_ids = [last]
        for _ in range(5000):
            raw_ids.append(next_raw_id(raw_ids[-1]))
        assert_increasing(raw_ids[1:])
        assert raw_ids[1] > last


def test_arrival():
    """A raw_id tells when its payload arrived, to the millisecond, if it is a UUIDv7."""
    moment = "2019-05-01T23:59:59.999+00:00"

    assert arrival_of(uuid7_at(moment)) == datetime.fromisoformat(moment)
    assert arrival_of(uuid4()) is None
    assert arrival_of(UUID(int=0)) is None


def test_arrival_beyond_the_calendar():
    """A UUIDv7 may name a time after the year 9999, which is no known arrival."""
    assert arrival_of(uuid7_of(LAST_MS)) is None


async def test_arrival_of_a_landed_payload(store: RawStore):
    """A landed payload arrived between the call and its return."""
    before = datetime.now(UTC)
    [raw_id] = await store.land(BODY)
    arrival = arrival_of(raw_id)

    assert arrival is not None
    assert int(before.timestamp() * 1000) <= arrival.timestamp() * 1000 + 0.5
    assert arrival <= datetime.now(UTC)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".json",
        "x.json",
        f"{NEVER}",
        f"{NEVER}.json.tmp",
        f".{NEVER}.json",
        f"{NEVER}.reason.json",
        f"{NEVER}.JSON",
        f"{str(NEVER).upper()}.json",
        f"{NEVER.hex}.json",
        f"{{{NEVER}}}.json",
        f"{NEVER}.json\n",
        f"{NEVER} (1).json",
        f"../{NEVER}.json",
        "0190a3b4-5c6d-7e8f-9012-3456789abcd\u0661.json",
    ],
)
def test_names_of_other_files(name: str):
    """Only <uuid>.json, in lower case, is the name of a payload."""
    assert raw_id_of(name) is None


@given(st.uuids())
def test_names_of_payloads(raw_id: UUID):
    """The name of a payload is its raw_id, a UUID of any version."""
    assert raw_id_of(f"{raw_id}.json") == raw_id


# ── Landing ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        BODY,
        b"",
        b"\0\xff\r\n\n",
        b"\xef\xbb\xbf{}",
        b" [1]\n",
        os.urandom(1 << 20),
        b"{" * 5_000_000,
    ],
    ids=["json", "empty", "binary", "mark", "blanks", "1 MB", "5 MB"],
)
async def test_exact_bytes(body: bytes, store: RawStore, folder: Path):
    """The file raw/<raw_id>.json holds the bytes that were landed, unchanged."""
    [raw_id] = await store.land(body)

    assert (folder / "raw" / f"{raw_id}.json").read_bytes() == body
    assert store.read(raw_id) == ("pending", body)
    assert store.read_pending(f"{raw_id}.json") == [(raw_id, body)]


async def test_several_at_a_time(store: RawStore):
    """The raw_ids of one batch are in the order of its payloads, and increase."""
    bodies = [b"%d" % number for number in range(300)]
    raw_ids = await store.land(**lines(*bodies))

    assert_increasing(raw_ids)
    assert [store.read(raw_id) for raw_id in raw_ids] == [("pending", body) for body in bodies]


async def test_raw_ids_increase_from_call_to_call(store: RawStore):
    """A later call gets a greater raw_id."""
    raw_ids = [(await store.land(BODY))[0] for _ in range(50)]

    assert_increasing(raw_ids)
    assert pending_in(store) == raw_ids


async def test_many_at_once(store: RawStore, folder: Path):
    """Of many calls at once each gets raw_ids of its own, in the order of the calls."""
    calls = [[b'[%d, "%d"]' % (call, part) for part in range(1 + call % 4)] for call in range(400)]

    answers = await asyncio.gather(*(store.land(**lines(*bodies)) for bodies in calls))

    raw_ids = [raw_id for answer in answers for raw_id in answer]
    found = [store.read(raw_id)[1] for raw_id in raw_ids]
    assert found == [body for bodies in calls for body in bodies]
    assert_increasing(raw_ids)
    assert store.count_pending() == len(raw_ids)
    assert len(os.listdir(folder / "raw")) == len(calls)


async def test_two_stores_on_one_folder(store: RawStore, folder: Path):
    """Two stores on one folder, as in two worker processes, never share a raw_id."""
    async with opened(folder) as other:
        answers = await asyncio.gather(*(s.land(BODY) for _ in range(100) for s in (store, other)))

        assert len({raw_id for [raw_id] in answers}) == 200
        assert pending_in(store) == pending_in(other) == sorted(raw_id for [raw_id] in answers)


async def test_opening_a_folder_that_another_store_lands_in(store: RawStore, folder: Path):
    """A store opens whatever files another one makes and renames meanwhile, again and again."""
    over = asyncio.Event()

    async def land_on() -> None:
        while not over.is_set():
            await land_each(store, [BODY] * 20)

    landing = asyncio.create_task(land_on())
    try:
        for _ in range(50):
            async with opened(folder):
                pass
    finally:
        over.set()
        await landing


async def test_small_ones_pass_large_bodies(store: RawStore):
    """While large bodies are written, however many of them wait, small ones land."""
    many = lines(*[b"1" * 1000] * (LARGE // 1000))
    assert len(many["body"]) > LARGE
    await store.land(**many)
    [writer] = [
        child for child in psutil.Process().children() if "write_forever" in str(child.cmdline())
    ]
    writer.suspend()
    try:
        large = [asyncio.create_task(store.land(**many)) for _ in range(5)]
        async with asyncio.timeout(60):
            for size in (1, 100_000):  # such that would go to the writer process, too
                await asyncio.gather(*(store.land(b"1" * size) for _ in range(40)))
            await store.land(**lines(*[b"1" * 9] * 100_000))  # which is just no large one
        assert not any(batch.done() for batch in large)
    finally:
        writer.resume()
    landed = await asyncio.gather(*large)
    assert store.count_pending() == 6 * many["payloads"] + 80 + 100_000
    assert all(store.read(batch[-1]) == ("pending", b"1" * 1000) for batch in landed)


async def test_a_caller_that_leaves(store: RawStore):
    """A call that is cancelled does no harm to the calls beside it and after it."""
    leaving = [asyncio.ensure_future(store.land(BODY)) for _ in range(5)]
    staying = asyncio.ensure_future(store.land(b"1"))
    await asyncio.sleep(0)
    for call in leaving:
        call.cancel()
    await asyncio.wait(leaving)

    [[first], [second]] = await staying, await store.land(b"2")
    assert (store.read(first)[1], store.read(second)[1]) == (b"1", b"2")
    assert all(store.read(raw_id)[1] in (BODY, b"1", b"2") for raw_id in pending_in(store))


@pytest.mark.parametrize("size", [1_000_000, LARGE + 1])
async def test_close_waits(size: int, folder: Path):
    """`close` returns when what was handed in is on disk, even if nobody waits for it any more."""
    async with opened(folder) as store:
        calls = [asyncio.ensure_future(store.land(b"x" * size)) for _ in range(5)]
        await asyncio.sleep(0)
    sizes = [file.stat().st_size for file in (folder / "raw").iterdir()]

    assert sizes == [size] * 5
    assert len(await asyncio.gather(*calls)) == 5


async def test_a_reader_sees_whole_files_alone(store: RawStore, folder: Path):
    """Whoever reads the raw folder meanwhile finds whole payloads under their names or none."""
    sizes, done = [], threading.Event()

    def read_all_the_time() -> None:
        last_round = False
        while not last_round:
            last_round = done.is_set()
            names = filter(raw_id_of, os.listdir(folder / "raw"))
            sizes.extend((folder / "raw" / name).stat().st_size for name in names)

    reader = asyncio.create_task(asyncio.to_thread(read_all_the_time))
    for _ in range(4):
        await land_each(store, [b"x" * 2_000_000] * 4)
    done.set()
    await reader

    assert set(sizes) == {2_000_000}
    assert store.strays() == []


async def test_landing_does_not_block_the_loop(store: RawStore):
    """Other coroutines go on while payloads are being written and synced."""
    turns = 0
    landing = asyncio.ensure_future(land_each(store, [b"x" * 1_000_000] * 32))
    while not landing.done():
        turns += 1
        await asyncio.sleep(0)

    assert len(await landing) == 32
    assert turns > 32, "fewer turns than payloads: the loop stood still while they were written"


# ── Opening again ─────────────────────────────────────────────────────────────────────────────────


async def test_open_creates_the_folders(folder: Path):
    """An empty disk is enough to start; opening and closing again changes nothing."""
    for _ in range(2):
        async with opened(folder / "deep" / "down") as store:
            await store.open()
            assert store.trouble() is None
            assert (pending_in(store), store.strays(), quarantined(store)) == ([], [], [])


async def test_payloads_survive(folder: Path):
    """What was landed is there when the store is opened again, and new raw_ids are greater."""
    raw_ids = []
    for number in range(5):
        async with opened(folder) as store:
            raw_ids += await land_each(store, [b"%d" % number] * 3)
            assert pending_in(store) == raw_ids

    assert_increasing(raw_ids)


PLACES = ["raw", "rejected", "processed/2399-12-31"]


@pytest.mark.parametrize("place", PLACES)
async def test_clock_set_back(place: str, folder: Path):
    """With the clock set back, raw_ids go on after the greatest, in whichever folder it lies."""
    put(folder, FUTURE, place)
    put(folder, NEVER, "processed/2024-07-11")

    async with opened(folder) as store:
        raw_ids = await land_each(store, [BODY] * 3) + await store.land(BODY)

    assert_increasing([FUTURE, *raw_ids])


@pytest.mark.parametrize("place", PLACES)
async def test_clock_set_back_after_foreign_payloads(place: str, folder: Path):
    """Payloads with foreign names, processed before, do not hide the greatest raw_id."""
    put(folder, FUTURE, place)
    foreign = put(folder, uuid4())
    async with opened(folder) as store:
        store.settle(names_of(foreign), [])
    put(folder, uuid4(), "rejected")

    async with opened(folder) as store:
        [raw_id] = await store.land(BODY)
        assert store.read(foreign) == ("processed", BODY)

    assert raw_id > FUTURE


@pytest.mark.parametrize("name", ["0-notes.txt", "notes.txt", "2019-05-01.tar", ".DS_Store"])
async def test_clock_set_back_and_foreign_files(name: str, folder: Path):
    """A file that somebody put among the processed days stands in nobody's way."""
    put(folder, FUTURE, "processed/2399-12-31")
    (folder / "processed" / name).write_text("not ours")
    (folder / "rejected").mkdir()
    (folder / "rejected" / name).write_text("not ours")

    async with opened(folder) as store:
        [raw_id] = await store.land(BODY)
        assert quarantined(store) == []

    assert raw_id > FUTURE
    assert (folder / "processed" / name).read_text() == "not ours"


async def test_empty_day_after_the_greatest(folder: Path):
    """A day whose files were moved to an archive does not hide the day before."""
    put(folder, FUTURE, "processed/2399-12-31")
    (folder / "processed" / "2400-01-01").mkdir()

    async with opened(folder) as store:
        [raw_id] = await store.land(BODY)

    assert raw_id > FUTURE


async def test_a_name_beyond_the_calendar(folder: Path):
    """A payload whose name is a UUIDv7 of the year 10889 stands in nobody's way."""
    strange = put(folder, uuid7_of(LAST_MS, 0xFFF, (1 << 62) - 1))

    async with opened(folder) as store:
        [raw_id] = await store.land(BODY)
        assert store.read(raw_id) == ("pending", BODY)
        store.settle(names_of(strange), [])
        assert store.read(strange) == ("processed", BODY)
        assert pending_in(store) == [raw_id]


# ── Failing disks, killed programs ────────────────────────────────────────────────────────────────


def take_away(raw: Path) -> None:
    raw.rename(raw.with_name("away"))


def replace_by_a_file(raw: Path) -> None:
    take_away(raw)
    raw.write_text("no folder")


def replace_by_a_dead_link(raw: Path) -> None:
    take_away(raw)
    raw.symlink_to("nowhere")


@pytest.mark.parametrize("break_disk", [take_away, replace_by_a_file, replace_by_a_dead_link])
async def test_failing_disk(break_disk: Callable[[Path], None], store: RawStore, folder: Path):
    """On a failing disk nothing is acknowledged or half-written; when it is back, landing works."""
    raw = folder / "raw"
    before = await store.land(BODY)
    break_disk(raw)

    for bodies in ([b"1"], [b"1", b"2"]):
        with pytest.raises(StorageUnavailable):
            await store.land(**lines(*bodies))
    answers = await asyncio.gather(*(store.land(b"1") for _ in range(9)), return_exceptions=True)
    assert all(isinstance(answer, StorageUnavailable) for answer in answers)
    assert "raw" in (store.trouble() or "")

    if os.path.lexists(raw):
        raw.unlink()
    raw.with_name("away").rename(raw)
    after = await store.land(b"2")
    assert store.trouble() is None
    assert pending_in(store) == [*before, *after]
    assert_increasing([*before, *after])
    async with opened(folder) as again:
        assert pending_in(again) == [*before, *after]


async def test_many_look_for_trouble(store: RawStore):
    """However many ask at once whether payloads can land, each is told."""

    async def ask() -> set[str | None]:
        return {await store.landing_trouble() for _ in range(100)}

    told = await asyncio.gather(*(ask() for _ in range(10)))
    assert told == [{None}] * 10


LIMITED = """
import asyncio, json, logging, resource, sys
from pathlib import Path
from backends.raw import StorageUnavailable
from backends.raw.landing import RawStore

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

async def main():
    logging.disable()
    store = RawStore(sys.argv[1])
    await store.open()
    calls = [[b"s" * size for size in call] for call in json.loads(sys.argv[2])]
    landed = list(await store.land(b"first"))
    limit(100_000)
    batches = (store.land(b"\\n".join(call), None, "", "ndjson", len(call)) for call in calls)
    answers = await asyncio.gather(*batches, return_exceptions=True)
    limit(resource.RLIM_INFINITY)
    for answer in answers:
        if isinstance(answer, StorageUnavailable):
            print("refused", answer.code)
        else:
            landed += answer
    landed += await store.land(b"l" * 300_000)
    await store.close()
    print(*landed)

asyncio.run(main())
"""


def run(code: str, *arguments: str) -> list[str]:
    """Run a program of its own, with limits of its own; return the lines that it prints."""
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, env=environ, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()


@pytest.mark.parametrize(
    "calls",
    [
        [[300_000]],
        [[10], [300_000], [20]],
        [[10, 300_000, 20]],
        [[10, 20], [30, 300_000], [300_000, 40], [50]],
    ],
    ids=json.dumps,
)
async def test_disk_that_takes_no_big_files(calls: list[list[int]], folder: Path):
    """Where the disk refuses a payload, its whole call is refused, and leaves no file at all."""
    *refused, landed = run(LIMITED, str(folder / "raw"), json.dumps(calls))

    assert set(refused) == {"refused storage_unavailable"}
    async with opened(folder) as store:
        assert store.count_pending() == len(landed.split())
        sizes = [len(store.read(UUID(raw_id))[1]) for raw_id in landed.split()]
        assert store.strays() == []
    assert sizes[0] == 5
    assert sizes[-1] == 300_000
    assert [size for size in sizes[1:-1] if size not in (10, 20, 50)] == []


LANDING_FOR_EVER = """
import asyncio, sys
from pathlib import Path
from backends.raw.landing import RawStore

async def land(store, worker):
    for number in range(10**9):
        body = b"%d %d " % (worker, number) * 20_000
        [raw_id] = await store.land(body)
        print(raw_id, worker, number, flush=True)

async def main():
    store = RawStore(sys.argv[1])
    await store.open()
    await asyncio.gather(*(land(store, worker) for worker in range(8)))

asyncio.run(main())
"""


@pytest.mark.parametrize("acknowledged", [1, 40, 90])
async def test_killed_while_landing(acknowledged: int, folder: Path):
    """After kill -9 every acknowledged payload is there, whole, and so is every other in raw/."""
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    command = [sys.executable, "-c", LANDING_FOR_EVER, str(folder / "raw")]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as program:  # noqa: ASYNC220
        assert program.stdout
        lines = [program.stdout.readline() for _ in range(acknowledged)]
        program.kill()
        lines += [line for line in program.stdout if line.endswith("\n")]

    async with opened(folder) as store:
        for raw_id, worker, number in map(str.split, lines):
            body = f"{worker} {number} ".encode() * 20_000
            assert store.read(UUID(raw_id)) == ("pending", body)
        for raw_id in pending_in(store):
            body = store.read(raw_id)[1]
            assert body == body[: len(body) // 20_000] * 20_000
        assert store.strays() == []
        last = max(pending_in(store))
        assert (await store.land(BODY))[0] > last


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


async def test_pending_in_order_of_arrival(store: RawStore, folder: Path):
    """Pending payloads are listed in order of arrival, however the disk orders them."""
    moments = ["2019-05-01T12:00:00Z", "2019-05-01T12:00:00.001Z", "2020-01-01T00:00:00Z"]
    early = [uuid7_at(moment, tail) for moment in moments for tail in (0, 1, 9)]
    for raw_id in reversed(early):
        put(folder, raw_id)
    landed = await land_each(store, [BODY] * 20)

    assert pending_in(store) == early + landed


async def test_payloads_with_foreign_names(store: RawStore, folder: Path):
    """<uuid>.json is a payload whatever the UUID's version: it is read, settled and read again."""
    names = [
        UUID(int=0),
        UUID(int=(1 << 128) - 1),
        uuid4(),
        UUID(int=uuid4().int & ~(0xF << 76) | 1 << 76),
    ]
    for raw_id in names:
        put(folder, raw_id, body=raw_id.bytes)

    assert pending_in(store) == sorted(names)
    assert store.strays() == []
    for raw_id in names:
        assert store.read_pending(f"{raw_id}.json") == [(raw_id, raw_id.bytes)]
    store.settle(names_of(*names[:2]), map(rejection_of, names[2:]))
    assert pending_in(store) == []
    assert [store.read(raw_id) for raw_id in names] == [
        *(("processed", raw_id.bytes) for raw_id in names[:2]),
        *(("rejected", raw_id.bytes) for raw_id in names[2:]),
    ]
    assert quarantined(store) == sorted(names[2:])


async def test_strays(store: RawStore, folder: Path):
    """What is not named <uuid>.json is left alone, and listed."""
    names = ["notes.txt", "x.json", f"{NEVER}.json.tmp", f"{str(NEVER).upper()}.json", ".hidden"]
    for name in names:
        (folder / "raw" / name).write_text("not ours")
    (folder / "raw" / "subfolder").mkdir()
    raw_ids = await land_each(store, [BODY] * 2)

    assert store.strays() == sorted([*names, "subfolder"])
    assert pending_in(store) == raw_ids
    store.settle(names_of(*raw_ids), [])
    async with opened(folder) as again:
        assert again.strays() == sorted([*names, "subfolder"])
    assert all((folder / "raw" / name).read_text() == "not ours" for name in names)


async def test_unknown_raw_id(store: RawStore):
    """A raw_id that nobody was given is unknown, and settling it creates no payload."""
    with pytest.raises(RawIdUnknown, match=str(NEVER)):
        store.read(NEVER)
    with pytest.raises(RawIdUnknown):
        store.read_pending(f"{NEVER}.json")

    store.settle(names_of(NEVER), [])
    with pytest.raises(RawIdUnknown):
        store.read(NEVER)


@pytest.mark.parametrize("kind", ["folder", "link to a folder", "link to itself", "dead link"])
async def test_payload_that_cannot_be_read(kind: str, store: RawStore, folder: Path):
    """A name in raw/ that cannot be read is bad data, and can be moved out of the way."""
    path = folder / "raw" / f"{NEVER}.json"
    if kind == "folder":
        path.mkdir()
    else:
        target = {"link to a folder": folder, "link to itself": path, "dead link": folder / "x"}
        path.symlink_to(target[kind])

    assert pending_in(store) == [NEVER]
    with pytest.raises(PayloadUnreadable) as caught:
        store.read_pending(f"{NEVER}.json")
    assert caught.value.code == "payload_unreadable"
    store.settle([], [rejection_of(NEVER)])
    assert pending_in(store) == []
    assert quarantined(store) == [NEVER]


# ── Settling ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("moment", "day"),
    [
        ("2019-05-01T23:59:59.999Z", "2019-05-01"),
        ("2019-05-02T00:00:00.000Z", "2019-05-02"),
        ("2019-05-02T00:30:00+14:00", "2019-05-01"),
        ("1970-01-01T00:00:00Z", "1970-01-01"),
        ("9999-12-31T23:59:59Z", "9999-12-31"),
    ],
)
async def test_processed(moment: str, day: str, store: RawStore, folder: Path):
    """A processed payload moves to the UTC day of its arrival, its bytes unchanged."""
    raw_id = put(folder, uuid7_at(moment))
    store.settle(names_of(raw_id), [])

    assert files_below(folder) == {f"processed/{day}/{raw_id}.json"}
    assert store.read(raw_id) == ("processed", BODY)
    with pytest.raises(RawIdUnknown):
        store.read_pending(f"{raw_id}.json")
    assert pending_in(store) == []


async def test_rejected(store: RawStore, folder: Path):
    """A rejected payload moves beside its reason, which anyone can read as JSON."""
    [raw_id] = await store.land(BODY)
    store.settle([], [rejection_of(raw_id)])

    assert files_below(folder) == {f"rejected/{raw_id}.json", f"rejected/{raw_id}.reason.json"}
    assert store.read(raw_id) == ("rejected", BODY)
    assert store.rejection(raw_id) == rejection_of(raw_id)
    assert json.loads((folder / "rejected" / f"{raw_id}.reason.json").read_bytes()) == {
        "raw_id": str(raw_id),
        "code": "value_not_numeric",
        "detail": 'data[1] is "x"',
        "rejected_at": "2019-05-01T12:00:00.000000Z",
        "retries": 0,
        "retried_at": None,
    }
    assert (pending_in(store), quarantined(store), store.strays()) == ([], [raw_id], [])


async def test_folders_of_ones_own(tmp_path: Path):
    """processed/ and rejected/ may be configured to lie elsewhere."""
    store = RawStore(tmp_path / "a/raw", processed=tmp_path / "b/done", rejected=tmp_path / "c/bad")
    await store.open()
    good, bad = await land_each(store, [BODY] * 2)
    store.settle(names_of(good), [rejection_of(bad)])
    await store.close()

    assert [path.name for path in (tmp_path / "b/done").rglob("*.json")] == [f"{good}.json"]
    assert (tmp_path / "c/bad" / f"{bad}.json").exists()
    assert list((tmp_path / "a/raw").iterdir()) == []


async def test_settling_again(store: RawStore, folder: Path):
    """Settling a second time, or a part of it, as after a crash, changes nothing."""
    good, bad, untouched = await land_each(store, [b"1", b"2", b"3"])
    store.settle(names_of(good), [rejection_of(bad)])
    before = files_below(folder)

    for processed, rejected in ([good], [bad]), ([good], []), ([], [bad]), ([], []), ([bad], []):
        store.settle(names_of(*processed), map(rejection_of, rejected))
    assert files_below(folder) == before
    assert pending_in(store) == [untouched]
    assert store.read(good) == ("processed", b"1")
    assert store.read(bad) == ("rejected", b"2")


async def test_rejecting_what_is_processed(store: RawStore):
    """A late rejection of a payload that was processed does not bring it back."""
    [raw_id] = await store.land(BODY)
    store.settle(names_of(raw_id), [])
    store.settle([], [rejection_of(raw_id), rejection_of(NEVER)])

    assert store.read(raw_id) == ("processed", BODY)
    assert (pending_in(store), quarantined(store)) == ([], [])


async def test_reading_while_it_is_settled(store: RawStore):
    """A payload can be read at any moment of its way."""
    raw_ids = await land_each(store, (b"%d" % number for number in range(200)))
    with ThreadPoolExecutor(1) as pool:
        rejected = list(map(rejection_of, raw_ids[1::2]))
        done = pool.submit(store.settle, names_of(*raw_ids[::2]), rejected)
        rounds = 0
        while not done.done() or rounds == 0:
            rounds += 1
            bodies = [store.read(raw_id)[1] for raw_id in raw_ids]
            assert bodies == [b"%d" % number for number in range(200)]
        done.result()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sets(st.integers(0, 5)), st.sets(st.integers(0, 5))).map(
            lambda both: (both[0], both[1] - both[0])
        ),
        max_size=6,
    )
)
def test_each_payload_lies_in_one_folder(moves: list[tuple[set[int], set[int]]]):
    """After any settling a payload lies in exactly one folder: where it was moved first."""
    with TemporaryDirectory() as name:
        store = RawStore(Path(name) / "raw")
        asyncio.run(store.open())
        raw_ids = [put(Path(name), uuid7_of(10**12, rand_b=number)) for number in range(6)]
        states = dict.fromkeys(raw_ids, "pending")
        for processed, rejected in moves:
            good, bad = [raw_ids[n] for n in processed], [raw_ids[n] for n in rejected]
            store.settle(names_of(*good), map(rejection_of, bad))
            for raw_id in good + bad:
                if states[raw_id] == "pending":
                    states[raw_id] = "processed" if raw_id in good else "rejected"

        assert {raw_id: store.read(raw_id)[0] for raw_id in raw_ids} == states
        assert pending_in(store) == [i for i in raw_ids if states[i] == "pending"]
        assert quarantined(store) == [i for i in raw_ids if states[i] == "rejected"]
        payloads = [path for path in files_below(Path(name)) if ".reason." not in path]
        assert len(payloads) == len(raw_ids)


# ── Reasons ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\0" * 100,
        b"\xff\xfe",
        b"not json",
        b"[]",
        b"null",
        b'{"code": 5}',
        f'{{"raw_id": "x", "code": "a", "detail": "b", "rejected_at": "{NOON}"}}'.encode(),
        f'{{"raw_id": "{NEVER}", "code": "a", "detail": "\xb0", "rejected_at": "{NOON}"}}'.encode(
            "latin-1"
        ),
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content)[:20],
)
async def test_reasons_that_are_missing_or_broken(
    content: bytes | None, store: RawStore, folder: Path
):
    """A payload whose reason is missing or broken still has one, which says so."""
    before = datetime.now(UTC).replace(microsecond=0)
    raw_id = put(folder, uuid7_at("2019-05-01T12:00:00Z"), "rejected")
    if content is not None:
        (folder / "rejected" / f"{raw_id}.reason.json").write_bytes(content)
    rejection = store.rejection(raw_id)

    assert (rejection.raw_id, rejection.code) == (raw_id, "reason_missing")
    assert rejection.detail
    assert before <= rejection.rejected_at <= datetime.now(UTC)
    assert list(store.rejections()) == [rejection]
    assert store.read(raw_id) == ("rejected", BODY)


async def test_reason_of_what_is_not_rejected(store: RawStore):
    """Asking for the reason of a payload that is not in the quarantine is an unknown raw_id."""
    [raw_id] = await store.land(BODY)
    for other in (raw_id, NEVER):
        with pytest.raises(RawIdUnknown):
            store.rejection(other)


@pytest.mark.parametrize("detail", ["\0", "µ€😀", '"\\\n', "x" * 100_000])
async def test_any_reason_can_be_kept(detail: str, store: RawStore):
    """Whatever a reason quotes of a payload, it is kept, and never stops the settling of others."""
    good, bad = await land_each(store, [b"1", b"2"])
    store.settle(names_of(good), [rejection_of(bad, detail)])

    assert pending_in(store) == []
    assert store.rejection(bad).code == "value_not_numeric"
