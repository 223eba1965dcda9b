"""Whether hooks of a class of the user's own can be called as those of the class that it is made from are."""

from __future__ import annotations

import inspect

from mft_lightning.errors import UserError

NOT_IN_TRAINING = {"test", "predict"}


def check_hooks(key: str, own: object, base: type) -> None:
    """Refuse a hook that does not take what it will be given, which would fail once a run has begun.

    Args:
        key: that names the class.
        own: an object of it.
        base: where hooks are declared with what they are given, each by its place but for ``stage``.

    Raises:
        UserError: naming the class and the hook, and how to write it.
    """
    for name, declared in inspect.getmembers(base, inspect.isfunction):
        if name.startswith("_") or NOT_IN_TRAINING & set(name.split("_")):
            continue
        _, *given = inspect.signature(declared).parameters
        hook = getattr(own, name)
        if not callable(hook):  # which Lightning passes over
            continue
        given = [one for one in given if one != "dataloader_idx"]  # of several loaders, which there are not here
        by_name = {one: one for one in given if one == "stage"}
        try:
            signature = inspect.signature(hook, follow_wrapped=False)  # what a decorator made is what is called
        except ValueError:  # a built-in, which does not say
            continue
        try:
            signature.bind(*[one for one in given if one not in by_name], **by_name)
        except TypeError as error:
            raise UserError(
                f"{key}: {type(own).__name__}.{name} cannot be called with what it is given ({error}). Write it as "
                f"{name}({', '.join(['self', *given])})."
            ) from error
