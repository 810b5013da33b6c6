// One token explained: what it waited for and read, how far its distribution is from full
// precision (both top fives side by side), and the experts it used.

const AT_ONCE = 96; // chips
const LATER_MS = 150;

class Blame {
  constructor(layers, tip, { choose, close }) {
    this.title = h("h3", {}, "");
    this.cost = h("p", { class: "moe-cost" });
    this.kl = h("b");
    this.five = [h("ol"), h("ol")];
    this.missing = h("p", { class: "moe-soft" });
    this.chips = new Chips(layers, tip, choose);
    const list = (words, title, node) => h("section", { title }, h("h4", {}, words), node);
    this.full = list(
      "full precision",
      "The model with every expert at its best tier",
      this.five[1],
    );
    this.legend = h(
      "div",
      { class: "moe-legend", "aria-hidden": true },
      ...["hit", "prefetch", "load", "downgrade", "skip", "substitute"].map((kind) =>
        h("span", { class: "moe-key", "data-kind": kind }, icon(kind), OUTCOME[kind] ?? kind),
      ),
    );
    this.node = h(
      "section",
      { class: "moe-panel moe-blame", "aria-label": "What the token cost and why", hidden: true },
      h(
        "header",
        {},
        this.title,
        h(
          "button",
          {
            type: "button",
            class: "moe-close",
            "aria-label": "Close what the token cost",
            hidden: !close,
            onclick: close ?? (() => {}),
          },
          "×",
        ),
      ),
      this.cost,
      h(
        "div",
        { class: "moe-top" },
        list("as served", "Before temperature and other sampling settings", this.five[0]),
        this.full,
      ),
      this.missing,
      h("h4", { class: "moe-chips-head" }, "experts by layer"),
      this.chips.node,
      this.legend,
    );
    this.head = this.node.querySelector(".moe-chips-head");
  }

  show(recording, { token, layer }) {
    const { tokens, pieces, document, model, gates } = recording;
    this.node.hidden = false;
    this.node.dataset.token = token;
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
      sum = waits.reduce((total, c) => total + tokens[c][token], 0);
    const parts = waits.map((c) => `${c} ${millis(tokens[c][token])}`).join(", ");
    this.node.dataset.wait = sum.toFixed(3);
    this.node.dataset.bytes = tokens.bytes[token];
    this.cost.replaceChildren(
      h("b", {}, millis(tokens.total_ms[token])),
      ` = ${millis(tokens.compute_ms[token])} computing + `,
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
    this.five[0].replaceChildren(...served.map((entry) => bar(entry, most, piece, "served")));
    this.full.hidden = !full;
    this.five[1].replaceChildren(...(full ?? []).map((entry) => bar(entry, most, piece, "full")));
    this.node.dataset.kl = Number.isFinite(value) ? value : "";
    const measured = Number.isFinite(value);
    this.missing.replaceChildren(
      ...(measured
        ? ["KL divergence from full precision ", h("b", {}, kl(value)), " nats"]
        : ["Tick “measure KL” and run again to see full precision beside it."]),
    );
  }
}

/** One of the five likeliest tokens: its text, a bar, its probability. */
function bar([text, p], most, piece, of) {
  const shown = text.replace(/ /g, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅",
    taken = text === piece;
  return h(
    "li",
    { class: taken ? "taken" : "", title: taken ? "the token taken" : undefined },
    h("code", {}, shown),
    h("i", { class: of, "aria-hidden": true, style: `--p:${((100 * p) / most).toFixed(1)}%` }),
    h("span", {}, p >= 0.9995 ? "1.00" : p < 0.001 ? "<.001" : p.toFixed(3).replace(/^0/, "")),
  );
}
