"""The quarantine: rejected payloads are listed by code and time, and put back to be tried again."""

import asyncio
import json
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import test_cli
import test_http
from test_cli import OK, USAGE, Program, Server
from test_http import SOME_ID, Serve, Service, check_problem, reading, refusal
from test_processing import Folder, Picky, arrival, body

from backends import Measurement
from backends.raw.landing import RawStore

serve, quiet, program = test_http.serve, test_http.quiet, test_cli.program  # fixtures

BAD = {
    "payload_not_object": [1],
    "data_empty": reading(data=[]),
    "value_not_numeric": reading(data=["x"]),
}
CODES = ["payload_not_object", "data_empty", "value_not_numeric", "data_empty", "data_empty"]


class Relenting(Picky):
    """Refuses rows whose mean is negative until its constraint is dropped."""

    strict = True

    async def upsert(self, measurements: Sequence[Measurement]) -> None:
        await (super() if self.strict else super(Picky, self)).upsert(measurements)


@pytest.fixture
async def service(serve: Serve) -> Service:
    return await serve()


@pytest.fixture
async def rejections(service: Service) -> list[dict[str, Any]]:
    """Reject a payload for each of CODES, in two rounds; return the reasons in order of arrival."""
    reasons = []
    for codes in (CODES[:2], CODES[2:]):
        for code in codes:
            await service.land(BAD[code])
        reasons += (await service.process())["rejected"]
    assert [reason["code"] for reason in reasons] == CODES
    return reasons


async def retried(service: Service, query: str = "") -> int:
    answer = await service("POST", f"/rejected/retry{query}")
    assert (answer.status, list(answer.json)) == (200, ["retried"]), answer.body
    return answer.json["retried"]


async def receipt(service: Service, raw_id: str) -> Any:
    answer = await service("GET", f"/raw/{raw_id}")
    assert answer.status == 200, answer.body
    return answer.json


def numbers_of(reasons: list[dict[str, Any]], found: list[dict[str, Any]]) -> list[int]:
    return [reasons.index(reason) for reason in found]


# A query, and the rejections of CODES that it is for; {at2}: when the third one was rejected.
QUERIES = [
    ("", [0, 1, 2, 3, 4]),
    ("?code=data_empty", [1, 3, 4]),
    ("?code=payload_not_object", [0]),
    ("?code=never_heard_of", []),
    ("?raw_id={id3}", [3]),
    (f"?raw_id={SOME_ID}", []),
    ("?raw_id={id3}&code=data_empty", [3]),
    ("?raw_id={id3}&code=value_not_numeric", []),
    ("?since={at2}", [2, 3, 4]),
    ("?until={at2}", [0, 1]),
    ("?since={at2}&code=data_empty", [3, 4]),
    ("?since={at0}&until={at2}", [0, 1]),
    ("?since={at2}&until={at2}", []),
    ("?since=9999-01-01T00:00:00Z", []),
    ("?until=9999-01-01T00:00:00%2B01:00", [0, 1, 2, 3, 4]),
]


def filled_in(query: str, reasons: list[dict[str, Any]]) -> str:
    places = {f"at{number}": reason["rejected_at"] for number, reason in enumerate(reasons)}
    places |= {f"id{number}": reason["raw_id"] for number, reason in enumerate(reasons)}
    return query.format(**places)


# ── The list ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("query", "expected"), QUERIES)
async def test_list(
    service: Service, rejections: list[dict[str, Any]], query: str, expected: list[int]
):
    """The list holds the rejections with the code, the raw_id and of the time asked for."""
    page = (await service("GET", "/rejected" + filled_in(query, rejections))).json
    assert numbers_of(rejections, page["rejected"]) == expected
    assert (page["total"], page["next"]) == (len(expected), None)


