"""What a node offers of the servings of its process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hornbeam_ml.serving import registry
from hornbeam_state.rpc.server import serve_node

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hornbeam_ml.serving.serving import Serving
    from hornbeam_state.rpc.server import NodeServer


class OwnServings:
    """Those with a name, here or in the model host, once they are loaded."""

    def names(self) -> Mapping[str, bool]:
        """Return the names, and whether each serving is idempotent."""
        return registry.loaded()

    def find(self, name: str) -> Serving | None:
        """Return the serving with a name, or None."""
        found: Serving | None = registry.get(name)
        return found


def serve(name: str | None, **options: Any) -> NodeServer:
    """Make this process a node of its functions and servings; see `serve_node` for the options.

    Raises:
        ConfigError: a living process has the name.
        StoreUnavailable: the registry cannot be reached.
    """
    return serve_node(name, servings=OwnServings(), **options)
