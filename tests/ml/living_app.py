"""An app of both kinds whose next boot is told by files beside it, for tests of deploys."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Any

from gunicorn_process import Gunicorn

APP = """
import asyncio, json, os, pathlib, sys, time
from bare_asgi import respond
from hornbeam_ml import devices, readiness
from hornbeam_ml.lifecycle import board
from hornbeam_ml.models import register_model
from hornbeam_ml.serving import Serving

here = pathlib.Path(__file__).parent
devices.count_gpus = lambda: 2

def told(name, default=""):
    path = here / name
    return path.read_text().strip() if path.exists() else default

def note(line):
    with open(here / "notes", "a") as file:
        file.write(line + "\\n")

VERSION, BROKEN = told("version", "1"), told("broken")
time.sleep(float(told("slow_import", "0")))
if BROKEN == "import":
    raise LookupError("the app is broken")
if BROKEN == "exit":
    sys.exit(4)

def load():
    time.sleep(float(told("slow", "0")))
    if BROKEN == "model":
        raise LookupError("the app is broken")
    if BROKEN == "crash":
        os._exit(9)

register_model("m", load)

def infer(items):
    time.sleep(0.1)
    note("inferred")
    return items

hoard = []
queued = Serving(lambda: infer, batch_size=1, device="cpu")

def page(path):
    if path == "/rows":
        rows = [[r.slot, r.age, r.pid, r.generation, r.state.name] for r in board.workers()]
        return json.dumps(rows)
    if path == "/device":
        return f"{os.getpid()} {devices.pick_device('auto')}"
    if path == "/pid":
        return str(os.getpid())
    if path == "/slow":
        note("begun")
        time.sleep(1)
    if path == "/submit":
        for item in range(3):
            queued.submit(item)
    if path == "/grow":
        hoard.append(b"x" * (64 * 2**20))
    if path == "/phase":
        return readiness.phase()
    return VERSION

def wsgi(environ, start_response):
    body = page(environ["PATH_INFO"]).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        if BROKEN == "lifespan":
            await send({"type": "lifespan.startup.failed", "message": "the app is broken"})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        note(f"shut down {readiness.phase()} {await queued.arun(1)}")
        await asyncio.sleep(float(told("slow_shutdown", "0")))
        await send({"type": "lifespan.shutdown.complete"})
        return
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
        message = await receive()
        note(f"websocket {message['type']} {message.get('code')}")
        return
    if scope["path"] == "/never":
        note("begun /never")
        await asyncio.sleep(1000)
    if scope["path"].startswith("/stream"):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in range(int(told("parts", "5"))):
            note(f"begun {scope['path']}")
            await send({"type": "http.response.body", "body": b"part ", "more_body": True})
            await asyncio.sleep(0.2)
        await send({"type": "http.response.body", "body": b"end"})
        return
    await respond(send, (await asyncio.to_thread(page, scope["path"])).encode())

if BROKEN == "attribute":
    del wsgi, asgi
"""


class LivingApp(Gunicorn):
    """A gunicorn that serves the app above.

    Args:
        kind: ``asgi`` or ``wsgi``.
        options: Command line options of gunicorn.
        cwd: An empty directory of its own.
        told: What files say, by their name; see `tell`.
        env: Variables added to the environment.
    """

    # Run with `-m`, gunicorn finds its own `http` for that of Python when it starts anew on USR2.
    program = (str(Path(sys.executable).with_name("gunicorn")),)

    def __init__(
        self, kind: str, *options: str, cwd: Path, env: dict[str, str] | None = None, **told: Any
    ) -> None:
        self._directory = cwd
        (cwd / "app.py").write_text(APP)
        self.tell(**told)
        super().__init__(f"app:{kind}", *options, cwd=cwd, env=env)

    def tell(self, **told: Any) -> None:
        """Say what the next boots are like.

        `version` is what is answered, `slow` and `slow_import` are seconds, `broken` is one of
        import, exit, attribute, model, crash, lifespan, or nothing.
        """
        for name, value in told.items():
            (self._directory / name).write_text(str(value))

    def hang_up(self, **told: Any) -> None:
        """Deploy."""
        self.tell(**told)
        self.send(signal.SIGHUP)

    @property
    def notes(self) -> list[str]:
        """What the app has written down."""
        path = self._directory / "notes"
        return path.read_text().splitlines() if path.exists() else []

    def rows(self) -> list[list[Any]]:
        """Slot, age, pid, generation and state of each worker, the oldest first."""
        with contextlib.suppress(Exception):
            found: list[list[Any]] = self.get("/rows").json()
            return found
        return []

    def states(self) -> list[tuple[int, str]]:
        """Generation and state of each worker, the oldest first."""
        return [(row[3], row[4]) for row in self.rows()]

    def all_ready(self, workers: int, generation: int = 1, seconds: float = 30.0) -> None:
        """Wait until that many workers are ready and there are no others."""
        expected = [(generation, "READY")] * workers
        self.until(lambda: self.states() == expected, f"{expected}", seconds)
