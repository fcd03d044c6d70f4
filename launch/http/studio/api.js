// The API of this server. Every request goes through here, with the key that the user gave.

const KEY = "lockstep-key";
const ROOT = new URL("../v1/", document.baseURI);
const blobs = new Map(); // path → object URL, for what only a key may see

export class ApiError extends Error {
  constructor(status, told) {
    super(told?.message ?? `The server answered ${status}.`);
    this.status = status;
    this.code = told?.code ?? null;
    this.param = told?.param ?? null;
  }
}

export const getKey = () => sessionStorage.getItem(KEY);
export const setKey = (key) => sessionStorage.setItem(KEY, key);

function authorized(headers = {}) {
  const key = getKey();
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

async function send(method, path, { json, form, headers, signal } = {}) {
  const body = json === undefined ? form : JSON.stringify(json);
  const given = json === undefined ? headers : { ...headers, "Content-Type": "application/json" };
  const answer = await fetch(new URL(path, ROOT), {
    method,
    body,
    signal,
    headers: authorized(given),
    cache: "no-store",
  });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  if (answer.status === 401)
    document.dispatchEvent(new CustomEvent("locked", { detail: told?.error?.message }));
  throw new ApiError(answer.status, told?.error);
}

/** Send a request and return the JSON of the response. */
export async function ask(method, path, options) {
  return (await send(method, path, options)).json();
}

/** A request that makes something: tried again after a failure, it is carried out once, as it has the same Idempotency-Key. */
export class Making {
  #sent = null;
  #key = null;

  async ask(path, json) {
    const text = JSON.stringify(json);
    if (text !== this.#sent) this.#key = crypto.randomUUID?.() ?? String(Math.random()).slice(2);
    this.#sent = text;
    const made = await ask("POST", path, { json, headers: { "Idempotency-Key": this.#key } });
    this.#sent = null; // the same again is meant to be another one
    return made;
  }
}

/** Get the content of a route as a blob. */
export async function fetchBlob(path) {
  return (await send("GET", path)).blob();
}

/** A URL for an image or a video. The browser fetches it itself, unless the server needs a key. */
export async function fileUrl(path) {
  if (!getKey()) return new URL(path, ROOT).href;
  if (!blobs.has(path)) {
    const made = fetchBlob(path).then((blob) => URL.createObjectURL(blob));
    blobs.set(path, made);
    made.catch(() => blobs.delete(path));
  }
  return blobs.get(path);
}

/** Release the object URLs of all paths with this beginning. */
export function forget(beginning) {
  for (const [path, url] of blobs) {
    if (!path.startsWith(beginning)) continue;
    blobs.delete(path);
    url.then(URL.revokeObjectURL, () => {});
  }
}

/** Save a file as a download. */
export async function download(path, name) {
  const link = document.createElement("a");
  link.href = await fileUrl(path);
  link.download = name;
  link.click();
}

/** Server-sent events of a route, after the one with the id `after`; EventSource could send no key. */
export async function* events(path, after = null) {
  const headers = { Accept: "text/event-stream", ...(after === null ? {} : { "Last-Event-ID": after }) };
  const answer = await send("GET", path, { headers });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      held += value;
      const parts = held.split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const event = parsed(part);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel();
  }
}

function parsed(text) {
  const event = { id: null, type: "message", data: "" };
  for (const line of text.split("\n")) {
    const at = line.indexOf(":");
    if (at === 0) continue; // a comment keeps the line open
    const name = at < 0 ? line : line.slice(0, at);
    const value = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "");
    if (name === "id") event.id = value;
    else if (name === "event") event.type = value;
    else if (name === "data") event.data += (event.data && "\n") + value;
  }
  return event.data ? { ...event, data: JSON.parse(event.data) } : null;
}
