"""The one exception for a user's mistake."""


class UserError(Exception):
    """Something the user can mend; the message says what is wrong and how. The command line prints it and exits 2."""
