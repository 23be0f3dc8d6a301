"use strict";

/**
 * The figure of how well the factors follow: a panel a figure, a line for each contestant that was measured.
 *
 * The first argument is the page's data, `tools` the helpers of `makeFigures`. Returns the function that draws it; where
 * nothing was measured, that does nothing.
 */
const makeMomentum = ({ comparison, figures }, tools) => {
  const panels = figures.momentum;
  const lines = comparison.momentum;
  const { axis, colour, draw, hover, layout, narrow, ticks, trace, variable, wrap } = tools;
  const styles = figures.styles;

  const written = (value) => (value === null ? "–" : String(Number(value.toPrecision(3))));
  const shown = (value, floor) => (value === null || (floor !== null && value <= floor) ? null : value);

  const logTicks = (panel) => {
    const values = lines.flatMap((line) => panel.fields.flatMap((field) => line[field]))
      .filter((value) => shown(value, panel.floor) !== null);
    if (!values.length) return {};
    const write = (value) => (value < 1e-3 || value > 1e4 ? value.toExponential(0) : String(value));
    return ticks(Math.min(...values), Math.max(...values), write, 200);
  };

  /** Where the panels stand, in shares of the plot: all below each other, or the first above the others in pairs. */
  const places = () => {
    const columns = narrow() ? 1 : 2;
    const rows = 1 + Math.ceil((panels.length - 1) / columns);
    const [gap, title] = narrow() ? [0.035, 0.035] : [0.06, 0.035];
    const height = (1 - (rows - 1) * gap) / rows;
    return panels.map((_, number) => {
      const row = number === 0 ? 0 : 1 + Math.floor((number - 1) / columns);
      const column = number === 0 ? 0 : (number - 1) % columns;
      const top = 1 - row * (height + gap);
      const half = columns === 2 && number > 0;
      return {
        x: half ? [column * 0.54, column * 0.54 + 0.46] : [0, 1],
        y: [top - height, top - title],
        top,
        last: row === rows - 1,
      };
    });
  };

  return () => {
    if (!lines.length) return;
    const where = places();
    const traces = [];
    const axes = {};
    const annotations = [];
    panels.forEach((panel, number) => {
      const id = number ? String(number + 1) : "";
      const { x, y, top, last } = where[number];
      axes[`xaxis${id}`] = {
        ...axis(), domain: x, anchor: `y${id}`, rangemode: "tozero", title: last ? { text: "step" } : undefined,
      };
      const log = panel.floor !== null;
      axes[`yaxis${id}`] = {
        ...axis(), domain: y, anchor: `x${id}`, nticks: 6,
        ...(log ? { type: "log", ...logTicks(panel) } : { type: "linear", rangemode: "tozero" }),
      };
      const text = narrow() ? wrap(panel.title, 42).join("<br>") : panel.title;
      annotations.push({
        xref: "paper", yref: "paper", x: x[0], y: y[1], xanchor: "left", yanchor: "bottom", align: "left", showarrow: false,
        text, font: { size: 13, color: variable("--text") },
      });
      for (const line of lines) {
        const name = line.contestant;
        const style = styles[name];
        panel.fields.forEach((field, position) => {
          const first = position === 0;
          traces.push(trace(name, {
            x: line.steps, y: line[field].map((value) => shown(value, panel.floor)),
            text: line.steps.map((step, i) => hover(name, null, `step ${step}`, ...panel.fields.map((each) => `${each} ${written(line[each][i])}`))),
            xaxis: `x${id}`, yaxis: `y${id}`,
            mode: first && line.steps.length < 9 ? "lines+markers" : "lines",
            line: { color: colour(name), dash: first ? style.dash : "dot", width: first ? style.width : 1.4 },
            marker: { symbol: style.symbol, size: 7 },
          }));
        });
      }
    });
    const base = layout({}, [0, 1], { uirevision: "momentum", annotations });
    draw("momentum", traces, { ...base, ...axes });
  };
};
