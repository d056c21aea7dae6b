"""What the durability tests break things with: disks that lose power, a service under load."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import SystemRandom
from uuid import UUID

import aiohttp
import machine
import msgspec
import psutil

from backends.raw import RawIds, first_of, form_of, payloads_in_name
from backends.raw.batches import payloads_in
from backends.raw.notes import BatchNotes

REPO = Path(__file__).resolve().parent.parent
MAKE = {"ext4": ("mkfs.ext4", "e2fsprogs", "-q", "-F"), "xfs": ("mkfs.xfs", "xfsprogs", "-q", "-f")}
MEGABYTES = {"ext4": 256, "xfs": 320}
CLIENTS = 24
CHANCE = SystemRandom()
PATIENCE = 30.0  # seconds
GONE = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

# ── Disks ─────────────────────────────────────────────────────────────────────────────────────────


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def mounted(what: object, where: Path, *options: str) -> Iterator[Path]:
    where.mkdir(exist_ok=True)
    run("mount", *options, what, where)
    try:
        yield where
    finally:
        for _ in range(50):
            with suppress(OSError):
                run("umount", where)
                break
            time.sleep(0.1)  # whoever was killed has not gone yet
        else:
            run("umount", "--lazy", where)


@contextmanager
def disk(kind: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Yield a new image of a file system, and where it is mounted."""
    image = folder / f"{kind}.img"
    with open(image, "wb") as file:
        file.truncate(MEGABYTES[kind] << 20)
    maker, package, *options = MAKE[kind]
    run(machine.program(maker, package=package), *options, image)
    with mounted(image, folder / "disk", "-o", "loop") as where:
        yield image, where


def may_mount(folder: Path) -> bool:
    try:
        with mounted("none", folder / "may-mount", "-t", "tmpfs", "-o", "size=1m"):
            return True
    except OSError:
        return False


def copy_as_it_lies(image: Path, device: Path, copy: Path) -> None:
    """Copy an image whose users are stopped: what its file system has not written yet is lost.

    What is dirty in the page cache of the file system inside does not reach the image before its
    kernel thread writes it. If that was at work meanwhile, the copy is of no one moment: again.
    """
    statistics = Path("/sys/block") / device.name / "stat"
    for _ in range(50):
        before = statistics.read_text().split()
        run("cp", "--sparse=always", image, copy)
        after = statistics.read_text().split()
        if before[4:8] == after[4:8] and before[8] == after[8] == "0":
            return
    raise OSError("the disk never rests")


def device_of(where: Path) -> Path:
    return Path(run("findmnt", "--noheadings", "--output", "SOURCE", where).strip())


# ── The service ───────────────────────────────────────────────────────────────────────────────────


def program(home: Path, **constants: float | None) -> Path:
    """Return the program; a copy of it where constants are to be others than in the original."""
    home.mkdir(exist_ok=True)
    copy = Path(shutil.copy(REPO / "dropzone.py", home))
    shutil.copytree(REPO / "backends", home / "backends", dirs_exist_ok=True)
    sources = [copy, *(home / "backends").rglob("*.py")]
    for name, value in constants.items():
        if value is not None:
            assert sum(replaced(source, name, value) for source in sources) == 1
    return copy


def replaced(source: Path, name: str, value: float) -> int:
    """Give a constant another value where it is defined; return how often it was."""
    text, count = re.subn(rf"(?m)^{name} = [^#\n]+", f"{name} = {value}", source.read_text())
    source.write_text(text)
    return count


def children_of(pid: int) -> list[int]:
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


