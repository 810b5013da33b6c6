// The budget: one native slider from nothing to every expert at 16 bit, with ticks at what one
// token needs and at everything in the bits now set. Below the red line nothing can run.

import { h, holdOf, markup, say } from "./element.js";
import { bytes, percent, tierName } from "./numbers.js";

const SLIDER = 400;
const NEVER = "Below the red mark nothing can run: the experts of one layer do not fit";

/** A budget in words. @param {number} budget bytes @param {number} bits */
export function budgetInWords(budget, bits, { all_experts, all_bytes, own_sizes, all_experts_bytes }) {
  const fit = Math.floor((budget * all_experts) / all_bytes[bits]),
    about = own_sizes.includes(bits) ? "about " : "",
    count = fit < all_experts ? `${about}${fit}` : `all ${all_experts}`,
    share = percent(budget / all_experts_bytes);
  return `${bytes(budget)} · ${share} · ${count} experts at ${tierName(bits)}`;
}

/** Where labels of these widths go under their ticks, pushed apart where they would touch, px. */
export function placed(shares, sizes, wide) {
  let free = 0;
  return shares.map((share, i) => {
    const at = 8 + share * (wide - 16),
      left = Math.min(Math.max(free, at - sizes[i] / 2), wide - sizes[i]);
    free = left + sizes[i] + 8;
    return left;
  });
}

export class Budget {
  constructor(options, change, settle) {
    this.options = options;
    this.bits = 16;
    this.total = options.all_experts_bytes;
    this.slider = h("input", {
      type: "range", name: "budget", "aria-label": "Budget", min: 1, max: SLIDER, step: 1,
      oninput: () => {
        const at = +this.slider.value, // the mouse need not hit the very last step
          budget = at > SLIDER - 4 ? this.total : Math.round((this.total * at) / SLIDER);
        this.label(budget);
        change(budget);
      },
    });
    this.held = holdOf(this.slider, settle);
    this.auto = h("input", {
      type: "checkbox", name: "auto", onchange: () => change(this.auto.checked ? "auto" : this.budget),
    });
    const follows = "The budget follows what this machine can spare, until it is set by hand";
    this.value = h("output", { class: "moe-value", "aria-live": "off" }); // the slider says it
    this.marks = ["one token", "everything"].map((words) => [h("i"), h("span", {}, words)]);
    this.never = h("span", { class: "moe-never", title: NEVER });
    this.node = markup`
      <div class="moe-field moe-budget">
        <span>Budget<label title="${follows}">${this.auto} auto</label>${this.value}</span>
        <span class="moe-track">${[this.never, this.slider]}</span>
        <span class="moe-marks" aria-hidden="true">${this.marks}</span>
      </div>`;
  }

  label(budget) {
    say(this.value, budgetInWords(budget, this.bits, this.options));
    this.slider.setAttribute("aria-valuetext", this.value.textContent);
  }

  /** Show what holds: the ticks always, the thumb where it is not being moved. */
  sync(now, settled) {
    const share = (nbytes) => Math.min(1, nbytes / this.total);
    this.bits = now.bits;
    if (settled && !this.held()) {
      this.budget = now.budget_bytes;
      this.auto.checked = now.auto;
      this.slider.value = `${Math.round(SLIDER * share(now.budget_bytes))}`;
      this.label(now.budget_bytes);
    }
    this.placeMarks([share(now.token_cycle_bytes), share(this.options.all_bytes[now.bits])]);
    this.never.style.setProperty("--at", `${share(now.minimum_budget_bytes)}`);
  }

  /** Ticks where they belong, labels below them. */
  placeMarks(shares) {
    const sizes = this.marks.map(([, label]) => label.offsetWidth || 60),
      lefts = placed(shares, sizes, this.slider.clientWidth || 270);
    this.marks.forEach(([tick, label], i) => {
      tick.style.setProperty("--at", shares[i]);
      label.style.left = `${lefts[i]}px`;
    });
  }
}