@pytest.mark.parametrize(
    ("query", "codes"),
    [
        ("", {"payload_not_object": 1, "data_empty": 3, "value_not_numeric": 1}),
        ("?code=data_empty", {"payload_not_object": 1, "data_empty": 3, "value_not_numeric": 1}),
        ("?limit=1", {"payload_not_object": 1, "data_empty": 3, "value_not_numeric": 1}),
        ("?since={at2}&limit=1", {"data_empty": 2, "value_not_numeric": 1}),
        ("?until={at2}&code=x", {"payload_not_object": 1, "data_empty": 1}),
        ("?raw_id={id2}", {"value_not_numeric": 1}),
        ("?until=2000-01-01T00:00:00Z", {}),
    ],
)
async def test_counts(
    service: Service, rejections: list[dict[str, Any]], query: str, codes: dict[str, int]
):
    """`codes` counts everything of the time asked for, whatever the page and the code."""
    page = (await service("GET", "/rejected" + filled_in(query, rejections))).json
    assert page["codes"] == codes


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
@pytest.mark.parametrize(("query", "expected"), [("", 5), ("&code=data_empty", 3)])
async def test_pages(
    service: Service, rejections: list[dict[str, Any]], limit: int, query: str, expected: int
):
    """Following `next`, every rejection is seen once, in order, and `total` says how many."""
    seen, after = [], ""
    while after is not None:
        page = (await service("GET", f"/rejected?limit={limit}{query}{after}")).json
        assert 0 < len(page["rejected"]) <= limit
        assert page["total"] == expected
        seen += page["rejected"]
        after = page["next"] and f"&after={page['next']}"
    numbers = numbers_of(rejections, seen)
    assert numbers == sorted(set(numbers))
    assert len(numbers) == expected


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/rejected"), ("POST", "/rejected/retry")], ids=str
)
@pytest.mark.parametrize(
    "query", ["raw_id=17", "since=yesterday", "until=2019-05-01T12:00:00", "cod=x", "code=a&code=b"]
)
async def test_wrong_query(
    service: Service, rejections: list[dict[str, Any]], method: str, path: str, query: str
):
    """A query that is not understood is refused by its parameter's name, and nothing is moved."""
    problem = await refusal(service, 400, "query_invalid", method, f"{path}?{query}")
    assert problem["parameter"] == query.partition("=")[0]
    assert (await service("GET", "/rejected")).json["total"] == len(rejections)


@pytest.mark.parametrize("query", ["limit=0", "limit=10001", "after=x"])
async def test_wrong_page(service: Service, query: str):
    """A page that cannot be is refused; retrying knows no pages."""
    await refusal(service, 400, "query_invalid", "GET", f"/rejected?{query}")
    await refusal(service, 400, "query_invalid", "POST", "/rejected/retry?limit=1")


# ── Retrying ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("query", "expected"), QUERIES)
async def test_retry(
    service: Service, rejections: list[dict[str, Any]], query: str, expected: list[int]
):
    """A retry puts back exactly what the same query lists, with its raw_id and its bytes."""
    before = service.stored()
    assert await retried(service, filled_in(query, rejections)) == len(expected)
    back = [rejections[number]["raw_id"] for number in expected]
    for reason in rejections:
        raw_id, state = reason["raw_id"], "raw" if reason["raw_id"] in back else "rejected"
        assert service.stored()[f"{state}/{raw_id}.json"] == before[f"rejected/{raw_id}.json"]
    assert len(service.stored()) == len(before)
    done = await service.process()
    assert (done["checked"], done["failed"]) == (len(expected), len(expected))
    assert (await service("GET", "/rejected")).json["total"] == len(rejections)


async def test_retry_of_what_is_not_rejected(service: Service):
    """Pending, processed and unknown payloads are not put back, and stay what they are."""
    processed = await service.land(reading())
    await service.process()
    pending = await service.land(reading())
    before = service.stored()
    for raw_id in (processed, pending, SOME_ID):
        assert await retried(service, f"?raw_id={raw_id}") == 0
    assert await retried(service) == 0
    assert service.stored() == before


async def test_retry_becomes_a_row(serve: Serve):
    """What the backend refused becomes a row once the backend takes it, under its old raw_id."""
    service = await serve(backend := Relenting())
    raw_id = await service.land(reading(data=[-1]))
    assert (await service.process())["rejected"][0]["code"] == "backend_refused"
    backend.strict = False
    assert await retried(service, "?code=backend_refused") == 1
    assert (await service.process())["processed"] == 1
    row = (await service("GET", "/measurements/2019-05-01T10:00:00Z")).json
    assert (row["raw_id"], row["mean"]) == (raw_id, -1)
    assert (await receipt(service, raw_id))["measurement"] == row


