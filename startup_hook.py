"""Makes the bare worker name in `gunicorn -k hornbeam` known to gunicorn.

gunicorn looks a bare name up in `gunicorn.workers.SUPPORTED_WORKERS`, then among the entry points
of its own distribution, where an entry point of ours is never found. So the wheel carries a .pth,
which the interpreter runs at every start: the template in pyproject.toml, with this file in it as
a string. The template puts a finder on `sys.meta_path` that knows the one name
`gunicorn.workers`; this file is compiled and run only when somebody imports that. Nothing here
may break the import of gunicorn, and the finder stays for good, since a reload of the module
builds its table anew.
"""

import sys


def find_spec(this, name, path, target):
    """Find the module as the finders after `this` one do, its loader wrapped."""
    try:
        # Those before it have been asked already; asking on from here cannot recurse.
        for finder in sys.meta_path[sys.meta_path.index(this) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    spec.loader = Loader(spec)
                return spec
    except Exception:
        pass  # The import asks those finders next, without us, and fails there if it must.
    return None


class Loader:
    """Behaves as the real loader, and gives it back its place before the module is executed."""

    def __init__(self, spec):
        self._spec = spec
        self._real = spec.loader

    def __getattr__(self, name):
        return getattr(self._real, name)

    def exec_module(self, module):
        self._spec.loader = module.__loader__ = self._real
        self._real.exec_module(module)
        table = getattr(module, "SUPPORTED_WORKERS", None)
        if isinstance(table, dict):
            table.setdefault("hornbeam", "hornbeam_ml.worker.HornbeamWorker")
