// The parameters of the parts now chosen: each a slider with its number, or a drop-down, and the
// line that explains it. They come and go with the parts.

import { optionsOf, h, Hold, markup, unique } from "./element.js";

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
      this.hold = new Hold(this.input, settle);
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
    if (this.hold?.held) return;
    this.input.value = value;
    if (this.number && !this.typing) this.number.value = `${+value.toPrecision(3)}`;
  }

  close() {
    this.hold?.close();
  }
}

export class PartParameters {
  constructor(change, settle) {
    this.change = change;
    this.settle = settle;
    this.fields = {};
    this.signature = "";
    this.node = h("div", { class: "moe-parameters", role: "group", "aria-label": "Parameters" });
  }

  /** The same controls as long as the same parameters are there; what is held keeps its value. */
  sync(parameters, settled) {
    const signature = JSON.stringify(parameters, (key, value) =>
      key === "value" ? undefined : value,
    );
    if (signature !== this.signature) {
      this.close();
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

  close() {
    for (const field of Object.values(this.fields)) field.close();
  }
}