def command_of(pid: int) -> str:
    with suppress(psutil.NoSuchProcess):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def state_of(pid: int) -> str:
    with suppress(psutil.NoSuchProcess):
        return str(psutil.Process(pid).status())
    return psutil.STATUS_DEAD


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class Service:
    """A running `python dropzone.py`, in its own words: a process, and its writer process."""

    def __init__(
        self, data: Path, home: Path, source: Path | None = None, **variables: str
    ) -> None:
        home.mkdir(exist_ok=True)
        self.log = home / "log.txt"
        environment = {
            **{name: text for name, text in os.environ.items() if "DROPZONE" not in name},
            "DROPZONE_RAW_DIR": str(data / "raw"),
            "DROPZONE_BACKEND": "memory",
            "DROPZONE_RAW_MIN_FREE_BYTES": "1000000",
            **variables,
        }
        command = [sys.executable, str(source or REPO / "dropzone.py"), "--port", "0"]
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(command, cwd=home, env=environment, stderr=file)
        self.children: set[int] = set()
        try:
            wait_for(lambda: self.process.poll() is not None or self._said("listening on "))
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.kill()
            raise
        self.url = self.log.read_text().partition("listening on ")[2].split()[0]

    def _said(self, words: str) -> bool:
        return words in self.log.read_text() and self.log.read_text().endswith("\n")

    def writers(self) -> list[int]:
        found = [pid for pid in children_of(self.process.pid) if state_of(pid) not in GONE]
        self.children.update(found)
        return found

    def landing_writers(self) -> list[int]:
        """Return the process that lands large groups, if it has started."""
        return [pid for pid in self.writers() if "write_forever" in command_of(pid)]

    def freeze(self) -> None:
        pids = [self.process.pid, *self.writers()]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: all(state_of(pid) == psutil.STATUS_STOPPED for pid in pids))

    def kill(self, *, writers_first: bool = False) -> None:
        """Kill everything at once, so that nothing has the time to tidy up."""
        writers = self.writers()
        pids = [*writers, self.process.pid] if writers_first else [self.process.pid, *writers]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(PATIENCE)
        wait_for(lambda: all(state_of(pid) in GONE for pid in self.children))

    def stop(self) -> int:
        self.writers()
        self.process.terminate()
        code = self.process.wait(PATIENCE)
        wait_for(lambda: all(state_of(pid) in GONE for pid in self.children))
        return code


# ── Load ──────────────────────────────────────────────────────────────────────────────────────────


FORMS: dict[str, Callable[[list[bytes]], bytes]] = {
    "lines": b"\n".join,
    "array": lambda bodies: b"[%s]" % b", ".join(bodies),
    "one after another": b"".join,
}


