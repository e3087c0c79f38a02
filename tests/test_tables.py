"""Rows as text, HTML, Markdown and LaTeX."""

from probdefense.tables import MOST, html_table, latex_table, markdown_table, points

ROWS = [{"name": "a|b_c", "accuracy": 0.125, "eps": 0.1}, {"name": "<x> 50 %", "accuracy": None, "eps": 2}]
NAMES = ("name", "accuracy", "eps")


def test_html_is_escaped_and_cut():
    text = html_table(ROWS, NAMES, "a & b", notes=["x < y"])
    assert "<p><b>a &amp; b</b></p>" in text and "&lt;x&gt; 50 %" in text and "<p>x &lt; y</p>" in text
    assert "<td>12.5</td><td>0.1</td>" in text and "<td>-</td><td>2</td>" in text
    many = html_table([{"k": k} for k in range(MOST + 5)], ["k"])
    assert many.count("<tr>") == MOST + 1 and "5 rows more" in many


def test_a_small_difference_has_no_sign():
    assert "<td>0.0</td>" in html_table([{"difference": -0.0001}], ["difference"])
    assert [points(each) for each in (-0.0001, 0.0, 0.0004, -0.0006)] == ["tie", "tie", "tie", "-0.1"]


def test_markdown_by_hand():
    assert markdown_table(ROWS, NAMES).splitlines() == [
        "| name | accuracy | eps |",
        "| --- | --- | --- |",
        r"| a\|b_c | 12.5 | 0.1 |",
        r"| \<x> 50 % | - | 2 |",
    ]
    assert markdown_table([{"k": "*a* `b` \\ &amp;\nc"}], ["k"]).splitlines()[2:] == [
        r"| \*a\* \`b\` \\ \&amp; c |"
    ]


def test_latex_by_hand():
    assert latex_table(ROWS, NAMES).splitlines() == [
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r"name & accuracy & eps \\",
        r"\midrule",
        r"a|b\_c & 12.5 & 0.1 \\",
        r"<x> 50 \% & - & 2 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
