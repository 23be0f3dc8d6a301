"use strict";

/**
 * The figures of the page; that of the momentum is `makeMomentum`'s.
 *
 * `state` holds what is shown: `metric` ("loss" or "perplexity"), `hidden` (a set of contestants), `printing`.
 * Returns `drawAll`, which draws everything again, and `colour`, a contestant's in the present theme.
 */
const makeFigures = ({ comparison, figures }, state) => {
  const styles = figures.styles;
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif";

  const isDark = () => dark.matches && !state.printing;
  const narrow = () => window.innerWidth <= 820;
  const colour = (name) => (isDark() ? styles[name].dark : styles[name].light);
  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const scale = (loss) => (loss === null ? null : state.metric === "loss" ? loss : Math.exp(loss));
  const escapeHtml = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const rate = (lr) => (lr === null ? "–" : String(Number(lr.toPrecision(2))));
  const millions = (tokens) => `${Number((tokens / 1e6).toPrecision(3))} M tokens`;

  const bytes = (count) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    for (; count >= 1000 && unit < units.length - 1; unit += 1) count /= 1000;
    return `${unit ? count.toFixed(2) : count} ${units[unit]}`;
  };

  const hover = (name, loss, ...lines) => {
    const values = loss === null ? [] : [`loss ${loss.toFixed(3)}, perplexity ${Math.exp(loss).toFixed(2)}`];
    return [`<b>${escapeHtml(styles[name].label)}</b>`, ...values, ...lines.map(escapeHtml)].join("<br>");
  };

  const trace = (name, extra) => ({
    type: "scatter",
    name: escapeHtml(styles[name].label),
    visible: !state.hidden.has(name),
    hoverinfo: "text",
    showlegend: false,
    ...extra,
  });

  /** Ticks at 1, 2 and 5 times the powers of ten within two values; at the powers alone beyond a ratio of `most`. */
  const ticks = (low, high, write, most = narrow() ? 60 : 3e4) => {
    const values = [];
    const few = high / low > most;
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const factor of few ? [1] : [1, 2, 5]) values.push(Number(`${factor}e${power}`));
    }
    return { tickmode: "array", tickvals: values, ticktext: values.map(write) };
  };

  const logRange = (values, pad) => [Math.log10(Math.min(...values)) - pad, Math.log10(Math.max(...values)) + pad];

  const axis = () => ({
    gridcolor: variable("--grid"), linecolor: variable("--line"), zeroline: false, automargin: true, tickfont: { size: 13 },
  });

  const layout = (xaxis, range, extra = {}) => ({
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FONT, color: variable("--text"), size: 13 },
    margin: { l: narrow() ? 44 : 60, r: 12, t: narrow() ? 12 : 34, b: 48 },
    hovermode: "closest",
    hoverlabel: { align: "left", bgcolor: variable("--card"), bordercolor: variable("--line"), font: { color: variable("--text") } },
    dragmode: narrow() ? false : "zoom",
    uirevision: state.metric,
    showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: variable("--muted"), activecolor: variable("--text") },
    ...extra,
    xaxis: { ...axis(), ...xaxis },
    yaxis: { ...axis(), title: { text: state.metric === "loss" && !narrow() ? "validation loss (nats a token)" : state.metric }, range: range.map(scale), ...extra.yaxis },
  });

  const bigram = (range) => {
    const loss = comparison.bigram_loss;
    if (loss < range[0] || loss > range[1]) return {};
    const y = scale(loss);
    const line = { color: variable("--muted"), width: 1, dash: "dot" };
    return {
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: y, y1: y, line }],
      annotations: [{
        xref: "paper", x: 1, xanchor: "right", y, yanchor: "bottom", showarrow: false,
        text: `bigram model ${loss.toFixed(3)}`, font: { size: 12, color: variable("--muted") },
      }],
    };
  };

  const draw = (id, traces, shape) => {
    const config = {
      responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover",
      showSendToCloud: false, plotlyServerURL: "", // by default plotly offers to upload the chart
      modeBarButtonsToRemove: ["select2d", "lasso2d"],
    };
    Plotly.react(`plot-${id}`, traces, shape, config);
  };

  const drawCurves = (against) => {
    const key = against === "tokens" ? "tokens" : "seconds";
    const xs = (series) => (against === "tokens" ? series.tokens.map((count) => count / 1e6) : series.seconds);
    const traces = [];
    const rank = (curve) => (styles[curve.contestant].ours ? 2 : styles[curve.contestant].adamw ? 1 : 0);
    for (const curve of [...figures.curves].sort((a, b) => rank(a) - rank(b))) { // the last lies on top
      const name = curve.contestant;
      const style = styles[name];
      const line = { color: colour(name), dash: style.dash };
      const text = (series, losses, who) => losses.map((loss, i) => {
        const seconds = series.seconds[i];
        const time = seconds === undefined || seconds === null ? "" : `, ${seconds.toFixed(0)} s`;
        return hover(name, loss, `lr ${rate(curve.lr)}, ${who}`, `${millions(series.tokens[i])}${time}`);
      });
      const many = curve.runs.length > 1;
      for (const run of many ? curve.runs : []) {
        traces.push(trace(name, {
          x: xs(run), y: run.loss.map(scale), text: text(run, run.loss, `seed ${run.seed}`),
          mode: "lines", line: { ...line, width: 1 }, opacity: 0.4,
        }));
      }
      if (curve[key].length) {
        const who = many ? `mean of ${curve.runs.length} seeds` : `seed ${curve.runs[0].seed}`;
        traces.push(trace(name, {
          x: xs(curve), y: curve.mean.map(scale), text: text(curve, curve.mean, who), mode: "lines+markers",
          line: { ...line, width: style.width }, marker: { symbol: style.symbol, size: 7, maxdisplayed: 8 },
        }));
      }
      for (const run of curve.broken) {
        const last = run.loss.length - 1;
        if (last < 0 || run.seconds.includes(null)) continue;
        traces.push(trace(name, {
          x: xs(run), y: run.loss.map(scale), text: text(run, run.loss, `seed ${run.seed}, broke off`),
          mode: "lines+markers", line: { ...line, width: 1 },
          marker: { symbol: "x", size: run.loss.map((_, i) => (i === last || run.loss[i + 1] === null ? 8 : 0)) },
        }));
      }
    }
    const title = against === "tokens" ? "tokens (millions)"
      : `training time (seconds${figures.estimated && !narrow() ? ", steps x measured step time" : ""})`;
    const range = figures.ranges.curves;
    const untimed = figures.curves.length && !figures.curves.some((curve) => curve.seconds.length);
    if (against === "time" && untimed) {
      const annotations = [{ xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, text: "step times have not been measured yet" }];
      draw(against, [], layout({ title: { text: title }, range: [0, 1], showticklabels: false }, range, { annotations }));
      return;
    }
    draw(against, traces, layout({ title: { text: title }, rangemode: "tozero" }, range, bigram(range)));
  };

  const wrap = (text, width) => text.split(" ").reduce((lines, word) => {
    const last = lines[lines.length - 1];
    return last !== undefined && last.length + word.length < width
      ? [...lines.slice(0, -1), `${last} ${word}`] : [...lines, word];
  }, []);

  /** A side of each point where its label covers no point, label or step of the front; "" where there is none. */
  const placeLabels = (points, front, box, xRange, yRange) => {
    const pixels = (x, y) => [
      ((Math.log10(x) - xRange[0]) / (xRange[1] - xRange[0])) * box.width,
      (1 - (y - yRange[0]) / (yRange[1] - yRange[0])) * box.height,
    ];
    const pen = document.createElement("canvas").getContext("2d");
    pen.font = `12px ${FONT}`;
    const at = points.map((point) => pixels(point.x, point.y));
    const taken = at.map(([x, y]) => [x - 7, y - 7, x + 7, y + 7]);
    front.map(([x, y]) => pixels(x, y)).forEach(([x, y], i, all) => {
      if (i) taken.push([all[i - 1][0], all[i - 1][1] - 2, x, all[i - 1][1] + 2], [x - 2, all[i - 1][1], x + 2, y]);
    });
    const sides = [["middle right", 1, 0], ["middle left", -1, 0], ["top center", 0, -1], ["bottom center", 0, 1],
      ["top right", 1, -1], ["bottom right", 1, 1], ["top left", -1, -1], ["bottom left", -1, 1]];
    return points.map((point, i) => {
      const [x, y] = at[i];
      const width = Math.max(...point.lines.map((line) => pen.measureText(line).width));
      const half = 8 * point.lines.length;
      for (const [side, dx, dy] of sides) {
        const left = dx > 0 ? x + 9 : dx < 0 ? x - 9 - width : x - width / 2;
        const middle = y + dy * (half + 7);
        const area = [left, middle - half, left + width, middle + half];
        const inside = area[0] >= 0 && area[2] <= box.width && area[1] >= 0 && area[3] <= box.height;
        if (inside && taken.every((t) => t[2] <= area[0] || t[0] >= area[2] || t[3] <= area[1] || t[1] >= area[3])) {
          taken.push(area);
          return side;
        }
      }
      return "";
    });
  };

  const drawState = () => {
    const all = figures.state.points;
    if (!all.length) return;
    const range = figures.ranges.state;
    const yRange = range.map(scale);
    const top = yRange[1] - 0.07 * (yRange[1] - yRange[0]);
    const xRange = logRange(all.map((point) => point.bytes), 0.12);
    const shown = all.filter((point) => !state.hidden.has(point.contestant)).map((point) => {
      const y = Math.min(scale(point.loss), top);
      const above = y < scale(point.loss) ? ` ↑ ${scale(point.loss).toFixed(state.metric === "loss" ? 3 : 1)}` : "";
      const style = styles[point.contestant];
      return { ...point, x: point.bytes, y, lines: wrap(style.label + above, narrow() ? 15 : 26), first: style.ours || style.adamw };
    }).sort((a, b) => b.first - a.first);
    const plot = document.getElementById("plot-state");
    const box = { width: plot.clientWidth - (narrow() ? 56 : 72), height: plot.clientHeight - (narrow() ? 60 : 82) };
    const front = figures.state.front.map((name) => all.find((point) => point.contestant === name));
    const stairs = front.map((point) => [point.bytes, scale(point.loss)]);
    const sides = placeLabels(shown, stairs, box, xRange, yRange);
    const traces = [{
      type: "scatter", x: stairs.map((corner) => corner[0]), y: stairs.map((corner) => corner[1]),
      mode: "lines", line: { shape: "hv", color: variable("--muted"), width: 1.5 }, hoverinfo: "skip", opacity: 0.6,
    }];
    shown.forEach((point, i) => {
      const name = point.contestant;
      const row = comparison.rows.find((each) => each.contestant === name);
      traces.push(trace(name, {
        x: [point.x], y: [point.y], mode: sides[i] ? "markers+text" : "markers",
        text: [point.lines.map(escapeHtml).join("<br>")], textposition: sides[i] || "top center", textfont: { size: 12, color: variable("--text") },
        hovertext: [hover(name, point.loss, `lr ${rate(row.lr)}, seeds ${row.seeds.join(", ")}`, bytes(point.bytes))],
        marker: { color: colour(name), symbol: styles[name].symbol, size: styles[name].ours ? 13 : 10 },
        cliponaxis: false,
      }));
    });
    const xaxis = {
      type: "log", range: xRange, title: { text: "state of the matrices" },
      ...ticks(10 ** xRange[0], 10 ** xRange[1], (value) => bytes(value).replace(".00", "")),
    };
    draw("state", traces, layout(xaxis, range, bigram(range)));
  };

  const drawRates = () => {
    const tried = figures.rates.flatMap((line) => [...line.losses.map((pair) => pair[0]), ...line.broken]);
    if (!tried.length) return;
    const range = figures.ranges.rates;
    const heights = new Map(); // how many marks stand above the plot at a rate
    const traces = [];
    for (const each of figures.rates) {
      const name = each.contestant;
      const style = styles[name];
      const length = `${each.full ? "full length" : "shorter run of the search"}, ${millions(each.tokens)}`;
      const text = (lr, loss, ...more) => hover(name, loss, `lr ${rate(lr)}`, length, ...more);
      const line = { color: colour(name), dash: style.dash, width: each.full ? style.width : 0.6 * style.width };
      const point = { color: colour(name), line: { color: colour(name), width: 1.5 } };
      traces.push(trace(name, {
        x: each.losses.map((pair) => pair[0]), y: each.losses.map((pair) => scale(pair[1])),
        text: each.losses.map((pair) => text(...pair)), mode: "lines+markers", line,
        marker: { ...point, size: each.full ? 9 : 7, symbol: style.symbol + (each.full ? "" : "-open") },
      }));
      const ring = { ...point, symbol: "circle-open", size: 18 };
      if (each.chosen) {
        const [lr, loss] = each.chosen;
        traces.push(trace(name, { x: [lr], y: [scale(loss)], mode: "markers", hoverinfo: "skip", marker: ring }));
      }
      if (state.hidden.has(name)) continue;
      const above = each.losses.filter((pair) => pair[1] > range[1]);
      const marks = [...above.map((pair) => ({ lr: pair[0], sign: "↑", text: text(...pair, "above the range") })),
        ...each.broken.map((lr) => ({ lr, sign: "×", text: text(lr, null, "broke off") }))];
      for (const mark of marks) {
        mark.y = (heights.get(rate(mark.lr)) || 0) + 1;
        heights.set(rate(mark.lr), mark.y);
      }
      traces.push(trace(name, {
        x: marks.map((mark) => mark.lr), y: marks.map((mark) => mark.y), text: marks.map((mark) => mark.sign),
        hovertext: marks.map((mark) => mark.text), mode: "text", yaxis: "y2", cliponaxis: false,
        textfont: { color: colour(name), size: 16, weight: each.full ? 700 : 400 },
      }));
    }
    const count = Math.max(0, ...heights.values());
    const share = count ? Math.min(0.3, 0.02 + 0.04 * count) : 0;
    const xRange = logRange(tried, 0.1);
    const xaxis = {
      type: "log", range: xRange, title: { text: "peak learning rate of the matrices" },
      ...ticks(10 ** xRange[0], 10 ** xRange[1], (value) => value.toExponential(0)),
    };
    const base = bigram(range);
    const edge = { type: "line", xref: "paper", yref: "paper", x0: 0, x1: 1, y0: 1 - share, y1: 1 - share };
    const border = count ? [{ ...edge, line: { color: variable("--muted"), width: 1 } }] : [];
    draw("rates", traces, layout(xaxis, range, {
      ...base,
      shapes: [...(base.shapes || []), ...border],
      yaxis: { domain: [0, 1 - share] },
      yaxis2: { domain: [Math.min(1 - share + 0.01, 1), 1], range: [0.3, Math.max(count, 1) + 0.7], visible: false, fixedrange: true },
    }));
  };

  const drawMomentum = makeMomentum({ comparison, figures }, { axis, colour, draw, hover, layout, narrow, ticks, trace, variable, wrap });

  const drawAll = () => {
    drawCurves("tokens");
    drawCurves("time");
    drawState();
    drawRates();
    drawMomentum();
  };

  return { drawAll, colour };
};
