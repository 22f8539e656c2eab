"""Retrofit: a latent interface for a transformer that has none, through hooks on its blocks.

`layout.py` says where a foreign transformer keeps its tokens, `places.py` which of them the
latents start from, `interface.py` has a Read and a Write that change nothing at full budget,
`hooks.py` puts them around the core, `elastic.py` is the door.
"""
