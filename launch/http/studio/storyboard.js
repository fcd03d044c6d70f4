// A storyboard: shots in order, which become one film. It is kept in this browser until the film is made.

import { Making, fileUrl } from "./api.js";
import { presetChoices } from "./compose.js";
import { arrangeChildren, byId, carryOut, h, say, setText, showWhenNear } from "./dom.js";
import { showFilms } from "./films.js";
import { onChange, videos } from "./live.js";
import { Sorter } from "./sorter.js";

const KEPT = "lockstep-storyboard";
const DRAGGED = "application/x-lockstep-video";

let board = { title: "", model: "", spectrum: "", shots: [] };
let models;
let tray = "";
const making = new Making();

export function openStoryboard(offered) {
  models = offered;
  board = { ...board, ...kept() };
  byId("film-model").replaceChildren(...models.map((one) => h("option", { value: one.id }, one.id)));
  if (!models.some((one) => one.id === board.model)) board.model = models[0].id;
  byId("film-model").value = board.model;
  byId("film-title").value = board.title;
  byId("film-title").addEventListener("input", () => keep({ title: byId("film-title").value }));
  byId("film-model").addEventListener("change", () => {
    keep({ model: byId("film-model").value });
    showPresets();
  });
  byId("film-spectrum").addEventListener("change", () => keep({ spectrum: byId("film-spectrum").value }));
  byId("add-shot").addEventListener("click", () => addShot({ prompt: "" }, true));
  byId("clear-board").addEventListener("click", clear);
  byId("film").addEventListener("submit", (event) => {
    event.preventDefault();
    carryOut(byId("make-film"), byId("film-problem"), make);
  });
  openDrop();
  showPresets();
  drawShots();
  onChange(() => byId("view-storyboard").hidden || drawTray());
}

export function showStoryboard() {
  drawTray();
  showFilms();
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

function keep(changes) {
  board = { ...board, ...changes };
  try {
    localStorage.setItem(KEPT, JSON.stringify(board));
  } catch {
    // the storage is full or closed: the storyboard lives as long as the page
  }
}

const model = () => models.find((one) => one.id === board.model);

function showPresets() {
  const choices = presetChoices(model());
  byId("film-spectrum").replaceChildren(...choices);
  if (choices.some((choice) => choice.value === board.spectrum))
    byId("film-spectrum").value = board.spectrum;
  keep({ spectrum: byId("film-spectrum").value });
}

/** Add a shot: the fields of a form, or a video, which then is the shot. */
export function addShot(source, focus = false, at = board.shots.length) {
  const { prompt, seconds = "", seed = null } = source;
  const own = source.object === "video" ? { video: source.id } : { seconds, seed };
  const shot = { key: crypto.getRandomValues(new Uint32Array(1))[0].toString(36), prompt, fade: 0, ...own };
  keep({ shots: board.shots.toSpliced(at, 0, shot) });
  drawShots();
  if (focus) byId(`${shot.key}-prompt`).focus();
}

function drawShots() {
  arrangeChildren(byId("shots"), board.shots, "key", shotElement);
  byId("no-shots").hidden = board.shots.length > 0;
  for (const button of [byId("make-film"), byId("clear-board")]) button.disabled = !board.shots.length;
  board.shots.forEach((shot, number) => {
    const element = byId("shots").children[number];
    setText(element.querySelector(".number"), String(number + 1));
    element
      .querySelector(".handle")
      .setAttribute("aria-label", `Move shot ${number + 1}: arrow keys, or drag`);
    element.querySelector(".fade").hidden = number === 0;
    element.querySelector(".up").disabled = number === 0;
    element.querySelector(".down").disabled = number === board.shots.length - 1;
  });
}

function shotElement(shot) {
  const change = (changes) =>
    keep({ shots: board.shots.map((one) => (one.key === shot.key ? { ...one, ...changes } : one)) });
  const input = (name, label, attributes) =>
    h(
      "div",
      { class: `field ${name}` },
      h("label", { for: `${shot.key}-${name}` }, label),
      h("input", {
        id: `${shot.key}-${name}`,
        type: "number",
        value: shot[name] ?? "",
        oninput: (event) => change({ [name]: event.target.value }),
        ...attributes,
      }),
    );
  const usual = Number(model().defaults.seconds).toFixed(1);
  const fields = shot.video
    ? []
    : [
        input("seconds", "Seconds", { min: "0.1", step: "any", placeholder: usual }),
        input("seed", "Seed", { min: "0", step: "1", placeholder: "random" }),
      ];
  const fade = input("fade", "Crossfade, frames", { min: "0", max: "999", step: "1" });
  const button = (name, label, action) =>
    h("button", { type: "button", class: `quiet ${name}`, onclick: action }, label);
  return h(
    "li",
    { class: "shot", "data-key": shot.key },
    h(
      "button",
      { type: "button", class: "handle" },
      h("span", { class: "number", "aria-hidden": "true" }),
      h("span", { class: "grip", "aria-hidden": "true" }),
    ),
    h(
      "div",
      {},
      shot.video ? thereAlready(shot) : promptField(shot, change),
      h("div", { class: "row" }, fields, fade),
      h("p", { class: "problem" }),
      h(
        "div",
        { class: "foot" },
        button("up", "Up", () => move(shot.key, -1)),
        button("down", "Down", () => move(shot.key, 1)),
        button("remove", "Remove", () => remove(shot.key)),
      ),
    ),
  );
}

function promptField(shot, change) {
  const id = `${shot.key}-prompt`;
  const prompt = h("textarea", { id, rows: "2", oninput: (event) => change({ prompt: event.target.value }) });
  prompt.value = shot.prompt;
  return h("div", { class: "field" }, h("label", { for: id }, "Prompt"), prompt);
}

/** A shot that is a video which was made before, or is on its way. */
function thereAlready(shot) {
  const image = h("img", { alt: "" });
  showWhenNear(image, () => fileUrl(`videos/${shot.video}/content?variant=thumbnail`));
  const link = h("a", { class: "prompt", href: `#/videos/${shot.video}` }, shot.prompt);
  return h(
    "div",
    { class: "there" },
    image,
    h("div", {}, link, h("p", { class: "settings" }, "existing video")),
  );
}

function move(key, by) {
  const from = board.shots.findIndex((shot) => shot.key === key);
  arrange(from, from + by);
}

/** Move the shot at one place to another; its handle keeps the focus. */
function arrange(from, to) {
  if (to < 0 || to >= board.shots.length || to === from) return;
  const focused = document.activeElement;
  const [shot] = board.shots.slice(from, from + 1);
  keep({ shots: board.shots.toSpliced(from, 1).toSpliced(to, 0, shot) });
  drawShots();
  const own = byId("shots").children[to];
  if (own.contains(focused)) (focused.disabled ? own.querySelector(".handle") : focused).focus();
  setText(byId("moved"), `Shot moved to position ${to + 1} of ${board.shots.length}.`);
}

function remove(key) {
  const at = board.shots.findIndex((shot) => shot.key === key);
  keep({ shots: board.shots.toSpliced(at, 1) });
  drawShots();
  const next = byId("shots").children[Math.min(at, board.shots.length - 1)];
  (next?.querySelector(".handle") ?? byId("add-shot")).focus();
  setText(byId("moved"), "Shot removed.");
}

/** Shots are moved by their handles, and videos dropped between them. */
function openDrop() {
  new Sorter(byId("shots"), arrange);
  const form = byId("film");
  const ours = (event) => event.dataTransfer.types.includes(DRAGGED);
  form.addEventListener("dragover", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    form.classList.add("dropping");
  });
  form.addEventListener(
    "dragleave",
    (event) => form.contains(event.relatedTarget) || form.classList.remove("dropping"),
  );
  form.addEventListener("drop", (event) => {
    form.classList.remove("dropping");
    const video = ours(event) && videos().find((one) => one.id === event.dataTransfer.getData(DRAGGED));
    if (!video) return;
    event.preventDefault();
    addShot(video, false, placeAt(event.clientY));
    setText(byId("moved"), "Added to the storyboard.");
  });
}

