"""The house: which room may know which, and how large they are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
ROOMS = {
    "dropzone": (
        "backends",
        "backends.raw",
        "backends.raw.batches",
        "backends.raw.disk",
        "backends.raw.landing",
    ),
    "backends": (),
    "backends.memory": ("backends",),
    "backends.sqlite": ("backends",),
    "backends.postgres_url": (),
    "backends.postgres": ("backends", "backends.postgres_url"),
    "backends.raw": ("backends", "backends.raw.raw_ids"),
    "backends.raw.raw_ids": (),
    "backends.raw.batches": ("backends.raw",),
    "backends.raw.disk": ("backends.raw",),
    "backends.raw.nodes": ("backends.raw", "backends.raw.disk"),
    "backends.raw.notes": (),
    "backends.raw.places": ("backends.raw", "backends.raw.disk"),
    "backends.raw.unpacking": ("backends.raw",),
    "backends.raw.packs": ("backends.raw", "backends.raw.disk", "backends.raw.unpacking"),
    "backends.raw.rejections": ("backends", "backends.raw"),
    "backends.raw.tally": ("backends.raw", "backends.raw.disk"),
    "backends.raw.days": (
        "backends.raw",
        "backends.raw.batches",
        "backends.raw.disk",
        "backends.raw.notes",
        "backends.raw.packs",
        "backends.raw.places",
    ),
    "backends.raw.folders": (
        "backends",
        "backends.raw",
        "backends.raw.batches",
        "backends.raw.days",
        "backends.raw.disk",
        "backends.raw.nodes",
        "backends.raw.packs",
        "backends.raw.rejections",
        "backends.raw.tally",
    ),
    "backends.raw.keys": ("backends.raw", "backends.raw.disk"),
    "backends.raw.journal": (
        "backends.raw",
        "backends.raw.batches",
        "backends.raw.disk",
        "backends.raw.keys",
        "backends.raw.nodes",
    ),
    "backends.raw.backup": (
        "backends.raw",
        "backends.raw.days",
        "backends.raw.disk",
        "backends.raw.folders",
        "backends.raw.nodes",
    ),
    "backends.raw.landing": (
        "backends.raw",
        "backends.raw.backup",
        "backends.raw.disk",
        "backends.raw.folders",
        "backends.raw.journal",
        "backends.raw.keys",
    ),
}
NOT_BELOW = {"aiohttp", "prometheus_client", "tomllib", "dotenv"}


def file_of(room: str) -> Path:
    path = REPO / room.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imports_of(file: Path) -> set[str]:
    found = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file}: import by the full name"
            found.add(node.module)
    return found


def test_every_room_is_known():
    """Each file of the service and of what keeps its data has its place in the house."""
    files = {REPO / "dropzone.py", *(REPO / "backends").rglob("*.py")}
    assert {file_of(room) for room in ROOMS} == files


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str):
    """A room imports those below it alone, and what keeps data knows no HTTP and no metrics."""
    imports = imports_of(file_of(room))
    assert {name for name in imports if name.split(".")[0] in ("dropzone", "backends")} <= set(
        ROOMS[room]
    )
    if room != "dropzone":
        assert not {name.split(".")[0] for name in imports} & NOT_BELOW


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_can_be_looked_over(room: str):
    """No room of `backends` is longer than 700 lines, and no function than 40."""
    text = file_of(room).read_text()
    assert room == "dropzone" or len(text.splitlines()) <= 700
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 40, f"{node.name} is too long"


def test_the_writer_process_is_small():
    """The process that lands large groups imports neither the service nor its libraries."""
    code = "import sys, backends.raw.landing; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    modules = subprocess.run(command, cwd=REPO, check=True, capture_output=True, text=True).stdout
    assert not {name.split(".")[0] for name in modules.split()} & (NOT_BELOW | {"dropzone"})
