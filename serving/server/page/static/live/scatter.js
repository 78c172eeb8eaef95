// Predicted against actual lengths of the last answers, both on logarithmic axes.
import { html, useEffect, useRef } from "../html.js";
import { colour } from "./colours.js";
import { short, whole } from "./format.js";
import { isWhole, outcomeOf } from "./series.js";

const MARGIN = { left: 38, right: 10, top: 8, bottom: 30 };
const FRESH_S = 2; // answers that ended within so long stand out
const RADIUS = 3.2;

const middle = (values) => [...values].sort((a, b) => a - b)[values.length >> 1];

// {points, low, high, ratio: the typical q90 over the median, within: how many are within their q90}
export function plotted(answers) {
  const points = answers.filter((answer) => answer.median > 0 && answer.made > 0 && isWhole(answer));
  const values = points.flatMap(({ median, made }) => [median, made]);
  const low = 10 ** Math.floor(Math.log10(Math.max(Math.min(...values, 10), 1)));
  const high = 10 ** Math.ceil(Math.log10(Math.max(...values, 100) * 1.01));
  const ratios = points.filter(({ q90 }) => q90 > 0).map(({ q90, median }) => q90 / median);
  return {
    points,
    low,
    high,
    ratio: ratios.length ? middle(ratios) : null,
    within: points.filter(({ made, q90 }) => made <= q90).length,
  };
}

function draw(canvas, { points, low, high, ratio }, now) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = devicePixelRatio || 1;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  const inner = { w: width - MARGIN.left - MARGIN.right, h: height - MARGIN.top - MARGIN.bottom };
  const part = (value) => Math.log(Math.min(Math.max(value, low), high) / low) / Math.log(high / low);
  const x = (value) => MARGIN.left + part(value) * inner.w;
  const y = (value) => MARGIN.top + (1 - part(value)) * inner.h;
  drawAxes(pen, x, y, low, high);
  if (ratio !== null) {
    pen.fillStyle = colour("predicted-soft", 0.55);
    pen.beginPath();
    pen.moveTo(x(low), y(low));
    pen.lineTo(x(high), y(high));
    pen.lineTo(x(high / ratio), y(high));
    pen.lineTo(x(low), y(low * ratio));
    pen.fill();
    line(pen, [x(low), y(low * ratio)], [x(high / ratio), y(high)], colour("predicted"), [5, 4]);
  }
  line(pen, [x(low), y(low)], [x(high), y(high)], colour("muted"), []);
  for (const answer of points) drawPoint(pen, x(answer.median), y(answer.made), answer, now - answer.t < FRESH_S);
}

function drawAxes(pen, x, y, low, high) {
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  pen.fillStyle = colour("muted");
  for (let value = low; value <= high; value *= 10) {
    line(pen, [x(value), y(low)], [x(value), y(high)], colour("line"), []);
    line(pen, [x(low), y(value)], [x(high), y(value)], colour("line"), []);
    pen.textAlign = value === high ? "right" : "center";
    pen.fillText(short(value), x(value) + (value === high ? 6 : 0), y(low) + 15);
    pen.textAlign = "right";
    pen.fillText(short(value), x(low) - 5, y(value) + 4);
  }
}

function line(pen, [x0, y0], [x1, y1], stroke, dash) {
  pen.strokeStyle = stroke;
  pen.setLineDash(dash);
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.lineTo(x1, y1);
  pen.stroke();
  pen.setLineDash([]);
}

// In time: a disc; late: a triangle; beyond its own q90: with an outline.
function drawPoint(pen, x, y, answer, fresh) {
  const late = outcomeOf(answer) === "late";
  const size = RADIUS * (fresh ? 1.6 : 1);
  pen.beginPath();
  if (late) {
    pen.moveTo(x, y - size * 1.3);
    pen.lineTo(x + size * 1.2, y + size);
    pen.lineTo(x - size * 1.2, y + size);
    pen.closePath();
  } else {
    pen.arc(x, y, size, 0, 2 * Math.PI);
  }
  pen.fillStyle = colour(late ? "bad" : "produced", fresh ? 1 : 0.55);
  pen.fill();
  if (answer.made > answer.q90) {
    pen.strokeStyle = colour("text");
    pen.lineWidth = 1.2;
    pen.stroke();
    pen.lineWidth = 1;
  }
}

export function Scatter({ t, answers, now, theme }) {
  const canvas = useRef(null);
  const figure = plotted(answers);
  const latest = useRef(null);
  latest.current = () => canvas.current && draw(canvas.current, figure, now);
  useEffect(() => {
    const sized = new ResizeObserver(() => latest.current());
    sized.observe(canvas.current);
    return () => sized.disconnect();
  }, []);
  useEffect(() => {
    const frame = requestAnimationFrame(() => latest.current());
    return () => cancelAnimationFrame(frame);
  }, [answers, now, theme]);
  const count = figure.points.length;
  const values = { count: whole(count), within: whole(figure.within) };
  const summary = count ? t("live.scatter.summary", values) : t("live.scatter.none");
  return html`
    <figure class="chart scatter">
      <figcaption><b>${t("live.scatter")}</b> <span>${summary}</span></figcaption>
      <div class="scatter-plot"><canvas ref=${canvas} role="img" aria-label=${`${t("live.scatter")}: ${summary}`}></canvas></div>
      <div class="scatter-axes" aria-hidden="true"><span>${t("live.scatter.y")}</span><span>${t("live.scatter.x")}</span></div>
      <ul class="legend">
        <li><span class="swatch dot" aria-hidden="true"></span>${t("live.scatter.in_time")}</li>
        <li><span class="swatch triangle" aria-hidden="true"></span>${t("live.scatter.late")}</li>
        <li><span class="swatch outlined" aria-hidden="true"></span>${t("live.scatter.beyond")}</li>
        <li><span class="swatch q90" aria-hidden="true"></span>${t("live.scatter.q90")}</li>
      </ul>
    </figure>
  `;
}
