"""The command line: ``hornbeam host app.models``, ``hornbeam node ml_worker``."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml import logs
from hornbeam_ml.host import supervisor as host
from hornbeam_ml.host.spec import HostSpec, default_directory, wanted_workers
from hornbeam_ml.node import program as node
from hornbeam_state.errors import HornbeamError
from hornbeam_state.rpc.server import CONCURRENCY, QUEUE_LIMIT
from hornbeam_state.transports.local import check_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_GRACE_S: Final = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except HornbeamError as error:
        print(f"hornbeam: {error}", file=sys.stderr)  # noqa: T201 - this is a command
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hornbeam", description="Models inside your web app.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_host(commands)
    _add_node(commands)
    return parser


def _add_host(commands: Any) -> None:
    parser = commands.add_parser(
        "host",
        help="run the servings of a module for all workers of this machine",
        description="Runs the servings and embedders of a module in processes of their own. "
        "Workers that HORNBEAM_HOST points to the same module call them there. Under gunicorn "
        "there is no need to start one: HORNBEAM_HOST does.",
    )
    parser.set_defaults(run=_host)
    parser.add_argument("module", type=_spec, help="app.models, or app.models:name,name")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (HORNBEAM_HOST_WORKERS, or 1)"
    )
    parser.add_argument("--sockets", type=Path, metavar="DIR", help="where clients find it")
    _add_common(parser)
    parser.add_argument("--log-file", type=Path)
    parser.add_argument("--lease", type=int, help=argparse.SUPPRESS)


def _add_node(commands: Any) -> None:
    parser = commands.add_parser(
        "node",
        help="serve the functions and servings of a module to other processes and machines",
        description="Imports a module, loads its models, and serves what it exposes to all who "
        "share the store (HORNBEAM_STORE). It says when it is ready, and is started again when it "
        "dies.",
    )
    parser.set_defaults(run=_node)
    parser.add_argument("module", help="ml_worker, or app.ml_worker")
    parser.add_argument("--name", help="name, or name@host (HORNBEAM_NODE, or that of the module)")
    parser.add_argument(
        "--tag", action="append", default=[], help="a word by which others may choose it"
    )
    parser.add_argument(
        "--concurrency",
        type=_whole_number(1),
        default=CONCURRENCY,
        metavar="N",
        help=f"how many functions run at a time ({CONCURRENCY}); servings have limits of their own",
    )
    parser.add_argument(
        "--queue-limit",
        type=_whole_number(0),
        default=QUEUE_LIMIT,
        metavar="N",
        help=f"how many more may wait ({QUEUE_LIMIT})",
    )
    _add_common(parser)
    parser.add_argument("--json-logs", action="store_true", help="a JSON object in each line")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--graceful-timeout",
        type=_seconds,
        default=_GRACE_S,
        metavar="SECONDS",
        help=f"how long running calls may take to finish ({_GRACE_S:.0f})",
    )
    parser.add_argument(
        "--path", action="append", default=[], help="where to look for the module, too"
    )
    parser.add_argument(
        "--log-level", type=_level, default="info", help="debug, info, warning, error or critical"
    )


def _whole_number(least: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and int(text) >= least):
            raise argparse.ArgumentTypeError(f"give a whole number, {least} or more")
        return int(text)

    return whole_number


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 <= seconds < math.inf:
            return seconds
    raise argparse.ArgumentTypeError("give seconds, 0 or more")


def _level(text: str) -> str:
    if text.upper() not in logging.getLevelNamesMapping():
        raise argparse.ArgumentTypeError("give debug, info, warning, error or critical")
    return text


def _spec(text: str) -> HostSpec:
    try:
        return HostSpec.parse(text)
    except HornbeamError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _host(options: argparse.Namespace) -> int:
    logs.configure(options.log_level, file=options.log_file)
    _add_paths(options.path)
    environ = dict(os.environ)
    if options.workers is not None:
        environ["HORNBEAM_HOST_WORKERS"] = str(options.workers)
    directory = options.sockets or default_directory(options.module)
    processes = wanted_workers(environ)
    options.module.hello()  # what cannot work is said at once
    check_path(directory / f"{processes}.sock")
    return host.supervise(
        options.module,
        directory,
        processes,
        lease=options.lease,
        grace=options.graceful_timeout,
    )


def _node(options: argparse.Namespace) -> int:
    logs.configure(options.log_level, as_json=options.json_logs)
    _add_paths(options.path)
    spec = node.NodeSpec(
        module=options.module,
        name=options.name,
        tags=tuple(options.tag),
        concurrency=options.concurrency,
        queue_limit=options.queue_limit,
        grace=options.graceful_timeout,
    )
    return node.supervise(spec)


def _add_paths(paths: Sequence[str]) -> None:
    for path in reversed([*paths, str(Path.cwd())]):
        if path not in sys.path:
            sys.path.insert(0, path)


if __name__ == "__main__":
    sys.exit(main())
