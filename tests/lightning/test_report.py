"""The command `partial-embedding report`: the page of a run, and what it says to bad input."""

import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from partial_embedding.cli import main
from partial_embedding.monitor.record import read_record
from partial_embedding.recipes.report_command import report_command

RUN = Path("runs/version_0")
VOID = {"meta", "link"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed by its own end."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.cells: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.references += [given[k] or "" for k in ("src", "href", "srcset") if k in given]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture
def page(fitted_run: list[str], capsys: pytest.CaptureFixture[str]) -> Page:
    assert main(["report", "runs"]) == 0
    assert capsys.readouterr().out == f"report: {RUN / 'report.html'}\n"
    return Page((RUN / "report.html").read_text(encoding="utf-8"))


def test_the_page_references_nothing_outside_itself(page: Page) -> None:
    assert page.references
    assert [ref[:30] for ref in page.references if not ref.startswith("data:")] == []
    html = (RUN / "report.html").read_text(encoding="utf-8")
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "script" not in page.tags
    # Nor does a picture in it.
    assert not re.search(r"\son\w+=", html)


def test_the_page_holds_the_numbers_of_the_run(page: Page) -> None:
    record = read_record(RUN)
    (track,) = record.tables.values()
    assert len(track.trainable) == 3
    for _, trainable in track.trainable:
        assert f"{trainable:,}" in page.cells
    for result in record.audit:
        assert f"{result.frozen:,}" in page.cells
    assert "No frozen row changed a bit." in page.text
    best = max(score.metrics["val_accuracy"] for score in record.scores)
    assert f"{best:.4g}" in page.cells
    for cohort in track.cohorts.values():
        assert f"{cohort.drift[-1][2]:.2f}" in page.cells
    for band in track.bands.values():
        _, low, _, high = band.drift[-1]
        assert f"{low:.2f} to {high:.2f}" in page.cells
    for row in track.moved:
        assert row.token in page.text
        assert all(token in page.text for token in row.before + row.after)
    assert "- {epoch: 0, rows: missing}" in page.text
    assert "max_epochs: 6" in page.text


def test_each_picture_says_what_it_shows(page: Page) -> None:
    html = (RUN / "report.html").read_text(encoding="utf-8")
    titles = re.findall(r"<svg[^>]*><title>([^<]*)</title>", html)
    assert len(titles) == 4
    assert all(len(title) > 40 for title in titles)


def test_the_same_run_gives_the_same_page(page: Page) -> None:
    before = (RUN / "report.html").read_bytes()
    report_command([str(RUN)])
    assert (RUN / "report.html").read_bytes() == before


def test_several_runs_are_compared_in_the_folder_around_them(
    fitted_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(RUN, "others/version_0")
    assert main(["report", "runs", "others/version_0", "--title=two"]) == 0
    assert capsys.readouterr().out == "report: report.html\n"
    page = Page(Path("report.html").read_text(encoding="utf-8"))
    best = max(score.metrics["val_accuracy"] for score in read_record(RUN).scores)
    assert page.cells.count(f"{best:.4g}") >= 2
    assert {"runs", "others/version_0"} <= set(page.cells)


def test_a_browser_says_nothing_on_its_console(
    page: Page, console: Callable[..., list[str]]
) -> None:
    assert console(RUN, "report.html") == []
    html = (RUN / "report.html").read_text(encoding="utf-8")
    broken = html.replace("</main>", "<script>missing()</script></main>")
    (RUN / "broken.html").write_text(broken, encoding="utf-8")
    assert console(RUN, "broken.html")


def write(text: str) -> Callable[[], object]:
    def prepare() -> None:
        Path("run").mkdir()
        Path("run/rows.json").write_text(text)

    return prepare


BAD: dict[str, tuple[Callable[[], object], list[str], str]] = {
    "no_run": (lambda: None, ["run"], "run, which holds none"),
    "no_argument": (lambda: None, [], "required: run"),
    "the_same_twice": (write("{}"), ["run", "run/"], "Name each once"),
    "one_of_several_is_none": (write("{}"), ["run", "other"], "other, which holds none"),
    "unknown_option": (write("{}"), ["run", "--colour"], "--colour"),
    "no_json": (write("{"), ["run"], "rows.json"),
    "another_json": (write("{}"), ["run"], "'format'"),
    "another_format": (write('{"format": 99}'), ["run"], "99"),
}


@pytest.mark.parametrize("case", BAD, ids=list(BAD))
def test_bad_input_is_refused_in_one_line(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare, args, part = BAD[case]
    prepare()
    assert main(["report", *args]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", printed.err)
    assert part in printed.err
    assert not Path("run/report.html").exists()
