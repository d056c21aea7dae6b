"""`transform`: a payload becomes a measurement, or a reason that names what is wrong and where."""

import codecs
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import isqrt
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dropzone
from backends import Measurement
from dropzone import (
    LARGE_JSON,
    DataQualityError,
    PayloadNotJson,
    check_json,
    mean_and_std_dev,
    parse_json,
    strict_json,
    time_stamp_in,
    transform,
)

RAW_ID = UUID("0190a3b4-5c6d-7e8f-9012-3456789abcde")
NOON = "2019-05-01T12:00:00Z"
EXAMPLE = Path(__file__).parents[2] / "data" / "payload.json"
MAX, MIN_NORMAL, TINY = sys.float_info.max, sys.float_info.min, math.ulp(0.0)

for_many = settings(max_examples=500, deadline=None)


def payload(data: str = "[0, 2]", time_stamp: str = f'"{NOON}"') -> bytes:
    """Make a payload of two JSON texts."""
    return f'{{"time_stamp": {time_stamp}, "data": {data}}}'.encode()


def moment_of(time_stamp: str) -> datetime:
    return transform(RAW_ID, payload(time_stamp=json.dumps(time_stamp))).timestamp_utc


def outcome(body: bytes) -> Measurement | DataQualityError:
    try:
        return transform(RAW_ID, body)
    except DataQualityError as error:
        return error


def refusal(body: bytes) -> DataQualityError:
    with pytest.raises(DataQualityError) as caught:
        transform(RAW_ID, body)
    return caught.value


def code_of(time_stamp: str) -> str:
    return refusal(payload(time_stamp=json.dumps(time_stamp))).code


# ── What a good payload gives ─────────────────────────────────────────────────────────────────────


def test_example_payload():
    """The example gives its mean, its deviation and its time in UTC."""
    measurement = transform(RAW_ID, EXAMPLE.read_bytes())

    assert measurement.timestamp_utc == datetime(2019, 5, 1, 10, tzinfo=UTC)
    assert measurement.timestamp_utc.tzinfo is UTC
    assert measurement.mean == pytest.approx(0.9985282517566032, abs=1e-15)
    assert measurement.std_dev == pytest.approx(1.01280885259315, abs=1e-14)
    assert measurement.raw_id == RAW_ID


def test_zero_and_two():
    """The deviation is the population's: [0, 2] has mean 1.0 and deviation 1.0."""
    noon = datetime(2019, 5, 1, 12, tzinfo=UTC)

    assert transform(RAW_ID, payload("[0, 2]")) == Measurement(noon, 1.0, 1.0, RAW_ID)


def test_one_value():
    """A single value is its own mean, and deviates by nothing."""
    assert mean_and_std_dev([0.1]) == (0.1, 0.0)


def test_statistics_are_doubles():
    """Integers in a payload give doubles in the row."""
    measurement = transform(RAW_ID, payload("[1, 2, 3]"))

    assert type(measurement.mean) is float
    assert type(measurement.std_dev) is float


def test_unknown_members():
    """Members that Dropzone does not know do not stand in a payload's way."""
    body = b'{"id": {"deep": [null]}, "data": [1], "unit": "K", "time_stamp": "2019-05-01T12:00Z"}'

    assert transform(RAW_ID, body).mean == 1.0


def test_byte_order_mark():
    """A byte order mark before the document is let in."""
    assert transform(RAW_ID, b"\xef\xbb\xbf" + payload("[3]")).mean == 3.0


def test_duplicate_keys():
    """Of equal names the last one counts."""
    body = b'{"data": "x", "time_stamp": 1, "data": [5], "time_stamp": "2019-05-01T12:00:00Z"}'

    assert transform(RAW_ID, body).mean == 5.0


@pytest.mark.parametrize("text", ["1e-400", "-0", "-0.0", "0e999", "1E5", "1e308", "5e-324"])
def test_numbers_that_fit(text: str):
    """Every number that rounds to a finite double counts as Python reads it."""
    assert transform(RAW_ID, payload(f"[{text}]")).mean == float(text)


def test_integers_beyond_64_bits():
    """An integer of any size up to the greatest double is a number like others."""
    assert transform(RAW_ID, payload(f"[{10**300}, -{10**300}]")).mean == 0.0


# ── The codes, and the order of the checks ────────────────────────────────────────────────────────

# As JavaScript, Python, C and MicroPython print them, and with what printf adds.
WORDS = ("NaN", "nan", "NAN", "Infinity", "infinity", "INFINITY", "inf", "Inf", "INF")
SPELLED = [sign + word for sign in ("", "-", "+") for word in WORDS]
CODES = {
    "payload_not_json": [
        b"",
        b" \n",
        b"{",
        b"\xef\xbb\xbf",
        b"[1] x",
        b"'x'",
        b"nan1",
        b"\0",
        b"x=1",
    ],
    "payload_not_object": [
        b"null",
        b"[]",
        b"1",
        b'"x"',
        b"true",
        b"NaN",
        b"[{}]",
        b"1e999",
        b"-nan",
    ],
    "time_stamp_missing": [b"{}", b'{"data": [1]}', b'{"Time_stamp": "2019-05-01T12:00:00Z"}'],
    "time_stamp_invalid": [
        payload(time_stamp=text)
        for text in ("null", "1556704800", "1.5", "true", "NaN", "[]", "{}", '""', '"today"')
    ],
    "time_stamp_without_offset": [payload(time_stamp='"2019-05-01T12:00:00"')],
    "time_stamp_out_of_range": [payload(time_stamp='"0001-01-01T00:00:00+14:00"')],
    "data_missing": [f'{{"time_stamp": "{NOON}"}}'.encode()],
    "data_not_array": [payload(text) for text in ("null", "1", "{}", '"[1]"', "true", "NaN")],
    "data_empty": [payload("[]"), payload("[ ]")],
    "value_not_numeric": [
        payload(f"[{text}]") for text in ('"1"', '""', "true", "false", "null", "{}", "[]", "[1]")
    ],
    "value_not_finite": [
        payload(f"[{text}]") for text in (*SPELLED, "1e999", "-1e999", "1.8e308", f"{10**400}")
    ],
}


