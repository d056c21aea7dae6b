"""One user for the data folder: who may work there, and what happens where another one has.

As root, the tests run the program as real other users. As anybody else there is one user, from whom
files are taken away by their mode: the program meets the same errors.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from people import AS_ROOT, ME, NAMED, SERVICE, STRANGER, Installation, listening_at

from backends.raw import NoAccess, uuid_at
from backends.raw.folders import Folders
from backends.raw.landing import RawStore

NOT_ALLOWED = os.EX_NOPERM
TODAY = f"{datetime.now(UTC):%Y-%m-%d}"
COMMANDS = (
    *(
        "ingest day.json",
        "process",
        "process --watch",
        "retry --all",
        "verify",
        "rebuild",
        "compact",
    ),
    *("check", "key list", "key new a --scope read", "key revoke a", "backup copy", "", "serve"),
)


def body(second: int) -> bytes:
    return b'{"time_stamp": "2019-05-01T00:00:%02dZ", "data": [1, 2]}' % second


@pytest.fixture(scope="session")
def installed() -> Iterator[Installation]:
    installation = Installation()
    yield installation
    installation.close()


@pytest.fixture
def place(installed: Installation) -> Installation:
    """An installation whose service has not started yet."""
    installed.begin_anew()
    return installed


@pytest.fixture
def used(installed: Installation) -> Installation:
    """An installation that has two payloads, one pending and one processed, and a row."""
    if installed.begin_again():
        return installed
    installed.begin_anew()
    file = installed.home / "day.json"
    for second, command in ((1, f"ingest {file}"), (1, "process"), (2, f"ingest {file}")):
        file.write_bytes(body(second))
        done = installed.run(*command.split(), user=SERVICE)
        assert done.returncode == 0, done.stderr
    installed.keep()
    return installed


class Service:
    """The service of an installation, run by its own user."""

    def __init__(self, place: Installation, **variables: object) -> None:
        self.process = place.start(user=SERVICE, **variables)
        try:
            self.url = listening_at(self.process)
        except BaseException:
            self.close()
            raise

    def __call__(self, method: str, path: str, data: bytes | None = None) -> tuple[int, dict]:
        request = urllib.request.Request(self.url + path, data, method=method)  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 (http)
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def land(self, second: int) -> UUID:
        status, accepted = self("POST", "/ingest", body(second))
        assert status == 202, accepted
        return UUID(accepted["raw_id"])

    def close(self) -> str:
        """End it, and return the rest of its log."""
        self.process.terminate()
        try:
            return self.process.communicate(timeout=30)[1]
        finally:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def service(place: Installation) -> Iterator[Service]:
    running = Service(place)
    yield running
    running.close()


# ── Who may work there ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", COMMANDS)
def test_another_user(used: Installation, command: str):
    """A command of another user does nothing, exits with 77, and prints the line to use instead."""
    before = used.files()
    variables = {} if AS_ROOT else {"DROPZONE_RAW_DIR": "/usr"}  # which is root's everywhere
    done = used.run(*command.split(), user=STRANGER, **variables)
    assert (done.returncode, done.stdout) == (NOT_ALLOWED, ""), done.stderr
    assert used.files() == before
    owner = ["-u", NAMED.pw_name] if AS_ROOT else ["--preserve-env=DROPZONE_RAW_DIR"]
    python = [used.python, str(used.program)]
    line = done.stderr.splitlines()[-1]
    assert shlex.split(line) == ["sudo", *owner, *python, *command.split()]


def test_the_line(used: Installation):
    """The line that is printed does what was asked for."""
    if not AS_ROOT:  # the owner's line is the one that was typed
        assert used.run("verify").returncode == 0
        return
    line = used.run("verify", "--json", user=STRANGER).stderr.splitlines()[-1]
    words = shlex.split(line)
    assert words[:3] == ["sudo", "-u", NAMED.pw_name]
    done = used.run_line(words[3:], SERVICE)
    assert (done.returncode, json.loads(done.stdout)["right"]) == (0, 1)


def test_the_line_shows_no_secret(used: Installation):
    """The line names variables that sudo has to hand on, and shows no value."""
    variables = {"DROPZONE_API_KEY": "hunter2", "DROPZONE_RAW_DIR": "/usr"}
    user = STRANGER if AS_ROOT else ME
    done = used.run("verify", user=user, **variables)
    assert done.returncode == NOT_ALLOWED
    assert "sudo --preserve-env=DROPZONE_API_KEY,DROPZONE_RAW_DIR " in done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o700])
def test_whatever_the_modes(used: Installation, mode: int):
    """Another user is refused where it might write, and where it cannot see that payloads are."""
    raw = used.data / "raw"
    for folder in (used.data, raw):
        folder.chmod(mode)
    if AS_ROOT:
        done = used.run("process", user=STRANGER)
        assert done.returncode == NOT_ALLOWED
        assert f"sudo -u {NAMED.pw_name} " in done.stderr
        assert len(list(raw.iterdir())) == 1
    else:
        assert used.run("process").returncode == 0


def test_ready_is_for_everyone(used: Installation):
    """`ready` asks over the network, whoever runs it."""
    assert used.run("ready", user=STRANGER).returncode == os.EX_UNAVAILABLE


def test_settings_that_are_not_for_everyone(used: Installation):
    """Who may not read the settings is told to have root do it, who becomes the owner."""
    env = used.home / ".env"
    env.chmod(0o600 if AS_ROOT else 0)
    try:
        done = used.run("verify", user=STRANGER)
    finally:
        env.chmod(0o644)
    assert done.returncode == NOT_ALLOWED
    assert f"{env} are not for" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"sudo {used.python} ")


def test_root_is_the_owner(place: Installation):
    """Whatever root does, with a strict umask and first of all, belongs to the folder's owner."""
    (place.home / "day.json").write_bytes(body(1))
    ingest = f"ingest {place.home / 'day.json'}"
    for command in (
        *("key new a --scope read", ingest, "process", ingest, "verify", "check", "rebuild"),
        *("retry --all", "compact", "key new b --scope read", "key list", "key revoke a"),
    ):
        done = place.run(*command.split(), umask=0o077)
        assert done.returncode == 0, done.stderr
        assert place.owners() == {SERVICE}, command
    assert place.run("process", user=SERVICE).returncode == 0
    assert place.run("verify", user=SERVICE).returncode == 0


