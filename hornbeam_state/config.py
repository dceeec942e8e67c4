"""Where the shared store is: parsing and validation of store URLs."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB: Final = 1024 * 1024
DEFAULT_DIRECTORY: Final = ".hornbeam"
SENTINEL_PORT: Final = 26379
CLUSTER_PORT: Final = 6379
_LIST_PORTS: Final = {  # of schemes that are followed by a list of hosts
    "redis+sentinel": SENTINEL_PORT,
    "rediss+sentinel": SENTINEL_PORT,
    "redis+cluster": CLUSTER_PORT,
    "rediss+cluster": CLUSTER_PORT,
}
REDIS_SCHEMES: Final = ("redis", "rediss", "unix", *_LIST_PORTS)
_EXAMPLES: Final = (
    "lmdb:///absolute/directory, redis://host:6379/0, rediss://host:6379/0, "
    "unix:///path/to/redis.sock, redis+sentinel://host:26379,host:26379/service/0, "
    "redis+cluster://host:6379,host:6379, memory://"
)
_OPTIONS: Final[dict[str, type]] = {
    "timeout": float,
    "state_size": int,
    "cache_size": int,
    "near_size": int,
    "durability": str,
    "snapshot_every": float,
}
_LARGEST_FILE: Final = 32 * 1024 * 1024 * MIB  # both are mapped, into the 128 TiB of a process
_PLAIN_TEXT: Final = re.compile(r"[\w .+-]*")
_ADDRESS: Final = re.compile(r"(\[[^\[\]]+\]|[^\[\]:]+)(:.*)?")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """A validated description of one store.

    Attributes:
        scheme: ``lmdb``, ``memory``, ``redis``, ``rediss``, ``unix``, ``redis+sentinel``,
            ``rediss+sentinel``, ``redis+cluster`` or ``rediss+cluster``.
        url: The URL without hornbeam's own options. It may hold a password, so it is left out
            of the representation; `safe_url` is for messages.
        hosts: Names and ports of the sentinels, or of some nodes of the cluster.
        service: What the sentinels call the primary and its replicas.
        path: Directory of an embedded store.
        fallback: Whether an unwritable `path` may be replaced by a temporary directory. True
            only for the default path, which nobody asked for by name.
        timeout: Seconds a call waits for a server, or for another writer, before
            `StoreUnavailable`.
        state_size: Most bytes the state file of an embedded store may grow to.
        cache_size: Most bytes the cache file of an embedded store may grow to.
        near_size: Most bytes of what was read from the cache on a server that each process keeps
            in its own memory; 0 to ask the server every time.
        durability: What a write to an embedded store survives: ``process`` (the death of any
            process; a power failure may cost what came after the last snapshot) or ``commit``
            (power failures too: every write waits for the disk).
        snapshot_every: Seconds between two snapshots of an embedded store that is written to;
            0 for none.

    Raises:
        ConfigError: a value makes no sense; the message says which and what to write instead.
    """

    scheme: str
    url: str = field(repr=False)
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    path: Path | None = None
    fallback: bool = False
    timeout: float = 1.0
    state_size: int = 64 * 1024 * MIB
    cache_size: int = 1024 * MIB
    near_size: int = 32 * MIB
    durability: str = "process"
    snapshot_every: float = 300.0

    def __post_init__(self) -> None:
        """Check that every value is usable."""
        if not (math.isfinite(self.timeout) and 0 < self.timeout <= 60):  # noqa: PLR2004
            raise ConfigError(f"store timeout={self.timeout}: give seconds above 0, at most 60")
        for name in ("state_size", "cache_size"):
            if not MIB <= getattr(self, name) <= _LARGEST_FILE:
                raise ConfigError(
                    f"store {name}={getattr(self, name)}: give {MIB} to {_LARGEST_FILE} bytes"
                )
        if not 0 <= self.near_size <= _LARGEST_FILE:
            raise ConfigError(
                f"store near_size={self.near_size}: give at most {_LARGEST_FILE} bytes, or 0"
            )
        if self.durability not in ("process", "commit"):
            raise ConfigError(f"store durability={self.durability!r}: give process or commit")
        if not (math.isfinite(self.snapshot_every) and self.snapshot_every >= 0):
            raise ConfigError(f"store snapshot_every={self.snapshot_every}: give seconds, or 0")
        if self.scheme == "lmdb" and (self.path is None or not self.path.is_absolute()):
            raise ConfigError(
                f"store path {str(self.path or '')!r} is not absolute: write three slashes, "
                f"as in lmdb:///var/lib/myapp"
            )

    @property
    def safe_url(self) -> str:
        """The URL with ``***`` for whatever may be a secret, for messages."""
        parts = _parts(self.url)
        login, at, address = parts.netloc.rpartition("@")
        user, colon, _ = login.partition(":")
        shown = f"{user}:***" if colon else "***" * bool(at)  # a lone word may be a password
        options = [
            (name, value if name == "db" else "***") for name, value in _options(parts.query)
        ]
        return _joined(
            parts._replace(netloc=f"{shown}{at}{address}", query=urlencode(options, safe="*"))
        )

    @classmethod
    def from_url(cls, url: str, **options: Any) -> StoreConfig:
        """Parse a store URL.

        Args:
            url: One of the forms in the docs, such as ``lmdb:///var/lib/app`` or
                ``redis://host:6379/0``; ``timeout`` and the other options may follow as a query.
                What stands for itself there is escaped as in any URL: ``#`` as ``%23``, and in a
                password also ``/``, ``?`` and ``@``.
            **options: The same options as keywords; they win over the query.

        Raises:
            ConfigError: the URL or an option is wrong.
        """
        scheme = _scheme(url)
        parts = _split(url)
        query = dict(_options(parts.query))
        own = {name: query.pop(name) for name in list(query) if name in _OPTIONS}
        place = _server(parts, query) if scheme in REDIS_SCHEMES else _local(parts, query)
        return cls(scheme=scheme, **place, **_converted({**own, **options}))

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> StoreConfig:
        """Return the store that ``HORNBEAM_STORE`` names.

        Without it: an embedded store in ``.hornbeam/`` of the working directory.

        Raises:
            ConfigError: the variable is set to something that is no store URL.
        """
        url = (os.environ if environ is None else environ).get("HORNBEAM_STORE", "")
        if url:
            try:
                return cls.from_url(url)
            except ConfigError as error:
                raise ConfigError(f"HORNBEAM_STORE: {error}") from None
        path = _working_directory() / DEFAULT_DIRECTORY
        return cls(scheme="lmdb", url=_directory_url(path), path=path, fallback=True)


def _scheme(url: str) -> str:
    if not isinstance(url, str):
        raise ConfigError(
            f"store URL is of type {type(url).__qualname__} and has no scheme: give a str, one of "
            f"{_EXAMPLES}"
        )
    scheme, separator, _ = url.partition("://")
    if not separator:
        raise ConfigError(f"store URL has no scheme: use one of {_EXAMPLES}")
    if scheme not in ("lmdb", "memory", *REDIS_SCHEMES):
        raise ConfigError(f"store URL scheme {_shown(scheme)} is not known: use one of {_EXAMPLES}")
    return scheme


def _shown(text: str) -> str:
    """Quote a part of a bad URL, unless it may hold a password."""
    return repr(text) if _PLAIN_TEXT.fullmatch(text) else "(not shown: it may hold a password)"


def _split(url: str) -> SplitResult:
    """Take a URL apart, and refuse what `urlsplit` would drop without a word."""
    if "#" in url:
        raise ConfigError("store URL: a # would cut off what follows: write %23")
    if re.search(r"[\x00-\x1f\x7f]|%00", url):
        raise ConfigError("store URL: remove the control character, such as NUL or a line end")
    try:
        return _parts(url)
    except ValueError:  # it quotes the URL, so it is not passed on
        raise ConfigError(
            "store URL: the host is malformed: write [ and ] only around an IPv6 address (in a "
            "password %5B and %5D), and no characters that stand for / ? # @ or :"
        ) from None


def _parts(url: str) -> SplitResult:
    """Take a URL apart, also one with a list of hosts, which `urlsplit` does not know."""
    scheme, _, rest = url.partition("://")
    if scheme not in _LIST_PORTS:
        return urlsplit(url)
    place, _, query = rest.partition("?")
    hosts, slash, path = place.partition("/")
    return SplitResult(scheme, hosts, slash + path, query, "")


def _options(query: str) -> list[tuple[str, str]]:
    return parse_qsl(query, keep_blank_values=True)


def _local(parts: SplitResult, query: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that say where an embedded store is."""
    if parts.scheme == "memory" and (parts.netloc or parts.path):
        raise ConfigError("store URL: memory:// has no host and no path: write nothing after it")
    if parts.netloc:
        written = parts.netloc + parts.path
        example = "var/lib/myapp" if re.search("[:@]", written) else written
        raise ConfigError(
            f"store URL names a host, but an embedded store is local: write three slashes, as in "
            f"lmdb:///{example}"
        )
    if query:
        raise ConfigError(
            f"store URL option {_shown(next(iter(query)))} is not known: use {', '.join(_OPTIONS)}"
        )
    if parts.scheme == "memory":
        return {"url": "memory://"}
    path = Path(unquote(parts.path, errors="surrogateescape"))
    return {"url": _directory_url(path), "path": path}


