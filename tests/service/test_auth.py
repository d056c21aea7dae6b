"""Who may do what: keys and their scopes, their rotation, and the tokens of an issuer."""

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import logging
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import jwt
import machine
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer, unused_port
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.hazmat.primitives.serialization import PublicFormat as Public
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dropzone
from backends.memory import MemoryBackend
from dropzone import (
    NOTES,
    ROUTES,
    AuthConfig,
    Config,
    ConfigError,
    JwtConfig,
    KeyConfig,
    LimitsConfig,
    Place,
    Rate,
    RawConfig,
    Secret,
    create_app,
    load_config,
)

DROPZONE = Path(dropzone.__file__).resolve()
PATIENCE = 60  # seconds until something that does not happen is taken for broken
SCOPES = ("ingest", "process", "read")
GUARDED = [
    (route.method, re.sub("{.*?}", "x", route.path), route.scope) for route in ROUTES if route.scope
]
ISSUER, AUDIENCE = "https://issuer.example/", "dropzone"
Client = TestClient[web.Request, web.Application]


def table(name: str, key: str, *scopes: str) -> str:
    """Return the table of a key, as it stands in a configuration file."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return f'[[auth.keys]]\nname = "{name}"\nhash = "sha256:{digest}"\nscopes = {list(scopes)}\n'


def key_of(name: str, key: str, *scopes: Any) -> KeyConfig:
    return KeyConfig(name, Secret(f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"), scopes)


class Service:
    """A service behind a middleware that notes who called."""

    def __init__(self, client: Client, callers: list[str | None]) -> None:
        self.client, self.callers = client, callers

    async def __call__(
        self, path: str = "/measurements", method: str = "GET", **headers: str
    ) -> tuple[int, dict[str, Any], Any]:
        """Send a request; return status, document and headers."""
        named = {name.replace("_", "-"): text for name, text in headers.items()}
        body = b"1" if method == "POST" else None
        async with self.client.request(method, path, headers=named, data=body) as answer:
            text = await answer.read()
            document = json.loads(text) if "json" in answer.content_type else {}
            return answer.status, document, answer.headers

    async def token(self, token: str, path: str = "/measurements") -> tuple[int, str]:
        """Send a bearer token; return status and code."""
        status, document, _ = await self(path, Authorization=f"Bearer {token}")
        return status, document.get("code", "")

    async def until(self, status: int, **headers: str) -> None:
        """Ask until the answer has a status."""
        async with asyncio.timeout(PATIENCE):
            while (await self(**headers))[0] != status:
                await asyncio.sleep(0.05)


Serve = Callable[[Config], Awaitable[Service]]


@pytest.fixture
def serve(aiohttp_client: Any) -> Serve:
    """Return what serves a configuration."""

    async def start(config: Config) -> Service:
        callers: list[str | None] = []

        @web.middleware
        async def note(request: web.Request, handler: Any) -> web.StreamResponse:
            try:
                return await handler(request)
            finally:
                callers.append(request[NOTES].caller or None)

        app = create_app(config, backend=MemoryBackend())
        app.middlewares.append(note)
        return Service(await aiohttp_client(app), callers)

    return start


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., Config]:
    return lambda **auth: Config(raw=RawConfig(dir=tmp_path / "raw"), auth=AuthConfig(**auth))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration file where one works; no other counts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").touch()
    return tmp_path / "config.toml"


def replace(file: Path, text: str) -> None:
    """Write a file as deployments do: beside it, then over it."""
    beside = file.with_suffix(".new")
    beside.write_text(text)
    beside.replace(file)


# ── Keys and scopes ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scope", SCOPES)
async def test_scopes(serve: Serve, config_of: Callable[..., Config], scope: str):
    """A key opens the routes of its scopes; every other guarded one is 403 and says what lacks."""
    service = await serve(config_of(keys=(key_of("sensor", "one", scope),)))
    for method, path, needed in GUARDED:
        status, problem, headers = await service(path, method, x_api_key="one")
        assert (status == 403) == (needed != scope), path
        if status == 403:
            assert (problem["code"], problem["scope"]) == ("scope_missing", needed)
            assert headers["WWW-Authenticate"] == 'Bearer error="insufficient_scope"'


async def test_unknown_keys(serve: Serve, config_of: Callable[..., Config]):
    """A wrong key and none at all are 401, and so is a hash, for whoever has read the file."""
    service = await serve(config_of(keys=(key_of("sensor", "one", "read"),)))
    digest = hashlib.sha256(b"one").hexdigest()
    for headers in ({}, {"x_api_key": "two"}, {"x_api_key": digest}, {"x_api_key": ""}):
        status, problem, answered = await service(**headers)
        assert (status, problem["code"]) == (401, "key_refused")
        assert answered["WWW-Authenticate"].startswith("Bearer")
    assert service.callers == [None] * 4


async def test_callers(serve: Serve, config_of: Callable[..., Config]):
    """The name of the key is known to whoever logs and limits, also where its scope lacks."""
    keys = (key_of("reader", "one", "read"), key_of("gateway", "two", "ingest"))
    service = await serve(config_of(api_key=Secret("sesam"), keys=keys))
    for key in ("one", "two", "sesam"):
        await service(x_api_key=key)
        await service(Authorization=f"Bearer {key}")
    await service("/health", x_api_key="one")
    names = [f"key:{name}" for name in ("reader", "gateway", "api_key") for _ in range(2)]
    assert service.callers == [*names, None]


async def test_open(serve: Serve, config_of: Callable[..., Config], caplog: Any):
    """With nothing configured the API is open, says so in the log, and knows no caller."""
    service = await serve(config_of())
    assert (await service(x_api_key="one"))[0] == 200
    assert service.callers == [None]
    assert "DROPZONE_API_KEY" in caplog.text


@pytest.mark.parametrize("way", ["api_key", "keys", "jwt"])
async def test_not_open(serve: Serve, config_of: Callable[..., Config], way: str, caplog: Any):
    """Any of the three ways closes the API, and the log does not call it open."""
    ways = {
        "api_key": Secret("sesam"),
        "keys": (key_of("reader", "one", "read"),),
        "jwt": JwtConfig(ISSUER, AUDIENCE, Place("/nowhere")),
    }
    service = await serve(config_of(**{way: ways[way]}))
    assert (await service())[0] == 401
    assert "open to everyone" not in caplog.text


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ([key_of("a", "one", "read"), key_of("a", "two", "read")], "the name a is taken"),
        ([key_of("api_key", "one", "read")], "the name api_key is taken"),
        ([key_of("a", "one", "read"), key_of("b", "one", "read")], "b is the same key as a"),
        ([key_of("a", "sesam", "read")], "a is the same key as api_key"),
        ([KeyConfig("a", Secret("hunter2"), ("read",))], "the hash of a is not sha256:"),
    ],
)
def test_keys_that_contradict(config_of: Callable[..., Config], keys: list[KeyConfig], named: str):
    """Keys that cannot be told apart, and a hash that is none, are refused by name."""
    with pytest.raises(ConfigError) as caught:
        create_app(config_of(api_key=Secret("sesam"), keys=tuple(keys)))
    assert named in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("blank", ["", "\n", "\r\n", " "])
async def test_hash_of_no_key(config_of: Callable[..., Config], file: Path, blank: str):
    """The hash of nothing, as a script makes it of a variable that is not set, admits nobody."""
    with pytest.raises(ConfigError, match="the hash of a is that of no key"):
        create_app(config_of(keys=(key_of("b", "one", "read"), key_of("a", blank, "read"))))
    file.write_text(table("a", blank, "read"))
    done = run(file.parent, "check")
    assert (done.returncode, done.stderr) == (78, "")
    assert "wrong  keys: auth.keys: the hash of a is that of no key at all" in done.stdout
    assert run(file.parent, "--port", "0").returncode == 78


@pytest.mark.parametrize("blank", [" ", "\n", " \t"])
def test_blank_api_key(config_of: Callable[..., Config], blank: str):
    """A key for everything that is blank is refused, as nobody could show it."""
    with pytest.raises(ConfigError, match=r"auth\.api_key is blank"):
        create_app(config_of(api_key=Secret(blank)))


async def test_blank_keys_are_none(serve: Serve, config_of: Callable[..., Config]):
    """Whoever shows an empty or blank key is asked for one, whatever is configured."""
    service = await serve(config_of(keys=(key_of("a", "one", "read"),)))
    guard = service.client.app[dropzone.GUARD]
    for blank in ("", " ", "\t"):
        guard.callers[dropzone.hash_of(blank)] = ("key:a", ("read",))
    for headers in ({}, {"x_api_key": ""}, {"x_api_key": " "}, {"Authorization": "Bearer "}):
        status, problem, _ = await service(**headers)
        assert (status, problem["code"]) == (401, "key_refused"), headers
        assert "send an API key" in problem["detail"]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('name = "a b"\nhash = "x"\nscopes = ["read"]', "auth.keys[0].name"),
        ('name = "a\\n"\nhash = "x"\nscopes = ["read"]', "auth.keys[0].name"),
        ('name = "a"\nscopes = ["read"]', "auth.keys[0]"),
        ('name = "a"\nhash = 5\nscopes = ["read"]', "auth.keys[0].hash"),
        ('name = "a"\nhash = "x"\nscopes = ["write"]', "auth.keys[0].scopes[0]"),
        ('name = "a"\nhash = "x"\nscopes = []', "auth.keys[0].scopes"),
        ('name = "a"\nhash = "x"\nscopes = ["read"]\nkey = "x"', "key"),
    ],
)
def test_tables_that_are_wrong(file: Path, text: str, place: str):
    """A table of a key that is not one is refused with its place."""
    file.write_text(f"[[auth.keys]]\n{text}")
    with pytest.raises(ConfigError, match=place.replace("[", r"\[")):
        load_config(environ={})


def test_keys_by_variable(file: Path):
    """Keys can be given as JSON in DROPZONE_AUTH_KEYS; what is no JSON is an error without it."""
    file.write_text(table("in-file", "one", "read"))
    given = json.dumps([{"name": "by-variable", "hash": "sha256:" + "0" * 64, "scopes": ["read"]}])
    [key] = load_config(environ={"DROPZONE_AUTH_KEYS": given}).auth.keys
    assert key.name == "by-variable"
    with pytest.raises(ConfigError) as caught:
        load_config(environ={"DROPZONE_AUTH_KEYS": "hunter2"})
    assert "DROPZONE_AUTH_KEYS" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_hashes_are_not_shown(config_of: Callable[..., Config]):
    """A configuration that is printed shows no hash, even."""
    key = key_of("sensor", "one", "read")
    assert key.hash.reveal().removeprefix("sha256:") not in repr(config_of(keys=(key,)))


# ── Making keys ───────────────────────────────────────────────────────────────────────────────────


def run(folder: Path, *arguments: str, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run a command in a folder, with no variables but those given."""
    clean = {n: text for n, text in os.environ.items() if not n.startswith("DROPZONE_")}
    return subprocess.run(
        [sys.executable, DROPZONE, *arguments],
        cwd=folder,
        env=clean | options.pop("variables", {}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        **options,
    )


def kept(file: Path) -> Path:
    """Return the file that `key new` adds to, beside the payloads."""
    return file.parent / "data" / "keys.toml"


async def test_key_new(file: Path, serve: Serve):
    """`key new` prints a key once, which works with its scopes; a file holds its hash alone."""
    file.write_text("[log]\nlevel = 'info'")
    done = run(file.parent, "key", "new", "gateway-7", "--scope", "read", "--scope", "process")
    assert done.returncode == 0, done.stderr
    key = done.stdout.strip()
    assert key.startswith("dz_")
    assert len(key) >= 3 + 128 // 4
    assert str(kept(file)) in done.stderr
    assert "from now on every request needs a key" in done.stderr
    assert key not in done.stderr + kept(file).read_text()
    service = await serve(load_config(environ={}))
    assert (await service(x_api_key=key))[0] == 200
    assert (await service("/ingest", "POST", x_api_key=key))[0] == 403
    assert run(file.parent, "key", "list").stdout == "gateway-7 read process\n"


def test_key_new_leaves_the_settings_alone(file: Path):
    """Keys lie beside the payloads, for their owner's eyes alone, not in what git may track."""
    text = table("older", "x", "read")
    file.write_text(text)
    for name in ("one", "two"):
        done = run(file.parent, "key", "new", name, "--scope", "ingest")
        assert "needs a key" not in done.stderr
    assert file.read_text() == text
    assert {path.name for path in kept(file).parent.iterdir()} == {"keys.toml"}
    assert kept(file).stat().st_mode & 0o777 == 0o600
    listed = run(file.parent, "key", "list").stdout
    assert listed == "older read\none ingest\ntwo ingest\n"


def test_git_does_not_notice_a_new_key(tmp_path: Path):
    """A new key leaves nothing that git would track or show."""
    for name in (".gitignore", "config.toml", "dropzone.py", "backends"):
        copy = shutil.copytree if (DROPZONE.parent / name).is_dir() else shutil.copy
        copy(DROPZONE.parent / name, tmp_path / name)
    git = [machine.program("git", package="git"), "-C", tmp_path]
    for command in (["init", "--quiet"], ["add", "--all"]):
        subprocess.run([*git, *command], check=True)
    clean = {n: text for n, text in os.environ.items() if not n.startswith("DROPZONE_")}
    new_key = [sys.executable, tmp_path / "dropzone.py", "key", "new", "one", "--scope", "read"]
    subprocess.run(new_key, cwd=tmp_path, env=clean, check=True, timeout=PATIENCE)
    assert (tmp_path / "data" / "keys.toml").exists()
    for command in (["diff", "--name-only"], ["ls-files", "--others", "--exclude-standard"]):
        assert not subprocess.run([*git, *command], check=True, capture_output=True).stdout


def test_key_new_with_another_configuration(file: Path):
    """The key belongs to the data folder, whatever the configuration file is called."""
    other = file.with_name("other.toml")
    other.write_text("[raw]\ndir = 'elsewhere/raw'")
    done = run(file.parent, "--config", "other.toml", "key", "new", "a", "--scope", "read")
    assert done.returncode == 0
    assert 'name = "a"' in (file.parent / "elsewhere" / "keys.toml").read_text()
    assert run(file.parent, "--config", "other.toml", "key", "list").stdout == "a read\n"
    assert "a read" not in run(file.parent, "key", "list").stdout


def test_keys_made_at_once(file: Path):
    """Of keys that are made at the same time none is lost."""
    file.touch()
    names = [f"key-{number}" for number in range(6)]
    making = [
        subprocess.Popen(
            [sys.executable, DROPZONE, "key", "new", name, "--scope", "read"],
            cwd=file.parent,
            env={n: text for n, text in os.environ.items() if not n.startswith("DROPZONE_")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for name in names
    ]
    assert [process.wait(PATIENCE) for process in making] == [0] * len(names)
    listed = run(file.parent, "key", "list").stdout.splitlines()
    assert sorted(listed) == [f"{name} read" for name in names]


@pytest.mark.parametrize("text", ["[log]\nlevel = 'info'", "[[auth.keys]]\nname = 5", "x ="])
def test_file_of_keys_that_is_broken(file: Path, text: str):
    """A file of keys that holds anything else is refused by name, and so opens no API."""
    file.touch()
    kept(file).parent.mkdir()
    kept(file).write_text(text)
    for command in (("key", "list"), ("check",), ("--port", "0")):
        done = run(file.parent, *command)
        assert done.returncode == 78
        assert str(kept(file)) in done.stdout + done.stderr


def test_no_key_to_list(file: Path):
    """Where there is no key, `key list` says so, and what it means."""
    file.touch()
    assert "open to everyone" in run(file.parent, "key", "list").stdout
    jwt_section = f"[auth.jwt]\nissuer = '{ISSUER}'\naudience = 'x'\njwks = '/nowhere'"
    file.write_text(jwt_section)
    assert ISSUER in run(file.parent, "key", "list").stdout


@pytest.mark.parametrize("name", ["one", "api_key"])
def test_key_new_of_a_taken_name(file: Path, name: str):
    """A name that is taken is refused, and nothing changes."""
    file.write_text(table("one", "x", "read"))
    before = file.read_text()
    done = run(file.parent, "key", "new", name, "--scope", "read")
    assert (done.returncode, done.stdout) == (78, "")
    assert name in done.stderr
    assert file.read_text() == before


@pytest.mark.parametrize(
    "arguments",
    [("a b", "--scope", "read"), ('a"', "--scope", "read"), ("a", "--scope", "all"), ("a",)],
)
def test_key_new_of_no_key(file: Path, arguments: tuple[str, ...]):
    """A name that would not fit into a log line, and a key without a scope, are usage errors."""
    assert run(file.parent, "key", "new", *arguments).returncode == 2
    assert not file.exists()


def no_writes() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


@pytest.mark.parametrize(
    "options",
    [{"preexec_fn": no_writes}, {"variables": {"DROPZONE_AUTH_KEYS": json.dumps([])}}],
    ids=["full", "variable"],
)
def test_key_new_that_cannot_be_added(file: Path, options: dict[str, Any]):
    """Where the file cannot take a key, its table is printed to be pasted; the exit code is 73."""
    file.touch()
    kept(file).parent.mkdir()
    kept(file).write_text(table("hidden", "x", "read"))
    before = kept(file).read_text()
    done = run(file.parent, "key", "new", "a", "--scope", "read", **options)
    digest = hashlib.sha256(done.stdout.strip().encode()).hexdigest()
    assert done.returncode == 73, done.stderr
    assert f'hash = "sha256:{digest}"' in done.stderr
    assert str(kept(file)) in done.stderr
    assert kept(file).read_text() == before
    assert {path.name for path in kept(file).parent.iterdir()} == {"keys.toml"}


# ── Taking keys back ──────────────────────────────────────────────────────────────────────────────


async def test_key_revoke(file: Path, serve: Serve):
    """A key that is revoked is refused within seconds and for good; the others go on."""
    file.touch()
    keys = [
        run(file.parent, "key", "new", name, "--scope", "read").stdout.strip() for name in "abc"
    ]
    service = await serve(load_config(environ={}))
    assert (await service(x_api_key=keys[1]))[0] == 200
    done = run(file.parent, "key", "revoke", "b")
    assert done.returncode == 0, done.stderr
    assert "b was taken out of" in done.stdout
    assert 'action="key revoke"' in done.stderr
    await service.until(401, x_api_key=keys[1])
    for key in (keys[0], keys[2]):
        assert (await service(x_api_key=key))[0] == 200
    assert run(file.parent, "key", "list").stdout == "a read\nc read\n"
    assert run(file.parent, "key", "revoke", "b").returncode == 78


def test_key_revoke_of_the_last_key(file: Path):
    """The last key is not taken back, since without one the API would be open to everyone."""
    file.touch()
    run(file.parent, "key", "new", "one", "--scope", "read")
    done = run(file.parent, "key", "revoke", "one")
    assert (done.returncode, "last key" in done.stderr) == (78, True)
    assert run(file.parent, "key", "list").stdout == "one read\n"
    run(file.parent, "key", "new", "two", "--scope", "read")
    assert run(file.parent, "key", "revoke", "one").returncode == 0


@pytest.mark.parametrize(
    ("name", "variables", "place"),
    [
        ("in-file", {}, "config.toml"),
        ("api_key", {"DROPZONE_API_KEY": "sesam"}, "DROPZONE_API_KEY"),
        (
            "by-variable",
            {
                "DROPZONE_AUTH_KEYS": json.dumps(
                    [{"name": "by-variable", "hash": "sha256:" + "0" * 64, "scopes": ["read"]}]
                )
            },
            "DROPZONE_AUTH_KEYS",
        ),
    ],
)
def test_key_revoke_of_a_key_that_a_person_keeps(
    file: Path, name: str, variables: dict[str, str], place: str
):
    """Of a key that stands elsewhere `key revoke` says where to remove it, and changes nothing."""
    file.write_text(table("in-file", "one", "read"))
    before = file.read_text()
    done = run(file.parent, "key", "revoke", name, variables=variables)
    assert (done.returncode, done.stdout) == (73, "")
    assert place in done.stderr
    assert file.read_text() == before


# ── Rotation ──────────────────────────────────────────────────────────────────────────────────────


async def test_rotation(serve: Serve, file: Path, caplog: Any):
    """A key that is added to the file, or taken out of it, counts without a restart."""
    caplog.set_level(logging.INFO)
    file.write_text(table("old", "one", "read"))
    service = await serve(load_config(environ={}))
    replace(file, table("old", "one", "read") + table("new", "two", "read"))
    await service.until(200, x_api_key="two")
    assert (await service(x_api_key="one"))[0] == 200
    replace(file, table("new", "two", "read"))
    await service.until(401, x_api_key="one")
    assert (await service(x_api_key="two"))[0] == 200
    assert "two" not in caplog.text


async def test_a_new_key_counts_at_once(serve: Serve, file: Path):
    """A key that `key new` has made counts without a restart, also the first of all."""
    file.touch()
    service = await serve(load_config(environ={}))
    assert (await service())[0] == 200
    done = await asyncio.to_thread(run, file.parent, "key", "new", "one", "--scope", "read")
    await service.until(401)
    assert (await service(x_api_key=done.stdout.strip()))[0] == 200


async def test_another_data_folder_in_the_settings_takes_no_key_away(serve: Serve, file: Path):
    """Where raw.dir is changed for the next start, the keys of the folder in use go on to hold."""
    file.touch()
    key = run(file.parent, "key", "new", "one", "--scope", "read").stdout.strip()
    service = await serve(load_config(environ={}))
    replace(file, "[raw]\ndir = 'elsewhere/raw'\n" + table("two", "two", "read"))
    await service.until(200, x_api_key="two")
    assert (await service(x_api_key=key))[0] == 200


async def test_rotation_of_the_key_for_everything(serve: Serve, file: Path):
    """The key for everything is followed where it stands in .env, too."""
    env = file.with_name(".env")
    env.write_text("DROPZONE_API_KEY=one")
    service = await serve(load_config(environ={}))
    replace(env, "DROPZONE_API_KEY=two")
    await service.until(200, x_api_key="two")
    assert (await service(x_api_key="one"))[0] == 401


async def test_first_key_closes(serve: Serve, file: Path):
    """The first key closes an open API."""
    file.touch()
    service = await serve(load_config(environ={}))
    assert (await service())[0] == 200
    replace(file, table("first", "one", "read"))
    await service.until(401)
    assert (await service(x_api_key="one"))[0] == 200


@pytest.mark.parametrize(
    "text",
    [
        "[auth",
        "[auth]\nprot = 1",
        "",
        table("a", "one", "read") * 2,
        "[auth.jwt]\nissuer = 'x'",
        None,
    ],
    ids=["no TOML", "unknown setting", "empty", "a name twice", "half an issuer", "gone"],
)
async def test_broken_rotation(serve: Serve, file: Path, text: str | None, caplog: Any):
    """A new file that is broken, empty or gone is named in the log; the old keys stay."""
    file.write_text(table("a", "one", "read"))
    service = await serve(load_config(environ={}))
    file.unlink() if text is None else replace(file, text)
    async with asyncio.timeout(PATIENCE):
        while "what held before still holds" not in caplog.text:
            await asyncio.sleep(0.05)
    assert (await service(x_api_key="one"))[0] == 200
    assert (await service())[0] == 401
    replace(file, table("a", "two", "read"))
    await service.until(200, x_api_key="two")


async def test_other_changes(serve: Serve, file: Path, caplog: Any):
    """What else changed in the file is named, and waits for the next start."""
    file.write_text(table("a", "one", "read"))
    service = await serve(load_config(environ={}))
    replace(file, table("a", "two", "read") + "[server]\nport = 1234")
    await service.until(200, x_api_key="two")
    assert "[server] was changed: it takes effect at the next start" in caplog.text


# ── Tokens ────────────────────────────────────────────────────────────────────────────────────────

RSA = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
KINDS: dict[str, tuple[str, Any]] = {
    "RS256": ("rsa", RSA),
    "PS256": ("rsa", RSA),
    "ES256": ("ec", EC),
    "EdDSA": ("ed", ED),
}


def jwk(key: Any, kid: str, **more: str) -> dict[str, str]:
    """Return the public half of a key."""
    kinds: Any = {rsa.RSAPrivateKey: "RS256", ec.EllipticCurvePrivateKey: "ES256"}
    name = next((kinds[kind] for kind in kinds if isinstance(key, kind)), "EdDSA")
    algorithm: Any = jwt.get_algorithm_by_name(name)
    return algorithm.to_jwk(key.public_key(), as_dict=True) | {"kid": kid, **more}


def pem(key: Any) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, Public.SubjectPublicKeyInfo)


def claims(**changes: Any) -> dict[str, Any]:
    """Return good claims with some of them changed, or left out where None."""
    good: dict[str, Any] = {"iss": ISSUER, "aud": AUDIENCE, "sub": "robot", "scope": "read"}
    made = good | {"exp": int(time.time()) + 600} | changes
    return {name: value for name, value in made.items() if value is not None}


def token(kid: str | None = "rsa", algorithm: str = "RS256", key: Any = RSA, **changes: Any) -> str:
    headers = {"kid": kid} if kid else None
    return jwt.encode(claims(**changes), key, algorithm, headers=headers)


class Issuer:
    """An issuer that publishes its keys, counts who asks, and can fail or hang."""

    def __init__(self) -> None:
        self.keys = [jwk(RSA, "rsa"), jwk(EC, "ec", alg="ES256"), jwk(ED, "ed", use="sig")]
        self.asked = 0
        self.status = 200
        self.answering = asyncio.Event()
        self.answering.set()
        self.url = ""

    async def publish(self, _: web.Request) -> web.Response:
        self.asked += 1
        await self.answering.wait()
        return web.json_response({"keys": self.keys}, status=self.status)


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    made = Issuer()
    app = web.Application()
    app.router.add_get("/jwks", made.publish)
    async with TestServer(app, host="127.0.0.1") as server:
        made.url = str(server.make_url("/jwks"))
        yield made
        made.answering.set()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let keys be fetched without a pause, so that no test has to wait for it."""
    monkeypatch.setattr(dropzone, "FETCH_PAUSE", 0.0)


def trusting(jwks: object, **more: Any) -> JwtConfig:
    return JwtConfig(ISSUER, AUDIENCE, Place(jwks), **more)


@pytest.fixture
async def service(serve: Serve, config_of: Callable[..., Config], issuer: Issuer) -> Service:
    """A service that trusts the issuer, and has a key besides."""
    keys = (key_of("sensor", "one", "read"),)
    return await serve(config_of(jwt=trusting(issuer.url), keys=keys))


@pytest.mark.parametrize("algorithm", KINDS)
async def test_tokens(service: Service, algorithm: str):
    """A token of the issuer is let in by its scopes, and its subject is the caller."""
    kid, key = KINDS[algorithm]
    made = token(kid, algorithm, key)
    assert await service.token(made) == (200, "")
    assert await service.token(made, "/raw/x") == (404, "raw_id_unknown")
    status, problem, headers = await service("/process", "POST", Authorization=f"Bearer {made}")
    assert (status, problem["code"], problem["scope"]) == (403, "scope_missing", "process")
    assert "insufficient_scope" in headers["WWW-Authenticate"]
    assert service.callers == ["token:robot"] * 3
    assert (await service(x_api_key="one"))[0] == 200


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"scope": "ingest read process"}, 200),
        ({"scope": ["read"]}, 200),
        ({"scope": ["ingest", 5, None]}, 403),
        ({"scope": "readable"}, 403),
        ({"scope": ""}, 403),
        ({"scope": None}, 403),
        ({"scope": {"read": 1}}, 403),
        ({"scope": 5}, 403),
        ({"aud": ["other", AUDIENCE]}, 200),
        ({"aud": "other"}, 401),
        ({"aud": None}, 401),
        ({"iss": "https://issuer.example"}, 401),
        ({"iss": None}, 401),
        ({"exp": None}, 401),
        ({"exp": -60}, 401),
        ({"exp": "soon"}, 401),
        ({"exp": 1e999}, 401),
        ({"exp": -10}, 200),
        ({"nbf": 3600}, 401),
        ({"nbf": 10}, 200),
        ({"iat": 3600}, 401),
        ({"sub": 5}, 401),
    ],
    ids=str,
)
async def test_claims(service: Service, changes: dict[str, Any], status: int):
    """Issuer, audience, expiry and begin are checked, with a leeway; scopes are text or a list."""
    for name in {"exp", "nbf", "iat"} & changes.keys():
        if isinstance(changes[name], int):
            changes = {name: int(time.time()) + changes[name]}
    got, problem, headers = await service(Authorization=f"Bearer {token(**changes)}")
    assert got == status, problem
    if status == 401:
        assert problem["code"] == "token_invalid"
        assert headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


def forged(header: dict[str, Any], secret: bytes) -> str:
    """Return a token signed with HMAC, which no library would make of a public key."""
    parts = [json.dumps(part).encode() for part in (header, claims())]
    signed = b".".join(base64.urlsafe_b64encode(part).rstrip(b"=") for part in parts)
    digest = hmac.digest(secret, signed, "sha256") if secret else b""
    return (signed + b"." + base64.urlsafe_b64encode(digest).rstrip(b"=")).decode()


SECRETS = {
    "PEM": pem(RSA),
    "DER": RSA.public_key().public_bytes(Encoding.DER, Public.SubjectPublicKeyInfo),
    "JWK": json.dumps(jwk(RSA, "rsa")).encode(),
    "modulus": jwk(RSA, "rsa")["n"].encode(),
    "nothing": b"",
}


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("algorithm", ["HS256", "none", "None", "NONE", "", "hs256", None, 5])
@pytest.mark.parametrize("kind", ["address", "PEM"])
async def test_algorithm_confusion(
    service: Service, config_of: Any, serve: Serve, tmp_path: Path, algorithm: Any, secret: str,
    kind: str,
):  # fmt: skip
    """A token without a signature, or signed with the public key as a secret, is never let in."""
    if kind == "PEM":
        (tmp_path / "key.pem").write_bytes(pem(RSA))
        service = await serve(config_of(jwt=trusting(tmp_path / "key.pem")))
    header = {"typ": "JWT", "alg": algorithm, "kid": "rsa"}
    assert await service.token(forged(header, SECRETS[secret])) == (401, "token_invalid")


@pytest.mark.parametrize(
    "made",
    [
        token(key=OTHER),
        token("ec", "ES256", ec.generate_private_key(ec.SECP256R1())),
        token("ec"),
        token("ec", "EdDSA", ED),
        token("ed", "ES256", EC),
        token()[:-8] + "AAAAAAAA",
        token() + ".x",
        "..",
        "a.b.c",
        base64.urlsafe_b64encode(b"[" * 5000).decode().rstrip("=") + ".e30.x",
    ],
    ids=range(10),
)
async def test_wrong_tokens(service: Service, made: str):
    """A token with another's signature, another's kid or no form at all is 401, never an error."""
    status, code = await service.token(made)
    assert (status, code) in {(401, "token_invalid"), (401, "key_refused")}


@pytest.mark.usefixtures("no_pause")
async def test_symmetric_keys_are_not_taken(service: Service, issuer: Issuer):
    """A secret that an issuer publishes by mistake, or a key to encrypt with, opens nothing."""
    secret = "a-secret-that-is-long-enough-for-hs256"
    encoded = base64.urlsafe_b64encode(secret.encode()).decode().rstrip("=")
    issuer.keys += [
        {"kty": "oct", "kid": "oct", "k": encoded},
        {"kty": "oct", "kid": "oct-rs", "k": encoded, "alg": "RS256"},
        jwk(OTHER, "enc", use="enc"),
        {"kty": "unknown", "kid": "strange"},
    ]
    assert await service.token(token("oct", "HS256", secret)) == (401, "token_invalid")
    assert await service.token(token("oct-rs", "HS256", secret)) == (401, "token_invalid")
    assert await service.token(token("enc", key=OTHER)) == (401, "token_invalid")
    assert await service.token(token()) == (200, "")


async def test_names(serve: Serve, config_of: Callable[..., Config], issuer: Issuer):
    """The caller is the subject or the client, by its kind; scopes may be in another claim."""
    service = await serve(config_of(jwt=trusting(issuer.url, scope_claim="scp")))
    for changes in (
        {"sub": None, "azp": "app"},
        {"sub": None, "client_id": "app"},
        {"sub": "app", "azp": "other"},
        {"sub": None},
        {"sub": None, "azp": 5, "client_id": ["app"]},
        {"sub": "cli:root"},
        {"sub": "a\nb\x1b[0m\ud800%"},
        {"sub": "ö" * 128},
    ):
        assert await service.token(token(scp="read", **changes)) == (200, "")
    odd = "token:a%0Ab%1B[0m%ED%A0%80%25"
    named = ["client:app", "client:app", "token:app", "token:", "token:", "token:cli:root", odd]
    assert service.callers == [*named, "token:" + "ö" * 128]


async def test_a_token_that_is_named_like_a_key(
    serve: Serve, config_of: Callable[..., Config], jwks_file: Path, caplog: Any
):
    """A token never passes for a key or a person: not in their limits, nor in the audits."""
    caplog.set_level(logging.INFO)
    keys = (key_of("gateway-7", "one", "process"),)
    config = config_of(jwt=trusting(jwks_file), keys=keys)
    limited = msgspec.structs.replace(config, limits=LimitsConfig(per_key=Rate("2/hour")))
    service = await serve(limited)
    for name in ("gateway-7", "cli:root", "key:gateway-7"):
        bearer = f"Bearer {token(sub=name, scope='process')}"
        statuses = [(await service("/process", "POST", Authorization=bearer))[0] for _ in range(3)]
        assert statuses == [200, 200, 429]
    assert (await service("/process", "POST", x_api_key="one"))[0] == 200
    audits = [record for record in caplog.records if record.name == "dropzone.audit"]
    callers = [each.facts["caller"] for each in audits]  # type: ignore[attr-defined]
    named = [f"token:{name}" for name in ("gateway-7", "cli:root", "key:gateway-7") for _ in "ab"]
    assert callers == [*named, "key:gateway-7"]


def test_long_names():
    """A long name is cut, and still that of nobody else."""
    long = dropzone.name_of({"sub": "a" * 5000})
    assert (len(long), long[:20]) == (len("token:") + 128, "token:" + "a" * 14)
    assert long != dropzone.name_of({"sub": "a" * 5001})
    assert long != dropzone.name_of({"sub": long.removeprefix("token:")})


@given(st.lists(st.text(st.characters(exclude_categories=[])), min_size=2, max_size=2, unique=True))
def test_no_two_names_are_one(names: list[str]):
    """Two subjects are two callers, whatever they are made of, and each fits on a line."""
    one, other = (dropzone.name_of({"sub": name}) for name in names)
    assert one != other
    assert one.isprintable()
    one.encode()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(parts=st.lists(st.binary(max_size=40) | st.from_regex(rb'\{"alg":.*\}'), min_size=3))
def test_any_token(parts: list[bytes], jwks_file: Path):
    """Whatever looks like a token is judged to be none, and raises nothing else."""
    text = ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts[:3])
    tokens = dropzone.Tokens(trusting(jwks_file))
    with pytest.raises(dropzone.DropzoneError) as caught:
        asyncio.run(tokens.judge(text))
    assert caught.value.status == 401


# ── Where the keys of an issuer come from ─────────────────────────────────────────────────────────


@pytest.fixture
def jwks_file(tmp_path: Path) -> Path:
    made = tmp_path / "jwks.json"
    made.write_text(json.dumps({"keys": [jwk(RSA, "rsa"), jwk(EC, "ec")]}))
    return made


@pytest.mark.usefixtures("no_pause")
async def test_keys_are_kept(service: Service, issuer: Issuer):
    """The keys are fetched once, at the start, however many tokens come."""
    for number in range(20):
        assert await service.token(token(sub=f"device-{number % 10}")) == (200, "")
    assert issuer.asked == 1


async def test_expiry_of_a_known_token(service: Service, monkeypatch: pytest.MonkeyPatch):
    """A token that was let in before is refused once it has expired, and its leeway is over."""
    monkeypatch.setattr(dropzone, "LEEWAY", 0)
    made = token(exp=int(time.time()) + 5)
    assert await service.token(made) == (200, "")
    async with asyncio.timeout(PATIENCE):
        while await service.token(made) != (401, "token_invalid"):
            await asyncio.sleep(0.05)


async def test_many_tokens(service: Service, monkeypatch: pytest.MonkeyPatch):
    """However many tokens come, each is judged right, and known ones do not pile up."""
    monkeypatch.setattr(dropzone, "TOKENS_KEPT", 3)
    made = {name: token(sub=name, scope="read" if name < "e" else "ingest") for name in "abcdefgh"}
    for _ in range(2):
        for name, each in made.items():
            assert (await service.token(each))[0] == (200 if name < "e" else 403)
    assert service.callers == [f"token:{name}" for name in made] * 2
    assert len(service.client.app[dropzone.GUARD].tokens._judged) <= 3  # noqa: SLF001


@pytest.mark.usefixtures("no_pause")
async def test_new_key_of_the_issuer(service: Service, issuer: Issuer):
    """A key that the issuer has made since is fetched for the first token that names it."""
    issuer.keys = [jwk(OTHER, "other")]
    assert await service.token(token("other", key=OTHER)) == (200, "")
    assert await service.token(token()) == (401, "token_invalid")


@pytest.mark.usefixtures("no_pause")
async def test_the_only_key_of_the_issuer(serve: Serve, config_of: Any, issuer: Issuer):
    """Where the issuer has one key, a token need not name it, and costs no further fetch."""
    issuer.keys = issuer.keys[:1]
    service = await serve(config_of(jwt=trusting(issuer.url)))
    assert await service.token(token(None)) == (200, "")
    assert issuer.asked == 1
    assert await service.token(token("other")) == (401, "token_invalid")


@pytest.mark.usefixtures("no_pause")
async def test_withdrawn_key_of_a_known_token(service: Service, issuer: Issuer):
    """A token that was let in is refused as soon as its key is known to be withdrawn."""
    made = token()
    assert [await service.token(made) for _ in range(2)] == [(200, "")] * 2
    issuer.keys = [jwk(OTHER, "other")]
    assert await service.token(token("other", key=OTHER)) == (200, "")
    assert await service.token(made) == (401, "token_invalid")


async def test_unknown_keys_are_not_fetched_each(service: Service, issuer: Issuer):
    """However many keys are made up, the issuer is not asked for each."""
    made = [token(f"made-up-{number}") for number in range(50)]
    found = await asyncio.gather(*map(service.token, made))
    assert set(found) == {(401, "token_invalid")}
    assert issuer.asked <= 2


async def test_withdrawn_key(service: Service, issuer: Issuer, monkeypatch: pytest.MonkeyPatch):
    """A key that the issuer has withdrawn is missed after some minutes."""
    issuer.keys = issuer.keys[1:]
    assert await service.token(token()) == (200, "")
    monkeypatch.setattr(dropzone, "KEYS_LIFE", 0.0)
    assert await service.token(token()) == (401, "token_invalid")


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("trouble", ["status", "hangs", "no keys", "no JSON"])
async def test_issuer_in_trouble(
    serve: Serve, config_of: Any, issuer: Issuer, trouble: str, monkeypatch: pytest.MonkeyPatch
):
    """Tokens that cannot be judged are to be tried again; known issuer keys and our own go on."""
    keys = (key_of("sensor", "one", "read"),)
    service = await serve(config_of(jwt=trusting(issuer.url), keys=keys))
    monkeypatch.setattr(dropzone, "FETCH_PATIENCE", 0.2)
    issuer.status = 503 if trouble == "status" else 200
    issuer.keys = {"no keys": [], "no JSON": "x"}.get(trouble, issuer.keys)  # type: ignore[assignment]
    if trouble == "hangs":
        issuer.answering.clear()
    header = {"Authorization": f"Bearer {token('newer')}"}
    status, problem, headers = await service(**header)
    assert (status, problem["code"]) == (503, "issuer_unavailable")
    assert headers["Retry-After"].isdigit()
    assert await service.token(token()) == (200, "")
    assert (await service(x_api_key="one"))[0] == 200
    issuer.status, issuer.keys = 200, [jwk(RSA, "newer")]
    issuer.answering.set()
    assert (await service(**header))[0] == 200


async def test_issuer_that_is_not_there(serve: Serve, config_of: Any, caplog: Any):
    """The service starts without its issuer, and the log says so; tokens are to be tried again."""
    service = await serve(config_of(jwt=trusting(f"http://127.0.0.1:{unused_port()}/jwks")))
    assert await service.token(token()) == (503, "issuer_unavailable")
    assert "auth.jwt.jwks" in caplog.text
    assert (await service("/health"))[0] == 200


async def test_redirects_are_not_followed(serve: Serve, config_of: Any, issuer: Issuer):
    """Keys are taken from the configured address alone."""
    app = web.Application()

    async def lead(_: web.Request) -> web.Response:
        raise web.HTTPFound(issuer.url)

    app.router.add_get("/", lead)
    async with TestServer(app, host="127.0.0.1") as server:
        service = await serve(config_of(jwt=trusting(server.make_url("/"))))
        assert await service.token(token()) == (503, "issuer_unavailable")
    assert issuer.asked == 0


async def test_key_files(serve: Serve, config_of: Any, tmp_path: Path, jwks_file: Path):
    """The keys may lie in a JWKS file or a PEM file, where no kid is needed."""
    service = await serve(config_of(jwt=trusting(jwks_file)))
    assert await service.token(token("ec", "ES256", EC)) == (200, "")
    assert await service.token(token(None)) == (401, "token_invalid")  # which of the two?
    (tmp_path / "key.pem").write_bytes(pem(ED))
    service = await serve(config_of(jwt=trusting(tmp_path / "key.pem")))
    for kid in (None, "any"):
        assert await service.token(token(kid, "EdDSA", ED)) == (200, "")
    assert await service.token(token(None, "RS256", RSA)) == (401, "token_invalid")


async def test_key_file_that_changes(serve: Serve, file: Path, tmp_path: Path):
    """A key file that changes is read again."""
    (tmp_path / "key.pem").write_bytes(pem(RSA))
    auth = f"[auth.jwt]\nissuer = '{ISSUER}'\naudience = '{AUDIENCE}'\njwks = 'key.pem'"
    file.write_text(auth)
    service = await serve(load_config(environ={}))
    new = {"Authorization": f"Bearer {token(key=OTHER)}"}
    assert (await service(**new))[0] == 401
    replace(tmp_path / "key.pem", pem(OTHER).decode())
    await service.until(200, **new)


async def test_another_issuer(serve: Serve, file: Path, tmp_path: Path):
    """An issuer that takes the place of another in the file counts without a restart."""
    (tmp_path / "key.pem").write_bytes(pem(RSA))
    auth = f"[auth.jwt]\naudience = '{AUDIENCE}'\njwks = 'key.pem'\nissuer = "
    file.write_text(f"{auth}'{ISSUER}'")
    service = await serve(load_config(environ={}))
    assert await service.token(token()) == (200, "")
    replace(file, f"{auth}'https://other.example'")
    await service.until(200, Authorization=f"Bearer {token(iss='https://other.example')}")
    assert await service.token(token()) == (401, "token_invalid")


@pytest.mark.parametrize(
    ("jwt_config", "named"),
    [
        (JwtConfig(issuer=ISSUER), "audience and jwks"),
        (JwtConfig(ISSUER, "", Place("keys.json")), "audience"),
        (JwtConfig(jwks=Place("keys.json")), "issuer and audience"),
        (trusting("http://issuer.example/jwks"), "https"),
        (trusting("http://127.0.0.1.example/jwks"), "https"),
        (trusting("http://localhost:80@issuer.example/jwks"), "https"),
        (trusting("ftp://127.0.0.1/jwks"), "https"),
    ],
)
def test_wrong_settings(config_of: Any, jwt_config: JwtConfig, named: str):
    """An issuer that is half described, or whose keys could be altered on their way, is refused."""
    with pytest.raises(ConfigError, match=named):
        create_app(config_of(jwt=jwt_config))


BROKEN_KEYS = ["", "{}", '{"keys": []}', '{"keys": 5}', "-----BEGIN PUBLIC KEY-----\nx", "\xff"]


@pytest.mark.parametrize("content", BROKEN_KEYS)
async def test_broken_key_file(serve: Serve, config_of: Any, tmp_path: Path, content: str):
    """A key file without a key is named in the log, and tokens are to be tried again."""
    (tmp_path / "keys").write_text(content)
    service = await serve(config_of(jwt=trusting(tmp_path / "keys")))
    assert await service.token(token()) == (503, "issuer_unavailable")


async def checked(folder: Path, jwks: object) -> "subprocess.CompletedProcess[str]":
    """Run `check` with an issuer whose keys lie somewhere."""
    text = f"[auth.jwt]\nissuer = '{ISSUER}'\naudience = '{AUDIENCE}'\njwks = '{jwks}'"
    (folder / "config.toml").write_text(text)
    return await asyncio.to_thread(run, folder, "check")


async def test_check_is_content_with_an_issuer(file: Path, issuer: Issuer, jwks_file: Path):
    """`check` fetches the keys of the issuer, once, from its address or from a file."""
    for place in (issuer.url, jwks_file, "jwks.json"):
        done = await checked(file.parent, place)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert "ok     keys" in done.stdout
    assert issuer.asked == 1


@pytest.mark.parametrize("content", [None, *BROKEN_KEYS])
async def test_check_names_a_key_file_without_keys(file: Path, content: str | None):
    """A key file that is missing or broken is wrong for `check`, which names it, once."""
    path = file.parent / "keys.json"
    if content is not None:
        path.write_text(content)
    done = await checked(file.parent, "keys.json")
    assert done.returncode == 78
    [line] = [line for line in (done.stdout + done.stderr).splitlines() if str(path) in line]
    assert line.startswith("wrong  keys: auth.jwt.jwks: ")


@pytest.mark.parametrize("trouble", ["away", "status", "hangs", "no keys"])
async def test_check_names_an_issuer_in_trouble(file: Path, issuer: Issuer, trouble: str):
    """An issuer that cannot be reached, fails or has no keys is wrong for `check`, in seconds."""
    issuer.status = 503 if trouble == "status" else 200
    issuer.keys = [] if trouble == "no keys" else issuer.keys
    if trouble == "hangs":
        issuer.answering.clear()
    url = f"http://127.0.0.1:{unused_port()}/jwks" if trouble == "away" else issuer.url
    done = await checked(file.parent, url)
    assert done.returncode == 78
    assert f"wrong  keys: auth.jwt.jwks: {url} gives no keys: " in done.stdout
    assert "ok     TLS" in done.stdout


WEAK = base64.urlsafe_b64encode(b"\xff" * 32).decode().rstrip("=")
HUGE = base64.urlsafe_b64encode(b"\xff" * 300_000).decode().rstrip("=")
ODD_KEYS: dict[str, Any] = {
    "no key": [None, 5, "x", [], {}, True],
    "kid": [jwk(RSA, "") | {"kid": kid} for kid in (["a"], {}, 5, "", "\ud800")],
    "kty": [{"kty": kty} for kty in ([], None, "RSA", "EC", "OKP", "oct", "x")],
    "alg": [jwk(RSA, "rsa") | {"alg": alg} for alg in (["RS256"], {}, 5, "none", "RSA-OAEP")],
    "use": [jwk(RSA, "rsa") | {"use": use} for use in (["sig"], 5, "enc")],
    "RSA": [jwk(RSA, "rsa") | {"n": n} for n in (None, 5, "", "*", "AQAB", WEAK, HUGE)],
    "exponent": [jwk(RSA, "rsa") | {"e": e} for e in (None, "AQ", "BA", HUGE)],
    "EC": [jwk(EC, "rsa") | {"x": x} for x in (None, 5, "AA", WEAK)],
    "curve": [jwk(EC, "rsa") | {"crv": crv} for crv in ([], "P-999", "secp256k1")],
    "OKP": [jwk(ED, "rsa") | {"x": x} for x in (None, "AA", WEAK)],
    "another key of that kid": [jwk(OTHER, "rsa"), jwk(EC, "rsa"), jwk(ED, "rsa")],
    "the same key twice": [jwk(RSA, "rsa")],
    "a key without a kid": [{n: v for n, v in jwk(OTHER, "").items() if n != "kid"}],
}
ODD_TEXTS = ('{"kid":1e999}', '{"kid":"\\ud800"}', "1e400", "NaN")


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("kind", ODD_KEYS)
@pytest.mark.parametrize("first", [True, False])
async def test_odd_keys(
    serve: Serve, config_of: Any, issuer: Issuer, kind: str, caplog: Any, *, first: bool
):
    """A key that makes no sense is left out, at the start or later, and the others hold."""
    caplog.set_level(logging.DEBUG)
    good, odd = issuer.keys, ODD_KEYS[kind]
    issuer.keys = odd + good if first else good + odd
    service = await serve(config_of(jwt=trusting(issuer.url)))
    made = [token(), token("ec", "ES256", EC), token("ed", "EdDSA", ED)]
    assert [await service.token(each) for each in made] == [(200, "")] * 3
    issuer.keys = [*issuer.keys, jwk(RSA, "newer")]
    made += [token("newer"), token()]
    assert [await service.token(each) for each in made] == [(200, "")] * 5
    assert await service.token(token("unknown")) == (401, "token_invalid")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("odd", ODD_TEXTS)
async def test_odd_text_of_a_key(serve: Serve, config_of: Any, jwks_file: Path, odd: str):
    """So it is with an entry that a strict reader of JSON stumbles over."""
    text = jwks_file.read_text()
    jwks_file.write_text(text.replace("[{", f"[{odd}, {{", 1))
    service = await serve(config_of(jwt=trusting(jwks_file)))
    assert await service.token(token()) == (200, "")


class Peculiar:
    """An issuer that speaks no proper HTTP: it answers as one of `ANSWERS` and counts the bytes."""

    def __init__(self) -> None:
        self.answer, self.asked, self.sent = "good", 0, 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.asked += 1
        try:
            await reader.readuntil(b"\r\n\r\n")
            beginning, endless, pause = ANSWERS[self.answer]
            writer.write(beginning)
            while endless:
                writer.write(endless)
                self.sent += len(endless)
                await writer.drain()
                await asyncio.sleep(pause)
        except ConnectionError:
            pass
        finally:
            writer.close()


def answer_of(text: bytes, *headers: bytes) -> bytes:
    length = b"Content-Length: %d" % len(text)
    return b"\r\n".join([b"HTTP/1.1 200 OK", *(headers or [length]), b"", text])


def zeros(size: int) -> bytes:
    """Return so many zeros, compressed."""
    return gzip.compress(bytes(size), 9)


GOOD = json.dumps({"keys": [jwk(RSA, "rsa")]}).encode()
CHUNKED = b"Transfer-Encoding: chunked"
ANSWERS: dict[str, tuple[bytes, bytes, float]] = {  # what begins it, goes on for ever, and how fast
    "good": (answer_of(GOOD), b"", 0),
    "endless": (answer_of(b"", b"X: y"), b" " * 65_536, 0),
    "endless chunks": (answer_of(b"", CHUNKED), b"10000\r\n" + b" " * 65_536 + b"\r\n", 0),
    "a lie of a length": (answer_of(b"", b"Content-Length: 99999999999"), b"1" * 65_536, 0),
    "a drip": (answer_of(b"", b"Content-Length: 1000"), b" ", 0.01),
    "a drip of a head": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", 0.01),
    "an endless head": (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 1000, 0),
    "endless promises": (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 10, 0.01),
    "a bomb": (answer_of(zeros(100 << 20), b"Content-Encoding: gzip"), b"", 0),
    "half a key": (answer_of(GOOD, b"Content-Length: 5000"), b"", 0),
    "a redirect": (b"HTTP/1.1 302 Found\r\nLocation: /jwks\r\nContent-Length: 0\r\n\r\n", b"", 0),
    "depth": (answer_of(b"[" * 100_000), b"", 0),
    "a key too deep": (answer_of(b'{"keys":[' + b"[" * 100_000 + b"]" * 100_000 + b"]}"), b"", 0),
    "odd keys alone": (answer_of(b'{"keys":[5, {"kid": ["a"]}]}'), b"", 0),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.6\r\n", b"", 0),
}


@pytest.fixture
async def peculiar() -> AsyncIterator[Peculiar]:
    made = Peculiar()
    server = await asyncio.start_server(made.serve, "127.0.0.1")
    async with server:
        [host, port] = server.sockets[0].getsockname()
        made.url = f"http://{host}:{port}/jwks"
        yield made


@pytest.mark.parametrize("answer", [name for name in ANSWERS if name != "good"])
async def test_peculiar_issuer(
    serve: Serve, config_of: Any, peculiar: Peculiar, answer: str, monkeypatch: pytest.MonkeyPatch
):
    """Whatever an issuer answers, known keys hold, and it is asked once in a while."""
    monkeypatch.setattr(dropzone, "FETCH_PATIENCE", 0.5)
    service = await serve(config_of(jwt=trusting(peculiar.url)))
    peculiar.answer = answer
    monkeypatch.setattr(dropzone, "KEYS_LIFE", 0.0)
    assert await service.token(token()) == (200, "")
    monkeypatch.setattr(dropzone, "KEYS_LIFE", 600.0)
    assert peculiar.asked == 2
    found = await asyncio.gather(*(service.token(token(f"made-up-{n}")) for n in range(20)))
    assert set(found) == {(503, "issuer_unavailable")}
    assert await service.token(token()) == (200, "")
    assert peculiar.asked == 2


@pytest.mark.parametrize("answer", ["endless", "endless chunks", "a lie of a length", "a bomb"])
async def test_endless_answers(
    serve: Serve, config_of: Any, peculiar: Peculiar, answer: str, caplog: Any
):
    """An answer that has no end is given up after a megabyte, not when the time is over."""
    peculiar.answer = answer
    await serve(config_of(jwt=trusting(peculiar.url)))
    assert "gives no keys: it has more than 1048576 bytes" in caplog.text
    assert peculiar.sent < 16 << 20  # the system's buffers take what is not read


@pytest.mark.parametrize("answer", ["endless", "depth", "odd keys alone", "a drip"])
async def test_peculiar_issuer_at_the_start(
    serve: Serve, config_of: Any, peculiar: Peculiar, answer: str, monkeypatch: pytest.MonkeyPatch
):
    """Whatever an issuer answers, the service starts, and asks again after a while alone."""
    monkeypatch.setattr(dropzone, "FETCH_PATIENCE", 0.5)
    peculiar.answer = answer
    service = await serve(config_of(jwt=trusting(peculiar.url)))
    for _ in range(5):
        assert await service.token(token()) == (503, "issuer_unavailable")
    assert peculiar.asked == 1
    peculiar.answer = "good"
    monkeypatch.setattr(dropzone, "FETCH_PAUSE", 0.0)
    assert await service.token(token()) == (200, "")


async def test_an_endless_key_file(serve: Serve, config_of: Any):
    """Of a file, too, no more is read than keys can be."""
    service = await serve(config_of(jwt=trusting("/dev/zero")))
    assert await service.token(token()) == (503, "issuer_unavailable")


async def test_private_key_is_no_key_file(serve: Serve, config_of: Any, tmp_path: Path):
    """A private key in the place of the public one is not taken, so that it is noticed."""
    private = RSA.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "keys").write_bytes(private)
    service = await serve(config_of(jwt=trusting(tmp_path / "keys")))
    assert await service.token(token()) == (503, "issuer_unavailable")


def test_the_library_is_imported_when_needed():
    """Without an issuer, PyJWT and its cryptography are not even imported."""
    code = (
        "import sys, dropzone; dropzone.create_app(dropzone.Config());"
        "sys.exit(bool({'jwt', 'cryptography'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=DROPZONE.parent, timeout=PATIENCE)


async def test_no_secret_is_logged(service: Service, caplog: Any):
    """Neither keys nor tokens, right or wrong, are in the log or in an answer."""
    caplog.set_level(logging.DEBUG)
    made = [token(), token(key=OTHER), token("made-up"), "dz_wrong", "one"]
    for each in made:
        _, document, _ = await service(Authorization=f"Bearer {each}")
        assert each not in json.dumps(document)
    lines = [record.getMessage() for record in caplog.records]
    assert lines
    assert not any(
        each in line.split() or each[-20:] in line for each in made[:4] for line in lines
    )
