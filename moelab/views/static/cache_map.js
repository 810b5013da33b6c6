// The cache map: layers down, experts across. Colour and fill are the resident bits; an orange
// frame marks what was loaded for the newest token, a dot what it used.

import { fillBox, fillWords, Sheet, stamp, triangle } from "./canvas.js";
import { FILL } from "./colours.js";
import { h, icon, legendKey, markup } from "./element.js";
import { percent, short, shortTier, tierName } from "./numbers.js";
import { MARKS } from "./replay.js";
import { Tiles } from "./tiles.js";
import { drawWhy } from "./tip.js";

const EMPTY = "; an empty cell with this mark has left again within the token";

/** Twenty pixels a layer where there are few; eight, or of very many six, at least. */
const tallFor = (layers) => Math.max(108, Math.min(208, layers * 18), layers * (layers > 36 ? 6 : 8));

export class CacheMap {
  /** `onPick(layer, expert)` is called for an expert that is clicked. */
  constructor(look, tip, why, options, onPick) {
    this.look = look;
    this.tip = tip;
    this.why = why;
    this.layers = options.layers;
    this.encoder = options.encoder_layers ?? 0;
    this.experts = options.experts;
    this.tiers = options.tiers;
    this.onPick = onPick;
    this.at = this.chosen = null;
    const label = "Cache map: layers by experts, arrow keys move, Enter shows a life";
    this.sheet = new Sheet(label, () => this.draw());
    this.sheet.box.style.height = `${tallFor(this.layers) + 16}px`;
    this.tiles = new Tiles(look, this.sheet, options);
    this.frame = null;
    this.legend = h("div", { class: "moe-legend" });
    this.node = markup`
      <section class="moe-panel moe-map" aria-label="Cache map">
        <header><h3>Cache map</h3>${this.legend}</header>
        ${this.sheet.box}
      </section>`;
    this.sheet.on({
      pointermove: (e) => this.point(this.cellAt(e.offsetX, e.offsetY), e),
      pointerleave: () => this.point(null),
      blur: () => this.point(null),
      click: (e) => this.pick(this.cellAt(e.offsetX, e.offsetY)),
      keydown: (e) => this.key(e),
    });
  }

