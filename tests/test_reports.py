"""Texts, page and files of an analysis: each number is the JSON's, each file whole, nothing outside the folder."""

import csv
import dataclasses
import html.parser
import io
import json
import re
import sys
import warnings
from pathlib import Path

import pytest
from matplotlib import rc_context
from outcomes import KINDS, about, outcome, row

from lightning_compress import tables
from lightning_compress.analysis import advice
from lightning_compress.analysis.outcome import Outcome, marked
from lightning_compress.analysis.page import page
from lightning_compress.analysis.report import TIMINGS, ber_text, report_text
from lightning_compress.analysis.write import csv_text, prepare, write
from lightning_compress.plots.rows import stored

FILES = {
    "compression_report.txt",
    "ber_compression_analysis.txt",
    "results.json",
    "results.csv",
    "compression_analysis.png",
    "ber_compression_analysis.png",
    "report.html",
}
COLUMNS = {"ratio": "compression_ratio", "measured_ratio": "compression_ratio"}  # shorter names in texts


def sections(text: str) -> dict[str, list[str]]:
    """Heading -> lines below it."""
    found: dict[str, list[str]] = {"": []}
    heading = ""
    lines = text.splitlines()
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line and set(below) in ({"-"}, {"="}) and len(below) == len(line):
            heading = line
            found[heading] = []
        elif line and set(line) not in ({"-"}, {"="}):
            found[heading].append(line)
    return found


def table(lines: list[str]) -> list[dict[str, str]]:
    """The rows of the table among some lines, cut at the columns that its rule shows."""
    at = next(i for i, line in enumerate(lines) if re.fullmatch(r"-+( +-+)+ *", line))
    spans = [m.span() for m in re.finditer("-+", lines[at])]
    cut = [[line[a:b].strip() for a, b in spans] for line in [lines[at - 1], *lines[at + 1 :]]]
    return [dict(zip(cut[0], cells, strict=True)) for cells in cut[1:]]


def same(cell: str, value: object) -> bool:
    """A cell is what the JSON holds, rounded to the digits that are shown; unknown is a dash."""
    if value is None:
        return cell == "-"
    if isinstance(value, str):
        return cell == value
    digits = cell.replace(",", "")
    return digits == (str(value) if isinstance(value, int) else f"{value:.4g}") or digits == f"{value:.4g}"


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_the_report_is_the_json(kind):
    found = outcome(kind)
    values = json.loads(json.dumps(found.to_json(), allow_nan=False))
    rows = {r["name"]: r for r in values["rows"]}
    text = sections(report_text(found))
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in text[f"Compression of {found.about.model}"])
    assert facts["parameters"] == f"{values['about']['params']:,}"
    assert facts["dense bytes (float32)"] == f"{values['about']['dense_bytes']:,}"
    assert facts["own archive, bytes"] == f"{values['about']['file_bytes']:,}"
    assert facts["number of inputs"] == f"{values['about']['n_samples']:,}"
    macs = values["about"]["macs"]
    assert facts["multiply-accumulates for one input"] == ("-" if macs is None else f"{macs:,.0f}")
    worked = [r["name"] for r in values["rows"] if r["status"] == "ok"]
    if not worked:
        assert text["All rows"] == ["No technique gave a model."]
        return
    body = table(text["All rows"])
    assert [line["technique"] for line in body] == worked
    for line in body:
        for column, cell in line.items():
            value = rows[line["technique"]].get(COLUMNS.get(column, column))
            if column == "macs":
                assert cell == ("-" if value is None else f"{value:,.0f}")
            elif column == "front":
                assert cell == ("knee" if rows[line["technique"]]["knee"] else "front" if value else cell)
                assert bool(cell) == rows[line["technique"]]["pareto"]
            elif column != "technique":
                assert same(cell, value), (line["technique"], column, cell, value)
    for heading in ("Best of each group", "Combined pipelines, run and measured", "Recommended"):
        if not any("---" in line for line in text.get(heading, [])):
            continue
        for line in table([x for x in text[heading] if not x.startswith("The product")]):
            name = line.get("technique") or line["pipeline"]
            for column, cell in line.items():
                if column in ("ratio", "measured_ratio", "ber", "ber_se", "file_bytes", "product_of_ratios"):
                    value = None if name == "none" else rows[name][COLUMNS.get(column, column)]
                    assert same(cell, value), (name, column)


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_the_ber_text_is_the_json(kind):
    found = outcome(kind)
    values = json.loads(json.dumps(found.to_json()))
    rows = {r["name"]: r for r in values["rows"]}
    text = sections(ber_text(found))
    limits = text["Largest ratio for each limit on the output error rate"]
    front = text["Front: no other row is both smaller and closer to the original"]
    if not any(r["ber"] is not None and r["status"] == "ok" for r in rows.values()):
        assert (
            limits == front == text["Knee"] == ["Unknown: no row has both a file and an output error rate."]
        )
        return
    body = table([line for line in limits if not line.startswith("Below")])
    assert {line["threshold"]: line["technique"] for line in body} == {
        limit: name or "none" for limit, name in values["best"].items()
    }
    body += table([line for line in front if not line.startswith("and ")])
    for line in body:
        chosen = rows.get(line["technique"])
        for column in ("ratio", "ber", "ber_se", "file_bytes"):
            assert same(line[column], chosen[COLUMNS.get(column, column)] if chosen else None)
        saved = None if chosen is None else 100 * (1 - chosen["size_fraction"])
        assert same(line["saved_percent"], saved)
    assert [line["technique"] for line in body[len(values["best"]) :]] == values["pareto"][:10]
    assert ("No knee" in text["Knee"][0]) != values["knee"]["found"]
    assert text["Knee"][0].startswith(values["knee"]["name"] + ",")
    fine = [line for line in limits if line.startswith("Below the resolution")]
    assert bool(fine) == bool(values["below_resolution"])
    for line in table(text["Bit errors in the stored codes"]) if found.bit_errors else []:
        assert [float(line["flipped_bits"]), float(line["ber"])] in values["bit_errors"][line["format"]]


