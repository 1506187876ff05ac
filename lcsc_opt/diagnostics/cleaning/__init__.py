"""Deletes studies (:mod:`.studies`) and the contents of the cache (:mod:`.cache`)."""
