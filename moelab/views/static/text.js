// The text as it comes, each token shaded by what it cost or by its KL against full precision.

const REVEAL_MS = 120;
// What is faint costs nothing per token where the browser knows highlights; elsewhere nothing is.
const faint = globalThis.Highlight && CSS.highlights ? new Highlight() : null;
if (faint) CSS.highlights.set("moe-later", faint);

const PARAGRAPH = 40; // tokens at least

class TokenText {
  /** `onShade(mode)` and `onPick(token)` are called where somebody chooses. */
  constructor(look, cursor, onShade, onPick) {
    Object.assign(this, { look, cursor, onPick, spans: [], run: null, follow: true, mode: "cost" });
    this.prompt = h("span", { class: "moe-prompt" });
    this.body = h(
      "div",
      {
        class: "moe-text",
        tabindex: 0,
        role: "group",
        "aria-label":
          "Generated text; arrow keys move from token to token, Enter shows what a token cost and why",
      },
      h("div", {}, this.prompt),
    );
    this.later = new Range();
    this.scale = h("span", { class: "moe-scale" });
    const pick = (mode, words) => {
      const input = h("input", {
        type: "radio",
        name: `shade-${Math.random()}`,
        value: mode,
        onchange: () => onShade(mode),
      });
      return [input, h("label", {}, input, words)];
    };
    const [cost, costLabel] = pick("cost", "cost"),
      [quality, qualityLabel] = pick("kl", "KL");
    quality.name = cost.name;
    this.radios = { cost, kl: quality };
    this.node = h(
      "section",
      { class: "moe-panel moe-words", "aria-label": "Text" },
      h(
        "header",
        {},
        h("h3", {}, "Text"),
        h(
          "span",
          { class: "moe-switch", role: "radiogroup", "aria-label": "Shade tokens by" },
          costLabel,
          qualityLabel,
        ),
        this.scale,
      ),
      this.body,
    );
    this.listen();
  }

  listen() {
    const { body, cursor } = this;
    body.addEventListener("scroll", () => {
      this.follow = body.scrollTop + body.clientHeight > body.scrollHeight - 24;
    });
    body.addEventListener("pointermove", (e) =>
      cursor.set(e.target.dataset?.token === undefined ? null : +e.target.dataset.token, e),
    );
    body.addEventListener("pointerleave", () => cursor.set(null));
    body.addEventListener("click", (e) => {
      const marking = !getSelection().isCollapsed; // text is being marked, to be copied
      if (e.target.dataset?.token === undefined || marking) return;
      cursor.set(null);
      this.onPick(+e.target.dataset.token);
    });
    body.addEventListener("blur", () => cursor.set(null));
    body.addEventListener("keydown", (e) => cursor.key(e, () => this.placeOf(cursor.at)));
  }

  show(frame) {
    if (frame.run !== this.run || frame.first !== this.first || frame.count < this.spans.length) {
      this.body.replaceChildren(h("div", {}, this.prompt));
      this.spans = [];
      this.follow = true;
    }
    Object.assign(this, { run: frame.run, first: frame.first, frame });
    say(this.prompt, frame.prompt);
    const begin = this.spans.length;
    for (let i = begin; i < frame.count; i++) {
      const span = h(
        "span",
        { "data-token": frame.first + i, "data-ms": frame.tokens.total_ms[i].toFixed(2) },
        frame.texts[i],
      );
      if (Number.isFinite(frame.tokens.kl[i])) span.dataset.kl = frame.tokens.kl[i];
      this.spans.push(span);
      this.paragraph().append(span);
    }
    if (!frame.past || begin < frame.count) this.shade(begin);
    this.setNow(frame.past?.token ?? null);
    if (this.follow && !frame.past) this.body.scrollTop = this.body.scrollHeight;
  }

  /** Where the next token goes; after a line's end a new block, so that older ones are not laid out again. */
  paragraph() {
    const last = this.body.lastChild;
    if (last.childElementCount < PARAGRAPH || !last.lastChild.textContent.endsWith("\n"))
      return last;
    return this.body.appendChild(h("div"));
  }

  /** What came after the moment shown is faint; null: the newest is shown. */
  setNow(token) {
    this.here?.classList.remove("now");
    this.here?.removeAttribute("aria-current");
    this.here = token === null ? null : this.spans[token - this.first];
    faint?.delete(this.later);
    if (!this.here) return;
    this.here.classList.add("now");
    this.here.setAttribute("aria-current", "step");
    this.later.setStartAfter(this.here);
    this.later.setEndAfter(this.body.lastChild);
    faint?.add(this.later);
    this.revealing ??= setTimeout(() => this.reveal(), REVEAL_MS);
  }

  /** Bring the moment shown into sight; not at each step, because that asks for a layout. */
  reveal() {
    this.revealing = undefined;
    if (!this.here) return;
    const { top, bottom } = this.here.getBoundingClientRect(),
      box = this.body.getBoundingClientRect();
    if (top < box.top + 4 || bottom > box.bottom - 4)
      this.body.scrollTop += top - box.top - box.height / 2;
  }

