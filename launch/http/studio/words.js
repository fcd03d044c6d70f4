// Numbers and states as people say them.

export function duration(seconds) {
  if (seconds < 1) return "less than a second";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const times = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
export const moment = (epoch) => times.format(new Date(1000 * epoch));

export const steps = (count) => `${count} step${count === 1 ? "" : "s"}`;

/** What a video is made with, in one line. */
export function settings(video) {
  const { request } = video;
  const how = request.nfe ? `${request.nfe} steps` : request.psnr ? `${request.psnr} dB` : request.spectrum;
  const parts = [video.model, video.size.replace("x", "×"), `${Number(video.seconds).toFixed(1)} s`];
  return [...parts, how === "off" ? "all steps computed" : how].join(" · ");
}

const ENDS = { cancelled: "Cancelled", expired: "Expired", generation_failed: "Failed" };

/** One of: waiting, running, done, cancelled, failed. */
export function stateOf(video) {
  if (video.status === "failed") return video.error?.code === "generation_failed" ? "failed" : "cancelled";
  return { queued: "waiting", in_progress: "running", completed: "done" }[video.status];
}

/** How far a video is, in a sentence. */
export function standing(video) {
  const { run } = video;
  switch (video.status) {
    case "queued":
      if (run.cancelling) return "Cancelling";
      return run.position ? `Waiting, ${run.position} ahead of it` : run.tries ? "Waiting to resume" : "Next in line";
    case "in_progress": {
      if (run.cancelling) return "Cancelling after this step";
      if (!run.steps) return "Loading";
      if (run.step >= run.steps) return "Decoding and writing";
      const left = run.seconds_left === null ? "" : `, ${duration(run.seconds_left)} left`;
      return `Step ${run.step} of ${run.steps}${left}`;
    }
    case "completed":
      return `Done ${moment(video.completed_at)}`;
    default:
      return ENDS[video.error?.code] ?? "Failed";
  }
}
