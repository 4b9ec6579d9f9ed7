/**
 * What the server is asked about trainings: numbers by GET, wishes by POST. What it refuses rejects with its words.
 */

import { api } from "../../../scripts/api.js";
import { get, post } from "../editor/api.mjs";

const part = encodeURIComponent;

export const trainings = () => get("/trainings");
export const training = (id, since) => get(`/trainings/${part(id)}`, { since });
export const runs = async () => (await get("/runs")).runs;
export const run = (name) => get(`/runs/${part(name)}`);

/** Leave a wish; resolves to {number, do, step, note}. */
export const control = (id, wish) => post(`/trainings/${part(id)}/control`, { do: wish });

/** Where the pictures of a step are; of the training while the server knows it, else of its run folder. */
export function pictures({ id, run: name, lost }, step) {
  const place = id && !lost ? `/trainings/${part(id)}` : `/runs/${part(name)}`;
  return api.apiURL(`/lora_loom${place}/previews/${step}`);
}
