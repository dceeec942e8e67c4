"""A real gunicorn in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self, TypeVar

    T = TypeVar("T")

ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent  # whatever stands here, apps of tests may import
WORKER = "hornbeam_ml.worker.HornbeamWorker"
# What the tests' own environment says must not decide what a worker derives.
DECIDING = re.compile(r"HORNBEAM_|GUNICORN_|WEB_CONCURRENCY|\w+_NUM_THREADS$|VECLIB_")


def poll(check: Callable[[], T], what: str, seconds: float = 20.0) -> T:
    """Return the first true answer of `check`; fail with `what` when there is none in time."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds} s: {what}")
        time.sleep(0.02)
    return answer


def alive(pid: int) -> bool:
    """Tell whether a process runs, and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def without(directory: Path, *modules: str) -> str:
    """Return a ``PYTHONPATH`` with which modules cannot be imported, by files in a directory."""
    missing = directory / "missing"
    missing.mkdir()
    for module in modules:
        (missing / f"{module}.py").write_text("raise ImportError")
    return os.pathsep.join(map(str, (missing, ROOT, HELPERS)))


class Gunicorn:
    """One gunicorn on a free port of the loopback, ended with the `with` statement.

    Args:
        target: The app, ``module:name``.
        options: Further command line options of gunicorn.
        cwd: Its working directory, where the module is and where its log goes.
        env: Variables added to the environment.
        worker: The worker class.
    """

    program: tuple[str, ...] = ("-m", "gunicorn")
    """What Python runs."""

    def __init__(
        self,
        target: str,
        *options: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        worker: str = WORKER,
    ) -> None:
        inherited = {name: v for name, v in os.environ.items() if not DECIDING.match(name)}
        path = [*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT), str(HELPERS)]
        self._log_path = cwd / f"gunicorn-{time.monotonic_ns()}.log"
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, *self.program, "-k", worker, "-b", "127.0.0.1:0"),
                    *("--no-control-socket", *options, target),
                ],
                cwd=cwd,
                env={**inherited, "PYTHONPATH": os.pathsep.join(path), **(env or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        # Its session is its process group: workers without an arbiter are in it too.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    @property
    def pid(self) -> int:
        """The arbiter's pid."""
        return self.process.pid

    @property
    def log(self) -> str:
        """Everything logged so far."""
        return self._log_path.read_text(errors="replace")

    @property
    def url(self) -> str:
        """Where it listens; waits until it does, which is after an app that is preloaded."""
        return self.logged(r"Listening at: (http\S+) ", 60).group(1)

    def until(self, check: Callable[[], T], what: str, seconds: float = 20.0) -> T:
        """Like `poll`, showing the log on failure, and failing at once when gunicorn ended."""

        def checked() -> T:
            ended = self.process.poll() is not None
            answer = check()
            assert answer or not ended, f"gunicorn ended early: {what}\n{self.log}"
            return answer

        try:
            return poll(checked, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from None

    def logged(self, pattern: str, seconds: float = 20.0) -> re.Match[str]:
        """Wait for a line that matches."""
        return self.until(lambda: re.search(pattern, self.log), f"log {pattern!r}", seconds)

    def ready(self, seconds: float = 20.0, path: str = "/") -> Self:
        """Wait until a request is answered."""
        url = self.url

        def answered() -> bool:
            try:
                return httpx.get(url + path, timeout=seconds).status_code < 500
            except httpx.TransportError:
                return False

        self.until(answered, "ready", seconds)
        return self

    def get(self, path: str = "/", timeout: float = 20.0) -> httpx.Response:
        """Send one request over a connection of its own."""
        return httpx.get(self.url + path, timeout=timeout)

    def client(self, timeout: float = 20.0, *, keeps: bool = True) -> httpx.Client:
        """Return a client that keeps its connections, or makes one for each request.

        gunicorn closes a connection that was idle for 2 s, be a request on its way or not.
        """
        # The server closes it: told to keep none, the client closes some that other threads got.
        headers = {} if keeps else {"Connection": "close"}
        return httpx.Client(
            base_url=self.url, timeout=timeout, headers=headers, limits=httpx.Limits()
        )

    def try_get(self, path: str = "/", timeout: float = 20.0) -> str:
        """Return the body of an answer, or nothing when the connection broke."""
        try:
            return self.get(path, timeout).text
        except httpx.TransportError:
            return ""

    def workers(self) -> set[int]:
        """The pids of the running workers."""
        path = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        children = path.read_text().split() if path.exists() else []
        return {int(child) for child in children if alive(int(child))}

    def send(self, sig: signal.Signals) -> None:
        """Send the arbiter a signal."""
        self.process.send_signal(sig)

    def end(self, seconds: float = 20.0) -> int:
        """Wait until it ended by itself, and return its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.log}") from None
