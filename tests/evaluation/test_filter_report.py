"""The filter report by hand, its page's escaping, and that it is the same bytes each time."""

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jaxrlhf.data.pairs import Pair
from jaxrlhf.evaluation.filter_page import to_markdown
from jaxrlhf.evaluation.filter_report import FILES, filter_report, shorten, write_filter_report
from jaxrlhf.formatting import escape_markdown

# (id, prompt, chosen, rejected): 3 and 4 say the same.
ROWS = [("0", "p", "aa", "b"), ("1", "p", "aa bb", "b c"), ("2", "q", "c", "dddd"), ("3", "r", "x y", "z"), ("4", "r", "x y", "z")]
PAIRS = [Pair(*row, source=f"f:{i}") for i, row in enumerate(ROWS)]
CHOSEN = np.array([0.9, 0.2, 0.5, 0.6, 0.6], np.float32)
REJECTED = np.array([0.1, 0.3, 0.7, -0.2, -0.2], np.float32)
KEPT = np.array([0, 2, 3])
FURTHER = {"previous": ["0", "1", "9"], "generations": ["g0", "g1", "g2", "g3"], "nearest_N": np.array([0, 1, 3, 3, 3])}


@pytest.fixture(scope="module")
def report():
    return filter_report(PAIRS, CHOSEN, REJECTED, KEPT, rule="either", n=4, threshold=0.4, round=2, compare="nearest", k=8, **FURTHER)


def test_counts_coverage_duplicates_and_overlap_by_hand(report):
    assert (report["pairs"], report["kept"], report["short_of_n"], report["round"], report["k"]) == (5, 3, 1, 2, 8)
    assert report["prompts"] == {"all": 3, "kept": 3, "share": 1.0}
    assert report["generations"] == {"rows": 4, "nearest_to_some_pair": 3, "nearest_to_some_kept_pair": 2}
    assert report["duplicates"] == {"pairs": 1, "pairs_kept": 0, "chosen_kept": 0, "rejected_kept": 0}
    # {0, 1, 9} before and {0, 2, 3} now: one of five; two draws of 3 among 5 share 9/5.
    assert report["previous"] == {"kept": 3, "both": 1, "jaccard": 0.2, "both_at_random": pytest.approx(1.8)}
    everything = filter_report(PAIRS, CHOSEN, REJECTED, np.array([2, 3, 4]), rule="either")
    assert everything["duplicates"] == {"pairs": 1, "pairs_kept": 1, "chosen_kept": 1, "rejected_kept": 1}
    assert everything["prompts"] == {"all": 3, "kept": 2, "share": 2 / 3}
    assert everything["previous"] is everything["generations"] is everything["round"] is everything["n"] is everything["k"] is None


def test_similarities_by_hand(report):
    chosen, rejected = report["similarity"]["chosen"], report["similarity"]["rejected"]
    approx = pytest.approx
    assert chosen["mean_kept"] == approx((0.9 + 0.5 + 0.6) / 3) and chosen["mean_dropped"] == approx(0.4)
    assert chosen["mean_at_random"] == approx(0.56) and rejected["mean_at_random"] == approx(0.14)
    assert (chosen["lowest_kept"], chosen["highest_dropped"]) == (approx(0.5), approx(0.6))
    assert (rejected["lowest_kept"], rejected["highest_dropped"]) == (approx(-0.2), approx(0.3))
    edges = report["similarity"]["bin_edges"]
    assert edges[0] <= -0.2 and edges[-1] >= 0.9 and (np.diff(edges) > 0).all()
    for side, values in (("chosen", CHOSEN), ("rejected", REJECTED)):
        for name, rows in (("kept", KEPT), ("dropped", [1, 4])):
            counts = np.array(report["similarity"][side][f"histogram_{name}"])
            assert counts.sum() == len(rows)
            for value in values[rows]:
                bin_of = min(np.searchsorted(edges, value, side="right") - 1, len(counts) - 1)
                assert counts[bin_of] > 0


def test_lengths_by_hand(report):
    characters, words = report["length"]["characters"], report["length"]["words"]
    approx = pytest.approx
    # chosen: 2, 5, 1, 3, 3 characters; rejected: 1, 3, 4, 1, 1.
    assert (characters["chosen"]["kept"], characters["chosen"]["dropped"], characters["chosen"]["at_random"]) == (2, 4, approx(2.8))
    assert (characters["rejected"]["kept"], characters["rejected"]["dropped"]) == (2, 2)
    assert (characters["gap"]["kept"], characters["gap"]["dropped"]) == (0, 2)
    assert characters["chosen"]["shift"] == approx(-2 / np.std([2, 5, 1, 3, 3]))
    assert characters["rejected"]["shift"] == 0
    assert (words["chosen"]["kept"], words["chosen"]["dropped"], words["rejected"]["kept"]) == (approx(4 / 3), 2, 1)


