"""What must not happen before a fork, noticed where it happens and told in the child.

Threads do not survive a fork: what has computed with several hangs in a child, at its first batch
or at its exit, and a CUDA context is of no use there. So the arbiter of a server is watched from
its start. Each fork ends the watch in the child, where `check` says what was found.

torch computes with one thread while it is watched: what runs all the same, such as a conversion
while weights are loaded, then starts none.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from hornbeam_ml.errors import ModelError
from hornbeam_ml.forks.after_import import AfterImport

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_MODEL_REMEDY: Final = (
    "load and warm up models in register_model(...) or Serving(load=...), which run after the fork"
)
_CUDA_REMEDY: Final = (
    "use the GPU in register_model(...) or Serving(load=...), which run after the fork"
)
_ELSE: Final = "or leave the module out of --preload and HORNBEAM_PRELOAD"
_OPEN_FILES: Final = Path("/proc/self/fd")
_GPU_FILES: Final = "/dev/nvidia"
_OURS: Final = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES: Final = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("purelib", "platlib", "stdlib")}
)


class Hazard(NamedTuple):
    """Something that ran in the parent, such as ``a model ran`` and which, and where."""

    what: str
    name: str
    place: str


class Inherited(NamedTuple):
    """What a child has of a watched parent.

    Attributes:
        hazard: What ran there first, if anything.
        gpu_file: A file of a GPU that was open, or nothing.
        torch_threads: What code there asked torch for, 0 for nothing; None: it was not imported.
    """

    hazard: Hazard | None
    gpu_file: str
    torch_threads: int | None


class _Patch(NamedTuple):
    """An attribute that was replaced."""

    owner: Any
    name: str
    original: Any

    def undo(self) -> None:
        setattr(self.owner, self.name, self.original)


class _Watch:
    """Watches this process from `start` to `stop`.

    Attributes:
        hazard: As of `Inherited`.
        torch_threads: As of `Inherited`.
    """

    def __init__(self) -> None:
        self.hazard: Hazard | None = None
        self.torch_threads: int | None = None
        self._over = False
        self._patches: list[_Patch] = []
        self._hook: Any = None
        self._imports = AfterImport(
            {
                "torch": self._watch_torch,
                "onnxruntime": self._watch_onnxruntime,
                "openvino": self._watch_openvino,
            }
        )

    def start(self) -> None:
        self._imports.start()

    def stop(self) -> None:
        """Put everything back. In a child this runs inside of the fork: nothing may wait."""
        self._over = True
        self._imports.stop()
        for patch in reversed(self._patches):
            patch.undo()
        if self._hook is not None:
            self._hook.remove()

    def note(self, what: str, name: str) -> None:
        if self.hazard is None:
            self.hazard = Hazard(what, name, _place(sys._getframe(2)))  # noqa: SLF001 - documented

    def _watch_torch(self, torch: Any) -> None:
        def note_module(module: Any, _inputs: Any) -> None:
            kind = type(module)
            self.note("a model ran", f"{kind.__module__}.{kind.__qualname__}.forward")

        def setting(original: Callable[[int], None]) -> Callable[[int], None]:
            def set_num_threads(count: int) -> None:
                if self._over:  # whoever imported the name still has this function
                    original(count)
                else:
                    self.torch_threads = count

            return set_num_threads

        self._hook = torch.nn.modules.module.register_module_forward_pre_hook(note_module)
        self.torch_threads = 0
        torch.set_num_threads(1)
        self._replace(torch, "set_num_threads", setting)

    def _watch_onnxruntime(self, onnxruntime: Any) -> None:
        kind = onnxruntime.InferenceSession
        self._note_calls(kind, "__init__", "a session was made", "onnxruntime.InferenceSession")

    def _watch_openvino(self, openvino: Any) -> None:
        for name in ("compile_model", "import_model"):
            self._note_calls(openvino.Core, name, "a model was compiled", f"openvino.Core.{name}")

    def _note_calls(self, owner: Any, attribute: str, what: str, name: str) -> None:
        """Note each call of a method, and make it."""

        def noting(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def noted(*args: Any, **options: Any) -> Any:
                self.note(what, name)
                return original(*args, **options)

            return noted

        self._replace(owner, attribute, noting)

    def _replace(self, owner: Any, name: str, replacing: Callable[[Any], Any]) -> None:
        original = getattr(owner, name)
        self._patches.append(_Patch(owner, name, original))
        setattr(owner, name, replacing(original))


def watch() -> None:
    """Watch this process from now on; again is fine. In a child of a watched one do nothing."""
    global _watch  # noqa: PLW0603 - a process is watched as a whole
    if _watch is None and _inherited is None:
        _watch = _Watch()
        _watch.start()


def note(what: str, name: str) -> None:
    """Note what must not happen in a process that is watched.

    Args:
        what: Happened, such as ``a serving was started``.
        name: Of what it happened to.
    """
    if _watch is not None:
        _watch.note(what, name)


def check() -> None:
    """Refuse what the parent of this process did while it was watched.

    Raises:
        ModelError: there was something; the message says what, where, and what to do instead.
    """
    if _inherited is None:
        return
    if _inherited.hazard is not None:
        what, name, place = _inherited.hazard
        raise ModelError(f"{what} before the fork ({name}{place}): {_MODEL_REMEDY}, {_ELSE}")
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is not None and cuda._is_in_bad_fork():  # noqa: SLF001 - nothing public tells
        raise ModelError(f"torch used CUDA before the fork: {_CUDA_REMEDY}, {_ELSE}")
    if _inherited.gpu_file:
        raise ModelError(
            f"a GPU was in use before the fork ({_inherited.gpu_file} is open): "
            f"{_CUDA_REMEDY}, {_ELSE}"
        )


def restore_torch_threads(budget: int) -> None:
    """Let torch compute with what code of the parent asked for, or else with the budget."""
    if _inherited is not None and _inherited.torch_threads is not None:
        sys.modules["torch"].set_num_threads(_inherited.torch_threads or budget)


def _open_gpu_file() -> str:
    """Return a file of a GPU that this process has open, or nothing."""
    for link in _OPEN_FILES.iterdir() if _OPEN_FILES.exists() else ():
        with contextlib.suppress(OSError):  # that of the directory itself is gone
            target = str(link.readlink())
            if target.startswith(_GPU_FILES):
                return target
    return ""


def _place(frame: FrameType | None) -> str:
    """Return where code of the user's made a call: nearest first, libraries only if need be."""
    place = ""
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("gunicorn."):
        path = frame.f_code.co_filename
        if not path.startswith(("<", _OURS)):
            place = f", in {path} line {frame.f_lineno}"
            if not path.startswith(_LIBRARIES):
                break
        frame = frame.f_back
    return place


_watch: _Watch | None = None
_inherited: Inherited | None = None


def _end_watch() -> None:
    global _watch, _inherited  # noqa: PLW0603 - as above
    if _watch is not None:
        _watch.stop()
        _inherited = Inherited(_watch.hazard, _open_gpu_file(), _watch.torch_threads)
        _watch = None


os.register_at_fork(after_in_child=_end_watch)
