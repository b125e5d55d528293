"""The page's style sheet: one column, light and dark, from the width of a phone on."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fcfcfb; --ink: #1c1f23; --quiet: #666c73; --rule: #e4e5e2; --field: #f3f4f1;
  --linear: #0b7a6f; --softmax: #8b929a; --before: #c08a2d; --wrong: #b3382c;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #e6e8ea; --quiet: #98a0a8; --rule: #2b3035; --field: #1c2024;
    --linear: #45c2b1; --softmax: #79828b; --before: #d9a84e; --wrong: #f0887c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  -webkit-text-size-adjust: 100%;
}
main { max-width: 1080px; margin: 0 auto; padding: 40px 20px 80px; }
h1 { font-size: clamp(26px, 5vw, 38px); line-height: 1.15; letter-spacing: -0.02em; margin: 0; }
h2 { font-size: 20px; letter-spacing: -0.01em; margin: 56px 0 4px; }
h3 { font-size: 15px; font-weight: 600; margin: 24px 0 6px; }
p { margin: 6px 0 14px; max-width: 68ch; }
.lead { font-size: 18px; margin-top: 12px; }
.note, figcaption, caption { color: var(--quiet); font-size: 14px; }
code, pre { font: 13px/1.6 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre {
  background: var(--field); border-radius: 8px; padding: 12px 14px; margin: 8px 0; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 28px 0 0; }
.fact { background: var(--field); border-radius: 10px; padding: 14px 16px; }
.fact b { display: block; font-size: 26px; font-weight: 600; letter-spacing: -0.02em;
  font-variant-numeric: tabular-nums; }
.fact span { color: var(--quiet); font-size: 13.5px; line-height: 1.4; display: block; }
.clip { border-top: 1px solid var(--rule); padding: 16px 0 20px; }
.clip p { margin: 0 0 10px; font-weight: 500; }
.row { display: grid; grid-template-columns: repeat(var(--n), minmax(0, 232px)); gap: 14px; }
figure { margin: 0; }
video { width: 100%; display: block; border-radius: 8px; background: var(--field); }
figcaption { font-size: 13px; line-height: 1.4; margin-top: 6px; }
.sheet { margin: 0 0 18px; } .sheet img { max-width: 100%; display: block; border-radius: 8px; }
figcaption b { color: var(--ink); font-weight: 600; display: block; }
.wrong { color: var(--wrong); text-decoration: line-through; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums;
  width: 100%; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--rule);
  white-space: nowrap; vertical-align: top; }
th { font-weight: 500; color: var(--quiet); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { display: block; color: var(--quiet); font-size: 12px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 18px; }
.chart { width: 100%; height: auto; display: block; overflow: visible; }
.chart text { fill: var(--quiet); font: 11px system-ui, sans-serif; }
.chart .label { fill: var(--ink); font-size: 12px; }
.rule { stroke: var(--rule); fill: none; }
.mark { stroke: var(--quiet); stroke-dasharray: 3 3; fill: none; }
.curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; stroke: var(--ink); }
.raw { stroke-width: 1; opacity: 0.3; }
.linear { stroke: var(--linear); } .softmax { stroke: var(--softmax); }
.span { stroke-width: 2; }
.teacher { stroke: var(--softmax); } .dot.teacher { fill: var(--softmax); }
.after { stroke: var(--linear); } .dot.after { fill: var(--linear); }
.before { stroke: var(--before); } .dot.before { fill: var(--before); }
.narrow { display: none; }
.strip { display: flex; gap: 4px; max-width: 720px; margin: 6px 0 14px; }
.strip i {
  flex: 1; max-width: 52px; min-width: 0; height: 34px; border-radius: 6px; font-style: normal;
  font-size: 12px; display: flex; align-items: center; justify-content: center;
  border: 1px solid var(--rule); color: var(--quiet); overflow: hidden;
}
.strip i.on { background: var(--linear); border-color: var(--linear); color: var(--paper); }
.strip.many { gap: 2px; } .strip.many i { font-size: 0; }
.bar { background: var(--field); border-radius: 4px; height: 8px; min-width: 90px; }
.bar i { display: block; height: 8px; border-radius: 4px; background: var(--linear); }
.where { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 12px; }
.where > div { background: var(--field); border-radius: 10px; padding: 4px 18px 12px; }
.where ul { margin: 0; padding-left: 18px; } .where li { margin: 6px 0; }
details summary { cursor: pointer; color: var(--quiet); font-size: 14px; }
@media (max-width: 640px) {
  main { padding: 28px 16px 60px; }
  h2 { margin-top: 44px; }
  .row { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)); gap: 10px; }
  .facts { grid-template-columns: 1fr 1fr; }
  .wide { display: none; } .narrow { display: block; }
}
"""
