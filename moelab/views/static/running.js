// The running figures: large for the last tokens, small for the run since the device changed.

import { h, markup, say } from "./element.js";
import { bytes, written } from "./numbers.js";

const TILES = [
  ["tokens_per_s", "tokens/s", "Tokens per second, the last 16 tokens"],
  ["hit_ratio", "hit ratio", "Experts found resident, of those hit or loaded on demand"],
  ["bytes_per_token", "read per token", "Bytes read from the device per token"],
  ["stall_share", "stall share", "Part of the time spent waiting for experts"],
  ["kl_mean", "mean KL", "KL divergence of the next-token distribution from full precision"],
];
const MEMORY = "Bytes of resident experts, loads in flight included, of the budget";

export class RunningFigures {
  constructor() {
    this.tiles = TILES.map(([key, name, title]) => ({ key, ...tile(name, title) }));
    this.memory = tile("resident", MEMORY);
    this.memory.node.classList.add("wide");
    this.fill = h("i", { class: "moe-bar", "aria-hidden": true });
    this.memory.small.before(this.fill);
    const nodes = [...this.tiles, this.memory].map(({ node }) => node);
    this.node = markup`
      <section class="moe-figures" aria-label="Running figures">${nodes}</section>`;
  }

  show({ recent, whole, resident, origins }) {
    const since = origins.length > 1 ? `since ${origins.at(-1).token}` : "";
    for (const { key, value, small } of this.tiles) {
      const run = written(key, whole[key]);
      say(value, written(key, recent[key]));
      say(small, !whole.tokens ? "" : since ? `${run} ${since}` : `run ${run}`);
    }
    const { bytes: held, budget_bytes: budget, experts } = resident;
    say(this.memory.value, bytes(held));
    say(this.memory.small, `of ${bytes(budget)} · ${experts} experts`);
    this.fill.style.setProperty("--p", `${Math.min(100, (100 * held) / budget)}%`);
  }
}

function tile(name, title) {
  const value = h("b", {}, "–"),
    small = h("small");
  const node = markup`<div class="moe-tile" title="${title}"><span>${name}</span>${[value, small]}</div>`;
  return { node, value, small };
}
