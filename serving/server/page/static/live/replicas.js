// Replicas: where each one's layers stand, what they take against what was predicted, and whether it answers.
import { html } from "../html.js";
import { bytes, short, whole } from "./format.js";

const ICONS = { ready: "●", starting: "◐", ended: "✕" };

function State({ t, state }) {
  return html`<span class="state ${state}"><span aria-hidden="true">${ICONS[state] ?? "?"}</span> ${t(`live.state.${state}`)}</span>`;
}

// One line above the lanes of a replica.
export function ReplicaLine({ t, replica }) {
  return html`
    <h4 class="replica-line">
      <span>${t("live.replica", { number: replica.number })}</span>
      <${State} t=${t} state=${replica.state} />
      <span class="devices">${replica.devices}</span>
      ${replica.restarts > 0 && html`<span class="restarts">${t("live.restarts", { count: replica.restarts })}</span>`}
    </h4>
  `;
}

// layers: the first and the last of the stage.
function Part({ t, stage }) {
  const [from, to] = Array.isArray(stage.layers) ? stage.layers : [0, 0];
  const taken = stage.bytes;
  const predicted = stage.predicted_bytes;
  const largest = Math.max(taken ?? 0, predicted ?? 0, 1);
  const wide = (value) => `${(value / largest) * 100}%`;
  const both = Number.isFinite(taken) && Number.isFinite(predicted);
  const known = both ? "both" : Number.isFinite(taken) ? "taken" : "predicted";
  const values = { taken: bytes(taken), predicted: bytes(predicted) };
  return html`
    <li class="part" style=${{ flexGrow: to - from + 1 }}>
      <span class="part-bar"><b>${stage.device}</b> ${t("live.layers", { from, to })}</span>
      ${
        (taken || predicted) &&
        html`
        <span class="memory" aria-hidden="true">
          ${Number.isFinite(predicted) && html`<span class="memory-predicted" style=${{ width: wide(predicted) }}></span>`}
          ${Number.isFinite(taken) && html`<span class="memory-taken" style=${{ width: wide(taken) }}></span>`}
        </span>
        <span class="part-note">${t(`live.memory.${known}`, values)}</span>
      `
      }
    </li>
  `;
}

function Meter({ t, used, limit }) {
  const share = limit ? Math.min(used / limit, 1) : 0;
  return html`
    <div class="meter">
      <span>${t("live.kv.short")}</span>
      <span class="meter-bar" aria-hidden="true"><span style=${{ transform: `scaleX(${share.toFixed(4)})` }}></span></span>
      <span>${short(used)} / ${short(limit)}</span>
    </div>
  `;
}

function Replica({ t, replica, alone }) {
  return html`
    <li class="replica ${replica.state}" data-replica=${replica.number} data-state=${replica.state}>
      <h3>${alone ? t("live.engine") : t("live.replica", { number: replica.number })} <${State} t=${t} state=${replica.state} /></h3>
      <p class="replica-facts">
        ${[
          replica.devices,
          t("live.replica.rows", { running: whole(replica.running), waiting: whole(replica.waiting) }),
          t("live.replica.served", { count: whole(replica.requests) }),
          replica.restarts > 0 && t("live.restarts", { count: replica.restarts }),
        ]
          .filter(Boolean)
          .join(" · ")}
      </p>
      <${Meter} t=${t} used=${replica.kv_used} limit=${replica.kv_limit} />
      ${
        replica.stages.length > 0 &&
        html`
        <ol class="placement" aria-label=${t("live.placement")}>
          ${replica.stages.map((stage) => html`<${Part} t=${t} stage=${stage} />`)}
        </ol>
      `
      }
    </li>
  `;
}

export function Replicas({ t, snapshot }) {
  const { replicas } = snapshot;
  const ready = replicas.filter(({ state }) => state === "ready").length;
  return html`
    <section class="card" aria-labelledby="replicas-title">
      <h2 id="replicas-title">
        ${t("live.replicas")}${" "}
        <span class="aside">${t("live.replicas.ready", { ready, count: replicas.length })}</span>
      </h2>
      <ul class="replicas">
        ${replicas.map((replica) => html`<${Replica} key=${replica.number} t=${t} replica=${replica} alone=${replicas.length === 1} />`)}
      </ul>
    </section>
  `;
}
