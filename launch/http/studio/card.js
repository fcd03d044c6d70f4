// A video in the queue: what is asked for, its steps as they are made, and what can be done with it.

import { ask, fileUrl } from "./api.js";
import { actionButton, h, say, setText } from "./dom.js";
import { put } from "./live.js";
import { showPreview } from "./preview.js";
import { stepsOf } from "./runs.js";
import { Strip } from "./strip.js";
import { settings, standing, stateOf } from "./words.js";

export class Card {
  constructor(video) {
    this.id = video.id;
    this.strip = new Strip();
    this.picture = h("img", { alt: "", class: "empty" });
    this.standing = h("p", { class: "standing" });
    this.problem = h("p", { class: "problem", role: "alert" });
    this.cancel = actionButton("Cancel", this.problem, () => this.#ask("cancel", "Cancelled."), "quiet");
    this.resume = actionButton("Resume", this.problem, () => this.#ask("resume", "Waiting again."), "quiet");
    const link = h("a", { href: `#/videos/${video.id}`, class: "prompt" }, video.prompt);
    this.element = h(
      "article",
      { class: "card" },
      h("div", { class: "picture" }, this.picture),
      h(
        "div",
        { class: "about" },
        link,
        h("p", { class: "settings" }, settings(video)),
        this.strip.element,
        h("div", { class: "foot" }, this.standing, this.cancel, this.resume),
        this.problem,
      ),
    );
    this.update(video);
  }

  update(video) {
    const state = stateOf(video);
    this.element.dataset.state = state;
    setText(this.standing, standing(video));
    this.cancel.hidden = !(state === "waiting" || state === "running") || video.run.cancelling;
    this.resume.hidden = !(state === "failed" || state === "cancelled");
    setText(this.problem, state === "failed" ? video.error.message : "");
    this.strip.show(stepsOf(video, () => this.update(video)));
    if (state === "running") showPreview(this.picture, video);
    if (state === "done" && this.shown !== "thumbnail") {
      this.shown = "thumbnail";
      fileUrl(`videos/${this.id}/content?variant=thumbnail`).then(
        (url) => {
          this.picture.src = url;
          this.picture.classList.remove("empty");
        },
        () => {},
      );
    }
  }

  async #ask(what, said) {
    put(await ask("POST", `videos/${this.id}/${what}`));
    say(said);
  }
}

/** Keep the cards of a list those of `videos`, in order; what has the focus keeps it. */
export class CardList {
  constructor(element, empty) {
    this.element = element;
    this.cards = new Map();
    this.empty = h("p", { class: "empty" }, empty);
  }

  show(videos) {
    const wanted = new Set(videos.map((video) => video.id));
    for (const [id, card] of this.cards) {
      if (wanted.has(id)) continue;
      card.element.remove();
      this.cards.delete(id);
    }
    let before = null;
    for (const video of videos) {
      let card = this.cards.get(video.id);
      if (card) card.update(video);
      else this.cards.set(video.id, (card = new Card(video)));
      const place = before ? before.nextSibling : this.element.firstChild;
      if (card.element !== place) this.element.insertBefore(card.element, place);
      before = card.element;
    }
    if (videos.length) this.empty.remove();
    else this.element.replaceChildren(this.empty);
  }
}
