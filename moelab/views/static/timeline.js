// The time axis as controls: play, a slider over tokens, one over layers, and the way back to live.

class Timeline {
  /** `go(token, layer)`, `live()`, `play()` and `costliest()` are what its controls ask for. */
  constructor({ layers, canLive, go, live, play, costliest }) {
    this.layers = layers;
    const slider = (name, words, oninput) => {
      const input = h("input", {
        ...{ type: "range", name, min: 0, max: 0, step: 1, "aria-label": words },
        oninput,
        onkeydown: (e) => {
          if (e.key === "PageUp" || e.key === "PageDown") e.stopPropagation();
        },
      });
      return input;
    };
    this.token = slider("past_token", "Token shown", () => go(+this.token.value, null));
    this.layer = slider("past_layer", "Layer shown", () => go(null, +this.layer.value - 1));
    this.layer.max = layers;
    this.says = h("span", { class: "moe-when", "aria-hidden": true });
    this.inLayer = h("span", { class: "moe-when", "aria-hidden": true });
    const button = (name, words, title, onclick) =>
      h("button", { type: "button", class: name, title, "aria-label": named(words, title), onclick }, words);
    this.play = button("moe-play", "", "Play the run, layer by layer", play);
    this.dear = button("", "costliest token", "Go to the token that waited longest", costliest);
    this.back = button("moe-live", "Live", "Back to the newest token (Esc)", live);
    this.back.hidden = !canLive;
    this.tally = h("span", { class: "moe-tally" });
    this.then = h("span", { class: "moe-then" });
    const track = (input) => h("span", { class: "moe-track" }, input);
    this.node = h(
      "section",
      { class: "moe-time", "aria-label": "Time" },
      ...[this.play, this.says, track(this.token), this.inLayer, track(this.layer)],
      ...[this.dear, this.back],
      h("p", { class: "moe-about-then" }, this.tally, this.then),
    );
  }

  /** `count` tokens; `at` is {token, layer} in the past and null where the newest is shown. */
  show(count, at, piece) {
    const token = at ? at.token : count - 1,
      layer = at ? at.layer : this.layers - 1,
      top = Math.max(0, count - 1);
    if (+this.token.max !== top) this.token.max = top;
    this.token.value = Math.max(0, token);
    this.layer.value = layer + 1;
    for (const input of [this.token, this.layer, this.play, this.dear]) input.disabled = count < 1;
    const words = piece === undefined ? "" : ` ${JSON.stringify(piece)}`;
    say(this.says, count ? `token ${token} of ${top}` : "no token yet");
    say(this.inLayer, inLayer(layer, this.layers));
    this.token.setAttribute("aria-valuetext", `${this.says.textContent}${words}`);
    this.layer.setAttribute("aria-valuetext", this.inLayer.textContent);
    for (const input of [this.token, this.layer]) {
      input.style.setProperty("--v", input.max > 0 ? input.value / input.max : 1);
    }
    this.back.setAttribute("aria-pressed", !at);
    this.node.classList.toggle("past", Boolean(at));
  }

  /** What the token had cost by then, and the settings that held. */
  tell(counts, settings) {
    const parts = [
      ...["hit", "load", "prefetch", "downgrade", "skip", "substitute", "evict"]
        .filter((kind) => counts?.[kind])
        .map((kind) => plural(counts[kind], kind)),
    ];
    if (counts?.bytes) parts.push(`${bytes(counts.bytes)} read`);
    say(this.tally, counts ? `this token so far: ${parts.join(", ") || "nothing yet"}` : HINT);
    say(this.then, settings ? `settings then: ${settings}` : "");
  }

  playing(on) {
    this.play.classList.toggle("on", on);
    const words = on ? "Pause" : "Play the run, layer by layer";
    this.play.setAttribute("aria-label", words);
    this.play.title = words;
  }
}

/** What is seen comes first in what is heard. */
const named = (words, title) => (words ? `${words}: ${title}` : title);
const HINT = "Click a token, or drag: every moment of the run is kept.";
const inLayer = (layer, layers) =>
  layer < 0 ? "before layer 0" : layer === layers - 1 ? "all layers" : `after layer ${layer}`;
const PLURALS = { prefetch: "prefetches", evict: "evictions" };
function plural(n, kind) {
  const one = kind === "evict" ? "eviction" : kind;
  return `${n} ${n === 1 ? one : (PLURALS[kind] ?? `${kind}s`)}`;
}
