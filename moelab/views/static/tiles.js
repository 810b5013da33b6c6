// The cells of the cache map on its canvas: how many bits are resident, what is in flight, what was
// just loaded and what the newest token used. All of them are painted each time.

import { fillBox, hatch } from "./canvas.js";
import { FILL } from "./colours.js";

const ROOMY = 12; // px a cell needs for a dot with a rim; below it is a square

export class Tiles {
  constructor(look, sheet, { layers, experts, encoder_layers }) {
    this.look = look;
    this.sheet = sheet;
    this.layers = layers;
    this.experts = experts;
    this.left = encoder_layers ? 34 : 22; // the names of two stacks stand beside the layers' numbers
    this.x = this.w = this.y = this.t = new Float64Array();
  }

  /** Where cells are, on whole pixels of the screen. */
  grid() {
    const { width, height, ratio } = this.sheet;
    if (this.at?.width === width && this.at.height === height && this.at.ratio === ratio)
      return this.at;
    const { left } = this,
      w = (width - left - 2) / this.experts,
      t = (height - 16) / this.layers,
      gapOf = (size) => (Math.min(w, t) > 9 ? 2 : size > 4 ? 1 : 0); // thin columns would look uneven
    [this.x, this.w] = spread(this.experts, left, w, gapOf(w), ratio);
    [this.y, this.t] = spread(this.layers, 0, t, gapOf(t), ratio);
    this.at = { width, height, ratio, left, w, t, gap: gapOf(t) };
    return this.at;
  }

  box(i) {
    const e = i % this.experts,
      l = (i - e) / this.experts;
    return [this.x[e], this.y[l], this.w[e], this.t[l]];
  }

  /** Paint them; in the past, loads are among the marks of the token shown. */
  paint(g, { map, newest, past }) {
    this.grid();
    const { ink, tiers } = this.look,
      { bits, in_flight: flight, used, loaded } = map;
    const each = (pick, draw) => {
      for (let i = 0; i < bits.length; i++) if (pick(i)) draw(i, ...this.box(i));
    };
    this.paintGround(g, ink.cell);
    for (const [tier, colour] of Object.entries(tiers)) {
      g.fillStyle = colour;
      each((i) => bits[i] === +tier, (_, x, y, w, t) => {
        const fill = Math.min(t, Math.max(2, Math.round(t * FILL[tier])));
        g.fillRect(x, y + t - fill, w, fill);
      });
    }
    g.fillStyle = hatch(g, ink["prefetch late"]);
    each((i) => flight[i], (_, x, y, w, t) => g.fillRect(x, y, w, t));
    const line = Math.min(3, Math.max(1, Math.min(this.at.w, this.at.t) / 7));
    g.strokeStyle = ink.load;
    g.lineWidth = line;
    each((i) => loaded[i] === newest && newest >= 0 && !past, (_, x, y, w, t) =>
      g.strokeRect(x + line / 2, y + line / 2, w - line, t - line),
    );
    this.paintUses(g, each, (i) => used[i] === newest && newest >= 0, bits);
  }

  /** Empty cells: one box, cut by the gaps between rows and columns. */
  paintGround(g, colour) {
    const { x, w, y, t } = this,
      right = x.at(-1) + w.at(-1),
      low = y.at(-1) + t.at(-1);
    fillBox(g, colour, x[0], 0, right - x[0], low);
    const gaps = (from, size) => [...from.slice(1)].map((next, i) => [from[i] + size[i], next]);
    for (const [a, b] of gaps(x, w)) g.clearRect(a, 0, b - a, low);
    for (const [a, b] of gaps(y, t)) g.clearRect(x[0], a, right, b - a);
  }

  /** What the newest token used: a dot with a rim, or a square where dots would drown the map. */
  paintUses(g, each, isUsed, bits) {
    const { ground, text } = this.look.ink,
      small = Math.min(this.at.w, this.at.t),
      r = Math.min(3.2, small / 3);
    g.lineWidth = r / 2.2;
    g.strokeStyle = text;
    each(isUsed, (i, x, y, w, t) => {
      if (small < ROOMY) {
        const side = Math.max(1, Math.round(Math.min(w, t) / 2));
        fillBox(g, FILL[bits[i]] > 0.5 ? ground : text, x + (w - side) / 2, y + (t - side) / 2, side, side);
        return;
      }
      g.fillStyle = ground;
      g.beginPath();
      g.arc(x + w / 2, y + t / 2, r, 0, 2 * Math.PI);
      g.fill();
      g.stroke();
    });
  }
}

/** Where n cells begin and how large they are, on whole pixels of a screen of this ratio. */
export function spread(n, from, size, gap, ratio) {
  const snap = (i) => Math.round((from + i * size) * ratio) / ratio,
    each = (value) => Float64Array.from({ length: n }, (_, i) => value(i));
  return [each(snap), each((i) => snap(i + 1) - snap(i) - gap)];
}
