"""The errors a user is meant to read: what is wrong, where, and what to do about it."""


class UserError(Exception):
    """Bad input or a setting that cannot work. The command line prints the message alone and exits with 1."""


class NotYetError(UserError):
    """A setting whose place is known but which this version does not carry out. It is refused, never ignored."""

    def __init__(self, key: str, value: object, instead: str) -> None:
        super().__init__(f"{key}: {value!r} is not supported yet. {instead}")
