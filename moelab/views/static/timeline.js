// The time axis as controls: play, a slider over tokens, one over layers, and the way back to live.

import { button, h, markup, say } from "./element.js";
import { bytes, plural } from "./numbers.js";

const HINT = "Click a token, or drag: every moment of the run is kept.";
const PLAY = "Play the run, layer by layer";
const TALLIED = ["hit", "load", "prefetch", "downgrade", "skip", "substitute", "evict"];

export class Timeline {
  /** `go(token, layer)`, `live()`, `play()` and `costliest()` are what its controls ask for. */
  constructor({ layers, canLive, go, live, play, costliest }) {
    this.layers = layers;
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
      layer = at ? at.layer : this.layers - 1,
      top = Math.max(0, count - 1);
    if (+this.token.max !== top) this.token.max = `${top}`;
    this.token.value = `${Math.max(0, token)}`;
    this.layer.value = `${layer + 1}`;
    for (const input of [this.token, this.layer, this.play, this.dear]) input.disabled = count < 1;
    const words = piece === undefined ? "" : ` ${JSON.stringify(piece)}`;
    say(this.says, count ? `token ${token} of ${top}` : "no token yet");
    say(this.inLayer, inLayer(layer, this.layers));
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

/** @param {number} layer @param {number} layers */
export const inLayer = (layer, layers) =>
  layer < 0 ? "before layer 0" : layer === layers - 1 ? "all layers" : `after layer ${layer}`;
