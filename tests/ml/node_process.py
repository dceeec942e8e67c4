"""``hornbeam node`` in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from gunicorn_process import DECIDING, ROOT, alive, poll

from hornbeam_state import rpc_call

if TYPE_CHECKING:
    from typing import Any, Self


def write_module(directory: Path, source: str, module: str = "ml_worker") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{module}.py").write_text(textwrap.dedent(source))


def waits(node: str, gate: Path, module: str = "ml_worker") -> tuple[threading.Thread, list[Any]]:
    """Call `wait_for` in a thread; return it, and the list for what it returns or raises."""
    outcomes: list[Any] = []

    def call() -> None:
        try:
            outcomes.append(rpc_call(node, module, "wait_for", [str(gate)], timeout_ms=30_000))
        except Exception as error:
            outcomes.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    poll(lambda: gate.with_name(f"{gate.name}.began").exists(), "the call has begun")
    return thread, outcomes


class NodeCommand:
    """``hornbeam node MODULE``, started at once and killed with the `with` statement.

    Args:
        directory: Its working directory, where the module is.
        url: The store.
        options: Options of the command line.
        module: What it loads.
        env: Variables added to the environment.
    """

    def __init__(
        self,
        directory: Path,
        url: str,
        *options: str,
        module: str = "ml_worker",
        env: dict[str, str] | None = None,
    ) -> None:
        inherited = {name: v for name, v in os.environ.items() if not DECIDING.match(name)}
        self._log_path = directory / f"node-{os.urandom(4).hex()}.log"
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hornbeam_ml.cli", "node", module, *options],
                cwd=directory,
                env={**inherited, "PYTHONPATH": str(ROOT), "HORNBEAM_STORE": url, **(env or {})},
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self.process.stdout as lines:
            for line in lines:
                self.said.append(line.decode().rstrip("\n"))

    @property
    def log(self) -> str:
        return self._log_path.read_text(errors="replace")

    @property
    def name(self) -> str:
        return self.said[-1].partition(" ")[0]

    def ready(self, times: int = 1) -> Self:
        """Wait until it has said so many times that it is ready."""

        def is_ready() -> bool:
            assert self.process.poll() is None, self.log
            return len(self.said) >= times

        poll(is_ready, f"the node is ready for the {times}. time", 30)
        return self

    def child(self) -> int:
        """Return the pid of the process that serves."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        (pid,) = map(int, path.read_text().split())
        return pid

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Tell it to end, without waiting."""
        self.process.send_signal(number)

    def wait(self, seconds: float = 30) -> int:
        """Return its exit status."""
        return self.process.wait(seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        children: list[int] = []
        with contextlib.suppress(OSError, ValueError):
            children = [self.child()]
        self.process.kill()
        self.process.wait()
        for pid in children:  # they end with it
            poll(lambda pid=pid: not alive(pid), f"process {pid} of the node ended")
        self._reader.join(10)
