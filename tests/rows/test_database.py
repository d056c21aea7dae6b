"""PostgreSQL as it really is: behind a pooler, read-only, with triggers, urls of all kinds."""

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

import machine
import pytest
from postgres_server import PostgresServer
from test_backends import NOON, closing, other_client, row

from backends import NO_PAYLOAD, BackendError, BackendUnavailable, MeasurementNotFound
from backends.postgres import TAKE_OVER, PostgresBackend
from backends.sqlite import SqliteBackend

pytestmark = pytest.mark.own_server

Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]
USER_OF_POOLER = 65534  # nobody: PgBouncer does not run as root


@pytest.fixture
async def postgres(postgres_url: str) -> AsyncIterator[PostgresBackend]:
    backend = PostgresBackend(postgres_url)
    yield backend
    await backend.close()


# ── A pooler ──────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def pooler(url: str, folder: Path, *settings: str) -> Iterator[str]:
    """Run PgBouncer in transaction mode, without its own care for prepared statements."""
    program = machine.program("pgbouncer", package="pgbouncer")
    parts = urlsplit(url)
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    home = Path(shutil.copytree(folder, f"/tmp/dropzone-pooler-{os.getpid()}-{port}"))
    try:
        home.chmod(0o755)
        (home / "users").write_text(f'"{parts.username}" "{parts.password}"\n')
        lines = [
            "[databases]",
            f"* = host={parts.hostname} port={parts.port}",
            "[pgbouncer]",
            "listen_addr = 127.0.0.1",
            f"listen_port = {port}",
            "unix_socket_dir =",
            "auth_type = plain",
            f"auth_file = {home}/users",
            "pool_mode = transaction",
            "default_pool_size = 2",
            "ignore_startup_parameters = extra_float_digits",
            *settings,
        ]
        (home / "pgbouncer.ini").write_text("\n".join(lines) + "\n")
        as_nobody = {"user": USER_OF_POOLER} if os.getuid() == 0 else {}
        command = [program, "--quiet", str(home / "pgbouncer.ini")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, **as_nobody) as process:
            try:
                wait_for_port(port, process)
                yield f"postgresql://{parts.username}:{parts.password}@127.0.0.1:{port}{parts.path}"
            finally:
                process.terminate()
    finally:
        shutil.rmtree(home)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(500):
        assert process.poll() is None, process.stderr and process.stderr.read()
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return
        time.sleep(0.01)


