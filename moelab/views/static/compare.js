// The drawer of saved runs: a table to sort, memory against speed (scatter.js), and the code of
// each run. Two runs that are ticked are shown beside each other (beside.js).

import { Beside } from "./beside.js";
import { still } from "./colours.js";
import { button, cross, focused, h, keep, markup, say, voice } from "./element.js";
import { COLUMNS_OF_RUNS, Scatter } from "./scatter.js";
import { rate, titleOf, written } from "./numbers.js";
import { WhatIf } from "./whatif.js";

const BEST = "No other run on this device beats it";

/** The other way where it is sorted by this key already, then as saved. @returns {[string, number]} */
export const nextSort = ([by, way], key) =>
  by === key && way < 0 ? ["", 1] : [key, by === key ? -1 : 1];

/** The runs in the order of a column; what is not known comes last. */
export function sorted(runs, [key, way]) {
  const value = (run) => run[key] ?? Infinity * way;
  return key ? runs.toSorted((a, b) => (value(a) < value(b) ? -way : way)) : runs;
}

/** Take a name or put it back; the third one takes the first's place. */
export const ticked = (names, name) =>
  names.includes(name) ? names.filter((n) => n !== name) : [...names, name].slice(-2);

/** Letters of a name that are surely seen in its field. */
const SEEN = 32;

/** What a run was, under its name. */
export function aboutRun({ name, settings, tokens, prompt }) {
  const asked = JSON.stringify(prompt.length > 36 ? `${prompt.slice(0, 35)}…` : prompt),
    read = name.startsWith(settings) && settings.length <= SEEN;
  return `${read ? "" : `${settings} · `}${tokens} tokens of ${asked}`;
}

export class Runs {
  /** `adopt(settings)` puts settings in force. */
  constructor(model, options, stage, adopt) {
    this.model = model;
    this.saved = [];
    this.ticked = [];
    /** @type {[string, number]} column and direction */
    this.sort = ["", 1];
    this.drawn = "";
    this.told = {};
    this.ask = (what, more = {}) => model.send({ do: "runs", ask: what, ...more });
    const seen = () => this.open(this.node.hidden || !this.inSight(), true);
    this.toggle = button("Saved runs", { onclick: seen });
    this.wonder = button("What if", {
      title: "Make a run again with the settings as they are now",
      onclick: () => this.wondered(this.whatIf.node.hidden),
    });
    const save = button("Save", {
      title: "Keep the newest run to compare it with others",
      onclick: () => {
        this.ask("save");
        this.open(true);
      },
    });
    this.export = new Export(model);
    this.bar = h("span", { class: "moe-keep" }, save, this.wonder, this.export.node, this.toggle);
    this.fault = h("p", { class: "moe-refused", role: "alert", hidden: true });
    this.voice = voice();
    this.none = markup`
      <p class="moe-soft">Nothing is saved yet. Save keeps the newest run; What if makes it again
        with other settings.</p>`;
    this.hint = h("span", { class: "moe-soft" });
    this.table = h("table", { class: "moe-table" });
    this.scatter = new Scatter(stage, (name) => this.tick(name));
    this.code = new CodeBox();
    this.whatIf = new WhatIf(model, options, stage, this.ask, adopt);
    this.beside = new Beside(() => {
      this.ticked = [];
      this.sync();
    });
    this.scroll = h("div", { class: "moe-scroll" });
    this.both = h("div", { class: "moe-both" }, this.scroll, this.scatter.node);
    const close = cross("Close saved runs", () => this.open(false));
    this.node = markup`
      <section class="moe-runs" aria-label="Saved runs" hidden>
        <header><h3>Saved runs</h3>${[this.hint, this.fault, this.voice, close]}</header>
        ${[this.none, this.both, this.code.node, this.beside.node]}
      </section>`;
    this.heard = (content) => {
      if (content.beside) this.beside.show(content.beside, this.saved);
      if (content.since) this.whatIf.since(content.since);
    };
    model.on("msg:custom", this.heard);
  }

