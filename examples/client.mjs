// Classify an image with a running `cifarx serve`, in Node 18 or newer:
//
//     cifarx serve lzh_9.onnx
//     node examples/client.mjs dog.png
//
// `classify` also works in a browser, where `image` is the File of an <input type="file">. A page of another origin
// needs `cifarx serve --cors-origin ORIGIN`.

import { readFile } from "node:fs/promises";

/**
 * Return the best classes of an image, or all labels that apply if there can be several, best first.
 *
 * @param {Blob} image the content of an image file
 * @param {string} url the address of the server
 * @param {number} topK the number of classes
 * @returns {Promise<{label: string, index: number, score: number}[]>}
 */
async function classify(image, url, topK) {
  const response = await fetch(new URL(`/v1/predict?top_k=${topK}`, url), {
    method: "POST",
    headers: { "Content-Type": "application/octet-stream" },
    body: image,
  });
  const answer = await response.json();
  if (!response.ok) {
    throw new Error(`${response.status}: ${answer.error}`);
  }
  const [{ top, labels = top }] = answer.predictions;
  return labels;
}

const [path, url = "http://127.0.0.1:8000", topK = "3"] = process.argv.slice(2);
if (!path) {
  console.error("usage: node client.mjs IMAGE [URL] [TOP_K]");
  process.exit(2);
}
try {
  const classes = await classify(new Blob([await readFile(path)]), url, Number(topK));
  for (const { label, score } of classes) {
    console.log(`${label} ${score.toFixed(4)}`);
  }
  if (!classes.length) {
    console.log("no label");
  }
} catch (error) {
  console.error(`error: ${error.cause?.message ?? error.message}`);
  process.exit(1);
}
