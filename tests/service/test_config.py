"""`load_config`: where each setting comes from, and what happens to what is no setting."""

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from dropzone import Config, ConfigError, Secret, load_config

REPO = Path(__file__).parents[2]
SECRET = "hunter2-correct-horse"
URL = f"postgresql://dropzone:{SECRET}@db.example/dropzone"
NO_VARIABLES: Mapping[str, str] = {}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, where empty files hide those that lie beside the program."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "config.toml", "")
    write(tmp_path / ".env", "")
    return tmp_path


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")
    return file


def settings_of(section: object, prefix: str = "") -> dict[str, object]:
    """Return every setting of a configuration by its name in the file, secrets in plain text."""
    found: dict[str, object] = {}
    for field in msgspec.structs.fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if isinstance(value, msgspec.Struct):
            found |= settings_of(value, f"{name}.")
        else:
            found[name] = value.reveal() if isinstance(value, Secret) else value
    return found


def flat(table: dict[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in table.items():
        is_table = isinstance(value, dict)
        found |= flat(value, f"{prefix}{key}.") if is_table else {f"{prefix}{key}": value}
    return found


def refusal(environ: Mapping[str, str] = NO_VARIABLES, **arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(environ=environ, **arguments)
    return str(caught.value)


# ── Precedence ────────────────────────────────────────────────────────────────────────────────────


def test_precedence(here: Path):
    """The command line goes before the environment, that before .env, the file and the default."""
    command_line = {("server", "port"): 5}
    variables = {"DROPZONE_SERVER_PORT": "4"}

    assert load_config(environ={}).server.port == 8080
    write(here / "config.toml", "[server]\nport = 2")
    assert load_config(environ={}).server.port == 2
    write(here / ".env", "DROPZONE_SERVER_PORT=3")
    assert load_config(environ={}).server.port == 3
    assert load_config(environ=variables).server.port == 4
    assert load_config(environ=variables, overrides=command_line).server.port == 5
    assert load_config(environ={}, overrides=command_line).server.port == 5


def test_sources_are_merged(here: Path):
    """Each setting is looked up by itself: a source that has one setting hides no other."""
    write(here / "config.toml", "[server]\nhost = 'file'\nport = 2")
    write(here / ".env", "DROPZONE_LOG_LEVEL=debug")

    config = load_config(environ={"DROPZONE_PROCESS_BATCH": "7"}, overrides={("server", "port"): 5})

    assert (config.server.host, config.server.port) == ("file", 5)
    assert (config.log.level, config.process.batch) == ("debug", 7)


def test_environment_of_the_process(monkeypatch: pytest.MonkeyPatch):
    """Without an argument, the environment is that of the process."""
    monkeypatch.setenv("DROPZONE_SERVER_PORT", "1234")

    assert load_config().server.port == 1234


def test_other_variables_and_files_do_not_count(here: Path):
    """A variable without the prefix is none of Dropzone's business."""
    write(here / ".env", "SERVER_PORT=1\nPORT=2\ndropzone_server_port=3")

    assert load_config(environ={"PORT": "4", "API_KEY": "x"}).server.port == 8080


SPECIAL = {
    "auth.keys": "[]",
    "limits.per_key": "77/second",
    "limits.per_address": "77/second",
    "log.format": "json",
    "log.level": "debug",
    "log.requests": "true",
    "raw.archive": "file:///mnt/archive",
    "raw.compact": "true",
    "server.cors_origins": "https://one.example,http://two.example:8080",
    "storage.backend": "memory",
    "transform.nulls": "skip",
    "transform.not_before": "2020-01-01T00:00:00Z",
}


@pytest.mark.parametrize("setting", settings_of(Config()))
def test_every_setting_has_a_variable(setting: str, here: Path):
    """Any setting can be set by DROPZONE_<SECTION>_<KEY>, with the same effect as in the file."""
    variable = "DROPZONE_" + setting.replace(".", "_").upper()
    text = SPECIAL.get(setting, "77")
    number = isinstance(settings_of(Config())[setting], int | tuple)  # or a bool

    by_variable = settings_of(load_config(environ={variable: text}))
    if setting == "server.cors_origins":
        text = str(text.split(","))
    write(here / "config.toml", f"{setting} = {text}" if number else f"{setting} = '{text}'")

    assert settings_of(load_config(environ={})) == by_variable
    assert by_variable[setting] in {
        77,
        "77",
        here / "77",
        str(here / "77"),
        (),
        True,
        datetime(2020, 1, 1, tzinfo=UTC),
        *SPECIAL.values(),
        ("https://one.example", "http://two.example:8080"),
    }


@pytest.mark.parametrize("short", ["DROPZONE_API_KEY", "DROPZONE_AUTH_API_KEY"])
@pytest.mark.parametrize("long", ["DROPZONE_API_KEY", "DROPZONE_AUTH_API_KEY"])
def test_short_names_have_the_rank_of_their_source(short: str, long: str, here: Path):
    """A setting with two names comes from the better source, by whichever name it is there."""
    write(here / ".env", f"{short}=from-file")

    assert (
        load_config(environ={long: "from-environment"}).auth.api_key.reveal() == "from-environment"
    )


@pytest.mark.parametrize(
    "name", ["DROPZONE_SERVER_PORT", "DROPZONE_DATABASE_URL", "DROPZONE_BACKEND", "DROPZONE_CONFIG"]
)
def test_empty_variables(name: str, here: Path):
    """A variable that is set to nothing is as good as none: the next source counts, and wholly."""
    write(here / "other.toml", "[server]\nport = 9")
    values = {"PORT": "5", "URL": URL, "BACKEND": "memory", "CONFIG": "other.toml"}
    write(here / ".env", f"{name}={values[name.rpartition('_')[2]]}")

    assert settings_of(load_config(environ={name: ""})) == settings_of(load_config(environ={}))
    assert load_config(environ={"DROPZONE_NONSENSE": ""})


# ── Which file ────────────────────────────────────────────────────────────────────────────────────


def test_config_file_by_argument_variable_or_place(here: Path):
    """The file is the argument, or what DROPZONE_CONFIG names, or config.toml where one works."""
    for port, name in enumerate(["config.toml", "by-variable.toml", "by-argument.toml"], 1):
        write(here / name, f"[server]\nport = {port}")
    variable = {"DROPZONE_CONFIG": "by-variable.toml"}

    assert load_config(environ={}).server.port == 1
    assert load_config(environ=variable).server.port == 2
    assert load_config("by-argument.toml", environ=variable).server.port == 3
    assert load_config(here / "by-argument.toml", environ={}).server.port == 3
    write(here / ".env", "DROPZONE_CONFIG=by-variable.toml")
    assert load_config(environ={}).server.port == 2
    assert load_config(environ={"DROPZONE_CONFIG": "by-argument.toml"}).server.port == 3


def test_missing_file_that_was_asked_for(here: Path):
    """A file that is asked for and missing, or a folder, is an error that names it."""
    (here / "folder").mkdir()

    assert "nowhere.toml" in refusal(path="nowhere.toml")
    assert "nowhere.toml" in refusal({"DROPZONE_CONFIG": "nowhere.toml"})
    assert "folder" in refusal(path=here / "folder")


@pytest.mark.parametrize(
    "content",
    [b"[server", b"port 1", b"a = 1\na = 2", b"[server]\nhost = '\xff'", b"\xff\xfe", b"\0"],
)
def test_file_that_is_no_toml(content: bytes, here: Path):
    """A file that is no TOML, or no UTF-8, is an error that names it."""
    (here / "broken.toml").write_bytes(content)

    assert "broken.toml" in refusal(path="broken.toml")


def test_env_file_that_is_no_text(here: Path):
    """An .env that is no UTF-8 is an error that names it."""
    (here / ".env").write_bytes(b"DROPZONE_API_KEY=\xff\n")

    assert ".env" in refusal()


# ── A program that lies elsewhere ─────────────────────────────────────────────────────────────────

SHOW = """
import dropzone
config = dropzone.load_config(environ={})
print(config.server.port, config.raw.dir, config.storage.sqlite.path)
"""


@pytest.fixture
def program(here: Path) -> Path:
    """A copy of the program, alone in a folder; the working directory is empty."""
    for name in ("config.toml", ".env"):
        (here / name).unlink()
    (here / "cwd").mkdir()
    shutil.copytree(REPO / "backends", here / "program" / "backends")
    shutil.copy(REPO / "dropzone.py", here / "program")
    return here / "program"


def shown_by(program: Path, code: str = SHOW) -> list[str]:
    environ = {"PYTHONPATH": str(program), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=program.parent / "cwd",
        env=environ,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()


def test_files_beside_the_program(program: Path):
    """With no config.toml and .env where one works, those beside the program count."""
    write(program / "config.toml", "[raw]\ndir = 'r'")
    write(program / ".env", "DROPZONE_SERVER_PORT=9\nDROPZONE_STORAGE_SQLITE_PATH=s")

    assert shown_by(program) == ["9", str(program / "r"), str(program / "s")]

    write(program.parent / "cwd" / "config.toml", "[server]\nport = 10")
    write(program.parent / "cwd" / ".env", "DROPZONE_RAW_DIR=q")
    assert shown_by(program)[:2] == ["10", str(program.parent / "cwd" / "q")]


def test_without_any_file(program: Path):
    """With no file at all the defaults hold, and their paths count from the working directory."""
    cwd = program.parent / "cwd"

    assert shown_by(program) == ["8080", str(cwd / "data/raw"), str(cwd / "data/dropzone.sqlite")]


def test_config_file_named_beside_the_program(program: Path):
    """A file that .env names is looked for in the folder of that .env."""
    write(program / "other.toml", "[server]\nport = 9")
    write(program / ".env", "DROPZONE_CONFIG=other.toml")

    assert shown_by(program)[0] == "9"


def test_import_has_no_effect(program: Path):
    """Importing and making an application write no file, start no thread and touch no logging."""
    before_and_after = """
import logging, os, signal, sys, threading
before = (threading.active_count(), dict(os.environ), signal.getsignal(signal.SIGTERM))
import dropzone
app = dropzone.create_app(dropzone.load_config(environ={}))
after = (threading.active_count(), dict(os.environ), signal.getsignal(signal.SIGTERM))
assert before == after, (before, after)
loggers = [logging.getLogger(name) for name in (None, "dropzone", "backends", "aiohttp")]
assert not any(logger.handlers for logger in loggers)
assert not {"asyncpg", "backends.postgres"} & sys.modules.keys()
assert not os.listdir("."), os.listdir(".")
"""
    files = sorted(program.rglob("*"))

    assert shown_by(program, before_and_after) == []
    assert sorted(program.rglob("*")) == files


# ── Relative paths ────────────────────────────────────────────────────────────────────────────────

PATHS = ["raw.dir", "raw.processed_dir", "raw.rejected_dir", "storage.sqlite.path"]


@pytest.mark.parametrize("setting", PATHS)
def test_relative_paths(setting: str, here: Path, monkeypatch: pytest.MonkeyPatch):
    """A relative path counts from the folder of its file, in a variable from where one works."""
    variable = "DROPZONE_" + setting.replace(".", "_").upper()
    file = write(here / "etc" / "dropzone.toml", f"{setting} = 'in/file'")
    monkeypatch.chdir(write(here / "cwd" / ".env", "").parent)

    assert settings_of(load_config(file, environ={}))[setting] == here / "etc/in/file"
    assert settings_of(load_config("../etc/dropzone.toml", environ={}))[setting].resolve() == (
        here / "etc/in/file"
    )
    write(here / "cwd" / ".env", f"{variable}=in/env")
    assert settings_of(load_config(file, environ={}))[setting] == here / "cwd/in/env"
    found = settings_of(load_config(file, environ={variable: "in/variable"}))
    assert found[setting] == here / "cwd/in/variable"


def test_default_paths(here: Path):
    """The default paths count from the folder of the file, as if they stood in it."""
    file = write(here / "etc" / "dropzone.toml", "")
    config = load_config(file, environ={})

    assert config.raw.dir == here / "etc/data/raw"
    assert config.storage.sqlite.path == here / "etc/data/dropzone.sqlite"
    assert (config.raw.processed_dir, config.raw.rejected_dir) == (None, None)


def test_absolute_and_home_paths(here: Path, monkeypatch: pytest.MonkeyPatch):
    """An absolute path stays, and ~ is the home folder."""
    monkeypatch.setenv("HOME", str(here / "home"))
    write(here / "config.toml", "[raw]\ndir = '/srv/raw'\n[storage.sqlite]\npath = '~/db'")

    config = load_config(environ={"DROPZONE_RAW_PROCESSED_DIR": "~/processed"})

    assert config.raw.dir == Path("/srv/raw")
    assert config.storage.sqlite.path == here / "home/db"
    assert config.raw.processed_dir == here / "home/processed"


def test_home_of_nobody(here: Path):
    """A home folder that does not exist is an error that names the setting or the path."""
    write(here / "config.toml", "[raw]\ndir = '~no-such-user/raw'")

    assert re.search(r"raw\.dir|~no-such-user", refusal())


# ── What is no setting ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("prot = 1", "prot"),
        ("[server]\nprot = 1", "prot"),
        ("[sevrer]\nport = 1", "sevrer"),
        ("[sevrer]", "sevrer"),
        ("[storage.sqlte]\npath = 'x'", "sqlte"),
        ("[storage.postgres]\nurk = 'x'", "urk"),
        ("'server.port' = 1", "server.port"),
    ],
)
def test_unknown_keys(toml: str, named: str, here: Path):
    """A key or section that Dropzone does not know is refused by its name."""
    write(here / "config.toml", f"{toml}\n[log]")
    assert named in refusal()

    write(here / "named.toml", toml)
    assert named in refusal({"DROPZONE_CONFIG": "named.toml"})


@pytest.mark.parametrize("toml", ["[tool]\nport = 'x'", "port = 'x'", "[app.server]\nport = 'x'"])
def test_a_file_of_another_program(toml: str, here: Path):
    """A config.toml that was merely found, and has no section of Dropzone's, is not its own."""
    defaults = settings_of(load_config(environ={}))
    write(here / "config.toml", toml)

    found = load_config(environ={})
    assert settings_of(found).keys() == defaults.keys()
    assert found.server.port == 8080
    assert "unknown field" in refusal({"DROPZONE_CONFIG": "config.toml"})


@pytest.mark.usefixtures("here")
def test_variables_of_kubernetes():
    """The variables that Kubernetes injects for a service named dropzone are left alone."""
    injected = {
        "DROPZONE_PORT": "tcp://10.0.0.7:8080",
        "DROPZONE_PORT_8080_TCP": "tcp://10.0.0.7:8080",
        "DROPZONE_PORT_8080_TCP_PROTO": "tcp",
        "DROPZONE_PORT_8080_TCP_PORT": "8080",
        "DROPZONE_PORT_8080_TCP_ADDR": "10.0.0.7",
        "DROPZONE_SERVICE_HOST": "10.0.0.7",
        "DROPZONE_SERVICE_PORT": "8080",
        "DROPZONE_SERVICE_PORT_HTTP": "8080",
    }
    assert settings_of(load_config(environ=injected)) == settings_of(load_config(environ={}))


@pytest.mark.parametrize(
    "name",
    [
        "DROPZONE_PROT",
        "DROPZONE_PORTS",
        "DROPZONE_SERVICE",
        "DROPZONE_SERVER_PROT",
        "DROPZONE_SERVER",
        "DROPZONE_",
        "DROPZONE_api_key",
    ],
)
def test_unknown_variables(name: str, here: Path):
    """A variable DROPZONE_… that Dropzone does not know is refused by name, also in .env."""
    assert name in refusal({name: "1"})
    write(here / ".env", f"{name}=1")
    assert name in refusal()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("server.port", '"eighty"'),
        ("server.port", "true"),
        ("server.port", "1.5"),
        ("server.port", "[1]"),
        ("server.port", "{x = 1}"),
        ("server.port", "70000"),
        ("server.port", "-1"),
        ("server.port", f"{10**30}"),
        ("server.host", "5"),
        ("server.max_body_bytes", "0"),
        ("raw.dir", "5"),
        ("raw.dir", "{x = 1}"),
        ("raw.processed_dir", "false"),
        ("process.batch", "0"),
        ("process.batch", "nan"),
        ("process.batch", "1979-05-27"),
        ("storage.backend", "{name = 'sqlite'}"),
        ("storage.sqlite.path", "1"),
        ("storage.postgres.url", "1"),
        ("storage.postgres.url", "{x = 1}"),
        ("storage.postgres.pool", "0"),
        ("auth.api_key", "1"),
        ("auth.api_key", "['x']"),
        ("limits.per_key", "'many'"),
        ("limits.per_address", "100"),
        ("log.format", "'xml'"),
        ("log.level", "'loud'"),
        ("server", "5"),
        ("raw", "'data/raw'"),
        ("storage", "'sqlite'"),
        ("storage.sqlite", "'x'"),
        ("storage.postgres", f"'{URL}'"),
        ("log", "[]"),
    ],
)
def test_wrong_types_in_the_file(setting: str, value: str, here: Path):
    """A value of the wrong type or size, also a section that is none, names its setting."""
    write(here / "config.toml", f"{setting} = {value}")
    message = refusal()

    assert f"`$.{setting}`" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("section", "variable"),
    [
        ("server", "DROPZONE_SERVER_PORT"),
        ("raw", "DROPZONE_RAW_DIR"),
        ("storage", "DROPZONE_BACKEND"),
        ("storage", "DROPZONE_STORAGE_SQLITE_PATH"),
        ("storage.postgres", "DROPZONE_DATABASE_URL"),
        ("auth", "DROPZONE_API_KEY"),
    ],
)
@pytest.mark.parametrize("value", ["5", f"'{SECRET}'", "[]"])
def test_sections_that_are_none(section: str, variable: str, value: str, here: Path):
    """A section that is a mere value is named, also where a variable sets something in it."""
    write(here / "config.toml", f"{section} = {value}")
    message = refusal({variable: "1"})

    assert f"`$.{section}`" in message
    assert SECRET not in message


