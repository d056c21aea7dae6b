"""Series: several devices, each with a row of measurements of its own."""

import json
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.raw import uuid_at
from dropzone import (
    ConfigError,
    DataQualityError,
    PayloadNotJson,
    SeriesAt,
    TransformConfig,
    load_config,
    series_in,
    transform,
)

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)
RAW_ID = uuid_at(NOON)
LARGE = 70_000  # bytes, which is more than is transformed at once


def payload(**members: Any) -> bytes:
    """Return a payload with members besides those that it needs."""
    return json.dumps({"time_stamp": NOON.isoformat(), "data": [1, 3], **members}).encode()


def outcome(body: bytes, at: str = "id") -> str:
    """Return the series of the measurement that a payload becomes, or the code of the refusal."""
    try:
        return transform(RAW_ID, body, TransformConfig(series=SeriesAt(at))).series
    except DataQualityError as error:
        return f"! {error.code}"


def sizes(body: bytes) -> list[bytes]:
    """Return a payload as it is, odd, large, and both: each is read in a way of its own."""
    odd = body[:-1] + b', "odd": NaN}'
    large = b', "more": "%s"}' % (b"x" * LARGE)
    return [body, odd, body[:-1] + large, odd[:-1] + large]


@pytest.mark.parametrize(
    ("json_text", "expected"),
    [
        ('"a"', "a"),
        ('"Büro 7/3"', "Büro 7/3"),
        (r'"B\u00fcro"', "Büro"),
        ('" a "', " a "),
        ('"%s"' % ("x" * 200), "x" * 200),
        ("7", "7"),
        ("-7", "-7"),
        ("-0", "0"),
        ("18446744073709551616", "18446744073709551616"),
        ("9" * 200, "9" * 200),
        ('"%s"' % ("x" * 201), "! series_invalid"),
        ("9" * 201, "! series_invalid"),
        ("9" * 5000, "! series_invalid"),
        ('""', "! series_invalid"),
        (r'"a\u0000"', "! series_invalid"),
        (r'"a\nb"', "! series_invalid"),
        (r'"a\ud800"', "! series_invalid"),
        ("1.0", "! series_invalid"),
        ("1e3", "! series_invalid"),
        ("NaN", "! series_invalid"),
        ("true", "! series_invalid"),
        ("null", "! series_invalid"),
        ('["a"]', "! series_invalid"),
        ('{"a": 1}', "! series_invalid"),
    ],
)
def test_what_names_a_series(json_text: str, expected: str):
    """Text of 1 to 200 printable characters does, and a whole number; whatever the size."""
    for body in sizes(payload(id="x").replace(b'"x"', json_text.encode())):
        assert outcome(body) == expected


def test_a_name_of_surrogate_pairs():
    """A name beyond the first plane is read however it is escaped."""
    body = payload(id="🌡 1")
    assert rb"\ud83c" in body
    small, odd, large, both = sizes(body)
    assert [outcome(each) for each in (small, odd, large)] == ["🌡 1"] * 3
    assert outcome(both) == "! series_invalid"  # rather than another name


@pytest.mark.parametrize(
    ("at", "members", "expected"),
    [
        ("id", {"id": "a"}, "a"),
        ("/id", {"id": "a"}, "a"),
        ("/device/id", {"device": {"id": "a", "more": [1]}}, "a"),
        ("device/id", {"device/id": "a", "device": {"id": "b"}}, "a"),
        ("/a~1b/c~0d", {"a/b": {"c~d": "a"}}, "a"),
        ("/~01", {"~1": "a"}, "a"),
        ("/gateways/1/id", {"gateways": [{"id": "a"}, {"id": "b"}]}, "b"),
        ("/gateways/01/id", {"gateways": [{"id": "a"}, {"id": "b"}]}, "! series_missing"),
        ("/gateways/2/id", {"gateways": [{"id": "a"}, {"id": "b"}]}, "! series_missing"),
        ("/0", {"0": "a"}, "a"),
        ("/device/", {"device": {"": "a"}}, "a"),
        ("größe", {"größe": "a"}, "a"),
        ("id", {}, "! series_missing"),
        ("id", {"ID": "a", "device": {"id": "b"}}, "! series_missing"),
        ("/device/id", {"device": {}}, "! series_missing"),
        ("/device/id", {"device": 7}, "! series_missing"),
        ("/device/id", {"device": None}, "! series_missing"),
    ],
)
def test_places(at: str, members: dict[str, Any], expected: str):
    """A name is that of a member; a JSON Pointer reaches into objects and arrays (RFC 6901)."""
    for body in sizes(payload(**members)):
        assert outcome(body, at) == expected


