// The form that makes a video. It asks the server what a request would become before it is sent.

import { Making, ask } from "./api.js";
import { byId, carryOut, h, say, setText } from "./dom.js";
import { onChange, put } from "./live.js";
import { duration } from "./words.js";

const PATIENCE = 350; // milliseconds without typing before the server is asked
const FIELDS = [
  "prompt",
  "model",
  "spectrum",
  "nfe",
  "psnr",
  "seconds",
  "negative",
  "seed",
  "steps",
  "guidance",
  "guidance_2",
  "fps",
];
const PROBLEMS = [...FIELDS, "size", "deadline", "priority", "input_reference"];
const EXPERTS = { "": "both experts", high: "high noise", low: "low noise" };
const USUAL = ["steps", "guidance", "guidance_2", "fps"]; // shown as what they are if nothing is typed

let models;
let asking = null;
let timer = null;
const making = new Making();

const form = () => byId("compose");
const model = () => models.find((one) => one.id === byId("model").value);
const chosenBudget = () => form().elements.budget.value;

/** Fill the form with what the server offers. */
export function openForm(offered, addShot) {
  models = offered;
  byId("model").replaceChildren(...models.map((one) => h("option", { value: one.id }, one.id)));
  byId("model").addEventListener("change", changeModel);
  form().addEventListener("input", changed);
  form().addEventListener("submit", (event) => {
    event.preventDefault();
    carryOut(event.submitter ?? form().querySelector("[type=submit]"), byId("form-problem"), make);
  });
  byId("as-shot").addEventListener("click", () => {
    if (!byId("prompt").value.trim()) return showProblem("prompt", "A shot needs a prompt.");
    addShot(fields());
    say("Added to the storyboard.");
  });
  changeModel();
  let newest = null; // finished video: what is expected follows from what was measured
  onChange((recent) => {
    const done = recent.find((video) => video.status === "completed")?.id ?? null;
    if (done !== newest) changed();
    newest = done;
  });
}

function lora(name) {
  const scale = h("input", {
    class: "scale",
    type: "number",
    step: "0.05",
    value: "1",
    "aria-label": `Scale of ${name}`,
  });
  const choices = Object.entries(EXPERTS).map(([value, said]) => h("option", { value }, said));
  const expert = h("select", { class: "expert", "aria-label": `Expert of ${name}` }, choices);
  expert.hidden = model().experts === 1;
  return h(
    "div",
    { class: "lora" },
    h("label", {}, h("input", { type: "checkbox", value: name }), name),
    expert,
    scale,
  );
}

const LORA_PARTS = { box: "[type=checkbox]", expert: ".expert", scale: ".scale" };

/** The elements of each LoRA. */
const loraRows = () =>
  [...document.querySelectorAll("#loras .lora")].map((row) =>
    Object.fromEntries(Object.entries(LORA_PARTS).map(([name, of]) => [name, row.querySelector(of)])),
  );

/** The LoRAs that are ticked, as the API takes them. */
function chosenLoras() {
  const ticked = loraRows().filter(({ box }) => box.checked);
  return ticked.map(({ box, expert, scale }) => {
    const chosen = { name: box.value, scale: Number(scale.value) };
    return expert.value ? { ...chosen, expert: expert.value } : chosen;
  });
}

function tickLoras(chosen) {
  for (const { box, expert, scale } of loraRows()) {
    const given = chosen.find((one) => one.name === box.value);
    if (!given) continue;
    box.checked = true;
    scale.value = given.scale;
    expert.value = given.expert ?? "";
  }
}

/** No choice, and a model's presets, each with what is expected of it. */
export function presetChoices(chosen) {
  const presets = chosen.presets.map(({ id, nfe, psnr }) => {
    const quality = psnr === null ? "" : `, ${psnr.toFixed(0)} dB`;
    const said = id === "off" ? "all steps" : `${nfe} of ${chosen.defaults.steps} steps${quality}`;
    return h("option", { value: id }, `${id} (${said})`);
  });
  return [h("option", { value: "" }, "automatic (the best that fits)"), ...presets];
}

function changeModel() {
  const { defaults, experts, multiple, budgets, loras } = model();
  byId("spectrum").replaceChildren(...presetChoices(model()).filter((choice) => choice.value !== "off"));
  const [width, height] = defaults.size.split("x");
  const usual = { ...defaults, width, height, seconds: Number(defaults.seconds).toFixed(1) };
  for (const name of [...USUAL, "width", "height", "seconds"]) byId(name).placeholder = usual[name] ?? "";
  byId("guidance_2-field").hidden = experts === 1;
  if (experts === 1) byId("guidance_2").value = "";
  for (const name of ["width", "height"]) byId(name).step = multiple;
  byId("negative").placeholder = defaults.negative || "none";
  byId("loras").replaceChildren(h("legend", {}, "LoRAs"), ...loras.map(lora));
  byId("loras").hidden = !loras.length;
  const planned = ["nfe", "psnr"]; // they need a calibration
  for (const radio of form().elements.budget)
    radio.disabled = planned.includes(radio.value) && !budgets.length;
  if (!budgets.length && planned.includes(chosenBudget())) form().elements.budget.value = "spectrum";
  byId("no-budgets").hidden = budgets.length > 0;
  changed();
}

