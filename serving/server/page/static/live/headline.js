// The policy in force, in words, and five large numbers, each with its last minutes.
import { html } from "../html.js";
import { NONE, percent, seconds, short, whole } from "./format.js";
import { Spark } from "./spark.js";

const WANTED_COVERAGE = 0.9;
const NEAR = 0.05;
const SHARES = [0.5, 1]; // what a line of a share spans
const DRIFT = 10; // percent: less is not worth a word

function Figure({ name, label, value, unit, note, state, values, range }) {
  return html`
    <li class="figure ${state ?? ""}" data-figure=${name}>
      <span class="figure-label">${label}</span>
      <span class="figure-value"><b>${value}</b>${unit && value !== NONE && html`<span class="unit"> ${unit}</span>`}</span>
      <span class="figure-note">${note ?? "\u00a0"}</span>
      <${Spark} values=${values} range=${range} />
    </li>
  `;
}

function inTimeState(share) {
  if (share === null || share === undefined) return "";
  return share >= 0.95 ? "good" : share >= 0.8 ? "warn" : "bad";
}

function coverageNote(t, coverage) {
  if (coverage === null || coverage === undefined) return t("live.coverage.none");
  if (coverage < WANTED_COVERAGE - NEAR) return t("live.coverage.low");
  if (coverage > WANTED_COVERAGE + NEAR) return t("live.coverage.high");
  return t("live.coverage.right");
}

function driftNote(t, drift) {
  if (!Number.isFinite(drift)) return null;
  const share = Math.round((Math.exp(Math.abs(drift)) - 1) * 100);
  if (share < DRIFT) return null;
  return t(drift > 0 ? "live.drift.longer" : "live.drift.shorter", { share });
}

export function Policy({ t, policy }) {
  const sentence = t(`policy.${policy}`);
  const known = sentence !== `policy.${policy}`;
  return html`
    <div class="policy">
      <span class="policy-label">${t("live.policy")}</span>
      <h1>${policy || t("live.policy.none")}</h1>
      <p>${known ? sentence : t("policy.other")}</p>
    </div>
  `;
}

function waitingNote(t, { queue }) {
  if (!queue.length) return t("live.waiting.none");
  return t("live.waiting.longest", { seconds: seconds(queue[0].waited_s) });
}

function figuresOf(t, settings, snapshot, columns) {
  const { totals, attainment, coverage, drift } = snapshot;
  const rate = columns.rate[columns.rate.length - 1];
  const most = settings.limits?.max_batch;
  return [
    {
      name: "running",
      label: t("live.running"),
      value: whole(snapshot.running),
      unit: most ? t("live.of", { count: most }) : null,
      note: t("live.running.note"),
      values: columns.running,
    },
    {
      name: "waiting",
      label: t("live.waiting"),
      value: whole(snapshot.waiting),
      note: waitingNote(t, snapshot),
      values: columns.waiting,
    },
    {
      name: "rate",
      label: t("live.rate"),
      value: rate === null ? NONE : short(Math.round(rate)),
      unit: t("live.rate.unit"),
      note: t("live.tokens.total", { count: short(totals.tokens) }),
      values: columns.rate,
    },
    {
      name: "in-time",
      label: t("live.in_time"),
      value: percent(attainment),
      unit: "%",
      state: inTimeState(attainment),
      note: t("live.in_time.note", { late: whole(totals.late), ended: whole(totals.ended) }),
      values: columns.attainment,
      range: SHARES,
    },
    {
      name: "coverage",
      label: t("live.coverage"),
      value: percent(coverage),
      unit: "%",
      note: [coverageNote(t, coverage), driftNote(t, drift)].filter(Boolean).join(" · "),
      values: columns.coverage,
      range: SHARES,
    },
  ];
}

export function Headline({ t, settings, snapshot, columns }) {
  return html`
    <ul class="figures" aria-label=${t("live.figures")}>
      ${figuresOf(t, settings, snapshot, columns).map((figure) => html`<${Figure} key=${figure.name} ...${figure} />`)}
    </ul>
  `;
}
