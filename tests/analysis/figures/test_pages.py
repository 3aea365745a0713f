"""Pages of any size: nothing overlaps, a user's own settings count, and what does not fit is refused."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox, BboxBase
from toy_curves import make_results
from toy_items import add_items

from kbit.analysis.figures.canvas.captions import TooSmallPage, write_caption
from kbit.analysis.figures.canvas.page import Page, apply_style, measure_text, parse_length, wrap_text
from kbit.analysis.figures.canvas.sheets import choose_columns
from kbit.analysis.figures.drawing import Caption
from kbit.analysis.figures.registry import FIGURES

COLUMN = Page(width=3.3, height=2.5)  # inches: a column of a paper
SMALL = ("figure_2", "figure_3", "figure_9", "figure_16", "kl_accuracy")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Two families in four data types and two block sizes, with the items of all values."""
    table = make_results(("int", "nf", "float", "quantile"), (64, 256), ("nano-neox", "nano-opt"), (3, 4, 8, 16))
    divergence = table[(table["metric"] == "cross_entropy") & (table["bits"] < 16)]
    divergence = divergence.assign(metric="kl_divergence", value=divergence["bits"].map({3: 0.3, 4: 0.1, 8: 0.01}))
    divergence["value"] += divergence.groupby("model").cumcount() / 1000
    return add_items(pd.concat([table, divergence], ignore_index=True), tmp_path_factory.mktemp("items"))


def list_tick_labels(axis: Axis) -> Iterator[tuple[Text, bool]]:
    """Every label of a tick, and whether a reader sees it."""
    low, high = sorted(axis.get_view_interval())
    for ticks, is_major in ((axis.get_major_ticks(), True), (axis.get_minor_ticks(), False)):
        for tick in ticks:
            yield tick.label1, is_major and low <= tick.get_loc() <= high and tick.label1.get_visible()
            yield tick.label2, False


def list_texts(fig: Figure) -> dict[str, Bbox]:
    """The box of every text that a reader sees, by what it is."""
    fig.draw_without_rendering()
    labels = [pair for axes in fig.axes for axis in (axes.xaxis, axes.yaxis) for pair in list_tick_labels(axis)]
    hidden = {id(label) for label, is_seen in labels if not is_seen}
    texts = [text for text in fig.findobj(Text) if isinstance(text, Text) and id(text) not in hidden]
    seen = [text for text in texts if text.get_text().strip() and text.get_visible()]
    return {f"{number} {text.get_text()}": text.get_window_extent() for number, text in enumerate(seen)}


def find_title(axes: Axes) -> Text:
    name = axes.get_title(loc="left")
    return next(text for text in axes.findobj(Text) if isinstance(text, Text) and text.get_text() == name)


def find_overlaps(fig: Figure) -> list[tuple[str, str]]:
    """Texts that overlap each other, a legend that overlaps a panel, and what leaves the figure."""
    boxes = list_texts(fig)
    assert len(boxes) > 6
    wrong = [(one, other) for one, other in itertools.combinations(boxes, 2) if touch(boxes[one], boxes[other])]
    [body] = fig.subfigs
    legends = {f"legend {number}": legend.get_window_extent() for number, legend in enumerate(body.legends)}
    panels = {f"panel {number}": axes.get_window_extent() for number, axes in enumerate(fig.axes)}
    wrong += [(name, panel) for name in legends for panel in panels if touch(legends[name], panels[panel])]
    return wrong + [(name, "figure") for name, box in (boxes | legends).items() if not is_within(box, fig.bbox)]


def is_within(box: BboxBase, whole: BboxBase) -> bool:
    ends = box.x0 - whole.x0, whole.x1 - box.x1, box.y0 - whole.y0, whole.y1 - box.y1
    return bool(min(ends) >= -1)  # pixel


def touch(one: Bbox, other: Bbox) -> bool:
    shared = Bbox.intersection(one, other)
    return shared is not None and shared.width > 0.5 and shared.height > 0.5  # pixels


@pytest.mark.parametrize("name", SMALL)
def test_in_a_column_of_a_paper_nothing_overlaps(name: str, results: pd.DataFrame) -> None:
    if name == "figure_2":  # a panel for each data type would be eight
        results = results[results["data_type"].isna() | (results["data_type"] == "nf")]
    figure = FIGURES[name](results, COLUMN)
    assert tuple(figure.fig.get_size_inches()) == (3.3, 2.5)
    assert find_overlaps(figure.fig) == []


