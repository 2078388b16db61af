"""Fast twins of plain parts: the same numbers in less time and memory.

`table.py` lists them: plain class and method → twin, and the plain methods it replaces. A part that
is subclassed, patched, replaced or hooked runs as written in `modeling/`; all others run their twin
(`utils/twins.py` decides and logs). `MODEL.FAST False` runs everything as written.

    setup.py             applies MODEL.FAST and MODEL.CHECKPOINTING to a built model
    model.py             mask logits stay factors between decoder and criterion
    frozen_norm.py       frozen batch norms folded into convolutions
    pixel_decoder.py     host-side level sizes, feed-forward network in chunks
    decoder.py           attention masks from features resized once per scale
    attention.py         one attention mask for all heads
    window_attention.py  Swin's window attention by fused kernels
    criterion.py         matching and losses of all layers together
    mask_factors.py      mask logits as the product of embeddings and features
    point_sampling.py    bilinear samples of masks and features
    postprocessing.py    inference over a few rows of masks at a time
    checkpointing.py     activation checkpointing

Imports go from here to `modeling/`, never back; `maskformer_model.py` and the trainer call
`setup.py`.
"""