@pytest.mark.parametrize(
    ("code", "body"), [(code, body) for code, bodies in CODES.items() for body in bodies]
)
def test_codes(code: str, body: bytes):
    """Each kind of bad payload has a code of its own."""
    assert refusal(body).code == code


FAULTS = [
    ("payload_not_json", b'{"data": [}'),
    ("payload_not_object", b'["data"]'),
    ("time_stamp_missing", b'{"data": "x"}'),
    ("time_stamp_invalid", b'{"time_stamp": "x", "data": "x"}'),
    ("time_stamp_without_offset", b'{"time_stamp": "2019-05-01T12:00"}'),
    ("time_stamp_out_of_range", b'{"data": [], "time_stamp": "9999-12-31T23:59:59-14:00"}'),
    ("value_not_numeric", payload('[NaN, 1e999, "x"]')),
    ("value_not_finite", payload("[1, 1e999]")),
]


@pytest.mark.parametrize(("code", "body"), FAULTS)
def test_order_of_checks(code: str, body: bytes):
    """A payload with several faults is refused for the first: JSON, object, time stamp, data."""
    assert refusal(body).code == code


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (f"[{'1, ' * 17}{json.dumps('x')}]", 'data[17] is "x"'),
        ("[1, null, true]", "data[1] is null"),
        ("[1, 2, false]", "data[2] is false"),
        ('[{"a": 1}]', 'data[0] is {"a": 1}'),
        ("[0, -Infinity]", "data[1] is -Infinity"),
        ("[0, NaN]", "data[1] is NaN"),
        ("[0, -nan]", "data[1] is NaN"),
        ('["inf", -INF]', 'data[0] is "inf"'),
        ("[0, -inf]", "data[1] is -Infinity"),
        ('"x"', 'data is "x"'),
        ("null", "data is null"),
    ],
)
def test_error_names_the_place(data: str, place: str):
    """An error names the first bad value and its index."""
    assert place in refusal(payload(data)).detail


def test_position_in_broken_json():
    """What is no JSON is refused with line, column and byte of the first mistake."""
    detail = refusal('{"unit": "µm",\n "data": [1 2]}'.encode()).detail

    assert "line 2, column 13" in detail
    assert "byte 28" in detail


@pytest.mark.parametrize(("body", "byte"), [(b'{"a" 1}', 8), (b'{"a": "\xb0"}', 10)])
def test_position_after_a_byte_order_mark(body: bytes, byte: int):
    """The byte that an error names counts from the start of the payload, its mark included."""
    assert re.search(rf"byte {byte}\b", refusal(b"\xef\xbb\xbf" + body).detail)


@pytest.mark.parametrize("value", ['"' + "x" * 100_000 + '"', "[" * 500 + "]" * 500, f"{10**4000}"])
def test_errors_stay_short(value: str):
    """A bad value of any size makes a short sentence."""
    for body in (payload(f"[{value}]"), payload(value), payload(time_stamp=value), value.encode()):
        assert len(refusal(body).detail) < 300


@pytest.mark.parametrize("place", ["time_stamp", "data", "value", "document"])
def test_lone_surrogates(place: str):
    r"""An error about a lone "\ud800", which JSON can say and UTF-8 cannot, can be written."""
    bad = r'"\ud800"'
    bodies = {
        "time_stamp": payload(time_stamp=bad),
        "data": payload(bad),
        "value": payload(f"[{bad}]"),
        "document": bad.encode(),
    }

    assert refusal(bodies[place]).detail.encode("utf-8")


# ── Odd JSON ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("digits", [308, 309, 399, 400, 401, 4299, 4300, 4301, 5000, 100_000])
@pytest.mark.parametrize("sign", ["", "-"])
def test_long_integers(digits: int, sign: str):
    """An integer of too many digits is no finite double, however many they are."""
    error = refusal(payload(f"[1, {sign}9{'0' * digits}]"))

    assert error.code == "value_not_finite"
    assert error.detail.startswith("data[1] is ")


@pytest.mark.parametrize("depth", [900, 1000, 100_000])
@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":[', "]}")])
@pytest.mark.parametrize("before", ["", "\ufeff", "[NaN,", '["\\ud800",'])
def test_deep_nesting(depth: int, brackets: tuple[str, str], before: str):
    """A document nested too deeply is refused, whatever stands before its brackets."""
    opening, closing = brackets
    body = f"{before}{opening * depth}{closing * depth}{']' * before.startswith('[')}".encode()

    allowed = {"payload_not_object", "time_stamp_missing"} if depth < 100_000 else set()
    assert refusal(body).code in {"payload_not_json", *allowed}


