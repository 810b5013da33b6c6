// The drawer of pinned runs: a table to sort, memory against speed with KL as colour and size, and
// the code of each run. Two runs that are ticked are shown beside each other (whatif.js).

/** How a figure of Run.summary is called and written. */
const FIGURE = {
  tokens_per_s: ["tokens/s", rate],
  hit_ratio: ["hit ratio", percent],
  byte_hit_ratio: ["byte hit ratio", percent],
  bytes_per_token: ["read/token", bytes],
  stall_share: ["stall share", percent],
  kl_mean: ["mean KL", kl],
  peak: ["peak MB", (x) => fixed(x / 1e6, 2)],
  peak_resident_bytes: ["peak memory", bytes],
  budget_bytes: ["budget at the end", bytes],
  setup_ms: ["set-up", millis],
  ttft_ms: ["first token", millis],
  tpot_ms_median: ["per token, median", millis],
  tpot_ms_p99: ["per token, 99 %", millis],
};
const COLUMNS_OF_RUNS = "tokens_per_s hit_ratio bytes_per_token stall_share peak kl_mean".split(" ");
const figureIn = (key, x) =>
  x === null || x === undefined ? "–" : typeof x === "number" ? (FIGURE[key]?.[1] ?? String)(x) : x;
const titleOf = (key) => FIGURE[key]?.[0] ?? key;

/** KL below the limit: as fine as so many bits' colour, drawn with this radius. */
const KL_STEPS = [
  [1e-3, 16, 5, "KL < 0.001"],
  [1e-2, 8, 7, "< 0.01"],
  [1e-1, 4, 9, "< 0.1"],
  [Infinity, 2, 11, "0.1 or more"],
];
/** Tops of an axis whose quarters are round. */
const QUARTERED = [1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10];
const MARKS = {
  measured: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
  emulated: (r) => `M0 ${-1.25 * r}L${1.25 * r} 0L0 ${1.25 * r}L${-1.25 * r} 0z`,
  "page cache": (r) => `M${-r * 0.9} ${-r * 0.9}h${1.8 * r}v${1.8 * r}h${-1.8 * r}z`,
};

function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false) node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const button = (words, props) => h("button", { type: "button", ...props }, words);

class Runs {
  constructor(model, options, stage) {
    Object.assign(this, { model, stage, ticked: [], sort: ["", 1], drawn: "", told: {} });
    const ask = (what, more = {}) => model.send({ do: "runs", ask: what, ...more });
    this.ask = ask;
    this.toggle = button("Runs", { onclick: () => this.open(this.node.hidden || !this.inSight(), true) });
    this.ask_ = button("What if", {
      onclick: () => this.wonder(this.whatIf.node.hidden),
      title: "Make a run again with the settings as they are now",
    });
    const pin = () => {
      ask("pin");
      this.open(true);
    };
    this.export = new Export(model);
    this.bar = h(
      "span",
      { class: "moe-keep" },
      button("Pin", { onclick: pin, title: "Keep the newest run to compare it with others" }),
      this.ask_,
      this.export.node,
      this.toggle,
    );
    this.fault = h("p", { class: "moe-refused", role: "alert", hidden: true });
    this.voice = h("span", { class: "moe-voice", role: "status", "aria-live": "polite" });
    this.none = h(
      "p",
      { class: "moe-soft" },
      "Nothing is pinned yet. Pin keeps the newest run; What if makes it again with other settings.",
    );
    this.hint = h("span", { class: "moe-soft" });
    this.table = h("table", { class: "moe-pins" });
    this.scatter = new Scatter(stage, (name) => this.tick(name));
    this.code = new CodeBox();
    this.whatIf = new WhatIf(model, options, stage, ask);
    this.beside = new Beside(() => this.tick(null));
    this.scroll = h("div", { class: "moe-scroll" });
    this.both = h("div", { class: "moe-both" }, this.scroll, this.scatter.node);
    this.node = h(
      "section",
      { class: "moe-runs", "aria-label": "Runs", hidden: true },
      h(
        "header",
        {},
        h("h3", {}, "Runs"),
        this.hint,
        this.fault,
        this.voice,
        button("×", { class: "moe-close", "aria-label": "Close runs", onclick: () => this.open(false) }),
      ),
      this.none,
      this.both,
      this.code.node,
      this.beside.node,
    );
    this.heard = (content) => {
      if (content.beside) this.beside.show(content.beside, this.pinned);
      if (content.since) this.whatIf.since(content.since);
    };
    model.on("msg:custom", this.heard);
  }

