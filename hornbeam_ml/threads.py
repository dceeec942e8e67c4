"""The compute-thread budget of a process.

Two workers whose libraries each use every core fall from 75 to 8 requests a second on two cores,
so each process gets its share of the cores. Libraries read their share from the environment when
they are loaded; those that were loaded before are told afterwards.

Which number counts, first to last: ``HORNBEAM_THREADS``, then a library's own variable (such as
``MKL_NUM_THREADS``) for that library, then ``OMP_NUM_THREADS``, then the share.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from threadpoolctl import ThreadpoolController

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableMapping

OVERRIDE: Final = "HORNBEAM_THREADS"
OPENMP: Final = "OMP_NUM_THREADS"
# By the name threadpoolctl has for the library; some can be told through the environment only.
_VARIABLES: Final = {
    "openmp": OPENMP,
    "mkl": "MKL_NUM_THREADS",
    "openblas": "OPENBLAS_NUM_THREADS",
    "blis": "BLIS_NUM_THREADS",
    "numexpr": "NUMEXPR_NUM_THREADS",
    "accelerate": "VECLIB_MAXIMUM_THREADS",
    "rayon": "RAYON_NUM_THREADS",  # the tokenizers of Hugging Face
}
_CGROUPS: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> int:
    """Return how many cores this process may keep busy: at least 1.

    That is its CPU affinity, or the CPU quota of its control group (version 1 or 2) or of one
    above it, whichever is least. A quota of 1.5 cores counts as 1, since a second thread would
    be stopped for half of the time, and the first with it whenever they wait for each other.

    Args:
        cgroups: Where the control groups are mounted.
        membership: The file that says in which of them the process is.
    """
    return max(1, min([_affinity(), *_quotas(cgroups, membership)]))


def fair_share(cores: int, processes: int) -> int:
    """Return the compute threads of each of `processes` that share `cores`: at least 1."""
    return max(1, cores // max(1, processes))


def thread_budget(share: int, environ: MutableMapping[str, str] = os.environ) -> int:
    """Return the compute threads of this process: what the user set, or else its share.

    Raises:
        ConfigError: ``HORNBEAM_THREADS`` is set to something else than a number from 1 up.
    """
    override = environ.get(OVERRIDE, "")
    if override:
        threads = _positive(override)
        if threads is None:
            raise ConfigError(f"{OVERRIDE}={override!r}: give a whole number from 1 up")
        return threads
    # OpenMP takes a list, one number for each level of nesting.
    return _positive(environ.get(OPENMP, "").partition(",")[0]) or share


def set_environment(budget: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell libraries that are not loaded yet, leaving alone what the user set.

    ``HORNBEAM_THREADS`` is stronger than the variables of the libraries and replaces them.
    """
    for variable in _VARIABLES.values():
        if environ.get(OVERRIDE) or not environ.get(variable):
            environ[variable] = str(budget)


