"""Nodes: several Dropzones on one table, each with its own folder and number, prove it together."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import msgspec
import pytest
from aiohttp import ClientSession, web
from stores import lines
from test_cli import CONFIGURATION, OK, Program, Server
from test_http import Service, check_problem
from test_processing import NOON, body
from test_proof import AMISS, assert_silent, payload, summary_of

from backends import Backend, Measurement
from backends.postgres import PostgresBackend
from backends.raw import uuid_at
from backends.raw.landing import RawStore
from backends.raw.nodes import FILE, Numbers, read_numbers
from backends.sqlite import SqliteBackend
from dropzone import Config, NodeConfig, Processor, ProofSummary, RawConfig, Twin, create_app


class Node:
    """A Dropzone on a table that it shares: its folder, its number, and its commands."""

    def __init__(self, home: Path, table: "Table", number: int | None, name: str) -> None:
        self.table = table
        self.program = Program(home)
        self.folder = home / name
        self.variables: dict[str, object] = {"DROPZONE_RAW_DIR": self.folder / "raw"}
        self.variables |= table.variables
        if number is not None:
            self.variables["DROPZONE_NODE_ID"] = number
        self.store = RawStore(self.folder / "raw", node=number)

    async def opened(self) -> "Node":
        await self.store.open()
        return self

    def mark(self, number: int) -> None:
        """Give the folder a mark that no chance makes another's, before anything is in it."""
        (self.folder / "journal").mkdir(parents=True)
        notes = Numbers(number, uuid_at(NOON), was_empty=True, numbers=(self.store.node or 0,))
        (self.folder / "journal" / FILE).write_bytes(msgspec.json.encode(notes))

    async def land(self, seconds: Sequence[int], value: float) -> list[UUID]:
        """Land payloads for some seconds, the first one alone, the others in a batch."""
        first, *others = [payload(second, value) for second in seconds]
        raw_ids = list(await self.store.land(first))
        return raw_ids + list(await self.store.land(**lines(*others)) if others else [])

    async def process(self) -> None:
        await Processor(self.store.portable(), self.table.backend, batch=7).process()

    async def run(self, *arguments: object, **more: object):
        return await asyncio.to_thread(self.program.run, *arguments, **(self.variables | more))

    async def verify(self, *arguments: object, code: int = OK) -> ProofSummary:
        done = await self.run(*(arguments or ("verify",)), "--json")
        assert_silent(done, code)
        return summary_of(done)


class Table:
    """A table that several nodes share."""

    def __init__(self, home: Path, backend: Backend, variables: dict[str, object]) -> None:
        self.home = home
        self.backend = backend
        self.variables = variables
        self.nodes: list[Node] = []

    async def node(self, number: int | None, name: str = "", mark: int = 0) -> Node:
        made = Node(self.home, self, number, name or f"node-{number}")
        self.nodes.append(made)
        if mark:
            made.mark(mark)
        return await made.opened()

    async def rows(self) -> list[Measurement]:
        return await self.backend.find(limit=100_000)

    async def close(self) -> None:
        for node in self.nodes:
            await node.store.close()
            node.program.close()
        await self.backend.close()


