"""Saves checkpoints so that a kill or a full disk at any moment leaves the last whole one to go on from."""

import contextlib
import copy
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from composer.callbacks import CheckpointSaver
from composer.core import State
from composer.loggers import Logger
from composer.utils import checkpoint, create_symlink_file, dist, format_name_with_dist
from torch.distributed.checkpoint.api import CheckpointException

from tread_composer.core.errors import UserError
from tread_composer.io import checkpoints as disk
from tread_composer.io.files import UNFINISHED, to_disk
from tread_composer.io.progress import to_stderr
from tread_composer.io.ranks import agreed, gathered, nodes_without, send_file
from tread_composer.io.tensors import host_copy

__all__ = ['WholeCheckpointSaver']

Result = TypeVar('Result')

_write_file = checkpoint._write_checkpoint_file  # bound here: `_copy` replaces it for a moment
_LONG_SECONDS, _LONG_SHARE = 1.0, 0.01  # of the time since the save before


class WholeCheckpointSaver(CheckpointSaver):
    """Composer's saver, with the same arguments, for a local folder; add it to the callbacks of a ``Trainer``.

    What differs: a checkpoint is written under another name and renamed when it is whole; ``latest`` changes in one
    step; the number to keep counts what is in the folder, not what this process has saved; a disk that is full is
    said in words. When training starts, what a killed write left is removed, damaged checkpoints are set aside, and
    ``latest``, from which ``autoresume`` goes on, is made to name the newest whole one.

    Args:
        in_background: Training waits only for a copy in the memory of the host, which a thread then writes; the next
            save waits for it, so at most one is under way. Sharded checkpoints are written at once in any case: each
            rank has a share only.
        *arguments, **settings: those of Composer's ``CheckpointSaver``.
    """

    def __init__(self, *arguments: Any, in_background: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.in_background = in_background
        self._writer = ThreadPoolExecutor(1, 'checkpoint')
        self._future: Future[None] | None = None  # of the rank that writes
        self._under_way: tuple[State, Logger, Path] | None = None
        self._saved_at: float | None = None
        self._advised = in_background

    def init(self, state: State, logger: Logger) -> None:
        """Make the folder."""
        try:
            super().init(state, logger)
        except OSError as error:
            raise UserError(f'save_folder: {self.folder!r} cannot be made: {error}') from None
        self._root = Path(format_name_with_dist(self.folder, state.run_name))

    def before_load(self, state: State, logger: Logger) -> None:
        """Put right what is in the folder: the model is sharded by now, and the checkpoint not chosen yet."""
        self._on_first_rank(lambda: self._put_right(state))
        if dist.get_world_size() > dist.get_local_world_size():
            self._reach_all_nodes(state)

    def _reach_all_nodes(self, state: State) -> None:
        """Nodes with disks of their own: the first one's newest checkpoint goes to the others."""
        nodes = nodes_without(self._root)
        if not nodes:
            return
        if state.fsdp_sharded_state_dict_enabled:
            numbers = ', '.join(map(str, sorted(nodes)))
            raise UserError(
                f'save_folder: {self._root} is another folder on node {numbers} than on node 0, so each node would '
                f'save its own part of a sharded checkpoint, and none could resume. Give a save_folder on a disk that '
                f'all nodes share, or set parallelism_config.fsdp.state_dict_type=full'
            )
        if self.latest_filename is None:
            return
        # The first rank's name for it, which Composer gives to all ranks, too.
        latest = Path(dist.all_gather_object(os.path.abspath(self.latest_filename.format(state)))[0])
        if dist.all_gather_object(latest.exists())[0]:
            send_file(latest, nodes)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse to train where checkpoints of later batches are, which count as newest; ``overwrite`` renames them."""
        self._on_first_rank(lambda: self._make_way(state))
        super().fit_start(state, logger)

    def _make_way(self, state: State) -> None:
        batch, latest = int(state.timestamp.batch), self._latest(state)
        for path in disk.checkpoints_in(self._root, self._names(state), after=batch):
            # A sharded copy does not say its batch. This run has begun at it, or `point_to` will rename it.
            if batch > 0 and path == latest and path.is_dir():
                continue
            if not self.overwrite:
                raise UserError(
                    f'save_folder: {path} is of a later batch than {batch}, where this run begins. Go on from it '
                    f'(autoresume=true), take another run_name, or let it be replaced (save_overwrite=true)'
                )
            to_stderr(f'{path}: now {disk.set_aside(path, ".replaced").name}, as this run begins at batch {batch}')

    def _latest(self, state: State) -> Path | None:
        return None if self.latest_filename is None else Path(self.latest_filename.format(state))

    def _put_right(self, state: State) -> None:
        latest, leftovers = self._latest(state), disk.remove_unfinished(self._root)
        newest, damaged = disk.newest_whole(self._root, self._names(state))
        for path, reason in damaged.items():
            to_stderr(f'{path}: damaged, now {disk.set_aside(path).name}: {reason}')
        if newest is None:
            if latest is not None and latest.is_symlink():
                latest.unlink()
            if damaged or leftovers:
                to_stderr(f'{self._root}: holds no whole checkpoint, so the run starts from its beginning')
            return
        if newest.is_dir() != state.fsdp_sharded_state_dict_enabled:
            kind, expected = ('sharded', 'full') if newest.is_dir() else ('full', 'sharded')
            raise UserError(
                f'save_folder: {newest} is a {kind} checkpoint, and this run reads and writes {expected} ones; go on '
                f'with parallelism_config.fsdp.state_dict_type={kind}, or take another run_name'
            )
        if latest is not None and newest != latest:
            disk.point_to(latest, newest)

    def _names(self, state: State) -> list[re.Pattern[str]]:
        """What the names of its checkpoints match, without ``.pt``.

        Of both kinds: a run that was sharded before must not begin anew without a word.
        """
        prefix = getattr(state.fsdp_config, 'sharded_ckpt_prefix_dir', None) or 'ep{epoch}-ba{batch}'
        names = []
        for template in (self.filename.filename, prefix):  # with Composer's placeholders
            pattern = re.escape(template.removesuffix('.pt')).replace(r'\{batch\}', r'(?P<batch>\d+)')
            names.append(re.compile(re.sub(r'\\\{(\w+)\\\}', r'[^/]+', pattern)))
        return names

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        """What every way to save comes through, ``Trainer.save_checkpoint_to_save_folder`` too; on all ranks."""
        began = time.monotonic()
        self.wait()
        self.last_checkpoint_batch = state.timestamp.batch
        requested = self.filename.format(state, keep_placeholders=True)
        file = Path(checkpoint.get_save_filename(state, requested))
        # Before it is saved: each checkpoint lists those before it and itself.
        self.all_saved_checkpoints_to_timestamp[str(file)] = state.timestamp
        if self.in_background and not state.fsdp_sharded_state_dict_enabled:
            content = self._together(lambda: self._copy(state, file))
            # Names are made of the timestamp, and that of the state moves on while the thread writes.
            moment = copy.copy(state)
            if content is not None:
                self._future = self._writer.submit(self._write_copy, content, moment, file)
            self._under_way = moment, logger, file
        else:
            self._finish(self._save(state, file), state, logger, file)
        self._log_duration(state, logger, began)

    def _save(self, state: State, file: Path) -> bool:
        """Write a checkpoint and publish it; whether this rank has written anything."""
        sharded = state.fsdp_sharded_state_dict_enabled
        path = file.parent if sharded else file
        # Sharded, Composer makes a folder of its own within the folder of the name that is asked for.
        unfinished = _unfinished(path)
        saved = self._together(lambda: self._write(state, unfinished / file.name if sharded else unfinished))
        if sharded:
            self._add_digests(unfinished / path.name)
        self._on_first_rank(lambda: self._publish(state, unfinished, path))
        return saved is not None

    def _log_duration(self, state: State, logger: Logger, began: float) -> None:
        """How long training waited; one line where that is much and could be less."""
        clock = time.monotonic()
        held, saved_at, self._saved_at = clock - began, self._saved_at, clock
        logger.log_metrics({'time/checkpoint': held})
        if saved_at is None or self._advised or held < max(_LONG_SECONDS, _LONG_SHARE * (clock - saved_at)):
            return
        self._advised = True
        if dist.get_global_rank() == 0:
            remedy = ', or set save_in_background=true, which takes as much memory of the host as the file has'
            to_stderr(
                f'A checkpoint held the training up for {held:.1f} s, {held / (clock - saved_at):.1%} of the time: '
                f'raise save_interval{"" if state.fsdp_sharded_state_dict_enabled else remedy}'
            )

    def wait(self) -> None:
        """Wait until the checkpoint that a thread is writing is whole; to be called on all ranks.

        Raises:
            UserError: It could not be written.
        """
        under_way, self._under_way = self._under_way, None
        future, self._future = self._future, None
        if under_way is not None:
            self._together(lambda: None if future is None else future.result())
            self._finish(future is not None, *under_way)

    def fit_end(self, state: State, logger: Logger) -> None:
        """The last checkpoint is whole before the run calls itself finished."""
        self.wait()
        super().fit_end(state, logger)

    def close(self, state: State, logger: Logger) -> None:
        """A run that ends early keeps what was being written. The ranks may not meet here: some may have failed."""
        if self._future is None or self._under_way is None:
            return
        error = self._future.exception()
        if error is None:
            self._finish(True, *self._under_way)
        else:
            fault = _disk_fault(error) or error
            to_stderr(f'save_folder: the last checkpoint could not be written to {self._root}: {fault}')
        self._future = self._under_way = None

    def _copy(self, state: State, file: Path) -> Any:
        """What Composer would write, in the memory of the host; None on a rank that writes nothing."""
        contents: list[Any] = []

        def keep(content: Any, filename: str) -> None:
            contents.append(host_copy(content))
            Path(filename).touch()  # Composer looks for it

        checkpoint._write_checkpoint_file = keep
        try:
            self._write(state, _unfinished(file))
        finally:
            checkpoint._write_checkpoint_file = _write_file
        return contents[0] if contents else None

    def _write_copy(self, content: Any, state: State, file: Path) -> None:
        """In the thread: as when it is saved at once, from the copy."""
        _write_file(content, str(_unfinished(file)))
        self._publish(state, _unfinished(file), file)

    def _write(self, state: State, unfinished: Path) -> Any:
        """Composer's own writing, to another place."""
        settings: dict[str, Any] = {'weights_only': self.weights_only, 'ignore_keys': self.ignore_keys}
        try:
            return checkpoint.save_checkpoint(state, str(unfinished), **settings)
        except (OSError, RuntimeError, CheckpointException) as error:
            if _disk_fault(error) is not None:
                dist.barrier()  # the one behind the writing, where ranks that had nothing to write wait
            raise

    def _add_digests(self, folder: Path) -> None:
        """Each rank reads its share of the files, whoever has written them."""
        names = dist.all_gather_object(sorted(os.listdir(folder)))[0]
        share = names[dist.get_global_rank() :: dist.get_world_size()]
        digests = gathered(self._together(lambda: disk.file_digests(folder, share)))
        merged = {name: digest for of_rank in digests for name, digest in of_rank.items()}
        self._on_first_rank(lambda: disk.write_digests(folder, merged))

    def _publish(self, state: State, unfinished: Path, path: Path) -> None:
        if state.fsdp_sharded_state_dict_enabled:
            disk.publish(unfinished / path.name, path)  # its files have been synced by torch's writer
            unfinished.rmdir()
        else:
            to_disk(unfinished)
            disk.publish(unfinished, path)
        latest = self._latest(state)
        if latest is not None:
            disk.point_to(latest, path)
        if self.num_checkpoints_to_keep > 0:
            for old in disk.checkpoints_in(self._root, self._names(state))[self.num_checkpoints_to_keep :]:
                disk.remove(old)

    def _finish(self, saved: bool, state: State, logger: Logger, file: Path) -> None:
        """What is left to do with a checkpoint that is whole, on a rank that has saved some of it."""
        if saved:
            self._upload_saved(state, logger, file)
            self.saved_checkpoints.append(str(file))

    def _upload_saved(self, state: State, logger: Logger, file: Path) -> None:
        """Hand what this rank has written to the loggers that store files, under Composer's names."""
        if self.remote_file_name is None:
            return
        remote = self.remote_file_name.format(state).lstrip('/')
        pairs = [(file, remote)]
        if state.fsdp_sharded_state_dict_enabled:
            remote = os.path.join(os.path.dirname(remote), file.parent.name)
            names = [file.name, *(['.metadata', disk.DIGESTS] if dist.get_global_rank() == 0 else [])]
            pairs = [(file.with_name(name), f'{remote}/{name}') for name in names]
        for local, name in pairs:
            self._upload_checkpoint(name, str(local), [], logger)
        if self.latest_remote_file_name is not None and dist.get_global_rank() == 0:
            self.symlink_count += 1
            link = os.path.join(self.tmp_dir_for_symlink.name, f'latest.{self.symlink_count}.symlink')
            create_symlink_file(remote, link)
            name = f'{self.latest_remote_file_name.format(state).lstrip("/")}.symlink'
            logger.upload_file(remote_file_name=name, file_path=link, overwrite=True)

    def _on_first_rank(self, step: Callable[[], Any]) -> None:
        """Do a step on one rank while the others wait."""
        self._together(lambda: step() if dist.get_global_rank() == 0 else None)

    def _together(self, step: Callable[[], Result]) -> Result:
        """Do a step on all ranks. If it cannot be done on one, all say so, and what it has written makes room."""

        def in_words() -> Result:
            try:
                return step()
            except (OSError, RuntimeError, CheckpointException) as error:
                fault = _disk_fault(error)
                if fault is None:
                    raise
                raise UserError(
                    f'save_folder: a checkpoint could not be written to {self._root}: {fault}. Those that were saved '
                    f'before are whole: make room, or make the folder writable, and the same command goes on from them'
                ) from error

        try:
            return agreed(in_words)
        except UserError:
            if dist.get_global_rank() == 0:
                with contextlib.suppress(OSError):
                    disk.remove_unfinished(self._root)
            raise


# The key of its state within a checkpoint: those saved before, by Composer's own, have it too.
WholeCheckpointSaver.__qualname__ = CheckpointSaver.__qualname__


def _unfinished(path: Path) -> Path:
    """Where a checkpoint is written before it has its name."""
    return path.with_name(f'{UNFINISHED}{path.name}')


def _disk_fault(error: Any) -> str | None:
    """What the disk said, if it was the disk; torch's writers wrap that in errors of their own."""
    if isinstance(error, CheckpointException):
        failures = [_disk_fault(failure[0]) for failure in error.failures.values()]
        return next((text for text in failures if text is not None), None)
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error.__context__, OSError):
        return str(error.__context__)
    is_writer = 'PytorchStreamWriter' in str(error) or 'inline_container' in str(error)
    return str(error).splitlines()[0] if is_writer else None
