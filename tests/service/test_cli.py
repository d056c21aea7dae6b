"""The command line, run as a user runs it: `python dropzone.py …` in a folder of its own."""

import http.client
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from stores import payloads_below
from uuid_utils.compat import uuid7

import dropzone
from backends.raw import uuid_at

DROPZONE = Path(dropzone.__file__).resolve()
PATIENCE = 60  # seconds until a program that hangs is taken for one
SECRET = "hunter2-is-secret"
ENTRY = {"time_stamp": "2019-05-01T06:00:00-04:00", "data": [0, 2]}
LINE = json.dumps(ENTRY).encode()
AUDIT = " INFO dropzone.audit: "
RAW_IDS = "SELECT raw_id FROM measurements"

OK, USAGE, DATA_ERROR, NO_INPUT, UNAVAILABLE, TRY_AGAIN, CONFIGURATION = 0, 2, 65, 66, 69, 75, 78


class Program:
    """`dropzone.py` with a folder for its data; that folder and `variables` are all it sees."""

    command: tuple[object, ...] = (sys.executable, DROPZONE)

    def __init__(self, home: Path) -> None:
        self.home = home
        self._started: list[subprocess.Popen[bytes]] = []
        for name in ("config.toml", ".env"):  # else those beside the program would be read
            (home / name).touch()

    def start(self, *arguments: object, **variables: object) -> "subprocess.Popen[bytes]":
        """Start the program, its standard streams in pipes; `close` ends it at the latest."""
        clean = {n: text for n, text in os.environ.items() if not n.startswith("DROPZONE_")}
        process = subprocess.Popen(
            [*map(str, self.command), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.home,
            env=clean | {name: str(value) for name, value in variables.items()},
        )
        self._started.append(process)
        return process

    def run(
        self, *arguments: object, stdin: bytes = b"", **variables: object
    ) -> "subprocess.CompletedProcess[str]":
        """Run the program to its end; return its exit code and what it wrote but audit lines."""
        process = self.start(*arguments, **variables)
        out, err = process.communicate(stdin, timeout=PATIENCE)
        said = "".join(line for line in err.decode().splitlines(True) if AUDIT not in line)
        return subprocess.CompletedProcess(arguments, process.returncode, out.decode(), said)

    def close(self) -> None:
        """End whatever still runs."""
        for process in self._started:
            with process:  # waits, and closes the pipes
                process.kill()

    def payloads(self, state: str = "raw") -> dict[UUID, bytes]:
        """Return the payloads that lie in a folder, below it too, in order of arrival."""
        return payloads_below(self.home / "data" / state)


class Server:
    """A serving `dropzone.py` that says where it listens; what it logs is in `log`."""

    def __init__(self, program: Program, *arguments: object, **variables: object) -> None:
        self.process = program.start(*(arguments or ("--port", 0)), **variables)
        self.log = ""
        self.url = self._listening()

    def _listening(self) -> str:
        assert self.process.stderr is not None
        for line in iter(self.process.stderr.readline, b""):
            self.log += line.decode()
            if found := re.search(r"listening on (http://[^\s\"]+)", line.decode()):
                return found[1]
        raise AssertionError(f"the server does not listen: {self.log}")

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Make one request; return status, headers and body."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=PATIENCE)
        try:
            connection.request(
                method, path, body, {n.replace("_", "-"): h for n, h in headers.items()}
            )
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        """Make one request that has to succeed; return the document of its answer."""
        status, _, text = self.request(method, path, body, **headers)
        assert status < 300, text
        return json.loads(text)

    def stop(self, how: signal.Signals = signal.SIGTERM, patience: float = PATIENCE) -> int:
        """Send a signal; return the exit code."""
        self.process.send_signal(how)
        return self.exit_code(patience)

    def exit_code(self, patience: float = PATIENCE) -> int:
        """Wait for the end."""
        _, rest = self.process.communicate(timeout=patience)
        self.log += rest.decode()
        return self.process.returncode


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.close()


@contextmanager
def taken_port() -> Iterator[int]:
    """Listen on a loopback port and never answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextmanager
def closed_port() -> Iterator[int]:
    """Keep a loopback port from everybody without listening on it: connections are refused."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def printed_ids(text: str) -> list[UUID]:
    return [UUID(line) for line in text.splitlines()]


def assert_explained(err: str) -> None:
    """It is told in words on one line, not as a traceback."""
    assert err.strip()
    assert "Traceback" not in err


# ── The program itself ────────────────────────────────────────────────────────────────────────────


def test_help_names_every_command(program: Program):
    """`--help` prints what each command does, and exits 0."""
    done = program.run("--help")
    assert (done.returncode, done.stderr) == (OK, "")
    for command in ("serve", "ingest", "process", "check", "key"):
        assert re.search(rf"^ +{command} +\w+", done.stdout, re.MULTILINE), command


@pytest.mark.parametrize("command", ["serve", "ingest", "process", "check"])
def test_help_of_a_command(program: Program, command: str):
    """`COMMAND --help` prints its usage, and touches nothing."""
    done = program.run(command, "--help")
    assert (done.returncode, done.stderr) == (OK, "")
    assert done.stdout.startswith(f"usage: dropzone.py {command}")
    assert not (program.home / "data").exists()


def test_version(program: Program):
    """`--version` prints the version alone."""
    done = program.run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (OK, f"{dropzone.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [["unheard-of"], ["ingest"], ["--port", "x"], ["--unheard-of"], ["process", "--limit", "x"]],
)
def test_wrong_usage(program: Program, arguments: list[str]):
    """A command line that is not understood is explained with exit code 2, and nothing happens."""
    done = program.run(*arguments)
    assert done.returncode == USAGE
    assert done.stderr.startswith("usage: ")
    assert not (program.home / "data").exists()


@pytest.mark.parametrize(
    ("toml", "variables", "named"),
    [
        ("[raw]\ndri = 'x'", {}, "dri"),
        ("[rwa]\ndir = 'x'\n[log]", {}, "rwa"),
        ("[server]\nport = 'high'", {}, "server.port"),
        ("[server", {}, "config.toml"),
        ("", {"DROPZONE_RAW_DRI": "x"}, "DROPZONE_RAW_DRI"),
        ("", {"DROPZONE_SERVER_PORT": "65536"}, "DROPZONE_SERVER_PORT"),
        ("", {"DROPZONE_CONFIG": "elsewhere.toml"}, "elsewhere.toml"),
        ("", {"DROPZONE_BACKEND": "oracle"}, "oracle"),
        ("", {"DROPZONE_BACKEND": "postgres"}, "DROPZONE_DATABASE_URL"),
        ("", {"DROPZONE_DATABASE_URL": f"mysql://me:{SECRET}@db/x"}, "postgresql://"),
    ],
)
def test_check_names_a_wrong_setting(
    program: Program, toml: str, variables: dict[str, str], named: str
):
    """A wrong setting is refused by its name: exit code 78, no traceback, no secret."""
    (program.home / "config.toml").write_text(toml)
    done = program.run("check", **variables)
    assert (done.returncode, done.stdout) == (CONFIGURATION, "")
    assert named in done.stderr
    assert_explained(done.stderr)
    assert SECRET not in done.stderr


@pytest.mark.parametrize("command", [[], ["serve"], ["ingest", "-"], ["process"]])
def test_every_command_refuses_a_wrong_setting(program: Program, command: list[str]):
    """No command starts with an unknown variable: exit code 78, and nothing is touched."""
    done = program.run(*command, stdin=LINE, DROPZONE_RAW_DRI="x")
    assert (done.returncode, done.stdout) == (CONFIGURATION, "")
    assert "DROPZONE_RAW_DRI" in done.stderr
    assert_explained(done.stderr)
    assert not (program.home / "data").exists()


def test_an_option_that_is_out_of_range(program: Program):
    """A port that cannot be is refused as in the file: exit code 78."""
    done = program.run("--port", 65536)
    assert done.returncode == CONFIGURATION
    assert "port" in done.stderr
    assert_explained(done.stderr)


@pytest.mark.parametrize("command", [["serve", "--port", 0], ["ingest", "-"], ["process"]])
def test_a_data_folder_that_cannot_be(program: Program, command: list[object]):
    """Every command names the data folder that it cannot make; there is no traceback."""
    (program.home / "file").touch()
    done = program.run(*command, stdin=LINE, DROPZONE_RAW_DIR="file/raw")
    assert done.returncode in {CONFIGURATION, TRY_AGAIN}
    assert str(program.home / "file") in done.stderr
    assert_explained(done.stderr)


# ── check ─────────────────────────────────────────────────────────────────────────────────────────


def test_check_is_content(program: Program):
    """`check` says ok to the defaults in a fresh folder, exits 0 and makes nothing there."""
    done = program.run("check")
    assert done.returncode == OK, done.stdout + done.stderr
    assert "wrong" not in done.stdout
    assert not (program.home / "data").exists()


def test_check_names_every_wrong_setting(program: Program):
    """`check` names all settings that are wrong, of the file and of variables, and shows no key."""
    toml = f"[server]\nport = 'high'\nhots = 1\n[rwa]\ndir = 'x'\n[auth]\napi_key = ['{SECRET}']\n"
    (program.home / "config.toml").write_text(toml)
    done = program.run("check", DROPZONE_RAW_DRI="x", DROPZONE_PROCESS_BATCH="0")
    assert (done.returncode, done.stdout) == (CONFIGURATION, "")
    lines = done.stderr.splitlines()
    named = ("server.port", "hots", "rwa", "api_key", "DROPZONE_RAW_DRI", "DROPZONE_PROCESS_BATCH")
    for name in named:
        assert sum(name in line for line in lines) == 1, (name, lines)
    assert len(lines) == len(named)
    assert SECRET not in done.stderr


def test_check_names_everything_at_once(program: Program):
    """`check` goes on behind the first thing that is wrong: each has its line."""
    (program.home / "file").touch()
    (program.home / "data" / "raw").mkdir(parents=True)
    (program.home / "data" / "raw" / "notes.txt").touch()
    folders = {"DROPZONE_RAW_REJECTED_DIR": "file/below", "DROPZONE_STORAGE_SQLITE_PATH": "file/b"}
    done = program.run("check", **folders)
    assert done.returncode == CONFIGURATION
    wrong = [line for line in done.stdout.splitlines() if line.startswith("wrong")]
    assert len(wrong) == 3, wrong
    assert "notes.txt" in done.stdout


def test_check_names_a_folder_that_is_read_only(program: Program):
    """`check` names a folder that exists and cannot be written to."""
    raw = program.home / "data" / "raw"
    raw.mkdir(parents=True, mode=0o500)
    check = [sys.executable, DROPZONE, "check"]
    if os.getuid() == 0:  # who may write everywhere without this
        check = ["setpriv", "--bounding-set=-dac_override", *check]
    done = subprocess.run(check, cwd=program.home, capture_output=True, text=True, check=False)
    assert done.returncode == CONFIGURATION, done.stderr
    assert f"{raw} is not a folder that this user can write to" in done.stdout


def test_check_names_a_clock_that_is_behind(program: Program):
    """`check` compares the clock with the last payload that landed."""
    journal = program.home / "data" / "journal"
    journal.mkdir(parents=True)
    ahead = uuid_at(datetime.now(UTC) + timedelta(days=400))
    (journal / "last_raw_id").write_bytes(ahead.bytes)
    done = program.run("check")
    assert done.returncode == CONFIGURATION
    assert re.search(r"(?m)^wrong  clock: it is (399|400) days.* behind", done.stdout)
    (journal / "last_raw_id").write_bytes(uuid7().bytes)
    assert program.run("check").returncode == OK


def test_check_names_too_few_descriptors(program: Program):
    """`check` says how many files may be open where thousands of connections would not fit."""
    limited = f"ulimit -n 512 && exec {sys.executable} {DROPZONE} check"
    done = subprocess.run(
        ["/bin/sh", "-c", limited], cwd=program.home, capture_output=True, text=True, check=False
    )
    assert done.returncode == CONFIGURATION
    assert "wrong  file descriptors: 512" in done.stdout


def test_check_names_a_table_of_another_shape(program: Program):
    """`check` names a table measurements that is somebody else's, and leaves it alone."""
    file = program.home / "other.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE measurements (x TEXT)")
    done = program.run("check", DROPZONE_STORAGE_SQLITE_PATH=file)
    assert done.returncode == CONFIGURATION
    assert "another shape: rename that table" in done.stdout


