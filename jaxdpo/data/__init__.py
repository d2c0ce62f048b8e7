"""From what `--data` names to packed batches of preference trees, on the host: never jax, never a device.

Read in this order: `formats` (record -> text), `chat` (messages -> text), `sources` (name -> records), `tokenize` (text
-> ids), `load` (all of it once, kept in a cache), `dataset` (ids on disk), `audit` (what is wrong with it), `partners`
(what KTO compares with), `packing` (ids -> rows of one shape), `plan` (which groups are in which optimizer step),
`pipeline` (the microbatches of a step).
"""
