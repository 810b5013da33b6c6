// The tooltip, the token that text and bars point at together, and why a resident expert would stay
// or go: the lab is asked while the pointer rests on its cell, and again when a new frame has come.
// One question at a time: the kernel may be busy.

import { filledBar, h, markup, shareOf } from "./element.js";
import { inSum, spentOn } from "./figures.js";
import { bytes, kl, millis, short, within } from "./numbers.js";
import { describePass } from "./passes.js";

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

const STATUS_BAR = 30; // below a notebook

/** One tooltip for the whole dashboard; rows are [name, value]. */
export class Tip {
  constructor(root) {
    this.root = root;
    this.node = h("div", { class: "moe-tip", role: "tooltip", hidden: true });
    root.append(this.node);
  }
  show(x, y, title, rows, extra = []) {
    const pairs = rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);
    this.node.replaceChildren(h("strong", {}, title), h("dl", {}, ...pairs), ...extra);
    this.node.hidden = false;
    const root = this.root.getBoundingClientRect();
    const { offsetWidth: w, offsetHeight: t } = this.node;
    const left = x - root.left + 14 + w > root.width ? x - root.left - w - 14 : x - root.left + 14;
    const lowest = Math.min(root.bottom, innerHeight - STATUS_BAR) - root.top;
    const top = Math.min(Math.max(4, y - root.top + 14), lowest - t - 4);
    Object.assign(this.node.style, { left: `${Math.max(4, left)}px`, top: `${top}px` });
  }
  hide() {
    this.node.hidden = true;
  }
}

/**
 * The token that text and bars point at together, with its figures in the tooltip. `enter(token)`
 * goes there and `scrub(tokens)` moves on from there, in the past.
 */
export class Cursor {
  constructor(tip, { enter, scrub }) {
    this.tip = tip;
    this.enter = enter;
    this.scrub = scrub;
    this.at = null;
    this.frame = null;
    this.views = [];
  }

  set(token, event, where) {
    const changed = token !== this.at;
    this.at = token;
    if (changed) this.views.forEach((view) => view());
    if (token === null) {
      if (changed) this.tip.hide();
      return;
    }
    const [x, y] = where ?? [event.clientX, event.clientY];
    this.tip.show(x, y, ...describeToken(this.frame, token));
  }

  key(event, place) {
    if (event.key === "Escape") return this.set(null);
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key],
      enters = event.key === "Enter" && this.at !== null;
    if (!this.frame?.count || (!enters && step === undefined)) return;
    event.preventDefault();
    const { first, count, past } = this.frame,
      { at } = this;
    if (enters || past) this.set(null);
    if (enters) this.enter(at);
    else if (past) this.scrub(step);
    else {
      const last = first + count - 1;
      this.at = at === null ? last : within(at + step, first, last); // where it is asked for below
      this.set(this.at, null, place());
      this.views.forEach((view) => view());
    }
  }
}

/** What the tooltip says of a token: title and rows. */
export function describeToken({ tokens: t, texts, first, passes }, token) {
  const i = token - first,
    spent = spentOn(t, i),
    some = (name) => (t[name]?.[i] ? [[name, `${t[name][i]}`]] : []);
  return [
    `token ${token} ${JSON.stringify(texts[i])}`,
    [
      ["by the watch", inSum(spent)[0]],
      ...spent.filter(([, ms]) => ms >= 0.005).map(([words, ms]) => [words, millis(ms)]),
      ["read", bytes(t.bytes[i])],
      ["hits", `${t.hits[i]}`],
      ["loads", `${t.loads[i]}`],
      ...["late", "prefetches", "downgrades", "skips", "substitutes"].flatMap(some),
      ...describePass(passes, token),
      ["KL", Number.isFinite(t.kl[i]) ? kl(t.kl[i]) : "not measured"],
      ["resident", `${bytes(t.resident_bytes[i])} of ${bytes(t.budget_bytes[i])}`],
    ],
  ];
}
