"""A disk that hangs, a process that is stopped: nobody waits for ever, and nothing is lost."""

import asyncio
import fcntl
import json
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
from power_cut import (
    Ledger,
    Service,
    assert_whole,
    disk,
    files_in,
    keep_posting,
    may_mount,
    program,
    run,
    wait_for,
)
from stores import land_each, opened, pending_in

from backends.raw import StorageUnavailable
from backends.raw.journal import START_PATIENCE
from backends.raw.landing import RawStore

Note = Callable[[str, object], None]

LARGE = json.dumps({"time_stamp": "2019-05-01T10:00:00Z", "data": [1.5] * 5000}).encode()
SMALL = b'{"time_stamp": "2019-05-01T12:00:00Z", "data": [0, 2]}'
PATIENCE = 1.5  # seconds in place of ten, to land and to close
HANGS = 20.0  # seconds after which what hangs is taken for hanging


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The program, less patient."""
    return program(tmp_path / "program", LAND_PATIENCE=PATIENCE, CLOSE_PATIENCE=PATIENCE)


@pytest.fixture
def service(tmp_path: Path, source: Path) -> Iterator[Service]:
    served = Service(tmp_path / "data", tmp_path / "home", source)
    yield served
    for writer in served.writers():
        os.kill(writer, signal.SIGCONT)
    served.kill()


@pytest.fixture
async def session(service: Service) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(service.url, timeout=aiohttp.ClientTimeout(HANGS)) as made:
        yield made


async def with_writer(service: Service, session: aiohttp.ClientSession) -> int:
    """Land large payloads until the writer process takes them; return its number."""
    while not service.writers():
        await posted(session, LARGE)
    await asyncio.sleep(0.5)
    for _ in range(5):
        await posted(session, LARGE)
    [writer] = service.writers()
    return writer


async def posted(
    session: aiohttp.ClientSession, body: bytes, key: str | None = None
) -> tuple[int, dict[str, str]]:
    headers = {"Idempotency-Key": key} if key else {}
    async with session.post("/ingest", data=body, headers=headers) as answer:
        if answer.status == 503:
            assert answer.headers["Retry-After"].isdigit()
        return answer.status, await answer.json()


async def ready(session: aiohttp.ClientSession) -> tuple[int, str]:
    async with session.get("/ready") as answer:
        return answer.status, (await answer.json())["checks"]["raw"]


async def until_ready(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(HANGS):
        while (await ready(session))[0] != 200:
            await asyncio.sleep(0.05)


async def assert_stands_still(session: aiohttp.ClientSession) -> None:
    """Everything is refused, at once by now; what needs no disk is answered as always."""
    assert [(await posted(session, body))[0] for body in (SMALL, LARGE)] == [503, 503]
    status, said = await ready(session)
    assert status == 503
    assert "stands still" in said or "does not answer" in said
    async with session.get("/health") as answer:
        assert answer.status == 200


async def test_a_writer_that_is_stopped(
    service: Service, session: aiohttp.ClientSession, tmp_path: Path
):
    """Large and small payloads are refused in time, /ready says why, and it goes on by itself."""
    writer = await with_writer(service, session)
    before = len(files_in(tmp_path / "data"))
    os.kill(writer, signal.SIGSTOP)
    begun = time.monotonic()
    first = asyncio.create_task(posted(session, LARGE, "large"))
    await asyncio.sleep(0.1)
    others = [asyncio.create_task(posted(session, SMALL, f"{number}")) for number in range(20)]
    answers = [await first, *await asyncio.gather(*others)]
    assert {(status, said["code"]) for status, said in answers} == {(503, "storage_unavailable")}
    assert time.monotonic() - begun < HANGS / 2
    assert "stands still" in answers[-1][1]["detail"]
    await assert_stands_still(session)

    os.kill(writer, signal.SIGCONT)
    await until_ready(session)
    again = [
        await posted(session, LARGE, "large"),
        *[await posted(session, SMALL, f"{number}") for number in range(20)],
    ]
    assert {status for status, _ in again} == {202}
    assert len(files_in(tmp_path / "data")) == before + 21
    assert "landing goes on after" in service.log.read_text()


async def test_what_was_refused_lands_once(
    service: Service, session: aiohttp.ClientSession, tmp_path: Path
):
    """A retry with its key makes no second payload of one that was refused and landed later."""
    writer = await with_writer(service, session)
    bodies = {f"{number}": LARGE + b" " * number for number in range(1, 40)}
    keys = iter(bodies)
    waiting = [
        asyncio.create_task(posted(session, bodies[next(keys)], f"{n}")) for n in range(1, 9)
    ]
    os.kill(writer, signal.SIGSTOP)
    waiting += [
        asyncio.create_task(posted(session, bodies[next(keys)], f"{n}")) for n in range(9, 40)
    ]
    first = dict(zip(bodies, await asyncio.gather(*waiting), strict=True))
    assert {status for status, _ in first.values()} <= {202, 503}
    os.kill(writer, signal.SIGCONT)
    await until_ready(session)
    second = {key: await posted(session, body, key) for key, body in bodies.items()}
    assert {status for status, _ in second.values()} == {202}
    for key, (status, said) in first.items():
        assert status == 503 or second[key][1]["raw_id"] == said["raw_id"]
    landed = Counter(path.read_bytes() for [path] in files_in(tmp_path / "data").values())
    assert {landed[body] for body in bodies.values()} == {1}


async def test_no_202_is_taken_back(
    service: Service, source: Path, session: aiohttp.ClientSession, tmp_path: Path
):
    """Under load, whatever was acknowledged is there, however often the writer stands still."""
    writer, ledger = await with_writer(service, session), Ledger()
    ledger.sent.add(LARGE)
    clients = [asyncio.create_task(keep_posting(session, ledger)) for _ in range(16)]
    for pause in (PATIENCE * 2, PATIENCE / 3, PATIENCE * 2):
        await asyncio.sleep(0.5)
        os.kill(writer, signal.SIGSTOP)
        await asyncio.sleep(pause)
        os.kill(writer, signal.SIGCONT)
    await asyncio.sleep(0.5)
    for client in clients:
        client.cancel()
    ended = await asyncio.gather(*clients, return_exceptions=True)
    assert [error for error in ended if not isinstance(error, asyncio.CancelledError)] == []
    assert ledger.codes == {"storage_unavailable"}
    service.kill()
    service = Service(tmp_path / "data", tmp_path / "home", source)
    service.kill()
    assert_whole(tmp_path / "data", ledger)


@pytest.mark.parametrize("is_waiting", [True, False])
async def test_told_to_stop_while_the_writer_is_stopped(
    is_waiting: bool, service: Service, source: Path, session: aiohttp.ClientSession, tmp_path: Path
):
    """The service ends in order, and soon, though its writer does not; nothing is lost."""
    writer, ledger = await with_writer(service, session), Ledger()
    ledger.sent |= {LARGE, SMALL}
    for _ in range(20):
        await ledger.post(session, [ledger.new_body()])
    os.kill(writer, signal.SIGSTOP)
    waiting = [asyncio.create_task(posted(session, LARGE))] if is_waiting else []
    await asyncio.sleep(0.3)
    service.process.terminate()
    assert await asyncio.to_thread(service.process.wait, HANGS) == os.EX_OK
    await asyncio.gather(*waiting, return_exceptions=True)
    wait_for(lambda: not os.path.exists(f"/proc/{writer}"))
    service = Service(tmp_path / "data", tmp_path / "home", source)
    service.kill()
    assert_whole(tmp_path / "data", ledger)


async def test_a_disk_that_hangs(tmp_path: Path, source: Path, record_property: Note):
    """While the file system is frozen payloads are refused in time, and then it goes on."""
    if not may_mount(tmp_path):
        record_property("note", "NO FROZEN DISK: mounting is not allowed here. Run it as root.")
        return
    with disk("ext4", tmp_path) as (_, where):
        service, ledger = Service(where / "data", tmp_path / "home", source), Ledger()
        limit = aiohttp.ClientTimeout(HANGS)
        try:
            async with aiohttp.ClientSession(service.url, timeout=limit) as session:
                await with_writer(service, session)
                ledger.sent |= {LARGE, SMALL}
                for body in (SMALL, LARGE):
                    await ledger.post(session, [ledger.new_body()])
                    with frozen(where):
                        assert (await posted(session, body))[0] == 503
                        await assert_stands_still(session)
                        for _ in range(10):  # none of which holds up another
                            assert (await ready(session))[0] == 503
                    await until_ready(session)
                assert await ledger.post(session, [ledger.new_body()])
            assert service.stop() == os.EX_OK
        finally:
            service.kill()
        assert_whole(where / "data", ledger)


@contextmanager
def frozen(where: Path) -> Iterator[None]:
    run("fsfreeze", "--freeze", where)
    try:
        yield
    finally:
        run("fsfreeze", "--unfreeze", where)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock as a process does that was stopped in the midst of its work."""
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


