"""Users of this machine that are other ones than the tests', and an installation for all of them.

Root runs programs as whom it likes. Where the tests run as somebody else there is one user, and a
file is taken away from it by its mode.
"""

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[1]
AS_ROOT = os.geteuid() == 0
ME = os.geteuid()
NAMED = pwd.getpwnam("nobody") if AS_ROOT else pwd.getpwuid(ME)
SERVICE = NAMED.pw_uid  # to whom the data folder belongs
STRANGER = 10001 if AS_ROOT else ME  # who has no name, as in a container
PATIENCE = 60.0  # seconds
NEEDED = "import aiohttp, asyncpg, msgspec, sqlite3, ssl, uvloop"


class Installation:
    """A folder that every user may look into, with the program, its `.env`, and a data folder.

    `python` is an interpreter that every user can run: this one, or a copy where this one lies in
    a home folder.
    """

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="dropzone-installation-", dir="/tmp"))
        self.home.chmod(0o755)
        self.program = self.home / "dropzone.py"
        self.data = self.home / "var" / "data"
        for name in ("dropzone.py", "dropzone.html"):
            shutil.copy(REPO / name, self.home)
        shutil.copytree(REPO / "backends", self.home / "backends")
        clean = {n: text for n, text in os.environ.items() if not n.startswith("DROPZONE_")}
        self.python, self.environ = sys.executable, clean | {"PYTHONDONTWRITEBYTECODE": "1"}
        if self._python_fails():
            self._copy_python()
            assert not self._python_fails()

    def begin_anew(self) -> None:
        """Have no payload, and the settings and the rights of a new installation."""
        if self.data.parent.exists():
            self._remove(self.data.parent)
        self.data.parent.mkdir()
        self.data.mkdir()
        os.chown(self.data, SERVICE, -1)
        self.settings(
            DROPZONE_RAW_DIR=self.data / "raw",
            DROPZONE_STORAGE_SQLITE_PATH=self.data / "rows.sqlite",
            DROPZONE_SERVER_PORT=0,
        )

    def keep(self) -> None:
        """Keep the data folder as it is, for `begin_again`."""
        subprocess.run(["cp", "-Rp", self.data, self.home / "kept"], check=True)

    def begin_again(self) -> bool:
        """Begin with the data folder that was kept; return False where none was."""
        if not (self.home / "kept").exists():
            return False
        self.begin_anew()
        self.data.rmdir()
        subprocess.run(["cp", "-Rp", self.home / "kept", self.data], check=True)
        return True

    def settings(self, **settings: object) -> None:
        """Write the settings of this installation into its `.env`."""
        lines = (f"{name}={value}\n" for name, value in settings.items())
        (self.home / ".env").write_text("".join(lines))

    def start(
        self, *arguments: object, user: int = ME, umask: int = 0o027, **variables: object
    ) -> "subprocess.Popen[str]":
        """Start the program as a user, from a folder that has nothing to do with it."""
        return self._start([self.python, self.program, *arguments], user, umask, variables)

    def run(
        self, *arguments: object, user: int = ME, umask: int = 0o027, **variables: object
    ) -> "subprocess.CompletedProcess[str]":
        """Run the program to its end."""
        return _ended(self.start(*arguments, user=user, umask=umask, **variables))

    def run_line(self, line: list[str], user: int) -> "subprocess.CompletedProcess[str]":
        """Run another command to its end."""
        return _ended(self._start(line, user, 0o022, {}))

    def _start(
        self, line: list[object], user: int, umask: int, variables: dict[str, object]
    ) -> "subprocess.Popen[str]":
        identity = {"user": user, "group": user, "extra_groups": []} if AS_ROOT else {}
        cwd = str(variables.pop("cwd", "/"))
        return subprocess.Popen(
            [str(word) for word in line],
            cwd=cwd,
            env=self.environ | {name: str(value) for name, value in variables.items()},
            umask=umask,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **identity,
        )

    def _python_fails(self) -> bool:
        try:
            return _ended(self._start([self.python, "-c", NEEDED], STRANGER, 0o022, {})).returncode
        except PermissionError:
            return True

    def _copy_python(self) -> None:
        """Copy the interpreter and its library, and the packages where they are out of reach, too.

        Copies are links where that is possible.
        """
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        base, home = Path(sys.base_prefix), self.home / "python"
        library = home / "lib" / version
        unneeded = shutil.ignore_patterns("test", "site-packages", "config-*", "idlelib")
        shutil.copytree(
            base / "lib" / version, library, ignore=unneeded, copy_function=_link_or_copy
        )
        for shared in (base / "lib").glob("libpython*.so*"):
            shutil.copy(shared, home / "lib")
        (home / "bin").mkdir()
        self.python = str(shutil.copy(Path(sys.executable).resolve(), home / "bin" / "python3"))
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        self.environ |= {
            "PYTHONHOME": str(home),
            "PYTHONPATH": packages,
            "LD_LIBRARY_PATH": str(home / "lib"),
        }
        if self._python_fails():
            shutil.copytree(packages, library / "site-packages", copy_function=_link_or_copy)
            del self.environ["PYTHONPATH"]

    def take_away(self, path: Path) -> None:
        """Leave a path as another user does who works here: root, say, with a strict umask."""
        if AS_ROOT:
            os.chown(path, 0, 0)
            path.chmod(0o700 if path.is_dir() else 0o600)
        else:
            path.chmod(0)

    def give_back(self, path: Path) -> None:
        """Undo that."""
        if AS_ROOT:
            os.chown(path, SERVICE, -1)
        else:
            path.chmod(0o700 if path.is_dir() else 0o600)

    def owners(self) -> set[int]:
        """Return the users to whom the data folder and all that lies below it belong."""
        return {path.lstat().st_uid for path in (self.data, *self.data.rglob("*"))}

    def files(self) -> set[tuple[str, int]]:
        """Return what lies in the data folder, and when it was changed last."""
        return {(str(path), path.lstat().st_ctime_ns) for path in self.data.rglob("*")}

    def close(self) -> None:
        """Delete it."""
        self._remove(self.home)

    def _remove(self, folder: Path) -> None:
        for path, _, _ in os.walk(folder):  # from above
            os.chmod(path, 0o700)
        shutil.rmtree(folder)


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copy2(source, target)
    return target


def _ended(process: "subprocess.Popen[str]") -> "subprocess.CompletedProcess[str]":
    with process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def listening_at(process: "subprocess.Popen[str]") -> str:
    """Return the address of a service that was started, when it listens."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if found := re.search(r"listening on (http://\S+)", line):
            return found[1]
    raise AssertionError(said)
