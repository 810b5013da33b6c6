// The whole: lays the views out, decodes the newest frame once per animation frame, draws it in
// every view and acknowledges it.

const MAP = {
  bits: Uint8Array,
  in_flight: Uint8Array,
  loaded: Int32Array,
  used: Int32Array,
  uses: Int32Array,
};

/** A typed array from whatever a host makes of bytes (DataView, Uint8Array or ArrayBuffer). */
function array(Type, raw) {
  const view = ArrayBuffer.isView(raw) ? raw : new Uint8Array(raw ?? 0);
  return new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

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

class View {
  constructor(model, el) {
    const options = model.get("options");
    Object.assign(this, {
      model,
      options,
      queued: 0,
      look: {},
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
    this.repaint();
    this.tip = new Tip(this.root);
    this.cursor = new Cursor(this.tip);
    this.settings = new Settings(model, options);
    this.figures = new Figures();
    this.why = new Why(model, () => this.map.describe());
    this.map = new CacheMap(this.look, this.tip, this.why, options);
    this.bars = new LatencyBars(this.look, this.cursor, options);
    this.text = new TokenText(this.look, this.cursor, (shade) => {
      model.set("form", { ...model.get("form"), shade });
      model.save_changes();
    });
    this.cursor.views.push(
      () => this.bars.draw(),
      () => this.text.mark(this.cursor.at),
    );
    this.state = h("span", { role: "status", "aria-live": "polite" });
    this.count = h("span", { class: "moe-soft", "aria-hidden": true });
    this.origin = h("b", { class: "moe-badge" });
    const { name, architecture, layers, experts, top_k } = options;
    const shape = `${name} · ${architecture} · ${layers} layers × ${experts} experts, top ${top_k}`;
    this.root.prepend(
      h(
        "header",
        { class: "moe-head" },
        h("h2", {}, "moelab"),
        h("span", { class: "moe-soft" }, shape),
        h("span", { class: "moe-state" }, this.origin, this.count, this.state),
      ),
      this.settings.node,
      this.figures.node,
      h(
        "div",
        { class: "moe-main" },
        h("div", { class: "moe-left" }, this.map.node, this.bars.node),
        this.text.node,
      ),
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
        const { budget_bytes, strategy } = model.get("controls");
        Object.assign(this.root.dataset, { budget: budget_bytes, strategy });
      },
      "change:form": () => this.formChanged(),
      "change:error": () => this.errorChanged(),
    };
    for (const [event, handler] of Object.entries(this.handlers)) model.on(event, handler);
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
    this.scheme = matchMedia("(prefers-color-scheme: dark)");
    this.scheme.addEventListener("change", (this.onScheme = () => this.repaint()));
    this.placed = new ResizeObserver(() => {
      this.repaint();
      this.settings.sync();
      this.settings.fault.place();
    });
    this.placed.observe(this.root);
    model.send({ do: "hello", view: this.id });
    this.handlers["change:controls"]();
    this.formChanged();
    this.map.relabel();
    this.bars.relabel();
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
    this.cursor.frame = this.frame = frame;
    for (const view of [this.map, this.bars, this.text, this.figures]) view.show(frame);
    this.settings.ask.showRunning(frame.running);
    say(
      this.state,
      frame.running ? "running" : frame.error ? "failed" : frame.run ? "finished" : "ready",
    );
    say(this.count, frame.run ? `${frame.newest + 1} tokens` : "");
    const device = frame.origins.at(-1);
    showBadge(
      this.origin,
      device,
      device.emulated ? `emulated: ${device.title}` : `measured: ${device.title}`,
    );
    this.errorChanged();
    Object.assign(this.root.dataset, {
      seq: frame.seq,
      run: frame.run,
      token: frame.newest,
      running: frame.running,
      resident: frame.resident.experts,
      kl: frame.recent.kl_mean ?? "",
      stall: frame.recent.stall_share ?? "",
      rate: frame.recent.tokens_per_s ?? "",
      emulated: device.emulated,
      changes: frame.changes.length,
    });
    this.model.send({ do: "ack", seq: frame.seq });
  }

  formChanged() {
    const { shade, decisions } = this.model.get("form");
    this.settings.ask.sync();
    this.settings.decisions.setOpen(Boolean(decisions));
    this.text.setMode(shade === "kl" ? "kl" : "cost");
  }

  errorChanged() {
    const error = this.model.get("error") ?? {};
    const { error: ended = "", run } = this.frame ?? {};
    this.settings.showError(error.text ? error : { where: "run", text: ended }, run);
  }

  repaint() {
    const theme = themeOf(this.root);
    if (theme === this.look.theme) return;
    this.root.dataset.theme = theme;
    Object.assign(this.look, { theme, ink: INK[theme], tiers: TIERS[theme] });
    this.map?.relabel();
    this.bars?.relabel();
    this.text?.shade();
  }

  close() {
    this.closed = true;
    for (const [event, handler] of Object.entries(this.handlers)) this.model.off(event, handler);
    this.watch.disconnect();
    this.placed.disconnect();
    this.scheme.removeEventListener("change", this.onScheme);
    for (const view of [this.map, this.bars, this.settings]) view.close();
    cancelAnimationFrame(this.queued);
    this.model.send({ do: "gone", view: this.id });
    this.root.remove();
  }
}

export default {
  render({ model, el }) {
    const view = new View(model, el);
    return () => view.close();
  },
};
