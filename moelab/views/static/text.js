// The text as it comes, each token shaded by what it cost or by its KL against full precision.

import { KL_ENDS } from "./bars.js";
import { h, markup, say, unique } from "./element.js";
import { millis, nice, onLogScale, quantile } from "./numbers.js";
import { onOneLine } from "./passes.js";

const REVEAL_MS = 120;
// What is faint costs nothing per token where the browser knows highlights; elsewhere nothing is.
const faint = globalThis.Highlight && CSS.highlights ? new Highlight() : null;
if (faint) CSS.highlights.set("moe-later", faint);

const PARAGRAPH = 40; // tokens at least

/** The ends of the shades: what is left pale, what is full. */
export function shadesOf(mode, total_ms) {
  if (mode === "kl") return KL_ENDS;
  const high = total_ms.length ? nice(Math.max(0.2, quantile(total_ms, 0.97))) : 10;
  return { low: Math.min(high / 4, nice(0.5 * quantile(total_ms, 0.1))), high };
}

/** How strong the shade of a value is, %. */
export const strengthOf = (x, ends) =>
  Number.isFinite(x) ? Math.round(68 * onLogScale(x, ends)) : 0;

export class TokenText {
  /**
   * `beside`: the text is one of its own and stands beside what it is made of. `onShade(mode)` and
   * `onPick(token)` are called where somebody chooses.
   */
  constructor(look, cursor, beside, onShade, onPick) {
    this.look = look;
    this.cursor = cursor;
    this.onPick = onPick;
    this.spans = [];
    this.run = this.frame = null;
    this.first = 0;
    this.follow = true;
    this.mode = "cost";
    this.later = new Range();
    this.beside = beside;
    this.prompt = h("span", { class: "moe-prompt" });
    this.body = markup`
      <div class="moe-text" tabindex="0" role="group"
        aria-label="Generated text; arrow keys move from token to token, Enter shows what a token cost and why">
      </div>`;
    this.clear();
    this.reference = h("p", { class: "moe-drafts", hidden: true });
    this.scale = h("span", { class: "moe-scale" });
    this.drafts = markup`
      <p class="moe-drafts moe-soft" hidden>
        <u>drafted and accepted</u><i class="moe-rejected" data-words="drafted and rejected"></i>
      </p>`;
    const name = unique(),
      radio = (value) => h("input", { type: "radio", name, value, onchange: () => onShade(value) });
    this.radios = { cost: radio("cost"), kl: radio("kl") };
    this.node = markup`
      <section class="moe-panel moe-words" aria-label="Text">
        <header>
          <h3>Text</h3>
          <span class="moe-switch" role="radiogroup" aria-label="Shade tokens by">
            <label>${this.radios.cost}cost</label>
            <label>${this.radios.kl}KL</label>
          </span>
          ${this.scale}
        </header>
        ${[this.body, this.drafts, this.reference]}
      </section>`;
    this.listen();
  }

  listen() {
    const { body, cursor } = this,
      under = ({ target }) => (target.dataset?.token === undefined ? null : +target.dataset.token);
    body.addEventListener("scroll", () => {
      this.follow = body.scrollTop + body.clientHeight > body.scrollHeight - 24;
    });
    body.addEventListener("pointermove", (e) => cursor.set(under(e), e));
    body.addEventListener("pointerleave", () => cursor.set(null));
    body.addEventListener("click", (e) => {
      const marking = !getSelection().isCollapsed; // text is being marked, to be copied
      if (under(e) === null || marking) return;
      cursor.set(null);
      this.onPick(under(e));
    });
    body.addEventListener("blur", () => cursor.set(null));
    body.addEventListener("keydown", (e) => cursor.key(e, () => this.placeOf(cursor.at)));
  }

  show(frame) {
    if (frame.run !== this.run || frame.first !== this.first || frame.count < this.spans.length) {
      this.clear();
      this.spans = [];
      this.told = -1;
      this.follow = true;
    }
    Object.assign(this, { run: frame.run, first: frame.first, frame });
    say(this.prompt, frame.prompt);
    if (!frame.past) {
      say(this.reference, frame.reference ?? "");
      this.reference.hidden = !frame.reference;
    }
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
    this.drafts.hidden = !frame.draft;
    this.showPasses(frame.passes ?? []);
    if (!frame.past || begin < frame.count) this.shade(begin);
    this.setNow(frame.past?.token ?? null);
    const bottom = (node) => node.getBoundingClientRect().bottom;
    if (this.follow && !frame.past && bottom(this.out.lastElementChild) > bottom(this.body))
      this.body.scrollTop = this.body.scrollHeight;
  }

  /**
   * Accepted tokens are underlined; rejected ones stand before what came in their place. These are
   * drawn and not written: what is marked, copied or searched is the run's own text.
   */
  showPasses(passes) {
    const at = (token) => this.spans[token - this.first];
    for (const { token, accepted, rejected } of passes) {
      if (token <= this.told) continue;
      this.told = token;
      for (let i = token; i < token + accepted; i++) at(i)?.classList.add("drafted");
      const words = onOneLine(rejected),
        title = `drafted and rejected: ${words}`,
        place = { "data-token": token + accepted, "data-words": words, title };
      if (rejected.length) at(token + accepted)?.before(h("i", { class: "moe-rejected", ...place }));
    }
  }

  /** No token; they follow the prompt, or stand in a column of their own. */
  clear() {
    const first = h("div", {}, this.prompt);
    this.out = this.beside ? h("div", {}, h("div")) : this.body;
    this.body.replaceChildren(first, ...(this.beside ? [this.out] : []));
    this.body.classList.toggle("beside", this.beside);
  }

  /** Where the next token goes; after a line's end a new block: older ones are not laid out again. */
  paragraph() {
    const last = this.out.lastElementChild;
    if (last.childElementCount < PARAGRAPH || !last.lastChild.textContent.endsWith("\n"))
      return last;
    return this.out.appendChild(h("div"));
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
      byKl = this.mode === "kl",
      ends = shadesOf(this.mode, tokens.total_ms);
    const key = `${this.mode} ${ends.low} ${ends.high} ${this.look.theme}`;
    if (key !== this.shaded) {
      begin = 0;
      this.shaded = key;
      this.drawScale(byKl, ends.low, ends.high);
    }
    const values = byKl ? tokens.kl : tokens.total_ms;
    for (let i = begin; i < this.spans.length; i++) {
      const strength = strengthOf(values[i], ends);
      this.spans[i].style.background = strength
        ? `color-mix(in srgb, var(--moe-${this.mode}) ${strength}%, transparent)`
        : "";
    }
    const missing = byKl && count > 0 && !tokens.kl.some(Number.isFinite);
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
