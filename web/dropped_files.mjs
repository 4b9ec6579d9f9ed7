/**
 * What is dropped on a node, and where its files go.
 *
 * - single files and whole folders, read to the bottom
 * - pictures, their captions and what describes a dataset; everything else is left out and named
 * - a new folder: the dropped folder's name or the day's, made safe for every system, never one that is listed
 */

export const IMAGES = [".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"];
export const TEXTS = [".txt", ".caption"];
export const ABOUT = [".json", ".jsonl", ".toml"];

const FORBIDDEN = /[\\/:*?"<>|\p{Cc}]/gu; // in names on some system
const RESERVED = /^(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)/i; // Windows' devices
const LONGEST_FOLDER = 80;

const ending = (name) => name.slice(name.lastIndexOf(".")).toLowerCase();
const isHidden = (name) => name.startsWith(".");
const isWanted = (name) => !isHidden(name) && [...IMAGES, ...TEXTS, ...ABOUT].includes(ending(name));

export const isImage = (name) => !isHidden(name) && IMAGES.includes(ending(name));

/** What a drop carries. The browser forgets it when the event is over, so this is called inside it. */
export function itemsOf(transfer) {
  return [...transfer.items]
    .filter((item) => item.kind === "file")
    .map((item) => ({ entry: item.webkitGetAsEntry(), file: item.getAsFile() }));
}

/** Whether a drop is a dataset's, and no workflow that the page has to open. */
export function isDataset(items) {
  return items.some(({ entry, file }) => entry?.isDirectory || isImage(file.name) || TEXTS.includes(ending(file.name)));
}

/** The files of a drop: {file, folders}, with the names of the folders they lie in. */
export async function filesOf(items) {
  const found = await Promise.all(items.map(({ entry, file }) => (entry ? walk(entry, []) : [{ file, folders: [] }])));
  return found.flat();
}

async function walk(entry, folders) {
  if (entry.isFile) {
    return [{ file: await new Promise((resolve, reject) => entry.file(resolve, reject)), folders }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // a hundred at a time
    if (!some.length) return found;
    for (const inside of some) found.push(...(await walk(inside, [...folders, entry.name])));
  }
}

/**
 * Where dropped files go: {folder, uploads: [{file, subfolder, name}], left: [path]}.
 * `listed` are the folders that exist. An Error says what is wrong with the drop, and the cure.
 */
export function plan(files, listed, now = new Date()) {
  const isKept = ({ file, folders }) => isWanted(file.name) && !folders.some(isHidden);
  const kept = files.filter(isKept);
  const left = files.filter((item) => !isKept(item)).map(({ file, folders }) => [...folders, file.name].join("/"));
  if (!kept.some(({ file }) => isImage(file.name))) {
    throw new Error(`no picture among what was dropped: drop ${IMAGES.join(" ")} files together with their captions`);
  }
  const tops = new Set(kept.map(({ folders }) => folders[0]));
  const [top] = tops;
  const isOneFolder = tops.size === 1 && top !== undefined;
  const folder = freeName(isOneFolder ? safeFolder(top) : `dataset-${day(now)}`, listed);
  const uploads = kept.map(({ file, folders }) => ({
    file,
    subfolder: [folder, ...folders.slice(isOneFolder ? 1 : 0).map(safeFolder)].join("/"),
    name: safe(file.name),
  }));
  const places = new Set();
  for (const { file, subfolder, name } of uploads) {
    const place = `${subfolder}/${name}`;
    if (places.has(place)) {
      throw new Error(`two of the dropped files would become ${place}: rename ${file.name} and drop them again`);
    }
    places.add(place);
  }
  // captions first: whatever interrupts the upload, no picture is there without its caption
  uploads.sort((one, other) => isImage(one.name) - isImage(other.name));
  return { folder, uploads, left };
}

function safe(name) {
  return name.replace(FORBIDDEN, "_").replace(RESERVED, "_$1");
}

function safeFolder(name) {
  const plain = safe(name.normalize("NFC")).slice(0, LONGEST_FOLDER);
  return plain.replace(/^[. ]+|[. ]+$/g, "") || "dataset";
}

function freeName(wanted, listed) {
  const used = new Set(listed.map((folder) => folder.split("/")[0].toLowerCase()));
  let name = wanted;
  for (let number = 2; used.has(name.toLowerCase()); number++) name = `${wanted}-${number}`;
  return name;
}

function day(now) {
  const two = (number) => String(number).padStart(2, "0");
  return `${now.getFullYear()}-${two(now.getMonth() + 1)}-${two(now.getDate())}`;
}