async def test_retry_loses_against_later_arrivals(serve: Serve):
    """A retried payload does not take the row of one that arrived after it."""
    service = await serve(backend := Relenting())
    first = await service.land(reading(data=[-1]))
    later = await service.row_of(reading(data=[2]))
    backend.strict = False
    assert await retried(service) == 1
    assert (await service.process())["processed"] == 1
    assert (await service("GET", "/measurements")).json["measurements"] == [later]
    found = await receipt(service, first)
    assert (found["state"], found["superseded_by"]) == ("processed", later["raw_id"])


async def test_retries_are_counted(serve: Serve):
    """Each round is counted and timed, and shown everywhere, also when a row was made at last."""
    service = await serve(backend := Relenting())
    raw_id = await service.land(reading(data=[-1]))
    [reason] = (await service.process())["rejected"]
    assert (reason["retries"], reason["retried_at"]) == (0, None)
    for retries in (1, 2, 3):
        before = datetime.now(UTC)
        assert await retried(service, f"?raw_id={raw_id}") == 1
        pending = await receipt(service, raw_id)
        at = pending["rejection"]["retried_at"]
        assert before < datetime.fromisoformat(at) < datetime.now(UTC)
        reason |= {"retries": retries, "retried_at": at}
        assert (pending["state"], pending["rejection"]) == ("pending", reason)
        [again] = (await service.process())["rejected"]
        assert again["rejected_at"] > at
        assert again == reason | {"rejected_at": again["rejected_at"]}
        assert (await service("GET", "/rejected")).json["rejected"] == [again]
        assert (await receipt(service, raw_id))["rejection"] == again
        reason = again
    backend.strict = False
    await retried(service)
    await service.process()
    processed = await receipt(service, raw_id)
    assert processed["measurement"]["raw_id"] == raw_id
    assert (processed["rejection"]["code"], processed["rejection"]["retries"]) == (
        "backend_refused",
        4,
    )
    assert (await service("GET", "/rejected")).json["total"] == 0


async def test_payloads_of_a_batch(serve: Serve):
    """Rejected payloads of a batch are listed, counted and retried each as one of its own."""
    backend = Relenting()
    service = await serve(backend)
    good = [reading(f"2019-05-01T10:00:0{second}Z", data=[second - 3]) for second in range(6)]
    documents = [*good[:4], {}, *good[4:], reading(data=[])]
    answer = await service("POST", "/ingest", data=json.dumps(documents).encode())
    raw_ids = answer.json["raw_ids"]
    assert (await service("POST", "/process?limit=6")).json["failed"] == 4
    assert (await service.process())["failed"] == 1
    bad = [raw_ids[at] for at in (0, 1, 2, 4, 7)]
    page = (await service("GET", "/rejected?limit=3")).json
    assert [each["raw_id"] for each in page["rejected"]] == bad[:3]
    assert page["codes"] == {"backend_refused": 3, "time_stamp_missing": 1, "data_empty": 1}
    page = (await service("GET", f"/rejected?after={page['next']}")).json
    assert [each["raw_id"] for each in page["rejected"]] == bad[3:]
    assert await retried(service, f"?raw_id={bad[3]}") == 1
    assert await retried(service, f"?raw_id={raw_ids[3]}") == 0  # which is processed
    assert await retried(service, "?code=backend_refused") == 3
    assert (await service("GET", "/rejected")).json["codes"] == {"data_empty": 1}
    backend.strict = False
    done = await service.process()
    assert (done["processed"], done["failed"]) == (3, 1)
    assert [(each["raw_id"], each["retries"]) for each in done["rejected"]] == [(bad[3], 1)]
    for at, raw_id in enumerate(raw_ids):
        found = await receipt(service, raw_id)
        assert found["state"] == ("rejected" if at in {4, 7} else "processed")
        assert (found["rejection"] or {}).get("retries", 0) == (at in {0, 1, 2, 4})
    assert await backend.count() == 6


