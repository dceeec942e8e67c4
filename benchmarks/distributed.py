"""A batch over two nodes of different speed, against the ideal split and against equal parts.

python benchmarks/distributed.py --rounds 5

The nodes wait so many milliseconds for each item, so that the figures are those of the sharing,
not of a model. In the ideal split both end together, with no call to pay for. "first" is a batch
of nodes that nothing is known of; "next" the one after it. Contenders take turns in each round.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from common import environment, note, parser, report, summary

from hornbeam_ml import DistributedInference
from hornbeam_state import default_store, expose, rpc_call, serve_node

pause_s = 0.0


@expose(module="benchmark")
def predict(items):
    time.sleep(len(items) * pause_s)
    return items


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--items", type=int, default=500, help="items of a batch")
    options.add_argument(
        "--delays", type=float, nargs="+", default=[10.0, 40.0], help="ms an item takes, each node"
    )
    args = options.parse_args()
    machine = environment()
    with running(args.delays) as names:
        for name in names:
            rpc_call(name, "benchmark", "predict", [[]])  # connected
        rounds = []
        for turn in range(args.rounds):
            note(f"round {turn + 1} of {args.rounds}")
            rounds.append(measure(names, list(range(args.items))))
        default_store().close()
    ideal = args.items / sum(1000 / delay for delay in args.delays)
    seconds = {way: summary([one[way] for one in rounds], 3) for way in rounds[0]}
    report(
        {
            "benchmark": "distributed",
            "options": {name: value for name, value in vars(args).items() if name != "out"},
            "environment": machine,
            "ideal_seconds": round(ideal, 3),
            "seconds": seconds,
            "of_ideal": {way: round(one["median"] / ideal, 3) for way, one in seconds.items()},
            "targets": {
                "within 1.25 of the ideal split": seconds["first"]["median"] <= 1.25 * ideal,
            },
        },
        args.out,
    )


@contextlib.contextmanager
def running(delays):
    """Run the nodes in processes of their own; yields their names."""
    context = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(prefix="hb-bench-") as directory,
        contextlib.ExitStack() as end,
    ):
        os.environ["HORNBEAM_STORE"] = f"lmdb://{directory}/store"
        pipes = []
        for number, delay in enumerate(delays):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(target=serve, args=(theirs, number, delay), daemon=True)
            child.start()
            end.callback(child.join)
            end.callback(child.kill)
            theirs.close()
            pipes.append(ours)
        yield [pipe.recv() for pipe in pipes]


def serve(pipe, number, delay_ms) -> None:
    global pause_s  # noqa: PLW0603 - of this process
    pause_s = delay_ms / 1000
    with serve_node(f"bench-{number}") as node:
        pipe.send(node.name)
        node.wait()


def measure(names, items):
    """Return how many seconds a batch takes, by how it is spread."""
    inference = DistributedInference("bench", module="benchmark", function="predict")
    return {
        "first": timed(inference.predict_batch_sync, items),
        "next": timed(inference.predict_batch_sync, items),
        "equal parts": timed(lambda given: in_equal_parts(inference, names, given), items),
    }


def timed(spread, items):
    start = time.perf_counter()
    if spread(items) != items:
        raise RuntimeError("the results are not those of the items")
    return time.perf_counter() - start


def in_equal_parts(inference, names, items):
    """Spread items as evenly as can be, one call for each node."""

    def call(name, part):
        return rpc_call(name, "benchmark", "predict", [part], timeout_ms=600_000)

    with ThreadPoolExecutor(len(names)) as pool:
        parts = pool.map(call, names, inference.split_inputs(items, len(names)))
        return [result for part in parts for result in part]


if __name__ == "__main__":
    main()
