//! What the broker does in Redis in one step: each script is atomic, so that a crash leaves nothing half done.
//!
//! Keys of a queue, all under `PREFIX:QUEUE`:
//!
//! | key | what |
//! |---|---|
//! | `:requests` | stream of requests, fields `s` (sample as UUID) and `f` (frame); an entry goes when its result is stored |
//! | `:s:UUID` | what is known of a sample: `v` weights, `c` digest of the request, `e` its entry while it is under way, then `r` the result's frame or `x` the failure's |
//! | `:results` | samples with an unfetched result, by the time they expire |
//! | `:counters` | the counters of [`crate::BrokerStats`] |
//! | `:closed` | there when the queue is closed |
//! | `:rejected` | the last messages that could not be read |

use redis::Script;

/// Consumer that holds what was taken from silent ones, until somebody takes it.
pub(super) const RECLAIMED: &str = "_reclaimed";
/// Consumer group of the teachers.
pub(super) const GROUP: &str = "teachers";

const NOW: &str = "
local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end
";

/// KEYS requests, sample, counters, closed. ARGV frame, version, digest, uuid, requests_max, keep_ms.
const PUBLISH: &str = "
if redis.call('EXISTS', KEYS[4]) == 1 then return {'closed', 0} end
local held = redis.call('HMGET', KEYS[2], 'v', 'c', 'e')
if held[1] then
  -- An entry that somebody has cut off the stream is published anew.
  local lost = held[3] and #redis.call('XRANGE', KEYS[1], held[3], held[3]) == 0
  if not lost then
    if held[1] == ARGV[2] and (not held[3] or held[2] == ARGV[3]) then return {'known', 0} end
    return {'in use', held[1]}
  end
end
local length = redis.call('XLEN', KEYS[1])
if length >= tonumber(ARGV[5]) then return {'full', length} end
local id = redis.call('XADD', KEYS[1], '*', 's', ARGV[4], 'f', ARGV[1])
redis.call('HSET', KEYS[2], 'v', ARGV[2], 'c', ARGV[3], 'e', id)
redis.call('HINCRBY', KEYS[3], 'published', 1)
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('PEXPIRE', KEYS[3], ARGV[6])
return {'queued', 0}
";

/// KEYS requests, closed. ARGV group, consumer, max, reclaimed consumer.
const TAKE: &str = "
local taken = {}
local max = tonumber(ARGV[3])
local put_back = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', max, ARGV[4])
if put_back.err then
  -- No group: the queue is new, or the server was restarted empty.
  redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[1], '0', 'MKSTREAM')
  put_back = {}
