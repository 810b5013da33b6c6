// What became of each expert a token asked for, read off the events: the same account as
// `Recording.blame` gives in Python.

import { bytes, millis, shortTier, tierName } from "./numbers.js";
import { passOf } from "./passes.js";
import { KIND } from "./recording.js";
/** @import { Recording } from "./recording.js" */

/**
 * What became of one expert that a layer's router chose: `kind` is the worst of what happened,
 * `from` where the copy served came from; `bits` were served (0: not known), `asked` asked for and
 * `bytes` read on demand, after a `wait` in ms; expert `by` stood in, or `instead` was wanted.
 * @typedef {{ layer: number, expert: number, weight: number, kind: string, from?: string,
 *   bits: number, asked: number, bytes: number, wait: number, by?: number, instead?: number
 * }} Outcome
 */

/**
 * For each layer, what became of the router's choices (of a prompt's last position). The events of
 * a verified pass are its first token's, and so is all waiting in it.
 * @param {Recording} recording
 * @param {number} token
 * @returns {{ chips: Outcome[], wait: number }[]}
 */
export function outcomes(recording, token) {
  const { layers, gates, events } = recording,
    served = Array.from({ length: layers }, () => ({ by: new Map(), stands: [], wait: 0 }));
  const first = passOf(recording.document.passes, token)?.token ?? token,
    end = recording.upTo(first, layers);
  for (let i = recording.upTo(first - 1, layers); i < end; i++) {
    const kind = events.kind[i];
    if (kind === KIND.stall && first < token) continue;
    if (events.at[i] < 0 || kind === KIND.prefetch || kind === KIND.evict) continue;
    const layer = served[events.at[i]],
      expert = events.expert[i];
    if (kind === KIND.stall) layer.wait += events.dur_ms[i]; // for any expert: one that leaves too
    if (events.layer[i] !== events.at[i]) continue;
    if (kind === KIND.substitute) {
      layer.stands.push(i);
      continue;
    }
    const row = layer.by.get(expert) ?? { wait: 0, row: i };
    layer.by.set(expert, row);
    if (kind === KIND.stall) {
      if (recording.cause(i) === "evict") continue;
      row.wait += events.dur_ms[i];
    } else if (kind === KIND.downgrade) row.lower = true;
    else Object.assign(row, { row: i, kind });
  }
  const { K } = gates;
  return served.map((layer, l) => {
    const from = (token * layers + l) * K,
      chosen = [...gates.expert.subarray(from, from + K)],
      wanted = gates.wanted ? [...gates.wanted.subarray(from, from + K)] : chosen,
      missed = wanted.filter((e) => e >= 0 && !chosen.includes(e)),
      list = [];
    chosen.forEach((expert, k) => {
      if (expert >= 0) list.push({ layer: l, expert, weight: gates.weight[from + k] });
    });
    for (const chip of list) finish(chip, layer, recording, wanted, missed);
    return { chips: list, wait: layer.wait };
  });
}

const BY_GUESS = { prefetched: "prefetch", "prefetch late": "late" };
const FROM = { [KIND.load]: "load", [KIND.skip]: "skip", [KIND.substitute]: "substitute" };

/** Fill in one chip: what was served, from where, at how many bits. */
function finish(chip, layer, recording, wanted, missed) {
  const { events } = recording,
    row = layer.by.get(chip.expert);
  const stand = row?.kind === undefined ? layer.stands.shift() : undefined,
    i = stand ?? row?.row;
  Object.assign(chip, { wait: row?.wait ?? 0, kind: "hit", bits: 0, asked: 0, bytes: 0 });
  if (i === undefined) return;
  Object.assign(chip, { bits: events.bits[i], asked: events.bits_asked[i] });
  chip.from = FROM[events.kind[i]] ?? BY_GUESS[recording.cause(i)] ?? "hit";
  if (chip.from === "load") chip.bytes = events.bytes[i];
  chip.kind = row?.lower && chip.from !== "skip" ? "downgrade" : chip.from;
  if (stand !== undefined) chip.by = events.expert[stand];
  if (!wanted.includes(chip.expert)) {
    chip.kind = "substitute";
    chip.instead = missed.shift();
  }
}

/** A kind as a word: "prefetched". @param {string} kind */
export const wordOf = (kind) =>
  ({ prefetch: "prefetched", skip: "skipped", substitute: "substituted" })[kind] ?? kind;

/** An outcome in words: "load, 16 bit". @param {Outcome} chip */
export function inWords(chip) {
  const words = [wordOf(chip.kind)];
  if (chip.kind === "downgrade")
    words.push(`${wordOf(chip.from)} at ${shortTier(chip.bits)} of ${tierName(chip.asked)}`);
  else if (chip.bits) words.push(tierName(chip.bits));
  if (chip.by !== undefined) words.push(`expert ${chip.by} stood in`);
  if (chip.instead !== undefined) words.push(`the router wanted expert ${chip.instead}`);
  if (chip.bytes) words.push(`${bytes(chip.bytes)} read`);
  if (chip.wait >= 0.005) words.push(`waited ${millis(chip.wait)}`);
  return words;
}

/** As much of an outcome as fits into a chip. @param {Outcome} chip */
export function brief({ kind, bits, asked, by, instead }) {
  if (kind === "skip") return "skipped";
  if (kind === "downgrade") return `${shortTier(bits)} of ${tierName(asked)}`;
  if (by !== undefined) return `by ${by}, ${tierName(bits)}`;
  if (instead !== undefined) return `for ${instead}, ${tierName(bits)}`;
  return bits ? `${wordOf(kind)} ${tierName(bits)}` : wordOf(kind); // a free expert has none
}
