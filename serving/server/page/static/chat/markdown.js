// Markdown of a model as HTML that does nothing: no HTML of the model's own, no scripts, no styles, nothing loaded.
import MarkdownIt from "../vendor/markdown-it.js";
import DOMPurify from "../vendor/purify.js";
import { escapeHtml, highlighted, languageName } from "./code.js";

const TAGS = "a blockquote br button code del div em h1 h2 h3 h4 h5 h6 hr img li ol p pre s span strong table tbody td th thead tr ul";
const ATTRIBUTES = ["alt", "aria-label", "class", "data-copy", "href", "role", "src", "start", "tabindex", "title", "type"];
const CLEAN = { ALLOWED_TAGS: TAGS.split(" "), ALLOWED_ATTR: ATTRIBUTES, ALLOW_DATA_ATTR: false };
const MOST = 200_000; // characters; a longer text is shown as it is
const LINK = /^(https?:|mailto:)/i;
const IMAGE_DATA = /^data:image\/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/=]+$/;

const markdown = new MarkdownIt({ html: false, linkify: true, breaks: false });
// What "example.com" alone looks like is more often the name of a file.
markdown.linkify.set({ fuzzyLink: false });

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName === "A") {
    if (!LINK.test(element.getAttribute("href") ?? "")) element.removeAttribute("href");
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer");
  }
  if (element.tagName === "IMG" && !IMAGE_DATA.test(element.getAttribute("src") ?? "")) element.remove();
});

const rules = markdown.renderer.rules;

rules.fence = (tokens, place, options, { t, open }) => {
  const { content, info } = tokens[place];
  const [named] = info.trim().split(/\s+/);
  return codeBlock(content, named, t, open);
};
rules.code_block = (tokens, place, options, { t }) => codeBlock(tokens[place].content, "", t);

export function codeBlock(content, language, t, open = false) {
  const name = escapeHtml(languageName(language));
  const copy = escapeHtml(t("copy"));
  const code = content.replace(/\n$/, "");
  return (
    `<div class="code"><div class="code-head"><span>${name}</span>` +
    `<button type="button" class="small" data-copy="code">${copy}</button></div>` +
    `<pre tabindex="0" role="group" aria-label="${escapeHtml(t("code.label"))} ${name}"><code class="hljs">` +
    `${highlighted(code, language, open)}</code></pre></div>`
  );
}

// Images from elsewhere are links: a server that a model names learns nothing until someone follows one.
rules.image = (tokens, place, options, environment, renderer) => {
  const token = tokens[place];
  const source = token.attrGet("src") ?? "";
  const text = escapeHtml(renderer.renderInlineAsText(token.children ?? [], options, environment));
  if (IMAGE_DATA.test(source)) return `<img src="${source}" alt="${text}">`;
  const label = text || escapeHtml(source);
  return insideLink(tokens, place) ? label : `<a class="image" href="${escapeHtml(source)}">${label}</a>`;
};

function insideLink(tokens, place) {
  let depth = 0;
  for (const { type } of tokens.slice(0, place)) {
    if (type === "link_open") depth += 1;
    if (type === "link_close") depth -= 1;
  }
  return depth > 0;
}

// Alignment by class: the page's content policy has no style attributes.
function alignedCell(tokens, place, options, environment, renderer) {
  const token = tokens[place];
  const found = /text-align:\s*(left|right|center)/.exec(token.attrGet("style") ?? "");
  token.attrs = found ? [["class", `align-${found[1]}`]] : null;
  return renderer.renderToken(tokens, place, options);
}
rules.th_open = alignedCell;
rules.td_open = alignedCell;
rules.table_open = () => '<div class="wide-table" tabindex="0"><table>';
rules.table_close = () => "</table></div>";

// [{html, begins: its first line}] of each block at the top; `open`: the text may go on.
function blocksOf(text, t, open) {
  const environment = { t, open: false };
  const tokens = markdown.parse(text, environment);
  const blocks = [];
  let group = [];
  for (const token of tokens) {
    group.push(token);
    if (token.level > 0 || token.nesting === 1) continue;
    blocks.push({ tokens: group, begins: group[0].map?.[0] ?? 0 });
    group = [];
  }
  for (const [number, block] of blocks.entries()) {
    environment.open = open && number === blocks.length - 1;
    block.html = markdown.renderer.render(block.tokens, markdown.options, environment);
  }
  return cleaned(blocks);
}

// Each block is one element, so all are cleaned at once.
function cleaned(blocks) {
  const whole = blocks.map(({ html }) => html).join("");
  const { children } = DOMPurify.sanitize(whole, { ...CLEAN, RETURN_DOM_FRAGMENT: true });
  const areMatched = children.length === blocks.length;
  for (const [number, block] of blocks.entries()) {
    block.html = areMatched ? children[number].outerHTML : DOMPurify.sanitize(block.html, CLEAN);
  }
  return blocks;
}

// The HTML of a text that grows. Only its end is made again, so that the time does not grow with the text.
export class GrowingMarkdown {
  constructor(t) {
    this.t = t;
    this.settled = []; // HTML of blocks that do not change any more
    this.offset = 0; // in the text, behind them
  }

  // HTML of each block.
  update(text) {
    const rest = text.slice(this.offset);
    if (rest.length > MOST) return [...this.settled, `<p class="plain">${escapeHtml(rest)}</p>`];
    const blocks = blocksOf(rest, this.t, true);
    const [before, next] = blocks.slice(-2);
    // "3" may become "3.", which goes on with the list before it: until its line ends, both may change.
    const isLine = next && rest.indexOf("\n", lineOffset(rest, next.begins)) < 0;
    const open = isLine ? before : blocks.at(-1);
    const kept = blocks.indexOf(open);
    for (const { html } of blocks.slice(0, Math.max(kept, 0))) this.settled.push(html);
    if (kept > 0) this.offset += lineOffset(rest, open.begins);
    const changing = blocks.slice(Math.max(kept, 0)).map(({ html }) => html);
    return [...this.settled, ...changing];
  }
}

function lineOffset(text, line) {
  let offset = 0;
  for (let number = 0; number < line; number += 1) offset = text.indexOf("\n", offset) + 1;
  return offset;
}

// HTML of each block of a text that is whole.
export function wholeMarkdown(text, t) {
  if (text.length > MOST) return [`<p class="plain">${escapeHtml(text)}</p>`];
  return blocksOf(text, t, false).map(({ html }) => html);
}
