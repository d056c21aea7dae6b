"""The url of a PostgreSQL database: read as libpq reads it, handed on as asyncpg takes it."""

import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, quote, unquote, urlsplit

EXAMPLE = "postgresql://user:password@host:5432/database"
SCHEMES = ("postgresql", "postgres")
TLS_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
TLS_VERSIONS = ("TLSv1", "TLSv1.1", "TLSv1.2", "TLSv1.3")
SESSIONS = ("any", "read-write", "read-only", "primary", "standby", "prefer-standby")
YES, NO = ("true", "on", "yes", "1"), ("false", "off", "no", "0")
FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")

# What a parameter may be, where asyncpg's own message would not say.
CHOICES = {
    "sslmode": TLS_MODES,
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": TLS_VERSIONS,
    "ssl_max_protocol_version": TLS_VERSIONS,
    "target_session_attrs": SESSIONS,
    "gssencmode": ("disable", "prefer"),
}
UNDERSTOOD = {
    "host",
    "port",
    "dbname",
    "database",
    "user",
    "password",
    "passfile",
    "service",
    "sslmode",
    "sslnegotiation",
    "sslpassword",
    "ssl_min_protocol_version",
    "ssl_max_protocol_version",
    "target_session_attrs",
    "krbsrvname",
    "gsslib",
    *FILES,
}
# libpq's, which asyncpg has no use for. Anything else is a setting of the server, whose word
# counts, such as search_path or application_name.
LEFT_ASIDE = {
    "channel_binding",
    "client_encoding",
    "gssdelegation",
    "gssencmode",
    "hostaddr",
    "keepalives",
    "keepalives_count",
    "keepalives_idle",
    "keepalives_interval",
    "load_balance_hosts",
    "max_protocol_version",
    "min_protocol_version",
    "oauth_ca_file",
    "oauth_client_id",
    "oauth_client_secret",
    "oauth_issuer",
    "oauth_scope",
    "replication",
    "require_auth",
    "requirepeer",
    "requiressl",
    "scram_client_key",
    "scram_server_key",
    "servicefile",
    "sslcertmode",
    "sslcompression",
    "sslcrldir",
    "sslkeylogfile",
    "sslsni",
    "tcp_user_timeout",
}


@dataclass(frozen=True)
class Address:
    """Where a database is, and how to reach it.

    `place` is its host, port and name, which may be shown. `dsn` is for asyncpg, and has the
    password. `files` are those that TLS needs, by their parameter; `settings` the names of what is
    handed to the server; `left_aside` the names of what asyncpg has no use for.
    """

    place: str
    dsn: str = field(repr=False)
    files: Mapping[str, str]
    settings: frozenset[str]
    left_aside: tuple[str, ...]
    connect_timeout: float | None
    trusts_system: bool
    key_password: str = field(repr=False)

    def tls(self) -> ssl.SSLContext | None:
        """Return the context that trusts what this machine trusts, None to leave it to asyncpg."""
        if not self.trusts_system:
            return None
        context = ssl.create_default_context()
        if "sslcert" in self.files:
            key = self.files.get("sslkey")
            context.load_cert_chain(self.files["sslcert"], key, lambda: self.key_password)
        return context

    def file_trouble(self) -> str | None:
        """Return which file cannot be read, and why, None where all can."""
        for name, path in self.files.items():
            try:
                with open(path, "rb"):
                    pass
            except OSError as error:
                return f"the file of {name}={path} cannot be read ({error.strerror})"
        return None


