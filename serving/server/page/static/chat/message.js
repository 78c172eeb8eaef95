// A question or an answer, and what can be done with it.
import { html, useEffect, useRef, useState } from "../html.js";
import { Calls } from "./calls.js";
import { fitHeight, isSubmit } from "./composer.js";
import { useChat } from "./context.js";
import { CopyButton } from "./copying.js";
import { Correction, Feedback } from "./feedback.js";
import { IconButton } from "./icons.js";
import { useObserved } from "./observed.js";
import { Rendered } from "./rendered.js";
import { Report } from "./report.js";
import { placeOf } from "./tree.js";

const BUSY = 429;

// ‹ 2/3 › where a message has siblings. The focus goes with the message.
function Branches({ node }) {
  const { t, chat } = useChat();
  const show = (step) => {
    const shown = chat.step(node, step);
    if (shown) setTimeout(() => focusBranches(shown, step));
  };
  const { place, count } = placeOf(chat.open, node);
  if (count < 2) return null;
  const off = chat.answeringNow() !== null;
  return html`
    <span class="branches" role="group" aria-label=${t("branches")}>
      <${IconButton} icon="left" label=${t("branch.before")} disabled=${off || place === 1} onClick=${() => show(-1)} />
      <span aria-label=${t("branch.place", { place, count })} role="img">${place}/${count}</span>
      <${IconButton} icon="right" label=${t("branch.after")} disabled=${off || place === count} onClick=${() => show(1)} />
    </span>
  `;
}

function focusBranches({ id }, step) {
  const buttons = [...document.querySelectorAll(`#message-${id} .branches button`)];
  if (step > 0) buttons.reverse();
  buttons.find((button) => !button.disabled)?.focus();
}

export function Question({ node, isEdited, onEdit, onEditEnd, onDelete }) {
  const { t, chat } = useChat();
  const isBusy = chat.answeringNow() !== null;
  if (isEdited) return html`<article class="message question" aria-label=${t("you")}><${Edit} node=${node} onEnd=${onEditEnd} /></article>`;
  return html`
    <article id=${`message-${node.id}`} class="message question" aria-label=${t("you")}>
      <div class="bubble">${node.text}</div>
      <div class="actions">
        <${Branches} node=${node} />
        <${CopyButton} text=${node.text} label=${t("question.copy")} />
        <${IconButton} icon="pencil" label=${t("question.edit")} disabled=${isBusy} onClick=${onEdit} />
        <${IconButton}
          icon="trash"
          label=${t("question.delete")}
          disabled=${isBusy}
          onClick=${onDelete}
        />
      </div>
    </article>
  `;
}

function Edit({ node, onEnd }) {
  const { t, chat, settings } = useChat();
  const [text, setText] = useState(node.text);
  const field = useRef(null);
  useEffect(() => {
    fitHeight(field.current, 400);
    field.current.focus();
  }, []);
  const send = (event) => {
    event.preventDefault();
    if (!text.trim()) return;
    onEnd();
    chat.edit(node, text.trim(), settings);
  };
  const key = (event) => {
    if (isSubmit(event)) send(event);
    if (event.key !== "Escape" || event.isComposing) return;
    event.stopPropagation();
    onEnd();
  };
  return html`
    <form class="edit" onSubmit=${send} onKeyDown=${key}>
      <textarea
        ref=${field}
        class="field"
        aria-label=${t("question.edit")}
        value=${text}
        onInput=${(event) => {
          setText(event.target.value);
          fitHeight(event.target, 400);
        }}
      ></textarea>
      <div class="buttons">
        <button type="submit" class="button primary" disabled=${!text.trim()}>${t("send")}</button>
        <button type="button" class="button plain" onClick=${onEnd}>${t("cancel")}</button>
      </div>
    </form>
  `;
}

export function Answer({ node, onRetry, onDelete }) {
  const { t, chat } = useChat();
  const current = chat.answeringNow();
  const answering = current?.node === node ? current : null;
  useObserved(answering);
  const [isCorrected, setCorrected] = useState(false);
  const article = useRef(null);
  const endCorrection = () => {
    setCorrected(false);
    article.current.querySelector(".correct")?.focus();
  };
  const name = node.model ?? t("answer");
  const used = Object.entries(node.parameters).map(([field, value]) => `${t(`parameter.${field}`)} ${value}`).join(", ");
  return html`
    <article ref=${article} id=${`message-${node.id}`} class="message answer" aria-label=${t("answer.of", { model: name })} aria-busy=${String(answering !== null)}>
      <p class="from">${name}${used && html` <span>${used}</span>`}</p>
      ${node.steps.map(
        (step, place) => html`
          <div key=${place} class="step">
            ${step.text && html`<${Rendered} text=${step.text} answering=${null} />`}
            <${Calls} calls=${step.calls} isRunning=${answering !== null} />
          </div>
        `,
      )}
      ${node.text && html`<${Rendered} text=${node.text} answering=${answering} />`}
      ${answering && !node.text && html`<p class="waiting"><span class="pulse" aria-hidden="true"></span>${t("waiting")}</p>`}
      <${Ending} node=${node} onRetry=${onRetry} />
      ${!answering && node.report && html`<${Report} report=${node.report} />`}
      ${isCorrected && html`<${Correction} node=${node} onEnd=${endCorrection} />`}
      ${!answering && html`<${AnswerActions} node=${node} onRetry=${onRetry} onDelete=${onDelete} onCorrect=${() => setCorrected(!isCorrected)} />`}
    </article>
  `;
}

// Why an answer ended, where that was not its own end.
function Ending({ node, onRetry }) {
  const { t } = useChat();
  if (node.end === "stopped") return html`<p class="ending">${t("ended.stopped")}</p>`;
  if (node.end === "length") return html`<p class="ending">${t("ended.length")}</p>`;
  if (node.end === "stop" && !node.text) return html`<p class="ending">${t("ended.empty")}</p>`;
  if (node.end !== "error") return null;
  return html`
    <div class="failure">
      <p>${errorLine(node.error, t)}</p>
      <button type="button" class="button" onClick=${onRetry}>${t("retry")}</button>
    </div>
  `;
}

export function errorLine(error, t) {
  if (error?.status === BUSY) return t("error.busy", { reason: error.message });
  if (error?.status) return t("error.server", { reason: error.message });
  return t("error.network", { reason: error?.message ?? "" });
}

function AnswerActions({ node, onRetry, onCorrect, onDelete }) {
  const { t, chat, settings } = useChat();
  const isBusy = chat.answeringNow() !== null;
  return html`
    <div class="actions">
      <${Branches} node=${node} />
      ${node.text && html`<${CopyButton} text=${node.text} label=${t("answer.copy")} />`}
      <${IconButton} icon="retry" label=${t("retry")} disabled=${isBusy} onClick=${onRetry} />
      ${settings.feedback && node.text && html`<${Feedback} node=${node} onCorrect=${onCorrect} />`}
      <${IconButton}
        icon="trash"
        label=${t("answer.delete")}
        disabled=${isBusy}
        onClick=${onDelete}
      />
    </div>
  `;
}