@pytest.mark.parametrize(
    ("name", "text", "setting"),
    [
        ("DROPZONE_SERVER_PORT", "eighty", "server.port"),
        ("DROPZONE_SERVER_PORT", "70000", "server.port"),
        ("DROPZONE_SERVER_PORT", "80.5", "server.port"),
        ("DROPZONE_PROCESS_BATCH", "0", "process.batch"),
        ("DROPZONE_LIMITS_PER_KEY", "100/fortnight", "limits.per_key"),
        ("DROPZONE_LOG_LEVEL", "loud", "log.level"),
    ],
)
def test_wrong_types_in_variables(name: str, text: str, setting: str, here: Path):
    """A value that a variable gives and that does not fit names the variable and the setting."""
    for message in (refusal({name: text}), write(here / ".env", f"{name}={text}") and refusal()):
        assert name in message
        assert setting in message


def test_wrong_command_line():
    """A value on the command line that does not fit names the setting."""
    assert "server.port" in refusal(overrides={("server", "port"): 70000})


# ── Choosing the backend ──────────────────────────────────────────────────────────────────────────


def test_database_url_chooses_postgres(here: Path):
    """DROPZONE_DATABASE_URL is the address, and chooses postgres, whatever the file says."""
    write(here / "config.toml", "[storage]\nbackend = 'memory'")

    for config in (
        load_config(environ={"DROPZONE_DATABASE_URL": URL}),
        write(here / ".env", f"DROPZONE_DATABASE_URL={URL}") and load_config(environ={}),
    ):
        assert config.storage.backend == "postgres"
        assert config.storage.postgres.url.reveal() == URL


