"""Two nodes behind the nginx of `docs/nginx.conf`, with their rows in one PostgreSQL."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import UUID

import machine
import pytest
from playwright.async_api import Browser, Response, async_playwright, expect
from power_cut import REPO, wait_for
from test_cli import OK, PATIENCE, Program, Server, closed_port

CONFIGURATION = REPO / "docs" / "nginx.conf"
AROUND = """
daemon off;
worker_processes 2;
pid {home}/nginx.pid;
error_log {home}/error.log;
{user}
events {{ worker_connections 512; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    include {home}/dropzone.conf;
}}
"""
MOUNTED = """
from aiohttp import web
from dropzone import create_app, load_config
outer = web.Application()
outer.add_subapp("/mounted/", create_app(load_config()))
web.run_app(outer, host="127.0.0.1", port={port}, print=None)
"""
DEVICES = [f"device-{number}" for number in range(24)]
PREFIXES = pytest.mark.parametrize("prefix", ["", "/dropzone", "/node/0", "/node/1"])


def free_port() -> int:
    with closed_port() as port:
        return port


class Nginx(Server):
    """nginx with the configuration of the docs, which finds the nodes on other ports."""

    def __init__(self, home: Path, nodes: list[int]) -> None:
        home.mkdir()
        port = free_port()
        text = CONFIGURATION.read_text()
        ports = {"listen 8080;": f"listen 127.0.0.1:{port};"}
        ports |= {f"127.0.0.1:{8081 + n};": f"127.0.0.1:{at};" for n, at in enumerate(nodes)}
        ports |= {f"127.0.0.1:{8081 + n} ": f"127.0.0.1:{at} " for n, at in enumerate(nodes)}
        for shown, used in ports.items():
            assert shown in text
            text = text.replace(shown, used)
        (home / "dropzone.conf").write_text(text)
        user = "user root;" if os.getuid() == 0 else ""
        (home / "nginx.conf").write_text(AROUND.format(home=home, user=user))
        self.home, self.url = home, f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen([*self.command(), "-c", home / "nginx.conf"])
        wait_for((home / "nginx.pid").exists, PATIENCE)

    @staticmethod
    def command() -> list[str]:
        return [machine.program("nginx", package="nginx-light"), "-e", "stderr"]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)

    def land(self, device: str, body: bytes = b"{}", prefix: str = "", **headers: str) -> UUID:
        """Land one payload of a device; return its raw_id."""
        path = f"{prefix}/ingest"
        return UUID(self.json("POST", path, body, x_api_key=device, **headers)["raw_id"])


class Node:
    """A Dropzone with a number and a folder of its own, on a port that outlives it."""

    def __init__(self, home: Path, number: int, url: str) -> None:
        home.mkdir()
        self.program, self.number, self.port = Program(home), number, free_port()
        self.settings = {"DROPZONE_NODE_ID": number, "DROPZONE_DATABASE_URL": url}

    def start(self) -> None:
        self.server = Server(self.program, "--port", self.port, **self.settings)

    def start_mounted(self) -> None:
        """Start a program that has it below /mounted/."""
        code = self.program.home / "outer.py"
        code.write_text(MOUNTED.format(port=self.port))
        self.program.command = (sys.executable, code)
        self.program.start(PYTHONPATH=REPO, **self.settings)
        wait_for(self.listens, PATIENCE)

    def listens(self) -> bool:
        with socket.socket() as connection:
            return connection.connect_ex(("127.0.0.1", self.port)) == 0

    def holds(self, raw_id: UUID) -> bool:
        return raw_id in self.program.payloads()


def digits(raw_id: UUID) -> int:
    """Return the node's number in the last four digits of a raw_id."""
    return int(str(raw_id)[-4:], 16)


@pytest.fixture
def nodes(tmp_path: Path, postgres_url: str) -> Iterator[list[Node]]:
    """Two nodes that have not been started."""
    made = [Node(tmp_path / f"node-{number}", number, postgres_url) for number in range(2)]
    yield made
    for node in made:
        node.program.close()


@pytest.fixture
def nginx(tmp_path: Path, nodes: list[Node]) -> Iterator[Nginx]:
    proxy = Nginx(tmp_path / "nginx", [node.port for node in nodes])
    yield proxy
    proxy.close()


@pytest.fixture
def running(nginx: Nginx, nodes: list[Node]) -> Nginx:
    """The proxy, with both nodes behind it."""
    for node in nodes:
        node.start()
    return nginx


def payload(minute: int) -> bytes:
    stamp = f"2019-05-01T10:{minute:02}:00Z"
    return json.dumps({"time_stamp": stamp, "data": [minute]}).encode()


def homes(nginx: Nginx) -> dict[str, int]:
    """Land a payload of each device; return the number of the node that took it."""
    return {device: digits(nginx.land(device)) for device in DEVICES}