  /** Open or close the drawer; what is open stays so when the page is loaded again. */
  open(wanted, scroll) {
    this.model.set("form", { ...this.model.get("form"), runs: wanted });
    this.model.save_changes();
    this.setOpen(wanted, !this.whatIf.node.hidden);
    const smooth = still() ? "auto" : "smooth";
    if (wanted && scroll) this.node.scrollIntoView({ block: "nearest", behavior: smooth });
    if (!wanted && this.node.contains(document.activeElement)) this.toggle.focus();
  }

  setOpen(wanted, wonders) {
    this.node.hidden = !wanted;
    this.whatIf.node.hidden = !wonders;
    this.toggle.setAttribute("aria-expanded", wanted);
    this.ask_.setAttribute("aria-expanded", wonders);
    this.sync();
  }

  /** Open or close what stands below the settings: what if they had been these? */
  wonder(wanted) {
    this.model.set("form", { ...this.model.get("form"), whatif: wanted });
    this.model.save_changes();
    this.setOpen(!this.node.hidden, wanted);
    if (!wanted && document.activeElement === document.body) this.ask_.focus();
  }

  /** Whether enough of the drawer is on the screen to be seen. */
  inSight() {
    const { top, bottom } = this.node.getBoundingClientRect();
    return bottom > 80 && top < innerHeight - 80;
  }

  sync() {
    const { pinned = [], again = {}, error = "" } = this.model.get("runs") ?? {};
    say(this.toggle, pinned.length ? `Runs (${pinned.length})` : "Runs");
    if (again.state === "done" && this.told.state === "running") {
      this.ticked = again.names;
      this.told = again;
      this.open(true, true);
      say(this.voice, `what if ${again.words}: done`);
    }
    this.told = again;
    say(this.fault, error);
    this.fault.hidden = !error;
    this.node.dataset.pinned = pinned.length;
    if (!this.whatIf.node.hidden) this.whatIf.sync(pinned, again);
    if (this.node.hidden) return;
    const known = pinned.map(({ name }) => name);
    this.ticked = this.ticked.filter((name) => known.includes(name));
    const key = JSON.stringify([pinned, this.ticked, this.sort]);
    if (key === this.drawn) return;
    this.drawn = key;
    this.pinned = pinned.map((run, i) => ({ ...run, number: i + 1 }));
    this.none.hidden = Boolean(pinned.length);
    say(this.hint, pinned.length > 1 ? "tick two to see them beside each other" : "");
    this.both.hidden = !pinned.length;
    this.draw();
    this.scatter.show(this.pinned, this.ticked);
    this.code.sync(this.pinned);
    if (this.ticked.length === 2) this.ask("beside", { names: this.ticked });
    else this.beside.node.hidden = true;
  }

  /** Take a run to look at beside another, or put it back; the third one takes the first's place. */
  tick(name) {
    const there = this.ticked.includes(name);
    this.ticked =
      name === null ? [] : there ? this.ticked.filter((n) => n !== name) : [...this.ticked, name].slice(-2);
    this.sync();
  }

  order() {
    const [key, way] = this.sort,
      value = ({ [key]: x }) => (x === null ? Infinity * way : x);
    return key ? this.pinned.toSorted((a, b) => (value(a) < value(b) ? -way : way)) : this.pinned;
  }

