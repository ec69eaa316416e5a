"""Results of a sweep: manifests, tables, the answer, the report, and the verification of files."""
