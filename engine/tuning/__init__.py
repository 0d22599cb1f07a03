"""Tuning: measure a host, and find the options and the checkpoint interval for one training on it.

`device` knows the drive below a directory, `measure` times parts of a save, `search` tries the options in turns,
`decide` chooses among the results, `interval` has the formulas, `cache` keeps the measurements, and `tune` joins them.
All but `tune` run without torch.
"""
