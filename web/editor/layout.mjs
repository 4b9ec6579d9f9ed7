/**
 * Where the tiles of the grid lie: pure arithmetic, in pixels.
 *
 * - `laidOut(width, edge, text)`: as many columns as fit, the rest of the width shared between them
 * - `visible`, `placeOf`, `within`: from the scrolled window, an index or a rectangle to the other
 */

export const SMALLEST = 72; // the edge of a tile's picture
export const LARGEST = 420;
const GAP = 8; // between tiles, and around them
const INNER = 12; // a tile's padding and border, both sides
const NAME = 22; // the line of the name
const CAPTION = 3 * 16; // the lines of the caption
const AHEAD = 1; // windows above and below that are kept ready, in parts of the window's height

/** {columns, edge, width, height, across, down}: of tiles whose pictures have at least `edge`, with captions or not. */
export function laidOut(available, edge, captions) {
  const room = Math.max(available - GAP, edge + INNER + GAP);
  const columns = Math.max(1, Math.floor(room / (edge + INNER + GAP)));
  const across = Math.floor(room / columns);
  const width = across - GAP;
  const height = width + NAME + (captions ? CAPTION : 0);
  return { columns, edge: width - INNER, width, height, across, down: height + GAP };
}

export const fullHeight = ({ columns, down }, total) => Math.ceil(total / columns) * down + GAP;

/** The left top corner of a tile. */
export function placeOf({ columns, across, down }, index) {
  return { left: GAP + (index % columns) * across, top: GAP + Math.floor(index / columns) * down };
}

/** [first, behind the last] of the tiles to be kept in the page. */
export function visible(layout, top, height, total) {
  const ahead = height * AHEAD * 0.5;
  const first = Math.max(0, Math.floor((top - ahead) / layout.down)) * layout.columns;
  const last = Math.ceil((top + height + ahead) / layout.down) * layout.columns;
  return [Math.min(first, total), Math.min(last, total)];
}

/** How many rows of tiles fit into a window. */
export const rowsIn = ({ down }, height) => Math.max(1, Math.floor(height / down));

/** The indices of tiles that a rectangle touches. */
export function within(layout, { left, top, right, bottom }, total) {
  const { columns, across, down, width, height } = layout;
  const found = [];
  const firstRow = Math.max(0, Math.floor((top - GAP) / down));
  for (let row = firstRow; row * columns < total && GAP + row * down < bottom; row++) {
    if (GAP + row * down + height < top) continue;
    for (let column = 0; column < columns; column++) {
      const [start, index] = [GAP + column * across, row * columns + column];
      if (index < total && start < right && start + width > left) found.push(index);
    }
  }
  return found;
}
