// Calls of tools within one answer. The server runs them; serving/tools/loop.py is the same loop in Python.
import { ApiError, callTool } from "../api.js";

const NAME = /^[a-zA-Z0-9_-]{1,64}$/;
const UNAUTHORIZED = 401;
const BUSY = 429;
const TRIES = 5;
const WAIT_MS = 2000;

// The tools that a conversation's answers may call.
export function offeredTools(settings, { on, names }) {
  if (!on || !settings.takes_tools) return [];
  const tools = settings.tools ?? [];
  return names === null ? tools : tools.filter((tool) => names.includes(tool.function.name));
}

// Adds the pieces of a chunk to `calls`, which are OpenAI's tool_calls as far as they have come.
export function addCallPieces(calls, pieces) {
  for (const piece of pieces) {
    const place = piece.index ?? calls.length;
    calls[place] ??= { id: "", name: "", arguments: "" };
    calls[place].id ||= piece.id ?? "";
    calls[place].name += piece.function?.name ?? "";
    calls[place].arguments += piece.function?.arguments ?? "";
  }
}

// A call as a server takes it back: a name, and arguments that are an object. `asked` keeps what the model wrote.
export function repeatable(call, number) {
  const fits = argumentsOf(call.arguments) !== null;
  return {
    id: call.id || `call_${number}`,
    name: NAME.test(call.name) ? call.name : "unknown",
    arguments: fits ? call.arguments : "{}",
    asked: { name: call.name, arguments: call.arguments },
    result: null,
  };
}

// The object that JSON text holds; null where it holds none.
export function argumentsOf(text) {
  try {
    const value = JSON.parse(text || "{}");
    return value !== null && typeof value === "object" && !Array.isArray(value) ? value : null;
  } catch {
    return null;
  }
}

// {text, images, failed}. A call that the server refuses is a result that says why; the model goes on with it.
// A server that runs too many calls at once is asked again.
export async function runCall(conversation, { asked }, signal) {
  const body = { conversation, name: asked.name, arguments: asked.arguments || "{}" };
  for (let left = TRIES - 1; ; left -= 1) {
    try {
      return await callTool(body, signal);
    } catch (error) {
      if (!(error instanceof ApiError) || error.status === UNAUTHORIZED) throw error;
      if (error.status !== BUSY || left === 0) return { text: error.message, images: [], failed: true };
    }
    await new Promise((resolve) => setTimeout(resolve, WAIT_MS));
    signal.throwIfAborted();
  }
}

export function tooMany(most) {
  return { text: `at most ${most} calls of an answer are run`, images: [], failed: true };
}
