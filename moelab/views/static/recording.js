// A recorded run as typed arrays: read from an exported page (base64) or from the kernel's answers
// (buffers), which may bring later rows of events piece by piece.

const KINDS = ["hit", "load", "prefetch", "downgrade", "skip", "substitute", "evict", "stall"];
const [HIT, LOAD, PREFETCH, DOWNGRADE, SKIP, SUBSTITUTE, EVICT, STALL] = KINDS.keys();
const EVENTS = {
  token: Int32Array,
  at: Int16Array,
  layer: Int16Array,
  expert: Int16Array,
  kind: Uint8Array,
  bits_asked: Uint8Array,
  bits: Uint8Array,
  bytes: Int32Array,
  start_ms: Float32Array,
  dur_ms: Float32Array,
  cause: Uint8Array,
};
const START = { layer: Int16Array, expert: Int16Array, bits: Uint8Array };
const GATES = { expert: Int16Array, weight: Float32Array, wanted: Int16Array };

/** A typed array from whatever a host makes of bytes (DataView, Uint8Array or ArrayBuffer). */
function array(Type, raw) {
  const view = ArrayBuffer.isView(raw) ? raw : new Uint8Array(raw ?? 0);
  return new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

function unpack(base64) {
  const text = atob(base64),
    out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out;
}

/** A column as a typed array: base64, bytes or a plain list. */
function column(Type, raw) {
  if (raw === null || raw === undefined) return null;
  if (Array.isArray(raw)) return Type.from(raw);
  return array(Type, typeof raw === "string" ? unpack(raw) : raw);
}

/** Put what came as buffers where their keys say. */
function withBuffers(answer, buffers = []) {
  (answer.buffers ?? []).forEach((path, i) => {
    const last = path.at(-1),
      owner = path.slice(0, -1).reduce((node, key) => (node[key] ??= {}), answer);
    owner[last] = buffers[i];
  });
  return answer;
}

class Recording {
  constructor(answer) {
    this.events = Object.fromEntries(
      Object.entries(EVENTS).map(([k, Type]) => [k, new Type(1024)]),
    );
    this.rows = 0;
    this.take(answer);
  }

  /** Take a document, or a later answer whose events begin at row `from`. Returns that row. */
  take(answer) {
    const { model, events } = answer,
      from = answer.from ?? 0;
    Object.assign(this, { document: answer, model, run: answer.run ?? 0 });
    Object.assign(this, { layers: model.layers, experts: model.experts, pieces: answer.pieces });
    this.count = this.pieces.length;
    const values = column(Float32Array, answer.values),
      each = values.length / answer.columns.length;
    this.tokens = {};
    answer.columns.forEach((name, c) => {
      this.tokens[name] = values.subarray(c * each, (c + 1) * each);
    });
    this.start = this.columns(START, answer.start);
    this.gates = { K: answer.gates.K, ...this.columns(GATES, answer.gates) };
    this.causes = events.causes;
    const fresh = this.columns(EVENTS, events),
      rows = from + fresh.token.length;
    for (const [name, Type] of Object.entries(EVENTS)) {
      if (this.events[name].length < rows) {
        const wider = new Type(Math.max(rows, 2 * this.events[name].length));
        wider.set(this.events[name]);
        this.events[name] = wider;
      }
      this.events[name].set(fresh[name], from);
    }
    this.rows = rows;
    for (const part of [answer.events, answer.start, answer.gates]) drop(part);
    answer.values = null; // decoded: nothing is kept twice
    return from;
  }

  columns(types, raw) {
    return Object.fromEntries(
      Object.entries(types).map(([name, Type]) => [name, column(Type, raw[name])]),
    );
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

  /** The settings in force at a token. */
  settings(token) {
    return this.document.settings.filter((s) => s.token <= token).at(-1);
  }
}

function drop(part) {
  for (const [name, value] of Object.entries(part)) {
    if (typeof value === "string" || ArrayBuffer.isView(value)) delete part[name];
  }
}
