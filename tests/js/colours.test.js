import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { FILL, HATCHED, INK, TIERS } from "../../moelab/views/static/colours.js";

const css = readFileSync(
  new URL("../../moelab/views/static/dashboard.css", import.meta.url),
  "utf8",
);

/** The hex colours of a rule: name -> colour. */
function colours(selector) {
  const rule = css.slice(css.indexOf(`${selector} {`)).split("}")[0];
  return Object.fromEntries([...rule.matchAll(/--moe-([\w-]+): (#\w{6});/g)].map((m) => m.slice(1)));
}
const light = { "text-1": "#1f2328", ground: "#ffffff", "on-accent": "#ffffff", ...colours(".moe-dash") };
const dark = {
  ...light, "text-1": "#e6e8eb", ground: "#111111",
  ...colours('.moe-dash[data-theme="dark"]'),
};

function luminance(hex) {
  const [r, g, b] = [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255);
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
}
function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
}

for (const [theme, vars] of Object.entries({ light, dark })) {
  test(`every ink has a colour in the ${theme} theme`, () => {
    for (const [what, name] of Object.entries(INK)) assert.match(vars[name] ?? "", /^#\w{6}$/, what);
  });

  test(`words stand out from the ${theme} ground`, () => {
    for (const name of ["text-1", "soft", "measured", "emulated", "bad", "accent"])
      assert.ok(contrast(vars[name], vars.ground) >= 4.5, name);
  });

  test(`no two parts of a bar have one colour (${theme}), and a pale one is hatched`, () => {
    const parts = ["compute", "deciding", "on demand", "prefetch late", "evict"];
    assert.equal(new Set(parts.map((part) => vars[INK[part]])).size, parts.length);
    for (const part of parts)
      assert.ok(part in HATCHED || contrast(vars[INK[part]], vars.ground) >= 2.5, part);
  });

  test(`more bits stand out more (${theme}), and fill more of a cell`, () => {
    const by = (a, b) => a - b;
    const strong = [1, 2, 3, 4, 5, 8, 12, 16].map((bits) => contrast(TIERS[theme][bits], vars.ground));
    assert.deepEqual(strong, strong.toSorted(by));
    assert.deepEqual(Object.values(FILL), Object.values(FILL).toSorted(by));
  });
}

test("hatches differ where colours are near", () => {
  assert.notDeepEqual(HATCHED.deciding, HATCHED["prefetch late"]);
});
