// Latency of each token, split into compute, deciding and the causes of waiting; settings changed
// during the run are marks on the time axis, and a KL that is measured is a lane on a log scale.

import { fillBox, fillWords, hatch, Sheet, triangle } from "./canvas.js";
import { HATCHED } from "./colours.js";
import { h, legendKey, markup } from "./element.js";
import { nice, onLogScale, quantile, within } from "./numbers.js";
import { partOf } from "./recording.js";

const STEPS = [12, 8, 6, 5, 4, 3, 2, 1.5];
/** Where the scale of KLs begins and ends. */
export const KL_ENDS = { low: 1e-4, high: 1 };

/**
 * Where the bars of a frame stand, px: the newest tokens that have room (`shown` of them, `step`
 * apart, from the frame's index `begin` on), or those around the moment shown. Full bars are `tall`
 * above the axis at `base`; the KL's lane, where there is one, is `gap` below it.
 */
export function layoutOf({ count, tokens, past, first, changes }, width, height) {
  const box = { left: 38, top: changes.length ? 30 : 18, width: width - 44 };
  const hasKl = count > 0 && tokens.kl.some(Number.isFinite),
    lane = hasKl ? 24 : 0,
    gap = lane ? 12 : 0;
  const step = STEPS.find((s) => s * count <= box.width) ?? STEPS.at(-1),
    shown = Math.min(count, Math.floor(box.width / step));
  const middle = past ? past.token - first - Math.floor(shown / 2) : count - shown,
    base = height - 18 - lane - gap;
  const begin = within(middle, 0, count - shown);
  return { ...box, step, shown, begin, base, lane, gap, tall: base - box.top };
}

/** The top of the axis, ms: it stays until bars outgrow it or are much lower. */
export function scaleOf(total, before) {
  const want = total.length
    ? nice(Math.max(0.5, 1.15 * quantile(total, 0.96)), [1, 1.5, 2, 3, 4, 5, 6, 8, 10])
    : 10;
  return want > before || want < 0.6 * before ? want : before;
}

/** What a bar is made of, from below: [name, column of the figures]. */
export const partsOf = ({ columns, causes }) => [
  ["compute", "compute_ms"],
  ...(columns.includes("deciding_ms") ? [["deciding", "deciding_ms"]] : []),
  ...causes.map((cause) => [cause, cause]),
];

export class LatencyBars {
  /** `onPick(token)` is called for a token that is clicked, and while the pointer drags. */
  constructor(look, cursor, options, onPick) {
    this.look = look;
    this.cursor = cursor;
    this.model = options;
    this.parts = partsOf(options);
    this.scale = 0;
    this.keys = {};
    const label = "Latency of each token; arrow keys move from token to token, Enter shows why";
    this.sheet = new Sheet(label, () => this.draw());
    this.legend = h("div", { class: "moe-legend" });
    this.node = markup`
      <section class="moe-panel moe-bars" aria-label="Latency per token">
        <header><h3>Latency</h3>${this.legend}</header>
        ${this.sheet.box}
      </section>`;
    this.sheet.on({
      pointermove: (e) => {
        const token = this.tokenAt(e.offsetX);
        if (!(e.buttons & 1)) cursor.set(token, e);
        else if (token !== null) onPick(token);
      },
      pointerdown: (e) => {
        const token = this.tokenAt(e.offsetX);
        if (e.button !== 0 || token === null) return;
        e.target.setPointerCapture(e.pointerId); // the drag may leave the chart
        cursor.set(null);
        onPick(token);
      },
      pointerleave: () => cursor.set(null),
      blur: () => cursor.set(null),
      keydown: (e) => cursor.key(e, () => this.placeOf(cursor.at)),
    });
  }

  show(frame) {
    if (frame.run !== this.run) this.scale = 0;
    this.run = frame.run;
    this.frame = frame;
    this.draw();
  }

  layout() {
    return layoutOf(this.frame, this.sheet.width, this.sheet.height);
  }

