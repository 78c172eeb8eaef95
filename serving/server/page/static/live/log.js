// What happened, newest first.
import { html } from "../html.js";
import { BAD } from "./events.js";
import { clock, seconds } from "./format.js";

export function sentence(t, { kind, values }) {
  const shown = { ...values };
  if ("seconds" in shown) shown.seconds = seconds(shown.seconds);
  const name = values.count === 1 ? `event.${kind}.one` : `event.${kind}`;
  const text = t(name, shown);
  return text === name ? t(`event.${kind}`, shown) : text;
}

const tone = ({ kind }) => (BAD.has(kind) ? "bad" : kind === "ready" ? "good" : "");

export function Log({ t, events }) {
  return html`
    <section class="card log" aria-labelledby="log-title">
      <h2 id="log-title">${t("live.events")}</h2>
      ${!events.length && html`<p class="nothing">${t("live.events.none")}</p>`}
      <ol aria-label=${t("live.events")}>
        ${events.map(
          (event) => html`
          <li key=${`${event.t}${event.kind}${event.values.number ?? ""}`} class=${tone(event)} data-event=${event.kind}>
            <time>${clock(event.t)}</time> <span>${sentence(t, event)}</span>
          </li>
        `,
        )}
      </ol>
    </section>
  `;
}
