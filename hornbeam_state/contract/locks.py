"""The contract of locks."""
# ruff: noqa: S101 - a test states what it expects

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from hornbeam_state.backends.base import SPACES, Backend
from hornbeam_state.contract.driving import Contract, Driven, Driver, in_child

if TYPE_CHECKING:
    from collections.abc import Callable


class LockContract(Contract):
    """What the locks of every `Backend` keep to."""

    @pytest.fixture
    def locks(self, backend: Backend, driver: Driver) -> Callable[[bytes], Any]:
        """Supply what takes a lock."""

        def take(name: bytes) -> Any:
            held = driver.call(backend, "try_lock", name, 30.0)
            return None if held is None else Driven(held, driver)

        return take

    @pytest.mark.parametrize("name", [b"lock", b"a{b}*\n\x00", b"n" * 4096])
    def test_a_lock_has_one_holder(self, locks: Callable[[bytes], Any], name: bytes) -> None:
        """It is refused while it is held, and free after."""
        first = locks(name)
        assert first is not None
        assert locks(name) is None
        assert first.release() is True
        second = locks(name)
        assert second is not None
        assert first.release() is False, "the first holder released the second's lock"
        assert locks(name) is None
        assert second.release() is True

    def test_a_lock_is_released_once(self, locks: Callable[[bytes], Any]) -> None:
        """A second release changes nothing and says so."""
        held = locks(b"lock")
        assert held.release() is True
        assert held.release() is False

    def test_locks_of_other_names_are_independent(self, locks: Callable[[bytes], Any]) -> None:
        """Any number may be held at once."""
        held = [locks(b"lock/%d" % number) for number in range(20)]
        assert None not in held
        assert [lock.release() for lock in held] == [True] * 20

    def test_a_lock_and_a_key_of_one_name_do_not_meet(
        self, backend: Backend, locks: Callable[[bytes], Any]
    ) -> None:
        """A lock is in no key space."""
        held = locks(b"name")
        for space in SPACES:
            assert backend.keyspace(space).get(b"name") is None
            assert backend.keyspace(space).keys() == []
            backend.keyspace(space).put(b"name", b"v")
            assert backend.keyspace(space).clear() == 1
        assert locks(b"name") is None
        assert held.release() is True

    def test_one_of_many_gets_the_lock(self, backend: Backend, driver: Driver) -> None:
        """However many ask at once, from threads or tasks."""

        async def ask() -> Any:
            return await driver.acall(backend, "try_lock", b"lock", 30.0)

        [held] = [lock for lock in driver.race(*(ask() for _ in range(8))) if lock is not None]
        assert held.release() is True

    def test_a_lock_excludes_a_change_of_means(self, backend: Backend) -> None:
        """A lock taken by a thread is refused to a task, and may be released by one."""

        async def main() -> None:
            held = backend.try_lock(b"lock", 30.0)
            assert held is not None
            assert await backend.atry_lock(b"lock", 30.0) is None
            assert await held.arelease() is True
            held = await backend.atry_lock(b"lock", 30.0)
            assert held is not None
            assert backend.try_lock(b"lock", 30.0) is None
            assert held.release() is True
            await backend.aclose()

        asyncio.run(main())

    def test_a_child_does_not_hold_its_parents_lock(
        self, backend: Backend, locks: Callable[[bytes], Any]
    ) -> None:
        """After a fork the lock is still the parent's, and the child cannot take it."""
        held = locks(b"lock")
        assert in_child(lambda: backend.try_lock(b"lock", 30.0) is None)
        assert locks(b"lock") is None
        assert held.release() is True
