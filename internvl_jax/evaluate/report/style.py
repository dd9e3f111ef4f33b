"""The page's style sheet."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --raised: #ffffff; --ink: #21211e; --soft: #6a6861; --faint: #78756d;
  --hair: #e5e2d9; --accent: #0d6a63; --second: #b8743a; --wash: #e8f1ee; --good: #0d6a63;
  --bad: #a8352b; --badwash: #f8eae7; --tile: #ffffff;
  --serif: "Iowan Old Style", "Palatino Linotype", Palatino, "Source Serif 4", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Helvetica Neue", Arial,
    "Hiragino Sans", "PingFang SC", "Noto Sans CJK SC", "Noto Sans Arabic", sans-serif;
  --mono: ui-monospace, "SF Mono", SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #161715; --raised: #1e1f1c; --ink: #e9e7e0; --soft: #a3a097; --faint: #8a877e;
    --hair: #33342f; --accent: #5cc2b3; --second: #e0a067; --wash: #1d2f2b; --good: #5cc2b3;
    --bad: #ee8c7f; --badwash: #3a2320; --tile: #f4f3ef;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.55 var(--sans); font-variant-numeric: tabular-nums;
}
main, header, footer { max-width: 1040px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 72px; }
.over { color: var(--accent); font-size: 13px; letter-spacing: .04em; margin: 0 0 14px; }
h1 {
  font: 400 44px/1.12 var(--serif); letter-spacing: -.01em; margin: 0 0 20px;
  text-wrap: balance;
}
.lead { font: 400 19px/1.55 var(--serif); max-width: 44em; margin: 0 0 36px; text-wrap: pretty; }
.facts {
  display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 18px 28px;
  margin: 0; padding: 18px 0; border: solid var(--hair); border-width: 1px 0;
}
.facts dt { color: var(--soft); font-size: 12.5px; }
.facts dd { margin: 1px 0 0; }
section { margin: 72px 0 0; }
h2 { font: 400 27px/1.2 var(--serif); margin: 0 0 8px; text-wrap: balance; }
section > .intro { color: var(--soft); max-width: 46em; margin: 0 0 26px; text-wrap: pretty; }
h3 { font: 600 14px/1.4 var(--sans); margin: 0 0 2px; }
.quiet { color: var(--soft); }
.scroll { overflow-x: auto; margin: 0 -28px; padding: 0 28px; }
table { border-collapse: collapse; width: 100%; }
th {
  font-weight: 400; color: var(--soft); font-size: 12.5px; text-align: start;
  vertical-align: bottom;
}
th, td { padding: 10px 14px 10px 0; }
tbody th, tbody td, .rule { border-top: 1px solid var(--hair); vertical-align: top; }
tbody th { color: var(--ink); font-size: 15px; }
.card { min-width: 800px; }
.card td small { white-space: nowrap; }
.card tbody th { width: 36%; padding-right: 28px; }
.card small, .cell small {
  display: block; color: var(--soft); font-size: 12.5px; line-height: 1.4;
}
.card .num { font-size: 19px; line-height: 1.3; }
.card .off { color: var(--bad); }
.verdict {
  display: inline-block; border-radius: 99px; padding: 0 10px; margin: 2px 0 2px 4px;
  white-space: nowrap;
}
.verdict.met { background: var(--wash); color: var(--good); }
.verdict.missed { background: var(--badwash); color: var(--bad); }
.verdict.not { border: 1px solid var(--hair); color: var(--soft); }
.multiples {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 34px 36px;
}
.curves .chart { max-width: 300px; }
.curves { grid-template-columns: repeat(auto-fill, minmax(218px, 1fr)); gap: 34px 28px; }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: 12.5px; line-height: 1.45; }
figcaption h3 { color: var(--ink); }
.chart { display: block; width: 100%; height: auto; margin-top: 8px; overflow: visible; }
.chart text { font: 10.5px var(--sans); fill: var(--soft); }
.chart .label { font-size: 12px; fill: var(--ink); }
.chart .grid, .chart-key .grid { stroke: var(--hair); stroke-width: 1; }
.chart .raw, .chart-key .raw { fill: none; stroke: var(--accent); stroke-width: 1; opacity: .28; }
.chart .main, .chart-key .main {
  fill: none; stroke: var(--accent); stroke-width: 1.8; stroke-linejoin: round;
}
.chart .other, .chart-key .other {
  fill: none; stroke: var(--second); stroke-width: 1.6; stroke-linejoin: round;
}
.chart .dot, .chart-key .dot { fill: var(--second); }
.chart .main-text { fill: var(--accent); font-weight: 600; }
.chart .other-text { fill: var(--second); font-weight: 600; }
.chart .level, .chart-key .level { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 3 3; }
.bar0 { fill: var(--accent); } .bar1 { fill: var(--second); }
.chart .value0 { fill: var(--accent); } .chart .value1 { fill: var(--second); }
.chart .chance, .chart-key .chance { stroke: var(--ink); stroke-width: 1.2; }
.chart .target, .chart-key .target {
  stroke: var(--ink); stroke-width: 1.2; stroke-dasharray: 2.5 2.5;
}
.key {
  display: flex; flex-wrap: wrap; gap: 6px 22px; color: var(--soft); font-size: 12.5px;
  margin: 0 0 18px; padding: 0; list-style: none;
}
.key li { display: flex; align-items: center; gap: 7px; }
.key svg { flex: none; display: block; }
.tile { display: block; background: var(--tile); border-radius: 10px; padding: 5px; }
.gallery { min-width: 860px; table-layout: fixed; }
.gallery td, .gallery tbody th { padding: 12px 16px 12px 0; }
.gallery th:first-child { width: 104px; }
.gallery [dir=rtl] { padding-right: 34px; }
.gallery [dir=rtl] * { padding-right: 0; }
.gallery ol { list-style: none; margin: 0; padding: 0; }
.gallery li {
  line-height: 1.42; margin: 0 0 3px; color: var(--soft); font-size: 13.5px;
  overflow-wrap: anywhere; text-align: start;
}
.gallery li.right { color: var(--accent); font-weight: 600; }
.gallery li.right::after { content: " ✓"; font-weight: 400; }
.gallery li.answer { color: var(--faint); font-size: 12.5px; margin-top: 6px; }
.shown {
  font-size: 12.5px; color: var(--soft); line-height: 1.35; margin-top: 6px;
  overflow-wrap: anywhere;
}
.queries {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(420px, 1fr)); gap: 26px 44px;
}
.query { border-top: 1px solid var(--hair); padding-top: 12px; min-width: 0; }
.query p { display: flex; justify-content: space-between; gap: 16px; margin: 0 0 10px; }
.query p small { color: var(--soft); white-space: nowrap; }
.strip { display: flex; gap: 8px; }
.strip .tile { flex: 1 1 0; min-width: 0; width: 100%; height: auto; aspect-ratio: 1; }
.strip .right { outline: 2.5px solid var(--accent); outline-offset: 2px; }
.caps .said { color: var(--ink); font-size: 14px; line-height: 1.4; overflow-wrap: anywhere; }
.caps small { color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.caps .hit { color: var(--accent); font-weight: 600; }
.talks {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 34px 36px;
  align-items: start;
}
.talk .tile { margin-bottom: 14px; }
.turn { margin: 0 0 14px; }
.turn p {
  margin: 0; padding: 8px 13px; border-radius: 13px; max-width: 92%; width: fit-content;
  overflow-wrap: anywhere; line-height: 1.45;
}
.turn .ask {
  background: var(--raised); border: 1px solid var(--hair); border-end-start-radius: 3px;
}
.turn .say { background: var(--wash); margin: 5px 0 0 auto; border-end-end-radius: 3px; }
.turn small {
  display: block; text-align: end; color: var(--soft); font-size: 12px; margin-top: 4px;
}
.turn small.wrong { color: var(--bad); }
pre {
  margin: 4px 0 20px; padding: 12px 16px; background: var(--raised);
  border: 1px solid var(--hair); border-radius: 8px; overflow-x: auto;
  font: 13px/1.5 var(--mono);
}
.limits { margin: 0; padding-left: 1.15em; max-width: 46em; }
.limits li { margin-bottom: 8px; text-wrap: pretty; }
.plain td, .plain tbody td { font-size: 13px; vertical-align: top; overflow-wrap: anywhere; }
.plain { min-width: 620px; }
.fine { font-size: 13px; color: var(--soft); max-width: 62em; }
.versions {
  columns: 3 220px; column-gap: 36px; font-size: 13px; margin: 0; padding: 0; list-style: none;
}
.versions li, .every li {
  display: flex; justify-content: space-between; gap: 12px;
  border-bottom: 1px solid var(--hair); padding: 3px 0; break-inside: avoid;
}
.versions span:first-child, .every span:first-child { color: var(--soft); }
.every {
  columns: 2 360px; column-gap: 36px; font: 12px/1.5 var(--mono); margin: 16px 0 0; padding: 0;
  list-style: none;
}
summary { cursor: pointer; color: var(--accent); }
a { color: var(--accent); text-decoration-thickness: 1px; text-underline-offset: 2px; }
footer { color: var(--soft); font-size: 12.5px; padding-top: 56px; padding-bottom: 56px; }
@media (max-width: 640px) {
  main, header, footer { padding-left: 18px; padding-right: 18px; }
  .scroll { margin: 0 -18px; padding: 0 18px; }
  header { padding-top: 40px; }
  h1 { font-size: 32px; } .lead { font-size: 17px; } section { margin-top: 52px; }
  .queries { grid-template-columns: 1fr; }
  .facts { grid-template-columns: 1fr 1fr; }
}
@media print {
  section { break-inside: avoid-page; }
  .scroll { overflow: visible; }
}
"""
