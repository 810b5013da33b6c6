// Which model is shown: a drop-down of those there are. Another one is opened in the background; the
// first time it may have to be built, and what is being done is said below.

import { button, optionsOf, h, markup, say } from "./element.js";

export class ModelPick {
  constructor(model) {
    this.model = model;
    this.pick = h("select", {
      class: "moe-model", "aria-label": "Model",
      onchange: () => model.send({ do: "model", name: this.pick.value, where: "run" }),
    });
    this.words = h("span", { role: "status" });
    const onclick = () => {
      model.send({ do: "model", stop: true, where: "run" });
      say(this.words, "stopping after this step …");
    };
    this.stop = button("Cancel", { title: "Keep the model shown", onclick });
    this.line = markup`<div class="moe-opening">${[this.words, this.stop]}</div>`;
    this.sync();
  }

  sync() {
    const told = this.model.get("models") ?? {},
      { now = "", offered = [], opening = "", error = "", stopped = "" } = told;
    const called = (name, missing) => (missing ? `${name} (not installed)` : name),
      entries = offered.map(({ name, missing }) => [name, called(name, missing), { title: missing }]);
    this.pick.replaceChildren(...optionsOf(entries));
    this.pick.value = now;
    const { activeElement: at } = document,
      held = at === this.pick || at === this.stop;
    this.pick.disabled = Boolean(opening);
    this.stop.hidden = !opening;
    const words = opening ? `${opening} …` : error || stopped;
    this.line.hidden = !words;
    if (held) (opening ? this.stop : this.pick).focus();
    this.line.classList.toggle("bad", Boolean(error));
    say(this.words, words);
  }
}
