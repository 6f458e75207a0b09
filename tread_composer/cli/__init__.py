"""The commands: functions whose arguments are their flags."""

from tread_composer.cli.commands import main

__all__ = ['main']
