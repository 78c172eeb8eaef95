import { html } from "../html.js";

export function ChatView({ t }) {
  return html`<h1 class="visually-hidden">${t("nav.chat")}</h1>`;
}
