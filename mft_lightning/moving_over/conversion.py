"""An original configuration to a draft of this program's: what the rules of ``rules_*.py`` work on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mft_lightning.errors import UserError, nearest
from mft_lightning.moving_over.draft import Draft
from mft_lightning.moving_over.ignored_options import HARMLESS, LAUNCHERS_OWN
from mft_lightning.moving_over.old_options import CONFIG, DEFAULTS, OPTIONS
from mft_lightning.moving_over.old_values import Given, is_open, read_value
from mft_lightning.moving_over.shell_expansion import as_written

SHARING = (  # a launcher's options that decide how devices share weights, and where these are
    *(
        "zero_stage",
        "offload_optimizer_device",
        "offload_param_device",
        "fsdp_sharding_strategy",
        "fsdp_offload_params",
    ),
    *("use_deepspeed", "use_fsdp"),
)
DEFAULT = "not given; the original's default"


@dataclass
class Conversion:
    """The options of one launch, read by name, and the draft that they become.

    Attributes:
        form: which of the original's parsers the options were for, of ``DEFAULTS``.
        given: the training program's options.
        launched: the launcher's.
        draft: what they become.
    """

    form: str
    given: Mapping[str, Given]
    launched: Mapping[str, Given] = field(default_factory=dict)
    draft: Draft = field(default_factory=Draft)
    _taken: set[str] = field(default_factory=set)

    @property
    def of_config(self) -> bool:
        return self.form == CONFIG

    def has(self, name: str) -> bool:
        """Whether an option is given, with a value."""
        return name in self.given and self.given[name].value is not None

    def take(self, name: str, default: object = None) -> Any:
        """An option's value, by its kind; the original's default, or else ``default``, where it is not given."""
        self._taken.add(name)
        if name not in self.given:
            return DEFAULTS[self.form].get(name, default)
        return read_value(self.given[name], OPTIONS[name].kind)

    def take_launched(self, name: str) -> Any:
        """The same of a launcher's option; None where it is not given."""
        return read_value(self.launched[name], OPTIONS[name].kind) if name in self.launched else None

    def known(self, name: str, default: object = None) -> Any:
        """An option's value that others follow from.

        Raises:
            UserError: it is open.
        """
        value = self.take(name, default)
        if is_open(value):
            raise UserError(
                f"{self.where(name)}: is left open ({value}), and other values follow from it. Give it: "
                f"--set {value.strip('${}')}=VALUE"
            )
        return value

    def where(self, name: str) -> str:
        if name in self.given:
            return self.given[name].where
        return self.launched[name].where if name in self.launched else name

    def first(self, *names: str) -> tuple[str, Any]:
        """The one of several names for one thing that is given, and its value; the last where none is.

        Raises:
            UserError: two are given, with different values.
        """
        found = [(name, self.take(name)) for name in names if name in self.given]
        for name, value in found[1:]:
            if value != found[0][1]:
                raise UserError(
                    f"{self.where(name)}: is {value}, but {found[0][0]} is {found[0][1]}, and both say one thing. "
                    "Leave one out."
                )
        if found:
            return found[0]
        for name in names:
            if (default := self.take(name)) is not None:
                return name, default
        return names[-1], None

    def copy(self, *names: str, comment: str | None = None) -> Any:
        """Put the value of an option, or of one of several names for it, under its key; null and nothing are left out.

        Args:
            names: of the option.
            comment: instead of what the table says of it; it says where the original's default is taken too.
        """
        name, value = self.first(*names)
        if value is not None:
            option = OPTIONS[name]
            self.draft.put(option.key, value, option.says if comment is None else comment, self.default_told(name))
        return value

    def default_told(self, *names: str) -> str:
        """The comment of a value that is the original's default; empty where one of the names is given."""
        return "" if any(name in self.given for name in names) else DEFAULT

    def finish(self) -> None:
        """Say what was ignored.

        Raises:
            UserError: an option that is refused, or none at all.
        """
        for name, given in self.given.items():
            if name not in OPTIONS:
                raise UserError(f"{given.where}: the original has no such option.{nearest(name, OPTIONS, 0.75)}")
            self._finish(name, given)
        for name, given in self.launched.items():
            if name not in OPTIONS:
                self.draft.ignored.append((f"--{name}", f"of the launcher ({given.where.rpartition(':')[0]})"))
            elif name in LAUNCHERS_OWN:
                self.draft.ignored.append((f"--{name}", OPTIONS[name].says))
            elif name in SHARING and OPTIONS[name].key not in self.draft.values:
                self.draft.ignored.append((f"--{name}", f"{as_written(given.value)}: {self._unshared(given.value)}"))
        self.draft.ignored = list(dict.fromkeys(self.draft.ignored))

    def _unshared(self, value: str) -> str:
        """Why what a launcher was told of sharing has no key."""
        if value.lower() in ("none", "false"):
            return "nothing moves to the host unless parallel.cpu_offload says so"
        if self.draft.values.get("trainer.strategy") == "fsdp":
            return "as fsdp does"
        return "of fsdp alone (parallel.*), which this run is without: each device holds all of it"

    def _finish(self, name: str, given: Given) -> None:
        option = OPTIONS[name]
        if option.fate == "refused":
            value = given.value
            if isinstance(value, str) and value.lower() in ("0", "1", "false", "none"):
                value = {"0": 0, "1": 1, "false": False, "none": None}[value.lower()]
            if value not in HARMLESS.get(name, ()):
                raise UserError(f"{given.where}: {option.says}")
            self.draft.ignored.append((name, f"{given.value} is what there is here"))
        elif option.fate == "ignored":
            self.draft.ignored.append((name, option.says))
        else:
            assert name in self._taken, name
            told = {about.lstrip("-") for about, _ in self.draft.ignored}
            if name not in told and not any(key in self.draft.values for key in option.key.split(", ")):
                value = "null" if given.value is None else as_written(str(given.value))
                self.draft.ignored.append((name, f"{value.lower() if given.typed else value} is what there is here"))
