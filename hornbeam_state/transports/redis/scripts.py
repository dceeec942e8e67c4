"""The Lua scripts of calls: what must happen at once. All times are by the server's clock.

A call is in its stream until somebody takes it out, and only one can: the node, to run it, or the
caller, to cancel it. ``XACK`` of an entry that was delivered, or ``XDEL`` of one that was not,
returns 1 to that one.
"""

from __future__ import annotations

from typing import Final

from hornbeam_state.backends.redis.scripts import Script

ADDED: Final = 1
FULL: Final = 2
WRONG_CLOCK: Final = 3
KNOWN: Final = 4

GONE: Final = -1
LATE: Final = -2
REPEATED: Final = -3

_CLOCK = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

_DROP = """
local function drop(entry)
  local acknowledged = redis.call('XACK', KEYS[1], group, entry)
  return acknowledged + redis.call('XDEL', KEYS[1], entry)
end
"""

_BURY = (
    _DROP
    + """
local function bury(entry, reason, most, keep)
  local found = redis.call('XRANGE', KEYS[1], entry, entry)[1]
  if found then
    redis.call('XADD', KEYS[2], 'MAXLEN', most, '*', 'reason', reason, 'entry', entry,
      unpack(found[2]))
    redis.call('PEXPIRE', KEYS[2], keep)
  end
  drop(entry)
end
"""
)

# KEYS: calls, node, and for a cast its note. ARGV: group, how long it is worth something, when the
# caller believes it is (or nothing), how far from that it may be, how many may wait unless the
# node says otherwise, how long the stream is kept, then the fields. Returns the time, what
# happened, and the entry or how many wait. A call that is late may be dropped by anybody (d), a
# cast only by the node, which keeps it as a dead letter (c).
ADD: Final = Script(
    (
        _CLOCK
        + "local group = ARGV[1]\n"
        + _DROP
        + """
local life, sent = tonumber(ARGV[2]), tonumber(ARGV[3])
if sent and math.abs(now - sent) > tonumber(ARGV[4]) then return {now, 3, 0} end
local most = tonumber(redis.call('HGET', KEYS[2], 'most') or ARGV[5])
if redis.call('XLEN', KEYS[1]) >= most then
  for _, found in ipairs(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 64)) do
    local fields = found[2]
    if fields[1] == 'd' and tonumber(fields[2]) < now then drop(found[1]) end
  end
  local waiting = redis.call('XLEN', KEYS[1])
  if waiting >= most then return {now, 2, waiting} end
end
if KEYS[3] and not redis.call('SET', KEYS[3], 'waits', 'NX', 'PX', ARGV[2]) then
  return {now, 4, 0}
end
local deadline = string.format('%.0f', now + life)
local name = KEYS[3] and 'c' or 'd'
local entry = redis.call('XADD', KEYS[1], '*', name, deadline, unpack(ARGV, 7))
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return {now, 1, entry}
"""
    ).encode()
)

# KEYS: calls, then for each its note. ARGV: group, then for each: entry, whether it is a cast,
# when it is late, and how long to remember it (0: not). Returns for each how long it is worth
# something, or why it must not run.
CLAIM: Final = Script(
    (
        _CLOCK
        + "local group = ARGV[1]\n"
        + _DROP
        + """
local function claim(note, entry, is_cast, deadline, life)
  local left = tonumber(deadline) - now
  if is_cast == '0' then
    if redis.call('XACK', KEYS[1], group, entry) == 0 then return -1 end
    redis.call('XDEL', KEYS[1], entry)
    if left <= 0 then return -2 end
    if life ~= '0' and not redis.call('SET', note, entry, 'NX', 'PX', life) then return -3 end
    return left
  end
  if #redis.call('XRANGE', KEYS[1], entry, entry) == 0 then
    redis.call('XACK', KEYS[1], group, entry)
    return -1
  end
  if left <= 0 then return -2 end
  local known = redis.call('GET', note)
  if known == 'done' then
    drop(entry)
    return -1
  end
  if known and known ~= 'waits' and known ~= entry then return -3 end
  redis.call('SET', note, entry, 'PX', life)
  return left
end
local claimed = {}
for number = 2, #KEYS do
  local at = 4 * number - 6
  claimed[number - 1] = claim(KEYS[number], ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3])
end
return claimed
"""
    ).encode()
)