  key(event) {
    const { experts } = this;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -experts, ArrowDown: experts }[event.key];
    if (event.key === "Escape") this.point(null);
    if (event.key === "Enter") this.pick(this.at);
    if (step === undefined) return;
    event.preventDefault();
    const next = this.at === null ? 0 : this.at + step;
    if (next >= 0 && next < this.layers * experts) this.point(next);
  }

  pick(cell) {
    if (cell !== null) this.onPick(Math.floor(cell / this.experts), cell % this.experts);
  }

  /** The expert whose life is shown; null: none. */
  choose(cell) {
    this.chosen = cell;
    this.draw();
  }

  show(frame) {
    this.frame = frame;
    this.draw();
    if (this.at !== null) this.describe();
  }

  draw() {
    if (!this.frame || !this.sheet.width) return;
    const g = this.sheet.begin(),
      { tiles } = this;
    tiles.paint(g, this.frame);
    if (this.frame.past) this.drawPast(g, tiles.grid());
    this.drawAxes(g, tiles.grid());
    if (this.encoder) this.drawStacks(g, tiles.grid());
    for (const [cell, line] of [[this.chosen, 2.5], [this.at, 2]]) {
      if (cell === null) continue;
      g.strokeStyle = this.look.ink.text;
      g.lineWidth = line;
      const [x, y, w, t] = tiles.box(cell);
      g.strokeRect(x - 1, y - 1, w + 2, t + 2);
    }
  }

  /** What the token shown did by then: loaded and prefetched experts, those that left, the layer. */
  drawPast(g, grid) {
    const { marks } = this.frame.map,
      { ink } = this.look,
      line = Math.max(1, Math.min(2.5, grid.w / 5, grid.t / 5)),
      size = Math.max(4, Math.min(9, grid.w * 0.8, grid.t * 0.8));
    g.lineWidth = line;
    for (let i = 0; i < marks.length; i++) {
      if (!marks[i]) continue;
      const [x, y, w, t] = this.tiles.box(i);
      if (marks[i] === MARKS.evict) {
        g.fillStyle = ink.soft;
        const aside = w > 16 ? w - size * 0.6 : w / 2; // the middle says what was used
        stamp(g, "evict", x + aside, y + t / 2, size);
        continue;
      }
      g.strokeStyle = marks[i] === MARKS.load ? ink.load : ink.prefetch;
      g.setLineDash(marks[i] === MARKS.load ? [] : [3, 2]);
      g.strokeRect(x + line / 2, y + line / 2, w - line, t - line);
    }
    g.setLineDash([]);
    const { layer } = this.frame.past,
      y = (layer + 1) * grid.t - grid.gap / 2;
    const right = grid.left + this.experts * grid.w;
    fillBox(g, ink.text, 2, Math.max(0.5, y - 0.75), right - 2, 1.5);
    triangle(g, [0, y - 5], [6, y], [0, y + 5]);
  }

  /** A line between the encoder's layers and the decoder's, which are named where there is room. */
  drawStacks(g, grid) {
    const { soft } = this.look.ink,
      border = this.encoder * grid.t;
    fillBox(g, soft, 0, border - grid.gap / 2 - 0.5, grid.left + this.experts * grid.w, 1);
    const name = (words, from, to) => {
      if (g.measureText(words).width > to - from - 4) return;
      g.save();
      g.translate(10, (from + to) / 2);
      g.rotate(-Math.PI / 2);
      fillWords(g, soft, "center", words, 0, 0);
      g.restore();
    };
    name("encoder", 0, border);
    name("decoder", border, this.layers * grid.t);
  }

  drawAxes(g, grid) {
    const { soft } = this.look.ink,
      down = Math.ceil(13 / grid.t),
      across = [1, 2, 4, 8, 16, 32].find((n) => n * grid.w >= 22) ?? 64;
    g.font = this.sheet.font(2);
    for (let l = 0; l < this.layers; l += down)
      fillWords(g, soft, "right", `${l}`, grid.left - 6, Math.max(5, (l + 0.5) * grid.t));
    const y = this.layers * grid.t + 8;
    for (let e = 0; e < this.experts; e += across)
      fillWords(g, soft, "center", `${e}`, grid.left + (e + 0.5) * grid.w, y);
  }

  cellAt(x, y) {
    const { left, w, t } = this.tiles.grid();
    const e = Math.floor((x - left) / w),
      l = Math.floor(y / t);
    return e >= 0 && e < this.experts && l >= 0 && l < this.layers ? l * this.experts + e : null;
  }

  point(at, event) {
    if (at === this.at && !event) return;
    this.at = at;
    this.draw();
    if (at === null) {
      this.tip.hide();
      this.why?.forget();
      return;
    }
    const canvas = this.sheet.node.getBoundingClientRect(),
      [x, y, w, t] = this.tiles.box(at);
    const beside = [canvas.left + x + w, canvas.top + y + t / 2];
    this.where = event ? [event.clientX, event.clientY] : beside;
    this.describe();
  }

  describe() {
    if (!this.frame || this.at === null) return;
    const { bits, in_flight: flight, used, loaded, uses } = this.frame.map,
      { newest } = this.frame,
      i = this.at;
    const layer = Math.floor(i / this.experts),
      row = uses.subarray(layer * this.experts, (layer + 1) * this.experts);
    const total = row.reduce((a, b) => a + b, 0),
      rank = row.filter((n) => n > uses[i]).length + 1;
    const token = (n, never = "never") => (n < 0 ? never : `token ${n}`);
    const share = total ? ` (${percent(uses[i] / total)}, rank ${rank} of ${this.experts})` : "";
    const left = newest >= 0 && [used[i], loaded[i]].includes(newest) ? ", left again" : "";
    const rows = [
      ["resident", bits[i] ? `${tierName(bits[i])}${flight[i] ? ", in flight" : ""}` : `no${left}`],
      ["uses", `${uses[i]}${share}`],
      ["last used", token(used[i], "not in this run")],
      ["last load", token(loaded[i], bits[i] ? "before this run" : "not in this run")],
    ];
    const expert = i % this.experts,
      title = `layer ${layer}, expert ${expert}`,
      ask = bits[i] && this.why && !this.frame.past,
      why = ask ? this.why.about(layer, expert, this.frame.seq) : undefined;
    const extra = [this.popularity(row, expert), ...(why ? [drawWhy(why)] : [])];
    this.tip.show(...this.where, title, rows, extra);
    const terms = (why?.terms ?? []).map((t) => [`${why.policy}, ${t.name}`, short(t.value)]);
    this.sheet.name(`${title}: ${[...rows, ...terms].map((r) => r.join(" ")).join(", ")}`);
  }

  /** How often this layer's experts were used, as a row of bars. */
  popularity(row, expert) {
    const most = Math.max(1, ...row),
      bar = (n, e) =>
        h("i", { style: `height:${Math.max(4, (100 * n) / most)}%`, class: e === expert ? "on" : "" });
    return markup`<div class="moe-popular" aria-hidden="true">${[...row].map(bar)}</div>`;
  }

  relabel() {
    const { tiers } = this.look,
      key = (words, name, style, title = "") => {
        const made = legendKey(h("i", { class: `moe-cell ${name}`, style }), words);
        made.title = title;
        return made;
      },
      left = legendKey(icon("evict"), "left");
    left.classList.add("moe-only-past");
    this.legend.replaceChildren(
      ...this.tiers.map((b) => key(shortTier(b), "", `--c:${tiers[b]};--f:${100 * FILL[b]}%`)), "bit",
      key("loaded", "loaded", "", `Loaded for the token shown${EMPTY}`),
      key("in flight", "flight"),
      key("used now", "used", "", `Used by the token shown${EMPTY}`), left,
    );
    this.draw();
  }

  close() {
    this.why?.close();
    this.sheet.close();
  }
}
