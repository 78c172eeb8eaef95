// Highlighted code, as HTML in which the code itself is escaped.
import hljs from "../vendor/highlight.js";

const MOST_OPEN = 6000; // characters of code that are highlighted again while it is written
const MOST = 60000;
const NAMES = { js: "JavaScript", ts: "TypeScript", py: "Python", sh: "Shell", md: "Markdown", yml: "YAML" };
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

export function escapeHtml(text) {
  return text.replace(/[&<>"']/g, (character) => ESCAPES[character]);
}

// "Python" of "py"; what is unknown as it is written.
export function languageName(language) {
  return NAMES[language] ?? hljs.getLanguage(language)?.name ?? language.slice(0, 40);
}

export function highlighted(code, language, open = false) {
  if (!hljs.getLanguage(language) || code.length > (open ? MOST_OPEN : MOST)) return escapeHtml(code);
  return hljs.highlight(code, { language, ignoreIllegals: true }).value;
}
