-- For wrk: posts texts of 5 to 60 random words, no two alike; reports figures as one line of JSON.
-- Arguments: how many bytes an answer has at least; then a seed, a file of words, and what a body
-- holds before and after the text. Without a seed it gets the page instead.

local threads = {}

function setup(thread)
  thread:set("number", #threads)
  threads[#threads + 1] = thread
end

function init(arguments)
  wrong, refused = 0, 0
  shortest = tonumber(arguments[1])
  if not arguments[2] then
    request = function() return wrk.format("GET") end
    return
  end
  math.randomseed(tonumber(arguments[2]) * 64 + number) -- fewer threads than that
  words = {}
  for word in io.lines(arguments[3]) do
    words[#words + 1] = word
  end
  before, after = arguments[4], arguments[5]
  headers = { ["content-type"] = "application/json" }
end

function text()
  local chosen = {}
  for count = 1, math.random(5, 60) do
    chosen[count] = words[math.random(#words)]
  end
  return table.concat(chosen, " ")
end

function request()
  return wrk.format("POST", nil, headers, before .. text() .. after)
end

function response(status, _, body)
  if status ~= 200 then
    refused = refused + 1
  elseif #body < shortest then
    wrong = wrong + 1
  end
end

function done(summary, latency)
  local errors = summary.errors
  local all_wrong, all_refused = 0, 0
  for _, thread in ipairs(threads) do
    all_wrong = all_wrong + thread:get("wrong")
    all_refused = all_refused + thread:get("refused")
  end
  io.write(string.format(
    '\nJSON {"requests": %d, "seconds": %.3f, "p50_ms": %.3f, "p99_ms": %.3f,'
      .. ' "socket_errors": %d, "not_200": %d, "wrong": %d}\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.timeout, all_refused, all_wrong
  ))
end
