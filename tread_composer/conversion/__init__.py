"""From images in any usual layout to MDS data sets of latents; also from latents that other projects have made."""