def test_file_that_the_owner_may_not_read(place: Installation):
    """A file that root alone may read is landed by way of standard input, as the error says."""
    file = place.home / "secret.json"
    file.write_bytes(body(1))
    file.chmod(0o600 if AS_ROOT else 0)
    done = place.run("ingest", file)
    assert (done.returncode, done.stdout) == (os.EX_NOINPUT, "")
    assert f"may not read it, `ingest - < {file}` does; nothing of it was landed" in done.stderr
    file.chmod(0o600)
    line = f"{shlex.join([place.python, str(place.program)])} ingest - < {file}"
    assert place.run_line(["sh", "-c", line], ME).returncode == 0
    file.unlink()
    assert place.owners() == {SERVICE}


def test_beside_the_service(place: Installation, service: Service):
    """What root does beside the service is nothing that the service could stumble over."""
    service.land(1)
    (place.home / "day.json").write_bytes(body(2))
    for command in (f"ingest {place.home / 'day.json'}", "process --limit 1", "verify"):
        assert place.run(*command.split()).returncode == 0
    service.land(3)
    status, result = service("POST", "/process")
    assert (status, result["processed"], result["failed"]) == (200, 2, 0)
    assert place.owners() == {SERVICE}
    assert place.run("verify", user=SERVICE).stdout.endswith("all rows are right\n")


def test_backup_by_root(used: Installation):
    """A backup that root makes is the owner's, and root says so where that one may not write."""
    copy = used.data / "copy"
    done = used.run("backup", copy)
    assert done.returncode == 0, done.stderr
    assert copy.exists()
    assert used.owners() == {SERVICE}
    assert (used.data / "copy" / "settings" / ".env").exists()
    closed = used.home / "backups"
    closed.mkdir(mode=0o755 if AS_ROOT else 0o555, exist_ok=True)
    done = used.run("backup", closed / "monday")
    assert done.returncode == os.EX_CANTCREAT
    assert f"that {NAMED.pw_name} can write to" in done.stderr


