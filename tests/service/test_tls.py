"""Serving https: which certificates are taken, who is let in, and how they are changed."""

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

import dropzone
from dropzone import ConfigError, ServerConfig, tls_context

DROPZONE = Path(dropzone.__file__).resolve()
PATIENCE = 60  # seconds until something that does not happen is taken for broken
REQUEST = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


class Server:
    """A serving `dropzone.py` whose settings are variables; what it logs is in a file."""

    def __init__(self, home: Path, **variables: object) -> None:
        for name in ("config.toml", ".env"):
            (home / name).touch()
        self.log_file = home / "log"
        clean = {n: text for n, text in os.environ.items() if not n.startswith("DROPZONE_")}
        given = {f"DROPZONE_SERVER_{name.upper()}": str(text) for name, text in variables.items()}
        with self.log_file.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, DROPZONE, "--port", "0"], cwd=home, env=clean | given, stderr=log
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def logged(self, pattern: str, times: int = 1) -> str:
        """Wait until something is logged; return it."""
        deadline = time.monotonic() + PATIENCE
        while len(found := re.findall(pattern, self.log)) < times:
            assert time.monotonic() < deadline, self.log
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        return found[-1]

    def connect(
        self,
        context: ssl.SSLContext,
        name: str | None = "localhost",
        session: ssl.SSLSession | None = None,
    ) -> ssl.SSLSocket:
        port = int(self.logged(r"listening on https://127\.0\.0\.1:(\d+)"))
        plain = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        return context.wrap_socket(plain, server_hostname=name, session=session)

    def hang_up(self) -> None:
        """Have the certificates loaded at once."""
        self.process.send_signal(signal.SIGHUP)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Return what starts a server; it ends with the test."""
    started: list[Server] = []

    def begin(**variables: object) -> Server:
        started.append(Server(tmp_path, **variables))
        return started[-1]

    yield begin
    for server in started:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


class Files:
    """The files of a server's certificate, beside each other, as an operator keeps them."""

    def __init__(self, folder: Path, authority: trustme.CA) -> None:
        self.cert, self.key, self.ca = (folder / f"{name}.pem" for name in ("cert", "key", "ca"))
        self.issue(authority)

    def issue(self, authority: trustme.CA) -> None:
        """Replace the certificate and its key by new ones."""
        issued = authority.issue_cert("localhost", "127.0.0.1")
        self.put(self.key, issued.private_key_pem.bytes())
        self.put(self.cert, b"".join(blob.bytes() for blob in issued.cert_chain_pems))

    def put(self, file: Path, content: bytes) -> None:
        beside = file.with_suffix(".new")
        beside.write_bytes(content)
        beside.replace(file)


@pytest.fixture
def files(tmp_path: Path, authority: trustme.CA) -> Files:
    return Files(tmp_path, authority)


def trusting(authority: trustme.CA, client: trustme.LeafCert | None = None) -> ssl.SSLContext:
    """Return the context of a client that trusts an authority, and shows its own certificate."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    if client:
        client.configure_cert(context)
    return context


def ask(connection: ssl.SSLSocket) -> bytes:
    connection.sendall(REQUEST)
    return connection.recv(65536)


def serial_of(connection: ssl.SSLSocket) -> object:
    """Return the number of the server's certificate."""
    return (connection.getpeercert() or {})["serialNumber"]


# ── Serving ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["localhost", None])
def test_https(start: Callable[..., Server], files: Files, authority: trustme.CA, name: str | None):
    """With a certificate the service speaks https, also to a client that names no server."""
    server = start(tls_cert=files.cert, tls_key=files.key)
    context = trusting(authority)
    context.check_hostname = name is not None
    with server.connect(context, name) as connection:
        assert ask(connection).startswith(b"HTTP/1.1 200")
        assert connection.version() in {"TLSv1.2", "TLSv1.3"}
    server.process.terminate()
    assert server.process.wait(PATIENCE) == 0
    assert "Traceback" not in server.log


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1")
@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1 ")
def test_old_protocols(start: Callable[..., Server], files: Files, authority: trustme.CA):
    """TLS 1.2 is spoken, TLS 1.1 is not."""
    server = start(tls_cert=files.cert, tls_key=files.key)
    context = trusting(authority)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with server.connect(context) as connection:
        assert ask(connection)
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        server.connect(context)


def test_plain_http_is_not_answered(start: Callable[..., Server], files: Files):
    """Whoever speaks plain http to it is not answered, and disturbs nobody."""
    server = start(tls_cert=files.cert, tls_key=files.key)
    port = int(server.logged(r"listening on https://127\.0\.0\.1:(\d+)"))
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as plain:
        plain.sendall(REQUEST)
        with suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(65536)
    assert server.process.poll() is None


# ── Client certificates ───────────────────────────────────────────────────────────────────────────


def is_let_in(
    server: Server, context: ssl.SSLContext, session: ssl.SSLSession | None = None
) -> bool:
    try:  # in TLS 1.3 the client learns of it behind its own handshake
        with server.connect(context, session=session) as connection:
            return ask(connection).startswith(b"HTTP/1.1 200")
    except (ssl.SSLError, ConnectionResetError, BrokenPipeError):
        return False


