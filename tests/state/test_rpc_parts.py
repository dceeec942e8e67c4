"""The parts of calls between nodes that need no other process: who runs, who is chosen, what is told."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import os
import threading
from dataclasses import replace
from math import inf
from random import Random
from types import SimpleNamespace

import pytest

from hornbeam_state import (
    CodecError,
    ConfigError,
    NodeDown,
    NotExposed,
    Overloaded,
    RemoteError,
    StoreUnavailable,
    expose,
)
from hornbeam_state.config import StoreConfig
from hornbeam_state.rpc import carriers, links, places
from hornbeam_state.rpc.caller import Caller
from hornbeam_state.rpc.choosing import able, choose, split_name
from hornbeam_state.rpc.entries import Entry, read_entry
from hornbeam_state.rpc.exposed import exposed_names, find_exposed
from hornbeam_state.rpc.links import Link, Links
from hornbeam_state.rpc.outcomes import remote, unsent
from hornbeam_state.rpc.requests import Context, make_request, read_arguments, read_context
from hornbeam_state.rpc.threads import Raised, Threads
from hornbeam_state.rpc.turns import Turns, TurnsAhead
from hornbeam_state.store import Store
from hornbeam_state.transports.base import Request


def entry(name, **fields):
    defaults = {"token": "t", "host": "h", "pid": 1, "place": "", "started": 0}
    return Entry(name=name, **{**defaults, **fields})


class TestChoosing:
    @pytest.mark.parametrize(
        ("busy", "pending"),
        [
            pytest.param({"running": 3}, {}, id="by its heartbeat"),
            pytest.param({"queued": 1}, {}, id="by its queue"),
            pytest.param({}, {"busy": 1}, id="by what is under way from here"),
        ],
    )
    def test_the_less_busy_of_two_is_chosen(self, busy, pending):
        candidates = [entry("idle"), entry("busy", **busy)]
        chosen = {choose(candidates, lambda n: pending.get(n, 0), Random(i)).name for i in range(9)}
        assert chosen == {"idle"}

    def test_a_node_that_runs_more_at_a_time_is_less_busy(self):
        candidates = [entry("small", running=1), entry("large", running=3, concurrency=8)]
        assert choose(candidates, lambda _: 0, Random(0)).name == "large"

    def test_all_of_many_idle_nodes_get_calls(self):
        candidates = [entry(str(number)) for number in range(5)]
        assert len({choose(candidates, lambda _: 0, Random(i)).name for i in range(99)}) == 5

    def test_only_those_that_expose_it_are_able(self):
        has = entry("has", functions={"m.f": False})
        assert able([entry("has not"), has], "m.f") == [has]
        with pytest.raises(NotExposed, match="none of 1 nodes"):
            able([has], "m.g")

    @pytest.mark.parametrize("function", ["f", ".f", "m.", "", "."])
    def test_a_function_has_a_module(self, function):
        with pytest.raises(ValueError, match=r"module\.function"):
            split_name(function)
        assert split_name("a.b.c") == ("a.b", "c")


class Scripted(Caller):
    """Calls two nodes that expose `m.f`; each raises, or waits, as it is told."""

    def __init__(self, outcomes):
        self.asked = []
        self.left_s = []
        self._outcomes = iter(outcomes)
        self._links = SimpleNamespace(pending=lambda node: 0)
        found = [entry(name, token=name, functions={"m.f": False}) for name in ("a@h", "b@h")]

        async def found_later():
            return found

        self.registry = SimpleNamespace(
            live=lambda: found, look=lambda: found, alive=found_later, alook=found_later
        )

    def call(self, node, request):
        self.asked.append(node)
        self.left_s.append(request.timeout)
        if (error := next(self._outcomes, None)) is not None:
            raise error
        return "done"

    async def acall(self, node, request):
        return self.call(node, request)

    def run(self, timeout, *, twin):
        def make(_node):
            return Request(target="m", method="f", timeout=timeout)

        return asyncio.run(self.acall_any("m.f", make)) if twin else self.call_any("m.f", make)


@pytest.mark.parametrize("twin", [False, True], ids=["sync", "async"])
class TestCallsOfAnyNode:
    @pytest.mark.parametrize("error", [unsent("gone"), NotExposed("not by who has the name now")])
    def test_the_next_is_asked_in_the_time_that_is_left(self, error, twin):
        caller = Scripted([error])
        assert caller.run(5.0, twin=twin) == "done"
        assert sorted(caller.asked) == ["a@h", "b@h"]
        assert 0 < caller.left_s[1] < caller.left_s[0] <= 5

    @pytest.mark.parametrize("error", [NodeDown("it was sent"), Overloaded.refusal("full")])
    def test_nobody_else_is_asked(self, error, twin):
        caller = Scripted([error])
        with pytest.raises(type(error)):
            caller.run(5.0, twin=twin)
        assert len(caller.asked) == 1

    def test_all_have_been_asked(self, twin):
        caller = Scripted([NotExposed("not by this one")] * 3)
        with pytest.raises(NotExposed):
            caller.run(inf, twin=twin)
        assert sorted(caller.asked) == ["a@h", "b@h"]
        assert caller.left_s == [inf, inf]


class TestLinks:
    """What becomes of a link whose node is not in the registry any more."""

    @pytest.fixture
    def find(self):
        """What a look at the registry finds."""
        return {"gpu@h": entry("gpu@h", beat=1, transports={"local": {}})}

    @pytest.fixture
    def look(self, find, monkeypatch):
        """Return what looks at some time, and tells whether the link is still open."""
        clock = SimpleNamespace(monotonic=lambda: clock.now, now=0.0)
        monkeypatch.setattr(links, "time", clock)
        channel = SimpleNamespace(connected=True, pending=1, closed=False)
        channel.close = lambda: setattr(channel, "closed", True)
        channel.fail = lambda _why: channel.close()
        made = Links(None, SimpleNamespace(find_many=lambda _names: find))
        link = Link(find["gpu@h"], channel)
        made._links.append(link)

        def look_at(now, **changes):
            clock.now = now
            vars(channel).update(changes)
            made._tend([link], 0.0)
            return not channel.closed

        assert look_at(0.0)
        return look_at

    def beat(self, find, number):
        find["gpu@h"] = replace(find["gpu@h"], beat=number)

    def test_one_whose_entry_the_store_lost_stays_until_it_would_have_expired(self, find, look):
        self.beat(find, 2)
        assert look(0.5)
        self.beat(find, 3)
        assert look(1.5)
        find["gpu@h"] = None
        assert look(1.6)
        assert look(4.4)  # the last beat came after the look at 0.5
        assert not look(4.6)

    def test_one_whose_node_beats_again_stays(self, find, look):
        self.beat(find, 2)
        assert look(0.5)
        kept, find["gpu@h"] = find["gpu@h"], None
        assert look(1.0)
        find["gpu@h"] = replace(kept, beat=3)
        assert look(1.5)
        assert look(4.9)

    def test_one_without_a_beat_since_it_was_made_is_dropped(self, find, look):
        assert look(0.5)
        find["gpu@h"] = None
        assert not look(1.0)

    @pytest.mark.parametrize("changes", [{"beat": 1}, {"beat": 3, "token": "another"}])
    def test_only_a_later_beat_of_the_same_process_counts(self, find, look, changes):
        """Not what a restored store shows again, nor those of who took the name."""
        self.beat(find, 2)
        assert look(0.5)
        find["gpu@h"] = replace(find["gpu@h"], **changes)
        assert look(2.0)
        find["gpu@h"] = None
        assert not look(4.2)

    def test_one_whose_node_has_left_is_dropped(self, find, look):
        self.beat(find, 2)
        assert look(0.5)
        find["gpu@h"] = None
        assert not look(0.6, connected=False)

    def test_one_that_does_not_tell_whether_its_node_has_left_is_dropped(
        self, find, look, monkeypatch
    ):
        monkeypatch.setattr(links, "KeepingChannel", SimpleNamespace)
        self.beat(find, 2)
        assert look(0.5)
        find["gpu@h"] = None
        assert not look(0.6)


class TestTurns:
    @pytest.fixture
    async def turns(self):
        return Turns("gpu@here", concurrency=1, most_waiting=3)

    async def test_they_come_in_the_order_of_arrival(self, turns):
        first, *others = [turns.ask() for _ in range(4)]
        order = []

        async def run(label, turn):
            await turn.wait()
            order.append(label)
            turn.leave()

        tasks = [asyncio.create_task(run(*each)) for each in enumerate(others)]
        await asyncio.sleep(0)
        assert (turns.running, turns.waiting, order) == (1, 3, [])
        first.leave()
        first.leave()
        await asyncio.gather(*tasks)
        assert (turns.running, turns.waiting, order) == (0, 0, [0, 1, 2])

    async def test_more_than_may_wait_are_refused(self, turns):
        for _ in range(4):
            turns.ask()
        with pytest.raises(Overloaded, match=r"3 calls wait for the node gpu@here, and 1 run"):
            turns.ask()

    async def test_one_that_waits_no_more_is_passed_over(self, turns):
        first, second, third = (turns.ask() for _ in range(3))
        waiting = asyncio.create_task(second.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        first.leave()  # before the cancelled task could say so
        assert (turns.running, turns.waiting) == (1, 0)
        await third.wait()
        second.leave()
        third.leave()
        assert turns.running == 0

    async def test_a_call_of_ones_own_node_shares_the_turn_while_it_lasts(self, turns):
        first = turns.ask()
        shared = turns.share(first.id)
        await shared.wait()
        shared.leave()
        assert turns.running == 1
        first.leave()
        assert turns.share(first.id) is None
        assert turns.share(None) is None

    async def test_a_call_that_waits_elsewhere_has_its_turn_in_the_order_of_arrival(self, turns):
        ahead = TurnsAhead(turns)
        assert ahead.left == 1
        first = turns.ask()
        before, after = turns.ask(), None
        assert await ahead.take(5, 0.0) == []
        after = turns.ask()
        assert (turns.waiting, ahead.left) == (2, 0)
        first.leave()
        assert await ahead.take(5, 0.0) == []
        before.leave()
        [taken] = await ahead.take(5, 0.0)
        taken.leave()
        await after.wait()
        after.leave()
        assert turns.running == 0

    async def test_calls_that_wait_elsewhere_get_all_free_turns(self):
        turns = Turns("gpu@here", concurrency=3, most_waiting=0)
        ahead = TurnsAhead(turns)
        taken = await ahead.take(2, 0.0)
        assert (len(taken), ahead.left) == (2, 1)
        assert len(await ahead.take(9, 0.0)) == 1

    async def test_who_gives_up_leaves_the_turn_to_others(self, turns):
        ahead, first = TurnsAhead(turns), turns.ask()
        assert await ahead.take(1, 0.0) == []
        following = turns.ask()
        first.leave()
        ahead.give_up()
        ahead.give_up()
        await following.wait()
        assert turns.running == 1

    async def test_an_adopted_turn_outlasts_the_one_it_was(self, turns):
        first = turns.ask()
        own = turns.adopt(first)
        first.leave()
        assert turns.running == 1
        own.leave()
        assert turns.running == 0


class TestThreads:
    @pytest.fixture
    async def threads(self):
        made = Threads(1, "test")
        yield made
        made.close()

    async def run(self, threads, fn, ended):
        return await threads.run(contextvars.copy_context(), fn, lambda: ended.append(fn))

    async def test_a_function_that_has_not_begun_never_does(self, threads):
        gate, ended, ran = threading.Event(), [], []
        first = asyncio.create_task(self.run(threads, gate.wait, ended))
        second = asyncio.create_task(self.run(threads, lambda: ran.append(1), ended))
        await asyncio.sleep(0.01)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        gate.set()
        assert await first is True
        assert (len(ended), ran) == (2, [])

    async def test_one_that_has_begun_ends_later(self, threads):
        began, gate, ended = threading.Event(), threading.Event(), []

        def wait():
            began.set()
            gate.wait()

        first = asyncio.create_task(self.run(threads, wait, ended))
        await asyncio.to_thread(began.wait, 10)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert ended == []
        gate.set()
        await self.run(threads, int, [])
        assert ended == [wait]

    @pytest.mark.parametrize("error", [StopIteration(1), SystemExit(2), ValueError(3)])
    async def test_whatever_it_raises_is_handed_over(self, threads, error):
        def fail():
            raise error

        with pytest.raises(Raised) as caught:
            await self.run(threads, fail, [])
        assert caught.value.error is error


class TestRequests:
    def test_arguments_come_out_as_they_went_in(self):
        request = make_request(("m", "f"), [1, 2], {"b": 3, "a": 4}, 1500, Context(traceparent="t"))
        assert (request.target, request.method, request.timeout) == ("m", "f", 1.5)
        context = read_context(request)
        assert context == Context(names=("b", "a"), traceparent="t")
        assert read_arguments(request, context.names) == ([1, 2], {"b": 3, "a": 4})

    @pytest.mark.parametrize(
        ("key", "kwargs"), [((1, "f"), None), (("m", None), None), (("m", "f"), {1: 2})]
    )
    def test_names_are_texts(self, key, kwargs):
        with pytest.raises(TypeError, match="of type str"):
            make_request(key, [], kwargs, 1, Context())

    @pytest.mark.parametrize(
        "options", [{"names": ["a", "b"]}, {"names": [1]}, {"cast": 1}, {"turn": b"x"}]
    )
    def test_damaged_options_are_refused(self, options):
        with pytest.raises(CodecError, match="damaged call"):
            read_context(Request(target="m", values=[1], options=options))

    def test_options_of_later_versions_are_passed_over(self):
        assert read_context(Request(target="m", options={"later": 1})) == Context()


class TestErrors:
    @pytest.mark.parametrize(
        "error", [Overloaded("full"), StoreUnavailable("away"), RemoteError("ValueError", "x")]
    )
    def test_what_a_caller_can_act_on_stays_as_it_is(self, error):
        assert remote(error) is error

    @pytest.mark.parametrize("error", [NodeDown("x"), NotExposed("x"), TimeoutError("x")])
    def test_all_else_is_remote(self, error):
        told = remote(error)
        assert (told.remote_type, told.remote_message) == (type(error).__name__, "x")
        assert told.remote_traceback is None

    def test_a_message_that_cannot_be_read_is_no_obstacle(self):
        class Odd(Exception):
            def __str__(self):
                raise ValueError

        assert remote(Odd()).remote_message == "its message cannot be read"

    def test_a_traceback_is_bounded(self):
        told = remote(ValueError("x" * 10**6), with_traceback=True)
        assert len(told.remote_traceback) < 10**4


class TestExposing:
    def test_the_function_stays_as_it_is(self):
        def one():
            return 1

        assert expose(one, module="stays") is one
        assert expose(module="stays", name="two", idempotent=True)(one) is one
        assert find_exposed("stays", "two").fn is one
        assert exposed_names()["stays.one"] is False
        assert exposed_names()["stays.two"] is True

    def test_names_are_unique(self):
        expose(unique_one, module="unique")
        expose(unique_one, module="unique")  # as when its module is loaded again
        with pytest.raises(ConfigError, match=r"unique\.unique_one is exposed already"):
            expose(lambda: 2, module="unique", name="unique_one")

    def test_what_has_no_name_is_given_one(self):
        part = functools.partial(int, "1")
        with pytest.raises(ConfigError, match="with name="):
            expose(part, module="parts")
        assert expose(part, module="parts", name="one")() == 1

    @pytest.mark.parametrize(
        ("name", "is_async", "is_stream"),
        [
            ("plain", False, False),
            ("coroutine", True, False),
            ("generator", False, True),
            ("async_generator", True, True),
        ],
    )
    def test_each_kind_of_function_is_known(self, name, is_async, is_stream):
        expose(KINDS[name], module="kinds", name=name)
        found = find_exposed("kinds", name)
        assert (found.is_async, found.is_stream) == (is_async, is_stream)


def unique_one():
    return 1


async def _coroutine():
    return 1


def _generator():
    yield 1


async def _async_generator():
    yield 1


KINDS = {
    "plain": unique_one,
    "coroutine": _coroutine,
    "generator": _generator,
    "async_generator": _async_generator,
}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"place": "another machine"}, id="elsewhere"),
        pytest.param({"place": places.place(), "uid": os.geteuid() + 1}, id="another user"),
        pytest.param({"place": places.place(), "transport": "later"}, id="another transport"),
    ],
)
def test_a_node_that_cannot_be_reached_from_here_is_said_to_be_so(fields):
    store = Store(StoreConfig.from_url("memory://"))
    address = {"path": "/nowhere/socket", "uid": fields.get("uid", os.geteuid())}
    transports = {fields.get("transport", "local"): address}
    one = entry("gpu@h", place=fields["place"], transports=transports)
    with pytest.raises(NodeDown, match="cannot be reached from here") as caught:
        carriers.connect(store, one, {}, 1.0)
    assert caught.value.sent is False


def test_an_entry_is_a_value_of_the_store():
    one = entry("gpu@here", functions={"m.f": True}, transports={"local": {"path": "p", "uid": 0}})
    assert read_entry(one.to_value()) == one
    assert one.to_info(5.0).idempotent == ("m.f",)
