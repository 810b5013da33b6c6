// One token explained: what it waited for and read, how far its distribution is from full
// precision (both top fives side by side), and the experts it used.

import { Chips } from "./chips.js";
import { cross, h, icon, markup, say } from "./element.js";
import { bytes, kl, millis, rate } from "./numbers.js";
import { outcomes, wordOf } from "./outcomes.js";
import { waitOf } from "./recording.js";
import { filledBar } from "./why.js";

const AT_ONCE = 96; // chips
const LATER_MS = 150;
const KINDS_SHOWN = ["hit", "prefetch", "load", "downgrade", "skip", "substitute"];

export class Blame {
  /** `close` is null where there is nothing to close it for. */
  constructor(layers, tip, { choose, close }) {
    this.title = h("h3");
    this.cost = h("p", { class: "moe-cost" });
    this.five = [h("ol"), h("ol")];
    this.missing = h("p", { class: "moe-soft" });
    this.head = h("h4");
    this.chips = new Chips(layers, tip, choose);
    this.full = markup`
      <section title="The model with every expert at its best tier">
        <h4>full precision</h4>${this.five[1]}
      </section>`;
    const key = (kind) =>
      h("span", { class: "moe-key", "data-kind": kind }, icon(kind), wordOf(kind));
    this.node = markup`
      <section class="moe-panel moe-blame" aria-label="What the token cost and why" hidden>
        <header>${this.title}${close && cross("Close what the token cost", close)}</header>
        ${this.cost}
        <div class="moe-top">
          <section title="Before temperature and other sampling settings">
            <h4>as served</h4>${this.five[0]}
          </section>
          ${this.full}
        </div>
        ${[this.missing, this.head, this.chips.node]}
        <div class="moe-legend" aria-hidden="true">${KINDS_SHOWN.map(key)}</div>
      </section>`;
  }

  show(recording, { token, layer }) {
    const { tokens, pieces, document, model } = recording;
    this.node.hidden = false;
    this.node.dataset.token = `${token}`;
    say(this.title, `Token ${token} ${JSON.stringify(pieces[token])}`);
    this.showCost(tokens, token, model.causes);
    this.showTop(document.top, pieces[token], token, tokens.kl[token]);
    say(this.head, token ? "experts by layer" : "experts by layer, of the prompt's last position");
    this.showChips(recording, token, layer);
  }

  /** At once where there are few; many are drawn when the hand rests, or a few times a second. */
  showChips(recording, token, layer) {
    const show = () => {
      this.late = 0;
      this.drawn = performance.now();
      this.chips.show(outcomes(recording, token), recording.gates.K, layer);
    };
    clearTimeout(this.late);
    const many = recording.layers * recording.gates.K > AT_ONCE,
      wait = many ? (this.drawn ?? -1e9) + LATER_MS - performance.now() : 0;
    if (wait <= 0) show();
    else this.late = setTimeout(show, wait);
  }

  showCost(tokens, token, causes) {
    const waits = causes.filter((c) => tokens[c][token] >= 0.005),
      sum = waitOf(tokens, waits, token),
      parts = waits.map((c) => `${c} ${rate(tokens[c][token])}`).join(", "),
      deciding = tokens.deciding_ms[token];
    this.node.dataset.wait = sum.toFixed(3);
    this.node.dataset.bytes = `${tokens.bytes[token]}`;
    this.cost.replaceChildren(
      h("b", {}, millis(tokens.total_ms[token])),
      ` = ${rate(tokens.compute_ms[token])} computing + `,
      deciding >= 0.005 ? `${rate(deciding)} deciding + ` : "",
      h("b", {}, `${millis(sum)} waiting`),
      waits.length > 1 ? ` (${parts})` : waits.length ? ` (${waits[0]})` : "",
      "; ",
      h("b", {}, `${bytes(tokens.bytes[token])} read`),
    );
  }

  close() {
    clearTimeout(this.late);
  }

  showTop(top, piece, token, value) {
    const served = top.served[token] ?? [],
      full = top.full[token],
      most = Math.max(...served.map(([, p]) => p), ...(full ?? []).map(([, p]) => p), 1e-9);
    this.five[0].replaceChildren(...served.map((entry) => line(entry, most, piece, "served")));
    this.full.hidden = !full;
    this.five[1].replaceChildren(...(full ?? []).map((entry) => line(entry, most, piece, "full")));
    const measured = Number.isFinite(value);
    this.node.dataset.kl = measured ? value : "";
    this.missing.replaceChildren(
      ...(measured
        ? ["KL divergence from full precision ", h("b", {}, kl(value)), " nats"]
        : ["Tick “measure KL” and run again to see full precision beside it."]),
    );
  }
}

/** A probability, short. @param {number} p */
export const chance = (p) =>
  p >= 0.9995 ? "1.00" : p < 0.001 ? "<.001" : p.toFixed(3).replace(/^0/, "");

/** One of the five likeliest tokens: its text, a bar, its probability. */
function line([text, p], most, piece, of) {
  const shown = text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅",
    taken = text === piece;
  return h(
    "li",
    { class: taken ? "taken" : "", title: taken && "the token taken" },
    h("code", {}, shown), filledBar(p / most, of), h("span", {}, chance(p)),
  );
}
