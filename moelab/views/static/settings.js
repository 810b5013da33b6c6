// The settings: native inputs, each of which changes the lab at once. What is shown is what holds;
// a value the lab refuses stays in the thumb only while it is being dragged, and what was refused
// is said in a box under the control it is about.

import { Budget } from "./budget.js";
import { Decisions } from "./decisions.js";
import { Draft } from "./draft.js";
import { button, cross, h, keep, markup, optionsOf, say, showBadge } from "./element.js";
import { tierName, within } from "./numbers.js";
import { Prompt } from "./prompt.js";

class Fault {
  constructor(dismissed) {
    this.words = h("span");
    this.dismiss = () => {
      if (this.node.hidden) return;
      this.dismissed = this.key;
      this.node.hidden = true;
      dismissed();
    };
    const close = cross("Dismiss", this.dismiss);
    this.node = markup`
      <div class="moe-error" role="alert" hidden>${[this.words, close]}</div>`;
  }

  /** Say it under the first control that is seen; one of the same `key` stays away once dismissed. */
  show(text, controls, key) {
    this.controls = controls;
    this.key = key;
    if (!text) this.dismissed = null;
    say(this.words, text);
    this.node.hidden = !text || key === this.dismissed;
    this.place();
  }

  place() {
    if (this.node.hidden) return;
    const root = this.node.offsetParent?.getBoundingClientRect(),
      control = this.controls.find((one) => one.offsetParent); // the decisions may be folded away
    if (!root || !control) return;
    const of = control.getBoundingClientRect();
    const wide = this.node.offsetWidth,
      left = within(of.left - root.left, 14, root.width - wide - 14);
    const tip = of.left - root.left - left + Math.min(of.width / 2, 24);
    this.node.style.left = `${left}px`;
    this.node.style.top = `${of.bottom - root.top + 9}px`;
    this.node.style.setProperty("--tip", `${within(tip, 8, wide - 16)}px`);
  }
}

const THROTTLE_MS = 50;
const UNANSWERED_MS = 1000;
const DEAF_MS = 1500;

/**
 * Tells the kernel what is asked for and knows what it has answered. Of each setting the newest is
 * sent, at most every 50 ms, one unanswered at a time.
 */
export class Sender {
  /** `deaf(on)` is told when the kernel has not answered for a while, or is gone, or has again. */
  constructor(model, deaf = (_on) => {}) {
    this.model = model;
    this.deaf = deaf;
    this.waiting = {};
    this.n = Date.now();
    this.sentAt = 0;
    this.timer = this.patience = undefined;
  }

  /** Ask for something now. */
  send(content) {
    const pending = !this.answered();
    this.n += 1;
    this.sentAt = Date.now();
    try {
      this.model.send({ ...content, n: this.n });
    } catch {
      return this.deaf("gone"); // its end in the kernel is
    }
    if (!pending) this.patience = setTimeout(() => this.deaf(!this.answered()), DEAF_MS);
  }

  /** `where` is the control that asked: an error is drawn there. */
  change(changes, where = Object.keys(changes)[0]) {
    this.waiting[where] = changes;
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
    if (this.answered()) this.deaf(false);
    const [where] = Object.keys(this.waiting);
    if (where === undefined) return;
    const wait = this.sentAt + (this.answered() ? THROTTLE_MS : UNANSWERED_MS) - Date.now();
    if (wait > 0) {
      this.timer = setTimeout(() => this.flush(), wait);
      return;
    }
    const changes = this.waiting[where];
    delete this.waiting[where]; // one setting a message: an error then is about one control
    this.send({ do: "update", where, changes });
    this.timer = setTimeout(() => this.flush(), THROTTLE_MS);
  }

  close() {
    clearTimeout(this.timer);
    clearTimeout(this.patience);
  }
}

/** States of a kernel after which it does not know what it showed before. */
const ENDS = ["restarting", "autorestarting", "terminating", "dead"];

/** Said while the kernel does not answer; `told(on)` hears of it too. */
class Deaf {
  constructor(model, told) {
    this.told = told;
    this.kernel = () => model.widget_manager?.kernel; // JupyterLab and Notebook 7 have it
    this.gone = false;
    this.moved = (_, status) => {
      if (ENDS.includes(status)) this.show("gone");
    };
    this.heard = this.kernel()?.statusChanged;
    this.heard?.connect(this.moved);
    const onclick = () => this.kernel().interrupt();
    this.cut = button("Interrupt the cell", { title: "As ■ in the notebook's toolbar", onclick });
    this.words = h("span");
    this.node = markup`<p class="moe-deaf" role="status" hidden>${[this.words, this.cut]}</p>`;
  }

  show(on) {
    this.gone ||= on === "gone";
    this.node.hidden = !on && !this.gone;
    this.told(!this.node.hidden);
    if (this.node.hidden) return;
    const kernel = this.kernel(),
      gone = this.gone || kernel?.status === "idle"; // has time, and does not answer
    this.cut.hidden = gone || !kernel?.interrupt;
    const now = this.cut.hidden ? " To end it now, interrupt the kernel in the notebook." : "",
      busy = `The kernel is busy with a cell; changes apply when it ends.${now}`;
    say(this.words, gone ? "The kernel of this dashboard is gone: run its cell again." : busy);
  }

  close() {
    this.heard?.disconnect(this.moved);
  }
}

/** KL is measured at every n-th token: it takes a second model's time. */
const MEASURED = [[0, "off"], [1, "each token"], [4, "1 in 4"], [16, "1 in 16"]];

