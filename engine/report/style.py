"""How a report looks: light and dark, from a phone's width up, in colours that the colour-blind tell apart."""

_LIGHT = """--ink: #1c1d20; --soft: #5c6068; --line: #d9dce1; --ground: #fff; --panel: #f5f6f8; --bad: #b3261e;
  --c0: #0b65b8; --c1: #c2510c; --c2: #00805e; --c3: #8d4a9e;"""
_DARK = """--ink: #e7e8ea; --soft: #a2a7b0; --line: #3a3e45; --ground: #17181b; --panel: #212327; --bad: #ff8a80;
  --c0: #6db3f2; --c1: #f2915a; --c2: #4fd1a5; --c3: #d99be0;"""

STYLE = (
    f"""
:root {{ color-scheme: light dark; {_LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}
:root[data-theme=light] {{ color-scheme: light; {_LIGHT} }}
:root[data-theme=dark] {{ color-scheme: dark; {_DARK} }}
"""
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 60px; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 36px 0 8px; }
h3 { font-size: 1rem; margin: 20px 0 2px; } h4, h5, figure, dd { margin: 0; } h4 { font-size: .92rem; }
h5, small, .about, .meaning, .facts, .heard, .legend { color: var(--soft); font-size: .82rem; font-weight: 400; }
p { margin: 4px 0; } .row { margin-top: 18px; } a { color: var(--c0); } :focus-visible { outline: 2px solid var(--c0); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 8px; margin: 16px 0; }
.numbers div, .chart, .prompt { background: var(--panel); border-radius: 6px; padding: 10px 12px; }
.numbers dt { color: var(--soft); font-size: .82rem; } .numbers dd { font-size: 1.05rem; }
.numbers small { display: block; } .prompt { margin: 0 0 10px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 12px; }
.multiples { display: grid; grid-template-columns: repeat(4, 1fr); gap: 8px; }
@media (max-width: 720px) { .multiples { grid-template-columns: repeat(2, 1fr); } }
.small h4, .small .now { white-space: nowrap; font-size: .82rem; }
figcaption { display: flex; justify-content: space-between; gap: 8px; } .now { font-size: .85rem; white-space: nowrap; }
.plot { position: relative; height: 150px; margin: 10px 6px 22px 44px; } .small .plot { height: 80px; }
.plot svg { position: absolute; width: 100%; height: 100%; overflow: visible; fill: none; }
.plot path { vector-effect: non-scaling-stroke; }
.plot span { position: absolute; font-size: 11px; color: var(--soft); white-space: nowrap; }
.y { right: 100%; transform: translate(-6px, -50%); } .x { top: 100%; transform: translate(-50%, 3px); }
.grid { stroke: var(--line); } .line { stroke-width: 1.7; } .thin { stroke-width: 1; } .faint { opacity: .35; }
.dot { stroke-width: 6; stroke-linecap: round; } .resumed { stroke: var(--soft); stroke-dasharray: 3 3; }
.skipped { stroke: var(--bad); stroke-width: 2; } path.c0 { stroke: var(--c0); } path.c1 { stroke: var(--c1); }
path.c2 { stroke: var(--c2); } path.c3 { stroke: var(--c3); }
.key::before { content: "━ "; } .key.dotted::before { content: "● "; } .key { margin-right: 10px; }
.c0::before { color: var(--c0); } .c1::before { color: var(--c1); } .c2::before { color: var(--c2); }
.c3::before { color: var(--c3); } .strip { display: grid; gap: 12px; padding: 8px 0; }
.strip { grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); }
audio { width: 100%; height: 34px; } .wave { width: 100%; height: 32px; display: block; }
.wave path { stroke: var(--c0); vector-effect: non-scaling-stroke; stroke-width: 1.5; }
.given .wave path { stroke: var(--soft); }
.gone, .facts b { color: var(--bad); } .scroll { overflow: auto; max-height: 60vh; border: 1px solid var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--panel); text-align: left; }
th, td { padding: 5px 10px; vertical-align: top; overflow-wrap: anywhere; } td { border-top: 1px solid var(--line); }
.n { text-align: right; white-space: nowrap; } .marked td { font-weight: 600; } summary { cursor: pointer; }
nav { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 8px 0; font-size: .88rem; }
.theme { margin-left: auto; font: inherit; color: inherit; background: var(--panel); cursor: pointer; }
.theme { border: 1px solid var(--line); border-radius: 4px; }
.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); margin-top: 12px; }
.histogram svg { width: 100%; height: auto; font-size: 11px; } .histogram text { fill: var(--soft); }
.histogram .bar { fill: var(--c0); } .histogram .above { fill: var(--soft); }
.histogram line.grid, .histogram .axis { stroke: var(--line); }
.histogram .mark { stroke: var(--c1); stroke-dasharray: 4 3; }
.tip { display: none; position: fixed; top: 0; left: 0; z-index: 1; pointer-events: none; white-space: pre; }
.tip { padding: 4px 8px; border-radius: 4px; background: var(--ink); color: var(--ground); font-size: 12px; }
"""
)
