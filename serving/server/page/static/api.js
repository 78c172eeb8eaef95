// The server's API. Every request carries the key where there is one, so events are read by fetch, not by EventSource.
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function currentKey() {
  return sessionStorage.getItem("key") ?? localStorage.getItem("key");
}

export function keepKey(key, remember) {
  forgetKey();
  if (key) (remember ? localStorage : sessionStorage).setItem("key", key);
}

export function forgetKey() {
  sessionStorage.removeItem("key");
  localStorage.removeItem("key");
}

// The response; throws ApiError with the server's own line. Paths are relative, so a proxy may serve the page below a folder.
export async function request(path, { body, signal } = {}) {
  const headers = {};
  const key = currentKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  const response = await fetch(path, {
    method: body === undefined ? "GET" : "POST",
    headers,
    body: body === undefined ? undefined : JSON.stringify(body),
    signal,
    cache: "no-store",
  });
  if (!response.ok) throw new ApiError(response.status, await errorLine(response));
  return response;
}

async function errorLine(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`;
  }
}

export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

// Server-sent events as {event, data} with the data's text, until the server ends them or `signal` aborts.
export async function* streamEvents(path, options) {
  const response = await request(path, options);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      buffer += value;
      const blocks = buffer.split(/\r?\n\r?\n/);
      buffer = blocks.pop();
      for (const block of blocks) {
        const event = parseEvent(block);
        if (event !== null) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  return data.length ? { event, data: data.join("\n") } : null;
}

export const access = () => requestJson("page/api/access");
export const settings = () => requestJson("page/api/settings");
export const models = async () => (await requestJson("v1/models")).data;
export const callTool = (body, signal) => requestJson("page/api/tools/call", { body, signal });
export const endTools = (conversation) => requestJson("page/api/tools/end", { body: { conversation } });
export const sendFeedback = (body) => requestJson("page/api/feedback", { body });

// The chunks of an answer, parsed; throws ApiError where the server says so within the stream.
export async function* chat(body, signal) {
  const streaming = { ...body, stream: true, stream_options: { include_usage: true } };
  for await (const { data } of streamEvents("v1/chat/completions", { body: streaming, signal })) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.code ?? 500, chunk.error.message);
    yield chunk;
  }
}

// {kind: "history", snapshots} first, then {kind: "snapshot", snapshot} once a second.
export async function* live(seconds, signal) {
  for await (const { event, data } of streamEvents(`page/api/live?seconds=${seconds}`, { signal })) {
    if (event === "history") yield { kind: "history", snapshots: JSON.parse(data) };
    if (event === "snapshot") yield { kind: "snapshot", snapshot: JSON.parse(data) };
  }
}
