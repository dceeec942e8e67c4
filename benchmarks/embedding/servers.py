"""One contender's server at a time, and one request to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import poll
from embedding import environments, processes
from embedding.contenders import BATCH_SIZE, Contender, Settings, threads
from embedding.load import MODEL, texts

if TYPE_CHECKING:
    from collections.abc import Iterator

LAST_LINES = 15


class Failed(Exception):
    """A contender did not do what it should; the message holds the end of its log."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where everything lies, and on what it runs."""

    environments: Path
    cores: int


@dataclass
class Server:
    """A contender that answers."""

    contender: Contender
    settings: Settings
    port: int
    folder: Path
    child: subprocess.Popen[bytes]
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.child.pid

    @property
    def url(self) -> str:
        return self.at(self.contender.path)

    def at(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    def embed(self, text: str) -> list[float]:
        """Return what it answers to a text."""
        answer = self.request("POST", self.contender.path, self.contender.body.of(text))
        return self.contender.vector(answer)

    def request(self, method: str, path: str, body: bytes | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"content-type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        if response.status != 200:
            raise OSError(f"status {response.status}: {content[:200]!r}")
        return json.loads(content)

    def log(self) -> str:
        """Return the end of what it wrote."""
        lines = (self.folder / "log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-LAST_LINES:])


@contextlib.contextmanager
def running(
    bench: Bench, contender: Contender, settings: Settings | None = None, **variables: str
) -> Iterator[Server]:
    """Run a contender until the block ends; when it fails in it, raise `Failed` with its log."""
    settings = settings or contender.chosen
    programs = environments.binaries(contender, bench.environments)
    export = environments.exported(contender, bench.environments)
    with tempfile.TemporaryDirectory(prefix="hb-", ignore_cleanup_errors=True) as name:
        port = free_port()
        filled = {
            "bin": programs,
            "port": port,
            "model": MODEL,
            "export": export,
            "folder": name,
            "BATCH_SIZE": BATCH_SIZE,
            **settings,
        }
        command = [word.format(**filled) for word in contender.command]
        given = {key: value.format(**filled) for key, value in contender.environ.items()}
        count = str(threads(settings, bench.cores))
        environ = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": count,
            "THREADS": count,
            "MODEL": str(MODEL),
            "PORT": str(port),
            "FOLDER": name,
            "BATCH_SIZE": str(BATCH_SIZE),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            **{key: str(value) for key, value in settings.items()},
            **given,
            **variables,
        }
        folder = Path(name)
        with (folder / "log").open("wb") as log:
            child = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=contender.folder,
                env=environ,
                start_new_session=True,
            )
        server = Server(contender, settings, port, folder, child, variables)
        try:
            poll(lambda: answers(server), f"{contender.name} answers", child)
            yield server
        except Exception as error:
            raise Failed(f"{error!r}; its log ends:\n{server.log()}") from error
        finally:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(20)
            processes.end_descendants()  # what it left behind, or itself


def answers(server: Server) -> bool:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        return len(server.embed(texts(1, seed=0)[0])) > 0
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
