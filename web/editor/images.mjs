/**
 * What panels have in common: images as they speak of them, and what to do when the server does not answer.
 *
 * - `failed`: tell the window, which shows it
 * - `nameOf`: what one is called, fetched where the grid has not yet
 * - `showImages`: select some in the grid; a filter that hides any of them is taken back
 * - `separator`: what divides tags where the cursor is
 */

/** @param {import("./store.mjs").Store} store */
export const failed = (store, error) => store.dispatchEvent(new CustomEvent("failed", { detail: error }));

export async function nameOf(store, id) {
  return (store.rowOf(id) ?? (await store.detail(id))).name;
}

export async function showImages(store, images) {
  const visible = new Set(await store.idsOfFilter().catch(() => [])); // a faulty filter shows nothing
  if (!images.every((id) => visible.has(id))) {
    await store.setOnlyChanged(false);
    await store.setFilter("");
  }
  store.select(images);
  store.setCursor(images[0]);
}

/** Of the image at the cursor, or of the dataset. */
export function separator(store) {
  const concepts = store.state?.concepts ?? [];
  return (concepts[store.rowOf(store.cursor)?.concept ?? 0] ?? concepts[0])?.separator || ",";
}
