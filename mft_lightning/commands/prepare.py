"""``prepare``: fill the token cache, with the keys of ``fit``, so that runs and all their ranks start at once."""

from __future__ import annotations

from mft_lightning.commands.report import task_table
from mft_lightning.quiet import quieten
from mft_lightning.run_config import RunConfig
from mft_lightning.screen import labelled, say, shown


def prepare(argv: list[str]) -> None:
    """Tokenise what the cache does not hold, and print what there is of each task."""
    quieten()
    config = RunConfig(argv, "prepare")
    datamodule = config.datamodule
    with config.placing():
        config.model.check(datamodule, data_alone=True)
        datamodule.setup()
    for corpus, title in zip(datamodule.corpora, ("", "validation directories"), strict=False):
        say(*(["", title] if title else []), *task_table(corpus.reports))
    files = [file for corpus in datamodule.corpora for file in corpus.admission.store.files]
    size = sum(file.path.stat().st_size for file in files if file.path is not None)
    directory = datamodule.cache_settings.directory
    say("", *labelled([("prepared", f"{len(files):,} file(s) in {size / 1e6:,.1f} MB"), ("cache", shown(directory))]))
