"""Data to a few numbers by trained networks, and by scores of the latents."""