@dataclass
class Ledger:
    """What was sent, and what of it was acknowledged."""

    sent: set[bytes] = field(default_factory=set)
    acknowledged: dict[UUID, bytes] = field(default_factory=dict)
    keys: dict[str, tuple[list[bytes], str, list[UUID]]] = field(default_factory=dict)
    codes: set[str] = field(default_factory=set)  # of what was refused

    def new_body(self, *, is_bad: bool = False) -> bytes:
        """Return a payload that was never sent; a bad one is rejected when it is processed."""
        size = CHANCE.choice((10, 100, 400, 1500))
        data = [len(self.sent), *(CHANCE.getrandbits(30) for _ in range(size // 11))]
        data += ["bad"] * is_bad
        body = json.dumps({"time_stamp": "2019-05-01T12:00:00Z", "data": data}).encode()
        self.sent.add(body)
        return body

    async def post(
        self,
        session: aiohttp.ClientSession,
        bodies: list[bytes],
        key: str | None = None,
        form: str = "lines",
    ) -> list[UUID]:
        """Send one document as JSON, several as NDJSON, or in one of the other `FORMS`.

        Return their raw_ids, none if they are refused.
        """
        kind = "application/x-ndjson" if len(bodies) > 1 and form == "lines" else "application/json"
        headers = {"Content-Type": kind} | ({"Idempotency-Key": key} if key else {})
        body = FORMS[form if len(bodies) > 1 else "lines"](bodies)
        async with session.post("/ingest", data=body, headers=headers) as answer:
            if answer.status != 202:
                assert answer.status == 503, await answer.text()
                self.codes.add((await answer.json())["code"])
                return []
            said = await answer.json()
        raw_ids = [UUID(text) for text in said.get("raw_ids") or [said["raw_id"]]]
        assert len(raw_ids) == len(bodies)
        self.acknowledged.update(zip(raw_ids, bodies, strict=True))
        if key:
            self.keys[key] = bodies, form, raw_ids
        return raw_ids


async def keep_posting(session: aiohttp.ClientSession, ledger: Ledger, bad: float = 0) -> None:
    """Post payloads alone and as batches of every form; so much of them is `bad`."""
    while True:
        count = CHANCE.randint(2, 40) if CHANCE.random() < 0.25 else 1
        bodies = [ledger.new_body(is_bad=CHANCE.random() < bad) for _ in range(count)]
        key = f"{CHANCE.getrandbits(64):x}" if CHANCE.random() < 0.2 else None
        await ledger.post(session, bodies, key, CHANCE.choice(list(FORMS)))


async def keep_processing(session: aiohttp.ClientSession) -> None:
    """Process again and again; where a limit cuts through a batch, the next time goes on there."""
    while True:
        await asyncio.sleep(0.3)
        limit = CHANCE.choice(("", "?limit=97", "?limit=1000"))
        async with session.post(f"/process{limit}") as answer:
            await answer.read()


async def load(
    service: Service,
    ledger: Ledger,
    then: Callable[[], object],
    *,
    process: bool = False,
    bad: float = 0,
) -> None:
    """Keep a service busy; at a random moment do something to it, and leave it alone."""
    async with aiohttp.ClientSession(service.url) as session:
        clients = [asyncio.create_task(keep_posting(session, ledger, bad)) for _ in range(CLIENTS)]
        if process:
            clients.append(asyncio.create_task(keep_processing(session)))
        await asyncio.sleep(CHANCE.uniform(1, 2.5))
        failed = [client.exception() for client in clients if client.done()]
        assert not failed
        await asyncio.to_thread(then)
        for client in clients:
            client.cancel()
        ended = await asyncio.gather(*clients, return_exceptions=True)
    broken = (aiohttp.ClientError, asyncio.CancelledError, OSError)
    assert [error for error in ended if not isinstance(error, broken)] == []


# ── The check ─────────────────────────────────────────────────────────────────────────────────────


def files_in(data: Path) -> dict[UUID, list[Path]]:
    """Return where every payload lies, alone or in a batch: one place for each, if all is well."""
    found: dict[UUID, list[Path]] = {}
    notes = BatchNotes(data / "journal" / "batches")
    for folder in ("raw", "processed", "rejected"):
        for path in (data / folder).rglob("*.*"):
            left = notes.left(path.name) or ()
            for at, raw_id in enumerate(raw_ids_in(path)):
                if at not in left:
                    found.setdefault(raw_id, []).append(path)
    return found


def raw_ids_in(path: Path) -> Sequence[UUID]:
    """Return the raw_ids of the payloads in a file, none for another file."""
    count = payloads_in_name(path.name)
    return RawIds(first_of(path.name), count) if count else ()


def bodies_in(path: Path) -> dict[UUID, bytes]:
    """Return the payloads in a file; none where it is torn."""
    raw_ids, bodies = raw_ids_in(path), list[bytes]()
    with suppress(ValueError, msgspec.DecodeError):
        bodies = payloads_in(path.read_bytes(), form_of(path.name))
    return dict(zip(raw_ids, bodies, strict=True)) if len(bodies) == len(raw_ids) else {}


def payloads_below(data: Path) -> dict[UUID, list[bytes | None]]:
    """Return every payload as often as it lies there; None where it is torn."""
    bodies: dict[Path, dict[UUID, bytes]] = {}
    found: dict[UUID, list[bytes | None]] = {}
    for raw_id, paths in files_in(data).items():
        for path in paths:
            if path not in bodies:
                bodies[path] = bodies_in(path)
            found.setdefault(raw_id, []).append(bodies[path].get(raw_id))
    return found


def not_whole(data: Path, ledger: Ledger) -> int:
    """Return how many acknowledged payloads are missing or torn."""
    found = payloads_below(data)
    return sum(found.get(raw_id) != [body] for raw_id, body in ledger.acknowledged.items())


def assert_whole(data: Path, ledger: Ledger) -> None:
    """Everything acknowledged is there once, and nothing is there that nobody has sent."""
    assert not_whole(data, ledger) == 0
    for raw_id, bodies in payloads_below(data).items():
        assert len(bodies) == 1, f"{raw_id} lies in {files_in(data)[raw_id]}"
        assert bodies[0] in ledger.sent, f"{files_in(data)[raw_id]} is torn"


async def assert_served(service: Service, ledger: Ledger) -> None:
    """The service gives out what it has acknowledged, and knows the keys that it has seen."""
    async with aiohttp.ClientSession(service.url) as session:
        some = CHANCE.sample(sorted(ledger.acknowledged), min(50, len(ledger.acknowledged)))
        for raw_id in some:
            async with session.get(f"/raw/{raw_id}/payload") as answer:
                assert await answer.read() == ledger.acknowledged[raw_id]
        for key in CHANCE.sample(sorted(ledger.keys), min(50, len(ledger.keys))):
            bodies, form, raw_ids = ledger.keys[key]
            assert await ledger.post(session, bodies, key, form) == raw_ids
