// The running figures: large for the last tokens, small for the run since the device changed.

class Figures {
  constructor() {
    const tile = (name, title) => {
      const value = h("b", {}, "–"),
        small = h("small", {}, "");
      return [
        h("div", { class: "moe-tile", title }, h("span", {}, name), value, small),
        value,
        small,
      ];
    };
    this.tiles = {
      tokens_per_s: tile("tokens/s", "Tokens per second, the last 16 tokens"),
      hit_ratio: tile("hit ratio", "Experts found resident, of those hit or loaded on demand"),
      bytes_per_token: tile("read per token", "Bytes read from the device per token"),
      stall_share: tile("stall share", "Part of the time spent waiting for experts"),
      kl_mean: tile("mean KL", "KL divergence of the next-token distribution from full precision"),
    };
    this.fill = h("i");
    this.memory = tile(
      "resident",
      "Bytes of resident experts, loads in flight included, of the budget",
    );
    this.memory[0].insertBefore(
      h("div", { class: "moe-memory", "aria-hidden": true }, this.fill),
      this.memory[2],
    );
    this.memory[0].classList.add("wide");
    this.node = h(
      "section",
      { class: "moe-figures", "aria-label": "Running figures" },
      ...Object.values(this.tiles).map(([node]) => node),
      this.memory[0],
    );
    this.form = {
      tokens_per_s: rate,
      hit_ratio: percent,
      bytes_per_token: bytes,
      stall_share: percent,
      kl_mean: kl,
    };
  }
  show({ recent, whole, resident, origins }) {
    const words = (figure) =>
      origins.length > 1 ? `${figure} since ${origins.at(-1).token}` : `run ${figure}`;
    for (const [key, [, value, small]] of Object.entries(this.tiles)) {
      say(value, this.form[key](recent[key]));
      say(small, whole.tokens ? words(this.form[key](whole[key])) : "");
    }
    const { bytes: held, budget_bytes: budget, experts } = resident;
    say(this.memory[1], bytes(held));
    say(this.memory[2], `of ${bytes(budget)} · ${experts} experts`);
    this.fill.style.width = `${Math.min(100, (100 * held) / budget)}%`;
  }
}
