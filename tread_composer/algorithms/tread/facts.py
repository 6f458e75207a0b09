"""What a route says of a run before there is one: what speaks against it, and what it saves."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tread_composer.core.errors import UserError
from tread_composer.routing import Route, TokenArguments, apply_tread, check_routes, find_blocks

__all__ = ['RouteFacts']


class RouteFacts:
    """What the configuration, ``plan`` and ``compare`` ask of ``Tread``; see ``core.protocols.AlgorithmFacts``."""

    routes: tuple[Route, ...]
    start_time: str | None
    end_time: str | None
    blocks: Any
    token_arguments: TokenArguments | None
    always_keep: int | list[int]

    def problems(self, config: Any) -> Iterator[tuple[str, str]]:
        """What speaks against it in a run with this ``Config``: pairs of a setting ('' for all of it) and a text."""
        depth = config.depth()
        try:
            if depth is not None:
                check_routes(self.routes, depth)
        except ValueError as error:
            yield '', f'{error}; change the route or model.depth'
            return
        written, needed = self.token_arguments, config.token_arguments()
        # Without the setting, the network itself says which arguments follow the tokens.
        missing = [] if written is None else [name for name in needed if name not in written]
        if written is not None and missing:
            yield (
                'token_arguments',
                f'{list(written)}, but a block of model {config.model.name!r} is also given {", ".join(missing)}, with '
                'a row for each token that says where it is in the image; the rows must follow the tokens that a route '
                'keeps. Leave token_arguments out, or write token_arguments: '
                f'[{", ".join(dict.fromkeys([*written, *needed]))}]',
            )

    def cost_window(self) -> tuple[str | None, str | None]:
        """Time strings from and until which tokens are saved; None: from the beginning, to the end."""
        return self.start_time, self.end_time

    def tokens_per_block(self, depth: int, num_tokens: int) -> list[int]:
        """How many tokens each block sees while routing is on."""
        counts = [num_tokens] * depth
        for route in self.routes:
            start, end = route.span(depth)
            counts[start : end + 1] = [route.num_kept(num_tokens, self.always_keep)] * (end - start + 1)
        return counts

    def plan_rows(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """What ``plan`` prints of the route: blocks, share of the tokens, and the time of routing where it has one."""
        window = {'start_time': self.start_time, 'end_time': self.end_time}
        schedule = ''.join(f', {name} {time}' for name, time in window.items() if time)
        return {'route': '; '.join(plan['routes']) + schedule}

    @contextlib.contextmanager
    def rehearse(self, denoiser: Any, batch_size: int) -> Iterator[None]:
        """Route the training forwards of a network on the meta device, so that their cost can be counted.

        Raises:
            UserError: The network has no blocks of that name.
        """
        model = nn.Module()  # blocks are named as in the model around the network
        model.denoiser = denoiser
        for path in [self.blocks] if isinstance(self.blocks, str) else self.blocks or []:
            try:
                find_blocks(model, path)
            except ValueError as error:
                raise UserError(f"algorithms.tread.{error}. Here the block list is 'denoiser.blocks'") from None
        routing = apply_tread(denoiser, self.routes, always_keep=self.always_keep)
        counts = [route.num_kept(denoiser.num_tokens, self.always_keep) for route in self.routes]
        kept = [torch.empty(batch_size, count, dtype=torch.int64, device='meta') for count in counts]
        routing.arm(kept, num_tokens=denoiser.num_tokens)
        try:
            yield
        finally:
            routing.disarm()
