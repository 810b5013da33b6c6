// The strategy, opened up: one drop-down per decision, each offering that part of every strategy,
// and the parameters of the parts chosen. Folded away it is one line that explains the strategy.

import { button, optionsOf, h, markup, say, unique } from "./element.js";
import { PartParameters } from "./parameters.js";

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
    this.node = markup`
      <div role="group" aria-label="Strategy">${[this.line, this.panel]}</div>`;
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

  close() {
    this.parameters.close();
  }
}
