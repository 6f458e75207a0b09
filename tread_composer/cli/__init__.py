"""The commands: one parser, and for each command a file with its words."""

from tread_composer.cli.commands import main

__all__ = ['main']
