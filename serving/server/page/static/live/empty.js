// What a server shows before its first request: what will be here, and how to send some load.
import { currentKey } from "../api.js";
import { html } from "../html.js";

export function Empty({ t, settings }) {
  const root = new URL(".", location.href).href.replace(/\/$/, "");
  const keyed = currentKey() !== null;
  const batch = `python -m serving.batch --model ${root}/v1 --input rows.jsonl --output answers.jsonl${keyed ? " --api_key KEY" : ""}`;
  const body = JSON.stringify({ model: settings.model, prompt: "Hello", max_tokens: 200 });
  const one = `curl ${root}/v1/completions -H "Content-Type: application/json"${keyed ? ' -H "Authorization: Bearer KEY"' : ""} -d '${body}'`;
  return html`
    <section class="card empty" aria-labelledby="empty-title">
      <h2 id="empty-title">${t("empty.title")}</h2>
      <p>${t("empty.what")}</p>
      <div class="demo" aria-hidden="true">
        <span class="track">
          <span class="band demo-band"></span>
          <span class="median demo-median"></span>
          <span class="made demo-made"></span>
        </span>
      </div>
      <p>${t(settings.predictor ? "empty.lane" : "empty.no_predictor")}</p>
      <p>${t("empty.how")} <a href="#/chat">${t("empty.chat")}</a></p>
      <pre tabindex="0" aria-label=${t("empty.command")}><code>${`${batch}\n\n${one}`}</code></pre>
    </section>
  `;
}
