"""One search: ``planning`` with its objective, ``opening`` in the database, and the ``loop``."""