async def test_receipt_of_what_is_just_put_back(service: Service, monkeypatch: pytest.MonkeyPatch):
    """A payload that is put back while its receipt is made is known all the same, as pending."""
    raw_id = await service.land([1])
    await service.process()
    read = RawStore.read

    def read_and_put_back(store: RawStore, raw_id: UUID) -> Any:
        found = read(store, raw_id)
        if found[0] == "rejected":
            store.retry(raw_id)
        return found

    monkeypatch.setattr(RawStore, "read", read_and_put_back)
    found = await receipt(service, raw_id)
    assert (found["state"], found["rejection"]["retries"]) == ("pending", 1)


async def test_retry_without_a_reason(service: Service):
    """A payload whose reason is lost is listed as such, put back by that code, and counted."""
    raw_id = await service.land(1)
    await service.process()
    (service.folder / "rejected" / f"{raw_id}.reason.json").unlink()
    page = (await service("GET", "/rejected")).json
    assert page["codes"] == {"reason_missing": 1}
    assert await retried(service, "?code=reason_missing") == 1
    [reason] = (await service.process())["rejected"]
    assert (reason["code"], reason["retries"]) == ("payload_not_object", 1)


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}, {"Authorization": "Bearer x"}])
async def test_key(serve: Serve, headers: dict[str, str]):
    """Where a key is set, nobody lists or retries without it, and with it anybody does."""
    service, key = await serve(key="sesam"), {"x-api-key": "sesam"}
    await service("POST", "/ingest", data=b"[]", headers=key)
    await service("POST", "/process", headers=key)
    for request in (("GET", "/rejected"), ("POST", "/rejected/retry")):
        await refusal(service, 401, "key_refused", *request, headers=headers)
    answer = await service("POST", "/rejected/retry", headers=key)
    assert (answer.status, answer.json) == (200, {"retried": 1})


# ── The disk refuses ──────────────────────────────────────────────────────────────────────────────


