"""report.html: what a run or a pipeline did, in one file that needs nothing else. Its page: README.md beside this."""

import logging

# Of fonts and caches that it lacks, of which a page needs none: said into a run, it would only alarm.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
