// A small line without axes. Decoration: the number stands beside it.
import { html } from "../html.js";

const WIDTH = 120;
const HEIGHT = 28;
const PAD = 2;

// values: numbers or nulls, oldest first. range: [least, greatest], else the values' own from 0.
export function Spark({ values, range }) {
  const known = values.filter((value) => value !== null);
  const [low, high] = range ?? [0, Math.max(...known, 1e-9)];
  let path = "";
  let pen = "M";
  let last = null;
  values.forEach((value, index) => {
    if (value === null) {
      pen = "M";
      return;
    }
    const x = PAD + (index / Math.max(values.length - 1, 1)) * (WIDTH - 2 * PAD);
    const share = Math.min(Math.max((value - low) / (high - low || 1), 0), 1);
    const y = HEIGHT - PAD - share * (HEIGHT - 2 * PAD);
    path += `${pen}${x.toFixed(1)} ${y.toFixed(1)}`;
    pen = "L";
    last = [x, y];
  });
  return html`
    <svg class="spark" viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" aria-hidden="true">
      <path d=${path} />
      ${last && html`<circle cx=${last[0]} cy=${last[1]} r="2" />`}
    </svg>
  `;
}
