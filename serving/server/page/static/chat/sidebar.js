// The list of conversations: search, rename, delete, import and export.
import { html, useEffect, useRef, useState } from "../html.js";
import { useChat } from "./context.js";
import { asBackup, asRows, download, readFile } from "./exchange.js";
import { Icon, IconButton } from "./icons.js";

const DAY_MS = 24 * 3600 * 1000;

function matches(conversation, words) {
  const texts = [conversation.title];
  for (const node of Object.values(conversation.nodes)) texts.push(node.text ?? "");
  const all = texts.join("\n").toLowerCase();
  return words.every((word) => all.includes(word));
}

function groupOf({ updated }) {
  const today = new Date().setHours(0, 0, 0, 0);
  if (updated >= today) return "today";
  if (updated >= today - DAY_MS) return "yesterday";
  return updated >= today - 7 * DAY_MS ? "week" : "older";
}

function Entry({ conversation, onShow }) {
  const { t, chat } = useChat();
  const [isRenamed, setRenamed] = useState(false);
  const isOpen = chat.open === conversation;
  const title = conversation.title || t("untitled");
  const ref = useRef(null);
  const end = (name) => {
    if (name !== null) chat.rename(conversation, name);
    setRenamed(false);
    queueMicrotask(() => ref.current?.querySelector("button")?.focus());
  };
  if (isRenamed) return html`<li ref=${ref}><${NameField} title=${title} onEnd=${end} /></li>`;
  const remove = () => {
    const entries = [...document.querySelectorAll(".entry")];
    const place = entries.indexOf(ref.current);
    const next = entries[place + 1] ?? entries[place - 1];
    chat.remove(conversation, t("deleted", { title }));
    (next ?? document).querySelector(".entry-title, .new").focus();
  };
  return html`
    <li ref=${ref} class=${isOpen ? "entry current" : "entry"}>
      <button type="button" class="entry-title" aria-current=${isOpen ? "true" : undefined} onClick=${() => onShow(conversation)}>
        ${title}
        ${chat.answering.has(conversation.id) && html`<span class="pulse" role="img" aria-label=${t("writing")}></span>`}
      </button>
      <${IconButton} icon="pencil" label=${t("rename.named", { title })} onClick=${() => setRenamed(true)} />
      <${IconButton} icon="trash" label=${t("delete.named", { title })} onClick=${remove} />
    </li>
  `;
}

function NameField({ title, onEnd }) {
  const { t } = useChat();
  const field = useRef(null);
  const isEnded = useRef(false); // the field loses the focus when it goes
  useEffect(() => field.current.select(), []);
  const end = (name) => {
    if (isEnded.current) return;
    isEnded.current = true;
    onEnd(name);
  };
  const key = (event) => {
    if (event.isComposing) return;
    if (event.key === "Enter") end(event.target.value);
    if (event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    end(null);
  };
  return html`
    <input
      ref=${field}
      class="field entry-name"
      aria-label=${t("rename")}
      defaultValue=${title}
      maxlength="200"
      onKeyDown=${key}
      onBlur=${(event) => end(event.target.value)}
    />
  `;
}

export function Sidebar({ onShow, onNew, onHelp, onClose }) {
  const { t, chat } = useChat();
  const [search, setSearch] = useState("");
  const words = search.toLowerCase().split(/\s+/).filter(Boolean);
  const found = chat.list().filter((conversation) => matches(conversation, words));
  const groups = Map.groupBy ? Map.groupBy(found, groupOf) : new Map([["all", found]]);
  const lists = [];
  for (const [name, conversations] of groups) {
    lists.push(html`
      <section key=${name} aria-label=${t(`group.${name}`)}>
        <h3>${t(`group.${name}`)}</h3>
        <ul role="list">
          ${conversations.map((one) => html`<${Entry} key=${one.id} conversation=${one} onShow=${onShow} />`)}
        </ul>
      </section>
    `);
  }
  return html`
    <div class="side-head">
      <h2>${t("conversations")}</h2>
      <${IconButton} icon="close" label=${t("conversations.hide")} onClick=${onClose} />
    </div>
    <button type="button" class="button new" onClick=${onNew}><${Icon} name="plus" />${t("new")}</button>
    <label class="search">
      <span class="visually-hidden">${t("search")}</span>
      <${Icon} name="search" />
      <input type="search" class="field" placeholder=${t("search")} value=${search} onInput=${(event) => setSearch(event.target.value)} />
    </label>
    <div class="entries">
      ${lists}
      ${!found.length && html`<p class="muted">${t(words.length ? "search.none" : "conversations.none")}</p>`}
    </div>
    ${!chat.isKept && html`<p class="muted">${t("not.kept")}</p>`}
    <${Foot} onHelp=${onHelp} />
  `;
}

function Foot({ onHelp }) {
  const { t, chat, settings } = useChat();
  const field = useRef(null);
  const all = chat.list();
  const read = async () => {
    const [file] = field.current.files;
    field.current.value = "";
    try {
      const found = readFile(await file.text());
      chat.import(found);
      chat.tell(t("imported", { count: found.length }));
    } catch (error) {
      chat.tell(t("import.failed", { reason: error.message }));
    }
  };
  const backup = () => download("conversations.json", asBackup(all), "application/json");
  const rows = () => download("conversations.jsonl", asRows(all, settings), "application/jsonl");
  return html`
    <div class="side-foot">
      <input ref=${field} type="file" accept=".json,.jsonl,application/json" hidden aria-label=${t("import")} onChange=${read} />
      <button type="button" class="small" onClick=${() => field.current.click()}>${t("import")}</button>
      <button type="button" class="small" disabled=${!all.length} onClick=${backup}>${t("export.all")}</button>
      <button type="button" class="small" disabled=${!all.length} onClick=${rows}>${t("export.rows")}</button>
      <button type="button" class="small" aria-haspopup="dialog" onClick=${onHelp}>${t("help")}</button>
    </div>
  `;
}