def read_url(url: str) -> Address:
    """Read the url of a database; raise ValueError that names what is wrong, not the password."""
    parts = _split(url.strip())
    user, hosts = _user_and_hosts(parts)
    given = _parameters(parts.query)
    _translate(given, has_host=bool(hosts))
    _check(given)
    timeout = _whole_number("connect_timeout", given.pop("connect_timeout", "0"))
    trusts_system = given.get("sslrootcert") == "system"
    if trusts_system:
        del given["sslrootcert"]
    kept = {name: value for name, value in given.items() if name not in LEFT_ASIDE}
    query = "&".join(f"{name}={quote(value, safe='')}" for name, value in kept.items())
    return Address(
        place=(hosts or given.get("host", "")) + parts.path,
        dsn=f"postgresql://{user}{hosts}{parts.path}?{query}",
        files={name: given[name] for name in FILES if name in given},
        settings=frozenset(kept.keys() - UNDERSTOOD),
        left_aside=tuple(sorted(given.keys() & LEFT_ASIDE)),
        connect_timeout=timeout if timeout > 0 else None,
        trusts_system=trusts_system,
        key_password=given.get("sslpassword", ""),
    )


def _split(url: str) -> SplitResult:
    parts = None
    with suppress(ValueError):
        parts = urlsplit(url)
    if parts and parts.scheme not in SCHEMES and parts.scheme.startswith(SCHEMES):
        raise ValueError(f"the database url begins with {parts.scheme}://: write postgresql://")
    # A raw '/', '?' or '#' in the password ends the host too early, and would show the password.
    known = parts is not None and parts.scheme in SCHEMES
    if parts is None or not known or "@" in parts.path + parts.query + parts.fragment:
        raise ValueError(
            f"the database url is not like {EXAMPLE}: "
            "special characters in the password are written as %2F for /, %40 for @ and so on"
        )
    return parts


def _user_and_hosts(parts: SplitResult) -> tuple[str, str]:
    """Return the user with the password, written as asyncpg takes them, and the hosts."""
    # No host has an '@' in it: where there are several, the others belong to the password.
    login, at, hosts = parts.netloc.rpartition("@")
    name, colon, password = login.partition(":")
    for host in hosts.split(",") if hosts else ():
        ahead, _, port = host.rpartition("]")[2].partition(":")
        if not (ahead or host.startswith("[")):
            raise ValueError("the database url names no host between two commas, or before a port")
        if port:
            _require_port(port)
    return _quoted(name) + colon + _quoted(password) + at, hosts


def _quoted(text: str) -> str:
    return quote(unquote(text), safe="")


def _parameters(query: str) -> dict[str, str]:
    given = {}
    for part in query.split("&") if query else ():
        name, equals, value = part.partition("=")
        if not equals:
            # It is not shown: it may be the rest of a password that has an '&' in it.
            raise ValueError("behind the ? of the database url, write name=value&name=value")
        given[unquote(name)] = unquote(value)
    return {name: value for name, value in given.items() if value}


def _translate(given: dict[str, str], *, has_host: bool) -> None:
    """Put libpq's other names, and those of other drivers that it takes, in asyncpg's words."""
    wanted = given.pop("ssl", None)
    if wanted is not None:
        if wanted not in (*YES, *NO, *TLS_MODES):
            raise ValueError("the parameter ssl of the database url: write sslmode=require instead")
        mode = "require" if wanted in YES else "disable" if wanted in NO else wanted
        given.setdefault("sslmode", mode)
    if given.get("requiressl") == "1":
        given.setdefault("sslmode", "require")
    name = given.pop("fallback_application_name", None)
    if name is not None:
        given.setdefault("application_name", name)
    if "hostaddr" in given and not (has_host or "host" in given):
        given["host"] = given.pop("hostaddr")


def _check(given: Mapping[str, str]) -> None:
    for name, choices in CHOICES.items():
        value = given.get(name, choices[0])
        if value not in choices:
            known = ", ".join(choices)
            raise ValueError(f"{name}={value} in the database url: choose one of {known}")
    if given.get("sslrootcert") == "system" and given.get("sslmode") not in (None, "verify-full"):
        raise ValueError("sslrootcert=system in the database url needs sslmode=verify-full")
    for port in given["port"].split(",") if "port" in given else ():
        _require_port(port)


def _require_port(port: str) -> None:
    # It is not shown: where the '@' is missing, it is the password.
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(
            f"the port of the database url is no number from 1 to 65535: it is like {EXAMPLE}"
        )


def _whole_number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name}={value} in the database url: give whole seconds") from None
