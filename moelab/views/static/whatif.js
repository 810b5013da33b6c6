// What if: a run made again with the settings as they are now, or with one expert pinned.

import { button, optionsOf, h, markup, say } from "./element.js";
import { tierName } from "./numbers.js";
import { Outlook } from "./outlook.js";

export class WhatIf {
  constructor(model, options, stage, ask, adopt) {
    this.model = model;
    this.stage = stage;
    this.ask = ask;
    this.key = this.names = this.changes = this.error = "";
    this.again = {};
    const tell = () => this.tell();
    this.of = h("select", { "aria-label": "Run to make again", onchange: () => this.wonder() });
    this.words = h("code");
    this.pins = h("input", { type: "checkbox", onchange: tell });
    this.expert = h("span");
    const tiers = optionsOf(options.tiers.map((b) => [b, tierName(b)]));
    this.bits = h("select", { "aria-label": "Bits it is pinned at", onchange: tell }, ...tiers);
    this.outlook = new Outlook(model, stage, adopt);
    this.go = button("Make it again", { class: "moe-again", onclick: () => this.begin() });
    this.halt = button("Stop", { onclick: () => this.deaf || ask("stop") });
    this.progress = h("progress", { max: 1, value: 0, "aria-label": "Tokens made again" });
    this.state = h("span", { role: "status", "aria-live": "polite", class: "moe-soft" });
    this.node = markup`
      <div class="moe-what" role="group" aria-label="What if" hidden>
        <b>What if</b>
        ${this.of}
        <span>were made again with ${this.words}</span>
        <label>${[this.pins, this.expert]}</label>
        ${[this.bits, this.go, this.halt, this.progress, this.state]}
        ${[this.outlook.go, this.outlook.said, this.outlook.node]}
      </div>`;
    this.moved = () => this.node.hidden || this.wonder(); // also for each frame drawn
    model.on("change:controls", this.moved);
    this.chosen = new MutationObserver(tell); // another expert on the cache map
    this.chosen.observe(stage.life.node, { attributeFilter: ["data-expert"] });
  }

  /** Stop is offered where it acts: while the kernel answers. */
  deafen(on) {
    this.deaf = on;
    this.halt.setAttribute("aria-disabled", `${on}`);
  }

  /** The expert chosen on the cache map, where it is to be pinned. */
  pinned() {
    const { of } = this.stage.life;
    return of && this.pins.checked ? [of.layer, of.expert, Number(this.bits.value)] : null;
  }

  begin() {
    if (this.go.getAttribute("aria-disabled") === "true") return;
    this.ask("whatif", { of: this.of.value, keep: this.pinned() });
  }

  /** Ask what has changed since the run, where the answer may be another one by now. */
  wonder() {
    const { run, running } = this.stage.live ?? {},
      of = this.of.value,
      key = JSON.stringify([of, this.model.get("controls"), run, running]);
    if (key === this.key) return;
    this.key = key;
    this.tell();
    clearTimeout(this.timer);
    if (run && !(running && !of)) this.timer = setTimeout(() => this.ask("since", { of }), 120);
  }

  since({ of, words, error }) {
    if (of !== this.of.value) return;
    this.changes = words;
    this.error = error;
    this.tell();
  }

  sync(saved, again) {
    const names = ["", ...saved.filter((run) => run.again).map(({ name }) => name)];
    if (JSON.stringify(names) !== this.names) {
      this.names = JSON.stringify(names);
      const held = this.of.value;
      this.of.replaceChildren(...optionsOf(names.map((name) => [name, name || "the newest run"])));
      this.of.value = names.includes(held) ? held : "";
    }
    this.again = again;
    this.wonder();
    this.tell();
  }

  tell() {
    const { state = "", words = "", done = 0, total = 1, error } = this.again ?? {},
      running = state === "running",
      { run, running: live } = this.stage.live ?? {},
      { of } = this.stage.life;
    this.pins.disabled = this.bits.disabled = this.bits.hidden = !of;
    if (!of) this.pins.checked = false;
    const changes = this.changes ?? "",
      some = changes || this.pinned(),
      still = live && !this.of.value ? "the run is still going on" : this.error,
      idle = run ? still : "Run something first";
    say(this.words, changes || (some ? "the same settings" : "… change a setting above"));
    const pin = of ? `expert ${of.layer}.${of.expert} at` : "an expert: choose it on the cache map";
    say(this.expert, `pin ${pin}`);
    this.go.setAttribute("aria-disabled", `${Boolean(running || idle || !some)}`);
    this.go.title = idle || (some ? "" : "Change a setting above, or choose an expert to pin");
    this.halt.hidden = this.progress.hidden = !running;
    this.progress.value = total ? done / total : 0;
    const said = {
      running: `${words}: token ${done} of ${total}`,
      done: `${words}: beside each other below, both saved`,
      failed: error,
      "": idle ?? "",
    };
    say(this.state, said[state]);
    this.state.classList.toggle("moe-refused", state === "failed");
    Object.assign(this.node.dataset, { state, changes });
  }

  close() {
    this.outlook.close();
    this.chosen.disconnect();
    clearTimeout(this.timer);
    this.model.off("change:controls", this.moved);
  }
}
