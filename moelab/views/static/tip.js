// The tooltip, and the token that text and bars point at together.

import { h } from "./element.js";
import { bytes, kl, millis, within } from "./numbers.js";

const STATUS_BAR = 30; // below a notebook

/** Names and values as a list. */
export const pairs = (rows) => rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]);

/** One tooltip for the whole dashboard; rows are [name, value]. */
export class Tip {
  constructor(root) {
    this.root = root;
    this.node = h("div", { class: "moe-tip", role: "tooltip", hidden: true });
    root.append(this.node);
  }
  show(x, y, title, rows, extra = []) {
    this.node.replaceChildren(h("strong", {}, title), h("dl", {}, ...pairs(rows)), ...extra);
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
export function describeToken({ tokens: t, texts, first, causes }, token) {
  const i = token - first,
    some = (name) => (t[name][i] ? [[name, `${t[name][i]}`]] : []),
    waited = (name, words) => (t[name][i] >= 0.005 ? [[words, millis(t[name][i])]] : []);
  return [
    `token ${token} ${JSON.stringify(texts[i])}`,
    [
      ["latency", millis(t.total_ms[i])],
      ["compute", millis(t.compute_ms[i])],
      ...waited("deciding_ms", "deciding"),
      ...causes.flatMap((cause) => waited(cause, `stall: ${cause}`)),
      ["read", bytes(t.bytes[i])],
      ["hits", `${t.hits[i]}`],
      ["loads", `${t.loads[i]}`],
      ...["prefetches", "downgrades", "skips", "substitutes"].flatMap(some),
      ["KL", Number.isFinite(t.kl[i]) ? kl(t.kl[i]) : "not measured"],
      ["resident", `${bytes(t.resident_bytes[i])} of ${bytes(t.budget_bytes[i])}`],
    ],
  ];
}
