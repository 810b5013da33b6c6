// What if: a run made again with the settings as they are now, or with one expert kept for good;
// and two runs beside each other, the first different token marked, with every figure's difference.

class WhatIf {
  constructor(model, options, stage, ask) {
    Object.assign(this, { model, stage, ask, key: "" });
    this.of = h("select", { "aria-label": "Run to make again", onchange: () => this.wonder() });
    this.words = h("code");
    this.keeps = h("input", { type: "checkbox", onchange: () => this.tell() });
    this.expert = h("span");
    const tiers = options.tiers.map((b) => h("option", { value: b }, `${b} bit`));
    this.bits = h("select", { "aria-label": "Bits it is kept at", onchange: () => this.tell() }, ...tiers);
    this.go = button("Make it again", { class: "moe-again", onclick: () => this.begin() });
    this.halt = button("Stop", { onclick: () => ask("stop") });
    this.progress = h("progress", { max: 1, value: 0, "aria-label": "Tokens made again" });
    this.state = h("span", { role: "status", "aria-live": "polite", class: "moe-soft" });
    this.node = h(
      "div",
      { class: "moe-what", role: "group", "aria-label": "What if", hidden: true },
      h("b", {}, "What if"),
      this.of,
      h("span", {}, "were made again with ", this.words),
      h("label", {}, this.keeps, this.expert),
      this.bits,
      this.go,
      this.halt,
      this.progress,
      this.state,
    );
    this.moved = () => this.node.hidden || this.wonder();
    for (const what of ["change:controls", "change:frame"]) model.on(what, this.moved);
    this.chosen = new MutationObserver(() => this.tell()); // another expert on the cache map
    this.chosen.observe(stage.life.node, { attributeFilter: ["data-expert"] });
  }

  /** The expert chosen on the cache map, where it is to be kept. */
  kept() {
    const of = this.stage.life.of;
    return of && this.keeps.checked ? [of.layer, of.expert, Number(this.bits.value)] : null;
  }

  begin() {
    if (this.go.getAttribute("aria-disabled") === "true") return;
    this.ask("whatif", { of: this.of.value, keep: this.kept() });
  }

  /** Ask what has changed since the run, where the answer may be another one by now. */
  wonder() {
    const { run, running } = this.stage.live ?? {};
    const key = JSON.stringify([this.of.value, this.model.get("controls"), run, running]);
    if (key === this.key) return;
    this.key = key;
    this.tell();
    clearTimeout(this.timer);
    if (run && !(running && !this.of.value)) this.timer = setTimeout(() => this.ask("since", { of: this.of.value }), 120);
  }

  since({ of, words, error }) {
    if (of !== this.of.value) return;
    Object.assign(this, { words_: words, error });
    this.tell();
  }

  sync(pinned, again) {
    const names = ["", ...pinned.filter((run) => run.again).map(({ name }) => name)];
    if (JSON.stringify(names) !== this.names) {
      this.names = JSON.stringify(names);
      const held = this.of.value;
      this.of.replaceChildren(...names.map((name) => h("option", { value: name }, name || "the newest run")));
      this.of.value = names.includes(held) ? held : "";
    }
    this.again = again;
    this.wonder();
    this.tell();
  }

  tell() {
    const { state = "", words = "", done = 0, total = 1, error } = this.again ?? {},
      running = state === "running",
      { run, running: live } = this.stage.live ?? {},
      of = this.stage.life.of,
      keep = this.kept();
    const changes = this.words_ ?? "",
      idle = !run ? "Run something first" : live && !this.of.value ? "the run is still going on" : this.error;
    say(this.words, changes || (keep ? "the same settings" : "… change a setting above"));
    this.keeps.disabled = this.bits.disabled = !of;
    if (!of) this.keeps.checked = false;
    say(this.expert, of ? ` keep expert ${of.layer}.${of.expert} at` : " keep an expert: choose it on the cache map");
    this.bits.hidden = !of;
    this.go.setAttribute("aria-disabled", Boolean(running || idle || !(changes || keep)));
    this.go.title = idle || (changes || keep ? "" : "Change a setting above, or choose an expert to keep");
    this.halt.hidden = this.progress.hidden = !running;
    this.progress.value = total ? done / total : 0;
    const said = {
      running: `${words}: token ${done} of ${total}`,
      done: `${words}: beside each other below, both pinned`,
      failed: error,
      "": idle ?? "",
    };
    say(this.state, said[state]);
    this.state.classList.toggle("moe-refused", state === "failed");
    Object.assign(this.node.dataset, { state, changes });
  }

