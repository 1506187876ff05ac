/* How figures are drawn where there is little width, in the dashboard and in reports. */
"use strict";
const [WIDE, PHONE] = [700, 450];

function fitted(figure, width) {
  const narrower = width < PHONE ? withoutNames(figure) : figure;
  return width < WIDE ? legendBelow(narrower, width) : narrower;
}

/* On a phone the names of a heat map's rows are under the pointer alone, no colour bar stands beside it, and a long title
   of an axis has two lines. */
function withoutNames(figure) {
  const data = figure.data.map(trace => trace.type === "heatmap" ? {...trace, showscale: false} : trace);
  const layout = {...figure.layout};
  Object.keys(layout).filter(name => /^[xy]axis/.test(name)).forEach(name => {
    const axis = {...layout[name]};
    if (axis.title?.text?.length > 30) axis.title = {...axis.title, text: axis.title.text.replace(/^(.{15,}?) /, "$1<br>")};
    if (name[0] === "y" && axis.type === "category") axis.showticklabels = false;
    layout[name] = axis;
  });
  return {...figure, data, layout};
}

/* The legend is below, a line for each name, and adds to the height. A figure whose axes have one scale is as high as it
   is wide, and has no colour bar beside it. */
function legendBelow(figure, width) {
  const names = new Set(figure.data.filter(trace => trace.showlegend !== false).map(trace => trace.name));
  if (names.size < 2 || figure.layout.showlegend === false) return figure;
  const square = figure.layout.yaxis?.scaleanchor;
  const height = square ? Math.min(figure.layout.height, width + 60) : figure.layout.height;
  const data = square ? figure.data.map(trace => trace.colorbar ? {...trace, showscale: false} : trace) : figure.data;
  const layout = {...figure.layout, height: height + 20 + 22 * names.size};
  layout.legend = {
    orientation: "h", entrywidth: 1, entrywidthmode: "fraction",
    xref: "container", x: 0, yref: "container", y: 0, yanchor: "bottom",
  };
  layout.margin = {...layout.margin, b: 80 + 22 * names.size};
  return {...figure, data, layout};
}
