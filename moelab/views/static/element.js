// The small pieces of page that every view is built of.

/**
 * Build an element: h("div", { class: "x", onclick }, "text", child).
 * @template {keyof HTMLElementTagNameMap} K
 * @param {K} tag
 * @param {Record<string, any>} [props] attributes; false and undefined leave one out
 * @param {...(Node | string)} children
 * @returns {HTMLElementTagNameMap[K]}
 */
export const h = (tag, props = {}, ...children) =>
  filled(document.createElement(tag), props, children);

/** The same for what is drawn as SVG. */
export const svg = (tag, props = {}, ...children) =>
  filled(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

function filled(node, props, children) {
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== undefined && value !== false)
      node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/**
 * An element written as HTML: between tags a hole takes text, nodes or a list of them (null and
 * false are nothing), inside a tag it takes the value of an attribute. Text is never read as HTML.
 * @param {TemplateStringsArray} parts
 * @param {...any} holes
 * @returns {HTMLElement}
 */
export function markup(parts, ...holes) {
  const escaped = (x) => `${x}`.replace(/[&"<>\n]/g, (c) => `&#${c.charCodeAt(0)};`);
  const source = parts.reduce((text, part, i) => {
    const inTag = text.lastIndexOf("<") > text.lastIndexOf(">");
    return `${text}${inTag ? escaped(holes[i - 1]) : `<!--${i - 1}-->`}${part}`;
  });
  const template = h("template");
  const tight = source.trim().replace(/>\s*\n\s*|\s*\n\s*(?=<)/g, (x) => x[0].trim());
  template.innerHTML = tight.replace(/\s*\n\s*/g, " "); // a line's end is no space beside a tag
  const walker = document.createTreeWalker(template.content, NodeFilter.SHOW_COMMENT),
    comments = [];
  while (walker.nextNode()) comments.push(walker.currentNode);
  for (const comment of comments) {
    const given = [holes[comment.data]].flat(Infinity).filter((x) => x !== null && x !== false);
    comment.replaceWith(...given);
  }
  return /** @type {HTMLElement} */ (template.content.firstElementChild);
}

/** @param {string} words @param {Record<string, any>} props */
export const button = (words, props) => h("button", { type: "button", ...props }, words);

/** The button that puts something away. */
export const cross = (label, onclick) =>
  button("×", { class: "moe-close", "aria-label": label, onclick });

/** Choices of a drop-down: [value, words, more about it]. */
export const optionsOf = (entries) =>
  entries.map(([value, words = value, more = {}]) => h("option", { value, ...more }, `${words}`));

/** Lines that only a screen reader reads, when they change. */
export const voice = () => markup`<span class="moe-voice" role="status" aria-live="polite"></span>`;

/** What has the focus within a node, if anything. @returns {HTMLElement | null} */
export const focused = (node) => node.querySelector(":focus");

/** Write text only where it differs, so that nothing is laid out twice. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A name no other element of the page has. */
export const unique = () => `moe-${Math.random().toString(36).slice(2)}`;

/** Keep part of the form in its trait, so that it outlives a reload of the page. */
export function keep(model, changes) {
  model.set("form", { ...model.get("form"), ...changes });
  model.save_changes();
}

// What happened to an expert, as a shape in a box of 12 by 12: the same in page and canvas.
export const SHAPES = {
  hit: "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
  load: "M1 2h10L6 10.5z",
  prefetch: "M1 1.5L6 6 1 10.5zM6 1.5L11 6 6 10.5z",
  late: "M1 1.5L7 6 1 10.5zM8.4 1.5h2.4v9H8.4z",
  downgrade: "M4.4 1h3.2v5H11L6 11.4 1 6h3.4z",
  skip: "M1 4.8h10v2.4H1z",
  substitute: "M6 .8L11.2 6 6 11.2.8 6z",
  evict:
    "M2.6 1.2L6 4.6l3.4-3.4 1.4 1.4L7.4 6l3.4 3.4-1.4 1.4L6 7.4l-3.4 3.4-1.4-1.4L4.6 6 1.2 2.6z",
};

/** The shape of a kind as an element. */
export function icon(kind) {
  const node = h("i", { class: "moe-icon", "aria-hidden": true });
  shape(node, kind);
  return node;
}

/** Make an icon one of this kind. */
export function shape(node, kind) {
  if (node.dataset.kind === kind) return;
  node.dataset.kind = kind;
  node.style.clipPath = `path("${SHAPES[kind]}")`;
}

/** A key of a legend. */
export const legendKey = (swatch, words) => markup`<span class="moe-key">${swatch}${words}</span>`;

/** How far along from the lowest to the highest a value lies; all of it where they do not differ. */
export const shareOf = (value, low, high) =>
  Number.isFinite(value) && high > low ? (value - low) / (high - low) : 1;

/** A bar that is filled to a share. */
export function filledBar(share, name = "") {
  const style = `--p:${(100 * share).toFixed(1)}%`;
  return h("i", { class: `moe-bar ${name}`, "aria-hidden": true, style });
}

/** Say where times come from; measured and emulated never look alike. */
export function showBadge(node, device, words) {
  node.classList.toggle("emulated", device.emulated);
  const about = device.emulated
    ? "Loads are held back to the named device's speed, in real time. " +
      "Where this machine's disk is the slower one, times are the disk's."
    : "Loads take what this machine's disk takes.";
  node.title = `${words}. ${about}`; // where there is no room for all of the words
  say(node, words);
}

/**
 * Whether a slider is in a hand; `settle` is called when it is let go, wherever that is. A drag that
 * ends where it began has no change event.
 */
export function holdOf(slider, settle) {
  slider.addEventListener("pointerdown", (e) => slider.setPointerCapture(e.pointerId));
  slider.addEventListener("lostpointercapture", settle);
  return () => slider.matches(":active");
}