def without_prepared_statements() -> list[str]:
    """Return the setting that makes a newer PgBouncer as those before 1.21 are."""
    version = subprocess.run(
        [machine.program("pgbouncer", package="pgbouncer"), "--version"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()[1]
    major, minor, *_ = map(int, version.split("."))
    return ["max_prepared_statements = 0"] if (major, minor) >= (1, 21) else []


async def test_behind_a_pooler(postgres_url: str, tmp_path: Path):
    """In transaction mode, two servers on one PgBouncer get the right answers, each its own."""
    with pooler(postgres_url, tmp_path, *without_prepared_statements()) as url:
        async with closing(PostgresBackend(url)) as one, closing(PostgresBackend(url)) as other:
            await one.upsert([row(second, raw_id=second + 1) for second in range(50)])

            async def ask(backend: PostgresBackend, number: int) -> None:
                second = number % 50
                if number % 3 == 0:
                    await backend.upsert([row(second, raw_id=second + 1)])
                elif number % 3 == 1:
                    found = await backend.find(limit=7, descending=number % 2 == 0)
                    seconds = [int((each.timestamp_utc - NOON).total_seconds()) for each in found]
                    expected = list(range(49, 42, -1)) if number % 2 == 0 else list(range(7))
                    assert seconds == expected
                else:
                    assert (await backend.get(row(second).timestamp_utc)).raw_id.int == second + 1
                    assert await backend.count() == 50

            calls = (ask(each, number) for number in range(300) for each in (one, other))
            await asyncio.gather(*calls)
            buckets = await one.summarize(buckets=5)
            assert [bucket.count for bucket in buckets] == [9, 10, 10, 10, 10, 1][
                : len(buckets)
            ] or (sum(bucket.count for bucket in buckets) == 50)
            await one.delete([row(0, raw_id=1)])
            assert await other.count() == 49


# ── Sessions ──────────────────────────────────────────────────────────────────────────────────────


async def test_read_only_for_a_while(postgres: PostgresBackend, postgres_url: str):
    """A database that was read-only for a while is written to again, without a restart."""
    await postgres.upsert([row(1)])
    async with other_client(postgres_url) as other:
        await other.execute("ALTER DATABASE postgres SET default_transaction_read_only = on")
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with pytest.raises(BackendUnavailable, match="default_transaction_read_only"):
            await postgres.upsert([row(2)])
        with pytest.raises(BackendUnavailable, match="accepts no writes"):
            await postgres.ping()
        await other.execute("ALTER DATABASE postgres RESET default_transaction_read_only")
    await asyncio.sleep(1.1)
    await postgres.upsert([row(2)])
    await postgres.ping()
    assert await postgres.count() == 2


async def test_a_role_that_is_changed(postgres: PostgresBackend, postgres_url: str):
    """A search_path that was wrong for a while is that of no session any more once it is mended."""
    await postgres.upsert([row(1)])
    async with other_client(postgres_url) as other:
        await other.execute("CREATE SCHEMA elsewhere")
        await other.execute("ALTER DATABASE postgres SET search_path = nowhere")
        await other.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        with pytest.raises(BackendUnavailable):
            await postgres.upsert([row(2)])
        await other.execute("ALTER DATABASE postgres RESET search_path")
    await asyncio.sleep(1.1)
    await postgres.upsert([row(2)])
    assert await postgres.count() == 2


# ── Rows that are refused ─────────────────────────────────────────────────────────────────────────

TRIGGER = """
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.mean < 0 THEN RAISE EXCEPTION 'not this one' USING ERRCODE = '{state}'; END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON measurements FOR EACH ROW EXECUTE FUNCTION refuse();
"""


@pytest.mark.parametrize("state", ["0A000", "42501", "P0001", "22000", "23514", "XX000", "55000"])
async def test_a_refused_row(postgres: PostgresBackend, postgres_url: str, state: str):
    """A row that is refused, with whatever SQLSTATE, is told from a database in trouble."""
    await postgres.upsert([row(1)])
    async with other_client(postgres_url) as other:
        await other.execute(TRIGGER.format(state=state))
    with pytest.raises(BackendError, match="not this one") as caught:
        await postgres.upsert([row(2), row(3, mean=-1.0)])
    assert not isinstance(caught.value, BackendUnavailable)
    await postgres.upsert([row(2)])


async def test_row_level_security(postgres: PostgresBackend, postgres_url: str):
    """A policy that lets some rows in refuses the others, not the database."""
    await postgres.open()
    async with other_client(postgres_url) as other:
        await other.execute("CREATE ROLE limited LOGIN PASSWORD 'of-limited'")
        try:
            await other.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON measurements TO limited")
            await other.execute("ALTER TABLE measurements ENABLE ROW LEVEL SECURITY")
            await other.execute("CREATE POLICY positive ON measurements USING (mean >= 0)")
            url = f"postgresql://limited:of-limited@{postgres_url.rpartition('@')[2]}"
            async with closing(PostgresBackend(url)) as limited:
                await limited.upsert([row(1)])
                with pytest.raises(BackendError, match="row-level security") as caught:
                    await limited.upsert([row(2, mean=-1.0)])
                assert not isinstance(caught.value, BackendUnavailable)
        finally:
            await other.execute("DROP OWNED BY limited; DROP ROLE limited")


async def test_a_table_that_is_gone(postgres: PostgresBackend, postgres_url: str):
    """A table that was dropped meanwhile is trouble with the database, and rejects nothing."""
    await postgres.upsert([row(1)])
    async with other_client(postgres_url) as other:
        await other.execute("DROP TABLE measurements")
    with pytest.raises(BackendUnavailable, match="is gone"):
        await postgres.upsert([row(1)])
    with pytest.raises(BackendUnavailable, match="is gone"):
        await postgres.ping()


# ── Silence ───────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def firewall(port: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """Give a port that leads to `port`, and what makes all of today's connections fall silent."""
    silenced = asyncio.Event()
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        drops = not silenced.is_set()
        behind: Streams = await asyncio.open_connection("127.0.0.1", port)
        writers.extend((writer, behind[1]))

        async def pump(source: asyncio.StreamReader, drain: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                while data := await source.read(65536):
                    if not (drops and silenced.is_set()):
                        drain.write(data)
                if not (drops and silenced.is_set()):
                    drain.close()

        await asyncio.gather(pump(reader, behind[1]), pump(behind[0], writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1], silenced
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()


async def test_connections_that_a_firewall_drops(
    postgres_url: str, postgres_server: PostgresServer
):
    """Of pooled connections that fell silent, none costs a read more than some seconds."""
    async with firewall(postgres_server.port) as (port, silenced):
        url = postgres_url.replace(str(postgres_server.port), str(port))
        async with closing(PostgresBackend(url)) as backend:
            await backend.upsert([row(1)])
            await asyncio.gather(*(backend.count() for _ in range(6)))
            await asyncio.sleep(1.1)
            silenced.set()
            async with asyncio.timeout(15):
                for _ in range(3):
                    assert await backend.get(row(1).timestamp_utc) == row(1)


# ── Tables from before ────────────────────────────────────────────────────────────────────────────

OLDER = """
CREATE TABLE measurements (
    timestamp_utc timestamptz PRIMARY KEY,
    mean double precision NOT NULL,
    std_dev double precision NOT NULL
);
INSERT INTO measurements VALUES ('2019-05-01 12:00:01+00', 9, 9), ('2019-05-01 12:00:02+00', 9, 9);
"""


async def test_a_table_without_raw_ids(postgres: PostgresBackend, postgres_url: str):
    """An older table is refused with the one statement that takes it over; then payloads win."""
    async with other_client(postgres_url) as other:
        await other.execute(OLDER)
        with pytest.raises(BackendUnavailable) as caught:
            await postgres.open()
        assert TAKE_OVER in str(caught.value)
        await other.execute(TAKE_OVER)
    old = row(2, raw_id=0, mean=9.0, std=9.0)
    assert await postgres.get(old.timestamp_utc) == old
    await postgres.upsert([row(1)])
    assert await postgres.find() == [row(1), old]
    await postgres.delete([old])
    with pytest.raises(MeasurementNotFound):
        await postgres.get(old.timestamp_utc)


async def test_rows_with_null_as_raw_id(postgres: PostgresBackend, postgres_url: str):
    """Rows without a raw_id count as older than any payload, and are served with the nil UUID."""
    async with other_client(postgres_url) as other:
        await other.execute(f"{OLDER} ALTER TABLE measurements ADD COLUMN raw_id uuid")
    assert [each.raw_id for each in await postgres.find()] == [NO_PAYLOAD] * 2
    await postgres.upsert([row(1)])
    assert await postgres.get(row(1).timestamp_utc) == row(1)
    await postgres.delete([row(2, raw_id=0)])
    assert await postgres.count() == 1


async def test_a_default_that_makes_raw_ids_up(postgres: PostgresBackend, postgres_url: str):
    """A random default would let older rows win: it is refused with the statement that mends it."""
    async with other_client(postgres_url) as other:
        await other.execute(
            f"{OLDER} ALTER TABLE measurements ADD COLUMN raw_id uuid NOT NULL "
            "DEFAULT gen_random_uuid()"
        )
        with pytest.raises(BackendUnavailable, match="made-up") as caught:
            await postgres.open()
        await other.execute(str(caught.value).partition("run: ")[2])
    await postgres.upsert([row(1, raw_id=0x01890A5DAC96774BBCCEB302099A8057)])
    assert [each.raw_id.int > 0 for each in await postgres.find()] == [True, False]


# ── Urls ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:p@{host}/postgres?sslmode=verify-full", "sslrootcert"),
        ("postgresql://u:p@{host}/postgres?sslmode=verify-full&sslrootcert=/nope", "/nope"),
        ("postgresql://u:p@{host}/postgres?sslmode=require&sslcert=/no.crt", "/no.crt"),
        ("postgresql://u:p@{host}/postgres?ssl=true", "sslmode|ssl on"),
        ("postgresql://u:p@{host}/postgres?sslmode=require", "ssl"),
        ("postgresql://u:p@{host}/postgres?application_nam=x", "application_nam"),
        ("postgresql://u:p@127.0.0.1:1/postgres", "host and port"),
    ],
)
async def test_what_is_wrong_with_a_url(url: str, said: str, postgres_server: PostgresServer):
    """A url that cannot work is answered with the parameter or the file that is the reason."""
    address = url.format(host=f"127.0.0.1:{postgres_server.port}")
    address = address.replace("u:p", f"dropzone:{postgres_server.password}")
    async with closing(PostgresBackend(address)) as backend:
        with pytest.raises(BackendUnavailable, match=said) as caught:
            await backend.open()
    assert postgres_server.password not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://u:p@h/d?sslmode=yes", "sslmode=yes"),
        ("postgresql://u:p@h/d?connect_timeout=soon", "connect_timeout=soon"),
        ("postgresql://u:p@h/d?ssl=perhaps", "ssl"),
        ("postgresql://u:p@h:high/d", "port"),
        ("postgresql+asyncpg://u:p@h/d", r"postgresql\+asyncpg://"),
        ("mysql://u:p@h/d", "postgresql://"),
        ("postgresql://u:p@h/d?sslmode", "name=value"),
    ],
)
def test_urls_that_are_refused(url: str, said: str):
    """A url that nobody could mean is refused at once, by the name of what is wrong with it."""
    with pytest.raises(ValueError, match=said):
        PostgresBackend(url)


