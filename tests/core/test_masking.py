import pytest

from tread_composer.core.masking import printable, without_password


@pytest.mark.parametrize(
    ('text', 'shown'),
    [
        ('plain ä\t2\n', 'plain ä\t2\n'),
        ('\x1b[31mred', r'\x1b[31mred'),
        ('over\rwritten', r'over\rwritten'),
        ('turned\u202eround', r'turned\u202eround'),
        ('\x9b1m', r'\x9b1m'),
    ],
)
def test_a_terminal_is_given_no_commands(text, shown):
    assert printable(text) == shown


def test_passwords_in_addresses_are_masked():
    assert without_password('at mysql://me:secret@host/db') == 'at mysql://me:***@host/db'
