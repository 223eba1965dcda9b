"""``generation_config.json`` of a model directory or hub id."""

from __future__ import annotations

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from mft_lightning.errors import UserError, first_line


def saved_generation_config(path: str, where: str) -> GenerationConfig | None:
    """What a model says of how to generate with it.

    Args:
        path: a directory or hub id.
        where: what messages call it.

    Returns:
        None where it has no such file, as not every model has.

    Raises:
        UserError: the file is damaged, or says what cannot be: transformers would not save it with the trained model.
    """
    try:
        if cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is None:
            return None
        config = GenerationConfig.from_pretrained(path)
        config.validate(strict=True)
    except (OSError, ValueError, TypeError) as error:
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
        why = lines[1] if len(lines) > 1 and lines[0].endswith("invalid:") else first_line(error)
        raise UserError(f"{where}: its {GENERATION_CONFIG_NAME} cannot be used ({why}). Mend or remove it.") from error
    return config
