"""Fixtures for every test file."""

import os
import signal
import sys
from collections.abc import Iterator

import asyncpg
import pytest
from postgres_server import PostgresServer

# A shell starts what runs in the background deaf to Ctrl-C, which programs under test inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A new schema takes milliseconds, where a new database would take tenths of a second. Whatever
# the test before left connected or altered would otherwise be in the way.
EMPTY_DATABASE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid();
ALTER DATABASE postgres RESET ALL;
DROP SCHEMA public CASCADE;
CREATE SCHEMA public;
GRANT USAGE ON SCHEMA public TO PUBLIC;
"""


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores, as many tests wait; four at most, as many start programs."""
    return min(4, (os.cpu_count() or 1) + 1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only Linux has, elsewhere; pytest says how many tests that is."""
    if sys.platform != "linux":
        left_out = [item for item in items if item.get_closest_marker("linux")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what tests have noted about how they were run, from whichever process."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "note":
                terminalreporter.write_line(f"{report.nodeid}: {text}", yellow=True)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for the whole run; a test that stops it starts it again."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
async def postgres_url(postgres_server: PostgresServer) -> str:
    """The address, password included, of a database that is empty for this test."""
    url = postgres_server.url()
    writable = {"default_transaction_read_only": "off"}
    connection = await asyncpg.connect(url, server_settings=writable)
    try:
        await connection.execute(EMPTY_DATABASE)
    finally:
        await connection.close()
    return url
