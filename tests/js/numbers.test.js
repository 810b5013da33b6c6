import assert from "node:assert/strict";
import { test } from "node:test";
import * as n from "../../moelab/views/static/numbers.js";

test("numbers are as long as they are worth reading", () => {
  assert.deepEqual([0.5, 12.34, 123.4].map(n.rate), ["0.50", "12.3", "123"]);
  assert.deepEqual([0.034, 0.34, null].map(n.percent), ["3.4 %", "34 %", "–"]);
  assert.deepEqual([0, 999, 5310, 5.31e6, 53.1e6, 2e9].map(n.bytes), [
    "0 B", "999 B", "5.31 kB", "5.31 MB", "53.1 MB", "2.00 GB",
  ]);
  assert.equal(n.millis(3.456), "3.46 ms");
  assert.equal(n.short(1234567), "1230000");
});

test("what is not there is a dash, whatever it would have been", () => {
  for (const write of [n.rate, n.bytes, n.kl, n.short]) assert.equal(write(null), "–");
  for (const write of [n.rate, n.bytes, n.kl]) assert.equal(write(NaN), "–");
  assert.equal(n.written("hit_ratio", null), "–");
});

test("a KL keeps its magnitude", () => {
  assert.deepEqual([1.5, 0.0123, 0.0034, 5.2e-5, 9.7e-5, 3e-7].map(n.kl), [
    "1.500", "0.012", "0.0034", "5·10⁻⁵", "1·10⁻⁴", "0",
  ]);
});

test("a difference has a sign, and shares differ in points", () => {
  assert.equal(n.signed("hit_ratio", -0.026), "−2.6 points");
  assert.equal(n.signed("bytes_per_token", 211e3), "+211 kB");
  assert.equal(n.signed("tokens", 0), "same");
  assert.equal(n.signed("device", null), "");
  assert.deepEqual([7, 31.56023467422278].map((x) => n.written("another", x)), ["7", "31.6"]);
});

test("a tier is called as in Python", () => {
  assert.deepEqual([16, 5, 1].map(n.tierName), ["16 bit", "mixed bits", "ternary"]);
  assert.deepEqual([16, 5, 1].map(n.shortTier), ["16", "mixed", "ternary"]);
});

test("many of a kind", () => {
  assert.deepEqual(
    [n.plural(1, "evict"), n.plural(2, "evict"), n.plural(2, "prefetch"), n.plural(0, "hit")],
    ["1 eviction", "2 evictions", "2 prefetches", "0 hits"],
  );
});

test("axes end at round numbers", () => {
  assert.deepEqual([0.03, 1, 1.1, 7, 0.2].map((x) => n.nice(x)), [0.05, 1, 2, 10, 0.2]);
  assert.equal(n.nice(7, [1, 4, 8]), 8);
  assert.equal(n.quantile([3, 1, 2], 0.5), 2);
  assert.equal(n.quantile([], 0.5), 0);
  const ends = { low: 1e-4, high: 1 };
  assert.deepEqual([0, 1e-2, 5].map((x) => n.onLogScale(x, ends)), [0, 0.5, 1]);
});
