"""Image, compose file, systemd unit: what can be held to without a Docker engine; and signals."""

import configparser
import fnmatch
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import test_cli
import yaml
from power_cut import REPO, wait_for
from test_cli import CONFIGURATION, LINE, OK, PATIENCE, UNAVAILABLE, Program, Server

import dropzone

program = test_cli.program

SETTINGS = {*dropzone.VARIABLES, "DROPZONE_CONFIG"}
SLOW = """
from pathlib import Path
from backends.memory import MemoryBackend

class Slow(MemoryBackend):
    def __init__(self):
        super().__init__()
        Path("begun").touch()
        while not Path("told").exists():
            pass
"""


# ── The image ─────────────────────────────────────────────────────────────────────────────────────


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their arguments, in order."""
    text = re.sub(r"(?m)^#.*\n", "", (REPO / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in text.splitlines() if line]


def only(name: str) -> str:
    [arguments] = [arguments for kind, arguments in instructions() if kind == name]
    return arguments


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a folder with what the Dockerfile copies, of what .dockerignore lets through."""
    app = tmp_path / "app"
    app.mkdir()
    allowed = (REPO / ".dockerignore").read_text().split()
    for kind, arguments in instructions():
        if kind == "COPY":
            *sources, target = arguments.split()
            for source in sources:
                assert f"!{source}" in allowed
                if (REPO / source).is_dir():
                    ignore = shutil.ignore_patterns("__pycache__")
                    shutil.copytree(REPO / source, app / target, ignore=ignore)
                else:
                    shutil.copy(REPO / source, app / target)
    return app


def environment_of_image(app: Path) -> dict[str, str]:
    found = dict(re.findall(r"(\w+)=(\S+)", only("ENV")))
    return {name: text.replace("/data", str(app.parent / "data")) for name, text in found.items()}


def test_what_the_image_holds_is_enough(image: Path):
    """The files of the image and its settings serve; its health check sees that, and the end."""
    _, command = only("HEALTHCHECK").split("CMD")
    assert json.loads(command) == ["python", "/app/dropzone.py", "ready"]
    arguments = [image / "dropzone.py", "ready"]
    settings = environment_of_image(image)
    assert settings["DROPZONE_SERVER_HOST"] == "0.0.0.0"
    settings |= {"DROPZONE_SERVER_HOST": "127.0.0.1", "DROPZONE_SERVER_PORT": "0"}
    clean = {n: text for n, text in os.environ.items() if "DROPZONE" not in n} | settings
    entry, path = json.loads(only("ENTRYPOINT"))
    assert (entry, path) == ("python", "/app/dropzone.py")
    served = subprocess.Popen(
        [sys.executable, image / "dropzone.py"], cwd=image, env=clean, stderr=subprocess.PIPE
    )
    with served:
        try:
            port = ""
            for line in iter(served.stderr.readline, b""):
                if found := re.search(rb"listening on http://\S+:(\d+)", line):
                    port = found[1].decode()
                    break
            checked = clean | {"DROPZONE_SERVER_PORT": port}
            check = [sys.executable, *arguments]
            assert subprocess.run(check, cwd=image, env=checked, check=False).returncode == OK
            served.terminate()
            assert served.wait(PATIENCE) == OK
            gone = subprocess.run(check, cwd=image, env=checked, check=False, capture_output=True)
            assert gone.returncode == UNAVAILABLE
        finally:
            served.kill()
    data = image.parent / "data"
    assert {path.name for path in data.iterdir()} >= {"raw", "processed", "rejected", "journal"}
    assert {path.name for path in image.iterdir()} <= {
        "requirements.txt",
        "dropzone.py",
        "dropzone.html",
        "backends",
        "__pycache__",
    }


