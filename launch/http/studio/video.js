// One video: a player, its steps, what was measured, and a comparison with the full sampler.

import { ask, download, fileUrl, forget } from "./api.js";
import { Card } from "./card.js";
import { CALM, actionButton, agreed, byId, confirmed, h, say, setText } from "./dom.js";
import { drop, isOpen, onChange, put, videos } from "./live.js";
import { showPreview } from "./preview.js";
import { reportOf, stepsOf } from "./runs.js";
import { Strip, legend } from "./strip.js";
import { duration, moment, settings, standing, stateOf, steps } from "./words.js";

let view = null; // what is shown
let actions; // of other views: makeAgain, addShot, forgetTile; and whether a video is extensible

export function openVideos(given) {
  actions = given;
  onChange((recent) => {
    for (const video of recent) view?.hear(video);
  });
}

/** Show a video; null hides what was shown. */
export async function showVideo(id) {
  view?.leave();
  view = null;
  if (id === null) return;
  const place = byId("view-video");
  place.replaceChildren(h("p", { class: "empty" }, "Loading…"));
  try {
    const video = videos().find((one) => one.id === id) ?? (await ask("GET", `videos/${id}`));
    view = new View(video);
    place.replaceChildren(view.element);
    place.querySelector("h1").focus({ preventScroll: true });
  } catch (error) {
    place.replaceChildren(
      h("h1", { tabindex: "-1" }, "Video not found"),
      h("p", { class: "hint" }, error.message),
    );
  }
}

class View {
  constructor(video) {
    this.video = video;
    this.strip = new Strip(true);
    this.stage = h("div", { class: "stage" });
    this.standing = h("p", { class: "standing" });
    this.preview = h("img", { class: "empty preview", alt: "Preview of the video" });
    this.problem = h("p", { class: "problem", role: "alert" });
    this.facts = h("dl", { class: "facts" });
    this.buttons = h("div", { class: "actions" });
    this.beside = h("div", { class: "beside" });
    this.sheets = h("div", { class: "sheets" });
    this.element = h(
      "article",
      { class: "video" },
      h("h1", { tabindex: "-1" }, video.prompt),
      h("p", { class: "settings" }, settings(video)),
      this.stage,
      this.buttons,
      this.problem,
      h(
        "section",
        { class: "sheet" },
        h("div", { class: "heading" }, h("h2", {}, "Steps"), legend()),
        this.strip.element,
        this.standing,
      ),
      this.beside,
      h("section", { class: "sheet" }, h("h2", {}, "Details"), this.facts),
      this.sheets,
    );
    this.update();
  }

  hear(video) {
    if (video.id === this.reference?.id) this.showReference(video);
    if (video.id !== this.video.id) return;
    this.video = video;
    this.update();
  }

  leave() {
    for (const media of this.element.querySelectorAll("video")) media.pause();
  }

  update() {
    const { video } = this;
    const state = stateOf(video);
    setText(this.standing, standing(video));
    this.strip.show(stepsOf(video, () => this.update()));
    this.facts.replaceChildren(
      ...facts(video).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
    );
    if (state === "running") showPreview(this.preview, video);
    const shown = `${state} ${video.run.cancelling}`;
    if (this.shown === shown) return;
    this.shown = shown;
    this.buttons.replaceChildren(...this.possible(state));
    if (state === "failed") setText(this.problem, video.error.message);
    this.stage.replaceChildren(
      state === "done" ? player(video) : state === "running" ? this.preview : waiting(),
    );
    this.sheets.replaceChildren(...(state === "done" ? pictures(video) : []));
  }

