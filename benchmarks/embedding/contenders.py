"""Who is compared, and how each one is started: as its own documentation tells those who want rate.

The settings of a peer are those that `embed.py --only tune` found best at 32 connections. Each has
the same two cores: one process that computes on two threads, or two that compute on one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedding.load import Body

ROOT = Path(__file__).resolve().parents[2]
APPS = Path(__file__).parent / "apps"
BATCH_SIZE = 32
Settings = dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A server for the model.

    Attributes:
        name: What it is called in the figures.
        app: The folder with its app and its requirements.
        command: Its words may hold `{bin}` (of its environment), `{port}`, `{model}`, `{export}`
            and the names of settings.
        path: Where it answers a text.
        engine: What computes; peers are compared by it.
        body: What it wants to be sent.
        where: The keys that lead to the numbers in its answer.
        chosen: Its settings. WORKERS is always there: processes that run the model.
        tried: What tuning tries for each of them.
        environ: Further variables of its process.
    """

    name: str
    app: str
    command: tuple[str, ...]
    path: str = "/embed"
    engine: str = "torch"
    body: Body = field(default_factory=Body)
    where: tuple[str | int, ...] = ("embedding",)
    chosen: Settings
    tried: dict[str, tuple[int, ...]] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return APPS / self.app

    @property
    def ours(self) -> bool:
        return self.app.startswith("hornbeam")

    def vector(self, answer: Any) -> list[float]:
        """Return the numbers in an answer."""
        for key in self.where:
            answer = answer[key]
        return answer


def threads(settings: Settings, cores: int) -> int:
    """Return how many threads each process computes on: together they have all cores."""
    return max(1, cores // settings["WORKERS"])


def infinity(name: str, loader: str, model: str, **rest: Any) -> Contender:
    return Contender(
        name=name,
        app="infinity",
        command=(
            *("{bin}/infinity_emb", "v2", "--model-id", model, "--served-model-name", "minilm"),
            *("--engine", loader, "--device", "cpu", "--dtype", "float32"),
            *("--batch-size", "{BATCH_SIZE}", "--pooling-method", "mean"),
            *("--host", "127.0.0.1", "--port", "{port}", "--no-vector-disk-cache"),
        ),
        path="/embeddings",
        body=Body('{"model": "minilm", "input": ["', '"]}'),
        where=("data", 0, "embedding"),
        **rest,
    )


def hornbeam(
    name: str,
    *,
    app: str = "hornbeam",
    engine: str = "",
    backend: str = "",
    precision: str = "auto",
) -> Contender:
    return Contender(
        name=f"hornbeam-{name}",
        app=app,
        engine=engine or name,
        command=(
            *("{bin}/python", "-m", "gunicorn", "-k", "hornbeam_ml.worker.HornbeamWorker"),
            *("--workers", "{WORKERS}", "--bind", "127.0.0.1:{port}", "--no-control-socket"),
            "app:app",
        ),
        chosen={"WORKERS": 1},
        environ={
            "BACKEND": backend or name,
            "PRECISION": precision,
            "PYTHONPATH": str(ROOT),
            "HORNBEAM_STORE": "lmdb://{folder}/store",
        },
    )


ALL = (
    Contender(
        name="plain",
        app="plain",
        command=(
            *("{bin}/uvicorn", "app:app", "--workers", "{WORKERS}", "--no-access-log"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
        chosen={"WORKERS": 1},
        tried={"WORKERS": (1, 2)},
    ),
    Contender(
        name="litserve",
        app="litserve",
        command=("{bin}/python", "app.py"),
        chosen={"WORKERS": 1, "WAIT_MS": 0, "FAST_QUEUE": 0},
        tried={"WORKERS": (1, 2), "WAIT_MS": (0, 10, 50), "FAST_QUEUE": (0, 1)},
    ),
    Contender(
        name="mosec",
        app="mosec",
        command=(
            *("{bin}/python", "app.py", "--address", "127.0.0.1", "--port", "{port}"),
            *("--timeout", "60000", "--path", "{folder}/ipc"),
        ),
        path="/inference",
        chosen={"WORKERS": 1, "WAIT_MS": 10},
        tried={"WORKERS": (1, 2), "WAIT_MS": (0, 10, 50)},
    ),
    Contender(
        name="ray",
        app="ray",
        command=("{bin}/python", "app.py"),
        chosen={"WORKERS": 1, "WAIT_MS": 10},
        tried={"WORKERS": (1, 2), "WAIT_MS": (0, 10, 50)},
        environ={"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"},
    ),
    Contender(
        name="bentoml",
        app="bentoml",
        command=(
            *("{bin}/bentoml", "serve", "app:Embed", "--host", "127.0.0.1", "--port", "{port}"),
            "--do-not-track",
        ),
        body=Body('{"texts": ["', '"]}'),
        where=(0,),
        chosen={"WORKERS": 1, "MAX_LATENCY_MS": 10000},
        tried={"WORKERS": (1, 2), "MAX_LATENCY_MS": (1000, 10000, 60000)},
    ),
    infinity(
        "infinity-torch",
        "torch",
        "{model}",
        chosen={"WORKERS": 1},
    ),
    infinity(
        "infinity-onnx",
        "optimum",
        "{export}",
        engine="onnx",
        chosen={"WORKERS": 1},
    ),
    hornbeam("serving", app="hornbeam_serving", engine="torch"),
    hornbeam("torch", precision="fp32"),
    hornbeam("torch-bf16", backend="torch", engine="torch", precision="bf16"),
    hornbeam("onnx"),
    hornbeam("openvino"),
    hornbeam("auto"),
)
NAMES = tuple(contender.name for contender in ALL)
