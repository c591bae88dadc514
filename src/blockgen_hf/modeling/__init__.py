"""
The model: configuration, mask, diffusion, transformer, and the generation mixin.

Files named `*_blockgen.py` are the remote-code closure: they import only torch, transformers, the standard library
and one another, and `save_pretrained` copies them as they are. They stand in one folder because transformers copies
flat folders.
"""
