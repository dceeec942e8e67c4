"""Servings that know how long their items are: batches, statistics, threads of their streams."""

from __future__ import annotations

import threading
from math import inf

import pytest
from serving_helpers import LIMIT_S, Held, answers, queued, until

from hornbeam_ml import Serving, threads
from hornbeam_ml.serving.queue import BatchQueue


def tokens(text):
    """Return the words of a text."""
    return len(text.split())


class Upper(Held):
    """Returns texts in capitals."""

    def __call__(self, batch):
        super().__call__(batch)
        return [text.upper() for text in batch]


@pytest.fixture
def upper():
    """Hold a model of texts; in the end it is let go."""
    made = Upper(hold=True)
    yield made
    made.open()


def test_neighbours_in_length_share_a_batch_with_the_oldest(callers, upper):
    with Serving(lambda: upper, length=tokens, max_batch_tokens=6) as serving:
        calls = [callers.run(serving, "first")]
        upper.started(1)
        for number, text in enumerate(["a b c", "a", "a b c d e f g h", "a b c", "b"], 1):
            calls.append(callers.run(serving, text))
            queued(serving, number)
        upper.open()
        assert answers(calls) == [
            *("FIRST", "A B C", "A", "A B C D E F G H", "A B C", "B"),
        ]
    assert upper.batches[1:] == [["a b c", "a b c"], ["a", "b"], ["a b c d e f g h"]]


def test_results_of_one_call_come_in_its_own_order(callers, upper):
    upper.open()
    texts = ["a b c d", "a", "b b", "c", "a b c d e f g"]
    with Serving(lambda: upper, length=tokens, max_batch_tokens=4) as serving:
        assert callers.run_batch(serving, texts).result(LIMIT_S) == [t.upper() for t in texts]


def test_an_item_is_measured_once_after_preprocessing_in_the_callers_thread():
    seen = []

    def length(text):
        seen.append((text, threading.current_thread()))
        return len(text)

    with Serving(lambda: list, preprocess=str.strip, length=length) as serving:
        serving.run("  abc ")
    assert seen == [("abc", threading.current_thread())]


@pytest.mark.parametrize("answer", [0, -1, 1.0, "3", None, True], ids=repr)
def test_a_length_that_is_none_is_an_error_of_that_caller_alone(callers, answer):
    with Serving(lambda: list, length=lambda item: answer if item == "bad" else 1) as serving:
        bad, good = callers.run(serving, "bad"), callers.run(serving, "good")
        assert isinstance(bad.exception(LIMIT_S), ValueError)
        assert good.result(LIMIT_S) == "good"
        with pytest.raises(ValueError, match="whole number from 1 up"):
            serving.run_inline(["good", "bad"])


def test_items_run_inline_are_batched_by_length_and_come_back_in_order(upper):
    upper.open()
    texts = ["a b c d", "a", "b b", "c", "a b c d e f g"]
    with Serving(lambda: upper, length=tokens, max_batch_tokens=4) as serving:
        assert serving.run_inline(texts) == [text.upper() for text in texts]
    assert upper.batches == [["a", "c"], ["b b"], ["a b c d"], ["a b c d e f g"]]


def test_statistics_count_tokens_and_the_room_that_the_budget_leaves(upper):
    upper.open()
    options = {"length": tokens, "max_batch_tokens": 12, "batch_size": 8}
    with Serving(lambda: upper, **options) as serving:
        serving.run_batch(["a b c", "a b c d"])  # there is room for three of four tokens
        stats = serving.stats()
    assert (stats.batches, stats.items, stats.tokens, stats.padded_tokens) == (1, 2, 7, 8)
    assert stats.fill == pytest.approx(2 / 3)
    assert stats.padding == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("pads", "sizes", "padding"),
    [
        pytest.param(True, [2, 1], 1 / 9, id="similar ones, and a part of what is left"),
        pytest.param(False, [4], 0.0, id="all that wait for the first"),
    ],
)
def test_streams_share_out_what_waits_where_padding_costs(pads, sizes, padding):
    queue = BatchQueue("serving", batch_size=8, max_tokens=inf, pads=lambda: pads)
    takers = [queue.add_taker() for _ in range(2)]
    for length in (1, 5, 2, 5):
        make_call(queue, length)
    taken = [queue.look(taker)[0] for taker in takers]
    assert [len(batch) for batch in taken if batch] == sizes
    assert queue.stats(name=None, ready=True).padding == pytest.approx(padding)


