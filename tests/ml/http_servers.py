"""Servers of `http_apps`, for tests: httptools with uvloop, h11 with asyncio, WSGI."""

from __future__ import annotations

from contextlib import ExitStack

from gunicorn_process import Gunicorn, without
from raw_http import Wire

ASGI = ("httptools", "h11")
ALL = (*ASGI, "wsgi")


class Target:
    """A server of one kind, and connections to it."""

    def __init__(self, kind, directory, *options):
        self.kind = kind
        env = {"PYTHONPATH": without(directory, "httptools")} if kind == "h11" else {}
        if kind != "wsgi":
            options = (*options, "--asgi-loop", "asyncio" if kind == "h11" else "uvloop")
        app = "http_apps:wsgi" if kind == "wsgi" else "http_apps:asgi"
        self.server = Gunicorn(app, *options, cwd=directory, env=env)

    @property
    def address(self):
        """Where it listens first, once it is ready."""
        self.server.logged("Ready:")
        host, _, port = self.server.url.partition(",")[0].partition("://")[2].partition(":")
        return host, int(port)

    def wire(self, **options):
        return Wire(self.address, **options)

    def state(self):
        with self.wire() as wire:
            return wire.get("/state").json()

    def reaches(self, check):
        return self.server.until(lambda: check(self.state()), "a state of the app")


class Targets:
    """Servers with the same options, each started when it is asked for."""

    def __init__(self, tmp_path_factory, *options):
        self._directories = tmp_path_factory
        self._options = options
        self._running = {}
        self._stack = ExitStack()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._stack.close()

    def __call__(self, kind):
        if kind not in self._running:
            target = Target(kind, self._directories.mktemp(kind), *self._options)
            self._running[kind] = target
            self._stack.enter_context(target.server).logged("Ready:")
        return self._running[kind]
