// Why a resident expert would stay or go: the lab is asked while the pointer rests on its cell,
// and again when a new frame has come. One question at a time: the kernel may be busy.

const REST_MS = 90;
const AGAIN_MS = 500;
const PATIENCE_MS = 5000;

class Why {
  constructor(model, changed) {
    Object.assign(this, { model, key: "", asked: 0, timer: 0 });
    this.heard = ({ why }) => {
      if (why === undefined) return;
      this.asked = 0;
      if (`${why.layer},${why.expert}` !== this.key) return;
      this.answer = why;
      changed();
    };
    model.on("msg:custom", this.heard);
  }

  /** What was last said about this expert; a newer answer is asked for where there may be one. */
  about(layer, expert, seq) {
    const key = `${layer},${expert}`;
    if (key !== this.key) {
      this.forget();
      this.key = key;
      this.askIn(REST_MS, { layer, expert }, seq);
    } else if (seq !== this.seq) this.askIn(AGAIN_MS, { layer, expert }, seq);
    return this.answer;
  }

  askIn(wait, who, seq) {
    if (this.timer) return;
    this.timer = setTimeout(() => {
      this.timer = 0;
      if (Date.now() - this.asked < PATIENCE_MS) return;
      Object.assign(this, { seq, asked: Date.now() });
      this.model.send({ do: "why", ...who });
    }, wait);
  }

  forget() {
    clearTimeout(this.timer);
    Object.assign(this, { key: "", timer: 0, seq: undefined, answer: undefined });
  }

  close() {
    this.forget();
    this.model.off("msg:custom", this.heard);
  }
}

/** Terms as rows of name, bar and number; a bar spans this layer's residents, lowest to highest. */
function drawWhy({ policy, terms, error }) {
  const rows = terms.flatMap(({ name, value, low, high, text }) => {
    const share = value === null || !(high > low) ? 1 : (value - low) / (high - low);
    const fill = h("i", { style: `width:${(100 * share).toFixed(1)}%` });
    return [
      h("dt", {}, name),
      h("dd", { class: "moe-term", "aria-hidden": true }, fill),
      h("dd", {}, short(value)),
      h("dd", { class: "moe-term-text", hidden: !text }, text),
    ];
  });
  return h(
    "div",
    { class: "moe-why" },
    h("strong", {}, "Stay or go"),
    h("span", {}, error || policy),
    h("dl", {}, ...rows),
    h("small", { hidden: !rows.length }, "each bar: lowest to highest resident of this layer"),
  );
}
