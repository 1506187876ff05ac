"""What can be deleted: studies of a database, and what lies in the cache."""
