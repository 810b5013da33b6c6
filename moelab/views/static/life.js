// One expert's life: figures, its lane over the tokens, and for an eviction why it had to leave:
// the strategy's own terms for it and for those that stayed.

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

class Life {
  constructor(look, axis, layers, { go, reason, close }) {
    Object.assign(this, { go, reason, layers, of: null });
    this.title = h("h3");
    this.facts = h("span", { class: "moe-soft" });
    this.lane = new Lane(look, axis, (one) => this.pick(one));
    this.why = h("div", { class: "moe-leaving", hidden: true });
    this.node = h(
      "section",
      { class: "moe-panel moe-life", "aria-label": "Life of an expert", hidden: true },
      h(
        "header",
        {},
        this.title,
        this.facts,
        h(
          "button",
          { type: "button", class: "moe-close", "aria-label": "Close this life", onclick: close },
          "×",
        ),
      ),
      this.lane.sheet.box,
      this.why,
    );
  }

  /** Whose life is shown; null for nobody's. */
  choose(layer, expert) {
    this.of = layer === null ? null : { layer, expert, layers: this.layers };
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
    say(this.facts, parts.filter(Boolean).join(" · "));
    this.facts.title = `${this.facts.textContent} of the time`;
    Object.assign(this.node.dataset, { evictions: count("evict"), loads: count("load") });
  }

  pick(one) {
    this.go(one.token, one.at);
    this.why.hidden = one.kind !== "evict";
    this.node.dataset.event = one.row;
    if (one.kind !== "evict") return;
    const where = one.at < 0 ? `Before token ${one.token}` : `Token ${one.token}, layer ${one.at}`,
      title = `${where}: evicted, ${CAUSES[one.cause] ?? one.cause}`;
    this.why.replaceChildren(
      h("strong", {}, title),
      h("span", { class: "moe-soft" }, " asking the strategy …"),
    );
    this.reason(one.row).then((answer) => {
      if (this.lane.chosen?.row === one.row) this.why.replaceChildren(...drawLeft(title, answer));
    });
  }

  close() {
    this.lane.close();
  }
}

/** A table of the strategy's terms: who left first, then who stayed, nearest to going first. */
function drawLeft(title, { policy, terms, texts, victim, survivors, error }) {
  const head = h("strong", {}, title);
  if (error || !terms?.length || !victim) {
    const words = error || (policy ? `${policy}: no terms decided this` : "not recorded");
    return [head, h("span", { class: "moe-soft" }, ` ${words}`)];
  }
  const rows = [victim, ...survivors],
    values = terms.map((_, i) => rows.map((row) => row[3 + i]).filter(Number.isFinite)),
    low = values.map((v) => Math.min(...v)),
    high = values.map((v) => Math.max(...v));
  const cell = (x, i) => {
    const share = Number.isFinite(x) && high[i] > low[i] ? (x - low[i]) / (high[i] - low[i]) : 1;
    const fill = h("i", {
      class: "moe-bar",
      "aria-hidden": true,
      style: `--p:${(100 * share).toFixed(1)}%`,
    });
    return h("td", {}, fill, h("span", {}, short(x)));
  };
  const line = ([layer, expert, bits, ...x], n) =>
    h(
      "tr",
      { class: n ? "" : "victim" },
      h("td", {}, icon(n ? "hit" : "evict"), n ? "stayed" : "left"),
      h("th", { scope: "row" }, `layer ${layer}, expert ${expert}`),
      h("td", {}, `${bits} bit`),
      ...x.map(cell),
    );
  const heads = terms.map((name, i) =>
    h("th", { scope: "col", title: texts?.[i] || undefined }, name),
  );
  const words = terms.flatMap((name, i) =>
    texts?.[i] ? [h("b", {}, name), ` ${texts[i]}`, " · "] : [],
  );
  words.pop();
  return [
    head,
    h("span", { class: "moe-soft" }, ` by ${policy}`),
    h(
      "table",
      {},
      h(
        "thead",
        {},
        h("tr", {}, h("th"), h("th", { scope: "col" }, "expert"), h("th", {}, ""), ...heads),
      ),
      h("tbody", {}, ...rows.map(line)),
    ),
    h("small", { class: "moe-soft" }, ...words),
  ];
}
