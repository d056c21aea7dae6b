"""Make a data folder with every state of a payload by some version of Dropzone, and keep it.

    python tests/kept/keep.py PATH/TO/dropzone.py tests/kept/VERSION.tar.gz

The archive holds `data/`, as a kill has left it, and `payloads.json`: the name of each payload,
its raw_id and its body. `tests/service/test_upgrading.py` starts the newest code on it.
"""

import http.client
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

BODIES = {
    "packed": '{"time_stamp": "2023-06-30T03:00:00Z", "data": [2, 4]}\r\n',
    "superseded": '{"time_stamp": "2019-05-01T06:00:00-04:00", "data": [1, 2, 3, 4]}',
    "winner": '{"time_stamp": "2019-05-01T06:00:00-04:00", "data": [5]}',
    "rejected": '{"time_stamp": "2019-05-01T06:00:01-04:00", "data": ["x"]}',
    "put back": '{"time_stamp": "2019-05-01T06:00:02-04:00"}',
    "pending": '{"time_stamp": "2019-05-01T06:00:03-04:00", "data": [7]}',
    "line 1": '{"time_stamp": "2019-05-01T06:00:04-04:00", "data": [8]}',
    "line 2": '{"time_stamp": "2019-05-01T06:00:05-04:00", "data": [9]}',
    "in the journal": '{"time_stamp": "2019-05-01T06:00:06-04:00", "data": [10]}',
}
PACKED = "01890a5d-ac96-774b-bcce-b302099a8057"  # arrived in June 2023, by its raw_id


class Old:
    """An old version that serves a folder."""

    def __init__(self, program: Path, home: Path) -> None:
        self._command = (sys.executable, str(program.resolve()))
        self._home = home
        (home / "config.toml").write_text("[raw]\nmin_free_bytes = 0\n")
        self.process = self._start("--port", "0")
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(rb"listening on (http://\S+)", line):
                self._address = urlsplit(found[1].decode()).netloc
                return
        raise OSError("the old version does not listen")

    def _start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        clean = {n: text for n, text in os.environ.items() if not n.startswith("DROPZONE_")}
        command = (*self._command, "--config", "config.toml", *arguments)
        return subprocess.Popen(command, cwd=self._home, env=clean, stderr=subprocess.PIPE)

    def run(self, *arguments: str) -> None:
        with self._start(*arguments) as process:
            process.communicate()
        assert process.returncode == 0, arguments

    def post(self, path: str, body: str = "", **headers: str) -> dict[str, str]:
        connection = http.client.HTTPConnection(self._address)
        names = {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request("POST", path, body.encode(), names)
        answer = connection.getresponse()
        document: dict[str, str] = json.loads(answer.read())
        connection.close()
        assert answer.status < 300, document
        return document

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def fill(program: Path, home: Path) -> dict[str, str]:
    """Let a version bring payloads into every state, and kill it; return their raw_ids by name."""
    old = Old(program, home)
    raw_ids = {"packed": PACKED}
    raw = home / "data" / "raw"
    (raw / f"{PACKED}.json").write_bytes(BODIES["packed"].encode())
    old.post("/process")
    old.run("compact")
    for name in ("superseded", "winner", "rejected", "put back"):
        key = {"Idempotency_Key": "kept"} if name == "winner" else {}
        raw_ids[name] = old.post("/ingest", BODIES[name], **key)["raw_id"]
    old.post("/process")
    old.post("/rejected/retry?code=data_missing")
    raw_ids["pending"] = old.post("/ingest", BODIES["pending"])["raw_id"]
    lines = f"{BODIES['line 1']}\n{BODIES['line 2']}\n"
    batch = old.post("/ingest", lines, Content_Type="application/x-ndjson")
    raw_ids["line 1"], raw_ids["line 2"] = batch["raw_ids"]
    last = old.post("/ingest", BODIES["in the journal"])["raw_id"]
    raw_ids["in the journal"] = last
    old.kill()
    (raw / f"{last}.json").unlink()  # as a power cut may leave it: only the journal was synced
    return raw_ids


def keep(program: Path, archive: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        raw_ids = fill(program, home)
        payloads = {name: {"raw_id": raw_ids[name], "body": BODIES[name]} for name in BODIES}
        (home / "payloads.json").write_text(json.dumps(payloads, indent=2) + "\n")
        with tarfile.open(archive, "w:gz") as kept:
            for name in ("data", "payloads.json"):
                kept.add(home / name, name)


if __name__ == "__main__":
    keep(Path(sys.argv[1]), Path(sys.argv[2]))