/** The number of shots above a height of the screen. */
function placeAt(y) {
  return [...byId("shots").children].filter((element) => {
    const { top, height } = element.getBoundingClientRect();
    return top + height / 2 < y;
  }).length;
}

function drawTray() {
  const done = videos().filter((video) => video.status === "completed");
  const shown = done.map((video) => video.id).join(" ");
  if (shown === tray) return;
  tray = shown;
  byId("tray").replaceChildren(...done.map(trayButton));
}

function trayButton(video) {
  const image = h("img", { alt: "", draggable: "false" });
  showWhenNear(image, () => fileUrl(`videos/${video.id}/content?variant=thumbnail`));
  const add = () => {
    addShot(video);
    say("Added to the storyboard.");
  };
  const button = h(
    "button",
    { type: "button", draggable: "true", title: video.prompt, onclick: add },
    image,
    h("span", {}, video.prompt),
  );
  button.addEventListener("dragstart", (event) => {
    event.dataTransfer.setData(DRAGGED, video.id);
    event.dataTransfer.effectAllowed = "copy";
  });
  return button;
}

/** The storyboard as the API reads it. New shots are of the size of the videos that are there. */
function content() {
  const there = videos().find((video) => board.shots.some((shot) => shot.video === video.id));
  const format = there ? { size: there.size, fps: there.request.fps } : {};
  const shots = board.shots.map((shot, number) => {
    const told = shot.video ? { video_id: shot.video } : { prompt: shot.prompt };
    if (Number(shot.seconds)) told.seconds = String(shot.seconds);
    if (Number.isInteger(shot.seed) || shot.seed) told.seed = Number(shot.seed);
    if (number && Number(shot.fade)) told.transition = { kind: "crossfade", frames: Number(shot.fade) };
    return told;
  });
  const preset = board.spectrum ? { spectrum: board.spectrum } : {};
  return { title: board.title.trim(), model: board.model, ...preset, ...format, shots };
}

async function make() {
  showProblems(null);
  if (!board.title.trim()) {
    showProblems({ param: "title", message: "A film needs a title." });
    byId("film-title").focus();
    return;
  }
  try {
    const film = await making.ask("films", content());
    say("The film is in the queue.");
    location.hash = `#/film/${film.id}`;
  } catch (error) {
    showProblems(error);
  }
}

/** Show what is wrong beside what is to blame: the title, a shot, or the film. */
function showProblems(error) {
  const [, number] = /^shots\.(\d+)/.exec(error?.param ?? "") ?? [];
  const places = [byId("title-problem"), byId("film-problem"), ...byId("shots").querySelectorAll(".problem")];
  for (const place of places) setText(place, "");
  if (!error) return;
  const own = error.param === "title" ? places[0] : (places[2 + Number(number)] ?? places[1]);
  setText(own, error.message);
  own.scrollIntoView({ block: "nearest" });
}

/** Empty the storyboard for the next film. */
function clear() {
  keep({ title: "", shots: [] });
  byId("film-title").value = "";
  drawShots();
  showProblems(null);
  setText(byId("moved"), "The storyboard is empty.");
}
