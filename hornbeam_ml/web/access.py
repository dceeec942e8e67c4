"""Who may see the pages: those who have the token, when there is one."""

from __future__ import annotations

import hmac
import re
from typing import TYPE_CHECKING, Final

from hornbeam_state.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

TOKEN_VARIABLE: Final = "HORNBEAM_ADMIN_TOKEN"  # noqa: S105 - the name of a variable
_TOKEN: Final = re.compile(r"[!-~]+")
_SCHEME: Final = "bearer "


def token_from(environ: Mapping[str, str]) -> str | None:
    """Return what ``HORNBEAM_ADMIN_TOKEN`` says; None: anybody may see the pages.

    Raises:
        ConfigError: it is empty, or cannot be sent in a header. The message does not repeat it.
    """
    token = environ.get(TOKEN_VARIABLE)
    if token is None or _TOKEN.fullmatch(token):
        return token
    raise ConfigError(
        f"{TOKEN_VARIABLE} has to be one or more visible ASCII characters, without spaces: "
        f"`openssl rand -hex 32` prints a good one; unset it to show the pages to anybody"
    )


def is_allowed(token: str | None, authorization: str | None) -> bool:
    """Return whether a request with such an ``Authorization`` header may see the pages.

    How long it takes does not depend on where a wrong token differs.
    """
    if token is None:
        return True
    if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
        return False
    given = authorization[len(_SCHEME) :].strip(" ")
    return hmac.compare_digest(given.encode("latin-1", "replace"), token.encode())
