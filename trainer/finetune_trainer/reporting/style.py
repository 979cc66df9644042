"""How the page looks: light and dark by the reader's own setting, on paper light."""

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --ground: #ffffff; --panel: #f5f7fa; --edge: #dbe1e8;
  --line0: #1763c6; --line1: #c2540a; --mark: #d7ecd9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9f0; --soft: #9aa6b5; --ground: #12161c; --panel: #1a2028;
  --edge: #303a46; --line0: #6fb0ff; --line1: #ffa25c; --mark: #1f4a2a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px 20px 60px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 36px 0 8px; border-bottom: 1px solid var(--edge); padding-bottom: 4px; }
h3 { font-size: 13px; margin: 8px 0 3px; color: var(--soft); font-weight: 600; }
p { margin: 6px 0; overflow-wrap: anywhere; }
.note { color: var(--soft); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin-top: 16px; }
.tile { background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 12px; }
.tile span, .tile small { display: block; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.tile b { font-size: 20px; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--edge); }
th { font-weight: 600; color: var(--soft); }
td { overflow-wrap: break-word; }
.figure { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
th.figure { white-space: normal; }
caption { text-align: left; color: var(--soft); font-weight: 600; }
code { font: 12px ui-monospace, monospace; overflow-wrap: anywhere; }
.side { display: flex; flex-wrap: wrap; gap: 12px 48px; }
.bars meter { width: 200px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 14px; }
figure { margin: 0; background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; padding: 10px; }
figcaption { font-weight: 600; font-size: 13px; display: flex; flex-wrap: wrap; justify-content: space-between; }
.key { color: var(--soft); font-weight: 400; margin-left: 14px; }
.key::before { content: ""; display: inline-block; width: 12px; height: 3px; margin-right: 5px; vertical-align: middle;
  background: var(--key); }
.line0 { --key: var(--line0); } .line1 { --key: var(--line1); }
svg { width: 100%; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 11px; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg .grid { stroke: var(--edge); stroke-width: 1; }
svg .line { fill: none; stroke: var(--key); stroke-width: 1.8; stroke-linejoin: round; }
svg .dot { fill: var(--key); }
article { background: var(--panel); border: 1px solid var(--edge); border-radius: 8px; padding: 4px 12px 12px;
  margin: 10px 0; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(240px, 1fr)); gap: 12px; }
pre { font: 12.5px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0;
  max-height: 260px; overflow-y: auto; unicode-bidi: isolate; }
mark { background: var(--mark); color: inherit; border-radius: 2px; }
@media print {
  :root { color-scheme: light; --ink: #000000; --soft: #444444; --ground: #ffffff; --panel: #ffffff; --edge: #bbbbbb;
    --line0: #1763c6; --line1: #c2540a; --mark: #e2efe3; }
  body { max-width: none; padding: 0; font-size: 11px; }
  pre { max-height: none; } mark { text-decoration: underline; }
  article, figure, .tile, tr { break-inside: avoid; } h2 { break-after: avoid; }
  .charts { grid-template-columns: 1fr 1fr; }
  .wide { overflow: visible; }
}
"""
