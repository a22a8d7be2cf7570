"""What every script needs and no paper mentions."""


class UserError(ValueError):
    """A user's mistake: one line says what was found, what was expected and what to do; shown without a
    traceback."""
