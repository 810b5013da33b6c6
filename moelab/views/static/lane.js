// An expert's life on the time axis of the bars below it: when it came and left (above), at how
// many bits it was resident (the band), and when it was used (below).

import { fillBox, fillWords, Sheet, stamp } from "./canvas.js";
import { FILL } from "./colours.js";
import { tierName, within } from "./numbers.js";
import { KINDS, partOf } from "./recording.js";
/** @import { Recording } from "./recording.js" */

const LANE = { marks: 10, top: 20, tall: 16, uses: 47, height: 56 };

/**
 * All that happened to one expert, and the spans in which it was resident (in tokens).
 * @param {Recording} recording
 * @param {number} layer
 * @param {number} expert
 */
export function lifeOf(recording, layer, expert) {
  const { events, rows, model, start } = recording,
    happened = [],
    spans = [];
  const when = (i) => events.token[i] + partOf(events.token[i], events.at[i], model);
  let open = null;
  start.layer.forEach((l, i) => {
    if (l === layer && start.expert[i] === expert) open = { from: 0, bits: start.bits[i] };
  });
  const before = Boolean(open);
  for (let i = 0; i < rows; i++) {
    if (events.expert[i] !== expert || events.layer[i] !== layer) continue;
    const kind = KINDS[events.kind[i]];
    if (kind === "stall") continue;
    if (kind === "downgrade") {
      const served = happened.at(-1); // the row before says from where it came
      if (served) served.lower = true;
      continue;
    }
    const one = { row: i, kind, when: when(i), token: events.token[i], at: events.at[i] };
    happened.push(Object.assign(one, { bits: events.bits[i], cause: recording.cause(i) }));
    if (kind === "evict" && open) {
      spans.push({ ...open, to: one.when });
      open = null;
    }
    if (kind === "load" || kind === "prefetch") open = { from: one.when, bits: one.bits };
  }
  if (open) spans.push({ ...open, to: recording.count });
  return { happened, spans, before };
}

export class Lane {
  /** `axis()` is the layout of the bars; `pick(event)` is called for what is clicked. */
  constructor(look, axis, pick) {
    this.look = look;
    this.axis = axis;
    this.pick = pick;
    this.chosen = this.life = null;
    this.sheet = new Sheet("", () => this.draw());
    this.sheet.box.style.height = `${LANE.height}px`;
    const canvas = this.sheet.node;
    canvas.setAttribute("aria-roledescription", "time line");
    this.sheet.on({
      click: (e) => {
        const one = this.nearest(e.offsetX, e.offsetY);
        if (one) this.choose(one);
      },
      pointermove: (e) => {
        canvas.style.cursor = this.nearest(e.offsetX, e.offsetY) ? "pointer" : "";
      },
      keydown: (e) => this.key(e),
    });
  }

  show(life, frame, expert) {
    const { chosen } = this;
    if (life !== this.life) this.chosen = life.happened.find((o) => o.row === chosen?.row) ?? null;
    this.life = life;
    this.frame = frame;
    this.expert = expert;
    this.name();
    this.draw();
  }

  name() {
    const { layer, expert } = this.expert;
    const at = this.chosen ? `: ${happening(this.chosen)}` : "",
      keys = "arrow keys move from event to event, Enter goes there";
    this.sheet.name(`Life of expert ${expert} of layer ${layer}${at}; ${keys}`);
  }

  mark(one) {
    this.chosen = one;
    this.name();
    this.draw();
  }

  choose(one) {
    this.mark(one);
    this.pick(one);
  }

