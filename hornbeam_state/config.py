"""Where the shared store is: parsing and validation of store URLs."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB: Final = 1024 * 1024
DEFAULT_DIRECTORY: Final = ".hornbeam"
REDIS_SCHEMES: Final = ("redis", "rediss", "unix")
_EXAMPLES: Final = (
    "lmdb:///absolute/directory, redis://host:6379/0, rediss://host:6379/0, "
    "unix:///path/to/redis.sock, memory://"
)
_OPTIONS: Final[dict[str, type]] = {
    "timeout": float,
    "state_size": int,
    "cache_size": int,
    "durability": str,
    "snapshot_every": float,
}


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """A validated description of one store.

    Attributes:
        scheme: ``lmdb``, ``memory``, ``redis``, ``rediss`` or ``unix``.
        url: The URL without hornbeam's own options. It may hold a password, so it is left out
            of the representation; `safe_url` is for messages.
        path: Directory of an embedded store.
        fallback: Whether an unwritable `path` may be replaced by a temporary directory. True
            only for the default path, which nobody asked for by name.
        timeout: Seconds a call waits for a server, or for another writer, before
            `StoreUnavailable`.
        state_size: Most bytes the state file of an embedded store may grow to.
        cache_size: Most bytes the cache file of an embedded store may grow to.
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
    path: Path | None = None
    fallback: bool = False
    timeout: float = 1.0
    state_size: int = 64 * 1024 * MIB
    cache_size: int = 1024 * MIB
    durability: str = "process"
    snapshot_every: float = 300.0

    def __post_init__(self) -> None:
        """Check that every value is usable."""
        if not (math.isfinite(self.timeout) and 0 < self.timeout <= 60):  # noqa: PLR2004
            raise ConfigError(f"store timeout={self.timeout}: give seconds above 0, at most 60")
        for name in ("state_size", "cache_size"):
            if getattr(self, name) < MIB:
                raise ConfigError(f"store {name}={getattr(self, name)}: give at least {MIB} bytes")
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
        """The URL with any password replaced by ``***``."""
        parts = urlsplit(self.url)
        query = re.sub(r"(^|&)([^&=]*password)=[^&]*", r"\1\2=***", parts.query)
        netloc = parts.netloc
        if parts.password is not None:
            netloc = f"{parts.username or ''}:***@{netloc.rpartition('@')[2]}"
        return _joined(parts._replace(netloc=netloc, query=query))

    @classmethod
    def from_url(cls, url: str, **options: Any) -> StoreConfig:
        """Parse a store URL.

        Args:
            url: One of the forms in the docs, such as ``lmdb:///var/lib/app`` or
                ``redis://host:6379/0``; ``timeout``, ``state_size`` and ``cache_size`` may
                follow as a query.
            **options: The same options as keywords; they win over the query.

        Raises:
            ConfigError: the URL or an option is wrong.
        """
        if not isinstance(url, str) or "://" not in url:
            raise ConfigError(f"store URL {_masked(url)} has no scheme: use one of {_EXAMPLES}")
        scheme = url.partition("://")[0]
        if scheme not in ("lmdb", "memory", *REDIS_SCHEMES):
            raise ConfigError(f"store URL scheme {scheme!r} is not known: use one of {_EXAMPLES}")
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        own = {name: query.pop(name) for name in list(query) if name in _OPTIONS}
        if scheme in REDIS_SCHEMES:
            rest = parts._replace(query=urlencode(query))
            config = cls(scheme=scheme, url=_checked_redis_url(rest))
        elif query:
            raise ConfigError(
                f"store URL option {next(iter(query))!r} is not known: use {', '.join(_OPTIONS)}"
            )
        elif scheme == "memory":
            config = cls(scheme=scheme, url="memory://")
        else:
            if parts.netloc:
                raise ConfigError(
                    f"store URL {url!r} names a host ({parts.netloc!r}), but an embedded store is "
                    f"local: write three slashes, as in lmdb:///{parts.netloc}{parts.path}"
                )
            path = Path(unquote(parts.path))
            config = cls(scheme=scheme, url=f"lmdb://{path}", path=path)
        return replace(config, **_converted({**own, **options}))

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
        path = Path.cwd() / DEFAULT_DIRECTORY
        return cls(scheme="lmdb", url=f"lmdb://{path}", path=path, fallback=True)


def _masked(url: object) -> str:
    """Show a malformed URL without what may be a password in it."""
    return repr(url) if "@" not in str(url) else "(hidden, since it may hold a password)"


def _checked_redis_url(parts: Any) -> str:
    try:
        port_is_valid = parts.port is None or parts.port > 0
    except ValueError:
        port_is_valid = False
    if not port_is_valid:
        raise ConfigError("store URL: the port is not a number from 1 to 65535")
    if parts.scheme != "unix" and not parts.hostname:
        raise ConfigError(f"store URL names no host: write {parts.scheme}://host:6379/0")
    if parts.scheme == "unix" and not parts.path.strip("/"):
        raise ConfigError("store URL names no socket: write unix:///path/to/redis.sock")
    database = parts.path.strip("/")
    if parts.scheme != "unix" and database and not database.isdigit():
        raise ConfigError(f"store URL: database {database!r} is not a number; write .../0")
    return _joined(parts)


def _joined(parts: SplitResult) -> str:
    """Undo `urlsplit`; its inverse forgets the slashes of an empty host in ``unix:///path``."""
    scheme, _, rest = urlunsplit(parts).partition(":")
    return f"{scheme}://{rest.removeprefix('//')}"


def _converted(options: Mapping[str, Any]) -> dict[str, Any]:
    converted = {}
    for name, value in options.items():
        if name not in _OPTIONS:
            raise ConfigError(f"store option {name!r} is not known: use {', '.join(_OPTIONS)}")
        try:
            converted[name] = _OPTIONS[name](value)
        except (TypeError, ValueError):
            raise ConfigError(f"store option {name}={value!r} is not a number") from None
    return converted