@pytest.mark.parametrize("name", ["DROPZONE_BACKEND", "DROPZONE_STORAGE_BACKEND"])
def test_backend_variable_goes_before_database_url(name: str, here: Path):
    """Where DROPZONE_BACKEND says otherwise, in the environment or .env, it is obeyed."""
    both = {"DROPZONE_DATABASE_URL": URL, name: "sqlite"}
    assert load_config(environ=both).storage.backend == "sqlite"

    write(here / ".env", f"{name}=memory")
    assert load_config(environ={"DROPZONE_DATABASE_URL": URL}).storage.backend == "memory"
    write(here / ".env", f"DROPZONE_DATABASE_URL={URL}")
    assert load_config(environ={name: "memory"}).storage.backend == "memory"
    assert load_config(environ={name: "postgres"}).storage.postgres.url.reveal() == URL


def test_address_in_the_file_does_not_choose(here: Path):
    """An address that only stands in the file leaves the choice to `backend`."""
    write(here / "config.toml", f"[storage]\npostgres.url = '{URL}'")

    assert load_config(environ={}).storage.backend == "sqlite"


@pytest.mark.parametrize("toml", ["", "[storage]\nbackend = 'postgres'\n"])
def test_postgres_needs_an_address(toml: str, here: Path):
    """The postgres backend without an address is an error that says what to set."""
    write(here / "config.toml", toml)

    assert "DROPZONE_DATABASE_URL" in refusal({} if toml else {"DROPZONE_BACKEND": "postgres"})


