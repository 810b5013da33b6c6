// The controls: native inputs, each of which changes the lab at once. What is shown is what holds;
// a value the lab refuses stays in the thumb only while it is being dragged.

const SLIDER = 400; // steps from nothing to every expert at 16 bit
const THROTTLE_MS = 50, UNANSWERED_MS = 1000;

/** Sends changes at most every 50 ms, the newest of each setting, one unanswered message at a time. */
class Sender {
  constructor(model) {
    Object.assign(this, { model, waiting: {}, n: Date.now(), sentAt: 0, timer: 0 });
  }
  change(changes) {
    Object.assign(this.waiting, changes);
    this.flush();
  }
  answered() { return (this.model.get("controls").answered ?? -1) >= this.n || !this.sentAt; }
  settled() { return this.answered() && !Object.keys(this.waiting).length; }
  flush() {
    clearTimeout(this.timer);
    if (!Object.keys(this.waiting).length) return;
    const wait = this.sentAt + (this.answered() ? THROTTLE_MS : UNANSWERED_MS) - Date.now();
    if (wait > 0) { this.timer = setTimeout(() => this.flush(), wait); return; }
    this.n += 1;
    this.sentAt = Date.now();
    const [key] = Object.keys(this.waiting), changes = { [key]: this.waiting[key] };
    delete this.waiting[key]; // one setting a message: an error then names the control it is about
    this.model.send({ do: "update", changes, n: this.n });
    if (Object.keys(this.waiting).length) this.timer = setTimeout(() => this.flush(), THROTTLE_MS);
  }
}

const field = (words, input, ...more) => h("label", { class: "moe-field" }, h("span", {}, words, ...more), input);
const choice = (pairs, attributes) =>
  h("select", attributes, ...pairs.map(([value, words]) => h("option", { value }, words)));

/** Say where times come from; measured and emulated never look alike. */
function showBadge(node, device, words) {
  node.classList.toggle("emulated", device.emulated);
  node.title = device.emulated ? "Loads take as long as the named device would, in real time; this is not this machine's speed."
    : "Loads take what this machine's disk takes.";
  say(node, words);
}

class Settings {
  constructor(model, options, look) {
    Object.assign(this, { model, options, look, sender: new Sender(model), dragging: false });
    this.error = h("p", { class: "moe-error", role: "alert", hidden: true });
    this.node = h("div", { class: "moe-controls" }, this.promptRow(), this.settingsRow(), this.error);
  }

  promptRow() {
    const { options, model } = this, form = () => model.get("form");
    const write = (changes) => { model.set("form", { ...form(), ...changes }); model.save_changes(); };
    this.prompt = h("textarea", { rows: 2, "aria-label": "Prompt", spellcheck: "false",
      oninput: () => write({ prompt: this.prompt.value }),
      onkeydown: (e) => { if (e.key === "Enter" && (e.ctrlKey || e.metaKey)) { e.preventDefault(); this.run(); } } });
    const groups = Object.entries(options.prompts).map(([domain, prompts]) => h("optgroup", { label: domain },
      ...prompts.map((p) => h("option", { value: p }, `${domain}: ${p.trim().replace(/\s+/g, " ").slice(0, 56)}`))));
    this.domains = h("select", { "aria-label": "Prompts by domain",
      onchange: () => { this.prompt.value = this.domains.value; write({ prompt: this.domains.value }); } },
      h("option", { value: "", disabled: true }, "your own prompt"), ...groups);
    this.tokens = h("input", { type: "number", min: 1, max: 4000, step: 1, onchange: () => write({ max_new_tokens: Math.max(1, +this.tokens.value || 1) }) });
    this.measure = h("input", { type: "checkbox", name: "measure_kl", onchange: () => this.sender.change({ measure_kl: this.measure.checked }) });
    this.go = h("button", { type: "button", class: "moe-run", onclick: () => this.run() }, "Run");
    this.halt = h("button", { type: "button", class: "moe-stop", onclick: () => model.send({ do: "stop", where: "run" }) }, "Stop");
    const title = h("span", { class: "moe-prompt-head" }, h("span", {}, "Prompt"), groups.length ? this.domains : "");
    return h("div", { class: "moe-row moe-ask" }, h("div", { class: "moe-field moe-wide" }, title, this.prompt),
      h("div", { class: "moe-go" }, h("div", { class: "moe-buttons" }, this.go, this.halt),
        h("div", { class: "moe-extras" }, h("label", {}, "max tokens ", this.tokens), h("label", { title: "Run the full-precision model along on the same context" }, this.measure, "measure KL"))));
  }

  run() {
    if (this.running) return;
    const form = { ...this.model.get("form"), prompt: this.prompt.value, max_new_tokens: Math.max(1, +this.tokens.value || 1) };
    this.model.send({ do: "run", form, where: "run" });
  }

