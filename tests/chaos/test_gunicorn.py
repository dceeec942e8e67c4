"""A preloaded gunicorn of sixteen workers that come, go and are killed under load."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from gunicorn_process import Gunicorn
from processes import Child

from hornbeam_state import open_store

pytestmark = pytest.mark.slow

SECONDS = 60.0
WORKERS = 16
CLIENTS = 12
PATIENCE = 30.0
"""Seconds after which an answer counts as never coming."""

APP = """
from bare_asgi import live, respond
from hornbeam_state import astate_incr, state_incr

def wsgi(environ, start_response):
    body = b"%d" % state_incr("n")
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        return await live(receive, send)
    await respond(send, b"%d" % await astate_incr("n"))
"""


class Client(threading.Thread):
    """Asks one thing after another over a connection that it keeps for as long as it holds."""

    def __init__(self, url: str, stop: threading.Event) -> None:
        super().__init__()
        self.numbers: list[int] = []
        self.broken = 0
        self.longest = 0.0
        self.wrong: list[str] = []
        self._address = urlsplit(url).netloc
        self._stop_asking = stop

    def run(self) -> None:
        connection = HTTPConnection(self._address, timeout=PATIENCE)
        while not self._stop_asking.is_set():
            started = time.monotonic()
            try:
                connection.request("GET", "/")
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, HTTPException) as error:  # its worker was killed, or it just closed
                self.broken += 1
                if isinstance(error, TimeoutError):
                    self.wrong.append(f"no answer in {PATIENCE} s")
                connection.close()
                time.sleep(0.01)
                continue
            finally:
                self.longest = max(self.longest, time.monotonic() - started)
            if answer.status == 200:
                self.numbers.append(int(body))
            else:
                self.wrong.append(f"{answer.status} {body[:200]!r}")
        connection.close()


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def slots(_note, url: str) -> int:
    """Return how many reader slots are taken, once those of the dead are given back."""
    environment = open_store(url).backend.opened().state.environment
    return sum(line.split()[0].isdigit() for line in environment.readers().splitlines())


@pytest.mark.parametrize("kind", ["asgi", "wsgi"])
def test_every_answer_counted_once(tmp_path, kind, tell):
    """Workers end after some requests, and some are killed: no count is lost, nobody waits."""
    (tmp_path / "app.py").write_text(APP)
    url = f"lmdb://{tmp_path}/store"
    dice = random.Random(16)
    stop = threading.Event()
    options = ("--preload", "--workers", str(WORKERS), "--max-requests", "200")
    with Gunicorn(
        f"app:{kind}",
        *options,
        *("--max-requests-jitter", "50"),
        cwd=tmp_path,
        env={"HORNBEAM_STORE": url},
    ) as server:
        server.until(lambda: len(server.workers()) == WORKERS, "all workers", 60)
        server.ready(60)
        open_before = descriptors(server.pid)
        clients = [Client(server.url, stop) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        killed, seen, end = 0, set(), time.monotonic() + SECONDS
        while time.monotonic() < end:
            seen |= server.workers()
            time.sleep(dice.uniform(0.5, 1.5))
            os.kill(dice.choice(sorted(server.workers())), signal.SIGKILL)
            killed += 1
        stop.set()
        for client in clients:
            client.join(PATIENCE + 10)
        assert not any(client.is_alive() for client in clients)
        server.until(lambda: len(server.workers()) == WORKERS, "all workers", 60)
        server.until(lambda: descriptors(server.pid) <= open_before, "no more descriptors")
        taken = Child(slots, url).value()
        server.send(signal.SIGTERM)
        assert server.end(60) == 0

    numbers = sorted(number for client in clients for number in client.numbers)
    broken = sum(client.broken for client in clients)
    wrong = [text for client in clients for text in client.wrong]
    counted = Child(lambda _note: open_store(url).get("n")).value()
    tell(
        f"{len(numbers)} answers, {broken} broken connections, counter {counted}, {killed} workers "
        f"killed, {len(seen)} seen, longest answer {max(c.longest for c in clients):.2f} s, "
        f"{taken} reader slots, {open_before} descriptors in the master before and after"
    )
    assert wrong == []
    assert len(set(numbers)) == len(numbers), "one number was handed out twice"
    assert len(numbers) + 1 <= counted <= len(numbers) + broken + 1  # one more to see it ready
    assert len(seen) > 2 * WORKERS
    assert taken <= WORKERS * 2
