// Where each running row stands: it keeps its lane from its admission to its end, so nothing jumps.
const JUMP_S = 5;
const FEWEST = 4;

export class Slots {
  constructor() {
    this.reset();
  }

  reset() {
    this.time = null;
    this.groups = new Map(); // replica -> [row id or null]
    this.rows = new Map(); // id -> row of the snapshot before
  }

  // [{replica, lanes: [{row, ended} or null]}]: a lane may show, once, how its row has ended.
  place(snapshot, lanesAtLeast) {
    const jumped = this.time === null || snapshot.t < this.time || snapshot.t - this.time > JUMP_S;
    const sameAgain = snapshot.t === this.time;
    if (sameAgain) return this.placed;
    if (jumped) this.reset();
    this.time = snapshot.t;
    const ended = new Map(snapshot.ended.map((answer) => [answer.id, answer]));
    const numbers = new Set(snapshot.replicas.map(({ number }) => number));
    for (const { replica } of snapshot.rows) numbers.add(replica ?? 0);
    if (!numbers.size) numbers.add(0);
    this.placed = [...numbers]
      .sort((a, b) => a - b)
      .map((number) => this.placeGroup(snapshot, number, ended, lanesAtLeast));
    this.rows = new Map(snapshot.rows.map((row) => [row.id, row]));
    return this.placed;
  }

  placeGroup(snapshot, number, ended, lanesAtLeast) {
    const rows = snapshot.rows.filter(({ replica }) => (replica ?? 0) === number);
    const byId = new Map(rows.map((row) => [row.id, row]));
    const before = this.groups.get(number) ?? [];
    const ids = before.map((id) => (byId.has(id) ? id : null));
    const fresh = rows.filter(({ id }) => !ids.includes(id));
    for (const { id } of fresh) {
      const free = ids.indexOf(null);
      if (free < 0) ids.push(id);
      else ids[free] = id;
    }
    while (ids.length < Math.max(lanesAtLeast, FEWEST)) ids.push(null);
    while (ids.length > Math.max(lanesAtLeast, FEWEST) && ids[ids.length - 1] === null) ids.pop();
    this.groups.set(number, ids);
    const freshIds = new Set(this.rows.size ? fresh.map(({ id }) => id) : []);
    const lanes = ids.map((id, index) => {
      if (id !== null) return { row: byId.get(id), ended: null, isNew: freshIds.has(id) };
      const left = before[index];
      const answer = ended.get(left);
      return answer && this.rows.has(left)
        ? { row: { ...this.rows.get(left), made: answer.made }, ended: answer }
        : null;
    });
    return { replica: number, lanes };
  }
}
