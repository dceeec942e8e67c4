"""Requests: deadlines from the header, clients that leave; in this process, without a server."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import inf

import pytest
from serving_helpers import LIMIT_S, answers, queued, until

from hornbeam_ml import (
    ClientDisconnected,
    DeadlineExceeded,
    Overloaded,
    Serving,
    acached_inference,
    cache_stats,
    cached_inference,
    predict,
)
from hornbeam_ml.http.entry import AsgiEntry, WsgiEntry
from hornbeam_ml.keys import call_key
from hornbeam_ml.request import (
    Request,
    current_request,
    deadline_from,
    set_current_request,
)
from hornbeam_state.locks import Lock


@pytest.fixture(autouse=True)
def no_request():
    """Leave no request behind for other tests."""
    yield
    set_current_request(None)


def working_for(request, fn, *args, **options):
    """Call a function in a context of its own, for a request."""

    def call():
        set_current_request(request)
        return fn(*args, **options)

    return contextvars.copy_context().run(call)


def expired():
    return Request(time.monotonic() - 1)


# The header.


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("250", 0.25), ("0.5", 0.0005), (" 1000 ", 1.0), ("999999999999999", 86_400.0)],
)
def test_a_number_of_milliseconds_is_a_deadline(header, seconds):
    assert deadline_from(header, 100.0) == pytest.approx(100.0 + seconds)


@pytest.mark.parametrize(
    "header",
    [
        "",
        "soon",
        "0",
        "0.0",
        "-5",
        "+5",
        "nan",
        "inf",
        "1e3",
        "1_000",
        "1,000",
        "5 5",
        "٣",
        "9" * 400,
    ],
)
def test_anything_else_is_refused_with_the_name_of_the_header(header):
    with pytest.raises(ValueError, match="X-Request-Timeout-Ms: give one number"):
        deadline_from(header, 100.0)


# Calls of servings.


async def collect(serving):
    return [chunk async for chunk in serving.astream(1)]


def steps(batch):
    yield [1] * len(batch)


BLOCKING = {
    "run": lambda serving: serving.run(1),
    "run_batch": lambda serving: serving.run_batch([1, 2]),
    "submit": lambda serving: serving.submit(1).result(LIMIT_S),
    "predict": lambda serving: predict("served", 1),
    "run_inline": lambda serving: serving.run_inline([1]),
    "stream": lambda serving: list(serving.stream(1)),
    "arun": lambda serving: asyncio.run(serving.arun(1)),
    "astream": lambda serving: asyncio.run(collect(serving)),
}


@pytest.mark.parametrize("name", BLOCKING)
@pytest.mark.parametrize("reason", ["late", "left"])
def test_nothing_begins_that_is_too_late(name, reason):
    ran = []

    def load():
        return steps if "stream" in name else lambda batch: batch

    request = expired() if reason == "late" else Request()
    if reason == "left":
        request.leave()
    with Serving(load, name="served", preprocess=ran.append) as serving:
        with pytest.raises(DeadlineExceeded if reason == "late" else ClientDisconnected):
            working_for(request, BLOCKING[name], serving)
        assert ran == []
        assert serving.stats().batches == 0


@pytest.mark.parametrize("name", BLOCKING)
def test_a_request_in_time_gets_its_results(name):
    load = (lambda: steps) if "stream" in name else (lambda: lambda batch: batch)
    request = Request(time.monotonic() + LIMIT_S)
    with Serving(load, name="served") as serving:
        result = working_for(request, BLOCKING[name], serving)
        assert result in (1, [1], [1, 2])
        assert not request._waiting


@pytest.mark.parametrize("own_ms", [None, 60_000, 1])
def test_the_earlier_of_both_deadlines_counts(held, own_ms):
    request = Request(inf if own_ms == 1 else time.monotonic() + 0.05)
    with Serving(lambda: held, deadline_ms=60_000) as serving, ThreadPoolExecutor(1) as pool:
        first = pool.submit(serving.run, 1)
        held.started(1)
        with pytest.raises(DeadlineExceeded):
            working_for(request, serving.run, 2, timeout_ms=own_ms)
        held.open()
        assert first.result(LIMIT_S) == 2
        assert held.seen == [1]


def test_tasks_and_threads_inherit_the_deadline():
    async def main():
        set_current_request(expired())
        with Serving(lambda: lambda batch: batch) as serving:
            calls = [
                asyncio.create_task(serving.arun(1)),
                asyncio.to_thread(serving.run, 1),
            ]
            results = await asyncio.gather(*calls, return_exceptions=True)
            return results, serving.stats().batches

    results, batches = asyncio.run(main())
    assert [type(result) for result in results] == [DeadlineExceeded] * 2
    assert batches == 0


# Clients that leave.


def test_what_waits_is_taken_back_when_the_client_leaves(callers, held):
    with Serving(lambda: held, batch_size=1) as serving:
        running = callers.run(serving, 1)
        held.started(1)
        request = Request()
        waiting = [working_for(request, submit, serving) for submit in WAITS]
        queued(serving, 1 + 2 + 1)
        request.leave()
        assert [type(error) for error in answers(waiting)] == [ClientDisconnected] * 3
        assert serving.stats().queued == 0
        held.open()
        assert running.result(LIMIT_S) == 2
        assert held.seen == [1]
        assert serving.stats().cancelled == 3


def in_thread(fn, *args):
    context = contextvars.copy_context()
    pool = ThreadPoolExecutor(1)
    future = pool.submit(context.run, fn, *args)
    pool.shutdown(wait=False)
    return future


WAITS = [
    lambda serving: in_thread(serving.run, 2),
    lambda serving: in_thread(lambda: asyncio.run(serving.arun_batch([3, 4]))),
    lambda serving: serving.submit(5),
]


def test_a_batch_that_runs_is_finished_for_nobody(held):
    request = Request()
    with Serving(lambda: held) as serving:
        call = working_for(request, in_thread, serving.run, 1)
        held.started(1)
        request.leave()
        assert isinstance(call.exception(LIMIT_S), ClientDisconnected)
        held.open()
        assert serving.run(2) == 4


def test_the_rest_of_a_call_that_runs_in_part_is_taken_back(held):
    request = Request()
    with Serving(lambda: held, batch_size=2) as serving:
        call = working_for(request, in_thread, serving.run_batch, [1, 2, 3, 4])
        held.started(1)
        request.leave()
        assert isinstance(call.exception(LIMIT_S), ClientDisconnected)
        held.open()
        serving.close()
        assert held.seen == [1, 2]


def test_a_stream_ends_for_the_client_that_left_alone():
    left = threading.Event()

    def load():
        def model(batch):
            yield [0] * len(batch)
            assert left.wait(LIMIT_S)
            yield from ([number] * len(batch) for number in range(1000))

        return model

    with Serving(load) as serving:
        request = Request()
        chunks = working_for(request, serving.stream, 1)
        other = serving.stream(1)
        assert next(chunks) == 0
        request.leave()
        with pytest.raises(ClientDisconnected):
            list(chunks)
        left.set()
        assert list(other) == [0, *range(1000)]


def test_a_call_that_is_refused_is_forgotten(held):
    request = Request()
    with Serving(lambda: held, batch_size=1, queue_limit=1) as serving:
        calls = [working_for(request, in_thread, serving.run, 1)]
        held.started(1)
        calls.append(working_for(request, in_thread, serving.run, 2))
        queued(serving, 1)
        with pytest.raises(Overloaded):
            working_for(request, serving.run, 3)
        assert len(request._waiting) == 2
        held.open()
        assert answers(calls) == [2, 4]
        assert not request._waiting


def test_a_client_that_leaves_while_the_call_is_admitted(held):
    """The request says so after the check of the call and before it is in the queue."""

    class Leaving(Request):
        def attach(self, work, cancel):
            self.leave()
            super().attach(work, cancel)

    with Serving(lambda: held) as serving:
        first = in_thread(serving.run, 1)
        held.started(1)
        with pytest.raises(ClientDisconnected):
            working_for(Leaving(), serving.run, 2)
        assert serving.stats().queued == 0
        held.open()
        assert first.result(LIMIT_S) == 2
        assert held.seen == [1]


def test_after_the_response_nothing_binds():
    request = Request(time.monotonic() + 0.01)
    request.end()
    time.sleep(0.02)
    request.leave()
    assert (request.deadline, request.client_left) == (inf, False)
    with Serving(lambda: lambda batch: batch) as serving:
        assert working_for(request, serving.run, 1) == 1


# Callers of one cold key.


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_the_deadline_of_who_computes_is_not_that_of_who_waits(held, kind):
    def call(serving):
        if kind == "blocking":
            return cached_inference(serving.run, 2, cache_key="shared")
        return asyncio.run(acached_inference(serving.arun, 2, cache_key="shared"))

    with Serving(lambda: held, batch_size=1) as serving:
        first = in_thread(serving.run, 1)
        held.started(1)
        request = Request()
        leader = working_for(request, in_thread, call, serving)
        queued(serving, 1)
        follower = in_thread(call, serving)
        time.sleep(0.05)  # to be waiting; if it is late, it leads, which the test allows
        request.leave()
        assert isinstance(leader.exception(LIMIT_S), ClientDisconnected)
        held.open()
        assert (first.result(LIMIT_S), follower.result(LIMIT_S)) == (2, 4)


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_deadline_counts_while_another_computes(kind):
    """Also while the one who computes has no deadline."""
    computing, go = threading.Event(), threading.Event()

    def compute(item):
        computing.set()
        assert go.wait(LIMIT_S)
        return item

    def call():
        if kind == "blocking":
            return cached_inference(compute, 2, cache_key="shared")
        return asyncio.run(acached_inference(compute, 2, cache_key="shared"))

    leader = in_thread(call)
    assert computing.wait(LIMIT_S)
    with pytest.raises(DeadlineExceeded):
        working_for(Request(time.monotonic() + 0.05), call)
    go.set()
    assert leader.result(LIMIT_S) == 2
    stats = cache_stats()
    assert (stats["misses"], stats["errors"]) == (1, 1)


@pytest.mark.parametrize("kind", ["blocking", "async"])
def test_a_deadline_counts_while_another_process_computes(kind, store):
    ran = []

    async def compute(item):
        ran.append(item)

    def call():
        if kind == "blocking":
            return cached_inference(ran.append, 2, cache_key="shared")
        return asyncio.run(acached_inference(compute, 2, cache_key="shared"))

    key = call_key(compute, 2, prefix="ml", cache_key="shared")
    with Lock(store.backend, b"flight:" + key.encode()), pytest.raises(DeadlineExceeded):
        working_for(Request(time.monotonic() + 0.05), call)
    assert ran == []


# The entry.


def scope(*headers):
    return {"type": "http", "headers": [(b"host", b"x"), *headers]}


def enter(app, *headers):
    """Run an app through an entry; return the entry and what was sent."""
    sent = []

    async def send(message):
        sent.append(message)

    entry = AsgiEntry(app)
    asyncio.run(entry(scope(*headers), None, send))
    return entry, sent


def header(value):
    return b"x-request-timeout-ms", value


@pytest.mark.parametrize("headers", [[header(b"soon")], [header(b"5"), header(b"6")]])
def test_a_header_that_makes_no_sense_is_a_bad_request(headers):
    ran = []
    _, sent = enter(lambda *args: ran.append(args), *headers)
    assert sent[0]["status"] == 400
    assert b"X-Request-Timeout-Ms: give one number" in sent[1]["body"]
    assert ran == []


def test_a_wsgi_header_that_makes_no_sense_is_a_bad_request():
    started = []
    entry = WsgiEntry(lambda *args: pytest.fail("it ran"))
    body = entry({"HTTP_X_REQUEST_TIMEOUT_MS": "-1"}, lambda *args: started.append(args))
    assert started[0][0] == "400 Bad Request"
    assert b"X-Request-Timeout-Ms" in b"".join(body)


def test_the_request_of_a_wsgi_thread_is_the_present_one():
    seen = []
    entry = WsgiEntry(lambda environ, start: seen.append(current_request()))
    entry({"HTTP_X_REQUEST_TIMEOUT_MS": "60000"}, None)
    entry({}, None)
    assert 0 < seen[0].deadline - time.monotonic() < 60
    assert seen[1] is None


def test_a_request_is_over_with_its_last_message():
    states = []

    async def app(scope, receive, send):
        for message in (
            {"type": "http.response.start", "status": 200, "headers": []},
            {"type": "http.response.body", "body": b"1", "more_body": True},
            {"type": "http.response.body", "body": b"2"},
        ):
            await send(message)
            states.append(current_request().over)

    _, sent = enter(app)
    assert states == [False, False, True]
    assert len(sent) == 3


def test_errors_that_escape_are_answered():
    async def app(scope, receive, send):
        raise Overloaded("secret")

    _, sent = enter(app)
    assert [message.get("status") for message in sent] == [503, None]


def test_errors_that_escape_a_wsgi_app_are_answered():
    def app(environ, start_response):
        raise DeadlineExceeded("secret")

    started = []
    WsgiEntry(app)({}, lambda *args: started.append(args))
    assert started[0][0] == "504 Gateway Timeout"


@pytest.mark.parametrize("form", ["plain", "from", "group"])
def test_errors_about_a_client_that_left_end_quietly(form):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        entry.leave()
        left = ClientDisconnected("left")
        if form == "group":
            raise ExceptionGroup("of a task group", [left])
        if form == "from":
            raise RuntimeError("the framework says") from left
        raise left

    async def send(message):
        pass

    entry = AsgiEntry(app)
    asyncio.run(entry(scope(), None, send))


@pytest.mark.parametrize("form", ["group", "while handling"])
def test_another_error_is_raised_although_the_client_left(form):
    async def app(scope, receive, send):
        entry.leave()
        left, bug = ClientDisconnected("left"), KeyError("a bug")
        if form == "group":
            raise ExceptionGroup("of a task group", [left, bug])
        try:
            raise left
        finally:
            raise bug

    entry = AsgiEntry(app)
    with pytest.raises((ExceptionGroup, KeyError)):
        asyncio.run(entry(scope(), None, None))


# Readiness.


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("deadline_ms", "limit_s"), [(None, 60.0), (2500, 2.5)])
def test_a_serving_whose_batch_hangs_is_not_ready(held, deadline_ms, limit_s):
    with Serving(lambda: held, deadline_ms=deadline_ms) as serving, ThreadPoolExecutor(1) as pool:
        serving.start()
        clock = serving._local._runner.queue.clock = Clock()
        assert serving.ready
        call = pool.submit(serving.run, 1, timeout_ms=1e9)
        held.started(1)
        clock.now += limit_s
        assert serving.ready
        clock.now += 0.1
        assert not serving.ready
        assert not serving.stats().ready
        held.open()
        assert call.result(LIMIT_S) == 2
        until(lambda: serving.ready, "ready again")


def test_a_generator_that_goes_on_does_not_hang():
    clock = Clock()
    ready = []

    def load():
        def model(batch):
            for _ in range(5):
                clock.now += 50.0
                ready.append(serving.ready)
                yield [0]

        return model

    with Serving(load) as serving:
        serving.start()
        serving._local._runner.queue.clock = clock
        assert list(serving.stream(1)) == [0] * 5
    assert ready == [True] * 5


def test_a_hanging_batch_in_real_time(held):
    with Serving(lambda: held, deadline_ms=30) as serving:
        running = serving.submit(1, timeout_ms=60_000)
        held.started(1)
        with pytest.raises(DeadlineExceeded):
            serving.run(2)
        until(lambda: not serving.ready, "not ready")
        held.open()
        assert running.result(LIMIT_S) == 2
        until(lambda: serving.ready, "ready again")


def test_a_full_queue_says_when_to_come_back(held):
    with Serving(lambda: held, batch_size=1, queue_limit=4) as serving:
        serving.start()
        queue = serving._local._runner.queue
        pool = [in_thread(serving.run, 1)]
        held.started(1)
        queue.tally.busy_s, queue.tally.items = 50.0, 20  # 2.5 s an item
        pool += [in_thread(serving.run, 1) for _ in range(4)]
        queued(serving, 4)
        with pytest.raises(Overloaded) as raised:
            serving.run(1)
        assert raised.value.retry_after_s == pytest.approx(10.0)
        held.open()
        assert answers(pool) == [2] * 5
