"""What stays: manifests, tables, the answer, the report, and whether files are what these say."""
