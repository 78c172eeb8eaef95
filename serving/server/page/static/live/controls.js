// The time that is shown: the bar of the kept minutes, play and pause, speed, and files of them.
import { html, useRef } from "../html.js";
import { clock } from "./format.js";
import { SPEEDS } from "./store.js";

const POINTS = 200;
const MARKED = new Set(["lost", "bounced", "late", "gap", "restarted"]);

// How many answers were under way over the kept minutes, and marks where something went wrong.
function Overview({ items }) {
  const first = items[0].t;
  const length = Math.max(items[items.length - 1].t - first, 1);
  const every = Math.max(Math.floor(items.length / POINTS), 1);
  const load = (item) => item.running + item.waiting;
  const most = Math.max(1, ...items.map(load));
  let path = "M0 20";
  const marks = [];
  items.forEach((item, index) => {
    const x = (((item.t - first) / length) * 1000).toFixed(1);
    if (index % every === 0) path += `L${x} ${(20 - (load(item) / most) * 18).toFixed(1)}`;
    const events = item.events ?? [];
    if (events.some(({ kind }) => MARKED.has(kind))) {
      const serious = events.some(({ kind }) => MARKED.has(kind) && kind !== "late");
      marks.push(html`<rect x=${x} y=${serious ? 0 : 16} width="2.5" height=${serious ? 20 : 4} />`);
    }
  });
  return html`
    <svg class="overview" viewBox="0 0 1000 20" preserveAspectRatio="none" aria-hidden="true">
      <path d="${path}L1000 20Z" />${marks}
    </svg>
  `;
}

function save(store) {
  const { items } = store.shown;
  const link = document.createElement("a");
  const at = new Date(items[items.length - 1].t * 1000).toISOString().slice(0, 19).replace(/[:T]/g, "-");
  link.href = URL.createObjectURL(new Blob([store.shown.toJsonLines()], { type: "application/jsonl" }));
  link.download = `live-${at}.jsonl`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function Files({ t, store }) {
  const input = useRef(null);
  const chosen = (event) => {
    const [file] = event.target.files;
    if (file) store.load(file);
    event.target.value = "";
  };
  return html`
    <button class="button plain" aria-label=${t("replay.save.label")} onClick=${() => save(store)}>${t("replay.save")}</button>
    <button class="button plain" aria-label=${t("replay.load")} onClick=${() => input.current.click()}>${t("replay.open")}</button>
    <input
      ref=${input}
      type="file"
      class="visually-hidden"
      tabindex="-1"
      accept=".jsonl,.json,.txt"
      aria-label=${t("replay.load")}
      onChange=${chosen}
    />
  `;
}

export function Controls({ t, store, now }) {
  const { items, first, last } = store.shown;
  const onSlide = (event) => {
    store.pause();
    store.goTo(first.t + Number(event.target.value));
  };
  const length = Math.ceil(last.t - first.t);
  const place = store.isLive ? length : Math.round(now - first.t);
  const behind = Math.round(last.t - now);
  const where = store.isLive
    ? t("replay.live.now", { time: clock(now) })
    : t("replay.at", { time: clock(now), behind });
  const holdOrPlay = () => (store.playing || store.isLive ? store.hold() : store.play());
  const running = store.playing || store.isLive;
  return html`
    <section class="replay ${store.isLive ? "" : "past"}" aria-label=${t("replay")}>
      <button class="button play" aria-label=${t(running ? "replay.pause" : "replay.play")} onClick=${holdOrPlay}>
        <span aria-hidden="true">${running ? "❚❚" : "▶"}</span>
      </button>
      <div class="speeds" role="group" aria-label=${t("replay.speed")}>
        ${SPEEDS.map(
          (speed) => html`
          <button class="button plain" aria-pressed=${String(store.speed === speed)} onClick=${() => store.setSpeed(speed)}>
            ${`${speed}×`}
          </button>
        `,
        )}
      </div>
      <div class="timeline">
        <${Overview} items=${items} />
        <input
          type="range"
          min="0"
          max=${length}
          step="1"
          value=${place}
          aria-label=${t("replay.moment")}
          aria-valuetext=${where}
          onInput=${onSlide}
        />
        <div class="ends" aria-hidden="true">
          <span>${clock(first.t)}</span>
          <b>${clock(now)}${!store.isLive && behind > 0 ? t("replay.behind", { behind }) : ""}</b>
          <span>${clock(last.t)}</span>
        </div>
      </div>
      <button
        class="button live ${store.isLive ? "on" : "primary"}"
        aria-pressed=${String(store.isLive)}
        onClick=${() => store.goLive()}
      >
        <span class="beat" aria-hidden="true"></span>${t("replay.live")}
      </button>
      <${Files} t=${t} store=${store} />
    </section>
  `;
}
