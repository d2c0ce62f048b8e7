"""From a file of preferences to packed batches of preference trees; NumPy and Grain only, never a device.

Read in this order: `formats` (record -> text), `sources` (file -> records), `tokenize` (text -> ids), `partners` (what
KTO compares with), `packing` (ids -> rows of one shape), `pipeline` (which groups are in which optimizer step).
"""
