// Runs one ONNX model with ONNX Runtime Web, for the Python module `node_runtime`.
//
//     node runner.mjs SCRIPT WASM SECONDS
//
// A request is a line of JSON and then its content, `bytes` bytes long. So is the reply, on standard output.
//
//     {"open": true, "bytes": …}, a model              -> {"version", "node", "inputs", "outputs"}, nothing
//     {"run": output, "dtype", "shape", "bytes"}, pixels -> {"dtype", "shape", "bytes"}, values
//     any                                                -> {"error": text}, nothing
//
// A request that takes longer than SECONDS is answered with an error, and ends the process. It also ends with its input.

import { readSync, writeSync, readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";
import { Worker } from "node:worker_threads";

const [SCRIPT, WASM, SECONDS] = process.argv.slice(2);
const STDIN = 0, STDOUT = 1;
const CHUNK = 1 << 30; // Node reads less than 2 GiB at once
const TYPES = { uint8: Uint8Array, float32: Float32Array };

// Whatever libraries print must not get between the replies.
for (const name of ["log", "info", "debug", "warn"]) console[name] = console.error;
// The parent decides when this process ends, also when Ctrl-C or a service manager signals both.
for (const name of ["SIGINT", "SIGTERM", "SIGHUP"]) process.on(name, () => {});

// A model can keep this thread busy forever, so another one watches the clock and the parent.
const busySince = new BigInt64Array(new SharedArrayBuffer(8));
const WATCH = `
const { workerData: { busySince, seconds, parent } } = require("node:worker_threads");
const { writeSync } = require("node:fs");
setInterval(() => {
  const since = Number(Atomics.load(busySince, 0));
  const late = since && Date.now() - since > seconds * 1000;
  if (late) writeSync(${STDOUT}, JSON.stringify({ error: "no result after " + seconds + " s" }) + "\\n");
  if (late || process.ppid !== parent) process.kill(process.pid, "SIGKILL");
}, 250);
`;
const workerData = { busySince, seconds: Number(SECONDS), parent: process.ppid };
new Worker(WATCH, { eval: true, workerData, stdout: true, stderr: true }).unref();

// Node.js stops waiting for the pipes as soon as a library uses one of its streams for them.
const never = new Int32Array(new SharedArrayBuffer(4));
function patient(call) {
  for (;;) {
    try {
      return call();
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
      Atomics.wait(never, 0, 0, 1);
    }
  }
}

// One read returns a request of a small image, so the rest of a buffer is the start of the content.
const buffer = new Uint8Array(1 << 16);
let start = 0, end = 0;

function receive(target, from, size) {
  const count = patient(() => readSync(STDIN, target, from, Math.min(size, CHUNK)));
  if (!count) process.exit(0);
  return count;
}

function readLine() {
  for (let text = ""; ; [start, end] = [0, receive(buffer, 0, buffer.length)]) {
    const newline = buffer.subarray(0, end).indexOf(10, start);
    text += String.fromCharCode(...buffer.subarray(start, newline < 0 ? end : newline));
    start = newline + 1;
    if (newline >= 0) return text;
  }
}

// Not with a function of Node that returns a Buffer: it can be a part of a larger one, all of which ONNX Runtime would take.
function read(size) {
  let bytes;
  try {
    bytes = new Uint8Array(size);
  } catch (error) {
    for (let left = size - (end - start); left > 0;) left -= receive(buffer, 0, Math.min(left, buffer.length));
    start = end;
    throw error;
  }
  const kept = buffer.subarray(start, Math.min(end, start + size));
  bytes.set(kept);
  start += kept.length;
  for (let filled = kept.length; filled < size;) filled += receive(bytes, filled, size - filled);
  return bytes;
}

function write(bytes) {
  for (let sent = 0; sent < bytes.length;) {
    sent += patient(() => writeSync(STDOUT, bytes, sent, Math.min(bytes.length - sent, CHUNK)));
  }
}

let ort, session;

async function open(model) {
  ort = await import(pathToFileURL(SCRIPT));
  ort.env.wasm.wasmBinary = new Uint8Array(readFileSync(WASM)).buffer;
  ort.env.wasm.numThreads = 1;
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 4 });
  const { inputMetadata: inputs, outputMetadata: outputs } = session;
  return [{ version: ort.env.versions.web, node: process.version, inputs, outputs }, new Uint8Array(0)];
}

async function run({ run: name, dtype, shape }, content) {
  const input = new ort.Tensor(dtype, new TYPES[dtype](content.buffer), shape);
  const outputs = await session.run({ input }, [name]);
  const { type, dims, data } = outputs[name];
  return [{ dtype: type, shape: dims }, new Uint8Array(data.buffer, data.byteOffset, data.byteLength)];
}

for (;;) {
  const request = JSON.parse(readLine());
  let reply, result = new Uint8Array(0);
  try {
    const content = read(request.bytes);
    Atomics.store(busySince, 0, BigInt(Date.now()));
    [reply, result] = await (request.open ? open(content) : run(request, content));
  } catch (error) {
    reply = { error: String(error?.message ?? error) };
  }
  Atomics.store(busySince, 0, 0n);
  write(Buffer.from(`${JSON.stringify({ ...reply, bytes: result.length })}\n`));
  write(result);
}