  settingsRow() {
    const { options, sender } = this, bits = options.tiers.map((b) => [b, `${b} bit`]);
    const select = (key, pairs, parse = (x) => x) => {
      const node = choice(pairs, { name: key, onchange: () => sender.change({ [key]: parse(node.value) }) });
      return node;
    };
    this.bits = select("bits", bits, Number);
    this.low_bits = select("low_bits", [["", "off"], ...bits.filter(([b]) => b < 16)], (x) => (x ? Number(x) : null));
    this.strategy = select("strategy", options.strategies.map((s) => [s, s.replaceAll("_", " ")]));
    this.device = select("device", []);
    for (const emulated of [false, true]) {
      this.device.append(h("optgroup", { label: emulated ? "emulated" : "measured" }, ...options.devices
        .filter((d) => d.emulated === emulated).map((d) => h("option", { value: d.name }, d.title))));
    }
    this.prefetch = select("prefetch", [[0, "off"], [1, "1 layer"], [2, "2 layers"], [3, "3 layers"]], Number);
    this.badge = h("b", { class: "moe-badge" });
    return h("div", { class: "moe-row moe-set" }, this.budgetField(), field("Bits", this.bits), field("Low bits", this.low_bits),
      field("Strategy", this.strategy), field("Prefetch ahead", this.prefetch), field("Device", this.device, this.badge));
  }

  budgetField() {
    const total = this.options.all_experts_bytes, sender = this.sender;
    const send = () => {
      const budget = Math.round((total * +this.slider.value) / SLIDER);
      this.label(budget, null);
      sender.change({ budget });
    };
    this.slider = h("input", { type: "range", name: "budget", min: 1, max: SLIDER, step: 1, oninput: send,
      onpointerdown: () => { this.dragging = true; } });
    this.release = () => { if (this.dragging) { this.dragging = false; this.sync(); } };
    for (const event of ["pointerup", "pointercancel"]) document.addEventListener(event, this.release, true);
    this.value = h("output", { class: "moe-value" });
    this.marks = [["one token", h("i"), h("span")], ["everything", h("i"), h("span")]];
    this.never = h("span", { class: "moe-never" });
    const track = h("span", { class: "moe-track" }, this.never, this.slider);
    return h("label", { class: "moe-field moe-budget" }, h("span", {}, "Budget", this.value), track, h("span", { class: "moe-marks", "aria-hidden": true }, ...this.marks.flatMap(([, tick, label]) => [tick, label])));
  }

  label(budget, experts) {
    const share = budget / this.options.all_experts_bytes, each = this.options.expert_bytes[this.bits.value];
    const count = experts ?? Math.floor(budget / each), every = this.options.layers * this.options.experts;
    say(this.value, `${bytes(budget)} · ${percent(share)} · ${count < every ? count : `all ${every}`} experts`);
    this.slider.setAttribute("aria-valuetext", this.value.textContent);
    this.slider.style.setProperty("--v", Math.min(1, this.slider.value / SLIDER));
  }

  /** Show what holds, but never pull a control out of a hand. */
  sync() {
    const now = this.model.get("controls"), total = this.options.all_experts_bytes;
    if (this.sender.settled()) {
      this.measure.checked = now.measure_kl;
      for (const key of ["bits", "low_bits", "strategy", "device", "prefetch"]) this[key].value = now[key] ?? "";
      if (!this.dragging) {
        this.slider.value = Math.round((SLIDER * now.budget_bytes) / total);
        this.label(now.budget_bytes, now.budget_experts);
      }
    }
    const device = this.options.devices.find((d) => d.name === now.device);
    showBadge(this.badge, device, device.emulated ? "emulated" : "measured");
    const { layers, experts, expert_bytes } = this.options;
    this.placeMarks([now.token_cycle_bytes, layers * experts * expert_bytes[now.bits]].map((n) => Math.min(1, n / total)));
    this.never.style.setProperty("--at", Math.min(1, now.minimum_budget_bytes / total));
  }

  /** Ticks where they belong; labels below them, pushed apart where they would touch. */
  placeMarks(shares) {
    const wide = this.slider.clientWidth || 270;
    let free = 0;
    this.marks.forEach(([words, tick, label], i) => {
      tick.style.setProperty("--at", shares[i]);
      say(label, words);
      const at = 8 + shares[i] * (wide - 16), size = label.offsetWidth || 60;
      const left = Math.min(Math.max(free, at - size / 2), wide - size);
      label.style.left = `${left}px`;
      free = left + size + 8;
    });
  }

  syncForm() {
    const form = this.model.get("form");
    if (document.activeElement !== this.prompt) this.prompt.value = form.prompt ?? "";
    if (document.activeElement !== this.tokens) this.tokens.value = form.max_new_tokens ?? 200;
    this.domains.value = Object.values(this.options.prompts).flat().includes(form.prompt) ? form.prompt : "";
  }

  showRunning(running) {
    this.running = running;
    this.go.setAttribute("aria-disabled", running);
    this.halt.setAttribute("aria-disabled", !running);
  }

  close() {
    for (const event of ["pointerup", "pointercancel"]) document.removeEventListener(event, this.release, true);
  }

  /** Draw an error by the control it is about; an empty one clears it. */
  showError({ where = "", text = "" }) {
    const about = { budget: this.slider, bits: this.bits, low_bits: this.low_bits, strategy: this.strategy, device: this.device, prefetch: this.prefetch, run: this.prompt };
    for (const [name, control] of Object.entries(about)) {
      control.toggleAttribute("aria-invalid", text !== "" && name === where);
      if (control.hasAttribute("aria-invalid")) control.setAttribute("aria-invalid", "true");
    }
    say(this.error, text);
    this.error.hidden = !text;
  }
}
