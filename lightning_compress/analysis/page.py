"""An analysis as one HTML file that needs no other: figures inside, tables that sort, light or dark, fit for paper."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from string import Template

from lightning_compress import tables
from lightning_compress.analysis import paragraphs
from lightning_compress.analysis.advice import ERROR_BANDS, RATIO_BANDS, cases, caveats, word
from lightning_compress.analysis.limits import ber_text
from lightning_compress.analysis.outcome import Outcome
from lightning_compress.analysis.report import report_text
from lightning_compress.analysis.rows import Row
from lightning_compress.plots.rows import COLOURS, OTHER, stored

_CAPTIONS = {
    "compression_analysis.png": "What every technique saves, and what it costs.",
    "ber_compression_analysis.png": "Output error against compression ratio: the front, its knee, the best per limit.",
}

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header><h1>$title</h1><p>$subtitle</p></header>
<main>
$body
</main>
<script>$script</script>
</body>
</html>
""")

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2733;--soft:#5b6b7b;--paper:#fff;--panel:#f4f6f8;--line:#d5dce3;--accent:#0072b2}
@media (prefers-color-scheme:dark){:root{--ink:#e6ebf0;--soft:#9fb0c0;--paper:#14191f;--panel:#1e252d;--line:#36414d;
--accent:#56b4e9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:84rem;padding:1.5rem;color:var(--ink);background:var(--paper);
font:16px/1.5 system-ui,sans-serif}
h1{margin:0;font-size:1.7rem}h2{margin:2.2rem 0 .6rem;font-size:1.2rem}header p{margin:.2rem 0 0;color:var(--soft)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(11rem,1fr));gap:.7rem;margin:1.2rem 0}
.facts div{background:var(--panel);border-radius:.4rem;padding:.6rem .8rem;overflow-wrap:anywhere}
.facts b{display:block;font-size:1.25rem}.facts span{color:var(--soft);font-size:.85rem}
.notes{border-left:.3rem solid #e69f00;background:var(--panel);margin:1rem 0;padding:.6rem .6rem .6rem 1.8rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.28rem .6rem;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
td.wide{white-space:normal;min-width:18rem}
th{background:var(--panel)}
.n{text-align:right}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--accent)}
th[aria-sort=ascending] button::after{content:" \\25B2"}th[aria-sort=descending] button::after{content:" \\25BC"}
tr.front td{font-weight:600}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:50%;margin-right:.4em;border:1px solid var(--line)}
figure{margin:1rem 0}figure img{width:100%;height:auto;background:#fff;border-radius:.4rem}
figcaption{color:var(--soft);font-size:.9rem}
input{font:inherit;padding:.3rem .6rem;margin:0 0 .6rem;width:min(100%,22rem);border:1px solid var(--line);
border-radius:.4rem;background:var(--paper);color:inherit}
pre{overflow-x:auto;background:var(--panel);padding:1rem;border-radius:.4rem;font-size:.8rem}
summary{cursor:pointer;color:var(--accent)}
@page{size:A4 landscape;margin:1cm}
@media print{:root{--ink:#000;--soft:#333;--paper:#fff;--panel:#f4f4f4;--line:#bbb}body{max-width:none;padding:0}
input,details{display:none}table{font-size:7pt}th,td{padding:1pt 3pt}tr,figure{break-inside:avoid}
.scroll{overflow:visible}
}
"""

# Numbers sort by data-v, which is empty where the value is unknown; those stay at the end in either direction.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sort")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[i].dataset.v ?? row.cells[i].textContent;
    const numeric = head.classList.contains("n");
    [...body.rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = numeric ? x - y : x.localeCompare(y);
      return up ? order : -order;
    }).forEach(row => body.append(row));
  }));
}
document.getElementById("filter").addEventListener("input", event => {
  const wanted = event.target.value.toLowerCase();
  for (const row of document.getElementById("rows").tBodies[0].rows)
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
"""

Value = str | int | float | None


def page(outcome: Outcome, figures: Mapping[str, bytes] | None = None) -> str:
    """The report as a single HTML document.

    Args:
        outcome: of an analysis.
        figures: name of a file -> PNG, to be put inside.

    Returns:
        The document, UTF-8 by its own word; it loads nothing from elsewhere.

    Examples:
        >>> from lightning_compress.analysis.outcome import About, Outcome
        >>> from lightning_compress.analysis.page import page
        >>> about = About("LeNet5", 61706, 246824, 230000, 281640.0, "classification", "", "test set", 1000, ())
        >>> "<h1>Compression of LeNet5</h1>" in page(Outcome(about, ()))
        True
    """
    about, rows = outcome.about, outcome.rows
    notes = caveats(outcome)
    parts = [
        _facts(outcome),
        f"<ul class='notes'>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else "",
        _section("Largest ratio for each limit on the output error rate", _limits(outcome)),
        _section("Figures", "".join(_figure(name, png) for name, png in (figures or {}).items())),
        _section("All techniques", _rows(rows)),
        _section("Combined pipelines, run and measured", _pipelines(outcome)),
        _section("Bit errors in the stored codes", _bit_errors(outcome)),
        _section("Skipped and failed", _left_out(rows)),
        _section("Advice", _advice(outcome)),
        _section("The texts", _text("compression_report.txt", report_text(outcome))),
        _text("ber_compression_analysis.txt", ber_text(outcome)),
    ]
    return _PAGE.substitute(
        title=escape(f"Compression of {about.model}"),
        subtitle=escape(f"{about.task or 'no output compared'}; inputs: {about.inputs or 'none'}"),
        style=_STYLE,
        script=_SCRIPT,
        body="\n".join(part for part in parts if part),
    )


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>" if content else ""


def _facts(outcome: Outcome) -> str:
    about, rows = outcome.about, outcome.rows
    knee = outcome.knee if outcome.has_knee else None
    entries: list[tuple[str, str]] = [
        ("parameters", tables.cell(about.params)),
        ("dense bytes (float32)", tables.cell(about.dense_bytes)),
        ("multiply-accumulates for one input", tables.cell(paragraphs.whole(about.macs))),
        ("techniques that gave a model", f"{len(stored(rows))} of {len(rows)}"),
    ]
    if knee:
        entries.append((f"ratio at the knee, {knee.name}", tables.cell(knee.compression_ratio)))
        entries.append(("output error rate there", tables.cell(knee.ber)))
    if about.metric_name:
        entries.append((f"{about.metric_name} on test data", tables.cell(about.metric)))
    cards = (f"<div><b>{escape(value)}</b><span>{escape(name)}</span></div>" for name, value in entries)
    return f"<div class='facts'>{''.join(cards)}</div>"


def _limits(outcome: Outcome) -> str:
    lines: list[list[Value]] = []
    for limit in outcome.about.thresholds:
        row = outcome.best(limit)
        if row is None:
            lines.append([limit, "none", None, None, None, None, None, ""])
        else:
            bands = f"{word(RATIO_BANDS, row.compression_ratio)} ratio, {word(ERROR_BANDS, row.ber)} error"
            saved = 100 * (1 - row.size_fraction)
            lines.append(
                [limit, row.name, row.compression_ratio, row.ber, row.ber_se, row.file_bytes, saved, bands]
            )
    header = ["limit", "technique", "ratio", "error rate", "± SE", "bytes", "saved %", "bands"]
    return _table(header, [_cells(line) for line in lines], numeric="10111110") if lines else ""


def _rows(rows: Sequence[Row]) -> str:
    names = sorted({name for row in rows for name in row.extra})
    tested = any(row.metric == row.metric for row in rows)
    header = [
        "technique",
        "group",
        "ratio",
        "bytes",
        "sparsity",
        "bits",
        "parameters",
        "MACs",
        "weight SQNR dB",
    ]
    header += ["error rate", "± SE", "front", *(["test metric", "change"] if tested else []), *names]
    lines, marks = [], []
    for row in stored(rows):
        front = "knee" if row.knee else "front" if row.pareto else ""
        values: list[Value] = [row.compression_ratio, row.file_bytes, row.sparsity, row.bits_mean, row.params]
        values += [paragraphs.whole(row.macs), row.weight_sqnr_db, row.ber, row.ber_se, front]
        values += [row.metric, row.metric_change] if tested else []
        values += [row.extra.get(name) for name in names]
        colour = COLOURS.get(row.group, OTHER)
        dot = f"<td><span class='dot' style='background:{colour}'></span>{escape(row.group)}</td>"
        lines.append(_cells([row.name]) + dot + _cells(values))
        marks.append("front" if front else "")
    numeric = "001111111110" + "1" * (len(header) - 12)
    search = "<input id='filter' type='search' placeholder='Show only …' aria-label='Show only rows with this text'>"
    return search + _table(header, lines, numeric, marks, "rows")


def _pipelines(outcome: Outcome) -> str:
    header = ["pipeline", "measured ratio", "product of ratios", "error rate", "± SE", "bytes"]
    lines = [
        _cells([r.name, r.compression_ratio, r.product_of_ratios, r.ber, r.ber_se, r.file_bytes])
        for r in stored(outcome.combined)
    ]
    return _table(header, lines, numeric="011111") if lines else ""


def _bit_errors(outcome: Outcome) -> str:
    lines = [_cells([name, *pair]) for name, curve in outcome.bit_errors.items() for pair in curve]
    return _table(["format", "flipped bits", "error rate"], lines, numeric="011") if lines else ""


def _table(
    header: Sequence[str], lines: Sequence[str], numeric: str, marks: Iterable[str] = (), name: str = ""
) -> str:
    """A table that sorts by a click on its header; ``numeric`` has a 1 for every column of numbers."""
    heads = "".join(
        f"<th{' class=n' if flag == '1' else ''} scope='col'><button type='button'>{escape(text)}</button></th>"
        for text, flag in zip(header, numeric, strict=True)
    )
    classes = list(marks) or [""] * len(lines)
    body = "".join(
        f"<tr{f' class={mark}' if mark else ''}>{line}</tr>\n"
        for line, mark in zip(lines, classes, strict=True)
    )
    opening = f"<table class='sort'{f' id={name}' if name else ''}>"
    return (
        f"<div class='scroll'>{opening}<thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _cells(values: Iterable[Value]) -> str:
    return "".join(_cell(value) for value in values)


def _cell(value: Value) -> str:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    known = paragraphs.finite(value)
    return f"<td class=n data-v='{'' if known is None else known}'>{tables.cell(known)}</td>"


def _left_out(rows: Sequence[Row]) -> str:
    lines = [
        f"{_cells([row.name, row.status])}<td class='wide'>{escape(row.reason)}</td>"
        for row in rows
        if row.status != "ok"
    ]
    return _table(["technique", "status", "reason"], lines, numeric="000") if lines else ""


def _advice(outcome: Outcome) -> str:
    lines = []
    for case in cases(outcome):
        row = case.row
        values: list[Value] = (
            [row.name, row.compression_ratio, row.ber] if row else ["not measured", None, None]
        )
        lines.append(_cells([case.name, case.advice, *values]))
    return _table(["aim", "advice", "measured here", "ratio", "error rate"], lines, numeric="00011")


def _figure(name: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    caption = escape(_CAPTIONS.get(name, name))
    image = f"<img src='data:image/png;base64,{data}' alt='{caption}'>"
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _text(name: str, content: str) -> str:
    return f"<details><summary>{escape(name)}</summary><pre>{escape(content)}</pre></details>"
