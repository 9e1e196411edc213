"use strict";
// The page: pictures in, predictions out. `classifier.js` does the work.

const $ = (id) => document.getElementById(id);
const TOP = [1, 3, 5, 10, 100];

let loading = true;
let spec = null; // of the model, when it is loaded
let shown = null; // the newest picture: {id, name, url}
let answer = null; // the outputs for it
let stream = null; // of the camera
let dragged = 0;

// All text is inserted as text nodes, so no name of a file or class is ever parsed as HTML.
function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

// Screen readers would announce the same text again.
const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };

// ---- Numbers as text ----
function duration(milliseconds) {
  if (milliseconds < 999.5) return `${milliseconds < 10 ? milliseconds.toFixed(1) : Math.round(milliseconds)} ms`;
  return `${(milliseconds / 1000).toFixed(2)} s`;
}

function percent(fraction) {
  if (fraction > 0 && fraction < 0.001) return "<0.1%";
  return fraction < 1 && fraction >= 0.9995 ? ">99.9%" : `${(fraction * 100).toFixed(1)}%`;
}

// Truncated instead of rounded: only a fraction of 1 is 100%.
const share = (fraction) => `${(Math.floor(fraction * 1e4 + 1e-6) / 100).toFixed(2)}%`;

// ---- From outputs to scores: as `cifarx_serve.scores` ----
const sigmoid = (value) => (value < 0 ? Math.exp(value) / (1 + Math.exp(value)) : 1 / (1 + Math.exp(-value)));

function scoresAt(outputs, temperature) {
  let scores = Array.from(outputs, (value) => value / temperature);
  if (spec.output === "logits" && spec.activation === "softmax") {
    const highest = Math.max(...scores);
    scores = scores.map((value) => Math.exp(value - highest));
    const sum = scores.reduce((total, value) => total + value, 0);
    scores = scores.map((value) => value / sum);
  } else if (spec.output === "logits") {
    scores = scores.map(sigmoid);
  }
  return spec.outputs === 1 ? [1 - scores[0], scores[0]] : scores;
}

// Returns the classes with their scores, the likeliest first, and whether each is predicted.
function predictions(outputs) {
  const scores = scoresAt(outputs, spec.temperature ?? 1), plain = scoresAt(outputs, 1);
  const threshold = (index) => Math.fround(spec.thresholds?.[index] ?? 0.5);
  const reaches = (score, index) => Math.fround(score) >= threshold(index);
  const rows = spec.class_names.map((label, index) => ({ label, index, score: scores[index] }));
  if (spec.activation === "sigmoid" && spec.outputs !== 1) {
    for (const row of rows) row.applies = reaches(plain[row.index], row.index);
  } else {
    const best = spec.outputs === 1 ? Number(reaches(plain[1], 0)) : outputs.indexOf(Math.max(...outputs));
    for (const row of rows) row.applies = row.index === best;
  }
  return rows.sort((a, b) => b.score - a.score || a.index - b.index);
}

// ---- The answer ----
function showError(text) {
  $("error-text").textContent = text;
  $("error").hidden = !text;
  if (text) for (const id of ["one", "idle"]) $(id).hidden = true;
}

function showAnswer() {
  const rows = predictions(answer.outputs), count = Number($("top-k").value);
  const labels = rows.filter((row) => row.applies).map((row) => row.label);
  $("best").textContent = labels.join(", ") || "No label applies";
  $("bars").className = spec.activation === "sigmoid" && spec.outputs !== 1 ? "bars labels" : "bars";
  $("bars").replaceChildren(...rows.slice(0, count).map(({ label, score, applies }) => {
    const fill = element("span", { className: "fill" });
    fill.style.width = `${score * 100}%`;
    return element("li", { className: applies ? "applies" : "" },
      element("span", { className: "label", textContent: label, title: label }),
      element("span", { className: "track" }, fill),
      element("span", { className: "percent", textContent: percent(score) }));
  }));
  const times = [["decode", "decoding", answer.decode], ["model", "model with preprocessing", answer.run]];
  $("parts").replaceChildren(...times.map(([name, , time]) => {
    const part = element("span", { className: name });
    part.style.flexGrow = String(time);
    return part;
  }));
  $("times").replaceChildren(...times.map(([name, text, time]) => element("li", {},
    element("span", { className: `key ${name}` }), `${text} `, element("b", { textContent: duration(time) }))));
  showError("");
  $("idle").hidden = true;
  $("one").hidden = false;
  setText($("spoken"), `${$("best").textContent}, ${percent(rows[0].score)}, ${duration(answer.decode + answer.run)}`);
}

