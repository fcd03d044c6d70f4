// Films: those that were asked for, and the page of each with its shots.

import { ask, download, fileUrl, forget } from "./api.js";
import { actionButton, byId, confirmed, h, say, setText, showWhenNear } from "./dom.js";
import { onChange } from "./live.js";
import { moment } from "./words.js";

const LIST = 50;
const SHOTS = { queued: "waiting", in_progress: "being made", completed: "done", failed: "failed" };

const isOpen = (film) => film.status === "queued" || film.status === "in_progress";

let view = null;

/** Films change when one of their videos does. */
export function openFilms() {
  onChange(() => {
    if (!byId("view-storyboard").hidden) showFilms();
    view?.look();
  });
}

let listing = false;

/** The list of films beside the storyboard. */
export async function showFilms() {
  if (listing) return;
  listing = true;
  try {
    const { data } = await ask("GET", `films?limit=${LIST}`);
    byId("films").replaceChildren(
      ...(data.length ? data.map(card) : [h("p", { class: "empty" }, "No films yet.")]),
    );
  } catch {
    // what was there stays; the bar tells that the server does not answer
  } finally {
    listing = false;
  }
}

function card(film) {
  const meter = isOpen(film) && progress(film);
  return h(
    "a",
    { class: "film", href: `#/film/${film.id}` },
    h("strong", {}, film.title),
    h(
      "span",
      { class: "settings" },
      `${film.shots.length} shots · ${Number(film.seconds).toFixed(1)} s · ${standing(film)}`,
    ),
    meter,
  );
}

function progress(film) {
  return h("progress", {
    max: "100",
    value: String(film.progress),
    "aria-label": `Progress of ${film.title}`,
  });
}

function standing(film) {
  const done = film.shots.filter((shot) => shot.status === "completed").length;
  if (film.status === "completed") return `done ${moment(film.completed_at)}`;
  if (film.status === "failed") return film.error.code === "cancelled" ? "cancelled" : "failed";
  return done === film.shots.length ? "being joined" : `${done} of ${film.shots.length} shots made`;
}

/** Show a film; null hides what was shown. */
export async function showFilm(id) {
  view?.leave();
  view = null;
  if (id === null) return;
  const place = byId("view-film");
  place.replaceChildren(h("p", { class: "empty" }, "Loading…"));
  try {
    view = new View(await ask("GET", `films/${id}`));
    place.replaceChildren(view.element);
    place.querySelector("h1").focus({ preventScroll: true });
  } catch (error) {
    place.replaceChildren(
      h("h1", { tabindex: "-1" }, "Film not found"),
      h("p", { class: "hint" }, error.message),
    );
  }
}

class View {
  constructor(film) {
    this.film = film;
    this.standing = h("p", { class: "settings", role: "status" });
    this.stage = h("div", { class: "stage" });
    this.buttons = h("div", { class: "actions" });
    this.problem = h("p", { class: "problem", role: "alert" });
    this.shots = h("ol", { class: "reel" });
    this.sheet = h("div", { class: "sheets" });
    this.element = h(
      "article",
      { class: "video" },
      h("h1", { tabindex: "-1" }, film.title),
      this.standing,
      this.stage,
      this.buttons,
      this.problem,
      h("section", { class: "sheet" }, h("h2", {}, "Shots"), this.shots),
      this.sheet,
    );
    this.update();
  }

  leave() {
    this.media?.pause();
  }

  /** Ask how the film is now. */
  async look() {
    if (this.looking || !isOpen(this.film)) return;
    this.looking = true;
    try {
      this.film = await ask("GET", `films/${this.film.id}`);
      this.update();
    } catch {
      // asked again after the next change
    } finally {
      this.looking = false;
    }
  }

  update() {
    const { film } = this;
    const size = `${film.size.replace("x", "×")} · ${Number(film.seconds).toFixed(1)} s`;
    setText(this.standing, `${film.shots.length} shots · ${size} · ${standing(film)}`);
    const states = [film.status, ...film.shots.map((shot) => shot.status)].join(" ");
    if (this.states !== states) {
      this.states = states;
      this.shots.replaceChildren(...film.shots.map((shot, number) => this.shot(shot, number)));
    }
    if (isOpen(film))
      this.stage.replaceChildren(
        h("div", { class: "waiting" }, h("p", { class: "empty" }, "The film appears here."), progress(film)),
      );
    if (this.shown === film.status) return;
    this.shown = film.status;
    setText(this.problem, film.status === "failed" ? film.error.message : "");
    this.buttons.replaceChildren(...this.possible());
    if (film.status === "completed") this.show();
  }

  show() {
    const { id, title } = this.film;
    this.media = h("video", { controls: true, playsinline: true, preload: "metadata", "aria-label": title });
    fileUrl(`films/${id}/content`).then(
      (url) => (this.media.src = url),
      () => this.media.classList.add("missing"),
    );
    this.stage.replaceChildren(this.media);
    const image = h("img", { alt: "Frames of every shot", class: "spritesheet" });
    fileUrl(`films/${id}/content?variant=spritesheet`).then(
      (url) => (image.src = url),
      () => {},
    );
    this.sheet.replaceChildren(
      h("figure", { class: "sheet" }, h("figcaption", {}, h("h2", {}, "Contact sheet")), image),
    );
  }

  shot(shot, number) {
    const image = h("img", { alt: "" });
    if (shot.status === "completed")
      showWhenNear(image, () => fileUrl(`videos/${shot.video_id}/content?variant=thumbnail`));
    const fade = shot.fade ? ` · crossfade over ${shot.fade} frames` : "";
    const about = `from ${shot.start.toFixed(1)} s · ${shot.seconds.toFixed(1)} s${fade} · ${SHOTS[shot.status]}`;
    const play =
      this.film.status === "completed" &&
      h("button", { type: "button", class: "quiet", onclick: () => this.play(shot) }, "Play");
    return h(
      "li",
      { "data-state": shot.status },
      image,
      h(
        "div",
        {},
        h("a", { class: "prompt", href: `#/videos/${shot.video_id}` }, `${number + 1}. ${shot.title}`),
        h("p", { class: "settings" }, about),
      ),
      play,
    );
  }

  play(shot) {
    this.media.currentTime = shot.start;
    this.media.play().catch(() => {});
    this.stage.scrollIntoView({ block: "center" });
  }

  possible() {
    const { film, problem } = this;
    const doing = (what) => async () => {
      this.film = await ask("POST", `films/${film.id}/${what}`);
      this.states = this.shown = null;
      this.update();
    };
    const remove = actionButton("Delete film", problem, () => this.remove(), "quiet");
    if (isOpen(film)) return [actionButton("Cancel", problem, doing("cancel")), remove];
    if (film.status === "failed")
      return [actionButton("Resume", problem, doing("resume"), "primary"), remove];
    const name = `${film.title}.mp4`;
    return [
      actionButton("Download", problem, () => download(`films/${film.id}/content`, name), "primary"),
      remove,
    ];
  }

  async remove() {
    if (!(await confirmed("Delete this film? Its videos are kept."))) return;
    await ask("DELETE", `films/${this.film.id}`);
    forget(`films/${this.film.id}/`);
    say("Deleted.");
    location.hash = "#/storyboard";
  }
}
