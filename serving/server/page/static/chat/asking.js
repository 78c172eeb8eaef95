// One answer while it is written: asks the server, runs calls of tools, and keeps what came before a stop or an error.
import { ApiError, chat } from "../api.js";
import { Observed } from "./observed.js";
import { requestFields } from "./parameters.js";
import { addCallPieces, offeredTools, repeatable, runCall, tooMany } from "./tools.js";
import { answerMessages, messagesOf, pathTo } from "./tree.js";

const SAVE_MS = 1000;
const RENDER_SHARE = 4; // an answer is shown again after at least so many times what showing it took

export class Answering extends Observed {
  // `save()` keeps the conversation; `cost_ms` is told by what shows the answer.
  constructor(conversation, node, settings, save) {
    super();
    Object.assign(this, { conversation, node, settings, save, costMs: 0 });
    this.controller = new AbortController();
    this.frame = 0;
    this.shownMs = 0;
    this.savedMs = performance.now();
  }

  stop() {
    this.controller.abort();
  }

  // Ends when the answer has; never throws.
  async run() {
    const { node } = this;
    try {
      await this.answer();
    } catch (error) {
      if (this.controller.signal.aborted) node.end = "stopped";
      else this.fail(error);
    }
  }

  fail(error) {
    const status = error instanceof ApiError ? error.status : null;
    Object.assign(this.node, { end: "error", error: { status, message: error.message } });
  }

  async answer() {
    const { conversation, node, settings } = this;
    const before = messagesOf(conversation, pathTo(conversation, node.parent));
    const rounds = settings.tool_rounds ?? 0;
    for (let round = 0; ; round += 1) {
      const tools = round < rounds ? offeredTools(settings, conversation.tools) : [];
      const { calls, end } = await this.ask([...before, ...answerMessages(node)], tools);
      if (!tools.length || !calls.length) {
        node.end = end;
        return;
      }
      await this.runCalls(calls);
    }
  }

  // {calls, end} of one reply, whose text is in the node.
  async ask(messages, tools) {
    const { node } = this;
    const body = { ...requestFields(node.parameters), messages };
    if (node.model) body.model = node.model;
    if (tools.length) body.tools = tools;
    const calls = [];
    let end = null;
    for await (const chunk of chat(body, this.controller.signal)) {
      const [choice] = chunk.choices;
      if (chunk.glm_foundry) node.report = chunk.glm_foundry;
      if (!choice) continue;
      node.text += choice.delta.content ?? "";
      addCallPieces(calls, choice.delta.tool_calls ?? []);
      end = choice.finish_reason ?? end;
      this.show();
    }
    if (end === null) throw new Error("the answer ended early");
    return { calls, end };
  }

  async runCalls(calls) {
    const { conversation, node, settings } = this;
    const step = { text: node.text, calls: calls.map(repeatable), report: node.report };
    node.steps.push(step);
    Object.assign(node, { text: "", report: null });
    this.show();
    const most = settings.tool_calls ?? Infinity;
    for (const [place, call] of step.calls.entries()) {
      this.controller.signal.throwIfAborted();
      call.result = place < most ? await runCall(conversation.id, call, this.controller.signal) : tooMany(most);
      this.show();
    }
  }

  // Shows what came at the next frame, or later where showing is slow.
  show() {
    const now = performance.now();
    if (now - this.savedMs > SAVE_MS) {
      this.savedMs = now;
      this.save();
    }
    if (this.frame) return;
    const wait = this.shownMs + RENDER_SHARE * this.costMs - now;
    const next = () => {
      this.frame = requestAnimationFrame(() => {
        this.frame = 0;
        this.shownMs = performance.now();
        this.changed();
      });
    };
    if (wait > 0) this.frame = setTimeout(next, wait);
    else next();
  }
}