@pytest.fixture(params=["sqlite", "postgres"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Table:
    """A table in a SQLite file, or in PostgreSQL."""
    if request.param == "postgres":
        url = request.getfixturevalue("postgres_url")
        return Table(tmp_path, PostgresBackend(url), {"DROPZONE_DATABASE_URL": url})
    file = tmp_path / "rows.sqlite"
    return Table(tmp_path, SqliteBackend(file), {"DROPZONE_STORAGE_SQLITE_PATH": file})


@pytest.fixture
async def table(place: Table) -> AsyncIterator[Table]:
    """The same, opened."""
    await place.backend.open()
    yield place
    await place.close()


sqlite = pytest.mark.parametrize("place", ["sqlite"], indirect=True)


async def filled(table: Table, *numbers: int | None) -> list[Node]:
    """Let nodes land in turn, for seconds that partly are the same, and process all of it."""
    nodes = [await table.node(number) for number in numbers]
    for turn in range(3):
        for at, node in enumerate(nodes):
            first = 3 * at + 4 * turn
            await node.land(range(first, first + 7), 10 * turn + at)
    for node in reversed(nodes):
        await node.process()
    return nodes


# ── Proof ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("numbers", [(1, 2), (None, 65535)])
async def test_each_row_is_checked_by_exactly_one(table: Table, numbers: tuple[int | None, int]):
    """Each node proves its own rows, and all of them together prove every row, each once."""
    nodes = await filled(table, *numbers)
    rows = await table.rows()
    of_each = [sum(row.raw_id.int & 0xFFFF == (number or 0) for row in rows) for number in numbers]
    assert sum(of_each) == len(rows)
    for node, own, others in zip(nodes, of_each, reversed(of_each), strict=True):
        assert own > 2
        summary = await node.verify()
        assert (summary.node, summary.right, summary.wrong) == (node.store.node, own, {})
        assert summary.unprovable == {"elsewhere": others}
    told = (await nodes[1].run("verify")).stdout
    assert f"{of_each[0]:>11} elsewhere: " in told
    assert "all rows are right" not in told
    assert told.splitlines()[-1] == "all rows of this node are right"
    assert await table.rows() == rows


async def test_what_is_wrong_is_the_affair_of_its_node(table: Table):
    """A row that was tampered with or deleted is found and mended by its own node, and no other."""
    one, two = await filled(table, 1, 2)
    rows = await table.rows()
    of_two = [row for row in rows if two.store.nodes().elsewhere(row.raw_id) is None]
    changed, lost = of_two[0], of_two[-1]
    await table.backend.delete([changed, lost])
    await table.backend.upsert([msgspec.structs.replace(changed, mean=99.0)])
    for arguments in (("verify",), ("rebuild", "--delete-orphans")):
        before = await table.rows()
        summary = await one.verify(*arguments)
        assert (summary.wrong, summary.set_right.get("differing")) == ({}, None)
        assert [row for row in await table.rows() if row.timestamp_utc != lost.timestamp_utc] == [
            row for row in before if row.timestamp_utc != lost.timestamp_utc
        ]
    summary = await two.verify("rebuild")
    assert summary.set_right["differing"] == 1
    assert await table.rows() == rows


async def test_only_a_later_payload_supersedes(table: Table):
    """Another node's row stays where this one's payload is earlier, and goes where it is later."""
    one, two = await table.node(1), await table.node(2)
    [earlier] = await one.land([0], 1)
    [theirs] = await two.land([0], 2)
    await two.process()
    await one.process()
    assert (await one.verify()).unprovable == {"elsewhere": 1}
    [later] = await one.land([0], 3)
    [row] = await table.rows()
    await one.process()
    [newest] = await table.rows()
    assert (row.raw_id, newest.raw_id) == (theirs, later)
    await table.backend.delete([newest])
    await table.backend.upsert([row])
    assert (await two.verify()).right == 1
    assert (await one.verify(code=AMISS)).wrong == {"superseded": 1}
    assert (await one.verify("rebuild")).set_right == {"superseded": 1}
    assert await table.rows() == [newest]
    assert (await two.verify()).unprovable == {"elsewhere": 1}
    assert earlier < theirs < later


@sqlite
async def test_a_payload_that_is_lost(table: Table):
    """What a node has landed itself and lost is orphaned, whatever its number was and is now."""
    one, two = await filled(table, 1, 2)
    await one.land([50], 1)
    await one.process()
    await one.store.close()
    again = await table.node(9, "node-1")
    await again.land([52], 1)
    await again.process()
    assert (await again.verify()).wrong == {}
    shutil.rmtree(again.folder / "processed")
    lost = await again.verify(code=AMISS)
    assert lost.right == 0
    assert lost.unprovable["orphaned"] > 2
    assert lost.unprovable["orphaned"] + lost.unprovable["elsewhere"] == len(await table.rows())
    assert lost.unprovable["elsewhere"] == (await two.verify()).right


@sqlite
async def test_payloads_that_were_moved(table: Table):
    """Payloads that were moved to another node's folder are that node's, with their raw_ids."""
    one, two = await filled(table, 1, 2)
    rows = await table.rows()
    of_two = (await two.verify()).right
    shutil.copytree(two.folder / "processed", one.folder / "processed", dirs_exist_ok=True)
    summary = await one.verify()
    assert (summary.right, summary.unprovable) == (len(rows), {})
    assert "all rows are right" in (await one.run("verify")).stdout
    shutil.rmtree(two.folder / "processed")
    (two.folder / "processed").mkdir()
    assert of_two == (await two.verify(code=AMISS)).unprovable["orphaned"]


@sqlite
async def test_a_single_node_hears_nothing_of_it(table: Table):
    """Where no number is set nothing is said of nodes, and lost payloads are orphaned, as ever."""
    [node] = await filled(table, None)
    rows = len(await table.rows())
    assert (await node.verify()).unprovable == {}
    told = (await node.run("verify")).stdout
    assert "node" not in "\n".join(told.splitlines()[1:])
    assert told.splitlines()[-1] == "all rows are right"
    shutil.rmtree(node.folder / "processed")
    assert (await node.verify(code=AMISS)).unprovable == {"orphaned": rows}
    assert "this is node" not in (await node.run("check")).stdout


# ── HTTP ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., object]]:
    """Serve the folders of nodes."""
    stops = []

    async def start(node: Node) -> Service:
        await node.store.close()
        config = Config(raw=RawConfig(dir=node.store.raw), node=NodeConfig(id=node.store.node))
        runner = web.AppRunner(create_app(config, backend=node.table.backend), access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        session = ClientSession()
        stops.extend([runner.cleanup, session.close])
        [(host, port)] = runner.addresses
        return Service(f"http://{host}:{port}", session, node.folder)

    yield start
    for stop in reversed(stops):
        await stop()


@sqlite
async def test_receipts_of_another_node(table: Table, serve: Callable[..., object]):
    """The receipt and the payload of another node's raw_id are 404, with the node's number."""
    one, two = await filled(table, 1, 2)
    raw_ids = [await two.land([60], 1), await two.land([61, 62], 1)]
    alone, in_batch = raw_ids[0][0], raw_ids[1][1]
    service = await serve(one)
    for raw_id in (alone, in_batch):
        for tail in ("", "/payload"):
            answer = await service("GET", f"/raw/{raw_id}{tail}")
            document = check_problem(answer, 404, "raw_id_elsewhere")
            assert document["node"] == 2
            assert "node 2" in document["detail"]
    unknown = UUID(int=alone.int - 1)  # of node 1, which never gave it out
    document = check_problem(await service("GET", f"/raw/{unknown}"), 404, "raw_id_unknown")
    assert "node" not in document
    assert (await service("GET", "/status")).json["node"] == 1
    landed = await service.land(msgspec.json.decode(body(63)))
    assert landed.endswith("0001")


@sqlite
async def test_status_without_a_number(table: Table, serve: Callable[..., object]):
    """A Dropzone without a number says so, and that nothing is wrong with it."""
    service = await serve(await table.node(None))
    status = (await service("GET", "/status")).json
    assert (status["node"], status["node_trouble"]) == (None, None)


# ── Two with one number ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("number", [None, 0, 3])
async def test_two_with_one_number(
    table: Table, number: int | None, serve: Callable[..., object], caplog: pytest.LogCaptureFixture
):
    """Each of two nodes with one number hears of it: by the log, by /status and by `check`."""
    one = await table.node(number, "one", mark=1)
    two = await table.node(number, "two", mark=2)
    await one.land([0, 1], 1)
    await one.process()
    assert not caplog.records
    assert (await one.run("check")).returncode == OK
    [_, last] = await two.land([2, 3], 2)
    await two.process()
    said = f"as node {number or 0}, too, as the row of "
    assert [said in record.getMessage() for record in caplog.records] == [True]
    for node in (one, two):
        checked = await node.run("check")
        assert checked.returncode == CONFIGURATION
        assert said in checked.stdout
    await one.land([4], 1)
    await one.process()
    service = await serve(one)
    trouble = (await service("GET", "/status")).json["node_trouble"]
    assert said + str(last) in trouble
    hour_ago = uuid_at(datetime.now(UTC) - timedelta(hours=1))
    for past in (Twin(number or 0, hour_ago), Twin(99, last)):
        (one.folder / "journal" / "twin.json").write_bytes(msgspec.json.encode(past))
        assert (await service("GET", "/status")).json["node_trouble"] is None


async def test_no_false_alarm(table: Table, caplog: pytest.LogCaptureFixture):
    """Other nodes, lost, deleted and restored payloads, and another number now, are no twins."""
    one, two = await table.node(1, mark=1), await table.node(2, mark=2)
    nobody = await table.node(None, mark=3)
    for node in (one, two, nobody):
        await node.land([node.store.node or 0, 7], 1)
        await node.process()
    with one.store.new_backup(one.folder / "backup") as part:
        list(one.store.back_up(part))
    await one.land([10, 11], 1)
    await one.process()
    await one.store.close()
    for state in ("raw", "processed", "journal"):  # the payloads behind the backup are lost
        shutil.rmtree(one.folder / state)
        shutil.copytree(one.folder / "backup" / state, one.folder / state)
    restored = await table.node(1)
    await restored.land([12], 1)
    await restored.process()
    shutil.rmtree(two.folder / "processed")  # by hand
    await two.land([13], 1)
    await two.process()
    await two.store.close()
    renamed = await table.node(5, "node-2")
    await renamed.land([14], 1)
    await renamed.process()
    assert not caplog.records
    for node in (restored, renamed, nobody):
        assert (await node.run("check")).returncode == OK


@sqlite
async def test_a_folder_that_was_begun_anew(table: Table, caplog: pytest.LogCaptureFixture):
    """A node that lost its folder, and goes on with an empty one, is no twin of its former self."""
    before = await table.node(4, "before")
    await before.land([0, 1, 2], 1)
    await before.process()
    await before.store.close()
    shutil.rmtree(before.folder)
    anew = await table.node(4, "before")
    await anew.land([5], 1)
    await anew.process()
    assert not caplog.records
    assert (await anew.verify(code=AMISS)).unprovable == {"orphaned": 3}
    checked = await anew.run("check")
    assert checked.returncode == OK
    assert "note   this is node 4" in checked.stdout
    unset = Program(anew.folder.parent)
    variables = {name: at for name, at in anew.variables.items() if name != "DROPZONE_NODE_ID"}
    told = await asyncio.to_thread(unset.run, "check", **variables)
    assert "[node] id is not set here, and this folder was that of node 4" in told.stdout
    unset.close()


# ── The command line ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.close()


def test_each_way_in(program: Program):
    """What the server and `ingest` land names the node, and both know whose it is."""
    server = Server(program, DROPZONE_NODE_ID=258)
    raw_ids = [server.json("POST", "/ingest", body())["raw_id"]]
    raw_ids += server.json("POST", "/ingest", b"[%s,%s]" % (body(1), body(2)))["raw_ids"]
    assert server.stop() == OK
    done = program.run("ingest", "-", stdin=body(3) + b"\n" + body(4), DROPZONE_NODE_ID=258)
    raw_ids += done.stdout.split()
    assert len(raw_ids) == 5
    assert {raw_id[-4:] for raw_id in raw_ids} == {"0102"}
    notes = read_numbers(program.home / "data" / "journal")
    assert notes is not None
    assert notes.numbers == (258,)


@pytest.mark.parametrize("number", ["-1", "65536", "x", "1.5"])
def test_numbers_that_are_none(program: Program, number: str):
    """A number beyond 16 bits is refused by the name of its setting."""
    done = program.run("check", DROPZONE_NODE_ID=number)
    assert done.returncode == CONFIGURATION
    assert "DROPZONE_NODE_ID" in done.stderr
