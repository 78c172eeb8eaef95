// What has just ended, the newest first: in time or late, and how its length was predicted.
import { html } from "../html.js";
import { seconds, whole } from "./format.js";
import { MARKS, outcomeOf } from "./series.js";

const MOST = 12;

function Answer({ t, answer, isNew }) {
  const outcome = outcomeOf(answer);
  const values = {
    id: answer.id,
    made: whole(answer.made),
    median: whole(answer.median),
    seconds: seconds(answer.latency_s),
  };
  const text = [t(`live.outcome.${outcome}`, values), t("live.ended.took", values)].join(", ");
  return html`
    <li class="answer ${outcome} ${isNew ? "new" : ""}" title=${text} data-id=${answer.id}>
      <span class="visually-hidden">${text}</span>
      <span class="answer-cells" aria-hidden="true">
        <span class="mark">${MARKS[outcome]}</span>
        <span class="lane-count"><b>${values.made}</b>${Number.isFinite(answer.median) && html`<span> / ${values.median}</span>`}</span>
        <span class="took">${t("live.seconds", values)}</span>
      </span>
    </li>
  `;
}

export function Ended({ t, snapshot, answers }) {
  const item = (answer) => html`
    <${Answer} key=${answer.id} t=${t} answer=${answer} isNew=${answer.t === snapshot.t} />
  `;
  return html`
    <section class="just-ended" aria-label=${t("live.ended")}>
      <h3>${t("live.ended")} <b>${whole(snapshot.totals.ended)}</b></h3>
      ${!answers.length && html`<p class="nothing">${t("live.ended.none")}</p>`}
      <div class="chips-window"><ul aria-label=${t("live.ended.list")}>
        ${answers.slice(0, MOST).map(item)}
      </ul></div>
    </section>
  `;
}
