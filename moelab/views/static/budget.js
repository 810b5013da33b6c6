// The budget: one native slider from nothing to every expert at 16 bit, with ticks at what one
// token needs and at everything in the bits now set. Below the red line nothing can run.

const SLIDER = 400;

class Budget {
  constructor(options, change, settle) {
    this.options = options;
    this.total = options.all_experts_bytes;
    this.slider = h("input", {
      type: "range",
      name: "budget",
      "aria-label": "Budget",
      min: 1,
      max: SLIDER,
      step: 1,
      oninput: () => {
        const budget = Math.round((this.total * this.slider.value) / SLIDER);
        this.label(budget);
        change(budget);
      },
    });
    this.hold = new Hold(this.slider, settle);
    this.value = h("output", { class: "moe-value", "aria-live": "off" }); // the slider says it
    this.marks = ["one token", "everything"].map((words) => [h("i"), h("span", {}, words)]);
    this.never = h("span", { class: "moe-never" });
    this.node = h(
      "label",
      { class: "moe-field moe-budget" },
      h("span", {}, "Budget", this.value),
      h("span", { class: "moe-track" }, this.never, this.slider),
      h("span", { class: "moe-marks", "aria-hidden": true }, ...this.marks.flat()),
    );
  }

  label(budget) {
    const { layers, experts, expert_bytes } = this.options,
      fit = Math.floor(budget / expert_bytes[this.bits]),
      count = fit < layers * experts ? fit : `all ${layers * experts}`;
    say(this.value, `${bytes(budget)} · ${percent(budget / this.total)} · ${count} experts at ${this.bits} bit`);
    this.slider.setAttribute("aria-valuetext", this.value.textContent);
    this.slider.style.setProperty("--v", Math.min(1, this.slider.value / SLIDER));
  }

  /** Show what holds: the ticks always, the thumb where it is not being moved. */
  sync(now, settled) {
    const { layers, experts, expert_bytes } = this.options,
      share = (nbytes) => Math.min(1, nbytes / this.total);
    this.bits = now.bits;
    if (settled && !this.hold.held) {
      this.slider.value = Math.round(SLIDER * share(now.budget_bytes));
      this.label(now.budget_bytes);
    }
    const every = layers * experts * expert_bytes[now.bits];
    this.placeMarks([share(now.token_cycle_bytes), share(every)]);
    this.never.style.setProperty("--at", share(now.minimum_budget_bytes));
  }

  /** Ticks where they belong; labels below them, pushed apart where they would touch. */
  placeMarks(shares) {
    const wide = this.slider.clientWidth || 270;
    let free = 0;
    this.marks.forEach(([tick, label], i) => {
      tick.style.setProperty("--at", shares[i]);
      const at = 8 + shares[i] * (wide - 16),
        size = label.offsetWidth || 60,
        left = Math.min(Math.max(free, at - size / 2), wide - size);
      label.style.left = `${left}px`;
      free = left + size + 8;
    });
  }

  close() {
    this.hold.close();
  }
}