def test_check_beside_a_server(program: Program):
    """`check` says ok while a server is at work on the same folder, and takes nothing from it."""
    server = Server(program)
    server.json("POST", "/ingest", LINE)
    done = program.run("check")
    assert done.returncode == OK, done.stdout
    server.json("POST", "/ingest", LINE)
    assert server.stop() == OK


def test_check_notes_the_missing_key(program: Program):
    """`check` says that the API is open where no key is set; a key silences it and is not shown."""
    assert "DROPZONE_API_KEY" in program.run("check").stdout
    guarded = program.run("check", DROPZONE_API_KEY=SECRET)
    assert guarded.returncode == OK
    assert "DROPZONE_API_KEY" not in guarded.stdout
    assert SECRET not in guarded.stdout + guarded.stderr
    program.run("key", "new", "gateway", "--scope", "ingest")
    assert "DROPZONE_API_KEY" not in program.run("check").stdout


@pytest.mark.parametrize("setting", ["DROPZONE_RAW_DIR", "DROPZONE_STORAGE_SQLITE_PATH"])
def test_check_names_what_cannot_be_written(program: Program, setting: str):
    """`check` names a folder below a file, which nobody can create: exit code 78."""
    (program.home / "file").touch()
    done = program.run("check", **{setting: "file/below"})
    assert done.returncode == CONFIGURATION
    assert str(program.home / "file") in done.stdout
    assert_explained(done.stdout + done.stderr)


