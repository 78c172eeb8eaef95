// Calls of tools as cards that open: what was asked, and what came back.
import { html, useMemo } from "../html.js";
import { useChat } from "./context.js";
import { codeBlock } from "./markdown.js";
import { copyCode } from "./copying.js";
import { argumentsOf } from "./tools.js";

export function Calls({ calls, isRunning }) {
  return calls.map((call, place) => {
    const waits = isRunning && call.result === null;
    return html`<${Call} key=${place} call=${call} isRunning=${waits} />`;
  });
}

function stateOf({ result }, isRunning) {
  if (isRunning) return "running";
  if (result === null) return "stopped";
  return result.failed ? "failed" : "done";
}

function Call({ call, isRunning }) {
  const context = useChat();
  const { t, language } = context;
  const { asked, result } = call;
  const state = stateOf(call, isRunning);
  const given = useMemo(() => shownArguments(asked, t), [asked, language]);
  return html`
    <details class=${`call ${state}`} open=${state === "failed" || Boolean(result?.images.length)}>
      <summary>
        <span class="call-state" aria-hidden="true"></span>
        <span class="call-name">${asked.name || call.name}</span>
        <span class="muted">${t(`tool.${state}`)}</span>
      </summary>
      <div class="call-body" onClick=${(event) => copyCode(event, context)}>
        <h4>${t("tool.arguments")}</h4>
        <div dangerouslySetInnerHTML=${{ __html: given }}></div>
        ${
          result?.text &&
          html`<h4>${t("tool.result")}</h4>
            <pre class="call-result" tabindex="0" role="group" aria-label=${t("tool.result")}>${result.text}</pre>`
        }
        ${result?.images.map(
          (image, place) =>
            html`<img key=${place} src=${`data:image/png;base64,${image}`} alt=${t("tool.image", { number: place + 1 })} />`,
        )}
      </div>
    </details>
  `;
}

// HTML of a call's arguments: code as code, all else as JSON.
function shownArguments(asked, t) {
  const values = argumentsOf(asked.arguments);
  if (values === null) return codeBlock(asked.arguments, "", t);
  const names = Object.keys(values);
  if (names.length === 1 && names[0] === "code" && typeof values.code === "string") {
    return codeBlock(values.code, "python", t);
  }
  return codeBlock(JSON.stringify(values, null, 2), "json", t);
}
