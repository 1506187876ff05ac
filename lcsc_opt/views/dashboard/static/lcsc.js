/* The look, the address and the zoom of the pages. Loads nothing. */
"use strict";
(() => {
  const KEY = "lcsc-theme";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const stored = () => { try { return localStorage.getItem(KEY); } catch { return null; } };
  const theme = () => stored() || (dark.matches ? "dark" : "light");

  let started = false;  // whether Dash has started, and knows the theme

  function show() {
    const now = theme();
    const root = document.documentElement;
    root.dataset.theme = now;
    root.dataset.agThemeMode = now;
    const button = document.getElementById("theme-switch");
    if (button) {
      button.textContent = now === "dark" ? "Light" : "Dark";  // where it leads
    }
  }

  /* Figures are drawn again in the other theme, on pages that have asked for it. */
  function follow() {
    show();
    if (started && window.dash_component_api.getLayout("theme")) {
      window.dash_clientside.set_props("theme", {data: theme()});
    }
  }

  function change() {
    try { localStorage.setItem(KEY, theme() === "dark" ? "light" : "dark"); } catch { /* private window */ }
    follow();
  }

  /* Which experiment is looked at stays the same on the other pages. */
  function carry(query) {
    const study = query.get("study");
    const experiment = query.get("experiment") || (study ? study.split("/").slice(0, -2).join("/") : null);
    document.querySelectorAll("a[data-page]").forEach(link => {
      link.search = experiment ? new URLSearchParams({experiment}).toString() : "";
    });
  }

  /* Says so if the server has ended: what the page shows is then as old as its last answer. */
  let answered = new Date();
  async function look() {
    const line = document.getElementById("ended");
    try {
      await fetch(location.pathname, {method: "HEAD", cache: "no-store"});
      answered = new Date();
      line.textContent = "";
    } catch {
      line.textContent = `lcsc dashboard has ended: this page is as it was at ${answered.toLocaleTimeString()}.`;
    }
  }

  /* One zoom for all images of a page; at 100 % each of them is seen as a whole. Its middle stays in the middle. */
  let zoomed = 100;
  function resize(pane) {
    const picture = pane.querySelector("img");
    if (!picture.naturalWidth) return;
    const [x, y] = [
      (pane.scrollLeft + pane.clientWidth / 2) / pane.scrollWidth,
      (pane.scrollTop + pane.clientHeight / 2) / pane.scrollHeight,
    ];
    const whole = Math.min(pane.clientWidth, 0.78 * innerHeight * picture.naturalWidth / picture.naturalHeight);
    picture.style.width = `${whole * zoomed / 100}px`;
    pane.scrollLeft = x * pane.scrollWidth - pane.clientWidth / 2;
    pane.scrollTop = y * pane.scrollHeight - pane.clientHeight / 2;
  }

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    lcsc: {
      theme: () => { started = true; return theme(); },
      /* A refresh waits for the answers that are on their way: Dash would drop them for those of the refresh. */
      refresh: count => {
        if (count) look();
        return document.querySelector("[data-dash-is-loading]") ? window.dash_clientside.no_update : count;
      },
      /* A figure that is drawn again: what a reader zoomed into, or switched off, stays while its uirevision does.
         plotly would see to that, but Dash writes a zoom into the figure, where plotly takes it for a new one. */
      redraw: (figure, before) => {
        if (!figure) return window.dash_clientside.no_update;
        const place = document.getElementById(window.dash_clientside.callback_context.outputs_list.id);
        figure = fitted(figure, place.clientWidth);
        if (!before?.data || before.layout?.uirevision !== figure.layout?.uirevision) return figure;
        const layout = {...figure.layout};
        Object.entries(before.layout).forEach(([name, {range, autorange} = {}]) => {
          if (/^[xy]axis/.test(name) && autorange === false && range && !layout[name]?.range) {
            layout[name] = {...layout[name], range, autorange};
          }
        });
        const visible = new Map(before.data.map(trace => [trace.name, trace.visible]));
        const data = figure.data.map(trace =>
          visible.get(trace.name) === undefined ? trace : {...trace, visible: visible.get(trace.name)});
        return {...figure, data, layout};
      },
      /* The values of the controls, by their ids, into the address: it can be copied, and leads to the same view. */
      remember: (...values) => {
        const query = new URLSearchParams();
        window.dash_clientside.callback_context.inputs_list.forEach(({id}, i) => {
          const [value, list] = [values[i], Array.isArray(values[i])];  // a list may be empty on purpose
          if (list || (value !== null && value !== undefined && value !== "")) query.set(id, list ? value.join(",") : value);
        });
        history.replaceState(history.state, "", `${location.pathname}?${query}`);
        carry(query);
        return "";
      },
      zoom: value => {
        zoomed = Number(value) || 100;
        document.querySelectorAll(".pane").forEach(resize);
        return `${zoomed} %`;
      },
    },
  });

  show();
  dark.addEventListener("change", follow);
  document.addEventListener("DOMContentLoaded", () => {
    show();
    carry(new URLSearchParams(location.search));
    document.getElementById("theme-switch")?.addEventListener("click", change);
  });
  document.addEventListener("load", event => {
    const pane = event.target instanceof Element && event.target.closest(".pane");
    if (pane) resize(pane);
  }, true);
  document.addEventListener("input", ({target}) => {
    const slid = target.id.endsWith("-edge") && target.closest(".slid");
    if (slid) slid.style.setProperty("--edge", `${target.value}%`);
  });
  /* A list that chooses which image is shown at a place. */
  document.addEventListener("change", ({target}) => {
    const picture = target.dataset.shows && document.getElementById(target.dataset.shows);
    if (picture) [picture.src, picture.alt] = [target.value, target.selectedOptions[0].textContent];
  });
  addEventListener("resize", () => document.querySelectorAll(".pane").forEach(resize));
  document.addEventListener("scroll", event => {
    const moved = event.target;
    if (!(moved instanceof Element) || !moved.classList.contains("pane")) return;
    document.querySelectorAll(".pane").forEach(pane => {
      if (pane === moved) return;
      if (pane.scrollLeft !== moved.scrollLeft) pane.scrollLeft = moved.scrollLeft;
      if (pane.scrollTop !== moved.scrollTop) pane.scrollTop = moved.scrollTop;
    });
  }, {capture: true, passive: true});
})();
