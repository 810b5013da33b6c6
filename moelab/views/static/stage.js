// The views that draw a frame, live or past, and what ties them together: one cursor, one moment,
// one chosen expert. The dashboard and an exported page both stand on it.

import { Blame } from "./blame.js";
import { LatencyBars } from "./bars.js";
import { CacheMap } from "./cache_map.js";
import { inkOf, STRONG, themeOf, TIERS } from "./colours.js";
import { h, markup, say, showBadge, voice } from "./element.js";
import { RunningFigures } from "./figures.js";
import { Life } from "./life.js";
import { plural } from "./numbers.js";
import { costliest, digest } from "./replay.js";
import { TokenText } from "./text.js";
import { Timeline, Travel } from "./timeline.js";
import { Cursor, Tip } from "./tip.js";

/** The element of a dashboard, and its first line. */
export const rootOf = (words, props = {}) =>
  h("div", { class: "moe-dash", role: "region", "aria-label": words, ...props });
export const modelShape = ({
  architecture, layers, encoder_layers: encoder = 0, experts, free_experts: free = 0, top_k,
}) => {
  const parts = encoder ? ` (${encoder} encoder, ${layers - encoder} decoder)` : "",
    each = `${experts - free} experts${free ? ` + ${free} of 0 bytes` : ""}`;
  return `${architecture} · ${layers} layers${parts} × ${each}, top ${top_k}`;
};
export const headOf = (...parts) =>
  markup`<header class="moe-head"><h2>moelab</h2>${parts}</header>`;

export class Stage {
  /**
   * `source` has the recording; `why` may be null; `shade(mode)` keeps how tokens are shaded;
   * `adopt(name)` puts a strategy in force, where there is a kernel to do it.
   */
  constructor(root, options, { source, why, shade, canLive, adopt = null }) {
    this.root = root;
    this.options = options;
    this.source = source;
    this.canLive = canLive;
    this.look = { theme: "", strong: false, ink: {}, tiers: {} };
    this.frame = this.live = null;
    this.queued = 0;
    this.seeks = -1;
    this.closed = false;
    this.repaint();
    const { look } = this,
      go = (token, layer = null) => this.travel.go(token, layer),
      choose = (layer, expert) => this.choose(layer, expert);
    this.tip = new Tip(root);
    const scrub = (tokens) => this.travel.at && this.travel.step(tokens);
    this.cursor = new Cursor(this.tip, { enter: go, scrub });
    this.figures = new RunningFigures(options, adopt);
    this.map = new CacheMap(look, this.tip, why, options, choose);
    this.bars = new LatencyBars(look, this.cursor, options, go);
    this.text = new TokenText(look, this.cursor, options.encoder_layers > 0, shade, go);
    this.timeline = new Timeline({
      model: options, canLive, go,
      live: () => this.travel.live(),
      play: () => this.travel.toggle(),
      costliest: () => this.goCostliest(),
    });
    this.travel = new Travel(
      source, options, () => this.queue(), (on) => this.timeline.playing(on),
    );
    const close = canLive ? () => this.leave() : null;
    this.blame = new Blame(options, this.tip, { choose, close });
    this.life = new Life(look, () => this.bars.layout(), options, {
      go, reason: (row) => source.reason(row), close: () => this.choose(null),
    });
    this.cursor.views.push(() => this.bars.draw(), () => this.text.mark(this.cursor.at));
    this.origin = h("b", { class: "moe-badge" });
    this.count = h("span", { class: "moe-soft", "aria-hidden": true });
    this.state = h("span", { class: "moe-doing", role: "status", "aria-live": "polite" });
    this.voice = voice();
    this.status = markup`
      <span class="moe-state">${[this.origin, this.count, this.state, this.voice]}</span>`;
    this.main = markup`
      <div class="moe-main">
        <div class="moe-left">${[this.map.node, this.life.node, this.bars.node]}</div>
        <div class="moe-right">${[this.text.node, this.blame.node]}</div>
      </div>`;
    root.addEventListener("keydown", (e) => {
      if (e.key === "Escape" && !e.defaultPrevented) this.leave();
    });
  }

  /** A live frame has come. */
  follow(frame) {
    if (this.live && frame.run !== this.live.run) {
      this.seeks = -1;
      this.travel.live();
      this.choose(null);
    }
    this.live = frame;
    this.source.follow(frame);
    if (!this.travel.at && !this.travel.wanted) this.show(frame);
    else this.source.past(); // what is new is asked for; the moment shown stays
    if (this.life.of) this.showLife(this.source.past());
  }

