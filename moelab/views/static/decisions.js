// The strategy, opened up: one drop-down per decision, each offering that part of every strategy,
// and the parameters of the parts chosen. Folded away it is one line that explains the strategy.

import { button, optionsOf, h, holdOf, markup, say, unique } from "./element.js";

class Parameter {
  constructor({ roles, name, text, low, high, step, choices }, change, settle) {
    const id = unique(),
      of = roles.length > 1 ? "" : `${roles[0]} `, // one object may take several decisions
      label = { name, "aria-label": of + name, "aria-describedby": id };
    this.send = (value) => change({ [name]: value });
    if (choices.length) {
      const onchange = () => this.send(this.input.value);
      this.input = h("select", { ...label, onchange }, ...optionsOf(choices.map((c) => [c])));
    } else {
      const range = { min: low, max: high, step };
      this.input = h("input", { type: "range", ...label, ...range, oninput: () => this.slid() });
      this.number = h("input", {
        ...{ type: "number", ...label, ...range, name: `${name}_number`, step: "any" },
        oninput: () => (this.typing = true),
        onchange: () => this.typed(),
        onblur: () => (this.typing = false),
      });
      this.held = holdOf(this.input, settle);
    }
    this.node = markup`
      <div class="moe-parameter ${this.number ? "" : "choice"}">
        <span title="${name}">${name}</span>
        ${[this.input, this.number ?? null]}
        <small id="${id}" title="${text}"><b>${of && `${of.trim()}: `}</b>${text}</small>
      </div>`;
  }

  slid() {
    this.number.value = this.input.value;
    this.send(Number(this.input.value));
  }

  typed() {
    this.typing = false;
    if (this.number.value !== "") this.send(Number(this.number.value));
  }

  sync(value) {
    if (this.held?.()) return;
    this.input.value = value;
    if (this.number && !this.typing) this.number.value = `${+value.toPrecision(3)}`;
  }
}

class PartParameters {
  constructor(change, settle) {
    this.change = change;
    this.settle = settle;
    this.fields = {};
    this.signature = "";
    this.node = h("div", { class: "moe-parameters", role: "group", "aria-label": "Parameters" });
  }

  /** The same controls as long as the same parameters are there; what is held keeps its value. */
  sync(parameters, settled) {
    const signature = JSON.stringify(parameters, (key, x) => (key === "value" ? undefined : x));
    if (signature !== this.signature) {
      this.signature = signature;
      this.fields = Object.fromEntries(
        parameters.map((p) => [p.name, new Parameter(p, this.change, this.settle)]),
      );
      this.node.replaceChildren(...Object.values(this.fields).map((field) => field.node));
      this.node.hidden = !parameters.length;
      settled = true;
    }
    if (settled) for (const { name, value } of parameters) this.fields[name].sync(value);
  }

  inputs() {
    return Object.entries(this.fields).map(([name, field]) => [name, field.input]);
  }
}

export class Decisions {
  constructor(options, { change, settle, toggled }) {
    const id = unique();
    this.options = options;
    this.about = h("span", { class: "moe-about", id: `${id}-about` });
    this.button = button("decisions", {
      class: "moe-disclose", "aria-controls": id,
      onclick: () => toggled(this.panel.hidden),
    });
    this.selects = {};
    this.parameters = new PartParameters(change, settle);
    this.panel = markup`
      <div class="moe-decide" id="${id}" hidden>
        <div class="moe-five">${options.decisions.map((d) => this.field(d, change))}</div>
        ${this.parameters.node}
      </div>`;
    this.line = h("div", { class: "moe-line" }, this.button, this.about);
    this.node = markup`<div role="group" aria-label="Strategy">${[this.line, this.panel]}</div>`;
    this.setOpen(false);
  }

  field({ role, question, choices }, change) {
    const name = `decide_${role}`,
      onchange = () => change({ [role]: node.value }, name),
      own = h("option", { value: "own", disabled: true, hidden: true }),
      parts = optionsOf(choices.map((c) => [c.value, c.title, { title: c.text }]));
    const node = h("select", { name, title: question, onchange }, own, ...parts);
    this.selects[role] = { node, own };
    return markup`<label class="moe-field"><span title="${question}">${role}</span>${node}</label>`;
  }

  setOpen(open) {
    this.button.setAttribute("aria-expanded", open);
    this.panel.hidden = !open;
  }

  sync(now, settled) {
    say(this.about, now.about);
    this.about.title = now.about;
    this.parameters.sync(now.parameters, settled);
    if (!settled) return;
    for (const { role, question, choices } of this.options.decisions) {
      const { node, own } = this.selects[role],
        { value, title } = now.parts[role];
      own.hidden = value !== "";
      say(own, value ? "" : title); // a class of the learner's own: shown, not to be chosen by name
      node.value = value || "own";
      const text = choices.find((choice) => choice.value === value)?.text ?? "";
      node.title = `${question}.\n${title}: ${text}`;
    }
  }

  /** [name an error may be about, control] of everything here. */
  controls() {
    const selects = Object.values(this.selects).map(({ node }) => [node.name, node]);
    return [...selects, ...this.parameters.inputs()];
  }
}
