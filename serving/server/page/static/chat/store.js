// Conversations in this browser's IndexedDB, one entry each; other tabs are told of changes.
import { createStore, del, entries, get, set } from "../vendor/idb-keyval.js";
import { checkedConversation } from "./checked.js";

const store = createStore("glm-foundry", "conversations");
const tabs = "BroadcastChannel" in globalThis ? new BroadcastChannel("glm-foundry") : null;

// All that can be read.
export async function loadAll() {
  const found = [];
  for (const [, value] of await entries(store)) {
    const conversation = readable(value);
    if (conversation !== null) found.push(conversation);
  }
  return found;
}

function readable(value) {
  try {
    return checkedConversation(value);
  } catch {
    return null;
  }
}

export async function load(id) {
  const value = await get(id, store);
  return value === undefined ? null : readable(value);
}

export async function save(conversation) {
  await set(conversation.id, conversation, store);
  tabs?.postMessage(conversation.id);
}

export async function remove(id) {
  await del(id, store);
  tabs?.postMessage(id);
}

// Calls `changed(id)` for what another tab saved or deleted.
export function onOtherTabs(changed) {
  tabs?.addEventListener("message", ({ data }) => changed(data));
}
