// Shadows: what other strategies would have had in memory of the same stream, a small bar each
// beside what this run had; a click puts one in force. The best possible is no strategy.

import { button, h, say } from "./element.js";
import { percent } from "./numbers.js";

/** Those that are no strategies, and names shorter than a strategy's title. */
const SHORT = { run: "this run", belady: "best", layer_lru: "per layer" };
const ABOUT = {
  run: "What this run found, late prefetches included",
  belady: "Belady: whoever is needed last leaves. It needs the future; at these bits no eviction finds more",
};
const FOLLOWING = "what others would have found in memory: following …";
const FEWER_BITS = ["hobbit", "edgemoe"];
const LAG = 2; // tokens behind, from which on it is said

export class Shadows {
  /** `presets` have the titles; `adopt(name)` puts a strategy in force. */
  constructor(presets, adopt) {
    this.titles = new Map(presets.flatMap((g) => g.entries.map((p) => [p.name, p.title])));
    this.adopt = adopt;
    this.bars = new Map();
    this.words = h("span", { class: "moe-soft" });
    this.list = h("span", { class: "moe-shadows" });
    this.node = h("div", { class: "moe-others", role: "group", "aria-label": "Other strategies" });
    this.node.append(this.words, this.list);
  }

  show({ shadows = [], newest, run, running }) {
    const names = shadows.map(({ name }) => name);
    if (run !== this.run || [...this.bars.keys()].some((name) => !names.includes(name))) {
      this.bars.clear();
      this.list.replaceChildren();
      this.run = run;
    }
    const at = shadows[0]?.tokens ?? 0,
      late = newest - at > LAG ? ` by token ${at}` : "";
    say(this.words, names.length ? `in memory${late}:` : running ? FOLLOWING : "");
    for (const shadow of shadows) this.one(shadow);
  }

  one({ name, hit_ratio: ratio, tokens }) {
    const bar = this.bars.get(name) ?? this.make(name),
      title = this.titles.get(name) ?? SHORT[name],
      fewer = FEWER_BITS.includes(name) ? " It serves at fewer bits, of which more fit: Belady's best is of one size." : "",
      more = ABOUT[name] ?? "The same requests, as if every load were there in time. Click: in force from the next token on";
    say(bar.value, percent(ratio));
    bar.fill.style.setProperty("--p", `${100 * ratio}%`);
    bar.node.title = `${title}: ${percent(ratio)} of the requests of ${tokens} decoded tokens found in memory.${fewer} ${more}.`;
  }

  make(name) {
    const value = h("b"),
      fill = h("i", { class: "moe-bar", "aria-hidden": true }),
      words = h("span", {}, SHORT[name] ?? this.titles.get(name) ?? name),
      node = name in ABOUT ? h("span") : button("", { onclick: () => this.adopt(name) });
    node.append(words, value, fill);
    node.classList.add("moe-shadow");
    node.dataset.shadow = name;
    this.list.append(node);
    const bar = { node, value, fill };
    this.bars.set(name, bar);
    return bar;
  }
}
