"""Upgrading: the new code on data folders that other versions have left, killed under way."""

import json
import sqlite3
import tarfile
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from kept.keep import BODIES, keep
from test_cli import DROPZONE, OK, Program, Server

from backends.raw import uuid_at

FOLDER = DROPZONE.parent / "tests" / "kept"
TODAY = "today"
VERSIONS = [*sorted(path.name.removesuffix(".tar.gz") for path in FOLDER.glob("*.tar.gz")), TODAY]
STATES = {
    "packed": "processed",
    "superseded": "processed",
    "winner": "processed",
    "rejected": "rejected",
    "put back": "pending",
    "pending": "pending",
    "line 1": "pending",
    "line 2": "pending",
    "in the journal": "pending",
}


class Kept(Program):
    """The new program on a copy of a kept folder; `raw_ids` are those of its payloads by name."""

    def __init__(self, archive: Path, home: Path) -> None:
        super().__init__(home)
        with tarfile.open(archive) as kept:
            kept.extractall(home, filter="data")
        payloads = json.loads((home / "payloads.json").read_text())
        self.raw_ids = {name: UUID(payload["raw_id"]) for name, payload in payloads.items()}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The kept folder of each version, and one that today's code makes."""
    made = tmp_path_factory.mktemp("kept") / "today.tar.gz"
    keep(DROPZONE, made)
    return {version: FOLDER / f"{version}.tar.gz" for version in VERSIONS} | {TODAY: made}


@pytest.fixture(params=VERSIONS)
def program(
    request: pytest.FixtureRequest, archives: dict[str, Path], tmp_path: Path
) -> Iterator[Kept]:
    made = Kept(archives[request.param], tmp_path)
    yield made
    made.close()


def receipt(server: Server, raw_id: UUID) -> dict[str, Any]:
    found = server.json("GET", f"/raw/{raw_id}")
    assert isinstance(found, dict)
    return found


def test_check(program: Kept):
    """`check` finds nothing wrong with the folder before the new version is started on it."""
    shown = program.run("check").stdout
    assert "ok     data folder" in shown
    assert "ok     backend" in shown


def test_payloads(program: Kept):
    """Each payload is there, byte for byte and in its state, also what the journal alone had."""
    server = Server(program)
    for name, raw_id in program.raw_ids.items():
        payload = server.request("GET", f"/raw/{raw_id}/payload")
        assert payload[2] == BODIES[name].encode(), name
    receipts = {name: receipt(server, raw_id) for name, raw_id in program.raw_ids.items()}
    assert {name: found["state"] for name, found in receipts.items()} == STATES
    assert receipts["superseded"]["superseded_by"] == str(program.raw_ids["winner"])
    assert receipts["rejected"]["rejection"]["code"] == "value_not_numeric"
    assert receipts["put back"]["rejection"]["retries"] == 1
    assert server.json("GET", "/status")["processed"] == 3
    assert server.stop() == OK


def test_rows(program: Kept):
    """The rows are those of before, right for `verify`, and processing goes on behind them."""
    server = Server(program)
    before = server.json("GET", "/measurements")["measurements"]
    assert [(row["raw_id"], row["mean"]) for row in before] == [
        (str(program.raw_ids["winner"]), 5.0),
        (str(program.raw_ids["packed"]), 3.0),
    ]
    result = server.json("POST", "/process")
    assert (result["processed"], result["failed"], result["remaining"]) == (4, 1, 0)
    assert server.stop() == OK
    proof = program.run("verify")
    assert proof.returncode == OK, proof.stdout
    assert "6 right" in proof.stdout


def test_raw_ids_go_on(program: Kept):
    """A new payload comes behind all that were landed, also where the old clock was ahead."""
    ahead = uuid_at(datetime.now(UTC) + timedelta(hours=1))
    last = program.home / "data" / "journal" / "last_raw_id"
    assert UUID(bytes=last.read_bytes()[:16]) >= program.raw_ids["in the journal"]
    last.write_bytes(ahead.bytes)
    server = Server(program)
    assert UUID(server.json("POST", "/ingest", b"{}")["raw_id"]) > ahead
    assert server.stop() == OK


def test_keys(program: Kept):
    """An Idempotency-Key that is less than a day old still gives its first answer.

    So it does when the first API key is made meanwhile.
    """
    hour_ago = uuid_at(datetime.now(UTC) - timedelta(hours=1))
    with closing(sqlite3.connect(program.home / "data" / "journal" / "keys.sqlite")) as keys:
        keys.row_factory = sqlite3.Row
        kept = dict(keys.execute("SELECT * FROM keys WHERE key = 'kept'").fetchone())
        recent = kept | {"key": "recent", "raw_ids": hour_ago.bytes}
        recent.pop("checksum", None)  # which is that of the key as it was
        columns, values = ", ".join(recent), ", ".join("?" * len(recent))
        keys.execute(f"INSERT INTO keys ({columns}) VALUES ({values})", (*recent.values(),))
        keys.commit()
    server = Server(program)
    body = BODIES["winner"].encode()
    answer = server.json("POST", "/ingest", body, Idempotency_Key="recent")
    assert answer["raw_id"] == str(hour_ago)
    assert server.request("POST", "/ingest", b"{}", Idempotency_Key="recent")[0] == 422
    assert server.stop() == OK
    closed = Server(program, DROPZONE_API_KEY="sesam")
    keyed = {"Idempotency_Key": "recent", "x_api_key": "sesam"}
    assert closed.json("POST", "/ingest", body, **keyed)["raw_id"] == str(hour_ago)
    assert closed.stop() == OK
