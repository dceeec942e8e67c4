"""What makes two cached calls the same call."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

from hornbeam_ml.identity import describe_callable
from hornbeam_state.codec import canonical

if TYPE_CHECKING:
    from collections.abc import Callable

_SEPARATOR: Final = "\x1f"
_LONGEST_PREFIX: Final = 240


def call_key(
    fn: Callable[..., Any],
    value: Any,
    *,
    prefix: str,
    cache_key: Any = None,
    version: Any = None,
) -> str:
    """Return the key under which the result of ``fn(value)`` is cached.

    Args:
        fn: The function; what it is, is described by `identity`.
        value: Its input.
        prefix: The cache prefix; the key starts with it.
        cache_key: When given, the key is made of prefix and this value alone.
        version: The user's own addition to what the function is.

    Returns:
        The same text in every process and after a restart, whatever ``PYTHONHASHSEED`` is: a
        blake2b-256 digest of type-tagged, length-prefixed bytes, so that ``1``, ``"1"``,
        ``b"1"`` and ``[1]`` are four keys.

    Raises:
        CodecError: the input, `cache_key` or `version` is of a type that has no canonical bytes.
    """
    if cache_key is not None:
        content = canonical(("key", cache_key))
    else:
        content = canonical(("call", describe_callable(fn), version)) + canonical(value)
    return prefix_of_keys(prefix) + hashlib.blake2b(content, digest_size=32).hexdigest()


def prefix_of_keys(prefix: str) -> str:
    """Return what the keys of a cache prefix, and no others, start with.

    Raises:
        TypeError: the prefix is not a str.
        ValueError: it is empty, too long, or holds the separator.
    """
    if not isinstance(prefix, str):
        raise TypeError(f"cache_prefix is a str, not {type(prefix).__qualname__}")
    if not 0 < len(prefix.encode()) <= _LONGEST_PREFIX or _SEPARATOR in prefix:
        raise ValueError(
            f"cache_prefix has 1 to {_LONGEST_PREFIX} bytes of UTF-8 and no unit separator (\\x1f)"
        )
    return prefix + _SEPARATOR
