"""How many requests of a key or an address are let in, and what those beyond are told."""

import asyncio
import math
import re
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, TCPConnector, web
from hypothesis import given
from hypothesis import strategies as st

from backends.memory import MemoryBackend
from dropzone import (
    ROUTES,
    AuthConfig,
    Config,
    ConfigError,
    KeyConfig,
    LimitsConfig,
    Rate,
    RawConfig,
    Scope,
    Secret,
    create_app,
    hash_of,
    load_config,
    network_of,
    openapi_document,
)

KEY = {"x-api-key": "sesam"}
OPEN = ("/health", "/ready", "/docs", "/openapi.json")
Start = Callable[..., Awaitable[str]]
Answer = tuple[int, Any, Any]


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """Start services with limits; return their addresses."""
    runners: list[web.AppRunner] = []

    async def start(
        per_key: str = "", per_address: str = "", key: str = "sesam", other: tuple[Scope, ...] = ()
    ) -> str:
        digest = Secret(f"sha256:{hash_of('other').hex()}")
        keys = (KeyConfig("other", digest, other),) if other else ()
        config = Config(
            raw=RawConfig(dir=tmp_path / "raw"),
            auth=AuthConfig(api_key=Secret(key), keys=keys),
            limits=LimitsConfig(per_key=Rate(per_key), per_address=Rate(per_address)),
        )
        app = create_app(config, backend=MemoryBackend())
        runners.append(web.AppRunner(app, access_log=None, auto_decompress=False))
        await runners[-1].setup()
        await web.TCPSite(runners[-1], "127.0.0.1", 0).start()
        host, port = runners[-1].addresses[0]
        return f"http://{host}:{port}"

    yield start
    for runner in runners:
        await runner.cleanup()


async def ask(
    url: str, times: int = 1, headers: dict[str, str] = KEY, source: str = "127.0.0.1"
) -> list[Answer]:
    """Land a payload some times, one after the other, from an address."""
    answers = []
    async with ClientSession(connector=TCPConnector(local_addr=(source, 0))) as session:
        for _ in range(times):
            async with session.post(f"{url}/ingest", data=b"{}", headers=headers) as answer:
                answers.append((answer.status, answer.headers, await answer.json()))
    return answers


async def get(url: str) -> tuple[int, Any]:
    """Get a page without a key."""
    async with ClientSession() as session, session.get(url) as answer:
        return answer.status, answer.headers


async def test_off_by_default(start: Start):
    """Without a limit nothing is refused, and no answer speaks of one."""
    answers = await ask(await start(), 50)

    assert {status for status, _, _ in answers} == {202}
    assert not any(name.startswith("RateLimit") for _, headers, _ in answers for name in headers)


async def test_beyond_the_limit(start: Start, tmp_path: Path):
    """Each answer tells what is left; beyond it is a 429 that says when to come again."""
    answers = await ask(await start(per_key="3/hour"), 5)

    assert [status for status, _, _ in answers] == [202, 202, 202, 429, 429]
    assert {headers["RateLimit-Policy"] for _, headers, _ in answers} == {'"key";q=3;w=3600'}
    told = [re.fullmatch(r'"key";r=(\d+);t=(\d+)', h["RateLimit"]) for _, h, _ in answers]
    assert [match and match[1] for match in told] == ["2", "1", "0", "0", "0"]
    for (status, headers, problem), match in zip(answers, told, strict=True):
        assert match
        assert 1000 < int(match[2]) <= 1200  # each third of the hour brings another request
        assert headers.get("Retry-After") == (match[2] if status == 429 else None)
        assert status == 202 or problem["code"] == "rate_limited"
        assert status == 202 or headers["Content-Type"] == "application/problem+json"
    assert len(list((tmp_path / "raw").iterdir())) == 3


async def test_let_in_again(start: Start):
    """After the seconds of Retry-After a request is let in."""
    url = await start(per_key="2/second")
    answers = await asyncio.gather(*(ask(url) for _ in range(30)))
    [wait, *_] = [
        int(headers["Retry-After"]) for [(status, headers, _)] in answers if status == 429
    ]

    assert wait == 1
    await asyncio.sleep(wait)
    assert (await ask(url))[0][0] == 202


@pytest.mark.linux
async def test_addresses_count_for_themselves(start: Start):
    """What one address has used up is there for another."""
    url = await start(per_address="2/hour")

    assert [status for status, _, _ in await ask(url, 3)] == [202, 202, 429]
    assert [status for status, _, _ in await ask(url, 3, source="127.0.0.2")] == [202, 202, 429]


@pytest.mark.linux
async def test_guessing_keys(start: Start):
    """Requests with a wrong key count for their address: nobody tries out many."""
    url = await start(per_address="3/hour")

    assert [status for status, _, _ in await ask(url, 3, {"x-api-key": "x"})] == [401] * 3
    assert [status for status, _, _ in await ask(url, 2)] == [429] * 2
    assert [status for status, _, _ in await ask(url, 1, source="127.0.0.2")] == [202]


async def test_a_limit_of_keys_needs_a_key(start: Start):
    """Where the API is open, or the key is wrong, no limit of keys counts."""
    opened = await ask(await start(per_key="1/hour", key=""), 3, {})
    wrong = await ask(url := await start(per_key="1/hour"), 3, {"x-api-key": "x"})

    assert [status for status, _, _ in opened + wrong] == [202] * 3 + [401] * 3
    assert (await ask(url))[0][0] == 202


