"""The documents hold: links and anchors lead somewhere, commands are ones the programs take, the citation is complete.

Commands are handed to the program that they name; its parser is the real one, and the work behind it is left out.
"""

import argparse
import io
import re
import runpy
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml

from tests.runs import ROOT
from tread_composer.config import load_config

PLACES = ('*.md', 'docs/*.md', 'benchmarks/*.md', 'streaming_data/*.md', 'tread_composer/**/*.md')
PAGES = sorted(path.relative_to(ROOT) for pattern in PLACES for path in ROOT.glob(pattern))
HEADERS = sorted(path.relative_to(ROOT) for path in ROOT.glob('yamls/*.yaml'))
PROGRAM = (
    r'(?:python -m tread_composer|composer (?:-n \d+ )?\S+\.py|python (?:train|streaming_data/\w+|benchmarks/\w+)\.py)'
)
LINES = re.DOTALL | re.MULTILINE


class Parsed(Exception):  # noqa: N818
    """Raised in place of a command's work, once its words have been understood."""


def without_blocks(page: Path) -> str:
    return re.sub(r'^```.*?^```', '', (ROOT / page).read_text(), flags=LINES)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r'^#+ +(.+?) *$', without_blocks(page), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def links(page: Path) -> list[str]:
    """Target of every link and picture that stays in the repository."""
    targets = re.findall(r'\]\(([^)\s]+)\)', re.sub(r'`[^`]*`', '', without_blocks(page)))
    return [target for target in targets if not target.startswith('https://')]


def commands() -> list[tuple[str, str]]:
    """Every command with the page that shows it: in fenced blocks, in code spans, in headers of recipes."""
    shown = []
    for page in PAGES:
        for block in re.findall(r'^```(?:bash|sh)?\n(.*?)^```', (ROOT / page).read_text(), LINES):
            joined = re.sub(r'\s*\\\n\s*', ' ', block)
            shown += [(page, re.sub(r'\s+#.*', '', line)) for line in joined.splitlines()]
        shown += [(page, ' '.join(span.split())) for span in re.findall(r'`([^`]+)`', without_blocks(page))]
    for page in HEADERS:
        shown += [(page, line) for line in re.findall(r'^# Command: +(.*)', (ROOT / page).read_text(), re.MULTILINE)]
    without_variables = [(str(page), re.sub(r'^(?:[A-Z_]+=\S+ )+', '', line)) for page, line in shown]
    return sorted({(page, line) for page, line in without_variables if re.match(PROGRAM, line)})


def parse(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Hand a command to its program as far as its parser; returns the refusal that it printed, '' if there is none."""
    words = shlex.split(line.partition(' > ')[0])
    words = words[3:] if words[0] == 'composer' and words[1] == '-n' else words[1:]
    original, depth = argparse.ArgumentParser.parse_known_args, []

    def parse_known_args(parser, *arguments, **keywords):
        depth.append(parser)
        namespace, rest = original(parser, *arguments, **keywords)
        depth.pop()
        if depth:
            return namespace, rest
        takes_settings = hasattr(namespace, 'overrides')
        wrong = [word for word in rest if word.startswith('-') or '=' not in word or not takes_settings]
        if wrong:
            parser.error(f'unrecognized arguments: {wrong}')
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_known_args', parse_known_args)
    monkeypatch.setattr(sys, 'argv', words[words[0] == '-m' :])
    output = io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            if words[0] == '-m':
                runpy.run_module(words[1], run_name='__main__')
            else:
                # As `python FILE` does: what lies beside it can be imported.
                monkeypatch.syspath_prepend(str((ROOT / words[0]).parent))
                runpy.run_path(str(ROOT / words[0]), run_name='__main__')
    except Parsed:
        return ''
    except SystemExit as ended:
        return '' if ended.code in (0, None) else output.getvalue()
    raise AssertionError(f'{line}: parsed nothing')


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_and_anchors_lead_somewhere(page):
    for target in links(page):
        name, _, anchor = target.partition('#')
        path = (ROOT / page.parent / name).resolve() if name else ROOT / page
        assert path.exists() and ROOT in (path, *path.parents), f'{page}: {target}'
        assert not anchor or anchor in anchors(path), f'{page}: {target} is no heading there'


def test_every_page_and_picture_is_linked():
    reached = {(ROOT / page.parent / target.partition('#')[0]).resolve() for page in PAGES for target in links(page)}
    shown = {ROOT / page for page in PAGES if page != Path('README.md')} | set(ROOT.glob('docs/*.*'))
    assert not shown - reached


@pytest.mark.parametrize(('page', 'line'), commands())
def test_commands_are_understood_and_their_settings_are_valid(page, line, monkeypatch):
    bare = re.fullmatch(r'(python -m tread_composer \w+|python \S+\.py)', line)
    refused = parse(f'{line} --help' if bare else line, monkeypatch)
    assert not refused, f'{page}: {line}\n{refused}'
    for file in re.findall(r' (yamls/\w+\.\S+)', line):
        load_config(ROOT / file, [word for word in shlex.split(line) if re.match(r'[a-z][\w.]*=', word)])


def test_the_map_for_contributors_has_every_part_of_the_package():
    page, package = (ROOT / 'CONTRIBUTING.md').read_text(), ROOT / 'tread_composer'
    parts = {path.name for path in package.glob('*.py') if not path.name.startswith('__')}
    parts |= {f'{path.parent.name}/' for path in package.glob('*/__init__.py')}
    assert not {name for name in parts if f'`{name}`' not in page}


def test_the_map_of_the_readme_has_every_folder():
    page = (ROOT / 'README.md').read_text()
    shown = page[page.index('## Find your way') : page.index('Guides: ')]
    folders = {path.parent.name for path in (ROOT / 'tread_composer').glob('*/__init__.py')}
    folders |= {path.name for path in ROOT.iterdir() if path.is_dir() and any(path.glob('*.*')) and path.name[0] != '.'}
    written = {'data', 'runs', 'samples', 'sweep', 'comparison', 'inspection', 'build', 'dist'}
    folders = {name for name in folders if name not in written and not name.startswith('_') and '.' not in name}
    assert not {name for name in folders if f'{name}/' not in shown}


def test_the_reference_is_what_the_constructors_say():
    made = runpy.run_path(str(ROOT / 'docs' / 'reference.py'))
    assert (ROOT / 'docs' / 'configuration_reference.md').read_text() == made['reference']()


def test_the_citation_names_this_software_and_the_three_papers():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    project = re.search(r'^version = "(.+)"', (ROOT / 'pyproject.toml').read_text(), re.MULTILINE)
    assert project is not None and str(citation['version']) == project[1]
    assert {'cff-version', 'message', 'title', 'authors', 'license'} <= citation.keys()
    papers = {paper['identifiers'][0]['value']: paper for paper in citation['references']}
    assert set(papers) == {'arXiv:2501.04765', 'arXiv:2410.10356', 'arXiv:2306.09305'}
    for identifier, paper in papers.items():
        assert paper['url'].endswith(identifier.removeprefix('arXiv:')) and {'type', 'title', 'year'} <= paper.keys()
        assert all({'family-names', 'given-names'} == author.keys() for author in paper['authors'])
