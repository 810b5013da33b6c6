// The verified passes of a drafted run: which tokens a draft wrote, what it wrote in vain, and what
// was read for that. A pass is { token, drafted, accepted, kept, rejected, rejected_loads,
// rejected_bytes }, as moelab.runs.passes has it; rejected are texts, in the place of token
// `token + accepted`.

import { bytes, plural } from "./numbers.js";

/** The pass that made a token; none where there is no draft. */
export const passOf = (passes, token) =>
  (passes ?? []).find((one) => one.token <= token && token < one.token + one.kept);

const MOST_WORDS = 24; // characters of what was rejected, where there is little room
/** "3 loads, 1.20 MB"; empty where there were none. */
const inVain = ({ rejected_loads: loads, rejected_bytes: size }) =>
  loads ? `${plural(loads, "load")}, ${bytes(size)}` : "";

/** What the draft had to do with a token, as rows of name and words. */
export function describePass(passes, token) {
  const pass = passOf(passes, token);
  if (!pass) return [];
  const { token: first, accepted, drafted, rejected } = pass,
    rows = [["draft", !drafted ? "none" : token < first + accepted ? "accepted" : "by the verifier"]];
  if (rejected.length && token === first + accepted) {
    const words = onOneLine(rejected);
    rows.push(["rejected here", words.length > MOST_WORDS ? `${words.slice(0, MOST_WORDS)}…` : words]);
  }
  if (drafted) rows.push(["its pass", `${accepted} of ${drafted} accepted`]);
  if (inVain(pass)) rows.push(["for rejected tokens", inVain(pass)]);
  return rows;
}

/** The same in a sentence; a pass's loads are all with its first token. */
export function passInWords(passes, token) {
  const pass = passOf(passes, token);
  if (!pass?.drafted) return "";
  const { token: first, accepted, drafted, kept } = pass,
    by = token < first + accepted ? "Drafted and accepted" : "Written by the verifier",
    vain = inVain(pass) ? `; ${inVain(pass)} for rejected tokens` : "",
    where = vain && token > first ? `, counted with token ${first}` : "";
  return `${by}, in the pass of ${plural(kept, "token")} from ${first} on: ${accepted} of ${drafted} drafted accepted${vain}${where}`;
}

/** Rejected texts on one line. */
export const onOneLine = (rejected) => rejected.join("").replace(/\n/g, "⏎");

/** Figures of the passes that began from token `begin` to before `end`, as the kernel has them. */
export function draftFigures(passes, begin, end) {
  const some = passes.filter((one) => begin <= one.token && one.token < end),
    sum = (name) => some.reduce((total, one) => total + one[name], 0),
    ratio = (over, under) => (under ? over / under : null);
  return {
    acceptance: ratio(sum("accepted"), sum("drafted")),
    tokens_per_pass: ratio(sum("kept"), some.length),
    rejected_bytes: ratio(sum("rejected_bytes"), sum("kept")),
  };
}
