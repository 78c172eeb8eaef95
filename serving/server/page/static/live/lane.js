// One running row: the tokens made so far, over the band that was predicted for them.
import { html } from "../html.js";
import { seconds, whole } from "./format.js";
import { MARKS, outcomeOf } from "./series.js";

const share = (tokens, axis) => Math.min(Math.max(tokens / axis, 0), 1);
const percentOf = (value) => `${(value * 100).toFixed(2)}%`;

function Band({ row, axis }) {
  if (!Number.isFinite(row.q90)) return null;
  const from = share(row.q10 ?? 0, axis);
  const to = share(row.q90, axis);
  return html`
    <span class="band" style=${{ left: percentOf(from), width: percentOf(to - from) }}></span>
    ${Number.isFinite(row.median) && html`<span class="median" style=${{ left: percentOf(share(row.median, axis)) }}></span>`}
  `;
}

function Reserved({ row, axis }) {
  if (!Number.isFinite(row.reserved)) return null;
  return html`<span class="reserved" style=${{ transform: `scaleX(${share(row.reserved - row.prompt, axis).toFixed(4)})` }}></span>`;
}

function Over({ row, axis }) {
  if (!Number.isFinite(row.q90) || row.made <= row.q90) return null;
  const from = share(row.q90, axis);
  return html`<span class="over" style=${{ left: percentOf(from), width: percentOf(share(row.made, axis) - from) }}></span>`;
}

// Beside the end of its bar; before it where the bar ends near the axis's end.
function OverLabel({ row, axis }) {
  const end = share(row.made, axis);
  const place = end < 0.85 ? { left: percentOf(end) } : { right: percentOf(1 - end) };
  return html`<span class="over-label" style=${place}>+${whole(row.made - row.q90)}</span>`;
}

// The time left as a ring that empties, and in words; late ones are marked.
export function Due({ t, row }) {
  if (!Number.isFinite(row.due_s)) return html`<span class="due"></span>`;
  const late = row.due_s < 0;
  const objective = row.age_s + row.due_s;
  const left = objective > 0 ? share(row.due_s, objective) : 0;
  const text = t(late ? "live.late_by" : "live.seconds", { seconds: seconds(Math.abs(row.due_s)) });
  return html`
    <span class="due ${late ? "late" : left < 0.25 ? "soon" : ""}">
      <span class="ring" style=${{ "--left": left.toFixed(3) }}>${late ? "!" : ""}</span><span class="due-text">${text}</span>
    </span>
  `;
}

function Outcome({ t, answer }) {
  const outcome = outcomeOf(answer);
  return html`
    <span class="due ${outcome}">
      <span class="mark">${MARKS[outcome]}</span>
      <span class="due-text">${t("live.seconds", { seconds: seconds(answer.latency_s) })}</span>
    </span>
  `;
}

function spoken(t, row, ended) {
  const values = {
    id: row.id,
    made: whole(row.made),
    median: whole(row.median),
    q90: whole(row.q90),
    seconds: seconds(Math.abs(row.due_s)),
  };
  if (ended) return t(`live.outcome.${outcomeOf(ended)}`, values);
  const parts = [t("live.lane.made", values)];
  if (Number.isFinite(row.median)) parts.push(t("live.lane.predicted", values));
  if (row.reread) parts.push(t("live.lane.reread"));
  if (Number.isFinite(row.q90) && row.made > row.q90) parts.push(t("live.lane.over"));
  if (Number.isFinite(row.due_s)) parts.push(t(row.due_s < 0 ? "live.lane.late" : "live.lane.left", values));
  return parts.join(", ");
}

export function Lane({ t, row, ended, isNew, axis }) {
  const over = Number.isFinite(row.q90) && row.made > row.q90;
  const kind = [ended ? "ended" : "", isNew ? "new" : "", over ? "overran" : "", row.due_s < 0 ? "late" : ""];
  const text = spoken(t, row, ended);
  return html`
    <li
      class="lane ${kind.filter(Boolean).join(" ")}"
      title=${text}
      data-id=${row.id}
      data-made=${row.made}
      data-q10=${row.q10}
      data-q90=${row.q90}
    >
      <span class="visually-hidden">${text}</span>
      <span class="lane-cells" aria-hidden="true">
        <span class="lane-name">${row.id}${row.adapter && html`<i>${row.adapter}</i>`}</span>
        <span class="track">
          <${Band} row=${row} axis=${axis} />
          <span class="made" style=${{ transform: `translateX(${((share(row.made, axis) - 1) * 100).toFixed(2)}%)` }}></span>
          <${Over} row=${row} axis=${axis} />
          <${Reserved} row=${row} axis=${axis} />
          ${over && html`<${OverLabel} row=${row} axis=${axis} />`}
        </span>
        <span class="lane-count">
          <b>${whole(row.made)}</b>${Number.isFinite(row.median) && html`<span> / ${whole(row.median)}</span>`}
        </span>
        ${ended ? html`<${Outcome} t=${t} answer=${ended} />` : html`<${Due} t=${t} row=${row} />`}
      </span>
    </li>
  `;
}
