// The cache as it was at any token and layer: the events are applied in order, and a checkpoint
// every so many rows makes the way back short. It makes frames of the same shape as live ones.

import { within } from "./numbers.js";
import { draftFigures } from "./passes.js";
import { given, KIND, KINDS, waitOf } from "./recording.js";
/** @import { Recording } from "./recording.js" */

const EVERY_ROWS = 16384;
const WINDOW = 1500; // tokens a frame carries at most, in whole strides: as a live one
const STRIDE = 250;
const RECENT = 16;
/** Marks on the map: what the token did to a cell. */
export const MARKS = { load: 1, prefetch: 2, evict: 3 };

export class Replay {
  /** @param {Recording} recording */
  constructor(recording) {
    this.recording = recording;
    const n = recording.layers * recording.experts;
    this.state = {
      row: 0, bits: new Uint8Array(n), loaded: new Int32Array(n).fill(-1),
      used: new Int32Array(n).fill(-1), uses: new Int32Array(n), landed: new Float32Array(n),
    };
    const { layer, expert, bits } = recording.start;
    bits.forEach((b, i) => (this.state.bits[layer[i] * recording.experts + expert[i]] = b));
    this.checkpoints = [structuredClone(this.state)];
  }

  /** Take in a later answer; what was worked out from rows that came anew is forgotten. */
  extend(answer) {
    const from = this.recording.take(answer);
    this.checkpoints = this.checkpoints.filter((c) => c.row <= from);
    if (this.state.row > from) this.state = structuredClone(this.checkpoints.at(-1));
  }

  /** The state after the rows before `end`. */
  seek(end) {
    if (end < this.state.row)
      this.state = structuredClone(this.checkpoints.findLast((c) => c.row <= end));
    while (this.state.row < end) {
      const next = this.checkpoints.at(-1).row + EVERY_ROWS;
      this.apply(this.state.row < next ? Math.min(end, next) : end);
      if (this.state.row === next) this.checkpoints.push(structuredClone(this.state));
    }
    return this.state;
  }

  apply(end) {
    const { events, experts } = this.recording,
      { bits, loaded, used, uses, landed } = this.state;
    const { token, layer, expert, kind, start_ms, dur_ms } = events;
    for (let i = this.state.row; i < end; i++) {
      const what = kind[i],
        c = layer[i] * experts + expert[i];
      if (what === KIND.evict) bits[c] = landed[c] = 0;
      if (what === KIND.load || what === KIND.prefetch) {
        bits[c] = events.bits[i];
        loaded[c] = token[i];
        landed[c] = start_ms[i] + dur_ms[i];
      }
      if (what === KIND.hit || what === KIND.load || what === KIND.substitute) {
        used[c] = token[i];
        uses[c] += 1;
      }
    }
    this.state.row = end;
  }

  /** When the rows before `row` had been decided, ms: what happened next was noted at once. */
  clock(row) {
    const { kind, start_ms } = this.recording.events;
    for (let i = row; i < Math.min(row + 256, this.recording.rows); i++) {
      if (kind[i] !== KIND.load && kind[i] !== KIND.prefetch) return start_ms[i];
    }
    return Infinity;
  }

  /** A frame as a live one, of the moment when `layer` of `token` had been decided. */
  frame(token, layer) {
    const { recording } = this,
      { document, count } = recording,
      end = recording.upTo(token, layer),
      { bits, loaded, used, uses, landed } = this.seek(end),
      now = this.clock(end);
    const in_flight = bits.map((b, c) => (b && landed[c] > now ? 1 : 0));
    const first = count <= WINDOW ? 0 : this.windowAt(token),
      shown = Math.min(WINDOW, count - first);
    const cut = ([name, values]) => [name, values.subarray(first, first + shown)],
      tokens = Object.fromEntries(Object.entries(recording.tokens).map(cut));
    const whole = layer === recording.layers - 1 ? token + 1 : token; // tokens that had ended
    const origins = document.origins.filter((o, i) => i === 0 || o.token <= token);
    const since = origins.at(-1).token;
    return {
      run: recording.run,
      prompt: given(document),
      error: document.error,
      causes: recording.model.causes,
      texts: recording.pieces.slice(first, first + shown),
      changes: document.marks,
      first, count: shown, tokens, origins, newest: token, past: { token, layer },
      map: { bits, in_flight, loaded, used, uses, marks: this.marks(token, end) },
      draft: document.draft ?? null, passes: document.passes ?? [],
      resident: this.resident(bits, token),
      recent: this.figures(Math.max(since, whole - RECENT), whole),
      whole: this.figures(since, whole),
      span: [Math.max(since, whole - RECENT), whole],
      sentence: document.sentence ? `${spanOf(document)}: ${document.sentence}` : "",
      change: "", of: "", guesses: {},
    };
  }

