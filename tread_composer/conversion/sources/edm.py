"""EDM's ``dataset.json``, which labels the images of numbered folders that are no classes."""

import json
from collections import Counter
from collections.abc import Sequence

from tread_composer.conversion.sources.base import few
from tread_composer.core.errors import UserError

__all__ = ['edm_labels']


def edm_labels(file: str, names: Sequence[str], content: bytes) -> list[int] | None:
    """The label of each image: the file is ``{"labels": [["00000/img00000000.png", 6], ...]}``, or has null for none.

    Raises:
        UserError: Not such a file, or not one whole number for each image.
    """
    try:
        rows = json.loads(content)['labels']
        labels = {} if rows is None else dict(rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file}: not the labels of an EDM data set ({error!r}). Move it away, or repair it') from error
    if rows is None:
        return None
    for fault, wrong in (
        ('has no label for', set(names) - set(labels)),
        ('labels images that are missing', set(labels) - set(names)),
        ('the label is no whole number of', [name for name, label in labels.items() if type(label) is not int]),
        ('lists more than once', [name for name, count in Counter(name for name, _ in rows).items() if count > 1]),
    ):
        if wrong:
            raise UserError(f'{file}: {fault}: {few(wrong)} ({len(wrong):,} in all). Repair it, or get the data anew')
    return [labels[name] for name in names]
