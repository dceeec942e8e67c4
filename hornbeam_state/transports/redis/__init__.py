"""Calls between nodes of any number of machines, over Redis Streams.

A `RedisServer` answers for a node, on an event loop; `connect` gives a `RedisChannel` to one, for
any thread and event loop. Neither side accepts connections: both go to Redis.
"""

from hornbeam_state.transports.redis.channel import RedisChannel, aconnect, connect
from hornbeam_state.transports.redis.server import RedisServer

__all__ = ["RedisChannel", "RedisServer", "aconnect", "connect"]
