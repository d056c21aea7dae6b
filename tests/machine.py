"""What the tests need besides Python packages: found on the machine, or else brought onto it."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

BROWSERS = ("google-chrome", "google-chrome-stable", "chromium", "chromium-browser")
CHROME_ON_MACOS = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
# Where an unprivileged user's PATH does not lead, and daemons and mkfs lie all the same.
MORE_PLACES = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/opt/homebrew/bin", "/opt/homebrew/sbin")
DOWNLOAD_SECONDS = 300
PACKAGES_SECONDS = 600
PLAYWRIGHT = [sys.executable, "-m", "playwright"]
OWN_BROWSER = """
from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    print(playwright.chromium.executable_path)
"""
POLICY = Path("/usr/sbin/policy-rc.d")


def program(name: str, *, package: str) -> str:
    """Return the path of a program; root on Debian installs the package that holds it.

    Raises RuntimeError, which says what to do, where the program cannot be had.
    """
    with _one_at_a_time():
        path = _find(name)
        if path is None:
            why = _install(package)
            path = _find(name)
    if path is None:
        raise RuntimeError(f"the tests need {name}, and {why}: {_advice(package)}")
    return path


def browser() -> str:
    """Return the path of a Chromium or Chrome: the machine's, Playwright's own, or Debian's.

    Raises RuntimeError, which says what to do, where there is none of them.
    """
    with _one_at_a_time():
        _start_playwright()
        path = next(filter(None, map(_find, (*BROWSERS, CHROME_ON_MACOS))), None)
        if path is None:
            path, no_download = _downloaded_browser()
        if path is None:
            no_package = _install("chromium", "fonts-liberation")
            path = _find("chromium")
    if path is None:
        raise RuntimeError(
            f"the page is tried in a real browser, and none of {', '.join(BROWSERS)} is here; "
            f"{no_download}; {no_package}: {_advice('chromium')}"
        )
    return path


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join((os.environ.get("PATH", ""), *MORE_PLACES)))


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let the test processes wait for one another, so that one of them installs."""
    with FileLock(Path(tempfile.gettempdir()) / f"dropzone-tests-{os.getuid()}.lock"):
        yield


def _install(*packages: str) -> str:
    """Install Debian packages, and return why that cannot be or did not help."""
    if os.getuid() != 0 or shutil.which("apt-get") is None:
        return "only root on Debian can install packages from here"
    options = ["-qq", "-o", "DPkg::Lock::Timeout=120"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with _no_services():
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            wrong = _run(["apt-get", *options, *command], PACKAGES_SECONDS, environment)
            if wrong:
                return wrong
    return f"{' '.join(packages)} did not bring it"


@contextmanager
def _no_services() -> Iterator[None]:
    """Keep packages from starting what they bring, as Debian lets an administrator do.

    The policy is bound to this process, so that one that a kill left behind forbids nothing.
    """
    if POLICY.exists():
        yield
        return
    POLICY.write_text(f"#!/bin/sh\nkill -0 {os.getpid()} 2>/dev/null && exit 101\nexit 0\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink(missing_ok=True)


def _start_playwright() -> None:
    """See that Playwright's own program starts: it takes a library that not every system has."""
    if _run([*PLAYWRIGHT, "--version"], DOWNLOAD_SECONDS):
        why = _install("libatomic1")
        wrong = _run([*PLAYWRIGHT, "--version"], DOWNLOAD_SECONDS)
        if wrong:
            raise RuntimeError(
                f"Playwright does not start: {wrong}; {why}: {_advice('libatomic1')}"
            )


def _downloaded_browser() -> tuple[str | None, str]:
    """Return the browser that Playwright downloads, or None, and why there is none."""
    wrong = _run([*PLAYWRIGHT, "install", "chromium"], DOWNLOAD_SECONDS)
    if wrong:
        return None, wrong
    asked = subprocess.run(
        [sys.executable, "-c", OWN_BROWSER], capture_output=True, text=True, check=True
    )
    path = asked.stdout.strip()
    # A download has no system libraries with it: on a bare machine it may not start.
    wrong = _run([path, "--version"], DOWNLOAD_SECONDS)
    return (None, wrong) if wrong else (path, "")


def _run(command: list[str], seconds: float, environment: dict[str, str] | None = None) -> str:
    """Run a command; return what it complained of, nothing where it did well."""
    shown = " ".join(command)
    try:
        done = subprocess.run(
            command,
            env=environment,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"`{shown}` failed ({error})"
    if done.returncode == 0:
        return ""
    said = done.stdout.strip().splitlines() or ["it said nothing"]
    complaints = [line for line in said if line.startswith(("E: ", "Error: "))]
    return f"`{shown}` failed ({[*said[-1:], *complaints][-1]})"


def _advice(package: str) -> str:
    if sys.platform == "darwin":
        return f"`brew install {package}`"
    return f"install {package} (Debian: `apt-get install {package}`, or run the tests as root)"