  draw() {
    const focus = this.table.contains(document.activeElement) && document.activeElement.dataset.f;
    const head = h("tr", {}, h("th", {}, h("span", { class: "moe-voice" }, "beside")));
    head.append(this.heading("name", "run"));
    for (const key of COLUMNS_OF_RUNS) head.append(this.heading(key, titleOf(key)));
    head.append(this.heading("timing", "timing"), h("th", {}, h("span", { class: "moe-voice" }, "actions")));
    const rows = this.order().map((run) => this.row(run));
    this.table.replaceChildren(
      h("caption", { class: "moe-voice" }, "Pinned runs"),
      h("thead", {}, head),
      h("tbody", {}, ...rows),
    );
    if (!this.table.parentNode) this.scroll.append(this.table); // an empty table is no table
    if (focus) this.table.querySelector(`[data-f="${focus}"]`)?.focus();
  }

  heading(key, words) {
    const [by, way] = this.sort,
      sorted = by !== key ? "none" : way > 0 ? "ascending" : "descending",
      onclick = () => {
        this.sort = by === key && way < 0 ? ["", 1] : [key, by === key ? -1 : 1];
        this.sync();
      };
    const arrow = { none: "", ascending: " ▲", descending: " ▼" }[sorted];
    return h("th", { scope: "col", "aria-sort": sorted }, button(words + arrow, { onclick, "data-f": `by ${key}` }));
  }

  row(run) {
    const { name, number, best } = run,
      f = (what) => ({ "data-f": `${what} ${number}` });
    const box = h("input", {
      type: "checkbox",
      "aria-label": `${name} beside another`,
      title: "Tick two runs to see them beside each other",
      onchange: () => this.tick(name),
      ...f("tick"),
    });
    box.checked = this.ticked.includes(name);
    const rename = h("input", {
      type: "text",
      value: name,
      "aria-label": `Name of run ${number}`,
      onchange: () => rename.value.trim() && this.ask("rename", { name, new: rename.value }),
      onkeydown: (e) => {
        if (e.key === "Escape") rename.value = name;
        if (e.key === "Escape" || e.key === "Enter") rename.blur();
      },
      ...f("name"),
    });
    const changed = run.changes ? `, then changed ${run.changes}×` : "",
      prompt = JSON.stringify(run.prompt.length > 36 ? `${run.prompt.slice(0, 35)}…` : run.prompt),
      more = `${name.startsWith(run.settings) ? "" : run.settings}${changed}`.replace(/^, /, "");
    const about = `${more ? `${more} · ` : ""}${run.tokens} tokens of ${prompt}`;
    const star = best && h("b", { class: "moe-best", title: "No other run on this device beats it" }, "★");
    return h(
      "tr",
      { "data-name": name, class: box.checked ? "on" : "" },
      h("td", {}, box),
      h("th", { scope: "row" }, numberOf(number), rename, star || "", h("small", { title: about }, about)),
      ...COLUMNS_OF_RUNS.map((key) => h("td", { "data-key": key }, figureIn(key, run[key]))),
      h("td", {}, timingBadge(run)),
      h(
        "td",
        { class: "moe-does" },
        button("code", { onclick: () => this.code.open(run), "aria-label": `Code of ${name}`, ...f("code") }),
        button("unpin", { onclick: () => this.ask("unpin", { name }), "aria-label": `Unpin ${name}`, ...f("unpin") }),
      ),
    );
  }

  close() {
    this.model.off("msg:custom", this.heard);
    for (const part of [this.scatter, this.whatIf, this.export]) part.close();
  }
}

/** Save the newest run as a page that needs neither kernel nor network. */
class Export {
  constructor(model) {
    Object.assign(this, { model, said: h("span", { role: "status" }) });
    const title = "Save the newest run as one HTML file that works without a kernel or a network";
    this.go = button("Export", { title, onclick: () => this.ask() });
    this.node = h("span", {}, this.go, this.said);
    this.heard = ({ page }, buffers) => page && this.asked && this.save(page, buffers);
    model.on("msg:custom", this.heard);
  }

  ask() {
    this.asked = this.go.disabled = true;
    say(this.said, "exporting …");
    this.model.send({ do: "page" });
  }

  save({ error, tokens }, [page]) {
    this.asked = this.go.disabled = false;
    say(this.said, error ?? "");
    this.said.className = error ? "moe-refused" : "";
    if (error) return;
    const url = URL.createObjectURL(new Blob([page], { type: "text/html" }));
    h("a", { href: url, download: `moelab-${tokens}-tokens.html` }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000);
  }

