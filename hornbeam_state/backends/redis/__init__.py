"""The store on Redis or Valkey: one server, one behind Sentinel, or a Cluster."""

from hornbeam_state.backends.redis.backend import RedisBackend

__all__ = ["RedisBackend"]