# KEYS: calls. ARGV: group, entry. Returns whether it was still there, so that it never ran and
# never will.
CANCEL: Final = Script(
    (
        "local group = ARGV[1]\n"
        + _DROP
        + """
return drop(ARGV[2]) > 0 and 1 or 0
"""
    ).encode()
)

# KEYS: calls, the note of the cast. ARGV: group, entry, how long to remember it.
DONE: Final = Script(
    (
        "local group = ARGV[1]\n"
        + _DROP
        + """
redis.call('SET', KEYS[2], 'done', 'PX', ARGV[3])
drop(ARGV[2])
"""
    ).encode()
)

# KEYS: calls, dead. ARGV: group, reason, how many dead letters are kept, how long, how many
# deliveries a cast has (0: none), entry. Returns whether it is buried.
BURY: Final = Script(
    (
        "local group = ARGV[1]\n"
        + _BURY
        + """
local most = tonumber(ARGV[5])
if most > 0 then
  local pending = redis.call('XPENDING', KEYS[1], group, ARGV[6], ARGV[6], 1)[1]
  if pending and pending[4] < most then return 0 end
end
bury(ARGV[6], ARGV[2], ARGV[3], ARGV[4])
return 1
"""
    ).encode()
)

# KEYS: calls, dead, the note of the cast. ARGV: the letter, how long it is worth something from now
# on, how long the stream is kept, then the fields. Returns whether the cast waits again: not if the
# letter is gone, or the cast was done.
REPEAT: Final = Script(
    (
        _CLOCK
        + """
if redis.call('GET', KEYS[3]) == 'done' or redis.call('XDEL', KEYS[2], ARGV[1]) == 0 then
  return 0
end
redis.call('SET', KEYS[3], 'waits', 'PX', ARGV[2])
local deadline = string.format('%.0f', now + tonumber(ARGV[2]))
redis.call('XADD', KEYS[1], '*', 'c', deadline, unpack(ARGV, 4))
redis.call('PEXPIRE', KEYS[1], ARGV[3])
return 1
"""
    ).encode()
)

# KEYS: calls, dead. ARGV: group, consumer, after how long without a word an entry is taken from a
# consumer, how many deliveries a cast has, how many dead letters are kept, how long, how many
# entries to return, then the entries that run. Returns the entries that were left by others, and
# how many were buried.
TEND: Final = Script(
    (
        "local group, consumer = ARGV[1], ARGV[2]\n"
        + _BURY
        + """
for number = 8, #ARGV do
  redis.call('XCLAIM', KEYS[1], group, consumer, 0, ARGV[number], 'JUSTID')
end
local left, buried = {}, 0
local pending = redis.call('XPENDING', KEYS[1], group, 'IDLE', ARGV[3], '-', '+', ARGV[7])
for _, one in ipairs(pending) do
  local found = redis.call('XRANGE', KEYS[1], one[1], one[1])[1]
  if not found then
    redis.call('XACK', KEYS[1], group, one[1])
  elseif one[4] >= tonumber(ARGV[4]) then
    bury(one[1], 'it was begun ' .. one[4] .. ' times, and never ended', ARGV[5], ARGV[6])
    buried = buried + 1
  else
    redis.call('XCLAIM', KEYS[1], group, consumer, 0, one[1])
    left[#left + 1] = found
  end
end
return {left, buried}
"""
    ).encode()
)

# KEYS: inbox. ARGV: how many may be unread (0: any number), how long the inbox is kept, the answer,
# and its signature. Returns whether there was room for it.
ANSWER: Final = Script(
    b"""
local most = tonumber(ARGV[1])
if most > 0 and redis.call('XLEN', KEYS[1]) >= most then return 0 end
redis.call('XADD', KEYS[1], '*', 'm', ARGV[3], 's', ARGV[4])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""
)
