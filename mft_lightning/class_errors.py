"""What is wrong with the class that a key names, in the words of a user."""

from __future__ import annotations

import re

_UNTIL = r"(?=\n *- |\n *Given value|$)"  # the next of jsonargparse's reasons, or their end
_PROBLEM = re.compile(rf"Problem with given class_path '(?P<path>[\w.]+)':\n(?P<why>.*?){_UNTIL}", re.DOTALL)
_CALLABLE = re.compile(
    rf"callable class: (?P<why>.*?)(?:\. Got value: Namespace\(class_path='(?P<path>[\w.]+)'.*?)?{_UNTIL}", re.DOTALL
)
_NO_SUBCLASS = re.compile(r"Import path (?:(?P<path>[\w.]+) )?does not correspond to a subclass of (?P<kind>\w+)")


def class_error(key: str, why: str) -> str | None:
    """Why the class that a value names cannot be used, in one line; None where the value names none.

    Args:
        key: that has the value.
        why: what jsonargparse says of it.

    Returns:
        The class, the words that may stand in its place, and what is wrong with it or with its arguments.
    """
    match = _PROBLEM.search(why) or _CALLABLE.search(why) or _NO_SUBCLASS.search(why)
    if match is None:
        return None
    found = match.groupdict()
    reason = " ".join(found["why"].split()).rstrip(".") if "why" in found else f"no {found['kind']} of Lightning's"
    if reason.startswith("Expected an import path"):
        return None
    path = found["path"] or why.rpartition("Given value: ")[2]
    name = path.rpartition(".")[2]
    if option := re.match(r"Option '(\w+)' is not accepted", reason):
        use = " Use model.learning_rate." if (key, option[1]) == ("model.optimizer", "lr") else ""
        return f"{key}: {name} takes no {option[1]} here.{use}"
    if option := re.match(r'Parser key "([\w.]+)"', reason):
        kind = re.search(r": Expected an? <class '([\w.]+)'>", reason)
        return f"{key}: {name} takes no such value as {option[1]}{f', but a {kind[1]}' if kind else ''}."
    words = ", ".join(re.findall(r"'(\w+)'", "".join(re.findall(r"Literal\[(.*?)\]", why.partition("Errors:")[0]))))
    return f"{key}: {path} is {f'none of {words}, and ' if words else ''}no class that can be used ({reason})."
