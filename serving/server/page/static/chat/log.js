// The messages that are shown, and where the reader is among them.
import { html, useEffect, useLayoutEffect, useRef, useState } from "../html.js";
import { useChat } from "./context.js";
import { Icon } from "./icons.js";
import { Answer, Question } from "./message.js";
import { shownPath } from "./tree.js";

const NEAR = 60; // pixels from the end within which the page follows what is written

// Keeps the end in sight as long as the reader does not scroll away from it.
function useFollowing(id, count) {
  const log = useRef(null);
  const content = useRef(null);
  const follows = useRef(true);
  const lastTop = useRef(0);
  const [isAtEnd, setAtEnd] = useState(true);
  const toEnd = () => {
    if (log.current) log.current.scrollTop = log.current.scrollHeight; // an observer may outlive it for a moment
  };
  const scrolled = () => {
    const { scrollHeight, scrollTop, clientHeight } = log.current;
    // What is written moves the end away, but only a reader scrolls up.
    if (scrollHeight - scrollTop - clientHeight < NEAR) follows.current = true;
    else if (scrollTop < lastTop.current) follows.current = false;
    lastTop.current = scrollTop;
    setAtEnd(follows.current);
  };
  useLayoutEffect(() => {
    follows.current = true;
    setAtEnd(true);
    toEnd();
  }, [id, count]);
  useEffect(() => {
    const observer = new ResizeObserver(() => follows.current && toEnd());
    observer.observe(content.current);
    observer.observe(log.current);
    return () => observer.disconnect();
  }, []);
  return { log, content, scrolled, isAtEnd, toEnd };
}

export function Log({ edited, setEdited, onAnswered, focusComposer }) {
  const { t, chat, settings } = useChat();
  const path = shownPath(chat.open);
  const { log, content, scrolled, isAtEnd, toEnd } = useFollowing(chat.open.id, path.length);
  const endEdit = () => {
    setEdited(null);
    focusComposer();
  };
  const retry = async (node) => {
    focusComposer();
    onAnswered(await chat.retry(node, settings));
  };
  const remove = (node) => {
    chat.removeNode(node, t("message.deleted"));
    focusComposer();
  };
  const items = path.map((node) => {
    if (node.role === "user") {
      const isEdited = edited === node.id;
      const edit = () => setEdited(node.id);
      return html`<li key=${node.id}><${Question} node=${node} isEdited=${isEdited} onEdit=${edit} onEditEnd=${endEdit} onDelete=${() => remove(node)} /></li>`;
    }
    return html`<li key=${node.id}><${Answer} node=${node} onRetry=${() => retry(node)} onDelete=${() => remove(node)} /></li>`;
  });
  const last = path.at(-1);
  return html`
    <div class="chat-log" role="log" aria-live="off" aria-label=${t("log")} tabindex="0" ref=${log} onScroll=${scrolled}>
      <ol class="messages" role="list" ref=${content}>
        ${items}
        ${
          last?.role === "user" &&
          !chat.answeringNow() &&
          html`<li key="ask"><button type="button" class="button" onClick=${async () => onAnswered(await chat.answer(last.id, settings))}>${t("ask.again")}</button></li>`
        }
      </ol>
    </div>
    ${
      !isAtEnd &&
      html`<button type="button" class="to-end" aria-label=${t("to.end")} title=${t("to.end")} onClick=${toEnd}><${Icon} name="newest" /></button>`
    }
  `;
}

const EXAMPLES = ["example.1", "example.2", "example.3"];

export function Empty({ onAsk }) {
  const { t, chat, settings } = useChat();
  const model = chat.open.model ?? settings.model;
  return html`
    <div class="chat-empty">
      <h2>${t("welcome.title")}</h2>
      <p class="muted">${t("welcome.text", { model })}${settings.predictor && html`<br />${t("welcome.predicted")}`}</p>
      <ul role="list">
        ${EXAMPLES.map((name) => html`<li key=${name}><button type="button" class="example" onClick=${() => onAsk(t(name))}>${t(name)}</button></li>`)}
      </ul>
    </div>
  `;
}
