// The stage, from left to right: what waits, what runs as lanes on one axis of tokens, what has just ended.
import { html, useRef } from "../html.js";
import { Ended } from "./ended.js";
import { short, whole } from "./format.js";
import { Lane } from "./lane.js";
import { Queue } from "./queue.js";
import { ReplicaLine } from "./replicas.js";
import { roundUp } from "./series.js";
import { Slots } from "./slots.js";

const FEWEST_TOKENS = 20;
const MOST_EMPTY_LANES = 12;
const COMPACT = 20; // lanes from which on they are lower
const DENSE = 40;

// The axis ends at a round number beyond every row; it shrinks only where half of it is empty.
function useAxis(rows) {
  const kept = useRef(0);
  const needed = roundUp(Math.max(FEWEST_TOKENS, ...rows.map((row) => Math.max(row.made, row.q90 ?? 0))));
  if (needed > kept.current || needed < kept.current / 2) kept.current = needed;
  return kept.current;
}

function Axis({ t, axis }) {
  const marks = [0, 0.25, 0.5, 0.75, 1];
  return html`
    <div class="axis" aria-hidden="true">
      <span class="lane-name"></span>
      <span class="axis-track">
        ${marks.map((mark) => html`<span style=${{ left: `${mark * 100}%` }}>${short(mark * axis)}</span>`)}
      </span>
      <span class="lane-count">${t("live.axis.made")}</span>
      <span class="due">${t("live.axis.left")}</span>
    </div>
  `;
}

function Legend({ t, predicts }) {
  const names = predicts ? ["made", "band", "median", "over", "reserved"] : ["made", "reserved"];
  return html`
    <ul class="legend" aria-label=${t("live.legend")}>
      ${names.map((name) => html`<li><span class="swatch ${name}" aria-hidden="true"></span>${t(`live.legend.${name}`)}</li>`)}
    </ul>
  `;
}

function FreeLane() {
  return html`
    <li class="lane free" aria-hidden="true">
      <span class="lane-cells"><span class="lane-name"></span><span class="track"></span></span>
    </li>
  `;
}

function Group({ t, group, axis, replica, several }) {
  const away = replica && replica.state !== "ready";
  return html`
    <div class="group ${away ? "away" : ""}">
      ${several && replica && html`<${ReplicaLine} t=${t} replica=${replica} />`}
      <ul class="lanes" aria-label=${several ? t("live.lanes.of", { number: group.replica }) : t("live.lanes")}>
        ${group.lanes.map((lane, index) =>
          lane
            ? html`<${Lane} key=${lane.row.id} t=${t} axis=${axis} ...${lane} />`
            : html`<${FreeLane} key=${`free${index}`} />`,
        )}
      </ul>
    </div>
  `;
}

export function Stage({ t, settings, snapshot, answers }) {
  const slots = useRef(null);
  slots.current ??= new Slots();
  const axis = useAxis(snapshot.rows);
  const rowsEach = Math.ceil((settings.limits?.max_batch ?? MOST_EMPTY_LANES) / Math.max(snapshot.replicas.length, 1));
  const atLeast = Math.min(rowsEach, MOST_EMPTY_LANES);
  const groups = slots.current.place(snapshot, atLeast);
  const lanes = groups.reduce((sum, group) => sum + group.lanes.length, 0);
  const size = lanes >= DENSE ? "dense" : lanes >= COMPACT ? "compact" : "";
  const replicas = new Map(snapshot.replicas.map((replica) => [replica.number, replica]));
  const predicts = Boolean(settings.predictor) || snapshot.rows.some((row) => Number.isFinite(row.q90));
  const more = snapshot.running - snapshot.rows.length;
  return html`
    <section class="card stage ${size}" aria-labelledby="stage-title">
      <h2 id="stage-title" class="visually-hidden">${t("live.stage")}</h2>
      <${Queue} t=${t} snapshot=${snapshot} />
      <div class="running">
        <h3>${t("live.running.title")} <b>${whole(snapshot.running)}</b></h3>
        <div class="field-of-lanes" data-axis=${axis}>
          <${Axis} t=${t} axis=${axis} />
          ${groups.map(
            (group) => html`
            <${Group}
              key=${group.replica}
              t=${t}
              group=${group}
              axis=${axis}
              replica=${replicas.get(group.replica)}
              several=${groups.length > 1}
            />
          `,
          )}
        </div>
        ${more > 0 && html`<p class="more">${t("live.more", { count: whole(more) })}</p>`}
        <${Legend} t=${t} predicts=${predicts} />
      </div>
      <${Ended} t=${t} snapshot=${snapshot} answers=${answers} />
    </section>
  `;
}
