"""Writing in the background: the encoder hands over a batch and goes on; disk and network are another thread's work."""

import collections
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from tread_composer.conversion.decoding import Prepared
from tread_composer.conversion.encoding import Encoded, Encoder
from tread_composer.conversion.merging import refuse_too_many
from tread_composer.conversion.parts import PartWriter
from tread_composer.conversion.plan import SplitPlan
from tread_composer.conversion.settings import Settings
from tread_composer.io.files import full_disk_in_words

__all__ = ['BackgroundWriter']


class BackgroundWriter:
    """A thread that makes parts out of batches, and brings finished ones to the disk or away.

    Use as a context manager: leaving it waits until all parts are done; leaving it by an exception gives up the
    unfinished part. Batches of a part must come together and in order.
    """

    def __init__(self, plans: Mapping[str, SplitPlan], encoder: Encoder, settings: Settings) -> None:
        self._plans, self._encoder, self._settings = plans, encoder, settings
        self._unreadable = {name: plan.unreadable for name, plan in plans.items()}
        self._pool = ThreadPoolExecutor(1, 'write-parts')
        self._waiting: collections.deque[Future] = collections.deque()
        self._failed = False
        self._writer: PartWriter | None = None

    def __enter__(self) -> 'BackgroundWriter':
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self._submit(self._finish_part)
                for future in self._waiting:
                    future.result()
        finally:
            self._pool.shutdown(cancel_futures=True)
            if self._writer is not None:
                self._writer.abandon()

    def put(self, item: Prepared, encoded: Encoded | None, meanwhile: Callable[[], None]) -> None:
        """Hand over a batch and its readable samples, if there are any.

        While the writer is a whole part behind, which the disk or an upload may cost, it waits and calls ``meanwhile``.
        What stopped the writer, e.g. a full disk or too many unreadable images, is raised here.
        """
        most = max(4, self._settings.part_size // self._settings.batch_size)
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= most):
            if wait([self._waiting[0]], timeout=0.2).done:
                self._waiting.popleft().result()
            else:
                meanwhile()
        self._submit(self._write, item, encoded)

    def _submit(self, step: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            if self._failed:  # what was handed over before the failure was noticed belongs to a part that is given up
                return
            self._failed = True
            with full_disk_in_words(self._settings.state):
                step(*arguments)
            self._failed = False

        self._waiting.append(self._pool.submit(guarded))

    def _write(self, item: Prepared, encoded: Encoded | None) -> None:
        split, part, _ = item.batch
        plan, folder, unreadable = self._plans[split], self._settings.state / split, self._unreadable[split]
        if self._writer is None or (self._writer.split, self._writer.part) != (split, part):
            self._finish_part()
            self._writer = PartWriter(folder, part, self._encoder, plan.content)
        source, writer = plan.source, self._writer
        for position, reason in item.unreadable:
            writer.unreadable.append({'name': source.names[position], 'reason': reason})
            unreadable.append(writer.unreadable[-1])
            refuse_too_many(plan, unreadable, self._settings)
        if encoded is not None:
            labels = [int(source.labels[position]) for position in item.positions]
            writer.write(encoded(), labels, [source.names[position] for position in item.positions])

    def _finish_part(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.finish(self._settings.remote and f'{self._settings.remote}/{writer.split}')