def test_root_stays_root_in_the_log(place: Installation):
    """Audit lines name the person who ran the command, not the user whose identity it took."""
    done = place.run("process")
    me = "root" if AS_ROOT else NAMED.pw_name
    assert f"action=process caller=cli:{me} " in done.stderr


TAKEN = """
import os, sys
sys.path.insert(0, {home!r})
import dropzone
if os.getuid() == 0:
    dropzone.become({uid}, {gid})
print(os.getresuid(), os.getresgid(), sorted(os.getgroups()))
print(os.environ.get("HOME"), os.environ.get("USER"), os.environ.get("LOGNAME"))
"""


@pytest.mark.linux
def test_identity(place: Installation):
    """Nothing of root is left: user, groups and home folder are the owner's."""
    if not AS_ROOT:
        me = place.run_line(
            [place.python, "-c", TAKEN.format(home=str(place.home), uid=0, gid=0)], ME
        )
        assert me.stdout.startswith(f"{(ME,) * 3}")
        return
    for uid, name in ((SERVICE, NAMED.pw_name), (STRANGER, "")):
        code = TAKEN.format(home=str(place.home), uid=uid, gid=4711)
        gid = NAMED.pw_gid if name else 4711
        groups = os.getgrouplist(name, gid) if name else [gid]
        home = NAMED.pw_dir if name else "/"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**place.environ, "HOME": "/root", "USER": "root", "LOGNAME": "root"},
            capture_output=True,
            text=True,
            check=True,
        )
        ids, names = done.stdout.splitlines()
        assert ids == f"{(uid,) * 3} {(gid,) * 3} {sorted(groups)}"
        assert names == f"{home} {name or None} {name or None}"


def test_root_that_cannot_become_the_owner(used: Installation):
    """Root that may not change its identity, as in some containers, does nothing and says so."""
    command = [used.python, used.program, "process"]
    if not AS_ROOT:
        done = used.run("process", DROPZONE_RAW_DIR="/usr")
        assert done.returncode == NOT_ALLOWED
        return
    before = used.files()
    for missing in ("setuid", "setgid"):
        bound = ["setpriv", f"--bounding-set=-{missing}", *map(str, command)]
        done = used.run_line(bound, 0)
        assert done.returncode == NOT_ALLOWED, done.stderr
        assert "whose identity root cannot take" in done.stderr
        assert used.files() == before


def test_root_that_may_not_look_everywhere(used: Installation):
    """Root that sees no more than others, as on NFS that squashes it, becomes the owner, too.

    It cannot see that payloads are there, but to whom the folder belongs that hides them.
    """
    above = used.data.parent
    os.chown(above, SERVICE, -1)
    above.chmod(0o700)
    command = [used.python, str(used.program), "process"]
    if AS_ROOT:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    done = used.run_line(command, ME)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processed"] == 1
    assert used.owners() == {SERVICE}


async def test_rows_of_the_owner_in_postgres(used: Installation, postgres_url: str):
    """Nothing is looked for in root's home folder, which is closed to the owner."""
    home = used.home / "home"
    home.mkdir(mode=0o700, exist_ok=True)
    variables = {"HOME": home, "DROPZONE_DATABASE_URL": postgres_url}
    for command, found in (("process", '"processed": 1'), ("rebuild", "1 missing before")):
        done = used.run(command, **variables)
        assert done.returncode == 0, done.stderr
        assert found in done.stdout
    assert "all rows are right" in used.run("verify", **variables).stdout


def test_where_the_owner_cannot_go(used: Installation):
    """Root says so where the owner may not look into the folders that lead to its payloads."""
    used.data.parent.chmod(0o700)
    done = used.run("process")
    if AS_ROOT:
        assert done.returncode == NOT_ALLOWED
        assert f"{NAMED.pw_name} may not look into {used.data.parent}" in done.stderr
        assert "sudo" not in done.stderr
    else:
        assert done.returncode == 0


def test_root_of_ones_own_folder(place: Installation):
    """Root works in a folder that belongs to root, as in a container without users."""
    if AS_ROOT:
        os.chown(place.data, 0, 0)
    (place.home / "day.json").write_bytes(body(1))
    assert place.run("ingest", place.home / "day.json").returncode == 0
    assert place.run("process").returncode == 0
    assert place.owners() == {ME}


