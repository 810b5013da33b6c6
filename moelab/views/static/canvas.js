// Drawing: a canvas that keeps to its box, and what is stamped and hatched on it.

import { h, SHAPES } from "./element.js";

/** A canvas at the screen's own resolution that is drawn again when its box changes. */
export class Sheet {
  /** @param {string} label @param {() => void} redraw */
  constructor(label, redraw) {
    // Arrow keys move in it: as an "application" a screen reader lets them through.
    this.node = h("canvas", {
      class: "moe-canvas", tabindex: 0, role: "application",
      "aria-roledescription": "chart", "aria-label": label,
    });
    this.box = h("div", { class: "moe-sheet" }, this.node);
    this.width = this.height = this.ratio = 0;
    this.observer = new ResizeObserver(() => {
      if (this.fit()) redraw();
    });
    this.observer.observe(this.box);
  }
  fit() {
    const { clientWidth, clientHeight } = this.box;
    const ratio = globalThis.devicePixelRatio || 1;
    if (clientWidth === this.width && clientHeight === this.height && ratio === this.ratio)
      return false;
    Object.assign(this, { width: clientWidth, height: clientHeight, ratio });
    this.node.width = Math.round(clientWidth * ratio);
    this.node.height = Math.round(clientHeight * ratio);
    const { fontFamily, fontSize } = getComputedStyle(this.box);
    this.family = fontFamily;
    this.size = parseFloat(fontSize);
    return true;
  }
  /** A font that many pixels smaller than the text around. */
  font(smaller) {
    return `${this.size - smaller}px ${this.family}`;
  }
  begin() {
    const g = this.node.getContext("2d");
    g.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    g.clearRect(0, 0, this.width, this.height);
    g.font = this.font(1);
    g.textBaseline = "middle";
    return g;
  }
  /** Hear events of the canvas, by name. */
  on(handlers) {
    for (const [event, hear] of Object.entries(handlers)) this.node.addEventListener(event, hear);
  }
  /** @param {string} words what a screen reader says of it */
  name(words) {
    this.node.setAttribute("aria-label", words);
  }
  close() {
    this.observer.disconnect();
  }
}

const made = new Map();

/** What is made once for a key. */
function once(key, make) {
  if (!made.has(key)) made.set(key, make());
  return made.get(key);
}

/** Draw the shape of a kind around (x, y). */
export function stamp(g, kind, x, y, size = 10) {
  g.save();
  g.translate(x - size / 2, y - size / 2);
  g.scale(size / 12, size / 12);
  g.fill(once(kind, () => new Path2D(SHAPES[kind])));
  g.restore();
}

/** Fill a box with a colour or a hatch. */
export function fillBox(g, fill, x, y, wide, tall, alpha = 1) {
  g.globalAlpha = alpha;
  g.fillStyle = fill;
  g.fillRect(x, y, wide, tall);
  g.globalAlpha = 1;
}

/** Write words that end, begin or have their middle at x, no wider than `most` if it is given. */
export function fillWords(g, ink, align, words, x, y, most) {
  g.fillStyle = ink;
  g.textAlign = align;
  g.fillText(words, x, y, most);
}

/** Fill the triangle of three corners. */
export function triangle(g, ...corners) {
  g.beginPath();
  for (const corner of corners) g.lineTo(...corner);
  g.fill();
}

/** Diagonal lines, for what must be told apart without colour; `way` -1: falling ones. */
export const hatch = (g, colour, gap = 4, way = 1) =>
  once(`${colour} ${gap} ${way}`, () => {
    const tile = document.createElement("canvas");
    tile.width = tile.height = gap * 2;
    const t = tile.getContext("2d");
    t.strokeStyle = colour;
    t.lineWidth = gap * 0.55;
    for (const x of [-gap, gap, gap * 3]) {
      t.moveTo(x - gap, gap * 3);
      t.lineTo(x + gap * 2, 0);
    }
    t.stroke();
    const pattern = g.createPattern(tile, "repeat");
    pattern.setTransform(new DOMMatrix().scale(0.5 * way, 0.5));
    return pattern;
  });
