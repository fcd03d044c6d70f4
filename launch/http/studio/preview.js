// The preview of a running video: a short loop, or its first frame if the user prefers reduced motion.

import { fetchBlob } from "./api.js";
import { CALM } from "./dom.js";
import { previewOf } from "./runs.js";

const shown = new WeakMap(); // image → the step of the preview in it

/** Show the newest preview of a running video in an image; the one before stays until it is there. */
export async function showPreview(image, video) {
  const newest = previewOf(video.id);
  if (!newest || shown.get(image) === newest) return;
  shown.set(image, newest);
  try {
    const loop = await fetchBlob(`videos/${video.id}/preview`);
    const url = URL.createObjectURL(CALM.matches ? await firstFrame(loop) : loop);
    image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
    image.src = url;
    image.classList.remove("empty");
  } catch {
    // the video has ended meanwhile
  }
}

async function firstFrame(loop) {
  const bitmap = await createImageBitmap(loop);
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return canvas.convertToBlob();
}
