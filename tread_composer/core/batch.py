"""The names of the entries of a batch: one place, so that data, callbacks, algorithms and model agree.

A batch is a plain ``dict`` whose values have the sample as their first dimension, so Composer's microbatch split
slices every entry alike. The reader fills the first three; the others are drawn on ``Event.BATCH_START``, for the
whole device batch at once, so that a result depends neither on the microbatch size nor on an out-of-memory retry.
"""

__all__ = [
    'DIRECTION_SWITCH', 'KEPT_TOKENS', 'LABELS', 'LABEL_DROPPED', 'NOISE', 'POSTERIOR_NOISE', 'RAW_LATENTS',
    'SAMPLE_IDS', 'TIME_QUANTILES', 'UNMASKED_TOKENS',
]  # fmt: skip

RAW_LATENTS = 'raw_latents'  # [B, C, H, W] as stored (kind `moments`: [B, 2C, H, W], mean then log-variance)
LABELS = 'labels'  # [B] int64, 0 .. num_classes - 1
SAMPLE_IDS = 'sample_ids'  # [B] int64, position in the data set: what randomness is keyed by

NOISE = 'noise'  # [B, C, H, W] float32, the objective's Gaussian noise
TIME_QUANTILES = 'time_quantiles'  # [B] float32 in (0, 1); the objective turns a quantile into a time or a sigma
LABEL_DROPPED = 'label_dropped'  # [B] bool, replace this label by the null label
POSTERIOR_NOISE = 'posterior_noise'  # [B, C, H, W] float32, only where the data set stores VAE moments

DIRECTION_SWITCH = 'direction_switch'  # [B] float32, 1 or 0: the velocity-direction loss is on; on where it is absent

KEPT_TOKENS = 'tread_kept_tokens'  # [B, sum of K over the routes] int64, see algorithms/tread
UNMASKED_TOKENS = 'maskdit_kept_tokens'  # [B, K] int64, what MaskDiT's encoder sees, see algorithms/maskdit