def test_names_of_any_length_and_a_font_of_the_users_do_not_overlap(results: pd.DataFrame) -> None:
    long = results.replace({"family": {"nano-neox": "a family with a name of several words"}})
    with matplotlib.rc_context({"font.family": "monospace", "axes.titlesize": "large"}):
        assert find_overlaps(FIGURES["figure_9"](long, Page(width=3.3)).fig) == []


@pytest.mark.parametrize(
    ("caption", "page"), [("short", Page()), ("short", Page(width=3.3)), ("full", Page(width=5, height=7))]
)
def test_a_caption_is_below_all_and_within(caption: Caption, page: Page, results: pd.DataFrame) -> None:
    figure = FIGURES["figure_9"](results, page)
    with apply_style(page):
        write_caption(figure.fig, figure.write_paragraphs(caption), page)
    assert find_overlaps(figure.fig) == []
    assert page.height is None or tuple(figure.fig.get_size_inches()) == (5, 7)
    [text] = figure.fig.texts
    assert figure.claim in " ".join(text.get_text().split())


def test_a_table_has_the_size_of_its_text_on_every_page(results: pd.DataFrame) -> None:
    low = Page(height=1.0)
    bare, figure = FIGURES["frontier"](results, low), FIGURES["frontier"](results, low)
    height = bare.fig.get_size_inches()[1]
    with apply_style(low):
        write_caption(figure.fig, figure.write_paragraphs("short"), low)
    [caption] = figure.fig.texts
    figure.fig.draw_without_rendering()
    [axes] = figure.fig.axes
    inner = axes.get_position().height * figure.fig.get_size_inches()[1]
    assert height > 1
    assert inner == pytest.approx(height)  # the table is not pressed: the caption has room of its own
    assert caption.get_window_extent().y1 <= axes.get_window_extent().y0


def test_what_does_not_fit_is_refused(results: pd.DataFrame) -> None:
    with pytest.raises(TooSmallPage, match=r"4 panels do not fit on 1.5 x 1.5 inches: give a larger --width"):
        FIGURES["figure_16"](results, Page(width=1.5, height=1.5))
    with pytest.raises(TooSmallPage, match=r"each of 4 maps needs .* inches for its words"):
        FIGURES["data_types_map"](results, COLUMN)
    figure = FIGURES["figure_16"](results, COLUMN)
    with pytest.raises(TooSmallPage, match=r"a caption of .* leaves too little of a height of 2\.50 inches"):
        write_caption(figure.fig, ["word " * 200], COLUMN)


def test_strips_show_the_paired_difference_to_the_best(results: pd.DataFrame) -> None:
    figure = FIGURES["figure_14"](results)
    assert len(figure.fig.axes) == 2 * figure.data["panel"].nunique()
    strip = figure.fig.axes[1]
    [best] = set(figure.data.loc[figure.data["panel"] == "nano-neox, 4-bit block 64", "best"])
    assert strip.get_title(loc="left") == f"difference to {best}"
    drawn = {(float(x), float(y)) for c in strip.containers for x, y in zip(*c[0].get_data(), strict=True)}
    own = figure.data[(figure.data["panel"] == "nano-neox, 4-bit block 64") & (figure.data["series"] != best)]
    assert drawn == set(zip(own["total_bits"].astype(float), own["difference"], strict=True))
    widths = own["difference_high"] - own["difference_low"], own["high"] - own["low"]
    assert (widths[0] < widths[1] / 5).all()
    assert "paired bootstrap" in " ".join(figure.notes)
    bare = results.copy()
    bare.attrs = {}
    without = FIGURES["figure_14"](bare)
    assert len(without.fig.axes) == without.data["panel"].nunique()
    assert "paired" not in " ".join(without.notes)


def test_points_at_equal_bits_stand_side_by_side(results: pd.DataFrame) -> None:
    figure = FIGURES["figure_14"](results)
    figure.fig.draw_without_rendering()
    axes: Axes = figure.fig.axes[0]
    lines = [container[0] for container in axes.containers]
    first = [line.get_transform().transform(line.get_xydata())[0, 0] for line in lines]
    assert len({line.get_xdata()[0] for line in lines}) == 1
    assert min(b - a for a, b in itertools.pairwise(sorted(first))) > 3  # pixels
    left, right = axes.get_window_extent().x0, axes.get_window_extent().x1
    assert all(left < x < right for x in first)


