"""README and docs: what they show runs, and what they name exists."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import machine
import pytest
from test_cli import OK, PATIENCE, Program, Server, closed_port

import dropzone
from backends import timestamp_text

REPO = Path(__file__).parents[2]
README = REPO / "README.md"
PAGES = [README, REPO / "CHANGELOG.md", *sorted((REPO / "docs").glob("*.md"))]
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
    assert named <= dropzone.VARIABLES.keys() | {"DROPZONE_CONFIG"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path):
    """Every command of `dropzone.py` that a page shows is understood."""
    shown = "\n".join(block for _, block in FENCED.findall(page.read_text()))
    shown += "\n".join(re.findall(r"`(python dropzone\.py[^`]*)`", page.read_text()))
    for line in re.findall(r"python dropzone\.py *(.*)$", shown, re.MULTILINE):
        arguments = shlex.split(line.partition("#")[0])
        assert dropzone.arguments(arguments).run


def test_first_session(program: Program):
    """The commands of the first session land, process and read back a payload of this moment."""
    machine.program("curl", package="curl")
    server = Server(program)
    [commands] = blocks(section(README, "A first session"), "sh")
    commands = commands.replace("localhost:8080", server.url.removeprefix("http://"))
    done = subprocess.run(
        ["sh", "-euc", commands.replace("curl", "curl --silent --fail-with-body")],
        cwd=program.home,
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert '"processed":1' in done.stdout
    assert '"mean":0.58' in done.stdout
    [body] = program.payloads("processed").values()
    assert body == (program.home / "payload.json").read_bytes()
    assert server.stop() == OK


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


def test_routes():
    """The page on the API has every route, and no other."""
    table = section(REPO / "docs" / "api.md", "Routes")
    shown = {
        (method, path.partition("?")[0])
        for method, path in re.findall(r"`(GET|POST) (/[^`]*)`", table)
    }
    known = {(route.method, route.path) for route in dropzone.ROUTES if route.answers}
    assert shown == known


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
    source = (REPO / "dropzone.py").read_text()
    given = set(re.findall(r'DataQualityError\(\s*"(\w+)"', source))
    shown = set(
        re.findall(r"`(\w+)`", section(REPO / "docs" / "api.md", "Why a payload is rejected"))
    )
    assert given <= shown
