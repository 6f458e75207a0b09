"""How the ranks of a job meet: within minutes, in words, and with a refusal of the first rank reaching all nodes.

``init_process_group`` alone waits without a word for a rank that never comes, and while it waits nobody learns that the
first rank has refused the configuration. So the ranks meet at a store of torch's first (the one at ``MASTER_ADDR`` and
``MASTER_PORT``, which the process group then uses as well).
"""

import contextlib
import datetime
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from tread_composer.core.errors import UserError, first_line
from tread_composer.core.launch import global_rank, world_size

__all__ = ['Rendezvous']

_JOIN_SECONDS = 300.0
_REPORT_SECONDS = 30.0
_POLL_SECONDS = 0.1
_READ_SECONDS = 5.0
_LATE_SECONDS = 20.0  # for ranks of other nodes, which may start later and would wait the whole limit
_READY, _REFUSED, _RANK, _READ = 'ready', 'refused', 'rank/', 'read/'
_REMEDY = (
    'it must be an address of the first node that all nodes reach, and a free port (a host name that resolves to '
    '127.0.1.1 is not; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network interface)'
)


class Rendezvous:
    """The meeting of this process with the other ranks of its job, who wait ``limit`` seconds for each other.

    Raises:
        UserError: The first rank cannot listen at ``MASTER_PORT``, or another cannot reach it within the limit.
    """

    def __init__(self, limit: float = _JOIN_SECONDS) -> None:
        self.rank, self.world, self._end = global_rank(), world_size(), time.monotonic() + limit
        self._limit, self._reported = limit, time.monotonic()
        if self.world == 1:
            return
        self._address = (os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT']))
        # torchrun's agent has opened the store already, and keeps it for the next attempt after a failure.
        agent = os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True'
        hosts = self.rank == 0 and not agent
        if not hosts:
            self._reach()
        try:
            store = TCPStore(
                *self._address, is_master=hosts, wait_for_workers=False, timeout=datetime.timedelta(seconds=limit)
            )
        except (RuntimeError, OSError) as error:
            raise UserError(f'{self._place}: {first_line(error)}; {_REMEDY}') from None
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        self._store = PrefixStore(f'tread_composer/{attempt}', store)
        self._store.set(f'{_RANK}{self.rank}', socket.gethostname())

    @property
    def _place(self) -> str:
        return f'MASTER_ADDR:MASTER_PORT = {self._address[0]}:{self._address[1]}'

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Tell the other ranks what the first one refuses inside of the block, before the error goes on its way."""
        try:
            yield
        except UserError as error:
            if self.world > 1:
                self._store.set(_REFUSED, str(error))
                # The store ends with this process: every other rank must have read it, and on one node who has come.
                one_node = int(os.environ.get('LOCAL_WORLD_SIZE', '1')) == self.world
                end = time.monotonic() + (_READ_SECONDS if one_node else _LATE_SECONDS)
                while not self._all_have_read(self._missing() if one_node else ()) and time.monotonic() < end:
                    time.sleep(_POLL_SECONDS)
            raise

    def join(self, backend: str, timeout: float) -> None:
        """Wait for all ranks, then make the process group: ``gloo`` or ``nccl``, with seconds for a collective.

        Raises:
            UserError: A rank did not come, or the first rank has refused.
        """
        if self.world == 1:
            return
        if self.rank == 0:
            self._gather()
        else:
            self._await_first()
        limit = datetime.timedelta(seconds=timeout)
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.world, timeout=limit)

    def _gather(self) -> None:
        while missing := self._missing():
            names = ', '.join(str(rank) for rank in missing[:8]) + (', ...' if len(missing) > 8 else '')
            text = f'{len(missing)} of {self.world} ranks ({names}) at {self._address[0]}:{self._address[1]}'
            if time.monotonic() > self._end:
                problem = f'{text} did not come within {self._limit:.0f} s; look at what their nodes printed. {_REMEDY}'
                self._store.set(_REFUSED, problem)
                raise UserError(problem)
            self._report(f'waiting for {text}')
            time.sleep(_POLL_SECONDS)
        self._store.set(_READY, '')

    def _await_first(self) -> None:
        try:
            while not self._store.check([_READY]):
                if self._store.check([_REFUSED]):
                    text = self._store.get(_REFUSED).decode()
                    self._store.set(f'{_READ}{self.rank}', '')
                    raise UserError(text)
                # The first rank names those that did not come, so it goes before.
                if time.monotonic() > self._end + _REPORT_SECONDS:
                    raise UserError(f'{self._place}: the first rank was not ready within {self._limit:.0f} s')
                self._report(f'rank {self.rank} of {self.world}: waiting for rank 0, which checks the configuration')
                time.sleep(_POLL_SECONDS)
        except (RuntimeError, OSError):  # the connection broke: the store was the first rank's
            text = f'{self._place}: rank 0 has ended while rank {self.rank} waited; its output says why'
            raise UserError(text) from None

    def _reach(self) -> None:
        """Wait until somebody listens: the first rank may start later."""
        while True:
            try:
                socket.create_connection(self._address, timeout=5).close()
                return
            except OSError as error:
                if time.monotonic() > self._end:
                    text = f'{self._place} cannot be reached from {socket.gethostname()}: {error}; {_REMEDY}'
                    raise UserError(text) from None
                self._report(f'rank {self.rank} of {self.world}: waiting for rank 0 at {self._place} ({error})')
                time.sleep(_POLL_SECONDS)

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.world) if not self._store.check([f'{_RANK}{rank}'])]

    def _all_have_read(self, absent: Collection[int]) -> bool:
        return all(self._store.check([f'{_READ}{rank}']) for rank in range(1, self.world) if rank not in absent)

    def _report(self, text: str) -> None:
        if os.environ.get('LOCAL_RANK', '0') == '0' and time.monotonic() - self._reported > _REPORT_SECONDS:
            self._reported = time.monotonic()
            print(text, file=sys.stderr, flush=True)
