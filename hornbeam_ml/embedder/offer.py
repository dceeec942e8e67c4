"""An embedder as a model host serves it."""

from __future__ import annotations

import hashlib
import time
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np

from hornbeam_ml.embedder.vectors import LocalVectors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from hornbeam_ml.embedder.model import TextModel
    from hornbeam_ml.memory import LoadCost
    from hornbeam_ml.serving.serving import Serving
    from hornbeam_state.transports.base import Request


class EmbedderOffer:
    """A serving that also takes the texts of a call together, and answers with one array.

    Args:
        model: The model.
        serving: What runs it.
        at_a_time: How many texts of one call it is given at a time.
    """

    def __init__(self, model: TextModel, serving: Serving, at_a_time: int) -> None:
        self._model = model
        self._serving = serving
        self._at_a_time = at_a_time

    @property
    def loaded(self) -> bool:
        """Whether it is loaded."""
        return self._serving.loaded

    @property
    def ready(self) -> bool:
        """Whether it takes texts."""
        return self._serving.ready

    @property
    def load_costs(self) -> Sequence[LoadCost]:
        """What loading took."""
        return self._serving.load_costs

    def start(self) -> None:
        """Load it."""
        self._serving.start()

    def info(self) -> dict[str, Any]:
        """Return the `Facts` of the loaded model, which clients have to know."""
        return self._model.facts()._asdict()

    async def answer(self, request: Request) -> Sequence[Any]:
        """Answer a call that came to the model host."""
        if request.method != "encode":
            return await self._serving.answer(request)
        texts, options = request.values[0], request.options
        vectors = LocalVectors(
            self._model,
            self._serving,
            normalize=options["normalize"],
            deadline=inf if request.timeout == inf else time.monotonic() + request.timeout,
            at_a_time=self._at_a_time,
        )
        compute = vectors.acompute_inline if options.get("inline") else vectors.acompute_all
        return [np.stack(await compute(texts))]

    def answer_stream(self, request: Request) -> AsyncIterator[Any]:
        """Answer a call for chunks, which this kind of model does not make."""
        return self._serving.answer_stream(request)


def target_of(settings: tuple[Any, ...]) -> str:
    """Return what an embedder without a name is called, in workers and in their host alike."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8).hexdigest()
    return f"embedder-{digest}"