def test_client_certificates(start: Callable[..., Server], files: Files, authority: trustme.CA):
    """With an authority for clients, only those with a certificate of it are let in."""
    fleet, stranger = trustme.CA(), trustme.CA()
    files.put(files.ca, fleet.cert_pem.bytes())
    server = start(tls_cert=files.cert, tls_key=files.key, tls_client_ca=files.ca)
    assert is_let_in(server, trusting(authority, fleet.issue_cert("device@example.org")))
    assert not is_let_in(server, trusting(authority, stranger.issue_cert("device@example.org")))
    assert not is_let_in(server, trusting(authority))


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_changed_authority(
    start: Callable[..., Server], files: Files, authority: trustme.CA, version: ssl.TLSVersion
):
    """An authority that is replaced lets nobody in any more, whoever was in before included."""
    old, new = trustme.CA(), trustme.CA()
    files.put(files.ca, old.cert_pem.bytes())
    server = start(tls_cert=files.cert, tls_key=files.key, tls_client_ca=files.ca)
    device, newer = (trusting(authority, each.issue_cert("d@example.org")) for each in (old, new))
    device.minimum_version = device.maximum_version = version
    with server.connect(device) as connection:
        assert ask(connection).startswith(b"HTTP/1.1 200")
        session = connection.session
    assert not is_let_in(server, newer)
    files.put(files.ca, new.cert_pem.bytes())
    server.hang_up()
    server.logged("certificates were loaded again")
    assert not is_let_in(server, device)
    assert not is_let_in(server, device, session)
    assert is_let_in(server, newer)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_sessions_of_a_changed_authority(
    start: Callable[..., Server], files: Files, authority: trustme.CA, version: ssl.TLSVersion
):
    """No session outlives the authority by which it was let in; a ticket for one is never sent."""
    old, new = trustme.CA(), trustme.CA()
    files.put(files.ca, old.cert_pem.bytes())
    server = start(tls_cert=files.cert, tls_key=files.key, tls_client_ca=files.ca)
    device = trusting(authority, old.issue_cert("d@example.org"))
    device.minimum_version = device.maximum_version = version
    with server.connect(device) as connection:
        assert ask(connection).startswith(b"HTTP/1.1 200")
        session = connection.session
        assert not (session and session.has_ticket)
        with suppress(OSError):
            connection.unwrap()  # or else the server would forget the session by itself
    files.put(files.ca, new.cert_pem.bytes())
    server.hang_up()
    server.logged("certificates were loaded again")
    assert not is_let_in(server, device, session)


# ── Rotation ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("way", ["SIGHUP", "file"])
def test_rotation(start: Callable[..., Server], files: Files, authority: trustme.CA, way: str):
    """A new certificate is shown to new connections; those that are open go on."""
    server = start(tls_cert=files.cert, tls_key=files.key)
    context = trusting(authority)
    with server.connect(context) as before:
        assert ask(before)
        files.issue(authority)
        if way == "SIGHUP":
            server.hang_up()
        server.logged("certificates were loaded again")
        with server.connect(context) as after:
            assert serial_of(after) != serial_of(before)
            assert ask(after).startswith(b"HTTP/1.1 200")
        assert ask(before).startswith(b"HTTP/1.1 200")


def test_broken_rotation(start: Callable[..., Server], files: Files, authority: trustme.CA):
    """A new certificate without its key is named in the log, the old one stays until both fit."""
    server = start(tls_cert=files.cert, tls_key=files.key)
    context = trusting(authority)
    with server.connect(context) as connection:
        serial = serial_of(connection)
    key = files.key.read_bytes()
    files.issue(authority)
    newer = files.key.read_bytes()
    files.put(files.key, key)
    server.hang_up()
    server.logged("tls_cert with tls_key cannot be used .* still holds")
    with server.connect(context) as connection:
        assert serial_of(connection) == serial
        assert ask(connection).startswith(b"HTTP/1.1 200")
    files.put(files.key, newer)
    server.logged("certificates were loaded again")
    with server.connect(context) as connection:
        assert serial_of(connection) != serial
    assert "PRIVATE KEY" not in server.log


def test_sighup_reads_the_keys(start: Callable[..., Server]):
    """SIGHUP has the keys read again too, and never ends a server, with TLS or without."""
    server = start()
    server.logged("listening on http:")
    for times in (1, 2):
        server.hang_up()
        server.logged("API keys were read again", times)
    assert server.process.poll() is None


# ── What cannot be served ─────────────────────────────────────────────────────────────────────────


