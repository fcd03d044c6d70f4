// The finished videos, as thumbnails or contact sheets.

import { ask, fileUrl } from "./api.js";
import { byId, h, setText, showWhenNear } from "./dom.js";
import { onChange } from "./live.js";
import { settings } from "./words.js";

const PAGE = 48;
const known = new Map(); // id → video, newest first
let last = null; // of the pages that were read
let more = true;

export function openGallery() {
  byId("search").addEventListener("input", draw);
  byId("sheets").addEventListener("change", draw);
  byId("more-tiles").addEventListener("click", readMore);
  onChange((recent) => {
    const order = [...recent, ...known.values()];
    known.clear();
    for (const video of order)
      if (video.status === "completed" && !known.has(video.id)) known.set(video.id, video);
    if (!byId("view-gallery").hidden) draw();
  });
}

/** The gallery comes into view. */
export async function showGallery() {
  draw();
  if (last === null) await readMore();
}

export function forgetTile(id) {
  known.delete(id);
  draw();
}

async function readMore() {
  const page = await ask("GET", `videos?limit=${PAGE}${last ? `&after=${last}` : ""}`);
  for (const video of page.data) if (video.status === "completed") known.set(video.id, video);
  last = page.last_id ?? last;
  more = page.has_more;
  draw();
}

function draw() {
  const wanted = byId("search").value.trim().toLowerCase();
  const variant = byId("sheets").checked ? "spritesheet" : "thumbnail";
  const found = [...known.values()]
    .filter((video) => video.prompt.toLowerCase().includes(wanted))
    .sort((one, other) => other.created_at - one.created_at);
  const tiles = new Map([...byId("tiles").children].map((element) => [element.dataset.key, element]));
  byId("tiles").replaceChildren(
    ...found.map((video) => tiles.get(`${video.id} ${variant}`) ?? tile(video, variant)),
  );
  byId("more-tiles").hidden = !more;
  byId("no-tiles").hidden = found.length > 0;
  setText(byId("no-tiles"), known.size ? "No prompt matches." : "Finished videos appear here.");
}

function tile(video, variant) {
  const image = h("img", { alt: "", class: variant });
  showWhenNear(image, () => fileUrl(`videos/${video.id}/content?variant=${variant}`));
  return h(
    "a",
    { class: "tile", href: `#/videos/${video.id}`, "data-key": `${video.id} ${variant}` },
    image,
    h("span", { class: "prompt" }, video.prompt),
    h("span", { class: "settings" }, settings(video)),
  );
}
