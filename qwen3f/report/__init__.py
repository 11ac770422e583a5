"""report.html: shows what a run or a pipeline did, in one file that needs no other. See README.md in this folder."""

import logging

# matplotlib warns of missing fonts and caches. A page does not need them, and in a run's log the warnings would alarm.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
