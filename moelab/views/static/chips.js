// Which experts a token used and what became of each: one row a layer, one chip an expert. With
// few experts a chip says all in words; with many it is a shape and a number.

import { h, icon, markup, say, shape } from "./element.js";
import { millis, within } from "./numbers.js";
import { brief, inWords } from "./outcomes.js";

const WORDY = 2; // experts a layer, up to which a chip has room for words
const FEW_ROWS = 16; // more than can be seen at once
const ROW_PX = 25;
const SEEN_PX = 300; // all three as history.css has it

export class Chips {
  /** `choose(layer, expert)` is called for a chip that is clicked. */
  constructor(layers, tip, choose) {
    this.layers = layers;
    this.tip = tip;
    this.choose = choose;
    this.rows = [];
    this.at = [0, 0];
    this.K = this.top = this.turn = 0;
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
    this.node.style.setProperty("--k", K);
    this.node.classList.toggle("wordy", K <= WORDY);
    this.node.replaceChildren(...this.rows.map((row) => row.node));
    this.focusable(0, 0);
  }

  row(layer) {
    const cells = Array.from({ length: this.K }, () => this.cell(layer)),
      wait = h("span", { class: "moe-row-wait" }),
      nodes = cells.map((cell) => cell.node);
    const node = markup`
      <div role="row"><span role="rowheader" class="moe-soft">${layer}</span>${[...nodes, wait]}</div>`;
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

  show(outcome, K, now) {
    if (K !== this.K) this.build(K);
    this.outcome = outcome;
    this.now = now;
    this.turn += 1;
    this.follow();
    this.fillRows();
  }

  /** In the middle of a token the layer at work is in sight. */
  follow() {
    const many = this.layers > FEW_ROWS,
      y = Math.max(0, this.now) * ROW_PX - this.top;
    if (!many || this.now === this.layers - 1 || (y >= 0 && y < SEEN_PX - ROW_PX)) return;
    this.top = Math.max(0, Math.max(0, this.now) * ROW_PX - SEEN_PX / 2);
    this.node.scrollTop = this.top;
  }

  /** Rows that can be seen; the others when they come into view. */
  fillRows() {
    const many = this.layers > FEW_ROWS,
      from = many ? Math.max(0, Math.floor(this.top / ROW_PX) - 1) : 0,
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
      ArrowLeft: [0, -1],
      ArrowRight: [0, 1],
      ArrowUp: [-1, 0],
      ArrowDown: [1, 0],
      Home: [0, -this.K],
      End: [0, this.K],
    }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    const [down, across] = step;
    this.focusable(
      within(this.at[0] + down, 0, this.layers - 1),
      within(this.at[1] + across, 0, this.K - 1),
    );
    this.fillRow(this.at[0]);
    this.rows[this.at[0]].cells[this.at[1]].node.focus();
  }

  /** One chip is reached by Tab, the others by the arrow keys. */
  focusable(layer, k) {
    this.rows[this.at[0]]?.cells[this.at[1]]?.node.setAttribute("tabindex", "-1");
    this.at = [layer, k];
    this.rows[layer].cells[k].node.setAttribute("tabindex", "0");
  }
}
