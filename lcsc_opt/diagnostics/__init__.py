"""What is wrong with a database, and where the time of a trial goes."""
