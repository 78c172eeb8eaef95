// The kept minutes: snapshots in order of time, bounded; written to and read from files of JSON lines.
export const KEPT = 900; // snapshots: 15 minutes of one a second
const MOST_IN_A_FILE = 20_000;
const MOST_ROWS = 256;

const NO_TOTALS = {
  tokens: 0,
  ended: 0,
  in_time: 0,
  late: 0,
  cancelled: 0,
  refused: 0,
  preempted: 0,
  overran: 0,
  requeued: 0,
};
const NO_RECENT = { answers: 0, ttft_p50: null, ttft_p95: null, latency_p50: null, latency_p95: null };

const list = (value) =>
  Array.isArray(value) ? value.slice(0, MOST_ROWS).filter((item) => item && typeof item === "object") : [];
const numbers = (defaults, value) => {
  const found = { ...defaults };
  for (const name of Object.keys(defaults)) {
    if (Number.isFinite(value?.[name])) found[name] = value[name];
  }
  return found;
};

// A snapshot with every field in place, whatever came; null where it has no time.
export function complete(raw) {
  if (!raw || !Number.isFinite(raw.t)) return null;
  const queue = list(raw.queue);
  const rows = list(raw.rows);
  return {
    ...raw,
    policy: typeof raw.policy === "string" ? raw.policy : "",
    queue,
    rows,
    ended: list(raw.ended),
    waiting: Number.isFinite(raw.waiting) ? raw.waiting : queue.length,
    running: Number.isFinite(raw.running) ? raw.running : rows.length,
    totals: numbers(NO_TOTALS, raw.totals),
    kv: numbers({ used: 0, reserved: 0, limit: 0 }, raw.kv),
    recent: numbers(NO_RECENT, raw.recent),
    ...numbers({ attainment: null, coverage: null, drift: null }, raw),
    replicas: list(raw.replicas).map((replica) => ({
      ...replica,
      number: replica.number ?? 0,
      stages: list(replica.stages),
    })),
  };
}

export class Snapshots {
  constructor(limit = KEPT) {
    this.limit = limit;
    this.items = [];
  }

  get first() {
    return this.items[0] ?? null;
  }

  get last() {
    return this.items[this.items.length - 1] ?? null;
  }

  // Adds snapshots from anywhere: those of one time stand once, the oldest beyond the limit go.
  add(snapshots) {
    const found = snapshots.map(complete).filter(Boolean);
    const inOrder = found.length === 1 && (!this.last || found[0].t > this.last.t);
    if (inOrder) {
      this.items.push(found[0]);
    } else {
      const byTime = new Map();
      for (const snapshot of [...this.items, ...found]) byTime.set(snapshot.t, snapshot);
      this.items = [...byTime.values()].sort((a, b) => a.t - b.t);
    }
    this.items.splice(0, Math.max(this.items.length - this.limit, 0));
  }

  // The last one at or before a time; the first where all are later; -1 where there are none.
  indexAt(time) {
    let low = 0;
    let high = this.items.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.items[middle].t <= time) low = middle + 1;
      else high = middle;
    }
    return Math.max(low - 1, Math.min(0, this.items.length - 1));
  }

  // The index of the first of the `seconds` that end with the one at `index`.
  startOf(index, seconds) {
    const { t } = this.items[index];
    let start = index;
    while (start > 0 && t - this.items[start - 1].t <= seconds) start -= 1;
    return start;
  }

  toJsonLines() {
    return this.items.map((snapshot) => JSON.stringify(snapshot) + "\n").join("");
  }
}

// Snapshots of a file of JSON lines. Throws {line} of the first that is none, {line: 0} of an empty file.
export function readJsonLines(text) {
  const lines = text.split(/\r?\n/).filter((line) => line.trim());
  const found = [];
  lines.slice(-MOST_IN_A_FILE).forEach((line, index) => {
    let snapshot = null;
    try {
      snapshot = complete(JSON.parse(line));
    } catch {
      // said below
    }
    if (snapshot === null) throw { line: index + 1 };
    found.push(snapshot);
  });
  if (!found.length) throw { line: 0 };
  const read = new Snapshots(MOST_IN_A_FILE);
  read.add(found);
  return read;
}
