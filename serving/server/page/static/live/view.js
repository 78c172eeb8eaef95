// The live view: what the scheduler does now, or did at a chosen moment of the kept minutes.
import { html, useEffect, useMemo, useReducer, useRef, useState } from "../html.js";
import "./words.js";
import "./policies.js";
import { Charts, chartsOf } from "./charts.js";
import { Connection } from "./connection.js";
import { Controls } from "./controls.js";
import { Empty } from "./empty.js";
import { eventsUntil } from "./events.js";
import { Headline, Policy } from "./headline.js";
import { Log } from "./log.js";
import { Replicas } from "./replicas.js";
import { Scatter } from "./scatter.js";
import { columns as columnsOf, lastAnswers, outcomes as outcomesOf, tokenRate } from "./series.js";
import { Stage } from "./stage.js";
import { Store } from "./store.js";
import { Tables } from "./table.js";

const WINDOW_S = 300;
const MOST_ANSWERS = 400;
const MOST_EVENTS = 40;

function useStore() {
  const store = useMemo(() => new Store(), []);
  const [, render] = useReducer((count) => count + 1, 0);
  useEffect(() => {
    store.open(() => render());
    return () => store.close();
  }, []);
  return store;
}

// What the panels show of a moment; made once for each.
function derive(store) {
  const { index, snapshot } = store.moment();
  if (!snapshot) return null;
  const { items } = store.shown;
  const start = store.shown.startOf(index, WINDOW_S);
  return {
    index,
    snapshot,
    items,
    columns: columnsOf(items, start, index),
    outcomes: outcomesOf(items, start, index),
    answers: lastAnswers(items, index, MOST_ANSWERS),
    events: eventsUntil(items, index, MOST_EVENTS),
    range: [snapshot.t - WINDOW_S, snapshot.t],
  };
}

function useDerived(store) {
  const kept = useRef({});
  const { snapshot } = store.moment();
  if (kept.current.snapshot !== snapshot || kept.current.first !== store.shown.first) {
    kept.current = { snapshot, first: store.shown.first, found: derive(store) };
  }
  return kept.current.found;
}

const isIdle = ({ totals, running, waiting }) =>
  totals.ended + totals.refused + running + waiting === 0 && totals.tokens === 0;

function Panels({ t, settings, theme, store, moment, asTables }) {
  const { snapshot, answers, columns, outcomes, items, index, range } = moment;
  const charts = chartsOf(t, columns, outcomes);
  const pick = (time) => {
    store.pause();
    store.goTo(time);
  };
  if (isIdle(snapshot)) return html`<${Empty} t=${t} settings=${settings} />`;
  if (asTables)
    return html`<${Tables} t=${t} snapshot=${snapshot} items=${items} index=${index} answers=${answers} rate=${tokenRate} />`;
  return html`
    <${Stage} t=${t} settings=${settings} snapshot=${snapshot} answers=${answers} />
    <section class="card charts" aria-label=${t("live.charts")}>
      <${Scatter} t=${t} answers=${answers} now=${snapshot.t} theme=${theme} />
      <${Charts} t=${t} charts=${charts} range=${range} theme=${theme} onPick=${pick} />
    </section>
  `;
}

export function LiveView({ settings, t, theme }) {
  const store = useStore();
  const [asTables, setAsTables] = useState(false);
  const moment = useDerived(store);
  if (!moment) {
    return html`
      <div class="live-page">
        <h1 class="visually-hidden">${t("nav.live")}</h1>
        <${Connection} t=${t} store=${store} />
        ${store.connection.kind !== "refused" && html`<p class="notice" role="status">${t("live.waiting_for_first")}</p>`}
      </div>
    `;
  }
  const { snapshot, columns, events } = moment;
  return html`
    <div class="live-page" data-time=${snapshot.t} data-first=${moment.items[0].t}>
      <div class="live-top">
        <${Policy} t=${t} policy=${snapshot.policy} />
        <div class="live-side">
          <${Connection} t=${t} store=${store} />
          <button class="button" aria-pressed=${String(asTables)} onClick=${() => setAsTables(!asTables)}>${t("live.tables")}</button>
        </div>
      </div>
      <${Headline} t=${t} settings=${settings} snapshot=${snapshot} columns=${columns} />
      <${Panels} t=${t} settings=${settings} theme=${theme} store=${store} moment=${moment} asTables=${asTables} />
      <div class="pair">
        <${Replicas} t=${t} snapshot=${snapshot} />
        <${Log} t=${t} events=${events} />
      </div>
      <${Controls} t=${t} store=${store} now=${snapshot.t} />
    </div>
  `;
}