  close() {
    this.model.off("msg:custom", this.heard);
  }
}

const numberOf = (n) => h("b", { class: "moe-number" }, `${n}`);

function timingBadge({ timing, device, emulated }) {
  const node = h("b", { class: `moe-badge ${emulated ? "emulated" : ""}` }, timing);
  node.title = device;
  return node;
}

/** The code that makes a run again, copied at once where the browser lets us. */
class CodeBox {
  constructor() {
    this.title = h("b");
    this.said = h("span", { class: "moe-soft", role: "status" });
    this.body = h("pre", { tabindex: 0, "aria-label": "Code that makes this run again" });
    const close = () => this.open(null);
    this.node = h(
      "div",
      { class: "moe-copy", hidden: true },
      h("header", {}, this.title, this.said, button("copy", { onclick: () => this.copy() }), button("×", { class: "moe-close", "aria-label": "Close code", onclick: close })),
      this.body,
    );
  }

  open(run) {
    this.run = run;
    this.node.hidden = !run;
    if (!run) return;
    say(this.title, run.name);
    say(this.body, run.code);
    this.copy();
  }

  sync(pinned) {
    if (this.run && !pinned.some(({ code }) => code === this.run.code)) this.open(null);
  }

  async copy() {
    try {
      await navigator.clipboard.writeText(this.run.code);
      say(this.said, "copied");
    } catch {
      getSelection().selectAllChildren(this.body); // not allowed here: ready for Ctrl+C
      say(this.said, "selected: press Ctrl+C");
    }
  }
}