async def test_embedded(tmp_path: Path):
    """A program that embeds the store is refused in another user's folder, and makes nothing."""
    raw = Path("/usr")
    if AS_ROOT:
        raw = tmp_path / "raw"
        raw.mkdir()
        os.chown(raw, STRANGER, STRANGER)
    store = RawStore(raw)
    with pytest.raises(NoAccess, match=rf"{raw} belongs to .*, and this program runs as"):
        await store.open()
    assert not (raw.parent / "journal").exists()


# ── A payload that cannot be read ─────────────────────────────────────────────────────────────────


def test_payload_of_another_user(place: Installation, service: Service):
    """A payload that the service may not read is trouble with the storage, and never rejected.

    The others are processed; `/ready`, `/status` and `check` name it, and how to give it back.
    """
    taken, others = service.land(1), [service.land(2), service.land(3)]
    file = place.data / "raw" / f"{taken}.json"
    place.take_away(file)
    for _ in range(2):
        status, problem = service("POST", "/process")
        assert (status, problem["code"]) == (503, "storage_unavailable")
        assert str(file) in problem["detail"]
        assert "1 payloads stay pending" in problem["detail"]
    assert service("GET", "/rejected")[1]["total"] == 0
    assert service("GET", "/measurements")[1]["measurements"].__len__() == len(others)
    status, ready = service("GET", "/ready")
    assert (status, ready["status"], ready["checks"]["raw"]) == (200, "ok", "ok")
    seen = service("GET", "/status")[1]
    checked = place.run("check", user=SERVICE)
    assert checked.returncode == os.EX_CONFIG
    for text in (ready["checks"]["processing"], seen["processing"], checked.stdout):
        assert str(file) in text
        assert f"chown -R {NAMED.pw_name} {file}" in text or not AS_ROOT
    place.give_back(file)
    assert service("POST", "/process")[1]["processed"] == 1
    assert service("GET", "/ready")[1]["checks"]["processing"] == "ok"
    assert service("GET", "/status")[1]["processing"] == "ok"
    assert place.run("verify", user=SERVICE).stdout.endswith("all rows are right\n")


def test_others_do_not_wait_for_it(place: Installation):
    """While a payload is kept back, a service that processes by itself goes on with the others."""
    running = Service(place, DROPZONE_PROCESS_EVERY=0.2)
    try:
        taken = place.data / "raw" / f"{uuid_at(datetime.now(UTC))}.json"
        taken.touch()
        place.take_away(taken)
        for second in (1, 2):
            running.land(second)
            deadline = time.monotonic() + 40
            while running("GET", "/status")[1]["processed"] < second:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert list((place.data / "raw").iterdir()) == [taken]
    finally:
        log = running.close()
    assert f"next try within 10 s: {taken}" in log
    assert "Traceback" not in log


def test_reading_a_payload_of_another_user(place: Installation, service: Service):
    """Whoever asks for such a payload is told to try again, and why, and not that it is unknown."""
    raw_id = service.land(1)
    place.take_away(place.data / "raw" / f"{raw_id}.json")
    for path in (f"/raw/{raw_id}", f"/raw/{raw_id}/payload"):
        status, problem = service("GET", path)
        assert (status, problem["code"]) == (503, "storage_unavailable")
        assert str(raw_id) in problem["detail"]


def test_processed_payload_of_another_user(used: Installation):
    """`verify` says so of a processed payload that it may not read, and its row stays."""
    [file] = (used.data / "processed").rglob("*.json")
    used.take_away(file)
    for command in ("verify", "rebuild"):
        done = used.run(command, user=SERVICE)
        assert done.returncode != 0
        assert str(file) in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    used.give_back(file)
    assert used.run("verify", user=SERVICE).stdout.endswith("all rows are right\n")


