"""Pictures that hold the right numbers, as files and inside TensorBoard."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mft_lightning.commands.figures import BLUE, VERMILLION, balance_figure, lengths_figure
from mft_lightning.commands.plots import write_plots
from mft_lightning.data.balance import Balance, token_balance
from mft_lightning.data.batch_sizes import BatchSizes
from mft_lightning.data.plan import Plan
from mft_lightning.errors import UserError

RANDOM = np.random.default_rng(0)
LENGTHS = RANDOM.integers(20, 900, 203)
SIZES = BatchSizes(16, 4, None)


def balance(count: int = 203, **changed: object) -> Balance:
    settings = {"lengths": LENGTHS[:count], "sizes": SIZES, "packed": True, "seed": 1} | changed
    return token_balance(Plan(**settings))


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_visible()]


def place(axes: Axes, label: str) -> float:
    (line,) = [line for line in axes.lines if line.get_label().startswith(label)]
    return float(line.get_xdata()[0])


def written(axes: Axes) -> list[str]:
    return [axes.get_title("left"), axes.get_title("right"), *(text.get_text() for text in axes.texts)]


def drawn(figure: Figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


# --- lengths


def test_a_panel_counts_every_conversation_and_marks_what_is_longer() -> None:
    values = np.array([3, 5, 64, 64, 65, 100, 1000, 7, 8, 30])
    (axes,) = panels(lengths_figure({"some": values}, 64))
    assert sum(bar.get_height() for bar in axes.patches) == len(values)
    beyond = [bar for bar in axes.patches if bar.get_x() > 64]
    assert sum(bar.get_height() for bar in beyond) == 3
    assert {to_hex(bar.get_facecolor()).upper() for bar in beyond} == {VERMILLION}
    assert {to_hex(bar.get_facecolor()).upper() for bar in axes.patches if bar not in beyond} == {BLUE}
    assert place(axes, "seq_length") == 64.5 and place(axes, "median") == 64 and place(axes, "p99") == 1000
    assert written(axes) == ["some", "30.0% longer", "10 conversations, median 64, p99 1,000"]


def test_a_share_too_small_to_be_read_is_a_count_and_none_is_not_written() -> None:
    few, none = panels(lengths_figure({"few": np.r_[np.full(9999, 10), 70], "none": np.array([64])}, 64))
    assert written(few)[1] == "1 longer" and written(none)[1:] == ["", "1 conversation, median 64, p99 64"]


@pytest.mark.parametrize("count, columns", [(1, 1), (3, 1), (12, 3), (60, 6)])
def test_small_multiples_share_one_axis(count: int, columns: int) -> None:
    figure = lengths_figure({f"task_{i}": LENGTHS[i:] for i in range(count)}, 512)
    found = panels(figure)
    assert len(found) == count and len({axes.get_xlim() for axes in found}) == 1
    assert figure.axes[0].get_subplotspec().get_gridspec().ncols == columns
    assert sum(axes.xaxis.get_tick_params()["labelbottom"] for axes in found) == columns
    assert [sum(bar.get_height() for bar in axes.patches) for axes in found] == [203 - i for i in range(count)]


def test_more_tasks_than_a_page_holds_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mft_lightning.commands.figures.MAX_PANELS", 7)
    figure = lengths_figure({str(i): np.array([5]) for i in range(1200)}, 8)
    assert len(panels(figure)) == 7 and figure.texts[0].get_text().endswith("the first 7 of 1,200 tasks")


@pytest.mark.parametrize("values", [[7], [256] * 500, [1], [1, 2], [2, 100_000], [300, 301, 420]])
@pytest.mark.parametrize("seq_length", [2, 256, 1_000_000])
def test_any_lengths_are_drawn_whole(values: list[int], seq_length: int) -> None:
    figure = lengths_figure({"some": np.array(values), "nothing": np.zeros(0, dtype=np.int64)}, seq_length)
    some, nothing = panels(figure)
    assert sum(bar.get_height() for bar in some.patches) == len(values)
    assert written(nothing) == ["nothing", "", "no conversation"] and not nothing.patches
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(figure).size == (1350, round(150 * (2 * 1.9 + 1.1)))


def test_a_name_is_text_and_shortened_in_its_middle() -> None:
    names = ["cost $a and $b^2", "red \x1b[31m", "x" * 200]
    figure = lengths_figure({name: np.array([5]) for name in names}, 8)
    titles = [axes.get_title("left") for axes in panels(figure)]
    assert titles[:2] == ["cost $a and $b^2", "red \\x1b[31m"] and len(titles[2]) == 70 and titles[2][34] == "…"
    drawn(figure)


@pytest.mark.parametrize("count", [3, 13, 40])
def test_panels_of_tasks_with_long_names_have_titles_of_their_own(count: int) -> None:
    names = [f"task number {i} with a long name, one of those that differ in their middle alone" for i in range(count)]
    titles = [axes.get_title("left") for axes in panels(lengths_figure(dict.fromkeys(names, LENGTHS), 512))]
    assert len(set(titles)) == count


# --- balance


def test_the_balance_figure_holds_the_numbers_of_the_balance() -> None:
    made = balance()
    over_steps, spread = panels(balance_figure(made))
    for name in ("lightest", "mean", "heaviest"):
        (line,) = [line for line in over_steps.lines if line.get_label() == name]
        assert line.get_xdata().tolist() == list(range(1, 14)) and line.get_ydata().tolist() == list(
            getattr(made, name)
        )
    assert made.short.sum() == 1 and "short last batch" in over_steps.get_legend_handles_labels()[1]
    assert sum(bar.get_height() for bar in spread.patches) == 12
    assert place(spread, "median") == made.quantile(0.5) and place(spread, "90th percentile") == made.quantile(0.9)


def test_the_title_tells_how_many_steps_are_seen() -> None:
    told = [
        balance_figure(token_balance(Plan(lengths=LENGTHS, sizes=SIZES, packed=packed, seed=1), 2, steps))
        .texts[1]
        .get_text()
        for packed, steps in ((True, 300), (False, 4))
    ]
    assert told[0] == "13 steps, the whole epoch, 4 micro-batches a step, 2 devices, packed"
    assert told[1].startswith("first 4 of 13 steps, 4 micro-batches a step, 2 devices, padded")


@pytest.mark.parametrize(
    "made",
    [
        balance(1),
        balance(0),
        balance(sizes=BatchSizes(1, 4, None)),
        balance(16),
        balance(lengths=np.full(99, 7)),
        balance(lengths=np.full(5000, 7), sizes=BatchSizes(8, 4, None), packed=False),
    ],
)
def test_any_balance_is_drawn(made: Balance) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(balance_figure(made)).size == (1800, 690)


# --- files


def test_files_and_tensorboard(tmp_path: Path) -> None:
    tasks = {"a": LENGTHS[:50], "b": LENGTHS[50:], "empty": np.zeros(0, dtype=np.int64), "名": np.array([3])}
    made = balance(packed=False)
    kept = tmp_path / "events.out.tfevents.1.of_training"
    kept.write_bytes(b"")
    for _ in range(2):
        files = write_plots(tmp_path, lengths=tasks, seq_length=512, balance=made)
    assert sorted([*files, kept]) == sorted(tmp_path.iterdir())
    assert [file.name for file in files[:2]] == ["lengths.png", "balance.png"] and len(files) == 3
    sizes = [Image.open(file).size for file in files[:2]]
    assert sizes == [(1350, round(150 * (4 * 1.9 + 1.1))), (1800, 690)]
    events = EventAccumulator(str(files[2]), size_guidance={"images": 0, "histograms": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    assert tags["images"] == ["data/lengths", "data/balance"]
    assert tags["histograms"] == ["data/length/a", "data/length/b", "data/length/名"]
    for task in ("a", "b"):
        (histogram,) = events.Histograms(f"data/length/{task}")
        found = histogram.histogram_value
        assert (found.num, found.min, found.max) == (len(tasks[task]), tasks[task].min(), tasks[task].max())
        assert found.sum == tasks[task].sum() and histogram.step == 0
    for size, tag in zip(sizes, tags["images"], strict=True):
        (image,) = events.Images(tag)
        assert Image.open(io.BytesIO(image.encoded_image_string)).size == size
    for name in ("lightest", "mean", "heaviest", "deviation", "useful"):
        points = events.Scalars(f"data/balance/{name}")
        assert [point.step for point in points] == list(range(1, 14))
        assert [point.value for point in points] == pytest.approx(list(getattr(made, name)))


def test_no_global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib.pyplot")]:
        monkeypatch.delitem(sys.modules, name)
    write_plots(tmp_path, lengths={"a": LENGTHS}, seq_length=512, balance=balance())
    assert "matplotlib.pyplot" not in sys.modules


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'mft_lightning\[plots\]'"):
        write_plots(tmp_path / "new", lengths={"a": LENGTHS}, seq_length=512, balance=balance())
    assert not (tmp_path / "new").exists()


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: the plots cannot be written there"):
        write_plots(tmp_path / "file", lengths={"a": LENGTHS}, seq_length=512, balance=balance())
