// A recorded run as typed arrays: read from an exported page (base64) or from the kernel's answers
// (buffers), which may bring later rows of events piece by piece.

export const KINDS = ["hit", "load", "prefetch", "downgrade", "skip", "substitute", "evict", "stall"];
/** The code of each kind in the events. */
export const KIND = Object.fromEntries(KINDS.map((kind, code) => [kind, code]));
const EVENTS = {
  token: Int32Array, at: Int16Array, layer: Int16Array, expert: Int16Array, kind: Uint8Array,
  bits_asked: Uint8Array, bits: Uint8Array, bytes: Int32Array, start_ms: Float32Array,
  dur_ms: Float32Array, cause: Uint8Array,
};
const START = { layer: Int16Array, expert: Int16Array, bits: Uint8Array };
const GATES = { expert: Int16Array, weight: Float32Array, wanted: Int16Array };

/** A typed array from whatever a host makes of bytes (DataView, Uint8Array or ArrayBuffer). */
export function array(Type, raw) {
  const view = ArrayBuffer.isView(raw) ? raw : new Uint8Array(raw ?? 0);
  return new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

/** Bytes from base64. @param {string} base64 */
export const unpack = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

/** A column as a typed array: base64, bytes or a plain list. */
function column(Type, raw) {
  if (raw === null || raw === undefined) return null;
  if (Array.isArray(raw)) return Type.from(raw);
  return array(Type, typeof raw === "string" ? unpack(raw) : raw);
}

/** @returns {Record<string, any>} */
const columns = (types, raw) =>
  Object.fromEntries(Object.entries(types).map(([name, Type]) => [name, column(Type, raw[name])]));

/** Parts of a token's time that older recordings do not have: they are nothing there. */
const LATER = ["deciding_ms", "measuring_ms", "setup_ms"];

/**
 * The figures of tokens by their columns' names.
 * @param {string[]} names
 * @param {Float32Array} values [C, T], a row for each name
 * @returns {Record<string, Float32Array>}
 */
export function byName(names, values) {
  const count = values.length / names.length,
    /** @type {Record<string, Float32Array>} */
    tokens = Object.fromEntries(LATER.map((name) => [name, new Float32Array(count)]));
  names.forEach((name, c) => (tokens[name] = values.subarray(c * count, (c + 1) * count)));
  return tokens;
}

/** Put what came as buffers where their keys say. */
export function withBuffers(answer, buffers = []) {
  (answer.buffers ?? []).forEach((path, i) => {
    const last = path.at(-1),
      owner = path.slice(0, -1).reduce((node, key) => (node[key] ??= {}), answer);
    owner[last] = buffers[i];
  });
  return answer;
}

export class Recording {
  /** @param {any} answer a recording's document */
  constructor(answer) {
    this.events = columns(EVENTS, Object.fromEntries(Object.keys(EVENTS).map((k) => [k, []])));
    this.rows = 0;
    this.take(answer);
  }

  /** Take a document, or a later answer whose events begin at row `from`. Returns that row. */
  take(answer) {
    const { model, events } = answer,
      from = answer.from ?? 0;
    this.document = answer;
    this.model = model;
    this.run = answer.run ?? 0;
    this.layers = model.layers;
    this.experts = model.experts;
    this.pieces = answer.pieces;
    this.count = this.pieces.length;
    this.tokens = byName(answer.columns, column(Float32Array, answer.values));
    this.start = columns(START, answer.start);
    /** @type {Record<string, any>} */
    this.gates = { K: answer.gates.K, ...columns(GATES, answer.gates) };
    this.causes = events.causes;
    const fresh = columns(EVENTS, events),
      rows = from + fresh.token.length;
    for (const [name, Type] of Object.entries(EVENTS)) {
      if (this.events[name].length < rows) {
        const wider = new Type(Math.max(rows, 2 * this.events[name].length, 1024));
        wider.set(this.events[name]);
        this.events[name] = wider;
      }
      this.events[name].set(fresh[name], from);
    }
    this.rows = rows;
    for (const part of ["events", "start", "gates", "values"]) delete answer[part]; // decoded
    return from;
  }

  /** How many rows belong to (token, layer) or to what came before. */
  upTo(token, layer) {
    const { token: tokens, at } = this.events;
    let low = 0,
      high = this.rows;
    while (low < high) {
      const i = (low + high) >> 1;
      if (tokens[i] < token || (tokens[i] === token && at[i] <= layer)) low = i + 1;
      else high = i;
    }
    return low;
  }

  cause(row) {
    return this.causes[this.events.cause[row]];
  }

  /** Whether a row is a right guess whose bytes were still on their way. */
  isLate(row) {
    return this.events.kind[row] === KIND.hit && this.cause(row) === "prefetch late";
  }

  /** The settings in force at a token. */
  settings(token) {
    return this.document.settings.filter((s) => s.token <= token).at(-1);
  }
}

/** The prompt before a text: on a line of its own before an answer, and before what is made of it. */
export const given = ({ prompt, messages, model }) =>
  messages.length || model.encoder_layers ? `${prompt}\n` : prompt;

/**
 * The first layer that a token runs through: an encoder's are a prompt's alone, which is token 0's.
 * @param {number} token @param {{ encoder_layers?: number }} model
 */
export const beginOf = (token, { encoder_layers = 0 }) => (token > 0 ? encoder_layers : 0);

/**
 * How much of a token is over once a layer has been decided, counted in its layers: 0 to below 1.
 * @param {number} token @param {number} layer @param {{ layers: number, encoder_layers?: number }} model
 */
export function partOf(token, layer, model) {
  const begin = beginOf(token, model);
  return Math.max(0, layer + 1 - begin) / (model.layers + 1 - begin);
}

/** Waiting of token i, all causes together, ms. */
export const waitOf = (tokens, causes, i) =>
  causes.reduce((total, cause) => total + tokens[cause][i], 0);
