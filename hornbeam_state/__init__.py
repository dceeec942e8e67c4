"""State shared by every worker of an app, and by every machine.

Values, counters, expiry, compare-and-set, prefix listing and locks on an embedded store, or on
Redis or Valkey when there is more than one machine::

    from hornbeam_state import state_get, state_incr, state_set

    state_set("greeting", "hello", ttl=60)
    state_get("greeting")     # "hello", in every worker
    state_incr("requests")    # 1, 2, 3, ... over all of them

Every function that waits on something has an awaitable twin with an ``a`` in front.
"""

from hornbeam_state.codec import register_codec
from hornbeam_state.config import StoreConfig
from hornbeam_state.default import (
    astate_add,
    astate_cas,
    astate_clear,
    astate_decr,
    astate_delete,
    astate_get,
    astate_get_multi,
    astate_incr,
    astate_keys,
    astate_set,
    astate_set_multi,
    astate_ttl,
    astate_update,
    default_store,
    lock,
    set_default_store,
    state_add,
    state_cas,
    state_clear,
    state_decr,
    state_delete,
    state_get,
    state_get_multi,
    state_incr,
    state_keys,
    state_set,
    state_set_multi,
    state_ttl,
    state_update,
)
from hornbeam_state.errors import (
    MISSING,
    CodecError,
    ConfigError,
    CounterOverflow,
    DeadlineExceeded,
    HornbeamError,
    KeyTooLong,
    LockLost,
    LockTimeout,
    NodeDown,
    NotExposed,
    Overloaded,
    RemoteError,
    RpcError,
    StoreError,
    StoreFull,
    StoreUnavailable,
    WrongType,
)
from hornbeam_state.locks import Lock
from hornbeam_state.store import Store, open_store

__all__ = [
    "CodecError",
    "ConfigError",
    "CounterOverflow",
    "DeadlineExceeded",
    "HornbeamError",
    "KeyTooLong",
    "Lock",
    "LockLost",
    "LockTimeout",
    "MISSING",
    "NodeDown",
    "NotExposed",
    "Overloaded",
    "RemoteError",
    "RpcError",
    "Store",
    "StoreConfig",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "WrongType",
    "astate_add",
    "astate_cas",
    "astate_clear",
    "astate_decr",
    "astate_delete",
    "astate_get",
    "astate_get_multi",
    "astate_incr",
    "astate_keys",
    "astate_set",
    "astate_set_multi",
    "astate_ttl",
    "astate_update",
    "default_store",
    "lock",
    "open_store",
    "register_codec",
    "set_default_store",
    "state_add",
    "state_cas",
    "state_clear",
    "state_decr",
    "state_delete",
    "state_get",
    "state_get_multi",
    "state_incr",
    "state_keys",
    "state_set",
    "state_set_multi",
    "state_ttl",
    "state_update",
]
