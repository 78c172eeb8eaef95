// Figures over time from snapshots, as columns for charts, sparklines and tables.
const RATE_S = 5; // tokens per second are a mean over so long
const GAP_S = 4;
export const BIN_S = 10;

// Tokens per second at an index; null where it is not known: at a start, after a restart or a gap.
export function tokenRate(items, index) {
  const now = items[index];
  let start = index;
  while (
    start > 0 &&
    now.t - items[start - 1].t <= RATE_S &&
    items[start - 1].totals.tokens <= items[start].totals.tokens
  )
    start -= 1;
  if (start === index) return null;
  return (now.totals.tokens - items[start].totals.tokens) / (now.t - items[start].t);
}

const FIGURES = {
  waiting: (snapshot) => snapshot.waiting,
  running: (snapshot) => snapshot.running,
  attainment: (snapshot) => snapshot.attainment ?? null,
  coverage: (snapshot) => snapshot.coverage ?? null,
  ttft50: (snapshot) => snapshot.recent.ttft_p50,
  ttft95: (snapshot) => snapshot.recent.ttft_p95,
  latency50: (snapshot) => snapshot.recent.latency_p50,
  latency95: (snapshot) => snapshot.recent.latency_p95,
  used: (snapshot) => snapshot.kv.used,
  reserved: (snapshot) => snapshot.kv.reserved,
  limit: (snapshot) => snapshot.kv.limit,
};

// {t, rate, waiting, ...}: lists of one length for the snapshots items[start..end]; a gap has a row of nulls.
export function columns(items, start, end) {
  const found = { t: [], rate: [] };
  for (const name of Object.keys(FIGURES)) found[name] = [];
  for (let index = Math.max(start, 0); index <= end; index += 1) {
    const snapshot = items[index];
    if (index > start && snapshot.t - items[index - 1].t > GAP_S)
      addRow(found, items[index - 1].t + 1, () => null, null);
    addRow(found, snapshot.t, (figure) => figure(snapshot), tokenRate(items, index));
  }
  return found;
}

function addRow(found, time, value, rate) {
  found.t.push(time);
  found.rate.push(rate);
  for (const [name, figure] of Object.entries(FIGURES)) found[name].push(value(figure));
}

// Answers that ended in time and late in each interval: {t: [its start], inTime, late}.
export function outcomes(items, start, end) {
  const bins = new Map();
  for (let index = Math.max(start, 1); index <= end; index += 1) {
    const { t, totals } = items[index];
    const before = items[index - 1].totals;
    const bin = Math.floor(t / BIN_S) * BIN_S;
    const sums = bins.get(bin) ?? { inTime: 0, late: 0 };
    sums.inTime += Math.max(totals.in_time - before.in_time, 0);
    sums.late += Math.max(totals.late - before.late, 0);
    bins.set(bin, sums);
  }
  const found = { t: [], inTime: [], late: [] };
  for (const [bin, sums] of bins) {
    found.t.push(bin);
    found.inTime.push(sums.inTime);
    found.late.push(sums.late);
  }
  return found;
}

// The answers that ended last, newest first.
export function lastAnswers(items, index, most) {
  const found = [];
  for (let i = index; i >= 0 && found.length < most; i -= 1) {
    for (const answer of [...items[i].ended].reverse()) found.push({ ...answer, t: items[i].t });
  }
  return found.slice(0, most);
}

// How an answer ended: "done" whole and in time, "late", "cut" before its end, or "cancelled" by its client.
export function outcomeOf({ in_time: inTime, reason, latency_s: latency, slo_s: objective }) {
  if (reason === "cancelled") return "cancelled";
  if (inTime) return "done";
  return latency > objective ? "late" : "cut";
}

// Whether its length is known: it ended by itself.
export const isWhole = ({ reason }) => reason === "stop" || reason === "stop_string";

export const MARKS = { done: "✓", late: "✕", cut: "✂", cancelled: "⊘" };

// A round number at or above a value: 1, 2 or 5 times a power of ten, in steps fine enough for an axis.
export function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(Math.max(value, 1)));
  for (const factor of [1, 1.5, 2, 3, 4, 5, 6, 8, 10]) {
    if (factor * power >= value) return factor * power;
  }
  return 10 * power;
}
