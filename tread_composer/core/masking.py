"""Keeping secrets and terminal commands off the screen, out of files and out of error messages."""

import re

__all__ = ['MASK', 'keep_secret', 'printable', 'without_password', 'without_secrets']

# All but tab and line feed, and what turns the direction of writing.
_CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]')
_PASSWORD = re.compile(r'(?P<before>[\w+.-]+://[^/@\s:]*):[^@\s]+@')


MASK = '***'
"""What stands in place of a secret."""
_secrets: set[str] = set()


def keep_secret(value: str) -> None:
    """Mask this text from now on wherever ``without_secrets`` looks; words under 6 characters would hide too much."""
    if len(value) >= 6:
        _secrets.add(value)


def without_secrets(text: str) -> str:
    """Text without the values that were kept secret and without passwords in addresses."""
    for value in sorted(_secrets, key=len, reverse=True):
        text = text.replace(value, MASK)
    return without_password(text)


def without_password(text: str) -> str:
    """``mysql://me:secret@host/db`` as ``mysql://me:***@host/db``, wherever in the text such addresses stand."""
    return _PASSWORD.sub(r'\g<before>:***@', text)


def printable(text: str) -> str:
    """Text for a terminal: names come from files and folders of others, and some terminals obey what is in them."""
    return _CONTROL.sub(lambda match: match[0].encode('unicode_escape').decode(), text)
