// Where a recording comes from: the kernel, which is asked for what is new, or an exported file.

import { Recording, withBuffers } from "./recording.js";
import { Replay } from "./replay.js";

const ASK_MS = 500;
const GIVE_UP_MS = 8000;

export class KernelSource {
  /** `changed()` is called when an answer has come. */
  constructor(model, changed) {
    this.model = model;
    this.changed = changed;
    this.asked = 0;
    this.unanswered = this.running = false;
    this.waiting = new Map();
    this.held = this.frame = null;
    this.fault = "";
    this.hear = (answer, buffers) => this.heard(answer, buffers);
    model.on("msg:custom", this.hear);
  }

  /** The newest live frame: what there is to ask for. */
  follow(frame) {
    this.frame = frame;
    if (this.held && this.held.recording.run !== frame.run) this.held = null;
  }

  count() {
    return Math.max(this.held?.recording.count ?? 0, this.frame ? this.frame.newest + 1 : 0);
  }

  /** The recording, if it has this token; asks for what is missing. */
  past(token) {
    const { held, frame } = this;
    if (!frame?.run) return null;
    const here = held?.recording.run === frame.run,
      behind = !here || held.recording.count < frame.newest + 1 || (!frame.running && this.running);
    if (behind) this.ask();
    return here && (token === undefined || token < held.recording.count) ? held : null;
  }

  ask() {
    const now = Date.now(),
      wait = this.unanswered && now - this.asked < GIVE_UP_MS ? GIVE_UP_MS : ASK_MS;
    if (now - this.asked < wait) {
      this.timer ??= setTimeout(() => {
        this.timer = undefined;
        this.changed();
      }, ASK_MS);
      return;
    }
    this.asked = now;
    this.unanswered = true;
    const { run = null, rows = 0 } = this.held?.recording ?? {};
    this.model.send({ do: "recording", have: { run, events: rows } });
  }

  heard(answer, buffers) {
    if (answer.recording !== undefined) {
      this.unanswered = false;
      this.fault = answer.recording.error && !answer.recording.model ? answer.recording.error : "";
      const recording = withBuffers(answer.recording, buffers);
      if (recording.model) {
        const more = recording.from > 0 && this.held?.recording.run === recording.run;
        // An answer to another view of this widget may begin behind what is held here.
        if (recording.from > (more ? this.held.recording.rows : 0)) return;
        if (more) this.held.extend(recording);
        else this.held = new Replay(new Recording(recording));
        this.running = recording.running ?? this.frame?.running;
      }
      this.changed();
    }
    if (answer.eviction !== undefined) {
      const { run, row } = answer.eviction;
      this.waiting.get(`${run},${row}`)?.(answer.eviction);
      this.waiting.delete(`${run},${row}`);
    }
  }

  /** Why the eviction of this row was decided so. */
  reason(row) {
    const run = this.held?.recording.run ?? 0;
    return new Promise((resolve) => {
      this.waiting.set(`${run},${row}`, resolve);
      this.model.send({ do: "eviction", run, row });
    });
  }

  close() {
    clearTimeout(this.timer);
    this.model.off("msg:custom", this.hear);
    this.held = null;
    this.waiting.clear();
  }
}

export class FileSource {
  constructor(recording) {
    this.held = new Replay(recording);
    this.reasons = recording.document.evictions ?? {};
  }

  count() {
    return this.held.recording.count;
  }

  past() {
    return this.held;
  }

  reason(row) {
    const unknown = { error: "the strategy's terms were not recorded" };
    return Promise.resolve(this.reasons[row] ?? unknown);
  }
}
