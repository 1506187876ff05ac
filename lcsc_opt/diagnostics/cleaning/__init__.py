"""Getting rid of studies (:mod:`.studies`) and of what lies in the cache (:mod:`.cache`)."""
