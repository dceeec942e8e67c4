"""Who is there: names that are claimed, kept and given up, over each kind of store."""

from __future__ import annotations

import logging
import os
import time
from types import SimpleNamespace

import pytest
from child_processes import Child
from transport_helpers import eventually

from hornbeam_state import ConfigError, NodeDown, open_store
from hornbeam_state.rpc import places, registration
from hornbeam_state.rpc.entries import PREFIX, Entry, read_entry
from hornbeam_state.rpc.names import full_name, host_name
from hornbeam_state.rpc.registration import TTL_S, Registration
from hornbeam_state.rpc.registry import Registry


@pytest.fixture(params=["lmdb", "valkey"])
def url(request, tmp_path):
    """A place for a registry."""
    if request.param == "lmdb":
        return f"lmdb://{tmp_path}/store"
    return request.getfixturevalue("valkey").url


@pytest.fixture
def store(url):
    made = open_store(url, timeout=10)
    yield made
    made.close()


@pytest.fixture
def registry(store):
    return Registry(store)


@pytest.fixture
def register(store):
    """Return what makes registrations, which are closed after the test."""
    made = []

    def make(name="gpu", *, ready=True, **options):
        def describe(entry):
            return with_transports(entry) if ready else entry

        made.append(Registration(store, name, **{"describe": describe, **options}))
        made[-1].claim()
        made[-1].keep()
        return made[-1]

    yield make
    for each in made:
        each.close()


def with_transports(entry):
    return Entry(**{**entry.to_value(), "transports": {"test": {}}, "functions": {"m.f": True}})


def test_a_node_is_there_until_it_closes(register, registry):
    """It is found by its full name, with what it says of itself."""
    held = register()
    info = registry.info(held.name)
    assert (info.name, info.host, info.pid) == (f"gpu@{host_name()}", host_name(), os.getpid())
    assert (info.functions, info.idempotent) == (("m.f",), ("m.f",))
    assert abs(info.last_seen - time.time()) < TTL_S
    assert [one.name for one in registry.live()] == [held.name]
    held.close()
    held.close()
    with pytest.raises(NodeDown, match=held.name) as caught:
        registry.info(held.name)
    assert caught.value.sent is False
    assert eventually(lambda: not registry.live())


async def test_the_twins_tell_the_same(register, registry, store):
    held = register()
    assert [one.name for one in await registry.alive()] == [held.name]
    assert (await registry.ainfo(held.name)).pid == os.getpid()
    with pytest.raises(NodeDown):
        await registry.ainfo("nobody@nowhere")


def test_a_node_that_is_not_ready_is_not_found(register, registry):
    held = register(ready=False)
    assert registry.live() == []
    with pytest.raises(NodeDown):
        registry.find(held.name)


def test_an_app_does_not_see_the_registry(register, store):
    """Its keys are its own; clearing them leaves the nodes alone."""
    held = register()
    assert store.keys() == []
    store.clear()
    assert store.space("sys").get(PREFIX + held.name) is not None


def test_a_living_process_keeps_its_name(register, store):
    """The refusal says who has it."""
    held = register()
    with pytest.raises(ConfigError, match=rf"gpu@.* is taken by process {os.getpid()} on "):
        Registration(store, "gpu").claim()
    held.close()
    other = Registration(store, "gpu")
    other.claim()
    other.close()


def test_a_living_process_elsewhere_keeps_its_name(register, store, monkeypatch):
    """Only its heartbeats tell that it lives: they are waited for."""
    register()
    monkeypatch.setattr(places, "place", lambda: "another machine")
    with pytest.raises(ConfigError, match="is taken"):
        Registration(store, "gpu").claim()


@pytest.mark.parametrize("beats", [True, False])
def test_a_name_in_an_entry_that_cannot_be_read_is_taken(store, monkeypatch, beats):
    """As that of a node of another version is, whether it beats or is there for ever."""
    monkeypatch.setattr(registration, "TTL_S", 60.0 if beats else 0.1)
    monkeypatch.setattr(registration, "BEAT_S", 0.1)
    space, name = store.space("sys"), full_name("gpu")
    space.set(PREFIX + name, {"version": 2})
    if beats:
        clock = SimpleNamespace(
            monotonic=time.monotonic, sleep=lambda _: space.set(PREFIX + name, {"beat": 3})
        )
        monkeypatch.setattr(registration, "time", clock)
    with pytest.raises(ConfigError, match="taken by another process, of another version"):
        Registration(store, "gpu").claim()


