"""README and docs: what they show runs, and what they name exists."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import machine
import pytest
from power_cut import wait_for
from test_cli import LINE, OK, PATIENCE, Program, Server, closed_port
from test_workers import GUNICORN

import dropzone
from backends import timestamp_text
from backends.postgres_statements import CHANGE_TO_MANY, CREATE_ONE, TAKE_OVER

REPO = Path(__file__).parents[2]
README = REPO / "README.md"
API = REPO / "docs" / "api.md"
BACKENDS = REPO / "docs" / "backends.md"
SERIES = REPO / "docs" / "series.md"
OPERATING = REPO / "docs" / "operating.md"
PAGES = [README, REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
RAW_ID = "01890a5d-ac96-774b-bcce-b302099a8057"
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    yield made
    made.close()


def section(page: Path, title: str) -> str:
    """Return a part of a page, from its heading to the next."""
    _, _, behind = page.read_text().partition(f"\n## {title}\n")
    assert behind, f"{page.name} has no part {title}"
    return behind.partition("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return [block for kind, block in FENCED.findall(text) if kind == language]


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_can_be_read_in_a_sitting():
    """The README has at most 250 lines; the rest is in docs/."""
    assert len(README.read_text().splitlines()) <= 250


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path):
    """Every link to a file or a heading of the project leads there."""
    text = FENCED.sub("", page.read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_exist(page: Path):
    """Every variable that a page names is a setting."""
    named = set(re.findall(r"\bDROPZONE_[A-Z][A-Z_]*[A-Z]\b", page.read_text()))
    assert named <= dropzone.VARIABLES.keys() | {"DROPZONE_CONFIG", "DROPZONE_TEST_DATABASE_URL"}
    keys = re.findall(r"`\[([\w.]+)\] (\w+)", page.read_text())
    assert {(*path.split("."), key) for path, key in keys} <= set(dropzone.VARIABLES.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path):
    """Every command of `dropzone.py` that a page shows is understood."""
    shown = "\n".join(block for _, block in FENCED.findall(page.read_text()))
    shown += "\n".join(re.findall(r"`(python dropzone\.py[^`]*)`", page.read_text()))
    for line in re.findall(r"python dropzone\.py *(.*)$", shown, re.MULTILINE):
        arguments = shlex.split(line.partition("#")[0].replace("RAW_ID", RAW_ID))
        assert dropzone.arguments(arguments).run


def shell(program: Program, server: Server, commands: str) -> list[str]:
    """Run commands for localhost:8080 against a server; return the answers, one of each curl."""
    machine.program("curl", package="curl")
    commands = commands.replace("localhost:8080", server.url.removeprefix("http://"))
    done = subprocess.run(
        ["sh", "-euc", commands.replace("curl", "curl --silent --write-out '\\n'")],
        cwd=program.home,
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return [line for line in done.stdout.splitlines() if line]


def likeness(answer: str) -> str:
    """Return an answer without what differs each time: ids and the present moment."""
    ids = r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{24}"
    return re.sub(rf"{ids}|20\d\d-[^\"]*Z", "…", answer)


def test_first_session(program: Program):
    """The first session gives the answers that it shows, and the file's bytes are kept."""
    server = Server(program)
    session = section(README, "A first session")
    [commands], [shown] = blocks(session, "sh"), blocks(session, "json")
    answers = shell(program, server, commands)
    assert list(map(likeness, answers)) == list(map(likeness, shown.splitlines()))
    [body] = program.payloads("processed").values()
    assert body == (program.home / "payload.json").read_bytes()
    assert server.stop() == OK


def test_reading(program: Program):
    """The addresses that the page on the API shows lead through the pages, and to CSV."""
    server = Server(program)
    for second in (0, 1):
        body = LINE.replace(b"06:00:00", b"06:00:%02d" % second)
        server.request("POST", "/ingest", body)
    server.request("POST", "/process")
    [pages] = blocks(section(API, "Reading in pages"), "sh")
    first, second = map(json.loads, shell(program, server, pages))
    assert [len(page["measurements"]) for page in (first, second)] == [2, 1]
    [csv] = blocks(section(API, "CSV"), "sh")
    head, *rows = shell(program, server, csv)
    assert head == "timestamp_utc,mean,std_dev,raw_id"
    assert len(rows) == 2
    assert server.stop() == OK


def test_an_error(program: Program):
    """The page on the API shows an error as it is."""
    server = Server(program)
    errors = section(API, "Errors")
    [command], [shown] = blocks(errors, "sh"), blocks(errors, "json")
    assert list(map(likeness, shell(program, server, command))) == [likeness(shown.strip())]
    assert server.stop() == OK