# ── Secrets ───────────────────────────────────────────────────────────────────────────────────────


def test_secrets_are_not_shown():
    """No way of printing a configuration shows a key or an address."""
    config = load_config(environ={"DROPZONE_API_KEY": SECRET, "DROPZONE_DATABASE_URL": URL})

    for thing in (config, config.auth, config.storage, config.auth.api_key):
        shown = [repr(thing), str(thing), f"{thing}", f"{thing!r:>200}", ascii([thing])]
        assert not any(SECRET in text or "db.example" in text for text in shown)
    assert config.auth.api_key.reveal() == SECRET


def test_secrets_say_whether_they_are_set():
    """A secret tells whether there is one, which an operator may know."""
    assert repr(Secret(SECRET)) != repr(Secret())
    assert (bool(Secret(SECRET)), bool(Secret())) == (True, False)


@pytest.mark.parametrize(
    "toml",
    [
        f"auth.api_key = '{SECRET}'\nprot = 1",
        f"auth.api_key = ['{SECRET}']",
        f"auth.api_key = {{'{SECRET}' = 1}}",
        f"auth = '{SECRET}'",
        f"storage.postgres = '{URL}'",
        f"auth.api_key = {SECRET}",
        f"auth.api_key = '{SECRET}",
        f"auth.api_key = '{SECRET}'\nauth.api_key = '{SECRET}'",
        f"storage = {{backend = 'postgres', url = '{URL}'}}",
    ],
)
def test_secrets_are_in_no_error(toml: str, here: Path):
    """No error about a configuration quotes the values in it."""
    write(here / "config.toml", toml)
    with pytest.raises(ConfigError) as caught:
        load_config(
            environ={
                "DROPZONE_API_KEY": SECRET,
                "DROPZONE_DATABASE_URL": URL,
                "DROPZONE_LOG_LEVEL": "x",
            }
        )

    error = caught.value
    assert SECRET not in f"{error!s}{error!r}{error.__cause__!s}{error.extra}"


