"""The largest microbatch that trains on this GPU, dense and routed: by trying, each size with whole steps.

    python benchmarks/largest_microbatch.py yamls/dit_xl_tread.yaml [key=value ...]

Doubles until memory ends, then halves the interval down to an eighth of the size.
"""

import argparse
import dataclasses
import gc
import sys
from collections.abc import Sequence

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import torch
from contenders import Contender, make_contenders, read_problem
from measuring import Rows, environment

from tread_composer.core.errors import UserError


def fits(contender: Contender, size: int) -> bool:
    """Whether two steps with so many samples end: the first makes the optimizer's moments."""
    contender.problem = dataclasses.replace(contender.problem, batch_size=size)
    try:
        contender.batch = contender.problem.batch()
        for _ in range(2):
            contender.step(lambda: None)
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        contender.optimizer.zero_grad(set_to_none=True)
        contender.batch = {}
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is no GPU


def largest(contender: Contender, at_most: int) -> int:
    """The largest size that fits, to an eighth; 0 if not even 1 does."""
    good, bad = 0, at_most + 1
    size = 1
    while size < bad:
        if fits(contender, size):
            good = size
        else:
            bad = size
        size = 2 * good if bad > 2 * good else (good + bad) // 2
        if good == 0 or bad - good <= max(1, good // 8):
            break
    return good


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--dtype', choices=('bf16', 'fp32'), default='bf16')
    parser.add_argument('--at-most', type=int, default=4096, help='stop here; a CPU has no end of its own')
    options = parser.parse_intermixed_args(arguments)
    device = torch.device(options.device)
    try:
        problem = read_problem(
            options.yaml, options.overrides, batch_size=1, tokens=None, dtype=options.dtype, device=device
        )
        rows = Rows(
            {'yaml': options.yaml, 'overrides': options.overrides, 'dtype': options.dtype, **environment(device)}
        )
        contenders = make_contenders(problem)
        for number, contender in enumerate(contenders):
            # One alone has the device, as in training.
            contenders[1 - number].model.to('cpu')
            contender.model.to(device)
            size = largest(contender, options.at_most)
            rows.add('largest_microbatch', contender=contender.name, samples=size, at_most=options.at_most)
            contender.optimizer.state.clear()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
