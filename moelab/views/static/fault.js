// What was refused, in a box under the control it is about. It lies over the page: nothing moves.

import { cross, h, markup, say } from "./element.js";
import { within } from "./numbers.js";

export class Fault {
  constructor(dismissed) {
    this.words = h("span");
    const close = () => {
      this.dismissed = this.key;
      this.node.hidden = true;
      dismissed();
    };
    this.node = markup`
      <div class="moe-error" role="alert" hidden>${[this.words, cross("Dismiss", close)]}</div>`;
  }

  /** Say it under `control`; a fault of the same `key` stays away once it is dismissed. */
  show(text, control, key) {
    this.control = control;
    this.key = key;
    if (!text) this.dismissed = null;
    say(this.words, text);
    this.node.hidden = !text || key === this.dismissed;
    this.place();
  }

  place() {
    if (this.node.hidden) return;
    const root = this.node.offsetParent?.getBoundingClientRect();
    if (!root) return;
    const of = this.control.getBoundingClientRect();
    const wide = this.node.offsetWidth,
      left = within(of.left - root.left, 14, root.width - wide - 14);
    const tip = of.left - root.left - left + Math.min(of.width / 2, 24);
    this.node.style.left = `${left}px`;
    this.node.style.top = `${of.bottom - root.top + 9}px`;
    this.node.style.setProperty("--tip", `${within(tip, 8, wide - 16)}px`);
  }
}
