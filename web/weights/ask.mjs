/**
 * What the server is asked about strengths: it alone reads their texts.
 *
 * - an answer that is no success becomes an Error with the server's words
 * - the token is asked for once, and once more when the server was started anew
 */

import { api } from "../../../scripts/api.js";

let token = null;

/** {blocks, steps}: what texts of strengths say, and where. */
export const readTexts = (texts) => post("/lora_loom/blocks", texts);

/** {presets: [{name, fits}]} of block weights. */
export const readPresets = ({ lora, layout }) => post("/lora_loom/blocks/presets", { lora, layout });

async function post(path, body) {
  const before = token;
  const answer = await once(path, body);
  if (answer.status !== 403 || !before) return content(answer);
  token = null; // of an earlier start of the server
  return content(await once(path, body));
}

async function once(path, body) {
  token ??= (await content(await api.fetchApi("/lora_loom/session", { cache: "no-store" }))).token;
  const headers = { "Content-Type": "application/json", "X-LoRA-Loom-Token": token };
  return api.fetchApi(path, { method: "POST", headers, body: JSON.stringify(body) });
}

async function content(answer) {
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error ?? `the server answered ${answer.status}`);
  return found;
}
