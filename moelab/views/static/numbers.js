// Numbers as they are written, and the round ones that axes and scales end at.

/** A dash where there was nothing to divide. @param {number | null} x @param {number} digits */
const fixed = (x, digits) => (Number.isFinite(x) ? x.toFixed(digits) : "–");
const TIER_NAMES = { 1: "ternary", 5: "mixed" };
/** A tier without its unit: "16", "mixed", "ternary". @param {number | string} bits */
export const shortTier = (bits) => TIER_NAMES[bits] ?? `${bits}`;
/** A tier in words, as moelab.scheduling.budget has them: "16 bit", "mixed bits", "ternary". */
export const tierName = (bits) =>
  `${shortTier(bits)}${{ 1: "", 5: " bits" }[bits] ?? " bit"}`;

export const percent = (x) => (x === null ? "–" : `${(100 * x).toFixed(x < 0.1 ? 1 : 0)} %`);
export const rate = (x) => fixed(x, x < 10 ? 2 : x < 100 ? 1 : 0);
export const millis = (x) => `${rate(x)} ms`;
/** A number with three digits, however large or small. */
export const short = (x) => (x === null || x === undefined ? "–" : `${+x.toPrecision(3)}`);

const UNITS = Object.entries({ GB: 1e9, MB: 1e6, kB: 1e3 });

export function bytes(x) {
  if (!Number.isFinite(x)) return "–";
  const [unit, size] = UNITS.find(([, least]) => x >= least) ?? ["B", 1],
    value = x / size;
  return `${value.toFixed(unit === "B" || value >= 100 ? 0 : value < 10 ? 2 : 1)} ${unit}`;
}

/** A KL divergence in nats. */
export function kl(x) {
  if (!Number.isFinite(x)) return "–";
  if (x >= 1e-4) return x.toFixed(x < 0.01 ? 4 : 3);
  if (x < 1e-6) return "0";
  const [digit, ten] = x.toExponential(0).split("e-");
  return `${digit}·10⁻${"⁰¹²³⁴⁵⁶⁷⁸⁹"[+ten]}`;
}

/** How a figure of a run is called and written. */
const FIGURES = {
  tokens_per_s: { title: "tokens/s", write: rate },
  acceptance: { title: "drafts accepted", write: percent },
  engine_tokens_per_s: { title: "tokens/s, engine alone", write: rate },
  hit_ratio: { title: "hit ratio", write: percent },
  byte_hit_ratio: { title: "byte hit ratio", write: percent },
  bytes_per_token: { title: "read/token", write: bytes },
  stall_share: { title: "stall share", write: percent },
  kl_mean: { title: "mean KL", write: kl },
  peak: { title: "peak MB", write: (x) => fixed(x / 1e6, 2) },
  peak_resident_bytes: { title: "peak memory", write: bytes },
  budget_bytes: { title: "budget at the end", write: bytes },
  setup_ms: { title: "set-up", write: millis },
  ttft_ms: { title: "first token", write: millis },
  tpot_ms_median: { title: "per token, median", write: millis },
  tpot_ms_p99: { title: "per token, 99 %", write: millis },
};

const plainly = (x) => (Number.isInteger(x) ? `${x}` : short(x));

export const titleOf = (key) => FIGURES[key]?.title ?? key;

/** A figure in words; what is no number stays as it is. */
export function written(key, x) {
  if (x === null || x === undefined) return "–";
  return typeof x === "number" ? (FIGURES[key]?.write ?? plainly)(x) : x;
}

/** A difference with its sign; of shares in points, as a share of a share would mislead. */
export function signed(key, x) {
  if (typeof x !== "number") return "";
  if (x === 0) return "same";
  return `${x < 0 ? "−" : "+"}${written(key, Math.abs(x)).replace("%", "points")}`;
}

const PLURALS = { prefetch: "prefetches", evict: "evictions", late: "late" };

export function plural(n, kind) {
  const one = kind === "evict" ? "eviction" : kind;
  return `${n} ${n === 1 ? one : (PLURALS[kind] ?? `${kind}s`)}`;
}

export const within = (x, low, high) => Math.max(low, Math.min(high, x));

/** The next round number at or above x: 1, 2, 5, 10, 20 … or finer steps. */
export function nice(x, steps = [1, 2, 5, 10]) {
  const ten = 10 ** Math.floor(Math.log10(x));
  return steps.map((m) => m * ten).find((m) => m >= x * 0.9999) ?? 10 * ten;
}

/** @param {ArrayLike<number>} values @param {number} q */
export function quantile(values, q) {
  const sorted = Float32Array.from(values).sort();
  return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : 0;
}

/** Where x lies between low and high on a log scale, from 0 to 1. */
export const onLogScale = (x, { low, high }) =>
  within(Math.log(Math.max(x, 1e-12) / low) / Math.log(high / low), 0, 1);
