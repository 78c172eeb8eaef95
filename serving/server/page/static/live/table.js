// The same figures as tables.
import { html } from "../html.js";
import { clock, percent, seconds, short, whole } from "./format.js";
import { BIN_S, outcomeOf } from "./series.js";

const MOST_ANSWERS = 20;
const MOST_TIMES = 18;

// columns: [name of its words, value of a row, whether a phone shows it]
function Table({ t, caption, name, columns, rows }) {
  const width = (narrow) => (narrow ? "" : "wide");
  const head = ([words, , narrow]) => html`<th scope="col" class=${width(narrow)}>${t(words)}</th>`;
  const cell =
    (row) =>
    ([, value, narrow]) =>
      html`<td class=${width(narrow)}>${value(row)}</td>`;
  return html`
    <section class="card table" aria-labelledby=${`table-${name}`}>
      <h2 id=${`table-${name}`}>${caption}</h2>
      ${
        rows.length
          ? html`
        <table aria-labelledby=${`table-${name}`} data-table=${name}>
          <thead><tr>${columns.map(head)}</tr></thead>
          <tbody>
            ${rows.map((row) => html`<tr>${columns.map(cell(row))}</tr>`)}
          </tbody>
        </table>
      `
          : html`<p class="nothing">${t("table.none")}</p>`
      }
    </section>
  `;
}

function overTime(items, index) {
  const found = [];
  let next = Infinity;
  for (let i = index; i >= 0 && found.length < MOST_TIMES; i -= 1) {
    if (items[i].t > next) continue;
    found.push({ snapshot: items[i], index: i });
    next = items[i].t - BIN_S + 0.5;
  }
  return found;
}

export function Tables({ t, snapshot, items, index, answers, rate }) {
  const running = [
    ["table.id", (row) => row.id, true],
    ["table.replica", (row) => row.replica ?? 0, false],
    ["table.prompt", (row) => whole(row.prompt), false],
    ["table.made", (row) => whole(row.made), true],
    ["table.median", (row) => whole(row.median), true],
    ["table.q10", (row) => whole(row.q10), false],
    ["table.q90", (row) => whole(row.q90), true],
    ["table.reserved", (row) => whole(row.reserved), false],
    ["table.due", (row) => seconds(row.due_s), true],
  ];
  const waiting = [
    ["table.id", (row) => row.id, true],
    ["table.waited", (row) => seconds(row.waited_s), true],
    ["table.due", (row) => seconds(row.due_s), true],
    ["table.prompt", (row) => whole(row.prompt), false],
    ["table.median", (row) => whole(row.median), true],
    ["table.q90", (row) => whole(row.q90), true],
  ];
  const ended = [
    ["table.id", (row) => row.id, true],
    ["table.ended", (row) => clock(row.t), true],
    ["table.made", (row) => whole(row.made), true],
    ["table.median", (row) => whole(row.median), true],
    ["table.q90", (row) => whole(row.q90), false],
    ["table.latency", (row) => seconds(row.latency_s), false],
    ["table.slo", (row) => seconds(row.slo_s), false],
    ["table.in_time", (row) => t(`table.outcome.${outcomeOf(row)}`), true],
  ];
  const times = [
    ["table.time", ({ snapshot: found }) => clock(found.t), true],
    ["table.rate", (found) => short(Math.round(rate(items, found.index) ?? NaN)), true],
    ["table.running", ({ snapshot: found }) => whole(found.running), true],
    ["table.waiting", ({ snapshot: found }) => whole(found.waiting), true],
    ["table.latency50", ({ snapshot: found }) => seconds(found.recent.latency_p50), false],
    ["table.latency95", ({ snapshot: found }) => seconds(found.recent.latency_p95), false],
    [
      "table.kv",
      ({ snapshot: found }) => `${short(found.kv.used)} / ${short(found.kv.reserved)} / ${short(found.kv.limit)}`,
      false,
    ],
    ["table.in_time_share", ({ snapshot: found }) => percent(found.attainment), true],
  ];
  return html`
    <${Table} t=${t} name="running" caption=${t("live.running.title")} columns=${running} rows=${snapshot.rows} />
    <${Table} t=${t} name="waiting" caption=${t("live.queue")} columns=${waiting} rows=${snapshot.queue} />
    <${Table} t=${t} name="ended" caption=${t("table.answers")} columns=${ended} rows=${answers.slice(0, MOST_ANSWERS)} />
    <${Table} t=${t} name="time" caption=${t("table.over_time")} columns=${times} rows=${overTime(items, index)} />
  `;
}
