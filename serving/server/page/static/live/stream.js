// Follows the server's snapshots; after a cut it tries again, later each time, until it is stopped.
import { ApiError, live } from "../api.js";

const HISTORY_S = 600;
const SILENCE_S = 6; // the server sends one snapshot a second
const FIRST_WAIT_S = 1;
const LONGEST_WAIT_S = 15;

// on.snapshots([...]), on.state({kind: "connecting" | "open" | "cut" | "refused", retryAt, reason}).
export class Stream {
  constructor(on) {
    this.on = on;
    this.wait = FIRST_WAIT_S;
    this.stopped = false;
    this.again = () => this.connect();
  }

  start() {
    addEventListener("online", this.again);
    this.connect();
  }

  stop() {
    this.stopped = true;
    removeEventListener("online", this.again);
    this.end();
  }

  end() {
    clearTimeout(this.timer);
    clearTimeout(this.silence);
    this.abort?.abort();
    this.abort = null;
  }

  async connect() {
    this.end();
    const abort = new AbortController();
    this.abort = abort;
    this.on.state({ kind: "connecting" });
    let reason = "";
    try {
      this.listen(abort);
      for await (const message of live(HISTORY_S, abort.signal)) {
        this.listen(abort);
        this.wait = FIRST_WAIT_S;
        this.on.state({ kind: "open" });
        this.on.snapshots(message.kind === "history" ? message.snapshots : [message.snapshot]);
      }
    } catch (error) {
      if (error instanceof ApiError && [401, 403, 404].includes(error.status)) {
        this.end();
        this.on.state({ kind: "refused", reason: error.message });
        return;
      }
      reason = error.message;
    }
    if (!this.stopped && this.abort === abort) this.retry(reason);
  }

  // Ends a connection that says nothing any more: a network that went away closes none.
  listen(abort) {
    clearTimeout(this.silence);
    this.silence = setTimeout(() => abort.abort(), SILENCE_S * 1000);
  }

  retry(reason) {
    this.end();
    this.on.state({ kind: "cut", reason, retryAt: Date.now() + this.wait * 1000 });
    this.timer = setTimeout(this.again, this.wait * 1000);
    this.wait = Math.min(this.wait * 2, LONGEST_WAIT_S);
  }
}
