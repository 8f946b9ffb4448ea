"""The worker, where an agent that runs on through an update looks for it when it starts another."""

import sys

from pipeline.flow.agent_worker import work

if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]))
