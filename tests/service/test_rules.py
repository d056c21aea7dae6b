"""`[transform]`: gaps in the data, and time stamps of clocks that were not set."""

import json
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import OK, Program

from backends.raw import uuid_at
from dropzone import (
    ConfigError,
    DataQualityError,
    Measurement,
    TransformConfig,
    load_config,
    mean_and_std_dev,
    transform,
)

ARRIVAL = datetime(2026, 5, 1, 12, tzinfo=UTC)
RAW_ID = uuid_at(ARRIVAL)
SKIP = TransformConfig(nulls="skip")
LARGE = 20_000  # values, which is more than is transformed at once


def payload(data: object, moment: datetime = ARRIVAL) -> bytes:
    return json.dumps({"time_stamp": moment.isoformat(), "data": data}).encode()


def outcome(body: bytes, rules: TransformConfig, raw_id: UUID = RAW_ID) -> Measurement | str:
    """Return the measurement, or the code of the refusal."""
    try:
        return transform(raw_id, body, rules)
    except DataQualityError as error:
        return error.code


def detail(body: bytes, rules: TransformConfig) -> str:
    with pytest.raises(DataQualityError) as caught:
        transform(RAW_ID, body, rules)
    return str(caught.value)


@settings(deadline=None)
@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=20), st.booleans())
def test_gaps(values: list[float | None], is_large: bool):
    """With `skip`, nulls count for nothing; without, the first one is named; small or large."""
    data = values * (LARGE if is_large else 1)
    data = data[: LARGE * 4]
    numbers = [value for value in data if value is not None]
    expected = "data_empty"
    if numbers:
        expected = Measurement(ARRIVAL, *mean_and_std_dev(numbers), RAW_ID)
    assert outcome(payload(data), SKIP) == expected
    if None in data:
        first = f"data[{data.index(None)}] is null, no number"
        assert detail(payload(data), TransformConfig()).startswith(first)
        assert 'nulls = "skip"' in detail(payload(data), TransformConfig())


@pytest.mark.parametrize("filler", [[], [1.5] * LARGE], ids=["small", "large"])
@pytest.mark.parametrize(
    ("bad", "code", "shown"),
    [
        ("x", "value_not_numeric", '"x", no number'),
        (True, "value_not_numeric", "true, no number"),
        ([None], "value_not_numeric", "[null], no number"),
        (float("inf"), "value_not_finite", "no finite double"),
        (float("nan"), "value_not_finite", "no finite double"),
    ],
)
def test_what_is_no_gap(filler: list[float], bad: object, code: str, shown: str):
    """Only null is a gap, and what is wrong behind gaps is named by its place among all values."""
    body = payload([*filler, None, 1, None, bad, 2])
    assert outcome(body, SKIP) == code
    assert detail(body, SKIP).startswith(f"data[{len(filler) + 3}] is ")
    assert shown in detail(body, SKIP) or filler


def test_nothing_but_gaps():
    """Nulls alone make no mean, and the reason says so."""
    for data in ([None], [None] * LARGE):
        assert outcome(payload(data), SKIP) == "data_empty"
        assert detail(payload(data), SKIP).startswith("data has only nulls")
    assert detail(payload([]), SKIP).startswith("data is empty")


def test_clocks_that_were_not_set():
    """A time stamp before `not_before` is rejected, that moment itself is not."""
    rules = TransformConfig(not_before=ARRIVAL)
    early = payload([1], ARRIVAL - timedelta(microseconds=1))
    assert isinstance(outcome(payload([1]), rules), Measurement)
    assert outcome(early, rules) == "time_stamp_implausible"
    assert "[transform] not_before" in detail(early, rules)
    assert isinstance(outcome(early, TransformConfig()), Measurement)


@pytest.mark.parametrize("seconds", [0, 60.5, 86_400])
def test_clocks_that_are_ahead(seconds: float):
    """A time stamp may be so many seconds later than the arrival, and no more."""
    rules, latest = TransformConfig(not_after_arrival=seconds), ARRIVAL + timedelta(seconds=seconds)
    assert isinstance(outcome(payload([1], latest), rules), Measurement)
    late = payload([1], latest + timedelta(microseconds=1))
    assert outcome(late, rules) == "time_stamp_implausible"
    assert "[transform] not_after_arrival" in detail(late, rules)
    unknown = UUID(int=4 << 76 | 2 << 62)  # of no moment
    assert isinstance(outcome(late, rules, unknown), Measurement)


def test_every_size_is_looked_at():
    """Large payloads are held to the same rules."""
    body = payload([1.5] * LARGE, datetime(1970, 1, 1, tzinfo=UTC))
    assert len(body) > 65_536
    assert outcome(body, TransformConfig(not_before=ARRIVAL)) == "time_stamp_implausible"


@pytest.mark.parametrize(
    ("name", "text", "wrong"),
    [
        ("NULLS", "drop", "transform.nulls"),
        ("NOT_BEFORE", "2020-01-01T00:00:00", "transform.not_before"),
        ("NOT_BEFORE", "yesterday", "transform.not_before"),
        ("NOT_AFTER_ARRIVAL", "-1", "transform.not_after_arrival"),
    ],
)
def test_wrong_settings(monkeypatch: pytest.MonkeyPatch, name: str, text: str, wrong: str):
    """A setting that cannot be is named, and so is what it has to be."""
    monkeypatch.setenv(f"DROPZONE_TRANSFORM_{name}", text)
    with pytest.raises(ConfigError, match=wrong):
        load_config()


@pytest.fixture
def program(tmp_path):
    made = Program(tmp_path)
    yield made
    made.close()


def test_rules_hold_everywhere(program: Program):
    """`process` and `verify` go by the settings, of the file and of the environment."""
    settings = "[transform]\nnulls = 'skip'\nnot_before = 2020-01-01T00:00:00Z\n"
    (program.home / "config.toml").write_text(settings)
    early = payload([1], datetime(1970, 1, 1, tzinfo=UTC))
    (program.home / "two.ndjson").write_bytes(payload([1, None, 3]) + b"\n" + early)
    assert program.run("ingest", "two.ndjson").returncode == OK
    result = json.loads(program.run("process").stdout)
    assert (result["processed"], result["failed"]) == (1, 1)
    assert result["rejected"][0]["code"] == "time_stamp_implausible"
    assert program.run("verify").returncode == OK
    assert program.run("verify", DROPZONE_TRANSFORM_NULLS="reject").returncode == 1