  possible(state) {
    const { video, problem } = this;
    const doing = (what) => async () => put(await ask("POST", `videos/${video.id}/${what}`));
    const again = actionButton("Edit and make again", problem, async () => actions.makeAgain(this.video));
    const shot = actionButton("Add to storyboard", problem, async () => {
      actions.addShot(video);
      say("Added to the storyboard.");
    });
    const remove = actionButton("Delete", problem, () => this.remove(), "quiet");
    const buttons = [again, shot, remove];
    if (isOpen(video))
      return video.run.cancelling ? buttons : [actionButton("Cancel", problem, doing("cancel")), ...buttons];
    if (state !== "done") return [actionButton("Resume", problem, doing("resume"), "primary"), ...buttons];
    const name = `${video.id}.mp4`;
    const save = actionButton(
      "Download",
      problem,
      () => download(`videos/${video.id}/content`, name),
      "primary",
    );
    const compare = actionButton("Compare with the full sampler", problem, async () => {
      const reference = await ask("POST", `videos/${video.id}/full`);
      put(reference);
      this.showReference(reference);
    });
    const extend = actionButton("Extend", problem, () => this.extend());
    const possible = [
      ...(video.request.spectrum === "off" ? [] : [compare]),
      ...(actions.extensible(video) ? [extend] : []),
    ];
    return [save, ...possible, ...buttons];
  }

  async extend() {
    const { video } = this;
    byId("extend-prompt").value = video.prompt;
    byId("extend-seconds").value = "";
    if (!(await agreed(byId("extend")))) return;
    const given = { prompt: byId("extend-prompt").value };
    if (byId("extend-seconds").value) given.seconds = byId("extend-seconds").value;
    const longer = await ask("POST", `videos/${video.id}/extensions`, { json: given });
    put(longer);
    say("The video waits in the queue.");
    location.hash = `#/videos/${longer.id}`;
  }

  async remove() {
    const said = isOpen(this.video) ? "Cancel this video and delete it?" : "Delete this video and its files?";
    if (!(await confirmed(said))) return;
    await ask("DELETE", `videos/${this.video.id}`);
    forget(`videos/${this.video.id}/`);
    drop(this.video.id);
    actions.forgetTile(this.video.id);
    say("Deleted.");
    location.hash = "#/";
  }

  /** Show the full sampler's video: its progress, and then both side by side. */
  showReference(reference) {
    const first = this.reference?.id !== reference.id;
    this.reference = reference;
    if (reference.status === "completed") {
      if (this.compared !== reference.id) this.compare(reference);
      return;
    }
    if (first) {
      this.card = new Card(reference);
      const hint =
        "The full sampler makes the same video with every step computed. Then both are shown side by side.";
      this.beside.replaceChildren(
        h(
          "section",
          { class: "sheet" },
          h("h2", {}, "Compare"),
          h("p", { class: "hint" }, hint),
          this.card.element,
        ),
      );
      this.beside.scrollIntoView({ block: "nearest", behavior: CALM.matches ? "auto" : "smooth" });
    } else this.card?.update(reference);
  }

  compare(reference) {
    this.compared = reference.id;
    const measured = h("p", { class: "measured", "aria-live": "polite" }, "Measuring…");
    const pair = new Pair(this.video, reference);
    this.beside.replaceChildren(
      h("section", { class: "sheet" }, h("h2", {}, "Compare"), pair.element, measured),
    );
    ask("GET", `videos/${this.video.id}/quality?reference=${reference.id}`).then(
      (told) => {
        const vmaf = told.vmaf === null ? "" : `, VMAF ${told.vmaf.toFixed(1)}`;
        const said = `PSNR ${told.psnr.toFixed(1)} dB, SSIM ${told.ssim.toFixed(4)}${vmaf}`;
        setText(measured, `${said} against the full sampler, measured on the mp4 files.`);
      },
      (error) => setText(measured, error.message),
    );
  }
}

const waiting = () => h("p", { class: "empty" }, "The video appears here.");

function player(video) {
  const media = h("video", {
    controls: true,
    loop: true,
    playsinline: true,
    preload: "metadata",
    "aria-label": video.prompt,
  });
  media.muted = true;
  media.autoplay = !CALM.matches;
  fileUrl(`videos/${video.id}/content`).then(
    (url) => (media.src = url),
    () => media.classList.add("missing"),
  );
  return media;
}

