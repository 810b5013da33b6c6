// Saved runs in a plane: memory across, speed up; colour and size are the KL, the shape says how it
// was timed.

import { focused, h, markup, svg } from "./element.js";
import { nice, titleOf, written } from "./numbers.js";

export const COLUMNS_OF_RUNS =
  ["tokens_per_s", "hit_ratio", "bytes_per_token", "stall_share", "peak", "kl_mean"];
/** KL below the limit: as fine as so many bits' colour, drawn with this radius. */
const KL_STEPS = [
  { below: 1e-3, bits: 16, r: 5, words: "KL < 0.001" },
  { below: 1e-2, bits: 8, r: 7, words: "< 0.01" },
  { below: 1e-1, bits: 4, r: 9, words: "< 0.1" },
  { below: Infinity, bits: 2, r: 11, words: "0.1 or more" },
];
const FRONT = "★ ringed, dotted line: beaten by no other run on its device";
const SURFACE = "ringed: no other is smaller, faster and nearer to full precision";
/** Tops of an axis whose quarters are round. */
const QUARTERED = [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10];
const SHAPE_OF = {
  measured: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  emulated: (r) => `M0 ${-1.25 * r}L${1.25 * r} 0L0 ${1.25 * r}L${-1.25 * r} 0z`,
  modelled: (r) => `M0 ${-1.2 * r}L${1.15 * r} ${0.8 * r}H${-1.15 * r}z`,
  "page cache": (r) => `M${-r * 0.9} ${-r * 0.9}h${1.8 * r}v${1.8 * r}h${-1.8 * r}z`,
};

/** The top of an axis for a figure of these runs. */
export const topOf = (runs, key) =>
  nice(1.12 * Math.max(1e-9, ...runs.map((run) => run[key] ?? 0)), QUARTERED);

/** The runs no other beats, by rising memory: a line for each device. */
export function fronts(runs) {
  // Of what is modelled the best are a surface: loss is its third side.
  const best = runs.filter((run) => run.best && run.timing !== "modelled").toSorted((a, b) => a.peak - b.peak);
  return Object.values(Object.groupBy(best, (run) => `${run.timing} ${run.device}`));
}

/** The step of a KL; one that is not known is drawn as the smallest. */
export const stepOf = (x) => KL_STEPS.find(({ below }) => (x ?? 0) < below);

const NUMBER = { wide: 20, tall: 12 };

/** Points with the height of their number, `low`: beside the point, or below another's number. */
export function apart(points) {
  const placed = [];
  for (const point of points.toSorted((a, b) => a.y - b.y)) {
    const near = placed.filter((p) => Math.abs(p.x - point.x) < NUMBER.wide);
    placed.push({ ...point, low: Math.max(point.y, ...near.map((p) => p.low + NUMBER.tall)) });
  }
  return placed;
}

const timingOf = ({ timing }) => (timing in SHAPE_OF ? timing : "measured");

/** A run's mark: hollow where the KL is not known. */
function mark(run, look) {
  const { bits, r } = stepOf(run.kl_mean),
    known = run.kl_mean !== null,
    fill = known ? look.tiers[bits] : "transparent";
  return svg("path", { d: SHAPE_OF[timingOf(run)](r), fill, class: known ? "" : "hollow" });
}

