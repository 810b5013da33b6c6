// The cells of the cache map on its canvas. Each has a look (bits, in flight, used, how fresh its
// load is) and is painted again only where that differs from what is there: of 48 x 128 experts a
// token changes a few hundred.

import { hatch } from "./canvas.js";
import { FILL, still } from "./colours.js";

const FLASH_MS = 450;
const FLASH_STEPS = 4;
export const FADE_MS = 120;
const IN_FLIGHT = 1 << 5, // bits take the five below
  USED = 1 << 6,
  FRESH = 7; // the flash's step stands above this many bits

export class Tiles {
  constructor(look, sheet, { layers, experts, tiers }) {
    this.look = look;
    this.sheet = sheet;
    this.layers = layers;
    this.experts = experts;
    this.tiers = tiers;
    this.fading = false;
    this.x = this.w = this.y = this.t = new Float64Array();
    const n = layers * experts;
    this.flashed = new Float64Array(n).fill(-1e9);
    this.painted = new Int16Array(n).fill(-1);
    this.changed = new Int32Array(n);
  }

  /** Where cells are, on whole pixels of the screen: one is painted without touching the next. */
  grid() {
    const { width, height, ratio } = this.sheet;
    if (this.at?.width === width && this.at.height === height && this.at.ratio === ratio)
      return this.at;
    const left = 22,
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

  /** Nothing of what was painted is there any more. */
  cleared() {
    this.painted.fill(-1);
  }

  /** Paint what differs; `fading` says whether it will look different without a new frame. */
  paint(g, { map, newest }) {
    this.grid();
    const n = this.compare(map, newest),
      { ink, tiers } = this.look;
    const each = (pick, draw) => {
      for (let k = 0; k < n; k++) {
        const i = this.changed[k];
        if (pick(this.painted[i])) draw(...this.box(i), this.painted[i]);
      }
    };
    g.fillStyle = ink.cell;
    each(() => true, (x, y, w, t) => g.fillRect(x, y, w, t));
    for (const tier of this.tiers) {
      g.fillStyle = tiers[tier];
      each(
        (look) => (look & 31) === tier,
        (x, y, w, t) => {
          const fill = Math.max(1, Math.round(t * FILL[tier]));
          g.fillRect(x, y + t - fill, w, fill);
        },
      );
    }
    g.fillStyle = hatch(g, ink["prefetch late"]);
    each((look) => look & IN_FLIGHT, (x, y, w, t) => g.fillRect(x, y, w, t));
    this.paintFlashes(g, each);
    this.paintUses(g, each);
  }

  /** Note the look of each cell, and which have another one than what is painted. */
  compare(map, newest) {
    const { bits, in_flight: flight, used } = map,
      { flashed, painted, changed } = this,
      calm = still(),
      now = performance.now();
    let n = 0;
    this.fading = false;
    for (let i = 0; i < painted.length; i++) {
      let look = bits[i];
      if (flight[i]) look |= IN_FLIGHT;
      if (used[i] === newest && newest >= 0) look |= USED;
      const left = 1 - (now - flashed[i]) / FLASH_MS;
      if (left > 0) {
        look |= (calm ? FLASH_STEPS : Math.ceil(left * FLASH_STEPS)) << FRESH;
        this.fading = true;
      }
      if (look === painted[i]) continue;
      painted[i] = look;
      changed[n++] = i;
    }
    return n;
  }

  paintFlashes(g, each) {
    const most = Math.min(3, this.at.w / 3, this.at.t / 3);
    g.strokeStyle = this.look.ink.load;
    for (let step = 1; step <= FLASH_STEPS; step++) {
      const left = step / FLASH_STEPS,
        line = most * (0.4 + 0.6 * left);
      g.globalAlpha = Math.min(1, 1.5 * left);
      g.lineWidth = line;
      each(
        (look) => look >> FRESH === step,
        (x, y, w, t) => g.strokeRect(x + line / 2, y + line / 2, w - line, t - line),
      );
    }
    g.globalAlpha = 1;
  }

  /** What the newest token used: a dot with a rim, or a hole where a dot would be a blur. */
  paintUses(g, each) {
    const { ground, text } = this.look.ink,
      r = Math.min(3.2, this.at.w / 3, this.at.t / 3);
    g.lineWidth = Math.max(0.75, r / 2.2);
    g.strokeStyle = text;
    each(
      (look) => look & USED,
      (x, y, w, t, look) => {
        const [u, v] = [x + w / 2, y + t / 2];
        if (r < 2) {
          g.fillStyle = look & 31 ? ground : text;
          const side = Math.max(1, Math.round(Math.min(w, t) / 2));
          g.fillRect(x + Math.floor((w - side) / 2), y + Math.floor((t - side) / 2), side, side);
          return;
        }
        g.fillStyle = ground;
        g.beginPath();
        g.arc(u, v, r, 0, 2 * Math.PI);
        g.fill();
        g.stroke();
      },
    );
  }
}

/** Where n cells begin and how large they are, on whole pixels of a screen of this ratio. */
export function spread(n, from, size, gap, ratio) {
  const snap = (i) => Math.round((from + i * size) * ratio) / ratio,
    each = (value) => Float64Array.from({ length: n }, (_, i) => value(i));
  return [each(snap), each((i) => snap(i + 1) - snap(i) - gap)];
}
