// The studio: which view is shown, and what the views have in common.

import { ask, getKey, setKey } from "./api.js";
import { CardList } from "./card.js";
import { fillFrom, openForm } from "./compose.js";
import { byId, setText } from "./dom.js";
import { openFilms, showFilm } from "./films.js";
import { forgetTile, openGallery, showGallery } from "./gallery.js";
import { follow, isOpen, onChange } from "./live.js";
import { addShot, openStoryboard, showStoryboard } from "./storyboard.js";
import { legend } from "./strip.js";
import { openVideos, showVideo } from "./video.js";

const ENDED = 6; // of those that have ended, beside the queue
const VIEWS = ["make", "gallery", "video", "storyboard", "film"];

function route() {
  const [, name, id] = location.hash.split("/");
  if (name === "videos" && id) return ["video", id];
  if (name === "film" && id) return ["film", id];
  return name === "gallery" || name === "storyboard" ? [name, null] : ["make", null];
}

function show(focus) {
  const [name, id] = route();
  for (const view of VIEWS) byId(`view-${view}`).hidden = view !== name;
  for (const link of document.querySelectorAll("nav a")) {
    const own = link.hash === (name === "make" ? "#/" : `#/${name}`);
    if (own) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  showVideo(name === "video" ? id : null);
  showFilm(name === "film" ? id : null);
  if (name === "gallery") showGallery();
  if (name === "storyboard") showStoryboard();
  const heading = byId(`view-${name}`).querySelector("h1");
  document.title = `${heading?.textContent || "Video"} · Lockstep Studio`;
  if (focus) {
    scrollTo(0, 0);
    heading?.focus({ preventScroll: true });
  }
}

function openQueue() {
  byId("queue-heading").append(legend());
  const open = new CardList(byId("open"), "The queue is empty.");
  const ended = new CardList(byId("ended"), "Nothing yet.");
  const order = (one, other) => rank(one) - rank(other) || one.created_at - other.created_at;
  onChange((recent) => {
    open.show(recent.filter(isOpen).sort(order));
    ended.show(recent.filter((video) => !isOpen(video)).slice(0, ENDED));
  });
}

const rank = (video) => (video.status === "in_progress" ? -1 : (video.run.position ?? 0));

function askForKey(message) {
  const dialog = byId("key-dialog");
  setText(byId("key-problem"), message ?? "");
  if (!dialog.open) dialog.showModal();
}

function openKeys() {
  const dialog = byId("key-dialog");
  dialog.addEventListener("cancel", (event) => event.preventDefault());
  dialog.addEventListener("close", () => {
    setKey(byId("key").value.trim());
    location.reload();
  });
  byId("change-key").addEventListener("click", () => askForKey());
}

let locked = false;
document.addEventListener("locked", ({ detail }) => {
  locked = true;
  askForKey(getKey() ? detail : "");
});

async function offered() {
  for (;;) {
    try {
      return (await ask("GET", "models")).data;
    } catch (error) {
      if (locked) return null;
      setText(
        byId("connection"),
        error.status ? error.message : "No connection to the server. Trying again…",
      );
      await new Promise((resolve) => setTimeout(resolve, 2000));
    }
  }
}

async function start() {
  openKeys();
  const models = await offered();
  if (models === null) return; // the page is loaded again with a key
  byId("change-key").hidden = !getKey();
  openQueue();
  openGallery();
  openFilms();
  openStoryboard(models);
  openForm(models, addShot);
  openVideos({
    addShot,
    forgetTile,
    extensible: (video) => models.find((one) => one.id === video.model)?.extensible !== false,
    makeAgain(video) {
      fillFrom(video);
      location.hash = "#/";
    },
  });
  addEventListener("hashchange", () => location.hash.startsWith("#/") && show(true));
  show(false);
  follow((problem) => setText(byId("connection"), problem));
}

start();
