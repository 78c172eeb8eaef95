import { html } from "../html.js";

export function LiveView({ t }) {
  return html`<h1 class="visually-hidden">${t("nav.live")}</h1>`;
}
