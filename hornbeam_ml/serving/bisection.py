"""Running a batch so that every entry of it is finished, whatever the model does.

A batch that fails with an error about its data is run again by halves, until the items at fault
stand alone: they fail, and nobody else. A part that succeeded is not run again. A batch that fails
for another reason fails as a whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hornbeam_ml.errors import ModelError
from hornbeam_ml.serving.failures import is_about_data, presentable
from hornbeam_ml.serving.model import Steps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hornbeam_ml.serving.calls import Entry
    from hornbeam_ml.serving.model import LoadedModel
    from hornbeam_ml.serving.queue import BatchQueue
    from hornbeam_ml.serving.template import Template


def run_batch(
    entries: Sequence[Entry],
    model: LoadedModel,
    queue: BatchQueue,
    template: Template,
    progress: Callable[[], object] = int,
) -> None:
    """Run a batch and finish its entries. What it raises itself is a fault of our own code.

    Args:
        entries: What was taken from the queue.
        model: Runs them.
        queue: Where their callers wait.
        template: What items have to be like.
        progress: Called before each run of the model and after each step of a generator.
    """
    parts = [entries]
    while parts:
        part = parts.pop()
        if part is not entries:
            part = queue.retry(part)
        progress()
        error = _try(part, model, queue, template, progress) if part else None
        if error is not None and len(part) > 1 and is_about_data(error):
            half = len(part) // 2
            parts += [part[half:], part[:half]]
        elif error is not None:
            queue.fail(part, presentable(error, queue.name))


def _try(
    part: Sequence[Entry],
    model: LoadedModel,
    queue: BatchQueue,
    template: Template,
    progress: Callable[[], object],
) -> BaseException | None:
    """Run some entries; return the error, if any, after which none of them is finished."""
    lane = part[0].lane
    try:
        template.check(lane)
        outcome = model.run([entry.item for entry in part], lane.key)
        _check_kind(outcome, queue.name, streams=lane.streams)
        step = next(outcome, None) if isinstance(outcome, Steps) else None
    except BaseException as error:  # noqa: BLE001 - its callers get it
        return error
    template.learn(lane)
    if isinstance(outcome, Steps):
        _hand_out(part, outcome, step, queue, progress)
    else:
        queue.settle(part, outcome)
    return None


def _hand_out(
    part: Sequence[Entry],
    steps: Steps,
    step: Any,
    queue: BatchQueue,
    progress: Callable[[], object],
) -> None:
    """Hand out step after step. After the first nothing is tried again."""
    try:
        while step is not None and queue.push(part, step):
            progress()
            step = next(steps, None)
        steps.close()
    except BaseException as error:  # noqa: BLE001 - its callers get it
        queue.fail(part, presentable(error, queue.name))
    else:
        queue.end(part)


def _check_kind(outcome: list[Any] | Steps, name: str, *, streams: bool) -> None:
    if isinstance(outcome, Steps) and not streams:
        raise ModelError(f"the model of {name} is a generator: call stream()")
    if streams and not isinstance(outcome, Steps):
        raise ModelError(f"the model of {name} is no generator: call run()")
