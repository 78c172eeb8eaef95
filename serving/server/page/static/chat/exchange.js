// Conversations to files and back: training rows, Markdown, and all of them as they are.
import { checkedConversation, conversationOfMessages } from "./checked.js";
import { messagesOf, newId, shownPath, usesTools } from "./tree.js";

const KIND = "glm-foundry-conversations";

// One line of JSON, {"messages": [...]}: a row that train.py reads.
export function asRow(conversation, settings) {
  const path = shownPath(conversation);
  const row = { messages: messagesOf(conversation, path) };
  if (usesTools(path) && settings.tools?.length) row.tools = settings.tools;
  return `${JSON.stringify(row)}\n`;
}

// Those that have an answer: without one there is nothing to learn.
export function asRows(conversations, settings) {
  const answered = conversations.filter((one) => shownPath(one).some(({ role, text }) => role === "assistant" && text));
  return answered.map((conversation) => asRow(conversation, settings)).join("");
}

export function asBackup(conversations) {
  return `${JSON.stringify({ kind: KIND, version: 1, conversations }, null, 1)}\n`;
}

export function asMarkdown(conversation, t) {
  const parts = [`# ${conversation.title}`];
  if (conversation.system.trim()) parts.push(`## ${t("system")}`, conversation.system);
  for (const node of shownPath(conversation)) {
    parts.push(`## ${node.role === "user" ? t("you") : node.model || t("answer")}`);
    for (const step of node.steps ?? []) {
      if (step.text) parts.push(step.text);
      for (const call of step.calls) parts.push(...callParts(call, t));
    }
    if (node.text) parts.push(node.text);
  }
  return `${parts.join("\n\n")}\n`;
}

function callParts({ name, arguments: given, result }, t) {
  const parts = [`**${t("tool.call", { name })}**`, fenced(given, "json")];
  if (result) parts.push(fenced(result.text, ""));
  return parts;
}

// A fence longer than any within the text.
function fenced(text, language) {
  const runs = text.match(/`+/g) ?? [];
  const fence = "`".repeat(Math.max(3, ...runs.map((run) => run.length + 1)));
  return `${fence}${language}\n${text}\n${fence}`;
}

// Conversations in a file's text: a backup of this page, rows of messages, one or many, as JSON or JSON lines.
// Throws an Error that says what is wrong.
export function readFile(text) {
  const found = [];
  for (const [number, value] of valuesOf(text).entries()) {
    try {
      found.push(value.nodes ? checkedConversation(value) : conversationOfMessages(value));
    } catch (error) {
      throw new Error(`${number + 1}: ${error.message}`);
    }
  }
  if (!found.length) throw new Error("no conversation");
  for (const conversation of found) conversation.id = newId(); // what is there already stays
  return found;
}

function valuesOf(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    value = text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
  }
  const values = value?.kind === KIND ? value.conversations : [value].flat();
  const areObjects = Array.isArray(values) && values.every((one) => one !== null && typeof one === "object");
  if (!areObjects) throw new Error("no conversation");
  return values;
}

export function download(name, text, type) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

// A file's name from a title.
export function fileName(title, ending) {
  const plain = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return `${plain.slice(0, 60) || "conversation"}.${ending}`;
}
