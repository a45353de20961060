"""Errors that a user can mend."""


class UserError(ValueError):
    """What the user asked for cannot be done; the message is one line that says what is valid."""
