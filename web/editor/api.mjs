/**
 * The pack's routes, asked by the page; those of the editor's pictures by name.
 *
 * - `get(path, query, signal)`, `post(path, body, signal)`: paths below /lora_loom; the answer as values
 * - the token that changes need is fetched once, and again when the server was started anew
 * - whatever goes wrong is a `Refusal` whose message can be shown: {message, status, body}; status 0 without an answer
 * - a server that has too much to do (503) is asked again, a few times
 * - `pictureAddress`, `maskAddress`: where views of a row's picture lie; another address for another file
 */

import { api } from "../../../scripts/api.js";

const PREFIX = "/lora_loom";
const TOKEN = "X-LoRA-Loom-Token";
const PATIENCE = [300, 800, 2000]; // milliseconds before a busy server is asked again

/** The longest side of the views there are, as addresses name them; "full" is at most 2048. */
export const SIZES = ["96", "192", "384", "full"];

/** An answer that is no success, with a message that can be shown. */
export class Refusal extends Error {
  constructor(message, status = 0, body = {}) {
    super(message);
    this.name = "Refusal";
    this.status = status;
    this.body = body;
  }
}

/** The path of an open dataset: `datasetPath(id, "rows")`. */
export const datasetPath = (id, ...parts) => ["/datasets", ...[id, ...parts].map(encodeURIComponent)].join("/");

/** GET: `query` without what is undefined, null or empty. Rejects with a Refusal, or with the signal's AbortError. */
export function get(path, query = {}, signal) {
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== null && value !== "");
  const text = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return answered(path + (text && `?${text}`), { signal });
}

/** POST of an object as JSON. Rejects like `get`. */
export async function post(path, body = {}, signal) {
  const send = async () => {
    const headers = { "Content-Type": "application/json", [TOKEN]: await token() };
    return answered(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  };
  const used = await token();
  try {
    return await send();
  } catch (error) {
    if (error.status !== 403) throw error;
    if ((await fetchedToken) === used) fetchedToken = null; // the server was started anew
    return send();
  }
}

/** Where a view of the picture of `row` lies; `size` is one of SIZES. */
export function pictureAddress(dataset, row, size) {
  return view(datasetPath(dataset, "images", row.id, size), row);
}

/** Where a view of its mask lies; only where `row.mask`. */
export function maskAddress(dataset, row, size) {
  return view(datasetPath(dataset, "masks", row.id, size), row);
}

const view = (path, row) => api.apiURL(`${PREFIX}${path}?v=${encodeURIComponent(row.version)}`);

let fetchedToken = null; // a promise, so that it is fetched once

function token() {
  fetchedToken ??= get("/session").then(
    (session) => session.token,
    (error) => {
      fetchedToken = null;
      throw error;
    },
  );
  return fetchedToken;
}

async function answered(path, options) {
  for (const wait of [...PATIENCE, null]) {
    const answer = await reached(path, options);
    if (answer.status === 503 && wait !== null) {
      await new Promise((resolve) => setTimeout(resolve, wait));
      options.signal?.throwIfAborted();
      continue;
    }
    const body = await answer.json().catch((error) => {
      if (error.name === "AbortError") throw error;
      return {}; // a proxy's page, say
    });
    if (answer.ok) return body;
    throw new Refusal(body.error ?? `the server answered ${answer.status} ${answer.statusText}`, answer.status, body);
  }
}

async function reached(path, options) {
  try {
    return await api.fetchApi(PREFIX + path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("the server does not answer: is ComfyUI still running?");
  }
}
