"""Redis servers for tests: real ones in a process of their own, and one that says what it is told."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import socketserver
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry


class Server:
    """A server process on a free TCP port and a unix socket, that keeps nothing on disk."""

    def __init__(self, binary: str | Path, *options: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="hb-redis-"))
        self.port = free_port()
        self.socket = self.directory / "s"
        self._command = [
            str(binary),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket)),
            *("--dir", str(self.directory), "--save", "", "--appendonly", "no"),
            *("--loglevel", "warning", *map(str, options)),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> Server:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        try:
            with self.admin() as admin:
                wait_until(lambda: self._answers(admin), f"{self._command[0]} answers")
        except BaseException:
            self.close()
            raise
        return self

    def _answers(self, admin: redis.Redis) -> bool:
        if self.process.poll() is not None:
            pytest.fail(f"the server ended at once: {' '.join(self._command)}")
        try:
            return admin.ping()
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False

    def stop(self) -> None:
        """End the process, even one that is stalled."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stall(self) -> None:
        """Let the kernel go on accepting connections while the server answers nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def use_file(self, name: str) -> None:
        """Begin with an empty configuration file, which the server may rewrite."""
        path = self.directory / name
        path.touch()
        self._command.insert(1, str(path))

    def ask(self, *words):
        """Send one command and return the plain reply."""
        with self.admin(protocol=2) as admin:
            connection = admin.connection_pool.get_connection()
            try:
                connection.send_command(*words)
                return connection.read_response()
            finally:
                connection.disconnect()

    def role(self) -> bytes | None:
        """Return what the server says it is; None when it ends the connection, as on a change."""
        try:
            return self.ask("ROLE")[0]
        except redis.ConnectionError:
            return None

    def is_in_sync(self) -> bool:
        return b"master_link_status:up" in self.ask("INFO", "replication")

    def admin(self, **options) -> redis.Redis:
        """Return a plain client, for looking behind the backend's back."""
        options = {"retry": Retry(NoBackoff(), 0), **options}
        return redis.Redis(unix_socket_path=str(self.socket), **options)


