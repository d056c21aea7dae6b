"""The clients in docs/clients.md as they stand there, with a server that is not always there."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import machine
import pytest
from test_cli import LINE, OK, PATIENCE, Program, Server, closed_port

PAGE = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
KEY = "sesam"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


def snippet(language: str, words: str) -> str:
    """Return the one block of the page in a language that has these words."""
    blocks = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    [found] = [block for block in blocks if words in block]
    return str(found)


SEND = snippet("sh", "send() {")
CURL = snippet("sh", "gzip --keep")
PYTHON = snippet("python", "HTTPAdapter")
MICROPYTHON = snippet("python", "import json, os, requests")
ARDUINO = snippet("cpp", "HTTPClient.h")
PATIENT = {"curl": SEND, "python": PYTHON, "arduino": ARDUINO}
IMPATIENT = {
    "curl": SEND.replace("--retry 8", "--retry 1"),
    "python": PYTHON.replace("total=8", "total=1"),
    "arduino": ARDUINO.replace("pause <= 64", "pause <= 1"),
}
# Each sends payload.json, and prints what it was told: the answer, "never" or "later".
OUTCOMES = {
    "curl": """
send payload.json 2>/dev/null || { [ $? = 1 ] && echo never || echo later; }
""",
    "python": """
try:
    print(send(json.load(open("payload.json"))))
except requests.HTTPError:
    print("never")
except requests.RequestException:
    print("later")
""",
    "arduino": """
#include <cstdio>