async def test_both_limits(start: Start):
    """With two limits both are told, and the one that is reached refuses."""
    answers = await ask(await start(per_key="1/hour", per_address="2/minute"), 3)

    policy = '"address";q=2;w=60, "key";q=1;w=3600'
    assert [h["RateLimit-Policy"] for _, h, _ in answers] == [policy, policy, '"address";q=2;w=60']
    assert answers[0][1]["RateLimit"] == '"address";r=1;t=30, "key";r=0;t=3600'
    assert '"key";r=0;t=3600' in answers[1][1]["RateLimit"]
    assert [status for status, _, _ in answers] == [202, 429, 429]
    assert "of this key" in answers[1][2]["detail"]
    assert "of this address" in answers[2][2]["detail"]


async def test_open_routes_are_not_limited(start: Start):
    """Health, readiness and the description answer even those who have used up all."""
    url = await start(per_address="1/hour")
    assert [status for status, _, _ in await ask(url, 2)] == [202, 429]

    for path in OPEN * 3:
        status, headers = await get(url + path)
        assert (status, "RateLimit" in headers) == (200, False)


async def test_the_body_is_not_awaited(start: Start):
    """A refused request is answered before its body is there, let alone in memory."""
    url = await start(per_address="1/hour")
    await ask(url)
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(b"POST /ingest HTTP/1.1\r\nHost: x\r\nContent-Length: 30000000\r\n\r\n{")
        async with asyncio.timeout(30):
            head = await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()

    assert head.startswith(b"HTTP/1.1 429 ")


UNKNOWN = [("GET", "/nope"), ("GET", "/"), ("DELETE", "/ingest"), ("OPTIONS", "/ingest")]


@pytest.mark.parametrize(("method", "path"), UNKNOWN)
async def test_what_needs_no_key_counts(start: Start, method: str, path: str):
    """What is found nowhere, by no method or by everybody counts for its address, too."""
    url = await start(per_address="2/hour")
    async with ClientSession() as session:
        statuses = []
        for _ in range(3):
            async with session.request(method, url + path) as answer:
                statuses.append(answer.status)
                assert answer.headers["RateLimit-Policy"] == '"address";q=2;w=3600'
    assert statuses[:2] == [{"/nope": 404, "/": 200}.get(path, 405)] * 2
    assert statuses[2] == 429
    assert [status for status, _, _ in await ask(url)] == [429]


async def test_a_lacking_scope_counts(start: Start):
    """A key that may not do what it asks for uses up its own limit by that."""
    url = await start(per_key="2/hour", other=("ingest",))
    async with ClientSession(headers={"x-api-key": "other"}) as session:
        statuses = []
        for _ in range(3):
            async with session.get(f"{url}/measurements") as answer:
                statuses.append(answer.status)
    assert statuses == [403, 403, 429]
    assert [status for status, _, _ in await ask(url)] == [202]


def test_described():
    """The description has 429 for each route that is limited, and for no other."""
    paths = openapi_document("", has_series=False)["paths"]
    for route in ROUTES:
        if route.answers:
            responses = paths[route.path][route.method.lower()]["responses"]
            assert ("429" in responses) == (route.path not in OPEN)


@pytest.mark.parametrize("text", ["100/second", "5000/minute", "1/hour", "7/day", "3 per week"])
def test_rates(text: str):
    """A rate is so many requests in a second, minute, hour, day or week."""
    assert load_config(environ={"DROPZONE_LIMITS_PER_KEY": text}).limits.per_key == text


@pytest.mark.parametrize("text", ["100", "0/second", "-1/second", "1.5/hour", "1/s;2/h", "x/day"])
def test_what_is_no_rate(text: str):
    """What is no rate is refused with the setting, the value and what would be right."""
    with pytest.raises(ConfigError, match=r"100/second.*limits\.per_address") as refused:
        load_config(environ={"DROPZONE_LIMITS_PER_ADDRESS": text})
    assert text in str(refused.value)


@given(st.integers(1, 50), st.sampled_from([("second", 1), ("minute", 60), ("day", 86_400)]))
def test_not_more_than_the_rate(count: int, unit: tuple[str, int]):
    """In an instant exactly so many requests are let in as the rate says, whichever it is."""
    name, seconds = unit
    limiter = Rate(f"{count}/{name}").limiter()
    interval = math.ceil(seconds / count)
    let_in = sum(not limiter.limit("x").limited for _ in range(count))

    assert let_in == count
    assert interval < 10 or limiter.limit("x").limited


def test_memory_is_bounded():
    """However many addresses come along, what is kept of them stays small."""
    limiter = Rate("1/day").limiter()
    for n in range(100_000):
        limiter.limit(str(n))
    tracemalloc.start()
    try:
        for n in range(100_000, 150_000):
            limiter.limit(str(n))
        grown, _ = tracemalloc.get_traced_memory()
        assert limiter.limit("149999").limited
        # what is new in the place of what is forgotten counts as grown
        assert grown < 50_000 * 500
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.1"),
        ("2001:db8::1", "2001:0db8:0000:0000"),
        ("2001:db8:0:0:ffff::1", "2001:0db8:0000:0000"),
        ("2001:db8:0:1::1", "2001:0db8:0000:0001"),
        ("fe80::1%eth0", "fe80:0000:0000:0000"),
        ("unknown", "unknown"),
        ("", ""),
    ],
)
def test_networks(address: str, network: str):
    """An IPv6 subscriber has a /64 to come from, so that is what counts as one address."""
    assert network_of(address) == network
