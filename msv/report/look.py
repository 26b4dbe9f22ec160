"""What the page looks like, and its only script, which sorts."""

STYLE = """
:root { color-scheme: light; --ink: #1c2430; --soft: #5d6776; --line: #dfe3e8; --wash: #f6f7f9; --blue: #0b5cad;
  --red: #b3261e; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 84rem; color: var(--ink); background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif; }
h1, h2, h3 { line-height: 1.25; font-weight: 600; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h1 { font-size: 2rem; margin: 0 0 .5rem; }
h2 { font-size: 1.4rem; margin: 4rem 0 .25rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 2.25rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
p.soft, .soft { color: var(--soft); }
a { color: var(--blue); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font: .88em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { background: var(--wash); border-radius: 3px; padding: .05em .3em; overflow-wrap: anywhere; }
pre { background: var(--wash); border-radius: 6px; padding: .9rem 1rem; overflow-x: auto; margin: .5rem 0; }
.scroll { overflow-x: auto; margin: .75rem 0; border: 1px solid var(--line); border-radius: 6px; background:
  linear-gradient(to left, #fff 2rem, #fff0) right / 4rem 100% no-repeat local,
  linear-gradient(to left, #1c243018, #fff0) right / 1rem 100% no-repeat scroll; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .82rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .55rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody:last-child tr:last-child > * { border-bottom: 0; }
th { font-weight: 500; }
thead th { color: var(--soft); vertical-align: bottom; }
thead tr.over th { border-bottom: 0; padding-bottom: 0; font-size: .8rem; text-align: center; }
.word { text-align: left; }
th:first-child, td:first-child { position: sticky; left: 0; background: #fff; z-index: 1; }
thead button { all: unset; cursor: pointer; }
thead button:hover, thead button:focus-visible { color: var(--blue); text-decoration: underline; }
th[aria-sort] button { color: var(--ink); font-weight: 600; }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
tr.part th { text-align: left; background: var(--wash); color: var(--soft); font-size: .82rem; position: static;
  white-space: normal; }
tbody th { text-align: left; font-weight: 500; }
tr.baseline > * { font-weight: 600; }
tbody tr:hover > td, tbody tr:not(.part):hover > th { background: var(--wash); }
.paper { color: #7a6a45; background: #f5ead080; }
.yes { color: var(--blue); font-weight: 600; }
.bad { color: var(--red); }
.same { color: #9aa3af; }
.other { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .3rem 1.25rem; margin: .75rem 0;
  font-size: .9rem; }
dt { color: var(--soft); }
dd { margin: 0; max-width: 52rem; overflow-wrap: anywhere; }
ul.answers { margin: .75rem 0; padding: 0; list-style: none; font-size: .9rem; }
ul.answers li { margin: .2rem 0; }
figure { margin: 1rem 0; }
figure .plot { overflow-x: auto; }
figure img { display: block; width: 100%; height: auto; }
figure.points img { max-width: 46rem; min-width: 32rem; }
figure.curves img { max-width: 62rem; min-width: 46rem; }
figcaption { color: var(--soft); font-size: .87rem; max-width: 46rem; margin-top: .4rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--blue); width: fit-content; }
svg.bar { display: block; width: 7.5rem; height: 1.1rem; }
footer { margin-top: 4rem; padding-top: 1.25rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .9rem; }
@media (max-width: 40rem) {
  body { padding: 1.75rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .6rem; }
  tr > :first-child:not([colspan]) { min-width: 8rem; white-space: normal; overflow-wrap: anywhere; }
}
@media print { body { max-width: none; } .scroll { overflow: visible; } }
""".strip()

# Rows are sorted inside their part of the table; those without a value stay last whichever way.
SCRIPT = """
document.querySelectorAll("table.sorts").forEach(table => {
  const heads = [...table.querySelectorAll("thead tr:last-child th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const number = head.dataset.kind === "number";
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const order = (one, other) => {
      const a = key(one), b = key(other);
      if (a === "" || b === "") return (a === "") - (b === "");
      const ahead = number ? a - b : a.localeCompare(b, "en", { numeric: true });
      return up ? ahead : -ahead;
    };
    for (const part of table.tBodies) {
      part.append(...[...part.rows].filter(row => !row.classList.contains("part")).sort(order));
    }
  }));
});
""".strip()