def test_reason_of_another_user(place: Installation, service: Service):
    """A reason that cannot be read is not written over by a retry, nor is the payload lost."""
    service("POST", "/ingest", b"[]")
    assert service("POST", "/process")[1]["failed"] == 1
    [reason] = (place.data / "rejected").glob("*.reason.json")
    before = reason.read_bytes()
    place.take_away(reason)
    [listed] = service("GET", "/rejected")[1]["rejected"]
    assert (listed["code"], str(reason) in listed["detail"]) == ("reason_missing", True)
    status, problem = service("POST", "/rejected/retry")
    assert (status, problem["code"]) == (503, "storage_unavailable")
    place.give_back(reason)
    assert reason.read_bytes() == before
    assert service("POST", "/rejected/retry") == (200, {"retried": 1})


# ── What another user has left ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["process.lock", f"processed/{TODAY}", "processed", "rejected"])
def test_processing_that_cannot_work(place: Installation, service: Service, name: str):
    """Where payloads cannot be processed they land all the same, and every place says why.

    It is the file or folder that is in the way; with that given back all is well.
    """
    service.land(1)
    assert service("POST", "/process")[0] == 200
    service.land(2)
    service("POST", "/ingest", b"[]")
    place.take_away(place.data / name)
    status, ready = service("GET", "/ready")
    assert (status, ready["status"], ready["checks"]["raw"]) == (200, "ok", "ok")
    status, problem = service("POST", "/process")
    assert (status, problem["code"]) == (503, "storage_unavailable")
    checked = place.run("check", user=SERVICE)
    assert checked.returncode == os.EX_CONFIG
    seen = service("GET", "/status")[1]["processing"]
    for text in (ready["checks"]["processing"], problem["detail"], seen, checked.stdout):
        assert f"{place.data / name}" in text
    service.land(3)
    place.give_back(place.data / name)
    assert service("POST", "/process")[0] == 200
    assert service("GET", "/ready")[1]["checks"]["processing"] == "ok"
    assert list((place.data / "raw").iterdir()) == []
    assert service("GET", "/rejected")[1]["total"] == 1
    assert place.run("check", user=SERVICE).returncode == 0


@pytest.mark.parametrize("name", ["process.lock", "processed"])
def test_what_has_another_kind(place: Installation, service: Service, name: str):
    """A folder in the place of the lock, or a file in that of a folder, is told everywhere, too."""
    path = place.data / name
    if path.is_dir():
        path.rmdir()
        path.touch()
    else:
        path.mkdir()
    os.chown(path, SERVICE, -1)
    service.land(1)
    status, problem = service("POST", "/process")
    checked = place.run("check", user=SERVICE)
    assert (status, checked.returncode) == (503, os.EX_CONFIG)
    processing = service("GET", "/ready")[1]["checks"]["processing"]
    for text in (problem["detail"], processing, checked.stdout):
        assert str(path) in text


def test_one_day_that_cannot_be_moved(place: Installation, service: Service):
    """A day's folder that is another user's keeps back the payloads of that day alone."""
    yesterday = datetime.now(UTC) - timedelta(days=1)
    old = place.data / "raw" / f"{uuid_at(yesterday)}.json"
    old.write_bytes(body(1))
    os.chown(old, SERVICE, -1)
    day = place.data / "processed" / f"{yesterday:%Y-%m-%d}"
    day.mkdir()
    place.take_away(day)
    service.land(2)
    status, problem = service("POST", "/process")
    assert (status, str(day) in problem["detail"]) == (503, True)
    assert list((place.data / "raw").iterdir()) == [old]
    assert str(day) in service("GET", "/status")[1]["processing"]
    place.give_back(day)
    assert service("POST", "/process")[1]["processed"] == 1


LEFT = {  # what a run of root's may have left, and a command that needs it
    "process.lock": "process",
    "keys.toml": "key list",
    "rows.sqlite": "process",
    "journal/last_raw_id": "process",
    "journal/keys.sqlite": "process",
    "journal/tally": "process",
    "journal/upkeep.lock": "verify",
    "journal/derived": "verify",
    "journal/failed_write.json": "",
    f"processed/{TODAY}": "process",
    "journal/metrics.sqlite": "",
}


NOTHING_TO_READ = ("keys.toml", "journal/failed_write.json")  # as this test has made it