@pytest.mark.parametrize(
    "query",
    [
        "channel_binding=require",
        "channel_binding=require&sslmode=prefer",
        "connect_timeout=10",
        "keepalives=1&keepalives_idle=30&keepalives_interval=10&keepalives_count=3",
        "ssl=false",
        "sslmode=disable",
        "sslmode=allow",
        "target_session_attrs=read-write",
        "application_name=sensors",
        "fallback_application_name=sensors",
        "gssencmode=disable",
        "sslcompression=0&sslsni=1&tcp_user_timeout=0&load_balance_hosts=disable",
        "options=-c%20statement_timeout%3D5000",
        "search_path=public",
    ],
)
async def test_parameters_of_libpq(query: str, postgres_url: str):
    """What libpq knows is taken, or left aside; urls as providers hand them out work."""
    async with closing(PostgresBackend(f"{postgres_url}?{query}")) as backend:
        await backend.upsert([row(1)])
        assert await backend.count() == 1


async def test_what_is_left_aside_is_told(postgres_url: str, caplog: pytest.LogCaptureFixture):
    """A parameter that has no effect here is named once, in the log."""
    async with closing(PostgresBackend(f"{postgres_url}?channel_binding=require")) as backend:
        await backend.ping()
        await backend.ping()
    assert caplog.text.count("channel_binding") == 1


