// The parameters of the parts now chosen: each a slider with its number, or a drop-down, and the
// line that explains it. They come and go with the parts.

class Parameter {
  constructor({ roles, name, text, low, high, step, choices }, change, settle) {
    const id = `moe-${Math.random().toString(36).slice(2)}`,
      of = roles.length > 1 ? "" : `${roles[0]} `, // one object may take several decisions
      label = { name, "aria-label": of + name, "aria-describedby": id };
    this.send = (value) => change({ [name]: value });
    if (choices.length) {
      const entries = choices.map((value) => h("option", { value }, value));
      const onchange = () => this.send(this.input.value);
      this.input = h("select", { ...label, onchange }, ...entries);
    } else {
      const range = { min: low, max: high, step };
      this.input = h("input", { type: "range", ...label, ...range, oninput: () => this.slid() });
      this.number = h("input", {
        type: "number",
        ...{ ...label, ...range, name: `${name}_number`, step: "any" },
        oninput: () => (this.typing = true),
        onchange: () => this.typed(),
        onblur: () => (this.typing = false),
      });
      this.hold = new Hold(this.input, settle);
    }
    const track = this.number ? h("span", { class: "moe-track" }, this.input) : this.input;
    this.node = h(
      "div",
      { class: `moe-parameter${this.number ? "" : " choice"}` },
      h("span", { title: name }, name),
      track,
      ...(this.number ? [this.number] : []),
      h("small", { id, title: text }, h("b", {}, of && `${of.trim()}: `), text),
    );
  }

  slid() {
    this.number.value = this.input.value;
    this.paint();
    this.send(Number(this.input.value));
  }

  typed() {
    this.typing = false;
    if (this.number.value !== "") this.send(Number(this.number.value));
  }

  paint() {
    const { min, max, value } = this.input;
    this.input.style.setProperty("--v", (value - min) / (max - min || 1));
  }

  sync(value) {
    if (this.hold?.held) return;
    this.input.value = value;
    if (!this.number) return;
    if (!this.typing) this.number.value = +value.toPrecision(3);
    this.paint();
  }

  close() {
    this.hold?.close();
  }
}

class Parameters {
  constructor(change, settle) {
    Object.assign(this, { change, settle, fields: {}, signature: "" });
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
