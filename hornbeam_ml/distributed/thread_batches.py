"""`process_batch`: a function over batches of items, in threads of this process."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from hornbeam_ml.distributed.values import as_sequence, checked_results
from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future


def process_batch(
    items: Iterable[Any],
    fn: Callable[[Any], Any],
    *,
    batch_size: int = 100,
    max_workers: int = 4,
) -> list[Any]:
    """Return the results of a function for items that it is given in batches, in threads.

    When it raises for one batch, those that have not begun never do, those that run are waited
    for, and this raises the same.

    Args:
        items: The items; of an array, along its first axis.
        fn: Gets a list of items (of an array, a part of it), and returns as many results. It is
            called from several threads at a time, each with the caller's context variables.
        batch_size: How many items a batch has; the last one may have fewer.
        max_workers: How many batches run at a time.

    Returns:
        The results in the order of the items.

    Raises:
        ModelError: it did not return as many results as it got items.
        ConfigError: a number is not 1 or more.
        Exception: it raised that.
    """
    pool = _pool(max_workers, batch_size)
    try:
        futures = _submit(pool, items, fn, batch_size)
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for future in filter(done.__contains__, futures):
            future.result()
        return [result for future in futures for result in future.result()]
    finally:
        pool.shutdown(cancel_futures=True)


async def aprocess_batch(
    items: Iterable[Any],
    fn: Callable[[Any], Any],
    *,
    batch_size: int = 100,
    max_workers: int = 4,
) -> list[Any]:
    """Awaitable twin of `process_batch`; does not wait for batches that run when another fails.

    Cancelled, it lets no further batch begin.
    """
    pool = _pool(max_workers, batch_size)
    try:
        futures = _submit(pool, items, fn, batch_size)
        batches = await asyncio.gather(*map(asyncio.wrap_future, futures))
        return [result for batch in batches for result in batch]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(max_workers: int, batch_size: int) -> ThreadPoolExecutor:
    for option, value in (("max_workers", max_workers), ("batch_size", batch_size)):
        check_count(option, value)
    return ThreadPoolExecutor(max_workers, thread_name_prefix="hornbeam-process-batch")


def check_count(option: str, value: int) -> None:
    """Return if a setting is a whole number from 1 up.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{option}={value!r}: give a whole number, 1 or more")


def _submit(
    pool: ThreadPoolExecutor, items: Iterable[Any], fn: Callable[[Any], Any], size: int
) -> list[Future[list[Any]]]:
    inputs, failed = as_sequence(items), threading.Event()

    def run(start: int) -> list[Any]:
        if failed.is_set():
            return []  # of a batch that nobody will look at
        batch = inputs[start : start + size]
        try:
            return checked_results(fn(batch), len(batch))
        except BaseException:
            failed.set()
            raise

    return [
        pool.submit(contextvars.copy_context().run, run, start)
        for start in range(0, len(inputs), size)
    ]
