"""Cached calls while the store fails: the answer is computed, and counted as an error."""

from __future__ import annotations

import asyncio

import pytest

from hornbeam_ml import acached_inference, cache_scope, cached_inference
from hornbeam_state import Store, StoreFull, set_default_store
from hornbeam_state.testing import FaultyBackend


@pytest.fixture
def faulty(store):
    """Put faults between the cache and its store."""
    faulty = FaultyBackend(store.backend)
    previous = set_default_store(Store(store.config, backend=faulty))
    yield faulty
    faulty.heal()
    set_default_store(previous)


@pytest.fixture(params=["sync", "thread", "async"])
def infer(request):
    """Call the function, await it in a thread, or await it as a coroutine function."""

    async def awaited(fn, input, *, is_async):
        async def coroutine(input):
            return fn(input)

        return await acached_inference(coroutine if is_async else fn, input, cache_key=input)

    def infer(fn, input):
        if request.param == "sync":
            return cached_inference(fn, input, cache_key=input)
        return asyncio.run(awaited(fn, input, is_async=request.param == "async"))

    return infer


class Model:
    """Doubles a number, and counts how often it did."""

    def __init__(self) -> None:
        self.computed = 0

    def __call__(self, number):
        self.computed += 1
        return number * 2


@pytest.fixture
def model():
    return Model()


def counts(scope):
    return (scope.hits, scope.misses, scope.coalesced, scope.errors)


def test_an_outage_costs_the_cache_and_not_the_answer(faulty, infer, model):
    """What was cached before it is a hit again after it."""
    with cache_scope() as scope:
        assert infer(model, 1) == 2
        with faulty.outage():
            assert [infer(model, 1) for _ in range(2)] == [2, 2]
            assert counts(scope) == (0, 1, 0, 2)
        assert infer(model, 1) == 2
    assert counts(scope) == (1, 1, 0, 2)
    assert model.computed == 3


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        pytest.param("get", (0, 2, 0, 0), id="reading"),
        pytest.param("put", (0, 0, 0, 2), id="writing"),
        pytest.param("try_lock", (1, 1, 0, 0), id="locking"),
    ],
)
def test_a_step_that_fails_is_gone_without(faulty, infer, model, operation, expected):
    """A result that was stored is a miss, one that was not is an error; a hit needs only reading."""
    faulty.before(operation).fail()
    with cache_scope() as scope:
        assert [infer(model, 1) for _ in range(2)] == [2, 2]
    assert counts(scope) == expected


def test_a_cache_without_room_computes(faulty, infer, model):
    """Each call, until there is room again."""
    with cache_scope() as scope:
        with faulty.before("put", space="cache").fail(StoreFull):
            assert [infer(model, 1) for _ in range(2)] == [2, 2]
        assert [infer(model, 1) for _ in range(2)] == [2, 2]
    assert counts(scope) == (1, 1, 0, 2)


def test_a_result_whose_storing_is_not_confirmed_is_an_error_and_then_a_hit(faulty, infer, model):
    """It may be in, and here it is."""
    faulty.after("put", nth=1).fail()
    with cache_scope() as scope:
        assert [infer(model, 1) for _ in range(2)] == [2, 2]
    assert counts(scope) == (1, 0, 0, 1)
    assert model.computed == 1


def test_a_lock_that_is_not_released_keeps_nobody_from_the_answer(faulty, infer, model):
    """The result is there already; other calls have locks of their own."""
    faulty.before("release").fail()
    with cache_scope() as scope:
        assert [infer(model, number) for number in (1, 1, 2)] == [2, 2, 4]
    assert counts(scope) == (1, 2, 0, 0)


def test_an_error_of_the_function_comes_out_when_the_release_fails_too(faulty, infer):
    """The caller is told of its own failure, not of the store's."""
    faulty.before("release").fail()
    with pytest.raises(ZeroDivisionError):
        infer(lambda number: 1 // number, 0)
