// Thumbs and corrections, which become rows of training data on the server.
import { html, useEffect, useRef, useState } from "../html.js";
import { sendFeedback } from "../api.js";
import { useChat } from "./context.js";
import { IconButton } from "./icons.js";
import { fitHeight } from "./composer.js";
import { messagesOf } from "./tree.js";

// Sends what the person thinks of an answer, and keeps it with the answer when the server has it.
async function send({ chat, t, settings }, node, feedback) {
  const messages = messagesOf(chat.open, chat.pathTo(node));
  const { id, report } = node;
  const model = node.model ?? settings.model;
  const conversation = chat.open;
  try {
    await sendFeedback({ id, model, messages, report, ...feedback });
  } catch (error) {
    chat.tell(t("feedback.failed", { reason: error.message }));
    return false;
  }
  node.feedback = feedback;
  chat.keep(conversation);
  const isWithdrawn = feedback.rating === null && feedback.correction === null;
  chat.say(t(isWithdrawn ? "feedback.withdrawn" : "feedback.thanks"));
  return true;
}

export function Feedback({ node, onCorrect }) {
  const context = useChat();
  const { t } = context;
  const { rating, correction } = node.feedback;
  const rate = (next) => send(context, node, { rating: rating === next ? null : next, correction });
  const thumb = (name) => html`
    <${IconButton}
      icon=${name}
      label=${t(`feedback.${name}`)}
      aria-pressed=${String(rating === name)}
      onClick=${() => rate(name)}
    />
  `;
  const pressed = String(correction !== null);
  return html`
    ${thumb("up")}${thumb("down")}
    <${IconButton} icon="correct" class="correct" label=${t("feedback.correct")} aria-pressed=${pressed} onClick=${onCorrect} />
  `;
}

// The form of a correction. onEnd() closes it.
export function Correction({ node, onEnd }) {
  const context = useChat();
  const { t } = context;
  const { rating, correction } = node.feedback;
  const [text, setText] = useState(correction ?? node.text);
  const field = useRef(null);
  useEffect(() => {
    fitHeight(field.current, 400);
    field.current.focus();
  }, []);
  const submit = async (event) => {
    event.preventDefault();
    if (await send(context, node, { rating, correction: text.trim() })) onEnd();
  };
  const withdraw = async () => {
    if (await send(context, node, { rating, correction: null })) onEnd();
  };
  const key = (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    event.stopPropagation();
    onEnd();
  };
  return html`
    <form class="correction" onSubmit=${submit} onKeyDown=${key}>
      <label>
        ${t("feedback.correction")}
        <textarea
          ref=${field}
          class="field"
          value=${text}
          onInput=${(event) => {
            setText(event.target.value);
            fitHeight(event.target, 400);
          }}
        ></textarea>
      </label>
      <div class="buttons">
        <button type="submit" class="button primary" disabled=${!text.trim() || text === correction}>${t("feedback.send")}</button>
        ${correction !== null && html`<button type="button" class="button" onClick=${withdraw}>${t("feedback.withdraw")}</button>`}
        <button type="button" class="button plain" onClick=${onEnd}>${t("cancel")}</button>
      </div>
    </form>
  `;
}
