"""Cosmology as pure functions of theta: expansion, power, Limber spectra, log-normal shift."""