@pytest.mark.parametrize("name", ["notes.txt", "1.json", "not-a-uuid.json", "A" * 36 + ".json"])
def test_check_names_a_stray_file(program: Program, name: str):
    """`check` names a file in the raw folder that is no payload, and leaves it alone."""
    stray = program.home / "data" / "raw" / name
    stray.parent.mkdir(parents=True)
    stray.write_text("mine")
    done = program.run("check")
    assert done.returncode == CONFIGURATION
    assert name in done.stdout
    assert stray.read_text() == "mine"


@pytest.mark.linux
def test_check_names_a_second_file_system(program: Program):
    """`check` refuses folders on two file systems: nothing can be renamed from one to the other."""
    memory = Path("/dev/shm")
    assert memory.stat().st_dev != program.home.stat().st_dev, "run with --basetemp on a disk"
    elsewhere = memory / f"dropzone-{os.getpid()}"
    try:
        done = program.run("check", DROPZONE_RAW_PROCESSED_DIR=elsewhere)
        assert done.returncode == CONFIGURATION
        assert str(elsewhere) in done.stdout
    finally:
        if elsewhere.exists():
            elsewhere.rmdir()


def test_check_names_a_postgres_that_is_not_there(program: Program):
    """`check` names the host and port that do not answer, never the password."""
    with closed_port() as port:
        url = f"postgresql://me:{SECRET}@127.0.0.1:{port}/db"
        done = program.run("check", DROPZONE_DATABASE_URL=url)
    assert done.returncode == CONFIGURATION
    assert f"127.0.0.1:{port}" in done.stdout
    assert_explained(done.stdout + done.stderr)
    assert SECRET not in done.stdout + done.stderr


