// What the chat page is about: the conversations, the one that is open, and the answers that are being written.
// It outlives the view, so that an answer goes on while the live view is looked at.
import { endTools, models as listModels } from "../api.js";
import { Answering } from "./asking.js";
import { Observed } from "./observed.js";
import * as store from "./store.js";
import { checkedSetup } from "./checked.js";
import { ROOT, emptyAnswer, newConversation, pathTo, question, removeNode, shownPath, showSibling } from "./tree.js";

const OPEN = "chat.open";
const SETUP = "chat.setup";

export class Chat extends Observed {
  conversations = new Map();
  open = newConversation(keptSetup());
  answering = new Map(); // by conversation
  drafts = new Map();
  models = [];
  notice = null; // {text, undo}: shown for a while
  said = ""; // for screen readers
  isLoaded = false;
  isKept = true;

  async load() {
    if (this.isLoaded) return;
    this.isLoaded = true;
    store.onOtherTabs((id) => this.reload(id));
    try {
      for (const conversation of await store.loadAll()) this.conversations.set(conversation.id, conversation);
    } catch {
      this.isKept = false;
    }
    const last = this.conversations.get(localStorage.getItem(OPEN));
    if (last && !shownPath(this.open).length) {
      const typed = this.drafts.get(this.open.id); // while the conversations were read
      if (typed) this.drafts.set(last.id, typed);
      this.open = last;
    }
    this.changed();
  }

  async loadModels() {
    try {
      this.models = await listModels();
      this.changed();
    } catch {
      // the list stays as it is: a question says what is wrong
    }
  }

  async reload(id) {
    if (this.answering.has(id)) return;
    const conversation = await store.load(id);
    if (conversation === null) this.conversations.delete(id);
    else this.conversations.set(id, conversation);
    if (this.open.id === id) this.open = conversation ?? newConversation(keptSetup());
    this.changed();
  }

  // The newest first.
  list() {
    return [...this.conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  answeringNow() {
    return this.answering.get(this.open.id) ?? null;
  }

  start() {
    this.show(newConversation(keptSetup()));
  }

  show(conversation) {
    this.open = conversation;
    localStorage.setItem(OPEN, conversation.id);
    this.changed();
  }

  // Saves a conversation that has a question; an empty one is not worth an entry.
  async keep(conversation) {
    if (!conversation.nodes[ROOT].children.length) return;
    this.conversations.set(conversation.id, conversation);
    try {
      await store.save(conversation);
    } catch {
      if (this.isKept) {
        this.isKept = false;
        this.changed();
      }
    }
  }

  touch(conversation) {
    conversation.updated = Date.now();
    this.keep(conversation);
    this.changed();
  }

  rename(conversation, title) {
    if (!title.trim()) return;
    Object.assign(conversation, { title: title.trim(), named: true });
    this.keep(conversation);
    this.changed();
  }

  // `notice`: what is said; its undo brings the conversation back.
  remove(conversation, notice) {
    this.answering.get(conversation.id)?.stop();
    this.conversations.delete(conversation.id);
    store.remove(conversation.id).catch(() => {});
    const wasOpen = this.open === conversation;
    if (wasOpen) this.start();
    const undo = () => {
      this.keep(conversation);
      if (wasOpen) this.show(conversation);
      else this.changed();
    };
    this.tell(notice, undo, () => usedTools(conversation) && endTools(conversation.id).catch(() => {}));
  }

  import(conversations) {
    for (const conversation of conversations) this.keep(conversation);
    this.show(conversations[0]);
  }

  setUp(changes) {
    Object.assign(this.open, changes);
    this.keep(this.open);
    this.changed();
  }

  keepSetup() {
    localStorage.setItem(SETUP, JSON.stringify(checkedSetup(this.open)));
  }

  ask(text, settings) {
    const path = shownPath(this.open);
    const asked = question(this.open, path.at(-1)?.id ?? ROOT, text);
    localStorage.setItem(OPEN, this.open.id);
    return this.answer(asked.id, settings);
  }

  edit(node, text, settings) {
    const asked = question(this.open, node.parent, text);
    return this.answer(asked.id, settings);
  }

  // Another answer beside `node`; in its place where nothing was written.
  retry(node, settings) {
    const { parent } = node;
    if (!node.text && !node.steps.length) removeNode(this.open, node);
    return this.answer(parent, settings);
  }

  async answer(parent, settings) {
    const conversation = this.open;
    if (this.answering.has(conversation.id)) return;
    const node = emptyAnswer(conversation, parent);
    node.model ??= settings.model;
    const answering = new Answering(conversation, node, settings, () => this.keep(conversation));
    this.answering.set(conversation.id, answering);
    this.touch(conversation);
    await answering.run();
    this.answering.delete(conversation.id);
    conversation.updated = Date.now();
    const isDeleted = !this.conversations.has(conversation.id);
    if (!isDeleted) await this.keep(conversation);
    this.changed();
    return node;
  }

  stop() {
    this.answeringNow()?.stop();
  }

  step(node, step) {
    const shown = showSibling(this.open, node, step);
    this.keep(this.open);
    this.changed();
    return shown;
  }

  removeNode(node, notice) {
    const conversation = this.open;
    if (this.answering.has(conversation.id)) return;
    const putBack = removeNode(conversation, node);
    this.touchOrForget(conversation);
    this.tell(notice, () => {
      putBack();
      this.touch(conversation);
    });
  }

  touchOrForget(conversation) {
    if (conversation.nodes[ROOT].children.length) this.touch(conversation);
    else {
      this.conversations.delete(conversation.id);
      store.remove(conversation.id).catch(() => {});
      this.changed();
    }
  }

  // Shows a line; `after` runs when it goes and nothing was undone.
  tell(text, undo = null, after = null) {
    this.notice?.after?.();
    this.notice = { text, undo, after };
    this.changed();
  }

  endNotice(undone = false) {
    const { notice } = this;
    this.notice = null;
    if (undone) notice?.undo();
    else notice?.after?.();
    this.changed();
  }

  say(text) {
    this.said = text;
    this.changed();
  }

  pathTo(node) {
    return pathTo(this.open, node.id);
  }
}

function usedTools({ nodes }) {
  return Object.values(nodes).some((node) => node.steps?.length);
}

function keptSetup() {
  try {
    return checkedSetup(JSON.parse(localStorage.getItem(SETUP) ?? "{}"));
  } catch {
    return {};
  }
}

export const theChat = new Chat();