function pictures(video) {
  const kinds = [
    ["spritesheet", "Contact sheet", "Frames from throughout the video"],
    ["picture", "Step times", "Chart of the time that each step took"],
  ];
  return kinds.map(([variant, title, alt]) => {
    const image = h("img", { alt, class: variant });
    const section = h("figure", { class: "sheet" }, h("figcaption", {}, h("h2", {}, title)), image);
    image.addEventListener("error", () => section.remove());
    fileUrl(`videos/${video.id}/content?variant=${variant}`).then(
      (url) => (image.src = url),
      () => section.remove(),
    );
    return section;
  });
}

function facts(video) {
  const { request, run } = video;
  const report = reportOf(video.id);
  const told = [
    ["Model", video.model],
    ["Size", `${video.size.replace("x", "×")}, ${request.frames} frames at ${request.fps} per second`],
    [
      "Forecasting",
      request.nfe
        ? `${request.nfe} computed steps`
        : request.psnr
          ? `${request.psnr} dB expected`
          : request.spectrum,
    ],
    ["Guidance", [request.guidance, request.guidance_2 ?? []].flat().join(", low noise ")],
    ["Seed", String(request.seed)],
  ];
  if (report) told.push(["Computed", `${report.nfe.cond} of ${report.steps} steps`]);
  else if (isOpen(video)) told.push(["Computed", `${steps(run.nfe)} so far`]);
  if (request.negative) told.push(["Negative prompt", request.negative]);
  if (report?.expectation?.psnr) {
    const { psnr, deviation } = report.expectation;
    told.push(["Expected", `PSNR ${psnr.toFixed(1)} ± ${deviation.toFixed(1)} dB against the full sampler`]);
  }
  if (report)
    told.push([
      "Time",
      `${duration(report.seconds.denoise)} denoising, ${duration(report.seconds.total)} in all`,
    ]);
  if (run.tries > 1) told.push(["Started", `${run.tries} times`]);
  told.push(["Created", moment(video.created_at)]);
  if (video.expires_at) told.push(["Kept until", moment(video.expires_at)]);
  return told;
}

/** Two videos that play together. */
class Pair {
  constructor(video, reference) {
    const parts = [
      ["This video", video],
      ["Full sampler", reference],
    ];
    this.media = parts.map(([, one]) => {
      const media = h("video", { loop: true, playsinline: true, preload: "auto", "aria-label": one.prompt });
      media.muted = true;
      fileUrl(`videos/${one.id}/content`).then(
        (url) => (media.src = url),
        () => {},
      );
      return media;
    });
    this.play = h("button", { type: "button", onclick: () => this.toggle() }, "Play both");
    this.place = h("input", {
      type: "range",
      min: "0",
      max: "1",
      step: "0.001",
      value: "0",
      "aria-label": "Position in both videos",
    });
    this.place.addEventListener("input", () => this.seek(Number(this.place.value)));
    const [first, second] = this.media;
    first.addEventListener("timeupdate", () => {
      if (Math.abs(second.currentTime - first.currentTime) > 0.08) second.currentTime = first.currentTime;
      if (first.duration && document.activeElement !== this.place)
        this.place.value = first.currentTime / first.duration;
    });
    const figures = parts.map(([name], number) =>
      h("figure", {}, this.media[number], h("figcaption", {}, name)),
    );
    this.element = h(
      "div",
      { class: "pair" },
      h("div", { class: "screens" }, figures),
      h("div", { class: "transport" }, this.play, this.place),
    );
  }

  toggle() {
    const playing = !this.media[0].paused;
    for (const media of this.media) playing ? media.pause() : media.play().catch(() => {});
    setText(this.play, playing ? "Play both" : "Pause both");
  }

  seek(share) {
    for (const media of this.media) {
      media.pause();
      if (media.duration) media.currentTime = share * media.duration;
    }
    setText(this.play, "Play both");
  }
}
