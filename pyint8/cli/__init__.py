"""The command line: one verb a file, which prints what an operation returns. Nothing heavy is imported for its help."""
