// Tokens written ahead by a draft: its bits, of the next run, and how many at a time, which the
// next draft of a running generation obeys. Both are kept in the form.

import { h, keep, markup, optionsOf } from "./element.js";
import { tierName } from "./numbers.js";

const ABOUT_BITS = "All experts at these bits, in memory beside the budget, write ahead and one pass verifies. From the next run on; its text is greedy";
const ABOUT_LENGTH = "How many tokens the draft writes at a time; acts on the next draft. auto: as long as it is sure";
const MOST_AHEAD = 7;

export class Draft {
  constructor(model, { drafts = [] }, sender) {
    this.model = model;
    this.sender = sender;
    this.noted = "";
    const numbers = Array.from({ length: MOST_AHEAD + 1 }, (_, n) => [n, n ? `${n} ahead` : "pause"]);
    this.bits = h("select", {
      name: "draft_bits", title: ABOUT_BITS,
      onchange: () => keep(model, { draft_bits: Number(this.bits.value) }),
    }, ...optionsOf([[0, "off"], ...drafts.map((bits) => [bits, tierName(bits)])]));
    this.length = h("select", {
      name: "draft_length", title: ABOUT_LENGTH, "aria-label": "Tokens drafted ahead",
      onchange: () => this.change(),
    }, ...optionsOf([["auto"], ...numbers]));
    this.node = markup`
      <div class="moe-field moe-draft">
        <label class="moe-field"><span>Draft</span>${this.bits}</label>${this.length}
      </div>`;
    this.node.hidden = !drafts.length;
    this.sync();
  }

  change() {
    const { value } = this.length,
      length = value === "auto" ? value : Number(value);
    keep(this.model, { draft_length: length });
    if (this.running) this.sender.send({ do: "draft", length, where: "draft_length" });
  }

  /** Show the form. */
  sync() {
    const { draft_bits = 0, draft_length = "auto" } = this.model.get("form");
    this.bits.value = `${draft_bits}`;
    this.length.value = `${draft_length}`;
    this.length.disabled = !draft_bits && !this.running;
  }

  /** Of the run that is shown: a length that was set elsewhere is shown too. */
  show({ running, draft, run }) {
    this.running = Boolean(running && draft);
    this.length.disabled = !Number(this.bits.value) && !this.running;
    const noted = draft?.lengths ?? [],
      state = `${run} ${noted.length}`;
    if (this.running && noted.length && state !== this.noted) this.length.value = `${noted.at(-1)[1]}`;
    this.noted = state;
  }
}