  /** Open or close the drawer; what is open stays so when the page is loaded again. */
  open(wanted, scroll = false) {
    keep(this.model, { runs: wanted });
    this.setOpen(wanted, !this.whatIf.node.hidden);
    const behavior = still() ? "auto" : "smooth";
    if (wanted && scroll) this.node.scrollIntoView({ block: "nearest", behavior });
    if (!wanted && focused(this.node)) this.toggle.focus();
  }

  setOpen(wanted, wonders) {
    this.node.hidden = !wanted;
    this.whatIf.node.hidden = !wonders;
    this.toggle.setAttribute("aria-expanded", `${wanted}`);
    this.wonder.setAttribute("aria-expanded", `${wonders}`);
    this.sync();
  }

  /** Open or close what stands below the settings: what if they had been these? */
  wondered(wanted) {
    keep(this.model, { whatif: wanted });
    this.setOpen(!this.node.hidden, wanted);
    if (!wanted && document.activeElement === document.body) this.wonder.focus();
  }

  /** Whether enough of the drawer is on the screen to be seen. */
  inSight() {
    const { top, bottom } = this.node.getBoundingClientRect();
    return bottom > 80 && top < innerHeight - 80;
  }

  sync() {
    const { saved = [], again = {}, error = "" } = this.model.get("runs") ?? {};
    say(this.toggle, saved.length ? `Saved runs (${saved.length})` : "Saved runs");
    if (again.state === "done" && this.told.state === "running") {
      this.ticked = again.names;
      this.told = again;
      this.open(true, true);
      say(this.voice, `what if ${again.words}: done`);
    }
    this.told = again;
    say(this.fault, error);
    this.fault.hidden = !error;
    this.node.dataset.saved = saved.length;
    if (!this.whatIf.node.hidden) this.whatIf.sync(saved, again);
    if (this.node.hidden) return;
    const known = saved.map(({ name }) => name);
    this.ticked = this.ticked.filter((name) => known.includes(name));
    const key = JSON.stringify([saved, this.ticked, this.sort]);
    if (key === this.drawn) return;
    this.drawn = key;
    this.saved = saved.map((run, i) => ({ ...run, number: i + 1 }));
    this.none.hidden = Boolean(saved.length);
    say(this.hint, saved.length > 1 ? "tick two to see them beside each other" : "");
    this.both.hidden = !saved.length;
    this.draw();
    this.scatter.show(this.saved, this.ticked);
    this.code.sync(this.saved);
    if (this.ticked.length === 2) this.ask("beside", { names: this.ticked });
    else this.beside.node.hidden = true;
  }

  tick(name) {
    this.ticked = ticked(this.ticked, name);
    this.sync();
  }

  draw() {
    const focus = focused(this.table)?.dataset.f;
    const headings = COLUMNS_OF_RUNS.map((key) => this.heading(key, titleOf(key))),
      rows = sorted(this.saved, this.sort).map((run) => this.row(run));
    this.table.replaceChildren(
      h("caption", { class: "moe-voice" }, "Saved runs"),
      markup`
        <thead><tr>
          <th><span class="moe-voice">beside</span></th>
          ${[this.heading("name", "run"), ...headings, this.heading("timing", "timing")]}
          <th><span class="moe-voice">actions</span></th>
        </tr></thead>`,
      h("tbody", {}, ...rows),
    );
    if (!this.table.parentNode) this.scroll.append(this.table); // an empty table is no table
    if (focus) /** @type {HTMLElement} */ (this.table.querySelector(`[data-f="${focus}"]`))?.focus();
  }

  heading(key, words) {
    const [by, way] = this.sort,
      order = by !== key ? "none" : way > 0 ? "ascending" : "descending",
      onclick = () => {
        this.sort = nextSort(this.sort, key);
        this.sync();
      };
    const arrow = { none: "", ascending: " ▲", descending: " ▼" }[order],
      sort = button(words + arrow, { onclick, "data-f": `by ${key}` });
    return h("th", { scope: "col", "aria-sort": order }, sort);
  }