  /** Draw what is wanted at the next animation frame; a hidden tab has none. */
  queue() {
    if (this.queued || this.closed) return;
    const draw = () => {
      this.queued = 0;
      if (!this.closed) this.draw();
    };
    this.queued = document.hidden ? setTimeout(draw, 50) : requestAnimationFrame(draw);
  }

  draw() {
    const { travel } = this,
      past = travel.arrive();
    if (this.seeks >= 0 && this.source.past(this.seeks)) this.goCostliest();
    if (travel.at && past) {
      this.show(past.frame(travel.at.token, travel.at.layer));
      this.blame.show(past.recording, travel.at);
      this.showPast(past);
      this.text.show(this.frame); // last: it asks where things are
    } else if (!travel.wanted && this.live) {
      this.blame.node.hidden = true;
      this.show(this.live);
    } else if (travel.wanted) {
      const { fault } = this.source;
      say(this.state, fault ? `no recording: ${fault}` : "reading the recording");
    }
    this.showLife(past);
  }

  show(frame) {
    this.frame = this.cursor.frame = frame;
    for (const view of [this.map, this.bars, this.figures]) view.show(frame);
    const { at } = this.travel,
      count = at ? this.source.count() : frame.newest + 1,
      device = frame.origins.at(-1);
    this.timeline.show(count, at, frame.texts[frame.newest - frame.first]);
    if (!at) {
      this.timeline.tell(null, null);
      say(this.state, stateOf(frame));
      say(this.count, frame.running ? plural(frame.newest + 1, "token") : "");
    }
    const kind = device.emulated ? "emulated" : "measured";
    showBadge(this.origin, device, `${kind}: ${device.title}`);
    this.root.classList.toggle("past", Boolean(at));
    Object.assign(this.root.dataset, {
      resident: frame.resident.experts, bits: digest(frame.map.bits), past: at ? at.token : "",
      layer: at ? at.layer : "",
    });
    if (!at) this.text.show(frame);
  }

  showPast(past) {
    const { token, layer } = this.travel.at,
      counts = past.counts(token, layer),
      held = this.frame.resident.experts;
    this.timeline.tell(counts, past.recording.settings(token)?.short);
    say(this.count, "");
    say(this.state, `past: token ${token}`);
    const now = [`${held} experts resident`, plural(counts.hit, "hit"), plural(counts.load, "load")],
      said = `token ${token}, layer ${layer}: ${now.join(", ")}`;
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => say(this.voice, said), 300);
  }

  showLife(past) {
    if (this.life.of && past && this.frame) this.life.show(past.recording, this.frame);
  }

  /** Show the life of an expert; null: of none. */
  choose(layer, expert) {
    const same = this.life.of?.layer === layer && this.life.of?.expert === expert;
    this.life.choose(same ? null : layer, expert);
    this.map.choose(this.life.of ? layer * this.options.experts + expert : null);
    this.queue();
  }

  /** Of all tokens there are: what is held of a recording, or is in a frame, may be some of them. */
  goCostliest() {
    const { tokens, causes, first = 0, count = 0, newest = 0 } = this.live ?? {},
      past = this.source.past(Math.max(newest, this.seeks, 0));
    this.seeks = -1;
    if (past) return this.travel.go(past.costliest(), null);
    if (first) this.seeks = newest; // it has been asked for
    else if (count) this.travel.go(costliest(tokens, causes, count, Math.min(1, count - 1)), null);
  }

  /** One step back: the expert first, then the past. */
  leave() {
    this.seeks = -1;
    if (this.canLive && (this.travel.at || this.travel.wanted)) this.travel.live();
    else this.choose(null);
  }

  repaint() {
    const theme = themeOf(this.root);
    const { look } = this,
      strong = STRONG.matches;
    if (theme === look.theme && strong === look.strong && look.ink.ground) return;
    this.root.dataset.theme = theme; // the style sheet then has this theme's ink
    Object.assign(look, { theme, strong, ink: inkOf(this.root), tiers: TIERS[theme] });
    this.map?.relabel();
    this.bars?.relabel();
    this.text?.shade();
    this.life?.lane.draw();
  }

  close() {
    this.closed = true;
    this.travel.pause();
    clearTimeout(this.speaking);
    for (const view of [this.map, this.bars, this.text, this.life, this.source])
      view.close();
  }
}

const stateOf = ({ running, ended, run }) => (running ? "running" : ended || (run ? "ended" : "ready"));
