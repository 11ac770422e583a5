"""The public data sets of the pipeline: where each lies, its columns, and how a row of it becomes an example."""