@contextmanager
def no_byte_can_be_written(_: Path) -> Iterator[None]:
    """Let the operating system refuse every byte that this process writes to a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def away(folder: Path) -> Iterator[None]:
    """Put a file where a folder is."""
    elsewhere = folder.rename(folder.with_name("away"))
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        elsewhere.rename(folder)


@contextmanager
def no_raw_folder(data: Path) -> Iterator[None]:
    with away(data / "raw"):
        yield


@contextmanager
def no_journal(data: Path) -> Iterator[None]:
    with away(data / "journal"):
        yield


DISKS = [no_byte_can_be_written, no_raw_folder, no_journal]


@pytest.mark.parametrize("refusing", DISKS)
async def test_retry_while_the_disk_refuses(
    service: Service, rejections: list[dict[str, Any]], refusing: Callable[[Path], Any]
):
    """A retry is 503 with Retry-After while the disk refuses; nothing is lost, and later it works.

    What was put back before the disk refused is pending, the rest is rejected.
    """
    before = {name for name in service.stored() if ".reason" not in name}
    with refusing(service.folder):
        answer = await service("POST", "/rejected/retry")
    check_problem(answer, 503, "storage_unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert {name for name in service.stored() if ".reason" not in name} == before
    page = (await service("GET", "/rejected")).json
    assert [(reason["raw_id"], reason["code"]) for reason in page["rejected"]] == [
        (reason["raw_id"], reason["code"]) for reason in rejections
    ]
    assert await retried(service) == len(rejections)
    assert (await service.process())["failed"] == len(rejections)


@pytest.mark.parametrize("refusing", DISKS)
async def test_rejecting_while_the_disk_refuses(service: Service, refusing: Callable[[Path], Any]):
    """Processing is 503 while no reason can be written; nothing is lost, and later it works."""
    raw_ids = [await service.land(BAD[code]) for code in CODES]
    before = service.stored()
    with refusing(service.folder):
        check_problem(await service("POST", "/process"), 503, "storage_unavailable")
    assert service.stored() == before
    reasons = (await service.process())["rejected"]
    assert [(reason["raw_id"], reason["code"]) for reason in reasons] == list(
        zip(raw_ids, CODES, strict=True)
    )


# ── At once ───────────────────────────────────────────────────────────────────────────────────────


async def test_retrying_and_processing_at_once(serve: Serve):
    """Many retries and processors at once: each payload lies in one folder, whole.

    In the end, when nothing is refused any more, each one has its row.
    """
    service = await serve(backend := Relenting(), batch=7)
    bodies = {
        UUID(raw_id): payload
        for payload in (body(second, -1 - second) for second in range(60))
        for raw_id in [await service.land(payload)]
    }
    await service.process()
    folder = Folder(service.folder)
    for _ in range(6):
        calls = [service("POST", "/rejected/retry") for _ in range(3)]
        calls += [service("POST", "/process") for _ in range(3)]
        answers = await asyncio.gather(*calls)
        assert {answer.status for answer in answers} == {200}
        assert folder.states().total() == len(bodies)
    for raw_id, payload in bodies.items():
        assert folder.store.read(raw_id)[1] == payload
    assert await retried(service) + len(folder.names("raw")) >= len(bodies)
    backend.strict = False
    await service.process()
    assert folder.names("processed") == list(bodies)
    assert {row.raw_id for row in await backend.find(limit=100)} == set(bodies)


async def test_retries_at_once(service: Service, rejections: list[dict[str, Any]]):
    """Of retries at once each payload is put back, and counted, by one of them alone."""
    counts = await asyncio.gather(*(retried(service) for _ in range(8)))
    assert sum(counts) == len(rejections)
    again = (await service.process())["rejected"]
    assert [reason["raw_id"] for reason in again] == [reason["raw_id"] for reason in rejections]


# ── The command line ──────────────────────────────────────────────────────────────────────────────


async def rejected_by(program: Program) -> list[UUID]:
    """Make five payloads rejected, as CODES says."""
    folder = await Folder(program.home / "data").opened()
    raw_ids = folder.fill(5, lambda number: json.dumps(BAD[CODES[number]]).encode())
    assert program.run("process").returncode == OK
    return raw_ids


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--all"], [0, 1, 2, 3, 4]),
        (["--code", "data_empty"], [1, 3, 4]),
        ([arrival(4), arrival(0)], [0, 4]),
        ([arrival(4), arrival(0), "--code", "data_empty"], [4]),
        ([arrival(2), arrival(2), arrival(77)], [2]),
        (["--code", "never_heard_of"], []),
    ],
)
async def test_retry_command(program: Program, options: list[object], expected: list[int]):
    """`retry` puts back those with the raw_ids and the code, or all, and prints how many."""
    raw_ids = await rejected_by(program)
    done = program.run("retry", *options)
    assert (done.returncode, json.loads(done.stdout)) == (OK, {"retried": len(expected)})
    assert list(program.payloads()) == [raw_ids[number] for number in expected]
    again = json.loads(program.run("process").stdout)["rejected"]
    assert [(reason["code"], reason["retries"]) for reason in again] == [
        (CODES[number], 1) for number in expected
    ]


async def test_retry_command_beside_a_server(program: Program):
    """`retry` works beside a server, which sees at once what was put back."""
    raw_ids = await rejected_by(program)
    server = Server(program)
    assert program.run("retry", "--code", "data_empty").returncode == OK
    assert server.json("GET", f"/raw/{raw_ids[1]}")["state"] == "pending"
    assert server.json("GET", "/rejected")["total"] == 2
    assert server.json("POST", "/process")["failed"] == 3
    assert server.stop() == OK


async def test_retry_command_of_no_raw_id(program: Program):
    """What is no raw_id is refused with exit code 2, and nothing is put back."""
    await rejected_by(program)
    done = program.run("retry", arrival(0), "payload.json")
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "payload.json" in done.stderr
    assert program.payloads() == {}


@pytest.mark.parametrize("options", [[], ["--all", "--code", "data_empty"], ["--all", arrival(0)]])
async def test_retry_command_without_a_choice(program: Program, options: list[object]):
    """`retry` puts nothing back unless it is told which, or all: exit code 2, and what to say."""
    await rejected_by(program)
    done = program.run("retry", *options)
    assert (done.returncode, done.stdout) == (USAGE, "")
    assert "say which payloads: RAW_ID or --code CODE, or else --all" in done.stderr
    assert program.payloads() == {}
