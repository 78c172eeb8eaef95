// Line icons, 20 by 20. They are decoration: the button around one has the name.
import { html } from "../html.js";

const PATHS = {
  menu: "M3 6h14M3 10h14M3 14h14",
  plus: "M10 4v12M4 10h12",
  settings: "M3 6h8M15 6h2M3 14h2M9 14h8M13 4v4M7 12v4",
  close: "M5 5l10 10M15 5L5 15",
  pencil: "M4 16l1-4 8-8 3 3-8 8zM11 6l3 3",
  trash: "M4 6h12M8 6V4h4v2M6 6l1 10h6l1-10",
  copy: "M7 7V4h9v9h-3M4 7h9v9H4z",
  check: "M4 10.5l4 4 8-9",
  retry: "M15.5 8A6 6 0 1 0 16 11M16 4v4h-4",
  up: "M6.5 9v7H4V9zM6.5 9L9.5 3.5c1.5 0 2 1 1.7 2.2L10.7 8H15c1 0 1.6.8 1.4 1.7l-1.1 5c-.2.8-.8 1.3-1.6 1.3H6.5",
  down: "M13.5 11V4H16v7zM13.5 11l-3 5.5c-1.5 0-2-1-1.7-2.2L9.3 12H5c-1 0-1.6-.8-1.4-1.7l1.1-5C4.9 4.5 5.5 4 6.3 4h7.2",
  correct: "M3 5h9M3 9h6M3 13h4M10 16l.8-2.8 5-5 2 2-5 5z",
  left: "M12 4l-6 6 6 6",
  right: "M8 4l6 6-6 6",
  send: "M10 16V4M5 9l5-5 5 5",
  stop: "M6 6h8v8H6z",
  newest: "M10 4v12M5 11l5 5 5-5",
  download: "M10 3v9M6 8.5l4 4 4-4M4 16h12",
  upload: "M10 12V3M6 6.5l4-4 4 4M4 16h12",
  help: "M7.5 7.5a2.5 2.5 0 1 1 3.6 2.2c-.7.4-1.1.9-1.1 1.8M10 14.5v.3",
  tool: "M12 3.5a4 4 0 0 0-4.6 5.3L3 13.2 6.8 17l4.4-4.4A4 4 0 0 0 16.5 8L14 10l-2.5-.5L11 7z",
  search: "M9 4a5 5 0 1 0 0 10A5 5 0 0 0 9 4zM12.7 12.7L17 17",
};

export function Icon({ name }) {
  return html`<svg class="icon" viewBox="0 0 20 20" aria-hidden="true"><path d=${PATHS[name]} /></svg>`;
}

// A button that is an icon; its name is its label and its tooltip.
export function IconButton({ icon, label, class: more = "", ...others }) {
  return html`
    <button type="button" class=${`icon-button ${more}`} aria-label=${label} title=${label} ...${others}>
      <${Icon} name=${icon} />
    </button>
  `;
}
