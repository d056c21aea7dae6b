"""The alerts for Prometheus: by promtool's unit tests, and with what a service really shows."""

import json
import subprocess
from pathlib import Path
from typing import Any

import machine
import test_http
import yaml
from power_cut import REPO
from test_http import Service
from test_metrics import samples_in

serve, service = test_http.serve, test_http.service

RULES = REPO / "docs" / "prometheus-rules.yml"
UNIT_TESTS = REPO / "tests" / "service" / "alerts.yml"
PATIENCE = 60  # seconds until a program that hangs is taken for one


def promtool(file: Path) -> None:
    """Run unit tests; raise with what promtool says where one fails."""
    command = [machine.program("promtool", package="prometheus"), "test", "rules", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def rules() -> list[Any]:
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    return list(group["rules"])


def test_alerts():
    """Each alert fires when it should, not before, and not at a service that does well."""
    promtool(UNIT_TESTS)


def test_every_alert_is_tried():
    """For each alert there is a test in which it fires and one in which it does not."""
    tried = [
        (case["alertname"], bool(case.get("exp_alerts")))
        for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    # with what a service really shows, below
    tried.append(("DropzoneRejects", True))
    for rule in rules():
        assert {fires for name, fires in tried if name == rule["alert"]} == {True, False}, rule


async def scrape(service: Service) -> dict[str, float]:
    """Return the counts of rejected payloads that Prometheus would see, by series."""
    answer = await service("GET", "/metrics")
    found = samples_in(answer.body.decode())["dropzone_payloads_rejected_total"]
    return {f'dropzone_payloads_rejected_total{{code="{code}"}}': n for (code,), n in found.items()}


async def test_the_first_rejections_raise_an_alert(service: Service, tmp_path: Path):
    """Three payloads are rejected, the first ever of their code: that is an alert."""
    before = await scrape(service)
    for _ in range(3):
        await service.land(b'{"time_stamp": "2019-05-01T10:00:00Z"}')
    await service.process()
    after = await scrape(service)
    [rule] = [rule for rule in rules() if rule["alert"] == "DropzoneRejects"]
    fired = {
        "exp_labels": {"code": "data_missing", **rule["labels"]},
        "exp_annotations": {
            "summary": "Payloads were rejected: data_missing",
            "description": rule["annotations"]["description"],
        },
    }
    seen = [
        {"series": series, "values": f"{before[series]:g}x5 {count:g}x5"}
        for series, count in after.items()
        if series in before  # of one that has just appeared Prometheus sees no increase
    ]
    when = [("4m", []), ("6m", [fired])]
    cases = [{"alertname": rule["alert"], "eval_time": at, "exp_alerts": it} for at, it in when]
    made = tmp_path / "alerts.yml"
    made.write_text(
        json.dumps(
            {
                "rule_files": [str(RULES)],
                "evaluation_interval": "1m",
                "tests": [{"interval": "1m", "input_series": seen, "alert_rule_test": cases}],
            }
        )
    )
    promtool(made)
