"""For tests: a clock that is set by hand, and the contract that every backend passes.

To run the contract over a backend of your own, supply it as a fixture::

    from hornbeam_state.testing import BackendContract, ManualClock

    class TestMyBackend(BackendContract):
        @pytest.fixture
        def backend(self):
            self.clock = ManualClock()
            backend = MyBackend(clock=self.clock)
            yield backend
            backend.close()

        def elapse(self, seconds):
            self.clock.advance(seconds)

Each test runs through the sync methods and through their awaitable twins. Call
``pytest.register_assert_rewrite("hornbeam_state.contract")`` in a conftest for readable failures.
"""

from __future__ import annotations

from hornbeam_state.contract import (
    BackendContract,
    KeyspaceContract,
    LockContract,
    MessageContract,
)

__all__ = ["BackendContract", "KeyspaceContract", "LockContract", "ManualClock", "MessageContract"]


class ManualClock:
    """A clock that stands still until it is advanced; call it for the seconds."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self._now = now

    def __call__(self) -> float:
        """Return the seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self._now += seconds