  draw() {
    if (!this.frame || !this.sheet.width) return;
    const g = this.sheet.begin(),
      { ink } = this.look,
      at = this.layout(),
      w = Math.max(1, at.step - (at.step >= 3 ? 1 : 0));
    const { tokens, first } = this.frame;
    const prompt = first + at.begin === 0 && at.shown > 4 ? 1 : 0; // token 0 waits for all of it
    this.scale = scaleOf(tokens.total_ms.subarray(at.begin + prompt), this.scale);
    this.drawAxes(g, at);
    this.drawChanges(g, at);
    this.drawParts(g, at, w);
    if (at.lane) this.drawKl(g, at, tokens.kl, w);
    this.drawOrigins(g, at);
    if (this.frame.past) this.drawNow(g, at);
    if (this.cursor.at !== null) {
      const x = at.left + (this.cursor.at - first - at.begin + 0.5) * at.step - 0.5;
      if (x >= at.left) fillBox(g, ink.text, x - 0.5, at.top - 4, 1, this.reach(at), 0.75);
    }
    this.node.dataset.bars = `${at.shown}`;
    const { origins, changes } = this.frame,
      there = { measured: origins.some((o) => !o.emulated), emulated: origins.some((o) => o.emulated) };
    for (const [name, key] of Object.entries(this.keys))
      key.hidden = !(name === "changed" ? changes.length : there[name]);
  }

  /** From above the bars to below the last lane. */
  reach(at) {
    return at.base - at.top + 4 + at.gap + at.lane;
  }

  drawParts(g, at, w) {
    const { ink } = this.look,
      total = new Float32Array(at.shown),
      sums = new Float32Array(at.shown);
    for (const [, column] of this.parts)
      total.forEach((ms, i) => (total[i] = ms + this.frame.tokens[column][at.begin + i]));
    const y = (ms, i) => (at.tall * ms) / Math.max(this.scale, total[i]); // cut: all parts shrink
    for (const [part, column] of this.parts) {
      const values = this.frame.tokens[column],
        over = HATCHED[part],
        lines = over && hatch(g, over.lines(ink), 3, over.way);
      g.fillStyle = ink[part];
      for (let i = 0; i < at.shown; i++) {
        const low = y(sums[i], i),
          high = y((sums[i] += values[at.begin + i]), i);
        if (!(high > low)) continue;
        /** @type {[number, number, number, number]} */
        const bar = [at.left + i * at.step, at.base - high, w, high - low];
        g.fillRect(...bar); // one by one: a path of hundreds of boxes is far slower to fill
        if (!lines) continue;
        g.fillStyle = lines;
        g.fillRect(...bar);
        g.fillStyle = ink[part];
      }
    }
    g.fillStyle = ink.text;
    total.forEach((sum, i) => {
      const x = at.left + i * at.step + w / 2; // a bar taller than the axis ends in an arrow head
      if (sum > this.scale) triangle(g, [x - 3, at.top - 1], [x + 3, at.top - 1], [x, at.top - 6]);
    });
  }

  /** The moment shown: what came after it is faint. */
  drawNow(g, at) {
    const { past, first } = this.frame,
      { ink } = this.look,
      part = partOf(past.token, past.layer, this.model),
      x = Math.round(at.left + (past.token - first - at.begin + part) * at.step),
      right = at.left + at.shown * at.step;
    fillBox(g, ink.ground, x + 1, at.top - 4, Math.max(0, right - x), this.reach(at), 0.62);
    fillBox(g, ink.text, x - 0.5, at.top - 4, 1.5, this.reach(at));
    triangle(g, [x - 5, at.top - 9], [x + 5.5, at.top - 9], [x + 0.25, at.top - 2]);
  }

  drawAxes(g, at) {
    const { ink } = this.look,
      { count, first } = this.frame;
    for (const part of [0, 0.5, 1]) {
      const y = Math.round(at.base - at.tall * part) + 0.5;
      fillBox(g, ink.line, at.left, y - 0.5, at.width, 1, part ? 0.7 : 1);
      fillWords(g, ink.soft, "right", `${+(this.scale * part).toPrecision(3)}`, at.left - 6, y);
    }
    fillWords(g, ink.soft, "right", "ms", at.left - 6, at.top - 13);
    const every = nice(Math.max(5, 56 / at.step)),
      start = first + at.begin;
    for (let t = Math.ceil(start / every) * every; t < first + count; t += every) {
      const x = at.left + (t - start + 0.5) * at.step;
      if (x < at.left + at.width - 8)
        fillWords(g, ink.soft, "center", `${t}`, x, this.sheet.height - 6);
    }
    if (!count)
      fillWords(g, ink.soft, "right", "token", at.left + at.width, this.sheet.height - 6);
  }

