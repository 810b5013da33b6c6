// The running figures: tiles in plain words, large for the last tokens and small for the run since
// the device changed; below them where a token's time goes, and in a sentence why.

import { h, markup, say } from "./element.js";
import { bytes, millis, rate, written } from "./numbers.js";
import { Shadows } from "./shadows.js";

const TILES = [
  ["tokens_per_s", "speed", "tokens/s", "Tokens a second as a watch shows them"],
  ["hit_ratio", "found in memory", "hit ratio", "Requests for an expert that found it resident"],
  ["bytes_per_token", "read from disk", "a token", "Bytes read from the device, also ahead of need"],
  ["stall_share", "spent waiting", "stalled", "Stall share: part of the time spent waiting for experts"],
  ["kl_mean", "off full precision", "mean KL", "KL divergence of the next token's distribution"],
];
const DRAFTS = "Drafted tokens that the verifier would have written too; what is read is told for each token kept";
const MEMORY = "Bytes of resident experts, loads in flight included, of the budget";

/** What a token's time goes into: [column, words]. */
const SPENT = [
  ["compute_ms", "computing"], ["deciding_ms", "deciding"],
  ["on demand", "waiting on demand"], ["prefetch late", "waiting for late prefetches"],
  ["evict", "waiting to evict"],
  ["measuring_ms", "measuring"], ["setup_ms", "set-up"],
];
const LEAST_MS = 0.005;

/**
 * Means per token from index `from` to before `to`, ms: words and value of each part.
 * @returns {[string, number][]}
 */
export function spentOn(tokens, from, to = from + 1) {
  const mean = (values) => values.subarray(from, to).reduce((a, b) => a + b, 0) / (to - from);
  return SPENT.filter(([name]) => tokens[name]).map(([name, words]) => [words, mean(tokens[name])]);
}

/** Parts and their sum, which is what a watch shows: ["13.1 ms", "10.7 computing + ..."]. */
export function inSum(parts) {
  const told = parts.filter(([, ms]) => ms >= LEAST_MS).map(([words, ms]) => `${rate(ms)} ${words}`);
  return [millis(parts.reduce((sum, [, ms]) => sum + ms, 0)), told.join(" + ")];
}

/** Of the newest tokens; token 0 carries the prefill. */
function lately({ tokens, first, span: [begin, end], recent }) {
  const from = Math.max(1, begin) - first,
    [total, parts] = inSum(spentOn(tokens, from, end - first)),
    { tokens_per_s: seen, engine_tokens_per_s: own } = recent,
    alone = own > 1.02 * seen ? ` · ${rate(own)} tokens/s without measuring` : "";
  return end - first > from ? `${total} a token = ${parts}${alone}` : "";
}

function ofGuesses({ right = 0, late = 0, wasted = 0 }) {
  if (!(right + late + wasted)) return "";
  return ` · read ahead: ${bytes(right)} right, ${bytes(late)} late, ${bytes(wasted)} wasted`;
}

const inVainOf = ({ rejected_bytes: lost }) =>
  lost ? ` · ${bytes(lost)} of the reads for rejected tokens` : "";

export class RunningFigures {
  /** `adopt(name)` puts another strategy in force; null: nobody could. */
  constructor({ dense_bytes = 0, dense_bits, presets = [] }, adopt) {
    this.dense = dense_bytes;
    this.tiles = TILES.map(([key, name, term, title]) => ({ key, term, title, ...tile(name, title) }));
    this.memory = tile("in memory, resident", MEMORY);
    this.memory.node.classList.add("wide");
    this.fill = h("i", { class: "moe-bar", "aria-hidden": true });
    this.beside = h("i", { class: "moe-bar dense", "aria-hidden": true, hidden: !dense_bytes });
    this.memory.small.before(h("div", { class: "moe-held" }, this.fill, this.beside));
    const words = `Below: attention, head and all else that is no expert's, ${bytes(dense_bytes)}, large weights at ${dense_bits} bit.`;
    if (dense_bytes) this.memory.node.title = `${MEMORY}. ${words}`;
    this.drafts = tile("drafts accepted", DRAFTS);
    const nodes = [...this.tiles, this.drafts, this.memory].map(({ node }) => node);
    this.of = h("p", { class: "moe-of", role: "status" });
    this.spent = h("p");
    this.says = h("b");
    this.moved = h("span");
    this.lines = h("p", { class: "moe-says" }, this.says, this.moved);
    this.shadows = adopt && new Shadows(presets, adopt);
    this.node = markup`
      <section class="moe-account" aria-label="Running figures">
        ${this.of}
        <div class="moe-figures">${nodes}</div>
        ${this.shadows?.node ?? null}
        <div class="moe-told">${[this.spent, this.lines]}</div>
      </section>`;
  }

  show(frame) {
    const { recent, whole, resident, origins, of, sentence, change, guesses, past } = frame,
      since = origins.length > 1 && origins.at(-1).token,
      until = past ? `up to ${past.token}` : "run"; // a moment of the past knows nothing later
    for (const { key, term, title, value, small, node } of this.tiles) {
      const all = written(key, whole[key]);
      say(value, written(key, recent[key]));
      say(small, !whole.tokens ? term : since ? `since ${since}: ${all}` : `${term} · ${until} ${all}`);
      node.title = `${title}. Large: the newest 16 tokens. Small: ${
        since ? `from token ${since} on, where the device changed` : "the whole run"}${
        past ? `, up to token ${past.token}` : ""}${
        key === "kl_mean" ? "" : ", without token 0, which carries the prompt"}.`;
    }
    this.showDrafts(frame);
    if (frame.shadows) this.shadows?.show(frame); // the past has none
    const { bytes: held, budget_bytes: budget, experts } = resident;
    say(this.memory.value, bytes(held));
    say(this.memory.small, `of ${bytes(budget)} · ${experts} experts`);
    const filled = (bar, part) =>
      bar.style.setProperty("--p", `${Math.min(100, (100 * part) / Math.max(budget, this.dense))}%`);
    filled(this.fill, held);
    filled(this.beside, this.dense);
    say(this.of, of ? `Of the last run, under other settings: ${of}. Run again for those now set.` : "");
    this.node.classList.toggle("stale", Boolean(of));
    say(this.spent, `${lately(frame)}${ofGuesses(guesses)}${inVainOf(recent)}`);
    say(this.says, sentence);
    say(this.moved, change ? ` · ${change}` : "");
    for (const cut of [this.spent, this.lines]) cut.title = cut.textContent; // beyond two lines
  }

  showDrafts({ draft, recent, whole }) {
    const { value, small, node } = this.drafts,
      { tokens_per_pass: yields } = whole;
    node.hidden = !draft;
    this.node.classList.toggle("drafted", Boolean(draft));
    if (!draft) return;
    say(value, written("acceptance", recent.acceptance));
    say(small, yields ? `${yields.toFixed(1)} tokens a pass` : "of those drafted");
  }
}

function tile(name, title) {
  const value = h("b", {}, "–"),
    small = h("small");
  const parts = [h("span", {}, name), value, small];
  return { node: h("div", { class: "moe-tile", title }, ...parts), value, small };
}
