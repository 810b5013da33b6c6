// What is worked out here and in Python too is held against Python, on one run that tests/test_js.py
// has recorded: MOELAB_RECORDED names a JSON file with its document and what Python says of it.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";
import { lifeOf } from "../../moelab/views/static/lane.js";
import { inWords, outcomes } from "../../moelab/views/static/outcomes.js";
import { byName, given, Recording, waitOf, withBuffers } from "../../moelab/views/static/recording.js";
import { costliest, digest, Replay } from "../../moelab/views/static/replay.js";

const path = process.env.MOELAB_RECORDED,
  skip = path ? false : "no recorded run: run by tests/test_js.py",
  told = path ? JSON.parse(readFileSync(path, "utf8")) : {},
  opened = () => new Recording(structuredClone(told.document));

const near = (a, b, words) =>
  assert.ok(a === b || Math.abs(a - b) <= 1e-5 * Math.max(Math.abs(a), Math.abs(b)), `${words}: ${a} is not ${b}`);

test("an answer and a summary begin on a line of their own, what goes on does not", () => {
  const prompt = "What is it?",
    after = (messages, encoder_layers) => given({ prompt, messages, model: { encoder_layers } });
  assert.equal(after([], undefined), prompt);
  for (const own of [after([{ role: "user" }], 0), after([], 3)]) assert.equal(own, `${prompt}\n`);
});

test("figures of tokens are as Python's", { skip }, () => {
  const replay = new Replay(opened());
  for (const { begin, end, figures } of told.figures) {
    const mine = replay.figures(begin, end);
    assert.deepEqual(Object.keys(mine).sort(), Object.keys(figures).sort());
    for (const [key, value] of Object.entries(figures)) near(mine[key], value, `${key} ${begin}-${end}`);
  }
});

test("the cache at every moment asked for is as Python's, in any order", { skip }, () => {
  const replay = new Replay(opened());
  for (const { token, layer, map } of told.maps) {
    const { map: mine } = replay.frame(token, layer);
    for (const [name, cells] of Object.entries(map))
      assert.deepEqual([...mine[name]], cells, `${name} at token ${token}, layer ${layer}`);
  }
});

test("what became of each expert is as Python's blame", { skip }, () => {
  const recording = opened(),
    words = { prefetch: "prefetched" };
  told.blame.forEach((rows, i) => {
    const chips = outcomes(recording, i + 1).flatMap((layer) => layer.chips),
      key = ({ layer, expert }) => 1000 * layer + expert;
    chips.sort((a, b) => key(a) - key(b));
    rows.sort((a, b) => key(a) - key(b));
    assert.equal(chips.length, rows.length);
    chips.forEach((chip, k) => {
      const row = rows[k];
      assert.equal(words[chip.kind] ?? chip.kind, row.outcome, `token ${i + 1}: ${inWords(chip)}`);
      assert.deepEqual([chip.layer, chip.expert, chip.bits], [row.layer, row.expert, row.bits]);
      near(chip.wait, row.wait_ms, "wait");
    });
  });
});

test("the costliest token is the one that waited longest", { skip }, () => {
  assert.equal(new Replay(opened()).costliest(), told.costliest);
});

test("an expert's life has all its loads and evictions, and is resident between them", { skip }, () => {
  const recording = opened();
  for (const { layer, expert, loads, evictions } of told.lives) {
    const { happened, spans } = lifeOf(recording, layer, expert),
      count = (kind) => happened.filter((one) => one.kind === kind).length;
    assert.deepEqual([count("load"), count("evict")], [loads, evictions]);
    for (const { from, to } of spans) assert.ok(from < to && to <= recording.count);
  }
});

test("later answers make the same recording as one", { skip }, () => {
  const whole = structuredClone(told.document),
    replay = new Replay(opened()),
    { bits } = replay.frame(whole.pieces.length - 1, whole.model.layers - 1).map,
    before = digest(bits),
    rows = replay.recording.rows;
  assert.equal(replay.recording.count, whole.pieces.length);
  replay.extend({ ...whole, from: 0 });
  assert.equal(replay.recording.rows, rows);
  assert.equal(digest(replay.frame(whole.pieces.length - 1, whole.model.layers - 1).map.bits), before);
});

test("columns are read by their names; the time a strategy took is nothing where it was not taken", () => {
  const old = byName(["total_ms", "compute_ms"], Float32Array.of(1, 2, 3, 4)),
    now = byName(["compute_ms", "deciding_ms", "total_ms"], Float32Array.of(1, 2, 3));
  assert.deepEqual([...old.compute_ms], [3, 4]);
  assert.deepEqual([...old.deciding_ms], [0, 0]);
  assert.deepEqual([now.total_ms[0], now.deciding_ms[0]], [3, 2]);
});

test("buffers go where their paths say", () => {
  const answer = withBuffers({ buffers: [["events", "token"], ["values"]] }, ["a", "b"]);
  assert.deepEqual([answer.events.token, answer.values], ["a", "b"]);
});

test("the token that waited longest, and waiting is all causes together", () => {
  const tokens = { a: [9, 1, 4, 2], b: [0, 1, 0, 3] };
  assert.equal(waitOf(tokens, ["a", "b"], 3), 5);
  assert.equal(costliest(tokens, ["a", "b"], 4, 1), 3);
  assert.equal(costliest(tokens, ["a", "b"], 4, 0), 0);
});