// ---- The picture ----
function classify(blob, name) {
  if (shown) URL.revokeObjectURL(shown.url);
  shown = { id: (shown?.id ?? 0) + 1, name, url: URL.createObjectURL(blob) };
  const preview = $("preview");
  preview.className = "";
  preview.onload = () => preview.classList.toggle("tiny", Math.max(preview.naturalWidth, preview.naturalHeight) <= 96);
  preview.src = shown.url;
  preview.alt = `Preview of ${name}`;
  preview.hidden = false;
  setText($("picture"), name);
  setText($("drop-word"), "Choose another picture");
  $("answer").setAttribute("aria-busy", "true");
  classifier.postMessage({ id: shown.id, blob });
}

function received({ id, error, ...result }) {
  if (id !== shown.id) return; // an older picture
  $("answer").setAttribute("aria-busy", "false");
  if (error) {
    answer = null;
    showError(`${shown.name} cannot be classified: ${error}`);
    $("preview").hidden = true;
    return;
  }
  answer = result;
  setText($("picture"), `${shown.name}, ${result.width}×${result.height}`);
  showAnswer();
}

function takeFile(files) {
  const file = [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (!file) return;
  closeCamera();
  classify(file, file.name || "the picture");
}

$("files").addEventListener("change", ({ target }) => {
  takeFile(target.files);
  target.value = ""; // so that choosing the same file again is a change
});
addEventListener("paste", ({ clipboardData }) => takeFile(clipboardData.files));
addEventListener("dragenter", () => document.body.classList.toggle("dragging", ++dragged > 0));
addEventListener("dragleave", () => document.body.classList.toggle("dragging", --dragged > 0));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  dragged = 0;
  document.body.classList.remove("dragging");
  takeFile(event.dataTransfer.files);
});

// ---- The camera, which browsers allow only on https and localhost ----
$("camera").hidden = !navigator.mediaDevices?.getUserMedia;
$("camera").addEventListener("click", async () => {
  setText($("camera-problem"), "");
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    setText($("camera-problem"), `The camera cannot be used: ${error.message}`);
    return;
  }
  $("video").srcObject = stream;
  for (const id of ["drop", "camera"]) $(id).hidden = true;
  $("live").hidden = false;
  $("take").focus();
  $("video").play().catch(() => {}); // it was closed before its first frame
});

function closeCamera() {
  if (!stream) return;
  for (const track of stream.getTracks()) track.stop();
  stream = $("video").srcObject = null;
  $("live").hidden = true;
  for (const id of ["drop", "camera"]) $(id).hidden = false;
}

$("take").addEventListener("click", () => {
  const video = $("video");
  if (!video.videoWidth) return; // its first frame has not arrived
  const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  closeCamera();
  canvas.toBlob((blob) => classify(blob, "Picture of the camera"));
  $("camera").focus();
});
$("close").addEventListener("click", () => {
  closeCamera();
  $("camera").focus();
});

// ---- The model ----
function resizing({ resize, resize_to: size, height, width }) {
  const target = `${width}×${height}`;
  if (resize === "letterbox") return `fitted into ${target}`;
  if (resize === "shorter_side") return `shorter side to ${size ?? height}, center crop of ${target}`;
  return size ? `${size[1]}×${size[0]}, center crop of ${target}` : target;
}

