"""Errors that a user can mend: one line, exit code 2, no traceback unless --debug."""


class AppError(Exception):
    """Says what is wrong and what to do about it, in one line."""
