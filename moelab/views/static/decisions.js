// The strategy, opened up: one drop-down per decision, each offering that part of every strategy,
// and the parameters of the parts chosen. Folded away it is one line that explains the strategy.

class Decisions {
  constructor(options, { change, settle, toggled }) {
    const id = `moe-${Math.random().toString(36).slice(2)}`;
    this.options = options;
    this.about = h("span", { class: "moe-about", id: `${id}-about` });
    this.button = h(
      "button",
      {
        type: "button",
        class: "moe-disclose",
        "aria-controls": id,
        onclick: () => toggled(this.panel.hidden),
      },
      "decisions",
    );
    this.selects = {};
    const fields = options.decisions.map((decision) => this.field(decision, change));
    this.parameters = new Parameters(change, settle);
    this.panel = h(
      "div",
      { class: "moe-decide", id, hidden: true },
      h("div", { class: "moe-five" }, ...fields),
      this.parameters.node,
    );
    this.line = h("div", { class: "moe-line" }, this.button, this.about);
    this.node = h(
      "div",
      { class: "moe-strategy", role: "group", "aria-label": "Strategy" },
      this.line,
      this.panel,
    );
    this.setOpen(false);
  }

  field({ role, question, choices }, change) {
    const name = `decide_${role}`;
    const entries = choices.map((c) => h("option", { value: c.value, title: c.text }, c.title));
    const own = h("option", { value: "own", disabled: true, hidden: true });
    const node = h(
      "select",
      { name, title: question, onchange: () => change({ [role]: node.value }, name) },
      own,
      ...entries,
    );
    this.selects[role] = { node, own };
    return h("label", { class: "moe-field" }, h("span", { title: question }, role), node);
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
