"""The exception for what the user can mend in a model."""


class ModelError(ValueError):
    """A size, name or network that has no scaling rule; the message says what is wrong and how to mend it."""