@pytest.mark.parametrize("name", ["last_raw_id", ".", "tally"])
async def test_another_process_that_is_stopped(
    name: str, service: Service, session: aiohttp.ClientSession, tmp_path: Path
):
    """So it is where another process of the data folder does not let go of what it has locked."""
    await posted(session, SMALL)
    with held(tmp_path / "data" / "journal" / name):
        status, _ = await posted(session, SMALL, "key")
        assert status == (202 if name == "tally" else 503)
    await until_ready(session)
    assert (await posted(session, SMALL, "key"))[0] == 202
    assert service.stop() == os.EX_OK


async def test_another_process_that_is_stopped_at_the_start(tmp_path: Path):
    """A start does not wait for such a process for ever, and says so."""
    async with opened(tmp_path):
        pass
    store = RawStore(tmp_path / "raw")
    with (
        held(tmp_path / "journal" / "last_raw_id"),
        pytest.raises(StorageUnavailable, match="does not go on; end that process"),
    ):
        await asyncio.wait_for(store.open(), START_PATIENCE + HANGS)


async def test_landing_in_a_store_that_is_closed(tmp_path: Path):
    """Whoever lands in a store that is closed hears so, one or many."""
    async with opened(tmp_path) as store:
        [raw_id] = await store.land(SMALL)
    calls = [store.land(SMALL), land_each(store, [SMALL] * 3), store.land(LARGE, "a")]
    async with asyncio.timeout(HANGS):
        answers = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(answer) for answer in answers} == {StorageUnavailable}
    assert pending_in(store) == [raw_id]


async def test_a_call_that_is_wrong(tmp_path: Path):
    """A program that hands in no bytes hears of it, and nobody beside it waits for ever."""
    async with opened(tmp_path) as store:
        calls = [store.land(SMALL), land_each(store, [SMALL, None]), store.land("text", "a")]  # type: ignore[list-item]
        async with asyncio.timeout(HANGS):
            answers = await asyncio.gather(*calls, store.land(SMALL), return_exceptions=True)
        assert isinstance(answers[1], TypeError)
        assert all(isinstance(answer, StorageUnavailable | list) for answer in answers[2:])
        await store.land(SMALL)
