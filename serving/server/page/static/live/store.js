// What the view shows: the stream's snapshots or a file's, at the newest moment or at a chosen one.
import { addEvents } from "./events.js";
import { Snapshots, readJsonLines } from "./snapshots.js";
import { Stream } from "./stream.js";

export const SPEEDS = [1, 4, 16];
const SLOW_FRAME_MS = 1000;
const FAST_FRAME_MS = 250;
const LARGEST_FILE = 64 * 2 ** 20; // bytes

export class Store {
  constructor() {
    this.received = new Snapshots();
    this.file = null; // {name, snapshots}
    this.at = null; // the chosen moment in seconds since 1970; null: the newest
    this.playing = false;
    this.speed = 1;
    this.connection = { kind: "connecting" };
    this.problem = null; // what was wrong with a file: words' name and values
    this.changed = () => {};
  }

  open(changed) {
    let asked = false;
    this.changed = () => {
      if (asked || document.hidden) return;
      asked = true;
      requestAnimationFrame(() => {
        asked = false;
        if (!document.hidden) changed();
      });
    };
    document.addEventListener("visibilitychange", this.changed);
    this.stream = new Stream({
      state: (connection) => this.onState(connection),
      snapshots: (found) => this.onSnapshots(found),
    });
    this.stream.start();
  }

  close() {
    clearInterval(this.ticker);
    document.removeEventListener("visibilitychange", this.changed);
    this.stream.stop();
    this.changed = () => {};
  }

  onState(connection) {
    const same = connection.kind === this.connection.kind && connection.kind === "open";
    this.connection = connection;
    if (!same) this.changed();
  }

  onSnapshots(found) {
    this.received.add(found);
    addEvents(this.received);
    if (!this.file && (this.at === null || !this.playing)) this.changed();
  }

  get shown() {
    return this.file ? this.file.snapshots : this.received;
  }

  get isLive() {
    return this.at === null && !this.file;
  }

  // {index, snapshot}; snapshot null before the first.
  moment() {
    const { items } = this.shown;
    const index = this.at === null ? items.length - 1 : this.shown.indexAt(this.at);
    return { index, snapshot: items[index] ?? null };
  }

  goLive() {
    this.file = null;
    this.at = null;
    this.pause();
  }

  goTo(time) {
    const { first, last } = this.shown;
    if (!first) return;
    this.at = Math.min(Math.max(time, first.t), last.t);
    this.changed();
  }

  play() {
    const { first, last } = this.shown;
    if (!first) return;
    if (this.at === null || this.at >= last.t) this.at = first.t;
    this.playing = true;
    this.tick();
  }

  pause() {
    clearInterval(this.ticker);
    this.playing = false;
    if (this.at === null && this.file) this.at = this.file.snapshots.first.t;
    this.changed();
  }

  // Holds the moment that is shown.
  hold() {
    const { last } = this.shown;
    if (this.at === null && last) this.at = last.t;
    this.pause();
  }

  setSpeed(speed) {
    this.speed = speed;
    if (this.playing) this.tick();
    else this.changed();
  }

  tick() {
    clearInterval(this.ticker);
    const period = this.speed === 1 ? SLOW_FRAME_MS : FAST_FRAME_MS;
    let before = performance.now();
    this.ticker = setInterval(() => {
      const now = performance.now();
      this.advance(((now - before) / 1000) * this.speed);
      before = now;
    }, period);
    this.changed();
  }

  advance(seconds) {
    this.at += seconds;
    if (this.at >= this.shown.last.t) {
      if (!this.file) return this.goLive();
      this.at = this.shown.last.t;
      return this.pause();
    }
    this.changed();
  }

  async load(file) {
    this.problem = null;
    try {
      if (file.size > LARGEST_FILE) throw { line: -1 };
      const snapshots = readJsonLines(await file.text());
      addEvents(snapshots);
      this.file = { name: file.name, snapshots };
      this.at = snapshots.first.t;
      this.pause();
    } catch (error) {
      this.problem = { name: file.name, line: error.line ?? 0 };
      this.changed();
    }
  }
}
