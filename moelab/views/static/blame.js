// One token explained: what it waited for and read, how far its distribution is from full
// precision (both top fives side by side), and the experts it used: one row a layer, one chip an
// expert. With few experts a chip says all in words; with many it is a shape and a number.

import { cross, filledBar, h, icon, markup, say, shape } from "./element.js";
import { inSum, spentOn } from "./figures.js";
import { bytes, kl, millis, within } from "./numbers.js";
import { brief, inWords, outcomes, wordOf } from "./outcomes.js";
import { passInWords } from "./passes.js";
import { beginOf, waitOf } from "./recording.js";

const WORDY = 2; // experts a layer, up to which a chip has room for words
const A_LINE = 4; // chips with room for a shape and two digits
const FEW_ROWS = 16; // more than can be seen at once
const LINE_PX = 25;
const SEEN_PX = 300; // as history.css has it

class Chips {
  /** `choose(layer, expert)` is called for a chip that is clicked. */
  constructor(model, tip, choose) {
    this.model = model;
    this.layers = model.layers;
    this.begin = 0;
    this.tip = tip;
    this.choose = choose;
    this.rows = [];
    this.at = [0, 0];
    this.K = this.top = this.turn = this.tall = 0;
    this.node = h("div", {
      class: "moe-chips", role: "grid", "aria-label": "Experts used",
      onkeydown: (e) => this.key(e),
      onpointerleave: () => tip.hide(),
      onscroll: () => {
        this.top = this.node.scrollTop;
        this.fillRows();
      },
    });
  }

  build(K) {
    this.K = K;
    this.rows = Array.from({ length: this.layers }, (_, layer) => this.row(layer));
    const lines = Math.ceil(K / A_LINE);
    this.tall = LINE_PX * lines;
    this.node.style.setProperty("--k", `${Math.min(K, A_LINE)}`);
    this.node.style.setProperty("--lines", `${lines}`);
    this.node.classList.toggle("wordy", K <= WORDY);
    this.node.replaceChildren(...this.rows.map((row) => row.node));
    this.focusable(0, 0);
  }

  row(layer) {
    const cells = Array.from({ length: this.K }, () => this.cell(layer)),
      wait = h("span", { class: "moe-row-wait" }),
      nodes = cells.map((cell) => cell.node);
    const node = markup`
      <div role="row">
        <span role="rowheader" class="moe-soft">${layer}</span>
        <span role="presentation">${nodes}</span>${wait}
      </div>`;
    return { node, cells, wait, turn: 0 };
  }

  cell(layer) {
    const parts = { icon: icon("hit"), name: h("b"), words: h("span") },
      words = this.K <= WORDY ? [parts.words] : [];
    const node = h(
      "button",
      {
        type: "button", class: "moe-chip", role: "gridcell", tabindex: -1,
        onclick: () => this.choose(layer, made.chip.expert),
        onpointermove: (e) => this.explain(made, e.clientX, e.clientY),
      },
      parts.icon, parts.name, ...words,
    );
    const made = { node, chip: null, ...parts };
    return made;
  }

  explain({ chip }, x, y) {
    const { layer, expert, weight } = chip,
      rows = inWords(chip).map((words) => ["", words]);
    rows.push(["gate weight", weight.toFixed(3)]);
    this.tip.show(x, y, `layer ${layer}, expert ${expert}`, rows);
  }

  /** An encoder's layers are a prompt's alone: other tokens have no rows of them. */
  show(outcome, K, { token, layer: now }) {
    if (K !== this.K) this.build(K);
    this.begin = beginOf(token, this.model);
    this.rows.forEach(({ node }, l) => (node.hidden = l < this.begin));
    if (this.at[0] < this.begin) this.focusable(this.begin, 0);
    this.outcome = outcome;
    this.now = now;
    this.turn += 1;
    this.follow();
    this.fillRows();
  }

  /** In the middle of a token the layer at work is in sight. */
  follow() {
    const many = this.layers > FEW_ROWS,
      at = Math.max(0, this.now - this.begin) * this.tall,
      y = at - this.top;
    if (!many || this.now === this.layers - 1 || (y >= 0 && y < SEEN_PX - this.tall)) return;
    this.top = Math.max(0, at - SEEN_PX / 2);
    this.node.scrollTop = this.top;
  }

  /** Rows that can be seen; the others when they come into view. */
  fillRows() {
    const many = this.layers > FEW_ROWS,
      from = this.begin + (many ? Math.max(0, Math.floor(this.top / this.tall) - 1) : 0),
      to = many ? Math.min(this.layers, from + FEW_ROWS) : this.layers;
    for (let l = from; l < to; l++) this.fillRow(l);
  }

  fillRow(l) {
    const row = this.rows[l],
      { chips, wait } = this.outcome[l];
    if (row.turn === this.turn) return;
    row.turn = this.turn;
    row.node.classList.toggle("later", l > this.now);
    say(row.wait, wait >= 0.005 ? millis(wait) : "");
    row.cells.forEach((cell, k) => this.fill(cell, chips[k], l));
  }