  /** Shade tokens from `begin` on, or all of them where the scale has changed. */
  shade(begin = 0) {
    if (!this.frame) return;
    const { tokens, count } = this.frame,
      byKl = this.mode === "kl";
    let low = KL_LOW,
      high = KL_HIGH;
    if (!byKl) {
      high = count ? nice(Math.max(0.2, quantile(tokens.total_ms, 0.97))) : 10;
      low = Math.min(high / 4, nice(0.5 * quantile(tokens.total_ms, 0.1)));
    }
    const key = `${this.mode} ${low} ${high} ${this.look.theme}`;
    if (key !== this.shaded) {
      begin = 0;
      this.shaded = key;
      this.drawScale(byKl, low, high);
    }
    const values = byKl ? tokens.kl : tokens.total_ms,
      colour = byKl ? "var(--moe-kl)" : "var(--moe-cost)";
    for (let i = begin; i < this.spans.length; i++) {
      const x = values[i],
        part = Number.isFinite(x) ? Math.log(Math.max(x, 1e-12) / low) / Math.log(high / low) : 0;
      const strength = Math.round(68 * Math.min(1, Math.max(0, part)));
      this.spans[i].style.background = strength
        ? `color-mix(in srgb, ${colour} ${strength}%, transparent)`
        : "";
    }
    const missing = byKl && count > 0 && !tokens.kl.some(Number.isFinite);
    this.scale.classList.toggle("missing", missing);
    if (missing) {
      say(this.scale, "not measured in this run");
      this.shaded = null;
    }
  }

  drawScale(byKl, low, high) {
    const ends = byKl
      ? ["10⁻⁴", "1"]
      : [millis(low), millis(high)].map((s) => s.replace(/\.0+ /, " "));
    this.scale.replaceChildren(ends[0], h("i", { class: byKl ? "kl" : "cost" }), ends[1]);
  }

  setMode(mode) {
    this.mode = mode;
    this.radios[mode].checked = true;
    this.shade();
  }

  mark(token) {
    this.marked?.classList.remove("on");
    this.marked = token === null ? null : this.spans[token - this.first];
    this.marked?.classList.add("on");
  }

  close() {
    clearTimeout(this.revealing);
    faint?.delete(this.later);
  }

  placeOf(token) {
    const span = this.spans[token - this.first];
    span?.scrollIntoView({ block: "nearest" });
    const box = (span ?? this.body).getBoundingClientRect();
    return [box.right, box.bottom];
  }
}

/**
 * The token that text and bars point at together, with its figures in the tooltip. `enter(token)`
 * goes there and `scrub(tokens)` moves on from there, in the past.
 */
class Cursor {
  constructor(tip) {
    Object.assign(this, { tip, at: null, views: [] });
  }

  set(token, event, where) {
    const changed = token !== this.at;
    this.at = token;
    if (changed) this.views.forEach((view) => view());
    if (token === null) {
      if (changed) this.tip.hide();
      return;
    }
    const [x, y] = where ?? [event.clientX, event.clientY];
    this.tip.show(x, y, ...this.describe(token));
  }

  key(event, place) {
    if (event.key === "Escape") {
      this.set(null);
      return;
    }
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
    if (!this.frame?.count) return;
    if (event.key === "Enter" && this.at !== null) {
      event.preventDefault();
      const token = this.at;
      this.set(null);
      this.enter(token);
      return;
    }
    if (step === undefined) return;
    event.preventDefault();
    if (this.frame.past) {
      this.set(null);
      this.scrub(step);
      return;
    }
    const { first, count } = this.frame;
    const next = Math.min(
      first + count - 1,
      Math.max(first, this.at === null ? first + count - 1 : this.at + step),
    );
    this.at = next;
    this.set(next, null, place());
    this.views.forEach((view) => view());
  }

  describe(token) {
    const { tokens, texts, first, causes } = this.frame,
      i = token - first,
      t = tokens;
    const waits = causes
      .filter((c) => t[c][i] >= 0.005)
      .map((c) => [`stall: ${c}`, millis(t[c][i])]);
    const some = (name) => (t[name][i] ? [[name, `${t[name][i]}`]] : []);
    return [
      `token ${token} ${JSON.stringify(texts[i])}`,
      [
        ["latency", millis(t.total_ms[i])],
        ["compute", millis(t.compute_ms[i])],
        ...waits,
        ["read", bytes(t.bytes[i])],
        ["hits", `${t.hits[i]}`],
        ["loads", `${t.loads[i]}`],
        ...some("prefetches"),
        ...some("downgrades"),
        ...some("skips"),
        ...some("substitutes"),
        ["KL", Number.isFinite(t.kl[i]) ? kl(t.kl[i]) : "not measured"],
        ["resident", `${bytes(t.resident_bytes[i])} of ${bytes(t.budget_bytes[i])}`],
      ],
    ];
  }
}
