// What waits, the longest first: a chip as wide as its predicted answer, tinted by the time it has left.
import { html } from "../html.js";
import { seconds, whole } from "./format.js";

const MOST = 48;
const NARROW = 40; // pixels; a chip is as wide as its text at least
const WIDER = 130;
const NEW_S = 1.5;
const SOON = 0.35; // of the objective left

function slackOf(item) {
  if (!Number.isFinite(item.due_s)) return "";
  if (item.due_s < 0) return "late";
  return item.due_s < SOON * (item.waited_s + item.due_s) ? "soon" : "";
}

function Chip({ t, item, longest }) {
  const slack = slackOf(item);
  const width = NARROW + WIDER * ((item.median ?? 0) / longest);
  const values = {
    id: item.id,
    waited: seconds(item.waited_s),
    median: whole(item.median),
    seconds: seconds(Math.abs(item.due_s)),
  };
  const text = [t("live.chip", values)];
  if (Number.isFinite(item.median)) text.push(t("live.chip.predicted", values));
  if (Number.isFinite(item.due_s)) text.push(t(slack === "late" ? "live.lane.late" : "live.lane.left", values));
  return html`
    <li
      class="chip ${slack} ${item.waited_s < NEW_S ? "new" : ""}"
      style=${{ width: `${width.toFixed(0)}px` }}
      title=${text.join(", ")}
      data-id=${item.id}
    >
      <span class="visually-hidden">${text.join(", ")}</span>
      <span aria-hidden="true"><b>${slack === "late" ? "!\u2009" : ""}${item.id}</b> ${seconds(item.waited_s)}</span>
    </li>
  `;
}

export function Queue({ t, snapshot }) {
  const shown = snapshot.queue.slice(0, MOST);
  const longest = Math.max(1, ...shown.map((item) => item.median ?? 0));
  const more = snapshot.waiting - shown.length;
  return html`
    <section class="queue" aria-label=${t("live.queue")}>
      <h3>${t("live.queue")} <b>${whole(snapshot.waiting)}</b></h3>
      ${!shown.length && html`<p class="nothing">${t("live.queue.none")}</p>`}
      <div class="chips-window"><ul class="chips" aria-label=${t("live.queue.list")}>
        ${shown.map((item) => html`<${Chip} key=${item.id} t=${t} item=${item} longest=${longest} />`)}
        ${more > 0 && html`<li key="more" class="more">${t("live.more", { count: whole(more) })}</li>`}
      </ul></div>
    </section>
  `;
}