def test_a_users_settings_beat_ours_and_a_style_beats_both(results: pd.DataFrame, tmp_path: Path) -> None:
    style = tmp_path / "paper.mplstyle"
    style.write_text(
        "font.size: 10.0\nlines.linewidth: 3\naxes.spines.top: True\naxes.prop_cycle: cycler('color', ['123456'])\n"
    )
    with matplotlib.rc_context({"lines.linewidth": 0.4, "grid.color": "red", "axes.labelsize": "x-small"}):
        own = FIGURES["figure_16"](results, Page(width=3.3)).fig.axes[0]
        styled = FIGURES["figure_16"](results, Page(width=3.3, style=str(style))).fig.axes[0]
    line, other = own.lines[0], styled.lines[0]
    assert (line.get_linewidth(), other.get_linewidth()) == (0.4, 3)
    assert own.get_xgridlines()[0].get_color() == styled.get_xgridlines()[0].get_color() == "red"
    assert styled.spines["top"].get_visible()
    assert not own.spines["top"].get_visible()
    assert find_title(own).get_fontsize() == pytest.approx(1.1 * 7)
    assert find_title(styled).get_fontsize() == pytest.approx(1.1 * 10)
    assert other.get_color() == "#123456"
    with pytest.raises(ValueError, match=r"style 'none\.mplstyle' is no file"):
        FIGURES["figure_16"](results, Page(style="none.mplstyle"))


def test_a_style_is_about_looks_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the backend of rcParams makes matplotlib choose one and import pyplot."""
    read: list[str] = []
    look_up: Any = matplotlib.RcParams.__getitem__

    def note(self: matplotlib.RcParams, name: str) -> Any:
        if self is matplotlib.rcParams:  # a copy's backend is a plain value
            read.append(name)
        return look_up(self, name)

    monkeypatch.setattr(matplotlib.RcParams, "__getitem__", note)
    style = tmp_path / "paper.mplstyle"
    style.write_text("backend: svg\nlines.linewidth: 3\n")
    before = matplotlib.get_backend()
    assert before != "svg"
    read.clear()
    with warnings.catch_warnings(action="always", record=True) as said, apply_style(Page(style=str(style))):
        assert "font.size" in read
        assert "backend" not in read
        assert matplotlib.rcParams["lines.linewidth"] == 3
    assert matplotlib.get_backend() == before
    [warning] = said
    assert "'backend', that is not related to style" in str(warning.message)


@pytest.mark.parametrize(
    ("text", "inches"), [("3.3in", 3.3), ("84mm", 84 / 25.4), ("8.4 cm", 8.4 / 2.54), ("240pt", 240 / 72)]
)
def test_lengths_have_units(text: str, inches: float) -> None:
    assert parse_length(text) == pytest.approx(inches)


@pytest.mark.parametrize("text", ["3.3", "3.3 inches", "-1in", "0in", "1e9in", "in", "200in", ""])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"write a number and its unit, such as 3\.3in"):
        parse_length(text)


def test_text_is_as_wide_as_it_is_drawn() -> None:
    fig = Figure(figsize=(6, 1), dpi=1000)  # hinting moves letters by parts of a pixel
    with matplotlib.rc_context({"text.hinting": "none"}):
        text = fig.text(0, 0, "Width of words, 0.123", fontsize=9)
        assert measure_text(text.get_text(), 9) == pytest.approx(text.get_window_extent().width / 1000, rel=0.03)
    lines = wrap_text("a few words that are wrapped to lines " * 3, 1.5, 9)
    assert len(lines) > 3
    assert all(measure_text(line, 9) <= 1.5 for line in lines)
    assert wrap_text("onewordlongerthantheline", 0.2, 9) == ["onewordlongerthantheline"]
    assert wrap_text("", 1, 9) == [""]


def test_panels_stand_as_fits_their_page() -> None:
    assert choose_columns(4, 3, 3.3, 2.5) == 2
    assert choose_columns(3, 3, 3.3, 1.0) == 3
    assert choose_columns(3, 3, 3.3, 9.0) == 1
