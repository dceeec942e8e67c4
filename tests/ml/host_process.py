"""A real model host in a process of its own, for tests."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gunicorn_process import DECIDING, ROOT, alive, poll

from hornbeam_ml.host.spec import HostSpec
from hornbeam_ml.serving import chosen_hosts
from hornbeam_ml.serving.hosts import Hosts
from hornbeam_state.transports import local

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Self


class HostProcess:
    """``hornbeam host MODULE`` with sockets in a directory of its own.

    Args:
        directory: Where the module is written and the sockets go.
        source: The module's code.
        names: What the host serves; empty: everything.
        workers: Its processes.
        module: The module's name.
        env: Variables added to the environment.
    """

    def __init__(
        self,
        directory: Path,
        source: str,
        *names: str,
        workers: int = 1,
        module: str = "hosted_models",
        env: dict[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self.sockets = directory / "s"
        self.file = directory / f"{module}.py"
        self.file.write_text(textwrap.dedent(source))
        self.spec = HostSpec(module, names)
        self._workers = workers
        self._env = env or {}
        self.log_path = directory / "host.log"
        self.process: subprocess.Popen[bytes] = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        inherited = {name: v for name, v in os.environ.items() if not DECIDING.match(name)}
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [
                    *(sys.executable, "-m", "hornbeam_ml.cli", "host", str(self.spec)),
                    *("--workers", str(self._workers), "--sockets", str(self.sockets)),
                ],
                cwd=self.directory,
                env={**inherited, "PYTHONPATH": str(ROOT), **self._env},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        children = self.pids()
        self.process.kill()
        self.process.wait()
        for pid in children:  # they end with it
            poll(lambda pid=pid: not alive(pid), f"process {pid} of the host ended")  # type: ignore[misc]

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def pids(self) -> list[int]:
        """The processes that answer."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        try:
            return sorted(map(int, path.read_text().split()))
        except OSError:
            return []

    def ready(self, seconds: float = 20.0) -> Self:
        """Wait until all processes have loaded everything."""

        def loaded() -> bool:
            assert self.process.poll() is None, self.log
            served = self.log.count("The model host serves")
            return len(self.pids()) == self._workers and served >= self._workers

        poll(loaded, "the host is loaded", seconds)
        return self

    def kill_one(self, sig: signal.Signals = signal.SIGKILL) -> int:
        """End one of the processes; return its pid."""
        pid = self.pids()[0]
        os.kill(pid, sig)
        return pid


@contextlib.contextmanager
def client_of(host: HostProcess) -> Any:
    """Let this process call a host; yields the module, imported here too."""
    sys.path.insert(0, str(host.directory))
    chosen_hosts.use(lambda: Hosts(host.sockets, host.spec, local.connect))
    try:
        yield import_anew(host)
    finally:
        chosen_hosts.use(chosen_hosts.from_environment)
        sys.path.remove(str(host.directory))


def import_anew(host: HostProcess) -> ModuleType:
    """Import the host's module in this process."""
    spec = importlib.util.spec_from_file_location(host.spec.module, host.file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
