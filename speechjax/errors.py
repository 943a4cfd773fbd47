"""The one exception that means: the user can fix this, and the message says how."""


class UserError(Exception):
    """A mistake of the user's; verbs print its one line and exit 1, without a traceback."""
