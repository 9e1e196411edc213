-- usage: wrk … -s wrk_post.lua URL -- BODY_FILE [HEADER VALUE]…
-- Posts the bytes of a file and prints the results as one line of JSON.

function init(args)
  local file = assert(io.open(args[1], "rb"))
  wrk.method = "POST"
  wrk.body = file:read("*a")
  file:close()
  for position = 2, #args, 2 do
    wrk.headers[args[position]] = args[position + 1]
  end
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %f, "bad_status": %d, "broken": %d, "p50_us": %f, "p99_us": %f}\n',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
