"""A callback named in a YAML: its node is lost in the middle of training, as by a power cut."""

import os
import signal

from composer.core import Callback, State
from composer.loggers import Logger


class LostNode(Callback):
    """Kills its process at the end of batch LOST_AT on node 1, as the environment says; else nothing."""

    def batch_end(self, state: State, logger: Logger) -> None:
        if os.environ['NODE'] == '1' and state.timestamp.batch == int(os.environ.get('LOST_AT', '0')):
            os.kill(os.getpid(), signal.SIGKILL)