def test_a_long_front_names_the_rest():
    rows = marked([row(f"r{i:02}", "pruning", 1 + i, 0.01 * i) for i in range(14)])
    text = sections(ber_text(Outcome(about(), rows)))
    lines = text["Front: no other row is both smaller and closer to the original"]
    assert lines[-1] == "and 4 more: r10, r11, r12, r13"
    assert len(table(lines[:-1])) == 10


def test_an_infinite_error_is_unknown_as_in_the_json():
    lost = row(
        "a", "pruning", 2, float("inf"), ber_se=float("nan"), reason="3 of 40 output values are not finite"
    )
    found = Outcome(about(task="regression"), marked([lost, row("b", "pruning", 3, 0.1)]))
    text = report_text(found)
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"][0]["ber"] is None
    assert table(sections(text)["All rows"])[0]["ber"] == "-" and "a: 3 of 40 output values" in text
    assert not re.search(r"\b(inf|nan)\b", text + ber_text(found)) and "data-v='inf'" not in page(found)


def test_reports_say_what_was_left_out_and_why():
    text = report_text(outcome("many"))
    assert "student_1percent: train_students=False" in text
    assert "pruned_structured_0.95: layer conv1: 1 of 6 channels" in text
    assert "measured on synthetic inputs: not an accuracy" in text
    assert "synthetic" not in report_text(outcome("regression"))
    assert text.count("RuntimeError") == 0 < report_text(outcome("failed")).count("RuntimeError")
    weights = report_text(outcome("weights")) + ber_text(outcome("weights"))
    assert "No output error rate was measured (no architecture given: pass model=)" in weights
    assert "nan" not in weights.split() and "nan%" not in weights


@pytest.mark.parametrize("make", [report_text, ber_text, page, csv_text])
def test_equal_outcomes_give_equal_texts_but_for_one_line(make):
    one = outcome("many")
    rows = tuple(dataclasses.replace(r, seconds=2 * r.seconds) for r in one.rows)
    assert make(one) == make(outcome("many"))
    if make is csv_text:
        return  # seconds are a column there
    ours, others = make(one).splitlines(), make(Outcome(one.about, rows, one.bit_errors)).splitlines()
    differ = [a for a, b in zip(ours, others, strict=True) if a != b]
    assert all(line.startswith(TIMINGS) for line in differ) and len(differ) == (make is not ber_text)


