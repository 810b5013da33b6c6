// The dashboard: which model is shown, and the controls above the stage; decodes the newest frame
// once per animation frame, hands it to the stage and acknowledges it.

import { DARK, STRONG } from "./colours.js";
import { Runs } from "./compare.js";
import { button, cross, h, keep, markup, optionsOf, say } from "./element.js";
import { tierName } from "./numbers.js";
import { array, byName } from "./recording.js";
import { Settings } from "./settings.js";
import { KernelSource } from "./source.js";
import { headOf, rootOf, modelShape, Stage } from "./stage.js";
import { Why } from "./tip.js";

class ModelPick {
  constructor(model) {
    this.model = model;
    const choose = (name, more = {}) => model.send({ do: "model", name, where: "run", ...more });
    this.pick = h("select", {
      class: "moe-model", "aria-label": "Model",
      onchange: () => choose(this.pick.value),
    });
    this.words = h("span", { role: "status" });
    this.code = h("code");
    this.yes = button("End the run", {
      onclick: () => {
        model.send({ do: "stop", where: "run" });
        choose(this.told.asks, { ends_run: true, ghost: this.told.ghost });
      },
    });
    this.ghost = button("Open a ghost of it", {
      title: "Its real sizes with random weights: speed, loads and memory are measured; no text",
      onclick: () => choose(this.told.fits, { ghost: true }),
    });
    this.picture = h("img", { class: "moe-fit" });
    this.no = button("Cancel", {
      title: "Keep the model shown",
      onclick: () => {
        const { now, opening } = this.told;
        choose(now, { stop: Boolean(opening) });
        if (opening) say(this.words, "stopping after this step …");
      },
    });
    this.close = cross("Dismiss", () => choose(this.told.now));
    this.line = markup`
      <div class="moe-opening">
        ${[this.words, this.code, this.yes, this.ghost, this.no, this.close, this.picture]}
      </div>`;
    this.sync();
  }

  sync() {
    this.told = this.model.get("models") ?? {};
    const { now = "", offered = [], known = [], opening, asks, fits, error, note, code, picture } =
      this.told;
    const called = (name, missing) => (missing ? `${name} (not installed)` : name),
      entries = offered.map(({ name, missing }) => [name, called(name, missing), { title: missing }]);
    this.pick.replaceChildren(
      ...optionsOf(entries),
      h("optgroup", { label: "not here: would it run?" }, ...optionsOf(known.map((name) => [name]))),
    );
    this.pick.value = now;
    const held = [this.pick, this.yes, this.no].some((node) => node === document.activeElement);
    this.pick.disabled = Boolean(opening);
    this.yes.hidden = !asks;
    this.ghost.hidden = !fits;
    this.picture.hidden = !picture;
    if (picture) Object.assign(this.picture, { src: picture, alt: note });
    this.no.hidden = !opening && !asks;
    this.close.hidden = Boolean(opening || asks);
    const words = [
      opening && `${opening} …`,
      asks && `A run is going on. Opening ${asks} ends it.`,
      code && `${now} is shown. In the notebook, this binds it:`,
      error, note,
    ].find(Boolean);
    this.line.hidden = !words;
    if (held) (opening || asks ? this.no : this.pick).focus();
    this.line.classList.toggle("bad", Boolean(error));
    say(this.words, words ?? "");
    say(this.code, code ?? "");
  }
}

const MAP = {
  bits: Uint8Array, in_flight: Uint8Array,
  loaded: Int32Array, used: Int32Array, uses: Int32Array,
};

/** A frame with its arrays as such. */
function decode(frame, { columns, causes }) {
  const cells = Object.entries(MAP).map(([name, Type]) => [name, array(Type, frame.map[name])]),
    map = Object.fromEntries(cells);
  const tokens = byName(frame.columns ?? columns, array(Float32Array, frame.values));
  return { ...frame, tokens, map, causes, newest: frame.first + frame.count - 1 };
}

const ACKNOWLEDGE_MS = 250;
/** Attributes of the page's body by which JupyterLab and VS Code change their theme. */
const THEMED = ["class", "data-jp-theme-light", "data-jp-theme-name", "data-vscode-theme-kind"];

class View {
  constructor(model, el) {
    const options = model.get("options");
    this.model = model;
    this.options = options;
    this.queued = this.acking = 0;
    this.frame = null;
    this.id = `${Date.now()}-${Math.random()}`;
    // JupyterLab's shortcuts would take the arrow keys (and "x") away from sliders and selects.
    this.root = rootOf(`moelab dashboard of ${options.name}`, {
      "data-lm-suppress-shortcuts": "true",
      onkeydown: (e) => e.stopPropagation(),
    });
    el.append(this.root);
    this.settings = new Settings(model, options, (on) => this.runs?.whatIf.deafen(on));
    this.stage = new Stage(this.root, options, {
      source: new KernelSource(model, () => this.stage.queue()),
      why: new Why(model, () => this.stage.map.describe()),
      shade: (shade) => keep(model, { shade }),
      canLive: true,
      adopt: (strategy) => this.settings.sender.change({ strategy }),
    });
    this.runs = new Runs(model, options, this.stage, (settings) => this.settings.sender.change(settings, "budget"));
    this.pick = new ModelPick(model);
    const shape = h("span", { class: "moe-soft" }, modelShape(options));
    this.root.prepend(
      headOf(this.pick.pick, shape, this.runs.bar, this.stage.status),
      this.pick.line, this.settings.node, this.runs.whatIf.node,
      this.stage.figures.node, this.stage.timeline.node, this.stage.main,
      this.runs.node, this.settings.fault.node,
    );
    this.connect();
  }

