// Colours, numbers and the small pieces of page that every view shares.
// The files of this folder are joined into one module, in the order dashboard.py names.

// Viridis, turned so that more bits stand out more from the background in both themes.
const TIERS = {
  light: { 16: "#482475", 8: "#355f8d", 4: "#21918c", 3: "#44bf70", 2: "#9bd93c" },
  dark: { 16: "#fde725", 8: "#7ad151", 4: "#22a884", 3: "#2f86a8", 2: "#6a74cf" },
};
// The second cue: how far a cell is filled.
const FILL = { 16: 1, 8: 0.74, 4: 0.5, 3: 0.36, 2: 0.24 };
// Okabe and Ito's colours; one colour per cause of waiting, the same in every view.
const INK = {
  light: {
    compute: "#56a0d3",
    "on demand": "#d55e00",
    "prefetch late": "#e69f00",
    evict: "#a8518a",
    kl: "#00795a",
    hit: "#00795a",
    load: "#d55e00",
    prefetch: "#b87a00",
    downgrade: "#0072b2",
    substitute: "#a8518a",
    text: "#1f2328",
    soft: "#656d76",
    line: "#d0d7de",
    cell: "#f0f2f5",
    ground: "#ffffff",
  },
  dark: {
    compute: "#4d8fc4",
    "on demand": "#f0762b",
    "prefetch late": "#f0b429",
    evict: "#d98cc0",
    kl: "#2fc79a",
    hit: "#2fc79a",
    load: "#ff7f3a",
    prefetch: "#f0b429",
    downgrade: "#6cb6ee",
    substitute: "#d98cc0",
    text: "#e6e8eb",
    soft: "#9aa4af",
    line: "#3a4048",
    cell: "#22262b",
    ground: "#111111",
  },
};
const MOTION = matchMedia("(prefers-reduced-motion: reduce)");
const still = () => MOTION.matches;

/** Build an element: h("div", { class: "x", onclick }, "text", child). */
function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false)
      node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// What happened to an expert, as a shape in a box of 12 by 12: the same in the page and on a canvas.
const SHAPES = {
  hit: "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
  load: "M1 2h10L6 10.5z",
  prefetch: "M1 1.5L6 6 1 10.5zM6 1.5L11 6 6 10.5z",
  downgrade: "M4.4 1h3.2v5H11L6 11.4 1 6h3.4z",
  skip: "M1 4.8h10v2.4H1z",
  substitute: "M6 .8L11.2 6 6 11.2.8 6z",
  evict:
    "M2.6 1.2L6 4.6l3.4-3.4 1.4 1.4L7.4 6l3.4 3.4-1.4 1.4L6 7.4l-3.4 3.4-1.4-1.4L4.6 6 1.2 2.6z",
};
const paths = new Map();

/** Draw the shape of a kind around (x, y). */
function stamp(g, kind, x, y, size = 10) {
  if (!paths.has(kind)) paths.set(kind, new Path2D(SHAPES[kind]));
  g.save();
  g.translate(x - size / 2, y - size / 2);
  g.scale(size / 12, size / 12);
  g.fill(paths.get(kind));
  g.restore();
}

/** The shape of a kind as an element. */
function icon(kind) {
  const node = h("i", { class: "moe-icon", "aria-hidden": true });
  shape(node, kind);
  return node;
}

/** Make an icon one of this kind. */
function shape(node, kind) {
  if (node.dataset.kind === kind) return;
  node.dataset.kind = kind;
  node.style.clipPath = `path("${SHAPES[kind]}")`;
}

/** Write text only where it differs, so that nothing is laid out twice. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const fixed = (x, digits) => (x === null || !Number.isFinite(x) ? "–" : x.toFixed(digits));
const percent = (x) => (x === null ? "–" : `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`);
const rate = (x) => fixed(x, x < 10 ? 2 : x < 100 ? 1 : 0);
const millis = (x) => `${fixed(x, x < 10 ? 2 : x < 100 ? 1 : 0)} ms`;
function bytes(x) {
  if (x === null || !Number.isFinite(x)) return "–";
  const [size, unit] =
    x >= 1e9 ? [1e9, "GB"] : x >= 1e6 ? [1e6, "MB"] : x >= 1e3 ? [1e3, "kB"] : [1, "B"];
  const value = x / size;
  return `${value.toFixed(value < 10 && unit !== "B" ? 2 : value < 100 && unit !== "B" ? 1 : 0)} ${unit}`;
}
/** A number with three digits, however large or small. */
const short = (x) => (x === null || x === undefined ? "–" : `${+x.toPrecision(3)}`);
function kl(x) {
  if (x === null || !Number.isFinite(x)) return "–";
  if (x < 1e-4)
    return x < 1e-6
      ? "0"
      : x
          .toExponential(0)
          .replace("e-", "·10⁻")
          .replace(/\d$/, (d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]);
  return x < 0.01 ? x.toFixed(4) : x.toFixed(3);
}
/** The next round number at or above x: 1, 2, 5, 10, 20 … or finer steps. */
function nice(x, steps = [1, 2, 5, 10]) {
  const ten = 10 ** Math.floor(Math.log10(x));
  return steps.map((m) => m * ten).find((m) => m >= x * 0.9999) ?? 10 * ten;
}
function quantile(values, q) {
  const sorted = Float32Array.from(values).sort();
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : 0;
}

