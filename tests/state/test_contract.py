"""One contract, every backend."""

from __future__ import annotations

import tempfile

import pytest

from hornbeam_state.backends.redis.backend import RedisBackend
from hornbeam_state.config import StoreConfig
from hornbeam_state.testing import BackendContract, FaultyBackend, ManualClock


class TestEmbedded(BackendContract):
    """LMDB files in a directory, by a clock of the test's own."""

    @pytest.fixture
    def backend(self, tmp_path):
        embedded = pytest.importorskip("hornbeam_state.backends.embedded.backend")
        self.clock = ManualClock()
        config = StoreConfig.from_url(f"lmdb://{tmp_path}/store", timeout=10)
        backend = self.wrapped(embedded.EmbeddedBackend(config, clock=self.clock))
        yield backend
        backend.close()

    def wrapped(self, backend):
        return backend

    def elapse(self, seconds):
        self.clock.advance(seconds)


class TestFaultless(TestEmbedded):
    """The same, within a `FaultyBackend` that was given no faults."""

    def wrapped(self, backend):
        return FaultyBackend(backend)


class _OverServer(BackendContract):
    @pytest.fixture(autouse=True)
    def directories_go_with_the_test(self, monkeypatch, tmp_path):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def open(self, url):
        return RedisBackend(StoreConfig.from_url(url, timeout=10))


class TestValkeyOverTcp(_OverServer):
    """A real Valkey server."""

    @pytest.fixture
    def backend(self, valkey):
        backend = self.open(valkey.url)
        yield backend
        backend.close()


class TestValkeyOverUnixSocket(_OverServer):
    """The same, nearer."""

    @pytest.fixture
    def backend(self, valkey):
        backend = self.open(valkey.unix_url)
        yield backend
        backend.close()


class TestRedis(_OverServer):
    """A real Redis server, of the oldest version at hand."""

    @pytest.fixture
    def backend(self, redis_server):
        backend = self.open(redis_server.url)
        yield backend
        backend.close()


class TestCluster(_OverServer):
    """A Cluster of three primaries."""

    @pytest.fixture
    def backend(self, cluster):
        backend = self.open(cluster.url)
        yield backend
        backend.close()


class TestSentinel(_OverServer):
    """A primary that sentinels name."""

    @pytest.fixture
    def backend(self, watched):
        backend = self.open(watched.url)
        yield backend
        backend.close()
