// Text to the clipboard, also where the page comes by plain HTTP and has no clipboard of its own.
import { html, useEffect, useRef, useState } from "../html.js";
import { useChat } from "./context.js";
import { IconButton } from "./icons.js";

const SHOWN_MS = 1500;

export async function copyText(text) {
  if (navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // not allowed: the older way may be
    }
  }
  const field = document.createElement("textarea");
  const focused = document.activeElement;
  field.value = text;
  field.className = "visually-hidden";
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return copied;
}

export function CopyButton({ text, label }) {
  const { t, chat } = useChat();
  const [isCopied, setCopied] = useState(false);
  const timer = useRef(0);
  useEffect(() => () => clearTimeout(timer.current), []);
  const copy = async () => {
    const copied = await copyText(text);
    chat.say(t(copied ? "copied" : "copy.failed"));
    if (!copied) return;
    setCopied(true);
    clearTimeout(timer.current);
    timer.current = setTimeout(() => setCopied(false), SHOWN_MS);
  };
  return html`<${IconButton} icon=${isCopied ? "check" : "copy"} label=${label ?? t("copy")} onClick=${copy} />`;
}

// For the copy buttons within rendered Markdown.
export async function copyCode(event, { t, chat }) {
  const button = event.target.closest?.("button[data-copy]");
  if (!button) return;
  const copied = await copyText(button.closest(".code").querySelector("pre").textContent);
  button.textContent = t(copied ? "copied" : "copy.failed");
  chat.say(button.textContent);
  setTimeout(() => {
    button.textContent = t("copy");
  }, SHOWN_MS);
}
