"""The functions over the process default store, and the names a user imports."""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hornbeam_state
from hornbeam_state import (
    ConfigError,
    Lock,
    LockTimeout,
    Store,
    default_store,
    open_store,
    set_default_store,
    state_get,
    state_incr,
    state_set,
)

OVER_STATE = [
    "state_get",
    "state_set",
    "state_add",
    "state_cas",
    "state_update",
    "state_delete",
    "state_incr",
    "state_decr",
    "state_get_multi",
    "state_set_multi",
    "state_keys",
    "state_ttl",
    "state_clear",
]
ERRORS = [
    "HornbeamError",
    "StoreError",
    "StoreUnavailable",
    "StoreFull",
    "CodecError",
    "KeyTooLong",
    "WrongType",
    "LockTimeout",
    "LockLost",
    "Overloaded",
    "DeadlineExceeded",
    "RpcError",
    "NodeDown",
    "NotExposed",
    "RemoteError",
]
OTHERS = ["lock", "register_codec", "open_store", "MISSING"]


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Start without a default store, with the environment naming one, and clean up after."""
    monkeypatch.setenv("HORNBEAM_STORE", f"lmdb://{tmp_path}/store")
    monkeypatch.chdir(tmp_path)
    before = set_default_store(None)
    yield tmp_path
    made = set_default_store(before)
    if made is not None:
        made.close()


def test_the_functions_share_the_store_of_the_environment(directory):
    """Another store on the same place sees what they do."""
    state_set("k", "v", ttl=60)
    assert state_incr("n", 5) == 5
    store = open_store(f"lmdb://{directory}/store")
    assert store.get("k") == "v"
    assert 0 < store.ttl("k") <= 60
    store.set("n", 10)
    assert state_incr("n") == 11
    store.close()


def scenario(call):
    """Use every function with every kind of argument; return what they returned."""

    def double(old):
        return old * 2

    calls = [
        ("get", ("k",), {}),
        ("get", ("k", "default"), {}),
        ("get", (), {"key": "k", "default": 7}),
        ("set", ("k", [1, (2,)]), {}),
        ("set", ("k2", 1), {"ttl": 100}),
        ("get", ("k",), {}),
        ("add", ("k", 1), {}),
        ("add", ("k3", 1), {"ttl": 100}),
        ("cas", ("k", [1, (2,)], 5), {}),
        ("cas", ("k", 6, 7), {"ttl": 100}),
        ("cas", ("k4", hornbeam_state.MISSING, 7), {"ttl": 100}),
        ("update", ("k", double), {}),
        ("update", ("k5", double, 4), {"ttl": 100}),
        ("incr", ("k",), {}),
        ("incr", ("k", 5), {}),
        ("incr", ("n",), {"delta": 2, "ttl": 100}),
        ("decr", ("k",), {}),
        ("decr", ("m", 4), {"ttl": 100}),
        ("get_multi", (["k", "nothing", "n"],), {}),
        ("set_multi", ({"a/1": 1, "a/2": 2},), {}),
        ("set_multi", ({"a/3": 3},), {"ttl": 100}),
        ("keys", (), {}),
        ("keys", ("a/",), {}),
        ("keys", (), {"prefix": "k"}),
        ("ttl", ("k",), {}),
        ("delete", ("k",), {}),
        ("delete", ("k",), {}),
        ("clear", ("a/",), {}),
        ("clear", (), {}),
        ("keys", (), {}),
    ]
    results = [call(name, *args, **kwargs) for name, args, kwargs in calls]
    call("set", "left", 1, ttl=100)
    results.append(0 < call("ttl", "left") <= 100)
    return results


def test_functions_twins_and_methods_do_the_same(directory):
    """One scenario, told four times, has one outcome."""

    def function(name, *args, **kwargs):
        return getattr(hornbeam_state, f"state_{name}")(*args, **kwargs)

    with asyncio.Runner() as runner:

        def twin(name, *args, **kwargs):
            return runner.run(getattr(hornbeam_state, f"astate_{name}")(*args, **kwargs))

        functions = scenario(function)
        default_store().clear()
        twins = scenario(twin)
    store = open_store(f"lmdb://{directory}/other")
    methods = scenario(lambda name, *args, **kwargs: getattr(store, name)(*args, **kwargs))
    store.close()
    assert functions == twins == methods
    assert functions[0] is None
    assert functions[-2:] == [[], True]


def test_lock_is_one_over_the_default_store(directory):
    """It excludes a lock of the same name on the same store, sync and async."""
    with hornbeam_state.lock("name", ttl=5, timeout=1) as held:
        assert isinstance(held, Lock)
        store = open_store(f"lmdb://{directory}/store")
        with pytest.raises(LockTimeout), store.lock("name", timeout=0):
            pass
        store.close()

    async def main():
        async with hornbeam_state.lock("name", timeout=1):
            with pytest.raises(LockTimeout):
                async with hornbeam_state.lock("name", timeout=0):
                    pass

    asyncio.run(main())


@pytest.mark.parametrize("name", [*OVER_STATE, *ERRORS, *OTHERS])
def test_a_star_import_brings_the_public_name(name):
    """`from hornbeam_state import *` is how examples get it."""
    names = {}
    exec("from hornbeam_state import *", names)
    assert names[name] is getattr(hornbeam_state, name)
    assert name in hornbeam_state.__all__


def test_a_star_import_brings_no_modules():
    """Nothing but what is meant to be public."""
    names = {}
    exec("from hornbeam_state import *", names)
    del names["__builtins__"]
    assert sorted(names) == sorted(hornbeam_state.__all__)
    assert [name for name, value in names.items() if inspect.ismodule(value)] == []


@pytest.mark.parametrize(
    ("error", "parents"),
    [
        pytest.param("StoreError", ["HornbeamError"], id="StoreError"),
        pytest.param("StoreUnavailable", ["StoreError"], id="StoreUnavailable"),
        pytest.param("StoreFull", ["StoreError"], id="StoreFull"),
        pytest.param("CodecError", ["StoreError"], id="CodecError"),
        pytest.param("KeyTooLong", ["StoreError"], id="KeyTooLong"),
        pytest.param("WrongType", ["HornbeamError"], id="WrongType"),
        pytest.param("LockTimeout", ["HornbeamError"], id="LockTimeout"),
        pytest.param("LockLost", ["HornbeamError"], id="LockLost"),
        pytest.param("Overloaded", ["HornbeamError"], id="Overloaded"),
        pytest.param("RpcError", ["HornbeamError"], id="RpcError"),
        pytest.param("NodeDown", ["RpcError"], id="NodeDown"),
        pytest.param("NotExposed", ["RpcError"], id="NotExposed"),
        pytest.param("RemoteError", ["RpcError"], id="RemoteError"),
    ],
)  # fmt: skip
def test_errors_stand_where_the_api_says(error, parents):
    """Callers catch a branch of the tree."""
    for parent in parents:
        assert issubclass(getattr(hornbeam_state, error), getattr(hornbeam_state, parent))


def test_a_late_deadline_is_a_timeout():
    """`except TimeoutError` catches it."""
    assert issubclass(hornbeam_state.DeadlineExceeded, TimeoutError)


@pytest.mark.parametrize("name", OVER_STATE)
def test_every_function_has_a_twin(name):
    """A coroutine function of the same signature, named with an `a` in front."""
    function, twin = getattr(hornbeam_state, name), getattr(hornbeam_state, f"a{name}")
    assert inspect.iscoroutinefunction(twin)
    assert not inspect.iscoroutinefunction(function)
    assert inspect.signature(function) == inspect.signature(twin)
    assert f"a{name}" in hornbeam_state.__all__
    assert function.__doc__
    assert twin.__doc__


@pytest.mark.parametrize("name", OVER_STATE)
def test_every_function_has_the_signature_of_its_method(name):
    """What works on a store works on the default one."""
    method = getattr(Store, name.removeprefix("state_"))
    expected = list(inspect.signature(method).parameters.values())[1:]
    found = list(inspect.signature(getattr(hornbeam_state, name)).parameters.values())
    assert [(one.name, one.kind, one.default) for one in found] == [
        (one.name, one.kind, one.default) for one in expected
    ]


WAIT_FOR_NOTHING = {"lock", "space"}
RETURN_WHAT_CAN_BE_AWAITED = {"subscribe", "asubscribe"}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, method in vars(Store).items()
        if inspect.isfunction(method)
        and not name.startswith("_")
        and not inspect.iscoroutinefunction(method)
        and name not in WAIT_FOR_NOTHING | RETURN_WHAT_CAN_BE_AWAITED
    ],
)
def test_every_method_has_a_twin(name):
    """A method that may wait for a file, a server or a lock can be awaited."""
    twin = getattr(Store, f"a{name}", None)
    assert inspect.iscoroutinefunction(twin), f"Store.{name} has no twin a{name}"
    assert inspect.signature(getattr(Store, name)) == inspect.signature(twin)


def test_the_environment_is_read_at_first_use(directory, monkeypatch):
    """Not at import, and not again afterwards."""
    monkeypatch.setenv("HORNBEAM_STORE", f"lmdb://{directory}/late")
    state_set("k", 1)
    assert (directory / "late" / "format.json").exists()
    assert not (directory / "store").exists()
    monkeypatch.setenv("HORNBEAM_STORE", f"lmdb://{directory}/later")
    assert state_get("k") == 1
    assert not (directory / "later").exists()
    set_default_store(None).close()
    assert state_get("k") is None
    assert (directory / "later").exists()


def test_without_a_variable_it_lies_in_the_working_directory(directory, monkeypatch):
    """In `.hornbeam`, which git leaves alone."""
    monkeypatch.delenv("HORNBEAM_STORE")
    state_set("k", 1)
    assert (directory / ".hornbeam" / ".gitignore").read_text() == "*\n"
    assert default_store().backend.directory == directory / ".hornbeam"
    monkeypatch.chdir("/")
    assert state_get("k") == 1, "the store moved with the working directory"


def test_a_bad_variable_fails_every_function_until_it_is_mended(directory, monkeypatch):
    """With a message that names it; afterwards they work."""
    monkeypatch.setenv("HORNBEAM_STORE", "nonsense://")
    for _ in range(2):
        with pytest.raises(ConfigError, match="HORNBEAM_STORE"):
            state_get("k")
    with pytest.raises(ConfigError, match="HORNBEAM_STORE"):
        hornbeam_state.lock("name")
    with pytest.raises(ConfigError, match="HORNBEAM_STORE"):
        asyncio.run(hornbeam_state.astate_get("k"))
    monkeypatch.setenv("HORNBEAM_STORE", f"lmdb://{directory}/store")
    assert state_incr("n") == 1


def test_set_default_store_swaps_and_hands_back(directory):
    """The previous one stays open; None goes back to the environment."""
    mine = open_store(f"lmdb://{directory}/mine")
    assert set_default_store(mine) is None
    assert default_store() is mine
    state_set("k", "mine")
    assert set_default_store(None) is mine
    assert mine.get("k") == "mine"
    assert state_get("k") is None
    from_environment = default_store()
    assert set_default_store(mine) is from_environment
    assert state_get("k") == "mine"
    assert set_default_store(from_environment) is mine
    mine.close()


def test_threads_that_are_first_together_get_one_store(directory, monkeypatch):
    """Nobody is left with a store of their own."""
    monkeypatch.setenv("HORNBEAM_STORE", f"lmdb://{directory}/store?timeout=20")
    start = threading.Barrier(16)
    found = []

    def first() -> None:
        start.wait()
        found.append(default_store())
        state_incr("n")

    threads = [threading.Thread(target=first) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(found) == 16
    assert len({id(store) for store in found}) == 1
    assert state_get("n") == 16


@pytest.mark.parametrize("package", ["hornbeam_state", "hornbeam_state.backends.embedded.backend"])
def test_an_import_does_nothing(directory, package):
    """No file, no store, no thread, even where the variable is nonsense."""
    script = (
        f"import sys, threading, {package}\n"
        "import hornbeam_state.default as default\n"
        "print(default._default, threading.active_count(), 'torch' in sys.modules)"
    )
    place = str(Path(hornbeam_state.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=directory,
        env={**os.environ, "HORNBEAM_STORE": "nonsense://", "PYTHONPATH": place},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout.split(), done.stderr) == (["None", "1", "False"], "")
    assert list(directory.iterdir()) == []
