// Time travel: which moment is shown, live or past; asks the source for the recording, steps and
// plays. The views are drawn by whoever owns it, at most once per animation frame.

import { still } from "./colours.js";
import { within } from "./numbers.js";

const SWEEP = 6; // stops at a token while playing: its layers, or some of them
const STOP_MS = 70;
const STEP_MS = 600; // with reduced motion: token by token

export class Travel {
  /**
   * `source.past()` has the replay there is, or asks for it; `draw()` draws when it can, and
   * `played(on)` is told when playing begins and ends.
   */
  constructor(source, layers, draw, played) {
    this.source = source;
    this.layers = layers;
    this.draw = draw;
    this.played = played;
    this.at = this.wanted = null;
    this.timer = 0;
  }

  /** Show a moment; null keeps the token or the layer that is shown. */
  go(token, layer, { play = false } = {}) {
    if (!play) this.pause();
    const last = this.source.count() - 1,
      end = this.layers - 1,
      now = this.wanted ?? this.at ?? { token: last, layer: end };
    this.wanted = {
      token: token === null ? now.token : within(token, 0, Math.max(0, last)),
      layer: layer !== null ? within(layer, -1, end) : token === null ? now.layer : end,
    };
    if (last >= 0) this.draw();
    else this.wanted = null;
  }

  step(tokens) {
    const { token } = this.wanted ?? this.at ?? { token: this.source.count() - 1 };
    this.go(token + tokens, null);
  }

  live() {
    this.pause();
    this.at = this.wanted = null;
    this.draw();
  }

  /** The replay at the moment wanted, or null while it is not there (it has been asked for). */
  arrive() {
    const past = this.source.past(this.wanted?.token);
    if (past && this.wanted) {
      this.wanted.token = Math.min(this.wanted.token, past.recording.count - 1);
      [this.at, this.wanted] = [this.wanted, null];
    }
    return past;
  }

  toggle() {
    if (this.timer) this.pause();
    else {
      const now = this.wanted ?? this.at,
        end = this.source.count() - 1;
      if (!now || now.token >= end) this.go(0, still() ? null : -1, { play: true });
      this.tick();
    }
  }

  tick() {
    const wait = still() ? STEP_MS : STOP_MS;
    this.timer = setTimeout(() => {
      const { token, layer } = this.wanted ?? this.at ?? { token: 0, layer: -1 },
        stride = still() ? this.layers : Math.ceil(this.layers / SWEEP),
        last = this.layers - 1;
      if (layer < last) this.go(token, Math.min(last, layer + stride), { play: true });
      else if (token < this.source.count() - 1)
        this.go(token + 1, still() ? last : Math.min(last, stride - 1), { play: true });
      else return this.pause();
      return this.tick();
    }, wait);
    this.played(true);
  }

  pause() {
    clearTimeout(this.timer);
    this.timer = 0;
    this.played(false);
  }
}
