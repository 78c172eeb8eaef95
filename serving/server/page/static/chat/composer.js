// Where questions are typed.
import { html, useEffect, useLayoutEffect, useRef, useState } from "../html.js";
import { useChat } from "./context.js";
import { Icon, IconButton } from "./icons.js";
import { offeredTools } from "./tools.js";

const MOST_HEIGHT = 240; // pixels

// As high as the text, up to `most`.
export function fitHeight(field, most = MOST_HEIGHT) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, most)}px`;
}

// Whether a key ends the text: an Enter that chooses a word of an input method does not.
export function isSubmit(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

export function Composer({ field, onSend, onEditLast, onSettings }) {
  const { t, chat, settings } = useChat();
  const { id } = chat.open;
  const [text, setText] = useState(chat.drafts.get(id) ?? "");
  const answering = chat.answeringNow();
  useEffect(() => setText(chat.drafts.get(id) ?? ""), [id]);
  useLayoutEffect(() => fitHeight(field.current), [text]);
  const change = (value) => {
    chat.drafts.set(id, value);
    setText(value);
  };
  const send = () => {
    if (answering || !text.trim()) return;
    change("");
    onSend(text.trim());
  };
  const key = (event) => {
    if (isSubmit(event)) {
      event.preventDefault();
      send();
    }
    if (event.key === "ArrowUp" && !text && !answering) {
      event.preventDefault();
      onEditLast();
    }
  };
  const submit = (event) => {
    event.preventDefault();
    send();
  };
  return html`
    <form class="composer" onSubmit=${submit}>
      <div class="composer-box">
        <label class="visually-hidden" for="question">${t("question")}</label>
        <textarea
          id="question"
          ref=${field}
          rows="1"
          placeholder=${t("question.placeholder")}
          value=${text}
          enterkeyhint="send"
          onInput=${(event) => change(event.target.value)}
          onKeyDown=${key}
        ></textarea>
        <div class="composer-foot">
          <${SetUp} onSettings=${onSettings} />
          ${
            answering
              ? html`<${IconButton} icon="stop" class="send" label=${t("stop")} onClick=${() => chat.stop()} />`
              : html`<button type="submit" class="icon-button send" aria-label=${t("send")} title=${t("send")} disabled=${!text.trim()}><${Icon} name="send" /></button>`
          }
        </div>
      </div>
      <p class="hint">${t("composer.hint")}</p>
    </form>
  `;
}

// Model and tools of the next answer, at a glance.
function SetUp({ onSettings }) {
  const { t, chat, settings } = useChat();
  const { tools, model } = chat.open;
  const switchTools = () => chat.setUp({ tools: { ...tools, on: !tools.on } });
  const hasTools = settings.takes_tools && settings.tools?.length > 0;
  const count = offeredTools(settings, { ...tools, on: true }).length;
  return html`
    <button type="button" class="setup-chip" aria-label=${t("model.change", { model: model ?? settings.model })} onClick=${onSettings}>
      ${model ?? settings.model}
    </button>
    ${
      hasTools &&
      html`<button type="button" class="setup-chip" aria-pressed=${String(tools.on)} onClick=${switchTools}>
        <${Icon} name="tool" />${t("tools.count", { count })}
      </button>`
    }
    <span class="space"></span>
  `;
}
