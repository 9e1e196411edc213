// A service worker that keeps the files of the page, so that it opens without its host.
//
// The host is asked at each visit which files it has, by their checksums. If they are those that were kept, or the host
// does not answer, the page consists of the kept files. Otherwise it comes from the host, and its files are kept when
// all of them match the checksums. So no visit mixes the files of two versions.

const SUMS = "SHA256SUMS";
const PAGE = "index.html";
const PREFIX = `${registration.scope} `; // pages of one host share its caches
const PATIENCE = 5000; // milliseconds to wait for the host

let visit = null; // promise of the cache for the newest visit, or of null for the host

const fetchNew = (name, options = {}) => fetch(new URL(name, registration.scope), { cache: "no-cache", ...options });

async function readSums() {
  const response = await fetchNew(SUMS, { signal: AbortSignal.timeout(PATIENCE) });
  if (!response.ok) throw new Error(`${SUMS}: ${response.status}`);
  return response.text();
}

async function sha256(content) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", content));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const cacheNames = async () => (await caches.keys()).filter((name) => name.startsWith(PREFIX));

async function keep(sums) {
  const name = PREFIX + await sha256(new TextEncoder().encode(sums));
  const cache = await caches.open(name);
  for (const line of sums.trimEnd().split("\n")) {
    const [expected, file] = line.split("  ");
    const response = await fetchNew(file), content = await response.arrayBuffer();
    if (!response.ok || await sha256(content) !== expected) {
      await caches.delete(name);
      throw new Error(`${file} does not match its checksum`);
    }
    const headers = { "Content-Type": response.headers.get("Content-Type") ?? "application/octet-stream" };
    await cache.put(file, new Response(content, { headers }));
  }
  await cache.put(SUMS, new Response(sums)); // the last one: a cache with it is complete
  for (const old of await cacheNames()) if (old !== name) await caches.delete(old);
}

async function findKept() {
  for (const name of await cacheNames()) {
    const cache = await caches.open(name), sums = await cache.match(SUMS);
    if (sums) return { cache, sums: await sums.text() };
  }
  return null;
}

async function choose(event) {
  const kept = await findKept();
  let sums;
  try {
    sums = await readSums();
  } catch {
    return kept?.cache ?? null;
  }
  if (kept?.sums === sums) return kept.cache;
  event.waitUntil(keep(sums).catch(() => {})); // the next visit tries again
  return null;
}

async function respond(event, name) {
  visit ??= choose(event); // the browser ends idle service workers
  const cache = await visit;
  return (await cache?.match(name)) ?? fetch(event.request);
}

addEventListener("install", (event) => event.waitUntil(readSums().then(keep).then(() => skipWaiting())));
addEventListener("activate", (event) => event.waitUntil(clients.claim()));
addEventListener("fetch", (event) => {
  const { method, mode, url } = event.request;
  const [address] = url.split(/[?#]/);
  if (method !== "GET" || !address.startsWith(registration.scope)) return;
  const name = address.slice(registration.scope.length) || PAGE;
  if (name === SUMS) return;
  if (mode === "navigate" && name === PAGE) visit = choose(event);
  event.respondWith(respond(event, name));
});
