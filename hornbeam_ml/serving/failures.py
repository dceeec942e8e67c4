"""What an error of a model means: whom it is about, and what its callers get."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import errno
import re
from typing import Final

from hornbeam_ml.errors import ModelError
from hornbeam_state.errors import HornbeamError

# About a file that an item names, or what is in it. (Libraries that read images raise OSError
# without a number for a broken one.)
_FILE_ERRORS: Final = frozenset({
    *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, None),
})  # fmt: skip
_CANCELLED: Final = (asyncio.CancelledError, concurrent.futures.CancelledError)
# Of the code, which fails alike for every item.
_CODE_ERRORS: Final = (ImportError, NameError, NotImplementedError, SyntaxError)
# Types of libraries that need not be installed: httpx, requests, redis, openai, grpc, torch.
_BACKEND_TYPES: Final = re.compile(
    r"\w*(Connect|Connection|Transport|Timeout|Network|Protocol|OutOfMemory|Accelerator)"
    r"(Error|Exception|Timeout)?|ServiceUnavailable|RpcError|CudaError"
)
# torch, onnxruntime and openvino raise plain RuntimeErrors for these.
_BACKEND_MESSAGES: Final = re.compile(
    r"out of memory|failed to allocate|can't allocate|bad_alloc|device lost|no kernel image"
    r"|\b(CUDA|CUBLAS|CUDNN|CUSPARSE|CUFFT|NCCL|HIP|TensorRT|Triton) ?(error|failure|_STATUS)"
    r"|(cublas|cudnn|nccl)\w*_STATUS|device-side assert",
    re.IGNORECASE,
)


def is_about_data(error: BaseException) -> bool:
    """Return whether one item of a batch may be at fault, so that others are worth another try.

    Not for an error of the backend (device lost, out of memory, a connection, a full disk), of
    the code (a name that is not defined), of hornbeam, nor for one that ends a thread or task:
    every further try would meet it again, and take its time. It also counts when the error was
    raised from such a one.
    """
    if not isinstance(error, Exception) or isinstance(error, _CANCELLED):
        return False
    if isinstance(error, (MemoryError, HornbeamError, *_CODE_ERRORS)):
        return False
    if isinstance(error, OSError) and (
        isinstance(error, ConnectionError | TimeoutError) or error.errno not in _FILE_ERRORS
    ):
        return False
    if any(_BACKEND_TYPES.fullmatch(kind.__name__) for kind in type(error).__mro__):
        return False
    if isinstance(error, RuntimeError) and _BACKEND_MESSAGES.search(str(error)):
        return False
    return error.__cause__ is None or is_about_data(error.__cause__)


def presentable(error: BaseException, name: str) -> BaseException:
    """Return what a caller gets for an error of the model.

    An error that means something to the caller's own thread or task is wrapped: SystemExit would
    end it, CancelledError look like its own cancellation, StopIteration like its own end.
    """
    unsafe = (StopIteration, StopAsyncIteration, *_CANCELLED)
    if isinstance(error, Exception) and not isinstance(error, unsafe):
        return error
    wrapped = ModelError(f"the model of {name} raised {error!r}")
    wrapped.__cause__ = error
    return wrapped


def copies(error: BaseException, count: int) -> list[BaseException]:
    """Return an error for each of `count` callers: the original first, then copies of it.

    Raising adds the frames of a caller to the traceback, which is no other caller's business.
    An exception that cannot be copied is shared.
    """
    return [error, *(_copy(error) for _ in range(count - 1))][:count]


def _copy(error: BaseException) -> BaseException:
    try:
        twin = copy.copy(error)
        if type(twin) is not type(error) or str(twin) != str(error):
            return error
    except Exception:  # noqa: BLE001 - methods of any exception type run
        return error
    twin.__cause__, twin.__context__ = error.__cause__, error.__context__
    twin.__suppress_context__ = error.__suppress_context__
    return twin.with_traceback(error.__traceback__)
