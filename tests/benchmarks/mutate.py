"""How much the tests notice: defects are put into the code, one at a time, and the tests run.

    python tests/benchmarks/mutate.py [PART ...] [--count 40] [--seed 1] [--minutes 40]

A defect is a comparison turned or moved by one, an `and` that is an `or`, a `not` that is gone, a
number that is one more, a condition that always holds, a lock that is not taken, a statement or an
argument left out, a result that is None. All happens in a copy of the repository. A defect is tried
by the tests of its part that run its line, the quickest first, as many as take `--seconds`, until
one fails. Which tests run what, and how long they take, is measured first and kept in
`.pytest_cache`. Other processes are not seen: where no test runs the line, those are tried that run
another of its function, or else the quickest of all. A defect that they let pass is printed. It is
harmless, or noticed by a slower test, or breaks a promise that has no test.
"""

import argparse
import ast
import contextlib
import copy
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

REPO = Path(__file__).resolve().parents[2]
COPIED = ("backends", "data", "docs", "tests", *(path.name for path in REPO.glob("*.*")))
PATIENCE = 1800  # seconds for all the tests of a part
PLUGINS = ("-p", "mutate", "-p", "no:cacheprovider", "-p", "no:schemathesis")  # which is slow
STORE = ("tests/raw/test_raw_store.py", "tests/raw/test_durability.py")


@dataclass(frozen=True)
class Part:
    """A file, or some of the classes and functions of it, and the tests that it has."""

    file: str
    tests: tuple[str, ...]
    names: tuple[str, ...] = ()


PARTS = {
    "landing": Part(
        "backends/raw/landing.py",
        (*STORE, "tests/service/test_ingest.py", "tests/service/test_standstill.py"),
    ),
    "journal": Part("backends/raw/journal.py", (*STORE, "tests/raw/test_damage.py")),
    "keys": Part(
        "backends/raw/keys.py",
        ("tests/raw/test_keys.py", "tests/raw/test_damage.py", "tests/service/test_ingest.py"),
    ),
    "folders": Part(
        "backends/raw/folders.py", (*STORE, "tests/raw/test_packs.py", "tests/raw/test_damage.py")
    ),
    "packs": Part("backends/raw/packs.py", ("tests/raw/test_packs.py", "tests/raw/test_damage.py")),
    "archive": Part("backends/raw/archive.py", ("tests/raw/test_archive.py",)),
    "archiving": Part("backends/raw/archiving.py", ("tests/raw/test_archive.py",)),
    "disk": Part("backends/raw/disk.py", ("tests/raw/test_disk.py", *STORE)),
    "proof": Part("dropzone.py", ("tests/service/test_proof.py",), ("derive", "Proof")),
    "keys and tokens": Part(
        "dropzone.py",
        ("tests/service/test_auth.py",),
        ("hash_of", "Guard", "callers_of", "Tokens", "_content", "name_of", "_shown_name"),
    ),
    "admission": Part(
        "dropzone.py",
        (
            "tests/service/test_ingest.py",
            "tests/service/test_edges.py",
            "tests/service/test_expect.py",
            "tests/service/test_limits.py",
        ),
        ("Budget", "Admission", "Body", "read_body", "invite", "_counted", "inflated", "inflating"),
    ),
    "answers": Part(
        "dropzone.py",
        ("tests/service/test_hostile.py", "tests/service/test_csv.py"),
        ("Taking", "Clients", "waiting_for", "Sent", "InPieces", "WhileRead", "reset", "Turns"),
    ),
}


# ── Defects ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Defect:
    """A stretch of the source, in bytes, what is put there, and the lines of its function."""

    begin: int
    end: int
    text: str
    line: int
    around: range  # empty outside of any function

    def put_into(self, source: bytes) -> bytes:
        return source[: self.begin] + self.text.encode() + source[self.end :]

    def shown(self, source: bytes) -> str:
        """Return the line as it is, or the lines, and as it becomes."""
        begin = source.rfind(b"\n", 0, self.begin) + 1
        end = source.find(b"\n", self.end)
        old = source[begin:end]
        new = source[begin : self.begin] + self.text.encode() + source[self.end : end]
        lines = [
            f"  {sign} {b' '.join(text.split()).decode()}"
            for sign, text in zip("-+", (old, new), strict=True)
        ]
        return "\n".join([str(self.line), *lines])


TURNED: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.FloorDiv,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.FloorDiv,),
    ast.BitOr: (ast.BitAnd,),
    ast.BitAnd: (ast.BitOr,),
}


def turned(node: ast.AST, name: str, kind: type[ast.AST]) -> Iterator[ast.AST]:
    """Yield the node with other operators in the place of one."""
    for other in TURNED.get(kind, ()):
        changed = copy.deepcopy(node)
        setattr(changed, name, [other()] if name == "ops" else other())
        yield changed


