"""Series: several devices, each with a row of measurements of its own."""

import asyncio
import json
import pickle
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from power_cut import wait_for
from test_cli import OK, Program, Server
from test_processing import Folder, arrival, processor_of

from backends import BackendUnavailable, Measurement, Series, timestamp_text
from backends.memory import MemoryBackend
from backends.raw import uuid_at
from dropzone import (
    ConfigError,
    DataQualityError,
    PayloadNotJson,
    Proof,
    SeriesAt,
    SeriesCount,
    SeriesLately,
    TransformConfig,
    load_config,
    series_in,
    transform,
)

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
RAW_ID = uuid_at(NOON)
LARGE = 70_000  # bytes, which is more than is transformed at once


def payload(**members: Any) -> bytes:
    """Return a payload with members besides those that it needs."""
    return json.dumps({"time_stamp": NOON.isoformat(), "data": [1, 3], **members}).encode()


def outcome(body: bytes, at: str = "id") -> str:
    """Return the series of the measurement that a payload becomes, or the code of the refusal."""
    try:
        return transform(RAW_ID, body, TransformConfig(series=SeriesAt(at))).series
    except DataQualityError as error:
        return f"! {error.code}"


def sizes(body: bytes) -> list[bytes]:
    """Return a payload as it is, odd, large, and both: each is read in a way of its own."""
    odd = body[:-1] + b', "odd": NaN}'
    large = b', "more": "%s"}' % (b"x" * LARGE)
    return [body, odd, body[:-1] + large, odd[:-1] + large]


@pytest.mark.parametrize(
    ("json_text", "expected"),
    [
        ('"a"', "a"),
        ('"Büro 7/3"', "Büro 7/3"),
        (r'"B\u00fcro"', "Büro"),
        ('" a "', " a "),
        ('"%s"' % ("x" * 200), "x" * 200),
        ("7", "7"),
        ("-7", "-7"),
        ("-0", "0"),
        ("18446744073709551616", "18446744073709551616"),
        ("9" * 200, "9" * 200),
        ('"%s"' % ("x" * 201), "! series_invalid"),
        ("9" * 201, "! series_invalid"),
        ("9" * 5000, "! series_invalid"),
        ('""', "! series_invalid"),
        (r'"a\u0000"', "! series_invalid"),
        (r'"a\nb"', "! series_invalid"),
        (r'"a\ud800"', "! series_invalid"),
        ("1.0", "! series_invalid"),
        ("1e3", "! series_invalid"),
        ("NaN", "! series_invalid"),
        ("true", "! series_invalid"),
        ("null", "! series_invalid"),
        ('["a"]', "! series_invalid"),
        ('{"a": 1}', "! series_invalid"),
    ],
)
def test_what_names_a_series(json_text: str, expected: str):
    """Text of 1 to 200 printable characters does, and a whole number; whatever the size."""
    for body in sizes(payload(id="x").replace(b'"x"', json_text.encode())):
        assert outcome(body) == expected


def test_a_name_of_surrogate_pairs():
    """A name beyond the first plane is read however it is escaped."""
    body = payload(id="🌡 1")
    assert rb"\ud83c" in body
    small, odd, large, both = sizes(body)
    assert [outcome(each) for each in (small, odd, large)] == ["🌡 1"] * 3
    assert outcome(both) == "! series_invalid"  # rather than another name


@pytest.mark.parametrize(
    ("at", "members", "expected"),
    [
        ("id", {"id": "a"}, "a"),
        ("/id", {"id": "a"}, "a"),
        ("/device/id", {"device": {"id": "a", "more": [1]}}, "a"),
        ("device/id", {"device/id": "a", "device": {"id": "b"}}, "a"),
        ("/a~1b/c~0d", {"a/b": {"c~d": "a"}}, "a"),
        ("/~01", {"~1": "a"}, "a"),
        ("/gateways/1/id", {"gateways": [{"id": "a"}, {"id": "b"}]}, "b"),
        ("/gateways/01/id", {"gateways": [{"id": "a"}, {"id": "b"}]}, "! series_missing"),
        ("/gateways/2/id", {"gateways": [{"id": "a"}, {"id": "b"}]}, "! series_missing"),
        ("/0", {"0": "a"}, "a"),
        ("/device/", {"device": {"": "a"}}, "a"),
        ("größe", {"größe": "a"}, "a"),
        ("id", {}, "! series_missing"),
        ("id", {"ID": "a", "device": {"id": "b"}}, "! series_missing"),
        ("/device/id", {"device": {}}, "! series_missing"),
        ("/device/id", {"device": 7}, "! series_missing"),
        ("/device/id", {"device": None}, "! series_missing"),
    ],
)
def test_places(at: str, members: dict[str, Any], expected: str):
    """A name is that of a member; a JSON Pointer reaches into objects and arrays (RFC 6901)."""
    for body in sizes(payload(**members)):
        assert outcome(body, at) == expected


