"""Proof on a cluster: a real scheduler of Dask, and workers that are killed, wrong or cut off."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import obstore
import psutil
import pytest
import test_processing
from dask_cluster import DaskCluster
from object_store import ObjectStore
from obstore.store import from_url
from test_cli import DROPZONE, OK, PATIENCE, TRY_AGAIN, Program, assert_explained, closed_port
from test_docs import blocks, section
from test_packs import processed_in
from test_processing import body

from backends.raw.archive import Archive
from backends.raw.folders import Folders
from dropzone import __version__

program = test_processing.program  # a fixture
REPO = Path(DROPZONE).parent
NOT_RIGHT, CONFIGURATION = 1, 78
FAR, NEAR = 40, 20  # payloads
FAR_DAYS, NEAR_DAYS = 8, 4
DAY_MS = 86_400_000
PREFIXES = count()


class Proving:
    """A data folder, some days of which are in an archive alone, and others on this disk alone."""

    def __init__(self, program: Program, store: ObjectStore, patch: pytest.MonkeyPatch) -> None:
        for name, text in store.variables.items():
            patch.setenv(name, text)
        self.program, self.store = program, store
        self.url = f"{store.url}/cluster/{next(PREFIXES)}"
        self.workers = store.variables  # that they need
        for name in ("raw", "rejected", "processed", "journal"):
            (program.home / "data" / name).mkdir(parents=True)
        for number in range(FAR):
            processed_in(
                program.home / "data", [body(number)], 2 + number + number % FAR_DAYS * DAY_MS
            )
        folders = self.folders(keep_local_days=1)
        for day in folders.finished_days():
            folders.compact(day)
        for name in folders.to_archive():
            folders.archive_pack(name)
        for number in range(NEAR):
            processed_in(
                program.home / "data",
                [body(FAR + number)],
                number + (20 + number % NEAR_DAYS) * DAY_MS,
            )

    def folders(self, keep_local_days: int = 0) -> Folders:
        archive = Archive(self.url)
        raw = self.program.home / "data" / "raw"
        return Folders(raw, archive=archive, keep_local_days=keep_local_days)

    def start(self, command: str, address: str, **variables: object) -> "subprocess.Popen[bytes]":
        """Start a command on a cluster; it has no way of its own to the archive."""
        away = dict.fromkeys(self.workers, "") | {"DROPZONE_RAW_ARCHIVE": self.url}
        return self.program.start(command, "--json", "--cluster", address, **(away | variables))

    def run(
        self, command: str, address: str, **variables: object
    ) -> "subprocess.CompletedProcess[str]":
        return ended(self.start(command, address, **variables))

    def hold(self) -> None:
        """Keep workers in the middle of their portions."""
        self.store.pause()

    def await_held(self, workers: int, process: "subprocess.Popen[bytes]") -> None:
        """Wait until a worker has asked the archive for something."""
        port = int(self.workers["AWS_ENDPOINT_URL"].rpartition(":")[2])
        deadline = time.monotonic() + PATIENCE
        while not any(
            each.raddr and each.raddr.port == port
            for each in psutil.Process(workers).net_connections("tcp")
        ):
            assert process.poll() is None, ended(process)
            assert time.monotonic() < deadline
            time.sleep(0.02)


def ended(process: "subprocess.Popen[bytes]") -> "subprocess.CompletedProcess[str]":
    out, err = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(process.args, process.returncode, out.decode(), err.decode())


def summary(done: "subprocess.CompletedProcess[str]") -> dict[str, object]:
    return json.loads(done.stdout.splitlines()[-1])


def error_of(done: "subprocess.CompletedProcess[str]", code: int) -> str:
    """Return the one line that says why a command has ended with this code."""
    assert done.returncode == code, done
    assert "Traceback" not in done.stderr
    assert " distributed." not in done.stderr  # what Dask logs of it
    [line] = [line for line in done.stderr.splitlines() if line.startswith("dropzone: ")]
    assert_explained(line)
    return line


@pytest.fixture
def proving(
    program: Program, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Proving]:
    yield Proving(program, object_store, monkeypatch)
    object_store.resume()


@pytest.fixture
def cluster() -> Iterator[DaskCluster]:
    made = DaskCluster()
    yield made
    made.close()


# ── What is right ─────────────────────────────────────────────────────────────────────────────────


def test_workers_read_the_archive_themselves(proving: Proving, cluster: DaskCluster):
    """Both commands take the archive's payloads from workers and this disk's from here, as one.

    The command itself reaches no archive, and a damaged object is named as it is without a cluster.
    """
    for _ in range(2):
        cluster.add(proving.workers)
    done = proving.run("rebuild", cluster.address)
    assert done.returncode == OK, done
    assert summary(done)["set_right"] == {"missing": FAR + NEAR}
    done = proving.run("verify", cluster.address)
    assert done.returncode == OK, done
    assert (summary(done)["right"], summary(done)["damage"]) == (FAR + NEAR, [])
    store = from_url(proving.url, client_options={"allow_http": True})
    name = min(each["path"] for page in obstore.list(store) for each in page)
    obstore.put(store, name, b"x" * obstore.head(store, name)["size"])
    done = proving.run("verify", cluster.address, **proving.workers)
    assert done.returncode == NOT_RIGHT, done
    here = proving.program.run(
        "verify", "--json", DROPZONE_RAW_ARCHIVE=proving.url, **proving.workers
    )
    assert summary(done) == summary(here)
    assert f"{proving.url}/{name} is damaged at byte 0" in str(summary(done)["damage"])


def test_a_killed_worker(proving: Proving, cluster: DaskCluster):
    """What a worker was at that is killed another one does, and all is proved."""
    for _ in range(2):
        cluster.add(proving.workers)
    proving.hold()
    process = proving.start("rebuild", cluster.address)
    for worker in cluster.workers:
        proving.await_held(worker, process)
    os.kill(cluster.workers[0], signal.SIGKILL)
    proving.store.resume()
    done = ended(process)
    assert done.returncode == OK, done
    assert summary(done)["set_right"] == {"missing": FAR + NEAR}


def test_goes_on_where_it_was_stopped(proving: Proving, cluster: DaskCluster):
    """After a scheduler was killed, the next run needs no cluster for what was derived before."""
    worker = cluster.add(proving.workers)
    proving.hold()
    process = proving.start("rebuild", cluster.address)
    proving.await_held(worker, process)
    derived = proving.program.home / "data" / "journal" / "derived" / "done"
    deadline = time.monotonic() + PATIENCE
    while not derived.exists() or len(derived.read_text().splitlines()) < NEAR_DAYS:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    begun = time.monotonic()
    os.kill(cluster.scheduler, signal.SIGKILL)
    error = error_of(ended(process), TRY_AGAIN)
    assert f"the cluster {cluster.address}: the scheduler is lost" in error
    assert time.monotonic() - begun < PATIENCE / 2
    proving.store.resume()
    shutil.rmtree(next((proving.program.home / "data" / "processed").glob("*-*-*/")))
    done = proving.program.run(
        "rebuild", "--json", DROPZONE_RAW_ARCHIVE=proving.url, **proving.workers
    )
    assert summary(done)["set_right"] == {"missing": FAR + NEAR}


def test_as_the_page_says(proving: Proving, cluster: DaskCluster):
    """Workers that are started as the page on proof says it take part in what it shows."""
    [commands] = blocks(section(REPO / "docs" / "proof.md", "On a cluster"), "sh")[1:]
    _, worker, *proofs = map(shlex.split, commands.splitlines())
    assert worker[:3] == ["dask", "worker", "tcp://scheduler:8786"]
    cluster.add(proving.workers, options=worker[3:])
    for _, _, command, option, _ in reversed(proofs):
        assert option == "--cluster"
        done = proving.run(command, cluster.address)
        assert (done.returncode, summary(done)["right"]) == (OK, FAR + NEAR), done


# ── What is in the way ────────────────────────────────────────────────────────────────────────────


def test_workers_that_are_killed_again_and_again(proving: Proving, cluster: DaskCluster):
    """A portion at which several workers have ended is given up: try again."""
    worker = cluster.add(proving.workers)
    proving.hold()
    process = proving.start("verify", cluster.address)
    proving.await_held(worker, process)
    os.kill(worker, signal.SIGKILL)
    worker = cluster.add(proving.workers)  # which is given the same one first
    proving.await_held(worker, process)
    os.kill(worker, signal.SIGKILL)
    assert "2 workers have ended at the same portion" in error_of(ended(process), TRY_AGAIN)


def test_workers_that_go(proving: Proving, cluster: DaskCluster):
    """Where all workers have gone and none comes, the command ends: try again."""
    worker = cluster.add(proving.workers)
    proving.hold()
    process = proving.start("verify", cluster.address)
    proving.await_held(worker, process)
    os.kill(worker, signal.SIGKILL)
    assert "no worker for 15 s" in error_of(ended(process), TRY_AGAIN)


def test_a_scheduler_that_hangs(proving: Proving, cluster: DaskCluster):
    """A scheduler that does not answer any more ends the command: try again."""
    worker = cluster.add(proving.workers)
    proving.hold()
    process = proving.start("verify", cluster.address)
    proving.await_held(worker, process)
    os.kill(cluster.scheduler, signal.SIGSTOP)
    assert "the scheduler is lost" in error_of(ended(process), TRY_AGAIN)


def test_no_workers(proving: Proving, cluster: DaskCluster):
    """A cluster without workers is told how to get some."""
    error = error_of(proving.run("verify", cluster.address), TRY_AGAIN)
    assert f"it has no workers; start some: dask worker {cluster.address}" in error


def copy_with(change: Callable[[str], str], folder: Path) -> Path:
    """Make a copy of the program with some change."""
    shutil.copytree(REPO / "backends", folder / "backends")
    text = (REPO / "dropzone.py").read_text()
    assert change(text) != text
    (folder / "dropzone.py").write_text(change(text))
    return folder


def other_version(text: str) -> str:
    return text.replace(f'__version__ = "{__version__}"', '__version__ = "0.0.7"')


def test_another_version(proving: Proving, cluster: DaskCluster, tmp_path: Path):
    """A worker of another version is named before anything is derived."""
    cluster.add(proving.workers)
    cluster.add(proving.workers, copy_with(other_version, tmp_path / "other"))
    await_workers(cluster, 2)
    error = error_of(proving.run("verify", cluster.address), CONFIGURATION)
    assert "tcp://127.0.0.1:" in error
    assert f"it has Dropzone 0.0.7, and here is {__version__}" in error


def test_another_version_that_comes_later(proving: Proving, cluster: DaskCluster, tmp_path: Path):
    """A worker of another version that comes in the middle derives nothing, and is named."""
    worker = cluster.add(proving.workers)
    proving.hold()
    process = proving.start("verify", cluster.address)
    proving.await_held(worker, process)
    cluster.add(proving.workers, copy_with(other_version, tmp_path / "other"))
    await_workers(cluster, 2)
    os.kill(worker, signal.SIGKILL)
    proving.store.resume()
    error = error_of(ended(process), CONFIGURATION)
    assert f"it has Dropzone 0.0.7, and the client has {__version__}" in error


def test_a_worker_without_dropzone(proving: Proving, cluster: DaskCluster, tmp_path: Path):
    """A worker on which Dropzone is not installed is named."""
    cluster.add(proving.workers, tmp_path)
    error = error_of(proving.run("verify", cluster.address), CONFIGURATION)
    assert "No module named 'dropzone'" in error


def test_a_worker_without_the_other_extra(proving: Proving, cluster: DaskCluster, tmp_path: Path):
    """A worker that has no library for the archive is named, and what it lacks."""
    (tmp_path / "obstore").mkdir()
    (tmp_path / "obstore" / "__init__.py").write_text("raise ModuleNotFoundError('no obstore')")
    cluster.add(proving.workers | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{REPO}"})
    error = error_of(proving.run("verify", cluster.address), CONFIGURATION)
    assert "tcp://127.0.0.1:" in error.removeprefix(f"dropzone: {cluster.address}")
    assert "of the cluster cannot take part: no obstore" in error


def test_a_worker_that_cannot_reach_the_archive(proving: Proving, cluster: DaskCluster):
    """Where a worker cannot reach the archive, both are named: try again."""
    with closed_port() as port:
        url = f"http://127.0.0.1:{port}"
        cluster.add(proving.workers | {"AWS_ENDPOINT_URL": url})
        error = error_of(proving.run("verify", cluster.address, **proving.workers), TRY_AGAIN)
    assert f"the archive {proving.url} is away: connection refused" in error
    assert "(for the worker tcp://127.0.0.1:" in error


@pytest.mark.parametrize("address", ["", "localhost", "http://host:1", "tcp://host", "tcp://h:x"])
def test_no_address(program: Program, address: str):
    """What is no address of a scheduler is a wrong setting."""
    (program.home / "data" / "raw").mkdir(parents=True)
    error = error_of(ended(program.start("verify", f"--cluster={address}")), CONFIGURATION)
    assert "--cluster is the address of a scheduler of Dask: tcp://host:8786" in error


def test_nobody_there(proving: Proving):
    """Where nothing listens, or something else, the address is named: try again."""
    with closed_port() as port:
        error = error_of(proving.run("verify", f"tcp://127.0.0.1:{port}"), TRY_AGAIN)
    assert f"the cluster tcp://127.0.0.1:{port}: no scheduler answers" in error
    address = proving.workers["AWS_ENDPOINT_URL"].replace("http", "tcp")
    error = error_of(proving.run("verify", address), TRY_AGAIN)
    assert f"the cluster {address}: no scheduler answers" in error


WITHOUT = """
import sys
{before}
import dropzone
code = dropzone.main(sys.argv[1:])
print("distributed" in sys.modules, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("is_there", [True, False])
def test_without_the_extra(program: Program, is_there: bool):
    """Dask is imported for a cluster alone, and where it is missing it is said how to get it."""
    (program.home / "data" / "raw").mkdir(parents=True)
    (program.home / "data" / "processed").mkdir()
    options = [] if is_there else ["--cluster", "tcp://127.0.0.1:8786"]
    code = WITHOUT.format(before="" if is_there else "sys.modules['distributed'] = None")
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", *options],
        cwd=program.home,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    if is_there:
        assert done.stderr.splitlines()[-1:] == ["False"]
    else:
        assert done.returncode == CONFIGURATION, done
        assert "needs the package distributed: pip install 'dropzone[cluster]'" in done.stderr


def await_workers(cluster: DaskCluster, number: int) -> None:
    """Wait until so many workers have registered, as any other client sees it."""
    code = (
        "import sys, distributed\n"
        "with distributed.Client(sys.argv[1]) as client:\n"
        "    client.wait_for_workers(int(sys.argv[2]), timeout=60)\n"
    )
    command = [sys.executable, "-c", code, cluster.address, str(number)]
    subprocess.run(command, check=True, timeout=PATIENCE)


def test_the_cluster_ends_with_the_tests():
    """Scheduler and workers of the tests stop when the test process is killed."""
    code = (
        "import dask_cluster; c = dask_cluster.DaskCluster(); c.add();"
        "print(c.scheduler, *c.workers, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPO / "tests",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as tests:
        assert tests.stdout is not None
        started = [psutil.Process(int(each)) for each in tests.stdout.readline().split()]
        tests.send_signal(signal.SIGKILL)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.wait(PATIENCE)