def test_image_is_not_run_by_root():
    """The image has a user of its own, by number, that owns its only volume."""
    user = only("USER")
    assert user.isdigit()
    assert int(user) > 0
    assert only("VOLUME") == "/data"
    making = instructions()[1][1]
    assert f"--uid {user}" in making
    assert "--owner=dropzone /data" in making
    assert set(environment_of_image(REPO)) <= SETTINGS | {"PYTHONUNBUFFERED"}


def test_secrets_and_data_stay_out_of_the_image():
    """Only what is named gets into the build: no .env, no payload, no git history."""
    everything, *allowed = (REPO / ".dockerignore").read_text().split()
    assert everything == "*"
    named = [pattern[1:] for pattern in allowed if pattern.startswith("!")]
    for name in (".env", "data/raw/x.json", ".git/config", "config.toml", ".venv/bin/python"):
        assert not any(fnmatch.fnmatch(name, pattern) for pattern in named)


# ── The compose file ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def compose() -> Any:
    return yaml.safe_load((REPO / "compose.yaml").read_text())


def content(compose: Any, name: str) -> str:
    """Return a file that the compose file holds, as a container gets it."""
    text = compose["configs"][name]["content"]
    return re.sub(r"\$\{\w+:-(\w*)\}", r"\1", text).replace("$$", "$")


