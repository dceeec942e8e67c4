"""Which nodes a call goes to, and when it goes to another."""

from __future__ import annotations

import asyncio
import random

import pytest

from hornbeam_ml.errors import ModelError
from hornbeam_ml.serving.nodes import hedged, running
from hornbeam_state.errors import DeadlineExceeded, NodeDown, NotExposed, Overloaded
from hornbeam_state.rpc.entries import Entry
from hornbeam_state.rpc.outcomes import unsent
from hornbeam_state.rpc.route import Route


def a_node(name, servings=("s",), **fields):
    return Entry(
        name=name,
        token=name,
        host="h",
        pid=1,
        place="",
        started=0,
        servings=dict.fromkeys(servings, True),
        **fields,
    )


def a_route(count=3, **options):
    entries = [a_node(f"n{number}") for number in range(count)]
    return Route(entries, lambda name: 0, random.Random(1), **options)


def test_each_node_is_asked_once():
    route = a_route()
    assert {route.next() for _ in range(3)} == {"n0", "n1", "n2"}
    assert not route.goes_on


def test_the_less_busy_of_two_is_asked_first():
    entries = [a_node("busy", running=5), a_node("idle")]
    assert Route(entries, lambda name: 0, random.Random(1)).next() == "idle"
    assert Route(entries, {"idle": 9, "busy": 0}.get, random.Random(1)).next() == "busy"


@pytest.mark.parametrize(
    ("error", "repeats", "follows"),
    [
        pytest.param(unsent("gone"), False, True, id="gone before"),
        pytest.param(NodeDown("gone"), False, False, id="gone with the call"),
        pytest.param(NodeDown("gone"), True, True, id="gone with an idempotent call"),
        pytest.param(Overloaded.refusal("full"), False, True, id="refused"),
        pytest.param(Overloaded("full"), False, False, id="full later"),
        pytest.param(NotExposed("not here"), False, True, id="no longer there"),
        pytest.param(DeadlineExceeded("late"), True, False, id="too late"),
        pytest.param(ValueError("wrong"), True, False, id="the model's own"),
    ],
)
def test_what_another_node_may_follow(error, repeats, follows):
    route = a_route(repeats=repeats)
    route.next()
    assert route.may_follow(error) is follows


def test_nobody_follows_the_last():
    route = a_route(1)
    route.next()
    assert not route.may_follow(unsent("gone"))


def test_a_refused_call_is_sent_on_once():
    route = a_route(5)
    assert route.may_follow(Overloaded.refusal("full"))
    assert not route.may_follow(Overloaded.refusal("full"))


def test_those_that_run_a_serving():
    entries = [a_node("a"), a_node("b", ["t"]), a_node("own")]
    assert [entry.name for entry in running("s", entries, ["own"])] == ["a"]
    with pytest.raises(ModelError, match="no serving 'u' on any of 2 other nodes"):
        running("u", entries, ["own"])


class Nodes:
    """Each answers, or fails, when it is told to."""

    def __init__(self, count=3):
        self.route = a_route(count, repeats=True)
        self.asked = []
        self.cancelled = 0

    async def begin(self, node):
        future = asyncio.get_running_loop().create_future()
        self.asked.append(future)
        try:
            return [await future]
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def call(self, *, hedge_s=0.0, asked=2):
        """Begin a hedged call; return it when so many have been asked."""
        call = asyncio.create_task(hedged(self.route, self.begin, hedge_s))
        await self.until_asked(asked)
        return call

    async def until_asked(self, count):
        async with asyncio.timeout(10):
            while len(self.asked) < count:  # noqa: ASYNC110 - the tasks have to run
                await asyncio.sleep(0)


class TestHedged:
    """The second is asked at once where `hedge_s` is 0, else never."""

    async def test_the_first_result_counts_and_the_other_call_is_cancelled(self):
        nodes = Nodes()
        call = await nodes.call()
        nodes.asked[1].set_result("second")
        assert await call == ["second"]
        assert nodes.cancelled == 1
        assert len(nodes.asked) == 2

    async def test_an_error_of_the_model_is_raised_at_once(self):
        nodes = Nodes()
        call = await nodes.call()
        nodes.asked[0].set_exception(ValueError("wrong"))
        with pytest.raises(ValueError, match="wrong"):
            await call
        assert nodes.cancelled == 1

    @pytest.mark.parametrize("wrong", [0, 1])
    async def test_an_error_of_the_model_counts_when_the_other_node_goes_at_once(self, wrong):
        nodes = Nodes()
        call = await nodes.call()
        nodes.asked[wrong].set_exception(ValueError("wrong"))
        nodes.asked[1 - wrong].set_exception(NodeDown("gone"))
        with pytest.raises(ValueError, match="wrong"):
            await asyncio.wait_for(call, 10)
        assert len(nodes.asked) == 2

    async def test_a_node_that_is_gone_is_replaced_before_it_is_late(self):
        nodes = Nodes()
        call = await nodes.call(hedge_s=3600.0, asked=1)
        nodes.asked[0].set_exception(NodeDown("gone"))
        await nodes.until_asked(2)
        nodes.asked[1].set_result("second")
        assert await call == ["second"]

    async def test_when_one_is_gone_the_other_is_waited_for(self):
        nodes = Nodes(2)
        call = await nodes.call()
        nodes.asked[0].set_exception(NodeDown("gone"))
        await asyncio.sleep(0)
        nodes.asked[1].set_result("second")
        assert await call == ["second"]

    async def test_when_all_are_gone_the_last_error_is_raised(self):
        nodes = Nodes(2)
        call = await nodes.call()
        for number, future in enumerate(nodes.asked):
            future.set_exception(NodeDown(f"gone {number}"))
        with pytest.raises(NodeDown, match="gone"):
            await call

    async def test_cancelled_it_cancels_both(self):
        nodes = Nodes()
        call = await nodes.call()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert nodes.cancelled == 2
