// The settings: native inputs, each of which changes the lab at once. What is shown is what holds;
// a value the lab refuses stays in the thumb only while it is being dragged.

const THROTTLE_MS = 50;
const UNANSWERED_MS = 1000;

/** Sends changes at most every 50 ms: of each setting the newest, one unanswered at a time. */
class Sender {
  constructor(model) {
    Object.assign(this, { model, waiting: {}, n: Date.now(), sentAt: 0, timer: 0 });
  }

  change(changes) {
    Object.assign(this.waiting, changes);
    this.flush();
  }

  answered() {
    return !this.sentAt || (this.model.get("controls").answered ?? -1) >= this.n;
  }

  settled() {
    return this.answered() && !Object.keys(this.waiting).length;
  }

  flush() {
    clearTimeout(this.timer);
    const [key] = Object.keys(this.waiting);
    if (key === undefined) return;
    const wait = this.sentAt + (this.answered() ? THROTTLE_MS : UNANSWERED_MS) - Date.now();
    if (wait > 0) {
      this.timer = setTimeout(() => this.flush(), wait);
      return;
    }
    const changes = { [key]: this.waiting[key] };
    delete this.waiting[key]; // one setting a message: an error then names the control it is about
    this.n += 1;
    this.sentAt = Date.now();
    this.model.send({ do: "update", changes, n: this.n });
    this.timer = setTimeout(() => this.flush(), THROTTLE_MS);
  }
}

/** Say where times come from; measured and emulated never look alike. */
function showBadge(node, device, words) {
  node.classList.toggle("emulated", device.emulated);
  node.title = device.emulated
    ? "Loads take as long as the named device would, in real time: not this machine's speed."
    : "Loads take what this machine's disk takes.";
  say(node, words);
}

class Settings {
  constructor(model, options) {
    Object.assign(this, { model, options, sender: new Sender(model) });
    this.measure = h("input", {
      type: "checkbox",
      name: "measure_kl",
      onchange: () => this.sender.change({ measure_kl: this.measure.checked }),
    });
    this.ask = new Ask(model, options, this.measure);
    this.budget = new Budget(
      options,
      (budget) => this.sender.change({ budget }),
      () => this.sync(),
    );
    this.error = h("p", { class: "moe-error", role: "alert", hidden: true });
    this.node = h("div", { class: "moe-controls" }, this.ask.node, this.row(), this.error);
  }

  row() {
    const { tiers, strategies } = this.options,
      bits = tiers.map((b) => [b, `${b} bit`]),
      lower = bits.filter(([b]) => b < Math.max(...tiers)),
      layers = [1, 2, 3].map((n) => [n, `${n} layer${n > 1 ? "s" : ""}`]);
    this.bits = this.select("bits", bits, Number);
    this.low_bits = this.select("low_bits", [["", "off"], ...lower], (x) => (x ? Number(x) : null));
    this.strategy = this.select(
      "strategy",
      strategies.map((s) => [s, s.replaceAll("_", " ")]),
    );
    this.prefetch = this.select("prefetch", [[0, "off"], ...layers], Number);
    this.device = this.select("device", []);
    for (const emulated of [false, true]) {
      const these = this.options.devices.filter((d) => d.emulated === emulated),
        label = emulated ? "emulated" : "measured";
      const entries = these.map((d) => h("option", { value: d.name }, d.title));
      this.device.append(h("optgroup", { label }, ...entries));
    }
    this.badge = h("b", { class: "moe-badge" });
    const field = (words, input, ...more) =>
      h("label", { class: "moe-field" }, h("span", {}, words, ...more), input);
    return h(
      "div",
      { class: "moe-row moe-set" },
      this.budget.node,
      field("Bits", this.bits),
      field("Low bits", this.low_bits),
      field("Strategy", this.strategy),
      field("Prefetch ahead", this.prefetch),
      field("Device", this.device, this.badge),
    );
  }

  select(name, pairs, parse = (x) => x) {
    const onchange = () => this.sender.change({ [name]: parse(node.value) });
    const entries = pairs.map(([value, words]) => h("option", { value }, words));
    const node = h("select", { name, onchange }, ...entries);
    return node;
  }

  /** Show what holds, but never pull a control out of a hand. */
  sync() {
    const now = this.model.get("controls"),
      settled = this.sender.settled();
    if (!this.options.strategies.includes(now.strategy) && this.own !== now.strategy) {
      this.own = now.strategy; // one made in a notebook cell: shown, but not to be chosen by name
      this.strategy.append(h("option", { value: this.own, disabled: true }, this.own));
    }
    if (settled) {
      this.measure.checked = now.measure_kl;
      for (const name of ["bits", "low_bits", "strategy", "device", "prefetch"]) {
        this[name].value = now[name] ?? "";
      }
    }
    this.budget.sync(now, settled);
    const device = this.options.devices.find((d) => d.name === now.device);
    showBadge(this.badge, device, device.emulated ? "emulated" : "measured");
  }

  /** Draw an error by the control it is about; an empty one clears it. */
  showError({ where = "", text = "" }) {
    const about = { budget: this.budget.slider, run: this.ask.prompt };
    for (const name of ["bits", "low_bits", "strategy", "device", "prefetch"]) {
      about[name] = this[name];
    }
    for (const [name, control] of Object.entries(about)) {
      if (text && name === where) control.setAttribute("aria-invalid", "true");
      else control.removeAttribute("aria-invalid");
    }
    say(this.error, text);
    this.error.hidden = !text;
  }

  close() {
    this.budget.close();
  }
}
