-- The operations of the ledger on a Redis server; redis.py calls them. One call is one transaction.
--
-- KEYS[1]: the prefix of every key. ARGV[1]: JSON {jobs: [[operation, at, ...], ...], now}; times in seconds since the
-- epoch by this server's clock, which is also `now` unless a test gives it. Returns JSON {now, cooldowns, answers}.
-- The operations and their arguments are those of quotas.py; it has the reasons.

local request, prefix = cjson.decode(ARGV[1]), KEYS[1]
local clock = redis.call('TIME')
local now = request.now or clock[1] + clock[2] / 1e6

local DAY = 86400
local WINDOWS = 3660 -- no window is longer
local MEMORY, FARTHEST = DAY, 32 * DAY -- of cooldowns
local SOON, TOGETHER = 1, 1
local LEAST = {requests = 1, tokens = 1, usd = 1e-6}

local function key(...)
    return prefix .. table.concat({...}, ':')
end

local function number(value) -- Lua's own text of a number has 14 digits
    return ('%.17g'):format(value)
end

local function text(reservation)
    return ('%.0f'):format(reservation)
end

local function total(scope, period)
    return key('total', scope, period.start, period.ends)
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
    redis.call('ZREMRANGEBYSCORE', index, '-inf', number(now - DAY))
    redis.call('EXPIRE', index, FARTHEST)
    redis.call('EXPIRE', total(scope, period), math.ceil(math.max(period.ends - now, 0)) + DAY)
end

local function cooldown(name)
    local row = redis.call('HGET', key('cooldown'), name)
    row = row and cjson.decode(row)
    return row and row[1] > now - MEMORY and row[1] <= now + FARTHEST and row or nil
end

-- The next requests of a rolling window, oldest first, after the first `place`: reservation, time, reservation ...
local function window(scope, limit, place, count)
    local since = '(' .. number(now - limit.window)
    return redis.call('ZRANGEBYSCORE', key('sent', scope), since, '+inf', 'WITHSCORES', 'LIMIT', place, count)
end

local function used_by(scope, kind, reservation)
    return kind == 'requests' and 1 or tonumber(redis.call('HGET', key(kind, scope), reservation) or 0)
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

-- What is used of a limit, without reservations, and when its period ends or its oldest request leaves it.
local function settled(scope, limit, store)
    if limit.start then
        return tonumber(redis.call('HGET', total(scope, limit), limit.kind) or 0), tonumber(limit.ends)
    end
    local oldest, used = window(scope, limit, 0, 1)[2], 0
    if limit.kind == 'requests' then
        used = redis.call('ZCOUNT', key('sent', scope), '(' .. number(now - limit.window), '+inf')
    else
        used = spent(scope, limit, store)
    end
    return used, oldest and oldest + limit.window
end

-- What requests under way have reserved of a limit. Those of processes that died are added to `lost`.
local function reserved(scope, limit, lost)
    local sum = 0
    if limit.kind ~= 'requests' then
        local since, rows = tonumber(limit.start or now - limit.window), redis.call('HGETALL', key('reserved', scope))
        for place = 1, #rows, 2 do
            local at, tokens, usd = rows[place + 1]:match('(%S+) (%S+) (%S+)')
            if tonumber(at) > since then
                sum = sum + tonumber(limit.kind == 'tokens' and tokens or usd)
            end
            if lost and math.abs(now - at) > DAY then
                lost[rows[place]] = {tonumber(at), {tonumber(tokens), tonumber(usd)}}
            end
        end
    end
    return sum
end

local function excess(limit, used, expected)
    return used + math.min(math.max(expected, LEAST[limit.kind]), limit.amount) - limit.amount
end

-- When a limit has room for a claim again, and whether it has none for any request; nil if it has room now.
local function full(claim, limit, lost)
    local used, ends = settled(claim.scope, limit, true)
    local over = excess(limit, used, claim[limit.kind] or 0)
    if over + reserved(claim.scope, limit, lost) <= 0 then
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
    return ends or now + SOON, shut
end

-- Removes what no window includes any more, and requests of a clock that ran ahead.
local function trim(scope)
    local sent = key('sent', scope)
    for low, high in pairs({['-inf'] = number(now - WINDOWS), ['(' .. number(now + WINDOWS)] = '+inf'}) do
        for _, id in ipairs(redis.call('ZRANGEBYSCORE', sent, low, high, 'LIMIT', 0, 100)) do
            redis.call('ZREM', sent, id)
            redis.call('HDEL', key('tokens', scope), id)
            redis.call('HDEL', key('usd', scope), id)
        end
    end
    redis.call('EXPIRE', sent, 2 * WINDOWS)
