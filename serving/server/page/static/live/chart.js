// A chart over time (uPlot, loaded when the first one is shown). All share one cursor; a click goes to its moment.
import { html, useEffect, useRef } from "../html.js";
import { colour } from "./colours.js";
import { clock, short } from "./format.js";

const HEIGHT = 132;
const SYNC = "live";
let library = null;

function loadLibrary() {
  library ??= import("../vendor/uplot.js").then((module) => module.default);
  return library;
}

function axes(unit) {
  const look = {
    stroke: () => colour("muted"),
    grid: { stroke: () => colour("line"), width: 1 },
    ticks: { show: false },
    font: "11px system-ui, sans-serif",
  };
  return [
    {
      ...look,
      size: 22,
      space: 70,
      values: (chart, times) => times.map((time) => clock(time).slice(0, 5)),
      incrs: [60, 120, 300, 600],
    },
    { ...look, size: 44, space: 30, values: (chart, values) => values.map(unit ?? short) },
  ];
}

function seriesOf(uPlot, { label, ink, fill, dash, bars, value }) {
  return {
    label,
    stroke: () => colour(ink),
    fill: fill ? () => colour(ink, fill) : undefined,
    dash,
    width: bars ? 0 : 1.6,
    points: { show: false },
    paths: bars ? uPlot.paths.bars({ size: [0.8, 24], align: 1 }) : undefined,
    value: value ?? ((chart, found) => short(found)),
  };
}

function makeChart(uPlot, node, current) {
  const { series, data, most, unit } = current.current;
  const options = {
    width: node.clientWidth || 300,
    height: HEIGHT,
    padding: [8, 8, 0, 0],
    cursor: { sync: { key: SYNC }, drag: { x: false, y: false }, points: { size: 6 } },
    legend: { live: true },
    scales: {
      x: { time: true, range: () => current.current.range },
      y: { range: (chart, low, high) => [0, Math.max(most ?? 0, (high ?? 0) * 1.08, 1e-6)] },
    },
    axes: axes(unit),
    series: [{ value: (chart, time) => clock(time) }, ...series.map((one) => seriesOf(uPlot, one))],
  };
  return new uPlot(options, data, node);
}

// New data; the legend shows the newest values where no cursor stands.
function show(chart, data) {
  chart.setData(data);
  if (chart.cursor.left < 0) chart.setLegend({ idx: data[0].length - 1 });
}

// Arrow keys move the cursor by a tenth of what is shown; Enter goes to its moment.
function onKey(event, chart, pick) {
  if (!chart) return;
  const width = chart.over.clientWidth;
  const step = { ArrowLeft: -width / 30, ArrowRight: width / 30 }[event.key];
  if (step) {
    event.preventDefault();
    const left = Math.min(Math.max((chart.cursor.left >= 0 ? chart.cursor.left : width) + step, 0), width);
    chart.setCursor({ left, top: HEIGHT / 2 });
  }
  if (event.key === "Enter" && chart.cursor.left >= 0) pick(chart.posToVal(chart.cursor.left, "x"));
}

// series: [{label, ink, fill?, dash?, bars?, value?}]; data: [times, values, ...]; range: [from, to] in seconds.
export function Chart({ t, name, title, summary, series, data, range, theme, most, unit, onPick }) {
  const node = useRef(null);
  const chart = useRef(null);
  const current = useRef(null);
  current.current = { series, data, range, most, unit, onPick };
  const labels = series.map(({ label }) => label).join("|");
  useEffect(() => {
    let gone = false;
    let sized = null;
    loadLibrary().then((uPlot) => {
      if (gone) return;
      chart.current = makeChart(uPlot, node.current, current);
      const over = chart.current.over;
      over.addEventListener("click", () =>
        current.current.onPick(chart.current.posToVal(chart.current.cursor.left, "x")),
      );
      show(chart.current, current.current.data);
      over.addEventListener("mouseleave", () =>
        setTimeout(() => chart.current && show(chart.current, current.current.data)),
      );
      sized = new ResizeObserver(() => {
        const width = node.current?.clientWidth; // none once it is taken away
        if (width) chart.current?.setSize({ width, height: HEIGHT });
      });
      sized.observe(node.current);
    });
    return () => {
      gone = true;
      sized?.disconnect();
      chart.current?.destroy();
      chart.current = null;
    };
  }, [labels]);
  useEffect(() => {
    const frame = requestAnimationFrame(() => chart.current && show(chart.current, data));
    return () => cancelAnimationFrame(frame);
  }, [data, range[0], range[1], theme]);
  return html`
    <figure class="chart" data-chart=${name}>
      <figcaption><b>${title}</b> <span>${summary}</span></figcaption>
      <div class="plot" ref=${node} role="img" tabindex="0" aria-label=${`${title}: ${summary}. ${t("live.chart.keys")}`}
        onKeyDown=${(event) => onKey(event, chart.current, onPick)}></div>
    </figure>
  `;
}
