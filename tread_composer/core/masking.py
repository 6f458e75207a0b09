"""Keeping secrets off the screen, out of files and out of error messages."""

import re

__all__ = ['without_password']

_PASSWORD = re.compile(r'(?P<before>[\w+.-]+://[^/@\s:]*):[^@\s]+@')


def without_password(text: str) -> str:
    """``mysql://me:secret@host/db`` as ``mysql://me:***@host/db``, wherever in the text such addresses stand."""
    return _PASSWORD.sub(r'\g<before>:***@', text)
