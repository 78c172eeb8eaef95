// Markdown of an answer, block by block: a block that stays the same stays in the page as it is.
import { html, useMemo } from "../html.js";
import { useChat } from "./context.js";
import { copyCode } from "./copying.js";
import { GrowingMarkdown, wholeMarkdown } from "./markdown.js";

export function Rendered({ text, answering }) {
  const context = useChat();
  const { t, language } = context;
  const isGrowing = answering !== null;
  const growing = useMemo(() => new GrowingMarkdown(t), [isGrowing, language, answering?.node.steps.length]);
  const blocks = useMemo(() => {
    const before = performance.now();
    const found = isGrowing ? growing.update(text) : wholeMarkdown(text, t);
    if (answering) answering.costMs = performance.now() - before;
    return found;
  }, [text, isGrowing, language]);
  return html`
    <div class="rendered" onClick=${(event) => copyCode(event, context)}>
      ${blocks.map((block, place) => html`<div key=${place} class="block" dangerouslySetInnerHTML=${{ __html: block }}></div>`)}
    </div>
  `;
}
