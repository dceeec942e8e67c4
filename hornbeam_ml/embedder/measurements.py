"""What is asked about engines, what was measured, and which is the best: data, and no more."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST_COSINE: Final = 0.999
"""To the vectors of fp32, for each text: what ``auto`` accepts, and all that is not int8 must."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine showed.

    Attributes:
        backend: Its library.
        precision: Its arithmetic.
        texts_per_s: With all streams busy; 0 when it failed.
        cosine: The least one to the vectors of fp32.
        problem: Why it failed, or nothing.
    """

    backend: str
    precision: str
    texts_per_s: float = 0.0
    cosine: float = 0.0
    problem: str = ""

    def __str__(self) -> str:
        name = f"{self.backend} {self.precision}"
        if self.problem:
            return f"{name}: {self.problem}"
        return f"{name} {self.texts_per_s:.0f} texts/s, cosine {self.cosine:.5f}"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What to convert and to measure.

    Attributes:
        model: The directory of a SentenceTransformer; None: it is exported already.
        fingerprint: What it is.
        workshop: The directory where the files go.
        device: ``cpu`` or ``cuda:N``.
        engines: Pairs of backend and precision.
        streams: How many threads encode at a time.
    """

    model: str | None
    fingerprint: str
    workshop: str
    device: str
    engines: list[tuple[str, str]]
    streams: int


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it.

    Attributes:
        measurements: Of each engine.
        unsupported: Why the model cannot be run on token ids; then nothing was measured.
    """

    measurements: list[Measurement] = []
    unsupported: str = ""

    def __str__(self) -> str:
        return "; ".join(map(str, self.measurements))

    def best(self) -> Measurement | None:
        """Return the engine to take, if any will do.

        One that was asked for by name will do unless it computes something else: less than
        `LEAST_COSINE` is the price of int8, but a fault in fp32.
        """
        best = fastest(self.measurements)
        if best is None and len(self.measurements) == 1:
            only = self.measurements[0]
            return None if only.problem or only.precision == "fp32" else only
        return best


def fastest(measurements: Sequence[Measurement]) -> Measurement | None:
    """Return the fastest engine that is as good as `LEAST_COSINE`; None when there is none."""
    good = [found for found in measurements if not found.problem and found.cosine >= LEAST_COSINE]
    return max(good, key=lambda found: found.texts_per_s, default=None)
