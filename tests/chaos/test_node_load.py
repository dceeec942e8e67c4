"""More calls than a node can take."""

from __future__ import annotations

from collections import Counter

import pytest
from processes import wait_until

pytestmark = pytest.mark.slow

CALLERS = 4
CALLS = 2500  # of each
CONCURRENCY = 50
QUEUE = 1000
SECONDS = 0.05
TIMEOUT_MS = 8000
MB = 2**20


def test_ten_thousand_calls_at_once(make_server, peer, runs, tell):
    """What finds no place is refused at once; all others are answered, and nothing runs twice."""
    server = make_server()
    node = peer(server.url, "gpu", host="ml-1")
    callers = [peer(server.url, f"web-{number}", host="web") for number in range(CALLERS)]
    name = node.serve("gpu", concurrency=CONCURRENCY, queue_limit=QUEUE)
    for caller in callers:
        caller.call(name, "clock")
    node_before = node.do("memory")
    storms = [
        caller.begin("storm", name, f"storm-{number}", CALLS, SECONDS, TIMEOUT_MS)
        for number, caller in enumerate(callers)
    ]
    ends, grown = ended(storms)
    grown["node"] = node.do("memory") - node_before
    assert len(ends) == CALLERS * CALLS
    tell(runs.check(ends))
    told = Counter(end for end, _, _ in ends.values())
    assert set(told) <= {"done", "Overloaded", "DeadlineExceeded"}
    assert told["done"] >= QUEUE
    assert told["Overloaded"] >= CALLS
    assert max(took for _, _, took in ends.values()) < TIMEOUT_MS / 1000 + 3
    assert max(grown.values()) < 100 * MB
    refused = sorted(took for end, _, took in ends.values() if end == "Overloaded")
    answered = max(took for end, _, took in ends.values() if end == "done")
    megabytes = {which: round(number / MB) for which, number in grown.items()}
    tell(
        f"refused after {refused[len(refused) // 2]:.2f} s (median), {refused[-1]:.2f} s (last); "
        f"last answer after {answered:.2f} s; memory grew by {megabytes} MB"
    )
    wait_until(lambda: callers[0].reaches(name), "it goes on")


def test_late_calls_of_a_storm_never_run(make_server, peer, runs, tell):
    """The deadline is shorter than the queue: what it passes in the queue is not begun."""
    server = make_server()
    node, caller = peer(server.url, "gpu", host="ml-1"), peer(server.url, "web", host="web")
    name = node.serve("gpu", concurrency=10, queue_limit=QUEUE)
    ends, _ = ended([caller.begin("storm", name, "storm", 2000, 0.1, 2000)])
    told = Counter((end, sent) for end, sent, _ in ends.values())
    assert told["DeadlineExceeded", False] > 100
    assert max(took for _, _, took in ends.values()) < 2 + 3
    tell(runs.check(ends))


def ended(storms) -> tuple[dict[str, list], dict[str, int]]:
    """Return what became of all calls, and by how much memory each caller grew."""
    ends, grown = {}, {}
    for number, storm in enumerate(storms):
        done = storm.result(120)
        assert done.error is None, done.message
        ends |= done.value["ends"]
        grown[f"caller {number}"] = done.value["bytes"]
    return ends, grown
