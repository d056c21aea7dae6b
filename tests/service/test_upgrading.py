"""Upgrading: the new code on the data folder that an older version has left, killed under way."""

import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from test_cli import OK, Program, Server

from backends.raw import uuid_at

KEPT = sorted((Path(__file__).parents[1] / "kept").glob("*.tar.gz"))
PACKED = UUID("01890a5d-ac96-774b-bcce-b302099a8057")
SUPERSEDED = UUID("01a213a7-8f7b-70c5-8052-60e09af2c4bb")
WINNER = UUID("01a213a7-8f83-708d-ad5d-2d42aba91797")
REJECTED = UUID("01a213a7-8f8b-705e-97d0-27cc5b1d2b32")
PUT_BACK = UUID("01a213a7-8f92-7360-9a2d-6131793932cf")
PENDING = UUID("01a213a7-8fae-70d3-bf42-553f42928983")
IN_THE_JOURNAL = UUID("01a213a7-8fb6-77fc-b1f8-358592c29f58")
BODIES = {
    PACKED: b'{"time_stamp": "2023-06-30T03:00:00Z", "data": [2, 4]}\r\n',
    SUPERSEDED: b'{"time_stamp": "2019-05-01T06:00:00-04:00", "data": [1, 2, 3, 4]}',
    WINNER: b'{"time_stamp": "2019-05-01T06:00:00-04:00", "data": [5]}',
    REJECTED: b'{"time_stamp": "2019-05-01T06:00:01-04:00", "data": ["x"]}',
    PUT_BACK: b'{"time_stamp": "2019-05-01T06:00:02-04:00"}',
    PENDING: b'{"time_stamp": "2019-05-01T06:00:03-04:00", "data": [7]}',
    IN_THE_JOURNAL: b'{"time_stamp": "2019-05-01T06:00:04-04:00", "data": [8]}',
}


@pytest.fixture(params=KEPT, ids=lambda path: path.name.removesuffix(".tar.gz"))
def program(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Program]:
    """The new program on a copy of the old folder."""
    with tarfile.open(request.param) as kept:
        kept.extractall(tmp_path, filter="data")
    made = Program(tmp_path)
    yield made
    made.close()


def receipt(server: Server, raw_id: UUID) -> dict[str, Any]:
    found = server.json("GET", f"/raw/{raw_id}")
    assert isinstance(found, dict)
    return found


def test_payloads(program: Program):
    """Each payload is there, byte for byte and in its state, also what the journal alone had."""
    server = Server(program)
    for raw_id, body in BODIES.items():
        assert server.request("GET", f"/raw/{raw_id}/payload")[2] == body
    states = {raw_id: receipt(server, raw_id)["state"] for raw_id in BODIES}
    assert states == {
        PACKED: "processed",
        SUPERSEDED: "processed",
        WINNER: "processed",
        REJECTED: "rejected",
        PUT_BACK: "pending",
        PENDING: "pending",
        IN_THE_JOURNAL: "pending",
    }
    assert receipt(server, SUPERSEDED)["superseded_by"] == str(WINNER)
    assert receipt(server, REJECTED)["rejection"]["code"] == "value_not_numeric"
    assert receipt(server, PUT_BACK)["rejection"]["retries"] == 1
    assert server.json("GET", "/status")["processed"] == 3
    assert server.stop() == OK


def test_rows(program: Program):
    """The rows are those of before, right for `verify`, and processing goes on behind them."""
    server = Server(program)
    before = server.json("GET", "/measurements")["measurements"]
    assert [(row["raw_id"], row["mean"]) for row in before] == [
        (str(WINNER), 5.0),
        (str(PACKED), 3.0),
    ]
    result = server.json("POST", "/process")
    assert (result["processed"], result["failed"], result["remaining"]) == (2, 1, 0)
    assert server.stop() == OK
    assert program.run("verify").returncode == OK


def test_raw_ids_go_on(program: Program):
    """A new payload comes behind all that were landed before, whatever the clock says."""
    server = Server(program)
    raw_id = UUID(server.json("POST", "/ingest", b"{}")["raw_id"])
    assert raw_id > max(BODIES)
    assert server.stop() == OK


def test_keys(program: Program):
    """An Idempotency-Key that is less than a day old still gives its first answer."""
    hour_ago = uuid_at(datetime.now(UTC) - timedelta(hours=1))
    with closing(sqlite3.connect(program.home / "data" / "journal" / "keys.sqlite")) as keys:
        keys.execute(
            "INSERT INTO keys (key, digest, raw_ids, landed) "
            "SELECT 'an hour old', digest, ?, landed FROM keys WHERE key = 'kept'",
            (hour_ago.bytes,),
        )
        keys.commit()
    server = Server(program)
    answer = server.json("POST", "/ingest", BODIES[WINNER], Idempotency_Key="an hour old")
    assert answer["raw_id"] == str(hour_ago)
    assert server.request("POST", "/ingest", b"{}", Idempotency_Key="an hour old")[0] == 422
    assert server.stop() == OK
