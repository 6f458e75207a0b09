"""Route a model that knows nothing of routing: diffusers' Flux, tiny, on random numbers, with Composer's Trainer.

    python docs/your_model.py

Needs diffusers. Prints how many tokens each block saw in training and in evaluation.
"""

import torch
from composer import ComposerModel, Trainer
from diffusers import FluxTransformer2DModel
from torch import Tensor
from torch.utils.data import DataLoader

from tread_composer import Tread

SIDE, TEXT, WIDTH = 8, 6, 16  # 64 image tokens, 6 text tokens


class TextToImage(ComposerModel):
    """Somebody's training code: batches are tuples, the transformer is diffusers' own."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(
            patch_size=1, in_channels=4, num_layers=4, num_single_layers=4, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4),
        )  # fmt: skip
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing='ij')
        self.places = torch.stack([torch.zeros(SIDE, SIDE), rows, columns], dim=-1).reshape(-1, 3)

    def forward(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The velocity from image to noise."""
        image, noise, text, pooled, time = batch
        t = time[:, None, None]
        return self.transformer(
            (1 - t) * image + t * noise, text, pooled, time,
            img_ids=self.places.to(image), txt_ids=torch.zeros(TEXT, 3).to(image), return_dict=False,
        )[0]  # fmt: skip

    def loss(self, outputs: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        """Flow matching."""
        image, noise = batch[:2]
        return (outputs - (noise - image)).square().mean()


def main() -> None:
    """Train four batches with half of the image tokens on the middle blocks, then call the model as it is."""
    torch.manual_seed(0)
    shapes = ((SIDE**2, 4), (SIDE**2, 4), (TEXT, WIDTH), (WIDTH,))
    samples = [(*(torch.randn(shape) for shape in shapes), torch.rand(())) for _ in range(32)]
    model = TextToImage()
    keys = list(model.state_dict())

    tread = Tread(
        start=2,
        end=-3,
        selection_rate=0.5,
        blocks=['transformer.transformer_blocks', 'transformer.single_transformer_blocks'],
        tokens='hidden_states',
        tokens_out=1,
        token_arguments={'image_rotary_emb': {'dims': 0, 'after': 'encoder_hidden_states'}},
        shared=True,
    )
    trainer = Trainer(
        model=model,
        train_dataloader=DataLoader(samples, batch_size=8),
        optimizers=torch.optim.AdamW(model.parameters(), lr=1e-3),
        algorithms=[tread],
        max_duration='4ba',
        seed=17,
        progress_bar=False,
    )

    seen: list[int] = []
    for stack in (model.transformer.transformer_blocks, model.transformer.single_transformer_blocks):
        for index in range(len(stack)):
            stack[index].register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(kwargs['hidden_states'].shape[1]), with_kwargs=True
            )
    trainer.fit()
    print('training:  ', *seen[-8:])
    seen.clear()
    batch = next(iter(DataLoader(samples, batch_size=8)))
    with torch.no_grad():
        model.eval()(trainer.state.device.batch_to_device(batch))
    print('evaluation:', *seen)
    print('state-dict keys unchanged:', list(model.state_dict()) == keys)


if __name__ == '__main__':
    main()