end

local operations = {}

function operations.grant(at, claim, reservation)
    local scope, id = claim.scope, text(reservation)
    if #claim.limits > 0 then
        if redis.call('ZADD', key('sent', scope), 'NX', at, id) == 0 then
            return -- this server had counted it when it did not answer in time
        end
        trim(scope)
    end
    if claim.tokens > 0 or claim.usd > 0 then
        local row = table.concat({number(at), number(claim.tokens), number(claim.usd)}, ' ')
        redis.call('HSET', key('reserved', scope), id, row)
        redis.call('EXPIRE', key('reserved', scope), FARTHEST)
    end
    for _, period in ipairs(claim.periods) do
        redis.call('HINCRBY', total(scope, period), 'requests', 1)
        open(scope, period)
    end
end

function operations.finish(at, scope, reservation, used)
    local id = text(reservation)
    redis.call('HDEL', key('reserved', scope), id)
    local sent = tonumber(redis.call('ZSCORE', key('sent', scope), id))
    if sent then
        if redis.call('HSETNX', key('tokens', scope), id, used[1]) == 0 then
            return
        end
        redis.call('HSET', key('usd', scope), id, used[2])
        redis.call('EXPIRE', key('tokens', scope), 2 * WINDOWS)
        redis.call('EXPIRE', key('usd', scope), 2 * WINDOWS)
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

function operations.release(at, scope, reservation)
    local id = text(reservation)
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
function operations.reserve(_, claim, reservation, history)
    local missing, blocks, lost = {}, {}, {}
    for _, period in ipairs(claim.periods) do
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
    for _, name in ipairs(claim.cooling) do
        local row = cooldown(name)
        if row and row[1] > now then
            blocks[#blocks + 1] = {row[1], name, row[2]}
        end
    end
    for place, limit in ipairs(claim.limits) do
        local ends, shut = full(claim, limit, lost)
        if ends then
            blocks[#blocks + 1] = {ends, place - 1, shut}
        end
    end
    for id, row in pairs(lost) do
        operations.finish(row[1], claim.scope, tonumber(id), row[2])
    end
    if #blocks == 0 then
        operations.grant(now, claim, reservation)
    end
    return {blocks = blocks}
end

function operations.cool(at, name, reason, kind, seconds, ladder)
    local before = cooldown(name)
    local function step(times)
        return ladder[math.min(times, #ladder)]
    end
    local past = before and before[3] == kind and before[5] or 0
    local near = past > 0 and step(past) == 0 and TOGETHER or 0
    local times = past > 0 and before[1] + near > at and past or past + 1
    local stated = seconds ~= cjson.null
    local made = {at + (stated and seconds or step(times)), reason, kind, stated, times}
    if before and before[1] > made[1] and (before[4] or not stated) then
        made = before
    end
    redis.call('HSET', key('cooldown'), name, cjson.encode(made))
    redis.call('EXPIRE', key('cooldown'), FARTHEST + MEMORY)
    for _, other in ipairs(redis.call('HKEYS', key('cooldown'))) do
        if not cooldown(other) then
            redis.call('HDEL', key('cooldown'), other)
        end
    end
    return made
end

function operations.recover(at, name, known)
    local row = cooldown(name)
    if row and row[1] <= at + known + 0.001 and (row[1] <= at or not row[4]) then
        redis.call('HDEL', key('cooldown'), name)
    end
end

function operations.learn(_, model, ratio)
    redis.call('HSET', key('ratio'), model, ratio)
    redis.call('EXPIRE', key('ratio'), 90 * DAY)
end

function operations.note(_, digests, model)
    for _, digest in ipairs(digests) do
        redis.call('SET', key('origin', digest), model, 'EX', DAY)
    end
end

-- What only reads

function operations.used(_, scope, limits)
    local found = {}
    for place, limit in ipairs(limits) do
        local used, ends = settled(scope, limit)
        found[place] = {used + reserved(scope, limit), ends}
    end
    return found
end

function operations.ratios()
    return redis.call('HGETALL', key('ratio'))
end

function operations.origins(_, digests)
    local found = {}
    for place, digest in ipairs(digests) do
        found[place] = redis.call('GET', key('origin', digest))
    end
    return found
end

local answers, cooldowns = {}, {}
for place, job in ipairs(request.jobs) do
    answers[place] = operations[job[1]](unpack(job, 2)) or false
end
for _, name in ipairs(redis.call('HKEYS', key('cooldown'))) do
    cooldowns[name] = cooldown(name)
end
return cjson.encode({now = now, cooldowns = cooldowns, answers = answers})