def turned_round(node: ast.AST) -> Iterator[ast.AST]:
    """Yield an expression with another operator, or with one of its parts alone."""
    match node:
        case ast.Compare(ops=[op]):
            yield from turned(node, "ops", type(op))
        case ast.BoolOp(op=op, values=values):
            yield from turned(node, "op", type(op))
            yield from values
        case ast.BinOp(op=op):
            yield from turned(node, "op", type(op))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield operand
        case ast.IfExp(body=body, orelse=orelse):
            yield body
            yield orelse


def with_less(node: ast.AST) -> Iterator[ast.AST]:
    """Yield an expression with another constant, or without an argument or a condition."""
    match node:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield ast.Constant(value + 1)
        case ast.Call(keywords=keywords):
            for at in range(len(keywords)):
                changed = copy.deepcopy(node)
                del changed.keywords[at]
                yield changed
        case ast.ListComp() | ast.GeneratorExp() | ast.DictComp() if node.generators[0].ifs:
            changed = copy.deepcopy(node)
            changed.generators[0].ifs = []
            yield changed


def defects_of_statement(node: ast.stmt) -> Iterator[tuple[ast.AST, str]]:
    """Yield nodes of a statement, or itself, and what is put there."""
    match node:
        case ast.Expr(value=ast.Constant()):  # a docstring
            return
        case ast.Expr() | ast.AugAssign() | ast.Raise() | ast.Delete():
            yield node, "pass"
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, "pass"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            yield value, "None"
        case ast.Continue():
            yield node, "pass"
            yield node, "break"
        case ast.Break():
            yield node, "pass"
        case ast.If(test=test) | ast.While(test=test):
            yield test, "False"
            if isinstance(node, ast.If):
                yield test, "True"
        case ast.With(items=[ast.withitem(context_expr=context, optional_vars=None)]):
            yield context, "contextlib.nullcontext()"