async def test_an_at_sign_in_the_password(postgres_url: str):
    """A raw @ in the password is part of it, as no host can have one."""
    async with other_client(postgres_url) as other:
        await other.execute("CREATE ROLE at LOGIN PASSWORD 'p@ss@word'")
        try:
            await other.execute("GRANT CREATE, USAGE ON SCHEMA public TO at")
            url = f"postgresql://at:p@ss@word@{postgres_url.rpartition('@')[2]}"
            async with closing(PostgresBackend(url)) as backend:
                await backend.upsert([row(1)])
            assert "word" not in repr(PostgresBackend(url))
        finally:
            await other.execute("DROP OWNED BY at; DROP ROLE at")


# ── A file of SQLite ──────────────────────────────────────────────────────────────────────────────


async def test_a_file_that_is_moved_away(tmp_path: Path):
    """A file that is moved while it is open takes no rows with it: it is told until it is back."""
    file, away = tmp_path / "rows.sqlite", tmp_path / "away.sqlite"
    async with closing(SqliteBackend(file)) as backend:
        await backend.upsert([row(1)])
        file.rename(away)
        for call in (backend.ping(), backend.upsert([row(2)]), backend.find()):
            with pytest.raises(BackendUnavailable, match="was moved, deleted or replaced"):
                await call
        file.touch()
        with pytest.raises(BackendUnavailable, match="was moved, deleted or replaced"):
            await backend.upsert([row(2)])
        away.rename(file)
        await backend.upsert([row(2, raw_id=1)])
        assert await backend.count() == 2
    async with closing(SqliteBackend(file)) as again:
        assert await again.find() == [row(1), row(2)]