def _directory_url(path: Path) -> str:
    return f"lmdb://{quote(os.fsencode(path))}"


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except OSError as error:
        raise ConfigError(
            f"the working directory, where the default store lies, cannot be used "
            f"({error.strerror}): set HORNBEAM_STORE to one of {_EXAMPLES}"
        ) from error


def _server(parts: SplitResult, query: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields that say where a server is."""
    _check_login(parts)
    place: dict[str, Any] = {"url": _joined(parts._replace(query=urlencode(query)))}
    if parts.scheme == "unix":
        _check_socket(parts)
    elif parts.scheme not in _LIST_PORTS:
        _check_address(parts)
        _check_database(parts.path.strip("/"))
    else:
        place["hosts"] = _hosts(parts)
        if parts.scheme.endswith("+sentinel"):
            place["service"] = _service(parts)
        else:
            _check_cluster(parts, query)
    return place


def _check_login(parts: SplitResult) -> None:
    """Refuse a password that was cut in two, before any message shows its second half."""
    if "@" in parts.path + parts.query:
        raise ConfigError(
            "store URL: an @ follows the host: in a password write %2F for /, %3F for ? and %40 "
            "for @, elsewhere %40 for @"
        )
    try:
        _joined(parts).encode()
    except UnicodeEncodeError:  # it quotes the URL, so it is not passed on
        raise ConfigError("store URL is not UTF-8: write such bytes as %FF") from None


def _check_socket(parts: SplitResult) -> None:
    if not parts.path.strip("/") or parts.netloc.rpartition("@")[2]:
        raise ConfigError("store URL names no socket: write unix:///path/to/redis.sock")


def _check_address(parts: SplitResult) -> None:
    try:
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        port_is_valid = False
    if not port_is_valid:
        raise ConfigError("store URL: the port is not a number from 1 to 65535")
    if not _ADDRESS.fullmatch(parts.netloc.rpartition("@")[2]):
        raise ConfigError(
            f"store URL names no host: write {parts.scheme}://host:6379/0, or [::1] for the host"
        )


def _check_database(database: str) -> None:
    if not re.fullmatch("[0-9]{0,9}", database):
        raise ConfigError(
            f"store URL: database {_shown(database)} is not a number that Redis takes; write .../0"
        )


def _hosts(parts: SplitResult) -> tuple[tuple[str, int], ...]:
    """Return the names and ports of a list of hosts."""
    login, at, hosts = parts.netloc.rpartition("@")
    if "@" in login:
        raise ConfigError(
            "store URL: more than one @: write user and password once, before the first host, and "
            "in a password %40 for @"
        )
    found = []
    for host in hosts.split(","):
        single = _split(f"redis://{login}{at}{host}")
        _check_address(single._replace(scheme=parts.scheme))
        found.append((unquote(single.hostname or ""), single.port or _LIST_PORTS[parts.scheme]))
    return tuple(found)


def _service(parts: SplitResult) -> str:
    """Return the name of the service in ``/service`` or ``/service/0``."""
    service, _, database = parts.path.removeprefix("/").partition("/")
    if not service:
        raise ConfigError(
            f"store URL names no service: write {parts.scheme}://host:26379,host:26379/service/0"
        )
    _check_database(database.strip("/"))
    return unquote(service)


def _check_cluster(parts: SplitResult, query: Mapping[str, str]) -> None:
    database = query.get("db") or parts.path.strip("/")
    if database.strip("0"):
        raise ConfigError(
            f"store URL: a cluster has no database {_shown(database)}: write 0 or nothing"
        )


def _joined(parts: SplitResult) -> str:
    """Undo `urlsplit`; its own inverse forgets the slashes of an empty host."""
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}{parts.path}{query}"


def _converted(options: Mapping[str, Any]) -> dict[str, Any]:
    converted = {}
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ConfigError(f"store option {name!r} is not known: use {', '.join(_OPTIONS)}")
        try:
            converted[name] = _read(_OPTIONS[name], value)
        except (OverflowError, TypeError, ValueError):
            raise ConfigError(
                f"store option {name}={value!r} is not a number in plain digits"
            ) from None
    return converted


def _read(kind: type, value: Any) -> Any:
    if kind is not str and isinstance(value, str) and not value.isascii():
        raise ValueError("Python would read the digits of any script")
    return kind(value)
