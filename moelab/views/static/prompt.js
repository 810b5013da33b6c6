// What to generate: the prompt, its drop-down of held-out starts, how many tokens, Run and Stop.
// The form is kept in a trait, so that it outlives a reload of the page.

import { button, optionsOf, h, keep, markup, say } from "./element.js";
import { within } from "./numbers.js";

const MOST_TOKENS = 10_000; // minutes, not days
const NOTE_MS = 4000;
const CHAT = "Put the prompt into the model's chat template: it answers instead of continuing";

export class Prompt {
  constructor(model, options, sender, measure) {
    this.model = model;
    this.sender = sender;
    this.prompts = options.prompts;
    this.running = this.deaf = false;
    const source = options.encoder_layers > 0, // read whole, and longer
      name = source ? "Source" : "Prompt";
    this.prompt = h("textarea", {
      class: source && "moe-source", "aria-label": name, spellcheck: "false",
      oninput: () => keep(model, { prompt: this.prompt.value }),
      onkeydown: (e) => {
        if (e.key !== "Enter" || !(e.ctrlKey || e.metaKey)) return;
        e.preventDefault();
        this.run();
      },
    });
    this.tokens = h("input", {
      type: "number", min: 1, max: MOST_TOKENS, step: 1,
      onchange: () => keep(model, { max_new_tokens: this.count() }),
    });
    const onchange = () => keep(model, { chat: this.chat.checked });
    this.chat = h("input", { type: "checkbox", name: "chat", onchange });
    this.limit = h("output", { class: "moe-limit" });
    this.go = button("Run", { class: "moe-run", onclick: () => this.run() });
    this.halt = button("Stop", { onclick: () => this.stop() });
    this.starts = this.dropDown();
    const chat = options.chat && markup`<label title="${CHAT}">${this.chat}chat</label>`;
    this.node = markup`
      <div class="moe-row moe-ask">
        <div class="moe-field">
          <span class="moe-prompt-head"><span>${name}</span>${this.starts}</span>
          ${this.prompt}
        </div>
        <div class="moe-go">
          <div class="moe-buttons">${[this.go, this.halt]}</div>
          <div class="moe-extras">
            <span class="moe-tokens"><label>max tokens ${this.tokens}</label>${this.limit}</span>
            ${chat}
            <label title="Run the full-precision model along on the same context">
              measure KL ${measure}
            </label>
          </div>
        </div>
      </div>`;
  }

  dropDown() {
    const brief = (p) => p.trim().replace(/\s+/g, " ").slice(0, 56);
    const groups = Object.entries(this.prompts).map(([domain, prompts]) => {
      const entries = prompts.map((p) => [p, `${domain}: ${brief(p)}`]);
      return h("optgroup", { label: domain }, ...optionsOf(entries));
    });
    const onchange = () => {
      this.prompt.value = this.starts.value;
      keep(this.model, { prompt: this.starts.value });
    };
    return h(
      "select",
      { "aria-label": "Prompts by domain", onchange, hidden: !groups.length },
      ...optionsOf([["", "your own prompt", { disabled: true }]]),
      ...groups,
    );
  }

  /** The number asked for, brought within its limits: the field shows it, a note says why. */
  count() {
    const asked = Math.round(Number(this.tokens.value)),
      count = within(asked || 1, 1, MOST_TOKENS);
    if (count !== asked) {
      this.tokens.value = `${count}`;
      clearTimeout(this.noted);
      say(this.limit, count === 1 ? "at least 1" : `limit ${MOST_TOKENS}`);
      this.noted = setTimeout(() => say(this.limit, ""), NOTE_MS);
    }
    return count;
  }

  run() {
    if (this.running) return;
    const form = {
      ...this.model.get("form"),
      prompt: this.prompt.value, max_new_tokens: this.count(), chat: this.chat.checked,
    };
    this.sender.send({ do: "run", form, where: "run" });
  }

  stop() {
    if (!this.deaf) this.sender.send({ do: "stop", where: "run" });
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

  /** Stop is offered where it acts: a run goes on and the kernel answers. */
  show({ running = this.running, deaf = this.deaf }) {
    Object.assign(this, { running, deaf });
    this.go.setAttribute("aria-disabled", `${running}`);
    this.halt.setAttribute("aria-disabled", `${!running || deaf}`);
  }
}
