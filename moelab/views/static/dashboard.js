// The dashboard: the controls above the stage; decodes the newest frame once per animation frame,
// hands it to the stage and acknowledges it.

const MAP = {
  bits: Uint8Array,
  in_flight: Uint8Array,
  loaded: Int32Array,
  used: Int32Array,
  uses: Int32Array,
};

function decode(frame, options) {
  const values = array(Float32Array, frame.values),
    tokens = {};
  options.columns.forEach((name, c) => {
    tokens[name] = values.subarray(c * frame.count, (c + 1) * frame.count);
  });
  const map = Object.fromEntries(
    Object.entries(MAP).map(([name, Type]) => [name, array(Type, frame.map[name])]),
  );
  return { ...frame, tokens, map, causes: options.causes, newest: frame.first + frame.count - 1 };
}

const ACKNOWLEDGE_MS = 250;

class View {
  constructor(model, el) {
    const options = model.get("options");
    Object.assign(this, {
      model,
      options,
      queued: 0,
      id: `${Date.now()}-${Math.random()}`,
    });
    // JupyterLab's shortcuts would take the arrow keys (and "x") away from sliders and selects.
    this.root = h("div", {
      class: "moe-dash",
      role: "region",
      "aria-label": `moelab dashboard of ${options.name}`,
      "data-lm-suppress-shortcuts": "true",
      onkeydown: (e) => e.stopPropagation(),
    });
    el.append(this.root);
    this.settings = new Settings(model, options);
    this.stage = new Stage(this.root, options, {
      source: new KernelSource(model, () => this.stage.queue()),
      why: new Why(model, () => this.stage.map.describe()),
      shade: (shade) => {
        model.set("form", { ...model.get("form"), shade });
        model.save_changes();
      },
      canLive: true,
    });
    this.runs = new Runs(model, options, this.stage);
    this.pick = new ModelPick(model);
    const { architecture, layers, experts, top_k } = options;
    const shape = `${architecture} · ${layers} layers × ${experts} experts, top ${top_k}`;
    this.root.prepend(
      h(
        "header",
        { class: "moe-head" },
        h("h2", {}, "moelab"),
        this.pick.pick,
        h("span", { class: "moe-soft" }, shape),
        this.stage.status,
        this.runs.bar,
      ),
      this.pick.line,
      this.settings.node,
      this.runs.whatIf.node,
      this.stage.figures.node,
      this.stage.timeline.node,
      this.stage.main,
      this.runs.node,
      this.settings.fault.node,
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
        const asked = `${bits} bit, ${device}`;
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
    this.watch = new MutationObserver(() => this.repaint());
    this.watch.observe(document.body, {
      attributes: true,
      attributeFilter: [
        "class",
        "data-jp-theme-light",
        "data-jp-theme-name",
        "data-vscode-theme-kind",
      ],
    });
    this.schemes = [matchMedia("(prefers-color-scheme: dark)"), STRONG];
    this.onScheme = () => this.repaint();
    for (const scheme of this.schemes) scheme.addEventListener("change", this.onScheme);
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
    this.settings.ask.showRunning(frame.running);
    this.errorChanged();
    Object.assign(this.root.dataset, {
      seq: frame.seq,
      run: frame.run,
      token: frame.newest,
      under: frame.tokens.budget_bytes.at(-1) ?? "",
      running: frame.running,
      kl: frame.recent.kl_mean ?? "",
      stall: frame.recent.stall_share ?? "",
      rate: frame.recent.tokens_per_s ?? "",
      emulated: frame.origins.at(-1).emulated,
      changes: frame.changes.length,
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
    this.settings.decisions.setOpen(Boolean(decisions));
    this.stage.setMode(shade === "kl" ? "kl" : "cost");
  }

  errorChanged() {
    const error = this.model.get("error") ?? {};
    const { error: ended = "", run } = this.frame ?? {};
    this.settings.showError(error.text ? error : { where: "run", text: ended }, run);
  }

  repaint() {
    this.stage.repaint();
  }

  close() {
    this.closed = true;
    for (const [event, handler] of Object.entries(this.handlers)) this.model.off(event, handler);
    this.watch.disconnect();
    this.placed.disconnect();
    for (const scheme of this.schemes) scheme.removeEventListener("change", this.onScheme);
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