def test_of_equal_names_the_last_counts():
    """As for all members: so that whoever looks at the payload sees the same."""
    for body in sizes(payload(id="a")[:-1] + b', "id": "b"}'):
        assert outcome(body) == "b"
    for body in sizes(payload(device={"id": "a"})[:-1] + b', "device": {}}'):
        assert outcome(body, "/device/id") == "! series_missing"
    for body in sizes(payload(id="a")[:-1] + rb', "\u0069d": 1.5}'):
        assert outcome(body) == "! series_invalid"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(deadline=None, max_examples=200)
@given(JSON, st.booleans())
def test_any_value(value: object, is_ascii: bool):
    """Whatever is there, it is read alike in every size, and is a good name or refused."""
    text = json.dumps({"id": value}, ensure_ascii=is_ascii).encode(errors="surrogatepass")
    try:
        text.decode()
    except UnicodeDecodeError:
        return
    body = payload()[:-1] + b"," + text[1:]
    found = [outcome(each) for each in sizes(body)]
    if "\\u" not in text.decode():
        assert len(set(found)) == 1
    if type(value) is int or (isinstance(value, str) and value.isprintable() and value):
        assert found[0] == (str(value) if len(str(value)) <= 200 else "! series_invalid")
    else:
        assert found[0] == "! series_invalid"


def test_without_the_setting():
    """Nobody looks for a series, and the row has none."""
    assert transform(RAW_ID, payload(id=[None])).series == ""
    assert series_in(b"no JSON at all", SeriesAt()) == ""
    with pytest.raises(PayloadNotJson):
        series_in(b"no JSON at all", SeriesAt("id"))


def test_reasons_name_the_place_and_the_remedy():
    """Whoever reads a reason knows which member it is about, what was sent, and what to send."""
    at = SeriesAt("/device/id")
    with pytest.raises(DataQualityError, match=r"no /device/id, .* send a text of 1 to 200"):
        series_in(payload(), at)
    with pytest.raises(DataQualityError, match=r"/device/id is 1.5, .*or a whole number"):
        series_in(payload(device={"id": 1.5}), at)
    with pytest.raises(DataQualityError, match=r"/device/id is null, .*send a text"):
        series_in(payload(device={"id": None}), at)


@pytest.mark.parametrize(
    "text",
    [
        " id",
        "id\n",
        'i"d',
        "i\\d",
        "/",
        "#/device/id",
        "$.device.id",
        "/device/~id",
        "/device/~2",
        "/device~",
        "time_stamp",
        "/data/0",
    ],
)
def test_wrong_settings(monkeypatch: pytest.MonkeyPatch, text: str):
    """What can name no series is refused before anything is done with it, and named."""
    monkeypatch.setenv("DROPZONE_TRANSFORM_SERIES", text)
    with pytest.raises(ConfigError, match=r"DROPZONE_TRANSFORM_SERIES: .*transform\.series"):
        load_config()


def test_the_setting_travels(monkeypatch: pytest.MonkeyPatch):
    """It is read from a variable, and other processes go by the same rules."""
    monkeypatch.setenv("DROPZONE_TRANSFORM_SERIES", "/device/a~1b")
    rules = load_config().transform
    assert rules.series.names == ("device", "a/b")
    assert pickle.loads(pickle.dumps(rules)).series.names == ("device", "a/b")  # noqa: S301
