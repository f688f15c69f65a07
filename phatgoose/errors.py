"""The one exception for mistakes a user can mend."""


class PhatgooseError(Exception):
    """Something the user can mend; its one line of text says what is wrong, where, and the mend."""


class Diverged(PhatgooseError):
    """A loss that is not finite, or that exploded."""


class OutOfMemory(PhatgooseError):
    """Less memory than the work needs."""
