// Which experts a token used and what became of each: one row a layer, one chip an expert. With
// few experts a chip says all in words; with many it is a shape and a number.

const WORDY = 2; // experts a layer, up to which a chip has room for words
const FEW_ROWS = 16; // more than can be seen at once
const ROW_PX = 25;
const SEEN_PX = 300; // all three as past.css has it

/** For each layer, what became of the router's choices (of a prompt's last position). */
function outcomes(recording, token) {
  const { layers, gates, events } = recording,
    served = Array.from({ length: layers }, () => ({ by: new Map(), stands: [], wait: 0 }));
  const end = recording.upTo(token, layers);
  for (let i = recording.upTo(token - 1, layers); i < end; i++) {
    const kind = events.kind[i];
    if (events.layer[i] !== events.at[i] || kind === PREFETCH || kind === EVICT) continue;
    const layer = served[events.at[i]],
      expert = events.expert[i];
    if (kind === SUBSTITUTE) {
      layer.stands.push(i);
      continue;
    }
    const row = layer.by.get(expert) ?? { wait: 0, row: i };
    layer.by.set(expert, row);
    if (kind === STALL) {
      if (recording.cause(i) === "evict") continue;
      row.wait += events.dur_ms[i];
      layer.wait += events.dur_ms[i];
    } else if (kind === DOWNGRADE) row.lower = true;
    else Object.assign(row, { row: i, kind });
  }
  const { K } = gates;
  return served.map((layer, l) => {
    const from = (token * layers + l) * K,
      chosen = [...gates.expert.subarray(from, from + K)],
      wanted = gates.wanted ? [...gates.wanted.subarray(from, from + K)] : chosen,
      missed = wanted.filter((e) => e >= 0 && !chosen.includes(e)),
      list = [];
    chosen.forEach((expert, k) => {
      if (expert >= 0) list.push({ layer: l, expert, weight: gates.weight[from + k] });
    });
    for (const chip of list) finish(chip, layer, recording, wanted, missed);
    return { chips: list, wait: layer.wait };
  });
}

/** Fill in one chip: what was served, from where, at how many bits. */
function finish(chip, layer, recording, wanted, missed) {
  const { events } = recording,
    row = layer.by.get(chip.expert);
  const stand = row?.kind === undefined ? layer.stands.shift() : undefined,
    i = stand ?? row?.row;
  Object.assign(chip, { wait: row?.wait ?? 0, kind: "hit", bits: 0, asked: 0, bytes: 0 });
  if (i === undefined) return;
  Object.assign(chip, { bits: events.bits[i], asked: events.bits_asked[i] });
  const from = { [LOAD]: "load", [SKIP]: "skip", [SUBSTITUTE]: "substitute" }[events.kind[i]];
  chip.from = from ?? (recording.cause(i) === "prefetched" ? "prefetch" : "hit");
  if (chip.from === "load") chip.bytes = events.bytes[i];
  chip.kind = row?.lower && chip.from !== "skip" ? "downgrade" : chip.from;
  if (stand !== undefined) chip.by = events.expert[stand];
  if (!wanted.includes(chip.expert)) {
    chip.kind = "substitute";
    chip.instead = missed.shift();
  }
}

const OUTCOME = { prefetch: "prefetched" };

/** An outcome in words: "load, 16 bit". */
function inWords(chip) {
  const words = [OUTCOME[chip.kind] ?? chip.kind];
  if (chip.kind === "downgrade")
    words.push(`${OUTCOME[chip.from] ?? chip.from} at ${chip.bits} bit of ${chip.asked}`);
  else if (chip.bits) words.push(`${chip.bits} bit`);
  if (chip.by !== undefined) words.push(`expert ${chip.by} stood in`);
  if (chip.instead !== undefined) words.push(`the router wanted expert ${chip.instead}`);
  if (chip.bytes) words.push(`${bytes(chip.bytes)} read`);
  if (chip.wait >= 0.005) words.push(`waited ${millis(chip.wait)}`);
  return words;
}

class Chips {
  /** `choose(layer, expert)` is called for a chip that is clicked. */
  constructor(layers, tip, choose) {
    Object.assign(this, { layers, tip, choose, rows: [], at: [0, 0] });
    this.node = h("div", { class: "moe-chips", role: "grid", "aria-label": "Experts used" });
    this.node.addEventListener("keydown", (e) => this.key(e));
    this.top = 0;
    this.node.addEventListener("scroll", () => {
      this.top = this.node.scrollTop;
      this.fillRows();
    });
    this.node.addEventListener("pointerleave", () => tip.hide());
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
      wait = h("span", { class: "moe-row-wait" });
    const node = h(
      "div",
      { role: "row" },
      h("span", { role: "rowheader", class: "moe-soft" }, `${layer}`),
      ...cells.map((c) => c.node),
      wait,
    );
    return { node, cells, wait };
  }

  cell(layer) {
    const parts = { icon: icon("hit"), name: h("b"), words: h("span") },
      words = this.K <= WORDY ? [parts.words] : [];
    const node = h(
      "button",
      { type: "button", class: "moe-chip", role: "gridcell", tabindex: -1 },
      ...[parts.icon, parts.name, ...words],
    );
    const made = { node, ...parts };
    node.addEventListener("click", () => this.choose(layer, made.chip.expert));
    node.addEventListener("pointermove", (e) => this.explain(made, e.clientX, e.clientY));
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
    Object.assign(this, { outcome, now, turn: (this.turn ?? 0) + 1 });
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
    const all = `layer ${layer}, expert ${chip.expert}: ${words.join(", ")}, gate weight ${chip.weight.toFixed(2)}`;
    node.setAttribute("aria-label", all);
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
    const inside = (x, n) => Math.max(0, Math.min(n - 1, x));
    this.focusable(inside(this.at[0] + step[0], this.layers), inside(this.at[1] + step[1], this.K));
    this.fillRow(this.at[0]);
    this.rows[this.at[0]].cells[this.at[1]].node.focus();
  }

  /** One chip is reached by Tab, the others by the arrow keys. */
  focusable(layer, k) {
    this.rows[this.at[0]]?.cells[this.at[1]]?.node.setAttribute("tabindex", -1);
    this.at = [layer, k];
    this.rows[layer].cells[k].node.setAttribute("tabindex", 0);
  }
}

/** As much of an outcome as fits into a chip. */
function brief({ kind, bits, asked, by, instead }) {
  if (kind === "skip") return "skip";
  if (kind === "downgrade") return `${bits} of ${asked} bit`;
  if (by !== undefined) return `by ${by}, ${bits} bit`;
  if (instead !== undefined) return `for ${instead}, ${bits} bit`;
  return `${OUTCOME[kind] ?? kind} ${bits} bit`;
}
