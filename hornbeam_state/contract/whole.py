"""The contract of whole backends."""
# ruff: noqa: PLR2004, S101 - a test states what it expects

from __future__ import annotations

import asyncio

from hornbeam_state.backends.base import SPACES, Backend
from hornbeam_state.contract.driving import Driven, Driver, in_child
from hornbeam_state.contract.keyspaces import KeyspaceContract
from hornbeam_state.contract.locks import LockContract
from hornbeam_state.contract.messages import MessageContract


class BackendContract(KeyspaceContract, LockContract, MessageContract):
    """The whole contract: subclass it and supply the `backend` fixture, an empty one."""

    def test_it_is_a_backend(self, backend: Backend) -> None:
        """It has the methods, can be used, and hands out one object for each key space."""
        assert isinstance(backend, Backend)
        backend.check()
        for space in SPACES:
            assert backend.keyspace(space) is backend.keyspace(space)

    def test_its_directory_is_private(self, backend: Backend) -> None:
        """It exists, stays the same, and is closed to other users."""
        assert backend.directory.is_dir()
        assert backend.directory.stat().st_mode & 0o077 == 0
        assert len({backend.directory, backend.directory}) == 1

    def test_key_spaces_never_meet(self, backend: Backend, driver: Driver) -> None:
        """One key in three spaces is three keys."""
        spaces = {name: Driven(backend.keyspace(name), driver) for name in SPACES}
        for name, space in spaces.items():
            assert space.add(b"key", name.encode()) is True
        for name, space in spaces.items():
            assert space.get(b"key") == name.encode()
            assert space.keys() == [b"key"]
        assert spaces["app"].clear() == 1
        assert spaces["sys"].incr(b"n", 1) == 1
        assert spaces["cache"].keys() == [b"key"]
        assert spaces["app"].keys() == []
        assert spaces["cache"].get(b"n") is None

    def test_a_closed_backend_opens_again(self, backend: Backend, driver: Driver) -> None:
        """What was stored before it was closed is there after."""
        space = Driven(backend.keyspace("app"), driver)
        space.put(b"k", b"v")
        driver.call(backend, "close")
        driver.call(backend, "close")
        assert space.get(b"k") == b"v"

    def test_it_works_on_both_sides_of_a_fork(self, backend: Backend, driver: Driver) -> None:
        """Parent and child count on together, each with connections of its own."""
        space = Driven(backend.keyspace("app"), driver)
        space.incr(b"n", 1)

        def work() -> bool:
            totals = [backend.keyspace("app").incr(b"n", 1) for _ in range(50)]

            async def main() -> bool:
                total = await backend.keyspace("app").aincr(b"n", 1)
                await backend.aclose()
                return total > max(totals)

            return asyncio.run(main())

        assert in_child(work)
        assert space.incr(b"n", 1) == 53