end
for _, held in ipairs(put_back) do
  local entry = redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, held[1])[1]
  if entry then taken[#taken + 1] = {entry[1], held[4] + 1, entry[2]} end
end
if #taken < max then
  local fresh = redis.call('XREADGROUP', 'GROUP', ARGV[1], ARGV[2], 'COUNT', max - #taken, 'STREAMS', KEYS[1], '>')
  if fresh then
    for _, entry in ipairs(fresh[1][2]) do taken[#taken + 1] = {entry[1], 1, entry[2]} end
  end
end
return {redis.call('EXISTS', KEYS[2]), taken}
";

/// KEYS requests, sample, counters, results. ARGV group, entry, field, frame, result_ms, results_max, uuid, keep_ms, small.
const SETTLE: &str = "
local function let_go()
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
if redis.call('HGET', KEYS[2], 'e') ~= ARGV[2] then
  let_go()
  redis.call('HINCRBY', KEYS[3], 'duplicates', 1)
  return {'duplicate', 0}
end
local now = now_ms()
local held = redis.call('ZCOUNT', KEYS[4], '(' .. now, '+inf')
if held >= tonumber(ARGV[6]) then return {'full', held} end
-- A small result takes the place of its request even when the server is full: a script that has written may go on. A large
-- one has to wait for room, so its write comes first.
if ARGV[9] == '1' then let_go() end
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
redis.call('HDEL', KEYS[2], 'e')
let_go()
redis.call('PEXPIRE', KEYS[2], ARGV[5])
local gone = redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', now)
if gone > 0 then redis.call('HINCRBY', KEYS[3], 'expired', gone) end
redis.call('ZADD', KEYS[4], now + ARGV[5], ARGV[7])
redis.call('PEXPIRE', KEYS[4], ARGV[8])
if ARGV[3] == 'r' then
  local latency = now - tonumber(string.match(ARGV[2], '^%d+'))
  if latency < 0 then latency = 0 end
  redis.call('HINCRBY', KEYS[3], 'completed', 1)
  redis.call('HINCRBY', KEYS[3], 'latency_ms_sum', latency)
  local longest = tonumber(redis.call('HGET', KEYS[3], 'latency_ms_max') or '0')
  if latency > longest then redis.call('HSET', KEYS[3], 'latency_ms_max', latency) end
else
  redis.call('HINCRBY', KEYS[3], 'failed', 1)
end
return {'stored', 0}
";

/// KEYS requests, counters. ARGV group, idle_ms, deliveries_max, reclaimed consumer, consumer (or nothing: any). Gives how many were put back, and the
/// entries (with attempts and fields) that are to be given up.
const RECLAIM: &str = "
local back, given_up, from = 0, {}, '-'
while true do
  local question = {'XPENDING', KEYS[1], ARGV[1], 'IDLE', ARGV[2], from, '+', 1000}
  if ARGV[5] ~= '' then question[#question + 1] = ARGV[5] end
  local idle = redis.pcall(unpack(question))
  if idle.err then break end
  for _, held in ipairs(idle) do
    if held[2] ~= ARGV[4] then
      if held[4] >= tonumber(ARGV[3]) then
        local entry = redis.call('XRANGE', KEYS[1], held[1], held[1])[1]
        given_up[#given_up + 1] = {held[1], held[4], entry and entry[2] or {}}
      else
        redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[4], 0, held[1], 'JUSTID')
        back = back + 1
      end
    end
  end
  if #idle < 1000 then break end
  from = '(' .. idle[#idle][1]
end
if back > 0 then redis.call('HINCRBY', KEYS[2], 'reclaimed', back) end
return {back, given_up}
";

/// KEYS requests, results, then samples. ARGV group, then UUIDs.
const FORGET: &str = "
for i = 3, #KEYS do
  local entry = redis.call('HGET', KEYS[i], 'e')
  if entry then
    redis.call('XACK', KEYS[1], ARGV[1], entry)
    redis.call('XDEL', KEYS[1], entry)
  end
  redis.call('DEL', KEYS[i])
  redis.call('ZREM', KEYS[2], ARGV[i - 1])
end
return 0
";

/// KEYS requests, rejected, counters. ARGV group, entry (or nothing), bytes, reason, keep, keep_ms.
const REJECT: &str = "
if ARGV[2] ~= '' then
  redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
  redis.call('XDEL', KEYS[1], ARGV[2])
end
redis.call('RPUSH', KEYS[2], ARGV[4], ARGV[3])
redis.call('LTRIM', KEYS[2], -2 * tonumber(ARGV[5]), -1)
redis.call('HINCRBY', KEYS[3], 'rejected', 1)
redis.call('PEXPIRE', KEYS[2], ARGV[6])
redis.call('PEXPIRE', KEYS[3], ARGV[6])
return 0
";

/// KEYS requests, results, counters. ARGV group, reclaimed consumer. Gives length, held by consumers, put back, age of the
/// oldest that waits, unfetched results.
const STATS: &str = "
local now = now_ms()
local gone = redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
if gone > 0 then redis.call('HINCRBY', KEYS[3], 'expired', gone) end
local held, back, oldest = 0, 0, nil
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1])
if not pending.err then
  held = pending[1]
  for _, consumer in ipairs(pending[4] or {}) do
    if consumer[1] == ARGV[2] then back = tonumber(consumer[2]) end
  end
  local first = redis.call('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])[1]
  if first then oldest = first[1] end
end
local function age(id)
  return math.max(0, now - tonumber(string.match(id, '^%d+')))
end
local age_ms = oldest and age(oldest) or 0
local last = '0-0'
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if not groups.err then
  for _, group in ipairs(groups) do
    local fields = {}
    for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
    if fields['name'] == ARGV[1] then last = fields['last-delivered-id'] end
  end
end
local fresh = redis.call('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', 1)[1]
if fresh then age_ms = math.max(age_ms, age(fresh[1])) end
return {redis.call('XLEN', KEYS[1]), held - back, back, age_ms, redis.call('ZCARD', KEYS[2])}
";

pub(super) struct Scripts {
    pub(super) publish: Script,
    pub(super) take: Script,
    pub(super) settle: Script,
    pub(super) reclaim: Script,
    pub(super) forget: Script,
    pub(super) reject: Script,
    pub(super) stats: Script,
}

impl Scripts {
    pub(super) fn new() -> Scripts {
        let script = |body: &str| Script::new(&format!("{NOW}{body}"));
        Scripts {
            publish: script(PUBLISH),
            take: script(TAKE),
            settle: script(SETTLE),
            reclaim: script(RECLAIM),
            forget: script(FORGET),
            reject: script(REJECT),
            stats: script(STATS),
        }
    }
}