  close() {
    this.chosen.disconnect();
    clearTimeout(this.timer);
    for (const what of ["change:controls", "change:frame"]) this.model.off(what, this.moved);
  }
}

class Beside {
  constructor(close) {
    this.head = h("span");
    this.texts = h("div", { class: "moe-texts" });
    this.figures = h("table", { class: "moe-pins" });
    this.scroll = h("div", { class: "moe-scroll" });
    this.node = h(
      "section",
      { class: "moe-beside", "aria-label": "Two runs beside each other", hidden: true },
      h("header", {}, h("h3", {}, "Beside each other"), this.head, button("×", { class: "moe-close", "aria-label": "Close the comparison", onclick: close })),
      h("div", { class: "moe-pair" }, this.texts, this.scroll),
    );
  }

  show(two, pinned) {
    const { names, at, prompts, same_device: clock } = two,
      differ = prompts[0] !== prompts[1];
    two.numbers = names.map((name) => pinned.find((run) => run.name === name)?.number ?? "");
    const parting = at === null ? "every token is the same" : `first different token: ${at}`;
    say(this.head, [differ ? "different prompts" : parting, ...(clock ? [] : ["times of different devices: no difference is taken"])].join(" · "));
    this.texts.replaceChildren(...names.map((name, i) => this.text(name, two, i, at)));
    for (const mark of this.texts.querySelectorAll("mark")) mark.parentNode.scrollTop = Math.max(0, mark.offsetTop - 90);
    const column = (words) => h("th", { scope: "col" }, words);
    this.figures.replaceChildren(
      h("caption", { class: "moe-voice" }, `Figures of ${names.join(" and ")}`),
      h("thead", {}, h("tr", {}, column(""), ...names.map((name, i) => h("th", { scope: "col", title: name }, numberOf(two.numbers[i]))), column("difference"))),
      h("tbody", {}, ...two.figures.map((row) => this.figure(...row))),
    );
    this.scroll.replaceChildren(this.figures);
    this.node.hidden = false;
    this.node.dataset.at = at ?? "";
    this.node.dataset.names = names.join("|");
  }

  text(name, { pieces, prompts, settings, changes, numbers }, i, at) {
    const all = pieces[i],
      cut = at ?? all.length;
    const there = all.slice(cut, cut + 1).join("") || "∎";
    const parts = [h("span", { class: "moe-prompt" }, prompts[i]), all.slice(0, cut).join("")];
    if (at !== null) {
      parts.push(h("mark", { title: `token ${at}: the first that differs` }, there));
      parts.push(h("span", { class: "moe-since" }, all.slice(cut + 1).join("")));
    }
    const then = changes[i] ? `, then changed ${changes[i]}×` : "";
    return h(
      "figure",
      {},
      h("figcaption", {}, numberOf(numbers[i]), name, h("small", {}, settings[i] + then)),
      h("div", { class: "moe-text", tabindex: 0, role: "group", "aria-label": `Text of ${name}` }, ...parts),
    );
  }

  figure(key, a, b, difference) {
    const cell = (x, more = {}) => h("td", { "data-key": key, ...more }, x);
    return h("tr", {}, h("th", { scope: "row" }, titleOf(key).replaceAll("_", " ")), cell(figureIn(key, a)), cell(figureIn(key, b)), cell(signed(key, difference), { class: "moe-more" }));
  }
}

/** A difference with its sign; of shares in points, as a share of a share would mislead. */
function signed(key, x) {
  if (typeof x !== "number") return "";
  if (x === 0) return "same";
  const words = figureIn(key, Math.abs(x));
  return `${x < 0 ? "−" : "+"}${words.replace("%", "points")}`;
}
