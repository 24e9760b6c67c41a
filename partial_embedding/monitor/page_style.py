"""How the page of a run looks: one style sheet, light and dark, down to the width of a phone."""

STYLE = """
:root {
  --ink: #22313f; --soft: #566472; --page: #fdfdfb; --card: #f1f3f2; --line: #d8dedd;
  --accent: #2f6690; --new: #fbe3b3; --good: #1f7a4d; --bad: #b3261e;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e3e9ee; --soft: #a3b0bb; --page: #14191e; --card: #1f272e; --line: #36424c;
    --accent: #7fb7e0; --new: #5d4a1d; --good: #6fcf97; --bad: #ff8a80;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0 1.25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; }
h3 { font-size: 1.05rem; margin: 0; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .4rem 0 1rem; color: var(--soft); }
header dl {
  display: grid; gap: .75rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
}
header dl div {
  display: flex; flex-direction: column-reverse; justify-content: flex-end;
  background: var(--card); border-radius: .6rem; padding: .8rem 1rem;
}
header dt { color: var(--soft); font-size: .85rem; line-height: 1.35; }
header dd { margin: 0; font-size: 1.5rem; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; }
img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; margin: 1rem 0 1.5rem; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { text-align: left; padding: .4rem 1.75rem .4rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
td { vertical-align: top; overflow-wrap: break-word; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.moved {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1rem;
  list-style: none; margin: 1rem 0; padding: 0;
}
.moved li { background: var(--card); border-radius: .6rem; padding: .9rem 1rem; min-width: 0; }
.moved p { font-size: .85rem; margin: .1rem 0 .6rem; }
.moved dl { display: grid; grid-template-columns: 3.6rem 1fr; gap: .35rem .5rem; margin: 0; }
.moved dt { color: var(--soft); font-size: .85rem; }
.moved dd { margin: 0; font-size: .9rem; overflow-wrap: anywhere; }
.moved s { color: var(--soft); }
mark { background: var(--new); color: inherit; border-radius: .25rem; padding: 0 .2rem; }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
@media (max-width: 600px) {
  main { padding: .75rem .9rem 3rem; }
  th, td { padding-right: 1rem; }
}
footer { margin-top: 3rem; border-top: 1px solid var(--line); font-size: .9rem; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; background: var(--card); border-radius: .6rem; padding: 1rem; }
"""
