-- The operations of the ledger on a Redis server; redis.py calls them. One call is one transaction.
--
-- KEYS[1]: the prefix of every key. ARGV[1]: JSON {jobs: [[operation, at, ...], ...], now}; times in seconds since the
-- epoch by this server's clock, which is also `now` unless a test gives it. Returns JSON {now, answers, cooldowns}.
-- The operations and their arguments are those of quotas.py; it has the reasons.

local request, prefix = cjson.decode(ARGV[1]), KEYS[1]
local clock = redis.call('TIME')
local now = request.now or clock[1] + clock[2] / 1e6

local DAY = 86400
local WINDOWS = 3660 -- no window is longer
local MEMORY, FARTHEST = DAY, 32 * DAY -- of cooldowns
local SOON, TOGETHER = 1, 1
local LEAST = {requests = 1, tokens = 1, usd = 1e-6}
local TRIM = 16 -- one request in so many removes old ones

local COOLDOWNS, RATIOS = prefix .. 'cooldowns', prefix .. 'ratio'

local function key(kind, name)
    return prefix .. kind .. ':' .. name
end

local function total(scope, period)
    return key('total', scope) .. ':' .. period.start .. ':' .. period.ends
end

local function number(value) -- Lua's own text of a number has 14 digits
    return ('%.17g'):format(value)
end

-- The days and months in the limits of a claim, each once.
local function calendar(claim)
    local found = {}
    for _, limit in ipairs(claim.limits) do
        if limit.start then
            found[limit.start .. ' ' .. limit.ends] = limit
        end
    end
    return found
end

