"""What TensorBoard shows of a run beside its curves: charts, hyper-parameters, texts, and lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mft_lightning.training.chart_layout import layout
from mft_lightning.training.event_files import EVENTS

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

SUFFIX = ".about"  # by which the file of an earlier part of the run is known and replaced
BINS = 60  # of a histogram of lengths
# of all keys the ones that the page of hyper-parameters shows first
FIRST = (
    "data.total_train_batch_size",
    "model.learning_rate",
    "model.peft_type",
    "model.weighted_loss_mode",
    "trainer.max_steps",
)


@dataclass(frozen=True)
class Introduction:
    """What there is to say of a run.

    Attributes:
        charts: a pattern of tags for each chart that is to be seen, by category and title.
        keys: the run's keys, flat, ``data.seq_length`` like.
        metrics: tags of the curves whose last points runs are compared by, the first first.
        texts: Markdown, by tag.
        lengths: tokens of each conversation by task, ``int32 [conversations]``.
    """

    charts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    keys: Mapping[str, int | float | str] = field(default_factory=dict)
    metrics: Sequence[str] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    lengths: Mapping[str, np.ndarray] = field(default_factory=dict)


def introduce(directory: Path, introduction: Introduction) -> None:
    """Write it as an event file of its own, in place of that of an earlier part of the run.

    Of a tag of this kind TensorBoard shows what it finds first, so what is changed cannot be added.
    """
    from torch.utils.tensorboard import FileWriter

    for file in directory.glob(f"{EVENTS}{SUFFIX}"):
        file.unlink()
    writer = FileWriter(directory, filename_suffix=SUFFIX)
    try:
        writer.add_summary(layout(introduction.charts), 0)
        for summary in _hyper_parameters(introduction):
            writer.add_summary(summary, 0)
        for tag, markdown in introduction.texts.items():
            writer.add_summary(text(tag, markdown), 0)
        for task, lengths in introduction.lengths.items():
            if len(lengths):
                writer.add_summary(_histogram(f"train/tokens/{task}", lengths), 0)
    finally:
        writer.close()


def text(tag: str, markdown: str) -> Summary:
    """A text under exactly this tag, which is no list of texts: those are shown as the cells of a table."""
    from torch.utils.tensorboard.summary import text

    summary = text(tag, markdown)
    summary.value[0].tag = tag
    summary.value[0].tensor.tensor_shape.Clear()
    return summary


def _hyper_parameters(introduction: Introduction) -> list[Summary]:
    """The run's keys, and which keys and metrics are compared."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    experiment, session, _ = hparams(dict(introduction.keys), dict.fromkeys(introduction.metrics, 0.0))
    plugin: Any = experiment.value[0].metadata.plugin_data
    compared = HParamsPluginData.FromString(plugin.content)
    for info in compared.experiment.hparam_infos:
        info.differs = info.name in FIRST  # those come first
    plugin.content = compared.SerializeToString()
    return [experiment, session]


def _histogram(tag: str, lengths: np.ndarray) -> Summary:
    """Of whole numbers: bins that are equally wide and hold equally many of them."""
    from torch.utils.tensorboard.summary import histogram_raw

    counts = np.bincount(lengths)
    width = -(-len(counts) // BINS)
    bins = np.pad(counts, (0, -len(counts) % width)).reshape(-1, width).sum(1)
    values = np.arange(len(counts), dtype=np.float64)
    return histogram_raw(
        tag,
        min=float(lengths.min()),
        max=float(lengths.max()),
        num=len(lengths),
        sum=float(values @ counts),
        sum_squares=float(values**2 @ counts),
        bucket_limits=(np.arange(1, len(bins) + 1) * width).tolist(),
        bucket_counts=bins.tolist(),
    )
