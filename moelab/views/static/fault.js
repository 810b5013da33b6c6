// What was refused, in a box under the control it is about. It lies over the page: nothing moves.

class Fault {
  constructor(dismissed) {
    this.words = h("span");
    const close = () => {
      this.dismissed = this.key;
      this.node.hidden = true;
      dismissed();
    };
    const cross = { type: "button", class: "moe-close", "aria-label": "Dismiss", onclick: close };
    this.node = h(
      "div",
      { class: "moe-error", role: "alert", hidden: true },
      this.words,
      h("button", cross, "×"),
    );
  }

  /** Say it under `control`; a fault of the same `key` stays away once it is dismissed. */
  show(text, control, key) {
    Object.assign(this, { control, key });
    if (!text) this.dismissed = null;
    say(this.words, text);
    this.node.hidden = !text || key === this.dismissed;
    this.place();
  }

  place() {
    if (this.node.hidden) return;
    const root = this.node.offsetParent?.getBoundingClientRect();
    if (!root) return;
    const of = this.control.getBoundingClientRect();
    const wide = this.node.offsetWidth,
      left = Math.max(14, Math.min(of.left - root.left, root.width - wide - 14));
    const tip = of.left - root.left - left + Math.min(of.width / 2, 24);
    this.node.style.left = `${left}px`;
    this.node.style.top = `${of.bottom - root.top + 9}px`;
    this.node.style.setProperty("--tip", `${Math.max(8, Math.min(tip, wide - 16))}px`);
  }
}
