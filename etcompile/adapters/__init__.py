"""Modules of other frameworks as models; a file for each, which imports none of them unless it is given one of its objects."""
