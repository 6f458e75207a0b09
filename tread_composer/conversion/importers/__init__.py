"""Latents that other projects have made, as data sets of this one."""
