// Whether the server is heard, and what to do where it is not.
import { html, useEffect, useState } from "../html.js";

function Countdown({ t, until }) {
  const [, redraw] = useState(0);
  useEffect(() => {
    const timer = setInterval(() => redraw((count) => count + 1), 1000);
    return () => clearInterval(timer);
  }, []);
  return html`<span>${t("live.cut.again", { seconds: Math.max(Math.ceil((until - Date.now()) / 1000), 0) })}</span>`;
}

function fileProblem(t, problem) {
  if (problem.line < 0) return t("replay.too_large", problem);
  return t(problem.line ? "replay.bad_line" : "replay.empty_file", problem);
}

export function Connection({ t, store }) {
  const { connection, file, problem } = store;
  const loaded = file && { name: file.name, count: file.snapshots.items.length };
  const isOpen = connection.kind === "open" && !file;
  return html`
    ${file && html`<p class="connection file" role="status">${t("replay.file", loaded)}</p>`}
    ${problem && html`<p class="connection bad" role="alert">${fileProblem(t, problem)}</p>`}
    ${
      isOpen &&
      html`
      <p class="connection good" role="status">
        <span class="beat" aria-hidden="true"></span>${t(store.isLive ? "live.open" : "live.open.past")}
      </p>
    `
    }
    ${connection.kind === "connecting" && html`<p class="connection" role="status">${t("live.connecting")}</p>`}
    ${
      connection.kind === "refused" &&
      html`
      <p class="connection bad" role="alert">${t("live.refused", { reason: connection.reason })}</p>
    `
    }
    ${
      connection.kind === "cut" &&
      html`
      <div class="connection bad">
        <span role="alert">${t("live.cut")}</span>
        <${Countdown} t=${t} until=${connection.retryAt} />
        <button class="button" onClick=${() => store.stream.connect()}>${t("live.cut.now")}</button>
      </div>
    `
    }
  `;
}
