// What happened, from the differences between snapshots: replicas lost and back, preemptions, refusals, late answers.
const GAP_S = 4; // snapshots come once a second
const TOGETHER_S = 20; // the same thing again within so long is one line
const COUNTED = { requeued: "requeued", preempted: "preempted", refused: "refused", late: "late" };
export const BAD = new Set(["lost", "bounced", "late", "gap"]);

// Gives every snapshot that has none its list `events` of {t, kind, values}.
export function addEvents(snapshots) {
  const { items } = snapshots;
  items.forEach((snapshot, index) => {
    const before = items[index - 1] ?? null;
    if (snapshot.before === before?.t) return; // done already, with the same one before it
    define(snapshot, "before", before?.t);
    define(snapshot, "events", before ? differences(before, snapshot) : []);
    define(snapshot, "lostAt", lostTimes(before, snapshot));
    const again = snapshot.events.filter(({ kind }) => kind === "ready");
    for (const event of again)
      event.values.seconds = snapshot.t - (before.lostAt?.get(event.values.number) ?? snapshot.t);
  });
}

// Fields that a file does not get.
function define(snapshot, name, value) {
  Object.defineProperty(snapshot, name, { value, enumerable: false, configurable: true });
}

// When each replica that is not ready was lost.
function lostTimes(before, snapshot) {
  const times = new Map();
  for (const { number, state } of snapshot.replicas) {
    if (state !== "ready") times.set(number, before?.lostAt?.get(number) ?? snapshot.t);
  }
  return times;
}

function differences(before, after) {
  const found = [];
  const add = (kind, values = {}) => found.push({ t: after.t, kind, values });
  if (after.t - before.t > GAP_S) add("gap", { seconds: after.t - before.t });
  if (after.totals.tokens < before.totals.tokens || after.totals.ended < before.totals.ended) {
    add("restarted");
    return found;
  }
  if (after.policy !== before.policy) add("policy", { policy: after.policy });
  for (const replica of after.replicas) addReplica(add, before.replicas, replica);
  for (const [name, kind] of Object.entries(COUNTED)) {
    const count = after.totals[name] - before.totals[name];
    if (count > 0) add(kind, { count });
  }
  return found;
}

function addReplica(add, earlier, { number, state, restarts }) {
  const was = earlier.find((replica) => replica.number === number);
  if (!was) return;
  const values = { number };
  if (was.state === "ready" && state !== "ready") add("lost", values);
  if (was.state !== "ready" && state === "ready") add("ready", values);
  if (was.state === "ready" && state === "ready" && restarts > was.restarts) add("bounced", values);
}

// The last events up to an index, newest first, with like ones that follow each other counted together.
export function eventsUntil(items, index, most) {
  const found = [];
  for (let i = index; i >= 0 && found.length < most; i -= 1) {
    for (const event of [...(items[i].events ?? [])].reverse()) {
      const last = found[found.length - 1];
      const together = last?.kind === event.kind && "count" in event.values && last.t - event.t <= TOGETHER_S;
      if (together) found[found.length - 1] = { ...last, values: { count: last.values.count + event.values.count } };
      else found.push(event);
    }
  }
  return found.slice(0, most);
}
