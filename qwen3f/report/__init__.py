"""report.html: what a run or a pipeline did, in one file that needs nothing else. Its page: README.md beside this."""
