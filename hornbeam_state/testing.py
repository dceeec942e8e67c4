"""For tests: a clock that is set by hand, a backend that fails, and the contract of backends.

What an app does without its store is seen by giving it a `FaultyBackend`::

    real = open_store("memory://")
    faulty = FaultyBackend(real.backend)
    set_default_store(Store(real.config, backend=faulty))

    faulty.before("put", space="cache").fail(StoreFull)  # nothing was done
    faulty.after("incr", nth=2).fail()                   # done, and the caller cannot know
    faulty.before("get").delay(0.2)                      # seconds
    with faulty.outage():
        ...
    with faulty.before("cas").hold() as hold:            # in another thread or task
        hold.reached()
    faulty.heal()
    assert faulty.count("put") == 3

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
from hornbeam_state.faulty_backend import FaultyBackend

__all__ = [
    "BackendContract",
    "FaultyBackend",
    "KeyspaceContract",
    "LockContract",
    "ManualClock",
    "MessageContract",
]


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
