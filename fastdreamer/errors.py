"""Errors that a user can mend."""


class UserError(ValueError):
    """What the user asked for cannot be done; the message is one line that says what is valid."""


class UsageError(UserError):
    """An option or a combination of them is not valid."""
