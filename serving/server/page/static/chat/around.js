// Around the conversation: its head, what is said for a while, and the list of keys.
import { html, useEffect, useRef } from "../html.js";
import { useChat } from "./context.js";
import { Dialog } from "./drawer.js";
import { asMarkdown, asRow, download, fileName } from "./exchange.js";
import { Icon, IconButton } from "./icons.js";
import { shownPath } from "./tree.js";

const NOTICE_MS = 10_000;

export function Head({ listIsOpen, panelIsOpen, onList, onPanel, onNew }) {
  const { t, chat } = useChat();
  const title = chat.open.title || t("new");
  return html`
    <div class="talk-head">
      ${!listIsOpen && html`<${IconButton} icon="menu" label=${t("conversations.show")} aria-expanded="false" onClick=${onList} />`}
      ${!listIsOpen && html`<${IconButton} icon="plus" label=${t("new")} onClick=${onNew} />`}
      <h2 title=${title}>${title}</h2>
      ${shownPath(chat.open).length > 0 && html`<${ExportMenu} />`}
      <${IconButton}
        icon="settings"
        label=${t(panelIsOpen ? "settings.hide" : "settings.show")}
        aria-expanded=${String(panelIsOpen)}
        onClick=${onPanel}
      />
    </div>
  `;
}

// A <details> that closes when it is left.
function ExportMenu() {
  const { t, chat, settings } = useChat();
  const menu = useRef(null);
  const close = () => {
    menu.current.open = false;
  };
  const left = ({ relatedTarget }) => {
    if (!menu.current.contains(relatedTarget)) close();
  };
  const key = (event) => {
    if (event.key !== "Escape" || !menu.current.open) return;
    event.stopPropagation();
    close();
    menu.current.querySelector("summary").focus();
  };
  const save = (ending, text, type) => {
    close();
    download(fileName(chat.open.title, ending), text, type);
  };
  return html`
    <details class="menu" ref=${menu} onFocusOut=${left} onKeyDown=${key}>
      <summary class="icon-button" aria-label=${t("export")} title=${t("export")}><${Icon} name="download" /></summary>
      <div class="menu-items">
        <button type="button" onClick=${() => save("json", asRow(chat.open, settings), "application/json")}>${t("export.json")}</button>
        <button type="button" onClick=${() => save("md", asMarkdown(chat.open, t), "text/markdown")}>${t("export.markdown")}</button>
      </div>
    </details>
  `;
}

export function Notice({ onEnd }) {
  const { t, chat } = useChat();
  const { notice } = chat;
  const timer = useRef(0);
  const wait = () => {
    timer.current = setTimeout(() => chat.endNotice(), NOTICE_MS);
  };
  const hold = () => clearTimeout(timer.current);
  const end = (undone) => {
    chat.endNotice(undone);
    onEnd();
  };
  useEffect(() => {
    if (!notice) return undefined;
    wait();
    return hold;
  }, [notice]);
  return html`
    <div class="notices" role="status">
      ${
        notice &&
        html`<div class="toast" onMouseEnter=${hold} onMouseLeave=${wait} onFocusIn=${hold} onFocusOut=${wait}>
          <span>${notice.text}</span>
          ${notice.undo && html`<button type="button" class="small" onClick=${() => end(true)}>${t("undo")}</button>`}
          <${IconButton} icon="close" label=${t("close")} onClick=${() => end(false)} />
        </div>`
      }
    </div>
  `;
}

const KEYS = [
  [["Enter"], "keys.send"],
  [["Shift", "Enter"], "keys.line"],
  [["Esc"], "keys.stop"],
  [["↑"], "keys.edit"],
  [["Alt", "N"], "keys.new"],
  [["Alt", "L"], "keys.list"],
  [["Alt", "S"], "keys.settings"],
  [["?"], "keys.help"],
];

export function Help({ open, onClose }) {
  const { t } = useChat();
  return html`
    <${Dialog} open=${open} onClose=${onClose} label=${t("help")}>
      <div class="side-head">
        <h2>${t("help")}</h2>
        <${IconButton} icon="close" label=${t("close")} onClick=${onClose} />
      </div>
      <dl class="keys">
        ${KEYS.map(
          ([keys, name]) => html`
            <div key=${name}>
              <dt>${keys.map((key) => html`<kbd key=${key}>${key}</kbd>`)}</dt>
              <dd>${t(name)}</dd>
            </div>
          `,
        )}
      </dl>
      <p class="muted">${t("help.where")}</p>
    <//>
  `;
}
