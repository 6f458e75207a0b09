"""The parser of every command line of ours."""

import argparse
from typing import NoReturn

from tread_composer.core.errors import UserError

__all__ = ['Parser']


class Parser(argparse.ArgumentParser):
    """Wrong words are refused as everything else is: with several ranks, by one message."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise UserError(f'{self.format_usage().rstrip()} (--help lists them)\n{message}')