  connect() {
    const { model } = this;
    this.handlers = {
      "change:frame": () => this.queue(),
      "change:controls": () => {
        this.settings.sync();
        this.settings.sender.flush();
        const { budget_bytes, strategy, bits, device } = model.get("controls");
        const asked = `${tierName(bits)}, ${device}`;
        Object.assign(this.root.dataset, { budget: budget_bytes, strategy, asked });
      },
      "change:form": () => this.formChanged(),
      "change:error": () => this.errorChanged(),
      "change:runs": () => this.runs.sync(),
      "change:models": () => this.pick.sync(),
    };
    for (const [event, handler] of Object.entries(this.handlers)) {
      // What belongs to another model is for the view that takes this one's place.
      const mine = () => this.options.name === model.get("options").name && handler();
      this.handlers[event] = mine;
      model.on(event, mine);
    }
    this.repaint = () => this.stage.repaint();
    this.watch = new MutationObserver(this.repaint);
    this.watch.observe(document.body, { attributeFilter: THEMED });
    for (const scheme of [DARK, STRONG]) scheme.addEventListener("change", this.repaint);
    this.placed = new ResizeObserver(() => {
      this.repaint();
      this.settings.sync();
      this.settings.fault.place();
    });
    this.placed.observe(this.root);
    model.send({ do: "hello", view: this.id });
    this.handlers["change:controls"]();
    this.formChanged();
    this.stage.map.relabel();
    this.stage.bars.relabel();
    this.draw();
  }

  queue() {
    // A hidden tab runs no animation frames; a timer keeps the newest frame coming there.
    if (!this.queued)
      this.queued = document.hidden
        ? setTimeout(() => this.draw(), 200)
        : requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.queued = 0;
    const raw = this.model.get("frame");
    if (this.closed || raw?.seq === undefined) return;
    const frame = decode(raw, this.options);
    this.frame = frame;
    this.stage.follow(frame);
    this.runs.whatIf.moved();
    this.settings.ask.show({ running: frame.running });
    this.settings.draft.show(frame);
    this.errorChanged();
    Object.assign(this.root.dataset, {
      seq: frame.seq, run: frame.run, token: frame.newest,
      under: frame.tokens.budget_bytes.at(-1) ?? "", running: frame.running,
      kl: frame.recent.kl_mean ?? "", stall: frame.recent.stall_share ?? "",
      rate: frame.recent.tokens_per_s ?? "", emulated: frame.origins.at(-1).emulated,
      changes: frame.changes.length, passes: frame.passes?.length ?? 0,
    });
    this.acknowledge(frame.seq);
  }

  /** Say what is drawn, a few times a second: each time the notebook shows a busy kernel. */
  acknowledge(seq) {
    this.drawn = seq;
    if (this.acking) return;
    this.model.send({ do: "ack", seq });
    this.acking = setTimeout(() => {
      this.acking = 0;
      if (!this.closed && this.drawn !== seq) this.acknowledge(this.drawn);
    }, ACKNOWLEDGE_MS);
  }

  formChanged() {
    const { shade, decisions, runs, whatif } = this.model.get("form");
    this.runs.setOpen(Boolean(runs), Boolean(whatif));
    this.settings.ask.sync();
    this.settings.draft.sync();
    this.settings.decisions.setOpen(Boolean(decisions));
    this.stage.text.setMode(shade === "kl" ? "kl" : "cost");
  }

  errorChanged() {
    const error = this.model.get("error") ?? {};
    const { error: ended = "", run } = this.frame ?? {};
    this.settings.showError(error.text ? error : { where: "run", text: ended }, run);
  }

  close() {
    this.closed = true;
    for (const [event, handler] of Object.entries(this.handlers)) this.model.off(event, handler);
    this.watch.disconnect();
    this.placed.disconnect();
    for (const scheme of [DARK, STRONG]) scheme.removeEventListener("change", this.repaint);
    for (const part of [this.stage, this.settings, this.runs]) part.close();
    cancelAnimationFrame(this.queued);
    this.model.send({ do: "gone", view: this.id });
    this.root.remove();
  }
}

export default {
  render({ model, el }) {
    let view = new View(model, el);
    const renew = () => {
      const old = view;
      view = new View(model, el); // it says hello before the old one says it is gone
      old.close();
    };
    model.on("change:options", renew);
    return () => {
      model.off("change:options", renew);
      view.close();
    };
  },
};
