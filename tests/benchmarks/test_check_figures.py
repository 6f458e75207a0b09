"""``benchmarks/check_figures.py``: the figures of the documents hold, and one that does not is named."""

import shutil

from check_figures import FIGURES, stale_figures

from tests.runs import ROOT


def test_the_figures_of_the_documents_hold():
    assert not stale_figures()


def test_a_stale_figure_is_named_with_its_page_and_new_value(tmp_path):
    for page in FIGURES:
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / page, tmp_path / page)
    changes = {'docs/imagenet.md': ('69.13', '70.13'), 'yamls/digits.yaml': ('96.7 %', '96.8 %')}
    for page, (old, new) in changes.items():
        text = (ROOT / page).read_text()
        assert old in text
        (tmp_path / page).write_text(text.replace(old, new))
    (tmp_path / 'README.md').write_text('')
    stale = '\n'.join(stale_figures(tmp_path))
    assert "docs/imagenet.md: 70.13 in 'GMACs per image" in stale and 'is 69.13 now' in stale
    assert 'yamls/digits.yaml: 96.8 % (96.4 to 97.2) in' in stale and 'is 96.7 % (96.4 to 97.2) now' in stale
    assert stale.count('README.md: no figure matches') == len(FIGURES['README.md'])
    assert len(stale.splitlines()) == len(FIGURES['README.md']) + 2