def test_without_lengths_rows_are_counted():
    with Serving(lambda: lambda rows: rows, collate="stack", buckets=[4], batch_size=4) as serving:
        serving.run_batch([1.0, 2.0, 3.0])
        stats = serving.stats()
    assert (stats.tokens, stats.padded_tokens, stats.padding, stats.fill) == (3, 4, 0.25, 0.75)


def test_a_batch_is_alone_when_nothing_else_runs_or_waits():
    queue = BatchQueue("serving", batch_size=1)
    first, second = queue.add_taker(), queue.add_taker()
    serving_calls = [make_call(queue) for _ in range(3)]
    assert [queue.look(first)[0], first.alone] == [[serving_calls[0]], False]  # others wait
    assert [queue.look(second)[0], second.alone] == [[serving_calls[1]], False]
    queue.settle([serving_calls[1]], [1])
    assert [queue.look(second)[0], second.alone] == [[serving_calls[2]], False]  # another runs
    queue.settle([serving_calls[0], serving_calls[2]], [1, 1])
    queue.look(first)
    queue.look(second)
    last = make_call(queue)
    assert [queue.look(first)[0], first.alone] == [[last], True]


def make_call(queue, length=1):
    """Let a call of one item wait; return its entry."""
    from hornbeam_ml.serving.calls import Call, Entry, ThreadWaker
    from hornbeam_ml.serving.template import Lane

    call = Call(1, queue.clock(), float("inf"), ThreadWaker())
    entry = Entry(call, 0, "item", Lane(None, None, False), length)
    queue.admit(call, [entry])
    return entry


@pytest.fixture
def four_threads(monkeypatch):
    """Give the process four compute threads."""
    monkeypatch.setenv("HORNBEAM_THREADS", "4")


@pytest.mark.parametrize(
    ("streams", "expected"), [(1, {4}), (2, {4}), (8, {4})], ids=["one", "two", "eight"]
)
def test_a_batch_that_is_alone_has_all_compute_threads(four_threads, streams, expected):
    limits = set()
    with Serving(lambda: lambda _: [threads.current_limit()], streams=streams) as serving:
        for _ in range(10):
            limits.add(serving.run("item"))
            until(lambda: not serving.stats().running)  # its stream is back from answering
    assert limits == expected


def test_batches_at_the_same_time_share_the_compute_threads(four_threads):
    started, go = threading.Semaphore(0), threading.Semaphore(0)

    def model(batch):
        started.release()
        assert go.acquire(timeout=LIMIT_S)
        return [threads.current_limit()] * len(batch)

    with Serving(lambda: model, streams=2, batch_size=1) as serving:
        first = serving.submit("first")
        assert started.acquire(timeout=LIMIT_S)
        second = serving.submit("second")
        assert started.acquire(timeout=LIMIT_S)
        go.release(2)
        assert [first.result(LIMIT_S), second.result(LIMIT_S)] == [4, 2]


def test_the_warmup_runs_with_each_number_of_threads_last_with_the_usual_one(four_threads):
    """What a model prepares for a number of threads, it prepares before it is ready."""
    seen = []

    def model(batch):
        seen.append(threads.current_limit())
        return batch

    with Serving(lambda: model, streams=2, warmup="item") as serving:
        serving.start()
    assert seen == [4, 2]


@pytest.mark.parametrize("budget", ["1", "2"])
def test_nothing_is_warmed_up_twice_for_the_same_number(monkeypatch, budget):
    monkeypatch.setenv("HORNBEAM_THREADS", budget)
    seen = []
    streams = 1 if budget == "2" else 2
    with Serving(lambda: lambda batch: seen.append(1) or batch, streams=streams, warmup=1) as one:
        one.start()
    assert seen == [1]
