"""General helpers: files, devices, names, options and tables."""
