"""What ``import`` was asked for, and what the user says of a file of weights, because the file does not."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from tread_composer.core.options import Flag, check_request

__all__ = ['ImportRequest']


@dataclass(frozen=True)
class ImportRequest:
    """One call of ``import``.

    Args:
        path: .pt or .safetensors, as published or as their training saves it.
        out: The file to write.
        layout: Whose file it is (dit and sit must be named).
        weights: Which weights to take; for a file with one set, which set it is (published files: ema).
        overwrite: Replace a file that is there.
        autoencoder: What made the latents: a hub id, a folder, a file, or ``pixels``.
        latent_scale: Factor on raw latents in training; 0.18215 in DiT, SiT, CompVis/tread and MaskDiT.
        class_names: A file with one name a line or a JSON list, or ``numbers``.
        latent_shift: Subtracted from the raw latents before.
        latent_stats: LightningDiT's latents_stats.pt, mean and standard deviation of each channel, in place of scale
            and shift.
        autoencoder_hash: ``sha256:...`` of the autoencoder, if decoding with another is to be refused.
        objective: What a file of CompVis/tread predicts, which trains both.
        num_heads: Attention heads, for other than published sizes.
        route: First block, last block and selection rate that the weights were trained with.
        batch: Batches that they were trained on, if known.

    Raises:
        UserError: A value is out of range.
    """

    path: Annotated[str, Flag('FILE')]
    out: str = 'model.safetensors'
    layout: Literal['auto', 'dit', 'sit', 'tread', 'maskdit', 'lightningdit'] = 'auto'
    weights: Literal['ema', 'raw'] = 'ema'
    overwrite: bool = False
    autoencoder: str | None = None
    latent_scale: float | None = None
    class_names: str | None = None
    latent_shift: float = 0.0
    latent_stats: str | None = None
    autoencoder_hash: str | None = None
    objective: Literal['edm', 'flow_matching'] | None = None
    num_heads: Annotated[int | None, Ge(1)] = None
    route: Annotated[tuple[int, int, float] | None, Flag(metavar='START,END,RATE')] = None
    batch: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        check_request(self)
