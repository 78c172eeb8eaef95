// Conversations from files and from this browser's store: only what has the right form is taken.
import { argumentsOf } from "./tools.js";
import { fitParameters } from "./parameters.js";
import { ROOT, addNode, newConversation, newId, titleOf } from "./tree.js";

const ID = /^[A-Za-z0-9-]{1,64}$/;
const PNG = /^[A-Za-z0-9+/]+={0,2}$/; // base64
const ENDS = ["stop", "length", "stopped", "error"];

const textOf = (value) => (typeof value === "string" ? value : "");
const listOf = (value) => (Array.isArray(value) ? value : []);
const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

// A conversation of this page. Throws an Error where it is none.
export function checkedConversation(value) {
  if (!isObject(value) || !isObject(value.nodes)) throw new Error("no conversation");
  const conversation = newConversation(checkedSetup(value));
  if (ID.test(value.id)) conversation.id = value.id;
  conversation.title = textOf(value.title);
  conversation.named = value.named === true;
  conversation.created = timeOf(value.created);
  conversation.updated = timeOf(value.updated);
  copyBelow(value.nodes, ROOT, conversation, ROOT);
  return conversation;
}

export function checkedSetup(value) {
  const names = Array.isArray(value.tools?.names) ? value.tools.names.map(textOf) : null;
  return {
    system: textOf(value.system),
    model: typeof value.model === "string" ? value.model : null,
    parameters: fitParameters(value.parameters),
    tools: { on: value.tools?.on === true, names },
  };
}

function timeOf(value) {
  return Number.isFinite(value) ? value : Date.now();
}

// Copies what stands below a node; a node that was seen already is left out, so circles end.
function copyBelow(nodes, from, conversation, to) {
  const waiting = [[from, to]];
  const seen = new Set([ROOT]);
  while (waiting.length) {
    const [source, target] = waiting.pop();
    const ids = listOf(Object.hasOwn(nodes, source) ? nodes[source]?.children : []);
    for (const id of ids) {
      if (typeof id !== "string" || seen.has(id) || !Object.hasOwn(nodes, id)) continue;
      seen.add(id);
      const fields = checkedNode(nodes[id]);
      if (fields === null) continue;
      if (ID.test(id)) fields.id = id;
      waiting.push([id, addNode(conversation, target, fields).id]);
    }
    const { chosen } = nodes[source] ?? {};
    const parent = conversation.nodes[target];
    if (parent.children.includes(chosen)) parent.chosen = chosen;
  }
}

function checkedNode(value) {
  if (!isObject(value)) return null;
  const fields = { text: textOf(value.text), at: timeOf(value.at) };
  if (value.role === "user") return { role: "user", ...fields };
  if (value.role !== "assistant") return null;
  return {
    role: "assistant",
    ...fields,
    steps: listOf(value.steps).filter(isObject).map(checkedStep),
    model: typeof value.model === "string" ? value.model : null,
    parameters: fitParameters(value.parameters),
    report: checkedReport(value.report),
    end: ENDS.includes(value.end) ? value.end : "stopped",
    error: isObject(value.error) ? checkedError(value.error) : null,
    feedback: checkedFeedback(value.feedback),
  };
}

function checkedError({ status, message }) {
  return { status: Number.isInteger(status) ? status : null, message: textOf(message) };
}

function checkedFeedback(value) {
  const rating = ["up", "down"].includes(value?.rating) ? value.rating : null;
  return { rating, correction: typeof value?.correction === "string" ? value.correction : null };
}

function checkedReport(value) {
  if (!isObject(value) || !Number.isFinite(value.output_tokens)) return null;
  const report = structuredClone(value);
  for (const name of ["latency_s", "queue_s", "slo_s"]) {
    if (!Number.isFinite(report[name])) report[name] = null;
  }
  const predicted = report.predicted_tokens;
  const fits = Number.isFinite(predicted?.median) && Number.isFinite(predicted?.q90);
  return { ...report, predicted_tokens: fits ? predicted : null };
}

function checkedStep(value) {
  const calls = listOf(value.calls).filter(isObject).map(checkedCall);
  return { text: textOf(value.text), calls, report: checkedReport(value.report) };
}

function checkedCall(value) {
  const given = textOf(value.arguments);
  const call = { id: textOf(value.id) || newId(), name: textOf(value.name) || "unknown" };
  call.arguments = argumentsOf(given) === null ? "{}" : given;
  const asked = isObject(value.asked) ? value.asked : call;
  call.asked = { name: textOf(asked.name), arguments: textOf(asked.arguments) };
  call.result = isObject(value.result) ? checkedResult(value.result) : null;
  return call;
}

function checkedResult(value) {
  const images = listOf(value.images).filter((image) => typeof image === "string" && PNG.test(image));
  return { text: textOf(value.text), images, failed: value.failed === true };
}

// A conversation of {"messages": [...]}. Throws an Error where they have another form.
export function conversationOfMessages({ messages, title }) {
  const conversation = newConversation();
  let last = ROOT;
  let answer = null;
  for (const message of listOf(messages)) {
    const text = contentOf(message);
    if (message.role === "system" || message.role === "developer") {
      conversation.system = [conversation.system, text].filter(Boolean).join("\n\n");
    } else if (message.role === "user") {
      last = addNode(conversation, last, { role: "user", text }).id;
      answer = null;
    } else if (message.role === "assistant") {
      answer ??= addNode(conversation, last, checkedNode({ role: "assistant", end: "stop" }));
      last = answer.id;
      addPart(answer, message, text);
    } else if (["tool", "function"].includes(message.role) && answer) {
      addResult(answer, message, text);
    } else {
      throw new Error(`unknown role ${JSON.stringify(message.role)?.slice(0, 40)}`);
    }
  }
  const first = Object.values(conversation.nodes).find((node) => node.role === "user");
  if (!first) throw new Error("no question");
  conversation.title = textOf(title) || titleOf(first.text);
  return conversation;
}

function contentOf(message) {
  if (!isObject(message)) throw new Error("a message is no object");
  if (Array.isArray(message.content)) return message.content.map((part) => textOf(part?.text)).join("\n");
  return textOf(message.content);
}

function addPart(answer, message, text) {
  const calls = listOf(message.tool_calls).filter(isObject);
  if (!calls.length) {
    answer.text = [answer.text, text].filter(Boolean).join("\n\n");
    return;
  }
  const read = calls.map((call) => checkedCall({ id: call.id, ...call.function }));
  answer.steps.push({ text, calls: read, report: null });
}

function addResult(answer, message, text) {
  const calls = answer.steps.flatMap((step) => step.calls);
  const open = calls.filter((call) => call.result === null);
  const call = open.find(({ id }) => id === message.tool_call_id) ?? open[0];
  if (call) call.result = { text, images: [], failed: false };
}
