// The time axis: which moment is shown, live or past, and its controls: play, a slider over tokens,
// one over layers, and the way back to live. The views are drawn by whoever owns it.

import { still } from "./colours.js";
import { button, h, markup, say } from "./element.js";
import { bytes, plural, within } from "./numbers.js";
import { beginOf } from "./recording.js";

const SWEEP = 6; // stops at a token while playing: its layers, or some of them
const STOP_MS = 70;
const STEP_MS = 600; // with reduced motion: token by token

export class Travel {
  /**
   * `source.past()` has the replay there is, or asks for it; `draw()` draws when it can, and
   * `played(on)` is told when playing begins and ends.
   */
  constructor(source, model, draw, played) {
    this.source = source;
    this.model = model;
    this.layers = model.layers;
    this.draw = draw;
    this.played = played;
    this.at = this.wanted = null;
    this.timer = 0;
  }

  /** Show a moment; null keeps the token or the layer that is shown. */
  go(token, layer, { play = false } = {}) {
    if (!play) this.pause();
    const last = this.source.count() - 1,
      end = this.layers - 1,
      now = this.wanted ?? this.at ?? { token: last, layer: end };
    const goal = token === null ? now.token : within(token, 0, Math.max(0, last)),
      before = beginOf(goal, this.model) - 1;
    this.wanted = {
      token: goal, layer: layer !== null ? within(layer, before, end) : token === null ? now.layer : end,
    };
    if (last >= 0) this.draw();
    else this.wanted = null;
  }

  step(tokens) {
    const { token } = this.wanted ?? this.at ?? { token: this.source.count() - 1 };
    this.go(token + tokens, null);
  }

  live() {
    this.pause();
    this.at = this.wanted = null;
    this.draw();
  }

  /** The replay at the moment wanted, or null while it is not there (it has been asked for). */
  arrive() {
    const past = this.source.past(this.wanted?.token);
    if (past && this.wanted) {
      this.wanted.token = Math.min(this.wanted.token, past.recording.count - 1);
      [this.at, this.wanted] = [this.wanted, null];
    }
    return past;
  }

  toggle() {
    if (this.timer) this.pause();
    else {
      const now = this.wanted ?? this.at,
        end = this.source.count() - 1;
      if (!now || now.token >= end) this.go(0, still() ? null : -1, { play: true });
      this.tick();
    }
  }

  tick() {
    const wait = still() ? STEP_MS : STOP_MS;
    this.timer = setTimeout(() => {
      const { token, layer } = this.wanted ?? this.at ?? { token: 0, layer: -1 },
        stride = still() ? this.layers : Math.ceil(this.layers / SWEEP),
        last = this.layers - 1;
      if (layer < last) this.go(token, Math.min(last, layer + stride), { play: true });
      else if (token < this.source.count() - 1)
        this.go(token + 1, still() ? last : Math.min(last, beginOf(token + 1, this.model) + stride - 1), { play: true });
      else return this.pause();
      return this.tick();
    }, wait);
    this.played(true);
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = 0;
    this.played(false);
  }
}

const HINT = "Click a token or an expert, or drag: every moment of the run is kept.";
const PLAY = "Play the run, layer by layer";
const TALLIED = ["hit", "late", "load", "prefetch", "downgrade", "skip", "substitute", "evict"];

export class Timeline {
  /** `go(token, layer)`, `live()`, `play()` and `costliest()` are what its controls ask for. */
  constructor({ model, canLive, go, live, play, costliest }) {
    this.model = model;
    const { layers } = model;
    const slider = (name, words, max, oninput) =>
      h("input", {
        type: "range", name, min: 0, max, step: 1, "aria-label": words, oninput,
        onkeydown: (e) => {
          if (e.key === "PageUp" || e.key === "PageDown") e.stopPropagation();
        },
      });
    this.token = slider("past_token", "Token shown", 0, () => go(+this.token.value, null));
    this.layer = slider("past_layer", "Layer shown", layers, () => go(null, +this.layer.value - 1));
    this.says = h("span", { class: "moe-when", "aria-hidden": true });
    this.inLayer = h("span", { class: "moe-when", "aria-hidden": true });
    // What is seen comes first in what is heard.
    const labelled = (words, title, onclick, name = "") =>
      button(words, { class: name, title, onclick, "aria-label": `${words}: ${title}` });
    this.play = button("", { class: "moe-play", title: PLAY, "aria-label": PLAY, onclick: play });
    this.dear = labelled("costliest token", "Go to the token that waited longest", costliest);
    this.back = labelled("Live", "Back to the newest token (Esc)", live, "moe-live");
    this.back.hidden = !canLive;
    this.tally = h("span");
    this.then = h("span");
    this.node = markup`
      <section class="moe-time" aria-label="Time">
        ${[this.play, this.says, this.token, this.inLayer, this.layer, this.dear, this.back]}
        <p class="moe-about-then">${[this.tally, this.then]}</p>
      </section>`;
  }

  /** `count` tokens; `at` is {token, layer} in the past and null where the newest is shown. */
  show(count, at, piece) {
    const token = at ? at.token : count - 1,
      begin = beginOf(token, this.model),
      layer = at ? at.layer : this.model.layers - 1,
      top = Math.max(0, count - 1);
    if (+this.token.max !== top) this.token.max = `${top}`;
    this.token.value = `${Math.max(0, token)}`;
    this.layer.min = `${begin}`;
    this.layer.value = `${layer + 1}`;
    for (const input of [this.token, this.layer, this.play, this.dear]) input.disabled = count < 1;
    const words = piece === undefined ? "" : ` ${JSON.stringify(piece)}`;
    say(this.says, count ? `token ${token} of 0–${top}` : "no token yet");
    say(this.inLayer, inLayer(layer, this.model.layers, begin));
    this.token.setAttribute("aria-valuetext", `${this.says.textContent}${words}`);
    this.layer.setAttribute("aria-valuetext", this.inLayer.textContent);
    this.back.setAttribute("aria-pressed", `${!at}`);
    this.node.classList.toggle("past", Boolean(at));
  }

  /** What the token had cost by then, and the settings that held. */
  tell(counts, settings) {
    const kinds = TALLIED.filter((kind) => counts?.[kind]),
      parts = kinds.map((kind) => plural(counts[kind], kind));
    if (counts?.bytes) parts.push(`${bytes(counts.bytes)} read`);
    say(this.tally, counts ? `this token so far: ${parts.join(", ") || "nothing yet"}` : HINT);
    say(this.then, settings ? `settings then: ${settings}` : "");
  }

  playing(on) {
    this.play.classList.toggle("on", on);
    this.play.title = on ? "Pause" : PLAY;
    this.play.setAttribute("aria-label", this.play.title);
  }
}

/** @param {number} layer @param {number} layers @param {number} begin the token's first layer */
export const inLayer = (layer, layers, begin = 0) =>
  layer < begin ? `before layer ${begin}` : layer === layers - 1 ? "all layers" : `after layer ${layer}`;