@pytest.mark.parametrize(
    "bands, value, word",
    [
        (advice.RATIO_BANDS, 0.99, "larger than dense"),
        (advice.RATIO_BANDS, 1.0, "modest"),
        (advice.RATIO_BANDS, 2.0, "moderate"),
        (advice.RATIO_BANDS, 4.0, "good"),
        (advice.RATIO_BANDS, 8.0, "high"),
        (advice.RATIO_BANDS, 16.0, "very high"),
        (advice.ERROR_BANDS, 0.0, "excellent"),
        (advice.ERROR_BANDS, 0.05, "good"),
        (advice.ERROR_BANDS, 0.15, "moderate"),
        (advice.ERROR_BANDS, 0.30, "poor"),
        (advice.ERROR_BANDS, 30.0, "poor"),
        (advice.ERROR_BANDS, float("nan"), "unknown"),
    ],
)
def test_bands_begin_at_their_lower_end(bands, value, word):
    assert advice.word(bands, value) == word


def test_advice_names_the_pipelines_that_were_run():
    found = {case.name: case.row.name if case.row else None for case in advice.cases(outcome("many"))}
    knee = outcome("many").knee
    assert found == {
        "maximum compression": "maximum",
        "hardware": "hardware",
        "minimal loss": "minimal_loss",
        "balanced": knee.name,
    }
    assert [case.row for case in advice.cases(outcome("failed"))] == [None] * 4


# -- page ----------------------------------------------------------------------------------------------------------


class Tags(html.parser.HTMLParser):
    """Collects tags and checks that they close in order."""

    VOID = ("meta", "input", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[list[str]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "button"):
            self.cells[-1][-1] += data


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_well_formed_whole_and_needs_nothing_else(kind):
    found = outcome(kind)
    text = page(found, {"compression_analysis.png": b"\x89PNG"})
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    for name, attrs in tags.seen:
        assert name not in ("link", "iframe", "object") and "srcset" not in attrs
        assert attrs.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attrs
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    names = {cells[0] for cells in tags.cells if cells}
    for name, curve in found.bit_errors.items():
        for pair in curve:
            assert [name, *map(tables.cell, pair)] in tags.cells
    for r in stored(found.combined):
        assert [r.name, *map(tables.cell, (r.compression_ratio, r.product_of_ratios))] in [
            c[:3] for c in tags.cells
        ]
    assert {r.name for r in found.rows} <= names  # worked or not, each row is in a table


def test_page_escapes_what_others_wrote():
    nasty = dataclasses.replace(
        row("a", "pruning", 2, 0.1), status="failed", reason="<script>alert(1)</script> & 'x'"
    )
    text = page(Outcome(about(model="<b>Net</b>"), (nasty,)))
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "<b>Net" not in text


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small() -> Outcome:
    return Outcome(
        about(),
        marked([row("a", "pruning", 2, 0.1), row("b", "sharing", 4, 0.1), row("c", "sharing", 3, 0.3)]),
    )


@pytest.fixture
def models(tmp_path: Path, small: Outcome) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    for r in small.rows:
        (folder / f"{r.name}.lcz").write_bytes(r.name.encode() * r.file_bytes)
    return folder


def test_all_files_are_written_and_nothing_else_is_touched(tmp_path, small, models):
    before = sorted(tmp_path.rglob("*"))
    written = write(small, models, tmp_path / "out")
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == FILES | {"compressed_models"}
    assert sorted(written) == sorted(p for p in out.rglob("*") if p.is_file())
    assert sorted(p for p in tmp_path.rglob("*") if out not in (p, *p.parents)) == before
    for r in small.rows:
        assert (out / "compressed_models" / f"{r.name}.lcz").read_bytes() == (
            models / f"{r.name}.lcz"
        ).read_bytes()
    assert (out / "compression_report.txt").read_text(encoding="utf-8") == report_text(small)
    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == small.to_json()
    for name in ("compression_analysis.png", "ber_compression_analysis.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")
    first = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    with rc_context({"axes.facecolor": "red", "font.size": 30}):  # the user's style is for the user's figures
        write(small, models, out)
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == first  # byte for byte


def test_csv_holds_what_the_json_holds():
    found = outcome("regression")
    lines = list(csv.DictReader(io.StringIO(csv_text(found))))
    for line, value in zip(lines, found.to_json()["rows"], strict=True):
        extra = value.pop("extra")
        for name, expected in {**value, **extra}.items():
            cell = line[name]
            if isinstance(expected, dict):
                assert json.loads(cell) == expected
            elif isinstance(expected, int | float) and not isinstance(expected, bool):
                assert float(cell) == expected
            else:
                assert cell == ("" if expected is None else str(expected))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


def test_without_matplotlib_one_warning_names_the_extra(tmp_path, small, models, no_figures):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write(small, models, tmp_path / "out")
    (warning,) = caught
    assert "lightning-compress[tensorboard]" in str(warning.message)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f for f in FILES if not f.endswith(".png")} | {
        "compressed_models"
    }