  /** The same first token for many neighbours, so that text is not built anew at each step. */
  windowAt(token) {
    const half = WINDOW / 2;
    const last = STRIDE * Math.ceil((this.recording.count - WINDOW) / STRIDE);
    return within(half * Math.floor((token - half / 2) / half), 0, last);
  }

  /** What the token had done to each cell by then. */
  marks(token, end) {
    const { events, layers, experts } = this.recording,
      marks = new Uint8Array(layers * experts);
    for (let i = this.recording.upTo(token - 1, layers); i < end; i++) {
      const mark = MARKS[KINDS[events.kind[i]]];
      if (mark) marks[events.layer[i] * experts + events.expert[i]] = mark;
    }
    return marks;
  }

  resident(bits, token) {
    const { expert_bytes, own_bytes = {} } = this.recording.model,
      budget_bytes = this.recording.tokens.budget_bytes[token];
    const held = bits.filter((b) => b > 0),
      each = (b, cell) => (b ? (own_bytes[b]?.[cell] ?? expert_bytes[b]) : 0),
      bytes = bits.reduce((sum, b, cell) => sum + each(b, cell), 0);
    return { experts: held.length, bytes, budget_bytes };
  }

  /** Running figures of the tokens from `begin` to before `end`, as the kernel works them out. */
  figures(begin, end) {
    const { tokens, model } = this.recording,
      from = Math.max(1, begin); // token 0 carries the prefill: only its KL counts
    const sum = (name) => tokens[name].subarray(from, end).reduce((a, b) => a + b, 0);
    const ratio = (over, under) => (under ? over / under : null);
    const decoded = Math.max(0, end - from),
      time = sum("total_ms"),
      hits = sum("hits"),
      asked = hits + sum("late") + sum("loads") + sum("skips") + sum("substitutes");
    const kls = tokens.kl.subarray(begin, end).filter(Number.isFinite),
      { draft, passes = [] } = this.recording.document;
    return {
      ...(draft ? draftFigures(passes, begin, end) : {}),
      tokens: Math.max(0, end - begin),
      tokens_per_s: ratio(1e3 * decoded, time + sum("measuring_ms") + sum("setup_ms")),
      engine_tokens_per_s: ratio(1e3 * decoded, time),
      hit_ratio: ratio(hits, asked),
      bytes_per_token: ratio(sum("bytes"), decoded),
      stall_share: ratio(model.causes.reduce((total, cause) => total + sum(cause), 0), time),
      kl_mean: kls.length ? kls.reduce((a, b) => a + b, 0) / kls.length : null,
    };
  }

  /** What the token had cost when this layer had been decided. */
  counts(token, layer) {
    const { events, layers } = this.recording,
      out = Object.fromEntries([...KINDS, "late", "bytes"].map((kind) => [kind, 0]));
    const end = this.recording.upTo(token, layer);
    for (let i = this.recording.upTo(token - 1, layers); i < end; i++) {
      const kind = events.kind[i];
      out[this.recording.isLate(i) ? "late" : KINDS[kind]] += 1;
      if (kind === KIND.load || kind === KIND.prefetch) out.bytes += events.bytes[i];
    }
    return out;
  }

  costliest() {
    const { tokens, count, model } = this.recording;
    return costliest(tokens, model.causes, count, Math.min(1, count - 1));
  }
}

/** Which tokens a recording's sentence is about, whatever moment is shown. */
const spanOf = ({ settings }) => (settings.at(-1).token > 1
  ? `Over the tokens from ${settings.at(-1).token} on` : "Over the whole run");

/** The token from `begin` on that waited longest: 1 leaves out the prefill. */
export function costliest(tokens, causes, count, begin) {
  let at = Math.max(0, begin);
  for (let i = at + 1; i < count; i++) {
    if (waitOf(tokens, causes, i) > waitOf(tokens, causes, at)) at = i;
  }
  return at;
}

/** A short digest of what is resident, for tests and for whoever compares two pictures (FNV-1a). */
export function digest(bits) {
  let hash = 0x811c9dc5;
  for (const b of bits) hash = Math.imul(hash ^ b, 0x01000193) >>> 0;
  return hash.toString(16).padStart(8, "0");
}