def test_of_equal_names_the_last_counts():
    """As for all members: so that whoever looks at the payload sees the same."""
    for body in sizes(payload(id="a")[:-1] + b', "id": "b"}'):
        assert outcome(body) == "b"
    for body in sizes(payload(device={"id": "a"})[:-1] + b', "device": {}}'):
        assert outcome(body, "/device/id") == "! series_missing"
    for body in sizes(payload(id="a")[:-1] + rb', "\u0069d": 1.5}'):
        assert outcome(body) == "! series_invalid"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200)
@given(JSON, st.booleans())
def test_any_value(value: object, is_ascii: bool):
    """Whatever is there, it is read alike in every size, and is a good name or refused."""
    text = json.dumps({"id": value}, ensure_ascii=is_ascii).encode(errors="surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    body = payload()[:-1] + b"," + text[1:]
    found = [outcome(each) for each in sizes(body)]
    if "\\u" not in text.decode():
        assert len(set(found)) == 1
    if type(value) is int or (isinstance(value, str) and value.isprintable() and value):
        assert found[0] == (str(value) if len(str(value)) <= 200 else "! series_invalid")
    else:
        assert found[0] == "! series_invalid"


def test_without_the_setting():
    """Nobody looks for a series, and the row has none."""
    assert transform(RAW_ID, payload(id=[None])).series == ""
    assert series_in(b"no JSON at all", SeriesAt()) == ""
    with pytest.raises(PayloadNotJson):
        series_in(b"no JSON at all", SeriesAt("id"))


def test_reasons_name_the_place_and_the_remedy():
    """Whoever reads a reason knows which member it is about, what was sent, and what to send."""
    at = SeriesAt("/device/id")
    with pytest.raises(DataQualityError, match=r"no /device/id, .* send a text of 1 to 200"):
        series_in(payload(), at)
    with pytest.raises(DataQualityError, match=r"/device/id is 1.5, .*or a whole number"):
        series_in(payload(device={"id": 1.5}), at)
    with pytest.raises(DataQualityError, match=r"/device/id is null, .*send a text"):
        series_in(payload(device={"id": None}), at)


@pytest.mark.parametrize(
    "text",
    [
        " id",
        "id\n",
        'i"d',
        "i\\d",
        "/",
        "#/device/id",
        "$.device.id",
        "/device/~id",
        "/device/~2",
        "/device~",
        "time_stamp",
        "/data/0",
    ],
)
def test_wrong_settings(monkeypatch: pytest.MonkeyPatch, text: str):
    """What can name no series is refused before anything is done with it, and named."""
    monkeypatch.setenv("DROPZONE_TRANSFORM_SERIES", text)
    with pytest.raises(ConfigError, match=r"DROPZONE_TRANSFORM_SERIES: .*transform\.series"):
        load_config()


def test_the_setting_travels(monkeypatch: pytest.MonkeyPatch):
    """It is read from a variable, and other processes go by the same rules."""
    monkeypatch.setenv("DROPZONE_TRANSFORM_SERIES", "/device/a~1b")
    rules = load_config().transform
    assert rules.series.names == ("device", "a/b")
    assert pickle.loads(pickle.dumps(rules)).series.names == ("device", "a/b")  # noqa: S301


# ── As a stranger would try it ────────────────────────────────────────────────────────────────────

SET = {"DROPZONE_TRANSFORM_SERIES": "device"}


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.close()


def of_device(device: object, second: int, value: float) -> bytes:
    """Return the payload of a device."""
    at = (NOON + timedelta(seconds=second)).isoformat()
    return json.dumps({"time_stamp": at, "data": [value], "device": device}).encode()


def at(second: int) -> str:
    """Return the timestamp that such a payload has."""
    return timestamp_text(NOON + timedelta(seconds=second))


def land(server: Server, *bodies: bytes) -> list[str]:
    """Land payloads one after another; return their raw_ids."""
    return [json.loads(server.request("POST", "/ingest", body)[2])["raw_id"] for body in bodies]


def code_of(server: Server, path: str) -> tuple[int, str]:
    status, _, text = server.request("GET", path)
    return status, json.loads(text)["code"]


def followed(server: Server, path: str) -> list[tuple[str, str]]:
    """Follow Link from page to page; return the timestamp and the series of each row."""
    found, link = list[tuple[str, str]](), path
    while link:
        _, headers, text = server.request("GET", link)
        found += [(row["timestamp_utc"], row["series"]) for row in json.loads(text)["measurements"]]
        link = headers["Link"].split(">")[0][1:] if "Link" in headers else ""
    return found


def test_two_devices_without_the_setting(program: Program):
    """The later payload stands, the answer counts the other, and reads know no series."""
    server = Server(program)
    first, second = land(server, of_device("a", 0, 1), of_device("b", 0, 2))
    result = server.json("POST", "/process")
    assert (result["processed"], result["superseded"]) == (2, 1)
    assert server.json("GET", "/measurements") == {
        "measurements": [{"timestamp_utc": at(0), "mean": 2.0, "std_dev": 0.0, "raw_id": second}],
        "next": None,
    }
    assert server.json("GET", f"/raw/{first}")["superseded_by"] == second
    status = server.json("GET", "/status")
    assert (status["superseded"], status["series"]) == (1, None)
    assert b"dropzone_superseded_total 1.0" in server.request("GET", "/metrics")[2]
    for path in ("/measurements?series=a", "/measurements/summary?series=a"):
        assert code_of(server, path) == (400, "series_unset")
    assert code_of(server, f"/measurements/{at(0)}?series=a") == (400, "series_unset")
    assert code_of(server, f"/measurements?after={at(0)}/a") == (400, "series_unset")
    assert code_of(server, "/series") == (404, "series_unset")
    assert server.request("GET", "/measurements?format=csv")[2].startswith(b"timestamp_utc,mean,")
    assert server.stop() == OK


def test_two_devices_with_the_setting(program: Program):
    """Each has its row, every read can be of one of them, and nothing is superseded."""
    server = Server(program, **SET)
    first, second, _, bad = land(
        server,
        of_device("a", 0, 1),
        of_device("b/2", 0, 2),
        of_device(7, 1, 3),
        of_device(None, 1, 4),
    )
    result = server.json("POST", "/process")
    assert (result["processed"], result["superseded"]) == (3, 0)
    assert [(each["raw_id"], each["code"]) for each in result["rejected"]] == [
        (bad, "series_invalid")
    ]
    rows = server.json("GET", "/measurements")["measurements"]
    assert [(row["timestamp_utc"], row["series"]) for row in rows] == [
        (at(0), "a"),
        (at(0), "b/2"),
        (at(1), "7"),
    ]
    assert server.json("GET", "/measurements?series=b/2")["measurements"] == rows[1:2]
    assert server.json("GET", "/measurements?series=unknown")["measurements"] == []
    assert server.json("GET", f"/measurements/{at(0)}?series=a") == rows[0]
    assert server.json("GET", f"/measurements/{at(1)}") == rows[2]
    status, _, text = server.request("GET", f"/measurements/{at(0)}")
    assert (status, json.loads(text)["known"]) == (400, ["a", "b/2"])
    assert code_of(server, f"/measurements/{at(1)}?series=a") == (404, "measurement_not_found")
    [bucket] = server.json("GET", "/measurements/summary?series=a&buckets=1")["buckets"]
    assert (bucket["count"], bucket["mean"]) == (1, 1.0)
    csv = server.request("GET", "/measurements?format=csv&series=a")[2].decode()
    assert csv == (f"series,timestamp_utc,mean,std_dev,raw_id\r\na,{at(0)},1.0,0.0,{first}\r\n")
    receipt = server.json("GET", f"/raw/{first}")
    assert (receipt["measurement"], receipt["superseded_by"]) == (rows[0], None)
    assert server.json("GET", f"/raw/{second}")["measurement"] == rows[1]
    assert server.json("GET", "/series") == {
        "series": [
            {"series": "7", "last": at(1)},
            {"series": "a", "last": at(0)},
            {"series": "b/2", "last": at(0)},
        ],
        "next": None,
    }
    page = server.json("GET", "/series?limit=2")
    assert ([each["series"] for each in page["series"]], page["next"]) == (["7", "a"], "a")
    assert [each["series"] for each in server.json("GET", "/series?after=a")["series"]] == ["b/2"]
    status = server.json("GET", "/status")
    assert status["series"] == {"count": 3, "silent_for_an_hour": 3}
    shown = server.request("GET", "/metrics")[2]
    assert b"dropzone_series 3.0\n" in shown
    assert b"dropzone_series_silent 3.0\n" in shown
    assert b"b/2" not in shown
    assert server.stop() == OK


def test_pages_of_many_series(program: Program):
    """Pages divide the rows of one timestamp, and show each once, in order, both ways."""
    server = Server(program, **SET)
    names = ["null", "a b", "a&b", "a/b", "a+b", "%41", "ü", "#", "T", "10:00"]
    land(server, *(of_device(name, second, 1) for second in range(2) for name in names))
    server.json("POST", "/process")
    expected = [(at(second), name) for second in range(2) for name in sorted(names)]
    for limit in (1, 3, 7, 20):
        assert followed(server, f"/measurements?limit={limit}") == expected
        assert followed(server, f"/measurements?limit={limit}&order=desc") == expected[::-1]
    after = ""
    found = list[tuple[str, str]]()
    while after is not None:
        page = server.json("GET", f"/measurements?limit=3{after and f'&after={quote(after)}'}")
        found += [(row["timestamp_utc"], row["series"]) for row in page["measurements"]]
        after = page["next"]
    assert found == expected
    for name in names:
        assert followed(server, f"/measurements?limit=1&series={quote(name)}") == [
            (at(0), name),
            (at(1), name),
        ]
    assert code_of(server, "/measurements?series=a%00") == (400, "query_invalid")
    assert code_of(server, "/measurements?after_series=a") == (400, "query_invalid")
    assert code_of(server, f"/measurements?after={at(0)}/a&after_series=a")[0] == 400
    assert server.stop() == OK


def test_many_collisions_are_said(program: Program):
    """Once they are many, and as long as there is one series, the log names the setting."""
    for count, is_said in ((9, False), (10, True)):
        home = program.home / f"of_{count}"
        home.mkdir()
        lines = [of_device(name, second, ord(name)) for second in range(count) for name in "ab"]
        (home / "all.ndjson").write_bytes(b"\n".join(lines))
        variables = {"DROPZONE_RAW_DIR": home / "raw", "DROPZONE_STORAGE_SQLITE_PATH": home / "db"}
        program.run("ingest", home / "all.ndjson", **variables)
        done = program.run("process", **variables)
        assert json.loads(done.stdout)["superseded"] == count
        assert ("[transform] series" in done.stderr) == is_said


def test_corrections_are_not_said_to_be_devices(program: Program):
    """Where few of many payloads supersede another, the log does not speak of devices."""
    lines = [of_device("a", second, 1) for second in range(1000)]
    lines += [of_device("a", second, 2) for second in range(10)]
    (program.home / "all.ndjson").write_bytes(b"\n".join(lines))
    program.run("ingest", "all.ndjson")
    done = program.run("process")
    assert (json.loads(done.stdout)["superseded"], done.stderr) == (10, "")


def test_proof_of_one_series(program: Program):
    """`verify --series` and `rebuild --series` look at, and mend, the rows of one series alone."""
    lines = [of_device(name, second, ord(name)) for second in range(3) for name in "ab"]
    (program.home / "all.ndjson").write_bytes(b"\n".join(lines))
    program.run("ingest", "all.ndjson", **SET)
    program.run("process", **SET)
    with closing(sqlite3.connect(program.home / "data" / "dropzone.sqlite")) as rows, rows:
        rows.execute("DELETE FROM measurements WHERE timestamp_utc = ?", [at(1)])
    done = program.run("verify", **SET)
    found = [line.split() for line in done.stdout.splitlines() if line.startswith("missing")]
    assert (done.returncode, [line[-1] for line in found]) == (1, ["a", "b"])
    [of_a, summary] = map(
        json.loads, program.run("verify", "--json", "--series", "a", **SET).stdout.splitlines()
    )
    assert of_a["right"]["series"] == "a"
    assert (summary["right"], summary["wrong"], summary["is_all"]) == (2, {"missing": 1}, False)
    assert program.run("rebuild", "--series", "b", **SET).returncode == OK
    assert program.run("verify", "--series", "b", **SET).returncode == OK
    assert program.run("verify", "--series", "a", **SET).returncode == 1
    assert program.run("rebuild", **SET).returncode == OK
    assert "all rows are right" in program.run("verify", **SET).stdout
    refused = program.run("verify", "--series", "a")
    assert (refused.returncode, "[transform] series is not set" in refused.stderr) == (78, True)


async def test_other_rules_begin_a_proof_anew(tmp_path: Path):
    """A run that was stopped is not continued under another setting."""
    folder = await Folder(tmp_path / "data").opened()
    for number, name in enumerate("ab"):
        folder.put(arrival(number), of_device(name, number, 1))
    one = MemoryBackend()
    await processor_of(folder.store, one, 10).process()
    await one.delete(await one.find())
    stopped = Proof(folder.store.portable(), one).findings()
    assert (await anext(stopped)).kind == "missing"
    await stopped.aclose()
    rules = TransformConfig(series=SeriesAt("device"))
    proof = Proof(folder.store.portable(), MemoryBackend(series=True), rules)
    found = [finding.right async for finding in proof.findings()]
    assert [row.series for row in found if row] == ["a", "b"]
    await folder.store.close()


class AskedForSeries(MemoryBackend):
    """Counts how often it is asked for its series, and can be away."""

    asked, is_away = 0, False

    def __init__(self) -> None:
        super().__init__(series=True)

    async def series(self, *, after: str | None = None, limit: int = 100) -> list[Series]:
        self.asked += 1
        if self.is_away:
            raise BackendUnavailable("the database does not answer")
        return await super().series(after=after, limit=limit)


async def test_the_count_of_series_is_kept_for_a_while():
    """However often it is asked for, the backend is asked every few seconds, and may be away."""
    backend = AskedForSeries()
    row = Measurement(datetime.now(UTC) - timedelta(minutes=59), 1.0, 0.0, RAW_ID, "b")
    old = replace(row, timestamp_utc=NOON)
    await backend.upsert([row, replace(old, series="a"), replace(row, series="c"), old])
    backend.is_away = True
    assert await SeriesLately(backend).look() is None
    backend.is_away = False
    lately = SeriesLately(backend)
    found = await asyncio.gather(*(lately.look() for _ in range(20)))
    assert [*found, await lately.look()] == [SeriesCount(3, 1)] * 21
    assert backend.asked == 3  # while it was away, for the series, and for what is behind them


def test_what_other_processes_supersede(program: Program):
    """`/status` counts what has been superseded since the server began, by whichever process."""
    for second in range(2):
        lines = [of_device(name, second, ord(name)) for name in "ab"]
        (program.home / f"{second}.ndjson").write_bytes(b"\n".join(lines))
    program.run("ingest", "0.ndjson")
    program.run("process")
    server = Server(program)
    land(server, of_device("c", 5, 1))
    server.json("POST", "/process")
    wait_for(lambda: server.json("GET", "/status")["superseded"] == 0)
    program.run("ingest", "1.ndjson")
    program.run("process")
    wait_for(lambda: server.json("GET", "/status")["superseded"] == 1)
    assert b"dropzone_superseded_total 2.0" in server.request("GET", "/metrics")[2]
    assert server.stop() == OK


# ── From one series to many, and back ─────────────────────────────────────────────────────────────

SECONDS = 50


async def run_in(program: Program, url: str, statements: str) -> None:
    """Run what `check` said, by the client of the database."""
    if not url:
        with closing(sqlite3.connect(program.home / "data" / "dropzone.sqlite")) as rows:
            rows.executescript(statements)
        return
    client = await asyncpg.connect(url)
    await client.execute(statements)
    await client.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_from_one_to_many(program: Program, postgres_url: str, kind: str):
    """`check` says the statements, and behind them `rebuild` brings back what was overwritten."""
    url = postgres_url if kind == "postgres" else ""
    one = {"DROPZONE_DATABASE_URL": url} if url else {}
    many = one | SET
    lines = [of_device(name, second, ord(name)) for second in range(SECONDS) for name in "ab"]
    (program.home / "all.ndjson").write_bytes(b"\n".join(lines))
    program.run("ingest", "all.ndjson", **one)
    assert json.loads(program.run("process", **one).stdout)["superseded"] == SECONDS
    for variables, right in ((many, 2 * SECONDS), (one, SECONDS)):
        checked = program.run("check", **variables)
        assert checked.returncode == 78
        [statements] = re.findall(r"run:? (.*); and then rebuild", checked.stdout)
        await run_in(program, url, statements)
        assert program.run("check", **variables).returncode == OK
        assert program.run("rebuild", **variables).returncode == OK
        done = program.run("verify", **variables)
        assert f"{right} right, 0 wrong, 0 that cannot be checked" in done.stdout
        assert "all rows are right" in done.stdout


OWN_BACKEND = """
from backends.memory import MemoryBackend


class Own(MemoryBackend):
    def __init__(self):
        super().__init__()
"""


def test_a_backend_that_keeps_no_series(program: Program):
    """One of one's own is not asked to keep what it does not know, and the error says so."""
    code = "from backends.memory import MemoryBackend\n\n\nclass Own(MemoryBackend):\n"
    (program.home / "own.py").write_text(
        f"{code}    def __init__(self):\n        super().__init__()"
    )
    own = {"DROPZONE_BACKEND": "own:Own", "PYTHONPATH": program.home}
    assert program.run("process", **own).returncode == OK
    refused = program.run("process", **own, **SET)
    assert (refused.returncode, "series=True" in refused.stderr) == (78, True)
