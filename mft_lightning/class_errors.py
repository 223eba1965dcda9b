"""What is wrong with the class that a key names, in the words of a user."""

from __future__ import annotations

import re

from mft_lightning.class_paths import class_at, names_of, nearest_path
from mft_lightning.errors import nearest
from mft_lightning.refusals import Documented, given, refusal
from mft_lightning.schema import Node, arguments, choices, classes

_UNTIL = r"(?=\n    - |\n  Given value|$)"  # the next of jsonargparse's reasons, or their end
_PROBLEM = re.compile(rf"Problem with given class_path '(?P<path>[\w.]+)':\n(?P<why>.*?){_UNTIL}", re.DOTALL)
_CALLABLE = re.compile(
    rf"callable class: (?P<why>.*?)(?:\. Got value: Namespace\(class_path='(?P<path>[\w.]+)'.*?)?{_UNTIL}", re.DOTALL
)
_NO_SUBCLASS = re.compile(r"Import path (?:(?P<path>[\w.]+) )?does not correspond to a subclass of (?P<kind>\w+)")
_NO_NAME = re.compile(r"Expected a dot import path string: (?P<path>\w+)")
_OF_ANOTHER_KIND = re.compile(r"Expected '[\w.]+' to be a subclass of <class '(\w+)'>")
_GIVEN_KIND = re.compile(r"Given value type: <class '(\w+)'>")
_FORM = ("class_path", "init_args", "dict_kwargs")
_NO_OPTION = re.compile(r"(?:Group '([\w.]+)' does not accept option|Option) '([\w.]+)'")
_GIVEN_PATH = re.compile(r"Given value: Namespace\(class_path='([\w.]+)'")
_NEEDED = re.compile(r"the following arguments are required: (.*)")


def class_error(key: str, why: str, node: Node, documented: Documented) -> str | None:
    """Why the class that a value names cannot be used, in one line; None where the value names none.

    Args:
        key: that has the value.
        why: what jsonargparse says of it.
        node: what the key takes, of a schema.
        documented: where a key is documented.

    Returns:
        The class and what is wrong with it or with its arguments, the words that may stand in its place, and the
        nearest right class, argument or value.
    """
    match = next(filter(None, (form.search(why) for form in (_PROBLEM, _CALLABLE, _NO_SUBCLASS, _NO_NAME))), None)
    if match is None:
        return None
    if match.re is _NO_NAME and _GIVEN_KIND.findall(why)[-1:] == ["str"]:  # which may be a wrong word too
        return None
    found, value = match.groupdict(), given(why)
    reason = " ".join(found["why"].split()).rstrip(".") if "why" in found else ""
    if reason.startswith(("Expected an import path", "Dict must include")):
        return None
    path, see = found["path"] or _path_of(why) or str(value), f" See {documented(key)}."
    name, kinds = path.rpartition(".")[2], list(dict.fromkeys(classes(node)))
    if match.re is _NO_NAME:
        near = nearest(path, [name for kind in kinds for name in names_of(kind)])
        own = "" if near else " One of your own goes by its whole path."
        return f"{key}: no {' or '.join(kinds)} goes by the name {path}.{near}{own}{see}"
    if option := _NO_OPTION.match(reason):
        wrong = ".".join(filter(None, option.groups()))
        return f"{key}: {_no_argument(key, path, wrong, value)}{see}"
    if option := re.match(r'Parser key "([\w.]+)"', reason):
        takes = _arguments(path).get(option[1], {})
        return f"{key}: {refusal(f'{option[1]} of {name}', given(found['why']), takes, lambda _: documented(key))}"
    if needed := _NEEDED.match(reason):
        return f"{key}: {name} needs {needed[1]}. Give it in init_args.{see}"
    if match.re is _NO_SUBCLASS:
        reason = f"no {found['kind']}"
    elif other := _OF_ANOTHER_KIND.match(reason):
        reason = f"no {other[1]}"
    words = ", ".join(map(str, choices(node)))
    none_of = f"none of {words}, and " if words else ""
    right = next(filter(None, (nearest_path(path, kind) for kind in kinds)), path)
    near = f" The nearest is {right}." if right != path else ""
    return f"{key}: {path} is {none_of}no class that can be used ({reason}).{near}{see}"


def _path_of(why: str) -> str | None:
    """The path of the class that was given, where jsonargparse says it with the arguments it has so far."""
    found = _GIVEN_PATH.search(why)
    return found[1] if found is not None else None


def _no_argument(key: str, path: str, option: str, value: object) -> str:
    """What to do where a class takes no such argument."""
    name = path.rpartition(".")[2]
    entries = [entry for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, dict)]
    if beside := [word for entry in entries for word in entry if word not in _FORM]:
        return f"{', '.join(beside)}: is none of {', '.join(_FORM)}. Put the class's arguments below init_args."
    if (key, option) == ("model.optimizer", "lr"):
        return f"{name} takes no lr here. Use model.learning_rate."
    return f"{name} takes no {option}.{nearest(option, _arguments(path))}"


def _arguments(path: str) -> dict[str, Node]:
    kind = class_at(path)
    return arguments(kind) if kind is not None else {}
