"""A real object store for the tests: SeaweedFS, which speaks S3, on free loopback ports.

`ObjectStore` starts this file as a supervisor, which owns the server. The supervisor waits for a
pipe to close, which it also does when the test process is killed; then the server is killed (on
SIGTERM it would wait ten seconds), and its folder vanishes.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

BUCKET = "packs"
START_SECONDS = 60
INSTALL = "no SeaweedFS was found: `pip install -r tests/requirements.txt` brings one"
SOCKETS = Path("/tmp")  # in which it leaves some, by their ports, whatever it is told
PORTS = ("master", "volume", "filer", "s3")


class ObjectStore:
    """One S3 server with a bucket. `pause` stops it from answering, `resume` lets it go on."""

    def __init__(self) -> None:
        """Start the server. Raises RuntimeError with what to install where there is none."""
        self._supervisor = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests
        )
        assert self._supervisor.stdout is not None
        answer = json.loads(self._supervisor.stdout.readline() or '{"error": "it died"}')
        if "error" in answer:
            raise RuntimeError(answer["error"])
        self.process: int = answer["process"]
        self.variables: dict[str, str] = answer["variables"]
        self.url = f"s3://{BUCKET}"

    def pause(self) -> None:
        os.kill(self.process, signal.SIGSTOP)

    def resume(self) -> None:
        os.kill(self.process, signal.SIGCONT)

    def close(self) -> None:
        """Kill the server and remove its folder."""
        self._supervisor.communicate()


def supervise() -> None:
    """Start the server, say where it is, and wait until the pipe closes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(tempfile.mkdtemp(prefix="dropzone-s3-"))
    process, ports = None, free_ports(2 * len(PORTS))
    try:
        process, variables = started(folder, ports)
        print(json.dumps({"process": process.pid, "variables": variables}), flush=True)
        sys.stdin.read()
    except Exception as error:
        with suppress(BrokenPipeError):
            print(json.dumps({"error": f"SeaweedFS does not start: {error}"}), flush=True)
        raise
    finally:
        if process:
            process.kill()
            process.wait()
            for path in SOCKETS.glob("seaweedfs-*.sock"):
                if int(path.stem.rpartition("-")[2]) in ports:
                    path.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)


def started(folder: Path, ports: list[int]) -> "tuple[subprocess.Popen[bytes], dict[str, str]]":
    program = Path(sys.executable).with_name("weed")
    if not program.exists():
        raise RuntimeError(INSTALL)
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    credentials = [{"accessKey": key, "secretKey": secret}]
    rights = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [{"name": "tests", "credentials": credentials, "actions": rights}]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    options = [f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    options += [f"-s3.config={folder / 's3.json'}"]
    options += ["-master.volumeSizeLimitMB=64", "-volume.max=40", "-master.telemetry=false"]
    options += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    for name, port, grpc in zip(PORTS, ports[::2], ports[1::2], strict=True):
        options += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "server", *options],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            env={"PATH": os.defpath, "HOME": str(folder)},
        )
    endpoint = f"http://127.0.0.1:{ports[6]}"
    variables = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_ALLOW_HTTP": "true",
    }
    master, filer = (f"127.0.0.1:{ports[at]}.{ports[at + 1]}" for at in (0, 4))
    try:
        await_answer(process, ports[6], folder / "log")
        make_bucket(program, master, filer)
    except BaseException:
        process.kill()
        process.wait()
        raise
    return process, variables


def await_answer(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(log.read_text()[-2000:])
        time.sleep(0.05)


def make_bucket(program: Path, master: str, filer: str) -> None:
    """Make the bucket; the server may answer before it has room for one."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        done = subprocess.run(
            [program, "shell", f"-master={master}", f"-filer={filer}"],
            input=f"s3.bucket.create -name {BUCKET}\n",
            capture_output=True,
            text=True,
            timeout=START_SECONDS,
            check=False,
        )
        said = done.stdout + done.stderr
        if "created bucket" in said or "already exists" in said:
            return
        if time.monotonic() > deadline:
            raise RuntimeError(said[-2000:])
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Return free ports of the loopback, held all at once so that they differ."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


if __name__ == "__main__":
    supervise()