-- The days and months of a scope that have been begun, and include `at`.
local function periods(scope, at)
    local found = {}
    for _, name in ipairs(redis.call('ZRANGEBYSCORE', key('periods', scope), '(' .. number(at), '+inf')) do
        local start, ends = name:match('(%S+) (%S+)')
        if tonumber(start) <= at then
            found[#found + 1] = {start = start, ends = ends}
        end
    end
    return found
end

local function open(scope, period)
    local index = key('periods', scope)
    redis.call('ZADD', index, period.ends, period.start .. ' ' .. period.ends)
    redis.call('ZREMRANGEBYSCORE', index, '-inf', now - DAY)
    redis.call('EXPIRE', index, FARTHEST)
    redis.call('EXPIRE', total(scope, period), math.ceil(math.max(period.ends - now, 0)) + DAY)
end

-- The cooldown in a row of the store; nil if there is none, or none that still counts.
local function cooldown(row)
    row = row and cjson.decode(row)
    return row and row.ends > now - MEMORY and row.ends <= now + FARTHEST and row or nil
end

-- The next requests of a rolling window, oldest first, after the first `place`: reservation, time, reservation ...
local function window(scope, limit, place, count)
    local since = '(' .. number(now - limit.window)
    return redis.call('ZRANGEBYSCORE', key('sent', scope), since, '+inf', 'WITHSCORES', 'LIMIT', place, count)
end

local function used_by(scope, kind, id)
    if kind == 'requests' then
        return 1
    end
    local tokens, usd = (redis.call('HGET', key('used', scope), id) or '0 0'):match('(%S+) (%S+)')
    return tonumber(kind == 'tokens' and tokens or usd)
end

local function used_between(scope, kind, after, at)
    local sum = 0
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', key('sent', scope), '(' .. number(after), at)) do
        sum = sum + used_by(scope, kind, id)
    end
    return sum
end

-- The tokens or USD of a rolling window: a sum that `finish` adds to, less what has left the window since.
local function spent(scope, limit, store)
    local name, since = limit.kind .. ' ' .. limit.window, now - limit.window
    local sum, left = (redis.call('HGET', key('sums', scope), name) or ''):match('(%S+) (%S+)')
    left = tonumber(left)
    if left and left <= since and left > now - WINDOWS then
        sum = sum - used_between(scope, limit.kind, left, number(since))
    else
        sum = used_between(scope, limit.kind, since, '+inf')
    end
    if store then
        redis.call('HSET', key('sums', scope), name, number(sum) .. ' ' .. number(since))
        redis.call('EXPIRE', key('sums', scope), 2 * WINDOWS)
    end
    return sum
end

-- What is used of a limit, without reservations.
local function settled(scope, limit, store)
    if limit.start then
        return tonumber(redis.call('HGET', total(scope, limit), limit.kind) or 0)
    elseif limit.kind == 'requests' then
        return redis.call('ZCOUNT', key('sent', scope), '(' .. number(now - limit.window), '+inf')
    end
    return spent(scope, limit, store)
end

-- What requests under way have reserved.
local function reservations(scope)
    local found, rows = {}, redis.call('HGETALL', key('reserved', scope))
    for place = 1, #rows, 2 do
        local at, tokens, usd = rows[place + 1]:match('(%S+) (%S+) (%S+)')
        found[#found + 1] = {id = rows[place], at = tonumber(at), tokens = tonumber(tokens), usd = tonumber(usd)}
    end
    return found
end

local function reserved(limit, under_way)
    local sum, since = 0, tonumber(limit.start or now - limit.window)
    for _, each in ipairs(under_way) do
        sum = sum + (each.at > since and each[limit.kind] or 0)
    end
    return sum
end

local function excess(limit, used, expected)
    return used + math.min(math.max(expected, LEAST[limit.kind]), limit.amount) - limit.amount
end

-- When a limit has room for a claim again, and whether it has none for any request; nil if it has room now.
local function full(claim, limit, under_way)
    local used = settled(claim.scope, limit, true)
    local over = excess(limit, used, claim[limit.kind] or 0)
    if over + reserved(limit, under_way) <= 0 then
        return nil
    elseif over <= 0 then
        return now + SOON, false
    end
    local least = excess(limit, used, 0)
    local shut = least > 0
    over = shut and least or over
    local first, sent = 0, limit.window and window(claim.scope, limit, 0, 100) or {}
    while #sent > 0 do
        for place = 1, #sent, 2 do
            over = over - used_by(claim.scope, limit.kind, sent[place])
            if over <= 0 then
                return sent[place + 1] + limit.window, shut
            end
        end
        first = first + 100
        sent = window(claim.scope, limit, first, 100)
    end
    return tonumber(limit.ends) or now + SOON, shut
end

-- Removes what no window includes any more, and requests of a clock that ran ahead; not all at once, as others wait.
local function trim(scope)
    local sent = key('sent', scope)
    for low, high in pairs({['-inf'] = number(now - WINDOWS), ['(' .. number(now + WINDOWS)] = '+inf'}) do
        for _, id in ipairs(redis.call('ZRANGEBYSCORE', sent, low, high, 'LIMIT', 0, 100)) do
            redis.call('ZREM', sent, id)
            redis.call('HDEL', key('used', scope), id)
        end
    end
end

local operations = {}

function operations.grant(at, claim, id)
    local scope = claim.scope
    if #claim.limits > 0 then
        if redis.call('ZADD', key('sent', scope), 'NX', at, id) == 0 then
            return -- this server had counted it when it did not answer in time
        end
        redis.call('EXPIRE', key('sent', scope), 2 * WINDOWS)
        if id % TRIM == 0 then
            trim(scope)
        end
    end
    if claim.tokens > 0 or claim.usd > 0 then
        local row = table.concat({number(at), number(claim.tokens), number(claim.usd)}, ' ')
        redis.call('HSET', key('reserved', scope), id, row)
        redis.call('EXPIRE', key('reserved', scope), FARTHEST)
    end
    for _, period in pairs(calendar(claim)) do
        if redis.call('HINCRBY', total(scope, period), 'requests', 1) == 1 then
            open(scope, period)
        end
    end
end

function operations.finish(at, scope, id, used)
    redis.call('HDEL', key('reserved', scope), id)
    local sent = tonumber(redis.call('ZSCORE', key('sent', scope), id))
    if sent then
        if redis.call('HSETNX', key('used', scope), id, number(used[1]) .. ' ' .. number(used[2])) == 0 then
            return
        end
        redis.call('EXPIRE', key('used', scope), 2 * WINDOWS)
        local sums = redis.call('HGETALL', key('sums', scope))
        for place = 1, #sums, 2 do
            local sum, left = sums[place + 1]:match('(%S+) (%S+)')
            if sent > tonumber(left) then
                sum = sum + (sums[place]:match('^tokens') and used[1] or used[2])
                redis.call('HSET', key('sums', scope), sums[place], number(sum) .. ' ' .. left)
            end
        end
    end
    for _, period in ipairs(periods(scope, sent or at)) do
        redis.call('HINCRBYFLOAT', total(scope, period), 'tokens', used[1])
        redis.call('HINCRBYFLOAT', total(scope, period), 'usd', used[2])
    end
end

function operations.release(at, scope, id)
    redis.call('HDEL', key('reserved', scope), id)
    if redis.call('ZREM', key('sent', scope), id) == 1 then
        for _, period in ipairs(periods(scope, at)) do
            redis.call('HINCRBY', total(scope, period), 'requests', -1)
        end
    end
end

-- Adds what a user's history has of a day or month, once for each: its limit is new, or this server lost its data.
function operations.recall(_, scope, period, history, requests, tokens, usd)
    local name = total(scope, period)
    if redis.call('HSETNX', name, 'of ' .. history, 1) == 1 then
        redis.call('HINCRBY', name, 'requests', requests)
        redis.call('HINCRBYFLOAT', name, 'tokens', tokens)
        redis.call('HINCRBYFLOAT', name, 'usd', usd)
        open(scope, period)
    end
end

-- Counts a request and returns no blocks; or what blocks it; or, as `recall`, the periods that lack a history: none
-- where the client did not know this server's clock.
function operations.reserve(_, claim, id, history)
    local missing, blocks = {}, {}
    for _, period in pairs(calendar(claim)) do
        if now < period.start - 1 or now > period.ends + 1 then
            return {recall = {}}
        end
        if redis.call('HEXISTS', total(claim.scope, period), 'of ' .. history) == 0 then
            missing[#missing + 1] = period
        end
    end
    if #missing > 0 then
        return {recall = missing}
    end
    for place, row in ipairs(#claim.cooling > 0 and redis.call('HMGET', COOLDOWNS, unpack(claim.cooling)) or {}) do
        row = cooldown(row)
        if row and row.ends > now then
            blocks[#blocks + 1] = {row.ends, claim.cooling[place], row.reason}
        end
    end
    local under_way = reservations(claim.scope)
    for place, limit in ipairs(claim.limits) do
        local ends, shut = full(claim, limit, under_way)
        if ends then
            blocks[#blocks + 1] = {ends, place - 1, shut}
        end
    end
    for _, each in ipairs(under_way) do
        if math.abs(now - each.at) > DAY then -- of a process that died
            operations.finish(each.at, claim.scope, each.id, {each.tokens, each.usd})
        end
    end
    if #blocks == 0 then
        operations.grant(now, claim, id)
    elseif redis.call('ZSCORE', key('sent', claim.scope), id) then
        return {blocks = {}} -- this server had counted it when the connection broke before the answer
    end
    return {blocks = blocks}
end

function operations.cool(at, name, reason, kind, seconds, ladder)
    local before = cooldown(redis.call('HGET', COOLDOWNS, name))
    local function step(times)
        return ladder[math.min(times, #ladder)]
    end
    local past = before and before.kind == kind and before.times or 0
    local near = past > 0 and step(past) == 0 and TOGETHER or 0
    local times = past > 0 and before.ends + near > at and past or past + 1
    local stated = seconds ~= cjson.null
    local ends = at + (stated and seconds or step(times))
    local made = {name = name, ends = ends, reason = reason, kind = kind, stated = stated, times = times}
    if before and before.ends > ends and (before.stated or not stated) then
        made = before
    end
    redis.call('HSET', COOLDOWNS, name, cjson.encode(made))
    redis.call('EXPIRE', COOLDOWNS, FARTHEST + MEMORY)
    local rows = redis.call('HGETALL', COOLDOWNS)
    for place = 1, #rows, 2 do
        if not cooldown(rows[place + 1]) then
            redis.call('HDEL', COOLDOWNS, rows[place])
        end
    end
    return made
end

function operations.recover(at, name, known)
    local row = cooldown(redis.call('HGET', COOLDOWNS, name))
    if row and row.ends <= at + known + 0.001 and (row.ends <= at or not row.stated) then
        redis.call('HDEL', COOLDOWNS, name)
    end
end

function operations.learn(_, model, ratio)
    redis.call('HSET', RATIOS, model, ratio)
    redis.call('EXPIRE', RATIOS, 90 * DAY)
end

function operations.note(_, digests, model)
    for _, digest in ipairs(digests) do
        redis.call('SET', key('origin', digest), model, 'EX', DAY)
    end
end

-- What only reads

function operations.used(_, scope, limits)
    local found, under_way = {}, reservations(scope)
    for place, limit in ipairs(limits) do
        local ends, oldest = tonumber(limit.ends), limit.window and window(scope, limit, 0, 1)[2]
        found[place] = {settled(scope, limit) + reserved(limit, under_way), ends or oldest and oldest + limit.window}
    end
    return found
end

function operations.ratios()
    return redis.call('HGETALL', RATIOS)
end

function operations.origins(_, digests)
    local found = {}
    for place, digest in ipairs(digests) do
        found[place] = redis.call('GET', key('origin', digest))
    end
    return found
end

local answers = {}
for place, job in ipairs(request.jobs) do
    answers[place] = operations[job[1]](unpack(job, 2)) or false
end
local cooldowns = table.concat(redis.call('HVALS', COOLDOWNS), ',') -- they are JSON; to decode them would take longest
return '{"now":' .. number(now) .. ',"answers":' .. cjson.encode(answers) .. ',"cooldowns":[' .. cooldowns .. ']}'