def wrong(files: Files, folder: Path) -> dict[str, tuple[ServerConfig, str]]:
    """Return settings that cannot work, each with what has to be named."""
    other = Files(folder / "other", trustme.CA())
    missing, text, locked = folder / "missing.pem", folder / "text.pem", folder / "locked.pem"
    text.write_text("no certificate")
    key = load_pem_private_key(files.key.read_bytes(), None)
    form = PrivateFormat.TraditionalOpenSSL
    locked.write_bytes(key.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"x")))
    return {
        "no cert": (ServerConfig(tls_key=files.key), "tls_cert"),
        "only a client ca": (ServerConfig(tls_client_ca=files.cert), "tls_cert"),
        "no key": (ServerConfig(tls_cert=files.cert), "tls_key"),
        "missing cert": (ServerConfig(tls_cert=missing, tls_key=files.key), "missing.pem"),
        "missing key": (ServerConfig(tls_cert=files.cert, tls_key=missing), "missing.pem"),
        "folder": (ServerConfig(tls_cert=files.cert, tls_key=folder), str(folder)),
        "mismatch": (ServerConfig(tls_cert=files.cert, tls_key=other.key), "mismatch"),
        "no PEM": (ServerConfig(tls_cert=text, tls_key=files.key), "tls_cert"),
        "encrypted": (ServerConfig(tls_cert=files.cert, tls_key=locked), "unencrypted"),
        "client ca": (
            ServerConfig(tls_cert=files.cert, tls_key=files.key, tls_client_ca=text),
            "tls_client_ca",
        ),
    }


CASES = ("no cert", "only a client ca", "no key", "missing cert", "missing key", "folder")


@pytest.mark.parametrize("case", [*CASES, "mismatch", "no PEM", "encrypted", "client ca"])
def test_wrong_files(files: Files, tmp_path: Path, case: str):
    """Files that are missing, broken, locked or do not belong together are named."""
    (tmp_path / "other").mkdir()
    config, named = wrong(files, tmp_path)[case]
    with pytest.raises(ConfigError, match=re.escape(named)):
        tls_context(config)


def test_cert_and_key_in_one_file(files: Files):
    """The key may lie in the file of the certificate."""
    files.put(files.cert, files.key.read_bytes() + files.cert.read_bytes())
    assert tls_context(ServerConfig(tls_cert=files.cert))


@pytest.mark.parametrize("command", ["serve", "check"])
def test_wrong_file_at_the_start(tmp_path: Path, command: str):
    """A wrong file ends the program with exit code 78, and a line that names it."""
    for name in ("config.toml", ".env"):
        (tmp_path / name).touch()
    done = subprocess.run(
        [sys.executable, DROPZONE, command],
        cwd=tmp_path,
        env=os.environ | {"DROPZONE_SERVER_TLS_CERT": "nowhere.pem", "DROPZONE_SERVER_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 78
    assert "nowhere.pem" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


# ── The health check ──────────────────────────────────────────────────────────────────────────────


def asked(home: Path, port: str, **variables: object) -> "subprocess.CompletedProcess[str]":
    """Run `ready` with the settings of a server."""
    clean = {n: text for n, text in os.environ.items() if not n.startswith("DROPZONE_")}
    given = {f"DROPZONE_SERVER_{name.upper()}": str(text) for name, text in variables.items()}
    return subprocess.run(
        [sys.executable, DROPZONE, "ready", "--port", port],
        cwd=home,
        env=clean | given,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@pytest.mark.parametrize("way", ["http", "https", "client certificates"])
def test_health_check(
    start: Callable[..., Server], files: Files, authority: trustme.CA, tmp_path: Path, way: str
):
    """`ready` asks the server as it is configured, whatever address and name it is for."""
    files.put(files.ca, authority.cert_pem.bytes())
    tls = {"tls_cert": files.cert, "tls_key": files.key, "tls_client_ca": files.ca}
    given = dict(list(tls.items())[: {"http": 0, "https": 2}.get(way, 3)])
    server = start(host="0.0.0.0", **given)
    port = server.logged(r"listening on https?://0\.0\.0\.0:(\d+)")
    done = asked(tmp_path, port, host="0.0.0.0", **given)
    assert (done.returncode, done.stderr) == (0, "")
    said = "it answers" if way == "client certificates" else '{"status":"ok"'
    assert done.stdout.startswith(said)
    server.process.kill()
    server.process.wait()
    done = asked(tmp_path, port, host="0.0.0.0", **given)
    assert (done.returncode, done.stdout) == (69, "")
    assert f"port {port} is not ready" in done.stderr


@pytest.mark.parametrize("tls", [False, True])
def test_health_check_of_a_server_that_hangs(
    start: Callable[..., Server], files: Files, tmp_path: Path, *, tls: bool
):
    """A server that takes connections and never answers is not ready, in seconds."""
    given = {"tls_cert": files.cert, "tls_key": files.key} if tls else {}
    server = start(**given)
    port = server.logged(r"listening on https?://127\.0\.0\.1:(\d+)")
    server.process.send_signal(signal.SIGSTOP)
    try:
        done = asked(tmp_path, port, **given)
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert done.returncode == 69
    assert "no answer within" in done.stderr


def test_health_check_of_a_server_that_cannot_land(start: Callable[..., Server], tmp_path: Path):
    """A server that answers, and cannot land payloads, is not ready; what it says is shown."""
    server = start()
    port = server.logged(r"listening on http://127\.0\.0\.1:(\d+)")
    (tmp_path / "data" / "raw").rename(tmp_path / "data" / "gone")
    done = asked(tmp_path, port)
    assert done.returncode == 69
    assert '"status":"unavailable"' in done.stdout