function facts({ version, megabytes }) {
  const { training, parity, input, precision, class_names: names, exporter } = spec;
  const color = { L: "grayscale", BGR: "BGR" }[input.color] ?? "RGB";
  return [
    ["network", spec.model],
    ["classes", names.length > 12 ? `${names.slice(0, 12).join(", ")} and ${names.length - 12} more` : names.join(", ")],
    ["input", `${resizing(input)}, ${color}`],
    ["precision", precision],
    training && ["training", `${training.data.name}, ${training.epochs} epochs`],
    typeof parity?.accuracy === "number" && ["accuracy", `${share(parity.accuracy)} on ${parity.data}`],
    parity && ["agreement", `${share(parity.agreement)} of ${parity.images.toLocaleString("en")} images, in ${parity.provider}`],
    parity && ["largest error", `${parity.max_abs_error?.toExponential(1) ?? "not finite"} in ${spec.output}`],
    ["runtime", `ONNX Runtime Web ${version}, WebAssembly on one thread`],
    ["download", `${megabytes.toFixed(1)} MB, kept by the browser`],
    exporter?.opset && ["ONNX opset", exporter.opset],
  ].filter(Boolean);
}

function showModel(loaded) {
  loading = false;
  spec = loaded.spec;
  document.title = `${spec.model}: image classifier`;
  setText($("summary"), `${spec.model}: one of ${spec.class_names.length} classes, in this browser.`);
  if (spec.activation === "sigmoid" && spec.outputs !== 1) {
    setText($("summary"), `${spec.model}: any of ${spec.class_names.length} labels, in this browser.`);
  }
  $("top-k").replaceChildren(...TOP.filter((count, index) => index === 0 || TOP[index - 1] < spec.class_names.length)
    .map((count) => element("option", { value: count, textContent: Math.min(count, spec.class_names.length) })));
  $("top").hidden = false;
  $("top-k").value = spec.class_names.length > 3 ? "5" : "3";
  $("facts").replaceChildren(...facts(loaded).flatMap(([name, value]) =>
    [element("dt", { textContent: name }), element("dd", { textContent: value })]));
  $("drawings").hidden = spec.training?.data.kind !== "builtin";
  $("assumed").hidden = !spec.assumed?.length;
  setText($("assumed-parts"), `Assumed: ${spec.assumed?.join(", ").replaceAll("_", " ")}.`);
  $("verdict").hidden = !spec.parity;
  $("verdict").className = `badge ${spec.parity?.passed ? "good" : "bad"}`;
  setText($("verdict"), spec.parity?.passed ? "parity proved" : "parity failed");
  setText($("idle"), "The most likely classes with their scores, and how long it took.");
  setState("ready", "good");
  if (!shown) $("answer").setAttribute("aria-busy", "false");
  keepOffline();
}

// Browsers allow service workers only on https and localhost. Without one, the page needs its host. `ready` waits until
// all files are kept, so for ever if one of them does not match its checksum.
async function keepOffline() {
  try {
    await navigator.serviceWorker?.register("offline.js");
    if (!(await navigator.serviceWorker?.ready)) return;
  } catch {
    return; // refused by the browser, as in some private windows
  }
  $("facts").append(element("dt", { textContent: "offline" }), element("dd", { textContent: "opens without its host" }));
}

function setState(text, kind = "") {
  setText($("state"), text);
  $("state").className = `badge ${kind}`;
}

function fail(reason) {
  loading = false;
  setState("failed", "bad");
  $("answer").setAttribute("aria-busy", "false");
  showError(`The model cannot be loaded (${reason}). Serve the whole directory, for example with \`python -m http.server\`, and use a browser of 2023 or newer.`);
}

$("top-k").addEventListener("change", () => { if (answer) showAnswer(); });

// A worker of a blob has the Content-Security-Policy of this page. One of a file would have that of the host.
const source = `import ${JSON.stringify(new URL("classifier.js", location.href).href)}`;
const classifier = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })), { type: "module" });
classifier.addEventListener("error", (event) => fail(event.message || "its script did not start"));
classifier.addEventListener("message", ({ data }) => {
  if (data.ready) showModel(data);
  else if (data.failed) fail(data.failed);
  else if (data.loading && loading) setState(`loading, ${data.loading.toFixed(1)} MB`);
  else if (data.id) received(data);
});