@pytest.mark.filterwarnings("ignore:The report has no figures")
def test_which_models_are_copied(tmp_path, small, models, no_figures):
    def copied() -> set[str]:
        return {p.name for p in (tmp_path / "out" / "compressed_models").iterdir()}

    write(small, models, tmp_path / "out", "all")
    assert copied() == {"a.lcz", "b.lcz", "c.lcz"}
    (tmp_path / "out" / "compressed_models" / "mine.lcz").write_bytes(b"of the user")
    write(small, models, tmp_path / "out", "pareto")
    assert (
        copied()
        == {f"{r.name}.lcz" for r in small.pareto} | {"mine.lcz"}
        != {"a.lcz", "b.lcz", "c.lcz", "mine.lcz"}
    )
    write(small, None, tmp_path / "out", "none")
    assert copied() == {"mine.lcz"}
    write(small, None, tmp_path / "other", "none", ber=False)
    assert {p.name for p in (tmp_path / "other").iterdir()} == {
        "compression_report.txt",
        "results.json",
        "results.csv",
        "report.html",
    }


@pytest.mark.filterwarnings("ignore:The report has no figures")
def test_models_that_are_there_already_stay(tmp_path, small, models, no_figures):
    target = tmp_path / "out" / "compressed_models"
    target.parent.mkdir()
    models.rename(target)
    before = {p.name: p.stat().st_ino for p in target.iterdir()}
    for choice in ("all", "pareto", "none", "all"):  # the second time there is an earlier report
        write(small, target, tmp_path / "out", choice)
        assert {p.name: p.stat().st_ino for p in target.iterdir()} == before


def test_errors_come_before_anything_is_written(tmp_path, small, models):
    with pytest.raises(ValueError, match="models='best' is unknown; allowed: all, pareto, none"):
        write(small, models, tmp_path / "out", "best")
    with pytest.raises(ValueError, match="needs the folder"):
        write(small, None, tmp_path / "out")
    (models / "b.lcz").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"b\.lcz has 5 bytes, and row b measured 61706 bytes"):
        write(small, models, tmp_path / "out")
    (models / "b.lcz").unlink()
    with pytest.raises(ValueError, match=r"b\.lcz is missing"):
        write(small, models, tmp_path / "out")
    outside = dataclasses.replace(small.rows[0], name="../rows/a")
    with pytest.raises(ValueError, match="is missing"):
        write(Outcome(about(), (outside,)), models, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(OSError, match="cannot be written into"):
            prepare(path)


def test_an_earlier_report_cannot_make_us_delete_outside(tmp_path, small, models, no_figures):
    out = tmp_path / "out"
    (out / "compressed_models").mkdir(parents=True)
    (tmp_path / "out" / "keep.lcz").write_bytes(b"x")
    for content in ('{"rows": [{"name": "../keep"}]}', "[]", "{", '{"rows": [1]}'):
        (out / "results.json").write_text(content)
        with pytest.warns(UserWarning, match="no figures"):
            write(small, models, out)
    assert (out / "keep.lcz").exists()


def test_tables_and_texts_share_their_numbers():
    assert same(tables.cell(0.123456), 0.123456) and same(tables.cell(1234567), 1234567)
    assert not same("0.1235", 0.1236) and not same("-", 0.0) and same("-", None)