def test_check_names_a_wrong_password(program: Program, postgres_url: str):
    """`check` says that PostgreSQL refuses the user, without showing the password."""
    parts = urlsplit(postgres_url)
    url = postgres_url.replace(str(parts.password), SECRET)
    done = program.run("check", DROPZONE_DATABASE_URL=url)
    assert done.returncode == CONFIGURATION
    assert "password" in done.stdout
    assert SECRET not in done.stdout + done.stderr


def test_check_of_a_postgres(program: Program, postgres_url: str):
    """`check` says ok to a PostgreSQL that answers."""
    done = program.run("check", DROPZONE_DATABASE_URL=postgres_url)
    assert done.returncode == OK, done.stdout
    assert "postgres" in done.stdout


# ── ingest ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "body",
    [
        LINE,
        LINE + b"\n",
        json.dumps(ENTRY, indent=4).encode(),
        json.dumps([ENTRY, 1], indent=1).encode().replace(b"\n", b"\r\n"),
        b"\xef\xbb\xbf" + LINE,
        b"17",
    ],
    ids=["one line", "newline", "pretty", "pretty array, CRLF", "byte order mark", "number"],
)
def test_ingest_of_a_json_file(program: Program, body: bytes):
    """A file that is one JSON document lands as one payload, byte for byte; its id is printed."""
    (program.home / "one.json").write_bytes(body)
    done = program.run("ingest", "one.json")
    assert (done.returncode, done.stderr) == (OK, "")
    [raw_id] = printed_ids(done.stdout)
    assert program.payloads() == {raw_id: body}


