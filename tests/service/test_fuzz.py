"""Requests that are made up, from the description of the API or to do harm, get what it says."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_cli import OK, PATIENCE, Program, Server
from test_edges import Hostile

HOSTILE = str(Path(__file__).parents[1] / "benchmarks" / "hostile.py")
SECONDS = 15  # of making requests up; each run makes up the same ones, as far as it gets
EXAMPLES = 20  # of each kind for each operation; by hand also 1,000


@pytest.mark.parametrize("key", ["", "sesam"], ids=["open", "with a key"])
def test_made_up_requests(tmp_path: Path, key: str) -> None:
    """Schemathesis, with all its checks and every way that it has to make up requests, is content.

    So bad data are refused and good ones are not, keys are asked for where they are described, and
    a method that is not described is 405.
    """
    program = Program(tmp_path)
    try:
        server = Server(program, "--port", 0, DROPZONE_API_KEY=key, DROPZONE_BACKEND="memory")
        hostile = Hostile(server)
        server.request("POST", "/ingest", b"[]", x_api_key=key)
        server.request("POST", "/process", x_api_key=key)
        command = [
            shutil.which("schemathesis", path=sysconfig.get_path("scripts")),
            *("run", f"{server.url}/openapi.json", "--no-color"),
            *("--checks", "all", "--mode", "all", "--generation-deterministic"),
            *("--max-examples", str(EXAMPLES), "--max-time", str(SECONDS)),
            *(["--header", f"x-api-key: {key}"] if key else []),
        ]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * PATIENCE, check=False
        )
        assert done.returncode == OK, done.stdout + done.stderr
        assert server.json("GET", "/health") == {"status": "ok"}
        assert "Traceback" not in hostile.stop()
    finally:
        program.close()


def test_hostile_requests(tmp_path: Path) -> None:
    """Of 20,000 hostile requests none is a 500, none takes anything from a client that behaves.

    The service goes on, does not grow, and has all that it acknowledged in its folder in the end.
    """
    command = [sys.executable, HOSTILE, "--dir", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=5 * PATIENCE, check=False
    )
    assert done.returncode == OK, done.stdout + done.stderr
