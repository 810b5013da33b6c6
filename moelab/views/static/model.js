// Which model is shown: a drop-down of those there are. Another one is opened in the background; the
// first time it may have to be built, and what is being done is said below.

class ModelPick {
  constructor(model) {
    this.model = model;
    this.pick = h("select", {
      class: "moe-model",
      "aria-label": "Model",
      onchange: () => model.send({ do: "model", name: this.pick.value, where: "run" }),
    });
    this.words = h("span", { role: "status" });
    const stop = () => {
      model.send({ do: "model", stop: true, where: "run" });
      say(this.words, "stopping after this step …");
    };
    this.stop = h("button", { type: "button", title: "Keep the model shown", onclick: stop }, "Cancel");
    this.line = h("div", { class: "moe-opening" }, this.words, this.stop);
    this.sync();
  }

  sync() {
    const { now = "", offered = [], opening = "", error = "", stopped = "" } = this.model.get("models") ?? {};
    const entries = offered.map(({ name, missing }) =>
      h("option", { value: name, title: missing }, missing ? `${name} (not installed)` : name),
    );
    this.pick.replaceChildren(...entries);
    this.pick.value = now;
    const held = [this.pick, this.stop].includes(document.activeElement);
    this.pick.disabled = Boolean(opening);
    this.stop.hidden = !opening;
    const words = opening ? `${opening} …` : error || stopped;
    this.line.hidden = !words;
    if (held) (opening ? this.stop : this.pick).focus();
    this.line.classList.toggle("bad", Boolean(error));
    say(this.words, words);
  }
}
