// Below an answer: tokens made against those predicted, latency against the deadline, time in the queue.
import { html } from "../html.js";
import { useChat } from "./context.js";

const percent = (part, whole) => `${Math.min(100, (100 * part) / whole).toFixed(1)}%`;
const seconds = (value) => (value < 10 ? value.toFixed(1) : value.toFixed(0));

export function Report({ report }) {
  const { t } = useChat();
  return html`
    <dl class="report">
      <${Tokens} report=${report} t=${t} />
      <${Latency} report=${report} t=${t} />
      ${
        report.queue_s !== null &&
        html`<div class="measure"><dt>${t("report.queue")}</dt><dd>${t("seconds", { count: report.queue_s.toFixed(2) })}</dd></div>`
      }
      ${report.adapter && html`<div class="measure"><dt>${t("report.adapter")}</dt><dd>${report.adapter}</dd></div>`}
    </dl>
  `;
}

function Tokens({ report, t }) {
  const made = report.output_tokens;
  const predicted = report.predicted_tokens;
  if (!predicted) return html`<div class="measure"><dt>${t("report.tokens")}</dt><dd>${made}</dd></div>`;
  const { median, q90 } = predicted;
  const scale = 1.08 * Math.max(made, q90, 1);
  const numbers = t("report.predicted", { median: Math.round(median), q90: Math.round(q90) });
  return html`
    <div class="measure">
      <dt>${t("report.tokens")}</dt>
      <dd>
        <span class="bar" aria-hidden="true">
          <span class="band" style=${{ left: percent(median, scale), width: percent(q90 - median, scale) }}></span>
          <span class="fill" style=${{ width: percent(made, scale) }}></span>
          <span class="tick" style=${{ left: percent(median, scale) }}></span>
        </span>
        <strong>${made}</strong> <span class="muted">${numbers}</span>
      </dd>
    </div>
  `;
}

function Latency({ report, t }) {
  const { latency_s: latency, slo_s: deadline } = report;
  if (latency === null) return null;
  const isLate = report.in_time === false;
  const of = deadline === null ? "" : t("report.deadline", { count: Number(deadline.toPrecision(3)) });
  return html`
    <div class="measure">
      <dt>${t("report.latency")}</dt>
      <dd>
        ${
          deadline !== null &&
          html`<span class=${isLate ? "bar late" : "bar"} aria-hidden="true">
            <span class="fill" style=${{ width: percent(latency, deadline) }}></span>
          </span>`
        }
        <strong>${t("seconds", { count: seconds(latency) })}</strong> <span class="muted">${of}</span>
        ${isLate && html` <span class="late-word">${t("report.late")}</span>`}
      </dd>
    </div>
  `;
}