/** Light or dark, from the colour the widget really has; it has none before it is on the page. */
function themeOf(root) {
  const [r, g, b] = (
    getComputedStyle(root).backgroundColor.match(/[\d.]+/g) ?? [255, 255, 255]
  ).map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b < 128 ? "dark" : "light";
}

/** Whether stronger lines are asked for: by the reader's settings or a high-contrast theme. */
const STRONG = matchMedia("(prefers-contrast: more), (forced-colors: active)");
const inkOf = (theme) =>
  STRONG.matches ? { ...INK[theme], soft: INK[theme].text, line: INK[theme].soft } : INK[theme];

/** A canvas at the screen's own resolution that is drawn again when its box changes. */
class Sheet {
  constructor(label, redraw) {
    // Arrow keys move in it: as an "application" a screen reader lets them through.
    this.node = h("canvas", { class: "moe-canvas", tabindex: 0, role: "application" });
    this.node.setAttribute("aria-roledescription", "chart");
    this.node.setAttribute("aria-label", label);
    this.box = h("div", { class: "moe-sheet" }, this.node);
    this.width = this.height = 0;
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
    Object.assign(this, { family: fontFamily, size: parseFloat(fontSize) });
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
  close() {
    this.observer.disconnect();
  }
}

/**
 * Whether a slider is in a hand. A drag may end anywhere on the page, and where it ends as it began
 * there is no change event: `settle` is called either way.
 */
class Hold {
  constructor(slider, settle) {
    this.held = false;
    slider.addEventListener("pointerdown", () => (this.held = true));
    this.release = () => {
      if (!this.held) return;
      this.held = false;
      settle();
    };
    for (const end of ENDS) document.addEventListener(end, this.release, true);
  }
  close() {
    for (const end of ENDS) document.removeEventListener(end, this.release, true);
  }
}
const ENDS = ["pointerup", "pointercancel"];

const hatches = new Map();

/** Diagonal lines, for what must be told apart without colour. */
function hatch(g, colour, gap = 4) {
  const key = `${colour} ${gap}`;
  if (!hatches.has(key)) hatches.set(key, drawHatch(g, colour, gap));
  return hatches.get(key);
}

function drawHatch(g, colour, gap) {
  const tile = document.createElement("canvas");
  tile.width = tile.height = gap * 2;
  const t = tile.getContext("2d");
  t.strokeStyle = colour;
  t.lineWidth = gap * 0.55;
  for (const x of [-gap, gap, gap * 3]) {
    t.moveTo(x - gap, gap * 2 + gap);
    t.lineTo(x + gap * 2, -gap + gap);
  }
  t.stroke();
  const pattern = g.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(0.5));
  return pattern;
}

/** Say where times come from; measured and emulated never look alike. */
function showBadge(node, device, words) {
  node.classList.toggle("emulated", device.emulated);
  node.title = device.emulated
    ? "Loads are held back to the named device's speed, in real time. Where this machine's disk is the slower one, times are the disk's."
    : "Loads take what this machine's disk takes.";
  say(node, words);
}

const STATUS_BAR = 30; // below a notebook

/** One tooltip for the whole dashboard; rows are [name, value] or one string. */
class Tip {
  constructor(root) {
    this.root = root;
    this.node = h("div", { class: "moe-tip", role: "tooltip", hidden: true });
    root.append(this.node);
  }
  show(x, y, title, rows, extra = []) {
    const list = h("dl");
    for (const [name, value] of rows) list.append(h("dt", {}, name), h("dd", {}, value));
    this.node.replaceChildren(h("strong", {}, title), list, ...extra);
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