def test_operating_commands(program: Program):
    """The commands of the page on operating succeed in this order, beside a server."""
    (program.home / "day.ndjson").write_bytes(LINE)
    with closed_port() as port:
        pass
    [commands] = blocks(section(OPERATING, "Commands"), "sh")
    for line in commands.splitlines():
        command = line.replace("CODE", "data_missing").replace("NAME", "gateway-7")
        command = command.replace("RAW_ID", RAW_ID)
        _, _, *arguments = shlex.split(command, comments=True)
        if not arguments:
            Server(program, "serve", DROPZONE_SERVER_PORT=port)
        elif "--watch" in arguments:
            watching = program.start(*arguments)
            wait_for(lambda: not program.payloads(), PATIENCE)
            watching.terminate()
            assert watching.wait(PATIENCE) == OK
        else:
            variables = {"DROPZONE_SERVER_PORT": port}
            if arguments == ["adopt"]:  # for which there has to be an archive
                (program.home / "archive").mkdir()
                variables["DROPZONE_RAW_ARCHIVE"] = f"file://{program.home}/archive"
            done = program.run(*arguments, **variables)
            assert done.returncode == OK, f"{line}: {done.stdout}{done.stderr}"
    assert len(program.payloads("processed")) == 1


def test_operating_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The file of settings of the systemd installation is read as it stands there."""
    [text] = [block for block in blocks(OPERATING.read_text(), "sh") if "/.env\n" in block]
    (tmp_path / ".env").write_text(text)
    monkeypatch.chdir(tmp_path)
    config = dropzone.load_config(environ={})
    assert config.raw.dir == Path("/var/lib/dropzone/raw")
    assert config.storage.sqlite.path == Path("/var/lib/dropzone/dropzone.sqlite")


def test_operating_workers():
    """The page on operating starts gunicorn as the tests of several workers do."""
    [command] = blocks(section(OPERATING, "Several workers"), "sh")
    words = shlex.split(command.replace("\\\n", " "))
    shown = words[words.index("gunicorn", 3) :]
    assert shown[:4] == [*GUNICORN[1:5]]


def test_log_lines(program: Program):
    """The page on operating shows the members that lines of the log have, in their order."""
    [shown] = blocks(section(OPERATING, "Logs"), "json")
    server = Server(program, "serve", "--port", 0, DROPZONE_LOG_FORMAT="json")
    assert server.request("POST", "/ingest", b"{")[0] == 400
    server.json("POST", "/process")
    assert server.stop() == OK
    known = {line["logger"]: list(line) for line in map(json.loads, server.log.splitlines())}
    for line in map(json.loads, shown.splitlines()):
        assert list(line) == known[line["logger"]]


def test_findings():
    """The page on operating has every kind of row that `verify` tells apart from right ones."""
    kinds = re.findall(r"^\| `(\w+)` \|", section(OPERATING, "Processing"), re.MULTILINE)
    assert kinds == [*dropzone.WRONG, *dropzone.UNPROVABLE]


def test_exit_codes():
    """The page on operating has every exit code that a command can end with, and no other."""
    shown = re.findall(r"^\| (\d+) \|", section(OPERATING, "Commands"), re.MULTILINE)
    named = re.findall(r"\bos\.(EX_\w+)", (REPO / "dropzone.py").read_text())
    assert {int(code) for code in shown} == {
        *(getattr(os, name) for name in named),
        *(1, 2, os.EX_NOPERM, 128 + signal.SIGINT),
    }


def test_embedding(program: Program):
    """The program that embeds Dropzone serves it under its prefix."""
    [code] = blocks(section(README, "Installing and embedding"), "python")
    with closed_port() as port:
        pass
    code = code.replace("run_app(outer)", f"run_app(outer, host='127.0.0.1', port={port})")
    (program.home / "embedding.py").write_text(code)
    environ = {"PYTHONPATH": str(REPO), "DROPZONE_RAW_DIR": str(program.home / "raw")}
    with subprocess.Popen([sys.executable, "embedding.py"], cwd=program.home, env=environ) as outer:
        try:
            url = f"http://127.0.0.1:{port}/dropzone/health"
            command = [machine.program("curl", package="curl"), "--silent", "--retry", "20"]
            answer = subprocess.run(
                [*command, "--retry-connrefused", "--retry-delay", "1", url],
                check=True,
                capture_output=True,
                timeout=PATIENCE,
            )
            assert answer.stdout == b'{"status":"ok"}'
        finally:
            outer.terminate()


def test_table():
    """The page on backends shows the statements that make the table and take over an older one."""
    shown = [block.strip() for block in blocks(section(BACKENDS, "PostgreSQL"), "sql")]
    assert shown == [CREATE_ONE.strip(), TAKE_OVER]


def test_series_statements():
    """The page on series shows the statements that let a table of PostgreSQL have many."""
    [shown] = blocks(section(SERIES, "On a table that has rows"), "sql")
    assert shown == CHANGE_TO_MANY.format(key="measurements_pkey").lstrip()


def test_series_examples():
    """The page on series says rightly what names a series."""
    table = section(SERIES, "What names a series")
    rows = re.findall(r"^\| `(.*)` \| `(.*)` \| `(.*)` \|$", table, re.MULTILINE)
    assert len(rows) == 5
    for at, payload, series in rows:
        body = payload.replace(", …", "").encode()
        assert dropzone.series_in(body, dropzone.SeriesAt(at)) == series


def test_backend_of_ones_own(program: Program):
    """The backend that the page shows keeps rows and tells of them, chosen by its name."""
    [code] = blocks(section(BACKENDS, "A backend of your own"), "python")
    (program.home / "announcing.py").write_text(code)
    [name] = re.findall(r"`DROPZONE_BACKEND=([\w:]+)`", BACKENDS.read_text())
    settings = {"DROPZONE_BACKEND": name, "PYTHONPATH": program.home}
    raw_id = program.run("ingest", "-", stdin=LINE, **settings).stdout.strip()
    done = program.run("process", **settings)
    assert done.returncode == OK, done.stderr
    assert f'"raw_id":"{raw_id}"' in done.stdout
    assert "1 right" in program.run("verify", **settings).stdout


def test_changelog():
    """The changelog begins with what is not released yet, and has the version of the package."""
    [first, *versions] = re.findall(r"^## (.*)$", (REPO / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first == "Unreleased"
    assert re.fullmatch(rf"{dropzone.__version__} - \d{{4}}-\d\d-\d\d", versions[0])


def test_routes():
    """The page on the API has every route, and no other, and the scope that opens it."""
    shown = {
        (method, path.partition("?")[0])
        for method, path in re.findall(r"`(GET|POST) (/[^`]*)`", section(API, "Routes"))
    }
    known = {(route.method, route.path): route.scope for route in dropzone.ROUTES if route.answers}
    assert shown == known.keys()
    scopes = dict(re.findall(r"^\| `?([a-z ]+)`? \| (.*) \|$", section(API, "Keys"), re.MULTILINE))
    named = {
        scope: set(re.findall(r"`(GET|POST) (/[^`]*)`", routes)) for scope, routes in scopes.items()
    }
    for scope in ("ingest", "process"):
        assert named[scope] == {route for route, needed in known.items() if needed == scope}
    assert named["none needed"] == {route for route, needed in known.items() if needed is None}
    assert named["read"] <= {route for route, needed in known.items() if needed == "read"}


def codes_in(source: Path) -> set[str]:
    """Return the codes that a module gives to errors: as an argument, in a table or a class."""
    calls = re.findall(r'Error\([^()]*(?:\([^()]*\)[^()]*)*, "(\w+)", \d{3}', source.read_text())
    tables = re.findall(r'\("(\w+)", \d{3}\)', source.read_text())
    classes = re.findall(r'^    code(?:, status)? = "(\w+)"', source.read_text(), re.MULTILINE)
    return {*calls, *tables, *classes}


def test_error_codes():
    """The page on the API has every code that an answer can have."""
    given = codes_in(REPO / "dropzone.py") | codes_in(REPO / "backends" / "raw" / "__init__.py")
    given -= {
        "config_invalid",
        "cluster_away",
        "payload_store_error",
        "payload_unreadable",
        "folder_taken",
    }  # never answers
    shown = set(re.findall(r"`(\w+)`", section(API, "Errors")))
    assert len(given) > 20
    assert given <= shown


def lines_of_tables(text: str) -> list[list[str]]:
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip("` |") for cell in row] for row in rows]


TIME_STAMPS = REPO / "docs" / "time-stamps.md"
ACCEPTED = [
    line
    for title in ("What is accepted", "Fractions, leap seconds, midnight")
    for line in lines_of_tables(section(TIME_STAMPS, title))
]
REFUSED = [
    (code, sent, reason)
    for part in section(TIME_STAMPS, "What is refused").split("With the code ")[1:]
    for code in [part.split("`")[1]]
    for sent, reason in lines_of_tables(part)
]


@pytest.mark.parametrize(("sent", "read"), [line[:2] for line in ACCEPTED])
def test_accepted_time_stamps(sent: str, read: str):
    """Every form that the page on time stamps shows as accepted is read as it says."""
    assert timestamp_text(dropzone.parse_time_stamp(sent)) == read


@pytest.mark.parametrize(("code", "sent", "reason"), REFUSED)
def test_refused_time_stamps(code: str, sent: str, reason: str):
    """Every form that the page shows as refused has the code and the reason that it says."""
    number = [int(sent)] if sent.isdigit() else []
    for value in [sent, *number]:
        with pytest.raises(dropzone.DataQualityError) as caught:
            dropzone.parse_time_stamp(value)
        assert caught.value.code == code
        assert caught.value.detail == f"time_stamp is {json.dumps(value)}: {reason}"


def test_moments_in_a_request():
    """Every moment that the page shows for a request is read as it says."""
    shown = lines_of_tables(section(TIME_STAMPS, "Moments in a request"))
    assert {sent: timestamp_text(dropzone.moment_in("since", sent)) for sent, _ in shown} == dict(
        shown
    )
    assert len(shown) >= 4


def test_time_stamps_are_shown():
    """The tables of the page are found, so that the tests above have something to read."""
    assert (len(ACCEPTED), len(REFUSED)) >= (20, 20)


def test_rejection_codes():
    """The page on the API has every code that the service gives a rejected payload."""
    shown = re.findall(r"`(\w+)`", section(REPO / "docs" / "api.md", "Why a payload is rejected"))
    assert set(dropzone.REJECTION_CODES) <= set(shown)
