import assert from "node:assert/strict";
import { test } from "node:test";
import { budgetInWords, placed } from "../../moelab/views/static/budget.js";
import { aboutRun, nextSort, sorted, ticked } from "../../moelab/views/static/compare.js";
import { partOf } from "../../moelab/views/static/recording.js";
import { apart, fronts, stepOf, topOf } from "../../moelab/views/static/scatter.js";
import { Sender } from "../../moelab/views/static/settings.js";
import { Travel } from "../../moelab/views/static/timeline.js";

test("a budget in bytes, of all, in experts", () => {
  const of = {
    all_experts: 16, all_bytes: { 4: 1.6e6, 5: 1.2e6 }, own_sizes: [5], all_experts_bytes: 6.4e6,
  };
  assert.equal(budgetInWords(8e5, 4, of), "800 kB · 13 % · 8 experts at 4 bit");
  assert.match(budgetInWords(6.4e6, 4, of), /all 16 experts/);
  assert.match(budgetInWords(6e5, 5, of), /· about 8 experts at mixed bits$/);
});

test("labels of ticks that would touch are pushed apart, inside the slider", () => {
  const [a, b] = placed([0.1, 0.12], [60, 60], 300);
  assert.equal(b - a, 68);
  assert.equal(placed([1], [60], 300)[0], 240);
});

/** Let time go by; timers may set others. */
function pass(mock, ms) {
  for (let at = 0; at < ms; at += 10) mock.timers.tick(10);
}

test("changes are sent one at a time, of each setting the newest", ({ mock }) => {
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1e6 });
  const sent = [],
    model = { get: () => ({ answered: sent.at(-1)?.n ?? -1 }), send: (m) => sent.push(m) };
  const sender = new Sender(model);
  for (const bits of [16, 8, 4]) sender.change({ bits });
  sender.change({ device: "disk" });
  assert.deepEqual(sent.map((m) => m.changes), [{ bits: 16 }]);
  assert.ok(!sender.settled());
  pass(mock, 1000);
  assert.deepEqual(sent.map((m) => m.changes), [{ bits: 16 }, { bits: 4 }, { device: "disk" }]);
  assert.ok(sender.settled());
});

test("an unanswered change holds the next one back for a second", ({ mock }) => {
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1e6 });
  const sent = [],
    sender = new Sender({ get: () => ({}), send: (m) => sent.push(m) });
  sender.change({ bits: 16 });
  sender.change({ bits: 8 });
  pass(mock, 900);
  assert.equal(sent.length, 1);
  pass(mock, 200);
  assert.equal(sent.length, 2);
});

test("a kernel that does not answer is noticed, and that it does again", ({ mock }) => {
  mock.timers.enable({ apis: ["setTimeout", "Date"], now: 1e6 });
  const told = [],
    now = { answered: -1 },
    sender = new Sender({ get: () => now, send: () => {} }, (on) => told.push(on));
  sender.send({ do: "stop" });
  pass(mock, 1400);
  assert.ok(!told.includes(true));
  pass(mock, 200);
  assert.equal(told.at(-1), true);
  now.answered = sender.n;
  sender.flush(); // as when an answer has come
  assert.equal(told.at(-1), false);
});

test("what cannot be sent has no kernel any more", () => {
  const told = [],
    send = () => { throw new Error("Cannot send"); };
  new Sender({ get: () => ({}), send }, (on) => told.push(on)).change({ bits: 4 });
  assert.deepEqual(told.slice(-1), ["gone"]);
});

test("a moment stays within the run, and live is the newest again", () => {
  const held = { recording: { count: 10 } },
    travel = new Travel({ count: () => 10, past: () => held }, { layers: 6 }, () => {}, () => {});
  const at = (token, layer) => {
    travel.go(token, layer);
    assert.equal(travel.arrive(), held);
    return travel.at;
  };
  assert.deepEqual(at(99, null), { token: 9, layer: 5 });
  assert.deepEqual(at(3, 2), { token: 3, layer: 2 });
  assert.deepEqual(at(null, -4), { token: 3, layer: -1 });
  travel.step(2);
  travel.arrive();
  assert.deepEqual(travel.at, { token: 5, layer: 5 });
  travel.live();
  assert.equal(travel.at, null);
});

test("a moment of an encoder-decoder is in a layer that its token runs through", () => {
  const held = { recording: { count: 10 } },
    model = { layers: 6, encoder_layers: 2 },
    travel = new Travel({ count: () => 10, past: () => held }, model, () => {}, () => {});
  const at = (token, layer) => {
    travel.go(token, layer);
    travel.arrive();
    return travel.at.layer;
  };
  assert.deepEqual([at(0, -1), at(0, 1), at(3, -1), at(3, 1), at(3, 4)], [-1, 1, 1, 1, 4]);
  assert.deepEqual([-1, 1, 2, 5].map((l) => partOf(3, l, model)), [0, 0, 1 / 5, 4 / 5]);
  assert.deepEqual([-1, 1, 5].map((l) => partOf(0, l, model)), [0, 2 / 7, 6 / 7]);
});

test("runs are sorted by a column, then the other way, then as they were saved", () => {
  const runs = [{ kl: 2 }, { kl: null }, { kl: 1 }],
    by = (sort) => sorted(runs, sort).map(({ kl }) => kl);
  let sort = nextSort(["", 1], "kl");
  assert.deepEqual(by(sort), [1, 2, null]);
  sort = nextSort(sort, "kl");
  assert.deepEqual(by(sort), [2, 1, null]);
  assert.deepEqual(by(nextSort(sort, "kl")), [2, null, 1]);
});

test("two runs are ticked at most", () => {
  assert.deepEqual(["a", "b", "c", "b"].reduce(ticked, []), ["c"]);
});

test("a run says what its name does not", () => {
  const run = { name: "lru, disk", settings: "lru", tokens: 5, prompt: "Once" };
  assert.equal(aboutRun(run), '5 tokens of "Once"');
  assert.equal(aboutRun({ ...run, name: "mine" }), 'lru · 5 tokens of "Once"');
  const settings = "hobbit → hobbit + evict lfu, 25 %";
  assert.match(aboutRun({ ...run, name: settings, settings }), /^hobbit → hobbit \+ evict lfu, 25 % · 5/);
});

test("the plane's axes hold every run, and KL has four steps", () => {
  assert.equal(topOf([{ peak: 3e6 }, { peak: null }], "peak"), 4e6);
  assert.deepEqual([null, 0.005, 0.05, 3].map((x) => stepOf(x).bits), [16, 8, 4, 2]);
});

test("numbers of runs beside each other are never printed over each other", () => {
  const lows = apart([{ x: 9, y: 30 }, { x: 12, y: 18 }, { x: 60, y: 19 }]).map(({ low }) => low);
  assert.deepEqual(lows, [18, 19, 30]);
  const same = apart([1, 2, 3].map(() => ({ x: 9, y: 30 }))).map(({ low }) => low);
  assert.deepEqual(same, [30, 42, 54]);
});

test("runs no other beats make a line for each device", { skip: !Object.groupBy }, () => {
  const run = (device, peak, best) => ({ device, peak, best, timing: "measured" });
  const lines = fronts([run("a", 2, true), run("b", 1, true), run("a", 1, true), run("a", 3, false)]);
  assert.deepEqual(lines.map((line) => line.map(({ peak }) => peak)), [[1, 2], [1]].toReversed());
});