@pytest.mark.parametrize(
    ("text", "payloads", "form"),
    [
        (b" [{}, {}]\n", [b"{}", b"{}"], "json"),
        (json.dumps([ENTRY, ENTRY], indent=1).encode(), [], "json"),
        (b'{"a": 1}{"a": 2} {\n}', [b'{"a": 1}', b'{"a": 2}', b"{\n}"], "json"),
        (b"1\n2\n", [b"1", b"2"], "ndjson"),
    ],
    ids=["array", "pretty array", "documents", "lines"],
)
def test_ingest_of_a_batch(program: Program, text: bytes, payloads: list[bytes], form: str):
    """A file of several documents, or of an array of objects, lands as one, whatever its name."""
    (program.home / "many").write_bytes(text)
    done = program.run("ingest", "many")
    assert (done.returncode, done.stderr) == (OK, "")
    landed, ids = program.payloads(), printed_ids(done.stdout)
    assert ids == list(landed)
    assert not payloads or list(landed.values()) == payloads
    [file] = (program.home / "data" / "raw").iterdir()
    assert file.name == f"{ids[0]}.{len(ids)}.{form}"
    assert file.read_bytes() == text


@pytest.mark.parametrize(
    ("text", "payloads"),
    [
        (b"1\n2\n3\n", [b"1", b"2", b"3"]),
        (b"1\n2\n3", [b"1", b"2", b"3"]),
        (b"1\r\n2\r\n3\r\n", [b"1", b"2", b"3"]),
        (b"\n1\n\n \r\n\t\n2\n\n", [b"1", b"2"]),
        (b"\xef\xbb\xbf1\n2\n", [b"\xef\xbb\xbf1", b"2"]),
        (b' {"a": NaN} \n[1,\t2]\n', [b' {"a": NaN} ', b"[1,\t2]"]),
        ('"\u2028"\n"\x85"\n'.encode(), ['"\u2028"'.encode(), '"\x85"'.encode()]),
    ],
    ids=["lines", "no last newline", "CRLF", "empty lines", "byte order mark", "spaces", "unicode"],
)
def test_ingest_of_ndjson(program: Program, text: bytes, payloads: list[bytes]):
    """An NDJSON file lands as it is; every line is a payload, in order, without its line end."""
    (program.home / "many.ndjson").write_bytes(text)
    done = program.run("ingest", "many.ndjson")
    assert (done.returncode, done.stderr) == (OK, "")
    landed = program.payloads()
    assert printed_ids(done.stdout) == list(landed)
    assert list(landed.values()) == payloads
    [file] = (program.home / "data" / "raw").iterdir()
    assert file.read_bytes() == text


@pytest.mark.parametrize("text", [LINE, LINE + b"\n" + LINE])
def test_ingest_of_standard_input(program: Program, text: bytes):
    """`-` lands what comes through a pipe, one document or many."""
    done = program.run("ingest", "-", stdin=text)
    assert (done.returncode, done.stderr) == (OK, "")
    landed = program.payloads()
    assert printed_ids(done.stdout) == list(landed)
    assert b"\n".join(landed.values()) == text


def test_ingest_of_a_named_pipe(program: Program):
    """A pipe lands like a file: `ingest <(zcat week.ndjson.gz)` is how a shell hands one over."""
    pipe = program.home / "pipe"
    os.mkfifo(pipe)
    process = program.start("ingest", pipe)
    with suppress(BrokenPipeError), pipe.open("wb") as writer:
        writer.write(b"1\n2\n")
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (OK, b"")
    assert printed_ids(out.decode()) == list(program.payloads())
    assert list(program.payloads().values()) == [b"1", b"2"]


def test_ingest_of_more_than_one_batch(program: Program):
    """100,001 lines, more than a batch may have, land whole and in their order."""
    lines = [b"%d" % number for number in range(100_001)]
    done = program.run("ingest", "-", stdin=b"\n".join(lines))
    assert (done.returncode, done.stderr) == (OK, "")
    landed = program.payloads()
    assert printed_ids(done.stdout) == list(landed)
    assert list(landed.values()) == lines
    assert len(list((program.home / "data" / "raw").iterdir())) == 2


def test_ingest_of_more_bytes_than_one_body_may_have(program: Program):
    """A file of more bytes than a body may have lands as several batches, of whole lines."""
    lines = [b'"%060d"' % number for number in range(100)]
    text = b"\n\n" + b"\r\n".join(lines)
    done = program.run("ingest", "-", stdin=text, DROPZONE_SERVER_MAX_BODY_BYTES=200)
    assert (done.returncode, done.stderr) == (OK, "")
    landed = program.payloads()
    assert list(landed.values()) == lines
    assert printed_ids(done.stdout) == list(landed)
    files = sorted((program.home / "data" / "raw").iterdir())
    assert max(file.stat().st_size for file in files) <= 200
    assert len(files) == 34
    assert b"".join(file.read_bytes() for file in files) == text


