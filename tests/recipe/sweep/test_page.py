"""The report's page: whole, offline, escaped, and what the table says."""

import base64
import re
from html.parser import HTMLParser

from flash_ladder.sweep.report import report
from tests.helpers.made_up_runs import made_up_sweep, write_run

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page has: tags in balance, links, sources, and the cells of its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.links, self.sources, self.rows, self.heads, self.text = [], [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.links += [values["href"]] if "href" in values else []
        self.sources += [values["src"]] if "src" in values else []
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append(values["data-value"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] not in ("script", "style") else ""
        if self.open[-2:] == ["th", "button"]:
            self.heads.append(data)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path):
    report(made_up_sweep(tmp_path))
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert not re.search(r"https?://", text) and "@import" not in text and "url(" not in text
    assert len(page.sources) == 4 and all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert all(b"<svg" in base64.b64decode(source.partition(",")[2]) for source in page.sources)
    assert "NVIDIA H200" in page.text and "torch 2.13.0" in page.text and "2026-11-30" in page.text
    assert "train.py -m attention=flash_v2,eager,sdpa" in page.text


def test_every_link_leads_somewhere(tmp_path):
    report(made_up_sweep(tmp_path / "runs"), tmp_path / "elsewhere" / "report")
    links = Page((tmp_path / "elsewhere" / "report" / "report.html").read_text()).links
    assert len(links) == 2 + 12 + 4 * 3  # data, runs, pictures
    assert all((tmp_path / "elsewhere" / "report" / link).exists() for link in links)


def test_the_table_is_that_of_the_rows(tmp_path):
    report(made_up_sweep(tmp_path))
    page = Page((tmp_path / "report.html").read_text())
    rows = [dict(zip(page.heads, row, strict=True)) for row in page.rows if row]
    assert len(rows) == 13
    assert [row["backend"] for row in rows[::4]] == ["eager", "sdpa", "flash_v2", "flash_v3"]
    assert rows[8]["tokens/s"] == "300000.0" and rows[8]["seq_len"] == "1024" and rows[3]["status"] == "out of memory"
    assert "flash_v3 needs <Hopper> & more" in page.text


def test_all_text_is_escaped(tmp_path):
    bad = '<script>alert("1")</script>&\'"><img src=x onerror=alert(1)>'
    folder = tmp_path / "<b>'\"& #1"
    setting = {"backend": bad, "seq_len": 8, "batch_size": 1, "gpu": bad, "strategy": bad}
    for number in range(2):
        more = {"overrides": [f'seed="{number}{bad}"', bad]}
        measured = {"memory/peak_gib": 1.0}
        write_run(folder / f"{number}#?%<i>", setting=setting, measured=measured, status=bad, error=bad + "\ud800", **more)
    report(folder)
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert text.count("<script>") == 1 and "<img src=x" not in text and "<i>" not in text and "<b>" not in text
    assert f"{bad}?" in page.text