int main(int, char** arguments) {
  const Sent sent = send(arguments[1], arguments[2], arguments[3], newKey());
  puts(sent == Sent::now ? HTTPClient::body.c_str() : sent == Sent::never ? "never" : "later");
}
""",
}
ARDUINO_CORE = Path(__file__).parent / "arduino"  # so much of it that the sketch runs here


def command_of(program: Program, client: str, codes: dict[str, str] = PATIENT) -> tuple[str, ...]:
    """Return the command that sends payload.json by a client of the page."""
    code = codes[client] + OUTCOMES[client]
    if client == "curl":
        return ("sh", "-uc", code)
    if client == "python":
        return (sys.executable, "-c", code)
    sketch = program.home / "sketch"
    compiler = machine.program("c++", package="g++")
    options = ("-std=c++17", "-Wall", "-Werror", "-I", ARDUINO_CORE, "-o", sketch, "-x", "c++", "-")
    subprocess.run((compiler, *options), input=code, text=True, check=True)
    run_it = f'{sketch} "$DROPZONE" "$DROPZONE_API_KEY" "$(cat payload.json)"'
    return ("sh", "-uc", run_it)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    made = Program(tmp_path)
    (tmp_path / "payload.json").write_bytes(LINE)
    (tmp_path / "day.ndjson").write_bytes(LINE + b"\n" + LINE + b"\n")
    yield made
    made.close()


@pytest.fixture(scope="module", autouse=True)
def curl() -> str:
    return machine.program("curl", package="curl")


def start(program: Program, port: int = 0, **settings: object) -> Server:
    settings = {"DROPZONE_API_KEY": KEY, "DROPZONE_BACKEND": "memory"} | settings
    return Server(program, "--port", port, **settings)


async def run(program: Program, url: str, *command: str, key: str = KEY) -> str:
    """Run a client to its end; return what it printed."""
    clients = {"DROPZONE": url, "DROPZONE_API_KEY": key, "PATH": os.environ["PATH"]}
    done = await asyncio.to_thread(
        subprocess.run,
        command,
        cwd=program.home,
        env=clients,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == OK, done.stderr
    return str(done.stdout)


@asynccontextmanager
async def busy_at_first(server: Server) -> AsyncIterator[str]:
    """Stand before a server: refuse once, lose one answer, then let everything through."""
    host, port = server.url.removeprefix("http://").split(":")
    seen = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen += 1
        head = await reader.readuntil(b"\r\n\r\n")
        [length] = re.findall(rb"(?i)content-length: (\d+)", head)
        request = head + await reader.readexactly(int(length))
        if seen == 1:
            writer.write(BUSY)
        else:
            behind, there = await asyncio.open_connection(host, int(port))
            there.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            answer = await behind.read()
            there.close()
            writer.write(b"" if seen == 2 else answer)  # it has landed, and nobody hears of it
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as front:
        yield "http://{}:{}".format(*front.sockets[0].getsockname())
        assert seen == 3


@pytest.mark.linux
@pytest.mark.parametrize("client", PATIENT)
async def test_once(program: Program, client: str) -> None:
    """What was refused, then landed without an answer, and was sent again has landed once."""
    server = await asyncio.to_thread(start, program)
    async with busy_at_first(server) as url:
        printed = await run(program, url, *command_of(program, client))
    [raw_id] = program.payloads()
    assert str(raw_id) in printed


@pytest.mark.linux
@pytest.mark.parametrize("client", PATIENT)
async def test_server_that_comes_later(program: Program, client: str) -> None:
    """A client outlasts the restart of a server: it connects once somebody listens again."""
    with closed_port() as port:
        pass
    command = command_of(program, client)
    sent = asyncio.create_task(run(program, f"http://127.0.0.1:{port}", *command))
    await asyncio.to_thread(start, program, port)
    await sent
    assert len(program.payloads()) == 1


async def test_queue(program: Program) -> None:
    """The client for MicroPython, run by Python, keeps what it cannot send and sends all later."""
    with closed_port() as port:
        pass
    call = f"print(send('http://127.0.0.1:{port}', '{KEY}', {{'n': 1}}))"
    client = (sys.executable, "-c", f"{MICROPYTHON}\n{call}")
    assert await run(program, "", *client) == "False\n"
    await asyncio.to_thread(start, program, port)
    assert await run(program, "", *client) == "True\n"
    assert list(program.payloads().values()) == [b'{"n": 1}'] * 2
    assert not (program.home / "queue.ndjson").exists()


async def test_a_week_in_the_queue(program: Program) -> None:
    """Of 60,000 queued lines, one of them torn and some with `nan`, each good reading gets its row.

    So it is what MicroPython prints, on which the power failed in the middle of a line.
    """
    server = await asyncio.to_thread(start, program)
    begin = datetime(2026, 11, 20, tzinfo=UTC)
    moments = [begin + timedelta(seconds=10 * number) for number in range(60_000)]
    queued = [f'{{"time_stamp": "{moment.isoformat()}", "data": [1.5, 2]}}' for moment in moments]
    queued[5000] = queued[5000].replace("1.5", "nan")
    queued[59_999] = queued[59_999][:40]
    (program.home / "queue.ndjson").write_text("\n".join(queued))
    reading = {"time_stamp": "2026-11-28T00:00:00Z", "data": [1]}
    call = f"print(send('{server.url}', '{KEY}', {reading}))"
    assert await run(program, "", sys.executable, "-c", f"{MICROPYTHON}\n{call}") == "True\n"
    assert not (program.home / "queue.ndjson").exists()
    assert server.stop() == OK
    done = await asyncio.to_thread(program.run, "process")
    result = json.loads(done.stdout)
    codes = [rejection["code"] for rejection in result["rejected"]]
    assert (result["processed"], codes) == (59_999, ["value_not_finite", "payload_not_json"])


async def test_refused_queues(program: Program) -> None:
    """What the client for MicroPython was refused for good is kept, also a second time."""
    server = await asyncio.to_thread(start, program, 0, DROPZONE_SERVER_MAX_BODY_BYTES=100)
    for number in (1, 2):
        (program.home / "queue.ndjson").write_text(f"{number}\n" * 50)
        call = f"print(send('{server.url}', '{KEY}', {{'n': {number}}}))"
        assert await run(program, "", sys.executable, "-c", f"{MICROPYTHON}\n{call}") == "False\n"
    for number in (1, 2):
        kept = (program.home / f"refused-{number}.ndjson").read_text()
        assert kept == f"{number}\n" * 50 + f'\n{{"n": {number}}}\n'


@pytest.mark.linux
async def test_curl(program: Program) -> None:
    """The commands for curl land one payload plainly, one compressed, and each line of a file."""
    server = await asyncio.to_thread(start, program)
    await run(program, server.url, "sh", "-ec", f"{SEND}\n{CURL}")
    assert list(program.payloads().values()) == [LINE] * 4


@pytest.mark.linux
@pytest.mark.parametrize("client", PATIENT)
async def test_refused_for_good(program: Program, client: str) -> None:
    """What will never be taken as it is was sent once, and the client says that it is final."""
    server = await asyncio.to_thread(start, program)
    command = command_of(program, client)
    assert await run(program, server.url, *command, key="wrong") == "never\n"
    if client != "python":  # which makes its JSON itself
        (program.home / "payload.json").write_bytes(b"{")
        assert await run(program, server.url, *command) == "never\n"
    assert server.stop() == OK
    assert server.log.count("code=key_refused") == 1
    assert server.log.count("code=payload_not_json") == (client != "python")


@pytest.mark.linux
@pytest.mark.parametrize("client", IMPATIENT)
async def test_worth_another_try(program: Program, client: str) -> None:
    """Where nobody listens for long, the client gives up, and says that it is worth another try."""
    assert IMPATIENT[client] != PATIENT[client]
    command = command_of(program, client, IMPATIENT)
    with closed_port() as port:
        assert await run(program, f"http://127.0.0.1:{port}", *command) == "later\n"


async def test_not_a_number(program: Program) -> None:
    """What is no number lands all the same, to be rejected with a reason that a person can see."""
    (program.home / "payload.json").write_bytes(b'{"data": [NaN]}')
    server = await asyncio.to_thread(start, program)
    printed = await run(program, server.url, *command_of(program, "python"))
    assert program.payloads() == {UUID(printed.strip()): b'{"data": [NaN]}'}
