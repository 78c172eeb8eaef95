// A conversation: a tree of questions and answers, of which one path is shown.
// An edited question and a repeated answer are siblings of the first one.
export const ROOT = "root";
const TITLE_CHARACTERS = 60;

// 32 hexadecimal digits; crypto.randomUUID is missing where the page comes by plain HTTP.
export function newId() {
  let id = "";
  for (const byte of crypto.getRandomValues(new Uint8Array(16))) id += byte.toString(16).padStart(2, "0");
  return id;
}

// `setup`: {system, model, parameters, tools: {on, names}}; names null stands for all tools.
export function newConversation(setup = {}) {
  const now = Date.now();
  return {
    version: 1,
    id: newId(),
    title: "",
    named: false,
    created: now,
    updated: now,
    system: "",
    model: null,
    parameters: {},
    tools: { on: false, names: null },
    ...structuredClone(setup),
    nodes: { [ROOT]: { id: ROOT, parent: null, role: ROOT, children: [], chosen: null } },
  };
}

// What stands in a conversation once more, below `parent` and shown.
export function addNode(conversation, parent, fields) {
  const node = { id: newId(), parent, at: Date.now(), children: [], chosen: null, ...fields };
  conversation.nodes[node.id] = node;
  conversation.nodes[parent].children.push(node.id);
  conversation.nodes[parent].chosen = node.id;
  return node;
}

export function question(conversation, parent, text) {
  if (parent === ROOT && !conversation.named) conversation.title = titleOf(text);
  return addNode(conversation, parent, { role: "user", text });
}

// An answer that is still to be written. end: null while it is, then stop, length, stopped or error.
export function emptyAnswer(conversation, parent) {
  const { model, parameters } = conversation;
  return addNode(conversation, parent, {
    role: "assistant",
    text: "",
    steps: [],
    model,
    parameters: { ...parameters },
    report: null,
    end: null,
    error: null,
    feedback: { rating: null, correction: null },
  });
}

export function titleOf(text) {
  const [line] = text.trim().split("\n");
  const characters = [...line];
  if (characters.length <= TITLE_CHARACTERS) return line;
  return `${characters.slice(0, TITLE_CHARACTERS).join("")}…`;
}

// The nodes that are shown, oldest first.
export function shownPath(conversation) {
  const path = [];
  let node = conversation.nodes[ROOT];
  while (node.chosen !== null) {
    node = conversation.nodes[node.chosen];
    path.push(node);
  }
  return path;
}

// The nodes from the first question to `id`.
export function pathTo(conversation, id) {
  const path = [];
  for (let node = conversation.nodes[id]; node.id !== ROOT; node = conversation.nodes[node.parent]) {
    path.unshift(node);
  }
  return path;
}

// {place, count}: the node is the place-th (from 1) of so many.
export function placeOf(conversation, node) {
  const siblings = conversation.nodes[node.parent].children;
  return { place: siblings.indexOf(node.id) + 1, count: siblings.length };
}

export function showSibling(conversation, node, step) {
  const parent = conversation.nodes[node.parent];
  const next = parent.children[parent.children.indexOf(node.id) + step];
  if (next === undefined) return null;
  parent.chosen = next;
  return conversation.nodes[next];
}

// Takes a node out, with all below it; the result puts it back.
export function removeNode(conversation, node) {
  const parent = conversation.nodes[node.parent];
  const place = parent.children.indexOf(node.id);
  parent.children.splice(place, 1);
  parent.chosen = parent.children[Math.min(place, parent.children.length - 1)] ?? null;
  const removed = below(conversation, node);
  for (const one of removed) delete conversation.nodes[one.id];
  return () => {
    for (const one of removed) conversation.nodes[one.id] = one;
    parent.children.splice(place, 0, node.id);
    parent.chosen = node.id;
  };
}

function below(conversation, node) {
  const found = [node];
  for (const one of found) {
    for (const id of one.children) found.push(conversation.nodes[id]);
  }
  return found;
}

// OpenAI's messages of a path: what a server is asked and a row of training data holds.
export function messagesOf(conversation, path) {
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system });
  for (const node of path) {
    if (node.role === "user") messages.push({ role: "user", content: node.text });
    else messages.push(...answerMessages(node));
  }
  return messages;
}

export function answerMessages(node) {
  const messages = [];
  for (const { text, calls } of node.steps) {
    const toolCalls = [];
    for (const { id, name, arguments: given } of calls) {
      toolCalls.push({ id, type: "function", function: { name, arguments: given } });
    }
    messages.push({ role: "assistant", content: text, tool_calls: toolCalls });
    for (const call of calls) {
      const content = call.result?.text ?? "not run: stopped";
      messages.push({ role: "tool", tool_call_id: call.id, content });
    }
  }
  if (node.text) messages.push({ role: "assistant", content: node.text });
  return messages;
}

export function usesTools(path) {
  return path.some((node) => node.role === "assistant" && node.steps.length > 0);
}
