"""The Lua scripts behind the Redis backend: what must happen at once, and nothing more.

All keys of a script are in one hash slot, so that the scripts run on a Cluster too. Those that
walk an index compute the names of values from its members; these share the index's slot.

Times are absolute milliseconds by the server's clock, the same number in a value's own expiry and
in the expiry index, so that the two cannot disagree. A counter is only ever touched by ``INCRBY``
and read back as text: a Lua number is a double and loses integers above 2**53.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

OVERFLOW: Final = b"overflow"
NOT_A_COUNTER: Final = b"not a counter"


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script and the digest the server knows it by."""

    text: bytes
    sha: bytes = field(init=False)

    def __post_init__(self) -> None:
        """Compute the digest."""
        digest = hashlib.sha1(self.text, usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest.encode())


_CLOCK = """
local now
local function clock()
  if not now then
    local time = redis.call('TIME')
    now = time[1] * 1000 + math.floor(time[2] / 1000)
  end
  return now
end
local function deadline(ttl)
  if ttl == '' then return nil end
  return string.format('%.0f', clock() + ttl)
end
"""

# Keys of an indexed script: the index, the expiries, then the value or values. Each write adds at
# most one member to an index and trims several dead ones, so dead members never pile up. For when
# nobody writes any more, an index whose members all expire does so with the last of them.
_INDEXED = (
    _CLOCK
    + """
local index, expiries, value = KEYS[1], KEYS[2], KEYS[3]
local function note(member, at)
  redis.call('ZADD', index, 0, member)
  if at then
    redis.call('ZADD', expiries, at, member)
  else
    redis.call('ZREM', expiries, member)
    redis.call('PERSIST', index)
    redis.call('PERSIST', expiries)
  end
end
local function forget(member)
  redis.call('ZREM', index, member)
  redis.call('ZREM', expiries, member)
end
local function trim(most)
  local before = string.format('(%.0f', clock())
  local dead = redis.call('ZRANGEBYSCORE', expiries, '-inf', before, 'LIMIT', 0, most)
  for _, member in ipairs(dead) do forget(member) end
  return #dead
end
local function tidy()
  trim(8)
  if redis.call('ZCARD', index) ~= redis.call('ZCARD', expiries) then return end
  local last = redis.call('ZREVRANGE', expiries, 0, 0, 'WITHSCORES')[2]
  if last then
    redis.call('PEXPIREAT', index, last)
    redis.call('PEXPIREAT', expiries, last)
  end
end
"""
)

# Keys of a plain script: the value alone.
_PLAIN = (
    _CLOCK
    + """
local value = KEYS[1]
local function note(member, at) end
local function tidy() end
"""
)

# The value is written first: if the server is out of memory it refuses here, and nothing of the
# script has happened.
_STORE = """
local function store(name, member, data, ttl)
  local at = deadline(ttl)
  if at then redis.call('SET', name, data, 'PXAT', at)
  else redis.call('SET', name, data) end
  note(member, at)
end
"""

_TIDY: Final = "tidy()\n"

# ARGV: ttl, then a member and its data for each value.
PUT: Final = Script(
    (
        _INDEXED
        + _STORE
        + """
for i = 3, #KEYS do store(KEYS[i], ARGV[2 * i - 4], ARGV[2 * i - 3], ARGV[1]) end
"""
        + _TIDY
    ).encode()
)

# Keys: the values. ARGV: ttl, then the data of each.
PLAIN_PUT: Final = Script(
    b"""
for i = 1, #KEYS do redis.call('SET', KEYS[i], ARGV[i + 1], 'PX', ARGV[1]) end
"""
)

# ARGV: member, ttl, data, and the expected data, which is left out to mean "absent".
_CAS = (
    _STORE
    + """
if redis.call('GET', value) ~= (ARGV[4] or false) then return 0 end
store(value, ARGV[1], ARGV[3], ARGV[2])
"""
    + _TIDY
    + "return 1\n"
)
CAS: Final = Script((_INDEXED + _CAS).encode())
PLAIN_CAS: Final = Script((_PLAIN + _CAS).encode())

# ARGV: member, ttl, then one delta, or several where one would not fit into 64 bits. All have the
# same sign, so when a step overflows the sum would have too, and the earlier steps are undone.
_INCR = (
    """
local existed = redis.call('EXISTS', value) == 1
for i = 3, #ARGV do
  local reply = redis.pcall('INCRBY', value, ARGV[i])
  if type(reply) == 'table' then
    for j = 3, i - 1 do redis.call('DECRBY', value, ARGV[j]) end
    if i > 3 and not existed then redis.call('DEL', value) end
    if string.find(reply.err, 'overflow', 1, true) then return 'overflow' end
    if string.find(reply.err, 'not an integer', 1, true) then return 'not a counter' end
    if string.find(reply.err, 'WRONGTYPE', 1, true) then return 'not a counter' end
    return reply
  end
end
if not existed then
  local at = deadline(ARGV[2])
  if at then redis.call('PEXPIREAT', value, at) end
  note(ARGV[1], at)
  """
    + _TIDY
    + """
end
return redis.call('GET', value)
"""
)
INCR: Final = Script((_INDEXED + _INCR).encode())
PLAIN_INCR: Final = Script((_PLAIN + _INCR).encode())

# ARGV: member.
DELETE: Final = Script(
    (
        _INDEXED
        + """
local removed = redis.call('DEL', value)
forget(ARGV[1])
"""
        + _TIDY
        + "return removed\n"
    ).encode()
)

# The next three take the index (and expiries), and ARGV: the name of a value without its key,
# lower bound, upper bound, most members to visit. They return a result and the lower bound of the
# next page, or nil after the last.

# The value decides whether a key is there, not the index: one that expired, was evicted or was
# deleted by hand is not listed. Writes nothing, so that listing works while memory is full.
LIST: Final = Script(
    b"""
local members = redis.call('ZRANGEBYLEX', KEYS[1], ARGV[2], ARGV[3], 'LIMIT', 0, ARGV[4])
local alive = {}
for _, member in ipairs(members) do
  if redis.call('EXISTS', ARGV[1] .. member) == 1 then alive[#alive + 1] = member end
end
return {alive, #members == tonumber(ARGV[4]) and '(' .. members[#members]}
"""
)

CLEAR: Final = Script(
    (
        _INDEXED
        + """
local members = redis.call('ZRANGEBYLEX', index, ARGV[2], ARGV[3], 'LIMIT', 0, ARGV[4])
local removed = 0
for _, member in ipairs(members) do
  removed = removed + redis.call('UNLINK', ARGV[1] .. member)
  forget(member)
end
return {removed, #members == tonumber(ARGV[4]) and '(' .. members[#members]}
"""
    ).encode()
)

# Counts without visiting the members, once the dead ones are trimmed.
COUNT: Final = Script(
    (
        _INDEXED
        + """
local more = trim(ARGV[4]) == tonumber(ARGV[4])
return {redis.call('ZLEXCOUNT', index, ARGV[2], ARGV[3]), more and ARGV[2]}
"""
    ).encode()
)

# The lock scripts take the lock, and ARGV: the owner's token, and the ttl in milliseconds.

# Asking twice with one token gives one lock, so the question may be repeated.
ACQUIRE: Final = Script(
    b"""
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 1 end
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
"""
)
RENEW: Final = Script(
    b"""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
)
RELEASE: Final = Script(
    b"""
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""
)