  row(run) {
    const { name, number, best } = run,
      f = (what) => ({ "data-f": `${what} ${number}` });
    const box = h("input", {
      ...{ type: "checkbox", "aria-label": `${name} beside another`, ...f("tick") },
      title: "Tick two runs to see them beside each other",
      onchange: () => this.tick(name),
    });
    box.checked = this.ticked.includes(name);
    const rename = h("input", {
      ...{ type: "text", value: name, title: name, "aria-label": `Name of run ${number}`, ...f("name") },
      onchange: () => rename.value.trim() && this.ask("rename", { name, new: rename.value }),
      onkeydown: (e) => {
        if (e.key === "Escape") rename.value = name;
        if (e.key === "Escape" || e.key === "Enter") rename.blur();
      },
    });
    const does = (words, label, onclick) =>
      button(words, { onclick, "aria-label": `${label} ${name}`, ...f(words) });
    const code = does("code", "Code of", () => this.code.open(run)),
      remove = does("remove", "Remove", () => this.ask("remove", { name }));
    const about = aboutRun(run),
      star = best && h("b", { class: "moe-best", title: BEST }, "★"),
      badge = h("b", { class: "moe-badge", title: run.device }, run.timing);
    badge.classList.toggle("emulated", run.emulated);
    const cells = COLUMNS_OF_RUNS.map((k) => h("td", { "data-key": k }, written(k, run[k])));
    const [low, high] = run.range ?? [0, 0];
    if (high > low) cells[0].append(h("small", { class: "whole" }, `${rate(low)}–${rate(high)}`));
    return markup`
      <tr data-name="${name}" class="${box.checked ? "on" : ""}">
        <td>${box}</td>
        <th scope="row">
          <b class="moe-number">${number}</b>${[rename, star]}<small title="${about}">${about}</small>
        </th>
        ${cells}
        <td>${badge}</td>
        <td class="moe-does">${[code, remove]}</td>
      </tr>`;
  }

  close() {
    this.model.off("msg:custom", this.heard);
    for (const part of [this.scatter, this.whatIf, this.export]) part.close();
  }
}

/** Save the newest run as a page that needs neither kernel nor network. */
class Export {
  constructor(model) {
    this.model = model;
    this.said = h("span", { role: "status" });
    const title = "Save the newest run as one HTML file that works without a kernel or a network";
    this.go = button("Export", { title, onclick: () => this.ask() });
    this.node = h("span", {}, this.go, this.said);
    this.heard = ({ page }, buffers) => page && this.go.disabled && this.save(page, buffers);
    model.on("msg:custom", this.heard);
  }

  ask() {
    this.go.disabled = true;
    say(this.said, "exporting …");
    this.model.send({ do: "page" });
  }

  save({ error, tokens }, [page]) {
    this.go.disabled = false;
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

/** The code that makes a run again, copied at once where the browser lets us. */
class CodeBox {
  constructor() {
    this.run = null;
    this.title = h("b");
    this.said = h("span", { class: "moe-soft", role: "status" });
    this.body = h("pre", { tabindex: 0, "aria-label": "Code that makes this run again" });
    const copy = button("copy", { onclick: () => this.copy() }),
      close = cross("Close code", () => this.open(null));
    this.node = markup`
      <div class="moe-copy" hidden>
        <header>${[this.title, this.said, copy, close]}</header>
        ${this.body}
      </div>`;
  }

  open(run) {
    this.run = run;
    this.node.hidden = !run;
    if (!run) return;
    say(this.title, run.name);
    say(this.body, run.code);
    this.copy();
  }

  sync(saved) {
    if (this.run && !saved.some(({ code }) => code === this.run.code)) this.open(null);
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
