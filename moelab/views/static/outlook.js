// The outlook: memory, speed and loss of all settings at once, predicted from one run. A click on a
// point puts its settings in force.

import { button, h, markup, say } from "./element.js";
import { bytes, tierName } from "./numbers.js";
import { Scatter } from "./scatter.js";

const ASK = "Predict speed and memory of all settings from the newest run, and measure the loss of each tier";

export class Outlook {
  /** `adopt(settings)` puts settings in force. */
  constructor(model, stage, adopt) {
    this.model = model;
    this.adopt = adopt;
    this.of = new Map();
    this.go = button("All settings at once", { title: ASK, onclick: () => this.ask() });
    this.said = h("span", { class: "moe-soft", role: "status" });
    this.scatter = new Scatter(stage, (name) => this.choose(name), "All settings: memory against predicted speed");
    this.node = markup`<div class="moe-outlook" hidden>${this.scatter.node}</div>`;
    this.heard = ({ outlook }) => outlook && this.show(outlook);
    model.on("msg:custom", this.heard);
  }

  ask() {
    if (this.go.getAttribute("aria-disabled") === "true") return;
    this.wait(true);
    say(this.said, "predicting …");
    this.model.send({ do: "outlook", where: "run" });
  }

  wait(on) {
    this.go.setAttribute("aria-disabled", `${on}`);
  }

  show({ error, points, device, done, off }) {
    this.wait(!error && !points);
    this.said.classList.toggle("moe-refused", Boolean(error));
    say(this.said, error ?? (points ? `LRU and LFU, modelled speed${worth(off)}, measured KL: a click applies` : `${Math.round(100 * done)} %`));
    if (!points) return;
    const runs = points.map((point) => ({
      ...point, name: nameOf(point), number: "", peak: point.budget_bytes, timing: "modelled", device,
    }));
    this.of = new Map(runs.map((run) => [run.name, run]));
    this.node.hidden = false;
    this.node.dataset.points = runs.length;
    this.scatter.show(runs, []);
  }

  choose(name) {
    const { budget_bytes: budget, bits, strategy, prefetch } = this.of.get(name);
    this.adopt({ strategy, bits, budget, prefetch });
    this.scatter.show(this.scatter.runs, [name]);
  }

  close() {
    this.model.off("msg:custom", this.heard);
    this.scatter.close();
  }
}

/** What the model is worth: how far it is off for the run itself. */
const worth = (off) => (off === null || off === undefined ? "" : ` (of this run ${(100 * off).toFixed(0)} % off)`);

const nameOf = ({ strategy, bits, budget_bytes, prefetch }) =>
  `${strategy}, ${tierName(bits)}, ${bytes(budget_bytes)}${prefetch ? `, look-ahead ${prefetch}` : ""}`;
