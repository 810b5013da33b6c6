// One expert's life: figures, its lane over the tokens, and for an eviction why it had to leave:
// the strategy's own terms for it and for those that stayed.

import { cross, filledBar, h, icon, markup, say, shareOf } from "./element.js";
import { Lane, lifeOf } from "./lane.js";
import { percent, plural, short, tierName } from "./numbers.js";

const CAUSES = {
  room: "to make room",
  upgrade: "replaced by a copy with more bits",
  budget: "the budget became smaller",
  bits: "fewer bits were asked for from then on",
  "not kept": "this strategy keeps nothing after a layer",
  unread: "its prefetch was withdrawn: not begun when the router had spoken",
  cancelled: "its load was withdrawn before it began",
  failed: "its prefetch failed",
};

/** What the lane draws: above the band what came and left, below it each use by where it came from. */
const GLYPHS = [
  ["load", "loaded"], ["prefetch", "read ahead, or used in time"], ["late", "used, but late"],
  ["evict", "left"], ["hit", "used"], ["downgrade", "at fewer bits"], ["skip", "skipped"],
];

export class Life {
  constructor(look, axis, model, { go, reason, close }) {
    this.go = go;
    this.reason = reason;
    this.model = model;
    this.of = null;
    this.title = h("h3");
    this.summary = h("span", { class: "moe-soft" });
    this.lane = new Lane(look, axis, (one) => this.pick(one));
    this.why = h("div", { class: "moe-leaving", hidden: true });
    this.node = markup`
      <section class="moe-panel moe-life" aria-label="Life of an expert" hidden>
        <header>${[this.title, this.summary, cross("Close this life", close)]}</header>
        ${this.lane.sheet.box}
        <div class="moe-legend" aria-hidden="true">${GLYPHS.map(([kind, words]) =>
          h("span", { class: "moe-key", "data-kind": kind }, icon(kind), words))}</div>
        ${this.why}
      </section>`;
  }

  /** Whose life is shown; null: none. */
  choose(layer, expert) {
    this.of = layer === null ? null : { layer, expert, model: this.model };
    this.told = this.lane.chosen = null;
    this.why.hidden = true;
    this.node.hidden = !this.of;
    this.node.dataset.expert = this.of ? `${layer},${expert}` : "";
  }

  show(recording, frame) {
    if (!this.of) return;
    const { layer, expert } = this.of,
      key = `${layer},${expert},${recording.run},${recording.rows}`;
    if (key !== this.told) {
      this.told = key;
      this.life = lifeOf(recording, layer, expert);
      this.tell(recording);
    }
    this.lane.show(this.life, frame, this.of);
  }

  tell(recording) {
    const { happened, spans, before } = this.life,
      count = (...kinds) => happened.filter((one) => kinds.includes(one.kind)).length,
      share = spans.reduce((sum, { from, to }) => sum + to - from, 0) / (recording.count || 1);
    say(this.title, `Layer ${this.of.layer}, expert ${this.of.expert}`);
    const parts = [
      plural(count("hit", "load", "substitute"), "use"),
      plural(count("load"), "load"),
      count("prefetch") && plural(count("prefetch"), "prefetch"),
      plural(count("evict"), "evict"),
      count("skip") && plural(count("skip"), "skip"),
      before && "there before this run",
      `resident ${percent(share)}`,
    ];
    say(this.summary, parts.filter(Boolean).join(" · "));
    this.summary.title = `${this.summary.textContent} of the time`;
    Object.assign(this.node.dataset, { evictions: count("evict"), loads: count("load") });
  }

  pick(one) {
    this.go(one.token, one.at);
    this.why.hidden = one.kind !== "evict";
    this.node.dataset.event = `${one.row}`;
    if (one.kind !== "evict") return;
    const where = one.at < 0 ? `Before token ${one.token}` : `Token ${one.token}, layer ${one.at}`,
      title = `${where}: evicted, ${CAUSES[one.cause] ?? one.cause}`;
    this.why.replaceChildren(...told(title, "asking the strategy …"));
    this.reason(one.row).then((answer) => {
      if (this.lane.chosen?.row === one.row) this.why.replaceChildren(...drawLeft(title, answer));
    });
  }

  close() {
    this.lane.close();
  }
}

const told = (title, words) =>
  [h("strong", {}, title), h("span", { class: "moe-soft" }, ` ${words}`)];

const TIE = "that stayed: among equals the least recently used leaves";

/** A table of the strategy's terms: who left first, then who stayed, nearest to going first. */
function drawLeft(title, { policy, terms, texts, victim, survivors, tie, error }) {
  if (error || !terms?.length || !victim)
    return told(title, error || (policy ? `${policy}: no terms decided this` : "not recorded"));
  const rows = [victim, ...survivors],
    values = terms.map((_, i) => rows.map((row) => row[3 + i]).filter(Number.isFinite));
  const cell = (x, i) =>
    h("td", {}, filledBar(shareOf(x, Math.min(...values[i]), Math.max(...values[i]))), short(x));
  const line = ([layer, expert, bits, ...x], n) => markup`
    <tr class="${n ? "" : "victim"}">
      <td>${icon(n ? "hit" : "evict")}${n ? "stayed" : "left"}</td>
      <th scope="row">layer ${layer}, expert ${expert}</th>
      <td>${tierName(bits)}</td>
      ${x.map(cell)}
    </tr>`;
  const heads = terms.map((name, i) => h("th", { scope: "col", title: texts?.[i] || false }, name));
  const words = terms.flatMap((name, i) =>
    texts?.[i] ? [" · ", h("b", {}, name), ` ${texts[i]}`] : [],
  );
  return [
    ...told(title, `by ${policy}${tie ? `; a tie with ${plural(tie, "expert")} ${TIE}` : ""}`),
    markup`
      <table>
        <thead><tr><th></th><th scope="col">expert</th><th></th>${heads}</tr></thead>
        <tbody>${rows.map(line)}</tbody>
      </table>`,
    h("small", { class: "moe-soft" }, ...words.slice(1)),
  ];
}
