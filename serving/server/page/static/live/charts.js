// Six charts of the last minutes.
import { html } from "../html.js";
import { Chart } from "./chart.js";
import { percent, seconds, short, whole } from "./format.js";
import { BIN_S } from "./series.js";

const AIM = 0.9; // of the q90: so many answers are meant to be within
const ofHundred = (chart, value) => `${percent(value)} %`;
const latest = (values) => values[values.length - 1];

export function chartsOf(t, columns, outcomes) {
  const at = (name) => latest(columns[name]);
  const inSeconds = (value) => t("live.seconds", { seconds: seconds(value) });
  const ended = outcomes.t.map((time, index) => outcomes.inTime[index] + outcomes.late[index]);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  return [
    {
      name: "rate",
      title: t("live.chart.rate"),
      summary: t("live.chart.rate.summary", { rate: short(Math.round(at("rate") ?? NaN)) }),
      series: [{ label: t("live.rate.unit"), ink: "produced", fill: 0.18 }],
      data: [columns.t, columns.rate],
    },
    {
      name: "rows",
      title: t("live.chart.rows"),
      summary: t("live.chart.rows.summary", { running: whole(at("running")), waiting: whole(at("waiting")) }),
      series: [
        { label: t("live.waiting"), ink: "predicted", fill: 0.18 },
        { label: t("live.running"), ink: "produced" },
      ],
      data: [columns.t, columns.waiting, columns.running],
    },
    {
      name: "outcomes",
      title: t("live.chart.outcomes", { seconds: BIN_S }),
      summary: t("live.chart.outcomes.summary", {
        in_time: whole(sum(outcomes.inTime)),
        late: whole(sum(outcomes.late)),
      }),
      series: [
        {
          label: t("live.late_answers"),
          ink: "bad",
          fill: 0.9,
          bars: true,
          value: (chart, found, of, index) => (index === null ? "–" : whole(found - chart.data[2][index])),
        },
        { label: t("live.in_time_answers"), ink: "good", fill: 1, bars: true },
      ],
      data: [outcomes.t, ended, outcomes.inTime],
      most: 4,
    },
    {
      name: "latency",
      title: t("live.chart.latency"),
      summary: t("live.chart.latency.summary", {
        p50: inSeconds(at("latency50")),
        p95: inSeconds(at("latency95")),
        first: inSeconds(at("ttft50")),
      }),
      series: [
        { label: t("live.latency95"), ink: "muted", dash: [5, 4] },
        { label: t("live.latency50"), ink: "text" },
        { label: t("live.ttft95"), ink: "accent", dash: [5, 4] },
        { label: t("live.ttft50"), ink: "accent" },
      ],
      data: [columns.t, columns.latency95, columns.latency50, columns.ttft95, columns.ttft50],
    },
    {
      name: "shares",
      title: t("live.chart.shares"),
      summary: t("live.chart.shares.summary", {
        in_time: percent(at("attainment")),
        coverage: percent(at("coverage")),
      }),
      series: [
        { label: t("live.aim"), ink: "muted", dash: [3, 4], value: ofHundred },
        { label: t("live.in_time_answers"), ink: "produced", value: ofHundred },
        { label: t("live.within_q90"), ink: "predicted", value: ofHundred },
      ],
      data: [columns.t, columns.t.map(() => AIM), columns.attainment, columns.coverage],
      most: 1,
      unit: (value) => `${Math.round(value * 100)}`,
    },
    {
      name: "kv",
      title: t("live.chart.kv"),
      summary: t("live.chart.kv.summary", {
        used: short(at("used")),
        reserved: short(at("reserved")),
        limit: short(at("limit")),
      }),
      series: [
        { label: t("live.kv.limit"), ink: "muted", dash: [3, 4] },
        { label: t("live.kv.reserved"), ink: "predicted", fill: 0.16 },
        { label: t("live.kv.used"), ink: "produced", fill: 0.4 },
      ],
      data: [columns.t, columns.limit, columns.reserved, columns.used],
    },
  ];
}

export function Charts({ t, charts, range, theme, onPick }) {
  const shared = { t, range, theme, onPick };
  return html`${charts.map((chart) => html`<${Chart} key=${chart.name} ...${chart} ...${shared} />`)}`;
}
