"""A real Dask cluster for the tests: a scheduler and workers, processes on free loopback ports.

`DaskCluster` starts this file as a supervisor, which owns the processes. The supervisor waits for a
pipe to close, which it also does when the test process is killed; then they are killed, too.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

from object_store import free_ports

REPO = Path(__file__).parents[1]
START_SECONDS = 60
SETTINGS = {
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
    "DASK_LOGGING__DISTRIBUTED": "error",
}


class DaskCluster:
    """A scheduler at `address`, and as many workers as were added, in `workers` by process id."""

    def __init__(self) -> None:
        """Start the scheduler."""
        self._supervisor = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for the tests
        )
        self.workers: list[int] = []
        [port] = free_ports(1)
        self.address = f"tcp://127.0.0.1:{port}"
        options = ["--host", "127.0.0.1", "--port", str(port), "--no-dashboard", "--no-jupyter"]
        self.scheduler = self._ask("scheduler", options, {})
        deadline = time.monotonic() + START_SECONDS
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 5):
                return
            assert time.monotonic() < deadline, "the scheduler does not start"
            time.sleep(0.05)

    def add(
        self,
        variables: Mapping[str, object] = MappingProxyType({}),
        path: Path = REPO,
        options: Sequence[str] = ("--no-nanny", "--nthreads", "1"),
    ) -> int:
        """Start a worker, which imports Dropzone from `path`; return its id."""
        options = [self.address, *options, "--host", "127.0.0.1", "--no-dashboard"]
        given = {name: str(text) for name, text in variables.items()}
        worker = self._ask("worker", options, {"PYTHONPATH": str(path), **given})
        self.workers.append(worker)
        return worker

    def _ask(self, what: str, options: list[str], variables: Mapping[str, str]) -> int:
        supervisor = self._supervisor
        assert supervisor.stdin is not None
        assert supervisor.stdout is not None
        supervisor.stdin.write(json.dumps([what, options, dict(variables)]) + "\n")
        supervisor.stdin.flush()
        return int(supervisor.stdout.readline())

    def close(self) -> None:
        """Kill the processes."""
        self._supervisor.communicate()


def supervise() -> None:
    """Start what the test process asks for, and kill it when the pipe closes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    started = list[subprocess.Popen[bytes]]()
    with tempfile.TemporaryDirectory(prefix="dropzone-dask-") as folder:
        try:
            for line in sys.stdin:
                what, options, variables = json.loads(line)
                if what == "worker":
                    options += ["--local-directory", folder]
                process = subprocess.Popen(
                    [sys.executable, "-m", f"distributed.cli.dask_{what}", *options],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd=folder,
                    env={"PATH": os.defpath, "HOME": folder, **SETTINGS, **variables},
                )
                started.append(process)
                print(process.pid, flush=True)
        finally:
            for process in started:
                process.kill()
            for process in started:
                process.wait()


if __name__ == "__main__":
    supervise()
