"""Requests made up from the description of the API get no 5xx and nothing but what it says."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from test_cli import OK, PATIENCE, Program, Server
from test_edges import Hostile

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
