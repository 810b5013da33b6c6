// The views that draw a frame, live or past, and what ties them together: one cursor, one moment,
// one chosen expert. The dashboard and an exported page both stand on it.

class Stage {
  /**
   * `source` has the recording; `why` may be null; `shade(mode)` keeps how tokens are shaded.
   */
  constructor(root, options, { source, why, shade, canLive }) {
    Object.assign(this, {
      root,
      options,
      source,
      why,
      canLive,
      look: {},
      frame: null,
      live: null,
      queued: 0,
    });
    this.repaint();
    this.tip = new Tip(root);
    this.cursor = new Cursor(this.tip);
    const go = (token, layer) => this.travel.go(token, layer);
    this.travel = new Travel(source, options.layers, () => this.queue());
    this.figures = new Figures();
    this.map = new CacheMap(this.look, this.tip, why, options, (l, e) => this.choose(l, e));
    this.bars = new LatencyBars(this.look, this.cursor, options, (token) => go(token, null));
    this.text = new TokenText(this.look, this.cursor, shade, (token) => go(token, null));
    this.timeline = new Timeline({
      layers: options.layers,
      ...{ canLive, go },
      live: () => this.travel.live(),
      play: () => this.travel.toggle(),
      costliest: () => this.goCostliest(),
    });
    this.travel.played = (on) => this.timeline.playing(on);
    this.blame = new Blame(options.layers, this.tip, {
      choose: (l, e) => this.choose(l, e),
      close: canLive ? () => this.leave() : null,
    });
    this.life = new Life(this.look, () => this.bars.layout(), options.layers, {
      go,
      reason: (row) => source.reason(row),
      close: () => this.choose(null),
    });
    this.cursor.scrub = (tokens) => this.travel.at && this.travel.step(tokens);
    this.cursor.enter = (token) => go(token, null);
    this.cursor.views.push(
      () => this.bars.draw(),
      () => this.text.mark(this.cursor.at),
    );
    this.origin = h("b", { class: "moe-badge" });
    this.count = h("span", { class: "moe-soft", "aria-hidden": true });
    this.state = h("span", { class: "moe-doing", role: "status", "aria-live": "polite" });
    this.voice = h("span", { class: "moe-voice", role: "status", "aria-live": "polite" });
    this.status = h(
      "span",
      { class: "moe-state" },
      this.origin,
      this.count,
      this.state,
      this.voice,
    );
    this.main = h(
      "div",
      { class: "moe-main" },
      h("div", { class: "moe-left" }, this.map.node, this.life.node, this.bars.node),
      h("div", { class: "moe-right" }, this.text.node, this.blame.node),
    );
    root.addEventListener("keydown", (e) => this.key(e));
  }

  /** A live frame has come. */
  follow(frame) {
    if (this.live && frame.run !== this.live.run) {
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
    if (travel.at && past) {
      this.show(past.frame(travel.at.token, travel.at.layer));
      this.blame.show(past.recording, travel.at);
      this.showPast(past);
      this.text.show(this.frame); // last: it asks where things are
    } else if (!travel.wanted && this.live) {
      this.blame.node.hidden = true;
      this.show(this.live);
    } else if (travel.wanted)
      say(
        this.state,
        this.source.fault ? `no recording: ${this.source.fault}` : "reading the recording",
      );
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
      say(this.count, frame.run ? plural(frame.newest + 1, "token") : "");
    }
    const kind = device.emulated ? "emulated" : "measured";
    showBadge(this.origin, device, `${kind}: ${device.title}`);
    this.root.classList.toggle("past", Boolean(at));
    Object.assign(this.root.dataset, {
      resident: frame.resident.experts,
      bits: digest(frame.map.bits),
      past: at ? at.token : "",
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
    const said = `token ${token}, layer ${layer}: ${held} experts resident, ${plural(counts.hit, "hit")}, ${plural(counts.load, "load")}`;
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

  goCostliest() {
    const past = this.source.past();
    if (past) this.travel.go(past.costliest(), null);
    else if (this.live?.count) this.travel.go(costliestOf(this.live), null);
  }

  key(event) {
    if (event.key !== "Escape" || event.defaultPrevented) return;
    this.leave();
  }

  /** One step back: the expert first, then the past. */
  leave() {
    if (this.canLive && (this.travel.at || this.travel.wanted)) this.travel.live();
    else this.choose(null);
  }

  setMode(mode) {
    this.text.setMode(mode);
  }

  repaint() {
    const theme = themeOf(this.root);
    if (theme === this.look.theme && STRONG.matches === this.look.strong) return;
    this.root.dataset.theme = theme;
    Object.assign(this.look, { theme, strong: STRONG.matches, ink: inkOf(theme), tiers: TIERS[theme] });
    this.map?.relabel();
    this.bars?.relabel();
    this.text?.shade();
    this.life?.lane.draw();
  }

  close() {
    this.closed = true;
    this.travel.pause();
    clearTimeout(this.speaking);
    for (const view of [this.map, this.bars, this.text, this.blame, this.life, this.source])
      view.close();
  }
}

function stateOf({ running, error, stopped, run }) {
  return running ? "running" : error ? "failed" : stopped ? "stopped" : run ? "finished" : "ready";
}

/** The decoded token of a live frame that waited longest. */
function costliestOf({ tokens, causes, first, count }) {
  let most = -1,
    at = 0;
  for (let i = count > 1 && first === 0 ? 1 : 0; i < count; i++) {
    const wait = causes.reduce((sum, cause) => sum + tokens[cause][i], 0);
    if (wait > most) [most, at] = [wait, i];
  }
  return first + at;
}
