import assert from "node:assert/strict";
import { test } from "node:test";
import { layoutOf, partsOf, scaleOf } from "../../moelab/views/static/bars.js";
import { chance } from "../../moelab/views/static/blame.js";
import { shareOf } from "../../moelab/views/static/element.js";
import { inSum, spentOn } from "../../moelab/views/static/figures.js";
import { describePass, draftFigures, passInWords } from "../../moelab/views/static/passes.js";
import { spread } from "../../moelab/views/static/tiles.js";
import { shadesOf, strengthOf } from "../../moelab/views/static/text.js";
import { inLayer } from "../../moelab/views/static/timeline.js";
import { describeToken } from "../../moelab/views/static/tip.js";

const frame = (count, more = {}) => ({
  count, first: 0, past: null, changes: [],
  tokens: { kl: new Float32Array(count).fill(NaN) },
  ...more,
});

test("bars are as wide as they can be, and the newest are shown", () => {
  assert.equal(layoutOf(frame(10), 644, 200).step, 12);
  const at = layoutOf(frame(1000), 644, 200);
  assert.deepEqual([at.step, at.shown, at.begin], [1.5, 400, 600]);
  assert.equal(at.base - at.top, at.tall);
});

test("where a moment is shown its bars are in the middle, within the ends", () => {
  const begin = (token) => layoutOf(frame(1000, { past: { token } }), 644, 200).begin;
  assert.deepEqual([begin(0), begin(500), begin(999)], [0, 300, 600]);
});

test("a measured KL has a lane of its own", () => {
  const kl = new Float32Array([NaN, 0.1]);
  const [without, beside] = [frame(2), frame(2, { tokens: { kl } })].map((f) => layoutOf(f, 644, 200));
  assert.deepEqual([without.lane, beside.lane], [0, 24]);
  assert.equal(without.base - beside.base, beside.lane + beside.gap);
});

test("the axis stays until bars outgrow it or are much lower", () => {
  assert.equal(scaleOf([], 0), 10);
  assert.equal(scaleOf([8, 8, 8], 0), 10);
  assert.equal(scaleOf([7, 7, 7], 10), 10);
  assert.equal(scaleOf([12, 12, 12], 10), 15);
  assert.equal(scaleOf([1, 1, 1], 10), 1.5);
});

test("deciding stands between compute and waiting, where it was taken", () => {
  const causes = ["on demand", "evict"];
  const names = (columns) => partsOf({ columns, causes }).map(([name]) => name);
  assert.deepEqual(names(["compute_ms"]), ["compute", ...causes]);
  assert.deepEqual(names(["compute_ms", "deciding_ms"]), ["compute", "deciding", ...causes]);
});

test("shades go from the cheap tokens to the dear ones", () => {
  const ends = shadesOf("cost", Float32Array.from({ length: 100 }, (_, i) => 1 + i / 10));
  assert.deepEqual([strengthOf(ends.low, ends), strengthOf(ends.high, ends)], [0, 68]);
  assert.equal(strengthOf(NaN, ends), 0);
  assert.deepEqual(shadesOf("kl", []), { low: 1e-4, high: 1 });
});

test("cells lie on whole pixels and never overlap", () => {
  const [x, w] = spread(7, 22, 13.37, 2, 1.5);
  for (let i = 0; i < 7; i++) assert.ok(Number.isInteger(Math.round(x[i] * 1.5 * 1e6) / 1e6));
  for (let i = 0; i < 6; i++) assert.ok(x[i] + w[i] < x[i + 1]);
});

test("words of layers, chances and shares", () => {
  assert.deepEqual([-1, 0, 5].map((l) => inLayer(l, 6)), ["before layer 0", "after layer 0", "all layers"]);
  assert.deepEqual([1, 2, 5].map((l) => inLayer(l, 6, 2)), ["before layer 2", "after layer 2", "all layers"]);
  assert.deepEqual([0.9999, 0.4914, 0.0003].map(chance), ["1.00", ".491", "<.001"]);
  assert.deepEqual([shareOf(3, 2, 4), shareOf(3, 3, 3), shareOf(null, 0, 1)], [0.5, 1, 1]);
});

test("what a token's time goes into adds up to what a watch shows", () => {
  const names = ["compute_ms", "deciding_ms", "on demand", "prefetch late", "evict", "measuring_ms", "setup_ms"],
    tokens = Object.fromEntries(names.map((name, i) => [name, Float32Array.of(100, i, i + 1)]));
  const sum = (told) => told.reduce((total, [, ms]) => total + ms, 0);
  assert.equal(sum(spentOn(tokens, 1, 3)), (21 + 28) / 2);
  assert.equal(sum(spentOn(tokens, 0)), 700);
  assert.deepEqual(inSum(spentOn(tokens, 1)).map((words) => words.split(" + ").length), [1, 6]);
});

test("the tip tells what a token cost, in its parts", () => {
  const one = (x) => Float32Array.of(x);
  const tokens = {
    total_ms: one(5), compute_ms: one(3), deciding_ms: one(0.5), "on demand": one(1.5),
    evict: one(0), bytes: one(2e6), hits: one(4), loads: one(2), skips: one(1), kl: one(NaN),
    prefetches: one(0), downgrades: one(0), substitutes: one(0),
    resident_bytes: one(1e6), budget_bytes: one(2e6),
  };
  const shown = { tokens, texts: ["a\n"], first: 7, causes: ["on demand", "evict"] };
  const [title, rows] = describeToken(shown, 7);
  assert.equal(title, 'token 7 "a\\n"');
  const said = Object.fromEntries(rows);
  assert.equal(said.deciding, "0.50 ms");
  assert.equal(said["waiting on demand"], "1.50 ms");
  assert.equal(said["by the watch"], "5.00 ms");
  assert.ok(!("waiting to evict" in said) && !("prefetches" in said));
  assert.equal(said.KL, "not measured");
});

const PASSES = [
  { token: 1, drafted: 4, accepted: 1, kept: 2, rejected: [" a", "\n", " b"], rejected_loads: 3, rejected_bytes: 1.2e6 },
  { token: 3, drafted: 4, accepted: 4, kept: 5, rejected: [], rejected_loads: 0, rejected_bytes: 0 },
];

test("a token of a verified pass tells what the draft had to do with it", () => {
  const told = (token) => Object.fromEntries(describePass(PASSES, token));
  assert.deepEqual(told(0), {});
  assert.deepEqual(told(1), { draft: "accepted", "its pass": "1 of 4 accepted", "for rejected tokens": "3 loads, 1.20 MB" });
  assert.equal(told(2).draft, "by the verifier");
  assert.equal(told(2)["rejected here"], " a⏎ b");
  assert.equal(told(7).draft, "by the verifier");
  assert.match(passInWords(PASSES, 1), /: 1 of 4 drafted accepted; 3 loads, 1.20 MB for rejected tokens$/);
  assert.match(passInWords(PASSES, 2), /counted with token 1$/);
  assert.equal(passInWords([], 2), "");
});

test("figures of passes are of those that began in the span", () => {
  const close = (a, b) => assert.ok(Math.abs(a - b) < 1e-9);
  const all = draftFigures(PASSES, 0, 8);
  close(all.acceptance, 5 / 8);
  close(all.tokens_per_pass, 3.5);
  close(all.rejected_bytes, 1.2e6 / 7);
  assert.deepEqual(draftFigures(PASSES, 3, 8), { acceptance: 1, tokens_per_pass: 5, rejected_bytes: 0 });
  assert.equal(draftFigures(PASSES, 8, 9).acceptance, null);
});
