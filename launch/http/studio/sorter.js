// Sorting a list by the handles of its items: by mouse and finger (drag), and by keyboard (arrow keys).

export class Sorter {
  /**
   * @param {HTMLElement} list whose children each have an element of the class `handle`.
   * @param {(from: number, to: number) => void} arrange moves the item at one place to another.
   */
  constructor(list, arrange) {
    this.list = list;
    this.arrange = arrange;
    list.addEventListener("pointerdown", (event) => this.#take(event));
    list.addEventListener("keydown", (event) => this.#key(event));
  }

  #place(element) {
    return [...this.list.children].indexOf(element);
  }

  #take(event) {
    const handle = event.target.closest(".handle");
    if (!handle || event.button !== 0) return;
    const item = handle.closest(".shot");
    item.classList.add("moving");
    // On the document: an element that moves in the page loses the pointer.
    const leave = new AbortController();
    const { signal } = leave;
    const follow = ({ pointerId, clientY }) => {
      if (pointerId !== event.pointerId) return;
      const [from, to] = [this.#place(item), this.#under(clientY, item)];
      if (to !== from) this.arrange(from, to);
    };
    const end = ({ pointerId }) => {
      if (pointerId !== event.pointerId) return;
      item.classList.remove("moving");
      leave.abort();
    };
    document.addEventListener("pointermove", follow, { signal });
    document.addEventListener("pointerup", end, { signal });
    document.addEventListener("pointercancel", end, { signal });
  }

  /** The place of the item whose middle the pointer has passed. */
  #under(y, own) {
    const from = this.#place(own);
    let to = from;
    [...this.list.children].forEach((element, number) => {
      const { top, height } = element.getBoundingClientRect();
      const middle = top + height / 2;
      if (number < from && y < middle && number < to) to = number;
      if (number > from && y >= middle) to = number;
    });
    return to;
  }

  #key(event) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const handle = event.target.closest(".handle");
    if (!step || !handle) return;
    event.preventDefault();
    const from = this.#place(handle.closest(".shot"));
    this.arrange(from, from + step);
  }
}
