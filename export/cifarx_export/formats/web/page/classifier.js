// A worker that decodes pictures and runs the model, so that the page never waits.
//
//     {id, blob}  ->  {id, outputs, width, height, decode, run}  or  {id, error}; times are in milliseconds
//
// Without being asked, it sends {loading: megabytes}, and then {ready: true, spec, version, megabytes} or {failed: reason}.

const STRIP_PIXELS = 1 << 22; // a phone limits the size of a canvas, so large pictures are read in strips
const MAX_PIXELS = 100_000_000;

const ort = import("./runtime/ort.js");
let loaded = 0, spec, session;

async function download(name) {
  const response = await fetch(new URL(name, import.meta.url), { cache: "no-cache" });
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  const parts = [], reader = response.body.getReader();
  for (let part; !(part = await reader.read()).done;) {
    parts.push(part.value);
    loaded += part.value.length;
    postMessage({ loading: loaded / 1e6 });
  }
  return new Blob(parts).arrayBuffer();
}

async function load() {
  const [{ env, InferenceSession }, wasm, model, document] =
    await Promise.all([ort, download("runtime/ort.wasm"), download("model.web.onnx"), download("cifarx_spec.json")]);
  spec = JSON.parse(new TextDecoder().decode(document));
  env.wasm.wasmBinary = wasm;
  env.wasm.numThreads = 1; // more would need headers that few static hosts send
  session = await InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"], logSeverityLevel: 4 });
  return { ready: true, spec, version: env.versions.web, megabytes: loaded / 1e6 };
}

// The steps of Pillow's convert("L").
const gray = (red, green, blue) => (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;

// Returns what `cifarx infer` reads from the file: upright 8-bit RGB or grayscale, transparency blended with white, and
// numbers as they are stored, without the conversions of a color profile.
async function decode(blob) {
  const options = { imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "default" };
  const bitmap = await createImageBitmap(blob, options);
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`the picture has more than ${MAX_PIXELS / 1e6} million pixels`);
  const rows = Math.min(height, Math.max(1, Math.floor(STRIP_PIXELS / width)));
  const context = new OffscreenCanvas(width, rows).getContext("2d", { alpha: false, willReadFrequently: true });
  const channels = spec.input.channels, pixels = new Uint8Array(width * height * channels);
  let next = 0;
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    context.fillStyle = "white";
    context.fillRect(0, 0, width, rows);
    context.drawImage(bitmap, 0, top, width, count, 0, 0, width, count);
    const { data } = context.getImageData(0, 0, width, count);
    for (let at = 0; at < data.length; at += 4) {
      if (channels === 1) {
        pixels[next++] = gray(data[at], data[at + 1], data[at + 2]);
      } else {
        pixels[next++] = data[at];
        pixels[next++] = data[at + 1];
        pixels[next++] = data[at + 2];
      }
    }
  }
  bitmap.close();
  return { width, height, pixels, shape: [1, height, width, channels] };
}

async function classify(blob) {
  const started = performance.now();
  const { width, height, pixels, shape } = await decode(blob);
  const decoded = performance.now();
  const { Tensor } = await ort;
  const results = await session.run({ input: new Tensor("uint8", pixels, shape) });
  const outputs = results[spec.output].data.slice();
  return { outputs, width, height, decode: decoded - started, run: performance.now() - decoded };
}

const readable = (error) => String(error?.message ?? error);
const ready = load();
ready.then(postMessage, (error) => postMessage({ failed: readable(error) }));

let last = ready; // one picture at a time: a session runs only one
onmessage = ({ data: { id, blob } }) => {
  const result = last.catch(() => {}).then(() => ready).then(() => classify(blob));
  last = result;
  result.then((answer) => postMessage({ id, ...answer }), (error) => postMessage({ id, error: readable(error) }));
};