@pytest.mark.parametrize("before", ["", "1, ", "NaN, ", "1e999, "])
def test_deep_nesting_in_data(before: str):
    """100,000 brackets inside `data` are refused too."""
    deep = "[" * 100_000 + "]" * 100_000

    assert refusal(payload(f"[{before}{deep}]")).code == "payload_not_json"


@pytest.mark.parametrize(
    "body",
    [
        b"\xff",
        payload()[:-1] + b', "unit": "\xb0C"}',
        payload()[:-1] + b', "\xc0\x80": 1}',  # overlong
        payload()[:-1] + b', "unit": "\xed\xa0\x80"}',  # a surrogate
        payload()[:-1] + b', "unit": "\xf4\x90\x80\x80"}',  # beyond U+10FFFF
        payload()[:-1] + b', "unit": "\xe2\x82"}',  # cut off
        payload().decode().encode("utf-16"),
        payload().decode().encode("utf-32"),
    ],
)
def test_invalid_utf8(body: bytes):
    """JSON is UTF-8; anything else is refused."""
    assert refusal(body).code == "payload_not_json"


ALMOST = ["[1,]", "[01]", "[+1]", "[.5]", "[1.]", "[0x10]", "[1_0]", "[- nan]", "[--inf]", "[nan1]"]
ALMOST += [
    "[1nan]",
    "[1 nan]",
    "[nannan]",
    "[infinit]",
    "[nan(0x1)]",
    "[n.an]",
    "{nan: 1}",
    "{inf :1}",
]
SPACE = b" " * LARGE_JSON


@pytest.mark.parametrize("before", [b"", SPACE], ids=["small", "large"])
@pytest.mark.parametrize("text", ALMOST)
def test_almost_json(text: str, before: bytes):
    """What other languages write and JSON does not know is refused."""
    assert refusal(before + payload(text)).code == "payload_not_json"
    with pytest.raises(PayloadNotJson):
        check_json(before + payload(text))


TEXTS = ["nan", "-inf", "Infinity nan", '\\" nan, "', "\\\\", "a\nb INF", "[nan]"]


@pytest.mark.parametrize("before", [b"", SPACE], ids=["small", "large"])
@pytest.mark.parametrize("number", SPELLED)
def test_text_with_the_words_for_not_finite(number: str, before: bytes):
    """A number that is not finite changes no text that reads like one, nor any position."""
    texts = json.dumps({"nan": TEXTS, "inf": dict.fromkeys(TEXTS)})
    body = before + f'{{"time_stamp": {number}, "x": {texts}, "data": [1]}}'.encode()
    assert refusal(body).code == "time_stamp_invalid"
    good = before + f'{{"x": {texts}, "time_stamp": "{NOON}", "y": {number}, "data": [2]}}'.encode()
    assert transform(RAW_ID, good).mean == 2
    document = parse_json(good)
    assert isinstance(document, dict)
    assert document["x"] == json.loads(texts)
    assert repr(document["y"]) == repr(float(number))
    bad = before + f'{{"x": {texts}, "y": {number}, "z": x}}'.encode()
    assert f"(byte {bad.rindex(b'x')})" in refusal(bad).detail


json_texts = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
).map(json.dumps)


@settings(max_examples=100, deadline=None)
@given(text=json_texts, ascii_only=st.booleans())
def test_json_is_read_as_the_standard_library_reads_it(text: str, ascii_only: bool):
    """The fast parser and the lenient one give what `json.loads` gives for any document."""
    if not ascii_only:
        text = json.dumps(json.loads(text), ensure_ascii=False)

    assert repr(parse_json(text.encode("utf-8", "replace"))) == repr(
        json.loads(text.encode("utf-8", "replace"))
    )


@for_many
@given(value=st.floats(allow_nan=False, allow_infinity=False), digits=st.integers(0, 40))
def test_numbers_are_read_exactly(value: float, digits: int):
    """A number is the double nearest to its digits, however many there are."""
    for text in (repr(value), f"{value:.{digits}e}"):
        assert float(str(parse_json(text.encode()))) == float(text)


# ── Whatever comes, a measurement or a DataQualityError ───────────────────────────────────────────

stamps = (
    st.from_regex(
        r"\d{4}-?(\d\d-?\d\d|W\d\d-?\d)[Tt ]\d\d(:?[0-6]\d){0,2}([.,]\d{1,9})?", fullmatch=True
    )
    .map(lambda local: local[:40])
    .flatmap(
        lambda local: st.sampled_from(["", "Z", "z", "+14:00", "-14:00", "-0060", "+99"]).map(
            local.__add__
        )
    )
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | stamps,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=10,
)
documents = st.fixed_dictionaries(
    {}, optional={"time_stamp": stamps | anything, "data": st.lists(st.floats()) | anything}
)
bodies = st.binary() | (anything | documents).map(json.dumps).map(str.encode)


@settings(max_examples=700, deadline=None)
@given(bodies)
@example(payload(time_stamp=f'"2019-05-01T24:00:00.{"0" * 5000}Z"'))
@example(payload(time_stamp=f'"2019-05-01T23:59:60.{"0" * 5000}Z"'))
@example(payload(time_stamp=f'"{"1" * 5000}"'))
@example(payload(time_stamp='"9999-W52-6T00:00Z"'))
@example(payload(time_stamp='"9999-12-31T24:00-14:00"'))
@example(payload("[" + "[" * 990 + "]" * 990 + "]"))
@example(payload(f"[{MAX!r}, {MAX!r}, -{MAX!r}]"))
@example(b"\xef\xbb\xbf" + b"[" * 100_000)
def test_nothing_else_gets_out(body: bytes):
    """Any bytes give a measurement or a DataQualityError of a known code, and nothing else."""
    found = outcome(body)

    if isinstance(found, DataQualityError):
        assert found.code in CODES
        assert found.detail.encode()
    else:
        assert found.timestamp_utc.tzinfo is UTC
        assert math.isfinite(found.mean)
        assert 0 <= found.std_dev < math.inf


