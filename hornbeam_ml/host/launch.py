"""Under gunicorn: a model host for each configuration, started by the arbiter."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.host.spec import HostSpec, wanted_spec, wanted_workers
from hornbeam_ml.serving import chosen_hosts
from hornbeam_ml.serving.hosts import Hosts
from hornbeam_state.errors import ConfigError
from hornbeam_state.transports import local

if TYPE_CHECKING:
    from collections.abc import Iterator

_HANDLE: Final = "_hornbeam_host"
_LOOK_EVERY_S: Final = 1.0


class Launched:
    """A model host that the arbiter started.

    It ends when nobody holds its *lease* any more: a pipe of which the arbiter and the workers of
    this configuration have the writing end, as long as they live. (A signal could get lost with
    the arbiter; the kernel closes pipes whatever happens.)

    Attributes:
        spec: What it serves.
        directory: Where its sockets are; nobody else's.
        hello: What code it was started with.

    Raises:
        ConfigError: the module is not there, or the path of the sockets is too long.
        OSError: it cannot be started.
    """

    def __init__(self, spec: HostSpec, processes: int, cfg: Any) -> None:
        self.spec = spec
        self.hello = spec.hello()
        self.directory = Path(tempfile.mkdtemp(prefix="hornbeam-host-"))
        self._lease_read, self._lease = os.pipe2(os.O_CLOEXEC)
        self._close = weakref.finalize(self, _release, self._lease, self._lease_read)
        try:
            self.process = self._start(processes, cfg)
        except BaseException:
            self._close()
            shutil.rmtree(self.directory, ignore_errors=True)
            raise
        _launched.add(self)

    @property
    def ended(self) -> bool:
        """Whether it has ended, although its lease is held: somebody killed it. In the arbiter."""
        return self.process.poll() is not None

    def release(self) -> None:
        """Hold the lease no longer."""
        self._close()

    def remove(self) -> None:
        """In the arbiter: hold the lease no longer, and remove what a killed one left."""
        self.release()
        if self.ended:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _start(self, processes: int, cfg: Any) -> subprocess.Popen[bytes]:
        local.check_path(self.directory / f"{processes}.sock")
        identity = _identity(cfg)
        if identity:
            os.chown(self.directory, cfg.uid, cfg.gid)
        return subprocess.Popen(  # noqa: S603 - our own program
            [*self._command_for(cfg, processes), "--lease", str(self._lease_read)],
            pass_fds=[self._lease_read],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for gunicorn, which ends it in good order
            **identity,
        )

    def _command_for(self, cfg: Any, processes: int) -> list[str]:
        return [
            *(sys.executable, "-m", "hornbeam_ml.cli", "host", str(self.spec)),
            *("--workers", str(processes), "--sockets", str(self.directory)),
            *("--graceful-timeout", str(cfg.graceful_timeout)),
            *("--log-level", cfg.loglevel),
            *(("--log-file", cfg.errorlog) if cfg.errorlog not in (None, "-") else ()),
            *(part for path in _paths(cfg) for part in ("--path", path)),
        ]


_launched: weakref.WeakSet[Launched] = weakref.WeakSet()


def _host_for(cfg: Any) -> Launched | None:
    """Return the model host of a configuration, started now unless it runs; in the arbiter.

    When the code that it serves has changed since, another is started: workers that come from
    now on run that code.

    Raises:
        ConfigError: ``HORNBEAM_HOST`` makes no sense, or the host cannot be started.
    """
    spec = wanted_spec()
    if spec is None:
        return None
    for path in _paths(cfg):
        if path not in sys.path:
            sys.path.insert(0, path)
    found: Launched | None = getattr(cfg, _HANDLE, None)
    if found is None or found.ended or found.hello != spec.hello():
        for former in list(_launched):
            former.remove()  # the workers that use it hold its lease
        found = _launch(spec, cfg)
        setattr(cfg, _HANDLE, found)
    return found


def _launch(spec: HostSpec, cfg: Any) -> Launched:
    try:
        return Launched(spec, wanted_workers(), cfg)
    except OSError as error:
        raise ConfigError(f"the model host of {spec.module} cannot be started: {error}") from error


class HostOfWorker:
    """What a worker has of the model host: made in the arbiter before the fork, used after it.

    Args:
        cfg: gunicorn's configuration.
    """

    def __init__(self, cfg: Any) -> None:
        self._launched: Launched | None = None
        self._error: ConfigError | None = None
        self._looked = 0.0
        try:
            self._launched = _host_for(cfg)
        except ConfigError as error:  # it is the worker that reports it
            self._error = error

    def join(self) -> None:
        """In the worker: have servings call this host, and keep no other from ending.

        Raises:
            ConfigError: ``HORNBEAM_HOST`` makes no sense, or the host could not be started.
        """
        own = self._launched
        for launched in list(_launched):
            if launched is not own:
                launched.release()
        if self._error is not None:
            raise self._error
        if own is None:
            chosen_hosts.use(lambda: None)
        else:
            chosen_hosts.use(lambda: Hosts(own.directory, own.spec, local.connect))

    def wait_loaded(self) -> None:
        """Wait until the host has loaded everything, also what this worker may never call.

        Raises:
            ModelError: it failed to.
            NodeDown: it said nothing at all.
        """
        found = chosen_hosts.current() if self._launched is not None else None
        if found is not None:
            found.wait_all_loaded()

    def is_lost(self) -> bool:
        """Return whether the host has ended for good: only the arbiter could start it again."""
        now = time.monotonic()
        if self._launched is None or now - self._looked < _LOOK_EVERY_S:
            return False
        self._looked = now
        try:
            os.kill(self._launched.process.pid, 0)
        except (ProcessLookupError, PermissionError):  # or the pid is that of another by now
            return True
        return False


def _paths(cfg: Any) -> Iterator[str]:
    """Yield where gunicorn looks for the app."""
    yield os.path.realpath(cfg.chdir)
    yield from (path.strip() for path in (cfg.pythonpath or "").split(",") if path.strip())


def _identity(cfg: Any) -> dict[str, Any]:
    """Return as whom the workers run, when that is not as whom the arbiter does."""
    if (cfg.uid, cfg.gid) == (os.geteuid(), os.getegid()):
        return {}
    return {"user": cfg.uid, "group": cfg.gid, "extra_groups": [], "umask": cfg.umask}


def _release(*descriptors: int) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
