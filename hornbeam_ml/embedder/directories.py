"""Where a model lies."""

from __future__ import annotations

from pathlib import Path

from hornbeam_ml.errors import ModelError


def directory_of(model: str | Path) -> Path:
    """Return where a model lies: a directory, or a name that a hub's cache knows.

    Raises:
        ModelError: there is no such directory, and the name is not in the cache.
    """
    path = Path(model).expanduser()
    if str(model) and path.is_dir():
        return path.resolve()
    name = str(model)
    if not name:
        raise ModelError("a model has a directory or a name, not an empty one")
    # As SentenceTransformer does it, which knows its own models without their owner.
    hub_name = name if "/" in name else f"sentence-transformers/{name}"
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(hub_name))
    except ImportError as error:
        raise ModelError(f"there is no directory {name}") from error
    except Exception as error:
        raise ModelError(
            f"there is no directory {name}, and the hub did not give a model of that name: {error}"
        ) from error
