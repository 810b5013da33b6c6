// Why a resident expert would stay or go: the lab is asked while the pointer rests on its cell,
// and again when a new frame has come. One question at a time: the kernel may be busy.

import { h, markup } from "./element.js";
import { short } from "./numbers.js";

const REST_MS = 90;
const AGAIN_MS = 500;
const PATIENCE_MS = 5000;

export class Why {
  constructor(model, changed) {
    this.model = model;
    this.asked = 0;
    this.forget();
    this.heard = ({ why }) => {
      if (why === undefined) return;
      this.asked = 0;
      if (`${why.layer},${why.expert}` !== this.key) return;
      this.answer = why;
      changed();
    };
    model.on("msg:custom", this.heard);
  }

  /** What was last said about this expert; a newer answer is asked for where there may be one. */
  about(layer, expert, seq) {
    const key = `${layer},${expert}`;
    if (key !== this.key) {
      this.forget();
      this.key = key;
      this.askIn(REST_MS, { layer, expert }, seq);
    } else if (seq !== this.seq) this.askIn(AGAIN_MS, { layer, expert }, seq);
    return this.answer;
  }

  askIn(wait, who, seq) {
    if (this.timer) return;
    this.timer = setTimeout(() => {
      this.timer = 0;
      if (Date.now() - this.asked < PATIENCE_MS) return;
      Object.assign(this, { seq, asked: Date.now() });
      this.model.send({ do: "why", ...who });
    }, wait);
  }

  forget() {
    clearTimeout(this.timer);
    this.key = "";
    this.timer = 0;
    this.seq = this.answer = undefined;
  }

  close() {
    this.forget();
    this.model.off("msg:custom", this.heard);
  }
}

/** How far along from the lowest to the highest a value lies; all of it where they do not differ. */
export const shareOf = (value, low, high) =>
  Number.isFinite(value) && high > low ? (value - low) / (high - low) : 1;

/** A bar that is filled to a share. */
export function filledBar(share, name = "") {
  const style = `--p:${(100 * share).toFixed(1)}%`;
  return h("i", { class: `moe-bar ${name}`, "aria-hidden": true, style });
}

/** Terms as rows of name, bar and number; a bar spans this layer's residents, lowest to highest. */
export function drawWhy({ policy, terms, error }) {
  const rows = terms.flatMap(({ name, value, low, high, text }) => [
    h("dt", {}, name),
    h("dd", { class: "moe-term", "aria-hidden": true }, filledBar(shareOf(value, low, high))),
    h("dd", {}, short(value)),
    h("dd", { class: "moe-term-text", hidden: !text }, text),
  ]);
  return markup`
    <div class="moe-why">
      <strong>Stay or go</strong>
      <span>${error || policy}</span>
      <dl>${rows}</dl>
      ${rows.length > 0 && h("small", {}, "each bar: lowest to highest resident of this layer")}
    </div>`;
}
