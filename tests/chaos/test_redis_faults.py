"""Redis servers that die, stall, are full or are cut off, under eight processes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections import Counter

import pytest
from counting import PROCESSES, SLACK, TIMEOUT, Load
from processes import Child, Gate, wait_until

from hornbeam_state import StoreFull, StoreUnavailable, open_store

pytestmark = pytest.mark.slow

KEPT = 30


def test_a_server_that_dies_and_comes_back(make_server, tmp_path, tell):
    """Killed six times under load; it keeps a log of every write, so nothing may be missing."""
    server = make_server("--appendonly", "yes", "--appendfsync", "always")
    load = Load(server.url)
    for _ in range(6):
        load.runs()
        server.stop()
        time.sleep(0.2)  # the scenario: some calls find nobody there
        server.start()
    load.runs()
    tell(load.check())


@pytest.mark.parametrize("how", ["sleep", "pause", "stop"])
def test_a_server_that_is_too_slow(make_server, how, tell):
    """Longer than a call may take, again and again."""
    server = make_server("--enable-debug-command", "yes")
    load = Load(server.url)
    for _ in range(6):
        load.runs()
        with server.admin(socket_timeout=10) as admin:
            if how == "sleep":
                admin.execute_command("DEBUG", "SLEEP", 3 * TIMEOUT)
            elif how == "pause":
                admin.client_pause(int(3000 * TIMEOUT), all=True)
                time.sleep(3 * TIMEOUT)
            else:
                server.stall()
                time.sleep(3 * TIMEOUT)
                server.resume()
    load.runs()
    tell(load.check())


def fill_up(note, url: str, gate: Gate, seed: int) -> dict:
    """Fill the server, and go on when it is told to."""
    outcomes = Counter()
    store = open_store(url, timeout=5)
    cache = store.space("cache")
    full = 0
    for number in range(100_000):
        try:
            store.set(f"fill/{seed}/{number}", bytes(20_000))
            cache.set(f"fill/{seed}/{number}", bytes(20_000))
            outcomes["set"] += 1
        except StoreFull:
            full += 1
            if full == 20:
                break
    for call, *args in ((store.incr, "n"), (cache.add, f"{seed}", bytes(20_000))):
        try:
            call(*args)
            outcomes["written when full"] += 1
        except StoreFull:
            outcomes["full"] += 1
    assert store.get(f"fill/{seed}/0") == bytes(20_000)
    note("full")
    gate.wait()
    for number in range(outcomes["set"]):
        store.delete(f"fill/{seed}/{number}")
    deadline = time.monotonic() + 20
    while True:
        try:
            store.incr("after")
            return outcomes
        except StoreFull:  # the others have not freed theirs yet
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_server_out_of_memory(make_server, tell):
    """Eight processes fill it: `StoreFull`; reading and deleting go on, and with room, writing."""
    server = make_server("--maxmemory", "20mb", "--maxmemory-policy", "noeviction")
    gate = Gate()
    children = [Child(fill_up, server.url, gate, seed) for seed in range(PROCESSES)]
    for child in children:
        wait_until(lambda child=child: child.notes() == ["full"], "it is full")
    gate.open()
    total = sum((Counter(child.value()) for child in children), Counter())
    gate.close()
    assert total["full"] > 0
    store = open_store(server.url, timeout=5)
    assert store.get("after") == PROCESSES
    store.close()
    tell(dict(total))


class Proxy:
    """Passes TCP connections on, until it is told to let them rest without a word."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._deaf: set[threading.Event] = set()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._current = threading.Event()
        self._closed = False
        self.connections = 0
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._start(self._accept)

    def go_deaf(self) -> None:
        """Forward nothing any more on the connections there are; new ones are served."""
        self._current.set()
        self._current = threading.Event()

    def close(self) -> None:
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in self._sockets:
            one.close()

    def _start(self, work, *args) -> None:
        self._threads.append(threading.Thread(target=work, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self.connections += 1
            self._sockets += [client, server]
            self._start(self._forward, client, server, self._current)
            self._start(self._forward, server, client, self._current)

    def _forward(self, source, target, deaf: threading.Event) -> None:
        try:
            while data := source.recv(65536):
                if not deaf.is_set():
                    target.sendall(data)
            if not deaf.is_set():
                target.shutdown(socket.SHUT_WR)
        except OSError:
            pass


@pytest.fixture
def make_proxy():
    """Return what puts a proxy in front of a server."""
    proxies = []

    def make(server) -> Proxy:
        proxies.append(Proxy(server.port))
        return proxies[-1]

    yield make
    for proxy in proxies:
        proxy.close()


def test_connections_that_are_cut_off_without_a_word(make_server, make_proxy, tell):
    """As when a firewall forgets them: calls fail in time, and new connections are made."""
    server = make_server()
    proxy = make_proxy(server)
    load = Load(proxy.url)
    for _ in range(6):
        load.runs()
        proxy.go_deaf()
    load.runs()
    tell(load.check(server.url))


async def count_at_once(store, twin: str) -> None:
    """Make it keep `KEPT` connections: so many calls wait for each other's end."""
    if twin == "async":
        await asyncio.gather(*(store.aincr("n") for _ in range(KEPT)))
        return
    together = threading.Barrier(KEPT)

    def count() -> None:
        together.wait(10)
        for _ in range(20):
            store.incr("n")

    threads = [threading.Thread(target=count) for _ in range(KEPT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("twin", ["sync", "async"])
def test_idle_connections_that_were_cut_off(make_server, make_proxy, twin, tell):
    """When one of those kept turns out dead, the others are not found dead one by one."""
    proxy = make_proxy(make_server())
    store = open_store(proxy.url, timeout=TIMEOUT)

    async def main() -> tuple[float, int]:
        await count_at_once(store, twin)
        proxy.go_deaf()
        started, failed, answered = time.monotonic(), 0, 0
        while answered < 100 and time.monotonic() < started + 60:
            try:
                _ = await store.aget("n") if twin == "async" else store.get("n")
                answered += 1
            except StoreUnavailable:
                failed += 1
                await asyncio.sleep(0.01)
        await store.aclose()
        return time.monotonic() - started, failed

    took, failed = asyncio.run(main())
    tell(f"{proxy.connections} connections; answers again after {took:.2f} s, {failed} failures")
    assert proxy.connections > KEPT // 2
    assert failed <= 3
    assert took < TIMEOUT + SLACK