class Cluster:
    """Primaries that share the slots, and replicas of them, without any tool beside the server.

    Once it is complete, nodes take another for dead after `node_timeout_ms`.
    """

    def __init__(
        self,
        binary: str | Path,
        *options: str,
        primaries: int = 3,
        replicas: int = 0,
        node_timeout_ms: int = 1000,
    ) -> None:
        self._node_timeout_ms = node_timeout_ms
        options = (
            *("--cluster-enabled", "yes", "--cluster-node-timeout", "1000"),  # talk often at first
            *("--repl-diskless-sync-delay", "0", *options),
        )
        self.nodes = [
            # The port of the cluster's own talk would be ours plus 10,000, which may be none.
            Server(binary, *options, "--cluster-port", free_port())
            for _ in range(primaries + replicas)
        ]
        self.primaries = self.nodes[:primaries]
        self.replicas = self.nodes[primaries:]

    @property
    def url(self) -> str:
        return url_of("redis+cluster", self.nodes)

    def start(self) -> Cluster:
        try:
            for node in self.nodes:
                node.start()
            self._share_slots()
            self._meet()
            self._replicate()
            for node in self.nodes:
                node.ask("CONFIG", "SET", "cluster-node-timeout", self._node_timeout_ms)
        except BaseException:
            self.close()
            raise
        return self

    def _share_slots(self) -> None:
        bounds = [16384 * n // len(self.primaries) for n in range(len(self.primaries) + 1)]
        for epoch, node in enumerate(self.nodes, 1):
            node.ask("CLUSTER", "SET-CONFIG-EPOCH", epoch)
        for node, low, high in zip(self.primaries, bounds, bounds[1:], strict=False):
            node.ask("CLUSTER", "ADDSLOTSRANGE", low, high - 1)

    def _meet(self) -> None:
        for node in self.nodes[1:]:
            bus = node.ask("CONFIG", "GET", "cluster-port")[1]
            self.nodes[0].ask("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait_until(lambda: all(map(self._is_complete, self.nodes)), "the nodes know each other")

    def _is_complete(self, node: Server) -> bool:
        known = f"cluster_known_nodes:{len(self.nodes)}\r".encode()
        info = node.ask("CLUSTER", "INFO")
        return known in info and b"cluster_state:ok" in info

    def _replicate(self) -> None:
        names = [node.ask("CLUSTER", "MYID") for node in self.primaries]
        for number, replica in enumerate(self.replicas):
            replica.ask("CLUSTER", "REPLICATE", names[number % len(names)])
        wait_until(lambda: all(node.is_in_sync() for node in self.replicas), "they replicate")
        served = set(names[: len(self.replicas)])
        wait_until(
            lambda: all(
                node.ask("CLUSTER", "REPLICAS", name) for node in self.nodes for name in served
            ),
            "all know of the replicas",
        )

    def owner(self, slot: int) -> Server:
        """Return the primary that says of itself that it serves the slot."""
        for node in self.nodes:
            if node.process is None:
                continue
            name = node.ask("CLUSTER", "MYID")
            for low, high, primary, *_ in node.ask("CLUSTER", "SLOTS"):
                if low <= slot <= high and primary[2] == name:
                    return node
        raise LookupError(slot)

    def move(self, slot: int, target: Server) -> None:
        """Move a slot with all of its keys, as an operator's tool does."""
        source = self.owner(slot)
        self.begin_move(slot, source, target)
        self.move_keys(slot, source, target)
        self.end_move(slot, source, target)

    def begin_move(self, slot: int, source: Server, target: Server) -> None:
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source.ask("CLUSTER", "MYID"))
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target.ask("CLUSTER", "MYID"))

    def move_keys(self, slot: int, source: Server, target: Server) -> None:
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 10):
            source.ask("MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *keys)

    def end_move(self, slot: int, source: Server, target: Server) -> None:
        name = target.ask("CLUSTER", "MYID")
        for node in (target, source, *(set(self.primaries) - {target, source})):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", name)

    def flush(self) -> None:
        for node in self.primaries:
            node.ask("FLUSHALL")

    def close(self) -> None:
        for node in self.nodes:
            node.close()


class Watched:
    """A primary and its replica, watched by sentinels."""

    service = "shop"

    def __init__(
        self, binary: str | Path, *options: str, sentinels: int = 3, down_after_ms: int = 500
    ) -> None:
        self._binary = binary
        self._down_after_ms = down_after_ms
        delay = ("--repl-diskless-sync-delay", "0")
        self.servers = [Server(binary, *delay, *options) for _ in range(2)]
        self.sentinels = [Server(binary, "--sentinel") for _ in range(sentinels)]

    @property
    def url(self) -> str:
        return f"{url_of('redis+sentinel', self.sentinels)}/{self.service}"

    def start(self) -> Watched:
        first, second = self.servers
        try:
            for server in self.servers:
                server.start()
            second.ask("REPLICAOF", "127.0.0.1", first.port)
            wait_until(second.is_in_sync, "it replicates")
            for sentinel in self.sentinels:
                self._watch(sentinel, first)
            wait_until(lambda: all(map(self._knows_all, self.sentinels)), "the sentinels are ready")
        except BaseException:
            self.close()
            raise
        return self

    def _watch(self, sentinel: Server, primary: Server) -> None:
        settings = {
            "down-after-milliseconds": self._down_after_ms,
            "failover-timeout": 3000,
        }
        sentinel.use_file("sentinel.conf")
        sentinel.start()
        quorum = len(self.sentinels) // 2 + 1
        sentinel.ask("SENTINEL", "MONITOR", self.service, "127.0.0.1", primary.port, quorum)
        for name, value in settings.items():
            sentinel.ask("SENTINEL", "SET", self.service, name, value)

    def _knows_all(self, sentinel: Server) -> bool:
        told = sentinel.ask("SENTINEL", "MASTER", self.service)
        fields = dict(zip(told[::2], told[1::2], strict=True))
        others = int(fields[b"num-other-sentinels"])
        return others == len(self.sentinels) - 1 and fields[b"num-slaves"] == b"1"

    @property
    def primary(self) -> Server:
        """The server that the first sentinel names."""
        _, port = self.sentinels[0].ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.service)
        return next(server for server in self.servers if server.port == int(port))

    @property
    def replica(self) -> Server:
        return next(server for server in self.servers if server is not self.primary)

    def fail_over(self) -> None:
        """Have the sentinels promote the replica; the old primary learns of it seconds later."""
        old, new = self.primary, self.replica
        wait_until(self._accepts_failover, "the sentinels agree to a failover")
        wait_until(lambda: new.role() == b"master", "the replica is promoted")
        wait_until(lambda: self.primary is new, "the sentinel names it")
        assert old.role() == b"master"

    def _accepts_failover(self) -> bool:
        try:
            return self.sentinels[0].ask("SENTINEL", "FAILOVER", self.service) == b"OK"
        except redis.ResponseError:  # the replica's state is not known yet, or one is under way
            return False

    def close(self) -> None:
        for server in (*self.sentinels, *self.servers):
            server.close()


def url_of(scheme: str, servers) -> str:
    return f"{scheme}://{','.join(f'127.0.0.1:{server.port}' for server in servers)}"


class FakeServer:
    """A TCP server whose `reply` is asked what to answer to each piece of data that arrives.

    `reply` takes the number of the connection (1 is the first) and the data, and returns bytes to
    send, or None to close the connection.
    """

    def __init__(self, reply) -> None:
        self.requests: list[bytes] = []
        self._connections = 0
        self._handlers: dict[threading.Thread, socket.socket] = {}
        fake = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                fake._connections += 1
                number = fake._connections
                fake._handlers[threading.current_thread()] = self.request
                while data := self.request.recv(65536):
                    fake.requests.append(data)
                    answer = reply(number, data)
                    if answer is None:
                        return
                    self.request.sendall(answer)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"redis://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for thread, connection in self._handlers.items():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(10)


def wait_until(condition, what: str, timeout: float = 20.0) -> None:
    """Poll until the condition holds; fail the test when it does not."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {timeout} s in vain until {what}")
        time.sleep(0.002)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
