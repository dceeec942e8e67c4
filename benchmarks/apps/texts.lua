-- For wrk: posts texts of 5 to 60 random words, no two alike; reports figures as one line of JSON.
-- Arguments: a seed, and "close" to send each request over a connection of its own.

local words = {}
for word in ([[
  a about after again air all along also an and animal answer any are around as at away back be
  because been before began being below between both boy but by call came can car change city
  close cold come could country cross cut day did different do does dog done door down draw each
  early earth eat end enough even ever every example eye face family far farm father feel feet few
  field find fire first fish five follow food for form found four friend from full game gave get
  girl give go gold good got great green ground group grow had half hand hard has have he head
  hear heat help her here high him his hold horse hot hour house how idea if in is island it just
]]):gmatch("%a+") do
  words[#words + 1] = word
end

local threads = 0

function setup(thread)
  thread:set("number", threads)
  threads = threads + 1
end

function init(arguments)
  seed = tonumber(arguments[1] or 1) * 1000 + number
  math.randomseed(seed)
  sent = 0
  headers = { ["content-type"] = "application/json", ["connection"] = arguments[2] }
end

function request()
  sent = sent + 1
  local text = { "text " .. seed .. " " .. sent }
  for count = 4, math.random(5, 60) do
    text[#text + 1] = words[math.random(#words)]
  end
  local body = '{"text": "' .. table.concat(text, " ") .. '"}'
  return wrk.format("POST", nil, headers, body)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '\nJSON {"requests": %d, "seconds": %.3f, "p50_ms": %.1f, "p99_ms": %.1f, "errors": %d}\n',
    summary.requests, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    errors.connect + errors.read + errors.write + errors.status + errors.timeout
  ))
end
