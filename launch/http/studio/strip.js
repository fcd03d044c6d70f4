// The strip of a run: one bar for each step, high where it is computed, low where it is forecast.

import { h, setText } from "./dom.js";

const NAMES = { compute: "computed", forecast: "forecast" };

export class Strip {
  constructor(large = false) {
    this.bars = h("span", { class: "bars", "aria-hidden": "true" });
    this.told = h("span", { class: "unseen" });
    this.element = h("div", { class: large ? "strip large" : "strip" }, this.bars, this.told);
  }

  /**
   * Show how far a run is.
   *
   * @param {object} run `steps`, `step` (finished ones), `kinds` (of finished steps, as far as they are known), `plan`
   *   (steps that are to be computed, if that is known) and `running`.
   */
  show({ steps, step, kinds = [], plan = null, running = false }) {
    while (this.bars.childElementCount < steps) this.bars.append(document.createElement("i"));
    while (this.bars.childElementCount > steps) this.bars.lastElementChild.remove();
    this.bars.classList.toggle("many", steps > 100);
    const planned = plan && new Set(plan);
    [...this.bars.children].forEach((bar, number) => {
      const expected = planned ? (planned.has(number) ? "compute" : "forecast") : "unknown";
      const kind = number < step ? (kinds[number] ?? expected) : expected;
      const now = running && number === step ? " now" : "";
      const name = `${kind} ${number < step ? "past" : "ahead"}${now}`;
      if (bar.className !== name) bar.className = name;
    });
    const known = kinds.slice(0, step).filter((kind) => kind === "compute").length;
    const computed = kinds.length ? `, ${known} of them computed` : "";
    setText(this.told, steps ? `${step} of ${steps} steps finished${computed}.` : "No step yet.");
  }
}

/** What the bars mean. */
export function legend() {
  const keys = Object.entries(NAMES).map(([kind, name]) =>
    h("span", {}, h("i", { class: `key ${kind}` }), name),
  );
  return h("p", { class: "legend", "aria-hidden": "true" }, keys);
}