@pytest.mark.parametrize("name", LEFT)
def test_check_names_what_is_left(used: Installation, name: str):
    """`check` names what another user has left, with the line that gives it back.

    The command that stumbles over it says so, too, in a sentence.
    """
    path = used.data / name
    assert used.run("check", user=SERVICE).returncode == 0
    if name.endswith("derived"):
        path.mkdir()
    elif not path.exists():
        path.touch()
    used.take_away(path)
    done = used.run("check", user=SERVICE)
    assert done.returncode == os.EX_CONFIG, done.stdout
    assert str(path) in done.stdout
    if AS_ROOT:
        assert f"chown -R {NAMED.pw_name} {path}" in done.stdout
    if LEFT[name]:
        done = used.run(*LEFT[name].split(), user=SERVICE)
        assert done.returncode in {os.EX_TEMPFAIL, os.EX_CONFIG}, done.stdout
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr
    used.give_back(path)
    if name in NOTHING_TO_READ:
        path.unlink()
    assert used.run("check", user=SERVICE).returncode == 0, used.run("check", user=SERVICE).stdout


def test_check_names_the_first_of_many(used: Installation):
    """Of thousands of files `check` names the first, and says how many more there are."""
    folder = used.data / "raw"
    files = [
        folder / f"{uuid_at(datetime.now(UTC) + timedelta(seconds=n))}.json" for n in range(50)
    ]
    for file in files:
        file.touch()
        used.take_away(file)
    lines = used.run("check", user=SERVICE).stdout.splitlines()
    assert sum("chown" in line or "its mode" in line for line in lines) == 20
    assert sum("and 30 more of that kind" in line for line in lines) == 1


def test_rows_that_cannot_be_written(used: Installation):
    """`/ready` and `/status` say so where the rows can be read and not be written."""
    rows = used.data / "rows.sqlite"
    if AS_ROOT:
        os.chown(rows, 0, 0)
    rows.chmod(0o444)
    running = Service(used)
    try:
        assert running("GET", "/ready")[1]["checks"]["backend"] != "ok"
        assert str(rows) in running("GET", "/status")[1]["backend"]
    finally:
        running.close()


def test_a_glance_is_cheap(tmp_path: Path):
    """To see whether processing can work, no folder is listed, however many days there are."""
    folders = Folders(tmp_path / "raw")
    for folder in (folders.raw, folders.processed, folders.rejected, folders.journal):
        folder.mkdir()
    for day in range(400):
        (folders.processed / f"{datetime.now(UTC) - timedelta(days=day):%Y-%m-%d}").mkdir()
    code = (
        "import sys; from pathlib import Path; from backends.raw.folders import Folders\n"
        "seen = []\n"
        "sys.addaudithook(lambda event, _: seen.append(event))\n"
        f"print(Folders(Path({str(folders.raw)!r})).processing_trouble(), seen)"
    )
    home = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("None ")
    assert not re.search("os.listdir|os.scandir|open", done.stdout)


# ── One file of settings ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("where", ["beside the program", "elsewhere", "beside another .env"])
def test_env_of_the_installation(used: Installation, where: str):
    """Service and commands read the `.env` beside the program, from wherever they are run."""
    cwd = Path("/")
    if where == "beside the program":
        cwd = used.home
    elif where == "beside another .env":
        cwd = used.home / "elsewhere"
        cwd.mkdir(exist_ok=True)
        (cwd / ".env").write_text("DATABASE_URL=postgresql://another.program\n")
    done = used.run("verify", "--json", user=SERVICE, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == str(used.data)
    checked = used.run("check", user=SERVICE, cwd=cwd)
    assert f"settings are read from {used.home / '.env'}" in checked.stdout


@pytest.mark.linux
def test_run_from_a_folder_that_is_closed(used: Installation):
    """Commands work in a folder that their user may not look into, as with sudo in root's home."""
    closed = used.home / "closed"
    closed.mkdir(exist_ok=True)
    closed.chmod(0o700)
    line = shlex.join([used.python, str(used.program), "verify", "--json"])
    ways = [f"chmod 0 {closed} && exec {line}"]
    if AS_ROOT:  # which becomes the owner, or has become it
        identity = f"setpriv --reuid={SERVICE} --regid={SERVICE} --clear-groups"
        ways = [f"exec {line}", f"exec {identity} {line}"]
    for way in ways:
        done = used.run_line(["sh", "-c", f"cd {closed} && {way}"], ME)
        closed.chmod(0o700)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["right"] == 1
