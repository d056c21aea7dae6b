"""What forwarders and simple clients send, and what those hear who cannot be understood."""

import gzip
import json
import zlib

import pytest
import test_ingest
from test_ingest import Serve

from backends.raw import form_of, payloads_in_name
from backends.raw.batches import payloads_in

serve = test_ingest.serve  # a fixture

ONE, TWO = b'{"time_stamp":"2019-05-01T10:00:00Z","data":[1]}', b'{"time_stamp": "", "data": []}'
PRETTY = json.dumps(json.loads(ONE), indent=2).encode()


def raw_deflate(body: bytes) -> bytes:
    """Compress as .NET's DeflateStream does, and Java's Deflater with `nowrap`: RFC 1951 alone."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


BATCHES = {
    "Fluent Bit, json_lines": ("application/json", ONE + b"\n" + TWO + b"\n", [ONE, TWO]),
    "Fluent Bit, json_stream": ("application/json", ONE + TWO, [ONE, TWO]),
    "Fluent Bit, json": ("application/json", b"[" + ONE + b"," + TWO + b"]", [ONE, TWO]),
    "Logstash, json_batch": ("application/json", b"[" + ONE + b",\n " + TWO + b"]", [ONE, TWO]),
    "Vector, newline_delimited": ("application/x-ndjson", ONE + b"\n" + TWO, [ONE, TWO]),
    "pretty documents": ("text/plain", PRETTY + b"\n" + PRETTY, [PRETTY, PRETTY]),
    "RFC 7464": ("application/json-seq", b"\x1e" + ONE + b"\n\x1e" + TWO + b"\n", [ONE, TWO]),
    "RFC 7464, one text": ("application/json-seq", b"\x1e" + PRETTY + b"\n", [PRETTY]),
    "no type at all": ("application/octet-stream", ONE + b"\r\n" + TWO + b"\r\n", [ONE, TWO]),
    "jsonlines": ("application/jsonlines", b" " + ONE + b"\n\n" + TWO, [b" " + ONE, TWO]),
    "MicroPython's numbers": ("application/json", b'{"a": nan}\n{"b": -inf}', None),
    "torn at the end": ("application/json", ONE + b"\n" + TWO + b'\n{"time_st', None),
}


@pytest.mark.parametrize(("kind", "body", "payloads"), BATCHES.values(), ids=BATCHES)
async def test_several_documents_are_a_batch(
    serve: Serve, kind: str, body: bytes, payloads: list[bytes] | None
):
    """Several documents land as one batch, byte for byte, whatever their Content-Type says."""
    service = await serve()
    answer = await service.post(body, Content_Type=kind)
    assert answer.status == 202
    [file] = (service.folder / "raw").iterdir()
    assert file.read_bytes() == body
    of_batch = payloads_in(body, form_of(file.name))
    assert len(of_batch) == payloads_in_name(file.name) == len(answer.json["raw_ids"])
    assert of_batch == (payloads or body.split(b"\n"))


@pytest.mark.parametrize(
    "body",
    [
        ONE,
        PRETTY,
        b"[]",
        b"[1, 2]",
        b"[[]]",
        b"[" + ONE + b", 1]",
        b"1",
        b'"\\u001e"',
        b" \n" + ONE,
    ],
    ids=["one", "pretty", "empty", "numbers", "arrays", "mixed", "number", "separator", "blank"],
)
async def test_one_document_is_one_payload(serve: Serve, body: bytes):
    """One document is one payload, unless it is an array of objects and of nothing else."""
    service = await serve()
    answer = await service.post(body)
    assert (answer.status, list(answer.json)) == (202, ["raw_id", "status"])
    assert service.landed() == {answer.json["raw_id"]: body}


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("gzip", gzip.compress),
        ("gzip, identity", gzip.compress),
        ("identity, X-Gzip ,", gzip.compress),
        ("identity", bytes),
        ("identity, identity", bytes),
        ("", bytes),
    ],
)
@pytest.mark.parametrize("body", [ONE, b"[" + b"1," * 40_000 + b"1]"], ids=["small", "large"])
async def test_content_encodings(serve: Serve, encoding: str, pack, body: bytes):
    """What HTTP libraries send as gzip and deflate is undone, also where identity is named."""
    service = await serve()
    answer = await service.post(pack(body), Content_Encoding=encoding)
    assert answer.status == 202
    assert service.landed() == {answer.json["raw_id"]: body}


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "deflate, gzip", "gzip deflate", "zstd"])
async def test_other_content_encodings(serve: Serve, encoding: str):
    """What cannot be undone is refused, and the answer names what can."""
    answer = await (await serve()).post(gzip.compress(ONE), Content_Encoding=encoding)
    assert (answer.status, answer.json["code"]) == (415, "encoding_unsupported")
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"


FORM = b'--x\r\nContent-Disposition: form-data; name="f"\r\n\r\n1\r\n--x--\r\n'
LATIN = '{"place": "Köln"}'
NOT_JSON = {
    "multipart": ("multipart/form-data; boundary=x", FORM, "a form of several parts"),
    "form": ("application/x-www-form-urlencoded", b"temperature=21.5&at=now", "a form"),
    "CSV": ("text/csv", b"time,value\n2019-05-01,1\n", "CSV"),
    "XML": ("application/xml", b"<reading><value>1</value></reading>", "XML"),
    "XML by its look": ("application/json", b"\xef\xbb\xbf <?xml version='1.0'?>", "XML"),
    "UTF-16": ("application/json; charset=utf-16", LATIN.encode("utf-16"), "send UTF-8"),
    "UTF-16, unnamed": ("application/json", LATIN.encode("utf-16-le"), "send UTF-8"),
    "Latin-1": ("application/json; charset=ISO-8859-1", LATIN.encode("latin-1"), "send UTF-8"),
}


@pytest.mark.parametrize(("kind", "body", "advice"), NOT_JSON.values(), ids=NOT_JSON)
async def test_what_can_never_be_read(serve: Serve, kind: str, body: bytes, advice: str):
    """What is no JSON is refused in words that say what it is, and what to send."""
    service = await serve()
    answer = await service.post(body, Content_Type=kind)
    assert (answer.status, answer.json["code"]) == (400, "payload_not_json")
    assert advice in answer.json["detail"]
    assert service.landed() == {}


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        "text/csv",
        "application/xml",
        "application/json; charset=utf-16",
        "application/json; charset=ISO-8859-1",
        "nonsense",
    ],
)
async def test_a_wrong_content_type(serve: Serve, kind: str):
    """What is JSON lands, whatever its Content-Type says: curl calls all that it sends a form."""
    service = await serve()
    answer = await service.post(ONE, Content_Type=kind)
    assert answer.status == 202
    assert list(service.landed().values()) == [ONE]


async def test_a_slash_too_many(serve: Serve):
    """Whoever sends to /ingest/ hears of /ingest; another path is plainly not there."""
    service = await serve()
    answer = await service.ask("POST", "/ingest/", data=ONE)
    assert (answer.status, answer.json["code"]) == (404, "not_found")
    assert answer.json["detail"].endswith("send to /ingest")
    answer = await service.ask("POST", "/ingests/", data=ONE)
    assert (answer.status, answer.json["detail"]) == (404, "Not Found")