  fill(cell, chip, layer) {
    const { node } = cell;
    node.hidden = !chip;
    if (!chip) return;
    cell.chip = chip;
    const words = inWords(chip);
    if (node.dataset.kind !== chip.kind) node.dataset.kind = chip.kind;
    shape(cell.icon, chip.kind);
    say(cell.name, `${chip.expert}`);
    if (this.K <= WORDY) say(cell.words, brief(chip));
    node.style.setProperty("--w", `${(100 * Math.min(1, chip.weight)).toFixed(1)}%`);
    words.push(`gate weight ${chip.weight.toFixed(2)}`);
    node.setAttribute("aria-label", `layer ${layer}, expert ${chip.expert}: ${words.join(", ")}`);
  }

  key(event) {
    const step = {
      ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
      Home: [0, -this.K], End: [0, this.K],
    }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const layer = within(this.at[0] + step[0], this.begin, this.layers - 1),
      k = within(this.at[1] + step[1], 0, this.K - 1);
    this.focusable(layer, k);
    this.fillRow(layer);
    this.rows[layer].cells[k].node.focus();
  }

  /** One chip is reached by Tab, the others by the arrow keys. */
  focusable(layer, k) {
    this.rows[this.at[0]]?.cells[this.at[1]]?.node.setAttribute("tabindex", "-1");
    this.at = [layer, k];
    this.rows[layer].cells[k].node.setAttribute("tabindex", "0");
  }
}

const MOST_ROWS = 12; // that are seen without scrolling, of one line each
const KINDS_SHOWN = ["hit", "prefetch", "late", "load", "downgrade", "skip", "substitute"];

export class Blame {
  /** `close` is null where there is nothing to close it for. */
  constructor(model, tip, { choose, close }) {
    this.title = h("h3");
    this.cost = h("p", { class: "moe-cost" });
    this.draft = h("p", { class: "moe-for-draft", hidden: true });
    this.five = [h("ol"), h("ol")];
    this.missing = h("p", { class: "moe-soft" });
    this.head = h("h4");
    this.chips = new Chips(model, tip, choose);
    this.full = markup`
      <section title="The model with every expert at its best tier">
        <h4>full precision</h4>${this.five[1]}
      </section>`;
    const key = (kind) =>
      h("span", { class: "moe-key", "data-kind": kind }, icon(kind), wordOf(kind));
    this.top = markup`
      <div class="moe-top">
        <section title="Before temperature and other sampling settings">
          <h4>as served</h4>${this.five[0]}
        </section>
        ${this.full}
      </div>`;
    this.node = markup`
      <section class="moe-panel moe-blame" aria-label="What the token cost and why" hidden>
        <header>${this.title}${close && cross("Close what the token cost", close)}</header>
        ${[this.cost, this.draft, this.top, this.missing, this.head, this.chips.node]}
        <div class="moe-legend" aria-hidden="true">${KINDS_SHOWN.map(key)}</div>
      </section>`;
  }

  show(recording, { token, layer }) {
    const { tokens, pieces, document, model } = recording;
    this.node.hidden = false;
    this.node.dataset.token = `${token}`;
    say(this.title, `Token ${token} ${JSON.stringify(pieces[token])}`);
    this.showCost(tokens, token, model.causes);
    say(this.draft, passInWords(document.passes, token));
    this.draft.hidden = !this.draft.textContent;
    this.showTop(document.top, pieces[token], token, tokens.kl[token]);
    const rows = recording.layers - beginOf(token, model),
      many = rows > MOST_ROWS ? ` · ${rows} layers: scroll` : "";
    say(this.head, `experts by layer${token ? "" : ", of the prompt's last position"}${many}`);
    this.chips.show(outcomes(recording, token), recording.gates.K, { token, layer });
  }

  showCost(tokens, token, causes) {
    const [total, parts] = inSum(spentOn(tokens, token)),
      read = h("b", {}, `${bytes(tokens.bytes[token])} read`);
    this.node.dataset.wait = waitOf(tokens, causes, token).toFixed(3);
    this.node.dataset.bytes = `${tokens.bytes[token]}`;
    this.cost.replaceChildren(h("b", {}, total), ` = ${parts}; `, read);
  }

  showTop(top, piece, token, value) {
    const served = top.served[token] ?? [],
      full = top.full[token],
      most = Math.max(...served.map(([, p]) => p), ...(full ?? []).map(([, p]) => p), 1e-9);
    this.five[0].replaceChildren(...served.map((entry) => line(entry, most, piece, "served")));
    this.full.hidden = !full;
    this.five[1].replaceChildren(...(full ?? []).map((entry) => line(entry, most, piece, "full")));
    const measured = Number.isFinite(value),
      said = ["KL divergence from full precision ", h("b", {}, kl(value)), " nats"],
      silent = !top.served.some(({ length }) => length), // a ghost's
      missing = silent
        ? "The weights are random: there is no text here, and no quality to measure."
        : "KL was not measured at this token: choose “KL: each token” and run again.";
    this.top.hidden = silent;
    this.node.dataset.kl = measured ? value : "";
    this.missing.replaceChildren(...(measured ? said : [missing]));
  }
}

/** A probability, short. @param {number} p */
export const chance = (p) =>
  p >= 0.9995 ? "1.00" : p < 0.001 ? "<.001" : p.toFixed(3).replace(/^0/, "");

/** One of the five likeliest tokens, or the one drawn: its text, a bar, its probability. */
function line([text, p], most, piece, of) {
  const shown = text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅",
    taken = text === piece;
  return h(
    "li",
    { class: taken ? "taken" : "", title: taken && "the token taken" },
    h("code", {}, shown), filledBar(p / most, of), h("span", {}, chance(p)),
  );
}
