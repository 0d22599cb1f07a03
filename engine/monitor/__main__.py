"""The monitor's process: ``python -m engine.monitor FD``, which `client` starts.

FD is a socket whose other end the trainer has.
"""

import sys

from engine.monitor.server import main

if __name__ == "__main__":
    main(int(sys.argv[1]))
