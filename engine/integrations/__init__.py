"""Integrations: the engine under the names of its neighbours, one file each.

Every file here uses the public API only, so it shows what a user's own integration can do.  `pccheck` has the names of
PCcheck.
"""