def test_compose_starts_two_services(compose: Any):
    """Without a profile it is Dropzone and its database, which is healthy before it is used."""
    services = compose["services"]
    assert {name for name, service in services.items() if "profiles" not in service} == {
        "dropzone",
        "postgres",
    }
    assert services["dropzone"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert services["postgres"]["healthcheck"]["test"][0] == "CMD"
    for service in services.values():
        assert service["restart"] == "unless-stopped"
        for volume in service.get("volumes", ()):
            assert volume.split(":")[0] in compose["volumes"]
        for config in service.get("configs", ()):
            assert config["source"] in compose["configs"]


def test_compose_is_a_valid_configuration(compose: Any):
    """Its settings are known, and with its defaults the rows go to its PostgreSQL."""
    given = compose["services"]["dropzone"]["environment"]
    assert set(given) <= SETTINGS
    filled = {name: re.sub(r"\$\{\w+:-(\w*)\}", r"\1", text) for name, text in given.items()}
    config = dropzone.load_config(REPO / "config.toml", environ=filled)
    assert config.storage.backend == "postgres"
    assert config.process.every == 10
    password = compose["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert password in given["DROPZONE_DATABASE_URL"]


def test_compose_hands_prometheus_a_key_to_read_alone(compose: Any):
    """Neither the key for everything nor the database's password reaches Prometheus or Grafana."""
    named = re.compile(r"\$\{(\w+)")
    secrets = {"DROPZONE_API_KEY", "DROPZONE_AUTH_KEYS", "POSTGRES_PASSWORD"}
    assert secrets <= set(named.findall(json.dumps(compose["services"]["dropzone"])))
    for name in ("prometheus", "grafana"):
        assert not secrets & set(named.findall(json.dumps(compose["services"][name])))
    assert not secrets & set(named.findall(json.dumps(compose["configs"])))
    top = (REPO / "compose.yaml").read_text().partition("\nservices:")[0]
    for name in set(named.findall((REPO / "compose.yaml").read_text())):
        assert f"#   {name} " in top


def test_compose_opens_nothing_to_the_network(compose: Any):
    """Unless told otherwise, every port is on loopback, and Dropzone has no right to spare."""
    for service in compose["services"].values():
        for port in service.get("ports", ()):
            assert re.sub(r"^\$\{\w+:-(.*)\}", r"\1", port).startswith("127.0.0.1:")
    assert compose["services"]["dropzone"]["cap_drop"] == ["ALL"]
    assert compose["services"]["dropzone"]["read_only"] is True


def exposed(program: Program) -> set[str]:
    """Return the names of all samples that a service can show."""
    server = Server(program)
    server.request("POST", "/ingest", LINE)
    text = server.request("GET", "/metrics")[2].decode()
    assert server.stop() == OK
    names = set()
    for name, kind in re.findall(r"(?m)^# TYPE (dropzone_\w+) (\w+)$", text):
        parts = ("_bucket", "_sum", "_count") if kind == "histogram" else ("",)
        names |= {name + part for part in parts}
    return names


def test_dashboard_and_alerts_ask_for_what_exists(program: Program, compose: Any):
    """Each metric that a panel or an alert names is exposed, and each that is exposed is shown."""
    dashboard = json.loads(content(compose, "dashboard"))
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    shown = {name for expression in asked for name in re.findall(r"dropzone_\w+", expression)}
    groups = yaml.safe_load((REPO / compose["configs"]["alerts"]["file"]).read_text())["groups"]
    rules = [rule["expr"] for group in groups for rule in group["rules"]]
    watched = {name for rule in rules for name in re.findall(r"dropzone_\w+", rule)}
    there = exposed(program)
    assert (shown | watched) - there == set()
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in there}
    assert families - {re.sub("_(bucket|sum|count)$", "", name) for name in shown} == set()


def test_prometheus_and_grafana_find_each_other(compose: Any):
    """Prometheus scrapes Dropzone with its key, and the dashboard reads from that Prometheus."""
    [job] = yaml.safe_load(content(compose, "prometheus"))["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["dropzone:8080"]}]
    [name] = re.findall(r"credentials: \"\${(\w+):-}", compose["configs"]["prometheus"]["content"])
    assert name == "PROMETHEUS_KEY"
    [source] = yaml.safe_load(content(compose, "datasource"))["datasources"]
    dashboard = json.loads(content(compose, "dashboard"))
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    [provider] = yaml.safe_load(content(compose, "dashboards"))["providers"]
    targets = [config["target"] for config in compose["services"]["grafana"]["configs"]]
    assert f"{provider['options']['path']}/dropzone.json" in targets


# ── systemd, signals and exit codes ───────────────────────────────────────────────────────────────


def test_systemd_unit():
    """The unit in the docs runs a command that exists, as a user, with settings that exist."""
    docs = (REPO / "docs" / "operating.md").read_text()
    [text] = re.findall(r"```ini\n(.*?)```", docs, re.DOTALL)
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string(text)
    service = unit["Service"]
    assert service["User"] == service["StateDirectory"] == "dropzone"
    assert service["RestartPreventExitStatus"].split() == [str(os.EX_NOPERM), str(CONFIGURATION)]
    assert set(re.findall(r"Environment=(\w+)=", text)) <= SETTINGS
    sed, replacement = re.findall(r"sed 's/(\S+)\$/([^/]+)/'", docs)[0]
    for command in (service["ExecStart"], re.sub(f"{sed}$", replacement, service["ExecStart"])):
        interpreter, path, *arguments = command.split()
        assert interpreter == "/opt/dropzone/.venv/bin/python"
        assert path == "/opt/dropzone/dropzone.py"
        assert dropzone.arguments(arguments).run


@pytest.mark.parametrize("command", [(), ("process", "--watch")])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_before_it_has_begun(
    program: Program, command: tuple[str, ...], how: signal.Signals
):
    """Who is told to stop while still opening its backend stops in order, with exit code 0."""
    (program.home / "slow.py").write_text(SLOW)
    settings = {"DROPZONE_BACKEND": "slow:Slow", "PYTHONPATH": program.home}
    process = program.start(*command, **settings, DROPZONE_SERVER_PORT=0)
    wait_for((program.home / "begun").exists, PATIENCE)
    process.send_signal(how)
    (program.home / "told").touch()
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == OK, err
    assert b"Traceback" not in err


def test_a_wrong_configuration_is_not_tried_again(program: Program):
    """Exit code 78, with which the unit tells systemd not to start it again."""
    for command in ((), ("process", "--watch")):
        done = program.run(*command, DROPZONE_SERVER_PORT="x")
        assert done.returncode == CONFIGURATION, done.stderr
        assert "DROPZONE_SERVER_PORT" in done.stderr
