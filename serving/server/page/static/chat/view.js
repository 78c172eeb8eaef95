// The chat view: conversations on the left, the open one, its settings on the right.
import { html, useCallback, useEffect, useMemo, useRef, useState } from "../html.js";
import { Head, Help, Notice } from "./around.js";
import { theChat } from "./chat.js";
import { Composer } from "./composer.js";
import { ChatContext } from "./context.js";
import { Drawer } from "./drawer.js";
import { Empty, Log } from "./log.js";
import { errorLine } from "./message.js";
import { useMedia, useObserved } from "./observed.js";
import { Panel } from "./panel.js";
import { Sidebar } from "./sidebar.js";
import { shownPath } from "./tree.js";
import "./words.js";

const NARROW = "(max-width: 820px)";
const NO_ROOM = "(max-width: 1180px)"; // for a third column
const FINE = "(any-pointer: fine)";
const SAID_CHARACTERS = 300;

function isTyping({ target }) {
  return target.matches?.("input:not([type=checkbox]), textarea, select") ?? false;
}

// Keys of the whole view. Dialogs have their own Escape.
function useKeys(chat, actions) {
  useEffect(() => {
    const pressed = (event) => {
      if (event.isComposing || event.defaultPrevented || document.querySelector("dialog[open]")) return;
      const action = event.altKey && !event.ctrlKey && actions[event.code];
      if (action) {
        event.preventDefault();
        action();
      } else if (event.key === "Escape" && chat.answeringNow()) {
        event.preventDefault();
        chat.stop();
      } else if (event.key === "?" && !isTyping(event)) {
        event.preventDefault();
        actions.help();
      }
    };
    addEventListener("keydown", pressed);
    return () => removeEventListener("keydown", pressed);
  });
}

export function ChatView({ settings, t, language }) {
  const chat = theChat;
  useObserved(chat);
  const isNarrow = useMedia(NARROW);
  const hasNoRoom = useMedia(NO_ROOM);
  const [listIsOpen, setList] = useState(!isNarrow);
  const [panelIsOpen, setPanel] = useState(false);
  const [helpIsOpen, setHelp] = useState(false);
  const [edited, setEdited] = useState(null);
  const field = useRef(null);
  useEffect(() => {
    chat.load();
    chat.loadModels();
  }, []);
  useEffect(() => setList(!isNarrow), [isNarrow]);
  const { title } = chat.open;
  useEffect(() => {
    document.title = title ? `${title} · GLM Foundry` : "GLM Foundry";
    return () => {
      document.title = "GLM Foundry";
    };
  }, [title]);
  // Not where that opens a keyboard on the screen.
  const focusComposer = useCallback(() => setTimeout(() => matchMedia(FINE).matches && field.current?.focus()), []);
  useEffect(() => {
    setEdited(null);
    if (!isNarrow) focusComposer();
  }, [chat.open.id]);

  const onAnswered = (node) => {
    if (!node) return;
    if (node.end === "error") chat.say(errorLine(node.error, t));
    else chat.say(t(node.end === "stopped" ? "said.stopped" : "said.answer", { text: node.text.slice(0, SAID_CHARACTERS) }));
  };
  const ask = async (text) => {
    chat.say(t("writing"));
    focusComposer();
    onAnswered(await chat.ask(text, settings));
  };
  const start = () => {
    chat.start();
    if (isNarrow) setList(false);
    focusComposer();
  };
  const show = (conversation) => {
    chat.show(conversation);
    if (isNarrow) setList(false);
  };
  const editLast = () => {
    const last = shownPath(chat.open).findLast((node) => node.role === "user");
    if (last) setEdited(last.id);
  };
  const endPanel = () => {
    setPanel(false);
    focusComposer();
  };
  const switchPanel = () => (panelIsOpen ? endPanel() : setPanel(true));
  useKeys(chat, {
    KeyN: start,
    KeyL: () => setList(!listIsOpen),
    KeyS: switchPanel,
    help: () => setHelp(true),
  });

  const context = useMemo(() => ({ t, language, settings, chat }), [language, settings]);
  const isEmpty = !shownPath(chat.open).length;
  const help = () => {
    if (isNarrow) setList(false);
    setHelp(true);
  };
  return html`
    <${ChatContext.Provider} value=${context}>
      <div class="chat">
        <h1 class="visually-hidden">${t("nav.chat")}</h1>
        <${Drawer} side="left" label=${t("conversations")} open=${listIsOpen} isDialog=${isNarrow} onClose=${() => setList(false)}>
          <${Sidebar} onShow=${show} onNew=${start} onHelp=${help} onClose=${() => setList(false)} />
        <//>
        <section class="talk" aria-label=${t("conversation")}>
          <${Head}
            listIsOpen=${listIsOpen && !isNarrow}
            panelIsOpen=${panelIsOpen}
            onList=${() => setList(true)}
            onPanel=${switchPanel}
            onNew=${start}
          />
          <div class="talk-body">
            ${
              isEmpty
                ? html`<${Empty} onAsk=${ask} />`
                : html`<${Log} edited=${edited} setEdited=${setEdited} onAnswered=${onAnswered} focusComposer=${focusComposer} />`
            }
            <${Notice} onEnd=${focusComposer} />
          </div>
          <${Composer} field=${field} onSend=${ask} onEditLast=${editLast} onSettings=${() => setPanel(true)} />
        </section>
        <${Drawer} side="right" label=${t("settings")} open=${panelIsOpen} isDialog=${hasNoRoom} onClose=${endPanel}>
          <${Panel} onClose=${endPanel} />
        <//>
        <${Help} open=${helpIsOpen} onClose=${() => setHelp(false)} />
        <div class="visually-hidden" role="status" aria-live="polite">${chat.said}</div>
      </div>
    <//>
  `;
}
