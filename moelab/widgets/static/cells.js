// The cache map: layers down, experts across. Colour and fill are the resident bits; an orange
// frame flashes where an expert was loaded, a dot marks what the newest token used.

const FLASH_MS = 450;

class CacheMap {
  constructor(look, tip, why, options) {
    Object.assign(this, { look, tip, why, layers: options.layers, experts: options.experts });
    this.tiers = options.tiers;
    this.sheet = new Sheet("Cache map: layers by experts, arrow keys move", () => this.draw());
    this.sheet.box.style.height = `${Math.min(208, Math.max(138, this.layers * 20)) + 16}px`;
    const n = this.layers * this.experts;
    this.flashed = new Float64Array(n).fill(-1e9);
    this.seen = new Int32Array(n).fill(-1);
    this.at = null;
    this.legend = h("div", { class: "moe-legend" });
    this.node = h(
      "section",
      { class: "moe-panel moe-map", "aria-label": "Cache map" },
      h(
        "header",
        {},
        h("h3", {}, "Cache map"),
        h("span", { class: "moe-soft" }, "layers × experts"),
      ),
      this.sheet.box,
      this.legend,
    );
    this.listen();
  }

  listen() {
    const canvas = this.sheet.node;
    canvas.addEventListener("pointermove", (e) => this.point(this.cellAt(e.offsetX, e.offsetY), e));
    canvas.addEventListener("pointerleave", () => this.point(null));
    canvas.addEventListener("blur", () => this.point(null));
    canvas.addEventListener("keydown", (e) => {
      const step = {
        ArrowLeft: -1,
        ArrowRight: 1,
        ArrowUp: -this.experts,
        ArrowDown: this.experts,
      }[e.key];
      if (e.key === "Escape") this.point(null);
      if (step === undefined) return;
      e.preventDefault();
      const next = this.at === null ? 0 : this.at + step;
      if (next >= 0 && next < this.seen.length) this.point(next);
    });
  }

  show(frame) {
    const fresh = frame.run !== this.run;
    this.run = frame.run;
    const now = performance.now();
    const { loaded } = frame.map;
    for (let i = 0; i < loaded.length; i++) {
      if (loaded[i] !== this.seen[i] && loaded[i] >= 0 && !fresh) this.flashed[i] = now;
      this.seen[i] = loaded[i];
    }
    this.frame = frame;
    this.draw();
    if (this.at !== null) this.describe();
  }

  grid() {
    const left = 22,
      bottom = 16;
    const w = (this.sheet.width - left - 2) / this.experts;
    const t = (this.sheet.height - bottom) / this.layers;
    return { left, w, t, gap: Math.min(w, t) > 9 ? 2 : Math.min(w, t) > 4 ? 1 : 0.5 };
  }

  draw() {
    if (!this.frame || !this.sheet.width) return;
    const g = this.sheet.begin(),
      ink = this.look.ink,
      grid = this.grid();
    const { bits, in_flight: flight, used } = this.frame.map;
    const newest = this.frame.newest;
    const rects = (pick) => {
      g.beginPath();
      for (let i = 0; i < bits.length; i++) {
        const r = pick(i);
        if (r) g.rect(...r);
      }
      g.fill();
    };
    const box = (i) => {
      const x = grid.left + (i % this.experts) * grid.w,
        y = Math.floor(i / this.experts) * grid.t;
      return [x, y, grid.w - grid.gap, grid.t - grid.gap];
    };
    g.fillStyle = ink.cell;
    rects(box);
    for (const tier of this.tiers) {
      g.fillStyle = this.look.tiers[tier];
      rects((i) => {
        if (bits[i] !== tier) return null;
        const [x, y, w, t] = box(i),
          fill = Math.max(1, Math.round(t * FILL[tier]));
        return [x, y + t - fill, w, fill];
      });
    }
    if (flight.some(Boolean)) {
      g.fillStyle = hatch(g, ink["prefetch late"]);
      rects((i) => flight[i] && box(i));
    }
    this.drawFlashes(g, box, grid);
    this.drawUses(g, box, used, newest);
    this.drawAxes(g, grid);
    if (this.at !== null) {
      g.strokeStyle = ink.text;
      g.lineWidth = 2;
      const [x, y, w, t] = box(this.at);
      g.strokeRect(x - 1, y - 1, w + 2, t + 2);
    }
  }

  drawFlashes(g, box, grid) {
    const now = performance.now(),
      most = Math.min(3, grid.w / 3, grid.t / 3);
    let more = false;
    g.strokeStyle = this.look.ink.load;
    for (let i = 0; i < this.flashed.length; i++) {
      const age = (now - this.flashed[i]) / FLASH_MS;
      if (age >= 1) continue;
      more = true;
      const [x, y, w, t] = box(i),
        line = still() ? most * 0.6 : most * (1 - 0.6 * age);
      g.globalAlpha = still() ? 1 : Math.min(1, 1.5 * (1 - age));
      g.lineWidth = line;
      g.strokeRect(x + line / 2, y + line / 2, w - line, t - line);
    }
    g.globalAlpha = 1;
    clearTimeout(this.timer);
    if (more) this.timer = setTimeout(() => this.draw(), 120); // a new frame mostly comes first
  }