@contextlib.contextmanager
def environment(budget: int, environ: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Tell libraries that are imported in the block, and leave the environment as it was."""
    before = {variable: environ.get(variable) for variable in _VARIABLES.values()}
    set_environment(budget, environ)
    try:
        yield
    finally:
        for variable, value in before.items():
            if value is None:
                environ.pop(variable, None)
            else:
                environ[variable] = value


def limit_loaded(budget: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Lower libraries that are loaded already to the budget; never raise one.

    So an app that asks for fewer threads keeps them. A library whose variable holds another
    number than the budget is left alone: the user, or the app's own code, chose that.

    OpenMP and MKL count per thread, so this has to run in each thread that uses a copy of them
    loaded before `set_environment` (a preloaded app); torch and OpenBLAS count per process.
    """

    def governs(name: str) -> bool:
        return name in _VARIABLES and environ.get(_VARIABLES[name]) == str(budget)

    # torch first, while it still sees OpenMP's old number: only its own setting reaches threads
    # that start later. It is never imported for this, and may be half imported just now.
    torch = sys.modules.get("torch")
    count = getattr(torch, "get_num_threads", None)
    if torch is not None and count is not None and governs("openmp") and count() > budget:
        torch.set_num_threads(budget)
    for library in ThreadpoolController().lib_controllers:
        if governs(library.internal_api) and (library.num_threads or 0) > budget:
            library.set_num_threads(budget)
            # threadpoolctl 3.8 lets only the thread that first limited OpenBLAS do it again;
            # without this, `threadpool_limits` in request threads would do nothing.
            getattr(library, "clear_controlling_thread", lambda: None)()


def process_share(parts: int) -> int:
    """Return the compute threads of each of `parts` that compute at the same time: at least 1."""
    return fair_share(thread_budget(usable_cores()), parts)


def limit_this_thread(count: int) -> None:
    """Let what torch and OpenMP compute in the calling thread use `count` threads.

    It may be called before every batch: no change costs less than a microsecond, one up some
    microseconds, one down about 0.1 ms. No library gets more than it used in this thread before
    the first call. Other threads, also those that start later, keep their number. Without torch,
    libraries that count per process, such as OpenBLAS, are left alone.
    """
    torch: Any = sys.modules.get("torch")
    if not hasattr(torch, "set_num_threads"):  # half imported
        torch = None
    if count == _here.count and (torch is None or _here.most_of_torch):
        return
    with _limiting:
        if _here.openmp is None:  # before torch is told, which tells its OpenMP
            libraries = ThreadpoolController().lib_controllers
            openmp = [one for one in libraries if one.internal_api == "openmp"]
            _here.openmp = [(one, one.num_threads or 0) for one in openmp]
        if torch is not None:
            _limit_torch(torch, count)
        for library, most in _here.openmp:
            library.set_num_threads(min(count, most) or count)
    _here.count = count


def current_limit() -> int:
    """Return how many threads the caller may compute with, at least 1.

    On a serving's stream that is what this batch may use; elsewhere it is the budget of the
    process. For models whose library neither torch nor OpenMP tells: an OpenVINO or onnxruntime
    session is made for a number of threads, and this chooses between two of them.
    """
    return _here.count or process_share(1)


class _ThreadLimits(threading.local):
    """The limits of the calling thread.

    Attributes:
        count: The last one; 0: none.
        most_of_torch: What torch used before the first; 0: it was not imported.
        openmp: Each copy of OpenMP, with what it used before the first.
    """

    count = 0
    most_of_torch = 0
    openmp: list[tuple[Any, int]] | None = None


def _limit_torch(torch: Any, count: int) -> None:
    # Asking comes first: a thread that computes for the first time takes over the number of the
    # process, also when it has been given one of its own.
    now = torch.get_num_threads()
    most = _here.most_of_torch = _here.most_of_torch or now
    wanted = min(count, most)
    if now == wanted:
        return
    torch.set_num_threads(wanted)
    if wanted != most:
        # That set the number of the process too, for threads that have not computed yet.
        restore = threading.Thread(target=torch.set_num_threads, args=(most,))
        restore.start()
        restore.join()


def _make_lock_anew() -> None:
    global _limiting  # noqa: PLW0603 - a thread of the parent may hold it
    _limiting = threading.Lock()


_here = _ThreadLimits()
_limiting = threading.Lock()  # torch's number of the process is wrong for a moment
os.register_at_fork(after_in_child=_make_lock_anew)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS has no affinity


def _quotas(cgroups: Path, membership: Path) -> Iterator[int]:
    for line in _read(membership).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:  # version 2; "unified" where version 1 is mounted beside it
            roots = [cgroups, cgroups / "unified"]
        elif "cpu" in controllers.split(","):
            roots = [cgroups / "cpu", cgroups / controllers]
        else:
            continue
        for root in roots:
            # In a container the path may be the host's, of which nothing is mounted here: then
            # the mount itself is the container's group.
            for group in _with_parents(root, path):
                yield from _quota(group)


def _with_parents(root: Path, path: str) -> Iterator[Path]:
    relative = Path(path.lstrip("/"))
    for parent in (relative, *relative.parents):
        yield root / parent


def _quota(group: Path) -> Iterator[int]:
    limit, _, period = _read(group / "cpu.max").partition(" ")  # microseconds, or "max"
    if not limit:
        limit, period = (_read(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    quota, every = _positive(limit), _positive(period)  # without a quota version 1 says -1
    if quota and every:
        yield quota // every


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # no such group, or not ours to read: no quota known


def _positive(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and int(text) > 0 else None
