// Elements from what was typed or answered: always as text, never as HTML.

/** Whether the user prefers reduced motion. */
export const CALM = matchMedia("(prefers-reduced-motion: reduce)");

/** Make an element. A property that begins with `on` is a listener; null and false are left out. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(
    ...children.flat().filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Set the text of an element only if it differs, so that screen readers announce only what is new. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Announce something to screen readers. */
export function say(text) {
  setText(byId("said"), text);
}

/** Ask in a dialog before something is deleted; resolves to whether the user agreed. */
export function confirmed(question) {
  setText(byId("confirm-said"), question);
  return agreed(byId("confirm"));
}

/** Show a dialog; resolves to whether the user chose the button with the value "yes". */
export function agreed(dialog) {
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Run the action of a button, which is busy meanwhile; an error is shown beside it. */
export async function carryOut(button, problem, action) {
  if (button.getAttribute("aria-busy") === "true") return;
  button.setAttribute("aria-busy", "true");
  setText(problem, "");
  try {
    await action();
  } catch (error) {
    setText(problem, error.message);
  } finally {
    button.removeAttribute("aria-busy");
  }
}

/** A button with an action; see `carryOut`. */
export function actionButton(label, problem, action, kind = "") {
  const button = h("button", { type: "button", class: kind }, label);
  button.addEventListener("click", () => carryOut(button, problem, action));
  return button;
}

/**
 * Make the children of an element those of `items`, in order. Each has its item's key; those that are there already stay,
 * with their focus, and move only where they must.
 */
export function arrangeChildren(parent, items, key, make) {
  const there = new Map([...parent.children].map((child) => [child.dataset.key, child]));
  const wanted = items.map((item) => {
    const child = there.get(item[key]) ?? make(item);
    child.dataset.key = item[key];
    return child;
  });
  const kept = new Set(wanted);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  wanted.forEach((child, number) => {
    if (parent.children[number] !== child) parent.insertBefore(child, parent.children[number] ?? null);
  });
}

/** Set the file of an image or a video once it is near the screen. */
export function showWhenNear(element, url) {
  near.observe(element);
  waiting.set(element, url);
}

const waiting = new WeakMap();
const near = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting) continue;
      near.unobserve(target);
      waiting
        .get(target)?.()
        .then(
          (url) => (target.src = url),
          () => target.classList.add("missing"),
        );
    }
  },
  { rootMargin: "300px" },
);
