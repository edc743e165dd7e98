"""The one error that is the user's to solve."""


class UserError(ValueError):
    """The request cannot be done as it stands; the message says what, where, why and the cure."""
