"""The device of ``--device``, where no trainer chooses one."""

from __future__ import annotations

import torch

from mft_lightning.errors import UserError, first_line


def check_device(name: str) -> None:
    """Refuse a device that nothing can be computed on here.

    Raises:
        UserError: naming ``--device``.
    """
    try:
        computes = not torch.empty(0, device=name).is_meta
    except (ImportError, NotImplementedError) as error:  # which speak of PyTorch's insides, at length
        raise UserError(f"--device {name}: is not in this build of PyTorch. Use cpu or cuda.") from error
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from error
    if not computes:
        raise UserError(f"--device {name}: computes nothing. Use cpu or cuda.")