def defects_of(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Yield nodes of a statement or an expression, or itself, and what is put there."""
    if isinstance(node, ast.stmt):
        yield from defects_of_statement(node)
    elif isinstance(node, ast.expr):
        for other in (*turned_round(node), *with_less(node)):
            yield node, f"({ast.unparse(other)})"


def is_told(node: ast.AST) -> bool:
    """Say whether a statement only writes to the log."""
    return isinstance(node, ast.Expr) and ast.unparse(node).startswith("log.")


class Source:
    """A file, and every defect that can be put into it, or into some of its classes."""

    def __init__(self, part: Part) -> None:
        self.text = (REPO / part.file).read_bytes()
        self._starts = [0]
        for line in self.text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        parts = [
            node
            for node in ast.parse(self.text).body
            if not part.names or getattr(node, "name", None) in part.names
        ]
        self.defects = list(dict.fromkeys(itertools.chain.from_iterable(map(self._in, parts))))

    def _in(self, node: ast.AST, around: range = range(0)) -> Iterator[Defect]:
        if is_told(node) or isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        for place, text in defects_of(node):
            begin = self._starts[place.lineno - 1] + place.col_offset
            end = self._starts[place.end_lineno - 1] + place.end_col_offset
            yield Defect(begin, end, text, place.lineno, around)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            around = range(node.lineno, node.end_lineno + 1)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._in(child, around)


# ── Tests: this file is also the plugin of pytest that measures and chooses them ──────────────────

MEASURED, TRACED, WANTED = "MUTATE_MEASURED", "MUTATE_TRACED", "MUTATE_WANTED"  # name files
seconds = Counter[str]()  # that each test takes
ran = dict[str, set[int]]()  # lines of the file, by each test
failed = set[str]()  # which say nothing of a defect


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note which lines a test runs."""
    lines, file = ran.setdefault(item.nodeid, set()), os.environ.get(TRACED)

    def note(frame: FrameType, _event: str, _argument: Any) -> Any:
        if frame.f_code.co_filename != file:
            return None
        lines.add(frame.f_lineno)
        return note

    if file:
        threading.settrace(note)
        sys.settrace(note)
    try:
        return (yield)
    finally:
        if file:
            sys.settrace(None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up how long a test takes."""
    seconds[report.nodeid] += report.duration
    if not report.passed:
        failed.add(report.nodeid)


def pytest_sessionfinish() -> None:
    """Tell how long each test has taken, and what it has run."""
    if MEASURED in os.environ:
        passed = {
            name: (seconds[name], sorted(lines))
            for name, lines in ran.items()
            if name not in failed
        }
        Path(os.environ[MEASURED]).write_text(json.dumps(passed))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run those that are wanted, the quickest first."""
    if WANTED in os.environ:
        wanted = json.loads(Path(os.environ[WANTED]).read_text())
        order = {nodeid: number for number, nodeid in enumerate(wanted)}
        items[:] = sorted((i for i in items if i.nodeid in order), key=lambda i: order[i.nodeid])


# ── Trying ────────────────────────────────────────────────────────────────────────────────────────


class Scratch:
    """A copy of the repository in which one defect at a time is tried."""

    def __init__(self, folder: Path, part: Part) -> None:
        self._folder = folder
        self._part = part
        self._file = folder / part.file
        self._moment = time.time_ns()
        for name in COPIED:
            here, there = REPO / name, folder / name
            if here.is_dir():
                shutil.copytree(here, there, ignore=shutil.ignore_patterns("__pycache__"))
            elif here.is_file():
                there.parent.mkdir(exist_ok=True)
                shutil.copy(here, there)

    def measure(self, source: bytes, measured: Path) -> None:
        """Run all tests, and keep how long each takes and what it runs."""
        measured.parent.mkdir(exist_ok=True)
        variables = {MEASURED: str(measured), TRACED: str(self._file)}
        self._run(source, self._part.tests, PATIENCE, **variables)
        if not measured.exists():
            raise SystemExit(f"the tests do not run:\n{(self._folder / 'said').read_text()}")

    def passes(self, source: bytes, tests: Sequence[str], patience: float) -> bool | None:
        """Return whether tests pass with this source; None where they take too long."""
        wanted = self._folder / "wanted"
        wanted.write_text(json.dumps(tests))
        files = list(dict.fromkeys(name.partition("::")[0] for name in tests))
        return self._run(source, [*files, "-x"], patience, **{WANTED: str(wanted)})

    def _run(
        self, source: bytes, arguments: Sequence[str], patience: float, **variables: str
    ) -> bool | None:
        self._file.write_bytes(source)
        self._moment += 1_000_000_000  # compiled files are told apart by whole seconds
        os.utime(self._file, ns=(self._moment, self._moment))
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0"]
        environ = os.environ | variables | {"PYTHONPATH": str(Path(__file__).parent)}
        with (self._folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [*command, *PLUGINS, *arguments],
                cwd=self._folder,
                env=environ,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        try:
            return process.wait(patience) == 0
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what the tests have left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


Measured = dict[str, tuple[float, list[int]]]  # of each test the seconds, and the lines it runs


class Trial:
    """A part, the defects that are drawn, and what became of them."""

    def __init__(self, name: str, count: int, seed: int) -> None:
        self.part = PARTS[name]
        self.source = Source(self.part)
        found = self.source.defects
        self.drawn = random.Random(seed).sample(found, min(count, len(found)))  # noqa: S311
        self.ends = Counter[str]()
        print(f"{name}: {len(self.drawn)} of {len(found)} defects", flush=True)

    def run(self, folder: Path, until: float, seconds: float) -> None:
        """Try the defects until a moment; print those that are not noticed."""
        scratch = Scratch(folder, self.part)
        measured = self._measured(scratch)
        for defect in self.drawn:
            if time.monotonic() > until:
                break
            tests, took = chosen(measured, defect, seconds)
            passes = scratch.passes(defect.put_into(self.source.text), tests, 30 + 3 * took)
            end = {True: "surviving", False: "killed", None: "endless"}[passes]
            self.ends[end] += 1
            if end != "killed":
                shown = f"{self.part.file}:{defect.shown(self.source.text)}"
                print(f"{end} {len(tests)} tests: {shown}", flush=True)
        print(", ".join(f"{count} {end}" for end, count in self.ends.items()), flush=True)

    def _measured(self, scratch: Scratch) -> Measured:
        """Return what each test takes and runs, measured with these very files."""
        files = [REPO / name for name in (self.part.file, *self.part.tests)]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        kept = REPO / ".pytest_cache" / f"mutate-{digest[:16]}.json"
        if not kept.exists():
            scratch.measure(self.source.text, kept)
        return json.loads(kept.read_text())


def chosen(measured: Measured, defect: Defect, seconds: float) -> tuple[list[str], float]:
    """Return the tests for a defect, the quickest first, and how long they take together."""
    reaching = [name for name, (_, lines) in measured.items() if defect.line in lines]
    near = [name for name, (_, lines) in measured.items() if set(lines) & set(defect.around)]
    names, total = list[str](), 0.0
    for name in sorted(reaching or near or measured, key=lambda name: measured[name][0]):
        if names and total + measured[name][0] > seconds:
            break
        names.append(name)
        total += measured[name][0]
    return names, total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--count", type=int, default=40, help="of defects in each part (40)")
    parser.add_argument("--seed", type=int, default=1, help="by which they are drawn (1)")
    parser.add_argument("--minutes", type=float, default=40, help="for all (40)")
    parser.add_argument("--seconds", type=float, default=30, help="of tests for each defect (30)")
    args = parser.parse_args()
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}")
    parts, begun, ends = args.parts or list(PARTS), time.monotonic(), Counter[str]()
    for number, name in enumerate(parts, 1):
        trial = Trial(name, args.count, args.seed)
        until = begun + 60 * args.minutes * number / len(parts)
        with tempfile.TemporaryDirectory(prefix="dropzone-mutate-") as folder:
            trial.run(Path(folder), until, args.seconds)
        ends += trial.ends
    print("in all: " + ", ".join(f"{count} {end}" for end, count in ends.items()))


if __name__ == "__main__":
    main()