@for_many
@given(st.data())
def test_damaged_payloads(data: st.DataObject):
    """The example with a few bytes changed gives a measurement or a DataQualityError."""
    body = bytearray(
        b'{"time_stamp": "2019-05-01T06:00:00-04:00", "data": [0.37, -1.5e3, 2], "n": null}'
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        body[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        body = body or bytearray(b" ")

    found = outcome(bytes(body))

    assert isinstance(found, Measurement) or found.code in CODES


# ── Time stamps ───────────────────────────────────────────────────────────────────────────────────

TEN = "2019-05-01T10:00:00+00:00"
MOMENTS = {
    "2019-05-01T06:00:00-04:00": TEN,
    "2019-05-01T10:00:00Z": TEN,
    "2019-05-01t10:00:00z": TEN,
    "2019-05-01 10:00:00Z": TEN,
    "2019-05-01T10:00Z": TEN,
    "2019-05-01T10Z": TEN,
    "20190501T100000Z": TEN,
    "20190501T1000Z": TEN,
    "20190501T10Z": TEN,
    "20190501T060000-0400": TEN,
    "2019-W18-3T10:00:00Z": TEN,
    "2019W183T100000Z": TEN,
    "2019-w18-3t10:00:00z": TEN,
    "2019-121T10:00:00Z": TEN,
    "2019-121 06:00:00-04:00": TEN,
    "2019121T100000Z": TEN,
    "2019121T10Z": TEN,
    "2019-001T00:00:00Z": "2019-01-01T00:00:00+00:00",
    "2019-365T23:59:59Z": "2019-12-31T23:59:59+00:00",
    "2020-366T00:00:00Z": "2020-12-31T00:00:00+00:00",
    "2016-366T23:59:60Z": "2017-01-01T00:00:00+00:00",
    "2019-365T24:00:00Z": "2020-01-01T00:00:00+00:00",
    "0001-001T00:00:00Z": "0001-01-01T00:00:00+00:00",
    "2019-05-01T06:00:00-04": TEN,
    "2019-05-01T06:00:00-0400": TEN,
    "2019-05-01T15:30:00+05:30": TEN,
    "2019-05-01T15:45:00+0545": TEN,
    "2019-05-01T10:00:00-00:00": TEN,
    "2019-05-02T00:00:00+14:00": TEN,
    "2019-05-02T09:59:00+23:59": TEN,
    "2019-04-30T10:01:00-23:59": TEN,
    "2019-05-01T10:00:00.5Z": "2019-05-01T10:00:00.500000+00:00",
    "2019-05-01T10:00:00,5Z": "2019-05-01T10:00:00.500000+00:00",
    "20190501T100000.123Z": "2019-05-01T10:00:00.123000+00:00",
    "2019-05-01T10:00:00.123456Z": "2019-05-01T10:00:00.123456+00:00",
    "2019-05-01T10:00:00.123456999Z": "2019-05-01T10:00:00.123456+00:00",
    "2019-05-01T10:00:00.0000009Z": TEN,
    "1969-12-31T23:59:59.9999999Z": "1969-12-31T23:59:59.999999+00:00",
    # 24:00 is the midnight that ends its day
    "2019-05-01T24:00:00Z": "2019-05-02T00:00:00+00:00",
    "2019-05-01T24:00Z": "2019-05-02T00:00:00+00:00",
    "2019-05-01T24Z": "2019-05-02T00:00:00+00:00",
    "20190501T240000Z": "2019-05-02T00:00:00+00:00",
    "2019-05-01T24:00:00.000Z": "2019-05-02T00:00:00+00:00",
    "2019-12-31T24:00:00-04:00": "2020-01-01T04:00:00+00:00",
    "2020-02-28T24:00:00Z": "2020-02-29T00:00:00+00:00",
    f"2019-05-01T24:00:00.{'0' * 5000}Z": "2019-05-02T00:00:00+00:00",
    # a leap second counts as the second after it
    "2016-12-31T23:59:60Z": "2017-01-01T00:00:00+00:00",
    "2016-12-31T235960Z": "2017-01-01T00:00:00+00:00",
    "2016-12-31T23:59:60.75Z": "2017-01-01T00:00:00.750000+00:00",
    "2017-01-01T08:59:60+09:00": "2017-01-01T00:00:00+00:00",
    "2016-12-31T15:59:60-08:00": "2017-01-01T00:00:00+00:00",
    "2017-01-01T05:29:60+05:30": "2017-01-01T00:00:00+00:00",
    # the ends of the calendar
    "0001-01-01T00:00:00Z": "0001-01-01T00:00:00+00:00",
    "0001-01-01T14:00:00+14:00": "0001-01-01T00:00:00+00:00",
    "9999-12-31T23:59:59.999999Z": "9999-12-31T23:59:59.999999+00:00",
    "9999-12-31T09:59:59-14:00": "9999-12-31T23:59:59+00:00",
    "9999-12-31T24:00:00+14:00": "9999-12-31T10:00:00+00:00",
    "0001-01-01T24:00:00+14:00": "0001-01-01T10:00:00+00:00",
}


@pytest.mark.parametrize(("time_stamp", "utc"), MOMENTS.items(), ids=lambda text: text[:40])
def test_moments(time_stamp: str, utc: str):
    """Every form of RFC 3339 and ISO 8601 that names a moment is understood, in UTC."""
    moment = moment_of(time_stamp)

    assert moment.isoformat() == utc
    assert moment.tzinfo is UTC


NO_MOMENTS = [
    "2019-05-01X10:00:00Z",  # the first seven are junk that `fromisoformat` takes
    "2019-05-01\n10:00:00Z",
    "2019-05-01\u202f10:00:00Z",
    "2019-05-01😀10:00:00Z",
    "2019-05-01T10:00:00+04:60",
    "2019-05-01T10:00:00-0499",
    "2019-05-01T10:00:00+04:00:30",
    "2019-05-01T10.5Z",  # to ISO 8601 half past ten, to `fromisoformat` half a second
    "2019-05-01T10:00.5Z",
    "20190501T1000,5Z",
    "2019-05-01T10:00:00+24:00",
    "2019-05-01T10:00:00+4",
    "2019-05-01T10:00:00+4:00",
    "2019-05-01T10:00:00+",
    "2019-05-01T10:00:00 +04:00",
    "2019-05-01T10:00:00 Z",
    "2019-05-01T10:00:00\u221204:00",  # a minus that is not ASCII's
    "2019-05-01T10:00:00ZZ",
    "2019-05-01T10:00:00Z\n",
    " 2019-05-01T10:00:00Z",
    "2019-05-01T10:00:00UTC",
    "2019-05-01T10:00:00[Europe/Zurich]",
    "2019-05-01T10:00:00Z[UTC]",
    "2019-05-01T10:00:00.Z",
    "2019-05-01T10:00:00.5.5Z",
    "2019-05-01T1:00:00Z",
    "2019-5-1T10:00:00Z",
    "2019-05-01T10:00:61Z",
    "2019-05-01T10:60:00Z",
    "2019-05-01T25:00:00Z",
    "2019-05-01T24:00:01Z",
    "2019-05-01T24:01:00Z",
    "2019-05-01T24:00:00.1Z",
    "2019-05-01T24:00:00.0000001Z",
    "2019-05-01T24:00:60Z",
    "2016-12-31T23:58:60Z",
    "2016-12-31T23:59:60+01:00",
    "2016-12-31T00:00:60Z",
    "2019-02-29T10:00:00Z",
    "2019-02-30T24:00:00Z",
    "2019-13-01T10:00:00Z",
    "2019-00-01T10:00:00Z",
    "2019-05-00T10:00:00Z",
    "2019-W53-1T10:00:00Z",
    "2019-W00-1T10:00:00Z",
    "2019-W18-8T10:00:00Z",
    "2019-W18T10:00:00Z",
    "2019-000T10:00:00Z",
    "2019-366T10:00:00Z",
    "2020-367T10:00:00Z",
    "9999-366T10:00:00Z",
    "2019-12T10:00:00Z",
    "2019-1211T10:00:00Z",
    "2019-05-01T06:00:00-04:00[America/New_York]",
    "2019-05-01T10:00:00 +0000",
    "2019-05-01T10:00:00 UTC",
    "2019-05-01 10:00:00 PM",
    "2019-0501T10:00:00Z",
    "201905-01T10:00:00Z",
    "2019-05-01T10:0000Z",
    "2019-05-01T1000:00Z",
    "2019-05T10:00:00Z",
    "2019-05-01Z",
    "2019-05-01TZ",
    "10:00:00Z",
    "T10:00:00Z",
    "19-05-01T10:00:00Z",
    "10000-01-01T00:00:00Z",
    "+2019-05-01T10:00:00Z",
    "-0001-01-01T10:00:00Z",
    "2019/05/01T10:00:00Z",
    "Wed, 01 May 2019 10:00:00 GMT",
    "1556704800",
    "now",
    "",
    "Z",
    "٢٠١٩-٠٥-٠١T١٠:٠٠:٠٠Z",  # noqa: RUF001 (digits, but not ASCII's)
    "٢٠١٩-٠٥-٠١T١٠:٠٠:٠٠",  # noqa: RUF001
    "2019-05-01T10:00:0０Z",  # noqa: RUF001
    "2019-05-01T10:00:00+0４:00",  # noqa: RUF001
    "2019-05-01T10:00:00.١Z",  # noqa: RUF001
    "2019-05-01T10:00:00\0Z",
]


@pytest.mark.parametrize("time_stamp", NO_MOMENTS, ids=ascii)
def test_no_moments(time_stamp: str):
    """What is no ISO 8601 date and time is refused, never guessed at."""
    assert code_of(time_stamp) == "time_stamp_invalid"


@pytest.mark.parametrize(
    "time_stamp",
    [
        "2019-05-01T10:00:00",
        "2019-05-01 10:00",
        "2019-05-01T10:00:00.123",
        "20190501T100000",
        "2019-W18-3T10:00:00",
        "2019-05-01",
        "20190501",
        "2019-121",
        "2019121T100000",
    ],
)
def test_without_offset(time_stamp: str):
    """A time that does not say its offset is refused, since it names no moment."""
    assert code_of(time_stamp) == "time_stamp_without_offset"


@pytest.mark.parametrize(
    "time_stamp",
    [
        "0001-01-01T00:00:00+14:00",
        "0001-01-01T13:59:59.999999+14:00",
        "9999-12-31T23:59:59-14:00",
        "9999-12-31T10:00:00-14:00",
        "9999-12-31T24:00:00Z",
        "9999-12-31T23:59:60Z",
        "0000-01-01T00:00:00Z",
        "0000-06-15T12:00:00+14:00",
        "0000-W20-1T00:00:00Z",
        "0000-100T00:00:00Z",
        "0001-001T00:00:00+14:00",
        "9999-365T24:00:00Z",
    ],
)
def test_out_of_range(time_stamp: str):
    """A moment outside the years 1 to 9999 in UTC has a code of its own."""
    assert code_of(time_stamp) == "time_stamp_out_of_range"


@for_many
@given(day=st.dates())
def test_any_ordinal_date(day: date):
    """An ordinal date is the same day as the calendar's, in the extended and the basic form."""
    expected = datetime.combine(day, time(10), UTC)

    for form in ("%Y-%j", "%Y%j"):
        year, ordinal = f"{day.year:04}", f"{day.timetuple().tm_yday:03}"
        text = form.replace("%Y", year).replace("%j", ordinal)
        assert moment_of(f"{text}T10:00Z") == expected


@for_many
@given(local=stamps, around=st.tuples(*[st.text(" +-Z[]/UTC0", max_size=4)] * 2))
def test_advice_can_be_followed(local: str, around: tuple[str, str]):
    """Whatever text a reason says to send is a time stamp that is read."""
    sent = local.join(around)
    found = outcome(payload(time_stamp=json.dumps(sent)))

    if isinstance(found, DataQualityError) and found.code == "time_stamp_invalid":
        _, said, instead = found.detail.rpartition("; send ")
        if said and not instead.startswith("ISO"):
            assert moment_of(instead.removeprefix("such as ")).tzinfo is UTC


def test_advice_takes_no_time():
    """A text of any length and kind gets its reason without being searched for long."""
    for text in (
        "1" * 79,
        " " * 79 + "x",
        "[" * 79,
        "2019-05-01T" + "a" * 60 + "/",
        "[" * 10**6,
        "1" * 10**6,
    ):
        assert code_of(text) == "time_stamp_invalid"


@for_many
@given(
    moment=st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30)),  # noqa: DTZ001
    minutes=st.integers(-1439, 1439),
    finer=st.text("0123456789", max_size=9),
    separator=st.sampled_from("Tt "),
)
def test_any_moment(moment: datetime, minutes: int, finer: str, separator: str):
    """A moment is the local time less the offset, cut off after the microsecond."""
    sign, (hours, rest) = "-" if minutes < 0 else "+", divmod(abs(minutes), 60)
    local = moment.isoformat(separator, "microseconds")
    utc = moment.replace(tzinfo=UTC) - timedelta(minutes=minutes)

    assert moment_of(f"{local}{finer}{sign}{hours:02}:{rest:02}") == utc
    assert moment_of(f"{local}{finer}{sign}{hours:02}{rest:02}".replace(".", ",")) == utc


