"""Redis servers for tests: real ones in a process of their own, and one that says what it is told."""

from __future__ import annotations

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

    def admin(self, **options) -> redis.Redis:
        """Return a plain client, for looking behind the backend's back."""
        options = {"retry": Retry(NoBackoff(), 0), **options}
        return redis.Redis(unix_socket_path=str(self.socket), **options)


class FakeServer:
    """A TCP server whose `reply` is asked what to answer to each piece of data that arrives.

    `reply` takes the number of the connection (1 is the first) and the data, and returns bytes to
    send, or None to close the connection.
    """

    def __init__(self, reply) -> None:
        self.requests: list[bytes] = []
        self._connections = 0
        fake = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                fake._connections += 1
                number = fake._connections
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


def wait_until(condition, what: str, timeout: float = 10.0) -> None:
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