  key(event) {
    const { happened } = this.life,
      at = happened.indexOf(this.chosen);
    const goal = {
      ArrowLeft: at < 0 ? this.before() : at - 1, ArrowRight: at < 0 ? this.before() + 1 : at + 1,
      Home: 0, End: happened.length - 1,
    }[event.key];
    if (event.key === "Enter" && this.chosen) this.pick(this.chosen);
    else if (goal === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    const one = happened[within(goal, 0, happened.length - 1)];
    if (one) this.mark(one);
  }

  /** The last event before the moment shown. */
  before() {
    const { newest } = this.frame;
    return this.life.happened.findLastIndex((one) => one.when < newest + 1);
  }

  x(when, axis) {
    return axis.left + (when - this.frame.first - axis.begin) * axis.step;
  }

  nearest(x, y) {
    if (!this.life) return null;
    const axis = this.axis(),
      upper = y < LANE.top + LANE.tall;
    let best = null,
      reach = 9;
    for (const one of this.life.happened) {
      if (isUpper(one) !== upper) continue;
      const far = Math.abs(this.x(one.when, axis) - x);
      if (far < reach || (far === reach && one.kind === "evict")) [best, reach] = [one, far];
    }
    return best;
  }

  draw() {
    if (!this.life || !this.sheet.width) return;
    const g = this.sheet.begin(),
      axis = this.axis(),
      { ink, tiers } = this.look,
      right = axis.left + axis.shown * axis.step;
    this.drawNames(g, axis, right);
    g.save();
    g.beginPath();
    g.rect(axis.left - 5, 0, axis.width + 10, LANE.height);
    g.clip();
    for (const { from, to, bits } of this.life.spans) {
      const a = Math.max(axis.left, this.x(from, axis)),
        b = Math.min(right, this.x(to, axis)),
        tall = LANE.tall * FILL[bits];
      const wide = Math.max(1, b - a);
      if (b > a) fillBox(g, tiers[bits], a, LANE.top + LANE.tall - tall, wide, tall);
    }
    const size = Math.max(5, Math.min(10, axis.step * 1.5));
    for (const one of this.life.happened) {
      const x = this.x(one.when, axis);
      if (x < axis.left - 5 || x > right + 5) continue;
      const kind = shapeOf(one);
      g.fillStyle = kind === "evict" ? ink.text : (ink[kind] ?? ink.soft);
      stamp(g, kind, x, isUpper(one) ? LANE.marks : LANE.uses, isUpper(one) ? size : size * 0.85);
      if (kind === "load") stamp(g, one.lower ? "downgrade" : "hit", x, LANE.uses, size * 0.85);
    }
    if (this.chosen) this.drawChosen(g, this.x(this.chosen.when, axis));
    this.drawNow(g, axis);
    g.restore();
  }

  drawNames(g, axis, right) {
    const { ink } = this.look;
    fillBox(g, ink.cell, axis.left, LANE.top, Math.max(0, right - axis.left), LANE.tall);
    g.font = this.sheet.font(2);
    fillWords(g, ink.soft, "right", "in/out", axis.left - 6, LANE.marks, axis.left - 8);
    fillWords(g, ink.soft, "right", "bits", axis.left - 6, LANE.top + LANE.tall / 2);
    fillWords(g, ink.soft, "right", "used", axis.left - 6, LANE.uses);
  }

  drawChosen(g, x) {
    g.strokeStyle = this.look.ink.text;
    g.lineWidth = 1.5;
    g.beginPath();
    g.arc(x, isUpper(this.chosen) ? LANE.marks : LANE.uses, 7.5, 0, 2 * Math.PI);
    g.stroke();
  }

  /** The moment shown, where it is not the newest. */
  drawNow(g, axis) {
    const { past } = this.frame;
    if (!past) return;
    const x = this.x(past.token + partOf(past.token, past.layer, this.expert.model), axis);
    fillBox(g, this.look.ink.text, Math.round(x) - 0.5, 0, 1.5, LANE.height);
  }

  close() {
    this.sheet.close();
  }
}

const isUpper = ({ kind }) => kind === "load" || kind === "prefetch" || kind === "evict";

function shapeOf({ kind, lower, cause }) {
  if (lower && kind === "hit") return "downgrade";
  return (kind === "hit" && { prefetched: "prefetch", "prefetch late": "late" }[cause]) || kind;
}

function happening({ kind, token, at, bits, lower, cause }) {
  const where = at < 0 ? `before token ${token}` : `token ${token}, layer ${at}`;
  const known = cause && cause !== "on demand";
  if (kind === "evict") return `evicted, ${where}`;
  if (kind === "load") return `loaded at ${tierName(bits)} and used, ${where}`;
  if (kind === "prefetch") return `prefetched at ${tierName(bits)}, ${where}`;
  if (kind === "hit")
    return `${lower ? "downgrade, " : ""}hit${known ? ` (${cause})` : ""} at ${tierName(bits)}, ${where}`;
  return `${kind}, ${where}`;
}
