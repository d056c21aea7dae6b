"""The wheel, what a fresh environment has of it, and the locks of what it needs."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_cli import LINE, OK, PATIENCE, Program, Server

import dropzone

REPO = Path(dropzone.__file__).resolve().parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())
RENEW = "the locks are stale: run .ci/lock"
# Whoever embeds Dropzone writes this much of it.
EMBEDDING = """
from pathlib import Path

from aiohttp import web
from backends import Measurement
from backends.memory import MemoryBackend
from dropzone import Config, RawConfig, create_app


def application(folder: Path) -> web.Application:
    outer = web.Application()
    config = Config(raw=RawConfig(dir=folder))
    outer.add_subapp("/dropzone/", create_app(config, backend=MemoryBackend()))
    return outer


async def means(backend: MemoryBackend) -> list[float]:
    rows: list[Measurement] = await backend.find()
    return [row.mean for row in rows]
"""


def run(*command: object, cwd: Path, succeeds: bool = True) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={name: text for name, text in os.environ.items() if name != "PYTHONPATH"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


# ── The wheel ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel that `pip install .` makes."""
    folder = tmp_path_factory.mktemp("wheel")
    quick = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "wheel", *quick, "--wheel-dir", folder, REPO, cwd=folder)
    [wheel] = folder.iterdir()
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fresh environment with the wheel; what it depends on is there already."""
    home = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "venv", "--without-pip", ".", cwd=home)
    python = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=home)
    [packages] = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    )
    return home


def test_wheel_has_the_program_alone(wheel: Path):
    """The wheel has the service, its page, every module of `backends`, the marks of types."""
    backends = {
        str(file.relative_to(REPO))
        for file in (REPO / "backends").rglob("*")
        if file.suffix in {".py", ".typed"}
    }
    assert {"backends/__init__.py", "backends/postgres.py", "backends/py.typed"} <= backends
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == backends | {"dropzone.py", "dropzone.html", "dropzone/py.typed"}


def test_installed_command_serves(installed: Path, tmp_path: Path):
    """The command `dropzone` serves API and page, and keeps its data in the folder it runs in."""
    program = Program(tmp_path)
    for file in tmp_path.iterdir():
        file.unlink()  # a user's first folder is empty
    program.command = (installed / "bin" / "dropzone",)
    try:
        assert program.run("--version").stdout.strip() == dropzone.__version__
        assert program.run("--help").stdout.startswith("usage: dropzone [")
        server = Server(program)
        assert server.json("GET", "/health")
        assert server.json("POST", "/ingest", LINE)["status"] == "accepted"
        assert server.json("POST", "/process")["processed"] == 1
        assert server.request("GET", "/")[2] == (REPO / "dropzone.html").read_bytes()
        assert server.stop() == OK
    finally:
        program.close()
    assert {path.name for path in tmp_path.iterdir()} == {"data"}
    assert len(program.payloads("processed")) == 1


def test_embedding_is_typed(installed: Path, tmp_path: Path):
    """mypy --strict accepts a program that embeds what is installed, and sees a wrong call."""
    (tmp_path / "right.py").write_text(EMBEDDING)
    (tmp_path / "wrong.py").write_text("import dropzone\n\ndropzone.create_app(1).port\n")
    python = installed / "bin" / "python"
    where = run(python, "-c", "import dropzone; print(dropzone.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    with_it = ("--python-executable", python, "--cache-dir", tmp_path / "cache")
    check = (sys.executable, "-m", "mypy", "--strict", *with_it)
    assert run(*check, "right.py", cwd=tmp_path).startswith("Success")
    wrong = run(*check, "wrong.py", cwd=tmp_path, succeeds=False)
    assert set(re.findall(r"\[([a-z-]+)\]$", wrong, re.MULTILINE)) == {"arg-type", "attr-defined"}


# ── The locks ─────────────────────────────────────────────────────────────────────────────────────


def here(requirement: Requirement, extra: str = "") -> bool:
    """Whether a requirement holds for this Python and this system."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def pins(name: str) -> dict[str, Version]:
    """Return what a lock pins for this Python and this system."""
    lines = [line for line in (REPO / name).read_text().splitlines() if line.strip(" #")]
    found = {}
    for line in lines:
        if not line.lstrip().startswith("#"):
            pin = Requirement(line)
            [version] = pin.specifier
            assert version.operator == "==", line
            if here(pin):
                found[canonicalize_name(pin.name)] = Version(version.version)
    return found


def needed(*groups: Iterable[str]) -> Iterator[Requirement]:
    """Yield requirements, and all that their packages require in turn."""
    waiting = [Requirement(text) for group in groups for text in group]
    seen = set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) in seen or not here(requirement):
            continue
        seen.add(str(requirement))
        yield requirement
        for text in metadata.requires(requirement.name) or ():
            deeper = Requirement(text)
            if any(here(deeper, extra) for extra in requirement.extras or {""}):
                deeper.marker = None
                waiting.append(deeper)


def requirements_of(lock: str) -> list[list[str]]:
    project = PROJECT["project"]
    if lock == "requirements.txt":
        return [project["dependencies"]]
    extras = project["optional-dependencies"].values()
    return [project["dependencies"], *extras, PROJECT["dependency-groups"]["test"]]


@pytest.mark.parametrize("lock", ["requirements.txt", "tests/requirements.txt"])
def test_locks_are_complete_and_in_step(lock: str):
    """A lock pins all that the project's ranges call for, within them, and nothing besides."""
    pinned, wanted = pins(lock), set()
    for requirement in needed(*requirements_of(lock)):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{RENEW} ({requirement} is not in {lock})"
        fits = requirement.specifier.contains(pinned[name], prereleases=True)
        assert fits, f"{RENEW} ({lock} has {name} {pinned[name]}, and {requirement} is needed)"
        wanted.add(name)
    assert set(pinned) == wanted, f"{RENEW} (what nobody needs any more is in {lock})"


def test_locks_agree():
    """Tests run with the versions that are installed to serve; neither lock names an index."""
    served, tested = pins("requirements.txt"), pins("tests/requirements.txt")
    assert served.items() <= tested.items(), RENEW
    for lock in ("requirements.txt", "tests/requirements.txt"):
        assert "://" not in (REPO / lock).read_text()


def test_build_backend_is_the_one_of_the_tests():
    """The wheel is built here with a backend that an installation would choose, too."""
    [backend] = PROJECT["build-system"]["requires"]
    assert backend in PROJECT["dependency-groups"]["test"]
