"""Calls between processes of one machine and user, over a unix socket.

A `Server` answers on an event loop; `connect` gives a `LocalChannel` to it, for any thread and
event loop. Any number of calls share a connection, and no call waits for another one.
"""

from hornbeam_state.transports.local.channel import LocalChannel
from hornbeam_state.transports.local.connecting import aconnect, connect
from hornbeam_state.transports.local.server import Server
from hornbeam_state.transports.local.sockets import check_path, remove_stale

__all__ = ["LocalChannel", "Server", "aconnect", "check_path", "connect", "remove_stale"]
