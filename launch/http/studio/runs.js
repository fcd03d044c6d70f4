// What is known of the steps of a video: the plan before, what happened while it ran, the report afterwards.

import { ask, events } from "./api.js";

const KINDS = { c: "compute", f: "forecast" };

const runs = new Map(); // id → { plan, kinds, preview, report, asked }

/** Fields of a request that makes the same video again. */
export function requestOf(video) {
  const { request } = video;
  const fields = { model: video.model, prompt: video.prompt, size: video.size };
  for (const name of ["frames", "fps", "steps", "guidance", "guidance_2", "negative", "seed", "loras"])
    fields[name] = request[name];
  if (request.nfe !== null) fields.nfe = request.nfe;
  else if (request.psnr !== null) fields.psnr = request.psnr;
  else fields.spectrum = request.spectrum;
  if (request.deadline !== null) fields.deadline = request.deadline;
  return fields;
}

function runOf(id) {
  if (!runs.has(id)) runs.set(id, { plan: null, kinds: [], preview: null, report: null, asked: new Set() });
  return runs.get(id);
}

/** Take in an event of a video. */
export function heard(type, data) {
  const run = runOf(data.video_id);
  if (type === "begun")
    run.plan = [...data.kinds].flatMap((kind, step) => (KINDS[kind] === "compute" ? [step] : []));
  if (type === "step") run.kinds[data.step - 1] = data.kind;
  if (type === "preview") run.preview = data.step;
}

/** The step of a video's newest preview; null if there was none. */
export const previewOf = (id) => runOf(id).preview;

async function once(run, what, action) {
  if (run.asked.has(what)) return;
  run.asked.add(what);
  try {
    await action();
  } catch {
    // the strip is shown without it
  }
}

/** What `Strip.show` shows of a video; `changed` is called when more of it is known. */
export function stepsOf(video, changed) {
  const run = runOf(video.id);
  const steps = video.run.steps || video.request.steps;
  const done = video.status === "completed";
  if (done) {
    once(run, "report", async () => {
      run.report = await ask("GET", `videos/${video.id}/report`);
      run.kinds = run.report.step_log.map((step) => step.kind);
      changed();
    });
  } else if (video.run.step > 0 && !run.kinds[0]) {
    once(run, "history", async () => {
      for await (const { type, data } of events(`videos/${video.id}/events`)) {
        heard(type, data);
        if (type === "step" && data.step >= video.run.step) break;
      }
      changed();
    });
  } else if (!video.request.image && video.run.step === 0) {
    once(run, "plan", async () => {
      const told = await ask("POST", "videos/estimate", { json: requestOf(video) });
      run.plan = told.computed;
      changed();
    });
  }
  const { kinds, plan } = run;
  return { steps, step: done ? steps : video.run.step, kinds, plan, running: video.status === "in_progress" };
}

/** The report of a finished video, if it is here. */
export const reportOf = (id) => runOf(id).report;