@pytest.mark.parametrize(
    ("text", "places"),
    [
        (b'{"a": 1}\n{"b": }\n{"c": 3}\n', [2]),
        (b'\n\n{"b": }\n{}\n{"time', [3, 5]),
        (b"1\n" * 2500 + b"x", [2501]),
        (b"1\n\xff\n", [2]),
        (b'"%090d"\n' % 0 + b"x\n" * 100 + b"2\n", range(2, 102)),
    ],
    ids=["line", "after empty ones", "last of many", "not UTF-8", "of several batches"],
)
def test_ingest_of_bad_lines(program: Program, text: bytes, places: Sequence[int]):
    """A bad line is named, with its raw_id, and lands with its neighbours: exit code 65."""
    (program.home / "some.ndjson").write_bytes(text)
    limit = 100 if len(text) < 1000 else 10_000
    done = program.run("ingest", "some.ndjson", DROPZONE_SERVER_MAX_BODY_BYTES=limit)
    assert done.returncode == DATA_ERROR
    landed = program.payloads()
    assert printed_ids(done.stdout) == list(landed)
    lines = [line for line in text.split(b"\n") if line]
    assert list(landed.values()) == lines
    told = re.findall(
        r"^some\.ndjson: line (\d+) has landed as (\S+), but is not", done.stderr, re.MULTILINE
    )
    assert [int(line) for line, _ in told] == list(places)
    all_lines = text.split(b"\n")
    assert [landed[UUID(n)] for _, n in told] == [all_lines[line - 1] for line in places]
    assert len(done.stderr.splitlines()) == len(places)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (b'{"b": }\n{"b": }\n', "line 1"),
        (b'\n\n{"b": }\n', "line 3"),
        (b'{\n "a": 1,\n "b": }\n', "line 3"),
        (b"1\nx\n", "line 2"),
        (b"", "empty"),
        (b"\n \n", "empty"),
        (b"\xff\n", "line 1"),
    ],
    ids=["lines", "after empty ones", "pretty", "numbers", "empty", "blank", "not UTF-8"],
)
def test_ingest_of_what_is_not_json(program: Program, text: bytes, place: str):
    """A bad file is named with the place, nothing of it lands, the others do: exit code 65."""
    (program.home / "bad").write_bytes(text)
    for name in ("before", "after"):
        (program.home / name).write_bytes(LINE)
    done = program.run("ingest", "before", "bad", "after")
    assert done.returncode == DATA_ERROR
    assert done.stderr.startswith("bad: ")
    assert place in done.stderr
    assert_explained(done.stderr)
    landed = program.payloads()
    assert printed_ids(done.stdout) == list(landed)
    assert list(landed.values()) == [LINE, LINE]


def test_ingest_of_lines_none_of_which_is_json(program: Program):
    """An NDJSON file without any JSON does not land, though it is more than one batch."""
    (program.home / "bad.ndjson").write_bytes(b"x\n" * 200)
    done = program.run("ingest", "bad.ndjson", DROPZONE_SERVER_MAX_BODY_BYTES=100)
    assert (done.returncode, done.stdout) == (DATA_ERROR, "")
    assert "line 1" in done.stderr
    assert "nothing of it was landed" in done.stderr
    assert not program.payloads()


def test_ingest_of_a_missing_file(program: Program):
    """A file that is not there is named, the others land: exit code 66."""
    (program.home / "there").write_bytes(LINE)
    done = program.run("ingest", "not-there", "there")
    assert done.returncode == NO_INPUT
    assert "not-there" in done.stderr
    assert_explained(done.stderr)
    assert printed_ids(done.stdout) == list(program.payloads())
    assert len(program.payloads()) == 1


@pytest.mark.parametrize(
    "text",
    [b'"%0200d"' % 0, b"1\n2\n" + b'"%0200d"\n' % 0 + b"3\n", b"9" * 200, b"[" + b" " * 200 + b"]"],
    ids=["document", "line", "digits", "spaces"],
)
def test_ingest_of_too_large_a_payload(program: Program, text: bytes):
    """A payload beyond the limit is refused as the server would; nothing of its file lands."""
    done = program.run("ingest", "-", stdin=text, DROPZONE_SERVER_MAX_BODY_BYTES=100)
    assert (done.returncode, done.stdout) == (DATA_ERROR, "")
    assert "100 bytes" in done.stderr
    assert not program.payloads()