/** Memory across, speed up; colour and size are the KL, the shape says how it was timed. */
class Scatter {
  constructor(stage, choose) {
    Object.assign(this, { stage, choose, runs: [], ticked: [] });
    this.sheet = svg("svg", { role: "group", "aria-label": "Pinned runs: memory against speed" });
    this.legend = h("div", { class: "moe-legend" });
    this.box = h("div", { class: "moe-plane" }, this.sheet);
    this.node = h("div", { class: "moe-scatter" }, this.box, this.legend);
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.box);
    this.themed = new MutationObserver(() => this.draw());
    this.themed.observe(stage.root, { attributes: true, attributeFilter: ["data-theme"] });
  }

  show(runs, ticked) {
    Object.assign(this, { runs, ticked });
    this.draw();
  }

  draw() {
    const { clientWidth: wide, clientHeight: tall } = this.box;
    if (!wide || !this.runs.length) return;
    const focus = this.sheet.contains(document.activeElement) && document.activeElement.dataset.name;
    const left = 42,
      right = wide - 18,
      top = 20,
      bottom = tall - 34;
    const most = (key) => nice(1.12 * Math.max(1e-9, ...this.runs.map((run) => run[key] ?? 0)), QUARTERED);
    const [m, s] = [most("peak"), most("tokens_per_s")];
    const x = (v) => left + ((right - left) * v) / m,
      y = (v) => bottom - ((bottom - top) * v) / s;
    const text = (at, up, words, more) => svg("text", { x: at, y: up, ...more }, words);
    const parts = [0, 0.25, 0.5, 0.75, 1].flatMap((share) => [
      svg("path", { d: `M${left} ${y(s * share)}H${right}`, class: "grid" }),
      svg("path", { d: `M${x(m * share)} ${top}V${bottom}`, class: "grid" }),
      text(left - 6, y(s * share) + 4, +(s * share).toPrecision(3), { "text-anchor": "end" }),
      text(x(m * share), bottom + 14, +((m * share) / 1e6).toPrecision(3), { "text-anchor": "middle" }),
    ]);
    parts.push(text(right, bottom + 30, "peak memory of experts, MB", { "text-anchor": "end" }));
    parts.push(text(4, 9, "tokens/s", {}));
    for (const line of this.fronts()) {
      const d = line.map((run) => `${x(run.peak)} ${y(run.tokens_per_s)}`).join("L");
      parts.push(svg("path", { d: `M${d}`, class: "front" }));
    }
    const placed = [];
    for (const run of this.runs) {
      const at = { run, x: x(run.peak), y: y(run.tokens_per_s), ...stepOf(run.kl_mean) };
      at.down = placed.filter((p) => Math.hypot(p.x - at.x, p.y - at.y) < 16).length; // numbers apart
      placed.push(at);
    }
    placed.sort((a, b) => b.r - a.r); // a small mark is not hidden by a large one
    this.sheet.setAttribute("viewBox", `0 0 ${wide} ${tall}`);
    this.sheet.replaceChildren(...parts, ...placed.map((at) => this.point(at)));
    if (focus) [...this.sheet.querySelectorAll("g")].find((g) => g.dataset.name === focus)?.focus();
    this.relabel();
  }

  /** The runs no other beats, a line for each device. */
  fronts() {
    const best = this.runs.filter((run) => run.best).toSorted((a, b) => a.peak - b.peak);
    return Object.values(Object.groupBy(best, (run) => `${run.timing} ${run.device}`));
  }

  point({ run, x, y, r, down }) {
    const on = this.ticked.includes(run.name);
    const words = [
      ...COLUMNS_OF_RUNS.map((key) => [titleOf(key), figureIn(key, run[key])]),
      [run.timing, run.device],
      ...(run.best ? [["★", "not beaten on its device"]] : []),
    ];
    const tip = () => {
      const box = node.getBoundingClientRect();
      this.stage.tip.show(box.right, box.top, `${run.number}  ${run.name}`, words);
    };
    const hide = () => this.stage.tip.hide();
    const choose = () => this.choose(run.name);
    const node = svg(
      "g",
      {
        transform: `translate(${x.toFixed(1)} ${y.toFixed(1)})`,
        class: `point${run.best ? " best" : ""}${on ? " on" : ""}`,
        tabindex: 0,
        role: "button",
        "aria-pressed": on,
        "aria-label": `${run.name}: ${words.map((pair) => pair.join(" ")).join(", ")}`,
        "data-name": run.name,
        onpointerenter: tip,
        onpointerleave: hide,
        onfocus: tip,
        onblur: hide,
        onclick: choose,
        onkeydown: (e) => {
          if (e.key !== "Enter" && e.key !== " ") return;
          e.preventDefault();
          choose();
        },
      },
      ...(run.best ? [svg("path", { d: MARKS[timingOf(run)](r + 3.5), class: "ring" })] : []),
      mark(run, this.stage.look),
      svg("text", { x: 18, y: 4 + 11 * down }, run.number),
    );
    return node;
  }

  relabel() {
    const { look } = this.stage,
      key = (run, words, name = "") =>
        h("span", { class: `moe-key ${name}` }, svg("svg", { viewBox: "-13 -13 26 26", class: "moe-mark" }, mark(run, look)), words);
    const timings = Object.keys(MARKS).filter((timing) => this.runs.some((run) => timingOf(run) === timing));
    const unknown = this.runs.some((run) => run.kl_mean === null);
    this.legend.replaceChildren(
      ...timings.map((timing) => key({ timing, kl_mean: 1e-3 }, timing, "shape")),
      ...KL_STEPS.map(([below, , , words]) => key({ timing: timings[0], kl_mean: below === Infinity ? 1 : below / 2 }, words)),
      ...(unknown ? [key({ timing: timings[0], kl_mean: null }, "KL not measured")] : []),
      h("span", {}, "★ ringed, dotted line: beaten by no other run on its device"),
      ...(timings.length > 1 ? [h("span", {}, "speeds of different shapes are not one clock's")] : []),
    );
  }

  close() {
    this.watch.disconnect();
    this.themed.disconnect();
  }
}

const timingOf = ({ timing }) => (timing in MARKS ? timing : "measured");

function stepOf(x) {
  const [, bits, r] = KL_STEPS.find(([below]) => (x ?? 0) < below);
  return { bits, r };
}

/** A run's mark: hollow where the KL is not known. */
function mark(run, look) {
  const { bits, r } = stepOf(run.kl_mean),
    known = run.kl_mean !== null;
  const fill = known ? look.tiers[bits] : "transparent";
  return svg("path", { d: MARKS[timingOf(run)](r), fill, class: known ? "" : "hollow" });
}
