// A panel beside the conversation; on a narrow screen a dialog over it, which Escape and a tap beside it close.
import { html, useEffect, useRef } from "../html.js";

export function Drawer({ open, onClose, side, label, isDialog, children }) {
  const dialog = useRef(null);
  useEffect(() => {
    if (!isDialog) return;
    if (open && !dialog.current.open) dialog.current.showModal();
    if (!open && dialog.current.open) dialog.current.close();
  }, [open, isDialog]);
  if (!isDialog) {
    return open && html`<section class=${`side ${side}`} aria-label=${label}>${children}</section>`;
  }
  const beside = (event) => {
    if (event.target === dialog.current) onClose();
  };
  return html`
    <dialog ref=${dialog} class=${`drawer ${side}`} aria-label=${label} onClose=${onClose} onClick=${beside}>
      ${open && html`<div class="drawer-content">${children}</div>`}
    </dialog>
  `;
}

// A dialog in the middle.
export function Dialog({ open, onClose, label, children }) {
  const dialog = useRef(null);
  useEffect(() => {
    if (open && !dialog.current.open) dialog.current.showModal();
    if (!open && dialog.current.open) dialog.current.close();
  }, [open]);
  const beside = (event) => {
    if (event.target === dialog.current) onClose();
  };
  return html`
    <dialog ref=${dialog} class="dialog" aria-label=${label} onClose=${onClose} onClick=${beside}>
      ${open && html`<div class="dialog-content">${children}</div>`}
    </dialog>
  `;
}
