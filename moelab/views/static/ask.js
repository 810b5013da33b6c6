// What to generate: the prompt, its drop-down of held-out starts, how many tokens, Run and Stop.
// The form is kept in a trait, so that it outlives a reload of the page.

const MOST_TOKENS = 10_000; // minutes, not days
const NOTE_MS = 4000;

class Ask {
  constructor(model, options, measure) {
    Object.assign(this, { model, prompts: options.prompts });
    this.prompt = h("textarea", {
      rows: 2,
      "aria-label": "Prompt",
      spellcheck: "false",
      oninput: () => this.write({ prompt: this.prompt.value }),
      onkeydown: (e) => {
        if (e.key !== "Enter" || !(e.ctrlKey || e.metaKey)) return;
        e.preventDefault();
        this.run();
      },
    });
    this.tokens = h("input", {
      type: "number",
      min: 1,
      max: MOST_TOKENS,
      step: 1,
      onchange: () => this.write({ max_new_tokens: this.count() }),
    });
    this.limit = h("output", { class: "moe-limit" });
    this.go = this.button("Run", "moe-run", () => this.run());
    this.halt = this.button("Stop", "moe-stop", () => model.send({ do: "stop", where: "run" }));
    this.starts = this.dropDown();
    const title = h("span", { class: "moe-prompt-head" }, h("span", {}, "Prompt"), this.starts);
    const hint = "Run the full-precision model along on the same context";
    this.chat = h("input", {
      type: "checkbox",
      name: "chat",
      onchange: () => this.write({ chat: this.chat.checked }),
    });
    const asked = "Put the prompt into the model's chat template: it answers instead of continuing";
    const extras = h(
      "div",
      { class: "moe-extras" },
      h("span", { class: "moe-tokens" }, h("label", {}, "max tokens ", this.tokens), this.limit),
      h("label", { title: asked, hidden: !options.chat }, this.chat, "chat"),
      h("label", { title: hint }, measure, "measure KL"),
    );
    const buttons = h("div", { class: "moe-buttons" }, this.go, this.halt);
    this.node = h(
      "div",
      { class: "moe-row moe-ask" },
      h("div", { class: "moe-field" }, title, this.prompt),
      h("div", { class: "moe-go" }, buttons, extras),
    );
  }

  button(words, name, onclick) {
    return h("button", { type: "button", class: name, onclick }, words);
  }

  dropDown() {
    const groups = Object.entries(this.prompts).map(([domain, prompts]) => {
      const brief = (p) => `${domain}: ${p.trim().replace(/\s+/g, " ").slice(0, 56)}`;
      return h(
        "optgroup",
        { label: domain },
        ...prompts.map((p) => h("option", { value: p }, brief(p))),
      );
    });
    const own = h("option", { value: "", disabled: true }, "your own prompt");
    const onchange = () => {
      this.prompt.value = this.starts.value;
      this.write({ prompt: this.starts.value });
    };
    const label = { "aria-label": "Prompts by domain", onchange, hidden: !groups.length };
    return h("select", label, own, ...groups);
  }

  /** The number asked for, brought within its limits: the field shows it, a note says why. */
  count() {
    const asked = Math.round(Number(this.tokens.value)),
      count = Math.min(MOST_TOKENS, Math.max(1, asked || 1));
    if (count !== asked) {
      this.tokens.value = count;
      clearTimeout(this.noted);
      say(this.limit, count === 1 ? "at least 1" : `limit ${MOST_TOKENS}`);
      this.noted = setTimeout(() => say(this.limit, ""), NOTE_MS);
    }
    return count;
  }

  write(changes) {
    this.model.set("form", { ...this.model.get("form"), ...changes });
    this.model.save_changes();
  }

  run() {
    if (this.running) return;
    const asked = { prompt: this.prompt.value, max_new_tokens: this.count() };
    asked.chat = this.chat.checked;
    this.model.send({ do: "run", form: asked, where: "run" });
  }

  /** Show the form, but never write into a field that is being typed in. */
  sync() {
    const form = this.model.get("form"),
      known = Object.values(this.prompts).flat().includes(form.prompt);
    if (document.activeElement !== this.prompt) this.prompt.value = form.prompt ?? "";
    if (document.activeElement !== this.tokens) this.tokens.value = form.max_new_tokens ?? 200;
    this.starts.value = known ? form.prompt : "";
    this.chat.checked = Boolean(form.chat);
  }

  showRunning(running) {
    this.running = running;
    this.go.setAttribute("aria-disabled", running);
    this.halt.setAttribute("aria-disabled", !running);
  }
}