# ── The file that comes with Dropzone ─────────────────────────────────────────────────────────────


def test_shipped_file_equals_the_defaults(here: Path):
    """The config.toml that comes with Dropzone changes nothing."""
    copy = shutil.copy(REPO / "config.toml", here / "shipped.toml")

    assert settings_of(load_config(copy, environ={})) == settings_of(load_config(environ={}))


def test_shipped_file_names_every_setting():
    """The config.toml that comes with Dropzone has every setting, each with its explanation."""
    text = (REPO / "config.toml").read_text("utf-8")
    lines = re.findall(r"^(?:# )?(\w+ = .*)$", text, re.MULTILINE)
    commented = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)

    assert flat(tomllib.loads(commented)).keys() == settings_of(Config()).keys()
    assert all("  # " in line for line in lines)


def test_shipped_file_shows_where_folders_lie_by_default():
    """The commented settings show what holds without them."""
    text = (REPO / "config.toml").read_text("utf-8")
    shown = flat(tomllib.loads(re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)))
    siblings = Path(str(shown["raw.dir"])).parent

    assert shown["raw.processed_dir"] == str(siblings / "processed")
    assert shown["raw.rejected_dir"] == str(siblings / "rejected")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("name", ["DROPZONE_API_KEY", "DROPZONE_AUTH_KEYS", "DROPZONE_SERVER_PORT"])
@pytest.mark.parametrize("text", ["${DROPZONE_API_KEY:-}", "${KEY}", "${KEY-x}"])
def test_a_variable_that_nobody_has_filled_in(name: str, text: str):
    """A setting that is still the name of a variable is refused, and becomes no key."""
    with pytest.raises(ConfigError) as caught:
        load_config(environ={name: text})
    assert str(caught.value).startswith(f"{name} is {text}: ")
    assert load_config(environ={"DROPZONE_API_KEY": "a${b}"}).auth.api_key
