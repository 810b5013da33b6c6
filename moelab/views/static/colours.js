// What a view is drawn with: the bits' colours, and the ink, whose one home is dashboard.css.

// 5: mixed bits. Viridis, turned so that more bits stand out more from the background in both themes.
export const TIERS = {
  light: {
    16: "#482475", 12: "#414487", 8: "#355f8d", 5: "#2a788e", 4: "#21918c", 3: "#44bf70", 2: "#9bd93c",
    1: "#d2e21b",
  },
  dark: {
    16: "#fde725", 12: "#bddf26", 8: "#7ad151", 5: "#4cbd6a", 4: "#22a884", 3: "#2f86a8", 2: "#6a74cf",
    1: "#7a5bb5",
  },
};
// The second cue: how far a cell is filled.
export const FILL = { 16: 1, 12: 0.87, 8: 0.74, 5: 0.62, 4: 0.5, 3: 0.36, 2: 0.24, 1: 0.14 };

/** Which variable of the style sheet colours what; one colour per part of a token's time. */
export const INK = {
  compute: "compute", deciding: "deciding", "on demand": "load", "prefetch late": "late",
  evict: "substitute", kl: "measured", hit: "measured", load: "load", prefetch: "prefetch",
  late: "late", downgrade: "downgrade", substitute: "substitute",
  text: "text-1", soft: "soft", line: "line", cell: "fill", ground: "ground",
};

/** What a part of a bar is crossed with, the second cue beside its colour; -1: the other way. */
export const HATCHED = {
  "prefetch late": { lines: (ink) => ink.ground, way: 1 },
  deciding: { lines: () => "#1f2328", way: -1 }, // on yellow in either theme
};

/** Whether the reader asks for something; nobody does where there is no page. */
const asked = (query) => /** @type {MediaQueryList} */ (globalThis.matchMedia?.(query) ?? {});
const MOTION = asked("(prefers-reduced-motion: reduce)");
export const DARK = asked("(prefers-color-scheme: dark)");
/** Whether stronger lines are asked for: by the reader's settings or a high-contrast theme. */
export const STRONG = asked("(prefers-contrast: more), (forced-colors: active)");
export const still = () => MOTION.matches;

/** Light or dark, from the colour the widget really has; it has none before it is on the page. */
export function themeOf(root) {
  const parts = getComputedStyle(root).backgroundColor.match(/[\d.]+/g) ?? [255, 255, 255],
    [r, g, b] = parts.map(Number);
  return 0.299 * r + 0.587 * g + 0.114 * b < 128 ? "dark" : "light";
}

/** The colours in force on an element, by what they are for. */
export function inkOf(root) {
  const style = getComputedStyle(root),
    value = (name) => style.getPropertyValue(`--moe-${name}`).trim();
  return Object.fromEntries(Object.entries(INK).map(([what, name]) => [what, value(name)]));
}
