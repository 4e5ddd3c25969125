"""Whole models trained with `fastvae.ELBO`, one file per kind, to be read and copied from."""