function changed() {
  const budget = chosenBudget();
  for (const part of form().querySelectorAll("[data-budget]")) part.hidden = part.dataset.budget !== budget;
  const steps = Number(byId("steps").value) || model().defaults.steps;
  byId("nfe").max = Math.max(2, steps - 1);
  setText(byId("nfe-told"), `${byId("nfe").value} of ${steps}`);
  clearTimeout(timer);
  timer = setTimeout(estimate, PATIENCE);
}

/** Fields of the request, as the API takes them. */
function fields() {
  const given = { model: byId("model").value, prompt: byId("prompt").value };
  const budget = chosenBudget();
  if (budget === "off") given.spectrum = "off";
  else if (budget !== "spectrum") given[budget] = Number(byId(budget).value);
  else if (byId("spectrum").value) given.spectrum = byId("spectrum").value;
  const [width, height] = ["width", "height"].map((name) => byId(name).value || byId(name).placeholder);
  if (byId("width").value || byId("height").value) given.size = `${width}x${height}`;
  for (const name of ["seconds", "negative"]) if (byId(name).value) given[name] = byId(name).value;
  for (const name of ["seed", "steps", "guidance", "guidance_2", "fps", "deadline", "priority"]) {
    const typed = byId(name).value.trim();
    if (typed) given[name] = Number.isNaN(Number(typed)) ? typed : Number(typed);
  }
  const loras = chosenLoras();
  if (loras.length) given.loras = loras;
  return given;
}

/** The body of a request; an image is sent in it as a data URL. */
async function body(given) {
  const image = byId("image").files[0];
  return image ? { ...given, input_reference: { image_url: await dataUrl(image) } } : given;
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.replace(/^data:[^;]*/, `data:${file.type || "image/png"}`));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function estimate() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const given = fields();
  const untold = !given.prompt.trim();
  if (untold) given.prompt = "a"; // what is expected depends on the rest
  try {
    const told = await ask("POST", "videos/estimate", { json: await body(given), signal });
    clearProblems();
    showExpected(told);
  } catch (error) {
    if (signal.aborted) return;
    clearProblems();
    byId("expected").replaceChildren();
    if (error.param !== "prompt") showProblem(error.param, error.message);
  }
}

function showExpected(told) {
  const quality = told.exact
    ? ["Exact", "as the full sampler"]
    : told.psnr
      ? [`${told.psnr.expected.toFixed(1)} dB`, `PSNR expected, ± ${told.psnr.deviation.toFixed(1)}`]
      : ["–", "PSNR unknown for this choice"];
  const time = told.time
    ? [
        `about ${duration(told.time.total ?? told.time.denoise)}`,
        told.time.source === "measured" ? "to make, as measured here" : "to denoise, as calibrated",
      ]
    : ["–", "time unknown until a video is made"];
  const facts = [
    [`${told.nfe} of ${told.steps}`, told.chosen ? `steps computed (${told.spectrum})` : "steps computed"],
    quality,
    time,
    [`${Number(told.seconds).toFixed(1)} s`, `of video, ${told.frames} frames`],
  ];
  const shown = facts.map(([value, what]) => h("div", {}, h("dt", {}, what), h("dd", {}, value)));
  byId("expected").replaceChildren(h("dl", {}, shown));
}

function clearProblems() {
  for (const name of PROBLEMS) showProblem(name, "");
  setText(byId("form-problem"), "");
}

/** Show what is wrong beside the field that is to blame. */
function showProblem(name, message) {
  const field = (name ?? "").split(".")[0].replace("frames", "seconds");
  const place = byId(`${field}-problem`) ?? byId("form-problem");
  setText(place, message);
  for (const input of form().querySelectorAll(`[aria-describedby="${place.id}"]`)) {
    if (message) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
  if (message && place.closest("details")) place.closest("details").open = true;
}

async function make() {
  clearProblems();
  const given = fields();
  if (!given.prompt.trim()) {
    showProblem("prompt", "Enter a prompt: what the video shows.");
    byId("prompt").focus();
    return;
  }
  try {
    put(await making.ask("videos", await body(given)));
    say("The video is in the queue.");
  } catch (error) {
    showProblem(error.param, error.message);
    form().querySelector("[aria-invalid]")?.focus();
  }
}

/** Fill the form with the request of a video. */
export function fillFrom(video) {
  const { request } = video;
  const [width, height] = video.size.split("x");
  byId("model").value = video.model;
  changeModel();
  const values = { prompt: video.prompt, width, height, seconds: video.seconds, negative: request.negative };
  for (const name of ["seed", "steps", "guidance", "guidance_2", "fps", "deadline"])
    values[name] = request[name] ?? "";
  for (const [name, value] of Object.entries(values)) byId(name).value = value;
  tickLoras(request.loras);
  const budget = request.nfe
    ? "nfe"
    : request.psnr
      ? "psnr"
      : request.spectrum === "off"
        ? "off"
        : "spectrum";
  form().elements.budget.value = budget;
  if (budget !== "off") byId(budget).value = request[budget];
  changed();
}