# ── Statistics, against exact fractions ───────────────────────────────────────────────────────────


def exact_mean(values: Sequence[float]) -> Fraction:
    return sum(map(Fraction, values), Fraction()) / len(values)


def root(square: Fraction) -> Fraction:
    """Return the square root, right to 200 bits."""
    shift = 400 + 2 * max(0, square.denominator.bit_length() - square.numerator.bit_length())
    shift += shift % 2
    return Fraction(isqrt((square.numerator << shift) // square.denominator), 1 << (shift // 2))


def exact_std_dev(values: Sequence[float]) -> Fraction:
    """Return the root of the mean of the squares less the square of the mean."""
    squares = sum((Fraction(value) ** 2 for value in values), Fraction()) / len(values)
    return root(squares - exact_mean(values) ** 2)


def ulps_between(found: float, exact: Fraction) -> Fraction:
    """Return the distance in units in the last place of the exact result."""
    return abs(Fraction(found) - exact) / Fraction(math.ulp(float(exact)))


def assert_accurate(values: Sequence[float]) -> None:
    mean, std_dev = mean_and_std_dev(values)
    expected_mean, expected_std_dev = exact_mean(values), exact_std_dev(values)

    assert abs(mean - float(expected_mean)) <= math.ulp(float(expected_mean))
    if expected_std_dev >= MIN_NORMAL:
        assert ulps_between(std_dev, expected_std_dev) <= 4
    else:
        assert 0 <= std_dev <= 2 * MIN_NORMAL


ADVERSARIES = {
    "zero": [0.0],
    "negative zero": [-0.0, 0.0],
    "one tiny": [TINY],
    "tiny and zero": [TINY, 0.0, TINY],
    "subnormal": [TINY * k for k in (1, 3, 1 << 20, 1 << 51)],
    "around the least normal": [MIN_NORMAL, MIN_NORMAL / 2, MIN_NORMAL * 2, -MIN_NORMAL],
    "deviation underflows when squared": [1e-200, 2e-200, 3e-200],
    "greatest": [MAX],
    "greatest twice": [MAX, MAX],
    "1e308 twice": [1e308, 1e308],
    "1e308, 1.1e308": [1e308, 1.1e308],
    "both ends": [MAX, -MAX],
    "both ends, uneven": [MAX, MAX, -MAX],
    "both ends and one": [MAX, -MAX, 1.0],
    "sum overflows on the way": [MAX, MAX, -MAX, -MAX, 3.0],
    "deviation overflows": [-MAX, MAX, MAX, MAX, MAX],
    "deviation overflows by its length": [MAX, -MAX] * 50,
    "cancelling": [1e16, 1.0, -1e16],
    "cancelling, far apart": [1e300, 1e-300, -1e300],
    "nearly equal": [1e9 + k / 7 for k in range(100)],
    "neighbours": [1.0, math.nextafter(1.0, 2.0), 1.0],
    "large neighbours": [1e308, math.nextafter(1e308, 2e308)],
    "neighbours across zero": [TINY, -TINY],
    "one stands out": [1e-8] * 999 + [1.0],
    "equal thirds": [1 / 3] * 1000,
    "tenths": [0.1, 0.2, 0.3],
    "powers": [2.0**k for k in range(-1000, 1001, 50)],
    "mean between powers": [1.0] * 256 + [1.0 + 2**-52],
}


@pytest.mark.parametrize("values", ADVERSARIES.values(), ids=ADVERSARIES.keys())
def test_statistics_of_adversaries(values: list[float]):
    """Mean within 1 ulp, deviation within 4, also where sums or squares leave a double's range."""
    assert_accurate(values)


finite = st.floats(allow_nan=False, allow_infinity=False)


@for_many
@given(st.lists(finite, min_size=1, max_size=30))
def test_statistics_of_any_values(values: list[float]):
    """Whatever the values are, the mean is within 1 ulp and the deviation within 4."""
    assert_accurate(values)


@for_many
@given(base=finite, steps=st.lists(st.integers(-50, 50), min_size=1, max_size=30))
def test_statistics_of_nearly_equal_values(base: float, steps: list[int]):
    """Values that differ in their last places have as accurate a deviation as any."""
    values = [base + step * math.ulp(base) for step in steps]
    assert_accurate([value if math.isfinite(value) else base for value in values])


@for_many
@given(
    sign=st.sampled_from([1, -1]),
    values=st.lists(st.floats(1e307, MAX), min_size=1, max_size=20),
    small=st.lists(st.floats(-1, 1), max_size=5),
)
def test_statistics_of_huge_values(sign: int, values: list[float], small: list[float]):
    """Values whose sum or square is beyond a double are no harder than others."""
    assert_accurate(
        [*(sign * value for value in values), *(-value for value in values[1:]), *small]
    )


@for_many
@given(st.lists(st.floats(-1e-300, 1e-300), min_size=1, max_size=20))
def test_statistics_of_tiny_values(values: list[float]):
    """Values whose squares vanish still have a deviation."""
    assert_accurate(values)


@for_many
@given(value=finite, count=st.integers(1, 100))
def test_equal_values(value: float, count: int):
    """Equal values have a deviation of exactly nothing, and themselves as mean."""
    mean, std_dev = mean_and_std_dev([value] * count)

    assert abs(mean - value) <= math.ulp(value)
    assert std_dev == 0.0


@pytest.mark.parametrize(
    ("value", "count"), [(0.1, 10**6), (1e9 / 3, 10**6), (7e-310, 10**6), (1e308, 10**5)]
)
def test_very_many_equal_values(value: float, count: int):
    """Rounding errors do not add up over a million values."""
    mean, std_dev = mean_and_std_dev([value] * count)

    assert abs(mean - value) <= math.ulp(value)
    assert std_dev == 0.0


def test_many_values():
    """A hundred thousand nearly equal values have their exact deviation."""
    dice = random.Random(20190501)  # noqa: S311 (no secret)
    assert_accurate([1e12 + dice.random() for _ in range(100_000)])


def test_integers_count_as_their_doubles():
    """Integers beyond 2**53 count as the doubles nearest to them."""
    measurement = transform(RAW_ID, payload(f"[{2**53 + 1}, {2**60 + 1}]"))

    assert (measurement.mean, measurement.std_dev) == mean_and_std_dev([2.0**53, 2.0**60])


# The Numerical Accuracy sets of NIST's Statistical Reference Datasets (generated, as NIST did).
NUM_ACC = {
    1: (["10000001", "10000003", "10000002"], "10000002", "1"),
    2: (["1.2", *["1.1", "1.3"] * 500], "1.2", "0.1"),
    3: (["1000000.2", *["1000000.1", "1000000.3"] * 500], "1000000.2", "0.1"),
    4: (["10000000.2", *["10000000.1", "10000000.3"] * 500], "10000000.2", "0.1"),
}


@pytest.mark.parametrize("number", NUM_ACC)
def test_nist_num_acc(number: int):
    """The results are NIST's certified ones, as far as doubles can hold the values themselves."""
    texts, mean, sample_std_dev = NUM_ACC[number]
    values = [float(text) for text in texts]
    found_mean, found_std_dev = mean_and_std_dev(values)
    count = len(values)
    certified = Decimal(sample_std_dev) * (Decimal(count - 1) / Decimal(count)).sqrt()

    assert_accurate(values)
    assert found_mean == pytest.approx(float(mean), rel=2e-16)
    assert found_std_dev == pytest.approx(float(certified), rel=1e-7 if number == 4 else 1e-8)


def test_the_oracle():
    """The exact root that these tests compare with is one."""
    for square in (
        Fraction(2),
        Fraction(1, 3),
        Fraction(TINY) ** 2,
        Fraction(MAX) ** 2,
        Fraction(0),
    ):
        found = root(square)
        assert abs(found**2 - square) <= square / 2**150
    assert all(root(a) < root(b) for a, b in pairwise(Fraction(k, 7) for k in range(9)))


# ── Large payloads ────────────────────────────────────────────────────────────────────────────────

NUMBERS = ("1", " 2.5 ", "-3e4", "1e308", "-1e308", "5e-324", "0", "-0", "1E5", "1" * 30)
ODD = ("1e400", "1" * 400, "NaN", "Infinity", "-Infinity", '"x"', '"NaN"', "null", "true", "[]")
ODD += ('{"a":1}', "[1,2]", '"a,b"', r'"\ud800"')
STAMPS = (*[f'"{NOON}"'] * 5, "1", "null", "NaN", '"2019"', r'"2019-05-01T10:00:00Z\ud800"')


def document(draw: random.Random) -> bytes:
    """Make a payload in which something may be wrong, or that is none at all."""
    numbers = draw.choices(NUMBERS, k=draw.choice([0, 1, 2, 5, 30, 200]))
    if numbers and draw.random() < 0.5:
        numbers[draw.randrange(len(numbers))] = draw.choice(ODD)
    data = "[" + draw.choice([",", " , "]).join(numbers) + "]"
    members = [
        '"time_stamp":' + draw.choice(STAMPS),
        '"data":' + (data if draw.random() < 0.9 else draw.choice(ODD)),
        r'"\ud800":' + draw.choice(ODD),
        f'"data":{data}',
    ]
    members = draw.sample(members, k=draw.choice([1, 2, 3, 3, 4]))
    text = "{" + ",".join(members) + "}" if draw.random() < 0.95 else draw.choice(ODD)
    body = draw.choice([b""] * 9 + [codecs.BOM_UTF8]) + text.encode()
    if draw.random() < 0.1:
        place = draw.randrange(len(body))
        body = body[:place] + draw.randbytes(1) + body[place + 1 :]
    return body if draw.random() < 0.95 else body[: draw.randrange(len(body) + 1)]


def told(body: bytes) -> tuple[object, ...]:
    """Return the row that a payload makes, or the code of what is wrong, and with which value."""
    try:
        row = transform(RAW_ID, body)
    except DataQualityError as error:
        return error.code, re.findall(r"^data\[\d+\]", error.detail)
    return row.timestamp_utc, row.mean, pytest.approx(row.std_dev, rel=1e-15, abs=0)


@pytest.mark.parametrize("seed", range(4))
def test_large_payloads_are_judged_alike(seed: int, monkeypatch: pytest.MonkeyPatch):
    """A large payload, which is read piece by piece, has the row or the reason of a small one."""
    draw = random.Random(seed)  # noqa: S311
    bodies = [document(draw) for _ in range(1500)]
    small = [told(body) for body in bodies]
    monkeypatch.setattr(dropzone, "LARGE_JSON", 30)  # more than a time stamp
    monkeypatch.setattr(dropzone, "PIECE", 12)
    monkeypatch.setattr(dropzone, "AT_ONCE", 7)
    for body, expected in zip(bodies, small, strict=True):
        assert told(body) == expected, body
    assert len({code for code, *_ in small if isinstance(code, str)}) >= 8


@pytest.mark.parametrize("seed", range(4))
def test_large_documents_are_taken_alike(seed: int, monkeypatch: pytest.MonkeyPatch):
    """A large document is JSON where a small one is, and its time stamp is found without a row."""
    draw = random.Random(seed)  # noqa: S311
    bodies = [document(draw) for _ in range(1500)]

    def taken() -> list[object]:
        found = list[object]()
        for body in bodies:
            try:
                check_json(body)
                found.append(time_stamp_in(body))
            except (PayloadNotJson, DataQualityError) as error:
                found.append(error.code)
        return found

    small = taken()
    monkeypatch.setattr(dropzone, "LARGE_JSON", 30)  # more than a time stamp
    assert taken() == small


def test_strict_json_keeps_positions():
    """What is put in the place of odd literals is as long as they are, outside of text alone."""
    odd = codecs.BOM_UTF8 + rb'{"NaN\"": [NaN, -Infinity, "\ud800", Infinity], "b": "NaN"}'
    strict = strict_json(odd)
    assert len(strict) == len(odd)
    assert json.loads(strict) == {'NaN"': ["\x7f", "\x7f" * 7, "A", "\x7f" * 6], "b": "NaN"}


def test_what_is_wrong_with_a_large_document():
    """The error of a large document names line, column and byte, as that of a small one does."""
    lines = b"[" + b"1,\n" * 50_000
    for rest, problem in ((b" x]", "invalid character"), (b"1, 2", "it ends too early")):
        body = lines + rest
        position = body.index(b"x") if b"x" in body else len(body)
        with pytest.raises(PayloadNotJson) as caught:
            check_json(body)
        assert caught.value.extra == {"position": position}
        place = f"line 50001, column {1 + position - len(lines)} (byte {position})"
        assert str(caught.value) == f"not JSON: {problem} at {place}"


def test_values_near_the_end_of_the_range():
    """Many values whose sum no double can hold have their exact mean, and not only in the end."""
    values = [1e308, 1e308, -1e308, -1e308, 1e-300, MAX, -MAX] * 30_000
    mean, std_dev = mean_and_std_dev(values)
    assert mean == float(exact_mean(values))
    assert std_dev == pytest.approx(float(exact_std_dev(values)), rel=1e-15)
