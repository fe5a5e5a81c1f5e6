"""Prints short lines for ever, as fast as it can."""

import sys

while True:
    sys.stdout.write("chatter\n" * 5000)