def test_the_name_of_a_killed_process_is_free_at_once(url, store):
    """The process is seen to be gone: nobody waits for its entry to expire."""

    def claim_and_stay():
        own = open_store(url, timeout=10)
        Registration(own, "gpu").claim()
        own.set("claimed", os.getpid())
        time.sleep(60)

    child = Child(claim_and_stay)
    eventually(lambda: store.get("claimed"))
    child.kill()
    before = store.space("sys").get(PREFIX + full_name("gpu"))
    assert read_entry(before).pid == child.pid
    heir = Registration(store, "gpu")
    heir.claim()
    assert read_entry(store.space("sys").get(PREFIX + heir.name)).pid == os.getpid()
    heir.close()


@pytest.mark.slow
def test_the_name_of_a_dead_process_elsewhere_is_free_when_its_entry_expires(store, monkeypatch):
    dead = Registration(store, "gpu")
    dead.claim()
    monkeypatch.setattr(places, "place", lambda: "another machine")
    began = time.monotonic()
    heir = Registration(store, "gpu")
    heir.claim()
    assert time.monotonic() - began > TTL_S / 2
    heir.close()


def test_a_lost_entry_is_written_again(register, registry, store):
    """As after a restart of the server."""
    held = register()
    store.space("sys").delete(PREFIX + held.name)
    assert eventually(lambda: [one.name for one in registry.live()] == [held.name])


def test_a_write_that_was_not_heard_of_is_taken_for_ones_own(register, store):
    """The store answered too late: the entry is not what was written last, and still its own."""
    held = register()
    key = PREFIX + held.name
    store.space("sys").update(key, lambda value: {**value, "beat": 10**6}, ttl=TTL_S)
    assert eventually(lambda: store.space("sys").get(key)["beat"] < 10**6)


def test_whoever_lost_the_name_stops(register, store, caplog):
    """Two that answer for one name would be worse than one that ends."""
    lost = []
    held = register(on_lost=lambda: lost.append(True))
    key = PREFIX + held.name
    with caplog.at_level(logging.CRITICAL):
        store.space("sys").update(key, lambda value: {**value, "token": "another"}, ttl=60)
        eventually(lambda: lost)
    assert "its name belongs to process" in caplog.text
    held.close()
    assert store.space("sys").get(key)["token"] == "another"


def test_a_forked_child_does_not_give_the_name_up(register, registry):
    held = register()
    Child(lambda: held.close() or True).value()
    assert registry.find(held.name).pid == os.getpid()


def test_heartbeats_go_on_after_the_store_was_away(make_server, caplog):
    """One warning for an outage, and the entry is back within moments of the server."""
    server = make_server()
    store = open_store(server.url, timeout=10)
    registry = Registry(store)
    held = Registration(store, "gpu", describe=with_transports)
    held.claim()
    held.keep()
    server.stop()
    eventually(lambda: "the heartbeat of the node" in caplog.text)
    server.start()
    assert eventually(lambda: is_there(registry, held.name))
    held.close()
    store.close()


def is_there(registry, name):
    try:
        return registry.find(name)
    except Exception:
        return None


@pytest.mark.parametrize("name", ["a b", "a@b@c", "@host", "x" * 65, "name@", "ä"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(ConfigError, match="node name"):
        full_name(name)


def test_names_come_from_the_environment(monkeypatch):
    """The argument first, then the variable, then the program."""
    monkeypatch.setenv("HORNBEAM_NODE", "gpu@ml-1")
    assert full_name() == "gpu@ml-1"
    assert full_name("cpu") == f"cpu@{host_name()}"
    monkeypatch.delenv("HORNBEAM_NODE")
    monkeypatch.setattr("sys.argv", ["/somewhere/my worker.py"])
    assert full_name() == f"my-worker@{host_name()}"


@pytest.mark.parametrize("value", [None, 1, {}, {"name": "gpu"}, {"unknown": 1}])
def test_what_is_no_entry_is_passed_over(store, registry, value):
    store.space("sys").set(PREFIX + "odd@host", value)
    assert registry.live() == []
    assert registry.find_many(["odd@host"]) == {"odd@host": None}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"name": 5}, id="name"),
        pytest.param({"pid": "1"}, id="pid"),
        pytest.param({"concurrency": 0}, id="concurrency"),
        pytest.param({"functions": None}, id="no functions"),
        pytest.param({"functions": ["m.f"]}, id="functions in a list"),
        pytest.param({"tags": None}, id="tags"),
        pytest.param({"transports": {"local": "/path"}}, id="address"),
    ],
)
def test_a_damaged_entry_is_passed_over(register, registry, store, changes):
    held = register()
    space = store.space("sys")
    value = space.get(PREFIX + held.name)
    space.set(PREFIX + "damaged@h", {**value, "name": "damaged@h", **changes})
    assert [one.name for one in registry.live()] == [held.name]
    with pytest.raises(NodeDown):
        registry.info("damaged@h")


def test_only_a_living_process_has_a_start():
    assert places.started(os.getpid()) > 0
    assert places.started(2**22 + 1) is None
    assert registration.BEAT_S < TTL_S
