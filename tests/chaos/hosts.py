"""Machines on a network that can be cut: namespaces of this machine, with a switch between them.

Nothing here has a name outside: a namespace lives as long as the processes in it do, and the first
of these ends with this process, however that ends.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from typing import Self

import pytest
from redis_servers import Server

_NETWORK = "10.231.7"


class Host:
    """A machine: a network, a hostname, a mount table and a temporary directory of its own.

    Args:
        name: What it is called.
        number: Its place on the network.
    """

    def __init__(self, name: str, number: int) -> None:
        self.name = name
        self.port = f"port{number}"
        self.address = f"{_NETWORK}.{number}"
        command = ["unshare", "--net", "--uts", "--mount", "sh", "-c", "echo ready; exec cat"]
        self._holder = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.pid = self._holder.pid
        self._directory = tempfile.mkdtemp(prefix="hb-host-")
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        if self._holder.stdout.readline() != b"ready\n":
            raise OSError(self._holder.stderr.read().decode().strip())
        enter = ("nsenter", "--target", str(self.pid), "--net", "--uts", "--mount", "--")
        self.within = (*enter, "env", f"TMPDIR={self._directory}")
        self.run("hostname", self.name)
        self.run("ip", "link", "set", "lo", "up")

    def run(self, *words: str) -> None:
        """Run a command there."""
        done = subprocess.run([*self.within, *words], check=False, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")

    def close(self) -> None:
        self._holder.kill()
        self._holder.communicate()
        shutil.rmtree(self._directory, ignore_errors=True)


class Network:
    """Some hosts and a switch. A context manager; where there can be none, the test is skipped."""

    def __init__(self, *names: str) -> None:
        self._names = names
        self._hosts: list[Host] = []

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self._hosts if host.name == name)

    def __enter__(self) -> Self:
        try:
            self._build()
        except OSError as error:
            self.__exit__()
            pytest.skip(f"no network namespaces here: {error}")
        return self

    def __exit__(self, *_) -> None:
        while self._hosts:
            self._hosts.pop().close()

    def _build(self) -> None:
        for number, name in enumerate(("switch", *self._names)):
            self._hosts.append(Host(name, number))
        switch = self["switch"]
        switch.run("ip", "link", "add", "bridge", "type", "bridge")
        switch.run("ip", "link", "set", "bridge", "up")
        for host in self._hosts[1:]:
            cable = ("ip", "link", "add", host.port, "type", "veth", "peer", "name", "eth0")
            switch.run(*cable, "netns", str(host.pid))
            switch.run("ip", "link", "set", host.port, "master", "bridge", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")

    def cut(self, name: str, how: str) -> None:
        """Cut a host off, from the inside (``down``) or without a sign that it would see (``silent``).

        Its packets get nowhere, and nobody is told: no connection is reset.
        """
        if how == "down":
            self[name].run("ip", "link", "set", "eth0", "down")
        else:
            self["switch"].run("ip", "link", "set", self[name].port, "nomaster")

    def heal(self, name: str) -> None:
        """Undo the cuts of a host."""
        self[name].run("ip", "link", "set", "eth0", "up")
        self["switch"].run("ip", "link", "set", self[name].port, "master", "bridge")


class ServerOn(Server):
    """A server on a host, reached from others."""

    def __init__(self, host: Host, binary, *options: str) -> None:
        network = ("--bind", host.address, "--protected-mode", "no")
        super().__init__(binary, *network, *options)
        self._command = [*host.within, *self._command]
        self._address = host.address

    @property
    def url(self) -> str:
        return f"redis://{self._address}:{self.port}"
