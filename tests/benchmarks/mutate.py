"""How much the tests notice: defects are put into the code, one at a time, and the tests run.

    python tests/benchmarks/mutate.py [PART ...] [--count 40] [--seed 1] [--minutes 40]

A defect is a comparison turned or moved by one, an `and` that is an `or`, a `not` that is gone, a
number that is one more, a condition that always holds, a lock that is not taken, a statement or an
argument left out, a result that is None. All happens in a copy of the repository. Of a part's tests
the quickest run, those that together take `--seconds`: how long each takes is measured first, once,
and kept in `.pytest_cache`. A defect that they let pass is printed. It is harmless, or noticed by a
slower test, or breaks a promise that has no test.
"""

import argparse
import ast
import contextlib
import copy
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
COPIED = ("backends", "data", "docs", "tests", *(path.name for path in REPO.glob("*.*")))
PATIENCE = 1200  # seconds for all the tests of a part
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
        "backends/raw/keys.py", ("tests/raw/test_damage.py", "tests/service/test_ingest.py")
    ),
    "folders": Part(
        "backends/raw/folders.py", (*STORE, "tests/raw/test_packs.py", "tests/raw/test_damage.py")
    ),
    "packs": Part("backends/raw/packs.py", ("tests/raw/test_packs.py", "tests/raw/test_damage.py")),
    "disk": Part("backends/raw/disk.py", ("tests/raw/test_disk.py", *STORE)),
    "proof": Part("dropzone.py", ("tests/service/test_proof.py",), ("derive", "Proof")),
    "keys and tokens": Part(
        "dropzone.py",
        ("tests/service/test_auth.py",),
        ("hash_of", "Guard", "callers_of", "Tokens", "_content", "name_of", "_shown_name"),
    ),
    "admission": Part(
        "dropzone.py",
        ("tests/service/test_ingest.py", "tests/service/test_limits.py"),
        ("Budget", "Admission", "read_body", "invite", "_counted", "inflated", "inflating"),
    ),
}


# ── Defects ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Defect:
    """A stretch of the source, in bytes, and what is put there."""

    begin: int
    end: int
    text: str
    line: int

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

    def _in(self, node: ast.AST) -> Iterator[Defect]:
        if is_told(node) or isinstance(node, ast.JoinedStr | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.stmt):
            for place, text in defects_of_statement(node):
                yield self._defect(place, text)
        elif isinstance(node, ast.expr):
            for other in (*turned_round(node), *with_less(node)):
                yield self._defect(node, f"({ast.unparse(other)})")
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._in(child)

    def _defect(self, node: ast.AST, text: str) -> Defect:
        begin = self._starts[node.lineno - 1] + node.col_offset
        end = self._starts[node.end_lineno - 1] + node.end_col_offset
        return Defect(begin, end, text, node.lineno)


# ── Tests: this file is also the plugin of pytest that measures and chooses them ──────────────────

DURATIONS, WANTED = "MUTATE_DURATIONS", "MUTATE_WANTED"  # variables that name a file
durations: dict[str, float] = {}  # of each test


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add up how long a test takes; one that fails without a defect says nothing of one."""
    before = durations.get(report.nodeid, 0)
    durations[report.nodeid] = before + report.duration if report.passed else math.inf


def pytest_sessionfinish() -> None:
    """Tell how long each test has taken."""
    if DURATIONS in os.environ:
        Path(os.environ[DURATIONS]).write_text(json.dumps(durations))


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

    def run(self, source: bytes, patience: float, *options: str, **variables: str) -> bool | None:
        """Return whether the tests pass with this source; None where they take too long."""
        self._file.write_bytes(source)
        self._moment += 1_000_000_000  # compiled files are told apart by whole seconds
        os.utime(self._file, ns=(self._moment, self._moment))
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
        environ = os.environ | variables | {"PYTHONPATH": str(Path(__file__).parent)}
        with (self._folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [*command, "-p", "mutate", *options, *self._part.tests],
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

    def said(self) -> str:
        return (self._folder / "said").read_text()


class Trial:
    """A part, the defects that are drawn, and what became of them."""

    def __init__(self, name: str, count: int, seed: int) -> None:
        self.part = PARTS[name]
        self._durations = REPO / ".pytest_cache" / f"mutate {name}.json"
        self.source = Source(self.part)
        found = self.source.defects
        self.drawn = random.Random(seed).sample(found, min(count, len(found)))  # noqa: S311
        self.ends = Counter[str]()
        print(f"{name}: {len(self.drawn)} of {len(found)} defects", flush=True)

    def run(self, folder: Path, until: float, seconds: float) -> None:
        """Try the defects until a moment; print those that are not noticed."""
        scratch, wanted = Scratch(folder, self.part), folder / "wanted"
        names = self._quickest(scratch, seconds)
        wanted.write_text(json.dumps(names))
        begun = time.monotonic()
        if not scratch.run(self.source.text, PATIENCE, "-x", MUTATE_WANTED=str(wanted)):
            raise SystemExit(f"without a defect the tests fail, too:\n{scratch.said()}")
        took = time.monotonic() - begun
        print(f"{len(names)} tests pass in {took:.0f} s without a defect", flush=True)
        for defect in self.drawn:
            if time.monotonic() > until:
                break
            changed = defect.put_into(self.source.text)
            passes = scratch.run(changed, 20 + 3 * took, "-x", MUTATE_WANTED=str(wanted))
            end = {True: "surviving", False: "killed", None: "endless"}[passes]
            self.ends[end] += 1
            if end != "killed":
                print(f"{end}: {self.part.file}:{defect.shown(self.source.text)}", flush=True)
        print(", ".join(f"{count} {end}" for end, count in self.ends.items()), flush=True)

    def _quickest(self, scratch: Scratch, seconds: float) -> list[str]:
        """Return the tests that together take so long, the quickest first."""
        if not self._durations.exists():
            self._durations.parent.mkdir(exist_ok=True)
            scratch.run(self.source.text, PATIENCE, MUTATE_DURATIONS=str(self._durations))
        found = json.loads(self._durations.read_text())
        names = sorted((name for name in found if math.isfinite(found[name])), key=found.get)
        totals = itertools.accumulate(found[name] for name in names)
        return [name for name, total in zip(names, totals, strict=True) if total <= seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (all)")
    parser.add_argument("--count", type=int, default=40, help="of defects in each part (40)")
    parser.add_argument("--seed", type=int, default=1, help="by which they are drawn (1)")
    parser.add_argument("--minutes", type=float, default=40, help="for all (40)")
    parser.add_argument("--seconds", type=float, default=20, help="of tests for each defect (20)")
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
