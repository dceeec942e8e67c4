"""Dynamic batching: concurrent calls of one model run as one batch.

The way of a call: its items are checked in the caller's thread or task (`serving`) and wait in a
bounded queue (`queue`), where a policy says when a batch closes and what goes into it (`policy`).
The thread of a stream takes the batch (`runner`), runs the model (`bisection`, `model`) and wakes
the callers (`calls`, `waiting`). All of that is `local`. With a model host, `client` sends the
call there instead, over the connections of `hosts`, or to other `nodes`; `answers` makes it there.
"""

from hornbeam_ml.serving.calls import DONE
from hornbeam_ml.serving.predicting import apredict, predict
from hornbeam_ml.serving.serving import Serving
from hornbeam_ml.serving.stats import KeyStats, ServingStats

__all__ = ["DONE", "KeyStats", "Serving", "ServingStats", "apredict", "predict"]