  drawUses(g, box, used, newest) {
    if (newest < 0) return;
    for (let i = 0; i < used.length; i++) {
      if (used[i] !== newest) continue;
      const [x, y, w, t] = box(i),
        r = Math.min(3.2, w / 3, t / 3);
      g.beginPath();
      g.arc(x + w / 2, y + t / 2, r, 0, 2 * Math.PI);
      g.fillStyle = this.look.ink.ground;
      g.strokeStyle = this.look.ink.text;
      g.lineWidth = Math.max(0.75, r / 2.2);
      g.fill();
      g.stroke();
    }
  }

  drawAxes(g, grid) {
    g.fillStyle = this.look.ink.soft;
    g.font = g.font.replace("11px", "10px");
    g.textAlign = "right";
    const down = Math.ceil(13 / grid.t),
      across = [1, 2, 4, 8, 16, 32].find((n) => n * grid.w >= 22) ?? 64;
    for (let l = 0; l < this.layers; l += down)
      g.fillText(l, grid.left - 6, Math.max(5, (l + 0.5) * grid.t));
    g.textAlign = "center";
    for (let e = 0; e < this.experts; e += across) {
      g.fillText(e, grid.left + (e + 0.5) * grid.w, this.layers * grid.t + 8);
    }
  }

  cellAt(x, y) {
    const { left, w, t } = this.grid();
    const e = Math.floor((x - left) / w),
      l = Math.floor(y / t);
    return e >= 0 && e < this.experts && l >= 0 && l < this.layers ? l * this.experts + e : null;
  }

  point(at, event) {
    if (at === this.at && !event) return;
    this.at = at;
    if (at === null) {
      this.tip.hide();
      this.why.forget();
      this.draw();
      return;
    }
    const canvas = this.sheet.node.getBoundingClientRect(),
      { left, w, t } = this.grid();
    this.where = event
      ? [event.clientX, event.clientY]
      : [
          canvas.left + left + ((at % this.experts) + 1) * w,
          canvas.top + (Math.floor(at / this.experts) + 0.5) * t,
        ];
    this.draw();
    this.describe();
  }

  describe() {
    if (!this.frame || this.at === null) return;
    const { bits, in_flight: flight, used, loaded, uses } = this.frame.map,
      i = this.at;
    const layer = Math.floor(i / this.experts),
      row = uses.subarray(layer * this.experts, (layer + 1) * this.experts);
    const total = row.reduce((a, b) => a + b, 0),
      rank = row.filter((n) => n > uses[i]).length + 1;
    const token = (n) => (n < 0 ? "never" : `token ${n}`);
    const rows = [
      ["resident", bits[i] ? `${bits[i]} bit${flight[i] ? ", in flight" : ""}` : "no"],
      [
        "uses",
        `${uses[i]}${total ? ` (${percent(uses[i] / total)}, rank ${rank} of ${this.experts})` : ""}`,
      ],
      ["last used", token(used[i])],
      ["last load", token(loaded[i])],
    ];
    const expert = i % this.experts,
      title = `layer ${layer}, expert ${expert}`,
      why = bits[i] ? this.why.about(layer, expert, this.frame.seq) : undefined;
    const extra = [this.popularity(row, expert), ...(why ? [drawWhy(why)] : [])];
    this.tip.show(...this.where, title, rows, extra);
    const terms = (why?.terms ?? []).map((t) => [`${why.policy}, ${t.name}`, short(t.value)]);
    this.sheet.node.setAttribute(
      "aria-label",
      `${title}: ${[...rows, ...terms].map((r) => r.join(" ")).join(", ")}`,
    );
  }

  /** How often this layer's experts were used, as a row of bars. */
  popularity(row, expert) {
    const most = Math.max(1, ...row),
      bars = h("div", { class: "moe-popular", "aria-hidden": true });
    row.forEach((n, e) => {
      bars.append(
        h("i", {
          style: `height:${Math.max(4, (100 * n) / most)}%`,
          class: e === expert ? "on" : "",
        }),
      );
    });
    return bars;
  }

  relabel() {
    const swatch = (style, words, name = "") =>
      h("span", { class: "moe-key" }, h("i", { class: `moe-cell ${name}`, style }), words);
    this.legend.replaceChildren(
      ...this.tiers.map((b) =>
        swatch(`--c:${this.look.tiers[b]};--f:${100 * FILL[b]}%`, `${b} bit`),
      ),
      swatch("", "loaded", "loaded"),
      swatch("", "in flight", "flight"),
      swatch("", "used now", "used"),
    );
    this.draw();
  }

  close() {
    clearTimeout(this.timer);
    this.why.close();
    this.sheet.close();
  }
}