export class Scatter {
  constructor(stage, choose, words = "Saved runs: memory against speed") {
    this.stage = stage;
    this.choose = choose;
    this.runs = [];
    this.ticked = [];
    this.sheet = svg("svg", { role: "group", "aria-label": words });
    this.legend = h("div", { class: "moe-legend" });
    this.box = h("div", { class: "moe-plane" }, this.sheet);
    this.node = h("div", { class: "moe-scatter" }, this.box, this.legend);
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.box);
    this.themed = new MutationObserver(() => this.draw());
    this.themed.observe(stage.root, { attributeFilter: ["data-theme"] });
  }

  show(runs, ticked) {
    this.runs = runs;
    this.ticked = ticked;
    this.draw();
  }

  draw() {
    const { clientWidth: wide, clientHeight: tall } = this.box;
    if (!wide || !this.runs.length) return;
    const focus = focused(this.sheet)?.dataset.name;
    const [left, right, top, bottom] = [42, wide - 18, 20, tall - 34],
      [m, s] = [topOf(this.runs, "peak"), topOf(this.runs, "tokens_per_s")];
    const x = (v) => left + ((right - left) * v) / m,
      y = (v) => bottom - ((bottom - top) * v) / s;
    const text = (at, up, words, anchor) =>
      svg("text", { x: at, y: up, "text-anchor": anchor }, words);
    const grid = (d) => svg("path", { d, class: "grid" });
    const parts = [0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
      grid(`M${left} ${y(s * share)}H${right}`),
      grid(`M${x(m * share)} ${top}V${bottom}`),
      text(left - 6, y(s * share) + 4, +(s * share).toPrecision(3), "end"),
      text(x(m * share), bottom + 14, +((m * share) / 1e6).toPrecision(3), "middle"),
    ]);
    parts.push(text(right, bottom + 30, "memory of experts, MB", "end"));
    parts.push(text(4, 9, "tokens/s", "start"));
    for (const line of fronts(this.runs)) {
      const d = line.map((run) => `${x(run.peak)} ${y(run.tokens_per_s)}`).join("L");
      parts.push(svg("path", { d: `M${d}`, class: "front" }));
    }
    const placed = apart(this.runs.map((run) =>
      ({ run, x: x(run.peak), y: y(run.tokens_per_s), r: stepOf(run.kl_mean).r })));
    placed.sort((a, b) => b.r - a.r); // a small mark is not hidden by a large one
    this.sheet.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
    this.sheet.replaceChildren(...parts, ...placed.map((at) => this.point(at)));
    if (focus) [...this.sheet.querySelectorAll("g")].find((g) => g.dataset.name === focus)?.focus();
    this.relabel();
  }

  point({ run, x, y, r, low }) {
    const on = this.ticked.includes(run.name),
      { tip, look } = this.stage;
    const modelled = run.timing === "modelled",
      keys = modelled ? ["tokens_per_s", "hit_ratio", "budget_bytes", "kl_mean"] : COLUMNS_OF_RUNS;
    const words = [
      ...keys.map((key) => [key === "budget_bytes" ? "budget" : titleOf(key), written(key, run[key])]),
      [run.timing, run.device],
      ...(run.best ? [["★", modelled ? SURFACE : "not beaten on its device"]] : []),
    ];
    const show = () => {
      const box = node.getBoundingClientRect();
      tip.show(box.right, box.top, `${run.number}  ${run.name}`.trim(), words);
    };
    const hide = () => tip.hide(),
      choose = () => this.choose(run.name);
    const node = svg(
      "g",
      {
        transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
        class: `point${on ? " on" : ""}`,
        ...{ tabindex: 0, role: "button", "aria-pressed": `${on}`, "data-name": run.name },
        "aria-label": `${run.name}: ${words.map((pair) => pair.join(" ")).join(", ")}`,
        onpointerenter: show, onpointerleave: hide, onfocus: show, onblur: hide,
        onclick: choose,
        onkeydown: (e) => {
          if (e.key !== "Enter" && e.key !== " ") return;
          e.preventDefault();
          choose();
        },
      },
      ...(run.best ? [svg("path", { d: SHAPE_OF[timingOf(run)](r + 3.5), class: "ring" })] : []),
      mark(run, look),
      svg("text", { x: 18, y: 4 + low - y }, run.number),
    );
    return node;
  }

  relabel() {
    const { runs } = this,
      timings = Object.keys(SHAPE_OF).filter((timing) => runs.some((run) => timingOf(run) === timing)),
      unknown = runs.some((run) => run.kl_mean === null);
    const key = (words, kl_mean, timing = timings[0], name = "") => {
      const box = { viewBox: "-13 -13 26 26", class: "moe-mark" },
        node = svg("svg", box, mark({ timing, kl_mean }, this.stage.look));
      return markup`<span class="moe-key ${name}">${node}${words}</span>`;
    };
    this.legend.replaceChildren(
      ...timings.map((timing) => key(timing, 1e-3, timing, "shape")),
      ...KL_STEPS.map(({ below, words }) => key(words, Math.min(1, below / 2))),
      ...(unknown ? [key("KL not measured", null)] : []),
      h("span", {}, timings.includes("modelled") ? SURFACE : FRONT),
      ...(timings.length > 1 ? [h("span", {}, "speeds of different shapes are not one clock's")] : []),
    );
  }

  close() {
    this.watch.disconnect();
    this.themed.disconnect();
  }
}
