"""The manifest of `docs/kubernetes.yaml`, as far as it can be held to without a cluster."""

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import test_packaging
import yaml
from power_cut import REPO

import dropzone

MANIFEST = REPO / "docs" / "kubernetes.yaml"
OLDEST, NEWEST = "1.28", kubernetes_validate.latest_version()
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text()))


def named(kind: str, name: str = "dropzone") -> dict[str, Any]:
    """Return the object of a kind and name."""
    [found] = [d for d in DOCUMENTS if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


POD: dict[str, Any] = named("StatefulSet")["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


@pytest.mark.parametrize("version", [OLDEST, "1.32", NEWEST])
@pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda d: f"{d['kind']} {d['metadata']['name']}"
)
def test_schemas(document: dict[str, Any], version: str):
    """The schemas of the API accept each object, with no member that they do not know."""
    kubernetes_validate.validate(document, version, strict=True)


def environment(ordinal: int) -> dict[str, str]:
    """Return the variables that the container of a pod gets; the Secret's are its comment's."""
    pod = {"metadata.labels['apps.kubernetes.io/pod-index']": str(ordinal)}
    given: dict[str, str] = {}
    for source in CONTAINER["envFrom"]:
        if "configMapRef" in source:
            given |= named("ConfigMap", source["configMapRef"]["name"])["data"]
        else:
            assert source["secretRef"]["name"] in secrets()
            given |= secrets()[source["secretRef"]["name"]]
    for variable in CONTAINER["env"]:
        given[variable["name"]] = pod[variable["valueFrom"]["fieldRef"]["fieldPath"]]
    return given


def secrets() -> dict[str, dict[str, str]]:
    """Return what the command at the top puts into each Secret."""
    top = MANIFEST.read_text().partition("\napiVersion")[0]
    [name] = re.findall(r"create secret generic (\S+)", top)
    return {name: dict(re.findall(r"--from-literal=(\w+)='?(.*?)'?(?: \\)?$", top, re.MULTILINE))}


@pytest.mark.parametrize("ordinal", [0, 1, 2])
def test_settings(ordinal: int, tmp_path: Path):
    """With the image's settings and its own a node has its number, the database and the volume."""
    digest = "a" * 64
    given = test_packaging.environment_of_image(tmp_path / "app") | environment(ordinal)
    assert set(given) <= test_packaging.SETTINGS | {"PYTHONUNBUFFERED"}
    filled = {name: text.replace('"…"', f'"{digest}"') for name, text in given.items()}
    config = dropzone.load_config(REPO / "config.toml", environ=filled)
    assert config.node.id == ordinal
    assert config.storage.backend == "postgres"
    assert (config.process.every, config.raw.compact, config.log.format) == (10, True, "json")
    assert [key.name for key in config.auth.keys] == ["gateway-7"]
    [mount] = [m["mountPath"] for m in CONTAINER["volumeMounts"] if m["name"] == "data"]
    image = re.findall(r"DROPZONE_RAW_DIR=(\S+)", test_packaging.only("ENV"))
    assert image == [f"{mount}/raw"]


def test_variables_of_its_services():
    """What Kubernetes would tell of the services in every container is taken for no setting."""
    for service in (d for d in DOCUMENTS if d["kind"] == "Service"):
        if service["spec"].get("clusterIP") == "None":
            continue  # of these it tells nothing
        name = service["metadata"]["name"].upper().replace("-", "_")
        told = {f"{name}_SERVICE_HOST": "10.0.0.1", f"{name}_SERVICE_PORT": "8080"}
        told |= {f"{name}_PORT": "tcp://10.0.0.1:8080", f"{name}_SERVICE_PORT_HTTP": "8080"}
        told |= {f"{name}_PORT_8080_TCP_ADDR": "10.0.0.1", f"{name}_PORT_8080_TCP_PORT": "8080"}
        dropzone.load_config(REPO / "config.toml", environ=told)
    assert POD["enableServiceLinks"] is False


def test_the_objects_find_each_other():
    """Services, disruption budget and volumes name the pods and ports that there are."""
    stateful = named("StatefulSet")["spec"]
    labels = stateful["template"]["metadata"]["labels"]
    ports = {port["name"] for port in CONTAINER["ports"]}
    for document in DOCUMENTS:
        spec = document.get("spec", {})
        if document["kind"] == "Service":
            assert spec["selector"] == labels
            assert {port["targetPort"] for port in spec["ports"]} <= ports
    assert stateful["selector"]["matchLabels"] == labels
    assert named("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert named("Service", stateful["serviceName"])["spec"]["clusterIP"] == "None"
    claims = {claim["metadata"]["name"] for claim in stateful["volumeClaimTemplates"]}
    volumes = {volume["name"] for volume in POD["volumes"]}
    assert {mount["name"] for mount in CONTAINER["volumeMounts"]} == claims | volumes


def test_probes():
    """The probes ask for routes that need no key, and a stop has time to end in order."""
    open_routes = {route.path for route in dropzone.ROUTES if route.scope is None}
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert CONTAINER[name]["httpGet"]["path"] in open_routes
    assert CONTAINER["livenessProbe"]["httpGet"]["path"] == "/health"
    _, before = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert POD["terminationGracePeriodSeconds"] >= int(before) + 20  # seconds, as the docs promise


def test_rights():
    """It runs as the image's user, with a file system that it only reads, and no right to spare."""
    assert str(POD["securityContext"]["runAsUser"]) == test_packaging.only("USER")
    assert POD["securityContext"]["fsGroup"] == POD["securityContext"]["runAsUser"]
    own = CONTAINER["securityContext"]
    assert own["readOnlyRootFilesystem"] is True
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    [port] = [port["containerPort"] for port in CONTAINER["ports"]]
    assert f"DROPZONE_SERVER_PORT={port}" in test_packaging.only("ENV")
