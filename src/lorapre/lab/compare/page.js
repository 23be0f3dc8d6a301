"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { figures } = data;
  const styles = figures.styles;
  const state = { metric: "loss", hidden: new Set(), printing: false };
  const { drawAll, colour } = makeFigures(data, state);

  /* Marks of the legend, in a box of 38 x 14 around (19, 7). */
  const SHAPES = {
    circle: "M15 7a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", square: "M15.5 3.5h7v7h-7z", "triangle-up": "M19 2l5 9h-10z",
    "triangle-down": "M19 12l5-9h-10z", diamond: "M19 2l5 5l-5 5l-5-5z", "diamond-tall": "M19 1l3.5 6l-3.5 6l-3.5-6z",
    cross: "M17.5 2.5h3v3h3v3h-3v3h-3v-3h-3v-3h3z", x: "M15 4.5l1.5-1.5l2.5 2.5l2.5-2.5l1.5 1.5l-2.5 2.5l2.5 2.5l-1.5 1.5l-2.5-2.5l-2.5 2.5l-1.5-1.5l2.5-2.5z",
    pentagon: "M19 2.5l4.7 3.4l-1.8 5.6h-5.8l-1.8-5.6z", hexagon: "M19 2.5l4 2.3v4.5l-4 2.3l-4-2.3v-4.5z",
    "triangle-left": "M14 7l9-5v10z", "triangle-right": "M24 7l-9-5v10z",
    star: "M19 1.5l1.6 3.8l4 .3l-3 2.6l1 4l-3.6-2.2l-3.6 2.2l1-4l-3-2.6l4-.3z",
  };
  const DASHES = { solid: "", dash: "7 4", dashdot: "8 3 2 3", dot: "2 3", longdash: "12 3" };

  const element = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  const drawLegend = () => {
    const list = document.getElementById("legend");
    list.replaceChildren();
    for (const [name, style] of Object.entries(styles)) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = style.ours ? "ours" : "";
      button.setAttribute("aria-pressed", String(!state.hidden.has(name)));
      const mark = element("svg", { viewBox: "0 0 38 14", "aria-hidden": "true" });
      const stroke = { stroke: colour(name), "stroke-width": style.width, "stroke-dasharray": DASHES[style.dash] };
      mark.append(element("path", { d: "M0 7h38", ...stroke }), element("path", { d: SHAPES[style.symbol], fill: colour(name) }));
      const label = document.createElement("span");
      label.textContent = style.label;
      button.append(mark, label);
      button.addEventListener("click", () => {
        if (!state.hidden.delete(name)) state.hidden.add(name);
        button.setAttribute("aria-pressed", String(!state.hidden.has(name)));
        drawAll();
      });
      const item = document.createElement("li");
      item.append(button);
      list.append(item);
    }
  };

  const refresh = () => {
    drawLegend();
    drawAll();
  };

  for (const button of document.querySelectorAll("[data-metric]")) {
    button.addEventListener("click", () => {
      state.metric = button.dataset.metric;
      for (const other of document.querySelectorAll("[data-metric]")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      drawAll();
    });
  }
  for (const button of document.querySelectorAll("[data-show]")) {
    button.addEventListener("click", () => {
      state.hidden.clear();
      if (button.dataset.show === "ours") {
        for (const [name, style] of Object.entries(styles)) if (!style.ours && !style.adamw) state.hidden.add(name);
      }
      refresh();
    });
  }

  /* Sorting: rows without a value stay below, whichever the direction. */
  const table = document.getElementById("results");
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      for (const other of headings) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort;
      const compare = heading.dataset.kind === "text" ? (a, b) => a.localeCompare(b) : (a, b) => Number(a) - Number(b);
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (key(a) === "") - (key(b) === "") || sign * compare(key(a), key(b)));
      table.tBodies[0].append(...rows);
    });
  });

  if (figures.estimated) {
    document.getElementById("time-caption").textContent =
      "Runs shared a device or were measured on the way, so time is steps x the training step of a run left alone.";
  }
  let waiting = 0;
  window.addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(drawAll, 150);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
  const print = (begins) => { // paper is white, and figures do not follow the print style by themselves
    state.printing = begins;
    document.documentElement.toggleAttribute("data-printing", begins);
    refresh();
  };
  window.addEventListener("beforeprint", () => print(true));
  window.addEventListener("afterprint", () => print(false));
  refresh();
})();