def test_examples_stand_side_by_side(report):
    ids = {name: [one["id"] for one in ones] for name, ones in report["examples"].items()}
    assert ids == {"kept_best": ["0", "2", "3"], "kept_last": ["3", "2", "0"], "dropped_best": ["4", "1"], "dropped_last": ["1", "4"]}
    first = report["examples"]["kept_best"][0]
    assert first["score"] == pytest.approx(0.9) and first["generation"] == "g0" and first["chosen"] == "aa" and first["source"] == "f:0"
    assert report["examples"]["kept_best"][1]["generation"] == "g3"
    by_sum = filter_report(PAIRS, CHOSEN, REJECTED, KEPT, rule="both", examples=1)["examples"]
    assert by_sum["kept_best"][0]["id"] == "2" and by_sum["kept_best"][0]["score"] == pytest.approx(1.2)


def test_nothing_dropped_and_one_pair_are_reported_too(tmp_path):
    for pairs, n in ((PAIRS, 5), (PAIRS[:1], 1)):
        report = filter_report(pairs, CHOSEN[:n], CHOSEN[:n], np.arange(n), rule="random", n=n)
        assert report["similarity"]["chosen"]["mean_dropped"] is None and report["length"]["words"]["gap"]["shift"] is None
        assert report["examples"]["dropped_best"] == []
        write_filter_report(report, tmp_path / str(n))


def test_the_files_are_plain_and_the_same_each_time(report, tmp_path):
    paths = write_filter_report(report, tmp_path / "a" / "b")
    assert [path.name for path in paths] == list(FILES) == sorted(p.name for p in (tmp_path / "a" / "b").iterdir())
    assert json.loads(paths[0].read_text()) == report
    again = write_filter_report(report, tmp_path / "c")
    for one, other in zip(paths, again, strict=True):
        assert one.read_bytes() == other.read_bytes()
    page = paths[1].read_text()
    assert "# Filter report, round 2" in page and "3 of 5 pairs kept (60.0 %) by rule either, n = 4, threshold 0.4" in page
    assert "its 8 nearest generations" in page and "**1 fewer than asked for**" in page and "(filter_report.svg)" in page
    assert "Jaccard 0.200" in page and "2 distinct generations of 4; those of all pairs with 3" in page
    assert "| chosen | 0.667 | 0.400 | 0.560 | 0.500 | 0.600 |" in page


def test_the_figure_is_svg_without_fonts_or_links(report, tmp_path):
    text = write_filter_report(report, tmp_path)[2].read_text()
    root = ET.fromstring(text)
    names = {element.tag.split("}")[1] for element in root.iter()}
    assert root.tag.endswith("svg") and "text" not in names and "image" not in names
    links = [value for element in root.iter() for name, value in element.attrib.items() if name.endswith("href")]
    assert links and all(link.startswith("#") for link in links)
    for label in ("cosine with the policy's text", "share of its group", "kept \\(3\\)", "dropped \\(2\\)", "threshold 0.4"):
        assert re.search(rf"<!-- {label}", text), label  # matplotlib writes each label as a comment beside its outlines
    assert "#0072b2" in text and "#d55e00" in text


EVIL = "a|b\r\n# h\n<script>x</script> ![i](http://e/x) `c` *b* _u_ ~s~ &amp; \\| \x00\u202e"


def test_text_from_data_cannot_mark_up_the_page():
    shown = escape_markdown(EVIL)
    assert "\n" not in shown and "\r" not in shown and "\x00" not in shown and "\u202e" not in shown
    assert "U\\+0000" in shown.replace("U+0000", "U\\+0000") and "⏎" in shown
    assert "<" not in shown and ">" not in shown and "&lt;script&gt;" in shown and "&amp;amp;" in shown
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*_\[\]!~#(]", shown)  # each behind an odd number of backslashes
    assert escape_markdown("  ") == escape_markdown("") == "(empty)"
    page = to_markdown(filter_report([Pair(EVIL, EVIL, EVIL, EVIL + "y", EVIL)], CHOSEN[:1], CHOSEN[:1], np.array([0]), rule=EVIL))
    assert "<script>" not in page and "](http" not in page
    for line in page.splitlines():
        if line.startswith("| "):
            cells = len(re.findall(r"(?<!\\)\|", line.replace("\\\\", ""))) - 1
            assert cells in (3, 5, 6), line


def test_texts_are_cut_between_characters():
    assert shorten("abcdef", 6) == "abcdef" and shorten("abcdefg", 6) == "abcdef…" and shorten("abcdefg", 6, end=True) == "…bcdefg"
    accented = "abe\u0301d"
    assert shorten(accented, 3) == "ab…" and shorten(accented, 2, end=True) == "…d"
    family = "x👩\u200d👧y"
    for limit in range(1, 5):
        for end in (False, True):
            assert shorten(family, limit, end=end).strip("…") in ("x", "y", "x👩\u200d👧", "👩\u200d👧y", "")
    assert shorten("👍🏽!", 1) == "…" and shorten("a\ud800b") == "a?b"


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"a report on 5 pairs .*\(4,\) and \(5,\)"):
        filter_report(PAIRS, CHOSEN[:4], REJECTED, KEPT, rule="either")
    for kept in ([], [5], [-1]):
        with pytest.raises(ValueError, match=rf"kept holds {len(kept)} row numbers for 5 pairs"):
            filter_report(PAIRS, CHOSEN, REJECTED, np.array(kept, int), rule="either")
    with pytest.raises(ValueError, match="as many similarities"):
        filter_report(PAIRS, CHOSEN, REJECTED, KEPT, rule="either", nearest_N=np.zeros(3, int))