  drawChanges(g, at) {
    const { ink } = this.look,
      start = this.frame.first + at.begin,
      ends = [-1e9, -1e9],
      labels = [];
    for (const change of this.frame.changes) {
      const last = at.left + (change.last - start) * at.step;
      if (last < at.left) continue;
      const from = Math.max(at.left, at.left + (change.first - start) * at.step);
      const wide = g.measureText(change.label).width,
        left = Math.min(last, at.left + at.width - wide);
      const row = ends.findIndex((end) => end + 10 < left);
      if (row >= 0) {
        ends[row] = left + wide;
        labels.push([change.label, left, 7 + 14 * row, wide]);
      }
      fillBox(g, ink.text, from, at.top, last - from, at.tall, 0.07);
      for (let y = row < 0 ? at.top : 14 + 14 * row; y < at.base; y += 5)
        fillBox(g, ink.text, Math.round(last) - 0.5, y, 1, 3, 0.8);
    }
    for (const [words, x, y, wide] of labels) {
      fillBox(g, ink.ground, x - 3, y - 7, wide + 6, 14);
      fillWords(g, ink.text, "left", words, x, y + 0.5);
    }
  }

  drawKl(g, at, values, w) {
    const { ink } = this.look,
      low = at.base + at.gap + at.lane,
      high = at.base + at.gap;
    for (const y of [low, (low + high) / 2, high])
      fillBox(g, ink.line, at.left, Math.round(y), at.width, 1, 0.7);
    fillWords(g, ink.kl, "right", "KL 1", at.left - 6, high + 1);
    fillWords(g, ink.soft, "right", "≤10⁻⁴", at.left - 6, low - 1);
    const r = Math.max(1.5, Math.min(2.5, w / 2)),
      spots = new Path2D();
    g.fillStyle = ink.kl;
    for (let i = 0; i < at.shown; i++) {
      const x = values[at.begin + i];
      if (!Number.isFinite(x)) continue;
      const y = low - onLogScale(x, KL_ENDS) * at.lane;
      spots.rect(at.left + i * at.step + w / 2 - r, y - r, 2 * r, 2 * r);
    }
    g.fill(spots);
  }

  /** A strip on the axis: solid where times are measured, hatched where a device is emulated. */
  drawOrigins(g, at) {
    const { origins, first, count } = this.frame,
      start = first + at.begin;
    origins.forEach((o, i) => {
      const a = Math.max(start, o.token),
        b = i + 1 < origins.length ? origins[i + 1].token : first + count;
      if (b <= a) return;
      const fill = o.emulated ? hatch(g, this.look.ink["prefetch late"], 3) : this.look.ink.kl;
      fillBox(g, fill, at.left + (a - start) * at.step, at.base + 2, (b - a) * at.step, 3);
    });
  }

  tokenAt(x) {
    if (!this.frame) return null;
    const at = this.layout(),
      i = Math.floor((x - at.left) / at.step);
    return at.shown > 0 && i >= 0 && i < at.shown ? this.frame.first + at.begin + i : null;
  }

  placeOf(token) {
    const at = this.layout(),
      canvas = this.sheet.node.getBoundingClientRect(),
      right = at.left + (token - this.frame.first - at.begin + 1) * at.step;
    return [canvas.left + right, canvas.top + at.top];
  }

  relabel() {
    const swatch = (part) => {
      const over = part === "deciding" ? part : part in HATCHED ? "late" : "";
      return h("i", { class: `moe-cell ${over}`, style: `--c:${this.look.ink[part]};--f:100%` });
    };
    const strip = (name) => h("i", { class: `moe-cell strip ${name}` });
    this.keys = {
      measured: legendKey(strip("measured"), "measured"),
      emulated: legendKey(strip("late"), "emulated"),
      changed: legendKey(strip("changed"), "settings changed"),
    };
    const parts = this.parts.map(([part]) => legendKey(swatch(part), part));
    this.legend.replaceChildren(...parts, ...Object.values(this.keys));
    this.draw();
  }

  close() {
    this.sheet.close();
  }
}