def test_ingest_of_a_payload_at_the_limit(program: Program):
    """A payload of exactly the limit lands, alone and as a line."""
    exact = b'"%098d"' % 0
    for text in (exact, exact + b"\r\n" + exact):
        done = program.run("ingest", "-", stdin=text, DROPZONE_SERVER_MAX_BODY_BYTES=100)
        assert (done.returncode, done.stderr) == (OK, "")
    assert list(program.payloads().values()) == [exact] * 3


def test_ingest_whose_reader_has_gone(program: Program):
    """A closed standard output (`ingest … | head`) is no reason to say that nothing was landed."""
    process = program.start("ingest", "-")
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(b"1\n" * 3000, timeout=PATIENCE)
    assert program.payloads()
    assert b"nothing" not in err
    assert b"Traceback" not in err


def test_ingest_needs_no_backend(program: Program):
    """Landing goes on while the database is down."""
    with closed_port() as port:
        url = f"postgresql://me@127.0.0.1:{port}/db"
        done = program.run("ingest", "-", stdin=LINE, DROPZONE_DATABASE_URL=url)
    assert (done.returncode, done.stderr) == (OK, "")
    assert len(program.payloads()) == 1


# ── process ───────────────────────────────────────────────────────────────────────────────────────


def test_process_prints_the_counts(program: Program):
    """`process` prints its counts as one JSON document and in a pipe nothing else."""
    program.run("ingest", "-", stdin=LINE + b'\n{"data": 1}\n')
    bad = list(program.payloads())[1]
    done = program.run("process")
    assert (done.returncode, done.stderr) == (OK, "")
    counts = json.loads(done.stdout)
    [rejection] = counts.pop("rejected")
    assert counts == {"processed": 1, "failed": 1, "checked": 2, "remaining": 0, "superseded": 0}
    assert (rejection["raw_id"], rejection["code"]) == (str(bad), "time_stamp_missing")
    assert not program.payloads()
    assert program.payloads("rejected") == {bad: b'{"data": 1}'}
    assert len(list((program.home / "data" / "processed").rglob("*.ndjson"))) == 1


def test_process_of_nothing(program: Program):
    """`process` of an empty folder, even of one that is not there yet, is a success."""
    done = program.run("process")
    assert (done.returncode, done.stderr) == (OK, "")
    assert json.loads(done.stdout)["checked"] == 0


def test_process_with_a_limit(program: Program):
    """`--limit` takes the earliest arrivals; the rest is counted and stays."""
    program.run("ingest", "-", stdin=b"\n".join([LINE] * 5))
    arrivals = list(program.payloads())
    counts = json.loads(program.run("process", "--limit", 2).stdout)
    assert (counts["processed"], counts["checked"], counts["remaining"]) == (2, 2, 3)
    with closing(sqlite3.connect(program.home / "data" / "dropzone.sqlite")) as rows:
        assert list(rows.execute(RAW_IDS)) == [(str(arrivals[1]),)]
    counts = json.loads(program.run("process").stdout)
    assert (counts["processed"], counts["checked"], counts["remaining"]) == (3, 3, 0)
    with closing(sqlite3.connect(program.home / "data" / "dropzone.sqlite")) as rows:
        assert list(rows.execute(RAW_IDS)) == [(str(arrivals[4]),)]


@pytest.mark.parametrize("limit", [0, -1])
def test_process_with_a_limit_below_one(program: Program, limit: int):
    """A limit below 1 is refused as the API refuses it, and nothing is processed."""
    program.run("ingest", "-", stdin=b"\n".join([LINE] * 3))
    done = program.run("process", "--limit", limit)
    assert done.returncode == USAGE
    assert len(program.payloads()) == 3


def test_process_while_the_backend_is_down(program: Program):
    """A backend that is down is named without its password: exit code 75, everything pending."""
    program.run("ingest", "-", stdin=LINE + b"\n17\n")
    with closed_port() as port:
        url = f"postgresql://me:{SECRET}@127.0.0.1:{port}/db"
        done = program.run("process", DROPZONE_DATABASE_URL=url)
    assert (done.returncode, done.stdout) == (TRY_AGAIN, "")
    assert f"127.0.0.1:{port}" in done.stderr
    assert_explained(done.stderr)
    assert SECRET not in done.stderr
    assert len(program.payloads()) == 2