export class Settings {
  /** `deafen(on)` hears of a kernel that does not answer, as the controls here do. */
  constructor(model, options, deafen = (_on) => {}) {
    this.model = model;
    this.options = options;
    this.deaf = new Deaf(model, (deaf) => {
      this.ask.show({ deaf });
      deafen(deaf);
    });
    this.sender = new Sender(model, (on) => this.deaf.show(on));
    this.measure = this.select("measure_kl", optionsOf(MEASURED), Number);
    this.draft = new Draft(model, options, this.sender);
    this.ask = new Prompt(model, options, this.sender, this.measure);
    const change = (changes, where) => this.sender.change(changes, where),
      settle = () => this.sync();
    this.budget = new Budget(options, (budget) => change({ budget }), settle);
    const toggled = (decisions) => keep(model, { decisions });
    this.decisions = new Decisions(options, { change, settle, toggled });
    this.fault = new Fault(() => model.send({ do: "dismiss" }));
    // What was wrong with a run may be right now; a setting that holds is answered by the kernel.
    this.ask.node.addEventListener("input", () => this.about === "run" && this.fault.dismiss());
    this.strategy = this.presets();
    this.decisions.line.prepend(markup`<label class="moe-pick">Strategy ${this.strategy}</label>`);
    this.node = markup`
      <div class="moe-controls">${[this.ask.node, this.deaf.node, this.row(), this.decisions.node]}</div>`;
  }

  /** One preset per strategy, by group; `own` stands for a mix or one made in a notebook cell. */
  presets() {
    this.own = h("option", { value: "own", disabled: true, hidden: true });
    const groups = this.options.presets.map(({ group, entries }) =>
      groupOf(group, entries.map((p) => [p.name, p.title, { title: p.text }])),
    );
    const node = this.select("strategy", [this.own, ...groups]);
    node.setAttribute("aria-describedby", this.decisions.about.id);
    return node;
  }

  row() {
    const { tiers, devices } = this.options,
      bits = tiers.map((b) => [b, tierName(b)]),
      lower = bits.filter(([b]) => b < Math.max(...tiers)),
      layers = [1, 2, 3].map((n) => [n, `${n} layer${n > 1 ? "s" : ""}`]),
      unread = ["unread", "–", { hidden: true }];
    const lows = optionsOf([["", "off"], ...lower, unread]),
      depths = optionsOf([[0, "off"], ...layers, unread]);
    this.bits = this.select("bits", optionsOf(bits), Number);
    this.low_bits = this.select("low_bits", lows, (x) => (x ? Number(x) : null));
    this.prefetch = this.select("prefetch", depths, Number);
    const clock = (words, emulated) => {
      const these = devices.filter((d) => d.emulated === emulated);
      return groupOf(words, these.map((d) => [d.name, d.title]));
    };
    this.device = this.select("device", [clock("measured", false), clock("emulated", true)]);
    this.badge = h("b", { class: "moe-badge" });
    const field = (words, ...more) =>
      markup`<label class="moe-field"><span>${words}${more.slice(1)}</span>${more[0]}</label>`;
    return markup`
      <div class="moe-row moe-set">
        ${this.budget.node}
        ${field("Bits", this.bits)}
        ${field("Low bits", this.low_bits)}
        ${field("Prefetch ahead", this.prefetch)}
        ${this.draft.node}
        ${field("Device", this.device, this.badge)}
      </div>`;
  }

  select(name, entries, parse = (x) => x) {
    const onchange = () => this.sender.change({ [name]: parse(node.value) }),
      node = h("select", { name, onchange }, ...entries);
    return node;
  }

  /** Show what holds, but never pull a control out of a hand. */
  sync() {
    const now = this.model.get("controls"),
      settled = this.sender.settled();
    if (settled) {
      const every = now.measure_kl; // from Python it may be any number
      if (!MEASURED.some(([n]) => n === every)) this.measure.append(...optionsOf([[every, `1 in ${every}`]]));
      this.measure.value = every;
      for (const name of ["bits", "low_bits", "device", "prefetch"]) {
        const unread = now.unread.includes(name);
        this[name].disabled = unread;
        this[name].title = unread ? "No part of this strategy looks at this setting." : "";
        this[name].value = unread ? "unread" : (now[name] ?? "");
      }
      const known = this.options.presets.flatMap(({ entries }) => entries.map((p) => p.name)),
        named = known.includes(now.strategy);
      this.own.hidden = named;
      say(this.own, named ? "" : now.label);
      this.strategy.value = named ? now.strategy : "own";
      this.strategy.title = named ? `lab.update(strategy="${now.strategy}")` : now.about;
    }
    this.decisions.sync(now, settled);
    this.budget.sync(now, settled);
    const device = this.options.devices.find((d) => d.name === now.device);
    showBadge(this.badge, device, device.emulated ? "emulated" : "measured");
  }

  /** Draw an error by the control it is about; an empty one clears it. */
  showError({ where = "", text = "" }, run) {
    const { bits, low_bits, strategy, device, prefetch } = this;
    const about = {
      budget: this.budget.slider, run: this.ask.prompt,
      bits, low_bits, strategy, device, prefetch, draft_length: this.draft.length,
      ...Object.fromEntries(this.decisions.controls()),
    };
    for (const [name, control] of Object.entries(about)) {
      if (text && name === where) control.setAttribute("aria-invalid", "true");
      else control.removeAttribute("aria-invalid");
    }
    this.about = where;
    const beside = [about[where] ?? this.ask.prompt, this.strategy];
    this.fault.show(text, beside, `${run} ${where} ${text}`);
  }

  close() {
    this.sender.close();
    this.deaf.close();
  }
}

const groupOf = (label, entries) => h("optgroup", { label }, ...optionsOf(entries));
