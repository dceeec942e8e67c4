"""What batching costs per item, with a model that does nothing: callers in threads and in tasks.

python benchmarks/serving.py --rounds 7

Every caller sends its next item when it has the result of the last. So the figure is the time from
the start to the last result, divided by the number of items: with one caller it is the latency.
"Floor" is what the hand-over between two threads costs without hornbeam: one lock each way.
"""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from common import environment, note, parser, report, summary

from hornbeam_ml import Serving

CALLERS = (1, 32, 256)


def main() -> None:
    options = parser(__doc__.partition("\n")[0])
    options.add_argument("--items", type=int, default=8192, help="items in each turn")
    args = options.parse_args()
    machine = environment("numpy")
    figures = {}
    with Serving(lambda: lambda batch: batch, name="identity") as serving:
        serving.start()
        contenders = {
            "floor, 1 thread": lambda: floor(args.items),
            "executor, 1 thread": lambda: executor(args.items),
            **{f"threads, {n}": lambda n=n: in_threads(serving, n, args.items) for n in CALLERS},
            **{f"tasks, {n}": lambda n=n: in_tasks(serving, n, args.items) for n in CALLERS},
            "run_batch of 1024": lambda: in_one_call(serving, args.items),
        }
        for turn in range(args.rounds):
            note(f"round {turn + 1} of {args.rounds}")
            for name, contend in contenders.items():
                figures.setdefault(name, []).append(1e6 * contend() / args.items)
    report(
        {
            "benchmark": "serving",
            "unit": "microseconds per item",
            "options": {"rounds": args.rounds, "items": args.items},
            "environment": machine,
            "results": {name: summary(values) for name, values in figures.items()},
        },
        args.out,
    )


def in_threads(serving: Serving, callers: int, items: int) -> float:
    begin = threading.Barrier(callers + 1)

    def call() -> None:
        begin.wait()
        for number in range(items // callers):
            serving.run(number)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    begin.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def in_tasks(serving: Serving, callers: int, items: int) -> float:
    async def call() -> None:
        for number in range(items // callers):
            await serving.arun(number)

    async def all_calls() -> float:
        start = time.perf_counter()
        await asyncio.gather(*(call() for _ in range(callers)))
        return time.perf_counter() - start

    return asyncio.run(all_calls())


def in_one_call(serving: Serving, items: int) -> float:
    start = time.perf_counter()
    for _ in range(items // 1024):
        serving.run_batch(range(1024))
    return time.perf_counter() - start


def floor(items: int) -> float:
    """Hand an item to a thread and wait for it, with nothing but two locks."""
    there, back = threading.Lock(), threading.Lock()
    there.acquire()
    back.acquire()

    def answer() -> None:
        for _ in range(items):
            there.acquire()
            back.release()

    thread = threading.Thread(target=answer)
    thread.start()
    start = time.perf_counter()
    for _ in range(items):
        there.release()
        back.acquire()
    elapsed = time.perf_counter() - start
    thread.join()
    return elapsed


def executor(items: int) -> float:
    """Do the same with the standard library's executor."""
    with ThreadPoolExecutor(1) as pool:
        start = time.perf_counter()
        for number in range(items):
            pool.submit(int, number).result()
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