# ── serve ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("arguments", [["--port", 0], ["serve", "--port", 0]])
def test_serve_on_a_free_port(program: Program, arguments: list[object]):
    """Without a command it serves; port 0 takes a free one, and the log names the address."""
    server = Server(program, *arguments)
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*", server.url)
    assert server.json("GET", "/health") == {"status": "ok"}


@pytest.mark.parametrize("arguments", [["--port", 0, "serve"], ["serve", "--host", "localhost"]])
def test_serve_options_before_and_behind_the_command(program: Program, arguments: list[object]):
    """An option counts on either side of the command."""
    server = Server(program, *arguments, DROPZONE_SERVER_PORT="0")
    assert server.json("GET", "/health") == {"status": "ok"}


@pytest.mark.linux
def test_serve_on_another_address(program: Program):
    """`--host` chooses the address, and goes before the variable."""
    arguments = ("--host", "127.0.0.2", "--port", 0)
    server = Server(program, *arguments, DROPZONE_SERVER_HOST="127.0.0.3", DROPZONE_SERVER_PORT=1)
    assert server.url.startswith("http://127.0.0.2:")
    assert server.json("GET", "/health") == {"status": "ok"}


def test_serve_on_a_port_in_use(program: Program):
    """A port in use is named in a message, with exit code 69."""
    with taken_port() as port:
        done = program.run("--port", port)
    assert done.returncode == UNAVAILABLE
    assert str(port) in done.stderr
    assert "in use" in done.stderr
    assert_explained(done.stderr)


def test_serve_on_an_address_of_nobody(program: Program):
    """An address that is not this machine's is named in a message, with exit code 69."""
    done = program.run("--host", "192.0.2.1", "--port", 0)  # RFC 5737: nobody's
    assert done.returncode == UNAVAILABLE
    assert "192.0.2.1" in done.stderr
    assert_explained(done.stderr)


def test_serve_warns_of_the_missing_key(program: Program):
    """The log says at start that the API is open; with a key it does not, nor shows the key."""
    assert "DROPZONE_API_KEY" in Server(program).log
    server = Server(program, DROPZONE_API_KEY=SECRET, DROPZONE_LOG_LEVEL="debug")
    server.json("POST", "/ingest", LINE, x_api_key=SECRET)
    assert server.stop() == OK
    assert "DROPZONE_API_KEY" not in server.log
    assert SECRET not in server.log


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_serve_until_a_signal(program: Program, how: signal.Signals):
    """SIGTERM and Ctrl-C end the server in order: exit code 0, no traceback."""
    server = Server(program)
    server.json("POST", "/ingest", LINE)
    assert server.stop(how) == OK
    assert "Traceback" not in server.log


def test_serve_does_not_wait_for_idle_devices(program: Program):
    """A device that keeps its connection open, or a request half-sent, does not keep the server.

    Whoever stops a service kills it after ten seconds (Docker) and calls that a failure.
    """
    server = Server(program)
    place = urlsplit(server.url)
    with (
        socket.create_connection((place.hostname, place.port)) as idle,
        socket.create_connection((place.hostname, place.port)) as halfway,
    ):
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        idle.recv(4096)
        halfway.sendall(b"POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        server.json("GET", "/health")  # by now the half request is being read
        assert server.stop(patience=15) == OK


def test_serve_names_a_stray_file(program: Program):
    """The log names, at start, what lies in the raw folder and is no payload."""
    (program.home / "data" / "raw").mkdir(parents=True)
    (program.home / "data" / "raw" / "notes.txt").touch()
    assert "notes.txt" in Server(program).log


def test_serve_starts_while_the_backend_is_down(program: Program):
    """The server starts and lands while its database is down; the log says so, not the password."""
    with closed_port() as port:
        url = f"postgresql://me:{SECRET}@127.0.0.1:{port}/db"
        server = Server(program, DROPZONE_DATABASE_URL=url)
        assert server.json("POST", "/ingest", LINE)["status"] == "accepted"
        status, headers, _ = server.request("POST", "/process")
    assert (status, "Retry-After" in headers) == (503, True)
    assert len(program.payloads()) == 1
    assert server.stop() == OK
    assert f"127.0.0.1:{port}" in server.log
    assert SECRET not in server.log
