"""A module that takes longer to load than a call of test_killable.py may take."""

import time

time.sleep(1.5)
