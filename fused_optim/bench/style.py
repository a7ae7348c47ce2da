"""The report's style sheet: dark or light as the reader's system is, nothing is wider than the screen."""

# Text on its background has a contrast of at least 4.5 in both, bars and lines of at least 3 (WCAG 2.2 AA).
STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f8fa; --card: #ffffff; --text: #1b2430; --dim: #55606e; --line: #d9dee5;
  --track: #edf0f4; --ours: #0b6e69; --stock: #b45309; --peer: #64748b; --spread: #111820;
  --good: #0b6e4f; --bad: #b3261e; --warn-page: #fff4dc; --warn-line: #b45309; --code: #edf0f4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #11161d; --card: #1a212b; --text: #e6eaf0; --dim: #a3afbd; --line: #333e4b;
    --track: #27313d; --ours: #2cb5a8; --stock: #e8903f; --peer: #8d9bad; --spread: #ffffff;
    --good: #4fd19b; --bad: #ff8f85; --warn-page: #33291a; --warn-line: #e8903f; --code: #27313d;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
header, main, footer { max-width: 74rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
footer { padding-bottom: 3rem; color: var(--dim); font-size: .875rem; }
h1 { font-size: clamp(1.5rem, 1.1rem + 2vw, 2.25rem); line-height: 1.2; margin: 0 0 .75rem; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 2.75rem 0 .75rem; }
h3 { font-size: 1.05rem; line-height: 1.35; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p, ul { max-width: 46rem; margin: .5rem 0; }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; }
.eyebrow { color: var(--dim); font-size: .875rem; margin: 0 0 .5rem; }
.lead { font-size: 1.15rem; overflow-wrap: anywhere; }
.dim, caption, figcaption { color: var(--dim); font-size: .9rem; overflow-wrap: anywhere; }
.notice {
  background: var(--warn-page); border-left: 4px solid var(--warn-line); border-radius: 4px;
  padding: .6rem .9rem; margin: .6rem 0; max-width: none; overflow-wrap: anywhere;
}
.card {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 1.1rem 1.25rem; margin: 1rem 0;
}
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { margin-bottom: .5rem; text-align: left; } figure + table, table + table { margin-top: 1.25rem; }
th, td { padding: .45rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
th:first-child, td[colspan] { text-align: left; } th:first-child { padding-left: 0; }
tr > :last-child { padding-right: 0; }
thead th { color: var(--dim); font-weight: 600; } tbody tr:last-child > * { border-bottom: 0; }
tbody th { font-weight: 500; min-width: 8rem; overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; } td span { white-space: nowrap; }
.mark {
  background: var(--warn-page); border: 1px solid var(--warn-line); border-radius: 4px; padding: 0 .35em;
  color: var(--text); font-size: .85em;
}
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
figure { margin: 1rem 0 0; } figcaption { margin-top: .4rem; } svg { display: block; overflow: visible; }
.chart { display: grid; gap: .5rem; font-size: .85rem; line-height: 1.35; }
.chart > div { display: flex; flex-wrap: wrap; gap: .1rem 1rem; }
.chart span { flex: 1 1 50%; overflow-wrap: anywhere; } .chart svg { order: 1; }
.chart .value { flex: none; margin-left: auto; font-variant-numeric: tabular-nums; }
.track { fill: var(--track); }
.ours { fill: var(--ours); } .stock { fill: var(--stock); } .peer { fill: var(--peer); }
.spread { stroke: var(--spread); stroke-width: 2; } .target { stroke: var(--text); stroke-width: 3; }
.axis { stroke: var(--dim); } .roof { stroke: var(--text); stroke-width: 2; }
.key::before { content: ""; display: inline-block; width: .7em; height: .7em; margin-right: .35em; }
.key.ours::before { background: var(--ours); } .key.stock::before { background: var(--stock); }
.key + .key { margin-left: .8em; }
details.card { margin: .5rem 0; padding: .6rem 1.25rem; }
details > summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .35rem 1.25rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .875rem/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; }
pre { background: var(--code); border-radius: 6px; padding: .7rem .9rem; margin: 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
@media (width >= 54rem) {
  .chart { grid-template-columns: fit-content(40%) minmax(0, 1fr) max-content; gap: .4rem 1rem; }
  .chart > div { display: contents; } .chart svg { order: 0; }
}
@media (width >= 70rem) { td:not([colspan]) { white-space: nowrap; } }
@media (width < 54rem) {
  header, main, footer { padding-left: 1rem; padding-right: 1rem; }
  .card, details.card { padding: .9rem; }
  table, caption, tr, th, td { display: block; border: 0; padding: 0; } thead { display: none; }
  tbody { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 0 2rem; }
  tbody tr { border-top: 1px solid var(--line); padding: .6rem 0; }
  tbody th { font-weight: 600; }
  td { display: flow-root; } td:empty { display: none; }
  td:not([colspan])::before { content: attr(data-label); float: left; margin-right: 1rem; color: var(--dim); }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .6rem; }
}
@media print {
  body { background: #fff; } .card { break-inside: avoid; } .key::before { print-color-adjust: exact; }
}
"""
