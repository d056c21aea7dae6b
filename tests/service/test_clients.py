"""The clients in docs/clients.md as they stand there, with a server that is not always there."""

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import machine
import pytest
from test_cli import LINE, OK, PATIENCE, Program, Server, closed_port

CLIENTS = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
KEY = "sesam"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n"


def snippet(language: str, words: str) -> str:
    """Return the one block of the page in a language that has these words."""
    blocks = re.findall(rf"```{language}\n(.*?)```", CLIENTS, re.DOTALL)
    [found] = [block for block in blocks if words in block]
    return str(found)


SEND = snippet("sh", "send() {")
CURL = snippet("sh", "gzip -c")
PYTHON = snippet("python", "HTTPAdapter")
MICROPYTHON = snippet("python", "import json, os, requests")


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


def start(program: Program, port: int = 0) -> Server:
    return Server(program, "--port", port, DROPZONE_API_KEY=KEY, DROPZONE_BACKEND="memory")


async def run(program: Program, url: str, *command: str) -> str:
    """Run a client to its end; return what it printed."""
    clients = {"DROPZONE": url, "DROPZONE_API_KEY": KEY, "PATH": os.environ["PATH"]}
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


COMMANDS = {
    "curl": ("sh", "-ec", f"{SEND}\nsend payload.json"),
    "python": (
        *(sys.executable, "-c"),
        f"{PYTHON}\nimport json\nprint(send(json.load(open('payload.json'))))",
    ),
}


@pytest.mark.linux
@pytest.mark.parametrize("client", COMMANDS)
async def test_once(program: Program, client: str) -> None:
    """What was refused, then landed without an answer, and was sent again has landed once."""
    server = await asyncio.to_thread(start, program)
    async with busy_at_first(server) as url:
        printed = await run(program, url, *COMMANDS[client])
    [raw_id] = program.payloads()
    assert str(raw_id) in printed


@pytest.mark.linux
@pytest.mark.parametrize("client", COMMANDS)
async def test_server_that_comes_later(program: Program, client: str) -> None:
    """A client outlasts the restart of a server: it connects once somebody listens again."""
    with closed_port() as port:
        pass
    sending = asyncio.create_task(run(program, f"http://127.0.0.1:{port}", *COMMANDS[client]))
    await asyncio.to_thread(start, program, port)
    await sending
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


@pytest.mark.linux
async def test_curl(program: Program) -> None:
    """The commands for curl land one payload plainly, one compressed, and each line of a file."""
    server = await asyncio.to_thread(start, program)
    await run(program, server.url, "sh", "-ec", f"{SEND}\n{CURL}")
    assert list(program.payloads().values()) == [LINE] * 4


@pytest.mark.linux
async def test_refused_for_good(program: Program) -> None:
    """What will never be taken is sent once, and the shell's client says so by its exit code."""
    (program.home / "broken.json").write_bytes(b"{")
    server = await asyncio.to_thread(start, program)
    printed = await run(program, server.url, "sh", "-c", f"{SEND}\nsend broken.json; echo $?")
    assert printed == "1\n"
    assert server.stop() == OK
    assert server.log.count("code=payload_not_json") == 1


@pytest.mark.linux
async def test_worth_another_try(program: Program) -> None:
    """Where nobody listens for good, the shell's client says by its exit code that it gave up."""
    impatient = SEND.replace("--retry 8", "--retry 1")
    with closed_port() as port:
        call = f"{impatient}\nsend payload.json 2>/dev/null; echo $?"
        assert await run(program, f"http://127.0.0.1:{port}", "sh", "-c", call) == "75\n"