def test_the_file_as_it_stands(tmp_path: Path):
    """nginx accepts the file of the docs without a change."""
    shutil.copy(CONFIGURATION, tmp_path / "dropzone.conf")
    (tmp_path / "nginx.conf").write_text(AROUND.format(home=tmp_path, user=""))
    command = [*Nginx.command(), "-t", "-c", tmp_path / "nginx.conf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == OK, done.stderr


# ── Which node ────────────────────────────────────────────────────────────────────────────────────


def test_a_device_stays_on_one_node(running: Nginx, nodes: list[Node]):
    """All payloads of a key go to one node, by whichever header it is sent; both nodes get some."""
    before = homes(running)
    assert set(before.values()) == {0, 1}
    assert homes(running) == before
    for device in DEVICES:
        bearer = {"Authorization": f"Bearer {device}"}
        taken = {running.json("POST", "/ingest", b"{}", **bearer)["raw_id"][-4:] for _ in range(3)}
        assert len(taken) == 1
    for node in nodes:
        assert all(digits(raw_id) == node.number for raw_id in node.program.payloads())


def test_a_device_without_a_key(running: Nginx):
    """Who has no key is known by the address."""
    taken = {running.json("POST", "/ingest", b"{}")["raw_id"][-4:] for _ in range(10)}
    assert len(taken) == 1


def test_a_retry_with_its_idempotency_key(running: Nginx, nodes: list[Node]):
    """A retry of a device meets its Idempotency-Key, and lands once."""
    for device in DEVICES:
        first, second = (running.land(device, Idempotency_Key=device) for _ in range(2))
        assert first == second
    assert sum(len(node.program.payloads()) for node in nodes) == len(DEVICES)


@PREFIXES
def test_a_payload_is_found(running: Nginx, prefix: str):
    """Receipt and payload come from the node whose number the raw_id ends with."""
    bodies = {running.land(device, payload(n)): payload(n) for n, device in enumerate(DEVICES)}
    assert {digits(raw_id) for raw_id in bodies} == {0, 1}
    for raw_id, body in bodies.items():
        assert running.json("GET", f"{prefix}/raw/{raw_id}")["state"] == "pending"
        for text in (str(raw_id), str(raw_id).upper()):
            status, _, found = running.request("GET", f"{prefix}/raw/{text}/payload")
            assert (status, found) == (200, body)


def test_a_payload_from_before_there_were_nodes(running: Nginx, nodes: list[Node]):
    """A raw_id whose digits name no node of the proxy is looked for on node 0."""
    old = "019a213c-f8de-7747-a52b-6c6e5885face"
    folder = nodes[0].program.home / "data" / "processed" / "2025-10-26"
    folder.mkdir(parents=True)
    (folder / f"{old}.json").write_bytes(payload(1))
    assert running.json("GET", f"/raw/{old}")["state"] == "processed"


def test_each_node_has_its_own_state(running: Nginx, nodes: list[Node]):
    """Below /node/0/ and /node/1/ each processes its own; the rows of both are read at any."""
    raw_ids = [running.land(device, payload(n)) for n, device in enumerate(DEVICES)]
    for node in nodes:
        own = sum(digits(raw_id) == node.number for raw_id in raw_ids)
        assert running.json("GET", f"/node/{node.number}/status")["pending"] == own
        done = running.json("POST", f"/node/{node.number}/process")
        assert (done["processed"], done["remaining"]) == (own, 0)
    for prefix in ("", "/node/0", "/node/1"):
        rows = running.json("GET", f"{prefix}/measurements")["measurements"]
        assert [UUID(row["raw_id"]) for row in rows] == raw_ids


# ── A node that is away ───────────────────────────────────────────────────────────────────────────


def test_a_node_that_is_down(running: Nginx, nodes: list[Node]):
    """Its devices land on the other one, and return with it; only its own receipts are away."""
    before = homes(running)
    its = next(device for device, node in before.items() if node == 1)
    raw_id = running.land(its)
    assert nodes[1].server.stop() == OK
    assert homes(running) == dict.fromkeys(DEVICES, 0)
    status, headers, text = running.request("GET", f"/raw/{raw_id}")
    assert (status, headers["Content-Type"]) == (503, "application/problem+json")
    assert (int(headers["Retry-After"]), json.loads(text)["code"]) == (5, "node_away")
    nodes[1].start()
    assert homes(running) == before
    assert running.json("GET", f"/raw/{raw_id}")["state"] == "pending"


def test_a_node_that_refuses(running: Nginx, nodes: list[Node]):
    """A payload that a node cannot take is taken by the other, though its own paths say why not."""
    before = homes(running)
    raw = nodes[1].program.home / "data" / "raw"
    raw.rename(raw.with_name("elsewhere"))
    assert running.request("POST", "/node/1/ingest", b"{}")[0] == 503
    assert homes(running) == dict.fromkeys(DEVICES, 0)
    raw.with_name("elsewhere").rename(raw)
    wait_for(lambda: running.request("GET", "/node/1/ready")[0] == 200, PATIENCE)
    assert homes(running) == before


def test_a_node_that_dies_in_the_midst(running: Nginx, nodes: list[Node]):
    """A payload on its way to a node that dies is handed to the other, and acknowledged there."""
    its = next(device for device, node in homes(running).items() if node == 1)
    process = nodes[1].server.process
    process.send_signal(signal.SIGSTOP)
    sending = subprocess.Popen(
        [
            *(machine.program("curl", package="curl"), "--silent", "--data-binary", "{}"),
            *("--header", f"x-api-key: {its}", f"{running.url}/ingest"),
        ],
        stdout=subprocess.PIPE,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        sending.wait(0.5)
    process.kill()
    out, _ = sending.communicate(timeout=PATIENCE)
    raw_id = UUID(json.loads(out)["raw_id"])
    assert nodes[0].holds(raw_id)


def test_no_node_at_all(nginx: Nginx):
    """Where no node answers, a device gets a problem document, and when to try again."""
    status, headers, text = nginx.request("POST", "/ingest", b"{}")
    assert (status, headers["Retry-After"], json.loads(text)["code"]) == (503, "5", "node_away")


# ── Bodies and answers ────────────────────────────────────────────────────────────────────────────


def test_large_bodies(running: Nginx):
    """A body up to the limit lands byte for byte; Dropzone's own words say what is too large."""
    body = b'{"data": "%s"}' % (b"x" * (2**25 - 12))
    raw_id = running.land("device", body)
    assert running.request("GET", f"/raw/{raw_id}/payload")[2] == body
    status, _, text = running.request("POST", "/ingest", body + b" ")
    assert (status, json.loads(text)["code"]) == (413, "payload_too_large")


def test_csv(running: Nginx):
    """The whole range comes through as CSV, in pieces."""
    many = b"\n".join(
        b'{"time_stamp": "%d-%02d-01T00:00:00Z", "data": [1]}' % (1001 + n // 12, n % 12 + 1)
        for n in range(12_000 - 12)
    )
    running.request("POST", "/node/0/ingest", many)
    running.request("POST", "/node/0/process")
    text = running.request("GET", "/measurements?format=csv")[2]
    assert len(text.splitlines()) == 1 + 12_000 - 12


# ── Below a prefix ────────────────────────────────────────────────────────────────────────────────


Behind = Callable[[str], Nginx]


@pytest.fixture
def behind(nginx: Nginx, nodes: list[Node]) -> Behind:
    """Return what starts both nodes so that all of them answers below a prefix."""

    def begin(prefix: str) -> Nginx:
        for node in nodes:
            if prefix == "/mounted":
                node.start_mounted()
            else:
                node.start()
        return nginx

    return begin


BELOW = pytest.mark.parametrize("prefix", ["/dropzone", "/node/1", "/mounted"])


@BELOW
def test_links_below_a_prefix(behind: Behind, prefix: str):
    """Location, Link and the servers of the OpenAPI document lead back through the proxy."""
    nginx = behind(prefix)
    for minute in range(3):
        status, headers, _ = nginx.request("POST", f"{prefix}/ingest", payload(minute))
        assert (status, headers["Location"].startswith(f"{prefix}/raw/")) == (202, True)
        assert nginx.json("GET", headers["Location"])["state"] == "pending"
    assert nginx.json("POST", f"{prefix}/process")["processed"] == 3
    _, headers, _ = nginx.request("GET", f"{prefix}/measurements?limit=2")
    [following] = re.findall(r'<([^>]+)>; rel="next"', headers["Link"])
    assert len(nginx.json("GET", following)["measurements"]) == 1
    assert "Link" not in nginx.request("GET", f"{prefix}/measurements")[1]
    assert nginx.json("GET", f"{prefix}/openapi.json")["servers"] == [{"url": prefix}]


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    path = machine.browser()
    root = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium has no sandbox for root
    async with async_playwright() as playwright:
        started = await playwright.chromium.launch(executable_path=path, args=root)
        yield started
        await started.close()


@BELOW
async def test_page_and_docs_below_a_prefix(behind: Behind, prefix: str, browser: Browser):
    """The page and the documentation work there, and ask for nothing outside."""
    nginx = behind(prefix)
    nginx.land("device", payload(1), prefix=prefix)
    seen: list[Response] = []
    page = await browser.new_page()
    page.on("response", lambda response: seen.append(response))  # noqa: PLW0108 (Playwright's wish)
    async with page.expect_response("**/status*"):
        await page.goto(f"{nginx.url}{prefix}")
    await page.goto(f"{nginx.url}{prefix}/docs")
    await expect(page.locator(".servers select")).to_have_value(prefix, timeout=20_000)
    await expect(page.get_by_text("/ingest").first).to_be_visible()
    answers = [(answer.url.removeprefix(nginx.url), answer.status) for answer in seen]
    assert all(path.startswith(prefix) and status < 400 for path, status in answers), answers
