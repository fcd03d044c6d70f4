// The newest videos as the server has them, and the listeners that hear of changes.

import { ask, events } from "./api.js";
import { heard } from "./runs.js";

const PAGE = 100;
const MOST = 5 * PAGE; // looked at in one go
const EAGER = 1000; // milliseconds between two looks while something is being made, without a stream of events
const RELAXED = 4000;
const HIDDEN = 15000;
const AGAIN = 3000; // before a stream that broke off is opened again

export const isOpen = (video) => video.status === "queued" || video.status === "in_progress";

const listeners = new Set();
let recent = []; // newest first; all that are waiting or running among them
let wake = () => {};
let streaming = false;

/** Call `listener` with the newest videos now, and after every change. */
export function onChange(listener) {
  listeners.add(listener);
  if (recent.length) listener(recent);
}

export const videos = () => recent;

/** Poll again at once, as something was requested. */
export const lookAgain = () => wake();

/** Take in a video from a response. */
export function put(video) {
  const known = recent.findIndex((one) => one.id === video.id);
  recent = known < 0 ? [video, ...recent] : recent.with(known, video);
  tell();
  lookAgain();
}

/** Remove a deleted video. */
export function drop(id) {
  recent = recent.filter((one) => one.id !== id);
  tell();
}

/** Poll the server while the page is open; `connected` gets the connection problem, or an empty text. */
export async function follow(connected) {
  listen();
  for (;;) {
    try {
      recent = await newest();
      connected("");
      tell();
    } catch (error) {
      connected(error.status ? error.message : "No connection to the server. Trying again…");
    }
    await pause(document.hidden ? HIDDEN : recent.some(isOpen) && !streaming ? EAGER : RELAXED);
  }
}

/** Follow the stream of events; what it misses is found by the next poll. */
async function listen() {
  let last = null;
  for (;;) {
    try {
      for await (const event of events("events", last)) {
        streaming = true;
        last = event.id;
        hear(event);
      }
    } catch {
      // tried again below; the next look tells what is wrong
    }
    streaming = false;
    await new Promise((resolve) => setTimeout(resolve, AGAIN));
  }
}

function hear({ type, data }) {
  heard(type, data);
  const at = recent.findIndex((one) => one.id === data.video_id);
  if (type === "state" || at < 0) return lookAgain();
  if (type !== "step") return tell();
  const { step, steps, nfe, seconds_left } = data;
  const run = { ...recent[at].run, step, steps, nfe, seconds_left };
  recent = recent.with(at, { ...recent[at], status: "in_progress", run });
  tell();
}

async function newest() {
  let found = [];
  let after = "";
  do {
    const page = await ask("GET", `videos?limit=${PAGE}${after && `&after=${after}`}`);
    found = found.concat(page.data);
    if (!page.has_more || !isOpen(found.at(-1))) break; // what is older has ended, too
    after = page.last_id;
  } while (found.length < MOST);
  return found;
}

function tell() {
  for (const listener of listeners) listener(recent);
}

function pause(milliseconds) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    wake = () => {
      clearTimeout(timer);
      resolve();
    };
  });
}

document.addEventListener("visibilitychange", () => document.hidden || lookAgain());
