// Which model is shown: a drop-down of those there are. Another one is opened in the background; the
// first time it may have to be built, and what is being done is said beside it.

class ModelPick {
  constructor(model) {
    this.model = model;
    this.pick = h("select", {
      class: "moe-model",
      "aria-label": "Model",
      onchange: () => model.send({ do: "model", name: this.pick.value, where: "run" }),
    });
    this.words = h("span", { class: "moe-opening", role: "status" });
    this.node = h("span", { class: "moe-model-pick" }, this.pick, this.words);
    this.sync();
  }

  sync() {
    const { now = "", offered = [], opening = "", error = "" } = this.model.get("models") ?? {};
    const entries = offered.map(({ name, missing }) =>
      h("option", { value: name, title: missing }, missing ? `${name} (not installed)` : name),
    );
    this.pick.replaceChildren(...entries);
    this.pick.value = now;
    this.pick.disabled = Boolean(opening);
    this.words.classList.toggle("bad", Boolean(error));
    this.node.dataset.opening = opening;
    say(this.words, opening ? `${opening} …` : error);
  }
}
